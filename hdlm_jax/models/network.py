"""The published transformer: states and time -> hidden states -> (by a head) predictions over tokens.

Bidirectional, rotary positions, adaptive layer norm on time (shift, scale, gate), MLP of 4 D with tanh GELU; layer
norm in float32 without bias; no bias in qkv and out. Facts from the paper's network (arXiv 2510.08632).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from hdlm_jax.common import parallel
from hdlm_jax.common.parallel import Tree
from hdlm_jax.diffusion.prediction import Prediction
from hdlm_jax.models.attention import SAVED, Seen, attention, two_copies
from hdlm_jax.models.features import FeaturePlaces
from hdlm_jax.models.heads import At, Head
from hdlm_jax.models.trunk import Cache

Attend: TypeAlias = Callable[..., jax.Array]
_SINUSOIDS, _PERIOD = 256, 10_000.0
PRODUCT = "product"  # name of what remat="cheap" keeps
# the axis of a weight, from its last, that parallel.tensor splits: outputs of the first product, inputs of the second;
# rows of tables; but the width of the factorised head's words, of which blocks of rows are taken
TENSOR_AXES = {"qkv": -1, "q": -1, "k": -1, "v": -1, "gate": -1, "up": -1, "out": -2, "down": -2,
               "embedding": -2, "head": -2, "words": -1}
# (axis of inputs, of outputs) of the kernels of the blocks' products, by their names; every other axis is one of many
# matrices side by side (blocks, experts; q, k and v), which training.state's Muon makes orthogonal one by one
_ACROSS = (-2, -1)
MATRICES = {"qkv": (-3, -1), "q": _ACROSS, "k": _ACROSS, "v": _ACROSS, "out": _ACROSS, "gate": _ACROSS, "up": _ACROSS,
            "down": _ACROSS}
_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # uniform(+-1/sqrt(fan_in))


def matrix_axes(names: Sequence[str]) -> tuple[int, int] | None:
    """MATRICES of a parameter, given the names on the way to it; None of all else: tables, head, norms, biases, what
    time does, the choice of experts, low-rank additions (docs/theory.md section 8)."""
    within = names[0] in ("stack", "dense", "prelude", "coda") and names[-1] == "kernel"
    return MATRICES.get(names[-2]) if within else None


def rotary(seq_len: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [1, S, 1, dim] of the half-rotation rotary embedding, base 10,000."""
    angle = np.outer(np.arange(seq_len), _PERIOD ** (-np.arange(0, dim, 2) / dim))
    angle = np.concatenate([angle, angle], axis=-1)[None, :, None]
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(x: jax.Array, cos: np.ndarray | jax.Array, sin: np.ndarray | jax.Array) -> jax.Array:
    dim = x.shape[-1]
    if parallel.platform() == "tpu":  # as a product: moving parts of a vector register costs more there
        signs = np.where(np.arange(dim) < dim // 2, -1, 1)
        turn = jnp.asarray(np.roll(np.eye(dim), dim // 2, axis=1) * signs, x.dtype)
        turned = jnp.matmul(x, turn, precision=jax.lax.Precision.HIGHEST)
    else:
        turned = jnp.concatenate([-x[..., dim // 2 :], x[..., : dim // 2]], axis=-1)
    return (x * cos + turned * sin).astype(x.dtype)


class Norm(nn.Module):
    """Layer norm in float32, with a weight and, if asked for, a bias."""

    eps: float = 1e-5
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.param("weight", nn.initializers.ones_init(), x.shape[-1:]).reshape((1,) * (x.ndim - 1) + (-1,))
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps) * weight
        if self.bias:
            x = x + self.param("bias", nn.initializers.zeros_init(), x.shape[-1:]).reshape(weight.shape)
        return x


class Modulation(nn.Module):
    """`parts` vectors [B, 1, D] of time, zero at the start; without time they are plain parameters [1, 1, D]."""

    parts: int
    width: int

    @nn.compact
    def __call__(self, cond: jax.Array | None) -> list[jax.Array]:
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
    attention: str
    attend: Attend | None = None
    copies: int = 1

    @nn.compact
    def __call__(self, x: Any, cond: jax.Array | None, seen: Seen, train: bool,
                 layer: jax.Array | None = None, position: jax.Array | None = None) -> tuple[Any, None]:
        """x [B, S, D] -> (x, None).

        With a cache x is (x [B, Q, D], k, v [blocks, B, S, H, D/H]): the tokens at `position` int32 [B, Q], whose keys
        and values are put into k[layer] and v[layer] (in place; nowhere, if the position is S) before they are read.
        """
        if position is not None:
            x, *cache = x
        b, s, d = x.shape
        dense = lambda n, name, bias: lambda h: checkpoint_name(nn.DenseGeneral(  # noqa: E731
            n, use_bias=bias, dtype=self.dtype, kernel_init=_uniform, name=name)(h), PRODUCT)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        shift1, scale1, gate1, shift2, scale2, gate2 = Modulation(6, d, name="modulation")(cond)
        h = Norm(name="norm1")(x) * (1 + scale1) + shift1
        # kernel [D, 3, D], so that a tensor shard of its last axis holds whole heads of each of q, k and v
        q, k, v = jnp.moveaxis(dense((3, d), "qkv", False)(h).reshape(b, s, 3, self.heads, -1), 2, 0)
        places = s // self.copies if position is None else cache[0].shape[2]
        angles: Any = [np.tile(a, (1, self.copies, 1, 1)) for a in rotary(places, d // self.heads)]
        if position is not None:
            angles = [jnp.asarray(a)[0].at[position].get(mode="clip") for a in angles]  # [B, Q, 1, D/H]
        cos, sin = angles
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if position is not None:
            row = jnp.arange(b)[:, None]
            cache = [old.at[layer, row, position].set(new.astype(old.dtype), mode="drop")
                     for old, new in zip(cache, (k, v), strict=True)]
            k, v = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in cache)
        h = (attention(q, k, v, seen, self.attention) if self.attend is None else
             self.attend(self, q, k, v, seen.dense(q.shape[1], k.shape[1])))
        x = x + gate1 * drop(dense(d, "out", False)(h.reshape(b, s, d)))
        h = Norm(name="norm2")(x) * (1 + scale2) + shift2
        h = nn.gelu(dense(4 * d, "up", True)(h), approximate=True)
        x = x + gate2 * drop(dense(d, "down", True)(h))
        return (x if position is None else (x, *cache)), None


class Transformer(nn.Module):
    """What networks of several kinds share: a module's `trunk`, `partial` and `empty_cache` as models.trunk.Trunk.

    Attributes:
      head: FlatHead or FactorisedHead.
      num_states: number of rows of the embedding tables (tokens, clusters, mask and padding).
      dtype: of the matrix products; the residual stream, norms and logits are float32.
      remat: what the backward pass makes anew: "none", "cheap" (all but products with weights), "all", or "auto": cheap
        on CPU, where that is faster as well, none elsewhere (training chooses by memory: `training.fitting`).
      causal: tokens see those before them and themselves alone (autoregressive).
      attention: the kernel, see `models.attention`.
      attend: stands in for attention: (block, q, k, v, mask) -> [B, Q, H, D/H]; hashable. What is a block's own it
        may keep in the collection "patch" ([blocks, ...] outside).
      block: tokens of a block, which sees itself and those before it alone (model.block); 0: none.
      features: (P, F), vectors that the first places show, and their numbers (`models.features`).
      copies: of the text side by side, each at the same places (`hidden` with clean tokens).
      tied: the head's vectors of the words are their embeddings (model.tied).
    """

    head: Head
    num_states: int
    width: int = 768
    blocks: int = 12
    heads: int = 12
    dtype: str = "float32"
    remat: str = "auto"
    causal: bool = False
    attention: str = "xla"
    attend: Attend | None = None
    block: int = 0
    features: tuple[int, int] = (0, 0)
    copies: int = 1
    tied: bool = False

    def own(self, head: Tree) -> Tree:
        """Of a head's parameters those that are not the table's."""
        return {name: part for name, part in head.items() if name != "kernel"} if self.tied else head

    def head_params(self, params: Tree) -> Tree:
        head = params["head"]
        return {**head, "kernel": params["embedding"][: len(head["bias"])]} if self.tied else head

    def with_table(self, params: Tree, table: jax.Array | np.ndarray) -> Tree:
        rows = len(params["embedding"])
        return {**params, "embedding": params["embedding"].at[: min(rows, len(table))].set(table[:rows])}

    def table(self, params: Tree) -> jax.Array:
        return params["embedding"]

    def with_head(self, params: Tree, kernel: jax.Array, bias: jax.Array, h: jax.Array | None = None) -> Tree:
        return {**params, "head": params["head"] | self.own(self.head.start(kernel, bias, h))}

    def init_params(self, key: jax.Array, seq_len: int) -> Tree:
        return self.init(key, jnp.zeros((1, seq_len), jnp.int32), jnp.zeros((1,)))["params"]

    def hidden(self, params: Tree, z: jax.Array, t: jax.Array, segment: jax.Array | None = None,
               dropout: jax.Array | None = None, clean: jax.Array | None = None) -> jax.Array:
        if clean is not None:
            both, s = jnp.concatenate([z, clean], axis=1), z.shape[1]
            return self.clone(copies=2).hidden(params, both, t, two_copies(s, self.block, segment), dropout)[:, :s]
        noise: Any = {} if dropout is None else {"rngs": {"dropout": dropout}}
        found: Any = self.apply({"params": params}, z, t, segment, dropout is not None, method="trunk", **noise)
        return found

    def hidden_at(self, params: Tree, z: jax.Array, t: jax.Array, cache: Cache, position: jax.Array, seen: jax.Array
                  ) -> tuple[jax.Array, Cache]:
        found: Any = self.apply({"params": params}, z, t, cache, position, seen, method="partial")
        return found

    def denoise(self, params: Tree, z: jax.Array, t: jax.Array, segment: jax.Array | None = None) -> At:
        return At(self.head, self.head_params(params), self.hidden(params, z, t, segment))

    def next_token(self, params: Tree, cache: Cache, z: jax.Array, at: jax.Array) -> tuple[Cache, Prediction]:
        position = jnp.broadcast_to(at, z.shape)
        seen = jnp.arange(cache[0].shape[2])[None, None] <= position[..., None]
        hidden, cache = self.hidden_at(params, z, jnp.zeros(z.shape[:1]), cache, position, seen)
        return cache, self.head.predict(self.head_params(params), hidden[:, -1])

    def _sees(self, seen: Seen, place: jax.Array, keys: int, size: int) -> Seen:
        """Of `seen`, for tokens at `place` int32 [1 or B, Q], blocks of `size` up to their own (0: all)."""
        if self.causal or self.copies > 1 or not size:
            return seen
        return seen.within((jnp.arange(keys)[None, None] // size <= place[:, :, None] // size)[:, None])

    def stacked(self, block: type[nn.Module], in_axes: tuple[Any, ...], length: int) -> Callable[..., nn.Module]:
        """The block `length` times over, its parameters stacked along axis 0, with what `remat` says.

        in_axes: of the block's arguments after the first, as nn.scan takes them; the third says whether it trains.
        """
        cheap = self.remat == "cheap" or self.remat == "auto" and parallel.platform() == "cpu"
        made: Any = block
        if cheap or self.remat == "all":
            keep = jax.checkpoint_policies
            products = (keep.dots_saveable if parallel.platform() == "cpu" else
                        keep.save_only_these_names(PRODUCT, SAVED))  # without those of attention and rotation
            made = nn.remat(block, static_argnums=(4,), prevent_cse=False, policy=products if cheap else None)
        return nn.scan(made, variable_axes={"params": 0, "patch": 0}, split_rngs={"params": True, "dropout": True},
                       in_axes=in_axes, length=length)


class Network(Transformer):
    """States z int32 [B, S], time t [B] in [0, 1] -> logits float32 [B, S, V]; cond: width of the embedded time."""

    dropout: float = 0.0
    time_conditioning: bool = True
    cond: int = 128

    def setup(self) -> None:
        limit = 1 / math.sqrt(self.width)
        init = lambda key, shape: jax.random.uniform(key, shape, minval=-limit, maxval=limit)  # noqa: E731
        self.embedding = self.param("embedding", init, (self.num_states, self.width))
        self.first = FeaturePlaces(self.features, self.copies, name="features")
        if self.time_conditioning:
            self.time_in = nn.Dense(self.cond, kernel_init=_uniform)
            self.time_out = nn.Dense(self.cond, kernel_init=_uniform)
        self.stack = self.stacked(Block, (nn.broadcast, nn.broadcast, nn.broadcast, 0, nn.broadcast), self.blocks)(
            self.width, self.heads, self.dropout, jnp.dtype(self.dtype), self.attention, self.attend, self.copies)
        self.norm = Norm()
        self.modulation = Modulation(2, self.width)
        self.own_head = self.param("head", lambda key: self.own(self.head.init(key, self.width)))

    def shown(self, z: jax.Array) -> jax.Array:
        return self.embedding[z]

    def trunk(self, z: jax.Array, t: jax.Array, segment: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Hidden states float32 [B, S, D] before the head.

        segment: int32 [B, S]; positions see those of the same number alone (documents of a packed row, padding). Or
          bool [B, S or 1, S], what each position sees.
        """
        place = jnp.arange(z.shape[1])[None] % (z.shape[1] // self.copies)
        x, segment = self.first(self.shown(z), segment, place)
        cond = self._time(t) if self.time_conditioning else None
        seen = self._sees(Seen.of(segment, self.causal), place, z.shape[1], self.block)
        x, _ = self.stack(x, cond, seen, train, None, None)
        return self._out(x, cond)

    def _out(self, x: jax.Array, cond: jax.Array | None) -> jax.Array:
        shift, scale = self.modulation(cond)
        return self.norm(x) * (1 + scale) + shift

    def partial(self, z: jax.Array, t: jax.Array, cache: tuple[jax.Array, jax.Array], position: jax.Array,
                seen: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Hidden states of some positions of each row, given keys and values of the others as last computed.

        Args:
          z: int32 [B, Q], their states; t: float32 [B].
          cache: (k, v), see `empty_cache`.
          position: int32 [B, Q], where they stand, each in [0, S) at most once a row; S for an empty place, of which
            nothing is kept.
          seen: bool [B, Q or 1, S], what they attend to; in a causal network too it is all, with blocks those up to
            a token's own.

        Returns:
          (hidden float32 [B, Q, D], the cache with their keys and values in it).
        """
        cond = self._time(t) if self.time_conditioning else None
        shown, heard = self.first(self.embedding[z], seen, position)
        far = self._sees(Seen.of(heard), position, cache[0].shape[2], self.block)
        (x, k, v), _ = self.stack((shown, *cache), cond, far, False, jnp.arange(self.blocks), position)
        return self._out(x, cond), (k, v)

    def empty_cache(self, rows: int, seq_len: int) -> tuple[jax.Array, jax.Array]:
        """Room for keys and values of so many rows and positions: (k, v [blocks, B, S, H, D/H])."""
        room = jnp.zeros((self.blocks, rows, seq_len, self.heads, self.width // self.heads), self.dtype)
        return room, room

    def _time(self, t: jax.Array) -> jax.Array:
        angle = t[:, None] * jnp.exp(-math.log(_PERIOD) * jnp.arange(_SINUSOIDS // 2) / (_SINUSOIDS // 2))[None]
        sinusoids = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        return nn.silu(self.time_out(nn.silu(self.time_in(sinusoids))))

    def __call__(self, z: jax.Array, t: jax.Array, segment: jax.Array | None = None, train: bool = False) -> jax.Array:
        head = self.head_params({"embedding": self.embedding, "head": self.own_head})
        return self.head.logits(head, self.trunk(z, t, segment, train))
