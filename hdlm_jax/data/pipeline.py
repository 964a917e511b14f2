"""Tokens -> batches of S tokens: rows of a prepared folder, or of raw documents tokenised on the fly.

packing: 'concat' (a row is S consecutive tokens of the documents, one after the other), 'documents' (the same, with
attention limited to tokens of the same document) or 'crop' (one document, or a window of one longer than S).
padding, of a row of 'crop' behind its document: 'end' (more ends of text, noised and scored like any token, so that
where a text ends is part of it) or 'hidden' (no token sees it and it is not scored: a row's length is given;
docs/theory.md section 7).
"""

from __future__ import annotations

import bisect
import functools
import itertools
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hdlm_jax.common import processes
from hdlm_jax.data import tokenizers
from hdlm_jax.data.documents import Reader
from hdlm_jax.data.features import map_file
from hdlm_jax.data.prepare import Manifest, load_manifest
from hdlm_jax.data.records import MANY, Bad, Document, check_bad
from hdlm_jax.data.shards import ahead, batches, core_count, encode_documents, read_index

if TYPE_CHECKING:
    import grain

_OPEN_SHARDS = 256  # memory maps held at once; each costs a file descriptor
_ENCODED_CHARS = 1 << 20  # streamed documents are encoded in batches of about so many characters
_SORTED_WINDOWS = 1 << 24  # up to so many an epoch's order is a sorted table
_AHEAD_TOKENS = 1 << 22  # streamed batches are made ahead up to about so many tokens


class Split:
    """The T tokens of a split ('train' or 'valid'): its ranges of shards, one after the other, closed to a ring.

    Shards are mapped when they are read, and the least recently used are given back. `tokens` is T; feature_shape:
    (P, F) of documents with features, else (0, 0).
    """

    def __init__(self, folder: str | os.PathLike, manifest: Manifest, split: str):
        self._folder, self._prompts = Path(folder), manifest.prompts
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._ranges = [entry for entry in manifest.splits[split] if entry[2] > entry[1]]
        self._ends = list(itertools.accumulate(end - first for _, first, end, _, _ in self._ranges))
        self.tokens = self._ends[-1] if self._ends else 0
        self._flat = functools.lru_cache(maxsize=_OPEN_SHARDS)(self._map)
        places, width = manifest.features or (0, 0)
        self.feature_shape: tuple[int, int] = places, width
        self._documents = list(itertools.accumulate(entry[4] - entry[3] for entry in self._ranges))
        self._vectors = functools.lru_cache(maxsize=_OPEN_SHARDS)(self._map_features)

    def _map(self, number: int) -> np.ndarray:
        stem, first, end, _, _ = self._ranges[number]
        path = self._folder / f"{stem}.bin"
        try:
            with open(path, "rb") as file:  # np.memmap itself costs twice as long
                raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return np.frombuffer(raw, self._dtype, end - first, first * self._dtype.itemsize)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read up to token {end:,} ({error}); run --mode=prepare") from None

    def _map_features(self, number: int) -> np.ndarray:
        stem, _, _, first, end = self._ranges[number]
        return map_file(self._folder / f"{stem}.feat", self.feature_shape, first, end - first)

    def features(self, documents: np.ndarray) -> np.ndarray:
        """Features of documents int [b] of the split: float32 [b, P, F], NaN behind a document's own."""
        out = np.empty((len(documents), *self.feature_shape), np.float32)
        for row, document in zip(out, documents.tolist(), strict=True):
            number = bisect.bisect_right(self._documents, document)
            there = self._vectors(number)
            row[:] = there[document - self._documents[number] + len(there)]
        return out

    def check_rows(self, seq_len: int) -> None:
        """ValueError where a document with features does not fit a row, as their places are in front of all of it."""
        longest = int(np.diff(self.documents[0]).max(initial=0)) if self.feature_shape[0] else 0
        if longest > seq_len:
            raise ValueError(f"model.seq_len is {seq_len}; a document of {self._folder} has {longest} tokens, the "
                             f"{self.feature_shape[0]} places of its features counted, and must fit a row")

    def __len__(self) -> int:
        return self.tokens

    def __getitem__(self, part: slice) -> np.ndarray:
        """A stretch of the tokens, as of an array: uint16 or uint32."""
        start, stop, _ = part.indices(self.tokens)
        return self._read(start, max(0, stop - start))

    def _read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens of the ring from `start`; a view of the disk where one shard has all."""
        pieces = []
        while count > 0:
            start %= self.tokens
            number = bisect.bisect_right(self._ends, start)
            flat = self._flat(number)
            place = start - self._ends[number] + len(flat)
            pieces.append(flat[place:place + count])
            start += len(pieces[-1])
            count -= len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, self._dtype), *pieces])

    def gather(self, starts: np.ndarray, seq_len: int) -> np.ndarray:
        """Rows of S consecutive tokens of the ring, int32 [b, S]; starts: int64 [b]."""
        out, every = np.empty((len(starts), seq_len), np.int32), np.arange(seq_len)
        for row, start in zip(out, starts.tolist(), strict=True):
            # unlike a copy of up to 500 numbers, take() leaves the other threads running while the disk is waited for
            row[:] = self._read(start, seq_len).take(every)
        return out

    @functools.cached_property
    def documents(self) -> tuple[np.ndarray, np.ndarray]:
        """Where documents begin, and (last) the split's end, int64 [documents + 1]; tokens of their prompts, uint32.

        Read from the index files when first asked for; ValueError if one is missing or disagrees.
        """
        sizes, prompts = [], []
        for stem, first, end, first_document, end_document in self._ranges:
            path = self._folder / f"{stem}.idx"
            count = end_document - first_document
            try:
                index = read_index(path, first_document, end_document)
            except OSError as error:
                raise ValueError(f"{path} cannot be read ({error}); run --mode=prepare") from None
            if len(index) != count or index[:, 0].sum(dtype=np.int64) != end - first:
                raise ValueError(f"{path} does not fit {stem}.bin: documents {first_document:,} to "
                                 f"{end_document:,} must have {end - first:,} tokens; run --mode=prepare")
            sizes.append(index[:, 0])
            prompts.append(index[:, 2])
        starts = np.concatenate([np.zeros(1, np.int64), *sizes]).cumsum(dtype=np.int64)
        return starts, np.concatenate([np.zeros(0, np.uint32), *prompts])

    def scored(self, starts: np.ndarray, seq_len: int) -> np.ndarray:
        """Which tokens of `gather(starts, seq_len)` belong to no prompt, bool [b, S]."""
        if not self._prompts:
            return np.ones((len(starts), seq_len), np.bool_)
        places = (starts[:, None] + np.arange(seq_len)) % self.tokens
        bounds, prompts = self.documents
        document = np.searchsorted(bounds, places, side="right") - 1
        return places - bounds[document] >= prompts[document]


def given(packing: str, padding: str, prompts: bool, causal: bool) -> str:
    """What the NELBO of a row is conditional on beside its prompt: "nothing", or "lengths" (docs/theory.md section 7).

    prompts: whether documents begin with one; causal: whether a token sees only those before it.
    """
    told = {"concat": prompts, "documents": True, "crop": padding == "hidden"}
    return "lengths" if told[packing] and not causal else "nothing"


def _fields(x: np.ndarray, score: np.ndarray, lengths: np.ndarray, shown: np.ndarray, packing: str,
            eot: int) -> dict[str, np.ndarray]:
    """x, score, segment [b, S] and tokens int32 [b] of rows whose first `lengths` [b] tokens are text.

    Behind them, up to `shown` [b], is padding of ends of text, which `tokens` leaves out; behind it hidden padding.
    """
    segment, place = np.zeros_like(x), np.arange(x.shape[1])
    if packing == "documents":  # an end of text belongs to the document that it closes
        ends = x == eot
        np.cumsum(ends, axis=1, out=segment)
        segment -= ends
    behind, outside = place >= lengths[:, None], place >= shown[:, None]
    x[behind], score[behind] = eot, True
    tokens = (score & ~behind).sum(1, dtype=np.int32)
    score[outside], segment[outside] = False, -1
    return {"x": x, "score": score, "segment": segment, "tokens": tokens}


def rows_of(pieces: Sequence[np.ndarray], seq_len: int, eot: int, prompts: Sequence[int] = (), *,
            ends: bool | np.ndarray = False) -> dict[str, np.ndarray]:
    """Pieces of text [n_i], each in a row of its own: the fields of `valid_rows`.

    prompts: of each piece, tokens in front that are not scored; ends: whether (all, or bool [n]) a piece that closes
    with the end of text is padded by padding="end", else hidden like the others.
    """
    x = np.full((len(pieces), seq_len), eot, np.int32)
    for row, piece in zip(x, pieces, strict=True):
        row[: len(piece)] = piece
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    score = np.arange(seq_len) >= np.array(prompts or [0] * len(pieces), np.int64)[:, None]
    closed = np.array([len(piece) > 0 and piece[-1] == eot for piece in pieces], bool)
    return _fields(x, score, lengths, np.where(closed & ends, seq_len, lengths), "crop", eot)


def _window(lengths: np.ndarray, prompts: np.ndarray, limits: np.ndarray,
            draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and size (int64 [b]) of the window that a row shows of a document of `lengths` tokens.

    Of a document of more than `limits` tokens, each window of that size with a scored token in it is equally likely.
    draws: uint64 [b], uniform.
    """
    sizes = np.minimum(lengths, limits)
    first = np.maximum(0, prompts.astype(np.int64) + 1 - sizes)  # an earlier window holds prompt alone
    choices = (lengths - sizes - first + 1).astype(np.uint64)
    return first + (draws % choices).astype(np.int64), sizes


class _Batches:
    """What the rows of a batch are, wherever their tokens are from, and which of them this process gets.

    seq_len: S. batch_size: B, of all processes together: process p of them gets rows p*b .. (p+1)*b - 1, b = B / count.
    variable_share: of the rows, cut to a length uniform in 1..S ('crop': the window is drawn with that length); behind
    it is padding.
    partners: rows of a batch for each of the B texts, one behind the other. features: (P, F), or (0, 0) for none.
    """

    def __init__(self, prompts: bool, eot: int, seq_len: int, batch_size: int, seed: int = 0, process_index: int = 0,
                 process_count: int = 1, *, packing: str = "concat", padding: str = "end", variable_share: float = 0.0,
                 partners: int = 1, features: tuple[int, int] = (0, 0)):
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(f"train.batch_size is {batch_size}; must be a positive multiple of the "
                             f"{process_count} processes")
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        self.packing, self.variable_share, self._eot, self._partners = packing, variable_share, eot, partners
        self._features = features
        rows, self.process_count = batch_size // process_count, process_count
        self._index = np.arange(process_index * rows, (process_index + 1) * rows, dtype=np.int32)
        self._ends = packing == "crop" and padding == "end"
        hidden = packing == "crop" and not self._ends or variable_share > 0
        self._names = ["score"] * (prompts or hidden) + ["segment"] * (hidden or packing == "documents") + [
            "tokens"] * self._ends

    def example(self) -> dict[str, np.ndarray]:
        """A batch of zeros: the names, shapes and dtypes that every batch of this process has."""
        x, none = np.zeros((len(self._index), self.seq_len), np.int32), np.zeros(len(self._index))
        batch = self._batch(x, np.ones(x.shape, np.bool_), none, none, np.zeros((len(x), *self._features), np.float32))
        return {name: np.zeros_like(array) for name, array in batch.items()}

    def _draw(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """For each of this process's rows the most tokens it may show (int64 [b]) and a uniform uint64.

        Row r takes block r of one Philox stream, so that (seed, r) alone decides. Epochs have other keys.
        """
        key = np.array([self.seed % 2**64, 2**64 - 1], np.uint64)
        row = step * self.batch_size + int(self._index[0])
        raw = np.random.Philox(key=key, counter=row).random_raw(4 * len(self._index)).reshape(-1, 4)
        cut = (raw[:, 0] >> np.uint64(11)) * 2.0**-53 < self.variable_share
        limits = np.where(cut, raw[:, 1] % np.uint64(self.seq_len) + np.uint64(1), np.uint64(self.seq_len))
        return limits.astype(np.int64), raw[:, 2]

    def _batch(self, x: np.ndarray, score: np.ndarray, lengths: np.ndarray, limits: np.ndarray,
               features: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """lengths, limits: [b], tokens of text in each row, and the most that it may show."""
        batch = {"x": x, "index": self._index.copy()}
        if self._names:
            shown = limits if self._ends else lengths
            fields = _fields(x, score, lengths, shown, self.packing, self._eot)
            batch |= {name: fields[name] for name in self._names}
        if features is not None and features.size:
            batch["features"] = features
        if (n := self._partners) > 1:
            batch = {name: np.repeat(array, n, axis=0) for name, array in batch.items()}
            batch["index"] = n * batch["index"] + np.arange(len(x) * n, dtype=np.int32) % n
        return batch


def _permuted(places: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    """Where a random permutation of 0..count-1 takes places, int64 [b]; each is computed by itself.

    A Feistel network over the numbers of an even number of bits, a round for each of the keys (uint64), mixed as in
    SplitMix64; what falls at `count` or above goes through it again.
    """
    half = np.uint64(-(-max(1, (count - 1).bit_length()) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    found, todo = places.astype(np.uint64), np.arange(len(places))
    while len(todo):
        left, right = found[todo] >> half, found[todo] & low
        for key in keys:
            mixed = right + key
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                mixed = (mixed ^ mixed >> np.uint64(shift)) * np.uint64(factor)
            left, right = right, left ^ (mixed >> np.uint64(32) & low)
        found[todo] = left << half | right
        todo = todo[found[todo] >= count]
    return found.astype(np.int64)


class TrainBatches(_Batches):
    """Training batches of a folder that `prepare` made: `batch(step)` depends on (seed, step) alone.

    The T training tokens are a ring. An epoch cuts it, from a random place, into W = T // S windows and visits them in
    a random order. Global row r = step * B + i is the (r mod W)-th window of epoch r // W: a step may straddle epochs.
    With packing="crop" the W documents take the place of the windows.

    Of up to 2^24 windows the order is an argsort of raw Philox numbers (key: seed and epoch), a stream that NumPy keeps
    the same from version to version; every published figure was trained in that order. The orders of two epochs are
    held. Of more windows the place alone tells which one it is (`_permuted`), and nothing is held.

    read_threads: batches that an iterator reads at once. rows, how: arguments of `_Batches`.
    """

    def __init__(self, folder: str | os.PathLike, *rows: int, read_threads: int = 2, **how: Any):
        manifest = load_manifest(folder)
        self._split, self._read_threads = Split(folder, manifest, "train"), read_threads
        super().__init__(manifest.prompts, manifest.eot, *rows, features=self._split.feature_shape, **how)
        self.num_tokens = self._split.tokens
        crop = self.packing == "crop"
        if not crop and self.seq_len > self.num_tokens:
            raise ValueError(f"model.seq_len is {self.seq_len}; must be at most the "
                             f"{self.num_tokens} training tokens in {folder}")
        if manifest.prompts or crop:
            _ = self._split.documents  # read once, before prefetch threads ask for it
        self._split.check_rows(self.seq_len)
        self.windows = len(self._split.documents[1]) if crop else self.num_tokens // self.seq_len
        self._epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)
        self._lock = threading.Lock()  # prefetch threads ask at once; one of them draws

    def _draw_epoch(self, epoch: int) -> tuple[int, Callable[[np.ndarray], np.ndarray]]:
        """Where the ring is cut, and the windows at places of the order."""
        stream = np.random.Philox(key=np.array([self.seed % 2**64, epoch], np.uint64))
        start = int(stream.random_raw()) % self.num_tokens
        if self.windows > _SORTED_WINDOWS:
            return start, functools.partial(_permuted, count=self.windows, keys=stream.random_raw(8))
        return start, np.argsort(stream.random_raw(self.windows), kind="stable").astype(np.int32).__getitem__

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's rows of a step. Every batch has the same fields:

        x int32 [b, S], padded with end of text, and index int32 [b], the row numbers in 0..B-1; where some tokens are
        not scored (prompts, hidden padding) score bool [b, S]; where attention is limited segment int32 [b, S]: tokens
        attend to those of the same segment, hidden padding has -1; where padding is scored tokens int32 [b], the
        number of scored tokens without it; of documents with features features float32 [b, P, F], NaN behind them.
        """
        epochs, places = np.divmod(step * self.batch_size + self._index.astype(np.int64), self.windows)
        starts, chosen = np.empty(len(places), np.int64), np.empty(len(places), np.int64)
        for epoch in np.unique(epochs):
            with self._lock:
                start, order = self._epoch(int(epoch))
            here = epochs == epoch
            chosen[here] = order(places[here])
            starts[here] = (start + chosen[here] * self.seq_len) % self.num_tokens
        limits, draws = self._draw(step)
        lengths = limits
        if self.packing == "crop":
            bounds, prompts = self._split.documents
            first, lengths = _window(bounds[chosen + 1] - bounds[chosen], prompts[chosen], limits, draws)
            starts = bounds[chosen] + first
        x, score = self._split.gather(starts, self.seq_len), self._split.scored(starts, self.seq_len)
        return self._batch(x, score, lengths, limits, self._split.features(chosen) if self._features[0] else None)

    def iterator(self, position: dict | None = None) -> grain.DatasetIterator:
        """An endless Grain iterator over `batch(0)`, `batch(1)`, ..., from `position` on, read ahead on threads.

        Its `get_state()` is the position after the batches handed out; `set_state` of it goes on exactly there.
        """
        import grain
        steps = grain.MapDataset.range(sys.maxsize).map(lambda step: self.batch(int(step)))
        threads = self._read_threads
        iterator = iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)))
        if position is not None:
            iterator.set_state(_position(position, {"next_index": 0}))
        return iterator


def _position(position: dict, like: dict) -> dict:
    if position.keys() != like.keys():
        raise ValueError(f"a data position has {', '.join(position)}, here it must have {', '.join(like)}: was it "
                         "saved with another data.stream?")
    return dict(position)


def valid_rows(folder: str | os.PathLike, seq_len: int, limit: int = 0, packing: str = "concat",
               padding: str = "end") -> dict[str, np.ndarray]:
    """The validation split in rows of S tokens, every scored token once; of these the first `limit` > 0.

    Rows are consecutive tokens of the split, with packing="crop" of one document; else what is left of the last row
    is hidden whatever `padding` says.

    Returns: x int32 [n, S], padded with end of text; score bool [n, S], False on hidden padding and prompts; segment
      int32 [n, S], -1 on hidden padding, else 0, with packing="documents" the number of the document in its row;
      tokens int32 [n], scored tokens without any padding: what nats are divided by; of documents with features
      features float32 [n, P, F], NaN behind them.
    """
    manifest = load_manifest(folder)
    split = Split(folder, manifest, "valid")
    split.check_rows(seq_len)
    bounds = split.documents[0] if packing == "crop" else np.array([0, split.tokens])
    rows = -(-np.diff(bounds) // seq_len)  # of each part: a document, or all
    number = np.arange(rows.sum()) - np.repeat(rows.cumsum() - rows, rows)  # of a row in its part
    starts = np.repeat(bounds[:-1], rows) + number * seq_len
    lengths = np.minimum(seq_len, np.repeat(bounds[1:], rows) - starts)
    if limit and not manifest.prompts:
        starts, lengths = starts[:limit], lengths[:limit]
    shown = np.full_like(lengths, seq_len) if packing == "crop" and padding == "end" else lengths
    fields = _fields(split.gather(starts, seq_len), split.scored(starts, seq_len), lengths, shown, packing,
                     manifest.eot)
    if not manifest.prompts:
        return fields
    says = np.flatnonzero(fields["tokens"])[: limit or None]  # not rows of prompt alone
    fields = {name: field[says] for name, field in fields.items()}
    return fields | {"features": split.features(says)} if split.feature_shape[0] else fields


class StreamBatches(_Batches):
    """Training batches of raw documents, tokenised on the fly: the same fields as `TrainBatches.batch`.

    A run's stream is dealt into K shares, K being the number of processes that begin it. Share k fills rows
    k * B / K .. (k+1) * B / K - 1 of every batch. It owns every K-th of an epoch's sources, whose order the seed
    decides; where there are fewer than K of them, it reads them all and owns every K-th record. Each source is read
    from its beginning; of every `shuffle_documents` / K consecutive training documents of a share the order is
    shuffled. Row after row takes the next S tokens (crop: the next document).

    A process walks the shares of its own rows alone. The position has the place of each share, so that any number of
    processes goes on from it, whatever K is.

    Args:
      is_training: whether a document is for training; others are skipped.
      bad_share: records that cannot be read are skipped and said (`say`), up to this share of those read.
      how: arguments of `_Batches`.
    """

    def __init__(self, reader: Reader, sources: Sequence[str], tokenizer: tokenizers.Tokenizer,
                 is_training: Callable[[Document], bool], *, shuffle_documents: int = 10_000, bad_share: float = 1.0,
                 say: Callable[[str], None] = lambda line: None, **how: Any):
        super().__init__(bool(reader.prompt_field), tokenizer.eot, **how)
        self._reader, self._sources, self._tokenizer = reader, list(sources), tokenizer
        self._is_training, self._shuffle_documents = is_training, shuffle_documents
        self._bad_share, self._say = bad_share, say

    def iterator(self, position: dict | None = None, *, prefetch: int | None = None) -> grain.DatasetIterator:
        """An endless Grain iterator from `position` (`whole_position` of a `get_state()`) or the beginning. A thread
        reads `prefetch` batches ahead (by default enough to go on while the next window of documents is read).

        `get_state()` is exact for the batches handed out; what it says of shares that other processes walk is -1. To
        go on from it, documents before it in its sources are read (not tokenised) once more.
        """
        from grain.experimental import ThreadPrefetchDatasetIterator
        stream = _Stream(self)
        if position is not None:
            stream.set_state(_position(position, stream.get_state()))
        if prefetch is None:
            prefetch = max(2, min(64, _AHEAD_TOKENS // (self.batch_size * self.seq_len)))
        return ThreadPrefetchDatasetIterator(stream, prefetch)

    def _order(self, count: int, epoch: int, window: int = -1, share: int = 0) -> np.ndarray:
        """A random order of `count` things: of the sources of an epoch, or of the documents of a share's window."""
        key = np.array([self.seed % 2**64, epoch], np.uint64)
        stream = np.random.Philox(key=key, counter=np.array([0, 0, window + 1, share], np.uint64))
        return np.argsort(stream.random_raw(count), kind="stable")

    def _owned(self, epoch: int, share: int, shares: int) -> tuple[np.ndarray, int]:
        """Sources that a share reads in an epoch, and which of their records modulo K it owns (-1: all).

        These records are others in the next epoch, so that no share always has the longer ones.
        """
        order = self._order(len(self._sources), epoch)
        return (order[share::shares], -1) if len(order) >= shares else (order, (share - epoch) % shares)

    def _windows(self, share: int, shares: int, epoch: int, source: int, record: int, window: int
                 ) -> Iterator[tuple[tuple[int, int, int, int], list[Document]]]:
        """Windows of a share's documents without end: where each begins (`_PLACE` without the last two), its documents.
        """
        size, seen, bad = -(-self._shuffle_documents // shares), 0, 0
        barren: set[tuple[int, int]] = set()  # sources, or parts of them, of epochs without a training document
        while True:
            sources, part = self._owned(epoch, share, shares)
            begin: tuple[int, int] = source, record
            held: list[Document] = []
            for number in range(source, len(sources)):
                records = itertools.islice(self._reader.read(self._sources[sources[number]]), record, None)
                for read, document in enumerate(records, record + 1):
                    if part >= 0 and (read - 1) % shares != part:
                        continue
                    seen += 1
                    if isinstance(document, Bad):
                        bad += 1
                        self._say(f"data: {document}; skipped, no. {bad} of {seen:,} records")
                        check_bad(self._bad_share, bad, seen, document, out_of=MANY)
                    elif isinstance(document, Document) and self._is_training(document):
                        held.append(document)
                        if len(held) == size:
                            yield (epoch, *begin, window), held
                            begin, held, window = (number, read), [], window + 1
                record = 0
            if held:
                yield (epoch, *begin, window), held
            elif not window:
                barren.update((int(number), part) for number in sources)
                if len(barren) == len(self._sources) * (1 if part < 0 else shares):
                    raise ValueError(f"data.files: no training document in the {len(self._sources)} sources")
            epoch, source, window = epoch + 1, 0, 0

    def _documents(self, share: int, shares: int, place: tuple[int, ...], threads: int
                   ) -> Iterator[tuple[tuple[int, ...], np.ndarray, int, int]]:
        """Place, tokens, prompt length and tokens used before, of every document of a share from a place on, endless.

        place: `_PLACE`. ValueError: one that these documents do not have.
        """
        encode = functools.partial(encode_documents, self._tokenizer, reader=self._reader)
        *begin, first, used = place
        for window, held in self._windows(share, shares, *begin):
            if first >= len(held):
                raise ValueError(_MOVED)
            order = self._order(len(held), window[0], window[-1], share)
            parts = batches([held[number] for number in order[first:]], _ENCODED_CHARS)
            held.clear()  # gone before the next window is read
            encoded = ahead(encode, parts, threads)
            for number, (ids, prompt) in enumerate(itertools.chain.from_iterable(encoded), first):
                if used > len(ids):
                    raise ValueError(_MOVED)
                yield (*window, number), ids, prompt, used
                used = 0
            first = 0


# Where a share is: epoch, the source in the share's order and the record in it where the last document's window begins,
# the window in the epoch, the document's place in the shuffled window, and how many of its tokens are used.
_PLACE = ("epoch", "source", "record", "window", "place", "offset")
_MOVED = "the data position is of other documents: were data.files, their contents or the tokenizer changed?"


def _to_position(step: int, places: dict[int, tuple[int, ...]], shares: int) -> dict:
    """The position before a step: numbers of one share, lists of numbers of K; -1 where a share's place is unknown."""
    rows = [places.get(share, (-1,) * len(_PLACE)) for share in range(shares)]
    columns = map(list, zip(*rows, strict=True)) if shares > 1 else rows[0]
    return {"next_index": step, **dict(zip(_PLACE, columns, strict=True))}


def _to_places(position: dict) -> list[tuple[int, ...]]:
    """The place of each share."""
    columns = [value if isinstance(value, list) else [value] for value in (position[name] for name in _PLACE)]
    return list(zip(*columns, strict=True))


def whole_position(position: dict) -> dict:
    """A position with what the other processes know of it; where it has several shares all have to ask together."""
    if not isinstance(position.get(_PLACE[0]), list):
        return position
    known = processes.largest(np.array(_to_places(position), np.int64))
    return _to_position(position["next_index"], dict(enumerate(map(tuple, known.tolist()))), len(known))


class _Share:
    """A walk through the documents of one share. `place`: `_PLACE` of what is taken so far."""

    def __init__(self, documents: Iterator[tuple[tuple[int, ...], np.ndarray, int, int]], rows: int, kept: slice):
        self._documents, self._rows, self._kept = documents, rows, kept
        self._tokens, self._prompt, self._offset = np.zeros(0, np.int32), 0, 0

    @property
    def place(self) -> tuple[int, ...]:
        return (*self._document, self._offset)

    def _take(self, count: int) -> tuple[np.ndarray, int]:
        """The next tokens, at most `count` and of one document, and how many of them are its prompt's."""
        while self._offset == len(self._tokens):
            self._document, self._tokens, self._prompt, self._offset = next(self._documents)
        start, self._offset = self._offset, min(len(self._tokens), self._offset + count)
        return self._tokens[start:self._offset], min(max(self._prompt, start), self._offset) - start

    def consecutive(self, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """x and score [rows kept, S] of the next step."""
        shape = self._rows, seq_len
        x, score = np.empty(shape, np.int32), np.ones(shape, np.bool_)
        done, flat_x, flat_score = 0, x.reshape(-1), score.reshape(-1)
        while done < x.size:
            piece, prompt = self._take(x.size - done)
            flat_x[done:done + len(piece)] = piece
            flat_score[done:done + prompt] = False
            done += len(piece)
        return x[self._kept], score[self._kept]

    def documents(self) -> list[tuple[np.ndarray, int]]:
        """Tokens and prompt length of the next step's documents, of the rows kept."""
        return [self._take(sys.maxsize) for _ in range(self._rows)][self._kept]


class _Stream:
    """Packs streamed documents into batches: an iterator with a state, as Grain's prefetching asks for."""

    def __init__(self, batches: StreamBatches):
        self._batches = batches
        begin = dict.fromkeys(range(batches.process_count), (0,) * len(_PLACE))
        self.set_state(_to_position(0, begin, batches.process_count))

    def get_state(self) -> dict[str, Any]:
        return self._state

    def set_state(self, state: dict) -> None:
        own, places = self._batches, _to_places(state)
        rows, odd = divmod(own.batch_size, len(places))
        if odd:
            raise ValueError(f"the data position has {len(places)} shares, which must divide train.batch_size="
                             f"{own.batch_size}: go on with the batch size it was saved with")
        first, end = int(own._index[0]), int(own._index[-1]) + 1
        numbers = range(first // rows, (end - 1) // rows + 1)
        if any(places[number][0] < 0 for number in numbers):
            raise ValueError("the data position lacks shares that other processes walked: save its whole_position")
        threads = min(8, core_count()) // len(numbers) or 1
        self._shares = {
            number: _Share(own._documents(number, len(places), places[number], threads), rows,
                           slice(max(0, first - number * rows), end - number * rows)) for number in numbers}
        self._state, self._count = state, len(places)

    def __next__(self) -> dict[str, np.ndarray]:
        step = self._state["next_index"]
        batch = self._batches._batch(*(self._crops if self._batches.packing == "crop" else self._consecutive)(step))
        places = {number: share.place for number, share in self._shares.items()}
        self._state = _to_position(step + 1, places, self._count)
        return batch

    def _consecutive(self, step: int) -> tuple[np.ndarray, ...]:
        parts = [share.consecutive(self._batches.seq_len) for share in self._shares.values()]
        limits = self._batches._draw(step)[0]
        return *(np.concatenate(part) for part in zip(*parts, strict=True)), limits, limits

    def _crops(self, step: int) -> tuple[np.ndarray, ...]:
        documents = [document for share in self._shares.values() for document in share.documents()]
        limits, draws = self._batches._draw(step)
        prompts = np.array([prompt for _, prompt in documents])
        starts, sizes = _window(np.array([len(ids) for ids, _ in documents]), prompts, limits, draws)
        x = np.zeros((len(documents), self._batches.seq_len), np.int32)
        for row, (ids, _), start, size in zip(x, documents, starts, sizes, strict=True):
            row[:size] = ids[start:start + size]
        return x, np.arange(x.shape[1]) >= (prompts - starts)[:, None], sizes, limits
