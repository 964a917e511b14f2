"""From a config to a network, a process and all that a training step changes: parameters, optimizer, average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.sharding import Mesh

from hdlm_jax.common import parallel
from hdlm_jax.common.parallel import Tree
from hdlm_jax.config import Config
from hdlm_jax.diffusion.autoregressive import AutoregressiveProcess
from hdlm_jax.diffusion.gidd import GiddProcess
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.levels import LevelChain
from hdlm_jax.diffusion.process import Process
from hdlm_jax.diffusion.sedd import SeddProcess
from hdlm_jax.models import channel, latents
from hdlm_jax.models.decoder import lora_labels
from hdlm_jax.models.make import make_network
from hdlm_jax.models.network import TENSOR_AXES, matrix_axes
from hdlm_jax.models.soft import SoftProcess, with_map
from hdlm_jax.models.trunk import Trunk


def make_process(config: Config, hierarchy: Hierarchy) -> Process:
    """The process of config.diffusion.process: hierarchical, gidd, sedd or autoregressive."""
    d = config.diffusion
    if d.process == "autoregressive":
        return AutoregressiveProcess(hierarchy)
    if d.process == "gidd":
        return GiddProcess(hierarchy, d.p_uniform)
    chain = LevelChain(d.level_rates(hierarchy.num_levels))
    if d.channel or d.latents:
        return latents.make(config, hierarchy, chain)
    hierarchical = SoftProcess if config.hierarchy.map == "learned" else HierarchicalProcess
    return (SeddProcess if d.process == "sedd" else hierarchical)(hierarchy, chain, d.xi, d.force_transition)


def build(config: Config, hierarchy: Hierarchy) -> tuple[Trunk, Process]:
    """(network, process) of a config and hierarchy."""
    return make_network(config, hierarchy), make_process(config, hierarchy)


class TrainState(NamedTuple):
    step: jax.Array  # int32, batches seen
    skipped: jax.Array  # int32, those of them whose loss or gradient was not finite and that changed nothing
    params: Tree
    opt_state: optax.OptState
    ema: Tree  # average of params, or {} when off


def _of_axes(of: Callable[[Any], Any]) -> Callable[[Tree], Tree]:
    """params -> a tree of of(Muon's axes of every matrix of the blocks, None of all else)."""
    return lambda params: jax.tree_util.tree_map_with_path(
        lambda path, leaf: of(matrix_axes([str(key.key) for key in path])), params)


def make_optimizer(config: Config) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW with clipping by the global norm, and its learning-rate schedule (steps -> lr).

    With optimizer.name='muon' the matrices of the blocks (models.network.matrix_axes) go by Muon, at its own rate.
    """
    o, steps = config.optimizer, config.train.steps
    rest = max(1, steps - o.warmup)
    after = constant = optax.constant_schedule(o.lr)
    if o.schedule == "cosine":
        after = optax.cosine_decay_schedule(o.lr, rest, o.final_lr)
    elif o.schedule == "wsd":  # arXiv 2404.06395
        cooling = optax.linear_schedule(o.lr, o.final_lr * o.lr, rest - rest * 4 // 5)
        after = optax.join_schedules([constant, cooling], [rest * 4 // 5])
    schedule = optax.join_schedules([optax.linear_schedule(0.0, o.lr, max(1, o.warmup)), after], [o.warmup])
    # the update made from state.step = 0 is the first one, so that its rate is not zero
    tx = optax.adamw(lambda n: schedule(n + 1), o.b1, o.b2, o.eps, weight_decay=o.weight_decay)
    if o.name == "muon":
        dimensions = _of_axes(lambda axes: axes and optax.contrib.MuonDimensionNumbers(*axes))
        muon = optax.contrib.muon(lambda n: o.muon_lr / o.lr * schedule(n + 1), weight_decay=o.weight_decay,
                                  muon_weight_dimension_numbers=dimensions, consistent_rms=o.muon_rms or None)
        tx = optax.multi_transform({"muon": muon, "adamw": tx}, _of_axes(lambda axes: "muon" if axes else "adamw"))
    if config.hierarchy.map == "learned":
        tx = with_map(tx, lambda n: config.hierarchy.map_rate * schedule(n + 1))
    if config.diffusion.channel:
        tx = channel.frozen(tx)
    tx = optax.chain(optax.clip_by_global_norm(o.clip), tx)
    if config.decoder.lora:
        tx = optax.multi_transform({"trained": tx, "kept": optax.set_to_zero()}, lora_labels)
    return tx, lambda n: schedule(n + 1)


def init_state(config: Config, network: Trunk, tx: optax.GradientTransformation, key: jax.Array,
               table: jax.Array | np.ndarray | None = None) -> TrainState:
    """A fresh state (jit it with out_shardings, so that it is born where it lives). table: float32 [rows, D], what the
    embedding table starts from (None: random) and, with model.warm_head, the head's vectors of the words as well."""
    params = network.init_params(key, config.model.seq_len)
    if table is not None:
        params, v = network.with_table(params, table), network.head.hierarchy.vocab_size
        if config.model.warm_head:
            params = network.with_head(params, jnp.asarray(table[:v]), jnp.zeros(v))
    ema = jax.tree.map(jnp.copy, params) if config.optimizer.ema else {}
    return TrainState(jnp.int32(0), jnp.int32(0), params, tx.init(params), ema)


def placed(make: Callable[[], Tree], mesh: Mesh) -> tuple[Tree, Tree]:
    """Shapes of what is made, each with the sharding it has on the mesh; and the shardings."""
    shape = jax.eval_shape(make)
    shardings = parallel.state_shardings(mesh, shape, TENSOR_AXES)
    add = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(add, shape, shardings), shardings


def abstract_state(config: Config, network: Trunk, tx: optax.GradientTransformation, mesh: Mesh
                   ) -> tuple[TrainState, TrainState]:
    """`placed` of a state."""
    return placed(lambda: init_state(config, network, tx, jax.random.key(0)), mesh)
