"""Certainty forcing on a run's own texts (dParallel, arXiv 2509.26488): the same texts, surer earlier.

A block of a text is hidden by halves, some of its tokens, then the others, all later blocks masked. A hidden token
shows one of its levels, each as likely, and is priced by the law of its next state down: cross-entropy everywhere, and
where the likeliest state is the text's own already, the entropy of that law, sharpened, as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hdlm_jax.common import parallel
from hdlm_jax.common.parallel import Batch, Tree
from hdlm_jax.config import Config
from hdlm_jax.decoding import presets
from hdlm_jax.decoding.policy import time_of
from hdlm_jax.diffusion.draws import fold
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.prediction import Prediction
from hdlm_jax.models.heads import map_over_noised, sum_over_noised
from hdlm_jax.models.trunk import Trunk
from hdlm_jax.tuning.lesson import Loss
from hdlm_jax.tuning.record import shown

SHARPENED = 0.5  # the temperature of the law whose entropy is to fall


class Halves(NamedTuple):
    """States z int32 [2 b, S] of b texts, one half hidden behind the other; `level` int32 [2 b, S] of what is priced,
    0 elsewhere; t float32 [2 b]."""

    z: jax.Array
    level: jax.Array
    t: jax.Array


def halves(process: HierarchicalProcess, keys: jax.Array, x: jax.Array, score: jax.Array, block: int = 0) -> Halves:
    """Of texts x int32 [b, S], free where bool [b, S]; keys [b], all that a row's draws depend on (the release draws as
    many masks for every row of a batch as its first one has, which is right for one row alone).

    block: so many free tokens are one; 0: all are.
    """
    size, count = block or x.shape[1], jnp.sum(score, axis=1)
    of = (jnp.cumsum(score, axis=1) - 1) // size
    pick = jax.vmap(lambda key, n: jax.random.randint(key, (), 0, n))(fold(keys, 0), jnp.maximum(-(-count // size), 1))
    inside, later = score & (of == pick[:, None]), score & (of > pick[:, None])
    first = jax.vmap(lambda key: jax.random.bernoulli(key, shape=x.shape[1:]))(fold(keys, 1))
    high = jax.vmap(lambda key: jax.random.randint(key, x.shape[1:], 1, process.num_levels + 1))(fold(keys, 2))
    hidden = jnp.concatenate([jnp.where(inside & half, high, 0) for half in (first, ~first)])
    level = jnp.where(jnp.tile(later, (2, 1)), process.num_levels, hidden)
    mean = jnp.sum(level, axis=1) / jnp.maximum(jnp.tile(count, 2), 1)
    return Halves(shown(process, jnp.tile(x, (2, 1)), level), hidden, time_of(process.chain, mean))


def terms(process: HierarchicalProcess, p: Prediction, x: jax.Array, level: jax.Array) -> tuple[jax.Array, ...]:
    """Of tokens x that show their ancestors at `level` >= 1, all [...], by the law of their states one level down: its
    cross-entropy with the text, its entropy at the temperature SHARPENED, nats; whether the likeliest is the text's.
    """
    z, out = shown(process, x, level), [jnp.zeros(x.shape)] * 3
    for k in range(1, process.num_levels + 1):
        logs = process.log_probs_below(p, z, k, k - 1)
        node = jnp.asarray(process.ancestors(0, k - 1))[x]
        own = jnp.take_along_axis(logs, node[..., None], axis=-1)[..., 0]
        sharp = jax.nn.log_softmax(logs / SHARPENED, axis=-1)
        entropy = -jnp.sum(jnp.where(sharp > -jnp.inf, jnp.exp(sharp) * jnp.maximum(sharp, -1e30), 0.0), axis=-1)
        right = (jnp.argmax(logs, axis=-1) == node).astype(jnp.float32)
        out = [jnp.where(level == k, new, old) for new, old in zip((-own, entropy, right), out, strict=True)]
    return tuple(out)


def make_loss(config: Config, network: Trunk, base: Trunk, process: HierarchicalProcess, mesh: Mesh | None = None
              ) -> Loss:
    """Cross-entropy and tune.certainty times the entropy, each a mean over its own positions: of both halves, and of
    those among them that are right. metrics: both, and the share that is right."""
    block, weight = presets.check(config.generate).policy.block, config.tune.certainty
    shard, head = parallel.OverBatch(mesh), network.head

    def loss(params: Tree, frozen: Tree, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        x, index = batch["x"], batch["index"]
        z, level, t = halves(process, fold(jnp.broadcast_to(key, index.shape), index), x, batch["score"], block)
        x, h = jnp.tile(x, (2, 1)), network.hidden(params, z, t)
        right = map_over_noised(head, lambda p, f, levels: terms(process, p, *f)[2],
                                jax.lax.stop_gradient(network.head_params(params)), jax.lax.stop_gradient(h), level, x,
                                (x, jnp.maximum(level, 1)), needs="tokens", shard=shard)
        every = (level > 0).astype(jnp.float32)
        shares = [mine / jnp.maximum(jnp.sum(mine), 1) for mine in (every, right)]

        def cost(p: Prediction, fields: Sequence[jax.Array], levels: object) -> tuple[jax.Array, jax.Array]:
            x, level, each, surer = fields
            truth, entropy, _ = terms(process, p, x, level)
            forced = surer * entropy
            return each * truth + weight * forced, jax.lax.stop_gradient(forced)

        total, each = sum_over_noised(head, cost, network.head_params(params), h, level, x,
                                      (x, jnp.maximum(level, 1), *shares), needs="tokens", shard=shard)
        entropy = jnp.sum(each)
        return total, {"cross_entropy": total - weight * entropy, "entropy": entropy,
                       "right": jnp.sum(right) / jnp.maximum(jnp.sum(every), 1)}

    return loss
