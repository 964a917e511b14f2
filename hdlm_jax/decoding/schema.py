"""JSON schema -> canvas -> JSON: structure by construction (S^3, arXiv 2507.04504).

Braces, keys and punctuation are given tokens; a field is a few free positions, each with its own set of tokens. A
diffusion model draws positions in any order and several at once, so every combination of allowed tokens must be a field
of the right type:

- A *filler* (the end of text, which no text encodes to) stands for nothing and is left out by `Scaffold.text`, so
  values may be shorter than their field.
- String: tokens without quote, backslash and control characters, each whole UTF-8 by itself.
- Number: a sign in front, one digit that must be, one place for the point; `text` drops leading zeros and a point that
  nothing follows.
- Choice (enum, boolean): each position takes the tokens that the choices have there, shorter ones filled up. Read from
  the left, a token that none of the choices left has is passed over; so the first position where choices differ
  decides, and later ones decide among those that agree with it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hdlm_jax.data.tokenizers import Tokenizer
from hdlm_jax.decoding import canvas as canvases
from hdlm_jax.diffusion.hierarchy import Hierarchy

_NOTES = {"title", "description", "default", "examples", "deprecated", "$schema", "$id", "$comment"}
_KEYWORDS = {"object": {"properties", "required", "additionalProperties"}, "array": {"items", "minItems", "maxItems"},
             "string": {"minLength", "budget"}, "integer": {"minimum", "budget"}, "number": {"minimum", "budget"},
             "boolean": set(), "null": set()}
_DIGITS = 6  # positions of a number that does not say its budget
_MOST_DIGITS = 100  # positions; a number of at most 300 digits is finite as a float
_MOST_DEPTH = 64  # objects and arrays inside each other
_MOST_POSITIONS = 1 << 14  # free positions, where nobody tells how long a text is
_MOST_TEXT = 1 << 20  # characters of what is given and of choices, each piece counted with _PIECE more
_PIECE = 16
_BOOLEANS = [True, False]
_PYTHON: dict[str, Any] = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float),
                           "boolean": bool, "null": type(None)}


@dataclasses.dataclass(frozen=True)
class Literal:
    """Text that is given, and its tokens."""

    text: str
    ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Field:
    """Free positions. path: as "$.a[0]"; sets: bool [V] of each; choices: (text, tokens) of an enum, filled up."""

    path: str
    type: str
    sets: tuple[np.ndarray, ...]
    choices: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Scaffold:
    """A schema's pieces in order. Make one with `scaffold`; `canvas()` starts texts, `read(tokens)` ends them."""

    pieces: tuple[Literal | Field, ...]
    tokenizer: Tokenizer
    hierarchy: Hierarchy
    prompt: tuple[int, ...] = ()

    def canvas(self, rows: int = 1, seq_len: int = 0) -> canvases.Canvas:
        """`rows` canvases: prompt, literals, fields; S and errors as in hdlm_jax.decoding.canvas.make."""
        z, kinds = list(self.prompt), [0] * len(self.prompt)
        allowed: dict[bytes, np.ndarray] = {}  # in the order of their kinds
        for piece in self.pieces:
            if isinstance(piece, Literal):
                z += piece.ids
                kinds += [0] * len(piece.ids)
                continue
            for tokens in piece.sets:
                allowed.setdefault(tokens.tobytes(), tokens)
                z.append(int(np.argmax(tokens)) if tokens.sum() == 1 else self.hierarchy.mask_id)
                kinds.append(1 + list(allowed).index(tokens.tobytes()))
        return canvases.make(z, self.hierarchy, rows, seq_len, kinds, list(allowed.values()))

    def text(self, tokens: Sequence[int]) -> str:
        """The JSON text of one row's tokens, prompt and all, which were drawn from this canvas."""
        at, out = len(self.prompt), []
        for piece in self.pieces:
            if isinstance(piece, Literal):
                out.append(piece.text)
                at += len(piece.ids)
            else:
                out.append(self._value(piece, [int(i) for i in tokens[at : at + len(piece.sets)]]))
                at += len(piece.sets)
        return "".join(out)

    def read(self, tokens: Sequence[int]) -> Any:
        """The object one row's tokens stand for: json.loads of `text`."""
        return json.loads(self.text(tokens))

    def _value(self, field: Field, ids: Sequence[int]) -> str:
        if field.choices:
            left = field.choices
            for place, token in enumerate(ids):
                left = tuple(c for c in left if c[1][place] == token) or left
            return left[0][0]
        text = b"".join(self.tokenizer.token_bytes(i) for i in ids if i != self.tokenizer.eot).decode()
        if field.type == "string":
            return text
        sign, whole, part = re.fullmatch(r" ?(-?)(\d+)(?:\.(\d*))?", text).groups()  # type: ignore[union-attr]
        return sign + (whole.lstrip("0") or "0") + (f".{part}" if part else "")


def scaffold(schema: object, tokenizer: Tokenizer, hierarchy: Hierarchy, budget: int = 16, *, prompt: str = "",
             seq_len: int = 0) -> Scaffold:
    """The pieces of a JSON schema, so that all that is drawn from them parses and validates.

    Understood: type object (all properties are written, in their order), array with minItems = maxItems, string with
    minLength, integer and number with minimum 0, boolean, null; enum and const of anything; notes (title,
    description, ..). Other keywords are refused, as they could not be kept.

    Args:
      schema: a dict, or its JSON text.
      tokenizer: a byte-level one of hdlm_jax.data.tokenizers (gpt2, bpe, bytes).
      budget: free positions of a string; a field's own number is its keyword "budget" (which validators ignore).
        Numbers have at most 6 unless they say so.
      prompt: text in front, given.
      seq_len: most tokens the model takes; 0: not known, and at most 16,384 positions are free.

    Raises:
      ValueError: a schema that is none of this, naming the place; one that is nested more than 64 deep, or that would
        write more than seq_len positions or about a million characters; a tokenizer that loses text.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except RecursionError:
            raise ValueError(f"schema is {_TOO_DEEP}") from None
        except ValueError as error:
            raise ValueError(f"schema is not JSON: {error}") from None
    if tokenizer.kind == "bert":
        raise ValueError("tokenizer.kind='bert' joins words by blanks, which breaks the text; use gpt2, bpe, bytes")

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text).tolist())

    pieces: list[Literal | Field] = []
    parts = _Compiler(tokenizer, budget, seq_len or _MOST_POSITIONS).value(schema, "$", False)
    for given, group in itertools.groupby(parts, key=lambda part: isinstance(part, str)):
        if given:
            text = "".join(map(str, group))
            pieces.append(Literal(text, ids(text)))
        else:
            pieces += [part for part in group if isinstance(part, Field)]
    return Scaffold(tuple(pieces), tokenizer, hierarchy, ids(prompt))


class _Choices(NamedTuple):
    """An enum, encoded: the text around its free positions (of a single choice all of it), and what a Field has."""

    before: str
    after: str = ""
    sets: tuple[np.ndarray, ...] = ()
    filled: tuple[tuple[str, tuple[int, ...]], ...] = ()


class _Compiler:
    """Schemas to lists of texts and fields. What is written is counted beforehand: few characters may ask for much."""

    def __init__(self, tokenizer: Tokenizer, budget: int, positions: int):
        self.tokenizer, self.budget, self.most = tokenizer, budget, positions
        self.depth, self.text, self.positions = 0, 0, 0  # of what is written so far
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.letters = np.array([not set(t) & _UNSAFE and t.decode(errors="ignore").encode() == t for t in self.tokens])
        self.letters[list(tokenizer.special.values())] = False
        self.loose = self._or_filler(self.letters)
        self.match, self.number = functools.cache(self._match), functools.cache(self._number)
        self.encoded: dict[tuple[int, bool], _Choices] = {}  # by the list they are from, which arrays repeat

    def value(self, schema: object, path: str, space: bool) -> list[str | Field]:
        """space: one stands in front of the value, to be made part of it."""
        self.depth += 1
        if self.depth > _MOST_DEPTH:
            raise ValueError(f"schema is {_TOO_DEEP}")
        found = self._value(schema, path, space)
        self.depth -= 1
        return found

    def write(self, path: str, text: str) -> str:
        """`text`, counted."""
        self.text += _PIECE + len(text)
        if self.text > _MOST_TEXT:
            raise ValueError(f"schema at {path}: up to here more than {_MOST_TEXT:,} characters are to be written; "
                             "give shorter arrays and fewer choices")
        return text

    def take(self, path: str, positions: int) -> None:
        """Counts free positions."""
        self.positions += positions
        if self.positions > self.most:
            raise ValueError(f"schema at {path}: up to here {self.positions:,} positions are free, a text has at most "
                             f"{self.most:,} tokens; give smaller budgets and shorter arrays")

    def _value(self, schema: object, path: str, space: bool) -> list[str | Field]:
        if not isinstance(schema, dict):
            raise ValueError(f"schema at {path}: must be an object, is {reprlib.repr(schema)}")
        kind: Any = schema.get("type")
        if "type" in schema and (not isinstance(kind, str) or kind not in _KEYWORDS):
            raise ValueError(f"schema at {path}: type={reprlib.repr(kind)}: choose one of {', '.join(_KEYWORDS)}")
        choices = [schema["const"]] if "const" in schema else schema.get("enum")
        known = {"type"} | _NOTES | ({"const", "enum"} if choices is not None else _KEYWORDS.get(str(kind), set()))
        if more := sorted(set(schema) - known):
            raise ValueError(f"schema at {path}: {reprlib.repr(more[0])} cannot be kept here; "
                             f"understood: {', '.join(sorted(known - _NOTES))}")
        if choices is None and kind is None:
            raise ValueError(f"schema at {path}: it has no type, enum or const")
        if choices is not None:
            if not isinstance(choices, list) or not choices or ("const" in schema and "enum" in schema):
                raise ValueError(f"schema at {path}: enum must be a list of at least one value (or const one)")
            if kind and (wrong := [c for c in choices if not _is(kind, c)]):
                raise ValueError(f"schema at {path}: {reprlib.repr(wrong[0])} in enum is no {kind}")
            return self._choice(choices, path, space)
        blank = " " * space
        if kind == "null":
            return [self.write(path, blank + "null")]
        if kind == "boolean":
            return self._choice(_BOOLEANS, path, space)
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
            self.take(path, positions)
            sets = [self.letters] * least + [self.loose] * (positions - least)
            return [self.write(path, blank + '"'), Field(path, "string", tuple(sets)), '"']
        if (minimum := schema.get("minimum", 0)) != 0:
            raise ValueError(f"schema at {path}: minimum={reprlib.repr(minimum)} cannot be kept; 0 is the only one")
        if positions > _MOST_DIGITS:
            raise ValueError(f"schema at {path}: budget={positions}: a number has at most {_MOST_DIGITS}")
        self.take(path, positions)
        return [Field(path, kind, self.number(positions, kind == "number", "minimum" not in schema))]

    def _object(self, schema: Mapping[str, Any], path: str, blank: str) -> list[str | Field]:
        properties = schema.get("properties", {})
        if not isinstance(properties, dict):
            raise ValueError(f"schema at {path}: properties must be an object, is {reprlib.repr(properties)}")
        required = schema.get("required", [])
        if not isinstance(required, list | tuple):
            raise ValueError(f"schema at {path}: required must be a list of names, is {reprlib.repr(required)}")
        if missing := [name for name in required if not isinstance(name, str) or name not in properties]:
            raise ValueError(f"schema at {path}: {reprlib.repr(missing[0])} is required, and not in properties")
        out: list[str | Field] = [self.write(path, blank + "{")]
        for i, (name, inner) in enumerate(properties.items()):
            out.append(self.write(path, ", " * (i > 0) + _json(name) + ":"))
            out += self.value(inner, f"{path}.{name[:40]}", True)
        return [*out, "}"]

    def _array(self, schema: Mapping[str, Any], path: str, blank: str) -> list[str | Field]:
        count = schema.get("minItems")
        if count is None or count != schema.get("maxItems"):
            raise ValueError(f"schema at {path}: an array needs minItems = maxItems, its fixed length")
        _count(count, 0, f"{path}: minItems")
        out: list[str | Field] = [self.write(path, blank + "[")]
        for i in range(count):
            out += [","] * (i > 0) + self.value(schema.get("items"), f"{path}[{i}]", i > 0)
        return [*out, "]"]

    def _choice(self, choices: list[Any], path: str, space: bool) -> list[str | Field]:
        """All strings: their quotes are given. Else the choices' own texts, the space in front included."""
        known = self.encoded.get((id(choices), space))
        if known:
            self.take(path, len(known.sets))
        else:
            known = self.encoded[id(choices), space] = self._encode(choices, path, space)
        field = [Field(path, "choice", known.sets, known.filled)] if known.sets else []
        before = [self.write(path, known.before)] if known.before else []
        return [*before, *field, *([known.after] if known.after else [])]

    def _encode(self, choices: list[Any], path: str, space: bool) -> _Choices:
        texts = list(dict.fromkeys(self.write(path, _json(c)) for c in choices))
        front = " " * space
        if len(texts) == 1:
            return _Choices(front + texts[0])
        before = after = ""
        if all(isinstance(c, str) for c in choices):
            before, after, front, texts = front + '"', '"', "", [t[1:-1] for t in texts]
        ids = [self.tokenizer.encode(front + t).tolist() for t in texts]
        columns = list(itertools.zip_longest(*ids, fillvalue=self.tokenizer.eot))
        self.take(path, len(columns))
        sets = tuple(np.isin(np.arange(len(self.tokens)), column) for column in columns)
        filled = zip([front + t for t in texts], zip(*columns, strict=True), strict=True)
        return _Choices(before, after, sets, tuple(filled))

    def _number(self, positions: int, real: bool, signed: bool) -> tuple[np.ndarray, ...]:
        """[sign or digits] digits .. [a digit that must be] [point] digits .., as many as there are positions."""
        behind = (positions - 1) // 3 if real else 0
        front = positions - behind - (behind > 0)
        digits, point = self._match(rb"\d{1,3}"), self._match(rb"\.\d{0,3}")
        first = self._match(rb" ?-?\d{0,3}" if signed else rb" ?\d{0,3}")
        must = self._match(rb" ?-?\d{1,3}" if signed else rb" ?\d{1,3}") if front == 1 else digits
        sets = [self._or_filler(digits)] * positions
        sets[0], sets[front - 1] = self._or_filler(first), must
        if behind:
            sets[front] = self._or_filler(point)
        return tuple(sets)

    def _match(self, pattern: bytes) -> np.ndarray:
        """bool [V]: tokens that are wholly of a pattern, which the filler is not."""
        return np.array([re.fullmatch(pattern, t) is not None for t in self.tokens])

    def _or_filler(self, tokens: np.ndarray) -> np.ndarray:
        return tokens | (np.arange(len(tokens)) == self.tokenizer.eot)


_TOO_DEEP = f"nested more than {_MOST_DEPTH} deep; give a flatter one"
_UNSAFE = {*range(0x20), *b'"\\'}


def _is(kind: str, value: object) -> bool:
    return isinstance(value, _PYTHON[kind]) and isinstance(value, bool) == (kind == "boolean")


def _json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"schema: {reprlib.repr(value)} cannot be written as JSON ({error})") from None


def _count(value: object, least: int, what: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"schema at {what}={value!r}: must be a whole number of at least {least}")
