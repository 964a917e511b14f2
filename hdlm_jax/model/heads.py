"""Heads: hidden states -> predictions over words."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


class FlatHead(nn.Module):
    """One logit per word, float32 [..., V] (docs/theory.md: never mass on clusters, mask or padding).

    The table is padded to a multiple of 128 columns so that it shards and tiles; the padding is cut off the logits.
    """

    words: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, h):
        padded = -(-self.words // 128) * 128
        kernel = self.param("kernel", nn.initializers.zeros_init(), (h.shape[-1], padded))
        bias = self.param("bias", nn.initializers.zeros_init(), (padded,))
        logits = jnp.matmul(h.astype(self.dtype), kernel.astype(self.dtype), preferred_element_type=jnp.float32)
        logits = logits + bias.reshape((1,) * (h.ndim - 1) + (-1,))
        return logits[..., : self.words]


def noised_first(noised, groups: int, chunk: int):
    """An order of the tokens, noised ones first, and how many chunks hold them all.

    Args:
      noised: bool [B, S].
      groups: parts of the batch that are ordered apart, a divisor of B: as many as it has shards, so that no token
        moves between devices. Changes no result.
      chunk: tokens of a group that are worked on at once.

    Returns:
      order int32 [groups, T], T a multiple of `chunk` >= B S/groups (repeating token 0), real bool [groups, T] (True
      at noised tokens), and the number of leading chunks with noised tokens, int32.
    """
    flat = noised.reshape(groups, -1)
    order = jnp.argsort(~flat, axis=-1, stable=True)
    extra = -flat.shape[1] % chunk
    order = jnp.pad(order, ((0, 0), (0, extra)))
    count = jnp.sum(flat, axis=-1)
    real = jnp.arange(order.shape[1]).reshape(1, -1) < count[:, None]
    return order, real, (jnp.max(count) + chunk - 1) // chunk


def _take(tree, order):
    """Leaves [B, S, ...] -> [groups, T, ...] in the given order."""

    def take(leaf):
        leaf = leaf.reshape(order.shape[0], -1, *leaf.shape[2:])
        return jnp.take_along_axis(leaf, order.reshape(*order.shape, *(1,) * (leaf.ndim - 2)), axis=1)

    return jax.tree.map(take, tree)


def _slice(tree, start, chunk: int):
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, chunk, axis=1), tree)


def sum_over_noised(fn, params, hidden, noised, fields, *, groups: int = 1, chunk: int = 256):
    """Sums of fn(params, h, fields) over the noised tokens, and its gradient, without logits of all tokens at once.

    The loss is a sum, so its gradients are made chunk by chunk in the forward pass (a custom_vjp) and merely scaled
    in the backward one. Tokens that are not noised are never seen by fn.

    Args:
      fn: (params, h [G, c, D], fields [G, c]) -> (loss [G, c], aux [G, c]), both in nats.
      params: what fn's gradient is taken in, beside hidden.
      hidden: float32 [B, S, D]; noised: bool [B, S]; fields: pytree of [B, S].
      groups, chunk: see noised_first.

    Returns:
      (sum of loss, sum of aux), float32 scalars; gradients flow through the first alone.
    """
    order, real, chunks = noised_first(noised, groups, chunk)
    rows = _take(fields, order)

    def sums(params, h, part, keep):
        loss, aux = fn(params, h, part)
        return jnp.sum(jnp.where(keep, loss, 0.0)), jnp.sum(jnp.where(keep, aux, 0.0))

    def at(i, h, rows, real):
        return _slice((h, rows, real), i * chunk, chunk)

    @jax.custom_vjp
    def total(params, h, rows, real, chunks):
        def body(i, carry):
            loss, aux = sums(params, *at(i, h, rows, real))
            return carry[0] + loss, carry[1] + aux

        return jax.lax.fori_loop(0, chunks, body, (jnp.float32(0), jnp.float32(0)))

    def forward(params, h, rows, real, chunks):
        def body(i, carry):
            loss, aux, d_params, d_h = carry
            part = at(i, h, rows, real)
            (more, more_aux), (dp, dh) = jax.value_and_grad(sums, argnums=(0, 1), has_aux=True)(params, *part)
            d_h = jax.lax.dynamic_update_slice_in_dim(d_h, dh, i * chunk, axis=1)
            return loss + more, aux + more_aux, jax.tree.map(jnp.add, d_params, dp), d_h

        zero = jax.tree.map(jnp.zeros_like, params)
        start = (jnp.float32(0), jnp.float32(0), zero, jnp.zeros_like(h))
        loss, aux, d_params, d_h = jax.lax.fori_loop(0, chunks, body, start)
        return (loss, aux), (d_params, d_h)

    def backward(saved, cotangent):
        scale = cotangent[0]
        d_params, d_h = jax.tree.map(lambda g: g * scale, saved)
        return d_params, d_h, None, None, None

    total.defvjp(forward, backward)
    return total(params, _take(hidden, order), rows, real, chunks)


def map_over_noised(fn, hidden, noised, fields, *, groups: int = 1, chunk: int = 256):
    """fn(h [G, c, D], fields [G, c]) -> float32 [G, c] at every noised token, zero elsewhere: [B, S]."""
    order, real, chunks = noised_first(noised, groups, chunk)
    rows = (_take(hidden, order), _take(fields, order), real)

    def body(i, out):
        h, part, keep = _slice(rows, i * chunk, chunk)
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(keep, fn(h, part), 0.0), i * chunk, axis=1)

    out = jax.lax.fori_loop(0, chunks, body, jnp.zeros(order.shape, jnp.float32))
    flat = jnp.zeros((groups, noised.size // groups), jnp.float32)
    return jax.vmap(lambda f, o, v: f.at[o].add(v))(flat, order, out).reshape(noised.shape)
