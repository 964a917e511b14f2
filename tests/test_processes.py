"""Two real processes over loopback, four devices each, do what one process with eight devices does."""
import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import process
import pytest
import tiny

from hdlm_jax.common import parallel
from hdlm_jax.config import ParallelConfig
from hdlm_jax.runs import evaluate, generate, train
from hdlm_jax.training import loading, state
from hdlm_jax.training.checkpoint import Checkpoints
from hdlm_jax.training.metrics import read_metrics


@pytest.fixture(scope="module")
def two(tmp_path_factory, root):
    """(folder of what two processes made, their last exit code)."""
    folder = tmp_path_factory.mktemp("two")
    recipe, _ = tiny.trained()
    environment = os.environ | {"DEVICES": "4", "LOGS": str(folder), "XLA_FLAGS": tiny.QUICK_COMPILES,
                                "JAX_PLATFORMS": "cpu"}
    launcher, program = str(root / "launch" / "local_processes.sh"), str(root / "tests" / "process.py")
    command = [launcher, "2", sys.executable, program, str(recipe), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert (folder / "said_0.json").exists(), done.stdout + done.stderr + (folder / "process_1.log").read_text()
    return folder, done


def test_they_are_two_and_speak_once(two):
    folder, done = two
    said = [json.loads((folder / f"said_{i}.json").read_text()) for i in range(2)]
    assert said[0]["processes"] == 2 and said[0]["devices"] == 8 and said[0]["here"] == 4
    assert said[0]["nelbo"] == said[1]["nelbo"]
    assert said[0]["error"] == "KeyError: 'x'" and said[1]["error"] == "ValueError: process 0: 'x'"
    assert said[0]["largest"] == said[1]["largest"] == [[-1, 1], [2**40 + 1, 3]]
    held = f"{folder}/held is held by pid "
    assert said[0]["locked"].startswith(held) and said[1]["locked"].startswith(f"process 0: {held}")
    assert said[0]["timer"] == said[1]["timer"] != [], "the clock of process 0; that of process 1 would say nothing yet"
    sums = [float(np.asarray(leaf, np.float64).sum()) for leaf in jax.tree.leaves(tiny.model().run.params)]
    assert said[0]["sums"] == said[1]["sums"] == sums, "a checkpoint of 8 devices read by 2 processes"
    assert "train: done, step 3" in done.stdout
    assert not [line for line in (folder / "process_1.log").read_text().splitlines() if line.startswith("train:")]


def test_what_is_damaged_to_one_is_damaged_to_all(two):
    folder, done = two
    for i in range(2):
        assert all(json.loads((folder / f"said_{i}.json").read_text())["again"])
    assert "(damaged?): another process cannot read it; put aside as damaged-3, going on from step 2" in done.stdout
    assert sorted(os.listdir(folder / "run" / "checkpoints")) == ["2", "3", "damaged-3"]


def test_losses_evaluation_and_samples_of_one_process(two, tmp_path):
    folder, _ = two
    recipe, alone = tiny.trained()
    ours, theirs = (read_metrics(str(path / "metrics.jsonl")) for path in (folder / "run", alone))
    assert [r["step"] for r in ours] == [1, 2, 3]
    for name in ("loss", "nelbo", "grad_norm"):
        np.testing.assert_allclose([r[name] for r in ours], [r[name] for r in theirs], rtol=1e-5)
    config = dataclasses.replace(tiny.read_recipe(recipe), parallel=ParallelConfig(**process.MESH))
    there = [json.loads((folder / "run" / name).read_text()) for name in ("evaluate.json", "generate.json")]
    samples = (folder / "run" / "samples.jsonl").read_text()
    for name in ("evaluate.json", "generate.json"):
        (folder / "run" / name).unlink()
    measured = evaluate.evaluate(config, str(folder / "run"))
    np.testing.assert_allclose(measured["nelbo"], there[0]["nelbo"], rtol=1e-5)
    assert generate.generate(config, str(folder / "run"))["row_forwards"] == there[1]["row_forwards"]
    assert (folder / "run" / "samples.jsonl").read_text() == samples


@pytest.mark.parametrize("written", ["by 8 devices", "by 2 processes"])
@pytest.mark.parametrize("devices, mesh", [(1, {}), (2, {"fsdp": 2, "data": 1}), (8, {"tensor": 2})])
def test_a_checkpoint_is_read_on_any_number_of_devices(two, written, devices, mesh):
    recipe, alone = tiny.trained()
    workdir = two[0] / "run" if written == "by 2 processes" else alone
    config = dataclasses.replace(tiny.read_recipe(recipe), parallel=ParallelConfig(**mesh))
    run = loading.load_run(dataclasses.replace(config, parallel=ParallelConfig()), str(workdir), "latest")
    tx = state.make_optimizer(config)[0]

    def restored(mesh):
        abstract, _ = state.abstract_state(config, run.network, tx, mesh)
        checkpoints = Checkpoints(str(workdir), read_only=True)
        return checkpoints.restore(3, abstract)

    there = restored(parallel.make_mesh(config, jax.devices()[:devices]))
    assert {len(a.sharding.device_set) for a in jax.tree.leaves(there)} == {devices}
    whole = restored(jax.make_mesh((1, 1, 1), parallel.AXES, devices=jax.devices()[:1]))
    jax.tree.map(np.testing.assert_array_equal, there, whole)
    assert int(there.step) == 3 and np.abs(np.asarray(there.params["embedding"])).max() > 0


def test_asked_to_stop_all_leave_at_one_step_with_everything_saved(two):
    folder, done = two
    assert done.returncode == 75, done.stdout + done.stderr
    checkpoints = Checkpoints(str(folder / "stopped"), read_only=True)
    step = checkpoints.latest()
    assert f"asked to stop, saved step {step}; the same command resumes" in done.stdout
    assert checkpoints.meta(step)["position"] == {"next_index": step}
    assert [r["step"] for r in read_metrics(str(folder / "stopped" / "metrics.jsonl"))] == list(range(1, step + 1))
    # one process goes on where two left, in the same order
    config = tiny.read_recipe(tiny.trained()[0])
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=step + 2),
                                 optimizer=dataclasses.replace(config.optimizer, schedule="constant"))
    went_on = train.train(config, str(folder / "stopped"))
    whole = train.train(config, str(folder / "whole"))
    records = [read_metrics(str(folder / name / "metrics.jsonl"))[-1] for name in ("stopped", "whole")]
    assert int(went_on.step) == int(whole.step) == step + 2
    np.testing.assert_allclose(records[0]["loss"], records[1]["loss"], rtol=1e-4)
