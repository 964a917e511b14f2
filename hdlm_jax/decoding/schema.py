"""JSON schema -> canvas -> JSON: structure by construction (S^3, arXiv 2507.04504).

Braces, keys and punctuation are given words; a field is a few free positions, each with its own set of words. A
diffusion model draws positions in any order and several at once, so a set must be right *whatever* the others take:
every combination of allowed words is a field of the right type. What makes that possible:

- A *filler* word (the end of text, which no text encodes to) stands for nothing and is dropped by `Scaffold.text`, so
  values may be shorter than their field. All fields but the empty string's have a position that is no filler.
- String: words without quote, backslash and control characters, each whole UTF-8 by itself.
- Number: a sign in front, a digit that must be, one place for the point; `text` drops leading zeros, whose value is
  nothing, and a point that nothing follows.
- Choice (enum, boolean): the position's words of all choices, shorter ones filled up. Reading from the left, words that
  none of the choices left has are passed over; the first position where choices differ therefore always decides, by its
  own law, and later ones decide among those that agree with it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from hdlm_jax.decoding import canvas as canvases

_NOTES = {"title", "description", "default", "examples", "deprecated", "$schema", "$id", "$comment"}
_KEYWORDS = {"object": {"properties", "required", "additionalProperties"}, "array": {"items", "minItems", "maxItems"},
             "string": {"minLength", "budget"}, "integer": {"minimum", "budget"}, "number": {"minimum", "budget"},
             "boolean": set(), "null": set()}
_DIGITS = 6  # positions of a number that does not say its budget
_MOST_DIGITS = 100  # positions; a number of at most 300 digits is finite as a float
_PYTHON: dict[str, Any] = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float),
                           "boolean": bool, "null": type(None)}


@dataclasses.dataclass(frozen=True)
class Literal:
    """Text that is given, and its words."""

    text: str
    ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Field:
    """Free positions. path: as "$.a[0]"; sets: bool [V] of each; choices: (text, words) of an enum, filled up."""

    path: str
    type: str
    sets: tuple[np.ndarray, ...]
    choices: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Scaffold:
    """A schema's pieces in order. Make one with `scaffold`; `canvas()` starts texts, `read(tokens)` ends them."""

    pieces: tuple[Literal | Field, ...]
    tokenizer: Any
    hierarchy: Any
    filler: int
    prompt: tuple[int, ...] = ()

    def canvas(self, rows: int = 1, seq_len: int = 0) -> canvases.Canvas:
        """`rows` canvases: prompt, literals, fields; S and errors as in hdlm_jax.decoding.canvas.make."""
        z, kinds = list(self.prompt), [0] * len(self.prompt)
        tables: dict[bytes, int] = {}
        allowed: list[np.ndarray] = []
        for piece in self.pieces:
            if isinstance(piece, Literal):
                z += piece.ids
                kinds += [0] * len(piece.ids)
                continue
            for words in piece.sets:
                only = int(np.argmax(words)) if words.sum() == 1 else self.hierarchy.mask_id
                key = np.packbits(words).tobytes()
                if key not in tables:
                    tables[key] = len(tables) + 1
                    allowed.append(words)
                z.append(only)
                kinds.append(tables[key])
        return canvases.make(z, self.hierarchy, rows, seq_len, kinds, allowed)

    def text(self, tokens: Sequence[int]) -> str:
        """The JSON text of one row's tokens (from its beginning, prompt and all), fillers dropped.

        ValueError: tokens that were not drawn from this scaffold's canvas; names the position.
        """
        at, out = len(self.prompt), []
        for piece in self.pieces:
            if isinstance(piece, Literal):
                ids = tuple(int(i) for i in tokens[at : at + len(piece.ids)])
                if ids != piece.ids:
                    raise ValueError(f"tokens {at}..{at + len(piece.ids) - 1} are not the given {piece.text!r}")
                out.append(piece.text)
                at += len(ids)
                continue
            ids = tuple(int(i) for i in tokens[at : at + len(piece.sets)])
            if len(ids) < len(piece.sets):
                raise ValueError(f"{len(tokens)} tokens end inside field {piece.path}")
            for place, (token, words) in enumerate(zip(ids, piece.sets, strict=True)):
                if not (0 <= token < len(words) and words[token]):
                    raise ValueError(f"token {at + place} of field {piece.path} is {token}, which it may not take")
            out.append(self._value(piece, ids))
            at += len(ids)
        return "".join(out)

    def read(self, tokens: Sequence[int]) -> Any:
        """The object one row's tokens stand for: json.loads of `text`."""
        return json.loads(self.text(tokens))

    def _value(self, field: Field, ids: tuple[int, ...]) -> str:
        if field.choices:
            left = field.choices
            for place, token in enumerate(ids):
                left = tuple(c for c in left if c[1][place] == token) or left
            return left[0][0]
        raw = b"".join(self.tokenizer.token_bytes(i) for i in ids if i != self.filler)
        text = raw.decode("utf-8", errors="replace")
        if field.type == "string":
            return text
        sign, whole, part = re.fullmatch(r" ?(-?)(\d+)(?:\.(\d*))?", text).groups()  # type: ignore[union-attr]
        return sign + (whole.lstrip("0") or "0") + (f".{part}" if part else "")


def scaffold(schema: Any, tokenizer, hierarchy, budget: int = 16, *, prompt: str = "", filler: int | None = None,
             partial: bool = False) -> Scaffold:
    """The pieces of a JSON schema (S^3, arXiv 2507.04504), so that all that is drawn from them parses and validates.

    Understood: type object (all properties are written, in their order), array with minItems = maxItems, string with
    minLength, integer and number with minimum 0, boolean, null; enum and const of anything; notes (title,
    description, ..). Other keywords are refused, as they could not be kept.

    Args:
      schema: a dict, or its JSON text.
      tokenizer: a byte-level one of hdlm_jax.data.tokenizers (gpt2, bpe, bytes).
      budget: free positions of a string; a field's own number is its keyword "budget" (which validators ignore).
        Numbers have at most 6 unless they say so.
      prompt: text in front, given.
      filler: the word that stands for nothing; by default the end of text. No value holds it.
      partial: strings may take words that are pieces of a character (text beyond a vocabulary's whole characters);
        what then does not make a character becomes U+FFFD.

    Raises:
      ValueError: a schema that is none of this, naming the place; a tokenizer that loses text or has not the
        hierarchy's words.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise ValueError(f"schema is not JSON: {error}") from None
    if tokenizer.kind == "bert":
        raise ValueError("tokenizer.kind='bert' joins words by blanks, which breaks the text; use gpt2, bpe, bytes")
    if tokenizer.vocab_size != hierarchy.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} words, the hierarchy {hierarchy.vocab_size}")
    filler = tokenizer.eot if filler is None else filler
    if not 0 <= filler < hierarchy.vocab_size:
        raise ValueError(f"filler={filler}: must be a word, 0..{hierarchy.vocab_size - 1}")
    parts = _Compiler(tokenizer, budget, filler, partial).value(schema, "$", False)
    pieces: list[Literal | Field] = []
    buffer = ""
    for part in [*parts, None]:
        if isinstance(part, str):
            buffer += part
            continue
        if buffer:
            pieces.append(Literal(buffer, tuple(tokenizer.encode(buffer).tolist())))
            buffer = ""
        if part is not None:
            pieces.append(part)
    return Scaffold(tuple(pieces), tokenizer, hierarchy, filler, tuple(tokenizer.encode(prompt).tolist()))


class _Compiler:
    """Schemas to lists of texts and fields."""

    def __init__(self, tokenizer, budget: int, filler: int, partial: bool):
        self.tokenizer, self.budget, self.filler = tokenizer, budget, filler
        self.words = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        plain = np.array([not set(w) & _UNSAFE for w in self.words])
        plain[[tokenizer.eot, filler]] = False
        self.whole = plain & np.array([_is_utf8(w) for w in self.words])
        self.letters = plain if partial else self.whole

    def value(self, schema: Any, path: str, space: bool) -> list[str | Field]:
        """space: one stands in front of the value, to be made part of it."""
        if not isinstance(schema, dict):
            raise ValueError(f"schema at {path}: must be an object, is {schema!r}")
        kind: Any = schema.get("type")
        if "type" in schema and (not isinstance(kind, str) or kind not in _KEYWORDS):
            raise ValueError(f"schema at {path}: type={kind!r}: choose one of {', '.join(_KEYWORDS)}")
        choices = [schema["const"]] if "const" in schema else schema.get("enum")
        known = {"type"} | _NOTES | ({"const", "enum"} if choices is not None else _KEYWORDS.get(str(kind), set()))
        if more := sorted(set(schema) - known):
            raise ValueError(f"schema at {path}: {more[0]!r} cannot be kept here; "
                             f"understood: {', '.join(sorted(known - _NOTES))}")
        if choices is None and kind is None:
            raise ValueError(f"schema at {path}: it has no type, enum or const")
        if choices is not None:
            if not isinstance(choices, list) or not choices or ("const" in schema and "enum" in schema):
                raise ValueError(f"schema at {path}: enum must be a list of at least one value (or const one)")
            if kind and (wrong := [c for c in choices if not _is(kind, c)]):
                raise ValueError(f"schema at {path}: {wrong[0]!r} in enum is no {kind}")
            return self._choice(choices, path, space)
        blank = " " * space
        if kind == "null":
            return [blank + "null"]
        if kind == "boolean":
            return self._choice([True, False], path, space)
        if kind == "object":
            return self._object(schema, path, blank)
        if kind == "array":
            return self._array(schema, path, blank)
        positions = schema.get("budget", self.budget if kind == "string" else min(self.budget, _DIGITS))
        _count(positions, 1, f"{path}: budget")
        if kind == "string":
            least = schema.get("minLength", 0)
            _count(least, 0, f"{path}: minLength")
            if least > positions:
                raise ValueError(f"schema at {path}: minLength={least} needs a budget of as many, which is {positions}")
            self._some(self.whole if least else self.letters, path)
            sets = [self.whole] * least + [self._or_filler(self.letters)] * (positions - least)
            return [blank + '"', Field(path, "string", tuple(sets)), '"']
        if schema.get("minimum", 0) != 0:
            raise ValueError(f"schema at {path}: minimum={schema['minimum']!r} cannot be kept; 0 is the only one")
        if positions > _MOST_DIGITS:
            raise ValueError(f"schema at {path}: budget={positions}: a number has at most {_MOST_DIGITS}")
        return [Field(path, kind, self._number(positions, kind == "number", "minimum" not in schema, path))]

    def _object(self, schema, path, blank) -> list[str | Field]:
        properties = schema.get("properties", {})
        if not isinstance(properties, dict):
            raise ValueError(f"schema at {path}: properties must be an object, is {properties!r}")
        if missing := [name for name in schema.get("required", ()) if name not in properties]:
            raise ValueError(f"schema at {path}: {missing[0]!r} is required, and not in properties")
        out: list[str | Field] = [blank + "{"]
        for i, (name, inner) in enumerate(properties.items()):
            out.append(", " * (i > 0) + _json(name) + ":")
            out += self.value(inner, f"{path}.{name}", True)
        return [*out, "}"]

    def _array(self, schema, path, blank) -> list[str | Field]:
        count = schema.get("minItems")
        if count is None or count != schema.get("maxItems"):
            raise ValueError(f"schema at {path}: an array needs minItems = maxItems, its fixed length")
        _count(count, 0, f"{path}: minItems")
        out: list[str | Field] = [blank + "["]
        for i in range(count):
            out += [","] * (i > 0) + self.value(schema.get("items"), f"{path}[{i}]", i > 0)
        return [*out, "]"]

    def _choice(self, choices, path, space) -> list[str | Field]:
        """All strings: their quotes are given. Else the choices' own texts, the space in front included."""
        texts = list(dict.fromkeys(_json(c) for c in choices))
        if len(texts) == 1:
            return [" " * space + texts[0]]
        before = after = ""
        front = " " * space
        if all(isinstance(c, str) for c in choices):
            before, after, front, texts = front + '"', '"', "", [t[1:-1] for t in texts]
        words = [self.tokenizer.encode(front + t).tolist() for t in texts]
        longest = max(map(len, words))
        filled = [tuple(w + [self.filler] * (longest - len(w))) for w in words]
        if len(set(filled)) < len(filled):
            raise ValueError(f"schema at {path}: two choices are the same but for the filler {self.filler}")
        sets = [np.isin(np.arange(len(self.words)), column) for column in zip(*filled, strict=True)]
        field = Field(path, "choice", tuple(sets), tuple(zip([front + t for t in texts], filled, strict=True)))
        return [part for part in (before, field, after) if part]

    def _number(self, positions: int, real: bool, signed: bool, path: str) -> tuple[np.ndarray, ...]:
        """[sign or digits] digits .. [a digit that must be] [point] digits .., as many as there are positions."""
        behind = (positions - 1) // 3 if real else 0
        front = positions - behind - (behind > 0)
        digits, point = self._match(rb"\d{1,3}"), self._match(rb"\.\d{0,3}")
        first = self._match(rb" ?-?\d{0,3}" if signed else rb" ?\d{0,3}")
        must = self._match(rb" ?-?\d{1,3}" if signed else rb" ?\d{1,3}") if front == 1 else digits
        self._some(digits, path)
        sets = [self._or_filler(digits)] * positions
        sets[0], sets[front - 1] = self._or_filler(first), must
        if behind:
            sets[front] = self._or_filler(point)
        return tuple(sets)

    def _match(self, pattern: bytes) -> np.ndarray:
        """bool [V]: words that are wholly of a pattern; never the filler."""
        found = np.array([re.fullmatch(pattern, w) is not None for w in self.words])
        found[[self.tokenizer.eot, self.filler]] = False
        return found

    def _or_filler(self, words: np.ndarray) -> np.ndarray:
        return words | (np.arange(len(words)) == self.filler)

    def _some(self, words: np.ndarray, path: str) -> None:
        if not words.any():
            raise ValueError(f"schema at {path}: the tokenizer has no word that could stand there")


_UNSAFE = {*range(0x20), *b'"\\'}


def _is_utf8(word: bytes) -> bool:
    try:
        word.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is(kind: str, value: Any) -> bool:
    return isinstance(value, _PYTHON[kind]) and isinstance(value, bool) == (kind == "boolean")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _count(value: Any, least: int, what: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"schema at {what}={value!r}: must be a whole number of at least {least}")
