"""What a training step shows of its texts, and at which weights their tokens count: train.objective (docs/training.md).

Every objective but its draws is the same loss, a sum of weight times cost over the tokens of a `View`, and every one
estimates the same: the bound of docs/theory.md section 3, with the weights that diffusion.weighting puts in its place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp

from hdlm_jax.config import Config
from hdlm_jax.diffusion.draws import fold
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.levels import LevelChain, open_uniform
from hdlm_jax.diffusion.process import Process


class View(NamedTuple):
    """States of some rows and what their tokens count for.

    z: int32 [b, S]; level: int32 [b, S], at which a position is scored, 0: it costs nothing; t: float32 [b], what the
    network is told; tau: float32 [b, S], noise times; weight, bound: float32 [b, S], of a token's cost in the loss, and
    in an unbiased estimate of the NELBO.
    """

    z: jax.Array
    level: jax.Array
    t: jax.Array
    tau: jax.Array
    weight: jax.Array
    bound: jax.Array


class _Rows(NamedTuple):
    """Texts [b, S] to draw states of: key and stratum (of so many) of each row; second: it is a pair's second one."""

    keys: jax.Array
    place: jax.Array
    strata: int
    second: jax.Array
    x: jax.Array
    score: jax.Array


Drawn: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # z, level, tau [b], weights of the bound


def stratified_tau(keys: jax.Array, index: jax.Array, batch: int) -> jax.Array:
    """Noise times [b] of rows `index` of a batch: t = (index + u)/batch uniform, one stratum a row, in (0, 1)."""
    return _tau(*_stratum(keys, index, batch))


def _stratum(keys: jax.Array, index: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
    """t and 1 - t, formed by itself so that neither end of time is cut off or rounded."""
    u = jax.vmap(open_uniform)(keys)
    i = index.astype(jnp.float32)
    return (i + u) / batch, ((batch - 1 - i) + (1 - u)) / batch


def _tau(t: jax.Array, rest: jax.Array) -> jax.Array:
    return jnp.where(t < 0.5, -jnp.log1p(-t), -jnp.log(rest))


def opened(keys: jax.Array, share: jax.Array | None, seq_len: int, segment: jax.Array | None) -> jax.Array | None:
    """bool [b, S, S]: tokens see those before them, and of those behind a random `share` [b] (arXiv 2410.17891); None:
    the segments as they are."""
    if share is None:
        return segment
    behind = jax.vmap(lambda key, p: jax.random.uniform(key, (seq_len, seq_len)) < p)(keys, share)
    seen = behind | jnp.tri(seq_len, dtype=bool)[None]
    return seen if segment is None else seen & (segment[:, :, None] == segment[:, None])


# ---- draws -----------------------------------------------------------------------------------------------------------


def _at_times(process: Process, rows: _Rows) -> Drawn:
    """nelbo, rate (RADD's, arXiv 2406.03736): all of a row at one noise time, t uniform."""
    tau = stratified_tau(fold(rows.keys, 0), rows.place, rows.strata)
    z, level = process.noised(fold(rows.keys, 1), rows.x, tau, rows.score)
    return z, level, tau, process.nelbo_weight(z, tau, rows.x) * jnp.exp(tau)[:, None]


def _complementary(process: HierarchicalProcess, rows: _Rows) -> Drawn:
    """Two rows of one text: uniforms u of the crossing times and t in the first one, 1 - u and 1 - t in the second.

    Each row by itself has the law of `_at_times`. With a single level their masks are each other's complement.
    """
    t, rest = _stratum(fold(rows.keys, 0), rows.place, rows.strata)
    tau = jnp.where(rows.second, _tau(rest, t), _tau(t, rest))
    keys, shape = fold(rows.keys, 1), (rows.x.shape[1], process.num_levels)
    u = jax.vmap(lambda key: open_uniform(key, shape))(fold(keys, 0))
    times = process.chain.times_of(jnp.where(rows.second[:, None, None], 1 - u, u))
    level = jnp.where(rows.score, jnp.sum(times <= tau[:, None, None], axis=-1), 0)
    z = process.shown(keys, rows.x, level)
    return z, level, tau, process.nelbo_weight(z, tau) * jnp.exp(tau)[:, None]


def crossing(place: jax.Array, u: jax.Array, strata: int, levels: int, tokens: jax.Array
             ) -> tuple[jax.Array, jax.Array]:
    """(k in 0..levels-1, r in 0..n-1), int32 [b]: a crossing into level k + 1, the r-th of the row's n `tokens` [b].

    Uniform over all K n of a row, one stratum of the batch a row: place in 0..strata-1, u in (0, 1), [b].
    """
    at = (place + u) / strata * levels
    k = jnp.minimum(at.astype(jnp.int32), levels - 1)
    return k, jnp.clip(((at - k) * tokens).astype(jnp.int32), 0, jnp.maximum(tokens - 1, 0))


def after(chain: LevelChain, times: jax.Array, k: jax.Array, r: jax.Array, score: jax.Array, alone: bool = False
          ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The moment after the r-th crossing into level k + 1: (tau [b], level int32 [b, S], weights [b, S]).

    The bound is the cost of undoing every crossing of a text, each at the states just after it (docs/theory.md section
    3): K n of them, one of which is drawn. Any token that is noised then may be the one that has just crossed, with a
    chance in proportion to w of its level at tau, and gets that share of the weight K n. alone: the token that did
    cross gets all of it.

    Args:
      times: float32 [b, S, K], crossing times. k, r: as `crossing` gives them. score: bool [b, S], tokens that cross.
    """
    count, levels = jnp.sum(score, axis=-1), times.shape[-1]
    into = jnp.where(score, jnp.take_along_axis(times, k[:, None, None], axis=-1)[..., 0], jnp.inf)
    who = jnp.take_along_axis(jnp.argsort(into, axis=-1), r[:, None], axis=-1)
    tau = jnp.where(count > 0, jnp.take_along_axis(into, who, axis=-1)[:, 0], 1.0)
    level = jnp.where(score, jnp.sum(times <= tau[:, None, None], axis=-1), 0)
    chance = jnp.take_along_axis(jnp.pad(chain.weight(tau), ((0, 0), (1, 0))), level, axis=-1)
    if alone:
        chance = jnp.where(score & (jnp.arange(score.shape[1])[None] == who), 1.0, 0.0)
    whole = jnp.sum(chance, axis=-1, keepdims=True)
    return tau, level, levels * count[:, None] * chance / jnp.where(whole > 0, whole, 1.0)


def _at_crossings(alone: bool, process: HierarchicalProcess, rows: _Rows, own: jax.Array | None = None) -> Drawn:
    """count (RADD's k-DCE, for any K), any_order (arXiv 2110.02037): at a crossing, levels and ranks of a batch's rows
    in strata; own: keys [b] of clusters."""
    u, keys = jax.vmap(open_uniform)(fold(rows.keys, 0)), fold(rows.keys, 1)
    k, r = crossing(rows.place, u, rows.strata, process.num_levels, jnp.sum(rows.score, axis=-1))
    times = jax.vmap(lambda key: process.chain.crossing_times(key, rows.x.shape[1:]))(fold(keys, 0))
    tau, level, bound = after(process.chain, times, k, r, rows.score, alone)
    scored = jnp.where(bound > 0, level, 0) if alone else level
    return process.shown(keys if own is None else own, rows.x, level), scored, tau, bound


def _paired(process: HierarchicalProcess, rows: _Rows) -> Drawn:
    """Two rows of one text at the same crossing, as count draws it, whose tokens go to clusters drawn for each row."""
    own = fold(rows.keys, 5 + rows.second)
    return _at_crossings(False, process, rows, own)


_DRAWS: dict[str, Callable[[HierarchicalProcess, _Rows], Drawn]] = {
    "nelbo": _at_times, "rate": _at_times, "complementary": _complementary,
    "count": functools.partial(_at_crossings, False), "any_order": functools.partial(_at_crossings, True),
    "paired": _paired}


def _blocks(rows: _Rows, block: int) -> _Rows:
    """The rows' blocks as rows of their own: each has a noise time or crossing to itself.

    Those at one place of the rows take a stratum each, as rows do; those of one row lie far apart.
    """
    each = jnp.arange(rows.x.shape[1] // block)[None]
    shape = (len(rows.x), each.size)
    keys = fold(jnp.broadcast_to(rows.keys[:, None], shape), 4 + each)
    place = (rows.place[:, None] + each * rows.strata // each.size) % rows.strata
    second = jnp.broadcast_to(rows.second[:, None], shape)
    return _Rows(keys.reshape(-1), place.reshape(-1), rows.strata, second.reshape(-1), rows.x.reshape(-1, block),
                 rows.score.reshape(-1, block))


# ---- a step's view ---------------------------------------------------------------------------------------------------


def make_view(config: Config, process: Process) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array], View]:
    """view(key, index, x, score) -> View of train.objective, for rows `index` int32 [b] of the batch.

    x: int32 [b, S], score: bool [b, S]. Each row draws from fold_in(key, index) alone, the two of a pair from
    fold_in(key, index // 2). With model.block each block of a row is drawn as a row would be; t is then 0, as the
    network is not told.
    """
    d, objective, partners = config.diffusion, config.train.objective, config.train.partners
    draw = functools.partial(_DRAWS[objective], cast(HierarchicalProcess, process))  # nelbo's takes any process
    strata, block = config.train.batch_size // partners, config.model.block

    def weight(z: jax.Array, level: jax.Array, tau: jax.Array, x: jax.Array, bound: jax.Array) -> jax.Array:
        """Of the loss: diffusion.weighting's over the density of the draw.

        At a crossing that is sum w / (K n) over the tokens scored, and as the bound's weights are w over it, it comes
        from their sums: a token whose w is 0 in float32 has its part of other losses.
        """
        loss = process.loss_weight(z, tau, d.weighting, d.weight_min, d.weight_max, x=x)
        if objective in ("nelbo", "rate", "complementary"):
            return loss
        if d.weighting == "none":
            return bound
        own = jnp.where(level > 0, process.nelbo_weight(z, tau, x) * jnp.exp(tau)[:, None], 0.0)
        parts, whole = (jnp.sum(a, axis=-1, keepdims=True) for a in (bound, own))
        return jnp.where(level > 0, loss * parts / jnp.where(whole > 0, whole, 1.0), 0.0)

    def drawn(rows: _Rows) -> View:
        z, level, tau, bound = draw(rows)
        return View(z, level, -jnp.expm1(-tau), jnp.broadcast_to(tau[:, None], z.shape),
                    weight(z, level, tau, rows.x, bound), bound)

    def view(key: jax.Array, index: jax.Array, x: jax.Array, score: jax.Array) -> View:
        place = index // partners
        rows = _Rows(fold(jnp.broadcast_to(key, index.shape), place), place, strata, index % partners == 1, x, score)
        if not block:
            return drawn(rows)
        found = drawn(_blocks(rows, block))
        return View(*(a if a.ndim == 1 else a.reshape(x.shape) for a in found))._replace(t=jnp.zeros(len(x)))

    return view
