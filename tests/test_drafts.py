"""Drafts: what FreeDave writes is what one step a call writes; how far an autoregressive model lets a draft stand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from test_sampler import MDLM, THREE, TWO, make

from hdlm_jax.decoding import choose, loop
from hdlm_jax.decoding.choose import Scored
from hdlm_jax.decoding.drafts import FreeDave, Guided
from hdlm_jax.decoding.loop import Sampling
from hdlm_jax.decoding.policy import Commit, Policy
from hdlm_jax.decoding.revise import Scheduled
from hdlm_jax.models.heads import FactorisedHead, FlatHead
from hdlm_jax.models.network import Network

ONE = Scored(choose.Confidence(), choose.Count())
NUMBERS = {"count": 1, "least": 1, "steps": 5, "reveals": 2, "threshold": 0.5, "threshold_cluster": 0.6, "bar": 0.6}


@dataclasses.dataclass(frozen=True)
class Sure(Commit):
    """Commit when the likeliest words are likely."""

    needs = ("token",)

    def __call__(self, view):
        return jnp.min(jnp.where(view.open, view.log_token, 0.0), axis=1) > jnp.log(view.numbers["bar"])


@dataclasses.dataclass(frozen=True)
class Habit(choose.Score):
    """A score that remembers, what was said before as well as what was written, and sees steps."""

    needs = ("top",)

    def memory(self, view):
        return {"habit": jnp.zeros(view.z.shape, jnp.float32)}

    def remember(self, view, z, dropped):
        return {"habit": view.memory["habit"] + jnp.where(view.open, jnp.exp(view.log_top), 0.0) + dropped}

    def __call__(self, view):
        whole = jnp.sum(jnp.exp(view.log_top), axis=1, keepdims=True)  # nothing is said of other blocks
        return jnp.sin(5 * view.memory["habit"] + view.call[:, None] + whole) + jnp.exp(view.log_top)


def runner(toy, process, policy, numbers=NUMBERS, **kwargs):
    """run(table [Z, S, V], start) -> (words, stats): one program for all tables."""

    @jax.jit
    def run(key, table, z):
        place = jnp.asarray(toy.N ** np.arange(z.shape[1])[::-1])
        denoise = lambda z, t: table[jnp.sum(z * place[None], axis=-1)]  # noqa: E731
        return loop.sample(key, denoise, process, z, policy, numbers, **kwargs)

    def of(table, start):
        logits = jnp.asarray(np.log(table + 1e-30), jnp.float32)
        return jax.tree.map(np.asarray, run(jax.random.key(0), logits, jnp.asarray(start, jnp.int32)))

    return of


def starts(toy, rows, length, seed=0):
    """Masks in half of the rows, any symbols in the others."""
    z = np.random.default_rng(seed).integers(0, toy.N, (rows, length))
    z[::2] = toy.mask
    return z


POLICIES = {
    "one": Policy(ONE, "argmax"),
    "blocks": Policy(Scored(choose.Confidence("margin"), choose.Count()), "argmax", block=2),
    "threshold": Policy(Scored(choose.Confidence("entropy"), choose.Above()), "argmax"),
    "even": Policy(Scored(choose.Confidence(), choose.Even(), straight=True), "argmax"),
    "memory": Policy(Scored(Habit(), choose.Count()), "argmax", block=3),
    "commit": Policy(ONE, "argmax", commit=Sure()),
    "running": Policy(Scored(choose.Confidence(), choose.Running()), "argmax"),  # looks at how sure drops were
    "events": Policy(choose.Planned("events")),
    "grid": Policy(choose.Planned("grid")),
    "uniform": Policy(Scored(choose.Uniform(), choose.Even())),
    "drawn": Policy(Scored(choose.Confidence("drawn"), choose.Count()), order="draw_then_choose"),
}
SLOW = pytest.mark.slow


@pytest.mark.parametrize("shape, rates, xi, length, name, drafts", [
    pytest.param(MDLM, (1.0,), 1.0, 4, "one", (2, 8), marks=SLOW),
    pytest.param(TWO, (1.0, 1.0), 0.8, 3, "uniform", (3,), marks=SLOW),
    (TWO, (1.0, 1.0), 0.8, 4, "running", (3,)),
    pytest.param(THREE, (1.0, 1.0, 1.0), 0.8, 2, "one", (2, 4, 8), marks=SLOW),
    *[pytest.param(shape, rates, xi, 4, name, drafts, marks=SLOW)
      for shape, rates, xi, drafts in [(MDLM, (1.0,), 1.0, (8,)), (TWO, (1.0, 1.0), 0.8, (4,))]
      for name in POLICIES],
])
def test_text_is_that_of_one_step_a_call(shape, rates, xi, length, name, drafts):
    """Networks that know nothing and agree with no draft but by chance, that know all, and that have ties alone."""
    toy, process = make(shape, rates, xi)
    start = starts(toy, 60, length)
    policy = POLICIES[name]
    joint = oracle.random_joint(toy.V, length, seed=3)
    tables = [toy.random_network(length, seed=4), toy.bayes(joint, cavity=True)]
    tables.append(np.full_like(tables[0], 1 / toy.V))
    static = runner(toy, process, policy)
    plain = [static(table, start) for table in tables]
    for k in drafts:
        drafted, saved = runner(toy, process, dataclasses.replace(policy, verify=FreeDave(k))), 0
        for table, (words, stats) in zip(tables, plain, strict=True):
            again, counted = drafted(table, start)
            np.testing.assert_array_equal(again, words)
            turns = counted["row_forwards"] // k
            assert (counted["row_forwards"] % k == 0).all() and (turns <= stats["row_forwards"]).all()
            assert counted["calls"] <= stats["calls"] and (turns[(start < toy.V).all(1)] == 0).all()
            saved += (stats["row_forwards"] - turns).sum()
        assert saved > 0 or name in ("threshold", "commit"), saved


class Chains:
    """The exact words' law of Markov chains rows.extra["chain"] [b, V, V], first word uniform, at masks (MDLM).

    Its cache is what it saw of the rows last, [2, b, S]; of mixed-up rows it says something else.
    """

    forwards = 1

    def start(self, rows):
        return jnp.stack([rows.z, rows.z])

    def __call__(self, cache, rows):
        chain = rows.extra["chain"]
        words = chain.shape[-1]
        fits = (rows.z[..., None] == jnp.arange(words)[None, None]) | (rows.z == words)[..., None]
        fits = jnp.moveaxis(fits, 1, 0).astype(jnp.float32)

        def step(message, here, chain):
            message = jnp.einsum("bv,bvw->bw", message * here, chain)
            return message / message.sum(-1, keepdims=True)

        start = jnp.ones(fits.shape[1:]) / words
        ahead = functools.partial(step, chain=chain)
        back = functools.partial(step, chain=chain.swapaxes(1, 2))
        left = jax.lax.scan(lambda m, here: (ahead(m, here), m), start, fits)[1]
        right = jax.lax.scan(lambda m, here: (back(m, here), m), start, fits, reverse=True)[1]
        logits = jnp.moveaxis(jnp.log(left * right * fits), 0, 1)
        told = jnp.all(cache[0] == cache[1], axis=1) & jnp.all((rows.z == cache[0]) | (cache[0] == words), axis=1)
        return jnp.where(told[:, None, None], logits, logits[:, ::-1]), jnp.stack([rows.z, rows.z])


def chains(models, words, seed=0, concentration=1.0):
    p = np.random.default_rng(seed).dirichlet(np.full(words, concentration), (models, words))
    return jnp.asarray(p, jnp.float32)


def decode_chains(chain, length, drafts, match="exact", choice=ONE, numbers=NUMBERS, **kwargs):
    words = chain.shape[-1]
    _, process = make(dict(parents=[], vocab_size=words), (1.0,))
    policy = Policy(choice, "argmax", verify=drafts and FreeDave(drafts, match))
    z = jnp.full((len(chain), length), words)
    run = jax.jit(lambda key, z, chain: loop.sample(key, Chains(), process, z, policy, numbers,
                                                    extra={"chain": chain}, **kwargs))
    return jax.tree.map(np.asarray, run(jax.random.key(0), z, chain))


@pytest.mark.parametrize("drafts, calls", [
    (4, 6.4), pytest.param(2, 8.0, marks=SLOW), pytest.param(8, 6.0, marks=SLOW), pytest.param(12, 5.8, marks=SLOW)])
def test_calls_on_exact_chains(drafts, calls):
    """300 chains, a cache with rows on its second axis; no more calls than an earlier study of such chains counted."""
    chain = chains(300, 3)
    plain, static = decode_chains(chain, 12, None)
    assert (static["row_forwards"] == 12).all()
    words, stats = decode_chains(chain, 12, drafts, how=Sampling(rows=64))
    np.testing.assert_array_equal(words, plain)
    assert 12 / drafts < (stats["row_forwards"] / drafts).mean() <= calls


@pytest.mark.slow
@SLOW
@pytest.mark.parametrize("match", ["exact", "subset"])
def test_thresholds(match):
    """Exact: the text of the thresholds alone. Subset: other text, complete, in no more calls."""
    chain, numbers = chains(100, 4, concentration=0.3), {"threshold": 0.8, "threshold_cluster": 0.8}
    choice = Scored(choose.Confidence(), choose.Above())
    words, stats = decode_chains(chain, 10, None, choice=choice, numbers=numbers)
    again, counted = decode_chains(chain, 10, 4, match, choice, numbers)
    turns = counted["row_forwards"] / 4
    assert turns.mean() < stats["row_forwards"].mean() and (again < 4).all()
    if match == "exact":
        np.testing.assert_array_equal(again, words)
        assert (turns <= stats["row_forwards"]).all()
    else:
        exact = decode_chains(chain, 10, 4, "exact", choice, numbers)[1]
        assert turns.mean() <= exact["row_forwards"].mean() / 4


@pytest.mark.slow
@SLOW
@pytest.mark.parametrize("head", [FactorisedHead, FlatHead])
def test_a_transformer_s_text_is_the_same(head):
    """Real networks, in which a row's float32 numbers may depend on how many rows there are."""
    toy, process = make(THREE, (1.0, 1.0, 1.0))
    network = Network(head(process.hierarchy), process.hierarchy.padded_states, width=16, blocks=1, heads=2)
    z = jnp.full((5, 5), toy.mask)
    params = network.init(jax.random.key(1), z, jnp.zeros(5))["params"]
    leaves, tree = jax.tree.flatten(params)
    params = tree.unflatten([a + 0.5 * jax.random.normal(jax.random.key(i), a.shape) for i, a in enumerate(leaves)])
    z = z.at[:, 2].set(jnp.arange(5))

    def run(policy):
        return jax.jit(lambda p, z: loop.sample(jax.random.key(2), lambda z, t: network.denoise(p, z, t), process, z,
                                                policy, NUMBERS))(params, z)

    words, stats = run(POLICIES["grid"])
    again, counted = run(dataclasses.replace(POLICIES["grid"], verify=FreeDave(3)))
    np.testing.assert_array_equal(again, words)
    assert (counted["row_forwards"] / 3 <= stats["row_forwards"]).all()


def test_bad_drafts():
    with pytest.raises(ValueError, match="match='some': choose exact or subset"):
        FreeDave(2, "some")
    with pytest.raises(ValueError, match="no revise or lengths"):
        Policy(ONE, revise=Scheduled(), verify=FreeDave(2))
    with pytest.raises(ValueError, match="checks=.*choose some of deterministic, top_k, threshold, relative"):
        Guided(("likely",))
    with pytest.raises(ValueError, match="on_reject='both': choose dlm or ar"):
        Guided(on_reject="both")


# ---- an autoregressive model reads -------------------------------------------------------------------------------


def forced(toy, p, symbol):
    """A law of words as the sampler reads it at a symbol: within the node on show."""
    return toy.force_one(p, symbol, "cavity")


def guided_twin(toy, table, ar, z, checks, on_reject, numbers, size):
    """One row in plain Python: (words, turns)."""
    z, turns = list(z), 0
    free = [i for i, s in enumerate(z) if toy.level[s]]
    block = {i: n // (size or 9) for n, i in enumerate(free)}
    while any(toy.level[s] for s in z):
        turns += 1
        row = int(np.ravel_multi_index(z, (toy.N,) * len(z)))
        draft = [int(np.argmax(forced(toy, table[row, i], s))) if toy.level[s] else s for i, s in enumerate(z)]
        now = min(block[i] for i in free if toy.level[z[i]])
        for i, s in enumerate(z):
            if toy.level[s] == 0:
                continue
            if block[i] > now:
                break
            law = forced(toy, ar[draft[i - 1]] if i else np.full(toy.V, 1 / toy.V), s)
            mine = law[draft[i]]
            good = {"deterministic": draft[i] == law.argmax(), "top_k": (law > mine).sum() < numbers["top_k"],
                    "threshold": mine >= numbers["threshold"], "relative": mine >= numbers["relative"] * law.max()}
            good = all(good[check] for check in checks)
            z[i] = draft[i] if good or on_reject == "dlm" else int(law.argmax())
            if not good:
                break
    return z, turns


class OnDemand:
    """Logits that answer select(index) alone, as a network's prediction does."""

    def __init__(self, process, logits):
        self.process, self.logits = process, logits

    def select(self, index):
        return self.process.as_prediction(self.logits.reshape(-1, self.logits.shape[-1])[index])


def reader(ar, wrap=lambda logits: logits):
    """tools["ar"] of a chain ar [V, V]."""
    def read(words):
        logits = jnp.log(jnp.asarray(ar, jnp.float32))[words[:, :-1]]
        return wrap(jnp.concatenate([jnp.zeros_like(logits[:, :1]), logits], axis=1))

    return read


GUIDE = {"top_k": 2, "threshold": 0.25, "relative": 0.3}


@pytest.mark.parametrize("checks, on_reject, block", [
    (("deterministic",), "ar", 0), (("top_k", "relative"), "dlm", 0),
    pytest.param(("threshold",), "dlm", 0, marks=SLOW), pytest.param(("top_k",), "ar", 2, marks=SLOW)])
def test_guided_twin(checks, on_reject, block):
    """Word for word and turn for turn; canvases with words, clusters and masks, at both ends."""
    toy, process = make(TWO, (1.0, 1.0), 0.8)
    rng = np.random.default_rng(7)
    table, start = toy.random_network(4, seed=5), rng.integers(0, toy.N, (80, 4))
    start = np.where(rng.uniform(size=start.shape) < 0.6, toy.mask, start)
    ar = rng.dirichlet(np.ones(toy.V), toy.V)
    policy = Policy(Scored(choose.Confidence(), choose.All(), straight=True), Guided(checks, on_reject),
                         block=block)
    how = Sampling(tools={"ar": reader(ar, functools.partial(OnDemand, process))}, tokens=7)
    words, stats = runner(toy, process, policy, GUIDE, how=how)(table, start)
    for row, z in enumerate(start):
        want, turns = guided_twin(toy, table, ar, z, checks, on_reject, GUIDE, block)
        np.testing.assert_array_equal(words[row], want)
        assert stats["row_forwards"][row] == turns
    assert (words[start < toy.V] == start[start < toy.V]).all()
    if checks == ("deterministic",):  # then the diffusion model has no say: greedy text, in no more turns
        for row, z in enumerate(start):
            greedy = []
            for i, s in enumerate(z):
                law = forced(toy, ar[greedy[-1]] if i else np.full(toy.V, 1 / toy.V), s)
                greedy.append(int(s) if toy.level[s] == 0 else int(law.argmax()))
            np.testing.assert_array_equal(words[row], greedy)
        assert (stats["row_forwards"] <= 4).all()


@pytest.mark.slow
def test_turns_of_a_draft_that_agrees():
    """A network that says the reader's own greedy text is read at once; one that errs twice takes three turns."""
    toy, process = make(MDLM, (1.0,))
    ar = np.full((4, 4), 0.1) + 0.6 * np.roll(np.eye(4), 1, axis=1)  # each word is followed by the next one
    policy = Policy(Scored(quota=choose.All(), straight=True), Guided())

    @jax.jit
    def run(said, z):
        return loop.sample(jax.random.key(0), lambda z, t: jnp.tile(said[None], (len(z), 1, 1)), process, z, policy,
                           how=Sampling(tools={"ar": reader(ar)}))

    for text, want in (([0, 1, 2, 3, 0, 1], [1] * 3), ([0, 1, 3, 0, 2, 3], [3, 3, 2])):
        start = jnp.full((3, 6), toy.mask).at[2, 4].set(text[4])  # words that stand behind masks count as read
        words, stats = run(9 * np.eye(4, dtype=np.float32)[text], start)
        np.testing.assert_array_equal(words, [text] * 3)
        np.testing.assert_array_equal(stats["row_forwards"], want)


@pytest.mark.slow
def test_a_reader_is_needed():
    toy, process = make(MDLM, (1.0,))
    policy = Policy(Scored(quota=choose.All(), straight=True), Guided())
    with pytest.raises(ValueError, match="tools lack 'ar'"):
        jax.eval_shape(lambda z: loop.sample(jax.random.key(0), lambda z, t: jnp.zeros((*z.shape, 4)), process, z,
                                             policy), jnp.full((1, 2), 4))
