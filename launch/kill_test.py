#!/usr/bin/env python
"""Disturbs a training run 40 times at random moments and compares its end with an undisturbed run, bit for bit.

    .venv/bin/python launch/kill_test.py [--events=40] [--seed=0] [--folder=runs/kill_test]

Every time the same command goes on from what is on disk. Kinds of events, and what must come of them:

kill    SIGKILL. At least three fall into each of preparing, stepping, saving and evaluating.
term    SIGTERM: exit code 75 once it trains; before it may just end.
int     Ctrl-C (SIGINT): 75 once it trains, 130 before.
full    A disk that is full from a random moment on, once it is at work: the kernel refuses the process every further
        write to a file. A limit on the size of files does it (RLIMIT_FSIZE of 0 by prlimit), which needs no rights and
        reaches C++ as well; so the error is EFBIG, not ENOSPC. Exit code 1, and a last line that names a file of the
        workdir; no traceback.
flip    Between two starts, bytes flipped at random in every array file of the newest checkpoint: the next start must
        say that it puts it aside and go on from the one before. It is then killed.
second  The same command once more while the first one runs: one of them is refused by the lock in one line with exit
        code 1, the other trains on, and leaves on SIGTERM with 75.

In the end parameters, optimizer state, average of weights, data position, tokens and metrics.jsonl must be those of the
undisturbed run, each step once; only what was measured on validation text may lack, where a run left on request when
that was due. Prints a table of events by kind and phase: `starting` is up to the lock, `making ready` from there to the
first step but for `preparing` the tokens. Six to ten minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

PHASES, READY = ("preparing", "stepping", "saving", "evaluating"), "making ready"
KINDS = {"kill": 16, "term": 6, "int": 5, "full": 5, "flip": 4, "second": 4}  # of 40
RESUME_EXIT, INTERRUPTED = 75, 130
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
    c.train.steps, c.train.batch_size, c.train.log_every, c.train.evaluate_every = {steps}, 16, 2, 3
    c.evaluate.rows_in_training = 64
    c.checkpoint.every, c.checkpoint.minutes = 4, 0.01
    return c
'''


def write_recipe(folder: Path, steps: int) -> Path:
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
    recipe.write_text(RECIPE.format(files=str(folder / "part*.jsonl"), steps=steps))
    return recipe


def child(marker: str, arguments: list[str]) -> None:
    """The front door, with a file that says whether it is evaluating just now."""
    from hdlm_jax import main
    from hdlm_jax.evaluation.elbo import Evaluator

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what goes to the background without it
    measure = Evaluator.nats

    def nats(*args, **kwargs):
        Path(marker).touch()
        try:
            return measure(*args, **kwargs)
        finally:
            os.remove(marker)

    Evaluator.nats = nats  # type: ignore[method-assign]
    sys.argv[1:] = arguments
    main.command()


class Run:
    """A training run in a process of its own, and what it is doing as far as one can see from outside."""

    def __init__(self, recipe: Path, workdir: Path, name: str = ""):
        self.workdir, self.marker = workdir, workdir.with_name(f"{workdir.name}{name}.evaluating")
        self.marker.unlink(missing_ok=True)
        self.log = open(workdir.with_name(f"{workdir.name}{name}.log"), "ab", buffering=0)
        self.said = self.log.tell()
        command = [sys.executable, __file__, "--child", str(self.marker), f"--config={recipe}", f"--workdir={workdir}"]
        environment = {"JAX_PLATFORMS": "cpu", **os.environ, "CI": "1", "PYTHONPATH": str(ROOT)}
        # through a pipe, as a full disk must not keep it from speaking
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
        self.ear = threading.Thread(target=self._hear, daemon=True)
        self.ear.start()

    def _hear(self) -> None:
        for line in self.process.stdout or ():
            self.log.write(line)

    def lines(self) -> list[str]:
        """What it has said so far."""
        with open(self.log.name, "rb") as file:
            file.seek(self.said)
            lines = file.read().decode("utf-8", "replace").splitlines()
        return [line for line in lines if line]

    def trains(self) -> bool:
        return any(line.startswith("train: first step done") for line in self.lines())

    def phase(self) -> str:
        if not self.trains():
            with contextlib.suppress(OSError):
                if (self.workdir / "lock").read_text().startswith(f"pid {self.process.pid} "):
                    return READY if (self.workdir / "data" / "manifest.json").exists() else "preparing"
            return "starting"
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

    def reach(self, phase: str, skip: float, delay: float) -> bool:
        """Trains for `skip` seconds, waits for the phase and for `delay`; False if the run comes to an end before."""
        while self.process.poll() is None and phase in PHASES[1:] and not self.trains():
            time.sleep(0.01)
        time.sleep(skip if phase in PHASES[1:] else 0)
        while self.process.poll() is None and self.phase() != phase:
            time.sleep(0.0005)
        time.sleep(delay)
        return self.process.poll() is None

    def end(self, number: int = 0) -> int:
        """Its exit code, after a signal where one is given, with everything it said heard."""
        if number:
            self.process.send_signal(number)
        code = self.process.wait()
        self.ear.join(20)
        return code


class Events:
    """What happens to the run, one event a start; `problems` are what should not have come of them."""

    def __init__(self, recipe: Path, workdir: Path, dice: random.Random):
        self.recipe, self.workdir, self.dice = recipe, workdir, dice
        self.problems: list[str] = []

    def steps(self) -> list[int]:
        return sorted(int(path.name) for path in (self.workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit())

    def expect(self, ok: bool, run: Run, what: str) -> None:
        if not ok:
            self.problems.append(f"{what}: exit code {run.process.returncode}, {run.lines()[-3:]} ({run.log.name})")
            print(self.problems[-1], flush=True)

    def happen(self, kind: str, phase: str, delay: float) -> str | None:
        """One event; the phase it fell into, None if the run came to its end before."""
        if kind == "flip":
            return self.flip()
        run = Run(self.recipe, self.workdir)
        if kind == "second":
            return self.second(run)
        if not run.reach(phase, self.dice.uniform(0, 1), delay):
            self.expect(run.end() == 0, run, f"{kind}: ended before it")
            return None
        if kind == "full":
            return self.full(run)
        number = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}[kind]
        before = run.phase()
        code = run.end(number)
        if code == 0:
            return None
        early = {"term": (-signal.SIGTERM, RESUME_EXIT), "int": (INTERRUPTED, RESUME_EXIT)}.get(kind, ())
        right = (-number,) if kind == "kill" else (RESUME_EXIT,) if before in PHASES[1:] else early
        self.expect(code in right, run, f"{kind} while {before}")
        return run.phase() if kind == "kill" else before

    def full(self, run: Run) -> str | None:
        hard = resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE)[1]
        phase = run.phase()
        resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (0, hard))
        code, lines = run.end(), run.lines()
        if code == 0:
            return None
        told = "File too large" in lines[-1] and str(self.workdir) in lines[-1]
        self.expect(code == 1 and told and not any("Traceback" in line for line in lines), run, f"full while {phase}")
        return phase

    def flip(self) -> str | None:
        *_, before, newest = self.steps()
        for path in (self.workdir / "checkpoints" / str(newest)).glob("*/**/d/*"):
            raw = bytearray(path.read_bytes())
            for _ in range(8):
                raw[self.dice.randrange(len(raw))] ^= 1 << self.dice.randrange(8)
            path.write_bytes(raw)
        run = Run(self.recipe, self.workdir)
        while run.process.poll() is None and not run.trains():
            time.sleep(0.01)
        back = [line for line in run.lines() if f"put aside as damaged-{newest}" in line]
        run.end(signal.SIGKILL)
        self.expect(len(back) == 1 and back[0].endswith(f"going on from step {before:,}"), run, f"flip in {newest}")
        return "between starts"

    def second(self, first: Run) -> str | None:
        time.sleep(self.dice.uniform(1, 4))
        other = Run(self.recipe, self.workdir, "_second")
        both = (first, other)
        while all(run.process.poll() is None for run in both):
            time.sleep(0.01)
        refused, stays = both if first.process.poll() is not None else (other, first)
        phase = stays.phase()
        if refused.end() == 0:  # there was nothing left to do
            stays.end(signal.SIGKILL)
            return None
        self.expect(refused.process.returncode == 1 and "is held by pid" in refused.lines()[-1] and
                    not any("Traceback" in line for line in refused.lines()), refused, "second: not refused")
        while stays.process.poll() is None and not stays.trains():
            time.sleep(0.01)
        self.expect(stays.end(signal.SIGTERM) in (0, RESUME_EXIT), stays, "second: the first one is harmed")
        return phase


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


def planned(events: int, dice: random.Random) -> list[str]:
    """Kinds of events in the shares of KINDS and a random order, first those that fall into preparing."""
    kinds = [kind for kind, share in KINDS.items() for _ in range(max(1, share * events // sum(KINDS.values())))]
    kinds = (kinds + ["kill"] * events)[:events]
    first = [kind for kind, share in KINDS.items() if kind != "flip" for _ in range(share * events // 160 or 1)]
    for kind in first:
        kinds.remove(kind)
    dice.shuffle(first)
    first.sort(key=lambda kind: kind == "second")  # which lets preparing end
    dice.shuffle(kinds)
    return first + kinds


def table(tally: Counter[tuple[str, str]]) -> str:
    """Events by kind and phase, as Markdown."""
    columns = ("starting", "preparing", READY, *PHASES[1:], "between starts")
    rows = ["| | " + " | ".join(columns) + " | all |", "|---" * (len(columns) + 2) + "|"]
    for kind in KINDS:
        numbers = [tally[kind, column] for column in columns]
        rows.append(f"| {kind} | " + " | ".join(str(n or "") for n in numbers) + f" | {sum(numbers)} |")
    return "\n".join(rows)


def disturb(events: Events, plan: list[str], preparing: float) -> Counter[tuple[str, str]]:
    """Lets all events of the plan happen, in phases that had the fewest of their kind; how many of which fell where."""
    dice, tally = events.dice, Counter[tuple[str, str]]()
    # how long after a phase began: a part of preparing only, since what is done stays done
    early = len(plan) // 5
    longest = {"preparing": preparing / max(early, 1), READY: 4, "stepping": 0.3, "saving": 0.03, "evaluating": 0.1}
    while plan:
        prepared = (events.workdir / "data" / "manifest.json").exists() or tally.total() >= early
        # bytes are flipped where there is a checkpoint to go back to, which whatever else happens will make
        kind = next((kind for kind in plan if kind != "flip" or len(events.steps()) > 1), "kill")
        phases = PHASES[1:] if kind == "kill" else (READY, *PHASES[1:])
        target = min(phases, key=lambda phase: (tally[kind, phase], dice.random())) if prepared else "preparing"
        began = time.monotonic()
        fell = events.happen(kind, target, dice.uniform(0, longest[target]))
        if fell is None:
            break
        if kind in plan:
            plan.remove(kind)
        tally[kind, fell] += 1
        print(f"{tally.total():2d}: {kind}, {fell}; {time.monotonic() - began:.0f} s, checkpoints {events.steps()}",
              flush=True)
    return tally


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--events", type=int, default=40)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--folder", type=Path, default=ROOT / "runs" / "kill_test")
    options.add_argument("--at_least", type=int, default=3, help="kills that must fall into each phase")
    f = options.parse_args()
    shutil.rmtree(f.folder, ignore_errors=True)
    recipe = write_recipe(f.folder, 4 * f.events)
    quiet, disturbed = f.folder / "quiet", f.folder / "disturbed"
    undisturbed = Run(recipe, quiet)
    lasts = undisturbed.watch()
    if undisturbed.end():
        print(f"the undisturbed run failed: {undisturbed.log.name}")
        return 1
    print("the undisturbed run:", ", ".join(f"{phase} {lasts[phase]:.1f} s" for phase in PHASES), flush=True)
    dice = random.Random(f.seed)
    events = Events(recipe, disturbed, dice)
    tally = disturb(events, planned(f.events, dice), lasts["preparing"])
    last = Run(recipe, disturbed)
    events.expect(last.end() == 0, last, "the run did not end")
    print(table(tally))
    found, want = final(recipe, disturbed), final(recipe, quiet)
    left = set(re.findall(r"asked to stop, saved step ([\d,]+)", Path(last.log.name).read_text(errors="replace")))
    for record, whole in zip(found["metrics"], want["metrics"], strict=False):
        if record["valid_nelbo"] is None and f"{record['step']:,}" in left:
            record |= {name: whole[name] for name in ("valid_nelbo", "valid_se")}
    steps = [record["step"] for record in found["metrics"]]
    problems = events.problems + [f"{name} differs from the undisturbed run" for name in want
                                  if found[name] != want[name]]
    problems += [f"only {tally.total()} of {f.events} events before the end"] if tally.total() < f.events else []
    problems += ["a step is twice in metrics.jsonl"] if len(set(steps)) != len(steps) else []
    problems += [f"only {tally['kill', phase]} kills while {phase}" for phase in PHASES
                 if tally["kill", phase] < f.at_least]
    print("\n".join(problems) or f"all the same after {tally.total()} events: step {found['step']}, "
          f"{len(steps)} lines of metrics, parameters, optimizer, average, data position and tokens")
    return bool(problems)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
