"""Attention to the blocks of keys that mattered early in sampling (SparseD)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hdlm_jax.decoding.policy import Rows
from hdlm_jax.models.attention import Seen, attention
from hdlm_jax.models.features import given
from hdlm_jax.models.heads import At
from hdlm_jax.models.network import Transformer


def kept_blocks(weights, prompt, active, *, select: float, size: int):
    """Blocks of keys that each block of queries goes on seeing: bool [b, H, n, n], n = ceil(S / size).

    Keys of the prompt and the others are ranked apart, each by the mean weight over a block's queries and keys; the
    first floor(select m) + 1 of the m blocks that hold such keys are kept, and blocks without active keys or queries.

    Args:
      weights: float32 [b, H, S queries, S keys], attention after its softmax.
      prompt, active: bool [b, S].
    """
    s = weights.shape[-1]
    n = -(-s // size)

    def sums(a, axis):  # over the tokens of each block along an axis
        a = jnp.pad(a, [(0, n * size - s if i == axis else 0) for i in range(a.ndim)])
        return jnp.sum(a.reshape(*a.shape[:axis], n, size, *a.shape[axis + 1 :]), axis=axis + 1)

    count = sums(active.astype(jnp.float32), 1)
    weights = sums(jnp.where(active[:, None, :, None], weights, 0.0), 2)
    quota = jnp.asarray([math.floor(round(select * m, 9)) + 1 for m in range(n + 1)])
    kept = (count == 0)[:, None, None, :] | (count == 0)[:, None, :, None]
    for part in (prompt & active, ~prompt & active):
        keys = sums(part.astype(jnp.float32), 1)[:, None, None, :]
        mean = sums(jnp.where(part[:, None, None, :], weights, 0.0), 3) / jnp.maximum(keys * count[:, None, :, None], 1)
        rank = jnp.argsort(jnp.argsort(jnp.where(keys > 0, -mean, 1.0), axis=-1, stable=True), axis=-1)
        kept |= (rank < quota[jnp.sum(keys > 0, axis=-1, keepdims=True)]) & (keys > 0)
    return kept


class SparseCache(NamedTuple):
    """kept: bool [blocks, b, H, n, n]; made: bool [1, b]; total: int32 [1, b], sum of levels at the start."""

    kept: jax.Array
    made: jax.Array
    total: jax.Array


@dataclasses.dataclass(frozen=True)
class SparseD:
    """Attention that thins out once a share of the row's unmasking is done (SparseD, arXiv 2509.24014).

    Attention is full up to and with the call before which at least `skip` of the row's unmasking is done (the paper: of
    its steps). That call makes the row's mask of blocks, for each layer and head (`kept_blocks`), which holds in all
    later ones. select: share of key blocks, 1 keeps all. block: tokens of a block.
    """

    skip: float = 0.2
    select: float = 0.3
    block: int = 128

    def attend(self, module, q, k, v, mask):
        """Network.attend under the blocks' mask where it is made, making it where it is due."""
        kept, made, due, prompt, active = (
            module.get_variable("patch", name) for name in ("kept", "made", "due", "prompt", "active"))

        def make():
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
            weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1)
            new = kept_blocks(weights, prompt, active, select=self.select, size=self.block)
            return jnp.where(due[:, None, None, None], new, kept)

        module.put_variable("patch", "kept", jax.lax.cond(jnp.any(due), make, lambda: kept))
        seen = kept | ~made[:, None, None, None]
        seen = jnp.repeat(jnp.repeat(seen, self.block, axis=2), self.block, axis=3)
        return attention(q, k, v, Seen(mask=mask & seen[:, :, : q.shape[1], : k.shape[1]]))


@dataclasses.dataclass(frozen=True, eq=False)
class Sparse:
    """The denoiser of SparseD, for a network that is not causal."""

    spec: SparseD
    network: Transformer
    params: Mapping[str, Any]
    forwards = 1

    def start(self, rows: Rows) -> SparseCache:
        n = -(-rows.z.shape[1] // self.spec.block)
        kept = jnp.ones((self.network.blocks, len(rows.z), self.network.heads, n, n), bool)
        return SparseCache(kept, jnp.zeros((1, len(rows.z)), bool), _levels_left(rows)[None])

    def __call__(self, cache: SparseCache, rows: Rows):
        total = cache.total[0]
        due = ~cache.made[0] & (total - _levels_left(rows) + 1e-3 >= self.spec.skip * total)
        each = {"made": cache.made[0], "due": due, "active": rows.active, "prompt": rows.given & (rows.block < 0)}
        patch = {name: jnp.broadcast_to(a[None], (self.network.blocks, *a.shape)) for name, a in each.items()}
        network, params = self.network.clone(attend=self.spec.attend), given(self.params, rows.extra.get("features"))
        hidden, new = network.apply({"params": params, "patch": {"stack": patch | {"kept": cache.kept}}}, rows.z,
                                    rows.t, rows.active.astype(jnp.int32), method="trunk", mutable=["patch"])
        cache = SparseCache(new["patch"]["stack"]["kept"], cache.made | due[None], cache.total)
        return At(network.head, network.head_params(self.params), hidden), cache


def _levels_left(rows: Rows):
    return jnp.sum(jnp.where(rows.active, rows.level, 0), axis=1)
