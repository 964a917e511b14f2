"""Decoding policies: their parts (`Hook`), what these see in a turn (`View`), and what a denoiser is told (`Rows`).

A `Policy` is static and hashable, so each composition compiles once; its thresholds are traced numbers beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from hdlm_jax.diffusion.draws import fold, token_keys
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess

UNKNOWN: Any = None  # of a View: what its policy did not ask for
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


class Denoiser(Protocol):
    """What a loop asks for predictions; `Stateless` is the simplest one."""

    @property
    def rows_axis(self) -> int:
        """The rows' axis in every leaf of the cache."""

    @property
    def forwards(self) -> int:
        """Network passes that a call costs each row."""

    def start(self, rows: Rows) -> Any:
        """A cache: any pytree of arrays."""

    def __call__(self, cache, rows: Rows) -> tuple[Any, Any]:
        """(prediction or logits [b, S, V], cache)."""


class Stateless:
    """A function (z [b, S], t [b]) -> prediction or logits [b, S, V] as a denoiser."""

    rows_axis = 0
    forwards = 1

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

    z: jax.Array
    level: jax.Array
    canvas: jax.Array
    given: jax.Array
    active: jax.Array
    free: jax.Array
    length: jax.Array
    changed: jax.Array
    call: jax.Array
    memory: dict[str, Any]
    extra: dict[str, jax.Array]
    numbers: Mapping[str, Any]
    process: HierarchicalProcess
    straight: bool = False
    block: jax.Array = UNKNOWN
    current: jax.Array = UNKNOWN
    progress: jax.Array = UNKNOWN
    stamp: jax.Array = UNKNOWN
    key: jax.Array = UNKNOWN
    keys: jax.Array = UNKNOWN
    t: jax.Array = UNKNOWN
    top: jax.Array = UNKNOWN
    log_top: jax.Array = UNKNOWN
    log_second: jax.Array = UNKNOWN
    entropy: jax.Array = UNKNOWN
    word: jax.Array = UNKNOWN
    log_word: jax.Array = UNKNOWN
    log_own: jax.Array = UNKNOWN
    log_up: jax.Array = UNKNOWN
    sure: jax.Array = UNKNOWN
    ids: jax.Array = UNKNOWN
    logs: jax.Array = UNKNOWN
    drawn: jax.Array = UNKNOWN
    log_drawn: jax.Array = UNKNOWN

    @property
    def open(self):
        """bool [b, S]: tokens of the current block that may drop."""
        return self.free & (self.level > 0) & (self.block == self.current[:, None])

    def rows(self, wanted) -> Rows:
        return Rows(self.z, self.t, self.level, self.given, self.active, self.block, self.current, wanted, self.changed,
                    self.call, self.extra)


def unasked(process: HierarchicalProcess, policy: Policy, numbers: Mapping[str, Any], s: State) -> View:
    """A view for hooks to size their memory by: without blocks and times, which may depend on it."""
    active = jnp.arange(s.z.shape[1])[None] < s.length[:, None]
    return View(s.z, process.level_of(s.z), s.canvas, s.given, active, active & ~s.given, s.length, s.changed, s.call,
                s.memory, s.extra, numbers, process, policy.choose.straight, key=s.key)


def bare(process: HierarchicalProcess, policy: Policy, numbers: Mapping[str, Any], s: State) -> View:
    """The view before the network was asked."""
    view = unasked(process, policy, numbers, s)
    level, free = view.level, view.free
    before = jnp.cumsum(free, axis=1) - 1  # free tokens before this one; -1 in front of the first
    block = before // policy.block if policy.block else jnp.minimum(before, 0)
    current = jnp.min(jnp.where(free & (level > 0), block, s.z.shape[1]), axis=1)
    drops = jnp.sum(jnp.where(free, process.level_of(s.canvas), 0), axis=1)
    progress = 1 - jnp.sum(jnp.where(free, level, 0), axis=1) / jnp.maximum(drops, 1)
    view = view._replace(block=block.astype(jnp.int32), current=current, progress=progress)
    stamp = policy.choose.stamp(view)
    key = fold(s.key, stamp)
    return view._replace(sure=s.sure, stamp=stamp, key=key, keys=token_keys(key, s.z.shape), t=policy.choose.time(view))
