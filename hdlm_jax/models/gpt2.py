"""GPT-2 in Flax, with weights from a local folder in the layout of the Hugging Face hub: the field's judge of texts.

Radford et al. 2019: causal attention, learned positions, layer norm in front of each half of a block and at the end,
an MLP with the tanh form of GELU ("gelu_new"), the head tied to the word embeddings. A folder holds `config.json` and
`model.safetensors` (or `model.safetensors.index.json` and its shards), with tensor names with or without the prefix
`transformer.`; matrices are stored [in, out]. gpt2, gpt2-medium, gpt2-large and gpt2-xl differ in their sizes alone.
"""

from __future__ import annotations

import math
import os
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.common.jsons import read_json
from hdlm_jax.models.network import Norm
from hdlm_jax.models.weight_files import Layout, Params, Tensor, hub_files, open_safetensors, places
from hdlm_jax.models.weight_files import check as check_names
from hdlm_jax.models.weight_files import load as load_params

# what would change the function and is not made here: name in config.json -> the values that are
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,), "tie_word_embeddings": (True,),
}
# name in the file -> (place in our parameters, axes: V words, P positions, D width, Q 3 D, F inner)
_TOP = {"wte.weight": ("embedding", "VD"), "wpe.weight": ("position", "PD"), "ln_f.weight": ("norm.weight", "D"),
        "ln_f.bias": ("norm.bias", "D")}
_BLOCK = {
    "ln_1.weight": ("stack.norm1.weight", "D"), "ln_1.bias": ("stack.norm1.bias", "D"),
    "attn.c_attn.weight": ("stack.qkv.kernel", "DQ"), "attn.c_attn.bias": ("stack.qkv.bias", "Q"),
    "attn.c_proj.weight": ("stack.out.kernel", "DD"), "attn.c_proj.bias": ("stack.out.bias", "D"),
    "ln_2.weight": ("stack.norm2.weight", "D"), "ln_2.bias": ("stack.norm2.bias", "D"),
    "mlp.c_fc.weight": ("stack.up.kernel", "DF"), "mlp.c_fc.bias": ("stack.up.bias", "F"),
    "mlp.c_proj.weight": ("stack.down.kernel", "FD"), "mlp.c_proj.bias": ("stack.down.bias", "D"),
}
_HEAD = "lm_head.weight"  # some files hold it beside the table it is tied to
_MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)$")  # the causal mask, which some files hold as a tensor


class Sizes(NamedTuple):
    """What config.json says: V words, P positions, D width, L blocks, H heads, F width of the MLP, layer norms' eps."""

    vocab: int
    positions: int
    width: int
    blocks: int
    heads: int
    inner: int
    eps: float = 1e-5


def _precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """float32 means float32: by default GPUs and TPUs would round the products' inputs to fewer bits."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


class Block(nn.Module):
    sizes: Sizes
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, _):
        b, s, d = x.shape
        dense = lambda n, name: nn.Dense(n, dtype=self.dtype, precision=_precision(self.dtype), name=name)  # noqa: E731
        product = lambda how, *of: jnp.einsum(  # noqa: E731
            how, *of, precision=_precision(self.dtype), preferred_element_type=jnp.float32)
        h = Norm(self.sizes.eps, bias=True, name="norm1")(x)
        q, k, v = jnp.moveaxis(dense(3 * d, "qkv")(h).reshape(b, s, 3, self.sizes.heads, -1), 2, 0)
        scores = product("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        seen = jnp.tril(jnp.ones((s, s), bool))[None, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), axis=-1).astype(self.dtype)
        x = x + dense(d, "out")(product("bhqk,bkhd->bqhd", weights, v).reshape(b, s, d)).astype(jnp.float32)
        h = dense(self.sizes.inner, "up")(Norm(self.sizes.eps, bias=True, name="norm2")(x))
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
        self.norm = Norm(n.eps, bias=True)

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
    return os.path.isfile(file) and "model_type" in _config(path)


def _config(folder: str) -> dict[str, Any]:
    path = os.path.join(folder, "config.json")
    try:
        return read_json(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def read_sizes(folder: str) -> Sizes:
    """Sizes of a folder's model. ValueError: no config.json, a size missing, or a variant of GPT-2 not made here."""
    path, config = os.path.join(folder, "config.json"), _config(folder)
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


def _layout(n: Sizes) -> Layout:
    """The tensors of a file by their names without prefix, and their places in our parameters."""
    axes = {"V": n.vocab, "P": n.positions, "D": n.width, "Q": 3 * n.width, "F": n.inner}
    out = places(_TOP, axes)
    for i in range(n.blocks):
        out |= places(_BLOCK, axes, f"h.{i}.", ((i, n.blocks),))
    return out


def num_params(n: Sizes) -> int:
    """Weights, the tied head once: 124,439,808 in gpt2."""
    return sum(math.prod(place.shape) for place in _layout(n).values())


def _tensors(folder: str, n: Sizes) -> dict[str, Tensor]:
    """The tensors by their names without prefix, once all names and shapes are right; the causal masks left out."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in open_safetensors(hub_files(folder)).items():
        short = name.removeprefix("transformer.")
        if short in tensors:
            raise ValueError(f"{folder}: tensor {name!r} is there twice")
        if not _MASKS.match(short):
            tensors[short] = tensor
    head = places({_HEAD: _TOP["wte.weight"]}, {"V": n.vocab, "D": n.width}) if _HEAD in tensors else {}
    check_names({name: tensor.shape for name, tensor in tensors.items()}, _layout(n) | head, f"{folder}: ")
    return tensors


def check(folder: str) -> Sizes:
    """Sizes, once config.json and the names and shapes of all tensors are right; reads no weight."""
    n = read_sizes(folder)
    _tensors(folder, n)
    return n


def load(folder: str, dtype: str = "float32") -> tuple[GPT2, Params]:
    """(network, parameters on the host): matrices in `dtype`, vectors in float32, blocks stacked along axis 0.

    Raises:
      ValueError: no such folder or file; tensors missing, too many, of a wrong shape, or a head that is
        not the table of word embeddings.
    """
    n = read_sizes(folder)
    tensors = _tensors(folder, n)
    params = load_params(lambda name: tensors[name].read(), _layout(n), dtype)
    embedding = params["embedding"]
    if _HEAD in tensors and not np.array_equal(tensors[_HEAD].read().astype(embedding.dtype), embedding):
        raise ValueError(f"{folder}: lm_head.weight is not wte.weight; a head of its own is no GPT-2")
    return GPT2(n, dtype), params
