"""What every diffusion process answers, so that trainer, evaluator and sampler need to know no more (theory section 6).

A process says what a network sees of a text at a noise time (`noised`), what a token then costs (`token_loss`), at
which weight (`nelbo_weight`, `loss_weight`) and at which noise times a bound is measured well (`proposal`).
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.common.parallel import Tree
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.prediction import LogitsPrediction, Prediction


class NoiseTimes(Protocol):
    """A density q over noise time to evaluate at."""

    def quantile(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """u in [0, 1), any shape -> (tau, q(tau)), float64."""


@dataclasses.dataclass(frozen=True, eq=False)
class Process(abc.ABC):
    """A diffusion process over the states of a `hierarchy`: tokens, clusters and the mask.

    Noise time tau lies in [0, inf); networks are told the masking level t = 1 - e^-tau. Shapes: x, z int32 [B, S] are
    tokens and states, tau float32 [B]. A prediction may be given as logits [B, S, V].
    """

    hierarchy: Hierarchy
    exact: ClassVar[bool] = False  # whether one draw of the NELBO has no noise
    causal: ClassVar[bool] = False  # whether a token is predicted from those before it alone
    unmasks: ClassVar[bool] = False  # whether tokens are unmasked level by level, so that every decoding method applies
    methods: ClassVar[tuple[str, ...]] = ()  # the only ones that do, where not every one does

    @property
    def num_levels(self) -> int:
        """K, levels above the tokens, the mask's included."""
        return self.hierarchy.num_levels

    @property
    def xi(self) -> float:
        """Probability that a token goes to its own cluster on its first crossing."""
        return 1.0

    @property
    def force_transition(self) -> str:
        """What a prediction becomes at a position that shows a cluster; '' for a process without clusters."""
        return ""

    @property
    def vocab_size(self) -> int:
        """V, tokens: the last axis of a network's logits."""
        return self.hierarchy.vocab_size

    @property
    def num_states(self) -> int:
        """N, tokens, clusters and mask: the rows that a network's embedding table needs."""
        return self.hierarchy.num_states

    @property
    def mask_id(self) -> int:
        """The mask among the states: N - 1."""
        return self.hierarchy.mask_id

    def as_prediction(self, prediction: Prediction | jax.Array | np.ndarray) -> Prediction:
        """A prediction as it is; logits [..., V] as a LogitsPrediction."""
        if isinstance(prediction, jax.Array | np.ndarray):
            return LogitsPrediction(jnp.asarray(prediction), self.hierarchy)
        return prediction

    def level_of(self, z: jax.Array) -> jax.Array:
        """Level of each state, int32 of z's shape: 0 at tokens, K at the mask."""
        return sum(((z >= o).astype(jnp.int32) for o in self.hierarchy.offsets[2:]),
                   (z >= self.hierarchy.offsets[1]).astype(jnp.int32))

    def with_params(self, params: Tree) -> Process:
        """This process with its own parameters, where it has some among a network's (hdlm_jax.models.soft)."""
        return self

    def draw_loss(self, x: jax.Array, z: jax.Array, nats: jax.Array) -> jax.Array:
        """What a loss of nats float32 [B, S] lacks in gradients, where the draw of z depends on parameters."""
        return jnp.float32(0)

    @property
    def parts(self) -> tuple[Callable[..., jax.Array], ...]:
        """Token losses that add up to `token_loss`: of the symbols, and of what else is on show (models.channel)."""
        return (self.token_loss,)

    def needs(self, hard_training: bool = False) -> str:
        """What token losses ask of a prediction, a name of hdlm_jax.models.heads.sum_over_noised."""
        return "all"

    @abc.abstractmethod
    def corrupt(self, key: jax.Array, x: jax.Array, *, tau: jax.Array) -> jax.Array:
        """Noise tokens x to noise times tau: states z int32 [B, S]. key: one for all, or one per row [B]."""

    @abc.abstractmethod
    def noised(self, key: jax.Array, x: jax.Array, tau: jax.Array, score: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(z, level), int32 [B, S]: `corrupt` where `score` bool [B, S] says so, and the level at which each position
        is scored (0: it costs nothing)."""

    @abc.abstractmethod
    def shares(self) -> np.ndarray:
        """float [K+1], share of positions at every `level` of `noised`, t uniform."""

    @abc.abstractmethod
    def token_loss(self, prediction: Prediction | jax.Array, x: jax.Array, z: jax.Array,
                   levels: tuple[int, ...] | None = None, hard_training: bool = False, *,
                   tau: jax.Array) -> jax.Array:
        """Nats of each position before its weight, float32 of x's shape. levels: those of z, where known before."""

    @abc.abstractmethod
    def nelbo_weight(self, z: jax.Array, tau: jax.Array, x: jax.Array) -> jax.Array:
        """Weight of the token loss in the NELBO, per unit of noise time, of z's shape."""

    @abc.abstractmethod
    def loss_weight(self, z: jax.Array, tau: jax.Array, weighting: str = "constant", weight_min: float = 0.0,
                    weight_max: float = jnp.inf, *, x: jax.Array) -> jax.Array:
        """Weight of the token loss in training with t uniform, of z's shape."""

    @abc.abstractmethod
    def proposal(self, tokens: int, cv2: float) -> NoiseTimes:
        """Noise times for evaluation with little variance: of `tokens` positions that share one, and a squared
        coefficient of variation `cv2` between sequences (levels.Proposal)."""

    def nelbo_rate(self, prediction: Prediction | jax.Array, x: jax.Array, z: jax.Array, tau: jax.Array) -> jax.Array:
        """Nats per unit of noise time, of x's shape: its integral over tau in [0, inf), in expectation over z, is the
        exact NELBO of x."""
        return self.nelbo_weight(z, tau, x) * self.token_loss(prediction, x, z, tau=tau)
