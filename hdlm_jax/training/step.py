"""One training step: the loss of a batch as sums of weighted token losses, and what its gradients change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from hdlm_jax.common import parallel
from hdlm_jax.common.parallel import Batch, Tree
from hdlm_jax.config import Config
from hdlm_jax.diffusion.draws import fold
from hdlm_jax.diffusion.prediction import Prediction
from hdlm_jax.diffusion.process import Process
from hdlm_jax.models.decoder import apart
from hdlm_jax.models.features import given
from hdlm_jax.models.heads import sum_over_noised
from hdlm_jax.models.trunk import Trunk
from hdlm_jax.training.drafts import correction, make_redraft
from hdlm_jax.training.state import TrainState
from hdlm_jax.training.views import make_view, opened

LossSums: TypeAlias = Callable[[Tree, Batch, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
TrainStep: TypeAlias = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]


def make_loss_sums(config: Config, network: Trunk, process: Process, mesh: Mesh | None = None) -> LossSums:
    """loss_sums(params, batch, key) -> (loss, nelbo, tokens): sums over the rows given, in nats.

    batch: x int32 [b, S], index int32 [b] (rows of the global batch), optionally score bool [b, S] (False where the
    text is given, not modelled), segment int32 [b, S] (tokens see their own segment alone), tokens int32 [b] (of a
    row, where ends of text behind them are scored as well), features float32 [b, P, F] (models.features) and open
    float32 [b] (see `opened`). Each row draws from fold_in(key, index) alone (views.make_view), so any split of a batch
    adds up to it.
    nelbo is an unbiased estimate of the unweighted bound; only loss has gradients.
    """
    d, m, drafts = config.diffusion, config.model, config.train.draft_share > 0
    shard = parallel.OverBatch(mesh)
    redraft = make_redraft(config, network, process, shard)

    def loss_sums(params: Tree, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def hidden(params: Tree, keys: jax.Array | None, *rows: jax.Array | None) -> Any:
            def of(own: jax.Array | None, z: Any, t: Any, segment: Any, clean: Any, features: Any) -> jax.Array:
                return network.hidden(given(params, features), z, t, segment, own, clean)

            if not m.dropout or keys is None:
                return of(key if config.decoder.loops else None, *rows)  # as many loops for all rows
            # a row's own key, so that its dropout does not depend on its batch mates
            row = lambda own, *one: of(own, *jax.tree.map(lambda a: a[None], one))[0]  # noqa: E731
            over = parallel.BATCH if mesh is not None and mesh.size > 1 else None  # how the rows lie on the devices
            return jax.vmap(row, spmd_axis_name=over)(keys, *rows)

        x, index = batch["x"], batch["index"]
        keys = fold(jnp.broadcast_to(key, index.shape), index)
        score = batch.get("score", jnp.ones(x.shape, bool))
        drawn = process.with_params(params)
        seen = opened(fold(keys, 3), batch.get("open"), x.shape[1], batch.get("segment"))
        beside = seen, x if m.block else None, batch.get("features")
        view = make_view(config, drawn)(key, index, x, score)
        (z, level, t, tau, weight, bound), asked = redraft(hidden, params, keys, x, view, beside)
        h = hidden(params, fold(keys, 2), z, t, *beside)

        def token_loss(p: Prediction, fields: Sequence[jax.Array], levels: tuple[int, ...]) -> tuple[jax.Array, ...]:
            x, z, tau, weight, nelbo_weight, asked = fields
            cost = process.token_loss(p, x, z, levels, tau=tau)
            hard = process.token_loss(p, x, z, levels, True, tau=tau) if d.hard_training else cost
            hard = jnp.where(asked, correction(process, p, x, z), hard) if drafts else hard
            return weight * hard, jax.lax.stop_gradient(nelbo_weight * cost)

        loss, nelbo = sum_over_noised(
            network.head, token_loss, network.head_params(params), h, level, x, (x, z, tau, weight, bound, asked),
            needs=process.needs(d.hard_training or drafts), shard=shard)
        loss += drawn.draw_loss(x, z, nelbo)
        return loss, jnp.sum(nelbo), jnp.sum(batch.get("tokens", score)).astype(jnp.float32)

    return loss_sums


def _filled(trained: Tree, kept: Tree) -> Tree:
    """A tree whose leaves are those of `trained`, or of `kept` where that has None."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, kept, is_leaf=lambda leaf: leaf is None)


def advanced(state: TrainState, loss: jax.Array, grads: Tree, tx: optax.GradientTransformation, ema: float,
             says: jax.Array | bool = True) -> tuple[TrainState, dict[str, jax.Array]]:
    """(the state after a step by these gradients, metrics loss, grad_norm, skipped); nothing moves where the loss or
    a gradient is not finite, or where the batch `says` nothing."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = jax.tree.map(lambda a, p: ema * a + (1 - ema) * p, state.ema, params) if ema else {}
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    after = jax.tree.map(lambda new, old: jnp.where(finite & says, new, old), (params, opt_state, average), state[2:])
    skipped = state.skipped + ~finite
    return TrainState(state.step + 1, skipped, *after), {"loss": loss, "grad_norm": norm, "skipped": skipped}


def make_train_step(config: Config, network: Trunk, process: Process, tx: optax.GradientTransformation,
                    mesh: Mesh | None = None) -> TrainStep:
    """train_step(state, batch, key) -> (state, metrics), pure and global.

    Gradients are those of the batch's loss in nats per token of text, whatever the number of microbatches. Where the
    loss or the gradient is not finite parameters, optimizer and average stay as they are.
    metrics: loss, nelbo (nats/token), grad_norm: float32 scalars; skipped: how often that was so up to here.
    With low-rank additions the gradients, and their norm, are of these alone: the others' are never made.
    """
    loss_sums = make_loss_sums(config, network, process, mesh)
    t, parts, ema = config.train, config.train.microbatches, config.optimizer.ema

    def sums(trained: Tree, kept: Tree, batch: Batch, key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        loss, nelbo, tokens = loss_sums(_filled(trained, kept), batch, key)
        return loss, (nelbo, tokens)

    def gradients(trained: Tree, kept: Tree, batch: Batch, key: jax.Array) -> Tree:
        if parts == 1:
            return jax.value_and_grad(sums, has_aux=True)(trained, kept, batch, key)
        # texts i, i + parts, ... make a part: contiguous rows stay on their device
        split = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, parts, t.partners, *a.shape[1:]), 1, 0).reshape(
            parts, -1, *a.shape[1:]), batch)

        def add(carry: Tree, part: Batch) -> tuple[Tree, None]:
            return jax.tree.map(jnp.add, carry, jax.value_and_grad(sums, has_aux=True)(trained, kept, part, key)), None

        zero = jnp.float32(0)
        carry, _ = jax.lax.scan(add, ((zero, (zero, zero)), jax.tree.map(jnp.zeros_like, trained)), split)
        return carry

    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(key, state.step)
        if t.open_steps:
            batch = batch | {"open": jnp.full(batch["index"].shape, jnp.minimum(state.step / t.open_steps, 1.0))}
        trained, fixed = apart(state.params) if config.decoder.lora else (state.params, state.params)
        (loss, (nelbo, tokens)), grads = gradients(trained, fixed, batch, key)
        grads = _filled(grads, jax.tree.map(jnp.zeros_like, fixed))
        says, tokens = tokens > 0, jnp.maximum(tokens, 1)  # a batch of prompts alone is no step, nor an accident
        state, metrics = advanced(state, loss / tokens, jax.tree.map(lambda g: g / tokens, grads), tx, ema, says)
        return state, metrics | {"nelbo": nelbo / tokens}

    return train_step
