"""The Python face for a network of the caller's own: any process, its loss, its bound, its samples (docs/library.md).

The network is a function `denoise(z, t) -> logits`: z int32 [B, S], the states on show; t float32 [B], the masking
level in [0, 1] (noise time tau = -log(1 - t) stays inside); logits [B, S, V], any float dtype, of the V tokens alone.
States are ids below `process.num_states`: tokens 0..V-1, then the clusters of each level, the mask last.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.config import DiffusionConfig, EvaluateConfig
from hdlm_jax.decoding import presets
from hdlm_jax.decoding.loop import loop_of
from hdlm_jax.decoding.presets import Method
from hdlm_jax.decoding.sampler import Program, make_sample_step
from hdlm_jax.diffusion.autoregressive import AutoregressiveProcess
from hdlm_jax.diffusion.draws import fold
from hdlm_jax.diffusion.gidd import GiddProcess
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.levels import LevelChain
from hdlm_jax.diffusion.prediction import Prediction
from hdlm_jax.diffusion.process import Process
from hdlm_jax.diffusion.sedd import SeddProcess
from hdlm_jax.evaluation.elbo import stratified_pairs
from hdlm_jax.evaluation.likelihood import teacher_forced
from hdlm_jax.training.views import stratified_tau

Denoise: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
ArrayLike: TypeAlias = jax.Array | np.ndarray | Sequence

# ---- processes -------------------------------------------------------------------------------------------------------


def hierarchical(token_to_cluster: ArrayLike, *, gamma: float = 1.0, rates: Sequence[float] = (), xi: float = 1.0,
                 force_transition: str = "cavity") -> HierarchicalProcess:
    """HDLM: a token becomes its cluster, that its own cluster, and so on to the mask (docs/theory.md section 2).

    Args:
      token_to_cluster: int [V], each token's cluster 0..n-1; or several such maps fine to coarse, the second int [n]
        from the clusters to those above, and so on.
      gamma: with one map, the rate tokens -> clusters over that of clusters -> mask.
      rates: instead, one for each level above the tokens, fine to coarse, the mask's last; only their ratios count.
      xi: probability that a token goes to its own cluster, in (1/n, 1].
      force_transition: what a prediction becomes where a cluster is on show: none, within, between or cavity.

    Raises:
      ValueError: maps that do not nest, an empty cluster, a wrong number of rates, xi out of range.
    """
    several = len(token_to_cluster) > 0 and np.ndim(token_to_cluster[0]) > 0
    hierarchy = Hierarchy.from_parents(list(token_to_cluster) if several else [token_to_cluster])
    settings = DiffusionConfig(gamma=gamma, rates=tuple(rates), xi=xi, force_transition=force_transition)
    settings.check()
    chain = LevelChain(settings.level_rates(hierarchy.num_levels))
    return HierarchicalProcess(hierarchy, chain, xi, force_transition)


def masked(vocab_size: int) -> HierarchicalProcess:
    """MDLM (arXiv 2406.07524): a token is masked with probability t; the hierarchy of a single level."""
    return HierarchicalProcess(Hierarchy.from_parents([], vocab_size), LevelChain((1.0,)))


def gidd(vocab_size: int, p_uniform: float) -> GiddProcess:
    """GIDD (arXiv 2503.04482): masks and random tokens, a share p_uniform in [0, 1) of these at t = 1/2."""
    return GiddProcess(Hierarchy.from_parents([], vocab_size), p_uniform)


def sedd(vocab_size: int) -> SeddProcess:
    """SEDD-absorb (arXiv 2310.16834): masks; ratios e^logit / V need not sum to one (docs/theory.md section 6)."""
    return SeddProcess(Hierarchy.from_parents([], vocab_size), LevelChain((1.0,)))


def autoregressive(vocab_size: int) -> AutoregressiveProcess:
    """Next-token prediction: z is x one place to the right behind a mask, t is 0, and logits at a position are of the
    token there. `denoise` must be causal: nothing at a position may depend on z behind it."""
    return AutoregressiveProcess(Hierarchy.from_parents([], vocab_size))


# ---- corruption, loss, bound -----------------------------------------------------------------------------------------


def corrupt(process: Process, x: ArrayLike, t: ArrayLike | float, key: jax.Array) -> jax.Array:
    """Tokens x int [B, S] corrupted to the masking level t, float in [0, 1], [B] or one for all: z int32 [B, S].

    t = 0 gives x, t = 1 masks alone; in between what each process shows is docs/theory.md section 2 (GIDD: 6). An
    autoregressive process knows no t: z is its shifted input.
    """
    x, seen = _tokens(process, x), _seen(t)
    if np.shape(t) not in ((), x.shape[:1]):
        raise ValueError(f"t.shape={np.shape(t)}: must be () or (B,) = {x.shape[:1]}")
    if seen is not None and not np.all((seen >= 0) & (seen <= 1)):
        raise ValueError(f"t={t}: must lie in [0, 1], a masking level; noise time is tau = -log(1 - t)")
    t = jnp.asarray(t, jnp.float32)
    return process.corrupt(_key(key), x, tau=jnp.broadcast_to(-jnp.log1p(-t), x.shape[:1]))


def loss(process: Process, denoise: Denoise, x: ArrayLike, key: jax.Array, *, score: ArrayLike | None = None,
         weighting: str = "none", weight_min: float = 0.0, weight_max: float = float("inf"),
         hard_training: bool = False) -> jax.Array:
    """Training loss of tokens x int [B, S]: mean over the scored tokens, float32 scalar; has gradients, may be jitted.

    Row b is corrupted at a t uniform in [b/B, (b+1)/B), so that a batch covers all of [0, 1] (docs/theory.md
    section 3).

    Args:
      score: bool [B, S], False at tokens that are given or padding: they are shown as they are and cost nothing.
      weighting: "none": the bound's own weights, so that the loss estimates the NELBO in nats per token. Others train
        with less variance and are no bound: "constant" and "clip" (to weight_min..weight_max), hierarchical, masked and
        sedd also "empirical", gidd also "dynamic" (docs/theory.md "Training weights"). Autoregressive: none has any.
      hard_training: hierarchical alone: -log p(x | z) in place of the cluster's cross-entropy.

    Raises:
      ValueError: x that are no tokens, logits of another shape, an unknown weighting, bounds that cross or that the
        weighting does not use.
    """
    x = _tokens(process, x)
    if not 0 <= weight_min <= weight_max:
        raise ValueError(f"weight_min={weight_min}, weight_max={weight_max}: 0 <= weight_min <= weight_max must hold")
    if weighting != "clip" and (weight_min, weight_max) != (0.0, float("inf")):
        raise ValueError(f"weight_min={weight_min}, weight_max={weight_max}: only weighting='clip' uses them, not "
                         f"{weighting!r}")
    if hard_training and process.num_levels == 1:
        raise ValueError("hard_training: this process has no clusters; leave it out")
    index, score = jnp.arange(len(x)), _score(score, x)
    keys = fold(jnp.broadcast_to(_key(key), index.shape), index)
    tau = stratified_tau(fold(keys, 0), index, len(x))
    z, level = process.noised(fold(keys, 1), x, tau, score)
    prediction = _Asked(process, denoise).denoise({}, z, -jnp.expm1(-tau))
    cost = process.token_loss(prediction, x, z, hard_training=hard_training, tau=tau)
    weight = process.loss_weight(z, tau, weighting, weight_min, weight_max, x=x)
    return jnp.sum(jnp.where(level > 0, weight * cost, 0.0)) / jnp.maximum(jnp.sum(score), 1)


def nelbo(process: Process, denoise: Denoise, x: ArrayLike, key: jax.Array, draws: int = 16, *,
          score: ArrayLike | None = None, cv2: float = EvaluateConfig.cv2) -> tuple[np.ndarray, np.ndarray]:
    """The NELBO of each row of tokens x int [B, S], an upper bound on its -log p: unbiased estimates of the exact
    integral over noise time (docs/theory.md section 3, "Variance").

    Noise times are drawn by the process's proposal, stratified over all pairs of a row and a draw; autoregressive:
    -log p itself, one draw. Compiles once a call, so give many rows; not for use inside jax.jit.

    Args:
      draws: corruptions of each row, at least 2. score: bool [B, S], as in `loss`: the bound is given the other tokens.
      cv2: the proposal's squared coefficient of variation of nats between rows; changes the variance alone.

    Returns:
      (nats, se): float64 [B] each, nats per sequence and the standard error of its noise.
    """
    if draws < 2:
        raise ValueError(f"draws={draws}: must be at least 2 (for a standard error)")
    x, key = _tokens(process, x), _key(key)
    score, rows, draws = _score(score, x), len(x), 1 if process.exact else draws
    network = _Asked(process, denoise)

    @jax.jit
    def step(tau: jax.Array, index: jax.Array) -> jax.Array:
        z, level = process.noised(fold(jnp.broadcast_to(key, index.shape), index), x, tau, score)
        rate = process.nelbo_rate(network.denoise({}, z, -jnp.expm1(-tau)), x, z, tau)
        return jnp.sum(jnp.where(level > 0, rate, 0.0), axis=-1)

    tau, q = stratified_pairs(process.proposal(x.shape[1], cv2), int(jax.random.bits(key)), rows, draws)
    nats = np.stack([np.asarray(step(jnp.asarray(tau[i], jnp.float32), jnp.arange(rows) + i * rows), np.float64)
                     for i in range(draws)]) / q
    se = nats.std(0, ddof=1) / np.sqrt(draws) if draws > 1 else np.zeros(rows)
    return nats.mean(0), se


# ---- samples ---------------------------------------------------------------------------------------------------------


def ancestral(*, steps: int) -> Method:
    """The process's own way back in `steps` equal steps of t, exact for many (docs/theory.md section 4)."""
    return presets.ancestral(steps=steps)


def sample(process: Process, denoise: Denoise, key: jax.Array, shape: tuple[int, int] | None = None,
           method: Method | None = None, *, canvas: ArrayLike | None = None, temperature: float = 1.0,
           top_p: float = 1.0, eos: int | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Draws sequences: tokens int32 [B, S], the whole loop compiled for this call.

    Args:
      denoise: is asked about any number of rows, whose results must not depend on each other.
      shape: (B, S), sequences and their tokens; or canvas: int [B, S], tokens and clusters that are given and the mask
        (process.mask_id) at what is free.
      method: `ancestral`, or for hierarchical, masked and sedd any of hdlm_jax.presets that needs no cache and no
        second network (docs/decoding.md). Autoregressive: None, token by token, a full call of `denoise` each.
      temperature, top_p: of the tokens' distribution, temperature first; 0 takes the likeliest.
      eos: the end of text, for the methods that treat it apart.

    Returns:
      (tokens, info): info["calls"] int32 [B], turns of the loop; info["row_forwards"] int32 [B], network passes a row;
      and what else hdlm_jax.decoding.loop.sample tells.

    Raises:
      ValueError: a method this process or face does not have, one without its steps, a canvas that cannot be filled.
    """
    z = _canvas(process, shape, canvas)
    method = _method(process, method, eos)
    if not (temperature >= 0 and 0 < top_p <= 1):
        raise ValueError(f"temperature={temperature}, top_p={top_p}: must be at least 0, and in (0, 1]")
    if method.policy.draw == "argmax" and (temperature, top_p) != (1, 1):
        raise ValueError("temperature, top_p: do nothing where the method takes the likeliest; give it draw='sample'")
    numbers: dict[str, Any] = presets.numbers(method, -1 if eos is None else eos)
    numbers = {"method": numbers, "steps": np.int32(method.numbers.get("steps", 1)), "length": np.int32(z.shape[1]),
               "corrections": np.int32(0), "correction_temperature": np.float32(1)}
    program = Program(method, temperature, top_p, cut=False, force_transition="")
    step = jax.jit(make_sample_step(_Asked(process, denoise), process, program))  # type: ignore[arg-type]
    info = step(({}, numbers), {"z": z, "index": jnp.arange(len(z))}, _key(key))
    return info.pop("tokens"), info


def log_likelihood(process: Process, denoise: Denoise, x: ArrayLike, method: Method, key: jax.Array, *,
                   score: ArrayLike | None = None, eos: int | None = None) -> tuple[jax.Array, jax.Array]:
    """log p of tokens x int [B, S] under `sample` with that method, the loop walked with x in place of draws: float32
    [B], in nats, and int32 [B], the calls it took (docs/evaluation.md "Likelihood of a sampler").

    Exact where the method's choices are not random (max_prob, entropy, a fixed order, thresholds). Else it is of one
    choice a row, by `key`: its mean over keys is a lower bound on log p.

    Args:
      score: bool [B, S], False at tokens that are given; eos: the end of text, for the methods that treat it apart.

    Raises:
      ValueError: a process or a method under which a text's likelihood is not known, and why.
    """
    x, method = _tokens(process, x), _method(process, method, eos)
    policy = teacher_forced(method, process)
    numbers: dict[str, Any] = presets.numbers(method, -1 if eos is None else eos)
    asked = _Asked(process, denoise)

    @jax.jit
    def walk(x: jax.Array, score: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        hierarchical = cast(HierarchicalProcess, process)
        loop = loop_of(functools.partial(asked.denoise, {}), hierarchical, policy, x.shape, numbers)
        cache, s = loop.begin(key, jnp.where(score, process.mask_id, x), ~score, extra={"text": x})
        _, s, _ = loop.run(cache, s)
        return -s.memory["nats"].sum(-1), s.call

    return walk(x, _score(score, x), _key(key))


def _method(process: Process, method: Method | None, eos: int | None) -> Method:
    """The method, checked for this process; what an autoregressive one has is put in for None."""
    if process.causal and method is None:
        return ancestral(steps=1)
    if not isinstance(method, Method):
        raise ValueError(f"method={method!r}: give one, as hdlm_jax.ancestral(steps=64) or "
                         "hdlm_jax.presets.max_prob(steps=64)")
    if (steps := int(method.numbers.get("steps", 1))) < 1:
        raise ValueError(f"method: steps={steps}: must be at least 1, as in ancestral(steps=64)")
    wants = {"a second network, a classifier or a head for an order": method.needs, "a cache": method.cache,
             "weights": method.weights, "a canvas that grows": method.policy.lengths}
    if found := [what for what, wanted in wants.items() if wanted]:
        raise ValueError(f"method: it needs {found[0]}, which a function denoise(z, t) does not give; choose another")
    if not process.unmasks and method != ancestral(steps=steps):
        raise ValueError("method: this process has no levels that drop; choose ancestral")
    if "eos" in method.numbers and eos is None:
        raise ValueError("method: it treats the end of text apart; give its token as eos")
    return method


def _canvas(process: Process, shape: tuple[int, int] | None, canvas: ArrayLike | None) -> jax.Array:
    """The states to start from: int32 [B, S]."""
    mask, neither = process.mask_id, shape is None and canvas is None
    if neither or (shape is not None and canvas is not None):
        raise ValueError("shape, canvas: give one of them, shape=(B, S) for sequences from nothing")
    if shape is not None:
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"shape={shape}: must be (B, S), sequences and their tokens")
        return jnp.full(shape, mask, jnp.int32)
    z = _ints("canvas", cast(ArrayLike, canvas), mask + 1)
    seen = _seen(z)
    if process.causal and seen is not None and np.any((seen[:, :-1] == mask) & (seen[:, 1:] != mask)):
        raise ValueError("canvas: an autoregressive model goes on from a prompt; it cannot fill blanks before "
                         "given tokens")
    return z


# ---- what is given ---------------------------------------------------------------------------------------------------


class _Asked:
    """The caller's function in place of a hdlm_jax.models.trunk.Trunk; its parameters are the function's own.

    Raises:
      ValueError: what it gives are no logits [B, S, V].
    """

    def __init__(self, process: Process, denoise: Denoise):
        self.process, self.function = process, denoise

    def denoise(self, params: dict, z: jax.Array, t: jax.Array, segment: jax.Array | None = None) -> Prediction:
        """The prediction at z int32 [b, S], t float32 [b]."""
        words = self.process.vocab_size
        logits = self.function(z, jnp.zeros_like(t) if self.process.exact else t)
        shape, kind = getattr(logits, "shape", None), getattr(logits, "dtype", np.dtype(object))
        if shape != (*z.shape, words) or not jnp.issubdtype(kind, jnp.floating):
            raise ValueError(f"denoise(z, t) gave {type(logits).__name__} of shape {shape}, {kind}: must be float "
                             f"logits [B, S, V] = {(*z.shape, words)}, of the tokens alone")
        return self.process.as_prediction(logits)

    def empty_cache(self, rows: int, seq_len: int) -> jax.Array:
        """Of autoregressive.sample: the input so far."""
        return jnp.full((rows, seq_len), self.process.mask_id, jnp.int32)

    def next_token(self, params: dict, cache: jax.Array, z: jax.Array, at: jax.Array) -> tuple[jax.Array, Prediction]:
        """(input with the states z [B, 1] at position `at`, prediction [B] there), by a call on all of it."""
        cache = jax.lax.dynamic_update_slice_in_dim(cache, z, at, axis=1)
        said = self.denoise(params, cache, jnp.zeros(len(cache)))
        return cache, said.select(jnp.arange(len(cache)) * cache.shape[1] + at)


def _key(key: jax.Array) -> jax.Array:
    """A typed key; jax.random.PRNGKey's raw ones are taken as well."""
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def _tokens(process: Process, x: ArrayLike) -> jax.Array:
    return _ints("x", x, process.vocab_size)


def _ints(name: str, values: ArrayLike, below: int) -> jax.Array:
    """values as int32 [B, S]; ValueError where they are not, or, as far as that can be seen, not all in 0..below-1."""
    values = values if isinstance(values, jax.Array) else np.asarray(values)
    if values.ndim != 2 or not jnp.issubdtype(values.dtype, jnp.integer):
        raise ValueError(f"{name} is {values.dtype} of shape {values.shape}: must be int [B, S]")
    seen = _seen(values)
    if seen is not None and np.any((seen < 0) | (seen >= below)):
        raise ValueError(f"{name} holds {seen.min()}..{seen.max()}: must lie in 0..{below - 1}")
    return jnp.asarray(values, jnp.int32)


def _seen(values: ArrayLike | float) -> np.ndarray | None:
    """Values as numpy; None where they cannot be read now, inside jax.jit or on other hosts."""
    if isinstance(values, jax.core.Tracer) or not getattr(values, "is_fully_addressable", True):
        return None
    return np.asarray(values)


def _score(score: ArrayLike | None, x: jax.Array) -> jax.Array:
    if score is None:
        return jnp.ones(x.shape, bool)
    score = jnp.asarray(score)
    if score.shape != x.shape or score.dtype != bool:
        raise ValueError(f"score is {score.dtype} of shape {score.shape}: must be bool {x.shape}")
    return score
