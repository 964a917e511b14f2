"""Scaling laws by equal compute: which size is best for a budget of FLOPs, and how the loss falls with the budget.

    HDLM_DATA=../shared/data python -m tools.isoflop --budgets=1e12,3e12,1e13 --kinds=ar,mdlm,hdlm
    python -m tools.isoflop --budgets=1e17,1e18,1e19 --sizes=256x6,512x8,768x12,1024x16 --batch=256   # a GPU
    python -m tools.isoflop --picture=docs/pictures/isoflop.png     # of what is there; --list says what is open

A run is a recipe of configs/books.py (--recipe=NAME for another file) at one size, trained on as many tokens as the
budget buys, with a schedule of that length; FLOPs are `flops_per_token`'s, head and attention with them. As in SMDM
(arXiv 2410.18514, section 4): for each budget a parabola in log N, its lowest point the best size; over budgets the
power laws N ~ C^a and loss ~ C^-b. N is the parameters of the blocks' matrices (no embeddings, no head), 12 blocks
width^2. Errors are of the texts measured on, and of seeds where there are several: every loss is drawn anew, by itself
(runs share texts and noise, so that between runs of one seed this is no error of theirs; docs/scale.md).
Each run is a line of --out (docs/runs/isoflop.jsonl); what is there is not made again. The table of it stands in the
documents between <!-- isoflop: FILE --> and <!-- end -->.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hdlm_jax.common.console import markdown, measured, readable, say
from hdlm_jax.common.jsons import dumps, read_json, read_lines
from hdlm_jax.config import expand, recipe, resolve
from hdlm_jax.models.make import flops_per_token
from hdlm_jax.training.state import build
from tools import cli
from tools.plan import balanced

KEPT = cli.ROOT / "docs" / "runs" / "isoflop.jsonl"
KINDS = ("ar", "mdlm", "hdlm")
SIZES = ("32x2", "64x2", "96x3", "128x4")
LEAST_STEPS = 40  # fewer say nothing of a size
COLOURS = ("#16222e", "#0b62a8", "#c2571a", "#3d8f4f", "#7a4fa3")


class Fit(NamedTuple):
    """Of one kind and budget: where its parabola is lowest (nan: nowhere), and how low."""

    best: float  # N
    loss: float


def settings(kind: str, size: str, budget: float, seed: int, batch: int, book: str = "books") -> dict[str, Any]:
    """Settings of a run by their names in a config, train.steps such that its FLOPs are the budget's."""
    try:
        width, blocks = (int(part) for part in size.split("x"))
    except ValueError:
        raise ValueError(f"--sizes={size}: give WIDTHxBLOCKS, as 128x4") from None
    found: dict[str, Any] = {"model.width": width, "model.blocks": blocks, "model.heads": max(width // 32, 1),
                             "train.batch_size": batch, "train.seed": seed, "train.evaluate_every": 10**9}
    c = recipe(book, f"{kind}-muon")
    c.update_from_flattened_dict(found)
    config = resolve(c)
    hierarchy = balanced(config)
    flops = flops_per_token(config, hierarchy, build(config, hierarchy)[1])
    steps = round(budget / (flops * batch * config.model.seq_len))
    if steps < LEAST_STEPS:
        raise ValueError(f"--budgets={budget:.3g}: {steps} steps of {batch} rows at {size}; {LEAST_STEPS} are the "
                         "fewest")
    return found | {"train.steps": steps, "optimizer.warmup": max(steps // 20, 10), "checkpoint.every": steps}


def name_of(kind: str, size: str, budget: float, seed: int) -> str:
    return f"{kind}-{size}-{budget:.3g}" + f"-s{seed}" * bool(seed)


def make(name: str, kind: str, given: Mapping[str, Any], runs: Path, rows: int, book: str) -> dict[str, Any]:
    """Trains and measures one run; its line."""
    workdir = str(runs / name)
    main = [sys.executable, "-m", "hdlm_jax.main", f"--workdir={workdir}"]
    flags = [f"--config.{key}={value}" for key, value in given.items()]
    subprocess.run([*main, f"--config={book}:{kind}-muon", *flags, f"--config.data.dir={runs / 'data'}",
                    f"--config.evaluate.rows={rows}", "--config.evaluate.draws=4", "--mode=train"], check=True)
    subprocess.run([*main, "--mode=evaluate"], check=True)
    found, last = read_json(str(Path(workdir, "evaluate.json"))), read_lines(str(Path(workdir, "metrics.jsonl")))[0][-1]
    return {"nelbo": found["nelbo"], "se": found["se"], "params": found["params"], "tokens": last["tokens"]}


# ---- laws ------------------------------------------------------------------------------------------------------------


def parabola(sizes: np.ndarray, losses: np.ndarray) -> Fit:
    """Least squares of losses [n] on log sizes [n]; best is nan where it opens downwards or is lowest outside by more
    than a factor of two, for then the sizes do not hold the best one."""
    x = np.log(sizes)
    a, b, c = np.polyfit(x - x.mean(), losses, 2)
    at = x.mean() - b / (2 * a) if a > 0 else math.nan
    if not (x.min() - math.log(2) <= at <= x.max() + math.log(2)):
        return Fit(math.nan, float(losses.min()))
    return Fit(math.exp(at), float(c - b * b / (4 * a)))


def power(budgets: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """(exponent, log of the factor) of values ~ budgets^exponent over those that are finite; nan of fewer than two."""
    at = [(math.log(c), math.log(v)) for c, v in zip(budgets, values, strict=True) if math.isfinite(v)]
    if len(at) < 2:
        return math.nan, math.nan
    slope, offset = np.polyfit([c for c, _ in at], [v for _, v in at], 1)
    return float(slope), float(offset)


def laws(lines: Sequence[Mapping[str, Any]], draw: np.random.Generator | None = None) -> dict[str, Any]:
    """Fits of each kind: {kind: {"fits": {budget: Fit}, "size": a, "loss": -b, "at": log factor of the loss}}; with a
    generator, of losses drawn anew around those measured (texts) and of seeds drawn anew."""
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(line["kind"] for line in lines):
        fits = {}
        for budget in sorted({line["budget"] for line in lines if line["kind"] == kind}):
            cells: dict[int, list[tuple[float, float]]] = {}
            for line in lines:
                if (line["kind"], line["budget"]) == (kind, budget):
                    cells.setdefault(line["n"], []).append((line["nelbo"], line["se"]))
            if len(cells) < 3:
                continue
            losses = []
            for seeds in cells.values():
                drawn = seeds if draw is None else [seeds[i] for i in draw.integers(len(seeds), size=len(seeds))]
                losses.append(np.mean([loss + (0 if draw is None else error * draw.normal()) for loss, error in drawn]))
            fits[budget] = parabola(np.array(list(cells), float), np.array(losses))
        slope, offset = power(list(fits), [fit.loss for fit in fits.values()])
        found[kind] = {"fits": fits, "size": power(list(fits), [fit.best for fit in fits.values()])[0], "loss": slope,
                       "at": offset}
    return found


def compute_for(kind: Mapping[str, Any], loss: float, budget: float) -> float:
    """How many times `budget` a kind needs for a loss, by its power law."""
    return math.exp((math.log(loss) - kind["at"]) / kind["loss"]) / budget if kind["loss"] < 0 else math.nan


def spread(values: Sequence[float]) -> float:
    """Standard deviation of those that are finite; nan where fewer than half are."""
    finite = [value for value in values if math.isfinite(value)]
    return float(np.std(finite)) if 2 * len(finite) > len(values) else math.nan


def table(lines: Sequence[Mapping[str, Any]], boots: int = 200) -> str:
    """Markdown: best size and loss at each budget (empty where a kind has fewer than three sizes of it), the exponents,
    and the compute for the first kind's loss at its largest budget."""
    draw = np.random.default_rng(0)
    found, drawn = laws(lines), [laws(lines, draw) for _ in range(boots)]
    name, first = next(iter(found.items()))
    if not first["fits"]:
        raise ValueError(f"isoflop: {name} has no budget with three sizes, which a parabola needs; make more runs")
    top, budgets = max(first["fits"]), sorted({budget for law in found.values() for budget in law["fits"]})
    rows = []
    for kind, law in found.items():
        row = [kind]
        for budget in budgets:
            fit, each = law["fits"].get(budget), [one[kind]["fits"].get(budget) for one in drawn]
            row.append(f"{readable(fit.best, '.2g')} / {measured(fit.loss, spread([one.loss for one in each]), '.3f')}"
                       if fit else "")
        for key in ("size", "loss"):
            row.append(_with_error(law[key], spread([one[kind][key] for one in drawn])))
        ratio = compute_for(law, first["fits"][top].loss, top)
        rows.append([*row, "1" if law is first else readable(ratio, ".1f")])
    heads = [f"best N / loss, C = {budget:.3g}" for budget in budgets]
    return markdown(["", *heads, "N ~ C^", "loss ~ C^", f"times the compute for {name}'s loss"], rows)


def _with_error(value: float, error: float) -> str:
    return measured(value, error, ".3f") if math.isfinite(value) and math.isfinite(error) else "not to be had"


def picture(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Parabolas of every kind and budget, and the best losses over budgets."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--picture: matplotlib is missing (pip install hdlm_jax[plots])") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = laws(lines)
    figure, axes = plt.subplots(1, len(found) + 1, figsize=(3.4 * (len(found) + 1), 3.4), layout="constrained")
    for axis, (kind, law), colour in zip(axes, found.items(), COLOURS, strict=False):
        for i, (budget, fit) in enumerate(law["fits"].items()):
            cell = sorted((line["n"], line["nelbo"]) for line in lines
                          if (line["kind"], line["budget"]) == (kind, budget))
            n, loss = np.array(cell).T
            shade = 0.35 + 0.65 * (i + 1) / len(law["fits"])
            axis.plot(n, loss, "o", color=colour, alpha=shade, label=f"C = {budget:.3g}")
            grid = np.geomspace(n.min() / 1.3, n.max() * 1.3, 60)
            curve = np.polyfit(np.log(n), loss, 2)
            axis.plot(grid, np.polyval(curve, np.log(grid)), color=colour, alpha=shade, linewidth=1)
            if math.isfinite(fit.best):
                axis.plot([fit.best], [fit.loss], "*", color=colour, alpha=shade, markersize=11)
        axis.set(xscale="log", title=kind, xlabel="N, parameters of the blocks")
        axis.legend(fontsize=7, frameon=False)
        axes[-1].plot(list(law["fits"]), [fit.loss for fit in law["fits"].values()], "*-", color=colour, label=kind)
    axes[0].set_ylabel("nats a token, exact bound")
    axes[-1].set(xscale="log", xlabel="C, FLOPs", title="at the best size")
    budgets = sorted({line["budget"] for line in lines})
    axes[-1].set_xticks(budgets, [f"{budget:.3g}" for budget in budgets])
    axes[-1].set_xticks([], minor=True)
    axes[-1].legend(fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parser() -> cli.Parser:
    ask = cli.Parser("isoflop", __doc__)
    ask.add_argument("--budgets", type=cli.listed(float), default=[1e12, 3e12, 1e13], metavar="LIST", help="FLOPs")
    ask.add_argument("--kinds", type=cli.listed(str), default=list(KINDS), metavar="LIST", help="of configs/books.py")
    ask.add_argument("--sizes", type=cli.listed(str), default=list(SIZES), metavar="LIST", help="WIDTHxBLOCKS")
    ask.add_argument("--seeds", type=cli.listed(int), default=[0], metavar="LIST")
    ask.add_argument("--batch", type=cli.at_least(1), default=16, help="rows a step")
    ask.add_argument("--rows", type=cli.at_least(2), default=500, help="validation rows measured on")
    ask.add_argument("--recipe", default="books", help="file of configs/ whose arguments the kinds are")
    ask.add_argument("--runs", type=expand, default="runs/isoflop", help="workdirs")
    ask.add_argument("--out", type=Path, default=KEPT, help="lines of results")
    ask.add_argument("--picture", type=Path, help="draw what is there, make nothing")
    ask.add_argument("--list", action="store_true", help="say what there is and what is open, make nothing")
    return ask


def main(argv: Sequence[str] | None = None) -> None:
    with cli.one_line("isoflop"):
        given = parser().parse_args(argv)
        lines = read_lines(str(given.out))[0]
        if given.picture:
            picture(lines, given.picture)
            return
        todo = [(name_of(kind, size, budget, seed), kind, size, budget, seed) for seed in given.seeds
                for budget in sorted(given.budgets) for size in given.sizes for kind in given.kinds]
        plans = {one[0]: settings(*one[1:], given.batch, given.recipe) for one in todo}  # refused before any is trained
        for name, kind, _, budget, seed in todo:
            width, blocks, steps = (plans[name][key] for key in ("model.width", "model.blocks", "train.steps"))
            done = any(line["name"] == name for line in lines)
            say(f"isoflop: {'done' if done else 'open'}  {name}  {steps:,} steps")
            if done or given.list:
                continue
            line = {"name": name, "kind": kind, "n": 12 * blocks * width**2, "budget": budget, "seed": seed,
                    "steps": steps} | make(name, kind, plans[name], Path(given.runs), given.rows, given.recipe)
            given.out.parent.mkdir(parents=True, exist_ok=True)
            with given.out.open("a", encoding="utf-8") as file:
                file.write(dumps(line) + "\n")


if __name__ == "__main__":
    main()
