"""Plans of the levels, and what samplers share (docs/theory.md section 4).

Levels ignore content, so a whole reverse trajectory of levels is drawn before any network call: K crossing times a
token. Grouped by a grid of T steps, singly, or m at a time, they become the calls at which each token drops. The
positions are chosen without looking at what is drawn there (choose-then-draw), which is exact.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from hdlm_jax.diffusion.levels import LevelChain
from hdlm_jax.diffusion.process import row_keys, wide

PLANS = ("grid", "events", "reveal")


class Plan(NamedTuple):
    """When each token drops. Every number may be traced: another T or m is no other program. Rows first everywhere.

    drop_call: int32 [B, S, K], the call at which a token falls below level k = 1..K; -1 where it never was that high.
    calls: int32 [B], calls there are at most.
    clock: float32 [B, S K], t of each row's drops in their order, `group` [B] of them a call; None for a grid, whose
      call c is at t = 1 - c/calls.
    """

    drop_call: jax.Array
    calls: jax.Array
    clock: jax.Array | None
    group: jax.Array

    def next(self, level):
        """The first call at which something has yet to drop, tokens being at `level` [B, S]: int32 [B]."""
        ahead = wide(jnp.arange(1, self.drop_call.shape[-1] + 1), level) <= level[..., None]
        call = jnp.where(ahead & (self.drop_call >= 0), self.drop_call, self.calls[:, None, None])
        return jnp.min(call, axis=(1, 2))

    def target(self, call):
        """Levels after calls [B]: int32 [B, S]."""
        return jnp.sum(self.drop_call > call[:, None, None], axis=-1, dtype=jnp.int32)

    def time(self, call):
        """t in [0, 1] that a time-conditioned network is told at calls [B]: float32 [B]; 0 after the last."""
        if self.clock is None:
            return ((self.calls - call) / self.calls).astype(jnp.float32)
        at = jnp.minimum(call * self.group, self.clock.shape[1] - 1)
        t = jnp.take_along_axis(self.clock, at[:, None], axis=1)[:, 0]
        return jnp.where(call < self.calls, t, 0.0)


def plan(key, chain: LevelChain, level0, kind: str = "grid", steps: Any = 128, reveals: Any = 1) -> Plan:
    """Draw the levels' reverse trajectory from start levels level0 int [B, S] (K at a mask, 0 at given words).

    Args:
      key: one key (row b uses fold_in(key, b)) or keys [B].
      kind: "grid", the exact ancestral kernel on T = `steps` equal steps of t; "events", one drop a call in each row
        (no discretisation error); "reveal", exactly `reveals` drops a call in each row, the last call taking the rest.
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


def together(tokens: int) -> tuple[int, int]:
    """Rows of so many tokens, and tokens, that are worked on at once by default: what fills the device."""
    rows, drops = (1024, 64) if jax.default_backend() == "cpu" else (65_536, 2048)
    return max(1, rows // tokens), drops


def drop_probability(process, prediction, z, new, clusters: str = "exact"):
    """How likely each drop z -> new was among all drops to that level: float32 of z's shape, 0 where none was.

    Under p(. | z) after the force transition; temperature and top_p sharpen what is drawn, not this number. A word has
    p(x | z), a node u the mass that `HierarchicalProcess.posterior` gives it.
    """
    p, level, below = process.as_prediction(prediction), process.level_of(z), process.level_of(new)
    word = process.forced(p, z).log_prob(jnp.where(below == 0, new, 0))
    out = jnp.where((level > 0) & (below == 0), jnp.exp(word), 0.0)
    for k in range(2, process.num_levels + 1):
        for j in range(1, k):
            law = process.law_below(p, z, k, j, clusters)
            node = jnp.take_along_axis(law, process._node(new, j)[..., None], axis=-1)[..., 0]
            out = jnp.where((level == k) & (below == j), jnp.exp(node), out)
    return out


class Film:
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
        """call, time, z and confidence, as `hdlm_jax.decoding.core.sample` gives them; calls int32 [B], had by rows."""
        if not self.frames:
            return {}
        last = -(-calls // self.every)
        at = jnp.minimum(jnp.arange(self.frames + 1)[None], last[:, None])
        z, sure, t = (jnp.take_along_axis(a, at.reshape(*at.shape, *(1,) * (a.ndim - 2)), axis=1) for a in film)
        done = jnp.minimum(jnp.arange(self.frames + 1) * self.every, jnp.max(calls)).astype(jnp.int32)
        return {"call": done, "time": t, "z": z, "confidence": sure}
