"""Several steps in one turn: drafts that the model itself verifies, and drafts that an autoregressive model reads.

`FreeDave` (arXiv 2510.00294) writes what one step a call would have written, in fewer calls. `Guided` (FlashDLM's
Guided Diffusion, arXiv 2505.21467) lets an autoregressive model say how much of a whole draft stays.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hdlm_jax.decoding.loop import Loop
from hdlm_jax.decoding.policy import Hook, State, View

MATCHES = ("exact", "subset")
CHECKS = ("deterministic", "top_k", "threshold", "relative")
_SEEN = ("top", "log_top", "log_second", "entropy", "word", "log_word", "log_own", "log_up", "ids", "logs")


class _Of:
    """A prediction at b k rows, of which every row of b looks at its own one: select(index into b S)."""

    def __init__(self, prediction, row, many: int, positions: int):
        self.prediction, self.row, self.many, self.positions = prediction, row, many, positions

    def select(self, index):
        row, position = index // self.positions, index % self.positions
        return self.prediction.select((row * self.many + self.row[row]) * self.positions + position)


@dataclasses.dataclass(frozen=True)
class FreeDave(Hook):
    """`verify`: drafts of the next steps, made of statistics that are at hand, checked in one call of `drafts` rows.

    A step is what the policy does in a turn: its choice, its draw, its commit. After a call the steps that follow are
    tried on the same prediction, and the states they lead to are drafts; the next call is asked about the state and
    its drafts together. A step on a state's own prediction that ends in a draft, any of them, needs no call: that draft
    was asked about already. With a token a step these are the authors' top-j drafts, with thresholds FreeDave++'s. A
    token that fell to its cluster in a draft falls on by the words that the old prediction has under it.

    Symbols are those of a policy without drafts, for every choice, memory and draw: random numbers depend on a row's
    step and the token alone, not on the call. In no more calls, but each of `drafts` rows, which stats count: latency
    is saved, not work. Two conditions. A network's numbers must not depend on the rows they are computed among: where
    they do, in the last bit, what is nearly tied may fall otherwise (equal scores go from the left, equal symbols to
    the first, either way). And a denoiser's cache must be exact, as it never sees the calls that are saved.

    Args:
      drafts: rows of a call, >= 1 (1: no drafts); the authors use 4.
      match: "exact"; or "subset", FreeDave++'s rule: a draft counts if all that it has written is part of the step's
        result, and goes on from it: fewer calls with thresholds, and other text, as the rest is decided anew.
    """

    drafts: int = 4
    match: str = "exact"

    def __post_init__(self):
        if self.drafts < 1:
            raise ValueError(f"drafts={self.drafts}: need at least 1")
        if self.match not in MATCHES:
            raise ValueError(f"match={self.match!r}: choose one of {', '.join(MATCHES)}")

    @property
    def width(self) -> int:
        return self.drafts

    def memory(self, view):
        """drafts: the state and what may follow it; shown: what the network was asked about before; step, wrote: what
        call and changed are without drafts."""
        return {"drafts": jnp.repeat(view.z[:, None], self.drafts, axis=1), "shown": view.z,
                "step": jnp.zeros_like(view.call), "wrote": jnp.zeros_like(view.given)}

    def __call__(self, loop: Loop, cache, s: State):
        """One call: (symbols, probability of each token's last drop, memory, cache)."""
        (rows, positions), k, memory = s.z.shape, self.drafts, s.memory
        each, axis = jnp.repeat(jnp.arange(rows), k), loop.denoise.rows_axis
        s = s._replace(film=())
        many = jax.tree.map(lambda a: a[each], s)
        many = many._replace(z=memory["drafts"].reshape(rows * k, positions))
        many = many._replace(changed=many.z != many.memory["shown"])
        view = loop.view(many)
        rest = view.free & (view.level > 0)  # drafts may lead into the next block
        wide_cache = jax.tree.map(lambda a: jnp.take(a, each, axis=axis), cache)
        prediction, wide_cache = loop.ask(wide_cache, view.rows(loop.wanted(view) | rest))
        first = _Of(prediction, each[::k], k, positions)
        stats = jax.eval_shape(lambda: _stats(loop.look(loop.view(s), first, s.given)))
        stats = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), stats)
        carry = (s, s, each[::k] * 0, jnp.full_like(s.z, -1), stats, jnp.ones(rows, bool), s.z, memory["drafts"])
        carry = jax.lax.fori_loop(0, 2 * k - 1, lambda i, carry: self._next(
            i, loop, prediction, memory["drafts"], *carry), carry)
        _, s, row, _, _, _, shown, drafts = carry
        cache = jax.tree.map(lambda a: jnp.take(a, jnp.arange(rows) * k + row, axis=axis), wide_cache)
        return s.z, s.sure, s.memory | {"drafts": drafts, "shown": shown}, cache

    def _next(self, i, loop: Loop, prediction, drafts, s: State, done: State, row, held, stats, live, shown, made):
        """The i-th step: the first `drafts` of them verify, and lead to `done`; the others make drafts from there.

        row [b]: the draft whose prediction counts; live [b]: whether it speaks of s; shown: that draft; made: new ones.
        """
        k, before, verify = self.drafts, s.z, i < self.drafts
        live |= ~verify
        held = jnp.where((live & verify)[:, None], -1, held)
        s, held, stats = self._step(loop, _Of(prediction, row, k, s.z.shape[1]), s, held, stats, live)
        fits = drafts == s.z[:, None]
        if self.match == "subset":
            fits |= drafts == before[:, None]
        later = (jnp.arange(k)[None] > row[:, None]) & jnp.any(drafts != before[:, None], axis=-1)
        fits = jnp.all(fits, axis=-1) & later & verify
        last = k - 1 - jnp.argmax(fits[:, ::-1], axis=1)
        reached = jnp.take_along_axis(drafts, last[:, None, None], axis=1)[:, 0]
        shown = jnp.where((live & verify)[:, None], before, shown)
        goes = live & jnp.any(fits, axis=1) & jnp.any(loop.process.level_of(reached) > 0, axis=1)
        if self.match == "subset":
            s = s._replace(z=jnp.where(goes[:, None], reached, s.z))
        done = jax.tree.map(lambda a, b: jnp.where(verify, a, b), s, done)
        made = made.at[:, jnp.maximum(i - k + 1, 0)].set(s.z)
        return s, done, jnp.where(goes, last, row), held, stats, goes, shown, made

    def _step(self, loop: Loop, prediction, s: State, held, stats, live):
        """A step of the rows that are live; held int32 [b, S]: the symbols of which `stats` speak, -1: of none."""
        at = s._replace(call=s.memory["step"], changed=s.memory["wrote"])
        view = loop.view(at)
        wanted, on = loop.wanted(view), live[:, None]
        fresh = on & wanted & (held != view.z)
        kept = ~on | (wanted & ~fresh)
        new = _stats(loop.look(view, prediction, fresh))
        stats = {n: jnp.where(_like(kept, a), stats[n], a) for n, a in new.items()}
        held = jnp.where(on, jnp.where(wanted, view.z, -1), held)
        view = view._replace(**stats)
        z, sure = loop.decide(view, prediction)
        dropped = loop.process.level_of(z) < view.level
        view = view._replace(sure=jnp.where(dropped, sure, s.sure))
        memory = s.memory | {"step": s.memory["step"] + 1, "wrote": z != view.z}
        for hook in loop.policy.hooks():
            memory |= hook.remember(view, z, dropped)
        memory = jax.tree.map(lambda a, b: jnp.where(_like(live, a), a, b), memory, s.memory)
        s = s._replace(z=jnp.where(on, z, s.z), sure=jnp.where(on & dropped, sure, s.sure), memory=memory)
        return s, held, stats


def _stats(view: View) -> dict[str, Any]:
    return {name: a for name in _SEEN if (a := getattr(view, name)) is not None}


def _like(mask, a):
    return mask.reshape(*mask.shape, *(1,) * (a.ndim - mask.ndim))


@dataclasses.dataclass(frozen=True)
class Guided(Hook):
    """`propose`: a draft of all open tokens, their likeliest words, as far as an autoregressive model agrees.

    Guided Diffusion (FlashDLM, arXiv 2505.21467). tools["ar"] is a function: words int32 [b, S] -> prediction or logits
    [b, S, V] of each word given those before it. It reads the draft in one pass, from the first token that is not
    written: words on show count as read; a word of the draft is written while the checks pass; the first that fails
    ends the turn, with one word written there. So every turn writes at least one token, from any level straight to its
    word. Where a cluster is on show, the autoregressive law is forced under it as the network's is (force_transition).

    With the deterministic check and on_reject="ar" (so the released code) the text is the autoregressive model's greedy
    one. stats count the diffusion model's passes; the autoregressive model makes as many.

    Args:
      checks: all of them must pass: "deterministic", the draft is the likeliest word; "top_k", it is among the
        numbers["top_k"] likeliest; "threshold", its p >= numbers["threshold"]; "relative", its p >=
        numbers["relative"] times the likeliest word's.
      on_reject: what is written where a check fails: "dlm", the draft (the paper); "ar", the likeliest word.
    """

    checks: tuple[str, ...] = ("deterministic",)
    on_reject: str = "dlm"
    looks = ("word",)

    def __post_init__(self):
        if not self.checks or any(check not in CHECKS for check in self.checks):
            raise ValueError(f"checks={self.checks!r}: choose some of {', '.join(CHECKS)}")
        if self.on_reject not in ("dlm", "ar"):
            raise ValueError(f"on_reject={self.on_reject!r}: choose dlm or ar")

    def __call__(self, view: View, loop: Loop):
        """(symbols [b, S], probability of each)."""
        if "ar" not in loop.how.tools:
            raise ValueError("tools lack 'ar': guided decoding needs an autoregressive model's function")
        process, numbers = view.process, view.numbers
        draft = jnp.where(view.level == 0, view.z, jnp.where(view.open, view.word, 0))
        said = loop.how.tools["ar"](draft)
        said = said if hasattr(said, "select") else process.as_prediction(said)
        flat, z, x = view.open.reshape(-1), view.z.reshape(-1), draft.reshape(-1)

        def work(index, out):
            p = process.as_prediction(said.select(index))
            law = process.forced(p, z[index]).log_probs()
            mine = jnp.take_along_axis(law, x[index][:, None], axis=-1)
            new = (jnp.argmax(law, axis=-1).astype(z.dtype), jnp.max(law, axis=-1), mine[:, 0],
                   jnp.sum(law > mine, axis=-1))
            return [a.at[index].set(jnp.where(flat[index], b, a[index])) for a, b in zip(out, new, strict=True)]

        zero = jnp.zeros(z.shape, jnp.float32)
        out = loop.in_pieces(work, view.open, [z, zero, zero, jnp.zeros_like(z)])
        top, log_top, log_mine, better = (a.reshape(view.z.shape) for a in out)
        passes = view.open
        for check in self.checks:
            passes &= {"deterministic": lambda: draft == top,
                       "top_k": lambda: better < numbers["top_k"],
                       "threshold": lambda: jnp.exp(log_mine) >= numbers["threshold"],
                       "relative": lambda: jnp.exp(log_mine - log_top) >= numbers["relative"]}[check]()
        fails = view.free & (view.level > 0) & ~passes
        stop = jnp.cumsum(fails, axis=1) - fails  # failures before a token
        refused = fails & (stop == 0)
        z = jnp.where(view.open & (stop == 0), draft, view.z)
        sure = jnp.exp(view.log_word)
        if self.on_reject == "ar":
            z, sure = jnp.where(refused, top, z), jnp.where(refused, jnp.exp(log_top), sure)
        return z, sure
