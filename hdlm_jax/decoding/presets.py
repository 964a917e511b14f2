"""Every decoding method as a named preset: `--config.generate.method=NAME` (table in docs/decoding.md).

A preset's parameters are its options: `--config.generate.options='threshold=.8 block=16'`; `steps` is
config.generate.steps unless it is given there.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from hdlm_jax.config import ConfigError, GenerateConfig
from hdlm_jax.config.rules import choice, rule
from hdlm_jax.decoding import caches, choose, guide, lengths, revise
from hdlm_jax.decoding.bursts import Burst
from hdlm_jax.decoding.diagonal import Diagonal
from hdlm_jax.decoding.drafts import FreeDave, Guided
from hdlm_jax.decoding.policy import Policy
from hdlm_jax.decoding.sparse_attention import SparseD
from hdlm_jax.models import quantise

# what a method may need of a second run -> the kinds of run that have it: train.objective, or autoregressive
HELPERS = {"ar": ("autoregressive",), "energy": ("autoregressive", "energy"), "adjust": ("adjust",)}


class Method(NamedTuple):
    """What a preset gives.

    numbers: the policy's traced thresholds; with others it is the same program ("eos" = -1 stands for the tokenizer's
    end of text). cache: how the network is called, of hdlm_jax.decoding: caches, sparse_attention, bursts; None: as it
    is; diagonal: in place of the policy too. guide: ("cfg", what stands for the prompt), ("classifier",) or (). needs:
    a second run (config.generate.helper) that is one of HELPERS[needs]; "classifier", a function (Model.generate's
    `classifier`); "order" and "block_lengths", the network's own heads (model.order, model.block_lengths). weights:
    arguments of hdlm_jax.models.quantise.quantise.
    """

    policy: Policy
    numbers: dict[str, float | int]
    cache: caches.Rule | SparseD | Burst | Diagonal | None = None
    guide: tuple[str, ...] = ()
    needs: str = ""
    weights: tuple[int | str, ...] = ()


# ---- by the chain's own times ----------------------------------------------------------------------------------------


def ancestral(*, steps: int = 0) -> Method:
    """Ancestral sampling by the exact kernel on `steps` equal steps of t (docs/theory.md section 4), for MDLM (arXiv
    2406.07524), HDLM (arXiv 2510.08632) and any number of levels. Steps in which nothing of a row changes are skipped
    (RADD, arXiv 2406.03736)."""
    return Method(Policy(choose.Planned("grid")), {"steps": steps})


def first_hitting(*, reveals: int = 1) -> Method:
    """First-hitting sampling (arXiv 2409.02908): one level a call (or `reveals`), no discretisation of time. With one
    it is ancestral sampling in infinitely many steps, in S K calls."""
    return Method(Policy(choose.Planned("reveal")), {"reveals": reveals})


# ---- by what the network says ----------------------------------------------------------------------------------------


def any_order(*, order: str = "random") -> Method:
    """Any-order autoregressive sampling (RADD, arXiv 2406.03736): positions in a fixed order, "random" or "left"."""
    return Method(Policy(choose.Scored(choose.Order(order), choose.Count())), {"count": 1})


def _even(score: choose.Score, steps: int, block: int, draw: str, straight: bool = False,
          order: str = "choose_then_draw") -> Method:
    return Method(Policy(choose.Scored(score, choose.Even(), straight), draw, order, block), {"steps": steps})


def max_prob(*, steps: int = 0, block: int = 0, draw: str = "sample", straight: bool = False) -> Method:
    """MaskGIT's order (arXiv 2202.04200), the surest tokens first, in `steps` calls; with `block`, semi-autoregressive.

    Tokens are chosen by the distribution's maximum and then drawn, which keeps the order exact (see low_confidence).
    straight: from the mask to the vocabulary at once.
    """
    return _even(choose.Confidence(), steps, block, draw, straight)


def margin(*, steps: int = 0, block: int = 0, draw: str = "sample", straight: bool = False) -> Method:
    """Top-k probability margin (Kim et al., arXiv 2502.06768): tokens whose two likeliest states differ most first."""
    return _even(choose.Confidence("margin"), steps, block, draw, straight)


def entropy(*, steps: int = 0, block: int = 0, draw: str = "sample", straight: bool = False) -> Method:
    """Dream's entropy order (arXiv 2508.15487): tokens of the least entropy first."""
    return _even(choose.Confidence("entropy"), steps, block, draw, straight)


def dcolt(*, steps: int = 0, draw: str = "sample", straight: bool = False) -> Method:
    """DCoLT's order (arXiv 2505.10446): a head of the network draws it (model.order, trained by rewards), evenly over
    `steps` calls. Before that training any order is as likely."""
    return _even(choose.Learned(), steps, 0, draw, straight)._replace(needs="order")


def ctrldiff(*, calls: int = 4, draw: str = "sample") -> Method:
    """CtrlDiff's blocks (arXiv 2505.14455): a head of the network draws the length of each, 4 to 32 tokens, as it
    begins (model.block_lengths, trained by rewards); it is written in `calls` calls, the surest tokens first."""
    policy = Policy(choose.Scored(choose.Confidence(), choose.DrawnBlocks()), draw)
    return Method(policy, {"calls": calls}, needs="block_lengths")


def low_confidence(*, steps: int = 0, block: int = 32, draw: str = "sample", straight: bool = False) -> Method:
    """LLaDA's low-confidence remasking (arXiv 2502.09992): every token draws, the likeliest draws stay. Choosing by
    what was drawn is not exact at any number of calls (docs/decoding.md)."""
    return _even(choose.Confidence("drawn"), steps, block, draw, straight, "draw_then_choose")


def fast_dllm(*, threshold: float = 0.9, threshold_cluster: float = 0.9, block: int = 32, draw: str = "argmax",
              straight: bool = False) -> Method:
    """Fast-dLLM's parallel decoding (arXiv 2505.22618): all tokens surer than a threshold in a call, else the surest.

    threshold: from level 1 to the vocabulary; threshold_cluster: from levels above.
    """
    policy = Policy(choose.Scored(choose.Confidence(), choose.Above(), straight), draw, block=block)
    return Method(policy, {"threshold": threshold, "threshold_cluster": threshold_cluster})


def fast_dllm_factor(*, factor: float = 1.0, block: int = 32, draw: str = "argmax", straight: bool = False) -> Method:
    """Fast-dLLM's factor rule (arXiv 2505.22618): the most tokens n for which (n + 1)(1 - p of the n-th) < factor."""
    policy = Policy(choose.Scored(choose.Confidence(), choose.Factor(), straight), draw, block=block)
    return Method(policy, {"factor": factor})


def dimple(*, threshold: float = 0.95, threshold_cluster: float = 0.95, steps: int = 0, draw: str = "sample",
           straight: bool = False) -> Method:
    """Dimple's confident decoding (arXiv 2505.16990): all tokens surer than a threshold, else as many as an even
    schedule of `steps` calls asks for."""
    policy = Policy(choose.Scored(choose.Confidence(), choose.Above(choose.Even()), straight), draw)
    return Method(policy, {"threshold": threshold, "threshold_cluster": threshold_cluster, "steps": steps})


def dparallel(*, threshold: float = 0.5, block: int = 32, draw: str = "argmax", straight: bool = False) -> Method:
    """dParallel's decoding (arXiv 2509.26488), without its distillation: all tokens of an entropy below a threshold in
    nats, else the least."""
    policy = Policy(choose.Scored(choose.Confidence("entropy"), choose.Above(), straight), draw, block=block)
    return Method(policy, {"threshold": -threshold, "threshold_cluster": -threshold})


def ccd(*, depth: int = 3, kept: int = 8, confident: int = 4, count: int = 1, draw: str = "argmax") -> Method:
    """Coherent contextual decoding (CCD, arXiv 2512.02044): `count` tokens a call, the surest by the mean
    prediction of the last `depth` calls."""
    policy = Policy(choose.Scored(choose.Coherent(choose.History(depth, kept)), choose.Count()), draw)
    return Method(policy, {"confident": confident, "count": count})


def ccd_ds(*, depth: int = 3, kept: int = 8, confident: int = 4, draw: str = "argmax") -> Method:
    """CCD with dynamic steps (arXiv 2512.02044): all of the `confident` surest tokens whose likeliest state is that of
    the call before, else the surest one."""
    history = choose.History(depth, kept)
    policy = Policy(choose.Scored(choose.Coherent(history), choose.Consistent(history)), draw)
    return Method(policy, {"confident": confident})


def eoser(*, steps: int = 0, least: float = 0.4, block: int = 0, draw: str = "argmax") -> Method:
    """EOS early rejection (EOSER, arXiv 2509.23924): by max_prob, but the end of the text is trusted late."""
    method = _even(choose.Eos(), steps, block, draw)
    return method._replace(numbers=method.numbers | {"eos_least": least, "eos": -1})


def ass(*, least: float = 0.01, block: int = 0, draw: str = "argmax") -> Method:
    """Ascending step sizes (ASS, arXiv 2509.23924): 2^k levels at call k, with EOSER's lower trust in the end."""
    doubling = choose.Doubling()
    policy = Policy(choose.Scored(choose.Eos(choose.Confidence(), doubling), doubling), draw, block=block)
    return Method(policy, {"eos_least": least, "eos": -1})


# ---- that stop early, or take back ---------------------------------------------------------------------------------


def prophet(*, steps: int = 0, gap_early: float = 7.5, gap_middle: float = 5.0, gap_late: float = 2.5, block: int = 32,
            last: int = 0, stages: bool = False, draw: str = "argmax") -> Method:
    """Prophet's early commit (arXiv 2508.19982): once the likeliest states lead by a gap, all the rest is written."""
    choice = choose.Scored(choose.Confidence(), choose.Even())
    return Method(Policy(choice, draw, block=block, commit=revise.Gap(last, stages)),
                  {"steps": steps, "gap_early": gap_early, "gap_middle": gap_middle, "gap_late": gap_late})


WRITE_ALL = choose.Scored(choose.Confidence(), choose.All(), straight=True)


def saber(*, least: int = 2, mu: float = 8.0, of: str = "own", draw: str = "argmax") -> Method:
    """Saber (arXiv 2510.18165): tokens surer than those before them were, and backtracking where confidence has fallen.

    Needs predictions at tokens that are written, which a network is trained for by train.draft_share alone (and those
    at clusters at xi < 1).
    """
    policy = Policy(choose.Scored(choose.Confidence(), choose.Running()), draw, revise=revise.Backtrack(of))
    return Method(policy, {"least": least, "mu": mu})


def rcr(*, steps: int = 0, schedule: str = "linear", to: str = "mask", block: int = 32, draw: str = "sample",
        straight: bool = True) -> Method:
    """Running confidence remasking (RCR of MDPO, arXiv 2508.13148): all is written, the least sure are remasked.

    straight: from the mask to the vocabulary at once; false: to the cluster first, in one more call, as a network is
    trained that learns words at clusters alone.
    """
    every = dataclasses.replace(WRITE_ALL, straight=straight)
    return Method(Policy(every, draw, block=block, revise=revise.Scheduled(schedule, to)), {"steps": steps})


def p2(*, steps: int = 0, eta: float = 1.0, schedule: str = "linear", to: str = "mask", block: int = 0,
       draw: str = "sample", straight: bool = True) -> Method:
    """Path planning with the network as its own planner (P2, arXiv 2502.03540): every call writes all, and what the
    network now finds least likely is remasked; eta >= 0 (the paper's strength of stochasticity, may exceed 1) is how
    much tokens written before are doubted. Needs predictions at them, as saber does: train.draft_share, and then
    an eta of .5 (docs/training.md). straight: as in rcr.
    """
    every = dataclasses.replace(WRITE_ALL, straight=straight)
    return Method(Policy(every, draw, block=block, revise=revise.Scheduled(schedule, to, "now")),
                  {"steps": steps, "eta": eta})


def remdm(*, steps: int = 0, kind: str = "cap", eta: float = 0.05, t_on: float = 0.55, t_off: float = 0.05,
          alpha_on: float = 0.9) -> Method:
    """Remasking diffusion (ReMDM, arXiv 2503.00307) for any number of levels: each step unmasks more than due and
    remasks by the forward chain, which keeps the marginals. kind: "cap", "rescale" or "loop"."""
    hook = revise.Remask(kind)
    return Method(Policy(hook, revise=hook),
                  {"steps": steps, "eta": eta, "t_on": t_on, "t_off": t_off, "alpha_on": alpha_on})


# ---- drafts and helpers ----------------------------------------------------------------------------------------------


def freedave(*, drafts: int = 4, block: int = 32, draw: str = "argmax") -> Method:
    """FreeDave (arXiv 2510.00294): one token a call by max_prob, with drafts of the next ones verified in the same
    call: the same text in fewer calls."""
    choice = choose.Scored(choose.Confidence(), choose.Count())
    return Method(Policy(choice, draw, block=block, verify=FreeDave(drafts)), {"count": 1})


def freedave_plus(*, drafts: int = 4, threshold: float = 0.95, threshold_cluster: float = 0.95, block: int = 32,
                  draw: str = "argmax") -> Method:
    """FreeDave++ (arXiv 2510.00294): fast_dllm's thresholds with drafts, of which a part of a step's result will do."""
    method = fast_dllm(threshold=threshold, threshold_cluster=threshold_cluster, block=block, draw=draw)
    return method._replace(policy=dataclasses.replace(method.policy, verify=FreeDave(drafts, "subset")))


def guided(*, checks: str = "deterministic", on_reject: str = "dlm", top_k: int = 5, threshold: float = 0.1,
           relative: float = 0.5, block: int = 32) -> Method:
    """Guided Diffusion (FlashDLM, arXiv 2505.21467): an autoregressive model says how much of a draft stays.

    checks: some of deterministic, top_k, threshold, relative, joined by "+". on_reject: whose token is written there.
    """
    policy = Policy(choose.Scored(quota=choose.All()), Guided(tuple(checks.split("+")), on_reject), block=block)
    return Method(policy, {"top_k": top_k, "threshold": threshold, "relative": relative}, needs="ar")


def edlm(*, steps: int = 0, candidates: int = 2, energy_from: float = 0.4, energy_to: float = 1.0) -> Method:
    """EDLM's importance resampling (arXiv 2410.21357) on the ancestral grid: of `candidates` texts drawn in a call, one
    by exp(-E), in calls with energy_from <= t <= energy_to. The helper is a run of train.objective=energy, or an
    autoregressive one: then E = log p - log p_AR."""
    policy = Policy(choose.Planned("grid"), guide.EnergyDraw(candidates))
    return Method(policy, {"steps": steps, "energy_from": energy_from, "energy_to": energy_to}, needs="energy")


def adjust(*, burst: int = 4) -> Method:
    """ADJUST (arXiv 2509.22738): one level a call by first_hitting, the network itself in every `burst`-th call alone;
    between them a layer (generate.helper, a run of train.objective=adjust) tells it what has been written."""
    return Method(Policy(choose.Planned("reveal")), {"reveals": 1}, Burst(burst), needs="adjust")


def cfg(*, steps: int = 0, weight: float = 1.0, without: str = "mask") -> Method:
    """Unsupervised classifier-free guidance (SMDM, arXiv 2410.18514) on the ancestral grid: away from what the network
    predicts with the prompt masked (without="mask") or shown as clusters ("cluster"). Nothing without a prompt."""
    if without not in ("mask", "cluster"):
        raise ValueError(f"without={without!r}: choose mask or cluster")
    return ancestral(steps=steps)._replace(numbers={"steps": steps, "weight": weight}, guide=("cfg", without))


def classifier(*, steps: int = 0, weight: float = 1.0) -> Method:
    """Classifier guidance (CtrlDiff's first-order form, arXiv 2505.14455) on the ancestral grid, by a function of
    one-hot states float32 [b, S, N] -> log p(y) [b] (Model.generate's `classifier`)."""
    return ancestral(steps=steps)._replace(numbers={"steps": steps, "weight": weight}, guide=("classifier",),
                                           needs="classifier")


# ---- canvases, caches, networks --------------------------------------------------------------------------------------


def daedal(*, start: int = 64, expand: int = 8, window: int = 32, threshold: float = 0.9, eos_grow: float = 0.5,
           eos_stop: float = 0.9, low: float = 0.1, block: int = 32, draw: str = "argmax") -> Method:
    """DAEDAL's growing canvas (arXiv 2508.00819): texts of `start` tokens behind the prompt grow at their end until the
    text's end is seen there, and where the network is unsure, up to config.generate.length (0: model.seq_len).

    For networks that are trained with an end of text in each row; on packed documents it decides little.
    """
    policy = Policy(choose.Scored(choose.Confidence(), choose.Above()), draw, block=block,
                    lengths=lengths.Daedal(expand, window))
    numbers = {"threshold": threshold, "threshold_cluster": threshold, "eos_grow": eos_grow, "eos_stop": eos_stop,
               "low": low, "eos": -1, "start": start}
    return Method(policy, numbers)


def bd3lm(*, steps: int = 0, block: int = 16, draw: str = "sample") -> Method:
    """BD3-LM's block sampling (arXiv 2503.09573): blocks from left to right under block-causal attention, their keys
    and values kept; in a block random positions, evenly over its share of `steps`. Exact for networks trained under
    that attention."""
    return _even(choose.Uniform(), steps, block, draw)._replace(cache=caches.BlockCausal())


def prefix_cache(*, threshold: float = 0.9, threshold_cluster: float = 0.9, block: int = 32,
                 draw: str = "argmax") -> Method:
    """fast_dllm with its prefix cache (arXiv 2505.22618): all when a block begins, then the block and what follows."""
    method = fast_dllm(threshold=threshold, threshold_cluster=threshold_cluster, block=block, draw=draw)
    return method._replace(cache=caches.FastDLLM())


def dual_cache(*, threshold: float = 0.9, threshold_cluster: float = 0.9, block: int = 32,
               draw: str = "argmax") -> Method:
    """fast_dllm with its dual cache (arXiv 2505.22618): all tokens when a block begins, then the block alone."""
    method = fast_dllm(threshold=threshold, threshold_cluster=threshold_cluster, block=block, draw=draw)
    return method._replace(cache=caches.FastDLLM(dual=True))


def freecache(*, steps: int = 0, block: int = 32, draw: str = "sample") -> Method:
    """FreeCache (FlashDLM, arXiv 2505.21467) under max_prob in blocks: finished blocks are not computed again."""
    return _even(choose.Confidence(), steps, block, draw)._replace(cache=caches.FreeCache())


def dkv(*, steps: int = 0, refresh: int = 8, refresh_clusters: int = 1, block: int = 0, draw: str = "sample") -> Method:
    """dKV-Cache (arXiv 2505.15781) under max_prob: keys and values are kept from one call after a token is written;
    all are made again in every `refresh`-th call, clusters' in every `refresh_clusters`-th."""
    return _even(choose.Confidence(), steps, block, draw)._replace(cache=caches.DKV(refresh, refresh_clusters))


def dkv_greedy(*, refresh: int = 2, window: int = 4, draw: str = "sample") -> Method:
    """dKV-Cache-Greedy (arXiv 2505.15781): a random order that is known beforehand; between refreshes only what was
    written last, what comes next and a window around it are computed."""
    return Method(Policy(choose.Scored(choose.Order("random"), choose.Count()), draw), {"count": 1},
                  caches.DKV(refresh, 1, window))


def sparsed(*, steps: int = 0, skip: float = 0.2, select: float = 0.5, tokens: int = 32) -> Method:
    """SparseD's attention (arXiv 2509.24014) on the ancestral grid: after a share `skip` of the unmasking each head
    keeps the `select` best blocks of `tokens` keys. The semantics by a mask: no faster here."""
    return ancestral(steps=steps)._replace(cache=SparseD(skip, select, tokens))


def quantised(*, steps: int = 0, bits: int = 8, kind: str = "plain") -> Method:
    """Post-training quantisation of the weights (arXiv 2508.14896) on the ancestral grid: rounded to so many bits,
    computed in floats. kind: "plain" or "rotated"."""
    quantise.check_quantisation(bits, kind)
    return ancestral(steps=steps)._replace(weights=(bits, kind))


def diagonal(*, inner: int = 4, exit: float = 0.03, noise: float = 0.5, wavefront: int = 128) -> Method:
    """The diagonal sampler of recurrent depth (arXiv 2510.14961), for runs of decoder.loops: a call refines the states
    of up to `wavefront` positions by `inner` iterations and begins one more; a token stands when its state moves by
    less than `exit`. With wavefront=1, exit=0 and noise=0 it writes what `ancestral` does."""
    policy = Policy(choose.Scored(choose.Order("left"), choose.Count()))
    return Method(policy, {"exit": exit, "noise": noise}, Diagonal(inner, wavefront))


METHODS: dict[str, Callable[..., Method]] = {f.__name__: f for f in (
    ancestral, first_hitting, any_order, max_prob, margin, entropy, dcolt, ctrldiff, low_confidence, fast_dllm,
    fast_dllm_factor, dimple, dparallel, ccd, ccd_ds, eoser, ass, prophet, saber, rcr, p2, remdm, freedave,
    freedave_plus, guided, edlm, adjust, cfg, classifier, daedal, bd3lm, prefix_cache, dual_cache, freecache, dkv,
    dkv_greedy, sparsed, quantised, diagonal)}


_RANGES = {
    **dict.fromkeys(("steps", "reveals", "count", "depth", "kept", "confident", "drafts", "candidates", "start",
                     "refresh", "refresh_clusters", "burst", "calls", "tokens", "top_k", "daedal window", "inner",
                     "wavefront"), (1, np.inf)),
    **dict.fromkeys(("window", "block", "last", "mu", "least", "weight", "eta"), (0, np.inf)),
    **dict.fromkeys(("select", "skip", "remdm eta", "exit", "noise"), (0, 1)), "expand": (2, np.inf)}


def options_of(name: str) -> dict[str, Any]:
    """The options of a method and their defaults."""
    return {p.name: p.default for p in inspect.signature(METHODS[name]).parameters.values()}


def make(name: str, options: str = "", steps: int = 128) -> Method:
    """The method of that name with options "name=value name=value".

    Raises:
      ValueError: an unknown method or option (with the choices), or a value of another kind.
    """
    choice("method", name, tuple(METHODS))
    known = options_of(name)
    given: dict[str, Any] = {"steps": steps} if "steps" in known else {}
    for part in options.split():
        key, equals, text = part.partition("=")
        if not equals or key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"options={part!r}: method {name!r} has {', '.join(f'{k}={v}' for k, v in known.items())}"
                             + "".join(f"; did you mean {other!r}?" for other in close))
        try:
            given[key] = {"true": True, "false": False}[text.lower()] if isinstance(known[key], bool) else type(
                known[key])(text)
        except (KeyError, ValueError):
            raise ValueError(f"options={key}={text!r}: must be of type {type(known[key]).__name__}, like {known[key]}"
                             ) from None
    for key, value in given.items():
        if not isinstance(value, str) and not abs(value) < (2.0**127 if isinstance(value, float) else 2**31):
            what = "finite number" if isinstance(value, float) else f"number of at most {2**31 - 1}"
            raise ValueError(f"options={key}={value}: method {name!r} needs a {what}")
        least, most = _RANGES.get(f"{name} {key}") or _RANGES.get(key) or (value, value)
        if not least <= value <= most:
            what = "in [0, 1]" if most == 1 else f"at least {least}"
            raise ValueError(f"options={key}={value}: method {name!r} needs it {what}")
    return METHODS[name](**given)


def unwritten(method: Method) -> str:
    """Why nobody knows with what probability the method's calls draw what they draw; "" where it is written down: each
    token by itself from the network's prediction at the states on show."""
    policy = method.policy
    for why, found in (
            ("it takes the likeliest; add draw=sample", policy.draw == "argmax"),
            ("it writes the rest at once, whatever is likeliest", policy.commit is not None),
            ("its drafts are checked by what they say", policy.verify is not None or method.needs == "ar"),
            ("its texts are of any length", policy.lengths is not None),
            ("it draws from states on their way", isinstance(method.cache, Diagonal)),
            ("its draws are guided", method.guide or not isinstance(policy.draw, str))):
        if found:
            return why
    return ""


def check(g: GenerateConfig) -> Method:
    """The method of these settings.

    Raises:
      ConfigError: an unknown method or option, or temperature or top_p beside a method that takes the likeliest.
    """
    try:
        method = make(g.method, g.options, g.steps)
    except ValueError as error:
        raise ConfigError(f"generate.{error}") from error
    for name in ("temperature", "top_p"):
        rule(method.policy.draw != "argmax" or getattr(g, name) == 1, f"generate.{name}", getattr(g, name),
             f"does nothing where method {g.method!r} takes the likeliest; add draw=sample to its options")
    return method


def burst_of(g: GenerateConfig) -> int:
    """Calls on one pass of the network, of the method `adjust`.

    Raises:
      ConfigError: another method.
    """
    rule(g.method == "adjust", "generate.method", g.method, "train.objective='adjust' learns to serve the method "
         "'adjust'; choose it, with the options it is to decode with")
    cache = check(g).cache
    return cache.every if isinstance(cache, Burst) else 1


def numbers(method: Method, eos: int = 0) -> dict[str, np.generic]:
    """A method's numbers as what is traced: int32 and float32; eos: token of the end of text."""
    found = method.numbers | ({"eos": eos} if "eos" in method.numbers else {})
    return {k: np.int32(v) if isinstance(v, int) else np.float32(v) for k, v in found.items()}
