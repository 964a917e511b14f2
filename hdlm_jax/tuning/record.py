"""Rollouts: texts of the sampler with all that its calls saw and drew, so that each can be scored again.

With choose-then-draw, nothing taken back and xi = 1 a token that is not written yet shows the ancestor of what it
becomes, so that K integers a token (`fell`) stand for the states of all calls. Where draws are thrown away, because a
choice sees them (low_confidence) or written tokens are taken back (rcr), states and draws of each call are kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hdlm_jax.common import parallel
from hdlm_jax.common.parallel import Batch, Tree
from hdlm_jax.config import ConfigError, GenerateConfig
from hdlm_jax.decoding import loop, presets, sampler
from hdlm_jax.decoding.policy import Choice, Numbers, Policy, View
from hdlm_jax.diffusion.draws import fold, wide
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.process import Process
from hdlm_jax.models.trunk import Trunk


class Rollout(NamedTuple):
    """Some texts and how they were written; rows first. C: the most calls that a row can take.

    x: int32 [B, S], tokens. fell: int32 [B, S, K], the call at which a token went below level k = 1..K for good; -1: it
    was never that high (given tokens: nowhere). told: float32 [B, C], the masking level t that the network was told in
    each call. calls: int32 [B], calls that a row took.
    turn: int32 [B, S, K], the turn of a drop in its call, where the order was drawn by a head (dcolt).
    seen, drawn: int32 [B, C, S], states on show in each call and what it made of them before some were thrown away,
    where some may be.
    length: int32 [B, C], index of the block's length that a head drew in each call, -1: none was due (ctrldiff).
    """

    x: jax.Array
    fell: jax.Array
    told: jax.Array
    calls: jax.Array
    turn: jax.Array | None = None
    seen: jax.Array | None = None
    drawn: jax.Array | None = None
    length: jax.Array | None = None


class Transition(NamedTuple):
    """A call of a rollout: states z before and `after` all that was drawn, their levels, what each token's draw is an
    ancestor of (`x`), its turn in the order, all int32 [B, S]; t float32 [B]; the length drawn, int32 [B]."""

    z: jax.Array
    after: jax.Array
    level: jax.Array
    to: jax.Array
    x: jax.Array
    turn: jax.Array | None
    t: jax.Array
    length: jax.Array | None = None


def replay(process: HierarchicalProcess, rollout: Rollout, call: jax.Array) -> Transition:
    """Call number `call` int32 [B] of each row: what the network saw, and what it drew."""
    call = jnp.broadcast_to(call, rollout.calls.shape)
    at = call[:, None, None]
    t = of_call(rollout.told, call)
    if rollout.seen is not None and rollout.drawn is not None:
        z, after = of_call(rollout.seen, call), of_call(rollout.drawn, call)  # behind a row's last call all alike
        x = jnp.asarray(first_tokens(process))[after]
        return Transition(z, after, process.level_of(z), process.level_of(after), x, None, t)
    level, to = (jnp.sum(rollout.fell >= at + more, axis=-1, dtype=jnp.int32) for more in (0, 1))
    turn = None if rollout.turn is None else jnp.max(jnp.where(rollout.fell == at, rollout.turn, 0), axis=-1)
    length = None if rollout.length is None else of_call(rollout.length, call)
    return Transition(shown(process, rollout.x, level), shown(process, rollout.x, to), level, to, rollout.x, turn, t,
                      length)


def of_call(values: jax.Array, call: jax.Array) -> jax.Array:
    """values [B, C, ...] of call [B], of the last one where there is none of that number: [B, ...]."""
    return values[jnp.arange(len(values)), jnp.minimum(call, values.shape[1] - 1)]


def first_tokens(process: HierarchicalProcess) -> np.ndarray:
    """int32 [N]: a token under every state, of a token itself."""
    hierarchy = process.hierarchy
    out = np.zeros(hierarchy.num_states, np.int32)
    for k in range(1, hierarchy.num_levels + 1):
        out[hierarchy.offsets[k] + np.asarray(hierarchy.anc[k])] = np.arange(hierarchy.vocab_size)
    out[: hierarchy.vocab_size] = np.arange(hierarchy.vocab_size)
    return out


def shown(process: HierarchicalProcess, x: jax.Array, level: jax.Array) -> jax.Array:
    """States of tokens x [...] at their levels [...], each its token's own ancestor."""
    out = x
    for k in range(1, process.num_levels + 1):
        out = jnp.where(level == k, process.state_above(0, x, k), out)
    return out


@dataclasses.dataclass(frozen=True)
class Recorded(Choice):
    """Another choice, with what it does kept in memory: fields of a Rollout.

    calls: C, the most that a row can take. draws: whether `seen` and `drawn` are kept.
    """

    choose: Choice
    calls: int
    draws: bool

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
        rows, width = view.z.shape
        out = {"fell": jnp.full((rows, width, view.process.num_levels), -1, jnp.int32),
               "told": jnp.zeros((rows, self.calls), jnp.float32)}
        every = jnp.zeros((rows, self.calls, width), jnp.int32)
        return out | ({"seen": every, "drawn": every} if self.draws else {})

    def remember(self, view: View, z: jax.Array, unmasked: jax.Array) -> dict[str, jax.Array]:
        k, memory = wide(jnp.arange(1, view.process.num_levels + 1), view.level), view.memory
        now = (k <= view.level[..., None]) & (k > view.process.level_of(z)[..., None])
        at = jnp.arange(len(view.z)), view.call
        out = {"fell": jnp.where(now, view.call[:, None, None], memory["fell"]),
               "told": memory["told"].at[at].set(view.t)}
        if self.draws:
            out |= {"seen": memory["seen"].at[at].set(view.z), "drawn": memory["drawn"].at[at].set(view.drawn)}
        return out


def throws_away(policy: Policy) -> bool:
    """Whether draws may be thrown away: a choice sees them, or written tokens are taken back."""
    return policy.order == "draw_then_choose" or policy.revise is not None


def draws_whole_texts(method: presets.Method, levels: int, seq_len: int) -> bool:
    """Whether each call draws all that is open down to tokens, so that it has a whole text to be judged."""
    policy = method.policy
    every = policy.order == "draw_then_choose" or policy.choose == presets.WRITE_ALL
    return every and not 0 < policy.block < seq_len and (policy.choose.straight or levels == 1)


def check_law(process: Process, g: GenerateConfig) -> presets.Method:
    """The method of these settings, whose law is written down here.

    Raises:
      ConfigError: it is not: draws that are no draws of the network, at the states on show, by themselves.
    """
    method = presets.check(g)
    why = presets.unwritten(method)
    why = why or ("its predictions are not those of a state, as it keeps keys and values" if method.cache else "")
    if why := why or ("it rounds the weights" if method.weights else ""):
        raise ConfigError(f"generate.method={g.method!r}: its rollouts cannot be scored: {why}")
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


def make_rollout(network: Trunk, process: HierarchicalProcess, g: GenerateConfig, mesh: Mesh | None = None,
                 context: int = 0) -> Callable[[tuple[Tree, dict[str, Any]], Batch, jax.Array], Rollout]:
    """step((params, numbers), batch, key) -> Rollout of canvases z int32 [b, S] (given: bool [b, S], what stays).

    Rows draw from fold_in(key, index) alone, as all samples do: index int32 [b]. context: as in `sampler.in_blocks`.
    """
    numbers = check_law(process, g).numbers
    try:
        plain = sampler.in_blocks(sampler.program_of(g), network.block, context)
    except ValueError as error:
        raise ConfigError(f"generate.method={g.method!r}: {error}") from error
    policy = plain.method.policy
    shard = parallel.OverBatch(mesh)

    def run(given: tuple[Tree, dict[str, Any]], batch: Batch, keys: jax.Array) -> tuple[Tree, Tree]:
        z, how = batch["z"], loop.Sampling(sync_trip_count=shard.sync_trip_count)
        with jax.ensure_compile_time_eval():  # of numbers that are known
            most = int(policy.choose.bound(cast(Numbers, numbers), z.shape[1], process.num_levels))
        kept = dataclasses.replace(policy, choose=Recorded(policy.choose, most, throws_away(policy)))
        program = dataclasses.replace(plain, method=plain.method._replace(policy=kept))
        call = sampler.call_of(network, process, program, given, batch, how)
        found, rows = sampler.loop_of(process, z, call)
        cache, state = found.begin(fold(keys, 1), z, **rows)
        _, state, _ = found.run(cache, state)
        memory = state.memory
        return (), Rollout(state.z, memory["fell"], memory["told"], state.call,
                           *(memory.get(name) for name in ("turn", "seen", "drawn", "length")))

    def step(given: tuple[Tree, dict[str, Any]], batch: Batch, key: jax.Array) -> Rollout:
        keys = fold(jnp.broadcast_to(key, batch["index"].shape), batch["index"])
        return shard(run)(given, {k: v for k, v in batch.items() if k != "index"}, keys)[1]

    return step
