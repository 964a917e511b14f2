"""Guided denoisers against laws by enumeration; draws by importance against the law of so many candidates."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from test_drafts import Chains, OnDemand, chains, reader
from test_sampler import MDLM, TWO, assert_law, counts_of, denoiser, make

from hdlm_jax.decoding import choose, guide, loop
from hdlm_jax.decoding.choose import Scored
from hdlm_jax.decoding.policy import Policy, Rows, Stateless
from hdlm_jax.models.heads import FactorisedHead

ONE = Policy(Scored(choose.Uniform(), choose.Count()))
SLOW = pytest.mark.slow


def rows_of(process, z, given):
    level = process.level_of(z)
    return Rows(z, jnp.ones(len(z)), level, given, given | True, level * 0, level[:, 0] * 0, level > 0,
                level[:, 0] * 0, {})


def log_probs(denoise, process, z, given=None):
    """[b, S, V] of what a denoiser says of rows."""
    @jax.jit
    def run(z, given):
        rows = rows_of(process, z, given)
        said, _ = denoise(denoise.start(rows), rows)
        return said.select(jnp.arange(z.size)).log_probs().reshape(*z.shape, -1)

    return np.asarray(run(z, process.level_of(z) == 0 if given is None else given))


def place(toy, z):
    return np.ravel_multi_index(tuple(np.asarray(z).T), (toy.N,) * z.shape[1])


def normal(p):
    return p / p.sum(-1, keepdims=True)


def sample(denoise, process, z, policy, numbers, seed=0, **kwargs):
    run = jax.jit(lambda key, z: loop.sample(key, denoise, process, z, policy, numbers, **kwargs))
    return jax.tree.map(np.asarray, run(jax.random.key(seed), jnp.asarray(z, jnp.int32)))


# ---- classifier-free guidance ------------------------------------------------------------------------------------


def without(toy, z, given, unconditional):
    hidden = toy.mask if unconditional == "mask" else toy.offsets[1] + toy.anc[1][np.where(given, z, 0)]
    return np.where(given, hidden, z)


@pytest.mark.parametrize("unconditional", ["mask", "cluster"])
def test_cfg_tilts_the_law(unconditional):
    """c^(1+w) / u^w, normalised; w = 0: as without; words that c rules out stay ruled out."""
    toy, process = make(TWO, (1.0, 1.0))
    table = toy.random_network(3, seed=1)
    table[:, 1, 2] = 0
    table = normal(table)
    z = np.random.default_rng(2).integers(0, toy.N, (30, 3))
    given = (z < toy.V) & (np.arange(30) % 3 > 0)[:, None]  # words of some rows were written, not given
    c, u = table[place(toy, z)], table[place(toy, without(toy, z, given, unconditional))]
    logits, at = jnp.log(jnp.asarray(table, jnp.float32)), jnp.asarray(toy.N ** np.arange(3)[::-1])
    said = lambda z, t: logits[jnp.sum(z * at[None], axis=-1)]  # noqa: E731
    for weight in (0.0, 0.7, 2.0):
        tilted = guide.CFG(process, said, jnp.float32(weight), unconditional)
        got = np.exp(log_probs(tilted, process, jnp.asarray(z), jnp.asarray(given)))
        with np.errstate(divide="ignore", invalid="ignore"):
            want = normal(np.where(c > 0, c ** (1 + weight) / u**weight, 0))
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-7)
        assert (got[:, 1, 2] == 0).all()


@pytest.mark.slow
@SLOW
def test_text_under_cfg():
    """Cluster, then word: each by the tilted law, through a head of two factors; twice the passes."""
    toy, process = make(TWO, (1.0, 1.0))
    head = FactorisedHead(process.hierarchy)
    params = jax.tree.map(lambda a: a + 1.0 * jax.random.normal(jax.random.key(a.size), a.shape),
                          head.init(jax.random.key(0), 4))
    place_of = jax.random.normal(jax.random.key(1), (toy.N, 2, 4))

    class At(tuple):
        def select(self, index):
            return head.predict(params, self[0].reshape(-1, 4)[index])

    def denoise(z, t):  # each token sees the other
        return At([place_of[z, jnp.arange(2)[None]][:, ::-1]])

    table = np.asarray(jnp.exp(head.logits(params, At.__getitem__(denoise(jnp.asarray(toy.sequences(2)), None), 0))))

    def tilted(z):
        c, u = (table[place(toy, np.array([s]))][0] for s in (z, [toy.mask, z[1]]))
        return normal(c**2.5 / u**1.5)[1]

    want = np.zeros(toy.V)
    for cluster in (0, 1):
        under = toy.anc[1] == cluster
        first = tilted([3, toy.mask])[under].sum()
        want += first * normal(np.where(under, tilted([3, toy.offsets[1] + cluster]), 0))
    z = np.tile([3, toy.mask], (6000, 1))
    words, stats = sample(guide.CFG(process, denoise, 1.5), process, z, ONE, {"count": 1})
    assert_law(words[:, 1:], want)
    assert (words[:, 0] == 3).all() and (stats["row_forwards"] == 4).all()


@pytest.mark.slow
def test_cfg_keeps_two_caches():
    """Of a denoiser with a cache: as without one."""
    toy, process = make(MDLM, (1.0,))
    chain = chains(1, 4)
    z = np.full((12, 6), 4)
    z[:, [0, 3]] = np.random.default_rng(3).integers(0, 4, (12, 2))

    def stateless(z, t):
        rows = types.SimpleNamespace(z=z, extra={"chain": jnp.tile(chain, (len(z), 1, 1))})
        return Chains()(jnp.stack([z, z]), rows)[0]

    policy = Policy(Scored(choose.Confidence(), choose.Count()), "argmax")
    extra = {"chain": jnp.tile(chain, (12, 1, 1))}
    how = loop.Sampling(rows=5)
    texts = [sample(guide.CFG(process, denoise, 1.0), process, z, policy, {"count": 1}, extra=extra, how=how)[0]
             for denoise in (Chains(), stateless)]
    np.testing.assert_array_equal(*texts)


# ---- classifiers -------------------------------------------------------------------------------------------------


def log_likelihood(toy, joint, likelihood):
    """log p(y | z) [Z] of every sequence of symbols, from p(y | x) [V] * S."""
    q, out = toy.q(0.7), []
    for z in toy.sequences(joint.ndim):
        weight = joint
        for i, s in enumerate(z):
            shape = [1] * joint.ndim
            shape[i] = toy.V
            weight = weight * q[:, s].reshape(shape)
        out.append((weight * likelihood).sum() / weight.sum())
    return np.log(out)


def by_replacement(classifier, hierarchy):
    """score(z) of Classified, exact, from a classifier of symbols: int32 [b, S] -> log p(y) [b], in S V calls."""

    def score(z):
        each = jax.vmap(jax.vmap(lambda i, v: classifier(z.at[:, i].set(v)), (None, 0)), (0, None))
        return jnp.moveaxis(each(jnp.arange(z.shape[1]), jnp.arange(hierarchy.vocab_size, dtype=z.dtype)), -1, 0)

    return score


SHAPES = [(MDLM, (1.0,)), pytest.param(TWO, (1.0, 1.0), marks=SLOW)]


@pytest.mark.slow
@pytest.mark.parametrize("shape, rates", SHAPES)
def test_classifier_guidance_is_bayes(shape, rates):
    """A classifier that knows p(y | z) makes p(x | z) into p(x | z, y), and texts into draws of p(x | y)."""
    toy, process = make(shape, rates)
    joint = oracle.random_joint(toy.V, 3, seed=4)
    likelihood = np.random.default_rng(5).uniform(0.02, 1, joint.shape)
    posterior = joint * likelihood / (joint * likelihood).sum()
    known = jnp.asarray(log_likelihood(toy, joint, likelihood), jnp.float32)
    at = jnp.asarray(toy.N ** np.arange(3)[::-1])
    score = by_replacement(lambda z: known[jnp.sum(z * at[None], axis=-1)], process.hierarchy)
    denoise = guide.Classified(process, denoiser(toy, toy.bayes(joint, cavity=True)), score)
    z = toy.sequences(3)
    got = np.exp(log_probs(denoise, process, jnp.asarray(z, jnp.int32)))
    np.testing.assert_allclose(got, toy.bayes(posterior, cavity=True), atol=1e-5)
    words, stats = sample(denoise, process, np.full((6000, 3), toy.mask), ONE, {"count": 1})
    assert_law(words, posterior)
    assert (stats["row_forwards"] == 3 * toy.K).all()


@pytest.mark.slow
def test_first_order_scores():
    """Exact for a classifier that is linear in each token; weighted; one that is not: the gradient."""
    toy, process = make(TWO, (1.0, 1.0))
    h = process.hierarchy
    w = jnp.asarray(np.random.default_rng(6).normal(size=(3, toy.N)), jnp.float32)
    linear = lambda x: jnp.sum(x * w[None], axis=(1, 2)) - 1.0  # noqa: E731
    table = toy.random_network(3, seed=7)
    z = jnp.asarray(toy.sequences(3)[::9], jnp.int32)
    laws = []
    for score in (guide.first_order(linear, h), by_replacement(lambda z: linear(jax.nn.one_hot(z, toy.N)), h)):
        laws.append(log_probs(guide.Classified(process, denoiser(toy, table), score, jnp.float32(0.5)), process, z))
    np.testing.assert_allclose(*laws, atol=1e-5)
    want = normal(table[place(toy, z)] * np.exp(0.5 * np.asarray(w)[None, :, : toy.V]))
    np.testing.assert_allclose(np.exp(laws[0]), want, rtol=1e-4)
    square = guide.first_order(lambda x: -jnp.sum(x * w[None], axis=(1, 2)) ** 2, h)(z)
    inside = np.take_along_axis(np.asarray(w)[None], np.asarray(z)[..., None], axis=2)[..., 0].sum(1)
    np.testing.assert_allclose(square, -2 * inside[:, None, None] * np.asarray(w)[None, :, : toy.V], rtol=1e-4)


# ---- energies ----------------------------------------------------------------------------------------------------


def exact_energy(toy, process, joint, sign=1):
    """E = log p_theta(x0) - log joint(x0)."""
    logs = jnp.asarray(np.log(joint), jnp.float32).reshape(-1)
    at = jnp.asarray(toy.V ** np.arange(joint.ndim)[::-1])
    return lambda x, z, log_p, t=None: sign * (jnp.sum(log_p, axis=1) - logs[jnp.sum(x * at[None], axis=1)])


WINDOW = {"energy_from": 0.0, "energy_to": 1.0, "steps": 1}


def energy_text(toy, process, table, energy, k, rows, numbers):
    """Texts from masks; k candidates, 0: none."""
    policy = Policy(choose.Planned("grid"), guide.EnergyDraw(k) if k else "sample")
    return sample(denoiser(toy, table), process, np.full((rows, table.shape[1]), toy.mask), policy, numbers, seed=8,
                  how=loop.Sampling(tools={"energy": energy}))


@pytest.mark.parametrize("k", [2, pytest.param(8, marks=SLOW), pytest.param(32, marks=SLOW)])
def test_candidates_of_one_turn(k):
    """One shot of all tokens: the law of two candidates by enumeration; nearer to the data the more there are."""
    toy, process = make(MDLM, (1.0,))
    joint = normal(oracle.random_joint(4, 3, seed=9).reshape(-1) ** 2).reshape(4, 4, 4)
    table = toy.bayes(joint)
    alone = np.einsum("a,b,c->abc", *table[-1])  # all masks
    policy, z = Policy(choose.Planned("grid"), guide.EnergyDraw(k)), jnp.full((12_000, 3), toy.mask)
    how = lambda sign: loop.Sampling(tools={"energy": exact_energy(toy, process, joint, sign)})  # noqa: E731
    run = jax.jit(lambda sign: loop.sample(jax.random.key(8), denoiser(toy, table), process, z, policy, WINDOW,
                                           how=how(sign)))
    words, stats = run(1.0)
    assert (stats["row_forwards"] == 1).all()
    far = 0.5 * np.abs(alone - joint).sum()
    wrong = oracle.total_variation(counts_of(np.asarray(run(-1.0)[0]), 4), joint)[0]
    assert far > 0.3 and wrong > 1.3 * far
    if k == 2:
        w, two = joint / alone, np.zeros_like(joint)
        for x, y in itertools.product(np.ndindex(joint.shape), repeat=2):
            two[x] += 2 * alone[x] * alone[y] * w[x] / (w[x] + w[y])
        np.testing.assert_allclose(two.sum(), 1)
        assert_law(np.asarray(words), two)
        assert 0.5 * np.abs(two - joint).sum() < 0.75 * far
    else:  # k p(x) E[w(x) / (w(x) + the others' w)]
        w, p = (joint / alone).reshape(-1), alone.reshape(-1)
        others = w[np.random.default_rng(10).choice(64, (20_000, k - 1), p=p)].sum(1)
        law = k * p * (w[:, None] / (w[:, None] + others)).mean(1)
        assert_law(np.asarray(words), normal(law).reshape(joint.shape))
        assert 0.5 * np.abs(normal(law) - joint.reshape(-1)).sum() < {8: 0.4, 32: 0.2}[k] * far


@pytest.mark.slow
@pytest.mark.parametrize("shape, rates, xi", [(MDLM, (1.0,), 1.0), pytest.param(TWO, (1.0, 1.0), 0.8, marks=SLOW)])
def test_one_candidate_and_other_turns_are_plain_draws(shape, rates, xi):
    toy, process = make(shape, rates, xi)
    table = toy.random_network(3, seed=10)
    energy = exact_energy(toy, process, oracle.random_joint(toy.V, 3, seed=11))
    numbers = WINDOW | {"steps": 4}
    plain, stats = energy_text(toy, process, table, energy, 0, 300, numbers)
    one = energy_text(toy, process, table, energy, 1, 300, numbers)
    np.testing.assert_array_equal(one[0], plain)
    np.testing.assert_array_equal(one[1]["row_forwards"], stats["row_forwards"])
    run = jax.jit(lambda numbers: loop.sample(
        jax.random.key(8), denoiser(toy, table), process, jnp.full((300, 3), toy.mask),
        Policy(choose.Planned("grid"), guide.EnergyDraw(3)), numbers, how=loop.Sampling(tools={"energy": energy}))[0])
    np.testing.assert_array_equal(run(numbers | {"energy_from": 1.5, "energy_to": 2.0}), plain)
    early = np.asarray(run(numbers | {"energy_from": 0.9}))
    late = np.asarray(run(numbers | {"energy_to": 0.6}))
    assert all((a != b).any() for a, b in itertools.combinations([plain, early, late], 2))


@pytest.mark.slow
@SLOW
@pytest.mark.parametrize("shape, rates", SHAPES)
def test_energy_sees_whole_texts_in_blocks(shape, rates):
    """A network that knows each word's own law alone, one block and one level a turn: the energy makes the rest."""
    toy, process = make(shape, rates)
    joint = oracle.random_joint(toy.V, 2, seed=12) ** 2
    joint = joint / joint.sum()
    own = np.stack([joint.sum(1), joint.sum(0)])
    table = np.broadcast_to(own[None], (toy.N**2, 2, toy.V))
    numbers = WINDOW | {"count": 1}
    table_of, policy = denoiser(toy, table), Policy(Scored(choose.Order("left"), choose.Count()), guide.EnergyDraw(24),
                                                    block=1)

    class Asked(Stateless):  # knows nothing where it was not asked
        def __call__(self, cache, rows):
            return jnp.where(rows.wanted[..., None], table_of(rows.z, rows.t), 9.0 * jnp.eye(toy.V)[:1][None]), cache

    words, _ = sample(Asked(None), process, np.full((4000, 2), toy.mask), policy, numbers, seed=8,
                      how=loop.Sampling(tools={"energy": exact_energy(toy, process, joint)}))
    alone = 0.5 * np.abs(np.outer(*own) - joint).sum()
    distance, floor, spread = oracle.total_variation(counts_of(words, toy.V), joint)
    assert distance < floor + 4.5 * spread + 0.15 * alone and alone > 0.15, (distance, floor, alone)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [lambda a: a, None])
def test_autoregressive_energy(wrap):
    """Against sums by hand, for logits and for a prediction on demand."""
    toy, process = make(TWO, (1.0, 1.0))
    rng = np.random.default_rng(13)
    ar = rng.dirichlet(np.ones(4), 4)
    x, log_p = rng.integers(0, 4, (5, 6)), np.log(rng.uniform(size=(5, 6)))
    z = np.where(rng.uniform(size=x.shape) < 0.5, x, rng.integers(4, toy.N, x.shape))
    z[0, 4:], log_p = -1, np.where(z >= 4, log_p, 0)
    wrap = wrap or (lambda logits: OnDemand(process, logits))
    energy = guide.ar_energy(reader(ar, wrap), process, chunk=7)
    want = np.zeros(5)
    for b, i in np.ndindex(x.shape):
        said = 1 / 4 if i == 0 else ar[x[b, i - 1], x[b, i]]
        want[b] += log_p[b, i] - np.log(said) * (z[b, i] >= 4)
    np.testing.assert_allclose(energy(*(jnp.asarray(a) for a in (x, z, log_p)), None), want, rtol=1e-4)


def test_bad_energies():
    toy, process = make(MDLM, (1.0,))
    with pytest.raises(ValueError, match="in the order draw_then_choose choose sample or argmax"):
        Policy(Scored(), guide.EnergyDraw(2), order="draw_then_choose")
    with pytest.raises(ValueError, match="tools lack 'energy'"):
        policy = Policy(choose.Planned(), guide.EnergyDraw(2))
        jax.eval_shape(lambda z: loop.sample(jax.random.key(0), lambda z, t: jnp.zeros((*z.shape, 4)), process, z,
                                             policy, WINDOW), jnp.full((1, 2), 4))
