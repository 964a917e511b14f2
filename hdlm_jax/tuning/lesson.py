"""A step of what a trained run learns afterwards (train.objective=energy, ...): any loss beside a frozen network."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from hdlm_jax.common.parallel import Batch, Tree
from hdlm_jax.config import Config
from hdlm_jax.training.state import TrainState
from hdlm_jax.training.step import advanced

# (parameters, the frozen network's, rows, key) -> (mean loss of the rows, other means)
Loss: TypeAlias = Callable[[Tree, Tree, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
Step: TypeAlias = Callable[[TrainState, Batch, tuple[jax.Array, Tree]], tuple[TrainState, dict[str, jax.Array]]]


def make_step(config: Config, loss: Loss, tx: optax.GradientTransformation) -> Step:
    """step(state, batch, (key, frozen)) -> (state, metrics); metrics: loss, grad_norm, skipped and the loss's own.

    With train.microbatches all of them are means over the parts' means.
    """
    parts = config.train.microbatches

    def step(state: TrainState, batch: Batch, given: tuple[jax.Array, Tree]
             ) -> tuple[TrainState, dict[str, jax.Array]]:
        key, frozen = jax.random.fold_in(given[0], state.step), given[1]
        found = jax.value_and_grad(loss, has_aux=True)
        split = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, parts, *a.shape[1:]), 1, 0), batch)
        first = jax.eval_shape(found, state.params, frozen, jax.tree.map(lambda a: a[0], split), key)
        zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), first)

        def add(carry: Tree, part: Batch) -> tuple[Tree, None]:
            return jax.tree.map(lambda a, b: a + b / parts, carry, found(state.params, frozen, part, key)), None

        ((value, aux), grads), _ = jax.lax.scan(add, zero, split)
        state, metrics = advanced(state, value, grads, tx, config.optimizer.ema)
        return state, metrics | aux

    return step
