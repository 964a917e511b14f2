"""Conversations as token ids, by the chat template that comes with an open model (jinja2 in its sandbox)."""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from hdlm_jax.common.extras import package
from hdlm_jax.data.base_tokenizer import Tokenizer
from hdlm_jax.data.hub_tokenizer import HubTokenizer

if TYPE_CHECKING:
    import jinja2

Message: TypeAlias = Mapping[str, Any]  # "role" and "content", both texts; a template may know of more
_GENERATION = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")  # marks for training that render nothing


def render(template: str, messages: Sequence[Message], add_generation_prompt: bool = True, **extras: Any) -> str:
    """The text of a conversation.

    Args:
      template: jinja2. messages: each a dict with "role" and "content".
      add_generation_prompt: open the assistant's turn behind them.
      extras: further variables of the template, as bos_token or enable_thinking.

    Raises:
      ValueError: a message is none, the template is broken or refuses them, or goes beyond its sandbox; one line.
    """
    _check(messages)
    if not template:
        raise ValueError("no chat template: this tokenizer's files have none (a base model's do not)")
    compiled = _compiled(template)
    try:
        return compiled.render(messages=[dict(message) for message in messages],
                               add_generation_prompt=add_generation_prompt, **extras)
    except Exception as error:  # a template is a program; whatever it raises is its own
        raise ValueError(f"chat template: {_line(error)}") from None


def chat_ids(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = True,
             **extras: Any) -> np.ndarray:
    """Ids int32 [n] of a conversation: what the template writes as special tokens becomes them, no message does.

    A message that holds the name of a special token is refused: rendered, it could not be told from the template's own,
    and whoever wrote it could end its turn and speak for another role.

    Raises:
      ValueError: as `render`; no chat template; such a message.
    """
    hub = _of_chats(tokenizer)
    return hub.encode_marked(_rendered(hub, messages, add_generation_prompt, extras))


def turns_ids(tokenizer: Tokenizer, messages: Sequence[Message], **extras: Any) -> tuple[np.ndarray, int]:
    """(ids int32 [n], prompt length): a conversation to train on, whose last message, the assistant's, is scored.

    The prompt is what `chat_ids` gives for the messages before it. Behind it come that message and the `turn_end` that
    closes it, and nothing further.

    Raises:
      ValueError: as `chat_ids`; the last message is not the assistant's; the template writes the turns before otherwise
        when it follows, or closes it with no turn_end.
    """
    hub = _of_chats(tokenizer)
    _check(messages)
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("messages: the last one must be the assistant's, which is what is scored")
    before = _rendered(hub, messages[:-1], True, extras)
    whole = _rendered(hub, messages, False, extras)
    if not whole.startswith(before):
        raise ValueError("chat template: it writes the turns before an answer otherwise when the answer follows, so "
                         f"they are not its prompt: {before[-40:]!r} became {whole[:len(before)][-40:]!r}")
    prompt, answer = hub.encode_marked(before), hub.encode_marked(whole[len(before):])
    closed = np.flatnonzero(answer == hub.turn_end)
    if not len(closed):
        raise ValueError(f"chat template: it closes the assistant's turn with no "
                         f"{hub.token_bytes(hub.turn_end).decode()!r}, the tokenizer's turn_end")
    return np.concatenate([prompt, answer[: closed[0] + 1]]), len(prompt)


def _of_chats(tokenizer: Tokenizer) -> HubTokenizer:
    if not isinstance(tokenizer, HubTokenizer) or not tokenizer.chat_template:
        raise ValueError(f"no chat template: a tokenizer of kind {tokenizer.kind!r} without one cannot write chats; "
                         "tokenizer.kind='hub' of a chat model has one")
    return tokenizer


def _rendered(hub: HubTokenizer, messages: Sequence[Message], add_generation_prompt: bool, extras: Mapping[str, Any]
              ) -> str:
    _check(messages)
    given = [(f"messages[{i}]", text) for i, message in enumerate(messages) for text in _texts(message)]
    for where, text in [*given, *((name, text) for name, value in extras.items() for text in _texts(value))]:
        if name := hub.special_in(text):
            raise ValueError(f"{where}: holds {name!r}, a special token of this tokenizer, which the chat template "
                             "alone may write (a text with it could speak for another role): take it out")
    return render(hub.chat_template, messages, add_generation_prompt, **(hub.names | dict(extras)))


def _texts(value: object) -> Iterator[str]:
    """All texts in a message."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, one in value.items():
            yield from (*_texts(name), *_texts(one))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)


def _check(messages: object) -> None:
    if not isinstance(messages, list | tuple):
        raise ValueError(f"messages: must be a list of dicts with 'role' and 'content', not {type(messages).__name__}")
    for i, message in enumerate(messages):
        for name in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(name), str):
                raise ValueError(f"messages[{i}]: must be a dict whose 'role' and 'content' are texts")


def _line(error: Exception) -> str:
    """An error on one line."""
    return " ".join(f"{error}".split()) or type(error).__name__


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    """The template, compiled; ValueError where it is no jinja2."""
    package("jinja2", "hub", "a chat template")
    import jinja2.ext
    import jinja2.sandbox

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                               extensions=[jinja2.ext.loopcontrols])
    environment.globals |= {"raise_exception": refuse,
                            "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    plain = _GENERATION.sub(lambda mark: f"{{%{mark[1]} {'endif' if mark[2] else 'if true'} {mark[3]}%}}", template)
    try:
        return environment.from_string(plain)
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        raise ValueError(f"chat template{f', line {line}' if line else ''}: {_line(error)}") from None
