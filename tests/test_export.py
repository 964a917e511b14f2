"""Exports: what they hold, that they are the run's weights bit for bit, and that they are whole or not there."""
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from tiny import model, read_recipe, trained

import hdlm_jax
from hdlm_jax.common.jsons import write_json
from hdlm_jax.config import ConfigError
from hdlm_jax.runs import export as export_lib
from hdlm_jax.runs.export import export
from hdlm_jax.training import loading
from hdlm_jax.training.checkpoint import Checkpoints
from hdlm_jax.training.state import build, init_state, make_optimizer

TEXT = (Path(__file__).parent.parent / "docs" / "scale.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT.partition("## Taking the weights elsewhere")[2], re.DOTALL)[:2]
FILES = {"model.safetensors", "params", "config.json", "hierarchy.npz", "tokenizer"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The export of a copy of the trained run."""
    workdir = shutil.copytree(trained()[1], tmp_path_factory.mktemp("export") / "run")
    return Path(export(read_recipe(trained()[0]), str(workdir)))


def flat(params):
    return {".".join(str(p.key) for p in path): np.asarray(a) for path, a in jax.tree.leaves_with_path(params)}


def test_whoever_may_read_a_file_may_read_an_export(exported):
    """As the umask says, not its owner alone."""
    made = {path: path.stat().st_mode for path in exported.rglob("*") if path.is_file()}
    umask = os.umask(0)
    os.umask(umask)
    assert len(made) > 5 and {mode & 0o777 for mode in made.values()} == {0o666 & ~umask}, made


def test_what_it_holds(exported):
    assert exported.name == "export" and set(os.listdir(exported)) == FILES
    arrays, params = load_file(exported / "model.safetensors"), flat(model().run.params)
    assert set(arrays) == set(params) and {"embedding", "stack.qkv.kernel", "head.bias"} <= set(arrays)
    for name, array in arrays.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, params[name])
    facts = json.loads((exported / "config.json").read_text())
    assert facts["step"] == 3 and facts["ema"] is False and facts["hdlm_jax"] == hdlm_jax.__version__
    assert facts["shapes"] == {name: list(a.shape) for name, a in params.items()}
    fingerprints = facts["fingerprints"]
    assert fingerprints["hierarchy"] == model().hierarchy.fingerprint
    assert fingerprints["tokenizer"] == model().tokenizer.fingerprint and len(fingerprints["data"]) == 64
    with safe_open(exported / "model.safetensors", "np") as f:
        about = {name: facts[name] for name in ("step", "ema", "fingerprints", "hdlm_jax")}
        assert json.loads(f.metadata()["hdlm_jax"]) == about and len(f.metadata()) == 1


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["safetensors", "orbax"])
def test_the_documented_snippets_give_the_run_s_logits(exported, root, snippet):
    assert snippet in (root / "docs" / "scale.md").read_text()
    run, space = model().run, {"folder": str(exported)}
    exec(snippet, space)
    z, t = np.full((1, run.config.model.seq_len), run.hierarchy.mask_id), np.ones(1)
    expected = run.network.apply({"params": jax.tree.map(np.asarray, run.params)}, z, t)
    found = space["logits"] if "logits" in space else run.network.apply({"params": space["params"]}, z, t)
    assert expected.shape == (1, 16, 257) and float(np.ptp(expected)) > 0
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_two_snippets():
    assert len(SNIPPETS) == 2 and "hdlm_jax" not in SNIPPETS[1]


def test_it_is_used_as_a_run(exported):
    loaded = hdlm_jax.load(str(exported))
    assert loaded.run.step == 3 and loaded.run.config == model().run.config
    assert loaded.tokenizer.fingerprint == model().tokenizer.fingerprint and loaded.hierarchy == model().hierarchy
    for a, b in zip(jax.tree.leaves(loaded.run.params), jax.tree.leaves(model().run.params), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.sharding == b.sharding
    start = dataclasses.replace(loaded.run.config.train, init_from=str(exported))
    start = loading.load_base(dataclasses.replace(loaded.run.config, train=start),
                              loaded.tokenizer.fingerprint).params
    np.testing.assert_array_equal(start["embedding"], np.asarray(model().run.params["embedding"]))
    other = dataclasses.replace(loaded.run.config, model=dataclasses.replace(loaded.run.config.model, width=64))
    with pytest.raises(ConfigError, match="model.width=64 .there 32.: .* was trained otherwise"):
        loading.load_run(other, str(exported))


@pytest.fixture
def averaged(tmp_path):
    """(config, workdir, values): a run with EMA and two checkpoints; values[step] is what all averages are there."""
    workdir = shutil.copytree(trained()[1], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    config = read_recipe(trained()[0])
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, ema=0.9))
    write_json(str(workdir / "config.json"), config.as_dict())
    network, _ = build(config, model().hierarchy)
    tx, _ = make_optimizer(config)
    shape = jax.eval_shape(lambda: init_state(config, network, tx, jax.random.key(0)))
    meta = {"hierarchy": model().hierarchy.fingerprint, "tokenizer": model().tokenizer.fingerprint, "data": "d"}
    checkpoints, values = Checkpoints(str(workdir)), {2: 0.5, 3: 0.25}
    for step, value in values.items():
        state = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shape)
        ema = jax.tree.map(lambda a, v=value: np.full(a.shape, v, a.dtype), shape.ema)
        checkpoints.save(step, state._replace(ema=ema), meta, {"nelbo": float(step)})
        checkpoints.wait()
    checkpoints.close()
    return config, str(workdir), values


def choose(config, which):
    return dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, checkpoint=which))


def test_the_average_of_the_chosen_checkpoint_and_never_half_of_it(averaged, monkeypatch):
    config, workdir, values = averaged
    said = []
    monkeypatch.setattr(export_lib, "say", said.append)

    def holds(step):
        folder = Path(workdir) / "export"
        facts = json.loads((folder / "config.json").read_text())
        arrays = load_file(folder / "model.safetensors")
        assert all((a == values[step]).all() for a in arrays.values()) and facts["ema"] is True
        assert {p.name for p in Path(workdir).glob("export*")} == {"export"} and set(os.listdir(folder)) == FILES
        return facts["step"] == step

    export(config, workdir)
    assert holds(2), "best: the lowest NELBO"
    (Path(workdir) / "export.tmp").mkdir()  # what a killed export leaves

    def fails(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(export_lib, "write_json", fails)
        with pytest.raises(OSError, match="disk full"):
            export(choose(config, "latest"), workdir)
    assert json.loads((Path(workdir) / "export" / "config.json").read_text())["step"] == 2, "the old one is still there"
    export(choose(config, "latest"), workdir)
    assert holds(3)
    made = os.stat(Path(workdir) / "export").st_ino
    export(choose(config, "latest"), workdir)
    assert os.stat(Path(workdir) / "export").st_ino == made and "reusing" in said[-1]
    export(config, workdir)
    assert holds(2) and "reusing" not in said[-1]


def test_it_says_what_is_missing_before_any_work(tmp_path, monkeypatch):
    config = read_recipe(trained()[0])
    with pytest.raises(ConfigError, match="no .*config.json; train first"):
        export(config, str(tmp_path))
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ConfigError, match=r"--mode=export: needs safetensors, pip install hdlm_jax\[safetensors\]"):
        export(config, str(tmp_path))


TWO = """
import os, sys, jax
jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], 2, int(os.environ["HDLM_PROCESS_ID"]))
import dataclasses
from hdlm_jax.config import ParallelConfig
from hdlm_jax.runs import export
from hdlm_jax.training import loading
config = dataclasses.replace(loading.saved_config(sys.argv[1]), parallel=ParallelConfig(1, 4, 1))
for _ in range(2):
    export.export(config, sys.argv[1])
shards = loading.load_run(config, sys.argv[1]).params["embedding"].addressable_shards
print("rows", shards[0].data.shape[0], flush=True)
"""


@pytest.mark.slow
def test_two_processes_write_what_one_writes(exported, root, tmp_path):
    """Weights divided over the devices of two processes; the second call of both finds the first one's."""
    workdir = shutil.copytree(trained()[1], tmp_path / "run")
    env = os.environ | {"DEVICES": "2", "LOGS": str(tmp_path), "PYTHONPATH": str(root), "GRACE": "1"}
    done = subprocess.Popen([root / "launch" / "local_processes.sh", "2", sys.executable, "-c", TWO, workdir], env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, err = done.communicate(timeout=100)
    except subprocess.TimeoutExpired:
        os.killpg(done.pid, signal.SIGKILL)
        raise
    log = (tmp_path / "process_1.log").read_text()
    assert done.returncode == 0, out + err + log
    rows = load_file(exported / "model.safetensors")["embedding"].shape[0]
    assert f"rows {rows // 4}" in out and f"rows {rows // 4}" in log, "a quarter of the table on each device"
    for name in ("model.safetensors", "config.json", "hierarchy.npz", "tokenizer/tokenizer.json"):
        assert (workdir / "export" / name).read_bytes() == (exported / name).read_bytes(), name
    space = {"folder": str(workdir / "export")}
    exec(SNIPPETS[1], space)
    for a, b in zip(jax.tree.leaves(space["params"]), jax.tree.leaves(model().run.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert out.count("export: step 3") == 1 and "export: reusing" in out
