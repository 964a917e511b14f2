"""One layer behind a network: its last hidden states, told what has been written since (ADJUST, arXiv 2509.22738)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hdlm_jax.common.parallel import Tree
from hdlm_jax.models.attention import Seen
from hdlm_jax.models.network import Block


class Adjust(nn.Module):
    """h [b, S, D] of the states z, and what tokens show now -> h as if the network had seen that. At first, and in rows
    where nothing has changed, it is h itself: the sampler without it."""

    width: int
    heads: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, h: jax.Array, shown: jax.Array, changed: jax.Array, segment: jax.Array | None) -> jax.Array:
        """shown: [b, S, D], embeddings of the present states; changed: bool [b, S], those written since."""
        new = nn.Dense(self.width, use_bias=False, name="reads")(shown)
        x = h + jnp.where(changed[..., None], new, 0.0)
        x, _ = Block(self.width, self.heads, 0.0, jnp.dtype(self.dtype), "xla", name="block")(
            x, None, Seen.of(segment), False)
        out = h + nn.Dense(self.width, use_bias=False, kernel_init=nn.initializers.zeros_init(), name="out")(x)
        return jnp.where(jnp.any(changed, axis=1)[:, None, None], out, h)

    def init_params(self, key: jax.Array, seq_len: int) -> Tree:
        h = jnp.zeros((1, seq_len, self.width))
        return self.init(key, h, h, jnp.zeros((1, seq_len), bool), None)["params"]

    def adjusted(self, params: Tree, h: jax.Array, table: jax.Array, z: jax.Array, now: jax.Array,
                 segment: jax.Array | None = None) -> jax.Array:
        """float32 [b, S, D] of h, made when the states were z, with the embeddings `table` of the states `now` int32
        [b, S]; segment: as Trunk.hidden's."""
        found: Any = self.apply({"params": params}, h, table[now], now != z, segment)
        return found
