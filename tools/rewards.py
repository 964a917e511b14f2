"""What training by rewards does, system by system: several seeds on one task, each from a base of its own seed.

    python -m tools.rewards permutations [--seeds=0,1,2] [--systems=score,order] [--list]
    python -m tools.rewards levels       # the same texts at two levels, in twelve calls
    python -m tools.rewards sorting      # sudoku, countdown, parity

A system is a recipe of configs/permutations.py with some settings changed, trained from the base of its seed; one
called base-NAME only measures that base with another sampler. Each writes a line of --out
(docs/runs/rewards_TASK.jsonl): rewards on fixed prompts at half, once and twice its calls, different answers, the bound
of held-out texts, and what a step takes. What is there is not made again, what was stopped goes on from its checkpoint.
The table of a file, seeds averaged, stands in the documents between <!-- rewards: FILE --> and <!-- end -->.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hdlm_jax.common.console import markdown, measured, say
from hdlm_jax.common.jsons import dumps, read_json, read_lines
from hdlm_jax.config import expand
from tools import cli

KEPT = cli.ROOT / "docs" / "runs"
SECONDS = ("rollout_s", "update_s")


class System(NamedTuple):
    """label: in tables; recipe: argument of configs/permutations.py, "": the base is measured; more: settings changed
    (SECTION.SETTING=VALUE)."""

    label: str
    recipe: str = ""
    more: tuple[str, ...] = ()


def _by(method: str, options: str = "") -> tuple[str, ...]:
    return f"generate.method={method}", f"generate.options={options}"


LOW, ASS, RCR = _by("low_confidence", "block=0"), _by("ass", "draw=sample"), _by("rcr", "block=0")
SYSTEMS = {
    "base": System("base, `max_prob`"),
    "score": System("`score`", "score"),
    "score-kl": System("`score`, `kl=.1`", "score", ("tune.kl=.1",)),
    "score-view": System("`score`, `views=1`", "score", ("tune.views=1",)),
    "score-updates": System("`score`, `updates=4`", "score", ("tune.updates=4",)),
    "elbo": System("`elbo`", "elbo"),
    "nodes": System("`nodes` (GDPO)", "nodes"),
    "coupled": System("`coupled` (DiffuCoder)", "coupled"),
    "one_pass": System("`one_pass` (diffu-GRPO)", "one_pass"),
    "wd1": System("`one_pass`, `advantage=wd1` (wd1)", "one_pass", ("tune.advantage=wd1",)),
    "spg": System("`spg` (SPG)", "spg"),
    "nodes-text": System("`nodes`, `updates=4`, `ratio=text`", "nodes", (
        "tune.updates=4", "tune.ratio=text", "tune.clip=.5")),
    "base-first": System("base, `first_hitting`", "", _by("first_hitting")),
    "first": System("`score`, `first_hitting`", "score", _by("first_hitting")),
    "order": System("`score`, order trained (DCoLT)", "order"),
    "base-low": System("base, `low_confidence`", "", LOW),
    "low": System("`score`, `low_confidence`", "score", LOW),
    "base-ass": System("base, `ass`", "", ASS),
    "ass": System("`score`, `ass` (CJ-GRPO)", "score", ASS),
    "base-rcr": System("base, `rcr`", "", RCR),
    "rcr": System("`score`, `rcr`", "mdpo", ("tune.advantage=mean",)),
    "rcr-call": System("`rcr`, `advantage=call`", "mdpo", ("tune.advantage=call",)),
    "rcr-mdpo": System("`rcr`, `advantage=mdpo` (MDPO)", "mdpo"),
}


class Task(NamedTuple):
    """shared: settings of the base and of all that starts from it; alone: of the base alone; rewarded: of what starts
    from it alone; systems: names."""

    shared: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    rewarded: tuple[str, ...] = ()
    systems: tuple[str, ...] = tuple(SYSTEMS)


def _of_prompts(task: str, places: int, calls: int, *more: str) -> tuple[str, ...]:
    """Shared settings of a task whose prompts differ."""
    return (f"tune.task={task}", f"model.seq_len={places}", f"generate.steps={calls}", "model.width=64", *more)


BY_PROMPT = ("train.batch_size=64", "tune.group=16")
HUNDRED = (*BY_PROMPT, "train.steps=100", "evaluate.rows_in_training=64")
TASKS = {
    "permutations": Task(),
    "levels": Task(("hierarchy.clusters=(3,)", "generate.steps=12"), (), (),
                   ("base", "score", "score-kl", "order", "elbo", "nodes")),
    "sorting": Task(_of_prompts("sorting", 18, 3), ("train.steps=350", "optimizer.schedule=constant"), BY_PROMPT,
                    ("base", "score")),
    "sudoku": Task(_of_prompts("sudoku", 34, 4, "train.batch_size=64"),
                   ("train.steps=8000", "optimizer.schedule=constant", "optimizer.lr=2e-3", "optimizer.ema=.999"),
                   HUNDRED, ("base", "score", "order")),
    "countdown": Task(_of_prompts("countdown", 24, 4, "train.batch_size=64"),
                      ("train.steps=2500", "optimizer.schedule=constant", "optimizer.ema=.99"), HUNDRED,
                      ("base", "score", "base-rcr", "rcr", "rcr-mdpo")),
    "parity": Task(_of_prompts("parity", 11, 2), ("train.steps=1000", "optimizer.schedule=constant"), BY_PROMPT,
                   ("base", "score")),
}


def commands(task: Task, system: System, seed: int, base: str, workdir: str) -> list[list[str]]:
    """What trains the base and a system of a seed and measures it, one after the other."""
    def main(config: str, folder: str, more: Sequence[str], mode: str) -> list[str]:
        return [sys.executable, "-m", "hdlm_jax.main", *[f"--config={config}"] * bool(config), f"--workdir={folder}",
                *(f"--config.{setting}" for setting in more), f"--mode={mode}"]

    seeded = f"train.seed={seed}"
    todo = [main("permutations", base, (*task.shared, *task.alone, seeded), "train")]
    if not system.recipe:
        return [*todo, main("", base, system.more, "evaluate")]
    more = (*task.shared, *task.rewarded, *system.more, seeded, f"train.init_from={base}")
    return [*todo, main(f"permutations:{system.recipe}", workdir, more, "train"), main("", workdir, (), "evaluate")]


def make(task: str, name: str, seed: int, runs: Path) -> dict[str, Any] | None:
    """Trains and measures one; its line of results, None where something went wrong, which has been said."""
    system, base = SYSTEMS[name], runs / f"{task}-base-s{seed}"
    workdir = runs / f"{task}-{name}-s{seed}" if system.recipe else base
    todo = commands(TASKS[task], system, seed, str(base), str(workdir))
    for command in todo[(base / "evaluate.json").exists():]:  # a base that is measured is trained
        say(f"rewards: {name}, seed {seed}: {' '.join(command[1:])}")
        if code := subprocess.run(command, check=False).returncode:
            say(f"rewards: {name}, seed {seed}: exit code {code}, left for the next call")
            return None
    bound, told = read_json(str(workdir / "evaluate.json")), read_json(str(workdir / "rewards.json"))
    steps = [line for line in read_lines(str(workdir / "metrics.jsonl"))[0] if "rollout_s" in line]
    times = {key: float(np.median([line[key] for line in steps])) for key in SECONDS if steps}
    return {"name": name, "run": system.label, "seed": seed, "step": told["step"], "nelbo": bound["nelbo"],
            "se": bound["se"], "rewards": told["rewards"], "commit": cli.commit(), **times}


def averaged(values: Sequence[float], errors: Sequence[float]) -> str:
    """Mean over seeds ± its standard error: that between seeds, and that of the texts, which all seeds share."""
    n = len(values)
    between = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    return measured(float(np.mean(values)), math.hypot(between, float(np.mean(errors))), ".3f")


def _told(at: Sequence[Mapping[str, Any]]) -> str:
    """Calls and the reward in them, of all seeds."""
    calls = f"{np.mean([one['calls'] for one in at]):.1f}".removesuffix(".0")
    return f"{calls}: {averaged([one['reward'] for one in at], [one['reward_se'] for one in at])}"


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, a row of every system, seeds averaged: calls and the reward in them at half, once and twice the number
    that it was trained with (once alone of a sampler that counts none), different answers, NELBO; of the seconds the
    least of all seeds, as they depend on what else the machine did."""
    named: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        named.setdefault(line["run"], []).append(line)
    timed, rows = any("update_s" in line for line in lines), []
    for name, each in named.items():
        told = list(zip(*(line["rewards"] for line in each), strict=True))  # of each number of calls, all seeds
        by_calls = [_told(at) for at in told]
        row = [name, str(len(each)), *(by_calls if len(told) == 3 else ["", *by_calls, ""]),
               ", ".join(f"{100 * np.mean([one['distinct'] for one in at]):.0f} %" for at in told
                         if at[0]["distinct"] is not None),  # it says nothing of old runs where all prompts differ
               averaged([line["nelbo"] for line in each], [line["se"] for line in each])]
        if timed:
            row.append(" + ".join(f"{min(line[key] for line in each if key in line):.3f}" for key in SECONDS
                                  if any(key in line for line in each)))
        rows.append(row)
    heads = ["run", "seeds", "calls: reward at half", "as trained", "at twice", "different", "NELBO, nats/token"]
    return markdown(heads + ["rollouts + update, s"] * timed, rows)


def main(argv: Sequence[str] | None = None) -> None:
    with cli.one_line("rewards"):
        ask = cli.Parser("rewards", __doc__)
        ask.add_argument("task", choices=list(TASKS))
        ask.add_argument("--systems", type=cli.listed(str), metavar="LIST", help="these alone")
        ask.add_argument("--seeds", type=cli.listed(int), default=[0, 1, 2], metavar="LIST")
        ask.add_argument("--runs", type=expand, default="runs/rewards", help="workdirs")
        ask.add_argument("--out", type=Path, help="lines of results")
        ask.add_argument("--list", action="store_true", help="say what there is and what is open, make nothing")
        given = ask.parse_args(argv)
        of_task = TASKS[given.task].systems
        if unknown := [name for name in given.systems or () if name not in of_task]:
            raise ValueError(f"--systems={','.join(unknown)}: choose among {', '.join(of_task)}")
        out = given.out or KEPT / f"rewards_{given.task}.jsonl"
        done = {(line["name"], line["seed"]) for line in read_lines(str(out))[0]}
        for seed in given.seeds:
            for name in given.systems or of_task:
                there = (name, seed) in done
                say(f"rewards: {'done' if there else 'open'}  {name}, seed {seed}")
                if not there and not given.list and (line := make(given.task, name, seed, Path(given.runs))):
                    out.parent.mkdir(parents=True, exist_ok=True)
                    with out.open("a", encoding="utf-8") as file:
                        file.write(dumps(line) + "\n")


if __name__ == "__main__":
    main()
