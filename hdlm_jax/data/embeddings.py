"""One vector per word, from co-occurrences in the corpus or from a given table; first values of a model's embedding.

A row of zeros means "nothing is known of this word".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.models.weight_files import open_safetensors

if TYPE_CHECKING:
    import scipy.sparse

_CHUNK = 2**21  # tokens counted at a time: bounds the memory of the pair lists


class Tokens(Protocol):
    """Integers [T]: an array, a memory map, or a `data.pipeline.Split`."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> np.ndarray: ...


def given_embeddings(spec: str, vocab_size: int, load_checkpoint_embedding: Callable[[str], np.ndarray]) -> np.ndarray:
    """The table that `spec` names, float32 [V, E]. Tables longer than V are cut (padding).

    Args:
      spec: 'FILE.npy', 'FILE.safetensors:TENSOR' (GPT-2's `wte`, say), or 'checkpoint:WORKDIR' (one of our runs).
      load_checkpoint_embedding: WORKDIR -> float [>= V, E]; passed in, since data imports no room above it.

    Raises:
      ValueError: unknown source, too few rows, wrong shape, values that are not finite.
      FileNotFoundError: no such file.
    """
    if spec.startswith("checkpoint:"):
        table = load_checkpoint_embedding(spec.removeprefix("checkpoint:"))
    elif spec.endswith(".npy"):
        table = np.load(_existing(spec), allow_pickle=False)
    elif ".safetensors" in spec:
        table = _safetensors(spec)
    else:
        raise ValueError(f"embeddings = {spec!r} is not one of 'corpus', 'FILE.npy', 'FILE.safetensors:TENSOR' or "
                         "'checkpoint:WORKDIR'")
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


def _existing(path: str) -> str:
    if not Path(path).is_file():
        raise FileNotFoundError(f"embeddings file {path} does not exist")
    return path


def _safetensors(spec: str) -> np.ndarray:
    stem, _, name = spec.rpartition(".safetensors")
    path, name = _existing(f"{stem}.safetensors"), name.removeprefix(":")
    tensors = open_safetensors([path])
    if name not in tensors:
        shapes = [f"{other} {list(tensors[other].shape)}" for other in sorted(tensors)]
        shown = ", ".join(shapes[:20]) + (f", ... ({len(shapes)} in all)" if len(shapes) > 20 else "")
        raise ValueError(f"{path} has no tensor {name!r} (FILE.safetensors:TENSOR); it has {shown}")
    return tensors[name].read()


def corpus_embeddings(tokens: Tokens, vocab_size: int, *, eot: int | None = None, dim: int = 128,
                      window: int = 4, seed: int = 0, max_tokens: int = 50_000_000) -> np.ndarray:
    """PPMI of co-occurrences, then a truncated SVD: float32 [V, min(dim, V)], rows U sqrt(S).

    Left and right neighbours are told apart (2V contexts): on openstax text (BPE 4,096, 64 clusters) the
    clusters of adjacent tokens then share .61 nats, against .44 with the two merged.

    Args: those of `cooccurrence`; dim: of a vector, at most; seed: of the randomised SVD.
    """
    matrix = ppmi(cooccurrence(tokens, vocab_size, eot=eot, window=window, max_tokens=max_tokens))
    left, values = _truncated_svd(matrix, min(dim, vocab_size), seed)
    out = np.zeros((vocab_size, min(dim, vocab_size)), np.float32)
    out[:, :len(values)] = left * np.sqrt(values)  # a corpus of few words may have fewer directions
    return out


def cooccurrence(tokens: Tokens, vocab_size: int, *, eot: int | None = None, window: int = 4,
                 max_tokens: int = 50_000_000, chunk: int = _CHUNK) -> scipy.sparse.csr_matrix:
    """Sparse float32 [V, V]: how often word j follows word i within `window`, weighted 1 / distance.

    `eot` takes no part and nothing is counted across it. More than `max_tokens` are counted on so many of them, in
    chunks spread evenly over all.
    """
    import scipy.sparse

    total = scipy.sparse.csr_matrix((vocab_size, vocab_size), dtype=np.float32)
    for start in _chunk_starts(len(tokens), chunk, max_tokens):
        part = np.asarray(tokens[start:start + chunk + window]).astype(np.int64)
        if part.size and (part.min() < 0 or part.max() >= vocab_size):
            raise ValueError(f"token {part.max()} is outside the vocabulary 0..{vocab_size - 1}")
        is_eot = np.equal(part, -1 if eot is None else eot)
        document = np.cumsum(is_eot)
        rows, cols, weights = [], [], []
        for distance in range(1, min(window, len(part) - 1) + 1):
            n = min(chunk, len(part) - distance)  # a pair belongs to the chunk of its first word
            ok = (document[:n] == document[distance:distance + n]) & ~is_eot[:n]
            rows.append(part[:n][ok])
            cols.append(part[distance:distance + n][ok])
            weights.append(np.full(len(rows[-1]), 1 / distance, np.float32))
        if rows:
            pairs = (np.concatenate(rows), np.concatenate(cols))
            total += scipy.sparse.coo_matrix((np.concatenate(weights), pairs), total.shape).tocsr()
    return total


def ppmi(follows: scipy.sparse.csr_matrix, smoothing: float = 0.75) -> scipy.sparse.csr_matrix:
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


def _truncated_svd(matrix: scipy.sparse.csr_matrix, rank: int, seed: int, oversample: int = 16,
                   iterations: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors [V, <= rank] and values, falling, by randomised subspace iteration.

    Deterministic (seeded start, signs fixed); exact when rank + oversample reaches the rank of the matrix.
    Only products are large: LAPACK's QR and SVD of tall matrices are slow where cores are shared.
    """
    transposed = matrix.T.tocsr()
    rng = np.random.default_rng(seed)
    width = min(rank + oversample, *matrix.shape)
    basis = _orthonormal(matrix @ rng.standard_normal((matrix.shape[1], width), np.float32))
    for _ in range(iterations):
        basis = _orthonormal(transposed @ basis)
        basis = _orthonormal(matrix @ basis)
    small = (transposed @ basis).astype(np.float64)
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


def _chunk_starts(num_tokens: int, chunk: int, max_tokens: int) -> list[int]:
    starts = range(0, num_tokens, chunk)
    count = min(len(starts), max(1, max_tokens // chunk))
    return [starts[i] for i in np.linspace(0, len(starts) - 1, count).round().astype(int)]


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; zero rows stay zero."""
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0)


def sum_by(rows: np.ndarray, node: np.ndarray, n: int) -> np.ndarray:
    """Sums [n, E] of the rows [P, E] of each node; node: int [P]."""
    out = np.zeros((n, rows.shape[1]), rows.dtype)
    np.add.at(out, node, rows)
    return out


def initial_table(vectors: np.ndarray, hierarchy: Hierarchy, width: int, seed: int = 0) -> np.ndarray:
    """First values of an embedding table, float32 [padded_states, width], from the clustering embeddings.

    A word's row is its vector: made unit, common mean removed, the leading `width` directions kept or padded with
    zeros, turned by a random rotation so that no coordinate is special. A cluster's is the mean of its words'. All
    are scaled to the standard deviation of uniform(+-1/sqrt(width)); the mask, the padding and symbols of which nothing
    is known are drawn from it.
    """
    if len(vectors) != hierarchy.vocab_size:
        raise ValueError(f"embeddings have {len(vectors)} rows, the hierarchy {hierarchy.vocab_size} words")
    rng = np.random.default_rng(seed)
    bound = 1 / math.sqrt(width)
    table = rng.uniform(-bound, bound, (hierarchy.padded_states, width)).astype(np.float32)
    rotation = np.linalg.qr(rng.standard_normal((width, width)))[0]
    unit = unit_rows(np.asarray(vectors, np.float64))
    known = unit.any(1)
    if not known.any():
        return table
    unit[known] -= unit[known].mean(0)
    leading = np.linalg.svd(unit.T @ unit)[0][:, :width]  # [E, min(E, width)], strongest direction first
    words = unit @ leading @ rotation[:leading.shape[1]]
    rows = [words]
    for level in range(1, hierarchy.num_levels):
        rows.append(sum_by(unit_rows(words), hierarchy.anc[level], hierarchy.sizes[level]))
    length = math.sqrt(1 / 3)  # of a row whose entries have variance 1 / (3 width)
    for offset, part in zip(hierarchy.offsets, rows, strict=False):
        norm = np.linalg.norm(part, axis=1)
        some = np.flatnonzero(norm > 1e-6)
        table[offset + some] = part[some] * (length / norm[some])[:, None]
    return table
