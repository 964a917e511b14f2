"""What a request asks for: its fields, checked, and the texts they stand for (runs/serve.py)."""

from __future__ import annotations

import json
import reprlib
import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hdlm_jax.common.jsons import Json
from hdlm_jax.config import ConfigError, GenerateConfig
from hdlm_jax.config.rules import choice, rule
from hdlm_jax.data import chat as chats
from hdlm_jax.data import features as vectors
from hdlm_jax.decoding import sampler, texts
from hdlm_jax.training.loading import Run

MOST_STEPS = 4096
MOST_STOPS = 8  # texts that end one
MOST_OPTIONS = 256  # characters
SIZES = {"depth": 16, "kept": 64, "confident": 64, "drafts": 16, "candidates": 16, "top_k": 64}  # they take memory
LEAST_TOKENS = 8  # of a block of sparsed, whose masks take memory as well
CHARACTERS = 64  # a token at the most, before they are counted as tokens

_SHARED: dict[str, Any] = {"max_tokens": int, "seed": int, "stop": (str, list), "stream": bool, "n": int,
                           "response_format": dict, "budget": int, "method": str, "options": str, "steps": int,
                           "temperature": float, "top_p": float, "canvas": bool}
FIELDS = {False: {"prompt": str, "template": str, "features": list, "echo": bool, **_SHARED},
          True: {"messages": list, "max_completion_tokens": int, "chat_template_kwargs": dict, **_SHARED}}
_SETTINGS = ("method", "options", "steps", "temperature", "top_p")
_IGNORED = ("model", "user", "stream_options")


class Order(NamedTuple):
    """A request that was understood."""

    asked: texts.Asked
    g: GenerateConfig
    front: str  # of the texts, not shown
    stops: tuple[str, ...]
    stream: bool
    canvas: bool
    prompt_tokens: int


def parse(body: bytes) -> Json:
    """A JSON object; ValueError where it is none."""
    def constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        found = json.loads(body, parse_constant=constant)
    except RecursionError:
        raise ValueError("body: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"body: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"body: must be a JSON object, not {type(found).__name__}")
    return found


def typed(body: Json, fields: Mapping[str, Any]) -> Json:
    """The fields that are given, of the right types; ConfigError for others."""
    out = {}
    for name, value in body.items():
        if name in _IGNORED or value is None:
            continue
        if name not in fields and not value:  # penalties of 0, empty lists of tools
            continue
        choice("field", name[:64], tuple(fields), f"{name[:64]!r} is no field here;")
        kind = fields[name]
        if kind is float and type(value) is int:
            value = float(value)
        names = "text or a list of texts" if isinstance(kind, tuple) else kind.__name__
        ok = isinstance(value, kind) and (kind is bool or type(value) is not bool)
        if not ok:
            raise ConfigError(f"{name}={reprlib.repr(value)}: must be of type {names}")
        out[name] = value
    return out


def _stops(given: str | list[Any]) -> tuple[str, ...]:
    stops = (given,) if isinstance(given, str) else tuple(given)
    ok = len(stops) <= MOST_STOPS and all(isinstance(stop, str) and 0 < len(stop) <= 256 for stop in stops)
    rule(ok, "stop", f"{len(stops)} texts", f"must be at most {MOST_STOPS} texts of 1 to 256 characters")
    return stops


def schema_of(given: Json) -> Any:
    """The JSON schema of a response_format, None for plain text."""
    choice("response_format.type", str(given.get("type")), ("text", "json_schema"))
    if given["type"] == "text":
        return None
    inside = given.get("json_schema")
    found = inside.get("schema") if isinstance(inside, dict) else None
    rule(isinstance(found, dict), "response_format.json_schema", inside, 'must be {"schema": {...}}')
    return found


def order(run: Run, body: Json, chat: bool) -> Order:
    """What a request asks for, checked as the command line checks it.

    Raises:
      ConfigError, ValueError: what cannot be written, in one line.
    """
    given = typed(body, FIELDS[chat])
    most = CHARACTERS * run.config.model.seq_len
    for name in ("prompt", "template"):
        rule(len(given.get(name, "")) <= most, name, f"{len(given.get(name, '')):,} characters",
             f"a text has at most {run.config.model.seq_len} tokens")
    rule(not ("prompt" in given and "template" in given), "template", given.get("template"), "is in place of a prompt")
    schema = schema_of(given["response_format"]) if "response_format" in given else None
    features = _features(run, given, schema is not None or "template" in given)
    ids, prompt = _front(run, given, chat)
    stops, n = _stops(given.get("stop", [])), given.get("n", 1)
    rule(1 <= n <= run.config.serve.batch, "n", n, f"must lie in 1..{run.config.serve.batch}")
    rule(given.get("steps", 1) <= MOST_STEPS, "steps", given.get("steps"), f"must be at most {MOST_STEPS}")
    rule(len(given.get("options", "")) <= MOST_OPTIONS, "options", f"{len(given.get('options', ''))} characters",
         f"are at most {MOST_OPTIONS}")
    places = run.config.data.feature_places
    length = _length(run, given, places + len(ids), schema is not None or "template" in given)
    values: Json = {name: given[name] for name in _SETTINGS if name in given}
    g = texts.settings(run, values, num_samples=n, length=length, prompt="", schema="",
                       seed=given.get("seed", secrets.randbelow(2**32)))
    _check_memory(g.options)
    if "template" in given:
        rule(schema is None, "response_format", "json_schema", "goes with a prompt, not with a template")
        asked = texts.filled(run, g, given["template"])
    elif schema is not None:
        if not run.process.unmasks:
            raise ConfigError("response_format: this process cannot fill blanks between given words")
        asked = texts.of_schema(run, g, schema, prompt, given.get("budget", 16), ids=ids if chat else ())
    elif chat:
        asked = texts.chatted(run, g, given["messages"], **_template(given))
    else:
        asked = texts.prompted(run, g, prompt, features)
    hidden = not chat and not given.get("echo", False) and schema is None
    return Order(asked, g, run.tokenizer.decode(ids) if hidden else "", stops, given.get("stream", False),
                 given.get("canvas", False), len(ids))


def _check_memory(options: str) -> None:
    """ConfigError for options of a method that would take much memory."""
    for name, _, value in (part.partition("=") for part in options.split()):
        most = SIZES.get(name)
        rule(most is None or int(value) <= most, f"options={name}", value, f"must be at most {most} here")
        rule(name != "tokens" or int(value) >= LEAST_TOKENS, f"options={name}", value,
             f"must be at least {LEAST_TOKENS} here")


def _features(run: Run, given: Json, fixed: bool) -> np.ndarray | None:
    """The vectors in front of a text, float32 [P, F] with NaN behind those that are given, of a run that needs some;
    fixed: the text is one with blanks, or of a schema."""
    shape = run.config.data.feature_places, run.config.data.feature_width
    if "features" not in given:
        sampler.check_features(run, None)
        return None
    many = f"{len(given['features'])} vectors"
    rule(shape[0] > 0, "features", many, "this run knows none (data.features_field)")
    rule(not fixed, "features", many, "go with a prompt alone")
    try:
        return vectors.padded(vectors.read(given["features"], shape), shape[0])
    except ValueError as error:
        raise ConfigError(f"features: {error}") from None


def _front(run: Run, given: Json, chat: bool) -> tuple[np.ndarray, str]:
    """(ids, text) of what is in front of an answer."""
    if not chat:
        prompt = given.get("prompt", "")
        return run.tokenizer.encode(prompt), prompt
    rule("messages" in given, "messages", None, "is missing")
    rule(len(json.dumps(given["messages"], allow_nan=False)) <= 2 * CHARACTERS * run.config.model.seq_len, "messages",
         f"{len(given['messages'])} messages", f"a conversation has at most {run.config.model.seq_len} tokens")
    return chats.chat_ids(run.tokenizer, given["messages"], **_template(given)), ""


def _template(given: Json) -> Json:
    """Variables of the chat template."""
    found = given.get("chat_template_kwargs", {})
    for name, value in found.items():
        ok = isinstance(value, str | int | float) and name not in ("run", "g", "tokenizer", "messages", "template",
                                                                   "add_generation_prompt")
        rule(ok, "chat_template_kwargs", name[:64], "must be a variable of the template, a text or number")
    return found


def _length(run: Run, given: Json, prompt: int, fixed: bool) -> int:
    """generate.length for so many new tokens."""
    name = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
    if name not in given:
        return 0
    rule(not fixed, name, given[name], "the blanks, or the schema, say how many tokens there are")
    most = run.config.model.seq_len - prompt
    rule(1 <= given[name] <= most, name, given[name], f"must be at least 1; behind {prompt} tokens a text of "
         f"{run.config.model.seq_len} has room for {max(most, 0)}")
    return prompt + int(given[name])
