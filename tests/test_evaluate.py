"""The exact evaluation: every token once, any batch and device count the same, honest standard errors."""

import functools
import math

import jax
import numpy as np
import pytest

from hdlm_jax import config as config_lib
from hdlm_jax.common import parallel
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.levels import LevelChain, Proposal
from hdlm_jax.evaluation.elbo import Evaluator, summarise
from hdlm_jax.training.state import build, init_state, make_optimizer

V, S = 40, 8
HIERARCHY = Hierarchy.from_parents([np.arange(V) % 6, np.arange(6) % 2])
FLAT = Hierarchy.from_parents([], vocab_size=V)


def make_config(hierarchy, batch_size=8, **evaluate):
    c = config_lib.default()
    c.tokenizer.kind, c.tokenizer.vocab_size = "bytes", 257
    c.hierarchy.clusters = hierarchy.sizes[1:-1]
    c.model.width, c.model.blocks, c.model.heads, c.model.seq_len = 16, 1, 2, S
    c.evaluate.batch_size = batch_size
    c.evaluate.update(evaluate)
    return config_lib.resolve(c)


def make_rows(n=21):
    rng = np.random.default_rng(0)
    valid = np.ones((n, S), bool)
    valid[-1, 3:] = False
    return {"x": rng.integers(0, V, (n, S)).astype(np.int32), "segment": valid.astype(np.int32) - 1, "score": valid}


@functools.cache
def start_params(hierarchy, warm):
    """Host parameters: fresh (zero head), or with nothing at zero."""
    config = make_config(hierarchy)
    network, _ = build(config, hierarchy)
    tx, _ = make_optimizer(config)
    params = jax.jit(lambda k: init_state(config, network, tx, k))(jax.random.key(0)).params
    rng = np.random.default_rng(4)
    noise = 0.3 if warm else 0.0
    return jax.tree.map(lambda a: np.float32(a + noise * rng.standard_normal(a.shape)), params)


def make_evaluator(hierarchy, batch_size=8, devices=1, seed=0, warm=True):
    config = make_config(hierarchy, batch_size, seed=seed)
    network, process = build(config, hierarchy)
    mesh = parallel.make_mesh(config, jax.devices()[:devices])
    params = jax.device_put(start_params(hierarchy, warm), parallel.replicated(mesh))
    return Evaluator(network, process, mesh, params, seq_len=config.model.seq_len, seed=seed, cv2=config.evaluate.cv2,
                     batch_size=batch_size), params


def test_products_of_what_is_measured_are_float32(monkeypatch):
    """Not what an accelerator takes for float32 by default: bfloat16 passes on a TPU, TF32 on a GPU."""
    evaluator, params = make_evaluator(HIERARCHY)
    network = type(build(make_config(HIERARCHY), HIERARCHY)[0])
    seen, trunk = [], network.trunk

    def traced(self, *args):
        seen.append(jax.config.jax_default_matmul_precision)
        return trunk(self, *args)

    monkeypatch.setattr(network, "trunk", traced)
    evaluator.nats(params, make_rows(8), 1)
    assert seen and set(seen) == {"highest"} and jax.config.jax_default_matmul_precision is None


def measure(hierarchy, draws, batch_size=8, devices=1, warm=True, rows=None):
    evaluator, params = make_evaluator(hierarchy, batch_size, devices, warm=warm)
    return evaluator.nats(params, rows or make_rows(), draws)


@pytest.mark.slow
def test_does_not_depend_on_batch_size_or_devices():
    reference, tau, q = measure(HIERARCHY, 3)
    for batch_size, devices in [(5, 1), (64, 1), (16, 8)]:
        nats, tau2, q2 = measure(HIERARCHY, 3, batch_size, devices)
        np.testing.assert_array_equal(tau, tau2)
        np.testing.assert_allclose(nats, reference, rtol=2e-5, atol=2e-3)  # float32 of hundreds of nats
        a, b = (summarise(n, make_rows()["score"].sum(-1), tau, q)["nelbo"] for n in (nats, reference))
        assert a == pytest.approx(b, rel=1e-6)


@pytest.mark.parametrize("hierarchy", [FLAT, HIERARCHY], ids=["K1", "K3"])
def test_uniform_network_costs_log_v_per_token(hierarchy):
    """A zero head says 1/V of every word: the NELBO is log V exactly, split over levels by the sizes of clusters."""
    rows = make_rows(64)
    draws = 48
    nats, tau, q = measure(hierarchy, draws, 64, warm=False, rows=rows)
    tokens = rows["score"].sum(-1)
    result = summarise(nats, tokens, tau, q)
    assert result["tokens"] == tokens.sum() == 64 * S - 5
    assert abs(result["nelbo"] - math.log(V)) < 4 * result["se_time"]
    assert result["se_time"] < 0.05
    share = np.array([hierarchy.token_count[k][hierarchy.anc[k][rows["x"]]] for k in range(hierarchy.num_levels + 1)])
    ratio = (np.log(share[1:] / share[:-1]) * rows["score"]).sum((1, 2)) / tokens.sum()
    np.testing.assert_allclose(result["levels"], ratio, atol=0.12)


def test_pairs_are_stratified_jointly_and_per_pass():
    evaluator, _ = make_evaluator(HIERARCHY)
    n, draws = 30, 4
    tau, q = evaluator.pairs(n, draws)
    p = evaluator.proposal
    u = np.interp(tau, p.knots, p.cdf)
    np.testing.assert_array_equal(np.sort(np.floor(u * n * draws + 1e-9).astype(int), axis=None), np.arange(n * draws))
    for one_pass in u:
        np.testing.assert_array_equal(np.sort(np.floor(one_pass * n + 1e-9).astype(int)), np.arange(n))
    assert not np.array_equal(np.argsort(u[0]), np.argsort(u[1]))
    assert (q > 0).all()


@pytest.mark.parametrize("draws", [1, 2, 6])
@pytest.mark.parametrize("lengths", [(10,), (1, 4, 60)], ids=["even", "uneven"])
def test_standard_errors_hold_what_they_say(draws, lengths):
    """On a synthetic split the errors said are those seen: of sequences and noise together, and of the noise alone.

    The rate falls with noise time by what strata fix; sequences differ, and so do draws of one.
    """
    rng = np.random.default_rng(1)
    n, reps, proposal = 400, 150, Proposal(LevelChain((1.0,)), 16, 0.1)
    tokens = np.resize(lengths, n)
    found, seen, alone = [], [], []
    for _ in range(reps):
        kind = 3 + 0.4 * rng.standard_normal(n) / np.sqrt(tokens)  # a sequence's nats per token
        once = []
        for _ in range(2):  # the same sequences twice, for the noise alone
            place = np.stack([rng.permutation(n) for _ in range(draws)])
            part = np.stack([rng.permutation(draws) for _ in range(n)], axis=1)
            u = (place * draws + np.take_along_axis(part, place, axis=1) + rng.random((draws, n))) / (n * draws)
            tau, q = proposal.quantile(u)
            rate = np.exp(-tau) * (kind + 0.6 * rng.standard_normal((draws, n)) / np.sqrt(tokens))
            once.append(summarise((tokens * rate / q)[..., None], tokens, tau, q))
        found.append(once[0])
        seen.append(once[0]["nelbo"])
        alone.append(once[0]["nelbo"] - once[1]["nelbo"])
    said = math.sqrt(np.mean([r["se"] ** 2 for r in found]))
    assert np.std(seen, ddof=1) == pytest.approx(said, rel=0.2)  # 150 of them: 6% of chance
    assert abs(np.mean(seen) - 3) < 4 * said / math.sqrt(reps)
    assert np.std([r["se"] for r in found]) < 0.25 * said  # and each of them is near: two passes alone would not do
    if draws > 1:
        noise = math.sqrt(np.mean([r["se_time"] ** 2 for r in found]))
        assert np.std(alone, ddof=1) / math.sqrt(2) == pytest.approx(noise, rel=0.2)
    else:
        assert math.isnan(found[0]["se_time"])


def test_errors_without_noise():
    """An exact process: the spread of sequences about their common mean, however like their neighbours they are."""
    tokens, nats = np.full(100, 8), np.repeat(np.arange(10.0), 10) * 8
    result = summarise(nats[None, :, None], tokens, np.zeros((1, 100)), np.ones((1, 100)))
    assert result["se"] == pytest.approx(np.std(nats / 8, ddof=1) / 10, rel=0.02)
    assert math.isnan(summarise(nats[None, :1, None], tokens[:1], np.zeros((1, 1)), np.ones((1, 1)))["se"])


def test_se_time_matches_repetitions():
    """The noise's own error is the spread seen over its seeds; of so few pairs neighbours say somewhat too much."""
    rows = make_rows(32)
    tokens = rows["score"].sum(-1)
    evaluator, params = make_evaluator(HIERARCHY, 64)
    results = []
    for evaluator.seed in range(12):
        nats, tau, q = evaluator.nats(params, rows, 4)
        results.append(summarise(nats, tokens, tau, q))
    seen = np.std([r["nelbo"] for r in results], ddof=1)
    said = math.sqrt(np.mean([r["se_time"] ** 2 for r in results]))
    assert 0.35 * said < seen < 1.6 * said


def test_proposal_beats_uniform_time():
    """docs/theory.md for K = 1, S = 1024, cv^2 = .03: q_a has about a third of the variance of t uniform."""
    chain = LevelChain((1.0,))
    rng = np.random.default_rng(0)
    n, draws = 20_000, 4
    sequence = 1 + math.sqrt(0.03) * rng.standard_normal(n)
    place = np.stack([rng.permutation(n) for _ in range(draws)])
    tau, q = Proposal(chain, 1024, 0.03).quantile((place + rng.random((draws, n))) / n)
    # sequences of 1024 tokens with independent levels, cost 1 each, times a factor of the sequence
    nats = chain.weight(tau, np)[..., 0] * rng.binomial(1024, -np.expm1(-tau)) * sequence / q
    result = summarise(nats[..., None], np.full(n, 1024), tau, q)
    assert result["nelbo"] == pytest.approx(sequence.mean(), abs=4 * result["se_time"])
    assert result["se_data"] ** 2 * n == pytest.approx(0.03, rel=0.05)
    assert 2.0 < result["uniform_t_variance"] < 4.5
