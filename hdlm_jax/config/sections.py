"""The sections of the settings: every choice with its default, and the rules inside a section."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

from hdlm_jax.config.rules import check_local, choice, rule

# the names that settings choose among; tests/test_config.py holds them to what the rooms above can do
EXAMPLES = ("digits", "spoken_digits", "unseen_speaker", "glyphs", "phonemes", "vowels")  # of data/examples.py
PROCESSES = ("hierarchical", "gidd", "sedd", "autoregressive")
FORCE_TRANSITIONS = ("none", "within", "between", "cavity")
CLUSTERS = ("exact", "clean")
CHANNEL_TIMES = ("shared", "token", "before")
LATENT_METHODS = ("ancestral", "first_hitting", "any_order", "max_prob", "margin", "entropy")  # behind latents
WEIGHTINGS = {"hierarchical": ("none", "constant", "clip", "empirical"),  # training losses, by process
              "sedd": ("none", "constant", "clip", "empirical"),
              "gidd": ("none", "constant", "clip", "dynamic"),
              "autoregressive": ("constant",)}
OBJECTIVES = ("nelbo", "rate", "count", "any_order", "complementary", "paired")
LESSONS = ("energy", "certainty", "adjust")  # objectives of runs/refine.py: what a trained run learns afterwards
ASIDE = ("energy", "adjust")  # those of them that make no language model, but a helper of the run they start from
DETOKENIZERS = ("", "lm1b", "ptb", "wikitext", "lambada", "ag_news")
TASKS = ("ptb", "wikitext2", "lambada", "ag_news", "openwebtext", "lm1b", "files", "hellaswag", "arc_easy",
         "arc_challenge", "piqa", "openbookqa", "winogrande", "lambada_last_word", "gsm8k")
TXT_DOCUMENTS = ("file", "blank_line", "line")
FORMATS = ("auto", "txt", "jsonl", "json", "parquet", "tar")
PACKINGS = ("concat", "documents", "crop")
PADDINGS = ("end", "hidden")
PROTOCOLS = ("document", "packed")
WRITERS = ("tensorboard", "wandb")
REWARDS = ("permutations", "sorting", "parity", "sums", "repeats", "countdown", "sudoku")  # of tuning/tasks.py
OWN_ANSWERS = "answers"  # the task whose prompts and right answers are those of the run's texts
TUNINGS = ("score", "elbo", "nodes", "coupled", "one_pass", "spg")  # objectives of tuning/update.py
FIXED_WORDS = {"gpt2": 50257, "bytes": 257}  # of tokenizers that have no other number of them


_LIMITS: dict[str, Callable[[float], bool]] = {
    "must be at least 1": lambda v: v >= 1, "must not be negative": lambda v: v >= 0,
    "must be positive": lambda v: v > 0, "must lie in [0, 1)": lambda v: 0 <= v < 1}


class _Section:
    """Settings that belong together; `check` raises ConfigError at the first rule that is broken."""

    def need(self, ok: bool, name: str, text: str) -> None:
        """The rule `text` of the setting `name`."""
        rule(ok, f"{type(self).__name__.removesuffix('Config').lower()}.{name}", getattr(self, name), text)

    def hold(self, text: str, *names: str) -> None:
        """One of _LIMITS for settings that are numbers."""
        for name in names:
            self.need(_LIMITS[text](getattr(self, name)), name, text)

    def hold_seed(self, name: str, below: int = 2**32) -> None:
        """A seed that keeps all of its bits (JAX would keep the lowest 32, and say nothing)."""
        self.need(0 <= getattr(self, name) < below, name, f"must lie in 0..{below - 1}")

    def among(self, **choices: Sequence[str]) -> None:
        """Settings that are one of these names, or a tuple of them."""
        for name, known in choices.items():
            value = getattr(self, name)
            for one in value if isinstance(value, tuple) else (value,):
                choice(f"{type(self).__name__.removesuffix('Config').lower()}.{name}", one, known)


@dataclasses.dataclass(frozen=True)
class DataConfig(_Section):
    """Where text comes from, how it is split, and how sequences are made of it (hdlm_jax.data)."""

    source: str = "embedded"  # embedded: Python's documentation; files; task: of tune.task; others: data/examples.py
    files: tuple[str, ...] = ()  # paths, folders, globs, URLs: text, json(l), parquet, (nested) tar, plain or packed
    format: str = "auto"  # of the files: auto, by their names; or txt, jsonl, json, parquet, tar
    validation: tuple[str, ...] = ()  # held-out files; empty: by `split`
    split: str = "hash"  # hash: by sha256 of the document; last: the last `validation_documents`
    validation_fraction: float = 0.05  # share of documents held out by split="hash"
    validation_documents: int = 100_000  # documents held out by split="last"
    text_field: str = "text"  # field of a jsonl record or parquet row
    prompt_field: str = ""  # fine-tuning: this field is given, only text_field is noised and scored
    chat: bool = False  # prompt and text are turns of a chat, written in the template of tokenizer.kind='hub'
    features_field: str = ""  # vectors in front of a text: images, sound, anything (docs/conditioning.md); given
    feature_places: int = 0  # P: the first places of a row, which show them; a record has at most so many
    feature_width: int = 0  # F: numbers of a vector
    txt_documents: str = "file"  # a document of a text file: the file, all between blank lines (blank_line), a line
    detokenize: str = ""  # undo a corpus's own tokenisation: lm1b, ptb, wikitext, lambada, ag_news
    bad_share: float = 0.001  # stop when more of the records than this cannot be read
    dir: str = ""  # prepared tokens, to share between runs; empty: <workdir>/data
    prepare_shard: str = ""  # i/n: prepare as worker i (0..n-1) of n on one shared data.dir; the last one merges
    read_threads: int = 2  # batches of prepared tokens read at once; more where a read waits, as on a mounted bucket
    stream: bool = False  # train on raw documents, tokenised on the fly; only validation and a sample are prepared
    sample_bytes: int = 100_000_000  # size of that sample (clusters, unigram), bytes of training text
    shuffle_documents: int = 10_000  # streaming: documents shuffled at once
    packing: str = "concat"  # concat | documents: attention inside documents alone | crop: a window of one document
    padding: str = "end"  # crop, behind a text: end: ends of text, learnt and scored | hidden: its length is given
    variable_share: float = 0.0  # of the sequences cut to a random length in 1..seq_len

    def check(self) -> None:
        self.among(source=("embedded", "files", "task", *EXAMPLES), format=FORMATS, split=("hash", "last"),
                   txt_documents=TXT_DOCUMENTS, detokenize=DETOKENIZERS, packing=PACKINGS, padding=PADDINGS)
        self.need(not self.prompt_field or self.packing == "crop" or self.padding == "hidden", "packing",
                  "with data.prompt_field a record needs a row of its own, or the next prompt tells where a response "
                  "ends: choose crop")
        self.need(not self.chat or bool(self.prompt_field), "chat",
                  "needs data.prompt_field, the user's turn; data.text_field is the assistant's")
        self._check_features()
        check_local("data.dir", self.dir)
        self.need(bool(self.files) == (self.source == "files"), "files", "needed with data.source='files'")
        self.need(self.source != "task" or not self.stream, "stream", "does not go with data.source='task'")
        self.need(0 < self.validation_fraction < 1, "validation_fraction", "must lie in (0, 1)")
        self.hold("must lie in [0, 1)", "bad_share")
        self.need(0 <= self.variable_share <= 1, "variable_share", "must lie in [0, 1]")
        self.hold("must be at least 1", "validation_documents", "sample_bytes", "shuffle_documents", "read_threads")
        self.need(not self.stream or bool(self.validation) or self.split == "hash", "split",
                  "data.stream does not know which documents are the last: choose hash, or give data.validation")
        self.worker()

    def _check_features(self) -> None:
        self.hold("must not be negative", "feature_places", "feature_width")
        named = bool(self.features_field)
        for name in ("feature_places", "feature_width"):
            self.need((getattr(self, name) > 0) == named, name, "goes with data.features_field: a record's field, its "
                      "most vectors (feature_places) and their numbers (feature_width) are given together")
        if named:
            self.need(self.packing == "crop", "packing", "with data.features_field a record needs a row of its own: "
                      "choose crop")
            for name in ("chat", "stream", "variable_share"):
                self.need(not getattr(self, name), name, "does not go with data.features_field")

    def worker(self) -> tuple[int, int]:
        """(i, n) of data.prepare_shard; (0, 1) where it is not given."""
        i, slash, n = (self.prepare_shard or "0/1").partition("/")
        ok = bool(slash) and i.isdigit() and n.isdigit() and int(i) < int(n)
        self.need(ok, "prepare_shard", "must be i/n with 0 <= i < n, as in 0/8")
        return int(i), int(n)


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(_Section):
    """gpt2 (50,257 words, through tiktoken), bpe (trained on the corpus), bytes (257), bert (WordPiece of a file) or
    hub (that of an open model)."""

    kind: str = "gpt2"  # gpt2 | bpe (trained on the corpus) | bytes | bert (WordPiece) | hub (an open model's)
    vocab_size: int = 50257  # V, the end of text counted; 50257 for gpt2, 257 for bytes
    file: str = ""  # gpt2, bpe: a local rank file; bert: its vocab.txt; hub: a tokenizer.json, its folder or a .gguf
    sha256: str = ""  # of that file; checked if given
    pattern: str = ""  # how bpe cuts text: gpt2 (or empty), cl100k, llama3, qwen2, o200k, or a regular expression

    def check(self) -> None:
        self.among(kind=("gpt2", "bpe", "bytes", "bert", "hub"))
        self.need(self.kind != "bert" or bool(self.file), "file",
                  "tokenizer.kind='bert' needs a local vocab.txt (one word a line)")
        fixed = FIXED_WORDS.get(self.kind)
        self.need(fixed is None or self.vocab_size == fixed, "vocab_size",
                  f"tokenizer.kind={self.kind!r} has {fixed} words")
        self.need(not self.pattern or self.kind == "bpe", "pattern",
                  f"goes with tokenizer.kind='bpe'; {self.kind!r} has its own")
        self.need(self.vocab_size >= 257 or self.kind == "hub", "vocab_size",
                  "must be at least 257 (256 bytes and <|endoftext|>)")


@dataclasses.dataclass(frozen=True)
class HierarchyConfig(_Section):
    """Clusters of words: sizes fine to coarse, (64,) or (256, 16); (1,) or () is MDLM."""

    clusters: tuple[int, ...] = (0,)  # (0,): one level of about sqrt(V) clusters, a power of two
    embeddings: str = "corpus"  # corpus | FILE.npy | FILE.safetensors:TENSOR | checkpoint:WORKDIR | frequency | brown
    head_clusters: int = 0  # classes of model.head='factorised' where the process has no clusters; they are no states
    shuffle: bool = False  # control: clusters of the same sizes with random members
    map: str = "hard"  # of a word to clusters: hard | learned, its probabilities, from those of diffusion.xi on
    map_rate: float = 1.0  # of map='learned': its learning rate, times optimizer.lr
    seed: int = 0  # of k-means, and of shuffle

    def check(self) -> None:
        c = self.clusters
        self.need(all(n >= 1 for n in c) and all(a > b for a, b in zip(c, c[1:], strict=False)), "clusters",
                  "cluster numbers must be positive and fall, fine to coarse, as in (256, 16)")
        self.among(map=("hard", "learned"))
        self.hold("must be positive", "map_rate")
        self.need(self.head_clusters == 0 or self.head_clusters > 1, "head_clusters", "must be 0, or at least 2")
        self.hold_seed("seed", 2**31 - 1)  # faiss adds one, and has 31 bits
        e = self.embeddings
        known = (e in ("corpus", "frequency", "brown") or e.endswith(".npy") or ".safetensors:" in e
                 or e.startswith("checkpoint:"))
        self.need(known, "embeddings", "choose corpus, a FILE.npy, a FILE.safetensors:TENSOR, checkpoint:WORKDIR, "
                                       "frequency or brown")


def default_clusters(vocab_size: int) -> tuple[int, ...]:
    """(n,), n the power of two nearest to sqrt(V) in logarithm: 64 for V = 4,096, 256 for GPT-2's 50,257."""
    return (2 ** round(math.log2(math.sqrt(vocab_size))),)


@dataclasses.dataclass(frozen=True)
class DiffusionConfig(_Section):
    """The process and the training loss (docs/theory.md sections 2 and 3)."""

    process: str = "hierarchical"  # (MDLM with a single cluster) | gidd | sedd | autoregressive: baselines
    p_uniform: float = 0.0  # gidd: share of random words at t = 1/2
    gamma: float = 1.0  # rates (gamma, 1) for two levels
    rates: tuple[float, ...] = ()  # rates of all K levels, in place of gamma
    xi: float = 1.0  # share of tokens that go to their own cluster at the first crossing, in (1/n, 1]
    force_transition: str = "cavity"  # of predictions under a cluster: none | within | between | cavity
    weighting: str = "clip"  # of the training loss, by process (docs/theory.md "Training weights")
    weight_min: float = 0.0  # of weighting=clip
    weight_max: float = 2.0  # of weighting=clip
    hard_training: bool = False  # above level 1: -log p(token) as the loss in place of the bound's
    channel: float = 0.0  # c: beside its symbol a token shows its noisy embedding (docs/continuous.md); 0: it does not
    channel_width: int = 32  # D: numbers of that embedding, made of hierarchy.embeddings
    channel_times: str = "shared"  # of its ratio s: one for all tokens | token, a ladder each | before the symbols
    channel_levels: tuple[float, ...] = ()  # of s / c, falling: token's ladder; else at most one, where s stops
    latents: int = 0  # P: so many vectors of the row's text are written before it (docs/continuous.md); 0: none
    latents_width: int = 64  # D: numbers of a latent, a multiple of its model.seq_len / P tokens
    latents_ratio: float = 1.0  # s_max: how clear they are when the symbols begin to fall

    def check(self) -> None:
        self.among(force_transition=FORCE_TRANSITIONS, process=PROCESSES)
        self.among(weighting=WEIGHTINGS[self.process])
        self.hold("must lie in [0, 1)", "p_uniform")
        self.need(not self.p_uniform or self.process == "gidd", "p_uniform",
                  f"goes with diffusion.process='gidd', not {self.process!r}")
        plain = self.process == "hierarchical" or (self.xi, self.hard_training, self.rates, self.gamma) == (
            1, False, (), 1)
        self.need(plain, "process", "knows no xi, hard_training, rates or gamma; leave them out")
        self.hold("must be positive", "gamma")
        self.hold("must not be negative", "channel", "latents")
        self.hold("must be at least 1", "channel_width", "latents_width")
        self.hold("must be positive", "latents_ratio")
        self._check_times()
        self.need(not self.rates or self.gamma == 1, "rates",
                  "only one of diffusion.gamma and diffusion.rates should be given")
        self.need(all(r > 0 for r in self.rates), "rates", "must be positive")
        self.need(0 < self.xi <= 1, "xi", "must lie in (1/n, 1]")
        self.need(0 <= self.weight_min <= self.weight_max, "weight_max",
                  f"must be at least diffusion.weight_min={self.weight_min}, and that at least 0")
        self.need(self.xi == 1 or self.force_transition != "within", "force_transition",
                  f"its bound is infinite at xi={self.xi}: choose none, between or cavity")

    def _check_times(self) -> None:
        times, levels = self.channel_times, self.channel_levels
        self.among(channel_times=CHANNEL_TIMES)
        self.need(bool(self.channel) or times == "shared", "channel_times", "goes with diffusion.channel > 0")
        self.need(bool(self.channel) or not levels, "channel_levels", "goes with diffusion.channel > 0")
        self.need(all(a > b for a, b in itertools.pairwise((*levels, 0.0))), "channel_levels",
                  "must be positive and fall, as in (4, .7)")
        self.need(bool(levels) or times != "token", "channel_levels",
                  "diffusion.channel_times='token' needs the levels of its ladder, as (4, .7)")
        self.need(len(levels) < 2 or times == "token", "channel_levels",
                  f"diffusion.channel_times={times!r} has at most one, where s stops")

    def level_rates(self, levels: int) -> tuple[float, ...]:
        """Rates of the K levels, scaled so that the smallest is 1 (a common factor only relabels time)."""
        rates = self.rates or ((self.gamma, 1.0) if levels == 2 else (1.0,) * levels)
        rule(len(rates) == levels, "diffusion.rates", rates, f"the hierarchy has {levels} levels and needs as many")
        self.need(self.gamma == 1 or levels <= 2, "gamma",
                  f"stands for two levels; give diffusion.rates for the {levels} of this hierarchy")
        return tuple(r / min(rates) for r in rates)


@dataclasses.dataclass(frozen=True)
class ModelConfig(_Section):
    """The network: the published transformer (dit), or that of open language models (decoder, see its section)."""

    trunk: str = "dit"  # dit: the published one, adaptive layer norm on time | decoder: as Llama, Qwen, Gemma; no time
    width: int = 768  # D
    blocks: int = 12  # transformer blocks
    heads: int = 12  # of attention
    seq_len: int = 512  # S, tokens of a row
    dropout: float = 0.0  # in the blocks, as published
    block: int = 0  # block diffusion: a block of so many tokens is noised, those before it are clean; 0: none
    time_conditioning: bool = True  # whether the network is told t
    head: str = "flat"  # flat: a logit for every word | factorised: p(cluster) p(word | cluster)
    prototypes: int = 8  # vectors a cluster, factorised head
    order: bool = False  # a head that ranks which tokens are unmasked next: method dcolt reads it, rewards train it
    block_lengths: bool = False  # a head that draws lengths of blocks: method ctrldiff reads it, rewards train it
    embeddings: str = "random"  # random | clusters: start from the embeddings the words were clustered by
    warm_head: bool = False  # with embeddings=clusters the head's vectors start from them as well, not from zero
    tied: bool = False  # the head's vectors of the words are their embeddings, flat head
    dtype: str = "float32"  # of the computation; logits are float32
    param_dtype: str = "float32"  # of the parameters; bfloat16 is for using a decoder, not for training it
    attention: str = "auto"  # kernel: xla | splash (TPU) | cudnn (NVIDIA, bfloat16) | auto: one of these two, or xla
    remat: str = "auto"  # recomputed in the backward pass: none | cheap (all but products) | all | auto: what fits

    @property
    def chooses(self) -> tuple[str, ...]:
        """Names of the heads for a sampler's choices."""
        return ("order",) * self.order + ("block_lengths",) * self.block_lengths

    @property
    def head_kind(self) -> str:
        """The head, to read: flat, tied or factorised."""
        return "tied" if self.tied else self.head

    def check(self) -> None:
        self.among(head=("flat", "factorised"), attention=("auto", "xla", "splash", "cudnn"),
                   remat=("auto", "none", "cheap", "all"), embeddings=("random", "clusters"),
                   dtype=("float32", "bfloat16"), param_dtype=("float32", "bfloat16"), trunk=("dit", "decoder"))
        self.hold("must be at least 1", "width", "blocks", "heads", "seq_len", "prototypes")
        self.hold("must not be negative", "block")
        self.need(not self.tied or (self.head == "flat" and not self.warm_head), "tied",
                  "needs model.head='flat' and model.warm_head=False; give False")
        self.need(not self.block or self.seq_len % self.block == 0, "block",
                  f"must divide model.seq_len={self.seq_len}")
        self.need(not self.block or not self.time_conditioning, "time_conditioning",
                  f"a network of model.block={self.block} is not told t, as each block has a noise time: give False")
        if self.trunk == "dit":
            self.need(self.width % self.heads == 0, "heads", f"must divide model.width={self.width}")
            self.need(self.width // self.heads % 2 == 0, "heads",
                      f"model.width/model.heads = {self.width / self.heads:g} must be even (rotary embedding)")
            self.need(self.param_dtype == "float32", "param_dtype", "goes with model.trunk='decoder'")
        else:
            self.need(not self.time_conditioning, "time_conditioning", "the decoder is not told t: give False")
            self.need(not self.dropout, "dropout", "the decoder has none: give 0")
        self.hold("must lie in [0, 1)", "dropout")


@dataclasses.dataclass(frozen=True)
class DecoderConfig(_Section):
    """The trunk of open language models (model.trunk='decoder'); --mode=import sets it from their config.json."""

    kv_heads: int = 0  # heads of keys and values; 0: as many as model.heads
    head_dim: int = 0  # of a head; 0: model.width / model.heads
    inner: int = 0  # of the MLP; 0: 8/3 of model.width, a multiple of 64
    activation: str = "silu"  # of the MLP's gate: silu | gelu (its tanh form)
    eps: float = 1e-6  # of the norms
    norm_offset: float = 0.0  # added to the weights of the norms
    post_norms: bool = False  # norms behind attention and MLP as well
    qkv_bias: bool = False  # of queries, keys and values
    qk_norm: bool = False  # norms of queries and keys, per head
    query_scale: float = 0.0  # queries are divided by its square root; 0: head_dim
    theta: float = 1e4  # base of the rotary embedding
    rotary_share: float = 1.0  # share of a head's units that it turns
    scaling: str = ""  # of its angles: "linear factor=8", "llama3 factor=32 low=1 high=4 length=8192"
    window: int = 0  # tokens before its own that a block sees, but for every `window_every`-th; 0: all
    window_every: int = 6  # as in 5 blocks with a window, one without
    window_theta: float = 1e4  # base of the rotary embedding in those with a window
    scale_embeddings: bool = False  # by the square root of model.width
    softcap: float = 0.0  # of the logits, c tanh(logit / c); 0: none
    context: str = "full"  # of a diffusion process: a token sees all (full), its block and those before (block)
    block: int = 32  # tokens of a block, context='block'
    lora: int = 0  # rank of additions to the products; they and what is new are trained, the rest is kept; 0: all is
    shifted: bool = False  # tokens are predicted one place before their own, as an autoregressive model was trained to
    experts: int = 0  # of the MLP; 0: a single one
    experts_per_token: int = 8  # that work on a token
    expert_inner: int = 768  # of an expert
    shared_inner: int = 0  # of an expert that works on every token; 0: none
    dense_blocks: int = 0  # first blocks without experts
    gate: str = "softmax"  # scores of the experts: softmax | sigmoid (with a bias for choosing alone)
    expert_groups: int = 1  # of which `top_groups` are chosen by the sum of their best two scores
    top_groups: int = 1  # see expert_groups
    normalise: bool = True  # the chosen scores to a sum of 1
    routed_scale: float = 1.0  # times what the chosen experts give
    loops: int = 0  # R, times that the blocks between prelude and coda are passed (mean, in training); 0: no loop
    loops_back: int = 8  # of these, the last ones that have gradients
    prelude: int = 1  # blocks before the loop
    coda: int = 1  # blocks behind it

    def passed(self, blocks: int) -> int:
        """Blocks that a token passes in a network that has so many."""
        ends = self.prelude + self.coda
        return ends + self.loops * (blocks - ends) if self.loops else blocks

    @property
    def own_block(self) -> int:
        """Tokens of the blocks, counted from a row's beginning, that a token's sight ends with; 0: it sees all."""
        return self.block if self.context == "block" else 0

    def check(self) -> None:
        self.among(activation=("silu", "gelu"), context=("full", "block"), gate=("softmax", "sigmoid"))
        self.hold("must not be negative", "kv_heads", "head_dim", "inner", "window", "experts", "shared_inner",
                  "dense_blocks", "query_scale", "softcap", "lora", "loops")
        self.hold("must be positive", "eps", "theta", "window_theta", "routed_scale")
        self.hold("must be at least 1", "window_every", "block", "experts_per_token", "expert_inner", "expert_groups",
                  "top_groups", "loops_back", "prelude", "coda")
        self.need(0 < self.rotary_share <= 1, "rotary_share", "must lie in (0, 1]")
        if self.experts:
            self.need(self.experts_per_token <= self.experts, "experts_per_token", f"there are {self.experts} experts")
            self.need(self.experts % self.expert_groups == 0, "expert_groups", f"must divide {self.experts} experts")
            self.need(self.top_groups <= self.expert_groups, "top_groups", f"there are {self.expert_groups} groups")
        self.rotary_scaling()

    def rotary_scaling(self) -> tuple[str, dict[str, float]]:
        """(kind, numbers) of `scaling`; ("", {}) where there is none."""
        kind, *rest = self.scaling.split() or [""]
        needs = {"": (), "linear": ("factor",), "llama3": ("factor", "low", "high", "length")}
        self.need(kind in needs, "scaling", f"choose one of {', '.join(filter(None, needs))}, with its numbers")
        try:
            numbers = {name: float(value) for name, value in (part.split("=") for part in rest)}
        except ValueError:
            numbers = {}
        ok = set(numbers) == set(needs[kind]) and all(value > 0 for value in numbers.values())
        self.need(ok, "scaling", f"{kind} needs {', '.join(needs[kind]) or 'no numbers'}, each as name=number above 0")
        return kind, numbers

    def sizes(self, model: ModelConfig) -> tuple[int, int, int]:
        """(heads of keys and values, units of a head, of the MLP), with what 0 stands for."""
        return self.kv_heads or model.heads, self.head_dim or model.width // model.heads, self.inner_of(model.width)

    def inner_of(self, width: int) -> int:
        """Units of the MLP of a network of so many."""
        return self.inner or -(-8 * width // 3 // 64) * 64

    def check_with(self, model: ModelConfig) -> None:
        """The rules between this section and the network's sizes."""
        self.need(bool(self.head_dim) or model.width % model.heads == 0, "head_dim",
                  f"must be given where model.heads={model.heads} does not divide model.width={model.width}")
        kv, dim, _ = self.sizes(model)
        self.need(model.heads % kv == 0, "kv_heads", f"must divide model.heads={model.heads}")
        self.need(int(dim * self.rotary_share) % 2 == 0, "head_dim",
                  f"{self.rotary_share:g} of {dim} units must be even (rotary embedding)")
        self.need(self.dense_blocks < model.blocks, "dense_blocks", f"must be fewer than model.blocks={model.blocks}")
        self.need(not self.loops or self.prelude + self.coda < model.blocks, "loops",
                  f"needs blocks to pass again: decoder.prelude={self.prelude} and coda={self.coda} leave none of "
                  f"model.blocks={model.blocks}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(_Section):
    """AdamW as published; or Muon for the matrices of the blocks (docs/theory.md section 8)."""

    name: str = "adamw"  # adamw | muon: the blocks' matrices by Muon, all else by AdamW
    lr: float = 5e-4  # peak learning rate, of AdamW
    muon_lr: float = 0.02  # peak learning rate of Muon; same schedule
    muon_rms: float = 0.0  # RMS of Muon's updates at rate 1 (.2: as AdamW's, for its rate); 0: their norm is about 1
    b1: float = 0.9  # AdamW
    b2: float = 0.99  # AdamW
    eps: float = 1e-9  # AdamW
    weight_decay: float = 0.02  # of all parameters, times the rate
    clip: float = 1.0  # global norm of the gradient
    warmup: int = 10_000  # steps
    schedule: str = "cosine"  # to final_lr x lr at the last step | wsd: constant, the last fifth linear | constant
    final_lr: float = 0.1  # of schedule=cosine, wsd, as a share of lr
    ema: float = 0.0  # decay of the average of the weights that evaluation uses; 0: none

    def check(self) -> None:
        self.among(schedule=("cosine", "wsd", "constant"), name=("adamw", "muon"))
        self.hold("must be positive", "lr", "muon_lr", "clip")
        self.need(0 <= self.ema < 1, "ema", "must lie in [0, 1); 0 is off")
        self.hold("must not be negative", "warmup")
        self.hold("must lie in [0, 1)", "b1", "b2")
        self.hold("must not be negative", "eps", "weight_decay", "final_lr", "muon_rms")


@dataclasses.dataclass(frozen=True)
class TrainConfig(_Section):
    """How long to train, on which batches, from where, and what is told meanwhile."""

    steps: int = 500_000  # optimizer steps
    batch_size: int = 512  # sequences a step, over all devices
    objective: str = "nelbo"  # nelbo | rate | count | any_order | complementary | paired; a lesson (docs/training.md)
    draft_share: float = 0.0  # of the rows: they show the run's own drafts, which it is asked to correct
    microbatches: int = 1  # gradients are summed over as many parts of the batch
    seed: int = 0  # of weights, noise and order of the rows
    log_every: int = 100  # steps between records of metrics.jsonl and lines of the log
    writers: tuple[str, ...] = ()  # of the records, beside metrics.jsonl: tensorboard, wandb (Weights & Biases)
    nonfinite_limit: int = 10  # steps whose loss or gradient is not finite are skipped; stop after more than so many
    evaluate_every: int = 0  # steps between measurements on `evaluate.rows_in_training`; 0: at the end alone
    sample_every: int = 0  # steps between two short texts for `hdlm-jax watch` (latest_samples.json); 0: never
    init_from: str = ""  # workdir of a run whose weights to start from
    adapt: bool = False  # and become another model: process, clusters, head and what a token sees are as given here
    open_steps: int = 0  # adapt: steps over which tokens come to see those behind them; 0: at once
    recluster_every: int = 0  # steps between clusterings of the words anew, by what the model has learned; 0: never
    recluster_until: int = 0  # the last step that is followed by one; 0: half of all steps

    @property
    def partners(self) -> int:
        """Rows of a batch that show one text."""
        return 2 if self.objective in ("complementary", "paired") else 1

    def reclusters(self, done: int) -> bool:
        """Whether words are clustered anew between `done` steps and the next one."""
        return (self.recluster_every > 0 and 0 < done <= (self.recluster_until or self.steps // 2)
                and done % self.recluster_every == 0)

    def check(self) -> None:
        self.among(writers=WRITERS, objective=(*OBJECTIVES, *LESSONS))
        self.hold("must be at least 1", "steps", "batch_size", "microbatches", "log_every")
        self.need(self.batch_size % self.partners == 0, "batch_size",
                  f"train.objective={self.objective!r} makes two rows of each text; give an even number")
        self.hold("must lie in [0, 1)", "draft_share")
        self.hold_seed("seed")
        self.hold("must not be negative", "nonfinite_limit", "evaluate_every", "sample_every", "open_steps",
                  "recluster_every", "recluster_until")
        self.need(not self.recluster_until or self.recluster_every > 0, "recluster_until",
                  "goes with train.recluster_every")
        self.need(self.objective not in LESSONS or bool(self.init_from), "objective",
                  "needs train.init_from, the run to start from")
        self.need(self.objective not in LESSONS or not (self.adapt or self.recluster_every), "objective",
                  "does not go with train.adapt or train.recluster_every")
        self.need(self.objective not in ASIDE or not self.sample_every, "sample_every",
                  f"train.objective={self.objective!r} trains no language model; give 0")
        self.need(not self.adapt or bool(self.init_from), "adapt", "goes with train.init_from, the run to start from")
        self.need(not self.open_steps or self.adapt, "open_steps", "goes with train.adapt")
        self.need(self.batch_size % (self.microbatches * self.partners) == 0, "microbatches",
                  f"must divide the texts of train.batch_size={self.batch_size}" if self.partners > 1 else
                  f"must divide train.batch_size={self.batch_size}")


@dataclasses.dataclass(frozen=True)
class TuneConfig(_Section):
    """Training by rewards in place of texts: rollouts by the method of `generate`, judged (docs/training.md)."""

    objective: str = ""  # score: the exact policy gradient | elbo, nodes, coupled, one_pass, spg: surrogates | "": none
    task: str = ""  # whose answers are judged; answers: prompts and right answers are those of the run's own texts
    group: int = 8  # rollouts of a prompt, a baseline for each other; train.batch_size is all of a step
    advantage: str = "mean"  # less the group's mean | leave_one_out | std, by its spread | wd1 | call, mdpo: of calls
    views: int = 0  # score: calls of a rollout that count; 0: all. elbo, nodes, spg: noise draws; 0: 1, 3, 2
    updates: int = 1  # of the weights by the same rollouts; from the second on importance ratios, clipped
    ratio: str = "call"  # of: call, all that a call drew | token, each by itself | text, its mean over tokens
    clip: float = 0.2  # ratios further from 1 than this, to the better side, have no gradient
    kl: float = 0.0  # weight of the divergence from the run in train.init_from
    cost: float = 0.0  # of each call, taken off the reward: what quality is to be paid for
    rows: int = 256  # rollouts on fixed prompts, whose mean reward tells the best checkpoint
    certainty: float = 2.0  # of train.objective=certainty: weight of the entropies
    texts: int = 4096  # of train.objective=certainty, adjust: own texts, written once

    def check(self) -> None:
        self.among(objective=("", *TUNINGS), task=("", *REWARDS, OWN_ANSWERS), ratio=("call", "token", "text"),
                   advantage=("mean", "leave_one_out", "std", "wd1", "call", "mdpo"))
        self.need(not self.objective or bool(self.task), "task", f"tune.objective={self.objective!r} needs one: choose "
                  f"{', '.join((*REWARDS, OWN_ANSWERS))}")
        self.hold("must be at least 1", "updates")
        self.hold("must be at least 1", "texts")
        for name in ("group", "rows"):
            self.need(getattr(self, name) >= 2, name, "must be at least 2")
        self.hold("must not be negative", "views", "kl", "cost", "certainty")
        self.hold("must be positive", "clip")
        self.need(self.objective in ("", "score") or self.advantage not in ("call", "mdpo"), "advantage",
                  f"is of calls, which tune.objective={self.objective!r} does not score: choose score")
        self.need(self.ratio != "text" or self.objective != "spg" and not (self.objective == "score" and self.views),
                  "ratio", "needs all that a text costs, of `elbo`, `nodes`, `coupled`, `one_pass`, or `score` with "
                  "tune.views=0: choose call or token")
        self.need(self.advantage != "mdpo" or not self.cost, "advantage",
                  f"judges texts that calls drew, which tune.cost={self.cost:g} does not reach: choose call or mean")

    def check_with(self, train: TrainConfig, data: DataConfig, optimizer: OptimizerConfig) -> None:
        """The rules between this section and others."""
        self.need(data.source != "task" or self.task in REWARDS, "task", "data.source='task' needs one that writes "
                  f"texts: choose {', '.join(REWARDS)}")
        self.need(self.task != OWN_ANSWERS or bool(data.prompt_field) and not data.features_field, "task",
                  "asks the prompts of the run's own texts: give data.prompt_field, and no data.features_field")
        if not self.objective:
            return
        self.need(bool(train.init_from), "objective", "needs train.init_from, the run to start from")
        self.need(train.batch_size % self.group == 0, "group", f"must divide train.batch_size={train.batch_size}")
        self.need(not data.features_field, "objective", "does not go with data.features_field")
        self.need(not (train.adapt or train.recluster_every or data.stream), "objective",
                  "does not go with train.adapt, train.recluster_every or data.stream")
        self.need(self.updates == 1 or optimizer.schedule == "constant", "updates",
                  "needs optimizer.schedule='constant', as schedules count steps")


@dataclasses.dataclass(frozen=True)
class ParallelConfig(_Section):
    """Shape of the device mesh; one axis may be -1, all the devices that are left."""

    data: int = -1  # axis that splits batches, weights copied
    fsdp: int = 1  # axis that splits batches and weights
    tensor: int = 1  # axis that splits products

    def check(self) -> None:
        shape = (self.data, self.fsdp, self.tensor)
        rule(all(n == -1 or n >= 1 for n in shape) and shape.count(-1) <= 1, "parallel", shape,
              "axes must be at least 1, at most one of them -1 (all devices left)")

    def shape(self, devices: int) -> tuple[int, int, int]:
        """Sizes of (data, fsdp, tensor) on so many devices."""
        shape = [self.data, self.fsdp, self.tensor]
        given = math.prod(n for n in shape if n > 0)
        shape = [devices // given if n == -1 else n for n in shape]
        rule(math.prod(shape) == devices, "parallel", (self.data, self.fsdp, self.tensor),
              f"does not multiply to the {devices} devices at hand")
        return shape[0], shape[1], shape[2]


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(_Section):
    """When the state of a training is saved."""

    every: int = 5000  # steps; measured on validation text as well, which tells the best
    minutes: float = 10.0  # since the last one: saved as it is, nothing measured; 0: by steps alone

    def check(self) -> None:
        self.hold("must be at least 1", "every")
        self.need(self.minutes >= 0, "minutes", "must not be negative; 0 is by steps alone")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(_Section):
    """The exact NELBO over the whole validation split; with `tasks`, of other texts and of answers to questions."""

    draws: int = 8  # passes over the split, each with its own noise
    batch_size: int = 0  # sequences at once; 0: as many as fit. Changes no result
    rows: int = 0  # only the first so many sequences; 0: all
    rows_in_training: int = 256  # as many (and one draw) at each train.evaluate_every
    cv2: float = 0.03  # a of the proposal q_a, the squared coefficient of variation between sequences
    checkpoint: str = "best"  # best (on validation text) | latest
    ema: bool = True  # use the average of the weights where the run keeps one
    seed: int = 0  # of the noise
    tasks: tuple[str, ...] = ()  # in place of the validation split: names of hdlm_jax.evaluation.benchmarks
    tasks_data: str = "$HDLM_DATA"  # folder of the tasks' files
    files: tuple[str, ...] = ()  # of the task 'files': any local texts, read as data.format and so on say
    lm1b: tuple[str, ...] = ()  # of the task 'lm1b': its held-out files
    protocols: tuple[str, ...] = PROTOCOLS  # of perplexities: each document by itself, all packed into windows of S
    limit: int = 0  # only the first so many documents or questions of a task; 0: all
    target_se: float = 0.25  # nats; a pilot tells how many draws make the best two answers' difference so well known
    loops: int = 0  # iterations in place of decoder.loops; 0: as many
    most_draws: int = 128  # a question's draws at the most, the pilot's (16, or `draws` if more) not counted
    exact_match: int = 0  # so many validation records are written anew, behind their prompts or features; 0: none
    decodings: tuple[str, ...] = ()  # in place of the bound: likelihoods under methods, as in 'max_prob steps=16'

    def check(self) -> None:
        self.among(checkpoint=("best", "latest"), tasks=TASKS, protocols=PROTOCOLS)
        self.hold_seed("seed")
        self.need(self.draws >= 2, "draws", "must be at least 2 (for a standard error)")
        self.need(self.batch_size >= 0, "batch_size", "must not be negative; 0 is what fits")
        self.hold("must not be negative", "rows", "exact_match", "loops")
        self.need(self.rows_in_training >= 2, "rows_in_training", "must be at least 2")
        self.need(bool(self.protocols), "protocols", f"choose of {', '.join(PROTOCOLS)}")
        self.need(not (self.tasks and self.decodings), "decodings", "are of the validation split: leave out the tasks")
        self.need(not (self.tasks and self.loops), "loops", "are of the validation split: leave out the tasks")
        for name in ("files", "lm1b"):
            self.need(name not in self.tasks or bool(getattr(self, name)), name, f"the task {name!r} needs its files")
        self.need(self.limit >= 0, "limit", "must not be negative; 0 is all")
        self.hold("must be positive", "cv2", "target_se")
        self.hold("must be at least 1", "most_draws")


@dataclasses.dataclass(frozen=True)
class GenerateConfig(_Section):
    """Which texts to draw, how, and who judges them."""

    num_samples: int = 16  # texts to draw
    length: int = 0  # tokens of a text, prompt and all; 0: model.seq_len, or drawn where training tells lengths
    method: str = "ancestral"  # how to decode: any name of hdlm_jax/decoding/presets.py (docs/decoding.md)
    options: str = ""  # of the method, as in "threshold=.8 block=16"
    steps: int = 128  # of the methods that have a number of steps
    temperature: float = 1.0  # divides log-probabilities of draws; 0 takes the likeliest
    top_p: float = 1.0  # nucleus: draws are among the fewest likeliest tokens with so much mass
    corrections: int = 0  # gidd: calls at the end that revise a word each
    correction_temperature: float = 0.1  # of those calls
    clusters: str = "exact"  # xi < 1: exact shows wrong clusters as the process does, clean never does
    prompt: str = ""  # text that every sample begins with
    features: str = ""  # .npy file [n, P, F] of what samples are written for; empty: the validation split's, in order
    stop: str = "end"  # texts are cut before the first end of text behind the prompt; "": they are not
    schema: str = ""  # file with a JSON schema: every sample is a document of it (docs/decoding.md)
    helper: str = ""  # workdir of a second run, for the methods that need one: guided, edlm, adjust
    batch_size: int = 16  # texts at once; changes no result
    trajectories: int = 4  # of so many samples every step is kept as well, for --mode=report
    checkpoint: str = "best"  # best (on validation text) | latest
    seed: int = 0  # of the noise
    channel_told: float = 0.0  # of diffusion.channel: t' + (1-t') t is told for t; above 0 it leaves the model's law
    force_transition: str = ""  # of the sampler alone: none | within | between | cavity; empty: as trained
    judge: str = ""  # scores the texts: folder of GPT-2, workdir of a run, or a fetched model (smollm2); empty: nobody
    judge_dtype: str = "float32"  # of a GPT-2 judge's products; a run judges in its own model.dtype

    def check(self) -> None:
        self.among(clusters=CLUSTERS, stop=("end", ""), judge_dtype=("float32", "bfloat16"),
                   checkpoint=("best", "latest"))
        if self.force_transition:
            self.among(force_transition=FORCE_TRANSITIONS)
        self.hold_seed("seed")
        self.hold("must be at least 1", "num_samples", "steps", "batch_size")
        for name in ("num_samples", "steps", "batch_size", "corrections"):  # the sampler counts in int32
            self.need(getattr(self, name) < 2**31, name, f"must be at most {2**31 - 1}")
        self.hold("must be positive", "correction_temperature")
        self.need(self.length >= 0, "length", "must not be negative; 0 is model.seq_len")
        self.need(self.trajectories >= 0, "trajectories", "must not be negative; 0 is none")
        self.hold("must not be negative", "corrections", "temperature")
        self.need(0 < self.top_p <= 1, "top_p", "must lie in (0, 1]")
        self.need(0 <= self.channel_told < 1, "channel_told", "must lie in [0, 1)")


@dataclasses.dataclass(frozen=True)
class ServeConfig(_Section):
    """What --mode=serve listens to, and how much it takes on (docs/serving.md)."""

    host: str = "127.0.0.1"  # address to listen at; any but this machine's own needs a token
    port: int = 8000  # also as --port=8000; 0: any that is free
    token: str = ""  # what clients send as "Authorization: Bearer TOKEN"; '$NAME' is read from the environment
    batch: int = 16  # texts of one kind (same method, options, steps) that are written at once
    queue: int = 256  # texts that may wait; more are refused (429)
    timeout: float = 120.0  # seconds that a request may take, waiting counted

    def check(self) -> None:
        self.hold("must be at least 1", "batch", "queue")
        self.hold("must be positive", "timeout")
        self.need(bool(self.host), "host", "give an address, as 127.0.0.1")
        self.need(0 <= self.port < 65536, "port", "must lie in 0..65535")


@dataclasses.dataclass(frozen=True)
class ReleasedConfig(_Section):
    """Weights of others: what --mode=import reads and --mode=export adds (docs/import.md, docs/models.md)."""

    layout: str = ""  # whose names --mode=export writes as well: mdlm | gidd | hdlm, the papers', or hub
    weights: str = ""  # a hub folder or GGUF file; of the papers .safetensors, .pt, .pth, .bin, .ckpt, .npz or a folder
    clusters: str = ""  # word -> cluster: .pt, .npy or .json
    ema: bool = True  # the averaged weights, where the file keeps both
    mask_id: int = -1  # -1: as released; V for mdlm, V + 1 for gidd and hdlm (behind a padding token)
    logits: str = ""  # of an open masked model: own | shifted (one place before); empty: as its family
    context: str = ""  # of an open masked model: full | block; empty: as its family
    first_cluster: int = -1  # -1: as released, behind words and mask
    missing: str = "refuse"  # words that the dictionary lacks: refuse | own, a cluster of their own

    def check(self) -> None:
        self.among(layout=("", "mdlm", "gidd", "hdlm", "hub"), missing=("refuse", "own"), logits=("", "own", "shifted"),
                   context=("", "full", "block"))
        for name in ("mask_id", "first_cluster"):
            self.need(getattr(self, name) >= -1, name, "must be an id, or -1")
