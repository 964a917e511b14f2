"""The grid of runs: which cells there are, what a cell keeps, differences paired over texts and seeds."""

import json
import subprocess

import numpy as np
import pytest
from tiny import with_settings

from hdlm_jax.config import recipe
from hdlm_jax.config.command import written_out
from tools import cli, grid


def test_every_cell_is_a_recipe_and_every_question_has_cells():
    names = [cell.name for cell in grid.CELLS]
    assert len(set(names)) == len(names)
    for cell in grid.CELLS:
        given = [setting.removeprefix("--config.").split("=", 1) for setting in written_out(cell.more)]
        with_settings(recipe("books", cell.recipe), dict(given))
    for cells in grid.QUESTIONS.values():
        assert set(cells) <= set(names)
    with pytest.raises(ValueError, match="--cells=mdml: choose among ar, mdlm"):
        grid.chosen(["mdml"], 1)


def write(folder, cell, seed, nats, tokens):
    np.savez(folder / f"{cell}-s{seed}.npz", nats=nats, tokens=tokens)
    said = {"cell": cell, "seed": seed, "train_tokens_per_s": 1.0, "calls": [
        {"steps": 8, "judge": {"perplexity": 100.0 + seed, "perplexity_se": 10.0, "unigram_entropy": 4.0,
                               "distinct_2": 0.5}}],
        "evaluate": {"nelbo": nats.sum() / tokens.sum(), "se": 0.1, "hierarchy": [4096, 1], "params": 1000}}
    (folder / f"{cell}-s{seed}.json").write_text(json.dumps(said))


def test_differences_are_paired_over_texts_and_seeds(tmp_path):
    """The error is that of the ratio over texts of the seeds' mean and that between seeds, added in squares."""
    rng, tokens = np.random.default_rng(0), np.full(50, 10)
    text = rng.normal(50, 20, 50)  # hard texts are hard for both: paired, they cancel
    for seed, shift in ((0, 0.1), (1, 0.3)):
        write(tmp_path, "mdlm", seed, text, tokens)
        write(tmp_path, "hdlm", seed, text + 10 * shift + rng.normal(0, 0.5, 50), tokens)
    write(tmp_path, "hdlm", 2, text, tokens)  # a seed that the other has not
    cell, base = (grid.load(name, tmp_path) for name in ("hdlm", "mdlm"))
    mean, error, seeds = grid.difference(cell, base)
    apart = np.stack([a[1] - b[1] for a, b in zip(cell, base, strict=False)]) / 10
    over_texts = apart.mean(0).std(ddof=1) / np.sqrt(50)
    over_seeds = abs(apart[0].mean() - apart[1].mean()) / 2
    assert seeds == 2 and np.isclose(mean, apart.mean())
    assert np.isclose(error, np.hypot(over_texts, over_seeds))
    shown = grid.table("clusters", tmp_path)
    assert "hdlm_k3" not in shown and f"{mean:+.4f}" in shown
    assert "101 ± 1 / 4.00 / 0.50" in grid.calls_table(tmp_path)  # 1 / sqrt(3), of three seeds
    write(tmp_path, "mdlm-c0.02", 0, text, tokens)
    assert "mdlm-c0.02" in grid.calls_table(tmp_path, grid.FEW) and "mdlm-c0.02" not in grid.calls_table(tmp_path)
    assert "| discrete | continuous |" in grid.table("channel", tmp_path)
    with pytest.raises(ValueError, match="other texts"):
        grid.difference(cell, [(base[0][0], base[0][1], tokens + 1)])
    assert grid.difference(cell[:1], base[1:]) is None


def test_a_cell_made_before_gets_its_likelihoods(tmp_path, monkeypatch):
    runs, out = tmp_path / "runs", tmp_path / "out"
    workdir = runs / "mdlm-s0"
    for folder in (workdir, out):
        folder.mkdir(parents=True)
    nats, tokens = np.full(4, 20.0), np.full(4, 10)
    write(out, "mdlm", 0, nats, tokens)
    monkeypatch.setattr(grid, "training_speed", lambda workdir: 1.0)
    monkeypatch.setattr(grid, "flops_of", lambda workdir: 2.0)
    (workdir / "metrics.jsonl").write_text('{"tokens": 40}\n')
    (workdir / "evaluate.json").write_text(json.dumps({"nelbo": 2.0}))
    np.savez(workdir / "evaluate_rows.npz", nats=nats, tokens=tokens)
    told = {name: {"nats": 2.5 + len(name) / 100, "se": 0.1} for name in grid.DECODINGS}
    asked = []

    def run(command, check):
        asked.append(command)
        (workdir / "likelihoods.json").write_text(json.dumps({"decodings": told}))
        np.savez(workdir / "likelihoods.npz", tokens=tokens, **{name: nats for name in told})
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(grid.subprocess, "run", lambda command, **kw: run(command, kw) if "--mode=evaluate" in command
                        else type("Done", (), {"stdout": "abc"}))
    for _ in range(2):
        grid.make(grid.chosen(["mdlm"], 1)[0], 0, runs, out, 800, "")
    assert len(asked) == 1 and "max_prob steps=4,ancestral steps=4," in asked[0][-1]
    record, kept, *_ = grid.load("mdlm", out)[0]
    assert record["flops"] == 80 and record["likelihoods"] == told and (kept == nats).all()
    assert "2.660" in grid.likelihoods_table(out)  # of 'max_prob steps=4'


def test_a_record_says_that_its_code_was_changed(tmp_path, monkeypatch):
    git = lambda *asked: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *asked],  # noqa: E731
                                        cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    for folder in ("hdlm_jax", "docs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "one.py").write_text("1")
    assert cli.commit() == ""
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    (tmp_path / "docs" / "one.py").write_text("2")
    found = cli.commit()
    assert found and not found.endswith("-dirty")
    (tmp_path / "hdlm_jax" / "one.py").write_text("2")
    assert cli.commit() == found + "-dirty"
