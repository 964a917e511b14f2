"""The sampler: one loop in which every row takes turns of its own (docs/decoding.md).

In a turn a row asks the network once, looks at what it says, and then some of its tokens drop: from the mask to their
cluster, from a cluster to a word. Which ones, how many, how they are drawn, what is taken back and when to stop is
what a `Policy` says, a bundle of small static objects; thresholds are traced, so another one is no other program.

Rows do not know each other. The loop gathers the rows that still have something to write, `rows` at a time, so that a
row's forward pass is never repeated while the row stays as it is, and a finished row costs nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import chex
import jax
import jax.numpy as jnp

from hdlm_jax.decoding.statistics import drop_probability, together
from hdlm_jax.diffusion.draws import fold, row_keys, token_keys
from hdlm_jax.diffusion.levels import open_uniform
from hdlm_jax.diffusion.trajectory import Trajectory

ORDERS = ("choose_then_draw", "draw_then_choose")


class Rows(NamedTuple):
    """What a denoiser is told of some rows.

    z: int32 [b, S], symbols; level: int32 [b, S], theirs. t: float32 [b], noise time that the network is told.
    given: bool [b, S], tokens that stay; active: bool [b, S], within the row's length.
    block: int32 [b, S], number of each token's block, -1 before the first free token; current: int32 [b], the block
      that is being written.
    wanted: bool [b, S], tokens whose prediction will be asked for; changed: bool [b, S], those that were written or
      raised in the row's last call. call: int32 [b], network calls the row has had.
    extra: dict of arrays [b, ...], the caller's own.
    """

    z: jax.Array
    t: jax.Array
    level: jax.Array
    given: jax.Array
    active: jax.Array
    block: jax.Array
    current: jax.Array
    wanted: jax.Array
    changed: jax.Array
    call: jax.Array
    extra: dict[str, jax.Array]


class Stateless:
    """A function (z [b, S], t [b]) -> prediction or logits [b, S, V] as a denoiser."""

    rows_axis = 0  # of every leaf of the cache
    forwards = 1  # network passes a call costs each row

    def __init__(self, function):
        self.function = function

    def start(self, rows: Rows):
        return ()

    def __call__(self, cache, rows: Rows):
        return self.function(rows.z, rows.t), cache


class Hook:
    """A part of a policy. Subclasses are frozen dataclasses; what they keep between calls is named in `memory`.

    looks: what of a View it needs: "top" (top, log_top, log_second, entropy), "word" (word, log_word), "own" (log_own
      and log_up; log_word at words as well), "sure" (sure, of draws too).
    top_k: m, how many of the likeliest symbols it needs (ids, logs).
    whole: whether it asks about every token that is not written yet, not the current block's alone.
    jumps: may let a token drop by more than one level in a turn.
    crosses: raises tokens as the process does: a word by a first crossing of its own where xi < 1.
    stages: of `commit`: one level at a time.
    """

    looks: ClassVar[tuple[str, ...]] = ()
    top_k: ClassVar[int] = 0
    whole: ClassVar[bool] = False
    jumps: ClassVar[bool] = False
    crosses: ClassVar[bool] = False

    def memory(self, view: View) -> dict[str, jax.Array]:
        """Arrays [B, ...] at the start; names are shared by all hooks of a policy."""
        return {}

    def remember(self, view: View, z, dropped) -> dict[str, jax.Array]:
        """What memory becomes after a turn that made view.z into z; dropped bool [b, S]."""
        return {}


@dataclasses.dataclass(frozen=True)
class Policy:
    """How to decode: static and hashable, so that each composition compiles once.

    choose: which tokens drop, and to what level (hdlm_jax.decoding.choose).
    draw: "sample", a draw from the law after temperature and nucleus; "argmax", the likeliest symbol; or a hook
      (view, loop, prediction, target) -> (symbols, probability of each drop).
    order: "choose_then_draw", exact: what is chosen does not depend on what is drawn there; "draw_then_choose": every
      token draws first and the choice sees it (view.drawn, view.log_drawn): not exact.
    block: so many free tokens are written before the next ones; 0: all are one block.
    commit: hook (view) -> bool [b]: rows that write all the rest at once: the likeliest words, or in stages, the
      likeliest symbols a level below.
    revise: hook (view, z, dropped) -> level [b, S] that tokens are raised to; free tokens only, never above the canvas.
    lengths: hook (view, dropped) -> (length [b], source [b, S], inserted bool [b, S], hold bool [b]): a canvas that
      grows.
    propose: hook (view, loop) -> (symbols [b, S], probability of each drop), in place of choosing and drawing.
    verify: hook (loop, cache, state) -> (symbols, probability of each drop, memory, cache): drafts of several turns,
      checked in one call of verify.width rows each.
    clusters: see HierarchicalProcess.reverse_step.
    """

    choose: Any
    draw: Any = "sample"
    order: str = "choose_then_draw"
    block: int = 0
    commit: Any = None
    revise: Any = None
    lengths: Any = None
    propose: Any = None
    verify: Any = None
    clusters: str = "exact"

    def __post_init__(self):
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r}: choose one of {', '.join(ORDERS)}")
        if isinstance(self.draw, str) and self.draw not in ("sample", "argmax"):
            raise ValueError(f"draw={self.draw!r}: choose sample or argmax, or give a hook")
        if not isinstance(self.draw, str) and self.order == "draw_then_choose":
            raise ValueError(f"draw={self.draw!r}: in the order draw_then_choose choose sample or argmax")
        if self.verify is not None and (self.revise or self.lengths or self.propose):
            raise ValueError(f"verify={self.verify!r}: drafts only drop tokens: no revise, lengths or propose with it")
        if self.lengths is not None and not hasattr(self.choose, "score"):
            raise ValueError(f"choose={self.choose!r} plans for a canvas that does not grow; with lengths give Scored")
        if getattr(self.choose, "crosses", False) and self.revise != self.choose:
            raise ValueError(f"choose={self.choose!r} lets tokens climb as well: give it as revise, too")

    def hooks(self) -> list[Hook]:
        found: list[Hook] = []
        todo = [self.choose, self.draw, self.commit, self.revise, self.lengths, self.propose, self.verify]
        while todo:
            if isinstance(part := todo.pop(0), Hook):
                found.append(part)
                todo += [getattr(part, field.name) for field in dataclasses.fields(part)]  # type: ignore[arg-type]
        return found

    @property
    def looks(self) -> tuple[str, ...]:
        looks = {name for hook in self.hooks() for name in hook.looks}
        looks |= {"word"} if self.commit else set()
        if self.draw == "argmax":
            looks |= {"top", "word"} if any(hook.jumps for hook in self.hooks()) else {"top"}
        return tuple(sorted(looks))

    @property
    def top_k(self) -> int:
        return max((hook.top_k for hook in self.hooks()), default=0)

    @property
    def width(self) -> int:
        """Rows of the network that a row of the batch takes in a call."""
        return 1 if self.verify is None else self.verify.width


class State(NamedTuple):
    """Of a loop; rows first everywhere."""

    key: jax.Array  # [B]
    z: jax.Array
    canvas: jax.Array  # symbols at the start
    given: jax.Array
    length: jax.Array  # [B]
    changed: jax.Array
    sure: jax.Array  # float32 [B, S], probability of each token's last drop
    fell: jax.Array  # int32 [B, S, K], the call at which a token last fell below level k = 1..K; -1: not yet
    revised: jax.Array  # int32 [B], tokens that were raised
    call: jax.Array  # int32 [B]
    memory: dict[str, jax.Array]
    extra: dict[str, jax.Array]
    film: Any


class View(NamedTuple):
    """What policies see of some rows in a turn; all arrays have the rows first (docs/decoding.md, "View").

    z, level, canvas, given, active, free, block, current, changed, call: see Rows; free: active and not given.
    stamp: int32 [b], what the turn's random numbers are folded with; key [b] and keys [b, S]: the turn's.
    t: float32 [b], noise time; progress: float32 [b], share of the drops that are done.
    top, log_top, log_second, entropy: [b, S], of the law over what a token would drop to: the likeliest symbol, its
      log p, the second's, entropy in nats. word, log_word: likeliest word. log_own: log p of the symbol on show,
      log_up: of its parent (0 where that is the mask).
    sure: [b, S], probability of each token's last drop; to `revise` and `remember` with this turn's.
    ids, logs: [b, S, m], the m likeliest symbols and their log p, falling.
    drawn, log_drawn: in the order "draw_then_choose".
    memory, extra, numbers: dicts; numbers are scalars. process: HierarchicalProcess; straight: to words at once.

    Where nothing was asked, symbols are z, log-probabilities -inf and entropies +inf.
    """

    z: Any
    level: Any
    canvas: Any
    given: Any
    active: Any
    free: Any
    length: Any
    block: Any
    current: Any
    changed: Any
    call: Any
    progress: Any
    memory: dict[str, Any]
    extra: dict[str, Any]
    numbers: dict[str, Any]
    process: Any
    straight: bool = False
    stamp: Any = None
    key: Any = None
    keys: Any = None
    t: Any = None
    top: Any = None
    log_top: Any = None
    log_second: Any = None
    entropy: Any = None
    word: Any = None
    log_word: Any = None
    log_own: Any = None
    log_up: Any = None
    sure: Any = None
    ids: Any = None
    logs: Any = None
    drawn: Any = None
    log_drawn: Any = None

    @property
    def open(self):
        """bool [b, S]: tokens of the current block that may drop."""
        return self.free & (self.level > 0) & (self.block == self.current[:, None])

    def rows(self, wanted) -> Rows:
        return Rows(self.z, self.t, self.level, self.given, self.active, self.block, self.current, wanted, self.changed,
                    self.call, self.extra)


def bare(process, policy: Policy, numbers, s: State) -> View:
    """The view before the network was asked."""
    level, top = process.level_of(s.z), process.level_of(s.canvas)
    active = jnp.arange(s.z.shape[1])[None] < s.length[:, None]
    free = active & ~s.given
    before = jnp.cumsum(free, axis=1) - 1  # free tokens before this one; -1 in front of the first
    block = before // policy.block if policy.block else jnp.minimum(before, 0)
    left = free & (level > 0)
    current = jnp.min(jnp.where(left, block, s.z.shape[1]), axis=1)
    drops = jnp.sum(jnp.where(free, top, 0), axis=1)
    progress = 1 - jnp.sum(jnp.where(free, level, 0), axis=1) / jnp.maximum(drops, 1)
    view = View(s.z, level, s.canvas, s.given, active, free, s.length, block.astype(jnp.int32), current, s.changed,
                s.call, progress, s.memory, s.extra, numbers, process, policy.choose.straight)
    stamp = policy.choose.stamp(view)
    key = fold(s.key, stamp)
    return view._replace(sure=s.sure, stamp=stamp, key=key, keys=token_keys(key, s.z.shape), t=policy.choose.time(view))


def statistics(process, p, z, looks, top_k: int, straight: bool, clusters: str) -> dict[str, jax.Array]:
    """What `View` says of tokens z [n] with a prediction p of theirs: arrays [n] and [n, m]."""
    level = process.level_of(z)
    out: dict[str, Any] = {}

    def put(name, k, value):
        here = (level == k).reshape(-1, *(1,) * (value.ndim - 1))
        none = jnp.full_like(value, 0 if value.dtype == z.dtype else -jnp.inf)
        out[name] = jnp.where(here, value, out.get(name, none))

    for k in range(1, process.num_levels + 1):
        j = 0 if straight else k - 1
        words: Any = process.log_probs_below(p, z, k, 0, clusters) if "word" in looks or j == 0 else None
        if "top" in looks or top_k:
            law: Any = words if j == 0 else process.log_probs_below(p, z, k, j, clusters)
            many = min(max(top_k, 2), law.shape[-1])
            # barriers keep XLA from merging what follows into a sort of all words, a dozen times as slow on CPU; one
            # barrier for both aborts its compiler where many devices are compiled for
            logs, ids = map(jax.lax.optimization_barrier, jax.lax.top_k(law, many))
            short = ((0, 0), (0, max(top_k, 2) - many))
            logs = jnp.pad(logs, short, constant_values=-jnp.inf)
            ids = jnp.pad(ids + process.hierarchy.offsets[j], short, mode="edge").astype(z.dtype)
            put("top", k, ids[:, 0])
            put("log_top", k, logs[:, 0])
            put("log_second", k, logs[:, 1])
            put("entropy", k, -jnp.sum(jnp.where(law > -jnp.inf, jnp.exp(law) * law, 0.0), axis=-1))
            if top_k:
                put("ids", k, ids[:, :top_k])
                put("logs", k, logs[:, :top_k])
        if "word" in looks:
            best = jnp.argmax(words, axis=-1).astype(z.dtype)
            put("word", k, best)
            put("log_word", k, jnp.take_along_axis(words, best[:, None], axis=-1)[:, 0])
        if "own" in looks and k < process.num_levels:
            put("log_own", k, p.log_mass(k, process._node(z, k)))
    if "own" in looks:
        put("log_own", 0, p.log_prob(jnp.where(level == 0, z, 0)))
        put("log_up", process.num_levels - 1, jnp.zeros(z.shape))
        for k in range(process.num_levels - 1):
            up = jnp.asarray(process._lift(k, k + 1))[process._node(z, k)]
            put("log_up", k, p.log_mass(k + 1, up))
        if "word" in looks:  # what the network would write at a word
            law = p.log_probs()
            put("word", 0, jnp.argmax(law, axis=-1).astype(z.dtype))
            put("log_word", 0, jnp.max(law, axis=-1))
    return out


class _Loop(NamedTuple):
    """What all turns share."""

    denoise: Any
    process: Any
    policy: Policy
    numbers: dict[str, Any]
    temperature: Any
    top_p: Any
    drops: int
    frames: int
    sync_trip_count: Any
    tools: dict[str, Any]

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

        return jax.lax.fori_loop(0, self.sync_trip_count((jnp.sum(flat) + size - 1) // size), some, carry)

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
        asked = self.frames > 0 or self.policy.order == "draw_then_choose" or "sure" in self.policy.looks

        def work(at, carry):  # the last ones overlap those before: a token that has dropped drops no more
            flat, sure = carry
            p = self.process.as_prediction(prediction.select(at))
            new = self.process.reverse_step(keys[at], p, flat[at], target[at], self.policy.clusters, self.temperature,
                                       self.top_p, self.sync_trip_count)
            if asked:
                law = drop_probability(self.process, p, flat[at], new, self.policy.clusters)
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
                drawn, sure = self.reverse_step(view, prediction,
                                           jnp.where(view.open, self._below(view.level), view.level))
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
                node = jnp.asarray(self.process._lift(0, j))[jnp.where(far, view.word, 0)]
                out = jnp.where(far & (target == j), node + self.process.hierarchy.offsets[j], out)
            sure = jnp.where(far, jnp.exp(view.log_word), sure)
        return jnp.where(target < view.level, out, view.z), sure

    def _below(self, level):
        return jnp.zeros_like(level) if self.policy.choose.straight else jnp.maximum(level - 1, 0)

    def turn(self, cache, s: State):
        """One turn of every row here."""
        policy, process = self.policy, self.process
        view = bare(process, policy, self.numbers, s)
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
        if self.frames:
            after = bare(process, policy, self.numbers, s)
            left = jnp.any(after.free & (after.level > 0), axis=1)
            state = s.z, s.sure, jnp.where(left, after.t, 0.0)
            s = s._replace(film=self.record(s).expose(s.film, s.call - 1, state))
        return cache, s

    def record(self, s: State) -> Trajectory:
        return Trajectory(self.frames, self.policy.choose.bound(self.numbers, s.z.shape[1], self.process.num_levels))


def wide_levels(process):
    return jnp.arange(1, process.num_levels + 1).reshape(1, 1, -1)


def raised(process, z, canvas, level, keys=None):
    """Symbols z [b, S] at higher levels: what the canvas showed there, else the ancestor of what is shown.

    With keys [b, S] a word's first crossing is the process's own, which for xi < 1 may go to another cluster.
    """
    here, top = process.level_of(z), process.level_of(canvas)
    first = jnp.asarray(process._lift(0, 1))[jnp.where(here == 0, z, 0)]
    if keys is not None and process.xi < 1:
        n1, flat = process.hierarchy.sizes[1], fold(keys, 9).reshape(-1)
        own = jax.vmap(open_uniform)(fold(flat, 0)).reshape(z.shape) < process.xi
        other = jax.vmap(lambda key: jax.random.randint(key, (), 0, n1 - 1))(fold(flat, 1)).reshape(z.shape)
        first = jnp.where(own, first, other + (other >= first))
    out = z
    for high in range(1, process.num_levels + 1):
        for low in range(high):
            node = jnp.asarray(process._lift(max(low, 1), high))[process._node(z, low) if low else first]
            out = jnp.where((level == high) & (here == low), node + process.hierarchy.offsets[high], out)
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


def sample(key, denoise, process, z, policy: Policy, numbers: dict[str, Any] | None = None, *, given=None, length=None,
           extra: dict[str, Any] | None = None, tools: dict[str, Any] | None = None, temperature: Any = 1.0,
           top_p: Any = 1.0, rows: int | None = None, drops: int | None = None, sync_trip_count=lambda count: count,
           frames: int = 0, limit=None):
    """Fill a canvas z int32 [B, S] as a policy says, in one loop on the device.

    Args:
      key: one key (row b uses fold_in(key, b)) or keys [B]; results do not depend on a row's batch mates.
      denoise: function (z [b, S], t [b]) -> prediction (asked for select(index) alone) or logits [b, S, V]; or an
        object like `Stateless`, which may keep a cache.
      process: HierarchicalProcess. policy, numbers: what to do, and its traced numbers.
      given: bool [B, S], tokens that stay; None: the words of z. length: int32 [B] or a scalar, tokens of each row
        (behind them z stays); None: S. extra: arrays [B, ...] for hooks and denoisers. tools: functions for hooks.
      temperature, top_p: see HierarchicalProcess.reverse_step.
      rows, drops: rows and tokens that are worked on at once (see `together`); they change no result.
      sync_trip_count: trip count of a loop that needs `count` iterations here; where devices that share the batch must
        keep step, the largest count of all (parallel.OverBatch). Changes no result.
      frames: F, at most so many states are recorded beside the start (see `Film`). Changes no result.
      limit: stop rows after so many calls, finished or not, traced or not; None: when all is written.

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
    numbers, extra = numbers or {}, extra or {}
    if not hasattr(denoise, "start"):
        denoise = Stateless(denoise)
    fill = together(positions)
    rows = min(rows or max(1, fill[0] // policy.width), batch)
    loop = _Loop(denoise, process, policy, numbers, temperature, top_p, min(drops or fill[1], rows * positions), frames,
                 sync_trip_count, tools or {})
    length = jnp.broadcast_to(jnp.asarray(positions if length is None else length, jnp.int32), (batch,))
    still = process.level_of(z) == 0 if given is None else given
    none = jnp.zeros(z.shape, bool)
    s = State(row_keys(key, batch), z, z, still, length, none, jnp.zeros(z.shape, jnp.float32),
              jnp.full((*z.shape, process.num_levels), -1), jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32),
              {}, extra, ())
    memory: dict[str, Any] = {}
    blank = _bare_of(process, policy, numbers, s)
    for hook in policy.hooks():
        memory |= hook.memory(blank)
    s = s._replace(memory=memory)
    first = bare(process, policy, numbers, s)
    if frames:
        s = s._replace(film=loop.record(s).start((z, s.sure, first.t)))
    cache = denoise.start(first.rows(loop.wanted(first)))
    axis = denoise.rows_axis
    bound = policy.choose.bound(numbers, positions, process.num_levels)
    if policy.lengths is not None:
        bound += positions  # a row that grows drops nothing in that turn
    limit = bound if limit is None else jnp.minimum(bound, limit)

    def live(s: State):
        inside = jnp.arange(positions)[None] < s.length[:, None]
        left = (process.level_of(s.z) > 0) | (~s.given & policy.choose.goes_on(numbers, s.call)[:, None])
        return jnp.any(left & inside, axis=1) & (s.call < limit)

    def turn(part, keep):
        """A turn of rows (cache, state), but for those that are not to `keep`."""
        new = loop.turn(*part)
        return jax.tree.map(lambda a, b: _where(keep, a, b, axis), new[0], part[0]), jax.tree.map(
            lambda a, b: _where(keep, a, b, 0), new[1], part[1])

    def sweep(carry):
        cache, s, calls, _ = carry
        busy = live(s)
        order = jnp.argsort(~busy, stable=True)

        def some(i, carry):
            cache, s = carry
            begin = jnp.minimum(i * rows, batch - rows)
            at = jax.lax.dynamic_slice_in_dim(order, begin, rows)
            keep = busy[at] & (begin + jnp.arange(rows) >= i * rows)  # the last group overlaps the one before
            part = jax.tree.map(lambda a: jnp.take(a, at, axis=axis), cache), jax.tree.map(lambda a: a[at], s)
            new = turn(part, keep)
            put = (lambda a, b: a.at[at].set(b)) if axis == 0 else (lambda a, b: a.at[:, at].set(b))
            return jax.tree.map(put, cache, new[0]), jax.tree.map(lambda a, b: a.at[at].set(b), s, new[1])

        if rows == batch:  # one group: nothing to gather
            cache, s = turn((cache, s), busy)
        else:
            cache, s = jax.lax.fori_loop(0, sync_trip_count((jnp.sum(busy) + rows - 1) // rows), some, (cache, s))
        return cache, s, calls + 1, sync_trip_count(jnp.any(live(s)).astype(jnp.int32))

    go = sync_trip_count(jnp.any(live(s)).astype(jnp.int32))
    _, s, calls, _ = jax.lax.while_loop(lambda carry: carry[-1] > 0, sweep, (cache, s, jnp.int32(0), go))
    stats = {"calls": calls, "row_forwards": s.call * (denoise.forwards * policy.width), "length": s.length,
             "fell": s.fell, "revised": s.revised}
    if frames:
        stats |= loop.record(s).stats(s.film, s.call)
    return s.z, stats


def _bare_of(process, policy: Policy, numbers, s: State) -> View:
    """A view for hooks to size their memory by; without times, which may depend on it."""
    level = process.level_of(s.z)
    active = jnp.arange(s.z.shape[1])[None] < s.length[:, None]
    return View(s.z, level, s.canvas, s.given, active, active & ~s.given, s.length, None, None, s.changed, s.call, None,
                {}, s.extra, numbers, process, policy.choose.straight, key=s.key)


def _where(keep, a, b, axis: int):
    shape = [1] * a.ndim
    shape[axis] = keep.size
    return jnp.where(keep.reshape(shape), a, b)
