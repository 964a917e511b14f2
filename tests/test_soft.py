"""A learned map of words to clusters: costs, gradients, draws and ways back by enumeration; runs that carry it."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import tiny
from oracle import Toy
from test_process import every_pair, library_rates, random_logits, softmax, z_scores
from test_sampler import assert_law, denoiser

from hdlm_jax.common import parallel
from hdlm_jax.config import Config, ConfigError, GenerateConfig, resolve
from hdlm_jax.decoding import loop, presets
from hdlm_jax.decoding.sampler import Sampler, make_sample_step, numbers_of, program_of
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.levels import LevelChain
from hdlm_jax.evaluation.elbo import Evaluator
from hdlm_jax.models import soft
from hdlm_jax.models.soft import SoftHead, SoftProcess
from hdlm_jax.runs.import_weights import check_exportable
from hdlm_jax.training.state import TrainState, build, make_optimizer
from hdlm_jax.training.step import make_loss_sums, make_train_step
from tools.toy_calls import joint as toy_joint
from tools.toy_map import bound as toy_bound

TWO, THREE = dict(parents=[[0, 1, 0, 1]]), dict(parents=[[0, 1, 2, 0, 2], [0, 1, 1]])
CASES = {"K=2": (TWO, (1.0, 2.0)), "K=3": (THREE, (1.5, 1.0, 4.0))}
NODES = 4
THREE_STEPS = [math.inf, math.log(3), math.log(1.5), 0.0]  # noise times of three equal steps of t


def random_map(words, clusters, seed=0, concentration=0.7):
    return np.random.default_rng(seed).dirichlet(np.full(clusters, concentration), words) * 0.98 + 0.02 / clusters


def make(case, seed=0, k=None):
    """The same toy twice, the oracle's and the library's."""
    shape, rates = CASES[case]
    hierarchy = Hierarchy.from_parents(shape["parents"])
    k = random_map(*hierarchy.sizes[:2], seed) if k is None else k
    return Toy(rates=rates, soft=k, **shape), SoftProcess(hierarchy, LevelChain(rates), 0.9, log_k=jnp.asarray(
        np.log(k), jnp.float32))


# ---- the bound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_rate_is_the_oracle_s(case):
    """w_k C at every word and symbol, for a network that knows nothing."""
    toy, process = make(case)
    x, z = every_pair(toy)
    logits = random_logits(len(x), toy.V)
    got = jax.jit(process.nelbo_rate)(jnp.asarray(logits), jnp.asarray(x), jnp.asarray(z), jnp.full(len(x), 0.7))
    p = [toy.force_one(q[0], s[0], "cavity") for q, s in zip(softmax(logits), z, strict=True)]
    reverse = toy.reverse_rates(0.7)
    want = [toy.rate(p[i], x[i, 0], z[i, 0], 0.7, reverse) for i in range(len(x))]
    np.testing.assert_allclose(got[:, 0], want, rtol=3e-5, atol=1e-5)


@pytest.mark.parametrize("case, seed", [("K=2", 0), ("K=2", 1), ("K=3", 0), ("K=3", 2)])
def test_nelbo_of_the_optimum_is_the_entropy_for_every_map(case, seed):
    toy, process = make(case, seed)
    joint = oracle.random_joint(toy.V, 2, seed=3)
    nelbo = (joint * toy.nelbo(toy.bayes(joint, cavity=True), library_rates(toy, process), NODES)).sum()
    assert nelbo == pytest.approx(oracle.entropy(joint), abs=1e-4)


@pytest.mark.parametrize("case", ["K=2", pytest.param("K=3", marks=pytest.mark.slow)])
def test_nelbo_bounds_the_likelihood_of_the_sampled_model(case):
    """A random network, all orders of the crossings: the bound holds, and what is sampled is its law."""
    toy, process = make(case)
    network = toy.random_network(2, seed=8)
    p = toy.p_model(toy.force(network, "cavity"))
    assert p.sum() == pytest.approx(1, abs=1e-9)
    assert (toy.nelbo(network, library_rates(toy, process), NODES) + np.log(p)).min() > 1e-4
    assert_law(write(toy, process, network, presets.first_hitting()), p)


@pytest.mark.parametrize("case, xi", [("K=2", 1.0), ("K=3", 0.8), *(
    pytest.param(*case, marks=pytest.mark.slow) for case in (("K=3", 1.0), ("K=2", 0.6)))])
def test_one_hot_is_the_hard_hierarchy_and_two_values_are_xi(case, xi):
    """Costs, the law one step back and the network's forced prediction, at all that can be on show."""
    shape, rates = CASES[case]
    plain = HierarchicalProcess(Hierarchy.from_parents(shape["parents"]), LevelChain(rates), xi)
    n, own = plain.hierarchy.sizes[1], np.asarray(plain.hierarchy.anc[1])
    k = np.where(np.arange(n) == own[:, None], xi, (1 - xi) / (n - 1))
    with np.errstate(divide="ignore"):
        _, process = make(case, k=k)
    x, z = (jnp.asarray(a) for a in every_pair(Toy(rates=rates, xi=xi, **shape)))
    logits = jnp.asarray(random_logits(len(x), plain.vocab_size, seed=4))
    for of in (lambda p: p.token_loss(logits, x, z), lambda p: p.posterior(logits, z, 0.3, 1.1),
               lambda p: p.forced(p.as_prediction(logits), z).log_probs()):
        np.testing.assert_allclose(*(np.exp(-jax.jit(of, static_argnums=0)(p)) for p in (process, plain)), rtol=2e-6,
                                   atol=2e-7)
    if xi < 1:  # what training starts from
        start = soft.log_map(jnp.asarray(soft.two_valued(plain.hierarchy, xi)))
        np.testing.assert_allclose(np.exp(start), k, rtol=1e-5)


# ---- gradients -------------------------------------------------------------------------------------------------------


def enumerated(toy, process, network, weights):
    """The gradient of the bound, averaged over texts by `weights`, in the logits of the map: (all of it, its part at
    fixed z), float64, from the library's costs and the library's log-probability of a draw."""
    z, words, theta = toy.sequences(network.shape[1]), toy.words(network.shape[1]), jnp.asarray(np.log(toy.soft))
    toy.soft = floored(toy.soft)
    times = 0.0  # weights of costs, noise time integrated: [V^S Z, S]
    for tau, part in zip(*oracle.quadrature(toy.rates, NODES), strict=True):
        rates = np.concatenate([[0.0], oracle.level_weight(toy.rates, tau)])[toy.level[z]]
        times = times + part * (weights.ravel()[:, None] * toy.occupancy(tau, len(z[0])))[..., None] * rates[None]
    times = jnp.asarray(times.reshape(-1, len(z[0])))
    x, z, logits = np.repeat(words, len(z), 0), np.tile(z, (len(words), 1)), jnp.log(jnp.asarray(network))
    x, z, some = jnp.asarray(x), jnp.asarray(z), times > 0

    def mean(theta, score):
        here = dataclasses.replace(process, log_k=soft.log_map(theta))
        cost = jnp.where(some, times * here.token_loss(jnp.tile(logits, (len(words), 1, 1)), x, z), 0.0).sum(1)
        drawn = jnp.where(cost > 0, here.log_drawn(x, z).sum(1), 0.0)
        return jnp.sum(cost + score * jax.lax.stop_gradient(cost) * drawn)

    gradient = jax.jit(jax.grad(mean))
    return [np.asarray(gradient(theta, score)) for score in (1.0, 0.0)]


def floored(k):
    return k * (1 - soft.FLOOR) + soft.FLOOR / k.shape[-1]


def differences(shape, rates, network, weights, theta, step=1e-4):
    """The same by finite differences of the oracle's bound; one that knows nothing of gradients."""
    def bound(logits):
        toy = Toy(rates=rates, soft=floored(softmax(logits)), **shape)
        return (weights * toy.nelbo(toy.force(network, "cavity"), nodes=NODES)).sum()

    out = np.zeros_like(theta)
    for at in np.ndindex(theta.shape):
        move = np.zeros_like(theta)
        move[at] = step
        out[at] = (bound(theta + move) - bound(theta - move)) / (2 * step)
    return out


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_the_map_are_those_of_the_enumerated_bound(case):
    """float64. The part at fixed z is no substitute: z depends on the map, and it is that of another function."""
    with jax.enable_x64(True):
        toy, process = make(case)
        network = toy.random_network(1 if case == "K=3" else 2, seed=1)
        weights = oracle.random_joint(toy.V, network.shape[1], seed=5)
        process = dataclasses.replace(process, log_k=jnp.asarray(np.log(toy.soft)))
        whole, fixed = enumerated(toy, process, network, weights)
    shape, rates = CASES[case]
    want = differences(shape, rates, network, weights, np.log(make(case)[0].soft))
    np.testing.assert_allclose(whole, want, atol=1e-8)
    assert np.abs(fixed - want).max() > 0.1 * np.abs(want).max()


def test_the_optimal_network_has_no_gradient_left_for_the_map():
    """The bound is the entropy whatever the map: what moves it is what a network does not know."""
    toy, _ = make("K=2")
    joint = oracle.random_joint(4, 2, seed=3)
    found = differences(*CASES["K=2"], toy.bayes(joint, cavity=True), joint, np.log(toy.soft), step=1e-3)
    assert np.abs(found).max() < 1e-6


@pytest.mark.slow
def test_the_toy_s_bound_is_the_enumerated_one():
    """tools/toy_map.py: the best network that sees the tokens beside its own alone, for a map that is soft."""
    joint, k = toy_joint("classes").sum(-1), random_map(4, 2)
    toy = Toy(rates=(1.0, 1.0), soft=k, **TWO)
    shows, network = toy.q(0.7), np.zeros((toy.N**3, 3, 4))
    for row, z in enumerate(toy.sequences(3)):
        seen = [shows[:, s] for s in z]
        network[row] = (np.einsum("abc,b->a", joint, seen[1]), np.einsum("abc,a,c->b", joint, seen[0], seen[2]),
                        np.einsum("abc,b->c", joint, seen[1]))
    network /= np.maximum(network.sum(-1, keepdims=True), 1e-300)
    network = np.where(network.sum(-1, keepdims=True) > 0, network, 0.25)
    want = (joint * toy.nelbo(toy.force(network, "cavity"), nodes=NODES)).sum()
    with jax.enable_x64(True):
        found = float(toy_bound(joint)(jnp.asarray(np.log(k))))
    assert found == pytest.approx(want, abs=1e-4) and found > oracle.entropy(joint) + 1e-3


def tiny_config(clusters=(2,), **changes):
    values = {"hierarchy": dict(map="learned", clusters=clusters),
              "train": dict(objective="paired", batch_size=1 << 13),
              "diffusion": dict(xi=0.9, weighting="none"), "generate": dict(length=0, num_samples=4),
              "model": dict(width=8, blocks=1, heads=2, seq_len=2, time_conditioning=False)}
    for name, value in changes.items():
        section, _, key = name.partition("__")
        values.setdefault(section, {})[key] = value
    return resolve(values)


@pytest.fixture(scope="module")
def network():
    """A tiny network with parameters that say something, and its hierarchy: K = 2, V = 4."""
    config = tiny_config()
    hierarchy = Hierarchy.from_parents(TWO["parents"])
    net, process = build(config, hierarchy)
    params = net.init_params(jax.random.key(0), 2)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(a + 0.7 * rng.standard_normal(a.shape), jnp.float32), params)
    params["head"]["map"] = jnp.asarray(np.log(random_map(4, 2, 3)), jnp.float32)
    return config, net, process, params


def table(toy, net, params):
    """What the network says at every z [Z, 2], as the oracle's networks are: [Z, 2, V]."""
    z = jnp.asarray(toy.sequences(2))
    return softmax(np.asarray(net.head.logits(params["head"], net.hidden(params, z, jnp.zeros(len(z))))))


def test_a_step_s_gradient_of_the_map_is_unbiased(network):
    """Through the network, keys, strata and pairs, against differences of the enumerated bound; 4.5 standard errors."""
    config, net, process, params = network
    toy = Toy(rates=(1.0, 1.0), soft=random_map(4, 2, 3), **TWO)
    f = table(toy, net, params)
    text = np.array([1, 2], np.int32)
    weights = np.zeros((4, 4))
    weights[tuple(text)] = 1
    want = differences(TWO, (1.0, 1.0), f, weights, np.asarray(params["head"]["map"], float))
    rows = config.train.batch_size
    batch = {"x": jnp.tile(text, (rows, 1)), "index": jnp.arange(rows, dtype=jnp.int32)}

    @jax.jit
    def gradient(key):
        (loss, nelbo), grads = jax.value_and_grad(lambda p: make_loss_sums(config, net, process)(p, batch, key)[:2],
                                                  has_aux=True)(params)
        return loss / rows, nelbo / rows, grads["head"]["map"] / rows

    drawn = [gradient(jax.random.key(i)) for i in range(24)]
    loss, nelbo, found = (np.array(a, float) for a in zip(*drawn, strict=True))
    np.testing.assert_allclose(loss, nelbo, rtol=1e-5)
    exact = toy.nelbo(toy.force(f, "cavity"))[tuple(text)]
    assert nelbo.mean() == pytest.approx(exact, abs=4.5 * nelbo.std() / 24**0.5)
    error = found.std(0) / 24**0.5
    assert error.max() < 0.1 * np.abs(want).max(), "else this says little"
    assert (np.abs(found.mean(0) - want) < 4.5 * error + 1e-5).all(), (found.mean(0), want, error)


def test_pairs_stay_together_in_microbatches(network):
    """Two parts of a batch add up to it; parts that took turns by rows would compare different texts."""
    config, net, process, params = network
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=16))
    batch = {"x": jnp.asarray(np.repeat(np.random.default_rng(0).integers(0, 4, (8, 2)), 2, 0), jnp.int32),
             "index": jnp.arange(16, dtype=jnp.int32)}
    tx, got = optax.sgd(1.0), []
    for parts in (1, 2):
        c = dataclasses.replace(config, train=dataclasses.replace(config.train, microbatches=parts))
        state = TrainState(jnp.int32(0), jnp.int32(0), params, tx.init(params), {})
        got.append(jax.jit(make_train_step(c, net, process, tx))(state, batch, jax.random.key(0))[1])
    assert got[0]["grad_norm"] == pytest.approx(float(got[1]["grad_norm"]), rel=1e-5)


def test_the_map_has_its_own_rate_and_does_not_decay(network):
    config, _, _, params = network
    tx, schedule = make_optimizer(config)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates = jax.jit(lambda g: tx.update(g, tx.init(params), params)[0])
    still = updates(zero)
    assert not np.any(still["head"]["map"]) and np.any(still["head"]["kernel"])
    moved = updates(zero | {"head": zero["head"] | {"map": jnp.ones_like(params["head"]["map"])}})["head"]["map"]
    np.testing.assert_allclose(moved, -config.hierarchy.map_rate * schedule(0), rtol=1e-3)


def test_what_is_rare_and_large_balances_what_is_frequent_and_small():
    """Gradients 1 nine times of ten, else -9: their mean is nothing, and where Adam drifts by them the map does not."""
    grads = jnp.where(jax.random.uniform(jax.random.key(0), (400, 2000)) < 0.9, 1.0, -9.0)

    def moved(tx):
        def step(state, g):
            updates, state = tx.update(g, state)
            return state, updates

        return np.asarray(jax.lax.scan(step, tx.init(grads[0]), grads)[1]).sum(0)

    ours, adam = moved(soft.by_one_scale()), moved(optax.scale_by_adam(b2=0.99))
    assert abs(ours.mean()) < 4.5 * ours.std() / 2000**0.5 < 0.2 * abs(adam.mean())


# ---- draws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_noising_has_the_map_s_law(case):
    toy, process = make(case)
    rows, tau = 6000, 1.3
    x = jnp.asarray(np.tile(np.arange(toy.V, dtype=np.int32), (rows, 1)))
    z = np.asarray(jax.jit(process.corrupt)(jax.random.key(1), x, tau=jnp.full(rows, tau)))
    for word in range(toy.V):
        counts = np.bincount(z[:, word], minlength=toy.N)
        assert np.abs(z_scores(counts, toy.q(tau)[word])).max() < 4.5, word


@pytest.mark.parametrize("case", CASES)
def test_posterior_is_the_oracle_s_and_drawn(case):
    toy, process = make(case)
    z = np.arange(toy.N, dtype=np.int32)[:, None]
    logits = random_logits(toy.N, toy.V, seed=6)
    p = softmax(logits)[:, 0]
    for tau_s, tau_t in ((0.2, 0.9), (0.4, math.inf)):
        got = np.asarray(jax.jit(process.posterior)(jnp.asarray(logits), jnp.asarray(z), tau_s, tau_t))[:, 0]
        for v in range(toy.V if math.isinf(tau_t) and toy.N > toy.mask + 1 else toy.N):
            if math.isinf(tau_t) and v != toy.mask:
                continue
            want = np.eye(toy.N)[v] if v < toy.V else toy.step(toy.force_one(p[v], v, "cavity"), v, tau_s, tau_t)
            np.testing.assert_allclose(got[v], want, rtol=2e-5, atol=2e-6)
    rows, cases = 6000, [(v, j) for v in range(toy.V, toy.N) for j in range(toy.level[v])]
    at, target = (np.tile(np.array(a, np.int32), (rows, 1)) for a in zip(*cases, strict=True))
    batch = jnp.broadcast_to(jnp.asarray(logits[at[0], 0]), (rows, len(cases), toy.V))
    out = np.asarray(jax.jit(process.reverse_step)(jax.random.key(4), batch, jnp.asarray(at), jnp.asarray(target)))
    for i, (v, j) in enumerate(cases):
        law = np.where(toy.level == j, toy.step(toy.force_one(p[v], v, "cavity"), v, 0.4, 1.2), 0)
        assert np.abs(z_scores(np.bincount(out[:, i], minlength=toy.N), law / law.sum())).max() < 4.5, (v, j)


def write(toy, process, network, method, rows=20_000):
    run = jax.jit(lambda key, z: loop.sample(key, denoiser(toy, network), process, z, method.policy, method.numbers))
    return np.asarray(run(jax.random.key(2), jnp.full((rows, network.shape[1]), toy.mask))[0])


def test_ancestral_steps_of_any_size_have_the_enumerated_law():
    toy, process = make("K=3")
    network = toy.random_network(2, seed=8)
    law = toy.p_grid(toy.force(network, "cavity"), THREE_STEPS)
    assert_law(write(toy, process, network, presets.ancestral(steps=3)), law)


def test_one_drop_a_call_writes_the_data():
    """With the optimal network in any order, also the surest first, which its predictions decide."""
    toy, process = make("K=2")
    joint = oracle.random_joint(4, 2, seed=11)
    assert_law(write(toy, process, toy.bayes(joint, cavity=True), presets.max_prob(steps=8)), joint)


def test_a_sampler_takes_the_map_of_its_parameters(network):
    """The compiled step's law is that of the parameters it is given, not of those it was made with."""
    config, net, process, params = network
    toy = Toy(rates=(1.0, 1.0), soft=random_map(4, 2, 3), **TWO)
    f, g = table(toy, net, params), GenerateConfig(steps=3)
    step = jax.jit(make_sample_step(net, process, program_of(g)))
    rows = {"z": jnp.full((20_000, 2), toy.mask), "index": jnp.arange(20_000)}
    words = np.asarray(step((params, numbers_of(g, 2)), rows, jax.random.key(0))["tokens"])
    assert_law(words, toy.p_grid(toy.force(f, "cavity"), THREE_STEPS))
    sampler = Sampler(net, process, parallel.make_mesh(config), params)
    with pytest.raises(ConfigError, match="generate.method='remdm': is not built for hierarchy.map='learned'; choose"):
        sampler(np.full((1, 2), toy.mask, np.int32), GenerateConfig(method="remdm", num_samples=1))


# ---- runs ------------------------------------------------------------------------------------------------------------


def run_config(tmp_path, **changes):
    config = tiny.read_recipe(tiny.write_recipe(tmp_path))
    values = config.as_dict()
    for name, value in (dict(hierarchy__map="learned", diffusion__xi=0.9, diffusion__weighting="none",
                             train__objective="paired", hierarchy__map_rate=300.0) | changes).items():
        section, _, key = name.partition("__")
        values[section] = values[section] | {key: value}
    return resolve(values)


@pytest.mark.slow
def test_runs_carry_the_map(tmp_path):
    """Training moves it; a resumed run is one that never stopped; evaluation, samples and the export read it."""
    import hdlm_jax
    from hdlm_jax.runs import evaluate, export, generate, train
    from hdlm_jax.training import loading

    run, other = str(tmp_path / "run"), str(tmp_path / "other")
    config = run_config(tmp_path, train__steps=4, optimizer__schedule="constant", checkpoint__every=2)
    state = train.train(config, run)
    train.train(run_config(tmp_path, train__steps=2, optimizer__schedule="constant", checkpoint__every=2), other)
    again = train.train(config, other)
    jax.tree.map(np.testing.assert_array_equal, state, again)
    loaded = loading.load_here(run, "latest")
    start = soft.two_valued(loaded.hierarchy, 0.9)
    found = np.asarray(loaded.params["head"]["map"])
    assert found.shape == (257, 8) and np.abs(found - start).max() > 0.1
    assert math.isfinite(evaluate.evaluate(config, run)["nelbo"])
    for method in ("ancestral", "max_prob"):
        drawn = dataclasses.replace(config.generate, method=method, checkpoint="latest")
        assert generate.generate(dataclasses.replace(config, generate=drawn), run)["samples"]
    export.export(dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, checkpoint="latest")), run)
    taken = hdlm_jax.load(str(tmp_path / "run" / "export"))
    np.testing.assert_array_equal(taken.run.params["head"]["map"], found)
    assert list(taken.stream(steps=3, batch_size=8))[-1].done, "texts that share slots"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["hierarchy"]["map"] == "learned"


def test_the_evaluator_s_bound_is_the_map_s(network):
    """Of other maps with the same network it is another one, and the enumerated one each time."""
    config, net, process, params = network
    x = np.array([[1, 2]], np.int32)
    mesh = parallel.make_mesh(config)
    params = jax.device_put(params, parallel.replicated(mesh))
    rows = {"x": x, "segment": np.zeros_like(x), "score": np.ones_like(x, bool)}
    evaluator = Evaluator(net, process, mesh, params, seq_len=2, seed=0, cv2=0.03, batch_size=4096)
    for seed in (3, 4):
        toy = Toy(rates=(1.0, 1.0), soft=random_map(4, 2, seed), **TWO)
        f = table(toy, net, params)
        k = jax.device_put(np.log(toy.soft).astype(np.float32), parallel.replicated(mesh))
        own = params | {"head": params["head"] | {"map": k}}
        nats = evaluator.nats(own, rows, 4096)[0].sum(-1)[:, 0]
        want = toy.nelbo(toy.force(f, "cavity"))[1, 2]
        assert nats.mean() == pytest.approx(want, abs=4.5 * nats.std() / 64)


@pytest.mark.parametrize("changes, text", [
    (dict(train__objective="count"), "train.objective='count': hierarchy.map='learned' is for 'paired' alone"),
    (dict(diffusion__xi=1.0), "diffusion.xi=1.0: a learned map starts from it"),
    (dict(diffusion__weighting="clip"), "diffusion.weighting='clip': hierarchy.map='learned' is for 'none' alone"),
    (dict(diffusion__force_transition="none"), "diffusion.force_transition='none': "),
    (dict(diffusion__hard_training=True), "diffusion.hard_training=True: "),
    (dict(model__head="factorised"), "model.head='factorised': "),
    (dict(model__trunk="decoder"), "model.trunk='decoder': "),
    (dict(model__block=1), "model.block=1: "),
    (dict(train__recluster_every=5), "train.recluster_every=5: "),
    (dict(generate__clusters="clean"), "generate.clusters='clean': "),
    (dict(generate__force_transition="between"), "generate.force_transition='between': "),
    (dict(clusters=(1,)), "hierarchy.map='learned': is of words to clusters"),
    (dict(hierarchy__map="hard"), "train.objective='paired': goes with hierarchy.map='learned'"),
    (dict(hierarchy__map="soft"), "hierarchy.map='soft': choose"),
    (dict(hierarchy__map_rate=0.0), "hierarchy.map_rate=0.0: must be positive"),
    (dict(train__batch_size=15), "train.batch_size=15: train.objective='paired'"),
    (dict(train__batch_size=6, train__microbatches=2), "train.microbatches=2: must divide the texts")])
def test_what_is_not_built_is_refused_in_a_line(changes, text):
    with pytest.raises(ConfigError) as error:
        tiny_config(**changes)
    assert str(error.value).startswith(text) and "\n" not in str(error.value)


def test_a_process_says_what_it_needs():
    hierarchy, chain = Hierarchy.from_parents(TWO["parents"]), LevelChain((1.0, 1.0))
    for more, text in ((dict(force_transition="none"), "force_transition='none'"), (dict(xi=1.0), "xi=1.0")):
        with pytest.raises(ValueError, match=text):
            SoftProcess(hierarchy, chain, **(dict(xi=0.9) | more))
    with pytest.raises(ConfigError, match="released.layout: this run has hierarchy.map='learned'"):
        check_exportable(tiny_config())
    assert Config().hierarchy.map == "hard" and GenerateConfig().method in SoftProcess.methods
    assert set(SoftProcess.methods) <= set(presets.METHODS)
    assert SoftHead(hierarchy).init(jax.random.key(0), 4)["map"].shape == (4, 2)
