"""One line for what is wrong with a setting, and paths as they are meant."""

from __future__ import annotations

import difflib
import os
import typing
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot work: one line with the value, the rule and the choices."""


def choice(name: str, value: str, choices: typing.Sequence[str]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{name}={value!r}: choose one of {', '.join(choices)}{hint}")


def rule(ok: bool, name: str, value: Any, rule: str) -> None:
    if not ok:
        raise ConfigError(f"{name}={value!r}: {rule}")


def check_seed(name: str, value: int, below: int = 2**32) -> None:
    """JAX would keep the lowest 32 bits of a larger one, and say nothing."""
    rule(0 <= value < below, name, value, f"must lie in 0..{below - 1}")


def expand(path: Any) -> Any:
    """`path` (or a tuple of paths) with ~ and $VARIABLES expanded, behind `checkpoint:` too; unset ones stay."""
    if isinstance(path, tuple):
        return tuple(map(expand, path))
    prefix = "checkpoint:" if path.startswith("checkpoint:") else ""
    return prefix + os.path.expanduser(os.path.expandvars(path.removeprefix(prefix)))
