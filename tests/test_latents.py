"""Latents in front of a text: the exact bound, its gradients and the way back by enumeration; runs that have them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny
from test_channel import tiny_config as channel_config
from test_sampler import assert_law

from hdlm_jax.common import parallel
from hdlm_jax.config import ConfigError, GenerateConfig, resolve
from hdlm_jax.decoding import latents as decoding
from hdlm_jax.decoding import loop, sampler
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.levels import LevelChain
from hdlm_jax.evaluation.elbo import Evaluator, stratified_pairs
from hdlm_jax.models import latents
from hdlm_jax.models.channel_times import symbols_last
from hdlm_jax.models.features import given
from hdlm_jax.models.latents import LatentProcess, LatentState, WithError
from hdlm_jax.models.network import Network
from hdlm_jax.runs.import_weights import check_exportable
from hdlm_jax.training.state import build
from hdlm_jax.training.step import make_loss_sums

V, D, G = 4, 4, 2  # words, numbers of a latent, its tokens
PARENTS = {"K=1": [], "K=2": [[0, 1, 0, 1]]}


def make(case, ratio, xi=1.0, seed=0):
    """The process with a random encoder, which is as good as any."""
    hierarchy = Hierarchy.from_parents(PARENTS[case], V)
    chain = LevelChain((1.0, 2.0)[: hierarchy.num_levels])
    encoder = latents.init_encoder(jax.random.key(seed), V, G, D)
    return LatentProcess(hierarchy, chain, xi, "cavity", G, D, ratio, encoder)


def log_shown(process):
    """[V, N] log of the chance that a word shows each state, given its level."""
    h, parts = process.hierarchy, [np.eye(V)]
    first = np.where(np.arange(h.sizes[1]) == np.asarray(h.anc[1])[:, None], process.xi, process.leak)
    parts += [first @ np.eye(h.sizes[k])[process.ancestors(1, k)] for k in range(1, h.num_levels + 1)]
    with np.errstate(divide="ignore"):
        return np.log(np.concatenate(parts, axis=1))


class Optimal:
    """The Bayes-optimal network of a joint law [V] * S: a posterior over all texts, given observations and symbols. It
    stands in a LatentNetwork's place for a sampler."""

    def __init__(self, process, joint):
        self.process, self.joint = process, joint
        texts = np.stack(np.unravel_index(np.arange(joint.size), joint.shape), axis=1)
        self.texts, self.shown = jnp.asarray(texts), jnp.asarray(log_shown(process), jnp.float32)
        self.e = latents.encode(process.encoder, self.texts, G)  # [texts, P, D]

    def log_texts(self, u, s):
        """[B, texts] log posterior, u [B, P, D], s [B], up to a number for each row."""
        told = jnp.einsum("bpd,mpd->bm", u, self.e, precision="highest")
        told -= 0.5 * s[:, None] * jnp.sum(self.e**2, (1, 2))[None]
        return told + jnp.log(jnp.asarray(self.joint.ravel(), jnp.float32))[None]

    def mean(self, u, s):
        """e^ [B, P, D] where all symbols are masks."""
        return jnp.einsum("bm,mpd->bpd", jax.nn.softmax(self.log_texts(u, s)), self.e, precision="highest")

    def logits(self, z, u, s):
        """[B, S, V]: a word's chance, given the other symbols and all observations."""
        of_words = self.shown[self.texts[None], z[:, None]]  # [B, texts, S]
        others = [jnp.sum(jnp.delete(of_words, i, axis=-1), -1) for i in range(z.shape[1])]
        without = self.log_texts(u, s)[..., None] + jnp.stack(others, axis=-1)
        own = jnp.where(self.texts[..., None] == jnp.arange(V).reshape(1, 1, V), 0.0, -jnp.inf)  # [texts, S, V]
        return jax.nn.logsumexp(without[..., None] + own[None], axis=1)

    @property
    def of_words(self):
        return self

    def read(self, params, state, t, segment):
        return state

    def estimate(self, params, state):
        return self.mean(state.u.reshape(len(state.z), -1, D), state.s[:, 0])

    def denoise(self, params, z, t, segment):
        told, s = params["features"]["given"], self.process.ratio_end
        u, places = told[..., :D] * math.sqrt((s + 1 / D) * (s + 1)), told.shape[1]
        return jnp.pad(self.logits(z[:, places:], u, jnp.full(len(z), s)), ((0, 0), (places, 0), (0, 0)))


# ---- the bound -------------------------------------------------------------------------------------------------------


def bound(process, joint, rows, seed=0):
    """Means and standard errors [3] of (discrete, continuous, sum), nats a text; one draw for each of `rows` texts."""
    rng, optimal = np.random.default_rng(seed), Optimal(process, joint)
    which = np.searchsorted(np.cumsum(joint.ravel())[:-1], rng.permutation((np.arange(rows) + 0.5) / rows))
    x = np.asarray(optimal.texts)[which]
    tau, q = stratified_pairs(process.proposal(joint.ndim, 0.03), seed, rows, 1)

    @jax.jit
    def rates(x, tau, key):
        state, level = process.noised(key, x, tau, jnp.ones(x.shape, bool))
        u, e = (a.reshape(len(x), -1, D) for a in (state.u, state.e))
        error = 0.5 * jnp.sum((e - optimal.mean(u, state.s[:, 0])) ** 2, -1)
        p = WithError(optimal.logits(state.z, u, state.s[:, 0]), process.hierarchy, jnp.repeat(error, G, axis=1))
        weight = process.nelbo_weight(state, tau)
        return jnp.stack([jnp.sum(jnp.where(level > 0, weight * part(p, x, state, tau=tau), 0.0), axis=-1)
                          for part in process.parts])

    parts = np.asarray(rates(jnp.asarray(x), jnp.asarray(tau[0], jnp.float32), jax.random.key(seed)), float) / q
    parts = np.concatenate([parts, parts.sum(0, keepdims=True)])
    return parts.mean(1), parts.std(1) / math.sqrt(rows)


def information(process, joint, rows=20_000):
    """I(text; U(s_max)) and its standard error, by log p(U | text) / p(U) of draws, in numpy."""
    rng, optimal, s = np.random.default_rng(5), Optimal(process, joint), process.ratio_end
    law, e = joint.ravel(), np.asarray(optimal.e, float).reshape(joint.size, -1)
    which = rng.choice(joint.size, rows, p=law)
    u = s * e[which] + math.sqrt(s) * rng.normal(size=(rows, e.shape[1]))
    log_p = u @ e.T - 0.5 * s * (e**2).sum(1)
    found = log_p[np.arange(rows), which] - np.log(np.exp(log_p - log_p.max(1, keepdims=True)) @ law) - log_p.max(1)
    return found.mean(), found.std() / math.sqrt(rows)


@pytest.mark.parametrize("case, ratio, length, xi", [("K=1", 0.5, 2, 1.0), ("K=2", 4.0, 2, 1.0), ("K=2", 0.5, 4, 0.8)])
def test_the_sum_is_the_entropy(case, ratio, length, xi):
    """One latent and two; the continuous part is what U tells of the text, the discrete one what it leaves. Within 4.5
    standard errors, which are below 2 % of the entropy."""
    process, joint = make(case, ratio, xi), oracle.random_joint(V, length, seed=3)
    mean, se = bound(process, joint, 80_000 // length)
    told, told_se = information(process, joint)
    whole = oracle.entropy(joint)
    assert mean[2] == pytest.approx(whole, abs=4.5 * se[2]) and se[2] < 0.02 * whole
    assert mean[1] == pytest.approx(told, abs=4.5 * math.hypot(se[1], told_se)) and told > 0.1 * whole
    assert mean[0] == pytest.approx(whole - told, abs=4.5 * math.hypot(se[0], told_se)) and mean[0] + 5 * se[0] < whole


def test_schedule():
    """s and its slope by differences; log(1 + s) grows evenly in t, from 0 at infinity to s_max at t = 1/2."""
    process, tau = make("K=2", 3.0), np.array([0.01, 0.5, 0.8, 1.5, 4.0, 20.0])
    slope = (process.ratio(tau - 1e-6, np) - process.ratio(tau + 1e-6, np)) / 2e-6
    np.testing.assert_allclose(process.gain(tau, np), slope, rtol=1e-5, atol=1e-12)
    t = -np.expm1(-tau)
    s = np.where(t < 0.5, 3.0, 4.0 ** (2 - 2 * t) - 1)
    np.testing.assert_allclose(process.ratio(jnp.asarray(tau, jnp.float32)), s, rtol=1e-5, atol=1e-7)
    assert process.ratio(jnp.inf) == 0 and process.gain(jnp.float32(200.0)) == 0


@pytest.mark.parametrize("case", PARENTS)
def test_noise_times_expect_the_whole_cost(case):
    """The rates that the proposal expects add up to a cross-entropy a level, whatever s_max."""
    for ratio in (0.1, 10.0):
        process = make(case, ratio)
        tau = np.sort(np.concatenate([np.geomspace(1e-12, 40, 20_001), np.log(2) + np.linspace(-1e-3, 1e-3, 9001)]))
        m, g = process.moments(tau)
        whole = np.sum((m[1:] + m[:-1]) / 2 * np.diff(tau))
        assert whole == pytest.approx(process.num_levels, rel=5e-3) and np.all(g >= m**2 * 0.999)


def test_a_latent_sees_its_own_tokens_alone_and_has_length_sqrt_d():
    process = make("K=1", 1.0)
    x = jnp.asarray([[0, 1, 2, 3], [0, 1, 3, 3], [1, 0, 2, 3]], jnp.int32)
    e = np.asarray(latents.encode(process.encoder, x, G))
    np.testing.assert_allclose(np.sum(e**2, -1), D, rtol=1e-5)
    np.testing.assert_array_equal(e[0, 0], e[1, 0])
    np.testing.assert_array_equal(e[0, 1], e[2, 1])
    assert np.abs(e[0, 1] - e[1, 1]).max() > 0.1 and np.abs(e[0, 0] - e[2, 0]).max() > 0.1  # in its tokens' order


def test_what_is_shown_and_scored():
    """Above t = 1/2 masks and a growing s, paid for at a group's first token, given or not; below it symbols behind
    U(s_max). U has the law N(s e, s), 4.5 standard errors."""
    process, rows = make("K=2", 3.0), 4000
    x = jnp.tile(jnp.asarray([[0, 1, 2, 3]], jnp.int32), (rows, 1))
    score = jnp.tile(jnp.asarray([[False, True, True, True]]), (rows, 1))
    noised = jax.jit(lambda x, tau: process.noised(jax.random.key(0), x, tau, score))
    for t, s in ((0.7, 4**0.6 - 1), (0.3, 3.0)):
        tau = jnp.full(rows, -math.log1p(-t), jnp.float32)
        state, level = noised(x, tau)
        np.testing.assert_allclose(state.s, s, rtol=1e-5)
        eps = np.asarray((state.u - s * state.e) / math.sqrt(s), float).reshape(-1)
        assert abs(eps.mean()) < 4.5 / math.sqrt(eps.size) and abs(eps.var() - 1) < 4.5 * math.sqrt(2 / eps.size)
        shown = np.asarray(process.level_of(state.z))
        assert np.all(shown[:, 0] == 0)
        if t > 0.5:
            assert np.all(shown[:, 1:] == 2) and np.all(np.asarray(level) == [2, 0, 2, 0])
        else:
            np.testing.assert_array_equal(level, shown)
            shares = np.asarray(process.chain.beta(-np.log1p(-0.6), np))
            found = np.bincount(shown[:, 1:].ravel(), minlength=3) / (3 * rows)
            assert np.all(np.abs(found - shares) < 4.5 * np.sqrt(shares * (1 - shares) / (3 * rows)))
            want = process.symbols.nelbo_weight(state.z, jnp.full(rows, -math.log1p(-0.6))) * 2 * 0.7 / 0.4
            np.testing.assert_allclose(process.nelbo_weight(state, tau), want, rtol=1e-4)
    np.testing.assert_allclose(process.shares(), 0.5 * process.symbols.shares() + [0.25, 0, 0.25], atol=1e-12)


# ---- gradients -------------------------------------------------------------------------------------------------------


def test_slopes_of_the_encoder_are_those_of_the_bound():
    """Against differences in float64, at fixed noise, by a smooth network: through e, and through U in both halves."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        process = make("K=2", 2.0)
        x = jnp.asarray(rng.integers(0, V, (64, 4)))
        tau, score = -jnp.log1p(-(jnp.arange(64) + 0.5) / 64), jnp.ones(x.shape, bool)
        a, b = jnp.asarray(rng.normal(size=(D, D))), jnp.asarray(rng.normal(size=(D // G, V)))

        @jax.jit
        def loss(encoder):
            made = process.with_params({"encoder": encoder})
            state, level = made.noised(jax.random.key(1), x, tau, score)
            u, e = (v.reshape(64, 2, D) for v in (state.u, state.e))
            error = jnp.repeat(0.5 * jnp.sum((e - jnp.tanh(u @ a)) ** 2, -1), G, axis=1)
            p = WithError(jnp.sin(state.u @ b), made.hierarchy, error)
            weight = made.nelbo_weight(state, tau)
            return jnp.stack([jnp.sum(jnp.where(level > 0, weight * part(p, x, state, tau=tau), 0.0))
                              for part in made.parts])

        encoder = jax.tree.map(lambda v: v.astype(jnp.float64), process.encoder)
        way = jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape)), encoder)
        moved = lambda h: jax.tree.map(lambda v, w: v + h * w, encoder, way)  # noqa: E731
        grads = jax.tree.leaves(jax.jit(jax.jacrev(loss))(encoder))
        for half, slope in enumerate((loss(moved(1e-5)) - loss(moved(-1e-5))) / 2e-5):
            along = sum(jnp.sum(g[half] * w) for g, w in zip(grads, jax.tree.leaves(way), strict=True))
            assert abs(float(slope)) > 1 and float(along) == pytest.approx(float(slope), rel=1e-6)


# ---- networks --------------------------------------------------------------------------------------------------------


def tiny_config(clusters=(3,), **changes):
    return channel_config(clusters, **dict(diffusion__channel=0.0, diffusion__latents=2, diffusion__latents_width=4) |
                          changes)


@pytest.fixture(scope="module")
def network():
    """(config, network, process, parameters), 8 words in 3 clusters, two latents of four tokens."""
    config = tiny_config()
    net, process = build(config, Hierarchy.from_parents([[0, 1, 2, 0, 1, 2, 0, 1]]))
    return config, net, process, net.init_params(jax.random.key(0), 4)


def test_a_network_that_knows_nothing_costs_its_formula(network):
    """P D s_max / 2 and S log V, by the evaluator; the columns are the levels and the latents. A token that is given
    takes log V off, and nothing of the latents."""
    config, net, process, params = network
    mesh = parallel.make_mesh(config)
    x = np.random.default_rng(0).integers(0, 8, (64, 4)).astype(np.int32)
    score = np.ones_like(x, bool)
    score[:, 0] = False
    params = jax.device_put(params, parallel.replicated(mesh))
    evaluator = Evaluator(net, process, mesh, params, seq_len=4, seed=0, cv2=0.03, batch_size=2048)
    nats = evaluator.nats(params, {"x": x, "segment": np.zeros_like(x), "score": score}, 96)[0]
    assert nats.shape == (96, 64, 3) and np.all(nats >= 0)
    nats = np.stack([nats[..., :2].sum(-1), nats[..., 2]]).reshape(2, -1)
    se = nats.std(1) / math.sqrt(nats.shape[1])
    assert nats.mean(1) == pytest.approx([3 * math.log(8), 2 * 4 * 1.0 / 2], abs=4.5 * se.max())
    assert np.all(se < 0.04 * nats.mean(1))


def moved(params, scale=0.1):
    """Parameters off their start, which is zero in many places."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    return jax.tree.unflatten(tree, [a + scale * jax.random.normal(k, a.shape)
                                     for a, k in zip(leaves, keys, strict=True)])


def test_training_estimates_the_bound_and_has_its_gradients(network):
    """The loss is the bound; its slopes are those of differences, of the encoder and of what reads and says latents."""
    config, net, process, params = network
    params = moved(params)
    batch = {"x": jnp.asarray(np.random.default_rng(1).integers(0, 8, (16, 4)), jnp.int32), "index": jnp.arange(16)}
    sums = jax.jit(make_loss_sums(config, net, process))
    loss, bound, tokens = sums(params, batch, jax.random.key(0))
    assert float(loss) == pytest.approx(float(bound), rel=1e-5) and tokens == 64
    grad = jax.jit(jax.grad(lambda p: sums(p, batch, jax.random.key(0))[0]))(params)
    for name in ("encoder", "features", "head"):
        way = jax.tree.map(lambda a: jax.random.normal(jax.random.key(a.size), a.shape), params[name])
        put = lambda h: params | {name: jax.tree.map(lambda a, w: a + h * w, params[name], way)}  # noqa: B023, E731
        slope = (sums(put(1e-3), batch, jax.random.key(0))[0] - sums(put(-1e-3), batch, jax.random.key(0))[0]) / 2e-3
        along = sum(jnp.sum(a * b) for a, b in zip(jax.tree.leaves(grad[name]), jax.tree.leaves(way), strict=True))
        assert float(along) == pytest.approx(float(slope), rel=1e-2), name
    assert np.abs(np.asarray(grad["encoder"]["table"])).max() > 1e-3


def test_latents_and_tokens_see_each_other_and_hidden_padding_sees_nobody(network):
    _, net, process, params = network
    params, x = moved(params), jnp.asarray([[1, 2, 3, 4]], jnp.int32)
    tau = jnp.full(1, 0.4)
    state, _ = process.with_params(params).noised(jax.random.key(0), x, tau, jnp.zeros(x.shape, bool))
    other = state._replace(u=state.u.at[:, 3].add(1.0))  # of the second latent
    at = jax.jit(lambda state, segment: net.read(params, state, -jnp.expm1(-tau), segment))
    whole, padded = jnp.zeros(x.shape, jnp.int32), jnp.asarray([[0, 0, 0, -1]])
    assert np.all(np.abs(np.asarray(at(state, whole) - at(other, whole))).max(-1) > 1e-5)
    shown = state._replace(z=state.z.at[:, 3].set(7))  # a word that is hidden padding
    apart = np.abs(np.asarray(at(state, padded) - at(shown, padded))).max(-1)
    assert np.all(apart[:, :5] == 0) and np.all(apart[:, 5] > 1e-5)
    # as a sampler asks: the network of words behind features, at the symbols' own time
    seen = given(params, latents.told_of(state, 2))
    t = -jnp.expm1(-symbols_last(tau)[0])
    canvas = jnp.concatenate([jnp.zeros((1, 2), jnp.int32), state.z], axis=1)
    np.testing.assert_allclose(net.of_words.hidden(seen, canvas, t), at(state, whole), rtol=1e-4, atol=1e-5)
    own = net.hidden(params, state, -jnp.expm1(-tau))[..., :-1]
    np.testing.assert_allclose(own, at(state, whole)[:, 2:], rtol=1e-4, atol=1e-5)


def test_without_latents_nothing_is_another(network):
    """The parent's classes and parameters, bit for bit; latents add their own."""
    hierarchy = network[1].head.hierarchy
    net, process = build(tiny_config(diffusion__latents=0), hierarchy)
    assert type(net) is Network and type(process) is HierarchicalProcess
    own, ours = net.init_params(jax.random.key(0), 4), network[3]
    assert set(ours) - set(own) == {"encoder", "features"} and set(ours["head"]) - set(own["head"]) == {"mean"}
    shared = {name: ours[name] for name in own} | {"head": {name: ours["head"][name] for name in own["head"]}}
    jax.tree.map(np.testing.assert_array_equal, shared, own)


# ---- the way back ----------------------------------------------------------------------------------------------------


def write(process, joint, steps, rows=20_000, prompt=()):
    """Words [rows, S] by the sampler of runs: latents in `steps` calls, symbols one a call."""
    g = GenerateConfig(method="first_hitting", steps=steps)
    z = jnp.full((rows, joint.ndim), process.mask_id, jnp.int32)
    z = z.at[:, : len(prompt)].set(jnp.asarray(prompt, jnp.int32).reshape(1, -1))

    @jax.jit
    def run(keys, z):
        how = loop.Sampling(temperature=1.0, top_p=1.0)
        call = sampler.Call(Optimal(process, joint), {}, sampler.program_of(g), sampler.numbers_of(g, joint.ndim), {},
                            joint.ndim, None, how)
        return sampler.sample_canvas(process, keys, z, call)

    words, stats = run(jax.random.split(jax.random.key(2), rows), z)
    free = joint.ndim - len(prompt)
    assert words.shape == z.shape and np.all(np.asarray(stats["row_forwards"]) == steps + free * process.num_levels)
    return np.asarray(words)


@pytest.mark.parametrize("case", [pytest.param("K=1", marks=pytest.mark.slow), "K=2"])
def test_many_steps_write_the_joint_and_few_do_not(case):
    """The mean kernel is right in the limit alone."""
    process, joint = make(case, 8.0), oracle.random_joint(V, 2, seed=3)
    assert_law(write(process, joint, 96), joint)
    counts = np.bincount(write(process, joint, 1) @ [V, 1], minlength=V * V)
    far, floor, spread = oracle.total_variation(counts, joint)
    assert far > floor + 20 * spread


def test_given_words_stay():
    process = make("K=1", 0.5)
    words = write(process, oracle.random_joint(V, 2, seed=3), 2, 100, prompt=(2,))
    assert np.all(words[:, 0] == 2) and words.max() < V


def test_a_batch_without_masks_costs_no_call():
    process = make("K=1", 0.5)
    state, calls = decoding.sample(jax.random.key(0), lambda state, t: state.u, process, jnp.zeros((2, 4), jnp.int32),
                                   steps=3)
    assert int(calls) == 0 and np.all(np.asarray(state.u) == 0)


def test_the_network_is_told_the_time_of_what_it_sees():
    """s(t) at every call, from nothing; a row's law does not depend on its batch mates."""
    process, seen = make("K=1", 3.0), []

    def estimate(state, t):
        jax.debug.callback(lambda *call: seen.append([np.asarray(a) for a in call]), state.s, state.u, t)
        return jnp.zeros((len(t), 2, D))

    z = jnp.full((2, 4), process.mask_id, jnp.int32)
    keys = jax.random.split(jax.random.key(0), 2)
    state, _ = jax.jit(lambda z: decoding.sample(keys, estimate, process, z, steps=4))(z)
    jax.effects_barrier()
    seen.sort(key=lambda call: -call[2][0])
    np.testing.assert_allclose([call[2][0] for call in seen], [1, 0.875, 0.75, 0.625], rtol=1e-6)
    for s, _, t in seen:
        want = process.ratio(-np.log(np.maximum(1 - t[0], 1e-30)), np)
        np.testing.assert_allclose(s[0, 0], want, rtol=1e-5, atol=1e-6)
    assert np.all(seen[0][1] == 0) and np.all(np.asarray(state.s) == 3.0)
    alone = decoding.sample(keys[1:], lambda state, t: jnp.zeros((len(t), 2, D)), process, z[1:], steps=4)[0]
    np.testing.assert_allclose(alone.u[0], state.u[1], rtol=1e-5, atol=1e-6)


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("clusters, method", [((8,), "ancestral"), ((1,), "max_prob")])
def test_runs_have_latents(tmp_path, clusters, method):
    """Trained by Muon, evaluated in both parts, exported, and written from."""
    import hdlm_jax
    from hdlm_jax.runs import evaluate, export, train
    from hdlm_jax.runs.generate import generate

    values, run = tiny.read_recipe(tiny.write_recipe(tmp_path)).as_dict(), str(tmp_path / "run")
    for name, value in dict(diffusion__latents=4, diffusion__latents_width=8, diffusion__weighting="none",
                            hierarchy__clusters=clusters, optimizer__name="muon", train__steps=4,
                            generate__method=method, generate__trajectories=2).items():
        section, _, key = name.partition("__")
        values[section] = values[section] | {key: value}
    config = resolve(values)
    state = train.train(config, run)
    start = build(config, Hierarchy.from_parents([], 257))[0].init_params(jax.random.key(0), 16)["encoder"]
    assert all(np.abs(np.asarray(a)).max() > 0 for a in jax.tree.leaves(state.params["encoder"]))
    assert jax.tree.map(np.shape, start) == jax.tree.map(np.shape, state.params["encoder"])
    found = evaluate.evaluate(config, run)
    assert found["nelbo"] == pytest.approx(found["discrete"] + found["continuous"]) and found["continuous"] > 0
    written = generate(config, run)
    assert written["law"].startswith("inexact: ") and "latents move by the mean" in written["law"]
    export.export(dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, checkpoint="latest")), run)
    taken = hdlm_jax.load(str(tmp_path / "run" / "export"))
    assert len(taken.generate(num_samples=1, steps=2)) == 1


@pytest.mark.parametrize("changes, text", [
    (dict(diffusion__latents=3), "diffusion.latents=3: must divide the model.seq_len=4 "),
    (dict(diffusion__latents=-1), "diffusion.latents=-1: must not be negative"),
    (dict(diffusion__latents_width=5), "diffusion.latents_width=5: must be a multiple of the 2 tokens of a latent"),
    (dict(diffusion__latents_ratio=0.0), "diffusion.latents_ratio=0.0: must be positive"),
    (dict(diffusion__weighting="clip"), "diffusion.weighting='clip': diffusion.latents=2 is for 'none' alone"),
    (dict(diffusion__channel=0.1), "diffusion.channel=0.1: diffusion.latents=2"),
    (dict(diffusion__hard_training=True), "diffusion.hard_training=True: "),
    (dict(hierarchy__map="learned", diffusion__xi=0.9, train__objective="paired"), "hierarchy.map='learned': "),
    (dict(model__head="factorised"), "model.head='factorised': "),
    (dict(model__block=1, model__time_conditioning=False), "model.block=1: "),
    (dict(model__trunk="decoder", model__time_conditioning=False), "model.trunk='decoder': "),
    (dict(train__objective="count"), "train.objective='count': "),
    (dict(train__draft_share=0.5), "train.draft_share=0.5: "),
    (dict(data__packing="documents"), "data.packing='documents': "),
    (dict(generate__method="fast_dllm"), "generate.method='fast_dllm': diffusion.latents=2 is for ancestral, "),
    (dict(generate__length=2), "generate.length=2: "),
    (dict(evaluate__decodings=("max_prob",)), "evaluate.decodings=('max_prob',): ")])
def test_what_is_not_built_is_refused_in_a_line(changes, text):
    with pytest.raises(ConfigError) as error:
        tiny_config(**changes)
    assert str(error.value).startswith(text) and "\n" not in str(error.value)


def test_published_layouts_have_no_place_for_them():
    with pytest.raises(ConfigError, match="released.layout: this run has diffusion.latents=2"):
        check_exportable(tiny_config())


def test_a_process_says_what_it_needs():
    process, network = make("K=1", 1.0), Optimal
    with pytest.raises(ValueError, match="ratio_end=0.0"):
        dataclasses.replace(process, ratio_end=0.0)
    state = LatentState(jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 4, 2)), jnp.zeros((1, 4)))
    with pytest.raises(ValueError, match="weighting='clip'"):
        process.loss_weight(state, jnp.ones(1), "clip")
    with pytest.raises(ValueError, match="hard_training"):
        process.token_loss(network, state.z, state, None, True, tau=jnp.ones(1))
