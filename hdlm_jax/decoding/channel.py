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
           singly: bool = False, told: Number | None = None, temperature: Number = 1.0, top_p: Number = 1.0,
           sync_trip_count: TripCount = lambda n: n, tokens: int = 128, frames: int = 0
           ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Tokens int32 [B, S] from a canvas z (masks where free), on `steps` equal steps of t.

    When a position's level falls, and where s jumps, is drawn beforehand (it does not depend on words). Given tokens
    stay, and a given cluster falls when its level does. The law of one position's step is exact at any number of steps;
    that positions move independently in a step is so for many alone.

    Args:
      key: one key or keys [B]. denoise: function (State [b, S], t [b]) -> prediction, asked for select(index).
      process: with its parameters. steps: int, traced or not. tokens: positions predicted at once; changes no result.
      singly: one fall or jump a call in each row, S (K + M) calls, in place of steps: no discretisation of time. Of
        token times, whose s jumps.
      told: in [0, 1); the network is told the time t + told (1 - t), and its ratio, in place of t (the CEDI of
        DINOISER, arXiv 2302.10025; shared times). Above 0 that leaves the model's law. None or 0: the time as it is.
      temperature, top_p, sync_trip_count, frames: as of hdlm_jax.diffusion.gidd.sample.

    Returns:
      (tokens, stats) as hdlm_jax.decoding.loop.sample; the confidence is p of the token when it was drawn.
    """
    keys, rows = row_keys(key, z.shape[0]), z.shape[:1]
    times = jax.vmap(lambda k: process.chain.crossing_times(k, z.shape[1:]))(fold(keys, 0))
    every = jnp.concatenate([times, process.jumps(fold(keys, 2), z.shape)], axis=-1).reshape(len(z), -1)
    events = -jnp.sort(-every, axis=-1) if singly else None
    count = -(-z.size // tokens)
    at = jnp.minimum(jnp.arange(count * tokens), z.size - 1).reshape(count, tokens)
    busy = ~jnp.all(process.level_of(z) == 0, axis=-1)

    end = steps if events is None else events.shape[1]

    def noise_time(call: Number) -> jax.Array:  # before a call, [B]; 0 at the end
        left = -jnp.log(jnp.where(call < end, call / end, 1.0))
        at = left if events is None else jnp.where(call < end, events[:, jnp.minimum(call, end - 1)], 0.0)
        return jnp.broadcast_to(at, rows).astype(jnp.float32)

    def time(call: Number) -> jax.Array:
        grid = jnp.broadcast_to(1 - call / end, rows).astype(jnp.float32)
        return grid if events is None else -jnp.expm1(-noise_time(call))

    def view(state: State, t: jax.Array) -> tuple[State, jax.Array]:  # what the network is told
        if told is None:
            return state, t
        t = t + told * (1 - t)
        ratio = jnp.asarray(process.ratio(-jnp.log1p(-t)))[:, None]
        known = process.level_of(state.z) == 0
        return state._replace(told=jnp.where(known | (told == 0), state.s, ratio)), t

    def step(call: jax.Array, carry: tuple) -> tuple:
        state, sure, film = carry
        then, level = noise_time(call + 1), process.level_of(state.z)
        s = process.ratios(fold(keys, 2), then, z.shape).reshape(-1)
        target = jnp.sum(times <= jnp.asarray(process.symbol_time(then)[0])[:, None, None], axis=-1).reshape(-1)
        prediction, each = denoise(*view(state, time(call))), token_keys(fold(fold(keys, 1), call), z.shape).reshape(-1)
        flat = jax.tree.map(lambda a: a.reshape(z.size, *a.shape[2:]), state)

        def some(i: jax.Array) -> tuple[State, jax.Array]:
            here = jax.tree.map(lambda a: a[i], flat)
            return process.step(each[i], prediction.select(i), here, target[i], s[i], temperature, top_p)

        moved = jax.lax.map(some, at)
        after, law = jax.tree.map(lambda a, old: a.reshape(-1, *a.shape[2:])[: z.size].reshape(old.shape), moved,
                                  (state, sure))
        sure = jnp.where((process.level_of(after.z) == 0) & (level > 0), law, sure)
        return after, sure, record.expose(film, call, (after.z, sure, time(call + 1)))

    record = trajectory.Trajectory(frames, end)
    calls = sync_trip_count(jnp.where(jnp.any(busy), jnp.int32(end), 0))
    state, sure = process.state(z, jnp.zeros((*z.shape, process.width)), jnp.zeros(())), jnp.zeros(z.shape, jnp.float32)
    start = state, sure, record.start((z, sure, time(0)))
    state, _, film = jax.lax.fori_loop(0, calls, step, start)
    return state.z, {"calls": calls, "row_forwards": jnp.where(busy, calls, 0)} | record.stats(
        film, jnp.broadcast_to(calls, rows))
