"""The weights of the published PyTorch network, which MDLM, GIDD and HDLM share, as ours and back: numpy alone.

Theirs -> ours. Their weights are [out, in], our kernels [in, out]; our blocks are stacked on a leading axis:

    vocab_embed.embedding [R, D]            embedding: a row for each of our symbols, picked by its id of theirs
    sigma_map.mlp.0, sigma_map.mlp.2        time_in, time_out; cond units, filled up with zeros (exact) to our 128
    blocks.<i>.norm1, norm2                 stack.norm1, stack.norm2
    blocks.<i>.attn_qkv [3 D, D]            stack.qkv: kernel [D, 3, D]
    blocks.<i>.attn_out, mlp.0, mlp.2       stack.out, stack.up, stack.down
    blocks.<i>.adaLN_modulation             stack.modulation: shift, scale, gate of attention, then of the MLP
    output_layer.norm_final, adaLN_modulation    norm, modulation
    output_layer.linear [R, D]              head: a row for each word

What our network has no use for (rows of padding and of symbols that get no probability, a second head over clusters,
rotary tables) is kept aside in `released.npz`, from which an export is whole again. Values become float32, which is
exact for float16 and bfloat16; nothing else is rounded, but for time that is folded away (see `from_torch`).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import numpy as np

from hdlm_jax.config import ConfigError, ReleasedConfig
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.models.network import rotary

EMBEDDING, HEAD = "vocab_embed.embedding", "output_layer.linear"
COND = 128  # width of our embedded time
NEVER = -1e6  # logit of what no table knows: no probability in float32 or bfloat16
_TOP = {"time_in": "sigma_map.mlp.0", "time_out": "sigma_map.mlp.2", "norm": "output_layer.norm_final",
        "modulation": "output_layer.adaLN_modulation"}
_STACK = {"norm1": "norm1", "qkv": "attn_qkv", "out": "attn_out", "norm2": "norm2", "up": "mlp.0", "down": "mlp.2",
          "modulation": "adaLN_modulation"}
_UNUSED = re.compile(r"rotary_emb\.|logit_bias$|output_layer_clusters\.")


class Layout(NamedTuple):
    """How a published model extends its tokenizer: ids between words and mask, and rows to a multiple of `pad`."""

    before_mask: int
    pad: int


LAYOUTS = {"mdlm": Layout(0, 1), "gidd": Layout(1, 128), "hdlm": Layout(1, 128)}  # gidd, hdlm: [PAD], then [MASK]


class Sizes(NamedTuple):
    width: int
    blocks: int
    cond: int
    rows: int


def _final(name: str, s: Sizes) -> dict[str, tuple[int, ...]]:
    return {f"{name}.norm_final.weight": (s.width,), f"{name}.linear.weight": (s.rows, s.width),
            f"{name}.linear.bias": (s.rows,), f"{name}.adaLN_modulation.weight": (2 * s.width, s.cond),
            f"{name}.adaLN_modulation.bias": (2 * s.width,)}


def shapes(s: Sizes) -> dict[str, tuple[int, ...]]:
    """Published names and shapes, in the order in which the network registers them (that of MDLM's averages)."""
    d, c = s.width, s.cond
    out = {EMBEDDING: (s.rows, d), "sigma_map.mlp.0.weight": (c, 256), "sigma_map.mlp.0.bias": (c,),
           "sigma_map.mlp.2.weight": (c, c), "sigma_map.mlp.2.bias": (c,)}
    for i in range(s.blocks):
        block = {"norm1.weight": (d,), "attn_qkv.weight": (3 * d, d), "attn_out.weight": (d, d), "norm2.weight": (d,),
                 "mlp.0.weight": (4 * d, d), "mlp.0.bias": (4 * d,), "mlp.2.weight": (d, 4 * d), "mlp.2.bias": (d,),
                 "adaLN_modulation.weight": (6 * d, c), "adaLN_modulation.bias": (6 * d,)}
        out |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return out | _final("output_layer", s)


def sizes(state: dict[str, np.ndarray]) -> Sizes:
    """Sizes of a published network. ValueError: tensors missing, unexpected or of other shapes, by name."""
    table, time = state.get(EMBEDDING), state.get("sigma_map.mlp.2.weight")
    if table is None or table.ndim != 2:
        raise ValueError(f"{EMBEDDING}: must be a table [rows, width], is {None if table is None else table.shape}")
    numbers = [int(found[1]) for found in map(re.compile(r"blocks\.(\d+)\.").match, state) if found]
    s = Sizes(table.shape[1], max(numbers, default=-1) + 1, COND if time is None else len(time), len(table))
    want = shapes(s)
    wrong = [f"{name} {state[name].shape} in place of {shape}" for name, shape in want.items()
             if name in state and state[name].shape != shape]
    unknown = [name for name in state if name not in want and not _UNUSED.match(name)]
    _named("missing", [name for name in want if name not in state])
    _named("unexpected", unknown)
    _named("of another shape", wrong)
    if s.blocks == 0:
        raise ValueError("weights without blocks.0: this is no network")
    return s


def _named(what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ValueError(f"{len(names)} tensors {what}: {', '.join(names[:5])}{more}")


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
    mask = words + LAYOUTS[released.layout].before_mask if released.mask_id < 0 else released.mask_id
    first = max(words, mask + 1) if released.first_cluster < 0 else released.first_cluster
    if between and (first < words or first <= mask < first + between):
        raise ConfigError(f"released.first_cluster={first}: clusters {first}..{first + between - 1} run into the "
                          f"{words} words or the mask, {mask}")
    return np.concatenate([np.arange(words), first + np.arange(between), [mask]])


def _spoken(ids: np.ndarray, words: int) -> np.ndarray:
    """Words that have a logit: all, but for a mask that is among the tokenizer's words (BERT)."""
    return np.setdiff1d(np.arange(words), ids[-1:])


def _take(state: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    weight = state[f"{name}.weight"]
    out = {"weight": weight} if weight.ndim == 1 else {"kernel": weight.T}
    return out | ({"bias": state[f"{name}.bias"]} if f"{name}.bias" in state else {})


def _give(params: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {f"{name}.{'bias' if leaf == 'bias' else 'weight'}": a.T if leaf == "kernel" else a
            for leaf, a in params.items()}


def _resize(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Every axis filled up with zeros or cut; ValueError if what is cut is not zero."""
    out = np.zeros(shape, np.float32)
    part = tuple(slice(min(a, b)) for a, b in zip(array.shape, shape, strict=True))
    out[part] = array[part]
    if np.count_nonzero(out) != np.count_nonzero(array):
        raise ValueError(f"time is embedded in more than the {min(shape)} units it was imported with")
    return out


def _with_cond(params: dict[str, Any], cond: int) -> None:
    """Time embedded in so many units: units that are added have no weights in or out, silu(0) = 0."""
    for name, rows in (("time_in", 256), ("time_out", cond)):
        params[name] = {"kernel": _resize(params[name]["kernel"], (rows, cond)),
                        "bias": _resize(params[name]["bias"], (cond,))}
    for m in (params["modulation"], params["stack"]["modulation"]):
        m["kernel"] = _resize(m["kernel"], (*m["kernel"].shape[:-2], cond, m["kernel"].shape[-1]))


def _fold_time(params: dict[str, Any]) -> None:
    """The network at time 0 as one that knows no time: what time adds becomes part of the biases (in float64)."""
    hidden = np.concatenate([np.ones(128), np.zeros(128)])  # cosines and sines of 0
    for name in ("time_in", "time_out"):
        hidden = hidden @ params[name]["kernel"].astype(np.float64) + params.pop(name)["bias"]
        hidden = hidden / (1 + np.exp(-hidden))
    for m in (params["modulation"], params["stack"]["modulation"]):
        m["bias"] = (m["bias"] + hidden @ m.pop("kernel").astype(np.float64)).astype(np.float32)


def from_torch(state: dict[str, np.ndarray], hierarchy: Hierarchy, ids: np.ndarray,
               time: bool = True) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
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
    spoken = _spoken(ids, words)
    kernel, bias = (np.zeros((-(-words // 128) * 128, *tail), np.float32) for tail in ((s.width,), ()))
    bias[:words] = NEVER
    kernel[spoken], bias[spoken] = state[f"{HEAD}.weight"][spoken], state[f"{HEAD}.bias"][spoken]
    blocks = [{ours: _take(state, f"blocks.{i}.{theirs}") for ours, theirs in _STACK.items()} for i in range(s.blocks)]
    params: dict[str, Any] = {ours: _take(state, theirs) for ours, theirs in _TOP.items()}
    params["stack"] = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
    qkv = params["stack"]["qkv"]
    qkv["kernel"] = qkv["kernel"].reshape(s.blocks, s.width, 3, s.width)
    params["embedding"] = np.zeros((hierarchy.padded_symbols, s.width), np.float32)
    params["embedding"][:total] = state[EMBEDDING][ids]
    params["head"] = {"kernel": kernel, "bias": bias}
    rest = {name: a for name, a in state.items() if _UNUSED.match(name) or not time and name.startswith("sigma_map.")}
    rest[EMBEDDING] = np.delete(state[EMBEDDING], ids, axis=0)
    rest |= {f"{HEAD}.{leaf}": np.delete(state[f"{HEAD}.{leaf}"], spoken, axis=0) for leaf in ("weight", "bias")}
    _with_cond(params, COND) if time else _fold_time(params)
    return jax.tree.map(lambda a: np.array(a, np.float32, order="C"), params), rest


def to_torch(params: dict[str, Any], hierarchy: Hierarchy, ids: np.ndarray, layout: str, heads: int, seq_len: int,
             rest: dict[str, np.ndarray] | None = None, cond: int = COND) -> dict[str, np.ndarray]:
    """Params of our network with a flat head -> published weights, float32 by published name.

    With what an import left over (`rest`) and its number of units of time the tables are whole again, bit for bit.
    Without it: rows that are no symbol of ours are zero, with the logit NEVER; the head over clusters of HDLM, which
    its bound does not use, is as at the start of training; a network that knows no time has zeros where time goes in.
    """
    params, left = jax.tree.map(np.asarray, params), dict(rest or {})
    depth, width = params["stack"]["norm1"]["weight"].shape
    spoken, pad = _spoken(ids, hierarchy.vocab_size), LAYOUTS[layout].pad
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

    def table(name: str, where: np.ndarray, values: np.ndarray, other: float) -> dict[str, np.ndarray]:
        out = np.empty((rows, *values.shape[1:]), np.float32)
        out[np.delete(np.arange(rows), where)] = left.pop(name, other)
        out[where] = values
        return {name: out}

    state = table(EMBEDDING, ids, params["embedding"][: hierarchy.num_states], 0.0)
    state |= table(f"{HEAD}.weight", spoken, params["head"]["kernel"][spoken], 0.0)
    state |= table(f"{HEAD}.bias", spoken, params["head"]["bias"][spoken], NEVER)
    for ours, theirs in _TOP.items():
        state |= _give(params[ours], theirs)
    for i in range(depth):
        for ours, theirs in _STACK.items():
            state |= _give(jax.tree.map(lambda a, i=i: a[i], params["stack"][ours]), f"blocks.{i}.{theirs}")
    s = Sizes(width, depth, cond, rows)
    state |= left if rest else _buffers(layout, s, width // heads, seq_len, clusters=hierarchy.num_levels > 1)
    order = [*shapes(s), *sorted(set(state) - set(shapes(s)))]
    return {name: np.array(state[name], np.float32, order="C") for name in order}


def _buffers(layout: str, s: Sizes, dim: int, seq_len: int, clusters: bool) -> dict[str, np.ndarray]:
    """What a published network holds beside what it learns, and HDLM's second head, as they start."""
    if layout == "mdlm":
        return {"rotary_emb.inv_freq": 10_000.0 ** (-np.arange(0, dim, 2) / dim)}
    cos, sin = (np.repeat(a[:, :, None], 3, axis=2) for a in rotary(seq_len, dim))  # of q, k and v
    cos[:, :, 2], sin[:, :, 2] = 1, 0
    out = {"rotary_emb.cos_cached": cos, "rotary_emb.sin_cached": sin, "logit_bias": np.zeros((1, 1, 1))}
    if layout == "hdlm" and clusters:
        out |= {name: np.full(shape, float(name.endswith("norm_final.weight")))
                for name, shape in _final("output_layer_clusters", s).items()}
    return out
