"""Weights of few bits: 16, 8 and 4, rounded to nearest, plain or with a rotation before (QuaRot)."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.common.parallel import Tree

BITS = (4, 8, 16)
KINDS = ("plain", "rotated")
LAYERS = {"qkv", "q", "k", "v", "out", "gate", "up", "down"}  # the products of a block, which are rounded


def check_quantisation(bits: int, kind: str) -> None:
    """ValueError with the choices, unless these are some."""
    for name, value, choices in (("bits", bits, BITS), ("kind", kind, KINDS)):
        if value not in choices:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(str, choices))}")


@functools.cache
def _mixers(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signs [n], Hadamard [a, a] and cosine [m, m] matrices, n = a m with m odd; both orthogonal, float32."""
    a, m = n & -n, n // (n & -n)
    hadamard, i = np.ones((1, 1)), np.arange(m)
    while len(hadamard) < a:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]]) / math.sqrt(2)
    cosine = math.sqrt(2 / m) * np.cos(np.pi / m * np.outer(i + 0.5, i)) / np.where(i == 0, math.sqrt(2), 1)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], n)
    return signs.astype(np.float32), hadamard.astype(np.float32), cosine.astype(np.float32)


def rotate(x, back: bool = False):
    """x R (or x R^T: back) along the last axis, float32; R random signs, then a Hadamard matrix (arXiv 2508.14896).

    The remedy for outliers of QuaRot: x W = (x R)(R^T W), and every number of x R is a mean over all of x. Where the
    width has an odd factor, a cosine transform mixes that part.
    """
    vector, hadamard, cosine = _mixers(x.shape[-1])
    x, signs = x.astype(jnp.float32), vector.reshape((1,) * (x.ndim - 1) + (-1,))
    pair = (x if back else x * signs).reshape(*x.shape[:-1], len(hadamard), len(cosine))
    y = jnp.einsum("...am,ab,mc->...bc", pair, *((hadamard.T, cosine.T) if back else (hadamard, cosine)),
                   precision="highest").reshape(x.shape)
    return y * signs if back else y


def quantise(params: Tree, bits: int = 8, kind: str = "plain") -> Tree:
    """Parameters whose blocks' matrices are rounded to nearest, as floats for the same network (arXiv 2508.14896).

    Symmetric, with one scale for each output channel: its largest weight is the end of the range. Weights alone:
    activations are not rounded, nor are the tables, the norms and what time goes through.

    Args:
      bits: 4, 8 or 16.
      kind: plain, or rotated: W becomes R round(R^T W), which spreads outliers among the inputs (see `rotate`).

    Raises:
      ValueError: unknown bits or kind.
    """
    check_quantisation(bits, kind)
    top = 2 ** (bits - 1) - 1

    def one(path, leaf):
        names = [key.key for key in path]
        if names[0] not in ("stack", "dense") or not LAYERS & set(names) or names[-1] != "kernel":
            return leaf
        inputs = 2 if "experts" in names else 1  # [blocks, in, ...], of experts [blocks, experts, in, out]
        weight = jnp.moveaxis(jnp.asarray(leaf, jnp.float32), inputs, -1)  # [blocks, ..., in]
        weight = rotate(weight) if kind == "rotated" else weight
        scale = jnp.max(jnp.abs(weight), axis=-1, keepdims=True) / top
        scale = jnp.where(scale > 0, scale, 1.0)
        weight = jnp.clip(jnp.round(weight / scale), -top, top) * scale
        weight = rotate(weight, back=True) if kind == "rotated" else weight
        return jnp.moveaxis(weight, -1, inputs).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, params)
