"""The hierarchical process: corruption, the exact NELBO, the reverse step (docs/theory.md sections 2 to 4).

A token becomes its cluster, that its own cluster, and so on to the mask. MDLM is the case of a single level.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.config import CLUSTERS, FORCE_TRANSITIONS, WEIGHTINGS
from hdlm_jax.diffusion.draws import Array, Number, fold, row_keys, token_keys, wide
from hdlm_jax.diffusion.levels import LevelChain, Proposal, open_uniform
from hdlm_jax.diffusion.prediction import Prediction, TripCount, finite, log_sum
from hdlm_jax.diffusion.process import Process


@dataclasses.dataclass(frozen=True, eq=False)
class HierarchicalProcess(Process):
    """Tokens -> clusters -> ... -> mask of a `hierarchy`; `chain` says when (docs/theory.md).

    Args:
      hierarchy: hdlm_jax.diffusion.hierarchy.Hierarchy.
      chain: LevelChain with as many rates as the hierarchy has levels above the tokens.
      xi: probability that a token goes to its own cluster on its first crossing, in (1/n_1, 1]; 1 if n_1 = 1.
      force_transition: what a prediction becomes at a position that shows a cluster: none, within, between or cavity.

    Raises:
      ValueError: a wrong number of rates, xi out of range, an unknown force transition.
    """

    chain: LevelChain
    xi: float = 1.0
    force_transition: str = "cavity"
    unmasks = True

    def __post_init__(self) -> None:
        levels, n1 = self.hierarchy.num_levels, self.hierarchy.sizes[1]
        if self.chain.num_levels != levels:
            raise ValueError(f"rates={self.chain.rates}: the hierarchy {self.hierarchy.sizes} needs {levels} of them")
        if n1 == 1 and self.xi != 1:
            raise ValueError(f"xi={self.xi}: with a single cluster there is no other to go to, so xi must be 1")
        if not 1 / n1 < self.xi <= 1 and n1 > 1:
            raise ValueError(f"xi={self.xi}: must lie in (1/n, 1] = ({1 / n1:.4g}, 1] for n = {n1} clusters")
        if self.force_transition not in FORCE_TRANSITIONS:
            choices = ', '.join(FORCE_TRANSITIONS)
            raise ValueError(f"force_transition={self.force_transition!r}: choose one of {choices}")

    @property
    def leak(self) -> float:
        """d: probability of each wrong cluster on the first crossing."""
        n1 = self.hierarchy.sizes[1]
        return (1 - self.xi) / (n1 - 1) if n1 > 1 else 0.0

    @property
    def _stays_under(self) -> bool:
        """Whether a token drawn at a cluster always lies under it, so that its own ancestor is the exact next node."""
        return self.xi == 1 and (self.force_transition != "none" or self.num_levels <= 2)

    # -- states ----------------------------------------------------------------------------------------------------

    def node_of(self, z: jax.Array, level: int) -> jax.Array:
        """Node of each state within `level` (0 where it is of another level)."""
        h = self.hierarchy
        return jnp.where(self.level_of(z) == level, z - h.offsets[level], 0)

    def _anc(self, level: int, x: jax.Array) -> jax.Array:
        return jnp.asarray(self.hierarchy.anc[level])[x]

    def _under(self, z: jax.Array, level: int, of: int) -> jax.Array:
        """[..., n_of]: is node u of level `of` under the node of level `level` that z shows?"""
        return wide(self.ancestors(of, level), z) == self.node_of(z, level)[..., None]

    def ancestors(self, low: int, high: int) -> np.ndarray:
        """[n_low] ancestors at level `high` of the nodes of level `low`."""
        up = np.arange(self.hierarchy.sizes[low], dtype=np.int32)
        for level in range(low, high):
            up = np.asarray(self.hierarchy.parents[level])[up]
        return up

    def state_above(self, low: int, node: jax.Array, high: int) -> jax.Array:
        """State of level `high` above each node of level `low`."""
        return jnp.asarray(self.ancestors(low, high))[node] + self.hierarchy.offsets[high]

    def _count(self, level: int) -> np.ndarray:
        """[n_level] N_level(v), level-1 nodes under each node, as float64 (numpy)."""
        return np.asarray(self.hierarchy.level1_count[level], float)

    # -- forward ---------------------------------------------------------------------------------------------------

    def corrupt(self, key: jax.Array, x: jax.Array, *, tau: jax.Array) -> jax.Array:
        """Noise tokens x int32 [B, S] to noise times tau [B]: states int32 [B, S] (docs/theory.md section 2).

        `key` is one key (row b then uses fold_in(key, b)) or one key per row.
        """
        chex.assert_rank([x, tau], [2, 1])
        keys = row_keys(key, x.shape[0])
        times = jax.vmap(lambda k: self.chain.crossing_times(k, x.shape[1:]))(fold(keys, 0))
        return self.shown(keys, x, jnp.sum(times <= tau[:, None, None], axis=-1))

    def shown(self, keys: jax.Array, x: jax.Array, level: jax.Array) -> jax.Array:
        """States int32 [B, S] of tokens x that have climbed to `level` int32 [B, S]; keys [B], of wrong clusters."""
        z, first = x, self._anc(1, x)
        if self.xi < 1:
            n1 = self.hierarchy.sizes[1]
            own = jax.vmap(lambda k: open_uniform(k, x.shape[1:]))(fold(keys, 1)) < self.xi
            other = jax.vmap(lambda k: jax.random.randint(k, x.shape[1:], 0, n1 - 1))(fold(keys, 2))
            first = jnp.where(own, first, other + (other >= first))
        for k in range(1, self.num_levels + 1):
            shown = self.state_above(1, first, k)
            z = jnp.where(level == k, shown, z)
        return z

    def noised(self, key: jax.Array, x: jax.Array, tau: jax.Array, score: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(z, level), int32 [B, S]: x noised to tau [B] where `score` bool [B, S] says so; tokens are of level 0."""
        z = jnp.where(score, self.corrupt(key, x, tau=tau), x)
        return z, self.level_of(z)

    def shares(self) -> np.ndarray:
        """[K+1] share of positions at every level, t uniform."""
        t = (np.arange(2000) + 0.5) / 2000
        return np.asarray(self.chain.beta(-np.log1p(-t), np)).mean(0)

    # -- objective -------------------------------------------------------------------------------------------------

    def needs(self, hard_training: bool = False) -> str:
        """What token losses need of a prediction (hdlm_jax.models.heads.sum_over_noised): within, word or all."""
        if hard_training or self.num_levels == 1:
            return "all"
        return "within" if self.xi == 1 and self.force_transition != "none" else "word"

    def token_loss(self, prediction: Prediction | jax.Array, x: jax.Array, z: jax.Array,
                   levels: tuple[int, ...] | None = None, hard_training: bool = False, *,
                   tau: jax.Array | None = None) -> jax.Array:
        """C of docs/theory.md section 3, in nats: float32 of x's shape; zero at tokens. Exact for every K and xi.

        Args:
          levels: the only levels z is of, where that is known beforehand; nothing is computed for the others.
          hard_training: -log p(x | z) in place of C at every level >= 2.
          tau: not used; other processes' losses depend on it.
        """
        p = self.as_prediction(prediction)

        def one(k: int) -> jax.Array:
            if hard_training and k > 1:
                return -self.forced(p, z, (k,)).log_prob(x)
            return self._token_loss_xi1(p, x, k) if self.xi == 1 else self._token_loss(p, x, z, k)

        return self._by_level(z, {k: one(k) for k in levels or range(1, self.num_levels + 1)})

    def _by_level(self, z: jax.Array, values: dict[int, jax.Array]) -> jax.Array:
        """values[k] where z is of level k, 0 elsewhere; values: dict of arrays of z's shape."""
        level, out = self.level_of(z), jnp.zeros((), jnp.float32)
        for k, value in values.items():
            out = jnp.where(level == k, value, out)
        return out

    def _token_loss_xi1(self, p: Prediction, x: jax.Array, k: int) -> jax.Array:
        """A position shows its token's own ancestor, so single masses suffice: C = A_k - A_{k-1} once p lies under v.

        A_l is the log of f's mass under the token's ancestor at level l: A_0 = log f(x), A_K = 0.
        """
        if self.force_transition != "none" or k == self.num_levels:  # within, between, cavity are one at xi = 1
            return -p.log_within(x, k)
        if k == 1:
            return -p.log_prob(x)
        u, v = self._anc(k - 1, x), self._anc(k, x)
        share = jnp.asarray(np.log(self._count(k - 1)))[u] - jnp.asarray(np.log(self._count(k)))[v]
        return -jnp.logaddexp(p.log_mass(k - 1, u), p.log_mass(k, v, outside=True) + share)

    def _token_loss(self, p: Prediction, x: jax.Array, z: jax.Array, k: int) -> jax.Array:
        """The general case, xi < 1: KL over the children of the node on show."""
        if self.force_transition == "within":
            raise ValueError("force_transition='within': infinite bound for xi < 1; choose none, between or cavity")
        if k == 1:
            return -self.forced(p, z, (1,)).log_prob(x)
        d, own = self.leak, self.xi - self.leak
        n_u, n_v = wide(self._count(k - 1), z), jnp.asarray(self._count(k))[self.node_of(z, k)][..., None]
        under = self._under(z, k, k - 1)
        mine = self._anc(k - 1, x)[..., None] == wide(np.arange(n_u.size), x)
        inside = (self._anc(k, x) == self.node_of(z, k))[..., None]
        target = jnp.where(inside, (d * n_u + own * mine) / (d * n_v + own), n_u / n_v)
        log_q = jnp.where(under, self._log_probs_of_children(p, z, k, k - 1), 0.0)
        return jnp.sum(jnp.where(under, target * (jnp.log(target) - log_q), 0.0), axis=-1)

    def _log_probs_of_children(self, p: Prediction, z: jax.Array, k: int, j: int) -> jax.Array:
        """log Q_{v->j}(u) at positions that show v of level k, 1 <= j < k: [..., n_j]; -inf off v's descendants.

        Q is a sum of three terms, added as logarithms, for each of them can be all that there is.
        """
        d, own, v = self.leak, self.xi - self.leak, self.node_of(z, k)
        masses, under = self.forced(p, z, (k,)).log_masses(j), self._under(z, k, j)
        log_u = wide(np.log(self._count(j)), z)
        log_v, log_own = (jnp.asarray(np.log(a))[v][..., None] for a in (self._count(k), d * self._count(k) + own))
        terms = [masses + math.log(own) - log_own, log_sum(masses, ~under)[..., None] + log_u - log_v]
        if d:
            terms.append(log_sum(masses, under)[..., None] + math.log(d) + log_u - log_own)
        return jnp.where(under, log_sum(jnp.stack(terms, axis=-1)), -jnp.inf)

    def forced(self, p: Prediction, z: jax.Array, levels: Iterable[int] | None = None) -> Prediction:
        """The prediction after the force transition at positions of z that show one of `levels` (default: any cluster);
        f itself elsewhere."""
        levels = [k for k in levels or range(1, self.num_levels) if k < self.num_levels]
        if self.force_transition == "none" or not levels:
            return p
        if self.force_transition == "within" or self.xi == 1:
            return self._tilted(p, z, levels, lambda k, v: (jnp.zeros(v.shape), jnp.full(v.shape, -jnp.inf)))
        d, own, n1 = self.leak, self.xi - self.leak, self.hierarchy.sizes[1]

        def log_of(numbers: np.ndarray, v: jax.Array) -> jax.Array:  # of every node of a level, at nodes v
            return jnp.asarray(np.log(numbers))[v]

        if self.force_transition == "cavity":
            shown = lambda k, v: (log_of(d * self._count(k) + own, v), log_of(d * self._count(k), v))  # noqa: E731
            return self._tilted(p, z, levels, shown)
        # between: both sides are divided by their mass. By a constant first, so that a side to which f gives e^-300 is
        # no longer small when its mass, of which there are gradients, is taken; a side without any mass stays so
        def masses(p: Prediction, k: int, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            return finite(p.log_mass(k, v)), finite(p.log_mass(k, v, outside=True))

        def divided(k: int, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            inside, outside = jax.lax.stop_gradient(masses(p, k, v))
            return -inside, -outside

        near = self._tilted(p, z, levels, divided)

        def wanted(k: int, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            rest = np.maximum(n1 - self._count(k), 1)  # a node that holds all of level 1 has no other side
            inside, outside = masses(near, k, v)
            return log_of(d * self._count(k) + own, v) - inside, log_of(d * rest, v) - outside

        return self._tilted(near, z, levels, wanted)

    def _tilted(self, p: Prediction, z: jax.Array, levels: list[int],
                factors: Callable[[int, jax.Array], tuple[jax.Array, jax.Array]]) -> Prediction:
        """f times one number under the node v of level k on show and another off it: their logs, factors(k, v)."""
        level, parts = self.level_of(z), {k: factors(k, self.node_of(z, k)) for k in levels}

        def bias(anc: Callable[[int], jax.Array]) -> jax.Array:
            out = jnp.zeros((*z.shape, 1))
            for k, (inside, outside) in parts.items():
                here = jnp.where(anc(k) == self.node_of(z, k)[..., None], inside[..., None], outside[..., None])
                out = jnp.where((level == k)[..., None], here, out)
            return out

        return p.tilted(bias)

    def log_probs_below(self, prediction: Prediction | jax.Array, z: jax.Array, k: int, j: int,
                        clusters: str = "exact") -> jax.Array:
        """Log-probabilities of the nodes of level j that positions z [...], showing a node of level k > j, go down to:
        [..., n_j]. Tokens (j = 0) by p(x | z), after the force transition; nodes as `reverse_step` draws them.
        Meaningless at positions of another level.
        """
        p = self.as_prediction(prediction)
        if j and clusters == "exact" and not self._stays_under:
            return self._log_probs_of_children(p, z, k, j)
        return self.forced(p, z, (k,)).log_masses(j)

    def proposal(self, tokens: int, cv2: float) -> Proposal:
        """Noise times for evaluation, with little variance."""
        return Proposal(self.chain, tokens, cv2)

    def nelbo_weight(self, z: jax.Array, tau: jax.Array, x: jax.Array | None = None) -> jax.Array:
        """w_k(tau) of z's levels, of z's shape [B, S]; tau [B] or of z's shape. Zero at tokens."""
        return self._by_level(z, self._spread(self.chain.weight(tau), z))

    def _spread(self, weights: Array, x: jax.Array) -> dict[int, jax.Array]:
        """[B or x.shape, K] -> {level: array of x's shape}."""
        weights = weights.reshape(*weights.shape[:-1], *(1,) * (x.ndim + 1 - weights.ndim), weights.shape[-1])
        return {k: jnp.broadcast_to(weights[..., k - 1], x.shape) for k in range(1, self.num_levels + 1)}

    def loss_weight(self, z: jax.Array, tau: jax.Array, weighting: str = "constant", weight_min: float = 0.0,
                    weight_max: float = jnp.inf, *, x: jax.Array | None = None) -> jax.Array:
        """W of the training loss for t = 1 - e^-tau uniform, of z's shape (docs/theory.md "Training weights").

        none: W_k = w_k/(1-t), the NELBO's own; clip: the same within [weight_min, weight_max]; constant: 1;
        empirical: t^2 - t + 3 at the mask, 3 - 2t below. Zero at tokens.
        """
        if weighting not in WEIGHTINGS["hierarchical"]:
            raise ValueError(f"weighting={weighting!r}: choose one of {', '.join(WEIGHTINGS['hierarchical'])}")
        t = -jnp.expm1(-tau)[..., None]
        if weighting == "constant":
            weights = jnp.ones((*tau.shape, self.num_levels), tau.dtype)
        elif weighting == "empirical":
            at_mask = wide(np.arange(1, self.num_levels + 1) == self.num_levels, tau)
            weights = jnp.where(at_mask, t * t - t + 3, 3 - 2 * t)
        else:
            weights = jnp.asarray(self.chain.weight(tau)) * jnp.exp(tau)[..., None]
            if weighting == "clip":
                weights = jnp.clip(weights, weight_min, weight_max)
        return self._by_level(z, self._spread(weights, z))

    # -- reverse ---------------------------------------------------------------------------------------------------

    def posterior(self, prediction: Prediction | jax.Array, z: jax.Array, tau_s: Number, tau_t: Number,
                  clusters: str = "exact") -> jax.Array:
        """Distribution of the state at tau_s given z at tau_t: [..., N], dense (docs/theory.md section 4).

        For tests and small vocabularies; `reverse_step` draws from it without building it. tau_s, tau_t: scalars.
        """
        p = self.as_prediction(prediction)
        h, levels = self.hierarchy, self.num_levels
        of_levels = self.chain.posterior(tau_s, tau_t)
        onto = jax.nn.one_hot(z, h.num_states)
        out = jnp.where((self.level_of(z) == 0)[..., None], onto, 0.0)
        for k in range(1, levels + 1):
            parts = [of_levels[k, j] * jnp.exp(self.log_probs_below(p, z, k, j, clusters)) for j in range(k)]
            parts.append(of_levels[k, k] * jax.nn.one_hot(self.node_of(z, k), h.sizes[k]))
            parts += [jnp.zeros((*z.shape, h.sizes[j])) for j in range(k + 1, levels + 1)]
            out = jnp.where((self.level_of(z) == k)[..., None], jnp.concatenate(parts, axis=-1), out)
        return out

    def reverse_step(self, key: jax.Array, prediction: Prediction | jax.Array, z: jax.Array, target: jax.Array,
                     clusters: str = "exact", temperature: Number = 1.0, top_p: Number = 1.0,
                     sync_trip_count: TripCount = lambda count: count) -> jax.Array:
        """Draw what z [B, S] becomes where its level exceeds `target` int [B, S]; other positions stay.

        One token x ~ p(x | z) per position, shown at its target level: as itself, as anc_j(x) where x is sure to lie
        under what is shown (or clusters="clean"), or by the exact kernel pi_{v->j}(. | x), which for xi < 1 shows wrong
        nodes on purpose.

        Args:
          key: one key (row b uses fold_in(key, b)) or keys [B] (position s uses fold_in(key of b, s)) or keys of
            z's shape, which may then be any (also a list of positions [n]).
          prediction: prediction or logits of z's shape.
          temperature, top_p: of the tokens' distribution after the force transition, temperature first.
          sync_trip_count: see hdlm_jax.decoding.loop.sample.
        """
        if clusters not in CLUSTERS:
            raise ValueError(f"clusters={clusters!r}: choose one of {', '.join(CLUSTERS)}")
        keys = token_keys(key, z.shape)
        p = self.as_prediction(prediction)
        level = self.level_of(z)

        x = self.forced(p, z).draw(fold(keys, 0), (target == 0) & (level > 0), temperature, top_p, sync_trip_count)
        out = jnp.where(target == 0, x, z)
        for j in range(1, self.num_levels):
            if clusters == "clean" or self._stays_under:
                node = self._anc(j, x)
            else:
                node = self._draw_node(fold(keys, 1), x, z, level, j)
            out = jnp.where(target == j, node + self.hierarchy.offsets[j], out)
        return jnp.where(target < level, out, z)

    def _draw_node(self, keys: jax.Array, x: jax.Array, z: jax.Array, level: jax.Array, j: int) -> jax.Array:
        """u ~ pi_{v->j}(. | x) where z shows v of a level k > j: the token's own branch, or any level-1 node."""
        h, d, own = self.hierarchy, self.leak, self.xi - self.leak
        uniform = jax.vmap(open_uniform)
        u_own, u_any = (uniform(fold(keys, i).reshape(-1)).reshape(z.shape) for i in (0, 1))
        node = self._anc(j, x)
        for k in range(j + 1, self.num_levels + 1):
            v = self.node_of(z, k)
            count = jnp.asarray(np.asarray(h.level1_count[k]))[v]
            keep = (self._anc(k, x) == v) & (u_own * (d * count + own) < own)
            pick = jnp.minimum((u_any * count).astype(jnp.int32), count - 1) + jnp.asarray(h.level1_start[k])[v]
            anyone = jnp.asarray(self.ancestors(1, j))[jnp.asarray(h.level1_order)[pick]]
            node = jnp.where(level == k, jnp.where(keep, self._anc(j, x), anyone), node)
        return node
