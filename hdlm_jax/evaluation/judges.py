"""Generative perplexity that can be reproduced: a judge scores sampled texts, and the result says all it depends on.

A judge is GPT-2 (a local folder, see hdlm_jax.models.gpt2) or a run of ours. An autoregressive run gives -log p of a
text exactly; a diffusion run gives an upper bound alone, and its numbers are called `..._bound` throughout. Low
perplexity is cheap (repeat one word), so entropy, distinct n-grams, repetition and MAUVE stand beside it. Temperature,
nucleus, steps and the precision of the draws move the number as well: all are in the record.
"""

from __future__ import annotations

import abc
import functools
import os
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.common import jsons, parallel, processes
from hdlm_jax.common.console import measured, say
from hdlm_jax.common.jsons import Json, read_json
from hdlm_jax.config import ConfigError, ParallelConfig
from hdlm_jax.data.base_tokenizer import byte_alphabet
from hdlm_jax.data.tokenizers import END_OF_TEXT, Tokenizer, load_tokenizer, make_tokenizer
from hdlm_jax.evaluation.elbo import Evaluator, evaluator_of, text_nats
from hdlm_jax.evaluation.text_statistics import Texts, mauve, mauve_installed, perplexities, statistics
from hdlm_jax.models import gpt2
from hdlm_jax.models.heads import chunk_size
from hdlm_jax.models.network import TENSOR_AXES
from hdlm_jax.models.packages import PACKAGES
from hdlm_jax.models.weight_files import Params, hub_sha256
from hdlm_jax.training.checkpoint import checkpoints_of
from hdlm_jax.training.loading import Run, load_here, saved_config


class Scores(NamedTuple):
    """What a judge says of n texts.

    nats: float64 [n]; tokens: int64 [n], how many were scored; features: float32 [n, D] for MAUVE, where it has some.
    """

    nats: np.ndarray
    tokens: np.ndarray
    features: np.ndarray | None


class Judge(abc.ABC):
    """A model that scores texts.

    Attributes:
      identity: what its numbers depend on ("kind", "path", "precision" and more); tokenizer: of the ids it is given.
      kind: "gpt2", "autoregressive" or "bound" (nats are upper bounds); rule: which tokens are scored, given what.
    """

    identity: Json
    tokenizer: Tokenizer
    kind: str
    rule: str

    @abc.abstractmethod
    def num_params(self) -> int: ...

    @abc.abstractmethod
    def given(self, texts: Texts) -> str:
        """What the nats of texts are conditional on beside prompts: "nothing", or "lengths"."""

    @abc.abstractmethod
    def score(self, texts: Texts, given: Sequence[int]) -> Scores:
        """Scores texts, of which the first given[i] tokens are context: seen, not scored."""


def retokenise(ids: np.ndarray, ours: Tokenizer, theirs: Tokenizer) -> np.ndarray:
    """Ids of the same text in another tokenizer, int32; the end of text stays the end of text."""
    parts, start = [], 0
    for end in [*np.flatnonzero(ids == ours.eot), len(ids)]:
        parts += [theirs.encode(ours.decode(ids[start:end])), np.full(int(end < len(ids)), theirs.eot, np.int32)]
        start = end + 1
    return np.concatenate(parts)


def folder_tokenizer(folder: str, known: Tokenizer | None = None) -> Tokenizer:
    """The tokenizer of a GPT-2 folder: its vocab.json, else GPT-2's own (`known`, where that is it, or tiktoken's).

    ValueError: a vocab.json that is no byte-pair encoding of GPT-2's kind, with the end of text as its last word.
    """
    path = os.path.join(folder, "vocab.json")
    if not os.path.exists(path):
        return known if known is not None and known.kind == "gpt2" else make_tokenizer("gpt2")
    ids: dict[str, int] = read_json(path)
    to_byte = byte_alphabet()
    names = sorted(ids, key=ids.__getitem__)
    if [ids[w] for w in names] != list(range(len(ids))) or names[-1:] != [END_OF_TEXT]:
        raise ValueError(f"{path}: ids must be 0..V-1, and {END_OF_TEXT} the last")
    try:
        words = [bytes(to_byte[c] for c in name) for name in names[:-1]]
    except KeyError as error:
        raise ValueError(f"{path}: character {error} is none of a byte-level vocabulary") from None
    if len(set(words[:256])) < 256 or any(len(w) != 1 for w in words[:256]):
        raise ValueError(f"{path}: the first 256 words must be the single bytes, and merges follow in their order")
    return Tokenizer("gpt2" if len(words) == 50256 else "bpe", words)


class GPT2Judge(Judge):
    """GPT-2 from a local folder. Everything about the folder is checked at once; weights are read when first needed.

    Args:
      folder: see hdlm_jax.models.gpt2; dtype: of its matrix products; mesh: hdlm_jax.common.parallel.make_mesh.
      known: a tokenizer at hand, used where it is GPT-2's and the folder has no vocab.json.
    """

    kind = "gpt2"

    def __init__(self, folder: str, dtype: str, mesh, known: Tokenizer | None = None):
        self.sizes, self.folder, self.dtype, self.mesh = gpt2.check(folder), folder, dtype, mesh
        self.tokenizer = folder_tokenizer(folder, known)
        if self.tokenizer.vocab_size > self.sizes.vocab or self.sizes.positions < 2:
            raise ValueError(f"{folder}: {self.sizes.vocab} words and {self.sizes.positions} positions do not do for "
                             f"the {self.tokenizer.vocab_size} words of its tokenizer (a vocab.json says which)")
        weights = processes.on_main_process(lambda: hub_sha256(folder))
        self.identity = {"kind": "gpt2", "path": folder, "sha256": weights, "precision": dtype,
                         "tokenizer": self.tokenizer.fingerprint}
        self.rule = ("every token given all before it; the first one of a text is not scored (no start symbol); a text "
                     f"of more than {self.sizes.positions} tokens goes on in pieces that begin with the last token of "
                     "the piece before; ends of text are tokens like others")

    def num_params(self) -> int:
        return gpt2.num_params(self.sizes)

    def given(self, texts: Texts) -> str:
        return "nothing"

    @functools.cached_property
    def _loaded(self) -> tuple[parallel.RowProgram, Params]:
        network, params = gpt2.load(self.folder, self.dtype)
        shards = parallel.state_shardings(self.mesh, params, TENSOR_AXES)  # layers go by the same names
        params = jax.tree.map(lambda a, s: jax.make_array_from_callback(a.shape, s, a.__getitem__), params, shards)

        def step(params, batch, key):
            rows = max(1, len(batch["ids"]) // parallel.batch_shards(self.mesh))
            found: Any = network.apply({"params": params}, batch["ids"], max(1, chunk_size() // rows), method="score")
            nats, hidden = found
            return nats, jnp.take_along_axis(hidden, batch["last"][:, None, None], axis=1)[:, 0]

        return parallel.RowProgram(step, self.mesh, params), params

    def score(self, texts: Texts, given: Sequence[int]) -> Scores:
        """features: the last layer's state at the last token of the first piece (zero where there is none)."""
        most, n = self.sizes.positions, len(texts)
        pieces = [(i, start, ids[start : start + most]) for i, ids in enumerate(texts) if len(ids)
                  for start in range(0, max(len(ids) - 1, 1), most - 1)]
        nats, tokens = np.zeros(n), np.zeros(n, np.int64)
        features = np.zeros((n, self.sizes.width), np.float32)
        if not pieces:
            return Scores(nats, tokens, features)
        width = parallel.bucket(max(2, *(len(p) for _, _, p in pieces)), most)
        device = (4096 if jax.default_backend() == "cpu" else 65_536) // width  # rows; attention is [rows, H, S, S]
        program, params = self._loaded

        def batch(pick: np.ndarray) -> dict[str, np.ndarray]:
            some = [pieces[i][2] for i in pick]
            return {"ids": np.stack([np.pad(piece, (0, width - len(piece))) for piece in some]).astype(np.int32),
                    "last": np.array([len(piece) - 1 for piece in some], np.int32)}

        at_once = max(1, device) * parallel.batch_shards(self.mesh)
        for pick, (found, last) in program(params, len(pieces), batch, at_once, jax.random.key(0), unit="piece",
                                           name="judge"):
            for number, row, state in zip(pick, found.astype(np.float64), last, strict=True):
                i, start, piece = pieces[number]
                scored = np.arange(start + 1, start + len(piece)) >= given[i]
                nats[i] += row[: len(piece) - 1][scored].sum()
                tokens[i] += scored.sum()
                if start == 0:
                    features[i] = state
        return Scores(nats, tokens, features)


class RunJudge(Judge):
    """A run of ours as the judge: exact where its process is (autoregressive), else an upper bound.

    Args:
      workdir: of the run, or its export; shape: config.parallel of the mesh it is put on.
    """

    def __init__(self, workdir: str, shape: ParallelConfig):
        self.workdir, self.shape, self.config = workdir, shape, saved_config(workdir)
        checkpoints = checkpoints_of(workdir)
        self.step = checkpoints.choose("best")
        meta = checkpoints.meta(self.step)
        checkpoints.close()
        source = read_json(os.path.join(workdir, "source.json"), optional=True)  # of an imported open model
        self.tokenizer = load_tokenizer(os.path.join(workdir, "tokenizer"))
        model, e = self.config.model, self.config.evaluate
        self.identity = {"kind": "run", "path": workdir, "step": self.step, "hierarchy": meta["hierarchy"],
                         "data": meta["data"], "precision": model.dtype, "tokenizer": self.tokenizer.fingerprint,
                         "draws": [e.draws, e.seed, e.cv2]}
        if "checksums" in meta:
            self.identity["weights"] = sha256(jsons.dumps(meta["checksums"]).encode()).hexdigest()
        if source is not None:
            facts = read_json(os.path.join(workdir, "config.json"), "made_from")
            self.identity |= {"family": source["config"]["model_type"], "sha256": facts["made_from"]["weights"]}
        exact = self.config.diffusion.process == "autoregressive"
        self.kind = "autoregressive" if exact else "bound"
        what = ("every token given all before it, from the start symbol on" if exact else
                f"an upper bound on -log p of every token (NELBO, {e.draws} draws of the noise)")
        self.rule = f"{what}; a text of more than {model.seq_len} tokens in pieces that do not see each other"

    @functools.cached_property
    def _loaded(self) -> tuple[Run, Evaluator]:
        run = load_here(self.workdir, mesh=self.shape)
        return run, evaluator_of(run)

    def num_params(self) -> int:
        return self._loaded[0].num_params

    def given(self, texts: Texts) -> str:
        """A text that neither fills its rows nor ends tells its length."""
        run, s = self._loaded[0], self.config.model.seq_len
        whole = all(len(ids) % s == 0 or ids[-1] == self.tokenizer.eot for ids in texts)
        return run.given_alone if whole or run.process.exact else "lengths"

    def score(self, texts: Texts, given: Sequence[int]) -> Scores:
        """nats: means over the draws of the noise where they are bounds."""
        run, evaluator = self._loaded
        nats, tokens = text_nats(evaluator, run, texts, self.config.evaluate.draws, "judge", given)
        return Scores(nats.mean(0), tokens, None)


def open_judge(path: str, dtype: str = "float32", shape: ParallelConfig = ParallelConfig(), mesh=None,  # noqa: B008 (frozen)
               known: Tokenizer | None = None) -> Judge:
    """The judge in a folder, checked but not loaded.

    Args:
      path: folder of a GPT-2, workdir of a run, or NAME of an open model that --mode=fetch has, whose workdir is
        runs/NAME; dtype: of the first; shape, mesh: devices, as config and as mesh.

    Raises:
      ConfigError: neither of the two, or one that cannot judge.
    """
    fetched = os.path.join("runs", path) if path in PACKAGES else ""  # where --mode=fetch puts it
    folder = os.path.abspath(fetched or path)
    if fetched and not os.path.exists(os.path.join(folder, "config.json")):
        raise ConfigError(f"generate.judge={path!r}: {fetched} holds no model yet; run hdlm-jax fetch {path} here")
    try:
        if gpt2.is_folder(folder):
            return GPT2Judge(folder, dtype, mesh, known)
        if any(os.path.isdir(os.path.join(folder, name)) for name in ("checkpoints", "params")):
            return RunJudge(folder, shape)
    except (ValueError, OSError) as error:
        raise ConfigError(f"generate.judge={path!r}: {error}") from error
    raise ConfigError(f"generate.judge={path!r}: must be a folder with GPT-2's config.json and model.safetensors, or "
                      "the workdir of a trained or imported run, or one of "
                      f"{', '.join(name for name, package in PACKAGES.items() if package.weights)}")


def made_from(judge: Judge) -> Json:
    """What a record depends on beside the texts: it is made anew when that changes."""
    return judge.identity | {"mauve": mauve_installed()}


def _mauve(judge: Judge, features: np.ndarray | None, kept: list[bool], reference: Texts | str,
           theirs: Callable[[np.ndarray], np.ndarray]) -> tuple[float | None, str]:
    """MAUVE of the texts that are kept against real ones, and how it was made; None, and why there is none."""
    if not mauve_installed():
        return None, "mauve-text is not installed (pip install 'hdlm_jax[mauve]')"
    if features is None:
        return None, "features come from a GPT-2 judge; this judge is a run"
    if isinstance(reference, str):
        return None, reference or "no reference texts"
    real, own = judge.score([theirs(t) for t in reference], [0] * len(reference)).features, features[kept]
    assert real is not None
    try:
        if min(len(own), len(real)) < 2:
            raise ValueError("fewer than 2 texts")
        return mauve(own, real), (
            f"mauve-text and its defaults; {len(own)} texts against the first {len(real)} of the validation split; "
            "features: the judge's last layer at a text's last token; noisy with few texts")
    except (ImportError, ValueError) as error:  # a broken installation, or too little to cluster
        return None, f"MAUVE failed: {error}"


def record(judge: Judge, tokenizer: Tokenizer, texts: Texts, given: int = 0, reference: Texts | str = "") -> Json:
    """All numbers of sampled texts; units are nats and tokens.

    Args:
      tokenizer: of the ids in `texts`; where the judge's is another one (by fingerprint), texts are decoded and encoded
        again, else the sampled ids themselves are scored.
      given: first tokens of every text that are a prompt: context, neither scored nor in the statistics.
      reference: real texts (ids of `tokenizer`) for MAUVE, or why there are none.

    Returns: see `perplexities` and `statistics`; texts, empty_texts (no token at all) and unscored_texts (no token that
      this judge scores) are counted, none is left out; mauve is None where mauve_note says why.
    """
    again = tokenizer.fingerprint != judge.tokenizer.fingerprint

    def theirs(ids: np.ndarray) -> np.ndarray:
        return retokenise(ids, tokenizer, judge.tokenizer) if again else ids

    prompts, rest = [theirs(t[:given]) for t in texts], [theirs(t[given:]) for t in texts]
    whole = [np.concatenate(both) for both in zip(prompts, rest, strict=True)]
    nats, tokens, features = judge.score(whole, [len(p) for p in prompts])
    score, note = _mauve(judge, features, [len(ids) > 0 for ids in whole], reference, theirs)
    return {
        "judge": os.path.basename(judge.identity["path"]),
        "kind": judge.kind, "bound": judge.kind == "bound", "given": judge.given(whole),
        "params": judge.num_params(), "rule": judge.rule,
        "retokenised": again, "tokenizer": tokenizer.fingerprint, "prompt_tokens": given,
        "texts": len(texts), "empty_texts": sum(len(r) == 0 for r in rest), "unscored_texts": int((tokens == 0).sum()),
        "tokens": int(tokens.sum()), "sampled_tokens": int(sum(len(t) - given for t in texts)),
    } | perplexities(nats, tokens, judge.kind == "bound") | statistics([t[given:] for t in texts]) | {
        "mauve": score, "mauve_note": note, "made_from": made_from(judge)}


def perplexity(found: Json) -> str:
    """'143.20 ± 3.10' or '<= 143.20 ± 3.10 (bound)' of a record."""
    end = "_bound" if found["bound"] else ""
    text = measured(found[f"perplexity{end}"], found[f"perplexity_se{end}"], ".2f")
    if text == "-":
        return "none (no token is scored)" if not found["tokens"] else "none (not finite)"
    told = ", given lengths" * (found["given"] == "lengths")
    return f"<= {text} (bound{told})" if found["bound"] else text


def tell(found: Json) -> None:
    """The record as one line."""
    numbers = [f"{label} {found[name]:.3f}" for label, name in (
        ("unigram entropy", "unigram_entropy"), ("distinct-2", "distinct_2"), ("repetition", "repetition_4"),
        ("MAUVE", "mauve")) if found[name] is not None]
    unscored = f", {found['unscored_texts']} of them without a scored token" if found["unscored_texts"] else ""
    say(f"judge: {found['judge']} ({found['kind']}, {found['params'] / 1e6:,.1f}M parameters, "
        f"{found['made_from']['precision']}): perplexity {perplexity(found)} on {found['tokens']:,} tokens of "
        f"{found['texts']} texts{unscored}{', retokenised' if found['retokenised'] else ''}; {', '.join(numbers)}")
