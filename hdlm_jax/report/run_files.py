"""A run's files as one dictionary, for pages and tables; parts that are not there are None."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hdlm_jax.common import jsons
from hdlm_jax.common.jsons import Json
from hdlm_jax.config import Config
from hdlm_jax.data.prepare import load_manifest, token_counts
from hdlm_jax.data.tokenizers import Tokenizer, load_tokenizer
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.levels import LevelChain
from hdlm_jax.training.loading import data_dir, file_of, saved_config
from hdlm_jax.training.metrics import read_metrics

NAMED = 4  # words of a cluster that name it
_VISIBLE = {"\n": "↵", "\r": "␍", "\t": "⇥"}


def read_optional(workdir: str, name: str) -> Any:
    """What a JSON file of a run holds; None where there is none."""
    return jsons.read_json(os.path.join(workdir, name), optional=True)


def show_word(raw: bytes, pieces: bool = False) -> str:
    """A word's bytes as text: line ends and tabs as signs, what cannot be printed or is no UTF-8 as escapes.

    pieces: BERT's way ('##ing' goes on, everything else begins with a blank), turned into ours.
    """
    text = raw.decode("utf-8", errors="backslashreplace")
    if pieces and not re.fullmatch(r"\[[A-Z]+\]", text):
        text = text[2:] if text.startswith("##") else f" {text}"
    return "".join(c if c.isprintable() else _VISIBLE.get(c) or c.encode("unicode_escape").decode() for c in text)


def curves_of(records: Sequence[Json]) -> Json | None:
    """Records as columns: train (tokens, loss, nelbo) and valid (tokens, nelbo); None where there are none."""
    train = [r for r in records if r.get("loss") is not None]
    valid = [r for r in records if r.get("valid_nelbo") is not None]
    if not train and not valid:
        return None
    return {"train": {name: [r[name] for r in train] for name in ("tokens", "loss", "nelbo")},
            "valid": {"tokens": [r["tokens"] for r in valid], "nelbo": [r["valid_nelbo"] for r in valid]}}


def bits_per_nat(config: Config, workdir: str) -> float | None:
    """What turns nats a token of the validation split into bits a byte; None where the data is not there.

    Of the whole split: of a part of it an estimate, as its tokens may be longer or shorter.
    """
    try:
        return load_manifest(data_dir(config, workdir)).bits_per_nat
    except (OSError, ValueError):
        return None


def training_speed(records: Sequence[Json]) -> float | None:
    """Median training tokens a second over a run's records."""
    speeds = [r["tokens_per_s"] for r in records if r.get("tokens_per_s")]
    return float(np.median(speeds)) if speeds else None


def read_trajectories(workdir: str) -> Json | None:
    """trajectories.npz of --mode=generate: its arrays, and `about`, what they were made from."""
    path = os.path.join(workdir, "trajectories.npz")
    if not os.path.exists(path):
        return None
    with np.load(path, allow_pickle=False) as found:
        arrays = {name: found[name] for name in found.files if name != "about"}
        return arrays | {"about": json.loads(str(found["about"]))}


def changes(film: Mapping[str, Any]) -> Json:
    """Trajectories without repetition: what stands at the start, and what changes from frame to frame.

    Returns call [F+1]; t [F+1], the samples' mean; samples: start [S], frames [F] of flat lists position, symbol and
    confidence in thousandths, position, ...; prompt, the tokens that were given; settings.
    """
    z, sure = film["z"], film["confidence"]
    samples = []
    for symbols, confidence in zip(z, sure, strict=True):
        frames = []
        for frame in range(1, len(symbols)):
            at = np.flatnonzero(symbols[frame] != symbols[frame - 1])
            thousandths = np.rint(1000 * confidence[frame][at]).astype(int)
            frames.append(np.stack([at, symbols[frame][at], thousandths], 1).ravel().tolist())
        samples.append({"start": symbols[0].tolist(), "frames": frames})
    about = film["about"]
    return {"call": film["call"].tolist(), "t": np.round(film["time"].mean(0), 4).tolist(), "samples": samples,
            "prompt": about["prompt_tokens"], "settings": about["settings"], "step": about["step"]}


def occupancy(rates: Sequence[float], film: Mapping[str, Any] | None, offsets: Sequence[int]) -> Json:
    """Shares of the levels over t: beta_l (docs/theory.md section 2), and counted in recorded samples.

    Returns t [101], beta [101][K+1]; with a film points: t [F+1], share [F+1][K+1] among `tokens` that were masks.
    """
    t = np.linspace(0, 1, 101)
    with np.errstate(divide="ignore"):
        beta = LevelChain(tuple(rates)).beta(-np.log1p(-t), np)
    out: Json = {"t": t.tolist(), "beta": np.round(beta, 6).tolist(), "points": None, "tokens": 0}
    if film:
        level = np.searchsorted(np.asarray(offsets), film["z"], side="right") - 1
        free = level[:, 0] == len(rates)
        if free.any():
            share = [[(frame[free] == k).mean() for k in range(len(rates) + 1)] for frame in np.moveaxis(level, 1, 0)]
            out |= {"points": {"t": film["time"].mean(0).tolist(), "share": np.round(share, 6).tolist()},
                    "tokens": int(free.sum())}
    return out


def counted(folder: str) -> tuple[np.ndarray | None, float | None]:
    """How often each word occurs in the training tokens, and the unigram's nats; None where the data is not there."""
    try:
        manifest = load_manifest(folder)
        return token_counts(folder, "train", manifest), manifest.unigram_nats
    except (OSError, ValueError):
        return None, None


def tree_of(h: Hierarchy, tokenizer: Tokenizer, counts: np.ndarray | None, nodes: Sequence[np.ndarray]) -> Json:
    """A hierarchy of these nodes of each level alone, as a page has it; the nodes sorted, their parents among them."""
    sizes = [len(some) for some in nodes]
    parents = [np.searchsorted(above, parent[some]).tolist()
               for some, above, parent in zip(nodes, nodes[1:], h.parents[:-1], strict=False)]
    return {"sizes": sizes, "offsets": [0, *np.cumsum(sizes[:-1]).tolist()], "parents": parents,
            "words": [show_word(tokenizer.token_bytes(int(i)), tokenizer.kind == "bert") for i in nodes[0]],
            "counts": None if counts is None else counts[nodes[0]].tolist()}


def tree_shown(h: Hierarchy, tokenizer: Tokenizer, counts: np.ndarray | None, z: np.ndarray) -> tuple[Json, np.ndarray]:
    """(tree_of what states z int32 show, z as its states): them, their parents, and the words that name clusters."""
    level = np.searchsorted(h.offsets, z, side="right") - 1
    nodes = [np.unique(z[level == k]) - h.offsets[k] for k in range(h.num_levels + 1)]
    frequent = np.arange(h.vocab_size) if counts is None else np.argsort(-counts, kind="stable")
    names = [frequent[h.anc[k][frequent] == node][:NAMED] for k in range(1, h.num_levels) for node in nodes[k]]
    nodes[0] = np.unique(np.concatenate([nodes[0], *names]))
    for k, parent in enumerate(h.parents):
        nodes[k + 1] = np.union1d(nodes[k + 1], parent[nodes[k]])
    tree = tree_of(h, tokenizer, counts, nodes)
    new = np.zeros(h.offsets[-1] + 1, np.int32)
    for some, old, now in zip(nodes, h.offsets, tree["offsets"], strict=False):
        new[old + some] = now + np.arange(len(some))
    return tree, new[z]


def gather(workdir: str, film: bool = True) -> Json:
    """All that a page says about a run; parts that are not there are None.

    film: also what the viewer and the clusters need (words, counts, trajectories).

    Raises:
      ConfigError: no run there.
    """
    config = saved_config(workdir)
    process, records = config.diffusion.process, read_metrics(os.path.join(workdir, "metrics.jsonl"))
    out: Json = {"name": os.path.basename(os.path.abspath(workdir)), "workdir": workdir,
                           "config": jsons.plain(config.as_dict()), "process": process, "curves": curves_of(records),
                           "train_speed": training_speed(records)}
    for name in ("evaluate", "generate", "tasks"):
        out[name] = read_optional(workdir, f"{name}.json")
    out |= {"hierarchy": None, "trajectories": None, "occupancy": None, "unigram": None}
    recorded = read_trajectories(workdir) if film else None
    shown = recorded["about"] if recorded else out["evaluate"] or {}
    path = file_of(workdir, shown.get("hierarchy_fingerprint", ""))
    if not film or not os.path.exists(path):
        return out
    tokenizer = load_tokenizer(os.path.join(workdir, "tokenizer"))
    hierarchy = Hierarchy.load(path, tokenizer.fingerprint)
    counts, out["unigram"] = counted(data_dir(config, workdir))
    if recorded and recorded["about"]["hierarchy_fingerprint"] != hierarchy.fingerprint:
        recorded = None  # of another run
    out["hierarchy"] = tree_of(hierarchy, tokenizer, counts, [np.arange(n) for n in hierarchy.sizes])
    out["trajectories"] = changes(recorded) if recorded else None
    if process == "hierarchical":
        out["occupancy"] = occupancy(config.diffusion.level_rates(hierarchy.num_levels), recorded, hierarchy.offsets)
    return out
