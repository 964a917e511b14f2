"""Checkpoints on bad disks: one clear line, and what was whole stays."""
import dataclasses
import errno
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from hdlm_jax.common import parallel
from hdlm_jax.config import ConfigError
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.runs import train
from hdlm_jax.training import loading
from hdlm_jax.training.checkpoint import Checkpoints, DamagedCheckpoint, checksums
from hdlm_jax.training.metrics import read_metrics
from hdlm_jax.training.state import abstract_state, build, make_optimizer


@pytest.fixture
def run(tmp_path):
    """(recipe, a copy of the trained run of three steps)."""
    recipe, workdir = tiny.trained()
    shutil.copytree(workdir, tmp_path / "run")
    return recipe, tmp_path / "run"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(config, a run of three steps with checkpoints of steps 2 and 3, its last state)."""
    recipe, workdir = tiny.trained()
    config, copy = tiny.read_recipe(recipe), tmp_path_factory.mktemp("two") / "run"
    shutil.copytree(workdir, copy, ignore=shutil.ignore_patterns("checkpoints"))
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every=2))
    state = train.train(config, str(copy))
    assert sorted(os.listdir(copy / "checkpoints")) == ["2", "3"]
    return config, copy, state


def damage(folder):
    for path in folder.rglob("d/*"):
        os.truncate(path, 100)


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def arrays(step):
    """Its files of arrays, the largest first."""
    return sorted(step.glob("state/**/d/*"), key=lambda path: -path.stat().st_size)


DAMAGES = {
    "a bit of the largest file": lambda step: flip(arrays(step)[0]),
    "a bit in each file": lambda step: [flip(path) for path in arrays(step)],
    "no manifest of arrays": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "no file of arrays": lambda step: arrays(step)[0].unlink(),
    "no state": lambda step: shutil.rmtree(step / "state"),
    "no meta": lambda step: (step / "meta" / "metadata").unlink(),
    "half of meta": lambda step: os.truncate(step / "meta" / "metadata", 100),
    "no JSON of metrics": lambda step: (step / "metrics" / "metrics").write_text("{"),
    "nothing": lambda step: [shutil.rmtree(step), step.mkdir()],
}


SOON = ("a bit of the largest file", "no state", "half of meta")  # one of each part; the others are slow


@pytest.mark.parametrize("what", [what if what in SOON else pytest.param(what, marks=pytest.mark.slow)
                                  for what in DAMAGES])
def test_a_resume_goes_back_to_the_checkpoint_before(two, tmp_path, capsys, what):
    """Whatever is damaged of the latest: one line, its folder put aside, and the end of an undisturbed run."""
    config, there, want = two
    workdir = shutil.copytree(there, tmp_path / "run")
    DAMAGES[what](workdir / "checkpoints" / "3")
    left = sorted(path.relative_to(workdir / "checkpoints" / "3") for path in (workdir / "checkpoints/3").rglob("*"))
    (workdir / "checkpoints" / "damaged-3").mkdir()  # that name is taken
    found = train.train(config, str(workdir))
    assert [(a.dtype, np.asarray(a).tobytes()) for a in jax.tree.leaves(found)] == \
           [(a.dtype, np.asarray(a).tobytes()) for a in jax.tree.leaves(want)]
    said = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line]
    assert len(said) == 1 and "put aside as damaged-3-1, going on from step 2" in said[0], said
    assert sorted(os.listdir(workdir / "checkpoints")) == ["2", "3", "damaged-3", "damaged-3-1"]
    aside = workdir / "checkpoints" / "damaged-3-1"
    assert sorted(path.relative_to(aside) for path in aside.rglob("*")) == left
    records = [[{k: r.get(k) for k in ("step", "loss", "grad_norm", "valid_nelbo")} for r in
                read_metrics(str(folder / "metrics.jsonl"))] for folder in (workdir, there)]
    assert records[0] == records[1] and [r["step"] for r in records[0]] == [1, 2, 3]


def test_no_checkpoint_is_whole(two, tmp_path):
    """Nothing is begun anew over a run, nothing of it changed."""
    config, there, _ = two
    workdir = shutil.copytree(there, tmp_path / "run")
    flip(arrays(workdir / "checkpoints" / "2")[0])
    (workdir / "checkpoints" / "3" / "meta" / "metadata").unlink()
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file() and path.name != "lock"}
    with pytest.raises(DamagedCheckpoint, match=r"step 3 cannot .*; of steps \[2, 3\] none is whole") as error:
        train.train(config, str(workdir))
    assert "\n" not in str(error.value)
    assert before == {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file() and path.name != "lock"}


def test_what_is_not_damage_stops_a_resume(two, tmp_path, monkeypatch):
    """A disk that does not read, another configuration: one line, and all folders stay where they are."""
    config, there, _ = two
    workdir = shutil.copytree(there, tmp_path / "run")
    other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=0.5))
    (workdir / "checkpoints" / "3" / "meta" / "metadata").unlink()
    with pytest.raises(ConfigError, match="optimizer.lr=0.5"):  # what the checkpoint before says
        train.train(other, str(workdir))
    # read in vain once, though a second try would do
    def fails(self, *_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(ocp.Checkpointer, "restore", fails)
        with pytest.raises(OSError, match="checkpoint of step 3 cannot be read: .*Input/output error") as error:
            train.train(config, str(workdir))
    assert not isinstance(error.value, DamagedCheckpoint)
    path = arrays(workdir / "checkpoints" / "2")[0]
    path.unlink()
    path.symlink_to(path)  # an error of the disk's, not its contents
    for change in (lambda: None, lambda: shutil.rmtree(workdir / "checkpoints" / "3")):
        change()
        with pytest.raises(OSError, match="checkpoint of step 2 cannot be read: .*symbolic links") as error:
            train.train(config, str(workdir))
        assert not isinstance(error.value, DamagedCheckpoint)
    assert os.listdir(workdir / "checkpoints") == ["2"]


def test_a_reader_leaves_a_damaged_checkpoint_where_it_is(two, tmp_path):
    config, there, _ = two
    workdir = shutil.copytree(there, tmp_path / "run")
    damage(workdir / "checkpoints" / "3")
    with pytest.raises(DamagedCheckpoint, match="--mode=train goes on from the one before"):
        loading.load_run(config, str(workdir), "latest")
    assert sorted(os.listdir(workdir / "checkpoints")) == ["2", "3"]


def test_a_damaged_checkpoint_is_named(run):
    recipe, workdir = run
    damage(workdir / "checkpoints" / "3")
    config = tiny.read_recipe(recipe)
    with pytest.raises(OSError, match=r"checkpoints: checkpoint of step 3 cannot be read \(damaged\?.*steps \[3\]"):
        loading.load_run(config, str(workdir), "latest")
    more = dataclasses.replace(config, train=dataclasses.replace(config.train, nonfinite_limit=3))
    with pytest.raises(OSError, match="checkpoint of step 3 cannot be read"):
        train.train(more, str(workdir))
    assert sorted(os.listdir(workdir / "checkpoints")) == ["3"]


def test_one_bit_of_an_array_shows(run):
    """Wherever it is in the files of arrays: no weight that was not saved is ever used."""
    recipe, workdir = run
    config, rng = tiny.read_recipe(recipe), np.random.default_rng(0)
    network, _ = build(config, Hierarchy.load(workdir / "hierarchy.npz"))
    abstract, _ = abstract_state(config, network, make_optimizer(config)[0], parallel.make_mesh(config))
    checkpoints = Checkpoints(str(workdir), read_only=True)
    saved = checksums(checkpoints.restore(3, abstract))
    files = sorted((workdir / "checkpoints" / "3").glob("state/**/d/*"))
    found = []
    for _ in range(16):
        path = files[rng.choice(len(files), p=np.array(sizes := [f.stat().st_size for f in files]) / sum(sizes))]
        raw = path.read_bytes()
        at, bit = int(rng.integers(len(raw))), 1 << int(rng.integers(8))
        path.write_bytes(raw[:at] + bytes([raw[at] ^ bit]) + raw[at + 1:])
        try:
            found.append("not the arrays")
            assert checksums(checkpoints.restore(3, abstract)) == saved
        except OSError as error:
            found[-1] = re.search("is damaged|cannot be read", str(error))[0]
            assert "checkpoint of step 3" in str(error) and "\n" not in str(error)
        path.write_bytes(raw)
    checkpoints.close()
    assert found.count("is damaged") >= 8, found


@pytest.mark.parametrize("name, raw", [
    ("_CHECKPOINT_METADATA", b"1"), ("_CHECKPOINT_METADATA", b"[]"), ("metrics/metrics", b""),
    ("metrics/metrics", b"\xff\xfe"), ("metrics/metrics", b'{"nelbo": '), ("meta/metadata", b"1"),
    ("meta/metadata", b"{}"), ("meta/metadata", b'{"hier'), ("meta/metadata", b'{"data": "", "checksums": 1}'),
    ("state/_METADATA", b"1"), ("state/_METADATA", b'{"tree_'),
    ("state/manifest.ocdbt", b"{}"), ("state/manifest.ocdbt", b""),
])
def test_what_a_checkpoint_says_of_itself_may_be_damaged(run, name, raw):
    """One line with the checkpoint and what to do, for whoever reads it and for a resume."""
    recipe, workdir = run
    (workdir / "checkpoints" / "3" / name).write_bytes(raw)
    resume = [] if name.startswith("state") else [lambda: Checkpoints(str(workdir)).meta(3)]
    for read in (lambda: loading.load_here(str(workdir)), *resume):
        with pytest.raises(DamagedCheckpoint, match="remove its folder to go back to the one before") as error:
            read()
        line = str(error.value)
        assert "\n" not in line and re.search(r"checkpoints/3: a damaged|checkpoint of step 3", line)
        assert str(workdir) in line


def test_what_a_kill_left_unfinished_is_swept_away(run):
    recipe, workdir = run
    (workdir / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()
    (workdir / "checkpoints" / "trash" / "1").mkdir(parents=True)
    (workdir / "checkpoints" / "trash" / "1" / "half").write_text("")
    Checkpoints(str(workdir), read_only=True).close()
    assert len(os.listdir(workdir / "checkpoints")) == 3, "a reader changes nothing"
    train.train(tiny.read_recipe(recipe), str(workdir))
    assert os.listdir(workdir / "checkpoints") == ["3"]


def command(recipe, workdir, *flags, blocks="unlimited"):
    """The front door in a process of its own, that can write no file of more blocks of 512 bytes (like a full disk)."""
    line = [sys.executable, "-m", "hdlm_jax.main", f"--config={recipe}", f"--workdir={workdir}", *flags]
    limited = ["sh", "-c", f'ulimit -f {blocks}; exec "$@"', "sh", *line]
    environment = os.environ | {"XLA_FLAGS": tiny.QUICK_COMPILES, "CI": "1"}
    return subprocess.run(limited, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_a_disk_that_is_full_while_saving(run):
    recipe, workdir = run
    shutil.rmtree(workdir / "checkpoints")
    flags = ("--config.train.steps=6", "--config.checkpoint.every=3")
    done = command(recipe, workdir, *flags, blocks=200)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "a checkpoint cannot be written" in last and "File too large" in last and "there is no other" in last
    assert Checkpoints(str(workdir), read_only=True).latest() is None, "what is half written does not count"
    done = command(recipe, workdir, *flags)
    assert done.returncode == 0, done.stderr
    assert Checkpoints(str(workdir), read_only=True).latest() == 6


def test_a_workdir_that_cannot_be_written(tmp_path, run):
    blocked = tmp_path / "file"
    blocked.write_text("")
    config = tiny.read_recipe(run[0])
    with pytest.raises(OSError, match=r"workdir='.*/file/run' cannot be written \(Not a directory\); give another"):
        train.train(config, str(blocked / "run"))


def test_another_number_of_devices_is_said(run, capsys, monkeypatch):
    recipe, workdir = run
    config = tiny.read_recipe(recipe)
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, tensor=2, data=4))
    train.train(config, str(workdir))
    assert jax.device_count() == 8
    assert "resuming from step 3 of 3 (saved by 8 devices of 1 processes, mesh 8x1x1, now 8 devices of 1 processes, " \
           "mesh 4x1x2)" in capsys.readouterr().out


def test_checksums_are_of_the_bits_alone():
    """The formula on numpy's bits, for any division over devices; two numbers that change places show too."""
    rng = np.random.default_rng(0)
    tree = {"a": rng.standard_normal((8, 6)).astype(np.float32), "b": [np.arange(8, dtype=np.int32), np.float32(2.0)],
            "c": np.array([True, False]), "d": jnp.asarray(rng.standard_normal((4, 2, 3)), jnp.bfloat16)}
    here = checksums(jax.tree.map(jnp.asarray, tree))
    assert list(here) == ["a", "b.0", "b.1", "c", "d"]
    for value, found in zip(jax.tree.leaves(tree), here.values(), strict=True):
        raw = np.asarray(value)
        bits = np.frombuffer(raw.tobytes(), f"<u{raw.dtype.itemsize}").astype(np.uint64)
        assert found == int((bits * (2 * np.arange(raw.size, dtype=np.uint64) + 1)).sum() % 2**32)
    mesh = jax.make_mesh((8,), ("x",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    assert checksums({"a": jax.device_put(tree["a"], rows)}) == {"a": here["a"]}
    tree["a"][[0, 1]] = tree["a"][[1, 0]]
    assert checksums({"a": jnp.asarray(tree["a"])}) != {"a": here["a"]}
