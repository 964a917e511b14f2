"""A map from words to clusters that is learned: hierarchy.map='learned' (docs/theory.md section 9, "A learned map").

A word goes to cluster c with probability K(x, c) at its first crossing; what is above stays a hierarchy of maps. K is a
parameter, "map" [V, n_1] among those of the head: logits of a softmax, with a share FLOOR spread over all clusters so
that no mass is lost in float32. Predictions of `SoftHead` carry log K, for gradients; `SoftProcess.with_params` gives
it to the process, for draws.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hdlm_jax.common.parallel import Tree
from hdlm_jax.diffusion.draws import categorical, fold, token_keys
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.prediction import LogitsPrediction, Prediction, safe_log
from hdlm_jax.models.heads import FlatHead

FLOOR = 1e-6  # share of a word's crossings that go to any cluster
MAP = "map"  # name of the parameter


def log_map(logits: jax.Array) -> jax.Array:
    """log K [V, n_1] of logits [V, n_1], float32 or wider."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    low = jnp.full_like(logits, math.log(FLOOR / logits.shape[-1]))
    return jnp.logaddexp(jax.nn.log_softmax(logits, axis=-1) + math.log1p(-FLOOR), low)


def two_valued(hierarchy: Hierarchy, xi: float) -> np.ndarray:
    """Logits float32 [V, n_1] of the map of diffusion.xi: a word's own cluster with probability xi, else any other."""
    n = hierarchy.sizes[1]
    own = np.arange(n) == np.asarray(hierarchy.anc[1])[:, None]
    k = np.where(own, xi, (1 - xi) / (n - 1))
    return np.log((k - FLOOR / n) / (1 - FLOOR)).astype(np.float32)


class Mapped(LogitsPrediction):
    """A prediction from logits [..., V] that knows log K [V, n_1]."""

    def __init__(self, logits: jax.Array, hierarchy: Hierarchy, log_k: jax.Array) -> None:
        super().__init__(logits, hierarchy)
        self.log_k = log_k

    def select(self, index: jax.Array) -> Mapped:
        return Mapped(super().select(index).logits, self.hierarchy, self.log_k)


@dataclasses.dataclass(frozen=True, eq=False)
class SoftHead(FlatHead):
    """A flat head that holds the map: parameters kernel, bias and map [V, n_1], which starts as that of `xi`."""

    xi: float = 0.9
    uses = ("kernel", "bias", MAP)

    def init(self, key: jax.Array, width: int) -> Tree:
        return super().init(key, width) | {MAP: jnp.asarray(two_valued(self.hierarchy, self.xi))}

    def predict(self, params: Tree, h: jax.Array) -> Prediction:
        return Mapped(self.logits(params, h), self.hierarchy, log_map(params[MAP]))


@dataclasses.dataclass(frozen=True, eq=False)
class SoftProcess(HierarchicalProcess):
    """A hierarchical process whose words go to cluster c with probability K(x, c).

    Args:
      hierarchy, chain, force_transition: as of HierarchicalProcess; the transition must be cavity. A word's own node in
        `hierarchy` is what K starts from.
      xi: share of words that go to their own cluster at the start, in (1/n_1, 1).
      log_k: log K, float [V, n_1], rows sum to one; None: `with_params` gives it, or a loss takes its predictions' own.

    Raises:
      ValueError: as of HierarchicalProcess; a single level, another transition, xi = 1.
    """

    log_k: jax.Array | None = None
    methods = ("ancestral", "first_hitting", "any_order", "max_prob", "margin", "entropy", "low_confidence",
               "fast_dllm", "fast_dllm_factor", "dimple", "dparallel")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_levels < 2 or self.xi == 1:
            raise ValueError(f"xi={self.xi}, {self.num_levels} levels: a learned map needs clusters, and xi < 1")
        if self.force_transition != "cavity":
            raise ValueError(f"force_transition={self.force_transition!r}: a learned map is exact for cavity alone")

    # -- the map ---------------------------------------------------------------------------------------------------

    def with_params(self, params: Tree) -> SoftProcess:
        """The process whose K is that of a network's parameters; one that has its K stays as it is."""
        if self.log_k is not None:
            return self
        return dataclasses.replace(self, log_k=log_map(params["head"][MAP]))

    def of(self, p: Prediction) -> SoftProcess:
        """The process whose K is its own, or else that of a prediction of `SoftHead`."""
        return self if self.log_k is not None else dataclasses.replace(self, log_k=cast(Mapped, p).log_k)

    def log_shown(self, level: int) -> jax.Array:
        """log M_level: float [V, n_level], of the node that a word shows at a level >= 1."""
        log_k: Any = self.log_k
        if level == 1:
            return log_k
        onto = jax.nn.one_hot(self.ancestors(1, level), self.hierarchy.sizes[level], dtype=log_k.dtype)
        return safe_log(jnp.matmul(jnp.exp(log_k), onto, precision="highest"))

    def log_masses(self, p: Prediction, level: int) -> jax.Array:
        """F_level(v) = log sum_x f(x) M_level(x, v): [..., n_level]."""
        f, m = jnp.exp(p.log_probs()), jnp.exp(self.log_shown(level))
        return safe_log(jnp.matmul(f, m.astype(f.dtype), precision="highest"))

    def state_above(self, low: int, node: jax.Array, high: int) -> jax.Array:
        """As of HierarchicalProcess; above a word its likeliest node."""
        if low or not high or self.log_k is None:
            return super().state_above(low, node, high)
        return jnp.argmax(self.log_shown(high), axis=-1).astype(jnp.int32)[node] + self.hierarchy.offsets[high]

    # -- forward ---------------------------------------------------------------------------------------------------

    def shown(self, keys: jax.Array, x: jax.Array, level: jax.Array) -> jax.Array:
        log_k: Any = self.log_k
        first, z = categorical(token_keys(fold(keys, 1), x.shape), log_k[x]), x
        for k in range(1, self.num_levels + 1):
            z = jnp.where(level == k, self.state_above(1, first, k), z)
        return z

    def log_drawn(self, x: jax.Array, z: jax.Array) -> jax.Array:
        """log M_k(x, v) of the nodes v that z shows, given their levels: of z's shape; 0 at words."""
        return self._by_level(z, {k: self.log_shown(k)[x, self.node_of(z, k)] for k in range(1, self.num_levels)})

    def draw_loss(self, x: jax.Array, z: jax.Array, nats: jax.Array) -> jax.Array:
        """Its gradient is that of the draw of z, by the score function: rows 2i and 2i + 1 are two draws of one text at
        the same levels, each the other's baseline, so that tokens which show the same in both cancel."""
        rows = jax.lax.stop_gradient(jnp.sum(nats, axis=-1)).reshape(-1, 2)
        ahead = (rows - rows[:, ::-1]).reshape(-1, 1)
        drawn = self.log_drawn(x, z)
        return jnp.sum(ahead * (drawn - jax.lax.stop_gradient(drawn)))

    # -- objective -------------------------------------------------------------------------------------------------

    def needs(self, hard_training: bool = False) -> str:
        return "tokens"

    def token_loss(self, prediction: Prediction | jax.Array, x: jax.Array, z: jax.Array,
                   levels: tuple[int, ...] | None = None, hard_training: bool = False, *,
                   tau: jax.Array | None = None) -> jax.Array:
        """As of HierarchicalProcess (theory section 9); hard_training is refused."""
        if hard_training:
            raise ValueError("hard_training: a learned map goes by the bound itself; leave it out")
        p = self.as_prediction(prediction)
        return self.of(p)._costs(p, x, z, levels or tuple(range(1, self.num_levels + 1)))

    def _costs(self, p: Prediction, x: jax.Array, z: jax.Array, levels: tuple[int, ...]) -> jax.Array:
        below = sorted({k - 1 for k in levels if k > 1} | {k for k in levels if k < self.num_levels})
        shown, masses = ({k: f(k) for k in below} for f in (self.log_shown, lambda k: self.log_masses(p, k)))

        def of_node(k: int) -> tuple[jax.Array, jax.Array]:
            """(log M_k(x, v), F_k(v)) of the node v on show."""
            if k == self.num_levels:
                return jnp.zeros(z.shape), jnp.zeros(z.shape)
            v = self.node_of(z, k)
            return shown[k][x, v], jnp.take_along_axis(masses[k], v[..., None], axis=-1)[..., 0]

        def cost(k: int) -> jax.Array:
            mine, mass = of_node(k)
            if k == 1:
                return mass - p.log_prob(x) - mine
            target = shown[k - 1][x] - mine[..., None]
            some = self._under(z, k, k - 1) & (target > -jnp.inf)
            target = jnp.where(some, target, -jnp.inf)
            log_q = jnp.where(some, masses[k - 1] - mass[..., None], 0.0)
            return jnp.sum(jnp.where(some, jnp.exp(target) * (jnp.where(some, target, 0.0) - log_q), 0.0), axis=-1)

        return self._by_level(z, {k: cost(k) for k in levels})

    def forced(self, p: Prediction, z: jax.Array, levels: Iterable[int] | None = None) -> Prediction:
        """f(x) M_k(x, v), normalised, at positions of z that show v of one of `levels` (default: any cluster)."""
        here, level = self.of(p), self.level_of(z)
        out = jnp.zeros((*z.shape, self.vocab_size))
        for k in levels or range(1, self.num_levels):
            if k < self.num_levels:
                out = jnp.where((level == k)[..., None], here.log_shown(k).T[self.node_of(z, k)], out)
        return p.tilted(lambda anc: out)

    def log_probs_below(self, prediction: Prediction | jax.Array, z: jax.Array, k: int, j: int,
                        clusters: str = "exact") -> jax.Array:
        p = self.as_prediction(prediction)
        if j == 0:
            return self.forced(p, z, (k,)).log_probs()
        here, mass = self.of(p), jnp.zeros(z.shape)
        if k < self.num_levels:
            mass = jnp.take_along_axis(here.log_masses(p, k), self.node_of(z, k)[..., None], axis=-1)[..., 0]
        return jnp.where(self._under(z, k, j), here.log_masses(p, j) - mass[..., None], -jnp.inf)

    # -- reverse ---------------------------------------------------------------------------------------------------

    def _draw_node(self, keys: jax.Array, x: jax.Array, z: jax.Array, level: jax.Array, j: int) -> jax.Array:
        """u ~ M_j(x, u) / M_k(x, v) under the node v of level k > j that z shows."""
        logs = self.log_shown(j)[x]
        for k in range(j + 1, self.num_levels):
            logs = jnp.where((level == k)[..., None] & ~self._under(z, k, j), -jnp.inf, logs)
        return categorical(keys, logs)


def by_one_scale(b1: float = 0.9, b2: float = 0.99) -> optax.GradientTransformation:
    """Adam with a single second moment, the mean over all entries.

    Adam's own, one for each entry, shrinks what is rare and large against what is frequent and small. The map's
    gradient has both, parts that balance in the mean: that of the costs, at every mask, and that of the draws. By Adam
    the map drifts where the frequent part pulls it, though the bound does not ask for it (docs/log.md).
    """
    def init(params: Tree) -> tuple[jax.Array, Tree, jax.Array]:
        return jnp.int32(0), jax.tree.map(jnp.zeros_like, params), jnp.float32(0)

    def update(grads: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        count, mean, square = state[0] + 1, jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state[1], grads), state[2]
        square = b2 * square + (1 - b2) * sum(jnp.mean(g**2) for g in jax.tree.leaves(grads))
        scale = 1 / (1 - b1**count) / jnp.maximum(jnp.sqrt(square / (1 - b2**count)), 1e-30)
        return jax.tree.map(lambda m: scale * m, mean), (count, mean, square)

    return optax.GradientTransformation(init, update)


def with_map(tx: optax.GradientTransformation, schedule: Callable[[Any], Any]) -> optax.GradientTransformation:
    """The optimizer with a rule and a rate of its own for the map, whose logits do not decay."""
    def kind(path: tuple[Any, ...], leaf: jax.Array) -> str:
        return MAP if path[-1].key == MAP else "rest"

    rules = {MAP: optax.chain(by_one_scale(), optax.scale_by_learning_rate(schedule)), "rest": tx}
    return optax.multi_transform(rules, lambda params: jax.tree_util.tree_map_with_path(kind, params))
