"""The weights of the published PyTorch network, which MDLM, GIDD and HDLM share, as ours and back.

The tables below say which tensor goes where. Beside that our tables of embeddings and the head have a row for each of
our symbols or words, picked by its id of theirs, and the units of embedded time are filled up with zeros (exact) to our
128. What our network has no use for (rows of padding and of symbols that get no probability, a second head over
clusters, rotary tables) is kept aside in `released.npz`, from which an export is whole again. Nothing is rounded, but
for time that is folded away (see `from_torch`).
"""

from __future__ import annotations

import re
from typing import NamedTuple

import jax
import numpy as np

from hdlm_jax.config import ConfigError, ReleasedConfig
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.models.heads import NEVER
from hdlm_jax.models.network import rotary
from hdlm_jax.models.weight_files import Layout, Params, as_numpy, check, dump, find, load, places, read_file

EMBEDDING, HEAD = "vocab_embed.embedding", "output_layer.linear"
COND = 128  # width of our embedded time
# name in the file -> (place in our parameters, axes: R rows, D width, Q 3 D, F 4 D, M 6 D, N 2 D, C cond, S sinusoids)
_BEFORE = {EMBEDDING: ("embedding", "RD"),
           "sigma_map.mlp.0.weight": ("time_in.kernel.T", "CS"), "sigma_map.mlp.0.bias": ("time_in.bias", "C"),
           "sigma_map.mlp.2.weight": ("time_out.kernel.T", "CC"), "sigma_map.mlp.2.bias": ("time_out.bias", "C")}
_BLOCK = {"norm1.weight": ("stack.norm1.weight", "D"), "attn_qkv.weight": ("stack.qkv.kernel.T", "QD"),
          "attn_out.weight": ("stack.out.kernel.T", "DD"), "norm2.weight": ("stack.norm2.weight", "D"),
          "mlp.0.weight": ("stack.up.kernel.T", "FD"), "mlp.0.bias": ("stack.up.bias", "F"),
          "mlp.2.weight": ("stack.down.kernel.T", "DF"), "mlp.2.bias": ("stack.down.bias", "D"),
          "adaLN_modulation.weight": ("stack.modulation.kernel.T", "MC"),
          "adaLN_modulation.bias": ("stack.modulation.bias", "M")}
_OUTPUT = {"norm_final.weight": ("norm.weight", "D"), "linear.weight": ("head.kernel", "RD"),
           "linear.bias": ("head.bias", "R"), "adaLN_modulation.weight": ("modulation.kernel.T", "NC"),
           "adaLN_modulation.bias": ("modulation.bias", "N")}
_UNUSED = re.compile(r"rotary_emb\.|logit_bias$|output_layer_clusters\.")
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|module)\.")  # of torch.compile and DistributedDataParallel


# (ids between the words and the mask, rows are a multiple of this): GIDD and HDLM add [PAD], then [MASK]
LAYOUTS = {"mdlm": (0, 1), "gidd": (1, 128), "hdlm": (1, 128)}


class Sizes(NamedTuple):
    width: int
    blocks: int
    cond: int
    rows: int


def _axes(s: Sizes) -> dict[str, int]:
    d = s.width
    return {"R": s.rows, "D": d, "Q": 3 * d, "F": 4 * d, "M": 6 * d, "N": 2 * d, "C": s.cond, "S": 256}


def layout_of(s: Sizes) -> Layout:
    """Published tensors in the order in which the network registers them (that of MDLM's averages)."""
    axes = _axes(s)
    out = places(_BEFORE, axes)
    for i in range(s.blocks):
        out |= places(_BLOCK, axes, f"blocks.{i}.", ((i, s.blocks),))
    return out | places(_OUTPUT, axes, "output_layer.")


def sizes(state: dict[str, np.ndarray]) -> Sizes:
    """Sizes of a published network. ValueError: tensors missing, unexpected or of other shapes, by name."""
    table, time = state.get(EMBEDDING), state.get("sigma_map.mlp.2.weight")
    if table is None or table.ndim != 2:
        raise ValueError(f"{EMBEDDING}: must be a table [rows, width], is {None if table is None else table.shape}")
    numbers = [int(found[1]) for found in map(re.compile(r"blocks\.(\d+)\.").match, state) if found]
    s = Sizes(table.shape[1], max(numbers, default=-1) + 1, COND if time is None else len(time), len(table))
    check({name: a.shape for name, a in state.items() if not _UNUSED.match(name)}, layout_of(s))
    if s.blocks == 0:
        raise ValueError("weights without blocks.0: this is no network")
    return s


class File(NamedTuple):
    """state: float32 by published name; averaged: its EMA; step: of training, 0 if not told; ignored: other names."""

    state: dict[str, np.ndarray]
    averaged: bool
    step: int
    ignored: list[str]


def read_weights(path: str, ema: bool = True) -> File:
    """Weights of a file (see `read_file`); the average (`ema`) where MDLM's or SEDD's training kept one.

    Any prefix ("backbone.", "model.", "module.", "_orig_mod.") goes; what does not share the network's is listed as
    ignored.

    Raises:
      ConfigError: another kind of file, a package that is missing. ValueError: not these weights.
    """
    path = find(path)
    tensors, found = read_file(path)
    tensors = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    prefixes = [name.removesuffix(EMBEDDING) for name in tensors if name.endswith(EMBEDDING)]
    if len(prefixes) != 1:
        raise ValueError(f"{path}: {len(prefixes)} tensors are named ...{EMBEDDING}, must be one; it holds "
                         f"{', '.join(list(tensors)[:5]) or 'no tensors'} ...")
    prefix = prefixes[0]
    state = {name.removeprefix(prefix): t.read() for name, t in tensors.items() if name.startswith(prefix)}
    shadow = found["ema"].get("shadow_params") if ema and isinstance(found.get("ema"), dict) else None
    if shadow:
        want = layout_of(sizes(state))
        if len(shadow) < len(want):
            raise ValueError(f"{path}: ema.shadow_params holds {len(shadow)} tensors, the network {len(want)}")
        for (name, place), average in zip(want.items(), shadow, strict=False):
            if tuple(average.shape) != place.shape:
                raise ValueError(f"{path}: ema.shadow_params is {tuple(average.shape)} where {name} is {place.shape}")
            state[name] = as_numpy(average)
    step = found.get("global_step", found.get("step", 0))
    return File(state, bool(shadow), step if isinstance(step, int) else 0,
                [name for name in tensors if not name.startswith(prefix)])


def heads_of(state: dict[str, np.ndarray], width: int) -> int | None:
    """Number of heads, where rotary tables tell; ValueError if those or the logit bias are not our network's."""
    if np.any(state.get("logit_bias", 0)):
        raise ValueError("logit_bias is not zero: our network has no such bias")
    if (freq := state.get("rotary_emb.inv_freq")) is not None:
        dim = 2 * len(freq)
        same = np.allclose(freq, 10_000.0 ** (-np.arange(0, dim, 2) / dim), rtol=1e-4)
    elif (cos := state.get("rotary_emb.cos_cached")) is not None:
        dim = cos.shape[-1]
        same = np.allclose(cos[0, :, 0, 0], rotary(cos.shape[1], dim)[0][0, :, 0], atol=1e-3)
    else:
        return None
    if not same or width % dim:
        raise ValueError(f"rotary_emb: not the half rotation of base 10000 that our network has (width {width}, "
                         f"{dim} a head)")
    return width // dim


def state_ids(released: ReleasedConfig, hierarchy: Hierarchy) -> np.ndarray:
    """int64 [N]: the id in the published vocabulary of each of our symbols (words, clusters fine to coarse, mask)."""
    words, between = hierarchy.vocab_size, hierarchy.num_states - hierarchy.vocab_size - 1
    mask = words + LAYOUTS[released.layout][0] if released.mask_id < 0 else released.mask_id
    first = max(words, mask + 1) if released.first_cluster < 0 else released.first_cluster
    if between and (first < words or first <= mask < first + between):
        raise ConfigError(f"released.first_cluster={first}: clusters {first}..{first + between - 1} run into the "
                          f"{words} words or the mask, {mask}")
    return np.concatenate([np.arange(words), first + np.arange(between), [mask]])


def _spoken(ids: np.ndarray, words: int) -> np.ndarray:
    """Words that have a logit: all, but for a mask that is among the tokenizer's words (BERT)."""
    return np.setdiff1d(np.arange(words), ids[-1:])


def _resize(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Every axis filled up with zeros or cut; ValueError if what is cut is not zero."""
    out = np.zeros(shape, np.float32)
    part = tuple(slice(min(a, b)) for a, b in zip(array.shape, shape, strict=True))
    out[part] = array[part]
    if np.count_nonzero(out) != np.count_nonzero(array):
        raise ValueError(f"time is embedded in more than the {min(shape)} units it was imported with")
    return out


def _with_cond(params: Params, cond: int) -> None:
    """Time embedded in so many units: units that are added have no weights in or out, silu(0) = 0."""
    for name, rows in (("time_in", 256), ("time_out", cond)):
        params[name] = {"kernel": _resize(params[name]["kernel"], (rows, cond)),
                        "bias": _resize(params[name]["bias"], (cond,))}
    for m in (params["modulation"], params["stack"]["modulation"]):
        m["kernel"] = _resize(m["kernel"], (*m["kernel"].shape[:-2], cond, m["kernel"].shape[-1]))


def _fold_time(params: Params) -> None:
    """The network at time 0 as one that knows no time: what time adds becomes part of the biases (in float64)."""
    hidden = np.concatenate([np.ones(128), np.zeros(128)])  # cosines and sines of 0
    for name in ("time_in", "time_out"):
        hidden = hidden @ params[name]["kernel"].astype(np.float64) + params.pop(name)["bias"]
        hidden = hidden / (1 + np.exp(-hidden))
    for m in (params["modulation"], params["stack"]["modulation"]):
        m["bias"] = (m["bias"] + hidden @ m.pop("kernel").astype(np.float64)).astype(np.float32)


def from_torch(state: dict[str, np.ndarray], hierarchy: Hierarchy, ids: np.ndarray,
               time: bool = True) -> tuple[Params, dict[str, np.ndarray]]:
    """Published weights -> (params of our network with a flat head, what it has no use for).

    Args:
      state: float32 arrays by published name; `rotary_emb.*`, `logit_bias`, `output_layer_clusters.*` may be there.
      ids: see `state_ids`. Padding of our own tables is zero, and the logit of a mask among the words is NEVER.
      time: the network is told t in [0, 1) (GIDD, HDLM). False: it always sees 0 (MDLM without time conditioning),
        which is folded into the biases in float64.

    Raises:
      ValueError: tensors missing, unexpected, of other shapes, or with fewer rows than there are symbols.
    """
    s, words, total = sizes(state), hierarchy.vocab_size, hierarchy.num_states
    if ids.max() >= s.rows:
        raise ValueError(f"{EMBEDDING} has {s.rows} rows, too few for symbol {ids.max()}: check tokenizer, clusters, "
                         "released.layout, released.mask_id and released.first_cluster")
    if s.cond > COND:
        raise ValueError(f"sigma_map: time is embedded in {s.cond} units, our network has {COND}")
    params, spoken = load(state.__getitem__, layout_of(s)), _spoken(ids, words)
    kernel, bias = (np.zeros((-(-words // 128) * 128, *tail), np.float32) for tail in ((s.width,), ()))
    bias[:words] = NEVER
    kernel[spoken], bias[spoken] = params["head"]["kernel"][spoken], params["head"]["bias"][spoken]
    params["head"] = {"kernel": kernel, "bias": bias}
    params["embedding"] = np.zeros((hierarchy.padded_states, s.width), np.float32)
    params["embedding"][:total] = state[EMBEDDING][ids]
    qkv = params["stack"]["qkv"]
    qkv["kernel"] = qkv["kernel"].reshape(s.blocks, s.width, 3, s.width)
    rest = {name: a for name, a in state.items() if _UNUSED.match(name) or not time and name.startswith("sigma_map.")}
    rest[EMBEDDING] = np.delete(state[EMBEDDING], ids, axis=0)
    rest |= {f"{HEAD}.{leaf}": np.delete(state[f"{HEAD}.{leaf}"], spoken, axis=0) for leaf in ("weight", "bias")}
    _with_cond(params, COND) if time else _fold_time(params)
    return jax.tree.map(lambda a: np.array(a, np.float32, order="C"), params), rest


def to_torch(params: Params, hierarchy: Hierarchy, ids: np.ndarray, layout: str, heads: int, seq_len: int,
             rest: dict[str, np.ndarray] | None = None, cond: int = COND) -> dict[str, np.ndarray]:
    """Params of our network with a flat head, tied or not -> published weights, float32 by published name.

    With what an import left over (`rest`) and its number of units of time the tables are whole again, bit for bit.
    Without it: rows that are no symbol of ours are zero, with the logit NEVER; the head over clusters of HDLM, which
    its bound does not use, is as at the start of training; a network that knows no time has zeros where time goes in.
    """
    params, left = jax.tree.map(np.asarray, params), dict(rest or {})
    depth, width = params["stack"]["norm1"]["weight"].shape
    spoken, pad = _spoken(ids, hierarchy.vocab_size), LAYOUTS[layout][1]
    if "time_in" in params:
        _with_cond(params, cond)
    else:
        params |= {name: {"kernel": np.zeros((n, cond)), "bias": np.zeros(cond)}
                   for name, n in (("time_in", 256), ("time_out", cond))}
        params["modulation"]["kernel"] = np.zeros((cond, 2 * width))
        params["stack"]["modulation"]["kernel"] = np.zeros((depth, cond, 6 * width))
    rows = len(np.unique(ids)) + len(left[EMBEDDING]) if left else -(-(int(ids.max()) + 1) // pad) * pad
    qkv = params["stack"]["qkv"]
    qkv["kernel"] = qkv["kernel"].reshape(depth, width, 3 * width)

    def table(name: str, where: np.ndarray, values: np.ndarray, other: float) -> np.ndarray:
        out = np.empty((rows, *values.shape[1:]), np.float32)
        out[np.delete(np.arange(rows), where)] = left.pop(name, other)
        out[where] = values
        return out

    head = {"kernel": params["embedding"]} | params["head"]  # tied: the words' vectors are their embeddings
    params["embedding"] = table(EMBEDDING, ids, params["embedding"][: hierarchy.num_states], 0.0)
    params["head"] = {"kernel": table(f"{HEAD}.weight", spoken, head["kernel"][spoken], 0.0),
                      "bias": table(f"{HEAD}.bias", spoken, head["bias"][spoken], NEVER)}
    s = Sizes(width, depth, cond, rows)
    state = dump(params, layout_of(s))
    others = left if rest else _buffers(layout, s, width // heads, seq_len, clusters=hierarchy.num_levels > 1)
    state |= {name: others[name] for name in sorted(others)}
    return {name: np.array(a, np.float32, order="C") for name, a in state.items()}


def _buffers(layout: str, s: Sizes, dim: int, seq_len: int, clusters: bool) -> dict[str, np.ndarray]:
    """What a published network holds beside what it learns, and HDLM's second head, as they start."""
    if layout == "mdlm":
        return {"rotary_emb.inv_freq": 10_000.0 ** (-np.arange(0, dim, 2) / dim)}
    cos, sin = (np.repeat(a[:, :, None], 3, axis=2) for a in rotary(seq_len, dim))  # of q, k and v
    cos[:, :, 2], sin[:, :, 2] = 1, 0
    out = {"rotary_emb.cos_cached": cos, "rotary_emb.sin_cached": sin, "logit_bias": np.zeros((1, 1, 1))}
    if layout == "hdlm" and clusters:
        out |= {name: np.full(place.shape, float(name.endswith("norm_final.weight")))
                for name, place in places(_OUTPUT, _axes(s), "output_layer_clusters.").items()}
    return out
