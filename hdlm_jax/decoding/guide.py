"""Guidance: denoisers that tilt what another one says, and draws that an energy chooses among.

`CFG` (SMDM, arXiv 2410.18514) and `Classified` (classifier guidance in the form of CtrlDiff, arXiv 2505.14455) hold a
denoiser and are denoisers; `EnergyDraw` (EDLM, arXiv 2410.21357) is a policy's draw. Their strengths are traced.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hdlm_jax.decoding.loop import Loop
from hdlm_jax.decoding.policy import Hook, Rows, Stateless, View
from hdlm_jax.diffusion.draws import fold
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.prediction import LogitsPrediction

_PICK = 2**32 - 2  # what a row's key is folded with to pick a candidate; positions are small numbers


class Tilted(NamedTuple):
    """A prediction that is made where it is asked for: logits of(index [n]) -> [n, V]."""

    of: Callable
    hierarchy: Hierarchy

    def select(self, index):
        return LogitsPrediction(self.of(index), self.hierarchy)


class Guide:
    """A denoiser that holds another one. process: HierarchicalProcess; denoise: denoiser, or function (z, t)."""

    def __init__(self, process, denoise):
        self.process = process
        self.inner = denoise if hasattr(denoise, "start") else Stateless(denoise)
        self.rows_axis, self.forwards = self.inner.rows_axis, self.inner.forwards

    def start(self, rows: Rows):
        return self.inner.start(rows)

    def ask(self, cache, rows: Rows):
        """(function index [n] -> log p of all words [n, V], cache) of the inner denoiser."""
        said, cache = self.inner(cache, rows)
        said = said if hasattr(said, "select") else self.process.as_prediction(said)
        return lambda index: self.process.as_prediction(said.select(index)).log_probs(), cache


class CFG(Guide):
    """Unsupervised classifier-free guidance (SMDM): log p = u + (1 + weight)(c - u), normalised, over words.

    c: what the denoiser says; u: what it says without the prompt, the words that rows.given names: in their place are
    masks, or the words' clusters (level 1), a milder contrast; at K = 1 that is the mask as well. Law of clusters by
    the sums over their words. A word that either finds impossible keeps log p = c.

    Both passes are one call of twice the rows. A denoiser with a cache has two, and both must hold as many leaves.

    Args:
      weight: float, traced or not; 0: no guidance. SMDM uses .1 to 2.
      unconditional: "mask" or "cluster".
    """

    def __init__(self, process, denoise, weight, unconditional: str = "mask"):
        if unconditional not in ("mask", "cluster"):
            raise ValueError(f"unconditional={unconditional!r}: choose one of mask, cluster")
        super().__init__(process, denoise)
        self.weight, self.unconditional, self.forwards = weight, unconditional, 2 * self.inner.forwards

    def without(self, rows: Rows) -> Rows:
        """The rows without their prompt."""
        h, z = self.process.hierarchy, rows.z
        hidden = h.mask_id
        if self.unconditional == "cluster":
            hidden = self.process.symbol_above(0, jnp.where(rows.level == 0, z, 0), 1)
        z = jnp.where(rows.given & (rows.level == 0), hidden, z)
        return rows._replace(z=z, level=self.process.level_of(z))

    def start(self, rows: Rows):
        return self.inner.start(rows), self.inner.start(self.without(rows))

    def __call__(self, cache, rows: Rows):
        half, axis, weight = rows.z.size, self.rows_axis, self.weight
        both = jax.tree.map(lambda *a: jnp.concatenate(a), rows, self.without(rows))
        law, joined = self.ask(jax.tree.map(lambda *a: jnp.concatenate(a, axis=axis), *cache), both)
        parts = [jax.tree.map(lambda a, i=i: jnp.split(a, 2, axis=axis)[i], joined) for i in (0, 1)]

        def of(index):
            c, u = law(index), law(index + half)
            return jnp.where((c > -jnp.inf) & (u > -jnp.inf), c + weight * (c - u), c)

        return Tilted(of, self.process.hierarchy), tuple(parts)


class Classified(Guide):
    """Classifier guidance: p_i(v | z) exp(weight score_i(v)), normalised, over words v.

    With score_i(v) = log p(y | z with v at i) and weight 1 that is Bayes' rule, p_i(v | z, y), where the denoiser is
    right. `first_order` estimates all scores in one backward pass. Clusters follow from the sums over their words.

    Args:
      score: function z int32 [b, S] -> float [b, S, V], up to a number per token. Its cost is not in
        stats["row_forwards"], which counts the denoiser's passes alone.
      weight: float, traced or not; 0: no guidance.
    """

    def __init__(self, process, denoise, score: Callable, weight=1.0):
        super().__init__(process, denoise)
        self.score, self.weight = score, weight

    def __call__(self, cache, rows: Rows):
        law, cache = self.ask(cache, rows)
        score = self.score(rows.z)
        words = self.process.hierarchy.vocab_size
        if score.shape != (*rows.z.shape, words):
            raise ValueError(f"score.shape={score.shape}: must be [b, S, V] = {(*rows.z.shape, words)}")
        score = score.reshape(-1, words)
        return Tilted(lambda index: law(index) + self.weight * score[index], self.process.hierarchy), cache


def first_order(classifier: Callable, hierarchy) -> Callable:
    """score(z) of Classified from a differentiable classifier: one-hot symbols float32 [b, S, N] -> log p(y) [b].

    log p(y | z with v at i) = log p(y | z) + g_i(v) - g_i(z_i) to first order, g the gradient in the one-hot input: one
    backward pass for all i and v; exact where log p(y) is linear in each token's one-hot vector.
    """

    def total(shown):
        return jnp.sum(classifier(shown))

    def score(z):
        shown = jax.nn.one_hot(z, hierarchy.num_states, dtype=jnp.float32)
        return jax.grad(total)(shown)[..., : hierarchy.vocab_size]

    return score


@dataclasses.dataclass(frozen=True)
class EnergyDraw(Hook):
    """`draw`: words by importance among `candidates`: p(x0 | z) in proportion to p_theta(x0 | z) exp(-E(x0)) (EDLM).

    In turns with numbers["energy_from"] <= t <= numbers["energy_to"] that many complete texts are drawn, every token
    that is not written yet on its own; one is taken in proportion to exp(-E) (the released code's exp(+E) leads away
    from the data), and what drops in this turn drops towards its words. Exact in the limit of many candidates. In
    other turns, and with one candidate, it is draw="sample" to the bit.

    tools["energy"] is a function (x, z, log_p) -> E float32 [b]: x int32 [b, S] words, 0 behind a row's end; z int32
    [b, S], the symbols on show, -1 behind the end; log_p float32 [b, S], log p_theta of each drawn word before
    temperature and nucleus, 0 elsewhere. See `ar_energy`. It is called `candidates` times a turn, on b rows;
    stats["row_forwards"] counts the denoiser's passes alone. A text is known by the keys that drew it.

    Args:
      candidates: k >= 1; the authors use 2.
    """

    candidates: int = 2
    whole = True

    def __post_init__(self):
        if self.candidates < 1:
            raise ValueError(f"candidates={self.candidates}: need at least 1")

    def __call__(self, view: View, loop: Loop, prediction, target):
        """(symbols [b, S], probability of each drop)."""
        if self.candidates == 1:
            return loop.reverse_step(view, prediction, target)
        if "energy" not in loop.how.tools:
            raise ValueError("tools lack 'energy': a function (x, z, log_p) -> E of each row")
        rows = view.z.shape[0]
        inside = (view.t >= view.numbers["energy_from"]) & (view.t <= view.numbers["energy_to"])
        others = [fold(view.keys, 16 + i) for i in range(1, self.candidates)]  # small numbers are a draw's own
        keys = jnp.stack([view.keys, *others])
        energy = functools.partial(self.energy, view, loop, prediction, inside)
        energies = jax.lax.cond(loop.how.sync_trip_count(jnp.any(inside).astype(jnp.int32)) > 0,
                                lambda: jax.lax.map(energy, keys),
                                lambda: jnp.zeros((self.candidates, rows), jnp.float32))
        pick = jax.vmap(jax.random.categorical)(fold(view.key, jnp.uint32(_PICK)), -energies.T)
        keys = keys[jnp.where(inside, pick, 0), jnp.arange(rows)]
        return loop.reverse_step(view._replace(keys=keys), prediction, target)

    def energy(self, view: View, loop: Loop, prediction, inside, keys):
        """E [b] of the text that keys [b, S] draw."""
        process, wanted = view.process, view.free & (view.level > 0) & inside[:, None]
        z, keys, flat = view.z.reshape(-1), keys.reshape(-1), wanted.reshape(-1)

        def work(at, carry):
            x, log_p = carry
            p = process.as_prediction(prediction.select(at))
            new = process.reverse_step(keys[at], p, z[at], jnp.zeros_like(at), loop.policy.clusters,
                                       loop.how.temperature, loop.how.top_p, loop.how.sync_trip_count)
            new_log_p = jnp.where(process.level_of(z[at]) > 0, process.forced(p, z[at]).log_prob(new), 0.0)
            pairs = (x, new), (log_p, new_log_p)
            return tuple(a.at[at].set(jnp.where(flat[at], b, a[at])) for a, b in pairs)

        words = jnp.where(view.active & (view.level == 0), view.z, 0).reshape(-1)
        x, log_p = loop.in_pieces(work, wanted, (words, jnp.zeros(z.shape, jnp.float32)))
        shown = jnp.where(view.active, view.z, -1)
        return loop.how.tools["energy"](x.reshape(shown.shape), shown, log_p.reshape(shown.shape)).astype(jnp.float32)


def ar_energy(ar: Callable, process, everything: bool = False, together: int = 64) -> Callable:
    """EDLM's energy by an autoregressive model: E = log p_theta(x0) - log p_AR(x0), for tools["energy"].

    Args:
      ar: words int32 [b, S] -> prediction or logits [b, S, V] of each word given those before it.
      everything: whether words on show count in log p_AR as well: then exp(-E) makes x0 ~ p_AR(x0 | words on show),
        also where some of them stand behind masks. Else only tokens that were not words, as in the released code.
        Clusters on show are respected at xi = 1, where words are drawn under them.
      together: tokens whose log p of all words exists at once, where the model answers on demand.
    """

    def energy(x, z, log_p):
        said = ar(x)
        if hasattr(said, "log_prob") or not hasattr(said, "select"):
            log_ar = process.as_prediction(said).log_prob(x)
        else:
            size = min(together, x.size)
            index = jnp.arange(-(-x.size // size) * size).reshape(-1, size) % x.size
            log_ar = jax.lax.map(lambda at: said.select(at).log_prob(x.reshape(-1)[at]), index)
            log_ar = log_ar.reshape(-1)[: x.size].reshape(x.shape)
        counts = z >= 0 if everything else process.level_of(z) > 0
        return jnp.sum(log_p - jnp.where(counts, log_ar, 0.0), axis=1)

    return energy
