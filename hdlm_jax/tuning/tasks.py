"""Tasks whose answers are verified: prompts from a number, rewards, texts that a base learns from."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import re
import zlib
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from hdlm_jax.common import jsons
from hdlm_jax.config import OWN_ANSWERS, ConfigError
from hdlm_jax.data.pipeline import Split
from hdlm_jax.data.prepare import load_manifest
from hdlm_jax.data.tokenizers import Tokenizer
from hdlm_jax.evaluation.problems import answer_of, number_of

_SOLUTION = re.compile(r"####\s*\S+\s*$")
PROMPT, TEXT = "prompt", "text"  # fields of the records that `write_texts` makes


class Example(NamedTuple):
    """A prompt, an answer that is right, and what a judge has to know of the prompt.

    No prompt is empty: a network with relative places alone cannot tell one mask of a row of masks from another.
    """

    prompt: str
    answer: str
    facts: str
    ids: tuple[int, ...] = ()  # of the prompt, where it has been cut into tokens already


@dataclasses.dataclass(frozen=True)
class Task:
    """make(rng, split) -> Example; judge(answer, facts) -> reward in [0, 1]; noise(rng, example) -> a wrong answer's
    text, of which a share of the texts that a base learns from is made; texts: how many there are."""

    name: str
    make: Callable[[np.random.Generator, str], Example]
    judge: Callable[[str, str], float]
    noise: Callable[[np.random.Generator, Example], str] = lambda rng, example: example.answer
    noise_share: float = 0.0
    texts: int = 4096
    prompts: ClassVar[int] = 2**62  # a number each

    def example(self, number: int, split: str = "train") -> Example:
        """Example `number` >= 0 of "train" or "valid": the same one whenever it is asked for."""
        return self.make(self._rng(number, split), split)

    def _rng(self, *of: int | str) -> np.random.Generator:
        return np.random.default_rng([zlib.crc32(str(part).encode()) for part in (self.name, *of)])

    def reward(self, answers: Sequence[str], facts: Sequence[str]) -> np.ndarray:
        """float32 [B] in [0, 1], of answers (texts behind their prompts, up to the end of text)."""
        return np.array([self.judge(*pair) for pair in zip(answers, facts, strict=True)], np.float32)

    def records(self) -> list[dict[str, str]]:
        """The texts that a base learns from."""
        out = []
        for number in range(self.texts):
            example, rng = self.example(number), self._rng(number, "noise")
            answer = self.noise(rng, example) if rng.random() < self.noise_share else example.answer
            out.append({PROMPT: example.prompt, TEXT: answer})
        return out


def write_texts(task: Task, folder: str) -> str:
    """The task's records as a file of JSON lines in a folder; its path. A file that is there is taken as it is."""
    path = os.path.join(folder, f"{task.name}.jsonl")
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        jsons.write_atomic(path, "".join(jsons.dumps(record) + "\n" for record in task.records()).encode())
    return path


class TextTask:
    """The task whose prompts and right answers are those of prepared texts (tune.task='answers'): its examples are the
    documents of a split that have a prompt and fit a row, mixed, always in the same order; behind the last comes the
    first again.

    prompts: how many there are.

    Raises:
      ConfigError: there are fewer than two.
    """

    name = OWN_ANSWERS

    def __init__(self, folder: str, split: str, tokenizer: Tokenizer, seq_len: int) -> None:
        manifest = load_manifest(folder)
        self.text, self.tokenizer = Split(folder, manifest, split), tokenizer
        starts, prompts = self.text.documents
        sizes, given = np.diff(starts), prompts.astype(np.int64)
        fits = np.flatnonzero((sizes <= seq_len) & (given > 0) & (given < sizes) & manifest.prompts)
        if len(fits) < 2:
            raise ConfigError(f"tune.task={OWN_ANSWERS!r}: of the {len(sizes):,} documents of the {split} split "
                              f"{len(fits)} have a prompt (data.prompt_field) and fit model.seq_len={seq_len} with "
                              "their answer; at least 2 are needed")
        fits = fits[np.argsort(np.random.Philox(0).random_raw(len(fits)), kind="stable")]
        self.bounds, self.prompts = np.stack([starts[fits], sizes[fits], given[fits]], axis=1), len(fits)

    def example(self, number: int, split: str = "") -> Example:
        """Example `number` >= 0 of the task's own split."""
        start, size, given = self.bounds[number % self.prompts].tolist()
        ids = np.asarray(self.text[start : start + size], np.int32)
        answer = answer_of(self.tokenizer, ids[given:])
        return Example(self.tokenizer.decode(ids[:given]), answer, answer, tuple(ids[:given].tolist()))

    def reward(self, answers: Sequence[str], facts: Sequence[str]) -> np.ndarray:
        """float32 [B] in [0, 1], as `Task.reward`."""
        return np.array([agrees(*pair) for pair in zip(answers, facts, strict=True)], np.float32)


def agrees(answer: str, facts: str) -> float:
    """1 for the right answer, blanks around it aside; where that ends in "#### number" (GSM8K) 1 for its number behind
    the answer's first "####", .1 for another one in that form."""
    if not _SOLUTION.search(facts):
        return float(answer.strip() == facts.strip())
    given = number_of(answer)
    return 0.0 if given is None else 1.0 if given == number_of(facts) else 0.1


def exact(answer: str, facts: str) -> float:
    """1 for the one right answer."""
    return float(answer == facts)


# ---- the tasks -------------------------------------------------------------------------------------------------------

_SYMBOLS = "012345"


def _permutation(rng: np.random.Generator, split: str) -> Example:
    return Example("=", "".join(rng.permutation(list(_SYMBOLS))), _SYMBOLS)


def _any_symbols(rng: np.random.Generator, example: Example) -> str:
    return "".join(rng.choice(list(_SYMBOLS), len(_SYMBOLS)))


def _is_permutation(answer: str, facts: str) -> float:
    return float(sorted(answer) == sorted(facts))


def _sorting(rng: np.random.Generator, split: str) -> Example:
    digits = "".join(map(str, rng.integers(0, 10, 8)))
    answer = "".join(sorted(digits))
    return Example(f"{digits}>", answer, answer)


def _parity(rng: np.random.Generator, split: str) -> Example:
    bits = rng.integers(0, 2, 8)
    answer = str(bits.sum() % 2)
    return Example(f"{''.join(map(str, bits))}=", answer, answer)


def _sum(rng: np.random.Generator, split: str) -> Example:
    a, b = rng.integers(0, 1000, 2)
    return Example(f"{a}+{b}=", str(a + b), str(a + b))


def _repeats(rng: np.random.Generator, split: str) -> Example:
    """Fifteen times one digit, the prompt's own, or any where it shows a dot: then the first ones must not be drawn in
    one call, as they would not agree."""
    digit, given = str(rng.integers(0, 10)), rng.integers(2)
    asked = digit if given else "."
    return Example(f"{asked}=", digit * 15, asked)


def _repeated(answer: str, facts: str) -> float:
    """1 for fifteen times one digit, that of the facts unless they are a dot."""
    same = len(answer) == 15 and answer[0] in "0123456789" and set(answer) == {answer[0]}
    return float(same and facts in (".", answer[0]))


_EXPRESSION = re.compile(r"(\d{1,2})([+*-])(\d{1,2})([+*-])(\d{1,2})")


def _value(text: str) -> int | None:
    """Of three numbers with + - * between them; None where it is no such expression."""
    found = _EXPRESSION.fullmatch(text)
    if found is None:
        return None
    a, first, b, second, c = found.groups()
    of = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y}
    if second == "*" and first != "*":  # products first
        return of[first](int(a), int(b) * int(c))
    return of[second](of[first](int(a), int(b)), int(c))


def _countdown(rng: np.random.Generator, split: str) -> Example:
    """Three numbers below 20 and a target that they reach in some order with two of + - *."""
    numbers = rng.integers(1, 20, 3)
    order, signs = rng.permutation(numbers), rng.choice(list("+-*"), 2)
    answer = f"{order[0]}{signs[0]}{order[1]}{signs[1]}{order[2]}"
    facts = f"{' '.join(map(str, numbers))}:{_value(answer)}"
    return Example(f"{facts}=", answer, facts)


def _reaches(answer: str, facts: str) -> float:
    """1 where the numbers, each once, make the target; .1 where they make another; else 0."""
    numbers, _, target = facts.partition(":")
    value = _value(answer)
    if value is None or sorted(re.findall(r"\d+", answer)) != sorted(numbers.split()):
        return 0.0
    return 1.0 if value == int(target) else 0.1


_UNITS = [[4 * r + c for c in range(4)] for r in range(4)] + [[4 * r + c for r in range(4)] for c in range(4)] + [
    [8 * a + 2 * b + 4 * r + c for r in range(2) for c in range(2)] for a in range(2) for b in range(2)]
_CLUES = 8


def _units_right(grid: str) -> int:
    """Of rows, columns and boxes (12) those that hold 1 to 4."""
    return sum(sorted(grid[i] for i in unit) == list("1234") for unit in _UNITS)


@functools.cache
def sudoku_grids() -> tuple[str, ...]:
    """All 288 full 4 x 4 grids, in an order of chance that is always the same."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    bands = [a + b for a in rows for b in rows if not {*a[:2]} & {*b[:2]}]  # two rows whose boxes are right
    found = [a + b for a in bands for b in bands if _units_right(a + b) == 12]
    return tuple(found[i] for i in np.random.default_rng(0).permutation(len(found)))


def _sudoku(rng: np.random.Generator, split: str) -> Example:
    """Eight clues of a grid; 200 grids are for training, the other 88 for validation."""
    grids = sudoku_grids()
    grid = grids[rng.integers(0, 200) if split == "train" else rng.integers(200, len(grids))]
    clues = set(rng.permutation(16)[:_CLUES].tolist())
    shown = "".join(symbol if i in clues else "." for i, symbol in enumerate(grid))
    return Example(f"{shown}=", grid, shown)


def _solves(answer: str, facts: str) -> float:
    """Share of rows, columns and boxes that are right, 0 where a clue is not kept; 1 is solved."""
    if len(answer) != 16 or any(clue not in (".", symbol) for clue, symbol in zip(facts, answer, strict=True)):
        return 0.0
    return _units_right(answer) / 12


TASKS = {task.name: task for task in (
    Task("permutations", _permutation, _is_permutation, _any_symbols, 0.5, texts=30_000),
    Task("sorting", _sorting, exact, texts=16384), Task("parity", _parity, exact),
    Task("sums", _sum, exact, texts=16384), Task("repeats", _repeats, _repeated),
    Task("countdown", _countdown, _reaches, texts=16384), Task("sudoku", _sudoku, _solves, texts=16384))}
