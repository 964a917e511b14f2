"""Heads: the same numbers as logits of all words at all tokens, in a fraction of the memory and work."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hdlm_jax.common import parallel
from hdlm_jax.diffusion import autoregressive
from hdlm_jax.diffusion.autoregressive import AutoregressiveProcess
from hdlm_jax.diffusion.draws import token_keys
from hdlm_jax.diffusion.gidd import GiddProcess
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.levels import LevelChain
from hdlm_jax.diffusion.prediction import LogitsPrediction
from hdlm_jax.models import heads
from hdlm_jax.models.heads import Blocks, FactorisedHead, FlatHead, map_over_noised, product, sum_over_noised
from hdlm_jax.models.network import TENSOR_AXES

B, S, D = 8, 16, 6
SIZES = (1, 1, 2, 37, 9)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time
ABOVE = {1: [], 2: [], 3: [[0, 1, 0, 1, 1]]}  # maps above level 1


def words_of(sizes, seed=0):
    """Words' clusters, of the sizes given, in no order."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))


def make(levels=2, xi=1.0, force="cavity", sizes=SIZES):
    words = words_of(sizes)
    hierarchy = Hierarchy.from_parents([words, *ABOVE[levels]] if levels > 1 else [], len(words))
    return HierarchicalProcess(hierarchy, LevelChain((1.0,) * levels), xi, force)


APART = Hierarchy.from_parents([], sum(SIZES), classes=words_of(SIZES))  # a head's classes that are no states


def numbers(head, seed=0, width=D):
    """A head's parameters, at random."""
    rng, like = np.random.default_rng(seed), head.init(jax.random.key(0), width)
    return jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape) / 2, a.dtype), like)


def hidden_of(shape=(B, S), seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((*shape, D)), jnp.float32)


def log_softmax(a):
    a = a - a.max()
    return a - np.log(np.exp(a).sum())


def brute_force(head, params, h):
    """log p of every word [V], for one h, in float64 loops over the two factors (or the one)."""
    p = jax.tree.map(lambda a: np.asarray(a, float), params)
    table = p if isinstance(head, FlatHead) else p["words"]
    words = [table["kernel"][i] @ h + table["bias"][i] for i in range(len(table["bias"]))]
    if isinstance(head, FlatHead):
        return log_softmax(np.array(words[: head.hierarchy.vocab_size]))
    anc, row, out = head.own.anc[1], head.blocks.row, np.zeros(head.hierarchy.vocab_size)
    n, prototypes, c = head.own.sizes[1], head.prototypes, p["clusters"]
    each = [[np.exp(c["kernel"][i] @ h + c["bias"][i]) for i in range(v * prototypes, (v + 1) * prototypes)]
            for v in range(n)]
    clusters = log_softmax(np.log(np.sum(each, axis=1)))
    for v in range(n):
        mine = np.flatnonzero(anc == v)
        out[mine] = clusters[v] + log_softmax(np.array([words[row[x]] for x in mine]))
    return out


@pytest.fixture
def small(monkeypatch):
    """Pieces of a few tokens, so that there are many."""
    monkeypatch.setattr(heads, "chunk_size", lambda: 7)


# ---- tables -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [SIZES, (99, 1), (1, 383), (1,) * 130, (64, 64), (8,) * 15 + (7,), (300,), "zipf"])
def test_blocks_hold_every_cluster_in_one_piece(sizes):
    """Any imbalance: row and word invert each other, a slice covers its cluster and ends within the table."""
    sizes = np.random.default_rng(0).zipf(1.5, 300).clip(1, 2000) if sizes == "zipf" else np.asarray(sizes)
    n, anc = len(sizes), words_of(sizes)
    b = Blocks(Hierarchy.from_parents([anc], keep_single=True))
    assert b.rows % 128 == 0 and b.word.shape == (b.rows,) and {a.dtype.name for a in (b.row, b.word)} == {"int32"}
    np.testing.assert_array_equal(b.word[b.row], np.arange(len(anc)))
    assert not b.word[np.setdiff1d(np.arange(b.rows), b.row)].any()
    np.testing.assert_array_equal(b.size, sizes)
    np.testing.assert_array_equal(b.node[b.rank], np.arange(n))
    for v in range(n):
        np.testing.assert_array_equal(np.sort(b.row[anc == v]), b.start[v] + np.arange(sizes[v]))
    assert [0, *(high for _, high, _ in b.classes)] == [*(low for low, _, _ in b.classes), n], "every place in a class"
    for low, high, width in b.classes:
        nodes = b.node[low:high]
        assert low < high and (sizes[nodes] <= width).all() and (b.start[nodes] + width <= b.rows).all()
        assert (width <= np.maximum(2 * sizes[nodes], sizes.max() / 8) + 8).all(), "little more than is needed"


@pytest.mark.parametrize("head", [FlatHead(make().hierarchy), FactorisedHead(make().hierarchy),
                                  FactorisedHead(make().hierarchy, prototypes=3),
                                  FactorisedHead(APART, prototypes=3)], ids=["flat", "one", "three", "apart"])
def test_logits_are_brute_force(head):
    """Normalised, and the product of the two factors, word by word."""
    params, h = numbers(head), hidden_of((2, 3))
    assert params.get("words", params)["kernel"].shape == (128, D), "tables are padded, words are not"
    found = head.logits(params, h)
    assert found.shape == (2, 3, sum(SIZES)) and found.dtype == jnp.float32
    want = np.array([[brute_force(head, params, np.asarray(h[i, j], float)) for j in range(3)] for i in range(2)])
    if isinstance(head, FactorisedHead):
        np.testing.assert_allclose(np.exp(np.asarray(found, float)).sum(-1), 1, rtol=1e-5)
    else:
        found = jax.nn.log_softmax(found)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def test_new_heads_know_nothing_and_prototypes_differ():
    """Words uniform within a cluster (flat: uniform); prototypes of a node start apart."""
    h, hierarchy = hidden_of((1,)), make().hierarchy
    flat, one, three = FlatHead(hierarchy), FactorisedHead(hierarchy), FactorisedHead(hierarchy, prototypes=3)
    size = hierarchy.token_count[1][hierarchy.anc[1]]
    params = [head.init(jax.random.key(0), D) for head in (flat, one, three)]
    assert not np.any(flat.logits(params[0], h))
    np.testing.assert_allclose(jnp.exp(one.logits(params[1], h))[0], 1 / (len(SIZES) * size), rtol=1e-5)
    assert len(np.unique(params[2]["clusters"]["kernel"][:, 0])) == 3 * len(SIZES)


@pytest.mark.parametrize("prototypes", [1, 4])
def test_clusters_that_start_from_a_flat_head_are_fitted_to_it(prototypes):
    """Within clusters it is the same law; of clusters, means of vectors alone are three times as far from it (KL)."""
    hierarchy, rng = make().hierarchy, np.random.default_rng(3)
    head, flat = FactorisedHead(hierarchy, prototypes=prototypes), FlatHead(hierarchy)
    kernel, bias = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((50, D), (50,)))
    h, unseen = hidden_of((512,)), hidden_of((256,), seed=2)
    given = flat.predict(flat.start(kernel, bias), unseen)

    def apart(params):
        found = head.predict(params, unseen)
        x = jnp.broadcast_to(jnp.arange(50), (256, 50)).T
        np.testing.assert_allclose(jax.vmap(found.log_within)(x), jax.vmap(given.log_within)(x), atol=1e-4)
        wanted = given.log_masses(1)
        return float(jnp.mean(jnp.sum(jnp.exp(wanted) * (wanted - found.log_masses(1)), axis=-1)))

    means, fitted = apart(head.start(kernel, bias)), apart(jax.jit(head.start)(kernel, bias, h))
    assert 0 <= fitted < means / 3, (fitted, means)


@pytest.mark.parametrize("head", [FlatHead(make(3).hierarchy), FactorisedHead(make(3).hierarchy, prototypes=2)],
                         ids=["flat", "factorised"])
def test_predictions_answer_as_dense_ones(head):
    """log_prob, log_within, log_mass, log_masses of every level; and select(index) is the whole at those tokens."""
    h = head.hierarchy
    params, hidden, rng = numbers(head), hidden_of((2, 5)), np.random.default_rng(2)
    x = jnp.asarray(rng.integers(0, h.vocab_size, (2, 5)), jnp.int32)
    nodes = [jnp.asarray(rng.integers(0, n, (2, 5)), jnp.int32) for n in h.sizes]

    def answers(p, at=...):
        flat = lambda a: a if at is ... else a.reshape(-1)[at]  # noqa: E731
        return [p.log_probs(), p.log_prob(flat(x)), p.log_within(flat(x)), *(p.log_masses(k) for k in range(4)),
                *(p.log_within(flat(x), k) for k in (2, 3)),
                *(p.log_mass(k, flat(nodes[k]), outside=True) for k in (1, 2)),
                *(p.log_mass(k, flat(nodes[k])) for k in range(1, 4))]

    index = jnp.asarray([7, 0, 7, 2])

    @jit
    def run(params, hidden):
        whole = head.predict(params, hidden)
        dense = LogitsPrediction(head.logits(params, hidden), h)
        return answers(whole), answers(dense), answers(whole.select(index), index)

    whole, dense, some = run(params, hidden)
    for one, want in zip(whole, dense, strict=True):
        np.testing.assert_allclose(one, want, rtol=1e-5, atol=1e-5)
    for one, want in zip(some, whole, strict=True):
        np.testing.assert_allclose(one, want.reshape(10, *want.shape[2:])[index], rtol=1e-5, atol=1e-6)


# ---- sums and maps over the noised tokens -------------------------------------------------------------------------


def texts(process):
    """(x, z) [B, S] of every kind of imbalance: of tokens over clusters, and of noised ones over rows."""
    h, rng = process.hierarchy, np.random.default_rng(3)
    sizes = h.token_count[1]
    large = np.flatnonzero(h.anc[1] == sizes.argmax())
    few = np.flatnonzero(np.isin(h.anc[1], [0, h.sizes[1] - 1]))
    tau = jnp.asarray([0, 1e3, *np.linspace(0.3, 2, B - 2)], jnp.float32)  # a row of words, a row of masks
    for name, words in {"any": np.arange(h.vocab_size), "one cluster": large, "few clusters": few}.items():
        x = jnp.asarray(rng.choice(words, (B, S)), jnp.int32)
        z = process.corrupt(jax.random.key(4), x, tau=tau)
        yield name, x, z
        if name != "few clusters":
            yield name + ", all noised", x, jnp.where(process.level_of(z) == 0, h.mask_id, z)
            yield name + ", at level 1", x, jnp.asarray(h.anc[1])[x] + h.offsets[1]
    yield "nothing noised", x, x


def both_ways(process, head, hard=False, shard=None):
    """Two functions of (params, hidden, x, z, weight), dense and piece by piece -> losses, gradients, costs."""
    kwargs = {"needs": process.needs(hard)} | ({} if shard is None else {"shard": shard})

    def scaled(total):
        def run(params, hidden, x, z, weight):
            loss, aux, costs = total(params, hidden, x, z, weight)
            return 3 * loss + 5 * jnp.sum(aux), (loss, aux, costs)  # 3: the cotangent must arrive; 5: and aux has none

        return jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))

    def dense(params, hidden, x, z, weight):
        p = LogitsPrediction(head.logits(params, hidden), process.hierarchy)
        costs = process.token_loss(p, x, z)
        losses = process.token_loss(p, x, z, hard_training=hard)
        return jnp.sum(weight * losses), jax.lax.stop_gradient(costs), costs

    def pieces(params, hidden, x, z, weight):
        def token_loss(p, fields, levels):
            return process.token_loss(p, *fields[:2], levels)

        def fn(p, fields, levels):
            loss = process.token_loss(p, *fields[:2], levels, hard_training=hard)
            return fields[2] * loss, token_loss(p, fields, levels)

        rest = (params, hidden, process.level_of(z), x, (x, z, weight))
        return (*sum_over_noised(head, fn, *rest, **kwargs), map_over_noised(head, token_loss, *rest, **kwargs))

    return scaled(dense), scaled(pieces)


def close(found, want, name, tolerance=1e-5):
    """Every leaf, relative to its largest entry or 1."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, float(jnp.max(jnp.abs(b)))),
                                   err_msg=f"{name} {jax.tree_util.keystr(path)}")


def assert_equality(process, head, hard=False, shard=None, put=lambda params, rows: (params, rows), only=None):
    dense, pieces = both_ways(process, head, hard, shard)
    params, hidden = numbers(head), hidden_of()
    rng = np.random.default_rng(5)
    for name, x, z in texts(process):
        if only is not None and name not in only:
            continue
        noised = np.asarray(process.level_of(z)) > 0
        # a word's weight must not matter
        weight = jnp.asarray(np.where(noised, rng.random((B, S)) - 0.2, 1e6), jnp.float32)
        want = dense(params, hidden, x, z, weight)
        on, (hid, *rows) = put(params, (hidden, x, z, weight))
        found = pieces(on, hid, *rows)
        close(found, want, name)
        assert float(found[0][1][1].sum()) > 0 or not noised.any()
        costs, d_hidden = np.asarray(found[0][1][2]), np.asarray(found[1][1])
        assert not costs[~noised].any() and not d_hidden[~noised].any(), "words cost nothing"


COMBINATIONS = [(levels, xi, force, hard) for levels in (2, 3) for xi in (1.0, 0.8)
                for force in ("none", "within", "between", "cavity") for hard in (False, True)
                if not (xi < 1 and force == "within")]
QUICK = {(2, 1.0, "cavity", False), (2, 1.0, "none", True), (3, 0.8, "cavity", False)}


@pytest.mark.parametrize("levels, xi, force, hard", [c if c in QUICK else pytest.param(*c, marks=pytest.mark.slow)
                                                     for c in COMBINATIONS])
def test_factorised_head_is_its_dense_self(small, levels, xi, force, hard):
    """Losses, gradients in everything, costs: those of logits of all words, whatever the imbalance."""
    process = make(levels, xi, force)
    assert_equality(process, FactorisedHead(process.hierarchy, prototypes=3 if hard else 1), hard)


@pytest.mark.parametrize("chunk, levels, xi, hard", [
    (7, 2, 1.0, False), (64, 3, 0.8, True), pytest.param(1000, 1, 1.0, False, marks=pytest.mark.slow),
    pytest.param(8, 1, 1.0, False, marks=pytest.mark.slow)])
def test_flat_head_is_its_dense_self(monkeypatch, chunk, levels, xi, hard):
    """Chunks that divide the noised tokens, that do not, and one for all."""
    monkeypatch.setattr(heads, "chunk_size", lambda: chunk)
    process = make(levels, xi)
    assert_equality(process, FlatHead(process.hierarchy), hard)


@pytest.mark.slow
def test_without_clusters_the_factorised_head_is_flat(small):
    """MDLM: one block of all words."""
    process = make(1)
    assert_equality(process, FactorisedHead(process.hierarchy))


WITHOUT_CLUSTERS = {"mdlm": HierarchicalProcess(APART, LevelChain((1.0,))), "ar": AutoregressiveProcess(APART),
                    "gidd0": GiddProcess(APART), "gidd": GiddProcess(APART, 0.3)}


@pytest.mark.parametrize("name", ["mdlm", "gidd", *[pytest.param(n, marks=pytest.mark.slow) for n in ("ar", "gidd0")]])
def test_classes_that_are_no_states_are_the_head_s_alone(small, name):
    """Losses, gradients, nats and draws of a process without clusters: those of a flat head of the same law."""
    process, head = WITHOUT_CLUSTERS[name], FactorisedHead(APART, prototypes=3)
    rng, params, hidden = np.random.default_rng(2), numbers(head), hidden_of()
    x = jnp.asarray(rng.integers(0, sum(SIZES), (B, S)), jnp.int32)
    tau, weight = jnp.linspace(0.3, 2, B), jnp.asarray(rng.random((B, S)), jnp.float32)
    z, level = process.noised(jax.random.key(4), x, tau, jnp.ones((B, S), bool))
    rows = (x, z, jnp.broadcast_to(tau[:, None], x.shape), weight)

    def cost(p, fields, levels=None):
        return process.token_loss(p, *fields[:2], levels, tau=fields[2])

    def dense(params, hidden):
        nats = jnp.where(level > 0, cost(LogitsPrediction(head.logits(params, hidden), APART), rows), 0.0)
        return jnp.sum(weight * nats), nats

    def pieces(params, hidden):
        fn = lambda p, fields, levels: (fields[3] * cost(p, fields, levels),) * 2  # noqa: E731
        given = (params, hidden, level, x, rows)
        loss, _ = sum_over_noised(head, fn, *given, needs=process.needs())
        return loss, map_over_noised(head, cost, *given, needs=process.needs())

    want, found = (jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(params, hidden) for f in (dense, pieces))
    close(found, want, name)
    if name != "gidd":
        p = np.array([brute_force(head, params, h) for h in np.asarray(hidden[0], float)])
        scale = np.exp(-0.3) if name == "gidd0" else 1.0  # its nats are 1 - t of a cross-entropy
        nats = np.where(level[0] > 0, -scale * p[np.arange(S), x[0]], 0)
        np.testing.assert_allclose(found[0][1][0], nats, rtol=1e-5, atol=1e-5)


def test_mdlm_draws_the_law_of_a_head_with_classes_of_its_own():
    head, h = FactorisedHead(APART), hidden_of((), seed=7)
    params = numbers(head, seed=6)

    @jit
    def draw(params, keys):
        p = head.predict(params, jnp.broadcast_to(h[None], (len(keys), D)))
        z = jnp.full(len(keys), APART.mask_id)
        return WITHOUT_CLUSTERS["mdlm"].reverse_step(keys, p, z, jnp.zeros_like(z))

    found = np.bincount(draw(params, jax.random.split(jax.random.key(8), ROWS)), minlength=sum(SIZES))
    distance, floor, spread = oracle.total_variation(found, np.exp(brute_force(head, params, np.asarray(h, float))))
    assert distance <= floor + 4.5 * spread


@pytest.mark.slow
def test_samplers_of_all_words_draw_from_such_a_head_as_from_a_flat_one():
    head = FactorisedHead(APART)
    params, mask = numbers(head), APART.mask_id
    table = jnp.asarray(np.random.default_rng(1).standard_normal((APART.num_states, D)), jnp.float32)
    z = jnp.full((B, 4), mask).at[:, 0].set(2)
    gidd, ar, key = WITHOUT_CLUSTERS["gidd"], WITHOUT_CLUSTERS["ar"], jax.random.key(3)

    def drawn(of):
        words, _ = autoregressive.sample(key, lambda cache, z, i: (cache, of(table[z[:, 0]])), ar, z, ())
        return words, gidd.step(key, of(table[z]), z, 0.5, 1.5)

    both = [drawn(of) for of in (lambda h: head.predict(params, h), lambda h: head.logits(params, h))]
    for one, other in zip(*both, strict=True):
        np.testing.assert_array_equal(one, other)


def mesh_of(shape):
    return jax.make_mesh(shape, parallel.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def placer(mesh):
    """Parameters and rows to where a training has them."""
    def put(params, rows):
        where = parallel.state_shardings(mesh, {"head": params}, TENSOR_AXES)["head"]
        return jax.device_put(params, where), jax.device_put(rows, NamedSharding(mesh, P(parallel.BATCH)))

    return put


@pytest.mark.parametrize("shape, levels, xi, head", [
    pytest.param((4, 2, 1), 2, 1.0, FactorisedHead, marks=pytest.mark.slow), ((2, 2, 2), 3, 0.8, FactorisedHead),
    pytest.param((2, 2, 2), 2, 1.0, FactorisedHead, marks=pytest.mark.slow),
    pytest.param((4, 2, 1), 3, 0.8, FactorisedHead, marks=pytest.mark.slow),
    ((2, 2, 2), 2, 1.0, FlatHead), pytest.param((4, 2, 1), 2, 1.0, FlatHead, marks=pytest.mark.slow)])
def test_eight_devices_are_one(small, shape, levels, xi, head):
    """Every shard works on its own rows, however different; sums and gradients are those of all."""
    process, mesh = make(levels, xi), mesh_of(shape)
    assert_equality(process, head(process.hierarchy), False, parallel.OverBatch(mesh), placer(mesh),
                    only=("any", "one cluster, at level 1", "nothing noised"))


def test_work_is_for_noised_tokens_alone(small):
    """As many chunks as there are 7 of them, as many tiles as each cluster needs, and levels as fn is told."""
    process = make(3)
    h, seen = process.hierarchy, []

    def fn(p, fields, levels):
        jax.debug.callback(lambda f: seen.append((levels, len(f))), fields)
        return p.log_prob(fields) if levels in (None, (1,)) else p.log_mass(2, fields * 0)

    def visit(head, level, x):
        seen.clear()
        jax.block_until_ready(map_over_noised(head, fn, numbers(head), hidden_of(), level, x, x, needs="word"))
        jax.effects_barrier()
        return sorted(seen, key=str)

    x = np.zeros((B, S), np.int32)
    x[:] = np.flatnonzero(h.anc[1] == 3)[0]
    x[0, :3] = np.flatnonzero(h.anc[1] == 0)[0]
    level = np.zeros((B, S), np.int32)
    assert visit(FlatHead(h), jnp.asarray(level), jnp.asarray(x)) == []
    assert visit(FactorisedHead(h), jnp.asarray(level), jnp.asarray(x)) == []
    level[0, :12], level[5, 2:10], level[7, 1] = 1, 3, 2  # 3 tokens of cluster 0, 9 of cluster 3, 9 above
    assert visit(FlatHead(h), jnp.asarray(level), jnp.asarray(x)) == [(None, 7)] * 3
    tile = [((1,), 8)]  # 128 tokens, 5 clusters: room for 8
    assert visit(FactorisedHead(h), jnp.asarray(level), jnp.asarray(x)) == tile * 3 + [((2, 3), 7)] * 2


# ---- memory and communication ---------------------------------------------------------------------------------------


def compiled(process, head, width=D, shape=(B, S), dense=False, gradients=True, **kwargs):
    """The compiled program of (params, hidden, x, z) -> (loss, gradients), or -> costs; it is never run."""
    def loss(params, hidden, x, z):
        if dense:
            return jnp.sum(process.token_loss(head.logits(params, hidden), x, z))

        def fn(p, fields, levels):
            cost = process.token_loss(p, *fields, levels)
            return (cost, cost) if gradients else cost

        over = sum_over_noised if gradients else map_over_noised
        out = over(head, fn, params, hidden, process.level_of(z), x, (x, z), needs=process.needs(), **kwargs)
        return out[0] if gradients else out

    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    params = jax.eval_shape(lambda: head.init(jax.random.key(0), width))
    fn = jax.value_and_grad(loss, argnums=(0, 1)) if gradients else loss
    return jax.jit(fn).lower(params, jax.ShapeDtypeStruct((*shape, width), jnp.float32), ids, ids).compile()


def work(program):
    """Bytes a program needs besides what goes in and comes out (gradients do)."""
    return program.memory_analysis().temp_size_in_bytes


def balanced(words, clusters):
    return HierarchicalProcess(Hierarchy.from_parents([np.arange(words) % clusters]), LevelChain((1.0, 1.0)))


def test_flat_memory_is_of_a_chunk_not_of_the_batch(monkeypatch):
    """[B, S, V] logits never exist, forward or backward."""
    monkeypatch.setattr(heads, "chunk_size", lambda: 64)
    process, shape = balanced(4096, 16), (16, 64)
    head, logits = FlatHead(process.hierarchy), 16 * 64 * 4096 * 4
    assert work(compiled(process, head, shape=shape, dense=True)) > 0.9 * logits, "else this measures nothing"
    assert work(compiled(process, head, shape=shape)) < 0.4 * logits
    assert work(compiled(process, head, shape=shape, gradients=False)) < 0.4 * logits


def test_factorised_memory_is_of_a_cluster_not_of_the_vocabulary(monkeypatch):
    """Four times the words in clusters as large: about the same; clusters eight times as large: in proportion."""
    monkeypatch.setattr(heads, "chunk_size", lambda: 8)

    def need(words, clusters, **kwargs):
        process = balanced(words, clusters)
        return work(compiled(process, FactorisedHead(process.hierarchy), 32, (16, 64), **kwargs))

    small, more_words, larger = need(4096, 64), need(16384, 256), need(16384, 32)
    table = 16384 * 32 * 4
    assert more_words < 2.5 * small and more_words < 0.05 * table, (small, more_words)
    assert 2 * small < larger < 0.5 * table, (small, larger)  # tiles of 8 tokens, 512 words, and their gradients


def collectives(text):
    """(computation, kind, shapes of the results) of every exchange between devices in an HLO text."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    where, out = "", []
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            where = "ENTRY" if line.startswith("ENTRY") else line.split()[0]
        if found := re.search(rf"= (.*?) ({kinds})(-start)?\(", line):
            shapes = [tuple(int(n) for n in dims.split(",") if n) for dims in re.findall(r"\w+\[([\d,]*)\]", found[1])]
            out.append((where, found[2], shapes))
    return out


@pytest.mark.parametrize("shape, head", [
    ((4, 2, 1), FactorisedHead), pytest.param((4, 2, 1), FlatHead, marks=pytest.mark.slow)])
def test_no_token_moves_between_devices(small, shape, head):
    """Parameters are gathered once and their gradients summed once, outside of all loops; hidden states stay.

    Loops are as long as a shard has noised tokens: an exchange in one of them would wait for ever.
    """
    process, mesh, tokens, width = make(), mesh_of(shape), 20, 24
    head = head(process.hierarchy)
    params = {"head": numbers(head, width=width), "trunk": jnp.ones(width)}
    params = jax.device_put(params, parallel.state_shardings(mesh, params, TENSOR_AXES))
    ids = jax.device_put(jnp.zeros((B, tokens), jnp.int32), parallel.batch_sharding(mesh))
    inputs = jax.device_put(jnp.zeros((B, tokens, width)), parallel.batch_sharding(mesh))

    def step(params, inputs, x, z):
        def loss(params):
            def fn(p, fields, levels):
                cost = process.token_loss(p, *fields, levels)
                return cost, cost

            hidden = inputs * params["trunk"][None, None]
            value, each = sum_over_noised(head, fn, params["head"], hidden, process.level_of(z), x, (x, z),
                                          needs=process.needs(), shard=parallel.OverBatch(mesh))
            return value, jnp.sum(each)

        (value, aux), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - g, params, gradients), value, aux

    where = jax.tree.map(lambda a: a.sharding, params)
    program = jax.jit(step, out_shardings=(where, *[parallel.replicated(mesh)] * 2)).lower(params, inputs, ids, ids)
    text = program.compile().as_text()
    found = collectives(text)
    assert " while(" in text and found, "else this reads nothing"
    assert {where for where, _, _ in found} == {"ENTRY"}, found
    assert {kind for _, kind, _ in found} <= {"all-gather", "all-reduce", "reduce-scatter"}, found
    leaves = [a.shape for a in jax.tree.leaves(params)]
    parts = [(64, width)] * (shape[2] - 1)  # the table comes along one axis, then along the other
    gathered, reduced = ([shape for _, kind, shapes in found if (kind == "all-gather") == gather for shape in shapes]
                         for gather in (True, False))
    assert set(gathered) <= {*leaves, *parts} and len(gathered) <= len(leaves) + len(parts), gathered
    assert len(reduced) <= len(leaves) + 2, reduced  # and the two sums


# ---- sampling -------------------------------------------------------------------------------------------------------


ROWS = 20_000
SMALL = (1, 2, 6, 4, 3)


@pytest.mark.parametrize("levels, xi, force", [
    (2, 1.0, "cavity"), (3, 0.8, "cavity"), (3, 0.8, "between"), pytest.param(3, 0.8, "none", marks=pytest.mark.slow),
    pytest.param(3, 1.0, "cavity", marks=pytest.mark.slow), pytest.param(3, 1.0, "none", marks=pytest.mark.slow),
    pytest.param(2, 1.0, "none", marks=pytest.mark.slow), pytest.param(2, 0.8, "between", marks=pytest.mark.slow)])
def test_draws_have_the_law_of_the_logits(levels, xi, force):
    """Cluster first, word in its block: from every level to every lower one, the oracle's law of p(x | z)."""
    process = make(levels, xi, force, SMALL)
    toy = oracle.Toy([words_of(SMALL), *ABOVE[levels]], (1.0,) * levels, xi)
    head = FactorisedHead(process.hierarchy, prototypes=2)
    params, h = numbers(head, seed=6), hidden_of((), seed=7)
    cases = [(k, j) for k in range(1, levels + 1) for j in range(k)]
    symbols = [toy.offsets[k] + (toy.sizes[k] > 2) * 2 for k, _ in cases]  # cluster 2 has six words
    z = jnp.repeat(jnp.asarray(symbols, jnp.int32), ROWS)
    target = jnp.repeat(jnp.asarray([j for _, j in cases], jnp.int32), ROWS)

    @jit
    def draw(params, keys, z, target):
        return process.reverse_step(keys, head.predict(params, jnp.broadcast_to(h[None], (len(z), D))), z, target)

    out = np.asarray(draw(params, jax.random.split(jax.random.key(8), len(z)), z, target)).reshape(-1, ROWS)
    p = np.exp(brute_force(head, params, np.asarray(h, float)))
    for found, symbol, (k, j) in zip(out, symbols, cases, strict=True):
        law = np.zeros(toy.N)
        law[toy.offsets[j] :][: toy.sizes[j]] = toy.force_one(p, symbol, force) @ toy.pi(symbol, j)
        distance, floor, spread = oracle.total_variation(np.bincount(found, minlength=toy.N), law)
        assert distance <= floor + 4.5 * spread, (k, j, distance, floor, spread)
        if xi == 1 and force != "none":
            assert (law[found] > 0).all(), "under what was on show"
        if j == 0 and k < levels and force != "none":  # else a force transition that does nothing passes, too
            assert oracle.total_variation(np.bincount(found, minlength=toy.N)[: toy.V], p)[0] > floor + 20 * spread


def test_temperature_and_nucleus_are_of_words():
    """With either, the draw of the assembled logits, key by key; with neither, its law alone."""
    process = make(3, 0.8, "cavity")
    head, hidden = FactorisedHead(process.hierarchy), hidden_of()
    params = numbers(head)
    z = process.corrupt(jax.random.key(9), jnp.zeros((B, S), jnp.int32), tau=jnp.linspace(0.3, 3, B))
    target = jnp.maximum(process.level_of(z) - 1 - jnp.arange(S)[None] % 2, 0)

    @jit
    def run(params, hidden, warm):
        def draw(p, **kwargs):
            return process.reverse_step(token_keys(jax.random.key(10), z.shape), p, z, target, **kwargs)

        settings = [dict(temperature=0.7), dict(top_p=0.8), dict(temperature=0), dict(temperature=warm, top_p=0.5), {}]
        return [(draw(head.predict(params, hidden), **s), draw(head.logits(params, hidden), **s)) for s in settings]

    *same, (free, dense) = run(params, hidden, jnp.float32(0.7))
    for a, b in same:
        np.testing.assert_array_equal(a, b)
    assert (free != dense).any(), "else the node is not drawn first"
    assert len({np.asarray(a).tobytes() for a, _ in same}) == len(same), "else a setting does nothing"


def test_words_never_leave_a_given_cluster():
    """xi = 1, any imbalance of clusters: the word lies in the block that is on show; so it does in a selection."""
    process = make(3)
    h = process.hierarchy
    head = FactorisedHead(h)
    params, rng = numbers(head), np.random.default_rng(11)
    z = jnp.asarray(rng.integers(h.offsets[1], h.num_states, 2000), jnp.int32)
    hidden, index = hidden_of((2000,)), jnp.asarray(rng.integers(0, 2000, 500))

    @jit
    def draw(params, hidden, z, keys):
        whole = process.reverse_step(keys, head.predict(params, hidden), z, 0 * z)
        some = head.predict(params, hidden).select(index)
        return whole, process.reverse_step(keys[index], some, z[index], 0 * z[index])

    words, some = (np.asarray(a) for a in draw(params, hidden, z, jax.random.split(jax.random.key(12), 2000)))
    assert words.min() >= 0 and words.max() < h.vocab_size
    for k in range(1, 4):
        here = h.level_of(np.asarray(z)) == k
        assert here.any()
        np.testing.assert_array_equal(h.anc[k][words[here]], h.node_of(np.asarray(z)[here]))
    np.testing.assert_array_equal(some, words[index])


# ---- precision ------------------------------------------------------------------------------------------------------


def dots(jaxpr):
    """Every dot_general, also within loops and calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for leaf in jax.tree.leaves(equation.params, is_leaf=lambda a: hasattr(a, "eqns")):
            if hasattr(leaf, "eqns"):
                yield from dots(getattr(leaf, "jaxpr", leaf))


def test_product_is_of_halves_summed_in_full():
    """bfloat16 operands both ways, float32 sums and gradients: numpy's float64 sums of the same halves."""
    rng = np.random.default_rng(13)
    h, table, d = (rng.standard_normal(s).astype(np.float32) for s in ((3, 5, 256), (384, 256), (3, 5, 384)))
    out, back = jax.vjp(lambda h, table: product(h, table, jnp.bfloat16), h, table)
    half = lambda a: np.asarray(jnp.asarray(a, jnp.bfloat16), float)  # noqa: E731
    want = (half(h) @ half(table).T, half(d) @ half(table), np.einsum("bsr,bsd->rd", half(d), half(h)))
    for found, exact in zip((out, *back(jnp.asarray(d))), want, strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-6 * np.abs(exact).max())
    assert np.abs(out - h @ table.T).max() > 1e-3 * np.abs(out).max(), "else the operands are not halves"


@pytest.mark.parametrize("head", [FlatHead, FactorisedHead])
def test_bfloat16_heads(head):
    """Every product of a training step is of halves and gives float32; so are the gradients, near the full ones."""
    process = make()
    full, half = head(process.hierarchy), head(process.hierarchy, jnp.bfloat16)
    params, hidden = numbers(full), hidden_of()
    _, x, z = next(texts(process))
    run = both_ways(process, half)[1]
    found = list(dots(jax.make_jaxpr(run.__wrapped__)(params, hidden, x, z, jnp.ones((B, S))).jaxpr))
    assert len(found) >= 4
    for dot in found:
        assert {v.aval.dtype.name for v in dot.invars} == {"bfloat16"} and dot.outvars[0].aval.dtype == jnp.float32
    inputs = (params, hidden, x, z, jnp.ones((B, S)))
    near, exact = run(*inputs), both_ways(process, full)[1](*inputs)
    close(near, exact, "bfloat16", 0.02)
    assert abs(near[0][0] - exact[0][0]) > 1e-6 * abs(exact[0][0]), "else nothing was half"
