"""Settings on a command line: what may be left out, and what --help and --config.help say."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hdlm_jax.config import recipes, sections
from hdlm_jax.config.rules import choice
from hdlm_jax.config.settings import Config

_KINDS: dict[str, type] = {field.name: type(field.default) for field in dataclasses.fields(Config)}
PAGE = "docs/settings.md"  # of the repository, made by tools/settings.py


class Setting(NamedTuple):
    """One setting as a reader needs it; rules: what it must be, meaning: the comment behind it."""

    name: str
    kind: str
    default: object
    rules: str
    meaning: str


def _comments(section: type) -> dict[str, str]:
    """Field -> the comment behind it in the source."""
    lines = inspect.getsource(section).splitlines()
    tree = ast.parse("\n".join(lines))
    found = {}
    for node in tree.body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            last = node.end_lineno or node.lineno
            found[node.target.id] = lines[last - 1][node.end_col_offset or 0:].partition("#")[2].strip()
    return found


def _rules(section: type) -> dict[str, list[str]]:
    """Field -> what `check` asks of it by itself: the choices, and all that begins with "must"."""
    found: dict[str, list[str]] = {}
    short = {"not be negative": "at least 0", "be positive": "above 0"}

    def need(self: object, ok: bool, name: str, text: str) -> None:
        if text.startswith("must "):
            text = text.removeprefix("must ").partition(";")[0]
            found.setdefault(name, []).append(re.sub("^(be|lie) ", "", short.get(text, text)))

    def among(self: object, **choices: Sequence[str]) -> None:
        for name, known in choices.items():
            found.setdefault(name, []).append("one of " + ", ".join(one or "''" for one in known))

    type(section.__name__, (section,), {"need": need, "among": among})().check()
    return found


def settings_of(section: str) -> list[Setting]:
    """All settings of a section of the config, from its dataclass."""
    kind = _KINDS[section]
    said, asked, hints = _comments(kind), _rules(kind), typing.get_type_hints(kind)
    out = []
    for field in dataclasses.fields(kind):
        of, hint = typing.get_args(hints[field.name]), hints[field.name]
        kind_of = f"tuple of {of[0].__name__}" if of else hint.__name__
        asks = "; ".join(dict.fromkeys(asked.get(field.name, [])))
        out.append(Setting(f"{section}.{field.name}", kind_of, field.default, asks, said[field.name]))
    return out


def meaning_of(section: str) -> str:
    """The docstring of a section; "" where it has none of its own."""
    text = " ".join((_KINDS[section].__doc__ or "").split())
    return "" if text.startswith(f"{_KINDS[section].__name__}(") else text


def _wrapped(text: str, indent: int) -> str:
    return textwrap.fill(text, 110, initial_indent=" " * indent, subsequent_indent=" " * indent)


def settings_help(section: str) -> str:
    """A section's settings with defaults, ranges and meanings; without one the sections there are.

    Raises:
      ConfigError: no such section.
    """
    if not section:
        lines = ["Sections of the settings; --config.help=generate shows one of them:", ""]
        return "\n".join([*lines, *(f"  {name:<11} {meaning_of(name)}" for name in _KINDS)])
    choice("--config.help", section, tuple(_KINDS))
    lines = [f"{section}: {meaning_of(section)}".removesuffix(": "), ""]
    for one in settings_of(section):
        lines += [f"  --config.{one.name}={one.default!r}", _wrapped(one.meaning, 6) if one.meaning else "",
                  _wrapped(f"({one.kind}{'; ' * bool(one.rules)}{one.rules})", 6)]
    return "\n".join(filter(None, lines))


def front_help(modes: Mapping[str, str], commands: Mapping[str, str], flags: Mapping[str, str]) -> str:
    """What --help prints: modes, commands and flags with a line each, the recipes, and where settings are explained."""
    def table(title: str, rows: Mapping[str, str]) -> list[str]:
        wide = max(map(len, rows))
        return ["", title, *(f"  {name:<{wide}}  {text}" for name, text in rows.items())]

    told = {}
    for name in recipes.names():
        doc = ast.get_docstring(ast.parse((recipes.folder() / f"{name}.py").read_text("utf-8"))) or ""
        first = re.split(r"\n\n|(?<=[.:]) ", doc)[0].replace("\n", " ").rstrip(":")
        told[name] = first if first.count("(") == first.count(")") else first.partition(" (")[0]
    return "\n".join([
        "hdlm-jax --config=RECIPE [--workdir=RUN] [--mode=MODE] [--config.SECTION.SETTING=VALUE ...]",
        "hdlm-jax --workdir=RUN --mode=MODE [...]   a run that is there knows its own settings",
        *table("modes", modes), *table("other commands", commands), *table("flags", flags),
        *table("recipes, --config=NAME (or a file of yours)", told),
        "", "settings", f"  sections: {', '.join(_KINDS)}",
        "  --config.help=generate prints one section with defaults, ranges and meanings; all of them are on one page, "
        f"{PAGE}", "  lists as a,b or '(256, 16)'"])


def written_out(argv: Sequence[str]) -> list[str]:
    """The command line with plain lists of texts as tuples, and with what its settings imply.

    --config.evaluate.tasks=arc_easy,piqa is ('arc_easy', 'piqa'); data.files implies data.source=files, and
    tokenizer.kind=bytes or gpt2 their number of words, unless they are given.
    """
    out, given, rest = [], {}, list(argv)
    while rest:
        arg = rest.pop(0)
        if found := re.fullmatch(r"--?config\.(\w+)\.(\w+)(?:=(.*))?", arg, re.DOTALL):
            section, name, value = found.groups()
            hint = typing.get_type_hints(_KINDS[section]).get(name) if section in _KINDS else None
            if hint == tuple[str, ...]:
                value = rest.pop(0) if value is None and rest else value or ""
                arg = f"--config.{section}.{name}={_listed(value)}"
            given[f"{section}.{name}"] = arg.partition("=")[2] or (rest[0] if rest and value is None else "")
        out.append(arg)
    words = sections.FIXED_WORDS.get(given.get("tokenizer.kind", ""))
    if words and "tokenizer.vocab_size" not in given:
        out.append(f"--config.tokenizer.vocab_size={words}")
    if given.get("data.files", "()") != "()" and "data.source" not in given:
        out.append("--config.data.source=files")
    return out


def _listed(value: str) -> str:
    """A tuple of texts as Python writes it, of what is one already or of texts with commas between them."""
    try:
        read: Any = ast.literal_eval(value) if value[:1] in tuple("(['\"") else None
    except (SyntaxError, ValueError):  # a glob may begin with a bracket
        read = None
    if isinstance(read, tuple | list | str):
        return value
    return repr(tuple(part.strip() for part in value.split(",") if part.strip()))
