"""Rollouts: texts of the sampler with the call at which each token went down each level, from which all states follow.

With choose-then-draw, nothing taken back and xi = 1 a token that is not written yet shows the ancestor of what it
becomes, so that K integers a token (`fell`) stand for the states of all calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hdlm_jax.common import parallel
from hdlm_jax.common.parallel import Batch, Tree
from hdlm_jax.config import ConfigError, GenerateConfig
from hdlm_jax.decoding import loop, presets, sampler
from hdlm_jax.decoding.policy import Choice, Numbers, View
from hdlm_jax.diffusion.draws import fold, wide
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.process import Process
from hdlm_jax.models.trunk import Trunk

_FIT = "choose one that chooses, then draws, as ancestral, first_hitting, any_order, max_prob, margin or entropy"


class Rollout(NamedTuple):
    """Some texts and how they were written; rows first.

    x: int32 [B, S], tokens. fell: int32 [B, S, K], the call at which a token went below level k = 1..K; -1: it was
    never that high (given tokens: nowhere). told: float32 [B, S, K], the masking level t that the network was told in
    that call. calls: int32 [B], calls that a row took, each with a token or more that fell.
    """

    x: jax.Array
    fell: jax.Array
    told: jax.Array
    calls: jax.Array


class Transition(NamedTuple):
    """A call of a rollout: states z before and `after` it, their levels, all int32 [B, S]; t float32 [B]."""

    z: jax.Array
    after: jax.Array
    level: jax.Array
    to: jax.Array
    t: jax.Array


def replay(process: HierarchicalProcess, rollout: Rollout, call: jax.Array) -> Transition:
    """Call number `call` int32 [B] of each row: what the network saw, and what came of it."""
    at = jnp.broadcast_to(call, rollout.calls.shape)[:, None, None]
    level, to = (jnp.sum(rollout.fell >= at + more, axis=-1, dtype=jnp.int32) for more in (0, 1))
    t = jnp.max(jnp.where(rollout.fell == at, rollout.told, 0.0), axis=(1, 2))
    return Transition(shown(process, rollout.x, level), shown(process, rollout.x, to), level, to, t)


def shown(process: HierarchicalProcess, x: jax.Array, level: jax.Array) -> jax.Array:
    """States of tokens x [...] at their levels [...], each its token's own ancestor."""
    out = x
    for k in range(1, process.num_levels + 1):
        out = jnp.where(level == k, process.state_above(0, x, k), out)
    return out


@dataclasses.dataclass(frozen=True)
class Recorded(Choice):
    """Another choice, with what it does kept in memory: `fell` and `told` of a Rollout."""

    choose: Choice

    @property
    def straight(self) -> bool:  # type: ignore[override]
        return self.choose.straight

    def stamp(self, view: View) -> jax.Array:
        return self.choose.stamp(view)

    def time(self, view: View) -> jax.Array:
        return self.choose.time(view)

    def target(self, view: View) -> jax.Array:
        return self.choose.target(view)

    def bound(self, numbers: Numbers, positions: int, levels: int) -> Any:
        return self.choose.bound(numbers, positions, levels)

    def goes_on(self, numbers: Numbers, call: jax.Array) -> jax.Array:
        return self.choose.goes_on(numbers, call)

    def memory(self, view: View) -> dict[str, jax.Array]:
        shape = (*view.z.shape, view.process.num_levels)
        return {"fell": jnp.full(shape, -1, jnp.int32), "told": jnp.zeros(shape, jnp.float32)}

    def remember(self, view: View, z: jax.Array, unmasked: jax.Array) -> dict[str, jax.Array]:
        k = wide(jnp.arange(1, view.process.num_levels + 1), view.level)
        now = (k <= view.level[..., None]) & (k > view.process.level_of(z)[..., None])
        new = {"fell": view.call[:, None, None], "told": view.t[:, None, None]}
        return {name: jnp.where(now, value, view.memory[name]) for name, value in new.items()}


def check_law(process: Process, g: GenerateConfig) -> presets.Method:
    """The method of these settings, whose law is written down here.

    Raises:
      ConfigError: it is not: draws that are no draws of the network, choices that see them, texts that are revised.
    """
    method = presets.check(g)
    policy, name = method.policy, f"generate.method={g.method!r}"
    why = {"takes the likeliest state, which has no gradient: add draw=sample to generate.options": (
               policy.draw == "argmax"),
           f"chooses by what was drawn, so that thrown-away draws count as well: {_FIT}": (
               policy.order == "draw_then_choose"),
           f"takes written tokens back: {_FIT}": policy.revise is not None,
           f"drafts, commits or lets texts grow, whose law is not written down: {_FIT}": (
               policy.verify or policy.commit or policy.lengths),
           f"does not draw from the network's own distribution alone: {_FIT}": (
               bool(method.guide or method.needs or method.weights) or not isinstance(policy.draw, str)),
           f"keeps keys and values, so that its predictions are not those of a state: {_FIT}": method.cache}
    for text, broken in why.items():
        if broken:
            raise ConfigError(f"{name}: its rollouts cannot be scored, it {text}")
    if g.top_p != 1 or g.temperature <= 0:
        rule = "a nucleus has no gradient at its edge, give 1" if g.top_p != 1 else "must be positive"
        which = "top_p" if g.top_p != 1 else "temperature"
        raise ConfigError(f"generate.{which}={getattr(g, which)}: {rule}, so that rollouts can be scored")
    if g.force_transition:
        raise ConfigError(f"generate.force_transition={g.force_transition!r}: rollouts are scored as trained; leave it "
                          "out")
    if g.length:
        raise ConfigError(f"generate.length={g.length}: rollouts are rows of model.seq_len tokens; give 0")
    if not process.unmasks or process.xi != 1 or (process.num_levels > 1 and process.force_transition == "none"):
        raise ConfigError("tune.objective: rollouts are scored for diffusion.process='hierarchical' with xi=1 and, "
                          "with clusters, a force_transition other than none; this run has another")
    return method


def make_rollout(network: Trunk, process: HierarchicalProcess, g: GenerateConfig, mesh: Mesh | None = None
                 ) -> Callable[[tuple[Tree, dict[str, Any]], Batch, jax.Array], Rollout]:
    """step((params, numbers), batch, key) -> Rollout of canvases z int32 [b, S] (given: bool [b, S], what stays).

    Rows draw from fold_in(key, index) alone, as all samples do: index int32 [b].
    """
    check_law(process, g)
    program = sampler.program_of(g)
    policy = dataclasses.replace(program.method.policy, choose=Recorded(program.method.policy.choose))
    program = dataclasses.replace(program, method=program.method._replace(policy=policy))
    shard = parallel.OverBatch(mesh)

    def run(given: tuple[Tree, dict[str, Any]], batch: Batch, keys: jax.Array) -> tuple[Tree, Tree]:
        how = loop.Sampling(sync_trip_count=shard.sync_trip_count)
        call = sampler.call_of(network, process, program, given, batch, how)
        found, rows = sampler.loop_of(process, batch["z"], call)
        cache, state = found.begin(fold(keys, 1), batch["z"], **rows)
        _, state, _ = found.run(cache, state)
        return (), Rollout(state.z, state.memory["fell"], state.memory["told"], state.call)

    def step(given: tuple[Tree, dict[str, Any]], batch: Batch, key: jax.Array) -> Rollout:
        keys = fold(jnp.broadcast_to(key, batch["index"].shape), batch["index"])
        return shard(run)(given, {k: v for k, v in batch.items() if k != "index"}, keys)[1]

    return step
