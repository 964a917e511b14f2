"""Rollouts and policy gradients: states from what was recorded, and gradients by enumeration of all trajectories."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from test_sampler import MDLM, THREE, TWO, make

from hdlm_jax.config import ConfigError, GenerateConfig, TuneConfig
from hdlm_jax.decoding import loop, presets
from hdlm_jax.diffusion.draws import fold
from hdlm_jax.models import order
from hdlm_jax.models.heads import FlatHead
from hdlm_jax.tuning import record
from hdlm_jax.tuning.update import OBJECTIVES, Gradients, chosen_calls, crossing_nodes
from tools import toy_surrogates


def network_of(process, seed=0, scale=2.0):
    """z, t -> logits that depend on all states of a row (a function of nothing else, so that replayed states tell)."""
    table = scale * np.random.default_rng(seed).standard_normal((process.num_states, process.vocab_size))

    def denoise(z, t):
        near = jnp.asarray(table, jnp.float32)[z]
        return near + jnp.sum(jnp.roll(near, 1, axis=-1), axis=1, keepdims=True) + t[:, None, None]

    return denoise


@pytest.mark.parametrize("shape, method, options", [
    (MDLM, "max_prob", ""), (TWO, "ancestral", ""), (TWO, "low_confidence", "block=3"), (TWO, "rcr", "to=cluster"),
    *(pytest.param(*p, marks=pytest.mark.slow) for p in (
        (THREE, "max_prob", "straight=true"), (TWO, "ass", "draw=sample"), (THREE, "ancestral", ""),
        (MDLM, "first_hitting", ""), (THREE, "first_hitting", "reveals=2"), (THREE, "dcolt", ""),
        (TWO, "fast_dllm", "draw=sample threshold=.4 threshold_cluster=.4 block=2"), (THREE, "entropy", ""),
        (TWO, "any_order", ""), (TWO, "margin", "block=3"), (TWO, "eoser", "draw=sample"), (MDLM, "remdm", ""),
        (THREE, "p2", ""), (TWO, "saber", "draw=sample")))])
def test_replay_rebuilds_every_frame(shape, method, options):
    """All states of the film from (x, fell), at K = 1, 2, 3, or as they were kept where draws are thrown away; the
    times told, and the level of each drop."""
    rates = (1.0, 0.7, 1.5)[: len(shape["parents"]) + 1]
    toy, process = make(shape, rates)
    rows, length, bound = 6, 5, 5 * toy.K
    found = presets.make(method, options, 4)
    draws = record.throws_away(found.policy)
    assert draws == (method in ("low_confidence", "rcr", "p2", "remdm", "saber"))
    policy = dataclasses.replace(found.policy, choose=record.Recorded(found.policy.choose, bound, draws))
    start = np.full((rows, length), toy.mask, np.int32)
    start[1, 2], start[2] = 1, [0, toy.mask, 2, toy.mask, 1]  # given tokens
    tools = {"order": lambda p, view: jnp.cos(jnp.arange(1.0, length + 1)[None] * view.level)}

    @jax.jit
    def run(key, z):
        inner = loop.loop_of(network_of(process), process, policy, z.shape, presets.numbers(found),
                             loop.Sampling(frames=bound, tools=tools))
        _, s, _ = inner.run(*inner.begin(key, z))
        kept = (s.memory.get(name) for name in ("turn", "seen", "drawn"))
        rollout = record.Rollout(s.z, s.memory["fell"], s.memory["told"], s.call, *kept)
        every = jax.vmap(lambda c: record.replay(process, rollout, c))(jnp.arange(bound))
        return rollout, every, inner.record(s).stats(s.film, s.call)

    rollout, every, film = jax.tree.map(np.asarray, run(jax.random.key(3), jnp.asarray(start)))
    assert (film["call"] == np.arange(bound + 1).clip(max=rollout.calls.max())).all()  # every = 1: a frame a call
    assert (rollout.fell[start != toy.mask] == -1).all() and (rollout.calls >= 1).all()
    thrown = 0
    for b, calls in enumerate(rollout.calls):
        np.testing.assert_array_equal(every.z[:calls, b], film["z"][b, :calls])
        after, new = every.after[:calls, b], film["z"][b, 1 : calls + 1]
        stays = (new != film["z"][b, :calls]) & (toy.level[new] < toy.level[film["z"][b, :calls]]) if draws else True
        if method in ("rcr", "p2", "saber"):  # a token may go down, and back to a cluster
            stays = stays & (toy.level[new] == toy.level[after])
        assert (np.where(stays, after, 0) == np.where(stays, new, 0)).all()
        thrown += (after != new).sum()
        open_ = (toy.level[every.z[:calls, b]] > 0).any(-1)  # the film tells no time of a text that is written
        np.testing.assert_allclose(every.t[:calls, b][open_], film["time"][b, :calls][open_], atol=1e-6)
        some = every.level > every.to
        assert (some[:calls, b].sum(-1) > 0).all() or method == "remdm"
        assert all(under(toy, x, s) for x, s in zip(every.x[:, b][some[:, b]], every.after[:, b][some[:, b]],
                                                    strict=True))
        assert not some[calls:, b].any()
        if every.turn is not None:
            for turns, taken in zip(every.turn[:calls, b], some[:calls, b], strict=True):
                assert sorted(turns[taken]) == list(range(taken.sum()))
    assert (thrown > 0) == draws


@pytest.mark.parametrize("method, options, more, words", [
    ("prophet", "draw=sample", {}, "writes the rest at once"), ("fast_dllm", "", {}, "add draw=sample"),
    ("low_confidence", "draw=argmax", {}, "add draw=sample"), ("freedave", "draw=sample", {}, "drafts"),
    ("cfg", "", {}, "guided"), ("quantised", "", {}, "rounds"), ("dual_cache", "draw=sample", {}, "keys and values"),
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

    def place(self, z):
        """The row of the table."""
        return jnp.sum(z * jnp.asarray(self.process.num_states ** np.arange(z.shape[1])[::-1])[None], axis=1)

    def hidden(self, params, z, t, segment=None):
        return params[self.place(z)]


def under(toy, u, s):
    """Whether state u is s, or lies below it."""
    return toy.level[u] <= toy.level[s] and toy.anc[toy.level[s]][next(
        x for x in range(toy.V) if toy.anc[toy.level[u]][x] == toy.node[u])] == toy.node[s]


@dataclasses.dataclass
class Way:
    """A rollout so far: its state, the call at which each token fell, the parts of its probability, what calls drew."""

    z: tuple
    fell: list
    share: float = 1.0
    factors: list = dataclasses.field(default_factory=list)  # (row of the table, position, state it became, it was)
    turns: list = dataclasses.field(default_factory=list)  # (row, levels, those left to choose from, the one chosen)
    seen: list = dataclasses.field(default_factory=list)
    drawn: list = dataclasses.field(default_factory=list)


class HeadedTabular(Tabular):
    """The same beside a head for what is chosen: {"table", "order"} or {"table", "block_lengths"}."""

    def hidden(self, params, z, t, segment=None):
        return super().hidden(params["table"], z, t)


class Enumerated:
    """All rollouts of a table of logits in plain numpy, and `prob` of another table.

    choice: "blind", one level a call, each open position as likely; "max_prob", as many of the surest as an even
    schedule of `calls` asks for; "dcolt", as many in an order of the scores of `order`; "low_confidence", of all draws
    the likeliest; "ass", 2^k at call k, the likeliest but for those that would end the text (token 0).
    """

    def __init__(self, toy, choice, table, calls=0, temperature=1.0):
        self.toy, self.choice, self.calls, self.temperature = toy, choice, calls, temperature
        self.table, self.place, self.out = np.asarray(table), toy.N ** np.arange(S)[::-1], []
        self.under = np.array([[under(toy, x, s) for x in range(toy.V)] for s in range(toy.N)], float)
        self.below = {s: [u for u in range(toy.N) if toy.level[u] == toy.level[s] - 1 and under(toy, u, s)]
                      for s in range(toy.N)}
        self.walk(Way((toy.mask,) * S, [[-1] * toy.K] * S), 0)
        self.words, self.share = np.array([w.z for w in self.out], np.int32), np.array([w.share for w in self.out])
        self.fell = np.array([w.fell for w in self.out], np.int32)
        most = max(len(w.factors) for w in self.out)
        still = [(0, 0, 0, 0)]  # a factor of one
        self.factors = np.array([w.factors + still * (most - len(w.factors)) for w in self.out])  # [n, most, 4]
        self.turns = [w.turns for w in self.out]
        if choice == "low_confidence":
            self.seen, self.drawn = (np.array([getattr(w, name) for w in self.out], np.int32)
                                     for name in ("seen", "drawn"))

    def law(self, z):
        """Of each open position its states one level down and their probabilities, without temperature."""
        p = np.exp(self.table[np.dot(z, self.place)])
        return {i: {u: p[i] @ self.under[u] / (p[i] @ self.under[z[i]]) for u in self.below[z[i]]}
                for i in range(S) if self.toy.level[z[i]] > 0}

    def ways(self, z, call):
        """(share, positions in their order) of the choices, before any draw."""
        law = self.law(z)
        many = -(-sum(int(self.toy.level[s]) for s in z) // max(self.calls - call, 1))
        best = lambda score, many: sorted(law, key=lambda i: (-round(score[i] * 2**14), i))[:many]  # noqa: E731
        top = {i: max(each.values()) for i, each in law.items()}
        if self.choice == "blind":
            return [(1 / len(law), [i]) for i in law]
        if self.choice == "dcolt" and many < len(law):
            return [(1.0, list(some)) for some in itertools.permutations(law, many)]
        if self.choice == "ass":
            g = 0.01 + 0.99 * (2 ** (call + 1) - 1) / 4
            ends = {i: max(each, key=each.get) == 0 for i, each in law.items()}
            return [(1.0, best({i: top[i] * (g if ends[i] else 1) for i in law}, 1 if call == 0 else S))]
        return [(1.0, sorted(best(top, many)))] if self.choice == "max_prob" else [(1.0, list(law))]

    def walk(self, way, call):
        level, z = self.toy.level, way.z
        if not any(level[s] for s in z):
            return self.out.append(way)
        at, open_, law = int(np.dot(z, self.place)), [i for i in range(S) if level[z[i]] > 0], self.law(z)
        for share, some in self.ways(z, call):
            turns = [(at, [level[s] for s in z], [i for i in open_ if i not in some[:j]], i)
                     for j, i in enumerate(some)] if self.choice == "dcolt" and len(some) < len(open_) else []
            for states in itertools.product(*(self.below[z[i]] for i in some)):
                new, fell = dict(zip(some, states, strict=True)), [list(f) for f in way.fell]
                more = [(at, i, state, z[i]) for i, state in new.items()]
                drawn = tuple(new.get(i, s) for i, s in enumerate(z))
                if self.choice == "low_confidence":
                    many = -(-sum(int(level[s]) for s in z) // (self.calls - call))
                    some_ = sorted(some, key=lambda i: (-round(law[i][new[i]] * 2**14), i))[:many]  # noqa: B023
                    new = {i: new[i] for i in some_}
                for i in new:
                    fell[i][level[z[i]] - 1] = call
                self.walk(Way(tuple(new.get(i, s) for i, s in enumerate(z)), fell, way.share * share,
                              way.factors + more, way.turns + turns, way.seen + [z], way.drawn + [drawn]), call + 1)
        return None

    def prob(self, table, order=None):
        """float64 [n], with gradients; order: parameters of a head."""
        at, i, new, was = np.moveaxis(self.factors, -1, 0)
        p = jax.nn.softmax(table[at, i] / self.temperature, axis=-1)
        out = self.share * jnp.prod(jnp.sum(p * self.under[new], -1) / jnp.sum(p * self.under[was], -1), axis=1)
        if order is None:
            return out
        which = [(n, *turn) for n, turns in enumerate(self.turns) for turn in turns]
        at, level = np.array([turn[1] for turn in which]), np.array([turn[2] for turn in which])
        inner = table[at] @ order["kernel"] + order["level"][level] + order["bias"][None, None]
        score = jnp.exp(jax.nn.gelu(inner) @ order["out"])  # [turns, S]
        left = np.array([[i in turn[3] for i in range(S)] for turn in which])
        chosen = score[np.arange(len(which)), [turn[4] for turn in which]] / jnp.sum(score * left, axis=1)
        return out * jnp.exp(jax.ops.segment_sum(jnp.log(chosen), np.array([turn[0] for turn in which]), len(out)))


def rows_of(words, fell, advantage):
    calls = fell.max((1, 2)) + 1
    told = jnp.zeros((len(fell), S * fell.shape[2]), jnp.float32)
    return {"x": jnp.asarray(words), "fell": jnp.asarray(fell), "told": told,
            "calls": jnp.asarray(calls, jnp.int32), "advantage": advantage, "index": jnp.arange(len(words))}


def small(shape):
    """(oracle, process, table of logits, reward of each text) of S tokens."""
    toy, process = make(shape, (1.0,) * (1 + len(shape["parents"])))
    rng = np.random.default_rng(4)
    table = jnp.asarray(rng.normal(0, 1.0, (toy.N**S, S, toy.V)))
    return toy, process, table, rng.random((toy.V,) * S)


def cosine(a, b):
    return float(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b))


def summed(process, temperature=1.0, **tune):
    """Function (rows, table, old, reference, key) -> gradients of the library, summed over rows."""
    made = Gradients(TuneConfig(objective="score", task="permutations", **tune), temperature, Tabular(process), process)
    return jax.jit(lambda rows, table, old=None, reference=None, key=0: made(
        table, old, reference, rows, jax.random.key(key))[1])


@pytest.mark.parametrize("shape, choice, calls, temperature", [
    (ONE, "blind", 3, 1.0), (ONE, "max_prob", 2, 0.7), (PAIR, "max_prob", 3, 1.0), (ONE, "ass", 0, 1.0),
    (ONE, "low_confidence", 2, 0.7), pytest.param(PAIR, "low_confidence", 2, 1.0, marks=pytest.mark.slow),
    pytest.param(PAIR, "blind", 6, 1.0, marks=pytest.mark.slow)])
def test_score_is_the_gradient_of_the_mean_reward(shape, choice, calls, temperature):
    """Mean over all rollouts of advantage times the score, against the derivative of E[R]; a constant reward gives
    zero; and one call of T, times T, has the same mean."""
    with jax.enable_x64(True):
        toy, process, table, reward = small(shape)
        ways = Enumerated(toy, choice, table, calls, temperature)
        prob, worth = ways.prob(table), reward[tuple(ways.words.T)]
        assert prob.dtype == jnp.float64 and abs(float(prob.sum()) - 1) < 1e-12
        wanted = np.asarray(jax.grad(lambda table: jnp.sum(ways.prob(table) * worth))(table))
        gradient, rows = summed(process, temperature), rows_of(ways.words, ways.fell, prob * worth)
        centred = prob * (worth - jnp.sum(prob * worth))
        if choice == "low_confidence":
            kept = -np.asarray(gradient(rows | {"advantage": centred}, table))
            rows |= {"seen": jnp.asarray(ways.seen), "drawn": jnp.asarray(ways.drawn)}
        found = -np.asarray(gradient(rows, table))  # the loss falls as the reward rises
        assert np.abs(wanted).max() > 1e-3
        np.testing.assert_allclose(found, wanted, atol=1e-8)
        assert np.abs(np.asarray(gradient(rows | {"advantage": prob}, table))).max() < 1e-8
        if choice == "low_confidence" and toy.K == 1:
            assert 0.88 < cosine(kept, wanted) < 0.89  # what releases score, without the draws thrown away
            texts = reward[tuple(np.moveaxis(ways.drawn, -1, 0))]  # [n, calls]: each call's is judged
            before = np.pad(texts[:, :-1], ((0, 0), (1, 0)))
            each = prob[:, None] * (worth[:, None] - before)
            np.testing.assert_allclose(-np.asarray(gradient(rows | {"advantage": each}, table)), wanted, atol=1e-8)
        if choice == "max_prob" and toy.K == 1:  # CJ-GRPO's mean over the tokens of a call, then over calls
            many = (ways.fell == np.arange(calls)).sum(1)
            each = centred[:, None] / many / calls
            assert 0.95 < cosine(-np.asarray(gradient(rows | {"advantage": each}, table)), wanted) < 0.96
        if choice == "blind" and toy.K == 1:  # each row three times, with each of its calls once
            order = np.asarray(chosen_calls(fold(jnp.broadcast_to(jax.random.key(0), (60,)), jnp.arange(60)),
                                            jnp.full(60, 3), 3))
            assert {tuple(row) for row in order} == set(itertools.permutations(range(3)))


@pytest.mark.parametrize("shape, calls", [(ONE, 2), pytest.param(PAIR, 3, marks=pytest.mark.slow)])
def test_both_parts_of_a_drawn_order_are_trained(shape, calls):
    """DCoLT: gradients of the table, which the order sees as well, and of the order's own head."""
    with jax.enable_x64(True):
        toy, process, table, reward = small(shape)
        head = order.init(jax.random.key(2), toy.V, toy.K) | {"out": jax.random.normal(jax.random.key(3), (64,))}
        params = {"table": table, "order": jax.tree.map(lambda a: a.astype(jnp.float64), head)}
        ways = Enumerated(toy, "dcolt", table, calls)
        prob, worth = ways.prob(**params), reward[tuple(ways.words.T)]
        assert abs(float(prob.sum()) - 1) < 1e-12
        wanted = jax.grad(lambda params: jnp.sum(ways.prob(**params) * worth))(params)
        made = Gradients(TuneConfig(objective="score", task="permutations"), 1.0, HeadedTabular(process), process)
        turn = np.zeros(ways.fell.shape, np.int32)
        for n, turns in enumerate(ways.turns):
            for _, level, left, i in turns:
                turn[n, i, level[i] - 1] = S - len(left)
        rows = rows_of(ways.words, ways.fell, prob * worth) | {"turn": jnp.asarray(turn)}
        cost = sum(np.asarray(made.nats(params, made.views(rows, jax.random.key(0), jnp.int32(call)))).sum(1)
                   for call in range(ways.fell.max() + 1))  # a token left at level 2 takes one more
        np.testing.assert_allclose(cost, -np.log(np.asarray(prob)), atol=1e-5)  # in ratios and divergences as well
        gradient = jax.jit(lambda rows: made(params, None, None, rows, jax.random.key(0))[1])
        found, still = gradient(rows), gradient(rows | {"advantage": prob})
        for name, part in {"table": wanted["table"], **wanted["order"]}.items():
            got, none = (part_of["table"] if name == "table" else part_of["order"][name] for part_of in (found, still))
            assert np.abs(part).max() > 1e-3 or name == "time", name
            np.testing.assert_allclose(-np.asarray(got), np.asarray(part), atol=1e-8, err_msg=name)
            assert np.abs(np.asarray(none)).max() < 1e-8, name


def test_orders_are_drawn_by_plackett_luce():
    """Probabilities of all orders of n of 4 open tokens sum to one, whatever closed ones score; the sampler's first
    two of four come as often, 4.5 standard errors."""
    score = np.array([[0.7, 30.0, -1.2, 0.1, 1.5]])
    level = np.array([[1, 0, 2, 1, 1]])
    with jax.enable_x64(True):
        for n in (1, 2, 3, 4):
            orders = list(itertools.permutations([0, 2, 3, 4], n))
            turn, to = np.zeros((len(orders), 5), int), np.repeat(level, len(orders), 0)
            for row, some in enumerate(orders):
                turn[row, list(some)], to[row, list(some)] = range(n), 0
            cost = order.nats(*(jnp.asarray(np.broadcast_to(a, to.shape)) for a in (score, level, to, turn)))
            assert (np.asarray(cost)[to == level] == 0).all()
            total = np.exp(-np.asarray(cost).sum(1)).sum()  # of all four there is nothing to choose
            assert total == pytest.approx(1 if n < 4 else len(orders), abs=1e-12)
    toy, process = make(MDLM, (1.0,))
    method, rows, own = presets.make("dcolt", "", 2), 6000, score[:, [0, 2, 3, 4]]

    @jax.jit
    def turns(key):
        policy = dataclasses.replace(method.policy, choose=record.Recorded(method.policy.choose, 4, False))
        tools = {"order": lambda p, view: jnp.broadcast_to(jnp.asarray(own, jnp.float32), view.z.shape)}
        inner = loop.loop_of(network_of(process), process, policy, (rows, 4), presets.numbers(method),
                             loop.Sampling(tools=tools))
        _, s, _ = inner.run(*inner.begin(key, jnp.full((rows, 4), toy.mask)))
        return s.memory["turn"][..., 0], s.memory["fell"][..., 0]

    turn, fell = map(np.asarray, turns(jax.random.key(0)))
    assert ((fell == 0).sum(1) == 2).all()
    weight = np.exp(own[0])
    for i, j in itertools.permutations(range(4), 2):
        p = weight[i] / weight.sum() * weight[j] / (weight.sum() - weight[i])
        share = np.mean((fell[:, i] == 0) & (turn[:, i] == 0) & (fell[:, j] == 0) & (turn[:, j] == 1))
        assert abs(share - p) < 4.5 * np.sqrt(p * (1 - p) / rows)


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
            rollout = record.Rollout(*(rows[name] for name in ("x", "fell", "told", "calls")))
            z, _, level, to, _, _, t, _ = record.replay(process, rollout, jnp.full(len(words), call))
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


@pytest.mark.parametrize("name, views, total, error", [("nodes", 0, 5, 0.3), ("elbo", 2, 5, 0.6), ("one_pass", 0, 5, 0),
                                                       ("coupled", 0, 7.5, 0.5)])
def test_surrogates_weigh_what_they_hide(name, views, total, error):
    """One level, five free tokens that cost a nat each: bounds sum to 5 in the mean, one pass to 5, and the half of an
    all-masked text and of one split in two to 7.5; each view's tokens share a weight over t, which the network is told.
    Given tokens are never priced, and hidden by one pass alone, with probability .15."""
    process, n = make(MDLM, (1.0,))[1], 400
    rows = {"x": jnp.zeros((n, 6), jnp.int32), "fell": jnp.zeros((n, 6, 1), jnp.int32).at[:, 0].set(-1),
            "advantage": jnp.zeros(n)}
    view, count = OBJECTIVES[name](process, views)
    keys, sums, hidden = fold(jnp.broadcast_to(jax.random.key(0), (n,)), jnp.arange(n)), 0.0, []
    for number in range(int(count(rows))):
        found = jax.tree.map(np.asarray, view(rows, keys, jnp.int32(number)))
        hidden.append(found.level > found.to)
        shown = found.z != process.mask_id
        np.testing.assert_array_equal(shown[:, 1:], ~hidden[-1][:, 1:])
        assert not hidden[-1][:, 0].any()
        assert np.mean(~shown[:, 0]) == pytest.approx(0.15, abs=0.06) if name == "one_pass" else shown[:, 0].all()
        share = np.where(hidden[-1], found.weight * found.t[:, None], np.nan)
        each = {"nodes": (5 / 18, 8 / 18, 5 / 18)[number], "elbo": 0.5, "one_pass": 1.0, "coupled": 0.5}[name]
        np.testing.assert_allclose(share[hidden[-1]], each, rtol=1e-5)
        sums += np.where(hidden[-1], found.weight, 0).sum(1).mean()
    assert sums == pytest.approx(total, abs=error + 1e-5)
    if name == "coupled":
        assert hidden[0][:, 1:].all() and (hidden[1] ^ hidden[2])[:, 1:].all() and 0.3 < hidden[1][:, 1:].mean() < 0.7


def explicit(process, table, rows, key, views, price):
    """Gradients of a loss written down, of the same views: price(D, weights, hidden), all [b, S, views]: a number."""
    view, count = OBJECTIVES[views[0]](process, views[1])
    keys, network = fold(jnp.broadcast_to(jax.random.key(key), (len(rows["x"]),)), rows["index"]), Tabular(process)
    each = [view(rows, keys, jnp.int32(n)) for n in range(int(count(rows)))]
    hidden = jnp.stack([v.to < v.level for v in each], axis=-1)
    weight = jnp.where(hidden, jnp.stack([v.weight for v in each], axis=-1), 0.0)

    def loss(table):
        nats = [-process.as_prediction(network.hidden(table, v.z, v.t)).log_within(rows["x"], 1) for v in each]
        return price(jnp.where(hidden, jnp.stack(nats, axis=-1), 0.0), weight, hidden)

    return np.asarray(jax.grad(loss)(table))


def texts_of(toy, many, seed):
    """Rows of random texts with advantages of both signs, and a table of logits."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, toy.V, (many, S)).astype(np.int32)
    rows = rows_of(words, np.zeros((many, S, 1), np.int32), jnp.asarray(rng.normal(0, 1, many)))
    return rows, *(jnp.asarray(rng.normal(0, 0.7, (toy.N**S, S, toy.V))) for _ in range(2))


def test_spg_prices_what_is_to_be_avoided_from_above():
    """Its gradient is that of A times the bound where A > 0, else of half the bound and half (1 / beta) log of the
    weighted mean of p ** beta over the views, each token by itself."""
    with jax.enable_x64(True):
        toy, process = make(ONE, (1.0,))
        rows, table, _ = texts_of(toy, 200, 7)
        made = Gradients(TuneConfig(objective="spg", task="permutations", views=3), 1.0, Tabular(process), process)
        (_, spent), found = made(table, None, table, rows, jax.random.key(2))

        def price(nats, weight, hidden):
            bound = jnp.sum(weight * nats, axis=(1, 2))
            mean = jnp.sum(weight * jnp.exp(-1.5 * nats), axis=2)
            upper = -jnp.sum(jnp.log(jnp.where(hidden.any(2), mean, 1.0)), axis=1) / 1.5
            a = rows["advantage"]
            return jnp.sum(a * jnp.where(a < 0, (bound + upper) / 2, bound))

        wanted = explicit(process, table, rows, 2, ("spg", 3), price)
        assert np.abs(wanted).max() > 0.1 and float(spent) > 0
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    made = Gradients(TuneConfig(objective="spg", task="permutations", updates=2), 1.0, Tabular(process), process)
    single = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.float64 else a, (rows, table))
    hard = single[0] | {"advantage": jnp.full(200, -20.0, jnp.float32)}  # tokens that no view hides weigh nothing
    (loss, _), grads = made(single[1], -single[1], single[1], hard, jax.random.key(2))
    assert np.isfinite(loss) and np.isfinite(grads).all() and np.abs(grads).max() > 1
    with pytest.raises(ConfigError, match="words and masks alone; choose elbo"):
        OBJECTIVES["spg"](make(PAIR, (1.0, 1.0))[1], 0)


@pytest.mark.parametrize("objective", ["nodes", pytest.param("coupled", marks=pytest.mark.slow)])
def test_a_ratio_of_texts_is_a_mean_over_their_tokens(objective):
    """GDPO's exp((bound_old - bound) / S), clipped, of surrogates that share their masks."""
    with jax.enable_x64(True):
        toy, process = make(ONE, (1.0,))
        rows, table, old = texts_of(toy, 200, 8)
        tune = TuneConfig(objective=objective, task="permutations", ratio="text", updates=2, clip=0.1)
        found = Gradients(tune, 1.0, Tabular(process), process)(table, old, table, rows, jax.random.key(3))[1]
        of_old = []
        explicit(process, old, rows, 3, (objective, 0), lambda nats, weight, hidden: of_old.append(
            jax.lax.stop_gradient(jnp.sum(weight * nats, axis=(1, 2)))) or jnp.sum(nats))

        def price(nats, weight, hidden):
            text, a = jnp.sum(weight * nats, axis=(1, 2)), rows["advantage"]
            ratio = jnp.exp((of_old[0] - text) / S)
            return -S * jnp.sum(jnp.minimum(ratio * a, jnp.clip(ratio, 0.9, 1.1) * a))  # omega is of the sum

        wanted = explicit(process, table, rows, 3, (objective, 0), price)
        free = explicit(process, table, rows, 3, (objective, 0), lambda nats, weight, hidden: -S * jnp.sum(
            rows["advantage"] * jnp.exp((of_old[0] - jnp.sum(weight * nats, axis=(1, 2))) / S)))
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
        assert np.abs(free - wanted).max() > 0.1 * np.abs(wanted).max()  # some were clipped


@pytest.mark.parametrize("length, error", [(2, 0), (3, 0), (4, 0), (5, 1e-3), (6, 1e-3)])
def test_nodes_are_exact_up_to_twice_as_many_tokens(length, error):
    """Of any costs D(i, what is masked): the mean of `nodes` with two nodes is the bound for S <= 4, and not beyond."""
    process = make(MDLM, (1.0,))[1]
    rows = {"x": jnp.zeros((64, length), jnp.int32), "fell": jnp.zeros((64, length, 1), jnp.int32),
            "advantage": jnp.ones(64)}
    keys = fold(jnp.broadcast_to(jax.random.key(0), (64,)), jnp.arange(64))
    view, count = OBJECTIVES["nodes"](process, 2)
    nodes = []  # (t, weight of a masked token times t)
    for number in range(int(count(rows))):
        found = jax.tree.map(lambda a: np.asarray(a, np.float64), view(rows, keys, jnp.int32(number)))
        nodes.append((found.t[0], (found.weight * found.t[:, None])[found.level > found.to][0]))
    masks = np.array(list(itertools.product((False, True), repeat=length)))[1:]
    costs = np.where(masks, np.random.default_rng(1).exponential(size=masks.shape), 0.0).sum(1)
    many = masks.sum(1)
    bound = sum(c * math.gamma(k) * math.gamma(length - k + 1) / math.gamma(length + 1)
                for c, k in zip(costs, many, strict=True))
    told = sum(share * np.sum(costs * t ** (many - 1) * (1 - t) ** (length - many)) for t, share in nodes)
    if error:
        assert abs(told - bound) > error * bound
    else:
        assert told == pytest.approx(bound, rel=1e-6)


@pytest.mark.parametrize("shape, rates, error", [
    (TWO, (1.0, 1.0), 0.01), *(pytest.param(*more, marks=pytest.mark.slow) for more in (
        (MDLM, (1.0,), 1e-9), (TWO, (0.25, 1.0), 0.03), (TWO, (2.0, 1.0), 1e-9), (THREE, (1.0,) * 3, 0.03)))])
def test_nodes_lie_evenly_in_crossings(shape, rates, error, monkeypatch):
    """Three nodes of `crossing_nodes` against the enumerated bound of networks by chance, two tokens: off by `error` of
    it at most, not at all of one level and of two at rates 2 : 1, where they lie evenly in t as well; elsewhere nodes
    in t are off at least three times as far. The views of `nodes` have these times and weights, token by token."""
    toy, process = make(shape, rates)
    rng, length, exact, told, in_t = np.random.default_rng(0), 2, oracle.quadrature, [], []
    tau, share = crossing_nodes(process.chain, 3)
    u, w = np.polynomial.legendre.leggauss(3)
    other = -np.log1p(-(1 + u) / 2), w / (1 - u)
    for _ in range(4):
        network = toy.force(rng.dirichlet(np.ones(toy.V), (len(toy.sequences(length)), length)), "within")
        monkeypatch.setattr(oracle, "quadrature", exact)
        bound = toy.nelbo(network)
        for rule, off in (((tau, share), told), (other, in_t)):
            monkeypatch.setattr(oracle, "quadrature", lambda *given, rule=rule: rule)
            off.append(np.abs(toy.nelbo(network) / bound - 1).max())
    assert max(told) < error and (error == 1e-9 or max(in_t) > 3 * max(told))

    x = jnp.asarray(rng.integers(0, toy.V, (50, 4)), jnp.int32)
    rows = {"x": x, "fell": jnp.zeros((50, 4, toy.K), jnp.int32), "advantage": jnp.ones(50)}
    view, count = OBJECTIVES["nodes"](process, 0)
    keys = fold(jnp.broadcast_to(jax.random.key(0), (50,)), jnp.arange(50))
    assert int(count(rows)) == 3
    for number in range(3):
        found = jax.tree.map(np.asarray, view(rows, keys, jnp.int32(number)))
        np.testing.assert_allclose(found.t, 1 - np.exp(-tau[number]), rtol=1e-5)
        of_level = np.concatenate([[0.0], oracle.level_weight(rates, tau[number])]) * share[number]
        np.testing.assert_allclose(found.weight, of_level[found.level], rtol=1e-4)


@pytest.mark.parametrize("name", ["elbo", "spg", *(pytest.param(name, marks=pytest.mark.slow) for name in (
    "nodes", "coupled", "one_pass"))])
def test_the_enumerated_surrogates_are_the_library_s(name):
    """tools/toy_surrogates.py's mean weight of each token under each masking, against 20,000 draws of the library's
    (SPG: of two views), within five standard errors."""
    process, many = make(ONE, (1.0,))[1], 20_000
    texts, table = toy_surrogates.TEXTS, toy_surrogates.network("sd 1", 0)
    pick = np.random.default_rng(0).integers(0, len(texts), many)
    advantage = np.where(np.arange(many) % 2, 1.0, -1.0).astype(np.float32)
    rows = rows_of(texts[pick].astype(np.int32), np.zeros((many, S, 1), np.int32), jnp.asarray(advantage))
    made = Gradients(TuneConfig(objective=name, task="permutations", views=int(name == "nodes")), 1.0, Tabular(process),
                     process)
    keys, params = fold(jnp.broadcast_to(jax.random.key(0), (many,)), rows["index"]), jnp.asarray(table, jnp.float32)
    whole, sums = made.whole(params, None, rows, keys), np.zeros((many, 8, S))
    for number in range(int(made.count(rows))):
        view = made.views(rows, keys, jnp.int32(number))
        hidden = np.asarray(view.to < view.level)
        omega = np.where(hidden, np.asarray(made.omega(params, None, params, view, whole)) * advantage[:, None], 0.0)
        np.add.at(sums, (np.arange(many), hidden @ np.array([4, 2, 1])), omega)
    nats = -np.asarray(jax.nn.log_softmax(jnp.asarray(table), axis=-1))[
        toy_surrogates.SHOWN[..., None], np.arange(S), texts[:, None]]
    for sign, wanted in zip((1.0, -1.0), toy_surrogates.weights(name, nats), strict=True):
        for text in (0, 13):
            mine = sums[(pick == text) & (advantage == sign)]
            error = mine.std(0, ddof=1) / np.sqrt(len(mine))
            assert (np.abs(mine.mean(0) - wanted[text]) <= 5 * error + 1e-6).all() and len(mine) > 200


def test_surrogates_are_not_the_gradient():
    """`score` is, for every sampler; the bound is where the network is consistent and its order is random, and points
    elsewhere by 45 degrees and more for the surest first; a constant reward moves all of them but where a consistent
    network writes one token a call."""
    for sampler in toy_surrogates.SAMPLERS:
        for kind in ("sd 1", "consistent"):
            told = toy_surrogates.trial(kind, sampler, 0)["rows"]
            assert told["score"]["cosine"] > 1 - 1e-9 and told["score"]["constant"] < 1e-9
            exact = (kind, sampler) == ("consistent", "random order")
            assert (told["elbo"]["cosine"] > 1 - 1e-9) == exact
            if "max_prob" in sampler:
                assert all(told[name]["cosine"] < 0.8 for name in toy_surrogates.SURROGATES)
            still = kind == "consistent" and "2 calls" not in sampler
            assert all((told[name]["constant"] < 1e-6) == still for name in ("elbo", "coupled", "one_pass"))
