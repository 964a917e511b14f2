"""HierarchicalProcess against the oracle: rates, NELBO = entropy, noising, reverse step, weights, gradients."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import Toy

from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.levels import LevelChain

MDLM = dict(parents=[], vocab_size=4)
TWO = dict(parents=[[0, 1, 0, 1]])
THREE = dict(parents=[[0, 1, 2, 0, 2], [0, 1, 1]])
FOUR = dict(parents=[[0, 1, 2, 3, 0, 2], [2, 0, 1, 1], [1, 0, 1]])
CASES = [
    (MDLM, (1.0,), 1.0),
    (TWO, (1.0, 1.0), 1.0),
    (TWO, (1.0, 2.0), 0.9),
    (TWO, (2.0, 1.0), 0.6),
    (THREE, (1.0, 1.0, 1.0), 1.0),
    (THREE, (1.0, 1.0, 1.0), 0.9),
    (THREE, (1.5, 1.0, 4.0), 0.6),
]
FORCES = ("none", "within", "between", "cavity")
NODES = 4  # a panel of the quadrature (32 in all): exact to 1e-6 nats here, less than float32 leaves


def make(shape, rates, xi, force="cavity", keep_single=False):
    """The same toy twice: the oracle's and the library's."""
    hierarchy = Hierarchy.from_parents(shape["parents"], shape.get("vocab_size"), keep_single=keep_single)
    return Toy(rates=rates, xi=xi, **shape), HierarchicalProcess(hierarchy, LevelChain(rates), xi, force)


def loss_of(process, logits, x, z, tau, hard_training=False, **weights):
    """The training loss of every position, t uniform."""
    cost = process.token_loss(logits, x, z, hard_training=hard_training, tau=tau)
    return process.loss_weight(z, tau, **weights, x=x) * cost


def every_pair(toy):
    """x, z int32 [P, 1]: all (word, symbol) with the symbol reachable from the word."""
    pairs = [(x, z) for x in range(toy.V) for z in range(toy.N) if toy.q(1.0)[x, z] > 0]
    x, z = np.array(pairs, np.int32).T
    return x[:, None], z[:, None]


def random_logits(rows, words, seed=0, scale=1.5):
    return np.random.default_rng(seed).normal(size=(rows, 1, words)).astype(np.float32) * scale


def softmax(logits):
    p = np.exp(np.asarray(logits, float) - np.max(logits, -1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def as_logits(network):
    """Logits of a table of distributions; the shift checks that they need no normalising."""
    return jnp.asarray(np.log(network + 1e-30) + 0.7, jnp.float32)


def z_scores(counts, law):
    """How many standard errors each count is from n law; a count where the law is zero is infinitely far."""
    n = counts.sum()
    sd = np.sqrt(n * law * (1 - law))
    off = counts - n * law
    return np.where(sd > 1e-6, off / np.maximum(sd, 1.0), np.where(np.abs(off) > 1e-3, np.inf, 0.0))


# ---- objective ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, rates, xi", [*CASES[:2], *CASES[3:], (FOUR, (1.0, 0.5, 2.0, 1.0), 0.8)])
@pytest.mark.parametrize("force", FORCES)
def test_rate_is_the_oracle_s(shape, rates, xi, force):
    """w_k C at every word and symbol, for a network that knows nothing."""
    toy, process = make(shape, rates, xi, force)
    x, z = every_pair(toy)
    logits = random_logits(len(x), toy.V)
    if force == "within" and xi < 1:
        with pytest.raises(ValueError, match="within"):
            process.nelbo_rate(jnp.asarray(logits), jnp.asarray(x), jnp.asarray(z), jnp.full(len(x), 0.3))
        return
    rate = jax.jit(process.nelbo_rate)
    p = [toy.force_one(q[0], s[0], force) for q, s in zip(softmax(logits), z, strict=True)]
    for tau in (0.01, 1.7):
        taus = jnp.full(len(x), tau, jnp.float32)
        got = np.asarray(rate(jnp.asarray(logits), jnp.asarray(x), jnp.asarray(z), taus))
        tau = float(np.float32(tau))
        reverse = toy.reverse_rates(tau)
        want = [toy.rate(p[i], x[i, 0], z[i, 0], tau, reverse) for i in range(len(x))]
        scale = oracle.level_weight(rates, tau).max()
        np.testing.assert_allclose(got[:, 0], want, rtol=3e-5, atol=2e-6 * scale)
        assert (got[toy.level[z] == 0] == 0).all()


def library_rates(toy, process):
    """`Toy.nelbo`'s table of rates [Z, S, V], by the library."""

    def table(network, tau):
        rows, length, words = network.shape
        z = jnp.asarray(np.repeat(toy.sequences(length), words, axis=0), jnp.int32)
        x = jnp.asarray(np.broadcast_to(np.tile(np.arange(words), rows)[:, None], z.shape), jnp.int32)
        logits = jnp.repeat(as_logits(network), words, axis=0)
        out = rate(logits, x, z, jnp.full(len(z), tau, jnp.float32))
        return np.asarray(out, float).reshape(rows, words, length).swapaxes(1, 2)

    rate = jax.jit(process.nelbo_rate)
    return table


@pytest.mark.parametrize("shape, rates, xi", CASES)
@pytest.mark.parametrize("force", ["none", "cavity"])
def test_nelbo_of_the_optimum_is_the_entropy(shape, rates, xi, force):
    """Fact 2, integrated over noise time and enumerated over z with the library's own rates."""
    toy, process = make(shape, rates, xi, force)
    joint = oracle.random_joint(toy.V, 2, seed=3)
    network = toy.bayes(joint, cavity=force == "cavity")
    nelbo = (joint * toy.nelbo(network, library_rates(toy, process), NODES)).sum()
    assert nelbo == pytest.approx(oracle.entropy(joint), abs=1e-4)


@pytest.mark.parametrize("xi", [0.9, 0.6])
def test_between_is_above_the_entropy(xi):
    toy, process = make(TWO, (1.0, 1.0), xi, "between")
    joint = oracle.random_joint(4, 2, seed=3)
    network = toy.bayes(joint)
    nelbo = (joint * toy.nelbo(network, library_rates(toy, process), NODES)).sum()
    assert nelbo > oracle.entropy(joint) + 0.005
    assert nelbo == pytest.approx((joint * toy.nelbo(toy.force(network, "between"))).sum(), abs=1e-4)


def test_within_at_xi_one_is_exact_too():
    toy, process = make(THREE, (1.0, 2.0, 1.0), 1.0, "within")
    joint = oracle.random_joint(5, 2, seed=3)
    nelbo = (joint * toy.nelbo(toy.bayes(joint, cavity=True), library_rates(toy, process), NODES)).sum()
    assert nelbo == pytest.approx(oracle.entropy(joint), abs=1e-4)


@pytest.mark.parametrize("force", ["none", "cavity"])
def test_nelbo_bounds_the_likelihood_of_the_sampled_model(force):
    """Fact 6 with the library's rates: a random network, all orders of the crossings."""
    toy, process = make(THREE, (1.0, 0.5, 2.0), 0.8, force)
    network = toy.random_network(2, seed=8)
    nelbo = toy.nelbo(network, library_rates(toy, process), NODES)
    p = toy.p_model(toy.force(network, force))
    assert p.sum() == pytest.approx(1, abs=1e-9)
    assert (nelbo + np.log(p)).min() > 1e-4


@pytest.mark.parametrize("force", ["none", "cavity"])
def test_a_single_cluster_is_mdlm(force):
    """Fact 4: (V, 1, 1) has the NELBO of (V, 1), whatever r_2, for a network blind to the difference."""
    flat, flat_process = make(dict(parents=[], vocab_size=3), (1.0,), 1.0, force)
    network = flat.random_network(2, seed=7)
    want = flat.nelbo(network, library_rates(flat, flat_process), NODES)
    for r_2 in (0.5, 3.0):
        deep, process = make(dict(parents=[[0, 0, 0]]), (1.0, r_2), 1.0, force, keep_single=True)
        assert process.hierarchy.sizes == (3, 1, 1)
        rows = np.minimum(deep.sequences(2), flat.mask)
        twin = network[rows[:, 0] * flat.N + rows[:, 1]]
        np.testing.assert_allclose(deep.nelbo(twin, library_rates(deep, process), NODES), want, rtol=1e-5)


def test_cost_takes_any_leading_shape_and_rate_any_tau():
    toy, process = make(THREE, (1.0, 1.0, 1.0), 0.9)
    x, z = (jnp.asarray(a[:12].reshape(3, 4)) for a in every_pair(toy))
    logits = jnp.asarray(random_logits(12, 5).reshape(3, 4, 5))
    tau = jnp.array([0.1, 0.5, 2.0])
    cost = jax.jit(process.token_loss)
    assert cost(logits, x, z).shape == (3, 4)
    rate = jax.jit(process.nelbo_rate)
    per_row = rate(logits, x, z, tau)
    per_token = rate(logits, x, z, jnp.broadcast_to(tau[:, None], (3, 4)))
    np.testing.assert_allclose(per_row, per_token, rtol=1e-6)
    half = cost(logits.astype(jnp.bfloat16), x, z)  # computed in float32
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, cost(logits.astype(jnp.bfloat16).astype(jnp.float32), x, z), rtol=1e-6)


# ---- training losses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weighting, hard, xi",
    [
        ("none", False, 0.8),
        ("constant", True, 0.8),
        ("constant", True, 1.0),
        ("clip", False, 1.0),
        ("empirical", False, 0.8),
    ],
)
def test_training_loss(weighting, hard, xi):
    rates = (1.0, 2.0, 1.0)
    toy, process = make(THREE, rates, xi, "cavity")
    x, z = every_pair(toy)
    logits = random_logits(len(x), toy.V, seed=2)
    p = [toy.force_one(q[0], s[0], "cavity") for q, s in zip(softmax(logits), z, strict=True)]

    @jax.jit
    def loss(tau):
        return loss_of(process, jnp.asarray(logits), jnp.asarray(x), jnp.asarray(z), jnp.full(len(x), tau),
                            weighting=weighting, weight_max=2.5, hard_training=hard)

    for t in (0.02, 0.6):
        tau = -math.log1p(-t)
        got = loss(jnp.float32(tau))
        exact = oracle.level_weight(rates, tau) / (1 - t)
        assert (exact > 2.5).any()  # clipping does something
        empirical = np.array([3 - 2 * t, 3 - 2 * t, t * t - t + 3])
        clipped = np.minimum(exact, 2.5)
        weight = {"none": exact, "constant": np.ones(3), "clip": clipped, "empirical": empirical}
        for i in range(len(x)):
            k = toy.level[z[i, 0]]
            c = -math.log(p[i][x[i, 0]]) if hard and k >= 2 else toy.cost_by_formula(p[i], x[i, 0], z[i, 0])
            want = weight[weighting][k - 1] * c if k else 0.0
            assert float(got[i, 0]) == pytest.approx(want, rel=5e-5, abs=2e-5)


def test_clip_has_a_lower_end_too():
    toy, process = make(TWO, (1.0, 1.0), 1.0)
    x, z = (jnp.asarray(a) for a in every_pair(toy))
    logits, tau = jnp.asarray(random_logits(len(x), 4)), jnp.full(len(x), 0.5)
    loss = jax.jit(functools.partial(loss_of, process, weight_min=7.0, weight_max=7.0), static_argnames="weighting")
    clipped, plain = (loss(logits, x, z, tau, weighting=w) for w in ("clip", "constant"))
    np.testing.assert_allclose(clipped, 7 * plain, rtol=1e-6)


def test_published_clip_makes_every_weight_two():
    """theory.md "Training weights": K = 2, rates 1, [0, 2] is plain unweighted cross-entropy."""
    _, process = make(TWO, (1.0, 1.0), 1.0)
    tau = jnp.geomspace(1e-4, 20, 50)
    weights = process.chain.weight(tau) * jnp.exp(tau)[:, None]
    assert weights[:, 0].min() >= 2.718 and weights[:, 1].min() >= 3.351


def test_mdlm_weight_is_one_over_t():
    """Fact 5."""
    toy, process = make(MDLM, (1.0,), 1.0)
    t = np.array([1e-4, 0.1, 0.5, 0.99])
    x, z = jnp.full((4, 1), 2), jnp.full((4, 1), toy.mask)
    logits, tau = jnp.asarray(random_logits(4, 4)), jnp.asarray(-np.log1p(-t), jnp.float32)
    loss = jax.jit(functools.partial(loss_of, process, weighting="none"))(logits, x, z, tau)
    ce = -np.log(softmax(logits)[:, 0, 2])
    np.testing.assert_allclose(loss[:, 0], ce / t, rtol=2e-5)
    np.testing.assert_allclose(process.nelbo_rate(logits, x, z, tau)[:, 0], ce / np.expm1(tau), rtol=2e-5)


@pytest.mark.parametrize("shape, xi, force", [
    (THREE, xi, force) for force in FORCES for xi in (1.0, 0.7) if force != "within" or xi == 1])
def test_gradients_against_finite_differences(shape, xi, force):
    rates = (1.0, 2.0, 0.5)[: len(shape["parents"]) + 1]
    with jax.enable_x64(True):
        toy, process = make(shape, rates, xi, force)
        x, z = (jnp.asarray(a) for a in every_pair(toy))
        logits = jnp.asarray(random_logits(len(x), toy.V, seed=4), jnp.float64)
        tau = jnp.full(len(x), 0.7, jnp.float64)

        @jax.jit
        def total(a):  # both training losses, at different weights
            soft = loss_of(process, a, x, z, tau, weighting="none")
            return (soft + 0.37 * loss_of(process, a, x, z, tau, weighting="constant", hard_training=True)).sum()

        assert total(logits).dtype == jnp.float64
        gradient = np.asarray(jax.jit(jax.grad(total))(logits))
        rng = np.random.default_rng(5)
        for _ in range(3):
            direction = jnp.asarray(rng.normal(size=logits.shape))
            slope = (total(logits + 1e-4 * direction) - total(logits - 1e-4 * direction)) / 2e-4
            assert float(slope) == pytest.approx(float((gradient * np.asarray(direction)).sum()), rel=2e-6)
        # words are carried over: no gradient there
        assert (gradient[np.asarray(toy.level[z])[:, 0] == 0] == 0).all()


@pytest.mark.parametrize("shape, rates, xi, force", [
    (*case, force) for force in FORCES for case in (CASES[0], CASES[4], CASES[5])
    if force != "within" or case[2] == 1])
def test_extreme_logits_stay_finite(shape, rates, xi, force):
    toy, process = make(shape, rates, xi, force)
    x, z = (jnp.asarray(np.tile(a, (toy.V, 1))) for a in every_pair(toy))
    word = jnp.repeat(jnp.arange(toy.V), len(x) // toy.V)  # the one that the network is sure of
    logits = jnp.where(jnp.arange(toy.V)[None, None] == word[:, None, None], 1e4, -1e4)

    @jax.jit
    @jax.value_and_grad
    def total(a):
        kwargs = dict(x=x, z=z, tau=jnp.full(len(x), 0.3), weighting="none")
        losses = loss_of(process, a, **kwargs), loss_of(process, a, **kwargs, hard_training=True)
        return losses[0].sum() + losses[1].sum()

    value, gradient = total(logits)
    assert np.isfinite(value) and np.isfinite(np.asarray(gradient)).all() and value > 0


@pytest.mark.parametrize("xi", [1.0, 0.9])
def test_a_confident_mistake_is_charged_in_full(xi):
    """Log space: 200 nats are 200 nats in float32 at level 1, where probabilities underflow at 103."""
    toy, process = make(TWO, (1.0, 1.0), xi, "cavity")
    logits = jnp.array([[[0.0, -200.0, -200.0, -200.0]]])
    shown = jnp.array([[toy.offsets[1]]])  # the cluster of words 0 and 2
    cost = process.token_loss(logits, jnp.array([[2]]), shown)
    assert float(cost[0, 0]) == pytest.approx(200, rel=1e-5)


# ---- forward process ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape, rates, xi", [CASES[0], CASES[1], CASES[4], CASES[5], CASES[6]])
def test_sample_z_frequencies(shape, rates, xi):
    """Each token's marginal at its own row's tau, and independent positions."""
    toy, process = make(shape, rates, xi)
    rows, taus = 90_000, np.array([0.08, 0.8, 2.5])
    x = np.tile(np.array([[1, 3]], np.int32), (rows, 1))
    tau = np.tile(taus, rows // 3).astype(np.float32)
    z = np.asarray(jax.jit(process.corrupt)(jax.random.key(1), jnp.asarray(x), tau=jnp.asarray(tau)))
    assert z.shape == x.shape and z.dtype == np.int32 and z.min() >= 0 and z.max() < toy.N
    for i, t in enumerate(taus):
        q = toy.q(t)
        counts = np.zeros((toy.N, toy.N))
        np.add.at(counts, tuple(z[i::3].T), 1)
        assert np.abs(z_scores(counts.sum(1), q[1])).max() < 4.5
        assert np.abs(z_scores(counts.sum(0), q[3])).max() < 4.5
        assert np.abs(z_scores(counts, np.outer(q[1], q[3]))).max() < 5.0


@pytest.mark.parametrize("xi", [1.0, 0.6])
def test_levels_of_one_token_share_one_chain(xi):
    """With one key and rising tau a token climbs, every symbol under the next: a wrong branch is kept."""
    toy, process = make(FOUR, (1.0, 1.0, 1.0, 1.0), xi)
    rows = 2000
    x = jnp.asarray(np.random.default_rng(0).integers(0, toy.V, (rows, 3)), jnp.int32)
    sample = jax.jit(lambda tau: process.corrupt(jax.random.key(2), x, tau=jnp.full(rows, tau)))
    before = np.asarray(x)
    wrong = np.zeros(toy.K + 1)
    for tau in (0.1, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0):
        after = np.asarray(sample(jnp.float32(tau)))
        low, high = toy.level[before], toy.level[after]
        assert (high >= low).all()
        for a, b in zip(before.ravel(), after.ravel(), strict=True):
            if toy.level[a] >= 1:
                node = toy.node[a]
                for k in range(toy.level[a], toy.level[b]):
                    node = toy.parents[k][node]
                assert node == toy.node[b]
        for k in range(1, toy.K):
            wrong[k] += ((high == k) & (toy.anc[k][np.asarray(x)] != toy.node[after])).sum()
        before = after
    assert (wrong[1 : toy.K] > 0).all() == (xi < 1)


def test_sample_z_rows_do_not_depend_on_the_batch():
    """Row b is fold_in(key, b), so that any split of a batch over devices gives the same z."""
    toy, process = make(THREE, (1.0, 1.0, 1.0), 0.7)
    x = jnp.asarray(np.random.default_rng(1).integers(0, 5, (8, 16)), jnp.int32)
    tau = jnp.linspace(0.1, 3.0, 8)
    key = jax.random.key(3)
    sample = jax.jit(process.corrupt)
    whole = sample(key, x, tau=tau)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(8))
    np.testing.assert_array_equal(whole, sample(keys, x, tau=tau))
    np.testing.assert_array_equal(whole[4:], sample(keys[4:], x[4:], tau=tau[4:]))
    np.testing.assert_array_equal(whole[:3], sample(key, x[:3], tau=tau[:3]))
    assert len({tuple(r) for r in np.asarray(toy.level[np.asarray(whole)]).tolist()}) > 4


# ---- reverse process ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape, rates, xi", [CASES[0], CASES[1], CASES[3], CASES[4], CASES[6]])
@pytest.mark.parametrize("force", FORCES)
def test_posterior_is_the_oracle_s(shape, rates, xi, force):
    """Bayes over dense matrices; `within` below xi = 1 is allowed here."""
    toy, process = make(shape, rates, xi, force)
    z = np.arange(toy.N, dtype=np.int32)[:, None]
    logits = random_logits(toy.N, toy.V, seed=6)
    p = softmax(logits)[:, 0]
    posterior = jax.jit(process.posterior)
    for tau_s, tau_t in ((0.2, 0.9), (0.5, 6.0), (0.0, 1.0), (0.4, math.inf)):
        got = np.asarray(posterior(jnp.asarray(logits), jnp.asarray(z), tau_s, tau_t))[:, 0]
        assert got.shape == (toy.N, toy.N)
        for v in range(toy.N):
            if math.isinf(tau_t) and v != toy.mask:
                continue
            want = np.eye(toy.N)[v] if v < toy.V else toy.step(toy.force_one(p[v], v, force), v, tau_s, tau_t)
            np.testing.assert_allclose(got[v], want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    "shape, rates, xi, force, clusters",
    [
        (*CASES[0], "none", "exact"),
        (*CASES[1], "cavity", "exact"),
        (*CASES[3], "none", "exact"),
        (*CASES[3], "within", "exact"),
        (*CASES[4], "none", "exact"),
        (*CASES[6], "cavity", "exact"),
        (*CASES[6], "between", "exact"),
        (*CASES[6], "cavity", "clean"),
    ],
)
def test_descend_frequencies(shape, rates, xi, force, clusters):
    """Draws at every symbol and lower level follow Bayes given that level; where none falls, z stays."""
    toy, process = make(shape, rates, xi, force)
    rows = 8000
    cases = [(v, j) for v in range(toy.N) for j in range(toy.K + 1)]
    z = np.tile(np.array([v for v, _ in cases], np.int32), (rows, 1))
    target = np.tile(np.array([j for _, j in cases], np.int32), (rows, 1))
    logits = random_logits(toy.N, toy.V, seed=7)[[v for v, _ in cases], 0]
    p = softmax(logits)
    reverse_step = jax.jit(process.reverse_step, static_argnames="clusters")
    batch = jnp.broadcast_to(jnp.asarray(logits), (rows, *logits.shape))
    key = jax.random.key(4)
    out = np.asarray(reverse_step(key, batch, jnp.asarray(z), jnp.asarray(target), clusters=clusters))
    assert out.dtype == np.int32
    for i, (v, j) in enumerate(cases):
        if j >= toy.level[v]:
            assert (out[:, i] == v).all()
            continue
        words = toy.force_one(p[i], v, force)
        law = np.zeros(toy.N)
        if clusters == "clean" or j == 0:
            np.add.at(law, toy.offsets[j] + toy.anc[j], words)
        else:
            law = np.where(toy.level == j, toy.step(words, v, 0.4, 1.2), 0)
            law /= law.sum()
        counts = np.bincount(out[:, i], minlength=toy.N)
        assert np.abs(z_scores(counts, law)).max() < 4.8, (v, j)


def test_descend_draws_positions_and_rows_apart():
    """Two positions and two rows with the same distribution are independent draws."""
    toy, process = make(TWO, (1.0, 1.0), 1.0)
    rows = 20_000
    z = jnp.full((rows, 2), toy.mask)
    reverse_step = jax.jit(process.reverse_step)
    out = np.asarray(reverse_step(jax.random.key(5), jnp.zeros((rows, 2, 4)), z, jnp.zeros_like(z)))
    counts = np.zeros((4, 4))
    np.add.at(counts, tuple(out.T), 1)
    assert np.abs(z_scores(counts, np.full((4, 4), 1 / 16))).max() < 4.5
    counts = np.zeros((4, 4))
    np.add.at(counts, (out[::2, 0], out[1::2, 0]), 1)
    assert np.abs(z_scores(counts, np.full((4, 4), 1 / 16))).max() < 4.5


# ---- errors -------------------------------------------------------------------------------------


def test_errors_name_the_value_and_the_choices():
    hierarchy = Hierarchy.from_parents([[0, 1, 0, 1]])
    chain = LevelChain((1.0, 1.0))
    for xi in (0.5, 0.2, 1.1, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"xi={xi}"):
            HierarchicalProcess(hierarchy, chain, xi)
    with pytest.raises(ValueError, match="xi=0.9"):
        HierarchicalProcess(Hierarchy.from_parents([], vocab_size=4), LevelChain((1.0,)), 0.9)
    with pytest.raises(ValueError, match="rates"):
        HierarchicalProcess(hierarchy, LevelChain((1.0,)))
    with pytest.raises(ValueError, match="force_transition='both'.*none, within, between, cavity"):
        HierarchicalProcess(hierarchy, chain, 1.0, "both")
    process = HierarchicalProcess(hierarchy, chain)
    one = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ValueError, match="weighting='mean'"):
        loss_of(process, jnp.zeros((1, 1, 4)), one, one, jnp.ones(1), weighting="mean")
    with pytest.raises(ValueError, match="V=4"):
        process.token_loss(jnp.zeros((1, 1, 5)), one, one)
    with pytest.raises(ValueError, match="clusters='dirty'"):
        process.reverse_step(jax.random.key(0), jnp.zeros((1, 1, 4)), one, one, clusters="dirty")
