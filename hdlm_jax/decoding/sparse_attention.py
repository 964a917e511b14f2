"""Attention to the blocks of keys that mattered early in sampling (SparseD)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from hdlm_jax.decoding.policy import Rows
from hdlm_jax.models.network import At, Network, attention


def kept_blocks(weights, prompt, active, *, select: float, size: int):
    """Blocks of keys that each block of queries goes on seeing (SparseD, arXiv 2509.24014): bool [b, H, n, n].

    Keys of the prompt and the others are ranked apart, each by the mean weight over a block's queries and keys, and
    the first floor(select m) + 1 of the m blocks that hold such keys are kept. Blocks without active keys or queries
    cannot be ranked and stay. n = ceil(S / size); the last block may be short.

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


@dataclasses.dataclass(frozen=True)
class _Attend:
    """Network.attend of `Sparse`: under the blocks' mask where it is made, and making it where it is due."""

    select: float
    size: int

    def __call__(self, module, q, k, v, mask):
        kept, made, due, prompt, active = (
            module.get_variable("patch", name) for name in ("kept", "made", "due", "prompt", "active"))

        def make():
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
            weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1)
            new = kept_blocks(weights, prompt, active, select=self.select, size=self.size)
            return jnp.where(due[:, None, None, None], new, kept)

        module.put_variable("patch", "kept", jax.lax.cond(jnp.any(due), make, lambda: kept))
        seen = kept | ~made[:, None, None, None]
        seen = jnp.repeat(jnp.repeat(seen, self.size, axis=2), self.size, axis=3)
        return attention(q, k, v, mask & seen[:, :, : q.shape[1], : k.shape[1]])


class SparseCache(NamedTuple):
    """kept: bool [blocks, b, H, n, n]; made: bool [1, b]; total: int32 [1, b], drops before the row's first call."""

    kept: jax.Array
    made: jax.Array
    total: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Sparse:
    """Denoiser whose attention thins out once a share of the row's drops is done (SparseD, arXiv 2509.24014).

    Full attention up to and with the call before which at least `skip` of the row's drops are done (levels of its
    active tokens, against those at its start): a share of drops stands for the paper's share of steps, as no policy
    knows its calls beforehand. That call makes the row's mask of blocks, for each layer and head (`kept_blocks`),
    which holds in all later ones. Weights are ranked as the network has them, over sqrt(width of a head); the release
    ranks with the root of the number of heads, a slip, and lets blocks of the prompt compete with the others.

    Attributes:
      network, params: the network and its parameters.
      skip: share of drops in [0, 1]; may be traced. The paper has 0.2.
      select: share of key blocks in [0, 1]; 1 keeps all. The paper has 0.3 (long texts, block 128), 0.5 (short, 32).
      block: tokens of a block.

    Raises:
      ValueError: select, block or skip out of range; a causal network.
    """

    network: Network
    params: Any
    skip: Any = 0.2
    select: float = 0.3
    block: int = 128
    rows_axis: ClassVar[int] = 1
    forwards: ClassVar[int] = 1

    def __post_init__(self):
        for name in ("skip", "select"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not 0 <= value <= 1:
                raise ValueError(f"{name}={value}: must be a share in [0, 1]")
        if self.block < 1:
            raise ValueError(f"block={self.block}: must be at least 1 token")
        if self.network.causal:
            raise ValueError("network.causal=True: SparseD's blocks are for networks that see both ways")

    def start(self, rows: Rows) -> SparseCache:
        """Nothing thinned out yet."""
        n = -(-rows.z.shape[1] // self.block)
        kept = jnp.ones((self.network.blocks, len(rows.z), self.network.heads, n, n), bool)
        return SparseCache(kept, jnp.zeros((1, len(rows.z)), bool), self._left(rows)[None])

    def __call__(self, cache: SparseCache, rows: Rows):
        """(prediction, cache)."""
        total = cache.total[0]
        due = ~cache.made[0] & (total - self._left(rows) + 1e-3 >= self.skip * total)
        each = {"made": cache.made[0], "due": due, "active": rows.active, "prompt": rows.given & (rows.block < 0)}
        patch = {name: jnp.broadcast_to(a[None], (self.network.blocks, *a.shape)) for name, a in each.items()}
        network = self.network.clone(attend=_Attend(self.select, self.block))
        hidden, new = network.apply({"params": self.params, "patch": {"stack": patch | {"kept": cache.kept}}}, rows.z,
                                    rows.t, rows.active.astype(jnp.int32), method="trunk", mutable=["patch"])
        cache = SparseCache(new["patch"]["stack"]["kept"], cache.made | due[None], cache.total)
        return At(network.head, self.params["head"], hidden), cache

    @staticmethod
    def _left(rows: Rows):
        return jnp.sum(jnp.where(rows.active, rows.level, 0), axis=1)


@dataclasses.dataclass(frozen=True)
class SparseD:
    """What a `Sparse` denoiser is made of, static: see there."""

    skip: float = 0.2
    select: float = 0.3
    block: int = 128

    def denoiser(self, network: Network, params) -> Sparse:
        return Sparse(network, params, self.skip, self.select, self.block)
