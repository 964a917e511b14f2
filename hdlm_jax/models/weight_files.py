"""Weight files of other code: which one a folder holds, and its arrays."""

from __future__ import annotations

import json
import os
import pickle
import re
from typing import Any, NamedTuple

import numpy as np

from hdlm_jax.config import ConfigError
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.models.interop import EMBEDDING, shapes, sizes

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
    return Hierarchy.from_parents([parents], vocab_size=words, keep_single=True, special=special)
