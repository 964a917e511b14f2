"""Several steps in one call: drafts checked by the model itself (`FreeDave`) or an autoregressive one (`Guided`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hdlm_jax.decoding.loop import Loop, spread
from hdlm_jax.decoding.policy import Draw, State, Verify, View

CHECKS = ("deterministic", "top_k", "threshold", "relative")


class _At(NamedTuple):
    """A prediction by its `select`."""

    select: Callable


@dataclasses.dataclass(frozen=True)
class FreeDave(Verify):
    """`verify`: drafts of the next steps, checked in one call of `width` rows (arXiv 2510.00294).

    A step is what the policy does in a call: its choice, its draw, its commit. After a call the following steps are
    tried on the same prediction; the states they reach are drafts. The next call predicts the state and its drafts
    together, and a step that ends in a draft needs no call of its own, as its prediction is there already.

    The text is that of the policy without drafts, as random numbers depend on a row's step and the token alone (where
    the network's numbers do not depend on the rows beside, and its cache is exact). There are fewer calls, but each of
    `width` rows: latency is saved, not work.

    Args:
      width: rows of a call, >= 1 (1: no drafts); the authors use 4.
      match: "exact"; or "subset", FreeDave++'s rule: a draft counts if all that it has written is part of the step's
        result, and goes on from it: fewer calls with thresholds, and another text.
    """

    width: int = 4
    match: str = "exact"
    choices = {"match": ("exact", "subset")}

    def memory(self, view):
        """drafts: the state and what may follow it; step: what call is without drafts."""
        return {"drafts": jnp.repeat(view.z[:, None], self.width, axis=1), "step": jnp.zeros_like(view.call)}

    def __call__(self, loop: Loop, cache, s: State):
        (rows, positions), k, memory = s.z.shape, self.width, s.memory
        each = jnp.repeat(jnp.arange(rows), k)
        s = s._replace(film=())
        many = jax.tree.map(lambda a: a[each], s)
        view = loop.view(many._replace(z=memory["drafts"].reshape(rows * k, positions)))
        rest = view.free & (view.level > 0)  # drafts may lead into the next block
        wide_cache = jax.tree.map(lambda a: jnp.take(a, each, axis=1), cache)
        prediction, wide_cache = loop.ask(wide_cache, view.rows(loop.wanted(view) | rest))
        carry = s, s, each[::k] * 0, jnp.ones(rows, bool), memory["drafts"]
        _, s, row, _, made = jax.lax.fori_loop(0, 2 * k - 1, lambda i, carry: self._next(
            i, loop, prediction, memory["drafts"], *carry), carry)
        cache = jax.tree.map(lambda a: jnp.take(a, jnp.arange(rows) * k + row, axis=1), wide_cache)
        return s.z, s.sure, s.memory | {"drafts": made}, cache

    def _next(self, i, loop: Loop, prediction, drafts, s: State, done: State, row, live, made):
        """The i-th step: the first `width` of them verify, and lead to `done`; the others make drafts from there.

        row [b]: the draft whose prediction counts; live [b]: whether it is of s; made: new drafts.
        """
        k, before, verify, positions = self.width, s.z, i < self.width, s.z.shape[1]
        live |= ~verify
        chosen = (jnp.arange(len(row)) * k + row) * positions  # where the prediction of each row's draft begins
        here = _At(lambda index: prediction.select(chosen[index // positions] + index % positions))
        s = self._step(loop, here, s, live)
        fits = drafts == s.z[:, None]
        if self.match == "subset":
            fits |= drafts == before[:, None]
        later = (jnp.arange(k)[None] > row[:, None]) & jnp.any(drafts != before[:, None], axis=-1)
        fits = jnp.all(fits, axis=-1) & later & verify
        last = k - 1 - jnp.argmax(fits[:, ::-1], axis=1)
        reached = jnp.take_along_axis(drafts, last[:, None, None], axis=1)[:, 0]
        goes = live & jnp.any(fits, axis=1) & jnp.any(loop.process.level_of(reached) > 0, axis=1)
        if self.match == "subset":
            s = s._replace(z=jnp.where(goes[:, None], reached, s.z))
        done = jax.tree.map(lambda a, b: jnp.where(verify, a, b), s, done)
        made = made.at[:, jnp.maximum(i - k + 1, 0)].set(s.z)
        return s, done, jnp.where(goes, last, row), goes, made

    def _step(self, loop: Loop, prediction, s: State, live) -> State:
        """A step of the live rows, bool [b]."""
        view = loop.view(s._replace(call=s.memory["step"]))
        on = live[:, None]
        view = view._replace(**loop.look(view, prediction, loop.wanted(view) & on))
        z, sure, _ = loop.decide(view, prediction)
        unmasked = loop.process.level_of(z) < view.level
        view = view._replace(sure=jnp.where(unmasked, sure, s.sure))
        memory = s.memory | {"step": s.memory["step"] + 1}
        for hook in loop.policy.hooks:
            memory |= hook.remember(view, z, unmasked)
        memory = jax.tree.map(lambda a, b: jnp.where(spread(live, a), a, b), memory, s.memory)
        return s._replace(z=jnp.where(on, z, s.z), sure=jnp.where(on & unmasked, sure, s.sure), memory=memory)


@dataclasses.dataclass(frozen=True)
class Guided(Draw):
    """`draw`: a draft of all open tokens, their likeliest ones, as far as an autoregressive model agrees.

    Guided Diffusion (FlashDLM, arXiv 2505.21467). tools["ar"]: tokens int32 [b, S] -> prediction or logits [b, S, V] of
    each token given those before it. From the left, draft tokens are written, from any level straight to the
    vocabulary, while the checks pass; at the first that fails one more is written. Where a cluster shows, the
    autoregressive distribution is forced under it as the network's is. With the deterministic check and on_reject="ar"
    (the released code) the text is the autoregressive model's greedy one.

    Args:
      checks: all must pass: "deterministic", the draft is the likeliest token; "top_k", it is among the
        numbers["top_k"] likeliest; "threshold", its p >= numbers["threshold"]; "relative", its p >=
        numbers["relative"] times the likeliest one's.
      on_reject: what is written where a check fails: "dlm", the draft (the paper); "ar", the likeliest token.
    """

    checks: tuple[str, ...] = ("deterministic",)
    on_reject: str = "dlm"
    choices = {"on_reject": ("dlm", "ar")}
    needs = ("token",)

    def __post_init__(self):
        super().__post_init__()
        if not set(self.checks) <= set(CHECKS):
            raise ValueError(f"checks={self.checks!r}: choose some of {', '.join(CHECKS)}")

    def __call__(self, view: View, loop: Loop, prediction, target):
        if "ar" not in loop.how.tools:
            raise ValueError("tools lack 'ar': guided decoding needs an autoregressive model's function")
        process, numbers = view.process, view.numbers
        draft = jnp.where(view.level == 0, view.z, jnp.where(view.open, view.token, 0))
        said = process.as_prediction(loop.how.tools["ar"](draft))
        z, x = view.z.reshape(-1), draft.reshape(-1)

        def find(at):
            log_p = process.forced(said.select(at), z[at]).log_probs()
            own = jnp.take_along_axis(log_p, x[at][:, None], axis=-1)
            return (jnp.argmax(log_p, axis=-1).astype(z.dtype), jnp.max(log_p, axis=-1), own[:, 0],
                    jnp.sum(log_p > own, axis=-1))

        zero = jnp.zeros(view.z.shape, jnp.float32)
        top, log_top, log_own, better = loop.at_wanted(find, view.open, (view.z, zero, zero, jnp.zeros_like(view.z)))
        passes = view.open
        for check in self.checks:
            passes &= {"deterministic": lambda: draft == top,
                       "top_k": lambda: better < numbers["top_k"],
                       "threshold": lambda: jnp.exp(log_own) >= numbers["threshold"],
                       "relative": lambda: jnp.exp(log_own - log_top) >= numbers["relative"]}[check]()
        fails = view.free & (view.level > 0) & ~passes
        stop = jnp.cumsum(fails, axis=1) - fails  # failures before a token
        refused = fails & (stop == 0)
        z, sure = jnp.where(view.open & (stop == 0), draft, view.z), jnp.exp(view.log_token)
        if self.on_reject == "ar":
            z, sure = jnp.where(refused, top, z), jnp.where(refused, jnp.exp(log_top), sure)
        return z, sure
