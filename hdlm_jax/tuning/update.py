"""Policy gradients of a diffusion sampler: a weighted sum of -log p of drops, with omega a constant to the gradient.

The probability of a rollout is a product over its calls of what was drawn in them, so that the exact gradient of the
mean reward is that of

    sum over calls c, over tokens i drawn in c, of  A D(i; z_c),    D = -log p(what was drawn for i | z_c),

a sum, never a mean over a call, and over all draws, also those thrown away. The choice of positions depends on no
parameter, or moves with probability zero; where a head draws the order (dcolt) or the length of a block (ctrldiff), D
has the cost of a token's turn, or of the length, as well. A `View` is one state of each row and what is priced there; a
clipped ratio (PPO, arXiv 1707.06347) only changes omega, whose gradient is nil.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from hdlm_jax.common import parallel
from hdlm_jax.common.parallel import Batch, Tree
from hdlm_jax.config import Config, ConfigError, TuneConfig
from hdlm_jax.diffusion.draws import fold
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.levels import LevelChain, open_uniform
from hdlm_jax.diffusion.prediction import LogitsPrediction, Prediction
from hdlm_jax.models import block_lengths, order
from hdlm_jax.models.heads import map_over_noised, sum_over_noised
from hdlm_jax.models.trunk import Trunk
from hdlm_jax.training.state import TrainState
from hdlm_jax.training.step import advanced
from hdlm_jax.tuning.record import Rollout, of_call, replay

Update: TypeAlias = Callable[[TrainState, Batch, tuple[jax.Array, Tree]], tuple[TrainState, dict[str, jax.Array]]]


class View(NamedTuple):
    """A state z int32 [b, S] of each row, told t float32 [b]; its tokens are priced from `level` down to `to` int32
    [b, S] (equal: not at all), on the way to tokens x int32 [b, S], times `weight` float32 [b, S] and `advantage`
    float32 [b]. turn: int32 [b, S], in the order that a head drew, if one did; length: int32 [b], the index of the
    block's length that one drew, -1: none."""

    z: jax.Array
    t: jax.Array
    level: jax.Array
    to: jax.Array
    x: jax.Array
    weight: jax.Array
    advantage: jax.Array
    turn: jax.Array | None = None
    length: jax.Array | None = None


UPPER, SHARE = 1.5, 0.5  # SPG's power, and how much of a text to avoid is priced by the upper bound (its release)
Views: TypeAlias = Callable[[Batch, jax.Array, jax.Array], View]  # (rows, keys [b], number of the view)
Count: TypeAlias = Callable[[Batch], jax.Array]  # rows -> how many views there are


def rollout_of(batch: Batch) -> Rollout:
    return Rollout(**{name: batch[name] for name in Rollout._fields if name in batch})


def chosen_calls(keys: jax.Array, calls: jax.Array, bound: int) -> jax.Array:
    """int32 [b, bound]: the numbers 0..calls-1 of each row's calls in a random order, behind them the rest."""
    rank = jax.vmap(lambda key: jax.random.uniform(key, (bound,)))(keys)
    late = jnp.arange(bound)[None] >= calls[:, None]
    return jnp.argsort(rank + 2.0 * late, axis=1).astype(jnp.int32)


def visited(process: HierarchicalProcess, views: int) -> tuple[Views, Count]:
    """The states of rollouts and what was drawn there: all calls, or `views` of each row's T calls, times T / views."""
    def view(rows: Batch, keys: jax.Array, number: jax.Array) -> View:
        rollout, call = rollout_of(rows), jnp.broadcast_to(number, rows["calls"].shape)
        scale = jnp.ones(call.shape, jnp.float32)
        if views:
            every = chosen_calls(keys, rollout.calls, rollout.told.shape[1])
            call = jnp.take_along_axis(every, call[:, None], axis=1)[:, 0]
            scale = rollout.calls / jnp.clip(rollout.calls, 1, views)
        z, _, level, to, x, turn, t, length = replay(process, rollout, call)
        advantage = rows["advantage"]
        if advantage.ndim == 2:  # of each call
            advantage = of_call(advantage, call)
        return View(z, t, level, to, x, jnp.broadcast_to(scale[:, None], z.shape), advantage, turn, length)

    def count(rows: Batch) -> jax.Array:
        most = jnp.max(rows["calls"])
        return jnp.minimum(most, views) if views else most

    return view, count


def crossing_nodes(chain: LevelChain, many: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise times and weights, float64 [many] each, of a Gauss-Legendre rule for integrals over noise time whose nodes
    lie evenly in the share of all crossings that are done, the mean level over K: of one level that is t, as GDPO
    (arXiv 2510.08554) has it. Of more levels the bound's integrand is close to a polynomial there, and is none in t."""
    nodes, shares = np.polynomial.legendre.leggauss(many)
    low, high = np.zeros(many), np.full(many, chain.tau_end)
    for _ in range(60):
        tau = (low + high) / 2
        early = chain.beta(tau, np) @ np.arange(chain.num_levels + 1) / chain.num_levels < (1 + nodes) / 2
        low, high = np.where(early, tau, low), np.where(early, high, tau)
    return tau, shares / 2 * chain.num_levels / chain.moments(tau)[0]


def noised(process: HierarchicalProcess, views: int, gauss: bool = False) -> tuple[Views, Count]:
    """The bound of the texts in place of their probability: noise at t uniform, the bound's own weights.

    gauss: at the nodes of a Gauss rule (GDPO, `crossing_nodes`), three unless `views` says how many: less noise, and of
    one level no bias where a text has at most twice as many tokens.
    """
    many = views or (3 if gauss else 1)
    rule = [jnp.asarray(part, jnp.float32) for part in crossing_nodes(process.chain, many)] if gauss else []

    def view(rows: Batch, keys: jax.Array, number: jax.Array) -> View:
        x, free = rows["x"], rows["fell"][..., 0] >= 0
        if gauss:
            tau, share = (jnp.broadcast_to(part[number], (len(x),)) for part in rule)
            t = -jnp.expm1(-tau)
        else:
            t = jax.vmap(open_uniform)(fold(keys, 2 * number))
            tau = -jnp.log1p(-t)
            share = jnp.exp(tau) / many
        z, level = process.noised(fold(keys, 2 * number + 1), x, tau, free)
        weight = process.nelbo_weight(z, tau, x) * share[:, None]
        return View(z, t, level, jnp.maximum(level - 1, 0), x, weight, rows["advantage"])

    return view, lambda rows: jnp.int32(many)


def _masked(process: HierarchicalProcess, rows: Batch, hidden: jax.Array, priced: jax.Array, t: jax.Array,
            weight: jax.Array) -> View:
    """Tokens masked where `hidden`, priced to the vocabulary where `priced`, bool [b, S]; t and weight float32 [b]."""
    top = process.num_levels
    z = jnp.where(hidden, process.mask_id, rows["x"])
    level = jnp.where(priced, top, 0)
    weight = jnp.broadcast_to(weight[:, None], z.shape)
    return View(z, t, level, jnp.zeros_like(level), rows["x"], weight, rows["advantage"])


def one_pass(process: HierarchicalProcess, views: int) -> tuple[Views, Count]:
    """diffu-GRPO (d1, arXiv 2504.12216): the answer all masked, of the prompt each token with probability .15."""
    def view(rows: Batch, keys: jax.Array, number: jax.Array) -> View:
        free, one = rows["fell"][..., 0] >= 0, jnp.ones(len(rows["x"]))
        some = jax.vmap(lambda key: jax.random.uniform(key, rows["x"].shape[1:]) < 0.15)(keys)
        return _masked(process, rows, free | some, free, one, one)

    return view, lambda rows: jnp.int32(1)


def coupled(process: HierarchicalProcess, views: int) -> tuple[Views, Count]:
    """coupled-GRPO (DiffuCoder, arXiv 2506.20639): all masked; masked with probability t in (.2, .8); and masked where
    that was not. Half the sum of their costs, at weights 1, 1/t and 1/(1 - t)."""
    def view(rows: Batch, keys: jax.Array, number: jax.Array) -> View:
        free = rows["fell"][..., 0] >= 0
        t = 0.2 + 0.6 * jax.vmap(jax.random.uniform)(fold(keys, 0))
        some = jax.vmap(lambda key, t: jax.random.uniform(key, free.shape[1:]) < t)(fold(keys, 1), t)
        share = jnp.where(number == 0, 1.0, jnp.where(number == 1, t, 1 - t))
        hidden = free & jnp.where(number == 0, True, jnp.where(number == 1, some, ~some))
        return _masked(process, rows, hidden, hidden, share, 0.5 / share)

    return view, lambda rows: jnp.int32(3)


def sandwiched(process: HierarchicalProcess, views: int) -> tuple[Views, Count]:
    """SPG (arXiv 2510.09541): texts to be written more often by the bound, those to be avoided half by an upper one,
    log mean_z w(z) p(x_i | z)^1.5 over the views (`Gradients.omega`); two of them, or `views`. Its bounds are of one
    level; it masks blocks behind clean ones, here texts are masked as by `elbo`.

    Raises:
      ConfigError: there are clusters.
    """
    if process.num_levels > 1:
        raise ConfigError(f"tune.objective='spg' with hierarchy.clusters={process.hierarchy.sizes[1:-1]}: its upper "
                          "bound is of words and masks alone; choose elbo, nodes or score")
    return noised(process, views or 2)


OBJECTIVES: dict[str, Callable[[HierarchicalProcess, int], tuple[Views, Count]]] = {
    "score": visited, "elbo": noised, "nodes": functools.partial(noised, gauss=True), "coupled": coupled,
    "one_pass": one_pass, "spg": sandwiched}


def nats(process: HierarchicalProcess, p: Prediction, x: jax.Array, level: jax.Array, to: jax.Array,
         temperature: float = 1.0) -> jax.Array:
    """D: -log probability that tokens x which show their ancestors at `level` fall to those at `to`, all [...].

    At a temperature the law is the tokens' own after it, as they are drawn; p must know all tokens then.
    """
    if temperature != 1:
        p = LogitsPrediction(p.log_probs() / temperature, process.hierarchy)
    out = jnp.zeros(x.shape, jnp.float32)
    for k in range(1, process.num_levels + 1):
        out = out + jnp.where((to < k) & (k <= level), -p.log_within(x, k), 0.0)
    return out


class Gradients:
    """Of the objective of `tune`, summed over rows, with the views of each row one after the other."""

    def __init__(self, tune: TuneConfig, temperature: float, network: Trunk, process: HierarchicalProcess,
                 mesh: Mesh | None = None) -> None:
        self.tune, self.temperature, self.network, self.process = tune, temperature, network, process
        self.shard = parallel.OverBatch(mesh)
        self.needs = "all" if temperature == 1 else "tokens"
        self.views, self.count = OBJECTIVES[tune.objective](process, tune.views)

    def nats(self, params: Tree, view: View) -> jax.Array:
        """D at a view's priced tokens, zero elsewhere: float32 [b, S], without gradient."""
        params = jax.lax.stop_gradient(params)
        h = self.network.hidden(params, view.z, view.t)
        found = lambda p, fields, levels: self._nats(p, fields, levels).astype(jnp.float32)  # noqa: E731
        drawn = map_over_noised(self.network.head, found, self.network.head_params(params), h,
                                jnp.where(view.to < view.level, view.level, 0), view.x, (view.x, view.level, view.to),
                                needs=self.needs, shard=self.shard)
        return drawn + self._choices(params, h, view)

    def _choices(self, params: Tree, h: jax.Array, view: View) -> jax.Array:
        """The cost of what heads chose in the call, float [b, S] or 0: of each token's turn in the order; of the
        block's length, at the first token that falls."""
        cost = jnp.float32(0)
        if view.turn is not None:
            cost += order.nats(order.scores(params, h, view.level, view.t), view.level, view.to, view.turn)
        if view.length is not None:
            written = view.level == 0
            found = block_lengths.nats(block_lengths.scores(params, h, written, ~written, view.t), view.length)
            first = jnp.argmax(view.to < view.level, axis=1)
            cost += found[:, None] * jax.nn.one_hot(first, view.z.shape[1])
        return cost

    def _nats(self, p: Prediction, fields: Sequence[jax.Array], levels: object) -> jax.Array:
        x, level, to = fields[:3]
        return nats(self.process, p, x, level, to, self.temperature)

    def whole(self, params: Tree, old: Tree | None, rows: Batch, keys: jax.Array) -> jax.Array:
        """What `omega` has to know of all views of a row together, [b, S] or [b, 1]: the sums of SPG's upper bound; the
        ratio of texts, a token (GDPO, arXiv 2510.08554; of `score`: GSPO, 2507.18071), as its log; else 0."""
        spg = self.tune.objective == "spg"
        if not spg and (old is None or self.tune.ratio != "text"):
            return jnp.float32(0)

        def add(number: jax.Array, total: jax.Array) -> jax.Array:
            view = self.views(rows, keys, number)
            now = self.nats(params, view)
            found = jnp.exp(-UPPER * now) * (view.to < view.level) if spg else self.nats(old, view) - now
            return total + (view.weight * found).astype(jnp.float32)

        total = jax.lax.fori_loop(0, self.count(rows), add, jnp.zeros(rows["x"].shape, jnp.float32))
        if spg:
            return total
        free = jnp.sum(rows["fell"][..., 0] >= 0, axis=1, keepdims=True)
        return jnp.sum(total, axis=1, keepdims=True) / jnp.maximum(free, 1)

    def omega(self, params: Tree, old: Tree | None, reference: Tree, view: View, whole: jax.Array) -> jax.Array:
        """What D is multiplied by: the advantage, times the clipped ratio to the weights `old` that wrote the rows;
        and the pull towards the reference."""
        tune, advantage = self.tune, jnp.broadcast_to(view.advantage[:, None], view.z.shape)
        omega, spg = advantage, tune.objective == "spg"
        now = self.nats(params, view) if old is not None or tune.kl or spg else 0.0
        if spg:  # of sum_i log sum_z w p^beta / beta: a softmax over the views of a token
            upper = jnp.where(view.to < view.level, jnp.exp(-UPPER * now) / jnp.maximum(whole, 1e-30), 0.0)
            omega = advantage * jnp.where(advantage < 0, SHARE * upper + 1 - SHARE, 1.0)
        if old is not None:
            log_ratio = self.nats(old, view) - now
            if tune.ratio == "call":
                log_ratio = jnp.broadcast_to(jnp.sum(log_ratio, axis=1, keepdims=True), log_ratio.shape)
            ratio = jnp.exp(log_ratio if tune.ratio != "text" else whole)
            beyond = jnp.where(advantage > 0, ratio > 1 + tune.clip, ratio < 1 - tune.clip)
            omega = omega * jnp.where(beyond, 0.0, ratio)
        if tune.kl:  # of the divergence's own gradient, log p - log p_reference at what was drawn
            omega = omega + tune.kl * (now - self.nats(reference, view))
        return omega * view.weight

    def of_view(self, params: Tree, old: Tree | None, reference: Tree, view: View, whole: jax.Array
                ) -> tuple[jax.Array, jax.Array]:
        """(sum of omega D, which alone has gradients; sum of weight D) of a view."""
        def cost(p: Prediction, fields: Sequence[jax.Array], levels: object) -> tuple[jax.Array, jax.Array]:
            found = self._nats(p, fields, levels)
            return tuple((jax.lax.stop_gradient(a) * found).astype(jnp.float32) for a in fields[3:])  # type: ignore

        omega = jax.lax.stop_gradient(self.omega(params, old, reference, view, whole))
        h = self.network.hidden(params, view.z, view.t)
        loss, each = sum_over_noised(self.network.head, cost, self.network.head_params(params), h,
                                     jnp.where(view.to < view.level, view.level, 0), view.x,
                                     (view.x, view.level, view.to, omega, view.weight), needs=self.needs,
                                     shard=self.shard)
        spent = jnp.sum(each)
        choices = self._choices(params, h, view)
        more = (jnp.sum(a * choices).astype(jnp.float32) for a in (omega, view.weight))
        return loss + next(more), spent + next(more)

    def __call__(self, params: Tree, old: Tree | None, reference: Tree, rows: Batch, key: jax.Array
                 ) -> tuple[tuple[jax.Array, jax.Array], Tree]:
        """((loss, nats), gradients) of rows: fields of a Rollout, advantage float32 [b] or, of each call, [b, C], index
        int32 [b]."""
        keys = fold(jnp.broadcast_to(key, rows["index"].shape), rows["index"])
        zero, whole = (jnp.float32(0), jnp.float32(0)), self.whole(jax.lax.stop_gradient(params), old, rows, keys)

        def add(number: jax.Array, carry: Tree) -> Tree:
            view = self.views(rows, keys, number)
            more = jax.value_and_grad(self.of_view, has_aux=True)(params, old, reference, view, whole)
            return jax.tree.map(jnp.add, carry, more)

        return jax.lax.fori_loop(0, self.count(rows), add, (zero, jax.tree.map(jnp.zeros_like, params)))


def make_update(config: Config, network: Trunk, process: HierarchicalProcess, tx: optax.GradientTransformation,
                mesh: Mesh | None = None) -> Update:
    """update(state, batch, (key, reference)) -> (state, metrics): tune.updates steps by one batch of rollouts.

    batch: fields of a Rollout, advantage float32 [B] or [B, C], index int32 [B]. reference: parameters ({} unless
    tune.kl). The loss, and its gradient, is the mean over rollouts of sums over their calls. metrics: loss, grad_norm,
    skipped, and nats, of a rollout: for `score` an estimate of the entropy of what is drawn.
    """
    tune, parts = config.tune, config.train.microbatches
    gradients = Gradients(tune, config.generate.temperature, network, process, mesh)

    def sums(params: Tree, old: Tree | None, reference: Tree, batch: Batch, key: jax.Array) -> Tree:
        if parts == 1:
            return gradients(params, old, reference, batch, key)
        split = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, parts, *a.shape[1:]), 1, 0), batch)
        zero = ((jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, params))
        return jax.lax.scan(lambda carry, part: (jax.tree.map(
            jnp.add, carry, gradients(params, old, reference, part, key)), None), zero, split)[0]

    def update(state: TrainState, batch: Batch, given: tuple[jax.Array, Tree]
               ) -> tuple[TrainState, dict[str, jax.Array]]:
        (key, reference), rows = given, batch["index"].shape[0]
        old = state.params if tune.updates > 1 else None

        def one(now: TrainState, number: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
            (loss, spent), grads = sums(now.params, old, reference, batch, jax.random.fold_in(key, number))
            loss, grads = loss / rows, jax.tree.map(lambda g: g / rows, grads)
            now, metrics = advanced(now, loss, grads, tx, config.optimizer.ema)
            return now, metrics | {"nats": spent / rows}

        after, metrics = jax.lax.scan(one, state, jnp.arange(tune.updates))
        return after._replace(step=state.step + 1), jax.tree.map(lambda a: a[-1], metrics)

    return update
