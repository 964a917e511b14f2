"""Ladders of ratios, the signal before the symbols, told time (models.channel_times): bounds by integration, draws."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from test_channel import PARENTS, V, make, moved, run_config, tiny_config
from test_sampler import assert_law

from hdlm_jax.common import parallel
from hdlm_jax.config import ConfigError, GenerateConfig
from hdlm_jax.decoding import channel as decoding
from hdlm_jax.decoding.choose import Confidence
from hdlm_jax.decoding.sampler import exactness
from hdlm_jax.diffusion.draws import fold, wide
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.evaluation.elbo import Evaluator
from hdlm_jax.models import channel
from hdlm_jax.models.channel import ChannelProcess, Observed, State
from hdlm_jax.models.channel_times import TIMES, SignalFirst, TokenTimes
from hdlm_jax.training.state import build
from hdlm_jax.training.step import make_loss_sums
from tools import toy_channel as toy

PRIOR = np.array([0.5, 0.2, 0.2, 0.1])
LADDER = (4.0, 0.7)


def timed(case, times, c=1.0, levels=(), xi=1.0, width=3):
    """The process of test_channel with other times."""
    parent = make(case, c, width, xi)
    fields = {f.name: getattr(parent, f.name) for f in dataclasses.fields(parent)}
    return TIMES[times](**fields | {"levels": levels})


def moments_of(process):
    """(tau, dtau) [T], nodes of the integral over noise time, which know where s stops and where symbols start."""
    edges, (node, mass) = np.linspace(np.log(1e-5), np.log(40), 16), np.polynomial.legendre.leggauss(6)
    edges = np.sort(np.append(edges, np.log(process.tau_min)))[:, None]
    half = np.diff(edges, axis=0) / 2
    tau = np.exp((edges[:-1] + half + half * node).ravel())
    weight = (mass * half).ravel() * tau
    if type(process) is not SignalFirst:
        return tau, weight
    early = np.exp(-tau)  # of the symbols' time: t = (1 - e^-tau) / 2
    return np.concatenate([-np.log((1 + early) / 2), tau + math.log(2)]), np.concatenate(
        [weight * early / (1 + early), weight])


def integrated(process, prior):
    """(discrete, continuous) parts of the bound of one word whose network knows its prior alone: as of test_channel,
    also over the levels of a ladder and over the draws of its jumps."""
    words = oracle.Toy(PARENTS[f"K={process.num_levels}"], process.chain.rates, process.xi, V)
    tau, dtau = moments_of(process)
    heights, draws, climbed = [None], 1, np.ones((len(tau), 1))
    if type(process) is TokenTimes:
        heights, draws = process.heights, 12
        climbed = np.stack([oracle.level_beta(process.clock.rates, t) for t in tau])
    (eps, of_eps), (other, of_other) = (np.polynomial.hermite_e.hermegauss(n) for n in (24, draws))
    x, z, m, j, g = (a.reshape(-1) for a in np.meshgrid(
        np.arange(V), np.arange(V, words.N), np.arange(len(heights)), np.arange(24), np.arange(draws), indexing="ij"))
    s = np.stack([np.full(len(m), process.ratio(t, np)) if heights[0] is None else np.asarray(heights)[m] for t in tau])
    d = np.zeros(len(m)) if heights[0] is None else (-np.diff(np.asarray(heights), prepend=heights[0]))[m]
    e = np.asarray(process.signal)[:, 0]
    u, gain = s * e[x] + np.sqrt(s) * eps[j], d * e[x] + np.sqrt(d) * other[g]
    q = np.stack([words.q(t)[x, z] for t in np.asarray(process.symbol_time(tau, np)[0]).clip(max=45.0)])
    weight = dtau[:, None] * prior[x] * q * climbed[:, m] * (of_eps[j] / of_eps.sum() * of_other[g] / of_other.sum())

    @jax.jit
    def costs(u, s, tau):
        def at(one):
            u, s, tau = one
            state = State(jnp.asarray(z, jnp.int32)[None], u[None, :, None], s[None], jnp.asarray(gain)[None, :, None])
            own = jnp.asarray(x, jnp.int32)[None]
            logits = wide(np.log(prior).astype(np.float32), own) + channel.evidence(state.u, state.s, process.signal)
            p = Observed(logits, process.hierarchy, process.signal)
            rates = [process.nelbo_weight(state, tau[None]) * part(p, own, state, tau=tau[None])
                     for part in process.parts]
            return jnp.stack([*rates, process.nelbo_rate(p, own, state, tau[None])])[:, 0]

        return jax.lax.map(at, (u, s, tau))

    discrete, continuous, both = np.moveaxis(np.asarray(costs(*(jnp.asarray(a, jnp.float32) for a in (u, s, tau))),
                                                        np.float64), 1, 0)
    assert np.all(np.abs(both - discrete - continuous) <= 1e-5 * (1 + np.abs(discrete) + np.abs(continuous)))
    return (weight * discrete).sum(), (weight * continuous).sum()


@pytest.mark.parametrize("times, case, c, levels, xi", [
    ("shared", "K=2", 1.0, (2.0,), 1.0), ("token", "K=1", 1.0, LADDER, 1.0), ("token", "K=2", 0.5, LADDER, 0.8),
    pytest.param("token", "K=3", 2.0, (1.5,), 1.0, marks=pytest.mark.slow), ("before", "K=1", 0.3, (0.7,), 1.0),
    pytest.param("before", "K=2", 3.0, (0.7,), 0.8, marks=pytest.mark.slow), ("before", "K=3", 1.0, (2.0,), 1.0),
    ("before", "K=2", 1.0, (), 1.0)])
def test_the_sum_is_the_entropy_at_all_times(times, case, c, levels, xi):
    """Also where s stops at a floor of noise; with none the signal alone tells the word, before any symbol falls."""
    table = np.array([[-1.5], [-0.3], [0.5], [1.3]], np.float32)
    process = dataclasses.replace(timed(case, times, c, levels, xi, 1), signal=jnp.asarray(table))
    discrete, continuous = integrated(process, PRIOR)
    assert discrete + continuous == pytest.approx(oracle.entropy(PRIOR), abs=1e-3)
    if times == "before" and not levels:
        assert discrete == pytest.approx(0, abs=1e-6)
    else:
        assert discrete > 0.05 and continuous > 0.05


def test_bound_of_two_words_on_a_ladder_and_by_the_mean():
    """The mixture's sum is the entropy within 4.5 standard errors; the mean's is far above."""
    joint = oracle.random_joint(V, 2, seed=3)
    (_, _, both), (_, _, se) = toy.bound(timed("K=2", "token", 1.0, LADDER), joint, 20_000)
    assert both == pytest.approx(oracle.entropy(joint), abs=4.5 * se) and se < 0.04
    (_, _, both), (_, _, se) = toy.bound(toy.ladder((8.0,), toy.MeanJumps), joint, 2_000)
    assert both > oracle.entropy(joint) + 5 + 4.5 * se


@pytest.mark.parametrize("times, levels", [("token", LADDER), ("before", ()), ("before", (2.0,))])
@pytest.mark.parametrize("case", ["K=1", "K=3"])
def test_noise_times_expect_what_levels_and_ratios_leave(case, times, levels):
    """The rate that the proposal expects is the slope of E k R(s), of what is left of a token: K in all."""
    process = timed(case, times, 0.5, levels)
    k, a = np.arange(process.num_levels + 1), 0.5 * process.width / channel.NATS

    def left(tau):
        symbols = process.chain.beta(process.symbol_time(tau, np)[0], np) @ k
        if times == "token":
            return symbols * (process.clock.beta(tau, np) @ (1 / (1 + a * np.array([0.5 * s for s in levels] + [0]))))
        return symbols / (1 + a * process.ratio(tau, np))

    tau, h = np.array([0.02, 0.2, 0.6, 0.9, 1.5, 4.0]), 1e-6
    m, g = process.moments(tau)
    np.testing.assert_allclose(m, (left(tau + h) - left(tau - h)) / (2 * h), rtol=1e-5, atol=1e-9)
    assert np.all(g >= m**2 * 0.999) and left(np.array([60.0])) == pytest.approx(process.num_levels)
    proposal = process.proposal(4, 0.03)
    assert process.unfinished(proposal.knots[-1]) < 2e-9 and proposal.knots[-1] > 20


def test_ladder_has_the_law_of_its_clock_and_jumps_of_their_heights():
    """Shares of ratios and moments of u and of the next jump, 4.5 standard errors."""
    process, n = timed("K=1", "token", 2.0, LADDER), 40_000
    x, tau = jnp.ones((n // 8, 8), jnp.int32), jnp.full(n // 8, 0.9)
    state, level = jax.jit(process.noised)(jax.random.key(0), x, tau, jnp.ones(x.shape, bool))
    free = np.asarray(level) > 0
    s, u, gain, e = (np.asarray(a) for a in (state.s[free], state.u[free], state.gain[free], process.signal[1]))
    share = oracle.level_beta((1.0, 1.0), 0.9)
    for height, d, p in zip((8.0, 1.4, 0.0), (0.0, 6.6, 1.4), share, strict=True):
        here = np.isclose(s, height)
        assert here.mean() == pytest.approx(p, abs=4.5 * math.sqrt(p * (1 - p) / len(s)))
        for found, ratio in ((u[here], height), (gain[here], d)):
            noise = (found - ratio * e) / math.sqrt(ratio or 1)
            assert np.abs(noise.mean(0)).max() < 4.5 / math.sqrt(here.sum())
            assert noise.var() == pytest.approx(1.0 if ratio else 0.0, abs=4.5 * math.sqrt(2 / noise.size))


def test_signal_is_complete_before_a_symbol_falls():
    """s stays at its highest while symbols move, masks show before; a symbol's own time runs twice as fast in t."""
    process = timed("K=2", "before", 0.5, (2.0,))
    t = np.array([0.1, 0.3, 0.49, 0.51, 0.7, 0.9])
    tau = jnp.asarray(-np.log1p(-t), jnp.float32)
    theta, slope = jax.jit(process.symbol_time)(tau)
    np.testing.assert_allclose(theta[:3], -np.log1p(-2 * t[:3]), rtol=1e-4)
    near = [process.symbol_time(-np.log1p(-t[:2]) + h, np)[0] for h in (1e-4, -1e-4)]
    step = (near[0] - near[1]) / 2e-4
    np.testing.assert_allclose(slope[:2], step, rtol=1e-4)
    assert np.all(np.isinf(theta[3:])) and np.all(slope[3:] == 0)
    want = [1.0] * 3 + list(np.minimum(0.5 * (2 - 2 * t[3:]) / (2 * t[3:] - 1), 1.0))
    np.testing.assert_allclose(jax.jit(process.ratio)(tau), want, rtol=1e-4)
    state, level = jax.jit(process.noised)(jax.random.key(0), jnp.zeros((6, 50), jnp.int32), tau,
                                           jnp.ones((6, 50), bool))
    assert np.all(level[3:] == 2) and len(np.unique(level[0])) == 3
    t = (np.arange(500) + 0.5) / 500
    beta = process.chain.beta(process.symbol_time(-np.log1p(-t), np)[0], np)
    np.testing.assert_allclose(process.shares(), beta.mean(0), atol=2e-3)
    names = ("none", "clip", "constant")
    weight, *losses = jax.jit(lambda: (process.nelbo_weight(state, tau), *(
        process.loss_weight(state, tau, name, 0.0, 2.0) for name in names)))()
    own = np.asarray(weight) * np.exp(np.asarray(tau))[:, None]
    for name, loss in zip(names, losses, strict=True):
        want = {"none": own, "clip": own.clip(0, 2), "constant": np.ones_like(own)}[name]
        np.testing.assert_allclose(loss, np.where(np.asarray(level) > 0, want, 0), rtol=1e-6)


# ---- the way back ----------------------------------------------------------------------------------------------------


def write(process, joint, steps, rows=20_000, **how):
    denoise = toy.bayes(process, joint)
    run = jax.jit(lambda key, z: decoding.sample(key, denoise, process, z, steps=steps, tokens=8192, **how))
    words, stats = run(jax.random.key(2), jnp.full((rows, joint.ndim), process.mask_id, jnp.int32))
    return np.asarray(words), int(stats["calls"])


@pytest.mark.parametrize("times, case, levels, xi, steps", [
    ("token", "K=2", LADDER, 0.8, 3), ("before", "K=1", (4.0,), 1.0, 3), ("before", "K=3", (), 1.0, 4)])
def test_one_word_has_its_law_at_all_times_in_a_few_steps(times, case, levels, xi, steps):
    assert_law(write(timed(case, times, 1.0, levels, xi), PRIOR, steps)[0], PRIOR)


def test_one_jump_a_call_writes_the_data_and_by_the_mean_it_does_not():
    """The library's sampler and its twin in plain steps, at the sampling floor; by the mean ("predict x0") far off."""
    joint = oracle.random_joint(V, 2, seed=3)
    words, calls = write(timed("K=2", "token", 1.0, (8.0, 0.7)), joint, 0, singly=True)
    assert_law(words, joint)
    assert calls == 2 * (2 + 2)
    process = toy.ladder((8.0,))
    assert_law(toy.climbed(process, joint, 20_000, mean=False), joint)
    assert toy.distance(toy.climbed(process, joint, 20_000, mean=True), joint) > 0.1


@pytest.mark.parametrize("by, case, xi, seed", [
    ("top", "K=2", 0.8, 3), ("margin", "K=1", 1.0, 5), pytest.param("entropy", "K=2", 1.0, 4, marks=pytest.mark.slow)])
def test_an_order_by_what_is_on_show_writes_the_data(by, case, xi, seed):
    joint = oracle.random_joint(V, 2, seed=seed)
    words, calls = write(timed(case, "token", 1.0, (2.0, 0.7), xi), joint, 0, 40_000, score=Confidence(by))
    assert_law(words, joint)
    assert calls == 2 * (timed(case, "token", 1.0, LADDER).num_levels + 2)


P_OF_PLACES = np.array([[0.5, 0.17, 0.17, 0.16], [0.48, 0.48, 0.02, 0.02], [0.4, 0.299, 0.3, 0.001]])


@pytest.mark.parametrize("by, order", [("top", (0, 1, 2)), ("margin", (0, 2, 1)), ("entropy", (1, 2, 0))])
def test_the_surest_word_makes_its_own_next_event(by, order):
    """Of a predictor that says the same at every state: which token moves, how, when all is done, and the t told."""
    process, rows, seen = timed("K=1", "token", 0.5, LADDER), 4, []

    def denoise(state, t):
        jax.debug.callback(lambda *call: seen.append([np.asarray(a) for a in call]), state.z, state.s, t, ordered=True)
        logits = jnp.log(jnp.asarray(P_OF_PLACES, jnp.float32))[jnp.array([0, 1, 2, 0])]
        return Observed(jnp.broadcast_to(logits, (rows, 4, V)), process.hierarchy, process.signal)

    z = jnp.full((rows, 4), process.mask_id, jnp.int32).at[:, 3].set(2)
    keys = jax.random.split(jax.random.key(7), rows)
    words, stats = jax.jit(lambda keys: decoding.sample(keys, denoise, process, z, steps=0, score=Confidence(by)))(keys)
    jax.block_until_ready(words)
    jax.effects_barrier()
    falls = np.asarray(jax.vmap(lambda k: process.chain.crossing_times(k, (4,)))(fold(keys, 0)))[..., 0]
    jumps = np.asarray(process.jumps(fold(keys, 2), z.shape))
    assert int(stats["calls"]) == len(seen) == int(np.max(stats["row_forwards"]))
    for row in range(rows):
        m, level, plan = [2, 2, 2, 0], [1, 1, 1, 0], []
        for place in order:
            fall = falls[row, place]
            own = sorted([(t, "jump") for t in jumps[row, place] if t > fall] + [(fall, "fall")], reverse=True)
            plan += [(place, what) for _, what in own]
        assert int(stats["row_forwards"][row]) == len(plan)
        for call, (states, s, t) in enumerate(seen):
            assert [int(one == process.mask_id) for one in states[row]] == level
            want = [process.heights[m[i]] if level[i] else channel.KNOWN for i in range(4)]
            np.testing.assert_allclose(s[row], want, rtol=1e-6)
            left = sum((level[i] > 0) * (level[i] + m[i]) for i in range(3)) / 3
            assert float(t[row]) == pytest.approx(time_by_bisection(process, left), abs=2e-3)
            if call < len(plan):
                place, what = plan[call]
                (level if what == "fall" else m)[place] -= 1
        assert level == [0] * 4


def time_by_bisection(process, left):
    """t at which a token's levels to go and, while its word is not known, rungs to go, are `left` on average."""
    low, high = 0.0, 1.0
    for _ in range(40):
        t = (low + high) / 2
        symbols, rungs = (oracle.level_beta(rates, -math.log1p(-t)) for rates in (process.chain.rates,
                                                                                 process.clock.rates))
        mean = sum(a * b * (k + m) for k, a in enumerate(symbols) for m, b in enumerate(rungs) if k)
        low, high = (t, high) if mean < left else (low, t)
    return low


def test_events_that_change_nothing_take_no_call():
    """Of words that are given, above a given cluster, of a ratio once the word is known; by loops."""
    rng, top = np.random.default_rng(0), np.array([[0, 1, 2, 2]])
    times, jumps = (np.sort(rng.exponential(size=(1, 4, n)).astype(np.float32)) for n in (2, 3))
    own = [sorted([t for k, t in enumerate(times[0, i]) if k < top[0, i]]
                  + [t for t in jumps[0, i] if top[0, i] and t > times[0, i, 0]], reverse=True) for i in range(4)]
    for of_tokens, lines in ((True, own), (False, [sorted(sum(own, []), reverse=True)])):
        events, due = jax.jit(decoding.events_of, static_argnums=3)(times, jumps, top, of_tokens)
        assert due.tolist() == [sum(map(len, own))] and 0 < int(due[0]) < 4 * 5
        for found, want in zip(np.asarray(events[0]), lines, strict=True):
            np.testing.assert_array_equal(found, np.pad(want, (0, len(found) - len(want))))


def test_told_the_time_as_it_is_it_is_the_plain_sampler():
    """And told another, that is what the network sees, while what is on show stays."""
    process, seen = make("K=1", 0.5), []

    def denoise(state, t):
        shown = (state.z, state.s, state.s if state.told is None else state.told, t)
        jax.debug.callback(lambda *call: seen.append([np.asarray(a) for a in call]), *shown)
        return Observed(channel.evidence(state.u, state.s, process.signal), process.hierarchy, process.signal)

    z = jnp.full((50, 8), process.mask_id, jnp.int32)
    run = jax.jit(lambda told: decoding.sample(jax.random.key(0), denoise, process, z, steps=3, told=told)[0])
    plain, same = run(None), run(0.0)
    np.testing.assert_array_equal(plain, same)
    assert exactness(process, GenerateConfig()) == "exact"
    assert exactness(process, GenerateConfig(channel_told=0.8)) == "inexact: channel_told=0.8"
    jax.block_until_ready(run(0.8))
    jax.effects_barrier()
    plain, same, other = (sorted(seen[i : i + 3], key=lambda one: -one[3][0]) for i in (0, 3, 6))
    for call, (a, b, c) in enumerate(zip(plain, same, other, strict=True)):
        jax.tree.map(np.testing.assert_array_equal, a, b)
        t, free = 1 - 0.2 * call / 3, c[0] == process.mask_id
        np.testing.assert_allclose(c[3], t, rtol=1e-6)
        np.testing.assert_allclose(c[2][free], 0.5 * (1 - t) / t, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(c[2][~free], c[1][~free])
        np.testing.assert_allclose(c[1][free], 0.5 * call / (3 - call), rtol=1e-5)


def test_a_network_reads_what_it_is_told():
    config = tiny_config()
    net, _ = build(config, Hierarchy.from_parents([[0, 1, 2, 0, 1, 2, 0, 1]]))
    params = moved(net.init_params(jax.random.key(0), 4))
    state = State(jnp.full((1, 4), 11), jnp.ones((1, 4, 3)), jnp.full((1, 4), 0.2))
    hidden = jax.jit(lambda told: net.hidden(params, state._replace(told=told), jnp.array([0.3])))
    plain, same, other = (np.asarray(hidden(told)) for told in (None, state.s, 0.1 * state.s))
    np.testing.assert_array_equal(plain, same)
    assert np.abs(other - plain)[..., :16].max() > 1e-3
    np.testing.assert_array_equal(other[..., 16:], plain[..., 16:])  # the evidence


# ---- networks, runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times, levels", [("token", LADDER), pytest.param("before", (4.0,), marks=pytest.mark.slow)])
def test_networks_at_all_times(times, levels):
    """A network that knows nothing costs log V a token, by the evaluator; training's loss at the bound's own weights is
    the bound, and its slope that of differences."""
    config = tiny_config(diffusion__channel_times=times, diffusion__channel_levels=levels)
    net, process = build(config, Hierarchy.from_parents([[0, 1, 2, 0, 1, 2, 0, 1]]))
    assert type(process) is TIMES[times]
    params, mesh = net.init_params(jax.random.key(0), 4), parallel.make_mesh(config)
    x = np.random.default_rng(0).integers(0, 8, (64, 4)).astype(np.int32)
    rows = {"x": x, "segment": np.zeros_like(x), "score": np.ones_like(x, bool)}
    placed = jax.device_put(params, parallel.replicated(mesh))
    evaluator = Evaluator(net, process, mesh, placed, seq_len=4, seed=0, cv2=0.03, batch_size=2048)
    nats = evaluator.nats(placed, rows, 96)[0].sum(-1)
    se = nats.std() / math.sqrt(96 * 64) / 4
    assert nats.mean() / 4 == pytest.approx(math.log(8), abs=4.5 * se) and se < 0.05

    params, sums = moved(params), jax.jit(make_loss_sums(config, net, process))
    batch = {"x": jnp.asarray(x[:16]), "index": jnp.arange(16)}
    of = lambda h: sums({**params, "embedding": params["embedding"] + h}, batch, jax.random.key(0))[0]  # noqa: E731
    loss, bound, _ = sums(params, batch, jax.random.key(0))
    assert float(loss) == pytest.approx(float(bound), rel=1e-5)
    way = jax.random.normal(jax.random.key(3), params["embedding"].shape)
    slope = float(of(1e-3 * way) - of(-1e-3 * way)) / 2e-3
    assert float(jnp.sum(jax.jit(jax.grad(of))(jnp.zeros_like(way)) * way)) == pytest.approx(slope, rel=2e-2)


@pytest.mark.parametrize("changes, text", [
    (dict(diffusion__channel_times="own"), "diffusion.channel_times='own': "),
    (dict(diffusion__channel=0.0, diffusion__channel_times="before"), "diffusion.channel_times='before': goes with "),
    (dict(diffusion__channel=0.0, diffusion__channel_levels=(1.0,)), "diffusion.channel_levels=(1.0,): goes with "),
    (dict(diffusion__channel_times="token"), "diffusion.channel_levels=(): diffusion.channel_times='token' needs"),
    (dict(diffusion__channel_levels=(1.0, 2.0)), "diffusion.channel_levels=(1.0, 2.0): must be positive and fall"),
    (dict(diffusion__channel_levels=(2.0, 1.0)), "diffusion.channel_levels=(2.0, 1.0): "),
    (dict(diffusion__channel_times="before", generate__method="first_hitting"), "generate.method='first_hitting': "),
    (dict(diffusion__channel_times="before", generate__channel_told=0.5), "generate.channel_told=0.5: goes with "),
    (dict(diffusion__channel=0.0, generate__channel_told=0.5), "generate.channel_told=0.5: goes with "),
    (dict(generate__channel_told=1.0), "generate.channel_told=1.0: must lie in [0, 1)"),
    (dict(diffusion__channel_times="token", diffusion__channel_levels=LADDER, model__head="factorised"),
     "model.head='factorised': ")])
def test_what_does_not_go_together_is_refused_in_a_line(changes, text):
    with pytest.raises(ConfigError) as error:
        tiny_config(**changes)
    assert str(error.value).startswith(text) and "\n" not in str(error.value)


def test_a_ladder_says_what_it_needs():
    parent = make("K=1")
    for of, levels, text in ((TokenTimes, (), "levels=()"), (ChannelProcess, (1.0, 2.0), "must be positive and fall")):
        with pytest.raises(ValueError) as error:
            of(parent.hierarchy, parent.chain, levels=levels)
        assert text in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("times, levels, method, law", [
    ("token", LADDER, "first_hitting", "exact"), ("token", LADDER, "margin", "inexact: method=margin"),
    ("before", (4.0,), "ancestral", "exact")])
def test_runs_at_all_times(tmp_path, times, levels, method, law):
    """Trained, evaluated in both parts and written from."""
    from hdlm_jax.runs import evaluate, train
    from hdlm_jax.runs.generate import generate

    config = run_config(tmp_path, train__steps=2, diffusion__channel_times=times, diffusion__channel_levels=levels,
                        generate__method=method, generate__num_samples=2, generate__steps=4)
    run = str(tmp_path / "run")
    train.train(config, run)
    found = evaluate.evaluate(config, run)
    assert found["nelbo"] == pytest.approx(found["discrete"] + found["continuous"]) and found["continuous"] > 0
    wrote = generate(config, run)
    assert wrote["samples"] == 2 and wrote["law"] == law
