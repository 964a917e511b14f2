"""Which tokens drop in a turn: by a plan of the levels (blind, exact), or by a score of what the network says.

`Planned` draws all levels' reverse trajectory beforehand. `Scored` ranks the tokens that may drop by a score and takes
as many as a quota says. Either way a row drops at least one level in every turn.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.decoding.policy import Hook, View
from hdlm_jax.diffusion import plans
from hdlm_jax.diffusion.draws import fold, wide

_PLAN = 2**32 - 1  # what the keys of plans are folded with; turns use small numbers


class Choice(Hook):
    """What decides on drops. straight: they go to the word at once, from any level."""

    straight = False

    def stamp(self, view: View):
        """int32 [b], what a turn's random numbers are folded with: the row's call."""
        return view.call

    def time(self, view: View):
        """t that the network is told, float32 [b]: at which a token's expected level is the mean of the row's."""
        levels = jnp.sum(jnp.where(view.free, view.level, 0), axis=1) / jnp.maximum(jnp.sum(view.free, axis=1), 1)
        t, mean = _mean_level(view.process.chain)
        return jnp.interp(levels, jnp.asarray(mean), jnp.asarray(t)).astype(jnp.float32)

    def target(self, view: View):
        """Levels after the turn, int32 [b, S]."""
        raise NotImplementedError

    def bound(self, numbers: dict[str, Any], positions: int, levels: int):
        """Turns that a row takes at most."""
        return positions * levels

    def goes_on(self, numbers: dict[str, Any], call):
        """bool [b]: may the rows' tokens still climb, so that a turn is due even where all of them are words?"""
        return jnp.zeros(call.shape, bool)


@functools.cache
def _mean_level(chain) -> tuple[np.ndarray, np.ndarray]:
    """t [1001] and a token's expected level at them (increasing), float32."""
    t = np.linspace(0, 1, 1001)
    with np.errstate(divide="ignore"):
        beta = chain.beta(np.minimum(-np.log1p(-t), chain.tau_end), np)
    return t.astype(np.float32), (beta @ np.arange(chain.num_levels + 1)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Planned(Choice):
    """Drops at times of the chain itself, which do not look at content (hdlm_jax.diffusion.plans.plan).

    kind: "grid", the exact ancestral kernel on numbers["steps"] equal steps of t, of which a row visits those in which
    anything of it drops; "events", one drop a turn; "reveal", numbers["reveals"] drops a turn.
    """

    kind: str = "grid"
    jumps = True

    def memory(self, view):
        level = jnp.where(view.free, view.level, 0)
        return {"plan": plans.plan(fold(view.key, jnp.uint32(_PLAN)), view.process.chain, level, self.kind,
                                     view.numbers.get("steps", 1), view.numbers.get("reveals", 1))}

    def stamp(self, view):
        """The first call of the plan at which something has yet to drop."""
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
    def __call__(self, view: View):
        raise NotImplementedError


def settled(score):
    """Scores to 2^-14: those which differ by rounding alone are ties, but for the few at the edge of a cell, and ties
    go to the left. So another batch or device, which rounds otherwise, nearly always chooses alike."""
    return jnp.round(score * 2.0**14) / 2.0**14


@dataclasses.dataclass(frozen=True)
class Uniform(Score):
    """Any token as soon as any other, by numbers of the turn."""

    def __call__(self, view):
        keys = fold(view.keys, 7).reshape(-1)
        return jax.vmap(jax.random.uniform)(keys).reshape(view.z.shape)


@dataclasses.dataclass(frozen=True)
class Order(Score):
    """A fixed order of positions, each down to its word before the next one starts.

    kind: "left", from left to right; "random", any one, drawn per row: any-order autoregressive sampling (RADD,
    arXiv 2406.03736).
    """

    kind: str = "left"

    def __post_init__(self):
        if self.kind not in ("left", "random"):
            raise ValueError(f"order={self.kind!r}: choose left or random")

    def memory(self, view):
        rank = jnp.broadcast_to(jnp.arange(view.z.shape[1])[None], view.z.shape)
        if self.kind == "random":
            rank = jax.vmap(lambda key: jax.random.permutation(key, view.z.shape[1]))(fold(view.key, jnp.uint32(_PLAN)))
        return {"rank": rank.astype(jnp.int32)}

    def __call__(self, view):
        return -view.memory["rank"].astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class MaxProb(Score):
    """p of the likeliest symbol a token would drop to (MaskGIT, arXiv 2202.04200; LLaDA's low-confidence order)."""

    looks = ("top",)

    def __call__(self, view):
        return settled(jnp.exp(view.log_top))


@dataclasses.dataclass(frozen=True)
class Margin(Score):
    """p of the likeliest symbol less p of the second (Kim et al., arXiv 2502.06768; Dream's top-k margin)."""

    looks = ("top",)

    def __call__(self, view):
        return settled(jnp.exp(view.log_top) - jnp.exp(view.log_second))


@dataclasses.dataclass(frozen=True)
class Entropy(Score):
    """Less entropy, in nats, first (Dream, arXiv 2508.15487; dParallel, arXiv 2509.26488)."""

    looks = ("top",)

    def __call__(self, view):
        return settled(-view.entropy)


@dataclasses.dataclass(frozen=True)
class Drawn(Score):
    """p of the symbol that was drawn: of the order "draw_then_choose" alone (LLaDA at temperature 1). Not exact."""

    looks = ("top",)

    def __call__(self, view):
        return settled(jnp.exp(view.log_drawn))


@dataclasses.dataclass(frozen=True)
class Eos(Score):
    """A score, lowered where a token would end the text: EOSER (arXiv 2509.23924).

    The confidence of a token whose likeliest symbol (in the order "draw_then_choose": whose drawn one) is the word
    numbers["eos"], or that word's ancestor at the level it would drop to, is multiplied by g, which rises linearly
    from numbers["eos_least"] to 1 with the share of the drops that are done; a negative score is divided by it. Only
    the order changes, no symbol. With `doubling` the share is that of the doubling schedule, this call's included:
    (2^(k+1) - 1)/2^S at call k.
    """

    score: Score = MaxProb()
    doubling: Doubling | None = None
    looks = ("top",)

    def __call__(self, view):
        process, eos = view.process, jnp.asarray(view.numbers["eos"])
        here = view.top if view.drawn is None else view.drawn
        ends = jnp.zeros(view.z.shape, bool)
        for j in range(process.num_levels):
            ends |= here == process.symbol_above(0, eos, j)
        share = view.progress if self.doubling is None else self.doubling.share(view)
        least = view.numbers["eos_least"]
        g, score = (least + (1 - least) * share)[:, None], self.score(view)
        return jnp.where(ends, jnp.where(score >= 0, score * g, score / g), score)


@dataclasses.dataclass(frozen=True)
class History(Hook):
    """What the network said in a token's last calls at its level, for CCD (arXiv 2512.02044).

    depth: d, calls that count, the present one included; kept: m, symbols of each that are kept (as many as there are
    symbols: exact); by: "entropy" or "top", what confidence is. A call counts for the numbers["confident"] most
    confident of the tokens that stayed open in it. A token that drops or is raised starts anew.
    """

    depth: int = 3
    kept: int = 8
    by: str = "entropy"
    looks = ("top",)

    def __post_init__(self):
        if self.by not in ("entropy", "top") or self.depth < 1:
            raise ValueError(f"depth={self.depth}, by={self.by!r}: at least 1; choose entropy or top")

    @property
    def top_k(self):  # type: ignore[override]
        return self.kept

    def memory(self, view):
        shape = (*view.z.shape, self.depth - 1, self.kept)
        return {"past_ids": jnp.zeros(shape, jnp.int32), "past_p": jnp.zeros(shape, jnp.float32)}

    def confidence(self, view: View):
        return settled(-view.entropy if self.by == "entropy" else jnp.exp(view.log_top))

    def remember(self, view, z, dropped):
        inside = best(self.confidence(view), view.open & ~dropped, view.numbers["confident"])
        p = jnp.where(inside[..., None], jnp.exp(view.logs), 0.0)
        new = {}
        for name, now in (("past_ids", view.ids), ("past_p", p)):
            past = jnp.concatenate([now[:, :, None], view.memory[name]], axis=2)[:, :, : self.depth - 1]
            new[name] = jnp.where((dropped | (z != view.z))[..., None, None], 0, past)
        return new


@dataclasses.dataclass(frozen=True)
class Coherent(Score):
    """Confidence of pbar, the mean of a token's laws over its last calls (CCD, arXiv 2512.02044).

    A law averaged over contexts stands for the context's marginal: its entropy is the expected entropy plus the
    information that the context has of the token. What lies outside the m symbols kept counts as one symbol.
    """

    history: History = History()

    def __call__(self, view):
        if self.history.depth == 1:
            return self.history.confidence(view)
        flat = (*view.z.shape, -1)
        calls = 1 + jnp.sum(jnp.any(view.memory["past_p"] > 0, axis=-1), axis=-1)[..., None]
        ids = jnp.concatenate([view.ids, view.memory["past_ids"].reshape(flat)], axis=-1)
        p = jnp.concatenate([jnp.exp(view.logs), view.memory["past_p"].reshape(flat)], axis=-1) / calls
        mass = jnp.sum(jnp.where(ids[..., None] == ids[..., None, :], p[..., None, :], 0.0), axis=-1)  # pbar of each
        if self.history.by == "top":
            return settled(jnp.max(mass, axis=-1))
        rest = jnp.maximum(1 - jnp.sum(p, axis=-1), 0.0)
        inside = jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, mass, 1.0)), 0.0), axis=-1)
        return settled(inside + rest * jnp.log(jnp.where(rest > 0, rest, 1.0)))


# ---- quotas: which of the open tokens drop, bool [b, S], or by how much ----------------------------------------------


class Quota(Hook):
    """__call__(view, score [b, S], open bool [b, S]) -> chosen [b, S]: bool, or by how many levels they drop.

    Scored adds the best where none is.
    """

    def __call__(self, view: View, score, open_):
        raise NotImplementedError


def ranks(score, among):
    """Rank of each of `among` by falling score, ties from the left: int32 [b, S]; the others come behind."""
    order = jnp.argsort(jnp.where(among, -score, jnp.inf), axis=1, stable=True)
    return jnp.argsort(order, axis=1).astype(jnp.int32)


def best(score, among, count):
    """The `count` (int [b] or scalar) highest scores of `among`, ties from the left: bool [b, S]."""
    return (ranks(score, among) < jnp.broadcast_to(count, score.shape[:1])[:, None]) & among


@dataclasses.dataclass(frozen=True)
class Count(Quota):
    """numbers["count"] tokens a turn."""

    def __call__(self, view, score, open_):
        return best(score, open_, view.numbers["count"])


@dataclasses.dataclass(frozen=True)
class Even(Quota):
    """All drops in numbers["steps"] turns, as evenly as whole numbers go; blocks share the turns by their drops.

    A block takes at least one turn, and more where the last of its tokens have several levels to go: a token drops once
    a turn.
    """

    def memory(self, view):
        zero = jnp.zeros(view.z.shape[:1], jnp.int32)
        return {"in_block": zero, "of_block": zero - 1}

    def clock(self, view: View, straight: bool):
        """int32 [b] each: turns that the current block has had, its drops, those left of them, and those of a row.

        straight: count a token, not its levels.
        """
        count = lambda level: jnp.minimum(level, 1) if straight else level  # noqa: E731
        here = view.free & (view.block == view.current[:, None])
        left = jnp.sum(jnp.where(here, count(view.level), 0), axis=1)
        top = jnp.where(view.free, count(view.process.level_of(view.canvas)), 0)
        done = jnp.where(view.memory["of_block"] == view.current, view.memory["in_block"], 0)
        return done, jnp.sum(jnp.where(here, top, 0), axis=1), left, jnp.sum(top, axis=1)

    def turns(self, view: View, block, whole):
        """int32 [b], the block's share of numbers["steps"] turns."""
        return jnp.maximum(1, -(-view.numbers["steps"] * block // jnp.maximum(whole, 1)))

    def count(self, view: View):
        """Drops of this turn, int32 [b]."""
        done, block, left, whole = self.clock(view, view.straight)
        return -(-left // jnp.maximum(self.turns(view, block, whole) - done, 1))

    def __call__(self, view, score, open_):
        return best(score, open_, self.count(view))

    def remember(self, view, z, dropped):
        done = jnp.where(view.memory["of_block"] == view.current, view.memory["in_block"], 0)
        return {"in_block": done + 1, "of_block": view.current}


@dataclasses.dataclass(frozen=True)
class Doubling(Even):
    """2^k drops at call k, until as many or fewer are left: D drops in ceil(log2 D) calls, 2^S in S.

    ASS (arXiv 2509.23924), for levels: a word below the mask is K drops. Once more drops are due than tokens are open,
    the best of those further up go to the word at once. Every block starts anew.
    """

    jumps = True

    def share(self, view: View):
        """float32 [b], the block's drops that the schedule has done after this call."""
        done, block, _, _ = self.clock(view, view.straight)
        whole = jnp.left_shift(1, 32 - jax.lax.clz(jnp.maximum(block - 1, 1)))  # 2^S
        return jnp.minimum((jnp.left_shift(2, jnp.minimum(done, 29)) - 1) / whole, 1.0)

    def __call__(self, view, score, open_):
        done, block, left, _ = self.clock(view, view.straight)
        count = jnp.left_shift(1, jnp.minimum(done, 29))
        count = jnp.where(2 * count >= block, left, jnp.minimum(count, left))
        rank = ranks(score, open_)
        one = open_ & (rank < count[:, None])
        more = jnp.where(one, view.level - 1, 0)  # by which those that go to the word exceed one drop
        order = jnp.argsort(rank, axis=1)
        ordered = jnp.take_along_axis(more, order, axis=1)
        before = jnp.take_along_axis(jnp.cumsum(ordered, axis=1) - ordered, jnp.argsort(order, axis=1), axis=1)
        far = before < (count - jnp.sum(one, axis=1))[:, None]
        return jnp.where(one, jnp.where(far, view.level, 1), 0)


@dataclasses.dataclass(frozen=True)
class Consistent(Quota):
    """Tokens among the numbers["confident"] most confident ones now and in the call before, of one likeliest symbol in
    both (CCD-DS, arXiv 2512.02044). At a mask that is its cluster: it drops when the cluster is agreed on."""

    history: History = History()

    def __call__(self, view, score, open_):
        if self.history.depth == 1:
            return jnp.zeros(open_.shape, bool)
        now = best(self.history.confidence(view), open_, view.numbers["confident"])
        past_ids, past_p = (view.memory[name][:, :, 0] for name in ("past_ids", "past_p"))
        return now & jnp.any(past_p > 0, axis=-1) & (past_ids[..., 0] == view.ids[..., 0])


@dataclasses.dataclass(frozen=True)
class Path(Hook):
    """Memory sure_at float32 [b, S, K]: probability of a token's last drop below level k, 1 where it jumped over it."""

    looks = ("sure",)

    def memory(self, view):
        return {"sure_at": jnp.ones((*view.z.shape, view.process.num_levels), jnp.float32)}

    def remember(self, view, z, dropped):
        level, here = wide(jnp.arange(1, view.process.num_levels + 1), view.level), view.level[..., None]
        below = view.process.level_of(z)[..., None]
        new = jnp.where(level == here, view.sure[..., None], 1.0)
        return {"sure_at": jnp.where((level <= here) & (level > below), new, view.memory["sure_at"])}


@dataclasses.dataclass(frozen=True)
class Running(Quota):
    """All tokens whose score exceeds the mean probability with which those written from their level dropped from it
    (1 where none has), at least the numbers["least"] best: Saber's adaptive threshold (arXiv 2510.18165)."""

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
    """All tokens whose score reaches numbers["threshold"], at masks and upper levels numbers["threshold_cluster"].

    With the best one where none does: Fast-dLLM's parallel rule (arXiv 2505.22618). floor: a quota for such turns in
    place of the best one, as in Dimple's confident decoding (arXiv 2505.16990).
    """

    floor: Quota | None = None

    def __call__(self, view, score, open_):
        word = view.level == 1 if not view.straight else view.level > 0
        bar = jnp.where(word, view.numbers["threshold"], view.numbers["threshold_cluster"])
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

    def target(self, view):
        open_ = view.open
        score = self.score(view)
        drops = jnp.where(open_, self.quota(view, score, open_).astype(jnp.int32), 0)
        drops = jnp.where(jnp.any(drops > 0, axis=1, keepdims=True), drops, best(score, open_, 1).astype(jnp.int32))
        return jnp.where(drops > 0, 0 if self.straight else jnp.maximum(view.level - drops, 0), view.level)
