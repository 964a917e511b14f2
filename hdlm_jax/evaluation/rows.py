"""Texts of any length as rows of a model: split into pieces, one row each, and nats of rows added up again per text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from hdlm_jax.data.pipeline import rows_of

Ids = np.ndarray  # int32 [n], tokens


class Piece(NamedTuple):
    """Tokens that see each other and nothing else; the first `given` of them are not scored.

    ends: the rest of the row is ends of text that count (in nats, not in tokens), so that the length is not given.
    """

    ids: Ids
    given: int = 0
    ends: bool = False


def split(ids: Ids, seq_len: int, given: int = 0, ends: bool = False) -> list[Piece]:
    """A text in pieces of seq_len tokens, the last one of what is left; none where there are no tokens.

    given: first tokens of the text that are not scored; ends: whether the last piece is followed by ends of text.
    """
    return [Piece(ids[start : start + seq_len], max(0, given - start), ends and start + seq_len >= len(ids))
            for start in range(0, len(ids), seq_len)]


def split_all(texts: Iterable[Ids], seq_len: int, given: Sequence[int] = (),
              ends: bool = False) -> tuple[list[Piece], np.ndarray]:
    """Pieces of all texts, one text after the other, and the number of each piece's text, int [pieces].

    given: of each text, its first tokens that are not scored; a piece of such tokens alone is left out.
    """
    found = [(i, piece) for i, ids in enumerate(texts)
             for piece in split(ids, seq_len, given[i] if len(given) else 0, ends) if piece.given < len(piece.ids)]
    return [piece for _, piece in found], np.array([i for i, _ in found], int)


def to_rows(pieces: Sequence[Piece], width: int, eot: int) -> dict[str, np.ndarray]:
    """A row of `width` tokens for each piece: the fields of data.pipeline.valid_rows."""
    return rows_of([p.ids for p in pieces], width, eot, [p.given for p in pieces],
                   ends=np.array([p.ends for p in pieces], bool))


def per_text(values: np.ndarray, owner: np.ndarray, texts: int) -> np.ndarray:
    """Values [..., pieces] added up over the pieces of each text: [..., texts]."""
    out = np.zeros((*values.shape[:-1], texts), values.dtype)
    np.add.at(out, (..., owner), values)  # type: ignore[arg-type]
    return out
