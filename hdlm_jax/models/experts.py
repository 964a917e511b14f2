"""Mixture of experts, the MLP of Qwen3-MoE and LLaDA2-MoE: a router chooses a few gated MLPs for every token.

No expert has a limit and no token is dropped, so what a token gets does not depend on the others of its batch. Pairs of
a token and one of its experts are sorted by expert, and an expert multiplies its own pairs alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from hdlm_jax.common import parallel
from hdlm_jax.config import DecoderConfig
from hdlm_jax.models.network import PRODUCT

Product: TypeAlias = Callable[..., jax.Array]  # (rows [R, n], kernel [..., n, m], precision=) -> [R, m]
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"silu": nn.silu, "gelu": nn.gelu}
_LEAST, _MOST = 8, 128  # rows of a block


class Kernel(nn.Module):
    """A kernel [..., n, m] as a layer of its own."""

    shape: tuple[int, ...]
    scale: float = 1.0  # of the initial weights

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("kernel", nn.initializers.normal(0.02 * self.scale), self.shape)


class GatedKernels(nn.Module):
    """The kernels (gate, up [..., D, F], down [..., F, D]) of `gated_mlp` in `dtype`.

    Attributes:
      inner: F.
      experts: (E,) for so many MLPs, () for one.
      scale: of down's initial weights.
    """

    inner: int
    dtype: DTypeLike = jnp.float32
    experts: tuple[int, ...] = ()
    scale: float = 1.0

    @nn.compact
    def __call__(self, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        first = (*self.experts, width, self.inner)
        gate, up = Kernel(first, name="gate")(), Kernel(first, name="up")()
        down = Kernel((*self.experts, self.inner, width), self.scale, name="down")()
        return gate.astype(self.dtype), up.astype(self.dtype), down.astype(self.dtype)


def gated_mlp(x: jax.Array, kernels: tuple[jax.Array, ...], activation: str,
              product: Product = jnp.matmul) -> jax.Array:
    """x [..., D] -> [..., D] in the kernels' dtype: down(activation(gate(x)) * up(x)).

    product: (rows, kernels, precision); of kernels of several experts it takes for each row its own.
    """
    # float32 means float32: by default GPUs and TPUs would round the products' inputs to fewer bits
    precision = jax.lax.Precision.HIGHEST if kernels[0].dtype == jnp.float32 else None
    gate, up, down = (lambda x, kernel=kernel: checkpoint_name(product(x, kernel, precision=precision), PRODUCT)
                      for kernel in kernels)
    x = x.astype(kernels[0].dtype)
    return down(ACTIVATIONS[activation](gate(x)) * up(x))


class Router(nn.Module):
    """float32 (kernel [D, E], bias [E]); the bias is a parameter where the scores are sigmoids, else 0."""

    dims: DecoderConfig

    @nn.compact
    def __call__(self, width: int) -> tuple[jax.Array, jax.Array]:
        experts, zeros = self.dims.experts, nn.initializers.zeros_init()
        kernel = self.param("kernel", nn.initializers.normal(0.02), (width, experts))
        bias = self.param("bias", zeros, (experts,)) if self.dims.gate == "sigmoid" else jnp.zeros(experts)
        return kernel.astype(jnp.float32), bias.astype(jnp.float32)


def choose(x: jax.Array, router: tuple[jax.Array, jax.Array], dims: DecoderConfig) -> tuple[jax.Array, jax.Array]:
    """Tokens x [..., D] -> (experts int32, their shares float32), both [..., experts_per_token]; all in float32.

    The router's bias is added for choosing, and has no part in the shares. Of equal scores the first is chosen.
    """
    kernel, bias = router
    # full precision: what is rounded more chooses other experts
    logits = jnp.matmul(x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
    scores = jax.nn.sigmoid(logits) if dims.gate == "sigmoid" else jax.nn.softmax(logits)
    rank = scores + jnp.broadcast_to(bias, scores.shape)
    if dims.top_groups < dims.expert_groups:
        groups = rank.reshape(*rank.shape[:-1], dims.expert_groups, -1)
        best = jax.lax.top_k(groups, min(2, groups.shape[-1]))[0].sum(-1)
        kept = jax.nn.one_hot(jax.lax.top_k(best, dims.top_groups)[1], dims.expert_groups, dtype=bool).any(-2)
        rank = jnp.where(kept[..., None], groups, -jnp.inf).reshape(scores.shape)
    expert = jax.lax.top_k(rank, dims.experts_per_token)[1]
    share = jnp.take_along_axis(scores, expert, axis=-1)
    if dims.normalise:
        share = share / (share.sum(-1, keepdims=True) + 1e-20)
    return expert, share * dims.routed_scale


def by_expert(expert: jax.Array, experts: int) -> tuple[jax.Array, int, Product]:
    """Where pairs of a token and an expert go, so that each expert's stand together.

    Args:
      expert: int32 [P], each pair's, in [0, experts).

    Returns:
      (place int32 [P] of each pair, all different, in [0, R); R; the product of rows [R, n] with kernels [E, n, m]).
    """
    pairs = len(expert)
    tpu = parallel.platform() == "tpu"
    step = 1 if tpu else parallel.bucket(max(pairs // experts, _LEAST), _MOST)
    count = jnp.bincount(expert, length=experts)
    room = -(-count // step) * step  # an expert's pairs start at a multiple of step
    rank = jnp.zeros(pairs, jnp.int32).at[jnp.argsort(expert)].set(jnp.arange(pairs), unique_indices=True)
    place = rank + (jnp.cumsum(room) - room - jnp.cumsum(count) + count)[expert]
    if tpu:  # it alone has an operation for this; elsewhere that multiplies every pair with the kernels of all experts
        return place, pairs, lambda rows, kernel, precision: jax.lax.ragged_dot(rows, kernel, count, precision)
    blocks = min(pairs, pairs // step + experts)  # at most
    owner = jnp.repeat(jnp.arange(experts), room // step, total_repeat_length=blocks)

    def product(rows: jax.Array, kernel: jax.Array, precision: jax.lax.Precision | None) -> jax.Array:
        each = lambda rows, kernel: jnp.einsum("bsn,bnm->bsm", rows, kernel[owner], precision=precision)  # noqa: E731
        # the blocks' kernels are not kept for the backward pass
        return jax.checkpoint(each, prevent_cse=False)(rows.reshape(blocks, step, -1), kernel).reshape(len(rows), -1)

    return place, blocks * step, product


class Experts(nn.Module):
    """Hidden states [B, S, D], behind their norm -> float32 [B, S, D].

    Parameters: router.kernel [D, E] and, of sigmoid scores, router.bias [E]; experts.{gate, up, down}.kernel [E, D, F],
    [E, D, F] and [E, F, D]; shared.{gate, up, down}.kernel of the one for every token, without E.

    Attributes:
      dims: the settings; those of experts, and the activation.
      dtype: of the MLPs; shares, and the sum over a token's experts, are float32.
      scale: of the initial weights of down.
    """

    dims: DecoderConfig
    dtype: DTypeLike = jnp.float32
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, width = self.dims, x.shape[-1]
        kernels = lambda inner, experts, name: GatedKernels(  # noqa: E731
            inner, self.dtype, experts, self.scale, name=name)(width)

        def mix(x: jax.Array, kernel: jax.Array, bias: jax.Array, *of_experts: jax.Array) -> jax.Array:
            return routed(x, *choose(x, (kernel, bias), c), of_experts, c.activation)

        # every device chooses and sorts for positions of its own, which stand in the place of attention's heads to be
        # divided over the tensor axis as well: a sort of all would bring all to every device
        whole = (*Router(c, name="router")(width), *kernels(c.expert_inner, (c.experts,), "experts"))
        out = parallel.split_heads(mix, [x[:, None]], whole=whole)[:, 0]
        if c.shared_inner:
            out = out + gated_mlp(x, kernels(c.shared_inner, (), "shared"), c.activation)
        return out


def routed(x: jax.Array, expert: jax.Array, share: jax.Array, kernels: tuple[jax.Array, ...],
           activation: str) -> jax.Array:
    """x [..., D], its experts int32 and their shares [..., k] -> float32 [..., D], the sum of what they make of it."""
    width, dtype = x.shape[-1], kernels[0].dtype
    place, rows, product = by_expert(expert.reshape(-1), len(kernels[0]))
    pairs = jnp.broadcast_to(x.astype(dtype)[..., None, :], (*expert.shape, width)).reshape(-1, width)
    out = jnp.zeros((rows, width), dtype).at[place].set(pairs, unique_indices=True)
    out = gated_mlp(out, kernels, activation, product).at[place].get(unique_indices=True)
    return jnp.sum(out.reshape(*expert.shape, width).astype(jnp.float32) * share[..., None], axis=-2)
