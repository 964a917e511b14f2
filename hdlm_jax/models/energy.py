"""An energy of texts: the network reading a text beside its states, a number in place of predictions.

EDLM (arXiv 2410.21357): p(x | z) in proportion to p_theta(x | z) exp(-E(x, z)), which can say that words fit each other
where p_theta draws each on its own. The trunk starts as a copy of p_theta's.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from hdlm_jax.common.parallel import Tree
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.models.attention import Seen
from hdlm_jax.models.network import Network


@dataclasses.dataclass(frozen=True)
class ScalarHead:
    """Hidden states -> a number: the mean over some positions, two layers. Its `reads` lets words in at the bottom."""

    hierarchy: Hierarchy

    def init(self, key: jax.Array, width: int) -> Tree:
        make, keys = nn.initializers.lecun_normal(), jax.random.split(key)
        return {"reads": make(keys[0], (width, width)), "inner": make(keys[1], (width, width)),
                "bias": jnp.zeros(width), "out": jnp.zeros(width), "level": jnp.zeros(())}

    def value(self, params: Tree, h: jax.Array, where: jax.Array) -> jax.Array:
        """float32 [b] of h [b, S, D], pooled where bool [b, S]; 0 at a row without any such position."""
        count = jnp.sum(where, axis=1)
        mean = jnp.sum(jnp.where(where[..., None], h, 0.0), axis=1) / jnp.maximum(count, 1)[:, None]
        out = jax.nn.gelu(mean @ params["inner"] + params["bias"][None]) @ params["out"] + params["level"]
        return jnp.where(count > 0, out, 0.0)


class EnergyNetwork(Network):
    """A Network whose head is a ScalarHead: `energy` in place of predictions, which it has none of."""

    def energy(self, params: Tree, z: jax.Array, x: jax.Array, t: jax.Array, segment: jax.Array | None = None
               ) -> jax.Array:
        """E(x, z), float32 [b]: words x int32 [b, S] for the states z int32 [b, S] at masking level t float32 [b].

        z: -1 behind the end of a row, which nothing sees; it is pooled where z is not written. segment: as `hidden`'s.
        """
        found: Any = self.apply({"params": params}, z, x, t, segment, method="read")
        return found

    def read(self, z: jax.Array, x: jax.Array, t: jax.Array, segment: jax.Array | None = None) -> jax.Array:
        if segment is None:
            segment = jnp.where(z >= 0, 0, -1)
        cond = self._time(t) if self.time_conditioning else None
        both = self.embedding[jnp.maximum(z, 0)] + self.embedding[x] @ self.own_head["reads"]
        h, _ = self.stack(both, cond, Seen.of(segment, False), False, None, None)
        return cast(ScalarHead, self.head).value(self.own_head, self._out(h, cond), z >= self.head.hierarchy.vocab_size)

    def __call__(self, z: jax.Array, t: jax.Array, segment: jax.Array | None = None, train: bool = False) -> jax.Array:
        return self.read(z, jnp.zeros_like(z), t, segment)
