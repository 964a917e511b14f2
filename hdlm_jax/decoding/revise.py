"""When to stop early, and what to take back: hooks for `Policy.commit` and `Policy.revise`.

A revised token climbs: to its cluster, or up to what the canvas showed there. Each class proves that its rows end with
all words written, and within how many calls.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from hdlm_jax.decoding.choose import Choice, Even, Path, best, ranks
from hdlm_jax.decoding.policy import Hook, View
from hdlm_jax.diffusion.draws import fold, wide
from hdlm_jax.diffusion.levels import open_uniform

_GAP = 1e3  # nats; a second symbol of no probability at all is this far behind


@dataclasses.dataclass(frozen=True)
class Gap(Hook):
    """Commit a row once the mean of log p(likeliest) - log p(second) over the tokens watched reaches a bar: Prophet
    (arXiv 2508.19982). A gap of log-probabilities is one of logits.

    The bar is numbers["gap_early"] until a third of the drops is done (.33), numbers["gap_middle"] until two thirds
    (.67), then numbers["gap_late"]: 7.5, 5.0 and 2.5 in the paper; at inf it is never reached. The gap is that of the
    symbols a level below: clusters at masks.

    last: watch the last so many tokens of the row, of any block (where all of them are words the row commits); 0: the
      open tokens of the current block.
    stages: on commit each token drops a single level, so that words are asked for once their clusters are settled.
    """

    last: int = 0
    stages: bool = False
    looks = ("top",)

    def __call__(self, view: View):
        watched = view.open
        if self.last:
            tail = jnp.arange(view.z.shape[1])[None] >= view.length[:, None] - self.last
            watched = view.free & (view.level > 0) & tail
        gap = jnp.where(watched, jnp.minimum(view.log_top - view.log_second, _GAP), 0.0)
        count = jnp.sum(watched, axis=1)
        gap = jnp.where(count > 0, jnp.sum(gap, axis=1) / jnp.maximum(count, 1), _GAP)
        early, middle, late = (view.numbers[f"gap_{part}"] for part in ("early", "middle", "late"))
        bar = jnp.where(view.progress < 0.33, early, jnp.where(view.progress < 0.67, middle, late))
        return gap >= bar


@dataclasses.dataclass(frozen=True)
class Backtrack(Hook):
    """Take back what has lost most confidence since it was written: Saber (arXiv 2510.18165), with quota `Running`.

    A token's confidence when written is the product of its drops' probabilities, p(cluster) p(word | cluster); now it
    is f's probability of the symbol on show (of="own"; "top", the release's choice: of the likeliest word, at words).
    After a turn that wrote D tokens the mu_t = max(1, floor(D / numbers["mu"])) ones climb that fell most, if they fell
    at all (numbers["mu"] = inf: none): to their cluster where its own mass has not fallen since, else to the top.
    What was written in this very turn has not fallen yet.

    Bound: all climbs of a turn together stay one level below its drops, the last one cut short where need be, so each
    turn nets at least one level and a row takes at most S K of them.
    """

    of: str = "own"
    path: Path = Path()

    def __post_init__(self):
        if self.of not in ("own", "top"):
            raise ValueError(f"of={self.of!r}: choose own or top")

    @property
    def looks(self):  # type: ignore[override]
        return ("own", "word") if self.of == "top" else ("own",)

    def __call__(self, view: View, z, dropped):
        process, here, top = view.process, view.level, view.process.level_of(view.canvas)
        level = wide(jnp.arange(1, process.num_levels + 1), here)
        on = (level > here[..., None]) & (level <= top[..., None])
        was = jnp.prod(jnp.where(on, view.memory["sure_at"], 1.0), axis=-1)
        was_up = jnp.prod(jnp.where(on & (level > here[..., None] + 1), view.memory["sure_at"], 1.0), axis=-1)
        now = view.log_own if self.of == "own" else jnp.where(here == 0, view.log_word, view.log_own)
        now = jnp.exp(now - jnp.where(top == here + 1, view.log_up, 0.0))  # the canvas itself is sure
        fall = was - now
        fell = view.free & (here < top) & ~dropped & (fall > 0)
        wrote = jnp.sum(dropped, axis=1)
        mu = view.numbers["mu"]
        many = jnp.where(jnp.isinf(mu), 0, jnp.maximum(1, wrote // mu)).astype(jnp.int32)
        steady = (jnp.exp(view.log_up) >= was_up) | (top == here + 1)
        climb = jnp.where(best(fall, fell, many), jnp.where(steady, 1, top - here), 0)
        rank = ranks(fall, fell)
        order = jnp.argsort(rank, axis=1)
        ordered = jnp.take_along_axis(climb, order, axis=1)
        before = jnp.take_along_axis(jnp.cumsum(ordered, axis=1) - ordered, rank, axis=1)
        below = process.level_of(z)
        room = jnp.sum(jnp.where(dropped, here - below, 0), axis=1) - 1
        return below + jnp.clip(room[:, None] - before, 0, climb)


@dataclasses.dataclass(frozen=True)
class Scheduled(Hook):
    """Every turn writes all open tokens of the block, then the worst of the block climb to a scheduled count.

    For `Scored(quota=All(), straight=True)`. After turn d of T, n (T - d)/T (schedule="linear") or n cos(pi d / 2 T)
    ("cosine") of the block's n tokens, rounded down, are back at the top (to="mask"), or (to="cluster") so many of
    its n levels are taken: first every token to its cluster, the worst further up.
    T is the block's share of numbers["steps"], at most n.

    Bound: the count is 0 after turn T <= n at the latest, and blocks do not touch each other, so a row takes
    sum n <= S K turns at most; exactly T a block if the schedule reaches 0 only there (linear: always).
    """

    schedule: str = "linear"
    to: str = "mask"
    turns: Even = Even()
    looks = ("sure",)

    def __post_init__(self):
        if self.schedule not in ("linear", "cosine") or self.to not in ("mask", "cluster"):
            raise ValueError(f"schedule={self.schedule!r}, to={self.to!r}: choose linear or cosine, mask or cluster")

    def score(self, view: View, dropped):
        """float32 [b, S]; the lowest climb."""
        raise NotImplementedError

    def __call__(self, view: View, z, dropped):
        done, count, _, whole = self.turns.clock(view, self.to == "mask")
        turns = jnp.minimum(self.turns.turns(view, count, whole), jnp.maximum(count, 1))
        left = jnp.maximum(turns - done - 1, 0)
        if self.schedule == "linear":
            count = count * left // turns
        else:
            count = jnp.floor(count * jnp.cos(jnp.pi / 2 * (1 - left / turns)) + 1e-4).astype(jnp.int32)
        here = view.free & (view.block == view.current[:, None])
        top = jnp.where(here, view.process.level_of(view.canvas), 0)
        score = self.score(view, dropped)
        if self.to == "mask":
            return jnp.where(best(-score, top > 0, count), top, 0)
        level = jnp.zeros(top.shape, jnp.int32)
        for k in range(1, view.process.num_levels + 1):
            up = best(-score, top >= k, count)
            level, count = level + up, count - jnp.sum(up, axis=1)
        return level


@dataclasses.dataclass(frozen=True)
class RunningConfidence(Scheduled):
    """RCR, running confidence remasking of MDPO (arXiv 2508.13148): the lowest confidences at the last writing climb,
    whenever that was. See Scheduled."""

    def score(self, view, dropped):
        return view.sure


@dataclasses.dataclass(frozen=True)
class PathPlanning(Scheduled):
    """P2 in its self-planning form (arXiv 2502.03540): the network's own probabilities now decide. See Scheduled.

    A token just written counts with log p of what was drawn there, one that was a word before with
    eta log p of the word on show, eta = numbers["eta"] >= 0. As in the paper eta grows with how much is revised: at 0
    no word is ever taken back while another can be, at 1 all are equal, above 1 words on show are doubted more than new
    ones.
    """

    looks = ("own", "sure")  # type: ignore[assignment]

    def score(self, view, dropped):
        own = jnp.where(view.numbers["eta"] > 0, view.numbers["eta"] * view.log_own, 0.0)
        return jnp.where(dropped, jnp.log(view.sure), own)


@dataclasses.dataclass(frozen=True)
class Remask(Choice):
    """ReMDM (arXiv 2503.00307): some of what is written climbs again, and the marginals stay. To be given twice:
    Policy(choose=Remask(), revise=Remask()).

    A step from t to s < t (alpha = 1 - t; noise time tau = -log alpha) is the exact reverse step from t to an s' below
    s, then the forward chain from s' to s, with alpha_s' = alpha_s/(1 - sigma). Given a word x, z_t ~ q_t(. | x)
    becomes q_s' and then q_s: marginals are kept for every K and xi. For MDLM (r = 1) a word on show becomes a mask
    with probability 1 - alpha_s/alpha_s' = sigma, and a mask a word with

        (alpha_s' - alpha_t)/(1 - alpha_t) (1 - sigma) = (alpha_s - (1 - sigma) alpha_t)/(1 - alpha_t),

    the two lines of the paper's posterior. It takes alpha_s' <= 1, so sigma <= 1 - alpha_s; the paper's own limit,
    (1 - alpha_s)/alpha_t, is wider: beyond ours there is no process in between, and sigma is cut to it.
    Words climb as the process does (xi < 1: by a first crossing of their own); a token whose canvas is a cluster stays
    there in place of going higher.

    kind: sigma = min(eta, max) ("cap"), eta max ("rescale"), max the paper's limit, eta = numbers["eta"]; "loop":
      alpha rises to numbers["alpha_on"] while t > numbers["t_on"], stays there, with sigma as in cap, until
      numbers["t_off"], and rises to 1 after it, sigma being 0 outside of that window.

    The true conditionals give the data's law as steps grow if eta falls as 1/steps; at a fixed eta the words that climb
    and are written anew in one step keep an error, as in any step that writes several.

    Bound: numbers["steps"] calls exactly, call c from t = 1 - c/steps on; the last ends at tau = 0, all words.
    """

    kind: str = "cap"
    jumps = True
    crosses = True

    def __post_init__(self):
        if self.kind not in ("cap", "rescale", "loop"):
            raise ValueError(f"kind={self.kind!r}: choose cap, rescale or loop")

    def memory(self, view):
        return {"climbed": jnp.full(view.z.shape, view.process.num_levels, jnp.int32)}

    def step(self, numbers, call):
        """alpha_t, alpha_s and sigma of call number `call`, float32 of its shape."""
        # 1 - t, exactly 0 and 1 at the ends, which a quotient need not be
        before, after = (jnp.where(c < numbers["steps"], c / numbers["steps"], 1.0) for c in (call, call + 1))
        on, eta = True, numbers["eta"]
        if self.kind == "loop":
            t_on, t_off, high = (numbers[name] for name in ("t_on", "t_off", "alpha_on"))

            def alpha(x):
                late = 1 - (1 - x) * (1 - high) / t_off
                return jnp.where(1 - x > t_on, x * high / (1 - t_on), jnp.where(1 - x > t_off, high, late))

            on, before, after = (1 - before <= t_on) & (1 - before > t_off), alpha(before), alpha(after)
        most = jnp.minimum(1.0, (1 - after) / jnp.maximum(before, 1e-9))
        sigma = eta * most if self.kind == "rescale" else jnp.minimum(eta, most)
        return before, after, jnp.where(on, jnp.minimum(sigma, 1 - after), 0.0)

    def levels(self, view: View):
        """The chain's levels at s' and at s, int32 [b, S], drawn with the turn's keys."""
        chain, was = view.process.chain, view.memory["climbed"]
        before, after, sigma = self.step(view.numbers, view.call)
        low, high = jnp.maximum(-jnp.log(jnp.minimum(after / (1 - sigma), 1.0)), 0.0), -jnp.log(before)
        laws = chain.posterior(jnp.minimum(low, high), high), chain.transition(-jnp.log1p(-sigma))
        for i, law in enumerate(laws):
            law = jnp.take_along_axis(law, was[..., None], axis=1)
            u = jax.vmap(open_uniform)(fold(view.keys, 10 + i).reshape(-1)).reshape(was.shape)
            edges = jnp.cumsum(law, axis=-1)
            new = jnp.sum(edges[..., :-1] <= u[..., None] * edges[..., -1:], axis=-1, dtype=jnp.int32)
            was = jnp.where((after < 1)[:, None], new, 0)
            if i == 0:
                reached = was
        return reached, was

    def time(self, view):
        return (1 - self.step(view.numbers, view.call)[0]).astype(jnp.float32)

    def target(self, view):
        return jnp.where(view.free, jnp.minimum(self.levels(view)[0], view.level), view.level)

    def __call__(self, view: View, z, dropped):
        return jnp.minimum(self.levels(view)[1], view.process.level_of(view.canvas))

    def remember(self, view, z, dropped):
        return {"climbed": self.levels(view)[1]}

    def bound(self, numbers, positions, levels):
        return numbers["steps"]

    def goes_on(self, numbers, call):
        return call < numbers["steps"]
