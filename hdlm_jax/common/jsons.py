"""Files that are whole or not there, and values as JSON has them: what the package writes, every JSON reader reads."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import reprlib
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np

Json: TypeAlias = dict[str, Any]  # an object, as JSON calls it


def plain(value: object) -> Any:
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


_REMEDY = "restore the file from a copy, or remove it and make it again"


def dumps(value: object, **how: Any) -> str:
    """json.dumps of `plain(value)`; how: its other arguments."""
    return json.dumps(plain(value), allow_nan=False, **how)


def read_json(path: str | os.PathLike, *needs: str, optional: bool = False) -> Any:
    """The object in a JSON file, a dict that has the keys `needs`; with optional None where there is no file.

    Raises:
      OSError: it cannot be read. ValueError, with the file's name: it holds no such thing.
    """
    if optional and not os.path.exists(path):
        return None
    try:
        found = json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); {_REMEDY}") from None
    missing = [key for key in needs if not isinstance(found, dict) or key not in found]
    if missing or not isinstance(found, dict):
        lacks = f" with {', '.join(map(repr, missing))}" if missing else ""
        raise ValueError(f"{path}: damaged, it must hold a JSON object{lacks}; {_REMEDY}")
    return found


def of_types(path: str | os.PathLike, found: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    """ValueError, with the file's name, where a value that was read is of another type than JSON has for these."""
    for name, kind in kinds.items():
        as_json = list if kind is tuple else (float, int) if kind is float else kind
        if name in found and not isinstance(found[name], as_json):
            raise ValueError(f"{path}: damaged, {name} must be of type {kind.__name__}, is "
                             f"{reprlib.repr(found[name])}; {_REMEDY}")


def read_lines(path: str | os.PathLike, *numbers: str) -> tuple[list[Json], list[int]]:
    """The objects of a file of JSON lines, and the numbers of the lines that are none.

    numbers: keys that each object has, with a number. No file has no lines; a last line that a kill left half written
    counts for nothing.
    """
    records: list[Json] = []
    damaged: list[int] = []
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                found = json.loads(line)
            except ValueError:  # no UTF-8, no JSON
                found = None
            if isinstance(found, dict) and all(isinstance(found.get(key), int | float) for key in numbers):
                records.append(found)
            else:
                damaged += [number] * line.endswith(b"\n")
    return records, damaged


def write_json(path: str | os.PathLike, value: object, indent: int | None = 1) -> None:
    """Writes a value as JSON, whole or not at all."""
    write_atomic(path, f"{dumps(value, indent=indent)}\n".encode())


def write_lines(path: str | os.PathLike, records: Iterable[object]) -> bytes:
    """Writes records as JSON, one a line, whole or not at all; gives back the bytes."""
    raw = "".join(dumps(record) + "\n" for record in records).encode()
    write_atomic(path, raw)
    return raw


def write_arrays(path: str | os.PathLike, arrays: Mapping[str, Any], compressed: bool = False) -> None:
    """Writes arrays by name as a .npz file, whole or not at all."""
    with open_atomic(path) as file:
        (np.savez_compressed if compressed else np.savez)(file, **arrays)


def reuse(path: str | os.PathLike, made_from: Mapping[str, Any]) -> Json | None:
    """A result written by write_json, if it is there and was made from the same things."""
    found = read_json(path, optional=True)
    return found if found is not None and all(found.get(k) == plain(v) for k, v in made_from.items()) else None


def sha256_of(path: str | os.PathLike) -> str:
    """sha256 (hex) of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_sha256(path: str | os.PathLike, found: str, wanted: str) -> None:
    """ValueError where the sha256 (hex) of a file is not the one wanted, if any is."""
    if wanted and found != wanted.lower():
        raise ValueError(f"{path}: sha256 is {found}, must be {wanted}")


def temporary(path: Path) -> Path:
    """A name beside `path` that only this process uses, on any host."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


@contextlib.contextmanager
def named(path: str | os.PathLike) -> Iterator[None]:
    """An OSError of what is written inside (write, flush and fsync know no file) has the name of this one."""
    try:
        yield
    except OSError as error:
        if type(error) is OSError and error.errno is None:  # of numpy: "8 requested and 0 written"
            raise OSError(errno.EIO, f"cannot be written ({error})", str(path)) from error
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def open_atomic(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of `path` at the end; after an error what was there stays.

    Whole or not at all, also where the power fails.
    """
    aside = temporary(Path(path))
    try:
        with named(path), open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def move_into(aside: str, folder: str) -> None:
    """Moves all that lies in the folder `aside` into another of the same disk, in the place of what has its names."""
    for name in os.listdir(aside):
        here = os.path.join(folder, name)
        shutil.rmtree(here) if os.path.isdir(here) else None
        os.replace(os.path.join(aside, name), here)
    os.rmdir(aside)


def write_atomic(path: str | os.PathLike, raw: bytes) -> None:
    """Writes a small file whole or not at all."""
    with open_atomic(path) as file:
        file.write(raw)
