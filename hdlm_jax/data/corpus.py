"""Where documents come from: the documentation inside Python itself, or files of text, jsonl, parquet and tar.

Files are read as streams, local or remote, packed and nested as they are: OpenWebText, a tar.xz of xz-compressed
tars of text files, is read from the one file it is distributed as.
"""

from __future__ import annotations

import ast
import codecs
import collections
import contextlib
import dataclasses
import functools
import glob
import hashlib
import importlib
import io
import itertools
import json
import os
import platform
import re
import shutil
import sysconfig
import tarfile
import tempfile
import types
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast

from hdlm_jax.config import DETOKENIZERS, FORMATS, TXT_DOCUMENTS, expand
from hdlm_jax.data import detokenize

EMBEDDED = "embedded"  # the one source of data.source='embedded'
KINDS = {".txt": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".tar": "tar"}
COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst")
_SHORT = {".tgz": ".gz", ".txz": ".xz", ".tbz2": ".bz2", ".tzst": ".zst"}  # tars

# Folders of the standard library that are tests, other people's packages or caches.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}


class Document(NamedTuple):
    """One document: `prompt` (never scored, usually empty), then `text`; `name` says where it is from."""

    text: str
    name: str
    prompt: str = ""


class Bad(NamedTuple):
    """A record that cannot be read: the source it is in, where ("line 12", "member a/b.txt, byte 3"), and why."""

    file: str
    position: str
    reason: str


def digest(document: Document) -> bytes:
    """sha256 of the document's raw UTF-8 bytes (prompt, then text)."""
    return hashlib.sha256((document.prompt + document.text).encode("utf-8")).digest()


def split(document: Document, fraction: float) -> bool:
    """Whether the document is validation: its sha256, read as a number in [0, 1), is below `fraction`.

    Depends on the text alone, so equal documents fall on the same side and the order of files is irrelevant.
    """
    return int.from_bytes(digest(document)[:8], "big") < fraction * 2.0**64


# -------------------------------------------------------------------------------------------- embedded corpus


@functools.lru_cache(maxsize=1)
def embedded_corpus() -> tuple[tuple[Document, ...], int]:
    """The documentation that ships inside Python: one document per language topic, one per documented module.

    The topics are `pydoc_data/topics.py`; a module's document is its docstrings (module, classes, functions,
    in source order) joined by blank lines. Source files are read with `ast`, nothing is imported; sorted by
    path, tests left out. The text depends on the Python version, so results name the corpus fingerprint.

    Returns: the documents, and how many source files could not be read (some are broken on purpose).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found, unreadable = [], 0
    try:
        for name, text in sorted(_topics(root / "pydoc_data" / "topics.py").items()):
            found.append(Document(text, f"topic {name}"))
    except (OSError, SyntaxError, ValueError):
        unreadable += 1
    for path in _stdlib_sources(root):
        try:
            text = "\n\n".join(docstrings(path.read_bytes()))
            text.encode("utf-8")  # an escaped lone surrogate is no text
        except (OSError, SyntaxError, ValueError, RecursionError):
            unreadable += 1
            continue
        found.append(Document(text, path.relative_to(root).as_posix()))
    found = [document for document in found if document.text.strip()]
    if not found:
        raise ValueError(f"the embedded corpus needs Python's own source files, none found in {root}; "
                         "set data.source='files' and data.files")
    return tuple(found), unreadable


def _stdlib_sources(root: Path) -> list[Path]:
    paths = []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in _LEFT_OUT]
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def _topics(path: Path) -> dict[str, str]:
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "topics":
            return ast.literal_eval(node.value)
    raise ValueError(f"{path}: no topics")


def docstrings(source: bytes | str) -> list[str]:
    """All docstrings of a module's source, in source order: module, classes, functions (nested ones too)."""
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and text.strip():
                found.append(text)
        for child in ast.iter_child_nodes(node):
            visit(child)

    with warnings.catch_warnings():  # invalid escapes in old sources are not our affair
        warnings.simplefilter("ignore")
        visit(ast.parse(source))
    return found


def resolve(files: str | Sequence[str], name: str = "data.files", format: str = "auto",
            say: Callable[[str], None] = lambda line: None) -> list[str]:
    """Sources of `files`: patterns in the order given, the matches of each sorted, each file once.

    Args:
      files: paths, folders or globs (`~` and `$VARIABLES` are expanded, `**` goes into folders), or URLs that fsspec
        knows (`s3://...`, `gs://...`, `https://...`); in a URL only * and [ make a pattern, ? is a query. A folder
        stands for the files beneath it whose names are of KINDS, or with a `format` other than auto for all of them;
        hidden files and folders are left out, links to folders not followed. A glob's matches are files alone.
      name: of the setting, for messages. say: gets a line on what each folder holds.
    Raises:
      ValueError: an empty list, a pattern without a match, a folder without such files, a package that is missing.
    """
    patterns = [files] if isinstance(files, str) else list(files)
    if not patterns:
        raise ValueError(f"{name} is empty; give paths, folders, globs or URLs of {', '.join(KINDS)} files")
    sources: dict[str, str] = {}
    for pattern in patterns:
        expanded = expand(pattern)
        matches, beneath = _remote_matches(expanded) if "://" in expanded else _local_matches(expanded)
        if beneath:
            matches = _known(matches, expanded, name, format, say)
        if not matches:
            hint = f" (is {expanded!r}; is the variable set?)" if "$" in expanded else ""
            raise ValueError(f"{name}: no file matches {pattern!r}{hint}")
        for match in matches:
            sources.setdefault(match if "://" in match else os.path.realpath(match), match)
    return list(sources.values())


def _local_matches(pattern: str) -> tuple[list[str], bool]:
    """The files a pattern matches, and whether it is a folder, which they are beneath."""
    # A path that exists is itself, even if its name holds glob characters.
    if os.path.isdir(pattern):
        found = []
        for folder, names, files in os.walk(pattern):
            names[:] = [name for name in names if not name.startswith(".")]
            found += [os.path.join(folder, name) for name in files if not name.startswith(".")]
        return sorted(filter(os.path.isfile, found)), True
    matches = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
    return [match for match in matches if os.path.isfile(match)], False


def _remote_matches(pattern: str) -> tuple[list[str], bool]:
    filesystem, path = _filesystem(pattern)
    beneath = False
    with _one_line(pattern):
        try:
            with _network():
                if re.search("[*[]", path):
                    found = filesystem.glob(path, detail=True)
                else:
                    found = {path: filesystem.info(path)}
                    if beneath := found[path]["type"] == "directory":
                        found = filesystem.find(path, detail=True)
        except FileNotFoundError:
            found = {}
    files = [name for name, facts in found.items() if facts["type"] == "file"]
    if beneath:
        files = [name for name in files if "/." not in name.removeprefix(path)]
    return sorted(map(filesystem.unstrip_protocol, files)), beneath


def _known(files: list[str], folder: str, name: str, format: str, say: Callable[[str], None]) -> list[str]:
    """Those of the files beneath a folder that can be read; says how many of which kinds there are."""
    kinds = [_suffixes(file)[0] if format == "auto" else format for file in files]
    known = [file for file, kind in zip(files, kinds, strict=True) if kind]
    counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(collections.Counter(filter(None, kinds)).items()))
    others = sorted({os.path.splitext(file)[1] or "none" for file, kind in zip(files, kinds, strict=True) if not kind})
    left = (f"{len(files) - len(known):,} of other kinds (suffix {', '.join(others[:8])}"
            f"{', ...' if others[8:] else ''})")
    if not known:
        raise ValueError(f"{name}: no {', '.join(KINDS)} files, plain or compressed, beneath {folder!r}"
                         + (f", {left}; data.format says what files of other names are" if files else ""))
    say(f"{name}: {len(known):,} files beneath {folder} ({counts})" + (f"; left out: {left}" if files != known else ""))
    return known


def facts_of(source: str, sha256: Callable[[str], tuple[int, str]]) -> list:
    """[name, size in bytes, mark] of a source: what it is by, wherever it lies.

    The mark of a local file is the sha256 of its bytes. A remote one is not read for this: its mark is its entity tag,
    hash or time, whichever its file system gives first, "" where it gives none. The embedded corpus is made when it is
    read: its size is given as 0, its mark is the version of Python, which decides its text.

    Args:
      sha256: gives size and sha256 (hex) of a local file.
    Raises: OSError when the source is not there.
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


_REMOTE_MARKS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated", "mtime", "created")


def identity(facts: list) -> tuple:
    """What equal sources have in common: mark, size, and the kind by the name, which decides how they are read; where
    there is no mark, name and size."""
    name, size, mark = facts
    return (_suffixes(name)[0], size, mark) if mark else (name, size)


def _filesystem(url: str) -> tuple[Any, str]:
    core = _package("fsspec.core", "remote", url)
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
        raise ConnectionError(_reason(error)) from error


class _Remote(io.RawIOBase):
    """A file of fsspec, with errors made plain by `_network`."""

    def __init__(self, file: Any):
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        with _network():
            raw = self._file.read(len(buffer))
        buffer[:len(raw)] = raw
        return len(raw)

    def close(self) -> None:
        self._file.close()
        super().close()


@contextlib.contextmanager
def _one_line(source: str) -> Iterator[None]:
    """A disk or network that fails, in one line with the source."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{source}: cannot be read ({_reason(error)})") from error


def _package(module: str, extra: str, where: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{where}: needs the {module.partition('.')[0]} package: "
                         f"pip install 'hdlm_jax[{extra}]'") from None


def _open(source: str) -> io.BufferedReader:
    """A source's raw bytes."""
    if "://" not in source:
        return io.BufferedReader(io.FileIO(source), _BUFFER)
    filesystem, path = _filesystem(source)
    with _network():
        file = filesystem.open(path, "rb")
    return io.BufferedReader(_Remote(file), _BUFFER)


def _suffixes(name: str) -> tuple[str, str]:
    """(kind by the name or '', compression by the name or '')."""
    stem, suffix = os.path.splitext((name.partition("?")[0] if "://" in name else name).lower())
    if suffix in _SHORT:
        return "tar", _SHORT[suffix]
    packed = suffix if suffix in COMPRESSIONS else ""
    return KINDS.get(os.path.splitext(stem)[1] if packed else suffix, ""), packed


# ------------------------------------------------------------------------------------------------------- bytes

_BUFFER = 1 << 18
# No UTF-8 text begins like this (bz2, the only one of plain letters, begins with ten letters of nonsense).
_MAGIC = re.compile(rb"(?P<gz>\x1f\x8b\x08)|(?P<xz>\xfd7zXZ\0)|(?P<bz2>BZh[1-9](?:1AY&SY|\x17rE8P\x90))|"
                    rb"(?P<zst>\(\xb5/\xfd|[P-_]\*M\x18)")


def _decompressor(packed: str, where: str) -> Callable[[], Any]:
    if packed == ".gz":
        return lambda: zlib.decompressobj(31)  # 31: with gzip's header and checksum
    if packed == ".xz":
        import lzma
        return lzma.LZMADecompressor
    if packed == ".bz2":
        import bz2
        return bz2.BZ2Decompressor
    zstandard = _package("zstandard", "zstd", where)
    return lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


class _Damaged(Exception):
    """The bytes read are not what they should be: no error of disk, network or settings."""


_DAMAGED = (_Damaged, tarfile.TarError)


class _Unpacked(io.RawIOBase):
    """The bytes inside a compressed file: all its streams, one after another; _Damaged where it is cut short.

    The libraries' own file objects differ: zstandard's takes a file cut short for whole, the others lose what
    they have unpacked when an error follows. Here all that can be read comes first, then the error, each time.
    """

    def __init__(self, file: io.BufferedReader, decompressor: Callable[[], Any]):
        self._file, self._new = file, decompressor
        self._stream: Any = None
        self._raw, self._text = b"", memoryview(b"")
        self._error: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            if self._error:
                raise self._error
            try:
                if not self._unpack():
                    return 0
            except Exception as error:
                self._error = error
        count = min(len(buffer), len(self._text))
        buffer[:count], self._text = self._text[:count], self._text[count:]
        return count

    def _unpack(self) -> bool:
        raw = self._raw or self._file.read1(1 << 14)
        self._raw = b""
        if not raw:
            if self._stream is not None:
                raise _Damaged("the compressed data is cut short")
            return False
        if self._stream is None:
            raw = raw.lstrip(b"\0")  # padding between streams
            self._stream = self._new() if raw else None
        if self._stream is not None:
            try:
                self._text = memoryview(self._stream.decompress(raw))
            except Exception as error:  # each library has its own
                raise _Damaged(_reason(error)) from None
            if self._stream.eof:
                self._raw, self._stream = self._stream.unused_data, None
        return True


def _unpacked(file: io.BufferedReader, name: str) -> io.BufferedReader:
    """`file` without its compressions, found by content; _Damaged where only the name speaks of one."""
    packed = _suffixes(name)[1]
    while found := _MAGIC.match(file.peek(64)):
        file = io.BufferedReader(_Unpacked(file, _decompressor(f".{found.lastgroup}", name)), _BUFFER)
        packed = ""
    if packed:
        raise _Damaged(f"this is no {packed} data")
    return file


def _content(file: io.BufferedReader) -> str:
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


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if type(error) in (_Damaged, ConnectionError) else f"{type(error).__name__}: {text}"


# ----------------------------------------------------------------------------------------------------- records


class _Place(NamedTuple):
    """What is being read: a source, or the member (or member/member of a member) of one that is an archive."""

    source: str
    member: str = ""

    def inside(self, member: str) -> _Place:
        return _Place(self.source, f"{self.member}/{member}" if self.member else member)

    def name(self, number: int = 0) -> str:
        """Name of a document: file, member, number of line or row; only what there is."""
        name = os.path.basename(self.source) + (f":{self.member}" if self.member else "")
        return f"{name}:{number}" if number else name

    def bad(self, at: str, reason: str) -> Bad:
        member = f"member {self.member}" if self.member else ""
        return Bad(self.source, ", ".join(filter(None, [member, at])), reason)


@dataclasses.dataclass(frozen=True)
class Reader:
    """How documents are read; picklable.

    Attributes (the settings of the same names in `data`):
      text_field, prompt_field: fields of a jsonl record or parquet row; `prompt_field=''` means no prompts.
      txt_documents: a document of a text file: the whole 'file', all between two 'blank_line's, or a 'line'.
      format: 'auto', by the name of the file; else its kind, whatever the name.
      detokenize: prompt and text go through this function of `hdlm_jax.data.detokenize`.
    """

    text_field: str = "text"
    prompt_field: str = ""
    txt_documents: str = "file"
    format: str = "auto"
    detokenize: str = ""

    def __post_init__(self) -> None:
        for name, choices in (("txt_documents", TXT_DOCUMENTS), ("format", FORMATS), ("detokenize", DETOKENIZERS)):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"data.{name} is {value!r}; choices: {', '.join(filter(None, choices))}")

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
            named, packed = _suffixes(source)
            kind = named if self.format == "auto" else self.format
            if packed:
                _decompressor(packed, source)
            if not kind:
                with _one_line(source), _open(source) as file, contextlib.suppress(_Damaged):
                    kind = _content(_unpacked(file, source))
            if not kind:
                suffix = "".join(PurePosixPath(source).suffixes[-2:] if packed else PurePosixPath(source).suffixes[-1:])
                raise ValueError(f"{source}: kind of file {suffix!r} is unknown; "
                                 f"choices: {', '.join(KINDS)}, plain or with {', '.join(COMPRESSIONS)}; data.format "
                                 "says what files of other names are")
            if kind == "parquet":
                _package("pyarrow.parquet", "parquet", source)
        if self.prompt_field and kind in ("txt", EMBEDDED):
            raise ValueError(f"{source}: data.prompt_field={self.prompt_field!r} needs jsonl or parquet, not {kind}")
        return kind

    def read(self, source: str) -> Iterator[Document | Bad]:
        """The documents of a source in a fixed order, and what of it cannot be read; empty documents are left out.

        A source is read as a stream: held in memory are one document and some buffers. After a `Bad` reading goes
        on with the next record, or member of an archive, if it can be found; otherwise the `Bad` comes last.

        Raises:
          ValueError: what `check` raises; a field that is missing in the first record of a file, which is a misspelt
            setting; a disk or network that fails. One line that names the file, the rule and the choices.
        """
        kind = self.check(source)
        return iter(embedded_corpus()[0]) if kind == EMBEDDED else self._source(source, kind)

    def _source(self, source: str, kind: str) -> Iterator[Document | Bad]:
        place = _Place(source)
        with _one_line(source), _open(source) as file:
            try:
                for record in self._contents(file, place, kind):
                    if isinstance(record, Bad):
                        yield record
                    elif not _blank(record.text):
                        yield self._detokenized(record) if self.detokenize else record
            except _DAMAGED as error:
                yield place.bad(f"byte {file.tell()}", _reason(error))

    def _detokenized(self, document: Document) -> Document:
        undo = detokenize.DETOKENIZERS[self.detokenize]
        return document._replace(text=undo(document.text), prompt=document.prompt and undo(document.prompt))

    def _contents(self, file: io.BufferedReader, place: _Place, kind: str = "") -> Iterator[Document | Bad]:
        """The records of an open file; kind '' (a member of an archive): that of its content, else of its name."""
        packed, file = file, _unpacked(file, place.member or place.source)
        kind = kind or _content(file) or _suffixes(place.member)[0] or "txt"
        if kind == "tar":
            return self._tar(file, place)
        if kind == "parquet":
            return self._parquet(file, place, seekable=file is packed and not place.member)
        file = _as_utf8(file)
        if kind in ("jsonl", "json"):
            return self._records(_lines(file, place) if kind == "jsonl" else _json(file, place), place)
        if self.prompt_field:
            raise ValueError(f"{place.name()}: data.prompt_field={self.prompt_field!r} needs jsonl or parquet, not txt")
        return _TXT[self.txt_documents](file, place)

    def _tar(self, file: io.BufferedReader, place: _Place) -> Iterator[Document | Bad]:
        held = None
        stream: Any = types.SimpleNamespace(read=file.read1)  # read1: all that comes before an error
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header, errors="replace") as archive:
            while True:
                member = archive.next()  # an error here is the archive's, and comes in place of the member's
                archive.members = []  # type: ignore[attr-defined]  # or it would keep every header
                if held:
                    yield held
                    held = None
                if member is None:
                    break
                if not member.isfile() or os.path.basename(member.name).startswith("."):
                    continue
                inside = place.inside(member.name)
                try:
                    yield from self._contents(cast(io.BufferedReader, archive.extractfile(member)), inside)
                except _DAMAGED as error:
                    held = inside.bad("", _reason(error))
            while rest := archive.fileobj.read(_BUFFER):  # type: ignore[union-attr]
                if rest.strip(b"\0"):  # reading to the end also checks the sums of what it is packed in
                    raise tarfile.ReadError("there is data after the end mark of the archive")

    def _parquet(self, file: Any, place: _Place, seekable: bool) -> Iterator[Document | Bad]:
        fields, number = self._fields(), 0
        with contextlib.ExitStack() as stack:
            if not seekable:  # a parquet file is read from its end
                spool = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(file, spool)
                file = spool
            for columns in _columns(file, fields, place):
                for values in zip(*columns, strict=True):
                    number += 1
                    try:
                        yield _document(dict(zip(fields, values, strict=True)), fields, place.name(number))
                    except _Unreadable as error:
                        yield place.bad(f"row {number}", str(error))

    def _records(self, records: Iterable[tuple[int, Any]], place: _Place) -> Iterator[Document | Bad]:
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
                    yield _document(row, fields, place.name(number))
                except _Unreadable as error:
                    yield place.bad(f"{at} {number}", str(error))

    def _fields(self) -> list[str]:
        return [self.text_field, self.prompt_field] if self.prompt_field else [self.text_field]


def _columns(file: Any, fields: list[str], place: _Place) -> Iterator[list[list[bytes | None]]]:
    """The columns `fields` of a parquet file, some rows at a time; as bytes, for no row to spoil the others."""
    arrow, parquet = (_package(name, "parquet", place.source) for name in ("pyarrow", "pyarrow.parquet"))
    try:
        table = parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)  # else it reads whole row groups
        _need(fields, table.schema_arrow.names, place)
        for batch in table.iter_batches(256, columns=fields, use_threads=False):
            try:
                columns = [batch.column(field).cast(arrow.large_binary()) for field in fields]
            except arrow.ArrowNotImplementedError as error:
                raise ValueError(f"{place.name()}: {', '.join(fields)} must be text ({_reason(error)})") from None
            yield [column.to_pylist() for column in columns]
    except (arrow.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and (error.errno or type(error) is not OSError):  # of disk or network
            raise
        raise _Damaged(_reason(error)) from None


class _Unreadable(Exception):
    """Why a record is a bad one."""


def _object(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _Unreadable(f"not JSON ({_reason(error)})") from None


def _need(fields: Iterable[str], there: Iterable[str], place: _Place) -> None:
    for field in fields:
        if field not in there:
            raise ValueError(f"{place.name()}: no field {field!r} in its first record; fields there: "
                             f"{', '.join(map(repr, there)) or 'none'} (data.text_field, data.prompt_field)")


def _document(row: dict, fields: list[str], name: str) -> Document:
    texts = []
    for field in fields:
        if field not in row:
            raise _Unreadable(f"no field {field!r}; fields here: {', '.join(map(repr, row)) or 'none'}")
        value = row[field]
        try:
            if isinstance(value, bytes):
                value = value.decode()
            elif isinstance(value, str):
                value.encode()  # json lets a lone surrogate pass, "\ud800"; it has no UTF-8 form
        except UnicodeError as error:
            raise _Unreadable(f"field {field!r} is not Unicode ({_reason(error)})") from None
        if not isinstance(value, str):
            raise _Unreadable(f"field {field!r} must be a string, not {type(value).__name__}")
        texts.append(value)
    return Document(texts[0], name, *texts[1:])


def _blank(text: str) -> bool:
    return not text or text.isspace()  # unlike strip() this copies nothing


_BOM = codecs.BOM_UTF8  # a byte order mark is no text
# UTF-32's little-endian mark begins with UTF-16's
_WIDE = {codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
         codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


class _Recoded(io.RawIOBase):
    """UTF-8 of a file in UTF-16 or UTF-32; lone surrogates pass, as bytes that are no UTF-8 where they stand."""

    def __init__(self, file: io.BufferedReader, encoding: str):
        self._file, self._text = file, memoryview(b"")
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            raw = self._file.read1(1 << 16)
            try:
                text = self._decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise _Damaged(f"not valid {error.encoding} ({error.reason})") from None
            if not raw:
                return 0
            self._text = memoryview(text.encode("utf-8", "surrogatepass"))
        count = min(len(buffer), len(self._text))
        buffer[:count], self._text = self._text[:count], self._text[count:]
        return count


def _as_utf8(file: io.BufferedReader) -> io.BufferedReader:
    """`file`, recoded where a byte order mark says that it is UTF-16 or UTF-32."""
    head = file.peek(4)
    for mark, encoding in _WIDE.items():
        if head.startswith(mark):
            file.read(len(mark))
            return io.BufferedReader(_Recoded(file, encoding), _BUFFER)
    return file


def _lines(file: io.BufferedReader, place: _Place) -> Iterator[tuple[int, str | Bad]]:
    """(number from 1, line with its end) of each line."""
    for number, raw in enumerate(file, 1):
        if number == 1:
            raw = raw.removeprefix(_BOM)
        try:
            line: str | Bad = raw.decode()
        except UnicodeDecodeError as error:
            line = place.bad(f"line {number}, byte {error.start}", _utf8(error))
        yield number, line


def _utf8(error: UnicodeDecodeError) -> str:
    return f"not valid UTF-8 (0x{error.object[error.start]:02x}: {error.reason})"


def _whole(file: io.BufferedReader, place: _Place) -> Iterator[Document | Bad]:
    raw = file.read()
    text = raw.removeprefix(_BOM)
    try:
        yield Document(text.decode(), place.name())
    except UnicodeDecodeError as error:
        yield place.bad(f"byte {len(raw) - len(text) + error.start}", _utf8(error))


def _single(file: io.BufferedReader, place: _Place) -> Iterator[Document | Bad]:
    for number, line in _lines(file, place):
        yield line if isinstance(line, Bad) else Document(line.rstrip("\r\n"), place.name(number))


def _paragraphs(file: io.BufferedReader, place: _Place) -> Iterator[Document | Bad]:
    held: list[str | Bad] = []
    first = 0
    for number, line in itertools.chain(_lines(file, place), [(0, "\n")]):
        if isinstance(line, Bad) or not _blank(line):
            first = first or number
            held.append(line)
        elif held:
            bad = next((part for part in held if isinstance(part, Bad)), None)
            yield bad or Document("".join(cast(list[str], held)).rstrip("\r\n"), place.name(first))
            held, first = [], 0


_TXT = {"file": _whole, "blank_line": _paragraphs, "line": _single}


# -------------------------------------------------------------------------------------------------------- JSON


def _json(file: io.BufferedReader, place: _Place) -> Iterator[tuple[int, Any]]:
    """(number from 1, record) of a .json file: the elements of an array, objects that span lines, or else lines.

    Values are read one by one; behind one that is damaged no other can be found, so that its `Bad` comes last.
    """
    head = file.peek(_BUFFER).removeprefix(_BOM).lstrip()
    array, (first, line_end, _) = head.startswith(b"["), head.partition(b"\n")
    spans = line_end and first.startswith(b"{") and first.rstrip().endswith((b"{", b"[", b","))
    if not (array or spans):
        yield from _lines(file, place)
        return
    number = 0
    try:
        for number, value in enumerate(_values(file, array), 1):
            yield number, value
    except _Unreadable as error:
        yield number + 1, place.bad(f"record {number + 1}", f"not JSON ({error})")


def _values(file: io.BufferedReader, array: bool) -> Iterator[Any]:
    """The elements of an array, or values one after another without commas. _Unreadable: what follows is no JSON."""
    text = _JsonText(file)
    if not array:
        while text.following():
            yield text.value()
        return
    text.following()
    text.skip()
    found = text.following()
    while found != "]":
        yield text.value()
        found = text.following()
        if found not in (",", "]"):
            raise _Unreadable(f"found {found!r} behind an element" if found else "the array is cut short")
        text.skip(found == ",")
    text.skip()
    if found := text.following():
        raise _Unreadable(f"found {found!r} behind the end of the array")


class _JsonText:
    """The text of a JSON file as it is read: held are the value at hand and a buffer.

    Bytes that are no UTF-8 become lone surrogates, which `_document` refuses in the one record that has them.
    """

    def __init__(self, file: io.BufferedReader):
        self._file, self._text, self._place, self._ended = file, "", 0, False
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")

    def _more(self, size: int) -> None:
        raw = self._file.read(size)
        self._ended = not raw
        self._text, self._place = self._text[self._place:] + self._decoder.decode(raw, final=self._ended), 0

    def skip(self, one: bool = True) -> None:
        self._place += one

    def following(self) -> str:
        """The next character that is no blank, '' at the end of the file."""
        while True:
            self._place = _NO_BLANK.search(self._text, self._place).start()  # type: ignore[union-attr]
            if self._place < len(self._text) or self._ended:
                return self._text[self._place:self._place + 1]
            self._more(_BUFFER)

    def value(self) -> Any:
        """The value that follows; _Unreadable where that is no JSON."""
        self.following()
        size = _BUFFER
        while True:
            try:
                value, end = _PARSER.raw_decode(self._text, self._place)
                if end < len(self._text) or self._ended:  # else a number may go on
                    self._place = end
                    return value
            except RecursionError as error:
                raise _Unreadable(_reason(error)) from None
            except json.JSONDecodeError as error:  # not of what has not been read yet: that is at the end, or a string
                inside = error.pos < len(self._text) - 16 and not error.msg.startswith("Unterminated")
                if inside or self._ended:
                    raise _Unreadable(error.msg) from None
            self._more(size)
            size *= 2  # or a long value would be parsed too often


_PARSER = json.JSONDecoder()
_NO_BLANK = re.compile(r"[^ \t\n\r]|\Z")
