"""What hooks see of a prediction: likeliest states, entropies, and probabilities of what was drawn."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def chunks(tokens: int) -> tuple[int, int]:
    """(rows of so many tokens, tokens) worked on at once by default: what fills the device."""
    here, many = (1024, 64) if jax.default_backend() == "cpu" else (65_536, 2048)
    return max(1, here // tokens), many


def log_probability_of(process, prediction, z, new, clusters: str = "exact"):
    """log of the probability of unmasking z to `new` among the states of new's level: float32 of z's shape, -inf where
    new is z.

    Before temperature and top_p, after the force transition: p(x | z) of a token x, of a node the mass that
    `HierarchicalProcess.posterior` gives it.
    """
    p, level, below = process.as_prediction(prediction), process.level_of(z), process.level_of(new)
    token = process.forced(p, z).log_prob(jnp.where(below == 0, new, 0))
    out = jnp.where((level > 0) & (below == 0), token, -jnp.inf)
    for k in range(2, process.num_levels + 1):
        for j in range(1, k):
            nodes = process.log_probs_below(p, z, k, j, clusters)
            node = jnp.take_along_axis(nodes, process.node_of(new, j)[..., None], axis=-1)[..., 0]
            out = jnp.where((level == k) & (below == j), node, out)
    return out


def probability_of(process, prediction, z, new, clusters: str = "exact"):
    """exp of log_probability_of: 0 where new is z."""
    return jnp.exp(log_probability_of(process, prediction, z, new, clusters))


def statistics(process, p, z, needs, top_k: int, straight: bool, clusters: str) -> dict[str, jax.Array]:
    """The fields of `View` that are needed, of tokens z [n] with prediction p: arrays [n] and [n, m]."""
    level = process.level_of(z)
    out: dict[str, jax.Array] = {}

    def put(name, k, value):
        here = (level == k).reshape(-1, *(1,) * (value.ndim - 1))
        none = jnp.full_like(value, 0 if value.dtype == z.dtype else -jnp.inf)
        out[name] = jnp.where(here, value, out.get(name, none))

    for k in range(1, process.num_levels + 1):
        j = 0 if straight else k - 1
        tokens: Any = process.log_probs_below(p, z, k, 0, clusters) if "token" in needs or j == 0 else None
        if "top" in needs or top_k:
            log_p: Any = tokens if j == 0 else process.log_probs_below(p, z, k, j, clusters)
            many = min(max(top_k, 2), log_p.shape[-1])
            # barriers keep XLA from merging what follows into a sort of the vocabulary, a dozen times as slow on CPU;
            # one barrier for both aborts its compiler where many devices are compiled for
            logs, ids = map(jax.lax.optimization_barrier, jax.lax.top_k(log_p, many))
            short = ((0, 0), (0, max(top_k, 2) - many))
            logs = jnp.pad(logs, short, constant_values=-jnp.inf)
            ids = jnp.pad(ids + process.hierarchy.offsets[j], short, mode="edge").astype(z.dtype)
            put("top", k, ids[:, 0])
            put("log_top", k, logs[:, 0])
            put("log_second", k, logs[:, 1])
            put("entropy", k, -jnp.sum(jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, 0.0), axis=-1))
            if top_k:
                put("ids", k, ids[:, :top_k])
                put("logs", k, logs[:, :top_k])
        if "token" in needs:
            best = jnp.argmax(tokens, axis=-1).astype(z.dtype)
            put("token", k, best)
            put("log_token", k, jnp.take_along_axis(tokens, best[:, None], axis=-1)[:, 0])
        if "own" in needs and k < process.num_levels:
            put("log_own", k, p.log_mass(k, process.node_of(z, k)))
    if "own" in needs:
        put("log_own", 0, p.log_prob(jnp.where(level == 0, z, 0)))
        put("log_up", process.num_levels - 1, jnp.zeros(z.shape))
        for k in range(process.num_levels - 1):
            up = jnp.asarray(process.ancestors(k, k + 1))[process.node_of(z, k)]
            put("log_up", k, p.log_mass(k + 1, up))
        if "token" in needs:  # what the network would write at a vocabulary token
            log_p = p.log_probs()
            put("token", 0, jnp.argmax(log_p, axis=-1).astype(z.dtype))
            put("log_token", 0, jnp.max(log_p, axis=-1))
    return out
