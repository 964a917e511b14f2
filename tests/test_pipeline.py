"""hdlm_jax/data/pipeline.py: rows by enumeration against brute force; batches are pure, streams resume exactly."""
import collections
import dataclasses
import gc
import itertools
import json
import os
import platform
import subprocess
import sys
import threading
import tracemalloc
import typing
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hdlm_jax.config import PACKINGS
from hdlm_jax.data import pipeline, prepare, tokenizers
from hdlm_jax.data.documents import Reader
from hdlm_jax.data.prepare import load_manifest
from hdlm_jax.data.records import Bad, Document
from hdlm_jax.data.sources import resolve

EOT = 999  # of the folders below; no other token of theirs has this number
KINDS = [("concat", "end"), ("documents", "end"), ("crop", "hidden"), ("crop", "end")]  # packing, padding
SETTINGS = [(*kind, share) for kind in KINDS for share in (0.0, 0.5)]  # and variable_share


def write_folder(folder: Path, train: list, valid: list, *, shards: int = 1, prompts: bool = False,
                 dtype: str = "uint16") -> Path:
    """A folder of tokens as `prepare` writes it: lists of documents, each a (prompt, text) pair of token lists.

    A split is cut into `shards` ranges. With several, a range lies between documents of no split, and the order of
    the ranges is not that of the files.
    """
    folder.mkdir(parents=True)
    splits: dict[str, list] = {"train": [], "valid": []}
    for split, documents in (("train", train), ("valid", valid)):
        bounds = np.linspace(0, len(documents), shards + 1).astype(int)
        for number, (first, end) in enumerate(itertools.pairwise(bounds)):
            foreign = [([7], [7] * 4 * (number + 1))] * (shards > 1)
            stem = f"{split}-{shards - number:05d}-000"
            inside = [len(prompt) + len(text) + 1 for prompt, text in documents[first:end]]
            before = sum(len(prompt) + len(text) + 1 for prompt, text in foreign)
            rows, flat = [], []
            for prompt, text in [*foreign, *documents[first:end], *foreign]:
                flat += [*prompt, *text, EOT]
                rows.append([len(prompt) + len(text) + 1, len(prompt) + len(text), len(prompt), len(prompt)])
            np.array(flat, np.dtype(dtype).newbyteorder("<")).tofile(folder / f"{stem}.bin")
            np.array(rows, "<u4").tofile(folder / f"{stem}.idx")
            splits[split].append([stem, before, before + sum(inside), len(foreign), len(foreign) + int(end - first)])
    facts = {name: kind() for name, kind in typing.get_type_hints(prepare.Manifest).items()} | dict(
        version=prepare.VERSION, vocab_size=EOT + 1, eot=EOT, dtype=dtype, prompts=prompts, splits=splits)
    (folder / prepare.MANIFEST).write_text(json.dumps(facts))
    return folder


def lengths_to_documents(lengths: list[int], prompts: list[int] | None = None) -> list:
    """Documents of so many tokens with the end of text; their other tokens count 0, 1, 2, ... through all of them."""
    count = itertools.count()
    return [([next(count) for _ in range(prompt)], [next(count) for _ in range(length - prompt - 1)])
            for length, prompt in zip(lengths, prompts or [0] * len(lengths), strict=True)]


def flat_tokens(documents: list) -> tuple[np.ndarray, np.ndarray]:
    """All tokens of documents one after the other, and whether each is scored."""
    flat = [token for prompt, text in documents for token in [*prompt, *text, EOT]]
    score = [scored for prompt, text in documents for scored in [False] * len(prompt) + [True] * (len(text) + 1)]
    return np.array(flat), np.array(score)


def text_length(row, shown: int, packing: str, padding: str, end: int = EOT) -> int:
    """Brute force: tokens of a row's text; ends of text behind the first one are none where a row is one document."""
    ends = [place + 1 for place, token in enumerate(list(row)[:shown]) if token == end]
    return ends[0] if packing == "crop" and padding == "end" and ends else shown


def segments(row: np.ndarray, length: int) -> list[int]:
    """Brute force: the number of the document within the row, -1 on hidden padding."""
    found, document = [], 0
    for place, token in enumerate(row):
        found.append(document if place < length else -1)
        document += int(token) == EOT
    return found


# 40 documents of 1 to 12 tokens (of which up to 9 prompt) and three long ones; 300 tokens or so
LENGTHS = [1, 2, 12, 5, 3, 3, 8, 1, 1, 6, 31, 4, 7, 2, 9, 10, 11, 12, 3, 5] * 2 + [23]
PROMPTS = [0, 1, 9, 2, 0, 1, 7, 0, 0, 3, 28, 1, 2, 0, 8, 0, 10, 4, 2, 4] * 2 + [22]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    """The same documents in one shard and in four, without prompts and with them."""
    base = tmp_path_factory.mktemp("folders")
    made = {}
    for prompts, shards in itertools.product((False, True), (1, 4)):
        documents = lengths_to_documents(LENGTHS, PROMPTS if prompts else None)
        made[prompts, shards] = write_folder(base / f"{prompts}{shards}", documents, documents[5:27],
                                             shards=shards, prompts=prompts)
    return made


@pytest.fixture(scope="module")
def ring(tmp_path_factory) -> Path:
    """A folder whose training tokens are 0, 1, ..., T-1 (T = 1003): every token says where it is from."""
    folder = write_folder(tmp_path_factory.mktemp("ring") / "tokens", [([], [0] * 1002)], [([], [0])])
    np.arange(1003, dtype="<u2").tofile(folder / "train-00001-000.bin")
    return folder


def one_document(folder: Path, length: int, prompt: int) -> Path:
    return write_folder(folder, lengths_to_documents([length], [prompt]), [([], [0])], prompts=prompt > 0)


# ------------------------------------------------------------------------------------------- a folder of tokens


@pytest.mark.parametrize("prompts", [False, True])
def test_shards_are_one_ring(folders, prompts, monkeypatch):
    flat, score = flat_tokens(lengths_to_documents(LENGTHS, PROMPTS if prompts else None))
    held, held_score = flat_tokens(lengths_to_documents(LENGTHS, PROMPTS if prompts else None)[5:27])
    monkeypatch.setattr(pipeline, "_OPEN_SHARDS", 2)
    monkeypatch.setattr(prepare, "_COUNTED_TOKENS", 50)
    for shards in (1, 4):
        folder = folders[prompts, shards]
        split = pipeline.Split(folder, load_manifest(folder), "train")
        starts = np.arange(split.tokens)
        for size in (1, 17, len(flat), 2 * len(flat) + 3):  # the ring, once and again
            places = (starts[:, None] + np.arange(size)) % len(flat)
            rows = split.gather(starts, size)
            assert rows.dtype == np.int32
            np.testing.assert_array_equal(rows, flat[places])
            np.testing.assert_array_equal(split.scored(starts, size), score[places])
        sizes = [len(prompt) + len(text) + 1 for prompt, text in lengths_to_documents(LENGTHS)]
        starts, heads = split.documents
        assert starts.dtype == np.int64 and starts.tolist() == [0, *itertools.accumulate(sizes)]
        assert heads.tolist() == (PROMPTS if prompts else [0] * len(LENGTHS))
        gc.collect()
        open_files = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        assert sum(str(folder) in name for name in open_files) == min(shards, 2)  # the rest is closed again
        for name, tokens_there, scored in (("train", flat, score), ("valid", held, held_score)):
            whole = pipeline.Split(folder, load_manifest(folder), name)
            found = whole[:]
            assert found.dtype == np.uint16
            np.testing.assert_array_equal(found, tokens_there)
            for part in (slice(70), slice(30, 10**9), slice(-5, None), slice(9, 3)):
                np.testing.assert_array_equal(whole[part], tokens_there[part])
            assert len(whole) == len(tokens_there)
            counts = prepare.token_counts(folder, name)
            assert counts.dtype == np.int64
            np.testing.assert_array_equal(counts, np.bincount(tokens_there[scored], minlength=EOT + 1))
    view = pipeline.Split(folders[prompts, 1], load_manifest(folders[prompts, 1]), "train")[:]
    assert not view.flags.writeable and not view.flags.owndata  # on disk, not in memory


def test_wide_tokens(tmp_path):
    wide = [([], [70_000, 3, 2**31 - 1])]
    folder = write_folder(tmp_path / "tokens", wide, wide, dtype="uint32")
    assert pipeline.Split(folder, load_manifest(folder), "train")[:].dtype == np.uint32
    assert pipeline.valid_rows(folder, 4)["x"].tolist() == [[70_000, 3, 2**31 - 1, EOT]]


def test_wrong_folders(folders, tmp_path):
    with pytest.raises(ValueError, match="no tokens in .* run --mode=prepare"):
        pipeline.valid_rows(tmp_path, 8)
    documents = lengths_to_documents([5, 6], [1, 2])
    folder = write_folder(tmp_path / "tokens", documents, documents, prompts=True)
    for suffix, message in (
            ("idx", r"001-000\.idx does not fit train-00001-000\.bin: documents 0 to 2 must have 11 tokens; run"),
            ("bin", r"001-000\.bin cannot be read up to token 11 \(.*\); run --mode=prepare")):
        path = folder / f"train-00001-000.{suffix}"
        raw = path.read_bytes()
        path.write_bytes(raw[:-16] if suffix == "idx" else raw[:-2])
        with pytest.raises(ValueError, match=message) as error:
            pipeline.TrainBatches(folder, 3, 1).batch(0)
        assert "\n" not in str(error.value)
        path.unlink()
        with pytest.raises(ValueError, match=rf"{path.name} cannot be read .*; run --mode=prepare"):
            pipeline.TrainBatches(folder, 3, 1).batch(0)
        path.write_bytes(raw)


@pytest.mark.parametrize("arguments, message", [
    (dict(seq_len=1004), "model.seq_len is 1004; must be at most the 1003 training tokens"),
    (dict(batch_size=5, process_count=2), "train.batch_size is 5; .* multiple of the 2 processes"),
])
def test_wrong_settings(ring, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        pipeline.TrainBatches(ring, **(dict(seq_len=10, batch_size=6) | arguments))
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------- training


def epoch_rows(batches: pipeline.TrainBatches, epoch: int, name: str = "x") -> np.ndarray:
    """All rows of an epoch, from whole batches: needs B to divide W."""
    steps = batches.windows // batches.batch_size
    return np.concatenate([batches.batch(epoch * steps + step)[name] for step in range(steps)])


def test_an_epoch_sees_every_window_once(ring):
    batches = pipeline.TrainBatches(ring, seq_len=10, batch_size=4, seed=1)
    assert batches.windows == 100
    starts = []
    for epoch in range(5):
        rows = epoch_rows(batches, epoch)
        assert rows.dtype == np.int32 and rows.shape == (100, 10)
        np.testing.assert_array_equal(rows, (rows[:, :1] + np.arange(10)) % 1003)  # consecutive tokens
        assert len(np.unique(rows)) == 1000  # no token twice: no overlap
        starts.append(tuple(rows[:, 0]))
        assert list(rows[:, 0]) != sorted(rows[:, 0])
    assert len(set(map(frozenset, starts))) > 1  # the place moves
    other = pipeline.TrainBatches(ring, seq_len=10, batch_size=4, seed=2)
    assert not (epoch_rows(other, 0)[:, 0] == starts[0]).all()


def test_the_ring_gives_every_token_equal_chances(ring):
    batches = pipeline.TrainBatches(ring, seq_len=300, batch_size=3, seed=0)
    count = np.zeros(1003, int)
    for step in range(400):  # an epoch of 3 windows leaves 103 tokens out, others each time
        np.add.at(count, batches.batch(step)["x"].ravel(), 1)
    expected = 400 * 900 / 1003
    assert abs(count - expected).max() < 6 * (400 * 0.9 * 0.1) ** 0.5


def test_steps_may_straddle_epochs(ring):
    whole = pipeline.TrainBatches(ring, 10, 4, seed=5)
    rows = np.concatenate([epoch_rows(whole, epoch) for epoch in range(3)])
    for size in (7, 64, 128, 250):  # 128 and 250: more rows than windows
        batches = pipeline.TrainBatches(ring, 10, size, seed=5)
        for step in range(300 // size):
            np.testing.assert_array_equal(batches.batch(step)["x"], rows[step * size:(step + 1) * size])


def test_seq_len_up_to_all_tokens(ring):
    x = pipeline.TrainBatches(ring, 1003, 3).batch(0)["x"]
    assert all(sorted(row) == list(range(1003)) for row in x)


def test_order_is_pinned(ring, folders):
    """A saved data position means the same rows in later versions of NumPy and of this code."""
    batches = pipeline.TrainBatches(ring, 10, 4, seed=0)
    firsts = [batches.batch(step)["x"][:, 0].tolist() for step in (0, 26)]
    assert firsts == [[650, 530, 420, 680], [973, 340, 750, 140]]
    crops = pipeline.TrainBatches(folders[False, 4], 8, 6, seed=0, packing="crop", padding="hidden",
                                  variable_share=0.5).batch(3)
    firsts = [(row[0], size) for row, size in zip(crops["x"].tolist(), crops["score"].sum(1).tolist(), strict=True)]
    assert firsts == [(143, 6), (116, 2), (168, 8), (185, 3), (12, 5), (4, 8)]
    assert [document.text[:4] for document in streamed(6)] == ["<2.0", "<2.2", "<2.3", "<2.1", "<2.4", "<2.9"]
    iterator = stream().iterator()
    state = [(next(iterator), iterator.get_state()) for _ in range(9)][-1][1]
    assert state == {"next_index": 9, "epoch": 1, "source": 1, "record": 11, "window": 2, "place": 0, "offset": 8}
    halves = stream().iterator({name: [0, 0] if name != "next_index" else 0 for name in state})
    state = [(next(halves), halves.get_state()) for _ in range(9)][-1][1]
    assert state == {"next_index": 9, "epoch": [0, 1], "source": [1, 0],
                     "record": [1, 14], "window": [4, 3], "place": [0, 1], "offset": [20, 14]}


@pytest.mark.parametrize("packing, padding, share", SETTINGS)
@pytest.mark.parametrize("prompts", [False, True])
def test_batches_are_the_same_everywhere(folders, prompts, packing, padding, share):
    """However many shards, processes, rows a batch and threads, and whatever was asked before."""
    settings = dict(packing=packing, padding=padding, variable_share=share)
    one = pipeline.TrainBatches(folders[prompts, 1], 9, 24, 3, **settings)
    fields = {"x": (np.int32, (24, 9)), "index": (np.int32, (24,)), "score": (np.bool_, (24, 9)),
              "segment": (np.int32, (24, 9)), "tokens": (np.int32, (24,))}
    hidden, ends = padding == "hidden" or share > 0, (packing, padding) == ("crop", "end")
    fields = {name: fields[name] for name in ["x", "index"] + ["score"] * (prompts or hidden)
              + ["segment"] * (packing == "documents" or hidden) + ["tokens"] * ends}
    wanted = {}
    for step in (0, 1, 2, 7, 1000):
        wanted[step] = one.batch(step)
        assert {name: (array.dtype, array.shape) for name, array in wanted[step].items()} == fields
        np.testing.assert_array_equal(wanted[step]["index"], np.arange(24))
    example = one.example()
    assert {name: (array.dtype, array.shape) for name, array in example.items()} == fields
    assert not any(array.any() for array in example.values())
    for count in (1, 2, 4):
        parts = [pipeline.TrainBatches(folders[prompts, 4], 9, 24, 3, index, count, **settings)
                 for index in range(count)]
        for part in parts:
            assert {name: array.shape for name, array in part.example().items()} == {
                name: (24 // count, *shape[1:]) for name, (_, shape) in fields.items()}
        for step, batch in wanted.items():
            for name, array in batch.items():
                np.testing.assert_array_equal(np.concatenate([part.batch(step)[name] for part in parts]), array)
    halves = pipeline.TrainBatches(folders[prompts, 1], 9, 12, 3, **settings)  # other batches, the same rows
    for name in set(fields) - {"index"}:
        joined = np.concatenate([halves.batch(14)[name], halves.batch(15)[name]])
        np.testing.assert_array_equal(joined, wanted[7][name])
    with ThreadPoolExecutor(4) as pool:
        asked = [7, 1000, 0, 2, 1] * 4
        for step, batch in zip(asked, pool.map(one.batch, asked), strict=True):
            for name, array in batch.items():
                np.testing.assert_array_equal(array, wanted[step][name])
                array[:] = 1  # a caller's own copy
    assert not (pipeline.TrainBatches(folders[prompts, 1], 9, 24, 4, **settings).batch(0)["x"] == wanted[0]["x"]).all()


@pytest.mark.parametrize("packing, padding, share", SETTINGS)
@pytest.mark.parametrize("prompts", [False, True])
def test_every_row_against_brute_force(folders, prompts, packing, padding, share):
    """Each row is a piece of the text; score and segment are those of a loop over the tokens of one document."""
    documents = lengths_to_documents(LENGTHS, PROMPTS if prompts else None)
    flat, scored = flat_tokens(documents)
    size = 10
    batches = pipeline.TrainBatches(folders[prompts, 4], size, 8, seed=5, packing=packing, padding=padding,
                                    variable_share=share)
    parts = [flat_tokens([document]) for document in documents] if packing == "crop" else [
        (np.tile(flat, 2), np.tile(scored, 2))]
    there = collections.defaultdict(set)  # what a row may show -> the scores that go with it
    for ids, score in parts:
        for start in range(len(ids)):
            for length in range(1, min(size, len(ids) - start) + 1):
                there[tuple(ids[start:start + length])].add(tuple(score[start:start + length]))
    for step in range(20):
        batch = batches.batch(step)
        everything = np.ones((8, size), bool)
        score, segment = batch.get("score", everything), batch.get("segment", np.where(everything, 0, 0))
        for i, (row, row_score, row_segment) in enumerate(zip(batch["x"], score, segment, strict=True)):
            shown = int((row_segment >= 0).sum())
            length = text_length(row, shown, packing, padding)
            assert length >= 1
            assert tuple(row_score[:length]) in there[tuple(row[:length])]
            assert (row[length:] == EOT).all() and row_score[length:shown].all() and not row_score[shown:].any()
            numbered = segments(row, shown)
            assert row_segment.tolist() == (numbered if packing == "documents" else np.minimum(numbered, 0).tolist())
            assert packing != "crop" or row_score[:length].any()  # something to learn in every row
            assert share or shown == size or padding == "hidden"
            assert "tokens" not in batch or batch["tokens"][i] == row_score[:length].sum()


def test_crop_visits_every_document_once(folders):
    firsts = [([*prompt, *text, EOT])[0] for prompt, text in lengths_to_documents(LENGTHS)]
    batches = pipeline.TrainBatches(folders[False, 4], max(LENGTHS), 1, seed=2, packing="crop", padding="hidden")
    assert batches.windows == len(LENGTHS)
    orders = []
    for epoch in range(3):
        rows, segment = epoch_rows(batches, epoch), epoch_rows(batches, epoch, "segment")
        seen = [tuple(row[part == 0]) for row, part in zip(rows, segment, strict=True)]
        assert sorted(seen) == sorted((*prompt, *text, EOT) for prompt, text in lengths_to_documents(LENGTHS))
        orders.append([row[0] for row in seen])
        assert orders[-1] != firsts
    assert orders[0] != orders[1]


@pytest.mark.parametrize("length, prompt", [(30, 0), (30, 5), (30, 24), (30, 29), (10, 9), (11, 0)])
def test_crop_draws_every_window_equally_often(tmp_path, length, prompt):
    """All windows of S = 10 tokens in which something is scored, the last one with its end of text too."""
    batches = pipeline.TrainBatches(one_document(tmp_path / "t", length, prompt), 10, 400, seed=1, packing="crop")
    rows = np.concatenate([batches.batch(step)["x"] for step in range(5)])
    starts = np.bincount(rows[:, 0])  # tokens count from 0, so the first one says where the window is
    allowed = [start for start in range(length - 9) if start + 10 > prompt]
    assert np.flatnonzero(starts).tolist() == allowed
    expected = 2000 / len(allowed)
    assert ((starts[allowed] - expected) ** 2 / expected).sum() < len(allowed) + 5 * (2 * len(allowed)) ** 0.5


@pytest.mark.parametrize("packing", PACKINGS)
def test_lengths_vary(ring, packing):
    batches = pipeline.TrainBatches(ring, 10, 500, seed=3, packing=packing, variable_share=0.3)
    lengths = np.concatenate([(batches.batch(step)["segment"] >= 0).sum(1) for step in range(20)])
    counts = np.bincount(lengths, minlength=11)
    share, n = 0.3, 10_000
    expected = np.array([0.0] + [share / 10] * 9 + [1 - share * 9 / 10]) * n
    assert counts[0] == 0
    assert ((counts - expected)[1:] ** 2 / expected[1:]).sum() < 9 + 5 * 18 ** 0.5
    same = pipeline.TrainBatches(ring, 10, 500, seed=3, packing=packing, variable_share=0.3)
    other = pipeline.TrainBatches(ring, 10, 500, seed=4, packing=packing, variable_share=0.3)
    first = lengths[:500]
    assert ((same.batch(0)["segment"] >= 0).sum(1) == first).all()
    assert not ((other.batch(0)["segment"] >= 0).sum(1) == first).all()
    assert not (lengths[500:1000] == first).all()


def test_iterator_resumes_exactly(ring):
    batches = pipeline.TrainBatches(ring, 10, 12, seed=4)
    iterator = batches.iterator()
    assert iterator.get_state() == {"next_index": 0}
    for step in range(11):
        np.testing.assert_array_equal(next(iterator)["x"], batches.batch(step)["x"])
    state = json.loads(json.dumps(iterator.get_state()))
    assert state == {"next_index": 11}
    resumed = pipeline.TrainBatches(ring, 10, 12, seed=4).iterator()
    resumed.set_state(state)
    started = pipeline.TrainBatches(ring, 10, 12, seed=4).iterator(state)
    halves = [pipeline.TrainBatches(ring, 10, 12, 4, index, 2).iterator(state) for index in range(2)]
    for step in range(11, 41):
        for name, array in batches.batch(step).items():
            joined = np.concatenate([next(half)[name] for half in halves]) if name == "x" else array
            np.testing.assert_array_equal(joined, array)
        for other in (resumed, started):
            np.testing.assert_array_equal(next(other)["x"], batches.batch(step)["x"])
    assert resumed.get_state() == started.get_state() == {"next_index": 41}
    with pytest.raises(ValueError, match="a data position has step, here it must have next_index: .*data.stream"):
        batches.iterator({"step": 3})


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_read_threads_read_at_once(ring, monkeypatch, threads):
    """Reads that wait for each other until all threads are inside: fewer threads would wait for ever."""
    gate, inside, read = threading.Barrier(threads), itertools.count(1), pipeline.Split._read

    def waiting(self, start, count):
        if next(inside) <= threads:
            gate.wait(timeout=20)
        return read(self, start, count)

    monkeypatch.setattr(pipeline.Split, "_read", waiting)
    batches = pipeline.TrainBatches(ring, 10, 4, seed=5, read_threads=threads)
    iterator = batches.iterator()
    found = [next(iterator)["x"] for _ in range(12)]
    np.testing.assert_array_equal(found, [batches.batch(step)["x"] for step in range(12)])


_SLOW_DISK = """
import ctypes, fcntl, mmap, os, struct, sys, threading
import numpy as np
from hdlm_jax.data import pipeline

slow = ctypes.CDLL(None).syscall(323, os.O_CLOEXEC | 1)  # userfaultfd: pages that come when somebody says so
if slow < 0:
    sys.exit(3)
pages = mmap.mmap(-1, 1 << 16)
flat = np.frombuffer(pages, np.uint16)
fcntl.ioctl(slow, 0xC018AA3F, bytearray(struct.pack("QQQ", 0xAA, 0, 0)))
fcntl.ioctl(slow, 0xC020AA00, bytearray(struct.pack("QQQQ", flat.ctypes.data, 1 << 16, 1, 0)))
split = object.__new__(pipeline.Split)
split._read = lambda start, count: flat[start:start + count]
threading.Thread(target=split.gather, args=(np.array([7]), int(sys.argv[1])), daemon=True).start()
assert len(os.read(slow, 32)) == 32  # the other thread waits for the page, and this one runs on
os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="numbers of system calls")
@pytest.mark.parametrize("seq_len", [1, 128, 1024])
def test_a_read_that_waits_leaves_other_threads_running(seq_len, root):
    """A row whose page is not there yet: held meanwhile, Python's lock would stop this process for good."""
    done = subprocess.run([sys.executable, "-c", _SLOW_DISK, str(seq_len)], cwd=root, timeout=60,
                          env=os.environ | {"PYTHONPATH": str(root)}, check=False)
    if done.returncode == 3:
        pytest.skip("userfaultfd is not permitted here")
    assert done.returncode == 0


KEYS = np.random.Philox(key=[3, 4]).random_raw(8)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 1000, 4096, 4097])
def test_an_order_without_a_table_is_a_permutation(count):
    places = np.arange(count)
    found = pipeline._permuted(places, count, KEYS)
    assert found.dtype == np.int64 and sorted(found) == places.tolist()
    for one in places[:5]:
        assert pipeline._permuted(places[one:one + 1], count, KEYS) == found[one]


@pytest.mark.parametrize("count", [4097, 65536])
def test_an_order_without_a_table_looks_random(count):
    """Mean displacement, serial correlation and fixed points, each within 4 standard errors of independent draws."""
    places = np.arange(count)
    found = pipeline._permuted(places, count, KEYS)
    moved, expected = np.abs(found - places) / count, 1 / 3
    assert abs(moved.mean() - expected) < 4 * (1 / 18 / count) ** 0.5
    for lag in (1, 2, 64, 256):
        assert abs(np.corrcoef(found[:-lag], found[lag:])[0, 1]) < 4 / count**0.5
    assert (found == places).sum() < 1 + 4
    other = pipeline._permuted(places, count, KEYS + np.uint64(1))
    assert abs(np.corrcoef(found, other)[0, 1]) < 4 / count**0.5


def test_many_windows_need_no_table(ring, monkeypatch):
    table = pipeline.TrainBatches(ring, 10, 4, seed=1)
    in_tables = [epoch_rows(table, epoch)[:, 0].tolist() for epoch in range(2)]
    monkeypatch.setattr(pipeline, "_SORTED_WINDOWS", 100)
    same = pipeline.TrainBatches(ring, 10, 4, seed=1)
    assert [epoch_rows(same, epoch)[:, 0].tolist() for epoch in range(2)] == in_tables
    monkeypatch.setattr(pipeline, "_SORTED_WINDOWS", 99)
    orders = []
    for seed, epoch in itertools.product((1, 2), (0, 1)):
        batches = pipeline.TrainBatches(ring, 10, 4, seed=seed)
        rows = epoch_rows(batches, epoch)
        np.testing.assert_array_equal(rows, (rows[:, :1] + np.arange(10)) % 1003)
        assert len(np.unique(rows)) == 1000  # no token twice
        orders.append(tuple((rows[:, 0] - rows[:, 0].min()) // 10))
    assert len(set(orders)) == 4 and not set(map(tuple, in_tables)) & set(orders)


def test_a_billion_windows_take_no_memory(ring, monkeypatch):
    batches = pipeline.TrainBatches(ring, 10, 64, seed=0)
    batches.windows, batches.num_tokens, seen = 10**9, 10**10, []
    monkeypatch.setattr(pipeline.Split, "gather", lambda self, starts, size: seen.append(starts) or np.zeros(
        (len(starts), size), np.int32))
    tracemalloc.start()
    for step in range(20):
        batches.batch(step * 10**6)  # the first 15 of them in epoch 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    starts = np.concatenate(seen)
    assert peak < 1 << 20 and len(np.unique(starts[:15 * 64])) == 15 * 64
    assert starts.min() < 10**9 and 9 * 10**9 < starts.max() < 10**10


# ------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize("packing, padding", KINDS)
@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("seq_len", [1, 7, 128, 10**4])
def test_validation_has_every_scored_token_once(folders, prompts, packing, padding, seq_len):
    documents = lengths_to_documents(LENGTHS, PROMPTS if prompts else None)[5:27]
    ends = (packing, padding) == ("crop", "end")
    wanted, length = [], []
    for part in ([document] for document in documents) if packing == "crop" else [documents]:
        flat, score = flat_tokens(part)
        for start in range(0, len(flat), seq_len):
            row, scored = flat[start:start + seq_len], score[start:start + seq_len]
            if not scored.any():  # of a prompt alone
                continue
            length.append(seq_len if ends else len(row))
            behind = seq_len - len(row)
            wanted.append((np.pad(row, (0, behind), constant_values=EOT),
                           np.pad(scored, (0, behind), constant_values=ends), scored.sum()))
    for shards in (1, 4):
        rows = pipeline.valid_rows(folders[prompts, shards], seq_len, packing=packing, padding=padding)
        assert {name: array.dtype for name, array in rows.items()} == {
            "x": np.int32, "score": np.bool_, "segment": np.int32, "tokens": np.int32}
        for name, those in zip(("x", "score", "tokens"), zip(*wanted, strict=True), strict=True):
            np.testing.assert_array_equal(rows[name], those)
        numbered = [segments(row, size) for (row, *_), size in zip(wanted, length, strict=True)]
        np.testing.assert_array_equal(rows["segment"], numbered if packing == "documents" else np.minimum(numbered, 0))
        part = pipeline.valid_rows(folders[prompts, shards], seq_len, limit=3, packing=packing, padding=padding)
        for name in rows:
            np.testing.assert_array_equal(part[name], rows[name][:3])


# ------------------------------------------------------------------------------------------------ raw documents


class Text(str):
    """A str whose life can be watched: plain ones take no weak reference."""


@dataclasses.dataclass
class Shelf:
    """A reader of made-up documents: source s has 3 + 4s training documents, some others, and records that are bad."""

    prompt_field: str = ""
    chat: bool = False
    feature_shape: tuple = (0, 0)
    read_documents: int = 0
    most: int = 0  # documents in memory at once
    texts: list = dataclasses.field(default_factory=list)

    def read(self, source: str):
        number = int(source)
        for i in range(3 + 4 * number):
            if i % 4 == number:
                yield Bad(source, f"line {i}", "not JSON")
            if i % 3 == number:
                yield Document("held out", source, "what?" * bool(self.prompt_field))
            prompt = f"prompt {number}.{i} " * (i % 3) if self.prompt_field else ""
            text = Text(f"<{number}.{i}" + "=" * (i * 7 % 25 + 60 * (i == 9)) + ">")
            self.read_documents += 1
            self.texts.append(weakref.ref(text))
            self.most = max(self.most, sum(text() is not None for text in self.texts))
            yield Document(text, source, prompt)


class CountingTokenizer(tokenizers.Tokenizer):
    def __init__(self):
        super().__init__("bytes", [bytes([byte]) for byte in range(256)])
        self.encoded = 0
        self.calls: list[list[str]] = []

    def encode_batch(self, texts):
        self.encoded += len(texts)
        self.calls.append([str(text) for text in texts])  # copies, whose lives nobody watches
        return super().encode_batch(texts)


SOURCES = ["0", "1", "2"]
SHELF = {prompts: [document for source in SOURCES for document in Shelf("q" if prompts else "").read(source)
                   if isinstance(document, Document) and document.text != "held out"]
         for prompts in (False, True)}  # 3 + 7 + 11 training documents


def stream(prompts: bool = False, **settings) -> pipeline.StreamBatches:
    settings = dict(seq_len=16, batch_size=4, seed=1, shuffle_documents=5) | settings
    return pipeline.StreamBatches(Shelf("q" if prompts else ""), SOURCES, CountingTokenizer(),
                                  lambda document: document.text != "held out", **settings)


def streamed(count: int, prompts: bool = False, **settings) -> list[Document]:
    """The first documents of a stream, read back from its concatenated tokens."""
    iterator = stream(prompts, **settings).iterator()
    known = {(document.prompt + document.text).encode(): document for document in SHELF[prompts]}
    flat: list[int] = []
    while flat.count(256) < count:
        flat += next(iterator)["x"].ravel().tolist()
    pieces = bytes(token % 256 for token in flat).split(b"\0")  # end of text, 256, becomes 0
    return [known[piece] for piece in pieces[:count]]


@pytest.mark.parametrize("prompts", [False, True])
def test_a_stream_reads_every_document_once_an_epoch(prompts):
    read = streamed(63, prompts, shuffle_documents=1)  # three epochs as they are read
    orders = []
    for epoch in range(3):
        groups = [(source, list(group)) for source, group in itertools.groupby(
            read[21 * epoch:21 * (epoch + 1)], lambda document: document.name)]
        assert sorted(source for source, _ in groups) == SOURCES
        for source, group in groups:  # each source in one go, from its beginning
            assert group == [document for document in SHELF[prompts] if document.name == source]
        orders.append([source for source, _ in groups])
    assert len(set(map(tuple, orders))) > 1
    shuffled = streamed(63, prompts, shuffle_documents=5)
    moved = []
    for epoch in range(3):  # the last window of an epoch is shorter
        for first in (0, 5, 10, 15, 20):
            window = slice(21 * epoch + first, 21 * epoch + min(first + 5, 21))
            assert sorted(shuffled[window]) == sorted(read[window])
            moved.append(tuple(read[window].index(document) for document in shuffled[window]))
    assert len(set(moved)) > 8  # of 12 windows of 5 documents
    assert streamed(21, prompts, shuffle_documents=5, seed=2) != shuffled[:21]
    everything = streamed(42, prompts, shuffle_documents=1000)
    assert sorted(everything[:21]) == sorted(everything[21:]) == sorted(SHELF[prompts])


@pytest.mark.parametrize("packing, padding, share", SETTINGS)
@pytest.mark.parametrize("prompts", [False, True])
def test_streamed_rows_against_brute_force(prompts, packing, padding, share, monkeypatch):
    documents = streamed(200, prompts)
    monkeypatch.setattr(pipeline, "_ENCODED_CHARS", 40)  # a few documents at once
    ids = [[*document.prompt.encode(), *document.text.encode(), 256] for document in documents]
    scored = [[place >= len(document.prompt) for place in range(len(row))]
              for document, row in zip(documents, ids, strict=True)]
    flat, flat_score = sum(ids, []), sum(scored, [])
    batches = stream(prompts, packing=packing, padding=padding, variable_share=share)
    iterator, lengths, windows = batches.iterator(), [], set()
    for step in range(40):
        batch = next(iterator)
        for (name, array), like in zip(batch.items(), batches.example().items(), strict=True):
            assert (name, array.dtype, array.shape) == (like[0], like[1].dtype, like[1].shape)
        everything = np.ones((4, 16), bool)
        score, segment = batch.get("score", everything), batch.get("segment", np.where(everything, 0, 0))
        for i in range(4):
            number, shown = 4 * step + i, int((segment[i] >= 0).sum())
            row, row_score = batch["x"][i].tolist(), score[i].tolist()
            length = text_length(row, shown, packing, padding, 256)
            assert "tokens" not in batch or batch["tokens"][i] == sum(row_score[:length])
            if packing == "crop":
                found = [start for start in range(len(ids[number]) - length + 1)
                         if (row[:length], row_score[:length])
                         == (ids[number][start:start + length], scored[number][start:start + length])]
                assert found and any(row_score)
                windows.add((found[0], len(ids[number]) - length))
            else:
                begin = 16 * number
                assert (row[:length], row_score[:length]) == (flat[begin:begin + length],
                                                              flat_score[begin:begin + length])
            numbered = segments(np.where(batch["x"][i] == 256, EOT, 0), shown)
            assert segment[i].tolist() == (numbered if packing == "documents" else np.minimum(numbered, 0).tolist())
            assert row[length:] == [256] * (16 - length) and not any(row_score[shown:])
            assert all(row_score[length:shown])
            whole = min(16, len(ids[number])) if packing == "crop" else 16
            assert 1 <= length <= whole
            lengths.append(length == whole)
    assert all(lengths) if share == 0 else 0.4 < np.mean(lengths) < 0.75
    if packing == "crop":
        assert any(start == 0 < last for start, last in windows) and any(start == last > 0 for start, last in windows)


@pytest.mark.parametrize("packing, padding, share", SETTINGS)
@pytest.mark.parametrize("prompts", [False, True])
def test_a_stream_goes_on_from_every_position(prompts, packing, padding, share):
    """From any batch, on any number of processes, read ahead or not: batches and positions of an undisturbed run."""
    settings = dict(packing=packing, padding=padding, variable_share=share, batch_size=4, shuffle_documents=4)
    iterator = stream(prompts, **settings).iterator(prefetch=3)
    wanted, states = [], [json.loads(json.dumps(iterator.get_state()))]
    for _ in range(40):
        wanted.append(next(iterator))
        states.append(json.loads(json.dumps(iterator.get_state())))
    assert states[-1]["epoch"] >= 1 and states[-1]["next_index"] == 40
    for step in range(0, 37):
        count = (1, 2, 4)[step % 3]
        parts = [stream(prompts, process_index=index, process_count=count, **settings).iterator(
            states[step], prefetch=step % 2) for index in range(count)]
        for later in range(step, step + 1 + 3 * (step % 5 == 0)):
            batches = [next(part) for part in parts]
            for name, array in wanted[later].items():
                np.testing.assert_array_equal(np.concatenate([batch[name] for batch in batches]), array)
            assert [part.get_state() for part in parts] == [states[later + 1]] * count
    iterator.set_state(states[7])
    np.testing.assert_array_equal(next(iterator)["x"], wanted[7]["x"])


def joined(parts: list) -> dict:
    """The next batch of all processes."""
    batches = [next(part) for part in parts]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def together(parts: list, monkeypatch) -> dict:
    """The position of processes that save together, through JSON."""
    states = [part.get_state() for part in parts]
    numbers = np.max([list(zip(*list(state.values())[1:], strict=True)) for state in states], axis=0)
    monkeypatch.setattr(pipeline.processes, "largest", lambda own: numbers)
    found = {json.dumps(pipeline.whole_position(state)) for state in states}
    assert len(found) == 1
    return json.loads(found.pop())


@pytest.mark.parametrize("packing, padding, share", [("concat", "end", 0.0), ("documents", "end", 0.5),
                                                     ("crop", "hidden", 0.5)])
@pytest.mark.parametrize("shares", [2, 3, 4])  # of three sources: whole sources, or every fourth record of all
@pytest.mark.parametrize("prompts", [False, True])
def test_a_stream_in_shares_is_the_same_for_any_processes(prompts, shares, packing, padding, share, monkeypatch):
    """Begun by `shares` processes, walked by any number, saved and resumed by another: the same batches."""
    def walk(count, position=None):
        return [stream(prompts, packing=packing, padding=padding, variable_share=share, batch_size=12,
                       process_index=index, process_count=count).iterator(position, prefetch=index % 2)
                for index in range(count)]

    parts, wanted = walk(shares), []
    states = [parts[0].get_state()]
    for _ in range(24):
        wanted.append(joined(parts))
        assert [state["place"].count(-1) for state in (part.get_state() for part in parts)] == [shares - 1] * shares
        states.append(together(parts, monkeypatch))
    assert min(states[-1]["epoch"]) >= 1 and states[-1]["next_index"] == 24
    for begin in range(24):
        count = (1, 2, 4, 3, 6, 12)[begin % 6]
        parts = walk(count, states[begin])
        for step in range(begin, min(24, begin + 24 if begin < 6 else begin + 2)):
            for name, array in joined(parts).items():
                np.testing.assert_array_equal(array, wanted[step][name])
            assert together(parts, monkeypatch) == states[step + 1]


@pytest.mark.parametrize("shares", [1, 2, 4])
def test_every_document_is_tokenised_by_one_process(shares):
    parts = [stream(process_index=index, process_count=shares, shuffle_documents=10_000) for index in range(shares)]
    for part in parts:
        iterator = part.iterator(prefetch=0)
        while len(part._tokenizer.calls) < 3:  # a window, here all of a share's epoch, is encoded at once
            next(iterator)
    for epoch in range(3):
        encoded = [text for part in parts for text in part._tokenizer.calls[epoch]]
        assert sorted(encoded) == sorted(document.text for document in SHELF[False])
        assert shares == 1 or max(len(part._tokenizer.calls[epoch]) for part in parts) < 20
    orders = [part._tokenizer.calls[0] for part in parts]
    assert all(order != sorted(order) for order in orders if len(order) > 3)


def test_shares_of_a_stream_hold_its_window_together():
    both = stream().iterator(stream(process_count=2).iterator().get_state(), prefetch=0)
    batches = stream(process_count=2, shuffle_documents=8)
    iterator = batches.iterator(prefetch=0)
    for _ in range(60):
        next(iterator)
    assert batches._reader.most <= 4 + 1
    state = next(both) and both.get_state()
    with pytest.raises(ValueError, match="the data position has 2 shares, which must divide train.batch_size=5: "):
        stream(batch_size=5).iterator(state)
    with pytest.raises(ValueError, match="lacks shares that other processes walked"):
        stream().iterator(iterator.get_state())


def test_shares_without_a_document_wait_for_the_next_epoch():
    """Three documents for eight shares: each gets some in time; none at all is an error for every share."""
    for index in range(8):
        batches = stream(batch_size=8, process_index=index, process_count=8)
        batches._sources = ["0"]
        assert next(batches.iterator(prefetch=0))["x"].shape == (1, 16)
        batches._is_training = lambda document: False
        with pytest.raises(ValueError, match="data.files: no training document in the 1 sources"):
            next(batches.iterator(prefetch=0))


def test_a_stream_skips_without_tokenising_and_holds_one_window():
    batches = stream(shuffle_documents=4)
    iterator = batches.iterator(prefetch=0)
    for _ in range(60):
        next(iterator)
        used = batches._tokenizer.encoded
        assert batches._reader.read_documents <= used + 4  # no more than the window
    assert batches._reader.most <= 4 + 1  # and the one being read
    state = iterator.get_state()
    assert used > 50 and state["record"] + state["window"] > 4
    resumed = stream(shuffle_documents=4)
    next(resumed.iterator(state, prefetch=0))
    assert resumed._tokenizer.encoded <= 8 < 21


def test_a_stream_that_cannot_work_says_why():
    class Broken(Shelf):
        def read(self, source):
            yield from super().read("0")
            raise ValueError(f"{source}: no such file")

    never = stream()
    never._is_training = lambda document: False
    with pytest.raises(ValueError, match="data.files: no training document in the 3 sources"):
        next(never.iterator())
    broken = pipeline.StreamBatches(Broken(), ["a.txt"], CountingTokenizer(), lambda _: True, seq_len=4, batch_size=1)
    with pytest.raises(ValueError, match="a.txt: no such file"):
        next(broken.iterator())
    said: list[str] = []
    few = stream(bad_share=1e-4, say=said.append)  # one of the three that an epoch has
    with pytest.raises(ValueError, match=r"line \d+: not JSON; 2 of \d+ records cannot be read, more than data.bad"):
        list(itertools.islice(few.iterator(), 100))
    assert len(said) == 2 and said[0].startswith("data: ") and "not JSON; skipped, no. 1 of" in said[0]
    with pytest.raises(ValueError, match="a data position has next_index, here it must have next_index, epoch, "):
        stream().iterator({"next_index": 3})
    state = stream().iterator().get_state()
    for other in (dict(place=5), dict(offset=10**6)):
        with pytest.raises(ValueError, match="the data position is of other documents"):
            next(stream().iterator(state | other))


def test_a_stream_of_files(tmp_path):
    """`Reader` on files, one of them with a bad line; the tokens are those of the tokenizer."""
    texts = {name: [f"{name} {i} " + "word " * i for i in range(9)] for name in "ab"}
    for name, lines in texts.items():
        rows = [json.dumps({"text": text}) for text in lines]
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*rows[:4], "{", *rows[4:]]))
    tokenizer = tokenizers.make_tokenizer("bpe", 300, itertools.chain(*texts.values()))
    sources = resolve(str(tmp_path / "*.jsonl"))
    batches = pipeline.StreamBatches(Reader(), sources, tokenizer, lambda document: "3" not in document.text,
                                     seq_len=64, batch_size=16, packing="crop", padding="hidden")
    batch = next(batches.iterator())
    found = [tokenizer.decode(row[there][:-1]) for row, there in zip(batch["x"], batch["score"], strict=True)]
    assert sorted(found) == sorted(text for lines in texts.values() for text in lines if "3" not in text)
