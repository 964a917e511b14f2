"""Likelihoods of any texts under a run: whole documents, choices given a context, and words filled in greedily.

Choices are compared in rows that end where they end: bounds given their lengths, as in the field's own evaluations. A
run that learnt ends of texts has only seen whole rows: there a choice is followed by its end, and nothing is given.

All of it is the exact NELBO of evaluate.py on rows made here. A context is shown as it is (it is in the row and not
scored), so the sum over the other tokens bounds -log p(text | context): the conditional NELBO.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hdlm_jax.common import parallel
from hdlm_jax.config import EvaluateConfig, GenerateConfig
from hdlm_jax.data.tokenizers import Tokenizer
from hdlm_jax.decoding.sampler import Sampler, load_helper, prompt_canvas, sampler_of
from hdlm_jax.evaluation.elbo import evaluator_of
from hdlm_jax.evaluation.rows import Ids, Piece, split, to_rows
from hdlm_jax.training.loading import Run

_NARROWEST = 16
PILOT = 16  # draws that a question's number of draws is decided by, at the least


class Choices(NamedTuple):
    """Continuations to compare, each behind its own context (usually the same one)."""

    contexts: Sequence[Ids]
    choices: Sequence[Ids]


Fitted = list[tuple[list[list[Piece]], bool]]  # of each question: pieces of its choices, whether anything was cut


class Ranking(NamedTuple):
    """What `Scorer.rank` finds of n questions.

    nats: of each question, float64 [choices], estimates of the conditional NELBO.
    se: float64 [n], standard error of the difference between the best two (of the value where there is one choice).
    draws: int [n], the pilot's too.   reached: bool [n], se is within the target.
    cut: bool [n], context or choice did not fit.
    """

    nats: list[np.ndarray]
    se: np.ndarray
    draws: np.ndarray
    reached: np.ndarray
    cut: np.ndarray


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[Ids, Ids]:
    """Tokens of context and continuation as they are in the whole text; blanks at the seam go with the continuation.

    The convention of lm-evaluation-harness: the whole is encoded, and what is beyond the context's own number of
    tokens is the continuation.
    """
    bare = context.rstrip()
    continuation = context[len(bare):] + continuation
    given, whole = tokenizer.encode(bare), tokenizer.encode(bare + continuation)
    return whole[: len(given)], whole[len(given):]


def _fit(question: Choices, seq_len: int, end: Sequence[int] = ()) -> tuple[list[list[Piece]], bool]:
    """Pieces of each choice, and whether anything was cut.

    All contexts are cut (on the left) to the same room, what the longest choice leaves. Where a choice is longer than
    S, all are scored in pieces of S that see no context. end: the end of text, where choices are followed by theirs.
    """
    choices, ends = [np.append(c, np.array(end, np.int32)) for c in question.choices], bool(end)
    room = seq_len - max(len(c) for c in choices)
    if room < 0:
        return [split(c, seq_len, ends=ends) or [Piece(c)] for c in choices], True
    kept = [c[len(c) - min(room, len(c)):] for c in question.contexts]
    pieces = [[Piece(np.concatenate([k, c]), len(k), ends)] for k, c in zip(kept, choices, strict=True)]
    return pieces, any(len(c) > room for c in question.contexts)


def stratified_se(values: np.ndarray) -> float:
    """Standard error of the mean of values [n], which are in the order of their strata.

    One value a stratum says nothing of the variance inside it; neighbours do: sum of squared differences over 2(n-1),
    which errs on the large side by what the strata's means differ. NaN where there is a single value.
    """
    n = len(values)
    return math.sqrt(n / (2 * (n - 1)) * np.sum(np.diff(values) ** 2)) / n if n > 1 else math.nan


def _best_two(values: np.ndarray) -> float:
    """Standard error of the difference between the lowest two columns of [draws, choices]."""
    mean = values.mean(0)
    if len(mean) == 1:
        return stratified_se(values[:, 0])
    first, second = np.argsort(mean, kind="stable")[:2]
    return stratified_se(values[:, first] - values[:, second])


class Scorer:
    """Estimates of the NELBO of pieces, each in a row of about its own width; compiled once for every width.

    Args:
      settings: draws, seed, target_se, most_draws, batch_size, cv2.
    """

    def __init__(self, run: Run, settings: EvaluateConfig):
        self.run, self.settings, self.seq_len = run, settings, run.config.model.seq_len
        self.evaluator = functools.cache(lambda width: evaluator_of(run, settings, width))
        self._sampler: Sampler | None = None

    def _width(self, tokens: int) -> int:
        return self.seq_len if self.run.ends else parallel.bucket(max(tokens, _NARROWEST), self.seq_len)

    def nats(self, pieces: Sequence[Piece], draws: int,
             name: str = "evaluate") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Estimates [draws, n, K], and the noise times and densities [draws, n] they were made at.

        As `Evaluator.nats`: strata over all pairs of a piece and a draw, one draw where the process is exact.
        """
        n, draws = len(pieces), 1 if self.run.process.exact else draws
        tau, q = self.evaluator(self.seq_len).pairs(n, draws)
        pair = np.arange(draws * n).reshape(draws, n)
        widths = np.array([self._width(len(p.ids)) for p in pieces])
        out = np.zeros((draws, n, self.run.process.num_levels))
        for width in np.unique(widths):
            here = np.flatnonzero(widths == width)
            rows = to_rows([pieces[i] for i in here.tolist()], int(width), self.run.tokenizer.eot)
            which = np.tile(np.arange(len(here)), draws)
            times, density, mine = (a[:, here].reshape(-1) for a in (tau, q, pair))
            got = self.evaluator(int(width)).at(self.run.params, rows, which, times, density, mine, name)
            out[:, here] = got.reshape(draws, len(here), -1)
        return out, tau, q

    def rank(self, questions: Sequence[Choices], name: str = "rank") -> Ranking:
        """Conditional NELBO of every choice, as exactly as the choice between the best two asks for.

        The choices of a question share noise times and random numbers, so that what is common to them drops out of
        their differences. A pilot of settings.draws (at least PILOT) tells how many draws bring the standard error of
        the difference between the best two to settings.target_se nats; so many, from the pilot's number to
        settings.most_draws, are then made anew, and they alone are averaged: a mean that had to do with when to stop
        would be too low where nothing happened to be masked. Without room above a pilot all questions get
        settings.most_draws. Times are stratified over a round. An exact process takes one draw.
        """
        s, n = self.settings, len(questions)
        end = [self.run.tokenizer.eot] if self.run.ends else []
        fitted = [_fit(question, self.seq_len, end) for question in questions]
        cut = np.array([cut for _, cut in fitted], bool)
        done, pilot = 0, max(s.draws, PILOT)
        draws = np.full(n, s.most_draws)
        if self.run.process.exact:
            draws[:] = 1
        elif s.most_draws > pilot:
            first = self._draw(fitted, [pilot] * n, 0, name)
            wanted = [pilot * (_best_two(values) / s.target_se) ** 2 for values in first]
            most = np.nan_to_num(np.ceil(wanted), nan=s.most_draws)  # what is not finite gets all there are
            done, draws = pilot, np.clip(most, pilot, s.most_draws).astype(int)
        found = self._draw(fitted, draws.tolist(), done, name)
        se = np.array([0.0 if self.run.process.exact else _best_two(values) for values in found])
        return Ranking([values.mean(0) for values in found], se, draws + done, se <= s.target_se, cut)

    def _draw(self, fitted: Fitted, draws: Sequence[int], done: int, name: str) -> list[np.ndarray]:
        """Of each question float64 [draws, choices], in the order of their strata; done: draws of the round before."""
        by_width: dict[int, list[int]] = {}
        for i, (choices, _) in enumerate(fitted):
            longest = max(len(p.ids) for pieces in choices for p in pieces)
            by_width.setdefault(self._width(longest), []).append(i)
        out = [np.zeros(0)] * len(fitted)
        for width, members in by_width.items():
            evaluator = self.evaluator(width)
            pieces: list[Piece] = []
            parts: list[tuple[np.ndarray, ...]] = []  # of each question: row, u, pair, all [draws, its pieces]
            for i in members:
                rng = np.random.Generator(np.random.Philox(key=[self.settings.seed % 2**64, i],
                                                           counter=[0, 0, 0, done]))
                m, mine = draws[i], fitted[i][0]
                u = (np.arange(m) + rng.random(m)) / m
                pair = rng.integers(2**31, size=(m, max(map(len, mine))))
                row = len(pieces) + np.arange(sum(map(len, mine)))
                number = np.concatenate([np.arange(len(p)) for p in mine])
                parts.append(tuple(np.broadcast_to(a, (m, len(row))).reshape(-1)
                                   for a in (row[None], u[:, None], pair[:, number])))
                pieces += [p for choice in mine for p in choice]
            which, u, pair = (np.concatenate(p) for p in zip(*parts, strict=True))
            if self.run.process.exact:
                (tau,), (q,) = evaluator.pairs(len(which), 1)
            else:
                tau, q = evaluator.proposal.quantile(u)
            rows = to_rows(pieces, width, self.run.tokenizer.eot)
            nats = evaluator.at(self.run.params, rows, which, tau, q, pair, name).sum(-1)
            ends = np.cumsum([len(row) for row, _, _ in parts])
            for i, values in zip(members, np.split(nats, ends[:-1]), strict=True):
                first = np.cumsum([0, *map(len, fitted[i][0])])[:-1]
                out[i] = np.add.reduceat(values.reshape(draws[i], -1), first, axis=1)
        return out

    def fill(self, contexts: Sequence[Ids], counts: Sequence[int], g: GenerateConfig) -> list[Ids]:
        """So many tokens behind each context (cut on the left to fit), written by the sampler with the settings g.

        The canvas ends where they end: nothing behind them is looked at. A run that learnt ends of texts gets a whole
        row, of which they are the first. counts: 1..S-1 each.
        """
        if self._sampler is None:
            self._sampler = sampler_of(self.run, load_helper(self.run, g))
        mask, s = self.run.hierarchy.mask_id, self.seq_len
        kept = [c[len(c) - min(len(c), s - n):] for c, n in zip(contexts, counts, strict=True)]
        length = np.array([len(k) + n for k, n in zip(kept, counts, strict=True)])
        out: list[Ids] = [np.zeros(0, np.int32)] * len(kept)
        for size in np.unique(length):
            here = np.flatnonzero(length == size)
            room = s if self.run.ends else int(size)
            canvas = np.concatenate([prompt_canvas(kept[i], 1, s, mask, room) for i in here])
            # whole batches, so that one program does for all of a width; a row of words costs nothing
            canvas = np.concatenate([canvas, np.zeros((-len(here) % g.batch_size, canvas.shape[1]), np.int32)])
            found = self._sampler(canvas, dataclasses.replace(g, length=0 if room == s else room))
            for i, row in zip(here, found["tokens"], strict=False):
                out[i] = row[len(kept[i]) : size]
        return out

    def greedy(self, contexts: Sequence[Ids], counts: Sequence[int]) -> list[Ids]:
        """The same without chance in the words: one drop a call, the most likely word at each, in a random order.

        GIDD's words come on its grid of generate.steps, an autoregressive run's from left to right.
        """
        g, block = self.run.config.generate, self.run.network.block
        method = "bd3lm" if block else "first_hitting" if self.run.process.unmasks else "ancestral"
        options = f"block={block} steps={self.seq_len * self.run.process.num_levels}" if block else ""
        g = dataclasses.replace(g, method=method, options=options, temperature=0.0, top_p=1.0, corrections=0)
        return self.fill(contexts, counts, g)

    def hits(self, pairs: Sequence[tuple[Ids, Ids]]) -> np.ndarray:
        """Whether `greedy` gives the continuation of each (context, continuation): bool [n]; False where none fits."""
        fits = [i for i, (_, c) in enumerate(pairs) if 0 < len(c) < self.seq_len]
        words = self.greedy([pairs[i][0] for i in fits], [len(pairs[i][1]) for i in fits])
        out = np.zeros(len(pairs), bool)
        out[fits] = [np.array_equal(word, pairs[i][1]) for i, word in zip(fits, words, strict=True)]
        return out
