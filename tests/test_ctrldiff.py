"""Block lengths that a head draws (CtrlDiff): the sampler's law, its gradient by enumeration, and what calls cost."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sampler import MDLM, TWO, make
from test_tuning import HeadedTabular

from hdlm_jax.config import TuneConfig, recipe, resolve
from hdlm_jax.data.tokenizers import make_tokenizer
from hdlm_jax.decoding import loop, presets
from hdlm_jax.models import block_lengths
from hdlm_jax.models.block_lengths import LENGTHS
from hdlm_jax.runs.tune import Prompts
from hdlm_jax.tuning import record
from hdlm_jax.tuning.update import Gradients


def head(width, levels, seed=0):
    """Parameters that prefer some lengths."""
    made = block_lengths.init(jax.random.key(seed), width, levels)
    return {"block_lengths": made | {"out": 0.2 * jax.random.normal(jax.random.key(seed + 1), made["out"].shape)}}


def test_probabilities_of_lengths_sum_to_one_over_those_that_are_needed():
    """At every number of open tokens: a length is closed where a shorter one takes all that is left."""
    left = np.arange(1, 41)
    open_ = np.arange(40)[None] < left[:, None]
    hidden = np.random.default_rng(0).normal(size=(40, 40, 8))
    score = block_lengths.scores(head(8, 1), jnp.asarray(hidden), jnp.asarray(~open_), jnp.asarray(open_),
                                 jnp.linspace(0, 1, 40))
    p = np.exp(-np.stack([block_lengths.nats(score, jnp.full(40, i)) for i in range(4)], axis=1))
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-6)
    wanted = [1 + sum(left_ > length for length in LENGTHS[:-1]) for left_ in left]
    assert ((p > 0).sum(1) == wanted).all() and wanted[0] == 1 and wanted[-1] == 4
    assert (np.asarray(block_lengths.nats(score, jnp.full(40, -1))) == 0).all()


def rolled(process, tool, rows, length, calls=2, given=0):
    """A Rollout of `rows` rows of so many tokens, the first `given` of them a prompt, and hidden states of a state."""
    table = jnp.asarray(np.random.default_rng(1).normal(size=(process.num_states, process.vocab_size)), jnp.float32)
    method = presets.make("ctrldiff", f"calls={calls}")
    most = length * process.num_levels
    policy = dataclasses.replace(method.policy, choose=record.Recorded(method.policy.choose, most, False))

    @jax.jit
    def run(key):
        z = jnp.full((rows, length), process.mask_id).at[:, :given].set(1)
        inner = loop.loop_of(lambda z, t: table[z], process, policy, z.shape, presets.numbers(method),
                             loop.Sampling(tools={"block_lengths": tool}))
        _, s, _ = inner.run(*inner.begin(key, z))
        return record.Rollout(s.z, s.memory["fell"], s.memory["told"], s.call, length=s.memory["length"])

    return run(jax.random.key(0)), table


@pytest.mark.parametrize("shape", [MDLM, TWO])
def test_a_scripted_policy_covers_the_row(shape):
    """Lengths 8, 4, 16, then 4, 4, 1 of 37 tokens: blocks from left to right, each in its calls, at K = 1 and 2."""
    process = make(shape, (1.0,) * (1 + len(shape["parents"])))[1]
    script = {0: 1, 8: 0, 12: 2, 28: 0, 32: 0, 36: 0}
    index = jnp.asarray([script.get(i, 3) for i in range(37)])

    def tool(_, view):
        return 50 * jax.nn.one_hot(index[jnp.sum(view.free & (view.level == 0), axis=1)], 4)

    found, _ = rolled(process, tool, 3, 38, given=1)
    found = jax.tree.map(np.asarray, found)
    assert (process.level_of(found.x) == 0).all() and (found.fell[:, 0] == -1).all()
    edges, k = [*script, 37], process.num_levels
    for row in range(3):
        begin = 0
        for a, b in itertools.pairwise(edges):
            calls = sorted(set(found.fell[row, 1 + a : 1 + b].ravel()))
            assert calls[0] == begin and calls == list(range(begin, calls[-1] + 1))
            assert len(calls) == min((b - a) * k, 2)
            assert LENGTHS[found.length[row, begin]] == max(b - a, 4) and (found.length[row, begin + 1 : begin + len(
                calls)] == -1).all()
            begin += len(calls)
        assert found.calls[row] == begin and (found.length[row, begin:] == -1).all()


@pytest.mark.parametrize("shape", [MDLM, TWO])
def test_lengths_come_as_often_as_they_are_scored(shape):
    """Counts of all lengths drawn in all calls of rollouts, against the sum of their probabilities at replayed states:
    4.5 standard errors."""
    process = make(shape, (1.0,) * (1 + len(shape["parents"])))[1]
    params, levels = head(process.vocab_size, process.num_levels), process.num_levels
    table = jnp.asarray(np.random.default_rng(1).normal(size=(process.num_states, process.vocab_size)), jnp.float32)

    def tool(_, view):
        written = view.level == 0
        return block_lengths.scores(params, table[view.z], written, ~written, view.t)

    found, same = rolled(process, tool, 500, 38, calls=1, given=1)
    assert (same == table).all()

    @jax.jit
    def law(call):
        at = record.replay(process, found, call)
        written = at.level == 0
        return at.length, jax.nn.softmax(block_lengths.scores(params, table[at.z], written, ~written, at.t), axis=-1)

    count = expected = variance = 0
    for call in range(int(found.calls.max())):
        drawn, p = (np.asarray(a, np.float64) for a in law(jnp.int32(call)))
        due = drawn >= 0
        assert due.any() or levels > 1
        count = count + (drawn[due, None] == np.arange(4)).sum(0)
        expected, variance = expected + p[due].sum(0), variance + (p * (1 - p))[due].sum(0)
    assert variance.min() > 30 and (np.abs(count - expected) < 4.5 * np.sqrt(variance)).all()


# ---- the gradient, by enumeration ------------------------------------------------------------------------------------

GIVEN, FREE = 1, 5
S = GIVEN + FREE


def enumerated(process, toy):
    """All rollouts in two ways to cut five tokens, four and one or all at once, a level of a whole block in a call, and
    every text: (texts [n, S], fell [n, S, K], index of the first length [n]), and function params -> float64 [n]."""
    texts = np.array([(1, *x) for x in itertools.product(range(toy.V), repeat=FREE)], np.int32)
    above = np.stack([np.asarray(record.shown(process, jnp.asarray(texts), jnp.full(texts.shape, k)))
                      for k in range(toy.K + 1)])  # [K + 1, n, S]
    words, fell, steps = [], [], []
    for blocks in ([range(1, 5), range(5, 6)], [range(1, 6)]):
        level, when, call, parts = np.where(np.arange(S) < GIVEN, 0, toy.K), np.full((S, toy.K), -1), 0, []
        for block in blocks:
            for k in range(toy.K, 0, -1):
                z = np.take_along_axis(above, np.broadcast_to(level, texts.shape)[None], axis=0)[0]
                parts.append((z, list(block), k))
                level[list(block)], when[list(block), k - 1] = k - 1, call
                call += 1
        words.append(texts)
        fell.append(np.broadcast_to(when, (len(texts), *when.shape)))
        steps.append(parts)
    under = jnp.asarray([[float(above[toy.level[s]][list(texts[:, 1]).index(x), 1] == s) if toy.level[s] else
                          float(s == x) for x in range(toy.V)] for s in range(toy.N)])
    network = HeadedTabular(process)

    def prob(params):
        first = jnp.asarray(steps[0][0][0])  # the prompt and five masks
        h, p = network.hidden(params, first[:1], None)[0], params["block_lengths"]
        inner = h[:GIVEN].mean(0) @ p["written"] + h[GIVEN:].mean(0) @ p["open"] + p["time"] * told[0] + p["bias"]
        lengths = jax.nn.softmax((jax.nn.gelu(inner) @ p["out"])[:2])  # 4 or 8; 16 and 32 are not needed
        out = []
        for index, parts in enumerate(steps):
            share = jnp.full(len(texts), lengths[index])
            for z, block, k in parts:
                law = jax.nn.softmax(params["table"][network.place(z)], axis=-1)  # [n, S, V]
                now, then = (jnp.sum(law * under[a], axis=-1) for a in (above[k - 1], above[k]))
                share = share * jnp.prod((now / then)[:, np.array(block)], axis=1)
            out.append(share)
        return jnp.concatenate(out)

    told = np.array([0.7])
    index = np.repeat([0, 1], len(texts))
    return np.concatenate(words), np.concatenate(fell).astype(np.int32), index, prob, told


@pytest.mark.parametrize("shape", [dict(parents=[], vocab_size=2), pytest.param(dict(parents=[[0, 1, 0]]),
                                                                               marks=pytest.mark.slow)])
def test_score_is_the_gradient_of_quality_less_cost(shape):
    """Mean over all rollouts of advantage times the score against the derivative of E[quality - cost calls]: table and
    head, 1e-8; a constant reward gives zero."""
    with jax.enable_x64(True):
        toy, process = make(shape, (1.0,) * (1 + len(shape["parents"])))
        rng = np.random.default_rng(3)
        params = {"table": jnp.asarray(rng.normal(size=(toy.N**S, S, toy.V))), **head(toy.V, toy.K)}
        params = jax.tree.map(lambda a: a.astype(jnp.float64), params)
        words, fell, index, prob, told = enumerated(process, toy)
        calls, p = fell.max((1, 2)) + 1, prob(params)
        assert set(calls) == {toy.K, 2 * toy.K} and abs(float(p.sum()) - 1) < 1e-12
        worth = rng.random((toy.V,) * S)[tuple(words.T)] - 0.2 * calls
        wanted = jax.grad(lambda params: jnp.sum(prob(params) * worth))(params)
        length = np.full((len(words), FREE * toy.K), -1, np.int32)
        length[:, 0] = index
        length[index == 0, toy.K] = 0  # of one token that is left: no other length is needed
        rows = {"x": jnp.asarray(words), "fell": jnp.asarray(fell), "calls": jnp.asarray(calls, jnp.int32),
                "told": jnp.full((len(words), FREE * toy.K), told[0]), "length": jnp.asarray(length),
                "advantage": p * worth, "index": jnp.arange(len(words))}
        made = Gradients(TuneConfig(objective="score", task="repeats", cost=0.2), 1.0, HeadedTabular(process), process)
        gradient = jax.jit(lambda rows: made(params, None, None, rows, jax.random.key(0))[1])
        cost = sum(np.asarray(made.nats(params, made.views(rows, jax.random.key(0), jnp.int32(call)))).sum(1)
                   for call in range(2 * toy.K))
        np.testing.assert_allclose(cost, -np.log(np.asarray(p)), atol=2e-5)  # in ratios and divergences as well
        found, still = gradient(rows), gradient(rows | {"advantage": p})
        for (path, want), got, none in zip(jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(found),
                                           jax.tree.leaves(still), strict=True):
            assert np.abs(want).max() > 1e-4, path
            np.testing.assert_allclose(-np.asarray(got), np.asarray(want), atol=1e-8, err_msg=str(path))
            assert np.abs(np.asarray(none)).max() < 1e-8, path


def test_calls_are_taken_off_the_reward():
    c = recipe("repeats", "ctrldiff")
    c.tune.cost, c.train.init_from = 0.05, "somewhere"  # no run is opened
    prompts = Prompts(resolve(c), make_tokenizer("bytes"), 257)
    examples = prompts.examples(0, 48)[:1] * 2
    x = prompts.canvas(examples)
    answer = prompts.tokenizer.encode(examples[0].answer)
    x[:, -1 - len(answer) : -1], x[:, -1] = answer, prompts.tokenizer.eot
    x[1, -2] = ord("x")
    reward, found = prompts.judged(x, examples, np.array([4, 8]))
    np.testing.assert_allclose(reward, [0.8, -0.4], atol=1e-6)
    assert found["solved"] == 0.5 and found["reward"] == pytest.approx(0.2)
