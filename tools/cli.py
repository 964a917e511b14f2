"""Command lines of the tools: argparse, and one line for what a user can mend."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

from absl import flags

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent


class Parser(argparse.ArgumentParser):
    """Names are not abbreviated, what is wrong is a ValueError, and the help begins with the tool's docstring."""

    def __init__(self, name: str, text: str | None):
        super().__init__(prog=f"python -m tools.{name}", description=text, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def listed(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Type of an argument of several values with commas between them."""
    def read(text: str) -> list[T]:
        return [kind(part) for part in text.split(",")]

    read.__name__ = f"list of {kind.__name__}"  # in argparse's messages
    return read


def at_least(least: int) -> Callable[[str], int]:
    """Type of a whole number that is not below `least`."""
    def read(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return int(text)

    read.__name__ = "int"
    return read


def commit() -> str:
    """The commit that is checked out, short, -dirty if its code has been changed; "" where there is none."""
    def git(*asked: str) -> str:
        return subprocess.run(["git", *asked], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("diff", "--name-only", "HEAD", "--", "hdlm_jax", "configs", "tools")
    return git("rev-parse", "--short", "HEAD") + "-dirty" * bool(changed)


@contextlib.contextmanager
def one_line(name: str) -> Iterator[None]:
    """Ends the program with one line and exit code 1 on errors that a user can mend; HDLM_TRACEBACK=1 shows where."""
    try:
        yield
    except (ValueError, OSError, flags.Error) as error:
        if os.environ.get("HDLM_TRACEBACK"):
            raise
        raise SystemExit(f"{name}: {' '.join(str(error).split())}") from error
