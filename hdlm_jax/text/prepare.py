"""Documents -> a folder of tokens, made on all cores or by many workers, gone on with after a kill, and reused.

Every source file is a unit with shards of its own (units.py). When all units are done, whoever sees it writes
`manifest.json`, last of all: its presence says that the rest is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np

from hdlm_jax import jsons
from hdlm_jax.text import corpus, tokens, units

MANIFEST, BEGUN, VERIFIED, BAD_RECORDS = "manifest.json", "begun.json", "verified.json", "bad_records.jsonl"
VERSION = 2
BPE_TRAINING_BYTES = 100_000_000
_COUNTED_TOKENS = 1 << 20


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of tokens holds. Counts are of whole splits; a token count includes the ends of text,
    bytes are raw UTF-8 bytes of the documents (an end of text has none). `scored` leaves prompts out.

    settings, sources: what was asked for, and [name, size] of each file read; `prepare` compares them.
    prompts: whether documents may begin with a prompt (their lengths are in the .idx files).
    unigram_nats: nats per scored validation token (end of text counted) under the unigram of the scored
      training tokens, add-one smoothed over the V words.
    corpus_fingerprint: sum of the documents' sha256 modulo 2^256, 64 hex digits: no order, no files in it.
    bpe_training_bytes: bytes of text a BPE was trained on.
    left_out: training documents left out because they are equal to a document of the validation files.
    bad: records that could not be read; bad_records.jsonl lists them.
    unreadable: source files of the embedded corpus that could not be read.
    sampled: the training split is a sample (data.stream trains on the documents themselves).
    splits: "train" and "valid": [stem, first token, end token, first document, end document] of each range, in
      the order of the documents; a range lies in the shard stem.bin and its index stem.idx.
    shards: file name -> {"bytes", "sha256"}.
    """

    version: int
    settings: dict
    sources: list
    tokenizer_kind: str
    tokenizer_fingerprint: str
    vocab_size: int
    eot: int
    dtype: str
    prompts: bool
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
    unigram_nats: float
    corpus_fingerprint: str
    bpe_training_bytes: int
    left_out: int
    bad: int
    unreadable: int
    sampled: bool
    python: str
    splits: dict
    shards: dict

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
            facts += [self.settings, self.sources]
        return hashlib.sha256(jsons.dumps(facts).encode()).hexdigest()

    def summary(self) -> str:
        """One line for people."""
        sample = "a sample of " if self.sampled else ""
        return (f"{sample}{self.train_tokens:,} training and {self.valid_tokens:,} validation tokens "
                f"({self.train_documents:,} and {self.valid_documents:,} documents), V={self.vocab_size:,} "
                f"({self.tokenizer_kind}), unigram {self.unigram_nats:.4f} nats/token, "
                f"corpus {self.corpus_fingerprint[:12]}")


def load_manifest(folder: str | os.PathLike) -> Manifest:
    """The manifest of a folder of tokens; ValueError when there is none, or one of another version."""
    path = Path(folder) / MANIFEST
    facts = units.read_json(path)
    if facts is None:
        raise ValueError(f"no tokens in {folder} ({MANIFEST} is missing); run --mode=prepare")
    if facts.get("version") != VERSION:
        raise ValueError(f"{path}: version is {facts.get('version')}, this code reads {VERSION}; "
                         "delete the folder and prepare again")
    return Manifest(**facts)


# ---------------------------------------------------------------------------------------------------- prepare


def prepare(out_dir: str | os.PathLike, data: Any, tokenizer: Any, *,
            say: Callable[[str], None] | None = None) -> Manifest | None:
    """Makes the folder of tokens, goes on making it, or reuses it when it was made with the same settings and files.

    Documents stream from their files to the disk; what is held is some batches of about a megabyte a core. Killed
    at any moment, the next call goes on after the shards that were closed, to the same bytes.

    Args:
      out_dir: the folder. data, tokenizer: the settings, `config.Data` and `config.Tokenizer`.
        data.prepare_shard='i/n': only the units u with u % n == i are made by this call.
      say: gets a line on what is made, reused or missing (default: absl's log).
    Returns: the manifest; None where other workers' units are missing still (said).
    Raises:
      ValueError: one line; settings or files that differ from those the folder was made with are named.
      OSError: the disk is full, read-only or the like; what was finished stays and counts.
    """
    if say is None:
        from absl import logging
        say = logging.info
    data.check()
    tokenizer.check()
    folder = Path(out_dir)
    settings = _settings(data, tokenizer)
    if (folder / MANIFEST).exists():
        manifest = _reuse(folder, settings, data, tokenizer, say)
        if manifest is not None:
            return manifest

    start = time.monotonic()
    reader, train, valid = what_to_read(data)
    for source in [*train, *valid]:
        reader.check(source)
    facts = _facts([*train, *valid])
    sources = facts + _tokenizer_file(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    units.remove_leftovers(folder)
    job = units.Job(
        folder=folder, id="", reader=reader, held=held_out(reader, valid), prompts=bool(data.prompt_field),
        units=tuple((source, "train") for source in train) + tuple((source, "valid") for source in valid),
        fraction=data.validation_fraction if data.split == "hash" and not valid else 0.0,
        sample=max(1, data.sample_bytes // len(train)) if data.stream else 0,
        bad_share=data.bad_share, dtype="", shard_tokens=units.SHARD_TOKENS, batch_chars=units.BATCH_CHARS)
    last = data.validation_documents if data.split == "last" and not valid else 0
    words, begun = _begin(job, settings, sources, tokenizer, last, say)
    job = dataclasses.replace(job, id=_hash(begun), dtype="uint16" if words.vocab_size <= 65535 else "uint32")

    index, workers = data.worker()
    mine = [u for u in range(len(job.units)) if u % workers == index and not units.is_done(job, u)]
    units.make_all(job, words, mine, [size or 0 for _, size in facts])  # not every server tells sizes
    records = [units.load_record(job, u) for u in range(len(job.units))]
    missing = [u for u, record in enumerate(records) if record is None or not record.done]
    if missing:
        say(f"tokens: worker {index}/{workers} has done its part of {folder}; {len(missing)} of {len(records)} files "
            f"are left to others (the first, {job.units[missing[0]][0]}, to {missing[0] % workers}/{workers})")
        return None
    manifest = _merge(job, words, [record for record in records if record], begun, last, workers > 1, say)
    units.remove_leftovers(folder)
    say(f"tokens: made {folder} in {time.monotonic() - start:.1f} s: {manifest.summary()}")
    return manifest


def held_out(reader: corpus.Reader, sources: Iterable[str]) -> frozenset[bytes]:
    """Digests of all documents of the validation files `sources`: equal training documents are left out."""
    return frozenset(corpus.digest(document) for source in sources for document in units.documents(reader, source))


def unigram_nats(train_counts: np.ndarray, valid_counts: np.ndarray) -> float:
    """Nats per validation token under the add-one smoothed training unigram; both counts are [V]."""
    smoothed = train_counts + 1.0
    log_p = np.log(smoothed) - np.log(smoothed.sum())
    return float(-(valid_counts @ log_p) / valid_counts.sum())


def token_counts(folder: str | os.PathLike, split: str = "train", manifest: Manifest | None = None) -> np.ndarray:
    """How often each word is a scored token of a split ('train' or 'valid'), int64 [V]; read in pieces.

    manifest: that of the folder, where it is not on disk yet.
    """
    if split not in ("train", "valid"):
        raise ValueError(f"split is {split!r}; choices: train, valid")
    manifest = manifest or load_manifest(folder)
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    counts = np.zeros(manifest.vocab_size, np.int64)
    for stem, first, end, first_document, end_document in manifest.splits[split]:
        # Whole documents of about so many tokens at once. No memory map: its pages would count as ours.
        index = _read_index(Path(folder) / f"{stem}.idx", first_document, end_document)
        ends = index[:, 0].cumsum(dtype=np.int64)
        cuts = np.searchsorted(ends, np.arange(0, end - first, _COUNTED_TOKENS)[1:])
        for piece in np.split(index, np.unique(cuts)):
            size = int(piece[:, 0].sum(dtype=np.int64))
            flat = np.fromfile(Path(folder) / f"{stem}.bin", dtype, size, offset=first * dtype.itemsize)
            first += size
            if manifest.prompts:
                lengths = np.stack([piece[:, 2], piece[:, 0] - piece[:, 2]], 1).ravel()
                flat = flat[np.repeat(np.tile([False, True], len(piece)), lengths)]
            counts += np.bincount(flat, minlength=manifest.vocab_size)
    return counts


def _settings(data: Any, tokenizer: Any) -> dict:
    """What decides the tokens; what cannot matter is None, so that it cannot differ."""
    trained = tokenizer.kind == "bpe" and not tokenizer.file
    files = bool(data.files or data.validation)
    split = None if data.validation else data.split
    return {
        "data.source": data.source,
        "data.files": list(data.files),
        "data.format": data.format if files else None,
        "data.text_field": data.text_field if files else None,
        "data.prompt_field": data.prompt_field,
        "data.txt_documents": data.txt_documents if files else None,
        "data.detokenize": data.detokenize,
        "data.validation": list(data.validation),
        "data.split": split,
        "data.validation_fraction": data.validation_fraction if split == "hash" else None,
        "data.validation_documents": data.validation_documents if split == "last" else None,
        "data.stream": data.stream,
        "data.sample_bytes": data.sample_bytes if data.stream else None,
        "tokenizer.kind": tokenizer.kind,
        "tokenizer.file": tokenizer.file,
        "tokenizer.sha256": tokenizer.sha256,
        "tokenizer.vocab_size": tokenizer.vocab_size if trained else None,
    }


def what_to_read(data: Any) -> tuple[corpus.Reader, list[str], list[str]]:
    """How documents are read, the training sources and the validation files."""
    reader = corpus.Reader(text_field=data.text_field, prompt_field=data.prompt_field, detokenize=data.detokenize,
                           txt_documents=data.txt_documents, format=data.format)
    return (reader, [corpus.EMBEDDED] if data.source == "embedded" else corpus.resolve(data.files),
            corpus.resolve(data.validation, "data.validation") if data.validation else [])


def _facts(sources: list[str]) -> list[list]:
    """[name, size] of each source; many of them may be a network away."""
    with futures.ThreadPoolExecutor(16) as pool:
        return list(pool.map(corpus.facts_of, sources))


def _tokenizer_file(tokenizer: Any) -> list[list]:
    if not tokenizer.file:
        return []
    path = Path(os.path.expanduser(os.path.expandvars(tokenizer.file)))
    try:
        return [[path.name, path.stat().st_size]]
    except OSError as error:
        raise ValueError(f"tokenizer.file {tokenizer.file!r} cannot be read: {error.strerror}") from None


def _hash(facts: dict) -> str:
    return hashlib.sha256(jsons.dumps(facts, sort_keys=True).encode()).hexdigest()


# --------------------------------------------------------------------------------------- beginning and finishing


def _begin(job: units.Job, settings: dict, sources: list, tokenizer: Any, last: int,
           say: Callable[[str], None]) -> tuple[tokens.Tokenizer, dict]:
    """The tokenizer, made or loaded, and the facts in begun.json, which all workers must agree on."""
    path = job.folder / BEGUN
    begun = units.read_json(path)
    if begun:
        if any(job.folder.glob("unit-*.json")):
            _compare(job.folder, "begun", begun["settings"], settings, begun["sources"], sources)
        if (begun["version"], begun["settings"], begun["sources"]) == (VERSION, settings, sources):
            words = tokens.load_tokenizer(job.folder)
            if words.fingerprint != begun["tokenizer_fingerprint"]:
                raise ValueError(f"the tokenizer in {job.folder} is not the one its tokens were begun with: delete it")
            return words, begun
    used = 0

    def training_texts() -> Iterator[str]:
        nonlocal used
        train = [unit for unit, (_, split) in enumerate(job.units) if split == "train"]
        end = _last(job, train, last) if last else (len(train), 0)
        for unit in train:
            left = BPE_TRAINING_BYTES // len(train)
            for number, document in enumerate(units.documents(job.reader, job.units[unit][0])):
                if left <= 0 or (unit, number) >= end:
                    break
                if job.split(unit, document) != "train":
                    continue
                # Cutting characters, not bytes, keeps the text valid; a hair over the share does not matter.
                for part in filter(None, (document.prompt, document.text)):
                    part = part[:max(0, left)]
                    size = len(part.encode("utf-8"))
                    left -= size
                    used += size
                    yield part

    trained = tokenizer.kind == "bpe" and not tokenizer.file
    words = tokens.make_tokenizer(tokenizer.kind, tokenizer.vocab_size, training_texts() if trained else None,
                                  tokenizer.file, tokenizer.sha256)
    if trained and words.vocab_size < tokenizer.vocab_size:
        say(f"tokenizer: the corpus holds merges for V={words.vocab_size:,} only, "
            f"{tokenizer.vocab_size:,} were asked for (tokenizer.vocab_size)")
    with units.private_folder(job.folder / "tokenizer") as private:  # other workers may be at it too
        words.save(private)
        for made in private.iterdir():
            os.replace(made, job.folder / made.name)
    begun = {"version": VERSION, "settings": settings, "sources": sources,
             "tokenizer_fingerprint": words.fingerprint, "bpe_training_bytes": used}
    units.write_file(path, jsons.dumps(begun, indent=2).encode() + b"\n")
    return words, begun


def _last(job: units.Job, train: list[int], count: int) -> tuple[int, int]:
    """(unit, document in it) where the last `count` documents of the training units begin."""
    for unit in reversed(train):
        here = sum(1 for _ in units.documents(job.reader, job.units[unit][0]))
        if here >= count:
            return unit, here - count
        count -= here
    return 0, 0


def _merge(job: units.Job, words: tokens.Tokenizer, records: list[units.Record], begun: dict, last: int,
           verify: bool, say: Callable[[str], None]) -> Manifest:
    """Writes the manifest of a folder whose units are all done; verify: after hashing the shards once more."""
    bad, read = sum(record.bad for record in records), sum(record.records for record in records)
    if bad:
        first = next(record.first_bad for record in records if record.bad)
        units.check_bad(job, bad, read, first)
        say(f"tokens: {bad:,} of {read:,} records cannot be read, all in {job.folder / BAD_RECORDS}; the first: "
            f"{first[0]}, {first[1]}: {first[2]}")
    with units.Files() as files:
        for record in records:
            for name in sorted(record.files):
                if name.startswith("bad-"):
                    files.write(job.folder / BAD_RECORDS, (job.folder / name).read_bytes())
        files.close()

    splits: dict[str, list[units.Range]] = {"train": [], "valid": []}
    for record in records:
        for shard in record.shards:
            splits[shard.stem.split("-")[0]].append(shard)
    if last:
        splits["train"], splits["valid"] = _cut(job.folder, splits["train"], last)
    total = sum(shard.end_document - shard.first_document for shards in splits.values() for shard in shards)
    for split, shards in splits.items():
        if not shards:
            for unit in range(len(records)):  # of no use with these settings: others may be tried at once
                job.record_path(unit).unlink(missing_ok=True)
            raise ValueError(f"no document of {total} falls in the {split} split: give more documents "
                             "(data.txt_documents='blank_line' cuts a .txt), data.validation files, or "
                             "another data.validation_fraction or data.validation_documents")
    counts = {}
    for split, shards in splits.items():
        counts[f"{split}_documents"] = sum(shard.end_document - shard.first_document for shard in shards)
        counts[f"{split}_tokens"] = sum(shard.end_token - shard.first_token for shard in shards)
        for name in ("bytes", "scored_tokens", "scored_bytes"):
            counts[f"{split}_{name}"] = sum(getattr(shard, name) for shard in shards)
    manifest = Manifest(
        version=VERSION, settings=begun["settings"], sources=begun["sources"], tokenizer_kind=words.kind,
        tokenizer_fingerprint=words.fingerprint, vocab_size=words.vocab_size, eot=words.eot, dtype=job.dtype,
        prompts=job.prompts, **counts, unigram_nats=math.nan,
        corpus_fingerprint=f"{sum(int(record.digests, 16) for record in records) % 2**256:064x}",
        bpe_training_bytes=begun["bpe_training_bytes"], left_out=sum(record.left_out for record in records), bad=bad,
        unreadable=corpus.embedded_corpus()[1] if job.units[0][0] == corpus.EMBEDDED else 0,
        sampled=job.sample > 0, python=platform.python_version(),
        splits={split: [list(shard[:5]) for shard in shards] for split, shards in splits.items()},
        shards={name: facts for record in records for name, facts in sorted(record.files.items())
                if not name.startswith("bad-")})
    if verify and (damage := _damage(job.folder, manifest)):
        name, what = damage[0]
        raise ValueError(f"{job.folder / name} is {what}: delete it and run --mode=prepare, which makes it again")
    train, valid = (token_counts(job.folder, split, manifest) for split in ("train", "valid"))
    manifest = dataclasses.replace(manifest, unigram_nats=unigram_nats(train, valid))
    units.write_file(job.folder / MANIFEST, jsons.dumps(dataclasses.asdict(manifest), indent=2).encode() + b"\n")
    return manifest


def _read_index(path: Path, first_document: int = 0, end_document: int = -1) -> np.ndarray:
    """Documents of an .idx file, uint32 [documents, 4]."""
    count = 4 * (end_document - first_document) if end_document >= 0 else -1
    return np.fromfile(path, "<u4", count, offset=16 * first_document).reshape(-1, 4)


def _cut(folder: Path, shards: list[units.Range], last: int) -> tuple[list[units.Range], list[units.Range]]:
    """The shards, cut before the last so many documents."""
    left = sum(shard.end_document for shard in shards) - last
    head, tail = [], []
    for shard in shards:
        here = min(max(left, 0), shard.end_document)
        left -= shard.end_document
        size, raw, prompt, raw_prompt = _read_index(folder / f"{shard.stem}.idx")[:here].sum(0, dtype=np.int64).tolist()
        first = units.Range(shard.stem, 0, size, 0, here, raw, size - prompt, raw - raw_prompt)
        second = units.Range(shard.stem, size, shard.end_token, here, shard.end_document, shard.bytes - first.bytes,
                        shard.scored_tokens - first.scored_tokens, shard.scored_bytes - first.scored_bytes)
        head += [first] * (here > 0)
        tail += [second] * (here < shard.end_document)
    return head, tail


# -------------------------------------------------------------------------------------------------------- reuse


def _compare(folder: Path, verb: str, was: dict, now: dict, were: list, are: list | None) -> None:
    """ValueError that names the first setting or file that differs; files only where they are at hand."""
    advice = f"use another working directory or delete {folder}"
    for key in now | was:
        if was.get(key) != now.get(key):
            raise ValueError(f"tokens in {folder} were {verb} with {key}={was.get(key)!r}, it is now "
                             f"{now.get(key)!r}: {advice}")
    if are is not None and are != were:
        changed = [fact for fact in are if fact not in were] or [fact for fact in were if fact not in are] or are
        raise ValueError(f"tokens in {folder} were {verb} from other files: {changed[0][0]} ({changed[0][1]} "
                         f"bytes) was added, removed, moved or has another size: {advice}")


def _reuse(folder: Path, settings: dict, data: Any, tokenizer: Any, say: Callable[[str], None]) -> Manifest | None:
    """The manifest of a folder that is whole; None, and no manifest, where parts are missing and can be made again."""
    manifest = load_manifest(folder)
    try:
        _, train, valid = what_to_read(data)
        sources = _facts([*train, *valid]) + _tokenizer_file(tokenizer)
    except (ValueError, OSError):  # not on this machine; only the tokens are
        sources = None
    _compare(folder, "made", manifest.settings, settings, manifest.sources, sources)
    for name, what in _damage(folder, manifest):
        if sources is None:
            raise ValueError(f"{folder / name} is {what}, and its source files are not on this machine: copy it again")
        if what == "damaged":
            raise ValueError(f"{folder / name} is damaged: delete it and run --mode=prepare, which makes it again")
        say(f"tokens: {folder / name} is missing; it is made again")
        (folder / MANIFEST).unlink()
        return None
    if tokens.load_tokenizer(folder).fingerprint != manifest.tokenizer_fingerprint:
        raise ValueError(f"the tokenizer in {folder} is not the one the tokens were made with: "
                         f"use another working directory or delete {folder}")
    absent = "" if sources is not None else " (its source files are not on this machine)"
    say(f"tokens: reusing {folder}{absent}: {manifest.summary()}")
    return manifest


def _damage(folder: Path, manifest: Manifest) -> list[tuple[str, str]]:
    """(file, 'damaged' or 'missing') of the shards that are not as the manifest says, damaged ones first.

    A file is hashed if its size or time is not that of the last time it was (verified.json).
    """
    try:
        known = json.loads((folder / VERIFIED).read_text("utf-8"))
    except (OSError, ValueError):
        known = {}

    def look(name: str) -> tuple[str, list]:
        path, facts = folder / name, manifest.shards[name]
        try:
            state = path.stat()
        except FileNotFoundError:
            return "missing", []
        mark = [state.st_size, state.st_mtime_ns, facts["sha256"]]
        if known.get(name) == mark:
            return "", mark
        if state.st_size == facts["bytes"]:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == facts["sha256"]:
                    return "", mark
        return "damaged", []

    with futures.ThreadPoolExecutor(units.core_count()) as pool:
        looks = dict(zip(manifest.shards, pool.map(look, manifest.shards), strict=True))
    found = sorted((what, name) for name, (what, _) in looks.items() if what)
    marks = {name: mark for name, (_, mark) in looks.items()}
    if not found and marks != known:
        with contextlib.suppress(OSError):  # a folder that cannot be written is hashed again each time
            units.write_file(folder / VERIFIED, jsons.dumps(marks).encode() + b"\n")
    return [(name, what) for what, name in found]
