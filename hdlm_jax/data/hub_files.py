"""The files of tokenizers that come with open models, read into one form: the text of a tokenizer.json, and what the
others say of it. A tokenizer.json, a folder of the Hugging Face hub, or a GGUF file; no code of theirs is run."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hdlm_jax.common import jsons
from hdlm_jax.common.extras import package
from hdlm_jax.common.jsons import Json
from hdlm_jax.data.base_tokenizer import PATTERNS

HUB_FILE, PLAIN_FILE = "hub_tokenizer.json", "tokenizer.json"  # what `save` writes; what the hub has
MOST_BYTES = 1 << 28  # of a file that is read whole
BLANK = "\u2581"  # how SentencePiece writes a space

# How text is cut, by the names that llama.cpp gave to it: one of PATTERNS, whether digits stand alone before that,
# whether text is composed (NFC) first, whether a piece that is a word needs no merges.
_GPT2, _QWEN, _LLAMA = ("gpt2", False, False, False), ("qwen2", False, True, False), ("llama3", False, False, True)
_CUTS = {"gpt-2": _GPT2, "olmo": _GPT2, "phi-2": _GPT2,
         **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), ("gpt2", True, False, False)),
         **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN),
         **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA),
         **dict.fromkeys(("gpt-4o", "llama4"), ("o200k", False, False, False))}
# The same by the class that tokenizer_config.json names, for folders of vocab.json and merges.txt
_CLASSES = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2", "DreamTokenizer": "qwen2"}
_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6  # tokenizer.ggml.token_type
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token")
NO_HUB = "tokenizer.kind='hub' takes a tokenizer.json, a folder that has one, or a .gguf file"


@dataclasses.dataclass(frozen=True)
class Found:
    """What the files say.

    Attributes:
      raw: the text of a tokenizer.json, as it was found where it was found.
      names: bos_token, eos_token, ... -> the token, as chat templates call them.
      ends: tokens that end a text or a turn, eos_token first, then those of the other files.
      chat_template: jinja2 text, '' where there is none.
    """

    raw: bytes
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    ends: tuple[str, ...] = ()
    chat_template: str = ""


def deciding_file(path: str | os.PathLike) -> Path:
    """The file that says which ids text has: `path` itself, or the one in the folder `path`."""
    folder = Path(path)
    if not folder.is_dir():
        return folder
    return next((folder / name for name in (HUB_FILE, PLAIN_FILE, "vocab.json") if (folder / name).exists()),
                folder / PLAIN_FILE)


def read(path: str | os.PathLike) -> Found:
    """What a tokenizer.json, a folder of the hub or a GGUF file says.

    ValueError, one line: no such file, too large, damaged, or of a kind that is not read.
    """
    file = Path(path)
    if file.is_dir():
        try:
            return _folder(file)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: its files do not hold what a tokenizer's do ({type(error).__name__}: {error})"
                             ) from None
    try:
        with open(file, "rb") as opened:
            magic = opened.read(4)
    except OSError as error:
        raise ValueError(f"tokenizer.file {str(path)!r} cannot be read: {error.strerror}") from None
    return _gguf(file) if magic == b"GGUF" else Found(_bytes(file))


def parsed(raw: bytes, path: str | os.PathLike) -> Json:
    """The object in the text of a tokenizer.json; ValueError with the name `path` where it is none."""
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); {NO_HUB}") from None
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        raise ValueError(f"{path}: no tokenizer.json, it has no 'model'; {NO_HUB}")
    return found


def _bytes(file: Path) -> bytes:
    try:
        if (size := file.stat().st_size) > MOST_BYTES:
            raise ValueError(f"{file}: it has {size:,} bytes, a tokenizer's file at most {MOST_BYTES:,}")
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"tokenizer.file {str(file)!r} cannot be read: {error.strerror}") from None


def _object(file: Path) -> Json:
    """The object in a JSON file; {} where there is no file."""
    if not file.exists():
        return {}
    if (size := file.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{file}: it has {size:,} bytes, a tokenizer's file at most {MOST_BYTES:,}")
    return jsons.read_json(file)


def _text(token: object) -> str:
    """The text of a token as the hub writes it: itself, or an object with its content."""
    return str(token.get("content", "")) if isinstance(token, Mapping) else token if isinstance(token, str) else ""


def _folder(folder: Path) -> Found:
    config = _object(folder / "special_tokens_map.json") | _object(folder / "tokenizer_config.json")
    more = {int(place): token for place, token in (config.get("added_tokens_decoder") or {}).items() if place.isdigit()}
    raw = _bytes(folder / PLAIN_FILE) if (folder / PLAIN_FILE).exists() else _vocab_and_merges(folder, config)
    spec = parsed(raw, folder / PLAIN_FILE)
    added = spec.get("added_tokens") or []
    there = {token.get("id") for token in added if isinstance(token, dict)}
    new = [{**token, "id": place} for place, token in more.items() if place not in there and _text(token)]
    if new:  # tokenizer_config.json may know tokens that tokenizer.json does not
        spec["added_tokens"] = sorted([*added, *new], key=lambda token: token["id"])
        raw = json.dumps(spec, allow_nan=False).encode()
    text = {token["id"]: _text(token) for token in spec.get("added_tokens") or []}
    ends = [_text(config.get("eos_token"))]
    for name in ("generation_config.json", "config.json"):
        ids = _object(folder / name).get("eos_token_id")
        ends += [text.get(place, "") for place in (ids if isinstance(ids, list) else [ids])]
    template = config.get("chat_template") or ""
    if isinstance(template, list):  # several, each with its name
        template = next((t.get("template", "") for t in template if t.get("name") == "default"), "")
    if (folder / "chat_template.jinja").exists():
        template = _bytes(folder / "chat_template.jinja").decode("utf-8", errors="replace")
    names = {name: _text(config[name]) for name in _NAMED if _text(config.get(name))}
    return Found(raw, names, tuple(dict.fromkeys(filter(None, ends))), str(template))


def _vocab_and_merges(folder: Path, config: Json) -> bytes:
    """A tokenizer.json of the older vocab.json and merges.txt."""
    if not (folder / "vocab.json").exists() or not (folder / "merges.txt").exists():
        raise ValueError(f"{folder}: no {PLAIN_FILE} in it; {NO_HUB}")
    kind = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    if kind not in _CLASSES:
        raise ValueError(f"{folder}: no {PLAIN_FILE}, and tokenizer_class={kind!r} does not tell how text is cut: must "
                         f"be one of {', '.join(_CLASSES)}")
    lines = _bytes(folder / "merges.txt").decode("utf-8", errors="replace").split("\n")
    merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    return _byte_level(_object(folder / "vocab.json"), merges, [], *_CUTS[_CLASSES[kind]])


# ------------------------------------------------------------------------------------------------------- GGUF


def _gguf(file: Path) -> Found:
    gguf = package("gguf", "hub", f"tokenizer.file={str(file)!r}")
    try:
        fields = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()
                  if name.startswith("tokenizer.")}
    except Exception as error:  # whatever the reader meets in a damaged file
        raise ValueError(f"{file}: this GGUF file cannot be read ({type(error).__name__}: {error})") from None

    def field(name: str, kind: type, default: Any = None) -> Any:
        found = fields.get(f"tokenizer.{name}", default)
        if not isinstance(found, kind):
            raise ValueError(f"{file}: damaged, or without a tokenizer: tokenizer.{name} must be of type "
                             f"{kind.__name__}, is {type(found).__name__}")
        return found

    tokens, model = field("ggml.tokens", list), field("ggml.model", str)
    types = field("ggml.token_type", list, [_NORMAL] * len(tokens))
    if len(types) != len(tokens) or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"{file}: damaged, tokenizer.ggml.tokens must be {len(types):,} texts, one for each type")
    added = [{"id": i, "content": token, "special": kind != _USER, "normalized": False}
             for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind in (_UNKNOWN, _CONTROL, _USER)]
    if model == "gpt2":
        cut = field("ggml.pre", str, "")
        if cut not in _CUTS:
            raise ValueError(f"{file}: tokenizer.ggml.pre={cut!r} does not tell how text is cut: must be one of "
                             f"{', '.join(_CUTS)}; take the model's tokenizer.json")
        raw = _byte_level({token: i for i, token in enumerate(tokens)}, field("ggml.merges", list), added, *_CUTS[cut])
    elif model == "llama":
        raw = _sentencepiece(tokens, types, field("ggml.scores", list), added)
    else:
        raise ValueError(f"{file}: tokenizer.ggml.model={model!r}: must be gpt2 (byte-level BPE) or llama "
                         "(SentencePiece); take the model's tokenizer.json")

    def token(key: str) -> str:
        place = fields.get(f"tokenizer.ggml.{key}_token_id")
        return tokens[place] if isinstance(place, int) and 0 <= place < len(tokens) else ""

    keys = ("bos", "eos", "unknown", "padding", "mask")
    names = {name: token(key) for name, key in zip(_NAMED, keys, strict=True) if token(key)}
    ends = dict.fromkeys(filter(None, (token("eos"), token("eot"))))
    return Found(raw, names, tuple(ends), field("chat_template", str, ""))


def _byte_level(vocabulary: Mapping[str, int], merges: Sequence[str], added: list[Json], pattern: str,
                digits: bool, composed: bool, whole: bool) -> bytes:
    """A tokenizer.json of a byte-level BPE; pattern, digits, composed, whole: as in _CUTS."""
    if pattern == "gpt2":
        cuts: list[Json] = [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]
    else:
        cuts = [{"type": "Split", "pattern": {"Regex": PATTERNS[pattern]}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]
    if digits:
        cuts.insert(0, {"type": "Digits", "individual_digits": True})
    return json.dumps({
        "version": "1.0", "added_tokens": added, "normalizer": {"type": "NFC"} if composed else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
        "model": {"type": "BPE", "ignore_merges": whole, "vocab": vocabulary, "merges": merges}},
        allow_nan=False).encode()


def _sentencepiece(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float], added: list[Json]) -> bytes:
    """A tokenizer.json of a SentencePiece BPE, which lists no merges: two neighbours that are a token together become
    that token, the one with the best score first."""
    if len(scores) != len(tokens):
        raise ValueError(f"tokenizer.ggml.scores has {len(scores):,} numbers, must be {len(tokens):,}")
    blank = re.compile(" {2,}")  # some files write tokens of blanks alone as they are
    tokens = [BLANK * len(token) if blank.fullmatch(token) else token for token in tokens]
    pieces = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind in (_NORMAL, _USER)}
    halves = ((piece, piece[:cut], piece[cut:]) for piece in pieces for cut in range(1, len(piece)))
    # SentencePiece's own file scores what users added 0, above all others, where GGUF files say -1000
    merges = [(0.0 if types[pieces[whole]] == _USER else scores[pieces[whole]], left, right)
              for whole, left, right in halves if left in pieces and right in pieces]
    merges.sort(key=lambda merge: (-merge[0], -len(merge[1]), -len(merge[2])))
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    return json.dumps({
        "version": "1.0", "added_tokens": [token | {"content": tokens[token["id"]]} for token in added],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}, "pre_tokenizer": None,
        "model": {"type": "BPE", "unk_token": unknown, "fuse_unk": True, "byte_fallback": _BYTE in types,
                  "vocab": {token: i for i, token in enumerate(tokens)},
                  "merges": [merge[1:] for merge in merges]}}, allow_nan=False).encode()
