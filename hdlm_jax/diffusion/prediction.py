"""Predictions: what a network says of the token at each position, asked by tokens and by clusters (docs/theory.md).

A `Prediction` stands for one distribution f over tokens per position. Masses are logarithms everywhere, and what is
asked relative to a node is computed relative to that node's largest logit: a cluster that f gives e^-300 has tokens all
the same, and a position that shows it must be priced and drawn.

`LogitsPrediction` answers from plain logits [..., V]; wherever a prediction is expected, logits do as well
(`Process.as_prediction`). The factorised head of hdlm_jax.models.heads has one that never makes all tokens' logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import jax
import jax.numpy as jnp

from hdlm_jax.diffusion.draws import draw_from, wide
from hdlm_jax.diffusion.hierarchy import Hierarchy

Bias: TypeAlias = Callable[[Callable[[int], jax.Array]], jax.Array]  # of anc(level) -> int32 [1, .., V]
TripCount: TypeAlias = Callable[[jax.Array], jax.Array]


class Predictions(Protocol):
    """Predictions at all positions [B, S], made where they are asked for."""

    def select(self, index: jax.Array) -> Prediction:
        """The prediction at some of the positions, by number in B S."""


class Prediction(Predictions, Protocol):
    """One distribution f over tokens for each position of a shape [...]."""

    @property
    def logits(self) -> jax.Array:
        """Numbers [..., V] whose softmax is f."""

    def log_prob(self, x: jax.Array) -> jax.Array:
        """log f(x) of tokens x [...]: [...]."""

    def log_within(self, x: jax.Array, level: int = 1) -> jax.Array:
        """log f(anc_{level-1}(x) | anc_level(x)) of tokens x [...]: [...]."""

    def log_mass(self, level: int, node: jax.Array, outside: bool = False) -> jax.Array:
        """log of f's mass under nodes [...] of a level, or off them: [...]."""

    def log_masses(self, level: int) -> jax.Array:
        """log of f's mass under every node of a level: [..., n_level]."""

    def log_probs(self) -> jax.Array:
        """log f of every token: [..., V]."""

    def tilted(self, bias: Bias) -> Prediction:
        """The prediction f(x) exp(bias(x)), normalised.

        bias: function of `anc(level) -> int32 [1, .., V]`, the tokens' ancestors; gives [..., V] or [..., 1].
        """

    def draw(self, keys: jax.Array, wanted: jax.Array, temperature: float | jax.Array = 1.0,
             top_p: float | jax.Array = 1.0, sync_trip_count: TripCount = ...) -> jax.Array:
        """One token per position: int32 [...]; keys [...], one for each.

        Args:
          wanted: bool [...]; elsewhere only the token's level-1 node will be looked at.
          temperature: divides the log-probabilities; 0 (a Python number) takes the most likely token.
          top_p: nucleus, in (0, 1]: keep the fewest most likely tokens with at least this much mass.
          sync_trip_count: see hdlm_jax.decoding.core.sample.
        """


def _parts(logs: jax.Array, where: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The largest of logs [..., M] where bool [..., M] says so (0 if none is), and log of the sum of exp(logs - that).

    Apart, so that what is common to two sums cancels before float32 rounds. Gradients are those of the sum's log alone,
    the largest a constant in both; finite also where nothing is summed (jax.nn.logsumexp's are NaN).
    """
    kept = (lambda a: a) if where is None else lambda a: jnp.where(where, a, -jnp.inf)
    top = finite(jnp.max(jax.lax.stop_gradient(kept(logs)), axis=-1))
    return top, safe_log(jnp.sum(jnp.exp(kept(logs - top[..., None])), axis=-1))


def log_sum(logs: jax.Array, where: jax.Array | None = None) -> jax.Array:
    """log of the sum of exp(logs [..., M]) over the last axis, where bool [..., M] says so: [...]; -inf for no sum."""
    top, total = _parts(logs, where)
    return top + total


def finite(logs: jax.Array) -> jax.Array:
    """-inf made 0, so that it can be subtracted: a sum of nothing is divided by 1. NaN stays: it must be seen."""
    return jnp.where(logs == -jnp.inf, 0.0, logs)


def safe_log(total: jax.Array) -> jax.Array:
    """log of sums >= 0; -inf at 0, without a gradient."""
    return jnp.where(total == 0, -jnp.inf, jnp.log(jnp.where(total == 0, 1.0, total)))


class LogitsPrediction:
    """A prediction from logits [..., V] (softmax over the last axis), any float dtype, computed in float32.

    level: the hierarchy's level whose nodes the logits are of; 0: tokens. (1: a factorised head's clusters.)
    """

    def __init__(self, logits: jax.Array, hierarchy: Hierarchy, level: int = 0):
        if logits.shape[-1] != hierarchy.sizes[level]:
            of = "tokens" if level == 0 else f"nodes of level {level}"
            raise ValueError(f"logits.shape={logits.shape}: the last axis must be the V={hierarchy.sizes[level]} {of}")
        self.logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        self.hierarchy, self.level = hierarchy, level
        self.anc = hierarchy.anc if level == 0 else hierarchy.level1_anc
        self._top, self._total = _parts(self.logits)

    @property
    def log_z(self) -> jax.Array:
        """log of the sum of exp(logits), [...]."""
        return self._total + self._top

    @property
    def _near(self) -> jax.Array:
        return self.logits - self._top[..., None]

    def _under(self, level: int, node: jax.Array, outside: bool = False) -> tuple[jax.Array, jax.Array]:
        under = wide(self.anc[level], node) == node[..., None]
        return _parts(self.logits, ~under if outside else under)

    def log_probs(self) -> jax.Array:
        return self._near - finite(self._total)[..., None]

    def select(self, index: jax.Array) -> LogitsPrediction:
        return LogitsPrediction(self.logits.reshape(-1, self.logits.shape[-1])[index], self.hierarchy, self.level)

    def tilted(self, bias: Bias) -> LogitsPrediction:
        added = bias(lambda level: wide(self.anc[level], self._total))
        return LogitsPrediction(self._near + added, self.hierarchy, self.level)

    def log_prob(self, x: jax.Array) -> jax.Array:
        return _at(self.logits, x) - self._top - finite(self._total)

    def log_within(self, x: jax.Array, level: int = 1) -> jax.Array:
        own = jnp.asarray(self.anc[level - 1])[x] if level - 1 > self.level else x
        if level == self.hierarchy.num_levels:
            return self.log_mass(level - 1, own)
        (top, total), part = self._under(level, jnp.asarray(self.anc[level])[x]), jnp.float32(0)
        first = _at(self.logits, x)
        if level - 1 > self.level:
            first, part = self._under(level - 1, own)
        return first - top + (part - finite(total))

    def log_mass(self, level: int, node: jax.Array, outside: bool = False) -> jax.Array:
        if level == self.level and not outside:
            return self.log_prob(node)
        top, total = self._under(level, node, outside)
        return top - self._top + (total - finite(self._total))

    def log_masses(self, level: int) -> jax.Array:
        if level == self.level:
            return self.log_probs()
        anc, n = jnp.asarray(self.anc[level]), self.hierarchy.sizes[level]
        logits = jnp.moveaxis(jax.lax.stop_gradient(self.logits), -1, 0)
        top = finite(jnp.moveaxis(jax.ops.segment_max(logits, anc, n), 0, -1))  # of each node, its own
        onto = jax.nn.one_hot(anc, n, dtype=self.logits.dtype)
        total = safe_log(jnp.matmul(jnp.exp(self.logits - top[..., anc]), onto, precision="highest"))
        return top - self._top[..., None] + (total - finite(self._total)[..., None])

    def draw(self, keys: jax.Array, wanted: jax.Array, temperature: float | jax.Array = 1.0,
             top_p: float | jax.Array = 1.0, sync_trip_count: TripCount = lambda count: count) -> jax.Array:
        return draw_from(keys, self.logits, temperature, top_p)


def _at(values: jax.Array, x: jax.Array) -> jax.Array:
    """values [..., M] at x [...]."""
    return jnp.take_along_axis(values, x[..., None], axis=-1)[..., 0]
