"""What a text starts from: a canvas of given tokens, masks where all is free and clusters where the kind of token is.

Every position also has a `kind`, the set of tokens it may take, which guide.Constrained enforces. JSON schemas are in
hdlm_jax.decoding.schema, canvases that grow in hdlm_jax.decoding.lengths.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from hdlm_jax.data.tokenizers import Tokenizer
from hdlm_jax.diffusion.hierarchy import Hierarchy

_BLANK = re.compile(r"\[\[|\[MASK(?::(\d+))?\]|\[LIKE(?:@(\d+))?:([^\[\]]+)\]|\[")


class Canvas(NamedTuple):
    """Start of n texts of at most S tokens; numpy arrays.

    z: int32 [n, S], states (behind the end a token nobody looks at); given: bool [n, S], tokens that stay;
    kind: int32 [n, S], which set of tokens a position may take, 0: any; length: int32 [n];
    allowed: bool [kinds, V], the sets; its row 0 is all True; features: float32 [n, P, F] in front of the texts
    (models/features.py), whose places z gives tokens that nobody reads.
    """

    z: np.ndarray
    given: np.ndarray
    kind: np.ndarray
    length: np.ndarray
    allowed: np.ndarray
    features: np.ndarray | None = None


def make(states: Sequence[int] | np.ndarray, hierarchy: Hierarchy, rows: int = 1, seq_len: int = 0,
         kind: Sequence[int] | None = None, allowed: Sequence[np.ndarray] = ()) -> Canvas:
    """`rows` canvases of the same n states, S = the next power of two of n.

    Args:
      seq_len: most tokens the model takes, so S at most; 0: S = n.
      kind: of each state, 0 for any token; k for those of allowed[k - 1], bool [V].

    Raises:
      ValueError: too many states, or none.
    """
    ids = np.asarray(states, np.int32)
    n = len(ids)
    if not n or seq_len and n > seq_len:
        raise ValueError(f"canvas of {n} tokens: must be 1 to seq_len={seq_len}" if n else "canvas: it has no tokens")
    kinds = np.zeros(n, np.int32) if kind is None else np.asarray(kind, np.int32)
    sets = np.stack([np.ones(hierarchy.vocab_size, bool), *allowed])
    places = min(1 << (n - 1).bit_length(), seq_len) if seq_len else n

    def spread(values: np.ndarray) -> np.ndarray:
        return np.tile(np.pad(values, (0, places - n)), (rows, 1))

    return Canvas(spread(ids), spread(hierarchy.level_of(ids) == 0), spread(kinds), np.full(rows, n, np.int32), sets)


def closed(canvas: Canvas, seq_len: int, eot: int) -> Canvas:
    """The canvas with ends of text given behind it, up to S = seq_len: for networks that have only seen whole rows."""
    n, places = canvas.z.shape
    wide = ((0, 0), (0, seq_len - places))
    z, given, kind = (np.pad(a, wide) for a in (canvas.z, canvas.given, canvas.kind))
    behind = np.arange(seq_len) >= canvas.length[:, None]
    z[behind], given[behind], kind[behind] = eot, True, 0
    return canvas._replace(z=z, given=given, kind=kind, length=np.full(n, seq_len, np.int32))


def some(canvas: np.ndarray | Canvas, part: slice) -> np.ndarray | Canvas:
    """Some texts of a canvas."""
    if isinstance(canvas, np.ndarray):
        return canvas[part]
    features = None if canvas.features is None else canvas.features[part]
    return Canvas(canvas.z[part], canvas.given[part], canvas.kind[part], canvas.length[part], canvas.allowed, features)


def together(parts: Sequence[Canvas]) -> Canvas:
    """Canvases of one hierarchy as one, as wide as the widest; each text keeps its end and its kinds."""
    width = max(part.z.shape[1] for part in parts)
    before = np.cumsum([0, *(len(part.allowed) - 1 for part in parts)])  # kinds of the parts before; 0 is common to all
    kinds = [np.where(part.kind, part.kind + n, 0).astype(np.int32) for part, n in zip(parts, before, strict=False)]

    def rows(values: Iterable[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.pad(a, ((0, 0), (0, width - a.shape[1]))) for a in values])

    return Canvas(rows(part.z for part in parts), rows(part.given for part in parts), rows(kinds),
                  np.concatenate([part.length for part in parts]),
                  np.concatenate([parts[0].allowed[:1], *(part.allowed[1:] for part in parts)]),
                  None if parts[0].features is None else np.concatenate([part.features for part in parts]))


def template(text: str, tokenizer: Tokenizer, hierarchy: Hierarchy, rows: int = 1, seq_len: int = 0) -> Canvas:
    """Infilling with typed blanks (the clusters of arXiv 2510.08632 as types): the text, its blanks free.

    `[MASK]` is one token, `[MASK:3]` three; `[LIKE:dog]` one token of the level-1 cluster of dog's first token,
    `[LIKE@2:dog]` of its node of level 2, at any xi; `[[` is the character [. A blank takes a single space in front of
    it along, as tokens mostly begin with theirs: "The [LIKE:dog] sat" has a blank like " dog".

    Raises:
      ValueError: a bracket that is no blank, a blank of no tokens, a level without clusters, no text; with the
        character where it stands.
    """
    ids: list[int] = []
    kinds: list[int] = []
    sets: dict[tuple[int, int], int] = {}
    buffer, end = "", 0

    def put(states: list[int], kind: int = 0) -> None:
        ids.extend(states)
        kinds.extend([kind] * len(states))

    for found in _BLANK.finditer(text):
        buffer, end = buffer + text[end : found.start()], found.end()
        where = f"template: {found[0]!r} at character {found.start()}"
        if found[0] == "[[":
            buffer += "["
            continue
        if found[0] == "[":
            raise ValueError(f"{where} opens no blank: write [MASK], [MASK:3], [LIKE:word], [LIKE@2:word] or [[")
        space = buffer.endswith(" ") and not buffer.endswith("  ")
        put(tokenizer.encode(buffer[:-1] if space else buffer).tolist())
        buffer = ""
        if not found[3]:
            count = int((found[1] or "1")[:9])  # more digits are too many tokens, too
            if count < 1:
                raise ValueError(f"{where}: a blank has at least one token")
            if seq_len and count > seq_len:
                raise ValueError(f"{where}: a text has at most {seq_len} tokens")
            put([hierarchy.mask_id] * count)
            continue
        level = int((found[2] or "1")[:9])
        if not 1 <= level < hierarchy.num_levels:
            choices = f"1..{hierarchy.num_levels - 1}" if hierarchy.num_levels > 1 else "none, so use [MASK]"
            raise ValueError(f"{where}: level {level} has no clusters; levels that have: {choices}")
        like = int(tokenizer.encode(" " * space + found[3])[0])
        node = int(hierarchy.anc[level][like])
        put([int(hierarchy.state_id(level, node))], sets.setdefault((level, node), len(sets) + 1))
    put(tokenizer.encode(buffer + text[end:]).tolist())
    return make(ids, hierarchy, rows, seq_len, kinds, [hierarchy.anc[level] == node for level, node in sets])
