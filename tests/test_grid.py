"""The grid of runs: which cells there are, what a cell keeps, differences paired over texts and seeds."""

import json

import numpy as np
import pytest

from hdlm_jax.config import recipe, resolve
from tools import grid


def test_every_cell_is_a_recipe_and_every_question_has_cells():
    names = [cell.name for cell in grid.CELLS]
    assert len(set(names)) == len(names)
    for cell in grid.CELLS:
        resolve(recipe("books", cell.recipe))
    for cells in grid.QUESTIONS.values():
        assert set(cells) <= set(names)
    with pytest.raises(ValueError, match="--cells=mdml: choose among ar, mdlm"):
        grid.chosen(["mdml"], 1)


def write(folder, cell, seed, nats, tokens):
    np.savez(folder / f"{cell}-s{seed}.npz", nats=nats, tokens=tokens)
    said = {"cell": cell, "seed": seed, "train_tokens_per_s": 1.0, "calls": [
        {"steps": 8, "judge": {"perplexity": 100.0 + seed, "unigram_entropy": 4.0, "distinct_2": 0.5}}],
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
    assert "101 / 4.00 / 0.50" in grid.calls_table(tmp_path)
    with pytest.raises(ValueError, match="other texts"):
        grid.difference(cell, [(base[0][0], base[0][1], tokens + 1)])
    assert grid.difference(cell[:1], base[1:]) is None
