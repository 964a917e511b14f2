"""The way back of symbols and observations together (models.channel): one word a position moves both at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from hdlm_jax.diffusion import trajectory
from hdlm_jax.diffusion.draws import Number, fold, row_keys, token_keys
from hdlm_jax.diffusion.prediction import Predictions, TripCount
from hdlm_jax.models.channel import ChannelProcess, State

Denoise: TypeAlias = Callable[[State, jax.Array], Predictions]  # (state [B, S], t [B])


def sample(key: jax.Array, denoise: Denoise, process: ChannelProcess, z: jax.Array, *, steps: Number,
           temperature: Number = 1.0, top_p: Number = 1.0, sync_trip_count: TripCount = lambda n: n, tokens: int = 128,
           frames: int = 0) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Tokens int32 [B, S] from a canvas z (masks where free), on `steps` equal steps of t.

    When a position's level falls is drawn beforehand (it does not depend on words). Given tokens stay, and a given
    cluster falls when its level does. The law of one position's step is exact at any number of steps; that positions
    move independently in a step is so for many alone.

    Args:
      key: one key or keys [B]. denoise: function (State [b, S], t [b]) -> prediction, asked for select(index).
      process: with its parameters. steps: int, traced or not. tokens: positions predicted at once; changes no result.
      temperature, top_p, sync_trip_count, frames: as of hdlm_jax.diffusion.gidd.sample.

    Returns:
      (tokens, stats) as hdlm_jax.decoding.loop.sample; the confidence is p of the token when it was drawn.
    """
    keys, rows = row_keys(key, z.shape[0]), z.shape[:1]
    times = jax.vmap(lambda k: process.chain.crossing_times(k, z.shape[1:]))(fold(keys, 0))
    count = -(-z.size // tokens)
    at = jnp.minimum(jnp.arange(count * tokens), z.size - 1).reshape(count, tokens)
    busy = ~jnp.all(process.level_of(z) == 0, axis=-1)

    def told(call: Number) -> jax.Array:
        return jnp.broadcast_to(1 - call / steps, rows).astype(jnp.float32)

    def step(call: jax.Array, carry: tuple) -> tuple:
        state, sure, film = carry
        then = -jnp.log(jnp.where(call + 1 < steps, (call + 1) / steps, 1.0))  # noise time after the step, 0 at the end
        s, level = jnp.asarray(process.ratio(then)), process.level_of(state.z)
        target = jnp.sum(times <= then, axis=-1).reshape(-1)
        prediction, each = denoise(state, told(call)), token_keys(fold(fold(keys, 1), call), z.shape).reshape(-1)
        flat = State(*(a.reshape(z.size, *a.shape[2:]) for a in state))

        def some(i: jax.Array) -> tuple[State, jax.Array]:
            here = State(*(a[i] for a in flat))
            return process.step(each[i], prediction.select(i), here, target[i], s, temperature, top_p)

        moved = jax.lax.map(some, at)
        after, law = jax.tree.map(lambda a, old: a.reshape(-1, *a.shape[2:])[: z.size].reshape(old.shape), moved,
                                  (state, sure))
        sure = jnp.where((process.level_of(after.z) == 0) & (level > 0), law, sure)
        return after, sure, record.expose(film, call, (after.z, sure, told(call + 1)))

    record = trajectory.Trajectory(frames, steps)
    calls = sync_trip_count(jnp.where(jnp.any(busy), jnp.int32(steps), 0))
    state, sure = process.state(z, jnp.zeros((*z.shape, process.width)), jnp.zeros(())), jnp.zeros(z.shape, jnp.float32)
    start = state, sure, record.start((z, sure, told(0)))
    state, _, film = jax.lax.fori_loop(0, calls, step, start)
    return state.z, {"calls": calls, "row_forwards": jnp.where(busy, calls, 0)} | record.stats(
        film, jnp.broadcast_to(calls, rows))
