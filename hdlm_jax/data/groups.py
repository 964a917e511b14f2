"""Clusters of words for comparison, by what is counted in the training tokens: by frequency, and Brown's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hdlm_jax.data.clustering import Grouping, set_apart, size_limits
from hdlm_jax.data.embeddings import sum_by

if TYPE_CHECKING:
    import scipy.sparse

PASSES = 5  # over all words, of the exchange; fewer where one moves nothing


def by_frequency(counts: np.ndarray, n: int, apart: np.ndarray, seed: int
                 ) -> tuple[np.ndarray, np.ndarray, dict[str, object]]:
    """Groups of equally many neighbours in the order of their counts [P, 1], the most frequent first (a Grouping)."""
    common, parent = set_apart(len(counts), n, apart)
    order = common[np.argsort(-counts[common, 0], kind="stable")]
    for group, part in enumerate(np.array_split(order, n - len(apart))):
        parent[part] = group
    return parent, sum_by(counts, parent, n), {"nodes": n}


def by_bigrams(counts: scipy.sparse.csr_matrix, n: int, apart: np.ndarray, seed: int
               ) -> tuple[np.ndarray, scipy.sparse.csr_matrix, dict[str, object]]:
    """Clusters whose bigrams have much mutual information, by exchange (a Grouping): Brown et al. 1992, after Martin,
    Liermann and Ney 1998, within the limits of size that all clusters have.

    Words begin in turn, by frequency, in all clusters; then each, most frequent first, moves to where the class
    bigram model's likelihood is highest, PASSES times over. Greedy: an optimum of single moves.

    Args:
      counts: float [P, P], how often node j follows node i.
    """
    import scipy.sparse

    counts = counts.astype(np.float64).tocsr()
    follows, precedes, itself = counts, counts.T.tocsr(), counts.diagonal()
    common, parent = set_apart(counts.shape[0], n, apart)
    low, high = size_limits(counts.shape[0], n, len(apart))
    seen = np.asarray(counts.sum(0)).ravel() + np.asarray(counts.sum(1)).ravel()
    order = common[np.argsort(-seen[common], kind="stable")]
    parent[order] = np.arange(len(order)) % (n - len(apart))
    table = _Bigrams(follows, parent, n)
    sizes = np.bincount(parent, minlength=n)
    allowed, moves = np.arange(n) < n - len(apart), []
    for _ in range(PASSES):
        moved = 0
        for word in order[seen[order] > 0]:
            was = parent[word]
            if sizes[was] <= low:
                continue
            right, left = (_neighbours(pairs, word, parent, n) for pairs in (follows, precedes))
            table.add(was, -right, -left, -itself[word])
            open_to = allowed & ((sizes < high) | (np.arange(n) == was))
            gain = np.where(open_to, table.gain(right, left, itself[word]), -np.inf)
            best = int(gain.argmax())
            if gain[best] <= gain[was] + 1e-9 * abs(gain[was]):
                best = int(was)
            table.add(best, right, left, itself[word])
            parent[word] = best
            sizes[was] -= 1
            sizes[best] += 1
            moved += best != was
        moves.append(int(moved))
        if not moved:
            break
    between = scipy.sparse.csr_matrix(_Bigrams(follows, parent, n).counts)
    return parent, between, {"nodes": n, "size_limits": [low, high], "moves": moves,
                             "mutual_information": mutual_information(between.toarray())}


def mutual_information(counts: np.ndarray) -> float:
    """Of neighbours, in nats, by how often each [n, n] follows each."""
    total = max(float(counts.sum()), 1.0)
    return float((_xlogx(counts).sum() - _xlogx(counts.sum(0)).sum() - _xlogx(counts.sum(1)).sum()
                  + _xlogx(np.asarray(total))) / total)


def _xlogx(x: np.ndarray) -> np.ndarray:
    return x * np.log(np.maximum(x, 1e-300))


def _neighbours(counts: scipy.sparse.csr_matrix, word: int, parent: np.ndarray, n: int) -> np.ndarray:
    """How often each cluster [n] stands next to a word, the word itself left out."""
    part = slice(counts.indptr[word], counts.indptr[word + 1])
    others, many = counts.indices[part], counts.data[part]
    return np.bincount(parent[others], np.where(others == word, 0.0, many), n)


class _Bigrams:
    """How often clusters follow each other [n, n], and what a word would add to the likelihood in each of them."""

    def __init__(self, follows: scipy.sparse.csr_matrix, parent: np.ndarray, n: int) -> None:
        pairs = follows.tocoo()
        self.counts = np.bincount(parent[pairs.row].astype(np.int64) * n + parent[pairs.col], pairs.data,
                                  n * n).reshape(n, n)
        self.value = _xlogx(self.counts)

    def add(self, cluster: int, right: np.ndarray, left: np.ndarray, itself: float) -> None:
        """A word with these neighbours comes into a cluster; with negative ones it leaves it."""
        self.counts[cluster] += right
        self.counts[:, cluster] += left
        self.counts[cluster, cluster] += itself
        self.value[cluster], self.value[:, cluster] = _xlogx(self.counts[cluster]), _xlogx(self.counts[:, cluster])

    def gain(self, right: np.ndarray, left: np.ndarray, itself: float) -> np.ndarray:
        """Nats [n] by which the likelihood of all bigrams grows if the word joins each cluster."""
        b, a, own = np.flatnonzero(right), np.flatnonzero(left), np.arange(len(right))
        row = _xlogx(self.counts[:, b] + right[b]) - self.value[:, b]  # cluster k then b
        col = _xlogx(self.counts[a] + left[a][:, None]) - self.value[a]  # a then cluster k
        gain = row.sum(1) + col.sum(0)
        # the cluster's bigrams with itself grow by both, and by the word's own
        gain[b] -= row[b, np.arange(len(b))]
        gain[a] -= col[np.arange(len(a)), a]
        gain += _xlogx(self.counts[own, own] + right + left + itself) - self.value[own, own]
        for sums, more in ((self.counts.sum(1) + left, right.sum()), (self.counts.sum(0) + right, left.sum())):
            gain -= _xlogx(sums + more + itself) - _xlogx(sums)
        return gain


GROUPINGS: dict[str, Grouping] = {"frequency": by_frequency, "brown": by_bigrams}  # by hierarchy.embeddings
