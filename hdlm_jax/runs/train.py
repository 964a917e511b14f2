"""The training loop: batches in, checkpoints and metrics out; rerunning it resumes."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from hdlm_jax.common import jsons, lock, parallel, processes
from hdlm_jax.common.console import measured, progress, say
from hdlm_jax.common.jsons import write_json
from hdlm_jax.config import Config, ConfigError, resolve
from hdlm_jax.data.embeddings import initial_table
from hdlm_jax.data.pipeline import given, valid_rows
from hdlm_jax.evaluation.elbo import Evaluator, summarise
from hdlm_jax.models.network import flops_per_token
from hdlm_jax.runs.stages import batches_of, cluster, prepare, word_vectors
from hdlm_jax.training.build import build
from hdlm_jax.training.checkpoint import Checkpoints
from hdlm_jax.training.loading import check_writable, differences, load_params, upgraded
from hdlm_jax.training.metrics import MetricsFile, TensorBoard, peak_flops, plot_curves, read_metrics
from hdlm_jax.training.state import abstract_state, init_state, make_optimizer
from hdlm_jax.training.step import make_train_step

RESUME_EXIT = 75  # leaving on SIGTERM or Ctrl-C with everything saved: run the same command again
INTERRUPTED = 130  # leaving on Ctrl-C at once
# sections in which a resumed run must not differ, and the settings in them that may; of data its fingerprint counts
# and how sequences are made of it
_FIXED = ("tokenizer", "hierarchy", "diffusion", "model", "optimizer", "train")
_FIXED_DATA = ("data.packing", "data.padding", "data.variable_share", "data.stream", "data.shuffle_documents")


class TrainingStopped(RuntimeError):
    """Too many steps whose loss or gradient is not finite: which batch, and the checkpoint to go back to."""


def check_resume(config: Config, meta: dict, path: str) -> None:
    """ConfigError if a checkpoint belongs to another configuration; it names all settings that differ."""
    then = resolve(upgraded(meta["config"], path))  # with paths expanded, and settings of today
    differ = differences(config, then, _FIXED)
    if config.optimizer.schedule == "constant":
        differ = [text for text in differ if not text.startswith("train.steps=")]
    rows = _FIXED_DATA[: None if config.data.stream else 4]
    differ += [text for text in differences(config, then, ("data",)) if text.partition("=")[0] in rows]
    if not differ:
        return
    remedy = "use another --workdir or the old settings"
    if any(text.startswith("train.steps=") for text in differ):
        remedy += (", as the cosine schedule is made for its steps; or go on from its weights in another --workdir "
                   f"with --config.train.init_from={os.path.dirname(path)}")
    raise ConfigError(f"{'; '.join(differ)}: the checkpoint in {path} was trained otherwise; {remedy}")


def train(config: Config, workdir: str, profile: bool = False) -> Any:
    """Trains (or goes on training) to config.train.steps; returns the final TrainState.

    Under workdir: config.json, checkpoints/, metrics.jsonl, curves.png, and what prepare and cluster make. Of many
    processes the first writes; all of them need the workdir and data.dir.

    Raises:
      ConfigError: a checkpoint of another configuration, or another job at work there. TrainingStopped: the loss is no
        longer finite. OSError: what cannot be written or read; checkpoints that are whole stay as they are.
      SystemExit: RESUME_EXIT, it was asked to stop and has saved.
    """
    check_writable(workdir)
    with lock.held(os.path.join(workdir, "lock"), "train"), _Stop() as stop:
        return _train(config, workdir, profile, stop)


def _train(config: Config, workdir: str, profile: bool, stop: _Stop) -> Any:
    began = time.time()
    mesh = parallel.make_mesh(config)
    shards = parallel.batch_shards(mesh)
    if config.train.batch_size % (shards * config.train.microbatches):
        raise ConfigError(f"train.batch_size={config.train.batch_size}: must be a multiple of the {shards} batch "
                          f"shards of the mesh times train.microbatches={config.train.microbatches}")
    text = prepare(config, workdir)
    batches = batches_of(config, text)
    hierarchy = cluster(config, workdir, text)
    network, process = build(config, hierarchy)
    tx, schedule = make_optimizer(config)
    abstract, shardings = abstract_state(config, hierarchy, network, tx, mesh)
    jitted = parallel.compile_step(make_train_step(config, network, process, tx, mesh), mesh, shardings)

    checkpoints = Checkpoints(workdir)
    facts = {"data": text.manifest.fingerprint, "tokenizer": text.tokenizer.fingerprint,
             "hierarchy": hierarchy.fingerprint}
    start = processes.on_main_process(checkpoints.latest) or 0
    here = {"devices": jax.device_count(), "processes": jax.process_count(), "mesh": dict(mesh.shape)}
    position: dict | None = None
    window: list[dict[str, float]] = []  # metrics of the steps since the last record
    if start:
        saved = checkpoints.meta(start)
        check_resume(config, saved, checkpoints.path)
        for name in facts:
            if saved[name] != facts[name]:
                raise ConfigError(f"{name} fingerprint {facts[name][:12]}: the checkpoint in {checkpoints.path} was "
                                  f"trained with {saved[name][:12]}; use another --workdir")
        position = saved["position"]
        window += [{k: math.nan if v is None else v for k, v in step.items()} for step in saved.get("window", [])]
        change = "" if saved["trained_on"] == here else f" (saved by {_where(saved['trained_on'])}, now {_where(here)})"
        say(f"train: resuming from step {start:,} of {config.train.steps:,}{change}")
    key = jax.random.key(config.train.seed)
    stop.listen()
    compiling = time.time()
    # before the state is made, so that the memory of compiling is free again
    example = parallel.put_batch(mesh, batches.example())
    step_fn = parallel.compile_ahead(jitted, abstract, example, key) if start < config.train.steps else jitted
    del example
    compiled = time.time()
    state = (checkpoints.restore(start, abstract) if start else
             _fresh_state(config, text, hierarchy, network, tx, shardings))
    if processes.is_main_process():
        text.tokenizer.save(os.path.join(workdir, "tokenizer"))
        kept = config.as_dict()
        kept["data"]["dir"] = config.data.dir and os.path.abspath(config.data.dir)
        write_json(os.path.join(workdir, "config.json"), kept)
    params = sum(a.size for a in jax.tree.leaves(abstract.params))
    say(f"train: {params:,} parameters, {config.train.batch_size} x {config.model.seq_len} tokens a step, "
        f"{config.train.steps:,} steps, {jax.device_count()} {jax.devices()[0].device_kind} "
        f"({dict(mesh.shape)}), workdir {workdir}")
    if start >= config.train.steps:
        say(f"train: nothing to do, step {start:,} is there")
        checkpoints.close()
        return state

    e = config.evaluate
    evaluator = Evaluator(network, process, mesh, abstract.params, seq_len=config.model.seq_len, seed=e.seed,
                          cv2=e.cv2, batch_size=e.batch_size)
    rows = valid_rows(text.dir, config.model.seq_len, config.evaluate.rows_in_training, config.data.packing,
                      config.data.padding)
    metrics_path = os.path.join(workdir, "metrics.jsonl")
    writers: list[Any] = []
    if processes.is_main_process():
        writers = [MetricsFile(metrics_path, start), TensorBoard(os.path.join(workdir, "tensorboard"))]
    peak = peak_flops(jax.devices()[0].device_kind)
    flops = flops_per_token(config, hierarchy, process)
    every = config.train.evaluate_every or config.checkpoint.every
    tokens_a_step = config.train.batch_size * config.model.seq_len
    clock = {"since": time.time(), "wait": 0.0, "steps": -1}  # the first step compiles and is not timed
    last: dict[str, Any] = {}
    first: dict[str, float] = {}

    def skipped(step: int, values: dict[str, float], batch: dict[str, np.ndarray], place: dict) -> None:
        """Says which batch gave no finite loss; too many of them stop the run and leave the batch to look at."""
        found = f"train: loss={values['loss']} grad_norm={values['grad_norm']} at step {step}"
        which = f"the batch at position {jsons.dumps(place)} of data {text.manifest.fingerprint[:12]}"
        if values["skipped"] <= config.train.nonfinite_limit:
            say(f"{found}: skipped {which} (no. {values['skipped']:.0f} of at most {config.train.nonfinite_limit})")
            return
        kept = os.path.join(workdir, f"nonfinite-{step}-{jax.process_index()}.npz")
        np.savez(kept, **batch)  # type: ignore[arg-type]
        back = checkpoints.latest()
        raise TrainingStopped(
            f"{found}; last finite {last}; {values['skipped']:.0f} steps skipped, train.nonfinite_limit="
            f"{config.train.nonfinite_limit}. To replay: {which}, its rows in {kept}, key fold_in(key("
            f"{config.train.seed}), {step - 1}); "
            + (f"checkpoint to go back to: step {back} in {checkpoints.path}" if back else "no checkpoint yet"))

    def finish(done, force: bool = False) -> dict[str, Any] | None:
        """Reads the metrics of a dispatched step; a record where one is due or forced."""
        nonlocal last
        step, device_metrics, *batch_and_place = done
        values = {k: float(v) for k, v in device_metrics.items()}
        if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
            last = {"step": step, **values}
            window.append(values)
        else:
            skipped(step, values, *batch_and_place)
        clock["steps"] += 1
        if step % config.train.log_every and not force:
            return None
        seconds = max(time.time() - clock["since"], 1e-9)
        rate: float | None = clock["steps"] * tokens_a_step / seconds
        if clock["steps"] < config.train.log_every:  # too short to time: step and read-out overlap by one
            rate = None
        mean = {name: float(np.mean([v[name] for v in window])) if window else math.nan
                for name in ("loss", "nelbo", "grad_norm")}
        record = {"step": step, "tokens": step * tokens_a_step, **mean, "tokens_per_s": rate,
                  "skipped": int(values["skipped"]),
                  "lr": float(schedule(step - 1 - int(values["skipped"]))),
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
        result = summarise(nats, rows["tokens"], tau, q)
        clock["since"] += time.time() - pause
        return {"valid_nelbo": float(result["nelbo"]), "valid_se": float(result["se"])}

    def save(step: int, valid: dict[str, float]) -> None:
        meta = facts | {"config": config.as_dict(), "position": iterator.get_state(), "trained_on": here,
                        "window": window}
        checkpoints.save(step, state, meta, {"nelbo": valid.get("valid_nelbo", math.inf)})
        timer.restart()

    trace = (min(start + 10, config.train.steps), min(start + 13, config.train.steps)) if profile else (-1, -1)
    iterator = batches.iterator(position)
    pending, timer = None, _Timer(config.checkpoint.minutes)
    bar = progress(config.train.steps, start, "step", os.path.basename(os.path.normpath(workdir)))
    try:
        for step in range(start + 1, config.train.steps + 1):
            waited = time.time()
            place = iterator.get_state()
            rows_here = next(iterator)
            clock["wait"] += time.time() - waited
            batch = parallel.put_batch(mesh, rows_here)
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
            pending = (step, device_metrics, rows_here, place)
            end = step == config.train.steps
            saves = end or step % config.checkpoint.every == 0
            measures = saves or step % every == 0
            leave = stop.at(step - start) and not end
            now = timer.due(step - start) or leave  # saved as it is: nothing in metrics.jsonl tells when that was
            valid: dict[str, float] = {}
            if measures or now:
                record = finish(pending, force=measures) or {}
                pending = None
                valid = measure(step) if measures and not leave else {}
                due.append(record | valid)
            for record in filter(None, due):
                record |= first
                first = {}
                for writer in writers:
                    writer.write(record)
            if saves or now:
                save(step, valid)
            if leave:
                checkpoints.wait()
                say(f"train: asked to stop, saved step {step:,}; the same command resumes")
                raise SystemExit(RESUME_EXIT)
        checkpoints.wait()
    finally:
        bar.close()
        checkpoints.close()
        for writer in writers:
            writer.close()
    if not processes.is_main_process():
        return state
    records = read_metrics(metrics_path)
    curves = os.path.join(workdir, "curves.png")
    drawn = plot_curves(curves, records, text.manifest.unigram_nats)
    final = [r for r in records if "valid_nelbo" in r][-1]
    d = config.data
    say(f"train: done, step {config.train.steps:,}, validation NELBO "
        f"{measured(final['valid_nelbo'], final['valid_se'], sign='+-')} nats/token on {len(rows['x'])} sequences, "
        f"given {given(d.packing, d.padding, bool(d.prompt_field), process.exact)} "
        f"(unigram of the whole split {text.manifest.unigram_nats:.4f})"
        + (f", curves in {curves}" if drawn else ""))
    return state


def _fresh_state(config: Config, text, hierarchy, network, tx, shardings):
    """A state at step 0: random, from the clustering embeddings, or from another run's weights."""
    key = jax.random.key(config.train.seed)
    table = None
    if config.train.init_from:
        found = load_params(config, text.tokenizer.fingerprint)
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
        table = initial_table(word_vectors(config, text), hierarchy, config.model.width, seed=config.train.seed)
    init = jax.jit(lambda k, t: init_state(config, hierarchy, network, tx, k, t), out_shardings=shardings)
    return init(key, table)


def _where(here: dict) -> str:
    shape = "x".join(map(str, here["mesh"].values()))
    return f"{here['devices']} devices of {here['processes']} processes, mesh {shape}"


class _Timer:
    """When checkpoint.minutes have gone since the last save.

    Of many processes the first one's clock counts. It tells the others at steps that all know, and each time the next
    of these steps as well: no exchange at every step, and none that waits for a device.
    """

    def __init__(self, minutes: float):
        self._seconds, self._next = 60 * minutes, 1
        self._began = self._since = time.monotonic()

    def restart(self) -> None:
        """A checkpoint has been saved."""
        self._since = time.monotonic()

    def due(self, step: int) -> bool:
        """To be asked by every process after every step, 1, 2, ... of this process's life."""
        if not self._seconds or step < self._next:
            return False

        def look() -> tuple[bool, int]:
            now = time.monotonic()
            left, pace = self._seconds - (now - self._since), max(now - self._began, 1e-9) / step
            return left <= 0, step + max(1, int(min(left / pace / 2, 100)))  # half the way, as steps may get slower

        due, self._next = processes.on_main_process(look)
        return due


class _Stop:
    """Whether the run has been asked to stop (SIGTERM, preemption, a first Ctrl-C); a second Ctrl-C ends it at once.

    On many processes all say so at the same step. From `listen` on a thread hears the signals, as Python's own handlers
    wait for the end of a compilation or of a step.
    """

    def __init__(self) -> None:
        self._asked, self._pipe, self._wakeup = False, -1, -1
        self._old: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        return self

    def listen(self) -> None:
        """In a thread that is not the main one it does nothing: whoever runs us decides."""
        if threading.current_thread() is not threading.main_thread():
            return
        # where processes are many JAX listens for SIGTERM itself; an ignored SIGINT is that of a job in the background
        numbers = [signal.SIGTERM] * (jax.process_count() == 1)
        numbers += [signal.SIGINT] * (signal.getsignal(signal.SIGINT) != signal.SIG_IGN)
        heard, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        self._wakeup = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, lambda *_: None) for number in numbers}
        threading.Thread(target=self._hear, args=(heard,), daemon=True).start()

    def _hear(self, heard: int) -> None:
        interrupted = False
        while number := os.read(heard, 1):
            if number[0] == signal.SIGINT:
                if interrupted:
                    os._exit(INTERRUPTED)
                interrupted = True
                say("train: Ctrl-C, saving after this step; once more leaves at once")
            if number[0] == signal.SIGINT and jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)  # JAX tells all of them
            self._asked |= number[0] in self._old
        os.close(heard)

    def at(self, step: int) -> bool:
        """To be asked by every process after every step, 1, 2, ... of this process's life.

        Many processes leave at the step after the last that any had asked about when the signal came, the first if it
        came before.
        """
        return self._asked if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)

    def __exit__(self, *_: Any) -> None:
        for number, old in self._old.items():
            if old is not None:
                signal.signal(number, old)
        if self._pipe >= 0:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._pipe)
