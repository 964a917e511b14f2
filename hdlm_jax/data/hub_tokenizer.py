"""Tokenizers that come with open models, through the `tokenizers` library: kind 'hub'."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hdlm_jax.common import jsons
from hdlm_jax.common.extras import package
from hdlm_jax.common.jsons import Json
from hdlm_jax.data.base_tokenizer import JSON_FILE, Tokenizer, byte_alphabet, utf8
from hdlm_jax.data.hub_files import BLANK, HUB_FILE, NO_HUB, PLAIN_FILE, Found, deciding_file, parsed, read

if TYPE_CHECKING:
    import tokenizers

# what ends a document and what ends a turn of a chat, in the vocabularies of open models
DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<｜end▁of▁sentence｜>")
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|role_end|>", "<|end|>")
MOST_TOKENS = 1 << 21
_CONTROL = re.compile(r"<\|[^|\s]+\|>")
_NFC, _REPLACE = {"type": "NFC"}, {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}


class HubTokenizer(Tokenizer):
    """The tokenizer of an open model: a byte-level BPE, or a BPE as SentencePiece's.

    No text encodes to a special token: '<|im_end|>' in a text is ordinary text; `encode_marked` reads it as the token.
    Special are the tokens that the files say are, those they name (eos_token, ...) and all written <|like this|>.
    Nothing is put in front of a text: neither a BOS nor the blank that Llama 2's tokenizer adds. What is lost: text is
    composed where the model's tokenizer does so (NFC, as Qwen's: 'e' and an accent become one character), and U+2581
    becomes a space in SentencePiece. A character without tokens (SmolLM2 has none for some control characters) becomes
    U+FFFD.

    Attributes:
      vocab_size: V, the largest id + 1. Networks may have more rows. Ids without a token are special.
      eot: id that ends a document: the first of DOCUMENT_ENDS that the files call an end, or else that the vocabulary
        has, or else eos_token.
      turn_end: id that ends a turn of a chat: eos_token where it is not `eot`; else one of TURN_ENDS in the chat
        template; else another end the files name; else `eot`.
      bos: id of the beginning of a text, or None. special: name -> id of all tokens that no text encodes to.
      names: bos_token, eos_token, ... as a chat template asks for them. chat_template: jinja2, or ''.
      fingerprint: sha256 (hex) of all that decides the ids; the chat template is no part of it.
    """

    def __init__(self, found: Found, path: str | os.PathLike = "tokenizer.json", eot: int | None = None,
                 turn_end: int | None = None):
        self.kind, self.pattern, self.found = "hub", "", found
        self._spec, self._special = _settled(found, path)
        vocabulary, added = self._spec["model"]["vocab"], self._spec["added_tokens"]
        self.vocab_size = 1 + max([*vocabulary.values(), *(token["id"] for token in added)])
        self.names = found.names
        self.eot, self._turn_end = self._ends(path) if eot is None or turn_end is None else (eot, turn_end)
        for name, place in (("eot", self.eot), ("turn_end", self.turn_end)):
            if place not in self._special.values():
                raise ValueError(f"{path}: {name}={place} is no special token")
        self.bos = self._special.get(found.names.get("bos_token", ""))
        self._bytewise = any(node["type"] == "ByteLevel" for node in _nodes(self._spec["pre_tokenizer"]))
        self._words = _words(self._spec, self._special, self.vocab_size, self._bytewise)
        self._end = self._words[self.eot].decode()
        self._sizes = np.array([len(word) for word in self._words], np.int64)
        self._is_special = np.isin(np.arange(self.vocab_size), list(self._special.values()))
        self.fingerprint = hashlib.sha256(_deciding(self._spec, self.eot).encode()).hexdigest()

    @property
    def special(self) -> dict[str, int]:
        return self._special

    @property
    def chat_template(self) -> str:
        return self.found.chat_template

    @property
    def turn_end(self) -> int:
        return self._turn_end

    def _ends(self, path: str | os.PathLike) -> tuple[int, int]:
        ends = [end for end in self.found.ends if end in self._special]
        known = [end for end in DOCUMENT_ENDS if end in self._special]
        choices = [*(end for end in known if end in ends), *known, *ends]
        if not choices:
            raise ValueError(f"{path}: no token that ends a text ({', '.join(DOCUMENT_ENDS)}) and no eos_token; give "
                             "the folder, with tokenizer_config.json")
        eot = choices[0]
        shown = [end for end in TURN_ENDS if end in self._special and end in self.chat_template]
        eos = [end for end in (self.names.get("eos_token", ""),) if end in ends]
        turn = next((end for end in [*eos, *shown, *ends] if end != eot), eot)
        return self._special[eot], self._special[turn]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_encoder"}  # it forgets a setting

    @functools.cached_property
    def _encoder(self) -> tokenizers.Tokenizer:
        library = package("tokenizers", "hub", "tokenizer.kind='hub'")
        try:
            encoder = library.Tokenizer.from_str(json.dumps(self._spec, allow_nan=False))
        except Exception as error:  # of the library, which has no class of its own for them
            raise ValueError(f"the tokenizers library does not take this tokenizer.json ({error})") from None
        encoder.encode_special_tokens = True  # as text
        for token in self._spec["added_tokens"]:
            if not token["special"] and encoder.token_to_id(token["content"]) != token["id"]:
                raise ValueError(f"the tokenizers library does not give {token['content']!r} the id {token['id']}")
        return encoder

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int32 [n], without end of text. ValueError for a lone surrogate."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on the library's own threads (RAYON_NUM_THREADS)."""
        sizes = [len(utf8(text)) for text in texts]
        out = self._plain(texts)
        for i, (text, size) in enumerate(zip(texts, sizes, strict=True)):
            if self._sizes[out[i]].sum() != size or self._is_special[out[i]].any():
                out[i] = self._mended(text, out[i])
        return out

    def _plain(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in found]

    def _keeps(self, text: str, ids: np.ndarray) -> bool:
        """Whether ids are the text's, but for what is lost by NFC and in writing spaces."""
        if self._is_special[ids].any():
            return False
        texts = [self.decode(ids), text]
        if not self._bytewise:
            texts = [one.replace(BLANK, " ") for one in texts]
        if _NFC in _nodes(self._spec["normalizer"]):
            texts = [unicodedata.normalize("NFC", one) for one in texts]
        return texts[0] == texts[1]

    def _mended(self, text: str, ids: np.ndarray) -> np.ndarray:
        """The ids, or those with U+FFFD for what has no tokens; ValueError where that has none either."""
        if self._keeps(text, ids):
            return ids
        letters = sorted(set(text))
        lost = [letter for letter, found in zip(letters, self._plain(letters), strict=True)
                if not self._keeps(letter, found)]
        shown = text.translate(dict.fromkeys(map(ord, lost), "\ufffd"))
        if not self._keeps(shown, found := self._plain([shown])[0]):
            raise ValueError(f"tokenizer.kind='hub': this tokenizer cannot write all of the text {text[:40]!r}..., nor "
                             "the sign U+FFFD for what it cannot")
        return found

    def encode_marked(self, text: str) -> np.ndarray:
        """Ids int32 [n] of a text in which the names of special tokens stand for them, as a chat template writes it."""
        parts, start = [], 0
        for mark in self._marks.finditer(text):
            name = mark.group() if mark.group() in self._special else mark.group().strip()
            parts += [self.encode(text[start : mark.start()]), np.array([self._special[name]], np.int32)]
            start = mark.end()
        return np.concatenate([*parts, self.encode(text[start:])])

    def special_in(self, text: str) -> str:
        """The first name of a special token in a text; '' without one."""
        mark = self._marks.search(text)
        return mark.group().strip() if mark else ""

    @functools.cached_property
    def _marks(self) -> re.Pattern[str]:
        """The names of special tokens, the longest first, with the blanks that some of them take in."""
        sides = {token["content"]: token for token in self._spec["added_tokens"]}
        return re.compile("|".join(
            (r"\s*" if sides.get(name, {}).get("lstrip") else "") + re.escape(name)
            + (r"\s*" if sides.get(name, {}).get("rstrip") else "") for name in sorted(self._special, key=len)[::-1]))

    def save_hub(self, path: str | os.PathLike) -> None:
        """Writes tokenizer.json, tokenizer_config.json and the ends of texts as folders of the hub have them."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        jsons.write_atomic(folder / PLAIN_FILE, self.found.raw)
        template = {"chat_template": self.chat_template} if self.chat_template else {}
        jsons.write_json(folder / "tokenizer_config.json",
                         {"tokenizer_class": "PreTrainedTokenizerFast"} | self.names | template)
        ends = [self._special[end] for end in self.found.ends if end in self._special]
        jsons.write_json(folder / "generation_config.json", {"eos_token_id": ends or [self.eot]})

    def save(self, path: str | os.PathLike) -> None:
        """Writes the folder `path`: the tokenizer.json it was made of, under another name, a .json with its facts."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        jsons.write_atomic(folder / HUB_FILE, self.found.raw)
        facts = {"kind": self.kind, "vocab_size": self.vocab_size, "eot": self.eot, "turn_end": self.turn_end,
                 "bos": self.bos, "pattern": self.pattern, "sha256": hashlib.sha256(self.found.raw).hexdigest(),
                 "fingerprint": self.fingerprint, "names": self.names, "ends": list(self.found.ends),
                 "special": self._special, "chat_template": self.chat_template}
        jsons.write_json(folder / JSON_FILE, facts, indent=2)


def load(folder: Path, facts: Json) -> HubTokenizer:
    """The tokenizer that `HubTokenizer.save` wrote; facts: what the folder's JSON_FILE holds. ValueError if damaged."""
    place = folder / JSON_FILE
    kinds = {"eot": int, "turn_end": int, "names": dict, "ends": list, "chat_template": str}
    if missing := [name for name in kinds if name not in facts]:
        raise ValueError(f"{place}: damaged, it must hold {', '.join(missing)}")
    jsons.of_types(place, facts, kinds)
    if not all(isinstance(text, str) for text in (*facts["ends"], *facts["names"].values())):
        raise ValueError(f"{place}: damaged, names and ends must be texts")
    raw = read(folder / HUB_FILE).raw
    jsons.check_sha256(folder / HUB_FILE, hashlib.sha256(raw).hexdigest(), facts["sha256"])
    found = Found(raw, facts["names"], tuple(facts["ends"]), facts["chat_template"])
    return HubTokenizer(found, folder / HUB_FILE, facts["eot"], facts["turn_end"])


def make(path: str, sha256: str = "") -> HubTokenizer:
    """The tokenizer of a tokenizer.json, a folder of the hub, a folder that `save` wrote, or a GGUF file.

    sha256: of the file (in a folder the one that says the ids), checked when given.
    """
    package("tokenizers", "hub", "tokenizer.kind='hub'")
    if not path:
        raise ValueError(f"tokenizer.file='': needed; {NO_HUB}")
    file = deciding_file(path)
    if sha256 and file.exists():
        jsons.check_sha256(file, jsons.sha256_of(file), sha256)
    if file.name == HUB_FILE and file != Path(path):
        tokenizer = load(file.parent, jsons.read_json(file.parent / JSON_FILE, "sha256"))
    else:
        tokenizer = HubTokenizer(read(path), file)
    tokenizer.encode("")  # the library takes it, or says why not, before anything else is done
    return tokenizer


# -------------------------------------------------------------------------------------------- a tokenizer.json


def _nodes(node: object) -> Iterator[Json]:
    """The parts of a normalizer or pre-tokenizer, out of their sequences."""
    if isinstance(node, dict) and node.get("type") == "Sequence":
        for part in [*(node.get("pretokenizers") or []), *(node.get("normalizers") or [])]:
            yield from _nodes(part)
    elif isinstance(node, dict):
        yield {"type": ""} | node


def _settled(found: Found, path: str | os.PathLike) -> tuple[Json, dict[str, int]]:
    """(a tokenizer.json that says how text is cut and merged alone, name -> id of its special tokens).

    Every id of 0..V-1 has a token in it: the library counts added tokens on from the vocabulary, whatever their ids.
    """
    spec = parsed(found.raw, path)
    model = {"type": "BPE"} | spec["model"]
    vocabulary, added = model.get("vocab"), spec.get("added_tokens") or []
    if model["type"] != "BPE" or not isinstance(vocabulary, dict) or not isinstance(model.get("merges"), list):
        raise ValueError(f"{path}: its model is {model['type']!r}: must be 'BPE' with its vocab and merges; for BERT's "
                         "words tokenizer.kind='bert' reads a vocab.txt")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError(f"{path}: its words are written with marks (continuing_subword_prefix or end_of_word_suffix), "
                         "so text would not come back from its tokens")
    try:
        merges = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model["merges"]]
        added = [{"single_word": False, "lstrip": False, "rstrip": False, "normalized": True} | token
                 | {"special": bool(token.get("special")), "content": str(token["content"]), "id": int(token["id"])}
                 for token in added]
    except (TypeError, KeyError, ValueError, AttributeError):
        raise ValueError(f"{path}: damaged, its merges or added_tokens are malformed") from None
    called = {*found.names.values(), *found.ends}
    for token in added:
        if token["content"] in called or _CONTROL.fullmatch(token["content"]):
            token["special"] = True
    inside = {token["content"] for token in added}
    added += [{"id": vocabulary[name], "content": name, "single_word": False, "lstrip": False, "rstrip": False,
               "normalized": False, "special": True} for name in sorted(called & vocabulary.keys() - inside)]
    vocabulary, special = _numbered(vocabulary, added, path)
    added.sort(key=lambda token: token["id"])
    settled = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
               "normalizer": _normalizer(spec.get("normalizer"), path),
               "pre_tokenizer": _without_prefix(spec.get("pre_tokenizer")), "post_processor": None, "decoder": None,
               "model": model | {"dropout": None, "vocab": vocabulary, "merges": merges}}
    return settled, special


def _numbered(vocabulary: dict[str, int], added: list[Json], path: str | os.PathLike
              ) -> tuple[dict[str, int], dict[str, int]]:
    """(the vocabulary without gaps, name -> id of the special tokens, ids without a token among them)."""
    by_id: dict[int, str] = {}
    for name, place in [*vocabulary.items(), *((token["content"], token["id"]) for token in added)]:
        if type(place) is not int or not 0 <= place < MOST_TOKENS or by_id.setdefault(place, name) != name:
            raise ValueError(f"{path}: the id of token {name!r} is {place!r}: must be a number of its own in "
                             f"0..{MOST_TOKENS - 1}")
    special = {token["content"]: token["id"] for token in added if token["special"]}
    gaps = {f"<unused {place}>": place for place in range(max(by_id, default=-1) + 1) if place not in by_id}
    if len(vocabulary) + len(gaps) <= max(vocabulary.values(), default=-1) or gaps:
        vocabulary = vocabulary | {token["content"]: token["id"] for token in added} | gaps
    return vocabulary, special | gaps


def _normalizer(node: object, path: str | os.PathLike) -> Json | None:
    """The normalizer without a blank in front; ValueError where it loses more than NFC does."""
    parts = [part for part in _nodes(node) if part["type"] != "Prepend"]
    for part in parts:
        if part not in (_NFC, _REPLACE):
            raise ValueError(f"{path}: its normalizer {part['type']} changes text for good: must be NFC, or the "
                             f"replacement of a space by {BLANK!r}")
    return {"type": "Sequence", "normalizers": parts} if parts else None


def _without_prefix(node: object) -> Json | None:
    """The pre-tokenizer, without a blank in front of the text."""
    parts = []
    for part in _nodes(node):
        if part["type"] == "ByteLevel":
            part |= {"add_prefix_space": False}
        if part["type"] == "Metaspace":
            part = {k: v for k, v in part.items() if k != "add_prefix_space"} | {"prepend_scheme": "never"}
        parts.append(part)
    return {"type": "Sequence", "pretokenizers": parts} if parts else None


def _words(spec: Json, special: dict[str, int], size: int, bytewise: bool) -> tuple[bytes, ...]:
    """The bytes of every id; of a special one its name."""
    words, alphabet, fallback = [b""] * size, byte_alphabet(), spec["model"].get("byte_fallback")

    def plain(name: str) -> bytes:
        if fallback and re.fullmatch("<0x[0-9A-F]{2}>", name):
            return bytes([int(name[3:5], 16)])
        return (name if bytewise else name.replace(BLANK, " ")).encode()

    for name, place in spec["model"]["vocab"].items():
        known = bytewise and all(letter in alphabet for letter in name)
        words[place] = bytes(alphabet[letter] for letter in name) if known else plain(name)
    for token in spec["added_tokens"]:
        words[token["id"]] = token["content"].encode() if bytewise else plain(token["content"])
    for name, place in special.items():
        words[place] = name.encode()
    return tuple(words)


def _deciding(spec: Json, eot: int) -> str:
    """All that decides ids, as one text: without what is null, false or empty, which files may write or leave out."""
    def said(value: object) -> object:
        if isinstance(value, dict):
            return {name: said(one) for name, one in value.items() if one or one == 0 and one is not False}
        return [said(one) for one in value] if isinstance(value, list) else value

    model = {name: value for name, value in spec["model"].items() if name not in ("vocab", "merges")}
    words = {"vocab": spec["model"]["vocab"], "merges": spec["model"]["merges"]}
    return json.dumps([said(spec | {"model": model}), words, eot], sort_keys=True, allow_nan=False)
