"""The tokenizer of byte strings that every other one is built on, and the ways to cut text into pieces."""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hdlm_jax.common import jsons

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
RANK_FILE, JSON_FILE = "tokenizer.tiktoken", "tokenizer.json"

# GPT-2's way to cut text into pieces, which the trained BPE shares: no merge crosses a piece. Words keep their
# leading space and nothing else.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# How the text of other published vocabularies is cut: words with any one sign in front, digits by threes (Qwen's one by
# one), signs with the line ends behind them; GPT-4o's words (o200k) also end before a capital. Blanks at the very end
# of a text are one piece in cl100k_base as tiktoken has it today; Qwen and Llama 3 cut them behind the last line end.
_FRONT, _SUFFIX = r"[^\r\n\p{L}\p{N}]?", r"(?i:'(?:[sdmt]|ll|ve|re))"
_SIGNS, _BLANKS = r" ?[^\s\p{L}\p{N}]+", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _signed(digits: str, blanks: str = _BLANKS) -> str:
    return rf"{_SUFFIX}|{_FRONT}\p{{L}}+|{digits}|{_SIGNS}[\r\n]*|{blanks}"


PATTERNS = {
    "gpt2": PATTERN,
    "cl100k": _signed(r"\p{N}{1,3}", rf"\s++$|{_BLANKS}"),
    "llama3": _signed(r"\p{N}{1,3}"),
    "qwen2": _signed(r"\p{N}"),
    "o200k": (rf"{_FRONT}{_UPPER}*{_LOWER}+{_SUFFIX}?|{_FRONT}{_UPPER}+{_LOWER}*{_SUFFIX}?|\p{{N}}{{1,3}}|"
              rf"{_SIGNS}[\r\n/]*|{_BLANKS}"),
}
# `\s+(?!\S)` backtracks: the regex engine gives up on a run of about a million blanks. Longer runs are cut.
_LONG_BLANK = re.compile(r"\s{4096}")


class Tokenizer:
    """Words 0..V-2 are byte strings, word V-1 is the end of text. Make one with `make_tokenizer`.

    Attributes:
      kind: 'gpt2', 'bpe' or 'bytes' ('bert': see `WordPiece`). vocab_size: V. eot: id of the end of text.
      pattern: how text is cut into pieces, a regular expression.
      fingerprint: sha256 (hex) of all that decides the ids: the cutting pattern and the words in order.
    """

    _end = END_OF_TEXT

    def __init__(self, kind: str, words: Sequence[bytes], pattern: str = PATTERN):
        self.kind, self.pattern, self._words = kind, pattern, tuple(words)
        self.eot, self.vocab_size = len(self._words), len(self._words) + 1
        self._checked = kind == "bpe" and pattern not in PATTERNS.values()
        state = hashlib.sha256(b"" if kind == "bytes" else pattern.encode())
        for word in self._words:
            state.update(len(word).to_bytes(4, "big") + word)
        self.fingerprint = state.hexdigest()

    @functools.cached_property
    def _encoding(self) -> tiktoken.Encoding:
        import tiktoken
        return tiktoken.Encoding(self.kind, pat_str=self.pattern, special_tokens={END_OF_TEXT: self.eot},
                                 mergeable_ranks={word: rank for rank, word in enumerate(self._words)})

    @property
    def special(self) -> dict[str, int]:
        """Name -> id of the tokens that are no text."""
        return {self._end: self.eot}

    @property
    def chat_template(self) -> str:
        """How conversations are written, in jinja2; "" where the tokenizer has none."""
        return ""

    @property
    def turn_end(self) -> int:
        """Id that ends a turn of a conversation."""
        return self.eot

    def save_hub(self, path: str | os.PathLike) -> None:
        """Writes tokenizer.json and tokenizer_config.json as a folder of the Hugging Face hub has them."""
        raise ValueError(f"tokenizer.kind={self.kind!r}: has no tokenizer.json; only 'hub' has")

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int32 [n], without end of text. ValueError for a lone surrogate, or for characters that a
        pattern given in full leaves out."""
        raw = utf8(text)
        if self.kind == "bytes":
            return np.frombuffer(raw, np.uint8).astype(np.int32)
        parts = [self._encoding.encode_to_numpy(part, disallowed_special=()) for part in bounded(text)]
        ids = np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)
        if self._checked and (size := sum(len(self._words[i]) for i in ids.tolist())) != len(raw):
            raise ValueError(f"tokenizer.pattern={self.pattern!r}: leaves out {len(raw) - size} of {len(raw)} bytes of "
                             "a text; every character must be in a piece (add |\\s+|. at its end)")
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one id (of the end of text: its name). ValueError for an id outside 0..V-1."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token id is {token}; must be in 0..{self.vocab_size - 1}")
        return self._end.encode() if token == self.eot else self._words[token]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are no UTF-8 (possible for ids a model made) show as U+FFFD."""
        return b"".join(self.token_bytes(int(token)) for token in ids).decode("utf-8", errors="replace")

    def save(self, path: str | os.PathLike) -> None:
        """Writes the folder `path`: the words as a rank file (tiktoken's format), a .json with its sha256."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        ranks = b"".join(base64.b64encode(word) + b" %d\n" % rank for rank, word in enumerate(self._words))
        jsons.write_atomic(folder / RANK_FILE, ranks)
        facts = {"kind": self.kind, "vocab_size": self.vocab_size, "eot": self.eot, "pattern": self.pattern,
                 "sha256": hashlib.sha256(ranks).hexdigest(), "fingerprint": self.fingerprint}
        jsons.write_json(folder / JSON_FILE, facts, indent=2)


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary -> the byte: itself where it is printed."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def utf8(text: str) -> bytes:
    """The bytes of a text; ValueError for a lone surrogate."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"text is not Unicode: lone surrogate at character {error.start}") from None


def bounded(text: str) -> Iterator[str]:
    """`text` in consecutive non-empty parts, cut inside very long runs of blanks only."""
    start = 0
    # The search alone costs a tenth of the encoding; a run that it finds fills one of these blocks.
    blocks = (text[i : i + 2048] for i in range(0, len(text), 2048))
    for blank in _LONG_BLANK.finditer(text) if any(map(str.isspace, blocks)) else ():
        yield text[start:blank.end()]
        start = blank.end()
    if start < len(text):
        yield text[start:]
