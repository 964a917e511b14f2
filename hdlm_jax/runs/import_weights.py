"""Published weights from files, and as files: --mode=import, and what it adds to --mode=export (docs/import.md).

    python -m hdlm_jax.main --config=configs/released_mdlm.py --mode=import --config.released.weights=FILE
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from typing import Any

import jax
import numpy as np

import hdlm_jax
from hdlm_jax.common import jsons, processes
from hdlm_jax.common.console import say
from hdlm_jax.common.jsons import reuse, sha256_of, write_json
from hdlm_jax.config import Config, ConfigError, ReleasedConfig
from hdlm_jax.data.tokenizers import Tokenizer, make_tokenizer
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.models import interop
from hdlm_jax.models.families import is_open
from hdlm_jax.models.interop import EMBEDDING, state_ids
from hdlm_jax.models.weight_files import find, read_clusters
from hdlm_jax.runs import open_weights
from hdlm_jax.training.checkpoint import save_params
from hdlm_jax.training.loading import check_writable


def import_released(config: Config, workdir: str) -> None:
    """Writes published weights as a workdir for evaluate, generate, export, `hdlm_jax.load` and train.init_from.

    It is laid out as an export is (config.json, params/, hierarchy.npz, tokenizer/), with released.npz beside it.
    config.json comes last: without it nothing is there, and the same command starts over.

    Raises:
      ConfigError: settings that do not go with the file, by name. ValueError: see `read_weights`, `from_torch`.
    """
    r, h = config.released, config.hierarchy
    if r.weights and is_open(r.weights):
        return open_weights.import_open(config, workdir)
    if not (r.layout and r.weights):
        name = "weights" if r.layout else "layout"
        raise ConfigError(f"released.{name}='': --mode=import needs it; see configs/released_{r.layout or 'mdlm'}.py; "
                          "for an open model give released.weights its folder with a config.json, or its GGUF file")
    if config.model.head != "flat":
        raise ConfigError(f"model.head={config.model.head!r}: published networks have a logit for every word, 'flat'")
    if config.model.tied:
        raise ConfigError("model.tied=True: published networks have a head of their own; give False")
    if bool(r.clusters) != (max(h.clusters, default=1) > 1) and not (r.clusters and r.layout == "hdlm"):
        raise ConfigError(f"released.clusters={r.clusters!r}: needed with hierarchy.clusters above 1, and only there; "
                          f"it is {h.clusters}")
    check_writable(workdir)
    processes.on_main_process(lambda: _import(config, workdir))


def _import(config: Config, workdir: str) -> None:
    r, m = config.released, config.model
    weights, dictionary = find(r.weights), find(r.clusters) if r.clusters else ""
    settings = jsons.plain(config.as_dict())
    made_from = {"weights": sha256_of(weights), "clusters": sha256_of(dictionary) if dictionary else "",
                 "settings": {name: settings[name] for name in ("tokenizer", "hierarchy", "diffusion", "model")},
                 "released": settings["released"] | {"weights": "", "clusters": ""}}
    marker = os.path.join(workdir, "config.json")
    if reuse(marker, {"made_from": made_from}) is not None:
        return say(f"import: reusing {workdir}")
    if os.path.exists(marker) or os.path.isdir(os.path.join(workdir, "checkpoints")):
        raise ConfigError(f"workdir={workdir!r}: holds a run or another import; give another --workdir")
    tokenizer, hierarchy = _words(config, dictionary)
    file = interop.read_weights(weights, r.ema)
    size = interop.sizes(file.state)
    told = interop.heads_of(file.state, size.width)
    _check_size(config, size, told, weights)
    ids = state_ids(r, hierarchy)
    params, rest = interop.from_torch(file.state, hierarchy, ids, m.time_conditioning)
    about: dict[str, Any] = {
        "weights": os.path.basename(weights), "averaged": file.averaged, "ids": _vocabulary(r, ids), "cond": size.cond,
        "unused_rows": len(rest[EMBEDDING]), "unused": sorted({name.split(".")[0] for name in rest}),
        "ignored": file.ignored}
    aside = os.path.join(workdir, "import.tmp")
    shutil.rmtree(aside, ignore_errors=True)  # of an import that was interrupted
    os.makedirs(aside)
    tokenizer.save(os.path.join(aside, "tokenizer"))
    hierarchy.save(os.path.join(aside, "hierarchy.npz"), tokenizer.fingerprint, {"released": about})
    jsons.write_arrays(os.path.join(aside, "released.npz"), {"about": np.asarray(jsons.dumps(about)), **rest})
    save_params(os.path.join(aside, "params"), params)
    jsons.move_into(aside, workdir)
    fingerprints = {"tokenizer": tokenizer.fingerprint, "hierarchy": hierarchy.fingerprint, "data": ""}
    write_json(marker, {"step": file.step, "ema": file.averaged, "fingerprints": fingerprints,
                        "config": config.to_save(), "hdlm_jax": hdlm_jax.__version__, "released": about,
                        "made_from": made_from})
    count = sum(math.prod(a.shape) for a in jax.tree.leaves(params))
    told_heads = f"{m.heads} heads" + ("" if told else " (as set; the file does not tell)")
    say(f"import: {count:,} parameters{' (averaged)' if file.averaged else ''} of {weights}, step {file.step:,}: width "
        f"{size.width}, {size.blocks} blocks, {told_heads}; levels {' -> '.join(map(str, hierarchy.sizes))}, in "
        f"{workdir}")
    say(f"import: unused and kept in released.npz: {about['unused_rows']} of {size.rows} rows of the tables, "
        f"{', '.join(n for n in about['unused'] if n not in ('vocab_embed', 'output_layer')) or 'no other tensors'}"
        + (f"; ignored: {', '.join(file.ignored[:5])}{' ...' if file.ignored[5:] else ''}" if file.ignored else ""))


def _words(config: Config, dictionary: str) -> tuple[Tokenizer, Hierarchy]:
    """The tokenizer of the settings, and the hierarchy of its words that the dictionary of clusters tells, if any."""
    r, t = config.released, config.tokenizer
    if t.kind == "bpe" and not t.file:
        raise ConfigError("tokenizer.file='': --mode=import needs the rank file of a trained tokenizer")
    tokenizer = make_tokenizer(t.kind, file=t.file, sha256=t.sha256, pattern=t.pattern)
    words = tokenizer.vocab_size
    hierarchy = Hierarchy.from_parents([], vocab_size=words, special=(tokenizer.eot,))
    if dictionary:
        mask = int(state_ids(r, hierarchy)[-1])
        first = max(words, mask + 1) if r.first_cluster < 0 else r.first_cluster
        hierarchy = read_clusters(dictionary, words, first, r.missing, (tokenizer.eot,))
        if hierarchy.sizes[1:-1] != config.hierarchy.clusters:
            raise ConfigError(f"hierarchy.clusters={config.hierarchy.clusters}: {dictionary} has "
                              f"{hierarchy.sizes[1]}; --config.hierarchy.clusters='({hierarchy.sizes[1]},)'")
    return tokenizer, hierarchy


def _check_size(config: Config, s: interop.Sizes, told: int | None, weights: str) -> None:
    """ConfigError, with the settings to give, unless config.model has the file's sizes (and heads, if it tells)."""
    found = {"width": s.width, "blocks": s.blocks} | ({"heads": told} if told else {})
    for name, value in found.items():
        if getattr(config.model, name) != value:
            needed = {"heads": max(1, s.width // 64)} | found  # 64 a head, as in all published sizes
            raise ConfigError(f"model.{name}={getattr(config.model, name)}: {weights} has {value}; give "
                              + " ".join(f"--config.model.{k}={v}" for k, v in needed.items()))


def _vocabulary(released: ReleasedConfig, ids: np.ndarray) -> list[Any]:
    return [released.layout, hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()]


def check_trainable(workdir: str) -> None:
    """ConfigError for a workdir that holds imported or exported weights: training would mix with them."""
    if os.path.isdir(os.path.join(workdir, "params")):
        raise ConfigError(f"workdir={workdir!r}: holds imported or exported weights; train in another --workdir with "
                          f"--config.train.init_from={workdir}")


def check_exportable(trained: Config) -> None:
    """ConfigError for a run whose network is not the published one."""
    if trained.data.features_field:
        raise ConfigError("released.layout: this run is given features; the published network knows none")
    if trained.model.head != "flat":
        raise ConfigError(f"released.layout: this run has model.head={trained.model.head!r}; the published network has "
                          "a logit for every word, 'flat'")
    if trained.hierarchy.map != "hard":
        raise ConfigError(f"released.layout: this run has hierarchy.map={trained.hierarchy.map!r}; the published "
                          "network has no place for it, 'hard' alone")
    for name in ("channel", "latents"):
        if value := getattr(trained.diffusion, name):
            raise ConfigError(f"released.layout: this run has diffusion.{name}={value:g}; the published network sees "
                              "symbols alone")
    if trained.diffusion.process == "autoregressive":
        raise ConfigError("released.layout: this run is autoregressive; the published network sees both sides")


def published(config: Config, trained: Config, workdir: str, hierarchy: Hierarchy, params: dict[str, Any]
             ) -> dict[str, np.ndarray]:
    """Published weights of a run in the layout config.released asks for, with what its import left over, if any.

    The import is that of the workdir itself, or of the one it was fine-tuned from (train.init_from).
    """
    ids = state_ids(config.released, hierarchy)
    extra: dict[str, Any] = {}
    for folder in filter(None, (workdir, trained.train.init_from)):
        path = os.path.join(folder, "released.npz")
        if not extra and os.path.exists(path):
            with np.load(path, allow_pickle=False) as data:
                rest = dict(data)
            about = json.loads(str(rest.pop("about")))
            if about["ids"] == _vocabulary(config.released, ids):
                extra = {"rest": rest, "cond": about["cond"]}
    m = trained.model
    return interop.to_torch(params, hierarchy, ids, config.released.layout, m.heads, m.seq_len, **extra)
