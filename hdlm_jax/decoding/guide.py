"""Denoisers that change what another denoiser predicts, and draws chosen by an energy; all strengths are traced.

`Constrained` (S^3, arXiv 2507.04504), `CFG` (SMDM, arXiv 2410.18514) and `Classified` (classifier guidance in the form
of CtrlDiff, arXiv 2505.14455) hold a denoiser and are denoisers; `EnergyDraw` (EDLM, arXiv 2410.21357) is a policy's
draw.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hdlm_jax.decoding.loop import Loop
from hdlm_jax.decoding.policy import Draw, Rows, View, as_denoiser
from hdlm_jax.diffusion.draws import fold
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.prediction import LogitsPrediction

_PICK = 2**32 - 2  # what a row's key is folded with to pick a candidate; positions are small numbers


class Tilted(NamedTuple):
    """A prediction made where it is needed: logits of(index int32 [n]) -> [n, V]."""

    of: Callable
    hierarchy: Hierarchy

    def select(self, index):
        return LogitsPrediction(self.of(index), self.hierarchy)


class Guide:
    """A denoiser that holds another one, `denoise`: a denoiser, or a function (z, t) -> prediction or logits."""

    def __init__(self, process, denoise):
        self.process, self.inner = process, as_denoiser(denoise)
        self.forwards = self.inner.forwards

    def start(self, rows: Rows):
        return self.inner.start(rows)

    def ask(self, cache, rows: Rows):
        """(function index int32 [n] -> log p of the vocabulary [n, V], cache) of the inner denoiser."""
        prediction, cache = self.inner(cache, rows)
        prediction = self.process.as_prediction(prediction)
        return lambda index: prediction.select(index).log_probs(), cache


class Constrained(Guide):
    """Gives tokens that a position may not take no probability (S^3's constraints).

    Forbidden logits become -inf before anything else looks at them, so clusters have the mass of their allowed tokens;
    where no allowed token has any probability they are uniform.

    Args:
      allowed: bool [kinds, V]; rows.extra["kind"] int32 [b, S] says which row holds where (see canvas.Canvas).
    """

    def __init__(self, process, denoise, allowed):
        super().__init__(process, denoise)
        self.allowed = jnp.asarray(allowed)

    def __call__(self, cache, rows: Rows):
        log_p, cache = self.ask(cache, rows)
        kind = rows.extra["kind"].reshape(-1)

        def of(index):
            allowed = self.allowed[kind[index]]
            logits = jnp.where(allowed, log_p(index), -jnp.inf)
            best = jnp.max(logits, axis=-1, keepdims=True)
            return jnp.where(allowed, jnp.where(jnp.isfinite(best), logits - best, 0.0), -jnp.inf)

        return Tilted(of, self.process.hierarchy), cache


class CFG(Guide):
    """Unsupervised classifier-free guidance (SMDM): log p = c + weight (c - u), normalised, over the vocabulary.

    c: log p of the inner denoiser; u: the same without the prompt, the tokens in rows.given, which are replaced by
    masks (without="mask") or by their clusters ("cluster"), a milder contrast, and without features. A token that
    either finds impossible keeps c. Both passes are one call of twice the rows; a denoiser with a cache has two.

    Args:
      weight: float, traced or not; 0: no guidance. SMDM uses .1 to 2.
    """

    def __init__(self, process, denoise, weight, without: str = "mask"):
        super().__init__(process, denoise)
        self.weight, self.without, self.forwards = weight, without, 2 * self.inner.forwards

    def unprompted(self, rows: Rows) -> Rows:
        hidden = self.process.hierarchy.mask_id
        if self.without == "cluster":
            hidden = self.process.state_above(0, jnp.where(rows.level == 0, rows.z, 0), 1)
        z = jnp.where(rows.given & (rows.level == 0), hidden, rows.z)
        extra = {name: jnp.full_like(a, jnp.nan) if name == "features" else a for name, a in rows.extra.items()}
        return rows._replace(z=z, level=self.process.level_of(z), extra=extra)

    def start(self, rows: Rows):
        return self.inner.start(rows), self.inner.start(self.unprompted(rows))

    def __call__(self, cache, rows: Rows):
        half, weight = rows.z.size, self.weight
        both = jax.tree.map(lambda *a: jnp.concatenate(a), rows, self.unprompted(rows))
        log_p, joined = self.ask(jax.tree.map(lambda *a: jnp.concatenate(a, axis=1), *cache), both)

        def of(index):
            c, u = log_p(index), log_p(index + half)
            return jnp.where((c > -jnp.inf) & (u > -jnp.inf), c + weight * (c - u), c)

        parts = tuple(jax.tree.map(lambda a, i=i: jnp.split(a, 2, axis=1)[i], joined) for i in (0, 1))
        return Tilted(of, self.process.hierarchy), parts


class Classified(Guide):
    """Classifier guidance: p_i(v | z) exp(weight score_i(v)), normalised, over the vocabulary.

    With score_i(v) = log p(y | z with v at i) and weight 1 that is Bayes' rule.

    Args:
      score: function z int32 [b, S] -> float [b, S, V], up to a constant per token; see `first_order`.
      weight: float, traced or not; 0: no guidance.
    """

    def __init__(self, process, denoise, score: Callable, weight=1.0):
        super().__init__(process, denoise)
        self.score, self.weight = score, weight

    def __call__(self, cache, rows: Rows):
        log_p, cache = self.ask(cache, rows)
        score = self.score(rows.z)
        score = score.reshape(-1, score.shape[-1])
        return Tilted(lambda index: log_p(index) + self.weight * score[index], self.process.hierarchy), cache


def first_order(classifier: Callable, hierarchy) -> Callable:
    """score(z) of Classified from a differentiable classifier: one-hot states float32 [b, S, N] -> log p(y) [b].

    log p(y | z with v at i) = log p(y | z) + g_i(v) - g_i(z_i) to first order, g the gradient in the one-hot input: one
    backward pass for all i and v, exact where log p(y) is linear in each token's one-hot vector.
    """

    def score(z):
        onehot = jax.nn.one_hot(z, hierarchy.num_states, dtype=jnp.float32)
        return jax.grad(lambda x: jnp.sum(classifier(x)))(onehot)[..., : hierarchy.vocab_size]

    return score


@dataclasses.dataclass(frozen=True)
class EnergyDraw(Draw):
    """`draw`: importance sampling among texts, p(x0 | z) in proportion to p_theta(x0 | z) exp(-E(x0)) (EDLM).

    In calls with numbers["energy_from"] <= t <= numbers["energy_to"] that many complete texts are drawn, every token
    not written yet on its own; one is taken in proportion to exp(-E) (the released code's exp(+E) leads away from the
    data), and tokens are unmasked towards it. Exact in the limit of many candidates (the authors use 2). In other
    calls it is draw="sample" to the bit.

    tools["energy"] is a function (x, z, log_p, t) -> E float32 [b]: x int32 [b, S] the text, 0 behind a row's end; z
    int32 [b, S] the states, -1 behind the end; log_p float32 [b, S], log p_theta of each drawn token before temperature
    and top_p, 0 elsewhere; t float32 [b]. See `ar_energy`, and models.energy.
    """

    candidates: int = 2
    whole = True

    def __call__(self, view: View, loop: Loop, prediction, target):
        if "energy" not in loop.how.tools:
            raise ValueError("tools lack 'energy': a function (x, z, log_p, t) -> E of each row")
        rows = view.z.shape[0]
        inside = self.inside(view)
        keys = self.keys(view)
        energy = functools.partial(self.energy, view, loop, prediction, inside)
        energies = jax.lax.cond(loop.how.sync_trip_count(jnp.any(inside).astype(jnp.int32)) > 0,
                                lambda: jax.lax.map(energy, keys),
                                lambda: jnp.zeros((self.candidates, rows), jnp.float32))
        pick = jax.vmap(jax.random.categorical)(fold(view.key, jnp.uint32(_PICK)), -energies.T)
        keys = keys[jnp.where(inside, pick, 0), jnp.arange(rows)]
        return loop.reverse_step(view._replace(keys=keys), prediction, target)

    def inside(self, view: View):
        """bool [b]: rows whose call is one of those with candidates."""
        return (view.t >= view.numbers["energy_from"]) & (view.t <= view.numbers["energy_to"])

    def keys(self, view: View):
        """[candidates, b, S]: a text is known by the keys that draw it, the first one by the call's own."""
        others = [fold(view.keys, 16 + i) for i in range(1, self.candidates)]  # small numbers are a draw's own
        return jnp.stack([view.keys, *others])

    def energy(self, view: View, loop: Loop, prediction, inside, keys, told=None):
        """E [b] of the text that keys [b, S] draw; told: int32 [b, S], states below view.z that it is to lie under."""
        process, z, keys = view.process, view.z.reshape(-1), keys.reshape(-1)
        under = z if told is None else told.reshape(-1)

        def find(at):
            p = prediction.select(at)
            new = loop.draw(p, under[at], jnp.zeros_like(at), keys[at])
            return new, jnp.where(process.level_of(z[at]) > 0, process.forced(p, z[at]).log_prob(new), 0.0)

        start = jnp.where(view.active & (view.level == 0), view.z, 0), jnp.zeros(view.z.shape, jnp.float32)
        x, log_p = loop.at_wanted(find, view.free & (view.level > 0) & inside[:, None], start)
        return loop.how.tools["energy"](x, jnp.where(view.active, view.z, -1), log_p, view.t).astype(jnp.float32)


def ar_energy(ar: Callable, process, chunk: int = 64) -> Callable:
    """EDLM's energy by an autoregressive model, E = log p_theta(x0) - log p_AR(x0), for tools["energy"].

    Both are of the tokens drawn, as in the released code: those in z stay out of log p_AR.

    Args:
      ar: tokens int32 [b, S] -> prediction or logits [b, S, V] of each token given those before it.
      chunk: tokens whose logits exist at once.
    """

    def energy(x, z, log_p, t):
        said, size = process.as_prediction(ar(x)), min(chunk, x.size)
        index = jnp.arange(-(-x.size // size) * size).reshape(-1, size) % x.size
        log_ar = jax.lax.map(lambda at: said.select(at).log_prob(x.reshape(-1)[at]), index)
        log_ar = log_ar.reshape(-1)[: x.size].reshape(x.shape)
        return jnp.sum(log_p - jnp.where(process.level_of(z) > 0, log_ar, 0.0), axis=1)

    return energy
