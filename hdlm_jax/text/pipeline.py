"""Documents -> token shards on disk -> batches of S packed tokens, a pure function of (seed, step).

`prepare` writes one folder: the tokenizer, `train.bin` and `valid.bin` (all documents of a split one after
the other, each closed by the end of text), with prompts also `*.mask.bin`, and last of all `manifest.json`,
whose presence says that the rest is whole. `TrainBatches` and `valid_rows` read that folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hdlm_jax.text import corpus, tokens

MANIFEST = "manifest.json"
VERSION = 1
PACKINGS = ("concat", "documents", "crop")
BPE_TRAINING_BYTES = 100_000_000
_VERIFY_BYTES = 1 << 30  # shards up to this size are hashed again before they are reused
_BATCH_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of tokens holds. Counts are of whole splits; a token count includes the ends of text,
    bytes are raw UTF-8 bytes of the documents (an end of text has none). `scored` leaves prompts out.

    unigram_nats: nats per scored validation token (end of text counted) under the unigram of the scored
      training tokens, add-one smoothed over the V words.
    corpus_fingerprint: sha256 of all documents in order (`corpus.Fingerprint`).
    settings, sources: what was asked for, and name and size of each file read; `prepare` compares them.
    shards: file name -> {"bytes", "sha256"}.
    left_out: training documents left out because they are equal to a document of the validation files.
    unreadable: source files of the embedded corpus that could not be read.
    """

    version: int
    settings: dict
    sources: list
    tokenizer_kind: str
    tokenizer_fingerprint: str
    vocab_size: int
    eot: int
    dtype: str
    masks: bool
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
    unreadable: int
    python: str
    shards: dict

    @property
    def unigram_bits_per_byte(self) -> float:
        """`unigram_nats` in bits per raw UTF-8 byte of the scored validation text."""
        return self.unigram_nats * self.valid_scored_tokens / self.valid_scored_bytes / np.log(2.0)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the tokens and the tokenizer: what a data position belongs to."""
        shards = sorted((name, facts["sha256"]) for name, facts in self.shards.items())
        facts = [self.tokenizer_fingerprint, shards]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def summary(self) -> str:
        """One line for people."""
        return (f"{self.train_tokens:,} training and {self.valid_tokens:,} validation tokens "
                f"({self.train_documents:,} and {self.valid_documents:,} documents), V={self.vocab_size:,} "
                f"({self.tokenizer_kind}), unigram {self.unigram_nats:.4f} nats/token, "
                f"corpus {self.corpus_fingerprint[:12]}")


def load_manifest(folder: str | os.PathLike) -> Manifest:
    """The manifest of a folder of tokens; ValueError when there is none, or one of another version."""
    path = Path(folder) / MANIFEST
    try:
        facts = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no tokens in {folder} ({MANIFEST} is missing); run --mode=prepare") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); delete the folder and prepare again") from None
    if facts.get("version") != VERSION:
        raise ValueError(f"{path}: version is {facts.get('version')}, this code reads {VERSION}; "
                         "delete the folder and prepare again")
    return Manifest(**facts)


def read_tokens(folder: str | os.PathLike, split: str = "train") -> np.ndarray:
    """All tokens of a split ('train' or 'valid') as a read-only array on disk, uint16 or uint32 [tokens]."""
    return _memmap(folder, split, load_manifest(folder))


def _memmap(folder: str | os.PathLike, split: str, manifest: Manifest, mask: bool = False) -> np.ndarray:
    if split not in ("train", "valid"):
        raise ValueError(f"split is {split!r}; choices: train, valid")
    dtype = np.dtype(np.uint8) if mask else np.dtype(manifest.dtype).newbyteorder("<")
    path = Path(folder) / (f"{split}.mask.bin" if mask else f"{split}.bin")
    # A plain ndarray over the map: slicing np.memmap itself costs microseconds a slice.
    return np.memmap(path, dtype, mode="r").view(np.ndarray)


# ---------------------------------------------------------------------------------------------------- prepare


def prepare(
    out_dir: str | os.PathLike,
    *,
    source: str = "embedded",
    files: str | Sequence[str] = (),
    text_field: str = "text",
    prompt_field: str = "",
    txt_documents: str = "file",
    validation: str | Sequence[str] = (),
    validation_fraction: float = 0.05,
    tokenizer_kind: str = "bpe",
    vocab_size: int = 4096,
    tokenizer_file: str = "",
    tokenizer_sha256: str = "",
    bpe_training_bytes: int = BPE_TRAINING_BYTES,
    say: Callable[[str], None] | None = None,
) -> Manifest:
    """Makes the folder of tokens, or reuses it when it was made with the same settings and files.

    Documents stream from the source to the disk; what is held is one batch of some megabytes. A stage that
    was interrupted leaves no manifest and is done again.

    Args:
      out_dir: the folder. source ... txt_documents: see `corpus.documents`.
      validation: files or globs of a validation split of their own; training documents equal to one of theirs
        are left out. Empty: documents fall in validation by their sha256, a share of `validation_fraction`.
      tokenizer_kind, vocab_size, tokenizer_file, tokenizer_sha256: see `tokens.make_tokenizer`.
      bpe_training_bytes: a BPE is trained on at most so many bytes of training documents: an equal share of
        each file (its beginning), so that the last file counts as much as the first.
      say: gets one line on what is made or reused (default: absl's log).
    Raises:
      ValueError: one line; settings that differ from those the folder was made with are named.
    """
    if say is None:
        from absl import logging
        say = logging.info
    folder = Path(out_dir)
    files, validation = _patterns(files), _patterns(validation)
    if source not in corpus.SOURCES:
        raise ValueError(f"data.source is {source!r}; choices: {', '.join(corpus.SOURCES)}")
    if source == "embedded" and (files or prompt_field):
        raise ValueError("data.files and data.prompt_field need data.source='files', it is 'embedded'")
    if not validation and not 0.0 < validation_fraction < 1.0:
        raise ValueError(f"data.validation_fraction is {validation_fraction}; must be between 0 and 1")
    trained = tokenizer_kind == "bpe" and not tokenizer_file
    settings = {  # what cannot matter is set to None, so that it cannot differ
        "data.source": source,
        "data.files": files,
        "data.text_field": text_field if files or validation else None,
        "data.prompt_field": prompt_field,
        "data.txt_documents": txt_documents if files or validation else None,
        "data.validation": validation,
        "data.validation_fraction": None if validation else validation_fraction,
        "tokenizer.kind": tokenizer_kind,
        "tokenizer.file": tokenizer_file,
        "tokenizer.sha256": tokenizer_sha256,
        "tokenizer.vocab_size": vocab_size if trained else None,
        "data.bpe_training_bytes": bpe_training_bytes if trained else None,
    }
    if (folder / MANIFEST).exists():
        return _reuse(folder, settings, say)

    start = time.monotonic()
    reader = functools.partial(corpus.read_file, text_field=text_field, prompt_field=prompt_field,
                               txt_documents=txt_documents)
    train_paths = corpus.resolve(files) if source == "files" else []
    valid_paths = corpus.resolve(validation, "data.validation") if validation else []

    @functools.cache
    def held_out() -> set[bytes]:
        return {corpus.digest(document) for path in valid_paths for document in reader(path)}

    def is_valid(document: corpus.Document) -> bool:
        if validation:
            return corpus.digest(document) in held_out()
        return corpus.split(document, validation_fraction)

    def groups() -> Iterator[Iterator[corpus.Document]]:
        """The documents of the training source, file by file."""
        if source == "embedded":
            yield iter(corpus.embedded_corpus()[0])
        for path in train_paths:
            yield reader(path)

    used = 0

    def training_texts() -> Iterator[str]:
        nonlocal used
        share = bpe_training_bytes // max(1, len(train_paths))
        for group in groups():
            left = share
            for document in group:
                if is_valid(document):
                    continue
                if left <= 0:
                    break
                # Cutting characters, not bytes, keeps the text valid; a hair over the share does not matter.
                for part in filter(None, (document.prompt, document.text)):
                    part = part[:max(0, left)]
                    size = len(part.encode("utf-8"))
                    left -= size
                    used += size
                    yield part

    tokenizer = tokens.make_tokenizer(tokenizer_kind, vocab_size, training_texts() if trained else None,
                                      tokenizer_file, tokenizer_sha256)
    if trained and tokenizer.vocab_size < vocab_size:
        say(f"tokenizer: the corpus holds merges for V={tokenizer.vocab_size:,} only, "
            f"{vocab_size:,} were asked for (tokenizer.vocab_size)")

    left_out = 0

    def labelled() -> Iterator[tuple[corpus.Document, bool]]:
        nonlocal left_out
        for path in valid_paths:
            for document in reader(path):
                yield document, True
        for group in groups():
            for document in group:
                held = is_valid(document)
                if held and validation:
                    left_out += 1
                else:
                    yield document, held

    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 65535 else np.uint32)
    fingerprint = corpus.Fingerprint()
    with contextlib.ExitStack() as stack:
        shards = {name: stack.enter_context(_Shard(folder, name, dtype, tokenizer, bool(prompt_field)))
                  for name in ("train", "valid")}
        bar = stack.enter_context(_progress())
        for batch in _batches(labelled()):
            texts = tokenizer.encode_batch([document.text for document, _ in batch])
            prompts = (tokenizer.encode_batch([document.prompt for document, _ in batch]) if prompt_field
                       else [np.zeros(0, np.int32)] * len(batch))
            for (document, held), prompt, text in zip(batch, prompts, texts, strict=True):
                fingerprint.add(document)
                bar.update(shards["valid" if held else "train"].add(document, prompt, text))
        train, valid = shards["train"], shards["valid"]
        total = train.documents + valid.documents
        for name, shard in shards.items():
            if not shard.documents:
                raise ValueError(f"no document of {total} falls in the {name} split: give more documents "
                                 "(data.txt_documents='blank_line' cuts a .txt), data.validation files, or "
                                 "another data.validation_fraction")
        hashes = {name: facts for shard in shards.values() for name, facts in shard.finish().items()}
    tokenizer.save(folder)
    manifest = Manifest(
        version=VERSION, settings=settings, sources=_sources(files, validation, tokenizer_file) or [],
        tokenizer_kind=tokenizer.kind, tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size, eot=tokenizer.eot, dtype=dtype.name, masks=bool(prompt_field),
        **{f"{name}_{count}": getattr(shard, count) for name, shard in shards.items() for count in _COUNTS},
        unigram_nats=unigram_nats(train.counts, valid.counts), corpus_fingerprint=fingerprint.hexdigest(),
        bpe_training_bytes=used, left_out=left_out,
        unreadable=corpus.embedded_corpus()[1] if source == "embedded" else 0,
        python=platform.python_version(), shards=hashes)
    facts = json.dumps(dataclasses.asdict(manifest), indent=2)
    tokens.write_atomic(folder / MANIFEST, facts.encode() + b"\n")
    say(f"tokens: made {folder} in {time.monotonic() - start:.1f} s: {manifest.summary()}")
    return manifest


def unigram_nats(train_counts: np.ndarray, valid_counts: np.ndarray) -> float:
    """Nats per validation token under the add-one smoothed training unigram; both counts are [V]."""
    smoothed = train_counts + 1.0
    log_p = np.log(smoothed) - np.log(smoothed.sum())
    return float(-(valid_counts @ log_p) / valid_counts.sum())


def _patterns(files: str | Sequence[str]) -> list[str]:
    return [files] if isinstance(files, str) and files else list(files)


def _sources(files: list[str], validation: list[str], tokenizer_file: str) -> list[list] | None:
    """[name, size] of every file read; None where they are not on this machine (only the tokens are)."""
    try:
        paths = [path for group in (files, validation) if group for path in corpus.resolve(group)]
        if tokenizer_file:
            paths.append(Path(os.path.expanduser(os.path.expandvars(tokenizer_file))))
        return [[path.name, path.stat().st_size] for path in paths]
    except (ValueError, OSError):
        return None


def _reuse(folder: Path, settings: dict, say: Callable[[str], None]) -> Manifest:
    manifest = load_manifest(folder)
    advice = f"use another working directory or delete {folder}"
    for key in settings | manifest.settings:
        was, now = manifest.settings.get(key), settings.get(key)
        if was != now:
            raise ValueError(f"tokens in {folder} were made with {key}={was!r}, it is now {now!r}: {advice}")
    sources = _sources(settings["data.files"], settings["data.validation"], settings["tokenizer.file"])
    if sources is not None and sources != manifest.sources:
        changed = [source for source in sources if source not in manifest.sources] or [
            source for source in manifest.sources if source not in sources] or sources
        raise ValueError(f"tokens in {folder} were made from other files: {changed[0][0]} ({changed[0][1]:,} "
                         f"bytes) was added, removed, moved or has another size: {advice}")
    for name, facts in manifest.shards.items():
        path = folder / name
        size = path.stat().st_size if path.exists() else -1
        if size != facts["bytes"] or (size <= _VERIFY_BYTES and _sha256(path) != facts["sha256"]):
            raise ValueError(f"{path} is damaged or missing: delete {folder} and prepare again")
    if tokens.load_tokenizer(folder).fingerprint != manifest.tokenizer_fingerprint:
        raise ValueError(f"the tokenizer in {folder} is not the one the tokens were made with: {advice}")
    absent = "" if sources is not None else " (its source files are not on this machine)"
    say(f"tokens: reusing {folder}{absent}: {manifest.summary()}")
    return manifest


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _progress() -> Any:
    from tqdm import tqdm
    quiet = not sys.stderr.isatty() or "CI" in os.environ
    return tqdm(desc="tokens", unit="B", unit_scale=True, disable=quiet)


def _batches(pairs: Iterator[tuple[corpus.Document, bool]]) -> Iterator[list[tuple[corpus.Document, bool]]]:
    held, size = [], 0
    for pair in pairs:
        held.append(pair)
        size += len(pair[0].prompt) + len(pair[0].text)
        if size >= _BATCH_BYTES:
            yield held
            held, size = [], 0
    if held:
        yield held


_COUNTS = ("documents", "tokens", "bytes", "scored_tokens", "scored_bytes")


class _Shard:
    """Writes the tokens of one split (and which are scored) under temporary names until `finish`."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, tokenizer: tokens.Tokenizer, masks: bool):
        self._dtype, self._eot = dtype.newbyteorder("<"), tokenizer.eot
        names = [f"{split}.bin"] + ([f"{split}.mask.bin"] if masks else [])
        self._paths = {folder / name: folder / f"{name}.tmp{os.getpid()}" for name in names}
        self._files = [open(temporary, "wb") for temporary in self._paths.values()]  # noqa: SIM115
        self._hashes = [hashlib.sha256() for _ in names]
        self.counts = np.zeros(tokenizer.vocab_size, np.int64)
        self.documents = self.tokens = self.bytes = self.scored_tokens = self.scored_bytes = 0

    def __enter__(self) -> _Shard:
        return self

    def __exit__(self, *_: object) -> None:
        for file, temporary in zip(self._files, self._paths.values(), strict=True):
            file.close()
            temporary.unlink(missing_ok=True)

    def add(self, document: corpus.Document, prompt: np.ndarray, text: np.ndarray) -> int:
        """Appends prompt, text and end of text; returns the document's bytes."""
        scored = np.append(text, self._eot)
        arrays = [np.concatenate([prompt, scored]).astype(self._dtype),
                  np.repeat(np.array([0, 1], np.uint8), [len(prompt), len(scored)])]
        for array, file, state in zip(arrays, self._files, self._hashes, strict=False):
            raw = array.tobytes()
            file.write(raw)
            state.update(raw)
        np.add.at(self.counts, scored, 1)
        scored_bytes = len(document.text.encode("utf-8"))
        all_bytes = scored_bytes + len(document.prompt.encode("utf-8"))
        self.documents += 1
        self.tokens += len(prompt) + len(scored)
        self.scored_tokens += len(scored)
        self.bytes += all_bytes
        self.scored_bytes += scored_bytes
        return all_bytes

    def finish(self) -> dict[str, dict]:
        facts = {}
        for path, file, state in zip(self._paths, self._files, self._hashes, strict=True):
            file.flush()
            os.fsync(file.fileno())
            facts[path.name] = {"bytes": file.tell(), "sha256": state.hexdigest()}
            file.close()
            os.replace(self._paths[path], path)
        return facts


# ---------------------------------------------------------------------------------------------------- batches


class TrainBatches:
    """Training batches: `batch(step)` is a pure function of (seed, step), whatever the number of processes.

    The training tokens are read as a ring of T tokens. An epoch cuts it, from a random place, into W = T // S
    windows that do not overlap, and visits them in a random order; the next epoch draws place and order anew.
    Global row r = step * B + i is the (r mod W)-th window of epoch r // W: a step may straddle epochs.

    The order is an argsort of raw Philox numbers (key: seed and epoch), a stream NumPy keeps the same from
    version to version. Held in memory: the orders of two epochs, one int array each.

    Args:
      folder: made by `prepare`. seq_len: S. batch_size: B, of all processes together.
      process_index, process_count: this process gets rows p*b .. (p+1)*b - 1 of the B, b = B / process_count.
      shift: whether an epoch starts at a random place (else always at the first token).
    """

    def __init__(self, folder: str | os.PathLike, seq_len: int, batch_size: int, seed: int = 0,
                 process_index: int = 0, process_count: int = 1, *, shift: bool = True):
        manifest = load_manifest(folder)
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index is {process_index}; must be in 0..{process_count - 1}")
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(f"train.batch_size is {batch_size}; must be a positive multiple of the "
                             f"{process_count} processes")
        if not 1 <= seq_len <= manifest.train_tokens:
            raise ValueError(f"model.seq_len is {seq_len}; must be at least 1 and at most the "
                             f"{manifest.train_tokens} training tokens in {folder}")
        self.seq_len, self.batch_size, self.seed, self.shift = seq_len, batch_size, seed, shift
        self.num_tokens = manifest.train_tokens
        self.windows = manifest.train_tokens // seq_len
        self._tokens = _memmap(folder, "train", manifest)
        self._mask = _memmap(folder, "train", manifest, mask=True) if manifest.masks else None
        rows = batch_size // process_count
        self._index = np.arange(process_index * rows, (process_index + 1) * rows, dtype=np.int32)
        self._epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)
        self._lock = threading.Lock()  # prefetch threads ask at once; one of them draws

    def _draw_epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        stream = np.random.Philox(key=np.array([self.seed % 2**64, epoch], np.uint64))
        start = int(stream.random_raw()) % self.num_tokens if self.shift else 0
        order = np.argsort(stream.random_raw(self.windows), kind="stable")
        return start, order.astype(np.int32 if self.windows < 2**31 else np.int64)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's rows of a step: x int32 [b, S]; index int32 [b], the row numbers in 0..B-1; with
        prompts also score bool [b, S], True where a token counts in the loss."""
        epochs, places = np.divmod(step * self.batch_size + self._index.astype(np.int64), self.windows)
        starts = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs):
            with self._lock:
                start, order = self._epoch(int(epoch))
            here = epochs == epoch
            starts[here] = (start + order[places[here]].astype(np.int64) * self.seq_len) % self.num_tokens
        batch = {"x": self._gather(self._tokens, starts, np.int32), "index": self._index.copy()}
        if self._mask is not None:
            batch["score"] = self._gather(self._mask, starts, np.bool_)
        return batch

    def _gather(self, flat: np.ndarray, starts: np.ndarray, dtype: type) -> np.ndarray:
        places = starts[:, None] + np.arange(self.seq_len)
        return flat.take(places, mode="wrap").astype(dtype)  # wrap: round the ring

    def iterator(self, start_step: int = 0, *, threads: int = 2, prefetch: int = 8) -> Any:
        """An endless Grain iterator over `batch(start_step)`, `batch(start_step + 1)`, ... read ahead by
        `threads`; `get_state()` is {"next_index": step}, and `set_state` of it goes on exactly there."""
        import grain
        steps = grain.MapDataset.range(sys.maxsize).map(lambda step: self.batch(int(step)))
        iterator = iter(steps.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, prefetch))))
        if start_step:
            iterator.set_state({"next_index": start_step})
        return iterator


def valid_rows(folder: str | os.PathLike, seq_len: int, limit: int = 0) -> dict[str, np.ndarray]:
    """The validation split in rows of S consecutive tokens, every token once.

    Returns: x int32 [n, S], the last row padded with end of text; valid bool [n, S], False on the padding;
      score bool [n, S], valid and no prompt. `limit` > 0 keeps the first `limit` rows only.
    """
    if seq_len < 1 or limit < 0:
        raise ValueError(f"seq_len is {seq_len} and limit {limit}; must be at least 1 and 0")
    manifest = load_manifest(folder)
    count = -(-manifest.valid_tokens // seq_len)
    count = min(count, limit) if limit else count
    size = min(count * seq_len, manifest.valid_tokens)

    def rows(flat: np.ndarray, padding: int, dtype: type) -> np.ndarray:
        out: np.ndarray = np.full(count * seq_len, padding, dtype)
        out[:size] = flat[:size]
        return out.reshape(count, seq_len)

    valid = rows(np.ones(size, np.bool_), False, np.bool_)
    score = valid.copy()
    if manifest.masks:
        score = rows(_memmap(folder, "valid", manifest, mask=True), False, np.bool_)
    x = rows(_memmap(folder, "valid", manifest), manifest.eot, np.int32)
    return {"x": x, "valid": valid, "score": score}
