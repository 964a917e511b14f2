"""Extreme numbers: masses of e^-300, uniforms at the end of their lattice, ties; float32 against float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import Toy

from hdlm_jax.decoding import presets, statistics
from hdlm_jax.diffusion import levels
from hdlm_jax.diffusion.draws import log_probs_of
from hdlm_jax.diffusion.gidd import GiddProcess
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.levels import LevelChain
from hdlm_jax.diffusion.prediction import LogitsPrediction
from hdlm_jax.models.heads import FactorisedHead, FlatHead
from hdlm_jax.training.views import stratified_tau

V = 6
PARENTS = {1: [], 2: [[0, 1, 0, 1, 2, 2]], 3: [[0, 0, 1, 1, 2, 2], [0, 0, 1]],
           4: [[0, 0, 1, 2, 3, 3], [0, 0, 1, 2], [0, 0, 1]]}
CASES = [(k, xi, force) for k in PARENTS for xi in (1.0, 0.8) for force in ("none", "within", "between", "cavity")
         if not (k == 1 and xi < 1) and not (force == "within" and xi < 1)]
QUICK = {(1, 1.0, "none"), (2, 1.0, "none"), (2, 0.8, "between")}
CASES = [c if c[0] == 3 or c in QUICK else pytest.param(*c, marks=pytest.mark.slow) for c in CASES]
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time
ZERO = 1e-30  # what float32 may take for a probability of nothing


def grid(rows=9):
    """float32 [G, V + 4]: logits of words and of (up to four) clusters, of which a flat head ignores the latter."""
    rng = np.random.default_rng(0)
    words = [[0, 0, 0, 0, -120, -121], [0, -100, -300, -300, 0, -50], [-300, -300, -300, -300, 0, -50],
             [0, 0, -300, -300.5, -299, -300], [0, -50, -100, -300, -100, -50], [-50] * V]
    more = rng.choice([0.0, -50.0, -100.0, -300.0], (rows, V)) + rng.normal(0, 0.5, (rows, V))
    clusters = rng.choice([0.0, -50.0, -100.0, -300.0], (rows + len(words), 4)) + rng.normal(0, 0.5, (1, 4))
    return np.concatenate([np.concatenate([words, more]), clusters], 1).astype(np.float32)


def make(k, xi, force, parents=None):
    parents, rates = PARENTS[k] if parents is None else parents, (1.0, 0.7, 1.5, 1.0)[:k]
    words = len(parents[0]) if parents else V
    hierarchy = Hierarchy.from_parents(parents, words)
    return Toy(parents, rates, xi, words), HierarchicalProcess(hierarchy, LevelChain(rates), xi, force)


def heads_of(process):
    """{name: function of logits float32 [P, V + 4] -> a head's prediction}: hidden states that are the logits."""
    h = process.hierarchy
    flat, factorised = FlatHead(h), FactorisedHead(h)
    a, b = (jax.tree.map(lambda p: np.zeros(p.shape, np.float32), head.init(jax.random.key(0), V + 4))
            for head in (flat, factorised))
    a["kernel"][np.arange(V), np.arange(V)] = 1
    b["words"]["kernel"][factorised.blocks.row, np.arange(V)] = 1
    b["clusters"]["kernel"][np.arange(h.sizes[1]), V + np.arange(h.sizes[1])] = 1
    return {"flat": lambda logits: flat.predict(a, logits), "factorised": lambda logits: factorised.predict(b, logits)}


def softmax(logits):
    p = np.exp(np.asarray(logits, float) - np.max(logits, -1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def truth(toy, head, logits):
    """f [V] in float64."""
    words, clusters = np.asarray(logits[:V], float), np.asarray(logits[V : V + toy.sizes[1]], float)
    if head == "flat":
        return softmax(words)
    out = np.zeros(V)
    for c, mass in enumerate(softmax(clusters)):
        out[toy.anc[1] == c] = mass * softmax(words[toy.anc[1] == c])
    return out


def cost_of(toy, head, logits, x, z, force):
    return toy.cost_by_formula(toy.force_one(truth(toy, head, logits), z, force), x, z)


def differences(toy, head, logits, x, z, force, step=1e-4):
    """Gradient of the cost in all logits, by central differences in float64."""
    out = np.zeros(logits.size)
    for i in range(V + (toy.sizes[1] if head == "factorised" else 0)):
        two = np.tile(np.asarray(logits, float), (2, 1))
        two[:, i] += step, -step
        out[i] = np.subtract(*(cost_of(toy, head, a, x, z, force) for a in two)) / (2 * step)
    return out


# ---- masses that underflow --------------------------------------------------------------------------------------


@pytest.mark.parametrize("k, xi, force", CASES)
def test_costs_and_their_gradients_at_extreme_logits(k, xi, force):
    """Every word and node on show: 1e-5 relative (1e-6 nats near 0), and no gradient is dead or NaN."""
    toy, process = make(k, xi, force)
    q, rows = toy.q(1.0), grid()
    tokens = [(row, x, z) for row in range(len(rows)) for x in range(V) for z in range(V, toy.N) if q[x, z] > 0]
    row, x, z = np.array(tokens).T
    found = {}

    @jit
    def run(logits):
        def total(logits, head):
            cost = process.token_loss(head(logits), jnp.asarray(x), jnp.asarray(z))
            return jnp.sum(cost), cost

        return {name: jax.grad(total, has_aux=True)(logits, head) for name, head in heads_of(process).items()}

    found = run(jnp.asarray(rows[row]))
    for head, (gradient, cost) in found.items():
        want = [cost_of(toy, head, rows[r], x, z, force) for r, x, z in tokens]
        assert np.isfinite(want).all() and max(want) > 250
        np.testing.assert_allclose(cost, want, rtol=1e-5, atol=1e-6)
        assert np.isfinite(gradient).all()
        for i in range(0, len(tokens), 1 + len(tokens) // 60):
            r, *pair = tokens[i]
            np.testing.assert_allclose(gradient[i], differences(toy, head, rows[r], *pair, force), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("k, xi, force", CASES)
def test_the_way_back_at_extreme_logits(k, xi, force):
    """Laws of all levels below, the dense posterior and the probability of each drop: 1e-5 relative, in logs 1e-5."""
    toy, process = make(k, xi, force)
    rows, symbols = grid(), np.arange(V, toy.N)
    logits, z = np.repeat(rows, len(symbols), 0), np.tile(symbols, len(rows))
    pairs = [(i, new) for i in range(len(z)) for new in range(toy.N) if toy.level[new] < toy.level[z[i]]]
    at, new = np.array(pairs).T

    @jit
    def run(logits):
        out = {}
        for name, head in heads_of(process).items():
            laws = {(i, j, how): process.log_probs_below(head(logits), jnp.asarray(z), i, j, how)
                    for i in range(1, k + 1) for j in range(i)
                    for how in (("exact", "clean") if 0 < j < i - 1 else ("exact",))}
            drops = statistics.probability_of(process, head(logits[at]), jnp.asarray(z[at]), jnp.asarray(new))
            out[name] = laws, process.posterior(head(logits), jnp.asarray(z), 0.6, 1.1), drops
        return out

    for head, (laws, posterior, drops) in run(jnp.asarray(logits)).items():
        forced = [toy.force_one(truth(toy, head, a), symbol, force) for a, symbol in zip(logits, z, strict=True)]
        for (i, j, how), law in laws.items():
            law, onto = np.asarray(law), np.eye(toy.sizes[j])[toy.anc[j]]
            for token in np.flatnonzero(toy.level[z] == i):
                p = forced[token] @ (toy.pi(z[token], j) if how == "exact" else onto)
                np.testing.assert_array_equal(law[token] > -np.inf, p > 0)
                np.testing.assert_allclose(law[token][p > 0], np.log(p[p > 0]), rtol=1e-5, atol=1e-6)
        step = toy.step_table(0.6, 1.1)
        want = [p @ step[:, symbol] for p, symbol in zip(forced, z, strict=True)]
        np.testing.assert_allclose(posterior, want, rtol=1e-5, atol=ZERO)
        want = [(forced[i] @ toy.pi(z[i], toy.level[n]))[toy.node[n]] for i, n in pairs]
        np.testing.assert_allclose(drops, want, rtol=1e-5, atol=ZERO)


@pytest.mark.parametrize("force", ["within", "between", "cavity"])
def test_no_cluster_is_too_unlikely_to_be_shown(force):
    """The node above the last two words has e^-120 of the mass: what is under it is known all the same."""
    _, process = make(3, 1.0, force)
    law = process.log_probs_below(jnp.asarray([[0.0, 0, 0, 0, -120, -121]]), jnp.asarray([V + 4]), 2, 1)
    np.testing.assert_array_equal(np.asarray(law), [[-np.inf, -np.inf, 0.0]])


def test_an_unforced_mistake_is_charged_in_full():
    """K = 3, unforced: 100 nats are 100 nats, not -log of a floor, and push the word up."""
    _, process = make(3, 1.0, "none", [[0, 1, 2, 2], [0, 0, 1]])
    logits, x, z = jnp.asarray([[0.0, -100, -300, -300]]), jnp.asarray([1]), jnp.asarray([4 + 3])
    cost, gradient = jax.value_and_grad(lambda a: process.token_loss(a, x, z)[0])(logits)
    assert float(cost) == pytest.approx(100, rel=1e-6)
    np.testing.assert_allclose(gradient, [[1, -1, 0, 0]], atol=1e-6)


def test_between_divides_by_however_little_there_is():
    """f has e^-90 under the cluster on show; between gives it all the mass that the forward process would."""
    toy, process = make(2, 0.8, "between", [[0, 0, 1, 1]])
    logits, x, z = np.float32([[-90, -90.5, 0, 0]]), 0, 4
    cost = process.token_loss(jnp.asarray(logits), jnp.asarray([x]), jnp.asarray([z]))
    assert float(cost[0]) == pytest.approx(-math.log(0.8 / (1 + math.exp(-0.5))), rel=1e-6)


@pytest.mark.parametrize("xi, force", [(1.0, "cavity"), (1.0, "none"), (0.8, "between"), (0.8, "cavity")])
def test_forbidden_words_are_no_nan(xi, force):
    """Logits of -inf (a canvas that allows some words alone), also where nothing under the node is allowed."""
    toy, process = make(3, xi, force)
    logits = jnp.asarray([[0.0, 1.0, -jnp.inf, -jnp.inf, 0.5, -jnp.inf], [0.0, 1.0, 2.0, 3.0, -jnp.inf, -jnp.inf]])
    for z in range(V, toy.N):
        shown = jnp.full(2, z)
        for j in range(toy.level[z]):
            assert not jnp.any(jnp.isnan(process.log_probs_below(logits, shown, int(toy.level[z]), j)))
    assert not jnp.any(jnp.isnan(LogitsPrediction(logits, process.hierarchy).log_masses(2)))


@pytest.mark.parametrize("xi, force", [(1.0, "cavity"), (1.0, "none"), (0.8, "between"), (0.8, "cavity")])
def test_a_network_that_diverged_has_no_finite_cost(xi, force):
    """What guards against sums of nothing must not hide NaN, nor an infinite logit."""
    toy, process = make(3, xi, force)
    z = jnp.arange(V, toy.N)
    for bad in (jnp.nan, jnp.inf):
        cost = process.token_loss(jnp.tile(jnp.zeros(V).at[0].set(bad), (len(z), 1)), jnp.zeros(len(z), jnp.int32), z)
        assert not jnp.any(jnp.isfinite(cost))


# ---- uniforms against small probabilities -------------------------------------------------------------------------


def test_a_uniform_of_zero_is_never_drawn(monkeypatch):
    """Wherever a uniform is compared with a probability: the lowest number of the lattice masks nothing at 1e-9."""
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape=(), dtype=jnp.float32, **_: jnp.zeros(shape, dtype))
    x, tau = jnp.zeros((2, 5), jnp.int32), jnp.full(2, 1e-9)
    for p_uniform in (0.0, 0.1):
        process = GiddProcess(Hierarchy.from_parents([], V), p_uniform)
        np.testing.assert_array_equal(process.corrupt(jax.random.key(0), x, tau=tau), x)
        z = process.step(jax.random.key(0), jnp.zeros((2, 5, V)), x, jnp.float32(0.1), jnp.float32(0.1 + 1e-8))
        np.testing.assert_array_equal(z, x)  # a step of 1e-8: nothing jumps
    _, process = make(2, 1.0, "cavity")
    np.testing.assert_array_equal(process.corrupt(jax.random.key(0), x, tau=tau), x)
    taus = stratified_tau(jax.random.split(jax.random.key(0), 2), jnp.arange(2), 2)
    np.testing.assert_allclose(taus, [-math.log1p(-(2.0**-25)), -math.log(0.5 - 2.0**-25)], rtol=1e-6)


def test_open_uniform_is_the_middle_of_the_lattice():
    """Neither end is drawn, every step is exact, and the mean is right."""
    u = np.asarray(levels.open_uniform(jax.random.key(0), (200_000,)))
    steps = u.astype(float) * 2**23 - 0.5
    np.testing.assert_array_equal(steps, np.round(steps))
    assert u.min() > 0 and u.max() < 1 and abs(u.mean() - 0.5) < 4 * math.sqrt(1 / 12 / len(u))


# ---- nucleus --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probabilities, top_p, kept", [
    ([0.25, 0.25, 0.25, 0.25], 0.5, [0, 1]), ([0.25, 0.25, 0.25, 0.25], 0.51, [0, 1, 2]),
    ([0.1, 0.4, 0.1, 0.4], 0.85, [0, 1, 3]), ([0.1, 0.4, 0.1, 0.4], 0.3, [1]), ([0.125, 0.5, 0.375], 1e-3, [1]),
    ([0.125, 0.5, 0.375, 0.0], 1.0, [0, 1, 2])])
def test_the_nucleus_is_the_smallest_set(probabilities, top_p, kept):
    """Equal words at its edge: as many of them as the mass needs, the first ones; traced or not."""
    logits = jnp.log(jnp.asarray(probabilities))
    for law in (log_probs_of(logits, 1.0, top_p), jax.jit(lambda p: log_probs_of(logits, 1.0, p))(top_p)):
        assert np.flatnonzero(law > -np.inf).tolist() == kept
        np.testing.assert_allclose(jnp.exp(law)[np.array(kept)], np.divide(probabilities, np.sum(
            [probabilities[i] for i in kept]))[kept], rtol=1e-5)


def test_a_traced_nucleus_of_one_drops_nothing():
    """The first word's mass is 1 in float32, and the others are words all the same."""
    logits = jnp.asarray([-20.0, 0.0, -20.0, -30.0])
    law = jax.jit(lambda p: log_probs_of(logits, 1.0, p))(1.0)
    np.testing.assert_allclose(law, logits, atol=1e-6)


# ---- settings -------------------------------------------------------------------------------------------------------


def test_p2_takes_any_strength_that_is_not_negative():
    """eta of P2 is a strength, not a share (ReMDM's is one)."""
    assert presets.make("p2", "eta=2.5").numbers["eta"] == 2.5
    for method, value in (("p2", -0.1), ("remdm", 1.5), ("remdm", -0.1)):
        with pytest.raises(ValueError, match=f"eta={value}"):
            presets.make(method, f"eta={value}")
