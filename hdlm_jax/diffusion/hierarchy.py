"""The hierarchy of states: tokens, clusters, clusters of clusters, one mask (`docs/theory.md` section 1).

Nothing but numpy is imported here, so that the diffusion code, the tests' oracle and a notebook can all
read a hierarchy without jax, faiss or a tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hdlm_jax.common import jsons

_FORMAT = 1
_PAD_TO = 128


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """Levels 0..K of states: V tokens, n_1 clusters, ..., one mask; maps between them are nested.

    Build one with `Hierarchy.from_parents` or `Hierarchy.load`; the constructor takes maps as they are and
    checks them. Two hierarchies with the same maps are equal and hash alike. All arrays are read-only.

    Attributes:
      parents: tuple of K int32 arrays; `parents[l]` has shape [n_l] and gives the node of level l + 1 that a
        node of level l belongs to. The last one is all zeros (everything ends in the mask).
      special: tokens that are exempt from the size limits of clusters (`<|endoftext|>`).
      classes: int32 [V], the class of each token in a factorised head, which are no states; None where these are the
        nodes of level 1. Only of tokens and mask alone.
    """

    parents: tuple[np.ndarray, ...]
    special: tuple[int, ...] = ()
    classes: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not self.parents:
            raise ValueError("hierarchy has no map: from_parents([], vocab_size=V) makes tokens and a mask")
        maps = tuple(_int_map(p, f"parents[{level}]") for level, p in enumerate(self.parents))
        if len(maps[0]) < 2:
            raise ValueError(f"vocab_size = {len(maps[0])}: a hierarchy needs at least 2 tokens")
        for level, parent in enumerate(maps):
            last = level == len(maps) - 1
            upper = 1 if last else len(maps[level + 1])
            name = "the mask level" if last else f"level {level + 1}"
            if parent.min() < 0 or parent.max() >= upper:
                bad = int(parent[(parent < 0) | (parent >= upper)][0])
                raise ValueError(f"parents[{level}] holds node {bad}, but {name} has nodes 0..{upper - 1}: "
                                 "maps must be nested (len(parents[l + 1]) = number of nodes of level l + 1)")
            empty = np.flatnonzero(np.bincount(parent, minlength=upper) == 0)
            if len(empty):
                raise ValueError(f"empty cluster: node {empty[0]} of level {level + 1} has no member in "
                                 f"parents[{level}] ({len(empty)} such nodes); every node needs one")
        special = tuple(int(i) for i in self.special)
        for i in special:
            if not 0 <= i < len(maps[0]):
                raise ValueError(f"special token {i} is outside 0..{len(maps[0]) - 1}")
        for parent in maps:
            parent.setflags(write=False)
        if self.classes is not None:
            if len(maps) > 1:
                raise ValueError(f"classes beside levels {(*map(len, maps), 1)}: a head's classes are the nodes of "
                                 "level 1 there")
            made = Hierarchy.from_parents([self.classes], len(maps[0]), keep_single=True)  # which checks them
            object.__setattr__(self, "classes", made.parents[0])
        object.__setattr__(self, "parents", maps)
        object.__setattr__(self, "special", special)

    @classmethod
    def from_parents(cls, parents: Sequence[Any], vocab_size: int | None = None, keep_single: bool = False,
                     special: Sequence[int] = (), classes: np.ndarray | None = None) -> Hierarchy:
        """Builds a hierarchy from its maps, fine to coarse; the last map, to the mask, is added.

        Args:
          parents: `parents[0]`: int [V], token -> level-1 node; `parents[1]`: int [n_1], level-1 node ->
            level-2 node; and so on. `[]` with `vocab_size=V` is MDLM: tokens and the mask.
          vocab_size: V; needed only for `[]`, checked against `parents[0]` otherwise.
          keep_single: levels are cut at the first one with a single node (that one *is* the mask), unless
            this is True: then a single cluster stays below the mask, as in levels (V, 1, 1).
          special: tokens exempt from the size limits of clusters.
          classes: of a factorised head, with `[]` (see the attribute).

        Raises:
          ValueError: fewer than 2 tokens, an empty cluster, a map of the wrong length or out of range.
        """
        maps = [_int_map(p, f"parents[{level}]") for level, p in enumerate(parents)]
        if not maps:
            if vocab_size is None:
                raise ValueError("from_parents([]) needs vocab_size (the number of tokens V)")
            return cls((np.zeros(vocab_size, np.int32),), tuple(special), classes)
        if vocab_size is not None and len(maps[0]) != vocab_size:
            raise ValueError(f"parents[0] has {len(maps[0])} tokens, but vocab_size = {vocab_size}")
        for level, parent in enumerate(maps):
            if len(parent) == 0:
                raise ValueError(f"parents[{level}] is empty: it needs one entry per node of level {level}")
        if maps[-1].min() < 0:
            raise ValueError(f"parents[{len(maps) - 1}] holds node {maps[-1].min()}: nodes start at 0")
        maps.append(np.zeros(int(maps[-1].max()) + 1, np.int32))
        full = cls(tuple(maps), tuple(special))  # checks every map before any of them is cut off
        if keep_single:
            return full
        first_single = full.sizes.index(1)
        return cls(full.parents[:first_single], tuple(special))

    # ---- sizes and ids ----

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """(V, n_1, ..., n_K), n_K = 1: the number of nodes of every level."""
        return (*(len(p) for p in self.parents), 1)

    @property
    def num_levels(self) -> int:
        """K: the number of levels above the tokens, the mask included."""
        return len(self.parents)

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.parents[0])

    @property
    def num_states(self) -> int:
        """N: tokens, clusters of all levels and the mask."""
        return sum(self.sizes)

    @property
    def padded_states(self) -> int:
        """N rounded up to a multiple of 128: the rows of the embedding table."""
        return -(-self.num_states // _PAD_TO) * _PAD_TO

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First state of every level, K + 1 numbers; tokens start at 0."""
        return tuple(int(o) for o in np.concatenate([[0], np.cumsum(self.sizes)[:-1]]))

    @property
    def mask_id(self) -> int:
        """The mask, the last state: N - 1."""
        return self.num_states - 1

    def level_of(self, ids: Any) -> np.ndarray:
        """Level of each state, int32, same shape as `ids`."""
        ids = self._checked_ids(ids)
        return (np.searchsorted(np.asarray(self.offsets), ids, side="right") - 1).astype(np.int32)

    def node_of(self, ids: Any) -> np.ndarray:
        """Node of each state within its level, int32, same shape as `ids`."""
        ids = self._checked_ids(ids)
        return (ids - np.asarray(self.offsets)[self.level_of(ids)]).astype(np.int32)

    def state_id(self, level: Any, node: Any) -> np.ndarray:
        """State of node `node` of level `level` (arrays broadcast against each other), int32."""
        level, node = np.asarray(level), np.asarray(node)
        if level.size and (level.min() < 0 or level.max() > self.num_levels):
            raise ValueError(f"level {level.min()}..{level.max()} is outside 0..{self.num_levels}")
        if np.any((node < 0) | (node >= np.asarray(self.sizes)[level])):
            raise ValueError(f"node outside its level; the levels have {self.sizes} nodes")
        return (np.asarray(self.offsets)[level] + node).astype(np.int32)

    def _checked_ids(self, ids: Any) -> np.ndarray:
        ids = np.asarray(ids)
        if ids.size and (ids.min() < 0 or ids.max() >= self.num_states):
            raise ValueError(f"state {ids.min()}..{ids.max()} is outside 0..{self.num_states - 1}")
        return ids

    @cached_property
    def of_head(self) -> Hierarchy:
        """The one whose level 1 are the classes of a factorised head: this one, or tokens, `classes` and the mask."""
        return self if self.classes is None else Hierarchy.from_parents([self.classes], keep_single=True)

    # ---- ancestors and counts ----

    @cached_property
    def anc(self) -> tuple[np.ndarray, ...]:
        """anc[l]: int32 [V], the node of level l above each token; anc[0] = arange(V), anc[K] = zeros."""
        out = [np.arange(self.vocab_size, dtype=np.int32)]
        for parent in self.parents:
            out.append(parent[out[-1]])
        return _frozen(out)

    @cached_property
    def level1_anc(self) -> tuple[Any, ...]:
        """level1_anc[k]: int32 [n_1], the level-k node above each level-1 node, k = 1..K (index 0: None)."""
        out = [np.arange(self.sizes[1], dtype=np.int32)]
        for parent in self.parents[1:]:
            out.append(parent[out[-1]])
        return (None, *_frozen(out))

    @cached_property
    def level1_count(self) -> tuple[Any, ...]:
        """level1_count[k]: int32 [n_k] = N_k(v): how many level-1 nodes are under v, k = 1..K (0: None)."""
        return (None, *_frozen([np.bincount(a) for a in self.level1_anc[1:]]))

    @cached_property
    def token_count(self) -> tuple[np.ndarray, ...]:
        """token_count[l]: int32 [n_l], the number of tokens under each node of level l = 0..K."""
        return _frozen([np.bincount(a) for a in self.anc])

    @cached_property
    def level1_order(self) -> np.ndarray:
        """int32 [n_1]: level-1 nodes ordered so that those under any one node of any level are contiguous."""
        keys = [np.arange(self.sizes[1]), *self.level1_anc[2:]]  # lexsort: the last, coarsest key is primary
        return _frozen([np.lexsort(keys)])[0]

    @cached_property
    def level1_start(self) -> tuple[Any, ...]:
        """level1_start[k]: int32 [n_k], where v's run starts in `level1_order`, k = 1..K (index 0: None).

        The run of v is `level1_order[level1_start[k][v]:][:level1_count[k][v]]`.
        """
        starts = [np.unique(a[self.level1_order], return_index=True)[1] for a in self.level1_anc[1:]]
        return (None, *_frozen(starts))

    # ---- identity ----

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the maps, hex: the same on every machine."""
        digest = hashlib.sha256(f"hierarchy {self.sizes}".encode())
        for parent in (*self.parents, *([] if self.classes is None else [self.classes])):
            digest.update(np.ascontiguousarray(parent, dtype="<i4").tobytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Hierarchy):
            return NotImplemented
        return self.fingerprint == other.fingerprint and self.special == other.special

    def __hash__(self) -> int:
        return hash((self.fingerprint, self.special))

    def __repr__(self) -> str:
        return f"Hierarchy(sizes={self.sizes}, special={self.special}, fingerprint={self.fingerprint[:12]})"

    # ---- file ----

    def save(self, path: str | os.PathLike, tokenizer_fingerprint: str, extra: Mapping[str, Any] | None = None) -> None:
        """Writes the maps as .npz (no pickle), under a temporary name first, then renamed.

        Args:
          path: the file, ending in .npz.
          tokenizer_fingerprint: of the tokenizer whose ids the tokens are; `load` compares it.
          extra: anything that json can hold (how the clusters were made); `read_extra` gives it back.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {f"parents_{level}": parent for level, parent in enumerate(self.parents)}
        if self.classes is not None:
            arrays["classes"] = self.classes
        header = {"format": _FORMAT, "levels": self.num_levels, "fingerprint": self.fingerprint,
                  "special": list(self.special), "tokenizer": tokenizer_fingerprint,
                  "extra": dict(extra or {})}
        with jsons.open_atomic(path) as file:
            np.savez_compressed(file, header=np.asarray(jsons.dumps(header, sort_keys=True)), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike, tokenizer_fingerprint: str | None = None) -> Hierarchy:
        """Reads what `save` wrote; with a fingerprint given, refuses a file made for another tokenizer.

        Raises:
          FileNotFoundError: no such file.
          ValueError: not such a file, damaged, or made for another tokenizer.
        """
        header, maps, classes = _read(path)
        if tokenizer_fingerprint is not None and header["tokenizer"] != tokenizer_fingerprint:
            raise ValueError(f"hierarchy {path} was made for tokenizer {header['tokenizer'][:12]}, but this "
                             f"run's tokenizer is {tokenizer_fingerprint[:12]}: cluster again")
        out = cls(tuple(maps), tuple(header["special"]), classes)
        if out.fingerprint != header["fingerprint"]:
            raise ValueError(f"hierarchy {path} is damaged: its maps do not match its fingerprint")
        return out


def read_extra(path: str | os.PathLike) -> dict[str, Any]:
    """The `extra` dictionary that `Hierarchy.save` was given."""
    return _read(path)[0]["extra"]


def _read(path: str | os.PathLike) -> tuple[dict[str, Any], list[np.ndarray], np.ndarray | None]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"hierarchy file {path} does not exist")
    try:
        with np.load(path, allow_pickle=False) as data:
            header = json.loads(str(data["header"]))
            maps = [data[f"parents_{level}"] for level in range(header["levels"])]
            classes = data["classes"] if "classes" in data else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no hierarchy file, or damaged ({type(error).__name__})") from error
    if header["format"] != _FORMAT:
        raise ValueError(f"hierarchy {path} has format {header['format']}, this version reads {_FORMAT}")
    return header, maps, classes


def _int_map(values: Any, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{name} is {array.dtype} of shape {array.shape}: a map is a flat int array")
    if array.size and (array.min() < np.iinfo(np.int32).min or array.max() > np.iinfo(np.int32).max):
        raise ValueError(f"{name} holds node {array.max()}, which does not fit int32")
    return np.array(array, dtype=np.int32)


def _frozen(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    out = []
    for array in arrays:
        array = np.ascontiguousarray(array, dtype=np.int32)
        array.setflags(write=False)
        out.append(array)
    return tuple(out)
