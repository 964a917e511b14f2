"""GPT-2 in Flax, with weights from a local folder in the layout of the Hugging Face hub: the field's judge of texts.

Radford et al. 2019: causal attention, learned positions, layer norm in front of each half of a block and at the end,
an MLP with the tanh form of GELU ("gelu_new"), the head tied to the word embeddings. A folder holds `config.json` and
`model.safetensors` (or `model.safetensors.index.json` and its shards), with tensor names with or without the prefix
`transformer.`; matrices are stored [in, out]. gpt2, gpt2-medium, gpt2-large and gpt2-xl differ in their sizes alone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.common.jsons import sha256_of

DTYPES = ("float32", "bfloat16")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# what would change the function and is not made here: name in config.json -> the values that are
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,), "tie_word_embeddings": (True,),
}
# name in a block of the file -> (place in our block's parameters, axes: D width, Q 3 D, F inner)
_BLOCK = {
    "ln_1.weight": ("norm1", "weight", "D"), "ln_1.bias": ("norm1", "bias", "D"),
    "attn.c_attn.weight": ("qkv", "kernel", "DQ"), "attn.c_attn.bias": ("qkv", "bias", "Q"),
    "attn.c_proj.weight": ("out", "kernel", "DD"), "attn.c_proj.bias": ("out", "bias", "D"),
    "ln_2.weight": ("norm2", "weight", "D"), "ln_2.bias": ("norm2", "bias", "D"),
    "mlp.c_fc.weight": ("up", "kernel", "DF"), "mlp.c_fc.bias": ("up", "bias", "F"),
    "mlp.c_proj.weight": ("down", "kernel", "FD"), "mlp.c_proj.bias": ("down", "bias", "D"),
}
_MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)$")  # the causal mask, which some files hold as a tensor


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What config.json says: V words, P positions, D width, L blocks, H heads, F width of the MLP, layer norms' eps."""

    vocab: int
    positions: int
    width: int
    blocks: int
    heads: int
    inner: int
    eps: float = 1e-5


def _precision(dtype) -> Any:
    """float32 means float32: by default GPUs and TPUs would round the products' inputs to fewer bits."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


class Norm(nn.Module):
    """Layer norm in float32 with weight and bias."""

    eps: float

    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.ones_init(), (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],))
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x * weight.reshape(1, 1, -1) + bias.reshape(1, 1, -1)


class Block(nn.Module):
    sizes: Sizes
    dtype: Any

    @nn.compact
    def __call__(self, x, _):
        b, s, d = x.shape
        dense = lambda n, name: nn.Dense(n, dtype=self.dtype, precision=_precision(self.dtype), name=name)  # noqa: E731
        product = lambda how, *of: jnp.einsum(  # noqa: E731
            how, *of, precision=_precision(self.dtype), preferred_element_type=jnp.float32)
        h = Norm(self.sizes.eps, name="norm1")(x)
        q, k, v = jnp.moveaxis(dense(3 * d, "qkv")(h).reshape(b, s, 3, self.sizes.heads, -1), 2, 0)
        scores = product("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        seen = jnp.tril(jnp.ones((s, s), bool))[None, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), axis=-1).astype(self.dtype)
        x = x + dense(d, "out")(product("bhqk,bkhd->bqhd", weights, v).reshape(b, s, d)).astype(jnp.float32)
        h = dense(self.sizes.inner, "up")(Norm(self.sizes.eps, name="norm2")(x))
        return x + dense(d, "down")(nn.gelu(h, approximate=True)).astype(jnp.float32), None


class GPT2(nn.Module):
    """Words int32 [B, S], S <= P -> float32 logits [B, S, V] of the word that follows each.

    dtype ("float32" or "bfloat16") is that of the matrix products; the residual stream, layer norms, softmax and the
    sums inside products are float32.
    """

    sizes: Sizes
    dtype: str = "float32"

    def setup(self):
        n, dtype = self.sizes, jnp.dtype(self.dtype)
        init = nn.initializers.normal(0.02)
        self.embedding = self.param("embedding", init, (n.vocab, n.width))
        self.position = self.param("position", init, (n.positions, n.width))
        self.stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast,
                             length=n.blocks)(n, dtype)
        self.norm = Norm(n.eps)

    def hidden(self, ids):
        """float32 [B, S, D] after the last layer norm."""
        x = self.embedding[ids].astype(jnp.float32) + self.position[None, : ids.shape[1]].astype(jnp.float32)
        return self.norm(self.stack(x, None)[0])

    def _logits(self, h):
        dtype = jnp.dtype(self.dtype)
        return jnp.einsum("...d,vd->...v", h.astype(dtype), self.embedding.astype(dtype), precision=_precision(dtype),
                          preferred_element_type=jnp.float32)

    def __call__(self, ids):
        return self._logits(self.hidden(ids))

    def score(self, ids, chunk: int = 0):
        """(nats float32 [B, S - 1], hidden float32 [B, S, D]): -log p of words 1.. given all before, in nats.

        chunk: positions whose logits of all words exist at once; 0: all.
        """
        h = self.hidden(ids)
        count = ids.shape[1] - 1
        chunk = min(chunk or count, count)
        parts = -(-count // chunk)

        def split(a):  # [B, S - 1, ...] -> [parts, B, chunk, ...]
            a = jnp.pad(a, [(0, 0), (0, parts * chunk - count)] + [(0, 0)] * (a.ndim - 2))
            return jnp.moveaxis(a.reshape(len(a), parts, chunk, *a.shape[2:]), 1, 0)

        def nats(part):
            logits = self._logits(part[0])
            chosen = jnp.take_along_axis(logits, part[1][..., None], axis=-1)[..., 0]
            return jax.nn.logsumexp(logits, axis=-1) - chosen

        out = jax.lax.map(nats, (split(h[:, :-1]), split(ids[:, 1:])))
        return jnp.moveaxis(out, 0, 1).reshape(len(ids), -1)[:, :count], h


def is_folder(path: str) -> bool:
    """Whether the path's config.json is one of the hub's (of GPT-2 or not: `check` tells)."""
    file = os.path.join(path, "config.json")
    return os.path.isfile(file) and "model_type" in _json(file)


def _json(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must be a JSON object")
    return found


def read_sizes(folder: str) -> Sizes:
    """Sizes of a folder's model. ValueError: no config.json, a size missing, or a variant of GPT-2 not made here."""
    path = os.path.join(folder, "config.json")
    config = _json(path)
    for name, values in _FIXED.items():
        if name in config and config[name] not in values or name == "model_type" and name not in config:
            raise ValueError(f"{path}: {name}={config.get(name)!r}: must be {' or '.join(map(repr, values))}")

    def size(name: str) -> int:
        value = config.get(name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{path}: {name}={value!r}: must be a positive integer")
        return value

    vocab, positions, width, blocks, heads = map(size, ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"))
    if width % heads:
        raise ValueError(f"{path}: n_head={heads}: must divide n_embd={width}")
    inner = size("n_inner") if config.get("n_inner") is not None else 4 * width
    return Sizes(vocab, positions, width, blocks, heads, inner, float(config.get("layer_norm_epsilon", 1e-5)))


def weight_files(folder: str) -> list[str]:
    """Paths of the folder's weights, sorted by name; ValueError where there are none or a shard is missing."""
    single, index = os.path.join(folder, _WEIGHTS), os.path.join(folder, _INDEX)
    paths = [single]
    if os.path.exists(index):
        shards = _json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{index}: has no weight_map")
        paths = [os.path.join(folder, name) for name in sorted(set(shards.values()))]
    elif not os.path.exists(single):
        raise ValueError(f"{folder}: neither {_WEIGHTS} nor {_INDEX} is there; weights of another format have to be "
                         "saved as safetensors first")
    for path in paths:
        if not os.path.isfile(path):
            raise ValueError(f"{path}: a shard that {_INDEX} names is missing")
    return paths


def sha256(folder: str) -> str:
    """Hash (hex) of the weights: of the file, or of the concatenated hashes of the shards in the order of names."""
    hashes = [sha256_of(path) for path in weight_files(folder)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _expected(n: Sizes) -> dict[str, tuple[tuple, tuple[int, ...]]]:
    """Name in the file -> (path in our parameters, block number last where there is one; shape)."""
    axes = {"D": n.width, "Q": 3 * n.width, "F": n.inner}
    out: dict[str, tuple[tuple, tuple[int, ...]]] = {
        "wte.weight": (("embedding",), (n.vocab, n.width)), "wpe.weight": (("position",), (n.positions, n.width)),
        "ln_f.weight": (("norm", "weight"), (n.width,)), "ln_f.bias": (("norm", "bias"), (n.width,))}
    for i in range(n.blocks):
        for name, (layer, kind, shape) in _BLOCK.items():
            out[f"h.{i}.{name}"] = ("stack", layer, kind, i), tuple(axes[a] for a in shape)
    return out


def num_params(n: Sizes) -> int:
    """Weights, the tied head once: 124,439,808 in gpt2."""
    return sum(math.prod(shape) for _, shape in _expected(n).values())


def _tensors(folder: str, n: Sizes) -> dict[str, Callable[[], np.ndarray]]:
    """Readers of the tensors by their name without prefix, after a check of all names and shapes."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError("GPT-2 weights need the safetensors package: pip install 'hdlm_jax[safetensors]'") from None
    readers: dict[str, Callable[[], np.ndarray]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        try:
            file = safe_open(path, framework="np")
            names = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: no safetensors file, or damaged ({error})") from None
        for name in names:
            short = name.removeprefix("transformer.")
            if _MASKS.match(short):
                continue
            if short in shapes:
                raise ValueError(f"{path}: tensor {name!r} is there twice")
            shapes[short] = tuple(file.get_slice(name).get_shape())
            readers[short] = functools.partial(file.get_tensor, name)
    expected = {name: shape for name, (_, shape) in _expected(n).items()}
    if missing := sorted(expected.keys() - shapes.keys()):
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, the first {missing[0]!r}")
    if extra := sorted(shapes.keys() - expected.keys() - {"lm_head.weight"}):
        raise ValueError(f"{folder}: {len(extra)} tensors that GPT-2 has not, the first {extra[0]!r}")
    for name, shape in (expected | {"lm_head.weight": expected["wte.weight"]}).items():
        if shapes.get(name, shape) != shape:
            raise ValueError(f"{folder}: tensor {name!r} has shape {list(shapes[name])}, config.json says "
                             f"{list(shape)}")
    return readers


def check(folder: str) -> Sizes:
    """Sizes, once config.json and the names and shapes of all tensors are right; reads no weight."""
    n = read_sizes(folder)
    _tensors(folder, n)
    return n


def load(folder: str, dtype: str = "float32") -> tuple[GPT2, Any]:
    """(network, parameters on the host): matrices in `dtype`, vectors in float32, blocks stacked along axis 0.

    Raises:
      ValueError: unknown dtype; no such folder or file; tensors missing, too many, of a wrong shape, or a head that is
        not the table of word embeddings.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}")
    n = read_sizes(folder)
    readers = _tensors(folder, n)
    params: dict[str, Any] = {}
    for name, (path, shape) in _expected(n).items():
        kept = jnp.dtype(dtype) if len(shape) == 2 else np.dtype(np.float32)
        *parents, leaf = path[:3]
        into = params
        for key in parents:
            into = into.setdefault(key, {})
        if path[0] == "stack":
            if leaf not in into:
                into[leaf] = np.empty((n.blocks, *shape), kept)
            into[leaf][path[3]] = readers[name]()
        else:
            into[leaf] = readers[name]().astype(kept)
    head = readers.get("lm_head.weight")
    if head is not None and not np.array_equal(head().astype(params["embedding"].dtype), params["embedding"]):
        raise ValueError(f"{folder}: lm_head.weight is not wte.weight; a head of its own is no GPT-2")
    return GPT2(n, dtype), params
