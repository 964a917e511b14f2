"""Checkpoints: the best and the two latest kept, written aside and renamed, with everything a resume needs."""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from hdlm_jax.common import jsons, processes
from hdlm_jax.common.console import say
from hdlm_jax.common.parallel import Tree
from hdlm_jax.training.param_file import PARAMS, read_params
from hdlm_jax.training.state import TrainState

T = TypeVar("T")
_TRASH, _UNWRITTEN = "trash", "a checkpoint cannot be written"
_BACK = ("--mode=train goes on from the one before, where there is one; for anything else remove its folder to go back "
         "to the one before")
_FINGERPRINTS = ("tokenizer", "hierarchy", "data")  # in the meta of every checkpoint


class _Manager(ocp.CheckpointManager):
    """Asks nobody whether it is time to leave: train does, and the answer must not depend on who else has asked."""

    def reached_preemption(self, step: int) -> bool:
        return False


class DamagedCheckpoint(OSError):
    """A checkpoint that is not what was saved; never one that the disk or the memory keeps from being read.

    found: what is wrong with which, without what to do.
    """

    def __init__(self, found: str, remedy: str = _BACK):
        super().__init__(f"{found}; {remedy}")
        self.found = found


class Checkpoints:
    """Orbax checkpoints under <workdir>/checkpoints: state and EMA as arrays, meta as JSON.

    meta holds the config, the fingerprints of tokenizer and hierarchy, the data position, and `checksums` of all
    arrays, which are compared whenever they are read (checkpoints from before have none).
    """

    def __init__(self, workdir: str, read_only: bool = False):
        self.path, self._read_only = os.path.abspath(os.path.join(workdir, "checkpoints")), read_only
        if read_only and not os.path.isdir(self.path):
            raise FileNotFoundError(f"{self.path}: no checkpoint there; train first (--mode=train)")
        if not read_only:
            self._sweep("*.orbax-checkpoint-tmp*")  # what a kill left unfinished

    @functools.cached_property
    def manager(self) -> _Manager:
        """Of all checkpoints; of many processes each has to ask for it. DamagedCheckpoint: what one says of itself."""
        managers, read_only = ocp.checkpoint_managers, self._read_only
        best = managers.BestN(get_metric_fn=_score, reverse=True, n=1)
        # put aside by a rename before it is deleted: a kill leaves no half of a checkpoint among the others
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy([managers.LatestN(2), best]), best_fn=_score,
            best_mode="min", create=not read_only, read_only=read_only, save_interval_steps=0 if read_only else 1,
            todelete_subdir=None if read_only else _TRASH)
        try:
            return _Manager(self.path, options=options)
        except Exception as error:  # it reads what each checkpoint says of itself
            for step in self.steps():
                self._read_records(step)
            raise OSError(f"{self.path}: cannot be read ({type(error).__name__}: {error})") from error

    def steps(self) -> list[int]:
        """Steps of all checkpoints, ascending: whole ones and damaged ones."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(int(name) for name in os.listdir(self.path) if name.isdigit() and self.has(int(name)))
        return []

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def set_aside(self, damaged: dict[int, str], start: int) -> None:
        """Renames what training must not go on from (step: what was found) to damaged-<step>, and says so.

        So it does with checkpoints whose records are damaged, as no best one can be told with them.
        """
        def rename() -> None:
            found = dict(damaged)
            for step in set(self.steps()) - {start, *damaged}:
                try:
                    self._read_records(step)
                except DamagedCheckpoint as error:
                    found[step] = error.found
            for step, what in sorted(found.items()):
                name, taken = f"damaged-{step}", 1
                while os.path.lexists(os.path.join(self.path, name)):
                    name, taken = f"damaged-{step}-{taken}", taken + 1
                os.rename(os.path.join(self.path, str(step)), os.path.join(self.path, name))
                say(f"train: {what}; put aside as {name}, going on from step {start:,}")

        processes.on_main_process(rename)

    def choose(self, which: str) -> int:
        """Step of the 'best' (lowest validation NELBO or own loss, or highest reward) or 'latest' checkpoint."""
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

        metrics: nelbo on validation text, reward or loss tells the best checkpoint; one that is not finite is none.
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
        with self._told():
            self.manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def _sweep(self, *more: str) -> None:
        """Deletes what Orbax has put aside (nothing is being put there now), and more by its name."""
        if jax.process_index() == 0:
            for pattern in (_TRASH, *more):
                for path in glob.glob(os.path.join(glob.escape(self.path), pattern)):
                    shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Whatever goes wrong in writing as one line that says what is still there."""
        try:
            yield
        except Exception as error:  # storage libraries have errors of their own
            raise OSError(f"{self.path}: {_UNWRITTEN}: {_short(error)}; {self._rest()}") from error

    def _rest(self) -> str:
        return f"steps {whole} are there" if (whole := self.steps()) else "there is no other"

    def _agreed(self, step: int, read: Callable[[], T]) -> T:
        """read() in every process, without waiting for each other; if one of them fails, so do all, in the same way.

        Raises:
          DamagedCheckpoint: the files can be read, but do not hold a checkpoint. OSError: anything else.
        """
        found, error, bad = None, None, 0
        try:
            found = read()
        except Exception as caught:  # storage libraries have errors of their own
            error, bad = caught, 1 if self._is_damage(step, caught) else 2
        worst = int(processes.largest(np.array([bad]))[0])
        if not worst:
            return found  # type: ignore[return-value]
        reason = _short(error) if error else "another process cannot read it"
        what = f"{self.path}: checkpoint of step {step} cannot be read"
        if worst == 1:
            raise DamagedCheckpoint(f"{what} (damaged?): {reason}", f"{_BACK}; {self._rest()}") from error
        raise OSError(f"{what}: {reason}; {self._rest()}") from error

    def _is_damage(self, step: int, error: Exception) -> bool:
        """Whether it is for what the files hold, not for disk, rights or memory: all can be read to their end."""
        first = _first(error)
        if isinstance(first, MemoryError) or getattr(first, "errno", None) not in (None, errno.ENOENT):
            return False
        if re.search(r"RESOURCE_EXHAUSTED|os_error_code='(?!2')", str(first)):  # of TensorStore; 2 is ENOENT too
            return False

        def fail(unread: OSError) -> None:
            raise unread

        try:
            for folder, _, names in os.walk(os.path.join(self.path, str(step)), onerror=fail):
                for name in names:
                    with open(os.path.join(folder, name), "rb") as file:
                        while file.read(1 << 24):
                            pass
        except OSError:
            return False
        return True

    def _read(self, step: int, **items: Any) -> Any:
        """Items as this process sees them, none waiting for another, which may have failed."""
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me},
                                                   barrier_sync_key_prefix=f"read{me}")
        handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=alone))
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            return reader.restore(os.path.join(self.path, str(step)), args=ocp.args.Composite(**items))

    def _read_records(self, step: int) -> None:
        """DamagedCheckpoint if what Orbax keeps beside the arrays cannot be read as JSON."""
        for name in ("_CHECKPOINT_METADATA", "metrics/metrics"):
            try:
                jsons.read_json(os.path.join(self.path, str(step), name), optional=True)
            except ValueError as error:
                raise DamagedCheckpoint(f"{self.path}/{step}: a damaged checkpoint ({error})") from None

    def _restore(self, step: int, **items: Any) -> Any:
        found = self._agreed(step, lambda: self._read(step, **items))
        saved = self.meta(step).get("checksums", {})
        here = checksums({name: found[name] for name in items}) if saved else {}
        if wrong := [name for name, value in here.items() if saved.get(name, value) != value]:
            raise DamagedCheckpoint(f"{self.path}: checkpoint of step {step} is damaged, {len(wrong)} arrays are not "
                                    f"what was saved ({wrong[0]}, ...)")
        return found

    def meta(self, step: int) -> dict[str, Any]:
        def read() -> dict[str, Any]:
            found = self._read(step, meta=ocp.args.JsonRestore())["meta"]
            known = isinstance(found, dict) and isinstance(found.get("checksums", {}), dict)
            if not known or not all(isinstance(found.get(name), str) for name in _FINGERPRINTS):
                raise ValueError(f"its meta lacks checksums or fingerprints of {', '.join(_FINGERPRINTS)}")
            self._read_records(step)
            return found

        return self._agreed(step, read)

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
        with self._told():
            self.manager.wait_until_finished()

    def close(self) -> None:
        with self._told():
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
        if os.path.exists(file := os.path.join(self.folder, "params", PARAMS)):
            return read_params(file, abstract_params)
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(os.path.join(self.folder, "params"), abstract_params)

    def close(self) -> None:
        pass


def checkpoints_of(workdir: str) -> Checkpoints | Exported:
    """The checkpoints of a run, or the one step of an export or import."""
    return Exported(workdir) if os.path.isdir(os.path.join(workdir, "params")) else Checkpoints(workdir, read_only=True)


def _first(error: BaseException) -> BaseException:
    """What Orbax's error about an array was raised from."""
    return error.__cause__ if error.__cause__ and "TensorStore details" in str(error) else error


def _short(error: BaseException) -> str:
    error = _first(error)
    reason = re.sub(r" \[tensorstore_spec.*", "", " ".join(str(error).split())) or type(error).__name__
    return reason if len(reason) < 600 else f"{reason[:200]} ... {reason[-300:]}"


def _score(metrics: dict[str, float]) -> float:
    """What the best checkpoint has least of: reward, taken off, or a loss of its own, where there is one, or NELBO."""
    return -metrics["reward"] if "reward" in metrics else metrics.get("loss", metrics.get("nelbo", float("inf")))


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
