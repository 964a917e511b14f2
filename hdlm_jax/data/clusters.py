"""Word embeddings and the clusters made of them: where a `Hierarchy` comes from when none is given.

`embeddings` gives one vector per word, by default from the corpus itself; `build_hierarchy` clusters them;
`write_report` shows what came out; `initial_table` turns them into the first values of a model's embedding
table. A row of zeros means "nothing is known of this word" everywhere in this module.

numpy at import; scipy, faiss, safetensors and matplotlib only inside the functions that use them.
"""

from __future__ import annotations

import concurrent.futures
import heapq
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from hdlm_jax.diffusion.hierarchy import Hierarchy

_CHOICES = "'corpus', 'FILE.npy', 'FILE.safetensors:TENSOR' or 'checkpoint:WORKDIR'"
_SPACE = "\u2423"  # how a space is shown
_CHUNK = 2**21  # tokens counted at a time: bounds the memory of the pair lists


# ---------------------------------------------------------------- embeddings


def embeddings(spec: str, *, vocab_size: int, tokens: np.ndarray | None = None, eot: int | None = None,
               dim: int = 128, window: int = 4, seed: int = 0, max_tokens: int = 50_000_000,
               load_checkpoint_embedding: Callable[[str], np.ndarray] | None = None) -> np.ndarray:
    """One vector per word, float32 [V, E]; words of which nothing is known get zeros.

    Args:
      spec: where the vectors come from: 'corpus' (co-occurrences in `tokens`, no pretrained model needed),
        'FILE.npy', 'FILE.safetensors:TENSOR' (GPT-2's `wte`, say), or 'checkpoint:WORKDIR' (one of our runs).
        Tables longer than V are cut (padding), shorter ones are an error.
      vocab_size: V.
      tokens: int [T], the training tokens (a memmap will do); 'corpus' only.
      eot: id of the end-of-text token; no co-occurrence reaches across it.
      dim: E at most, for 'corpus'. The other sources keep their width.
      window: words up to this far apart co-occur, with weight 1 / distance.
      seed: of the randomised SVD.
      max_tokens: a longer corpus is counted on this many of its tokens, in chunks spread evenly over it.
      load_checkpoint_embedding: WORKDIR -> float [>= V, E]; passed in, since text/ does not import run/.

    Raises:
      ValueError: unknown source, missing tokens, too few rows, wrong shape, values that are not finite.
      FileNotFoundError: no such file.
    """
    if spec == "corpus":
        if tokens is None or len(tokens) == 0:
            raise ValueError("embeddings = 'corpus' needs training tokens, there are none: prepare the data")
        return corpus_embeddings(tokens, vocab_size, eot=eot, dim=dim, window=window, seed=seed,
                                 max_tokens=max_tokens)
    if spec.startswith("checkpoint:"):
        if load_checkpoint_embedding is None:
            raise ValueError(f"embeddings = {spec!r}: no way to read checkpoints was passed in")
        table = load_checkpoint_embedding(spec.removeprefix("checkpoint:"))
    elif spec.endswith(".npy"):
        _need_file(spec)
        table = np.load(spec, allow_pickle=False)
    elif ".safetensors" in spec:
        table = _safetensors(spec)
    else:
        raise ValueError(f"embeddings = {spec!r} is not one of {_CHOICES}")
    table = np.asarray(table)
    if table.ndim != 2:
        raise ValueError(f"embeddings = {spec!r} has shape {table.shape}: it must be [words, width]")
    if len(table) < vocab_size:
        raise ValueError(f"embeddings = {spec!r} has {len(table)} rows, but the tokenizer has {vocab_size} "
                         "words: it belongs to another tokenizer")
    table = np.ascontiguousarray(table[:vocab_size], np.float32)
    if not np.isfinite(table).all():
        raise ValueError(f"embeddings = {spec!r} holds values that are not finite")
    return table


def corpus_embeddings(tokens: np.ndarray, vocab_size: int, *, eot: int | None = None, dim: int = 128,
                      window: int = 4, seed: int = 0, max_tokens: int = 50_000_000) -> np.ndarray:
    """PPMI of co-occurrences, then a truncated SVD: float32 [V, min(dim, V)], rows U sqrt(S).

    Left and right neighbours are told apart (2V contexts): on openstax text (BPE 4,096, 64 clusters) the
    clusters of adjacent tokens then share .61 nats, against .44 with the two merged.
    """
    matrix = ppmi(cooccurrence(tokens, vocab_size, eot=eot, window=window, max_tokens=max_tokens))
    left, values = _truncated_svd(matrix, min(dim, vocab_size), seed)
    out = np.zeros((vocab_size, min(dim, vocab_size)), np.float32)
    out[:, :len(values)] = left * np.sqrt(values)  # a corpus of few words may have fewer directions
    return out


def cooccurrence(tokens: np.ndarray, vocab_size: int, *, eot: int | None = None, window: int = 4,
                 max_tokens: int = 50_000_000, chunk: int = _CHUNK) -> Any:
    """Sparse float32 [V, V]: how often word j follows word i within `window`, weighted 1 / distance.

    `eot` takes no part and nothing is counted across it.
    """
    import scipy.sparse

    if window < 1:
        raise ValueError(f"window = {window}: words must be allowed to be at least 1 apart")
    total = None
    for start in _chunk_starts(len(tokens), chunk, max_tokens):
        part = np.asarray(tokens[start:start + chunk + window]).astype(np.int64)
        if part.size and (part.min() < 0 or part.max() >= vocab_size):
            raise ValueError(f"token {part.max()} is outside the vocabulary 0..{vocab_size - 1}")
        is_eot = part == eot if eot is not None else np.zeros(len(part), bool)
        document = np.cumsum(is_eot)
        rows, cols, weights = [], [], []
        for distance in range(1, window + 1):
            n = min(chunk, len(part) - distance)  # a pair belongs to the chunk of its first word
            if n <= 0:
                break
            ok = (document[:n] == document[distance:distance + n]) & ~is_eot[:n]
            rows.append(part[:n][ok])
            cols.append(part[distance:distance + n][ok])
            weights.append(np.full(len(rows[-1]), 1 / distance, np.float32))
        if rows:
            pairs = (np.concatenate(rows), np.concatenate(cols))
            counted = scipy.sparse.coo_matrix((np.concatenate(weights), pairs), (vocab_size,) * 2).tocsr()
            total = counted if total is None else total + counted
    return total if total is not None else scipy.sparse.csr_matrix((vocab_size,) * 2, dtype=np.float32)


def ppmi(follows: Any, smoothing: float = 0.75) -> Any:
    """Positive pointwise mutual information, sparse float32 [V, 2V], of words with right and left contexts.

    max(0, log p(w, c) / (p(w) p'(c))), p'(c) ~ count(c)^smoothing, in nats. Columns 0..V-1: context c follows
    w; columns V..2V-1: c precedes w. `follows` is what `cooccurrence` gives.
    """
    import scipy.sparse

    counts = scipy.sparse.hstack([follows, follows.T]).tocoo()
    word = np.asarray(counts.sum(1), np.float64).ravel()
    context = np.asarray(counts.sum(0), np.float64).ravel() ** smoothing
    context /= max(context.sum(), 1e-300)
    value = np.log(counts.data / (word[counts.row] * context[counts.col])).astype(np.float32)
    keep = value > 0
    return scipy.sparse.csr_matrix((value[keep], (counts.row[keep], counts.col[keep])), counts.shape)


def _truncated_svd(matrix: Any, rank: int, seed: int, oversample: int = 16,
                   iterations: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors [V, <= rank] and values, falling, by randomised subspace iteration.

    Deterministic (seeded start, signs fixed); exact when rank + oversample reaches the rank of the matrix.
    Only products are large: LAPACK's QR and SVD of tall matrices are slow where cores are shared.
    """
    transposed = matrix.T.tocsr()
    rng = np.random.default_rng(seed)
    width = min(rank + oversample, *matrix.shape)
    basis = _orthonormal(_product(matrix, rng.standard_normal((matrix.shape[1], width), np.float32)))
    for _ in range(iterations):
        basis = _orthonormal(_product(transposed, basis))
        basis = _orthonormal(_product(matrix, basis))
    small = _product(transposed, basis).astype(np.float64)
    squares, turn = np.linalg.eigh(small.T @ small)
    left = (basis @ turn[:, ::-1].astype(np.float32))[:, :rank]
    values = np.sqrt(np.maximum(squares[::-1], 0.0))[:rank]
    if left.size:
        left *= np.sign(left[np.abs(left).argmax(0), np.arange(left.shape[1])] + 1e-30)
    left[np.diff(matrix.indptr) == 0] = 0.0  # a word without contexts: exactly nothing, not rounding errors
    return left, values


def _orthonormal(columns: np.ndarray) -> np.ndarray:
    """An orthonormal basis float32 of the span of tall `columns`, by its Gram matrix in float64."""
    wide = columns.astype(np.float64)
    squares, turn = np.linalg.eigh(wide.T @ wide)
    keep = squares > 1e-12 * squares.max(initial=1e-300)
    return (wide @ (turn[:, keep] / np.sqrt(squares[keep]))).astype(np.float32)


def _product(matrix: Any, dense: np.ndarray) -> np.ndarray:
    """matrix @ dense in two threads: scipy's sparse product runs on one core and lets others run."""
    half = int(np.searchsorted(matrix.indptr, matrix.nnz // 2))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return np.concatenate(list(pool.map(lambda part: part @ dense, (matrix[:half], matrix[half:]))))


def _chunk_starts(num_tokens: int, chunk: int, max_tokens: int) -> list[int]:
    starts = list(range(0, num_tokens, chunk))
    wanted = max(1, max_tokens // chunk)
    if len(starts) <= wanted:
        return starts
    return [starts[i] for i in np.linspace(0, len(starts) - 1, wanted).round().astype(int)]


def _need_file(path: str) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"embeddings file {path} does not exist")


def _safetensors(spec: str) -> np.ndarray:
    path, _, tensor = spec.rpartition(".safetensors")
    path, tensor = path + ".safetensors", tensor.removeprefix(":")
    _need_file(path)
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(f"embeddings = {spec!r} needs the safetensors package: "
                          "pip install safetensors, or save the table as .npy") from error
    with safe_open(path, framework="np") as file:
        names = sorted(file.keys())
        if tensor not in names:
            shapes = [f"{name} {file.get_slice(name).get_shape()}" for name in names]
            shown = ", ".join(shapes[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
            raise ValueError(f"{path} has no tensor {tensor!r} (FILE.safetensors:TENSOR); it has {shown}")
        return file.get_tensor(tensor)


def check_clusters(clusters: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """The numbers of clusters, fine to coarse, without closing ones; () is MDLM. Raises ValueError."""
    out = tuple(int(n) for n in clusters)
    if any(n < 1 for n in out):
        raise ValueError(f"clusters = {out}: every number of clusters must be at least 1")
    if any(fine <= coarse for fine, coarse in zip(out, out[1:], strict=False)):
        raise ValueError(f"clusters = {out} must fall strictly, fine to coarse, as in (256, 16)")
    if out and out[0] > vocab_size:
        raise ValueError(f"clusters = {out}: {out[0]} clusters for {vocab_size} words; at most one per word")
    return tuple(n for n in out if n > 1)


def build_hierarchy(vectors: np.ndarray, clusters: Sequence[int] = (64,), *, special: Sequence[int] = (),
                    seed: int = 0, min_ratio: float = 0.1, max_ratio: float = 5.0,
                    shuffle: bool = False) -> tuple[Hierarchy, dict[str, Any]]:
    """Clusters words by spherical k-means (cosine), then clusters the clusters' centroids, and so on.

    A node of any level holds between `min_ratio` and `max_ratio` times the average number of nodes of the
    level below (words at level 1), V / n, rounded inwards: k-means alone does not keep that, so the
    farthest words of a cluster that is too large move to the next best cluster with room, and one that is
    too small takes the words that lose least. Words with a zero vector go one by one to the smallest
    cluster. Each special word is a cluster of its own, counted in n_1, if at least two other clusters
    remain; otherwise it is a word like others. Above level 1 its cluster is clustered as any other.

    Args:
      vectors: float [V, E].
      clusters: (n_1, n_2, ...), strictly falling; () or (1,) gives MDLM.
      special: word ids, usually `(eot,)`.
      seed: of k-means and of the shuffle.
      min_ratio, max_ratio: limits of the sizes, as a multiple of the average.
      shuffle: the control: the same tree with the words on it shuffled, so that all sizes are the same (the
        report's `mean_cosine` is that of the clusters before shuffling).

    Returns:
      The hierarchy and a report (plain json types): how each level came to be.

    Raises:
      ValueError: clusters that do not fall or exceed V, ratios on the wrong side of 1, vectors not finite.
    """
    vectors = np.asarray(vectors, np.float32)
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ValueError(f"embeddings of shape {vectors.shape} must be a finite [words, width] array")
    if not 0 <= min_ratio <= 1 <= max_ratio:
        raise ValueError(f"need 0 <= min_ratio <= 1 <= max_ratio, not {min_ratio} and {max_ratio}")
    vocab_size = len(vectors)
    special = tuple(sorted({int(i) for i in special}))
    if special and not 0 <= special[0] <= special[-1] < vocab_size:
        raise ValueError(f"special words {special} are outside 0..{vocab_size - 1}")
    counts = check_clusters(clusters, vocab_size)
    own = special if counts and counts[0] - len(special) >= 2 else ()
    report: dict[str, Any] = {"clusters": list(counts), "seed": seed, "shuffle": shuffle,
                              "min_ratio": min_ratio, "max_ratio": max_ratio,
                              "special": list(special), "special_own_cluster": bool(own),
                              "unknown_words": int((~vectors.any(1)).sum()), "levels": []}
    points, parents = _unit(vectors), []
    for level, n in enumerate(counts, start=1):
        apart = np.asarray(own if level == 1 else (), np.int64)
        common = np.setdiff1d(np.arange(len(points)), apart)
        parent = np.empty(len(points), np.int32)
        parent[apart] = n - len(apart) + np.arange(len(apart))
        low, high = _limits(len(points), n, len(apart), min_ratio, max_ratio)
        parent[common], moves = _balanced_clusters(points[common], n - len(apart), low, high, seed)
        sizes = np.bincount(parent, minlength=n)
        centroids = _unit(_sum_by(points, parent, n))
        report["levels"].append({
            "level": level, "nodes": n, "size_limits": [low, high],
            "size_min": int(sizes[:n - len(apart)].min()), "size_max": int(sizes.max()),
            "mean_cosine": float(np.mean(np.sum(points * centroids[parent], 1)[common])), **moves})
        parents.append(parent)
        points = centroids
    if shuffle and parents:  # after the upper levels: the control is the same tree with other words on it
        common = np.setdiff1d(np.arange(vocab_size), np.asarray(own, np.int64))
        parents[0][common] = np.random.default_rng([seed, 1]).permutation(parents[0][common])
    return Hierarchy.from_parents(parents, vocab_size=vocab_size, special=own), report


def _limits(members: int, nodes: int, apart: int, min_ratio: float, max_ratio: float) -> tuple[int, int]:
    """Smallest and largest size allowed, rounded inwards, but never such that no assignment keeps them."""
    average, rest = members / nodes, (members - apart) / (nodes - apart)
    low = min(max(1, math.ceil(min_ratio * average - 1e-9)), math.floor(rest))
    high = max(math.floor(max_ratio * average + 1e-9), math.ceil(rest))
    return low, high


def _balanced_clusters(points: np.ndarray, n: int, low: int, high: int,
                       seed: int) -> tuple[np.ndarray, dict[str, int]]:
    """int32 [P] clusters 0..n-1 of unit or zero rows [P, E], every size within [low, high]."""
    known = np.flatnonzero(points.any(1))
    similarity = np.zeros((len(points), n), np.float32)
    label = np.full(len(points), -1, np.int64)
    if len(known):
        k = min(n, len(known))
        similarity[:, :k] = points @ _kmeans(points[known], k, seed).T
        label[known] = similarity[known, :k].argmax(1)
    moved = _shrink(label, similarity, high)
    heap = [(int(size), c) for c, size in enumerate(np.bincount(label[label >= 0], minlength=n))]
    heapq.heapify(heap)
    for word in np.flatnonzero(label < 0):
        size, c = heapq.heappop(heap)
        label[word] = c
        heapq.heappush(heap, (size + 1, c))
    taken = _grow(label, similarity, low)
    return label.astype(np.int32), {"moved_out_of_large": moved, "moved_into_small": taken}


def _kmeans(points: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Unit centroids float32 [n, E] of unit rows, by faiss, from all points."""
    if n == len(points):
        return points
    import faiss

    # Few points (upper levels) end in poor optima from a random start, many (words) do not: measured.
    few = {"nredo": 10, "init_method": faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS}
    # faiss keeps 256 points per centroid unless told otherwise, and prints about too few points.
    kmeans = faiss.Kmeans(points.shape[1], n, niter=25, seed=seed + 1, spherical=True,
                          max_points_per_centroid=10**9, min_points_per_centroid=1,
                          **(few if len(points) * n < 100_000 else {}))
    # One thread: the result must not depend on how many cores there are, and on a busy machine the threads
    # wait for each other a hundred times longer than they compute. GPT-2's 50,257 words take seconds.
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        kmeans.train(np.ascontiguousarray(points, np.float32))
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
    for c in np.argsort(sizes, kind="stable"):
        if sizes[c] >= low:
            continue
        loss = similarity[np.arange(len(label)), label] - similarity[:, c]
        for word in np.argsort(loss, kind="stable"):
            if sizes[c] == low:
                break
            if sizes[label[word]] > low:  # never true of c itself
                sizes[label[word]] -= 1
                sizes[c] += 1
                label[word] = c
                taken += 1
    return taken


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; zero rows stay zero."""
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0)


def _sum_by(rows: np.ndarray, node: np.ndarray, n: int) -> np.ndarray:
    out = np.zeros((n, rows.shape[1]), rows.dtype)
    np.add.at(out, node, rows)
    return out


# ---------------------------------------------------------------- first values of a model's embeddings


def initial_table(vectors: np.ndarray, hierarchy: Hierarchy, width: int, scale: float = 1.0,
                  seed: int = 0) -> np.ndarray:
    """First values of an embedding table, float32 [padded_symbols, width], from the clustering embeddings.

    Word rows are their vectors (made unit, common mean removed, the leading `width` directions kept or padded
    with zeros, turned by a random rotation so that no coordinate is special); cluster rows are the mean of
    their words'. All are scaled to the standard deviation that uniform(+-1/sqrt(width)) has, times `scale`.
    The mask, the padding and symbols of which nothing is known are uniform(+-1/sqrt(width)).
    """
    if len(vectors) != hierarchy.vocab_size:
        raise ValueError(f"embeddings have {len(vectors)} rows, the hierarchy {hierarchy.vocab_size} words")
    rng = np.random.default_rng(seed)
    bound = 1 / math.sqrt(width)
    table = rng.uniform(-bound, bound, (hierarchy.padded_symbols, width)).astype(np.float32)
    rotation = np.linalg.qr(rng.standard_normal((width, width)))[0]
    unit = _unit(np.asarray(vectors, np.float64))
    known = unit.any(1)
    if not known.any():
        return table
    unit[known] -= unit[known].mean(0)
    leading = np.linalg.svd(unit.T @ unit)[0][:, :width]  # [E, min(E, width)], strongest direction first
    words = unit @ leading @ rotation[:leading.shape[1]]
    rows = [words]
    for level in range(1, hierarchy.num_levels):
        rows.append(_sum_by(_unit(words), hierarchy.anc[level], hierarchy.sizes[level]))
    length = scale * math.sqrt(1 / 3)  # of a row whose entries have variance 1 / (3 width)
    for offset, part in zip(hierarchy.offsets, rows, strict=False):
        norm = np.linalg.norm(part, axis=1)
        some = np.flatnonzero(norm > 1e-6)
        table[offset + some] = part[some] * (length / norm[some])[:, None]
    return table


# ---------------------------------------------------------------- report and picture


def write_report(hierarchy: Hierarchy, vectors: np.ndarray, decode: Callable[[list[int]], str],
                 counts: np.ndarray, out_prefix: str | os.PathLike) -> dict[str, Path | None]:
    """Writes PREFIX.txt (sizes and sample words of every cluster) and PREFIX.png (the embedding plane).

    Args:
      hierarchy: with K >= 2 levels, or MDLM (then the text says so).
      vectors: float [V, E].
      decode: list of word ids -> text.
      counts: int [V], how often each word occurs in the training tokens.
      out_prefix: path without ending.

    Returns:
      {"text": path, "picture": path, or None where matplotlib is missing or there is nothing to draw}.
    """
    prefix = Path(out_prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    counts = np.asarray(counts, np.int64)
    if len(counts) != hierarchy.vocab_size or len(vectors) != hierarchy.vocab_size:
        raise ValueError(f"report: {len(vectors)} vectors and {len(counts)} counts for "
                         f"{hierarchy.vocab_size} words")
    text = prefix.with_name(prefix.name + ".txt")
    text.write_text(_report_text(hierarchy, vectors, decode, counts), encoding="utf-8")
    picture = prefix.with_name(prefix.name + ".png")
    drawn = _picture(hierarchy, vectors, decode, counts, picture)
    return {"text": text, "picture": picture if drawn else None}


def _show(decode: Callable[[list[int]], str], word: int) -> str:
    """A word as it can stand in a list: spaces and control characters visible."""
    text = decode([int(word)])
    return (text if text.isprintable() and "\ufffd" not in text else ascii(text)[1:-1]).replace(" ", _SPACE)


def _report_text(hierarchy: Hierarchy, vectors: np.ndarray, decode: Callable[[list[int]], str],
                 counts: np.ndarray, words_shown: int = 16) -> str:
    lines = [f"Hierarchy {hierarchy.fingerprint[:12]}: {hierarchy.sizes} nodes a level, last the mask.",
             f"{int((counts > 0).sum())} of {hierarchy.vocab_size} words occur in {int(counts.sum())} "
             f"training tokens. {_SPACE} is a space; words are listed most frequent first."]
    if hierarchy.num_levels == 1:
        return "\n".join([*lines, "No clusters: this is masked diffusion (MDLM)."]) + "\n"
    unit = _unit(np.asarray(vectors, np.float32))
    total = max(int(counts.sum()), 1)
    share = [np.bincount(a, counts, n) / total for a, n in zip(hierarchy.anc, hierarchy.sizes, strict=True)]
    lines.append(f"Unigram entropy of the words {_entropy(share[0]):.3f} nats.")
    common = np.setdiff1d(np.arange(hierarchy.vocab_size), hierarchy.special)
    for level in range(1, hierarchy.num_levels):
        anc, n = hierarchy.anc[level], hierarchy.sizes[level]
        sizes = np.bincount(anc[common], minlength=n)
        sizes = sizes[sizes > 0]  # a special word's own cluster says nothing about the spread
        close = np.sum(unit * _unit(_sum_by(unit, anc, n))[anc], 1)[common][unit[common].any(1)]
        quartiles = "/".join(f"{q:.0f}" for q in np.quantile(sizes, (0.25, 0.5, 0.75)))
        cosine = close.mean() if len(close) else 0.0
        lines += ["",
                  f"Level {level}: {n} clusters; words in each: mean {sizes.mean():.1f}, smallest "
                  f"{sizes.min()}, quartiles {quartiles}, largest {sizes.max()} (special words left out).",
                  f"  Mean cosine of a word and its centroid {cosine:.3f}; entropy of the cluster "
                  f"{_entropy(share[level]):.3f} nats (at most log n = {math.log(n):.3f})."]
    frequent_first = np.argsort(-counts, kind="stable")
    members: list[list[int]] = [[] for _ in range(hierarchy.sizes[1])]
    for word in frequent_first:
        members[hierarchy.anc[1][word]].append(int(word))
    # Clusters stand under their parents, each list by share of the corpus.
    keys = [-share[1]]
    for level in range(2, hierarchy.num_levels):
        above = hierarchy.level1_anc[level]
        keys += [above, -share[level][above]]
    previous = [-1] * (hierarchy.num_levels + 1)
    for node in np.lexsort(keys):
        for level in range(hierarchy.num_levels - 1, 1, -1):
            above = int(hierarchy.level1_anc[level][node])
            if previous[level] != above:
                previous[level] = above
                clusters, size = hierarchy.level1_count[level][above], hierarchy.word_count[level][above]
                lines += ["", f"== Level {level}, node {above}: {clusters} clusters, {size} words, "
                              f"{share[level][above]:.2%} of tokens"]
        words = members[node]
        used = sum(counts[w] > 0 for w in words)
        mark = " (special)" if len(words) == 1 and words[0] in hierarchy.special else ""
        sample = "  ".join(_show(decode, w) for w in words[:words_shown])
        lines += ["", f"cluster {node}{mark}: {len(words)} words ({used} occur), "
                      f"{share[1][node]:.2%} of tokens", f"  {sample}"]
    return "\n".join(lines) + "\n"


def _entropy(p: np.ndarray) -> float:
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def plane(points: np.ndarray, neighbours: int = 12, epochs: int = 300, seed: int = 0) -> np.ndarray:
    """A map float32 [P, 2] of unit rows [P, E] in which near neighbours (cosine) stay near.

    Two principal directions leave most words in one blob, so they are only the start: then words are pulled
    to their nearest neighbours and pushed off random others, with UMAP's forces, for a fixed number of
    rounds. For looking at, P up to a few thousand; distances between far groups mean little.
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


def _picture(hierarchy: Hierarchy, vectors: np.ndarray, decode: Callable[[list[int]], str],
             counts: np.ndarray, path: Path, max_words: int = 3000) -> bool:
    """Draws the most frequent words, coloured by level-1 cluster; False where it could not."""
    unit = _unit(np.asarray(vectors, np.float32))
    drawable = np.linalg.norm(unit, axis=1) > 0
    drawable[list(hierarchy.special)] = False
    words = [w for w in np.argsort(-counts, kind="stable") if drawable[w]][:max_words]
    if hierarchy.num_levels == 1 or len(words) < 3:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import hsv_to_rgb
        from matplotlib.figure import Figure
        from matplotlib.patheffects import withStroke
    except ImportError:
        logging.warning("no picture of the clusters: matplotlib is missing (pip install 'hdlm_jax[plots]')")
        return False
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
    axes.scatter(at[:, 0], at[:, 1], s=size, c=colours[np.searchsorted(present, cluster)], alpha=0.75,
                 linewidths=0)
    axes.set(xticks=[], yticks=[], title=(
        f"The {len(words)} most frequent words, coloured by cluster ({hierarchy.sizes[1]} of them). "
        "Words that stand close have like neighbours in the text."))
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
    figure.savefig(path)
    return True
