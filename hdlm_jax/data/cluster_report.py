"""What the clusters of a hierarchy are, as text and as a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import logging

from hdlm_jax.common import jsons
from hdlm_jax.data.embeddings import sum_by, unit_rows
from hdlm_jax.diffusion.hierarchy import Hierarchy

_SPACE = "\u2423"  # how a space is shown


def write_report(hierarchy: Hierarchy, vectors: np.ndarray, decode: Callable[[list[int]], str],
                 counts: np.ndarray, out_prefix: str | os.PathLike) -> None:
    """Writes PREFIX.txt (sizes and sample words of every cluster) and, with matplotlib, PREFIX.png (their plane).

    Args:
      hierarchy: of at least one level of clusters. vectors: float [V, E]. decode: list of word ids -> text.
      counts: int [V], how often each word occurs in the training tokens.
    """
    unit, counts = unit_rows(np.asarray(vectors, np.float32)), np.asarray(counts, np.int64)
    jsons.write_atomic(f"{out_prefix}.txt", _report_text(hierarchy, unit, decode, counts).encode())
    _picture(hierarchy, unit, decode, counts, Path(f"{out_prefix}.png"))


def _show(decode: Callable[[list[int]], str], word: int) -> str:
    """A word as it can stand in a list: spaces and control characters visible."""
    text = decode([int(word)])
    return (text if text.isprintable() and "\ufffd" not in text else ascii(text)[1:-1]).replace(" ", _SPACE)


def _report_text(hierarchy: Hierarchy, unit: np.ndarray, decode: Callable[[list[int]], str],
                 counts: np.ndarray, words_shown: int = 16) -> str:
    lines = [f"Hierarchy {hierarchy.fingerprint[:12]}: {hierarchy.sizes} nodes a level, last the mask.",
             f"{int((counts > 0).sum())} of {hierarchy.vocab_size} words occur in {int(counts.sum())} "
             f"training tokens. {_SPACE} is a space; words are listed most frequent first."]
    total = max(int(counts.sum()), 1)
    share = [np.bincount(a, counts, n) / total for a, n in zip(hierarchy.anc, hierarchy.sizes, strict=True)]
    lines.append(f"Unigram entropy of the words {_entropy(share[0]):.3f} nats.")
    common = np.setdiff1d(np.arange(hierarchy.vocab_size), hierarchy.special)
    for level in range(1, hierarchy.num_levels):
        anc, n = hierarchy.anc[level], hierarchy.sizes[level]
        sizes = np.bincount(anc[common], minlength=n)
        sizes = sizes[sizes > 0]  # a special word's own cluster says nothing about the spread
        close = np.sum(unit * unit_rows(sum_by(unit, anc, n))[anc], 1)[common][unit[common].any(1)]
        quartiles = "/".join(f"{q:.0f}" for q in np.quantile(sizes, (0.25, 0.5, 0.75)))
        cosine = close.mean() if len(close) else 0.0
        lines += ["",
                  f"Level {level}: {n} clusters; words in each: mean {sizes.mean():.1f}, smallest "
                  f"{sizes.min()}, quartiles {quartiles}, largest {sizes.max()} (special words left out).",
                  f"  Mean cosine of a word and its centroid {cosine:.3f}; entropy of the cluster "
                  f"{_entropy(share[level]):.3f} nats (at most log n = {math.log(n):.3f})."]
    frequent_first = np.argsort(-counts, kind="stable")
    # Clusters stand under their parents, each list by share of the corpus.
    keys = [-share[1]]
    for level in range(2, hierarchy.num_levels):
        above = hierarchy.level1_anc[level]
        keys += [above, -share[level][above]]
    previous: dict[int, int] = {}
    for node in np.lexsort(keys):
        for level in range(hierarchy.num_levels - 1, 1, -1):
            above = int(hierarchy.level1_anc[level][node])
            if previous.get(level) != above:
                previous[level] = above
                clusters, size = hierarchy.level1_count[level][above], hierarchy.token_count[level][above]
                lines += ["", f"== Level {level}, node {above}: {clusters} clusters, {size} words, "
                              f"{share[level][above]:.2%} of tokens"]
        words = frequent_first[hierarchy.anc[1][frequent_first] == node]
        used = np.count_nonzero(counts[words])
        mark = " (special)" if len(words) == 1 and words[0] in hierarchy.special else ""
        sample = "  ".join(_show(decode, w) for w in words[:words_shown])
        lines += ["", f"cluster {node}{mark}: {len(words)} words ({used} occur), "
                      f"{share[1][node]:.2%} of tokens", f"  {sample}"]
    return "\n".join(lines) + "\n"


def _entropy(p: np.ndarray) -> float:
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def plane(points: np.ndarray, neighbours: int = 12, epochs: int = 300, seed: int = 0) -> np.ndarray:
    """A map float32 [P, 2] of unit rows [P, E] in which near neighbours (cosine) stay near; P up to a few thousand.

    It begins with the two principal directions, which leave most words in one blob; then words are pulled to their
    nearest neighbours and pushed off random others by UMAP's forces. Distances between far groups mean little.
    """
    rng = np.random.default_rng(seed)
    count, k = len(points), min(neighbours, len(points) - 1)
    centred = points - points.mean(0)
    at = np.zeros((count, 2))
    leading = centred @ np.linalg.svd(centred.T @ centred)[0][:, :2]
    at[:, :leading.shape[1]] = 10 * leading / np.maximum(np.abs(leading).max(0), 1e-9)
    at += 1e-3 * rng.standard_normal(at.shape)
    similarity = points @ points.T
    np.fill_diagonal(similarity, -np.inf)
    source = np.repeat(np.arange(count), k)
    target = np.argpartition(-similarity, k - 1, axis=1)[:, :k].ravel()
    for epoch in range(epochs):
        gap = at[source] - at[target]
        pull = np.clip(-2 * gap / (1 + np.sum(gap**2, 1, keepdims=True)), -4, 4)
        force = pull.copy()
        for _ in range(5):
            gap = at[source] - at[rng.integers(0, count, len(source))]
            square = np.sum(gap**2, 1, keepdims=True)
            force += np.clip(2 * gap / ((0.01 + square) * (1 + square)), -4, 4)
        move = np.stack([np.bincount(source, force[:, d], count) - np.bincount(target, pull[:, d], count)
                         for d in (0, 1)], axis=1)
        at += (1 - epoch / epochs) * np.clip(move * 4 / k, -4, 4)
    return at.astype(np.float32)


def _picture(hierarchy: Hierarchy, unit: np.ndarray, decode: Callable[[list[int]], str],
             counts: np.ndarray, path: Path, max_words: int = 3000) -> None:
    """Draws the most frequent words, coloured by level-1 cluster."""
    drawable = np.any(unit != 0, axis=1)
    drawable[list(hierarchy.special)] = False
    words = [w for w in np.argsort(-counts, kind="stable") if drawable[w]][:max_words]
    if len(words) < 3:
        return
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import hsv_to_rgb
        from matplotlib.figure import Figure
        from matplotlib.patheffects import withStroke
    except ImportError:
        logging.warning("no picture of the clusters: matplotlib is missing (pip install 'hdlm_jax[plots]')")
        return
    at = plane(unit[words])
    # A few far islands would shrink everything else: they are drawn at the edge.
    low, high = np.quantile(at, (0.01, 0.99), axis=0)
    at = np.clip(at, low - 0.1 * (high - low), high + 0.1 * (high - low))
    cluster = hierarchy.anc[1][words]
    # Hues by the golden ratio along the angle around the middle: neighbours in the plane look different.
    present = np.unique(cluster)
    centre = np.stack([np.median(at[cluster == c], 0) for c in present]) - np.median(at, 0)
    turn = np.argsort(np.argsort(np.arctan2(centre[:, 1], centre[:, 0])))
    colours = hsv_to_rgb(np.stack([turn * 0.618034 % 1, 0.6 + 0.4 * (turn % 2), 0.95 - 0.15 * (turn % 3)], 1))
    figure = Figure(figsize=(14, 11), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    size = 9 + 70 * np.sqrt(counts[words] / max(counts[words].max(), 1))
    axes.scatter(at[:, 0], at[:, 1], s=size, c=colours[np.searchsorted(present, cluster)], alpha=0.75, linewidths=0)
    axes.set(xticks=[], yticks=[], title=(
        f"The {len(words)} most frequent words, coloured by cluster ({hierarchy.sizes[1]} of them). "
        "Words that stand close have like vectors."))
    # Labels: most frequent first, where there is room, no more than five for a cluster.
    room = (high - low) / (24, 70)
    placed, per_cluster = np.empty((0, 2)), dict.fromkeys(present, 0)
    ink = dict(zip(present, 0.45 * colours, strict=True))
    for point, word, c in zip(at, words, cluster, strict=True):
        if per_cluster[c] < 5 and not np.any(np.all(np.abs(placed - point) < room, axis=1)):
            placed = np.concatenate([placed, point[None]])
            per_cluster[c] += 1
            axes.text(point[0], point[1], _show(decode, word).replace(_SPACE, "_"), fontsize=8.5,
                      ha="center", va="center", color=ink[c], parse_math=False,
                      path_effects=[withStroke(linewidth=2.5, foreground="white", alpha=0.8)])
    with jsons.open_atomic(path) as file:
        figure.savefig(file, format="png")
