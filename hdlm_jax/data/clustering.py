"""Clusters of words, clusters of clusters, and so on: where a `Hierarchy` comes from when none is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import scipy.optimize

from hdlm_jax.data.embeddings import sum_by, unit_rows
from hdlm_jax.diffusion.hierarchy import Hierarchy

# (what is known of the nodes [P, ...], clusters n, nodes of clusters of their own, seed) -> clusters int32 [P], what is
# known of them, facts for the report
Grouping: TypeAlias = Callable[[Any, int, np.ndarray, int], tuple[np.ndarray, Any, dict[str, object]]]

MIN_RATIO, MAX_RATIO = 0.1, 5.0  # limits of a cluster's size, in averages: k-means alone knows none


def build_hierarchy(vectors: Any, clusters: Sequence[int], *, special: Sequence[int] = (), seed: int = 0,
                    shuffle: bool = False, group: Grouping | None = None) -> tuple[Hierarchy, dict[str, object]]:
    """Clusters words by spherical k-means (cosine), then clusters the clusters' centroids, and so on.

    A node holds between MIN_RATIO and MAX_RATIO times the average number of nodes of the level below (words at
    level 1), rounded inwards: the farthest words of a cluster that is too large move to the next best with room, and
    one that is too small takes the words that lose least. Words with a zero vector go one by one to the smallest
    cluster. A special word is a cluster of its own on level 1, counted in n_1, if at least two other clusters remain.

    Args:
      vectors: finite floats [V, E]. clusters: (n_1, n_2, ...), strictly falling. special: word ids, usually `(eot,)`.
      shuffle: the control: the same tree with the words on it shuffled (the report's `mean_cosine` is from before).
      group: another way to make the clusters of a level (data.groups), of what it knows of words in place of vectors.
    Returns: the hierarchy, and a report (plain json types) of how each level came to be.
    Raises:
      ValueError: more clusters than words.
    """
    if group is None:
        vectors = np.asarray(vectors, np.float32)
    vocab_size = vectors.shape[0]
    counts, special = tuple(int(n) for n in clusters if n > 1), tuple(sorted({int(i) for i in special}))
    if counts and counts[0] > vocab_size:
        raise ValueError(f"clusters = {counts}: {counts[0]} clusters for {vocab_size} words; at most one per word")
    own = special if counts and counts[0] - len(special) >= 2 else ()
    points, parents, levels = vectors if group else unit_rows(vectors), [], []
    for level, n in enumerate(counts, start=1):
        apart = np.asarray(own if level == 1 else (), np.int64)
        parent, points, facts = (group or _level)(points, n, apart, seed)
        parents.append(parent)
        levels.append({"level": level} | facts)
    if shuffle and parents:  # after the upper levels: the control is the same tree with other words on it
        common = np.setdiff1d(np.arange(vocab_size), np.asarray(own, np.int64))
        parents[0][common] = np.random.default_rng([seed, 1]).permutation(parents[0][common])
    report = {"clusters": list(counts), "seed": seed, "shuffle": shuffle, "min_ratio": MIN_RATIO,
              "max_ratio": MAX_RATIO, "special": list(special), "special_own_cluster": bool(own),
              "unknown_words": int((abs(vectors).sum(1) == 0).sum()), "levels": levels}
    return Hierarchy.from_parents(parents, vocab_size=vocab_size, special=own), report


def reclustered(vectors: np.ndarray, hierarchy: Hierarchy, counts: np.ndarray, *, seed: int = 0) -> Hierarchy:
    """The same hierarchy with its words clustered anew: k-means as in `build_hierarchy`, from the clusters there are.

    A cluster has the id of that whose words it shares (as many as can be, over all clusters), and with it the same
    place in the levels above. Special words in clusters of their own stay there.

    Args:
      vectors: finite floats [V, E]. A word whose row is zero stays where it is, unless its cluster is too large.
      counts: int [V], how often each word occurs. What a quadratic in log(1 + count) tells of the vectors is taken off:
        frequency is the first thing that a model learns of words, and clusters would be groups by it.
    """
    vectors, old = np.array(vectors, np.float32), hierarchy.parents[0]
    own = [i for i in hierarchy.special if hierarchy.token_count[1][old[i]] == 1]
    words, nodes = np.setdiff1d(np.arange(len(old)), own), np.setdiff1d(np.arange(hierarchy.sizes[1]), old[own])
    known = np.any(vectors != 0, axis=1)
    if known[words].sum() < len(nodes):
        return hierarchy
    often = np.vander(np.log1p(counts.astype(np.float64)), 3)[known]
    vectors[known] -= (often @ np.linalg.lstsq(often, vectors[known], rcond=None)[0]).astype(np.float32)
    was = np.searchsorted(nodes, old[words])
    limits = size_limits(len(old), hierarchy.sizes[1], len(own))
    label, _ = _balanced_clusters(unit_rows(vectors[words]), len(nodes), *limits, seed, was)
    shared = np.zeros((len(nodes), len(nodes)), np.int64)
    np.add.at(shared, (label, was), 1)
    now, name = scipy.optimize.linear_sum_assignment(shared * (len(nodes) + 1) + np.eye(len(nodes), dtype=np.int64),
                                                     maximize=True)  # the same id where it makes no difference
    ids = np.empty(len(nodes), np.int64)
    ids[now] = nodes[name]
    parent = old.copy()
    parent[words] = ids[label]
    return Hierarchy((parent, *hierarchy.parents[1:]), hierarchy.special)


def size_limits(points: int, n: int, apart: int) -> tuple[int, int]:
    """Smallest and largest size of n clusters of so many points, `apart` of them in clusters of their own: rounded
    inwards, but never such that no assignment keeps them."""
    average, rest = points / n, (points - apart) / (n - apart)
    low = min(max(1, math.ceil(MIN_RATIO * average - 1e-9)), math.floor(rest))
    return low, max(math.floor(MAX_RATIO * average + 1e-9), math.ceil(rest))


def set_apart(points: int, n: int, apart: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points that are not `apart`, and clusters int32 [points] in which the others have the last of n as their own."""
    parent = np.zeros(points, np.int32)
    parent[apart] = n - len(apart) + np.arange(len(apart))
    return np.setdiff1d(np.arange(points), apart), parent


def _level(points: np.ndarray, n: int, apart: np.ndarray,
           seed: int) -> tuple[np.ndarray, np.ndarray, dict[str, object]]:
    """Clusters int32 [P] of points [P, E], those `apart` in clusters of their own; centroids [n, E]; facts."""
    common, parent = set_apart(len(points), n, apart)
    low, high = size_limits(len(points), n, len(apart))
    parent[common], moves = _balanced_clusters(points[common], n - len(apart), low, high, seed)
    sizes = np.bincount(parent, minlength=n)
    centroids = unit_rows(sum_by(points, parent, n))
    cosine = float(np.mean(np.sum(points * centroids[parent], 1)[common]))
    return parent, centroids, {"nodes": n, "size_limits": [low, high],
                               "size_min": int(sizes[:n - len(apart)].min()), "size_max": int(sizes.max()),
                               "mean_cosine": cosine, **moves}


def _balanced_clusters(points: np.ndarray, n: int, low: int, high: int, seed: int,
                       old: np.ndarray | None = None) -> tuple[np.ndarray, dict[str, int]]:
    """int32 [P] clusters 0..n-1 of unit or zero rows [P, E], every size within [low, high]; old: where they start."""
    known = np.flatnonzero(points.any(1))
    similarity = np.zeros((len(points), n), np.float32)
    label = np.full(len(points), -1, np.int64)
    if len(known):
        k = min(n, len(known))
        start = None if old is None else unit_rows(sum_by(points, old, n))
        similarity[:, :k] = points @ _kmeans(points[known], k, seed, start).T
        label[known] = similarity[known, :k].argmax(1)
    if old is not None:
        label = np.where(label < 0, old, label)
    moved = _shrink(label, similarity, high)
    sizes = np.bincount(label[label >= 0], minlength=n)
    for word in np.flatnonzero(label < 0):
        label[word] = sizes.argmin()
        sizes[label[word]] += 1
    taken = _grow(label, similarity, low)
    return label.astype(np.int32), {"moved_out_of_large": moved, "moved_into_small": taken}


def _kmeans(points: np.ndarray, n: int, seed: int, start: np.ndarray | None = None) -> np.ndarray:
    """Unit centroids float32 [n, E] of unit rows, by faiss, from all points; start: those to begin with."""
    if n == len(points):
        return points
    import faiss

    # Few points (upper levels) end in poor optima from a random start, many (words) do not: measured.
    few = {"nredo": 10, "init_method": faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS}
    # faiss keeps 256 points per centroid unless told otherwise, and prints about too few points.
    kmeans = faiss.Kmeans(points.shape[1], n, niter=25, seed=seed + 1, spherical=True,
                          max_points_per_centroid=10**9, min_points_per_centroid=1,
                          **(few if start is None and len(points) * n < 100_000 else {}))
    # One thread: the result must not depend on how many cores there are, and on a busy machine the threads
    # wait for each other a hundred times longer than they compute. GPT-2's 50,257 words take seconds.
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        kmeans.train(np.ascontiguousarray(points, np.float32), init_centroids=start)
    finally:
        faiss.omp_set_num_threads(threads)
    return np.nan_to_num(np.asarray(kmeans.centroids, np.float32).reshape(n, -1))


def _shrink(label: np.ndarray, similarity: np.ndarray, high: int) -> int:
    """Moves the farthest words of clusters above `high` to the next best with room; returns how many."""
    sizes = np.bincount(label[label >= 0], minlength=similarity.shape[1])
    moved = 0
    for c in np.flatnonzero(sizes > high):
        members = np.flatnonzero(label == c)
        nearest_first = members[np.argsort(-similarity[members, c], kind="stable")]
        for word in nearest_first[high:]:
            label[word] = np.where(sizes < high, similarity[word], -np.inf).argmax()
            sizes[label[word]] += 1
            moved += 1
        sizes[c] = high
    return moved


def _grow(label: np.ndarray, similarity: np.ndarray, low: int) -> int:
    """Fills clusters below `low` with the words that lose least by it; returns how many moved."""
    sizes = np.bincount(label, minlength=similarity.shape[1])
    taken = 0
    for c in [c for c in np.argsort(sizes, kind="stable") if sizes[c] < low]:
        loss = similarity[np.arange(len(label)), label] - similarity[:, c]
        for word in np.argsort(loss, kind="stable"):
            if sizes[c] >= low:
                break
            if sizes[label[word]] > low:  # never true of c itself
                sizes[label[word]] -= 1
                sizes[c] += 1
                label[word] = c
                taken += 1
    return taken
