"""What every process answers: noising, token loss, weights, sampling."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from hdlm_jax.diffusion.prediction import LogitsPrediction


@dataclasses.dataclass(frozen=True, eq=False)
class Process:
    """What trainer, evaluator and samplers may ask of any process over a `hierarchy`: what is here, and

        noised(key, x, tau, score)    (z, level): what the network sees, and at which level a token is scored (0: not)
        cost(prediction, x, z, ...)   a token's nats, before its weight
        nelbo_weight(z, tau, x)       that weight per unit of noise time; nelbo_rate: the two together
        loss_weight(z, tau, ...)      that of the training loss, t uniform
        shares()                      share of tokens at every `level` of noised, t uniform
        proposal(tokens, cv2)         its quantile(u) gives noise times to evaluate at and their densities

    The way back differs: `reverse_step` for sampler.sample, `GiddProcess.step` for gidd.sample, autoregressive.sample.
    `posterior`, dense, is for tests.
    """

    hierarchy: Any
    exact = False  # whether one draw of the NELBO has no noise

    @property
    def num_levels(self) -> int:
        return self.hierarchy.num_levels

    def as_prediction(self, prediction):
        """A prediction as it is; logits [..., V] as a LogitsPrediction."""
        return prediction if hasattr(prediction, "select") else LogitsPrediction(prediction, self.hierarchy)

    def level_of(self, z):
        """Level of each symbol, int32 of z's shape."""
        return sum((z >= o).astype(jnp.int32) for o in self.hierarchy.offsets[1:])

    def needs(self, hard_training: bool = False) -> str:
        """What costs ask of a prediction (see hdlm_jax.models.heads.sum_over_noised)."""
        return "all"
