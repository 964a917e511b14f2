"""Every choice, its default and its rules, as frozen dataclasses.

A file in configs/ calls `default()`, changes what it wants and returns the ConfigDict; absl flags override it
(`--config.train.steps=100`); `resolve` checks the whole and freezes it before anything runs.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from typing import Any

from ml_collections import config_dict

from hdlm_jax.data.clusters import default_clusters
from hdlm_jax.data.corpus import DETOKENIZERS, FORMATS, TXT_DOCUMENTS, expand
from hdlm_jax.data.pipeline import PACKINGS, PADDINGS
from hdlm_jax.data.tokenizers import cutting_pattern
from hdlm_jax.decoding import presets
from hdlm_jax.diffusion import gidd
from hdlm_jax.diffusion.hierarchical import CLUSTERS, FORCE_TRANSITIONS, WEIGHTINGS
from hdlm_jax.evaluation.benchmarks import PROTOCOLS, TASKS

# Settings that are paths, or begin with one: `resolve` expands ~ and $VARIABLES in them (and main in --workdir).
PATHS = ("data.files", "data.validation", "data.dir", "tokenizer.file", "hierarchy.embeddings", "train.init_from",
         "evaluate.tasks_data", "evaluate.files", "evaluate.lm1b", "generate.schema", "generate.helper",
         "generate.judge", "released.weights", "released.clusters")
PROCESSES = ("hierarchical", "gidd", "sedd", "autoregressive")


class ConfigError(ValueError):
    """A setting that cannot work: one line with the value, the rule and the choices."""


def _choice(name: str, value: str, choices: typing.Sequence[str]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{name}={value!r}: choose one of {', '.join(choices)}{hint}")


def _rule(ok: bool, name: str, value: Any, rule: str) -> None:
    if not ok:
        raise ConfigError(f"{name}={value!r}: {rule}")


def _seed(name: str, value: int, below: int = 2**32) -> None:
    """JAX would keep the lowest 32 bits of a larger one, and say nothing."""
    _rule(0 <= value < below, name, value, f"must lie in 0..{below - 1}")


@dataclasses.dataclass(frozen=True)
class Data:
    """Where text comes from, how it is split, and how sequences are made of it (hdlm_jax.data)."""

    source: str = "embedded"  # embedded: the documentation inside Python itself; files: `files`
    files: tuple[str, ...] = ()  # paths, folders, globs, URLs: text, json(l), parquet, (nested) tar, plain or packed
    format: str = "auto"  # of the files: auto, by their names; or txt, jsonl, json, parquet, tar
    validation: tuple[str, ...] = ()  # held-out files; empty: by `split`
    split: str = "hash"  # hash: by sha256 of the document; last: the last `validation_documents`
    validation_fraction: float = 0.05  # share of documents held out by split="hash"
    validation_documents: int = 100_000  # documents held out by split="last"
    text_field: str = "text"  # field of a jsonl record or parquet row
    prompt_field: str = ""  # fine-tuning: this field is given, only text_field is noised and scored
    txt_documents: str = "file"  # a document of a text file: the file, all between blank lines (blank_line), a line
    detokenize: str = ""  # undo a corpus's own tokenisation: lm1b, ptb, wikitext, lambada, ag_news
    bad_share: float = 0.001  # stop when more of the records than this cannot be read
    dir: str = ""  # prepared tokens, to share between runs; empty: <workdir>/data
    prepare_shard: str = ""  # i/n: prepare as worker i (0..n-1) of n on one shared data.dir; the last one merges
    stream: bool = False  # train on raw documents, tokenised on the fly; only validation and a sample are prepared
    sample_bytes: int = 100_000_000  # size of that sample (clusters, unigram), bytes of training text
    shuffle_documents: int = 10_000  # streaming: documents shuffled at once
    packing: str = "concat"  # concat | documents: attention inside documents alone | crop: a window of one document
    padding: str = "end"  # crop, behind a text: end: ends of text, learnt and scored | hidden: its length is given
    variable_share: float = 0.0  # of the sequences cut to a random length in 1..seq_len

    def check(self) -> None:
        _choice("data.source", self.source, ("embedded", "files"))
        _choice("data.format", self.format, FORMATS)
        _choice("data.split", self.split, ("hash", "last"))
        _choice("data.txt_documents", self.txt_documents, TXT_DOCUMENTS)
        _choice("data.detokenize", self.detokenize, DETOKENIZERS)
        _choice("data.packing", self.packing, PACKINGS)
        _choice("data.padding", self.padding, PADDINGS)
        _rule(not self.prompt_field or self.packing == "crop" or self.padding == "hidden", "data.packing", self.packing,
              "with data.prompt_field a record needs a row of its own, or the next prompt tells where a response ends: "
              "choose crop")
        _rule(bool(self.files) == (self.source == "files"), "data.files", self.files,
              "needed with data.source='files', and only there")
        _rule(0 < self.validation_fraction < 1, "data.validation_fraction", self.validation_fraction,
              "must lie in (0, 1)")
        _rule(0 <= self.bad_share < 1, "data.bad_share", self.bad_share, "must lie in [0, 1)")
        _rule(0 <= self.variable_share <= 1, "data.variable_share", self.variable_share, "must lie in [0, 1]")
        for name in ("validation_documents", "sample_bytes", "shuffle_documents"):
            _rule(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "must be at least 1")
        _rule(not self.stream or bool(self.validation) or self.split == "hash", "data.split", self.split,
              "data.stream does not know which documents are the last: choose hash, or give data.validation")
        self.worker()

    def worker(self) -> tuple[int, int]:
        """(i, n) of data.prepare_shard; (0, 1) where it is not given."""
        i, slash, n = (self.prepare_shard or "0/1").partition("/")
        ok = bool(slash) and i.isdigit() and n.isdigit() and int(i) < int(n)
        _rule(ok, "data.prepare_shard", self.prepare_shard, "must be i/n with 0 <= i < n, as in 0/8")
        return int(i), int(n)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """gpt2 (50,257 words, through tiktoken), bpe (trained on the corpus), bytes (257) or bert (WordPiece of a file)."""

    kind: str = "gpt2"
    vocab_size: int = 50257
    file: str = ""  # gpt2 without a network, bpe that is not to be trained: a local rank file; bert: its vocab.txt
    sha256: str = ""  # of that file; checked if given
    pattern: str = ""  # how bpe cuts text: gpt2 (or empty), cl100k, llama3, qwen2, o200k, or a regular expression

    def check(self) -> None:
        _choice("tokenizer.kind", self.kind, ("gpt2", "bpe", "bytes", "bert"))
        _rule(self.kind != "bert" or bool(self.file), "tokenizer.file", self.file,
              "tokenizer.kind='bert' needs a local vocab.txt (one word a line)")
        fixed = {"gpt2": 50257, "bytes": 257}.get(self.kind)
        _rule(fixed is None or self.vocab_size == fixed, "tokenizer.vocab_size", self.vocab_size,
              f"tokenizer.kind={self.kind!r} has {fixed} words")
        _rule(not self.pattern or self.kind == "bpe", "tokenizer.pattern", self.pattern,
              f"goes with tokenizer.kind='bpe'; {self.kind!r} has its own")
        try:
            cutting_pattern(self.pattern)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        _rule(self.vocab_size >= 257, "tokenizer.vocab_size", self.vocab_size,
              "must be at least 257 (256 bytes and <|endoftext|>)")


@dataclasses.dataclass(frozen=True)
class Hierarchy:
    """Clusters of words: sizes fine to coarse, (64,) or (256, 16); (1,) or () is MDLM."""

    clusters: tuple[int, ...] = (0,)  # (0,): one level of about sqrt(V) clusters, a power of two
    embeddings: str = "corpus"  # corpus | FILE.npy | FILE.safetensors:TENSOR | checkpoint:WORKDIR
    shuffle: bool = False  # control: clusters of the same sizes with random members
    keep_single: bool = False  # keep a single cluster as a level of its own: (V, 1, 1)
    seed: int = 0

    def check(self) -> None:
        c = self.clusters
        _rule(all(n >= 1 for n in c) and all(a > b for a, b in zip(c, c[1:], strict=False)), "hierarchy.clusters", c,
              "cluster numbers must be positive and fall, fine to coarse, as in (256, 16)")
        _rule(not self.keep_single or c == (1,), "hierarchy.keep_single", self.keep_single,
              f"goes with hierarchy.clusters=(1,), not {c}")
        _seed("hierarchy.seed", self.seed, 2**31 - 1)  # faiss adds one, and has 31 bits
        e = self.embeddings
        known = e == "corpus" or e.endswith(".npy") or ".safetensors:" in e or e.startswith("checkpoint:")
        _rule(known, "hierarchy.embeddings", e,
              "choose corpus, a FILE.npy, a FILE.safetensors:TENSOR or checkpoint:WORKDIR")


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """The process and the training loss (docs/theory.md sections 2 and 3)."""

    process: str = "hierarchical"  # (MDLM with a single cluster) | gidd | sedd | autoregressive: baselines
    p_uniform: float = 0.0  # gidd: share of random words at t = 1/2
    gamma: float = 1.0  # rates (gamma, 1) for two levels
    rates: tuple[float, ...] = ()  # rates of all K levels, in place of gamma
    xi: float = 1.0
    force_transition: str = "cavity"
    weighting: str = "clip"
    weight_min: float = 0.0
    weight_max: float = 2.0
    hard_training: bool = False

    def check(self) -> None:
        _choice("diffusion.force_transition", self.force_transition, FORCE_TRANSITIONS)
        _choice("diffusion.process", self.process, PROCESSES)
        weightings = {"gidd": gidd.WEIGHTINGS, "autoregressive": ("constant",)}.get(self.process, WEIGHTINGS)
        _choice("diffusion.weighting", self.weighting, weightings)
        _rule(0 <= self.p_uniform < 1, "diffusion.p_uniform", self.p_uniform, "must lie in [0, 1)")
        _rule(not self.p_uniform or self.process == "gidd", "diffusion.p_uniform", self.p_uniform,
              f"goes with diffusion.process='gidd', not {self.process!r}")
        plain = self.process == "hierarchical" or (self.xi, self.hard_training, self.rates, self.gamma) == (
            1, False, (), 1)
        _rule(plain, "diffusion.process", self.process, "knows no xi, hard_training, rates or gamma; leave them out")
        _rule(self.gamma > 0, "diffusion.gamma", self.gamma, "must be positive")
        _rule(not self.rates or self.gamma == 1, "diffusion.rates", self.rates,
              "only one of diffusion.gamma and diffusion.rates should be given")
        _rule(all(r > 0 for r in self.rates), "diffusion.rates", self.rates, "must be positive")
        _rule(0 < self.xi <= 1, "diffusion.xi", self.xi, "must lie in (1/n, 1]")
        _rule(0 <= self.weight_min <= self.weight_max, "diffusion.weight_max", self.weight_max,
              f"must be at least diffusion.weight_min={self.weight_min}, and that at least 0")
        _rule(self.xi == 1 or self.force_transition != "within", "diffusion.force_transition", "within",
              f"its bound is infinite at xi={self.xi}: choose none, between or cavity")

    def level_rates(self, levels: int) -> tuple[float, ...]:
        """Rates of the K levels, scaled so that the smallest is 1 (a common factor only relabels time)."""
        rates = self.rates or ((self.gamma, 1.0) if levels == 2 else (1.0,) * levels)
        _rule(len(rates) == levels, "diffusion.rates", rates, f"the hierarchy has {levels} levels and needs as many")
        _rule(self.gamma == 1 or levels <= 2, "diffusion.gamma", self.gamma,
              f"stands for two levels; give diffusion.rates for the {levels} of this hierarchy")
        return tuple(r / min(rates) for r in rates)


@dataclasses.dataclass(frozen=True)
class Model:
    """The published transformer; defaults are its small size."""

    width: int = 768
    blocks: int = 12
    heads: int = 12
    seq_len: int = 512
    dropout: float = 0.0
    time_conditioning: bool = True
    head: str = "flat"  # flat: a logit for every word | factorised: p(cluster) p(word | cluster), needs clusters
    prototypes: int = 8  # vectors a cluster, factorised head
    embeddings: str = "random"  # random | clusters: start from the embeddings the words were clustered by
    dtype: str = "float32"  # of the computation; parameters and logits are float32
    remat: str = "auto"  # recomputed in the backward pass: none | cheap (all but products) | all | auto by backend

    def check(self) -> None:
        _choice("model.head", self.head, ("flat", "factorised"))
        _choice("model.remat", self.remat, ("auto", "none", "cheap", "all"))
        _choice("model.embeddings", self.embeddings, ("random", "clusters"))
        _choice("model.dtype", self.dtype, ("float32", "bfloat16"))
        for name in ("width", "blocks", "heads", "seq_len", "prototypes"):
            _rule(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be at least 1")
        _rule(self.width % self.heads == 0, "model.heads", self.heads, f"must divide model.width={self.width}")
        _rule(self.width // self.heads % 2 == 0, "model.heads", self.heads,
              f"model.width/model.heads = {self.width / self.heads:g} must be even (rotary embedding)")
        _rule(0 <= self.dropout < 1, "model.dropout", self.dropout, "must lie in [0, 1)")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW as published."""

    lr: float = 5e-4
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-9
    weight_decay: float = 0.02
    clip: float = 1.0  # global norm of the gradient
    warmup: int = 10_000  # steps
    schedule: str = "cosine"  # to final_lr x lr at the last step | constant
    final_lr: float = 0.1
    ema: float = 0.0  # decay of the average of the weights that evaluation uses; 0: none

    def check(self) -> None:
        _choice("optimizer.schedule", self.schedule, ("cosine", "constant"))
        _rule(self.lr > 0, "optimizer.lr", self.lr, "must be positive")
        _rule(self.clip > 0, "optimizer.clip", self.clip, "must be positive")
        _rule(0 <= self.ema < 1, "optimizer.ema", self.ema, "must lie in [0, 1); 0 is off")
        _rule(self.warmup >= 0, "optimizer.warmup", self.warmup, "must not be negative")
        for name in ("b1", "b2"):
            _rule(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "must lie in [0, 1)")
        for name in ("eps", "weight_decay", "final_lr"):
            _rule(getattr(self, name) >= 0, f"optimizer.{name}", getattr(self, name), "must not be negative")


@dataclasses.dataclass(frozen=True)
class Train:
    steps: int = 500_000
    batch_size: int = 512  # sequences a step, over all devices
    microbatches: int = 1  # gradients are summed over as many parts of the batch
    seed: int = 0
    log_every: int = 100
    nonfinite_limit: int = 10  # steps whose loss or gradient is not finite are skipped; stop after more than so many
    evaluate_every: int = 0  # steps between measurements on `evaluate.rows_in_training`; 0: at the end alone
    init_from: str = ""  # workdir of a run whose weights to start from

    def check(self) -> None:
        for name in ("steps", "batch_size", "microbatches", "log_every"):
            _rule(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "must be at least 1")
        _seed("train.seed", self.seed)
        _rule(self.nonfinite_limit >= 0, "train.nonfinite_limit", self.nonfinite_limit, "must not be negative")
        _rule(self.evaluate_every >= 0, "train.evaluate_every", self.evaluate_every, "must not be negative")
        _rule(self.batch_size % self.microbatches == 0, "train.microbatches", self.microbatches,
              f"must divide train.batch_size={self.batch_size}")


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """The exact NELBO over the whole validation split; with `tasks`, of other texts and of answers to questions."""

    draws: int = 8  # passes over the split, each with its own noise
    batch_size: int = 0  # sequences at once; 0: as many as fit. Changes no result
    rows: int = 0  # only the first so many sequences; 0: all
    rows_in_training: int = 256  # as many (and one draw) at each train.evaluate_every
    cv2: float = 0.03  # a of the proposal q_a, the squared coefficient of variation between sequences
    checkpoint: str = "best"
    ema: bool = True  # use the average of the weights where the run keeps one
    seed: int = 0
    tasks: tuple[str, ...] = ()  # in place of the validation split: names of hdlm_jax.evaluation.benchmarks
    tasks_data: str = "$HDLM_DATA"  # folder of the tasks' files
    files: tuple[str, ...] = ()  # of the task 'files': any local texts, read as data.format and so on say
    lm1b: tuple[str, ...] = ()  # of the task 'lm1b': its held-out files
    protocols: tuple[str, ...] = PROTOCOLS  # of perplexities: each document by itself, all packed into windows of S
    limit: int = 0  # only the first so many documents or questions of a task; 0: all
    target_se: float = 0.25  # nats; a pilot tells how many draws make the best two answers' difference so well known
    most_draws: int = 128  # a question's draws at the most, the pilot's (16, or `draws` if more) not counted

    def check(self) -> None:
        _choice("evaluate.checkpoint", self.checkpoint, ("best", "latest"))
        _seed("evaluate.seed", self.seed)
        _rule(self.draws >= 2, "evaluate.draws", self.draws, "must be at least 2 (for a standard error)")
        _rule(self.batch_size >= 0, "evaluate.batch_size", self.batch_size, "must not be negative; 0 is what fits")
        _rule(self.rows >= 0, "evaluate.rows", self.rows, "must not be negative")
        _rule(self.rows_in_training >= 2, "evaluate.rows_in_training", self.rows_in_training, "must be at least 2")
        _rule(self.cv2 > 0, "evaluate.cv2", self.cv2, "must be positive")
        for name in self.tasks:
            _choice("evaluate.tasks", name, tuple(TASKS))
        for name in self.protocols:
            _choice("evaluate.protocols", name, PROTOCOLS)
        _rule(bool(self.protocols), "evaluate.protocols", self.protocols, f"choose of {', '.join(PROTOCOLS)}")
        for name in ("files", "lm1b"):
            _rule(name not in self.tasks or bool(getattr(self, name)), f"evaluate.{name}", getattr(self, name),
                  f"the task {name!r} needs its files")
        _rule(self.limit >= 0, "evaluate.limit", self.limit, "must not be negative; 0 is all")
        _rule(self.target_se > 0, "evaluate.target_se", self.target_se, "must be positive")
        _rule(self.most_draws >= 1, "evaluate.most_draws", self.most_draws, "must be at least 1")


@dataclasses.dataclass(frozen=True)
class Generate:
    num_samples: int = 16
    length: int = 0  # tokens of a text, prompt and all; 0: model.seq_len, or drawn where training tells lengths
    method: str = "ancestral"  # how to decode: any name of hdlm_jax/decoding/presets.py (docs/decoding.md)
    options: str = ""  # of the method, as in "threshold=.8 block=16"
    steps: int = 128  # of the methods that have a number of steps
    temperature: float = 1.0
    top_p: float = 1.0
    corrections: int = 0  # gidd: calls at the end that revise a word each
    correction_temperature: float = 0.1
    clusters: str = "exact"  # xi < 1: exact shows wrong clusters as the process does, clean never does
    prompt: str = ""
    stop: str = "end"  # texts are cut before the first end of text behind the prompt; "": they are not
    schema: str = ""  # file with a JSON schema: every sample is a document of it (docs/decoding.md)
    helper: str = ""  # workdir of an autoregressive run, for the methods that need one: guided, edlm
    batch_size: int = 16
    trajectories: int = 4  # of so many samples every step is kept as well, for --mode=report
    checkpoint: str = "best"
    seed: int = 0
    force_transition: str = ""  # of the sampler alone: none | within | between | cavity; empty: as trained
    judge: str = ""  # who scores the texts: a folder of GPT-2 or the workdir of a run; empty: nobody
    judge_dtype: str = "float32"  # of a GPT-2 judge's products; a run judges in its own model.dtype

    def check(self) -> None:
        _choice("generate.clusters", self.clusters, CLUSTERS)
        _choice("generate.stop", self.stop, ("end", ""))
        _choice("generate.judge_dtype", self.judge_dtype, ("float32", "bfloat16"))
        if self.force_transition:
            _choice("generate.force_transition", self.force_transition, FORCE_TRANSITIONS)
        _choice("generate.checkpoint", self.checkpoint, ("best", "latest"))
        _seed("generate.seed", self.seed)
        for name in ("num_samples", "steps", "batch_size"):
            _rule(getattr(self, name) >= 1, f"generate.{name}", getattr(self, name), "must be at least 1")
        for name in ("num_samples", "steps", "batch_size", "corrections"):  # the sampler counts in int32
            _rule(getattr(self, name) < 2**31, f"generate.{name}", getattr(self, name), f"must be at most {2**31 - 1}")
        _rule(self.corrections >= 0, "generate.corrections", self.corrections, "must not be negative")
        _rule(self.correction_temperature > 0, "generate.correction_temperature", self.correction_temperature,
              "must be positive")
        _rule(self.length >= 0, "generate.length", self.length, "must not be negative; 0 is model.seq_len")
        _rule(self.trajectories >= 0, "generate.trajectories", self.trajectories, "must not be negative; 0 is none")
        _rule(self.temperature >= 0, "generate.temperature", self.temperature, "must not be negative")
        _rule(0 < self.top_p <= 1, "generate.top_p", self.top_p, "must lie in (0, 1]")
        try:
            method = presets.make(self.method, self.options, self.steps)
        except ValueError as error:
            raise ConfigError(f"generate.{error}") from error
        for name in ("temperature", "top_p"):
            _rule(method.policy.draw != "argmax" or getattr(self, name) == 1, f"generate.{name}", getattr(self, name),
                  f"does nothing where method {self.method!r} takes the likeliest; add draw=sample to its options")


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Shape of the device mesh; one axis may be -1, all the devices that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def check(self) -> None:
        shape = (self.data, self.fsdp, self.tensor)
        _rule(all(n == -1 or n >= 1 for n in shape) and shape.count(-1) <= 1, "parallel", shape,
              "axes must be at least 1, at most one of them -1 (all devices left)")

    def shape(self, devices: int) -> tuple[int, int, int]:
        """Sizes of (data, fsdp, tensor) on so many devices."""
        shape = [self.data, self.fsdp, self.tensor]
        given = math.prod(n for n in shape if n > 0)
        shape = [devices // given if n == -1 else n for n in shape]
        _rule(math.prod(shape) == devices, "parallel", (self.data, self.fsdp, self.tensor),
              f"does not multiply to the {devices} devices at hand")
        return shape[0], shape[1], shape[2]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: int = 5000  # steps; measured on validation text as well, which tells the best
    minutes: float = 10.0  # since the last one: saved as it is, nothing measured; 0: by steps alone

    def check(self) -> None:
        _rule(self.every >= 1, "checkpoint.every", self.every, "must be at least 1")
        _rule(self.minutes >= 0, "checkpoint.minutes", self.minutes, "must not be negative; 0 is by steps alone")


@dataclasses.dataclass(frozen=True)
class Released:
    """Weights of the published PyTorch networks: what --mode=import reads and --mode=export adds (docs/import.md)."""

    layout: str = ""  # whose vocabulary: mdlm | gidd | hdlm; given, --mode=export writes <layout>.safetensors as well
    weights: str = ""  # .safetensors, .pt, .pth, .bin, .ckpt or .npz, or the folder that holds it
    clusters: str = ""  # word -> cluster: .pt, .npy or .json
    ema: bool = True  # the averaged weights, where the file keeps both
    mask_id: int = -1  # -1: as released, V for mdlm, V + 1 for gidd and hdlm (behind a padding token)
    first_cluster: int = -1  # -1: as released, behind words and mask
    missing: str = "refuse"  # words that the dictionary lacks: refuse | own, a cluster of their own

    def check(self) -> None:
        _choice("released.layout", self.layout, ("", "mdlm", "gidd", "hdlm"))
        _choice("released.missing", self.missing, ("refuse", "own"))
        for name in ("mask_id", "first_cluster"):
            _rule(getattr(self, name) >= -1, f"released.{name}", getattr(self, name), "must be an id, or -1")


@dataclasses.dataclass(frozen=True)
class Config:
    data: Data = Data()
    tokenizer: Tokenizer = Tokenizer()
    hierarchy: Hierarchy = Hierarchy()
    diffusion: Diffusion = Diffusion()
    model: Model = Model()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    generate: Generate = Generate()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    released: Released = Released()

    def check(self) -> None:
        """Raises ConfigError at the first broken rule, cross-field ones last."""
        for field in dataclasses.fields(self):
            getattr(self, field.name).check()
        n = max(self.hierarchy.clusters, default=1)
        _rule(n <= self.tokenizer.vocab_size, "hierarchy.clusters", self.hierarchy.clusters,
              f"more clusters than the tokenizer.vocab_size={self.tokenizer.vocab_size} words")
        single = n == 1 and not (self.hierarchy.keep_single and self.hierarchy.clusters)
        levels = 1 if single else 1 + sum(c > 1 for c in self.hierarchy.clusters) + (n == 1)
        process = self.diffusion.process
        _rule(process == "hierarchical" or levels == 1, "hierarchy.clusters", self.hierarchy.clusters,
              f"diffusion.process={process!r} knows no clusters; give (1,)")
        _rule(process != "autoregressive" or not self.model.time_conditioning, "model.time_conditioning", True,
              "diffusion.process='autoregressive' has no time; give False")
        self.diffusion.level_rates(levels)
        _rule(self.model.head == "flat" or levels > 1, "model.head", self.model.head,
              "needs clusters of words; MDLM (a single level) has none, choose 'flat'")
        _rule(self.generate.length <= self.model.seq_len, "generate.length", self.generate.length,
              f"must be at most model.seq_len={self.model.seq_len}")
        _rule(process == "gidd" or not self.generate.corrections, "generate.corrections", self.generate.corrections,
              f"goes with diffusion.process='gidd', not {process!r}")
        plain = self.generate.method == "ancestral" and not self.generate.options
        _rule(process in ("hierarchical", "sedd") or plain, "generate.method", self.generate.method,
              f"diffusion.process={process!r} has no levels that drop; choose 'ancestral' without options")
        low = 1 / n
        _rule(self.diffusion.xi == 1 or low < self.diffusion.xi, "diffusion.xi", self.diffusion.xi,
              f"must lie in (1/n, 1] = ({low:.4g}, 1] for n = {n} clusters"
              if n > 1 else "must be 1 when there is a single cluster (MDLM)")

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def default() -> config_dict.ConfigDict:
    """All defaults as a ConfigDict with typed, overridable fields."""
    return config_dict.ConfigDict(Config().as_dict())


def resolve(given: Any) -> Config:
    """A checked, frozen Config from a ConfigDict (or plain nested dict); ~ and $VARIABLES in its PATHS are expanded.

    Raises:
      ConfigError: unknown names, wrong types, broken rules.
    """
    given = given.to_dict() if isinstance(given, config_dict.ConfigDict) else dict(given)
    built = {}
    for name in given:
        check_name(name)
    for field in dataclasses.fields(Config):
        name = field.name
        section: Any = field.default
        values = given.get(name, {})
        _rule(isinstance(values, dict), f"config.{name}", values, f"is a section; its settings are {_names(section)}")
        section = change(name, section, values)
        paths = [key for whole, _, key in (path.partition(".") for path in PATHS) if whole == name]
        built[name] = dataclasses.replace(section, **{key: expand(getattr(section, key)) for key in paths})
    if built["hierarchy"].clusters == (0,):
        clusters = default_clusters(built["tokenizer"].vocab_size)
        built["hierarchy"] = dataclasses.replace(built["hierarchy"], clusters=clusters)
    config = Config(**built)
    config.check()
    return config


_INHERITED = ("tokenizer", "hierarchy", "diffusion", "model")
_MAY_DIFFER = ("diffusion.", "model.seq_len", "model.dropout", "model.embeddings", "model.dtype", "model.remat")


def inherit(given: Any, base: Config, name: str) -> dict[str, Any]:
    """What is given (a ConfigDict or nested dict), with what makes the model taken from the run `base` it starts from.

    A setting left at its default is the base's; of those given, the process, the loss and what does not change the
    weights' meaning may differ.

    Raises:
      ConfigError: all settings that contradict the base, in one line; `name` is what to call it.
    """
    out = given.to_dict() if isinstance(given, config_dict.ConfigDict) else dict(given)
    wrong = []
    for section in _INHERITED:
        values = dict(out.get(section, {}))
        for field in dataclasses.fields(getattr(base, section)):
            was, key = getattr(getattr(base, section), field.name), f"{section}.{field.name}"
            value = values.get(field.name, field.default)
            if value == field.default:
                values[field.name] = was
            elif (expand(value) if key in PATHS else value) != was and not key.startswith(_MAY_DIFFER):
                wrong.append(f"{key}={value!r} (there {was!r})")
        out[section] = values
    _rule(not wrong, "train.init_from", name, f"that run has other settings than given here: {'; '.join(wrong)}; leave "
                                              "them out, and the run's own are taken")
    return out


def change(name: str, section: Any, values: dict[str, Any]) -> Any:
    """A section with some settings changed: names and types are checked, rules are not (`check` does).

    Raises:
      ConfigError: unknown names, wrong types.
    """
    types = typing.get_type_hints(type(section))
    for key in values:
        check_name(f"{name}.{key}")
    return dataclasses.replace(section, **{k: _typed(f"{name}.{k}", v, types[k]) for k, v in values.items()})


def check_name(name: str) -> None:
    """ConfigError unless `name` is a section ("train") or a setting ("train.steps") of the config."""
    sections: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(Config)}
    section, dot, key = name.partition(".")
    known = tuple(f.name for f in dataclasses.fields(sections[section])) if section in sections and dot else None
    here, choices = (key, known) if known else (section, tuple(sections))
    if here not in choices:
        close = difflib.get_close_matches(here, choices, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        kind = "setting" if known else "section"
        raise ConfigError(f"config.{name}: no such {kind}; choose one of {', '.join(choices)}{hint}")


def _names(section: Any) -> str:
    return ", ".join(f.name for f in dataclasses.fields(section))


def _typed(name: str, value: Any, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        _rule(isinstance(value, list | tuple), name, value, "must be a tuple, as in (64,) or (256, 16)")
        return tuple(_typed(name, v, typing.get_args(kind)[0]) for v in value)
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    _rule(type(value) is kind, name, value, f"must be of type {kind.__name__}")
    _rule(kind is not float or math.isfinite(value), name, value, "must be a finite number")
    return value
