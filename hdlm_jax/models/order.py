"""A head that ranks tokens: which of those not written yet are unmasked next (DCoLT, arXiv 2505.10446).

Beside the network, in parameters of their own ("order"; model.order), so that a trunk knows nothing of it. A score for
each open token, from the trunk's last state of it, its level and t, which tells how far the call is; an order is drawn
by Plackett-Luce: the next token with probability softmax of the scores of those that are left.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hdlm_jax.common.parallel import Tree

NAME = "order"
_INNER = 64
_CLOSED = -1e9  # a score that is never drawn; finite, so that its gradient is 0 and not NaN


def init(key: jax.Array, width: int, levels: int) -> Tree:
    """Parameters for hidden states [..., width] and K = `levels`; all scores are 0 at first, any order as likely."""
    from_h, from_level, from_t = (jax.random.normal(k, shape) for k, shape in zip(
        jax.random.split(key, 3), ((width, _INNER), (levels + 1, _INNER), (_INNER,)), strict=True))
    return {"kernel": from_h / width**0.5, "level": from_level / 2, "time": from_t, "bias": jnp.zeros(_INNER),
            "out": jnp.zeros(_INNER)}


def scores(params: Tree, hidden: jax.Array, level: jax.Array, t: jax.Array) -> jax.Array:
    """float [b, S], the highest likeliest to be next; hidden [b, S, D], level int32 [b, S], t [b]."""
    p = params[NAME]
    told = t[:, None] * p["time"][None] + p["bias"][None]
    inner = hidden @ p["kernel"] + p["level"][level] + told[:, None]
    return jax.nn.gelu(inner) @ p["out"]


def nats(score: jax.Array, level: jax.Array, to: jax.Array, turn: jax.Array) -> jax.Array:
    """-log probability of each token's turn: float [b, S], 0 where it had none.

    The tokens at a level > 0 are open; those that go down to a level `to` below it were taken in the order of `turn`,
    all int32 [b, S]. One that is taken r-th costs log sum exp of the scores of those not taken before it, less its own.
    Where all open tokens are taken there was nothing to choose, and no cost (an order that changes nothing is noise).
    """
    taken, open_ = to < level, level > 0
    row = jnp.argsort(jnp.where(taken, turn, level.shape[1] + ~open_), axis=1)  # the taken, the open ones, the rest
    ordered = jnp.take_along_axis(jnp.where(open_, score, _CLOSED), row, axis=1)
    left = jax.lax.cumlogsumexp(ordered, axis=1, reverse=True)
    cost = jnp.take_along_axis(left - ordered, jnp.argsort(row, axis=1), axis=1)
    return jnp.where(taken & jnp.any(open_ & ~taken, axis=1, keepdims=True), cost, 0.0)
