"""GIDD: noise that is part mask, part random tokens (arXiv 2503.04482).

With 1 - t = e^-tau, V tokens and c = B sqrt(t (1-t)), a token x shows as itself, as the mask or as any token with

    q_t(z | x) = ((1-t) [z = x] + t [z = mask] + c/V [z is a token]) / (1 + c),     B = 2 p_u/(1 - p_u),

so at t = 1/2 a share p_u of the positions holds random tokens; p_u = 0 is MDLM. A network's p stands in for x. The
exact NELBO is of the form w (KL(q_t(.|x) || q_t(.|p)) + D_IS), D_IS = e^u - 1 - u, u = log q_t(z|x)/q_t(z|p)
(docs/theory.md section 6).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.config import WEIGHTINGS
from hdlm_jax.diffusion import trajectory
from hdlm_jax.diffusion.draws import Array, Number, categorical, fold, log_probs_of, row_keys, token_keys
from hdlm_jax.diffusion.levels import Proposal, open_uniform
from hdlm_jax.diffusion.prediction import Prediction, Predictions, TripCount
from hdlm_jax.diffusion.process import Process

Denoise: TypeAlias = Callable[[jax.Array, jax.Array], Predictions]  # (z [B, S], t [B])
Times: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class GiddProcess(Process):
    """Tokens, random tokens and masks; `hierarchy` is tokens and mask alone (V, 1).

    Args:
      hierarchy: hdlm_jax.diffusion.hierarchy.Hierarchy with a single level above the tokens.
      p_uniform: p_u in [0, 1), the share of random tokens at t = 1/2.

    Raises:
      ValueError: a hierarchy with clusters, p_uniform out of range.
    """

    p_uniform: float = 0.0
    tau_end = 40.0

    def __post_init__(self) -> None:
        if self.hierarchy.num_levels != 1:
            raise ValueError(f"hierarchy {self.hierarchy.sizes}: GIDD knows tokens and mask alone")
        if not 0 <= self.p_uniform < 1:
            raise ValueError(f"p_uniform={self.p_uniform}: must lie in [0, 1)")

    @property
    def _b(self) -> float:
        return 2 * self.p_uniform / (1 - self.p_uniform)

    def _times(self, tau: Array | float, xp: ModuleType = jnp) -> tuple[Array, Array, Array]:
        """t, 1 - t and c, of tau's shape."""
        t, rest = -xp.expm1(-tau), xp.exp(-tau)
        return t, rest, self._b * xp.sqrt(t * rest)

    def _ratio(self, tau: Array, xp: ModuleType = jnp) -> Array:
        """r = (1-t) V/c: how much likelier a token is to show itself by staying than by chance.

        At t = 0 it is infinite; there it is large, and a cost of 0 stays 0. No t > 0 that float32 has is changed.
        """
        t, rest, _ = self._times(tau, xp)
        return self.vocab_size / self._b * xp.sqrt(rest / xp.maximum(t, np.finfo(np.float32).tiny))

    # -- forward ---------------------------------------------------------------------------------------------------

    def corrupt(self, key: jax.Array, x: jax.Array, *, tau: jax.Array) -> jax.Array:
        """Noise tokens x int32 [B, S] to noise times tau [B]: tokens and masks int32 [B, S]."""
        chex.assert_rank([x, tau], [2, 1])
        keys = row_keys(key, x.shape[0])
        t, rest, c = (a[:, None] for a in self._times(tau))
        u = (1 + c) * jax.vmap(lambda k: open_uniform(k, x.shape[1:]))(fold(keys, 0))
        z = jnp.where(u < t, self.mask_id, x)
        if self.p_uniform:
            random = jax.vmap(lambda k: jax.random.randint(k, x.shape[1:], 0, self.vocab_size))(fold(keys, 1))
            z = jnp.where(u >= t + rest, random, z)
        return z.astype(jnp.int32)

    def noised(self, key: jax.Array, x: jax.Array, tau: jax.Array, score: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(z, level), both int32 [B, S]. Every position of `score` is scored, for any token may be a random one; at
        p_u = 0 only masks are.
        """
        z = jnp.where(score, self.corrupt(key, x, tau=tau), x)
        return z, (score if self.p_uniform else z == self.mask_id).astype(jnp.int32)

    def shares(self) -> np.ndarray:
        """[2] share of positions that are not, and that are scored, t uniform."""
        return np.array([0.0, 1.0]) if self.p_uniform else np.array([0.5, 0.5])

    # -- objective -------------------------------------------------------------------------------------------------

    def needs(self, hard_training: bool = False) -> str:
        """Of random tokens' loss: all tokens (hdlm_jax.models.heads.sum_over_noised)."""
        return "tokens" if self.p_uniform else "all"

    def token_loss(self, prediction: Prediction | jax.Array, x: jax.Array, z: jax.Array,
                   levels: tuple[int, ...] | None = None, hard_training: bool = False, *, tau: jax.Array) -> jax.Array:
        """KL(q_t(.|x) || q_t(.|p)) + D_IS in nats, of x's shape; tau of x's shape or [B]."""
        p, masked = self.as_prediction(prediction), z == self.mask_id
        tau = jnp.broadcast_to(tau.reshape(tau.shape + (1,) * (x.ndim - tau.ndim)), x.shape)
        _, rest, c = self._times(tau)
        if not self.p_uniform:
            return jnp.where(masked, -rest * p.log_prob(x), 0.0)
        r, size = self._ratio(tau), self.vocab_size
        shown = jnp.log1p(r[..., None] * jnp.exp(p.log_probs()))  # log q_t(.|p) over chance, of all tokens
        at = lambda v: jnp.take_along_axis(shown, v[..., None], axis=-1)[..., 0]  # noqa: E731
        chance = c / (size * (1 + c))
        kl = chance * ((1 + r) * (jnp.log1p(r) - at(x)) - (jnp.sum(shown, axis=-1) - at(x)))
        u = jnp.where(z == x, jnp.log1p(r), 0.0) - at(jnp.where(masked, x, z))
        return jnp.asarray(kl + jnp.where(masked, 0.0, jnp.expm1(u) - u))

    def _relative(self, z: jax.Array, tau: jax.Array, x: jax.Array) -> jax.Array:
        """Weights relative to a wrong token's: 2 at the mask, 1/(1 + r) at the token itself."""
        own = 1 / (1 + self._ratio(tau)) if self.p_uniform else jnp.zeros_like(tau)
        return jnp.where(z == self.mask_id, 2.0, jnp.where(z == x, own, 1.0))

    def nelbo_weight(self, z: jax.Array, tau: jax.Array, x: jax.Array) -> jax.Array:
        """w per unit tau, of z's shape [B, S]; tau [B]: 1/t at the mask, half of it at a wrong token."""
        tau = jnp.broadcast_to(tau[:, None], z.shape)
        return self._relative(z, tau, x) / (2 * self._times(tau)[0])

    def loss_weight(self, z: jax.Array, tau: jax.Array, weighting: str = "dynamic", weight_min: float = 0.0,
                    weight_max: float = jnp.inf, *, x: jax.Array) -> jax.Array:
        """W of the training loss for t uniform, of z's shape: none (the NELBO's own, w/(1-t)), clip (the same within
        bounds), constant (1), or dynamic (GIDD+): w relative to a wrong token's, without its growth at both ends of
        time."""
        if weighting not in WEIGHTINGS["gidd"]:
            raise ValueError(f"weighting={weighting!r}: choose one of {', '.join(WEIGHTINGS['gidd'])}")
        if weighting == "constant":
            return jnp.ones(z.shape)
        if weighting == "dynamic":
            return self._relative(z, jnp.broadcast_to(tau[:, None], z.shape), x)
        weight = self.nelbo_weight(z, tau, x) * jnp.exp(tau)[:, None]
        return jnp.clip(weight, weight_min, weight_max) if weighting == "clip" else weight

    def proposal(self, tokens: int, cv2: float) -> Proposal:
        """Noise times for evaluation (levels.Proposal)."""
        return Proposal(self, tokens, cv2)

    def unfinished(self, tau: Array | float) -> Array:
        """Share of positions that are not yet the mask."""
        t, _, c = self._times(tau, np)
        return 1 - t / (1 + c)

    def moments(self, tau: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and second moment of the NELBO's rate at noise times [J], in units of one cross-entropy for all
        positions: KL is 1 - t of it, and D_IS at a wrong token its surprise log(1 + r/V). The token itself counts
        for nothing."""
        t, rest, c = self._times(tau, np)
        flow, rate = [t / (1 + c)], [rest / t]
        if self.p_uniform:
            # 0.2: the surprise is in nats, a cross-entropy about 5 of them. It only shapes the proposal, so estimates
            # stay unbiased; on Zipf tokens of 4.5 and 5.5 nats their variance is within 2% of the least (4-11% with 0)
            flow.append(c / (1 + c))
            rate.append((rest + 0.2 * np.log1p(self._ratio(tau, np) / self.vocab_size)) / (2 * t))
        flows, rates = np.stack(flow), np.stack(rate)
        return (flows * rates).sum(0), (flows * rates * rates).sum(0)

    # -- reverse ---------------------------------------------------------------------------------------------------

    def _step(self, z: jax.Array, tau_s: Number, tau_t: Number) -> tuple[Times, Times, jax.Array, jax.Array]:
        """What a step needs: (t, 1 - t, c/V, c) at tau_s and at tau_t, e^(tau_s - tau_t), and the joint probability
        that the position jumped in between and that its last jump ended at z, of z's shape."""
        size = self.vocab_size
        t, rest, c = (jnp.broadcast_to(a, z.shape) for a in self._times(jnp.asarray(tau_t, jnp.float32)))
        s, rest_s, c_s = (jnp.broadcast_to(a, z.shape) for a in self._times(jnp.asarray(tau_s, jnp.float32)))
        kept = jnp.broadcast_to(jnp.exp(jnp.asarray(tau_s - tau_t, jnp.float32)), z.shape)
        jumped = jnp.where(z == self.mask_id, t - kept * s, (c - kept * c_s) / size) / (1 + c)
        return (s, rest_s, c_s / size, c_s), (t, rest, c / size, c), kept, jumped

    def posterior(self, prediction: Prediction | jax.Array, z: jax.Array, tau_s: Number, tau_t: Number) -> jax.Array:
        """Distribution of the state at tau_s given z at tau_t > tau_s (scalars): [..., V + 1], dense, for tests."""
        p = jnp.exp(self.as_prediction(prediction).log_probs())
        (s, rest_s, u_s, c_s), (_, _, _, c), kept, jumped = self._step(z, tau_s, tau_t)
        before = jnp.concatenate([rest_s[..., None] * p + u_s[..., None], s[..., None]], -1) / (1 + c_s)[..., None]
        stayed = kept * (1 + c_s) / (1 + c)  # alpha_t / alpha_s
        states = np.append(np.arange(self.vocab_size), self.mask_id)
        same = states.reshape((1,) * z.ndim + (-1,)) == z[..., None]
        both = before * (jumped[..., None] + jnp.where(same, stayed[..., None], 0.0))
        return both / jnp.sum(both, -1, keepdims=True)

    def step(self, key: jax.Array, prediction: Prediction | jax.Array, z: jax.Array, tau_s: Number, tau_t: Number,
             temperature: Number = 1.0, top_p: Number = 1.0) -> jax.Array:
        """A draw from `posterior`: int32 of z's shape. Whether a position changes is drawn first and then what it
        becomes, so that a rare jump is not lost in one draw over all states.

        Args:
          key: as in HierarchicalProcess.reverse_step. tau_s, tau_t: scalars, tau_t may be inf.
          temperature, top_p: of the tokens' distribution, temperature first.
        """
        keys = token_keys(key, z.shape)
        log_p = log_probs_of(self.as_prediction(prediction).logits, temperature, top_p)
        (s, rest_s, u_s, c_s), (t, rest, u_t, c), _, jumped = self._step(z, tau_s, tau_t)
        masked = z == self.mask_id
        own = jnp.exp(jnp.take_along_axis(log_p, jnp.where(masked, 0, z)[..., None], axis=-1)[..., 0])
        here = jnp.where(masked, t, rest * own + u_t) / (1 + c)
        there = jnp.where(masked, s, rest_s * own + u_s) / (1 + c_s)
        uniform = lambda i: jax.vmap(open_uniform)(fold(keys, i).reshape(-1)).reshape(z.shape)  # noqa: E731
        jumps = uniform(0) * here < jumped * (1 - there)
        weight = jnp.log(rest_s[..., None] * jnp.exp(log_p) + u_s[..., None])
        shown = jnp.arange(log_p.shape[-1]).reshape((1,) * z.ndim + (-1,)) == z[..., None]
        weight = jnp.where(shown, -jnp.inf, weight)
        token = categorical(fold(keys, 1), weight)
        to_mask = ~masked & (uniform(2) * (s + jnp.sum(jnp.exp(weight), axis=-1)) < s)
        return jnp.where(jumps, jnp.where(to_mask, self.mask_id, token), z).astype(jnp.int32)


NOISE = 0.01  # t that the network is told while it corrects


def sample(key: jax.Array, denoise: Denoise, process: GiddProcess, z: jax.Array, *, steps: Number,
           temperature: Number = 1.0, top_p: Number = 1.0, corrections: Number = 0,
           correction_temperature: Number = 0.1, sync_trip_count: TripCount = lambda n: n, tokens: int = 128,
           frames: int = 0) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Tokens int32 [B, S] from a canvas z (masks where free), by the exact posterior on `steps` equal steps of t.

    Given tokens stay; any other may be revised at every step, so each position is predicted at every call.

    Args:
      key: one key or keys [B]. denoise: function (z [b, S], t [b]) -> prediction, asked for select(index).
      steps: int, traced or not. tokens: positions predicted at once; changes no result.
      sync_trip_count: see hdlm_jax.decoding.loop.sample.
      corrections: calls after the last step, traced or not, that each revise one token of a row (after the
        paper's self-correction): of the tokens drawn anew from p at `correction_temperature`, the likeliest that is not
        there yet. A row whose tokens all come up again is done, and costs nothing more.
      frames: states to record, see trajectory.Trajectory.

    Returns:
      (tokens, stats) as hdlm_jax.decoding.loop.sample; the confidence is p of the token when it was drawn.
    """
    keys, given = row_keys(key, z.shape[0]), z != process.mask_id
    count = -(-z.size // tokens)
    at = jnp.minimum(jnp.arange(count * tokens), z.size - 1).reshape(count, tokens)
    busy = ~jnp.all(given, axis=-1)

    def told(call: Number) -> jax.Array:
        return jnp.broadcast_to(jnp.where(call < steps, 1 - call / steps, NOISE), z.shape[:1]).astype(jnp.float32)

    def step(call: jax.Array, carry: tuple) -> tuple:
        (z, sure), film = carry
        # 1 - t and 1 - s exactly 0 and 1 at the ends, which a quotient need not be
        done, then = call / steps, jnp.where(call + 1 < steps, (call + 1) / steps, 1.0)
        prediction = denoise(z, told(call))
        each, old = token_keys(fold(keys, call), z.shape).reshape(-1), z.reshape(-1)
        tau_s, tau_t = -jnp.log(then), -jnp.log(done)  # inf at the first call, 0 after the last

        def some(i: jax.Array) -> tuple[jax.Array, jax.Array]:
            p = process.as_prediction(prediction.select(i))
            new = process.step(each[i], p, old[i], tau_s, tau_t, temperature, top_p)
            token = jnp.minimum(new, process.vocab_size - 1)
            return new, jnp.where(new == token, jnp.exp(p.log_prob(token)), 0.0)

        new, law = (a.reshape(-1)[: z.size].reshape(z.shape) for a in jax.lax.map(some, at))
        state = jnp.where(given, z, new), jnp.where(given | (new == z), sure, law)
        return state, record.expose(film, call, (*state, jnp.where(call + 1 < end, told(call + 1), 0.0)))

    def correct(call: jax.Array, carry: tuple) -> tuple:
        (z, old_sure), film, forwards, settled = carry
        prediction = denoise(z, told(steps))
        each = token_keys(fold(keys, steps + call), z.shape).reshape(-1)

        def draw(i: jax.Array) -> tuple[jax.Array, jax.Array]:
            log_p = process.as_prediction(prediction.select(i)).log_probs()
            token = categorical(each[i], log_p / correction_temperature)
            return token, jnp.take_along_axis(log_p, token[:, None], axis=-1)[:, 0]

        token, sure = (a.reshape(-1)[: z.size].reshape(z.shape) for a in jax.lax.map(draw, at))
        sure = jnp.where(given | (token == z), -jnp.inf, sure)
        best = jax.nn.one_hot(jnp.argmax(sure, axis=-1), z.shape[1], dtype=bool) & (sure > -jnp.inf)
        best &= ~settled[:, None]
        state = jnp.where(best, token, z), jnp.where(best, jnp.exp(sure), old_sure)
        seen = (*state, jnp.where(steps + call + 1 < end, told(steps), 0.0))
        return state, record.expose(film, steps + call, seen), forwards + ~settled, settled | ~jnp.any(best, axis=-1)

    end = steps + jnp.int32(corrections)
    record = trajectory.Trajectory(frames, end)
    calls = sync_trip_count(jnp.where(jnp.any(busy), jnp.int32(steps), 0))
    state = (z, jnp.zeros(z.shape, jnp.float32))
    state, film = jax.lax.fori_loop(0, calls, step, (state, record.start((*state, told(0)))))
    more = sync_trip_count(jnp.where(jnp.any(busy), jnp.int32(corrections), 0))
    (z, _), film, forwards, _ = jax.lax.fori_loop(0, more, correct, (state, film, jnp.where(busy, calls, 0), ~busy))
    made = jnp.broadcast_to(calls + more, forwards.shape)
    return z, {"calls": calls + more, "row_forwards": forwards} | record.stats(film, made)
