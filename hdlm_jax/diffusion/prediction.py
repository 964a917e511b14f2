"""Predictions: what a network says of the token at each position, asked by tokens and by clusters (docs/theory.md).

A *prediction* stands for one distribution f over tokens per position. Processes and samplers ask it for

    log_prob(x)             log f(x) of given tokens                                       [...]
    log_within(x, level)    log f(anc_{level-1}(x) | anc_level(x)), level 1 by default     [...]
    log_mass(level, node)   log of f's mass under given nodes (outside=True: off them)     [...]
    log_masses(level)       log of f's mass under every node of a level                    [..., n_level]
    log_probs()             the same of every token                                        [..., V]
    tilted(bias)            the prediction f(x) exp(bias(x)), normalised; positions are selected before
    draw(keys, wanted, ...) a token from f, per position                                   [...]
    select(index)           the prediction at some of the positions [B, S], by number in B S

Masses are logarithms everywhere, and what is asked relative to a node is computed relative to that node's largest
logit: a cluster that f gives e^-300 has tokens all the same, and a position that shows it must be priced and drawn.

`LogitsPrediction` answers from plain logits [..., V]; wherever a prediction is expected, logits do as well. The heads
of hdlm_jax.models.heads have one that never makes the logits of all tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from hdlm_jax.diffusion.draws import draw_from, wide


def _parts(logs, where=None):
    """The largest of logs [..., M] where bool [..., M] says so (0 if none is), and log of the sum of exp(logs - that).

    Apart, so that what is common to two sums cancels before float32 rounds. Gradients are those of the sum's log alone,
    the largest a constant in both; finite also where nothing is summed (jax.nn.logsumexp's are NaN).
    """
    kept = (lambda a: a) if where is None else lambda a: jnp.where(where, a, -jnp.inf)
    top = finite(jnp.max(jax.lax.stop_gradient(kept(logs)), axis=-1))
    return top, _log(jnp.sum(jnp.exp(kept(logs - top[..., None])), axis=-1))


def log_sum(logs, where=None):
    """log of the sum of exp(logs [..., M]) over the last axis, where bool [..., M] says so: [...]; -inf for no sum."""
    top, total = _parts(logs, where)
    return top + total


def finite(logs):
    """-inf made 0, so that it can be subtracted: a sum of nothing is divided by 1. NaN stays: it must be seen."""
    return jnp.where(logs == -jnp.inf, 0.0, logs)


def _log(total):
    """log of sums >= 0; -inf at 0, without a gradient."""
    return jnp.where(total == 0, -jnp.inf, jnp.log(jnp.where(total == 0, 1.0, total)))


class LogitsPrediction:
    """A prediction from logits [..., V] (softmax over the last axis), any float dtype, computed in float32.

    level: the hierarchy's level whose nodes the logits are of; 0: words. (1: a factorised head's clusters.)
    """

    def __init__(self, logits, hierarchy, level: int = 0):
        if logits.shape[-1] != hierarchy.sizes[level]:
            of = "words" if level == 0 else f"nodes of level {level}"
            raise ValueError(f"logits.shape={logits.shape}: the last axis must be the V={hierarchy.sizes[level]} {of}")
        self.logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        self.hierarchy, self.level = hierarchy, level
        self.anc = hierarchy.anc if level == 0 else hierarchy.level1_anc
        self._top, self._total = _parts(self.logits)

    @property
    def log_z(self):
        """log of the sum of exp(logits), [...]."""
        return self._total + self._top

    @property
    def _near(self):
        return self.logits - self._top[..., None]

    def _under(self, level: int, node, outside: bool = False):
        under = wide(self.anc[level], node) == node[..., None]
        return _parts(self.logits, ~under if outside else under)

    def log_probs(self):
        """log f of every word, [..., V]."""
        return self._near - finite(self._total)[..., None]

    def select(self, index):
        return LogitsPrediction(self.logits.reshape(-1, self.logits.shape[-1])[index], self.hierarchy, self.level)

    def tilted(self, bias):
        """bias: function of `anc(level) -> int32 [1, .., V]`, the words' ancestors; gives [..., V] or [..., 1]."""
        bias = bias(lambda level: wide(self.anc[level], self._total))
        return LogitsPrediction(self._near + bias, self.hierarchy, self.level)

    def log_prob(self, x):
        return _at(self.logits, x) - self._top - finite(self._total)

    def log_within(self, x, level: int = 1):
        own = jnp.asarray(self.anc[level - 1])[x] if level - 1 > self.level else x
        if level == self.hierarchy.num_levels:
            return self.log_mass(level - 1, own)
        (top, total), part = self._under(level, jnp.asarray(self.anc[level])[x]), jnp.float32(0)
        first = _at(self.logits, x)
        if level - 1 > self.level:
            first, part = self._under(level - 1, own)
        return first - top + (part - finite(total))

    def log_mass(self, level: int, node, outside: bool = False):
        if level == self.level and not outside:
            return self.log_prob(node)
        top, total = self._under(level, node, outside)
        return top - self._top + (total - finite(self._total))

    def log_masses(self, level: int):
        if level == self.level:
            return self.log_probs()
        anc, n = jnp.asarray(self.anc[level]), self.hierarchy.sizes[level]
        logits = jnp.moveaxis(jax.lax.stop_gradient(self.logits), -1, 0)
        top = finite(jnp.moveaxis(jax.ops.segment_max(logits, anc, n), 0, -1))  # of each node, its own
        onto = jax.nn.one_hot(anc, n, dtype=self.logits.dtype)
        total = _log(jnp.matmul(jnp.exp(self.logits - top[..., anc]), onto, precision="highest"))
        return top - self._top[..., None] + (total - finite(self._total)[..., None])

    def draw(self, keys, wanted, temperature: Any = 1.0, top_p: Any = 1.0, sync_trip_count=None):
        """One word per token: int32 [...]; keys [...], one for each token.

        Args:
          wanted: bool [...]; elsewhere only the word's level-1 node will be looked at.
          temperature: divides the log-probabilities; 0 (a Python number) takes the most likely word.
          top_p: nucleus, in (0, 1]: keep the fewest most likely words with at least this much mass.
          sync_trip_count: see hdlm_jax.decoding.loop.sample.
        """
        return draw_from(keys, self.logits, temperature, top_p)


def _at(values, x):
    """values [..., M] at x [...]."""
    return jnp.take_along_axis(values, x[..., None], axis=-1)[..., 0]
