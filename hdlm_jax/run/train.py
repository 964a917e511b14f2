"""The training loop: batches in, checkpoints and metrics out; rerunning it resumes."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from hdlm_jax.config import Config, ConfigError
from hdlm_jax.model.network import flops_per_token
from hdlm_jax.run import parallel
from hdlm_jax.run.checkpoint import Checkpoints, write_json
from hdlm_jax.run.evaluate import Evaluator, summarise
from hdlm_jax.run.metrics import MetricsFile, TensorBoard, peak_flops, plot_curves, progress, read_metrics, say
from hdlm_jax.run.stages import cluster, prepare, word_vectors
from hdlm_jax.run.state import abstract_state, build, init_state, make_optimizer, make_train_step

RESUME_EXIT = 75  # leaving on SIGTERM with everything saved: run the same command again
# sections in which a resumed run must not differ, and the settings in them that may
_FIXED = ("tokenizer", "hierarchy", "diffusion", "model", "optimizer", "train")
FREE = ("train.log_every", "train.microbatches", "train.evaluate_every", "model.remat")


class TrainingStopped(RuntimeError):
    """The loss is no longer finite: the step, the last finite metrics and the checkpoint to go back to."""


def check_resume(config: Config, meta: dict, path: str) -> None:
    """ConfigError if a checkpoint belongs to another configuration."""
    from hdlm_jax.run.api import check_format

    check_format(meta["config"], path)
    now = json.loads(json.dumps(config.as_dict()))
    for section in _FIXED:
        for name, value in now[section].items():
            saved = meta["config"][section].get(name)
            free = f"{section}.{name}" in FREE or (name == "steps" and config.optimizer.schedule == "constant")
            if saved != value and not free:
                raise ConfigError(f"{section}.{name}={value!r}: the checkpoint in {path} was trained with {saved!r}; "
                                  "use another --workdir or the old setting")


def train(config: Config, workdir: str, profile: bool = False) -> Any:
    """Trains (or goes on training) to config.train.steps; returns the final TrainState.

    Under workdir: config.json, checkpoints/, metrics.jsonl, curves.png, and what prepare and cluster make.

    Raises:
      ConfigError: a checkpoint of another configuration. TrainingStopped: the loss is not finite.
    """
    from hdlm_jax.text.pipeline import TrainBatches, valid_rows

    began = time.time()
    mesh = parallel.make_mesh(config)
    shards = parallel.batch_shards(mesh)
    if config.train.batch_size % (shards * config.train.microbatches):
        raise ConfigError(f"train.batch_size={config.train.batch_size}: must be a multiple of the {shards} batch "
                          f"shards of the mesh times train.microbatches={config.train.microbatches}")
    text = prepare(config, workdir)
    batches = TrainBatches(text.dir, config.model.seq_len, config.train.batch_size, config.train.seed,
                           jax.process_index(), jax.process_count())
    hierarchy = cluster(config, workdir, text)
    network, process = build(config, hierarchy)
    tx, schedule = make_optimizer(config)
    abstract, shardings = abstract_state(config, hierarchy, network, tx, mesh)
    jitted = parallel.compile_step(make_train_step(config, network, process, tx, mesh), mesh, shardings)

    checkpoints = Checkpoints(workdir)
    facts = {"data": text.manifest.fingerprint, "tokenizer": text.tokenizer.fingerprint,
             "hierarchy": hierarchy.fingerprint}
    start = checkpoints.latest() or 0
    if start:
        saved = checkpoints.meta(start)
        check_resume(config, saved, checkpoints.path)
        for name in facts:
            if saved[name] != facts[name]:
                raise ConfigError(f"{name} fingerprint {facts[name][:12]}: the checkpoint in {checkpoints.path} was "
                                  f"trained with {saved[name][:12]}; use another --workdir")
        say(f"train: resuming from step {start:,} of {config.train.steps:,}")
    key = jax.random.key(config.train.seed)
    first_batch = parallel.put_batch(mesh, batches.batch(start))
    stop, stop_listening = _on_sigterm()
    compiling = time.time()
    # before the state is made, so that the memory of compiling is free again
    step_fn = parallel.compile_ahead(jitted, abstract, first_batch, key) if start < config.train.steps else jitted
    compiled = time.time()
    state = (checkpoints.restore(start, abstract) if start else
             _fresh_state(config, text, hierarchy, network, tx, shardings))
    if jax.process_index() == 0:
        text.tokenizer.save(os.path.join(workdir, "tokenizer"))
        kept = config.as_dict()
        kept["data"]["dir"] = config.data.dir and os.path.abspath(config.data.dir)
        write_json(os.path.join(workdir, "config.json"), kept)
    params = sum(a.size for a in jax.tree.leaves(abstract.params))
    say(f"train: {params:,} parameters, {config.train.batch_size} x {config.model.seq_len} tokens a step, "
        f"{config.train.steps:,} steps, {jax.device_count()} {jax.devices()[0].device_kind} "
        f"({dict(mesh.shape)}), workdir {workdir}")
    if start >= config.train.steps:
        stop_listening()
        say(f"train: nothing to do, step {start:,} is there")
        checkpoints.close()
        return state

    evaluator = Evaluator(config, network, process, mesh, abstract.params)
    rows = valid_rows(text.dir, config.model.seq_len, config.evaluate.rows_in_training)
    metrics_path = os.path.join(workdir, "metrics.jsonl")
    writers: list[Any] = [MetricsFile(metrics_path, start), TensorBoard(os.path.join(workdir, "tensorboard"))]
    peak = peak_flops(jax.devices()[0].device_kind)
    flops = flops_per_token(config, hierarchy, process.chain)
    every = config.train.evaluate_every or config.checkpoint.every
    tokens_a_step = config.train.batch_size * config.model.seq_len
    window: list[dict[str, float]] = []
    clock = {"since": time.time(), "wait": 0.0, "steps": -1}  # the first step compiles and is not timed
    last: dict[str, Any] = {}
    first: dict[str, float] = {}

    def finish(done, force: bool = False) -> dict[str, Any] | None:
        """Reads the metrics of a dispatched step; a record where one is due or forced."""
        nonlocal last
        step, device_metrics = done
        values = {k: float(v) for k, v in device_metrics.items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            back = checkpoints.latest()
            raise TrainingStopped(
                f"train: loss={values['loss']} grad_norm={values['grad_norm']} at step {step}; last finite {last}; "
                + (f"checkpoint to go back to: step {back} in {checkpoints.path}" if back else "no checkpoint yet"))
        last = {"step": step, **values}
        window.append(values)
        clock["steps"] += 1
        if step % config.train.log_every and not force:
            return None
        seconds = max(time.time() - clock["since"], 1e-9)
        rate: float | None = clock["steps"] * tokens_a_step / seconds
        if clock["steps"] < config.train.log_every:  # too short to time: step and read-out overlap by one
            rate = None
        mean = {name: float(np.mean([v[name] for v in window])) for name in ("loss", "nelbo", "grad_norm")}
        record = {"step": step, "tokens": step * tokens_a_step, **mean, "tokens_per_s": rate,
                  "lr": float(schedule(step - 1)),
                  "mfu": rate * flops / peak / jax.device_count() if peak and rate else None,
                  "input_wait": clock["wait"] / seconds}
        window.clear()
        clock.update(since=time.time(), wait=0.0, steps=0)
        speed = f" {rate:,.0f} tok/s" if rate else ""
        mfu = f" mfu={record['mfu']:.1%}" if record["mfu"] else ""
        bar.set_postfix_str(f"loss={record['loss']:.3f}{speed}{mfu}", refresh=False)
        return record

    def measure(step: int) -> dict[str, float]:
        pause = time.time()
        nats, tau, q = evaluator.nats(state.ema or state.params, rows, 1, "validation")
        result = summarise(nats, rows["score"].sum(-1), tau, q)
        clock["since"] += time.time() - pause
        return {"valid_nelbo": float(result["nelbo"]), "valid_se": float(result["se"])}

    def save(step: int, valid: dict[str, float]) -> None:
        meta = facts | {"config": config.as_dict(), "next_step": step}
        checkpoints.save(step, state, meta, {"nelbo": valid.get("valid_nelbo", math.inf)})

    trace = (min(start + 10, config.train.steps), min(start + 13, config.train.steps)) if profile else (-1, -1)
    iterator = batches.iterator(start)
    pending = None
    bar = progress(config.train.steps, start, "step", os.path.basename(os.path.normpath(workdir)))
    try:
        for step in range(start + 1, config.train.steps + 1):
            waited = time.time()
            batch = parallel.put_batch(mesh, next(iterator))
            clock["wait"] += time.time() - waited
            if step == trace[0]:
                jax.profiler.start_trace(os.path.join(workdir, "profile"))
            state, device_metrics = step_fn(state, batch, key)
            if step == start + 1:
                jax.block_until_ready(device_metrics)
                first = {"compile_s": round(compiled - compiling, 3), "first_step_s": round(time.time() - began, 3)}
                say(f"train: first step done after {first['first_step_s']:.1f} s, {first['compile_s']:.1f} s of it "
                    "compilation")
                clock.update(since=time.time(), wait=0.0)
            if step == trace[1]:
                jax.block_until_ready(device_metrics)
                jax.profiler.stop_trace()
                say(f"train: profile of {trace[1] - trace[0] + 1} steps in {os.path.join(workdir, 'profile')}")
            bar.update()
            due: list[dict[str, Any] | None] = [finish(pending)] if pending else []
            pending = (step, device_metrics)
            end = step == config.train.steps
            saves = end or step % config.checkpoint.every == 0
            leave = stop["asked"] and not end
            valid: dict[str, float] = {}
            if end or saves or leave or step % every == 0:
                record = finish(pending, force=True) or {}
                pending = None
                valid = {} if leave else measure(step)
                due.append(record | valid)
            for record in filter(None, due):
                record |= first
                first = {}
                for writer in writers:
                    writer.write(record)
            if saves or leave:
                save(step, valid)
            if leave:
                checkpoints.wait()
                say(f"train: asked to stop, saved step {step:,}; the same command resumes")
                raise SystemExit(RESUME_EXIT)
    finally:
        stop_listening()
        bar.close()
        checkpoints.wait()
        checkpoints.close()
        for writer in writers:
            writer.close()
    records = read_metrics(metrics_path)
    curves = os.path.join(workdir, "curves.png")
    drawn = plot_curves(curves, records, text.manifest.unigram_nats)
    final = [r for r in records if "valid_nelbo" in r][-1]
    say(f"train: done, step {config.train.steps:,}, validation NELBO {final['valid_nelbo']:.4f} +- "
        f"{final['valid_se']:.4f} nats/token on {len(rows['x'])} sequences "
        f"(unigram of the whole split {text.manifest.unigram_nats:.4f})"
        + (f", curves in {curves}" if drawn else ""))
    return state


def _fresh_state(config: Config, text, hierarchy, network, tx, shardings):
    """A state at step 0: random, from the clustering embeddings, or from another run's weights."""
    key = jax.random.key(config.train.seed)
    table = None
    if config.train.init_from:
        from hdlm_jax.run.api import load_params

        found = load_params(config.train.init_from, "best", text.tokenizer.fingerprint)
        state = jax.jit(lambda k: init_state(config, hierarchy, network, tx, k), out_shardings=shardings)(key)
        want, got = (jax.tree.map(lambda a: a.shape, t) for t in (state.params, found))
        if want != got:
            raise ConfigError(f"train.init_from={config.train.init_from!r}: its weights have other shapes than this "
                              "model; model and hierarchy sizes must agree")
        params = jax.tree.map(lambda a, s: jax.device_put(a, s), found, shardings.params)
        ema = jax.tree.map(lambda a: a.copy(), params) if config.optimizer.ema else {}
        say(f"train: starting from the weights of {config.train.init_from}")
        return state._replace(params=params, ema=ema)
    if config.model.embeddings == "clusters":
        from hdlm_jax.text.clusters import initial_table

        table = initial_table(word_vectors(config, text), hierarchy, config.model.width, seed=config.train.seed)
    init = jax.jit(lambda k, t: init_state(config, hierarchy, network, tx, k, t), out_shardings=shardings)
    return init(key, table)


def _on_sigterm() -> tuple[dict[str, bool], Callable[[], Any]]:
    """{"asked": True} once the process has been asked to stop (preemption), and what puts the old handler back."""
    flag = {"asked": False}

    def ask(*_):
        flag["asked"] = True

    try:
        old = signal.signal(signal.SIGTERM, ask)
    except ValueError:  # not the main thread: whoever runs us decides
        return flag, lambda: None
    return flag, lambda: signal.signal(signal.SIGTERM, old)
