"""--mode=train, where train.objective names what a trained run learns afterwards: from the run in train.init_from."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.common import lock, parallel, processes
from hdlm_jax.common.console import compiling, say
from hdlm_jax.common.parallel import Batch, Tree
from hdlm_jax.config import LESSONS, Config
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.runs import train as plain
from hdlm_jax.runs.interrupt import Stop
from hdlm_jax.runs.train import Loop
from hdlm_jax.training.loading import check_writable, load_base
from hdlm_jax.training.metrics import Writer, read_metrics
from hdlm_jax.training.state import TrainState, build, init_state
from hdlm_jax.tuning import energy
from hdlm_jax.tuning.lesson import Loss, make_step

LOSSES: dict[str, Callable[..., Loss]] = {"energy": energy.make_loss}


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


class Refining(Loop):
    """The loop of training with a loss of its own, beside the frozen run it starts from.

    metrics.jsonl has the loss and what belongs to it, also on validation rows (valid_loss, which tells the best).
    """

    def __init__(self, config: Config, workdir: str, stop: Stop, profile: bool = False, shown: Writer | None = None
                 ) -> None:
        super().__init__(config, workdir, stop, profile, shown)
        self.base = load_base(config, self.text.tokenizer.fingerprint)

    def _compile(self, done: int) -> None:
        if self.opened or done >= self.config.train.steps:
            return
        began, self.opened, config = time.monotonic(), True, self.config
        network, process = build(config, self.hierarchy)
        loss = LOSSES[config.train.objective](config, network, self.base.network, cast(HierarchicalProcess, process),
                                              self.mesh)
        update = parallel.compile_step(make_step(config, loss, self.tx), self.mesh, self.shardings)

        def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, dict[str, Any]]:
            state, metrics = update(state, batch, (key, self.base.params))
            return state, metrics | {"nelbo": float("nan")}

        self.step = step  # type: ignore[assignment]
        self.check = jax.jit(loss)
        self.compile_s = time.monotonic() - began

    def _fresh_state(self) -> TrainState:
        """What the network has in common with the run it starts from is that run's."""
        init = jax.jit(lambda key: init_state(self.config, self.network, self.tx, key), out_shardings=self.shardings)
        with compiling("train"):
            state = init(self.key)
        theirs = {name: value for name, value in cast(dict[str, Tree], self.base.params).items()
                  if jax.tree.map(jnp.shape, value) == jax.tree.map(jnp.shape, state.params.get(name))}
        params = jax.device_put({**state.params, **theirs}, self.shardings.params)
        say(f"train: starting from {', '.join(sorted(theirs))} of {self.config.train.init_from}")
        return state._replace(params=params, ema=jax.tree.map(jnp.copy, params) if self.config.optimizer.ema else {})

    def _measure(self, step: int) -> dict[str, float]:
        """The loss on validation rows, always with the same random numbers."""
        pause, rows = time.monotonic(), self.config.train.batch_size
        params, found = self.state.ema or self.state.params, []
        names = self.batches.example()
        for number in range(max(1, len(self.rows["x"]) // rows)):
            some = (number * rows + np.arange(rows)) % len(self.rows["x"])
            batch = {name: self.rows[name][some] for name in names if name != "index"}
            batch = {k: v[parallel.local_rows(rows)] for k, v in (batch | {"index": np.arange(rows, dtype=np.int32)}
                                                                  ).items()}
            key = jax.random.fold_in(jax.random.key(self.config.evaluate.seed), number)
            loss, aux = self.check(params, self.base.params, parallel.put_batch(self.mesh, batch), key)
            found.append({"loss": float(loss)} | {name: float(value) for name, value in aux.items()})
        self.recorder.since += time.monotonic() - pause
        mean = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
        say(f"train: step {step:,}, on validation rows " + ", ".join(f"{k} {v:.4f}" for k, v in mean.items()))
        return {f"valid_{name}": value for name, value in mean.items()}

    def conclude(self) -> None:
        """Says what came out."""
        if processes.is_main_process():
            final = [r for r in read_metrics(os.path.join(self.workdir, "metrics.jsonl")) if "valid_loss" in r][-1]
            say(f"train: done, step {self.config.train.steps:,}, loss on validation rows {final['valid_loss']:.4f}")
