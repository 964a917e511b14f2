"""The speed run: trains configs/speedrun.py from text on, measures it, and says what it took (docs/speedrun.md).

    HDLM_DATA=../shared/data python -m tools.speedrun [--keep=NAME] [--config.optimizer.muon_lr=.03 ...]

The clock runs from the start of the process that reads text to the end of the last training step, compiling included;
the measurement that follows is not in it. A run that misses the bound is told so and is not kept.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hdlm_jax.common.console import markdown, measured, say
from hdlm_jax.common.jsons import read_json, read_lines, write_json
from tools import cli

KEPT = cli.ROOT / "docs" / "runs" / "speedrun.json"
TARGET = 5.50  # nats a token


def flops_of(workdir: str) -> float:
    """Of one token of the run's training (models/make.py)."""
    from hdlm_jax.models.make import flops_per_token
    from hdlm_jax.training.loading import load_here

    run = load_here(workdir, "latest")
    return flops_per_token(run.config, run.hierarchy, run.process)


def run(recipe: str, more: Sequence[str], workdir: str) -> dict[str, Any]:
    """Trains and measures; what was reached and what it took."""
    main = [sys.executable, "-m", "hdlm_jax.main", f"--workdir={workdir}"]
    started = time.monotonic()
    subprocess.run([*main, f"--config={recipe}", *more, "--mode=train"], check=True)
    seconds = time.monotonic() - started
    subprocess.run([*main, "--mode=evaluate"], check=True)
    found = read_json(str(Path(workdir, "evaluate.json")))
    tokens = read_lines(str(Path(workdir, "metrics.jsonl")))[0][-1]["tokens"]
    return {"date": datetime.date.today().isoformat(), "commit": cli.commit(), "recipe": " ".join([recipe, *more]),
            "nelbo": found["nelbo"], "se": found["se"], "seconds": round(seconds), "tokens": tokens,
            "flops": flops_of(workdir) * tokens, "cores": len(os.sched_getaffinity(0))}


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown of all records, the first one first."""
    return markdown(["", "date", "nats/token", "seconds", "tokens", "FLOPs", "cores", "what changed", "commit"], [
        [str(i + 1), r["date"], measured(r["nelbo"], r["se"], ".3f"), str(r["seconds"]), f"{r['tokens']:,}",
         f"{r['flops']:.2g}", str(r["cores"]), r["name"], r["commit"]] for i, r in enumerate(records)])


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 where the bound was reached, else 1."""
    with cli.one_line("speedrun"):
        ask = cli.Parser("speedrun", __doc__)
        ask.add_argument("--recipe", default="speedrun", help="speedrun, or speedrun:adamw where it began")
        ask.add_argument("--keep", metavar="NAME", default="", help="keep it as a record: what it changed")
        given, more = ask.parse_known_args(argv)
        if other := [one for one in more if not one.startswith("--config.")]:
            raise ValueError(f"{other[0]}: give --recipe, --keep or settings as --config.section.name=value")
        with tempfile.TemporaryDirectory(prefix="speedrun_") as workdir:  # from text on, every time
            found = run(given.recipe, more, workdir)
        reached = found["nelbo"] <= TARGET
        say(f"speedrun: {measured(found['nelbo'], found['se'], sign='+-')} nats/token (the bound is {TARGET}) in "
            f"{found['seconds']} s, {found['tokens']:,} tokens, {found['flops']:.2g} FLOPs on {found['cores']} cores")
        if reached and given.keep:
            records = json.loads(KEPT.read_text()) if KEPT.exists() else []
            write_json(KEPT, [*records, {"name": given.keep} | found])
        elif not reached:
            say(f"speedrun: missed by {found['nelbo'] - TARGET:.4f}" + ", not kept" * bool(given.keep))
    return int(not reached)


if __name__ == "__main__":
    sys.exit(main())
