"""Whether a run hears the features in front of its texts, and a picture of what it writes for images.

    python -m tools.features runs/digits [--draws=4] [--out=docs/pictures/digits.png] [--images=40]

Prints the NELBO of the validation texts given their own features, and given those of the record half the split away
(the next one's may be much the same). With --out= some of the validation images, from all over the split, with what the
run writes for each, green where it is right. A picture needs matplotlib (pip install 'hdlm_jax[plots]').
"""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hdlm_jax.common.extras import package
from hdlm_jax.data.examples import image_of
from hdlm_jax.evaluation.conditional import write
from hdlm_jax.evaluation.elbo import evaluator_of, summarise
from hdlm_jax.training.loading import Run, load_here
from tools import cli

COLUMNS, LETTERS = 10, 15  # of the picture; of a line below an image


def heard(run: Run, draws: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """NELBO, nats/token, and its standard error of the validation texts: given their own features, others'.

    Raises:
      ValueError: the run knows no features.
    """
    if not run.config.data.features_field:
        raise ValueError("this run's texts have no features in front of them (data.features_field)")
    rows, evaluator = run.valid_rows(run.config.model.seq_len), evaluator_of(run)
    found = []
    for by in (0, len(rows["x"]) // 2):
        nats, tau, q = evaluator.nats(run.params, rows | {"features": np.roll(rows["features"], by, axis=0)}, draws)
        told = summarise(nats, rows["tokens"], tau, q)
        found.append((told["nelbo"], told["se"]))
    return found[0], found[1]


def draw(images: np.ndarray, right: Sequence[str], written: Sequence[str], path: Path) -> None:
    """Images [n, height, width] in [0, 1] in rows of COLUMNS, below each what was written."""
    plt = package("matplotlib.pyplot", "plots", "tools.features")
    rows = -(-len(images) // COLUMNS)
    below = [textwrap.fill(text or "(nothing)", LETTERS) for text in written]
    lines = 1 + max(text.count("\n") for text in below)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(COLUMNS * 0.85, rows * (0.95 + 0.12 * lines)), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, name, text, told in zip(axes.flat, images, right, written, below, strict=False):
        axis.imshow(image, cmap="gray_r", vmin=0, vmax=1)
        axis.text(0.5, -0.05, told, transform=axis.transAxes, ha="center", va="top", fontsize=9 if lines == 1 else 6.5,
                  linespacing=0.95, color="#1a7f37" if text == name else "#c1121f")
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.Parser("features", __doc__)
    parser.add_argument("run", help="workdir")
    parser.add_argument("--draws", type=cli.at_least(1), default=4)
    parser.add_argument("--out", default="")
    parser.add_argument("--images", type=cli.at_least(1), default=40)
    with cli.one_line("features"):
        args = parser.parse_args(argv)
        run = load_here(args.run, "latest")
        if args.out:
            check_square(run)
        own, other = heard(run, args.draws)
        print("features: NELBO {:.3f} +- {:.3f} nats/token given its own, {:.3f} +- {:.3f} given another record's"
              .format(*own, *other))
        if args.out:
            picture(run, args.images, Path(args.out))


def check_square(run: Run) -> None:
    """ValueError where the features are no square patches of a square image."""
    shape = (run.config.data.feature_places, run.config.data.feature_width)
    if any(round(n**0.5) ** 2 != n for n in shape):
        raise ValueError(f"--out: features {list(shape)} are no square patches of a square image")


def picture(run: Run, images: int, path: Path) -> None:
    rows, size = run.valid_rows(run.config.model.seq_len), round(run.config.data.feature_width**0.5)
    some = np.linspace(0, len(rows["x"]) - 1, min(images, len(rows["x"]))).astype(int)
    rows = {name: array[some] for name, array in rows.items()}
    found = write(run, rows, dataclasses.replace(run.config.generate, num_samples=len(some)))
    draw(np.stack([image_of(f, size) for f in rows["features"]]), found.text, found.written, path)
    print(f"features: {path}, {sum(a == b for a, b in zip(found.text, found.written, strict=True))} of "
          f"{len(found.text)} are right")


if __name__ == "__main__":
    main(sys.argv[1:])
