"""A trained run in Python: load it, generate, fill in blanks, score texts."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from hdlm_jax.config import Config, ConfigError, Generate, Parallel, change, inherit, resolve
from hdlm_jax.decoding import canvas as canvases
from hdlm_jax.decoding import schema as schemas
from hdlm_jax.diffusion.process import HierarchicalProcess
from hdlm_jax.model.network import Network
from hdlm_jax.run import parallel
from hdlm_jax.run.evaluate import Evaluator
from hdlm_jax.run.generate import ended, load_helper, sampler_of, start_canvas, text_of
from hdlm_jax.run.stages import data_dir
from hdlm_jax.run.state import build, init_state, make_optimizer
from hdlm_jax.text import pipeline
from hdlm_jax.text.corpus import expand
from hdlm_jax.text.hierarchy import Hierarchy
from hdlm_jax.text.prepare import load_manifest
from hdlm_jax.text.tokens import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's parts with the weights of one checkpoint (their average, where the run keeps one)."""

    config: Config
    trained: Config  # as it was trained: how sequences were made of the text
    data_dir: str  # of its prepared text; only evaluation needs it to be there
    tokenizer: Tokenizer
    hierarchy: Hierarchy
    network: Network
    process: HierarchicalProcess
    mesh: Any
    params: Any
    step: int
    ema: bool  # whether params are the average of the weights

    @property
    def num_params(self) -> int:
        return sum(a.size for a in jax.tree.leaves(self.params))

    @property
    def ends(self) -> bool:
        """Whether a text by itself is followed by ends of text that count, as rows of data.padding="end" are.

        A causal network does not see them, nor need them.
        """
        return (self.trained.data.packing, self.trained.data.padding) == ("crop", "end") and not self.process.exact

    @property
    def given(self) -> str:
        """What the NELBO of its validation rows is conditional on beside prompts: "nothing" or "lengths"."""
        d = self.trained.data
        return pipeline.given(d.packing, d.padding, bool(d.prompt_field), self.process.exact)

    @property
    def given_alone(self) -> str:
        """The same of texts that are scored one by one, each in rows of its own."""
        return "nothing" if self.ends or self.process.exact else "lengths"

    def valid_rows(self, seq_len: int, limit: int = 0) -> dict[str, np.ndarray]:
        """Rows of the validation split made as the training rows were (pipeline.valid_rows)."""
        return pipeline.valid_rows(self.data_dir, seq_len, limit, self.trained.data.packing, self.trained.data.padding)

    def training_lengths(self) -> np.ndarray | None:
        """[n, 2]: how many training documents have so many scored tokens (end of text too); None where the tokens are
        not on this machine."""
        try:
            return np.array(load_manifest(self.data_dir).lengths, np.int64).reshape(-1, 2)
        except (OSError, ValueError):
            return None


def upgraded(saved: dict, path: str) -> dict:
    """A saved config with what earlier versions did not know; ConfigError where checkpoints had another layout."""
    if "packing" not in saved["data"]:
        raise ConfigError(f"{path}: made by an earlier version, whose checkpoints had another layout; train it again")
    return saved | {"data": {"padding": "hidden"} | saved["data"]}


def saved_config(workdir: str) -> Config:
    """The config a run was trained with; ConfigError where there is none."""
    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path):
        raise ConfigError(f"workdir={workdir!r}: no {path}; train first (--mode=train)")
    with open(path) as f:
        saved = json.load(f)
    return resolve(upgraded(saved.get("config", saved), workdir))  # an export says more about itself


def with_base(given: Any, workdir: str) -> Any:
    """A config as given, with the settings of the run it starts from (train.init_from) where it leaves the defaults.

    A workdir that has been begun already knows them itself.

    Raises:
      ConfigError: no run there, or settings that contradict it.
    """
    name = given["train"]["init_from"]
    if not name:
        return given
    begun = os.path.exists(os.path.join(workdir, "config.json"))
    try:
        base = saved_config(workdir if begun else expand(name))
    except ConfigError as error:
        raise ConfigError(f"train.init_from={name!r}: {error}") from error
    return inherit(given, base, name)


def load_run(config: Config, workdir: str, which: str = "best", ema: bool = True) -> Run:
    """A run (or its export) with the settings given for this use (evaluate, generate, parallel, where its data lies).

    What makes the model (tokenizer, hierarchy, diffusion, model, optimizer) must be as trained. The weights are their
    average where the run keeps one, unless ema=False.

    Raises:
      ConfigError: no such run, or settings it was not trained with.
    """
    dataclasses.replace(config.evaluate, checkpoint=which).check()
    from hdlm_jax.run.train import FREE

    trained = saved_config(workdir)
    for section in ("tokenizer", "hierarchy", "diffusion", "model"):
        for name, value in dataclasses.asdict(getattr(config, section)).items():
            was = getattr(getattr(trained, section), name)
            if value != was and f"{section}.{name}" not in FREE:
                raise ConfigError(f"{section}.{name}={value!r}: {workdir} was trained with {was!r}")
    folder = config.data.dir or trained.data.dir or data_dir(config, workdir)
    tokenizer = load_tokenizer(os.path.join(workdir, "tokenizer"))
    hierarchy = Hierarchy.load(os.path.join(workdir, "hierarchy.npz"), tokenizer.fingerprint)
    mesh = parallel.make_mesh(config)
    network, process = build(config, hierarchy)
    tx, _ = make_optimizer(trained)
    shape = jax.eval_shape(lambda: init_state(trained, hierarchy, network, tx, jax.random.key(0)))
    shardings = parallel.state_shardings(mesh, shape.params)
    abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shape.params, shardings)
    if os.path.isdir(os.path.join(workdir, "params")) and trained.optimizer.ema and not ema:
        raise ConfigError(f"evaluate.ema=False: {workdir} is an export, which holds the average of the weights alone")
    ema = bool(trained.optimizer.ema) and ema
    step, params = _weights(workdir, which, hierarchy, abstract, ema)
    return Run(config, trained, folder, tokenizer, hierarchy, network, process, mesh, params, step, ema)


def _weights(workdir: str, which: str, hierarchy: Hierarchy, abstract: Any, ema: bool) -> tuple[int, Any]:
    """(step, parameters) of the best or latest checkpoint."""
    from hdlm_jax.run.export import checkpoints_of

    checkpoints = checkpoints_of(workdir)
    step = checkpoints.choose(which)
    try:
        saved = checkpoints.meta(step)
        if saved["hierarchy"] != hierarchy.fingerprint:
            raise ConfigError(f"{workdir}: hierarchy.npz {hierarchy.fingerprint[:12]} is not the checkpoint's "
                              f"{saved['hierarchy'][:12]}")
        return step, checkpoints.params(step, abstract, ema)
    except OSError:
        if checkpoints.has(step) or jax.process_count() > 1:  # many must not choose differently
            raise
    finally:
        checkpoints.close()
    return _weights(workdir, which, hierarchy, abstract, ema)  # a training beside us has gone on to another one


def load_here(workdir: str, which: str = "best", mesh: Parallel = Parallel(),  # noqa: B008 (it is frozen)
              ema: bool = True) -> Run:
    """A run as trained, on the devices at hand whatever mesh it was trained on; ~ and $VARIABLES are expanded."""
    workdir = expand(workdir)
    return load_run(dataclasses.replace(saved_config(workdir), parallel=mesh), workdir, which, ema)


def load_params(config: Config, tokenizer_fingerprint: str) -> Any:
    """Weights of the run in train.init_from on config's mesh; ConfigError if its tokenizer is another one."""
    run = load_here(config.train.init_from, mesh=config.parallel)
    if run.tokenizer.fingerprint != tokenizer_fingerprint:
        raise ConfigError(f"{config.train.init_from}: tokenizer {run.tokenizer.fingerprint[:12]} is not this run's "
                          f"{tokenizer_fingerprint[:12]}")
    return run.params


def checkpoint_embedding(workdir: str) -> np.ndarray:
    """Word rows of a run's embedding table, float32 [V, D], to cluster words by. All processes have to ask for it."""
    run = load_here(workdir)
    return parallel.to_host(run.params["embedding"])[: run.hierarchy.num_words]


def _texts_of(name: str, given: Any) -> list[str]:
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
      hierarchy: hdlm_jax.text.hierarchy.Hierarchy.
      tokenizer: hdlm_jax.text.tokens.Tokenizer.
      run: the parts beneath: config, network, process, params.
    """

    def __init__(self, workdir: str, checkpoint: str = "best"):
        self.run = load_here(workdir, checkpoint)
        self.hierarchy, self.tokenizer = self.run.hierarchy, self.run.tokenizer
        self._draw = sampler_of(self.run)
        self._evaluator: Evaluator | None = None

    @property
    def seq_len(self) -> int:
        return self.run.config.model.seq_len

    def generate(self, num_samples: int = 4, steps: int = 128, prompt: str | Sequence[str] = "", *, classifier=None,
                 **settings: Any) -> list[str]:
        """Texts after a prompt if there is one, up to their first end of text; at most seq_len (or `length`) tokens.

        Of several prompts, of any lengths, num_samples texts each: prompt by prompt, in batches of all of them.

        Args:
          steps: of the methods that have some; classifier: function of one-hot symbols float32 [b, S, N] ->
            log p(y) [b], for method="classifier".
          settings: any other of config.Generate (method, options, helper, temperature, top_p, seed, ...).

        Raises:
          ConfigError: what the command line would not take either, in its words.
        """
        prompts = _texts_of("generate.prompt", prompt)
        g = self._settings(settings, steps=steps, num_samples=num_samples)
        if classifier is not None and not callable(classifier):
            raise ConfigError(f"classifier: must be a function, not {type(classifier).__name__}")
        parts: list[Any] = [start_canvas(self.run, g, np.tile(self.tokenizer.encode(text), (g.num_samples, 1)))
                            for text in prompts]
        if not parts:
            return []
        plain = isinstance(parts[0], np.ndarray)
        return self._texts(np.concatenate(parts) if plain else canvases.together(parts), g, classifier)

    def infill(self, text: str | Sequence[str], num_samples: int = 1, steps: int = 64, **settings: Any) -> list[str]:
        """The text with its blanks filled in; everything else stays. Of several texts num_samples each, text by text.

        Blanks: [MASK] one token, [MASK:5] five, [LIKE:word] one token of the same cluster as the given word's first
        ([LIKE@2:word]: of its node of level 2); the cluster is shown to the model, the word is not. [[ is the character
        [. A single space in front of a blank is left to it, as words of most tokenizers begin with theirs.
        """
        g = self._settings(settings, length=0, prompt="", steps=steps, num_samples=num_samples)
        parts, keep = [], []
        for one in _texts_of("infill", text):
            canvas = canvases.template(one, self.tokenizer, self.hierarchy, g.num_samples, self.seq_len)
            n, places = int(canvas.length[0]), canvas.z.shape[1]
            if canvas.given[0, :n].all():
                raise ValueError(f"infill: no blank in {one!r}; write [MASK], [MASK:5] or [LIKE:word] for what is "
                                 "missing")
            if self.run.ends:
                canvas, places = canvases.closed(canvas, self.seq_len, self.tokenizer.eot), self.seq_len
            # the rest of the canvas is text the model makes up and nobody reads
            inside = np.arange(places)[None] < n
            parts.append(canvas._replace(z=np.where(inside, canvas.z, self.hierarchy.mask_id).astype(np.int32),
                                         given=canvas.given & inside, length=np.full(g.num_samples, places, np.int32)))
            keep += [n] * g.num_samples
        return self._texts(canvases.together(parts), g, keep=keep) if parts else []

    def json(self, schema: Any, num_samples: int = 1, steps: int = 64, prompt: str = "", budget: int = 16,
             **settings: Any) -> list[Any]:
        """Objects of a JSON schema (a dict, or its text), whatever the model is like: hdlm_jax.decoding.schema."""
        g = self._settings(settings, length=0, prompt=prompt, steps=steps, num_samples=num_samples)
        if type(budget) is not int:
            raise ConfigError(f"budget={budget!r}: must be of type int")
        scaffold = schemas.scaffold(schema, self.tokenizer, self.hierarchy, budget, prompt=prompt)
        canvas = scaffold.canvas(g.num_samples, self.seq_len)
        if self.run.ends:
            canvas = canvases.closed(canvas, self.seq_len, self.tokenizer.eot)
        return [scaffold.read(row) for row in self._draw(canvas, g)["tokens"]]

    def _settings(self, settings: dict[str, Any], **own: Any) -> Generate:
        """config.Generate with these settings, checked as those of the command line; own: what the caller decides."""
        if twice := sorted(own.keys() & settings.keys()):
            raise ConfigError(f"generate.{twice[0]}: is not a setting here; the text says it")
        values = {k: v.item() if isinstance(v, np.generic) else v for k, v in (own | settings).items()}
        g = change("generate", self.run.config.generate, values)
        dataclasses.replace(self.run.config, generate=g).check()
        if g.schema:
            raise ConfigError(f"generate.schema={g.schema!r}: here call Model.json(schema)")
        return g

    def _texts(self, canvas: Any, g: Generate, classifier=None, keep: Sequence[int] = ()) -> list[str]:
        draw = self._draw
        if classifier is not None or g.helper:
            draw = sampler_of(self.run, load_helper(self.run, g), classifier)
        out = draw(canvas, g)
        words = canvas < self.hierarchy.num_words if isinstance(canvas, np.ndarray) else canvas.given
        texts = []
        for row, given, n in zip(out["tokens"], words, keep or out["length"], strict=True):
            last = 1 + int(max(np.flatnonzero(given[:n]), default=-1))  # no end of text counts before what is given
            texts.append(text_of(self.tokenizer, ended(row[:n], last, self.tokenizer.eot, g.stop), g.stop))
        return texts

    def nelbo(self, texts: str | Sequence[str], draws: int = 16) -> list[dict[str, Any]]:
        """Upper bounds on -log p of each text (one text is a list of one) followed by the end of text, in nats.

        Texts longer than seq_len are scored in pieces that do not see each other.

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
        s, pieces, owner = self.seq_len, [], []
        for i, text in enumerate(texts):
            ids = np.append(self.tokenizer.encode(text), self.tokenizer.eot)
            for start in range(0, len(ids), s):
                pieces.append(ids[start : start + s])
                owner.append(i)
        if self._evaluator is None:
            run = self.run
            self._evaluator = Evaluator(run.config, run.network, run.process, run.mesh, run.params)
        rows = pipeline.rows_of(pieces, s, self.tokenizer.eot, ends=self.run.ends)
        nats, _, _ = self._evaluator.nats(self.run.params, rows, draws, "nelbo")
        per_draw = np.zeros((draws, len(texts)))
        for place, text_index in enumerate(owner):
            per_draw[:, text_index] += nats[:, place].sum(-1)
        out: list[dict[str, Any]] = []
        for i, text in enumerate(texts):
            mean, count = per_draw[:, i].mean(), sum(len(p) for p, o in zip(pieces, owner, strict=True) if o == i)
            out.append({"nats": float(mean), "se": float(per_draw[:, i].std(ddof=1) / np.sqrt(draws)), "tokens": count,
                        "bits_per_byte": float(mean / np.log(2) / max(1, len(text.encode()))),
                        "given": self.run.given_alone})
        return out
