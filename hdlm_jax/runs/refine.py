"""--mode=train, where train.objective names what a trained run learns afterwards: from the run in train.init_from."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.common import jsons, lock, parallel, processes
from hdlm_jax.common.console import compiling, say
from hdlm_jax.common.parallel import Batch, Rows, Tree
from hdlm_jax.config import ASIDE, LESSONS, Config, ConfigError
from hdlm_jax.decoding import presets, sampler
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.runs import train as plain
from hdlm_jax.runs.interrupt import Stop
from hdlm_jax.runs.train import Loop
from hdlm_jax.runs.tune import Walk
from hdlm_jax.training.loading import Run, check_writable, load_base
from hdlm_jax.training.metrics import Writer, read_metrics
from hdlm_jax.training.state import TrainState, build, init_state
from hdlm_jax.tuning import adjust, certainty, energy
from hdlm_jax.tuning.lesson import Loss, make_step

LOSSES: dict[str, Callable[..., Loss]] = {"energy": energy.make_loss, "certainty": certainty.make_loss,
                                       "adjust": adjust.make_loss}
OWN = ("certainty", "adjust")  # those that learn from texts the run has written


def train(config: Config, workdir: str, profile: bool = False, shown: Writer | None = None) -> TrainState:
    """Training by texts, of a run or of what it learns afterwards: arguments, files and errors as `train.train`."""
    if config.train.objective not in LESSONS:
        return plain.train(config, workdir, profile, shown)
    check_writable(workdir)
    with lock.held(os.path.join(workdir, "lock"), "train"), Stop() as stop:
        loop = Refining(config, workdir, stop, profile, shown)
        if loop.begin():
            loop.run()
            loop.conclude()
        return loop.state


class OwnTexts:
    """Texts that a run has written, as batches: `batch(step)` has the same rows whenever it is asked for.

    rows: x int32 [n, S], score bool [n, S], what of them it wrote.
    """

    def __init__(self, rows: Rows, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's rows: x, score; index int32 [b], numbers within the step. An epoch has an order of its own."""
        n, mine = len(self.rows["x"]), parallel.local_rows(self.batch_size)
        place = step * self.batch_size + np.arange(mine.start, mine.stop)
        order = {e: np.random.default_rng([self.seed, e]).permutation(n) for e in np.unique(place // n).tolist()}
        some = [order[p // n][p % n] for p in place.tolist()]
        return {name: value[some] for name, value in self.rows.items()} | {
            "index": np.arange(mine.start, mine.stop, dtype=np.int32)}

    def example(self) -> dict[str, np.ndarray]:
        return self.batch(0)

    def iterator(self, position: dict | None = None) -> Walk:
        return Walk(self, position["next_index"] if position else 0)


def own_texts(base: Run, config: Config, rows: Rows) -> dict[str, np.ndarray]:
    """The rows' x and score, x written anew by the base where the score is of it: by the method of `generate`, or by
    that which `adjust` is to come up to."""
    g = dataclasses.replace(config.generate, length=0)
    if config.train.objective == "adjust":
        g = dataclasses.replace(g, method="first_hitting", options="")
    canvas = np.where(rows["score"], base.hierarchy.mask_id, rows["x"]).astype(np.int32)
    found = sampler.sampler_of(base)(canvas, g)
    return {"x": found["tokens"].astype(np.int32), "score": rows["score"]}


class Refining(Loop):
    """The loop of training with a loss of its own, beside the frozen run it starts from.

    metrics.jsonl has the loss and what belongs to it, also on validation rows (valid_loss, which tells the best).
    """

    def __init__(self, config: Config, workdir: str, stop: Stop, profile: bool = False, shown: Writer | None = None
                 ) -> None:
        super().__init__(config, workdir, stop, profile, shown)
        self.base = load_base(config, self.text.tokenizer.fingerprint)
        if self.base.hierarchy != self.hierarchy:
            raise ConfigError(f"train.init_from={config.train.init_from!r}: its best checkpoint has learned other "
                              f"clusters since its hierarchy was taken over into {workdir}; use another --workdir")
        if config.train.objective in OWN:
            if jax.process_count() > 1:
                raise ConfigError(f"train.objective={config.train.objective!r}: its texts are written by one process")
            (presets.burst_of if config.train.objective == "adjust" else presets.check)(config.generate)
            self.batches = OwnTexts(self._texts(), config.train.batch_size, config.train.seed)

    def begin(self) -> bool:
        goes_on = super().begin()
        if goes_on:
            own = self.config.train.objective in OWN
            self.checked = own_texts(self.base, self.config, self.rows) if own else self.rows
        return goes_on

    def _texts(self) -> dict[str, np.ndarray]:
        """Own texts for the prompts of the first training rows, from a file of the workdir where they are there."""
        config, g = self.config, self.config.generate
        path = os.path.join(self.workdir, "own_texts.npz")
        made = jsons.dumps([config.train.objective, self.base.step, config.tune.texts, g.method, g.options, g.steps,
                            g.temperature, g.top_p, g.clusters, g.force_transition, g.seed])
        if os.path.exists(path):
            with np.load(path) as file:
                if str(file["made"]) == made:
                    return {name: file[name] for name in ("x", "score")}
        walk, parts = self.batches.iterator(None), list[Rows]()
        while sum(len(part["x"]) for part in parts) < config.tune.texts:
            rows = next(walk)
            parts.append({"x": rows["x"], "score": rows.get("score", np.ones(rows["x"].shape, bool))})
        rows = {name: np.concatenate([part[name] for part in parts])[: config.tune.texts] for name in ("x", "score")}
        began, found = time.monotonic(), own_texts(self.base, config, rows)
        different = len(np.unique(found["x"], axis=0))
        say(f"train: {config.tune.texts:,} texts written by {config.train.init_from}, {different:,} of them different, "
            f"in {time.monotonic() - began:.0f} s")
        if processes.is_main_process():
            with jsons.open_atomic(path) as file:
                np.savez(file, made=np.array(made), **found)  # type: ignore[arg-type]
        return found

    def _compile(self, done: int) -> None:
        if self.opened or done >= self.config.train.steps:
            return
        self.opened, config = True, self.config
        network, process = build(config, self.hierarchy)
        loss = LOSSES[config.train.objective](config, network, self.base.network, cast(HierarchicalProcess, process),
                                              self.mesh)
        update = parallel.compile_step(make_step(config, loss, self.tx), self.mesh, self.shardings)

        def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, dict[str, Any]]:
            state, metrics = update(state, batch, (key, self.base.params))
            return state, metrics | {"nelbo": float("nan")}

        self.step = step  # type: ignore[assignment]
        self.check = jax.jit(loss)

    def _fresh_state(self) -> TrainState:
        """What the network has in common with the run it starts from is that run's."""
        init = jax.jit(lambda key: init_state(self.config, self.network, self.tx, key), out_shardings=self.shardings)
        with compiling("train"):
            state = init(self.key)
        theirs = {name: value for name, value in cast(dict[str, Tree], self.base.params).items()
                  if jax.tree.map(jnp.shape, value) == jax.tree.map(jnp.shape, state.params.get(name))}
        copied = jax.tree.map(jnp.copy, theirs)  # a step gives its state's memory away, and the base is still needed
        params = jax.device_put({**state.params, **copied}, self.shardings.params)
        say(f"train: beside {self.config.train.init_from}" + (f", starting from its {', '.join(sorted(theirs))}"
                                                              if theirs else ""))
        return state._replace(params=params, ema=jax.tree.map(jnp.copy, params) if self.config.optimizer.ema else {})

    def _measure(self, step: int) -> dict[str, float]:
        """The loss on validation rows, always with the same random numbers; of a language model its bound as well."""
        pause, rows = time.monotonic(), self.config.train.batch_size
        params, found = self.state.ema or self.state.params, []
        names = self.batches.example()
        for number in range(max(1, len(self.checked["x"]) // rows)):
            some = (number * rows + np.arange(rows)) % len(self.checked["x"])
            batch = {name: self.checked[name][some] for name in names if name != "index"}
            batch["index"] = np.arange(rows, dtype=np.int32)
            batch = {name: value[parallel.local_rows(rows)] for name, value in batch.items()}
            key = jax.random.fold_in(jax.random.key(self.config.evaluate.seed), number)
            with parallel.made_for(self.mesh):
                loss, aux = self.check(params, self.base.params, parallel.put_batch(self.mesh, batch), key)
            found.append({"loss": float(loss)} | {name: float(value) for name, value in aux.items()})
        self.recorder.since += time.monotonic() - pause
        mean = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
        say(f"train: step {step:,}, on validation rows " + ", ".join(f"{k} {v:.4f}" for k, v in mean.items()))
        bound = {} if self.config.train.objective in ASIDE else super()._measure(step)
        return bound | {f"valid_{name}": value for name, value in mean.items()}

    def conclude(self) -> None:
        """Says what came out."""
        if processes.is_main_process():
            final = [r for r in read_metrics(os.path.join(self.workdir, "metrics.jsonl")) if "valid_loss" in r][-1]
            say(f"train: done, step {self.config.train.steps:,}, loss on validation rows {final['valid_loss']:.4f}")
