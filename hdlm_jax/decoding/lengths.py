"""Canvases that grow while they are written: DAEDAL (arXiv 2508.00819).

A row has S places and a length; growing is a gather along an index map, so shapes stay. First the canvas grows at its
end until the network expects the end of the text (EOS) there; then, while it is written, the mask the network is least
sure of becomes several.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from hdlm_jax.decoding.policy import Lengths, View

PHASE = "daedal_phase"  # name in the loop's memory


def eos_confidence(says_eos: jax.Array, probability: jax.Array, window: int) -> jax.Array:
    """e of DAEDAL: the summed probability [b, S] of the last `window` tokens that say EOS, over `window`: float32 [b].

    says_eos: bool [b, S], where EOS is the likeliest state.
    """
    from_the_end = jnp.cumsum(says_eos[:, ::-1], axis=1)[:, ::-1]
    return jnp.sum(jnp.where(says_eos & (from_the_end <= window), probability, 0.0), axis=1) / window


def insertion(at: jax.Array, expand: jax.Array, places: int) -> jax.Array:
    """Index map source int32 [b, S] by which place `at` int32 [b] becomes `expand` [b] places; -1: nothing does.

    The row after is the row before at `source`. What is pushed over S = `places` is lost.
    """
    j = jnp.arange(places, dtype=jnp.int32)[None]
    at, more = at[:, None], jnp.where(at >= 0, expand - 1, 0)[:, None]
    return jnp.where(j <= at, j, jnp.maximum(j - more, at))


@dataclasses.dataclass(frozen=True)
class Daedal(Lengths):
    """DAEDAL's rule of lengths, for any number of levels.

    EOS is the state one level down: the EOS token, or its cluster (give it one of its own). A written EOS counts with
    probability 1. A mask that stays one in this call becomes `expand` masks.

    numbers: eos, its token; maximum, most tokens of a row, prompt and all; e below eos_grow grows, below eos_stop
    allows insertions, where p < low.
    """

    expand: int = 8
    window: int = 32
    needs = ("top",)
    whole = True

    def memory(self, view: View) -> dict[str, jax.Array]:
        """The phase int32 [b]: 0 growing, 1 writing."""
        return {PHASE: jnp.zeros(len(view.z), jnp.int32)}

    def remember(self, view: View, z: jax.Array, unmasked: jax.Array) -> dict[str, jax.Array]:
        return {PHASE: jnp.where(self.growing(view)[1], 0, 1).astype(jnp.int32)}

    def __call__(self, view: View, unmasked: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        j = jnp.arange(view.z.shape[1], dtype=jnp.int32)[None]
        longer, growing, e = self.growing(view)
        room = self.maximum(view) - view.length
        p = jnp.where(view.free & (view.level > 0), jnp.exp(view.log_top), -1.0)
        block = view.block == view.current[:, None]
        unsure = block & (p >= 0) & (p < view.numbers["low"]) & ~unmasked & (view.level == view.process.num_levels)
        insert = unsure.any(axis=1) & ~growing & (e < view.numbers["eos_stop"]) & (room > 0)
        at = jnp.where(insert, jnp.argmin(jnp.where(unsure, p, jnp.inf), axis=1), -1).astype(jnp.int32)
        many = jnp.minimum(self.expand, room + 1)  # the last one fills what is left; nothing is pushed out
        length = jnp.where(growing, longer, view.length + jnp.where(insert, many - 1, 0))
        here = at[:, None]
        inserted = jnp.where(growing[:, None], (j >= view.length[:, None]) & (j < longer[:, None]),
                             (here >= 0) & (j >= here) & (j < here + many[:, None]))
        return length, insertion(at, many, view.z.shape[1]), inserted, growing

    def maximum(self, view: View) -> jax.Array:
        return jnp.minimum(view.numbers["maximum"], view.z.shape[1])

    def growing(self, view: View) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(length after growing at the end int32 [b], whether it grows bool [b], e float32 [b])."""
        opened, process, eos = view.free & (view.level > 0), view.process, jnp.asarray(view.numbers["eos"])
        says_eos = view.free & (view.z == eos)
        for j in range(process.num_levels):  # EOS and the clusters above it, the mask left out
            says_eos |= opened & (view.top == process.state_above(0, eos, j))
        e = eos_confidence(says_eos, jnp.where(opened, jnp.exp(view.log_top), 1.0), self.window)
        most = self.maximum(view)
        grows = (e < view.numbers["eos_grow"]) & (view.length < most) & (view.memory[PHASE] == 0)
        return jnp.where(grows, jnp.minimum(view.length + self.expand, most), view.length), grows, e
