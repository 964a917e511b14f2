"""Sources: the files that documents are read from, local or remote (fsspec), and what tells one from another."""

from __future__ import annotations

import collections
import contextlib
import glob
import io
import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO

from hdlm_jax.common.extras import package
from hdlm_jax.config import expand
from hdlm_jax.data.embedded import EMBEDDED

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from fsspec import AbstractFileSystem

BUFFER = 1 << 18  # bytes
KINDS = {".txt": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".tar": "tar"}
COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst")
_SHORT = {".tgz": ".gz", ".txz": ".xz", ".tbz2": ".bz2", ".tzst": ".zst"}  # tars
_REMOTE_MARKS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated", "mtime", "created")


class Damaged(Exception):
    """The bytes read are not what they should be: no error of disk, network or settings."""


def reason(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text if type(error) in (Damaged, ConnectionError) else f"{type(error).__name__}: {text}"


def suffixes(name: str) -> tuple[str, str]:
    """(kind by the name or '', compression by the name or '')."""
    stem, suffix = os.path.splitext((name.partition("?")[0] if "://" in name else name).lower())
    if suffix in _SHORT:
        return "tar", _SHORT[suffix]
    packed = suffix if suffix in COMPRESSIONS else ""
    return KINDS.get(os.path.splitext(stem)[1] if packed else suffix, ""), packed


def resolve(files: str | Sequence[str], name: str = "data.files", format: str = "auto",
            say: Callable[[str], None] = lambda line: None) -> list[str]:
    """Sources of `files`: patterns in the order given, the files that match each sorted, each file once.

    Args:
      files: paths, folders or globs (`~` and `$VARIABLES` are expanded, `**` goes into folders), or URLs that fsspec
        knows (`s3://...`, `gs://...`, `https://...`); in a URL only * and [ make a pattern, ? is a query. A folder
        stands for the files beneath it whose names are of KINDS, or with a `format` other than auto for all of them;
        hidden files and folders are left out, links to folders not followed.
      name: of the setting, for messages. say: gets a line on what each folder holds.
    Raises:
      ValueError: an empty list, a pattern without a match, a folder without such files, a package that is missing.
    """
    if not files:
        raise ValueError(f"{name} is empty; give paths, folders, globs or URLs of {', '.join(KINDS)} files")
    sources: dict[str, str] = {}
    for pattern in [files] if isinstance(files, str) else files:
        expanded = expand(pattern)
        matches, folder = _remote_matches(expanded) if "://" in expanded else _local_matches(expanded)
        if folder:
            visible = [file for file in matches if "/." not in file.removeprefix(folder)]
            matches = _known(visible, expanded, name, format, say)
        if not matches:
            hint = f" (is {expanded!r}; is the variable set?)" if "$" in expanded else ""
            raise ValueError(f"{name}: no file matches {pattern!r}{hint}")
        for match in matches:
            sources.setdefault(match if "://" in match else os.path.realpath(match), match)
    return list(sources.values())


def _local_matches(pattern: str) -> tuple[list[str], str]:
    """The files a pattern matches; if it is a folder, which they are beneath, its name without a slash at the end."""
    if os.path.isfile(pattern):  # even if its name holds glob characters
        return [pattern], ""
    if os.path.isdir(pattern):
        found = [os.path.join(folder, name) for folder, _, names in os.walk(pattern) for name in names]
        return sorted(filter(os.path.isfile, found)), pattern.rstrip("/") or "/"
    return sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True))), ""


def _remote_matches(pattern: str) -> tuple[list[str], str]:
    filesystem, path = _filesystem(pattern)
    folder, found = "", {}
    with one_line(pattern), contextlib.suppress(FileNotFoundError), _network():
        if re.search("[*[]", path):
            found = filesystem.glob(path, detail=True)
        else:
            found = {path: filesystem.info(path)}
            if found[path]["type"] == "directory":
                folder, found = filesystem.unstrip_protocol(path), filesystem.find(path, detail=True)
    return sorted(filesystem.unstrip_protocol(name) for name, facts in found.items() if facts["type"] == "file"), folder


def _known(files: list[str], folder: str, name: str, format: str, say: Callable[[str], None]) -> list[str]:
    """Those of the files beneath a folder that can be read; says how many of which kinds there are."""
    kinds = {file: suffixes(file)[0] if format == "auto" else format for file in files}
    known = [file for file in files if kinds[file]]
    counts = ", ".join(f"{n:,} {kind}" for kind, n in sorted(collections.Counter(kinds[f] for f in known).items()))
    others = sorted({os.path.splitext(file)[1] or "none" for file in files if not kinds[file]})
    left = (f"{len(files) - len(known):,} of other kinds (suffix {', '.join(others[:8])}"
            f"{', ...' if others[8:] else ''})")
    if not known:
        raise ValueError(f"{name}: no {', '.join(KINDS)} files, plain or compressed, beneath {folder!r}"
                         + (f", {left}; data.format says what files of other names are" if files else ""))
    say(f"{name}: {len(known):,} files beneath {folder} ({counts})" + (f"; left out: {left}" if others else ""))
    return known


def source_facts(source: str, sha256: Callable[[str], tuple[int, str]]) -> list:
    """[name, size in bytes, mark] of a source: what it is by, wherever it lies. OSError when it is not there.

    The mark of a local file is its sha256 (of which `sha256` gives size and hex), that of a remote one, which is not
    read for this, its entity tag, hash or time, whichever its file system gives first ("": none), that of the embedded
    corpus the version of Python, which decides its text.
    """
    if source == EMBEDDED:
        return [EMBEDDED, 0, f"Python {platform.python_version()}"]
    if "://" not in source:
        return [os.path.basename(source), *sha256(source)]
    filesystem, path = _filesystem(source)
    with _network():
        facts = filesystem.info(path)
    mark = next((f"{name} {facts[name]}" for name in _REMOTE_MARKS if facts.get(name)), "")
    return [os.path.basename(source.partition("?")[0]), facts["size"], mark]


def identity(facts: list) -> tuple:
    """What equal sources have in common: mark, size, and the kind by the name, which decides how they are read; where
    there is no mark, name and size."""
    name, size, mark = facts
    return (suffixes(name)[0], size, mark) if mark else (name, size)


def open_source(source: str) -> io.BufferedReader:
    """A source's raw bytes."""
    if "://" not in source:
        return io.BufferedReader(io.FileIO(source), BUFFER)
    filesystem, path = _filesystem(source)
    with _network():
        file = filesystem.open(path, "rb")
    return io.BufferedReader(_Remote(file), BUFFER)


@contextlib.contextmanager
def one_line(source: str) -> Iterator[None]:
    """A disk or network that fails, in one line with the source."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{source}: cannot be read ({reason(error)})") from error


def _filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    core = package("fsspec.core", "remote", url)
    try:
        return core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # the scheme's own package is missing, or no such scheme
        raise ValueError(f"{url}: {error}; pip install 'hdlm_jax[remote]' brings https, s3 and gs") from None


@contextlib.contextmanager
def _network() -> Iterator[None]:
    """Whatever a network layer raises (bare OSErrors, RuntimeErrors, classes of its own) becomes a ConnectionError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ConnectionError(reason(error)) from error


class _Remote(io.RawIOBase):
    """A file of fsspec, with errors made plain by `_network`."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seekable, self.seek, self.tell = file.seekable, file.seek, file.tell  # type: ignore[method-assign]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        with _network():
            raw = self._file.read(len(view))
        view[:len(raw)] = raw
        return len(raw)

    def close(self) -> None:
        self._file.close()
        super().close()
