"""An energy by noise contrastive estimation: texts of the data against those that a frozen p_theta draws (EDLM).

With x+ the text, z its states and x- drawn from p_theta(. | z), every token that is noised on its own,

    L = -log s(-E(x+, z)) - log s(E(x-, z)),    s the logistic function,

is least at E* = log p_theta(x | z) - log q(x | z), q the data's law of the words given the states, for which Z = 1
(arXiv 2410.21357, section 4.2). Nothing in it speaks of masks: with clusters z shows some, words are drawn under them
by the force transition, and E* is the same expression at every z.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hdlm_jax.common import parallel
from hdlm_jax.common.parallel import Batch, Tree
from hdlm_jax.config import Config
from hdlm_jax.diffusion.draws import fold, token_keys
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.models.energy import EnergyNetwork
from hdlm_jax.models.heads import map_over_noised
from hdlm_jax.models.trunk import Trunk
from hdlm_jax.training.views import make_view
from hdlm_jax.tuning.lesson import Loss


def nce(real: jax.Array, drawn: jax.Array) -> jax.Array:
    """L of the energies of a text and of a drawn one, in nats, of their shape; log 4 where nothing tells them apart."""
    return jax.nn.softplus(real) + jax.nn.softplus(-drawn)


def words_drawn(network: Trunk, process: HierarchicalProcess, params: Tree, z: jax.Array, t: jax.Array, x: jax.Array,
                keys: jax.Array, segment: jax.Array | None = None, mesh: Mesh | None = None) -> jax.Array:
    """int32 [b, S]: x where z is written, elsewhere words of the network's p(. | z), drawn one by one; keys [b]."""
    def draw(p, fields, levels):  # type: ignore[no-untyped-def]
        z, keys = fields
        return process.reverse_step(keys, p, z, jnp.zeros_like(z)).astype(jnp.float32)  # exact up to 2^24 words

    level = process.level_of(z)
    h = network.hidden(params, z, t, segment)
    new = map_over_noised(network.head, draw, network.head_params(params), h, level, x,
                          (z, token_keys(keys, z.shape)), needs="tokens", shard=parallel.OverBatch(mesh))
    return jnp.where(level > 0, new.astype(jnp.int32), x)


def make_loss(config: Config, network: Trunk, base: Trunk, process: HierarchicalProcess, mesh: Mesh | None = None
              ) -> Loss:
    """The loss of a row, its mean over the batch; metrics: how often the drawn text has the higher energy, as it should
    (ties, as where nothing is noised, are halves), and the mean of either energy."""
    energy = cast(EnergyNetwork, network).energy
    view = make_view(dataclasses.replace(config, train=dataclasses.replace(config.train, objective="nelbo")), process)

    def loss(params: Tree, frozen: Tree, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        x, index, segment = batch["x"], batch["index"], batch.get("segment")
        z, _, t, *_ = view(key, index, x, batch.get("score", jnp.ones(x.shape, bool)))
        keys = fold(fold(jnp.broadcast_to(key, index.shape), index), 3)
        other = jax.lax.stop_gradient(words_drawn(base, process, frozen, z, t, x, keys, segment, mesh))
        real, drawn = energy(params, z, x, t, segment), energy(params, z, other, t, segment)
        right = (drawn > real) + 0.5 * (drawn == real)
        return jnp.mean(nce(real, drawn)), {"told_apart": jnp.mean(right), "energy_real": jnp.mean(real),
                                            "energy_drawn": jnp.mean(drawn)}

    return loss
