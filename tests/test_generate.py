"""Sampling of a run: what is given stays, nothing but words comes out, calls are counted, samples are their own."""
import copy
import dataclasses

import numpy as np
import pytest
from tiny import LEVELS, SEQ_LEN, model

from hdlm_jax.config import ConfigError, GenerateConfig
from hdlm_jax.decoding.sampler import program_of, prompt_canvas

GRID = GenerateConfig(steps=6, batch_size=8)


def masks(rows):
    return np.full((rows, SEQ_LEN), model().hierarchy.mask_id, np.int32)


@pytest.mark.parametrize("g, calls", [
    (GRID, 6),
    (GenerateConfig(method="first_hitting", batch_size=8), SEQ_LEN * LEVELS),
    (GenerateConfig(method="first_hitting", options="reveals=5", batch_size=8), -(-SEQ_LEN * LEVELS // 5)),
    (GenerateConfig(method="max_prob", steps=7, batch_size=8), 7),
], ids=["grid", "events", "reveal", "by score"])
def test_plans_fill_all_with_words_and_count_calls(g, calls):
    canvas = masks(5)
    canvas[0] = np.arange(SEQ_LEN)  # given whole: nothing to do
    canvas[1, ::2] = 65
    out = model()._draw(canvas, g)
    assert out["tokens"].shape == (5, SEQ_LEN) and 0 <= out["tokens"].min() <= out["tokens"].max() < 257
    assert len(np.unique(out["tokens"][2:])) > 10
    np.testing.assert_array_equal(out["tokens"][0], np.arange(SEQ_LEN))
    np.testing.assert_array_equal(out["tokens"][1, ::2], 65)
    # one row on each of the 8 devices, and each of them stops for itself
    np.testing.assert_array_equal(out["calls"], out["row_forwards"])
    assert out["calls"].max() == calls and out["row_forwards"][0] == 0
    half = {GRID: out["row_forwards"][1], "": calls // 2, "reveals=5": -(-SEQ_LEN * LEVELS // 10)}[
        GRID if g.method in ("ancestral", "max_prob") else g.options]
    assert out["row_forwards"][1] == half and 1 <= half <= calls
    if g.method != "ancestral":  # where every call has something to do
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
    canvas = np.tile(h.state_id(1, h.anc[1][words]), (8, 1))
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
    same = {"num_samples": 5, "prompt": "x", "batch_size": 3, "checkpoint": "latest", "seed": 4, "steps": 7,
            "judge": "x", "schema": "x", "helper": "x", "judge_dtype": "bfloat16", "trajectories": 1, "corrections": 2,
            "correction_temperature": 0.5, "stop": "", "features": "x", "channel_told": 0.3}
    other = {"method": "first_hitting", "temperature": 0.5, "top_p": 0.5, "clusters": "clean", "length": 9,
             "force_transition": "none"}
    options = {"options": "steps=9"}  # thresholds and counts are inputs
    assert set(same) | set(other) | set(options) == {f.name for f in dataclasses.fields(GenerateConfig)}
    assert program_of(dataclasses.replace(GRID, **same)) == program_of(GRID)
    assert program_of(dataclasses.replace(GRID, **options)) == program_of(GRID)
    for name, value in other.items():
        assert program_of(dataclasses.replace(GRID, **{name: value})) != program_of(GRID), name
    for name, value in {"temperature": 0.9, "top_p": 0.9, "length": 12}.items():  # on or off is what matters
        changed = dataclasses.replace(GRID, **{name: value}), dataclasses.replace(GRID, **{name: other[name]})
        assert program_of(changed[0]) == program_of(changed[1]), name


def test_ten_settings_and_sizes_are_one_program():
    draw = model()._draw
    programs = lambda: draw._step(program_of(GRID))._cache_size()  # noqa: E731
    draw(masks(8), GRID)
    before, misses = programs(), draw._step.cache_info().misses
    for i in range(10):
        draw(masks(5 + i % 4), dataclasses.replace(GRID, steps=3 + i, seed=i))
    assert programs() == before and draw._step.cache_info().misses == misses
    warm = dataclasses.replace(GRID, length=9, temperature=0.7)
    draw(masks(8), warm)
    count = draw._step(program_of(warm))._cache_size()
    for length in range(10, 17):
        draw(prompt_canvas(np.zeros(0, np.int32), 8, SEQ_LEN, masks(1)[0, 0], length),
             dataclasses.replace(warm, length=length, temperature=0.1 * length))
    assert draw._step(program_of(warm))._cache_size() == count


def test_steps_and_temperature_given_at_run_time_count():
    draw = model()._draw
    few, many = (draw(masks(8), dataclasses.replace(GRID, steps=n)) for n in (2, 40))
    assert few["row_forwards"].max() <= 2 < many["row_forwards"].min()
    cold, hot = (draw(masks(8), dataclasses.replace(GRID, temperature=t))["tokens"] for t in (1e-9, 5.0))
    greedy = draw(masks(8), dataclasses.replace(GRID, temperature=0.0))["tokens"]
    # three steps of training leave near ties, which rounding decides
    assert (cold == greedy).mean() > 0.4 + (hot == greedy).mean()


def test_a_shorter_text_is_filled_alone():
    """What lies behind the text is not looked at, and the text is what a canvas of its own length gives."""
    draw, mask = model()._draw, masks(1)[0, 0]
    short = dataclasses.replace(GRID, length=11)
    canvas = prompt_canvas(np.array([70, 71]), 4, SEQ_LEN, mask, 11)
    assert canvas.shape == (4, 16) and (canvas[:, 11:] == 0).all() and (canvas[:, 2:11] == mask).all()
    other = canvas.copy()
    other[:, 11:] = 99
    first, second = draw(canvas, short)["tokens"], draw(other, short)["tokens"]
    np.testing.assert_array_equal(first[:, :11], second[:, :11])
    assert (first[:, :2] == [70, 71]).all()
    assert len(model().generate(2, steps=4, length=5)) == 2


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
    np.testing.assert_array_equal(prompt_canvas(np.array([5]), 1, 16, 99, 3), [[5, 99, 99, 0]])
    with pytest.raises(ConfigError, match="generate.prompt has 5 tokens: must be fewer than the 5 of a text"):
        prompt_canvas(np.arange(5), 2, 5, 99)
    with pytest.raises(ConfigError, match="generate.length=6: must be at most model.seq_len=5"):
        prompt_canvas(np.arange(3), 2, 5, 99, 6)
