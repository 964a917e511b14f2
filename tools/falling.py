"""An animated picture of one text being written: mask, then clusters, then tokens.

    python -m hdlm_jax.main --config=hdlm_tiny --mode=generate --config.generate.length=48   # records trajectories
    python -m tools.falling runs/hdlm_tiny docs/pictures/falling.gif [--sample=0]
    python -m tools.falling runs/hdlm_tiny docs/pictures/falling.png --frames=4           # one below the other

A cluster is shown by its most frequent token; grey boxes are masks. A blank at a token's start is shown as a gap.
"""

from __future__ import annotations

import argparse
import os
import sys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hdlm_jax.data.prepare import token_counts
from hdlm_jax.data.tokenizers import load_tokenizer
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.report.run_files import read_trajectories, show_word
from hdlm_jax.training.loading import data_dir, file_of, saved_config

WIDTH, LINE, CELL, SIZE = 860, 34, 10, 17  # pixels; CELL is the width of a monospaced character of SIZE
INK, CLUSTER, BOX, MASK, PAPER, PALE = "#16222e", "#0b62a8", "#d9ebf9", "#d4d8dc", "white", "#6b7782"


def font(bold: bool = False) -> ImageFont.FreeTypeFont:
    import matplotlib

    name = "DejaVuSansMono-Bold.ttf" if bold else "DejaVuSansMono.ttf"
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name), SIZE)


class Film:
    """One sample's frames as lists of (text, level), and where every position stands on the page."""

    def __init__(self, workdir: str, sample: int):
        found = read_trajectories(workdir)
        if found is None:
            raise ValueError(f"{workdir}: no trajectories.npz; run --mode=generate first")
        self.hierarchy = Hierarchy.load(file_of(workdir, found["about"]["hierarchy_fingerprint"]))
        self.tokenizer = load_tokenizer(os.path.join(workdir, "tokenizer"))
        counts = token_counts(data_dir(saved_config(workdir), workdir))
        self.frequent = [np.arange(self.hierarchy.vocab_size)]  # the most frequent token under every node, by level
        for level in range(1, self.hierarchy.num_levels):
            best = np.zeros(self.hierarchy.sizes[level], int)
            for token in np.argsort(counts, kind="stable"):
                best[self.hierarchy.anc[level][token]] = token
            self.frequent.append(best)
        self.z, self.call, self.time = found["z"][sample], found["call"], found["time"][sample]
        self.places = self._places()

    def text(self, state: int) -> tuple[str, int]:
        """What a state is shown as, and its level."""
        level = int(np.searchsorted(self.hierarchy.offsets, state, side="right")) - 1
        if level == self.hierarchy.num_levels:
            return "", level
        token = int(self.frequent[level][state - self.hierarchy.offsets[level]])
        text = show_word(self.tokenizer.token_bytes(token)).strip() or "↵"
        return text.replace("\\n", "↵") or "↵", level

    def _places(self) -> list[tuple[int, int, int]]:
        """x, y and width in pixels of every position: as wide as the widest text it ever shows, up to 12 characters."""
        x, y, out = 14, 52, []
        for position in range(self.z.shape[1]):
            texts = [self.text(int(state))[0] for state in np.unique(self.z[:, position])]
            width = CELL * min(12, max(2, *map(len, texts))) + 10
            if x + width > WIDTH - 12:
                x, y = 14, y + LINE
            out.append((x, y, width))
            x += width + 5
        return out

    def draw(self, frame: int) -> Image.Image:
        height = self.places[-1][1] + LINE + 10
        image = Image.new("RGB", (WIDTH, height), PAPER)
        pen, plain, bold = ImageDraw.Draw(image), font(), font(bold=True)
        levels = [self.text(int(state))[1] for state in self.z[frame]]
        top = self.hierarchy.num_levels
        said = (f"network call {int(self.call[frame]):3d}   masks {levels.count(top):2d}   "
                f"clusters {sum(0 < level < top for level in levels):2d}   tokens {levels.count(0):2d}")
        pen.text((14, 12), said, fill=PALE, font=plain)
        for state, (x, y, width) in zip(self.z[frame], self.places, strict=True):
            text, level = self.text(int(state))
            if level == top:
                pen.rounded_rectangle((x, y, x + width, y + 25), 5, fill=MASK)
            elif level:
                pen.rounded_rectangle((x, y, x + width, y + 25), 5, fill=BOX)
                pen.text((x + 5, y + 3), text[:12], fill=CLUSTER, font=plain)
            else:
                pen.text((x + 5, y + 3), text[:12], fill=INK, font=bold)
        return image


def main(argv: list[str]) -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("workdir")
    ask.add_argument("out", help="a .gif that moves, or a .png of all frames, one below the other")
    ask.add_argument("--sample", type=int, default=0)
    ask.add_argument("--frames", type=int, default=32, help="of the way, evenly spread")
    given = ask.parse_args(argv)
    film = Film(given.workdir, given.sample)
    pick = np.unique(np.linspace(0, len(film.z) - 1, given.frames).round().astype(int))
    frames = [film.draw(int(i)).quantize(32) for i in pick]
    if given.out.endswith(".png"):
        strip = Image.new("RGB", (WIDTH, sum(frame.height for frame in frames)), PAPER)
        for i, frame in enumerate(frames):
            strip.paste(frame, (0, i * frame.height))
        strip.quantize(32).save(given.out, optimize=True)
        return print(f"falling: {len(frames)} frames in {given.out} ({os.path.getsize(given.out) / 1024:.0f} KiB)")
    times = [900, *[160] * (len(frames) - 2), 3500]
    frames[0].save(given.out, save_all=True, append_images=frames[1:], duration=times, loop=0, optimize=True)
    print(f"falling: {len(frames)} frames in {given.out} ({os.path.getsize(given.out) / 1024:.0f} KiB)")


if __name__ == "__main__":
    main(sys.argv[1:])
