"""Sampling loop for masked and hierarchical diffusion (docs/decoding.md).

Each iteration runs the network once per unfinished sequence and lets a `Policy` choose which positions to unmask, how
to draw them, which to remask, and when to stop. Numeric thresholds are traced, so changing one does not recompile.

One turn of a sequence, whose tokens z are masks, clusters and words:

    z --> network --> prediction --> look: likeliest symbol, entropy, ... of each token
    ^                                  |
    |                                choose: which tokens drop, and to what level (mask -> cluster -> word)
    |                                  |
    |                                draw: a symbol of that level for each of them
    |                                  |
    +-------------------------------- revise: which tokens are raised again (remasked)

Sequences do not depend on each other. The unfinished ones are gathered `rows` at a time, so a finished one costs
nothing, and no forward pass is repeated for a sequence that has not changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from hdlm_jax.decoding.policy import Denoiser, Policy, Rows, State, Stateless, View, bare, unasked
from hdlm_jax.decoding.statistics import drop_probability, statistics, together
from hdlm_jax.diffusion.draws import fold, row_keys
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.levels import open_uniform
from hdlm_jax.diffusion.trajectory import Trajectory

Cache = Any  # a pytree of a denoiser's own; rows on axis `rows_axis` of every leaf


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How symbols are drawn, and how a loop runs.

    temperature, top_p: see HierarchicalProcess.reverse_step; traced or not.
    rows, drops: rows and tokens that are worked on at once; None: see `together`. They change no result.
    sync_trip_count: trip count of a loop that needs `count` iterations here; where devices that share the batch must
      keep step, the largest count of all (parallel.OverBatch). Changes no result.
    frames: F, at most so many states are recorded beside the start (see `Trajectory`). Changes no result.
    limit: stop rows after so many calls, finished or not, traced or not; None: when all is written.
    tools: functions that hooks call, by name.
    """

    temperature: float | jax.Array = 1.0
    top_p: float | jax.Array = 1.0
    rows: int | None = None
    drops: int | None = None
    sync_trip_count: Callable = lambda count: count  # noqa: E731
    frames: int = 0
    limit: int | jax.Array | None = None
    tools: Mapping[str, Callable] = dataclasses.field(default_factory=dict)


class Loop(NamedTuple):
    """What all turns share. rows, drops: those of `how`, or what fills the device."""

    denoise: Denoiser
    process: HierarchicalProcess
    policy: Policy
    numbers: Mapping[str, Any]
    how: Sampling
    rows: int
    drops: int

    # -- before the first turn, and between turns ------------------------------------------------------------------

    def start(self, keys, z, given, length, extra) -> State:
        """The state before the first turn."""
        batch, levels = len(z), self.process.num_levels
        never, zero = jnp.full((*z.shape, levels), -1), jnp.zeros(batch, jnp.int32)
        s = State(keys, z, z, given, length, jnp.zeros(z.shape, bool), jnp.zeros(z.shape, jnp.float32), never, zero,
                  zero, {}, extra, ())
        view = unasked(self.process, self.policy, self.numbers, s)
        memory: dict[str, jax.Array] = {}
        for hook in self.policy.hooks():
            memory |= hook.memory(view)
        s = s._replace(memory=memory)
        return s._replace(film=self.record(s).start((z, s.sure, self.view(s).t))) if self.how.frames else s

    def run(self, cache: Cache, s: State) -> tuple[State, jax.Array]:
        """(the state when no row has anything left to do, turns that took)."""
        limit = self.bound(s)
        if self.policy.lengths is not None:
            limit += s.z.shape[1]  # a row that grows drops nothing in that turn
        limit = limit if self.how.limit is None else jnp.minimum(limit, self.how.limit)

        def anyone(s):
            return self.how.sync_trip_count(jnp.any(self.live(s, limit)).astype(jnp.int32))

        def body(carry):
            cache, s, calls, _ = carry
            cache, s = self.sweep(cache, s, self.live(s, limit))
            return cache, s, calls + 1, anyone(s)

        start = cache, s, jnp.int32(0), anyone(s)
        _, s, calls, _ = jax.lax.while_loop(lambda carry: carry[-1] > 0, body, start)
        return s, calls

    def live(self, s: State, limit):
        """bool [B]: rows with something left to write, or to take back, within `limit` calls."""
        inside = jnp.arange(s.z.shape[1])[None] < s.length[:, None]
        left = (self.process.level_of(s.z) > 0) | (~s.given & self.policy.choose.goes_on(self.numbers, s.call)[:, None])
        return jnp.any(left & inside, axis=1) & (s.call < limit)

    def sweep(self, cache: Cache, s: State, busy) -> tuple[Cache, State]:
        """A turn of the busy rows, in groups of `rows`."""
        batch, rows, axis = len(busy), self.rows, self.denoise.rows_axis
        if rows == batch:  # one group: nothing to gather
            return self.turn_of(cache, s, busy)
        order = jnp.argsort(~busy, stable=True)

        def group(i, carry):
            cache, s = carry
            begin = jnp.minimum(i * rows, batch - rows)
            at = jax.lax.dynamic_slice_in_dim(order, begin, rows)
            keep = busy[at] & (begin + jnp.arange(rows) >= i * rows)  # the last group overlaps the one before
            new = self.turn_of(_rows_at(cache, at, axis), _rows_at(s, at, 0), keep)
            return _with_rows(cache, at, axis, new[0]), _with_rows(s, at, 0, new[1])

        return jax.lax.fori_loop(0, self.how.sync_trip_count((jnp.sum(busy) + rows - 1) // rows), group, (cache, s))

    def turn_of(self, cache: Cache, s: State, keep) -> tuple[Cache, State]:
        """A turn of the rows to `keep`, bool [b]; the others stay as they are."""
        new_cache, new = self.turn(cache, s)
        return _where(keep, new_cache, cache, self.denoise.rows_axis), _where(keep, new, s, 0)

    def view(self, s: State) -> View:
        """What policies see before the network is asked."""
        return bare(self.process, self.policy, self.numbers, s)

    def bound(self, s: State):
        """Turns that a row takes at most."""
        return self.policy.choose.bound(self.numbers, s.z.shape[1], self.process.num_levels)

    def record(self, s: State) -> Trajectory:
        return Trajectory(self.how.frames, self.bound(s))

    # -- parts of a turn -------------------------------------------------------------------------------------------

    def wanted(self, view: View):
        """Tokens that the network will be asked about: those that may drop, and all free ones to revise."""
        everything = "own" in self.policy.looks or self.policy.commit is not None
        if everything:
            return view.free
        return view.free & (view.level > 0) if any(hook.whole for hook in self.policy.hooks()) else view.open

    def in_pieces(self, work, wanted, carry):
        """carry = work(index [n], carry) over the wanted tokens [b, S], so many at a time; the last may overlap."""
        flat = wanted.reshape(-1)
        size = min(self.drops, flat.size)
        order = jnp.argsort(~flat, stable=True)

        def some(i, carry):
            return work(jax.lax.dynamic_slice_in_dim(order, i * size, size), carry)

        return jax.lax.fori_loop(0, self.how.sync_trip_count((jnp.sum(flat) + size - 1) // size), some, carry)

    def look(self, view: View, prediction, wanted) -> View:
        """The view with the statistics its policy asks for."""
        looks, top_k = self.policy.looks, self.policy.top_k
        if not looks and not top_k:
            return view
        straight, clusters = self.policy.choose.straight, self.policy.clusters
        flat, z = wanted.reshape(-1), view.z.reshape(-1)

        def of(at):
            p = self.process.as_prediction(prediction.select(at))
            return statistics(self.process, p, z[at], looks, top_k, straight, clusters)

        shapes = jax.eval_shape(of, jnp.zeros(min(self.drops, flat.size), jnp.int32))
        empty = {"top": z, "word": z, "ids": z, "entropy": jnp.inf}
        start = {}
        for name, a in shapes.items():
            fill = jnp.asarray(empty.get(name, -jnp.inf), a.dtype)
            fill = fill.reshape(*fill.shape, *(1,) * (a.ndim - fill.ndim))
            start[name] = jnp.broadcast_to(fill, (flat.size, *a.shape[1:]))

        def work(at, out):
            found = of(at)
            keep = {n: flat[at].reshape(-1, *(1,) * (a.ndim - 1)) for n, a in found.items()}
            return {n: out[n].at[at].set(jnp.where(keep[n], a, out[n][at])) for n, a in found.items()}

        out = self.in_pieces(work, wanted, start)
        return view._replace(**{n: a.reshape(*view.z.shape, *a.shape[1:]) for n, a in out.items()})

    def reverse_step(self, view: View, prediction, target):
        """Symbols [b, S] after the drops to `target`, drawn, and the probability of each drop."""
        target, keys = target.reshape(-1), view.keys.reshape(-1)
        sure = jnp.zeros(target.shape, jnp.float32)
        clusters, how = self.policy.clusters, self.how
        asked = how.frames > 0 or self.policy.order == "draw_then_choose" or "sure" in self.policy.looks

        def work(at, carry):  # the last ones overlap those before: a token that has dropped drops no more
            flat, sure = carry
            p = self.process.as_prediction(prediction.select(at))
            new = self.process.reverse_step(keys[at], p, flat[at], target[at], clusters, how.temperature, how.top_p,
                                            how.sync_trip_count)
            if asked:
                law = drop_probability(self.process, p, flat[at], new, clusters)
                sure = sure.at[at].set(jnp.where(new != flat[at], law, sure[at]))
            return flat.at[at].set(new), sure

        carry = view.z.reshape(-1), sure
        z, sure = self.in_pieces(work, target.reshape(view.z.shape) < view.level, carry)
        return z.reshape(view.z.shape), sure.reshape(view.z.shape)

    def write(self, view: View, prediction):
        """(symbols, probability of each drop): what the policy makes of what it has seen."""
        policy = self.policy
        if policy.propose is not None:
            return policy.propose(view, self)
        if policy.order == "draw_then_choose":
            if policy.draw == "argmax":
                drawn, sure = view.top, jnp.exp(view.log_top)
            else:
                target = jnp.where(view.open, self._below(view.level), view.level)
                drawn, sure = self.reverse_step(view, prediction, target)
            view = view._replace(drawn=drawn, log_drawn=jnp.log(sure))
            target = policy.choose.target(view)
            return jnp.where(target < view.level, drawn, view.z), sure
        target = policy.choose.target(view)
        if policy.draw == "argmax":
            return self.likeliest(view, target)
        if policy.draw == "sample":
            return self.reverse_step(view, prediction, target)
        return policy.draw(view, self, prediction, target)

    def decide(self, view: View, prediction):
        """`write`, or all the rest where the policy commits; only free tokens change."""
        z, sure = self.write(view, prediction)
        if self.policy.commit is not None:
            rest = self.policy.commit(view)[:, None] & view.free & (view.level > 0)
            stages = getattr(self.policy.commit, "stages", False)
            best = (view.top, view.log_top) if stages else (view.word, view.log_word)
            z, sure = jnp.where(rest, best[0], z), jnp.where(rest, jnp.exp(best[1]), sure)
        return jnp.where(view.free, z, view.z), sure

    def ask(self, cache, rows: Rows):
        """(prediction, cache) of rows."""
        prediction, cache = self.denoise(cache, rows)
        return prediction if hasattr(prediction, "select") else self.process.as_prediction(prediction), cache

    def likeliest(self, view: View, target):
        """Symbols after the drops to `target`: the likeliest; from further up the likeliest word's ancestor."""
        out, sure = view.top, jnp.exp(view.log_top)
        if view.word is not None and not view.straight:
            far = target < view.level - 1
            for j in range(self.process.num_levels - 1):
                above = self.process.symbol_above(0, jnp.where(far, view.word, 0), j)
                out = jnp.where(far & (target == j), above, out)
            sure = jnp.where(far, jnp.exp(view.log_word), sure)
        return jnp.where(target < view.level, out, view.z), sure

    def _below(self, level):
        return jnp.zeros_like(level) if self.policy.choose.straight else jnp.maximum(level - 1, 0)

    def turn(self, cache, s: State):
        """One turn of every row here."""
        policy, process = self.policy, self.process
        view = self.view(s)
        memory: dict[str, Any] = {}
        if policy.verify is not None:
            z, sure, memory, cache = policy.verify(self, cache, s)
        else:
            # where nothing it says can change what drops, the network is asked about that alone
            blind = not (policy.looks or policy.top_k or policy.propose or any(hook.whole for hook in policy.hooks()))
            blind = blind and policy.order == "choose_then_draw"
            wanted = policy.choose.target(view) < view.level if blind else self.wanted(view)
            prediction, cache = self.ask(cache, view.rows(wanted))
            view = self.look(view, prediction, wanted)
            z, sure = self.decide(view, prediction)
        length, source, inserted = s.length, None, None
        if policy.lengths is not None:
            length, source, inserted, hold = policy.lengths(view, process.level_of(z) < view.level)
            z = jnp.where(hold[:, None], view.z, z)
        below = process.level_of(z)
        dropped = below < view.level
        level, revised = below, s.revised
        view = view._replace(sure=jnp.where(dropped, sure, s.sure))
        if policy.revise is not None:
            level = jnp.clip(policy.revise(view, z, dropped), below, process.level_of(s.canvas))
            keep = view.free if policy.commit is None else view.free & ~policy.commit(view)[:, None]
            level = jnp.where(keep, level, below)
            z = raised(process, z, s.canvas, level, view.keys if policy.revise.crosses else None)
            revised = revised + jnp.sum(level > view.level, axis=1)
        for hook in policy.hooks() if policy.verify is None else []:
            memory |= hook.remember(view, z, dropped)
        marks = wide_levels(process) <= view.level[..., None]
        falls = marks & (wide_levels(process) > level[..., None])
        rises = wide_levels(process) <= level[..., None]
        fell = jnp.where(falls, s.call[:, None, None], jnp.where(rises, -1, s.fell))
        s = s._replace(z=z, length=length, changed=z != view.z, sure=view.sure, fell=fell, revised=revised,
                       call=s.call + 1, memory=s.memory | memory)
        if source is not None:
            s = moved(process, s, source, inserted)
        if self.how.frames:
            after = self.view(s)
            left = jnp.any(after.free & (after.level > 0), axis=1)
            state = s.z, s.sure, jnp.where(left, after.t, 0.0)
            s = s._replace(film=self.record(s).expose(s.film, s.call - 1, state))
        return cache, s


def wide_levels(process):
    return jnp.arange(1, process.num_levels + 1).reshape(1, 1, -1)


def raised(process, z, canvas, level, keys=None):
    """Symbols z [b, S] at higher levels: what the canvas showed there, else the ancestor of what is shown.

    With keys [b, S] a word's first crossing is the process's own, which for xi < 1 may go to another cluster.
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
            above = process.symbol_above(max(low, 1), process.node_of(z, low) if low else first, high)
            out = jnp.where((level == high) & (here == low), above, out)
    return jnp.where((level > here) & (level == top), canvas, out)


def moved(process, s: State, source, inserted) -> State:
    """Every array [b, S, ...] of a state after an edit of its canvas; masks where something was inserted."""
    positions = s.z.shape[1]

    def move(a):
        if a.ndim < 2 or a.shape[1] != positions or jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            return a
        return jnp.take_along_axis(a, source.reshape(*source.shape, *(1,) * (a.ndim - 2)), axis=1)

    mask = process.hierarchy.mask_id
    z, canvas = (jnp.where(inserted, mask, move(a)) for a in (s.z, s.canvas))
    fell = jnp.where(inserted[..., None], -1, move(s.fell))
    return s._replace(z=z, canvas=canvas, given=move(s.given) & ~inserted, changed=move(s.changed) | inserted,
                      sure=jnp.where(inserted, 0.0, move(s.sure)), fell=fell, memory=jax.tree.map(move, s.memory),
                      extra=jax.tree.map(move, s.extra))


def sample(key, denoise, process: HierarchicalProcess, z, policy: Policy, numbers: Mapping[str, Any] | None = None, *,
           given=None, length=None, extra: Mapping[str, jax.Array] | None = None, how: Sampling = Sampling()):  # noqa: B008
    """Fill a canvas z int32 [B, S] as a policy says, in one loop on the device.

    Args:
      key: one key (row b uses fold_in(key, b)) or keys [B]; results do not depend on a row's batch mates.
      denoise: function (z [b, S], t [b]) -> prediction (asked for select(index) alone) or logits [b, S, V]; or a
        `Denoiser`, which may keep a cache.
      policy, numbers: what to do, and its traced numbers. how: temperature, batching, recording.
      given: bool [B, S], tokens that stay; None: the words of z. length: int32 [B] or a scalar, tokens of each row
        (behind them z stays); None: S. extra: arrays [B, ...] for hooks and denoisers.

    Returns:
      (symbols int32 [B, S], words but behind a row's length; stats):
      calls int32: turns of the loop, the network calls of the row that has most (a turn calls it once for every `rows`
      rows that are not done); row_forwards int32 [B]: network passes of each row, a helper's not counted; length int32
      [B]; fell int32 [B, S, K]: the row's call at which a token fell below level k for good, -1 where it never was that
      high; revised int32 [B]: tokens that were raised. With frames also call int32 [F+1], a row's calls at each frame;
      time float32 [B, F+1], its t; z int32 and confidence float32 [B, F+1, S], the symbols and the probability of each
      token's last drop (0 before the first).
    """
    chex.assert_rank(z, 2)
    batch, positions = z.shape
    if not hasattr(denoise, "start"):
        denoise = Stateless(denoise)
    rows, drops = together(positions)
    rows, drops = min(how.rows or max(1, rows // policy.width), batch), how.drops or drops
    loop = Loop(denoise, process, policy, numbers or {}, how, rows, drops)
    length = jnp.broadcast_to(jnp.asarray(positions if length is None else length, jnp.int32), (batch,))
    given = process.level_of(z) == 0 if given is None else given
    s = loop.start(row_keys(key, batch), z, given, length, extra or {})
    first = loop.view(s)
    s, calls = loop.run(denoise.start(first.rows(loop.wanted(first))), s)
    stats = {"calls": calls, "row_forwards": s.call * (denoise.forwards * policy.width), "length": s.length,
             "fell": s.fell, "revised": s.revised}
    return s.z, stats | loop.record(s).stats(s.film, s.call)


def _rows_at(tree, at, axis: int):
    return jax.tree.map(lambda a: jnp.take(a, at, axis=axis) if axis else a[at], tree)


def _with_rows(tree, at, axis: int, new):
    return jax.tree.map(lambda a, b: a.at[:, at].set(b) if axis else a.at[at].set(b), tree, new)


def _where(keep, new, old, axis: int):
    return jax.tree.map(lambda a, b: jnp.where(keep.reshape((1,) * axis + (-1,) + (1,) * (a.ndim - axis - 1)), a, b),
                        new, old)
