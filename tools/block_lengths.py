"""Which lengths of blocks a run draws, of a digit that is given and of a free one (CtrlDiff; docs/results.md).

    python -m tools.block_lengths runs/repeats/ctrldiff ... [--out=docs/runs/block_lengths.json]

Rollouts on prompts of the task repeats, 16 places a text: of the base that the first run started from, in blocks of 4,
8 and 16 that are given (max_prob) and of lengths drawn before any training (all as likely); of each run by the lengths
that it draws. For each kind of prompt: tokens of the first block and of all, calls, right answers and how many of them
are different, and the reward.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from hdlm_jax.common.console import markdown, measured
from hdlm_jax.common.jsons import write_json
from hdlm_jax.common.parallel import Tree
from hdlm_jax.config import Config
from hdlm_jax.decoding import sampler
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.models.block_lengths import LENGTHS
from hdlm_jax.models.make import joined
from hdlm_jax.runs.tune import Prompts
from hdlm_jax.training.loading import Run, load_base, load_here
from hdlm_jax.training.state import build
from hdlm_jax.tuning.record import make_rollout
from tools import cli

KINDS = {True: "given", False: "free"}
FREE = 16  # places of an answer, its end counted


def told(run: Run, config: Config, params: Tree, rows: int) -> dict[str, dict[str, float]]:
    """Of each kind: means over rollouts on `rows` prompts, by the method of config.generate; different: right ones."""
    network, process = build(config, run.hierarchy)
    prompts = Prompts(config, run.tokenizer, run.hierarchy.mask_id, "valid")
    rollout = jax.jit(make_rollout(network, cast(HierarchicalProcess, process), config.generate))
    numbers = sampler.numbers_of(config.generate, config.model.seq_len, run.tokenizer.eot)
    examples = prompts.examples(0, rows)
    batch = {"z": prompts.canvas(examples), "index": np.arange(rows, dtype=np.int32)}
    found = rollout((params, numbers), batch, jax.random.key(0))
    x, calls = np.asarray(found.x), np.asarray(found.calls)
    reward, _ = prompts.judged(x, examples, calls)
    answers = prompts.answers(x, examples)
    given = int(config.generate.options.partition("block=")[2].split()[0]) if found.length is None else 0
    tokens = first = np.full(rows, given)
    if found.length is not None:
        tokens = FREE / (np.asarray(found.length) >= 0).sum(1)
        first = np.minimum(np.array(LENGTHS)[np.asarray(found.length)[:, 0]], FREE)
    right = prompts.task.reward(answers, [example.facts for example in examples])
    out = {}
    for known, name in KINDS.items():
        mine = np.array([(example.facts != ".") == known for example in examples])
        means = {"first": first, "tokens": tokens, "calls": calls, "right": right, "reward": reward}
        out[name] = {"texts": int(mine.sum()), **{key: float(value[mine].mean()) for key, value in means.items()},
                     "different": len({answers[i] for i in np.flatnonzero(mine & (right == 1))})}
    spread = float(reward.std(ddof=1) / rows**0.5)
    return out | {"all": {"texts": rows, "reward": float(reward.mean()), "reward_se": spread}}


def measure(workdirs: Sequence[str], rows: int) -> list[dict[str, Any]]:
    runs = [load_here(workdir) for workdir in workdirs]
    own, out = runs[0].config, []
    base = load_base(own, runs[0].tokenizer.fingerprint)
    start = build(own, base.hierarchy)[0].init_params(jax.random.key(0), own.model.seq_len)
    for length in (4, 8, 16):
        g = dataclasses.replace(own.generate, method="max_prob", options=f"block={length}", steps=4 * FREE // length)
        given = dataclasses.replace(own, generate=g)
        out.append({"run": f"base, blocks of {length}", **told(base, given, base.params, rows)})
    out.append({"run": "base, lengths of chance", **told(base, own, joined(base.params, start), rows)})
    for workdir, run in zip(workdirs, runs, strict=True):
        name = f"`ctrldiff`, {os.path.basename(os.path.normpath(workdir))}"
        out.append({"run": name, **told(run, run.config, run.params, rows)})
    return out


def table(found: Mapping[str, Any]) -> str:
    """Of {"runs": [...]}, as `measure` makes them."""
    parts = (("first block", "first", ".1f"), ("a block", "tokens", ".1f"), ("calls", "calls", ".1f"),
             ("right", "right", ".3f"), ("different", "different", "d"))
    head = ["run", *(f"{name}: {part}" for name in KINDS.values() for part, _, _ in parts), "reward"]
    rows = [[run["run"], *(format(run[name][key], form) for name in KINDS.values() for _, key, form in parts),
             measured(run["all"]["reward"], run["all"]["reward_se"], ".3f")] for run in found["runs"]]
    return markdown(head, rows)


def main(argv: Sequence[str] | None = None) -> int:
    with cli.one_line("block_lengths"):
        ask = cli.Parser("block_lengths", __doc__)
        ask.add_argument("workdir", nargs="+", help="runs of --config=repeats:ctrldiff")
        ask.add_argument("--rows", type=cli.at_least(2), default=512, help="prompts")
        ask.add_argument("--out", type=Path, help="file of the figures as JSON")
        given = ask.parse_args(argv)
        found = {"runs": measure(given.workdir, given.rows)}
        if given.out:
            write_json(str(given.out), found)
        print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
