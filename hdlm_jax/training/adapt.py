"""From one model to another (train.adapt): an autoregressive one becomes MDLM, MDLM becomes HDLM.

What both have is taken over. A cluster's vector starts as the mean of its tokens', the mask's as the mean of all tokens
(as that of a model that has one already); a factorised head starts from the flat one's rows, its clusters fitted to
the flat one's at noised texts (`fitted`). DiffuLLaMA (arXiv 2410.17891), Dream (2508.15487) and Dimple (2505.16990)
begin so; that a hierarchy can be begun so is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from hdlm_jax.common.parallel import Batch, Tree
from hdlm_jax.diffusion.draws import fold
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.process import Process
from hdlm_jax.models.features import given
from hdlm_jax.models.trunk import Trunk
from hdlm_jax.training.state import TrainState
from hdlm_jax.training.views import stratified_tau


def adapted(key: jax.Array, params: Tree, base: Trunk, network: Trunk, seq_len: int, masked: bool) -> Tree:
    """Parameters of `network` from those of `base`.

    masked: whether base knows a mask. key: of what is new and starts at random (low-rank additions).

    Raises:
      ValueError: a part that both have is of another shape. NotImplementedError: the head of base is factorised.
    """
    start = network.init_params(key, seq_len)
    kernel, bias = base.head.rows(base.head_params(params))
    table = start_table(base.table(params), base.head.hierarchy, network.head.hierarchy, masked)
    trunk = {name: part for name, part in start.items() if name not in ("embedding", "states", "head")}
    return network.with_head(network.with_table(start | _taken(trunk, params, ""), table), kernel, bias)


def regrouped(state: TrainState, network: Trunk, there: Hierarchy) -> TrainState:
    """A state for a network with other clusters of the same sizes, from one with those `there`: a token's and a
    cluster's rows stay theirs in parameters, optimizer and average (models.heads: `moved`)."""
    head = network.head

    def of_params(tree: Tree) -> Tree:
        return {**tree, "head": head.moved(tree["head"], there)} if tree else tree

    def has_head(part: object) -> bool:
        return isinstance(part, dict) and "head" in part

    def moments(part: Tree) -> Tree:
        return {**part, "head": head.reordered(part["head"], there)} if has_head(part) else part

    return state._replace(params=of_params(state.params), ema=of_params(state.ema),
                          opt_state=jax.tree.map(moments, state.opt_state, is_leaf=has_head))


FIT_POSITIONS = 8192  # hidden vectors at which a factorised head's clusters are fitted


def fitted(key: jax.Array, params: Tree, own: Tree, base: Trunk, network: Trunk, process: Process,
           batches: Sequence[Batch]) -> Tree:
    """`adapted` parameters with a head that says of clusters what the flat one of `base` (parameters `own`) would."""
    h = [noised_hidden(jax.random.fold_in(key, i), params, network, process, batch) for i, batch in enumerate(batches)]
    return network.with_head(params, *base.head.rows(base.head_params(own)), jnp.concatenate(h))


def noised_hidden(key: jax.Array, params: Tree, network: Trunk, process: Process, batch: Batch) -> jax.Array:
    """Hidden vectors float32 [b S, D] of a batch's rows, noised as in training (t uniform, stratified)."""
    x, index = batch["x"], batch["index"]
    keys = fold(jnp.broadcast_to(key, index.shape), index)
    tau = stratified_tau(fold(keys, 0), index, len(x))
    z, _ = process.noised(fold(keys, 1), x, tau, batch.get("score", jnp.ones(x.shape, bool)))
    h = network.hidden(given(params, batch.get("features")), z, -jnp.expm1(-tau), batch.get("segment"))
    return h.reshape(-1, h.shape[-1]).astype(jnp.float32)


def _taken(start: Tree, own: Tree, where: str) -> Tree:
    """The tree `start` with all that `own` has as well."""
    if not isinstance(start, dict):
        if start.shape != own.shape:
            raise ValueError(f"{where}: {own.shape} there, {start.shape} here")
        return own.astype(start.dtype)
    return {name: _taken(part, own[name], f"{where}.{name}".strip(".")) if name in own else part
            for name, part in start.items()}


def start_table(table: jax.Array, there: Hierarchy, here: Hierarchy, masked: bool) -> jax.Array:
    """Embeddings float32 [N, D] of all states here, from those there; clusters that both have alike stay."""
    table = table.astype(jnp.float32)
    tokens = table[: there.vocab_size]
    rows = [tokens]
    for level in range(1, here.num_levels):
        node, n = jnp.asarray(here.anc[level]), here.sizes[level]
        total = jax.ops.segment_sum(tokens, node, n)
        rows.append(total / jnp.asarray(here.token_count[level])[:, None])
    if here == there:
        return table[: here.num_states]
    mask = table[there.mask_id][None] if masked else jnp.mean(tokens, axis=0, keepdims=True)
    return jnp.concatenate([*rows, mask])
