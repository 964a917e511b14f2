"""States recorded while sampling, for the report."""

from __future__ import annotations

import jax
import jax.numpy as jnp


class Trajectory:
    """States recorded on the way: at most `frames` beside the start, every m-th call, m the least that suffices for
    `bound` calls (which may be traced), and the last. With frames = 0 nothing is kept."""

    def __init__(self, frames: int, bound):
        self.frames = frames
        self.every = jnp.maximum(1, -(-jnp.int32(bound) // max(frames, 1)))

    def start(self, state):
        """Room for (z, confidence, t) [B, ...], and the start in it."""
        return jax.tree.map(lambda a: jnp.stack([a] * (self.frames + 1), axis=1), state) if self.frames else ()

    def expose(self, film, call, state):
        """A row's call c (int or int [B]) ends in frame ceil((c + 1) / every), which the last of its calls leaves as it
        stays."""
        if not self.frames:
            return ()
        rows = jnp.arange(film[0].shape[0])
        at = jnp.broadcast_to(call // self.every + 1, rows.shape)
        return jax.tree.map(lambda a, b: a.at[rows, at].set(b), film, state)

    def stats(self, film, calls):
        """call, time, z and confidence, as `hdlm_jax.decoding.loop.sample` gives them; calls int32 [B], had by rows."""
        if not self.frames:
            return {}
        last = -(-calls // self.every)
        at = jnp.minimum(jnp.arange(self.frames + 1)[None], last[:, None])
        z, sure, t = (jnp.take_along_axis(a, at.reshape(*at.shape, *(1,) * (a.ndim - 2)), axis=1) for a in film)
        done = jnp.minimum(jnp.arange(self.frames + 1) * self.every, jnp.max(calls)).astype(jnp.int32)
        return {"call": done, "time": t, "z": z, "confidence": sure}
