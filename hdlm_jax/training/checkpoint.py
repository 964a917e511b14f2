"""Checkpoints: best and latest kept, written aside and renamed, with everything a resume needs."""

from __future__ import annotations

import contextlib
import glob
import math
import os
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from hdlm_jax.common import jsons
from hdlm_jax.common.parallel import Tree
from hdlm_jax.training.state import TrainState

_TRASH, _UNWRITTEN = "trash", "a checkpoint cannot be written"


_BACK = "remove its folder to go back to the one before, where there is one"
_FINGERPRINTS = ("tokenizer", "hierarchy", "data")  # in the meta of every checkpoint


class _Manager(ocp.CheckpointManager):
    """Asks nobody whether it is time to leave: train does, and the answer must not depend on who else has asked."""

    def reached_preemption(self, step: int) -> bool:
        return False


class DamagedCheckpoint(OSError):
    """A checkpoint that is not what was saved."""


class Checkpoints:
    """Orbax checkpoints under <workdir>/checkpoints: state and EMA as arrays, meta as JSON.

    meta holds the config, the fingerprints of tokenizer and hierarchy, the data position, and `checksums` of all
    arrays, which are compared whenever they are read (checkpoints from before have none).
    """

    def __init__(self, workdir: str, read_only: bool = False):
        self.path, self._read_only = os.path.abspath(os.path.join(workdir, "checkpoints")), read_only
        if read_only and not os.path.isdir(self.path):
            raise FileNotFoundError(f"{self.path}: no checkpoint there; train first (--mode=train)")
        managers = ocp.checkpoint_managers
        best = managers.BestN(get_metric_fn=_score, reverse=True, n=1)
        # put aside by a rename before it is deleted: a kill leaves no half of a checkpoint among the others
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy([managers.LatestN(1), best]), best_fn=_score,
            best_mode="min", create=not read_only, read_only=read_only, save_interval_steps=0 if read_only else 1,
            todelete_subdir=None if read_only else _TRASH)
        if not read_only:
            self._sweep("*.orbax-checkpoint-tmp*")  # what a kill left unfinished
        try:
            self.manager = _Manager(self.path, options=options)
        except Exception as error:  # it reads what each checkpoint says of itself
            for name in ("_CHECKPOINT_METADATA", "metrics/metrics"):
                for path in glob.glob(os.path.join(glob.escape(self.path), "*", name)):
                    _read_damaged(path)
            raise DamagedCheckpoint(f"{self.path}: cannot be read ({type(error).__name__}: {error})") from error

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def choose(self, which: str) -> int:
        """Step of the 'best' (lowest validation NELBO) or 'latest' checkpoint."""
        step = self.manager.best_step() if which == "best" else None
        step = self.manager.latest_step() if step is None else step
        if step is None:
            raise FileNotFoundError(f"{self.path}: no checkpoint there; train first (--mode=train)")
        return step

    def has(self, step: int) -> bool:
        """Whether that step is there at this moment."""
        return os.path.isdir(os.path.join(self.path, str(step)))

    def save(self, step: int, state: TrainState, meta: dict[str, Any], metrics: dict[str, float]) -> None:
        """Starts an asynchronous save; a kill while it runs leaves the checkpoints before it.

        metrics: nelbo on validation text tells the best checkpoint; one that is not finite is none.
        """
        if step in self.manager.all_steps():
            return
        ema, rest = state.ema, state._replace(ema={})
        meta = meta | {"checksums": checksums({"state": rest, "ema": ema})}
        items = {"state": ocp.args.StandardSave(rest), "meta": ocp.args.JsonSave(jsons.plain(meta))}
        if ema:
            items["ema"] = ocp.args.StandardSave(ema)
        self.wait()
        self._sweep()
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        with self._told(_UNWRITTEN):
            self.manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def _sweep(self, *more: str) -> None:
        """Deletes what Orbax has put aside (nothing is being put there now), and more by its name."""
        if jax.process_index() == 0:
            for pattern in (_TRASH, *more):
                for path in glob.glob(os.path.join(glob.escape(self.path), pattern)):
                    shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def _told(self, what: str, kind: type[OSError] = OSError) -> Iterator[None]:
        """Whatever goes wrong on disk as one line (of this kind) that says what is still there."""
        try:
            yield
        except Exception as error:  # storage libraries have errors of their own
            whole = sorted(int(name) for name in os.listdir(self.path) if name.isdigit())
            rest = f"steps {whole} are there" if whole else "there is no other"
            reason = " ".join(str(error).split()) or type(error).__name__
            reason = reason if len(reason) < 600 else f"{reason[:200]} ... {reason[-300:]}"
            raise kind(f"{self.path}: {what}: {reason}; {rest}") from error

    def _restore(self, step: int, **items: Any) -> Any:
        what = f"checkpoint of step {step} cannot be read (damaged? remove its folder to go back to the one before)"
        with self._told(what, DamagedCheckpoint):
            found = self.manager.restore(step, args=ocp.args.Composite(**items))
        if "meta" not in items:
            saved = self.meta(step).get("checksums", {})
            here = checksums({name: found[name] for name in items}) if saved else {}
            if wrong := [name for name, value in here.items() if saved.get(name, value) != value]:
                raise DamagedCheckpoint(
                    f"{self.path}: checkpoint of step {step} is damaged, {len(wrong)} arrays are not what was saved "
                    f"({wrong[0]}, ...); {_BACK}")
        return found

    def meta(self, step: int) -> dict[str, Any]:
        found = self._restore(step, meta=ocp.args.JsonRestore())["meta"]
        known = isinstance(found, dict) and isinstance(found.get("checksums", {}), dict)
        if not known or not all(isinstance(found.get(name), str) for name in _FINGERPRINTS):
            raise DamagedCheckpoint(f"{self.path}: checkpoint of step {step} is damaged, its meta lacks checksums or "
                                    f"fingerprints of {', '.join(_FINGERPRINTS)}; {_BACK}")
        return found

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """The state of a step, placed as the abstract state's shardings say."""
        ema = abstract_state.ema
        average = {"ema": ocp.args.StandardRestore(ema)} if ema else {}
        found = self._restore(step, state=ocp.args.StandardRestore(abstract_state._replace(ema={})), **average)
        return found["state"]._replace(ema=found["ema"] if ema else {})

    def params(self, step: int, abstract_params: Tree, ema: bool) -> Tree:
        """Parameters alone (the EMA where the run has one): no optimizer state is read."""
        if ema:
            return self._restore(step, ema=ocp.args.StandardRestore(abstract_params))["ema"]
        item = {"params": abstract_params}
        how = ocp.checkpoint_utils.construct_restore_args(item)
        return self._restore(step, state=ocp.args.PyTreeRestore(item, partial_restore=True, restore_args=how)
                             )["state"]["params"]

    def wait(self) -> None:
        with self._told(_UNWRITTEN):
            self.manager.wait_until_finished()

    def close(self) -> None:
        with self._told(_UNWRITTEN):
            self.manager.close()
        if not self._read_only:
            self._sweep()


class Exported:
    """An export where a reader of weights expects Checkpoints: the one step it has."""

    def __init__(self, folder: str):
        self.folder = os.path.abspath(folder)
        self.facts = jsons.read_json(os.path.join(self.folder, "config.json"))

    def choose(self, which: str) -> int:
        return self.facts["step"]

    def has(self, step: int) -> bool:
        return True

    def meta(self, step: int) -> dict:
        return self.facts["fingerprints"]

    def params(self, step: int, abstract_params: Tree, ema: bool) -> Tree:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(os.path.join(self.folder, "params"), abstract_params)

    def close(self) -> None:
        pass


def checkpoints_of(workdir: str) -> Checkpoints | Exported:
    """The checkpoints of a run, or the one step of an export or import."""
    return Exported(workdir) if os.path.isdir(os.path.join(workdir, "params")) else Checkpoints(workdir, read_only=True)


def _read_damaged(path: str) -> None:
    try:
        jsons.read_json(path)
    except ValueError as error:
        raise DamagedCheckpoint(f"{os.path.dirname(path).removesuffix('/metrics')}: a damaged checkpoint; {_BACK} "
                                f"({error})") from None


def _score(metrics: dict[str, float]) -> float:
    return metrics.get("nelbo", float("inf"))


def checksums(tree: Tree) -> dict[str, int]:
    """Of every array by its path: the bits of its numbers (of at most 32 bits), each times the odd number 2 place + 1,
    summed modulo 2^32.

    Any change of a single number shows. The same whatever devices the arrays are divided over.
    """
    return {jax.tree_util.keystr(path, simple=True, separator="."): int(value)
            for path, value in jax.tree_util.tree_leaves_with_path(jax.device_get(_sums(tree)))}


@jax.jit
def _sums(tree: Tree) -> Tree:
    def of(a: jax.Array) -> jax.Array:
        bits = a if a.dtype == bool else jax.lax.bitcast_convert_type(a, f"uint{8 * a.dtype.itemsize}")
        place = jnp.uint32(0)
        for axis, size in enumerate(a.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, a.shape, axis)
        return jnp.sum(bits.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)

    return jax.tree.map(of, tree)


def save_params(path: str, tree: Tree) -> None:
    """A tree of numpy arrays as a folder of Orbax's; process 0 alone calls it."""
    alone = ocp.options.MultiprocessingOptions(active_processes={0}, barrier_sync_key_prefix="export")
    with ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
        checkpointer.save(os.path.abspath(path), tree)
