"""A layer that stands in for calls of the network (ADJUST, arXiv 2509.22738): what p says after some more drops.

Along a run's own trajectories: a text it has written, the states z of a call and those, `now`, up to burst - 1 drops
later. The layer g, which knows z's hidden states and `now`, is to say what the frozen network says of `now` itself,

    min KL(p(. | now) || g(. | h(z), now)),

of every token not written yet, its state one level down. At the optimum a burst of drops has the law of as many calls.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hdlm_jax.common.parallel import Batch, Tree
from hdlm_jax.config import Config
from hdlm_jax.decoding import presets
from hdlm_jax.diffusion.draws import fold
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.levels import open_uniform
from hdlm_jax.models.adjust import Adjust
from hdlm_jax.models.trunk import Trunk
from hdlm_jax.tuning.lesson import Loss
from hdlm_jax.tuning.record import shown

CHUNK = 256  # tokens whose logits exist at once


class Moment(NamedTuple):
    """Of some rows: levels int32 [b, S], and what the network is told then, t float32 [b]."""

    level: jax.Array
    t: jax.Array


def moments(process: HierarchicalProcess, keys: jax.Array, score: jax.Array, burst: int) -> tuple[Moment, Moment]:
    """(before, now), two moments of writing: `now` is 1..burst - 1 drops later, and not the end. Free where score bool
    [b, S], two levels to drop or more of each row; keys [b].

    Drops come in a random order of the tokens' own crossing times, as `first_hitting` makes them.
    """
    times = jax.vmap(lambda key: process.chain.crossing_times(key, score.shape[1:]))(fold(keys, 0))
    times = jnp.where(score[..., None], times, jnp.inf)
    order, n = jnp.sort(times.reshape(len(score), -1), axis=1), jnp.sum(score, axis=1) * process.num_levels
    u, v = (jax.vmap(open_uniform)(fold(keys, i)) for i in (1, 2))
    left = 2 + jnp.floor(u * (n - 1)).astype(jnp.int32)  # crossings that are to be undone, before
    later = 1 + jnp.floor(v * jnp.minimum(burst - 1, left - 1)).astype(jnp.int32)

    def moment(count: jax.Array) -> Moment:
        tau = jnp.take_along_axis(order, jnp.maximum(count - 1, 0)[:, None], axis=1)
        return Moment(jnp.where(score, jnp.sum(times <= tau[..., None], axis=-1), 0), -jnp.expm1(-tau[:, 0]))

    return moment(left), moment(left - later)


def divergence(process: HierarchicalProcess, base: Trunk, frozen: Tree, truth: jax.Array, told: jax.Array, z: jax.Array
               ) -> jax.Array:
    """KL, nats [b, S], of what hidden states `truth` say of the next states down of z from what `told` do, [b, S, D]
    each; 0 where z is written."""
    size = min(CHUNK, z.size)
    index = jnp.arange(-(-z.size // size) * size).reshape(-1, size) % z.size
    flat = [a.reshape(-1, a.shape[-1]) for a in (truth, told)]

    @jax.checkpoint
    def some(at: jax.Array) -> jax.Array:
        p, g = (base.head.predict(base.head_params(frozen), h[at]) for h in flat)
        here, out = z.reshape(-1)[at], jnp.zeros(at.shape)
        for k in range(1, process.num_levels + 1):
            log_p, log_g = (process.log_probs_below(a, here, k, k - 1) for a in (p, g))
            seen = log_p > -jnp.inf
            gap = jnp.where(seen, log_p - jnp.where(seen, log_g, 0.0), 0.0)
            out = jnp.where(process.level_of(here) == k, jnp.sum(jnp.exp(log_p) * gap, axis=-1), out)
        return out

    return jax.lax.map(some, index).reshape(-1)[: z.size].reshape(z.shape)


def make_loss(config: Config, network: Trunk, base: Trunk, process: HierarchicalProcess, mesh: Mesh | None = None
              ) -> Loss:
    """The divergence's mean over tokens not written yet; metrics: the same of the layer left out."""
    layer, burst = cast(Adjust, network), presets.burst_of(config.generate)

    def loss(params: Tree, frozen: Tree, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        x, index, score = batch["x"], batch["index"], batch["score"]
        both = moments(process, fold(jnp.broadcast_to(key, index.shape), index), score, burst)
        z, now = (shown(process, x, moment.level) for moment in both)
        before, truth = (base.hidden(frozen, states, moment.t) for states, moment in zip((z, now), both, strict=True))
        told, left = layer.adjusted(params, before, base.table(frozen), z, now), jnp.sum(both[1].level > 0)
        left = jnp.maximum(left, 1)
        found, without = (jnp.sum(divergence(process, base, frozen, truth, h, now)) / left for h in (told, before))
        return found, {"without": without}

    return loss
