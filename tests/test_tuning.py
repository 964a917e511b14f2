"""Rollouts and policy gradients: states from what was recorded, and gradients by enumeration of all trajectories."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sampler import MDLM, THREE, TWO, make

from hdlm_jax.config import ConfigError, GenerateConfig, TuneConfig
from hdlm_jax.decoding import loop, presets
from hdlm_jax.diffusion.draws import fold
from hdlm_jax.models.heads import FlatHead
from hdlm_jax.tuning import record
from hdlm_jax.tuning.update import OBJECTIVES, Gradients, chosen_calls


def network_of(process, seed=0, scale=2.0):
    """z, t -> logits that depend on all states of a row (a function of nothing else, so that replayed states tell)."""
    table = scale * np.random.default_rng(seed).standard_normal((process.num_states, process.vocab_size))

    def denoise(z, t):
        near = jnp.asarray(table, jnp.float32)[z]
        return near + jnp.sum(jnp.roll(near, 1, axis=-1), axis=1, keepdims=True) + t[:, None, None]

    return denoise


@pytest.mark.parametrize("shape, method, options", [
    (MDLM, "max_prob", ""), (TWO, "ancestral", ""), (THREE, "first_hitting", "reveals=2"),
    *(pytest.param(*p, marks=pytest.mark.slow) for p in (
        (THREE, "max_prob", "straight=true"), (TWO, "ass", "draw=sample"), (THREE, "ancestral", ""),
        (MDLM, "first_hitting", ""),
        (TWO, "fast_dllm", "draw=sample threshold=.4 threshold_cluster=.4 block=2"), (THREE, "entropy", ""),
        (TWO, "any_order", ""), (TWO, "margin", "block=3")))])
def test_replay_rebuilds_every_frame(shape, method, options):
    """All states of the film from (x, fell), at K = 1, 2, 3; the times told, and the level of each drop."""
    rates = (1.0, 0.7, 1.5)[: len(shape["parents"]) + 1]
    toy, process = make(shape, rates)
    rows, length, bound = 6, 5, 5 * toy.K
    found = presets.make(method, options, 4)
    policy = dataclasses.replace(found.policy, choose=record.Recorded(found.policy.choose))
    start = np.full((rows, length), toy.mask, np.int32)
    start[1, 2], start[2] = 1, [0, toy.mask, 2, toy.mask, 1]  # given tokens

    @jax.jit
    def run(key, z):
        inner = loop.loop_of(network_of(process), process, policy, z.shape, presets.numbers(found),
                             loop.Sampling(frames=bound))
        _, s, _ = inner.run(*inner.begin(key, z))
        rollout = record.Rollout(s.z, s.memory["fell"], s.memory["told"], s.call)
        every = jax.vmap(lambda c: record.replay(process, rollout, c))(jnp.arange(bound))
        return rollout, every, inner.record(s).stats(s.film, s.call)

    rollout, every, film = jax.tree.map(np.asarray, run(jax.random.key(3), jnp.asarray(start)))
    assert (film["call"] == np.arange(bound + 1).clip(max=rollout.calls.max())).all()  # every = 1: a frame a call
    assert (rollout.fell[start != toy.mask] == -1).all() and (rollout.calls >= 1).all()
    for b, calls in enumerate(rollout.calls):
        np.testing.assert_array_equal(every.z[:calls, b], film["z"][b, :calls])
        np.testing.assert_array_equal(every.after[:calls, b], film["z"][b, 1 : calls + 1])
        np.testing.assert_allclose(every.t[:calls, b], film["time"][b, :calls], atol=1e-6)
        assert ((every.level > every.to)[:calls, b].sum(-1) > 0).all()


@pytest.mark.parametrize("method, options, more, words", [
    ("low_confidence", "", {}, "thrown-away draws"), ("rcr", "", {}, "takes written tokens back"),
    ("prophet", "draw=sample", {}, "drafts, commits"), ("fast_dllm", "", {}, "add draw=sample"),
    ("cfg", "", {}, "own distribution"), ("dual_cache", "draw=sample", {}, "keys and values"),
    ("ancestral", "", {"top_p": 0.9}, "generate.top_p=0.9"), ("ancestral", "", {"temperature": 0.0}, "temperature=0.0"),
    ("ancestral", "", {"length": 3}, "generate.length=3")])
def test_what_has_no_written_law_is_refused(method, options, more, words):
    g = GenerateConfig(method=method, options=options, **more)
    with pytest.raises(ConfigError, match=words) as found:
        record.check_law(make(TWO, (1.0, 1.0))[1], g)
    assert "\n" not in str(found.value)


def test_processes_without_a_written_law_are_refused():
    for process in (make(TWO, (1.0, 1.0), 0.8)[1], make(TWO, (1.0, 1.0), 1.0, "none")[1]):
        with pytest.raises(ConfigError, match="xi=1"):
            record.check_law(process, GenerateConfig())


# ---- gradients, by enumeration ---------------------------------------------------------------------------------------

S = 3
ONE, PAIR = dict(parents=[], vocab_size=3), dict(parents=[[0, 1, 0]])


class Exact(FlatHead):
    """A flat head whose parameters are nothing: hidden states are the logits, in the precision they come in."""

    def logits(self, params, h):
        return h


@dataclasses.dataclass
class Tabular:
    """A network whose parameters are its logits in every state of a row: table [N ** S, S, V]."""

    process: object

    @property
    def head(self):
        return Exact(self.process.hierarchy)

    def head_params(self, params):
        return {"kernel": jnp.zeros(0), "bias": jnp.zeros(0)}

    def hidden(self, params, z, t, segment=None):
        place = self.process.num_states ** np.arange(S)[::-1]
        return params[jnp.sum(z * jnp.asarray(place)[None], axis=1)]


def under(toy, u, s):
    """Whether state u is s, or lies below it."""
    return toy.level[u] <= toy.level[s] and toy.anc[toy.level[s]][next(
        x for x in range(toy.V) if toy.anc[toy.level[u]][x] == toy.node[u])] == toy.node[s]


class Enumerated:
    """All rollouts of a table of logits in plain numpy: words, calls at which tokens fell; `prob` of another table.

    choice: "blind", one level a call, each open position as likely; "max_prob", as many of the surest as an even
    schedule of `calls` asks for.
    """

    def __init__(self, toy, choice, table, calls=0, temperature=1.0):
        self.toy, self.temperature = toy, temperature
        table, place, out = np.asarray(table), toy.N ** np.arange(S)[::-1], []
        self.under = np.array([[under(toy, x, s) for x in range(toy.V)] for s in range(toy.N)], float)
        below = {s: [u for u in range(toy.N) if toy.level[u] == toy.level[s] - 1 and under(toy, u, s)]
                 for s in range(toy.N)}

        def walk(z, fell, share, factors, call):
            open_ = [i for i in range(S) if toy.level[z[i]] > 0]
            if not open_:
                return out.append((z, fell, share, factors))
            at = int(np.dot(z, place))
            ways = [(1 / len(open_), [i]) for i in open_]
            if choice == "max_prob":  # by the law without temperature, as scores are
                p = np.exp(table[at])
                top = {i: max(p[i] @ self.under[u] for u in below[z[i]]) / (p[i] @ self.under[z[i]]) for i in open_}
                many = -(-sum(int(toy.level[s]) for s in z) // max(calls - call, 1))
                ways = [(1.0, sorted(open_, key=lambda i: (-round(top[i] * 2**14), i))[:many])]
            for part, some in ways:
                for states in itertools.product(*(below[z[i]] for i in some)):
                    new, when = list(z), [list(f) for f in fell]
                    for i, state in zip(some, states, strict=True):
                        new[i], when[i][toy.level[z[i]] - 1] = state, call
                    more = [(at, i, state, z[i]) for i, state in zip(some, states, strict=True)]
                    walk(tuple(new), when, share * part, factors + more, call + 1)

        walk((toy.mask,) * S, [[-1] * toy.K] * S, 1.0, [], 0)
        words, fell, share, factors = zip(*out, strict=True)
        self.words, self.fell, self.share = np.array(words, np.int32), np.array(fell, np.int32), np.array(share)
        self.factors = np.array(factors)  # [n, S K, 4]: row of the table, position, state it became, state it was

    def prob(self, table):
        """float64 [n], with gradients."""
        at, i, new, was = np.moveaxis(self.factors, -1, 0)
        p = jax.nn.softmax(table[at, i] / self.temperature, axis=-1)
        return self.share * jnp.prod(jnp.sum(p * self.under[new], -1) / jnp.sum(p * self.under[was], -1), axis=1)


def rows_of(words, fell, advantage):
    calls = fell.max((1, 2)) + 1
    return {"x": jnp.asarray(words), "fell": jnp.asarray(fell), "told": jnp.zeros(fell.shape, jnp.float32),
            "calls": jnp.asarray(calls, jnp.int32), "advantage": advantage, "index": jnp.arange(len(words))}


def summed(process, temperature=1.0, **tune):
    """Function (rows, table, old, reference, key) -> gradients of the library, summed over rows."""
    made = Gradients(TuneConfig(objective="score", task="permutations", **tune), temperature, Tabular(process), process)
    return jax.jit(lambda rows, table, old=None, reference=None, key=0: made(
        table, old, reference, rows, jax.random.key(key))[1])


@pytest.mark.parametrize("shape, choice, calls, temperature", [
    (ONE, "blind", 3, 1.0), (ONE, "max_prob", 2, 0.7), (PAIR, "max_prob", 3, 1.0),
    pytest.param(PAIR, "blind", 6, 1.0, marks=pytest.mark.slow)])
def test_score_is_the_gradient_of_the_mean_reward(shape, choice, calls, temperature):
    """Mean over all rollouts of advantage times the score, against the derivative of E[R]; a constant reward gives
    zero; and one call of T, times T, has the same mean."""
    with jax.enable_x64(True):
        toy, process = make(shape, (1.0,) * (1 + len(shape["parents"])))
        rng = np.random.default_rng(4)
        table = jnp.asarray(rng.normal(0, 1.0, (toy.N**S, S, toy.V)))
        reward = rng.random((toy.V,) * S)
        ways = Enumerated(toy, choice, table, calls, temperature)
        prob, worth = ways.prob(table), reward[tuple(ways.words.T)]
        assert prob.dtype == jnp.float64 and abs(float(prob.sum()) - 1) < 1e-12
        wanted = np.asarray(jax.grad(lambda table: jnp.sum(ways.prob(table) * worth))(table))
        gradient, rows = summed(process, temperature), rows_of(ways.words, ways.fell, prob * worth)
        found = -np.asarray(gradient(rows, table))  # the loss falls as the reward rises
        assert np.abs(wanted).max() > 1e-3
        np.testing.assert_allclose(found, wanted, atol=1e-8)
        assert np.abs(np.asarray(gradient(rows | {"advantage": prob}, table))).max() < 1e-8
        if choice == "blind" and toy.K == 1:  # each row three times, with each of its calls once
            order = np.asarray(chosen_calls(fold(jnp.broadcast_to(jax.random.key(0), (60,)), jnp.arange(60)),
                                            jnp.full(60, 3), 3))
            assert {tuple(row) for row in order} == set(itertools.permutations(range(3)))


def test_one_call_of_a_rollout_stands_for_all():
    """One of T calls, each as often as the others, times T: the mean over keys is the sum over calls."""
    toy, process = make(PAIR, (1.0, 1.0))
    rng = np.random.default_rng(5)
    table = jnp.asarray(rng.normal(0, 1.0, (toy.N**S, S, toy.V)), jnp.float32)
    words, fell = np.array([[0, 2, 1]], np.int32), np.array([[[3, 0], [5, 1], [4, 2]]], np.int32)
    whole = np.asarray(summed(process)(rows_of(words, fell, jnp.ones(1)), table))
    many = 3000
    rows = rows_of(np.repeat(words, many, 0), np.repeat(fell, many, 0), jnp.full(many, 1 / many))
    one, two = (np.asarray(summed(process, views=n)(rows, table)) for n in (1, 2))
    spread = 6 * np.abs(whole).max() / np.sqrt(many)  # six calls, all but one of them 0: the sd is below this
    assert np.abs(whole).max() > 0.3 and np.abs(one - whole).max() < 3 * spread > np.abs(two - whole).max()
    assert np.abs(one).sum() > 0 and not np.allclose(one, whole, atol=1e-6)


@pytest.mark.parametrize("ratio", ["call", "token"])
def test_clipped_ratios_and_the_reference_as_omega(ratio):
    """mu > 1: gradients with omega held still, against those of the clipped loss itself; and the divergence's own."""
    with jax.enable_x64(True):
        toy, process = make(PAIR, (1.0, 1.0))
        rng = np.random.default_rng(6)
        table, old, reference = (jnp.asarray(rng.normal(0, 0.4, (toy.N**S, S, toy.V))) for _ in range(3))
        ways = Enumerated(toy, "max_prob", old, 3)
        words, fell = ways.words, ways.fell
        advantage = jnp.asarray(rng.normal(0, 1, len(words)))
        rows, network = rows_of(words, fell, advantage), Tabular(process)

        def log_p(table, call):  # of what fell in a call: [B, S]
            z, _, level, to, t = record.replay(process, record.Rollout(
                *(rows[name] for name in record.Rollout._fields)), jnp.full(len(words), call))
            p = process.as_prediction(network.hidden(table, z, t))
            first, second = -p.log_within(rows["x"], 1), -p.log_within(rows["x"], 2)
            return -(jnp.where((level > 0) & (to < 1), first, 0.0) + jnp.where((level > 1) & (to < 2), second, 0.0))

        def loss(table):
            total = 0.0
            for call in range(fell.max() + 1):
                log_ratio = log_p(table, call) - log_p(old, call)
                log_ratio = log_ratio.sum(1, keepdims=True) if ratio == "call" else log_ratio
                r, a = jnp.exp(log_ratio), advantage[:, None]
                total -= jnp.sum(jnp.minimum(r * a, jnp.clip(r, 0.8, 1.2) * a))
                gap = log_p(table, call) - log_p(reference, call)
                total += 0.3 * jnp.sum(gap**2) / 2
            return total

        found = np.asarray(summed(process, ratio=ratio, kl=0.3)(rows, table, old, reference))
        wanted = np.asarray(jax.grad(loss)(table))
        np.testing.assert_allclose(found, wanted, atol=1e-6)
        free = np.asarray(summed(process, ratio=ratio, kl=0.3, clip=1e6)(rows, table, old, reference))
        assert np.abs(free - wanted).max() > 1e-2  # some ratios were clipped


def test_nodes_integrate_the_bound():
    """One level: weights at masks are share / t at the nodes of the rule, so that a cost of one nat a token sums to S
    in the mean; given tokens are never noised."""
    process = make(MDLM, (1.0,))[1]
    rows = {"x": jnp.zeros((400, 6), jnp.int32), "fell": jnp.zeros((400, 6, 1), jnp.int32).at[:, 0].set(-1)}
    view, count = OBJECTIVES["nodes"](process, 0)
    keys, total = fold(jnp.broadcast_to(jax.random.key(0), (400,)), jnp.arange(400)), 0.0
    for number in range(int(count(rows))):
        found = view(rows, keys, number)
        hidden = np.asarray(found.level > found.to)
        assert (np.asarray(found.z)[:, 0] == 0).all() and not hidden[:, 0].any() and hidden[:, 1:].any()
        share = float(found.weight[hidden][0] * found.t[0])
        assert share == pytest.approx((5 / 18, 8 / 18, 5 / 18)[number], rel=1e-5)
        total += np.where(hidden, np.asarray(found.weight), 0).sum(1).mean()
    assert total == pytest.approx(5, abs=0.3)
