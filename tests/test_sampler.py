"""The sampler: plans of drops, and what a denoiser that knows the data writes (docs/theory.md section 4)."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import Toy

from hdlm_jax.decoding import choose, loop
from hdlm_jax.decoding.policy import Policy
from hdlm_jax.diffusion import plans
from hdlm_jax.diffusion.draws import categorical, draw_from, fold, row_keys
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.levels import LevelChain

MDLM = dict(parents=[], vocab_size=4)
TWO = dict(parents=[[0, 1, 0, 1]])
THREE = dict(parents=[[0, 1, 2, 0, 2], [0, 1, 1]])
ROWS = 20_000


def make(shape, rates, xi=1.0, force="cavity"):
    """The same toy twice: the oracle's and the library's."""
    hierarchy = Hierarchy.from_parents(shape["parents"], shape.get("vocab_size"))
    return Toy(rates=rates, xi=xi, **shape), HierarchicalProcess(hierarchy, LevelChain(rates), xi, force)


def denoiser(toy, network):
    """A network that looks its answer up in a table [Z, S, V]."""
    logits = jnp.asarray(np.log(network + 1e-30), jnp.float32)
    place = toy.N ** np.arange(network.shape[1])[::-1]

    def denoise(z, t):
        assert t.shape == z.shape[:1]
        return logits[jnp.sum(z * jnp.asarray(place)[None], axis=-1)]

    return denoise


def planned(kind, clusters="exact"):
    return Policy(choose.Planned(kind), clusters=clusters)


def plan_of(key, process, start, kind, steps=1, reveals=1):
    """The plan that the loop draws for these rows."""
    keys = fold(row_keys(key, len(start)), jnp.uint32(choose._PLAN))
    return plans.plan(keys, process.chain, process.level_of(start), kind, steps, reveals)


def write(toy, process, network, rows=ROWS, seed=0, start=None, kind="events", steps=1, reveals=1, **kwargs):
    """Words [rows, S] and the statistics of one batch sampled from `start` symbols (all masks by default)."""

    policy, kwargs["numbers"] = planned(kind, kwargs.pop("clusters", "exact")), dict(steps=steps, reveals=reveals)
    run = jax.jit(lambda key, z: loop.sample(key, denoiser(toy, network), process, z, policy, **kwargs))

    length = network.shape[1]
    start = np.full((rows, length), toy.mask) if start is None else start
    words, stats = run(jax.random.key(seed), jnp.asarray(start, jnp.int32))
    return np.asarray(words), jax.tree.map(np.asarray, stats)


def counts_of(words, vocab_size):
    counts = np.zeros((vocab_size,) * words.shape[1])
    np.add.at(counts, tuple(words.T), 1)
    return counts


def assert_law(words, law):
    """Total variation at the sampling floor (and no symbol but words)."""
    assert words.min() >= 0 and words.max() < law.shape[0]
    distance, floor, spread = oracle.total_variation(counts_of(words, law.shape[0]), law)
    assert distance <= floor + 4.5 * spread, (distance, floor, spread)


# ---- what is written ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, rates, xi, force, length",
    [
        (MDLM, (1.0,), 1.0, "none", 3),
        (TWO, (1.0, 1.0), 1.0, "cavity", 3),
        pytest.param(TWO, (1.0, 2.0), 1.0, "none", 2, marks=pytest.mark.slow),
        pytest.param(TWO, (1.0, 1.0), 0.8, "none", 3, marks=pytest.mark.slow),
        pytest.param(TWO, (2.0, 1.0), 0.8, "cavity", 2, marks=pytest.mark.slow),
        pytest.param(THREE, (1.0, 1.0, 1.0), 1.0, "cavity", 2, marks=pytest.mark.slow),
        (THREE, (1.5, 1.0, 4.0), 0.7, "cavity", 2),
    ],
)
def test_one_drop_a_call_writes_the_data(shape, rates, xi, force, length):
    toy, process = make(shape, rates, xi, force)
    joint = oracle.random_joint(toy.V, length, seed=11)
    words, stats = write(toy, process, toy.bayes(joint, cavity=force == "cavity"))
    assert_law(words, joint)
    assert stats["calls"] == length * toy.K and (stats["row_forwards"] == length * toy.K).all()


def test_one_drop_a_call_of_any_network_is_the_oracle_s_model():
    """Fact 6's p_model, for a network that knows nothing: KL pieces and sampler speak of the same model."""
    toy, process = make(THREE, (1.0, 0.5, 2.0), 0.8, "cavity")
    network = toy.random_network(2, seed=12)
    words, _ = write(toy, process, network)
    assert_law(words, toy.p_model(toy.force(network, "cavity")))


@pytest.mark.parametrize("force", ["none", "within"])
def test_at_xi_one_the_sampler_is_the_model_of_the_bound(force):
    """Also where an unforced network puts mass off the cluster on show (the limit branch of pi)."""
    toy, process = make(THREE, (1.0, 1.0, 1.0), 1.0, force)
    network = toy.random_network(2, seed=13)
    words, _ = write(toy, process, network)
    assert_law(words, toy.p_model(toy.force(network, force)))


@pytest.mark.slow
@pytest.mark.parametrize("shape, rates, xi", [
    (TWO, (1.0, 0.5), 0.8), pytest.param(THREE, (1.0, 1.0, 2.0), 1.0, marks=pytest.mark.slow)])
def test_grid_is_ancestral_sampling(shape, rates, xi):
    """At T = 1, 3 the law of the oracle's kernels, with jumps over levels; nearer the data as T grows."""
    toy, process = make(shape, rates, xi)
    joint = oracle.random_joint(toy.V, 2, seed=14)
    network = toy.bayes(joint, cavity=True)
    forced = toy.force(network, "cavity")
    distances = []
    for steps in (1, 3, 24):
        words, _ = write(toy, process, network, kind="grid", steps=steps, seed=steps)
        if steps <= 3:
            with np.errstate(divide="ignore"):
                taus = -np.log(np.arange(steps + 1) / steps)
            assert_law(words, toy.p_grid(forced, [*taus[:-1], 0.0]))
        distances.append(oracle.total_variation(counts_of(words, toy.V), joint)[0])
    assert all(a > b for a, b in itertools.pairwise(distances)), distances
    assert distances[0] > 0.1 and distances[-1] < 0.04, distances


def test_one_step_is_the_product_of_the_marginals():
    toy, process = make(TWO, (1.0, 1.0))
    joint = oracle.random_joint(4, 2, seed=14)
    words, stats = write(toy, process, toy.bayes(joint, cavity=True), kind="grid", steps=1)
    assert_law(words, np.outer(joint.sum(1), joint.sum(0)))
    assert stats["calls"] == 1


@pytest.mark.slow
def test_clean_clusters_are_another_sampler():
    """anc_j(x) in place of the exact kernel: the data at xi = 1, something else below."""
    joint = oracle.random_joint(4, 2, seed=15)
    toy, process = make(TWO, (1.0, 1.0), 1.0)
    words, _ = write(toy, process, toy.bayes(joint, cavity=True), clusters="clean")
    assert_law(words, joint)
    toy, process = make(TWO, (1.0, 1.0), 0.6)
    words, _ = write(toy, process, toy.bayes(joint, cavity=True), clusters="clean")
    distance, floor, spread = oracle.total_variation(counts_of(words, 4), joint)
    assert words.max() < 4 and distance > floor + 10 * spread


def test_reveal_all_at_once():
    """m = S K writes the product of the marginals in one call."""
    toy, process = make(TWO, (1.0, 1.0))
    joint = oracle.random_joint(4, 2, seed=16)
    network = toy.bayes(joint, cavity=True)
    words, stats = write(toy, process, network, kind="reveal", reveals=4)
    assert_law(words, np.outer(joint.sum(1), joint.sum(0)))
    assert stats["calls"] == 1


# ---- prompts, infilling -------------------------------------------------------------------------


@pytest.mark.slow
def test_prompt_words_stay_and_the_rest_follows_them():
    toy, process = make(TWO, (1.0, 1.0), 0.8)
    joint = oracle.random_joint(4, 3, seed=17)
    network = toy.bayes(joint, cavity=True)
    start = np.full((ROWS, 3), toy.mask)
    start[:, 1] = np.arange(ROWS) % 4
    for kind in ("events", "grid"):
        words, _ = write(toy, process, network, start=start, kind=kind, steps=7)
        np.testing.assert_array_equal(words[:, 1], start[:, 1])
        if kind == "events":
            for given in range(4):
                law = joint[:, given]
                assert_law(words[start[:, 1] == given][:, [0, 2]], law / law.sum())


@pytest.mark.parametrize("kind", ["grid", "reveal"])
def test_a_given_cluster_is_respected(kind):
    """xi = 1: a position that starts at a cluster ends at one of its words, whatever the network says."""
    toy, process = make(THREE, (1.0, 1.0, 1.0))
    network = toy.random_network(3, seed=18)
    rng = np.random.default_rng(0)
    start = rng.integers(0, toy.N, (500, 3))
    words, _ = write(toy, process, network, start=start, kind=kind, steps=5, reveals=2)
    assert words.min() >= 0 and words.max() < toy.V
    for k in range(toy.K + 1):
        here = toy.level[start] == k
        assert here.any()
        np.testing.assert_array_equal(toy.anc[k][words[here]], toy.node[start[here]])


def test_a_given_cluster_conditions_exactly():
    """One drop a call from (cluster, mask) writes the data given the cluster."""
    toy, process = make(TWO, (1.0, 1.0))
    joint = oracle.random_joint(4, 2, seed=19)
    start = np.tile([toy.offsets[1] + 1, toy.mask], (ROWS, 1))
    words, stats = write(toy, process, toy.bayes(joint, cavity=True), start=start)
    law = np.where((toy.anc[1] == 1)[:, None], joint, 0)
    assert_law(words, law / law.sum())
    assert stats["calls"] == 3  # the fourth has nothing to do


# ---- plans --------------------------------------------------------------------------------------


def times_of(plan):
    """[B, calls] t that the network is told at each call."""
    rows = jnp.zeros(len(plan.drop_call), jnp.int32)
    return np.stack([np.asarray(plan.time(rows + call)) for call in range(int(plan.calls[0]))], axis=1)


def levels_along(plan, calls):
    """[calls + 1, B, S] levels before each call and after the last."""
    drop_call = np.asarray(plan.drop_call)
    np.testing.assert_array_equal(plan.target(jnp.zeros_like(plan.calls)), (drop_call > 0).sum(-1))
    return np.stack([(drop_call > c).sum(-1) for c in range(-1, calls)])


@pytest.mark.parametrize("kind, steps, reveals", [("grid", 6, 1), ("events", 1, 1), ("reveal", 1, 3)])
@pytest.mark.parametrize("rates", [(1.0,), (0.5, 1.0, 3.0)])
def test_plans_bring_every_token_down(kind, steps, reveals, rates):
    chain, rows, tokens = LevelChain(rates), 50, 7
    k = len(rates)
    level0 = np.random.default_rng(1).integers(0, k + 1, (rows, tokens))
    level0[0], level0[1] = k, 0
    draw = jax.jit(lambda key: plans.plan(key, chain, jnp.asarray(level0), kind, steps, reveals))
    plan = draw(jax.random.key(2))
    calls = {"grid": steps, "events": tokens * k, "reveal": -(-tokens * k // reveals)}[kind]
    assert (plan.calls == calls).all() and plan.drop_call.shape == (rows, tokens, k)
    time = times_of(plan)
    levels = levels_along(plan, calls)
    np.testing.assert_array_equal(levels[0], level0)
    assert (levels[-1] == 0).all() and (np.diff(levels, axis=0) <= 0).all()
    assert (time >= 0).all() and (time <= 1).all() and (np.diff(time, axis=1) <= 0).all()
    assert kind == "grid" or (time[:, 0] > time[:, -1])[level0.sum(1) > reveals].all()
    drops = -np.diff(levels, axis=0).sum(-1)  # [calls, B]
    if kind != "grid":
        total = level0.sum(1)
        want = np.clip(total[None] - reveals * np.arange(calls)[:, None], 0, reveals)
        np.testing.assert_array_equal(drops, want)  # exactly m a call, the last one takes the rest


def test_unknown_plan():
    with pytest.raises(ValueError, match="plan='all'.*grid, events, reveal"):
        plans.plan(jax.random.key(0), LevelChain((1.0,)), jnp.ones((1, 2), jnp.int32), "all")


@pytest.mark.parametrize("rates", [(1.0, 1.0), (0.5, 2.0)])
def test_event_times_have_the_chain_s_law(rates):
    """Kolmogorov-Smirnov on the first and the last event, and the order of the drops of two tokens."""
    rows, tokens = 20_000, 2
    chain = LevelChain(rates)
    plan = plans.plan(jax.random.key(3), chain, jnp.full((rows, tokens), 2), "events")
    tau = -np.log1p(-np.minimum(times_of(plan).astype(float), 1 - 1e-9))

    def distance(sample, cdf):
        at = np.sort(sample)[:: rows // 200]
        empirical = np.arange(0, rows, rows // 200) / rows
        return np.abs(empirical - np.array([cdf(t) for t in at])).max()

    limit = 1.95 / math.sqrt(rows)  # passed with probability 1e-3
    assert distance(tau[:, 0], lambda t: oracle.level_beta(rates, t)[-1] ** tokens) < limit
    assert distance(tau[:, -1], lambda t: 1 - oracle.level_beta(rates, t)[0] ** tokens) < limit

    levels = levels_along(plan, 4)
    first = np.diff(levels, axis=0)[::-1, :, 0] != 0  # [calls, B], forward in time: does token 0 cross?
    orders, seen = set(itertools.permutations([0, 0, 1, 1])), 0
    for order in orders:
        at, chance = [0, 0], 1.0
        for i in order:
            clocks = [rates[level] if level < 2 else 0.0 for level in at]
            chance *= clocks[i] / sum(clocks)
            at[i] += 1
        share = np.all(first == (np.array(order) == 0)[:, None], axis=0).mean()
        seen += share
        assert abs(share - chance) < 4.5 * math.sqrt(chance * (1 - chance) / rows)
    assert seen == pytest.approx(1)


@pytest.mark.parametrize("rates", [(1.0,), (2.0, 1.0), (1.0, 0.5, 2.0)])
def test_expected_network_calls(rates):
    """E[NFE] = sum over steps of 1 - (1 - q)^S, q = P(a token crosses anything in the step)."""
    tokens, steps, rows, k = 3, 8, 20_000, len(rates)
    level0 = jnp.full((rows, tokens), k)
    plan = jax.jit(lambda key: plans.plan(key, LevelChain(rates), level0, "grid", steps))(jax.random.key(4))
    busy = (np.diff(levels_along(plan, steps), axis=0) != 0).any(-1).sum(0)
    stays = []
    for c in range(steps):
        tau_s = -math.log((c + 1) / steps)
        if c == 0:
            stays.append(oracle.level_beta(rates, tau_s)[-1])
        else:
            step = oracle.expm(oracle.level_generator(rates), -math.log(c / steps) - tau_s)
            stays.append((oracle.level_beta(rates, tau_s) * np.diag(step)).sum())
    want = sum(1 - stay**tokens for stay in stays)
    assert abs(busy.mean() - want) < 4.5 * busy.std() / math.sqrt(rows)


def test_a_row_alone_makes_no_empty_call():
    toy, process = make(TWO, (1.0, 1.0))
    network = toy.random_network(2)
    words, stats = write(toy, process, network, rows=300, kind="grid", steps=40)
    assert stats["calls"] <= 40 and (stats["row_forwards"] <= 4).all() and (stats["row_forwards"] >= 1).all()
    _, alone = write(toy, process, network, rows=1, kind="grid", steps=40)
    assert alone["calls"] == alone["row_forwards"][0] <= 4


def test_grid_times_in_one_step_follow_the_chain():
    """P(level after call c) = beta at the end of that step: the grid's edges are where they should be."""
    rates, steps, rows = (1.0, 0.5), 5, 50_000
    plan = plans.plan(jax.random.key(5), LevelChain(rates), jnp.full((rows, 1), 2), "grid", steps)
    np.testing.assert_allclose(times_of(plan)[0], 1 - np.arange(steps) / steps, rtol=1e-6)
    levels = levels_along(plan, steps)[..., 0]
    for c in range(steps):
        beta = oracle.level_beta(rates, -math.log((c + 1) / steps))
        share = np.bincount(levels[c + 1], minlength=3) / rows
        assert (np.abs(share - beta) < 4.5 * np.sqrt(beta * (1 - beta) / rows) + 1e-9).all()


# ---- the loop -----------------------------------------------------------------------------------


def setup_small(rows=6, length=3):
    toy, process = make(TWO, (1.0, 1.0), 0.8)
    network = toy.random_network(length, seed=20)
    start = np.random.default_rng(2).integers(0, toy.N, (rows, length))
    start[0] = toy.mask
    return toy, process, network, jnp.asarray(start, jnp.int32)


@pytest.mark.parametrize(
    "kind, steps, clusters", [("grid", 12, "exact"), *(pytest.param(*p, marks=pytest.mark.slow) for p in (
        ("events", 1, "clean"), ("reveal", 1, "exact")))]
)
def test_compiled_loop_equals_its_python_twin(kind, steps, clusters):
    """Token for token: the same plan walked in plain Python, the network asked only where something drops.

    However few rows and drops are worked on at once.
    """
    toy, process, network, start = setup_small()
    denoise = denoiser(toy, network)
    run = functools.partial(loop.sample, denoise=denoise, process=process, policy=planned(kind, clusters),
                            numbers=dict(steps=steps, reveals=2))
    words, stats = jax.jit(run)(jax.random.key(7), z=start)
    for rows, drops in ((4, 5), (1, 1)):
        how = loop.Sampling(rows=rows, tokens=drops)
        again, counted = jax.jit(functools.partial(run, how=how))(jax.random.key(7), z=start)
        np.testing.assert_array_equal(again, words)
        np.testing.assert_array_equal(counted["row_forwards"], stats["row_forwards"])

    plan = plan_of(jax.random.key(7), process, start, kind, steps, 2)
    drop_call, time = np.asarray(plan.drop_call), times_of(plan)
    keys = [jax.random.fold_in(jax.random.key(7), row) for row in range(len(start))]
    reverse_step = jax.jit(process.reverse_step, static_argnames="clusters")
    z, forwards = np.asarray(start), np.zeros(len(start), int)
    for call in range(time.shape[1]):
        target = (drop_call > call).sum(-1)
        busy = (drop_call == call).any((1, 2))
        if not busy.any():
            continue
        forwards = forwards + busy
        here = jnp.stack([jax.random.fold_in(key, call) for key in keys])
        logits = denoise(jnp.asarray(z), jnp.asarray(time[:, call]))
        target_ = jnp.asarray(target, jnp.int32)
        after = np.asarray(reverse_step(here, logits, jnp.asarray(z), target_, clusters=clusters))
        unmoved = target >= toy.level[z]
        np.testing.assert_array_equal(after[unmoved], z[unmoved])
        np.testing.assert_array_equal(toy.level[after], np.minimum(target, toy.level[z]))
        z = after
    np.testing.assert_array_equal(words, z)
    assert stats["calls"] == forwards.max(), "every row goes on at once"
    np.testing.assert_array_equal(stats["row_forwards"], forwards)


@pytest.mark.parametrize("kind", ["grid", pytest.param("events", marks=pytest.mark.slow)])
def test_rows_do_not_depend_on_batch_mates(kind):
    """One key per row: any batch size, any order, the same text."""
    toy, process, network, start = setup_small(rows=8)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(8), i))(jnp.arange(8))

    run = jax.jit(lambda keys, z: loop.sample(keys, denoiser(toy, network), process, z, planned(kind), {"steps": 9})[0])

    whole = np.asarray(run(keys, start))
    if kind == "events":
        np.testing.assert_array_equal(whole, run(jax.random.key(8), start))
    np.testing.assert_array_equal(whole[::-1], run(keys[::-1], start[::-1]))
    for row in (0, 5):
        np.testing.assert_array_equal(whole[row : row + 1], run(keys[row : row + 1], start[row : row + 1]))
    assert len({tuple(r) for r in np.asarray(run(keys, jnp.full_like(start, toy.mask))).tolist()}) > 2


def test_the_network_is_told_the_time_of_its_call():
    toy, process = make(MDLM, (1.0,))
    start = jnp.full((3, 4), toy.mask)
    plan = plan_of(jax.random.key(10), process, start, "events")

    def denoise(z, t):  # shows what it was told: the word that t falls on
        word = jnp.clip((t * 4).astype(jnp.int32), 0, 3)
        return jnp.where(jnp.arange(4)[None, None] == word[:, None, None], 0.0, -1e4) + jnp.zeros((len(t), 4, 1))

    words, _ = loop.sample(jax.random.key(10), denoise, process, start, planned("events"), {})
    told = np.take_along_axis(times_of(plan), np.asarray(plan.drop_call)[..., 0], axis=1)
    np.testing.assert_array_equal(words, (told * 4).astype(int))


# ---- draws --------------------------------------------------------------------------------------


def draw_words(logits, rows=ROWS, z=None, seed=0, **kwargs):
    toy, process = make(TWO, (1.0, 1.0), kwargs.pop("xi", 1.0))
    z = toy.mask if z is None else z
    tokens = jnp.full((rows, 1), z)
    batch = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (rows, 1, 4))
    run = jax.jit(lambda key, batch, z: process.reverse_step(key, batch, z, jnp.zeros_like(z), **kwargs))
    return np.asarray(run(jax.random.key(seed), batch, tokens))


def test_temperature():
    logits = np.array([0.3, 1.2, -0.5, 0.9])
    for temperature in (0.5, 2.0):
        p = np.exp(logits / temperature)
        assert_law(draw_words(logits, temperature=temperature), p / p.sum())
    assert (draw_words(logits, rows=50, temperature=0.0) == 1).all()
    assert (draw_words(logits, rows=50, temperature=1e-3) == 1).all()
    traced = jax.jit(lambda t: draw_from(jax.random.split(jax.random.key(1), 50), jnp.tile(logits, (50, 1)), t))
    assert (traced(1e-3) == 1).all() and (traced(3.0) != 1).any()


def test_greedy_takes_the_best_word_of_the_cluster():
    toy, _ = make(TWO, (1.0, 1.0))
    logits = np.array([0.3, 1.2, -0.5, 0.9])
    assert (draw_words(logits, rows=20, z=int(toy.offsets[1]), temperature=0.0) == 0).all()


def test_temperature_to_zero_is_greedy_below_xi_one():
    """The temperature divides log p *after* the force transition, so that its limit is the argmax of p."""
    toy, _ = make(TWO, (1.0, 1.0), 0.8)
    # the cavity adds log(xi/d) = 1.39 to words 0 and 2
    logits, z = np.array([0.3, 1.0, -0.5, 0.9]), int(toy.offsets[1])
    assert (draw_words(logits, rows=50, z=z, xi=0.8, temperature=0.0) == 0).all()
    assert (draw_words(logits, rows=50, z=z, xi=0.8, temperature=1e-3) == 0).all()


@pytest.mark.parametrize("top_p, kept", [(0.45, [1]), (0.55, [1, 3]), (0.9, [1, 3, 0]), (0.99, [0, 1, 2, 3])])
def test_top_p(top_p, kept):
    p = np.array([0.15, 0.5, 0.05, 0.3])
    law = np.zeros(4)
    law[kept] = p[kept] / p[kept].sum()
    assert_law(draw_words(np.log(p), top_p=top_p), law)


def test_top_p_after_the_force_transition_and_the_temperature():
    toy, _ = make(TWO, (1.0, 1.0))
    p = np.array([0.1, 0.6, 0.04, 0.26])
    words = draw_words(np.log(p), z=int(toy.offsets[1]), top_p=0.8)  # words 0 and 2 are left: .71 and .29
    assert_law(words, np.array([10 / 14, 0, 4 / 14, 0]))
    words = draw_words(np.log(p), z=int(toy.offsets[1]), top_p=0.8, temperature=0.5)  # .86 and .14
    assert (words == 0).all()


def test_words_of_small_probability_are_drawn_as_often_as_they_should():
    """65,535 words of 1e-7 each: the default float32 Gumbel noise stops at 15.9 and would draw half of them."""
    words, rows, calls = 65_536, 32, 500
    p = np.full(words, 1e-7)
    p[12_345] = 1 - 1e-7 * (words - 1)
    logits = jnp.asarray(np.log(p), jnp.float32)[None, None]

    @jax.jit
    def rare(key):
        def call(i):
            keys = jax.vmap(lambda r: jax.random.fold_in(jax.random.fold_in(key, i), r))(jnp.arange(rows))
            drawn = categorical(keys, jnp.broadcast_to(logits[0], (rows, words)))
            return jnp.sum(drawn != 12_345)

        return jax.lax.map(call, jnp.arange(calls)).sum()

    want = rows * calls * 1e-7 * (words - 1)
    assert abs(int(rare(jax.random.key(11))) - want) < 4.5 * math.sqrt(want)


@pytest.mark.parametrize("words", [2, 17])
def test_categorical_over_any_number_of_words(words):
    p = np.random.default_rng(words).dirichlet(np.ones(words))
    logits = jnp.asarray(np.log(p), jnp.float32)
    keys = jax.random.split(jax.random.key(12), (400, 50))
    drawn = np.asarray(jax.jit(lambda k: categorical(k, jnp.broadcast_to(logits, (400, 50, words))))(keys))
    assert_law(drawn.reshape(-1, 1), p)
