"""Features of records: vectors [n, F] that stand in front of a text (docs/conditioning.md).

In a record the field data.features_field is a list of n lists of F numbers, or a NumPy array [n, F] as the bytes of a
.npy file (in JSON, base64 of them). Prepared, every document has P vectors in the file beside its shard, `stem.feat`:
float32, NaN behind its own; P tokens in front of its text keep their places in the rows.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hdlm_jax.config import ConfigError


def encoded(array: np.ndarray) -> str:
    """An array [n, F] as a record of JSON holds it: base64 of a .npy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()


def read(value: object, shape: tuple[int, int]) -> np.ndarray:
    """The vectors of a record, float32 [n, F] with n <= P; shape: (P, F).

    Raises:
      ValueError: why it is none.
    """
    try:
        if isinstance(value, str):
            value = base64.b64decode(value, validate=True)
        if isinstance(value, bytes):
            value = np.load(io.BytesIO(value), allow_pickle=False)
        elif not isinstance(value, list):
            raise ValueError(f"must be lists of numbers or a .npy file, not {type(value).__name__}")
        return _checked(np.asarray(value), shape)
    except (binascii.Error, EOFError) as error:
        raise ValueError(f"is no base64 of a .npy file ({error})") from None


def _checked(found: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    places, width = shape
    found = found.reshape(0, width) if found.size == 0 else found
    if found.dtype.kind not in "fiub" or found.ndim != 2 or found.shape[1] != width:
        raise ValueError(f"has shape {list(found.shape)} of {found.dtype}: must be numbers [n, {width}] "
                         "(data.feature_width)")
    if len(found) > places:
        raise ValueError(f"has {len(found)} vectors: must be at most {places} (data.feature_places)")
    with np.errstate(over="ignore"):  # what is too large for float32 is not finite either
        found = found.astype(np.float32)
    if not np.isfinite(found).all():
        raise ValueError("has numbers that are not finite")
    return found


def padded(features: np.ndarray, places: int) -> np.ndarray:
    """float32 [P, F]: the vectors [n, F], NaN behind them."""
    return np.pad(features, ((0, places - len(features)), (0, 0)), constant_values=np.nan)


def rows_of(given: Sequence[object] | np.ndarray, shape: tuple[int, int], name: str) -> np.ndarray:
    """Features that somebody hands over for some texts, as rows float32 [n, P, F].

    given: array [n, <= P, F], or a sequence of arrays or lists of vectors [<= P, F]; vectors of NaN at the end of one
    are padding.

    Raises:
      ConfigError: they have other shapes; `name` is what to call them.
    """
    if not isinstance(given, np.ndarray | list | tuple) or not len(given):
        raise ConfigError(f"{name}: must be an array [n, {shape[0]}, {shape[1]}], or a list of arrays [n, {shape[1]}]; "
                          "one for each text")
    rows = []
    for i, one in enumerate(given):
        try:
            array = np.asarray(one)
            if array.ndim == 2:  # padding as it comes from rows
                array = array[: int(np.flatnonzero((array == array).any(1)).max(initial=-1)) + 1]
            rows.append(padded(_checked(array, shape), shape[0]))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{name}[{i}]: {error}") from None
    return np.stack(rows)


def read_file(path: str, shape: tuple[int, int], name: str) -> np.ndarray:
    """The rows of a .npy file [n, <= P, F]; ConfigError where it is none."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{name}={path!r}: cannot be read as a .npy file ({error})") from None
    if not isinstance(found, np.ndarray) or found.ndim != 3:
        raise ConfigError(f"{name}={path!r}: must be an array [texts, {shape[0]}, {shape[1]}]")
    return rows_of(found, shape, f"{name}={path!r}")


def map_file(path: str | os.PathLike, shape: tuple[int, int], first: int, count: int) -> np.ndarray:
    """Rows first .. first + count - 1 of a .feat file, mapped: float32 [count, P, F].

    Raises:
      ValueError: it is not there, or shorter.
    """
    try:
        return np.memmap(Path(path), "<f4", "r", 4 * first * shape[0] * shape[1], (count, *shape))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read up to document {first + count:,} ({error}); run --mode=prepare"
                         ) from None
