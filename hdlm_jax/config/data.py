"""Text, tokens and clusters: the sections data, tokenizer and hierarchy."""

from __future__ import annotations

import dataclasses
import math

from hdlm_jax.config.choices import DETOKENIZERS, FORMATS, PACKINGS, PADDINGS, TXT_DOCUMENTS
from hdlm_jax.config.rules import check_seed, choice, rule


@dataclasses.dataclass(frozen=True)
class DataConfig:
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
        choice("data.source", self.source, ("embedded", "files"))
        choice("data.format", self.format, FORMATS)
        choice("data.split", self.split, ("hash", "last"))
        choice("data.txt_documents", self.txt_documents, TXT_DOCUMENTS)
        choice("data.detokenize", self.detokenize, DETOKENIZERS)
        choice("data.packing", self.packing, PACKINGS)
        choice("data.padding", self.padding, PADDINGS)
        rule(not self.prompt_field or self.packing == "crop" or self.padding == "hidden", "data.packing", self.packing,
              "with data.prompt_field a record needs a row of its own, or the next prompt tells where a response ends: "
              "choose crop")
        rule(bool(self.files) == (self.source == "files"), "data.files", self.files,
              "needed with data.source='files', and only there")
        rule(0 < self.validation_fraction < 1, "data.validation_fraction", self.validation_fraction,
              "must lie in (0, 1)")
        rule(0 <= self.bad_share < 1, "data.bad_share", self.bad_share, "must lie in [0, 1)")
        rule(0 <= self.variable_share <= 1, "data.variable_share", self.variable_share, "must lie in [0, 1]")
        for name in ("validation_documents", "sample_bytes", "shuffle_documents"):
            rule(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "must be at least 1")
        rule(not self.stream or bool(self.validation) or self.split == "hash", "data.split", self.split,
              "data.stream does not know which documents are the last: choose hash, or give data.validation")
        self.worker()

    def worker(self) -> tuple[int, int]:
        """(i, n) of data.prepare_shard; (0, 1) where it is not given."""
        i, slash, n = (self.prepare_shard or "0/1").partition("/")
        ok = bool(slash) and i.isdigit() and n.isdigit() and int(i) < int(n)
        rule(ok, "data.prepare_shard", self.prepare_shard, "must be i/n with 0 <= i < n, as in 0/8")
        return int(i), int(n)


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """gpt2 (50,257 words, through tiktoken), bpe (trained on the corpus), bytes (257) or bert (WordPiece of a file)."""

    kind: str = "gpt2"  # gpt2 | bpe (trained on the corpus) | bytes | bert (WordPiece)
    vocab_size: int = 50257  # V, the end of text counted; 50257 for gpt2, 257 for bytes
    file: str = ""  # gpt2 without a network, bpe that is not to be trained: a local rank file; bert: its vocab.txt
    sha256: str = ""  # of that file; checked if given
    pattern: str = ""  # how bpe cuts text: gpt2 (or empty), cl100k, llama3, qwen2, o200k, or a regular expression

    def check(self) -> None:
        choice("tokenizer.kind", self.kind, ("gpt2", "bpe", "bytes", "bert"))
        rule(self.kind != "bert" or bool(self.file), "tokenizer.file", self.file,
              "tokenizer.kind='bert' needs a local vocab.txt (one word a line)")
        fixed = {"gpt2": 50257, "bytes": 257}.get(self.kind)
        rule(fixed is None or self.vocab_size == fixed, "tokenizer.vocab_size", self.vocab_size,
              f"tokenizer.kind={self.kind!r} has {fixed} words")
        rule(not self.pattern or self.kind == "bpe", "tokenizer.pattern", self.pattern,
              f"goes with tokenizer.kind='bpe'; {self.kind!r} has its own")
        rule(self.vocab_size >= 257, "tokenizer.vocab_size", self.vocab_size,
              "must be at least 257 (256 bytes and <|endoftext|>)")


@dataclasses.dataclass(frozen=True)
class HierarchyConfig:
    """Clusters of words: sizes fine to coarse, (64,) or (256, 16); (1,) or () is MDLM."""

    clusters: tuple[int, ...] = (0,)  # (0,): one level of about sqrt(V) clusters, a power of two
    embeddings: str = "corpus"  # corpus | FILE.npy | FILE.safetensors:TENSOR | checkpoint:WORKDIR
    shuffle: bool = False  # control: clusters of the same sizes with random members
    seed: int = 0  # of k-means, and of shuffle

    def check(self) -> None:
        c = self.clusters
        rule(all(n >= 1 for n in c) and all(a > b for a, b in zip(c, c[1:], strict=False)), "hierarchy.clusters", c,
              "cluster numbers must be positive and fall, fine to coarse, as in (256, 16)")
        check_seed("hierarchy.seed", self.seed, 2**31 - 1)  # faiss adds one, and has 31 bits
        e = self.embeddings
        known = e == "corpus" or e.endswith(".npy") or ".safetensors:" in e or e.startswith("checkpoint:")
        rule(known, "hierarchy.embeddings", e,
              "choose corpus, a FILE.npy, a FILE.safetensors:TENSOR or checkpoint:WORKDIR")


def default_clusters(vocab_size: int) -> tuple[int, ...]:
    """(n,), n the power of two nearest to sqrt(V) in logarithm: 64 for V = 4,096, 256 for GPT-2's 50,257."""
    return (2 ** round(math.log2(math.sqrt(vocab_size))),)
