"""Plans: when each position goes down which level, drawn before the network is called (docs/theory.md section 4).

Levels do not depend on content, so their whole reverse trajectory can be drawn first: K crossing times per position.
Grouped by a grid of T steps, singly, or m at a time, they become network calls. Positions are chosen without looking
at what is drawn there (choose-then-draw), which is exact.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from hdlm_jax.diffusion.draws import Number, row_keys, wide
from hdlm_jax.diffusion.levels import LevelChain

PLANS = ("grid", "events", "reveal")


class Plan(NamedTuple):
    """When each position goes down. All numbers may be traced: another T or m does not recompile. Rows come first.

    drop_call: int32 [B, S, K], the call at which a position falls below level k = 1..K; -1: it never was that high.
    calls: int32 [B], the most calls there can be.
    clock: float32 [B, S K], t of each row's falls in order, `group` [B] of them a call; None for a grid, whose call
      c is at t = 1 - c/calls.
    """

    drop_call: jax.Array
    calls: jax.Array
    clock: jax.Array | None
    group: jax.Array

    def next(self, level: jax.Array) -> jax.Array:
        """The next call at which a position falls, given `level` [B, S]: int32 [B]."""
        ahead = wide(jnp.arange(1, self.drop_call.shape[-1] + 1), level) <= level[..., None]
        call = jnp.where(ahead & (self.drop_call >= 0), self.drop_call, self.calls[:, None, None])
        return jnp.min(call, axis=(1, 2))

    def target(self, call: jax.Array) -> jax.Array:
        """Levels after calls [B]: int32 [B, S]."""
        return jnp.sum(self.drop_call > call[:, None, None], axis=-1, dtype=jnp.int32)

    def time(self, call: jax.Array) -> jax.Array:
        """t in [0, 1] that a time-conditioned network is told at calls [B]: float32 [B]; 0 after the last."""
        if self.clock is None:
            return ((self.calls - call) / self.calls).astype(jnp.float32)
        at = jnp.minimum(call * self.group, self.clock.shape[1] - 1)
        t = jnp.take_along_axis(self.clock, at[:, None], axis=1)[:, 0]
        return jnp.where(call < self.calls, t, 0.0)


def plan(key: jax.Array, chain: LevelChain, level0: jax.Array, kind: str = "grid", steps: Number = 128,
         reveals: Number = 1) -> Plan:
    """Draw the levels' reverse trajectory from start levels level0 int [B, S] (K at a mask, 0 at given tokens).

    Args:
      key: one key (row b uses fold_in(key, b)) or keys [B].
      kind: "grid", the exact ancestral kernel on T = `steps` equal steps of t; "events", one fall a call in each row
        (no discretisation error); "reveal", exactly `reveals` falls a call in each row, the last call taking the rest.
      steps, reveals: integers, traced or not.
    """
    chex.assert_rank(level0, 2)
    if kind not in PLANS:
        raise ValueError(f"plan={kind!r}: choose one of {', '.join(PLANS)}")
    rows, tokens = level0.shape
    levels = chain.num_levels
    keys = row_keys(key, rows)
    times = jax.vmap(lambda k: chain.crossing_times(k, (tokens,)))(keys)
    counts = wide(jnp.arange(1, levels + 1), level0) <= level0[..., None]  # has that crossing to undo
    each = lambda a: jnp.broadcast_to(jnp.asarray(a, jnp.int32), (rows,))  # noqa: E731
    if kind == "grid":
        # 1 - t = e^-tau; step c undoes the crossings with c/T <= 1 - t < (c+1)/T
        call = jnp.minimum(jnp.floor(jnp.exp(-times) * steps).astype(jnp.int32), steps - 1)
        return Plan(jnp.where(counts, call, -1), each(steps), None, each(1))
    # highest level first in a token, so that a tie keeps its order
    order_by = jnp.where(counts, times, -1.0)[..., ::-1].reshape(rows, -1)
    order = jnp.argsort(-order_by, axis=-1, stable=True)
    group = jnp.int32(reveals if kind == "reveal" else 1)
    call = jnp.argsort(order, axis=-1).astype(jnp.int32).reshape(rows, tokens, levels)[..., ::-1] // group
    falling = jnp.take_along_axis(order_by, order, axis=-1)
    clock = -jnp.expm1(-jnp.maximum(falling, 0.0))
    calls = (tokens * levels + group - 1) // group
    return Plan(jnp.where(counts, call, -1), each(calls), clock.astype(jnp.float32), each(group))
