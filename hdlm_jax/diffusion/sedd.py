"""SEDD-absorb (arXiv 2310.16834) in this family: MDLM's process, with its scores left unnormalised.

SEDD learns the ratios s_y = q_tau(y)/q_tau(mask) at masks. Divided by (1-t)/t, the ratio of a certain token (RADD,
arXiv 2406.03736), they are f_y = e^logit_y / V, which should sum to one and need not. The score entropy is then

    w_1(tau) (-log f_x + sum_y f_y - 1)

nats per unit of noise time: a valid bound, MDLM's where f sums to one, above it by Z - 1 - log Z where it sums to Z.
"""

from __future__ import annotations

import math
from typing import cast

import jax
import jax.numpy as jnp

from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.prediction import LogitsPrediction, Prediction


class SeddProcess(HierarchicalProcess):
    """HierarchicalProcess over tokens and mask with SEDD's loss. Sampling, MDLM's, draws tokens from f/Z."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_levels != 1:
            raise ValueError(f"hierarchy {self.hierarchy.sizes}: SEDD-absorb knows tokens and mask alone")

    def token_loss(self, prediction: Prediction | jax.Array, x: jax.Array, z: jax.Array,
                   levels: tuple[int, ...] | None = None, hard_training: bool = False, *,
                   tau: jax.Array | None = None) -> jax.Array:
        """-log f_x + sum f - 1 in nats at masks, of x's shape. Divided by V, untrained logits (all 0) sum to one."""
        p = cast(LogitsPrediction, self.as_prediction(prediction))
        log_total = p.log_z - math.log(self.hierarchy.vocab_size)
        return self._by_level(z, {1: -p.log_prob(x) + jnp.expm1(log_total) - log_total})
