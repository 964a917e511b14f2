"""train.objective: every way of drawing states estimates the oracle's bound, by enumeration and through a step."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import Toy, level_beta, level_weight, quadrature

from hdlm_jax import config as config_lib
from hdlm_jax.config import Config, ConfigError, DiffusionConfig, TrainConfig
from hdlm_jax.data.pipeline import _Batches
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.levels import LevelChain
from hdlm_jax.training.state import build
from hdlm_jax.training.step import make_loss_sums
from hdlm_jax.training.views import after, crossing, make_view

ONE, TWO, THREE = dict(parents=[], vocab_size=3), dict(parents=[[0, 1, 0, 1]]), dict(parents=[[0, 1, 2, 0], [0, 1, 1]])
CASES = {"K=1": (ONE, (1.0,), 1.0, 3), "K=2": (TWO, (1.0, 2.0), 1.0, 2), "K=3": (THREE, (1.5, 1.0, 4.0), 1.0, 2),
         "K=2, xi=.7": (TWO, (2.0, 1.0), 0.7, 2)}


def make(case):
    """The toy, its process, a network that knows nothing as a table, a text, and the costs [Z, S] of its tokens."""
    shape, rates, xi, length = CASES[case]
    toy = Toy(rates=rates, xi=xi, **shape)
    hierarchy = Hierarchy.from_parents(shape["parents"], shape.get("vocab_size"))
    process = HierarchicalProcess(hierarchy, LevelChain(rates), xi)
    network, x = toy.random_network(length, seed=1), np.arange(length) * 2 % toy.V
    cost = [[0.0 if xi == 1 and toy.shown(toy.level[s])[x[i], toy.node[s]] == 0 else
             toy.cost_by_formula(network[row, i], x[i], s) for i, s in enumerate(z)]
            for row, z in enumerate(toy.sequences(length))]
    return toy, process, x, np.array(cost)


def nelbo(toy, x, cost, score):
    """The bound of a text whose other tokens are given: quadrature over noise time, every z enumerated."""
    z, total = toy.sequences(len(x)), 0.0
    for tau, part in zip(*quadrature(toy.rates), strict=True):
        q, rate = toy.q(tau), np.concatenate([[0.0], level_weight(toy.rates, tau)])
        law = np.prod([q[x[i], z[:, i]] if score[i] else z[:, i] == x[i] for i in range(len(x))], axis=0)
        total += part * (law[:, None] * rate[toy.level[z]] * cost * score).sum()
    return total


def crossings(toy, score):
    """Every crossing that can be drawn, its time, token and level and the levels of the other tokens: (time, crossing
    times [S, K], k, r, chance times the step of noise time), each of a text's K n crossings being equally likely."""
    tokens, rates = np.flatnonzero(score), np.asarray(toy.rates)
    for tau, part in zip(*quadrature(toy.rates), strict=True):
        beta = level_beta(toy.rates, tau)
        for i, k in itertools.product(tokens, range(toy.K)):
            for levels in itertools.product(range(toy.K + 1), repeat=len(tokens) - 1):
                times = np.full((len(score), toy.K), 99.0 * tau, np.float32)
                others = tokens[tokens != i]
                for j, level in zip((i, *others), (k + 1, *levels), strict=True):
                    times[j, :level] = 0.5 * tau
                times[i, k] = tau
                density = part * rates[k] * beta[k] * np.prod(beta[list(levels)])
                yield np.float32(tau), times, k, sum(level > k for level in levels), density / (toy.K * len(tokens))


@pytest.mark.parametrize("case, given, alone", [
    *[(case, given, False) for case in CASES for given in (False, True)], ("K=1", True, True), ("K=2", False, True)])
def test_crossings_are_unbiased(case, given, alone):
    """Every crossing at every time, every z just after it: the mean is the bound, to what float32 holds."""
    toy, process, x, cost = make(case)
    score, mean = np.arange(len(x)) >= given, 0.0
    n = int(score.sum())
    cells = np.arange(toy.K * n)
    k, r = crossing(jnp.asarray(cells), jnp.full(cells.shape, 0.5), len(cells), toy.K, jnp.full(cells.shape, n))
    assert sorted(zip(k.tolist(), r.tolist(), strict=True)) == list(itertools.product(range(toy.K), range(n)))
    at, times, k, r, chance = (np.array(a) for a in zip(*crossings(toy, score), strict=True))
    assert chance.sum() == pytest.approx(1)
    scored = jnp.broadcast_to(score, times.shape[:2])
    tau, level, weight = (np.asarray(a, float) for a in after(process.chain, times, k, r, scored, alone))
    np.testing.assert_array_equal(tau, at)
    if not alone:
        rates = np.array([[0.0, *level_weight(toy.rates, tau)] for tau in at.astype(float)])
        own = np.take_along_axis(rates, level.astype(int), 1)
        np.testing.assert_allclose(weight, toy.K * n * own / own.sum(1, keepdims=True), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(weight.sum(1), toy.K * n, rtol=1e-5)
    law = {pattern: np.prod([(toy.level[s] == pattern[i]) * np.array([
        toy.shown(pattern[i])[x[i], toy.node[one]] if toy.level[one] == pattern[i] else 0.0 for one in s])
        for i, s in enumerate(toy.sequences(len(x)).T)], axis=0) for pattern in set(map(tuple, level.astype(int)))}
    for probability, pattern, share in zip(chance, map(tuple, level.astype(int)), weight, strict=True):
        mean += probability * (law[pattern][:, None] * share * cost).sum()
    assert mean == pytest.approx(nelbo(toy, x, cost, score), rel=1e-6)


def drawn(case, objective, weighting="none", rows=1 << 15):
    """What a step sees of many rows of one text: (View, estimates of loss and bound [rows], the bound)."""
    toy, process, x, cost = make(case)
    config = Config(train=TrainConfig(objective=objective, batch_size=rows), diffusion=DiffusionConfig(
        weighting=weighting))
    texts, score = np.tile(x.astype(np.int32), (rows, 1)), np.ones((rows, len(x)), bool)
    view = jax.jit(make_view(config, process))(jax.random.key(3), jnp.arange(rows), texts, score)
    at = np.ravel_multi_index(np.asarray(view.z).T, (toy.N,) * len(x))
    scored = np.where(np.asarray(view.level) > 0, cost[at], 0.0)
    loss, bound = ((np.asarray(w, float) * scored).sum(1) for w in (view.weight, view.bound))
    return view, loss, bound, nelbo(toy, x, cost, np.ones(len(x), bool))


FAST = {("K=1", "rate"), ("K=1", "complementary"), ("K=2, xi=.7", "count"), ("K=3", "complementary"),
        ("K=3", "any_order")}


@pytest.mark.parametrize("case, objective", [
    pytest.param(case, objective, marks=() if (case, objective) in FAST else pytest.mark.slow)
    for case in CASES for objective in ("nelbo", "rate", "count", "any_order", "complementary")])
def test_a_view_estimates_the_bound(case, objective):
    """Through keys and strata as a step uses them; pairs of rows count as one draw."""
    view, loss, bound, exact = drawn(case, objective)
    np.testing.assert_allclose(loss, bound, rtol=1e-5)
    means = bound.reshape(-1, 2).mean(1)
    assert means.mean() == pytest.approx(exact, abs=4 * means.std() / len(means) ** 0.5)
    assert np.isfinite(np.asarray(view.tau)).all() and (np.asarray(view.t) < 1).all()


def test_the_loss_is_what_the_weighting_says():
    """diffusion.weighting means the same under every objective: the loss has one mean, the draws differ."""
    (_, plain, _, _), (_, count, bound, exact) = drawn("K=2", "nelbo", "constant"), drawn("K=2", "count", "constant")
    error = (plain.var() / len(plain) + count.var() / len(count)) ** 0.5
    assert count.mean() == pytest.approx(plain.mean(), abs=4 * error)
    assert bound.mean() == pytest.approx(exact, abs=4 * bound.std() / len(bound) ** 0.5)
    assert abs(count.mean() - exact) > 20 * error


def test_clusters_count_long_after_their_crossing():
    """At rates 50 : 1 a cluster's own weight is 0 in float32 from tau = 2 on; a constant one is not: one mean."""
    process = HierarchicalProcess(Hierarchy.from_parents([[0, 1, 0, 1]]), LevelChain((50.0, 1.0)))
    texts, score, told = np.zeros((1 << 12, 64), np.int32), np.ones((1 << 12, 64), bool), {}
    for objective in ("nelbo", "count"):
        config = Config(train=TrainConfig(objective=objective, batch_size=len(texts)), diffusion=DiffusionConfig(
            weighting="constant"))
        view = jax.jit(make_view(config, process))(jax.random.key(3), jnp.arange(len(texts)), texts, score)
        late = np.asarray((view.level == 1) & (view.tau > 2))
        told[objective] = np.where(late, np.asarray(view.weight, float), 0.0).sum(1)
    plain, count = told.values()
    error = (plain.var() / len(plain) + count.var() / len(count)) ** 0.5
    assert count.mean() == pytest.approx(plain.mean(), abs=4 * error) and plain.mean() > 8 * error


def test_counts_have_no_noise_where_costs_are_equal():
    """Weights sum to K n: k, r and the time do not matter; t uniform has the variance of 1/t."""
    view, *_ = drawn("K=3", "count", rows=64)
    np.testing.assert_allclose(np.asarray(view.bound).sum(1), 6, rtol=1e-5)
    assert ((np.asarray(view.bound) > 0) == (np.asarray(view.z) >= 4)).all()
    view, *_ = drawn("K=1", "count", rows=64)
    np.testing.assert_allclose(np.asarray(view.bound).sum(1), 3, rtol=1e-6)
    assert np.bincount((np.asarray(view.bound) > 0).sum(1)).tolist()[1:] in ([21, 22, 21], [22, 21, 21], [21, 21, 22])


def test_partners_are_complements():
    """Masks of a pair: every token in one of them; with clusters each row has its own time's law of levels."""
    view, *_ = drawn("K=1", "complementary", rows=256)
    masked = (np.asarray(view.level) > 0).reshape(-1, 2, 3)
    assert (masked[:, 0] != masked[:, 1]).all() and 0 < masked.mean() < 1
    np.testing.assert_allclose(np.asarray(view.t).reshape(-1, 2).sum(1), 1, rtol=1e-6)
    view, *_ = drawn("K=3", "complementary")
    level, tau = np.asarray(view.level)[1::2], np.asarray(view.tau, float)[1::2, 0]
    law = np.asarray(LevelChain(CASES["K=3"][1]).beta(tau, np))
    for k in range(4):
        assert (level == k).mean() == pytest.approx(law[:, k].mean(), abs=0.01)


def test_two_rows_a_text():
    """The data's half of it: texts are repeated, rows are numbered through, of all processes."""
    rows = [_Batches(False, 0, 4, 6, process_index=i, process_count=2, partners=2) for i in (0, 1)]
    x = np.arange(12, dtype=np.int32).reshape(3, 4)
    batches = [one._batch(x + 100 * i, np.ones((3, 4), bool), np.full(3, 4), np.full(3, 4))
               for i, one in enumerate(rows)]
    assert [b["index"].tolist() for b in batches] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert (batches[1]["x"][::2] == x + 100).all() and (batches[1]["x"][1::2] == x + 100).all()
    assert batches[0]["index"].dtype == np.int32 and rows[0].example()["x"].shape == (6, 4)


SEQ, ROWS = 8, 16


def settings(**changes):
    c = config_lib.default()
    c.tokenizer.kind, c.tokenizer.vocab_size = "bytes", 257
    c.hierarchy.clusters = (4,)
    c.diffusion.weighting = "none"
    c.model.width, c.model.blocks, c.model.heads, c.model.seq_len = 16, 1, 2, SEQ
    c.train.batch_size = ROWS
    for name, value in changes.items():
        section, field = name.split("__")
        c[section][field] = value
    return config_lib.resolve(c)


@pytest.mark.parametrize("objective, head", [("count", "flat"), ("any_order", "flat"), ("count", "factorised")])
def test_a_step_of_a_network_that_knows_nothing(objective, head):
    """Zero logits cost log 6 a level of a scored token, whichever crossings are drawn: prompts and ends of rows do not
    count."""
    config = settings(train__objective=objective, model__head=head)
    network, process = build(config, Hierarchy.from_parents([np.arange(36) % 6]))
    params = network.init_params(jax.random.key(0), SEQ)
    params = {**params, "head": jax.tree.map(jnp.zeros_like, params["head"])}
    score = np.ones((ROWS, SEQ), bool)
    score[:4, :5], score[4] = False, False  # rows of a prompt, one that is given whole
    x = np.arange(ROWS * SEQ, dtype=np.int32).reshape(ROWS, SEQ) % 36
    batch = {"x": x, "index": np.arange(ROWS), "score": score}
    loss, bound, tokens = jax.jit(make_loss_sums(config, network, process))(params, batch, jax.random.key(1))
    assert float(tokens) == score.sum()
    assert float(bound) == pytest.approx(score.sum() * np.log(36), rel=1e-5)
    assert float(loss) == pytest.approx(float(bound), rel=1e-6)


@pytest.mark.parametrize("changes, words", [
    (dict(train__objective="counts"), "train.objective='counts': choose one of"),
    (dict(train__objective="count", diffusion__process="sedd", hierarchy__clusters=(1,)), "diffusion.process='sedd'"),
    (dict(train__objective="complementary", diffusion__process="gidd", diffusion__weighting="dynamic",
          hierarchy__clusters=(1,)), "choose 'nelbo'"),
    (dict(train__objective="rate"), "knows no clusters"),
    (dict(train__objective="rate", hierarchy__clusters=(1,), diffusion__weighting="constant"), "give 'none'"),
    (dict(train__objective="complementary", train__batch_size=15), "train.batch_size=15: "),
])
def test_what_does_not_go_together_is_one_line(changes, words):
    with pytest.raises(ConfigError) as error:
        settings(**changes)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_default_is_the_bound():
    assert settings().train.objective == "nelbo" and settings().train.partners == 1
    assert dataclasses.replace(settings().train, objective="complementary").partners == 2
