"""Sampling of a run: what is given stays, nothing but words comes out, calls are counted, samples are their own."""
import copy
import dataclasses

import numpy as np
import pytest
from tiny import LEVELS, SEQ_LEN, model

from hdlm_jax.config import ConfigError, Generate
from hdlm_jax.run.generate import _entropy, _static, prompt_canvas

GRID = Generate(steps=6, batch_size=8)


def masks(rows):
    return np.full((rows, SEQ_LEN), model().hierarchy.mask_id, np.int32)


@pytest.mark.parametrize("g, calls", [
    (GRID, 6),
    (Generate(plan="events", batch_size=8), SEQ_LEN * LEVELS),
    (Generate(plan="reveal", reveals=5, batch_size=8), -(-SEQ_LEN * LEVELS // 5)),
], ids=["grid", "events", "reveal"])
def test_plans_fill_all_with_words_and_count_calls(g, calls):
    canvas = masks(5)
    canvas[0] = np.arange(SEQ_LEN)  # given whole: nothing to do
    canvas[1, ::2] = 65
    out = model()._draw(canvas, g)
    assert out["tokens"].shape == (5, SEQ_LEN) and 0 <= out["tokens"].min() <= out["tokens"].max() < 257
    assert len(np.unique(out["tokens"][2:])) > 10
    np.testing.assert_array_equal(out["tokens"][0], np.arange(SEQ_LEN))
    np.testing.assert_array_equal(out["tokens"][1, ::2], 65)
    assert (out["calls"] == calls).all() and out["row_forwards"][0] == 0
    half = {"grid": out["row_forwards"][1], "events": calls // 2, "reveal": -(-SEQ_LEN * LEVELS // 10)}[g.plan]
    assert out["row_forwards"][1] == half and 1 <= half <= calls
    if g.plan != "grid":  # where every call has something to do
        assert (out["row_forwards"][2:] == calls).all()
    again = model()._draw(canvas, g)
    np.testing.assert_array_equal(out["tokens"], again["tokens"])


def test_calls_where_nothing_changes_are_skipped():
    canvas = masks(2)
    canvas[:, : SEQ_LEN - 1] = 65
    out = model()._draw(canvas, GRID)
    assert (out["calls"] <= 2 * LEVELS).all(), "two tokens drop twice each at most"
    assert (1 <= out["row_forwards"]).all() and (out["row_forwards"] <= LEVELS).all()
    canvas[:] = 65
    assert (model()._draw(canvas, GRID)["calls"] == 0).all()


def test_given_clusters_are_kept():
    h = model().hierarchy
    words = np.frombuffer(b"a sample of text", np.uint8).astype(np.int32)
    canvas = np.tile(h.symbol(1, h.anc[1][words]), (8, 1))
    tokens = model()._draw(canvas, GRID)["tokens"]
    np.testing.assert_array_equal(h.anc[1][tokens], np.tile(h.anc[1][words], (8, 1)))
    assert np.any(tokens != words)


def test_a_sample_does_not_depend_on_its_batch():
    canvas = masks(9)
    canvas[:, :3] = 70
    by_8 = model()._draw(canvas, GRID)["tokens"]  # 8 and 1
    at_once = model()._draw(canvas, dataclasses.replace(GRID, batch_size=16))["tokens"]
    np.testing.assert_array_equal(by_8, at_once)
    assert len({row.tobytes() for row in by_8}) == 9, "each with its own random numbers"
    other = model()._draw(canvas[:4], dataclasses.replace(GRID, seed=1))["tokens"]
    assert (other != by_8[:4]).any(axis=1).all()


def test_compiled_once_for_all_that_does_not_change_the_program():
    same = {"num_samples": 5, "prompt": "x", "batch_size": 3, "checkpoint": "latest", "seed": 4}
    other = {"steps": 7, "plan": "events", "reveals": 2, "temperature": 0.5, "top_p": 0.5, "clusters": "clean"}
    assert set(same) | set(other) == {f.name for f in dataclasses.fields(Generate)}
    assert _static(dataclasses.replace(GRID, **same)) == _static(GRID)
    for name, value in other.items():
        assert _static(dataclasses.replace(GRID, **{name: value})) != _static(GRID), name
    draw = model()._draw
    draw(masks(1), GRID)
    before = draw._step.cache_info()
    draw(masks(2), dataclasses.replace(GRID, seed=5))
    after = draw._step.cache_info()
    assert (after.misses, after.hits) == (before.misses, before.hits + 1)


def test_a_symbol_left_in_a_sample_is_an_error():
    draw = copy.copy(model()._draw)

    def leaves_a_cluster(params, batch, key):
        out = np.full(batch["z"].shape, 65)
        out[0, 3] = 257
        return {"tokens": out, "calls": out[:, 0], "row_forwards": out[:, 0]}

    draw._step = lambda g: leaves_a_cluster
    with pytest.raises(RuntimeError, match="cluster or mask symbol is left"):
        draw(masks(2), GRID)


def test_prompt_canvas():
    canvas = prompt_canvas(np.array([5, 6, 7]), 2, 5, 99)
    assert canvas.dtype == np.int32
    np.testing.assert_array_equal(canvas, [[5, 6, 7, 99, 99]] * 2)
    assert (prompt_canvas(np.zeros(0, np.int32), 1, 4, 99) == 99).all()
    with pytest.raises(ConfigError, match="generate.prompt has 5 tokens: must be fewer than model.seq_len=5"):
        prompt_canvas(np.arange(5), 2, 5, 99)


def test_entropy_of_samples():
    assert _entropy(np.array([[0, 0, 1, 1], [2, 2, 2, 2]])) == pytest.approx(np.log(2) / 2)
