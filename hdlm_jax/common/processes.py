"""The processes of one run on several machines: who writes files, and what the others wait for."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from hdlm_jax.common import jsons

T = TypeVar("T")
_WEEK_MS = 7 * 24 * 3600 * 1000


def join() -> None:
    """Joins the other processes of this run: found by JAX on TPU pods, Slurm, Kubernetes and under MPI; elsewhere told
    by JAX_COORDINATOR_ADDRESS (host:port of process 0), HDLM_NUM_PROCESSES and HDLM_PROCESS_ID."""
    given = {name: os.environ.get(f"HDLM_{name.upper()}") for name in ("num_processes", "process_id")}
    try:
        known: dict[str, Any] = {name: int(value) for name, value in given.items() if value}
    except ValueError:
        raise ValueError(f"HDLM_NUM_PROCESSES and HDLM_PROCESS_ID must be numbers, not {given}") from None
    if len(known) == 1:
        raise ValueError(f"HDLM_NUM_PROCESSES and HDLM_PROCESS_ID go together; only {next(iter(known))} is given")
    if known:  # else JAX, inside a Slurm job, would still give each process a single GPU
        known["cluster_detection_method"] = "deactivate"
    try:
        jax.distributed.initialize(**known, shutdown_timeout_seconds=30)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"--distributed: the other processes cannot be joined ({error})") from error


def is_main_process() -> bool:
    """Whether this is the process that writes files and speaks."""
    return jax.process_index() == 0


_turns = iter(range(sys.maxsize))


def on_main_process(make: Callable[[], T]) -> T:
    """make() in process 0 alone; all processes get its (JSON-able) value, or fail with its error.

    The others wait at the coordinator, not in a collective: it may take days.
    """
    if jax.process_count() == 1:
        return make()
    from jax._src.distributed import global_state  # no public name; Orbax waits by the same client

    client: Any = global_state.client
    key = f"hdlm_jax/first/{next(_turns)}"
    if not is_main_process():
        value, failed = json.loads(client.blocking_key_value_get(key, _WEEK_MS))
        if failed:
            raise ValueError(f"process 0: {failed}")
        return value
    try:
        value, failed, error = make(), "", None
    except Exception as caught:  # whatever it is, nobody must wait for what never comes
        value, failed, error = None, str(caught) or type(caught).__name__, caught
    client.key_value_set(key, jsons.dumps([value, failed]))
    if error:
        raise error
    return value


def to_host(array: jax.Array) -> np.ndarray:
    """The whole of an array that may lie in pieces on many processes; all of them have to ask for it."""
    if jax.process_count() == 1:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def largest(numbers: np.ndarray) -> np.ndarray:
    """Of each number (int64) the largest that a process has; all of them have to ask for it."""
    if jax.process_count() == 1:
        return numbers
    halves = multihost_utils.process_allgather(numbers.view(np.uint32))  # JAX itself has no 64 bits
    return np.asarray(halves).view(np.int64).max(0)
