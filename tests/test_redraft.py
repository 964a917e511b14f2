"""train.draft_share: what a network that corrects its drafts should say, by enumeration, and what a step teaches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracle import entropy, random_joint
from test_sampler import make
from test_tuning import Exact
from test_views import ROWS, SEQ, settings

from hdlm_jax.config import Config, ConfigError, DiffusionConfig, TrainConfig
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.training.drafts import correction
from hdlm_jax.training.state import build
from hdlm_jax.training.step import make_loss_sums

S, SHARE = 2, 0.5
CASES = {"K=1": (dict(parents=[], vocab_size=3), (1.0,), 1.0), "K=2": (dict(parents=[[0, 1, 0, 1]]), (1.0, 2.0), 1.0),
         "K=2, xi=.7": (dict(parents=[[0, 1, 0, 1]]), (2.0, 1.0), 0.7)}


@functools.cache
def optimum(case, one=False):
    """(toy, process, joint, tables [Z, S, V] of p(x | z) and of the best f, law [Z, Z] of z and of z' one step of the
    optimal network's own later): times t and u by quadrature, every text, z and z'. one: a single draft in z'."""
    toy, process = make(*CASES[case])
    joint = random_joint(toy.V, S, seed=4, concentration=1.0)  # no rare words: errors are those of many draws
    p, best = toy.bayes(joint), toy.bayes(joint, cavity=True)
    z = toy.sequences(S)
    nodes, parts = np.polynomial.legendre.leggauss(12)
    law = np.zeros((len(z), len(z)))
    for t, a in zip((nodes + 1) / 2, parts / 2, strict=True):
        before = joint.ravel() @ toy.occupancy(-np.log1p(-t), S)
        for u, b in zip((nodes + 1) / 2, parts / 2, strict=True):
            table = toy.step_table(-np.log1p(-u * t), -np.log1p(-t))
            after = np.ones_like(law)
            for i in range(S):
                step = np.where((z[:, i] < toy.V)[:, None], np.eye(toy.N)[z[:, i]],
                                np.einsum("zx,xzu->zu", p[:, i], table[:, z[:, i]]))
                after *= step[:, z[:, i]]
            law += a * b * before[:, None] * after
    fell = toy.level[z][:, None] > toy.level[z][None]  # [Z, Z, S]
    if one:
        law = law * (fell.sum(-1) == 1)
    answer = np.einsum("ab,abi,aix->bix", law, fell, p)
    seen = answer.sum(-1, keepdims=True) > 0
    answer = np.where(seen, answer / np.where(seen, answer.sum(-1, keepdims=True), 1), 1 / toy.V)
    level = np.broadcast_to(toy.level[z][..., None], best.shape)
    table = np.where(level == 0, answer, best)
    if toy.K == 2 and toy.xi == 1:  # of clusters the masses; within them the bound's own optimum
        onto = np.eye(toy.sizes[1])[toy.anc[1]]
        mass, within = answer @ onto @ onto.T, best / (best @ onto @ onto.T)
        table = np.where((level == 1) & seen, mass * within, table)
    return toy, process, joint, p, table, law


class Tabular:
    """A network whose parameters are its logits in every state of a row: table [N ** S, S, V]."""

    def __init__(self, process):
        self.process, self.head = process, Exact(process.hierarchy)

    def head_params(self, params):
        return {"kernel": jnp.zeros(0), "bias": jnp.zeros(0)}

    def hidden(self, params, z, t, segment=None, dropout=None, clean=None):
        return params[jnp.sum(z * jnp.asarray(self.process.num_states ** np.arange(S)[::-1])[None], axis=1)]


@functools.cache
def stepper(case, rows=1024):
    """slopes(logits, keys) -> (gradients of a step's loss, bounds of a text), one for each key."""
    _, process, joint, *_ = optimum(case)
    config = Config(train=TrainConfig(draft_share=SHARE, batch_size=rows),
                    diffusion=DiffusionConfig(weighting="constant"))
    sums = make_loss_sums(config, Tabular(process), process)
    words = jnp.asarray(list(np.ndindex(joint.shape)), jnp.int32)

    def one(logits, key):
        x = words[jax.random.choice(key, len(words), (rows,), p=jnp.asarray(joint.ravel(), jnp.float32))]
        batch = {"x": x, "index": jnp.arange(rows)}

        def loss(logits):
            loss, bound, tokens = sums(logits, batch, jax.random.fold_in(key, 1))
            return loss, bound / tokens * S

        return jax.grad(loss, has_aux=True)(logits)

    return jax.jit(lambda logits, keys: jax.lax.map(functools.partial(one, logits), keys))


def slopes(case, table, batches=160):
    """(mean gradient of a step over its standard error [Z, S, V], 0 where it has none; the bound and its error)."""
    keys = jax.random.split(jax.random.key(0), batches)
    found = stepper(case)(jnp.log(jnp.asarray(table, jnp.float32) + 1e-30), keys)
    slope, bound = (np.asarray(a, float) for a in found)
    often = (slope != 0).mean(0) > 0.5  # else nothing is known of the error
    error = slope.std(0) / batches**0.5
    return np.where(often, slope.mean(0) / np.where(often, error, 1), 0), bound.mean(), bound.std() / batches**0.5


@pytest.mark.parametrize("case", [pytest.param("K=1", marks=pytest.mark.slow), "K=2",
                                  pytest.param("K=2, xi=.7", marks=pytest.mark.slow)])
def test_the_best_answer_is_the_mean_of_what_could_have_stood_there(case):
    """No gradient of a step at the enumerated optimum, where masks and clusters say what is best for the bound; and the
    bound of that network, estimated by the rows without drafts, is the entropy. With other answers at words (as if a
    text had one draft at most) these have gradients, and masks and clusters still have none."""
    toy, _, joint, _, table, _ = optimum(case)
    level = toy.level[toy.sequences(S)]
    scores, bound, error = slopes(case, table)
    for k in range(toy.K + 1):
        found = scores[level == k][scores[level == k] != 0]
        assert found.size > scores[level == k].size / 2
        assert np.abs(found).max() < 4.5 and np.sqrt(np.mean(found**2)) < 1.3
    assert bound == pytest.approx(entropy(joint), abs=4 * error) and error < 0.1 * entropy(joint)
    scores, *_ = slopes(case, np.where((level == 0)[..., None], optimum(case, one=True)[4], table))
    assert np.abs(scores[level == 0]).max() > 8 and np.abs(scores[level > 0]).max() < 4.5


def test_a_single_draft_is_answered_without_a_look_at_it():
    """p(x_i | the others) to 1e-12, and with clusters p(x_i | the others, its cluster) where that was on show; where
    other words may be drafts as well the own one tells of them."""
    for case, own in (("K=1", lambda toy, a: 0), ("K=2", lambda toy, a: toy.anc[1][a])):
        toy, _, _, p, table, _ = optimum(case, one=True)
        at = lambda *z: np.ravel_multi_index(z, (toy.N,) * S)  # noqa: B023, E731
        many = optimum(case)[4]
        pairs = [(a, b, c) for a in range(toy.V) for b in range(toy.V) for c in range(toy.V)
                 if own(toy, a) == own(toy, b)]
        for a, b, c in pairs:
            np.testing.assert_allclose(table[at(a, c), 0], table[at(b, c), 0], atol=1e-12)
            if case == "K=1":
                np.testing.assert_allclose(table[at(a, c), 0], p[at(toy.mask, c), 0], atol=1e-12)
        assert max(np.abs(many[at(a, c), 0] - many[at(b, c), 0]).max() for a, b, c in pairs) > 0.01


@pytest.mark.parametrize("head", ["flat", "factorised"])
def test_a_correction_is_asked_at_the_level_of_what_is_shown(head):
    """-log f of the word, of its cluster, of that one's, by sums of a softmax; nothing of what z shows goes in."""
    hierarchy = Hierarchy.from_parents([[0, 1, 2, 0, 2], [0, 1, 1]])
    network, process = build(settings(model__head=head), hierarchy)
    head = network.head
    params = jax.tree.map(lambda a: jax.random.normal(jax.random.key(2), a.shape), head.init(jax.random.key(0), 16))
    h, x = jax.random.normal(jax.random.key(1), (9, 16)), jnp.array([4, 0, 2] * 3)
    z = jnp.array([0, 3, 2, 5, 7, 6, 8, 9, 8])
    f = np.exp(head.predict(params, h).log_probs())
    for of, word, state, cost in zip(f, x, z, correction(process, head.predict(params, h), x, z), strict=True):
        level = int(hierarchy.level_of(state))
        anc = hierarchy.anc[level]
        assert cost == pytest.approx(-np.log(of[anc == anc[word]].sum()), rel=1e-4)


@pytest.mark.parametrize("changes", [dict(), pytest.param(dict(model__head="factorised", train__objective="count"),
                                                          marks=pytest.mark.slow)])
def test_rows_are_drafted_each_on_their_own(changes):
    """Parts of a batch add up to it, loss, bound and gradient; prompts stay what they are."""
    config = settings(train__draft_share=0.6, **changes)
    network, process = build(config, Hierarchy.from_parents([np.arange(40) % 4]))
    params = network.init_params(jax.random.key(0), SEQ)
    x = jax.random.randint(jax.random.key(1), (ROWS, SEQ), 0, 40)
    batch = {"x": x, "index": jnp.arange(ROWS), "score": jnp.tile(jnp.arange(SEQ) > 2, (ROWS, 1))}

    def loss(params, batch):
        loss, bound, tokens = make_loss_sums(config, network, process)(params, batch, jax.random.key(2))
        return loss, (bound, tokens)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    whole = run(params, batch)
    parts = [run(params, jax.tree.map(lambda a, i=i: a[i::2], batch)) for i in range(2)]
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a, b + c, rtol=2e-4, atol=2e-4), whole, *parts)
    assert float(whole[0][0]) > 0 and float(optax.tree.norm(whole[1])) > 0


def test_drafts_are_drawn_without_dropout(monkeypatch):
    """As the sampler draws them; the pass that learns from them has it."""
    config = settings(train__draft_share=0.5, model__dropout=0.3)
    network, process = build(config, Hierarchy.from_parents([np.arange(40) % 4]))
    calls, hidden = [], type(network).hidden

    def seen(self, params, z, t, segment=None, dropout=None, clean=None):
        calls.append(dropout is not None)
        return hidden(self, params, z, t, segment, dropout, clean)

    monkeypatch.setattr(type(network), "hidden", seen)
    batch = {"x": jnp.zeros((ROWS, SEQ), jnp.int32), "index": jnp.arange(ROWS)}
    jax.eval_shape(lambda key: make_loss_sums(config, network, process)(network.init_params(key, SEQ), batch, key),
                   jax.random.key(0))
    assert calls == [False, True]


@pytest.mark.parametrize("changes, words", [
    (dict(train__draft_share=1.0), "train.draft_share=1.0: must lie in"),
    (dict(diffusion__process="sedd", hierarchy__clusters=(1,)), "diffusion.process='sedd': train.draft_share=0.5"),
    (dict(model__block=4, model__time_conditioning=False), "model.block=4: train.draft_share=0.5"),
    (dict(diffusion__channel=1.0), "diffusion.channel=1.0: train.draft_share=0.5"),
    (dict(train__objective="energy", train__init_from="base"), "train.objective='energy': has a loss of its own")])
def test_what_does_not_go_with_drafts_is_one_line(changes, words):
    with pytest.raises(ConfigError) as error:
        settings(**{"train__draft_share": 0.5, **changes})
    assert words in str(error.value) and "\n" not in str(error.value)
