"""A picture of images and what a run writes for them: the first validation images of a run of configs/digits.py.

    python -m tools.features runs/digits [--out=docs/pictures/digits.png] [--images=40]

Green is right, red is not. Needs matplotlib (pip install 'hdlm_jax[plots]').
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hdlm_jax.common.extras import package
from hdlm_jax.data.examples import image_of
from hdlm_jax.evaluation.conditional import write
from hdlm_jax.training.loading import load_here
from tools import cli

COLUMNS = 10


def draw(images: np.ndarray, right: Sequence[str], written: Sequence[str], path: Path) -> None:
    """Images [n, height, width] in [0, 1] in rows of COLUMNS, below each what was written."""
    plt = package("matplotlib.pyplot", "plots", "tools.features")
    rows = -(-len(images) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(COLUMNS * 0.85, rows * 1.1), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, name, text in zip(axes.flat, images, right, written, strict=False):
        axis.imshow(image, cmap="gray_r", vmin=0, vmax=1)
        axis.set_title(text or "(nothing)", y=-0.34, fontsize=9, color="#1a7f37" if text == name else "#c1121f")
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.Parser("features", __doc__)
    parser.add_argument("run", help="workdir")
    parser.add_argument("--out", default="docs/pictures/digits.png")
    parser.add_argument("--images", type=int, default=40)
    with cli.one_line("features"):
        picture(parser.parse_args(argv))


def picture(args: argparse.Namespace) -> None:
    run = load_here(args.run, "latest")
    rows = run.valid_rows(run.config.model.seq_len, args.images)
    found = write(run, rows, dataclasses.replace(run.config.generate, num_samples=args.images))
    draw(np.stack([image_of(f, 2) for f in rows["features"]]), found.text, found.written, Path(args.out))
    print(f"features: {args.out}, {sum(a == b for a, b in zip(found.text, found.written, strict=True))} of "
          f"{len(found.text)} are right")


if __name__ == "__main__":
    main(sys.argv[1:])
