"""One source file -> shards of tokens, on all cores; killed at any moment, the next call goes on.

A *unit* is one source file. Its shards `{split}-{unit}-{part}.bin` hold tokens, each document closed by the end of
text; the `.idx` beside each has four uint32 a document: its tokens and bytes, and how many of each are its prompt's;
where records have features, `.feat` has those of each document (data/features.py).
Whenever shards are closed, `unit-{unit}.json` says how far the unit is. Its bytes depend on neither the cores nor the
number of calls.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import socket
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np

from hdlm_jax.common import jsons
from hdlm_jax.data import tokenizers
from hdlm_jax.data.chat import turns_ids
from hdlm_jax.data.documents import Reader
from hdlm_jax.data.features import padded
from hdlm_jax.data.records import MANY, Bad, Document, check_bad, digest, is_validation

T = TypeVar("T")
U = TypeVar("U")

SHARD_TOKENS = 1 << 26
BATCH_CHARS = 1 << 20  # encoded at once by one thread
_HOUR = 3600.0


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def remove_leftovers(folder: Path) -> None:
    """Removes temporary files of dead writers: gone from this host, or silent for an hour."""
    for path in folder.glob("*.tmp"):
        host, _, pid = path.name.removesuffix(".tmp").rpartition("-")
        with contextlib.suppress(OSError):  # another worker was faster
            here = host.endswith(f".{socket.gethostname()}")
            if here and not _runs(int(pid)) or time.time() - path.stat().st_mtime > _HOUR:
                path.unlink()


def _runs(pid: int) -> bool:
    """Whether that process runs, and is not this one, which in a container has the number that a killed one had."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # else it is somebody else's
    state = Path(f"/proc/{pid}/stat")  # in a container without an init the dead stay as zombies
    return pid != os.getpid() and not (state.exists() and state.read_text().rpartition(") ")[2].startswith("Z"))


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What goes wrong with the disk, as one line with the file's name."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written ({error.strerror}); what was finished before is kept: "
                      "mend that and run again") from error


def write_json(path: Path, value: object, indent: int | None = None) -> None:
    with _writing(path):
        jsons.write_json(path, value, indent)


class Files(contextlib.ExitStack):
    """Files that get their names together, by `finish`; else nothing is left of them."""

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[Path, tuple[BinaryIO, hashlib._Hash]] = {}

    def __exit__(self, *error: Any) -> None:
        with contextlib.suppress(OSError):  # of closing on a disk that is full
            super().__exit__(*error)

    def write(self, path: Path, raw: bytes) -> None:
        with _writing(path):
            if path not in self._open:
                self._open[path] = self.enter_context(jsons.open_atomic(path)), hashlib.sha256()
            file, state = self._open[path]
            file.write(raw)
        state.update(raw)

    def finish(self) -> dict[str, dict]:
        """Name -> {"bytes", "sha256"} of what was written since the last time."""
        facts = {path.name: {"bytes": file.tell(), "sha256": state.hexdigest()}
                 for path, (file, state) in self._open.items()}
        if self._open:
            with _writing(next(iter(self._open))):
                super().__exit__(None, None, None)
        self._open = {}
        return facts


@dataclasses.dataclass(frozen=True)
class Job:
    """What the bytes of units depend on."""

    folder: Path
    id: str  # of the settings, sources and tokenizer
    reader: Reader
    units: tuple[tuple[str, str], ...]  # (source, 'train' or 'valid')
    held: frozenset[bytes]  # digests of the documents of the validation files
    fraction: float  # of split='hash', else 0
    sample: int  # bytes of training text a unit; 0: all
    prompts: bool
    dtype: str
    bad_share: float

    def split(self, unit: int, document: Document) -> str:
        """'train', 'valid', or '' for a training document that the validation files have too."""
        if self.units[unit][1] == "valid":
            return "valid"
        if self.fraction:
            return "valid" if is_validation(document, self.fraction) else "train"
        return "" if self.held and digest(document) in self.held else "train"

    def records(self, unit: int) -> Iterator[Document | Bad]:
        """All records of a unit; of a sample, until there are enough bytes of training text."""
        source, kind = self.units[unit]
        left = self.sample if kind == "train" else 0
        for record in self.reader.read(source):
            yield record
            if left and isinstance(record, Document) and self.split(unit, record) == "train":
                left -= len((record.prompt + record.text).encode("utf-8"))
                if left <= 0:
                    return

    def record_path(self, unit: int) -> Path:
        return self.folder / f"unit-{unit:05d}.json"


class Range(NamedTuple):
    """Whole documents that follow each other in the shard `stem`, and how many bytes and scored tokens they are."""

    stem: str
    first_token: int
    end_token: int
    first_document: int
    end_document: int
    bytes: int
    scored_tokens: int
    scored_bytes: int

    @property
    def tokens(self) -> int:
        return self.end_token - self.first_token

    @property
    def documents(self) -> int:
        return self.end_document - self.first_document


@dataclasses.dataclass
class Record:
    """How far a unit is: what its closed shards hold."""

    job: str
    source: str
    records: int = 0  # bad ones too
    bad: int = 0
    first_bad: tuple = ()
    left_out: int = 0
    digests: str = "0"  # sum of the documents' sha256 modulo 2^256, hex
    parts: int = 0
    shards: list = dataclasses.field(default_factory=list)  # `Range`s
    files: dict = dataclasses.field(default_factory=dict)  # name -> {"bytes", "sha256"}
    done: bool = False


def load_record(job: Job, unit: int) -> Record | None:
    """None where the unit is not begun, or where files it has made are gone: then it is made again."""
    path = job.record_path(unit)
    if not path.exists():
        return None
    facts = jsons.read_json(path, *(field.name for field in dataclasses.fields(Record)))
    jsons.of_types(path, facts, typing.get_type_hints(Record))
    record = Record(**{name: facts[name] for name in typing.get_type_hints(Record)})
    if record.job != job.id:
        raise ValueError(f"{path} was made with other settings, files or words than these (by another "
                         f"worker?): give all workers the same, or delete {job.folder}")
    for name, made in record.files.items():
        shard = job.folder / name
        if not shard.exists() or shard.stat().st_size != made["bytes"]:
            return None
    record.shards = [Range(*place) for place in record.shards]
    return record


def unfinished(job: Job) -> list[int]:
    records = [load_record(job, unit) for unit in range(len(job.units))]
    return [unit for unit, record in enumerate(records) if not record or not record.done]


class _Encoded(NamedTuple):
    """A batch of records, encoded. digests: sum of sha256. shards: split -> tokens [n], index [documents, 4],
    features."""

    records: int
    bad: list[Bad]
    left_out: int
    digests: int
    shards: dict[str, tuple[np.ndarray, np.ndarray, bytes]]


def encode_documents(words: tokenizers.Tokenizer, documents: list[Document],
                     reader: Reader) -> list[tuple[np.ndarray, int]]:
    """Tokens int32 of each document (prompt, text, end of text), and how many of them are its prompt.

    In front of it are ends of text in the places of features, which count as prompt.
    """
    places = reader.feature_shape[0]
    end, prompts = np.array([words.eot], np.int32), bool(reader.prompt_field)
    if reader.chat:
        turns = [turns_ids(words, [{"role": "user", "content": document.prompt},
                                   {"role": "assistant", "content": document.text}]) for document in documents]
        return [(np.concatenate([ids, end]), prompt) for ids, prompt in turns]
    texts = words.encode_batch([document.text for document in documents])
    heads = words.encode_batch([document.prompt for document in documents]) if prompts else [end[:0]] * len(documents)
    return [(np.concatenate([np.repeat(end, places), head, text, end]), places + len(head))
            for head, text in zip(heads, texts, strict=True)]


def _encode(job: Job, words: tokenizers.Tokenizer, unit: int, batch: list[Document | Bad]) -> _Encoded:
    splits: dict[str, list[Document]] = {"train": [], "valid": [], "": []}
    for record in batch:
        if isinstance(record, Document):
            splits[job.split(unit, record)].append(record)
    left_out, digests, shards = len(splits.pop("")), 0, {}
    for split, documents in splits.items():
        if documents:
            pieces, index = [], []
            for document, (tokens, prompt) in zip(documents, encode_documents(words, documents, job.reader),
                                                  strict=True):
                pieces.append(tokens)
                prompt_bytes, text_bytes = len(document.prompt.encode("utf-8")), len(document.text.encode("utf-8"))
                index.append((len(tokens), prompt_bytes + text_bytes, prompt, prompt_bytes))
                digests += int.from_bytes(digest(document), "big")
            flat = np.concatenate(pieces, dtype=np.dtype(job.dtype).newbyteorder("<"), casting="unsafe")
            features = [padded(document.features, job.reader.feature_shape[0]).astype("<f4").tobytes()
                        for document in documents if document.features is not None]
            shards[split] = flat, np.array(index, "<u4"), b"".join(features)
    return _Encoded(len(batch), [record for record in batch if isinstance(record, Bad)], left_out, digests, shards)


def read_index(path: Path, first_document: int = 0, end_document: int = -1) -> np.ndarray:
    """Documents of an .idx file, uint32 [documents, 4]."""
    count = 4 * (end_document - first_document) if end_document >= 0 else -1
    return np.fromfile(path, "<u4", count, offset=16 * first_document).reshape(-1, 4)


def totals(index: np.ndarray) -> np.ndarray:
    """Tokens, documents, bytes, scored tokens and scored bytes of the documents of an index [n, 4]: int64 [5]."""
    size, raw, prompt, raw_prompt = index.sum(0, dtype=np.int64)
    return np.array([size, len(index), raw, size - prompt, raw - raw_prompt])


def batches(records: Iterable[T], chars: int) -> Iterator[list[T]]:
    """Records one after another, so many at once that their texts are about `chars` characters."""
    held, size = [], 0
    for record in records:
        held.append(record)
        size += 100  # of a tiny document, the object is what takes the memory
        if isinstance(record, Document):
            size += len(record.prompt) + len(record.text)
            size += 0 if record.features is None else record.features.nbytes
        if size >= chars:
            yield held
            held, size = [], 0
    if held:
        yield held


def ahead(function: Callable[[T], U], items: Iterable[T], threads: int) -> Iterator[U]:
    """`map` on threads, which work ahead of the reader of the results, but no further than they are many."""
    items = iter(items)
    for item in itertools.islice(items, 1):  # alone: what it makes for all, the tables of a tokenizer, is made once
        yield function(item)
    with futures.ThreadPoolExecutor(threads) as pool:
        try:
            waiting: collections.deque[futures.Future[U]] = collections.deque()
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _make(job: Job, words: tokenizers.Tokenizer, unit: int, threads: int, tick: Callable[[int], None]) -> None:
    """Makes what is left of a unit. tick: gets the bytes of text of each batch done.

    Shards close between batches, and batches are counted from there: so they are the same after a resume.
    """
    record = load_record(job, unit) or Record(job.id, job.units[unit][0])
    if record.done:
        return
    digests = int(record.digests, 16)
    open_shards: collections.defaultdict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(5, np.int64))
    records = itertools.islice(job.records(unit), record.records, None)
    encode = functools.partial(_encode, job, words, unit)
    with Files() as files:

        def close() -> None:
            for stem, (tokens, *counts) in sorted(open_shards.items()):
                record.shards.append(Range(stem, 0, int(tokens), 0, *map(int, counts)))
            open_shards.clear()
            record.files |= files.finish()
            record.parts += 1
            record.digests = f"{digests:x}"
            write_json(job.record_path(unit), dataclasses.asdict(record))

        for batch in ahead(encode, batches(records, BATCH_CHARS), threads):
            place = f"{unit:05d}-{record.parts:03d}"
            for split, (flat, index, features) in batch.shards.items():
                stem = f"{split}-{place}"
                files.write(job.folder / f"{stem}.bin", flat.tobytes())
                files.write(job.folder / f"{stem}.idx", index.tobytes())
                if features:
                    files.write(job.folder / f"{stem}.feat", features)
                open_shards[stem] += totals(index)
                tick(int(index[:, 1].sum(dtype=np.int64)))
            for bad in batch.bad:
                files.write(job.folder / f"bad-{place}.jsonl", jsons.dumps(bad._asdict()).encode() + b"\n")
                record.first_bad = record.first_bad or tuple(bad)
            record.records += batch.records
            record.bad += len(batch.bad)
            record.left_out += batch.left_out
            digests = (digests + batch.digests) % 2**256
            check_bad(job.bad_share, record.bad, record.records, record.first_bad, str(job.folder), out_of=MANY)
            if sum(counts[0] for counts in open_shards.values()) >= SHARD_TOKENS:
                close()
        record.done = True
        close()


def make_all(job: Job, words: tokenizers.Tokenizer, units: list[int], sizes: list[int]) -> None:
    """Makes these units on threads that share all cores, each unit by its part of the bytes, the largest first.

    sizes: bytes of every source, those of other units too.
    """
    from tqdm import tqdm

    cores, total, stop = core_count(), max(1, sum(sizes[u] for u in units)), threading.Event()
    quiet = not sys.stderr.isatty() or "CI" in os.environ
    bar = tqdm(desc="tokens", unit="B", unit_scale=True, disable=quiet)
    with bar, futures.ThreadPoolExecutor(cores) as pool:

        def tick(size: int) -> None:
            bar.update(size)
            if stop.is_set():
                raise InterruptedError("another file failed")

        try:
            made = [pool.submit(_make, job, words, unit, math.ceil(cores * sizes[unit] / total) or 1, tick)
                    for unit in sorted(units, key=lambda unit: -sizes[unit])]
            for number, future in enumerate(futures.as_completed(made), 1):
                future.result()
                bar.set_postfix_str(f"{number}/{len(units)} files")
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)  # waits: each file stops after the batch it is at
