"""--mode=train with tune.objective: rollouts of the run itself, their rewards, an update of the weights; and again."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Iterator
from typing import Any, Protocol, cast

import jax
import numpy as np

from hdlm_jax.common import lock, parallel, processes
from hdlm_jax.common.console import compiling, measured, say
from hdlm_jax.common.jsons import write_json
from hdlm_jax.common.parallel import Batch, Rows, Tree
from hdlm_jax.config import OWN_ANSWERS, Config, ConfigError
from hdlm_jax.data.tokenizers import Tokenizer
from hdlm_jax.decoding import sampler
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.evaluation.problems import answer_of
from hdlm_jax.models.make import joined
from hdlm_jax.runs import evaluate as bound
from hdlm_jax.runs.interrupt import Stop
from hdlm_jax.runs.train import Loop
from hdlm_jax.training.loading import Run, check_writable, load_base, load_run
from hdlm_jax.training.metrics import Writer
from hdlm_jax.training.state import TrainState, build
from hdlm_jax.tuning.advantage import OF_CALLS, advantages
from hdlm_jax.tuning.record import check_law, draws_whole_texts, make_rollout
from hdlm_jax.tuning.tasks import TASKS, Example, Task, TextTask
from hdlm_jax.tuning.update import OBJECTIVES, make_update


def tune(config: Config, workdir: str, profile: bool = False, shown: Writer | None = None) -> TrainState:
    """Trains (or goes on) by rewards to config.train.steps; arguments, files and errors as those of `train.train`.

    metrics.jsonl has reward and its standard error, the share of different answers and solved ones, seconds of
    rollouts and updates; where it measures also valid_reward (fixed prompts, which tells the best) beside the NELBO.
    """
    check_writable(workdir)
    with lock.held(os.path.join(workdir, "lock"), "train"), Stop() as stop:
        loop = Tuning(config, workdir, stop, profile, shown)
        if loop.begin():
            loop.run()
            loop.conclude()
        return loop.state


class Prompts:
    """Canvases of a task's prompts: `batch(step)` has the same rows whenever it is asked for, `group` of a prompt.

    Raises:
      ConfigError: a prompt that leaves no room for its answer.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, mask_id: int, split: str = "train", folder: str = ""
                 ) -> None:
        """folder: of the run's prepared texts, for a task whose prompts are theirs."""
        self.config, self.tokenizer, self.mask_id, self.split = config, tokenizer, mask_id, split
        own = config.tune.task == OWN_ANSWERS
        self.task: Task | TextTask = (TextTask(folder, split, tokenizer, config.model.seq_len) if own else
                                      TASKS[config.tune.task])
        self.group = config.tune.group if split == "train" else 1
        self.rows = min(config.tune.rows, self.task.prompts)  # that are judged as fixed ones, each of them once

    def examples(self, step: int, rows: int) -> list[Example]:
        """Of each row of a step."""
        first = step * rows // self.group
        found = [self.task.example(first + i, self.split) for i in range(rows // self.group)]
        return [example for example in found for _ in range(self.group)]

    def canvas(self, examples: list[Example]) -> np.ndarray:
        """int32 [n, S]: prompts, and masks behind."""
        seq_len = self.config.model.seq_len
        z = np.full((len(examples), seq_len), self.mask_id, np.int32)
        for row, example in zip(z, examples, strict=True):
            ids = self._given(example)
            need = len(ids) + (0 if example.ids else len(self.tokenizer.encode(example.answer)))
            if need > seq_len:
                raise ConfigError(f"model.seq_len={seq_len}: the task {self.task.name!r} needs {need} tokens for "
                                  f"{example.prompt!r} and its answer")
            row[: len(ids)] = ids
        return z

    def _given(self, example: Example) -> np.ndarray:
        """Ids of its prompt."""
        return np.array(example.ids, np.int32) if example.ids else self.tokenizer.encode(example.prompt)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's rows: z int32 [b, S]; index int32 [b], numbers within the step."""
        mine = parallel.local_rows(self.config.train.batch_size)
        rows = self.examples(step, self.config.train.batch_size)
        return {"z": self.canvas(rows[mine]), "index": np.arange(mine.start, mine.stop, dtype=np.int32)}

    def example(self) -> dict[str, np.ndarray]:
        return self.batch(0)

    def iterator(self, position: dict | None = None) -> Walk:
        return Walk(self, position["next_index"] if position else 0)

    def answers(self, x: np.ndarray, examples: list[Example]) -> list[str]:
        """Texts of rows [n, S] behind their prompts, up to the end of a text or of a turn."""
        return [answer_of(self.tokenizer, row[len(self._given(example)):])
                for row, example in zip(x, examples, strict=True)]

    def judged(self, x: np.ndarray, examples: list[Example], calls: np.ndarray | int = 0
               ) -> tuple[np.ndarray, dict[str, float]]:
        """(rewards float32 [n]; their mean, its standard error, the shares of solved and of different answers).

        calls: int [n], of which each costs tune.cost. The error is that of a mean over prompts, as rollouts of one
        prompt are alike; where there is a single one, over its rollouts. Answers to other prompts are different ones,
        but where each prompt is asked once.
        """
        answers, prompts = self.answers(x, examples), [example.prompt for example in examples]
        alone = self.group == 1  # each prompt is asked once; else an answer is another one if its prompt is
        quality = self.task.reward(answers, [example.facts for example in examples])
        reward = (quality - self.config.tune.cost * calls).astype(np.float32)
        each = reward.reshape(-1, self.group).mean(1) if len(reward) > self.group else reward
        return reward, {"reward": float(reward.mean()), "reward_se": float(each.std(ddof=1) / math.sqrt(len(each))),
                        "solved": float(np.mean(quality == 1)),
                        "distinct": len(set(answers if alone else zip(prompts, answers, strict=True))) / len(x)}


class Numbered(Protocol):
    """Batches by the number of their step."""

    def batch(self, step: int) -> dict[str, np.ndarray]: ...


class Walk:
    """Batches from a step on; `get_state` is the position after those handed out."""

    def __init__(self, batches: Numbered, step: int) -> None:
        self.batches, self.step = batches, step

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        self.step += 1
        return self.batches.batch(self.step - 1)

    def get_state(self) -> dict[str, Any]:
        return {"next_index": self.step}


class Tuning(Loop):
    """The loop of training, whose step is rollouts, rewards and an update."""

    at_once = True

    def __init__(self, config: Config, workdir: str, stop: Stop, profile: bool = False, shown: Writer | None = None
                 ) -> None:
        super().__init__(config, workdir, stop, profile, shown)
        method, kind = check_law(self.process, config.generate), config.tune.advantage
        sampler.check_heads(method, self.abstract.params)
        OBJECTIVES[config.tune.objective](cast(HierarchicalProcess, self.process), config.tune.views)  # or refuses it
        if kind in OF_CALLS and not draws_whole_texts(method, self.process.num_levels, config.model.seq_len):
            raise ConfigError(f"tune.advantage={kind!r}: judges the text that each call draws; generate.method="
                              f"{config.generate.method!r} with generate.options={config.generate.options!r} draws no "
                              "whole texts: choose rcr or low_confidence with block=0, with clusters straight=true")
        self.prompts, self.fixed = (Prompts(config, self.text.tokenizer, self.hierarchy.mask_id, split, self.text.dir)
                                    for split in ("train", "valid"))
        self.batches = self.prompts
        self.reference: Tree = {}

    def _compile(self, done: int) -> None:
        """Rollouts and updates; `step` is both, with the rewards between them."""
        if self.opened or done >= self.config.train.steps:
            return
        self.opened, config = True, self.config
        if config.model.remat == "auto":
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none"))
        network, built = build(config, self.hierarchy)
        process = cast(HierarchicalProcess, built)  # check_law has seen it
        if self.config.tune.kl:
            found = load_base(self.config, self.text.tokenizer.fingerprint).params
            start = jax.jit(network.init_params, static_argnums=1)(self.key, config.model.seq_len)
            self.reference = joined(found, start)
        with compiling("train"):
            rollout = make_rollout(network, process, config.generate, self.mesh, config.decoder.own_block)
            self.numbers = sampler.numbers_of(config.generate, config.model.seq_len, self.text.tokenizer.eot)
            self.rollout = parallel.compile_sample_step(rollout, self.mesh, self.abstract.params)
            update = make_update(config, network, process, self.tx, self.mesh)
            self.update = parallel.compile_step(update, self.mesh, self.shardings)
        self.step = self._step  # type: ignore[assignment]

    def _rolled(self, params: Tree, batch: Batch, key: jax.Array) -> dict[str, np.ndarray]:
        """The fields of rollouts, all rows on every host."""
        found = self.rollout((params, self.numbers), batch, key)
        return {name: np.asarray(value) for name, value in found._asdict().items() if value is not None}

    def _drawn(self, rollout: dict[str, np.ndarray], examples: list[Example]) -> np.ndarray:
        """Rewards [B, calls] of the text that each call drew, behind a row's last call of the row itself."""
        texts = [np.where((call < rollout["calls"])[:, None], rollout["drawn"][:, call], rollout["x"])
                 for call in range(rollout["calls"].max())]
        return np.stack([self.prompts.judged(x, examples)[0] for x in texts], axis=1)

    def _step(self, state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array | float]]:
        """A step: what it does depends on the weights, the seed and the number of the step alone."""
        began, rows, number = time.monotonic(), self.config.train.batch_size, int(state.step)
        key = jax.random.fold_in(key, number)
        rollout = self._rolled(state.params, batch, jax.random.fold_in(key, 0))
        examples, t = self.prompts.examples(number, rows), self.config.tune
        reward, found = self.prompts.judged(rollout["x"], examples, rollout["calls"])
        drawn = self._drawn(rollout, examples) if t.advantage in OF_CALLS else None
        advantage = advantages(reward, t.group, t.advantage, drawn)
        if drawn is not None:  # as many calls as there can be, so that all steps are one program
            advantage = np.pad(advantage, ((0, 0), (0, rollout["told"].shape[1] - drawn.shape[1])))
        fields = rollout | {"advantage": advantage,
                            "index": np.arange(rows, dtype=np.int32)}
        rolled, mine = time.monotonic(), parallel.local_rows(rows)
        placed = parallel.put_batch(self.mesh, {name: value[mine] for name, value in fields.items()})
        state, metrics = self.update(state, placed, (jax.random.fold_in(key, 1), self.reference))
        jax.block_until_ready(metrics)  # what is next needs the new weights
        seconds = {"rollout_s": rolled - began, "update_s": time.monotonic() - rolled}
        return state, metrics | found | seconds | {"nelbo": math.nan, "calls": float(rollout["calls"].mean())}

    def _measure(self, step: int) -> dict[str, float]:
        """Beside the bound the reward of rollouts on fixed prompts, always by the same random numbers."""
        pause, rows = time.monotonic(), self.config.train.batch_size
        params = self.state.ema or self.state.params
        rollouts, examples = [], []
        for number in range(-(-self.fixed.rows // rows)):
            batch: Rows = self.fixed.batch(number)
            key = jax.random.fold_in(jax.random.key(self.config.train.seed), number)
            rollouts.append(self._rolled(params, parallel.put_batch(self.mesh, batch), key))
            examples += self.fixed.examples(number, rows)
        n = self.fixed.rows
        x, calls = (np.concatenate([rollout[name] for rollout in rollouts])[:n] for name in ("x", "calls"))
        _, found = self.fixed.judged(x, examples[:n], calls)
        self.recorder.since += time.monotonic() - pause
        told = measured(found["reward"], found["reward_se"], sign="+-")
        say(f"train: step {step:,}, reward {told} on {n} fixed prompts, "
            f"{100 * found['distinct']:.0f} % of the answers different")
        return super()._measure(step) | {f"valid_{name}": value for name, value in found.items()}


def evaluate(config: Config, workdir: str) -> dict[str, Any]:
    """--mode=evaluate of a run with a task: the bound of its texts (evaluate.json), and its rewards."""
    found = bound.evaluate(config, workdir)
    rewards(load_run(config, workdir, config.evaluate.checkpoint, config.evaluate.ema), workdir)
    return found


def rewards(run: Run, workdir: str) -> list[dict[str, Any]]:
    """Rewards of a run on fixed prompts at its number of calls T (generate.steps; of methods that have one), at T/2 and
    2T; to rewards.json.

    How a run writes at other numbers of calls than it was tuned at tells whether it has learnt the task or the plan.
    """
    config, g = run.config, run.config.generate
    prompts = Prompts(config, run.tokenizer, run.hierarchy.mask_id, "valid", run.data_dir)
    examples, draw = prompts.examples(0, prompts.rows), sampler.sampler_of(run)
    canvas, out = prompts.canvas(examples), []
    steps = int(sampler.method_of(g).numbers.get("steps", 0))
    options = " ".join(part for part in g.options.split() if not part.startswith("steps="))
    for many in (max(1, steps // 2), steps, 2 * steps) if steps else (g.steps,):
        found = draw(canvas, dataclasses.replace(g, steps=many, options=options))
        reward, facts = prompts.judged(found["tokens"], examples, found["row_forwards"])
        out.append({"steps": many, "calls": float(found["row_forwards"].mean()), "prompts": len(examples)} | facts)
        say(f"evaluate: {config.tune.task} in {many} steps ({out[-1]['calls']:.1f} calls): reward "
            f"{measured(facts['reward'], facts['reward_se'], sign='+-')}, {100 * facts['distinct']:.0f} % of the "
            "answers different")
    if processes.is_main_process():
        write_json(os.path.join(workdir, "rewards.json"), {"step": run.step, "task": config.tune.task,
                                                           "method": g.method, "options": g.options, "rewards": out})
    return out
