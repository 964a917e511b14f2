"""Several calls of a policy on one pass of the network, a layer telling it what has been written since (ADJUST)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from hdlm_jax.decoding.policy import Rows
from hdlm_jax.models.heads import At
from hdlm_jax.models.trunk import Trunk


@dataclasses.dataclass(frozen=True)
class Burst:
    """How the network is called: once in `every` calls."""

    every: int = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Bursts:
    """The denoiser of a Burst (ADJUST, arXiv 2509.22738).

    adjusted: (h [b, S, D], embeddings of states [N, D], states then, states now int32 [b, S], segment) -> h now;
    models.adjust.Adjust's, or any. Its cost is not counted. cut, sync_trip_count: see caches.Uncached, loop.Sampling.
    """

    spec: Burst
    network: Trunk
    params: Mapping[str, Any]
    adjusted: Callable[..., jax.Array]
    cut: bool = True
    sync_trip_count: Callable = lambda count: count  # noqa: E731

    @property
    def forwards(self) -> Fraction:
        return Fraction(1, self.spec.every)

    def start(self, rows: Rows):
        return jnp.zeros((1, *rows.z.shape, self.network.width)), jnp.full((1, *rows.z.shape), -1, rows.z.dtype)

    def __call__(self, cache, rows: Rows):
        (h,), (z,) = cache
        fresh, segment = rows.call % self.spec.every == 0, rows.active[:, None] if self.cut else None
        new = jax.lax.cond(self.sync_trip_count(jnp.any(fresh).astype(jnp.int32)) > 0,
                           lambda: self.network.hidden(self.params, rows.z, rows.t, segment), lambda: h)
        h, z = jnp.where(fresh[:, None, None], new, h), jnp.where(fresh[:, None], rows.z, z)
        now = self.adjusted(h, self.network.table(self.params), z, rows.z, segment)
        return At(self.network.head, self.network.head_params(self.params), now), (h[None], z[None])
