"""The continuous channel: evidence, the exact bound and the way back by enumeration; runs that carry it."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny
from test_sampler import assert_law

from hdlm_jax.common import parallel
from hdlm_jax.config import Config, ConfigError, resolve
from hdlm_jax.decoding import channel as decoding
from hdlm_jax.diffusion.draws import wide
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.levels import LevelChain, Proposal
from hdlm_jax.evaluation.elbo import Evaluator, stratified_pairs
from hdlm_jax.models import channel
from hdlm_jax.models.channel import ChannelProcess, Observed, State
from hdlm_jax.models.network import Network
from hdlm_jax.training.state import build, make_optimizer
from hdlm_jax.training.step import make_loss_sums

V = 4
PARENTS = {"K=1": [], "K=2": [[0, 1, 0, 1]], "K=3": [[0, 1, 2, 1], [0, 1, 1]]}
RATES = {"K=1": (1.0,), "K=2": (2.0, 1.0), "K=3": (1.0, 3.0, 1.5)}


def signal_of(width, seed=0):
    e = np.random.default_rng(seed).normal(size=(V, width))
    e -= e.mean(0)
    return (e / np.sqrt(np.mean(e**2))).astype(np.float32)


def make(case, c=0.3, width=3, xi=1.0):
    hierarchy = Hierarchy.from_parents(PARENTS[case], V)
    chain = LevelChain(RATES[case])
    return ChannelProcess(hierarchy, chain, xi, "cavity", c, width, jnp.asarray(signal_of(width)))


def bayes(process, joint):
    """(State [B, S], t) -> what the optimal network says, evidence and all, of a joint law [V] * S of words."""
    toy = oracle.Toy(PARENTS[f"K={process.num_levels}"], process.chain.rates, process.xi, V)
    shown = jnp.asarray(np.concatenate([toy.shown(k) for k in range(toy.K + 1)], axis=1))  # [V, N]
    log_joint, length = jnp.log(jnp.asarray(joint)), joint.ndim

    def denoise(state, t=None):
        told = channel.evidence(state.u, state.s, process.signal)
        of_words = jnp.where((state.z < V)[..., None], 0.0, told) + jnp.log(shown.T[state.z])  # [B, S, V]
        logits = []
        for i in range(length):
            post = jnp.broadcast_to(log_joint[None], (len(told), *log_joint.shape))
            for j in range(length):
                if j != i:
                    post += of_words[:, j].reshape(len(told), *(V if k == j else 1 for k in range(length)))
            axes = tuple(1 + j for j in range(length) if j != i)
            logits.append(jax.nn.logsumexp(post, axis=axes) + told[:, i])
        return Observed(jnp.stack(logits, axis=1), process.hierarchy, process.signal)

    return denoise


# ---- the bound -------------------------------------------------------------------------------------------------------


def test_evidence_is_bayes_rule():
    signal, rng = signal_of(3), np.random.default_rng(1)
    u, s = rng.normal(size=(5, 3)), np.array([0.01, 0.3, 1.0, 4.0, 30.0])
    log_p = -((u[:, None] - s[:, None, None] * signal) ** 2).sum(-1) / (2 * s[:, None])  # N(u; s e, s)
    want = log_p - log_p[:, :1]
    got = np.asarray(channel.evidence(jnp.asarray(u, jnp.float32), jnp.asarray(s, jnp.float32), jnp.asarray(signal)))
    np.testing.assert_allclose(got - got[:, :1], want, rtol=2e-5, atol=1e-5)


def integrated(process, prior):
    """(discrete, continuous) parts of the bound of one word drawn from prior, whose network knows the prior alone: the
    integral over noise time and observations (D = 1), the sum over words and symbols."""
    toy = oracle.Toy(PARENTS[f"K={process.num_levels}"], process.chain.rates, process.xi, V)
    edges, (node, mass) = np.geomspace(1e-4, 40, 24), np.polynomial.legendre.leggauss(8)
    log_tau = np.concatenate([(np.log(a * b) + np.log(b / a) * node) / 2
                              for a, b in zip(edges[:-1], edges[1:], strict=True)])
    tau, of_tau = np.exp(log_tau), np.tile(mass * np.log(edges[1] / edges[0]) / 2, len(edges) - 1)
    eps, of_eps = np.polynomial.hermite_e.hermegauss(80)
    of_eps /= of_eps.sum()
    # occupancy of every symbol: level and node are independent given the word
    q = np.stack([toy.q(t) for t in tau])  # [T, V, N]
    grid = np.meshgrid(np.arange(len(tau)), np.arange(V), np.arange(V, toy.N), np.arange(len(eps)), indexing="ij")
    i, x, z, j = (a.reshape(-1) for a in grid)
    s = np.asarray(process.ratio(tau, np))[i]
    u = s * np.asarray(process.signal)[x, 0] + np.sqrt(s) * eps[j]
    weight = of_tau[i] * tau[i] * prior[x] * q[i, x, z] * of_eps[j]

    @jax.jit
    def costs(x, z, u, s, tau):
        state = State(z, u[..., None], s)
        told = channel.evidence(state.u, s, process.signal)
        logits = wide(np.log(prior).astype(np.float32), x) + told
        p = Observed(logits, process.hierarchy, process.signal)
        rates = [process.nelbo_weight(state, tau) * part(p, x, state, tau=tau) for part in process.parts]
        return (*rates, process.nelbo_rate(p, x, state, tau))

    found = costs(*(jnp.asarray(a, kind) for a, kind in zip((x, z, u, s, tau[i]), (np.int32, np.int32, *[np.float32] * 3),
                                                            strict=True)))
    discrete, continuous, both = (np.asarray(a, np.float64) for a in found)
    np.testing.assert_allclose(both, discrete + continuous, rtol=1e-5, atol=1e-6)
    return (weight * discrete).sum(), (weight * continuous).sum()


@pytest.mark.parametrize("case, c, xi", [("K=1", 0.3, 1.0), ("K=1", 3.0, 1.0), ("K=2", 0.3, 1.0), ("K=2", 3.0, 0.8),
                                         ("K=3", 1.0, 1.0), ("K=3", 1.0, 0.9)])
def test_the_sum_is_the_entropy_and_the_symbols_alone_lie_below(case, c, xi):
    """For any schedule, table, hierarchy and xi; log V for a network that knows nothing."""
    process = make(case, c, 1, xi)
    for prior in (np.array([0.5, 0.2, 0.2, 0.1]), np.full(V, 1 / V)):
        discrete, continuous = integrated(process, prior)
        assert discrete + continuous == pytest.approx(oracle.entropy(prior), abs=2e-3)
        assert discrete < oracle.entropy(prior) - 0.1


def nelbo(process, joint, denoise, rows, seed=0):
    """Means and standard errors of (discrete, continuous, sum) over texts of a joint law, one draw each."""
    rng = np.random.default_rng(seed)
    x = np.stack(np.unravel_index(rng.choice(joint.size, rows, p=joint.ravel()), joint.shape), axis=1).astype(np.int32)
    tau, q = stratified_pairs(process.proposal(joint.ndim, 0.03), seed, rows, 1)

    @jax.jit
    def rates(x, tau, key):
        state, level = process.noised(key, x, tau, jnp.ones(x.shape, bool))
        p, weight = denoise(state), process.nelbo_weight(state, tau)
        return [jnp.sum(jnp.where(level > 0, weight * part(p, x, state, tau=tau), 0.0), -1) for part in process.parts]

    parts = np.stack(rates(jnp.asarray(x), jnp.asarray(tau[0], jnp.float32), jax.random.key(seed))) / q
    parts = np.concatenate([parts, parts.sum(0, keepdims=True)])
    return parts.mean(1), parts.std(1) / math.sqrt(rows)


@pytest.mark.parametrize("case, c", [("K=1", 0.3), ("K=2", 3.0)])
def test_bound_of_the_optimal_network_of_two_words_is_their_entropy(case, c):
    """Each sees what the other's observation says. Within 4.5 standard errors, which are below 1 %."""
    process, joint = make(case, c), oracle.random_joint(V, 2, seed=3)
    mean, se = nelbo(process, joint, bayes(process, joint), 40_000)
    assert mean[2] == pytest.approx(oracle.entropy(joint), abs=4.5 * se[2]) and se[2] < 0.02
    assert mean[0] + 4.5 * se[0] < oracle.entropy(joint)


@pytest.mark.parametrize("case", PARENTS)
def test_noise_times_expect_the_whole_cost(case):
    """The rates that the proposal expects add up to a cross-entropy a level, whatever c and D."""
    for c, width in ((0.02, 32), (3.0, 3)):
        process = make(case, c, width)
        tau = np.geomspace(1e-12, 40, 20_001)
        m, g = process.moments(tau)
        whole = np.sum((m * tau)[1:] + (m * tau)[:-1]) / 2 * np.log(tau[1] / tau[0])
        assert whole == pytest.approx(process.num_levels, rel=2e-3) and np.all(g >= m**2 * 0.999)


def test_schedule():
    """s and its slope by differences; frozen below TAU_MIN, nothing at infinity."""
    process, tau = make("K=1", 0.7), np.array([1e-3, 0.1, 1.0, 5.0])
    slope = (process.ratio(tau - 1e-6 * tau, np) - process.ratio(tau + 1e-6 * tau, np)) / (2e-6 * tau)
    np.testing.assert_allclose(process.gain(tau, np), slope, rtol=1e-5)
    t = -np.expm1(-tau)
    np.testing.assert_allclose(process.ratio(jnp.asarray(tau, jnp.float32)), 0.7 * (1 - t) / t, rtol=1e-5)
    assert process.ratio(jnp.inf) == 0 and process.gain(jnp.float32(200.0)) == 0
    assert process.gain(0.5 * channel.TAU_MIN) == 0 and process.ratio(0.0) == process.ratio(channel.TAU_MIN)


# ---- the way back ----------------------------------------------------------------------------------------------------


def write(process, joint, steps, rows=20_000):
    run = jax.jit(lambda key, z: decoding.sample(key, Asked(bayes(process, joint)), process, z, steps=steps, tokens=8192))
    z = jnp.full((rows, joint.ndim), process.mask_id, jnp.int32)
    words, stats = run(jax.random.key(2), z)
    assert int(stats["calls"]) == steps and words.max() < V
    return np.asarray(words)


class Asked:
    """A prediction of whole rows, asked for some positions."""

    def __init__(self, denoise):
        self.denoise = denoise

    def __call__(self, state, t):
        return self.denoise(state, t)


@pytest.mark.parametrize("case, xi", [("K=1", 1.0), ("K=2", 0.8), ("K=3", 1.0)])
@pytest.mark.parametrize("steps", [1, 3])
def test_one_word_has_its_law_at_any_number_of_steps(case, xi, steps):
    prior = np.array([0.55, 0.2, 0.05, 0.2])
    process = make(case, 1.0, 2, xi)
    assert_law(write(process, prior, steps), prior)


def test_the_mean_in_place_of_a_word_is_another_law():
    """The twin of the sampler above, one word and three steps: with the mixture its law is the prior, with the mean
    ("predict x0") it is not."""
    prior, steps, rows = np.array([0.55, 0.2, 0.05, 0.2]), 3, 200_000
    process, signal, rng = make("K=1", 1.0, 2), signal_of(2).astype(float), np.random.default_rng(0)
    for mean in (False, True):
        u, s, word = np.zeros((rows, 2)), 0.0, np.full(rows, -1)
        for call in range(steps):
            p = np.log(prior) + u @ signal.T - s / 2 * (signal**2).sum(-1)
            p = np.exp(p - p.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            w = np.minimum((p.cumsum(-1) < rng.random((rows, 1))).sum(-1), V - 1)
            falls = (word < 0) & (rng.random(rows) < 1 / (steps - call))
            word = np.where(falls, w, word)
            then = float(process.ratio(-np.log((call + 1) / steps), np))
            u += (then - s) * (p @ signal if mean else signal[w]) + np.sqrt(then - s) * rng.normal(size=u.shape)
            s = then
        distance, floor, spread = oracle.total_variation(np.bincount(word, minlength=V), prior)
        assert distance > 0.05 if mean else distance < floor + 4.5 * spread


@pytest.mark.parametrize("case", ["K=1", "K=2"])
def test_two_words_have_their_law_in_many_steps(case):
    """And in one step they do not: they move independently."""
    process, joint = make(case, 0.5), oracle.random_joint(V, 2, seed=3)
    counts = lambda words: np.bincount(words @ [V, 1], minlength=V * V)  # noqa: E731
    far = oracle.total_variation(counts(write(process, joint, 1)), joint)[0]
    near, floor, spread = oracle.total_variation(counts(write(process, joint, 96, 10_000)), joint)
    assert near < floor + 4.5 * spread + 0.01 and far > 0.1


def test_given_words_stay_and_tell_the_others():
    process, joint = make("K=2", 0.5), oracle.random_joint(V, 2, seed=3)
    z = jnp.tile(jnp.asarray([[2, process.mask_id]], jnp.int32), (10_000, 1))
    words = decoding.sample(jax.random.key(0), bayes(process, joint), process, z, steps=2, tokens=8192)[0]
    assert np.all(np.asarray(words)[:, 0] == 2)
    assert_law(np.asarray(words)[:, 1:], joint[2] / joint[2].sum())


# ---- runs ------------------------------------------------------------------------------------------------------------


def run_config(tmp_path, **changes):
    values = tiny.read_recipe(tiny.write_recipe(tmp_path)).as_dict()
    for name, value in (dict(diffusion__channel=0.1, diffusion__channel_width=8) | changes).items():
        section, _, key = name.partition("__")
        values[section] = values[section] | {key: value}
    return resolve(values)


def test_runs_carry_the_channel(tmp_path):
    """e is that of the words' vectors, and stays; a resumed run is one that never stopped; evaluation, samples and the
    export take both parts."""
    import hdlm_jax
    from hdlm_jax.runs import evaluate, export, generate, train
    from hdlm_jax.training import loading

    run, other = str(tmp_path / "run"), str(tmp_path / "other")
    more = dict(optimizer__schedule="constant", optimizer__weight_decay=0.1, optimizer__name="muon", checkpoint__every=2)
    config = run_config(tmp_path, train__steps=4, **more)
    state = train.train(config, run)
    train.train(run_config(tmp_path, train__steps=2, **more), other)
    jax.tree.map(np.testing.assert_array_equal, state, train.train(config, other))
    loaded = loading.load_here(run, "latest")
    signal = np.asarray(loaded.params["head"]["signal"])
    vectors = np.load(next((tmp_path / "run" / "data").glob("embeddings-*.npy")))
    np.testing.assert_allclose(signal, channel.standardised(vectors, 8), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(state.params["head"]["signal"], channel.standardised(vectors, 8))
    assert np.abs(np.asarray(state.params["observe"]["kernel"])).max() > 1e-4
    found = evaluate.evaluate(config, run)
    assert found["nelbo"] == pytest.approx(found["discrete"] + found["continuous"]) and found["continuous"] > 0
    assert found["discrete"] == pytest.approx(sum(found["levels"])) and found["discrete_se"] > 0
    assert generate.generate(config, run)["samples"]
    export.export(dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, checkpoint="latest")), run)
    taken = hdlm_jax.load(str(tmp_path / "run" / "export"))
    np.testing.assert_array_equal(taken.run.params["head"]["signal"], signal)
    assert len(taken.generate(num_samples=1, steps=2)) == 1 and taken.nelbo("some text", draws=2)[0]["nats"] > 0
    with pytest.raises(ConfigError, match="generate.method='max_prob'"):
        taken.generate(num_samples=1, method="max_prob")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["diffusion"]["channel"] == 0.1
