"""What the other rooms ask of a network: `models.network.Network` is the published one, others may stand in its place.

Parameters are a tree with the head's own under "head". Shapes: z int32 [B, S], states on show; t float32 [B], the
masking level in [0, 1]; hidden states float32 [B, S, D].
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

import chex
import jax
import numpy as np

from hdlm_jax.common.parallel import Tree
from hdlm_jax.diffusion.prediction import Prediction, Predictions
from hdlm_jax.models.heads import Head

Cache: TypeAlias = chex.ArrayTree  # keys and values [blocks, B, S, ...], and what else a trunk keeps


class Trunk(Protocol):
    """A network as training, evaluation and sampling see it."""

    @property
    def head(self) -> Head: ...

    @property
    def width(self) -> int:
        """D."""

    @property
    def causal(self) -> bool:
        """Whether a position sees those before it alone."""

    @property
    def block(self) -> int:
        """Tokens of a block of block diffusion (model.block); 0: none."""

    def head_params(self, params: Tree) -> Tree:
        """Those of the head."""

    def with_table(self, params: Tree, table: jax.Array | np.ndarray) -> Tree:
        """Parameters with a start of the embeddings of all states, float32 [rows, D]."""

    def table(self, params: Tree) -> jax.Array:
        """The other way round: float32 [at least N, D]."""

    def with_head(self, params: Tree, kernel: jax.Array, bias: jax.Array, h: jax.Array | None = None) -> Tree:
        """Parameters with a head that starts from a vector [V, D] and bias [V] for the logit of every token."""

    def init_params(self, key: jax.Array, seq_len: int) -> Tree:
        """Random parameters."""

    def hidden(self, params: Tree, z: jax.Array, t: jax.Array, segment: jax.Array | None = None,
               dropout: jax.Array | None = None, clean: jax.Array | None = None) -> jax.Array:
        """Hidden states of all positions.

        segment: int32 [B, S], positions see those of the same number alone; or bool [B, S or 1, S], what each sees.
        dropout: a key of what training draws; None: it draws nothing. clean: int32 [B, S], the tokens themselves, for a
        network with blocks: each block of z then sees itself and the clean ones before it (segment: numbers alone).
        """

    def hidden_at(self, params: Tree, z: jax.Array, t: jax.Array, cache: Cache, position: jax.Array,
                  seen: jax.Array) -> tuple[jax.Array, Cache]:
        """Hidden states [B, Q, D] of the states z [B, Q] at `position` [B, Q], given keys and values of the others as
        last computed, and the cache with theirs in it. seen: bool [B, Q or 1, S], what they attend to."""

    def denoise(self, params: Tree, z: jax.Array, t: jax.Array, segment: jax.Array | None = None) -> Predictions:
        """The prediction at all positions, made only where it is asked for (`select`)."""

    def next_token(self, params: Tree, cache: Cache, z: jax.Array, at: jax.Array) -> tuple[Cache, Prediction]:
        """(cache, prediction [B] of the token at position `at`, behind the state z [B, 1] that stands before it)."""

    def empty_cache(self, rows: int, seq_len: int) -> Cache:
        """Room for so many rows and positions."""
