"""What a hierarchy, a head, an optimiser are worth: one corpus, one protocol, cell by cell (docs/findings.md).

    HDLM_DATA=../shared/data python -m tools.grid --list
    HDLM_DATA=../shared/data python -m tools.grid --priority=1 --seeds=0,1 --judge=runs/smollm2

A cell is a recipe of configs/books.py with some settings changed, at one seed: trained, its bound measured on the same
rows as every other's, then the likelihood that samplers have in a few numbers of calls (evaluate.decodings), and
samples judged by the same model. Each writes docs/runs/grid/NAME-sSEED.json (and .npz, nats of every row, for paired
differences); what is there is not made again, what was stopped goes on from its checkpoint, and what a cell that was
made earlier lacks is added while its run is there. Cells of one priority take turns by seed. Tables stand in the
documents between <!-- grid: heads --> and <!-- end -->, a name of `QUESTIONS`; python -m tools.tables writes them.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hdlm_jax.common.console import markdown, measured, say
from hdlm_jax.common.jsons import read_json, read_lines, write_arrays, write_json
from hdlm_jax.config import expand
from hdlm_jax.report.run_files import training_speed
from tools import cli
from tools.speedrun import flops_of

KEPT = cli.ROOT / "docs" / "runs" / "grid"
STEPS, ROWS, DRAWS, CALLS, FEW = 800, 1000, 4, (8, 16, 32, 64), (4, 8, 16)
SAMPLES = 64
TOLD = (4, 8, 16, 32, 64, 128)  # calls of the likelihoods
DECODINGS = (*(f"{name} steps={n}" for n in TOLD for name in ("max_prob", "ancestral")), "any_order order=left")
TOLD_ROWS, TOLD_DRAWS = 128, 2
JUDGED = ("judge", "kind", "retokenised", "texts", "tokens", "perplexity", "perplexity_se", "nats_per_token",
          "unigram_entropy", "distinct_2")  # what a cell keeps of a judge's words


class Cell(NamedTuple):
    """name: of its files; recipe: argument of configs/books.py; more: further settings; priority: 1 is first;
    bound_only: neither samples nor likelihoods are measured; calls: of samples (likelihoods go with CALLS alone)."""

    name: str
    recipe: str
    priority: int = 1
    more: tuple[str, ...] = ()
    bound_only: bool = False
    calls: tuple[int, ...] = CALLS


NO_TIME = ("--config.model.time_conditioning=False",)
WARM_HEAD = ("--config.model.warm_head=True",)
CLIP = ("--config.diffusion.weighting=clip", "--config.diffusion.weight_min=0.0", "--config.diffusion.weight_max=2.0")
OWN = ("--config.hierarchy.embeddings=checkpoint:runs/grid/gidd0-s0",)  # a run that must be there
EMPIRICAL = ("--config.diffusion.weighting=empirical",)  # weighs the mask more than clusters (docs/theory.md)
GPT2 = ("--config.tokenizer.kind=gpt2",)
REPEATS = {name: (f"--config.data.files=('runs/grid/one_of_{n}.jsonl',)",  # every nth chapter (docs/results.md)
                  "--config.tokenizer.file=runs/grid/data/tokenizer.tiktoken")
           for name, n in (("once", 2), ("x4", 8), ("x16", 32))}
LONG = ("--config.train.steps=2000",)  # 8.2M tokens
WIDE = ("--config.model.width=256", "--config.model.heads=8")  # four times the weights of the blocks
RATES = (0.25, 0.5, 2.0, 4.0)  # of words to clusters, that of clusters to the mask being 1
COUNT = ("--config.train.objective=count", "--config.diffusion.weighting=none")
SPEEDRUN = ("--config.train.batch_size=16", "--config.train.steps=960", "--config.optimizer.warmup=40")
DECODER = (*NO_TIME, "--config.model.trunk=decoder", "--config.decoder.qk_norm=True")
TIED = ("--config.model.tied=True",)
FLAT = ("--config.model.head=flat", "--config.hierarchy.head_clusters=0")
BLOCK4 = ("--config.model.block=4", *NO_TIME)
TRIALS = {  # one change at a time from the speed run's recipe, 2.0M tokens each (docs/speedrun.md)
    "try": (),
    "try-flat": FLAT,
    "try-n256": ("--config.hierarchy.head_clusters=256",),
    "try-batch8": ("--config.train.batch_size=8", "--config.train.steps=1920", "--config.optimizer.warmup=80"),
    "try-batch32": ("--config.train.batch_size=32", "--config.train.steps=480", "--config.optimizer.warmup=20"),
    "try-final0": ("--config.optimizer.final_lr=0.0",),
    "try-lr1": ("--config.optimizer.lr=1e-3",),
    "try-lr4": ("--config.optimizer.lr=4e-3",),
    "try-muon1": ("--config.optimizer.muon_lr=0.01",),
    "try-muon4": ("--config.optimizer.muon_lr=0.04",),
    "try-decay0": ("--config.optimizer.weight_decay=0.0",),
    "try-decay.1": ("--config.optimizer.weight_decay=0.1",),
    "try-ema": ("--config.optimizer.ema=0.98",),
    "try-constant": ("--config.optimizer.schedule=constant",),
    "try-wsd": ("--config.optimizer.schedule=wsd",),
    "try-constant-ema": ("--config.optimizer.schedule=constant", "--config.optimizer.ema=0.98"),
    "try-notime": NO_TIME,
    "try-warm-head": WARM_HEAD,
    "try-warm-head-flat": (*WARM_HEAD, *FLAT),
    "try-tied": (*FLAT, *TIED),
    "try-decoder": DECODER,
    "try-decoder-flat": (*DECODER, *FLAT),
    "try-decoder-tied": (*DECODER, *FLAT, *TIED),
    "try-block16": ("--config.model.block=16", *NO_TIME),  # block diffusion: what is left of a block is clean
    "try-block4": BLOCK4,
    "try-block4-count": (*BLOCK4, *COUNT),  # the bound's own weights, which are quiet in short blocks
    "try-block4-count-warm-head": (*BLOCK4, *COUNT, *WARM_HEAD),
    "try-block4-count-tied": (*BLOCK4, *COUNT, *FLAT, *TIED),
    "try-block4-wide": (*BLOCK4, "--config.model.width=192", "--config.model.heads=6"),
    "try-complementary": ("--config.train.objective=complementary",),
    "try-count": ("--config.train.objective=count",),
    "try-exact": ("--config.diffusion.weighting=none",),
    "try-exact-count": COUNT,
    "try-wide": ("--config.model.width=192", "--config.model.heads=6"),
    "try-deep": ("--config.model.blocks=6",),
}
SHORT = ("--config.train.steps=300", "--config.optimizer.warmup=50")  # 1.2M tokens
CHANNEL = {"c0": SHORT, **{f"c{c}": (*SHORT, f"--config.diffusion.channel={c}") for c in (0.02, 0.1)}}
CELLS = (
    Cell("ar", "ar-muon"),
    Cell("mdlm", "mdlm-muon"),
    Cell("hdlm", "hdlm-muon"),
    Cell("mdlm-factorised", "mdlm-factorised-muon"),
    Cell("hdlm-factorised", "hdlm-factorised-muon"),
    Cell("shuffled", "shuffled-muon"),
    Cell("hdlm_xi9", "hdlm_xi9-muon"),
    Cell("mdlm-notime", "mdlm-muon", 1, NO_TIME),
    Cell("hdlm-notime", "hdlm-muon", 2, NO_TIME),
    Cell("hdlm_k3", "hdlm_k3-muon", 2),
    Cell("gidd0", "gidd0-muon", 2),
    Cell("mdlm-adamw", "mdlm", 2),
    Cell("hdlm-adamw", "hdlm", 2),
    Cell("hdlm-factorised-adamw", "hdlm-factorised", 2),
    Cell("mdlm-warm", "mdlm-warm-muon", 2),
    Cell("hdlm-warm", "hdlm-warm-muon", 2),
    *(Cell(f"{kind}-warm-head", f"{kind}-warm-muon", 2, WARM_HEAD) for kind in ("mdlm", "hdlm")),
    *(Cell(f"{kind}-tied", f"{kind}-warm-muon", 2, TIED)
      for kind in ("mdlm", "hdlm", "shuffled", "ar", "hdlm_xi9", "hdlm_k3")),
    *(Cell(f"{kind}-notime-tied", f"{kind}-warm-muon", 2, (*NO_TIME, *TIED)) for kind in ("mdlm", "hdlm")),
    *(Cell(f"{kind}-factorised-warm-head", f"{kind}-warm-factorised-muon", 2, WARM_HEAD) for kind in ("mdlm", "hdlm")),
    Cell("shuffled-factorised", "shuffled-factorised-muon", 2),
    Cell("frequency", "hdlm-frequency-muon", 2),
    Cell("brown", "hdlm-brown-muon", 2),
    Cell("learned", "hdlm-learned-muon", 1),
    Cell("learned-factorised", "hdlm-learned-factorised-muon", 2),
    Cell("soft", "hdlm-soft-muon", 3),
    Cell("soft-random", "shuffled-soft-muon", 3),
    *(Cell(f"hdlm-gamma{g}", "hdlm-muon", 3, (f"--config.diffusion.gamma={g}",), True) for g in RATES),
    Cell("hdlm_xi9-count", "hdlm_xi9-muon", 3, COUNT),
    Cell("soft-still", "hdlm-soft-muon", 3, ("--config.hierarchy.map_rate=1e-9",), True),  # the map stays at xi = .9
    Cell("mdlm-clip", "mdlm-warm", 3, CLIP),
    Cell("hdlm-clip", "hdlm-warm", 3, CLIP),
    *(Cell(f"{kind}-clip-own", f"{kind}-warm", 4, (*CLIP, *OWN), True) for kind in ("mdlm", "hdlm")),
    Cell("hdlm-empirical", "hdlm-muon", 3, EMPIRICAL, True),
    *(Cell(f"{name}{n}", f"hdlm{recipe}-muon", 3, (f"--config.hierarchy.clusters=({n},)",)) for n in (16, 256)
      for name, recipe in (("hdlm", ""), ("learned", "-learned"), ("soft", "-soft"))),
    *(Cell(f"{name}-wide", f"{name}-muon", 3, WIDE, True) for name in ("mdlm", "hdlm")),
    Cell("mdlm-gpt2", "mdlm-muon", 3, GPT2),
    Cell("mdlm-gpt2-half", "mdlm-muon", 3, (*GPT2, "--config.train.steps=400")),
    Cell("mdlm-factorised-gpt2", "mdlm-factorised-muon", 3, GPT2),
    Cell("hdlm-factorised-gpt2", "hdlm-factorised-muon", 3, GPT2),
    Cell("mdlm-tied-gpt2-half", "mdlm-warm-muon", 3, (*GPT2, *TIED, "--config.train.steps=400")),
    *(Cell(f"{kind}-factorised-warm-head-gpt2", f"{kind}-warm-factorised-muon", 3, (*GPT2, *WARM_HEAD))
      for kind in ("mdlm", "hdlm")),
    Cell("long-mdlm", "mdlm-warm-factorised-muon", 3, LONG, True),
    Cell("long-block4", "mdlm-warm-factorised-block4-muon", 3, LONG, True),
    *(Cell(f"long-block4{name}", "mdlm-warm-factorised-block4-muon", 3, (*LONG, *more), True) for name, more in (
        ("-wide", WIDE), ("-count", COUNT), ("-count-wide", (*COUNT, *WIDE)))),
    *(Cell(f"{kind}-{name}", f"{kind}-muon", 3, more, True) for name, more in REPEATS.items()
      for kind in ("mdlm", "ar")),
    *(Cell(f"{kind}-x16-dropout", f"{kind}-muon", 3, (*REPEATS["x16"], "--config.model.dropout=0.1"), True)
      for kind in ("mdlm", "ar")),
    *(Cell(f"{kind}-{name}", f"{kind}-muon", 3, more, calls=FEW) for name, more in CHANNEL.items()
      for kind in ("mdlm", "hdlm", "mdlm-warm", "hdlm-warm")),
    Cell("gidd", "gidd-muon", 4),
    Cell("ar-adamw", "ar", 4),
    *(Cell(name, "mdlm-warm-factorised-muon", 3, (*SPEEDRUN, *more), True) for name, more in TRIALS.items()),
    Cell("hdlm-block4-count-tied", "hdlm-warm-muon", 3, (*SPEEDRUN, *BLOCK4, *COUNT, *TIED), True),
    Cell("hdlm-block4-tied", "hdlm-warm-muon", 3, (*SPEEDRUN, *BLOCK4, *TIED), True),
    Cell("hdlm-try-tied", "hdlm-warm-muon", 3, (*SPEEDRUN, *TIED), True),
)
QUESTIONS = {  # a table each: the first cell is what the others are compared with
    "clusters": ("mdlm", "hdlm", "shuffled", "learned", "frequency", "brown", "hdlm16", "learned16", "hdlm256",
                 "learned256", "hdlm_k3", "hdlm-factorised", "learned-factorised"),
    "xi": ("hdlm", "hdlm_xi9", "mdlm"),
    "maps": ("hdlm_xi9-count", "soft-still", "soft", "soft-random", "soft16", "soft256", "hdlm_xi9", "hdlm"),
    "rates": ("hdlm", *(f"hdlm-gamma{g}" for g in RATES), "hdlm-empirical", "mdlm"),
    "sizes": ("mdlm", "hdlm", "mdlm-wide", "hdlm-wide"),
    "heads": ("mdlm", "mdlm-factorised", "hdlm", "hdlm-factorised", "shuffled-factorised"),
    "time": ("mdlm", "mdlm-notime", "hdlm", "hdlm-notime"),
    "optimisers": ("mdlm", "mdlm-adamw", "hdlm", "hdlm-adamw", "hdlm-factorised", "hdlm-factorised-adamw", "ar",
                   "ar-adamw"),
    "starts": ("mdlm-tied", "mdlm", "mdlm-warm", "mdlm-warm-head", "mdlm-factorised-warm-head", "hdlm", "hdlm-warm",
               "hdlm-warm-head", "hdlm-tied", "hdlm-factorised-warm-head", "shuffled", "shuffled-tied",
               "hdlm_xi9-tied", "hdlm_k3-tied", "mdlm-notime-tied", "hdlm-notime-tied", "ar", "ar-tied"),
    "paper": ("mdlm-clip", "hdlm-clip", "mdlm-clip-own", "hdlm-clip-own"),
    "vocabulary": ("mdlm-gpt2-half", "mdlm-factorised-gpt2", "hdlm-factorised-gpt2", "mdlm-gpt2", "mdlm-tied-gpt2-half",
                   "mdlm-factorised-warm-head-gpt2", "hdlm-factorised-warm-head-gpt2"),
    "long": ("long-block4", "long-block4-count", "long-block4-wide", "long-block4-count-wide", "long-mdlm"),
    "recipe": tuple(TRIALS),
    "blocks": ("try-block4-count-tied", "hdlm-block4-count-tied", "hdlm-block4-tied", "try-tied", "hdlm-try-tied"),
    "repeats": tuple(f"{kind}-{name}" for name in (*reversed(REPEATS), "x16-dropout") for kind in ("mdlm", "ar")),
    "field": ("mdlm", "mdlm-factorised", "mdlm-tied", "hdlm", "hdlm-factorised", "hdlm-tied", "ar", "ar-tied"),
    "channel": tuple(f"{kind}-{name}" for kind in ("mdlm", "hdlm", "mdlm-warm", "hdlm-warm") for name in CHANNEL),
    "processes": ("mdlm", "ar", "gidd0", "gidd", "hdlm"),
}
EQUAL_TIME = ("vocabulary",)
PARTS = ("discrete", "continuous")
IN_PARTS = ("channel",)  # a bound of symbols and observations: both are told (docs/continuous.md)


def chosen(names: Sequence[str], priority: int) -> list[Cell]:
    """Cells by name, or all up to a priority, the first first."""
    known = {cell.name: cell for cell in CELLS}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--cells={','.join(unknown)}: choose among {', '.join(known)}")
    return [known[name] for name in names] or sorted((c for c in CELLS if c.priority <= priority),
                                                     key=lambda cell: cell.priority)


def data_of(cell: Cell) -> str:
    """The folder of a cell's prepared text."""
    own = {GPT2[0]: "data-gpt2"} | {more[0]: f"data-{name}" for name, more in REPEATS.items()}
    return next((own[setting] for setting in cell.more if setting in own), "data")


def commands(cell: Cell, seed: int, runs: Path, steps: int, judge: str) -> list[list[str]]:
    """What makes a cell, one after the other."""
    workdir, data = str(runs / f"{cell.name}-s{seed}"), runs / data_of(cell)
    recipe = f"books:{cell.recipe}" + f"-s{seed}" * bool(seed)
    main = [sys.executable, "-m", "hdlm_jax.main", f"--config={recipe}", f"--workdir={workdir}",
            f"--config.data.dir={data}", f"--config.train.steps={steps}", f"--config.evaluate.rows={ROWS}",
            f"--config.evaluate.draws={DRAWS}", *cell.more]
    sweep = [sys.executable, "-m", "tools.sampling_sweep", workdir, f"--judge={judge}", "--checkpoint=latest",
             f"--steps={','.join(map(str, cell.calls))}", f"--num_samples={SAMPLES}", "--force_transition=cavity",
             "--clusters=exact"]
    sampled = judge and cell.recipe[:2] != "ar" and not cell.bound_only
    return [[*main, "--mode=train"], [*main, "--mode=evaluate"], *[sweep] * bool(sampled),
            *likelihood_commands(cell, workdir)]


def decodings(cell: Cell) -> tuple[str, ...]:
    """What is measured: of a cell with one level of clusters in a call for every drop as well, which is 2 x 128."""
    levels = {"hdlm", "shuffled", "frequency", "brown"} & set(cell.recipe.split("-"))
    return (*DECODINGS, *["max_prob steps=256"] * bool(levels))


def likelihood_commands(cell: Cell, workdir: str) -> list[list[str]]:
    """What measures a trained cell under samplers; nothing where that is not known (it does not unmask, xi < 1)."""
    unknown = {"ar", "gidd", "gidd0", "hdlm_xi9", "soft"} & set(cell.recipe.split("-"))
    if cell.bound_only or cell.calls != CALLS or unknown:
        return []
    return [[sys.executable, "-m", "hdlm_jax.main", f"--workdir={workdir}", "--mode=evaluate",
             f"--config.evaluate.rows={TOLD_ROWS}", f"--config.evaluate.draws={TOLD_DRAWS}",
             f"--config.evaluate.decodings={','.join(decodings(cell))}"]]


def make(cell: Cell, seed: int, runs: Path, out: Path, steps: int, judge: str) -> None:
    """Trains, measures and keeps one cell; what went wrong is said and leaves the others to go on."""
    kept = out / f"{cell.name}-s{seed}.json"
    todo, commit = commands(cell, seed, runs, steps, judge), cli.commit()
    if kept.exists():
        told = json.loads(kept.read_text()).get("likelihoods", {})
        lacks = not set(decodings(cell)) <= set(told) and (runs / kept.stem).exists()
        todo = likelihood_commands(cell, str(runs / kept.stem)) if lacks else []
        say(f"grid: {kept.stem} is there" + ", but for its likelihoods" * bool(todo))
    for command in todo:
        say(f"grid: {kept.stem}: {' '.join(command[1:])}")
        if code := subprocess.run(command, check=False).returncode:
            say(f"grid: {kept.stem}: exit code {code}, left for the next call")
            return
    if todo:
        keep(cell, seed, runs / kept.stem, out, commit)


def keep(cell: Cell, seed: int, workdir: Path, out: Path, commit: str) -> None:
    """Writes what tables need of a run that is done; commit: of the code that began it."""
    out.mkdir(parents=True, exist_ok=True)
    if (there := out / f"{workdir.name}.json").exists():
        commit = json.loads(there.read_text()).get("commit", commit)  # of its training
    records = read_lines(str(workdir / "metrics.jsonl"))[0]
    found: dict[str, Any] = {"cell": cell.name, "seed": seed, "recipe": cell.recipe, "more": cell.more,
                             "commit": commit, "cpus": os.cpu_count(), "tokens": records[-1]["tokens"],
                             "train_tokens_per_s": training_speed(records),
                             "flops": flops_of(str(workdir)) * records[-1]["tokens"],
                             "evaluate": read_json(str(workdir / "evaluate.json")), "calls": []}
    for line in read_lines(str(workdir / "sampling_sweep.jsonl"))[0]:
        found["calls"].append({"steps": line["sampling"]["steps"], "network_calls": line["sampling"]["network_calls"],
                               "judge": {name: line["judge"].get(name) for name in JUDGED}})
    told = workdir / "likelihoods.json"
    found_all = read_json(str(told))["decodings"] if told.exists() else {}
    measured_all = set(decodings(cell)) <= set(found_all)  # it was not stopped in between
    if measured_all:
        found["likelihoods"] = found_all
    with np.load(workdir / "evaluate_rows.npz") as rows:
        each = np.load(told.with_suffix(".npz")) if measured_all else {}
        write_arrays(out / f"{workdir.name}.npz", {**rows, **{f"told {name}": a for name, a in each.items()}})
    write_json(out / f"{workdir.name}.json", found)


# ---- tables ----------------------------------------------------------------------------------------------------------


def load(name: str, out: Path = KEPT) -> list[tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray | None]]:
    """Each seed of a cell: its record, nats [rows], tokens [rows], and residuals [rows] where they were kept."""
    found = []
    for path in sorted(out.glob(f"{name}-s*.json")):
        rows = np.load(path.with_suffix(".npz"))
        found.append((json.loads(path.read_text()), rows["nats"], rows["tokens"], rows.get("residuals")))
    return [one for one in found if one[0]["cell"] == name]


def difference(cell: Sequence[Any], base: Sequence[Any]) -> tuple[float, float, int] | None:
    """NELBO of a cell minus that of another, in nats a token: mean over the seeds that both have, its standard error
    over texts and seeds together (over texts alone of one seed), and how many seeds there were."""
    pairs = [(a, b) for a in cell for b in base if a[0]["seed"] == b[0]["seed"]]
    if not pairs:
        return None
    tokens = pairs[0][0][2]
    if any(not np.array_equal(tokens, one[2]) for pair in pairs for one in pair):
        raise ValueError(f"{pairs[0][0][0]['cell']} and {pairs[0][1][0]['cell']} were measured on other texts")
    apart = np.stack([a[1] - b[1] for a, b in pairs])  # [seeds, rows], nats
    each = apart.sum(1) / tokens.sum()
    residual = apart.mean(0) - each.mean() * tokens
    n = len(residual)
    error = math.sqrt(n / (n - 1) * np.sum(residual**2)) / tokens.sum()
    if all(one[3] is not None for pair in pairs for one in pair):  # without, strata of noise times count as chance
        error = float(np.linalg.norm(np.mean([a[3] - b[3] for a, b in pairs], axis=0)))
    seeds = each.std(ddof=1) / math.sqrt(len(each)) if len(each) > 1 else 0.0
    return float(each.mean()), math.hypot(error, seeds), len(pairs)


def table(question: str, out: Path = KEPT) -> str:
    """Markdown of one of QUESTIONS, of the cells that are there; of EQUAL_TIME with what their training took."""
    if question not in QUESTIONS:
        raise ValueError(f"grid: {question}: choose one of {', '.join(QUESTIONS)}, calls, few_calls, likelihoods")
    names = QUESTIONS[question]
    base = load(names[0], out)
    rows = []
    for name in names:
        if not (cell := load(name, out)):
            continue
        each = ", ".join(f"{one[0]['evaluate']['nelbo']:.3f}" for one in cell)
        e = [one[0]["evaluate"] for one in cell]
        apart = difference(cell, base) if name != names[0] else None
        shared = f", {apart[2]} paired" if apart and apart[2] != len(cell) else ""
        rows.append([name, f"{np.mean([a['nelbo'] for a in e]):.4f}", each,
                     measured(apart[0], apart[1], "+.4f") if apart else "",
                     f"{len(cell)}{shared}",
                     " → ".join(map(str, e[0]["hierarchy"])), f"{e[0]['params']:,}"])
        if question in EQUAL_TIME:
            names_of = "tokens", "train_tokens_per_s", "flops"
            tokens, speed, flops = (np.mean([one[0][key] for one in cell]) for key in names_of)
            rows[-1] += [f"{tokens / 1e6:.2f}M", f"{flops:.1e}", f"{speed:,.0f}", f"{tokens / speed:.0f}"]
        if question in IN_PARTS:
            rows[-1] += [f"{np.mean([a[part] for a in e]):.3f}" if part in e[0] else "" for part in PARTS]
    head = ["", "nats/token", "each seed", f"minus {names[0]}, paired", "seeds", "levels", "parameters"]
    return markdown(head + ["tokens", "FLOPs", "tokens/s", "seconds"] * (question in EQUAL_TIME)
                    + [*PARTS] * (question in IN_PARTS), rows)


def calls_table(out: Path = KEPT, calls: tuple[int, ...] = CALLS) -> str:
    """Markdown: generative perplexity and entropy of every cell that is sampled in these calls, seeds averaged; ± is
    of the samples of one seed, or between seeds, each with samples of its own."""
    rows = []
    for cell in (cell for cell in CELLS if cell.calls == calls):
        lines = [line for one in load(cell.name, out) for line in one[0]["calls"]]
        if not lines:
            continue
        row = [cell.name]
        for steps in calls:
            here = [line["judge"] for line in lines if line["steps"] == steps]
            perplexity, se, entropy, distinct = ([judge[key] for judge in here] for key in (
                "perplexity", "perplexity_se", "unigram_entropy", "distinct_2"))
            error = np.std(perplexity, ddof=1) / math.sqrt(len(here)) if len(here) > 1 else np.mean(se or [0.0])
            row.append(f"{np.mean(perplexity):.0f} ± {error:.0f} / {np.mean(entropy):.2f} / {np.mean(distinct):.2f}"
                       if here else "")
        rows.append(row)
    return markdown(["perplexity / entropy / distinct-2", *(f"{n} steps" for n in calls)], rows)


def likelihoods_table(out: Path = KEPT) -> str:
    """Markdown: nats a token that samplers have, by calls, seeds averaged; ± is of the first seed's texts."""
    rows = []
    for cell in CELLS:
        told = [one[0]["likelihoods"] for one in load(cell.name, out) if "likelihoods" in one[0]]
        for name in ("max_prob", "ancestral") if told else ():
            row = [cell.name, name + " (≤)" * (name == "ancestral")]
            for calls in (*TOLD, 256):
                here = [one[f"{name} steps={calls}"] for one in told if f"{name} steps={calls}" in one]
                row.append(measured(np.mean([one["nats"] for one in here]), here[0]["se"], ".3f") if here else "")
            rows.append(row)
    return markdown(["", "-log p under", *(f"{n} calls" for n in (*TOLD, 256))], rows)


def main(argv: Sequence[str] | None = None) -> None:
    with cli.one_line("grid"):
        ask = cli.Parser("grid", __doc__)
        ask.add_argument("--list", action="store_true", help="say what there is and what is done, and make nothing")
        ask.add_argument("--cells", type=cli.listed(str), default=[], metavar="LIST", help="these alone")
        ask.add_argument("--priority", type=cli.at_least(1), default=1, help="cells up to this priority")
        ask.add_argument("--bound_only", action="store_true", help="neither samples nor likelihoods this time")
        ask.add_argument("--seeds", type=cli.listed(int), default=[0, 1], metavar="LIST")
        ask.add_argument("--steps", type=cli.at_least(1), default=STEPS)
        ask.add_argument("--runs", type=expand, default="runs/grid", help="workdirs")
        ask.add_argument("--out", type=Path, default=KEPT, help="results")
        ask.add_argument("--judge", type=expand, default="", help="folder of a GPT-2, or workdir of a run")
        given = ask.parse_args(argv)
        cells = [cell._replace(bound_only=cell.bound_only or given.bound_only)
                 for cell in chosen(given.cells, given.priority)]
        todo = [(cell, seed) for seed in given.seeds for cell in cells]
        for cell, seed in sorted(todo, key=lambda one: (one[0].priority, one[1])):
            if given.list:
                done = (given.out / f"{cell.name}-s{seed}.json").exists()
                print(f"{'done' if done else 'open'}  {cell.priority}  {cell.name}-s{seed}  books:{cell.recipe} "
                      f"{' '.join(cell.more)}".rstrip())
            else:
                make(cell, seed, Path(given.runs), given.out, given.steps, given.judge)


if __name__ == "__main__":
    main()
