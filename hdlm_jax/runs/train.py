"""The training loop: batches in, checkpoints and metrics out; rerunning it resumes."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hdlm_jax.common import jsons, lock, parallel, processes
from hdlm_jax.common.console import compiling, measured, progress, say
from hdlm_jax.common.jsons import Json, write_json
from hdlm_jax.common.parallel import Tree
from hdlm_jax.config import LESSONS, Config, ConfigError, GenerateConfig, resolve
from hdlm_jax.data.embeddings import initial_table
from hdlm_jax.data.pipeline import given, valid_rows, whole_position
from hdlm_jax.decoding.sampler import Sampler, ended, sampler_of, start_canvas, text_of
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.evaluation.elbo import Evaluator, summarise
from hdlm_jax.models.channel import standardised, with_signal
from hdlm_jax.models.decoder import merged
from hdlm_jax.models.make import flops_per_token, joined
from hdlm_jax.runs.interrupt import RESUME_EXIT, Stop, Timer
from hdlm_jax.runs.stages import batches_of, cluster, prepare, recluster, word_vectors
from hdlm_jax.training.adapt import FIT_POSITIONS, adapted, fitted, regrouped
from hdlm_jax.training.checkpoint import Checkpoints, DamagedCheckpoint
from hdlm_jax.training.fitting import fit
from hdlm_jax.training.loading import Run, check_writable, differences, file_of, load_base, upgraded
from hdlm_jax.training.metrics import (
    Writer,
    check_writers,
    line_of,
    numbers_of,
    peak_flops,
    plot_curves,
    read_metrics,
    writers,
)
from hdlm_jax.training.state import TrainState, abstract_state, build, init_state, make_optimizer
from hdlm_jax.training.step import make_train_step

# sections in which a resumed run must not differ, and the settings in them that may; of data its fingerprint counts
# and how sequences are made of it
_FIXED = ("tokenizer", "hierarchy", "diffusion", "model", "decoder", "optimizer", "train", "tune")
_FIXED_ROLLOUTS = tuple(f"generate.{name}" for name in ("method", "options", "steps", "temperature", "top_p",
                                                        "clusters", "force_transition", "seed"))
LATEST = "latest_samples.json"  # of train.sample_every: step, texts
_FIXED_DATA = ("data.packing", "data.padding", "data.variable_share", "data.stream", "data.shuffle_documents")


class TrainingStopped(RuntimeError):
    """Too many steps whose loss or gradient is not finite: which batch, and the checkpoint to go back to."""


class Dispatched(NamedTuple):
    """A step whose metrics are not read yet."""

    step: int
    metrics: dict[str, jax.Array | float]
    rows: dict[str, np.ndarray]  # of its batch, this process's
    place: Json  # of the batch in the data


def check_resume(config: Config, meta: dict, path: str) -> None:
    """ConfigError if a checkpoint belongs to another configuration; it names all settings that differ."""
    then = resolve(upgraded(meta["config"], path))  # with paths expanded, and settings of today
    differ = differences(config, then, _FIXED)
    if config.optimizer.schedule == "constant":
        differ = [text for text in differ if not text.startswith("train.steps=")]
    rows = _FIXED_DATA[: None if config.data.stream else 4]
    differ += [text for text in differences(config, then, ("data",)) if text.partition("=")[0] in rows]
    writes = bool(config.tune.objective) or config.train.objective in LESSONS
    rolled = differences(config, then, ("generate",)) if writes else []
    differ += [text for text in rolled if text.partition("=")[0] in _FIXED_ROLLOUTS]
    if not differ:
        return
    remedy = "use another --workdir or the old settings"
    if any(text.startswith("train.steps=") for text in differ):
        remedy += (f", as optimizer.schedule={config.optimizer.schedule} is made for its steps; or go on from its "
                   f"weights in another --workdir with --config.train.init_from={os.path.dirname(path)}")
    raise ConfigError(f"{'; '.join(differ)}: the checkpoint in {path} was trained otherwise; {remedy}")


def train(config: Config, workdir: str, profile: bool = False, shown: Writer | None = None) -> TrainState:
    """Trains (or goes on training) to config.train.steps; returns the final TrainState.

    shown: gets the records as well, and shows them in place of the log's lines.

    Under workdir: config.json, checkpoints/, metrics.jsonl, curves.png, and what prepare and cluster make. Of many
    processes the first writes; all of them need the workdir and data.dir.

    Raises:
      ConfigError: a checkpoint of another configuration, or another job at work there. TrainingStopped: the loss is no
        longer finite. OSError: what cannot be written or read; checkpoints that are whole stay as they are.
      SystemExit: RESUME_EXIT, it was asked to stop and has saved.
    """
    check_writable(workdir)
    with lock.held(os.path.join(workdir, "lock"), "train"), Stop() as stop:
        loop = Loop(config, workdir, stop, profile, shown)
        if loop.begin():
            loop.run()
            loop.conclude()
        return loop.state


class Recorder:
    """Metrics of steps gathered into records: means since the last one, tokens a second, MFU; one JSON object each.

    window: metrics of the steps since the last record, as a checkpoint keeps them.
    """

    def __init__(self, config: Config, schedule: optax.Schedule, flops: float, window: list[dict[str, float]]):
        self.config, self.schedule, self.flops, self.window = config, schedule, flops, window
        self.peak = peak_flops(jax.devices()[0].device_kind)
        self.tokens_a_step = config.train.batch_size * config.model.seq_len
        self.writers: list[Writer] = []  # of the process that writes
        self.pace: float | None = None  # seconds a step, before the last record
        self.last_finite: dict[str, float] = {}
        self.once: dict[str, float] = {}  # goes with the next record alone
        self.steps = -1  # timed since the last record; the first step compiles and is not
        self.since, self.waited = time.monotonic(), 0.0

    def add(self, step: int, values: dict[str, float]) -> bool:
        """Takes a step's metrics; False where its loss or gradient is not finite."""
        self.steps += 1
        if finite := math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
            self.last_finite = {"step": step, **values}
            self.window.append(values)
        return finite

    def record(self, step: int, skipped: int) -> Json:
        """The record of the steps since the last one."""
        now = time.monotonic()  # read once: what follows waits for the step that is under way (the rate is an array)
        seconds = max(now - self.since, 1e-9)
        timed = self.steps >= self.config.train.log_every  # else too short: step and read-out overlap by one
        rate = self.steps * self.tokens_a_step / seconds if timed else None
        names = {name: None for values in self.window for name in values if name not in ("moved", "skipped")}
        mean = {name: float(np.mean([v[name] for v in self.window])) if self.window else math.nan
                for name in ("loss", "nelbo", "grad_norm", *names)}
        record = {"step": step, "tokens": step * self.tokens_a_step, **mean, "tokens_per_s": rate, "skipped": skipped,
                  "lr": float(self.schedule(step - 1 - skipped)),
                  "mfu": rate * self.flops / self.peak / jax.device_count() if self.peak and rate else None,
                  "input_wait": self.waited / seconds}
        if moved := [values["moved"] for values in self.window if "moved" in values]:
            record["moved"] = moved[-1]
        self.pace = seconds / self.steps if self.steps > 0 else None
        if errors := [values["reward_se"] for values in self.window if "reward_se" in values]:
            record["reward_se"] = math.hypot(*errors) / len(errors)  # of a mean of steps, each with its own rollouts
        self.window.clear()
        self.steps, self.since, self.waited = 0, now, 0.0
        return record

    def write(self, record: Json) -> None:
        for writer in self.writers:
            writer.write(record | self.once)
        self.once = {}

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


class Loop:
    """One training: its parts, made once; then `begin`, `run` and `conclude`."""

    at_once = False  # a step is done when it is dispatched, and nothing runs while its metrics are read

    def __init__(self, config: Config, workdir: str, stop: Stop, profile: bool = False, shown: Writer | None = None):
        self.shown = [shown] if shown else []
        self.config, self.workdir, self.stop, self.began = config, workdir, stop, time.monotonic()
        self.mesh = parallel.make_mesh(config)
        shards = parallel.batch_shards(self.mesh)
        if config.train.batch_size % (shards * config.train.microbatches):
            raise ConfigError(f"train.batch_size={config.train.batch_size}: must be a multiple of the {shards} batch "
                              f"shards of the mesh times train.microbatches={config.train.microbatches}")
        if config.model.param_dtype != "float32" and not config.decoder.lora:
            raise ConfigError(f"model.param_dtype={config.model.param_dtype!r}: small steps would be rounded away; "
                              "give float32 (model.dtype='bfloat16' computes in 16 bits all the same), or decoder.lora")
        check_writers(config.train.writers)
        self.text = prepare(config, workdir)
        self.batches = batches_of(config, self.text)
        self.tx, self.schedule = make_optimizer(config)
        self.facts = {"data": self.text.manifest.fingerprint, "tokenizer": self.text.tokenizer.fingerprint}
        self._use(cluster(config, workdir, self.text))
        self.checkpoints = Checkpoints(workdir)
        self.here = {"devices": jax.device_count(), "processes": jax.process_count(), "mesh": dict(self.mesh.shape)}
        self.start, self.profile, self.compile_s = 0, profile, 0.0
        self.key = jax.random.key(config.train.seed)

    def _use(self, hierarchy: Hierarchy) -> None:
        """Makes all that follows from a hierarchy, but for what `_compile` compiles."""
        self.hierarchy = hierarchy
        self.network, self.process = build(self.config, hierarchy)
        self.abstract, self.shardings = abstract_state(self.config, self.network, self.tx, self.mesh)
        self.facts["hierarchy"] = hierarchy.fingerprint
        self.sampler: Sampler | None = None
        self.opened: bool | None = None  # whether `step` is of the time when tokens see all others

    def begin(self) -> bool:
        """Compiles, and restores or makes the state; whether there are steps to go."""
        config, steps = self.config, self.config.train.steps
        self.stop.listen()
        saved = self._resumed()
        if not saved:
            self._compile(0)
            self.state = self._fresh_state()
        self.traced = [min(self.start + n, steps) if self.profile else -1 for n in (10, 13)]  # first, last
        window = [{k: math.nan if v is None else v for k, v in step.items()} for step in saved.get("window", [])]
        self.recorder = Recorder(config, self.schedule, flops_per_token(config, self.hierarchy, self.process), window)
        if processes.is_main_process():
            self.text.tokenizer.save(os.path.join(self.workdir, "tokenizer"))
            write_json(os.path.join(self.workdir, "config.json"), config.to_save())
        params = sum(a.size for a in jax.tree.leaves(self.abstract.params))
        say(f"train: {params:,} parameters, {config.train.batch_size} x {config.model.seq_len} tokens a step, "
            f"{steps:,} steps, {jax.device_count()} {jax.devices()[0].device_kind} "
            f"({dict(self.mesh.shape)}), workdir {self.workdir}")
        if self.start >= steps:
            say(f"train: nothing to do, step {self.start:,} is there")
            self.checkpoints.close()
            return False
        self.evaluator = self._evaluator()
        self.rows = valid_rows(self.text.dir, config.model.seq_len, config.evaluate.rows_in_training,
                               config.data.packing, config.data.padding)
        if processes.is_main_process():
            self.recorder.writers = [*writers(self.workdir, self.start, config), *self.shown]
        self.iterator = self.batches.iterator(saved.get("position"))
        return True

    def _evaluator(self) -> Evaluator:
        e = self.config.evaluate
        return Evaluator(self.network, self.process, self.mesh, self.abstract.params,
                         seq_len=self.config.model.seq_len, seed=e.seed, cv2=e.cv2, batch_size=e.batch_size)

    def _resumed(self) -> Json:
        """Restores the newest checkpoint that is whole; what it says about itself, nothing where there is none.

        The damaged ones after it are put aside once it is found, else all stay as they are.
        """
        damaged: dict[int, str] = {}
        for step in reversed(there := processes.on_main_process(self.checkpoints.steps)):
            self.start = step
            try:
                saved = self._said()
                self._compile(self.start)
                self.state = self.checkpoints.restore(step, self.abstract)
            except DamagedCheckpoint as error:
                damaged[step] = error.found
                continue
            self.checkpoints.set_aside(damaged, step)
            then = saved["trained_on"]
            change = "" if then == self.here else f" (saved by {_where(then)}, now {_where(self.here)})"
            say(f"train: resuming from step {step:,} of {self.config.train.steps:,}{change}")
            return saved
        if damaged:
            raise DamagedCheckpoint(f"{damaged[there[-1]]}; of steps {there} none is whole, all are left as they were",
                                    "use another --workdir, or put a copy in their place")
        return {}

    def _said(self) -> Json:
        """What the checkpoint says about itself, once it is known to belong to this training; its hierarchy is used."""
        saved = self.checkpoints.meta(self.start)
        check_resume(self.config, saved, self.checkpoints.path)
        if saved["hierarchy"] != self.hierarchy.fingerprint:
            self._use(Hierarchy.load(file_of(self.workdir, saved["hierarchy"]), self.text.tokenizer.fingerprint))
        for name, fact in self.facts.items():
            if saved[name] != fact:
                raise ConfigError(f"{name} fingerprint {fact[:12]}: the checkpoint in {self.checkpoints.path} was "
                                  f"trained with {saved[name][:12]}; use another --workdir")
        return saved

    def _compile(self, done: int) -> None:
        """The step for what comes after `done` steps, where it is another than the one there is (train.open_steps, or
        another hierarchy).

        At first before the state is made, so that the memory of compiling is free again.
        """
        opened = done >= self.config.train.open_steps
        if opened == self.opened or done >= self.config.train.steps:
            return
        if done > self.start:
            jax.block_until_ready(self.state.params)  # of the time that follows nothing is a step's
        began, self.opened = time.monotonic(), opened
        example = parallel.put_batch(self.mesh, self.batches.example())

        def compiled(config: Config) -> parallel.Compiled:
            if opened:  # from there on without a mask, so that attention kernels serve
                config = dataclasses.replace(config, train=dataclasses.replace(config.train, open_steps=0))
            network, process = build(config, self.hierarchy)
            step = make_train_step(config, network, process, self.tx, self.mesh)
            return parallel.compile_ahead(parallel.compile_step(step, self.mesh, self.shardings), self.abstract,
                                          example, self.key)

        with compiling("train"):
            found = fit(self.config, parallel.batch_shards(self.mesh), compiled, parallel.free_memory())
        self.step = found.compiled
        if self.config.model.remat == "auto" and jax.default_backend() != "cpu":
            say(f"train: model.remat=auto takes the first that fits a device: {found.why}")
        self.compile_s = time.monotonic() - began
        if done > self.start:
            self.recorder.since += self.compile_s

    def _recluster(self, done: int) -> dict[str, float]:
        """Clusters words anew where that is due behind `done` steps (train.recluster_every); the share that moved."""
        if not self.config.train.reclusters(done):
            return {}
        jax.block_until_ready(self.state.params)
        pause, there, head = time.monotonic(), self.hierarchy, self.network.head
        vectors = processes.to_host(head.vectors(self.network.head_params(self.state.params)))
        found = recluster(self.config, self.workdir, self.text, there, vectors, done)
        moved = float(np.mean(found.parents[0] != there.parents[0]))
        say(f"train: step {done:,}, clusters anew, {100 * moved:.1f} % of the words in another one")
        if found != there:
            self._use(found)
            self.state = jax.tree.map(jax.device_put, regrouped(self.state, self.network, there), self.shardings)
            self.evaluator = self._evaluator()
            self.recorder.flops = flops_per_token(self.config, found, self.process)
        self.recorder.since += time.monotonic() - pause
        if found != there:
            self._compile(done)
        return {"moved": moved}

    def _fresh_state(self) -> TrainState:
        """A state at step 0: random, from the clustering embeddings, or from another run's weights."""
        config, table, signal, base = self.config, None, None, self.config.train.init_from
        if (config.model.embeddings == "clusters" or config.diffusion.channel) and not base:
            vectors = word_vectors(config, self.workdir, self.text)
            if config.model.embeddings == "clusters":
                table = initial_table(vectors, self.hierarchy, config.model.width, seed=config.train.seed)
            if config.diffusion.channel:
                signal = standardised(vectors, config.diffusion.channel_width)
        found = load_base(config, self.text.tokenizer.fingerprint) if base else None

        def init(key: jax.Array, table: np.ndarray | None, signal: np.ndarray | None) -> TrainState:
            state = init_state(config, self.network, self.tx, key, table)
            if signal is None:
                return state
            return state._replace(params=with_signal(state.params, signal),
                                  ema=with_signal(state.ema, signal) if state.ema else {})

        state = jax.jit(init, out_shardings=self.shardings)(self.key, table, signal)
        if found is None:
            return state
        if config.train.adapt:
            params = self._adapted(found)
        else:
            if found.hierarchy != self.hierarchy:
                raise ConfigError(f"train.init_from={base!r}: its best checkpoint has learned other clusters since its "
                                  f"hierarchy was taken over into {self.workdir}; use another --workdir")
            own = joined(found.params, state.params)
            want, got = (jax.tree.map(lambda a: a.shape, t) for t in (state.params, own))
            if want != got:
                raise ConfigError(f"train.init_from={base!r}: its weights have other shapes than this model; model and "
                                  "hierarchy sizes must agree, or give train.adapt")
            params = jax.tree.map(lambda a, s: jax.device_put(a, s), own, self.shardings.params)
        say(f"train: starting from the weights of {base}")
        return state._replace(params=params, ema=jax.tree.map(jnp.copy, params) if config.optimizer.ema else {})

    def _adapted(self, found: Run) -> Tree:
        """Weights of another kind of run as this one's (train.adapt)."""
        masked = not found.process.exact
        params = found.params if self.config.decoder.lora else merged(found.params)
        make = jax.jit(lambda params: adapted(self.key, params, found.network, self.network,
                                              self.config.model.seq_len, masked), out_shardings=self.shardings.params)
        try:
            start = make(params)
        except (ValueError, NotImplementedError) as error:
            raise ConfigError(f"train.init_from={self.config.train.init_from!r}: {error}") from error
        if self.config.model.head == "flat":
            return start
        few = max(1, FIT_POSITIONS // (self.config.train.batch_size * self.config.model.seq_len))
        batches = [parallel.put_batch(self.mesh, rows) for rows in itertools.islice(self.batches.iterator(None), few)]
        say(f"train: fitting the factorised head's clusters to the flat head of {self.config.train.init_from}")
        fit_head = jax.jit(lambda start, own, batches: fitted(self.key, start, own, found.network, self.network,
                                                              self.process, batches),
                           out_shardings=self.shardings.params)
        with parallel.made_for(self.mesh):
            return fit_head(start, params, batches)

    def run(self) -> None:
        """All steps that are left. A step's metrics are read while the next one runs, unless they are `at_once`."""
        steps, self.timer = self.config.train.steps, Timer(self.config.checkpoint.minutes)
        name = os.path.basename(os.path.normpath(self.workdir))
        self.bar = progress(steps, self.start, "step", name)
        pending = None
        try:
            for step in range(self.start + 1, steps + 1):
                dispatched = self._dispatch(step)
                due = self._read(pending) if pending else None
                pending = self._after(step, dispatched, due)
            self.checkpoints.wait()
        finally:
            self.bar.close()
            self.checkpoints.close()
            self.recorder.close()

    def _dispatch(self, step: int) -> Dispatched:
        waited = time.monotonic()
        place = self.iterator.get_state()
        rows = next(self.iterator)
        self.recorder.waited += time.monotonic() - waited
        batch = parallel.put_batch(self.mesh, rows)
        if step == self.traced[0]:
            jax.profiler.start_trace(os.path.join(self.workdir, "profile"))
        moved = self._recluster(step - 1)
        self._compile(step - 1)
        self.state, metrics = self.step(self.state, batch, self.key)
        if step == self.start + 1:
            jax.block_until_ready(metrics)
            once = {"first_step_s": round(time.monotonic() - self.began, 3)}
            once |= {"compile_s": round(self.compile_s, 3)} if self.compile_s else {}
            say(f"train: first step done after {once['first_step_s']:.1f} s"
                + (f", {self.compile_s:.1f} s of it compilation" if self.compile_s else ""))
            self.recorder.once = once
            self.recorder.since, self.recorder.waited = time.monotonic(), 0.0
        if step == self.traced[1]:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            say(f"train: profile of {self.traced[1] - self.traced[0] + 1} steps in "
                f"{os.path.join(self.workdir, 'profile')}")
        self.bar.update()
        return Dispatched(step, metrics | moved, rows, place)

    def _read(self, done: Dispatched, force: bool = False) -> Json | None:
        """Reads the metrics of a dispatched step; a record where one is due or forced."""
        values = {k: float(v) for k, v in done.metrics.items()}
        if not self.recorder.add(done.step, values):
            self._not_finite(done, values)
        if done.step % self.config.train.log_every and not force:
            return None
        record = self.recorder.record(done.step, int(values["skipped"]))
        self.bar.set_postfix_str(numbers_of(record), refresh=False)
        if not self.shown and (self.bar.disable or not sys.stdout.isatty()):
            say(f"train: {line_of(record, self.config.train.steps, self.recorder.pace)}")
        return record

    def _after(self, step: int, dispatched: Dispatched, due: Json | None) -> Dispatched | None:
        """Measures, writes and saves what this step asks for; gives the step where its metrics are still to be read."""
        end = step == self.config.train.steps
        saves = end or step % self.config.checkpoint.every == 0
        measures = saves or step % (self.config.train.evaluate_every or self.config.checkpoint.every) == 0
        leave = self.stop.at(step - self.start) and not end
        now = self.timer.due(step - self.start) or leave  # saved as it is: nothing in metrics.jsonl tells when that was
        reads, valid = measures or now or self.at_once, dict[str, float]()
        records, left = [due], None if reads else dispatched
        if reads:
            record = self._read(dispatched, force=measures) or {}
            valid = self._measure(step) if measures and not leave else {}
            records.append(record | valid)
        for record in filter(None, records):
            self.recorder.write(record)
        if saves or now:
            self._save(step, valid)
        if self.config.train.sample_every and step % self.config.train.sample_every == 0:
            self._draw(step)
        if leave:
            self.checkpoints.wait()
            say(f"train: asked to stop, saved step {step:,}; the same command resumes")
            raise SystemExit(RESUME_EXIT)
        return left

    def _not_finite(self, done: Dispatched, values: dict[str, float]) -> None:
        """Says which batch gave no finite loss; too many of them stop the run and leave the batch to look at."""
        limit = self.config.train.nonfinite_limit
        found = f"train: loss={values['loss']} grad_norm={values['grad_norm']} at step {done.step}"
        place, data = jsons.dumps(whole_position(done.place)), self.text.manifest.fingerprint[:12]
        which = f"the batch at position {place} of data {data}"
        if values["skipped"] <= limit:
            say(f"{found}: skipped {which} (no. {values['skipped']:.0f} of at most {limit})")
            return
        kept = os.path.join(self.workdir, f"nonfinite-{done.step}-{jax.process_index()}.npz")
        jsons.write_arrays(kept, done.rows)
        back, path = self.checkpoints.latest(), self.checkpoints.path
        raise TrainingStopped(
            f"{found}; last finite {self.recorder.last_finite}; {values['skipped']:.0f} steps skipped, "
            f"train.nonfinite_limit={limit}. To replay: {which}, its rows in {kept}, key fold_in(key("
            f"{self.config.train.seed}), {done.step - 1}); "
            + (f"checkpoint to go back to: step {back} in {path}" if back else "no checkpoint yet"))

    def _measure(self, step: int) -> dict[str, float]:
        """The bound of the first validation rows, one draw; its time is not the training's."""
        pause = time.monotonic()
        nats, tau, q = self.evaluator.nats(self.state.ema or self.state.params, self.rows, 1, "validation")
        result = summarise(nats, self.rows["tokens"], tau, q)
        self.recorder.since += time.monotonic() - pause
        say(f"train: step {step:,}, validation NELBO {measured(result['nelbo'], result['se'], sign='+-')} nats/token")
        return {"valid_nelbo": float(result["nelbo"]), "valid_se": float(result["se"])}

    def _draw(self, step: int) -> None:
        """Writes two texts of the weights as they are, in 32 steps; their time is not the training's."""
        jax.block_until_ready(self.state.params)
        pause, eot = time.monotonic(), self.text.tokenizer.eot
        g = GenerateConfig(num_samples=2, steps=32, seed=self.config.train.seed)
        run = Run(self.config, self.config, self.text.dir, self.text.tokenizer, self.hierarchy, self.network,
                  self.process, self.mesh, self.state.ema or self.state.params, step, bool(self.state.ema))
        self.sampler = self.sampler or sampler_of(run)
        self.sampler.params = run.params
        features, places = self.rows.get("features"), self.config.data.feature_places
        features = None if features is None else np.resize(features, (g.num_samples, *features.shape[1:]))
        found = self.sampler(start_canvas(run, g, np.zeros((g.num_samples, 0), np.int32), features), g)
        rows = [ended(row[places:n], 0, eot, g.stop) for row, n in zip(found["tokens"], found["length"], strict=True)]
        texts = [text_of(run.tokenizer, row, g.stop) for row in rows]
        if processes.is_main_process():
            write_json(os.path.join(self.workdir, LATEST), {"step": step, "texts": texts})
        self.recorder.since += time.monotonic() - pause

    def _save(self, step: int, valid: dict[str, float]) -> None:
        meta = self.facts | {"config": self.config.as_dict(), "position": whole_position(self.iterator.get_state()),
                             "trained_on": self.here, "window": self.recorder.window}
        told = {name: valid.get(f"valid_{name}", math.inf) for name in ("nelbo", "reward", "loss")}
        self.checkpoints.save(step, self.state, meta, told)
        self.timer.restart()

    def conclude(self) -> None:
        """Draws the curves and says what came out."""
        if not processes.is_main_process():
            return
        records = read_metrics(os.path.join(self.workdir, "metrics.jsonl"))
        curves, unigram = os.path.join(self.workdir, "curves.png"), self.text.manifest.unigram_nats
        drawn = plot_curves(curves, records, unigram)
        final, d = [r for r in records if "valid_nelbo" in r][-1], self.config.data
        say(f"train: done, step {self.config.train.steps:,}, validation NELBO "
            f"{measured(final['valid_nelbo'], final['valid_se'], sign='+-')} nats/token on {len(self.rows['x'])} "
            f"sequences, given {given(d.packing, d.padding, bool(d.prompt_field), self.process.exact)} "
            f"(unigram of the whole split {unigram:.4f})" + (f", curves in {curves}" if drawn else ""))


def _where(here: dict) -> str:
    shape = "x".join(map(str, here["mesh"].values()))
    return f"{here['devices']} devices of {here['processes']} processes, mesh {shape}"
