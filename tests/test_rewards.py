"""tools.rewards: every system is a config that holds, its commands start from the base of its seed, tables average."""
import json
import math
import subprocess

import numpy as np
import pytest
from tiny import with_settings

from hdlm_jax.config import recipe
from hdlm_jax.decoding import sampler
from tools import rewards


@pytest.mark.parametrize("task", rewards.TASKS)
def test_systems_are_configs_that_hold(task):
    """Settings of every command that trains pass all rules, with their types."""
    kept = set()
    for name in rewards.TASKS[task].systems:
        system = rewards.SYSTEMS[name]
        for command in rewards.commands(rewards.TASKS[task], system, 1, "BASE", "RUN"):
            given = dict(part.removeprefix("--").split("=", 1) for part in command[3:])
            folder, mode = given.pop("workdir"), given.pop("mode")
            c = recipe(*(given.pop("config", "permutations") + ":").split(":")[:2])
            found = with_settings(c, {key.removeprefix("config."): value for key, value in given.items()})
            sampler.method_of(found.generate)  # with its options
            if mode == "train":
                assert found.train.seed == 1 and folder in ("BASE", "RUN")
                assert found.train.init_from == ("" if folder == "BASE" else "BASE")
                kept.add((name, folder))
    assert {name for name, folder in kept if folder == "RUN"} == {
        name for name in rewards.TASKS[task].systems if rewards.SYSTEMS[name].recipe}


def line(run, seed, reward, nelbo=1.0):
    at = [{"calls": calls, "reward": reward + calls / 100, "reward_se": 0.02, "distinct": 0.5}
          for calls in (3.0, 6.0, 7.0)]
    return {"run": run, "seed": seed, "nelbo": nelbo, "se": 0.01, "rewards": at, "rollout_s": 0.1, "update_s": 0.3}


def test_rows_are_means_over_seeds_with_their_standard_error():
    found = rewards.table([line("base", 0, 0.4), *(line("`score`", seed, r, n) for seed, (r, n) in enumerate(
        ((0.5, 1.1), (0.6, 1.3), (0.7, 1.2)))), line("`first`", 0, 0.5) | {"rewards": line("", 0, 0.5)["rewards"][:1]}])
    alone, mean = (row for row in found.splitlines() if row.startswith(("| base", "| `score`")))
    assert [part.strip() for part in alone.split("|")[2:4]] == ["1", "3: 0.430 ± 0.020"]
    spread = math.hypot(np.std([0.5, 0.6, 0.7], ddof=1) / math.sqrt(3), 0.02)
    once = next(row for row in found.splitlines() if row.startswith("| `first`"))  # a sampler that counts no calls
    assert [part.strip() for part in once.split("|")[3:7]] == ["", "3: 0.530 ± 0.020", "", "50 %"]
    parts = [part.strip() for part in mean.split("|")]
    assert parts[2] == "3" and parts[4] == f"6: 0.660 ± {spread:.3f}" and parts[6] == "50 %, 50 %, 50 %"
    error = math.hypot(np.std([1.1, 1.3, 1.2], ddof=1) / math.sqrt(3), 0.01)
    assert parts[7] == f"1.200 ± {error:.3f}" and parts[8] == "0.100 + 0.300"


def test_what_is_there_is_not_made_again(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(rewards, "make", lambda task, name, seed, runs: made.append((name, seed)) or line(
        rewards.SYSTEMS[name].label, seed, 0.5) | {"name": name})
    ask = ["levels", "--seeds=0,1", f"--out={tmp_path / 'found.jsonl'}", "--systems=score,order"]
    rewards.main([*ask, "--list"])
    assert not made and "open  order, seed 1" in capsys.readouterr().out
    rewards.main(ask)
    rewards.main(ask)
    assert made == [(name, seed) for seed in (0, 1) for name in ("score", "order")]
    with pytest.raises(SystemExit, match="--systems=spg: choose among base, score, score-kl, order, elbo, nodes"):
        rewards.main([*ask[:-1], "--systems=spg"])


def test_a_base_that_is_measured_is_not_trained_again(tmp_path, monkeypatch, capsys):
    """The line is of the system's own files; a run that failed is said and leaves the others to go on."""
    ran = []

    def run(command, check):
        ran.append(command)
        if "--config.tune.views=1" in command:
            return subprocess.CompletedProcess(command, 1)
        folder = next(part.split("=", 1)[1] for part in command if part.startswith("--workdir"))
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        if command[-1] == "--mode=evaluate":
            (tmp_path / folder / "evaluate.json").write_text('{"nelbo": 1.5, "se": 0.1}')
            (tmp_path / folder / "rewards.json").write_text(json.dumps({"step": len(folder), "rewards": []}))
            (tmp_path / folder / "metrics.jsonl").write_text('{"step": 1, "rollout_s": 1.0, "update_s": 2.0}\n' * 3)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(rewards.cli, "commit", lambda: "abc")
    rewards.make("permutations", "base", 0, tmp_path)
    assert [command[-1] for command in ran] == ["--mode=train", "--mode=evaluate"]
    found = rewards.make("permutations", "score", 0, tmp_path)
    assert len(ran) == 4 and f"--config.train.init_from={tmp_path / 'permutations-base-s0'}" in ran[2]
    assert found["run"] == "`score`" and found["update_s"] == 2 and found["nelbo"] == 1.5
    assert rewards.make("permutations", "score-view", 0, tmp_path) is None
    assert "score-view, seed 0: exit code 1, left for the next call" in capsys.readouterr().out
