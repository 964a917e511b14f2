"""The likelihood that a sampler really has: log p(text) under a decoding method, not a bound on another process's.

A method that chooses which tokens to unmask before it draws them makes a text by drops whose probabilities the network
gives. The text decides what each of them draws, so walking the method's own loop with the text written in place of
draws adds up -log p(text) at any number of calls. Where the choice is not random that is exact; where it is (ancestral,
a random order), the mean over choices lies above it (Jensen). See docs/evaluation.md, "Likelihood of a sampler".
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hdlm_jax.common import parallel
from hdlm_jax.common.parallel import Batch, Tree
from hdlm_jax.config import ConfigError, EvaluateConfig, GenerateConfig
from hdlm_jax.decoding import guide, presets, sampler
from hdlm_jax.decoding.loop import Loop, Sampling, loop_of
from hdlm_jax.decoding.policy import Draw, Drawn, Policy, View
from hdlm_jax.decoding.statistics import log_probability_of
from hdlm_jax.diffusion.draws import fold
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.process import Process
from hdlm_jax.models.trunk import Trunk
from hdlm_jax.training.loading import Run


@dataclasses.dataclass(frozen=True)
class TeacherForced(Draw):
    """Writes extra["text"] int32 [b, S] in place of draws; memory nats float32 [b, S]: what they would have cost."""

    def memory(self, view: View) -> dict[str, jax.Array]:
        return {"nats": jnp.zeros(view.z.shape, jnp.float32)}

    def __call__(self, view: View, loop: Loop, prediction: Any, target: jax.Array) -> Drawn:
        """(states of the text, log-probabilities in the place of probabilities, which nobody else here asks for)."""
        process, told, falls = view.process, view.z, target < view.level
        for level in range(process.num_levels):
            told = jnp.where(falls & (target == level), process.state_above(0, view.extra["text"], level), told)
        z, new = view.z.reshape(-1), told.reshape(-1)

        def find(at: jax.Array) -> jax.Array:
            return log_probability_of(process, prediction.select(at), z[at], new[at], loop.policy.clusters)

        return told, loop.at_wanted(find, falls, jnp.zeros(told.shape, jnp.float32))

    def remember(self, view: View, z: jax.Array, unmasked: jax.Array) -> dict[str, jax.Array]:
        return {"nats": view.memory["nats"] - jnp.where(unmasked, view.sure, 0.0)}


@dataclasses.dataclass(frozen=True)
class TeacherForcedEnergy(TeacherForced):
    """The same where a draw is one of k candidates, chosen by exp(-E) (EDLM): nats whose mean lies above -log p.

    A text x that lies under the states u that fall in a call, drawn from p_theta(. | u), and k - 1 others from
    p_theta(. | z) give p(u | z) = p_theta(u | z) E[k e^-E(x) / (e^-E(x) + the sum of the others' e^-E)] of the sampler
    with its k candidates: an expectation, whose -log is at most the mean -log (as in arXiv 1910.14265). Without x in
    the sum it would be below: the release has one other text in place of log Z, and flatters by KL(p_theta || q).
    """

    by: guide.EnergyDraw = guide.EnergyDraw()
    whole = True
    random = True

    def __call__(self, view: View, loop: Loop, prediction: Any, target: jax.Array) -> Drawn:
        told, sure = super().__call__(view, loop, prediction, target)
        keys, inside, falls = self.by.keys(view), self.by.inside(view), target < view.level
        energy = functools.partial(self.by.energy, view, loop, prediction, inside)
        own, others = energy(keys[0], told), jax.lax.map(energy, keys[1:])
        sums = jax.nn.logsumexp(-jnp.concatenate([own[None], others]), axis=0)
        nats = jnp.where(inside, own + sums - math.log(len(keys)), 0.0)
        each = jnp.where(falls, (nats / jnp.maximum(jnp.sum(falls, axis=1), 1))[:, None], 0.0)
        return told, sure - each


def teacher_forced(method: presets.Method, process: Process) -> Policy:
    """The method's policy with a text in place of draws.

    Raises:
      ValueError: what the likelihood of a text is not known under: why.
    """
    policy, draw = method.policy, method.policy.draw
    by_energy = isinstance(draw, guide.EnergyDraw)
    if not process.unmasks:
        raise ValueError("this process has no levels that drop; its NELBO is what there is" if not process.exact else
                         "an autoregressive run's NELBO is its likelihood already")
    if process.xi < 1:
        raise ValueError(f"diffusion.xi={process.xi}: a text can be written by way of any cluster; at xi = 1 alone it "
                         "decides its own")
    keeps = "what it draws decides what it keeps" if policy.order != "choose_then_draw" else ""
    back = "it takes tokens back" if policy.revise is not None else ""
    free = by_energy and process.force_transition == "none" and process.num_levels > 1
    alone = method._replace(policy=dataclasses.replace(policy, draw="sample")) if by_energy else method
    if why := presets.unwritten(alone) or keeps or back or "its texts need a force transition" * free:
        raise ValueError(f"a text's likelihood under it is not known: {why}")
    forced = TeacherForcedEnergy(draw) if isinstance(draw, guide.EnergyDraw) else TeacherForced()
    return dataclasses.replace(policy, draw=forced)


def is_exact(policy: Policy, process: Process) -> bool:
    """Whether nats under the policy are -log p, not the mean of a bound over random choices.

    Without a force transition a token may be drawn off the cluster on show at K > 2, and a text has several ways.
    """
    one_way = process.num_levels <= 2 or process.force_transition != "none"
    return one_way and not any(hook.random for hook in policy.hooks)


def make_likelihood_step(network: Trunk, process: HierarchicalProcess, program: sampler.Program,
                         numbers: Mapping[str, Any], mesh: Mesh | None = None, tools: sampler.Tools | None = None
                         ) -> Callable[[Tree, Batch, jax.Array], tuple[jax.Array, jax.Array]]:
    """step(params, batch, key) -> (nats float32 [b, S], calls int32 [b]); tools: a helper's (sampler.tools_of),
    params then being a pair.

    batch: x int32 [b, S]; score bool [b, S], False at tokens that are given; length int32 [b], tokens of a row; pair
    int32 [b], a row's random numbers. program: of `teacher_forced`.
    """
    shard, mask = parallel.OverBatch(mesh), process.mask_id

    def run(params: Tree, batch: Batch, keys: jax.Array) -> tuple:
        x, score, sync = batch["x"], batch["score"], shard.sync_trip_count
        params, theirs = params if tools else (params, {})
        how = Sampling(sync_trip_count=sync, tools=sampler.own_tools(params) | (tools(theirs) if tools else {}))
        denoise = sampler.denoiser(program, network, params, process, {"method": numbers}, None, how)
        loop = loop_of(denoise, process, program.method.policy, x.shape, numbers, how)
        extra = {"text": x} | {name: batch[name] for name in ["features"] if name in batch}
        cache, s = loop.begin(fold(keys, 1), jnp.where(score, mask, x), ~score, batch["length"], extra)
        _, s, _ = loop.run(cache, s)
        return (), (s.memory["nats"], s.call)

    def step(params: Tree, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = fold(jnp.broadcast_to(key, batch["pair"].shape), batch["pair"])
        return shard(run)(params, {k: v for k, v in batch.items() if k != "pair"}, keys)[1]

    return step


def split_decoding(text: str) -> tuple[str, str]:
    """A decoding as evaluate.decodings names it, "NAME option=value ...": its name, its options."""
    name, _, options = text.strip().partition(" ")
    return name, options


def check(settings: EvaluateConfig) -> None:
    """ConfigError where evaluate.decodings has an unknown method or option."""
    for text in settings.decodings:
        try:
            presets.make(*split_decoding(text))
        except ValueError as error:
            raise ConfigError(f"evaluate.decodings={text!r}: {error}") from error


def policies(run: Run) -> dict[str, tuple[sampler.Program, dict[str, Any], bool]]:
    """Of every decoding of evaluate.decodings its program, its numbers, and whether its likelihood is exact.

    Raises:
      ConfigError: a decoding under which this run's likelihood is not known.
    """
    found = {}
    for text in run.config.evaluate.decodings:
        name, options = split_decoding(text)
        program = sampler.program_of(GenerateConfig(method=name, options=options))
        try:
            program = sampler.in_blocks(program, run.network.block, run.trained.decoder.own_block)
            policy = teacher_forced(program.method, run.process)
        except ValueError as error:
            raise ConfigError(f"evaluate.decodings={text!r}: {error}") from error
        sampler.check_heads(program.method, run.params)
        numbers = presets.numbers(presets.make(name, options), run.tokenizer.eot)
        found[text] = program, numbers, is_exact(policy, run.process)
    return found


def canvases_of(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """x, score, length and features of rows as a sampler writes them; ConfigError where a row holds documents that do
    not see each other, which no canvas does."""
    segment = rows["segment"]
    inside = segment >= 0
    if np.any(inside & (segment != segment[:, :1])):
        raise ConfigError("evaluate.decodings: rows hold several documents that do not see each other "
                          "(data.packing='documents'), a canvas holds one; it is known for the other packings")
    length = np.where(rows["score"], np.arange(1, segment.shape[1] + 1), 0).max(1)
    canvases = {"x": rows["x"], "score": rows["score"], "length": length.astype(np.int32)}
    return canvases | {name: rows[name] for name in ["features"] if name in rows}


def likelihoods(run: Run, rows: dict[str, np.ndarray], program: sampler.Program, numbers: dict[str, Any], draws: int,
                name: str) -> tuple[np.ndarray, np.ndarray]:
    """(nats float64 [draws, rows] under a decoding, calls int64 [draws, rows]); a draw is one of its random choices."""
    e, canvases = run.config.evaluate, canvases_of(rows)
    n, width = len(canvases["x"]), canvases["x"].shape[1]
    method = program.method._replace(policy=teacher_forced(program.method, run.process))
    program = dataclasses.replace(program, method=method, cut=bool((canvases["length"] < width).any()))
    params = sampler.quantised(run.params, method.weights) if method.weights else run.params
    helper = sampler.load_helper(run, run.config.generate) if method.needs else None
    tools = sampler.checked_tools(helper, method, run.process, f"evaluate.decodings={name!r}")
    params = (params, helper.params) if helper and tools else params
    step = make_likelihood_step(run.network, cast(HierarchicalProcess, run.process), program, numbers, run.mesh, tools)
    most = e.batch_size or parallel.batch_shards(run.mesh) * max(1, 8192 // width)

    def batch(pick: np.ndarray) -> dict[str, np.ndarray]:
        return {k: v[pick % n] for k, v in canvases.items()} | {"pair": pick.astype(np.int32)}

    nats, calls = np.zeros(draws * n), np.zeros(draws * n, np.int64)
    over = parallel.RowProgram(step, run.mesh, params)
    for pick, (cost, called) in over(params, draws * n, batch, most, jax.random.key(e.seed), unit="seq", name=name):
        nats[pick], calls[pick] = cost.astype(np.float64).sum(-1), called
    return nats.reshape(draws, n), calls.reshape(draws, n)

