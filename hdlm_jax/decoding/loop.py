"""The sampling loop of masked and hierarchical diffusion (docs/decoding.md).

Each call of the network advances every unfinished sequence by one step of its `Policy`:

    z --> network --> prediction --> look: likeliest state, entropy, ... of each token
    ^                                  |
    |                                choose: which tokens are unmasked, and to what level (mask -> cluster -> token)
    |                                  |
    |                                draw: a state of that level for each of them
    |                                  |
    +-------------------------------- revise: which tokens are remasked

Sequences do not depend on each other. The unfinished ones are gathered `rows` at a time, so a finished one costs
nothing. Thresholds are traced, so changing one does not recompile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hdlm_jax.decoding.policy import Cache, Denoiser, Drawn, Numbers, Policy, Rows, State, View, as_denoiser, view_of
from hdlm_jax.decoding.statistics import chunks, probability_of, statistics
from hdlm_jax.diffusion.draws import fold, row_keys, token_keys
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.levels import open_uniform
from hdlm_jax.diffusion.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How states are drawn, and how a loop runs.

    temperature, top_p: see HierarchicalProcess.reverse_step; traced or not.
    rows, tokens: how many are worked on at once; None: see `chunks`. They change no result.
    sync_trip_count: trip count of a loop that needs `count` iterations here; where devices that share the batch must
      keep step, the largest count of all (parallel.OverBatch). Changes no result.
    frames: at most so many states are recorded beside the start (see `Trajectory`). Changes no result.
    sure: the probability of each unmasking is kept in `State.sure`, as it is with frames. Changes no result.
    tools: functions that hooks call, by name.
    """

    temperature: float | jax.Array = 1.0
    top_p: float | jax.Array = 1.0
    rows: int | None = None
    tokens: int | None = None
    sync_trip_count: Callable = lambda count: count  # noqa: E731
    frames: int = 0
    sure: bool = False
    tools: Mapping[str, Callable] = dataclasses.field(default_factory=dict)


class Loop(NamedTuple):
    """What all calls share. rows, tokens: those of `how`, or what fills the device."""

    denoise: Denoiser
    process: HierarchicalProcess
    policy: Policy
    numbers: Numbers
    how: Sampling
    rows: int
    tokens: int

    # -- before the first call, and between calls ------------------------------------------------------------------

    def start(self, keys, z, given, length, extra) -> State:
        zero = jnp.zeros(len(z), jnp.int32)
        s = State(keys, z, z, given, length, jnp.zeros(z.shape, jnp.float32), zero, {}, extra, ())
        view = view_of(self.process, self.policy, self.numbers, s)
        for hook in self.policy.hooks:
            s.memory.update(hook.memory(view))
        return s._replace(film=self.record(s).start((z, s.sure, self.view(s).t)) if self.how.frames else ())

    def begin(self, key, z, given=None, length=None, extra=None) -> tuple[Cache, State]:
        """(cache, state) before the first call; arguments as those of `sample`."""
        batch, positions = z.shape
        length = jnp.broadcast_to(jnp.asarray(positions if length is None else length, jnp.int32), (batch,))
        given = self.process.level_of(z) == 0 if given is None else given
        s = self.start(row_keys(key, batch), z, given, length, extra or {})
        first = self.view(s)
        return self.denoise.start(first.rows(self.wanted(first))), s

    def run(self, cache: Cache, s: State, most: jax.Array | None = None) -> tuple[Cache, State, jax.Array]:
        """(cache, state, calls of the row that had most) when no row has anything left to do, or after `most` calls."""
        limit = self.limit(s)

        def anyone(s):
            return self.how.sync_trip_count(jnp.any(self.unfinished(s, limit)).astype(jnp.int32))

        def body(carry):
            cache, s, calls, _ = carry
            cache, s = self.call_rows(cache, s, self.unfinished(s, limit))
            return cache, s, calls + 1, anyone(s)

        def goes_on(carry):
            return carry[-1] > 0 if most is None else (carry[-1] > 0) & (carry[2] < most)

        cache, s, calls, _ = jax.lax.while_loop(goes_on, body, (cache, s, jnp.int32(0), anyone(s)))
        return cache, s, calls

    def sample(self, key, z, given=None, length=None, extra=None):
        """See `sample`, the function."""
        cache, s = self.begin(key, z, given, length, extra)
        _, s, calls = self.run(cache, s)
        passes = self.denoise.forwards * self.policy.width  # of a call: a whole number, or a share of one
        forwards = -(-s.call * passes.numerator // passes.denominator)
        stats = {"calls": calls, "row_forwards": forwards, "length": s.length}
        return s.z, stats | self.record(s).stats(s.film, s.call)

    def limit(self, s: State):
        """Calls that a row takes at most, those in which it grows counted."""
        grows = self.policy.lengths is not None  # such a row unmasks nothing in that call
        return self.bound(s) + s.z.shape[1] if grows else self.bound(s)

    def unfinished(self, s: State, limit):
        """bool [B]: rows with something left to write, or to take back, within `limit` calls."""
        inside = jnp.arange(s.z.shape[1])[None] < s.length[:, None]
        left = (self.process.level_of(s.z) > 0) | (~s.given & self.policy.choose.goes_on(self.numbers, s.call)[:, None])
        return jnp.any(left & inside, axis=1) & (s.call < limit)

    def call_rows(self, cache: Cache, s: State, busy) -> tuple[Cache, State]:
        """A call of the busy rows, bool [B], in groups of `rows`; the others stay as they are."""
        batch, rows = len(busy), self.rows

        def call(cache, s, keep):
            new_cache, new = self.call(cache, s)
            return tuple(jax.tree.map(lambda a, b, axis=axis: jnp.where(spread(keep, a, axis), a, b), *trees)
                         for axis, trees in ((1, (new_cache, cache)), (0, (new, s))))

        if rows == batch:  # one group: nothing to gather
            return call(cache, s, busy)
        order = jnp.argsort(~busy, stable=True)

        def group(i, carry):
            cache, s = carry
            begin = jnp.minimum(i * rows, batch - rows)
            at = jax.lax.dynamic_slice_in_dim(order, begin, rows)
            keep = busy[at] & (begin + jnp.arange(rows) >= i * rows)  # the last group overlaps the one before
            new_cache, new = call(jax.tree.map(lambda a: jnp.take(a, at, axis=1), cache),
                                  jax.tree.map(lambda a: a[at], s), keep)
            return (jax.tree.map(lambda a, b: a.at[:, at].set(b), cache, new_cache),
                    jax.tree.map(lambda a, b: a.at[at].set(b), s, new))

        return jax.lax.fori_loop(0, self.how.sync_trip_count((jnp.sum(busy) + rows - 1) // rows), group, (cache, s))

    def view(self, s: State) -> View:
        """What hooks see before the network is called."""
        view = view_of(self.process, self.policy, self.numbers, s)
        view = view._replace(stamp=self.policy.choose.stamp(view))
        key = fold(s.key, view.stamp)
        return view._replace(key=key, keys=token_keys(key, s.z.shape), t=self.policy.choose.time(view))

    def bound(self, s: State):
        """Calls that a row takes at most."""
        return self.policy.choose.bound(self.numbers, s.z.shape[1], self.process.num_levels)

    def record(self, s: State) -> Trajectory:
        return Trajectory(self.how.frames, self.bound(s))

    # -- parts of a call -------------------------------------------------------------------------------------------

    def wanted(self, view: View):
        """bool [b, S]: tokens whose prediction the policy may need."""
        if "own" in self.policy.needs or self.policy.commit is not None:
            return view.free
        return view.free & (view.level > 0) if self.policy.whole else view.open

    def ask(self, cache: Cache, rows: Rows):
        prediction, cache = self.denoise(cache, rows)
        return self.process.as_prediction(prediction), cache

    def at_wanted(self, find: Callable, wanted, arrays):
        """The arrays, a pytree of [b, S, ...], with find(index int32 [n] into b S) -> [n, ...] at wanted tokens."""
        flat = wanted.reshape(-1)
        size = min(self.tokens, flat.size)
        order = jnp.argsort(~flat, stable=True)

        def some(i, out):
            at = jax.lax.dynamic_slice(order, (i * size,), (size,))  # the last one may overlap the one before
            return jax.tree.map(lambda a, b: a.at[at].set(jnp.where(spread(flat[at], b), b, a[at])), out, find(at))

        start = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), arrays)
        out = jax.lax.fori_loop(0, self.how.sync_trip_count((jnp.sum(flat) + size - 1) // size), some, start)
        return jax.tree.map(lambda a: a.reshape(*wanted.shape, *a.shape[1:]), out)

    def look(self, view: View, prediction, wanted) -> dict[str, Any]:
        """The fields of a view that its policy needs of the prediction, at wanted tokens."""
        needs, top_k = self.policy.needs, self.policy.top_k
        if not needs and not top_k:
            return {}

        def find(at):
            return statistics(self.process, prediction.select(at), view.z.reshape(-1)[at], needs, top_k,
                              self.policy.choose.straight, self.policy.clusters)

        shapes = jax.eval_shape(find, jnp.zeros(min(self.tokens, wanted.size), jnp.int32))
        empty = {"top": view.z, "token": view.z, "ids": view.z[..., None], "entropy": jnp.inf}
        start = {name: jnp.broadcast_to(jnp.asarray(empty.get(name, -jnp.inf), a.dtype), (*wanted.shape, *a.shape[1:]))
                 for name, a in shapes.items()}
        return self.at_wanted(find, wanted, start)

    def draw(self, prediction, z, target, keys):
        """States of levels `target`, all arrays [n], drawn from the prediction at these tokens."""
        return self.process.reverse_step(keys, prediction, z, target, self.policy.clusters, self.how.temperature,
                                         self.how.top_p, self.how.sync_trip_count)

    def reverse_step(self, view: View, prediction, target) -> Drawn:
        """States after unmasking to levels `target` [b, S], drawn."""
        z, to, keys = (a.reshape(-1) for a in (view.z, target, view.keys))
        counts = self.how.frames > 0 or self.how.sure
        counts = counts or self.policy.order == "draw_then_choose" or "sure" in self.policy.needs

        def find(at):
            p = prediction.select(at)
            new = self.draw(p, z[at], to[at], keys[at])
            return new, probability_of(self.process, p, z[at], new, self.policy.clusters) if counts else sure[at]

        sure = jnp.zeros(z.shape, jnp.float32)
        return self.at_wanted(find, target < view.level, (view.z, sure.reshape(view.z.shape)))

    def likeliest(self, view: View, target) -> Drawn:
        """States after unmasking to levels `target`: the likeliest; from further up the likeliest token's ancestor."""
        out, sure = view.top, jnp.exp(view.log_top)
        if view.token is not None and not view.straight:
            far = target < view.level - 1
            for j in range(self.process.num_levels - 1):
                above = self.process.state_above(0, jnp.where(far, view.token, 0), j)
                out = jnp.where(far & (target == j), above, out)
            sure = jnp.where(far, jnp.exp(view.log_token), sure)
        return jnp.where(target < view.level, out, view.z), sure

    def write(self, view: View, prediction) -> tuple[jax.Array, ...]:
        """(states, probabilities, all states drawn): what the policy writes, given what it has seen."""
        policy = self.policy
        if policy.order == "draw_then_choose":
            if policy.draw == "argmax":
                drawn, sure = view.top, jnp.exp(view.log_top)
            else:
                below = 0 if view.straight else view.level - 1
                drawn, sure = self.reverse_step(view, prediction, jnp.where(view.open, below, view.level))
            view = view._replace(drawn=drawn, log_drawn=jnp.log(sure))
            return jnp.where(policy.choose.target(view) < view.level, drawn, view.z), sure, drawn
        target = policy.choose.target(view)
        if policy.draw == "argmax":
            z, sure = self.likeliest(view, target)
        elif isinstance(policy.draw, str):
            z, sure = self.reverse_step(view, prediction, target)
        else:
            z, sure = policy.draw(view, self, prediction, target)
        return z, sure, z

    def decide(self, view: View, prediction) -> tuple[jax.Array, ...]:
        """`write`, or all the rest where the policy commits; only free tokens change."""
        z, sure, drawn = self.write(view, prediction)
        if self.policy.commit is not None:
            rest = self.policy.commit(view)[:, None] & view.free & (view.level > 0)
            best = (view.top, view.log_top) if self.policy.commit.stages else (view.token, view.log_token)
            z, sure = jnp.where(rest, best[0], z), jnp.where(rest, jnp.exp(best[1]), sure)
        return jnp.where(view.free, z, view.z), sure, drawn

    def predict(self, cache: Cache, view: View):
        """(the view with its statistics, prediction, cache) after one call of the network."""
        policy = self.policy
        # where no prediction can change the choice, they are needed at the chosen tokens alone
        blind = not (policy.needs or policy.top_k or policy.whole)
        blind = blind and policy.order == "choose_then_draw"
        wanted = policy.choose.target(view) < view.level if blind else self.wanted(view)
        prediction, cache = self.ask(cache, view.rows(wanted))
        heads = {name: scores for name, scores in self.how.tools.items() if name in policy.needs}
        view = view._replace(**{name: scores(prediction, view) for name, scores in heads.items()})
        return view._replace(**self.look(view, prediction, wanted)), prediction, cache

    def call(self, cache: Cache, s: State) -> tuple[Cache, State]:
        """One call of every row here."""
        policy, process = self.policy, self.process
        view = self.view(s)
        memory = s.memory
        if policy.verify is not None:
            z, sure, memory, cache = policy.verify(self, cache, s)
        else:
            view, prediction, cache = self.predict(cache, view)
            z, sure, drawn = self.decide(view, prediction)
        length, source, inserted = s.length, None, None
        if policy.lengths is not None:
            length, source, inserted, hold = policy.lengths(view, process.level_of(z) < view.level)
            z = jnp.where(hold[:, None], view.z, z)
        below = process.level_of(z)
        unmasked = below < view.level
        view = view._replace(sure=jnp.where(unmasked, sure, s.sure))
        if policy.revise is not None:
            level = jnp.clip(policy.revise(view, z, unmasked), below, process.level_of(s.canvas))
            keep = view.free if policy.commit is None else view.free & ~policy.commit(view)[:, None]
            level = jnp.where(keep, level, below)
            z = remasked(process, z, s.canvas, level, view.keys if policy.revise.crosses else None)
        if policy.verify is None:
            view = view._replace(drawn=drawn)
            for hook in policy.hooks:
                memory = memory | hook.remember(view, z, unmasked)
        s = s._replace(z=z, length=length, sure=view.sure, call=s.call + 1, memory=memory)
        if source is not None:
            s = moved(process, s, source, inserted)
        if self.how.frames:
            after = self.view(s)
            left = jnp.any(after.free & (after.level > 0), axis=1)
            state = s.z, s.sure, jnp.where(left, after.t, 0.0)
            s = s._replace(film=self.record(s).expose(s.film, s.call - 1, state))
        return cache, s


def remasked(process, z, canvas, level, keys=None):
    """States z [b, S] at higher levels: the canvas's own where it is of that level, else the ancestor of what z shows.

    With keys [b, S] a vocabulary token goes to a cluster as the process corrupts it, for xi < 1 perhaps another one's.
    """
    here, top = process.level_of(z), process.level_of(canvas)
    first = jnp.asarray(process.ancestors(0, 1))[jnp.where(here == 0, z, 0)]
    if keys is not None and process.xi < 1:
        n1, flat = process.hierarchy.sizes[1], fold(keys, 9).reshape(-1)
        own = jax.vmap(open_uniform)(fold(flat, 0)).reshape(z.shape) < process.xi
        other = jax.vmap(lambda key: jax.random.randint(key, (), 0, n1 - 1))(fold(flat, 1)).reshape(z.shape)
        first = jnp.where(own, first, other + (other >= first))
    out = z
    for high in range(1, process.num_levels + 1):
        for low in range(high):
            above = process.state_above(max(low, 1), process.node_of(z, low) if low else first, high)
            out = jnp.where((level == high) & (here == low), above, out)
    return jnp.where((level > here) & (level == top), canvas, out)


def moved(process, s: State, source, inserted) -> State:
    """Every array [b, S, ...] of a state after an edit of its canvas; masks where something was inserted."""
    positions = s.z.shape[1]

    def move(a):
        if a.ndim < 2 or a.shape[1] != positions or jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            return a
        return jnp.take_along_axis(a, spread(source, a), axis=1)

    mask = process.hierarchy.mask_id
    z, canvas = (jnp.where(inserted, mask, move(a)) for a in (s.z, s.canvas))
    return s._replace(z=z, canvas=canvas, given=move(s.given) & ~inserted, sure=jnp.where(inserted, 0.0, move(s.sure)),
                      memory=jax.tree.map(move, s.memory), extra=jax.tree.map(move, s.extra))


def spread(a, like, axis: int = 0):
    """a with axes added so that it broadcasts against `like`, whose axes from `axis` on are a's."""
    return a.reshape((1,) * axis + a.shape + (1,) * (like.ndim - axis - a.ndim))


def sample(key, denoise: Denoiser | Callable, process: HierarchicalProcess, z, policy: Policy,
           numbers: Numbers | None = None, *, given=None, length=None, extra: Mapping[str, jax.Array] | None = None,
           how: Sampling = Sampling()):  # noqa: B008
    """Fill a canvas z int32 [B, S] by a policy, in one loop on the device.

    Args:
      key: one key (row b uses fold_in(key, b)) or keys [B]; results do not depend on a row's batch mates.
      denoise: function (z [b, S], t [b]) -> prediction (used through select(index) alone) or logits [b, S, V]; or a
        `Denoiser`, which may keep a cache.
      numbers: the policy's traced numbers. how: temperature, batching, recording.
      given: bool [B, S], tokens that stay; None: the vocabulary tokens of z. length: int32 [B] or a scalar, tokens of
        each row (behind them z stays); None: S. extra: arrays [B, ...] for hooks and denoisers.

    Returns:
      (states int32 [B, S], vocabulary tokens but behind a row's length; stats):
      calls int32: iterations of the loop, the calls of the row that has most; row_forwards int32 [B]: network passes of
      each row, a helper's not counted; length int32 [B]. With frames also call int32 [F+1], a row's calls at each
      frame; time float32 [B, F+1], its t; z int32 and confidence float32 [B, F+1, S], the states and the probability of
      each token's last unmasking (0 before the first).
    """
    return loop_of(denoise, process, policy, z.shape, numbers, how).sample(key, z, given, length, extra)


def loop_of(denoise: Denoiser | Callable, process: HierarchicalProcess, policy: Policy, shape: tuple[int, ...],
            numbers: Numbers | None = None, how: Sampling = Sampling()) -> Loop:  # noqa: B008
    """The loop of a canvas of that shape [B, S]; arguments as those of `sample`."""
    batch, positions = shape
    rows, tokens = chunks(positions)
    rows = min(how.rows or max(1, rows // policy.width), batch)
    return Loop(as_denoiser(denoise), process, policy, numbers or {}, how, rows, how.tokens or tokens)
