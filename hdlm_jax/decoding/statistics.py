"""What sampling tells about its draws."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def together(tokens: int) -> tuple[int, int]:
    """Rows of so many tokens, and tokens, that are worked on at once by default: what fills the device."""
    rows, drops = (1024, 64) if jax.default_backend() == "cpu" else (65_536, 2048)
    return max(1, rows // tokens), drops


def drop_probability(process, prediction, z, new, clusters: str = "exact"):
    """How likely each drop z -> new was among all drops to that level: float32 of z's shape, 0 where none was.

    Under p(. | z) after the force transition; temperature and top_p sharpen what is drawn, not this number. A word has
    p(x | z), a node u the mass that `HierarchicalProcess.posterior` gives it.
    """
    p, level, below = process.as_prediction(prediction), process.level_of(z), process.level_of(new)
    word = process.forced(p, z).log_prob(jnp.where(below == 0, new, 0))
    out = jnp.where((level > 0) & (below == 0), jnp.exp(word), 0.0)
    for k in range(2, process.num_levels + 1):
        for j in range(1, k):
            law = process.log_probs_below(p, z, k, j, clusters)
            node = jnp.take_along_axis(law, process._node(new, j)[..., None], axis=-1)[..., 0]
            out = jnp.where((level == k) & (below == j), jnp.exp(node), out)
    return out
