"""What is read of a source: documents, and records that cannot be read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MANY = 10_000  # a share of fewer records says little


class Document(NamedTuple):
    """One document: `prompt` (never scored, usually empty), then `text`; `name` says where it is from.

    features: float32 [n, F], vectors in front of both (data/features.py).
    """

    text: str
    name: str
    prompt: str = ""
    features: np.ndarray | None = None


class Bad(NamedTuple):
    """A record that cannot be read: the source it is in, where ("line 12", "member a/b.txt, byte 3"), and why."""

    file: str
    position: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, {self.position}: {self.reason}"


def check_bad(share: float, bad: int, records: int, first: Sequence[str], folder: str = "", out_of: int = 0) -> None:
    """ValueError where more than this share of the records is bad, of `out_of` records if these are more.

    first: the first `Bad`. folder: is to be deleted when the files are mended.
    """
    if bad > share * max(records, out_of):
        raise ValueError(f"{Bad(*first)}; {bad:,} of {records:,} records cannot be read, more than "
                         f"data.bad_share={share:g} allows: raise it, or mend the files"
                         + (f" and delete {folder}" if folder else ""))


def digest(document: Document) -> bytes:
    """sha256 of the document's raw UTF-8 bytes (prompt, then text), and of its features."""
    features = b"" if document.features is None else document.features.astype("<f4").tobytes()
    return hashlib.sha256((document.prompt + document.text).encode("utf-8") + features).digest()


def is_validation(document: Document, fraction: float) -> bool:
    """Whether the document is validation: its sha256, read as a number in [0, 1), is below `fraction`.

    Depends on text and features alone, so equal documents fall on the same side and the order of files is irrelevant.
    """
    return int.from_bytes(digest(document)[:8], "big") < fraction * 2.0**64
