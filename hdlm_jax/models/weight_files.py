"""Weights of other code: tensors by name from its files, and the place of each among our parameters.

An open network is a table of its tensors: `places` says where each belongs and which shape it has, `check` compares
that with what is there, `load` makes our parameters of it and `dump` goes back. interop.py and gpt2.py are two.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from hdlm_jax.common.jsons import read_json, sha256_of
from hdlm_jax.config import ConfigError
from hdlm_jax.diffusion.hierarchy import Hierarchy

_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_FILES = ("model.safetensors", "pytorch_model.bin", "model.pt")  # looked for in a folder
_INDEX = "model.safetensors.index.json"
_PLAIN = ("python -c \"import torch; c = torch.load('FILE', weights_only=False); torch.save({k: c[k] for k in "
          "('state_dict', 'ema', 'global_step') if k in c}, 'plain.pt')\"")
Params: TypeAlias = dict[str, Any]  # nested: arrays by name


class Tensor(NamedTuple):
    """A tensor of a file: its shape, what reads it as float32 (exact for float16 and bfloat16), and its type there."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    dtype: str = "F32"


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


def as_numpy(tensor: Any) -> np.ndarray:
    """float32, of numpy or PyTorch."""
    return tensor.detach().float().numpy() if hasattr(tensor, "detach") else np.asarray(tensor).astype(np.float32)


def open_safetensors(paths: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of .safetensors files by name; nothing but their headers is read yet."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ConfigError(f"{', '.join(paths)}: needs safetensors, pip install 'hdlm_jax[safetensors]'") from None
    out: dict[str, Tensor] = {}
    for path in paths:
        try:
            file = safe_open(path, framework="np")
            for name in file.keys():
                if name in out:
                    raise ValueError(f"{path}: tensor {name!r} is there twice")
                part = file.get_slice(name)
                read = functools.partial(_read_tensor, path, name)
                out[name] = Tensor(tuple(part.get_shape()), read, part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: no safetensors file, or damaged ({error})") from None
    return out


def _read_tensor(path: str, name: str) -> np.ndarray:
    """float32; the file is opened anew, so that what was read before does not stay in memory."""
    from safetensors import safe_open
    with safe_open(path, framework="np") as file:
        return as_numpy(file.get_tensor(name))


def read_file(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, what else a PyTorch checkpoint holds) of a .safetensors, .npz or PyTorch file.

    PyTorch files are read without running what they pickle.

    Raises:
      ConfigError: another kind of file, a package that is missing. ValueError: nothing of the kind in it.
    """
    suffix, found = os.path.splitext(path)[1], {}
    if suffix == ".safetensors":
        return open_safetensors([path]), {}
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as data:
            tensors: dict[str, Any] = dict(data)
    elif suffix in _TORCH:
        found = _load_torch(path)
        if not isinstance(found, dict):
            raise ValueError(f"{path}: must hold a dict of tensors, holds {type(found).__name__}")
        tensors = next((found[k] for k in ("state_dict", "model", "module") if isinstance(found.get(k), dict)), found)
    else:
        raise ConfigError(f"released.weights={path!r}: choose a .safetensors, .npz, {', '.join(_TORCH)} file")
    return {name: Tensor(tuple(a.shape), functools.partial(as_numpy, a))
            for name, a in tensors.items() if hasattr(a, "shape")}, found


def hub_files(folder: str) -> list[str]:
    """Paths of the weights in a folder of the Hugging Face hub, sorted by name: one file, or the shards of an index.

    ValueError where there are none or a shard is missing.
    """
    single, index = os.path.join(folder, _FILES[0]), os.path.join(folder, _INDEX)
    paths = [single]
    if os.path.exists(index):
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{index}: has no weight_map")
        paths = [os.path.join(folder, name) for name in sorted(set(shards.values()))]
    elif not os.path.exists(single):
        raise ValueError(f"{folder}: neither {_FILES[0]} nor {_INDEX} is there; weights of another format have to be "
                         "saved as safetensors first")
    for path in paths:
        if not os.path.isfile(path):
            raise ValueError(f"{path}: a shard that {_INDEX} names is missing")
    return paths


def hub_sha256(folder: str) -> str:
    """Hash (hex) of the weights: of the file, or of the concatenated hashes of the shards in the order of names."""
    hashes = [sha256_of(path) for path in hub_files(folder)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


class Place(NamedTuple):
    """Where a tensor goes.

    path: keys in our parameters; stack: (number, of how many) along each leading axis that tensors are stacked on there
    (blocks, experts); shape: in the file; turned: whether a matrix is [out, in] there, ours being [in, out].
    """

    path: tuple[str, ...]
    stack: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]
    turned: bool

    @property
    def at(self) -> tuple[int, ...]:
        """Where along the leading axes."""
        return tuple(number for number, _ in self.stack)

    @property
    def whole(self) -> tuple[int, ...]:
        """Shape of what it is a part of."""
        return tuple(count for _, count in self.stack) + (self.shape[::-1] if self.turned else self.shape)


Layout: TypeAlias = dict[str, Place]  # by the tensors' names


def places(table: Mapping[str, tuple[str, str]], sizes: Mapping[str, int], prefix: str = "",
           stack: tuple[tuple[int, int], ...] = ()) -> Layout:
    """Places of a table {name in the file: ("our.path" or, of a turned matrix, "our.path.T"; a letter an axis)}.

    prefix: in front of all names; sizes: of the axes; stack: see Place, of the tensors of one block.
    """
    return {prefix + name: Place(tuple(path.removesuffix(".T").split(".")), stack, tuple(sizes[a] for a in axes),
                                 path.endswith(".T"))
            for name, (path, axes) in table.items()}


def check(found: Mapping[str, tuple[int, ...]], layout: Layout, where: str = "") -> None:
    """ValueError, with names, for tensors missing, unexpected or of another shape; found: shapes by name."""
    for what, names in (
            ("missing", [name for name in layout if name not in found]),
            ("unexpected", [name for name in found if name not in layout]),
            ("of another shape", [f"{name} {found[name]} in place of {place.shape}" for name, place in layout.items()
                                  if found.get(name, place.shape) != place.shape])):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{where}{len(names)} tensors {what}: {', '.join(names[:5])}{more}")


def load(read: Callable[[str], np.ndarray], layout: Layout, dtype: str = "float32") -> Params:
    """Our parameters of the tensors that read(name) gives: matrices in `dtype`, vectors in float32."""
    params: Params = {}
    for name, place in layout.items():
        into = functools.reduce(lambda tree, key: tree.setdefault(key, {}), place.path[:-1], params)
        kind = jnp.dtype(dtype) if len(place.shape) == 2 else np.dtype(np.float32)
        if place.path[-1] not in into:
            into[place.path[-1]] = np.empty(place.whole, kind)
        into[place.path[-1]][place.at] = read(name).T if place.turned else read(name)
    return params


def dump(params: Params, layout: Layout) -> dict[str, np.ndarray]:
    """Tensors by name: what `load` makes such parameters of."""
    out = {}
    for name, place in layout.items():
        array: Any = functools.reduce(lambda tree, key: tree[key], place.path, params)
        out[name] = array[place.at].T if place.turned else array[place.at]
    return out


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
        with open(path, "rb") as file:
            found: Any = file.read()
    elif suffix == ".npy":
        found = np.load(path, allow_pickle=False)
    elif suffix in _TORCH:
        found = _load_torch(path)
        found = found.get("cluster_dict", found) if isinstance(found, dict) else found
    else:
        raise ConfigError(f"released.clusters={path!r}: choose a .json, .npy, {', '.join(_TORCH)} file")
    try:
        found = json.loads(found) if suffix == ".json" else found  # an object or a list
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
