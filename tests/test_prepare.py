"""hdlm_jax/data/prepare.py and shards.py: what a folder of tokens holds, and what is read for it."""
import dataclasses
import gzip
import hashlib
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import owt
import pytest
from prepared import BYTES, EOT, make, numbered, text, with_bad, write_jsonl
from tiny import read_recipe, write_recipe

from hdlm_jax.config import ConfigError, DataConfig, TokenizerConfig
from hdlm_jax.data import prepare, shards, tokenizers
from hdlm_jax.data.documents import Reader
from hdlm_jax.data.embedded import embedded_corpus
from hdlm_jax.data.records import Document, is_validation
from hdlm_jax.runs import stages


def read_split(folder: Path, manifest: prepare.Manifest, split: str) -> tuple[list[int], list[list[int]]]:
    """All tokens and index rows of a split, read range by range in plain Python."""
    flat, rows = [], []
    for stem, first, end, first_document, end_document in manifest.splits[split]:
        raw = (folder / f"{stem}.bin").read_bytes()
        size = 2 if manifest.dtype == "uint16" else 4
        flat += [int.from_bytes(raw[i:i + size], "little") for i in range(first * size, end * size, size)]
        index = (folder / f"{stem}.idx").read_bytes()
        numbers = [int.from_bytes(index[i:i + 4], "little") for i in range(0, len(index), 4)]
        rows += [numbers[4 * i:4 * i + 4] for i in range(first_document, end_document)]
    return flat, rows


def expected(documents: list[tuple[str, str]]) -> tuple[list[int], list[list[int]]]:
    """What the byte tokenizer makes of (prompt, text)s."""
    flat: list[int] = []
    rows = []
    for prompt, body in documents:
        flat += [*prompt.encode(), *body.encode(), EOT]
        a, b = len(prompt.encode()), len(body.encode())
        rows.append([a + b + 1, a + b, a, a])
    return flat, rows


def check_counts(folder: Path, manifest: prepare.Manifest) -> None:
    """Every count and hash of a manifest against the files it describes."""
    for split in ("train", "valid"):
        flat, rows = read_split(folder, manifest, split)
        sums = [sum(row[i] for row in rows) for i in range(4)]
        names = ("documents", "tokens", "bytes", "scored_tokens", "scored_bytes")
        got = [getattr(manifest, f"{split}_{name}") for name in names]
        assert got == [len(rows), sums[0], sums[1], sums[0] - sums[2], sums[1] - sums[3]]
        assert len(flat) == sums[0]
        place = 0
        for row in rows:
            place += row[0]
            assert flat[place - 1] == manifest.eot
    for name, facts in manifest.shards.items():
        raw = (folder / name).read_bytes()
        assert facts == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    assert set(manifest.shards) == {path.name for path in folder.iterdir() if path.suffix in (".bin", ".idx")}


# ------------------------------------------------------------------------------------------------------- whole


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> tuple[Path, prepare.Manifest]:
    folder = tmp_path_factory.mktemp("embedded")
    manifest = prepare.prepare(folder, DataConfig(), TokenizerConfig(kind="bpe", vocab_size=1024), say=lambda _: None)
    assert manifest is not None
    return folder, manifest


def test_embedded_corpus(embedded):
    folder, manifest = embedded
    assert sorted(path.name for path in folder.iterdir()) == sorted([
        "manifest.json", "begun.json", tokenizers.JSON_FILE, tokenizers.RANK_FILE, "unit-00000.json",
        *(f"{split}-00000-000.{kind}" for split in ("train", "valid") for kind in ("bin", "idx"))])
    assert manifest == prepare.load_manifest(folder)
    assert (manifest.vocab_size, manifest.eot, manifest.dtype) == (1024, 1023, "uint16")
    assert not manifest.prompts and not manifest.sampled and manifest.bad == 0
    check_counts(folder, manifest)
    tokenizer = tokenizers.load_tokenizer(folder)
    assert tokenizer.fingerprint == manifest.tokenizer_fingerprint
    documents = embedded_corpus()[0]
    total = sum(int(hashlib.sha256(document.text.encode()).hexdigest(), 16) for document in documents)
    assert int(manifest.corpus_fingerprint, 16) == total % 2**256
    for split, held in (("train", False), ("valid", True)):
        flat, rows = read_split(folder, manifest, split)
        wanted = [document.text for document in documents if is_validation(document, 0.05) == held]
        ends = list(itertools.accumulate(row[0] for row in rows))
        starts = [0, *ends][:len(wanted)]
        assert len(rows) == len(wanted)
        for start, end, row, body in list(zip(starts, ends, rows, wanted, strict=True))[:20]:
            assert tokenizer.decode(flat[start:end - 1]) == body and flat[end - 1] == manifest.eot
            assert row == [end - start, len(body.encode()), 0, 0]
    # the BPE saw training documents only
    assert manifest.bpe_training_bytes == manifest.train_bytes
    texts = [document.text for document in documents if not is_validation(document, 0.05)]
    assert tokenizers.make_tokenizer("bpe", 1024, texts).fingerprint == manifest.tokenizer_fingerprint


def test_unigram_nats_by_hand(embedded):
    folder, manifest = embedded
    train, valid = (read_split(folder, manifest, split)[0] for split in ("train", "valid"))
    counts = [1] * manifest.vocab_size
    for token in train:
        counts[token] += 1
    nats = -sum(math.log(counts[token] / (len(train) + manifest.vocab_size)) for token in valid) / len(valid)
    assert manifest.unigram_nats == pytest.approx(nats, rel=1e-12)
    bits = nats * len(valid) / math.log(2)
    assert manifest.unigram_bits_per_byte == pytest.approx(bits / manifest.valid_bytes, rel=1e-12)
    assert 4.0 < nats < math.log(1024)


@pytest.mark.parametrize("prompt_field", ["", "q"])
def test_shards_hold_every_document_in_order(tmp_path, small, monkeypatch, prompt_field):
    """Several files, each with several shards, prompts and bad records, against plain Python."""
    monkeypatch.setattr(prepare, "_COUNTED_TOKENS", 50)  # counted in many pieces
    files = [numbered(tmp_path / f"{i}.jsonl", 25 + i, start=100 * i) for i in range(3)]
    manifest = make(tmp_path / "tokens", files, validation_fraction=0.3, prompt_field=prompt_field, packing="crop")
    check_counts(tmp_path / "tokens", manifest)
    documents = [(f"what {i}?" if prompt_field else "", text(i)) for start, count in ((0, 25), (100, 26), (200, 27))
                 for i in range(start, start + count)]
    held = [is_validation(Document(body, "", prompt), 0.3) for prompt, body in documents]
    for split, wanted in (("train", False), ("valid", True)):
        mine = [document for document, is_held in zip(documents, held, strict=True) if is_held == wanted]
        flat, rows = read_split(tmp_path / "tokens", manifest, split)
        assert (flat, rows) == expected(mine)
        counts = np.zeros(257, int)
        for _, body in mine:
            np.add.at(counts, [*body.encode(), EOT], 1)
        np.testing.assert_array_equal(prepare.token_counts(tmp_path / "tokens", split), counts)
    assert manifest.prompts == bool(prompt_field)
    total = sum(int(hashlib.sha256((prompt + body).encode()).hexdigest(), 16) for prompt, body in documents)
    assert manifest.corpus_fingerprint == f"{total % 2**256:064x}"
    # names in order, shards closed when they are large enough
    stems = [stem for split in ("train", "valid") for stem, *_ in manifest.splits[split]]
    assert stems == sorted(stems) and len(stems) == len(set(stems)) > 12
    parts: dict[str, int] = {}
    for split in ("train", "valid"):
        for stem, _, end, *_ in manifest.splits[split]:
            place = stem.removeprefix(f"{split}-")
            parts[place] = parts.get(place, 0) + end
    for place, size in parts.items():
        following = f"{place[:6]}{int(place[6:]) + 1:03d}"
        assert size >= 120 or following not in parts
        assert size < 120 + 450


def test_fingerprint_knows_tokens_and_words_and_the_order(tmp_path):
    one, other = numbered(tmp_path / "a.jsonl", 20), numbered(tmp_path / "b.jsonl", 20, 20)
    base = make(tmp_path / "1", [one, other], validation_fraction=0.3)
    turned = make(tmp_path / "2", [other, one], validation_fraction=0.3)
    assert base.corpus_fingerprint == turned.corpus_fingerprint and base.fingerprint != turned.fingerprint
    changed = dataclasses.replace(base, tokenizer_fingerprint="0")
    cut = dataclasses.replace(base, splits={"train": base.splits["train"][:1], "valid": base.splits["valid"]})
    assert len({base.fingerprint, changed.fingerprint, cut.fingerprint}) == 3
    assert dataclasses.replace(base, settings={}).fingerprint == base.fingerprint
    sample = dataclasses.replace(base, sampled=True)
    assert dataclasses.replace(sample, settings={}).fingerprint != sample.fingerprint
    renamed = [["c.jsonl", *rest] for _, *rest in base.sources]
    assert dataclasses.replace(sample, sources=renamed).fingerprint == sample.fingerprint
    assert dataclasses.replace(sample, sources=base.sources[:1]).fingerprint != sample.fingerprint


def test_wide_vocabularies_take_uint32(tmp_path):
    words = [bytes([i]) for i in range(256)] + [b"%d" % i for i in range(10, 66_000)]
    tokenizers.Tokenizer("bpe", words).save(tmp_path / "t")
    wide = TokenizerConfig(kind="bpe", file=str(tmp_path / "t" / tokenizers.RANK_FILE))
    files = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{i} {i}"} for i in range(65_000, 65_100)])
    manifest = make(tmp_path / "tokens", files, wide, validation_fraction=0.2)
    assert manifest.dtype == "uint32" and manifest.vocab_size == len(words) + 1
    flat, rows = read_split(tmp_path / "tokens", manifest, "valid")
    assert max(flat) == manifest.eot > 65_535 and len(flat) == sum(row[0] for row in rows)
    with pytest.raises(ValueError, match="tokenizer.file"):
        make(tmp_path / "tokens", files, TokenizerConfig(kind="bpe"), validation_fraction=0.2)


# ------------------------------------------------------------------------------------------------------ splits


def test_validation_files_and_leaks(tmp_path, small):
    numbered(tmp_path / "train.jsonl", 50)
    with gzip.open(tmp_path / "held.jsonl.gz", "wt") as file:
        for i in (3, 7, 99):
            file.write(json.dumps({"text": text(i), "q": ""}) + "\n")
    manifest = make(tmp_path / "tokens", str(tmp_path / "train.jsonl"), TokenizerConfig(kind="bpe", vocab_size=300),
                    validation=(str(tmp_path / "held*"),))
    assert (manifest.train_documents, manifest.valid_documents, manifest.left_out) == (48, 3, 2)
    assert manifest.bpe_training_bytes == manifest.train_bytes
    assert manifest.settings["data.validation_fraction"] is None and manifest.settings["data.split"] is None
    assert manifest.sources == [[path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
                                for path in (tmp_path / "train.jsonl", tmp_path / "held.jsonl.gz")]
    assert {stem[:11] for stem, *_ in manifest.splits["valid"]} == {"valid-00001"}
    check_counts(tmp_path / "tokens", manifest)
    assert prepare.held_out(Reader(), [str(tmp_path / "held.jsonl.gz")]) == {
        hashlib.sha256(text(i).encode()).digest() for i in (3, 7, 99)}


@pytest.mark.parametrize("count", [1, 9, 17, 18, 30, 43])
def test_the_last_documents(tmp_path, small, count):
    """Cut inside a shard, between shards, between files."""
    files = [numbered(tmp_path / "a.jsonl", 27), numbered(tmp_path / "b.jsonl", 17, 100)]
    bpe = TokenizerConfig(kind="bpe", vocab_size=260)
    manifest = make(tmp_path / "tokens", files, bpe, split="last", validation_documents=count, prompt_field="q",
                    packing="crop")
    documents = [(f"what {i}?", text(i)) for i in [*range(27), *range(100, 117)]]
    assert manifest.bpe_training_bytes == manifest.train_bytes == sum(
        len((prompt + body).encode()) for prompt, body in documents[:-count])
    manifest = make(tmp_path / "bytes", files, split="last", validation_documents=count, prompt_field="q",
                    packing="crop")
    assert read_split(tmp_path / "bytes", manifest, "train") == expected(documents[:-count])
    assert read_split(tmp_path / "bytes", manifest, "valid") == expected(documents[-count:])
    check_counts(tmp_path / "bytes", manifest)
    valid = np.bincount([byte for _, body in documents[-count:] for byte in [*body.encode(), EOT]], minlength=257)
    np.testing.assert_array_equal(prepare.token_counts(tmp_path / "bytes", "valid"), valid)


@pytest.mark.parametrize("data, split", [
    (dict(split="last", validation_documents=3), "train"), (dict(validation_fraction=1e-9), "valid")])
def test_an_empty_split_is_an_error(tmp_path, data, split):
    numbered(tmp_path / "a.jsonl", 3)
    with pytest.raises(ValueError, match=f"no document of 3 falls in the {split} split: .*blank_line") as error:
        make(tmp_path / "tokens", str(tmp_path / "a.jsonl"), **data)
    assert "\n" not in str(error.value)
    # nothing stands in the way of better settings
    manifest = make(tmp_path / "tokens", str(tmp_path / "a.jsonl"), split="last", validation_documents=1)
    assert (manifest.train_documents, manifest.valid_documents) == (2, 1)


def test_a_sample_of_what_will_be_streamed(tmp_path, small):
    files = [numbered(tmp_path / f"{i}.jsonl", 50, 100 * i) for i in range(2)]
    stream = dict(stream=True, sample_bytes=1000, validation_fraction=0.2)
    manifest = make(tmp_path / "tokens", files, **stream)
    check_counts(tmp_path / "tokens", manifest)
    train, valid = [], []
    for start in (0, 100):
        size = 0
        for i in range(start, start + 50):
            held = is_validation(Document(text(i), ""), 0.2)
            (valid if held else train).append(("", text(i)))
            size += 0 if held else len(text(i).encode())
            if size >= 500:
                break
    assert manifest.sampled and 30 < len(train) < 60
    assert read_split(tmp_path / "tokens", manifest, "train") == expected(train)
    assert read_split(tmp_path / "tokens", manifest, "valid") == expected(valid)
    assert "a sample of" in manifest.summary()
    # validation files are prepared whole, and what is equal to them does not count
    held = numbered(tmp_path / "held.jsonl", 40, 5)
    manifest = make(tmp_path / "held", files, **stream | {"validation": (held,)})
    assert (manifest.valid_documents, manifest.left_out) == (40, 40)
    assert read_split(tmp_path / "held", manifest, "train")[1][5] == expected([("", text(45))])[1][0]
    with pytest.raises(ValueError, match="data.sample_bytes=1000, it is now 2000"):
        make(tmp_path / "tokens", files, **stream | {"sample_bytes": 2000})


def test_bpe_training_text_is_a_share_of_each_file(tmp_path, monkeypatch):
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i:03} " * 10} for i in range(200)])
    held = write_jsonl(tmp_path / "held.jsonl", [{"text": "z"}])
    arguments = dict(files=str(tmp_path / "[ab].jsonl"), validation=(held,))
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "BPE_TRAINING_BYTES", 2020)
        manifest = make(tmp_path / "tokens", tokenizer=TokenizerConfig(kind="bpe", vocab_size=400), **arguments)
    assert manifest.bpe_training_bytes == 2020
    texts = [(f"{name}{i:03} " * 10)[:1010 - 50 * i] for name in "ab" for i in range(21)]
    assert manifest.tokenizer_fingerprint == tokenizers.make_tokenizer("bpe", 400, texts).fingerprint
    said: list[str] = []
    tokenizer = TokenizerConfig(kind="bpe", vocab_size=50_000)
    less = make(tmp_path / "less", tokenizer=tokenizer, say=said.append, **arguments)
    assert less.vocab_size < 50_000
    assert "50,000 were asked for" in said[0] and f"V={less.vocab_size:,}" in said[0]


# --------------------------------------------------------------------------------------------------- bad records


def test_bad_records_are_listed(tmp_path, small):
    files = [with_bad(tmp_path / "a.jsonl", 60, 2), numbered(tmp_path / "b.jsonl", 30, 100),
             with_bad(tmp_path / "c.jsonl", 60, 1, 200)]
    said: list[str] = []
    manifest = make(tmp_path / "tokens", files, bad_share=0.02, validation_fraction=0.2, say=said.append)
    assert manifest.bad == 3 and manifest.train_documents + manifest.valid_documents == 150
    listed = [json.loads(line) for line in (tmp_path / "tokens" / "bad_records.jsonl").read_text().splitlines()]
    assert [(row["file"], row["position"].split(",")[0]) for row in listed] == [
        (files[0], "line 6"), (files[0], "line 8"), (files[2], "line 6")]
    assert all("JSON" in row["reason"] for row in listed)
    assert "3 of 153 records cannot be read" in said[0] and f"{files[0]}, line 6" in said[0] and "\n" not in said[0]
    clean = [numbered(tmp_path / "a.jsonl", 60), numbered(tmp_path / "b.jsonl", 30, 100),
             numbered(tmp_path / "c.jsonl", 60, 200)]
    without = make(tmp_path / "clean", clean, validation_fraction=0.2)
    assert without.corpus_fingerprint == manifest.corpus_fingerprint
    assert not (tmp_path / "clean" / "bad_records.jsonl").exists()


def test_too_many_bad_records(tmp_path, small):
    """Over all files in the end; nothing is lost by it: a larger share goes on with what there is."""
    files = [numbered(tmp_path / "a.jsonl", 60), with_bad(tmp_path / "b.jsonl", 60, 4, 100)]
    with pytest.raises(ValueError, match=r"b\.jsonl, line 6.*: .*; 4 of 124 records cannot be read, more than "
                                         r"data\.bad_share=0\.03 allows") as error:
        make(tmp_path / "tokens", files, bad_share=0.03, validation_fraction=0.2)
    assert "\n" not in str(error.value) and not (tmp_path / "tokens" / "manifest.json").exists()
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tokens").glob("*.bin")}
    assert len(times) > 10
    manifest = make(tmp_path / "tokens", files, bad_share=0.04, validation_fraction=0.2)
    assert manifest.bad == 4
    assert times == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tokens").glob("*.bin")}
    with pytest.raises(ValueError, match=r"b\.jsonl, line 6.*; 1 of \d+ records"):  # at once
        make(tmp_path / "strict", files, bad_share=0.0, validation_fraction=0.2)


def test_a_hopeless_file_stops_early(tmp_path, monkeypatch):
    """Eleven bad ones are more than a thousandth of 10,000 records: the rest of the file is not read."""
    monkeypatch.setattr(shards, "BATCH_CHARS", 3000)
    path = with_bad(tmp_path / "a.jsonl", 3000, 11)
    with open(path, "a") as file:
        file.write(json.dumps({"text": text(1)}) + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 6.*; 11 of (\d+) records cannot be read") as error:
        make(tmp_path / "tokens", path)
    assert int(str(error.value).split("; 11 of ")[1].split()[0]) < 200
    path = with_bad(tmp_path / "b.jsonl", 11_000, 10)
    assert make(tmp_path / "most", path).bad == 10


# --------------------------------------------------------------------------------------------------- what to read


def test_the_documentation_inside_another_python(tmp_path, embedded):
    """Its tokens go on, as those whose files are not at hand; training on the documents themselves does not."""
    folder, manifest = embedded
    shutil.copytree(folder, tmp_path / "tokens")
    bpe, said = TokenizerConfig(kind="bpe", vocab_size=1024), []
    other = {"python": "3.1.4", "sources": [["embedded", 0, "Python 3.1.4"]]}
    older = dataclasses.replace(manifest, **other)
    shards.write_json(tmp_path / "tokens" / prepare.MANIFEST, dataclasses.asdict(older))
    assert prepare.prepare(tmp_path / "tokens", DataConfig(), bpe, say=said.append) == older
    assert "the documentation inside Python 3.1.4" in said[-1]
    stream = older.settings | {"data.stream": True, "data.sample_bytes": DataConfig().sample_bytes}
    shards.write_json(tmp_path / "tokens" / prepare.MANIFEST, dataclasses.asdict(older) | {"settings": stream})
    with pytest.raises(ValueError, match="other files: embedded"):
        prepare.prepare(tmp_path / "tokens", DataConfig(stream=True), bpe, say=said.append)


def test_a_folder_of_files(tmp_path):
    """What it holds is said once, when it is read."""
    folder, said = tmp_path / "corpus", []
    for name in ("b.jsonl", "deep/er/a.jsonl", ".hidden.jsonl", ".git/x.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        numbered(folder / name, 20, 100 * len(name))
    (folder / "README.md").write_text("x")
    manifest = make(tmp_path / "tokens", str(folder), validation_fraction=0.2, say=said.append)
    assert [name for name, *_ in manifest.sources] == ["b.jsonl", "a.jsonl"]
    assert said[0] == f"data.files: 2 files beneath {folder} (2 jsonl); left out: 1 of other kinds (suffix .md)"
    assert make(tmp_path / "tokens", str(folder / "**" / "[ab].jsonl"), validation_fraction=0.2) == manifest
    (folder / ".git" / "x.jsonl").rename(folder / ".git" / "x.lines")
    with pytest.raises(ValueError, match=r"data.files: no .txt, .jsonl.*, 1 of other kinds \(suffix .lines\)"):
        make(tmp_path / "none", str(folder / ".git"))


def test_the_words_of_the_run_that_weights_come_from(tmp_path):
    """Its pattern too; a run that is not there names itself, before anything is made, and later is not needed."""
    config = read_recipe(write_recipe(tmp_path))
    base = tmp_path / "base"
    start = dataclasses.replace(config.train, init_from=str(base))
    for kind in ("bytes", "bpe"):
        tokenizer = TokenizerConfig(kind=kind, vocab_size=257)
        missing = dataclasses.replace(config, train=start, tokenizer=tokenizer)
        with pytest.raises(ConfigError, match=f"^train.init_from='{base}': no run there"):
            stages.make_tokens(missing, str(tmp_path / "run"))
        assert not (tmp_path / "run").exists()
    (base / "tokenizer").mkdir(parents=True)
    (base / "config.json").write_text("{}")
    words = tokenizers.make_tokenizer("bpe", 300, [text(i) for i in range(40)], pattern="qwen2")
    words.save(base / "tokenizer")
    made = stages.prepare(missing, str(tmp_path / "run"))
    assert made.tokenizer.pattern == tokenizers.PATTERNS["qwen2"] and made.tokenizer.fingerprint == words.fingerprint
    with pytest.raises(ConfigError, match="tokenizer.pattern='o200k': the run in train.init_from="):
        other = dataclasses.replace(missing.tokenizer, pattern="o200k")
        stages.make_tokens(dataclasses.replace(missing, tokenizer=other), str(tmp_path / "run"))
    shutil.copytree(base, tmp_path / "copy")
    shutil.rmtree(base)
    moved = dataclasses.replace(missing, train=dataclasses.replace(start, init_from=str(tmp_path / "copy")))
    for again in (missing, moved):
        assert stages.prepare(again, str(tmp_path / "run")).manifest == made.manifest


def test_wrong_folders(tmp_path):
    with pytest.raises(ValueError, match="no tokens in .* run --mode=prepare"):
        prepare.load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"version": 1}')
    with pytest.raises(ValueError, match="version is 1, this code reads 2 and 3"):
        prepare.load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        prepare.load_manifest(tmp_path)


@pytest.mark.parametrize("data, tokenizer, message", [
    (dict(source="web"), BYTES, "data.source='web': choose one of embedded, files"),
    (dict(files="no/such.txt"), BYTES, "data.files: no file matches 'no/such.txt'"),
    (dict(source="embedded", files=()), TokenizerConfig(kind="bpe", file="no/such"), "tokenizer.file 'no/such' cannot"),
    (dict(source="embedded", files=(), validation=("no.txt",)), BYTES, "data.validation: no file matches 'no.txt'"),
    (dict(source="embedded", files=(), prompt_field="q", packing="crop"), BYTES, "data.prompt_field='q' needs"),
    (dict(files=__file__), BYTES, "kind of file"),
])
def test_wrong_arguments(tmp_path, data, tokenizer, message):
    data = {"source": "files"} | data
    data["files"] = (data["files"],) if data.get("files") else ()
    with pytest.raises(ValueError, match=message):
        prepare.prepare(tmp_path / "tokens", DataConfig(**data), tokenizer, say=print)
    assert not (tmp_path / "tokens").exists()


def test_a_misspelt_field_leaves_nothing_in_the_way(tmp_path):
    files = numbered(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="'txt'.*'text'"):
        make(tmp_path / "tokens", files, text_field="txt", validation_fraction=0.2)
    assert make(tmp_path / "tokens", files, validation_fraction=0.2).train_documents > 30


# ------------------------------------------------------------------------------------------------ OpenWebText


@pytest.mark.parametrize("outer", ["tar.xz", "tars", "parquet", "jsonl.xz"])
def test_openwebtext_in_every_layout(tmp_path, outer):
    """The same documents give the same corpus fingerprint and counts, however they are packed."""
    if outer == "parquet":
        pytest.importorskip("pyarrow")
    documents = owt.openwebtext_documents(24)
    files = owt.make_openwebtext(tmp_path / "owt", documents, outer=outer)
    manifest = make(tmp_path / "tokens", [str(file) for file in files], split="last", validation_documents=5)
    total = sum(int(hashlib.sha256(document.encode()).hexdigest(), 16) for document in documents)
    assert manifest.corpus_fingerprint == f"{total % 2**256:064x}"
    assert (manifest.train_documents, manifest.valid_documents, manifest.bad) == (19, 5, 0)
    check_counts(tmp_path / "tokens", manifest)
