"""What a run is: a workdir with its config, tokenizer, hierarchy and checkpoints, and how its parts are loaded."""

from __future__ import annotations

import dataclasses
import glob
import os
import tempfile
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from hdlm_jax.common import parallel, processes
from hdlm_jax.common.jsons import of_types, read_json
from hdlm_jax.common.parallel import Tree
from hdlm_jax.config import ASIDE, Config, ConfigError, ParallelConfig, expand, inherit, resolve
from hdlm_jax.config.settings import Given
from hdlm_jax.data import pipeline
from hdlm_jax.data.prepare import load_manifest
from hdlm_jax.data.tokenizers import Tokenizer, load_tokenizer
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.process import Process
from hdlm_jax.models.make import make_network
from hdlm_jax.models.trunk import Trunk
from hdlm_jax.training.checkpoint import checkpoints_of
from hdlm_jax.training.state import build, placed

# settings in which a use of a run, or its resume, may differ from how it was trained (what the tokenizer's file holds
# is in its fingerprint)
FREE = ("train.log_every", "train.microbatches", "train.evaluate_every", "train.sample_every", "train.nonfinite_limit",
        "train.writers", "model.remat", "model.attention", "tokenizer.file", "tokenizer.sha256")


def data_dir(config: Config, workdir: str) -> str:
    return config.data.dir or os.path.join(workdir, "data")


def check_writable(folder: str) -> None:
    """OSError unless files can be made in a folder (which is made if it is not there), before any work."""
    def probe() -> None:
        try:
            os.makedirs(folder, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable.") as file:
                file.write(b"x" * 4096)  # an empty file fits on a full disk
                file.flush()
        except OSError as error:
            raise OSError(f"workdir={folder!r} cannot be written ({error.strerror}); give another --workdir") from error

    processes.on_main_process(probe)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's parts with the weights of one checkpoint (their average, where the run keeps one)."""

    config: Config
    trained: Config  # as it was trained: how sequences were made of the text
    data_dir: str  # of its prepared text; only evaluation needs it to be there
    tokenizer: Tokenizer
    hierarchy: Hierarchy
    network: Trunk
    process: Process
    mesh: Mesh
    params: Tree
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
    """A saved config with what earlier versions did not know or had elsewhere, without what they had and did not use;
    ConfigError where checkpoints had another layout."""
    if "packing" not in saved["data"]:
        raise ConfigError(f"{path}: made by an earlier version, whose checkpoints had another layout; train it again")
    decoder = dict(saved.get("decoder", {}))
    model = saved["model"] | ({"tied": decoder.pop("tied")} if "tied" in decoder else {})
    optimizer = dict(saved.get("optimizer", {}))
    if optimizer.get("time_lr") == 1:  # its default; another one is refused by name
        del optimizer["time_lr"]
    return saved | {"data": {"padding": "hidden"} | saved["data"], "model": model, "decoder": decoder,
                    "optimizer": optimizer}


def saved_config(workdir: str) -> Config:
    """The config a run was trained with; ConfigError where there is none."""
    path = os.path.join(workdir, "config.json")
    try:
        saved = read_json(path, optional=True)
        if saved is None:
            raise ConfigError(f"workdir={workdir!r}: no {path}; train first (--mode=train)")
        if "config" not in saved:  # an export says more about itself
            read_json(path, "data", "tokenizer", "model", "train")
        saved = saved.get("config", saved)
        of_types(path, saved, dict.fromkeys(saved, dict))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return resolve(upgraded(saved, workdir))


def with_base(given: Given, workdir: str) -> Given:
    """A config as given, with the settings of the run it starts from (train.init_from) where it leaves the defaults.

    A workdir that has been begun already knows them itself.

    Raises:
      ConfigError: no run there, or settings that contradict it.
    """
    name = given["train"]["init_from"]
    if not name:
        return given
    begun, name = os.path.exists(os.path.join(workdir, "config.json")), expand(name)
    if not begun and not os.path.exists(os.path.join(name, "config.json")):
        raise ConfigError(f"train.init_from={name!r}: no run there")
    return inherit(given, saved_config(workdir if begun else name), name)


def differences(config: Config, trained: Config, sections: Sequence[str]) -> list[str]:
    """"model.width=64 (there 32)" for every setting of these sections that is not as trained and not in FREE."""
    pairs = [(f"{section}.{field.name}", getattr(getattr(config, section), field.name),
              getattr(getattr(trained, section), field.name))
             for section in sections for field in dataclasses.fields(getattr(config, section))]
    return [f"{name}={value!r} (there {was!r})" for name, value, was in pairs if value != was and name not in FREE]


def load_run(config: Config, workdir: str, which: str = "best", ema: bool = True, helper: bool = False) -> Run:
    """A run (or its export) with the settings given for this use (evaluate, generate, parallel, where its data lies).

    What makes the model (tokenizer, hierarchy, diffusion, model, optimizer) must be as trained. The weights are their
    average where the run keeps one, unless ema=False. helper: for use beside another run, where an energy will do.

    Raises:
      ConfigError: no such run, settings it was not trained with, or one that is no language model.
    """
    dataclasses.replace(config.evaluate, checkpoint=which).check()
    trained = saved_config(workdir)
    if trained.train.objective in ASIDE and not helper:
        raise ConfigError(f"{workdir}: a run of train.objective={trained.train.objective!r} is no language model; use "
                          f"{trained.train.init_from}, with generate.helper={workdir}")
    differ = differences(config, trained, ("tokenizer", "hierarchy", "diffusion", "model", "decoder"))
    if differ:
        raise ConfigError(f"{'; '.join(differ)}: {workdir} was trained otherwise; leave out --config, and its own "
                          "settings are taken")
    folder = config.data.dir or trained.data.dir or data_dir(config, workdir)
    tokenizer = load_tokenizer(os.path.join(workdir, "tokenizer"))
    mesh = parallel.make_mesh(config)
    if os.path.isdir(os.path.join(workdir, "params")) and trained.optimizer.ema and not ema:
        raise ConfigError(f"evaluate.ema=False: {workdir} is an export, which holds the average of the weights alone")
    ema = bool(trained.optimizer.ema) and ema

    def abstract(hierarchy: Hierarchy) -> Tree:
        made = make_network(config, hierarchy)
        return placed(lambda: made.init_params(jax.random.key(0), config.model.seq_len), mesh)[0]

    step, hierarchy, params = _weights(workdir, which, tokenizer, abstract, ema)
    network, process = build(config, hierarchy)
    return Run(config, trained, folder, tokenizer, hierarchy, network, process, mesh, params, step, ema)


def file_of(folder: str | os.PathLike, fingerprint: str) -> str:
    """The file in a workdir of the hierarchy with this fingerprint: one learned in training (train.recluster_every),
    else hierarchy.npz, which need not be it."""
    learned = learned_file(folder, fingerprint)
    return learned if os.path.exists(learned) else os.path.join(folder, "hierarchy.npz")


def learned_file(folder: str | os.PathLike, fingerprint: str) -> str:
    """Where a training keeps a hierarchy that it has learned."""
    return os.path.join(folder, f"hierarchy-{fingerprint[:12]}.npz")


def hierarchy_file(workdir: str) -> str:
    """The file of the hierarchy that the best checkpoint of a run goes with."""
    if not glob.glob(learned_file(glob.escape(workdir), "*")):
        return file_of(workdir, "")
    checkpoints = checkpoints_of(workdir)
    try:
        return file_of(workdir, checkpoints.meta(checkpoints.choose("best"))["hierarchy"])
    finally:
        checkpoints.close()


def _weights(workdir: str, which: str, tokenizer: Tokenizer, abstract: Callable[[Hierarchy], Tree], ema: bool
             ) -> tuple[int, Hierarchy, Tree]:
    """(step, hierarchy, parameters) of the best or latest checkpoint; abstract: of a hierarchy, the parameters."""
    checkpoints = checkpoints_of(workdir)
    step = checkpoints.choose(which)
    try:
        wanted = checkpoints.meta(step)["hierarchy"]
        path = file_of(workdir, wanted)
        hierarchy = Hierarchy.load(path, tokenizer.fingerprint)
        if hierarchy.fingerprint != wanted:
            raise ConfigError(f"{workdir}: {os.path.basename(path)} {hierarchy.fingerprint[:12]} is not the "
                              f"checkpoint's {wanted[:12]}")
        return step, hierarchy, checkpoints.params(step, abstract(hierarchy), ema)
    except OSError:
        if checkpoints.has(step) or jax.process_count() > 1:  # many must not choose differently
            raise
    finally:
        checkpoints.close()
    return _weights(workdir, which, tokenizer, abstract, ema)  # a training beside us has gone on to another one


def load_here(workdir: str, which: str = "best", mesh: ParallelConfig = ParallelConfig(),  # noqa: B008 (it is frozen)
              ema: bool = True, helper: bool = False) -> Run:
    """A run as trained, on the devices at hand whatever mesh it was trained on; ~ and $VARIABLES are expanded."""
    workdir = expand(workdir)
    return load_run(dataclasses.replace(saved_config(workdir), parallel=mesh), workdir, which, ema, helper)


def load_base(config: Config, tokenizer_fingerprint: str) -> Run:
    """The run in train.init_from on config's mesh; ConfigError if its tokenizer is another one."""
    run = load_here(config.train.init_from, mesh=config.parallel)
    if run.tokenizer.fingerprint != tokenizer_fingerprint:
        raise ConfigError(f"{config.train.init_from}: tokenizer {run.tokenizer.fingerprint[:12]} is not this run's "
                          f"{tokenizer_fingerprint[:12]}")
    return run


def checkpoint_embedding(workdir: str) -> np.ndarray:
    """Word rows of a run's embedding table, float32 [V, D], to cluster words by. All processes have to ask for it."""
    run = load_here(workdir)
    return processes.to_host(run.params["embedding"])[: run.hierarchy.vocab_size].astype(np.float32)
