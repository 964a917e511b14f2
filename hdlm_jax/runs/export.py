"""A run's weights as files for other programs: --mode=export (docs/scale.md, "Taking the weights elsewhere").

<workdir>/export holds, about one checkpoint (its averaged weights, where the run keeps them):

    model.safetensors  float32; names are those of the network, joined by dots: stack.qkv.kernel
    params/            the same as a tree of arrays, by Orbax
    config.json        config (as trained), step, ema, fingerprints (tokenizer, hierarchy, data), shapes, hdlm_jax
    hierarchy.npz      words -> clusters -> ... -> mask: parents_0, parents_1, ...
    tokenizer/         its words as a rank file, and a .json
    <layout>.safetensors   with released.layout: the weights under the published network's names (docs/import.md)

With released.layout=hub <workdir>/hub is written in its place, in the layout of the open checkpoint the run came from.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import jax
import numpy as np

import hdlm_jax
from hdlm_jax.common import jsons, processes
from hdlm_jax.common.console import say
from hdlm_jax.common.jsons import Json, reuse, write_json
from hdlm_jax.config import Config, ConfigError
from hdlm_jax.runs import import_weights, open_weights
from hdlm_jax.training.checkpoint import checkpoints_of, save_params
from hdlm_jax.training.loading import file_of, load_run, saved_config


def export(config: Config, workdir: str) -> str:
    """Writes <workdir>/export from the checkpoint config.evaluate.checkpoint; gives back its path.

    Every process of a run calls it; process 0 writes, and holds the weights once (4 bytes each) in its memory. The
    folder is made aside and renamed: it is whole or not there, and that of another step stays until then.

    Raises:
      ConfigError: no such run, settings it was not trained with, or safetensors is not installed.
    """
    if config.released.layout == "hub":
        return open_weights.export_hub(config, workdir)
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file
    except ImportError:
        raise ConfigError("--mode=export: needs safetensors, pip install hdlm_jax[safetensors]") from None
    trained = saved_config(workdir)
    facts = _facts(config, trained, workdir)
    folder = os.path.abspath(os.path.join(workdir, "export"))
    if processes.on_main_process(lambda: reuse(os.path.join(folder, "config.json"), facts) is not None):
        say(f"export: reusing {folder} of step {facts['step']:,}")
        return folder
    run = load_run(config, workdir, config.evaluate.checkpoint)
    arrays: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree.leaves_with_path(run.params):
        whole = processes.to_host(leaf)  # a leaf at a time: all processes take part
        if processes.is_main_process():
            arrays[".".join(str(part.key) for part in path)] = np.asarray(whole, np.float32, order="C")

    def save(tensors: dict[str, np.ndarray], path: str) -> None:
        try:
            save_file(tensors, path, about)
        except SafetensorError as error:  # of a full disk, too
            raise OSError(f"{path}: cannot be written ({error}); the export before is kept") from error

    # a single entry: safetensors writes several in any order, and the same weights should be the same file
    about = {"hdlm_jax": jsons.dumps({name: value for name, value in facts.items() if name != "config"})}

    def write() -> None:
        aside, old = f"{folder}.tmp", f"{folder}.old"
        shutil.rmtree(aside, ignore_errors=True)  # of an export that was interrupted
        os.makedirs(aside)
        save(arrays, os.path.join(aside, "model.safetensors"))
        tree = jax.tree.unflatten(jax.tree.structure(run.params), arrays.values())
        save_params(os.path.join(aside, "params"), tree)
        if layout := config.released.layout:
            published = import_weights.published(config, trained, workdir, run.hierarchy, tree)
            save(published, os.path.join(aside, f"{layout}.safetensors"))
        run.tokenizer.save(os.path.join(aside, "tokenizer"))
        shutil.copyfile(file_of(workdir, run.hierarchy.fingerprint), os.path.join(aside, "hierarchy.npz"))
        shapes = {name: list(array.shape) for name, array in arrays.items()}
        write_json(os.path.join(aside, "config.json"), facts | {"shapes": shapes})
        for path in Path(aside).glob("*.safetensors"):  # which their library makes readable by their owner alone
            shutil.copymode(os.path.join(aside, "config.json"), path)
        shutil.rmtree(old, ignore_errors=True)
        if os.path.exists(folder):
            os.rename(folder, old)
        os.rename(aside, folder)
        shutil.rmtree(old, ignore_errors=True)
        say(f"export: step {facts['step']:,}, {run.num_params:,} parameters, in {folder}")

    processes.on_main_process(write)
    return folder


def _facts(config: Config, trained: Config, workdir: str) -> Json:
    """What an export is made from; ConfigError where the layout asked for has no place for such a run."""
    checkpoints = checkpoints_of(workdir)
    step = checkpoints.choose(config.evaluate.checkpoint)
    saved = checkpoints.meta(step)
    checkpoints.close()
    facts = {"step": step, "ema": bool(trained.optimizer.ema),
             "fingerprints": {name: saved[name] for name in ("tokenizer", "hierarchy", "data")},
             "hdlm_jax": hdlm_jax.__version__, "config": trained.as_dict()}
    if not config.released.layout:
        return facts
    import_weights.check_exportable(trained)
    r = config.released
    return facts | {"layout": [r.layout, r.mask_id, r.first_cluster]}
