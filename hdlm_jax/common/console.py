"""What a run says while it works: lines, a progress bar, numbers to read."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from tqdm import tqdm

SHORT = 1.0  # seconds that nobody needs to be told of
_speaks = True


def mute() -> None:
    """From now on this process says nothing and shows no bars: it is not the first of many."""
    global _speaks
    _speaks = False


def say(text: str, aside: bool = False) -> None:
    """A line for people, above a bar that is shown; aside: to stderr, where stdout is for texts. Logs go elsewhere."""
    if _speaks:
        with tqdm.external_write_mode(sys.stdout):
            print(text, flush=True, file=sys.stderr if aside else None)


@contextlib.contextmanager
def compiling(what: str, aside: bool = False) -> Iterator[None]:
    """Says of a wait of more than SHORT seconds that it is one, and at its end how long it was."""
    began = time.monotonic()
    late = threading.Timer(SHORT, say, (f"{what}: compiling (usually 10-60 s)", aside))
    late.daemon = True
    late.start()
    try:
        yield
    finally:
        late.cancel()
    if (lasted := time.monotonic() - began) > SHORT:
        say(f"{what}: compiled in {lasted:.1f} s", aside)


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


def shows_bars() -> bool:
    """Whether progress is a bar: in a terminal, but not under CI."""
    return _speaks and not os.environ.get("CI") and sys.stderr.isatty()


def lasts(seconds: float) -> str:
    """A time to read: 42 s, 3:07, 1:02:00."""
    return tqdm.format_interval(seconds).lstrip("0") if seconds >= 60 else f"{seconds:.0f} s"


def progress(total: int, initial: int = 0, unit: str = "step", name: str = "") -> tqdm:
    """A tqdm bar with speed and time left, silent where `shows_bars` is false; inside another one it goes when done."""
    return tqdm(total=total, initial=initial, unit=unit, desc=name, disable=not shows_bars(), dynamic_ncols=True,
                leave=None)
