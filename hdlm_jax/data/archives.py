"""Compressed files and tar archives, read as streams: all that can be read comes first, then what is wrong.

A few bytes may unpack to no end of them, so they come in pieces, and what is packed as no text is counts as damaged.
"""

from __future__ import annotations

import functools
import io
import re
import tarfile
import types
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol, cast

from hdlm_jax.common.extras import package
from hdlm_jax.data.sources import BUFFER, Damaged, reason, suffixes

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PIECE = 1 << 20  # bytes that are unpacked at once
MOST_LAYERS = 4  # compressions of a file, and archives inside each other
MOST_RATIO = 1000  # bytes out of one, of what is more than FREE: text has 3 to 30, gzip at most 1,032
FREE = 1 << 24

# No UTF-8 text begins like this (bz2, the only one of plain letters, begins with ten letters of nonsense).
_MAGIC = re.compile(rb"(?P<gz>\x1f\x8b\x08)|(?P<xz>\xfd7zXZ\0)|(?P<bz2>BZh[1-9](?:1AY&SY|\x17rE8P\x90))|"
                    rb"(?P<zst>\(\xb5/\xfd|[P-_]\*M\x18)")


class _Decompressor(Protocol):
    """As bz2 and lzma have it: where no input is needed, more comes of what was given."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """A `_Decompressor` of zlib's."""

    def __init__(self) -> None:
        self._stream, self.needs_input = zlib.decompressobj(31), True  # 31: with gzip's header and checksum

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        out = self._stream.decompress(self._stream.unconsumed_tail + data, max_length)
        self.needs_input = not self._stream.unconsumed_tail and len(out) < max_length
        return out


class _Zstandard:
    """A `_Decompressor` of zstandard's, which knows no max_length: of 4 bytes at most 128 KiB are unpacked."""

    def __init__(self, package: types.ModuleType):
        self._stream, self._left = package.ZstdDecompressor(max_window_size=1 << 31).decompressobj(), b""

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def needs_input(self) -> bool:
        return not self._left

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data + self._left

    def decompress(self, data: bytes, max_length: int) -> bytes:
        data, size = self._left + data, max(4, max_length >> 10)
        self._left = data[size:]
        return self._stream.decompress(data[:size])


class _Pieces(io.RawIOBase):
    """A file of the bytes that `pieces` yields; an error of theirs comes again each time it is read on."""

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces, self._held = pieces, memoryview(b"")
        self._error: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        if self._error:
            raise self._error
        try:
            while not self._held:
                self._held = memoryview(next(self._pieces))
        except StopIteration:
            return 0
        except Exception as error:
            self._error = error
            raise
        view = memoryview(buffer)
        count = min(len(view), len(self._held))
        view[:count], self._held = self._held[:count], self._held[count:]
        return count


def file_of(pieces: Iterator[bytes]) -> io.BufferedReader:
    """A file of the bytes that `pieces` yields."""
    return io.BufferedReader(_Pieces(pieces), BUFFER)


def decompressor(packed: str, where: str) -> Callable[[], _Decompressor]:
    """Makes what unpacks one stream of a compression; ValueError where its package is missing, for `where`."""
    if packed == ".zst":
        return functools.partial(_Zstandard, package("zstandard", "zstd", where))
    if packed == ".gz":
        return _Gzip
    if packed == ".xz":
        import lzma  # some Pythons are built without these two
        return lzma.LZMADecompressor
    import bz2
    return bz2.BZ2Decompressor


def _decompressed(file: io.BufferedReader, new: Callable[[], _Decompressor]) -> Iterator[bytes]:
    """All streams of a compressed file, one after another; Damaged where it is cut short.

    The libraries' own file objects differ: zstandard's takes a file cut short for whole, the others lose what
    they have unpacked when an error follows.
    """
    stream, raw = None, b""
    taken = given = 0  # bytes
    while raw or stream and not stream.needs_input or (raw := file.read1(1 << 14)):
        taken += len(raw)
        if not stream and not (raw := raw.lstrip(b"\0")):  # padding between streams
            continue
        stream = stream or new()
        try:
            text = stream.decompress(raw, PIECE)
        except Exception as error:  # each library has its own
            raise Damaged(reason(error)) from None
        given += len(text)
        if given > max(FREE, MOST_RATIO * taken):
            raise Damaged(f"it unpacks to more than {MOST_RATIO:,} times its size, as no text does; if it is text all "
                          "the same, unpack it first")
        yield text
        raw, stream = (stream.unused_data, None) if stream.eof else (b"", stream)
        taken -= len(raw)
    if stream:
        raise Damaged("the compressed data is cut short")


def unpacked(file: io.BufferedReader, name: str) -> io.BufferedReader:
    """`file` without its compressions, found by content; Damaged where only the name speaks of one, or at too many."""
    packed, layers = suffixes(name)[1], 0
    while found := _MAGIC.match(file.peek(64)):
        layers += 1
        if layers > MOST_LAYERS:
            raise Damaged(f"it is packed more than {MOST_LAYERS} times over; unpack it first")
        file = file_of(_decompressed(file, decompressor(f".{found.lastgroup}", name)))
        packed = ""
    if packed:
        raise Damaged(f"this is no {packed} data")
    return file


def content(file: io.BufferedReader) -> str:
    """'tar', 'parquet' or '' by the first bytes."""
    head = file.peek(512)
    return "tar" if head[257:262] == b"ustar" else "parquet" if head.startswith(b"PAR1") else ""


class _Header(tarfile.TarInfo):
    """tarfile takes a damaged or missing header for the end of the archive; here only the end mark is one."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:  # type: ignore[override]
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":
                raise
            raise tarfile.ReadError(f"{error}: the archive is damaged or cut short") from None


def _sparse() -> Iterator[bytes]:
    raise Damaged("a sparse file, as no text is; unpack the archive first")
    yield b""


def tar_members(file: io.BufferedReader) -> Iterator[tuple[str, io.BufferedReader] | None]:
    """(name, contents) of the files of an archive, to be read before the next; None where its end mark is found.

    tarfile.TarError: the archive is damaged, or cut short, or something follows the end mark.
    """
    stream = cast(io.BufferedReader, types.SimpleNamespace(read=file.read1))  # read1: all that comes before an error
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header, errors="replace") as archive:
        while member := archive.next():
            archive.members = []  # type: ignore[attr-defined]  # or it would keep every header
            if member.issparse():  # of any length, in a header
                yield member.name, file_of(_sparse())
            elif contents := archive.extractfile(member) if member.isfile() else None:
                yield member.name, cast(io.BufferedReader, contents)
        yield None
        while rest := archive.fileobj.read(BUFFER):  # type: ignore[union-attr]
            if rest.strip(b"\0"):  # reading to the end also checks the sums of what it is packed in
                raise tarfile.ReadError("there is data after the end mark of the archive")
