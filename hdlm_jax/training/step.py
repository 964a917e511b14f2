"""One training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from hdlm_jax.common.parallel import Batch, Tree
from hdlm_jax.config import Config
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.models.network import Network
from hdlm_jax.training.loss import make_loss_sums
from hdlm_jax.training.state import TrainState

TrainStep: TypeAlias = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(config: Config, network: Network, process: HierarchicalProcess, tx: optax.GradientTransformation,
                    mesh: Mesh | None = None) -> TrainStep:
    """train_step(state, batch, key) -> (state, metrics), pure and global.

    Gradients are those of the batch's loss in nats per token of text, whatever the number of microbatches. Where the
    loss or the gradient is not finite parameters, optimizer and average stay as they are.
    metrics: loss, nelbo (nats/token), grad_norm: float32 scalars; skipped: how often that was so up to here.
    """
    loss_sums = make_loss_sums(config, network, process, mesh)
    parts, ema = config.train.microbatches, config.optimizer.ema

    def sums(params: Tree, batch: Batch, key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        loss, nelbo, tokens = loss_sums(params, batch, key)
        return loss, (nelbo, tokens)

    def gradients(params: Tree, batch: Batch, key: jax.Array) -> Tree:
        if parts == 1:
            return jax.value_and_grad(sums, has_aux=True)(params, batch, key)
        # rows i, i + parts, ... make a part: contiguous rows stay on their device
        split = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, parts, *a.shape[1:]), 1, 0), batch)

        def add(carry: Tree, part: Batch) -> tuple[Tree, None]:
            return jax.tree.map(jnp.add, carry, jax.value_and_grad(sums, has_aux=True)(params, part, key)), None

        zero = jnp.float32(0)
        carry, _ = jax.lax.scan(add, ((zero, (zero, zero)), jax.tree.map(jnp.zeros_like, params)), split)
        return carry

    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(key, state.step)
        (loss, (nelbo, tokens)), grads = gradients(state.params, batch, key)
        says, tokens = tokens > 0, jnp.maximum(tokens, 1)  # a batch of prompts alone is no step, nor an accident
        grads = jax.tree.map(lambda g: g / tokens, grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = jax.tree.map(lambda a, p: ema * a + (1 - ema) * p, state.ema, params) if ema else {}
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        kept = (state.params, state.opt_state, state.ema)
        after = jax.tree.map(lambda new, old: jnp.where(finite & says, new, old), (params, opt_state, average), kept)
        skipped = state.skipped + ~finite
        metrics = {"loss": loss / tokens, "nelbo": nelbo / tokens, "grad_norm": norm, "skipped": skipped}
        return TrainState(state.step + 1, skipped, *after), metrics

    return train_step
