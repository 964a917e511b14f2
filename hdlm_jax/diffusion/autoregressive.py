"""The autoregressive baseline as a process: a token is scored given those before it, and no noise is drawn.

Its input is the sequence one place to the right, with the mask symbol in front; NELBO is -log p itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.config import WEIGHTINGS
from hdlm_jax.diffusion import trajectory
from hdlm_jax.diffusion.draws import draw_from, fold, row_keys
from hdlm_jax.diffusion.prediction import LogitsPrediction
from hdlm_jax.diffusion.process import Process


class _Now:
    """In place of a proposal: nothing depends on the noise time, so all of them are 0 with density 1."""

    def quantile(self, u):
        return np.zeros_like(u), np.ones_like(u)


@dataclasses.dataclass(frozen=True, eq=False)
class AutoregressiveProcess(Process):
    """Next-token prediction; `hierarchy` is words and mask alone (V, 1)."""

    exact = True
    causal = True

    def __post_init__(self):
        if self.hierarchy.num_levels != 1:
            raise ValueError(f"hierarchy {self.hierarchy.sizes}: an autoregressive model knows words alone")

    def corrupt(self, key, x, *, tau):
        """The words before: int32 [B, S], the start symbol (the mask) first."""
        start = jnp.full((x.shape[0], 1), self.hierarchy.mask_id, x.dtype)
        return jnp.concatenate([start, x[:, :-1]], axis=1)

    def noised(self, key, x, tau, score):
        """(inputs, level), int32 [B, S]; every token that `score` names is scored."""
        return self.corrupt(key, x, tau=tau), score.astype(jnp.int32)

    def shares(self) -> np.ndarray:
        """[2] share of tokens that are not, and that are scored."""
        return np.array([0.0, 1.0])

    def token_loss(self, prediction, x, z, levels=None, hard_training: bool = False, *, tau=None):
        """-log p(x | what was before), in nats, of x's shape."""
        return -self.as_prediction(prediction).log_prob(x)

    def nelbo_weight(self, z, tau, x=None):
        """e^-tau, of z's shape: its integral over noise time is one, and so is its estimate w/q at tau = 0."""
        return jnp.broadcast_to(jnp.exp(-tau)[:, None], z.shape)

    def loss_weight(self, z, tau, weighting: str = "constant", weight_min: float = 0.0, weight_max: float = jnp.inf, *,
                    x=None):
        """1 everywhere: plain cross-entropy."""
        if weighting not in ("none", *WEIGHTINGS["autoregressive"]):
            raise ValueError(f"weighting={weighting!r}: choose one of {', '.join(WEIGHTINGS['autoregressive'])}")
        return jnp.ones(z.shape)

    def proposal(self, tokens: int, cv2: float) -> _Now:
        return _Now()


def sample(key, decode, process: AutoregressiveProcess, z, cache, *, temperature: Any = 1.0, top_p: Any = 1.0,
           length=None, sync_trip_count=lambda n: n, frames: int = 0):
    """Words int32 [B, S] from a canvas z with given words in front and masks behind, one position a call.

    Args:
      key: one key or keys [B].
      decode: function (cache, symbols [B, 1], position) -> (cache, prediction of the word at that position), which has
        seen the positions before (keys and values of theirs are in the cache).
      length: positions to fill, traced or not; behind them z stays.
      frames: states to record, see trajectory.Trajectory; their time is the share of positions to come.

    Returns:
      (words, stats) as hdlm_jax.decoding.loop.sample; the confidence is p of the word.
    """
    keys, mask = row_keys(key, z.shape[0]), process.hierarchy.mask_id
    length = jnp.int32(z.shape[1] if length is None else length)
    record = trajectory.Trajectory(frames, length)
    busy = jnp.any(z == mask, axis=-1)

    def time(done):
        return jnp.broadcast_to(1 - done / length, z.shape[:1]).astype(jnp.float32)

    def step(i, carry):
        (z, sure), cache, before, film = carry
        cache, prediction = decode(cache, before[:, None], i)
        here = jax.lax.dynamic_index_in_dim(z, i, axis=1, keepdims=False)
        p = cast(LogitsPrediction, process.as_prediction(prediction))
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
