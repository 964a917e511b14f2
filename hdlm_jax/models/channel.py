"""A continuous channel beside the symbols: diffusion.channel (docs/continuous.md, docs/theory.md section 10).

Beside its symbol a token that is not known yet shows a noisy observation of its embedding (CCDD, arXiv 2510.03206),

    U(s) = s e(x) + sqrt(s) eps,   eps standard normal,   s(tau) = c / (e^tau - 1) = c (1-t)/t,

for one signal-to-noise ratio s per row (models.channel_times has other times). Seen from the words it is evidence, a
bias U.e(w) - s |e(w)|^2 / 2 on their logits; on the way back U gains d e(w) + sqrt(d) eps for a word w drawn from p,
the same that moves the symbol. e is a frozen parameter, "signal" [V, D], among those of the head. It carries the
evidence's numbers in the last columns of the hidden states, so that losses, bounds and samplers take predictions from
`ChannelHead` as from any other.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from hdlm_jax.common.parallel import Tree
from hdlm_jax.diffusion.draws import Array, Number, fold, row_keys
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.levels import Proposal
from hdlm_jax.diffusion.prediction import LogitsPrediction, Prediction
from hdlm_jax.models.heads import FlatHead
from hdlm_jax.models.network import Network

SIGNAL = "signal"  # name of the parameter e
KNOWN = 1e4  # s at which tokens that are known are shown, without noise
TAU_MIN = 1e-4  # s stays as it is below this noise time, which keeps it finite and every bound exact
WAVES = 4  # pairs of sinusoids that tell a network s
NATS = 5.0  # of a token, where evaluation expects it: it only shapes the proposal


class State(NamedTuple):
    """What positions show: z int32 [...], symbols; u float32 [..., D], observations; s float32 [...], of what ratio.

    gain: float32 [..., D], what u gains at its next jump: a draw that prices it (models.channel_times), not on show.
    told: float32 [...], the ratio that a network is told, where it is not s.
    """

    z: jax.Array
    u: jax.Array
    s: jax.Array
    gain: jax.Array | None = None
    told: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.z.shape


class Observed(LogitsPrediction):
    """A prediction from logits [..., V], evidence and all, that knows e [V, D]."""

    def __init__(self, logits: jax.Array, hierarchy: Hierarchy, signal: jax.Array) -> None:
        super().__init__(logits, hierarchy)
        self.signal = signal

    def select(self, index: jax.Array) -> Observed:
        return Observed(super().select(index).logits, self.hierarchy, self.signal)


def evidence(u: jax.Array, s: jax.Array, signal: jax.Array) -> jax.Array:
    """log p(u | w) up to what all words w share, u.e(w) - s |e(w)|^2 / 2: float32 [..., V]; u [..., D], s [...]."""
    said = jnp.einsum("...d,vd->...v", u, signal, precision="highest")
    return said - jnp.einsum("...,v->...v", s, 0.5 * jnp.sum(signal * signal, axis=-1))


def mean_error(p: Prediction, signal: jax.Array, x: jax.Array) -> jax.Array:
    """|e(x) - sum_w p(w) e(w)|^2 / 2, of x's shape."""
    mean = jnp.matmul(jnp.exp(p.log_probs()), signal, precision="highest")
    return 0.5 * jnp.sum((signal[x] - mean) ** 2, axis=-1)


def view(u: jax.Array, s: jax.Array, told: jax.Array | None = None) -> jax.Array:
    """What networks see, float32 [..., D + 2 WAVES]: u [..., D] at a size of about 1 (0 where it says nothing, e where
    it says all), and log(1 + s D) as sinusoids, s [...] or what is told for it."""
    s, told, width = s[..., None], (s if told is None else told)[..., None], u.shape[-1]
    angle = jnp.log1p(told * width) * 2.0 ** -jnp.arange(WAVES).reshape(*(1,) * (s.ndim - 1), -1)
    return jnp.concatenate([u / jnp.sqrt((s + 1 / width) * (s + 1)), jnp.sin(angle), jnp.cos(angle)], axis=-1)


def along(values: jax.Array, like: jax.Array) -> jax.Array:
    """values [B] or of like's shape, with axes behind that broadcast to it."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def standardised(vectors: np.ndarray, width: int) -> np.ndarray:
    """e float32 [V, D] from the words' vectors [V, E]: unit rows less their mean, the leading D directions (zeros,
    where there are fewer), scaled so that |e|^2 is D on average; rows of zeros (nothing is known) stay zero."""
    vectors = np.asarray(vectors, np.float64)
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    known = norm[:, 0] > 0
    unit = vectors[known] / norm[known]
    unit -= unit.mean(0)
    leading = np.linalg.svd(unit.T @ unit)[0][:, :width]
    out = np.zeros((len(vectors), width))
    out[known, : leading.shape[1]] = unit @ leading
    return (out * math.sqrt(1 / max(np.mean(out[known] ** 2), 1e-30))).astype(np.float32)


def with_signal(params: Tree, signal: jax.Array | np.ndarray) -> Tree:
    """A network's parameters with e [V, D]."""
    return {**params, "head": {**params["head"], SIGNAL: signal}}


def frozen(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, e but for which it moves everything."""
    def kind(path: tuple[Any, ...], leaf: jax.Array) -> str:
        return SIGNAL if path[-1].key == SIGNAL else "rest"

    rules = {SIGNAL: optax.set_to_zero(), "rest": tx}
    return optax.multi_transform(rules, lambda params: jax.tree_util.tree_map_with_path(kind, params))


# ---- network ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelHead(FlatHead):
    """A flat head on hidden states [..., width + D + 1], the last D + 1 of which are u and s: parameters kernel, bias
    and e, random until `with_signal`."""

    channel: int = 32  # D
    uses = ("kernel", "bias", SIGNAL)

    def init(self, key: jax.Array, width: int) -> Tree:
        return super().init(key, width) | {SIGNAL: jax.random.normal(key, (self.hierarchy.vocab_size, self.channel))}

    def logits(self, params: Tree, h: jax.Array) -> jax.Array:
        d = self.channel + 1
        seen = evidence(h[..., -d:-1], h[..., -1], jax.lax.stop_gradient(params[SIGNAL]))
        return super().logits(params, h[..., :-d]) + seen

    def predict(self, params: Tree, h: jax.Array) -> Prediction:
        return Observed(self.logits(params, h), self.hierarchy, jax.lax.stop_gradient(params[SIGNAL]))


class ChannelNetwork(Network):
    """The network on a `State`: u and s are added to the embeddings of the symbols, through a kernel that starts at 0.

    channel: D.
    """

    channel: int = 32

    def setup(self) -> None:
        super().setup()
        self.observe = nn.Dense(self.width, use_bias=False, kernel_init=nn.initializers.zeros_init())

    def init_params(self, key: jax.Array, seq_len: int) -> Tree:
        shape = (1, seq_len)
        z = State(jnp.zeros(shape, jnp.int32), jnp.zeros((*shape, self.channel)), jnp.zeros(shape))
        return self.init(key, z, jnp.zeros((1,)))["params"]

    def shown(self, z: Any) -> jax.Array:
        return super().shown(z.z) + self.observe(view(z.u, z.s, z.told))

    def trunk(self, z: Any, t: jax.Array, segment: jax.Array | None = None, train: bool = False) -> jax.Array:
        """As of Network, and u and s behind the hidden vectors: float32 [B, S, width + D + 1]."""
        return jnp.concatenate([super().trunk(z, t, segment, train), z.u, z.s[..., None]], axis=-1)


# ---- process ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelProcess(HierarchicalProcess):
    """A hierarchical process whose states are `State`s; the predictions that it takes are `Observed`.

    Args:
      hierarchy, chain, xi, force_transition: as of HierarchicalProcess; the transition must be cavity.
      scale: c > 0. width: D.
      signal: e float32 [V, D]; None: `with_params` gives it, which draws need.
      levels: (s_max / c,), where s stops (the floor of noise of DINOISER, arXiv 2302.10025); (): c / TAU_MIN or so.

    Raises:
      ValueError: as of HierarchicalProcess; another transition, a scale that is not positive, levels that do not fall.
    """

    scale: float = 0.1
    width: int = 32
    signal: jax.Array | None = None
    levels: tuple[float, ...] = ()
    unmasks = False  # by its own way back alone

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.force_transition != "cavity":
            raise ValueError(f"force_transition={self.force_transition!r}: a channel is exact for cavity alone")
        if not self.scale > 0:
            raise ValueError(f"scale={self.scale}: must be positive; without a channel take HierarchicalProcess")
        if not all(a > b for a, b in itertools.pairwise((*self.levels, 0.0))):
            raise ValueError(f"levels={self.levels}: must be positive and fall")

    def with_params(self, params: Tree) -> ChannelProcess:
        return dataclasses.replace(self, signal=jax.lax.stop_gradient(params["head"][SIGNAL]))

    # -- schedule --------------------------------------------------------------------------------------------------

    @property
    def tau_min(self) -> float:
        """Noise time of the channel below which s stays as it is."""
        return max(TAU_MIN, math.log1p(1 / self.levels[0])) if self.levels else TAU_MIN

    def symbol_time(self, tau: Array, xp: ModuleType = jnp) -> tuple[Array, Array | float]:
        """(noise time of the symbols' chain, its slope), of tau's shape."""
        return tau, 1.0

    def signal_time(self, tau: Array, xp: ModuleType = jnp) -> Array:
        """Noise time of the channel, of tau's shape, whose slope is 1 wherever s moves."""
        return tau

    def ratio(self, tau: Array, xp: ModuleType = jnp) -> Array:
        """s(tau), of tau's shape; 0 at infinity."""
        return self.scale / xp.expm1(xp.maximum(self.signal_time(tau, xp), self.tau_min))

    def gain(self, tau: Array, xp: ModuleType = jnp) -> Array:
        """-ds/dtau, of tau's shape: what U gains on the way back per unit of noise time."""
        tau, low = self.signal_time(tau, xp), self.tau_min
        later = xp.maximum(tau, low)
        return xp.where(tau < low, 0.0, self.scale / (xp.expm1(later) * -xp.expm1(-later)))

    def ratios(self, keys: jax.Array, tau: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """s of all positions at noise times tau [B], [B, 1] or [B, S], float32 of `shape` [B, S]; keys [B], where s is
        drawn."""
        return jnp.broadcast_to(jnp.asarray(self.ratio(tau)).reshape(len(tau), -1), shape)

    def jumps(self, keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Noise times at which s jumps, float32 [B, S, M] increasing; keys [B], those of `ratios`. M = 0: it flows."""
        return jnp.zeros((*shape, 0))

    # -- forward ---------------------------------------------------------------------------------------------------

    def state(self, z: jax.Array, u: jax.Array, s: jax.Array) -> State:
        """The State of symbols z [...] with observations u [..., D] at s, which broadcasts to z's shape; tokens that
        are known show e itself."""
        table: Any = self.signal
        known = z < self.vocab_size
        clean = KNOWN * table[jnp.where(known, z, 0)]
        return State(z, jnp.where(known[..., None], clean, u), jnp.where(known, KNOWN, jnp.broadcast_to(s, z.shape)))

    def noised(self, key: jax.Array, x: jax.Array, tau: jax.Array, score: jax.Array) -> tuple[Any, jax.Array]:
        """(State, level): symbols as of HierarchicalProcess, beside them observations of x at their ratios."""
        table: Any = self.signal
        keys = row_keys(key, len(x))
        s = self.ratios(fold(keys, 4), tau, x.shape)
        z, level = super().noised(keys, x, jnp.asarray(self.symbol_time(tau)[0]), score)
        eps = jax.vmap(lambda k: jax.random.normal(k, (x.shape[1], self.width)))(fold(keys, 3))
        return self.state(z, s[..., None] * table[x] + jnp.sqrt(s)[..., None] * eps, s), level

    # -- objective -------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> tuple[Callable[..., jax.Array], ...]:
        return self.symbol_loss, self.signal_loss

    def needs(self, hard_training: bool = False) -> str:
        return "tokens"

    def symbol_loss(self, prediction: Prediction | jax.Array, x: jax.Array, z: jax.Array | State,
                    levels: tuple[int, ...] | None = None, hard_training: bool = False, *,
                    tau: jax.Array | None = None) -> jax.Array:
        """The token loss of the symbols alone. It is no bound: U, which is on show, has told much of the word."""
        return super().token_loss(prediction, x, cast(State, z).z, levels, hard_training)

    def signal_loss(self, prediction: Prediction | jax.Array, x: jax.Array, z: jax.Array | State,
                    levels: tuple[int, ...] | None = None, *, tau: jax.Array) -> jax.Array:
        """|e(x) - sum_w p(w) e(w)|^2 / 2 times -ds/dtau over the weight of the symbols' loss: in its units, nats."""
        p, state = cast(Observed, prediction), cast(State, z)
        error = mean_error(self.forced(p, state.z, levels), p.signal, x)
        weight, gain = self.nelbo_weight(state, tau), along(jnp.asarray(self.gain(tau)), state.z)
        return jnp.where(weight > 0, gain / jnp.where(weight > 0, weight, 1.0), 0.0) * error

    def token_loss(self, prediction: Prediction | jax.Array, x: jax.Array, z: jax.Array | State,
                   levels: tuple[int, ...] | None = None, hard_training: bool = False, *,
                   tau: jax.Array | None = None) -> jax.Array:
        """Both losses; with hard_training -log p(x | z, u) alone, at every level."""
        symbols = self.symbol_loss(prediction, x, z, levels, hard_training, tau=tau)
        if hard_training:
            return symbols
        return symbols + self.signal_loss(prediction, x, z, levels, tau=cast(jax.Array, tau))

    def nelbo_weight(self, z: jax.Array | State, tau: jax.Array, x: jax.Array | None = None) -> jax.Array:
        return super().nelbo_weight(cast(State, z).z, tau)

    def loss_weight(self, z: jax.Array | State, tau: jax.Array, weighting: str = "constant", weight_min: float = 0.0,
                    weight_max: float = jnp.inf, *, x: jax.Array | None = None) -> jax.Array:
        return super().loss_weight(cast(State, z).z, tau, weighting, weight_min, weight_max)

    # -- evaluation ------------------------------------------------------------------------------------------------

    @property
    def tau_end(self) -> float:
        """As of levels.Timed, for `proposal`."""
        return self.chain.tau_end

    def unfinished(self, tau: Array | float) -> Array:
        """As of levels.Timed: share of positions that are not yet the mask."""
        return self.chain.unfinished(tau)

    def moments(self, tau: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and second moment of the NELBO's rate at noise times [J], in units of one level's cross-entropy.

        What U leaves of a token is taken as R(s) = 1/(1 + a s), a = D / (2 nats of a token): the symbols cost R of what
        they would, and U costs -dR/ds. At s = 0 that is D/2, the cost of the mean; at any s both add up to the token.
        """
        a, k = 0.5 * self.width / NATS, np.arange(1, self.num_levels + 1)
        symbols, slope = self.symbol_time(tau, np)
        left, gain, slope = (np.broadcast_to(v, tau.shape)[:, None] for v in (
            1 / (1 + a * self.ratio(tau, np)), self.gain(tau, np), slope))
        rate = left * (slope * np.asarray(self.chain.weight(symbols, np)) + a * k * left * gain)
        share = np.asarray(self.chain.beta(symbols, np))[:, 1:]
        return (share * rate).sum(-1), (share * rate * rate).sum(-1)

    def proposal(self, tokens: int, cv2: float) -> Proposal:
        """Noise times for evaluation, with little variance."""
        return Proposal(self, tokens, cv2)

    # -- reverse ---------------------------------------------------------------------------------------------------

    def step(self, keys: jax.Array, prediction: Prediction, state: State, target: jax.Array, s: jax.Array,
             temperature: Number = 1.0, top_p: Number = 1.0) -> tuple[State, jax.Array]:
        """What positions become where their level falls to `target` int32 [...] and U's ratio rises to s [...].

        One word w ~ p(x | z, U) a position moves both: its symbol shows w at the target level, and U gains
        d e(w) + sqrt(d) eps. That is the law of a token's next state for any length of step; with the mean of e in
        place of e(w) it is so for short ones alone. Known tokens stay.

        Args:
          keys: [...], one a position. prediction: `Observed`, of the same shape. temperature, top_p: of w's law.

        Returns:
          (state, p(w) float32 [...]).
        """
        table: Any = self.signal
        z, level = state.z, self.level_of(state.z)
        p = self.forced(prediction, z)
        w = p.draw(fold(keys, 0), level > 0, temperature, top_p)
        out = jnp.where(target == 0, w, z)
        for j in range(1, self.num_levels):
            node = self._anc(j, w) if self.xi == 1 else self._draw_node(fold(keys, 1), w, z, level, j)
            out = jnp.where(target == j, node + self.hierarchy.offsets[j], out)
        gained = jnp.maximum(s - state.s, 0.0)
        eps = jax.vmap(lambda k: jax.random.normal(k, (self.width,)))(fold(keys, 2).reshape(-1))
        u = state.u + gained[..., None] * table[w] + jnp.sqrt(gained)[..., None] * eps.reshape(state.u.shape)
        return self.state(jnp.where(target < level, out, z), u, s), jnp.exp(p.log_prob(w))
