"""States recorded while sampling, for the report."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hdlm_jax.diffusion.draws import Number


class Trajectory:
    """The start, every m-th state and the last one: at most `frames` beside the start, m the least that suffices for
    `bound` calls (which may be traced). With frames = 0 nothing is kept."""

    def __init__(self, frames: int, bound: Number) -> None:
        self.frames = frames
        self.every = jnp.maximum(1, -(-jnp.int32(bound) // max(frames, 1)))

    def start(self, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Room for (z, confidence, t) [B, ...], and the start in it."""
        return jax.tree.map(lambda a: jnp.stack([a] * (self.frames + 1), axis=1), state) if self.frames else ()

    def expose(self, film: tuple[jax.Array, ...], call: Number, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Writes the state after call c (int or int [B]) to frame ceil((c + 1) / every); later calls overwrite it."""
        if not self.frames:
            return ()
        rows = jnp.arange(film[0].shape[0])
        at = jnp.broadcast_to(call // self.every + 1, rows.shape)
        return jax.tree.map(lambda a, b: a.at[rows, at].set(b), film, state)

    def stats(self, film: tuple[jax.Array, ...], calls: jax.Array) -> dict[str, jax.Array]:
        """call, time, z and confidence, as `hdlm_jax.decoding.loop.sample` gives them; calls int32 [B], had by rows."""
        if not self.frames:
            return {}
        last = -(-calls // self.every)
        at = jnp.minimum(jnp.arange(self.frames + 1)[None], last[:, None])
        z, sure, t = (jnp.take_along_axis(a, at.reshape(*at.shape, *(1,) * (a.ndim - 2)), axis=1) for a in film)
        done = jnp.minimum(jnp.arange(self.frames + 1) * self.every, jnp.max(calls)).astype(jnp.int32)
        return {"call": done, "time": t, "z": z, "confidence": sure}
