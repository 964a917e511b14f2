"""Values as JSON has them. Everything the package writes as JSON goes through here, so that every JSON reader reads it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """The same of dictionaries, lists, texts and numbers alone; None for a number that is not finite: JSON has none.

    Raises:
      TypeError: something else is in it.
    """
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if hasattr(value, "__array__"):  # of numpy or JAX
        return plain(np.asarray(value).tolist())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def dumps(value: Any, **how: Any) -> str:
    """json.dumps of `plain(value)`; how: its other arguments."""
    return json.dumps(plain(value), allow_nan=False, **how)


def write_json(path: str, value: Any) -> None:
    """Writes aside and renames, so that the file is never half there."""
    write_atomic(Path(path), f"{dumps(value, indent=1)}\n".encode())


def reuse(path: str, made_from: dict) -> dict | None:
    """A result written by write_json, if it is there and was made from the same things."""
    if not os.path.exists(path):
        return None
    found = read_json(path)
    return found if all(found.get(k) == plain(v) for k, v in made_from.items()) else None


def read_json(path: str | os.PathLike) -> Any:
    """The value in a JSON file. ValueError, with the file's name, where it holds none; FileNotFoundError."""
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def sha256_of(path: str | os.PathLike) -> str:
    """sha256 (hex) of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def temporary(path: Path) -> Path:
    """A name beside `path` that only this process uses, on any host."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def write_atomic(path: Path, raw: bytes) -> None:
    """Writes a small file whole or not at all (temporary name, then os.replace), also where the power fails."""
    aside = temporary(path)
    try:
        with open(aside, "wb") as f:
            f.write(raw)
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
