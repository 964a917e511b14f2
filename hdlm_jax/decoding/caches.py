"""Denoisers that keep keys and values between calls (docs/decoding.md section 4).

In each call a `Rule` names the tokens to compute. `Trunk.hidden_at` computes their hidden states layer by layer,
against new keys and values where computed and old ones elsewhere; all other tokens keep their hidden states. Nothing
else is computed, so the saving is real, and the rule alone decides what is approximate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from hdlm_jax.decoding.policy import Rows
from hdlm_jax.models.features import given
from hdlm_jax.models.heads import At
from hdlm_jax.models.trunk import Trunk


class Rule(Protocol):
    """Which tokens to compute in a call. block_causal: a token sees its own block and earlier ones."""

    @property
    def block_causal(self) -> bool: ...

    def stale(self, rows: Rows, changed: jax.Array, before: jax.Array, mask: int) -> jax.Array:
        """bool [b, S], tokens to compute. changed: bool [b, S], those that show another state than in the last call (at
        first all); before: int32 [b], the block that was being written then; mask: level of the mask."""


def _first(rows: Rows, changed, before):
    """int32 [b, 1]: the first block that is or was being written, or has changed."""
    first = jnp.min(jnp.where(changed, rows.block, rows.current[:, None]), axis=-1)
    return jnp.minimum(first, before)[:, None]


@dataclasses.dataclass(frozen=True)
class FastDLLM:
    """Fast-dLLM (arXiv 2505.22618): all tokens when a block begins, then the block and what follows (prefix cache) or,
    with dual, the block alone (dual cache)."""

    dual: bool = False
    block_causal = False

    def stale(self, rows: Rows, changed, before, mask):
        current = rows.current[:, None]
        here = rows.block == current if self.dual else rows.block >= current
        return (rows.current != before)[:, None] | here | rows.wanted | changed


@dataclasses.dataclass(frozen=True)
class FreeCache:
    """FlashDLM (arXiv 2505.21467): the prompt once, a block in every call until it is finished and once more after."""

    block_causal = False

    def stale(self, rows: Rows, changed, before, mask):
        return (rows.block >= _first(rows, changed, before)) | rows.wanted


@dataclasses.dataclass(frozen=True)
class BlockCausal:
    """BD3-LM (arXiv 2503.09573): the current block in every call and once more when finished, later ones where wanted.

    Exact where the network is not told the time (model.time_conditioning=False).
    """

    block_causal = True

    def stale(self, rows: Rows, changed, before, mask):
        last = jnp.max(jnp.where(rows.wanted, rows.block, rows.current[:, None]), axis=-1)
        return (rows.block >= _first(rows, changed, before)) & (rows.block <= last[:, None])


@dataclasses.dataclass(frozen=True)
class DKV:
    """dKV-Cache (arXiv 2505.15781): keys and values of a token are kept from one call after it is written.

    refresh: all tokens are computed in every `refresh`-th call; in between those not yet unmasked to the vocabulary, or
    changed. refresh_clusters: the same for clusters alone, which may change again (1: they are never kept).
    window: w, the greedy variant for an order known beforehand: in between only tokens that have just changed, those
    wanted, and those not yet unmasked within w places of these.
    """

    refresh: int = 8
    refresh_clusters: int = 1
    window: int | None = None
    block_causal = False

    def stale(self, rows: Rows, changed, before, mask):
        def due(period):
            return (rows.call % period == 0)[:, None]

        moving = (rows.level == mask) | (rows.level > 0) & due(self.refresh_clusters)
        if self.window is not None:
            place, far = jnp.arange(rows.z.shape[1])[None], 2 * rows.z.shape[1]
            before = jax.lax.cummax(jnp.where(rows.wanted, place, -far), axis=1)
            after = jax.lax.cummin(jnp.where(rows.wanted, place, far), axis=1, reverse=True)
            moving = (rows.level > 0) & (jnp.minimum(place - before, after - place) <= self.window)
        return due(self.refresh) | moving | rows.wanted | changed


class Memory(NamedTuple):
    """A cache: rows on axis 1."""

    kept: tuple[jax.Array, ...]  # as Trunk.empty_cache
    hidden: jax.Array  # float32 [1, b, S, D], when last computed
    z: jax.Array  # int32 [1, b, S], in the last call; -1: none
    current: jax.Array  # int32 [1, b], in the last call; -2: none


@dataclasses.dataclass(frozen=True, eq=False)
class Uncached:
    """The denoiser without a cache. cut: rows may end before S does, which needs a mask and costs time."""

    network: Trunk
    params: Mapping[str, Any]
    cut: bool = True
    forwards = 1

    def start(self, rows: Rows):
        return ()

    def __call__(self, cache, rows: Rows):
        params = given(self.params, rows.extra.get("features"))
        return self.network.denoise(params, rows.z, rows.t, rows.active[:, None] if self.cut else None), cache


@dataclasses.dataclass(frozen=True, eq=False)
class Cached:
    """The denoiser of a `Rule`.

    sizes: how many tokens of a row can be computed at once beside all S; a call takes the least that is enough for
      every row here. They change no result; each is compiled by itself. None: S/32, .., S/2 where these are >= 16.
    sync_trip_count: see loop.Sampling.
    """

    spec: Rule
    network: Trunk
    params: Mapping[str, Any]
    sizes: tuple[int, ...] | None = None
    sync_trip_count: Callable = lambda count: count  # noqa: E731
    forwards = 1

    def start(self, rows: Rows) -> Memory:
        b, s = rows.z.shape
        kept, hidden = self.network.empty_cache(b, s), jnp.zeros((1, b, s, self.network.width))
        return Memory(kept, hidden, jnp.full((1, b, s), -1), jnp.full((1, b), -2))

    def stale(self, memory: Memory, rows: Rows):
        """bool [b, S]: tokens to compute in this call."""
        changed = jnp.where(rows.active, rows.z, -1) != memory.z[0]
        mask = self.network.head.hierarchy.num_levels
        return self.spec.stale(rows, changed, memory.current[0], mask) & rows.active

    def __call__(self, memory: Memory, rows: Rows):
        b, s = rows.z.shape
        stale = self.stale(memory, rows)
        count, order = jnp.sum(stale, axis=-1), jnp.argsort(~stale, stable=True)
        row, params = jnp.arange(b)[:, None], given(self.params, rows.extra.get("features"))

        def compute(size, hidden, kept):
            at = order[:, :size]
            place = jnp.where(jnp.arange(size)[None] < count[:, None], at, s)
            seen = rows.active[:, None]
            if self.spec.block_causal:
                seen = seen & (rows.block[:, None] <= rows.block[row, at][..., None])
            new, kept = self.network.hidden_at(params, rows.z[row, at], rows.t, kept, place, seen)
            return hidden.at[0, row, place].set(new, mode="drop"), kept

        halves = [n for i in range(5, 0, -1) if (n := -(-s // 2**i)) >= 16]
        sizes = (0, *(halves if self.sizes is None else self.sizes), s)
        kind = jnp.sum(self.sync_trip_count(jnp.max(count)) > jnp.asarray(sizes))
        state = memory.hidden, memory.kept
        for i, size in enumerate(sizes[1:], 1):  # loops of at most one pass: lax.switch would copy what it is handed
            state = jax.lax.fori_loop(0, (kind == i).astype(jnp.int32), lambda _, a, n=size: compute(n, *a), state)
        hidden, kept = state
        memory = Memory(kept, hidden, jnp.where(rows.active, rows.z, -1)[None], rows.current[None])
        return At(self.network.head, self.network.head_params(self.params), hidden[0]), memory
