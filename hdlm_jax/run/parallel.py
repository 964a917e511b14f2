"""Devices: the mesh, where arrays live, and the one place that compiles a step.

Steps are pure functions of global arrays; data, FSDP and tensor parallelism are a config line (config.parallel).
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
# axis of a weight (from its last) that the tensor axis splits: outputs of the first product, inputs of the second
_TENSOR = {"qkv": -1, "up": -1, "out": -2, "down": -2, "embedding": -2, "head": -1}


def make_mesh(config, devices=None):
    """The mesh ('data', 'fsdp', 'tensor') over all devices (or those given); ConfigError if the shape does not fit."""
    devices = jax.devices() if devices is None else devices
    shape = config.parallel.shape(len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_shards(mesh) -> int:
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh) -> NamedSharding:
    return NamedSharding(mesh, P(BATCH))


def replicated(mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def state_shardings(mesh, abstract_state):
    """NamedSharding for every leaf: tensor by the layer's name, FSDP on the largest axis that divides."""

    def place(path, leaf):
        spec: list[str | None] = [None] * len(leaf.shape)
        names = [str(getattr(p, "key", getattr(p, "name", ""))) for p in path]
        axis = next((_TENSOR[n] for n in names if n in _TENSOR), None)
        if axis is not None and len(spec) >= -axis and leaf.shape[axis] % mesh.shape["tensor"] == 0:
            if mesh.shape["tensor"] > 1 and "bias" not in names:
                spec[axis] = "tensor"
        free = [i for i, n in enumerate(leaf.shape) if spec[i] is None and n % mesh.shape["fsdp"] == 0]
        if mesh.shape["fsdp"] > 1 and free and leaf.ndim >= 2:
            spec[max(free, key=lambda i: leaf.shape[i])] = "fsdp"
        return NamedSharding(mesh, P(*spec))

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def put_batch(mesh, batch):
    """This process's contiguous rows of each array -> global arrays sharded over the batch axes."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def compile_step(step, mesh, shardings):
    """jit of step(state, batch, key) -> (state, metrics): state stays where it is and is donated."""
    return jax.jit(step, in_shardings=(shardings, batch_sharding(mesh), replicated(mesh)),
                   out_shardings=(shardings, replicated(mesh)), donate_argnums=0)


def compile_batch_step(step, mesh, params):
    """jit of step(params, batch, key) -> arrays with the batch in front, gathered to every host."""
    where = jax.tree.map(lambda a: a.sharding, params)
    return jax.jit(step, in_shardings=(where, batch_sharding(mesh), replicated(mesh)), out_shardings=replicated(mesh))


def local_rows(rows: int) -> slice:
    """The contiguous part of so many global rows that this process feeds."""
    n, me = jax.process_count(), jax.process_index()
    if rows % n:
        raise ValueError(f"{rows} rows do not divide over {n} processes")
    return slice(me * rows // n, (me + 1) * rows // n)


def pad_rows(batch, rows: int):
    """Host arrays padded with zeros to so many rows."""
    return {k: np.concatenate([v, np.zeros((rows - len(v), *v.shape[1:]), v.dtype)]) for k, v in batch.items()}
