"""A picture of who imports whom in hdlm_jax, from the syntax trees: rooms from the ground up, files with their lines.

    python -m tools.imports docs/pictures/imports.png [--commit=a11c7d7]

Grey arcs go from a room down to one it imports from, with the number of imports between files; red ones on the left go
up, against the order. Red lines between files are imports that are part of a circle, red files those that are in one.
"""

from __future__ import annotations

import ast
import io
import subprocess
import tarfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tools import cli

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Rectangle

PACKAGE = "hdlm_jax"
# from the ground up: a room imports from itself and from those before it
ROOMS = ("config", "common", "diffusion", "models", "data", "training", "decoding", "evaluation", "tuning", "runs",
         "report", "library", "api", "main")
WIDTH, COLUMNS = 1.62, 7  # of a file's box, in inches; boxes in a row
Place = tuple[float, float]


# ---- the graph -------------------------------------------------------------------------------------------------------


def sources(root: Path, commit: str = "") -> dict[str, str]:
    """Module name -> text of its file, of the working tree or of a commit; the package's own __init__ is left out."""
    if commit:
        packed = subprocess.run(["git", "archive", commit, PACKAGE], cwd=root, capture_output=True, check=False)
        if packed.returncode:
            raise ValueError(f"--commit={commit}: {packed.stderr.decode().strip()}")
        with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as files:
            found = {name: files.extractfile(name) for name in files.getnames() if name.endswith(".py")}
            texts = {Path(name): file.read().decode() for name, file in found.items() if file}
    else:
        texts = {path.relative_to(root): path.read_text(encoding="utf-8") for path in (root / PACKAGE).rglob("*.py")}
    names = {path: ".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in sorted(texts)}
    return {name: texts[path] for path, name in names.items() if name != PACKAGE}


def imported(tree: ast.AST, known: Collection[str]) -> set[str]:
    """Modules of ours that a tree imports, wherever it does."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {module if module in known else node.module for module in inner}
    return names & set(known)


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other."""
    reach = {name: {name} for name in edges}
    changed = True
    while changed:
        changed = False
        for name, targets in edges.items():
            more = set().union(reach[name], *(reach[t] for t in targets))
            changed |= more != reach[name]
            reach[name] = more
    groups = {tuple(sorted(b for b in edges if b in reach[a] and a in reach[b])) for a in edges}
    return sorted(list(group) for group in groups if len(group) > 1)


def room(module: str) -> str:
    return module.split(".")[1]


def graph(texts: Mapping[str, str]) -> dict[str, set[str]]:
    """Module -> those it imports; a room's __init__ goes by the room's name, and is left out where it holds no code."""
    trees = {name: ast.parse(text) for name, text in texts.items()}
    trees = {name: tree for name, tree in trees.items() if len(tree.body) > 1}
    return {name: imported(tree, trees) - {name} for name, tree in trees.items()}


def between(edges: Mapping[str, set[str]]) -> Counter[tuple[str, str]]:
    """(room, room it imports from) -> number of imports between their files."""
    return Counter((room(a), room(b)) for a, targets in edges.items() for b in targets if room(a) != room(b))


def ordered(rooms: Collection[str], counts: Mapping[tuple[str, str], int]) -> list[str]:
    """Rooms from the ground up: in the house's order; where others are among them, with the fewest imports up."""
    if set(rooms) <= set(ROOMS):
        return [name for name in ROOMS if name in rooms]

    @cache
    def best(laid: frozenset[str]) -> tuple[int, tuple[str, ...]]:
        """The fewest imports upwards among rooms that are laid first, and their order."""
        return min(((below[0] + sum(counts.get((b, last), 0) for b in laid), (*below[1], last))
                    for last in sorted(laid) for below in [best(laid - {last})]), default=(0, ()))

    return list(best(frozenset(rooms))[1])


# ---- the picture -----------------------------------------------------------------------------------------------------


def draw(path: str, texts: Mapping[str, str], title: str) -> None:
    """Writes the picture of some files, module name -> text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    edges = graph(texts)
    counts, inside = between(edges), {name: group for group in map(tuple, circles(edges)) for name in group}
    order = ordered({room(name) for name in edges}, counts)
    lines = {name: texts[name].count("\n") for name in edges}
    bands, places, top = _laid_out(order, edges, inside)
    deepest = max((abs(order.index(a) - order.index(b)) for a, b in counts), default=1)
    side = 0.62 * deepest
    up = any(order.index(a) < order.index(b) for a, b in counts)
    left, right = (side if up else 0.1), COLUMNS * WIDTH + side
    fig, ax = plt.subplots(figsize=(left + right + 0.4, top + 1.1))
    boxes: dict[str, Rectangle] = {}
    for name in order:
        boxes |= _room(ax, name, bands[name], [n for n in edges if room(n) == name], places, lines, inside)
    for (a, b), count in counts.items():
        _arc(ax, bands[a], bands[b], order.index(a) - order.index(b), count, max(counts.values()))
    red = [(a, b) for a, targets in edges.items() for b in targets if a in inside and inside.get(b) == inside[a]]
    for a, b in red:
        ax.annotate("", places[b], places[a], zorder=3, arrowprops={
            "arrowstyle": "-|>", "color": "#c62828", "alpha": 0.7, "lw": 0.9, "shrinkA": 1, "shrinkB": 1,
            "patchA": boxes[a], "patchB": boxes[b], "connectionstyle": "arc3,rad=0.16"})
    said = (f"{len(edges)} files, {sum(lines.values()):,} lines, {sum(map(len, edges.values()))} imports between them; "
            + (f"red: {len(inside)} files that import each other in circles" if red else "no circles"))
    ax.text(0, top + 0.62, title, fontsize=17, weight="bold", va="center")
    ax.text(0, top + 0.27, said, fontsize=11.5, color="#444", va="center")
    ax.set(xlim=(-left - 0.1, right + 0.2), ylim=(-0.15, top + 0.95))
    ax.set_aspect("equal")
    ax.axis("off")
    fig.savefig(path, dpi=110, bbox_inches="tight", facecolor="white")
    plt.close(fig)
    with Image.open(path) as image:  # a few colours: a fifth of the size
        image.convert("RGB").quantize(48).save(path, optimize=True)


def _laid_out(order: Sequence[str], names: Collection[str],
              inside: Collection[str]) -> tuple[dict[str, Place], dict[str, Place], float]:
    """(bottom, height) of each room's band, the middle of each file's box, and the height of all; in inches."""
    bands: dict[str, Place] = {}
    places: dict[str, Place] = {}
    y = 0.0
    for name in order:
        mine = sorted(n for n in names if room(n) == name)
        step = 0.72 if any(n in inside for n in mine) else 0.42  # room for red lines
        height = step * -(-len(mine) // COLUMNS) + 0.42
        for i, module in enumerate(mine):
            down, along = divmod(i, COLUMNS)
            places[module] = ((along + 0.5) * WIDTH, y + height - 0.35 - step * (down + 0.5))
        bands[name] = (y, height)
        y += height + 0.16
    return bands, places, y


def _room(ax: Axes, name: str, band: Place, files: Sequence[str], places: Mapping[str, Place],
          lines: Mapping[str, int], inside: Collection[str]) -> dict[str, Rectangle]:
    """A room's band with its name and a box for each file, filled as far as its lines reach to the longest file's."""
    boxes = {}
    from matplotlib.patches import FancyBboxPatch, Rectangle

    y, height = band
    ax.add_patch(FancyBboxPatch((0, y), COLUMNS * WIDTH, height, boxstyle="round,pad=0,rounding_size=0.08",
                                fc="#eef2f7", ec="#9fb0c3", lw=1))
    ax.text(0.09, y + height - 0.18, name, fontsize=12.5, weight="bold", va="center")
    ax.text(COLUMNS * WIDTH - 0.09, y + height - 0.18, f"{sum(lines[n] for n in files):,} lines", fontsize=9.5,
            color="#555", va="center", ha="right")
    for module in files:
        (x, mid), wide, red = places[module], WIDTH - 0.12, module in inside
        ax.add_patch(Rectangle((x - wide / 2, mid - 0.16), wide * lines[module] / max(lines.values()), 0.32,
                               fc="#f3c4c0" if red else "#c3d5ea", ec="none", zorder=2))
        boxes[module] = Rectangle((x - wide / 2, mid - 0.16), wide, 0.32, fc="none", lw=0.9, zorder=4,
                                  ec="#c62828" if red else "#6d86a3")
        ax.add_patch(boxes[module])
        own = module.split(".")[-1] if module.count(".") > 1 or len(files) == 1 else "__init__"
        ax.text(x - wide / 2 + 0.06, mid, own, fontsize=8.5 if len(own) < 14 else 7.3, va="center", zorder=5)
        ax.text(x + wide / 2 - 0.05, mid, str(lines[module]), fontsize=7.5, va="center", ha="right", color="#444",
                zorder=5)
    return boxes


def _arc(ax: Axes, start: Place, end: Place, down: int, count: int, most: int) -> None:
    """An arc between two rooms with the number of imports: on the right `down` rooms down, or up on the left in red."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Line

    colour, sign, x = ("#8795a6", 1, COLUMNS * WIDTH) if down > 0 else ("#c62828", -1, 0.0)
    bulge, ys = sign * 0.62 * abs(down), [y + height / 2 for y, height in (start, end)]
    line = Line([(x, ys[0]), (x + 1.33 * bulge, ys[0]), (x + 1.33 * bulge, ys[1]), (x, ys[1])],
                [Line.MOVETO, Line.CURVE4, Line.CURVE4, Line.CURVE4])
    ax.add_patch(FancyArrowPatch(path=line, arrowstyle="-|>,head_length=5,head_width=2.5", color=colour, fill=False,
                                 lw=0.7 + 3.5 * count / most, alpha=0.75, zorder=1))
    ax.text(x + bulge, sum(ys) / 2, str(count), fontsize=8.5, ha="center", va="center", zorder=6, color="black",
            bbox={"boxstyle": "round,pad=0.12", "fc": "white", "ec": colour, "lw": 0.6})


def main(argv: Sequence[str] | None = None) -> None:
    with cli.one_line("imports"):
        ask = cli.Parser("imports", __doc__)
        ask.add_argument("picture", help="the file to write, .png, .svg or .pdf")
        ask.add_argument("--commit", default="", help="a commit in place of the working tree")
        given = ask.parse_args(argv)
        texts = sources(cli.ROOT, given.commit)
        draw(given.picture, texts, PACKAGE + (f" at {given.commit}" if given.commit else ""))


if __name__ == "__main__":
    main()
