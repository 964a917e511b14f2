#!/usr/bin/env python
"""Kills a training run (SIGKILL) at random moments, 20 times in a row, and compares its end with an undisturbed run.

    .venv/bin/python launch/kill_test.py [--kills=20] [--seed=0] [--folder=runs/kill_test]

Every time the same command goes on from what is on disk. In the end parameters, optimizer state, average of weights,
data position, tokens and metrics.jsonl must be those of the undisturbed run, bit for bit. Prints what each kill fell
into; fails unless at least three fell into each of preparing, stepping, saving and evaluating. About three minutes
on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

PHASES = ("preparing", "stepping", "saving", "evaluating")
ROOT = Path(__file__).resolve().parent.parent
RECIPE = '''
from hdlm_jax import config


def get_config():
    c = config.default()
    c.data.source, c.data.files = "files", ({files!r},)
    c.tokenizer.kind, c.tokenizer.vocab_size = "bpe", 1024
    c.hierarchy.clusters = (16,)
    c.model.width, c.model.blocks, c.model.heads, c.model.seq_len = 128, 2, 2, 64
    c.optimizer.warmup, c.optimizer.ema = 5, 0.9
    c.train.steps, c.train.batch_size, c.train.log_every, c.train.evaluate_every = 60, 16, 2, 3
    c.evaluate.rows_in_training = 64
    c.checkpoint.every, c.checkpoint.minutes = 4, 0.01
    return c
'''


def write_recipe(folder: Path) -> Path:
    """A corpus of some megabytes in several files, and a recipe whose run spends time in every phase."""
    folder.mkdir(parents=True)
    words = random.Random(1)
    lexicon = ["".join(words.choices("abcdefghijklmnopqrstuvwxyz", k=words.randint(2, 9))) for _ in range(3000)]
    for part in range(8):
        with open(folder / f"part{part}.jsonl", "w") as file:
            for _ in range(3000):
                text = " ".join(words.choices(lexicon, k=words.randint(20, 400)))
                file.write(json.dumps({"text": text}) + "\n")
    recipe = folder / "recipe.py"
    recipe.write_text(RECIPE.format(files=str(folder / "part*.jsonl")))
    return recipe


def child(marker: str, arguments: list[str]) -> None:
    """The front door, with a file that says whether it is evaluating just now."""
    from absl import app

    from hdlm_jax import main
    from hdlm_jax.evaluation.elbo import Evaluator

    measure = Evaluator.nats

    def nats(*args, **kwargs):
        Path(marker).touch()
        try:
            return measure(*args, **kwargs)
        finally:
            os.remove(marker)

    Evaluator.nats = nats  # type: ignore[method-assign]
    app.run(main.run, argv=["main", *arguments], flags_parser=main.parse)


class Run:
    """A training run in a process of its own, and what it is doing as far as one can see from outside."""

    def __init__(self, recipe: Path, workdir: Path):
        self.workdir, self.marker = workdir, workdir.with_suffix(".evaluating")
        self.marker.unlink(missing_ok=True)
        self.log = open(workdir.with_suffix(".log"), "ab")
        self.said = self.log.tell()
        command = [sys.executable, __file__, "--child", str(self.marker), f"--config={recipe}", f"--workdir={workdir}"]
        environment = {"JAX_PLATFORMS": "cpu", **os.environ, "CI": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=environment)

    def phase(self) -> str:
        with open(self.log.name, "rb") as file:
            file.seek(self.said)
            trains = b"train: first step done" in file.read()
        if not trains:
            prepares = (self.workdir / "data").exists() and not (self.workdir / "data" / "manifest.json").exists()
            return "preparing" if prepares else "starting"
        # a save of this process that is not complete yet: those of earlier ones were swept away when it began
        if any("tmp" in path.name for path in (self.workdir / "checkpoints").glob("*")):
            return "saving"
        return "evaluating" if self.marker.exists() else "stepping"

    def watch(self) -> Counter[str]:
        """Seconds that an undisturbed run spends in each phase."""
        spent = Counter[str]()
        while self.process.poll() is None:
            before = time.monotonic()
            time.sleep(0.005)
            spent[self.phase()] += time.monotonic() - before  # type: ignore[assignment]
        return spent

    def kill_in(self, phase: str, delay: float) -> str | None:
        """Waits for the phase and a while longer, kills; what the kill fell into, None if the run came to its end."""
        while self.process.poll() is None and self.phase() != phase:
            time.sleep(0.0005)
        if self.process.poll() is None:
            time.sleep(delay)
        self.process.send_signal(signal.SIGKILL)
        return self.phase() if self.process.wait() == -signal.SIGKILL else None


def final(recipe: Path, workdir: Path) -> dict:
    """Everything a run leaves that must not depend on kills."""
    import jax
    import numpy as np
    from absl import logging

    from hdlm_jax.common import parallel
    from hdlm_jax.config import resolve
    from hdlm_jax.training import loading, state
    from hdlm_jax.training.checkpoint import Checkpoints

    logging.set_verbosity(logging.ERROR)
    space: dict = {}
    exec(recipe.read_text(), space)
    config = resolve(space["get_config"]())
    run = loading.load_run(config, str(workdir), "latest")
    mesh = parallel.make_mesh(config)
    abstract, _ = state.abstract_state(config, run.network, state.make_optimizer(config)[0], mesh)
    checkpoints = Checkpoints(str(workdir), read_only=True)
    step = checkpoints.latest()
    raw = lambda a: (a.dtype.name, a.shape, np.asarray(a).tobytes())  # noqa: E731
    arrays = jax.tree.map(raw, checkpoints.restore(step, abstract))
    meta = {name: value for name, value in checkpoints.meta(step).items() if name != "config"}
    keep = ("step", "tokens", "loss", "nelbo", "grad_norm", "lr", "skipped", "valid_nelbo", "valid_se")
    metrics = [{k: r.get(k) for k in keep} for r in map(json.loads, open(workdir / "metrics.jsonl"))]
    manifest = json.loads((workdir / "data" / "manifest.json").read_text())
    return {"step": step, "arrays": arrays, "meta": meta, "metrics": metrics, "tokens": manifest["shards"]}


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--folder", type=Path, default=ROOT / "runs" / "kill_test")
    options.add_argument("--at_least", type=int, default=3, help="kills that must fall into each phase")
    f = options.parse_args()
    shutil.rmtree(f.folder, ignore_errors=True)
    recipe = write_recipe(f.folder)
    quiet, killed = f.folder / "quiet", f.folder / "killed"
    undisturbed = Run(recipe, quiet)
    lasts = undisturbed.watch()
    if undisturbed.process.returncode:
        print(f"the undisturbed run failed: {quiet.with_suffix('.log')}")
        return 1
    print("the undisturbed run:", ", ".join(f"{phase} {lasts[phase]:.1f} s" for phase in PHASES), flush=True)
    dice, tally = random.Random(f.seed), Counter[str]()
    # where a kill should fall, and how long after that began: a part of preparing only, since what is done stays done
    longest = {"preparing": lasts["preparing"] / f.kills * 4, "stepping": 0.3, "saving": 0.03, "evaluating": 0.1}
    while tally.total() < f.kills:
        prepared = (killed / "data" / "manifest.json").exists() or tally["preparing"] >= f.kills // 4
        target = min(PHASES[1:], key=lambda phase: (tally[phase], dice.random())) if prepared else "preparing"
        fell = Run(recipe, killed).kill_in(target, dice.uniform(0, longest[target]))
        if fell is None:
            break
        tally[fell] += 1
        print(f"kill {tally.total():2d}: {fell}", flush=True)
    ended = Run(recipe, killed).process.wait() == 0
    print("kills:", ", ".join(f"{phase} {tally[phase]}" for phase in (*PHASES, "starting")))
    found, want = final(recipe, killed), final(recipe, quiet)
    different = [name for name in want if found[name] != want[name]]
    steps = [record["step"] for record in found["metrics"]]
    problems = [f"{name} differs from the undisturbed run" for name in different]
    problems += ["the run did not end"] if not ended else []
    problems += [f"only {tally.total()} of {f.kills} kills before the end"] if tally.total() < f.kills else []
    problems += ["a step is twice in metrics.jsonl"] if len(set(steps)) != len(steps) else []
    problems += [f"only {tally[phase]} kills while {phase}" for phase in PHASES if tally[phase] < f.at_least]
    print("\n".join(problems) or f"all the same after {tally.total()} kills: step {found['step']}, "
          f"{len(steps)} lines of metrics, parameters, optimizer, average, data position and tokens")
    return bool(problems)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
