"""What has to hold before any work, and the stages before training, each idempotent: prepare and cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hdlm_jax.common import processes
from hdlm_jax.common.console import say
from hdlm_jax.common.jsons import open_atomic
from hdlm_jax.config import Config, ConfigError, DataConfig, TokenizerConfig, resolve
from hdlm_jax.config.settings import Given
from hdlm_jax.data import cluster_report, clustering, embeddings, examples, groups, pipeline, tokenizers
from hdlm_jax.data import prepare as text_prepare
from hdlm_jax.data.records import Document, digest, is_validation
from hdlm_jax.decoding import presets
from hdlm_jax.diffusion.hierarchy import Hierarchy, read_extra
from hdlm_jax.evaluation import likelihood
from hdlm_jax.training.loading import checkpoint_embedding, data_dir, file_of, hierarchy_file, learned_file
from hdlm_jax.tuning.tasks import PROMPT, TASKS, TEXT, write_texts


def checked(given: Given) -> Config:
    """config.resolve, and what only the rooms above the settings know: methods' options, expressions that cut text.

    Raises:
      ConfigError: unknown names, wrong types, broken rules.
    """
    found = resolve(given)
    presets.check(found.generate)
    likelihood.check(found.evaluate)
    try:
        tokenizers.cutting_pattern(found.tokenizer.pattern)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return found


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """Prepared text: where it lies, what it holds, and its tokenizer."""

    dir: str
    manifest: text_prepare.Manifest
    tokenizer: tokenizers.Tokenizer

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """How often each word is a scored token of the training split, int64 [V]."""
        return text_prepare.token_counts(self.dir, "train")


_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextlib.contextmanager
def writing(config: Config, workdir: str) -> Iterator[None]:
    """A folder of tokens that cannot be written, in one line (ConfigError) with its setting and what to do."""
    name, folder = ("data.dir", config.data.dir) if config.data.dir else ("workdir", workdir)
    try:
        yield
    except OSError as error:
        if error.errno not in _READ_ONLY or str(Path(folder)) not in str(error):  # else it is of what is read
            raise
        raise ConfigError(f"{name}={folder!r} cannot be written ({os.strerror(error.errno)}), and its tokens are not "
                          f"whole: give another {name}, or prepare them where it can be written") from error


def make_tokens(config: Config, workdir: str) -> str | None:
    """Tokens under data.dir (default <workdir>/data), made, finished or reused by process 0: their fingerprint.

    None where other workers of data.prepare_shard have yet to do their part (said).
    """
    folder = data_dir(config, workdir)

    def make() -> str | None:
        if not os.path.exists(os.path.join(folder, text_prepare.MANIFEST)):
            check_base(config)
        with writing(config, workdir):
            manifest = text_prepare.prepare(folder, _data_of(config, folder), _tokenizer_of(config, folder), say=say)
        return manifest.fingerprint if manifest else None

    return processes.on_main_process(make)


def _data_of(config: Config, folder: str) -> DataConfig:
    """The settings of the texts; with data.source='task' or an example those that are written into the folder."""
    if config.data.source in examples.EXAMPLES:
        for name, has in zip(("features_field", "prompt_field"), examples.given(config.data.source), strict=True):
            if (asked := dataclasses.asdict(config.data)[name]) != has:
                raise ConfigError(f"data.{name}={asked!r}: must be {has!r} for data.source={config.data.source!r}")
        train, valid = examples.write(config.data.source, folder)
        return dataclasses.replace(config.data, source="files", files=(train,), validation=(valid,),
                                   text_field=examples.TEXT)
    if config.data.source != "task":
        return config.data
    if config.data.prompt_field != PROMPT:
        raise ConfigError(f"data.prompt_field={config.data.prompt_field!r}: texts of data.source='task' have their "
                          f"prompt in {PROMPT!r}")
    task = TASKS[config.tune.task]
    return dataclasses.replace(config.data, source="files", files=(write_texts(task, folder),), text_field=TEXT)


def check_base(config: Config) -> None:
    """ConfigError where train.init_from names no run, which matters as long as something is still to come from it."""
    base = config.train.init_from
    if base and not os.path.exists(os.path.join(base, "config.json")):
        raise ConfigError(f"train.init_from={base!r}: no run there (no config.json)")


def _tokenizer_of(config: Config, folder: str) -> TokenizerConfig:
    """The settings of the tokenizer; with train.init_from that run's words and way to cut text, as its weights mean.

    folder: of prepared tokens, which know the way if the base run is gone.
    """
    words, base = config.tokenizer, config.train.init_from
    if not base or words.kind not in ("gpt2", "bpe", "hub"):
        return words
    if words.kind == "hub":
        return dataclasses.replace(words, file=os.path.join(base, "tokenizer"), sha256="")
    words = dataclasses.replace(words, file=os.path.join(base, "tokenizer", tokenizers.RANK_FILE), sha256="")
    known = [path for path in (os.path.join(base, "tokenizer"), folder)
             if os.path.exists(os.path.join(path, tokenizers.JSON_FILE))]
    if not known or words.kind == "gpt2":
        return words
    pattern = tokenizers.load_tokenizer(known[0]).pattern
    if words.pattern and tokenizers.cutting_pattern(words.pattern) != pattern:
        raise ConfigError(f"tokenizer.pattern={words.pattern!r}: the run in train.init_from={base!r} cuts text by "
                          f"{pattern!r}; leave it out")
    return dataclasses.replace(words, pattern=pattern)


def prepare(config: Config, workdir: str) -> PreparedData:
    """The tokens, for what needs all of them.

    Raises:
      ConfigError: other workers have yet to do their part, or processes do not see one folder.
    """
    folder, made = data_dir(config, workdir), make_tokens(config, workdir)
    if made is None:
        raise ConfigError(f"data.prepare_shard={config.data.prepare_shard!r}: other workers have not done their part "
                          f"of {folder}; run --mode=prepare as each of them first")
    manifest = None
    with contextlib.suppress(ValueError):
        manifest = text_prepare.load_manifest(folder)
    if manifest is None or manifest.fingerprint != made:
        raise ConfigError(f"data.dir: process {jax.process_index()} does not find the tokens of process 0 in {folder}; "
                          "data.dir and --workdir must lie on storage that all processes share")
    return PreparedData(folder, manifest, tokenizers.load_tokenizer(folder))


def word_vectors(config: Config, workdir: str, text: PreparedData) -> np.ndarray:
    """Embeddings the words are clustered by, float32 [V, E]; those of the corpus (of which there are none else for
    clusters by frequency or bigrams) are kept beside its tokens, or in the workdir where these cannot be written.

    All processes have to ask for them together.
    """
    h = config.hierarchy
    name = f"embeddings-{text.manifest.fingerprint[:12]}-{h.seed}.npy"

    def keep() -> str:
        places = [os.path.join(folder, name) for folder in (text.dir, workdir)]
        if there := next(filter(os.path.exists, places), ""):
            say(f"embeddings: reusing {there}")
            return there
        tokens = pipeline.Split(text.dir, text.manifest, "train")
        found = embeddings.corpus_embeddings(tokens, text.manifest.vocab_size, eot=text.manifest.eot, seed=h.seed)
        for place in places:
            try:
                with open_atomic(place) as file:
                    np.save(file, found)
                break
            except OSError as error:
                if error.errno not in _READ_ONLY or place == places[-1]:
                    raise
                say(f"embeddings: {place} cannot be written ({error.strerror}), so they are in {places[-1]}")
        return place

    if h.embeddings != "corpus" and h.embeddings not in groups.GROUPINGS:
        return embeddings.given_embeddings(h.embeddings, text.manifest.vocab_size, checkpoint_embedding)
    return np.load(processes.on_main_process(keep), allow_pickle=False)


def cluster(config: Config, workdir: str, text: PreparedData) -> Hierarchy:
    """The hierarchy in <workdir>/hierarchy.npz, made (by process 0) or reused, with its report and picture beside it.

    Raises:
      ConfigError: the one there was made with other settings.
    """
    path = os.path.join(workdir, "hierarchy.npz")
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config.hierarchy).items()}
    settings |= {"data": text.manifest.fingerprint, "init_from": config.train.init_from}
    if not processes.on_main_process(lambda: _found(config, text, path, settings)):
        some = max(*config.hierarchy.clusters, config.hierarchy.head_clusters, 1) > 1
        vectors = word_vectors(config, workdir, text) if some else None
        processes.on_main_process(lambda: _make(config, text, path, settings, vectors))
    return Hierarchy.load(path, text.tokenizer.fingerprint)


def _levels(hierarchy: Hierarchy) -> str:
    own = "" if hierarchy.classes is None else f", {hierarchy.of_head.sizes[1]} classes of the head"
    return f"levels {' -> '.join(map(str, hierarchy.sizes))}{own}"


def _found(config: Config, text: PreparedData, path: str, settings: dict) -> bool:
    """Whether the hierarchy is there, or can be taken over from another run."""
    if os.path.exists(path):
        made = {"head_clusters": 0} | read_extra(path).get("settings", {})
        for name, value in settings.items():
            if made.get(name) != value:
                raise ConfigError(f"hierarchy.{name}={value!r}: {path} was made with {made.get(name)!r}; "
                                  "use another --workdir or remove that file")
        say(f"hierarchy: reusing {path}, {_levels(Hierarchy.load(path, text.tokenizer.fingerprint))}")
        return True
    if config.train.init_from and not config.train.adapt:  # its cluster ids are what the weights mean
        check_base(config)
        theirs = hierarchy_file(config.train.init_from)
        hierarchy = Hierarchy.load(theirs, text.tokenizer.fingerprint)
        hierarchy.save(path, text.tokenizer.fingerprint, {"settings": settings})
        say(f"hierarchy: that of {theirs}, {_levels(hierarchy)}")
        return True
    if max(config.hierarchy.clusters, default=1) > text.manifest.vocab_size:
        raise ConfigError(f"hierarchy.clusters={config.hierarchy.clusters!r}: more clusters than the tokenizer's "
                          f"{text.manifest.vocab_size} words")
    return False


def _make(config: Config, text: PreparedData, path: str, settings: dict, vectors: np.ndarray | None) -> None:
    h = config.hierarchy
    report: dict = {}
    made = " (MDLM)"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if vectors is None:
        hierarchy = Hierarchy.from_parents([], vocab_size=text.manifest.vocab_size)
    else:
        vectors = _read_ones(vectors, text)
        group, known = groups.GROUPINGS.get(h.embeddings), vectors
        if h.embeddings == "frequency":
            known = text.counts[:, None]
        elif h.embeddings == "brown":
            tokens = pipeline.Split(text.dir, text.manifest, "train")
            known = embeddings.cooccurrence(tokens, text.manifest.vocab_size, eot=text.manifest.eot, window=1)
        hierarchy, report = clustering.build_hierarchy(known, (h.head_clusters,) if h.head_clusters else h.clusters,
                                                       special=(text.manifest.eot,), seed=h.seed, shuffle=h.shuffle,
                                                       group=group)
        readable = os.path.join(os.path.dirname(path), "clusters")
        cluster_report.write_report(hierarchy, vectors, text.tokenizer.decode, text.counts, readable)
        made = f", report in {readable}.txt"
        if h.head_clusters:
            hierarchy = Hierarchy.from_parents([], text.manifest.vocab_size, classes=hierarchy.anc[1])
    hierarchy.save(path, text.tokenizer.fingerprint, {"settings": settings, "report": report})
    say(f"hierarchy: {_levels(hierarchy)}{made}")


def _read_ones(vectors: np.ndarray, text: PreparedData) -> np.ndarray:
    """Vectors with zeros for what no text has: open models' rows of such tokens are alike, and would be a cluster."""
    vectors = vectors.copy()
    vectors[[i for i in text.tokenizer.special.values() if i != text.manifest.eot]] = 0
    return vectors


def recluster(config: Config, workdir: str, text: PreparedData, hierarchy: Hierarchy, vectors: np.ndarray,
              step: int) -> Hierarchy:
    """The hierarchy with words clustered anew (made by process 0) by the vectors [V, E] of a model of `step` steps; in
    a file of its own beside the first one, before any checkpoint that needs it."""
    def make() -> str:
        found = clustering.reclustered(_read_ones(vectors, text), hierarchy, text.counts, seed=config.hierarchy.seed)
        if found != hierarchy:
            found.save(learned_file(workdir, found.fingerprint), text.tokenizer.fingerprint,
                       {"step": step, "from": hierarchy.fingerprint})
        return file_of(workdir, found.fingerprint)

    return Hierarchy.load(processes.on_main_process(make), text.tokenizer.fingerprint)


def batches_of(config: Config, text: PreparedData) -> Any:
    """Training batches of this process: of the prepared tokens, or of the raw documents with data.stream."""
    d, partners = config.data, config.train.partners
    how: dict[str, Any] = dict(
        seq_len=config.model.seq_len, batch_size=config.train.batch_size // partners, seed=config.train.seed,
        process_index=jax.process_index(), process_count=jax.process_count(), packing=d.packing,
        padding=d.padding, variable_share=d.variable_share, partners=partners)
    if not d.stream:
        return pipeline.TrainBatches(text.dir, read_threads=d.read_threads, **how)
    reader, train, valid = text_prepare.what_to_read(d)
    held = text_prepare.held_out(reader, valid)

    def is_training(document: Document) -> bool:
        return digest(document) not in held if valid else not is_validation(document, d.validation_fraction)

    return pipeline.StreamBatches(reader, train, text.tokenizer, is_training,
                                  shuffle_documents=d.shuffle_documents, bad_share=d.bad_share, say=say, **how)
