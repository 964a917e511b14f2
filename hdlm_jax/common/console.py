"""What a run says while it works: lines, a progress bar, numbers to read."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence

from tqdm import tqdm

_speaks = True


def mute() -> None:
    """From now on this process says nothing and shows no bars: it is not the first of many."""
    global _speaks
    _speaks = False


def say(text: str) -> None:
    """A line for people; logs go elsewhere."""
    if _speaks:
        print(text, flush=True)


def readable(value: float | None, spec: str = ".4f") -> str:
    """A number to read; '-' where there is none (None) or where it is not finite."""
    if value is None or not math.isfinite(value):
        return "-"
    return format(value, spec if abs(value) < 1e9 else ".3g")


def measured(value: float | None, se: float | None, spec: str = ".4f", sign: str = "±") -> str:
    """'5.1234 ± 0.0123': a number with its standard error, alone where that is not known, '-' where it is not."""
    both = [text for text in (readable(value, spec), readable(se, spec.lstrip("+"))) if text != "-"]
    return f" {sign} ".join(both) if readable(value, spec) != "-" else "-"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its columns aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |" for line in lines)


def perplexity(nats: float) -> float:
    """e^nats of nats a token; infinity where that is no float."""
    return math.inf if nats > 700 else math.exp(nats)


def progress(total: int, initial: int = 0, unit: str = "step", name: str = "") -> tqdm:
    """A tqdm bar with speed and time left; silent under CI and when the output is not a terminal."""
    quiet = not _speaks or bool(os.environ.get("CI")) or not sys.stderr.isatty()
    return tqdm(total=total, initial=initial, unit=unit, desc=name, disable=quiet, dynamic_ncols=True)
