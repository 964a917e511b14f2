"""Policies that score, count, stop and revise: equal to a plain Python twin, and true to what their papers say."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import twin
from test_sampler import TWO as TWO_LEVELS
from test_sampler import counts_of, denoiser
from test_sampler import make as make_toy

from hdlm_jax.decoding import choose, revise
from hdlm_jax.decoding.choose import Above, All, Confidence, Count, Doubling, Eos, Even, Planned, Scored
from hdlm_jax.decoding.loop import Sampling, sample
from hdlm_jax.decoding.policy import Policy
from hdlm_jax.diffusion import plans
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.levels import LevelChain

V, S, EOS = 6, 8, 2
PARENTS = {1: [], 2: [[0, 1, 2, 0, 1, 0]], 3: [[0, 1, 2, 0, 1, 0], [0, 1, 1]]}
NUMBERS = dict(steps=4, reveals=3, count=2, threshold=0.55, threshold_cluster=0.7, factor=1.2, eos=EOS, eos_least=0.3,
               confident=4, least=2, mu=2.0, eta=0.7, gap_early=1.2, gap_middle=1.0, gap_late=0.5, t_on=0.6, t_off=0.2,
               alpha_on=0.7)


def greedy(score=Confidence(), quota=Even(), straight=False, **kwargs):  # noqa: B008
    return Policy(Scored(score, quota, straight), draw="argmax", **kwargs)


def filled(revise, draw="argmax", block=0):
    return Policy(Scored(Confidence(), All(), straight=True), draw=draw, block=block, revise=revise)


def remasking(kind="cap", draw="argmax"):
    return Policy(revise.Remask(kind), draw=draw, revise=revise.Remask(kind))


# name: policy, what the twin calls it, numbers of its own
METHODS = {
    "base": (greedy(), {}, {}),
    "base_straight": (greedy(straight=True), dict(straight=True), {}),
    "base_blocks": (greedy(block=3), dict(block=3), {}),
    "margin": (greedy(choose.Confidence("margin"), Count()), dict(score="margin", quota="count"), {}),
    "fast": (greedy(Confidence(), Above()), dict(quota="above"), {}),
    "factor": (greedy(Confidence(), choose.Factor()), dict(quota="factor"), {}),
    "dimple": (greedy(Confidence(), Above(Even())), dict(quota="above_even"), {}),
    "dparallel": (greedy(choose.Confidence("entropy"), Above()), dict(score="entropy", quota="above"),
                  dict(threshold=-0.5, threshold_cluster=-0.5)),
    "ccd": (greedy(choose.Coherent(), Count()), dict(score="pbar_entropy", quota="count"), dict(count=1)),
    "ccd_ds": (greedy(choose.Coherent(), choose.Consistent()), dict(score="pbar_entropy", quota="consistent"), {}),
    "eoser": (greedy(Eos()), dict(score="eos"), {}),
    "ass": (greedy(Eos(doubling=Doubling()), Doubling()), dict(score="eos_doubling", quota="doubling"), {}),
    "ass_blocks": (greedy(Eos(doubling=Doubling()), Doubling(), block=3),
                   dict(score="eos_doubling", quota="doubling", block=3), {}),
    "prophet": (greedy(commit=revise.Gap()), dict(commit="open"), {}),
    "prophet_last": (greedy(commit=revise.Gap(last=3)), dict(commit="last"), {}),
    "prophet_stages": (greedy(commit=revise.Gap(stages=True), block=3), dict(commit="stages", block=3), {}),
    "saber": (greedy(Confidence(), choose.Running(), revise=revise.Backtrack()),
              dict(quota="running", revise="backtrack"), {}),
    "saber_blocks": (greedy(Confidence(), choose.Running(), revise=revise.Backtrack(), block=3),
                     dict(quota="running", revise="backtrack", block=3), {}),
    "saber_prophet": (greedy(Confidence(), choose.Running(), revise=revise.Backtrack(), commit=revise.Gap()),
                      dict(quota="running", revise="backtrack", commit="open"), {}),
    "rcr": (filled(revise.Scheduled()), dict(straight=True, quota="all", revise="running"), {}),
    "rcr_cosine": (filled(revise.Scheduled("cosine")),
                   dict(straight=True, quota="all", revise="running", schedule="cosine"), {}),
    "rcr_clusters": (filled(revise.Scheduled(to="cluster"), block=5),
                     dict(straight=True, quota="all", revise="running", to="cluster", block=5), {}),
    "p2": (filled(revise.Scheduled(by="now")), dict(straight=True, quota="all", revise="planning"), {}),
    "p2_clusters": (filled(revise.Scheduled("cosine", "cluster", "now")),
                    dict(straight=True, quota="all", revise="planning", to="cluster", schedule="cosine"), {}),
    "p2_levels": (Policy(Scored(Confidence(), All()), "argmax", revise=revise.Scheduled(by="now")),
                  dict(quota="all", revise="planning"), {}),
    "planned_grid": (Policy(Planned(), draw="argmax"), {}, {}),
    "planned_reveal": (Policy(Planned("reveal"), draw="argmax"), {}, {}),
    "planned_events": (Policy(Planned("events"), draw="argmax"), {}, {}),
    "remdm": (remasking(), {}, dict(steps=6, eta=0.2)),
    "remdm_rescale": (remasking("rescale"), {}, dict(steps=6, eta=0.5)),
    "remdm_loop": (remasking("loop"), {}, dict(steps=9, eta=0.3)),
}
FAST = [("dimple", 2), ("ccd_ds", 2), ("ass", 2), ("prophet", 2), ("saber", 1), ("saber", 2), ("rcr", 1),
        ("p2_clusters", 2), ("p2_levels", 2), ("remdm", 2)]


@functools.cache
def process_of(levels, xi=1.0):
    return HierarchicalProcess(Hierarchy.from_parents(PARENTS[levels], V), LevelChain((1.0, 1.5, 0.7)[:levels]), xi)


@functools.cache
def tree_of(levels):
    return twin.Tree(PARENTS[levels], V)


@functools.cache
def program(policy, levels, rows=2, drops=5):
    """One compiled program for all networks, canvases and numbers; groups of few rows and tokens."""
    process = process_of(levels)

    def run(keys, table, z, given, length, numbers):
        def network(z, t):
            return jnp.sum(table[jnp.arange(S)[None], z], axis=1)

        words, stats = sample(keys, network, process, z, policy, numbers, given=given, length=length,
                              how=Sampling(rows=rows, tokens=drops, frames=2 * S * levels))
        return words, stats

    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
    return jax.jit(run, compiler_options=quick)


def random_table(levels, seed=0, scale=0.5):
    """Logits [S, N, S, V]: what position j showing z says of position s.

    Sums are exact in float32, and no probability is so near to 1 that it would tie there with another.
    """
    shape = (S, tree_of(levels).mask + 1, S, V)
    return np.round(scale * 64 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32) / 64


def canvases(levels):
    """z, given, length of six rows: free, with a prompt, with typed tokens, shorter, all but done, done."""
    tree = tree_of(levels)
    z, given = np.full((6, S), tree.mask), np.zeros((6, S), bool)
    z[1, :3], given[1, :3] = [4, 0, 2], True
    if levels > 1:
        z[2, [1, 4, 5]] = tree.offset[1] + np.array([0, 2, 1])
    z[3, 5], given[3, 5] = 1, True
    z[4, 2:], given[4, 2:] = 3, True
    z[5], given[5] = 0, True
    return z, given, np.array([S, S, S, 6, S, S])


def run(name, levels, table, numbers=None, canvas=None, seed=0, order=None, policy=None):
    """Symbols after each call, a list [calls + 1] of int [S] for every row."""
    z, given, length = canvases(levels) if canvas is None else canvas
    numbers = NUMBERS | METHODS[name][2] | (numbers or {})
    keys = jax.vmap(lambda b: jax.random.fold_in(jax.random.key(seed), b))(jnp.arange(len(z)))
    order = np.arange(len(z)) if order is None else order
    _, stats = program(policy or METHODS[name][0], levels)(
        keys[order], table, z[order].astype(np.int32), given[order], length[order],
        {n: jnp.asarray(v) for n, v in numbers.items()})
    film, calls = np.asarray(stats["z"]), np.asarray(stats["row_forwards"])
    trails = [[*film[b, : calls[b] + 1]] for b in range(len(z))]
    for b in range(len(z)):  # a finished row stays as it is
        assert (film[b, calls[b]:] == film[b, calls[b]]).all()
    return [trails[b] for b in np.argsort(order)]


def softmax(logits):
    e = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def uniforms(seed, row, call, what):
    """[S] numbers of a turn of a row, as the house draws them."""
    key = functools.reduce(jax.random.fold_in, (row, call), jax.random.key(seed))
    return np.asarray(jax.vmap(lambda s: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, s), what)))(
        jnp.arange(S)))


def targets_of(name, levels, row, canvas, free, numbers, seed=0):
    """(call, z) -> the levels that blind policies aim at, from the same random numbers."""
    process, tree = process_of(levels), tree_of(levels)
    size = len(canvas)
    if name.startswith("planned"):
        level = np.zeros((1, S), int)
        level[0, :size] = [tree.level(s) if f else 0 for s, f in zip(canvas, free, strict=True)]
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), np.uint32(2**32 - 1))
        kind = name.split("_")[1]
        plan = plans.plan(key[None], process.chain, level, kind, numbers["steps"], numbers["reveals"])
        call_of = np.asarray(plan.drop_call)[0]

        def planned(call, z):
            ahead = [call_of[i, k] for i in range(size) if free[i] for k in range(tree.level(z[i]))]
            if not ahead:
                return None
            now = min(ahead)
            return {i: int((call_of[i] > now).sum()) for i in range(size) if free[i]}, None

        return planned
    was, rates = np.full(S, levels), process.chain.rates

    def remasked(call, z):
        nonlocal was
        if call == numbers["steps"] or not any(free):
            return None
        before, after, sigma = remdm_step(name, numbers, call)
        low, high = max(-math.log(min(after / (1 - sigma), 1)), 1e-12), -math.log(before) if before else 45.0
        laws = oracle.level_posterior(rates, low, high), oracle.expm(oracle.level_generator(rates), -math.log1p(-sigma))
        aims = []
        for what, law in zip((10, 11), laws, strict=True):
            edges = np.cumsum(law[was], axis=-1)
            was = (edges[:, :-1] <= uniforms(seed, row, call, what)[:, None]).sum(-1) * (after < 1)
            aims.append({i: min(int(was[i]), tree.level(z[i]) if what == 10 else levels)
                         for i in range(size) if free[i]})
        return aims

    return remasked


def remdm_step(name, n, call):
    """alpha_t, alpha_s, sigma of the paper, cut to where there is a process in between."""
    t, s = 1 - call / n["steps"], 1 - (call + 1) / n["steps"]

    def alpha(u):
        if name != "remdm_loop":
            return 1 - u
        if u > n["t_on"]:
            return (1 - u) * n["alpha_on"] / (1 - n["t_on"])
        return n["alpha_on"] if u > n["t_off"] else 1 - u * (1 - n["alpha_on"]) / n["t_off"]

    before, after = alpha(t), alpha(s)
    most = min(1, (1 - after) / before) if before > 0 else 1
    sigma = n["eta"] * most if name == "remdm_rescale" else min(n["eta"], most)
    if name == "remdm_loop" and not n["t_off"] < t <= n["t_on"]:
        sigma = 0
    return before, after, min(sigma, 1 - after)


def twins(name, levels, table, numbers=None, canvas=None, **kwargs):
    """What the twin makes of the same rows."""
    z, given, length = canvases(levels) if canvas is None else canvas
    tree, numbers, out = tree_of(levels), NUMBERS | METHODS[name][2] | (numbers or {}), []
    for b in range(len(z)):
        size, tail = length[b], list(z[b, length[b]:])

        def network(row, tail=tail):
            return softmax(table[np.arange(S), np.array([*row, *tail])].sum(0))

        aims = None
        if name.startswith(("planned", "remdm")):
            aims = targets_of(name, levels, b, z[b, :size], ~given[b, :size], numbers)
        trail = twin.decode(tree, network, z[b, :size], given[b], numbers, targets=aims, **METHODS[name][1] | kwargs)
        out.append([np.array([*row, *tail]) for row in trail])
    return out


def assert_same(one, other):
    for b, (left, right) in enumerate(zip(one, other, strict=True)):
        assert len(left) == len(right), (b, len(left), len(right), left, right)
        for call, pair in enumerate(zip(left, right, strict=True)):
            np.testing.assert_array_equal(*pair, err_msg=f"row {b} after call {call}")


def level_sums(trail, tree):
    return [sum(tree.level(int(x)) for x in row) for row in trail]


def assert_invariants(name, levels, trails, canvas):
    """docs/decoding.md: given tokens stay; levels fall; every turn nets a drop; all is written at the end."""
    tree, (z, given, length) = tree_of(levels), canvas
    policy = METHODS[name][0]
    for b, trail in enumerate(trails):
        still = given[b] | (np.arange(S) >= length[b])
        level = np.array([[tree.level(int(x)) for x in row] for row in trail])
        assert all((row[still] == z[b][still]).all() for row in trail)
        assert (level[-1][: length[b]] == 0).all() and (level <= level[:1]).all()
        if policy.revise is None:
            assert (np.diff(level, axis=0) <= 0).all()
        if policy.revise is None or isinstance(policy.revise, revise.Backtrack):
            assert (np.diff(level.sum(1)) <= -1).all()
        assert len(trail) - 1 <= max(level[0][~still].sum(), METHODS[name][2].get("steps", 0))
        for row, before in zip(trail[1:], trail[:-1], strict=True):  # a drop stays under what was on show
            for new, old in zip(row, before, strict=True):
                if tree.level(int(new)) < tree.level(int(old)) and policy.revise is None:
                    assert set(tree.words(int(new))) <= set(tree.words(int(old)))
    assert len(trails[5]) == 1


CASES = [pytest.param(name, levels, marks=[] if (name, levels) in FAST else pytest.mark.slow)
         for levels in PARENTS for name in METHODS if levels < 3 or METHODS[name][0].revise or "ass" in name]


@pytest.mark.parametrize("name, levels", CASES)
def test_equals_the_twin_token_for_token(name, levels):
    """At any group sizes, whatever the batch mates and their order."""
    for seed in range(3):
        table = random_table(levels, seed)
        trails = run(name, levels, table)
        assert_same(trails, twins(name, levels, table))
        assert_invariants(name, levels, trails, canvases(levels))
    order = np.array([3, 0, 5, 1, 4, 2])
    assert_same(run(name, levels, table, order=order), trails)


# ---- what the papers say ---------------------------------------------------------------------------------------------


def masks(levels, rows=2):
    """All masks, in as many rows as `canvases` has, of which the last are done."""
    z, given, length = np.full((6, S), tree_of(levels).mask), np.zeros((6, S), bool), np.full(6, S)
    z[rows:], given[rows:] = 0, True
    return z, given, length


def zeros(levels):
    return np.zeros((S, tree_of(levels).mask + 1, S, V), np.float32)


@pytest.mark.parametrize("levels", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_threshold_beyond_one_is_the_base_and_zero_one_turn_a_level(levels):
    table = random_table(levels, 5)
    none = run("dimple", levels, table, dict(threshold=1.5, threshold_cluster=1.5))
    assert_same(none, twins("base", levels, table))
    for trail in run("dimple", levels, table, dict(threshold=0.0, threshold_cluster=0.0))[:3]:
        assert len(trail) - 1 == levels


@pytest.mark.parametrize("levels", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_prophet_stops_when_it_knows(levels):
    table = random_table(levels, 6)
    gaps = ("gap_early", "gap_middle", "gap_late")
    assert_same(run("prophet", levels, table, dict.fromkeys(gaps, np.inf)), twins("base", levels, table))
    calls = [[len(t) - 1 for t in run("prophet", levels, table, dict.fromkeys(gaps, gap))]
             for gap in (-np.inf, 0.3, 0.9, 1.5, np.inf)]
    assert (np.diff(calls, axis=0) >= 0).all() and len({*map(tuple, calls)}) > 2
    assert calls[0] == [1, 1, 1, 1, 1, 0]
    # the first word says all the others: before it is a word nothing is known, then all are point masses
    table = zeros(levels)
    table[0, tree_of(levels).mask, 0, 4] = 3.0
    if levels > 1:
        table[0, tree_of(levels).up(4, 1), 0, 4] = 3.0
    for word in range(V):
        table[0, word, np.arange(1, S), (word + np.arange(1, S)) % V] = 40.0
    trails = run("prophet", levels, table, dict(steps=S * levels, gap_early=7.5, gap_middle=5.0, gap_late=2.5),
                 masks(levels))
    for trail in trails[:2]:
        assert len(trail) - 1 == levels + 1
        assert (trail[-1] == [4, *((4 + np.arange(1, S)) % V)]).all()


@pytest.mark.parametrize("levels", [1, 2])
def test_saber_takes_back_the_wrong_word(levels):
    table, numbers = random_table(levels, 7), dict(mu=np.inf)
    assert_same(run("saber", levels, table, numbers), twins("saber", levels, table, numbers, revise=""))
    # position 2 is sure of word 5 while nothing is known, and of word 1 once it sees words; the others grow surer
    table = zeros(levels)
    for s in range(S):
        table[s, :, s, 3] += 2.0
        for other in set(range(S)) - {s, 2}:
            table[other, :V, s, 3 if s != 2 else 1] += 0.5 if s != 2 else 3.0
    table[2, :, 2] = 0.0
    table[2, :, 2, 5] = 5.0
    trails = run("saber", levels, table, None, masks(levels))
    tree = tree_of(levels)
    for trail in trails[:2]:
        level = np.array([[tree.level(int(x)) for x in row] for row in trail])
        assert trail[1][2] == (5 if levels == 1 else tree.up(5, 1))  # among the first to drop
        rose = (np.diff(level, axis=0) > 0).any(0)
        assert rose[2] and not np.delete(rose, 2).any()
        assert (trail[-1] == [3, 3, 1, 3, 3, 3, 3, 3]).all()


@pytest.mark.parametrize("name, levels", [("rcr", 1), pytest.param("rcr_cosine", 1, marks=pytest.mark.slow),
                                          ("p2_clusters", 2), pytest.param("p2", 2, marks=pytest.mark.slow),
                                          pytest.param("rcr_clusters", 2, marks=pytest.mark.slow)])
def test_a_scheduled_count_is_met_exactly(name, levels):
    tree, whole = tree_of(levels), S * levels if "clusters" in name else S
    for steps in (1, 3, 7):
        for trail in run(name, levels, random_table(levels, 8), dict(steps=steps), masks(levels))[:2]:
            if name == "rcr_clusters":  # blocks of 5 and 3
                turns = [-(-steps * 10 // 16), -(-steps * 6 // 16)]
                expected = [n * levels * (t - d - 1) // t + (6 if n == 5 else 0)
                            for n, t in zip((5, 3), turns, strict=True) for d in range(t)]
            else:
                share = [(steps - d - 1) / steps for d in range(steps)]
                if name in ("rcr_cosine", "p2_clusters"):
                    share = [math.cos(math.pi / 2 * (1 - x)) for x in share]
                expected = [math.floor(whole * x + 1e-4) for x in share]
            sums = level_sums(trail, tree)[1:]
            assert (sums if "clusters" in name else [x // levels for x in sums]) == expected


def test_rcr_is_the_base_where_confidences_do_not_change():
    """The lowest running confidences are then those of what the base has not written yet."""
    table = np.broadcast_to(np.round(random_table(1, 9)[:1, :1] * 2, 1), zeros(1).shape).astype(np.float32) / S
    assert_same(run("rcr", 1, table, canvas=masks(1)),
                twins("rcr", 1, table, canvas=masks(1), quota="even", revise=""))


@pytest.mark.parametrize("levels", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_p2_without_eta_takes_back_no_word(levels):
    tree = tree_of(levels)
    name = "p2_clusters" if levels == 2 else "p2"
    for eta in (0.0, 3.0):
        trails = run(name, levels, random_table(levels, 10), dict(eta=eta, steps=6 * levels), masks(levels))
        rose = [tree.level(int(a)) == 0 < tree.level(int(b)) for trail in trails
                for one, other in zip(trail[:-1], trail[1:], strict=True) for a, b in zip(one, other, strict=True)]
        assert any(rose) == (eta > 0)


@pytest.mark.parametrize("levels", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ccd_ds_reveals_all_that_was_sure_twice(levels):
    """Independent positions: one token in the first turn, then the top V at once (but a cluster is new among them)."""
    table = np.broadcast_to(random_table(levels, 11)[:1, :1], zeros(levels).shape)
    trail = run("ccd_ds", levels, table, dict(confident=4), masks(levels))[0]
    drops = -np.diff(level_sums(trail, tree_of(levels)))
    if levels == 1:
        assert drops.tolist() == [1, 4, 3]
    assert drops[0] == 1 and drops[1] in (3, 4)


@pytest.mark.slow
@pytest.mark.parametrize("levels", [1, 2])
def test_ccd_of_one_call_is_the_base(levels):
    table = random_table(levels, 12)
    policy = greedy(choose.Coherent(choose.History(1, 4)), Count())
    assert_same(run("ccd", levels, table, policy=policy), twins("ccd", levels, table, score="entropy"))


@pytest.mark.parametrize("levels", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ass_doubles_and_eoser_lets_words_go_first(levels):
    tree = tree_of(levels)
    for trail in run("ass", levels, random_table(levels, 13), None, masks(levels))[:2]:
        drops = -np.diff(level_sums(trail, tree))
        assert len(drops) == math.log2(S * levels)
        assert drops.tolist() == [2**k for k in range(len(drops) - 1)] + [S * levels // 2 + 1]
    for row in range(4):  # also where the drops are no power of two
        trail = run("ass", levels, random_table(levels, 13))[row]
        whole = level_sums(trail, tree)[0] - sum(tree.level(int(x)) for x in trail[-1])
        assert len(trail) - 1 == math.ceil(math.log2(whole))
    # ends of text are likely wherever nothing stands, the more so the more of them are seen; so are words
    table, end = zeros(levels), EOS
    table[np.arange(S), :, np.arange(S), end] = 2.0
    table[[0, 1], :, [0, 1], end] = 0.0
    table[[0, 1], :, [0, 1], 1] = 1.4
    for word in (1, end):
        for symbol in {word, *(tree.up(word, k) for k in range(1, levels))}:
            for s in range(S):
                table[s, symbol, :, word] += 0.5
    collapsed = twins("ass", levels, table, None, masks(levels), score="top", quota="doubling")[0][-1]
    assert (collapsed == end).all()
    assert (run("ass", levels, table, dict(eos_least=1.0), masks(levels))[0][-1] == end).all()
    assert (run("ass", levels, table, dict(eos_least=0.01), masks(levels))[0][-1] != end).sum() >= 2


# ---- ReMDM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, levels", [("remdm", 1), ("remdm_rescale", 2), ("remdm_loop", 1), ("remdm_loop", 2),
                                          pytest.param("remdm", 3, marks=pytest.mark.slow)])
def test_remdm_keeps_the_marginals(name, levels):
    """The law of a token's level after every step is beta(s); for MDLM each step is the paper's posterior."""
    chain, numbers = process_of(levels).chain, NUMBERS | METHODS[name][2]
    hook, calls = METHODS[name][0].choose, np.arange(numbers["steps"])
    before, after, sigma = (np.asarray(a, np.float64) for a in hook.step(numbers, jnp.asarray(calls)))
    expected = [remdm_step(name, numbers, c) for c in calls]
    np.testing.assert_allclose(np.stack([before, after, sigma], 1), expected, atol=1e-6)
    assert sigma.max() > 0.05 and (sigma <= 1 - after + 1e-6).all()
    law = np.eye(levels + 1)[levels]
    high, low = (-np.log(np.maximum(a, 1e-30)) for a in (before, np.minimum(after / (1 - sigma), 1)))
    high[0] = np.inf
    downs, ups = jax.jit(lambda low, high, gap: (chain.posterior(low, high), chain.transition(gap)))(
        np.float32(np.maximum(low, 0)), np.float32(high), np.float32(-np.log1p(-sigma)))
    for t, s, x, down, up in zip(before, after, sigma, np.asarray(downs), np.asarray(ups), strict=True):
        if levels == 1 and t > 0:
            keep = (s - (1 - x) * t) / (1 - t)
            np.testing.assert_allclose(down @ up, [[1 - x, x], [keep, 1 - keep]], atol=2e-5)
        law = (down[-1] if t == 0 else law @ down) @ up
        np.testing.assert_allclose(law, oracle.level_beta(chain.rates, -math.log(s)), atol=2e-5)
    assert law[0] > 1 - 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind, levels, xi", [("cap", 2, 0.8), ("loop", 1, 1.0), ("rescale", 3, 0.7)])
def test_remdm_with_the_true_conditionals_writes_the_data(kind, levels, xi):
    """Total variation falls to the sampling floor as the steps become many, with words taken back all the time.

    eta falls as 1/steps: at a fixed one (loop, eta = .3, 64 and 256 steps) what climbs together and is written anew
    together leaves .045 to .049, of which .022 are the floor.
    """
    rates = (1.0, 1.5, 0.7)[:levels]
    toy = oracle.Toy(PARENTS[levels], rates, xi, V)
    joint = oracle.random_joint(V, 2, seed=3)
    logits = jnp.asarray(np.log(toy.bayes(joint, cavity=True) + 1e-30), jnp.float32)
    process = process_of(levels, xi)

    @jax.jit
    def run(key, numbers):
        start = jnp.full((6000, 2), toy.mask)
        return sample(key, lambda z, t: logits[z[:, 0] * toy.N + z[:, 1]], process, start, remasking(kind, "sample"),
                      numbers, how=Sampling(rows=6000, tokens=12000))

    distances = []
    for steps in (2, 8, 64):
        numbers = NUMBERS | dict(steps=steps, eta=min(0.3, 4 / steps))
        words, stats = run(jax.random.key(steps), {n: jnp.asarray(v) for n, v in numbers.items()})
        assert (stats["row_forwards"] == steps).all()
        counts = np.zeros((V, V))
        np.add.at(counts, tuple(np.asarray(words).T), 1)
        distances.append(oracle.total_variation(counts, joint))
    (first, _, _), (second, _, _), (last, floor, spread) = distances
    assert first > second > last and last <= floor + 5 * spread, distances


# ---- all of them, with draws -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_sampled_rows_hold_what_every_policy_holds(name):
    """Also with symbols that are drawn; and group sizes change nothing."""
    levels, canvas = 2, canvases(2)
    policy = dataclasses.replace(METHODS[name][0], draw="sample")
    table = random_table(levels, 14, 0.5)
    trails = run(name, levels, table, policy=policy)
    assert_invariants(name, levels, trails, canvas)
    keys = jax.vmap(lambda b: jax.random.fold_in(jax.random.key(0), b))(jnp.arange(6))
    numbers = {n: jnp.asarray(v) for n, v in (NUMBERS | METHODS[name][2]).items()}
    words, _ = program(policy, levels, rows=6, drops=48)(keys, table, canvas[0].astype(np.int32), *canvas[1:], numbers)
    np.testing.assert_array_equal(words, [trail[-1] for trail in trails])


def test_bad_choices_are_refused():
    for make in (lambda: revise.Backtrack("median"), lambda: revise.Scheduled("square"),
                 lambda: revise.Scheduled(to="word"), lambda: revise.Remask("conf"),
                 lambda: Policy(revise.Remask()), lambda: Policy(revise.Remask(), revise=revise.Remask("loop"))):
        with pytest.raises(ValueError, match="choose|climb"):
            make()


@pytest.mark.parametrize("score", [Confidence(), *(pytest.param(s, marks=pytest.mark.slow) for s in (
    choose.Order("random"), Confidence("entropy"), Confidence("margin")))])
def test_orders_that_do_not_see_the_draw_write_the_data(score):
    """One drop a call, the true conditionals: exact whatever the network's confidence says; by the draws it is not."""
    toy, process = make_toy(TWO_LEVELS, (1.0, 1.0))
    joint = oracle.random_joint(toy.V, 3, seed=11)
    denoise, start = denoiser(toy, toy.bayes(joint, cavity=True)), jnp.full((20_000, 3), toy.mask)

    def distance(policy):
        words, _ = jax.jit(lambda z: sample(jax.random.key(5), denoise, process, z, policy, {"count": 1}))(start)
        return oracle.total_variation(counts_of(np.asarray(words), toy.V), joint)

    found, floor, spread = distance(Policy(Scored(score, Count())))
    assert found <= floor + 4.5 * spread, (found, floor, spread)
    if score == Confidence():
        assert distance(Policy(Scored(choose.Confidence("drawn"), Count()), order="draw_then_choose"))[0] > 0.3
