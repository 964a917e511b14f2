"""The way back of symbols and observations together (models.channel): one word a position moves both at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp

from hdlm_jax.decoding.choose import Confidence, best
from hdlm_jax.decoding.statistics import statistics
from hdlm_jax.diffusion import trajectory
from hdlm_jax.diffusion.draws import Number, fold, row_keys, token_keys, wide
from hdlm_jax.diffusion.prediction import Prediction, Predictions, TripCount
from hdlm_jax.models.channel import ChannelProcess, State, along
from hdlm_jax.models.channel_times import TokenTimes

Denoise: TypeAlias = Callable[[State, jax.Array], Predictions]  # (state [B, S], t [B])


def sample(key: jax.Array, denoise: Denoise, process: ChannelProcess, z: jax.Array, *, steps: Number,
           singly: bool = False, score: Confidence | None = None, told: Number | None = None, temperature: Number = 1.0,
           top_p: Number = 1.0, sync_trip_count: TripCount = lambda n: n, tokens: int = 128, frames: int = 0
           ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Tokens int32 [B, S] from a canvas z (masks where free), on `steps` equal steps of t.

    When a position's level falls, and where s jumps, is drawn beforehand (it does not depend on words). Given tokens
    stay, and a given cluster falls when its level does. The law of one position's step is exact at any number of steps;
    that positions move independently in a step is so for many alone.

    Args:
      key: one key or keys [B]. denoise: function (State [b, S], t [b]) -> prediction, asked for select(index).
      process: with its parameters. steps: int, traced or not. tokens: positions predicted at once; changes no result.
      singly: one event a call in each row, a fall or a jump of a token whose word is not known yet: at most S (K + M)
        calls, in place of steps, and no discretisation of time. Of token times, whose s jumps.
      score: singly, by what is on show in place of the clocks: the token that is surest of its word (ties from the
        left) makes its own next event. The network is told `TokenTimes.time_of` the state.
      told: in [0, 1); the network is told the time t + told (1 - t), and its ratio, in place of t (the CEDI of
        DINOISER, arXiv 2302.10025; shared times). Above 0 that leaves the model's law. None or 0: the time as it is.
      temperature, top_p, sync_trip_count, frames: as of hdlm_jax.diffusion.gidd.sample.

    Returns:
      (tokens, stats) as hdlm_jax.decoding.loop.sample; the confidence is p of the token when it was drawn.
    """
    keys, singly, top = row_keys(key, len(z)), singly or score is not None, process.level_of(z)
    times = jax.vmap(lambda k: process.chain.crossing_times(k, z.shape[1:]))(fold(keys, 0))
    events, due = events_of(times, process.jumps(fold(keys, 2), z.shape), top, of_tokens=score is not None)
    calls = due if singly else jnp.where(jnp.any(top > 0, axis=-1), jnp.int32(steps), 0)
    count = -(-z.size // tokens)
    at = jnp.minimum(jnp.arange(count * tokens), z.size - 1).reshape(count, tokens)

    def noise_time(done: jax.Array) -> jax.Array:  # after so many events of each line, or steps, [B, L]; 0 at the end
        if not singly:
            return -jnp.log(jnp.where(done < steps, done / steps, 1.0))
        return jnp.take_along_axis(events, jnp.minimum(done, events.shape[-1] - 1)[..., None], axis=-1)[..., 0]

    def time(state: State, done: jax.Array) -> jax.Array:
        if score is not None:
            return cast(TokenTimes, process).time_of(state, top > 0)
        return -jnp.expm1(-noise_time(done)[:, 0]) if singly else 1 - done[:, 0] / steps

    def step(call: jax.Array, carry: tuple) -> tuple:
        state, done, sure, film = carry
        then, level = noise_time(done + 1), process.level_of(state.z)
        s = process.ratios(fold(keys, 2), then, z.shape).reshape(-1)
        target = jnp.sum(times <= jnp.asarray(process.symbol_time(then)[0])[..., None], axis=-1).reshape(-1)
        each = token_keys(fold(fold(keys, 1), call), z.shape).reshape(-1)
        prediction = denoise(*shown(process, state, time(state, done), told))
        flat = jax.tree.map(lambda a: a.reshape(z.size, *a.shape[2:]), state)

        def some(i: jax.Array) -> tuple[State, jax.Array, jax.Array | None]:
            here, p = jax.tree.map(lambda a: a[i], flat), prediction.select(i)
            moved = process.step(each[i], p, here, target[i], s[i], temperature, top_p)
            return *moved, None if score is None else sureness(process, p, here.z, score)

        moved, law, scores = jax.tree.map(
            lambda a: a.reshape(-1, *a.shape[2:])[: z.size].reshape(*z.shape, *a.shape[2:]), jax.lax.map(some, at))
        chosen = jnp.ones(done.shape, bool) if score is None else best(scores, level > 0, 1)
        after = jax.tree.map(lambda new, old: jnp.where(along(chosen, new), new, old), moved, state)
        sure, done = jnp.where((process.level_of(after.z) == 0) & (level > 0), law, sure), done + chosen
        return after, done, sure, record.expose(film, call, (after.z, sure, time(after, done)))

    record = trajectory.Trajectory(frames, events.shape[1] * (events.shape[-1] - 1) if singly else steps)
    state, sure = process.state(z, jnp.zeros((*z.shape, process.width)), jnp.zeros(())), jnp.zeros(z.shape, jnp.float32)
    done = jnp.zeros(events.shape[:2], jnp.int32)
    start = state, done, sure, record.start((z, sure, time(state, done)))
    trips = sync_trip_count(jnp.max(calls))
    state, _, _, film = jax.lax.fori_loop(0, trips, step, start)
    return state.z, {"calls": trips, "row_forwards": calls} | record.stats(film, calls)


def shown(process: ChannelProcess, state: State, t: jax.Array, told: Number | None) -> tuple[State, jax.Array]:
    """A state and its time t [B] as the network is told them (`told` of sample)."""
    if told is None:
        return state, t
    t = t + told * (1 - t)
    ratio = jnp.asarray(process.ratio(-jnp.log1p(-t)))[:, None]
    known = process.level_of(state.z) == 0
    return state._replace(told=jnp.where(known | (told == 0), state.s, ratio)), t


def events_of(times: jax.Array, jumps: jax.Array, top: jax.Array, of_tokens: bool) -> tuple[jax.Array, jax.Array]:
    """Noise times of the events that change what is on show: falls from a level that a token has, jumps before its word
    is known.

    Args:
      times [B, S, K], jumps [B, S, M]: when levels fall, when ratios jump. top: int32 [B, S], levels of the canvas.

    Returns:
      (float32 [B, L, n], falling, zeros behind; how many there are, int32 [B]). L is S of tokens, each with its own
      events, else 1, with all of a row's.
    """
    due = jnp.concatenate([wide(jnp.arange(times.shape[-1]), top) < top[..., None],
                           (top[..., None] > 0) & (jumps > times[..., :1])], axis=-1)
    events = jnp.where(due, jnp.concatenate([times, jumps], axis=-1), 0.0)
    events = events.reshape(len(top), top.shape[1] if of_tokens else 1, -1)
    return jnp.pad(-jnp.sort(-events, axis=-1), ((0, 0), (0, 0), (0, 1))), jnp.sum(due, axis=(1, 2), dtype=jnp.int32)


def sureness(process: ChannelProcess, p: Prediction, z: jax.Array, score: Confidence) -> jax.Array:
    """The score of the words at symbols z [n], evidence and force transition in them; known ones have none."""
    seen: Any = statistics(process, p, z, ("top",), 0, True, "exact")
    return score.of(seen["log_top"], seen["log_second"], seen["entropy"])
