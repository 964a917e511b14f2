"""How the diagonal sampler of a looped run compares with its sequential text (recurrent depth; docs/decoding.md).

    python -m tools.wavefronts runs/looped [--rows=32] [--given=16] [--temperature=0]
        [--options='inner=2 exit=0 noise=0 wavefront=1,inner=2 wavefront=4'] [--out=docs/runs/wavefronts.json]

Every text goes on from the first tokens of a validation row, sequentially (ancestral) and by each set of options. Of
each: calls; blocks passed one after the other (prelude, iterations of a call times the core, coda); the share of tokens
that are those of the sequential text, how many of these come before the first other one; and the nats a token that the
run itself, with all of its iterations, gives to what was written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hdlm_jax.common.console import markdown
from hdlm_jax.common.jsons import write_json
from hdlm_jax.config import GenerateConfig
from hdlm_jax.decoding import presets
from hdlm_jax.decoding.sampler import sampler_of
from hdlm_jax.evaluation.elbo import evaluator_of
from hdlm_jax.training.loading import Run, load_here
from tools import cli

OPTIONS = ("inner=2 exit=0 noise=0 wavefront=1", "inner=2 exit=0 noise=0", "inner=2 noise=0", "inner=2")


def measured(run: Run, given: argparse.Namespace) -> list[dict[str, str | float]]:
    """A line for the sequential text, and one for each set of options."""
    seq_len, d = run.config.model.seq_len, run.config.decoder
    core = run.config.model.blocks - d.prelude - d.coda
    canvas = np.array(run.valid_rows(seq_len, given.rows)["x"], np.int32)
    canvas[:, given.given :] = run.hierarchy.mask_id
    score = np.broadcast_to(np.arange(seq_len) >= given.given, canvas.shape)
    draw, evaluator, lines = sampler_of(run), evaluator_of(run), []
    first = np.zeros(0)
    for options in ("", *given.options):
        method = "diagonal" if options else "ancestral"
        out = draw(canvas, GenerateConfig(method=method, options=options, temperature=given.temperature,
                                          num_samples=len(canvas), batch_size=len(canvas)))
        x, calls = out["tokens"], float(np.mean(out["row_forwards"]))
        first = first if options else x
        same = (x == first)[:, given.given :]
        rows = {"x": x, "segment": np.zeros_like(x), "score": score}
        cache = presets.make(method, options).cache
        inner = cache.inner if isinstance(cache, presets.Diagonal) else d.loops
        lines.append({"options": options or "sequential", "calls": calls,
                      "blocks": calls * (d.prelude + inner * core + d.coda), "same": float(same.mean()),
                      "same in front": float(np.cumprod(same, axis=1).sum(1).mean()),
                      "nats": float(evaluator.nats(run.params, rows, 1)[0].sum() / score.sum())})
    return lines


def table(lines: Sequence[Mapping[str, str | float]]) -> str:
    """Of the lines of `measured`."""
    return markdown(list(lines[0]), [[f"{v:,.4g}" if isinstance(v, float) and abs(v) < 1000 else f"{v:,.0f}"
                                      if isinstance(v, float) else str(v) for v in line.values()] for line in lines])


def main(argv: Sequence[str] | None = None) -> int:
    with cli.one_line("wavefronts"):
        ask = cli.Parser("wavefronts", __doc__)
        ask.add_argument("workdir", help="a run of decoder.loops")
        ask.add_argument("--rows", type=cli.at_least(1), default=32, help="texts")
        ask.add_argument("--given", type=cli.at_least(1), default=16, help="tokens that they go on from")
        ask.add_argument("--temperature", type=float, default=0.0)
        ask.add_argument("--options", type=cli.listed(str), default=list(OPTIONS), help="of the method, by commas")
        ask.add_argument("--out", type=Path, help="file of the figures as JSON")
        given = ask.parse_args(argv)
        run = load_here(given.workdir)
        if not run.config.decoder.loops:
            raise ValueError(f"{given.workdir}: has no decoder.loops; give a run that loops")
        lines = measured(run, given)
        if given.out:
            write_json(given.out, lines)
        print(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
