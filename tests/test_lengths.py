"""Canvases that grow: DAEDAL, by itself and in the loop, against plain Python."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_canvas import clusters, processed

from hdlm_jax.decoding import choose, lengths, loop
from hdlm_jax.decoding.policy import Policy

NUMBERS = {"eos": 5, "maximum": 99, "eos_grow": 0.5, "eos_stop": 0.9, "low": 0.1}


def view_of(process, z, length, **given):
    """The part of a View that Daedal looks at."""
    z = jnp.asarray(z, jnp.int32)
    rows, places = z.shape
    level = process.level_of(z)
    length = jnp.asarray(length, jnp.int32)
    active = jnp.arange(places)[None] < length[:, None]
    base = dict(z=z, level=level, length=length, active=active, free=active, block=jnp.zeros(z.shape, jnp.int32),
                current=jnp.zeros(rows, jnp.int32),
                numbers=NUMBERS, memory={lengths.PHASE: jnp.zeros(rows, jnp.int32)}, process=process)
    return types.SimpleNamespace(**base | given)


def test_eos_confidence_by_hand():
    says = np.array([[1, 1, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], bool)
    p = np.tile(np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], np.float32), (3, 1))
    got = lengths.eos_confidence(jnp.asarray(says), jnp.asarray(p), 3)
    np.testing.assert_allclose(got, [(0.4 + 0.6 + 0.8) / 3, 0, (0.4 + 0.5 + 0.6) / 3], rtol=1e-6)
    few = lengths.eos_confidence(jnp.asarray(says), jnp.asarray(p), 8)
    np.testing.assert_allclose(few, [2.7 / 8, 0, 3.9 / 8], rtol=1e-6)


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(-1, 11), st.integers(1, 9)), min_size=4, max_size=4))
@settings(max_examples=60)
def test_insertion_is_a_list_s(cases):
    places = 24
    length, at, many = (np.array(c, np.int32) for c in zip(*cases, strict=True))
    at = np.minimum(at, length - 1)
    src = lengths.insertion(jnp.asarray(at), jnp.asarray(many), places)
    z = np.arange(len(cases) * places).reshape(-1, places)
    moved = np.take_along_axis(z, np.asarray(src), axis=1)
    for row, (n, i, e) in enumerate(zip(length, at, many, strict=True)):
        old = z[row, :n].tolist()
        want = old if i < 0 else old[:i] + [old[i]] * e + old[i + 1 :]
        assert moved[row, : len(want)].tolist() == want[:places]


def test_a_row_grows_until_it_expects_the_end():
    """DAEDAL's first phase, an exact trace: by E at a time, never over the maximum, never again once it stopped."""
    process = processed(clusters(6, ()))
    rule, numbers = lengths.Daedal(expand=4, window=4), NUMBERS | {"maximum": 14}
    length, seen = jnp.array([3, 3, 14, 3]), []
    memory = rule.memory(types.SimpleNamespace(z=jnp.zeros((4, 16))))
    stops = np.array([3, 9, 99, 99])  # lengths from which on the last four tokens say EOS
    z = np.full((4, 16), process.hierarchy.mask_id)

    @jax.jit
    def turn(length, memory, top):
        view = view_of(process, z, length, top=top, log_top=jnp.full((4, 16), math.log(0.75)), memory=memory,
                       numbers=numbers)
        return rule(view, jnp.zeros((4, 16), bool)), rule.remember(view, view.z, None)

    for call in range(5):
        ends = (np.asarray(length) >= stops) & (call != 1)  # in call 1 nobody expects an end: too late for row 0
        last = np.arange(16)[None] >= np.asarray(length)[:, None] - 4
        top = np.where(ends[:, None] & last, 5, 0)
        (new, src, inserted, hold), memory = turn(length, memory, jnp.asarray(top))
        np.testing.assert_array_equal(src, np.tile(np.arange(16), (4, 1)))
        j = np.arange(16)[None]
        np.testing.assert_array_equal(inserted, (j >= np.asarray(length)[:, None]) & (j < np.asarray(new)[:, None]))
        np.testing.assert_array_equal(hold, new > length)
        length = new
        seen.append([int(n) for n in new])
    # three tokens cannot fill a window of four: 3 * .75 / 4 = .56; row 1 grows at 3 and 7; row 3 runs into the maximum
    assert seen == [[3, 7, 14, 7], [3, 11, 14, 11], [3, 11, 14, 14], [3, 11, 14, 14], [3, 11, 14, 14]]


class PlainDaedal:
    """The paper's loop for one row in plain Python: lists, one row, levels written out.

    tops, ps: [calls, S] what the network says at each place in each call: EOS or not, and how sure.
    """

    def __init__(self, rule, numbers, parents, high, block, prompt, length):
        self.rule, self.n, self.high, self.block = rule, numbers, high, block
        self.top_level, self.prompt = len(parents) + 1, prompt
        self.levels, self.words = [0] * prompt + [self.top_level] * length, ["p"] * prompt + [None] * length
        self.growing = True

    def call(self, says, p):
        size, free = len(self.levels), range(self.prompt, len(self.levels))
        if not any(self.levels):
            return
        found = []
        for i in reversed(free):
            if len(found) == self.rule.window:
                break
            if self.levels[i] == 0 and self.words[i] == "eos":
                found.append(1.0)
            elif self.levels[i] > 0 and says[i]:
                found.append(p[i])
        e = sum(found) / self.rule.window
        if self.growing and e < self.n["eos_grow"] and size < self.n["maximum"]:
            more = min(self.rule.expand, self.n["maximum"] - size)
            self.levels += [self.top_level] * more
            self.words += [None] * more
            return
        self.growing = False
        first = min(i for i in free if self.levels[i] > 0)
        block = (first - self.prompt) // self.block
        here = [i for i in free if (i - self.prompt) // self.block == block and self.levels[i] > 0]
        chosen = [i for i in here if p[i] > self.high] or [max(here, key=lambda i: p[i])]
        low = [i for i in here if p[i] < self.n["low"] and self.levels[i] == self.top_level and i not in chosen]
        for i in chosen:
            self.levels[i] -= 1
            if self.levels[i] == 0:
                self.words[i] = "eos" if says[i] else "word"
        if low and e < self.n["eos_stop"] and size < self.n["maximum"]:
            i = min(low, key=lambda i: p[i])
            many = min(self.rule.expand, self.n["maximum"] - size + 1)
            self.levels[i : i + 1] = [self.top_level] * many
            self.words[i : i + 1] = [None] * many


@pytest.mark.parametrize("sizes", [(4,), *(pytest.param(s, marks=pytest.mark.slow) for s in ((), (6, 2)))])
def test_lengths_are_those_of_the_paper_s_loop(sizes):
    """Both phases against plain Python, call by call, for networks that say anything; each row by itself."""
    words, eos, high, rows, places, prompt, block = 12, 11, 0.9, 8, 40, 2, 6
    process = processed(clusters(words, sizes, seed=1))
    h = process.hierarchy
    # EOS has a line of its own symbols; another word's line has none of them
    other = next(w for w in range(words) if all(h.anc[k][w] != h.anc[k][eos] for k in range(h.num_levels)))
    symbols = {says: np.array([h.offsets[k] + h.anc[k][w] for k in range(h.num_levels)])
               for says, w in ((True, eos), (False, other))}
    rule = lengths.Daedal(expand=5, window=4)
    numbers = NUMBERS | {"low": 0.2, "eos": eos, "maximum": 35}
    rng = np.random.default_rng(12)
    calls = 150
    says = rng.random((calls, rows, places)) < np.linspace(0.2, 0.5, rows)[:, None]
    p = rng.random((calls, rows, places)) ** np.array([1, 0.5, 0.25, 0.1] * 2)[:, None]  # from unsure to sure rows
    p = np.where(says, 0.6 + 0.35 * p, p).astype(np.float32)
    plain = [PlainDaedal(rule, numbers, sizes, high, block, prompt, 6) for _ in range(rows)]

    def turn(z, length, memory, says, p):
        active = jnp.arange(places)[None] < length[:, None]
        given = jnp.broadcast_to(jnp.arange(places)[None] < prompt, z.shape)
        level = process.level_of(z)
        below = jnp.maximum(level - 1, 0)
        top = jnp.where(says, jnp.asarray(symbols[True])[below], jnp.asarray(symbols[False])[below])
        number = jnp.where(given, -1, (jnp.arange(places)[None] - prompt) // block)
        left = active & ~given & (level > 0)
        current = jnp.min(jnp.where(left, number, 99), axis=1)
        wanted = left & (number == current[:, None])
        view = view_of(process, z, length, free=active & ~given, top=top, block=number, current=current,
                       log_top=jnp.where(left, jnp.log(p), -jnp.inf), memory=memory, numbers=numbers)
        best = jnp.arange(places)[None] == jnp.argmax(jnp.where(wanted, p, -1), axis=1)[:, None]
        sure = wanted & (p > high)
        drop = jnp.where(sure.any(axis=1, keepdims=True), sure, best & wanted)
        new, src, inserted, hold = rule(view, drop)
        drop &= ~hold[:, None]
        z = jnp.take_along_axis(jnp.where(drop, top, z), src, axis=1)
        z = jnp.where(inserted, h.mask_id, z)
        finished = ~left.any(axis=1)
        return z, jnp.where(finished, length, new), rule.remember(view, z, None)

    turn = jax.jit(turn)
    z = np.full((rows, places), h.mask_id)
    z[:, :prompt] = 0
    z, length, memory = jnp.asarray(z), jnp.full(rows, prompt + 6), {lengths.PHASE: jnp.zeros(rows, jnp.int32)}
    alone = [(z[3:4], length[3:4], {lengths.PHASE: jnp.zeros(1, jnp.int32)})]
    for call in range(calls):
        z, after, memory = turn(z, length, memory, says[call], p[call])
        assert (after >= length).all() and (after <= numbers["maximum"]).all()
        length = after
        alone.append(turn(*alone[-1], says[call, 3:4], p[call, 3:4]))
        now, sizes_now = np.asarray(z), np.asarray(length)
        for row, twin in enumerate(plain):
            twin.call(says[call, row], p[call, row])
            n = len(twin.levels)
            assert n == sizes_now[row], (call, row)
            np.testing.assert_array_equal(h.level_of(now[row, :n]), twin.levels)
            np.testing.assert_array_equal(now[row, prompt:n] == eos, [w == "eos" for w in twin.words[prompt:]])
    assert not any(any(twin.levels) for twin in plain)  # it ends
    np.testing.assert_array_equal(alone[-1][0][0], z[3])
    assert len(set(np.asarray(length).tolist())) >= 3 and (length > prompt + 6).any()


def test_what_is_decided_is_not_taken_apart():
    """K = 2: the least sure token shows a cluster already; the least sure mask is taken, unless it is written now."""
    process = processed(clusters(6, (3,), seed=2))
    h = process.hierarchy
    z = np.full((2, 12), h.mask_id)
    z[0, 1] = h.offsets[1]
    z[1, 1:] = 0  # one mask is left in row 1: unsure, but written in this call
    written = jnp.zeros((2, 12), bool).at[1, 0].set(True)
    p = np.tile(np.array([0.05, 0.01, 0.3, 0.06, *[1e-3] * 8]), (2, 1))
    rule = lengths.Daedal(expand=3, window=4)
    view = view_of(process, z, [4, 4], top=jnp.zeros((2, 12), jnp.int32), log_top=jnp.log(jnp.asarray(p)),
                   memory={lengths.PHASE: jnp.ones(2, jnp.int32)})
    new, src, inserted, hold = jax.jit(lambda: rule(view, written))()
    assert new.tolist() == [6, 4] and src[0, :6].tolist() == [0, 0, 0, 1, 2, 3] and not hold.any()
    assert np.flatnonzero(inserted[0]).tolist() == [0, 1, 2] and not inserted[1].any()
    np.testing.assert_array_equal(src[1], np.arange(12))


class Scripted:
    """A denoiser that says of each row and call what was written down: EOS or another word, and how sure."""

    forwards = 1

    def __init__(self, says, p, eos, other, words):
        self.tables, self.pair, self.words = (jnp.asarray(says), jnp.asarray(p)), (eos, other), words

    def start(self, rows):
        return ()

    def __call__(self, cache, rows):
        says, p = (a[rows.call, rows.extra["row"]] for a in self.tables)
        word = jnp.where(says, *self.pair)
        rest = (1 - p) / (self.words - 1)
        onto = jax.nn.one_hot(word, self.words) > 0
        return jnp.log(jnp.where(onto, p[..., None], rest[..., None])), cache


def test_the_loop_grows_canvases_as_the_paper_does():
    """DAEDAL through the sampler, words and lengths, against plain Python; what is given in front stays."""
    words, eos, other, rows, places, prompt, block = 64, 63, 7, 6, 40, 2, 6
    process = processed(clusters(words, ()))
    numbers = NUMBERS | {"low": 0.2, "eos": eos, "maximum": 35, "threshold": 0.9, "threshold_cluster": 0.9}
    rng = np.random.default_rng(3)
    calls = 120
    says = rng.random((calls, rows, places)) < np.linspace(0.2, 0.5, rows)[:, None]
    p = np.clip(rng.random((calls, rows, places)) ** np.array([1, 0.5, 0.25] * 2)[:, None], 0.03, 0.999)
    p = np.where(says, 0.6 + 0.35 * p, p).astype(np.float32)
    rule = lengths.Daedal(expand=5, window=4)
    policy = Policy(choose.Scored(choose.Confidence(), choose.Above()), "argmax", block=block, lengths=rule)
    z = np.full((rows, places), process.hierarchy.mask_id, np.int32)
    z[:, :prompt] = 5
    denoise = Scripted(says, p, eos, other, words)
    run = jax.jit(lambda z: loop.sample(jax.random.key(0), denoise, process, z, policy, numbers,
                                        length=prompt + 6, extra={"row": jnp.arange(rows)}, how=loop.Sampling(rows=4)))
    tokens, stats = (jax.tree.map(np.asarray, a) for a in run(jnp.asarray(z)))
    for row in range(rows):
        twin = PlainDaedal(rule, numbers, (), 0.9, block, prompt, 6)
        made = 0
        while any(twin.levels):
            twin.call(says[made, row], p[made, row])
            made += 1
        assert stats["length"][row] == len(twin.levels) and stats["row_forwards"][row] == made
        want = [5] * prompt + [{"eos": eos, "word": other}[w] for w in twin.words[prompt:]]
        np.testing.assert_array_equal(tokens[row, : len(want)], want)
    assert len(set(stats["length"].tolist())) > 2
