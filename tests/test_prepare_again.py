"""hdlm_jax/data/prepare.py and shards.py: by many workers, after any kill, and again: always the same folder."""
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from prepared import BYTES, files_of, make, numbered, text, with_bad, write_jsonl
from tiny import read_recipe, write_recipe

from hdlm_jax.common import jsons
from hdlm_jax.config import ConfigError, DataConfig, TokenizerConfig
from hdlm_jax.data import prepare, shards, tokenizers
from hdlm_jax.data.sources import resolve
from hdlm_jax.runs import stages

# ----------------------------------------------------------------------------------------------------- workers


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_workers_make_the_same_as_one(tmp_path, small, order):
    """Whatever their number and order; a worker that finishes early says what is missing."""
    files = [numbered(tmp_path / f"{i}.jsonl", 9 + 3 * i, 100 * i) for i in range(4)]
    held = numbered(tmp_path / "held.jsonl", 5, 102)
    arguments = dict(files=files, tokenizer=TokenizerConfig(kind="bpe", vocab_size=270), validation=(held,))
    alone = make(tmp_path / "alone", **arguments)
    assert alone.left_out == 5
    made: set[str] = set()
    for place, worker in enumerate(order):
        said: list[str] = []
        manifest = make(tmp_path / "shared", **arguments, prepare_shard=f"{worker}/3", say=said.append)
        records = {path.name for path in (tmp_path / "shared").glob("unit-*.json")}
        assert records - made == {f"unit-{unit:05d}.json" for unit in range(5) if unit % 3 == worker}
        made = records
        if place < 2:
            left = 5 - len(made)
            first = min(unit for unit in range(5) if f"unit-{unit:05d}.json" not in made)
            assert manifest is None and not (tmp_path / "shared" / "manifest.json").exists()
            assert f"worker {worker}/3 has done its part" in said[-1] and f"{left} of 5 files" in said[-1]
            assert f"{resolve([*files, held])[first]}, to {first % 3}/3" in said[-1]
    assert manifest == alone and files_of(tmp_path / "shared") == files_of(tmp_path / "alone")
    # the others find it made
    assert make(tmp_path / "shared", **arguments, prepare_shard="0/3") == alone


def test_workers_must_agree(tmp_path, small):
    files = [numbered(tmp_path / f"{i}.jsonl", 9, 100 * i) for i in range(2)]
    make(tmp_path / "tokens", files, prepare_shard="0/2", validation_fraction=0.3)
    with pytest.raises(ValueError, match="were begun with data.validation_fraction=0.3, it is now 0.4: .*delete"):
        make(tmp_path / "tokens", files, prepare_shard="1/2", validation_fraction=0.4)
    numbered(tmp_path / "1.jsonl", 8)
    with pytest.raises(ValueError, match=r"were begun from other files: 1\.jsonl"):
        make(tmp_path / "tokens", files, prepare_shard="1/2", validation_fraction=0.3)
    numbered(tmp_path / "1.jsonl", 9, 100)
    # two that began at the same time, unseen by each other
    (tmp_path / "tokens" / "begun.json").unlink()
    make_other = dict(prepare_shard="1/2", validation_fraction=0.4)
    with pytest.raises(ValueError, match=r"unit-00000\.json was made with other settings.*give all workers the same"):
        make(tmp_path / "tokens", files, **make_other)


def test_what_needs_all_tokens_says_who_is_missing(tmp_path):
    config = read_recipe(write_recipe(tmp_path))
    other = numbered(tmp_path / "other.jsonl")
    data = dataclasses.replace(config.data, files=(*config.data.files, other), prepare_shard="1/2")
    config = dataclasses.replace(config, data=data)
    assert stages.make_tokens(config, str(tmp_path / "run")) is None
    with pytest.raises(ConfigError, match="data.prepare_shard='1/2': other workers have not done their part"):
        stages.prepare(config, str(tmp_path / "run"))
    config = dataclasses.replace(config, data=dataclasses.replace(data, prepare_shard="0/2"))
    text = stages.prepare(config, str(tmp_path / "run"))
    assert text.manifest == prepare.load_manifest(tmp_path / "run" / "data")
    assert text.tokenizer.fingerprint == text.manifest.tokenizer_fingerprint


DRIVER = '''
import json, os, sys, time, types
from hdlm_jax.data import prepare, shards
from hdlm_jax.data.documents import Reader
from hdlm_jax.data.embedded import embedded_corpus
from hdlm_jax.data.records import Document, is_validation
from hdlm_jax.data.sources import resolve

settings = json.loads(os.environ["SETTINGS"])
shards.BATCH_CHARS, shards.SHARD_TOKENS = settings["batch_chars"], settings["shard_tokens"]
shards.core_count = lambda: 2
data = types.SimpleNamespace(**settings["data"], check=lambda: None, worker=lambda: (0, 1))
words = types.SimpleNamespace(**settings["words"], check=lambda: None)


class Slow(Reader):
    def read(self, source):
        for number, record in enumerate(super().read(source)):
            time.sleep(settings["pause"])
            yield record


if settings["pause"]:
    prepare.Reader = Slow


def run(folder):
    return prepare.prepare(folder, data, words, say=lambda line: print(line, flush=True))
'''


def driver(tmp_path: Path, code: str, files: list[str], *, batch_chars=350, shard_tokens=120,
           pause=0.0, words=BYTES, **data) -> subprocess.Popen:
    """A Python process of its own (without JAX, which must not be forked) that runs `code`."""
    script = tmp_path / "driver.py"
    script.write_text(f"{DRIVER}\nif __name__ == '__main__':\n{textwrap.indent(code, '    ')}")
    settings = dict(data=dataclasses.asdict(DataConfig(source="files", files=tuple(files), **data)), pause=pause,
                    words=dataclasses.asdict(words), batch_chars=batch_chars, shard_tokens=shard_tokens)
    root = str(Path(__file__).resolve().parent.parent)
    return subprocess.Popen([sys.executable, str(script), str(tmp_path / "tokens")], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "SETTINGS": json.dumps(settings), "PYTHONPATH": root})



KILLED = '''
# Dies just after the n-th step on the way to the disk (what is written then is in a buffer, what is synchronised
# has no name yet), n = 1, 2, ..., and is then run again.
def dying(n, function=lambda *_: None):
    def call(*arguments):
        function(*arguments)
        count[0] += 1
        if count[0] == n:
            os._exit(9)
    return call


run(f"{sys.argv[1]}-0")  # imports what the others then need not
count, n, died = [0], 0, 9
while died:
    n += 1
    for again in (False, True):
        child = os.fork()
        if child == 0:
            os.fsync, sys.stdout = dying(0 if again else n), open(os.devnull, "w")
            os.replace = dying(0 if again else n, os.replace)
            shards.Files.write = dying(0 if again else n, shards.Files.write)
            run(f"{sys.argv[1]}-{n}")
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if again:
            assert code == 0, code
        else:
            died = code
'''


def test_killed_anywhere_it_goes_on(tmp_path, small):
    """Whatever was on the disk when it was killed, the next run ends with the same bytes, nothing twice or missing."""
    files = [with_bad(tmp_path / "a.jsonl", 16, 1)]
    held = numbered(tmp_path / "held.jsonl", 3)
    settings = dict(validation=(held,), bad_share=0.5)
    clean = make(tmp_path / "clean", files, **settings)
    process = driver(tmp_path, KILLED, files, **settings)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert clean.bad == 1 and clean.train_documents == 13
    folders = sorted(tmp_path.glob("tokens-*"))
    assert len(folders) > 30
    for folder in folders:
        assert files_of(folder) == files_of(tmp_path / "clean"), folder


RANDOMLY = '''
import random, signal
os.fsync = lambda file: None  # a killed process loses nothing that the system has
draws, kills = random.Random(0), 0
while True:
    child = os.fork()
    if child == 0:
        run(sys.argv[1])
        os._exit(0)
    time.sleep(draws.uniform(0.02, 0.25))
    os.kill(child, signal.SIGKILL)
    if os.waitpid(child, 0)[1] == 0:
        break
    kills += 1
print(kills)
'''


@pytest.mark.slow
def test_killed_again_and_again(tmp_path, small):
    files = [numbered(tmp_path / f"{i}.jsonl", 50, 100 * i) for i in range(4)]
    clean = make(tmp_path / "clean", files, validation_fraction=0.2)
    process = driver(tmp_path, RANDOMLY, files, validation_fraction=0.2, pause=0.003)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert int(out.split()[-1]) >= 3
    assert prepare.load_manifest(tmp_path / "tokens") == clean
    assert files_of(tmp_path / "tokens") == files_of(tmp_path / "clean")


def test_files_made_at_once(tmp_path, small, monkeypatch):
    """Several files on threads give the same bytes as one after another."""
    files = [numbered(tmp_path / f"{i}.jsonl", 400 + 10 * i, 1000 * i) for i in range(3)]
    for cores in (1, 3):
        monkeypatch.setattr(shards, "core_count", lambda cores=cores: cores)
        make(tmp_path / str(cores), files, validation_fraction=0.2)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")


def test_ctrl_c(tmp_path, small, hearing):
    files = [numbered(tmp_path / f"{i}.jsonl", 400) for i in range(4)]
    code = "try:\n    run(sys.argv[1])\nexcept KeyboardInterrupt:\n    sys.exit(130)"
    process = driver(tmp_path, code, files, validation_fraction=0.2, pause=0.02)
    end = time.monotonic() + 60
    while not list((tmp_path / "tokens").glob("*.bin.*.tmp")):
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and not errors, errors
    assert not list((tmp_path / "tokens").glob("*.tmp"))


def test_an_error_in_one_file_ends_all(tmp_path, small):
    files = [numbered(tmp_path / "0.jsonl", 300), write_jsonl(tmp_path / "1.jsonl", [{"text": "a"}, "bad", "worse"])]
    process = driver(tmp_path, "run(sys.argv[1])", files, pause=0.1, bad_share=0.0)
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert "ValueError: " in errors and "1.jsonl, line 2: " in errors
    assert time.monotonic() - began < 25  # reading the other file alone takes 30 seconds


# -------------------------------------------------------------------------------------------------------- reuse


def test_idempotent_and_says_so(tmp_path, monkeypatch):
    files = numbered(tmp_path / "a.jsonl")
    said: list[str] = []
    arguments = dict(files=files, validation_fraction=0.2, say=said.append)
    first = make(tmp_path / "tokens", **arguments)
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tokens").iterdir()
             if path.name != prepare.VERIFIED}
    assert make(tmp_path / "tokens", **arguments) == first
    assert times.items() <= {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tokens").iterdir()}.items()
    assert len(said) == 2 and "made" in said[0] and "reusing" in said[1]
    assert first.corpus_fingerprint[:12] in said[1]
    assert all("\n" not in line for line in said)
    # what was hashed once is not read again until its time or size is another
    hashed: list[str] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: hashed.append(file.name) or digest(file, kind))
    make(tmp_path / "tokens", **arguments)
    assert hashed == []
    os.utime(tmp_path / "tokens" / "train-00000-000.bin")
    os.utime(files)
    for _ in range(2):
        make(tmp_path / "tokens", **arguments)
    assert [Path(name).name for name in hashed] == ["a.jsonl", "train-00000-000.bin"]
    # a folder that cannot be written is no hindrance
    (tmp_path / "tokens" / "verified.json").unlink()
    (tmp_path / "tokens" / "verified.json").mkdir()
    for _ in range(2):
        assert make(tmp_path / "tokens", **arguments) == first
    assert len(hashed) == 2 + 2 * (4 + 1)
    # tokens go on where their source is not (a pod that was sent the folder)
    Path(files).unlink()
    assert make(tmp_path / "tokens", **arguments) == first
    assert "source files are not on this machine" in said[-1]
    with pytest.raises(ValueError, match="no file matches"):
        make(tmp_path / "third", **arguments)
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("change, named", [
    (dict(text_field="q"), "data.text_field='text', it is now 'q'"),
    (dict(validation_fraction=0.3), "data.validation_fraction=0.2, it is now 0.3"),
    (dict(split="last"), "data.split='hash', it is now 'last'"),
    (dict(tokenizer=TokenizerConfig(kind="bpe", vocab_size=300)), "tokenizer.kind='bytes', it is now 'bpe'"),
    (dict(prompt_field="q", packing="crop"), "data.prompt_field='', it is now 'q'"),
    (dict(detokenize="lm1b"), "data.detokenize='', it is now 'lm1b'"),
    (dict(stream=True), "data.stream=False, it is now True"),
])
def test_other_settings_are_named(tmp_path, change, named):
    arguments = dict(files=numbered(tmp_path / "a.jsonl"), validation_fraction=0.2)
    make(tmp_path / "tokens", **arguments)
    make(tmp_path / "tokens", **arguments, validation_documents=7, sample_bytes=7, bad_share=0.5)  # of no importance
    with pytest.raises(ValueError, match=named) as error:
        make(tmp_path / "tokens", **(arguments | change))
    assert "\n" not in str(error.value) and f"delete {tmp_path / 'tokens'}" in str(error.value)


def test_changed_files_and_damaged_shards(tmp_path, small, monkeypatch):
    arguments = dict(files=str(tmp_path / "*.jsonl"), validation_fraction=0.2)
    numbered(tmp_path / "a.jsonl", 40)
    numbered(tmp_path / "b.jsonl", 40, 100)
    first = make(tmp_path / "tokens", **arguments)
    clean = files_of(tmp_path / "tokens")
    numbered(tmp_path / "c.jsonl", 3)
    with pytest.raises(ValueError, match=r"made from other files: c\.jsonl \(\d+ bytes\)"):
        make(tmp_path / "tokens", **arguments)
    (tmp_path / "c.jsonl").unlink()
    make(tmp_path / "tokens", **arguments)  # all is hashed
    path = tmp_path / "tokens" / "valid-00001-001.bin"
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"valid-00001-001\.bin is damaged: delete it and run --mode=prepare"):
        make(tmp_path / "tokens", **arguments)
    path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(shards, "make_all", lambda *_: None)  # the repair is cut short: then the rest is not whole either
        assert make(tmp_path / "tokens", **arguments) is None
    assert not (tmp_path / "tokens" / "manifest.json").exists()
    (tmp_path / "tokens" / "manifest.json").write_bytes(clean["manifest.json"])
    said: list[str] = []
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tokens").glob("*-00000-*.bin")}
    assert make(tmp_path / "tokens", **arguments, say=said.append) == first
    assert "valid-00001-001.bin is missing; it is made again" in said[0]
    assert files_of(tmp_path / "tokens") == clean
    assert times == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tokens").glob("*-00000-*.bin")}
    # without the text, it cannot be
    for name in "ab":
        (tmp_path / f"{name}.jsonl").unlink()
    (tmp_path / "tokens" / "valid-00001-001.idx").unlink()
    with pytest.raises(ValueError, match=r"valid-00001-001\.idx is missing, and its source files are not on this"):
        make(tmp_path / "tokens", **arguments)
    assert (tmp_path / "tokens" / "manifest.json").exists()
    tokenizers.make_tokenizer("bpe", 257, ["a"]).save(tmp_path / "tokens")
    path.with_suffix(".idx").write_bytes(clean["valid-00001-001.idx"])
    with pytest.raises(ValueError, match="is not the one the tokens were made with"):
        make(tmp_path / "tokens", **arguments)


def test_a_source_edited_in_place_is_another(tmp_path):
    """At equal size, and however its time is set back; also between a kill and the going on."""
    path = Path(numbered(tmp_path / "a.jsonl", 40))
    arguments = dict(files=str(path), validation_fraction=0.2)
    first = make(tmp_path / "tokens", **arguments)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"says", b"said"))
    other = r"made from other files: a\.jsonl \(\d+ bytes\) was added, removed or has other contents: .*delete"
    for _ in range(2):
        with pytest.raises(ValueError, match=other):
            make(tmp_path / "tokens", **arguments)
    (tmp_path / "tokens" / "manifest.json").unlink()  # killed just before the end
    with pytest.raises(ValueError, match=other.replace("made", "begun")):
        make(tmp_path / "tokens", **arguments)
    path.write_bytes(raw)
    assert make(tmp_path / "tokens", **arguments) == first
    # the tokenizer's file as well
    words = [bytes([i]) for i in range(256)]
    tokenizers.Tokenizer("bpe", [*words, b"ab"]).save(tmp_path / "t")
    file = tmp_path / "t" / tokenizers.RANK_FILE
    tokenizer = TokenizerConfig(kind="bpe", file=str(file))
    make(tmp_path / "bpe", **arguments, tokenizer=tokenizer)
    tokenizers.Tokenizer("bpe", [*words, b"cd"]).save(tmp_path / "t")
    with pytest.raises(ValueError, match=r"made from other files: tokenizer\.tiktoken"):
        make(tmp_path / "bpe", **arguments, tokenizer=tokenizer)


def test_equal_files_elsewhere_are_the_same(tmp_path, small):
    """By another path, pattern, link or name: tokens are reused, and what was begun goes on; kinds and order count."""
    for name, start in (("a", 0), ("b", 100)):
        (tmp_path / "here").mkdir(exist_ok=True)
        numbered(tmp_path / "here" / f"{name}.jsonl", 20, start)
    held = numbered(tmp_path / "here.held.jsonl", 4, 200)
    tokenizers.make_tokenizer("bpe", 270, [text(i) for i in range(9)]).save(tmp_path / "t")
    shutil.copytree(tmp_path / "t", tmp_path / "t2")
    bpe = [TokenizerConfig(kind="bpe", file=str(tmp_path / folder / tokenizers.RANK_FILE)) for folder in ("t", "t2")]
    first = make(tmp_path / "tokens", str(tmp_path / "here" / "*.jsonl"), bpe[0], validation=(held,))
    there = tmp_path / "there"
    shutil.copytree(tmp_path / "here", there)
    there_held = shutil.copy(held, str(there / "z.ndjson"))
    (there / "b.jsonl").rename(there / "c.jsonl")
    moved = [str(there / "a.jsonl"), str(there / "?.jsonl")]
    sha256 = hashlib.sha256((tmp_path / "t" / tokenizers.RANK_FILE).read_bytes()).hexdigest()
    checked = dataclasses.replace(bpe[1], sha256=sha256)
    with pytest.raises(ValueError, match="sha256 is .*, must be 00"):
        make(tmp_path / "tokens", moved, dataclasses.replace(bpe[1], sha256="00"), validation=(there_held,))
    assert make(tmp_path / "tokens", moved, checked, validation=(there_held,)) == first
    for wrong, named in (
            (dict(files=[*reversed(moved[:1]), str(there / "z.ndjson")], validation=(str(there / "c.jsonl"),)),
             "in another order"),
            (dict(files=moved[:1], validation=tuple(str(there / name) for name in ("c.jsonl", "z.ndjson"))),
             "files of data.validation=1, it is now 2"),
            (dict(files=moved, validation=(held, moved[0])), "files of data.validation=1, it is now")):
        with pytest.raises(ValueError, match=named):
            make(tmp_path / "tokens", tokenizer=bpe[1], **wrong)
    (there / "a.jsonl").rename(there / "a.txt")  # read otherwise
    with pytest.raises(ValueError, match=r"other files: a\.txt"):
        make(tmp_path / "tokens", [str(there / "a.txt"), str(there / "c.jsonl")], bpe[1], validation=(held,))
    # half made here, the rest from there
    arguments = dict(tokenizer=BYTES, validation_fraction=0.2)
    alone = make(tmp_path / "alone", str(tmp_path / "here" / "*.jsonl"), **arguments)
    make(tmp_path / "half", str(tmp_path / "here" / "*.jsonl"), **arguments, prepare_shard="0/2")
    (there / "a.txt").rename(there / "0.jsonl")
    assert make(tmp_path / "half", str(there / "?.jsonl"), **arguments, prepare_shard="1/2") == alone


def as_version_2(folder: Path, files, validation=(), file="") -> dict:
    """The manifest and begun.json of a folder as version 2 wrote them."""
    for name in ("manifest.json", "begun.json"):
        made = json.loads((folder / name).read_text())
        made["version"] = 2
        made["sources"] = [fact[:2] for fact in made["sources"]]
        new = ("files of data.validation", "tokenizer.pattern")
        settings = {key: value for key, value in made["settings"].items() if key not in new}
        made["settings"] = settings | {"data.files": list(files), "data.validation": list(validation),
                                       "tokenizer.file": file, "tokenizer.sha256": ""}
        made.pop("adopted", None)
        (folder / name).write_text(json.dumps(made))
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize("stream", [False, True])
def test_folders_of_version_2_are_read(tmp_path, small, stream):
    """By names and sizes of the files at hand; the fingerprint, which checkpoints name, stays, also of a sample."""
    files = [numbered(tmp_path / f"{i}.jsonl", 20, 100 * i) for i in range(2)]
    held = numbered(tmp_path / "held.jsonl", 5, 500)
    tokenizers.make_tokenizer("bpe", 270, [text(i) for i in range(9)]).save(tmp_path / "t")
    bpe = TokenizerConfig(kind="bpe", file=str(tmp_path / "t" / tokenizers.RANK_FILE))
    arguments = dict(files=files, tokenizer=bpe, validation=(held,), stream=stream)
    folder = tmp_path / "tokens"
    new = make(folder, **arguments)
    old = as_version_2(folder, files, (held,), bpe.file)
    loaded = prepare.load_manifest(folder)
    print_of_2 = [loaded.tokenizer_fingerprint, loaded.splits,
                  sorted((name, facts["sha256"]) for name, facts in loaded.shards.items())]
    print_of_2 += [old["settings"], old["sources"]] if stream else []
    assert loaded.version == 2 and loaded.fingerprint == hashlib.sha256(json.dumps(print_of_2).encode()).hexdigest()
    assert (new.fingerprint == loaded.fingerprint) != stream
    # another split of the same files between training and validation is told from the shards
    with pytest.raises(ValueError, match="files of data.validation=1, it is now 2"):
        make(folder, **arguments | {"files": files[:1], "validation": (files[1], held)})
    os.rename(files[0], tmp_path / "away")
    for there in (False, True):  # without its files it is as good
        if there:
            os.rename(tmp_path / "away", files[0])
        assert make(folder, **arguments) == loaded == prepare.load_manifest(folder)
    # as this code once wrote it on: of version 3, with the fingerprint that it had
    kept = dataclasses.replace(new, adopted=[old["settings"], old["sources"]] if stream else [])
    shards.write_json(folder / prepare.MANIFEST, dataclasses.asdict(kept))
    assert make(folder, **arguments) == kept and kept.fingerprint == loaded.fingerprint
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="begun.json is of version 2; delete .* and prepare again"):
        make(folder, **arguments)
    (folder / "manifest.json").write_text(json.dumps(old))
    numbered(Path(files[1]), 19, 100)
    with pytest.raises(ValueError, match=r"made from other files: 1\.jsonl"):
        make(folder, **arguments)


# --------------------------------------------------------------------------------------------- disk and memory


DISK = '''
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
try:
    run(sys.argv[1])
except OSError as error:
    print(error)
print(sorted(path for path in os.listdir(sys.argv[1]) if path.endswith(".tmp")))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
run(sys.argv[1])
'''


def test_a_full_disk(tmp_path, monkeypatch):
    """One line with the file; what was finished stays, and the rest is made when there is room."""
    files = [numbered(tmp_path / "a.jsonl", 30), numbered(tmp_path / "b.jsonl", 500, 100)]
    process = driver(tmp_path, DISK, files, validation_fraction=0.2, shard_tokens=1 << 20)
    out, errors = process.communicate(timeout=60)
    error, leftovers, made = out.splitlines()
    assert "train-00001-000.bin cannot be written" in error and "what was finished before is kept" in error
    assert leftovers == "[]" and made.startswith("tokens: made")
    monkeypatch.setattr(shards, "BATCH_CHARS", 350)
    clean = make(tmp_path / "clean", files, validation_fraction=0.2)
    assert prepare.load_manifest(tmp_path / "tokens") == clean


def test_leftovers_of_the_dead_are_removed(tmp_path):
    files = numbered(tmp_path / "a.jsonl")
    (tmp_path / "tokens").mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    old = jsons.temporary(tmp_path / "tokens" / "train-00007-000.bin")
    here = old.name.rpartition("-")[0]
    names = {f"{here}-{dead.pid}.tmp": False, f"{here}-{os.getppid()}.tmp": True,
             f"train-00007-000.bin.elsewhere-{dead.pid}.tmp": True, "train-00007-001.bin.elsewhere-1.tmp": False}
    for name in names:
        (tmp_path / "tokens" / name).write_bytes(b"x")
    os.utime(tmp_path / "tokens" / "train-00007-001.bin.elsewhere-1.tmp", (0, time.time() - 4000))
    make(tmp_path / "tokens", files, validation_fraction=0.2)
    assert names == {name: (tmp_path / "tokens" / name).exists() for name in names}


MEMORY = '''
import re
run(sys.argv[1])
with open("/proc/self/status") as file:  # not ru_maxrss: that begins at the memory of the process that started this one
    print(re.search("VmHWM:\\s*(\\d+)", file.read())[1])
'''


@pytest.mark.slow
@pytest.mark.parametrize("kind, count", [("bytes", 1), ("bpe", 4)])
def test_memory_does_not_grow_with_the_text(tmp_path, kind, count):
    """The peak at 1 GB is at most 1.1 of that at 50 MB: one file, four at once."""
    words = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "r", "st", "t", "ng")]
    texts = (" ".join(words[(7 * i * j + i) % len(words)] for j in range(400 + i % 300)) for i in range(4000))
    body = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    tokenizer = BYTES
    if kind == "bpe":
        tokenizers.make_tokenizer("bpe", 600, [body[:200_000]]).save(tmp_path / "words")
        tokenizer = TokenizerConfig(kind="bpe", file=str(tmp_path / "words" / tokenizers.RANK_FILE))
    peaks = []
    for size in (50_000_000, 1_000_000_000):
        files = [str(tmp_path / f"{i}.jsonl") for i in range(count)]
        for file in files:
            with open(file, "w") as out:
                while out.tell() < size / count:
                    out.write(body)
        process = driver(tmp_path, MEMORY, files, words=tokenizer, batch_chars=shards.BATCH_CHARS,
                         shard_tokens=shards.SHARD_TOKENS)
        out, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors
        peaks.append(int(out.splitlines()[-1]))
        shutil.rmtree(tmp_path / "tokens")
    print(peaks)
    assert peaks[1] <= 1.1 * peaks[0]
