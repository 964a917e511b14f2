"""Heads: hidden states -> predictions over tokens, never with all logits at once (docs/theory.md section 5).

`FlatHead` has one logit per token. `FactorisedHead` has p(cluster | h) p(token | cluster, h): a position costs the
clusters' logits and one block of tokens in place of all V. What training and evaluation sum over positions is computed
in pieces, at corrupted positions alone; in the factorised head a piece is some positions of one cluster.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from hdlm_jax.common import parallel
from hdlm_jax.common.parallel import WHOLE, OverBatch, Tree
from hdlm_jax.diffusion.draws import Number, categorical, draw_from, fold, is_off, wide
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.prediction import Bias, LogitsPrediction, Prediction, TripCount

TokenLoss: TypeAlias = Callable[..., Any]  # (prediction, fields [c], levels) -> arrays [c]


class Head(Protocol):
    """What turns hidden states [..., D] into predictions over tokens; its parameters are a tree of its own."""

    @property
    def hierarchy(self) -> Hierarchy: ...

    def init(self, key: jax.Array, width: int) -> Tree:
        """Parameters."""

    def start(self, kernel: jax.Array, bias: jax.Array, h: jax.Array | None = None) -> Tree:
        """Parameters from a vector [V, D] and a bias [V] for every token's logit.

        h: float32 [M, D], hidden vectors at which a head that cannot be the same is fitted to it.
        """

    def rows(self, params: Tree) -> tuple[jax.Array, jax.Array]:
        """The other way round, of a head that is flat; NotImplementedError where it is not."""

    def vectors(self, params: Tree) -> jax.Array:
        """What tokens can be clustered by: float32 [V, D], what h does to their logits."""

    def moved(self, params: Tree, there: Hierarchy) -> Tree:
        """Parameters from those of this head over another hierarchy of the same sizes."""

    def reordered(self, tree: Tree, there: Hierarchy) -> Tree:
        """What goes with such parameters number by number, in their new order."""

    def logits(self, params: Tree, h: jax.Array) -> jax.Array:
        """float32 [..., V]."""

    def predict(self, params: Tree, h: jax.Array) -> Prediction:
        """The prediction at h [..., D]."""

    def streams(self, level: jax.Array, x: jax.Array, needs: str) -> list:
        """Pieces that token losses are summed over (`sum_over_noised`)."""


NEVER = -1e6  # logit of what has no probability, in float32 or bfloat16
FIT_STEPS = 200  # of Adam, for prototypes that start from a flat head


def chunk_size() -> int:
    """Positions whose logits of all V tokens exist at once on a device."""
    return 128 if parallel.platform() == "cpu" else 2048


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(h: jax.Array, table: jax.Array, dtype: DTypeLike) -> jax.Array:
    """h [..., D] times table [R, D] -> float32 [..., R]; products in `dtype` both ways, sums in float32."""
    return jnp.einsum("...d,rd->...r", h.astype(dtype), table.astype(dtype), preferred_element_type=jnp.float32)


def _product_forward(h: jax.Array, table: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(h, table, dtype), (h, table)


def _product_backward(dtype: DTypeLike, saved: tuple[jax.Array, jax.Array], d_out: jax.Array) -> tuple[jax.Array,
                      jax.Array]:
    h, table = saved
    d_out = d_out.astype(dtype)
    d_h = jnp.einsum("...r,rd->...d", d_out, table.astype(dtype), preferred_element_type=jnp.float32)
    d_table = jnp.einsum("...r,...d->rd", d_out, h.astype(dtype), preferred_element_type=jnp.float32)
    return d_h.astype(h.dtype), d_table.astype(table.dtype)


product.defvjp(_product_forward, _product_backward)


def _affine(params: Tree, h: jax.Array, dtype: DTypeLike) -> jax.Array:
    return product(h, params["kernel"], dtype) + wide(params["bias"], h[..., 0])


def padded(rows: int) -> int:
    """Rows of a table, so that it shards and tiles: the next multiple of 128."""
    return -(-rows // 128) * 128


@dataclasses.dataclass(frozen=True, eq=False)
class FlatHead:
    """One logit per token (never mass on clusters, mask or padding). Parameters: kernel [rows, D], bias [rows]."""

    hierarchy: Hierarchy
    dtype: DTypeLike = jnp.float32
    softcap: float = 0.0  # c: logits are c tanh(logit / c); 0: as they are
    uses: ClassVar[tuple[str, ...]] = ("kernel", "bias")  # parameters that a prediction is made of

    def init(self, key: jax.Array, width: int) -> Tree:
        del key
        rows = padded(self.hierarchy.vocab_size)
        return {"kernel": jnp.zeros((rows, width)), "bias": jnp.zeros(rows)}

    def start(self, kernel: jax.Array, bias: jax.Array, h: jax.Array | None = None) -> Tree:
        extra = padded(len(bias)) - len(bias)
        return {"kernel": jnp.pad(kernel, ((0, extra), (0, 0))), "bias": jnp.pad(bias, (0, extra))}

    def rows(self, params: Tree) -> tuple[jax.Array, jax.Array]:
        v = self.hierarchy.vocab_size
        return params["kernel"][:v], params["bias"][:v]

    def vectors(self, params: Tree) -> jax.Array:
        return params["kernel"][: self.hierarchy.vocab_size].astype(jnp.float32)

    def moved(self, params: Tree, there: Hierarchy) -> Tree:
        return params

    def reordered(self, tree: Tree, there: Hierarchy) -> Tree:
        return tree

    def logits(self, params: Tree, h: jax.Array) -> jax.Array:
        """float32 [..., V]."""
        logits = product(h, params["kernel"], self.dtype)
        if self.softcap:  # before the bias: what has no probability keeps none
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        return (logits + wide(params["bias"], h[..., 0]))[..., : self.hierarchy.vocab_size]

    def predict(self, params: Tree, h: jax.Array) -> Prediction:
        return LogitsPrediction(self.logits(params, h), self.hierarchy)

    def streams(self, level: jax.Array, x: jax.Array, needs: str) -> list:
        return [_Chunks(level > 0, None, self.predict, self.uses)]


class Blocks:
    """The tokens' rows in a table in which every level-1 node is one block, and blocks of like size are neighbours.

    Attributes (numpy, int32):
      row [V]: of each token; word [rows]: the token of each row (0 in the padding behind the last block).
      start, size [n]: first row and number of tokens of each node; rank [n]: place of its block; node [n]: by place.
      classes: ((first place, last place + 1, width), ...): nodes whose blocks are read as so many rows.
    """

    def __init__(self, hierarchy: Hierarchy) -> None:
        self.size = np.asarray(hierarchy.token_count[1])
        anc, top = np.asarray(hierarchy.anc[1]), int(self.size.max())
        widths = np.array(sorted({-(-math.ceil(top / 2**i) // 8) * 8 for i in range(4)}))
        kind = np.searchsorted(widths, self.size)
        self.node = np.lexsort([np.arange(len(kind)), -kind]).astype(np.int32)  # the widest first
        self.rank = np.argsort(self.node).astype(np.int32)
        first = np.concatenate([[0], np.cumsum(self.size[self.node])])[:-1]
        self.start = first[self.rank].astype(np.int32)
        order = np.lexsort([np.arange(len(anc)), self.rank[anc]])
        self.row = np.argsort(order).astype(np.int32)
        self.rows = padded(max(len(anc), int((self.start + widths[kind]).max())))
        self.word = np.zeros(self.rows, np.int32)
        self.word[: len(anc)] = order
        ends = np.cumsum(np.bincount(kind, minlength=len(widths))[::-1])
        self.classes = [(int(a), int(b), int(w)) for a, b, w in
                        zip([0, *ends[:-1]], ends, widths[::-1], strict=True) if b > a]


@dataclasses.dataclass(frozen=True, eq=False)
class FactorisedHead:
    """p(x | h) = p(c(x) | h) p(x | c(x), h), c(x) the token's level-1 node, or of its hierarchy's `classes`.

    Parameters: words.kernel [rows, D] and words.bias [rows], block by block; clusters.kernel [n P, D] and
    clusters.bias [n P]: a node's logit is the log-sum-exp of its P `prototypes` (a flat head's is one over its tokens).
    """

    hierarchy: Hierarchy
    dtype: DTypeLike = jnp.float32
    prototypes: int = 1

    @property
    def own(self) -> Hierarchy:
        """The hierarchy whose level 1 are the head's classes."""
        return self.hierarchy.of_head

    @functools.cached_property
    def blocks(self) -> Blocks:
        return Blocks(self.own)

    def init(self, key: jax.Array, width: int) -> Tree:
        rows, n = self.blocks.rows, self.own.sizes[1] * self.prototypes
        # prototypes of a node must differ, or they never will
        spread = 0.0 if self.prototypes == 1 else 0.5 / math.sqrt(width)
        return {"words": {"kernel": jnp.zeros((rows, width)), "bias": jnp.zeros(rows)},
                "clusters": {"kernel": spread * jax.random.normal(key, (n, width)), "bias": jnp.zeros(n)}}

    def start(self, kernel: jax.Array, bias: jax.Array, h: jax.Array | None = None) -> Tree:
        """Each cluster's tokens are dealt to its prototypes: one has the mean of its tokens' vectors and, as its bias,
        the logarithm of their summed exponentials, so that at h = 0 clusters are as likely as their tokens were. Then
        the prototypes are fitted to the flat head's masses of clusters at h, if given."""
        blocks, (n, p) = self.blocks, (self.own.sizes[1], self.prototypes)
        words = {"kernel": jnp.zeros((blocks.rows, kernel.shape[1]), kernel.dtype).at[blocks.row].set(kernel),
                 "bias": jnp.zeros(blocks.rows).at[blocks.row].set(bias)}
        node = np.asarray(self.own.anc[1])
        part = jnp.asarray(node * p + (blocks.row - blocks.start[node]) % p)
        share = jax.ops.segment_sum(jnp.exp(bias), part, n * p)
        mean = jax.ops.segment_sum(jnp.exp(bias)[:, None] * kernel.astype(jnp.float32), part, n * p)
        some = share > 0  # a small cluster leaves prototypes without tokens: they stay out of it
        clusters = {"kernel": mean / jnp.where(some, share, 1.0)[:, None],
                    "bias": jnp.where(some, jnp.log(share), NEVER)}
        return {"words": words, "clusters": clusters if h is None else self._fitted(clusters, kernel, bias, h)}

    def _fitted(self, clusters: Tree, kernel: jax.Array, bias: jax.Array, h: jax.Array) -> Tree:
        """Prototypes whose p(node | h) is closest (mean KL over h [M, D]) to that of a flat head.

        Every device does all of it: it is little, and its many small steps would wait for each other.
        """
        flat = FlatHead(self.own, self.dtype)
        given, h = flat.start(kernel, bias), h[: len(h) // chunk_size() * chunk_size() or len(h)]
        chunks = parallel.whole(h).reshape(-1, min(len(h), chunk_size()), h.shape[-1])
        wanted = jax.lax.map(lambda part: flat.predict(given, part).log_masses(1), chunks).reshape(len(h), -1)
        h, wanted = parallel.whole((h, wanted))

        def cost(clusters: Tree) -> jax.Array:
            return -jnp.mean(jnp.sum(jnp.exp(wanted) * self.clusters({"clusters": clusters}, h).log_masses(1), axis=-1))

        tx = optax.adam(optax.cosine_decay_schedule(0.01, FIT_STEPS))

        def step(_: jax.Array, state: tuple[Tree, optax.OptState]) -> tuple[Tree, optax.OptState]:
            updates, kept = tx.update(jax.grad(cost)(state[0]), state[1])
            return parallel.whole((optax.apply_updates(state[0], updates), kept))

        return jax.lax.fori_loop(0, FIT_STEPS, step, parallel.whole((clusters, tx.init(clusters))))[0]

    def rows(self, params: Tree) -> tuple[jax.Array, jax.Array]:
        raise NotImplementedError("a factorised head has no vector for the logit of a token")

    def _offsets(self, params: Tree) -> tuple[jax.Array, jax.Array]:
        """Vectors [n, D] and biases [n] that make words' rows those of a flat head: log p(x | h) is the same at h = 0,
        and to first order in h up to what all tokens share."""
        n, p, node = self.own.sizes[1], self.prototypes, np.asarray(self.own.anc[1])
        kernel, bias = (params["words"][name][self.blocks.row].astype(jnp.float32) for name in ("kernel", "bias"))
        top = jax.ops.segment_max(bias, node, n)
        total = top + jnp.log(jax.ops.segment_sum(jnp.exp(bias - top[node]), node, n))
        mean = jax.ops.segment_sum(jnp.exp(bias - total[node])[:, None] * kernel, node, n)
        own, each = (params["clusters"][name].astype(jnp.float32).reshape(n, p, -1) for name in ("kernel", "bias"))
        return (jnp.sum(jax.nn.softmax(each, axis=1) * own, axis=1) - mean,
                jax.nn.logsumexp(each, axis=1)[:, 0] - total)

    def vectors(self, params: Tree) -> jax.Array:
        words = params["words"]["kernel"][self.blocks.row].astype(jnp.float32)
        return words + self._offsets(params)[0][np.asarray(self.own.anc[1])]

    def moved(self, params: Tree, there: Hierarchy) -> Tree:
        """A node's prototypes stay with it. A token that changes its node takes its row with it, less what the new
        node says and more what the old one said (`_offsets`); those that stay keep their p(x | c, h) among each other.
        """
        before, now = dataclasses.replace(self, hierarchy=there), self.reordered(params, there)
        was, node = np.asarray(before.own.anc[1]), np.asarray(self.own.anc[1])
        some = np.flatnonzero(was != node)
        more = dict(zip(("kernel", "bias"), before._offsets(params), strict=True))
        return now | {"words": {name: rows.at[self.blocks.row[some]].add((more[name][was] - more[name][node])[some])
                                for name, rows in now["words"].items()}}

    def reordered(self, tree: Tree, there: Hierarchy) -> Tree:
        old, new = Blocks(there.of_head), self.blocks
        put = lambda a: jnp.zeros((new.rows, *a.shape[1:]), a.dtype).at[new.row].set(a[old.row])  # noqa: E731
        return tree | {"words": jax.tree.map(put, tree["words"])}

    def clusters(self, params: Tree, h: jax.Array) -> LogitsPrediction:
        """p(node | h) of the level-1 nodes, from float32 logits [..., n]."""
        logits = _affine(params["clusters"], h, self.dtype)
        if self.prototypes > 1:
            logits = jax.nn.logsumexp(logits.reshape(*logits.shape[:-1], -1, self.prototypes), axis=-1)
        return LogitsPrediction(logits, self.own, level=1)

    def within(self, params: Tree, h: jax.Array) -> jax.Array:
        """log p(x | c(x), h) of every token: float32 [..., V]."""
        b, anc = self.blocks, np.asarray(self.own.anc[1])
        column = np.arange(int(b.size.max()))[None]
        index = np.minimum(b.start[:, None] + column, b.rows - 1)
        words = _affine(params["words"], h, self.dtype)[..., index]
        there = np.expand_dims(column < b.size[:, None], tuple(range(h.ndim - 1)))
        words = jax.nn.log_softmax(jnp.where(there, words, -jnp.inf), axis=-1)
        return words.reshape(*words.shape[:-2], -1)[..., anc * column.size + (b.row - b.start[anc])]

    def logits(self, params: Tree, h: jax.Array) -> jax.Array:
        """log p(x | h) of every token, put together from the two factors: float32 [..., V]."""
        return self.predict(params, h).log_probs()

    def predict(self, params: Tree, h: jax.Array) -> Prediction:
        return Factorised(self, params, h)

    def streams(self, level: jax.Array, x: jax.Array, needs: str) -> list:
        """Positions that need a token's probability, by cluster; then the rest, which need the clusters' alone. Those
        that need all tokens' have them put together, as in a flat head."""
        if needs == "tokens":
            return [_Chunks(level > 0, None, self.predict, ("words", "clusters"))]
        words = level > 0 if needs == "all" else level == 1
        node = jnp.asarray(self.own.anc[1])[x]
        tiles = _Tiles(self, words, node, None if needs == "all" else (1,), needs != "within")
        if needs == "all":
            return [tiles]
        above = tuple(range(2, self.hierarchy.num_levels + 1))
        return [tiles, _Chunks(level > 1, above, self.predict, ("clusters",))]


class Factorised:
    """Prediction of a FactorisedHead at hidden states [..., D] (see hdlm_jax.diffusion.process).

    block, start: log p(token | cluster) [..., width] in the one block that is asked about, and its first row; without
    them every token's is made when one is needed.
    """

    def __init__(self, head: FactorisedHead, params: Tree, h: jax.Array, block: jax.Array | None = None,
                 start: jax.Array | None = None) -> None:
        self.head, self.params, self.h, self.block = head, params, h, block
        self.start: Any = start
        self.clusters: Any = head.clusters(params, h) if "clusters" in params else None
        # levels of the head's own hierarchy that the process's does not have: its classes, where they are no states
        self.extra = head.own.num_levels - head.hierarchy.num_levels

    @property
    def logits(self) -> jax.Array:
        return self.log_probs()

    def select(self, index: jax.Array) -> Factorised:
        return Factorised(self.head, self.params, self.h.reshape(-1, self.h.shape[-1])[index])

    def tilted(self, bias: Bias) -> Factorised:
        """As LogitsPrediction.tilted; a bias that is one number within a cluster moves the clusters alone."""
        out = copy.copy(self)
        out.clusters = self.clusters.tilted(lambda anc: bias(lambda level: anc(level + self.extra)))
        return out

    def _node(self, x: jax.Array) -> jax.Array:
        return jnp.asarray(self.head.own.anc[1])[x]

    def log_probs(self) -> jax.Array:
        return self.head.within(self.params, self.h) + self.clusters.log_probs()[..., np.asarray(self.head.own.anc[1])]

    def log_within(self, x: jax.Array, level: int = 1) -> jax.Array:
        if level > 1:
            return self.clusters.log_within(self._node(x), level + self.extra)
        return self.log_prob(x) if self.extra else self._log_in_class(x)

    def _log_in_class(self, x: jax.Array) -> jax.Array:
        if self.block is None:
            return jnp.take_along_axis(self.head.within(self.params, self.h), x[..., None], axis=-1)[..., 0]
        place = jnp.clip(jnp.asarray(self.head.blocks.row)[x] - self.start, 0, self.block.shape[-1] - 1)
        return jnp.take_along_axis(self.block, place[..., None], axis=-1)[..., 0]

    def log_prob(self, x: jax.Array) -> jax.Array:
        return self.clusters.log_prob(self._node(x)) + self._log_in_class(x)

    def log_mass(self, level: int, node: jax.Array, outside: bool = False) -> jax.Array:
        return self.clusters.log_mass(level + self.extra, node, outside)

    def log_masses(self, level: int) -> jax.Array:
        return self.log_probs() if level == 0 else self.clusters.log_masses(level + self.extra)

    def draw(self, keys: jax.Array, wanted: jax.Array, temperature: Number = 1.0, top_p: Number = 1.0,
             sync_trip_count: TripCount = WHOLE.sync_trip_count) -> jax.Array:
        """As LogitsPrediction.draw: the node first, then a token of its block where one is wanted, else any of them."""
        if not (is_off(temperature) and is_off(top_p)):  # these act on tokens: put the tokens together
            return draw_from(keys, self.log_probs(), temperature, top_p)
        node = self.clusters.draw(fold(keys, 0), wanted)
        blocks, hidden, each = self.head.blocks, self.h.reshape(-1, self.h.shape[-1]), fold(keys, 1).reshape(-1)

        def words(rows: jax.Array, piece: Piece) -> jax.Array:
            prediction = piece.predict(piece.take(self.params), hidden[piece.index])
            drawn = prediction.start + categorical(each[piece.index], prediction.block)
            return rows.at[piece.index].add(jnp.where(piece.keep, drawn - rows[piece.index], 0))

        tiles = _Tiles(self.head, wanted.reshape(-1), node.reshape(-1), None, False)
        rows = tiles.loop(words, jnp.asarray(blocks.start)[node.reshape(-1)], sync_trip_count)
        return jnp.asarray(blocks.word)[rows].reshape(node.shape)


class At(NamedTuple):
    """A head waiting for the positions it is asked about."""

    head: Head
    params: Tree
    hidden: jax.Array  # [B, S, D]

    def select(self, index: jax.Array) -> Prediction:
        return self.head.predict(self.params, self.hidden.reshape(-1, self.hidden.shape[-1])[index])


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some tokens [c] that are worked on at once, and the part of a head's parameters they need.

    index, keep: int32 and bool [c], numbers of tokens, and which of them count. take(params) -> part;
    predict(part, h [c, D]) -> prediction; add(params, part) -> params with a part added where it was taken.
    """

    index: jax.Array
    keep: jax.Array
    take: Callable
    predict: Callable
    add: Callable


@dataclasses.dataclass(frozen=True, eq=False)
class _Chunks:
    """Wanted tokens [N], so many at a time that their logits fit; chunks without any are not visited."""

    wanted: jax.Array
    levels: tuple[int, ...] | None  # the levels they are of; None: any
    predict: Callable
    uses: tuple[str, ...]  # the parameters that have a part in it

    def loop(self, body: Callable[[Tree, Piece], Tree], carry: Tree, sync_trip_count: TripCount) -> Tree:
        """carry = body(carry, piece) for every piece; sync_trip_count: see parallel.OverBatch."""
        chunk = min(chunk_size(), self.wanted.size)
        order = jnp.pad(jnp.argsort(~self.wanted, stable=True), (0, chunk))
        count = jnp.sum(self.wanted)

        def take(params: Tree) -> Tree:
            return {name: params[name] for name in self.uses}

        def add(params: Tree, part: Tree) -> Tree:
            return params | {name: jax.tree.map(jnp.add, params[name], part[name]) for name in self.uses}

        def step(i: jax.Array, carry: Tree) -> Tree:
            index = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
            return body(carry, Piece(index, i * chunk + jnp.arange(chunk) < count, take, self.predict, add))

        return jax.lax.fori_loop(0, sync_trip_count((count + chunk - 1) // chunk), step, carry)


@dataclasses.dataclass(frozen=True, eq=False)
class _Tiles:
    """Wanted positions [N], some of one cluster at a time, with that cluster's block of tokens.

    Any number of tokens in any number of clusters: a tile has room for about an average cluster's tokens, a cluster
    takes as many tiles as it needs, and one without tokens takes none.
    """

    head: FactorisedHead
    wanted: jax.Array
    node: jax.Array  # int32 [N], whose block
    levels: tuple[int, ...] | None
    clusters: bool  # whether the prediction needs p(cluster) as well

    def loop(self, body: Callable[[Tree, Piece], Tree], carry: Tree, sync_trip_count: TripCount) -> Tree:
        """carry = body(carry, piece) for every piece; sync_trip_count: see parallel.OverBatch."""
        b, n = self.head.blocks, len(self.head.blocks.size)
        tile = min(max(8, 2 ** round(math.log2(max(self.wanted.size / 4 / n, 1)))), 512)
        place = jnp.where(self.wanted, jnp.asarray(b.rank)[self.node], n)
        order = jnp.pad(jnp.argsort(place, stable=True), (0, tile))
        first = jnp.searchsorted(jnp.sort(place), jnp.arange(n + 1))  # of each place's tokens in that order
        tiles = jnp.pad(jnp.cumsum((jnp.diff(first) + tile - 1) // tile), (1, 0))  # before each place
        most = self.wanted.size // tile + n  # tiles there can be
        place_of = jnp.searchsorted(tiles[1:], jnp.arange(most), side="right")
        starts, sizes = jnp.asarray(b.start[b.node]), jnp.asarray(b.size[b.node])
        rest = ("clusters",) if self.clusters else ()

        def step(width: int, low: int, high: int, i: jax.Array, carry: Tree) -> Tree:
            i = i + tiles[low]
            at = place_of[i]
            begin = first[at] + (i - tiles[at]) * tile
            index = jax.lax.dynamic_slice_in_dim(order, begin, tile)
            keep = (begin + jnp.arange(tile) < first[at + 1]) & (i < tiles[high])
            start, shown = starts[at], (jnp.arange(width) < sizes[at])[None]

            def take(params: Tree) -> Tree:
                block = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, width), params["words"])
                return {"words": block} | {name: params[name] for name in rest}

            def predict(part: Tree, h: jax.Array) -> Prediction:
                words = jnp.where(shown, _affine(part["words"], h, self.head.dtype), -jnp.inf)
                return Factorised(self.head, part, h, jax.nn.log_softmax(words, axis=-1), start)

            def add(params: Tree, part: Tree) -> Tree:
                new = jax.tree.map(jnp.add, take(params), part)
                put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
                return params | new | {"words": jax.tree.map(put, params["words"], new["words"])}

            return body(carry, Piece(index, keep, take, predict, add))

        for low, high, width in b.classes:
            count = sync_trip_count(tiles[high] - tiles[low])
            carry = jax.lax.fori_loop(0, count, functools.partial(step, width, low, high), carry)
        return carry


def _tokens(tree: Tree) -> Tree:
    """Leaves [B, S, ...] -> [B S, ...]."""
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), tree)


def sum_over_noised(head: Head, fn: TokenLoss, params: Tree, hidden: jax.Array, level: jax.Array, x: jax.Array,
                    fields: Tree, *, needs: str = "all", shard: OverBatch = WHOLE) -> tuple[jax.Array, jax.Array]:
    """fn at the noised tokens, without logits of all tokens at once: the sum of its loss, with gradients, and its aux.

    The loss is a sum, so its gradients are made piece by piece in the forward pass (a custom_vjp) and merely scaled
    in the backward one. What fn gives at tokens that are not noised (they fill up a piece) is dropped.

    Args:
      head: FlatHead or FactorisedHead; params: its parameters, what gradients are taken in beside hidden.
      fn: (prediction, fields [c], levels) -> (loss [c], aux [c]), both in nats; levels: those the tokens are of, None
        if any.
      hidden: float32 [B, S, D]; level, x: int32 [B, S], level of the state on show and the token; fields: pytree of
        [B, S].
      needs: what fn asks of a prediction: "within", log_within alone at level 1 and masses above; "word", anything
        about x at level 1; "all", anything about x at any level; "tokens", about all tokens.
      shard: what makes run(params, *rows) -> (sums, rows) work on every batch shard's own rows, the sums then summed
        (parallel.OverBatch): no token moves between devices, and gradients of parameters are summed once.

    Returns:
      (sum of loss, float32 scalar; aux of every token, float32 [B, S], zero where it is not noised); gradients flow
      through the first alone.
    """
    def pieces(params: Tree, hidden: jax.Array, level: jax.Array, x: jax.Array, fields: Tree, gradients: bool) -> tuple:
        shape, (hidden, level, x, fields) = hidden.shape, _tokens((hidden, level, x, fields))
        carry: Any = (jnp.float32(0), jnp.zeros(level.shape, jnp.float32))
        if gradients:
            carry += (jax.tree.map(jnp.zeros_like, params), jnp.zeros_like(hidden))
        for stream in head.streams(level, x, needs):

            def body(carry: Tree, piece: Piece, levels: tuple[int, ...] | None = stream.levels) -> Tree:
                some = jax.tree.map(lambda a: a[piece.index], fields)

                def sums(part: Tree, h: jax.Array) -> tuple[jax.Array, jax.Array]:
                    loss, aux = fn(piece.predict(part, h), some, levels)
                    return jnp.sum(jnp.where(piece.keep, loss, 0.0)), jnp.where(piece.keep, aux, 0.0)

                part, h = piece.take(params), hidden[piece.index]
                if not gradients:
                    more, aux = sums(part, h)
                    return carry[0] + more, carry[1].at[piece.index].add(aux)
                loss, each, d_params, d_hidden = carry
                (more, aux), (d_part, d_h) = jax.value_and_grad(sums, argnums=(0, 1), has_aux=True)(part, h)
                d_hidden = d_hidden.at[piece.index].add(jnp.where(piece.keep[:, None], d_h, 0.0))
                return loss + more, each.at[piece.index].add(aux), piece.add(d_params, d_part), d_hidden

            carry = stream.loop(body, carry, shard.sync_trip_count)
        loss, each, *found = carry
        each = each.reshape(shape[:2])
        return ((loss, found[0]), (each, found[1].reshape(shape))) if gradients else ((loss,), (each,))

    @jax.custom_vjp
    def total(params: Tree, hidden: jax.Array, level: jax.Array, x: jax.Array, fields: Tree) -> tuple[jax.Array,
              jax.Array]:
        (loss,), (aux,) = shard(functools.partial(pieces, gradients=False))(params, hidden, level, x, fields)
        return loss, aux

    def forward(params: Tree, hidden: jax.Array, level: jax.Array, x: jax.Array, fields: Tree) -> tuple:
        run = shard(functools.partial(pieces, gradients=True))
        (loss, d_params), (aux, d_hidden) = run(params, hidden, level, x, fields)
        return (loss, aux), (d_params, d_hidden)

    def backward(gradients: Tree, cotangent: tuple[jax.Array, jax.Array]) -> tuple:
        d_params, d_hidden = jax.tree.map(lambda g: g * cotangent[0], gradients)
        return d_params, d_hidden, None, None, None

    total.defvjp(forward, backward)
    return total(params, hidden, level, x, fields)


def map_over_noised(head: Head, fn: TokenLoss, params: Tree, hidden: jax.Array, level: jax.Array, x: jax.Array,
                    fields: Tree, *, needs: str = "all", shard: OverBatch = WHOLE) -> jax.Array:
    """fn(prediction, fields [c], levels) -> float32 [c] at every noised token, zero elsewhere: [B, S], no gradients.

    Arguments as in sum_over_noised.
    """
    both = lambda p, fields, levels: (jnp.float32(0), fn(p, fields, levels))  # noqa: E731
    return sum_over_noised(head, both, params, hidden, level, x, fields, needs=needs, shard=shard)[1]
