"""Compiled sampling of canvases from a trained network, by any method (docs/decoding.md)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hdlm_jax.common import parallel
from hdlm_jax.common.console import compiling, progress
from hdlm_jax.common.parallel import Batch, Tree
from hdlm_jax.config import ASIDE, LATENT_METHODS, ConfigError, GenerateConfig
from hdlm_jax.data.tokenizers import Tokenizer
from hdlm_jax.decoding import caches, channel, choose, diagonal, drafts, guide, latents, loop, presets
from hdlm_jax.decoding import canvas as canvases
from hdlm_jax.decoding.bursts import Burst, Bursts
from hdlm_jax.decoding.policy import Denoiser, View
from hdlm_jax.decoding.sparse_attention import Sparse, SparseD
from hdlm_jax.diffusion import autoregressive, gidd
from hdlm_jax.diffusion.autoregressive import AutoregressiveProcess
from hdlm_jax.diffusion.draws import fold
from hdlm_jax.diffusion.gidd import GiddProcess
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.prediction import Predictions
from hdlm_jax.diffusion.process import Process
from hdlm_jax.models import block_lengths, order, quantise
from hdlm_jax.models.adjust import Adjust
from hdlm_jax.models.channel import ChannelProcess
from hdlm_jax.models.energy import EnergyNetwork
from hdlm_jax.models.features import given as given_features
from hdlm_jax.models.latents import LatentNetwork, LatentProcess, LatentState, in_front, told_of
from hdlm_jax.models.looped import LoopedDecoder
from hdlm_jax.models.network import Network
from hdlm_jax.models.trunk import Trunk
from hdlm_jax.training.loading import Run, load_here

Classifier: TypeAlias = Callable[[jax.Array], jax.Array]  # one-hot states float32 [b, S, N] -> log p(y) [b]
Tools: TypeAlias = Callable[[Tree], dict[str, Callable[..., jax.Array]]]  # a helper's parameters -> loop.Sampling.tools


@dataclasses.dataclass(frozen=True)
class Program:
    """What of config.GenerateConfig a compiled step depends on."""

    method: presets.Method  # but for its numbers
    temperature: float | None  # 0 and 1 are programs of their own; None: an input
    top_p: float | None
    cut: bool  # rows end before the canvas does
    force_transition: str
    constrained: bool = False  # positions have kinds of tokens (hdlm_jax.decoding.canvas)


def program_of(g: GenerateConfig) -> Program:
    method = method_of(g)
    policy = dataclasses.replace(method.policy, clusters=g.clusters)
    method = method._replace(policy=policy, numbers=())  # type: ignore[arg-type]
    return Program(method, g.temperature if g.temperature in (0, 1) else None, 1.0 if g.top_p == 1 else None,
                   g.length > 0 or policy.lengths is not None, g.force_transition)


def in_blocks(program: Program, size: int, context: int = 0) -> Program:
    """The program for a network that counts blocks from a row's beginning: of model.block=size, or an open one whose
    tokens see their block of `context` and those before (DecoderConfig.own_block); 0: none.

    Raises:
      ValueError: it does not write blocks of that size; it keeps keys of blocks that are not whole ones of `context`.
    """
    policy = program.method.policy
    if context and policy.block % context and isinstance(program.method.cache, caches.BlockCausal):
        raise ValueError(f"keeps the keys of finished blocks, which this network has of {context} tokens; give the "
                         f"options 'block={context}' or a multiple")
    if size and policy.block != size:
        raise ValueError(f"a network of model.block={size} writes blocks in turn; choose bd3lm with the options "
                         f"'block={size}'")
    method = program.method._replace(policy=dataclasses.replace(policy, aligned=policy.block * (size + context) > 0))
    return dataclasses.replace(program, method=method)


def method_of(g: GenerateConfig) -> presets.Method:
    return presets.make(g.method, g.options, g.steps)


def numbers_of(g: GenerateConfig, seq_len: int, eos: int = 0) -> dict[str, Any]:
    """The settings that are inputs of the compiled loop; eos: token of the end of text."""
    method = presets.numbers(method_of(g), eos) | {"maximum": np.int32(g.length or seq_len)}
    return {"steps": np.int32(g.steps), "length": np.int32(g.length or seq_len), "corrections": np.int32(g.corrections),
            "correction_temperature": np.float32(g.correction_temperature), "told": np.float32(g.channel_told),
            "temperature": np.float32(g.temperature), "top_p": np.float32(g.top_p), "method": method}


def denoiser(program: Program, network: Trunk, params: Tree, process: HierarchicalProcess, numbers: Mapping[str, Any],
             classifier: Classifier | None, how: loop.Sampling) -> Denoiser:
    """The network as the program calls it: with its cache or attention, its constraints, its guidance."""
    method = program.method
    out: Denoiser
    if method.cache is None:
        out = caches.Uncached(network, params, program.cut)
    elif isinstance(method.cache, SparseD):
        out = Sparse(method.cache, cast(Network, network), params)  # whose attention it replaces
    elif isinstance(method.cache, Burst):
        out = Bursts(method.cache, network, params, how.tools["adjust"], program.cut, how.sync_trip_count)
    else:
        out = caches.Cached(cast(caches.Rule, method.cache), network, params, sync_trip_count=how.sync_trip_count)
    if program.constrained:
        out = guide.Constrained(process, out, numbers["allowed"])
    if method.guide[:1] == ("cfg",):
        out = guide.CFG(process, out, numbers["method"]["weight"], method.guide[1])
    elif method.guide:
        score = guide.first_order(cast(Classifier, classifier), process.hierarchy)
        out = guide.Classified(process, out, score, numbers["method"]["weight"])
    return out


def reads(network: Trunk, params: Tree) -> Callable[[jax.Array], Predictions]:
    """tokens int32 [b, S] -> prediction of each given those before it, of an autoregressive run."""
    shifted = AutoregressiveProcess(network.head.hierarchy).shifted
    return lambda x: network.denoise(params, shifted(x), jnp.zeros(len(x)))


HEADS = {order.NAME: ("dcolt", "an order"), block_lengths.NAME: ("ctrldiff", "lengths of blocks")}  # who reads them


def own_tools(params: Tree) -> dict[str, Callable[..., jax.Array]]:
    """What hooks call beside the network (loop.Sampling): the scores of its heads for choices, of a prediction as
    `Trunk.denoise` makes it."""
    def lengths(p: Any, view: View) -> jax.Array:
        return block_lengths.scores(params, p.hidden, view.active & (view.level == 0), view.free & (view.level > 0),
                                    view.t)

    heads: dict[str, Callable[..., jax.Array]] = {
        order.NAME: lambda p, view: order.scores(params, p.hidden, view.level, view.t), block_lengths.NAME: lengths}
    return {name: scores for name, scores in heads.items() if name in params}


def check_heads(method: presets.Method, params: Tree) -> None:
    """ConfigError where the method reads a head that these parameters do not have."""
    if method.needs in HEADS and method.needs not in params:
        name, what = HEADS[method.needs]
        raise ConfigError(f"generate.method={name!r} needs a head for {what}: train by rewards with "
                          f"model.{method.needs}=True (docs/training.md)")


def helper_kind(run: Run) -> str:
    """What a run is to another one, of presets.HELPERS: how it was trained, or that it is autoregressive."""
    return "autoregressive" if run.process.causal else run.trained.train.objective


def checked_tools(helper: Run | None, method: presets.Method, process: Process, asked: str) -> Tools | None:
    """`tools_of`; ConfigError, which begins with what is asked for, where the helper is none that the method needs."""
    kinds = presets.HELPERS.get(method.needs, ())
    if kinds and (helper is None or helper_kind(helper) not in kinds):
        raise ConfigError(f"{asked} needs a second run with this run's tokenizer, of kind {' or '.join(kinds)}: give "
                          "its workdir as generate.helper")
    return tools_of(helper, method, process)


def tools_of(helper: Run | None, method: presets.Method, process: Process) -> Tools | None:
    """What hooks call of a helper; None where the method needs no helper."""
    if helper is None or method.needs not in presets.HELPERS:
        return None
    network: Any = helper.network
    if helper_kind(helper) == "energy":
        energy: EnergyNetwork = network
        return lambda params: {"energy": lambda x, z, log_p, t: energy.energy(params, z, x, t)}
    if helper_kind(helper) == "adjust":
        layer: Adjust = network
        return lambda params: {"adjust": functools.partial(layer.adjusted, params)}

    def autoregressive(params: Tree) -> dict[str, Callable[..., Any]]:
        ar = reads(network, params)
        return {"ar": ar, "energy": guide.ar_energy(ar, process)}

    return autoregressive


class Call(NamedTuple):
    """What a compiled step has to sample with."""

    network: Trunk
    params: Tree
    program: Program
    numbers: dict[str, Any]
    batch: Batch
    length: jax.Array
    classifier: Classifier | None
    how: loop.Sampling


def call_of(network: Trunk, process: Process, program: Program, given: tuple[Tree, dict[str, Any]], batch: Batch,
            how: loop.Sampling, helper: Tools | None = None, classifier: Classifier | None = None) -> Call:
    """A step's arguments as what samples takes them; given: (params, numbers), of a helper too (make_sample_step)."""
    (params, numbers), theirs = given, None
    if helper is not None:
        params, theirs = params
    tools = own_tools(params) | (helper(theirs) if helper is not None else {})
    heat, nucleus = (numbers[name] if fixed is None else fixed for name, fixed in (
        ("temperature", program.temperature), ("top_p", program.top_p)))
    how = dataclasses.replace(how, tools=tools, temperature=heat, top_p=nucleus)
    return Call(network, params, program, numbers, batch, batch.get("length", numbers["length"]), classifier, how)


@functools.singledispatch
def sample_canvas(process: Process, keys: jax.Array, z: jax.Array, call: Call) -> tuple[jax.Array, dict]:
    """Tokens int32 [b, S] from canvases z, and what `hdlm_jax.decoding.loop.sample` tells; keys [b].

    Every process has its own way back; `sample_canvas.register` takes that of another.
    """
    raise TypeError(f"{type(process).__name__}: no sampler is registered for this process")


def loop_of(process: HierarchicalProcess, z: jax.Array, call: Call) -> tuple[loop.Loop, dict[str, Any]]:
    """(the loop of a compiled step, what its rows begin with beside keys and canvas)."""
    policy, numbers, length = call.program.method.policy, call.numbers, call.length
    if policy.lengths is not None:
        prompt = jnp.argmax(process.level_of(z) > 0, axis=1).astype(jnp.int32)
        length = jnp.minimum(prompt + numbers["method"]["start"], length)
    denoise = denoiser(call.program, call.network, call.params, process, numbers, call.classifier, call.how)
    extra = {name: call.batch[name] for name in ["kind"] * call.program.constrained + ["features"]
             if name in call.batch}
    rows = {"given": call.batch.get("given"), "length": length, "extra": extra}
    return loop.loop_of(denoise, process, policy, z.shape, numbers["method"], call.how), rows


@sample_canvas.register
def _(process: HierarchicalProcess, keys: jax.Array, z: jax.Array, call: Call) -> tuple[jax.Array, dict]:
    found, rows = loop_of(process, z, call)
    tokens, stats = found.sample(keys, z, **rows)
    return tokens, {"length": rows["length"]} | stats


def whole(call: Call, z: jax.Array) -> Any:
    """The network on whole rows [b, S], without a cache: (states, t [b]) -> predictions."""
    params = given_features(call.params, call.batch.get("features"))
    return functools.partial(call.network.denoise, params, segment=past_end(call, z))


def past_end(call: Call, z: jax.Array) -> jax.Array | None:
    """Segments int32 [b, S] of rows that end before the canvas does."""
    past = (jnp.arange(z.shape[1])[None] >= jnp.reshape(call.length, (-1, 1))).astype(jnp.int32)
    return jnp.broadcast_to(past, z.shape) if call.program.cut else None


@sample_canvas.register
def _(process: ChannelProcess, keys: jax.Array, z: jax.Array, call: Call) -> tuple[jax.Array, dict]:
    choice: Any = call.program.method.policy.choose
    return channel.sample(keys, whole(call, z), process, z, steps=call.numbers["steps"], told=call.numbers["told"],
                          singly="reveals" in call.numbers["method"], score=choice.score if choice.scored else None,
                          **_draws(call.how))


@sample_canvas.register
def _(process: LatentProcess, keys: jax.Array, z: jax.Array, call: Call) -> tuple[jax.Array, dict]:
    """Latents in generate.steps calls, then the symbols by the call's method, behind them as behind features."""
    network, places = cast(LatentNetwork, call.network), z.shape[1] // process.per
    segment = past_end(call, z)

    def estimate(state: LatentState, t: jax.Array) -> jax.Array:
        return network.estimate(call.params, network.read(call.params, state, t, segment))

    state, calls = latents.sample(fold(keys, 4), estimate, process, z, steps=call.numbers["steps"],
                                  sync_trip_count=call.how.sync_trip_count)
    more = {name: in_front(call.batch[name], fill, places) for name, fill in (("given", True), ("kind", 0))
            if name in call.batch}
    batch = call.batch | more | {"features": told_of(state, process.per)}
    words = call._replace(network=network.of_words, batch=batch, length=call.length + places)
    tokens, stats = sample_canvas(process.symbols, keys, in_front(z, 0, places), words)
    stats |= {name: stats[name] + calls for name in ("calls", "row_forwards", "call") if name in stats}
    stats |= {name: stats[name][..., places:] for name in ("z", "confidence") if name in stats}
    return tokens[:, places:], stats | {"length": call.length}


@sample_canvas.register
def _(process: GiddProcess, keys: jax.Array, z: jax.Array, call: Call) -> tuple[jax.Array, dict]:
    numbers = {name: call.numbers[name] for name in ("steps", "corrections", "correction_temperature")}
    return gidd.sample(keys, whole(call, z), process, z, **numbers, **_draws(call.how))


@sample_canvas.register
def _(process: AutoregressiveProcess, keys: jax.Array, z: jax.Array, call: Call) -> tuple[jax.Array, dict]:
    by, numbers = call.program.method.cache, call.numbers["method"]
    if isinstance(by, diagonal.Diagonal):
        network = cast(LoopedDecoder, call.network)  # as Sampler has checked
        return diagonal.sample(keys, network, call.params, process, z, by, exit=numbers["exit"],
                               noise=numbers["noise"], length=call.length, **_draws(call.how))
    decode = functools.partial(call.network.next_token, given_features(call.params, call.batch.get("features")))
    return autoregressive.sample(keys, decode, process, z, call.network.empty_cache(*z.shape),
                                 length=jnp.max(call.length), **_draws(call.how))


def _draws(how: loop.Sampling) -> dict[str, Any]:
    return dict(temperature=how.temperature, top_p=how.top_p, sync_trip_count=how.sync_trip_count, frames=how.frames)


def make_sample_step(network: Trunk, process: Process, program: Program, mesh: Mesh | None = None, frames: int = 0,
                     helper: Tools | None = None, classifier: Classifier | None = None
                     ) -> Callable[..., dict[str, jax.Array]]:
    """step((params, numbers), batch, key) -> {tokens int32 [b, S], calls int32 [b], row_forwards int32 [b], ...}.

    batch: z int32 [b, S], the canvas (masks where free, tokens and clusters where given), index int32 [b]; of a Canvas
    also given, kind, length and features. numbers: see `numbers_of`, with a Canvas's table `allowed`. helper: as
    `tools_of` gives it, params then being a pair. The rest is what `hdlm_jax.decoding.loop.sample` gives.
    """
    shard = parallel.OverBatch(mesh)
    process = at_sampling(process, program)

    def run(given: tuple[Tree, dict[str, Any]], batch: Batch, keys: jax.Array) -> tuple[tuple[()], Batch]:
        z, how = batch["z"], loop.Sampling(sync_trip_count=shard.sync_trip_count, frames=frames)
        call = call_of(network, process, program, given, batch, how, helper, classifier)
        tokens, stats = sample_canvas(process.with_params(call.params), fold(keys, 1), z, call)
        each = {"calls": jnp.broadcast_to(stats["calls"], z.shape[:1]),
                "length": jnp.broadcast_to(stats.get("length", call.length), z.shape[:1])}
        if frames:
            each["call"] = jnp.broadcast_to(stats["call"], (len(z), frames + 1))
        return (), {"tokens": tokens} | stats | each

    def step(given: tuple[Tree, dict[str, Any]], batch: Batch, key: jax.Array) -> Batch:
        keys = fold(jnp.broadcast_to(key, batch["index"].shape), batch["index"])
        return shard(run)(given, {k: v for k, v in batch.items() if k != "index"}, keys)[1]

    return step


def at_sampling(process: Process, g: GenerateConfig | Program) -> Process:
    """The process that samples: as trained, but for g.force_transition where that is given."""
    if not g.force_transition:
        return process
    if not process.force_transition:
        raise ConfigError(f"generate.force_transition={g.force_transition!r}: this run's process has no force "
                          "transition; leave it empty")
    return dataclasses.replace(cast(HierarchicalProcess, process), force_transition=g.force_transition)


def exactness(process: Process, g: GenerateConfig) -> str:
    """'exact' where every draw follows the distribution whose NELBO is measured, else 'inexact: ' and why."""
    xi, levels, reasons = process.xi, process.num_levels, []
    trained, force = process.force_transition, at_sampling(process, g).force_transition
    if levels > 1 and g.clusters == "clean" and (xi < 1 or force == "none" and levels > 2):
        reasons.append(f"clusters=clean at xi={xi:g}" + " without a force transition" * (force == "none"))
    if levels > 1 and force != trained and (xi < 1 or "none" in (force, trained)):  # at xi = 1 the others are one
        reasons.append(f"force_transition={force} where {trained} was trained")
    method = method_of(g)
    tilted = method.cache is not None or method.guide or method.weights or method.policy.draw != "sample"
    if tilted or not isinstance(method.policy.choose, choose.Planned):
        reasons.append(f"method={g.method}")
    reasons += ["a schema"] if g.schema else []
    reasons += ["latents move by the mean"] if process.methods == LATENT_METHODS else []
    plain = {"corrections": 0, "channel_told": 0, "temperature": 1, "top_p": 1}
    reasons += [f"{name}={value:g}" for name, usual in plain.items() if (value := getattr(g, name)) != usual]
    return f"inexact: {', '.join(reasons)}" if reasons else "exact"


@functools.lru_cache(maxsize=4096)
def key_data(seed: int) -> np.ndarray:
    """What jax.random.key(seed) is made of."""
    return np.asarray(jax.random.key_data(jax.random.key(seed)))


def quantised(params: Tree, weights: tuple) -> Tree:
    """Parameters rounded as Method.weights says, where they lay."""
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), quantise.quantise(params, *weights), params)


class Sampler:
    """Compiled sampling of canvases [n, S] in batches; every sample has its own random numbers.

    Args:
      eos: token of the end of text. helper: a loaded run, for the methods that need one (presets.HELPERS).
      classifier: function of one-hot states float32 [b, S, N] -> log p(y) [b], for method="classifier".
      context: as in `in_blocks`.
    """

    def __init__(self, network: Trunk, process: Process, mesh: Mesh, params: Tree, *, eos: int = 0,
                 helper: Run | None = None, classifier: Classifier | None = None, context: int = 0):
        self.network, self.process, self.mesh, self.params, self.eos = network, process, mesh, params, eos
        self.helper, self.classifier, self.context = helper, classifier, context
        self.aside = True  # compiling is told on stderr, as stdout may be for texts
        self._made: set[tuple[Any, ...]] = set()  # programs and shapes that are compiled
        self._step = functools.lru_cache(maxsize=8)(self._compile)
        self._weights = functools.lru_cache(maxsize=2)(lambda weights: quantised(self.params, weights))

    def _compile(self, program: Program, frames: int = 0) -> parallel.Jitted:
        helper = tools_of(self.helper, program.method, self.process)
        step = make_sample_step(self.network, self.process, program, self.mesh, frames, helper, self.classifier)
        return parallel.compile_sample_step(step, self.mesh, self.params_of(program.method))

    def params_of(self, method: presets.Method) -> Tree:
        params = self._weights(method.weights) if method.weights else self.params
        return (params, self.helper.params) if self.helper and method.needs in presets.HELPERS else params

    def _check(self, method: presets.Method, g: GenerateConfig, behind: bool, constrained: bool) -> None:
        """ConfigError where this run, or this canvas, cannot be sampled by that method.

        behind: something is given behind a blank; constrained: places have kinds of tokens.
        """
        if self.process.causal and behind:
            raise ConfigError("an autoregressive model goes on from a prompt; it cannot fill blanks before given words")
        if isinstance(method.cache, diagonal.Diagonal):
            method.cache.check(self.network, self.params)
        elif not self.process.unmasks and g.method not in ("ancestral", *self.process.methods):
            raise ConfigError(f"generate.method={g.method!r}: this process has no levels that drop; choose 'ancestral'")
        if self.process.methods and g.method not in self.process.methods:
            raise ConfigError(f"generate.method={g.method!r}: is not built for hierarchy.map='learned'; choose one of "
                              f"{', '.join(self.process.methods)}")
        if method.policy.lengths is not None and behind:
            raise ConfigError(f"generate.method={g.method!r}: its canvas grows, so nothing can be given behind a blank")
        if constrained and not self.process.unmasks:
            raise ConfigError("this process cannot keep to kinds of words; an HDLM or MDLM can")
        if constrained and isinstance(method.policy.draw, drafts.Guided):
            raise ConfigError(f"generate.method={g.method!r}: its helper does not know which words a place may take")
        if constrained and self.process.xi < 1 and at_sampling(self.process, g).force_transition == "within":
            raise ConfigError("generate.force_transition='within': at xi < 1 a cluster on show may have no word that "
                              "its place may take; choose another")
        if method.needs in HEADS and constrained:
            raise ConfigError(f"generate.method={g.method!r}: it is not for places with kinds of words; choose another")
        check_heads(method, self.params)
        checked_tools(self.helper, method, self.process, f"generate.method={g.method!r}")
        if method.needs == "classifier" and self.classifier is None:
            raise ConfigError("generate.method='classifier' needs a function: Model.generate(classifier=...)")

    def prepare(self, canvas: np.ndarray | canvases.Canvas, g: GenerateConfig) -> tuple[Program, dict[str, Any]]:
        """(program, its numbers) of a canvas; ConfigError where this run, or this canvas, cannot be sampled so."""
        rows = rows_of(canvas, g)
        z, inside = rows["z"], np.arange(rows["z"].shape[1])[None] < rows["length"][:, None]
        blank = (z == self.process.hierarchy.mask_id) & inside
        behind = bool(np.any(blank[:, :-1] & ~blank[:, 1:] & inside[:, 1:]))
        program, numbers = program_of(g), numbers_of(g, z.shape[1], self.eos)
        try:
            program = in_blocks(program, self.network.block, self.context)
        except ValueError as error:
            raise ConfigError(f"generate.method={g.method!r}: {error}") from error
        if not isinstance(canvas, np.ndarray):
            program = dataclasses.replace(program, cut=True, constrained=len(canvas.allowed) > 1)
            numbers["allowed"] = canvas.allowed
        self._check(program.method, g, behind, program.constrained)
        return program, numbers

    def batch_rows(self, g: GenerateConfig, n: int) -> int:
        """Rows of a batch for n samples: a power of two, at most g.batch_size, that divides over the devices."""
        shards = math.lcm(parallel.batch_shards(self.mesh), jax.process_count())
        return -(-parallel.bucket(min(g.batch_size, n), g.batch_size) // shards) * shards

    def __call__(self, canvas: np.ndarray | canvases.Canvas, g: GenerateConfig, frames: int = 0,
                 names: Sequence[tuple[int, int]] = ()) -> dict[str, np.ndarray]:
        """tokens int32 [n, S], length [n], calls [n] (of the batch shard a sample was in), row_forwards [n].

        With frames also call [n, F+1], time [n, F+1], z and confidence [n, F+1, S] of `loop.sample`.

        names: (seed, number) of each of at most one batch's samples; (): g.seed, 0..n-1.
        """
        whole = rows_of(canvas, g)
        n, length = len(whole["z"]), whole["length"]
        if isinstance(canvas, np.ndarray):
            whole = {"z": canvas}
        program, numbers = self.prepare(canvas, g)
        rows = self.batch_rows(g, n)
        step = self._step(program, frames) if frames else self._step(program)
        seeds = [seed for seed, _ in names]
        key = jax.random.key(g.seed) if not names else jax.random.wrap_key_data(
            jnp.stack([key_data(seed) for seed in seeds + seeds[:1] * (rows - n)]))
        parts = []
        with progress(n, unit="sample", name="generate") as bar:
            for start in range(0, n, rows):
                count = min(rows, n - start)
                batch = {k: v[start : start + count] for k, v in whole.items()}
                numbered = [number for _, number in names] or range(start, start + count)
                batch["index"] = np.asarray(numbered, np.int32)
                batch = parallel.pad_rows(batch, rows)  # padding has no masks: nothing to do there
                mine = parallel.local_rows(rows)
                placed = parallel.put_batch(self.mesh, {k: v[mine] for k, v in batch.items()})
                # the first call of its kind compiles
                made = program, frames, *(v.shape for v in (*placed.values(), numbers.get("allowed", key)))
                with contextlib.nullcontext() if made in self._made else compiling("generate", self.aside):
                    found = step((self.params_of(program.method), numbers), placed, key)
                self._made.add(made)
                parts.append({k: np.asarray(v)[:count] for k, v in found.items()})
                bar.update(count)
        out = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        inside = np.arange(out["tokens"].shape[1])[None] < out.get("length", length)[:, None]
        if np.any(out["tokens"][inside] >= self.process.hierarchy.vocab_size):
            raise RuntimeError("generate: a cluster or mask symbol is left in a sample; a bug, please report it")
        return out


def rows_of(canvas: np.ndarray | canvases.Canvas, g: GenerateConfig) -> dict[str, np.ndarray]:
    """z [n, S] and length [n] of a canvas; of a Canvas also given and kind [n, S], and features where it has some."""
    if isinstance(canvas, np.ndarray):
        return {"z": canvas, "length": np.full(len(canvas), g.length or canvas.shape[1], np.int32)}
    rows = {"z": canvas.z, "given": canvas.given, "kind": canvas.kind, "length": canvas.length}
    return rows if canvas.features is None else rows | {"features": canvas.features}


def prompt_canvas(prompt_ids: np.ndarray, num_samples: int, seq_len: int, mask_id: int, length: int = 0) -> np.ndarray:
    """Canvases int32 [n, S] that begin with the prompt and are masked after it.

    length: tokens of a text, prompt and all; fewer than seq_len give a canvas of the next power of two, with tokens
    (that are not looked at) behind the text. 0: seq_len.
    """
    length = length or seq_len
    if length > seq_len:
        raise ConfigError(f"generate.length={length}: must be at most model.seq_len={seq_len}")
    if len(prompt_ids) >= length:
        raise ConfigError(f"generate.prompt has {len(prompt_ids)} tokens: must be fewer than the {length} of a text "
                          f"(model.seq_len={seq_len}, generate.length)")
    canvas = np.zeros((num_samples, parallel.bucket(length, seq_len)), np.int32)
    canvas[:, :length] = mask_id
    canvas[:, : len(prompt_ids)] = prompt_ids
    return canvas


def lengths_are(run: Run, g: GenerateConfig) -> str:
    """Where the lengths of samples come from: "given" (generate.length), "training" (drawn from those of the training
    documents, which a run that was told them needs), "method" (it finds them) or "canvas" (S tokens; where the run
    learnt ends of texts the text is what is before the first one)."""
    if method_of(g).policy.lengths is not None:
        return "method"
    if g.length or g.schema:
        return "canvas" if g.schema else "given"
    told = run.trained.data.packing in ("documents", "crop") and run.given == "lengths"
    return "training" if told else "canvas"


def start_canvas(run: Run, g: GenerateConfig, prompts: np.ndarray, features: np.ndarray | None = None
                 ) -> np.ndarray | canvases.Canvas:
    """Canvases that begin with prompts int32 [n, L] and are free behind, as long as `lengths_are` says.

    features: float32 [n, P, F] in front of the prompts, which a run that learnt from some needs.

    Raises:
      ConfigError: the prompts do not fit; lengths are to be drawn, and the training tokens that tell them are gone; no
        features, or some that the run does not know; a prompt of latents that have not learnt to heed one.
    """
    check_features(run, features)
    if prompts.shape[1] and run.trained.diffusion.latents and not run.trained.data.prompt_field:
        raise ConfigError("generate.prompt: the latents of this run were learnt in front of masks alone and do not "
                          "heed a prompt; train with data.prompt_field")
    seq_len, mask = run.config.model.seq_len, run.hierarchy.mask_id
    if features is not None:
        prompts = np.concatenate([np.full((len(prompts), features.shape[1]), run.tokenizer.eot), prompts], axis=1)
    n, given = len(prompts), len(prompts[0])
    canvas = prompt_canvas(prompts[0], n, seq_len, mask, g.length)
    canvas[:, :given] = prompts
    allowed = np.ones((1, run.hierarchy.vocab_size), bool)
    if lengths_are(run, g) != "training":
        if features is None:
            return canvas
        length = np.full(n, g.length or canvas.shape[1], np.int32)
        return canvases.Canvas(canvas, canvas != mask, np.zeros_like(canvas), length, allowed, features)
    seen = run.training_lengths()
    if seen is None:
        raise ConfigError(f"generate.length=0: this run was told how long texts are, and the training lengths are not "
                          f"in {run.data_dir}; give generate.length")
    sizes = np.minimum(seen[:, 0] + given * bool(run.trained.data.prompt_field or features is not None), seq_len)
    fits = sizes > given
    share = np.where(fits, seen[:, 1], 0) if fits.any() else np.ones(len(sizes))
    length = np.maximum(np.random.default_rng([g.seed, n]).choice(sizes, n, p=share / share.sum()), given + 1)
    places = np.arange(seq_len)
    z = np.where((places >= given) & (places < length[:, None]), mask, canvas).astype(np.int32)
    z[places >= length[:, None]] = run.tokenizer.eot  # tokens that nobody looks at
    return canvases.Canvas(z, z != mask, np.zeros_like(z), length.astype(np.int32), allowed, features)


def check_features(run: Run, features: np.ndarray | None) -> None:
    """ConfigError where a run needs features [n, P, F] and is given none, or others, or where it knows none."""
    shape = run.config.data.feature_places, run.config.data.feature_width
    if features is None and shape[0]:
        raise ConfigError(f"features: this run writes behind {shape[0]} vectors of {shape[1]} numbers "
                          f"(data.features_field={run.trained.data.features_field!r}) and was given none")
    if features is not None and features.shape[1:] != shape:
        raise ConfigError(f"features of shape {list(features.shape)}: must be [texts, {shape[0]}, {shape[1]}]"
                          if shape[0] else "features: this run knows none (data.features_field)")


def compile_for(draw: Sampler, canvas: np.ndarray | canvases.Canvas, g: GenerateConfig) -> None:
    """Samples a batch of the canvas's shape with nothing to do, so that its program is there before time is taken."""
    some = canvases.some(canvas, slice(g.batch_size))
    if isinstance(some, np.ndarray):
        draw(np.zeros_like(some), g)
    else:
        draw(some._replace(z=np.zeros_like(some.z), given=np.ones_like(some.given)), g)


def ended(row: np.ndarray, given: int, eot: int, stop: str) -> np.ndarray:
    """Tokens up to and with the first end of text behind the first `given`; all of them where stop is not "end"."""
    ends = np.flatnonzero(row[given:] == eot)
    return row[: given + ends[0] + 1] if stop == "end" and len(ends) else row


def text_of(tokenizer: Tokenizer, row: np.ndarray, stop: str) -> str:
    """Text of what `ended` gives: its closing end of text is not shown."""
    return tokenizer.decode(row[:-1] if stop == "end" and len(row) and row[-1] == tokenizer.eot else row)


def load_helper(run: Run, g: GenerateConfig) -> Run | None:
    """The run in g.helper, or None; ConfigError where it cannot help this one, or has another tokenizer."""
    if not g.helper:
        return None
    helper = load_here(g.helper, mesh=run.config.parallel, helper=True)
    if not any(helper_kind(helper) in kinds for kinds in presets.HELPERS.values()):
        raise ConfigError(f"generate.helper={g.helper!r}: must be an autoregressive run, or one of train.objective="
                          f"{', '.join(ASIDE)}")
    if helper_kind(helper) in ASIDE and helper.hierarchy != run.hierarchy:
        raise ConfigError(f"generate.helper={g.helper!r}: was trained beside a run with other clusters")
    if helper.tokenizer.fingerprint != run.tokenizer.fingerprint:
        raise ConfigError(f"generate.helper={g.helper!r}: its tokenizer {helper.tokenizer.fingerprint[:12]} is not "
                          f"this run's {run.tokenizer.fingerprint[:12]}; give one that reads this run's tokens")
    if helper.config.model.seq_len < run.config.model.seq_len:
        raise ConfigError(f"generate.helper={g.helper!r}: reads {helper.config.model.seq_len} tokens, this run writes "
                          f"{run.config.model.seq_len}")
    return helper


def sampler_of(run: Run, helper: Run | None = None, classifier: Classifier | None = None) -> Sampler:
    """The sampler of a loaded run."""
    return Sampler(run.network, run.process, run.mesh, run.params, eos=run.tokenizer.eot, helper=helper,
                   classifier=classifier, context=run.trained.decoder.own_block)
