"""Data of the evaluation tasks: documents to be scored and questions to be answered, from local files.

The files are those of $HDLM_DATA, one folder a data set (docs/evaluation.md lists them); nothing is fetched. Questions
have the forms of lm-evaluation-harness without examples (zero-shot).
"""

from __future__ import annotations

import bz2
import csv
import dataclasses
import functools
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hdlm_jax.common import jsons
from hdlm_jax.config import expand
from hdlm_jax.data.detokenize import DETOKENIZERS
from hdlm_jax.data.documents import Reader
from hdlm_jax.data.records import Bad
from hdlm_jax.evaluation.problems import Problem

_OPEN: dict[str, Callable] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_HEADING = re.compile(r" ?= [^=].* = ?")


class Passage(NamedTuple):
    """A document as a model is shown it, and the words of the original (blank-separated, one more for a line end)."""

    text: str
    words: int


class Question(NamedTuple):
    """Choices to be ranked: `contexts[i] + choices[i]` is a text of which the choice is scored; `label` is right."""

    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    label: int


@dataclasses.dataclass(frozen=True)
class Task:
    """Where a task's data is and how it is read.

    Attributes:
      path: under the data folder, without a compression's suffix; '' where the config names the files.
      read: lines (text mode) -> Passages or Questions.
      detokenize: name in DETOKENIZERS, '' for none.   words: whether the field gives perplexities by words as well.
      ranks, writes: whether the items are Questions or Problems.
      note: what is said about the protocol beside the numbers.
    """

    path: str
    read: Callable[..., Iterator[Passage] | Iterator[Question] | Iterator[Problem]]
    detokenize: str = ""
    words: bool = False
    ranks: bool = False
    writes: bool = False
    note: str = ""


def _passage(raw: str, detokenize: str) -> Passage:
    """The words are those of the original; every line adds one, its end."""
    lines = raw.splitlines()
    text = DETOKENIZERS[detokenize](raw) if detokenize else raw
    return Passage(text, sum(len(line.split()) for line in lines) + len(lines))


def _by_line(lines: Iterable[str], detokenize: str) -> Iterator[Passage]:
    return (_passage(line.strip(), detokenize) for line in lines if line.strip())


def _by_article(lines: Iterable[str], detokenize: str) -> Iterator[Passage]:
    held: list[Passage] = []
    for line in itertools.chain(lines, [" = end = "]):
        if not line.strip():
            continue
        if _HEADING.fullmatch(line.rstrip("\r\n")) and held:
            yield Passage("\n".join(p.text for p in held), sum(p.words for p in held))
            held = []
        held.append(_passage(line.strip(), detokenize))


def _jsonl(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in lines if line.strip())


def _texts(lines: Iterable[str], detokenize: str) -> Iterator[Passage]:
    return (_passage(row["text"], detokenize) for row in _jsonl(lines))


def _news(lines: Iterable[str], detokenize: str) -> Iterator[Passage]:
    return (_passage(f"{title} {text}", detokenize) for _, title, text in csv.reader(lines))


def _asked(context: str, choices: Iterable[str], label: int) -> Question:
    choices = tuple(f" {choice}" for choice in choices)
    return Question((context,) * len(choices), choices, label)


def _answers(lines: Iterable[str], form: str) -> Iterator[Question]:
    for row in _jsonl(lines):
        yield _asked(form.format(row["question"]), row["choices"], row["label"])


def _endings(lines: Iterable[str]) -> Iterator[Question]:
    for task in zip(*[iter(lines)] * 6, strict=True):
        context, label, *endings = (line.rstrip("\r\n") for line in task)
        yield _asked(context, endings, int(label))


def _blanks(lines: Iterable[str]) -> Iterator[Question]:
    for row in _jsonl(lines):
        before, after = row["sentence"].split("_")
        contexts = tuple(before + row[option] for option in ("option1", "option2"))
        yield Question(contexts, (f" {after.strip()}",) * 2, int(row["answer"]) - 1)


def _problems(lines: Iterable[str]) -> Iterator[Problem]:
    return (Problem(row["question"], row["answer"]) for row in _jsonl(lines))


def _last_words(lines: Iterable[str]) -> Iterator[Question]:
    for row in _jsonl(lines):
        context, word = row["text"].rstrip().rsplit(maxsplit=1)
        yield _asked(context, [word], 0)


_ARC = functools.partial(_answers, form="Question: {}\nAnswer:")
TASKS: dict[str, Task] = {
    "ptb": Task("ptb/ptb.test.txt", _by_line, "ptb", words=True),
    "wikitext2": Task("wikitext2/wiki.test.raw", _by_article, "wikitext", words=True,
                      note="the original's blank lines (1,467 ends of line, .6 % of its words) are not in this file"),
    "lambada": Task("lambada/lambada_test.jsonl", _texts, "lambada"),
    "ag_news": Task("ag_news/test.csv", _news),
    "openwebtext": Task("openwebtext/owt_1000docs.jsonl", _texts,
                        note="the first pages of OpenWebText: a model trained on it has probably seen them"),
    "lm1b": Task("", _by_line, "lm1b", words=True),
    "files": Task("", _texts),
    "hellaswag": Task("hellaswag/hellaswag_val_full.txt", _endings, ranks=True),
    "arc_easy": Task("mcq/ARC-Easy.jsonl", _ARC, ranks=True),
    "arc_challenge": Task("mcq/ARC-Challenge.jsonl", _ARC, ranks=True),
    "piqa": Task("mcq/piqa.jsonl", _ARC, ranks=True),
    "openbookqa": Task("mcq/openbookqa.jsonl", functools.partial(_answers, form="{}"), ranks=True),
    "winogrande": Task("mcq/winogrande.dev.jsonl", _blanks, ranks=True,
                       note="partial evaluation: the option is filled in, the words after it are scored"),
    "lambada_last_word": Task("lambada/lambada_test.jsonl", _last_words, ranks=True,
                              note="accuracy: the last word's tokens are masked, in their true number, and filled in "
                                   "one drop at a time, the most likely word at each"),
    "gsm8k": Task("gsm8k/test.jsonl", _problems, writes=True,
                  note="written without examples, in the chat template where the model has one; right is an answer "
                       "whose number behind #### is the solution's"),
}


def find(name: str, folder: str) -> str:
    """The file of a task under the data folder, plain or compressed; ValueError where there is none."""
    path = os.path.join(expand(folder), TASKS[name].path)
    found = next((path + suffix for suffix in ("", *_OPEN) if os.path.exists(path + suffix)), "")
    if not found:
        hint = " (is the variable set?)" if "$" in expand(folder) else ""
        raise ValueError(f"evaluate.tasks_data={folder!r}: task {name} needs {TASKS[name].path} there, plain or with "
                         f"{', '.join(_OPEN)}{hint}")
    return found


def _lines(path: str) -> Iterator[str]:
    opener = _OPEN.get(Path(path).suffix)
    with opener(path, "rb") if opener else open(path, "rb") as raw:
        yield from io.TextIOWrapper(raw, encoding="utf-8", newline="")


def load(name: str, source: str | list[str], limit: int = 0, reader: Reader | None = None) -> list:
    """The Passages or Questions of a task, at most `limit` of them (0: all).

    Args:
      source: its file (see `find`); for lm1b and files, `data.sources.resolve`d sources, read by `reader`.
    Raises:
      ValueError: a file that is not of the form the task has, or a record that cannot be read; one line.
    """
    task = TASKS[name]
    items: Iterator[Passage] | Iterator[Question] | Iterator[Problem]
    if isinstance(source, str):
        how = () if task.ranks or task.writes else (task.detokenize,)
        items = task.read(_lines(source), *how)
    else:
        assert reader is not None
        items = _documents(source, dataclasses.replace(reader, detokenize=""), reader.detokenize or task.detokenize)
    try:
        found = list(itertools.islice(items, limit or None))
    except (KeyError, TypeError, ValueError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"evaluate.tasks: {name} cannot be read from {source} ({reason})") from error
    if not found:
        raise ValueError(f"evaluate.tasks: {name}: nothing in {source}")
    return found


def _documents(sources: list[str], reader: Reader, detokenize: str) -> Iterator[Passage]:
    for source in sources:
        for record in reader.read(source):
            if isinstance(record, Bad):
                raise ValueError(f"{record.position}: {record.reason}")
            yield _passage(record.prompt + record.text, detokenize)


def fingerprint(items: Sequence[Passage] | Sequence[Question] | Sequence[Problem]) -> str:
    """sha256 (hex) of what a task has read."""
    return hashlib.sha256("".join(jsons.dumps(item) + "\n" for item in items).encode()).hexdigest()
