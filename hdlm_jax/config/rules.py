"""What is wrong with a setting, in one line; paths with ~ and $VARIABLES."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from typing import TypeVar

Path = TypeVar("Path", str, tuple[str, ...])


class ConfigError(ValueError):
    """A setting that cannot work: one line with the value, the rule and the choices."""


def choice(name: str, value: str, choices: Sequence[str], wrong: str = "") -> None:
    """ConfigError with the choices, and the closest one, unless `value` is among them; wrong: in place of name=value"""
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{wrong or f'{name}={value!r}:'} choose one of {', '.join(choices)}{hint}")


def rule(ok: bool, name: str, value: object, rule: str) -> None:
    """ConfigError, "name=value: rule", unless ok."""
    if not ok:
        raise ConfigError(f"{name}={value!r}: {rule}")


def check_local(name: str, folder: str) -> None:
    """ConfigError for a URL where a folder of this machine is written to."""
    rule("://" not in folder, name, folder, "must be a folder of this machine or mounted there (a bucket by its FUSE "
         "driver); only data.files and data.validation take URLs")


def expand(path: Path) -> Path:
    """`path` (or a tuple of paths) with ~ and $VARIABLES expanded, behind `checkpoint:` too; unset ones stay."""
    if isinstance(path, tuple):
        return tuple(map(expand, path))
    prefix = "checkpoint:" if path.startswith("checkpoint:") else ""
    return prefix + os.path.expanduser(os.path.expandvars(path.removeprefix(prefix)))
