"""A run in Python: train it, load it, generate, chat, fill in blanks, score texts, see a text being written."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from hdlm_jax.common import parallel
from hdlm_jax.config import ASIDE, ConfigError, GenerateConfig, check_local, check_name, expand, recipe
from hdlm_jax.data import chat as chats
from hdlm_jax.data import features as vectors
from hdlm_jax.decoding import canvas as canvases
from hdlm_jax.decoding import desk
from hdlm_jax.decoding import texts as asking
from hdlm_jax.decoding.sampler import Classifier, Sampler, load_helper, sampler_of
from hdlm_jax.evaluation.conditional import rows_behind
from hdlm_jax.evaluation.elbo import evaluator_of, text_nats
from hdlm_jax.report import notebook
from hdlm_jax.report.page import kind_of, levels_of
from hdlm_jax.report.run_files import counted
from hdlm_jax.runs import import_weights, refine, stages, tune
from hdlm_jax.runs.interrupt import RESUME_EXIT
from hdlm_jax.training.loading import load_here, with_base


def _texts_of(name: str, given: object) -> list[str]:
    """One text or several as a list."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list | tuple):
        raise ConfigError(f"{name}: must be a text or a list of texts, not {type(given).__name__}")
    for i, text in enumerate(given):
        if not isinstance(text, str):
            raise ConfigError(f"{name}[{i}]: must be of type str, not {type(text).__name__}")
    return list(given)


class Model:
    """What `hdlm_jax.load(workdir)` gives: a trained run to use in a notebook.

    Attributes:
      hierarchy: hdlm_jax.diffusion.hierarchy.Hierarchy.
      tokenizer: hdlm_jax.data.tokenizers.Tokenizer.
      run: the parts beneath: config, network, process, params.
    """

    def __init__(self, workdir: str, checkpoint: str = "best"):
        self.run = load_here(workdir, checkpoint)
        self.hierarchy, self.tokenizer = self.run.hierarchy, self.run.tokenizer
        self._draw = sampler_of(self.run)
        self._evaluator = functools.cache(lambda: evaluator_of(self.run))
        self._counts = functools.cache(lambda: counted(self.run.data_dir)[0])

    def __repr__(self) -> str:
        """What was trained, and what it can do."""
        run, h = self.run, self.hierarchy
        process = run.config.diffusion.process
        chat = bool(self.tokenizer.chat_template)
        more = [*["infill", "json"] * run.process.unmasks, *["chat"] * chat, "stream", "show"]
        can = ["generate", *more * (not run.config.data.feature_places), "nelbo"]
        return (f"<hdlm_jax.Model {kind_of(process, h.sizes)}: {levels_of(process, h.sizes)}; "
                f"{run.num_params:,} parameters, step {run.step:,}; {run.config.tokenizer.kind} tokenizer, "
                f"texts of up to {self.seq_len:,} tokens; can {', '.join(can)}>")

    @property
    def seq_len(self) -> int:
        return self.run.config.model.seq_len

    def generate(self, num_samples: int = 4, steps: int = 128, prompt: str | Sequence[str] = "", *,
                 features: Sequence[Any] | np.ndarray | None = None, classifier: Classifier | None = None,
                 **settings: Any) -> list[str]:
        """Texts after a prompt if there is one, up to their first end of text; at most seq_len (or `length`) tokens.

        Of several prompts, of any lengths, num_samples texts each: prompt by prompt, in batches of all of them.

        Args:
          features: of a run that writes for images, sound or the like (docs/conditioning.md): an array [n, P, F], or n
            arrays [<= P, F]; num_samples texts for each, behind one prompt for all or n prompts.
          steps: of the methods that have some; classifier: function of one-hot states float32 [b, S, N] ->
            log p(y) [b], for method="classifier".
          settings: any other of config.GenerateConfig (method, options, helper, temperature, top_p, seed, ...).

        Raises:
          ConfigError: what the command line would not take either, in its words.
        """
        prompts = _texts_of("generate.prompt", prompt)
        rows: Sequence[np.ndarray | None] = [None] * len(prompts)
        if features is not None:
            rows = list(self._features(features))
            prompts = prompts * len(rows) if len(prompts) == 1 else prompts
            if len(prompts) != len(rows):
                raise ConfigError(f"features of {len(rows)} texts, and {len(prompts)} prompts: give one prompt, or as "
                                  "many")
        g = self._settings(settings, steps=steps, num_samples=num_samples)
        if classifier is not None and not callable(classifier):
            raise ConfigError(f"classifier: must be a function, not {type(classifier).__name__}")
        asked = [asking.prompted(self.run, g, text, row) for text, row in zip(prompts, rows, strict=True)]
        return self._texts(asked, g, classifier)

    def _features(self, given: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Features as rows float32 [n, P, F]; ConfigError where they are none, or where this run knows none."""
        d = self.run.config.data
        if not d.feature_places:
            raise ConfigError("features: this run knows none (data.features_field)")
        return vectors.rows_of(given, (d.feature_places, d.feature_width), "features")

    def chat(self, messages: Sequence[chats.Message], num_samples: int = 1, steps: int = 128, *,
             template: Mapping[str, Any] | None = None, **settings: Any) -> list[str]:
        """Answers to a conversation, each up to the end of the assistant's turn or of the text, whichever is first.

        Args:
          messages: each a dict with "role" and "content", the last one the user's.
          template: further variables of the chat template, as {"enable_thinking": False}.
          settings: as those of `generate`; prompt and answer have at most seq_len (or `length`) tokens.

        Raises:
          ConfigError: what `generate` refuses. ValueError: no chat template, or what it refuses (data/chat.py).
        """
        g = self._settings(settings, prompt="", schema="", steps=steps, num_samples=num_samples)
        return self._texts([asking.chatted(self.run, g, messages, **(template or {}))], g)

    def stream(self, prompt: str | Sequence[chats.Message] = "", steps: int = 128, **settings: Any
               ) -> Iterator[desk.Moment]:
        """The text of `generate(1, prompt=prompt)`, or of `chat(messages)`, while it is written, call by call.

        Each moment has call, t and the states z int32 [n] (`hierarchy.level_of(z)`: 0 is a token), and in sure what
        probability the model gave to them; the last one has the text as well, and in `done` why it ends. Leaving the
        loop stops the writing.

        Raises:
          ConfigError: what `generate` refuses. ValueError: what `chat` refuses.
        """
        return self._moments(prompt, self._settings(settings, steps=steps, num_samples=1))[0]

    def show(self, prompt: str | Sequence[chats.Message] = "", steps: int = 64, **settings: Any) -> notebook.Film:
        """The text of `stream`, to see how it was written: in Jupyter and VS Code it falls into place below the cell.

        What comes back has `text`, and `html`, a page that needs nothing else.

        Raises:
          ConfigError: what `generate` refuses. ValueError: what `chat` refuses.
        """
        g = self._settings(settings, steps=steps, num_samples=1)
        moments, given = self._moments(prompt, g)
        about = {"prompt_tokens": given, "settings": dataclasses.asdict(g), "step": self.run.step}
        counts = self._counts() if self.hierarchy.num_levels > 1 else None
        return notebook.film_of(list(moments), self.hierarchy, self.tokenizer, counts, about)

    def _moments(self, prompt: str | Sequence[chats.Message], g: GenerateConfig) -> tuple[Iterator[desk.Moment], int]:
        """(the moments of a text, how many of its tokens were given)."""
        asked = (asking.prompted(self.run, g, prompt) if isinstance(prompt, str)
                 else asking.chatted(self.run, g, prompt))
        return desk.moments(self._draw_with(g), self.tokenizer, asked, g), asked.given

    def infill(self, text: str | Sequence[str], num_samples: int = 1, steps: int = 64, **settings: Any) -> list[str]:
        """The text with its blanks filled in; everything else stays. Of several texts num_samples each, text by text.

        Blanks: [MASK] one token, [MASK:5] five, [LIKE:word] one token of the same cluster as the given word's first
        ([LIKE@2:word]: of its node of level 2); the cluster is shown to the model, the word is not. [[ is the character
        [. A single space in front of a blank is left to it, as words of most tokenizers begin with theirs.
        """
        g = self._settings(settings, length=0, prompt="", steps=steps, num_samples=num_samples)
        return self._texts([asking.filled(self.run, g, one) for one in _texts_of("infill", text)], g)

    def json(self, schema: object, num_samples: int = 1, steps: int = 64, prompt: str = "", budget: int = 16,
             **settings: Any) -> list[Any]:
        """Objects of a JSON schema (a dict, or its text), whatever the model is like: hdlm_jax.decoding.schema."""
        g = self._settings(settings, length=0, prompt=prompt, steps=steps, num_samples=num_samples)
        if type(budget) is not int:
            raise ConfigError(f"budget={budget!r}: must be of type int")
        return [json.loads(text) for text in self._texts([asking.of_schema(self.run, g, schema, prompt, budget)], g)]

    def _settings(self, settings: dict[str, Any], **own: Any) -> GenerateConfig:
        """GenerateConfig with these settings, checked as those of the command line; own: what the caller decides."""
        g = asking.settings(self.run, settings, **own)
        if g.schema:
            raise ConfigError(f"generate.schema={g.schema!r}: here call Model.json(schema)")
        return g

    def _draw_with(self, g: GenerateConfig, classifier: Classifier | None = None) -> Sampler:
        """The sampler for these settings."""
        if classifier is not None or g.helper:
            return sampler_of(self.run, load_helper(self.run, g), classifier)
        return self._draw

    def _texts(self, asked: Sequence[asking.Asked], g: GenerateConfig, classifier: Classifier | None = None
               ) -> list[str]:
        if not asked:
            return []
        parts: list[Any] = [one.canvas for one in asked]
        plain = isinstance(parts[0], np.ndarray)
        out = self._draw_with(g, classifier)(np.concatenate(parts) if plain else canvases.together(parts), g)
        rows = zip([one for one in asked for _ in range(g.num_samples)], out["tokens"], out["length"], strict=True)
        return [one.text(self.tokenizer, row, n) for one, row, n in rows]

    def nelbo(self, texts: str | Sequence[str], draws: int = 16, *,
              features: Sequence[Any] | np.ndarray | None = None) -> list[dict[str, Any]]:
        """Upper bounds on -log p of each text (one text is a list of one) followed by the end of text, in nats.

        Texts longer than seq_len are scored in pieces that do not see each other. features: as in `generate`, of each
        text those that it stands behind; such a text has to fit into seq_len with them.

        Returns:
          per text: nats, se (of the noise), tokens (end of text counted), bits_per_byte, given: "nothing", or "lengths"
          where the run learnt from rows that tell how long a text is, so that the bound is on -log p(text | length).
        """
        texts = _texts_of("nelbo", texts)
        if not isinstance(draws, int | np.integer):
            raise ConfigError(f"draws={draws!r}: must be of type int")
        if draws < 2:
            raise ConfigError(f"draws={draws}: must be at least 2 (for a standard error)")
        if not texts:
            return []
        ids = [np.append(self.tokenizer.encode(text), self.tokenizer.eot) for text in texts]
        if features is None:
            nats = text_nats(self._evaluator(), self.run, ids, draws, "nelbo")[0]
        else:
            given = self._features(features)
            if len(given) != len(ids):
                raise ConfigError(f"features of {len(given)} texts, and {len(ids)} texts: give one for each")
            rows = rows_behind(self.run, ids, given)
            nats = self._evaluator().nats(self.run.params, rows, draws, "nelbo")[0].sum(-1)
        per_draw = np.broadcast_to(nats, (draws, len(texts)))  # an exact process has one
        return [{"nats": float(values.mean()), "se": float(values.std(ddof=1) / np.sqrt(draws)), "tokens": len(tokens),
                 "bits_per_byte": float(values.mean() / np.log(2) / max(1, len(text.encode()))),
                 "given": self.run.given_alone} for text, tokens, values in zip(texts, ids, per_draw.T, strict=True)]


def train(config: str | config_dict.ConfigDict, workdir: str = "", **settings: Any) -> Model:
    """Trains as `hdlm-jax --config=... --workdir=...` does, goes on where it was stopped, and loads the run.

    In a notebook its curves are drawn while it trains; interrupting the kernel saves, and the same call goes on.

    Args:
      config: a recipe by name or as a file, or what one gives (hdlm_jax.config.default(), changed).
      workdir: default runs/<recipe>.
      settings: any setting, as **{"train.steps": 100}.

    Raises:
      ConfigError: what the command line would refuse, in its words. KeyboardInterrupt: it was stopped, and has saved.
    """
    if not isinstance(config, str | config_dict.ConfigDict):
        raise ConfigError(f"config: must be the name of a recipe or a ConfigDict, not {type(config).__name__}")
    if isinstance(config, str):
        name, colon, argument = config.partition(":")
        workdir = workdir or os.path.join("runs", os.path.splitext(os.path.basename(name))[0])
        config = recipe(name, *[argument] * bool(colon))
    workdir, values = expand(os.fspath(workdir)), config.to_dict()
    check_local("workdir", workdir)
    if not workdir:
        raise ConfigError("workdir='': give the folder of the run")
    for name, value in settings.items():
        section, dot, key = name.partition(".")
        check_name(name)
        if not dot:
            raise ConfigError(f"{name}: is a section; write its settings as in **{{'train.steps': 100}}")
        values[section][key] = value
    given = stages.checked(with_base(values, workdir))
    if given.train.objective in ASIDE:
        raise ConfigError(f"train.objective={given.train.objective!r}: trains a helper, no model to give back; use the "
                          "command line")
    given.parallel.shape(jax.device_count())
    parallel.keep_compiled()
    import_weights.check_trainable(workdir)
    plot = notebook.Plot(workdir, given.train.steps) if notebook.here() else None
    try:
        (tune.tune if given.tune.objective else refine.train)(given, workdir, shown=plot)
    except SystemExit as stopped:
        if stopped.code != RESUME_EXIT:
            raise
        raise KeyboardInterrupt("asked to stop, saved; the same call goes on") from None
    finally:
        if plot:
            plot.close()  # also where there was nothing to do
    return Model(workdir)
