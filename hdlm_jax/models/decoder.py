"""The decoder-only transformer of open language models: Llama, SmolLM2, Qwen, Gemma 3, LLaDA, Dream and their kin.

RMS norms in front of attention and of a gated MLP, rotary positions, fewer heads of keys and values than of queries, a
head without bias; it is not told the time. What differs between families is config.DecoderConfig. Under an
autoregressive process it is causal; else a token sees all others, or its block and those before (docs/models.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from hdlm_jax.common.parallel import Tree
from hdlm_jax.config import DecoderConfig
from hdlm_jax.models.attention import Seen, attention
from hdlm_jax.models.experts import Experts
from hdlm_jax.models.features import FeaturePlaces
from hdlm_jax.models.heads import padded
from hdlm_jax.models.network import PRODUCT, Attend, Transformer, rotate

_normal = nn.initializers.normal(0.02)
LORA_SCALE = 2.0  # of what low-rank additions give (alpha / rank)


def frequencies(dims: DecoderConfig, dim: int, local: bool = False) -> np.ndarray:
    """Angles a place [dim / 2] of the rotary embedding of `dim` units, float64.

    linear: positions divided by the factor (arXiv 2306.15595); llama3: slow waves alone (Llama 3.1's release).
    """
    freq = (dims.window_theta if local else dims.theta) ** (-np.arange(0, dim, 2) / dim)
    kind, numbers = dims.rotary_scaling()
    if not kind or local:
        return freq
    slow = freq / numbers["factor"]
    if kind == "linear":
        return slow
    turns = numbers["length"] * freq / (2 * np.pi)  # within the length it was first trained on
    share = np.clip((turns - numbers["low"]) / (numbers["high"] - numbers["low"]), 0, 1)
    return slow + (freq - slow) * share


Angles: TypeAlias = tuple[jax.Array, jax.Array]


class Places(NamedTuple):
    """What depends on where tokens stand.

    far: cos and sin [1 or B, Q, 1, dim] of the rotary embedding; local: those of blocks with a window, and the keys in
    it, bool [1 or B, 1, Q, S]; None where no block has one.
    """

    far: Angles
    local: tuple[Angles, jax.Array] | None = None


class RMSNorm(nn.Module):
    """x / rms(x) times a weight, in float32."""

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        start = nn.initializers.constant(1 - self.offset)
        weight = self.param("weight", start, x.shape[-1:]).astype(jnp.float32) + self.offset
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x * weight.reshape((1,) * (x.ndim - 1) + (-1,))


class Product(nn.Module):
    """h W (+ b) in `dtype`; with lora > 0 also h A B of that rank, and W stays as it is (arXiv 2106.09685)."""

    features: int
    bias: bool
    dtype: jnp.dtype
    lora: int = 0
    scale: float = 1.0  # of the initial weights

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        # float32 means float32: by default GPUs and TPUs would round the products' inputs to fewer bits
        precision = jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None
        kernel = self.param("kernel", nn.initializers.normal(0.02 * self.scale), (h.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,)) if self.bias else None
        h = h.astype(self.dtype)
        if self.lora:
            kernel, bias = jax.lax.stop_gradient((kernel, bias))
            first = self.param("lora_in", nn.initializers.normal(1 / math.sqrt(h.shape[-1])), (h.shape[-1], self.lora))
            second = self.param("lora_out", nn.initializers.zeros_init(), (self.lora, self.features))
        out = jnp.matmul(h, kernel.astype(self.dtype), precision=precision)
        if bias is not None:
            out = out + bias.astype(self.dtype).reshape((1,) * (out.ndim - 1) + (-1,))
        if self.lora:
            low = jnp.matmul(h, first.astype(self.dtype), precision=precision)
            out = out + LORA_SCALE * jnp.matmul(low, second.astype(self.dtype), precision=precision)
        return checkpoint_name(out, PRODUCT)


class GatedMLP(nn.Module):
    """down(act(gate(h)) * up(h))."""

    dims: DecoderConfig
    inner: int
    dtype: jnp.dtype
    scale: float = 1.0

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        d = h.shape[-1]
        product = lambda n, name, scale=1.0: Product(  # noqa: E731
            n, False, self.dtype, self.dims.lora, scale, name=name)
        gate = product(self.inner, "gate")(h)
        gate = nn.silu(gate) if self.dims.activation == "silu" else nn.gelu(gate, approximate=True)
        return product(d, "down", self.scale)(gate * product(self.inner, "up")(h))


class Block(nn.Module):
    """Attention and MLP. dense: whether the MLP is a single one where others have experts."""

    dims: DecoderConfig
    sizes: tuple[int, int, int, int]  # heads, those of keys and values, units of each, of the MLP
    depth: int  # blocks of the network
    dtype: jnp.dtype
    attention: str
    attend: Attend | None = None
    dense: bool = True

    @nn.compact
    def __call__(self, x: Any, places: Places, seen: Seen, train: bool, layer: jax.Array,
                 position: jax.Array | None = None) -> tuple[Any, None]:
        """x [B, S, D] -> (x, None); with a cache x is (x [B, Q, D], k, v), see models.network.Block."""
        if position is not None:
            x, *cache = x
        n, heads, inner = self.dims, self.sizes[0], self.sizes[3]
        (b, s, d), dim = x.shape, self.sizes[2]
        norm = lambda name: RMSNorm(n.eps, n.norm_offset, name=name)  # noqa: E731
        spread = 1 / math.sqrt(2 * self.depth)
        h = norm("norm1")(x)
        q, k, v = (Product(many * dim, n.qkv_bias, self.dtype, n.lora, name=name)(h).reshape(b, s, many, dim)
                   for name, many in zip("qkv", (heads, self.sizes[1], self.sizes[1]), strict=True))
        if n.qk_norm:
            q, k = norm("q_norm")(q).astype(self.dtype), norm("k_norm")(k).astype(self.dtype)
        seen, (cos, sin) = self._of_layer(places, seen, layer)
        q, k = _turned(q, cos, sin), _turned(k, cos, sin)
        if n.query_scale:
            q = q * math.sqrt(dim / n.query_scale)
        if position is not None:
            cache, k, v = self._kept(cache, (k, v), layer, position)
        h = self._attended(q, k, v, seen)
        h = Product(d, False, self.dtype, n.lora, spread, name="out")(h.reshape(b, s, heads * dim))
        x = x + (norm("post1")(h) if n.post_norms else h)
        mlp = GatedMLP(n, inner, self.dtype, spread, name="mlp") if self.dense else Experts(
            n, self.dtype, spread, name="moe")
        h = mlp(norm("norm2")(x))
        x = x + (norm("post2")(h) if n.post_norms else h)
        return (x if position is None else (x, *cache)), None

    def _kept(self, cache: Sequence[jax.Array], new: Sequence[jax.Array], layer: jax.Array, position: jax.Array
              ) -> tuple[list[jax.Array], jax.Array, jax.Array]:
        """(the cache with new keys and values [B, Q, ...] in it, the keys, the values that the queries read)."""
        cache = put(cache, new, layer, position)
        k, v = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in cache)
        return cache, k, v

    def _attended(self, q: jax.Array, k: jax.Array, v: jax.Array, seen: Seen) -> jax.Array:
        if self.attend is None:
            return attention(q, k, v, seen, self.attention)
        k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
        return self.attend(self, q, k, v, seen.dense(q.shape[1], k.shape[1]))

    def _of_layer(self, places: Places, seen: Seen, layer: jax.Array) -> tuple[Seen, Angles]:
        """What the tokens of this block see, and cos and sin of their places."""
        far = places.far
        if places.local is None:
            return seen, far
        local, (near, window) = (layer + 1) % self.dims.window_every != 0, places.local
        return seen.within(window | ~local), (jnp.where(local, near[0], far[0]), jnp.where(local, near[1], far[1]))


def put(cache: Sequence[jax.Array], new: Sequence[jax.Array], layer: jax.Array, position: jax.Array
        ) -> list[jax.Array]:
    """A cache [blocks, B, S, ...] with new [B, Q, ...] at these places, int32 [B, Q] (S: nowhere), in place."""
    row = jnp.arange(len(position))[:, None]
    return [old.at[layer, row, position].set(a.astype(old.dtype), mode="drop")
            for old, a in zip(cache, new, strict=True)]


def _turned(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x with the rotary embedding of its first units, as many as there are angles."""
    turned = rotate(x[..., : cos.shape[-1]], cos, sin)
    return turned if cos.shape[-1] == x.shape[-1] else jnp.concatenate([turned, x[..., cos.shape[-1] :]], axis=-1)


class Decoder(Transformer):
    """States z int32 [B, S] -> hidden states; time is left out.

    Parameters: embedding [rows, D] of the tokens, states [rows, D] of clusters and mask, stack (and, before it, dense,
    where the first blocks have no experts), norm, head. param_dtype: of the matrices.
    """

    dims: DecoderConfig = DecoderConfig()
    param_dtype: str = "float32"

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Heads, those of keys and values, units of each, units of the MLP."""
        n, d = self.dims, self.width
        return (self.heads, n.kv_heads or self.heads, n.head_dim or d // self.heads, n.inner_of(d))

    @property
    def shift(self) -> bool:
        """Whether a token is predicted by the hidden state before its own (a causal process shifts its inputs)."""
        return self.dims.shifted and not self.causal

    def setup(self) -> None:
        tokens = self.head.hierarchy.vocab_size
        self.first = FeaturePlaces(self.features, self.copies, name="features")
        self.embedding = self.param("embedding", _normal, (padded(tokens), self.width))
        self.states = self.param("states", _normal, (padded(self.num_states - tokens), self.width))
        self.stack = self._blocks(dense=not self.dims.experts)
        if self.dims.experts and self.dims.dense_blocks:
            self.dense = self._blocks(dense=True)
        self.norm = RMSNorm(self.dims.eps, self.dims.norm_offset)
        self.own_head = self.param("head", lambda key: self.own(self.head.init(key, self.width)))

    def _blocks(self, dense: bool) -> nn.Module:
        first = self.dims.dense_blocks if self.dims.experts else 0
        each = (nn.broadcast, nn.broadcast, nn.broadcast, 0, nn.broadcast)
        return self.stacked(Block, each, first if dense and self.dims.experts else self.blocks - first)(
            self.dims, self.sizes, self.blocks, jnp.dtype(self.dtype), self.attention, self.attend, dense)

    def head_params(self, params: Tree) -> Tree:
        """The head's parameters; a flat one's bias stays as it is: open models have none, and ours only keeps ids that
        are no text from being predicted."""
        head = super().head_params(params)
        if "bias" not in head:  # a factorised one
            return head
        kernel = jax.lax.stop_gradient(head["kernel"]) if self.dims.lora else head["kernel"]
        return {"kernel": kernel, "bias": jax.lax.stop_gradient(head["bias"])}

    def with_table(self, params: Tree, table: jax.Array | np.ndarray) -> Tree:
        tokens, size = self.head.hierarchy.vocab_size, len(params["states"])
        table = jnp.asarray(table)
        first, rest = table[:tokens].astype(params["embedding"].dtype), table[tokens : tokens + size]
        return {**params, "embedding": params["embedding"].at[:tokens].set(first),
                "states": params["states"].at[: len(rest)].set(rest)}

    def table(self, params: Tree) -> jax.Array:
        return jnp.concatenate([params["embedding"][: self.head.hierarchy.vocab_size], params["states"]])

    def init_params(self, key: jax.Array, seq_len: int) -> Tree:
        def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
            names = [str(key.key) for key in path]
            kept = names[-1] in ("bias", "weight") or {"router", "words"} & set(names) or _is_trained(names)
            return leaf if kept else leaf.astype(self.param_dtype)

        return jax.tree_util.tree_map_with_path(cast, super().init_params(key, seq_len))

    def trunk(self, z: jax.Array, t: jax.Array, segment: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Hidden states float32 [B, S, D] before the head; segment: see models.network.Network.trunk."""
        place = jnp.arange(z.shape[1])[None] % (z.shape[1] // self.copies)
        x, segment = self.first(self._embed(z), segment, place)
        seen = self._context(Seen.of(segment, self.causal), place, z.shape[1])
        h = self._through(x, self._places(place, z.shape[1]), seen, None)
        if not self.shift:
            return self.norm(h)
        h = self.norm(h)
        before = jnp.concatenate([h[:, :1], h[:, :-1]], axis=1)
        if segment is None or segment.ndim == 3:
            return before
        same = jnp.pad(segment[:, 1:] == segment[:, :-1], ((0, 0), (1, 0)))
        return jnp.where(same[..., None], before, h)

    def partial(self, z: jax.Array, t: jax.Array, cache: tuple[jax.Array, ...], position: jax.Array, seen: jax.Array
                ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """As models.network.Network.partial; of `seen` a token attends to what its context lets it see."""
        s = cache[0].shape[2]
        shown, heard = self.first(self._embed(z), seen, position)
        far = self._context(Seen.of(heard), position, s)
        x, k, v = self._through((shown, *cache[:2]), self._places(position, s), far, position)
        h = self.norm(x)
        if not self.shift:
            return h, (k, v)
        row = jnp.arange(len(z))[:, None]
        own = cache[2].at[0, row, position].set(h, mode="drop")
        return own[0, row, jnp.maximum(position - 1, 0)], (k, v, own)

    def empty_cache(self, rows: int, seq_len: int) -> tuple[jax.Array, ...]:
        """(k, v [blocks, B, S, heads of keys, dim]); with hidden states float32 [1, B, S, D] where tokens are predicted
        by those before their own."""
        room = jnp.zeros((self.blocks, rows, seq_len, *self.sizes[1:3]), self.dtype)
        return (room, room, jnp.zeros((1, rows, seq_len, self.width))) if self.shift else (room, room)

    def _embed(self, z: jax.Array) -> jax.Array:
        tokens = self.head.hierarchy.vocab_size
        words, others = self.embedding[jnp.minimum(z, tokens - 1)], self.states[jnp.maximum(z - tokens, 0)]
        if self.dims.lora:
            words = jax.lax.stop_gradient(words)
        x = jnp.where(z[..., None] < tokens, words, others).astype(jnp.float32)
        return x * math.sqrt(self.width) if self.dims.scale_embeddings else x

    def _places(self, place: jax.Array, keys: int) -> Places:
        """place: int32 [1 or B, Q]."""
        dim = int(self.sizes[2] * self.dims.rotary_share)

        def angles(local: bool) -> Angles:
            freq = np.tile(frequencies(self.dims, dim, local), 2)
            table = np.outer(np.arange(keys), freq)  # in float64: a long way turns often
            cos, sin = (jnp.asarray(f(table), jnp.float32).at[place].get(mode="clip") for f in (np.cos, np.sin))
            return cos[:, :, None], sin[:, :, None]

        if not self.dims.window:
            return Places(angles(False))
        near = jnp.abs(place[:, :, None] - jnp.arange(keys)[None, None]) < self.dims.window
        return Places(angles(False), (angles(True), near[:, None]))

    def _context(self, seen: Seen, place: jax.Array, keys: int) -> Seen:
        return self._sees(seen, place, keys, self.block or self.dims.own_block)

    def _through(self, x: Any, places: Places, seen: Seen, position: jax.Array | None) -> Any:
        layers, first = jnp.arange(self.blocks), self.dims.dense_blocks if self.dims.experts else 0
        if first:
            x, _ = self.dense(x, places, seen, False, layers[:first], position)
        x, _ = self.stack(x, places, seen, False, layers[first:], position)
        return x

    def __call__(self, z: jax.Array, t: jax.Array) -> jax.Array:
        params = {"embedding": self.embedding, "head": self.own_head}
        return self.head.logits(self.head_params(params), self.trunk(z, t))


def _is_trained(names: Sequence[str]) -> bool:
    """Whether low-rank training changes it: the additions, vectors of clusters and mask, a head over clusters or
    orders, the projection of features."""
    return names[-1].startswith("lora") or names[0] in ("states", "features", "order") or "clusters" in names


def lora_labels(params: Tree) -> Tree:
    """"trained" or "kept" for every parameter."""
    def of(path: tuple[Any, ...], leaf: jax.Array) -> str:
        return "trained" if _is_trained([str(key.key) for key in path]) else "kept"

    return jax.tree_util.tree_map_with_path(of, params)


def apart(params: Tree) -> tuple[Tree, Tree]:
    """Parameters that low-rank training changes and those that it keeps, each with None in the others' places."""
    labels = lora_labels(params)
    return (jax.tree.map(lambda a, label: a if label == "trained" else None, params, labels),
            jax.tree.map(lambda a, label: a if label == "kept" else None, params, labels))


def merged(params: Tree) -> Tree:
    """Parameters of the same network without low-rank additions: W + A B in the place of W."""
    if not isinstance(params, dict):
        return params
    if "lora_in" not in params:
        return {name: merged(part) for name, part in params.items()}
    kept = {name: a for name, a in params.items() if not name.startswith("lora")}
    added = LORA_SCALE * jnp.matmul(params["lora_in"], params["lora_out"], precision=jax.lax.Precision.HIGHEST)
    return kept | {"kernel": (kept["kernel"] + added).astype(kept["kernel"].dtype)}
