"""Which tokens are unmasked in a call.

`Planned` draws the reverse trajectory of the levels beforehand, without looking at content (exact). `Scored` ranks the
open tokens by a score of what the network predicts and takes as many as a quota says. Either way each call of a row
unmasks at least one token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hdlm_jax.decoding.policy import Choice, Hook, View
from hdlm_jax.diffusion import plans
from hdlm_jax.diffusion.draws import fold, wide
from hdlm_jax.models.block_lengths import LENGTHS

_PLAN = 2**32 - 1  # what the keys of plans are folded with; calls use small numbers


@dataclasses.dataclass(frozen=True)
class Planned(Choice):
    """Unmasking at the chain's own times (hdlm_jax.diffusion.plans.plan).

    kind: "grid", the exact ancestral kernel on numbers["steps"] equal steps of t, skipping those in which nothing of
    the row changes; "events", one level a call; "reveal", numbers["reveals"] levels a call.
    """

    kind: str = "grid"
    jumps = True
    random = True

    def memory(self, view):
        level = jnp.where(view.free, view.level, 0)
        return {"plan": plans.plan(fold(view.key, jnp.uint32(_PLAN)), view.process.chain, level, self.kind,
                                   view.numbers.get("steps", 1), view.numbers.get("reveals", 1))}

    def stamp(self, view):
        """The first call of the plan that still has something to do."""
        return view.memory["plan"].next(view.level)

    def time(self, view):
        return view.memory["plan"].time(self.stamp(view))

    def target(self, view):
        return jnp.where(view.free, jnp.minimum(view.memory["plan"].target(view.stamp), view.level), view.level)

    def bound(self, numbers, positions, levels):
        most = positions * levels
        if self.kind == "reveal":
            return -(-most // numbers["reveals"])
        return jnp.minimum(numbers["steps"], most) if self.kind == "grid" else most


# ---- scores: [b, S], the highest first ---------------------------------------------------------------------------


class Score(Hook):
    __call__: Callable[..., jax.Array]  # of a View


def settled(score):
    """Scores rounded to 2^-14, so that those which differ by float error are ties (which go to the left): another batch
    size or device then nearly always chooses alike."""
    return jnp.round(score * 2.0**14) / 2.0**14


@dataclasses.dataclass(frozen=True)
class Uniform(Score):
    """A random order, drawn anew in each call."""

    random = True

    def __call__(self, view):
        keys = fold(view.keys, 7).reshape(-1)
        return jax.vmap(jax.random.uniform)(keys).reshape(view.z.shape)


@dataclasses.dataclass(frozen=True)
class Order(Score):
    """A fixed order of positions, each unmasked down to its vocabulary token before the next one starts.

    order: "left", from left to right; "random", drawn per row (RADD, arXiv 2406.03736).
    """

    order: str = "left"
    choices = {"order": ("left", "random")}

    @property
    def random(self):  # type: ignore[override]
        return self.order == "random"

    def memory(self, view):
        rank = jnp.broadcast_to(jnp.arange(view.z.shape[1])[None], view.z.shape)
        if self.order == "random":
            rank = jax.vmap(lambda key: jax.random.permutation(key, view.z.shape[1]))(fold(view.key, jnp.uint32(_PLAN)))
        return {"rank": rank.astype(jnp.int32)}

    def __call__(self, view):
        return -view.memory["rank"].astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Learned(Score):
    """An order that the network's own head draws (DCoLT, arXiv 2505.10446; models.order): its scores and Gumbel noise,
    of which the n highest are n draws of Plackett-Luce, one after the other.

    memory turn int32 [b, S, K]: a token's turn in the call in which it left level k = 1..K.
    """

    needs = ("order",)
    random = True

    def __call__(self, view):
        keys = fold(view.keys, 7).reshape(-1)
        return view.order + jax.vmap(jax.random.gumbel)(keys).reshape(view.z.shape)

    def memory(self, view):
        return {"turn": jnp.zeros((*view.z.shape, view.process.num_levels), jnp.int32)}

    def remember(self, view, z, unmasked):
        k = wide(jnp.arange(1, view.process.num_levels + 1), view.level)
        now = (k <= view.level[..., None]) & (k > view.process.level_of(z)[..., None])
        return {"turn": jnp.where(now, ranks(self(view), view.open)[..., None], view.memory["turn"])}


@dataclasses.dataclass(frozen=True)
class Confidence(Score):
    """How sure the network is of a token's state one level down.

    by: "top", p of the likeliest state (MaskGIT, arXiv 2202.04200; LLaDA); "margin", that minus p of the second (Kim et
    al., arXiv 2502.06768; Dream's top-k margin); "entropy", negative, in nats (Dream, arXiv 2508.15487; dParallel,
    arXiv 2509.26488); "drawn", p of the drawn state, for order="draw_then_choose" (LLaDA at temperature 1; not exact).
    """

    by: str = "top"
    choices = {"by": ("top", "margin", "entropy", "drawn")}
    needs = ("top",)

    def __call__(self, view):
        return self.of(view.log_drawn if self.by == "drawn" else view.log_top, view.log_second, view.entropy)

    def of(self, log_top: jax.Array, log_second: jax.Array, entropy: jax.Array) -> jax.Array:
        """The score, of the shape of these fields of a View, or of `statistics` (nats)."""
        if self.by == "entropy":
            return settled(-entropy)
        return settled(jnp.exp(log_top) - jnp.exp(log_second) if self.by == "margin" else jnp.exp(log_top))


@dataclasses.dataclass(frozen=True)
class Eos(Score):
    """EOSER (arXiv 2509.23924): a score, lowered where a token would end the text.

    Where the likeliest state (order="draw_then_choose": the drawn one) is numbers["eos"] or an ancestor of it, a score
    >= 0 is multiplied by g, a negative one divided by g, which rises linearly from numbers["eos_least"] to 1 with the
    share of the unmasking that is done. doubling: the share is that of this schedule after the call, (2^(k+1) - 1)/2^S.
    """

    score: Score = Confidence()
    doubling: Doubling | None = None
    needs = ("top",)

    def __call__(self, view):
        process, eos = view.process, jnp.asarray(view.numbers["eos"])
        here = view.top if view.drawn is None else view.drawn
        ends = jnp.zeros(view.z.shape, bool)
        for j in range(process.num_levels):
            ends |= here == process.state_above(0, eos, j)
        share = view.progress if self.doubling is None else self.doubling.share(view)
        least = view.numbers["eos_least"]
        g, score = (least + (1 - least) * share)[:, None], self.score(view)
        return jnp.where(ends, jnp.where(score >= 0, score * g, score / g), score)


@dataclasses.dataclass(frozen=True)
class History(Hook):
    """Predictions for a token in its last calls at its level, for CCD (arXiv 2512.02044).

    depth: d, calls that count, this one included; kept: m, states kept of each (all of them: exact). A call counts for
    the numbers["confident"] tokens of least entropy that it left open. A token whose state changes starts anew.
    """

    depth: int = 3
    kept: int = 8
    needs = ("top",)

    def surest(self, view, among):
        return best(Confidence("entropy")(view), among, view.numbers["confident"])

    @property
    def top_k(self):  # type: ignore[override]
        return self.kept

    def memory(self, view):
        shape = (*view.z.shape, self.depth - 1, self.kept)
        return {"past_ids": jnp.zeros(shape, jnp.int32), "past_p": jnp.zeros(shape, jnp.float32)}

    def remember(self, view, z, unmasked):
        p = jnp.where(self.surest(view, view.open & ~unmasked)[..., None], jnp.exp(view.logs), 0.0)
        new = {}
        for name, now in (("past_ids", view.ids), ("past_p", p)):
            past = jnp.concatenate([now[:, :, None], view.memory[name]], axis=2)[:, :, : self.depth - 1]
            new[name] = jnp.where((unmasked | (z != view.z))[..., None, None], 0, past)
        return new


@dataclasses.dataclass(frozen=True)
class Coherent(Score):
    """Negative entropy of pbar, the mean of a token's distributions over its last calls (CCD, arXiv 2512.02044): the
    expected entropy plus the mutual information of token and context. Mass outside the m states kept is one state.
    """

    history: History = History()

    def __call__(self, view):
        if self.history.depth == 1:
            return Confidence("entropy")(view)
        flat = (*view.z.shape, -1)
        calls = 1 + jnp.sum(jnp.any(view.memory["past_p"] > 0, axis=-1), axis=-1)[..., None]
        ids = jnp.concatenate([view.ids, view.memory["past_ids"].reshape(flat)], axis=-1)
        p = jnp.concatenate([jnp.exp(view.logs), view.memory["past_p"].reshape(flat)], axis=-1) / calls
        mass = jnp.sum(jnp.where(ids[..., None] == ids[..., None, :], p[..., None, :], 0.0), axis=-1)  # pbar of each
        rest = jnp.maximum(1 - jnp.sum(p, axis=-1), 0.0)
        inside = jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, mass, 1.0)), 0.0), axis=-1)
        return settled(inside + rest * jnp.log(jnp.where(rest > 0, rest, 1.0)))


# ---- quotas: how many ------------------------------------------------------------------------------------------------


class Quota(Hook):
    """(view, score [b, S], open bool [b, S]) -> chosen [b, S]: bool, or by how many levels; none means the best one."""

    __call__: Callable[..., jax.Array]


def ranks(score, among):
    """Rank of each of `among` by falling score, ties from the left: int32 [b, S]; the others come after."""
    order = jnp.argsort(jnp.where(among, -score, jnp.inf), axis=1, stable=True)
    return jnp.argsort(order, axis=1).astype(jnp.int32)


def best(score, among, count):
    """The `count` (int [b] or scalar) highest scores of `among`, ties from the left: bool [b, S]."""
    return (ranks(score, among) < jnp.broadcast_to(count, score.shape[:1])[:, None]) & among


def sum_before(amount, rank):
    """Sum of amount [b, S] over the tokens of a lower rank."""
    ordered = jnp.take_along_axis(amount, jnp.argsort(rank, axis=1), axis=1)
    return jnp.take_along_axis(jnp.cumsum(ordered, axis=1) - ordered, rank, axis=1)


@dataclasses.dataclass(frozen=True)
class Count(Quota):
    """numbers["count"] tokens a call."""

    def __call__(self, view, score, open_):
        return best(score, open_, view.numbers["count"])


@dataclasses.dataclass(frozen=True)
class Even(Quota):
    """All in numbers["steps"] calls, as evenly as whole numbers go; blocks share the calls by their levels.

    A block takes at least one call, and more where its last tokens have several levels to go: one level a call.
    """

    def memory(self, view):
        zero = jnp.zeros(view.z.shape[:1], jnp.int32)
        return {"in_block": zero, "of_block": zero - 1}

    def clock(self, view: View, straight: bool):
        """int32 [b] each: calls the current block has had, its levels, those left of them, and the whole row's.

        straight: tokens in place of levels.
        """
        def count(level):
            return jnp.minimum(level, 1) if straight else level

        here = view.free & (view.block == view.current[:, None])
        left = jnp.sum(jnp.where(here, count(view.level), 0), axis=1)
        top = jnp.where(view.free, count(view.process.level_of(view.canvas)), 0)
        done = jnp.where(view.memory["of_block"] == view.current, view.memory["in_block"], 0)
        return done, jnp.sum(jnp.where(here, top, 0), axis=1), left, jnp.sum(top, axis=1)

    def calls(self, view: View, block, whole):
        """int32 [b], the block's share of numbers["steps"] calls."""
        return jnp.maximum(1, -(-view.numbers["steps"] * block // jnp.maximum(whole, 1)))

    def __call__(self, view, score, open_):
        done, block, left, whole = self.clock(view, view.straight)
        return best(score, open_, -(-left // jnp.maximum(self.calls(view, block, whole) - done, 1)))

    def remember(self, view, z, unmasked):
        done = jnp.where(view.memory["of_block"] == view.current, view.memory["in_block"], 0)
        return {"in_block": done + 1, "of_block": view.current}


@dataclasses.dataclass(frozen=True)
class DrawnBlocks(Quota):
    """Blocks from left to right, each of a length that a head of the network draws in the call in which it begins
    (CtrlDiff, arXiv 2505.14455; models.block_lengths) and written in numbers["calls"] calls, as evenly as whole numbers
    go: the longer the block, the fewer calls a token. Only where its tokens have more levels to go does it take more.

    memory length int32 [b, C]: index of the length drawn in each call, -1 where a block went on; end int32 [b]: free
    tokens up to the end of the block; in_block int32 [b]: calls that it has had.
    """

    needs = ("block_lengths",)
    random = True

    def memory(self, view):
        zero = jnp.zeros(view.z.shape[:1], jnp.int32)
        most = view.z.shape[1] * view.process.num_levels
        return {"length": jnp.full((len(view.z), most), -1, jnp.int32), "end": zero, "in_block": zero}

    def clock(self, view: View):
        """int32 [b] each: index of the length drawn in this call or -1, end of the block, calls it has had; and rank
        int32 [b, S] of free tokens from the left."""
        rank = jnp.cumsum(view.free, axis=1, dtype=jnp.int32) - 1
        first = jnp.min(jnp.where(view.free & (view.level > 0), rank, view.z.shape[1]), axis=1)
        begins = first >= view.memory["end"]
        keys = fold(view.key, jnp.uint32(_PLAN))
        drawn = jax.vmap(jax.random.categorical)(keys, view.block_lengths).astype(jnp.int32)
        end = jnp.where(begins, first + jnp.asarray(LENGTHS)[drawn], view.memory["end"])
        return jnp.where(begins, drawn, -1), end, jnp.where(begins, 0, view.memory["in_block"]), rank

    def __call__(self, view, score, open_):
        _, end, done, rank = self.clock(view)
        here = open_ & (rank < end[:, None])
        left = jnp.sum(jnp.where(here, view.level, 0), axis=1)
        return best(score, here, -(-left // jnp.maximum(view.numbers["calls"] - done, 1)))

    def remember(self, view, z, unmasked):
        drawn, end, done, _ = self.clock(view)
        every = view.memory["length"].at[jnp.arange(len(drawn)), view.call].set(drawn)
        return {"length": every, "end": end, "in_block": done + 1}


@dataclasses.dataclass(frozen=True)
class Doubling(Even):
    """ASS (arXiv 2509.23924): 2^k levels at call k, until as many or fewer are left; every block starts anew.

    D levels take ceil(log2 D) calls. Where more levels are due than tokens are open, the best of those further up go to
    the vocabulary at once.
    """

    jumps = True

    def share(self, view: View):
        """float32 [b], share of the block's levels that the schedule has done after this call."""
        done, block, _, _ = self.clock(view, view.straight)
        whole = jnp.left_shift(1, 32 - jax.lax.clz(jnp.maximum(block - 1, 1)))  # 2^S
        return jnp.minimum((jnp.left_shift(2, jnp.minimum(done, 29)) - 1) / whole, 1.0)

    def __call__(self, view, score, open_):
        done, block, left, _ = self.clock(view, view.straight)
        count = jnp.left_shift(1, jnp.minimum(done, 29))
        count = jnp.where(2 * count >= block, left, jnp.minimum(count, left))
        rank = ranks(score, open_)
        one = open_ & (rank < count[:, None])
        more = jnp.where(one, view.level - 1, 0)  # levels beyond the first, of those that go to the vocabulary
        far = sum_before(more, rank) < (count - jnp.sum(one, axis=1))[:, None]
        return jnp.where(one, jnp.where(far, view.level, 1), 0)


@dataclasses.dataclass(frozen=True)
class Consistent(Quota):
    """CCD-DS (arXiv 2512.02044): tokens among the numbers["confident"] most confident now and in the call before, with
    the same likeliest state in both (at a mask its cluster)."""

    history: History = History()

    def __call__(self, view, score, open_):
        if self.history.depth == 1:
            return jnp.zeros(open_.shape, bool)
        now = self.history.surest(view, open_)
        past_ids, past_p = (view.memory[name][:, :, 0] for name in ("past_ids", "past_p"))
        return now & jnp.any(past_p > 0, axis=-1) & (past_ids[..., 0] == view.ids[..., 0])


@dataclasses.dataclass(frozen=True)
class Path(Hook):
    """Memory sure_at float32 [b, S, K]: probability of a token's last unmasking from level k, 1 where it skipped k."""

    needs = ("sure",)

    def memory(self, view):
        return {"sure_at": jnp.ones((*view.z.shape, view.process.num_levels), jnp.float32)}

    def remember(self, view, z, unmasked):
        level, here = wide(jnp.arange(1, view.process.num_levels + 1), view.level), view.level[..., None]
        below = view.process.level_of(z)[..., None]
        new = jnp.where(level == here, view.sure[..., None], 1.0)
        return {"sure_at": jnp.where((level <= here) & (level > below), new, view.memory["sure_at"])}


@dataclasses.dataclass(frozen=True)
class Running(Quota):
    """Saber's adaptive threshold (arXiv 2510.18165): all tokens whose score exceeds the mean probability of the
    unmaskings from their level so far (1 where there are none), at least the numbers["least"] best."""

    path: Path = Path()

    def __call__(self, view, score, open_):
        process = view.process
        level = wide(jnp.arange(1, process.num_levels + 1), view.level)
        kept = (view.free & view.active)[..., None] & (view.level[..., None] < level)
        kept &= process.level_of(view.canvas)[..., None] >= level
        count = jnp.sum(kept, axis=1)
        mean = jnp.sum(jnp.where(kept, view.memory["sure_at"], 0.0), axis=1) / jnp.maximum(count, 1)
        bar = jnp.take_along_axis(jnp.where(count > 0, mean, 1.0), jnp.maximum(view.level - 1, 0), axis=1)
        sure, least = open_ & (score > bar), view.numbers["least"]
        enough = jnp.sum(sure, axis=1, keepdims=True) >= least
        return jnp.where(enough, sure, best(score, open_, least))


@dataclasses.dataclass(frozen=True)
class Above(Quota):
    """Fast-dLLM's parallel rule (arXiv 2505.22618): all tokens whose score reaches numbers["threshold"], above level 1
    numbers["threshold_cluster"]; the best where none does.

    floor: a quota in place of the best one, as in Dimple's confident decoding (arXiv 2505.16990).
    """

    floor: Quota | None = None

    def __call__(self, view, score, open_):
        last = view.level == 1 if not view.straight else view.level > 0
        bar = jnp.where(last, view.numbers["threshold"], view.numbers["threshold_cluster"])
        sure = open_ & (score >= bar)
        if self.floor is None:
            return sure
        return jnp.where(jnp.any(sure, axis=1, keepdims=True), sure, self.floor(view, score, open_))


@dataclasses.dataclass(frozen=True)
class Factor(Quota):
    """The most tokens n, best first, for which (n + 1)(1 - p of the n-th) < numbers["factor"] (Fast-dLLM)."""

    def __call__(self, view, score, open_):
        rank = ranks(score, open_)
        ordered = jnp.take_along_axis(jnp.where(open_, score, -jnp.inf), jnp.argsort(rank, axis=1), axis=1)
        number = jnp.arange(1, score.shape[1] + 1)[None]
        fits = (number + 1) * (1 - ordered) < view.numbers["factor"]
        return best(score, open_, jnp.max(jnp.where(fits, number, 0), axis=1))


@dataclasses.dataclass(frozen=True)
class All(Quota):
    """Every open token."""

    def __call__(self, view, score, open_):
        return open_


@dataclasses.dataclass(frozen=True)
class Scored(Choice):
    """Tokens of the current block by score, as many as the quota takes and at least one."""

    score: Score = Uniform()
    quota: Quota = Even()
    straight: bool = False
    scored = True

    def target(self, view):
        open_ = view.open
        score = self.score(view)
        down = jnp.where(open_, self.quota(view, score, open_).astype(jnp.int32), 0)
        down = jnp.where(jnp.any(down > 0, axis=1, keepdims=True), down, best(score, open_, 1).astype(jnp.int32))
        return jnp.where(down > 0, 0 if self.straight else jnp.maximum(view.level - down, 0), view.level)
