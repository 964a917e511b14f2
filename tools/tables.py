"""Tables of README.md and docs/ from the runs' own JSON: rewrites what stands behind each mark, or checks it.

    python -m tools.tables             # rewrites
    python -m tools.tables --check     # exit code 1 where a table is not what its runs say
    python -m tools.tables --keep=docs/runs/quickstart runs/quickstart/hdlm_tiny runs/quickstart/mdlm_tiny

A table stands between two marks, <!-- runs: docs/runs/quickstart/hdlm_tiny docs/runs/quickstart/mdlm_tiny --> and
<!-- end -->: that of `python -m hdlm_jax.report` of these runs, and their paired differences. --keep copies of runs
what such a table is made from. Behind <!-- grid: NAME --> stands a table of tools/grid.py. All others are
<!-- NAME: FILE -->, a table of what a tool wrote to FILE (`OF_FILES`).
"""
import functools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hdlm_jax.common import jsons
from hdlm_jax.report import compare, leaderboard
from tools import (
    block_lengths,
    calibration,
    cli,
    grid,
    isoflop,
    lessons,
    method_sweep,
    plan,
    rewards,
    serve_load,
    speedrun,
    toy_calls,
    toy_channel,
    toy_map,
    toy_surrogates,
    wavefronts,
)

ROOT = cli.ROOT
KEPT = ("evaluate.json", "evaluate_rows.npz", "generate.json", "metrics.jsonl")


def board_tables(found: leaderboard.Board) -> str:
    """Of a leaderboard the numbers that compare models of different tokenizers."""
    shown = [t for t in leaderboard.tables(found, {}) if t.name in ("bits", "pairs", "questions", "generation")]
    return "\n\n".join(f"{t.title}:\n\n{leaderboard.written(t)}" for t in shown)


# what stands behind <!-- NAME: FILE -->, of the JSON or the JSON lines in FILE
OF_FILES: dict[str, Callable[[Any], str]] = {
    "toy": toy_calls.table, "map": toy_map.tables, "surrogates": toy_surrogates.table,
    "channel": toy_channel.tables, "lesson": lessons.table,
    "speedrun": speedrun.table, "plans": plan.table, "rewards": rewards.table, "load": serve_load.table,
    "sweep": method_sweep.table, "isoflop": isoflop.table, "board": board_tables, "lengths": block_lengths.table,
    "calibration": calibration.table, "wavefronts": wavefronts.table}
MARK = re.compile(rf"(<!-- (runs|grid|{'|'.join(OF_FILES)}): ([^>]+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def rendered(found: re.Match[str]) -> str:
    """A mark with the table of its runs, or of the grid, behind it."""
    _, kind, of, _, _ = found.groups()
    if kind == "grid":
        few = functools.partial(grid.calls_table, calls=grid.FEW)
        own: dict[str, Callable[[], str]] = {"calls": grid.calls_table, "few_calls": few,
                                             "likelihoods": grid.likelihoods_table}
        lines = [own[of]() if of in own else grid.table(of)]
    elif kind == "runs":
        workdirs = [str(ROOT / name) for name in of.split()]
        lines = [compare.table(workdirs), *compare.differences(workdirs)]
    else:
        path = ROOT / of
        lines = [OF_FILES[kind](jsons.read_lines(str(path))[0] if path.suffix == ".jsonl" else
                                json.loads(path.read_text()))]
    return found[1] + "\n" + "\n\n".join(lines) + "\n\n" + found[5]


def keep(folder: Path, workdirs: Sequence[str]) -> None:
    """Copies of each run what a table is made from; not every run has drawn samples."""
    for workdir in workdirs:
        there = folder / os.path.basename(os.path.normpath(workdir))
        there.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            if name != "generate.json" or Path(workdir, name).exists():
                shutil.copyfile(Path(workdir, name), there / name)


def rewrite(check: bool) -> bool:
    """Whether a table differs from what its runs say; written anew unless check."""
    differ = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        old = path.read_text(encoding="utf-8")
        new = MARK.sub(rendered, old)
        if new != old:
            differ.append(path.name)
            if not check:
                path.write_text(new, encoding="utf-8")
    if differ:
        print(f"tables: {', '.join(differ)}: {'not what the runs say' if check else 'rewritten'}")
    return bool(differ)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 1 where --check finds a table that differs."""
    with cli.one_line("tables"):
        ask = cli.Parser("tables", __doc__)
        ask.add_argument("workdir", nargs="*", help="runs whose files --keep copies")
        ask.add_argument("--check", action="store_true", help="write nothing")
        ask.add_argument("--keep", metavar="FOLDER", help="copy what tables need, in place of writing tables")
        given = ask.parse_args(argv)
        if bool(given.workdir) != bool(given.keep):
            raise ValueError("--keep=FOLDER goes with the runs to copy from")
        if given.keep:
            keep(Path(given.keep), given.workdir)
            return 0
        return int(rewrite(given.check) and given.check)


if __name__ == "__main__":
    sys.exit(main())
