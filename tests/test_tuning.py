"""Rollouts and policy gradients: states from what was recorded, and gradients by enumeration of all trajectories."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sampler import MDLM, THREE, TWO, make

from hdlm_jax.config import ConfigError, GenerateConfig
from hdlm_jax.decoding import loop, presets
from hdlm_jax.tuning import record


def network_of(process, seed=0, scale=2.0):
    """z, t -> logits that depend on all states of a row (a function of nothing else, so that replayed states tell)."""
    table = scale * np.random.default_rng(seed).standard_normal((process.num_states, process.vocab_size))

    def denoise(z, t):
        near = jnp.asarray(table, jnp.float32)[z]
        return near + jnp.sum(jnp.roll(near, 1, axis=-1), axis=1, keepdims=True) + t[:, None, None]

    return denoise


@pytest.mark.parametrize("shape, method, options", [
    (MDLM, "max_prob", ""), (TWO, "ancestral", ""), (THREE, "first_hitting", "reveals=2"),
    *(pytest.param(*p, marks=pytest.mark.slow) for p in (
        (THREE, "max_prob", "straight=true"), (TWO, "ass", "draw=sample"), (THREE, "ancestral", ""),
        (MDLM, "first_hitting", ""),
        (TWO, "fast_dllm", "draw=sample threshold=.4 threshold_cluster=.4 block=2"), (THREE, "entropy", ""),
        (TWO, "any_order", ""), (TWO, "margin", "block=3")))])
def test_replay_rebuilds_every_frame(shape, method, options):
    """All states of the film from (x, fell), at K = 1, 2, 3; the times told, and the level of each drop."""
    rates = (1.0, 0.7, 1.5)[: len(shape["parents"]) + 1]
    toy, process = make(shape, rates)
    rows, length, bound = 6, 5, 5 * toy.K
    found = presets.make(method, options, 4)
    policy = dataclasses.replace(found.policy, choose=record.Recorded(found.policy.choose))
    start = np.full((rows, length), toy.mask, np.int32)
    start[1, 2], start[2] = 1, [0, toy.mask, 2, toy.mask, 1]  # given tokens

    @jax.jit
    def run(key, z):
        inner = loop.loop_of(network_of(process), process, policy, z.shape, presets.numbers(found),
                             loop.Sampling(frames=bound))
        _, s, _ = inner.run(*inner.begin(key, z))
        rollout = record.Rollout(s.z, s.memory["fell"], s.memory["told"], s.call)
        every = jax.vmap(lambda c: record.replay(process, rollout, c))(jnp.arange(bound))
        return rollout, every, inner.record(s).stats(s.film, s.call)

    rollout, every, film = jax.tree.map(np.asarray, run(jax.random.key(3), jnp.asarray(start)))
    assert (film["call"] == np.arange(bound + 1).clip(max=rollout.calls.max())).all()  # every = 1: a frame a call
    assert (rollout.fell[start != toy.mask] == -1).all() and (rollout.calls >= 1).all()
    for b, calls in enumerate(rollout.calls):
        np.testing.assert_array_equal(every.z[:calls, b], film["z"][b, :calls])
        np.testing.assert_array_equal(every.after[:calls, b], film["z"][b, 1 : calls + 1])
        np.testing.assert_allclose(every.t[:calls, b], film["time"][b, :calls], atol=1e-6)
        assert ((every.level > every.to)[:calls, b].sum(-1) > 0).all()


@pytest.mark.parametrize("method, options, more, words", [
    ("low_confidence", "", {}, "thrown-away draws"), ("rcr", "", {}, "takes written tokens back"),
    ("prophet", "draw=sample", {}, "drafts, commits"), ("fast_dllm", "", {}, "add draw=sample"),
    ("cfg", "", {}, "own distribution"), ("dual_cache", "draw=sample", {}, "keys and values"),
    ("ancestral", "", {"top_p": 0.9}, "generate.top_p=0.9"), ("ancestral", "", {"temperature": 0.0}, "temperature=0.0"),
    ("ancestral", "", {"length": 3}, "generate.length=3")])
def test_what_has_no_written_law_is_refused(method, options, more, words):
    g = GenerateConfig(method=method, options=options, **more)
    with pytest.raises(ConfigError, match=words) as found:
        record.check_law(make(TWO, (1.0, 1.0))[1], g)
    assert "\n" not in str(found.value)


def test_processes_without_a_written_law_are_refused():
    for process in (make(TWO, (1.0, 1.0), 0.8)[1], make(TWO, (1.0, 1.0), 1.0, "none")[1]):
        with pytest.raises(ConfigError, match="xi=1"):
            record.check_law(process, GenerateConfig())
