"""Parameters as one file that is written and read a tensor at a time (the safetensors format).

A network of billions of weights never lies whole in the memory of a host: what writes it puts one tensor after the
other where it belongs, and what reads it takes the part of each device.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import BinaryIO

import jax
import ml_dtypes
import numpy as np

from hdlm_jax.common.parallel import Tree

TYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
NAMES = {kind: name for name, kind in TYPES.items()}
PARAMS = "model.safetensors"  # in the folder params/ of an import
_MOST_HEADER = 100_000_000  # bytes, as the format says
_AT_ONCE = 1 << 24  # numbers that are converted at once


class Writer:
    """An open file of arrays that are all zeros until `put` fills them, in any order."""

    def __init__(self, file: BinaryIO, arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]]):
        self._file, self._arrays, self._start, end = file, arrays, {}, 0
        header = {}
        for name, (shape, kind) in sorted(arrays.items()):
            self._start[name], end = end, end + math.prod(shape) * kind.itemsize
            header[name] = {"dtype": NAMES[kind], "shape": list(shape), "data_offsets": [self._start[name], end]}
        text = json.dumps(header, allow_nan=False).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        self._data = file.tell()
        file.truncate(self._data + end)

    def put(self, name: str, values: np.ndarray, at: tuple[int, ...] = (), row: int = 0) -> None:
        """Writes rows from `row` on of the array, or of the part of it at these places of its leading axes."""
        shape, kind = self._arrays[name]
        rest = shape[len(at):]
        place = int(np.ravel_multi_index(at, shape[: len(at)])) * math.prod(rest) if at else 0
        place += row * math.prod(rest[1:])
        assert values.shape[1:] == rest[1:] and row + len(values) <= rest[0], (name, values.shape, shape)
        self._file.seek(self._data + self._start[name] + place * kind.itemsize)
        step = max(1, _AT_ONCE // max(1, math.prod(rest[1:])))
        for first in range(0, len(values) if values.size else 0, step):
            self._file.write(np.ascontiguousarray(values[first : first + step], kind).view(np.uint8).data)


@contextmanager
def writing(path: str, arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> Iterator[Writer]:
    """A `Writer` of arrays (shape, dtype float32, float16 or bfloat16) by their names; on disk when it is left."""
    with open(path, "wb") as file:
        yield Writer(file, arrays)
        file.flush()
        os.fsync(file.fileno())


def open_params(path: str) -> dict[str, np.ndarray]:
    """Arrays of a file by name, mapped: nothing is read before it is needed.

    Raises:
      ValueError: no such file, or not whole.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 0 < length <= min(size, _MOST_HEADER) else {}
        entries = {name: (entry["dtype"], tuple(map(int, entry["shape"])), *map(int, entry["data_offsets"]))
                   for name, entry in header.items() if name != "__metadata__"}
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: a damaged file of parameters ({type(error).__name__}: {error})") from None
    for name, (kind, shape, first, last) in entries.items():
        if kind not in TYPES:
            raise ValueError(f"{path}: {name} has dtype {kind}; choose one of {', '.join(TYPES)}")
        if not 0 <= first <= last or last - first != math.prod(shape) * TYPES[kind].itemsize:
            raise ValueError(f"{path}: a damaged file of parameters ({name} is not as large as its shape says)")
    if 8 + length + max((last for *_, last in entries.values()), default=0) != size:
        raise ValueError(f"{path}: a damaged file of parameters (its size is not what its header says)")
    return {name: np.memmap(path, TYPES[kind], "r", 8 + length + first, shape) if last > first else np.zeros(
        shape, TYPES[kind]) for name, (kind, shape, first, last) in entries.items()}


def read_params(path: str, abstract: Tree) -> Tree:
    """Parameters with the shapes, dtypes and places of the tree `abstract`.

    Raises:
      ValueError: arrays missing or of other shapes.
    """
    arrays = open_params(path)

    def one(keys: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = ".".join(str(key.key) for key in keys)
        found = arrays.get(name)
        if found is None or found.shape != leaf.shape:
            raise ValueError(f"{path}: {name} is {None if found is None else found.shape}, must be {leaf.shape}")
        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.make_array_from_callback(leaf.shape, sharding, lambda at: np.asarray(found[at], leaf.dtype))

    return jax.tree_util.tree_map_with_path(one, abstract)
