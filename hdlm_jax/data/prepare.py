"""Documents -> a folder of tokens, made on all cores or by many workers, gone on with after a kill, and reused.

Every source file is a unit with shards of its own (shards.py). `manifest.json` is written when all units are done: its
presence says that the rest is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import platform
import time
import typing
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from pathlib import Path

import numpy as np

from hdlm_jax.common import jsons
from hdlm_jax.config import DataConfig, TokenizerConfig, expand
from hdlm_jax.data import shards, tokenizers
from hdlm_jax.data.documents import Reader
from hdlm_jax.data.embedded import EMBEDDED, embedded_corpus
from hdlm_jax.data.hub_files import deciding_file
from hdlm_jax.data.records import Bad, check_bad, digest
from hdlm_jax.data.shards import Range, read_index, totals, write_json
from hdlm_jax.data.sources import identity, resolve, source_facts

MANIFEST, BEGUN, VERIFIED, BAD_RECORDS = "manifest.json", "begun.json", "verified.json", "bad_records.jsonl"
VERSION = 3
BPE_TRAINING_BYTES = 100_000_000
LONGEST = 1 << 16
_COUNTED_TOKENS = 1 << 20
_COUNTS = "documents", "tokens", "bytes", "scored_tokens", "scored_bytes"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of tokens holds. Token counts include the ends of text, bytes are raw UTF-8 bytes of documents;
    `scored` leaves prompts out."""

    version: int
    settings: dict  # what was asked for, without paths
    sources: list  # `source_facts` of each file read, in order (version 2: paths, [name, size])
    tokenizer_kind: str
    tokenizer_fingerprint: str
    vocab_size: int
    eot: int
    dtype: str
    prompts: bool  # whether documents may begin with a prompt (their lengths are in the .idx files)
    train_documents: int
    train_tokens: int
    train_bytes: int
    train_scored_tokens: int
    train_scored_bytes: int
    valid_documents: int
    valid_tokens: int
    valid_bytes: int
    valid_scored_tokens: int
    valid_scored_bytes: int
    unigram_nats: float  # per scored validation token, under the add-one smoothed unigram of scored training tokens
    corpus_fingerprint: str  # sum of the documents' sha256 modulo 2^256, 64 hex digits: no order, no files in it
    bpe_training_bytes: int  # of text that a BPE was trained on
    left_out: int  # training documents left out because they are equal to a document of the validation files
    bad: int  # records that cannot be read; bad_records.jsonl lists them
    unreadable: int  # source files of the embedded corpus that cannot be read
    sampled: bool  # the training split is a sample (data.stream trains on the documents themselves)
    python: str
    # "train" and "valid": [stem, first token, end token, first document, end document] of each range, in the order of
    # the documents; a range lies in the shard stem.bin and its index stem.idx
    splits: dict
    shards: dict  # file name -> {"bytes", "sha256"}
    lengths: list  # [tokens, documents], rising: so many training documents have so many scored tokens (or LONGEST)
    adopted: list = dataclasses.field(default_factory=list)  # of version 2: the settings, sources a sample is named by
    features: list = dataclasses.field(default_factory=list)  # [P, F] where documents have features (stem.feat)

    @property
    def bits_per_nat(self) -> float:
        """What turns nats a token of the whole validation split into bits a byte."""
        return self.valid_scored_tokens / self.valid_scored_bytes / math.log(2)

    @property
    def unigram_bits_per_byte(self) -> float:
        """`unigram_nats` in bits per raw UTF-8 byte of the scored validation text."""
        return self.unigram_nats * self.valid_scored_tokens / self.valid_scored_bytes / np.log(2.0)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the tokens and the tokenizer: what a data position belongs to."""
        shards = sorted((name, facts["sha256"]) for name, facts in self.shards.items())
        facts: list = [self.tokenizer_fingerprint, self.splits, shards]
        if self.sampled:  # what is trained on is not in the shards
            facts += self.adopted or [self.settings, [identity(source) for source in self.sources]]
        return hashlib.sha256(jsons.dumps(facts).encode()).hexdigest()

    def summary(self) -> str:
        """One line for people."""
        sample = "a sample of " if self.sampled else ""
        return (f"{sample}{self.train_tokens:,} training and {self.valid_tokens:,} validation tokens "
                f"({self.train_documents:,} and {self.valid_documents:,} documents), V={self.vocab_size:,} "
                f"({self.tokenizer_kind}), unigram {self.unigram_nats:.4f} nats/token, "
                f"corpus {self.corpus_fingerprint[:12]}")


def load_manifest(folder: str | os.PathLike) -> Manifest:
    """The manifest of a folder of tokens; ValueError when there is none, or one of a version before 2."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        raise ValueError(f"no tokens in {folder} ({MANIFEST} is missing); run --mode=prepare")
    facts = jsons.read_json(path, "version")
    if facts.get("version") not in (2, VERSION):
        raise ValueError(f"{path}: version is {facts.get('version')}, this code reads 2 and {VERSION}; "
                         "delete the folder and prepare again")
    jsons.read_json(path, *(f.name for f in dataclasses.fields(Manifest)
                           if f.name not in ("lengths", "adopted", "features")))
    jsons.of_types(path, facts, typing.get_type_hints(Manifest))
    if "lengths" not in facts:  # made before they were kept
        facts["lengths"] = document_lengths(Path(folder), facts["splits"]["train"])
    if facts["version"] == 2 and facts["sampled"]:
        facts["adopted"] = [facts["settings"], facts["sources"]]
    return Manifest(**facts)


def prepare(out_dir: str | os.PathLike, data: DataConfig, tokenizer: TokenizerConfig, *,
            say: Callable[[str], None]) -> Manifest | None:
    """Makes the folder of tokens, goes on making it, or reuses it when it was made with the same settings and files.

    Files are the same by contents (`identity`) and order, whatever their paths. Documents stream from their files to
    the disk; what is held is some megabytes a core. Killed at any moment, the next call goes on after the shards
    that were closed, to the same bytes.

    Args:
      data: data.prepare_shard='i/n': only the units u with u % n == i are made by this call.
      say: gets a line on what is made, reused or missing.
    Returns: the manifest; None where other workers' units are missing still (said).
    Raises:
      ValueError: one line; settings or files that differ from those the folder was made with are named.
      OSError: the disk is full, read-only or the like; what was finished stays and counts.
    """
    data.check()
    tokenizer.check()
    folder = Path(out_dir)
    if (folder / MANIFEST).exists() and (manifest := _reuse(folder, data, tokenizer, say)):
        return manifest

    start = time.monotonic()
    reader, train, valid = what_to_read(data, say)
    for source in [*train, *valid]:
        reader.check(source)
    settings, seen = _settings(data, tokenizer, len(valid)), _Seen(folder, say)
    sources = _facts([*train, *valid], tokenizer, seen)
    _check_sha256(tokenizer, sources)
    folder.mkdir(parents=True, exist_ok=True)
    seen.save()
    shards.remove_leftovers(folder)
    job = _job(folder, data, reader, train, valid)
    last = data.validation_documents if data.split == "last" and not valid else 0
    words, begun = _begin(job, settings, sources, tokenizer, last, say)
    job = dataclasses.replace(job, id=hashlib.sha256(jsons.dumps(begun, sort_keys=True).encode()).hexdigest(),
                              dtype="uint16" if words.vocab_size <= 65535 else "uint32")

    index, workers = data.worker()
    mine = [u for u in shards.unfinished(job) if u % workers == index]
    shards.make_all(job, words, mine, [size or 0 for _, size, _ in sources])  # not every server tells sizes
    if missing := shards.unfinished(job):
        say(f"tokens: worker {index}/{workers} has done its part of {folder}; {len(missing)} of {len(job.units)} files "
            f"are left to others (the first, {job.units[missing[0]][0]}, to {missing[0] % workers}/{workers})")
        return None
    manifest = _merge(job, words, begun, last, workers > 1, say)
    shards.remove_leftovers(folder)
    say(f"tokens: made {folder} in {time.monotonic() - start:.1f} s: {manifest.summary()}")
    return manifest


def _job(folder: Path, data: DataConfig, reader: Reader, train: list[str], valid: list[str]) -> shards.Job:
    return shards.Job(
        folder=folder, id="", reader=reader, held=held_out(reader, valid),
        prompts=bool(data.prompt_field or data.features_field),
        units=tuple((source, "train") for source in train) + tuple((source, "valid") for source in valid),
        fraction=data.validation_fraction if data.split == "hash" and not valid else 0.0,
        sample=max(1, data.sample_bytes // len(train)) if data.stream else 0,
        bad_share=data.bad_share, dtype="")


def held_out(reader: Reader, sources: Iterable[str]) -> frozenset[bytes]:
    """Digests of all documents of the validation files `sources`: equal training documents are left out."""
    return frozenset(digest(document) for source in sources for document in reader.documents(source))


def unigram_nats(train_counts: np.ndarray, valid_counts: np.ndarray) -> float:
    """Nats per validation token under the add-one smoothed training unigram; both counts are [V]."""
    smoothed = train_counts + 1.0
    log_p = np.log(smoothed) - np.log(smoothed.sum())
    return float(-(valid_counts @ log_p) / valid_counts.sum())


def token_counts(folder: str | os.PathLike, split: str = "train", manifest: Manifest | None = None) -> np.ndarray:
    """How often each word is a scored token of a split ('train' or 'valid'), int64 [V].

    manifest: that of the folder, where it is not on disk yet.
    """
    manifest = manifest or load_manifest(folder)
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    counts = np.zeros(manifest.vocab_size, np.int64)
    for stem, first, end, first_document, end_document in manifest.splits[split]:
        if manifest.prompts:
            index = read_index(Path(folder) / f"{stem}.idx", first_document, end_document)
            ends = first + index[:, 0].cumsum(dtype=np.int64)
            texts = ends - index[:, 0] + index[:, 2]  # where the text of each document begins, behind its prompt
        for start in range(first, end, _COUNTED_TOKENS):  # no memory map: its pages would count as ours
            size = min(_COUNTED_TOKENS, end - start)
            flat = np.fromfile(Path(folder) / f"{stem}.bin", dtype, size, offset=start * dtype.itemsize)
            if manifest.prompts:
                places = np.arange(start, start + size)
                flat = flat[places >= texts[np.searchsorted(ends, places, side="right")]]
            counts += np.bincount(flat, minlength=manifest.vocab_size)
    return counts


def document_lengths(folder: Path, ranges: list) -> list[list[int]]:
    """Manifest.lengths of the documents in these ranges of shards."""
    counts = np.zeros(LONGEST + 1, np.int64)
    for stem, _, _, first_document, end_document in ranges:
        index = read_index(folder / f"{stem}.idx", first_document, end_document)
        counts += np.bincount(np.minimum(index[:, 0] - index[:, 2], LONGEST), minlength=LONGEST + 1)
    return [[int(size), int(counts[size])] for size in np.flatnonzero(counts)]


def _settings(data: DataConfig, tokenizer: TokenizerConfig, validation: int) -> dict:
    """What decides the tokens beside the contents of files, so no paths; None where it cannot matter.

    validation: number of validation files, the last of the sources.
    """
    trained = tokenizer.kind == "bpe" and not tokenizer.file
    files = bool(data.files or data.validation)
    split = None if data.validation else data.split
    cut = tokenizers.cutting_pattern(tokenizer.pattern)
    return {
        "data.source": data.source,
        "data.format": data.format if files else None,
        "data.text_field": data.text_field if files else None,
        "data.prompt_field": data.prompt_field,
        **({"data.chat": True} if data.chat else {}),  # folders of before know neither
        **({"data.features_field": [data.features_field, data.feature_places, data.feature_width]}
           if data.features_field else {}),
        "data.txt_documents": data.txt_documents if files else None,
        "data.detokenize": data.detokenize,
        _VALIDATION: validation,
        "data.split": split,
        "data.validation_fraction": data.validation_fraction if split == "hash" else None,
        "data.validation_documents": data.validation_documents if split == "last" else None,
        "data.stream": data.stream,
        "data.sample_bytes": data.sample_bytes if data.stream else None,
        "tokenizer.kind": tokenizer.kind,
        "tokenizer.file": bool(tokenizer.file),
        "tokenizer.vocab_size": tokenizer.vocab_size if trained else None,
        "tokenizer.pattern": None if cut == tokenizers.PATTERN else cut,
    }


_VALIDATION = "files of data.validation"  # in settings: how many


def what_to_read(data: DataConfig, say: Callable[[str], None] = lambda line: None
                 ) -> tuple[Reader, list[str], list[str]]:
    """How documents are read, the training sources and the validation files; say: gets what folders hold."""
    reader = Reader(data.text_field, data.prompt_field, data.txt_documents, data.format, data.detokenize, data.chat,
                    data.features_field, (data.feature_places, data.feature_width))
    train = [EMBEDDED] if data.source == "embedded" else resolve(data.files, "data.files", data.format, say)
    valid = resolve(data.validation, "data.validation", data.format, say) if data.validation else []
    return reader, train, valid


class _Seen:
    """Size and sha256 of files, hashed where size or time is not that of the last time (verified.json of a folder)."""

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self._path, self._marks, self._new, self._say = folder / VERIFIED, {}, False, say
        with contextlib.suppress(OSError, ValueError):
            self._marks = {name: mark for name, mark in jsons.read_json(self._path).items()
                           if isinstance(mark, list) and len(mark) == 3}

    def facts(self, path: Path, name: str = "") -> tuple[int, str]:
        """name: the file is remembered by, else its absolute path. OSError: it cannot be read."""
        name, state = name or os.path.abspath(path), path.stat()
        if self._marks.get(name, [])[:2] != [state.st_size, state.st_mtime_ns]:
            self._marks[name], self._new = [state.st_size, state.st_mtime_ns, jsons.sha256_of(path)], True
        return state.st_size, self._marks[name][2]

    def save(self) -> None:
        if self._new:
            self._new = False  # of a folder that cannot be written: they are hashed again each time
            try:
                jsons.write_json(self._path, self._marks, indent=None)
            except OSError as error:
                self._say(f"tokens: {self._path} cannot be written ({error.strerror}); files are hashed again the next "
                          "time")


def _facts(sources: list[str], tokenizer: TokenizerConfig, seen: _Seen) -> list[list]:
    """`source_facts` each source (many of them may be a network away), then of tokenizer.file if there is one."""
    with futures.ThreadPoolExecutor(16) as pool:
        facts = list(pool.map(lambda source: source_facts(source, lambda path: seen.facts(Path(path))), sources))
    if not tokenizer.file:
        return facts
    file = deciding_file(expand(tokenizer.file))  # of tokenizer.kind='hub' the one in a folder
    try:
        return [*facts, [file.name, *seen.facts(file)]]
    except OSError as error:
        raise ValueError(f"tokenizer.file {tokenizer.file!r} cannot be read: {error.strerror}") from None


def _begin(job: shards.Job, settings: dict, sources: list, tokenizer: TokenizerConfig, last: int,
           say: Callable[[str], None]) -> tuple[tokenizers.Tokenizer, dict]:
    """The tokenizer, made or loaded, and the facts in begun.json, which all workers must agree on."""
    path = job.folder / BEGUN
    begun = jsons.read_json(path, "version", "settings", "sources", optional=True)
    if begun:
        jsons.of_types(path, begun, {"settings": dict, "sources": list})
        if begun["version"] != VERSION:
            raise ValueError(f"{path} is of version {begun['version']}; delete {job.folder} and prepare again")
        different = _difference(begun["settings"], begun["sources"], settings, sources)
        if different and any(job.folder.glob("unit-*.json")):
            raise _different(job.folder, "begun", different)
        if not different:
            words = tokenizers.load_tokenizer(job.folder)
            if words.fingerprint != begun["tokenizer_fingerprint"]:
                raise ValueError(f"the tokenizer in {job.folder} is not the one its tokens were begun with: delete it")
            return words, begun
    used = 0

    def texts() -> Iterator[str]:
        nonlocal used
        for text in _training_texts(job, last):
            used += len(text.encode("utf-8"))
            yield text

    trained = tokenizer.kind == "bpe" and not tokenizer.file
    words = tokenizers.make_tokenizer(tokenizer.kind, tokenizer.vocab_size, texts() if trained else None,
                                      tokenizer.file, tokenizer.sha256, tokenizer.pattern)
    if trained and words.vocab_size < tokenizer.vocab_size:
        say(f"tokenizer: the corpus holds merges for V={words.vocab_size:,} only, "
            f"{tokenizer.vocab_size:,} were asked for (tokenizer.vocab_size)")
    words.save(job.folder)  # other workers may be at it too: they write the same
    begun = {"version": VERSION, "settings": settings, "sources": sources,
             "tokenizer_fingerprint": words.fingerprint, "bpe_training_bytes": used}
    write_json(path, begun, indent=2)
    return words, begun


def _training_texts(job: shards.Job, last: int) -> Iterator[str]:
    """What a BPE is trained on: of each training unit an equal share of BPE_TRAINING_BYTES."""
    train = [unit for unit, (_, split) in enumerate(job.units) if split == "train"]
    end = _last(job, train, last) if last else (len(train), 0)
    for unit in train:
        left = BPE_TRAINING_BYTES // len(train)
        for number, document in enumerate(job.reader.documents(job.units[unit][0])):
            if left <= 0 or (unit, number) >= end:
                break
            if job.split(unit, document) == "train":
                # Cutting characters, not bytes, keeps the text valid; a hair over the share does not matter.
                for part in filter(None, (document.prompt, document.text)):
                    part = part[:max(0, left)]
                    left -= len(part.encode("utf-8"))
                    yield part


def _last(job: shards.Job, train: list[int], count: int) -> tuple[int, int]:
    """(unit, document in it) where the last `count` documents of the training units begin."""
    for unit in reversed(train):
        here = sum(1 for _ in job.reader.documents(job.units[unit][0]))
        if here >= count:
            return unit, here - count
        count -= here
    return 0, 0


def _merge(job: shards.Job, words: tokenizers.Tokenizer, begun: dict, last: int, verify: bool,
           say: Callable[[str], None]) -> Manifest:
    """Writes the manifest of a folder whose units are all done; verify: after hashing the shards once more."""
    records = [record for unit in range(len(job.units)) if (record := shards.load_record(job, unit))]
    bad, read = sum(record.bad for record in records), sum(record.records for record in records)
    if bad:
        first = next(record.first_bad for record in records if record.bad)
        check_bad(job.bad_share, bad, read, first, str(job.folder))
        say(f"tokens: {bad:,} of {read:,} records cannot be read, all in {job.folder / BAD_RECORDS}; the first: "
            f"{Bad(*first)}")
    made = {name: facts for record in records for name, facts in sorted(record.files.items())}
    with shards.Files() as files:
        for name in made:
            if name.startswith("bad-"):
                files.write(job.folder / BAD_RECORDS, (job.folder / name).read_bytes())
        files.finish()

    splits: dict[str, list[Range]] = {split: [shard for record in records for shard in record.shards
                                              if shard.stem.startswith(split)] for split in ("train", "valid")}
    if last:
        splits["train"], splits["valid"] = _cut(job.folder, splits["train"], last)
    for split, ranges in splits.items():
        if not ranges:
            for unit in range(len(records)):  # of no use with these settings: others may be tried at once
                job.record_path(unit).unlink(missing_ok=True)
            total = sum(shard.documents for ranges in splits.values() for shard in ranges)
            raise ValueError(f"no document of {total} falls in the {split} split: give more documents "
                             "(data.txt_documents='blank_line' cuts a .txt), data.validation files, or "
                             "another data.validation_fraction or data.validation_documents")
    manifest = Manifest(
        version=VERSION, settings=begun["settings"], sources=begun["sources"], tokenizer_kind=words.kind,
        tokenizer_fingerprint=words.fingerprint, vocab_size=words.vocab_size, eot=words.eot, dtype=job.dtype,
        prompts=job.prompts, **{f"{split}_{name}": sum(getattr(shard, name) for shard in ranges)
                                for split, ranges in splits.items() for name in _COUNTS}, unigram_nats=math.nan,
        corpus_fingerprint=f"{sum(int(record.digests, 16) for record in records) % 2**256:064x}",
        bpe_training_bytes=begun["bpe_training_bytes"], left_out=sum(record.left_out for record in records), bad=bad,
        unreadable=embedded_corpus()[1] if job.units[0][0] == EMBEDDED else 0,
        sampled=job.sample > 0, python=platform.python_version(),
        splits={split: [list(shard[:5]) for shard in ranges] for split, ranges in splits.items()},
        shards={name: facts for name, facts in made.items() if not name.startswith("bad-")}, lengths=[],
        features=list(job.reader.feature_shape) if job.reader.features_field else [])
    if verify and (damage := _damage(job.folder, manifest, _Seen(job.folder, say))):
        name, what = damage[0]
        raise ValueError(f"{job.folder / name} is {what}: delete it and run --mode=prepare, which makes it again")
    train, valid = (token_counts(job.folder, split, manifest) for split in ("train", "valid"))
    manifest = dataclasses.replace(manifest, unigram_nats=unigram_nats(train, valid),
                                   lengths=document_lengths(job.folder, manifest.splits["train"]))
    write_json(job.folder / MANIFEST, dataclasses.asdict(manifest), indent=2)
    return manifest


def _cut(folder: Path, ranges: list[Range], last: int) -> tuple[list[Range], list[Range]]:
    """The shards, cut before the last so many documents."""
    left = sum(shard.end_document for shard in ranges) - last
    head, tail = [], []
    for shard in ranges:
        here = min(max(left, 0), shard.end_document)
        left -= shard.end_document
        index = read_index(folder / f"{shard.stem}.idx")
        (size, _, *counts), (_, _, *rest) = totals(index[:here]).tolist(), totals(index[here:]).tolist()
        if here:
            head.append(Range(shard.stem, 0, size, 0, here, *counts))
        if here < shard.end_document:
            tail.append(Range(shard.stem, size, shard.end_token, here, shard.end_document, *rest))
    return head, tail


def _difference(was: dict, were: list, now: dict, are: list | None) -> str:
    """The first setting or file that differs, in words; files only where they are at hand (not None)."""
    for key in now | was:
        if was.get(key) != now.get(key):
            return f"with {key}={was.get(key)!r}, it is now {now.get(key)!r}"
    before, here = [identity(fact) for fact in were], [identity(fact) for fact in are or []]
    if are is None or here == before:
        return ""
    for facts, those in ((are, set(before)), (were, set(here))):
        for fact in facts:
            if identity(fact) not in those:
                return f"from other files: {fact[0]} ({fact[1]} bytes) was added, removed or has other contents"
    return f"from these files in another order, the first {were[0][0]}, it is now {are[0][0]}"


def _different(folder: Path, verb: str, difference: str) -> ValueError:
    return ValueError(f"tokens in {folder} were {verb} {difference}: use another working directory or delete {folder}")


def _of_version_2(manifest: Manifest) -> tuple[dict, list]:
    """Settings and sources of a manifest that knew paths, names and sizes, in today's terms: no paths, no marks."""
    was = dict(manifest.settings)
    patterns, file = was.pop("data.validation"), was.pop("tokenizer.file")
    del was["data.files"], was["tokenizer.sha256"]
    first = min(int(stem.split("-")[1]) for stem, *_ in manifest.splits["valid"])  # of the validation files' units
    count = len(manifest.sources) - bool(file) - first if patterns else 0
    return was | {_VALIDATION: count, "tokenizer.file": bool(file)}, [[*fact, ""] for fact in manifest.sources]


def _at_hand(data: DataConfig, tokenizer: TokenizerConfig, manifest: Manifest, seen: _Seen
             ) -> tuple[list | None, int, str]:
    """Facts of the sources (None where they are not on this machine), how many are validation files, why None."""
    if data.source == "embedded" and not data.stream and manifest.python != platform.python_version():
        return None, len(data.validation), f" (its source is the documentation inside Python {manifest.python})"
    try:
        _, train, valid = what_to_read(data)
        return _facts([*train, *valid], tokenizer, seen), len(valid), ""
    except (ValueError, OSError):
        return None, len(data.validation), " (its source files are not on this machine)"


def _reuse(folder: Path, data: DataConfig, tokenizer: TokenizerConfig, say: Callable[[str], None]) -> Manifest | None:
    """The manifest of a folder that is whole; None, and no manifest, where parts are missing and can be made again."""
    manifest, seen = load_manifest(folder), _Seen(folder, say)
    sources, validation, absent = _at_hand(data, tokenizer, manifest, seen)
    settings = _settings(data, tokenizer, validation)
    was, were, are = manifest.settings, manifest.sources, sources
    if manifest.version == 2:
        was, were = _of_version_2(manifest)
        are = sources and [[name, size, ""] for name, size, _ in sources]
    if sources is None and validation and was[_VALIDATION]:  # patterns, of which nobody knows how many files match
        settings[_VALIDATION] = was[_VALIDATION]
    if different := _difference(was, were, settings, are):
        raise _different(folder, "made", different)
    _check_sha256(tokenizer, sources)
    for name, what in _damage(folder, manifest, seen):
        if sources is None:
            raise ValueError(f"{folder / name} is {what}, and its source files are not on this machine: copy it again")
        if what == "damaged":
            raise ValueError(f"{folder / name} is damaged: delete it and run --mode=prepare, which makes it again")
        say(f"tokens: {folder / name} is missing; it is made again")
        (folder / MANIFEST).unlink()
        return None
    if tokenizers.load_tokenizer(folder).fingerprint != manifest.tokenizer_fingerprint:
        raise ValueError(f"the tokenizer in {folder} is not the one the tokens were made with: "
                         f"use another working directory or delete {folder}")
    say(f"tokens: reusing {folder}{absent}: {manifest.summary()}")
    return manifest


def _check_sha256(tokenizer: TokenizerConfig, sources: list | None) -> None:
    if tokenizer.file and sources:
        jsons.check_sha256(tokenizer.file, sources[-1][2], tokenizer.sha256)


def _damage(folder: Path, manifest: Manifest, seen: _Seen) -> list[tuple[str, str]]:
    """(file, 'damaged' or 'missing') of the shards that are not as the manifest says, damaged ones first."""
    def look(name: str) -> tuple[str, str]:
        try:
            size, sha256 = seen.facts(folder / name, name)
        except FileNotFoundError:
            return "missing", name
        return "" if {"bytes": size, "sha256": sha256} == manifest.shards[name] else "damaged", name

    with futures.ThreadPoolExecutor(shards.core_count()) as pool:
        looks = sorted(pool.map(look, manifest.shards))
    seen.save()
    return [(name, what) for what, name in looks if what]
