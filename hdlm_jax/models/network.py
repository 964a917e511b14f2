"""The published transformer: noised symbols and time -> hidden states -> (by a head) predictions over words.

Bidirectional, rotary positions, adaptive layer norm on time (shift, scale, gate), MLP of 4 D with tanh GELU; layer
norm in float32 without bias; no bias in qkv and out. Facts from the paper's network (arXiv 2510.08632).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.common.parallel import Tree
from hdlm_jax.models.heads import FactorisedHead, FlatHead, Head, backend

Attend: TypeAlias = Callable[..., jax.Array]
_SINUSOIDS, _PERIOD = 256, 10_000.0
# the axis of a weight, from its last, that parallel.tensor splits: outputs of the first product, inputs of the second;
# rows of tables; but the width of the factorised head's words, of which blocks of rows are taken
TENSOR_AXES = {"qkv": -1, "up": -1, "out": -2, "down": -2, "embedding": -2, "head": -2, "words": -1}
_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # uniform(+-1/sqrt(fan_in))


def rotary(seq_len: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [1, S, 1, dim] of the half-rotation rotary embedding, base 10,000."""
    angle = np.outer(np.arange(seq_len), _PERIOD ** (-np.arange(0, dim, 2) / dim))
    angle = np.concatenate([angle, angle], axis=-1)[None, :, None]
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def _rotate(x, cos, sin):
    half = x.shape[-1] // 2
    turned = jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return (x * cos + turned * sin).astype(x.dtype)


def attention(q, k, v, mask=None):
    """Attention of queries [B, Q, H, D/H] to keys and values [B, S, H, D/H]: [B, Q, H, D/H].

    mask: bool [B or 1, 1, Q, S], False where a key is not seen; None: all are.

    On CPU written out with the heads in front: XLA's gradient of the library's layout is about half as fast there.
    """
    if backend() != "cpu":
        return jax.nn.dot_product_attention(q, k, v, mask=mask)
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bhkd->bhqd", weights, v).swapaxes(1, 2)


class Norm(nn.Module):
    """Layer norm in float32, with a weight and, if asked for, a bias."""

    eps: float = 1e-5
    bias: bool = False

    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.ones_init(), x.shape[-1:]).reshape((1,) * (x.ndim - 1) + (-1,))
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        x = x * weight
        if self.bias:
            x = x + self.param("bias", nn.initializers.zeros_init(), x.shape[-1:]).reshape(weight.shape)
        return x


class Modulation(nn.Module):
    """`parts` vectors [B, 1, D] of time, zero at the start; without time they are plain parameters [1, 1, D]."""

    parts: int
    width: int

    @nn.compact
    def __call__(self, cond):
        out = self.parts * self.width
        bias = self.param("bias", nn.initializers.zeros_init(), (out,)).reshape(1, 1, out)
        if cond is not None:
            kernel = self.param("kernel", nn.initializers.zeros_init(), (cond.shape[-1], out))
            bias = bias + (cond @ kernel)[:, None]
        return jnp.split(bias, self.parts, axis=-1)


class Block(nn.Module):
    width: int
    heads: int
    dropout: float
    dtype: jnp.dtype
    attend: Attend | None = None

    @nn.compact
    def __call__(self, x, cond, mask, train: bool, layer=None, position=None):
        """x [B, S, D] -> (x, None).

        With a cache x is (x [B, Q, D], k, v [blocks, B, S, H, D/H]): the tokens at `position` int32 [B, Q], whose keys
        and values are put into k[layer] and v[layer] (in place; nowhere, if the position is S) before they are read.
        """
        if position is not None:
            x, *cache = x
        b, s, d = x.shape
        dense = lambda n, name, bias: nn.DenseGeneral(  # noqa: E731
            n, use_bias=bias, dtype=self.dtype, kernel_init=_uniform, name=name)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        shift1, scale1, gate1, shift2, scale2, gate2 = Modulation(6, d, name="modulation")(cond)
        h = Norm(name="norm1")(x) * (1 + scale1) + shift1
        # kernel [D, 3, D], so that a tensor shard of its last axis holds whole heads of each of q, k and v
        q, k, v = jnp.moveaxis(dense((3, d), "qkv", False)(h).reshape(b, s, 3, self.heads, -1), 2, 0)
        angles: Any = rotary(s if position is None else cache[0].shape[2], d // self.heads)
        if position is not None:
            angles = [jnp.asarray(a)[0].at[position].get(mode="clip") for a in angles]  # [B, Q, 1, D/H]
        cos, sin = angles
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        if position is not None:
            row = jnp.arange(b)[:, None]
            cache = [old.at[layer, row, position].set(new.astype(old.dtype), mode="drop")
                     for old, new in zip(cache, (k, v), strict=True)]
            k, v = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in cache)
        h = attention(q, k, v, mask) if self.attend is None else self.attend(self, q, k, v, mask)
        x = x + gate1 * drop(dense(d, "out", False)(h.reshape(b, s, d)))
        h = Norm(name="norm2")(x) * (1 + scale2) + shift2
        h = nn.gelu(dense(4 * d, "up", True)(h), approximate=True)
        x = x + gate2 * drop(dense(d, "down", True)(h))
        return (x if position is None else (x, *cache)), None


class Network(nn.Module):
    """Symbols z int32 [B, S], time t [B] in [0, 1] -> logits float32 [B, S, V].

    Attributes:
      head: FlatHead or FactorisedHead.
      symbols: number of rows of the embedding table (words, clusters, mask and padding).
      dtype: of the matrix products; the residual stream, norms and logits are float32.
      remat: what the backward pass makes anew: "none", "cheap" (all but matrix products), "all", or "auto": cheap on
        CPU, where that is faster as well, none elsewhere.
      cond: width of the embedded time.
      causal: tokens see those before them and themselves alone (autoregressive).
      attend: stands in for `attention`: (block, q, k, v, mask) -> [B, Q, H, D/H]; hashable. What is a block's own it
        may keep in the collection "patch" ([blocks, ...] outside).
    """

    head: Head
    symbols: int
    width: int = 768
    blocks: int = 12
    heads: int = 12
    dropout: float = 0.0
    time_conditioning: bool = True
    dtype: str = "float32"
    remat: str = "auto"
    cond: int = 128
    causal: bool = False
    attend: Attend | None = None

    def setup(self):
        limit = 1 / math.sqrt(self.width)
        init = lambda key, shape: jax.random.uniform(key, shape, minval=-limit, maxval=limit)  # noqa: E731
        self.embedding = self.param("embedding", init, (self.symbols, self.width))
        if self.time_conditioning:
            self.time_in = nn.Dense(self.cond, kernel_init=_uniform)
            self.time_out = nn.Dense(self.cond, kernel_init=_uniform)
        cheap = self.remat == "cheap" or self.remat == "auto" and backend() == "cpu"
        block: Any = Block
        if cheap or self.remat == "all":
            policy = jax.checkpoint_policies.dots_saveable if cheap else None
            block = nn.remat(Block, static_argnums=(4,), prevent_cse=False, policy=policy)
        self.stack = nn.scan(block, variable_axes={"params": 0, "patch": 0},
                             split_rngs={"params": True, "dropout": True},
                             in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0, nn.broadcast), length=self.blocks)(
            self.width, self.heads, self.dropout, jnp.dtype(self.dtype), self.attend)
        self.norm = Norm()
        self.modulation = Modulation(2, self.width)
        self.head_params = self.param("head", self.head.init, self.width)

    def trunk(self, z, t, segment=None, train: bool = False):
        """Hidden states float32 [B, S, D] before the head.

        segment: int32 [B, S]; tokens see those of the same number alone (documents of a packed row, padding). Or bool
          [B, S or 1, S], what each token sees.
        """
        x = self.embedding[z]
        cond = self._time(t) if self.time_conditioning else None
        mask = None if segment is None else segment[:, None]
        if mask is not None and mask.ndim == 3:
            mask = segment[:, None, :, None] == segment[:, None, None, :]
        if self.causal:
            before = jnp.tri(z.shape[1], dtype=bool)[None, None]
            mask = before if mask is None else mask & before
        x, _ = self.stack(x, cond, mask, train, None, None)
        return self._out(x, cond)

    def _out(self, x, cond):
        shift, scale = self.modulation(cond)
        return self.norm(x) * (1 + scale) + shift

    def partial(self, z, t, cache, position, seen):
        """Hidden states of some tokens of each row, given keys and values of the others as last computed.

        Args:
          z: int32 [B, Q], the tokens' symbols; t: float32 [B].
          cache: (k, v), see `empty_cache`.
          position: int32 [B, Q], where they stand, each in [0, S) at most once a row; S for an empty place, of which
            nothing is kept.
          seen: bool [B, Q or 1, S], what they attend to; nothing is added to it, in a causal network either.

        Returns:
          (hidden float32 [B, Q, D], the cache with the tokens' keys and values in it).
        """
        cond = self._time(t) if self.time_conditioning else None
        (x, *cache), _ = self.stack((self.embedding[z], *cache), cond, seen[:, None], False, jnp.arange(self.blocks),
                                    position)
        return self._out(x, cond), tuple(cache)

    def decode(self, z, cache):
        """Hidden states [B, n, D] of the symbols z [B, n] behind those in the cache, and the cache with them in it."""
        *cache, at = cache
        position = jnp.broadcast_to(at + jnp.arange(z.shape[1])[None], z.shape)
        seen = jnp.arange(cache[0].shape[2])[None, None] <= position[..., None]
        hidden, cache = self.partial(z, jnp.zeros(z.shape[:1]), cache, position, seen)
        return hidden, (*cache, at + z.shape[1])

    def next_word(self, params, cache, z, at=None):
        """(cache, prediction [B] of the word behind z [B, 1]); the cache knows where that is."""
        hidden, cache = self.apply({"params": params}, z, cache, method="decode")
        return cache, self.head.predict(params["head"], hidden[:, -1])

    def empty_cache(self, rows: int, seq_len: int):
        """Room for keys and values of so many rows and positions: (k, v [blocks, B, S, H, D/H], position int32)."""
        room = jnp.zeros((self.blocks, rows, seq_len, self.heads, self.width // self.heads), self.dtype)
        return room, room, jnp.int32(0)

    def _time(self, t):
        freq = jnp.exp(-math.log(_PERIOD) * jnp.arange(_SINUSOIDS // 2) / (_SINUSOIDS // 2)).reshape(1, -1)
        angle = t[:, None] * freq
        sinusoids = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        return nn.silu(self.time_out(nn.silu(self.time_in(sinusoids))))

    def __call__(self, z, t, segment=None, train: bool = False):
        return self.head.logits(self.head_params, self.trunk(z, t, segment, train))

    def denoise(self, params, z, t, segment=None):
        """The prediction at all tokens, made only where it is asked for (sampling)."""
        hidden: Any = self.apply({"params": params}, z, t, segment, method="trunk")
        return At(self.head, params["head"], hidden)


class At(NamedTuple):
    """A head waiting for the tokens it is asked about."""

    head: Head
    params: Tree
    hidden: jax.Array

    def select(self, index):
        return self.head.predict(self.params, self.hidden.reshape(-1, self.hidden.shape[-1])[index])


def make_network(config, hierarchy) -> Network:
    """The network of config.model for a hierarchy's words and symbols."""
    m = config.model
    dtype = jnp.dtype(m.dtype)
    head = FlatHead(hierarchy, dtype) if m.head == "flat" else FactorisedHead(hierarchy, dtype, m.prototypes)
    causal = config.diffusion.process == "autoregressive"
    return Network(head, hierarchy.padded_symbols, m.width, m.blocks, m.heads, m.dropout, m.time_conditioning,
                   m.dtype, m.remat, causal=causal)


def flops_per_token(config, hierarchy, process) -> float:
    """FLOPs of a forward and backward pass a token, as the algorithm needs them (2 per multiply-add, x3).

    Trunk products and attention for every token; the head for those that are noised, t uniform: all words in the flat
    one; in the factorised one all prototypes where clusters are asked for, at level 1 an average cluster's words.
    """
    m = config.model
    trunk = m.blocks * (12 * m.width**2 + 2 * m.seq_len * m.width)
    share = process.shares()
    rows = (1 - share[0]) * hierarchy.vocab_size
    if m.head == "factorised":
        n, within = hierarchy.sizes[1], config.diffusion.xi == 1 and config.diffusion.force_transition != "none"
        rows = share[2 if within else 1 :].sum() * n * m.prototypes + share[1] * hierarchy.vocab_size / n
    return float(6.0 * (trunk + m.width * rows))
