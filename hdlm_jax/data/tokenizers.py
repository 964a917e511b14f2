"""Text <-> token ids: GPT-2's words, a byte-pair encoding (BPE), plain bytes, BERT's WordPieces, or those of an open
model (hub_tokenizer.py).

V counts the end-of-text token, which closes every document and which no text encodes to: '<|endoftext|>' (BERT:
'[SEP]') inside raw text is ordinary text. It is the last id, and `decode(encode(x)) == x` for any valid Unicode; not
so with BERT, and of an open model's its class says what holds.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from hdlm_jax.common import jsons
from hdlm_jax.common.extras import package
from hdlm_jax.config import expand
from hdlm_jax.data import hub_tokenizer
from hdlm_jax.data.base_tokenizer import END_OF_TEXT, JSON_FILE, PATTERNS, RANK_FILE, Tokenizer, bounded, utf8
from hdlm_jax.data.base_tokenizer import PATTERN as PATTERN

if TYPE_CHECKING:
    import tokenizers

BERT_END, BERT_UNKNOWN = "[SEP]", "[UNK]"

# Vocabularies that are told by their number of ranks, and how their text is cut. (GPT-2's 50,256 need no word.)
_KNOWN_SIZES = {100_256: ("cl100k_base", "cl100k"), 199_998: ("o200k_base", "o200k"), 151_643: ("Qwen", "qwen2"),
                128_000: ("Llama 3", "llama3")}
_SPECIAL = re.compile(rb"<\|[^|\s]+\|>")  # as special tokens are written in the vocabularies that have rank files

_MOST_PATTERN = 4096  # characters; the longest of PATTERNS has 353
_EVERY_KIND = "".join(map(chr, range(592))) + " I'll SAY 12345 \r\n\n\t  été e\u0301 中文 ١٢ 👩 \u200b\u2028\ufeff \n "


def cutting_pattern(given: str) -> str:
    """The regular expression of `tokenizer.pattern`: a name of PATTERNS ('' is gpt2), or itself, given in full.

    ValueError: neither, or an expression that does not compile or leaves out some kind of character.
    """
    if given in ("", *PATTERNS):
        return PATTERNS[given or "gpt2"]
    if len(given) > _MOST_PATTERN:
        raise ValueError(f"tokenizer.pattern has {len(given):,} characters: must be at most {_MOST_PATTERN:,}")
    if re.fullmatch(r"[\w.-]*", given):
        raise ValueError(f"tokenizer.pattern={given!r}: choose of {', '.join(PATTERNS)}, or give a regular expression")
    try:
        Tokenizer("bpe", [bytes([byte]) for byte in range(256)], given).encode(_EVERY_KIND)
    except ValueError as error:
        raise ValueError(str(error) if "tokenizer.pattern" in str(error) else
                         f"tokenizer.pattern={given!r}: no regular expression ({error})") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # what Rust raises, which is no Exception
            raise
        raise ValueError(f"tokenizer.pattern={given!r}: text cannot be cut by it (does it match the empty text?); "
                         "let each piece have a character") from None
    return given


class WordPiece(Tokenizer):
    """BERT's lower-case words and pieces of words ('##ing'): kind 'bert', through the `tokenizers` library.

    Not lossless: text is lower-cased, accents and control characters are dropped, what has no pieces becomes [UNK];
    `decode` joins words by single blanks. The end of text is [SEP], wherever it stands in the vocabulary of V words.
    """

    _end = BERT_END

    def __init__(self, words: Sequence[bytes]):
        super().__init__("bert", words, "BERT, lower case: WordPieces of words of at most 100 letters")
        self.vocab_size, self.eot = len(self._words), self._words.index(BERT_END.encode())

    @functools.cached_property
    def _wordpiece(self) -> tokenizers.Tokenizer:
        library = _library()
        vocabulary = {word.decode(): place for place, word in enumerate(self._words)}
        encoding = library.Tokenizer(library.models.WordPiece(vocabulary, unk_token=BERT_UNKNOWN,
                                                              max_input_chars_per_word=100))
        encoding.normalizer = library.normalizers.BertNormalizer(lowercase=True)
        encoding.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
        return encoding

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on the library's own threads (RAYON_NUM_THREADS)."""
        for text in texts:
            utf8(text)
        found = self._wordpiece.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in found]

    def decode(self, ids: Iterable[int]) -> str:
        return b" ".join(self.token_bytes(int(token)) for token in ids).decode().replace(" ##", "")


def _library() -> ModuleType:
    return package("tokenizers", "bert", "tokenizer.kind='bert'")


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a folder that `Tokenizer.save` wrote; ValueError if files are missing or changed."""
    folder = Path(path)
    facts = jsons.read_json(folder / JSON_FILE, "kind", "sha256", "pattern", "fingerprint", optional=True)
    if facts is None:
        raise ValueError(f"no tokenizer in {folder}: {JSON_FILE} is missing")
    jsons.of_types(folder / JSON_FILE, facts, dict.fromkeys(("kind", "sha256", "pattern", "fingerprint"), str))
    kind = facts["kind"]
    if kind == "hub":
        return _unchanged(folder, hub_tokenizer.load(folder, facts), facts)
    words = read_ranks(folder / RANK_FILE, facts["sha256"], all_bytes=kind != "bert")
    return _unchanged(folder, WordPiece(words) if kind == "bert" else Tokenizer(kind, words, facts["pattern"]), facts)


def _unchanged(folder: Path, tokenizer: Tokenizer, facts: dict) -> Tokenizer:
    if tokenizer.fingerprint != facts["fingerprint"]:
        raise ValueError(f"{folder}: tokenizer fingerprint is {tokenizer.fingerprint[:12]}, was saved as "
                         f"{facts['fingerprint'][:12]}")
    return tokenizer


def _read(path: str | os.PathLike, sha256: str) -> bytes:
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"tokenizer.file {str(path)!r} cannot be read: {error.strerror}") from None
    jsons.check_sha256(path, hashlib.sha256(raw).hexdigest(), sha256)
    return raw


def read_vocabulary(path: str | os.PathLike, sha256: str = "") -> list[bytes]:
    """The words of a BERT vocab.txt, one a line.

    ValueError: no such file, wrong sha256 (when given), no UTF-8, a word twice or empty, no [UNK] or [SEP].
    """
    lines: dict[bytes, int] = {}
    for number, line in enumerate(_read(path, sha256).removesuffix(b"\n").split(b"\n"), 1):
        word = line.removesuffix(b"\r")
        try:
            word.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not valid UTF-8 ({error.reason})") from None
        if not word or word in lines:
            also = f"is line {lines[word]} again" if word else "is empty"
            raise ValueError(f"{path}:{number}: must be a word of its own, {also}")
        lines[word] = number
    for needed in (BERT_UNKNOWN, BERT_END):
        if needed.encode() not in lines:
            raise ValueError(f"{path}: no word {needed}; tokenizer.kind='bert' reads a BERT vocab.txt, one word a line")
    return list(lines)


def read_ranks(path: str | os.PathLike, sha256: str = "", *, all_bytes: bool = True) -> list[bytes]:
    """Words in order of rank from a file in tiktoken's format (lines of base64 and rank).

    tiktoken's own reader copies even local files into TIKTOKEN_CACHE_DIR, so the few lines are here.
    ValueError: no such file, wrong sha256, a malformed line, ranks not 0..n-1, a byte missing (with `all_bytes`).
    """
    ranks = []
    for number, line in enumerate(_read(path, sha256).splitlines(), 1):
        if line.strip():
            try:
                word, rank = line.split()
                ranks.append((int(rank), base64.b64decode(word, validate=True)))
            except ValueError:
                raise ValueError(f"{path}:{number}: must be '<base64> <rank>', is {line[:40]!r}") from None
    ranks.sort()
    words = [word for _, word in ranks]
    if [rank for rank, _ in ranks] != list(range(len(ranks))) or len(set(words)) != len(words) or b"" in words:
        raise ValueError(f"{path}: ranks must be 0..n-1, each once and with a word of its own")
    if all_bytes and (missing := set(range(256)) - {word[0] for word in words if len(word) == 1}):
        raise ValueError(f"{path}: all 256 single bytes must be words; {len(missing)} are missing")
    return words


def _read_foreign(file: str, sha256: str, kind: str, pattern: str) -> list[bytes]:
    """The words of a rank file; ValueError where it says that text is cut, or encoded, otherwise than asked for."""
    words = read_ranks(file, sha256)
    for rank, word in enumerate(words):
        if _SPECIAL.fullmatch(word):  # some pattern may let text encode to it
            raise ValueError(f"{file}: rank {rank} is the special token {word.decode(errors='replace')!r}, which no "
                             f"text may encode to: leave such lines out ({END_OF_TEXT} comes by itself)")
    if kind == "gpt2" and len(words) != 50256:
        raise ValueError(f"{file}: {len(words)} words, GPT-2 has 50256; tokenizer.kind='bpe' reads other rank files")
    if not pattern and len(words) in _KNOWN_SIZES:
        name, known = _KNOWN_SIZES[len(words)]
        raise ValueError(f"{file}: {len(words):,} ranks are those of {name}, whose text is not cut by GPT-2's pattern: "
                         f"give tokenizer.pattern={known!r}, or 'gpt2' if these are others")
    return words


def make_tokenizer(kind: str, vocab_size: int = 0, documents: Iterable[str] | None = None, file: str = "",
                   sha256: str = "", pattern: str = "") -> Tokenizer:
    """Makes a tokenizer.

    Args:
      kind: 'gpt2' (V = 50,257; tiktoken's download or cache, or `file`), 'bpe' (trained on `documents`, or
        read from `file`), 'bytes' (V = 257), 'bert' (V and words of the vocab.txt `file`), 'hub' (all of it in `file`).
      vocab_size: V asked of a trained BPE; a small corpus may hold fewer merges, and so give a smaller V.
      documents: texts to train on, read once, as a stream.
      file: a rank file in tiktoken's format, or BERT's vocab.txt; hub: a tokenizer.json, a folder that has one (of the
        Hugging Face hub, or of a run) or a GGUF file; sha256: its hash, checked when given.
      pattern: how a bpe cuts text, see `cutting_pattern`. A rank file of as many words as a known vocabulary that
        GPT-2's pattern does not cut is refused without one.
    """
    if kind == "bytes":
        return Tokenizer(kind, [bytes([byte]) for byte in range(256)])
    file = expand(file)
    if kind == "hub":
        return hub_tokenizer.make(file, sha256)
    if kind == "bert":
        _library()
        return WordPiece(read_vocabulary(file, sha256))
    cut = cutting_pattern(pattern if kind == "bpe" else "")
    if file:
        return Tokenizer(kind, _read_foreign(file, sha256, kind, pattern), cut)
    if kind == "gpt2":
        return Tokenizer(kind, _gpt2_words())
    if documents is None:
        raise ValueError("tokenizer.kind='bpe' needs documents to train on, or tokenizer.file")
    import rustbpe
    trainer = rustbpe.Tokenizer()
    parts = (part for text in documents for part in bounded(text))
    trainer.train_from_iterator(parts, vocab_size - 1, pattern=cut)  # - 1: the end of text
    ranks = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
    return Tokenizer(kind, [bytes(word) for word, _ in ranks], cut)


def _gpt2_words() -> list[bytes]:
    import tiktoken
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever the network layer raises
        raise ValueError(
            f"GPT-2's tokenizer could not be fetched ({type(error).__name__}): without a network set "
            "TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's files, or tokenizer.file to a rank file "
            "(gpt2.tiktoken or r50k_base.tiktoken)") from error
    return [encoding.decode_single_token_bytes(rank) for rank in range(encoding.eot_token)]
