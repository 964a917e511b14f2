"""The pure-birth chain on levels (docs/theory.md section 2): occupancies, NELBO weights, transitions, times.

A position climbs from level l-1 to level l at the constant rate r_l in noise time tau, whatever token it holds.
Everything here is a power series with non-negative terms (no cancellation) in x = lambda tau, lambda = max r:

    P(tau)[i, j] = e^-x x^(j-i) b_ij(x),   b_ij(x) = sum_m x^m/m! . (A^(m+j-i))_ij m!/(m+j-i)!,   A = I + G/lambda
"""

from __future__ import annotations

import dataclasses
import functools
import math
from types import ModuleType
from typing import Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.diffusion.draws import Array, Number

Sums: TypeAlias = tuple[Array, Array, Array]

_HUGE = 1e20  # running sums are divided by this before they can overflow in float32


def open_uniform(key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
    """Uniform in (0, 1), float32 of `shape`: the generator's lattice of 2^-23, half a step up.

    Neither 0 nor 1 is drawn, and the mean is right to 1e-8. jax.random.uniform draws 0 once in 2^23: an event of
    probability 1e-9 that happens where u < 1e-9 would come a hundred times too often.
    """
    return jax.random.uniform(key, shape, jnp.float32) + 2.0**-24


@dataclasses.dataclass(frozen=True)
class LevelChain:
    """Levels 0 (tokens) .. K (mask), climbed at `rates` = (r_1, ..., r_K) per unit of noise time tau.

    Rates are taken as given; multiplying all of them by a constant only relabels tau. All methods take tau in
    [0, inf) of any shape `...` and compute in its floating dtype; float32 holds 1e-5 relative for K <= 4 and
    rates in [.25, 4].
    """

    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.rates or not all(math.isfinite(r) and r > 0 for r in self.rates):
            raise ValueError(f"rates={self.rates!r}: need one positive finite rate for each of the K >= 1 levels")
        object.__setattr__(self, "rates", tuple(float(r) for r in self.rates))

    @property
    def num_levels(self) -> int:
        """K, the number of levels above the tokens."""
        return len(self.rates)

    @property
    def _top(self) -> float:
        return max(self.rates)

    @property
    def tau_end(self) -> float:
        """Noise time after which a position is the mask but for e^-40 or so; later times are read as this one."""
        return 40.0 / min(self.rates)

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """[terms, K+1, K+1] float64 coefficients of b_ij (see the module docstring)."""
        x, k = self._top * self.tau_end, self.num_levels
        terms = math.ceil(x + 9 * math.sqrt(x) + 30)
        a = np.eye(k + 1)
        for level, rate in enumerate(self.rates):
            a[level, level] -= rate / self._top
            a[level, level + 1] += rate / self._top
        powers = [np.eye(k + 1)]
        for _ in range(terms + k):
            powers.append(powers[-1] @ a)
        table = np.zeros((terms, k + 1, k + 1))
        for i in range(k + 1):
            for j in range(i, k + 1):
                scale = 1.0 / math.factorial(j - i)  # m!/(m+j-i)!, by recursion in m
                for m in range(terms):
                    table[m, i, j] = powers[m + j - i][i, j] * scale
                    scale *= (m + 1) / (m + 1 + j - i)
        return table

    def _series(self, tau: Array, xp: ModuleType = jnp) -> tuple[Array, Array, Array]:
        """x [...], b [..., K+1, K+1] and the log of the factor taken out of b, [...]."""
        x = xp.minimum(tau, self.tau_end) * self._top

        def add(carry: Sums, term: tuple[Array, Array | int]) -> tuple[Sums, None]:
            b, p, log_scale = carry
            coefficients, m = term
            b = b + p[..., None, None] * _wide(coefficients, x)
            p = p * (x / (m + 1))
            big = p > _HUGE
            shrink = xp.where(big, 1 / _HUGE, 1.0)
            b, p = b * shrink[..., None, None], p * shrink
            return (b, p, log_scale + xp.where(big, math.log(_HUGE), 0.0)), None

        k = self.num_levels
        carry = (xp.zeros((*x.shape, k + 1, k + 1), x.dtype), xp.ones_like(x), xp.zeros_like(x))
        if xp is np:
            for m, coefficients in enumerate(self._table):
                carry, _ = add(carry, (coefficients, m))
        else:
            terms = (jnp.asarray(self._table, x.dtype), jnp.arange(len(self._table), dtype=x.dtype))
            carry, _ = jax.lax.scan(add, carry, terms)
        b, _, log_scale = carry
        return x, b, log_scale

    def beta(self, tau: Array | float, xp: ModuleType = jnp) -> Array:
        """Distribution of the level at noise time tau: [..., K+1], beta_l = P(tau)[0, l]."""
        x, b, log_scale = self._series(xp.asarray(tau), xp)
        return xp.exp(log_scale - x)[..., None] * _powers(x, self.num_levels, xp) * b[..., 0, :]

    def weight(self, tau: Array | float, xp: ModuleType = jnp) -> Array:
        """NELBO weights per unit tau: [..., K], w_k = r_k beta_{k-1}/beta_k for k = 1..K (docs/theory.md section 3).

        Formed as r_k b_{k-1} / (x b_k), which neither under- nor overflows as tau -> 0.
        """
        x, b, _ = self._series(xp.asarray(tau), xp)
        rates = _wide(xp.asarray(self.rates, x.dtype), x)
        return rates * b[..., 0, :-1] / (x[..., None] * b[..., 0, 1:])

    def unfinished(self, tau: Array | float) -> Array:
        """Share of positions that are not yet the mask."""
        return self.beta(np.asarray(tau), np)[..., :-1].sum(-1)

    def moments(self, tau: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """m = sum_k r_k beta_{k-1} and g = sum_k (r_k beta_{k-1})^2 / beta_k at noise times [J], float64 [J] each."""
        flow = np.asarray(self.rates) * self.beta(tau, np)[:, :-1]
        return flow.sum(-1), (flow * self.weight(tau, np)).sum(-1)

    def transition(self, dtau: Array) -> jax.Array:
        """P(dtau) = expm(dtau G): [..., K+1, K+1], row: level before, column: level after."""
        x, b, log_scale = self._series(jnp.asarray(dtau))
        k = self.num_levels
        climb = np.maximum(np.arange(k + 1)[None] - np.arange(k + 1)[:, None], 0)
        return jnp.exp(log_scale - x)[..., None, None] * _powers(x, k)[..., climb] * b

    def posterior(self, tau_s: Number | np.ndarray, tau_t: Number | np.ndarray) -> jax.Array:
        """Distribution of the level at tau_s given the level at tau_t >= tau_s: [..., K+1, K+1].

        Row k: level at tau_t, column j: level at tau_s; P(s)[0,j] P(t-s)[j,k] / P(t)[0,k] (docs/theory.md section 4).
        tau_t may be inf: then only the row of the mask means anything, and it is beta(tau_s).
        """
        tau_s, tau_t = jnp.broadcast_arrays(jnp.asarray(tau_s), jnp.asarray(tau_t))
        gap = jnp.where(jnp.isinf(tau_t), self.tau_end, tau_t - tau_s)
        x_s, b_s, log_s = self._series(tau_s)
        x_g, b_g, log_g = self._series(gap)
        x_t, b_t, log_t = self._series(tau_t)
        k = self.num_levels
        safe = jnp.where(x_t > 0, x_t, 1.0)
        kept, climbed = _powers(x_s / safe, k), _powers(x_g / safe, k)
        level = np.arange(k + 1)
        drop = np.maximum(level[:, None] - level[None], 0)  # [level at t, level at s]
        ratio = jnp.swapaxes(b_g, -1, -2) * (b_s[..., 0, None, :] / b_t[..., 0, :, None])
        # the three factors e^-x cancel exactly wherever no time was cut off at tau_end
        cut = jnp.exp(log_s + log_g - log_t - x_s - x_g + x_t)[..., None, None]
        post = ratio * kept[..., None, :] * climbed[..., drop] * cut
        post = jnp.where(_wide(level[:, None] >= level[None], x_t), post, 0.0)
        post = jnp.where((x_t > 0)[..., None, None], post, _wide(np.eye(k + 1, dtype=post.dtype), x_t))
        from_mask = _wide((level == k)[:, None], x_t) & jnp.isinf(tau_t)[..., None, None]
        return jnp.where(from_mask, self.beta(tau_s)[..., None, :], post)

    def crossing_times(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Noise times at which positions reach levels 1..K: float32 [*shape, K], increasing along the last axis."""
        return self.times_of(open_uniform(key, (*shape, self.num_levels)))

    def times_of(self, u: jax.Array) -> jax.Array:
        """The same from uniforms u in (0, 1), [..., K]."""
        return jnp.cumsum(-jnp.log1p(-u) / _wide(np.asarray(self.rates, np.float32), u[..., 0]), axis=-1)


def _wide(table: Array, x: Array) -> Array:
    """`table` with leading axes of length 1 so that it broadcasts behind the axes of x."""
    return table.reshape((1,) * x.ndim + table.shape)


def _powers(x: Array, highest: int, xp: ModuleType = jnp) -> Array:
    """x^0 .. x^highest along a new last axis, with 0^0 = 1."""
    powers = [xp.ones_like(x)]
    for _ in range(highest):
        powers.append(powers[-1] * x)
    return xp.stack(powers, axis=-1)


class Timed(Protocol):
    """What a `Proposal` asks of a level chain, or of a process."""

    @property
    def tau_end(self) -> float: ...
    def unfinished(self, tau: float) -> Array: ...
    def moments(self, tau: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


class Proposal:
    """A density q over noise time with little variance for evaluation (docs/theory.md section 3, "Variance").

    q_a ~ sqrt((g - m^2)/S + a m^2), tabulated: linear between `knots` [J+1] float64, the first of which is 0 and the
    last where all crossings are done to 1e-9. `cdf` [J+1] is what is sampled and `slope` [J] what is divided by,
    so that an estimate is unbiased whatever the table's resolution.

    Args:
      chain: the level chain, or a process that has the same three.
      tokens: S, positions that share one tau.
      cv2: a, the squared coefficient of variation of the cost C between sequences (1 for independent draws).
      knots: J.
    """

    def __init__(self, chain: Timed, tokens: int, cv2: float = 0.03, knots: int = 4096) -> None:
        lo, hi = 0.0, chain.tau_end
        for _ in range(60):
            mid = (lo + hi) / 2
            lo, hi = (mid, hi) if chain.unfinished(mid) > 1e-9 else (lo, mid)
        tau = np.geomspace(1e-14, hi, knots)
        m, g = chain.moments(tau)
        density = np.sqrt(np.maximum(g - m**2, 0) / tokens + cv2 * m**2)
        mass = np.diff(np.log(tau)) * 0.5 * ((density * tau)[1:] + (density * tau)[:-1])
        mass = np.concatenate([[2 * density[0] * tau[0]], mass])  # q ~ tau^-1/2 at 0
        self.knots = np.concatenate([[0.0], tau])
        self.cdf = np.concatenate([[0.0], np.cumsum(mass / mass.sum())])
        self.cdf[-1] = 1.0
        self.slope = np.diff(self.cdf) / np.diff(self.knots)

    def quantile(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """u in [0, 1) of any shape -> (tau, q(tau)), float64."""
        j = np.clip(np.searchsorted(self.cdf, u, side="right") - 1, 0, len(self.slope) - 1)
        return self.knots[j] + (u - self.cdf[j]) / self.slope[j], self.slope[j]
