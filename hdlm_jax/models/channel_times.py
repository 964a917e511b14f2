"""When observations become clear beside their symbols: diffusion.channel_times (docs/theory.md section 10).

    shared   s = c (1-t)/t for all tokens of a row (models.channel; CCDD, arXiv 2510.03206)
    token    every token has its own s, which falls from level to level by a clock of its own (NeoDiff, 2505.22165)
    before   the signal first, all of it, and then the symbols (Cosmos, 2506.21170; LaDiR, 2510.04573)

Each is a law of (s, level) that knows no words, so that the bound of each is exact.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from types import ModuleType
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.config import DiffusionConfig
from hdlm_jax.diffusion.draws import Array, fold, row_keys
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.levels import LevelChain
from hdlm_jax.diffusion.prediction import Prediction
from hdlm_jax.models.channel import NATS, ChannelProcess, Observed, State, along, evidence, mean_error

_HALF = math.log(2.0)  # noise time of t = 1/2


def symbols_last(tau: Array, xp: ModuleType = jnp) -> tuple[Array, Array]:
    """(noise time of symbols that climb in t < 1/2 on time 2t, its slope), of tau's shape; infinity and 0 behind."""
    done = 2 * xp.expm1(-tau)  # -2t
    early = done > -1
    done = xp.where(early, done, 0.0)
    return xp.where(early, -xp.log1p(done), xp.inf), xp.where(early, (2 + done) / (1 + done), 0.0)


@dataclasses.dataclass(frozen=True, eq=False)
class _Weighed(ChannelProcess):
    """Its weight is the sum of both rates, so that clipping clips both, and each loss has the share of its rate."""

    def rates(self, z: State, tau: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Per unit of noise time (of falls of the symbols; of the signal), of z's shape; 0 at tokens."""
        raise NotImplementedError

    def cost(self, p: Prediction, signal: jax.Array, x: jax.Array, z: State) -> jax.Array:
        """Of the signal at its rate, of x's shape; p: all evidence and the force transition in it."""
        raise NotImplementedError

    def _share(self, z: State, tau: jax.Array, which: int) -> jax.Array:
        rates, total = self.rates(z, tau), self.nelbo_weight(z, tau)
        return jnp.where(total > 0, rates[which] / jnp.where(total > 0, total, 1.0), 0.0)

    def symbol_loss(self, prediction: Prediction | jax.Array, x: jax.Array, z: jax.Array | State,
                    levels: tuple[int, ...] | None = None, hard_training: bool = False, *,
                    tau: jax.Array | None = None) -> jax.Array:
        """As of ChannelProcess, times its share; for hard training as it is."""
        found = super().symbol_loss(prediction, x, z, levels, hard_training, tau=tau)
        return found if hard_training else self._share(cast(State, z), cast(jax.Array, tau), 0) * found

    def signal_loss(self, prediction: Prediction | jax.Array, x: jax.Array, z: jax.Array | State,
                    levels: tuple[int, ...] | None = None, *, tau: jax.Array) -> jax.Array:
        """`cost` times its share."""
        p, state = cast(Observed, prediction), cast(State, z)
        return self._share(state, tau, 1) * self.cost(self.forced(p, state.z, levels), p.signal, x, state)

    def nelbo_weight(self, z: jax.Array | State, tau: jax.Array, x: jax.Array | None = None) -> jax.Array:
        symbols, signal = self.rates(cast(State, z), tau)
        return symbols + signal

    def loss_weight(self, z: jax.Array | State, tau: jax.Array, weighting: str = "constant", weight_min: float = 0.0,
                    weight_max: float = jnp.inf, *, x: jax.Array | None = None) -> jax.Array:
        plain = super().loss_weight(z, tau, weighting, weight_min, weight_max)
        if weighting in ("constant", "empirical"):
            return plain
        own = self.nelbo_weight(z, tau) * jnp.exp(tau)[:, None]
        clipped = jnp.clip(own, weight_min, weight_max) if weighting == "clip" else own
        return jnp.where(self.level_of(cast(State, z).z) > 0, clipped, 0.0)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenTimes(_Weighed):
    """A ladder of ratios: c levels[0] > ... > c levels[M-1] > 0, climbed by every token at rates 1.

    Its jumps are priced and drawn by the mixture kernel, which is exact for any height of a step. `State.gain` holds
    the draw d e(x) + sqrt(d) eps of a token's next jump.

    Raises:
      ValueError: as of ChannelProcess; no levels.
    """

    methods = ("ancestral", "first_hitting", "max_prob", "margin", "entropy")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.levels:
            raise ValueError("levels=(): a ladder needs one level at least")

    @functools.cached_property
    def clock(self) -> LevelChain:
        """The chain of a token's ratio, M levels."""
        return LevelChain((1.0,) * len(self.levels))

    @property
    def heights(self) -> np.ndarray:
        """s of every level of the clock, float32 [M + 1]; the last is 0."""
        return np.asarray([self.scale * level for level in self.levels] + [0.0], np.float32)

    def jumps(self, keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.vmap(lambda k: self.clock.crossing_times(k, shape[1:]))(keys)

    def ratios(self, keys: jax.Array, tau: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(self.heights)[jnp.sum(self.jumps(keys, shape) <= tau.reshape(len(tau), -1, 1), axis=-1)]

    def _next(self, s: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(level of the clock, int32; d that its next jump adds to the ratio) at ratios s, of s's shape."""
        heights = self.heights
        m = sum((s < height).astype(jnp.int32) for height in heights[:-1])
        return m, jnp.asarray(-np.diff(heights, prepend=heights[0]))[m]

    @functools.cached_property
    def _to_go(self) -> tuple[np.ndarray, np.ndarray]:
        """t [1001] and the mean of `to_go` at them (increasing), float32."""
        t = np.linspace(0, 1, 1001)
        with np.errstate(divide="ignore"):
            tau = np.minimum(-np.log1p(-t), self.tau_end)
        symbols, ratios = (np.asarray(chain.beta(tau, np)) for chain in (self.chain, self.clock))
        rungs = (1 - symbols[:, 0]) * (ratios @ np.arange(len(self.heights)))
        return t.astype(np.float32), (symbols @ np.arange(self.num_levels + 1) + rungs).astype(np.float32)

    def to_go(self, z: State) -> jax.Array:
        """Levels between a token's symbol and its word, and while that is not known rungs between its ratio and the
        highest one: int32 of z's shape."""
        level = self.level_of(z.z)
        return level + jnp.where(level > 0, self._next(z.s)[0], 0)

    def time_of(self, z: State, free: jax.Array) -> jax.Array:
        """t, float32 [B], at which tokens have as far to go on average as the free ones (bool [B, S]) of z's rows."""
        t, mean = self._to_go
        left = jnp.sum(jnp.where(free, self.to_go(z), 0), axis=1) / jnp.maximum(jnp.sum(free, axis=1), 1)
        return jnp.interp(left, jnp.asarray(mean), jnp.asarray(t)).astype(jnp.float32)

    def noised(self, key: jax.Array, x: jax.Array, tau: jax.Array, score: jax.Array) -> tuple[Any, jax.Array]:
        """As of ChannelProcess, with every token's next jump."""
        table: Any = self.signal
        keys = row_keys(key, len(x))
        state, level = super().noised(keys, x, tau, score)
        d = self._next(state.s)[1][..., None]
        eps = jax.vmap(lambda k: jax.random.normal(k, (x.shape[1], self.width)))(fold(keys, 5))
        return state._replace(gain=d * table[x] + jnp.sqrt(d) * eps), level

    def rates(self, z: State, tau: jax.Array) -> tuple[jax.Array, jax.Array]:
        symbols = ChannelProcess.nelbo_weight(self, z, tau)
        m, falls, jumps = self._next(z.s)[0], jnp.asarray(self.clock.weight(tau)), jnp.zeros(z.shape)
        for j in range(len(self.levels)):
            jumps = jnp.where(m == j + 1, along(falls[..., j], m), jumps)
        return symbols, jnp.where(symbols > 0, jumps, 0.0)

    def cost(self, p: Prediction, signal: jax.Array, x: jax.Array, z: State) -> jax.Array:
        """Of the next jump, to N(gain; d e(x), d): log of that over sum_w p(w) N(gain; d e(w), d). One draw of their
        relative entropy, which a draw alone may have below 0."""
        seen = evidence(cast(jax.Array, z.gain), self._next(z.s)[1], signal)
        own = jnp.take_along_axis(seen, x[..., None], axis=-1)[..., 0]
        return own - jax.nn.logsumexp(p.log_probs() + seen, axis=-1)

    def unfinished(self, tau: Array | float) -> Array:
        return np.maximum(self.chain.unfinished(tau), self.clock.unfinished(tau))

    @property
    def tau_end(self) -> float:
        return max(self.chain.tau_end, self.clock.tau_end)

    def moments(self, tau: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As of ChannelProcess: a jump costs what R(s) falls by."""
        left, k = 1 / (1 + 0.5 * self.width / NATS * self.heights.astype(float)), np.arange(1, self.num_levels + 1)
        falls = np.asarray(self.clock.weight(tau, np)) * np.diff(left)
        jumps = k[:, None] * np.concatenate([np.zeros((len(tau), 1)), falls], axis=1)[:, None]
        rate = np.asarray(self.chain.weight(tau, np))[..., None] * left + jumps
        share = np.asarray(self.chain.beta(tau, np))[:, 1:, None] * np.asarray(self.clock.beta(tau, np))[:, None]
        return (share * rate).sum((1, 2)), (share * rate * rate).sum((1, 2))


@dataclasses.dataclass(frozen=True, eq=False)
class SignalFirst(_Weighed):
    """Symbols in t < 1/2 on time 2t, the signal in t >= 1/2 on time 2t - 1: seen backwards it is complete, at s_max,
    before the first symbol falls. One of the two moves at a time, and the weight is of that one."""

    def symbol_time(self, tau: Array, xp: ModuleType = jnp) -> tuple[Array, Array | float]:
        return symbols_last(tau, xp)

    def signal_time(self, tau: Array, xp: ModuleType = jnp) -> Array:
        return xp.maximum(tau - _HALF, 0.0)

    def shares(self) -> np.ndarray:
        return 0.5 * (super().shares() + np.eye(self.num_levels + 1)[-1])

    def rates(self, z: State, tau: jax.Array) -> tuple[jax.Array, jax.Array]:
        theta, slope = (along(jnp.asarray(a), z.z) for a in self.symbol_time(tau))
        falls = slope * ChannelProcess.nelbo_weight(self, z, theta)
        signal = (slope == 0) & (self.level_of(z.z) > 0)
        return falls, jnp.where(signal, along(jnp.asarray(self.gain(tau)), z.z), 0.0)

    def cost(self, p: Prediction, signal: jax.Array, x: jax.Array, z: State) -> jax.Array:
        """|e(x) - sum_w p(w) e(w)|^2 / 2."""
        return mean_error(p, signal, x)

    def unfinished(self, tau: Array | float) -> Array:
        return self.chain.unfinished(self.signal_time(np.asarray(tau), np))

    @property
    def tau_end(self) -> float:
        return self.chain.tau_end + _HALF


TIMES: dict[str, type[ChannelProcess]] = {"shared": ChannelProcess, "token": TokenTimes, "before": SignalFirst}


def make(d: DiffusionConfig, hierarchy: Hierarchy, chain: LevelChain) -> ChannelProcess:
    """The process of diffusion.channel and channel_times."""
    return TIMES[d.channel_times](hierarchy, chain, d.xi, d.force_transition, d.channel, d.channel_width,
                                  levels=d.channel_levels)
