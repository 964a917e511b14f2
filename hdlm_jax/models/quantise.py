"""Weights of few bits: 8, 4 and 2, rounded in groups, with a rotation before (QuaRot)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BITS = (4, 8, 16)
KINDS = ("plain", "rotated")
LAYERS = ("qkv", "out", "up", "down")  # the products of a block; what quantise rounds unless asked for more
_LAYERS = (*LAYERS, "embedding", "head")


def check_quantisation(bits, kind, layers=()) -> None:
    """ValueError with the choices, unless these are some."""
    given = [("bits", bits, BITS), ("kind", kind, KINDS)] + [("layers", name, _LAYERS) for name in layers]
    for name, value, choices in given:
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


def _rounded(x, bits: int, axis: int):
    """(whole numbers as float32, scale): to nearest, symmetric, the largest along the axis at the end of the range."""
    top = 2 ** (bits - 1) - 1
    scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / top
    scale = jnp.where(scale > 0, scale, 1.0)
    return jnp.clip(jnp.round(x / scale), -top, top), scale


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=["kind"])
@dataclasses.dataclass(frozen=True)
class Packed:
    """A rounded matrix as whole numbers.

    Attributes:
      codes: int8 or int16 [a, groups, group, ...]; 4 bits: uint8 [a, groups, group/2, ...], two numbers a byte, while
        `group` is even. a: blocks of the stack, or rows of a table.
      scale: float32 [a, groups, 1, ...].
      kind: of the basis the numbers are in (see `quantise`).
    """

    codes: Any
    scale: Any
    kind: str

    @staticmethod
    def of(weight, bits: int, kind: str, group: int) -> Packed:
        """weight: float [a, in, ...]; group 0: the whole input."""
        weight = jnp.asarray(weight, jnp.float32)
        if kind == "rotated":
            weight = jnp.moveaxis(rotate(jnp.moveaxis(weight, 1, -1)), -1, 1)
        a, n, *out = weight.shape
        codes, scale = _rounded(weight.reshape(a, n // (group or n), group or n, *out), bits, 2)
        codes = codes.astype(jnp.int16 if bits == 16 else jnp.int8)
        if bits == 4 and codes.shape[2] % 2 == 0:
            codes = (codes[:, :, ::2] & 15 | codes[:, :, 1::2] << 4).astype(jnp.uint8)
        return Packed(codes, scale, kind)

    def weight(self):
        """The rounded matrix in the basis of the given one, float32 [a, in, ...]."""
        codes = self.codes
        if codes.dtype == jnp.uint8:
            low, high = codes << 4, codes & 240
            codes = jnp.stack([low, high], axis=3).astype(jnp.int8) >> 4
            codes = codes.reshape(*codes.shape[:2], -1, *codes.shape[4:])
        weight = codes.astype(jnp.float32) * self.scale
        weight = weight.reshape(len(weight), -1, *weight.shape[3:])
        return jnp.moveaxis(rotate(jnp.moveaxis(weight, 1, -1), back=True), -1, 1) if self.kind == "rotated" else weight


def pack(params, bits: int = 8, kind: str = "plain", *, group: int = 0, layers: Iterable[str] = LAYERS):
    """The parameters with a `Packed` in place of each matrix that `quantise` rounds; arguments and errors as there."""
    layers = tuple(layers)
    check_quantisation(bits, kind, layers)

    def one(path, leaf):
        top, *names = (key.key for key in path)
        if top == "stack" and names[0] in layers and names[-1] == "kernel" or top in layers and leaf.ndim == 2:
            if group < 0 or group and leaf.shape[1] % group:
                raise ValueError(f"group={group}: must be 0 (the whole input) or divide the {leaf.shape[1]} inputs of "
                                 f"{'.'.join([top, *names])}")
            return Packed.of(leaf, bits, kind, group)
        return leaf

    return jax.tree_util.tree_map_with_path(one, params)


def unpack(packed):
    """Parameters in float32 from packed ones."""
    is_packed = lambda x: isinstance(x, Packed)  # noqa: E731
    return jax.tree.map(lambda x: x.weight() if is_packed(x) else x, packed, is_leaf=is_packed)


def quantise(params, bits: int = 8, kind: str = "plain", *, group: int = 0, layers: Iterable[str] = LAYERS):
    """Parameters whose matrices are rounded to nearest, as floats for the same network (arXiv 2508.14896).

    One scale for each output channel, or for `group` inputs of one. Weights alone: activations are not rounded.

    Args:
      bits: 4, 8 or 16.
      kind: plain, or rotated: W becomes R round(R^T W), which spreads outliers among the inputs (see `rotate`).
      group: inputs that share a scale; 0: all of them.
      layers: the products to round, of qkv, out, up, down, embedding and head; the norms and what time goes through
        are never rounded.

    Raises:
      ValueError: unknown bits, kind or layer; a group that does not divide the inputs.
    """
    return unpack(pack(params, bits, kind, group=group, layers=layers))
