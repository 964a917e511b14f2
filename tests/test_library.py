"""The Python face for a network of the caller's own: loss, bound and samples against enumeration, and its traps."""

import functools
import itertools
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import Toy

import hdlm_jax as hd
from hdlm_jax.diffusion.draws import fold
from hdlm_jax.diffusion.hierarchy import Hierarchy

V, S = 4, 2
TWO, THREE = [[0, 1, 0, 1]], [[0, 1, 2, 0], [0, 1, 1]]
PAIRS = np.array(list(itertools.product(range(V), repeat=S)), np.int32)
LEVELS = {  # name -> process, and the same toy of the oracle's
    "masked": (hd.masked(V), Toy([], (1.0,), vocab_size=V)),
    "two levels": (hd.hierarchical(TWO[0], gamma=2.0, xi=0.8), Toy(TWO, (2.0, 1.0), 0.8)),
    "three levels": (hd.hierarchical(THREE, rates=(1.5, 1.0, 2.0), force_transition="none"),
                     Toy(THREE, (1.5, 1.0, 2.0))),
}


def table_of(network):
    """A denoiser that looks its answer up in a table [N^S, S, V], shifted: logits need no normalising."""
    logits, places = jnp.asarray(np.log(network + 1e-30) + 0.3, jnp.float32), network.shape[1]
    n = round(len(network) ** (1 / places))

    def denoise(z, t):
        assert z.dtype == jnp.int32 and t.dtype == jnp.float32 and t.shape == z.shape[:1]
        return logits[jnp.sum(z * jnp.asarray(n ** np.arange(places)[::-1])[None], axis=-1)]

    return denoise


def random_network(symbols, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(V), (symbols**S, S)) * 0.98 + 0.02 / V


# ---- expectations by enumeration: [V^S] nats -------------------------------------------------------------------------


@functools.cache
def levels_case(name):
    process, toy = LEVELS[name]
    network = toy.random_network(S, seed=3)
    return process, table_of(network), toy.nelbo(toy.force(network, process.force_transition), nodes=8).reshape(-1)


@functools.cache
def sedd_case():
    """Ratios that sum to Z: -log f + Z - 1, with f = e^logit / V."""
    toy = Toy([], (1.0,), vocab_size=V)
    scale = np.random.default_rng(1).uniform(0.6, 1.5, (toy.N**S, S, 1))
    network = toy.random_network(S, seed=3) * scale
    masked = toy.sequences(S)[..., None] == toy.mask

    def rates(f, tau):
        return np.where(masked, oracle.level_weight([1.0], tau)[0] * (f.sum(-1, keepdims=True) - 1 - np.log(f)), 0.0)

    exact = toy.nelbo(network, rates_table=rates, nodes=8).reshape(-1)
    table = table_of(network)
    return hd.sedd(V), lambda z, t: table(z, t) - 0.3 + math.log(V), exact


@functools.cache
def gidd_case():
    process, toy, network = hd.gidd(V, 0.3), oracle.Gidd(V, 0.3), random_network(V + 1, seed=4)
    nodes, weights = np.polynomial.legendre.leggauss(24)
    u = (nodes + 1) / 2  # t = sin^2(pi u/2): the square roots at both ends of time become smooth
    t, dt = np.sin(np.pi * u / 2) ** 2, np.pi / 2 * np.sin(np.pi * u) * weights / 2
    shown, exact = list(itertools.product(range(V + 1), repeat=S)), np.zeros(len(PAIRS))
    for time, width in zip(t, dt, strict=True):
        q, step = toy.marginal(time), min(1e-6, time / 10, (1 - time) / 10)
        for row, z in enumerate(shown):
            for i in range(S):
                rate = [toy.nelbo_rate(network[row, i], word, z[i], time, step) for word in range(V)]
                exact += width * q[PAIRS[:, 0], z[0]] * q[PAIRS[:, 1], z[1]] * np.array(rate)[PAIRS[:, i]]
    return process, table_of(network), exact


@functools.cache
def autoregressive_case():
    network = random_network(V + 1, seed=5)
    network[:, 0] = network[0, 0]  # causal: the first place sees the start symbol, the second x_1 as well
    denoise = table_of(network)
    start = (V + 1) * V + PAIRS[:, 0]
    exact = -np.log(network[start, 0, PAIRS[:, 0]]) - np.log(network[start, 1, PAIRS[:, 1]])
    return hd.autoregressive(V), denoise, exact


CASES = {name: functools.partial(levels_case, name) for name in LEVELS} | {
    "sedd": sedd_case, "gidd": gidd_case, "autoregressive": autoregressive_case}


@pytest.mark.parametrize("name", CASES)
def test_nelbo_is_the_enumerated_bound(name):
    """Of each text, and of all together, within 4.5 standard errors; chi^2 over the texts says these are honest."""
    process, denoise, exact = CASES[name]()
    nats, se = hd.nelbo(process, denoise, PAIRS, jax.random.key(0), draws=2000)
    assert nats.shape == se.shape == (len(PAIRS),) and nats.dtype == np.float64
    if process.exact:
        np.testing.assert_allclose(nats, exact, rtol=1e-5)
        assert (se == 0).all()
        return
    away = (nats - exact) / se
    assert np.abs(away).max() < 4.5 and np.sum(away**2) < len(PAIRS) + 4.5 * math.sqrt(2 * len(PAIRS))
    assert abs((nats - exact).mean()) < 4.5 * math.sqrt(np.sum(se**2)) / len(PAIRS) < 0.05 * exact.mean()


@pytest.mark.parametrize("name", CASES)
def test_loss_estimates_nats_per_token(name):
    """With the bound's own weights, and its gradient is that of the mean over keys."""
    process, denoise, exact = CASES[name]()
    keys = jax.random.split(jax.random.key(1), 200)
    x = jnp.asarray(np.tile(PAIRS, (4, 1)))
    values = np.asarray(jax.jit(lambda keys: jax.lax.map(lambda key: hd.loss(process, denoise, x, key), keys))(keys))
    assert values.shape == (200,) and values.dtype == np.float32
    se = values.std(ddof=1) / math.sqrt(len(values))
    assert abs(values.mean() - exact.mean() / S) < 4.5 * se + 1e-5
    bias = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, V)), jnp.float32)
    moved = lambda h: hd.loss(process, lambda z, t: denoise(z, t) + h * bias, x, keys[0], weighting="constant")  # noqa: E731
    slope, eps = jax.jit(jax.grad(moved))(0.0), 1e-2
    run = jax.jit(moved)
    assert float(slope) == pytest.approx((float(run(eps)) - float(run(-eps))) / (2 * eps), abs=2e-3)


@pytest.mark.parametrize("name", ["two levels", "gidd", "autoregressive"])
def test_tokens_that_are_not_scored_are_shown_and_cost_nothing(name):
    process, denoise, _ = CASES[name]()
    score = np.tile(np.array([[True, False]]), (len(PAIRS), 1))

    def blind(z, t):  # the second token is what it was; what is said of it does not matter
        logits = denoise(z, t)
        return logits.at[:, 1].set(jax.nn.one_hot(z[:, 1] % V, V) * 50)

    for score_free in (denoise, blind):
        nats, _ = hd.nelbo(process, score_free, PAIRS, jax.random.key(0), draws=2, score=score)
        value = hd.loss(process, score_free, PAIRS, jax.random.key(0), score=score)
        if score_free is denoise:
            first = nats, value
    np.testing.assert_array_equal(nats, first[0])
    assert float(value) == float(first[1])
    z = []
    hd.loss(process, lambda z_, t: (z.append(z_), denoise(z_, t))[1], PAIRS, jax.random.key(0), score=score)
    if not process.exact:
        np.testing.assert_array_equal(z[0][:, 1], PAIRS[:, 1])


def test_loss_is_the_trainer_s():
    """The same rows, the same key: what make_loss_sums gives for a network of ours, divided by its tokens."""
    from hdlm_jax import config as configs
    from hdlm_jax.training.state import build
    from hdlm_jax.training.step import make_loss_sums

    c = configs.default()
    c.tokenizer.kind, c.tokenizer.vocab_size = "bytes", 257
    c.hierarchy.clusters = (8,)
    c.model.width, c.model.blocks, c.model.heads, c.model.seq_len = 32, 1, 2, 12
    c.train.batch_size = 8
    config = configs.resolve(c)
    clusters = np.arange(257) % 8
    network, process = build(config, Hierarchy.from_parents([clusters]))
    x = jax.random.randint(jax.random.key(3), (8, 12), 0, 257)
    params = network.init(jax.random.key(0), x, jnp.zeros(8))["params"]
    params = jax.tree.map(lambda a: a + 0.1, params)
    batch, d = {"x": x, "index": jnp.arange(8)}, config.diffusion
    total, bound, tokens = jax.jit(make_loss_sums(config, network, process))(params, batch, jax.random.key(5))
    mine = hd.hierarchical(clusters, force_transition=d.force_transition)
    denoise = lambda z, t: network.apply({"params": params}, z, t)  # noqa: E731
    own = hd.loss(mine, denoise, x, jax.random.key(5), weighting=d.weighting, weight_max=d.weight_max)
    assert float(own) == pytest.approx(float(total / tokens), rel=1e-5)
    assert float(hd.loss(mine, denoise, x, jax.random.key(5))) == pytest.approx(float(bound / tokens), rel=1e-5)


def test_raw_keys_are_taken_and_x_may_be_a_constant_of_jit():
    process, denoise, _ = CASES["masked"]()
    same = [hd.loss(process, denoise, PAIRS, key) for key in (jax.random.key(7), jax.random.PRNGKey(7))]
    same.append(jax.jit(lambda key: hd.loss(process, denoise, PAIRS, key))(jax.random.key(7)))
    assert float(same[0]) == float(same[1]) == pytest.approx(float(same[2]), rel=1e-6)


# ---- corruption ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LEVELS, "gidd"])
def test_corrupt_takes_a_masking_level(name):
    """Not a noise time: at t every process shows what it should, within 4.5 standard errors of 40 000 tokens."""
    process, t = CASES[name]()[0], 0.6
    x = np.full((20_000, 2), 1, np.int32)
    z = np.asarray(hd.corrupt(process, x, t, jax.random.key(0)))
    tau = -math.log1p(-t)
    law = oracle.Gidd(V, 0.3).marginal(t)[1] if name == "gidd" else LEVELS[name][1].q(tau)[1]
    share = np.bincount(z.reshape(-1), minlength=len(law)) / z.size
    assert np.all(np.abs(share - law) <= 4.5 * np.sqrt(law * (1 - law) / z.size))
    each = hd.corrupt(process, x[:2], np.array([0.0, 1.0]), jax.random.key(0))
    np.testing.assert_array_equal(each, [[1, 1], [process.hierarchy.mask_id] * 2])


def test_the_shifted_input_of_an_autoregressive_process():
    np.testing.assert_array_equal(hd.corrupt(hd.autoregressive(V), [[1, 2, 3]], 0.5, jax.random.key(0)), [[V, 1, 2]])


# ---- samples ---------------------------------------------------------------------------------------------------------


def assert_law(tokens, law, rows):
    """Total variation within 4.5 standard errors of that of so many exact draws."""
    tokens = np.asarray(tokens)
    assert tokens.dtype == np.int32 and tokens.shape == (rows, law.ndim)
    counts = np.zeros(law.shape)
    np.add.at(counts, tuple(tokens.T), 1)
    distance, floor, spread = oracle.total_variation(counts, law)
    assert distance <= floor + 4.5 * spread, (distance, floor, spread)


@pytest.mark.parametrize("method", [hd.presets.first_hitting(), hd.ancestral(steps=500)], ids=["exact", "grid"])
@pytest.mark.parametrize("name", LEVELS)
def test_a_perfect_denoiser_samples_the_data(name, method):
    process, toy = LEVELS[name]
    joint, rows = oracle.random_joint(V, S, seed=11), 10_000
    denoise = table_of(toy.bayes(joint, cavity=process.force_transition == "cavity"))
    tokens, info = hd.sample(process, denoise, jax.random.key(0), (rows, S), method)
    assert_law(tokens, joint, rows)
    assert info["calls"].shape == (rows,) and int(info["row_forwards"].max()) <= S * process.num_levels


def test_sedd_samples_from_ratios_that_do_not_sum_to_one():
    toy, joint = LEVELS["masked"][1], oracle.random_joint(V, S, seed=11)
    tokens, _ = hd.sample(hd.sedd(V), table_of(toy.bayes(joint) * 3), jax.random.key(0), (10_000, S),
                          hd.presets.first_hitting())
    assert_law(tokens, joint, 10_000)


@pytest.mark.slow
def test_gidd_samples_the_data():
    """The network knows, at the t it is told, the law of a token given what the other one shows. The grid is fine, as
    both tokens may change in one step without knowing of each other (with 64 steps the distance was .038)."""
    joint, b, rows = jnp.asarray(oracle.random_joint(V, S, seed=11), jnp.float32), 2 * 0.3 / 0.7, 6_000

    def denoise(z, t):
        t = t.reshape(-1, 1)
        chance = b * jnp.sqrt(t * (1 - t)) / V
        shows = lambda z: jnp.where(z == V, t, chance + (1 - t) * jax.nn.one_hot(z[:, 0], V))  # noqa: E731
        p = [jnp.einsum("ij,bj->bi", joint, shows(z[:, 1:])), jnp.einsum("ij,bi->bj", joint, shows(z[:, :1]))]
        return jnp.log(jnp.stack(p, axis=1) + 1e-30)

    tokens, info = hd.sample(hd.gidd(V, 0.3), denoise, jax.random.key(0), (rows, S), hd.ancestral(steps=500))
    assert_law(tokens, np.asarray(joint, np.float64) / float(joint.sum()), rows)
    assert (info["calls"] == 500).all()


def test_an_autoregressive_network_samples_token_by_token():
    process, denoise, exact = CASES["autoregressive"]()
    tokens, info = hd.sample(process, denoise, jax.random.key(0), (10_000, S))
    assert_law(tokens, np.exp(-exact).reshape(V, V), 10_000)
    assert (info["calls"] == S).all()


@pytest.mark.parametrize("name", ["two levels", "gidd", "autoregressive"])
def test_what_a_canvas_gives_stays(name):
    process, denoise, _ = CASES[name]()
    canvas = np.array([[2, process.hierarchy.mask_id]] * 64)
    method = None if name == "autoregressive" else hd.ancestral(steps=8)
    tokens, _ = hd.sample(process, denoise, jax.random.key(0), method=method, canvas=canvas)
    assert (tokens[:, 0] == 2).all() and 1 < len(np.unique(tokens[:, 1])) and int(tokens.max()) < V


def usable():
    """Presets that need nothing but denoise(z, t), and those that need more."""
    found = {name: preset() for name, preset in hd.presets.METHODS.items()}
    return [name for name, m in found.items() if not (m.needs or m.cache or m.weights or m.policy.lengths)]


QUICK = ("max_prob", "p2")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
                                  for name in usable()])
def test_every_preset_writes_tokens(name):
    process, denoise, _ = CASES["two levels"]()
    preset = hd.presets.METHODS[name]
    method = preset(steps=4) if "steps" in preset().numbers else preset()
    tokens, _ = hd.sample(process, denoise, jax.random.key(0), (8, S), method, eos=0)
    assert int(tokens.min()) >= 0 and int(tokens.max()) < V


# ---- traps -----------------------------------------------------------------------------------------------------------


def test_what_needs_more_than_a_function_is_refused():
    process, denoise, _ = CASES["two levels"]()
    assert len(usable()) >= 20
    for name in sorted(set(hd.presets.METHODS) - set(usable())):
        preset = hd.presets.METHODS[name]
        method = preset(steps=4) if "steps" in preset().numbers else preset()
        with pytest.raises(ValueError, match="which a function denoise\\(z, t\\) does not give"):
            hd.sample(process, denoise, jax.random.key(0), (1, S), method)


def test_steps_are_asked_for():
    process, denoise, _ = CASES["masked"]()
    with pytest.raises(TypeError, match="steps"):
        hd.ancestral()
    for name in ("ancestral", "max_prob", "dimple", "remdm"):
        with pytest.raises(ValueError, match="steps=0: must be at least 1"):
            hd.sample(process, denoise, jax.random.key(0), (1, S), hd.presets.METHODS[name]())
    with pytest.raises(ValueError, match="give one, as hdlm_jax.ancestral"):
        hd.sample(process, denoise, jax.random.key(0), (1, S))


X = np.zeros((2, 3), np.int32)
FLAT = lambda z, t: jnp.zeros((*z.shape, V))  # noqa: E731
K0 = jax.random.key(0)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: hd.corrupt(hd.masked(V), X, 1.5, K0), "t=1.5: must lie in \\[0, 1\\], a masking level"),
    (lambda: hd.corrupt(hd.masked(V), X, np.zeros(3), K0), "t.shape=\\(3,\\): must be \\(\\) or \\(B,\\)"),
    (lambda: hd.loss(hd.masked(V), FLAT, X + V, K0), "x holds 4..4: must lie in 0..3"),
    (lambda: hd.loss(hd.masked(V), FLAT, X[0], K0), "must be int \\[B, S\\]"),
    (lambda: hd.loss(hd.masked(V), FLAT, X * 1.0, K0), "x is float64"),
    (lambda: hd.loss(hd.masked(V), lambda z, t: jnp.zeros((*z.shape, V + 1)), X, K0), "\\(2, 3, 4\\), of the tokens"),
    (lambda: hd.loss(hd.masked(V), lambda z, t: (FLAT(z, t), None), X, K0), "gave tuple of shape None"),
    (lambda: hd.loss(hd.masked(V), FLAT, X, K0, weighting="dynamic"), "weighting='dynamic': choose one of"),
    (lambda: hd.loss(hd.masked(V), FLAT, X, K0, weight_min=3, weight_max=2), "weight_min <= weight_max"),
    (lambda: hd.loss(hd.masked(V), FLAT, X, K0, weight_max=2), "only weighting='clip' uses them, not 'none'"),
    (lambda: hd.loss(hd.autoregressive(V), FLAT, X, K0, weighting="dynamic"), "weighting='dynamic': choose one of"),
    (lambda: hd.loss(hd.gidd(V, 0.1), FLAT, X, K0, hard_training=True), "no clusters"),
    (lambda: hd.loss(hd.masked(V), FLAT, X, K0, score=np.ones((2, 3))), "score is float32"),
    (lambda: hd.nelbo(hd.masked(V), FLAT, X, K0, draws=1), "draws=1: must be at least 2"),
    (lambda: hd.sample(hd.masked(V), FLAT, K0, None, hd.ancestral(steps=2)), "give one of them"),
    (lambda: hd.sample(hd.masked(V), FLAT, K0, (2, 0), hd.ancestral(steps=2)), "must be \\(B, S\\)"),
    (lambda: hd.sample(hd.gidd(V, 0.1), FLAT, K0, (2, 3), hd.presets.max_prob(steps=2)), "choose ancestral"),
    (lambda: hd.sample(hd.masked(V), FLAT, K0, (2, 3), hd.presets.eoser(steps=2)), "give its token as eos"),
    (lambda: hd.sample(hd.masked(V), FLAT, K0, (2, 3), hd.ancestral(steps=2), top_p=0), "top_p=0"),
    (lambda: hd.sample(hd.masked(V), FLAT, K0, (2, 3), hd.presets.ccd(), top_p=0.5), "takes the likeliest"),
    (lambda: hd.sample(hd.autoregressive(V), FLAT, K0, canvas=[[V, 1]]), "goes on from a prompt"),
    (lambda: hd.hierarchical([0, 2, 0]), "empty cluster"),
    (lambda: hd.hierarchical([0, 1, 0], rates=(1.0,)), "2 levels"),
    (lambda: hd.hierarchical([0, 1, 0], xi=0.9, force_transition="within"), "infinite"),
    (lambda: hd.nothing, "has no attribute 'nothing'"),
])
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises((ValueError, AttributeError), match=message):
        call()


def test_keys_of_rows_are_their_own():
    """A row's corruption and bound do not change with those behind it."""
    process = hd.masked(V)
    x = np.tile(PAIRS, (2, 1))
    few, many = (hd.corrupt(process, x[:n], 0.5, K0) for n in (5, 32))
    np.testing.assert_array_equal(few, many[:5])
    np.testing.assert_array_equal(many, process.corrupt(fold(jnp.broadcast_to(K0, (32,)), jnp.arange(32)),
                                                        jnp.asarray(x), tau=jnp.full(32, math.log(2))))


def test_the_import_stays_cheap(root):
    code = ("import sys, hdlm_jax; "
            "print([n for n in ('jax', 'flax', 'numpy') if n in sys.modules], 'loss' in dir(hdlm_jax))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=root).stdout.strip() == "[] True"


def test_the_page_runs(root):
    """The python of docs/library.md, as it stands there."""
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs" / "library.md").read_text(encoding="utf-8"), re.S)
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(root)}  # it runs for longer than it compiles
    out = subprocess.run([sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True, cwd=root,
                         env=environment)
    assert out.returncode == 0, out.stderr
    found = re.search(r"NELBO ([\d.]+) nats \(at least 3.58\), (\d+)% of", out.stdout)
    assert found and 3.58 <= float(found[1]) < 4.3 and int(found[2]) > 60, out.stdout
