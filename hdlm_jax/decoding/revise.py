"""When to stop early, and what to remask: hooks for `Policy.commit` and `Policy.revise`.

A remasked token goes up to its cluster, or to what the canvas showed. Each class says in how many calls its rows end.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from hdlm_jax.decoding.choose import Even, Path, best, ranks, sum_before
from hdlm_jax.decoding.policy import Choice, Commit, Revise, View
from hdlm_jax.diffusion.draws import fold, wide
from hdlm_jax.diffusion.levels import open_uniform

_GAP = 1e3  # nats, where the second state has no probability at all


@dataclasses.dataclass(frozen=True)
class Gap(Commit):
    """Prophet (arXiv 2508.19982): commit a row once the mean over some tokens of log p(likeliest) - log p(second), of
    states one level down, reaches numbers["gap_early"], from .33 of the unmasking on "gap_middle", from .67 "gap_late".

    last: watch the last so many tokens of the row (where all are written the row commits); 0: the open tokens. stages:
      one level at a time, so that tokens are predicted given their clusters.
    """

    last: int = 0
    stages: bool = False
    needs = ("top",)

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
class Backtrack(Revise):
    """Saber's backtracking (arXiv 2510.18165), with quota `Running`: remask what has lost most confidence.

    A token's confidence when written is p(cluster) p(token | cluster), the product over its unmaskings; now it is the
    prediction's probability of its state (of="own"; "top", as released: at vocabulary tokens of the likeliest one).
    After a call that unmasked D tokens the max(1, floor(D / numbers["mu"])) older ones whose confidence fell most are
    remasked: to their cluster where the cluster's own confidence has not fallen, else to the top. mu = inf: none.

    Bound: all remasking of a call is cut to one level less than its unmasking, so a row takes at most S K calls.
    """

    of: str = "own"
    path: Path = Path()
    choices = {"of": ("own", "top")}

    @property
    def needs(self):  # type: ignore[override]
        return ("own", "token") if self.of == "top" else ("own",)

    def __call__(self, view: View, z, unmasked):
        process, here, top = view.process, view.level, view.process.level_of(view.canvas)
        level = wide(jnp.arange(1, process.num_levels + 1), here)
        on = (level > here[..., None]) & (level <= top[..., None])
        was = jnp.prod(jnp.where(on, view.memory["sure_at"], 1.0), axis=-1)
        was_up = jnp.prod(jnp.where(on & (level > here[..., None] + 1), view.memory["sure_at"], 1.0), axis=-1)
        now = view.log_own if self.of == "own" else jnp.where(here == 0, view.log_token, view.log_own)
        now = jnp.exp(now - jnp.where(top == here + 1, view.log_up, 0.0))  # the canvas itself is sure
        fall = was - now
        fell = view.free & (here < top) & ~unmasked & (fall > 0)
        wrote = jnp.sum(unmasked, axis=1)
        mu = view.numbers["mu"]
        many = jnp.where(jnp.isinf(mu), 0, jnp.maximum(1, wrote // mu)).astype(jnp.int32)
        steady = (jnp.exp(view.log_up) >= was_up) | (top == here + 1)
        climb = jnp.where(best(fall, fell, many), jnp.where(steady, 1, top - here), 0)
        below = process.level_of(z)
        room = jnp.sum(jnp.where(unmasked, here - below, 0), axis=1) - 1
        return below + jnp.clip(room[:, None] - sum_before(climb, ranks(fall, fell)), 0, climb)


@dataclasses.dataclass(frozen=True)
class Scheduled(Revise):
    """Every call writes all open tokens (give `Scored(quota=All(), straight=True)`; without straight each goes one
    level down, and the last ones take a call more), then remasks the lowest scores.

    After call d of T, n (T - d)/T (schedule="linear") or n cos(pi d / 2 T) ("cosine"), rounded down, of the block's n
    tokens are back at the top (to="mask"), or so many of its n levels are taken back (to="cluster"): first every token
    to its cluster, then the lowest scores further up. T is the block's share of numbers["steps"], at most n, so a row
    takes at most S K calls.

    by: "written", the probability of a token's last unmasking (RCR of MDPO, arXiv 2508.13148); "now", log p of the
      draws of this call, numbers["eta"] log p of tokens written before (self-planning P2, arXiv 2502.03540): at eta = 0
      new tokens are remasked first, at 1 all are equal, above 1 old ones are doubted more.
    """

    schedule: str = "linear"
    to: str = "mask"
    by: str = "written"
    steps: Even = Even()
    choices = {"schedule": ("linear", "cosine"), "to": ("mask", "cluster"), "by": ("written", "now")}

    @property
    def needs(self):  # type: ignore[override]
        return ("sure",) if self.by == "written" else ("own", "sure")

    def __call__(self, view: View, z, unmasked):
        done, count, _, whole = self.steps.clock(view, self.to == "mask")
        calls = jnp.minimum(self.steps.calls(view, count, whole), jnp.maximum(count, 1))
        left = jnp.maximum(calls - done - 1, 0)
        if self.schedule == "linear":
            count = count * left // calls
        else:
            count = jnp.floor(count * jnp.cos(jnp.pi / 2 * (1 - left / calls)) + 1e-4).astype(jnp.int32)
        here = view.free & (view.block == view.current[:, None])
        top = jnp.where(here, view.process.level_of(view.canvas), 0)
        score = view.sure
        if self.by == "now":
            own = jnp.where(view.numbers["eta"] > 0, view.numbers["eta"] * view.log_own, 0.0)
            score = jnp.where(unmasked, jnp.log(view.sure), own)
        if self.to == "mask":
            return jnp.where(best(-score, top > 0, count), top, 0)
        level = jnp.zeros(top.shape, jnp.int32)
        for k in range(1, view.process.num_levels + 1):
            up = best(-score, top >= k, count)
            level, count = level + up, count - jnp.sum(up, axis=1)
        return level


@dataclasses.dataclass(frozen=True)
class Remask(Choice, Revise):
    """ReMDM (arXiv 2503.00307) for any number of levels; to be given twice: Policy(choose=Remask(), revise=Remask()).

    With alpha = 1 - t, a step from t to s < t is the exact reverse step to s' < s, alpha_s' = alpha_s/(1 - sigma), then
    the forward chain from s' to s, as the process corrupts (at xi < 1 perhaps to another cluster): marginals are kept
    for every K and xi. For MDLM a token is masked with probability sigma and a mask unmasked with
    (alpha_s - (1 - sigma) alpha_t)/(1 - alpha_t), as in the paper. sigma is cut to 1 - alpha_s, where s' is 0.
    Call c of the numbers["steps"] begins at t = 1 - c/steps.

    kind: "cap", sigma = min(eta, limit); "rescale", eta limit; limit = (1 - alpha_s)/alpha_t, eta = numbers["eta"].
      "loop": alpha rises to numbers["alpha_on"] while t > numbers["t_on"], stays there, with sigma as in "cap", until
      numbers["t_off"], and rises to 1 after it; sigma is 0 outside of that window.

    With the true conditionals this converges to the data's distribution as steps grow if eta falls as 1/steps; at a
    fixed eta an error stays, as tokens remasked and written in one step are drawn independently.
    """

    kind: str = "cap"
    choices = {"kind": ("cap", "rescale", "loop")}
    jumps = True
    crosses = True

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
        """The chain's levels at s' and at s, int32 [b, S], drawn with the call's keys."""
        chain, was = view.process.chain, view.memory["climbed"]
        before, after, sigma = self.step(view.numbers, view.call)
        low, high = jnp.maximum(-jnp.log(jnp.minimum(after / (1 - sigma), 1.0)), 0.0), -jnp.log(before)
        kernels = chain.posterior(jnp.minimum(low, high), high), chain.transition(-jnp.log1p(-sigma))
        for i, kernel in enumerate(kernels):
            p = jnp.take_along_axis(kernel, was[..., None], axis=1)
            u = jax.vmap(open_uniform)(fold(view.keys, 10 + i).reshape(-1)).reshape(was.shape)
            edges = jnp.cumsum(p, axis=-1)
            new = jnp.sum(edges[..., :-1] <= u[..., None] * edges[..., -1:], axis=-1, dtype=jnp.int32)
            was = jnp.where((after < 1)[:, None], new, 0)
            if i == 0:
                reached = was
        return reached, was

    def time(self, view):
        return (1 - self.step(view.numbers, view.call)[0]).astype(jnp.float32)

    def target(self, view):
        return jnp.where(view.free, jnp.minimum(self.levels(view)[0], view.level), view.level)

    def __call__(self, view: View, z, unmasked):
        return jnp.minimum(self.levels(view)[1], view.process.level_of(view.canvas))

    def remember(self, view, z, unmasked):
        return {"climbed": self.levels(view)[1]}

    def bound(self, numbers, positions, levels):
        return numbers["steps"]

    def goes_on(self, numbers, call):
        return call < numbers["steps"]
