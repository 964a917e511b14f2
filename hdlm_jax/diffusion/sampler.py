"""Generation: plan first, fill after (docs/theory.md section 4).

Levels ignore content, so a whole reverse trajectory of levels is drawn before any network call: K crossing times a
token. Grouped by a grid of T steps, singly, or m at a time, they become the calls at which each token drops. The
positions are chosen without looking at what is drawn there (choose-then-draw), which is exact.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from hdlm_jax.diffusion.levels import LevelChain
from hdlm_jax.diffusion.process import fold, row_keys, wide

PLANS = ("grid", "events", "reveal")


class Plan(NamedTuple):
    """When each token drops.

    drop_call: int32 [B, S, K], the call at which a token falls below level k = 1..K; -1 where it never was that high.
    time: float32 [B, calls], t in [0, 1] that a time-conditioned network is told at each call.
    """

    drop_call: jax.Array
    time: jax.Array

    def target(self, call):
        """Levels after call number `call`: int32 [B, S]; before the first one for -1."""
        return jnp.sum(self.drop_call > call, axis=-1, dtype=jnp.int32)


def num_calls(kind: str, tokens: int, levels: int, steps: int, reveals: int = 1) -> int:
    """Calls a plan may need at most (static): T for a grid, S K events, or those in groups of `reveals`."""
    if kind not in PLANS:
        raise ValueError(f"plan={kind!r}: choose one of {', '.join(PLANS)}")
    if kind == "grid":
        return steps
    return -(-tokens * levels // (reveals if kind == "reveal" else 1))


def plan(key, chain: LevelChain, level0, kind: str = "grid", steps: int = 128, reveals: int = 1) -> Plan:
    """Draw the levels' reverse trajectory from start levels level0 int [B, S] (K at a mask, 0 at given words).

    Args:
      key: one key (row b uses fold_in(key, b)) or keys [B].
      kind: "grid", the exact ancestral kernel on T = `steps` equal steps of t; "events", one drop a call in each row
        (no discretisation error); "reveal", exactly `reveals` drops a call in each row, the last call taking the rest.
    """
    chex.assert_rank(level0, 2)
    rows, tokens = level0.shape
    levels = chain.num_levels
    num_calls(kind, tokens, levels, steps, reveals)  # refuses an unknown kind
    keys = row_keys(key, rows)
    times = jax.vmap(lambda k: chain.crossing_times(k, (tokens,)))(keys)
    counts = wide(jnp.arange(1, levels + 1), level0) <= level0[..., None]  # has that crossing to undo
    if kind == "grid":
        # 1 - t = e^-tau; step c undoes the crossings with c/T <= 1 - t < (c+1)/T
        call = jnp.minimum(jnp.floor(jnp.exp(-times) * steps).astype(jnp.int32), steps - 1)
        time = jnp.broadcast_to(1.0 - jnp.arange(steps) / steps, (rows, steps))
    else:
        # highest level first in a token, so that a tie keeps its order
        order_by = jnp.where(counts, times, -1.0)[..., ::-1].reshape(rows, -1)
        order = jnp.argsort(-order_by, axis=-1, stable=True)
        group = reveals if kind == "reveal" else 1
        call = jnp.argsort(order, axis=-1).astype(jnp.int32).reshape(rows, tokens, levels)[..., ::-1] // group
        falling = jnp.take_along_axis(order_by, order, axis=-1)[:, ::group]
        time = -jnp.expm1(-jnp.maximum(falling, 0.0))
    return Plan(jnp.where(counts, call, -1), time.astype(jnp.float32))


def sample(key, denoise, process, z, plan: Plan, *, clusters: str = "exact", temperature: float = 1.0,
           top_p: float = 1.0):
    """Fill symbols z int32 [B, S] along `plan`; every call at which no token of the batch drops is skipped.

    Args:
      key: one key (row b uses fold_in(key, b)) or keys [B]; results do not depend on a row's batch mates.
      denoise: function (z [B, S], t [B]) -> prediction or logits [B, S, V].
      process, clusters, temperature, top_p: see HierarchicalProcess.descend.

    Returns:
      (words int32 [B, S], stats): stats["calls"] int32, network calls made; stats["row_forwards"] int32 [B], those
      at which this row changed.
    """
    keys = row_keys(key, z.shape[0])

    def step(call, carry):
        z, calls, forwards = carry
        target = plan.target(call)
        drops = jnp.any(target < plan.target(call - 1), axis=-1)

        def fill(z):
            prediction = denoise(z, jax.lax.dynamic_index_in_dim(plan.time, call, axis=1, keepdims=False))
            return process.descend(fold(keys, call), prediction, z, target, clusters, temperature, top_p)

        busy = jnp.any(drops)
        return jax.lax.cond(busy, fill, lambda z: z, z), calls + busy, forwards + drops

    start = (z, jnp.int32(0), jnp.zeros(z.shape[:1], jnp.int32))
    z, calls, forwards = jax.lax.fori_loop(0, plan.time.shape[1], step, start)
    return z, {"calls": calls, "row_forwards": forwards}
