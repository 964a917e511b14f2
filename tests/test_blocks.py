"""Block diffusion (model.block): two copies of a text, its bound, and what its decoding sees."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import Toy, total_variation

from hdlm_jax import config as config_lib
from hdlm_jax.common import parallel
from hdlm_jax.config import ConfigError, DecoderConfig
from hdlm_jax.decoding.policy import State, view_of
from hdlm_jax.decoding.sampler import Sampler, numbers_of
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.levels import LevelChain
from hdlm_jax.evaluation.elbo import Evaluator
from hdlm_jax.models.decoder import Decoder
from hdlm_jax.models.heads import FlatHead
from hdlm_jax.models.network import Network
from hdlm_jax.training.step import make_loss_sums
from hdlm_jax.training.views import make_view
from hdlm_jax.tuning.record import make_rollout

V, S = 4, 6
TWO = Hierarchy.from_parents([[0, 1, 0, 1]])


@functools.cache
def network(trunk, block, hierarchy=TWO):
    sizes = (FlatHead(hierarchy, jnp.float32), 128, 16, 2, 2)
    if trunk == "decoder":
        return Decoder(*sizes, block=block, dims=DecoderConfig(kv_heads=1))
    return Network(*sizes, block=block, time_conditioning=False)


@functools.cache
def weights(trunk, hierarchy=TWO):
    params = network(trunk, 0, hierarchy).init_params(jax.random.key(0), S)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([a + 0.3 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(trunk, block, hierarchy, params, z, clean, segment):
    net = network(trunk, block, hierarchy)
    h = net.hidden(params, z, jnp.zeros(len(z)), segment, None, clean)
    return h, jax.nn.log_softmax(net.head.logits(net.head_params(params), h))


def run(trunk, block, hierarchy, z, clean=None, segment=None):
    """(hidden states [b, S, D], log p of the tokens [b, S, V])."""
    return _run(trunk, block, hierarchy, weights(trunk, hierarchy), z, clean, segment)


def hidden(trunk, block, z, clean=None, segment=None):
    """Hidden states [S, D] of one row."""
    return np.asarray(run(trunk, block, TWO, *(None if a is None else a[None] for a in (z, clean, segment)))[0])[0]


@pytest.mark.parametrize("trunk", ["dit", "decoder"])
def test_a_noised_block_sees_itself_and_the_clean_ones_before(trunk):
    z, x = np.array([6, 1, 4, 6, 5, 6]), np.array([3, 1, 2, 0, 1, 2])
    h = hidden(trunk, 2, z, x)
    other = np.where(np.arange(S) // 2 == 1, z, (z + 1) % 7)
    np.testing.assert_array_equal(hidden(trunk, 2, other, x)[2:4], h[2:4])  # other noised blocks: not seen
    later = np.where(np.arange(S) >= 2, (x + 1) % V, x)
    np.testing.assert_array_equal(hidden(trunk, 2, z, later)[2:4], h[2:4])  # nor itself clean, nor what follows
    before = np.where(np.arange(S) == 0, (x + 1) % V, x)
    moved = np.abs(hidden(trunk, 2, z, before) - h).max(-1)
    assert (moved[:2] == 0).all() and (moved[2:] > 1e-3).all()
    # at the same places as in decoding, where the blocks before are written: one copy, block-causal
    for b in range(3):
        one = np.concatenate([x[: 2 * b], z[2 * b : 2 * b + 2], np.full(S - 2 * b - 2, 6)])
        np.testing.assert_allclose(hidden(trunk, 2, one)[2 * b : 2 * b + 2], h[2 * b : 2 * b + 2], atol=1e-5)
    # one block is the plain network; documents of a packed row do not see each other
    np.testing.assert_allclose(hidden(trunk, S, z, x), hidden(trunk, 0, z), atol=1e-5)
    apart = np.array([0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(hidden(trunk, 2, z, x, apart)[2:], hidden(trunk, 2, z, before, apart)[2:])


def table(hierarchy, block, text, b):
    """p [Z, B, V] of the b-th block of a text, the blocks before it clean, at every z of its own."""
    toy = toy_of(hierarchy)
    own = toy.sequences(block)
    z = np.full((len(own), len(text)), toy.mask)
    z[:, b * block : (b + 1) * block] = own
    log_p = np.asarray(run("dit", block, hierarchy, z, np.tile(text, (len(own), 1)))[1], float)
    return toy.force(np.exp(log_p[:, b * block : (b + 1) * block]), "cavity")


def toy_of(hierarchy):
    levels = hierarchy.num_levels
    return Toy([p for p in hierarchy.parents[: levels - 1]], (1.0,) * levels, vocab_size=V)


def exact(hierarchy, block, text):
    """The bound of a text, block by block, by enumeration."""
    toy, parts = toy_of(hierarchy), text.reshape(-1, block)
    return sum(toy.nelbo(table(hierarchy, block, text, b), nodes=8)[tuple(part)] for b, part in enumerate(parts))


def process_of(hierarchy):
    return HierarchicalProcess(hierarchy, LevelChain((1.0,) * hierarchy.num_levels))


def estimates(hierarchy, block, texts, draws):
    """The evaluator's [draws, rows]."""
    mesh, params = parallel.make_mesh(config_lib.Config(), jax.devices()[:1]), weights("dit", hierarchy)
    evaluator = Evaluator(network("dit", block, hierarchy), process_of(hierarchy), mesh, params,
                          seq_len=texts.shape[1], seed=0, cv2=0.1)
    score, segment = np.ones(texts.shape, bool), np.zeros(texts.shape, np.int32)
    rows = {"x": texts.astype(np.int32), "segment": segment, "score": score}
    return evaluator.nats(params, rows, draws)[0].sum(-1)


TEXT = np.array([2, 0, 3, 1], np.int32)


def test_the_bound_of_blocks_by_enumeration():
    """K = 2, blocks of 2: evaluation and training estimate the sum of the blocks' own bounds."""
    want, rows = exact(TWO, 2, TEXT), np.tile(TEXT, (2048, 1))
    found = estimates(TWO, 2, rows, 2).mean(0)
    assert found.mean() == pytest.approx(want, abs=4 * found.std() / len(found) ** 0.5)
    config = settings(train__objective="count", train__batch_size=len(rows))
    sums = jax.jit(make_loss_sums(config, network("dit", 2), process_of(TWO)))
    batch = {"x": rows, "index": np.arange(len(rows), dtype=np.int32)}
    found = np.array([sums(weights("dit"), batch, jax.random.key(i))[:2] for i in range(4)]) / len(rows)
    np.testing.assert_allclose(found[:, 0], found[:, 1], rtol=1e-5)
    assert found.mean() == pytest.approx(want, abs=0.25)  # 4 errors: a batch's standard deviation is .12


def test_blocks_of_one_are_a_chain_rule():
    """K = 1: the bound is the likelihood of a factorisation from left to right, and all texts' sums to one."""
    one = Hierarchy.from_parents([], V)
    texts = np.array(list(itertools.product(range(V), repeat=3)))
    log_p = np.asarray(run("dit", 1, one, np.full(texts.shape, V), texts)[1], float)
    nats = -np.take_along_axis(log_p, texts[..., None], -1).sum((1, 2))
    assert np.exp(-nats).sum() == pytest.approx(1, abs=1e-4) and nats.std() > 0.3
    draws = estimates(one, 1, texts, draws=32)
    assert np.abs((draws - nats).mean()) < 4 * (draws - nats).std() / draws.size**0.5


def settings(**changes):
    c = config_lib.default()
    c.tokenizer.kind, c.tokenizer.vocab_size = "bytes", 257
    c.hierarchy.clusters = (4,)
    c.diffusion.weighting = "none"
    c.model.width, c.model.blocks, c.model.heads, c.model.seq_len, c.model.block = 16, 2, 2, 4, 2
    c.model.time_conditioning = False
    for name, value in changes.items():
        section, field = name.split("__")
        c[section][field] = value
    return config_lib.resolve(c)


def test_times_of_blocks_are_in_strata():
    """Blocks at one place of the rows cover all times, a stratum each; those of a row lie apart."""
    config = settings(train__batch_size=8, model__seq_len=8)
    batch = jnp.zeros((8, 8), jnp.int32), jnp.ones((8, 8), bool)
    view = jax.jit(make_view(config, process_of(TWO)))(jax.random.key(0), jnp.arange(8), *batch)
    strata = np.floor(-np.expm1(-np.asarray(view.tau, float)) * 8).astype(int).reshape(8, 4, 2)
    assert (strata[..., 0] == strata[..., 1]).all() and (np.sort(strata[..., 0], 0) == np.arange(8)[:, None]).all()
    assert (np.sort(strata[0, :, 0]) == [0, 2, 4, 6]).all()


def sampler(hierarchy, options, **changes):
    config = settings(model__seq_len=4, generate__method="bd3lm", generate__options=options, **changes)
    mesh, process = parallel.make_mesh(config, jax.devices()[:1]), process_of(hierarchy)
    return Sampler(network("dit", 2, hierarchy), process, mesh, weights("dit", hierarchy)), config.generate


def blocks_of(process, program, canvas):
    """Numbers of the blocks of a row of 4 as decoding counts them."""
    z, zero = jnp.asarray(canvas), jnp.zeros(1, jnp.int32)
    state = State(jax.random.split(jax.random.key(0), 1), z, z, z < V, zero + 4, jnp.zeros(z.shape), zero, {}, {}, ())
    return view_of(process, program.method.policy, {}, state).block.tolist()


def test_decoding_counts_blocks_as_training_does():
    """From the row's beginning, also behind a prompt that ends within a block; methods without blocks are refused."""
    draw, g = sampler(TWO, "block=2 steps=6")
    canvas = np.array([[3, 6, 6, 6]], np.int32)
    program, _ = draw.prepare(canvas, g)
    assert blocks_of(process_of(TWO), program, canvas) == [[0, 0, 1, 1]]
    for method, options in (("ancestral", ""), ("bd3lm", "block=3")):
        with pytest.raises(ConfigError, match="choose bd3lm with the options 'block=2'"):
            draw.prepare(canvas, dataclasses.replace(g, method=method, options=options))


@pytest.mark.parametrize("method, options, want", [
    ("max_prob", "block=2", [0, 0, 1, 1]),  # the context's blocks of 2, not [-1, 0, 0, 1] behind the prompt
    ("bd3lm", "block=4", [0, 0, 0, 0]), ("max_prob", "", [-1, 0, 0, 0]), ("bd3lm", "block=3", None)])
def test_decoding_counts_blocks_as_an_open_network_does(method, options, want):
    """decoder.context=block: blocks from the row's beginning behind any prompt; keys kept of whole blocks alone."""
    dims, canvas = DecoderConfig(context="block", block=2), np.array([[3, 5, 5, 5]], np.int32)
    process, g = process_of(Hierarchy.from_parents([], V)), settings().generate
    draw = Sampler(network("decoder", 0, Hierarchy.from_parents([], V)), process, None, None, context=dims.own_block)
    g = dataclasses.replace(g, method=method, options=options, steps=4)
    if want is None:
        with pytest.raises(ConfigError, match="'bd3lm': keeps the keys .* give the options 'block=2'"):
            draw.prepare(canvas, g)
        return
    program, _ = draw.prepare(canvas, g)
    assert blocks_of(process, program, canvas) == [want]


def test_rollouts_count_blocks_as_an_open_network_does():
    """Behind a prompt of one token its block of 2 has one token left, which falls before the next block's do."""
    one, dims = Hierarchy.from_parents([], V), DecoderConfig(context="block", block=2)
    net, process = network("decoder", 0, one), process_of(one)
    g = dataclasses.replace(settings().generate, method="max_prob", options="block=2", steps=3)
    batch = {"z": jnp.array([[3, 5, 5, 5]] * 8, jnp.int32), "index": jnp.arange(8)}
    rollout = jax.jit(make_rollout(net, process, g, context=dims.own_block))
    fell = np.asarray(rollout((weights("decoder", one), numbers_of(g, 4)), batch, jax.random.key(1)).fell)
    assert (fell[:, 1] < fell[:, 2:].min(axis=1)).all() and (fell[:, 0] == -1).all()
    with pytest.raises(ConfigError, match="'max_prob': a network of model.block=2 writes blocks in turn"):
        make_rollout(network("decoder", 2, one), process, dataclasses.replace(g, options=""))


@pytest.mark.slow
def test_bd3lm_writes_the_law_of_its_network():
    """K = 1, one token a call: every text as often as the blocks' own laws say, of which the bound is a bound."""
    one = Hierarchy.from_parents([], V)
    toy, law = toy_of(one), np.zeros((V,) * 4)
    first = toy.p_model(table(one, 2, np.zeros(4, np.int32), 0))
    for a, b in itertools.product(range(V), repeat=2):
        law[a, b] = first[a, b] * toy.p_model(table(one, 2, np.array([a, b, 0, 0], np.int32), 1))
    assert law.sum() == pytest.approx(1)
    draw, g = sampler(one, "block=2 steps=4", generate__batch_size=2048)
    found = draw(np.full((1 << 14, 4), V, np.int32), g)["tokens"]
    counts = np.zeros_like(law)
    np.add.at(counts, tuple(found.T), 1)
    distance, floor, spread = total_variation(counts, law)
    assert distance < floor + 4 * spread
    assert exact(one, 2, TEXT) >= -np.log(law[tuple(TEXT)])


@pytest.mark.parametrize("changes, words", [
    (dict(model__block=3), "model.block=3: must divide model.seq_len=4"),
    (dict(model__time_conditioning=True), "model.time_conditioning=True: "),
    (dict(diffusion__process="gidd", diffusion__weighting="dynamic", hierarchy__clusters=(1,)), "model.block=2: "),
    (dict(model__trunk="decoder", decoder__window=4), "decoder.window=4: is not built for model.block=2"),
    (dict(tune__objective="elbo", tune__task="sums", tune__group=2, train__init_from="x"), "tune.objective='elbo': "),
])
def test_what_is_not_built_is_one_line(changes, words):
    with pytest.raises(ConfigError) as error:
        settings(**changes)
    assert words in str(error.value) and "\n" not in str(error.value)
