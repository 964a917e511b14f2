"""A head that draws how long the next block is: of 4, 8, 16 or 32 tokens (CtrlDiff, arXiv 2505.14455).

Beside the network, in parameters of its own ("block_lengths"; model.block_lengths). It reads the trunk's last states as
a block begins, the mean over tokens that are written and the mean over those that are not (whose entropies it can tell
from them), and t. The paper pools entropies of finished blocks; recorded ones are functions of the weights through
earlier calls, which the score of this call does not differentiate, so that they are left out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.common.parallel import Tree

NAME = "block_lengths"
LENGTHS = (4, 8, 16, 32)
_INNER = 64
_CLOSED = -1e9  # a score that is never drawn; finite, so that its gradient is 0 and not NaN


def init(key: jax.Array, width: int, levels: int) -> Tree:
    """Parameters for hidden states [..., width]; all lengths are as likely at first."""
    written, still, from_t = (jax.random.normal(k, shape) for k, shape in zip(
        jax.random.split(key, 3), ((width, _INNER), (width, _INNER), (_INNER,)), strict=True))
    return {"written": written / width**0.5, "open": still / width**0.5, "time": from_t, "bias": jnp.zeros(_INNER),
            "out": jnp.zeros((_INNER, len(LENGTHS)))}


def scores(params: Tree, hidden: jax.Array, written: jax.Array, open_: jax.Array, t: jax.Array) -> jax.Array:
    """float [b, lengths], log-probabilities but for a constant; hidden [b, S, D]; written and open_ bool [b, S], t [b].

    A length is closed where the one before it takes all that is open already: lengths are cut to what is left.
    """
    def mean(where: jax.Array) -> jax.Array:
        some = jnp.maximum(jnp.sum(where, axis=1), 1)
        return jnp.sum(jnp.where(where[..., None], hidden, 0.0), axis=1) / some[:, None]

    p = params[NAME]
    inner = mean(written) @ p["written"] + mean(open_) @ p["open"] + t[:, None] * p["time"][None] + p["bias"][None]
    shorter = np.array((0, *LENGTHS[:-1]))
    needed = (shorter == 0)[None] | (shorter[None] < jnp.sum(open_, axis=1)[:, None])
    return jnp.where(needed, jax.nn.gelu(inner) @ p["out"], _CLOSED)


def nats(score: jax.Array, drawn: jax.Array) -> jax.Array:
    """-log probability, float [b], of the length of index drawn int32 [b]; 0 where it is -1 and none was drawn."""
    cost = -jax.nn.log_softmax(score, axis=-1)
    return jnp.where(drawn >= 0, jnp.take_along_axis(cost, jnp.maximum(drawn, 0)[:, None], axis=1)[:, 0], 0.0)
