"""A decoding method as a static `Policy`, its parts (`Hook`), what these see (`View`), what a denoiser sees (`Rows`).

A policy is hashable, so each composition compiles once; its thresholds are traced numbers beside it. Shapes: b rows of
S tokens; K levels, 0 a vocabulary token, K the mask. A token is *unmasked* when it goes down one level.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.diffusion.hierarchical import HierarchicalProcess

UNKNOWN: Any = None  # in a View: what its policy does not need
Cache = Any  # a pytree of a denoiser's own; the rows on axis 1 of every leaf
Numbers = Mapping[str, jax.Array]  # traced scalars
Drawn = tuple[jax.Array, jax.Array]  # (states int32 [b, S], probability float32 [b, S] of each unmasking)


class Rows(NamedTuple):
    """What a denoiser sees of some rows.

    z: int32 [b, S], states; level: int32 [b, S], theirs. t: float32 [b], masking level that the network is told.
    given: bool [b, S], tokens that stay; active: bool [b, S], within the row's length.
    block: int32 [b, S], each token's block, -1 before the first free token; current: int32 [b], the block being
      written.
    wanted: bool [b, S], tokens whose prediction is needed; call: int32 [b], network calls so far.
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
    call: jax.Array
    extra: dict[str, jax.Array]


class Denoiser(Protocol):
    """Where predictions come from; `Stateless` is the simplest one. forwards: network passes of a call, per row."""

    @property
    def forwards(self) -> int | Fraction: ...

    def start(self, rows: Rows) -> Cache: ...

    def __call__(self, cache: Cache, rows: Rows, /) -> tuple[Any, Cache]:
        """(prediction or logits [b, S, V], cache)."""


class Stateless:
    """A function (z [b, S], t [b]) -> prediction or logits [b, S, V] as a denoiser."""

    forwards = 1

    def __init__(self, function: Callable):
        self.function = function

    def start(self, rows: Rows):
        return ()

    def __call__(self, cache, rows: Rows):
        return self.function(rows.z, rows.t), cache


def as_denoiser(denoise: Denoiser | Callable) -> Denoiser:
    return denoise if hasattr(denoise, "start") else Stateless(denoise)  # type: ignore[return-value]


class Hook:
    """A part of a policy. Subclasses are frozen dataclasses; what they keep between calls is named in `memory`.

    needs: what of a View is filled in for it: "top" (top, log_top, log_second, entropy), "token" (token, log_token),
      "own" (log_own, log_up; with "token", token and log_token at vocabulary tokens as well), "sure" (sure), "order"
      (order), "block_lengths" (block_lengths).
    top_k: m, how many of the likeliest states it needs (ids, logs).
    whole: needs predictions at all tokens not written yet, not only in the current block.
    jumps: may unmask a token by more than one level in a call.
    random: what it chooses depends on the row's key, not on the states alone.
    choices: the values that its fields of texts may have.
    """

    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    needs: ClassVar[tuple[str, ...]] = ()
    top_k: ClassVar[int] = 0
    whole: ClassVar[bool] = False
    jumps: ClassVar[bool] = False
    random: ClassVar[bool] = False

    def __post_init__(self):
        for name, values in self.choices.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose {', '.join(values[:-1])} or {values[-1]}")

    def memory(self, view: View) -> dict[str, Any]:
        """Arrays [B, ...] at the start; names are shared by all hooks of a policy."""
        return {}

    def remember(self, view: View, z, unmasked) -> dict[str, Any]:
        """What memory becomes after a call that made view.z into z; unmasked: bool [b, S]."""
        return {}


class Choice(Hook):
    """Which tokens are unmasked. straight: to a vocabulary token at once, from any level. scored: by a score."""

    straight: bool = False
    scored: ClassVar[bool] = False

    def stamp(self, view: View):
        """int32 [b], what a call's random numbers are folded with: the row's number of calls."""
        return view.call

    def time(self, view: View):
        """t that the network is told, float32 [b]: at which a token's expected level is the mean of the row's."""
        levels = jnp.sum(jnp.where(view.free, view.level, 0), axis=1) / jnp.maximum(jnp.sum(view.free, axis=1), 1)
        return time_of(view.process.chain, levels)

    def target(self, view: View):
        """Levels after the call, int32 [b, S]."""
        raise NotImplementedError

    def bound(self, numbers: Numbers, positions: int, levels: int):
        """Calls that a row takes at most."""
        return positions * levels

    def goes_on(self, numbers: Numbers, call):
        """bool [b]: may tokens still be remasked, so that a call is due even where no mask is left?"""
        return jnp.zeros(call.shape, bool)


def time_of(chain, levels):
    """Masking level t, float32 [b], at which a token's expected level is `levels` [b]."""
    t, mean = _mean_level(chain)
    return jnp.interp(levels, jnp.asarray(mean), jnp.asarray(t)).astype(jnp.float32)


@functools.cache
def _mean_level(chain) -> tuple[np.ndarray, np.ndarray]:
    """t [1001] and a token's expected level at them (increasing), float32."""
    t = np.linspace(0, 1, 1001)
    with np.errstate(divide="ignore"):
        beta = chain.beta(np.minimum(-np.log1p(-t), chain.tau_end), np)
    return t.astype(np.float32), (beta @ np.arange(chain.num_levels + 1)).astype(np.float32)


class Commit(Hook):
    """view -> bool [b], rows that write all the rest. stages: a level at a time, else the likeliest tokens at once."""

    stages: bool = False
    __call__: Callable[..., jax.Array]


class Revise(Hook):
    """(view, z, unmasked) -> levels [b, S] that tokens are remasked to; free tokens only, never above the canvas.

    crosses: a vocabulary token is remasked as the process corrupts it: at xi < 1 perhaps to another cluster.
    """

    crosses: ClassVar[bool] = False
    __call__: Callable[..., jax.Array]


class Lengths(Hook):
    """(view, unmasked) -> (length [b], source [b, S], inserted bool [b, S], hold bool [b]): a canvas that grows.

    The new length; the place each place is taken from; those that become masks; rows that unmask nothing in this call.
    """

    __call__: Callable[..., tuple[jax.Array, jax.Array, jax.Array, jax.Array]]


class Draw(Hook):
    """(view, loop, prediction, target) -> Drawn."""

    __call__: Callable[..., Drawn]


class Verify(Hook):
    """(loop, cache, state) -> (*Drawn, memory, cache): drafts of several calls, checked in one of `width` rows each."""

    width: int
    __call__: Callable[..., tuple[jax.Array, jax.Array, dict[str, Any], Cache]]


@dataclasses.dataclass(frozen=True)
class Policy:
    """How to decode.

    choose: which tokens are unmasked, and to what level (hdlm_jax.decoding.choose).
    draw: "sample", from the distribution after temperature and top_p; "argmax", the likeliest state; or a hook.
    order: "choose_then_draw", exact: the choice does not depend on what is drawn; "draw_then_choose": every token draws
      first and the choice sees it (view.drawn, view.log_drawn): not exact.
    block: so many free tokens are written before the next ones; 0: all are one block.
    clusters: see HierarchicalProcess.reverse_step.
    aligned: blocks are counted from the beginning of the row, as a network with blocks of its own sees them, not from
      the first free token.
    """

    choose: Choice
    draw: str | Draw = "sample"
    order: str = "choose_then_draw"
    block: int = 0
    commit: Commit | None = None
    revise: Revise | None = None
    lengths: Lengths | None = None
    verify: Verify | None = None
    clusters: str = "exact"
    aligned: bool = False

    def __post_init__(self):
        if isinstance(self.draw, str) and self.draw not in ("sample", "argmax"):
            raise ValueError(f"draw={self.draw!r}: choose sample or argmax, or give a hook")
        if not isinstance(self.draw, str) and self.order == "draw_then_choose":
            raise ValueError(f"draw={self.draw!r}: in the order draw_then_choose choose sample or argmax")
        if self.verify is not None and (self.revise or self.lengths):
            raise ValueError(f"verify={self.verify!r}: drafts only unmask tokens: no revise or lengths with it")
        if self.lengths is not None and not self.choose.scored:
            raise ValueError(f"choose={self.choose!r} plans for a canvas that does not grow; with lengths give Scored")
        if isinstance(self.choose, Revise) and self.revise != self.choose:
            raise ValueError(f"choose={self.choose!r} lets tokens climb as well: give it as revise, too")

    @functools.cached_property
    def hooks(self) -> tuple[Hook, ...]:
        """The policy's hooks and theirs."""
        found: list[Hook] = []
        todo = [self.choose, self.draw, self.commit, self.revise, self.lengths, self.verify]
        while todo:
            if isinstance(part := todo.pop(0), Hook):
                found.append(part)
                todo += [getattr(part, field.name) for field in dataclasses.fields(part)]  # type: ignore[arg-type]
        return tuple(found)

    @functools.cached_property
    def needs(self) -> tuple[str, ...]:
        needs = {name for hook in self.hooks for name in hook.needs}
        needs |= {"token"} if self.commit else set()
        if self.draw == "argmax":
            needs |= {"top", "token"} if any(hook.jumps for hook in self.hooks) else {"top"}
        return tuple(sorted(needs))

    @property
    def top_k(self) -> int:
        return max(hook.top_k for hook in self.hooks)

    @property
    def whole(self) -> bool:
        return any(hook.whole for hook in self.hooks)

    @property
    def width(self) -> int:
        """Rows of the network that a row of the batch takes in a call."""
        return 1 if self.verify is None else self.verify.width


class State(NamedTuple):
    """Of a loop; rows first everywhere."""

    key: jax.Array  # [B]
    z: jax.Array
    canvas: jax.Array  # states at the start
    given: jax.Array
    length: jax.Array  # [B]
    sure: jax.Array  # float32 [B, S], probability of each token's last unmasking
    call: jax.Array  # int32 [B]
    memory: dict[str, Any]
    extra: dict[str, jax.Array]
    film: Any  # of diffusion.trajectory.Trajectory; () where nothing is recorded


class View(NamedTuple):
    """What hooks see of some rows in a call; all arrays have the rows first.

    z, level, canvas, given, active, block, current, call: see Rows and State; free: active and not given.
    stamp: int32 [b], what this call's random numbers are folded with; key [b] and keys [b, S]: for this call.
    t: float32 [b], masking level; progress: float32 [b], share of the unmasking that is done.
    top, log_top, log_second, entropy: [b, S], of the distribution over a token's states one level down (straight: over
      the vocabulary): the likeliest state, its log p, the second's, entropy in nats. token, log_token: the likeliest
      vocabulary token. log_own: log p of the token's present state; log_up: of its parent (0 where that is the mask).
    sure: [b, S], probability of each token's last unmasking; in `revise` and `remember` with this call's.
    ids, logs: [b, S, m], the m likeliest states and their log p, falling.
    drawn, log_drawn: in the order "draw_then_choose"; in `remember`, whatever the order, drawn is all that the call
      drew, before some was thrown away or taken back.
    order: [b, S], scores of the network's own head for an order (models.order); block_lengths: [b, n], of that for
      the length of the next block (models.block_lengths).

    Where no prediction was needed, states are z, log-probabilities -inf and entropies +inf.
    """

    z: jax.Array
    level: jax.Array
    canvas: jax.Array
    given: jax.Array
    active: jax.Array
    free: jax.Array
    length: jax.Array
    call: jax.Array
    memory: dict[str, Any]
    extra: dict[str, jax.Array]
    numbers: Numbers
    process: HierarchicalProcess
    straight: bool
    block: jax.Array
    current: jax.Array
    progress: jax.Array
    stamp: jax.Array = UNKNOWN
    key: jax.Array = UNKNOWN
    keys: jax.Array = UNKNOWN
    t: jax.Array = UNKNOWN
    top: jax.Array = UNKNOWN
    log_top: jax.Array = UNKNOWN
    log_second: jax.Array = UNKNOWN
    entropy: jax.Array = UNKNOWN
    token: jax.Array = UNKNOWN
    log_token: jax.Array = UNKNOWN
    log_own: jax.Array = UNKNOWN
    log_up: jax.Array = UNKNOWN
    sure: jax.Array = UNKNOWN
    ids: jax.Array = UNKNOWN
    logs: jax.Array = UNKNOWN
    drawn: jax.Array = UNKNOWN
    log_drawn: jax.Array = UNKNOWN
    order: jax.Array = UNKNOWN
    block_lengths: jax.Array = UNKNOWN

    @property
    def open(self):
        """bool [b, S]: tokens of the current block that are not written yet."""
        return self.free & (self.level > 0) & (self.block == self.current[:, None])

    def rows(self, wanted) -> Rows:
        return Rows(self.z, self.t, self.level, self.given, self.active, self.block, self.current, wanted, self.call,
                    self.extra)


def view_of(process: HierarchicalProcess, policy: Policy, numbers: Numbers, s: State) -> View:
    """The view before the network is called, without what depends on the hooks' memory: stamp, keys and t."""
    active = jnp.arange(s.z.shape[1])[None] < s.length[:, None]
    level, free = process.level_of(s.z), active & ~s.given
    before = jnp.cumsum(free, axis=1) - 1  # free tokens before this one; -1 in front of the first
    if policy.aligned:
        before = jnp.broadcast_to(jnp.arange(s.z.shape[1])[None], before.shape)
    block = before // policy.block if policy.block else jnp.minimum(before, 0)
    current = jnp.min(jnp.where(free & (level > 0), block, s.z.shape[1]), axis=1)
    due = jnp.sum(jnp.where(free, process.level_of(s.canvas), 0), axis=1)
    progress = 1 - jnp.sum(jnp.where(free, level, 0), axis=1) / jnp.maximum(due, 1)
    return View(s.z, level, s.canvas, s.given, active, free, s.length, s.call, s.memory, s.extra, numbers, process,
                policy.choose.straight, block.astype(jnp.int32), current, progress, key=s.key, sure=s.sure)
