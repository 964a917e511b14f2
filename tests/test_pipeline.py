"""hdlm_jax/text/pipeline.py: prepared folders are whole, checked, reused; batches are pure and resume."""
import dataclasses
import gzip
import hashlib
import json
import math
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hdlm_jax.text import corpus, pipeline, tokens

BYTES = dict(tokenizer_kind="bytes")


def write_jsonl(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def text(i: int) -> str:
    return f"document {i} says é {'x' * (i % 7)}"


def numbered(path: Path, count: int = 60) -> str:
    return write_jsonl(path, [{"text": text(i), "q": f"what {i}?"} for i in range(count)])


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> tuple[Path, pipeline.Manifest]:
    folder = tmp_path_factory.mktemp("embedded")
    return folder, pipeline.prepare(folder, vocab_size=1024, say=lambda _: None)


@pytest.fixture(scope="module")
def ring(tmp_path_factory) -> Path:
    """A folder whose training tokens are 0, 1, ..., T-1 (T = 1003): every token says where it is from."""
    base = tmp_path_factory.mktemp("ring")
    source = write_jsonl(base / "a.jsonl", [{"text": "x" * 1002}])
    held = write_jsonl(base / "b.jsonl", [{"text": "y"}])
    manifest = pipeline.prepare(base / "tokens", source="files", files=source, validation=held, **BYTES)
    assert manifest.train_tokens == 1003
    np.arange(1003, dtype="<u2").tofile(base / "tokens" / "train.bin")
    return base / "tokens"


# ---------------------------------------------------------------------------------------------------- prepare


def test_embedded_corpus_prepared(embedded):
    folder, manifest = embedded
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["manifest.json", tokens.JSON_FILE, tokens.RANK_FILE, "train.bin", "valid.bin"])
    assert manifest == pipeline.load_manifest(folder)
    assert (manifest.vocab_size, manifest.eot, manifest.dtype) == (1024, 1023, "uint16")
    assert not manifest.masks
    tokenizer = tokens.load_tokenizer(folder)
    assert tokenizer.fingerprint == manifest.tokenizer_fingerprint
    documents = corpus.embedded_corpus()[0]
    fingerprint = corpus.Fingerprint()
    for document in documents:
        fingerprint.add(document)
    assert manifest.corpus_fingerprint == fingerprint.hexdigest()
    for split, held in (("train", False), ("valid", True)):
        flat = pipeline.read_tokens(folder, split)
        wanted = [document.text for document in documents if corpus.split(document, 0.05) == held]
        ends = np.flatnonzero(flat == manifest.eot)
        pieces = np.split(flat, ends + 1)
        assert len(pieces.pop()) == 0 and len(pieces) == len(wanted)
        assert [tokenizer.decode(piece[:-1]) for piece in pieces[:20]] == wanted[:20]
        assert getattr(manifest, f"{split}_documents") == len(wanted)
        assert getattr(manifest, f"{split}_tokens") == len(flat)
        assert getattr(manifest, f"{split}_scored_tokens") == len(flat)
        assert getattr(manifest, f"{split}_bytes") == sum(len(text.encode()) for text in wanted)
        raw = (folder / f"{split}.bin").read_bytes()
        facts = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        assert manifest.shards[f"{split}.bin"] == facts
    # the BPE saw training documents only
    assert manifest.bpe_training_bytes == manifest.train_bytes
    texts = [document.text for document in documents if not corpus.split(document, 0.05)]
    assert tokens.make_tokenizer("bpe", 1024, texts).fingerprint == manifest.tokenizer_fingerprint


def test_unigram_nats_by_hand(embedded):
    folder, manifest = embedded
    train = pipeline.read_tokens(folder).tolist()
    valid = pipeline.read_tokens(folder, "valid").tolist()
    counts = [1] * manifest.vocab_size
    for token in train:
        counts[token] += 1
    nats = -sum(math.log(counts[token] / (len(train) + manifest.vocab_size)) for token in valid) / len(valid)
    assert manifest.unigram_nats == pytest.approx(nats, rel=1e-12)
    bits = nats * len(valid) / math.log(2)
    assert manifest.unigram_bits_per_byte == pytest.approx(bits / manifest.valid_bytes, rel=1e-12)
    assert 4.0 < nats < math.log(1024)


def test_prepare_is_idempotent_and_says_so(tmp_path):
    files = numbered(tmp_path / "a.jsonl")
    said: list[str] = []
    arguments = dict(source="files", files=files, validation_fraction=0.2, say=said.append, **BYTES)
    first = pipeline.prepare(tmp_path / "tokens", **arguments)
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tokens").iterdir()}
    assert pipeline.prepare(tmp_path / "tokens", **arguments) == first
    assert times == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tokens").iterdir()}
    assert len(said) == 2 and "made" in said[0] and "reusing" in said[1]
    assert first.corpus_fingerprint[:12] in said[1]
    assert all("\n" not in line for line in said)
    # the same in another place gives the same bytes
    other = pipeline.prepare(tmp_path / "other", **arguments)
    assert other == first and other.fingerprint == first.fingerprint
    for name in first.shards:
        assert (tmp_path / "other" / name).read_bytes() == (tmp_path / "tokens" / name).read_bytes()
    # tokens go on where their source is not (a pod that was sent the folder)
    Path(files).unlink()
    assert pipeline.prepare(tmp_path / "tokens", **arguments) == first
    assert "source files are not on this machine" in said[-1]
    with pytest.raises(ValueError, match="no file matches"):
        pipeline.prepare(tmp_path / "third", **arguments)


@pytest.mark.parametrize("change, named", [
    (dict(text_field="q"), "data.text_field='text', it is now 'q'"),
    (dict(validation_fraction=0.3), "data.validation_fraction=0.2, it is now 0.3"),
    (dict(tokenizer_kind="bpe"), "tokenizer.kind='bytes', it is now 'bpe'"),
    (dict(prompt_field="q"), "data.prompt_field='', it is now 'q'"),
    (dict(source="embedded", files=()), "data.source='files', it is now 'embedded'"),
])
def test_other_settings_are_named(tmp_path, change, named):
    arguments = dict(source="files", files=numbered(tmp_path / "a.jsonl"), validation_fraction=0.2, **BYTES)
    pipeline.prepare(tmp_path / "tokens", **arguments)
    pipeline.prepare(tmp_path / "tokens", **arguments, vocab_size=7)  # of no importance to bytes
    with pytest.raises(ValueError, match=named) as error:
        pipeline.prepare(tmp_path / "tokens", **(arguments | change))
    assert "\n" not in str(error.value) and f"delete {tmp_path / 'tokens'}" in str(error.value)


def test_changed_files_and_damaged_shards_are_named(tmp_path):
    arguments = dict(source="files", files=str(tmp_path / "*.jsonl"), validation_fraction=0.2, **BYTES)
    numbered(tmp_path / "a.jsonl")
    pipeline.prepare(tmp_path / "tokens", **arguments)
    numbered(tmp_path / "b.jsonl", 3)
    with pytest.raises(ValueError, match=r"from other files: b\.jsonl \(\d+ bytes\)"):
        pipeline.prepare(tmp_path / "tokens", **arguments)
    (tmp_path / "b.jsonl").unlink()
    raw = bytearray((tmp_path / "tokens" / "valid.bin").read_bytes())
    raw[0] ^= 1
    (tmp_path / "tokens" / "valid.bin").write_bytes(raw)
    with pytest.raises(ValueError, match=r"valid\.bin is damaged or missing: delete"):
        pipeline.prepare(tmp_path / "tokens", **arguments)
    (tmp_path / "tokens" / "valid.bin").unlink()
    with pytest.raises(ValueError, match=r"valid\.bin is damaged or missing: delete"):
        pipeline.prepare(tmp_path / "tokens", **arguments)


def test_a_failed_prepare_leaves_no_manifest_and_is_done_again(tmp_path):
    path = tmp_path / "a.jsonl"
    numbered(path)
    good = path.read_text()
    path.write_text(good + '{"text": 1}\n')
    arguments = dict(source="files", files=str(path), validation_fraction=0.2, **BYTES)
    with pytest.raises(ValueError, match=r"a\.jsonl:61: field 'text' must be a string"):
        pipeline.prepare(tmp_path / "tokens", **arguments)
    assert list((tmp_path / "tokens").iterdir()) == []  # not even temporary files
    with pytest.raises(ValueError, match=r"no tokens in .*\(manifest.json is missing\); run --mode=prepare"):
        pipeline.TrainBatches(tmp_path / "tokens", 8, 2)
    path.write_text(good)
    assert pipeline.prepare(tmp_path / "tokens", **arguments).train_documents > 30


def test_killed_prepare_is_done_again(tmp_path):
    """SIGKILL while documents stream: what stays behind is never taken for whole."""
    path = tmp_path / "a.jsonl"
    numbered(path, 60_000)
    code = ("import sys; from hdlm_jax.text import pipeline; pipeline._BATCH_BYTES = 2000; "
            f"pipeline.prepare({str(tmp_path / 'tokens')!r}, source='files', files={str(path)!r}, "
            "tokenizer_kind='bytes', say=print)")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        if any(file.stat().st_size for file in tmp_path.glob("tokens/train.bin.tmp*")):
            break
    process.kill()
    process.communicate()
    assert not (tmp_path / "tokens" / "manifest.json").exists()
    manifest = pipeline.prepare(tmp_path / "tokens", source="files", files=str(path), **BYTES)
    again = pipeline.prepare(tmp_path / "clean", source="files", files=str(path), **BYTES)
    assert manifest == again


def test_validation_files_and_leaks(tmp_path):
    numbered(tmp_path / "train.jsonl", 50)
    with gzip.open(tmp_path / "held.jsonl.gz", "wt") as file:
        for i in (3, 7, 99):
            file.write(json.dumps({"text": text(i), "q": ""}) + "\n")
    manifest = pipeline.prepare(tmp_path / "tokens", source="files", files=str(tmp_path / "train.jsonl"),
                                validation=[str(tmp_path / "held*")], vocab_size=300)
    assert (manifest.train_documents, manifest.valid_documents, manifest.left_out) == (48, 3, 2)
    assert manifest.bpe_training_bytes == manifest.train_bytes
    assert manifest.settings["data.validation_fraction"] is None
    assert [name for name, _ in manifest.sources] == ["train.jsonl", "held.jsonl.gz"]


def test_bpe_training_text_is_a_share_of_each_file(tmp_path):
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i:03} " * 10} for i in range(200)])
    held = write_jsonl(tmp_path / "held.jsonl", [{"text": "z"}])
    arguments = dict(source="files", files=str(tmp_path / "[ab].jsonl"), validation=held)
    manifest = pipeline.prepare(tmp_path / "tokens", vocab_size=400, bpe_training_bytes=2020, **arguments)
    assert manifest.bpe_training_bytes == 2020
    texts = [(f"{name}{i:03} " * 10)[:1010 - 50 * i] for name in "ab" for i in range(21)]
    assert manifest.tokenizer_fingerprint == tokens.make_tokenizer("bpe", 400, texts).fingerprint
    said: list[str] = []
    less = pipeline.prepare(tmp_path / "less", vocab_size=50_000, say=said.append, **arguments)
    assert less.vocab_size < 50_000
    assert "50,000 were asked for" in said[0] and f"V={less.vocab_size:,}" in said[0]


def test_wide_vocabularies_take_uint32(tmp_path):
    words = [bytes([i]) for i in range(256)] + [b"%d" % i for i in range(10, 66_000)]
    tokens.Tokenizer("bpe", words).save(tmp_path / "t")
    files = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{i} {i}"} for i in range(65_000, 65_100)])
    manifest = pipeline.prepare(tmp_path / "tokens", source="files", files=files, validation_fraction=0.2,
                                tokenizer_file=str(tmp_path / "t" / tokens.RANK_FILE))
    assert manifest.dtype == "uint32" and manifest.vocab_size == len(words) + 1
    rows = pipeline.valid_rows(tmp_path / "tokens", 7)
    assert rows["x"].max() == manifest.eot > 65_535
    with pytest.raises(ValueError, match="tokenizer.file"):
        pipeline.prepare(tmp_path / "tokens", source="files", files=files, validation_fraction=0.2)


@pytest.mark.parametrize("arguments, message", [
    (dict(source="web"), "data.source is 'web'; choices: embedded, files"),
    (dict(source="files"), "data.files is empty"),
    (dict(files="a.txt"), "data.files and data.prompt_field need data.source='files'"),
    (dict(validation_fraction=0.0), "data.validation_fraction is 0.0; must be between 0 and 1"),
    (dict(validation="no/such.txt"), "data.validation: no file matches 'no/such.txt'"),
    (dict(vocab_size=100), "tokenizer.vocab_size is 100; must be at least 257"),
    (dict(tokenizer_kind="words"), "tokenizer.kind is 'words'; choices: gpt2, bpe, bytes"),
    (dict(tokenizer_file="no/such"), "tokenizer.file 'no/such' cannot be read"),
])
def test_wrong_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline.prepare(tmp_path / "tokens", **arguments)
    assert not (tmp_path / "tokens").exists()


def test_an_empty_split_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("one document\n\nonly")
    with pytest.raises(ValueError, match="no document of 1 falls in the valid split: .*blank_line") as error:
        pipeline.prepare(tmp_path / "tokens", source="files", files=str(tmp_path / "a.txt"), **BYTES)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------- prompts


def test_prompts_are_tokens_that_are_not_scored(tmp_path):
    files = numbered(tmp_path / "a.jsonl")
    manifest = pipeline.prepare(tmp_path / "tokens", source="files", files=files, prompt_field="q",
                                validation_fraction=0.3, **BYTES)
    assert manifest.masks and set(manifest.shards) == {
        "train.bin", "train.mask.bin", "valid.bin", "valid.mask.bin"}
    documents = list(corpus.documents("files", files, "text", "q"))
    held = [document for document in documents if corpus.split(document, 0.3)]
    prompts, texts = ([getattr(document, name).encode() for document in held] for name in ("prompt", "text"))
    flat = b"".join(prompt + text + b"\x00" for prompt, text in zip(prompts, texts, strict=True))
    rows = pipeline.valid_rows(tmp_path / "tokens", 16)
    x, score = rows["x"][rows["valid"]], rows["score"][rows["valid"]]
    assert np.where(x == 256, 0, x).astype(np.uint8).tobytes() == flat
    wanted = np.concatenate([[0] * len(prompt) + [1] * (len(text) + 1)
                             for prompt, text in zip(prompts, texts, strict=True)])
    np.testing.assert_array_equal(score, wanted)
    assert not rows["score"][~rows["valid"]].any()
    assert manifest.valid_scored_tokens == score.sum() < manifest.valid_tokens == len(x)
    assert manifest.valid_scored_bytes == sum(map(len, texts))
    assert manifest.valid_bytes == sum(map(len, texts)) + sum(map(len, prompts))
    # training rows carry the mask of the same tokens
    flat_x = pipeline.read_tokens(tmp_path / "tokens")
    flat_mask = np.fromfile(tmp_path / "tokens" / "train.mask.bin", np.uint8)
    batch = pipeline.TrainBatches(tmp_path / "tokens", 11, 6, seed=3).batch(2)
    assert batch["score"].dtype == np.bool_
    doubled, doubled_mask = np.tile(flat_x, 2), np.tile(flat_mask, 2)
    for x, score in zip(batch["x"], batch["score"], strict=True):
        places = [i for i in range(len(flat_x)) if (doubled[i:i + 11] == x).all()]
        assert any((doubled_mask[i:i + 11] == score).all() for i in places)


# --------------------------------------------------------------------------------------------------- training


def epoch_rows(batches: pipeline.TrainBatches, epoch: int) -> np.ndarray:
    """All windows of an epoch, from whole batches: needs B to divide W."""
    steps = batches.windows // batches.batch_size
    return np.concatenate([batches.batch(epoch * steps + step)["x"] for step in range(steps)])


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
    fixed = pipeline.TrainBatches(ring, 10, 4, seed=1, shift=False)
    orders = [epoch_rows(fixed, epoch)[:, 0] for epoch in range(3)]
    assert all(sorted(order) == list(range(0, 1000, 10)) for order in orders)
    assert not (orders[0] == orders[1]).all()
    other = pipeline.TrainBatches(ring, 10, 4, seed=2, shift=False)
    assert not (epoch_rows(other, 0)[:, 0] == orders[0]).all()


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
    with pytest.raises(ValueError, match="model.seq_len is 1004; .* at most the 1003 training tokens"):
        pipeline.TrainBatches(ring, 1004, 3)


def test_processes_share_the_batch_in_contiguous_rows(ring):
    one = pipeline.TrainBatches(ring, 10, 24, seed=9)
    for count in (2, 3, 4):
        parts = [pipeline.TrainBatches(ring, 10, 24, 9, index, count) for index in range(count)]
        for step in (0, 3, 4, 1000):
            for name, array in one.batch(step).items():
                joined = np.concatenate([part.batch(step)[name] for part in parts])
                np.testing.assert_array_equal(joined, array)
                assert joined.dtype == array.dtype
    assert set(one.batch(0)) == {"x", "index"}
    np.testing.assert_array_equal(one.batch(7)["index"], np.arange(24, dtype=np.int32))
    with pytest.raises(ValueError, match="train.batch_size is 24; .* multiple of the 5 processes"):
        pipeline.TrainBatches(ring, 10, 24, 0, 0, 5)
    with pytest.raises(ValueError, match="process_index is 2; must be in 0..1"):
        pipeline.TrainBatches(ring, 10, 24, 0, 2, 2)


def test_batches_do_not_depend_on_what_was_asked_before(ring):
    steps = [0, 57, 3, 1_000_000, 3, 0]
    batches = pipeline.TrainBatches(ring, 10, 16, seed=2)
    wanted = {step: pipeline.TrainBatches(ring, 10, 16, seed=2).batch(step)["x"] for step in steps}
    with ThreadPoolExecutor(4) as pool:
        for step, batch in zip(steps * 20, pool.map(batches.batch, steps * 20), strict=True):
            np.testing.assert_array_equal(batch["x"], wanted[step])
    batches.batch(0)["x"][:] = 0  # a caller's own copy
    batches.batch(0)["index"][:] = 0
    np.testing.assert_array_equal(batches.batch(0)["x"], wanted[0])
    assert batches.batch(0)["index"][-1] == 15


def test_order_is_pinned(ring):
    """A saved data position means the same rows in later versions of NumPy and of this code."""
    batches = pipeline.TrainBatches(ring, 10, 4, seed=0)
    firsts = [batches.batch(step)["x"][:, 0].tolist() for step in (0, 26)]
    assert firsts == [[650, 530, 420, 680], [973, 340, 750, 140]]


def test_iterator_resumes_exactly(ring):
    batches = pipeline.TrainBatches(ring, 10, 12, seed=4)
    iterator = batches.iterator()
    for step in range(11):
        np.testing.assert_array_equal(next(iterator)["x"], batches.batch(step)["x"])
    state = json.loads(json.dumps(iterator.get_state()))
    assert state == {"next_index": 11}
    wanted = [next(iterator) for _ in range(30)]
    resumed = pipeline.TrainBatches(ring, 10, 12, seed=4).iterator()
    resumed.set_state(state)
    started = pipeline.TrainBatches(ring, 10, 12, seed=4).iterator(start_step=11, threads=1)
    iterator.set_state(state)
    for batch in wanted:
        for other in (resumed, started, iterator):
            got = next(other)
            for name in batch:
                np.testing.assert_array_equal(got[name], batch[name])
    assert resumed.get_state() == started.get_state() == {"next_index": 41}


def test_two_processes_iterate_over_halves(ring):
    whole = pipeline.TrainBatches(ring, 10, 8, seed=4).iterator(5)
    halves = [pipeline.TrainBatches(ring, 10, 8, 4, index, 2).iterator(5) for index in range(2)]
    for _ in range(30):
        batch, parts = next(whole), [next(half) for half in halves]
        for name in batch:
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), batch[name])


# ------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize("seq_len", [1, 7, 128, 10**6])
def test_validation_counts_every_token_once(embedded, seq_len):
    folder, manifest = embedded
    rows = pipeline.valid_rows(folder, seq_len)
    flat = pipeline.read_tokens(folder, "valid")
    assert rows["x"].shape == (-(-len(flat) // seq_len), seq_len) == rows["valid"].shape
    assert rows["x"].dtype == np.int32 and rows["valid"].dtype == rows["score"].dtype == np.bool_
    np.testing.assert_array_equal(rows["x"][rows["valid"]], flat)
    assert (rows["x"][~rows["valid"]] == manifest.eot).all()
    np.testing.assert_array_equal(rows["score"], rows["valid"])
    assert rows["score"].sum() == manifest.valid_scored_tokens
    part = pipeline.valid_rows(folder, seq_len, limit=3)
    for name in rows:
        np.testing.assert_array_equal(part[name], rows[name][:3])


def test_wrong_folders(embedded, tmp_path):
    folder, manifest = embedded
    with pytest.raises(ValueError, match="split is 'test'; choices: train, valid"):
        pipeline.read_tokens(folder, "test")
    with pytest.raises(ValueError, match="no tokens in .* run --mode=prepare"):
        pipeline.valid_rows(tmp_path, 8)
    facts = dataclasses.asdict(manifest) | {"version": 0}
    (tmp_path / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="version is 0, this code reads 1"):
        pipeline.load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        pipeline.load_manifest(tmp_path)
    shutil.copytree(folder, tmp_path / "copy")
    plain = tokens.make_tokenizer("bytes")
    plain.save(tmp_path / "copy")
    with pytest.raises(ValueError, match="is not the one the tokens were made with"):
        pipeline.prepare(tmp_path / "copy", vocab_size=1024)
