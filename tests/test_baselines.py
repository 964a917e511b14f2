"""GIDD, SEDD-absorb and the autoregressive model beside the hierarchical process, against enumeration."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny

from hdlm_jax import config as configs
from hdlm_jax.diffusion import autoregressive, gidd
from hdlm_jax.diffusion.autoregressive import AutoregressiveProcess
from hdlm_jax.diffusion.gidd import GiddProcess
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.levels import LevelChain
from hdlm_jax.diffusion.sedd import SeddProcess

V = 4
WORDS = Hierarchy.from_parents([], V)
MASK = WORDS.mask_id
TIMES = (1e-4, 0.03, 0.4, 0.9, 0.9999)


def tau_of(t):
    return -math.log1p(-t)




def random_p(seed, *shape):
    return np.random.default_rng(seed).dirichlet(np.full(V, 0.5), shape)


# -- GIDD ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p_uniform", [0.0, 0.1, 0.5])
def test_the_oracle_s_marginals_belong_to_its_transitions(p_uniform):
    toy = oracle.Gidd(V, p_uniform)
    np.testing.assert_allclose(toy.marginal(0.2) @ toy.transition(0.2, 0.7), toy.marginal(0.7), atol=1e-15)
    assert toy.transition(0.2, 0.7).min() >= 0
    words = toy.marginal(0.5)[0, :V].sum() - toy.alpha_mix(0.5)[0]
    assert words == pytest.approx(p_uniform)  # the share of random words at t = 1/2


@pytest.mark.parametrize("p_uniform", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("t", [0.03, 0.5, 0.97])
def test_gidd_noise_has_its_marginal(p_uniform, t):
    rows, process = 40_000, GiddProcess(WORDS, p_uniform)
    x = jnp.full((rows, 2), 2)
    z = np.asarray(jax.jit(process.corrupt)(jax.random.key(3), x, tau=jnp.full(rows, tau_of(t))))
    want = oracle.Gidd(V, p_uniform).marginal(t)[2]
    got = np.bincount(z.reshape(-1), minlength=V + 1) / z.size
    assert np.all(np.abs(got - want) < 4.5 * np.sqrt(want * (1 - want) / z.size) + 1e-12)


@pytest.mark.parametrize("p_uniform", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("t", TIMES)
def test_gidd_s_rate_is_that_of_the_jump_processes(p_uniform, t):
    """For every word, every symbol on show and random predictions, in float32 against rates in float64."""
    process, toy = GiddProcess(WORDS, p_uniform), oracle.Gidd(V, p_uniform)
    x, z = (a.reshape(-1) for a in np.meshgrid(np.arange(V), np.arange(V + 1)))
    seen = [i for i in range(x.size) if toy.marginal(t)[x[i], z[i]] > 0]
    x, z = x[seen], z[seen]
    p = random_p(1, len(x))
    got = process.nelbo_rate(jnp.log(p)[:, None], x[:, None], z[:, None], jnp.full(len(x), tau_of(t)))[:, 0]
    step = 1e-6 if t < 0.99 else 1e-8
    want = [(1 - t) * toy.nelbo_rate(p[i], x[i], z[i], t, step) for i in range(len(x))]
    np.testing.assert_allclose(got, want, rtol=2e-3 if t == 0.9999 else 5e-4, atol=2e-5 if t == 0.9999 else 2e-6)


def cavity(toy, joint, z, t, position):
    """p(x_i | the other positions) of a joint over two words."""
    other = 1 - position
    seen = toy.marginal(t)[:, z[other]]
    p = (joint * (seen[None] if position == 0 else seen[:, None])).sum(other)
    return p / p.sum()


@pytest.mark.parametrize("p_uniform", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_gidd_s_bound_is_the_entropy_for_the_network_that_knows_the_data(p_uniform):
    joint, toy, process = oracle.random_joint(V, 2, seed=5), oracle.Gidd(V, p_uniform), GiddProcess(WORDS, p_uniform)
    # t = sin^2(pi u/2): the square roots at both ends of time become smooth
    nodes, weights = np.polynomial.legendre.leggauss(60)
    u = (nodes + 1) / 2
    t, dt = np.sin(np.pi * u / 2) ** 2, np.pi / 2 * np.sin(np.pi * u) * weights / 2
    rest = np.cos(np.pi * u / 2) ** 2
    pairs = list(itertools.product(range(V), repeat=2))
    shown = list(itertools.product(range(V + 1), repeat=2))
    total = 0.0
    for time, left, width in zip(t, rest, dt, strict=True):
        q = toy.marginal(time)
        p = np.array([[cavity(toy, joint, z, time, i) for i in (0, 1)] for z in shown])
        logits = jnp.asarray(np.log(p + 1e-30), jnp.float32)
        for x in pairs:
            if joint[x] < 1e-12:
                continue
            z = np.array(shown)
            chance = np.array([q[x[0], a] * q[x[1], b] for a, b in shown])
            rate = process.nelbo_rate(logits, jnp.broadcast_to(jnp.array(x), z.shape), jnp.asarray(z),
                                      jnp.full(len(z), -math.log(left)))
            total += joint[x] * np.sum(chance * np.asarray(rate, np.float64).sum(-1)) / left * width
    assert total == pytest.approx(oracle.entropy(joint), abs=3e-3)


def test_gidd_without_random_words_is_mdlm():
    process, mdlm = GiddProcess(WORDS, 0.0), HierarchicalProcess(WORDS, LevelChain((1.0,)))
    x, z = jnp.array([[0, 1, 2, 3]]), jnp.array([[MASK, 1, MASK, MASK]])
    logits = jnp.log(random_p(2, 1, 4))
    for t in TIMES:
        tau = jnp.array([tau_of(t)])
        np.testing.assert_allclose(process.nelbo_rate(logits, x, z, tau), mdlm.nelbo_rate(logits, x, z, tau), rtol=1e-5)
    np.testing.assert_array_equal(process.noised(jax.random.key(0), x, jnp.array([1.0]), x > 0)[1][:, :1], 0)


@pytest.mark.parametrize("p_uniform", [0.0, 0.2])
def test_gidd_s_weights(p_uniform):
    """Dynamic: the NELBO's weights over that of a wrong word; clip and none the NELBO's own for t uniform."""
    process = GiddProcess(WORDS, p_uniform)
    x, z = jnp.array([[0, 0, 0]]), jnp.array([[MASK, 1, 0]])
    for t in (0.1, 0.7):
        tau = jnp.array([tau_of(t)])
        own = process.nelbo_weight(z, tau, x) / (1 - t)
        np.testing.assert_allclose(own[0, :2], [1 / (t * (1 - t)), 1 / (2 * t * (1 - t))], rtol=1e-5)
        np.testing.assert_allclose(process.loss_weight(z, tau, "dynamic", x=x), own / own[0, 1], rtol=1e-5)
        np.testing.assert_allclose(process.loss_weight(z, tau, "none", x=x), own, rtol=1e-5)
        np.testing.assert_allclose(process.loss_weight(z, tau, "clip", 0.5, 3.0, x=x), jnp.clip(own, 0.5, 3), rtol=1e-5)
    with pytest.raises(ValueError, match="choose one of none, constant, clip, dynamic"):
        process.loss_weight(z, tau, "empirical", x=x)


@pytest.mark.parametrize("p_uniform", [0.0, 0.2])
@pytest.mark.parametrize(("s", "t"), [(0.3, 0.35), (0.0, 0.5), (0.6, 1.0)])
def test_gidd_s_posterior_and_its_draws(p_uniform, s, t):
    process, toy, p = GiddProcess(WORDS, p_uniform), oracle.Gidd(V, p_uniform), random_p(7)
    shown = np.arange(V + 1) if t < 1 else np.array([MASK])
    want = np.array([toy.posterior(p, s, min(t, 1 - 1e-12))[z] for z in shown])
    tau_t = tau_of(t) if t < 1 else np.inf
    logits = jnp.broadcast_to(jnp.log(p), (1, len(shown), V))
    if t < 1:
        got = process.posterior(logits, jnp.asarray(shown)[None], tau_of(s), tau_t)[0]
        np.testing.assert_allclose(got, want, atol=2e-6)
    rows = 40_000
    draw = jax.jit(lambda key, z: process.step(key, jnp.broadcast_to(logits, (*z.shape, V)), z, tau_of(s), tau_t))
    drawn = np.asarray(draw(jax.random.key(1), jnp.broadcast_to(jnp.asarray(shown), (rows, len(shown)))))
    for column, law in enumerate(want):
        got = np.bincount(drawn[:, column], minlength=V + 1) / rows
        assert np.all(np.abs(got - law) < 4.5 * np.sqrt(law * (1 - law) / rows) + 2e-6), (shown[column], got, law)


def test_gidd_samples_one_token_exactly_and_revises_words():
    """A single token with the true p is a chain of exact steps, at any number of them; words that are given stay."""
    process, p, rows = GiddProcess(WORDS, 0.4), random_p(9), 30_000
    denoise = lambda z, t: process.as_prediction(jnp.broadcast_to(jnp.log(p), (*z.shape, V)))  # noqa: E731
    start = jnp.array([[MASK, 3]] * rows)
    run = jax.jit(lambda key, steps: gidd.sample(key, denoise, process, start, steps=steps, tokens=5000))
    for steps in (1, 7):
        words, stats = run(jax.random.key(steps), steps)
        got = np.bincount(np.asarray(words)[:, 0], minlength=V) / rows
        assert np.all(np.abs(got - p) < 4.5 * np.sqrt(p * (1 - p) / rows))
        assert np.all(np.asarray(words)[:, 1] == 3) and int(stats["calls"]) == steps
    # a word on show turns into others on the way down
    after = process.step(jax.random.key(0), jnp.broadcast_to(jnp.log(p), (rows, 1, V)), jnp.zeros((rows, 1), int),
                         tau_of(0.4), tau_of(0.8))
    assert 0.02 < np.mean((np.asarray(after) != 0) & (np.asarray(after) != MASK)) < 0.9


@pytest.mark.slow
def test_gidd_corrects_one_word_a_call_until_nothing_changes():
    """The likeliest word that is not there yet goes in first; given words stay; a settled row costs nothing more."""
    process = GiddProcess(WORDS, 0.1)
    best, sure = np.array([2, 1, 3, 0]), np.array([0.7, 0.9, 0.8, 0.95])
    p = np.where(np.arange(V) == best[:, None], sure[:, None], (1 - sure[:, None]) / (V - 1))

    def denoise(z, t):
        return process.as_prediction(jnp.broadcast_to(jnp.log(p), (*z.shape, V)))

    def run(corrections):
        start = jnp.array([[MASK, MASK, MASK, 1]] * 400)
        return gidd.sample(jax.random.key(2), denoise, process, start, steps=2, corrections=corrections,
                           correction_temperature=0.02)

    before, _ = run(0)
    once, _ = run(1)
    last, stats = run(6)
    wrong = np.asarray(before)[:, :3] != best[:3]
    assert wrong.any(axis=0).all()
    first = np.where(wrong.any(1), np.argmax(np.where(wrong, sure[:3], 0), axis=1), -1)  # the likeliest of them
    want = np.where(np.arange(3) == first[:, None], best[:3], np.asarray(before)[:, :3])
    np.testing.assert_array_equal(np.asarray(once)[:, :3], want)
    np.testing.assert_array_equal(last, np.broadcast_to([*best[:3], 1], last.shape))
    np.testing.assert_array_equal(stats["row_forwards"], 2 + wrong.sum(1) + 1)  # and one that finds nothing


@pytest.mark.slow
def test_gidd_s_samples_do_not_depend_on_batch_mates():
    process, p = GiddProcess(WORDS, 0.4), random_p(9)
    denoise = lambda z, t: process.as_prediction(jnp.broadcast_to(jnp.log(p), (*z.shape, V)))  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 6)
    run = lambda keys: gidd.sample(keys, denoise, process, jnp.full((len(keys), 5), MASK), steps=6, tokens=7)[0]  # noqa: E731
    np.testing.assert_array_equal(run(keys)[:2], run(keys[:2]))


# -- SEDD ------------------------------------------------------------------------------------------------------------


def test_sedd_s_cost_is_the_score_entropy():
    """sum_y s_y - r log s_x + r (log r - 1) with r = (1-t)/t and s_y = r f_y, per unit of sigma = tau."""
    process = SeddProcess(WORDS, LevelChain((1.0,)))
    logits = np.random.default_rng(0).normal(size=(1, 3, V)) * 2
    x, z = np.array([[0, 1, 2]]), np.array([[MASK, MASK, 2]])
    for t in TIMES:
        ratio = (1 - t) / t
        s = ratio * np.exp(logits[0]) / V
        want = [s[i].sum() - ratio * np.log(s[i, x[0, i]]) + ratio * (np.log(ratio) - 1) for i in (0, 1)]
        got = process.nelbo_rate(jnp.asarray(logits), jnp.asarray(x), jnp.asarray(z), jnp.array([tau_of(t)]))[0]
        np.testing.assert_allclose(got, [*want, 0], rtol=2e-4)
    sure = jnp.log(random_p(3, 1, 3)) + math.log(V)  # scores that sum to one: MDLM's cost
    mdlm = HierarchicalProcess(WORDS, LevelChain((1.0,)))
    np.testing.assert_allclose(process.token_loss(sure, x, z), mdlm.token_loss(sure, x, z), atol=1e-6)
    assert np.all(process.token_loss(sure + 0.5, x, z)[0, :2] > mdlm.token_loss(sure, x, z)[0, :2])
    np.testing.assert_allclose(process.token_loss(jnp.zeros((1, 3, V)), x, z)[0], [math.log(V)] * 2 + [0], rtol=1e-6)


# -- autoregressive --------------------------------------------------------------------------------------------------


def made(kind, **model):
    """(config, network, process, params) of a small model of a process."""
    from hdlm_jax.training.state import build, init_state, make_optimizer

    c = configs.default()
    c.tokenizer.kind, c.tokenizer.vocab_size = "bytes", 257
    c.hierarchy.clusters = (1,)
    c.diffusion.process, c.diffusion.weighting = kind, "constant"
    c.model.width, c.model.blocks, c.model.heads, c.model.seq_len = 32, 2, 2, 12
    c.model.time_conditioning = kind != "autoregressive"
    for name, value in model.items():
        c.model[name] = value
    config = configs.resolve(c)
    hierarchy = Hierarchy.from_parents([], 257)
    network, process = build(config, hierarchy)
    state = init_state(config, network, make_optimizer(config)[0], jax.random.key(0))
    # the published start is zero in many places: random weights, so that nothing is hidden
    leaves, tree = jax.tree.flatten(state.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [a + 0.3 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    return config, network, process, jax.tree.unflatten(tree, leaves)


def test_autoregressive_nelbo_is_the_chain_rule():
    """Sum over all sequences of e^-nats is one, and every draw of the evaluator gives the same."""
    process, table = AutoregressiveProcess(WORDS), np.log(random_p(4, V + 1))
    pairs = jnp.array(list(itertools.product(range(V), repeat=3)))
    z, level = process.noised(jax.random.key(0), pairs, jnp.zeros(len(pairs)), jnp.ones(pairs.shape, bool))
    np.testing.assert_array_equal(z[:, 0], MASK)
    np.testing.assert_array_equal(z[:, 1:], pairs[:, :-1])
    nats = process.nelbo_rate(jnp.asarray(table)[z], pairs, z, jnp.zeros(len(pairs))).sum(-1)
    assert float(jnp.sum(jnp.exp(-nats))) == pytest.approx(1, abs=1e-5) and int(level.min()) == 1
    tau, q = process.proposal(8, 0.1).quantile(np.random.default_rng(0).random(5))
    np.testing.assert_array_equal(process.nelbo_weight(jnp.zeros((5, 1)), jnp.asarray(tau))[:, 0] / q, 1)


def test_causal_network_sees_only_what_was_before():
    _, network, _, params = made("autoregressive")
    z = jax.random.randint(jax.random.key(2), (2, 12), 0, 257)
    base = network.apply({"params": params}, z, jnp.zeros(2))
    changed = network.apply({"params": params}, z.at[:, 7].set(5), jnp.zeros(2))
    np.testing.assert_array_equal(base[:, :7], changed[:, :7])
    assert np.all(np.abs(base - changed)[:, 7:].max(-1) > 1e-3)
    segment = jnp.broadcast_to(jnp.where(jnp.arange(12) < 5, 0, 1), z.shape)
    apart = network.apply({"params": params}, z, jnp.zeros(2), segment)
    np.testing.assert_allclose(apart[:, :5], base[:, :5], atol=1e-5)
    assert np.abs(apart[:, 6:] - base[:, 6:]).max() > 1e-2


@pytest.mark.slow
def test_keys_and_values_kept_give_the_same_predictions():
    _, network, _, params = made("autoregressive")
    z = jax.random.randint(jax.random.key(2), (3, 12), 0, 257)
    want = network.apply({"params": params}, z, jnp.zeros(3))
    cache = network.empty_cache(3, 12)
    for at in range(12):
        cache, found = network.next_token(params, cache, z[:, at : at + 1], jnp.int32(at))
        np.testing.assert_allclose(found.logits, want[:, at], atol=3e-5)


def test_autoregressive_samples_have_the_law_of_the_chain():
    process, table, rows = AutoregressiveProcess(WORDS), np.log(random_p(4, V + 1)), 30_000

    def decode(cache, z, i):
        return cache, jnp.asarray(table)[z[:, 0]]

    start = jnp.full((rows, 3), MASK).at[:, 0].set(2)
    words, stats = jax.jit(lambda key: autoregressive.sample(key, decode, process, start, ()))(jax.random.key(0))
    assert np.all(np.asarray(words)[:, 0] == 2) and int(stats["calls"]) == 3
    counts = np.zeros((V, V))
    np.add.at(counts, tuple(np.asarray(words)[:, 1:].T), 1)
    want = np.exp(table[2])[:, None] * np.exp(table[:V])
    assert np.all(np.abs(counts / rows - want) < 4.5 * np.sqrt(want * (1 - want) / rows))


def test_cached_sampling_equals_a_loop_without_a_cache():
    """Token for token, with the same random numbers; prompt and length as the run's sampler gives them."""
    from hdlm_jax.diffusion.draws import draw_from, fold

    config, network, process, params = made("autoregressive")
    start = jnp.full((3, 12), process.hierarchy.mask_id).at[:, :2].set(jnp.array([7, 9]))
    keys = jax.random.split(jax.random.key(5), 3)
    words, _ = autoregressive.sample(keys, lambda cache, z, i: network.next_token(params, cache, z, i), process, start,
                                     network.empty_cache(3, 12))
    slow = start
    for i in range(2, 12):
        z = process.corrupt(None, slow, tau=None)
        logits = network.apply({"params": params}, z, jnp.zeros(3))[:, i]
        slow = slow.at[:, i].set(draw_from(fold(keys, i), logits))
    np.testing.assert_array_equal(words, slow)


# -- through the whole house -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "weighting", "p_uniform", "classes"), [
    pytest.param("gidd", "dynamic", 0.2, 0, marks=pytest.mark.slow),
    pytest.param("sedd", "constant", 0.0, 0, marks=pytest.mark.slow),
    pytest.param("autoregressive", "constant", 0.0, 0, marks=pytest.mark.slow),
    *[pytest.param(*kind, 8, marks=pytest.mark.slow) for kind in (
        ("gidd", "dynamic", 0.2), ("autoregressive", "constant", 0.0), ("hierarchical", "constant", 0.0))]])
def test_trains_evaluates_and_generates(kind, weighting, p_uniform, classes, tmp_path):
    import dataclasses

    import hdlm_jax
    from hdlm_jax.evaluation.scorer import Scorer
    from hdlm_jax.runs import evaluate, generate, train

    config = tiny.read_recipe(tiny.write_recipe(tmp_path))
    config = dataclasses.replace(
        config, hierarchy=dataclasses.replace(config.hierarchy, clusters=(1,), head_clusters=classes),
        diffusion=dataclasses.replace(config.diffusion, process=kind, weighting=weighting, p_uniform=p_uniform),
        model=dataclasses.replace(config.model, time_conditioning=kind != "autoregressive",
                                  head="factorised" if classes else "flat"))
    config.check()
    workdir = str(tmp_path / "run")
    train.train(config, workdir)
    result = evaluate.evaluate(config, workdir)
    assert 2 < result["nelbo"] < 7 and result["se"] > 0
    assert result["draws"] == (1 if kind == "autoregressive" else 2)
    made = generate.generate(config, workdir)
    calls = made["network_calls"]  # where levels drop, calls at which none does are left out
    assert made["samples"] == 3 and (calls == 16 if kind == "autoregressive" else 3 < calls <= 6)
    model = hdlm_jax.load(workdir)
    assert model.hierarchy.of_head.sizes == ((257, 8, 1) if classes else (257, 1))
    assert int(train.train(config, workdir).step) == 3, "its classes are found again"
    assert model.generate(1, prompt="the ", steps=4)[0].startswith("the ")
    found = model.nelbo(["the 3th of forty"])[0]
    assert 5 < found["nats"] < 200 and (found["se"] == 0 or kind != "autoregressive")
    (words,) = Scorer(model.run, config.evaluate).greedy([model.tokenizer.encode("the ")], [2])
    assert words.shape == (2,) and np.all(words < 257)
    if kind == "autoregressive" and not classes:  # its own judge, exactly: -log p of what it wrote
        judged = dataclasses.replace(config, generate=dataclasses.replace(config.generate, judge=workdir))
        said = generate.generate(judged, workdir)["judge"]
        ids = [json.loads(line)["ids"] for line in open(f"{workdir}/samples.jsonl")]
        x = jnp.asarray(ids)
        log_p = jax.nn.log_softmax(model.run.network.apply({"params": model.run.params},
                                                           model.run.process.corrupt(None, x, tau=None), jnp.zeros(3)))
        nats = -jnp.take_along_axis(log_p, x[..., None], axis=-1).mean()
        assert said["kind"] == "autoregressive" and said["tokens"] == x.size and not said["retokenised"]
        assert said["perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)
        with pytest.raises(ValueError, match="cannot fill blanks before given words"):
            model.infill("the [MASK] of")


@pytest.mark.parametrize(("changes", "message"), [
    ({"diffusion.process": "gid"}, "did you mean 'gidd'"),
    ({"diffusion.process": "gidd"}, "knows no clusters"),
    ({"diffusion.p_uniform": 0.1}, "goes with diffusion.process='gidd'"),
    ({"diffusion.process": "sedd", "diffusion.xi": 0.9}, "knows no xi"),
    ({"diffusion.process": "autoregressive", "hierarchy.clusters": (1,)}, "has no time"),
    ({"diffusion.process": "autoregressive", "diffusion.weighting": "clip"}, "choose one of constant"),
    ({"diffusion.process": "gidd", "hierarchy.clusters": (1,), "generate.method": "margin"}, "no levels that drop"),
    ({"hierarchy.clusters": (1,), "model.head": "factorised"}, "give hierarchy.head_clusters, or choose 'flat'"),
    ({"hierarchy.head_clusters": 8}, "goes with model.head='factorised'"),
    ({"hierarchy.head_clusters": 1}, "must be 0, or at least 2"),
    ({"hierarchy.head_clusters": 8, "model.head": "factorised"}, r"classes are the process's own, .*\(64,\); give 0"),
    ({"diffusion.process": "sedd", "hierarchy.clusters": (1,), "hierarchy.head_clusters": 8,
      "model.head": "factorised"}, "scores that are not normalised; choose 'flat'"),
    ({"generate.corrections": 3}, "goes with diffusion.process='gidd'"),
    ({"diffusion.weighting": "dynamic"}, "choose one of none, constant, clip, empirical"),
])
def test_settings_that_do_not_go_together(changes, message):
    c = configs.default()
    c.hierarchy.clusters = (64,)
    c.diffusion.weighting = "constant"
    for name, value in changes.items():
        section, key = name.split(".")
        c[section][key] = value
    with pytest.raises(configs.ConfigError, match=message):
        configs.resolve(c)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gidd", "autoregressive"])
def test_samples_and_nats_do_not_depend_on_devices(kind):
    import dataclasses

    from hdlm_jax.common import parallel
    from hdlm_jax.decoding.sampler import Sampler, prompt_canvas
    from hdlm_jax.evaluation.elbo import Evaluator

    config, network, process, params = made(kind)
    if kind == "gidd":
        process = GiddProcess(process.hierarchy, 0.3)
    g = dataclasses.replace(config.generate, steps=5, num_samples=8, batch_size=8)
    x = np.random.default_rng(0).integers(257, size=(8, 12)).astype(np.int32)
    rows = {"x": x, "segment": np.zeros_like(x), "score": np.arange(96).reshape(8, 12) % 5 > 0}
    found = []
    for devices in (1, 8):
        mesh = parallel.make_mesh(config, jax.devices()[:devices])
        here = jax.device_put(params, parallel.replicated(mesh))
        tokens = Sampler(network, process, mesh, here)(prompt_canvas(np.array([3], np.int32), 8, 12, 257), g)["tokens"]
        nats, _, _ = Evaluator(network, process, mesh, here, seq_len=12, seed=config.evaluate.seed,
                               cv2=config.evaluate.cv2, batch_size=config.evaluate.batch_size).nats(here, rows, 2)
        found.append((tokens, nats))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-4)


@pytest.mark.parametrize("kind", ["gidd", "autoregressive"])
def test_rows_that_end_before_the_canvas_does(kind):
    """Texts of lengths of their own, as Model.infill has them; places of certain words are for other processes."""
    import dataclasses

    from hdlm_jax.common import parallel
    from hdlm_jax.decoding import canvas
    from hdlm_jax.decoding.sampler import Sampler

    config, network, process, params = made(kind)
    mesh = parallel.make_mesh(config, jax.devices()[:1])
    draw = Sampler(network, process, mesh, jax.device_put(params, parallel.replicated(mesh)))
    g = dataclasses.replace(config.generate, steps=3, num_samples=2, batch_size=2)
    z = np.full((2, 12), process.hierarchy.mask_id, np.int32)
    z[:, :2], z[1, 7:] = 5, 0
    some = canvas.Canvas(z, z != 257, np.zeros_like(z), np.array([12, 7], np.int32), np.ones((1, 257), bool))
    out = draw(some, g)
    assert (out["tokens"][0] < 257).all() and (out["tokens"][1, :7] < 257).all() and (out["tokens"][:, :2] == 5).all()
    with pytest.raises(configs.ConfigError, match="cannot keep to kinds of words"):
        draw(some._replace(allowed=np.ones((2, 257), bool)), g)
