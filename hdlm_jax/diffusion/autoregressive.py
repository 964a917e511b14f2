"""The autoregressive baseline as a process: each token is predicted from those before it, without noise.

Its input is the sequence shifted one place to the right, with the mask in front; the NELBO is -log p itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.config import WEIGHTINGS
from hdlm_jax.diffusion import trajectory
from hdlm_jax.diffusion.draws import Number, draw_from, fold, row_keys
from hdlm_jax.diffusion.prediction import Prediction, TripCount
from hdlm_jax.diffusion.process import Process

Cache: TypeAlias = chex.ArrayTree


class _Now:
    """In place of a proposal: nothing depends on noise time, so all are 0 with density 1."""

    def quantile(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros_like(u), np.ones_like(u)


@dataclasses.dataclass(frozen=True, eq=False)
class AutoregressiveProcess(Process):
    """Next-token prediction; `hierarchy` is tokens and mask alone (V, 1)."""

    exact = True
    causal = True

    def __post_init__(self) -> None:
        if self.hierarchy.num_levels != 1:
            raise ValueError(f"hierarchy {self.hierarchy.sizes}: an autoregressive model knows tokens alone")

    def corrupt(self, key: jax.Array, x: jax.Array, *, tau: jax.Array) -> jax.Array:
        """`shifted`: there is no noise."""
        return self.shifted(x)

    def shifted(self, x: jax.Array) -> jax.Array:
        """The tokens before: int32 [B, S], the mask first, as the start."""
        start = jnp.full((x.shape[0], 1), self.hierarchy.mask_id, x.dtype)
        return jnp.concatenate([start, x[:, :-1]], axis=1)

    def noised(self, key: jax.Array, x: jax.Array, tau: jax.Array, score: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(inputs, level), int32 [B, S]; every position that `score` names is scored."""
        return self.corrupt(key, x, tau=tau), score.astype(jnp.int32)

    def shares(self) -> np.ndarray:
        """[2] share of positions that are not, and that are scored."""
        return np.array([0.0, 1.0])

    def token_loss(self, prediction: Prediction | jax.Array, x: jax.Array, z: jax.Array,
                   levels: tuple[int, ...] | None = None, hard_training: bool = False, *,
                   tau: jax.Array | None = None) -> jax.Array:
        """-log p(x | what was before), in nats, of x's shape."""
        return -self.as_prediction(prediction).log_prob(x)

    def nelbo_weight(self, z: jax.Array, tau: jax.Array, x: jax.Array | None = None) -> jax.Array:
        """e^-tau, of z's shape: its integral over noise time is one, and so is its estimate w/q at tau = 0."""
        return jnp.broadcast_to(jnp.exp(-tau)[:, None], z.shape)

    def loss_weight(self, z: jax.Array, tau: jax.Array, weighting: str = "constant", weight_min: float = 0.0,
                    weight_max: float = jnp.inf, *, x: jax.Array | None = None) -> jax.Array:
        """1 everywhere: plain cross-entropy."""
        if weighting not in ("none", *WEIGHTINGS["autoregressive"]):
            raise ValueError(f"weighting={weighting!r}: choose one of {', '.join(WEIGHTINGS['autoregressive'])}")
        return jnp.ones(z.shape)

    def proposal(self, tokens: int, cv2: float) -> _Now:
        return _Now()


def sample(key: jax.Array, decode: Callable[..., tuple[Cache, Prediction]], process: AutoregressiveProcess,
           z: jax.Array, cache: Cache, *, temperature: Number = 1.0, top_p: Number = 1.0, length: Number | None = None,
           sync_trip_count: TripCount = lambda n: n, frames: int = 0) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Tokens int32 [B, S] from a canvas z with given tokens in front and masks behind, one position a call.

    Args:
      key: one key or keys [B].
      decode: function (cache, states [B, 1], position) -> (cache, prediction of the token at that position), whose
        cache holds the keys and values of the positions before.
      length: positions to fill, traced or not; behind them z stays.
      frames: states to record, see trajectory.Trajectory; their time is the share of positions to come.

    Returns:
      (tokens, stats) as hdlm_jax.decoding.loop.sample; the confidence is p of the token.
    """
    keys, mask = row_keys(key, z.shape[0]), process.hierarchy.mask_id
    length = jnp.int32(z.shape[1] if length is None else length)
    record = trajectory.Trajectory(frames, length)
    busy = jnp.any(z == mask, axis=-1)

    def time(done: Number) -> jax.Array:
        return jnp.broadcast_to(1 - done / length, z.shape[:1]).astype(jnp.float32)

    def step(i: jax.Array, carry: tuple) -> tuple:
        (z, sure), cache, before, film = carry
        cache, prediction = decode(cache, before[:, None], i)
        here = jax.lax.dynamic_index_in_dim(z, i, axis=1, keepdims=False)
        p = process.as_prediction(prediction)
        drawn = draw_from(fold(keys, i), p.logits, temperature, top_p)
        law = jnp.where(here == mask, jnp.exp(p.log_prob(drawn)), 0.0)
        here = jnp.where(here == mask, drawn, here)
        put = lambda a, column: jax.lax.dynamic_update_index_in_dim(a, column, i, axis=1)  # noqa: E731
        state = put(z, here), put(sure, law)
        return state, cache, here, record.expose(film, i, (*state, time(i + 1)))

    start = jnp.full(z.shape[:1], mask, z.dtype)
    calls = jnp.where(jnp.any(busy), length, 0)
    state = (z, jnp.zeros(z.shape, jnp.float32))
    film = record.start((*state, time(0)))
    (z, _), _, _, film = jax.lax.fori_loop(0, sync_trip_count(calls), step, (state, cache, start, film))
    made = jnp.broadcast_to(calls, busy.shape)
    return z, {"calls": calls, "row_forwards": jnp.where(busy, calls, 0)} | record.stats(film, made)
