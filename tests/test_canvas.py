"""Canvases, constraints, JSON schemas and canvases that grow (hdlm_jax.decoding.canvas, .schema, .lengths)."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import Toy

from hdlm_jax.config import GenerateConfig
from hdlm_jax.data.tokenizers import make_tokenizer
from hdlm_jax.decoding import canvas, guide, texts
from hdlm_jax.decoding.policy import Rows
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.levels import LevelChain
from hdlm_jax.models.heads import FactorisedHead

MDLM = dict(parents=[], vocab_size=4)
TWO = dict(parents=[[0, 1, 0, 1]])
THREE = dict(parents=[[0, 1, 2, 0, 2], [0, 1, 1]])
ROWS = 20_000


@functools.cache
def bpe():
    """A small byte-level BPE with words of digits, quotes, signs and letters of two bytes."""
    texts = ['the cat sat on the mat, " red " and " dark blue ", 12 345 -67 8.25 0.5 007 -12 -12 345 345',
             '{"name": "café", "age": 12, "tags": ["a", "b"], "on": true, "off": false, "none": null} \\" \\n \\\\',
             "été naïve — “quoted” 日本語 日本語 -1 -2 .5 .25 0 00 000 1000000 the dog ran; the cow lay down"] * 8
    return make_tokenizer("bpe", 420, texts)


def clusters(words, sizes, seed=0):
    """A random hierarchy of so many words."""
    rng, parents, n = np.random.default_rng(seed), [], words
    for size in sizes:
        parents.append(rng.permutation(np.arange(n) % size))
        n = size
    return Hierarchy.from_parents(parents, words)


def processed(hierarchy, xi=1.0, force="cavity"):
    return HierarchicalProcess(hierarchy, LevelChain((1.0,) * hierarchy.num_levels), xi, force)


def rows_of(z, kind, hierarchy):
    """What a denoiser is told of rows [b, S] in a first call."""
    z = jnp.asarray(z, jnp.int32)
    none, b = jnp.zeros(z.shape, jnp.int32), z.shape[0]
    level = processed(hierarchy).level_of(z)
    return Rows(z, jnp.ones(b), level, level == 0, z >= 0, none, jnp.zeros(b, jnp.int32), level > 0,
                jnp.zeros(b, jnp.int32), {"kind": jnp.broadcast_to(jnp.asarray(kind, jnp.int32), z.shape)})


def law_of(denoiser, z, kind, index):
    """The law [n, V] that a denoiser gives at tokens `index` of rows z in a first call."""
    def law():
        rows = rows_of(z, kind, denoiser.process.hierarchy)
        return jnp.exp(denoiser(denoiser.start(rows), rows)[0].select(jnp.asarray(index)).log_probs())

    return np.asarray(jax.jit(law)())


def write(process, denoiser, start, kind, order, seed=0, by=1, watch=None):
    """Words int32 [b, S]: positions `order` one after the other (or groups of them), `by` levels a call."""

    @jax.jit
    def call(key, z, at):
        prediction, _ = denoiser((), rows_of(z, kind, process.hierarchy))
        level = process.level_of(z).reshape(-1)
        here = jnp.broadcast_to(at, z.shape).reshape(-1)
        keys = jax.random.split(key, z.size)
        flat = process.reverse_step(keys, prediction.select(jnp.arange(z.size)), z.reshape(-1),
                               jnp.where(here, jnp.maximum(level - by, 0), level))
        return flat.reshape(z.shape)

    z, key = jnp.asarray(start, jnp.int32), jax.random.key(seed)
    for group in order:
        at = np.isin(np.arange(z.shape[1]), group)
        while np.any(process.level_of(z)[:, at]):
            key, now = jax.random.split(key)
            z = call(now, z, at[None])
            if watch:
                watch(np.asarray(z))
    return np.asarray(z)


def assert_law(words, law):
    counts = np.zeros(law.shape)
    np.add.at(counts, tuple(words.T), 1)
    distance, floor, spread = oracle.total_variation(counts, law)
    assert distance <= floor + 4.5 * spread, (distance, floor, spread)


# ---- canvases -----------------------------------------------------------------------------------


def test_what_makes_no_canvas():
    h = clusters(bpe().vocab_size, (8,))
    cases = [(lambda: canvas.make([], h), "no tokens"),
             (lambda: canvas.make([1] * 5, h, seq_len=4), "canvas of 5 tokens: must be 1 to seq_len=4")]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()


def test_templates_have_typed_blanks():
    h, t = clusters(bpe().vocab_size, (12, 3)), bpe()
    text = "The [LIKE:cat] and[MASK:2] [[a] [LIKE@2:dog]  [MASK]."
    found = canvas.template(text, t, h)
    cat, dog = (int(t.encode(w)[0]) for w in (" cat", " dog"))
    cat, dog = (int(h.state_id(level, h.anc[level][word])) for level, word in ((1, cat), (2, dog)))
    mask = h.mask_id
    want = [*t.encode("The"), cat, *t.encode(" and"), mask, mask, *t.encode(" [a]"), dog, *t.encode("  "), mask,
            *t.encode(".")]
    assert found.z[0].tolist() == want
    typed = found.kind[0] > 0
    np.testing.assert_array_equal(typed, np.isin(want, [cat, dog]))
    for place in np.flatnonzero(typed):  # exactly the words under the node on show
        level = int(h.level_of(want[place]))
        under = h.anc[level] == int(h.node_of(want[place]))
        np.testing.assert_array_equal(found.allowed[found.kind[0, place]], under)
    assert found.allowed[0].all()


@pytest.mark.parametrize("text", ["the [MASK] sat [MASK:3].", "[LIKE:cat] the", "x [LIKE:dog]  [MASK] é"])
def test_templates_are_the_notebook_s_blanks(text):
    """The same symbols as Model.infill starts from."""
    h, t = clusters(bpe().vocab_size, (8,)), bpe()
    run = types.SimpleNamespace(tokenizer=t, hierarchy=h, ends=False,
                                config=types.SimpleNamespace(model=types.SimpleNamespace(seq_len=64)))
    asked = texts.filled(run, GenerateConfig(num_samples=1), text)
    np.testing.assert_array_equal(canvas.template(text, t, h).z[0], asked.canvas.z[0, : asked.keep])


@pytest.mark.parametrize("text, message", [
    ("a [1] b", r"'\[' at character 2 opens no blank: write \[MASK\]"),
    ("a [MASK:x]", "at character 2 opens no blank"),
    ("ab [MASK:0]", "character 3: a blank has at least one token"),
    ("[[ [LIKE@2:cat]", r"'\[LIKE@2:cat\]' at character 3: level 2 has no clusters; levels that have: 1..1"),
    ("[LIKE@0:cat]", "level 0 has no clusters"),
    ("", "no tokens"),
])
def test_templates_say_where_they_are_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        canvas.template(text, bpe(), clusters(bpe().vocab_size, (8,)))
    with pytest.raises(ValueError, match=r"none, so use \[MASK\]"):
        canvas.template("[LIKE:cat]", bpe(), clusters(bpe().vocab_size, ()))


# ---- constraints --------------------------------------------------------------------------------


def toy_of(shape, xi=1.0, force="cavity"):
    rates = (1.0,) * (len(shape["parents"]) + 1)
    hierarchy = Hierarchy.from_parents(shape["parents"], shape.get("vocab_size"))
    return Toy(rates=rates, xi=xi, **shape), HierarchicalProcess(hierarchy, LevelChain(rates), xi, force)


def table(toy, network):
    """A network that looks its answer up: logits [b, S, V]."""
    logits = jnp.asarray(np.log(network + 1e-30), jnp.float32)
    place = jnp.asarray(toy.N ** np.arange(network.shape[1])[::-1])
    return lambda z, t: logits[jnp.sum(z * place[None], axis=-1)]


def allowed_of(*sets, words):
    return np.stack([np.ones(words, bool), *(np.isin(np.arange(words), s) for s in sets)])


@pytest.mark.parametrize("shape, xi, literal", [
    (MDLM, 1.0, 1), (TWO, 0.8, 2), pytest.param(TWO, 1.0, 0, marks=pytest.mark.slow)])
def test_given_words_condition_exactly(shape, xi, literal):
    """S^3 (f): with an exact model the rest has the law p(x | literals), in any order of writing."""
    toy, process = toy_of(shape, xi)
    joint = oracle.random_joint(4, 3, seed=3)
    start = np.full((ROWS, 3), toy.mask)
    start[:, literal] = 2
    inner = table(toy, toy.bayes(joint, cavity=True))
    denoiser = guide.Constrained(process, inner, allowed_of([2], words=4))
    order = [p for p in (2, 0, 1) if p != literal]
    words = write(process, denoiser, start, np.arange(3) == literal, order)
    assert (words[:, literal] == 2).all()
    law = np.where(np.moveaxis(np.indices(joint.shape), 0, -1)[..., literal] == 2, joint, 0)
    assert_law(words, law / law.sum())


@pytest.mark.parametrize("shape, xi", [
    (TWO, 1.0), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((MDLM, 1.0), (TWO, 0.8)))])
def test_a_restricted_position_is_cut_and_normalised(shape, xi):
    """Written first: p(x_i | literals, x_i allowed). The next one is cut given what was drawn: the order matters."""
    toy, process = toy_of(shape, xi)
    joint = oracle.random_joint(4, 3, seed=4)
    start = np.tile([toy.mask, toy.mask, 1], (ROWS, 1))
    denoiser = guide.Constrained(process, table(toy, toy.bayes(joint, cavity=True)),
                                 allowed_of([0, 3], [1, 2, 3], words=4))
    laws = {}
    for order in ((0, 1), (1, 0)):
        words = write(process, denoiser, start, [1, 2, 0], order)
        p, sets = joint[:, :, 1] / joint[:, :, 1].sum(), np.asarray(denoiser.allowed)[1:]
        first, second = order
        cut = p.sum(axis=second) * sets[first]
        rest = np.moveaxis(p, first, 0) * sets[second]
        law = np.moveaxis(cut[:, None] / cut.sum() * rest / rest.sum(1, keepdims=True), 0, first)
        laws[order] = law
        assert_law(words[:, :2], law)
    assert np.abs(laws[0, 1] - laws[1, 0]).max() > 0.02


@pytest.mark.parametrize("shape, xi, force", [
    (TWO, 1.0, "cavity"), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (THREE, 0.7, "cavity"), (THREE, 1.0, "cavity"), (THREE, 1.0, "none"), (TWO, 0.8, "between")))])
def test_clusters_agree_with_what_is_allowed(shape, xi, force):
    """At xi = 1 nothing but clusters with an allowed word is ever shown; at any xi the words are allowed ones."""
    toy, process = toy_of(shape, xi, force)
    network = toy.random_network(2, seed=5) ** 2
    allowed = allowed_of([1], [0, 3], words=toy.V)
    denoiser = guide.Constrained(process, table(toy, network / network.sum(-1, keepdims=True)), allowed)
    kind = np.array([1, 2])

    def watch(z):
        for k in range(1, toy.K) if xi == 1 and force == "cavity" else ():
            for place in (0, 1):
                nodes = toy.node[z[toy.level[z[:, place]] == k, place]]
                assert np.isin(nodes, toy.anc[k][allowed[kind[place]]]).all()

    start = np.full((2000, 2), toy.mask)
    start[:500, 0] = toy.offsets[1] + toy.anc[1][1]  # a typed blank: a start at level 1
    words = write(process, denoiser, start, kind, [(0, 1)], watch=watch)
    assert allowed[kind[None], words].all() and len(np.unique(words[:, 1])) == 2


@pytest.mark.parametrize("inner", ["logits", "factorised"])
def test_restricted_laws_of_every_head(inner):
    h = clusters(40, (5,))
    rng = np.random.default_rng(6)
    allowed = rng.random((3, 40)) < 0.3
    kind = rng.integers(0, 3, (2, 4))
    head = FactorisedHead(h)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), head.init(jax.random.key(0), 8))
    predictions = {
        "logits": jnp.asarray(rng.normal(size=(2, 4, 40)), jnp.float32),
        "factorised": head.predict(params, jnp.asarray(rng.normal(size=(2, 4, 8)), jnp.float32)),
    }
    prediction = predictions[inner]
    logits = prediction if inner == "logits" else prediction.log_probs()
    denoiser = guide.Constrained(processed(h), lambda z, t: prediction, allowed)
    index = np.array([6, 1, 3])
    got = law_of(denoiser, np.full((2, 4), h.mask_id), kind, index)
    want = np.exp(np.asarray(logits)) * allowed[kind]
    want = (want / want.sum(-1, keepdims=True)).reshape(8, 40)[index]
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-7)


def test_words_without_any_probability_are_equally_likely():
    h = clusters(6, ())
    logits = jnp.where(jnp.arange(6) < 3, 0.0, -jnp.inf)
    denoiser = guide.Constrained(processed(h), lambda z, t: jnp.broadcast_to(logits, (1, 2, 6)),
                                 allowed_of([3, 5], words=6))
    got = law_of(denoiser, [[h.mask_id] * 2], np.array([1, 0]), [0, 1])
    np.testing.assert_allclose(got, [[0, 0, 0, 0.5, 0, 0.5], [1 / 3] * 3 + [0] * 3], atol=1e-6)


def test_constraints_keep_the_inner_cache():
    class Counting:
        forwards = 1

        def start(self, rows):
            return {"calls": jnp.zeros((3, rows.z.shape[0]))}

        def __call__(self, cache, rows):
            return jnp.zeros((*rows.z.shape, 6)), {"calls": cache["calls"] + 1}

    h = clusters(6, ())
    denoiser = guide.Constrained(processed(h), Counting(), allowed_of([3], words=6))
    rows = rows_of([[h.mask_id] * 2], [1, 0], h)
    cache = denoiser.start(rows)
    _, cache = denoiser(cache, rows)
    assert (cache["calls"] == 1).all()
