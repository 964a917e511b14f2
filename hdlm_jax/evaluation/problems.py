"""Problems that are answered by writing: a run's answer is right if its number is that of the solution (GSM8K).

The number is the one behind "####", as in the data set; an answer without one is wrong. A model with a chat template is
asked in it (one user turn), another one as "Question: ...\\nAnswer:"; without examples.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hdlm_jax.common.jsons import Json
from hdlm_jax.config import GenerateConfig
from hdlm_jax.data.chat import chat_ids
from hdlm_jax.data.tokenizers import Tokenizer
from hdlm_jax.decoding.sampler import sampler_of, start_canvas
from hdlm_jax.evaluation.text_statistics import share_of
from hdlm_jax.training.loading import Run

_NUMBER = re.compile(r"####\s*\$?(-?[\d,]*\.?\d+)")


class Problem(NamedTuple):
    """A question, and its solution, which ends in "#### number"."""

    question: str
    solution: str


def number_of(text: str) -> float | None:
    """The number behind the first "####", None where there is none."""
    found = _NUMBER.search(text)
    return float(found[1].replace(",", "")) if found else None


def asked(tokenizer: Tokenizer, question: str) -> np.ndarray:
    """Ids of a question as a model is shown it."""
    if tokenizer.chat_template:
        return chat_ids(tokenizer, [{"role": "user", "content": question}])
    return tokenizer.encode(f"Question: {question}\nAnswer:")


def answer_of(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """The text of tokens behind a prompt, up to the end of a text or of a turn."""
    ends = np.flatnonzero(np.isin(ids, (tokenizer.eot, tokenizer.turn_end)))
    return tokenizer.decode(ids[: ends[0]] if len(ends) else ids)


def answers(run: Run, problems: Sequence[Problem], g: GenerateConfig) -> tuple[list[str], np.ndarray]:
    """(what a run writes to each problem, up to the end of its turn; calls of the network for each)."""
    prompts = [asked(run.tokenizer, problem.question) for problem in problems]
    draw, texts, calls = sampler_of(run), [], []
    for first in range(0, len(prompts), g.batch_size):
        some = prompts[first : first + g.batch_size]
        out = draw(np.concatenate([start_canvas(run, g, ids[None]) for ids in some]), g)
        for ids, row, length in zip(some, out["tokens"], out["length"], strict=True):
            texts.append(answer_of(run.tokenizer, row[len(ids) : length]))
        calls.append(out["calls"])
    return texts, np.concatenate(calls)


def solve(run: Run, problems: Sequence[Problem], g: GenerateConfig) -> Json:
    """Accuracy with its standard error, the share of answers that give a number, calls a problem, and the answers.

    Raises:
      ConfigError: a question that does not fit model.seq_len (or generate.length), by `start_canvas`.
    """
    started = time.monotonic()
    texts, calls = answers(run, problems, g)
    given = [number_of(text) for text in texts]
    want = [number_of(problem.solution) for problem in problems]
    right = np.array([a is not None and a == b for a, b in zip(given, want, strict=True)])
    accuracy, se = share_of(right)
    return {"questions": len(problems), "accuracy": accuracy, "accuracy_se": se,
            "answered": float(np.mean([a is not None for a in given])), "calls": float(calls.mean()),
            "chat": bool(run.tokenizer.chat_template), "method": g.method, "steps": g.steps,
            "temperature": g.temperature, "right": [int(r) for r in right], "answers": texts,
            "seconds": time.monotonic() - started}
