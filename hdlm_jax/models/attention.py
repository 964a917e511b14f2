"""Attention of queries to keys, by the kernel that fits the machine (model.attention).

xla: written out; scores [B, H, Q, S] exist in memory. splash: a Pallas kernel for TPUs that makes them in blocks and
never holds them (jax.experimental.pallas.ops.tpu.splash_attention; arXiv 2205.14135). cudnn: NVIDIA's flash attention,
through `jax.nn.dot_product_attention`. auto: splash or cudnn where they can do what is asked for, else xla.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_masks

from hdlm_jax.common import parallel

SAVED = "attention"  # name of what splash keeps for its backward pass, for policies of rematerialisation
INTERPRET = False  # tests set it: splash runs off TPUs too, by an interpreter
_LANES, _BLOCKS = 128, (512, 256, 128)  # of a TPU: a block of queries or keys is a multiple of the lanes
_LEAST = 256  # queries from which on auto takes a kernel
Kernel: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array, "Seen"], jax.Array]


@functools.partial(jax.tree_util.register_dataclass, data_fields=("query", "key", "mask"), meta_fields=("causal",))
@dataclasses.dataclass(frozen=True)
class Seen:
    """The keys that a query sees: those of its own number, where causal none behind it, and where `mask` is True.

    query: int32 [B, Q] and key: int32 [B, S], numbers >= -1, as of documents in a packed row; None: all are one.
    mask: bool [B or 1, H or 1, Q, S], anything else; kernels cannot use it. causal: queries stand where keys do.
    """

    query: jax.Array | None = None
    key: jax.Array | None = None
    mask: jax.Array | None = None
    causal: bool = False

    @classmethod
    def of(cls, segment: jax.Array | None, causal: bool = False) -> Seen:
        """From what `Trunk.hidden` takes: int32 [B, S], each sees its own number; bool [B, 1 or Q, S], what it sees."""
        if segment is None or segment.ndim == 2:
            return cls(segment, segment, causal=causal)
        if segment.shape[1] > 1:
            return cls(mask=segment[:, None], causal=causal)
        return cls(jnp.ones((len(segment), 1), jnp.int32), segment[:, 0].astype(jnp.int32), causal=causal)

    def within(self, mask: jax.Array) -> Seen:
        """Of what is seen that which mask, bool [B or 1, H or 1, Q, S], names as well."""
        return dataclasses.replace(self, mask=mask if self.mask is None else self.mask & mask)

    def dense(self, queries: int, keys: int) -> jax.Array | None:
        """bool [B or 1, H or 1, Q or 1, S]; None: every query sees all keys."""
        mask = self.mask
        if self.query is not None and self.key is not None:
            same = self.query[:, None, :, None] == self.key[:, None, None, :]
            mask = same if mask is None else mask & same
        if self.causal:
            before = jnp.tri(queries, keys, dtype=bool)[None, None]
            mask = before if mask is None else mask & before
        return mask


def two_copies(seq_len: int, block: int, segment: jax.Array | None = None) -> jax.Array:
    """bool [1 or B, 2 S, 2 S]: what [noised; clean] copies of a text see (BD3-LM, arXiv 2503.09573): a noised block
    itself and the clean ones before it, a clean one itself and those before; of their own segment, int32 [B, S]."""
    clean, place = np.divmod(np.arange(2 * seq_len), seq_len)
    q, k = (place // block)[:, None], (place // block)[None]
    seen = jnp.asarray(np.where(clean[None] > 0, k < q + clean[:, None], (k == q) & (clean[:, None] == 0)))[None]
    if segment is None:
        return seen
    both = jnp.concatenate([segment, segment], axis=1)
    return seen & (both[:, :, None] == both[:, None])


def attention(q: jax.Array, k: jax.Array, v: jax.Array, seen: Seen | None = None, kernel: str = "xla") -> jax.Array:
    """softmax(q k^T / sqrt(D/H)) v of queries [B, Q, H, D/H] and keys and values [B, S, H, D/H]: [B, Q, H, D/H].

    With fewer heads of keys and values each serves as many neighbouring queries' (grouped queries, arXiv 2305.13245).
    kernel: auto, xla, splash or cudnn; xla stands in where the one named cannot do what is asked for (`choose`).
    """
    seen = seen or Seen()
    if k.shape[2] != q.shape[2]:
        k, v = (jnp.repeat(a, q.shape[2] // k.shape[2], axis=2) for a in (k, v))
    return _KERNELS[choose(kernel, q, k, seen)](q, k, v, seen)


def choose(kernel: str, q: jax.Array, k: jax.Array, seen: Seen) -> str:
    """The kernel that runs: xla, splash or cudnn."""
    platform, queries, keys, dim = parallel.platform(), q.shape[1], k.shape[1], q.shape[3]
    if kernel == "auto":
        kernel = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "xla") if queries >= _LEAST else "xla"
    if kernel == "splash" and (platform != "tpu" and not INTERPRET or seen.mask is not None
                               or seen.causal and queries != keys):
        return "xla"
    if kernel == "cudnn" and (platform != "gpu" or q.dtype != jnp.bfloat16 or dim % 8 or dim > 128
                              or queries % 2 or keys % 2):
        return "xla"
    return kernel


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, seen: Seen) -> jax.Array:
    """On CPU with the heads in front: XLA's gradient of the library's layout is about half as fast there."""
    mask = seen.dense(q.shape[1], k.shape[1])
    if parallel.platform() != "cpu":
        return jax.nn.dot_product_attention(q, k, v, mask=mask)
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bhkd->bhqd", weights, v).swapaxes(1, 2)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, seen: Seen) -> jax.Array:
    mask = dataclasses.replace(seen, causal=False).dense(q.shape[1], k.shape[1])
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=seen.causal, implementation="cudnn")


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, seen: Seen) -> jax.Array:
    """Rows are padded to whole blocks, whose numbers no text has."""
    rows, queries, _, dim = q.shape
    ids: list[Any] = [jnp.zeros((), jnp.int32) if a is None else a for a in (seen.query, seen.key)]
    ids = [jnp.broadcast_to(a, (rows, n)) for a, n in zip(ids, (queries, k.shape[1]), strict=True)]
    free = seen.query is None and not any(a.shape[1] % _LANES for a in (q, k))
    pad = [-a.shape[1] % _LANES for a in (q, k, v)]
    heads = [jnp.pad(a, ((0, 0), (0, n), (0, 0), (0, 0))) for a, n in zip((q / math.sqrt(dim), k, v), pad, strict=True)]
    ids = [jnp.pad(a, ((0, 0), (0, n)), constant_values=-2) for a, n in zip(ids, pad[:2], strict=True)]
    interpret = parallel.platform() != "tpu"

    def run(q: jax.Array, k: jax.Array, v: jax.Array, *ids: jax.Array) -> jax.Array:
        kernel = _splash_kernel(q.shape[1], k.shape[1], q.shape[2], seen.causal, interpret)
        q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
        out: Any = jax.vmap(kernel)(q, k, v, splash.SegmentIds(*ids) if ids else None)
        return out.swapaxes(1, 2)

    return parallel.split_heads(run, heads, () if free else ids)[:, :queries].astype(v.dtype)


def _splash_kernel(queries: int, keys: int, heads: int, causal: bool, interpret: bool) -> splash.SplashAttentionKernel:
    """(q [H, Q, D/H], k, v [H, S, D/H], segments) -> [H, Q, D/H]; q is divided by sqrt(D/H) already."""
    q, kv = (next(n for n in _BLOCKS if size % n == 0) for size in (queries, keys))
    sizes = splash.BlockSizes(block_q=q, block_kv=kv, block_kv_compute=kv, block_q_dkv=q, block_kv_dkv=kv,
                              block_kv_dkv_compute=kv, block_q_dq=q, block_kv_dq=kv)
    mask = (splash_masks.CausalMask if causal else splash_masks.FullMask)((queries, keys))
    return splash.make_splash_mha(splash_masks.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1,
                                  q_seq_shards=1, residual_checkpoint_name=SAVED, interpret=interpret)


_KERNELS: dict[str, Kernel] = {"xla": _xla, "splash": _splash, "cudnn": _cudnn}
