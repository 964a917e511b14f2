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
from hdlm_jax.diffusion.levels import LevelChain
from hdlm_jax.evaluation.elbo import Evaluator
from hdlm_jax.models import channel
from hdlm_jax.models.channel import ChannelProcess, Observed, State
from hdlm_jax.models.network import Network
from hdlm_jax.runs.import_weights import check_exportable
from hdlm_jax.training.state import build, make_optimizer
from hdlm_jax.training.step import make_loss_sums
from tools import toy_channel as toy

V = toy.V
PARENTS = {"K=1": [], "K=2": [[0, 1, 0, 1]], "K=3": [[0, 1, 2, 1], [0, 1, 1]]}
RATES = {"K=1": (1.0,), "K=2": (2.0, 1.0), "K=3": (1.0, 3.0, 1.5)}


def make(case, c=0.3, width=3, xi=1.0):
    return toy.made(PARENTS[case], c, width, RATES[case], xi)


# ---- the bound -------------------------------------------------------------------------------------------------------


def test_evidence_is_bayes_rule():
    signal, rng = toy.table_of(3), np.random.default_rng(1)
    u, s = rng.normal(size=(5, 3)), np.array([0.01, 0.3, 1.0, 4.0, 30.0])
    log_p = -((u[:, None] - s[:, None, None] * signal) ** 2).sum(-1) / (2 * s[:, None])  # N(u; s e, s)
    want = log_p - log_p[:, :1]
    got = np.asarray(channel.evidence(jnp.asarray(u, jnp.float32), jnp.asarray(s, jnp.float32), jnp.asarray(signal)))
    np.testing.assert_allclose(got - got[:, :1], want, rtol=2e-5, atol=1e-5)


def integrated(process, prior):
    """(discrete, continuous) parts of the bound of one word drawn from prior, whose network knows the prior alone: the
    integral over noise time and observations (D = 1), the sum over words and symbols."""
    words = oracle.Toy(PARENTS[f"K={process.num_levels}"], process.chain.rates, process.xi, V)
    edges, (node, mass) = np.linspace(np.log(1e-3), np.log(40), 13), np.polynomial.legendre.leggauss(6)
    half = (edges[1] - edges[0]) / 2
    tau = np.exp((edges[:-1, None] + half + half * node).ravel())
    eps, of_eps = np.polynomial.hermite_e.hermegauss(40)
    x, z, j = (a.reshape(-1) for a in np.meshgrid(np.arange(V), np.arange(V, words.N), np.arange(40), indexing="ij"))
    s = np.asarray(process.ratio(tau, np))[:, None]
    u = s * np.asarray(process.signal)[x, 0] + np.sqrt(s) * eps[j]  # [times, words x symbols x noises]
    q = np.stack([words.q(t)[x, z] for t in tau])
    weight = np.tile(mass * half, 12)[:, None] * tau[:, None] * prior[x] * q * of_eps[j] / of_eps.sum()

    @jax.jit
    def costs(u, s, tau):
        shape = u.shape
        state = State(jnp.broadcast_to(z[None], shape).astype(np.int32), u[..., None], jnp.broadcast_to(s, shape))
        own = jnp.broadcast_to(x[None], shape).astype(np.int32)
        logits = wide(np.log(prior).astype(np.float32), u) + channel.evidence(state.u, state.s, process.signal)
        p = Observed(logits, process.hierarchy, process.signal)
        rates = [process.nelbo_weight(state, tau) * part(p, own, state, tau=tau) for part in process.parts]
        return (*rates, process.nelbo_rate(p, own, state, tau))

    found = costs(*(jnp.asarray(a, jnp.float32) for a in (u, s, tau)))
    discrete, continuous, both = (np.asarray(a, np.float64) for a in found)
    np.testing.assert_allclose(both, discrete + continuous, rtol=1e-5, atol=1e-6)
    return (weight * discrete).sum(), (weight * continuous).sum()


@pytest.mark.parametrize("case, c, xi", [("K=1", 0.3, 1.0), ("K=1", 3.0, 1.0), ("K=2", 0.3, 1.0), ("K=2", 3.0, 0.8),
                                         ("K=3", 1.0, 1.0), ("K=3", 1.0, 0.9)])
def test_the_sum_is_the_entropy_and_the_symbols_alone_lie_below(case, c, xi):
    """For any schedule, table, hierarchy and xi; log V for a network that knows nothing."""
    table = np.array([[-1.5], [-0.3], [0.5], [1.3]], np.float32)
    process = dataclasses.replace(make(case, c, 1, xi), signal=jnp.asarray(table))
    for prior in (np.array([0.5, 0.2, 0.2, 0.1]), np.full(V, 1 / V)):
        discrete, continuous = integrated(process, prior)
        assert discrete + continuous == pytest.approx(oracle.entropy(prior), abs=1e-3)
        assert discrete < oracle.entropy(prior) - 0.1


@pytest.mark.parametrize("case, c", [("K=1", 0.3), ("K=2", 3.0)])
def test_bound_of_the_optimal_network_of_two_words_is_their_entropy(case, c):
    """Each sees what the other's observation says. Within 4.5 standard errors, which are below 2 %."""
    process, joint = make(case, c), oracle.random_joint(V, 2, seed=3)
    mean, se = toy.bound(process, joint, 40_000)
    assert mean[2] == pytest.approx(oracle.entropy(joint), abs=4.5 * se[2]) and se[2] < 0.03
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


def test_known_words_show_their_embedding_and_hard_training_is_their_cross_entropy():
    process = make("K=2")
    x, score = jnp.asarray([[0, 1, 2, 3]] * 8, jnp.int32), jnp.asarray([[False, False, True, True]] * 8)
    state, level = process.noised(jax.random.key(0), x, jnp.full(8, 3.0), score)
    shown = np.asarray(state.u / state.s[..., None])
    known = np.asarray(level) == 0
    assert known[:, :2].all() and not known[:, 2:].all()
    np.testing.assert_allclose(shown[known], np.asarray(process.signal)[np.asarray(x)[known]], rtol=1e-6)
    np.testing.assert_allclose(state.s[~known], process.ratio(3.0), rtol=1e-6)
    logits = channel.evidence(state.u, state.s, process.signal)
    p = Observed(logits, process.hierarchy, process.signal)
    hard = process.token_loss(p, x, state, None, True, tau=jnp.full(8, 3.0))
    log_p = np.asarray(process.forced(p, state.z).log_prob(x))
    np.testing.assert_allclose(hard[~known], -log_p[~known], rtol=1e-6)


# ---- the way back ----------------------------------------------------------------------------------------------------


def write(process, joint, steps, rows=20_000):
    denoise = toy.bayes(process, joint)
    run = jax.jit(lambda key, z: decoding.sample(key, denoise, process, z, steps=steps, tokens=8192))
    words, stats = run(jax.random.key(2), jnp.full((rows, joint.ndim), process.mask_id, jnp.int32))
    assert int(stats["calls"]) == steps and words.max() < V
    return np.asarray(words)


@pytest.mark.parametrize("case, xi, steps", [("K=1", 1.0, 1), ("K=1", 1.0, 3), ("K=2", 0.8, 3), ("K=3", 1.0, 2)])
def test_one_word_has_its_law_at_any_number_of_steps(case, xi, steps):
    prior = np.array([0.55, 0.2, 0.05, 0.2])
    process = make(case, 1.0, 2, xi)
    assert_law(write(process, prior, steps), prior)


def test_the_mean_in_place_of_a_word_is_another_law():
    """The sampler's twin in plain steps, one word: with a drawn word its law is the prior, with the mean ("predict x0")
    it is not."""
    prior, process = np.array([0.55, 0.2, 0.05, 0.2]), make("K=1", 5.0, 2)
    assert_law(toy.twin(process, prior, 3, 20_000, mean=False), prior)
    assert toy.distance(toy.twin(process, prior, 3, 20_000, mean=True), prior) > 0.04


@pytest.mark.parametrize("case", ["K=1", "K=2"])
def test_two_words_have_their_law_in_many_steps(case):
    """And in one step they do not: they move independently."""
    process, joint = make(case, 0.5), oracle.random_joint(V, 2, seed=3)
    counts = lambda words: np.bincount(words @ [V, 1], minlength=V * V)  # noqa: E731
    far = oracle.total_variation(counts(write(process, joint, 1)), joint)[0]
    near, floor, spread = oracle.total_variation(counts(write(process, joint, 48, 8_000)), joint)
    assert near < floor + 4.5 * spread + 0.01 and far > 0.1


def test_the_network_is_told_the_time_of_what_it_sees():
    """s is that of t at every call, and a share t of the words is not known (4.5 standard errors)."""
    process, seen = make("K=1", 0.5), []

    def denoise(state, t):
        jax.debug.callback(lambda *call: seen.append([np.asarray(a) for a in call]), state.z, state.s, t)
        return Observed(channel.evidence(state.u, state.s, process.signal), process.hierarchy, process.signal)

    z = jnp.full((100, 8), process.mask_id, jnp.int32)
    jax.block_until_ready(jax.jit(lambda key: decoding.sample(key, denoise, process, z, steps=3)[0])(jax.random.key(0)))
    jax.effects_barrier()
    for call, (z, s, t) in enumerate(sorted(seen, key=lambda one: -one[2][0])):
        np.testing.assert_allclose(t, 1 - call / 3, rtol=1e-6)
        np.testing.assert_allclose(s[z == process.mask_id], 0.5 * call / (3 - call), rtol=1e-5)
        share = np.mean(z < V)
        assert share == pytest.approx(call / 3, abs=4.5 * math.sqrt(call * (3 - call) / 9 / z.size) + 1e-9)
    assert len(seen) == 3


def test_given_words_stay_and_tell_the_others():
    process, joint = make("K=2", 0.5), oracle.random_joint(V, 2, seed=3)
    z = jnp.tile(jnp.asarray([[2, process.mask_id]], jnp.int32), (10_000, 1))
    words = decoding.sample(jax.random.key(0), toy.bayes(process, joint), process, z, steps=2, tokens=8192)[0]
    assert np.all(np.asarray(words)[:, 0] == 2)
    assert_law(np.asarray(words)[:, 1:], joint[2] / joint[2].sum())


# ---- networks --------------------------------------------------------------------------------------------------------


def tiny_config(clusters=(3,), **changes):
    values = Config().as_dict()
    sections = dict(
        hierarchy=dict(clusters=clusters), tokenizer=dict(kind="bytes", vocab_size=257),
        model=dict(width=16, blocks=1, heads=2, seq_len=4), train=dict(batch_size=16, steps=4),
        diffusion=dict(channel=0.5, channel_width=3, weighting="none"), optimizer=dict(warmup=0))
    for name, value in changes.items():
        section, _, key = name.partition("__")
        sections.setdefault(section, {})[key] = value
    for section, more in sections.items():
        values[section] = values[section] | more
    return resolve(values)


@pytest.fixture(scope="module")
def network():
    """(config, network, process, parameters), 8 words in 3 clusters."""
    config = tiny_config()
    net, process = build(config, Hierarchy.from_parents([[0, 1, 2, 0, 1, 2, 0, 1]]))
    return config, net, process, net.init_params(jax.random.key(0), 4)


def moved(params, scale=0.1):
    """Parameters off their start, which is zero in many places."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    off = [a + scale * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, off)


def test_a_network_that_knows_nothing_costs_log_v_a_token(network):
    """By the evaluator, with the random table of a fresh network; the columns are the levels and what is observed."""
    config, net, process, params = network
    mesh = parallel.make_mesh(config)
    x = np.random.default_rng(0).integers(0, 8, (64, 4)).astype(np.int32)
    rows = {"x": x, "segment": np.zeros_like(x), "score": np.ones_like(x, bool)}
    params = jax.device_put(params, parallel.replicated(mesh))
    evaluator = Evaluator(net, process, mesh, params, seq_len=4, seed=0, cv2=0.03, batch_size=2048)
    nats = evaluator.nats(params, rows, 96)[0]
    assert nats.shape == (96, 64, 3) and np.all(nats >= 0)
    mean = nats.reshape(-1, 3).mean(0) / 4
    se = nats.sum(-1).std() / math.sqrt(96 * 64) / 4
    assert mean.sum() == pytest.approx(math.log(8), abs=4.5 * se) and se < 0.03
    assert mean.min() > 0.1


def test_training_estimates_the_bound_and_has_its_gradients(network):
    """At the bound's own weights the loss is the bound, by symbols and observations; its slopes are those of
    differences, and e has none."""
    config, net, process, params = network
    params = moved(params)
    batch = {"x": jnp.asarray(np.random.default_rng(1).integers(0, 8, (16, 4)), jnp.int32), "index": jnp.arange(16)}
    sums = jax.jit(make_loss_sums(config, net, process))
    loss, bound, tokens = sums(params, batch, jax.random.key(0))
    assert float(loss) == pytest.approx(float(bound), rel=1e-5) and tokens == 64
    grad = jax.jit(jax.grad(lambda p: sums(p, batch, jax.random.key(0))[0]))(params)
    assert np.all(np.asarray(grad["head"]["signal"]) == 0)
    for path in (("head", "kernel"), ("observe", "kernel"), ("embedding",)):
        at = lambda tree: tree[path[0]] if len(path) == 1 else tree[path[0]][path[1]]  # noqa: B023, E731
        way = jax.random.normal(jax.random.key(3), at(params).shape)
        put = lambda h: {**params, path[0]: at(params) + h * way if len(path) == 1 else {  # noqa: B023, E731
            **params[path[0]], path[1]: at(params) + h * way}}  # noqa: B023
        slope = (sums(put(1e-3), batch, jax.random.key(0))[0] - sums(put(-1e-3), batch, jax.random.key(0))[0]) / 2e-3
        assert float(jnp.sum(at(grad) * way)) == pytest.approx(float(slope), rel=1e-2), path


def test_without_a_channel_nothing_is_another(network):
    """The parent's classes, parameters and states; a channel adds its own parameters, and starts as the parent does."""
    hierarchy = network[1].head.hierarchy
    net, process = build(tiny_config(diffusion__channel=0.0), hierarchy)
    assert type(net) is Network and type(process) is HierarchicalProcess
    own, ours = net.init_params(jax.random.key(0), 4), network[3]
    assert set(ours) - set(own) == {"observe"} and set(ours["head"]) - set(own["head"]) == {"signal"}
    z = jnp.asarray([[1, 9, 11, 2]], jnp.int32)
    state = State(z, jnp.ones((1, 4, 3)), jnp.full((1, 4), 0.2))
    plain, more = net.hidden(own, z, jnp.array([0.3])), network[1].hidden(
        {**own, "observe": ours["observe"]}, state, jnp.array([0.3]))
    np.testing.assert_array_equal(more[..., :16], plain)
    np.testing.assert_array_equal(more[..., 16:], jnp.concatenate([state.u, state.s[..., None]], axis=-1))


def test_the_optimizer_leaves_the_table_alone(network):
    """Weight decay too."""
    config = tiny_config(optimizer__weight_decay=0.1)
    params = network[3]
    tx, _ = make_optimizer(config)
    updates = jax.jit(lambda p: tx.update(jax.tree.map(jnp.ones_like, p), tx.init(p), p)[0])(params)
    assert np.all(np.asarray(updates["head"]["signal"]) == 0) and np.any(np.asarray(updates["head"]["kernel"]) != 0)


def test_table_of_words():
    """Mean 0, |e|^2 = D, in the leading directions; nothing known stays nothing, missing directions are zeros."""
    vectors = np.random.default_rng(0).normal(size=(40, 6)) * [5, 4, 3, 2, 1, 0.5]
    vectors[7] = 0
    table = channel.standardised(vectors, 4)
    known = np.arange(40) != 7
    np.testing.assert_allclose(table[known].mean(0), 0, atol=1e-6)
    assert np.mean(table[known] ** 2) == pytest.approx(1) and np.all(table[7] == 0)
    assert np.all(np.diff(table[known].var(0)) < 0)
    wide_table = channel.standardised(vectors, 8)
    assert np.all(wide_table[:, 6:] == 0) and np.mean(np.sum(wide_table[known] ** 2, -1)) == pytest.approx(8)


# ---- runs ------------------------------------------------------------------------------------------------------------


def run_config(tmp_path, **changes):
    values = tiny.read_recipe(tiny.write_recipe(tmp_path)).as_dict()
    for name, value in (dict(diffusion__channel=0.1, diffusion__channel_width=8) | changes).items():
        section, _, key = name.partition("__")
        values[section] = values[section] | {key: value}
    return resolve(values)


MORE = dict(optimizer__schedule="constant", optimizer__weight_decay=0.1, optimizer__name="muon", checkpoint__every=2)


@pytest.mark.slow
def test_runs_carry_the_channel(tmp_path):
    """e is that of the words' vectors, and stays; evaluation has both parts, and an export writes as the run does."""
    import hdlm_jax
    from hdlm_jax.runs import evaluate, export, train

    run = str(tmp_path / "run")
    config = run_config(tmp_path, train__steps=4, **MORE)
    state = train.train(config, run)
    vectors = np.load(next((tmp_path / "run" / "data").glob("embeddings-*.npy")))
    signal = channel.standardised(vectors, 8)
    np.testing.assert_array_equal(state.params["head"]["signal"], signal)
    assert np.abs(np.asarray(state.params["observe"]["kernel"])).max() > 1e-4
    found = evaluate.evaluate(config, run)
    assert found["nelbo"] == pytest.approx(found["discrete"] + found["continuous"]) and found["continuous"] > 0
    assert found["discrete"] == pytest.approx(sum(found["levels"])) and found["discrete_se"] > 0
    export.export(dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, checkpoint="latest")), run)
    taken = hdlm_jax.load(str(tmp_path / "run" / "export"))
    np.testing.assert_array_equal(taken.run.params["head"]["signal"], signal)
    assert len(taken.generate(num_samples=1, steps=2)) == 1
    with pytest.raises(ConfigError, match="generate.method='max_prob'"):
        taken.generate(num_samples=1, method="max_prob")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["diffusion"]["channel"] == 0.1


@pytest.mark.slow
def test_a_resumed_run_is_one_that_never_stopped(tmp_path):
    from hdlm_jax.runs import train

    config, half = (run_config(tmp_path, train__steps=n, **MORE) for n in (4, 2))
    state, other = train.train(config, str(tmp_path / "run")), str(tmp_path / "other")
    train.train(half, other)
    jax.tree.map(np.testing.assert_array_equal, state, train.train(config, other))


@pytest.mark.parametrize("changes, text", [
    (dict(diffusion__process="gidd", clusters=(1,), diffusion__weighting="dynamic"), "diffusion.process='gidd': "),
    (dict(hierarchy__map="learned", diffusion__xi=0.9, train__objective="paired"), "hierarchy.map='learned': "),
    (dict(diffusion__force_transition="none"), "diffusion.force_transition='none': diffusion.channel=0.5"),
    (dict(model__head="factorised"), "model.head='factorised': "),
    (dict(model__block=1, model__time_conditioning=False), "model.block=1: "),
    (dict(model__trunk="decoder", model__time_conditioning=False), "model.trunk='decoder': "),
    (dict(train__objective="count"), "train.objective='count': "),
    (dict(train__recluster_every=5), "train.recluster_every=5: "),
    (dict(generate__method="max_prob"), "generate.method='max_prob': diffusion.channel=0.5 is for 'ancestral' alone"),
    (dict(generate__force_transition="between"), "generate.force_transition='between': "),
    (dict(evaluate__decodings=("max_prob",)), "evaluate.decodings=('max_prob',): "),
    (dict(diffusion__channel=-1.0), "diffusion.channel=-1.0: must not be negative"),
    (dict(diffusion__channel_width=0), "diffusion.channel_width=0: must be at least 1")])
def test_what_is_not_built_is_refused_in_a_line(changes, text):
    with pytest.raises(ConfigError) as error:
        tiny_config(**changes)
    assert str(error.value).startswith(text) and "\n" not in str(error.value)


def test_published_layouts_have_no_place_for_it():
    with pytest.raises(ConfigError, match="released.layout: this run has diffusion.channel=0.5"):
        check_exportable(tiny_config())


def test_a_process_says_what_it_needs():
    hierarchy, chain = Hierarchy.from_parents([], V), LevelChain((1.0,))
    for more, text in ((dict(force_transition="none"), "force_transition='none'"), (dict(scale=0.0), "scale=0.0")):
        with pytest.raises(ValueError, match=text):
            ChannelProcess(hierarchy, chain, **more)
