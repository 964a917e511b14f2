"""The way back of latents (models.latents), before the first symbol falls."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from hdlm_jax.diffusion.draws import Number, fold, row_keys
from hdlm_jax.diffusion.prediction import TripCount
from hdlm_jax.models.latents import LatentProcess, LatentState

Estimate: TypeAlias = Callable[[LatentState, jax.Array], jax.Array]  # (state [B, S], t [B]) -> e^ [B, P, D]


def sample(key: jax.Array, estimate: Estimate, process: LatentProcess, z: jax.Array, *, steps: Number,
           sync_trip_count: TripCount = lambda n: n) -> tuple[LatentState, jax.Array]:
    """Observations of the latents at s_max, beside a canvas z int32 [B, S] that stays, on `steps` equal steps of t.

    A step moves U by the mean, d e^ + sqrt(d) eps. Its law is the model's in the limit of many steps alone: there is no
    table of vectors to draw from in place of the mean, as a channel of words has one.

    Args:
      key: one key or keys [B]. steps: int, traced or not.

    Returns:
      (state at s_max, calls int32 []); a batch without a mask is left alone, in 0 calls.
    """
    keys = row_keys(key, len(z))

    def step(call: jax.Array, u: jax.Array) -> jax.Array:
        share = jnp.float32(call) / steps
        s, then = process.at(share), process.at((jnp.float32(call) + 1) / steps)
        mean = estimate(LatentState(z, u, jnp.full(z.shape, s)), jnp.full(len(z), 1 - 0.5 * share)).reshape(u.shape)
        eps = jax.vmap(lambda k: jax.random.normal(k, u.shape[1:]))(fold(keys, call))
        return u + (then - s) * mean + jnp.sqrt(then - s) * eps

    calls = sync_trip_count(jnp.where(jnp.any(process.level_of(z) > 0), jnp.int32(steps), 0))
    u = jax.lax.fori_loop(0, calls, step, jnp.zeros((*z.shape, process.width // process.per)))
    return LatentState(z, u, jnp.full(z.shape, process.ratio_end, jnp.float32)), calls
