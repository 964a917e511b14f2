"""Everything a step changes, and the step itself."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hdlm_jax.diffusion.autoregressive import AutoregressiveProcess
from hdlm_jax.diffusion.gidd import GiddProcess
from hdlm_jax.diffusion.levels import LevelChain, open_uniform
from hdlm_jax.diffusion.process import HierarchicalProcess, fold
from hdlm_jax.diffusion.sedd import SeddProcess
from hdlm_jax.model.heads import WHOLE, sum_over_noised
from hdlm_jax.model.network import Network, make_network
from hdlm_jax.run import parallel


class TrainState(NamedTuple):
    step: jax.Array  # int32, batches seen
    skipped: jax.Array  # int32, those of them whose loss or gradient was not finite and that changed nothing
    params: Any
    opt_state: Any
    ema: Any  # average of params, or {} when off


def make_process(config, hierarchy) -> Any:
    """The process of config.diffusion.process: hierarchical, gidd, sedd or autoregressive."""
    d = config.diffusion
    if d.process == "autoregressive":
        return AutoregressiveProcess(hierarchy)
    if d.process == "gidd":
        return GiddProcess(hierarchy, d.p_uniform)
    chain = LevelChain(d.level_rates(hierarchy.num_levels))
    return (SeddProcess if d.process == "sedd" else HierarchicalProcess)(hierarchy, chain, d.xi, d.force_transition)


def make_optimizer(config) -> tuple[optax.GradientTransformation, Any]:
    """AdamW with clipping by the global norm, and its learning-rate schedule (steps -> lr)."""
    o, steps = config.optimizer, config.train.steps
    rest = max(1, steps - o.warmup)
    after = optax.constant_schedule(o.lr)
    if o.schedule == "cosine":
        after = optax.cosine_decay_schedule(o.lr, rest, o.final_lr)
    schedule = optax.join_schedules([optax.linear_schedule(0.0, o.lr, max(1, o.warmup)), after], [o.warmup])
    # the update made from state.step = 0 is the first one, so that its rate is not zero
    tx = optax.chain(optax.clip_by_global_norm(o.clip),
                     optax.adamw(lambda n: schedule(n + 1), o.b1, o.b2, o.eps, weight_decay=o.weight_decay))
    return tx, lambda n: schedule(n + 1)


def init_state(config, hierarchy, network: Network, tx, key, table=None) -> TrainState:
    """A fresh state (jit it with out_shardings, so that it is born where it lives).

    Args:
      table: float32 [rows, D] start of the embedding table, or None for a random one.
    """
    z = jnp.zeros((1, config.model.seq_len), jnp.int32)
    params = network.init(key, z, jnp.zeros((1,)))["params"]
    if table is not None:
        params = {**params, "embedding": jnp.asarray(table)}
    ema = jax.tree.map(jnp.copy, params) if config.optimizer.ema else {}
    return TrainState(jnp.int32(0), jnp.int32(0), params, tx.init(params), ema)


def abstract_state(config, hierarchy, network, tx, mesh):
    """Shapes of the state, each with the sharding it has on the mesh; and the shardings."""
    shape = jax.eval_shape(lambda: init_state(config, hierarchy, network, tx, jax.random.key(0)))
    shardings: Any = parallel.state_shardings(mesh, shape)
    add = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(add, shape, shardings), shardings


def stratified_tau(keys, index, batch: int):
    """Noise times [b] of rows `index` of a batch: t = (index + u)/batch uniform, one stratum a row, in (0, 1).

    1 - t is formed by itself, so that neither end of time is cut off or rounded.
    """
    u = jax.vmap(open_uniform)(keys)
    i = index.astype(jnp.float32)
    t, rest = (i + u) / batch, ((batch - 1 - i) + (1 - u)) / batch
    return jnp.where(t < 0.5, -jnp.log1p(-t), -jnp.log(rest))


def make_loss_sums(config, network: Network, process: HierarchicalProcess, mesh=None):
    """loss_sums(params, batch, key) -> (loss, nelbo, tokens): sums over the rows given, in nats.

    batch: x int32 [b, S], index int32 [b] (rows of the global batch), optionally score bool [b, S] (False where the
    text is given, not modelled), segment int32 [b, S] (tokens see their own segment alone) and tokens int32 [b] (of
    a row, where ends of text behind them are scored as well). Each row draws from fold_in(key, index) alone, so any
    split of a batch adds up to it.
    nelbo is the unweighted estimate for t uniform; only loss has gradients.
    """
    d, m = config.diffusion, config.model
    shard: Any = WHOLE if mesh is None else parallel.OverBatch(mesh)
    weigh = functools.partial(process.loss_weight, weighting=d.weighting, weight_min=d.weight_min,
                              weight_max=d.weight_max)

    def hidden(params, z, t, segment, keys):
        if not m.dropout:
            return network.apply({"params": params}, z, t, segment, method="trunk")

        def row(z, t, segment, key):  # a row's own key, so that its dropout does not depend on its batch mates
            z, t, segment = jax.tree.map(lambda a: a[None], (z, t, segment))
            return network.apply({"params": params}, z, t, segment, True, rngs={"dropout": key}, method="trunk")[0]

        return jax.vmap(row)(z, t, segment, keys)

    def loss_sums(params, batch, key):
        x, index = batch["x"], batch["index"]
        keys = fold(jnp.broadcast_to(key, index.shape), index)
        tau = stratified_tau(fold(keys, 0), index, config.train.batch_size)
        score = batch.get("score", jnp.ones(x.shape, bool))
        z, level = process.noised(fold(keys, 1), x, tau, score)
        h = hidden(params, z, -jnp.expm1(-tau), batch.get("segment"), fold(keys, 2))

        def token_loss(p, fields, levels):
            x, z, tau, weight, nelbo_weight = fields
            cost = process.cost(p, x, z, levels, tau=tau)
            hard = process.cost(p, x, z, levels, hard_training=True) if d.hard_training else cost
            return weight * hard, jax.lax.stop_gradient(nelbo_weight * cost)

        fields = (x, z, jnp.broadcast_to(tau[:, None], x.shape), weigh(z, tau, x=x),
                  process.nelbo_weight(z, tau, x) * jnp.exp(tau)[:, None])
        loss, nelbo = sum_over_noised(network.head, token_loss, params["head"], h, level, x, fields,
                                      asks=process.asks(d.hard_training), shard=shard)
        return loss, nelbo, jnp.sum(batch.get("tokens", score)).astype(jnp.float32)

    return loss_sums


def make_train_step(config, network, process, tx, mesh=None):
    """train_step(state, batch, key) -> (state, metrics), pure and global.

    Gradients are those of the batch's loss in nats per token of text, whatever the number of microbatches. Where the
    loss or the gradient is not finite parameters, optimizer and average stay as they are.
    metrics: loss, nelbo (nats/token), grad_norm: float32 scalars; skipped: how often that was so up to here.
    """
    loss_sums = make_loss_sums(config, network, process, mesh)
    parts, ema = config.train.microbatches, config.optimizer.ema

    def sums(params, batch, key):
        loss, nelbo, tokens = loss_sums(params, batch, key)
        return loss, (nelbo, tokens)

    def gradients(params, batch, key):
        if parts == 1:
            return jax.value_and_grad(sums, has_aux=True)(params, batch, key)
        # rows i, i + parts, ... make a part: contiguous rows stay on their device
        split = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, parts, *a.shape[1:]), 1, 0), batch)

        def add(carry, part):
            return jax.tree.map(jnp.add, carry, jax.value_and_grad(sums, has_aux=True)(params, part, key)), None

        zero = jnp.float32(0)
        carry, _ = jax.lax.scan(add, ((zero, (zero, zero)), jax.tree.map(jnp.zeros_like, params)), split)
        return carry

    def train_step(state: TrainState, batch, key):
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


def build(config, hierarchy):
    """(network, process) of a config and hierarchy."""
    return make_network(config, hierarchy), make_process(config, hierarchy)
