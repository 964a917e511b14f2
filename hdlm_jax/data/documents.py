"""Documents of files of text, JSON, parquet and tar, or of the embedded corpus, read as streams.

Files are read packed and nested as they are: OpenWebText, a tar.xz of xz-compressed tars of text files, is read
from the one file it is distributed as.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedReader
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from hdlm_jax.common.extras import package
from hdlm_jax.data import detokenize
from hdlm_jax.data import features as vectors
from hdlm_jax.data.archives import MOST_LAYERS, content, decompressor, file_of, tar_members, unpacked
from hdlm_jax.data.embedded import EMBEDDED, embedded_corpus
from hdlm_jax.data.records import Bad, Document
from hdlm_jax.data.sources import BUFFER, COMPRESSIONS, KINDS, Damaged, one_line, open_source, reason, suffixes

LONGEST = 1 << 30  # bytes of a document, line or record: it has to be held in memory
_DAMAGED = (Damaged, tarfile.TarError)


class _Place(NamedTuple):
    """What is being read: a source, or the member (or member/member of a member) of one that is an archive."""

    source: str
    member: str = ""
    archives: int = 0  # that it is in

    def inside(self, member: str) -> _Place:
        return _Place(self.source, f"{self.member}/{member}" if self.member else member, self.archives + 1)

    def name(self, number: int = 0) -> str:
        """Name of a document: file, member, number of line or row; only what there is."""
        name = os.path.basename(self.source) + (f":{self.member}" if self.member else "")
        return f"{name}:{number}" if number else name

    def bad(self, at: str, reason: str) -> Bad:
        member = f"member {self.member}" if self.member else ""
        return Bad(self.source, ", ".join(filter(None, [member, at])), reason)


@dataclasses.dataclass(frozen=True)
class Reader:
    """How documents are read, by the settings of the same names in `data`."""

    text_field: str = "text"  # of a JSON record or parquet row
    prompt_field: str = ""  # '': no prompts
    txt_documents: str = "file"  # of a text file: the whole 'file', all between two 'blank_line's, or a 'line'
    format: str = "auto"  # by the name of the file; else its kind, whatever the name
    detokenize: str = ""  # prompt and text go through this function of `hdlm_jax.data.detokenize`
    chat: bool = False  # prompt and text become turns of a chat, when they are tokenised
    features_field: str = ""  # '': no features
    feature_shape: tuple[int, int] = (0, 0)  # (P, F): the most vectors of a record, and their numbers

    def check(self, source: str) -> str:
        """The kind of a source: 'embedded', 'txt', 'jsonl', 'json', 'parquet' or 'tar'.

        It is that of `format`, of the name, or, where both say nothing, of the content (tar and parquet only).

        Raises:
          ValueError: no such file, a kind that is unknown or has no prompts, a package that is missing.
        """
        kind = EMBEDDED
        if source != EMBEDDED:
            if "://" not in source and not os.path.isfile(source):
                raise ValueError(f"{source}: no such file")
            named, packed = suffixes(source)
            kind = named if self.format == "auto" else self.format
            if packed:
                decompressor(packed, source)
            if not kind:
                with one_line(source), open_source(source) as file, contextlib.suppress(Damaged):
                    kind = content(unpacked(file, source))
            if not kind:
                suffix = "".join(PurePosixPath(source).suffixes[-2 if packed else -1:])
                raise ValueError(f"{source}: kind of file {suffix!r} is unknown; "
                                 f"choices: {', '.join(KINDS)}, plain or with {', '.join(COMPRESSIONS)}; data.format "
                                 "says what files of other names are")
            if kind == "parquet":
                package("pyarrow.parquet", "parquet", source)
        if kind in ("txt", EMBEDDED):
            self._no_prompts(source, kind)
        return kind

    def _no_prompts(self, name: str, kind: str) -> None:
        for setting in ("prompt_field", "features_field"):
            if field := getattr(self, setting):
                raise ValueError(f"{name}: data.{setting}={field!r} needs jsonl or parquet, not {kind}")

    def read(self, source: str) -> Iterator[Document | Bad]:
        """The documents of a source in a fixed order, and what of it cannot be read; empty documents are left out.

        After a `Bad` reading goes on with the next record, or member of an archive, if it can be found; otherwise the
        `Bad` comes last.

        Raises:
          ValueError: what `check` raises; a field that is missing in the first record of a file, which is a misspelt
            setting; a disk or network that fails. One line that names the file, the rule and the choices.
        """
        kind = self.check(source)
        return iter(embedded_corpus()[0]) if kind == EMBEDDED else self._source(source, kind)

    def documents(self, source: str) -> Iterator[Document]:
        """`read` without the bad records."""
        return (record for record in self.read(source) if isinstance(record, Document))

    def _source(self, source: str, kind: str) -> Iterator[Document | Bad]:
        place, undo = _Place(source), detokenize.DETOKENIZERS[self.detokenize] if self.detokenize else str
        with one_line(source), open_source(source) as file:
            try:
                for record in self._contents(file, place, kind):
                    if isinstance(record, Bad):
                        yield record
                    elif not _blank(record.text):
                        yield record._replace(text=undo(record.text), prompt=record.prompt and undo(record.prompt))
            except _DAMAGED as error:
                yield place.bad(f"byte {file.tell()}", reason(error))

    def _contents(self, file: BufferedReader, place: _Place, kind: str = "") -> Iterator[Document | Bad]:
        """The records of an open file; kind '' (a member of an archive): that of its content, else of its name."""
        packed, file = file, unpacked(file, place.member or place.source)
        kind = kind or content(file) or suffixes(place.member)[0] or "txt"
        if kind == "tar":
            if place.archives >= MOST_LAYERS:
                raise Damaged(f"more than {MOST_LAYERS} archives inside each other; unpack it first")
            return self._tar(file, place)
        if kind == "parquet":
            return self._parquet(file, place, seekable=file is packed and not place.member)
        file = _as_utf8(file)
        if kind in ("jsonl", "json"):
            return self._records(_lines(file, place) if kind == "jsonl" else _json(file, place), place)
        self._no_prompts(place.name(), kind)
        return _TXT[self.txt_documents](file, place)

    def _tar(self, file: BufferedReader, place: _Place) -> Iterator[Document | Bad]:
        held = None  # of a member; an error of the archive itself comes in its place
        for found in tar_members(file):
            if held:
                yield held
                held = None
            if found and not os.path.basename(found[0]).startswith("."):
                inside = place.inside(found[0])
                try:
                    yield from self._contents(found[1], inside)
                except _DAMAGED as error:
                    held = inside.bad("", reason(error))

    def _parquet(self, file: BinaryIO, place: _Place, seekable: bool) -> Iterator[Document | Bad]:
        fields = self._fields()
        with contextlib.ExitStack() as stack:
            if not seekable:  # a parquet file is read from its end
                spool = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(file, spool)
                file = spool
            for number, values in enumerate(_rows(file, fields, place, self.features_field), 1):
                try:
                    yield self._document(dict(zip(fields, values, strict=True)), place.name(number))
                except _Unreadable as error:
                    yield place.bad(f"row {number}", str(error))

    def _records(self, records: Iterable[tuple[int, object]], place: _Place) -> Iterator[Document | Bad]:
        """Documents of numbered records: lines of JSON, or what was read of a JSON file."""
        fields, first = self._fields(), True
        for number, record in records:
            if isinstance(record, Bad):
                yield record
            elif not isinstance(record, str) or not _blank(record):
                at = "line" if isinstance(record, str) else "record"
                try:
                    row = _object(record) if isinstance(record, str) else record
                    if not isinstance(row, dict):
                        raise _Unreadable(f"a {at} must be a JSON object, not {type(row).__name__}")
                    if first:
                        _need(fields, row, place)
                        first = False
                    yield self._document(row, place.name(number))
                except _Unreadable as error:
                    yield place.bad(f"{at} {number}", str(error))

    def _fields(self) -> list[str]:
        return [self.text_field, *filter(None, [self.prompt_field, self.features_field])]

    def _document(self, row: Mapping[str, object], name: str) -> Document:
        document = Document(_text(row, self.text_field), name, self.prompt_field and _text(row, self.prompt_field))
        if not (field := self.features_field):
            return document
        if row.get(field) is None:
            raise _lacking(field, row)
        try:
            return document._replace(features=vectors.read(row[field], self.feature_shape))
        except ValueError as error:
            raise _Unreadable(f"field {field!r} {error}") from None


class _Unreadable(Exception):
    """Why a record is a bad one."""


def _lacking(field: str, row: Iterable[str]) -> _Unreadable:
    return _Unreadable(f"no field {field!r}; fields here: {', '.join(map(repr, row)) or 'none'}")


def _need(fields: Iterable[str], there: Iterable[str], place: _Place) -> None:
    for field in fields:
        if field not in there:
            raise ValueError(f"{place.name()}: no field {field!r} in its first record; fields there: "
                             f"{', '.join(map(repr, there)) or 'none'} (data.text_field, data.prompt_field, "
                             "data.features_field)")


def _text(row: Mapping[str, object], field: str) -> str:
    if field not in row:
        raise _lacking(field, row)
    value = row[field]
    if isinstance(value, str | bytes) and len(value) > LONGEST:
        raise _Unreadable(f"field {field!r} {_too_long()}")
    try:
        if isinstance(value, bytes):
            value = value.decode()
        elif isinstance(value, str):
            value.encode()  # json lets a lone surrogate pass, "\ud800"; it has no UTF-8 form
    except UnicodeError as error:
        raise _Unreadable(f"field {field!r} is not Unicode ({reason(error)})") from None
    if not isinstance(value, str):
        raise _Unreadable(f"field {field!r} must be a string, not {type(value).__name__}")
    return value


def _blank(text: str) -> bool:
    return not text or text.isspace()  # unlike strip() this copies nothing


def _rows(file: BinaryIO, fields: list[str], place: _Place, features: str) -> Iterator[tuple[Any, ...]]:
    """The values of `fields` in the rows of a parquet file; of texts as bytes, for no row to spoil the others."""
    arrow, parquet = (package(name, "parquet", place.source) for name in ("pyarrow", "pyarrow.parquet"))
    try:
        table = parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)  # else it reads whole row groups
        _need(fields, table.schema_arrow.names, place)
        for batch in table.iter_batches(256, columns=fields, use_threads=False):
            try:
                columns = [batch.column(field) if field == features else
                           batch.column(field).cast(arrow.large_binary()) for field in fields]
            except arrow.ArrowNotImplementedError as error:
                raise ValueError(f"{place.name()}: {', '.join(fields)} must be text ({reason(error)})") from None
            yield from zip(*[column.to_pylist() for column in columns], strict=True)
    except (arrow.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and (error.errno or type(error) is not OSError):  # of disk or network
            raise
        raise Damaged(reason(error)) from None


_BOM = codecs.BOM_UTF8  # a byte order mark is no text
# UTF-32's little-endian mark begins with UTF-16's
_WIDE = {codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
         codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


def _as_utf8(file: BufferedReader) -> BufferedReader:
    """`file`, recoded where a byte order mark says that it is UTF-16 or UTF-32."""
    head = file.peek(4)
    for mark, encoding in _WIDE.items():
        if head.startswith(mark):
            file.read(len(mark))
            return file_of(_recoded(file, encoding))
    return file


def _recoded(file: BufferedReader, encoding: str) -> Iterator[bytes]:
    """UTF-8; lone surrogates pass, as bytes that are no UTF-8 where they stand."""
    try:
        for text in codecs.iterdecode(iter(lambda: file.read1(1 << 16), b""), encoding, "surrogatepass"):
            yield text.encode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise Damaged(f"not valid {error.encoding} ({error.reason})") from None


def _lines(file: BufferedReader, place: _Place) -> Iterator[tuple[int, str | Bad]]:
    """(number from 1, line with its end) of each line; one that is too long is read, but not held."""
    for number, raw in enumerate(iter(functools.partial(file.readline, LONGEST + 1), b""), 1):
        if number == 1:
            raw = raw.removeprefix(_BOM)
        if len(raw) > LONGEST:
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(BUFFER)
            yield number, place.bad(f"line {number}", f"the line {_too_long()}")
            continue
        try:
            line: str | Bad = raw.decode()
        except UnicodeDecodeError as error:
            line = place.bad(f"line {number}, byte {error.start}", _utf8(error))
        yield number, line


def _too_long() -> str:
    return f"is longer than {LONGEST:,} bytes; cut it"


def _utf8(error: UnicodeDecodeError) -> str:
    return f"not valid UTF-8 (0x{error.object[error.start]:02x}: {error.reason})"


def _whole(file: BufferedReader, place: _Place) -> Iterator[Document | Bad]:
    parts, size = [], 0
    for part in iter(functools.partial(file.read1, BUFFER), b""):
        parts.append(part)
        size += len(part)
        if size > LONGEST:
            how = "as by data.txt_documents='blank_line' or 'line'"
            yield place.bad(f"byte {LONGEST}", f"the document {_too_long()}, {how}")
            return
    raw = b"".join(parts)
    text = raw.removeprefix(_BOM)
    try:
        yield Document(text.decode(), place.name())
    except UnicodeDecodeError as error:
        yield place.bad(f"byte {len(raw) - len(text) + error.start}", _utf8(error))


def _single(file: BufferedReader, place: _Place) -> Iterator[Document | Bad]:
    for number, line in _lines(file, place):
        if isinstance(line, Bad) or not _blank(line):
            yield line if isinstance(line, Bad) else Document(line.rstrip("\r\n"), place.name(number))


def _paragraphs(file: BufferedReader, place: _Place) -> Iterator[Document | Bad]:
    held: list[str] = []
    first, bad, size = 0, None, 0
    for number, line in itertools.chain(_lines(file, place), [(0, "\n")]):
        if isinstance(line, Bad):
            bad = bad or line
        elif not _blank(line):
            first, size = first or number, size + len(line)
            if size > LONGEST:
                bad, held = bad or place.bad(f"line {first}", f"the document {_too_long()}"), []
            if not bad:
                held.append(line)
        elif held or bad:
            yield bad or Document("".join(held).rstrip("\r\n"), place.name(first))
            held, first, bad, size = [], 0, None, 0


_TXT = {"file": _whole, "blank_line": _paragraphs, "line": _single}


_PARSER = json.JSONDecoder()
_NO_BLANK = re.compile(r"[^ \t\n\r]")


def _object(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _Unreadable(f"not JSON ({reason(error)})") from None


def _json(file: BufferedReader, place: _Place) -> Iterator[tuple[int, object]]:
    """(number from 1, record) of a .json file: the elements of an array, objects that span lines, or else lines.

    Behind a value that is damaged no other can be found, so that its `Bad` comes last.
    """
    head = file.peek(BUFFER).removeprefix(_BOM).lstrip()
    array, (first, line_end, _) = head.startswith(b"["), head.partition(b"\n")
    spans = line_end and first.startswith(b"{") and first.rstrip().endswith((b"{", b"[", b","))
    if not (array or spans):
        yield from _lines(file, place)
        return
    number = 0
    try:
        for number, value in enumerate(_values(_Text(file), array), 1):
            yield number, value
    except _Unreadable as error:
        yield number + 1, place.bad(f"record {number + 1}", f"not JSON ({error})")


def _values(text: _Text, array: bool) -> Iterator[object]:
    """The elements of an array, or values one after another without commas. _Unreadable: what follows is no JSON."""
    found, end = text.following(), ""
    if array:
        found, end = text.following(skip=1), "]"
    while found != end:
        yield text.value()
        found = text.following()
        if array and found not in (",", "]"):
            raise _Unreadable(f"found {found!r} behind an element" if found else "the array is cut short")
        if found == "," and array:
            text.following(skip=1)
    if array and (found := text.following(skip=1)):
        raise _Unreadable(f"found {found!r} behind the end of the array")


class _Text:
    """A JSON file from a place on, of which only as much as the value there needs is held."""

    def __init__(self, file: BufferedReader):
        self._held, self._at = "", 0
        # Bytes that are no UTF-8 become lone surrogates, which `_document` refuses in the one record that has them.
        self._parts = codecs.iterdecode(iter(lambda: file.read1(BUFFER), b""), "utf-8-sig", "surrogateescape")

    def _more(self) -> bool:
        """Reads on, the more the more is held, so that a long value is tried only few times; False at the end."""
        held = self._held[self._at:]
        if len(held) > LONGEST:
            raise _Unreadable(f"a value {_too_long()}")
        if new := "".join(itertools.islice(self._parts, 1 + len(held) // BUFFER)):
            self._held, self._at = held + new, 0
        return bool(new)

    def following(self, skip: int = 0) -> str:
        """Goes `skip` characters on and to the next that is no blank: that one, or '' at the end of the file."""
        self._at += skip
        while not (found := _NO_BLANK.search(self._held, self._at)):
            self._at = len(self._held)
            if not self._more():
                return ""
        self._at = found.start()
        return found[0]

    def value(self) -> object:
        """The value that begins here; goes behind it."""
        while True:
            try:
                value, end = _PARSER.raw_decode(self._held, self._at)
            except RecursionError as error:
                raise _Unreadable(reason(error)) from None
            except json.JSONDecodeError as error:
                # Where it is only cut, the error is near the end of what is held, or that of a string that began.
                cut = error.msg.startswith("Unterminated") or error.pos > len(self._held) - 16
                if not (cut and self._more()):
                    raise _Unreadable(error.msg) from None
            except ValueError as error:  # a number of thousands of digits
                raise _Unreadable(reason(error)) from None
            else:
                if end + 2 < len(self._held) or not self._more():  # else a number may go on ("1", "1e+")
                    self._at = end
                    return value
