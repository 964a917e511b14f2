"""Features in front of a text: images, sound, anything as vectors, given to a network like a prompt.

The first P positions of a row show W f + b of given vectors f in place of embeddings of tokens, as DIFFA (arXiv
2507.18452) and Dimple (arXiv 2505.16990) insert speech and images. They are never noised and never scored, so that
processes, losses, bounds, samplers and caches know nothing of them: vectors travel with the parameters, put there by
`given`.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from hdlm_jax.common.parallel import Tree
from hdlm_jax.config import ConfigError


def given(params: Tree, features: jax.Array | None) -> Tree:
    """Parameters of a network that is given these rows' features, float32 [B, P, F]; None: as they are.

    Vectors of NaN are padding, of a row that has fewer than P: no position attends to it.
    """
    return params if features is None else {**params, "features": {**params.get("features", {}), "given": features}}


class FeaturePlaces(nn.Module):
    """Embeddings with features in their first P places, and who sees them. Parameters: kernel [F, D], bias [D].

    Attributes:
      shape: (P, F); (0, 0): none, and everything stays as it is.
      copies: of the row side by side, each with the same features (see `models.network.Transformer`).
    """

    shape: tuple[int, int]
    copies: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, seen: jax.Array | None, position: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """x [B, Q, D], embeddings of the tokens at `position` int32 [1 or B, Q]; seen: as `Trunk.hidden` takes it.

        Raises:
          ConfigError: no features are given where there are places for them, or of another shape, or without a place.
        """
        places = self.shape[0]
        f: jax.Array | None = self.get_variable("params", "given")
        if f is None and not places:
            return x, seen
        if f is None and self.is_initializing():
            f = jnp.zeros((len(x), *self.shape))
        if f is None:
            raise ConfigError(f"features: this model has {places} places for them in front of a text, and was given "
                              "none")
        if f.shape[1:] != self.shape:
            raise ConfigError(f"features of shape {f.shape}: must be [rows, {self.shape[0]}, {self.shape[1]}], as "
                              "data.feature_places and data.feature_width say")
        there = ~jnp.isnan(f).any(axis=-1)
        kernel = self.param("kernel", nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
                            (self.shape[1], x.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros_init(), x.shape[-1:])
        shown = jnp.where(there[..., None], f, 0.0).astype(jnp.float32) @ kernel + bias.reshape(1, 1, -1)
        at = jnp.broadcast_to(position, x.shape[:2])
        shown = jnp.take_along_axis(shown, jnp.minimum(at, places - 1)[..., None], axis=1)
        x = jnp.where((at < places)[..., None], shown.astype(x.dtype), x)
        keys = x.shape[1] if seen is None else seen.shape[-1]
        key = jnp.minimum(jnp.arange(keys) % (keys // self.copies), places)
        heard = jnp.pad(there, ((0, 0), (0, 1)), constant_values=True)[:, key]  # bool [B, keys]
        if seen is None:
            return x, jnp.where(heard, 0, -1)
        return x, jnp.where(heard, seen, -1) if seen.ndim == 2 else seen & heard[:, None]
