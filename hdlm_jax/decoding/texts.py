"""What is asked of a run, a prompt, a conversation, a text with blanks or a schema, as canvases and back as texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hdlm_jax.config import ConfigError, GenerateConfig, change
from hdlm_jax.data import chat as chats
from hdlm_jax.data.tokenizers import Tokenizer
from hdlm_jax.decoding import canvas as canvases
from hdlm_jax.decoding import presets, schema
from hdlm_jax.decoding.sampler import start_canvas
from hdlm_jax.training.loading import Run


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """Texts to write: where they start, and how their tokens become text.

    canvas: of all rows. given: tokens of a row in front of which no end counts. ends: tokens that end a text behind
    them. skip: tokens in front that are not shown. keep: tokens of a row that are text; 0: all of its length.
    scaffold: of a schema, whose rows are JSON.
    """

    canvas: np.ndarray | canvases.Canvas
    given: int
    ends: tuple[int, ...] = ()
    skip: int = 0
    keep: int = 0
    scaffold: schema.Scaffold | None = None

    def end(self, row: np.ndarray, length: int) -> int:
        """Tokens of a row's text, that is up to its first end; `length` (or keep) where it has none."""
        inside = row[: min(self.keep or length, length)]
        found = np.flatnonzero(np.isin(inside[self.given :], self.ends))
        return self.given + int(found[0]) if len(found) else len(inside)

    def text(self, tokenizer: Tokenizer, row: np.ndarray, length: int) -> str:
        """The text of a row that is written."""
        if self.scaffold is not None:
            return self.scaffold.text(row.tolist())
        return tokenizer.decode(row[self.skip : self.end(row, length)])


def settings(run: Run, values: Mapping[str, Any], **own: Any) -> GenerateConfig:
    """run's GenerateConfig with these values, checked as those of the command line; own: what the caller decides.

    Raises:
      ConfigError: what the command line would not take either, in its words; a value that is the caller's.
    """
    if twice := sorted(own.keys() & values.keys()):
        raise ConfigError(f"generate.{twice[0]}: is not a setting here; the text says it")
    given = {k: v.item() if isinstance(v, np.generic) else v for k, v in (own | dict(values)).items()}
    g = change("generate", run.config.generate, given)
    dataclasses.replace(run.config, generate=g).check()
    presets.check(g)
    return g


def prompted(run: Run, g: GenerateConfig, prompt: str, features: np.ndarray | None = None) -> Asked:
    """g.num_samples texts that begin with the prompt; features: float32 [P, F] in front of it."""
    ids, n = run.tokenizer.encode(prompt), g.num_samples
    canvas = start_canvas(run, g, np.tile(ids, (n, 1)), None if features is None else np.tile(features, (n, 1, 1)))
    places = 0 if features is None else len(features)
    return Asked(canvas, places + len(ids), (run.tokenizer.eot,) if g.stop == "end" else (), places)


def chatted(run: Run, g: GenerateConfig, messages: Sequence[chats.Message], **template: Any) -> Asked:
    """g.num_samples answers to a conversation; ValueError: no chat template, or what it refuses (data/chat.py)."""
    ids = chats.chat_ids(run.tokenizer, messages, **template)
    canvas = start_canvas(run, g, np.tile(ids, (g.num_samples, 1)))
    return Asked(canvas, len(ids), (run.tokenizer.eot, run.tokenizer.turn_end), len(ids))


def filled(run: Run, g: GenerateConfig, text: str) -> Asked:
    """g.num_samples copies of a text with blanks (canvas.template) filled in; ValueError: it has none."""
    seq_len, eot = run.config.model.seq_len, run.tokenizer.eot
    canvas = canvases.template(text, run.tokenizer, run.hierarchy, g.num_samples, seq_len)
    n, places = int(canvas.length[0]), canvas.z.shape[1]
    if canvas.given[0, :n].all():
        raise ValueError(f"infill: no blank in {text!r}; write [MASK], [MASK:5] or [LIKE:word] for what is missing")
    if run.ends:
        canvas, places = canvases.closed(canvas, seq_len, eot), seq_len
    # the rest of the canvas is text the model makes up and nobody reads
    inside = np.arange(places)[None] < n
    canvas = canvas._replace(z=np.where(inside, canvas.z, run.hierarchy.mask_id).astype(np.int32),
                             given=canvas.given & inside, length=np.full(g.num_samples, places, np.int32))
    return Asked(canvas, 1 + int(max(np.flatnonzero(canvas.given[0, :n]), default=-1)),
                 (eot,) if g.stop == "end" else (), keep=n)


def of_schema(run: Run, g: GenerateConfig, given: object, prompt: str = "", budget: int = 16,
              ids: Sequence[int] | np.ndarray = ()) -> Asked:
    """g.num_samples documents of a JSON schema (decoding/schema.py) behind a prompt, or behind its ids."""
    seq_len = run.config.model.seq_len
    scaffold = schema.scaffold(given, run.tokenizer, run.hierarchy, budget, prompt=prompt, seq_len=seq_len)
    scaffold = dataclasses.replace(scaffold, prompt=tuple(ids)) if len(ids) else scaffold
    canvas = scaffold.canvas(g.num_samples, seq_len)
    n = int(canvas.length[0])
    canvas = canvases.closed(canvas, seq_len, run.tokenizer.eot) if run.ends else canvas
    return Asked(canvas, n, keep=n, skip=len(scaffold.prompt), scaffold=scaffold)
