"""Whether a run's probabilities are right: what it says of the next state down, against what the text has there.

    HDLM_DATA=../shared/data python -m tools.calibration runs/mdlm runs/hdlm --out=docs/runs/calibration.json

Validation rows are noised at times t in strata of (0, 1); at every noised token the run gives a distribution over the
states one level down (a cluster where a mask stands, a word where its cluster stands, a word where there are no
clusters), as the sampler draws them. A calibrated one is as often right as its likeliest state's probability says
("calibration error", ECE: the mean distance of the two over 15 bins of probability, Guo et al., arXiv 1706.04599), and
costs its own entropy: nats above it are overconfidence, nats below it too much caution. Needs xi = 1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.common.console import markdown, measured
from hdlm_jax.common.jsons import write_json
from hdlm_jax.common.parallel import Tree
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.models.trunk import Trunk
from hdlm_jax.training.loading import Run, load_here
from tools import cli

BINS, ROWS_AT_ONCE = 15, 16
COLUMNS = ("nats", "entropy", "surest", "right")  # of every token and level, in this order


def checked(run: Run) -> HierarchicalProcess:
    """The run's process; ValueError where its next states are not a distribution over a level of the text's own."""
    config = run.trained
    if not run.process.unmasks or config.diffusion.xi != 1 or config.model.block or config.diffusion.channel:
        raise ValueError(f"diffusion.process={config.diffusion.process!r}, xi={config.diffusion.xi:g}, model.block="
                         f"{config.model.block}, channel={config.diffusion.channel:g}: calibration is of whole rows of "
                         "masks and clusters at xi = 1, without a channel")
    return cast(HierarchicalProcess, run.process)


def make_step(network: Trunk, process: HierarchicalProcess) -> Callable[..., jax.Array]:
    """step(params, x, score, segment, t, key) -> float32 [K, B S, 4]: COLUMNS of each token where it is noised to a
    level k = 1..K, NaN elsewhere. x int32, score bool [B, S]; t [B]."""
    anc = [jnp.asarray(a) for a in process.hierarchy.anc]

    def step(params: Tree, x: jax.Array, score: jax.Array, segment: jax.Array, t: jax.Array, key: jax.Array
             ) -> jax.Array:
        z, level = process.noised(key, x, -jnp.log1p(-t), score)
        p = network.denoise(params, z, t, segment).select(jnp.arange(x.size))
        out = []
        for k in range(1, process.num_levels + 1):
            logs = process.log_probs_below(p, z.reshape(-1), k, k - 1)
            probs, truth = jnp.exp(logs), anc[k - 1][x.reshape(-1)]
            told = jnp.stack([-jnp.take_along_axis(logs, truth[:, None], 1)[:, 0],
                              -jnp.sum(jnp.where(probs > 0, probs * logs, 0.0), -1), jnp.max(probs, -1),
                              (jnp.argmax(logs, -1) == truth).astype(jnp.float32)], -1)
            out.append(jnp.where((level.reshape(-1) == k)[:, None], told, jnp.nan))
        return jnp.stack(out)

    return jax.jit(step)


def reliability(surest: np.ndarray, right: np.ndarray) -> tuple[float, list[list[float]]]:
    """(calibration error, [tokens, mean probability, share right] of each bin that has any), of values [n]."""
    place = np.minimum((surest * BINS).astype(int), BINS - 1)
    bins = [[float((place == i).sum()), float(surest[place == i].mean()), float(right[place == i].mean())]
            for i in range(BINS) if (place == i).any()]
    return sum(n * abs(p - share) for n, p, share in bins) / len(surest), bins


def record(name: str, told: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
    """Of columns [n, 4] of one level and the row [n] of each token; ± of sums over a row (all its draws)."""
    nats, entropy, surest, right = told.T
    each = np.unique(rows, return_inverse=True)[1]
    over, counts = np.bincount(each, nats - entropy), np.bincount(each)
    rest = over - counts * over.sum() / counts.sum()
    spread = np.sqrt(np.sum(rest**2) * len(over) / (len(over) - 1)) / counts.sum()
    error, bins = reliability(surest, right)
    return {"step": name, "tokens": len(nats), "nats": float(nats.mean()), "entropy": float(entropy.mean()),
            "over": float((nats - entropy).mean()), "over_se": float(spread), "surest": float(surest.mean()),
            "right": float(right.mean()), "error": error, "bins": bins}


def measure(workdir: str, rows: int, draws: int) -> dict[str, Any]:
    run = load_here(workdir, "latest")
    process, levels = checked(run), ("word", *(f"cluster of level {k}" for k in range(1, run.hierarchy.num_levels)))
    found = run.valid_rows(run.config.model.seq_len, rows // ROWS_AT_ONCE * ROWS_AT_ONCE)
    x, step, out = found["x"], make_step(run.network, process), []
    rng = np.random.default_rng(0)
    for draw in range(draws):
        t = (rng.permutation(len(x)) + rng.random(len(x))) / len(x)
        for i in range(0, len(x), ROWS_AT_ONCE):
            at = slice(i, i + ROWS_AT_ONCE)
            key = jax.random.fold_in(jax.random.key(draw), i)
            out.append(np.asarray(step(run.params, x[at], found["score"][at], found["segment"][at],
                                       t[at].astype(np.float32), key)))
    told = np.concatenate(out, 1)
    of = np.tile(np.repeat(np.arange(len(x)), x.shape[1]), draws)
    steps = []
    for k, name in enumerate(levels):
        there = ~np.isnan(told[k, :, 0])
        steps.append(record(name, told[k, there], of[there]))
    return {"run": os.path.basename(os.path.normpath(workdir)), "step": run.step, "steps": steps}


def table(found: Mapping[str, Any]) -> str:
    """Of {"runs": [...]}, as `measure` makes them."""
    rows = [[run["run"], s["step"], f"{s['tokens']:,}", f"{s['nats']:.3f}", f"{s['entropy']:.3f}",
             measured(s["over"], s["over_se"], "+.3f"), f"{100 * s['surest']:.1f} %", f"{100 * s['right']:.1f} %",
             f"{100 * s['error']:.1f} %"] for run in found["runs"] for s in run["steps"]]
    return markdown(["run", "draws a", "tokens", "nats", "own entropy", "nats above it", "likeliest: probability",
                     "likeliest: right", "calibration error"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    with cli.one_line("calibration"):
        ask = cli.Parser("calibration", __doc__)
        ask.add_argument("workdir", nargs="+", help="runs")
        ask.add_argument("--rows", type=cli.at_least(2 * ROWS_AT_ONCE), default=256, help="validation rows")
        ask.add_argument("--draws", type=cli.at_least(1), default=2, help="noise times of each row")
        ask.add_argument("--out", type=Path, help="file of the figures as JSON")
        given = ask.parse_args(argv)
        found = {"commit": cli.commit(), "runs": [measure(run, given.rows, given.draws) for run in given.workdir]}
        if given.out:
            write_json(str(given.out), found)
        print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
