"""The stages before training, each idempotent: prepare (text -> tokens) and cluster (words -> hierarchy)."""

from __future__ import annotations

import dataclasses
import os

import numpy as np

from hdlm_jax.config import Config, ConfigError
from hdlm_jax.run.metrics import say
from hdlm_jax.text import clusters, pipeline, tokens
from hdlm_jax.text.hierarchy import Hierarchy, read_extra


@dataclasses.dataclass(frozen=True)
class Text:
    """Prepared text: where it lies, what it holds, and its tokenizer."""

    dir: str
    manifest: pipeline.Manifest
    tokenizer: tokens.Tokenizer


def data_dir(config: Config, workdir: str) -> str:
    return config.data.dir or os.path.join(workdir, "data")


def prepare(config: Config, workdir: str) -> Text:
    """Tokens under data.dir (default <workdir>/data), made or reused."""
    d, t = config.data, config.tokenizer
    folder = data_dir(config, workdir)
    file = t.file
    if config.train.init_from and t.kind != "bytes":  # another run's weights speak that run's words
        file = os.path.join(config.train.init_from, "tokenizer", tokens.RANK_FILE)
    manifest = pipeline.prepare(
        folder, source=d.source, files=d.files, text_field=d.text_field, prompt_field=d.prompt_field,
        txt_documents=d.txt_documents, validation=d.validation, validation_fraction=d.validation_fraction,
        tokenizer_kind=t.kind, vocab_size=t.vocab_size, tokenizer_file=file, tokenizer_sha256=t.sha256, say=say,
    )
    return Text(folder, manifest, tokens.load_tokenizer(folder))


def word_vectors(config: Config, text: Text) -> np.ndarray:
    """Embeddings the words are clustered by, float32 [V, E]; those of the corpus are kept beside its tokens."""
    h = config.hierarchy
    kept = os.path.join(text.dir, f"embeddings-{text.manifest.fingerprint[:12]}-{h.seed}.npy")
    if h.embeddings == "corpus" and os.path.exists(kept):
        say(f"embeddings: reusing {kept}")
        return np.load(kept, allow_pickle=False)
    from hdlm_jax.run.api import checkpoint_embedding

    vectors = clusters.embeddings(h.embeddings, vocab_size=text.manifest.vocab_size, eot=text.manifest.eot, seed=h.seed,
                                  tokens=pipeline.read_tokens(text.dir) if h.embeddings == "corpus" else None,
                                  load_checkpoint_embedding=checkpoint_embedding)
    if h.embeddings == "corpus":
        aside = f"{kept}.{os.getpid()}.tmp.npy"
        np.save(aside, vectors)
        os.replace(aside, kept)
    return vectors


def cluster(config: Config, workdir: str, text: Text) -> Hierarchy:
    """The hierarchy in <workdir>/hierarchy.npz, made or reused, with its report and picture beside it.

    Raises:
      ConfigError: the one there was made with other settings.
    """
    path = os.path.join(workdir, "hierarchy.npz")
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config.hierarchy).items()}
    settings |= {"data": text.manifest.fingerprint, "init_from": config.train.init_from}
    if os.path.exists(path):
        made = read_extra(path).get("settings", {})
        for name, value in settings.items():
            if made.get(name) != value:
                raise ConfigError(f"hierarchy.{name}={value!r}: {path} was made with {made.get(name)!r}; "
                                  "use another --workdir or remove that file")
        hierarchy = Hierarchy.load(path, text.tokenizer.fingerprint)
        say(f"hierarchy: reusing {path}, levels {' -> '.join(map(str, hierarchy.sizes))}")
        return hierarchy
    if config.train.init_from:  # its cluster ids are what the weights mean
        theirs = os.path.join(config.train.init_from, "hierarchy.npz")
        hierarchy = Hierarchy.load(theirs, text.tokenizer.fingerprint)
        hierarchy.save(path, text.tokenizer.fingerprint, {"settings": settings})
        say(f"hierarchy: that of {theirs}, levels {' -> '.join(map(str, hierarchy.sizes))}")
        return hierarchy
    h, words = config.hierarchy, text.manifest.vocab_size
    vectors: np.ndarray | None = None
    report: dict = {}
    if max(h.clusters, default=1) > words:
        raise ConfigError(f"hierarchy.clusters={h.clusters!r}: more clusters than the tokenizer's {words} words")
    if max(h.clusters, default=1) == 1:
        parents = [np.zeros(words, np.int32)] if h.keep_single and h.clusters else []
        hierarchy = Hierarchy.from_parents(parents, num_words=words, keep_single=h.keep_single)
    else:
        vectors = word_vectors(config, text)
        hierarchy, report = clusters.build_hierarchy(vectors, h.clusters, special=(text.manifest.eot,), seed=h.seed,
                                                     shuffle=h.shuffle)
    os.makedirs(workdir, exist_ok=True)
    if vectors is not None:
        counts = np.bincount(pipeline.read_tokens(text.dir), minlength=words)
        clusters.write_report(hierarchy, vectors, text.tokenizer.decode, counts, os.path.join(workdir, "clusters"))
    hierarchy.save(path, text.tokenizer.fingerprint, {"settings": settings, "report": report})
    made = f", report in {os.path.join(workdir, 'clusters.txt')}" if vectors is not None else " (MDLM)"
    say(f"hierarchy: levels {' -> '.join(map(str, hierarchy.sizes))}{made}")
    return hierarchy
