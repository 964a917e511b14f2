"""The oracle against itself: two derivations of the NELBO, and facts 1 to 6 of docs/theory.md section 3."""

import math

import numpy as np
import pytest
from oracle import (
    Toy,
    entropy,
    expm,
    level_beta,
    level_posterior,
    level_weight,
    quadrature,
    random_joint,
)

MDLM = dict(parents=[], vocab_size=4)
TWO = dict(parents=[[0, 1, 0, 1]])
THREE = dict(parents=[[0, 1, 2, 0, 2], [0, 1, 1]])
CASES = [
    (MDLM, (1.0,), 1.0),
    (TWO, (1.0, 1.0), 1.0),
    (TWO, (1.0, 2.0), 0.9),
    (TWO, (2.0, 1.0), 0.6),
    (THREE, (1.0, 1.0, 1.0), 1.0),
    (THREE, (1.0, 1.0, 1.0), 0.9),
    (THREE, (1.5, 1.0, 4.0), 0.6),
]


def _toy(shape, rates, xi):
    return Toy(rates=rates, xi=xi, **shape)


def test_expm_of_a_poisson_count():
    for tau in (1e-9, 1e-3, 0.4, 3.0, 20.0):
        beta = level_beta((1.0,) * 4, tau)
        poisson = [tau**k * math.exp(-tau) / math.factorial(k) for k in range(4)]
        np.testing.assert_allclose(beta[:4], poisson, rtol=1e-12)
        assert abs(beta.sum() - 1) < 1e-12
    a = np.array([[-3.0, 2.0, 1.0], [0.5, -1.0, 0.5], [0.0, 0.2, -0.2]])
    np.testing.assert_allclose(expm(a, 0.3) @ expm(a, 0.9), expm(a, 1.2), rtol=1e-12)


def test_levels_are_the_blocks_of_the_symbols():
    toy = _toy(THREE, (1.5, 1.0, 4.0), 0.6)
    for tau in (1e-3, 0.7, 6.0):
        q, beta = toy.q(tau), level_beta(toy.rates, tau)
        np.testing.assert_allclose(q.sum(1), 1, rtol=1e-12)
        for k in range(toy.K + 1):
            np.testing.assert_allclose(q[:, toy.level == k], beta[k] * toy.shown(k), rtol=1e-11)


@pytest.mark.parametrize("rates", [(1.0,), (1.0, 1.0), (0.5, 2.0), (0.25, 4.0, 1.0)])
def test_fact_1_each_level_is_crossed_once(rates):
    tau, weight = quadrature(rates)
    flow = sum(w * np.asarray(rates) * level_beta(rates, t)[:-1] for t, w in zip(tau, weight, strict=True))
    np.testing.assert_allclose(flow, 1, atol=1e-9)


@pytest.mark.parametrize("shape, rates, xi, kind", [
    (*case, kind) for kind in ("none", "between", "cavity", "within") for case in CASES
    if kind != "within" or case[2] == 1])  # infinite below xi = 1
def test_path_measure_rate_is_the_formula(shape, rates, xi, kind):
    """True against modelled reverse jumps = w_k C, for networks that know nothing."""
    toy = _toy(shape, rates, xi)
    rng = np.random.default_rng(1)
    for tau in (0.02, 1.3):
        reverse, weight = toy.reverse_rates(tau), level_weight(toy.rates, tau)
        for symbol in range(toy.N):
            p = toy.force_one(rng.dirichlet(np.ones(toy.V)), symbol, kind)
            for x in range(toy.V):
                k = toy.level[symbol]
                if kind == "within" and toy.shown(k)[x, toy.node[symbol]] == 0:
                    continue
                if xi == 1 and kind in ("between", "cavity") and toy.shown(k)[x, toy.node[symbol]] == 0:
                    continue
                want = weight[k - 1] * toy.cost_by_formula(p, x, symbol) if k else 0.0
                assert toy.rate(p, x, symbol, tau, reverse) == pytest.approx(want, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("shape, rates, xi", CASES)
@pytest.mark.parametrize("kind", ["none", "cavity"])
def test_fact_2_nelbo_of_the_optimum_is_the_entropy(shape, rates, xi, kind):
    toy = _toy(shape, rates, xi)
    joint = random_joint(toy.V, 2, seed=3)
    network = toy.force(toy.bayes(joint, cavity=kind == "cavity"), kind)
    assert (joint * toy.nelbo(network)).sum() == pytest.approx(entropy(joint), abs=1e-7)


def test_fact_2_three_positions():
    toy = _toy(TWO, (1.0, 0.5), 0.8)
    joint = random_joint(4, 3, seed=4)
    assert (joint * toy.nelbo(toy.bayes(joint))).sum() == pytest.approx(entropy(joint), abs=1e-7)


def test_within_equals_cavity_at_xi_one_and_is_exact():
    toy = _toy(THREE, (1.0, 2.0, 1.0), 1.0)
    joint = random_joint(5, 2, seed=5)
    cavity = toy.bayes(joint, cavity=True)
    np.testing.assert_allclose(toy.force(cavity, "within"), toy.force(cavity, "cavity"), atol=1e-14)
    noisy = toy.level[toy.sequences(2)] > 0  # at a word the output is not used
    np.testing.assert_allclose(toy.force(cavity, "cavity")[noisy], toy.bayes(joint)[noisy], atol=1e-12)


@pytest.mark.parametrize("xi, above", [(0.9, 0.005), (0.6, 0.02)])
def test_between_is_a_bound_but_not_lossless(xi, above):
    toy = _toy(TWO, (1.0, 1.0), xi)
    joint = random_joint(4, 2, seed=3)
    optimum = toy.bayes(joint)
    gap = (joint * toy.nelbo(toy.force(optimum, "between"))).sum() - entropy(joint)
    assert gap > above


def test_misreadings_of_the_cost_are_not_the_entropy():
    """Cross-entropy of the ancestor in place of the divergence; a divergence over all of a level's nodes."""
    toy = _toy(THREE, (1.0, 1.0, 1.0), 0.9)
    joint = random_joint(5, 2, seed=3)
    optimum = toy.bayes(joint)

    def table(cost):
        def rates(network, tau):
            weight = level_weight(toy.rates, tau)
            z = toy.sequences(2)
            out = np.zeros((len(z), 2, toy.V))
            for (row, i), symbol in np.ndenumerate(z):
                if toy.level[symbol]:
                    for x in range(toy.V):
                        out[row, i, x] = weight[toy.level[symbol] - 1] * cost(network[row, i], x, symbol)
            return out

        return rates

    def plain(p, x, symbol):
        k = toy.level[symbol]
        return -math.log(p[toy.anc[k - 1] == toy.anc[k - 1][x]].sum())

    def all_nodes(p, x, symbol):
        k = toy.level[symbol]
        if k == 1:
            return -math.log(p[x])
        m = toy.shown(k - 1)
        return (m[x] * np.log(m[x] / (p @ m))).sum()

    law = {}
    for tau, weight in zip(*quadrature(toy.rates, nodes=5), strict=True):
        for name, cost in (("plain", plain), ("all nodes", all_nodes), ("right", toy.cost_by_formula)):
            rates = table(cost)(optimum, tau)
            occupancy = toy.occupancy(tau, 2)
            words = toy.words(2)
            value = sum((occupancy * rates[:, i, words[:, i]].T).sum(1) for i in range(2))
            law[name] = law.get(name, 0) + weight * (joint.ravel() * value).sum()
    assert law["right"] == pytest.approx(entropy(joint), abs=1e-4)
    assert abs(law["plain"] - entropy(joint)) > 0.05
    assert abs(law["all nodes"] - entropy(joint)) > 0.01


@pytest.mark.parametrize("shape, rates, xi", CASES)
def test_fact_3_the_optimum_does_not_depend_on_time(shape, rates, xi):
    toy = _toy(shape, rates, xi)
    joint = random_joint(toy.V, 2, seed=6)
    np.testing.assert_allclose(toy.bayes(joint, tau=0.05), toy.bayes(joint, tau=4.0), rtol=1e-8)


@pytest.mark.parametrize("r_2", [0.3, 1.0, 4.0])
def test_fact_4_a_single_cluster_is_mdlm(r_2):
    flat, deep = Toy([], (1.0,), vocab_size=3), Toy([[0, 0, 0]], (1.0, r_2))
    network = flat.random_network(2, seed=7)
    rows = np.minimum(deep.sequences(2), flat.mask)  # the cluster and the mask look the same to it
    twin = network[rows[:, 0] * flat.N + rows[:, 1]]
    np.testing.assert_allclose(deep.nelbo(twin), flat.nelbo(network), atol=1e-8)


def test_fact_5_mdlm():
    for t in (1e-4, 0.3, 0.99):
        tau = -math.log1p(-t)
        assert level_weight((1.0,), tau)[0] / (1 - t) == pytest.approx(1 / t, rel=1e-10)


@pytest.mark.parametrize("shape, rates, xi", CASES)
def test_fact_6_the_nelbo_bounds_a_model_that_sums_to_one(shape, rates, xi):
    toy = _toy(shape, rates, xi)
    for kind in ("none", "cavity"):
        network = toy.force(toy.random_network(2, seed=8), kind)
        p = toy.p_model(network)
        assert p.sum() == pytest.approx(1, abs=1e-12)
        gap = toy.nelbo(network) + np.log(p)
        assert gap.min() > -1e-9 and gap.max() > 1e-4


@pytest.mark.parametrize("shape, rates, xi", CASES)
def test_one_drop_at_a_time_from_the_optimum_writes_the_data(shape, rates, xi):
    toy = _toy(shape, rates, xi)
    joint = random_joint(toy.V, 2, seed=9)
    np.testing.assert_allclose(toy.p_model(toy.bayes(joint)), joint, atol=1e-12)


def test_reverse_step_averages_back_to_the_marginal():
    toy = _toy(THREE, (1.5, 1.0, 4.0), 0.6)
    prior = random_joint(5, 1, seed=10)
    for tau_s, tau_t in ((0.2, 0.9), (0.0, 1.0), (0.9, 3.0), (0.5, math.inf)):
        q_t = np.eye(toy.N)[[toy.mask] * toy.V] if math.isinf(tau_t) else toy.q(tau_t)
        back = np.zeros(toy.N)
        for v in range(toy.N):
            p = prior * q_t[:, v]
            if p.sum() > 0:
                step = toy.step(p / p.sum(), v, tau_s, tau_t)
                assert step.sum() == pytest.approx(1, abs=1e-12)
                back += p.sum() * step
        np.testing.assert_allclose(back, prior @ toy.q(tau_s), rtol=1e-10, atol=1e-14)


def test_reverse_step_has_the_level_posterior():
    toy = _toy(THREE, (1.5, 1.0, 4.0), 0.6)
    p = random_joint(5, 1, seed=11)
    post = level_posterior(toy.rates, 0.3, 1.1)
    for v in range(toy.N):
        step = toy.step(p, v, 0.3, 1.1) if toy.level[v] else np.eye(toy.N)[v]
        by_level = [step[toy.level == j].sum() for j in range(toy.K + 1)]
        np.testing.assert_allclose(by_level, post[toy.level[v]], atol=1e-12)
