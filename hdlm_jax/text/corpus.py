"""Where documents come from: the documentation inside Python itself, or any user's files."""

from __future__ import annotations

import ast
import contextlib
import functools
import glob
import hashlib
import io
import json
import os
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

SOURCES = ("embedded", "files")
TXT_DOCUMENTS = ("file", "blank_line", "line")
FORMATS = ("auto", "txt", "jsonl", "parquet", "tar")
DETOKENIZERS = ("", "lm1b")
KINDS = (".txt", ".jsonl")
COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst")

# Folders of the standard library that are tests, other people's packages or caches.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}


class Document(NamedTuple):
    """One document: `prompt` (never scored, usually empty), then `text`; `name` says where it is from."""

    text: str
    name: str
    prompt: str = ""


def digest(document: Document) -> bytes:
    """sha256 of the document's raw UTF-8 bytes (prompt, then text)."""
    return hashlib.sha256((document.prompt + document.text).encode("utf-8")).digest()


def split(document: Document, fraction: float) -> bool:
    """Whether the document is validation: its sha256, read as a number in [0, 1), is below `fraction`.

    Depends on the text alone, so equal documents fall on the same side and the order of files is irrelevant.
    """
    return int.from_bytes(digest(document)[:8], "big") < fraction * 2.0**64


class Fingerprint:
    """sha256 over a sequence of documents (texts and prompts with their lengths; names do not count)."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, document: Document) -> None:
        for part in (document.prompt, document.text):
            raw = part.encode("utf-8")
            self._hash.update(len(raw).to_bytes(8, "big") + raw)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def documents(
    source: str = "embedded",
    files: str | Sequence[str] = (),
    text_field: str = "text",
    prompt_field: str = "",
    *,
    txt_documents: str = "file",
) -> Iterator[Document]:
    """Yields every document of a source, in a fixed order; empty documents are left out.

    Args:
      source: 'embedded' (see `embedded_corpus`) or 'files'.
      files: paths or globs (`~` and `$VARIABLES` are expanded, `**` goes into folders).
      text_field, prompt_field: fields of a .jsonl line; `prompt_field=''` means no prompts.
      txt_documents: what a document of a .txt file is: the whole 'file', or all between two 'blank_line's.
    Raises:
      ValueError: one line that names the file, the line or byte, the rule and the choices.
    """
    if source == "embedded":
        yield from embedded_corpus()[0]
    elif source == "files":
        for path in resolve(files):
            yield from read_file(path, text_field, prompt_field, txt_documents=txt_documents)
    else:
        raise ValueError(f"data.source is {source!r}; choices: {', '.join(SOURCES)}")


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


# ------------------------------------------------------------------------------------------------------ files


def resolve(files: str | Sequence[str], name: str = "data.files") -> list[Path]:
    """Paths of `files` (paths or globs): patterns in the order given, matches of each sorted, each file once.

    Raises ValueError for an empty list, a pattern without a match, or a kind of file that cannot be read.
    """
    patterns = [files] if isinstance(files, str) else list(files)
    if not patterns:
        raise ValueError(f"{name} is empty; give paths or globs of .txt or .jsonl files")
    paths: dict[Path, Path] = {}
    for pattern in patterns:
        expanded = os.path.expanduser(os.path.expandvars(pattern))
        # A path that exists is itself, even if its name holds glob characters.
        matches = [expanded] if os.path.isfile(expanded) else sorted(glob.glob(expanded, recursive=True))
        matches = [match for match in matches if os.path.isfile(match)]
        if not matches:
            hint = f" (is {expanded!r}; is the variable set?)" if "$" in expanded else ""
            raise ValueError(f"{name}: no file matches {pattern!r}{hint}")
        for match in matches:
            _kind(Path(match))
            paths.setdefault(Path(os.path.realpath(match)), Path(match))
    return list(paths.values())


def _kind(path: Path) -> tuple[str, str]:
    """('.txt' or '.jsonl', compression or '')."""
    suffixes = path.suffixes
    packed = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    kind = suffixes[-1] if suffixes else ""
    if kind not in KINDS:
        raise ValueError(f"{path}: kind of file {kind + packed!r} is unknown; choices: "
                         f"{', '.join(KINDS)}, plain or with {', '.join(COMPRESSIONS)}")
    return kind, packed


def _open(path: Path) -> BinaryIO:
    packed = _kind(path)[1]
    if packed == ".gz":
        import gzip
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if packed == ".xz":
        import lzma
        return lzma.open(path, "rb")  # type: ignore[return-value]
    if packed == ".bz2":
        import bz2
        return bz2.open(path, "rb")  # type: ignore[return-value]
    if packed == ".zst":
        try:
            import zstandard
        except ImportError:
            raise ValueError(f"{path}: .zst needs the zstandard package: pip install zstandard") from None
        return io.BufferedReader(_Zstandard(path, zstandard.ZstdDecompressor), 1 << 20)  # type: ignore
    return open(path, "rb")


class _Zstandard(io.RawIOBase):
    """Reads all frames of a .zst; the package's own stream_reader takes a file cut short for whole."""

    def __init__(self, path: Path, decompressor: Callable[[], Any]) -> None:
        self._file, self._decompressor = open(path, "rb"), decompressor
        self._frame: Any = None
        self._raw = self._text = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            self._raw = self._raw or self._file.read(1 << 20)
            if not self._raw:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            self._frame = self._frame or self._decompressor().decompressobj()
            self._text = self._frame.decompress(self._raw)
            self._raw = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        count = min(len(buffer), len(self._text))
        buffer[:count], self._text = self._text[:count], self._text[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """The open file; whatever is wrong with its bytes on disk becomes one line with its name."""
    import lzma
    import zlib
    broken: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, lzma.LZMAError)
    with contextlib.suppress(ImportError):
        import zstandard
        broken += (zstandard.ZstdError,)
    try:
        with _open(path) as file:
            yield file
    except broken as error:
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error


def read_file(path: str | os.PathLike, text_field: str = "text", prompt_field: str = "", *,
              txt_documents: str = "file") -> Iterator[Document]:
    """Yields the non-empty documents of one .txt or .jsonl file, plain or compressed. See `documents`."""
    path = Path(path)
    if txt_documents not in TXT_DOCUMENTS:
        raise ValueError(f"data.txt_documents is {txt_documents!r}; choices: {', '.join(TXT_DOCUMENTS)}")
    kind = _kind(path)[0]
    if prompt_field and kind != ".jsonl":
        raise ValueError(f"{path}: data.prompt_field={prompt_field!r} needs .jsonl files")
    with _reading(path) as file:
        if kind == ".jsonl":
            yield from _jsonl(file, path, text_field, prompt_field)
        elif txt_documents == "file":
            text = _decode(file.read(), path)
            if text.strip():
                yield Document(text, path.name)
        else:
            yield from _paragraphs(file, path)


def _decode(raw: bytes, path: Path, line: int = 0, start: int = 0) -> str:
    if start == 0 and raw.startswith(b"\xef\xbb\xbf"):  # a byte order mark is no text
        raw, start = raw[3:], 3
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"line {line}, " if line else ""
        raise ValueError(f"{path}: not valid UTF-8 at {where}byte {start + error.start} "
                         f"(0x{raw[error.start]:02x}: {error.reason})") from None


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, str]]:
    start = 0
    for number, raw in enumerate(file, 1):
        yield number, _decode(raw, path, number, start)
        start += len(raw)


def _paragraphs(file: BinaryIO, path: Path) -> Iterator[Document]:
    held: list[str] = []
    first = 1
    for number, line in _lines(file, path):
        if line.strip():
            if not held:
                first = number
            held.append(line)
        elif held:
            yield Document("".join(held).rstrip("\r\n"), f"{path.name}:{first}")
            held = []
    if held:
        yield Document("".join(held).rstrip("\r\n"), f"{path.name}:{first}")


def _jsonl(file: BinaryIO, path: Path, text_field: str, prompt_field: str) -> Iterator[Document]:
    for number, line in _lines(file, path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: a line must be a JSON object, not {type(row).__name__}")
        text = _field(row, text_field, path, number)
        prompt = _field(row, prompt_field, path, number) if prompt_field else ""
        if text.strip():
            yield Document(text, f"{path.name}:{number}", prompt)


_SURROGATE = re.compile("[\ud800-\udfff]")


def _field(row: dict, field: str, path: Path, number: int) -> str:
    if field not in row:
        there = ", ".join(map(repr, row)) or "none"
        raise ValueError(f"{path}:{number}: no field {field!r}; fields here: {there}")
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"{path}:{number}: field {field!r} must be a string, not {type(value).__name__}")
    if found := _SURROGATE.search(value):  # json.loads lets "\ud800" pass; it has no UTF-8 form
        raise ValueError(f"{path}:{number}: field {field!r} is not Unicode: lone surrogate {found[0]!r}")
    return value
