"""Random numbers of rows and tokens, and exact draws from logits."""

from __future__ import annotations

import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Number: TypeAlias = int | float | jax.Array  # traced or not
Array: TypeAlias = jax.Array | np.ndarray


def is_off(value: Number) -> bool:
    """Is a temperature or top_p the Python number 1, so that it does nothing? (A traced number never is.)"""
    return isinstance(value, int | float) and value == 1


def draw_from(keys: jax.Array, logits: jax.Array, temperature: Number = 1.0, top_p: Number = 1.0) -> jax.Array:
    """Tokens int32 [...] from logits [..., V] after temperature and nucleus (see Prediction.draw); keys [...]."""
    if isinstance(temperature, int | float) and temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return categorical(keys, _shaped(logits, temperature, top_p))


def log_probs_of(logits: jax.Array, temperature: Number = 1.0, top_p: Number = 1.0) -> jax.Array:
    """Log-probabilities [..., V] after temperature and nucleus; at temperature 0 one token has all the mass."""
    if isinstance(temperature, int | float) and temperature == 0:
        best = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
        return jnp.where(best > 0, 0.0, -jnp.inf)
    return jax.nn.log_softmax(_shaped(logits, temperature, top_p), axis=-1)


def _shaped(logits: jax.Array, temperature: Number, top_p: Number) -> jax.Array:
    if not is_off(temperature):
        logits = logits / temperature
    return logits if is_off(top_p) else _nucleus(logits, top_p)


def _nucleus(logits: jax.Array, top_p: Number) -> jax.Array:
    """Logits with all but the smallest set of most likely entries whose mass is >= top_p set to -inf.

    Of equal entries at its edge the first ones are kept. At top_p = 1, also a traced one, nothing is dropped.
    """
    ordered = -jnp.sort(-logits, axis=-1)
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    count = jnp.sum(before < top_p, axis=-1, keepdims=True)
    edge = jnp.take_along_axis(ordered, count - 1, axis=-1)
    above, ties = logits > edge, logits == edge
    room = count - jnp.sum(above, axis=-1, keepdims=True)
    kept = above | (ties & (jnp.cumsum(ties, axis=-1) <= room)) | (jnp.asarray(top_p) >= 1)
    return jnp.where(kept, logits, -jnp.inf)


def categorical(keys: jax.Array, logits: jax.Array) -> jax.Array:
    """Exact draws from softmax(logits [..., V]) with keys [...], one for each token: int32 [...].

    A block of about sqrt(V) tokens first, then a token in it: 2 sqrt(V) random numbers per position in place of V.
    mode="high": the default Gumbel noise stops at 15.9 and draws tokens of probability 1e-7 half as often as it should.
    """
    shape, size = logits.shape[:-1], logits.shape[-1]
    block = max(1, math.isqrt(size - 1) + 1)
    blocks = -(-size // block)
    logits = jnp.pad(logits.reshape(-1, size), [(0, 0), (0, blocks * block - size)], constant_values=-jnp.inf)
    logits, keys = logits.reshape(-1, blocks, block), keys.reshape(-1)
    pick = jax.vmap(lambda key, row: jax.random.categorical(key, row, mode="high"))
    outer = pick(fold(keys, 0), jax.nn.logsumexp(logits, axis=-1))
    inner = pick(fold(keys, 1), jnp.take_along_axis(logits, outer[:, None, None], axis=1)[:, 0])
    return (outer * block + inner).astype(jnp.int32).reshape(shape)


def wide(vector: Array, like: jax.Array) -> jax.Array:
    """A vector along a new last axis of `like`."""
    return jnp.asarray(vector).reshape((1,) * like.ndim + (-1,))


def fold(keys: jax.Array, data: Array | int) -> jax.Array:
    """fold_in over an array of keys [...]; `data` is an int or int array that broadcasts to them."""
    data = jnp.broadcast_to(jnp.asarray(data, jnp.uint32), keys.shape)
    return jax.vmap(jax.random.fold_in)(keys.reshape(-1), data.reshape(-1)).reshape(keys.shape)


def row_keys(key: jax.Array, rows: int) -> jax.Array:
    """Keys [B]: as they are if there is one per row already, else fold_in(key, row)."""
    return fold(jnp.broadcast_to(key, (rows,)), jnp.arange(rows)) if key.ndim == 0 else key


def token_keys(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Keys of tokens: as they are if of that shape [B, S] already, else fold_in(row's key, position)."""
    if key.shape == shape:
        return key
    rows = jnp.broadcast_to(row_keys(key, shape[0])[:, None], shape)
    return fold(rows, jnp.broadcast_to(jnp.arange(shape[1])[None], shape))
