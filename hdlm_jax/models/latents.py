"""Latents shorter than the text, written first: diffusion.latents (docs/continuous.md, docs/theory.md section 10).

A trained encoder makes a vector e_p of every S/P tokens of the clean text (Cosmos, arXiv 2506.21170; LaDiR, arXiv
2510.04573), |e_p|^2 = D, of which a noisy observation is on show,

    U_p(s) = s e_p + sqrt(s) eps,   eps standard normal,   log(1 + s(t)) = 2 (1-t) log(1 + s_max) for t in [1/2, 1],

and s stays at s_max for t < 1/2. Seen backwards: s grows from 0 while all words are masks, then symbols fall. U is a
known noising of the text, so that the bound is exact whatever the encoder, and training goes by the bound itself, with
slopes through e and U (eps stays). The network sees U at P places in front of the row, those of `models.features`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.common.parallel import Tree
from hdlm_jax.config import LATENT_METHODS, Config
from hdlm_jax.diffusion.draws import Array, fold, row_keys
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.levels import LevelChain, Proposal
from hdlm_jax.diffusion.prediction import LogitsPrediction, Prediction
from hdlm_jax.diffusion.process import Process
from hdlm_jax.models import channel, channel_times
from hdlm_jax.models.features import given
from hdlm_jax.models.heads import FlatHead
from hdlm_jax.models.network import Network

ENCODER, MEAN = "encoder", "mean"  # names of the parameters of e, and among the head's of its estimate


class LatentState(NamedTuple):
    """What a row shows: z int32 [B, S], symbols; u float32 [B, S, D P/S], observations, each token holding its share of
    its group's D numbers; s float32 [B, S], of what ratio; e, of u's shape: the clean latents, which a loss needs."""

    z: jax.Array
    u: jax.Array
    s: jax.Array
    e: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.z.shape


class WithError(LogitsPrediction):
    """A prediction from logits [..., V] that knows error [...], |e_p - its estimate|^2 / 2 at a group's first token."""

    def __init__(self, logits: jax.Array, hierarchy: Hierarchy, error: jax.Array) -> None:
        super().__init__(logits, hierarchy)
        self.error = error


# ---- encoder ---------------------------------------------------------------------------------------------------------


def init_encoder(key: jax.Array, vocab_size: int, per: int, width: int) -> Tree:
    """Parameters of `encode`: table [V, D], mix [per D, 2D], bias [2D], onto [2D, D]."""
    table, mix, onto = jax.random.split(key, 3)
    return {"table": jax.random.normal(table, (vocab_size, width)),
            "mix": jax.random.normal(mix, (per * width, 2 * width)) / math.sqrt(per * width),
            "bias": jnp.zeros(2 * width), "onto": jax.random.normal(onto, (2 * width, width)) / math.sqrt(2 * width)}


def encode(params: Tree, x: jax.Array, per: int) -> jax.Array:
    """Latents [B, S/per, D] of tokens x int32 [B, S]: the embeddings of `per` of them side by side, a hidden layer, and
    a vector of length sqrt(D)."""
    v = params["table"][x]
    v = v.reshape(len(x), -1, per * v.shape[-1])
    e = jax.nn.gelu(v @ params["mix"] + params["bias"].reshape(1, 1, -1)) @ params["onto"]
    return e * math.sqrt(e.shape[-1]) * jax.lax.rsqrt(jnp.sum(e * e, axis=-1, keepdims=True) + 1e-12)


# ---- network ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class LatentHead(FlatHead):
    """A flat head on hidden states [..., width + 1], the last of which is the error of a latent; and a linear one for
    latents, "mean" [width, D], which starts at 0."""

    latent: int = 64  # D

    def init(self, key: jax.Array, width: int) -> Tree:
        return super().init(key, width) | {MEAN: {"kernel": jnp.zeros((width, self.latent)),
                                                  "bias": jnp.zeros(self.latent)}}

    def predict(self, params: Tree, h: jax.Array) -> Prediction:
        return WithError(self.logits(params, h[..., :-1]), self.hierarchy, h[..., -1])


class LatentNetwork(Network):
    """The network on a `LatentState`, its features the latents' observations.

    per: tokens of a latent. It is told the symbols' masking level, min(2t, 1), and by the features s.
    """

    per: int = 8

    @property
    def of_words(self) -> Network:
        """The network of the symbols behind latents that are given, on rows of P + S places; the same parameters."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(Network) if f.name not in ("parent", "name")}
        return Network(**own | {"head": FlatHead(self.head.hierarchy, cast(FlatHead, self.head).dtype)}, parent=None)

    def init_params(self, key: jax.Array, seq_len: int) -> Tree:
        width = cast(LatentHead, self.head).latent
        encoder = init_encoder(jax.random.fold_in(key, 1), self.head.hierarchy.vocab_size, self.per, width)
        return super().init_params(key, seq_len + self.features[0]) | {ENCODER: encoder}

    def read(self, params: Tree, z: LatentState, t: jax.Array, segment: jax.Array | None = None,
             dropout: jax.Array | None = None) -> jax.Array:
        """Hidden states of the latents and the tokens, float32 [B, P + S, width]; latents see what the first token
        does."""
        told = given(params, told_of(z, self.per))
        if segment is not None:
            segment = in_front(segment, segment[:, :1], self.features[0])
        canvas = in_front(z.z, 0, self.features[0])
        return self.of_words.hidden(told, canvas, jnp.minimum(2 * t, 1.0), segment, dropout)

    def estimate(self, params: Tree, h: jax.Array) -> jax.Array:
        """e^ float32 [B, P, D] from what `read` gives."""
        mean, h = params["head"][MEAN], h[:, : self.features[0]]
        return jnp.matmul(h, mean["kernel"], precision="highest") + mean["bias"].reshape(1, 1, -1)

    def hidden(self, params: Tree, z: Any, t: jax.Array, segment: jax.Array | None = None,
               dropout: jax.Array | None = None, clean: jax.Array | None = None) -> jax.Array:
        """As of Network, of the tokens alone, and behind them the error at a group's first token, 0 at the others."""
        h, places = self.read(params, z, t, segment, dropout), self.features[0]
        e = cast(jax.Array, z.e).reshape(len(h), places, -1)
        error = 0.5 * jnp.sum((e - self.estimate(params, h)) ** 2, axis=-1, keepdims=True)
        error = jnp.pad(error, ((0, 0), (0, 0), (0, self.per - 1))).reshape(len(h), -1, 1)
        return jnp.concatenate([h[:, places:], error], axis=-1)


def in_front(a: jax.Array, value: Any, places: int) -> jax.Array:
    """a [B, S] behind so many places that hold `value`."""
    return jnp.concatenate([jnp.broadcast_to(jnp.asarray(value, a.dtype), (len(a), places)), a], axis=1)


def told_of(z: LatentState, per: int) -> jax.Array:
    """Features float32 [B, P, D + 2 WAVES] of the latents' observations and their ratios."""
    s = z.s[:, ::per]
    return channel.view(z.u.reshape(*s.shape, -1), s)


# ---- process ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class LatentProcess(HierarchicalProcess):
    """A hierarchical process behind latents, whose states are `LatentState`s; it takes predictions `WithError`.

    Symbols climb in t < 1/2 on time 2t, the latents are noised in t >= 1/2. One of the two moves at a time, and weight
    and loss are of that one.

    Args:
      hierarchy, chain, xi, force_transition: as of HierarchicalProcess. per: tokens of a latent. width: D.
      ratio_end: s_max > 0. encoder: parameters of `encode`; None: `with_params` gives them, which draws need.

    Raises:
      ValueError: as of HierarchicalProcess; a ratio that is not positive.
    """

    per: int = 8
    width: int = 64
    ratio_end: float = 1.0
    encoder: Tree | None = None
    unmasks = False  # by its own way back alone
    methods = LATENT_METHODS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ratio_end > 0:
            raise ValueError(f"ratio_end={self.ratio_end}: must be positive; without latents take HierarchicalProcess")

    @property
    def symbols(self) -> HierarchicalProcess:
        """That of the symbols alone, on their own time."""
        return HierarchicalProcess(self.hierarchy, self.chain, self.xi, self.force_transition)

    def with_params(self, params: Tree) -> LatentProcess:
        return dataclasses.replace(self, encoder=params[ENCODER])

    # -- schedule --------------------------------------------------------------------------------------------------

    def at(self, share: Any, xp: ModuleType = jnp) -> Any:
        """s when a share of the latents' half of the way back is done."""
        return xp.expm1(math.log1p(self.ratio_end) * share)

    def ratio(self, tau: Array, xp: ModuleType = jnp) -> Array:
        """s(tau), of tau's shape; 0 at infinity."""
        return self.at(xp.minimum(2 * xp.exp(-tau), 1.0), xp)

    def gain(self, tau: Array, xp: ModuleType = jnp) -> Array:
        """-ds/dtau, of tau's shape; 0 where the symbols fall."""
        slope = math.log1p(self.ratio_end) * 2 * xp.exp(-tau) * (1 + self.ratio(tau, xp))
        return xp.where(self._symbols_stay(tau, xp), slope, 0.0)

    @staticmethod
    def _symbols_stay(tau: Array, xp: ModuleType = jnp) -> Array:
        return channel_times.symbols_last(tau, xp)[1] == 0

    # -- forward ---------------------------------------------------------------------------------------------------

    def noised(self, key: jax.Array, x: jax.Array, tau: jax.Array, score: jax.Array) -> tuple[Any, jax.Array]:
        """(LatentState, level): symbols as of HierarchicalProcess; where the latents move level K at the first token of
        every group, scored or not, as all latents are to be paid for, and 0 at the others."""
        keys = row_keys(key, len(x))
        z, level = super().noised(keys, x, jnp.asarray(channel_times.symbols_last(tau)[0]), score)
        e = encode(cast(Tree, self.encoder), x, self.per)
        s = jnp.asarray(self.ratio(tau))[:, None, None]
        eps = jax.vmap(lambda k: jax.random.normal(k, e.shape[1:], e.dtype))(fold(keys, 3))
        e, u = (a.reshape(*x.shape, -1) for a in (e, s * e + jnp.sqrt(s) * eps))
        first = jnp.where(jnp.arange(x.shape[1]) % self.per == 0, self.num_levels, 0)[None]
        level = jnp.where(jnp.asarray(self._symbols_stay(tau))[:, None], first, level)
        return LatentState(z, u, jnp.broadcast_to(s[..., 0], x.shape), e), level

    def shares(self) -> np.ndarray:
        first, none = np.eye(self.num_levels + 1)[-1] / self.per, np.eye(self.num_levels + 1)[0] * (1 - 1 / self.per)
        return 0.5 * (super().shares() + first + none)

    # -- objective -------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> tuple[Callable[..., jax.Array], ...]:
        return self.symbol_loss, self.latent_loss

    def symbol_loss(self, prediction: Prediction | jax.Array, x: jax.Array, z: jax.Array | LatentState,
                    levels: tuple[int, ...] | None = None, hard_training: bool = False, *, tau: jax.Array) -> jax.Array:
        """The token loss of the symbols alone, given U(s_max), where they fall. By itself no bound."""
        found = super().token_loss(prediction, x, cast(LatentState, z).z, levels)
        return jnp.where(channel.along(jnp.asarray(self._symbols_stay(tau)), x), 0.0, found)

    def latent_loss(self, prediction: Prediction | jax.Array, x: jax.Array, z: jax.Array | LatentState,
                    levels: tuple[int, ...] | None = None, *, tau: jax.Array) -> jax.Array:
        """|e_p - e^_p|^2 / 2 where s grows."""
        return jnp.where(channel.along(jnp.asarray(self._symbols_stay(tau)), x), cast(WithError, prediction).error, 0.0)

    def token_loss(self, prediction: Prediction | jax.Array, x: jax.Array, z: jax.Array | LatentState,
                   levels: tuple[int, ...] | None = None, hard_training: bool = False, *,
                   tau: jax.Array | None = None) -> jax.Array:
        """Both losses, one of which is 0; hard_training is refused."""
        if hard_training:
            raise ValueError("hard_training: latents go by the bound itself; leave it out")
        at = cast(jax.Array, tau)
        return self.symbol_loss(prediction, x, z, levels, tau=at) + self.latent_loss(prediction, x, z, levels, tau=at)

    def nelbo_weight(self, z: jax.Array | LatentState, tau: jax.Array, x: jax.Array | None = None) -> jax.Array:
        """The rate of what moves: w_k of the symbols, of a latent -ds/dtau; of z's shape."""
        symbols = cast(LatentState, z).z
        theta, slope, gain = (channel.along(jnp.asarray(a), symbols) for a in (
            *channel_times.symbols_last(tau), self.gain(tau)))
        return jnp.where(slope == 0, gain, slope * super().nelbo_weight(symbols, theta))

    def loss_weight(self, z: jax.Array | LatentState, tau: jax.Array, weighting: str = "none", weight_min: float = 0.0,
                    weight_max: float = jnp.inf, *, x: jax.Array | None = None) -> jax.Array:
        """The bound's own for t uniform. ValueError: another weighting, by which the encoder would learn otherwise."""
        if weighting != "none":
            raise ValueError(f"weighting={weighting!r}: latents go by the bound itself, 'none'")
        return self.nelbo_weight(z, tau) * jnp.exp(tau)[:, None]

    # -- evaluation ------------------------------------------------------------------------------------------------

    @property
    def tau_end(self) -> float:
        """As of levels.Timed, for `proposal`."""
        return 40.0

    def unfinished(self, tau: Array | float) -> Array:
        """As of levels.Timed: share of the latents' half that is still to come."""
        return np.minimum(2 * np.exp(-np.asarray(tau)), 1.0)

    def moments(self, tau: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As of ChannelProcess: U leaves R(s) = 1/(1 + a s) of a text, a = D / (2 nats of a latent's tokens), which
        costs D/2 at s = 0 and spreads as a sum of D P squares; the symbols cost R(s_max) of what they would."""
        a = 0.5 * self.width / (channel.NATS * self.per)
        theta, slope = channel_times.symbols_last(tau, np)
        m, g = self.chain.moments(np.asarray(theta))
        left = slope / (1 + a * self.ratio_end)
        rate = self.num_levels * a * self.gain(tau, np) / (1 + a * self.ratio(tau, np)) ** 2
        spread = rate**2 * (1 + 2 * self.per / self.width)
        return np.where(slope == 0, rate, left * m), np.where(slope == 0, spread, left**2 * g)

    def proposal(self, tokens: int, cv2: float) -> Proposal:
        """Noise times for evaluation, with little variance."""
        return Proposal(self, tokens, cv2)


def make(config: Config, hierarchy: Hierarchy, chain: LevelChain) -> Process:
    """The process of diffusion.latents or diffusion.channel."""
    d = config.diffusion
    if not d.latents:
        return channel_times.make(d, hierarchy, chain)
    return LatentProcess(hierarchy, chain, d.xi, d.force_transition, config.model.seq_len // d.latents, d.latents_width,
                         d.latents_ratio)
