"""Published weights from files, and as files: --mode=import, and what it adds to --mode=export (docs/import.md).

    python -m hdlm_jax.main --config=configs/released_mdlm.py --mode=import --config.released.weights=FILE
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np

import hdlm_jax
from hdlm_jax import jsons
from hdlm_jax.config import Config, ConfigError, Released
from hdlm_jax.run import parallel
from hdlm_jax.run.checkpoint import reuse, save_params, write_json
from hdlm_jax.run.interop import EMBEDDING, from_torch, heads_of, shapes, sizes, symbol_ids, to_torch
from hdlm_jax.run.metrics import say
from hdlm_jax.run.runs import check_writable
from hdlm_jax.text.hierarchy import Hierarchy
from hdlm_jax.text.tokens import make_tokenizer

_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|module)\.")  # of torch.compile and DistributedDataParallel
_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_FILES = ("model.safetensors", "pytorch_model.bin", "model.pt")  # looked for in a folder
_PLAIN = ("python -c \"import torch; c = torch.load('FILE', weights_only=False); torch.save({k: c[k] for k in "
          "('state_dict', 'ema', 'global_step') if k in c}, 'plain.pt')\"")


class File(NamedTuple):
    """state: float32 by published name; averaged: its EMA; step: of training, 0 if not told; ignored: other names."""

    state: dict[str, np.ndarray]
    averaged: bool
    step: int
    ignored: list[str]


def find(path: str) -> str:
    """The file that a path names, in a folder the first of the usual names."""
    if os.path.isdir(path):
        path = next((p for p in (os.path.join(path, name) for name in _FILES) if os.path.isfile(p)), path)
    if not os.path.isfile(path):
        raise ConfigError(f"{path}: no such file" + (f", none of {', '.join(_FILES)}" if os.path.isdir(path) else ""))
    return path


def _load_torch(path: str) -> Any:
    try:
        import torch
    except ImportError:
        raise ConfigError(f"{path}: needs PyTorch, pip install 'hdlm_jax[torch]', or the weights as .safetensors"
                          ) from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ConfigError(f"{path}: is damaged or holds Python objects beside tensors, which could run code and are "
                          f"not read. If you trust it: {_PLAIN}") from error


def _numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().float().numpy() if hasattr(tensor, "detach") else np.asarray(tensor).astype(np.float32)


def read_weights(path: str, ema: bool = True) -> File:
    """Weights of a .safetensors, .npz or PyTorch file; the average (`ema`) where MDLM's or SEDD's training kept one.

    PyTorch files are read without running what they pickle. Any prefix ("backbone.", "model.", "module.",
    "_orig_mod.") goes; what does not share the network's is listed as ignored.

    Raises:
      ConfigError: another kind of file, a package that is missing. ValueError: not these weights.
    """
    path = find(path)
    suffix = os.path.splitext(path)[1]
    found: dict[str, Any] = {}
    if suffix == ".safetensors":
        try:
            from safetensors.numpy import load_file
        except ImportError:
            raise ConfigError(f"{path}: needs safetensors, pip install 'hdlm_jax[safetensors]'") from None
        tensors: dict[str, Any] = load_file(path)
    elif suffix == ".npz":
        with np.load(path, allow_pickle=False) as data:
            tensors = dict(data)
    elif suffix in _TORCH:
        found = _load_torch(path)
        if not isinstance(found, dict):
            raise ValueError(f"{path}: must hold a dict of tensors, holds {type(found).__name__}")
        tensors = next((found[k] for k in ("state_dict", "model", "module") if isinstance(found.get(k), dict)), found)
    else:
        raise ConfigError(f"released.weights={path!r}: choose a .safetensors, .npz, {', '.join(_TORCH)} file")
    tensors = {_WRAPPERS.sub("", name): a for name, a in tensors.items() if hasattr(a, "shape")}
    prefixes = [name.removesuffix(EMBEDDING) for name in tensors if name.endswith(EMBEDDING)]
    if len(prefixes) != 1:
        raise ValueError(f"{path}: {len(prefixes)} tensors are named ...{EMBEDDING}, must be one; it holds "
                         f"{', '.join(list(tensors)[:5]) or 'no tensors'} ...")
    state = {name.removeprefix(prefixes[0]): _numpy(a) for name, a in tensors.items() if name.startswith(prefixes[0])}
    ignored = [name for name in tensors if not name.startswith(prefixes[0])]
    shadow = found["ema"].get("shadow_params") if ema and isinstance(found.get("ema"), dict) else None
    if shadow:
        want = shapes(sizes(state))
        if len(shadow) < len(want):
            raise ValueError(f"{path}: ema.shadow_params holds {len(shadow)} tensors, the network {len(want)}")
        for (name, shape), average in zip(want.items(), shadow, strict=False):
            if tuple(average.shape) != shape:
                raise ValueError(f"{path}: ema.shadow_params is {tuple(average.shape)} where {name} is {shape}")
            state[name] = _numpy(average)
    step = found.get("global_step", found.get("step", 0))
    return File(state, bool(shadow), step if isinstance(step, int) else 0, ignored)


def read_clusters(path: str, words: int, first: int, missing: str = "refuse", special: tuple[int, ...] = ()
                  ) -> Hierarchy:
    """A word -> cluster dictionary (.pt, .npy, .json) as a hierarchy.

    It is a list (by word id) or a dict of cluster numbers, counted from 0 or from `first`, the first cluster's id in
    the published vocabulary; HDLM's `noise_schedule.pt` will do. Entries behind the words (padding, mask) are dropped.

    Args:
      words: V. missing: what becomes of words that are not in it: "refuse", or "own", one more cluster.

    Raises:
      ConfigError: words are missing. ValueError: not such a dictionary, or a cluster has no words.
    """
    path = find(path)
    suffix = os.path.splitext(path)[1]
    if suffix == ".json":
        with open(path) as f:
            found = json.load(f)
    elif suffix == ".npy":
        found = np.load(path, allow_pickle=False)
    elif suffix in _TORCH:
        found = _load_torch(path)
        found = found.get("cluster_dict", found) if isinstance(found, dict) else found
    else:
        raise ConfigError(f"released.clusters={path!r}: choose a .json, .npy, {', '.join(_TORCH)} file")
    try:
        known = {int(k): int(v) for k, v in found.items()} if isinstance(found, dict) else dict(
            enumerate(int(v) for v in found))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: must be a cluster number for each word id ({error})") from None
    numbers = np.array(list(known.values()), np.int64)
    base = first if len(numbers) and numbers.min() >= words else 0
    if not len(numbers) or numbers.min() != base:
        raise ValueError(f"{path}: its clusters begin at {numbers.min() if len(numbers) else None}, must be at 0 or at "
                         f"released.first_cluster={first}")
    lacking = [word for word in range(words) if word not in known]
    if lacking and missing == "refuse":
        raise ConfigError(f"{path}: {len(lacking):,} of {words:,} words have no cluster, the first is {lacking[0]}; "
                          "released.missing='own' gives them one of their own")
    known |= dict.fromkeys(lacking, int(numbers.max()) + 1)
    parents = np.array([known[word] - base for word in range(words)], np.int32)
    return Hierarchy.from_parents([parents], num_words=words, keep_single=True, special=special)


def _sha256(path: str) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def import_released(config: Config, workdir: str) -> None:
    """Writes published weights as a workdir for evaluate, generate, export, `hdlm_jax.load` and train.init_from.

    It is laid out as an export is (config.json, params/, hierarchy.npz, tokenizer/), with released.npz beside it.
    config.json comes last: without it nothing is there, and the same command starts over.

    Raises:
      ConfigError: settings that do not go with the file, by name. ValueError: see `read_weights`, `from_torch`.
    """
    r, h = config.released, config.hierarchy
    if not (r.layout and r.weights):
        name = "weights" if r.layout else "layout"
        raise ConfigError(f"released.{name}='': --mode=import needs it; see configs/released_{r.layout or 'mdlm'}.py")
    if config.model.head != "flat":
        raise ConfigError(f"model.head={config.model.head!r}: published networks have a logit for every word, 'flat'")
    if bool(r.clusters) != (h.keep_single or max(h.clusters, default=1) > 1):
        raise ConfigError(f"released.clusters={r.clusters!r}: needed with hierarchy.clusters above 1 (or keep_single), "
                          f"and only there; it is {h.clusters}")
    check_writable(workdir)
    parallel.first(lambda: _import(config, workdir))


def _import(config: Config, workdir: str) -> None:
    r, m, t = config.released, config.model, config.tokenizer
    weights, dictionary = find(r.weights), find(r.clusters) if r.clusters else ""
    settings = jsons.plain(config.as_dict())
    made_from = {"weights": _sha256(weights), "clusters": _sha256(dictionary) if dictionary else "",
                 "settings": {name: settings[name] for name in ("tokenizer", "hierarchy", "diffusion", "model")},
                 "released": settings["released"] | {"weights": "", "clusters": ""}}
    marker = os.path.join(workdir, "config.json")
    if reuse(marker, {"made_from": made_from}) is not None:
        return say(f"import: reusing {workdir}")
    if os.path.exists(marker) or os.path.isdir(os.path.join(workdir, "checkpoints")):
        raise ConfigError(f"workdir={workdir!r}: holds a run or another import; give another --workdir")
    if t.kind == "bpe" and not t.file:
        raise ConfigError("tokenizer.file='': --mode=import needs the rank file of a trained tokenizer")
    tokenizer = make_tokenizer(t.kind, file=t.file, sha256=t.sha256, pattern=t.pattern)
    words = tokenizer.vocab_size
    hierarchy = Hierarchy.from_parents([], num_words=words, special=(tokenizer.eot,))
    if dictionary:
        mask = int(symbol_ids(r, hierarchy)[-1])
        first = max(words, mask + 1) if r.first_cluster < 0 else r.first_cluster
        hierarchy = read_clusters(dictionary, words, first, r.missing, (tokenizer.eot,))
        if hierarchy.sizes[1:-1] != config.hierarchy.clusters:
            raise ConfigError(f"hierarchy.clusters={config.hierarchy.clusters}: {dictionary} has "
                              f"{hierarchy.sizes[1]}; --config.hierarchy.clusters='({hierarchy.sizes[1]},)'")
    file = read_weights(weights, r.ema)
    s, told = sizes(file.state), heads_of(file.state, file.state[EMBEDDING].shape[1])
    found = {"width": s.width, "blocks": s.blocks} | ({"heads": told} if told else {})
    for name, value in found.items():
        if getattr(m, name) != value:
            needed = {"heads": max(1, s.width // 64)} | found  # 64 a head, as in all published sizes
            raise ConfigError(f"model.{name}={getattr(m, name)}: {weights} has {value}; give "
                              + " ".join(f"--config.model.{k}={v}" for k, v in needed.items()))
    ids = symbol_ids(r, hierarchy)
    params, rest = from_torch(file.state, hierarchy, ids, m.time_conditioning)
    about: dict[str, Any] = {
        "weights": os.path.basename(weights), "averaged": file.averaged, "ids": _vocabulary(r, ids), "cond": s.cond,
        "unused_rows": len(rest[EMBEDDING]), "unused": sorted({name.split(".")[0] for name in rest}),
        "ignored": file.ignored}
    aside = os.path.join(workdir, "import.tmp")
    shutil.rmtree(aside, ignore_errors=True)  # of an import that was interrupted
    os.makedirs(aside)
    tokenizer.save(os.path.join(aside, "tokenizer"))
    hierarchy.save(os.path.join(aside, "hierarchy.npz"), tokenizer.fingerprint, {"released": about})
    np.savez(os.path.join(aside, "released.npz"), about=np.asarray(jsons.dumps(about)), **rest)  # type: ignore[arg-type]
    save_params(os.path.join(aside, "params"), params)
    for name in os.listdir(aside):
        here = os.path.join(workdir, name)
        shutil.rmtree(here) if os.path.isdir(here) else None
        os.replace(os.path.join(aside, name), here)
    os.rmdir(aside)
    fingerprints = {"tokenizer": tokenizer.fingerprint, "hierarchy": hierarchy.fingerprint, "data": ""}
    kept = config.as_dict()
    kept["data"]["dir"] = config.data.dir and os.path.abspath(config.data.dir)
    write_json(marker, {"step": file.step, "ema": file.averaged, "fingerprints": fingerprints, "config": kept,
                        "hdlm_jax": hdlm_jax.__version__, "released": about, "made_from": made_from})
    count = sum(math.prod(a.shape) for a in jax.tree.leaves(params))
    told_heads = f"{m.heads} heads" + ("" if told else " (as set; the file does not tell)")
    say(f"import: {count:,} parameters{' (averaged)' if file.averaged else ''} of {weights}, step {file.step:,}: width "
        f"{s.width}, {s.blocks} blocks, {told_heads}; levels {' -> '.join(map(str, hierarchy.sizes))}, in {workdir}")
    say(f"import: unused and kept in released.npz: {about['unused_rows']} of {s.rows} rows of the tables, "
        f"{', '.join(n for n in about['unused'] if n not in ('vocab_embed', 'output_layer')) or 'no other tensors'}"
        + (f"; ignored: {', '.join(file.ignored[:5])}{' ...' if file.ignored[5:] else ''}" if file.ignored else ""))


def _vocabulary(released: Released, ids: np.ndarray) -> list[Any]:
    return [released.layout, hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()]


def check_trainable(workdir: str) -> None:
    """ConfigError for a workdir that holds imported or exported weights: training would mix with them."""
    if os.path.isdir(os.path.join(workdir, "params")):
        raise ConfigError(f"workdir={workdir!r}: holds imported or exported weights; train in another --workdir with "
                          f"--config.train.init_from={workdir}")


def check_exportable(trained: Config) -> None:
    """ConfigError for a run whose network is not the published one."""
    if trained.model.head != "flat":
        raise ConfigError(f"released.layout: this run has model.head={trained.model.head!r}; the published network has "
                          "a logit for every word, 'flat'")
    if getattr(trained.diffusion, "process", "") == "autoregressive":
        raise ConfigError("released.layout: this run is autoregressive; the published network sees both sides")


def published(config: Config, trained: Config, workdir: str, hierarchy: Hierarchy, params: dict[str, Any]
             ) -> dict[str, np.ndarray]:
    """Published weights of a run in the layout config.released asks for, with what its import left over, if any.

    The import is that of the workdir itself, or of the one it was fine-tuned from (train.init_from).
    """
    ids = symbol_ids(config.released, hierarchy)
    extra: dict[str, Any] = {}
    for folder in filter(None, (workdir, trained.train.init_from)):
        path = os.path.join(folder, "released.npz")
        if not extra and os.path.exists(path):
            with np.load(path, allow_pickle=False) as data:
                rest = dict(data)
            about = json.loads(str(rest.pop("about")))
            if about["ids"] == _vocabulary(config.released, ids):
                extra = {"rest": rest, "cond": about["cond"]}
    return to_torch(params, hierarchy, ids, config.released.layout, trained.model.heads, trained.model.seq_len, **extra)
