"""What is read of a source: documents, and records that cannot be read."""

from __future__ import annotations

import hashlib
from typing import NamedTuple


class Document(NamedTuple):
    """One document: `prompt` (never scored, usually empty), then `text`; `name` says where it is from."""

    text: str
    name: str
    prompt: str = ""


class Bad(NamedTuple):
    """A record that cannot be read: the source it is in, where ("line 12", "member a/b.txt, byte 3"), and why."""

    file: str
    position: str
    reason: str


def digest(document: Document) -> bytes:
    """sha256 of the document's raw UTF-8 bytes (prompt, then text)."""
    return hashlib.sha256((document.prompt + document.text).encode("utf-8")).digest()


def is_validation(document: Document, fraction: float) -> bool:
    """Whether the document is validation: its sha256, read as a number in [0, 1), is below `fraction`.

    Depends on the text alone, so equal documents fall on the same side and the order of files is irrelevant.
    """
    return int.from_bytes(digest(document)[:8], "big") < fraction * 2.0**64
