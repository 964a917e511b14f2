"""Texts written anew behind what is given in front of them, prompts or features: how many are the right ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hdlm_jax.common.jsons import Json
from hdlm_jax.config import GenerateConfig
from hdlm_jax.decoding.sampler import ended, sampler_of, start_canvas, text_of
from hdlm_jax.evaluation.rows import Piece, to_rows
from hdlm_jax.evaluation.text_statistics import share_of
from hdlm_jax.training.loading import Run


class Written(NamedTuple):
    """Of some records the text, what was written in its place, and calls of the network for each."""

    text: list[str]
    written: list[str]
    calls: np.ndarray


def edits(a: str, b: str) -> int:
    """Characters to insert, delete or replace to make b of a (Levenshtein's distance)."""
    row = np.arange(len(b) + 1)
    other = np.array([ord(c) for c in b])
    for i, c in enumerate(a, 1):
        change = np.minimum(row[1:] + 1, row[:-1] + (other != ord(c)))
        best = np.concatenate([[i], change]) - np.arange(len(b) + 1)  # an insertion costs one a place
        row = np.minimum.accumulate(best) + np.arange(len(b) + 1)
    return int(row[-1])


def write(run: Run, rows: dict[str, np.ndarray], g: GenerateConfig) -> Written:
    """What the run writes behind the given part of each row (pipeline.valid_rows), up to its end of text, by g.

    Raises:
      ConfigError: what `start_canvas` or the sampler refuses.
    """
    draw, eot, n = sampler_of(run), run.tokenizer.eot, len(rows["x"])
    begin, places = rows["score"].argmax(axis=1), run.config.data.feature_places
    text, written, calls = [""] * n, [""] * n, np.zeros(n, int)
    for given in np.unique(begin):  # prompts of one length at once
        at = np.flatnonzero(begin == given)
        features = rows["features"][at] if "features" in rows else None
        out = draw(start_canvas(run, g, rows["x"][at, places:given], features), g)
        calls[at] = out["calls"]
        for i, row, length in zip(at, out["tokens"], out["length"], strict=True):
            right = rows["x"][i, given:][rows["segment"][i, given:] >= 0]
            text[i], written[i] = (text_of(run.tokenizer, ended(ids, 0, eot, "end"), "end")
                                   for ids in (right, row[given:length]))
    return Written(text, written, calls)


def measured(found: Written, g: GenerateConfig) -> Json:
    """exact_match, the share of texts written exactly, with its binomial standard error; character_error, edits for a
    character of the right texts; and how they were written."""
    right, se = share_of([a == b for a, b in zip(found.text, found.written, strict=True)])
    wrong = sum(edits(a, b) for a, b in zip(found.text, found.written, strict=True))
    return {"exact_match": right, "exact_match_se": se,
            "character_error": wrong / max(1, sum(map(len, found.text))), "exact_match_texts": len(found.text),
            "exact_match_calls": float(found.calls.mean())} | how(g)


def how(g: GenerateConfig) -> Json:
    """The settings of `generate` that decide what is written."""
    names = ("method", "options", "steps", "temperature", "top_p", "seed", "force_transition")
    told = {"channel_told": g.channel_told} if g.channel_told else {}
    return {"exact_match_generate": {name: getattr(g, name) for name in names} | told}


def rows_behind(run: Run, texts: Sequence[np.ndarray], features: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of texts, ids with their end of text each, behind features [n, P, F]; ValueError: one does not fit."""
    places, seq_len = run.config.data.feature_places, run.config.model.seq_len
    if longest := max((len(ids) for ids in texts if places + len(ids) > seq_len), default=0):
        raise ValueError(f"a text of {longest} tokens does not fit behind {places} features: model.seq_len={seq_len}")
    front = np.full(places, run.tokenizer.eot, np.int32)
    pieces = [Piece(np.concatenate([front, ids]), places, run.ends) for ids in texts]
    return to_rows(pieces, seq_len, run.tokenizer.eot) | {"features": features}
