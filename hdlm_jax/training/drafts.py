"""A run's own drafts on show, to be corrected (after ReDiff, arXiv 2510.19871): train.draft_share (docs/training.md).

In some rows of a batch the network takes one step back by itself, from the states z at noise time tau to z' at an
earlier one, as the sampler does in a call: some tokens now show what it drew. It is asked what the text says there,

    -log f(x | z')    where z' shows a word, -log of f's mass under the text's node where it shows a cluster,

and nothing else of such a row counts. f looks at z' itself, draft included, with no force transition. The bound asks
nothing at words, and at clusters of what lies beside them only where xi < 1 or nothing is forced (there drafts of
clusters are shown and not asked about): so these questions leave its optimum where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

import jax
import jax.numpy as jnp

from hdlm_jax.common.parallel import OverBatch, Tree
from hdlm_jax.config import Config
from hdlm_jax.diffusion.draws import fold, token_keys
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.levels import open_uniform
from hdlm_jax.diffusion.prediction import Prediction
from hdlm_jax.diffusion.process import Process
from hdlm_jax.models.heads import map_over_noised
from hdlm_jax.models.trunk import Trunk
from hdlm_jax.training.views import View

# (parameters, keys [b] of dropout or None, states, times, what else a trunk is told) -> hidden states
Read: TypeAlias = Callable[..., jax.Array]
# (reads, parameters, keys [b], texts, view, what else) -> (view, tokens asked about, bool [b, S]; () without drafts)
Redraft: TypeAlias = Callable[[Read, Tree, jax.Array, jax.Array, View, tuple], tuple[View, Tree]]


def earlier(process: HierarchicalProcess, keys: jax.Array, view: View) -> tuple[jax.Array, jax.Array]:
    """(levels int32 [b, S], t float32 [b]) at an earlier time of each row, u t with u uniform, given z's levels."""
    u = jax.vmap(lambda key: open_uniform(key, (1 + view.z.shape[1],)))(keys)
    t, now = u[:, 0] * view.t, process.level_of(view.z)
    law = process.chain.posterior(-jnp.log1p(-t), view.tau[:, 0])
    edges = jnp.cumsum(jnp.take_along_axis(law, now[..., None], axis=1), axis=-1)
    level = jnp.sum(edges[..., :-1] <= u[:, 1:, None] * edges[..., -1:], axis=-1, dtype=jnp.int32)
    return jnp.minimum(level, now), t


def make_redraft(config: Config, network: Trunk, process: Process, shard: OverBatch) -> Redraft:
    """A step's view, in train.draft_share of its rows one step of the run's own further, and what is asked there.

    Each row draws from its own key alone. The bound is estimated by the other rows, which weigh for those as well.
    """
    share, h = config.train.draft_share, cast(HierarchicalProcess, process)
    clusters = h.needs() == "within"  # the bound leaves open what a cluster's place says of other clusters

    def redraft(read: Read, params: Tree, keys: jax.Array, x: jax.Array, view: View, rest: tuple
                ) -> tuple[View, Tree]:
        if not share:
            return view, ()
        params, keys = jax.lax.stop_gradient(params), fold(keys, 7)
        hidden = read(params, None, view.z, view.t, *rest)  # the sampler has no dropout
        chosen = (jax.vmap(open_uniform)(fold(keys, 0)) < share)[:, None]
        target, t = earlier(h, fold(keys, 1), view)
        falls = chosen & (view.level > 0) & (target < h.level_of(view.z))

        def drawn(p: Prediction, fields: Sequence[jax.Array], levels: object) -> jax.Array:
            each, z, to = fields
            return h.reverse_step(each, p, z, to, sync_trip_count=shard.sync_trip_count).astype(jnp.float32)

        fields = (token_keys(fold(keys, 2), x.shape), view.z, target)
        draft = map_over_noised(network.head, drawn, network.head_params(params), hidden, falls.astype(jnp.int32), x,
                                fields, needs="tokens", shard=shard)
        asked = falls & (clusters | (target == 0))
        counts = asked | ~chosen
        return View(jnp.where(falls, draft.astype(jnp.int32), view.z), jnp.where(counts, view.level, 0),
                    jnp.where(chosen[:, 0], t, view.t), view.tau, jnp.where(counts, view.weight, 0.0),
                    jnp.where(chosen, 0.0, view.bound / (1 - share))), asked

    return redraft


def correction(process: Process, p: Prediction, x: jax.Array, z: jax.Array) -> jax.Array:
    """-log of what f says of the text at the level of z: of the word, or of its node there; float32 of x's shape."""
    cost = -p.log_prob(x)
    for k in range(1, process.num_levels):
        own = jnp.asarray(process.hierarchy.anc[k])[x]
        cost = jnp.where(process.level_of(z) == k, -p.log_mass(k, own), cost)
    return cost
