"""Recorded sampling: the same tokens, every state on the way, and how likely each drop was."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from test_sampler import MDLM, THREE, TWO, denoiser, make, planned
from tiny import LEVELS, SEQ_LEN, model, read_recipe, trained

from hdlm_jax.config import GenerateConfig
from hdlm_jax.decoding import choose, loop
from hdlm_jax.decoding.policy import Policy
from hdlm_jax.decoding.statistics import probability_of
from hdlm_jax.runs import generate


@pytest.mark.parametrize("shape, xi, force, clusters", [
    (MDLM, 1.0, "none", "exact"),
    pytest.param(TWO, 1.0, "cavity", "exact", marks=pytest.mark.slow),
    (TWO, 0.8, "between", "exact"),
    pytest.param(THREE, 1.0, "none", "exact", marks=pytest.mark.slow),  # an unforced word may lie off the node on show
    (THREE, 0.8, "none", "exact"),
    (THREE, 0.8, "cavity", "clean"),
])
def test_probability_of_a_drop_is_the_posterior_s(shape, xi, force, clusters):
    """For every pair of a symbol and one below it: the dense reverse kernel, divided by the law of its level."""
    rates = (1.0, 0.7, 1.5)[: len(shape["parents"]) + 1]
    toy, process = make(shape, rates, xi, force)
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 1.5, (1, toy.N, toy.V)), jnp.float32)
    z, new = (a.astype(jnp.int32) for a in np.meshgrid(np.arange(toy.N), np.arange(toy.N)))  # new in rows
    law = np.asarray(process.chain.posterior(0.6, 1.1))[toy.level[z], toy.level[new]]
    kernel = np.asarray(process.posterior(logits, z[:1], 0.6, 1.1, clusters))[0].T
    ask = jax.jit(lambda z, new: probability_of(process, jnp.tile(logits, (toy.N, 1, 1)), z, new, clusters))
    found = np.asarray(ask(z, new))
    falls = toy.level[z] > toy.level[new]
    assert (found[~falls] == 0).all() and found.dtype == np.float32
    falls &= kernel > 0  # what can be drawn
    assert falls.sum() >= toy.V
    np.testing.assert_allclose(found[falls], kernel[falls] / law[falls], rtol=2e-5)


class Stopped(choose.Planned):
    """Stops after numbers["until"] calls."""

    def bound(self, numbers, positions, levels):
        return numbers["until"]


@pytest.mark.parametrize("kind, steps, frames", [
    ("grid", 9, 4), *(pytest.param(*p, marks=pytest.mark.slow) for p in (("events", 1, 30), ("reveal", 1, 3)))])
def test_frames_are_the_states_of_the_loop(kind, steps, frames):
    """Against the loop stopped after so many calls, and each drop's probability from the state before it."""
    toy, process = make(TWO, (2.0, 1.0), 0.8)
    network = toy.random_network(3, seed=20)
    start = np.random.default_rng(2).integers(0, toy.N, (5, 3))
    start[0] = toy.mask
    start = jnp.asarray(start, jnp.int32)
    denoise = denoiser(toy, network)
    run = functools.partial(loop.sample, jax.random.key(7), denoise, process, start, policy=planned(kind),
                            numbers=dict(steps=steps, reveals=2))
    plain, stats = jax.jit(run)()
    words, film = jax.jit(functools.partial(run, how=loop.Sampling(frames=frames, rows=2, tokens=4)))()
    np.testing.assert_array_equal(words, plain)
    np.testing.assert_array_equal(film["row_forwards"], stats["row_forwards"])

    calls = int(stats["calls"])
    bound = min(steps, 6) if kind == "grid" else 6 if kind == "events" else 3
    every = -(-bound // frames)
    used = -(-calls // every) + 1
    call = np.asarray(film["call"])
    assert call[:used].tolist() == [min(i * every, calls) for i in range(used)] and (call[used:] == calls).all()
    assert film["z"].shape == film["confidence"].shape == (5, frames + 1, 3) and film["time"].shape == (5, frames + 1)
    numbers = dict(steps=steps, reveals=2)
    until = jax.jit(lambda calls: run(policy=Policy(Stopped(kind)), numbers=numbers | {"until": calls})[0])
    states = np.stack([until(jnp.int32(c)) for c in range(calls + 1)], 1)
    np.testing.assert_array_equal(film["z"][:, :used], states[:, call[:used]])
    np.testing.assert_array_equal(states[:, -1], plain)

    sure, expect = np.zeros((5, 3), np.float32), [np.zeros((5, 3), np.float32)]
    ask = jax.jit(lambda z, new: probability_of(process, denoise(z, jnp.zeros(5)), z, new))
    for before, after in zip(np.moveaxis(states, 1, 0)[:-1], np.moveaxis(states, 1, 0)[1:], strict=True):
        law = ask(before, after)
        sure = np.where(before != after, law, sure)
        expect.append(sure)
    np.testing.assert_allclose(film["confidence"][:, :used], np.stack(expect, 1)[:, call[:used]], rtol=1e-5)
    assert (film["confidence"][0, used - 1] > 0).all()
    time = np.asarray(film["time"])[:, :used]
    assert (time[:, -1] == 0).all() and (np.diff(time, axis=1) <= 0).all()
    if kind == "grid":  # a row's next call is the first at which something of it drops
        assert np.isin(np.round(time * steps, 4), np.arange(steps + 1)).all() and (time[0, 1:] <= 1 - 1 / steps).all()


@pytest.mark.slow
def test_an_oracle_s_confidence_is_the_data_s():
    """Bayes-optimal, one drop a call: the product over a sample of its drops' probabilities is its own."""
    toy, process = make(TWO, (1.0, 1.0))
    joint = oracle.random_joint(4, 2, seed=19)
    start = jnp.full((200, 2), toy.mask)
    run = functools.partial(loop.sample, jax.random.key(2), denoiser(toy, toy.bayes(joint, cavity=True)), process)
    words, film = jax.jit(functools.partial(run, policy=planned("events"), how=loop.Sampling(frames=4)))(start)
    z, sure = np.asarray(film["z"]), np.asarray(film["confidence"])
    changed = np.diff(z, axis=1) != 0
    assert (changed.sum((1, 2)) == 4).all()
    np.testing.assert_allclose(np.where(changed, sure[:, 1:], 1).prod((1, 2)), joint[tuple(np.asarray(words).T)],
                               rtol=1e-4)


@pytest.mark.slow
def test_recorded_tokens_are_the_unrecorded_ones():
    g = GenerateConfig(method="first_hitting", options="reveals=3", temperature=0.7)
    canvas = np.full((3, SEQ_LEN), model().hierarchy.mask_id, np.int32)
    canvas[:, :4] = 65
    plain, film = model()._draw(canvas, g), model()._draw(canvas, g, generate.FRAMES)
    np.testing.assert_array_equal(plain["tokens"], film["tokens"])
    last = np.flatnonzero(film["call"][0] == film["call"][0, -1])[0]
    np.testing.assert_array_equal(film["z"][:, last], plain["tokens"])
    np.testing.assert_array_equal(film["z"][:, 0], canvas)
    assert (film["confidence"][:, last, :4] == 0).all() and (film["confidence"][:, last, 4:] > 0).all()


def test_generate_keeps_trajectories(tmp_path):
    recipe, workdir = trained()[0], shutil.copytree(trained()[1], tmp_path / "run")
    config = read_recipe(recipe)

    def make(**settings):
        generate.generate(dataclasses.replace(config, generate=dataclasses.replace(config.generate, **settings)),
                          str(workdir))

    make(trajectories=2, prompt="ab")
    with np.load(workdir / "trajectories.npz") as found:
        film, about = {k: found[k] for k in found.files if k != "about"}, json.loads(str(found["about"]))
    ids = [json.loads(line)["ids"] for line in (workdir / "samples.jsonl").read_text().splitlines()]
    frames = len(film["call"])
    assert film["call"][0] == 0 and film["call"].dtype == np.int32 and 2 <= frames <= 7
    assert film["z"].shape == film["confidence"].shape == (2, frames, SEQ_LEN) and film["z"].dtype == np.int32
    assert film["confidence"].dtype == np.float32 and film["time"].shape == (2, frames)
    np.testing.assert_array_equal(film["z"][:, -1], ids[:2])
    assert (film["z"][:, :-1] != film["z"][:, -1:]).any((0, 2)).all(), "cut where all is written"
    assert about["prompt_tokens"] == 2 and about["settings"]["trajectories"] == 2 and about["step"] == 3
    level = model().hierarchy.level_of(film["z"])
    assert (np.diff(level, axis=1) <= 0).all() and level.max() == LEVELS and (level[:, 0, 2:] == LEVELS).all()
    make(trajectories=0)
    assert not (workdir / "trajectories.npz").exists(), "those were of other samples"
