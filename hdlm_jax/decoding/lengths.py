"""Canvases that grow while they are written: DAEDAL (arXiv 2508.00819), as a function of arrays with the rows first.

A row has S places and a length; growing is a gather along an index map, so the loop keeps its shapes. First the canvas
grows at its end until the network expects the end of the text (EOS) there; then, while it is written, the place the
network is least sure of becomes several masks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from hdlm_jax.decoding.policy import Hook

PHASE = "daedal_phase"  # name in the loop's memory


def eos_confidence(says_eos, probability, window: int):
    """e of DAEDAL: the summed probabilities of the last `window` tokens that say EOS, over `window`: float32 [b].

    says_eos: bool [b, S], where EOS is the most likely; probability: float [b, S], of it. Few such tokens make a small
    e, whatever their confidence: the window is never shortened.
    """
    from_the_end = jnp.cumsum(says_eos[:, ::-1], axis=1)[:, ::-1]
    return jnp.sum(jnp.where(says_eos & (from_the_end <= window), probability, 0.0), axis=1) / window


def grow(e, length, maximum, expand: int, threshold=0.5):
    """DAEDAL's first phase: (new length int32 [b], growing bool [b]), `expand` more tokens while e < threshold.

    e: float [b], see `eos_confidence`; length: int32 [b]; maximum: int or int32 [b], most tokens of a row.
    """
    growing = (e < threshold) & (length < maximum)
    return jnp.where(growing, jnp.minimum(length + expand, maximum), length), growing


def insertion(at, expand, length, places: int):
    """DAEDAL's second phase: place `at` int32 [b] becomes `expand` places (int or int32 [b]); -1: nothing does.

    Returns:
      (src int32 [b, S], new length int32 [b]): the row after is the row before at src, src(j) = j up to `at`, `at` for
      the copies, j - expand + 1 behind them. What is pushed over S = `places` is lost: keep length + expand - 1 <= S.
    """
    j = jnp.arange(places, dtype=jnp.int32)[None]
    at, more = at[:, None], jnp.broadcast_to(jnp.where(at >= 0, jnp.asarray(expand) - 1, 0), at.shape)[:, None]
    src = jnp.where(j <= at, j, jnp.maximum(j - more, at))
    return src, length + more[:, 0]


def gather(array, src):
    """array [b, S, ...] along an index map src int32 [b, S]."""
    return jnp.take_along_axis(array, src.reshape(*src.shape, *(1,) * (array.ndim - 2)), axis=1)


@dataclasses.dataclass(frozen=True)
class Daedal(Hook):
    """DAEDAL's rule of lengths (arXiv 2508.00819), for any number of levels.

    EOS is read off a token as the symbol it would drop to: the word itself, or its cluster where clusters come next
    (give EOS a cluster of its own: other members count as EOS too). An EOS that is written counts with probability 1.
    Only masks are taken apart, and none that is written in the same call: what is decided stays.

    `numbers`: eos, word id of the end of text; maximum, most tokens of a row, prompt and all (and at most as many as
    there are places); eos_grow (.5 in the paper), eos_stop (.9) and low (.1): e below eos_grow grows, below eos_stop
    allows insertions, at p < low.

    Args:
      expand: E, masks that one place becomes.   window: W, see `eos_confidence`.
    """

    expand: int = 8
    window: int = 32
    looks = ("top",)
    whole = True

    def __post_init__(self):
        for name, least in (("expand", 2), ("window", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")

    def memory(self, view) -> dict[str, Any]:
        """The phase int32 [b]: 0 growing, 1 writing."""
        return {PHASE: jnp.zeros(len(view.z), jnp.int32)}

    def remember(self, view, z, dropped) -> dict[str, Any]:
        """A row that has stopped growing at its end never does so again."""
        return {PHASE: jnp.where(self._grow(view)[1], 0, 1).astype(jnp.int32)}

    def __call__(self, view, dropped):
        """What one call does to the rows' lengths; dropped bool [b, S]: tokens that are written in it.

        Returns:
          new_length int32 [b]; src int32 [b, S], see `insertion`; inserted bool [b, S], places (after the gather) that
          show the mask; hold bool [b], rows that grow at their end and drop nothing in this call.
        """
        places = view.z.shape[1]
        j = jnp.arange(places, dtype=jnp.int32)[None]
        length, (longer, growing, e) = self._length(view), self._grow(view)
        room = self._most(view) - length
        p = jnp.where(self._open(view), jnp.exp(view.log_top), -1.0)
        block = view.block == view.current[:, None]
        unsure = block & (p >= 0) & (p < view.numbers["low"]) & ~dropped & (view.level == view.process.num_levels)
        insert = unsure.any(axis=1) & ~growing & (e < view.numbers["eos_stop"]) & (room > 0)
        at = jnp.where(insert, jnp.argmin(jnp.where(unsure, p, jnp.inf), axis=1), -1).astype(jnp.int32)
        many = jnp.minimum(self.expand, room + 1)  # the last one fills what is left; nothing is pushed out
        src, wider = insertion(at, many, length, places)
        here, many = at[:, None], many[:, None]
        inserted = jnp.where(growing[:, None], (j >= length[:, None]) & (j < longer[:, None]),
                             (here >= 0) & (j >= here) & (j < here + many))
        return jnp.where(growing, longer, wider), src, inserted, growing

    def _length(self, view):
        return jnp.sum(view.active, axis=1, dtype=jnp.int32)

    def _most(self, view):
        return jnp.minimum(view.numbers["maximum"], view.z.shape[1])

    def _open(self, view):
        """Tokens that are written here and are no words yet."""
        return view.active & ~view.given & (view.level > 0)

    def _grow(self, view):
        """(new length, growing, e), all [b]."""
        opened, process, eos = self._open(view), view.process, jnp.asarray(view.numbers["eos"])
        says_eos = view.active & ~view.given & (view.z == eos)
        for j in range(process.num_levels):  # EOS and the clusters above it, the mask left out
            says_eos |= opened & (view.top == process.symbol_above(0, eos, j))
        e = eos_confidence(says_eos, jnp.where(opened, jnp.exp(view.log_top), 1.0), self.window)
        longer, growing = grow(e, self._length(view), self._most(view), self.expand, view.numbers["eos_grow"])
        growing &= view.memory[PHASE] == 0
        return jnp.where(growing, longer, self._length(view)), growing, e
