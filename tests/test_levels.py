"""LevelChain and Proposal against the oracle's dense 64-bit matrices (docs/theory.md sections 2 and 3)."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from hdlm_jax.diffusion.levels import LevelChain, Proposal

RATES = [
    (1.0,),
    (1.0, 1.0),
    (0.25, 4.0),
    (2.0, 0.25),
    (1.0, 1.0, 1.0),
    (4.0, 0.25, 1.0),
    (1.0, 1.0, 1.0, 1.0),
    (0.25, 1.0, 4.0, 0.5),
    (4.0, 4.0, 0.25, 4.0),
]
TAU = np.concatenate([np.geomspace(1e-6, 20, 25), [0.5, 1.0, 19.9]]).astype(np.float32)


@pytest.mark.parametrize("rates", RATES)
def test_beta_and_weight_in_float32(rates):
    chain = LevelChain(rates)
    beta, weight = jax.jit(lambda t: (chain.beta(t), chain.weight(t)))(jnp.asarray(TAU))
    assert beta.dtype == weight.dtype == jnp.float32
    assert beta.shape == (len(TAU), len(rates) + 1) and weight.shape == (len(TAU), len(rates))
    want = [oracle.level_beta(rates, float(t)) for t in TAU]
    np.testing.assert_allclose(beta, want, rtol=1e-5)
    np.testing.assert_allclose(weight, [oracle.level_weight(rates, float(t)) for t in TAU], rtol=1e-5)


@pytest.mark.parametrize("rates", RATES)
def test_weight_down_to_tiny_times(rates):
    tau = np.geomspace(1e-12, 1e-6, 13).astype(np.float32)
    weight = jax.jit(LevelChain(rates).weight)(jnp.asarray(tau))
    np.testing.assert_allclose(weight, [oracle.level_weight(rates, float(t)) for t in tau], rtol=1e-5)
    np.testing.assert_allclose(weight[0] * tau[0], np.arange(1, len(rates) + 1), rtol=1e-5)  # w_k -> k/tau


@pytest.mark.parametrize("rates", RATES)
def test_transition_and_posterior_in_float32(rates):
    chain = LevelChain(rates)
    transition = jax.jit(chain.transition)(jnp.asarray(TAU))
    want = np.array([oracle.expm(oracle.level_generator(rates), float(t)) for t in TAU])
    np.testing.assert_allclose(transition, want, rtol=1e-5)
    pairs = np.array([p for p in itertools.product(TAU[::4], TAU[::3]) if p[0] < p[1]])
    posterior = jax.jit(chain.posterior)(jnp.asarray(pairs[:, 0]), jnp.asarray(pairs[:, 1]))
    want = np.array([oracle.level_posterior(rates, float(s), float(t)) for s, t in pairs])
    np.testing.assert_allclose(posterior, want, rtol=1e-5, atol=1e-37)


def test_posterior_at_the_ends():
    rates = (1.0, 2.0, 0.5)
    chain = LevelChain(rates)
    posterior = jax.jit(chain.posterior)
    for tau_s in (1e-6, 0.3, 7.0):
        np.testing.assert_allclose(posterior(tau_s, jnp.inf)[-1], oracle.level_beta(rates, tau_s), rtol=1e-5)
    words = np.eye(4)[[0, 0, 0, 0]]
    np.testing.assert_allclose(posterior(0.0, 1.5), words, rtol=2e-7)  # tau_s = 0: everything is a word
    np.testing.assert_array_equal(posterior(0.0, jnp.inf)[-1], words[-1])
    np.testing.assert_allclose(posterior(1.5, 1.5), np.eye(4), atol=1e-6)
    assert np.isfinite(np.asarray(posterior(0.0, 0.0))).all()


def test_other_shapes_and_numpy_float64():
    rates = (4.0, 0.25, 1.0)
    chain = LevelChain(rates)
    assert chain.num_levels == 3
    assert chain.beta(0.3).shape == (4,)
    assert chain.beta(jnp.ones((2, 5))).shape == (2, 5, 4)
    assert chain.weight(jnp.ones((2, 5))).shape == (2, 5, 3)
    assert chain.transition(jnp.ones((2, 5))).shape == (2, 5, 4, 4)
    for t in (1e-12, 0.3, 30.0):
        np.testing.assert_allclose(chain.beta(np.array(t), np), oracle.level_beta(rates, t), rtol=1e-12)
        np.testing.assert_allclose(chain.weight(np.array(t), np), oracle.level_weight(rates, t), rtol=1e-11)


def test_paper_schedule():
    """r = (gamma, 1) in uniform time: the closed forms the paper is written in."""
    t = np.array([0.01, 0.3, 0.9], np.float32)
    for gamma in (0.5, 2.0, 3.0):
        beta = np.asarray(LevelChain((gamma, 1.0)).beta(jnp.asarray(-np.log1p(-t))))
        np.testing.assert_allclose(beta[:, 0], (1 - t) ** gamma, rtol=1e-5)
        b_1 = gamma * (1 - t) * (1 - (1 - t) ** (gamma - 1)) / (gamma - 1)
        np.testing.assert_allclose(beta[:, 1], b_1, rtol=2e-5)


def test_scaling_all_rates_relabels_time():
    a, b = LevelChain((1.0, 2.0)), LevelChain((3.0, 6.0))
    np.testing.assert_allclose(a.beta(0.6), b.beta(0.2), rtol=1e-6)
    np.testing.assert_allclose(3 * a.weight(0.6), b.weight(0.2), rtol=1e-6)


@pytest.mark.parametrize("rates", [(), (1.0, 0.0), (1.0, -1.0), (math.inf,), (math.nan, 1.0)])
def test_bad_rates(rates):
    with pytest.raises(ValueError, match="rates"):
        LevelChain(rates)


@pytest.mark.parametrize("rates", [(1.0,), (1.0, 1.0, 1.0), (4.0, 0.25, 1.0)])
def test_crossing_times_law(rates):
    """Cumulated, increasing, and the number of times <= tau has the law beta(tau)."""
    n, chain = 200_000, LevelChain(rates)
    times = np.asarray(chain.crossing_times(jax.random.key(0), (n // 2, 2)))
    assert times.shape == (n // 2, 2, len(rates)) and times.dtype == np.float32
    assert (times[..., 0] >= 0).all() and (np.diff(times, axis=-1) >= 0).all()
    for tau in (0.05, 0.7, 3.0):
        level = (times <= tau).sum(-1)
        beta = oracle.level_beta(rates, tau)
        share = np.bincount(level.ravel(), minlength=len(beta)) / n
        assert (np.abs(share - beta) < 4.5 * np.sqrt(beta * (1 - beta) / n) + 1e-9).all(), (tau, share, beta)
    waits = np.diff(times, axis=-1, prepend=0).reshape(n, -1)
    np.testing.assert_allclose(waits.mean(0) * rates, 1, atol=4.5 / math.sqrt(n))
    # independent of each other and of the neighbouring token
    both = np.concatenate([waits[::2], waits[1::2]], axis=1)
    off = np.corrcoef(both.T) - np.eye(both.shape[1])
    assert np.abs(off).max() < 4.5 / math.sqrt(n / 2)


@pytest.mark.parametrize(
    "rates, tokens, cv2",
    [((1.0,), 1, 1.0), ((1.0, 1.0), 1024, 0.03), ((1.0,) * 3, 64, 1.0), ((4.0, 0.5, 1.0), 1024, 0.1)],
)
def test_proposal_is_unbiased(rates, tokens, cv2):
    """Fact 1 through the table: E r_k beta_{k-1}/q = 1, because q is the slope of the table."""
    chain = LevelChain(rates)
    proposal = Proposal(chain, tokens, cv2)
    draws = 20_000
    tau, q = proposal.quantile((np.arange(draws) + 0.5) / draws)
    assert tau.dtype == q.dtype == np.float64 and (np.diff(tau) > 0).all() and (q > 0).all()
    beta = chain.beta(tau, np)
    # what is left out beyond the last knot is 1e-9 of a crossing; the rest is the midpoint rule in each cell
    np.testing.assert_allclose((np.asarray(rates) * beta[:, :-1] / q[:, None]).mean(0), 1, atol=2e-3)
    # a table of few cells must be as unbiased as a fine one: divide by its slope, not by the formula
    coarse = Proposal(chain, tokens, cv2, knots=24)
    tau, q = coarse.quantile((np.arange(draws) + 0.5) / draws)
    flow = np.asarray(rates) * chain.beta(tau, np)[:, :-1]
    np.testing.assert_allclose((flow / q[:, None]).mean(0), 1, atol=2e-3)


@pytest.mark.parametrize("rates", [(1.0,), (4.0, 0.25, 1.0)])
def test_proposal_table(rates):
    chain = LevelChain(rates)
    proposal = Proposal(chain, 64, 0.1)
    knots, cdf, slope = proposal.knots, proposal.cdf, proposal.slope
    assert knots[0] == 0 and cdf[0] == 0 and cdf[-1] == 1
    assert (np.diff(knots) > 0).all() and (np.diff(cdf) > 0).all()
    np.testing.assert_allclose((slope * np.diff(knots)).sum(), 1, rtol=1e-12)
    left = 1 - oracle.level_beta(rates, knots[-1])[-1]
    assert left < 2e-9
    # between knots the quantile is linear and q is its slope
    u = np.linspace(0.001, 0.999, 7)
    tau, q = proposal.quantile(u)
    np.testing.assert_allclose(np.interp(tau, knots, cdf), u, rtol=1e-9)
    np.testing.assert_array_equal(q, slope[np.searchsorted(knots, tau, side="right") - 1])
    # and it follows q_a ~ sqrt((g - m^2)/S + a m^2)
    middle = np.sqrt(knots[1:-1] * knots[2:])

    def formula(t):
        beta = oracle.level_beta(rates, t)
        flow = np.asarray(rates) * beta[:-1]
        return math.sqrt(max((flow**2 / beta[1:]).sum() - flow.sum() ** 2, 0) / 64 + 0.1 * flow.sum() ** 2)

    want = np.array([formula(t) for t in middle[::40]])
    ratio = slope[1:][::40] / want
    near = (middle[::40] > 1e-6) & (middle[::40] < 5)
    np.testing.assert_allclose(ratio[near], ratio[near].mean(), rtol=5e-3)


@pytest.mark.parametrize("rates", [(1.0,), (1.0, 1.0), (1.0, 1.0, 1.0)])
def test_proposal_has_less_variance_than_uniform_time(rates):
    """Second moment of the estimate for S tokens that cost 1 at every crossing, against t uniform."""
    chain, tokens, draws = LevelChain(rates), 1024, 20_000
    u = (np.arange(draws) + 0.5) / draws

    def second_moment(tau, q):
        beta = chain.beta(tau, np)
        flow = np.asarray(rates) * beta[:, :-1]
        within = ((flow * chain.weight(tau, np)).sum(-1) - flow.sum(-1) ** 2) / tokens
        return (within / q**2).mean()

    tau = -np.log1p(-u)
    assert second_moment(*Proposal(chain, tokens).quantile(u)) < 0.9 * second_moment(tau, np.exp(-tau))
