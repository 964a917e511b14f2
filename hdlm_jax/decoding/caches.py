"""Denoisers that keep keys and values from one call to the next (docs/theory.md section 4).

One mechanism: a rule names the tokens that are computed in a call. Their hidden states are made by `Network.partial`,
layer by layer, against keys and values that are new where computed and as last computed elsewhere; all other tokens
keep their hidden states, and the head is asked at those. Nothing else is computed, so the saving is real, and what is
approximate is so by the rule alone.

BlockCausal approximates nothing, as long as the network is not told the time (model.time_conditioning=False) or is told
the same one in every call (`t` of `make`): what it should predict does not depend on time at xi = 1. Told the time of
each call, it meets keys and values of other times, with every rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from hdlm_jax.decoding.policy import Rows
from hdlm_jax.models.network import At, Network


class Turn(NamedTuple):
    """What a rule is told of a call beside its rows."""

    changed: jax.Array  # bool [b, S]: another symbol than in the cache's last call; in its first all tokens
    moved: jax.Array  # bool [b]: another block is written than in that call
    first: jax.Array  # int32 [b]: the first block that is or was written, or has changed
    last: jax.Array  # int32 [b]: the last block that is written or has a wanted token
    mask: int  # level of the mask


class Rule(Protocol):
    """Which tokens are computed in a call; a frozen dataclass. block_causal: see BlockCausal."""

    @property
    def block_causal(self) -> bool: ...

    def stale(self, rows: Rows, turn: Turn) -> jax.Array:
        """bool [b, S]: tokens to compute."""


@dataclasses.dataclass(frozen=True)
class Whole:
    """No cache: all tokens in every call. block_causal: a token sees its own block and those before (BlockCausal)."""

    block_causal: bool = False


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Fast-dLLM (arXiv 2505.22618), prefix cache: all when a block begins, then the block and what is behind it."""

    block_causal = False

    def stale(self, rows: Rows, turn: Turn):
        return turn.moved[:, None] | (rows.block >= rows.current[:, None]) | rows.wanted | turn.changed


@dataclasses.dataclass(frozen=True)
class Dual:
    """Fast-dLLM (arXiv 2505.22618), dual cache: all when a block begins, then the block alone."""

    block_causal = False

    def stale(self, rows: Rows, turn: Turn):
        return turn.moved[:, None] | (rows.block == rows.current[:, None]) | rows.wanted | turn.changed


@dataclasses.dataclass(frozen=True)
class FreeCache:
    """FlashDLM (arXiv 2505.21467): prompt and finished blocks once, a block once more when it is finished, the others
    in every call. block_causal: for a network of that attention (see BlockCausal); then nothing is approximated."""

    block_causal: bool = False

    def stale(self, rows: Rows, turn: Turn):
        return (rows.block >= turn.first[:, None]) | rows.wanted


@dataclasses.dataclass(frozen=True)
class BlockCausal:
    """BD3-LM (arXiv 2503.09573): a token sees its own block and those before. The block that is written in every call,
    once more when it is finished; those to come only where wanted. Equals Whole(block_causal=True)."""

    block_causal = True

    def stale(self, rows: Rows, turn: Turn):
        return (rows.block >= turn.first[:, None]) & (rows.block <= turn.last[:, None])


@dataclasses.dataclass(frozen=True)
class DKV:
    """dKV-Cache (arXiv 2505.15781): keys and values of a token settle one call after it is written, and are kept then.

    All in every `refresh`-th call of a row; between those what is not yet a word, and what has just changed. Clusters
    are still moving, so they are kept for a shorter time: `refresh_clusters` calls, 1 for not at all. `window` = w is
    the greedy variant, for an order that is known beforehand: between refreshes only what has just changed, what is
    wanted, and of the tokens within w places of these those that are not yet words. refresh=1: no cache.
    """

    refresh: int | jax.Array = 8
    refresh_clusters: int | jax.Array = 1
    window: int | jax.Array | None = None
    block_causal = False

    def __post_init__(self):
        least = {"refresh": 1, "refresh_clusters": 1, "window": 0}
        for name, low in least.items():
            if isinstance(value := getattr(self, name), int) and value < low:
                raise ValueError(f"DKV({name}={value}): must be at least {low}")

    def stale(self, rows: Rows, turn: Turn):
        again = lambda period: (rows.call % period == 0)[:, None]  # noqa: E731
        moving = (rows.level == turn.mask) | (rows.level > 0) & again(self.refresh_clusters)
        if self.window is not None:
            moving = (rows.level > 0) & _near(rows.wanted, self.window)
        return again(self.refresh) | moving | rows.wanted | turn.changed


KINDS: dict[str, Any] = {"whole": Whole, "prefix": Prefix, "dual": Dual, "free": FreeCache,
                         "block_causal": BlockCausal, "dkv": DKV}


def _near(wanted, window):
    """Tokens at most `window` places from a wanted one: bool [b, S]."""
    far = 2 * wanted.shape[1]
    place = jnp.arange(wanted.shape[1])[None]
    before = jax.lax.cummax(jnp.where(wanted, place, -far), axis=1)
    behind = jax.lax.cummin(jnp.where(wanted, place, far), axis=1, reverse=True)
    return jnp.minimum(place - before, behind - place) <= window


class Memory(NamedTuple):
    """A cache: rows on axis 1."""

    k: jax.Array  # [blocks, b, S, H, D/H]
    v: jax.Array
    hidden: jax.Array  # float32 [1, b, S, D], when last computed
    z: jax.Array  # int32 [1, b, S], in the last call; -1: none
    current: jax.Array  # int32 [1, b], in the last call; -2: none


@dataclasses.dataclass(frozen=True, eq=False)
class Uncached:
    """The denoiser of Whole."""

    spec: Whole
    network: Network
    params: Any
    t: float | jax.Array | None
    cut: bool
    rows_axis, forwards = 1, 1

    def start(self, rows: Rows):
        return ()

    def __call__(self, cache, rows: Rows):
        seen = rows.active[:, None] if self.cut else None
        if self.spec.block_causal:
            seen = rows.active[:, None] & (rows.block[:, None] <= rows.block[:, :, None])
        return self.network.denoise(self.params, rows.z, _time(self.t, rows), seen), cache


@dataclasses.dataclass(frozen=True, eq=False)
class Cached:
    """A denoiser that computes in each call what its rule says; see `make`."""

    spec: Rule
    network: Network
    params: Any
    t: float | jax.Array | None
    mask: int
    sizes: tuple[int, ...] | None
    sync_trip_count: Callable
    rows_axis, forwards = 1, 1

    def start(self, rows: Rows) -> Memory:
        """Nothing is known of any token."""
        b, s = rows.z.shape
        k, v, _ = self.network.empty_cache(b, s)
        return Memory(k, v, jnp.zeros((1, b, s, self.network.width)), jnp.full((1, b, s), -1), jnp.full((1, b), -2))

    def stale(self, memory: Memory, rows: Rows):
        """What is computed in this call: bool [b, S]."""
        changed = jnp.where(rows.active, rows.z, -1) != memory.z[0]
        first = jnp.min(jnp.where(changed, rows.block, rows.current[:, None]), axis=-1)
        last = jnp.max(jnp.where(rows.wanted, rows.block, rows.current[:, None]), axis=-1)
        turn = Turn(changed, rows.current != memory.current[0], jnp.minimum(first, memory.current[0]), last, self.mask)
        return self.spec.stale(rows, turn) & rows.active

    def __call__(self, memory: Memory, rows: Rows):
        b, s = rows.z.shape
        stale = self.stale(memory, rows)
        count, order = jnp.sum(stale, axis=-1), jnp.argsort(~stale, stable=True)
        row, t = jnp.arange(b)[:, None], _time(self.t, rows)

        def compute(size, hidden, k, v):
            at = order[:, :size]
            place = jnp.where(jnp.arange(size)[None] < count[:, None], at, s)
            seen = rows.active[:, None]
            if self.spec.block_causal:
                seen = seen & (rows.block[:, None] <= rows.block[row, at][..., None])
            new, (k, v) = self.network.apply({"params": self.params}, rows.z[row, at], t, (k, v), place, seen,
                                             method="partial")
            return hidden.at[0, row, place].set(new, mode="drop"), k, v

        sizes = (0, *(sizes_of(s) if self.sizes is None else sorted(n for n in self.sizes if 0 < n < s)), s)
        kind = jnp.sum(self.sync_trip_count(jnp.max(count)) > jnp.asarray(sizes))
        state = memory.hidden, memory.k, memory.v
        for i, size in enumerate(sizes[1:], 1):  # loops of at most one turn: lax.switch would copy what it is handed
            state = jax.lax.fori_loop(0, (kind == i).astype(jnp.int32), lambda _, a, n=size: compute(n, *a), state)
        hidden, k, v = state
        memory = Memory(k, v, hidden, jnp.where(rows.active, rows.z, -1)[None], rows.current[None])
        return At(self.network.head, self.params["head"], hidden[0]), memory


def _time(t, rows: Rows):
    return rows.t if t is None else jnp.full_like(rows.t, t)


def sizes_of(seq_len: int) -> tuple[int, ...]:
    """A half, a quarter, .. of seq_len, down to a 32nd, not fewer than 16; rising."""
    return tuple(n for i in range(5, 0, -1) if (n := -(-seq_len // 2**i)) >= 16)


def make(spec: Whole | Rule | str, network: Network, params, hierarchy, *, numbers: Mapping[str, Any] | None = None,
         t: float | jax.Array | None = None, sizes: tuple[int, ...] | None = None,
         sync_trip_count: Callable = lambda count: count, cut: bool = True):
    """The denoiser (see `policy.Denoiser`) of a network, with the cache that `spec` describes.

    Args:
      spec: an object of one of the classes in KINDS, static; or its name there, for its defaults.
      params: of the network; hierarchy: of its words.
      numbers: what to put in place of the spec's fields, traced or not: periods and window of DKV.
      t: noise time in [0, 1] that the network is told in every call; None: that of the row.
      sizes: numbers of tokens of a row that can be computed at once, beside all; the least that is enough for all rows
        on show is taken. None: see `sizes_of`. They change no result; each is compiled by itself.
      cut: whether rows may end before S does; without a cache a mask costs time.
      sync_trip_count: where devices that share the batch must keep step, the largest count of all (parallel.OverBatch).

    Raises:
      ValueError: an unknown spec or number, a causal network, a time out of range.
    """
    rule: Any = KINDS[spec]() if isinstance(spec, str) and spec in KINDS else spec
    if type(rule) not in KINDS.values():
        raise ValueError(f"cache={rule!r}: choose one of {', '.join(KINDS)}")
    fields = [field.name for field in dataclasses.fields(rule) if field.name != "block_causal"]
    if wrong := [name for name in numbers or {} if name not in fields]:
        raise ValueError(f"cache={rule!r} has no number {', '.join(wrong)}: choose of {fields}")
    if network.causal:
        raise ValueError("cache: a causal network predicts the word behind; diffusion/autoregressive.py has its cache")
    if isinstance(t, (int, float)) and not 0 <= t <= 1:
        raise ValueError(f"t={t}: a noise time is in [0, 1]")
    rule = dataclasses.replace(rule, **numbers or {})
    if isinstance(rule, Whole):
        return Uncached(rule, network, params, t, cut)
    return Cached(rule, network, params, t, hierarchy.num_levels, sizes, sync_trip_count)
