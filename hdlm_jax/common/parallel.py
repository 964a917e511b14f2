"""Devices: the mesh, where arrays live, and the one place that compiles a step.

Steps are pure functions of global arrays; data, FSDP and tensor parallelism are a config line (config.parallel).
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import math
import operator
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hdlm_jax.common.console import compiling, progress
from hdlm_jax.config import Config, ConfigError

Tree: TypeAlias = Any  # a pytree of arrays: parameters, a state, a batch
Rows: TypeAlias = Mapping[str, np.ndarray]  # a batch on this host: arrays by name, rows in front
Batch: TypeAlias = dict[str, jax.Array]
Jitted: TypeAlias = jax.stages.Wrapped
Compiled: TypeAlias = jax.stages.Compiled

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def made_for(mesh: Mesh) -> Iterator[None]:
    """What is traced inside is a program for this mesh, wherever we are."""
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def platform() -> str:
    """What programs are made for: "cpu", "gpu" or "tpu"; where this process computes, unless `made_for` tells."""
    mesh = _mesh.get()
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh ('data', 'fsdp', 'tensor') over all devices (or those given); ConfigError if the shape does not fit.

    Of several slices of TPUs, which a slower network joins, the data axis alone goes from one to another.
    """
    devices = jax.devices() if devices is None else devices
    shape = config.parallel.shape(len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        if shape[0] % slices:
            raise ConfigError(f"parallel.data={shape[0]}: must be a multiple of the {slices} slices, as only this axis "
                              "may go from one to another")
        inside = (shape[0] // slices, *shape[1:])
        placed = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices)
        return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * 3)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_shards(mesh: Mesh) -> int:
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def state_shardings(mesh: Mesh, abstract_state: Tree, tensor_axes: Mapping[str, int]) -> Tree:
    """NamedSharding for every leaf: tensor by the layer's name, FSDP on the largest axis that divides.

    tensor_axes: by the layers' names the axis of their weights, from the last, that the tensor axis splits.
    """

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        spec: list[str | None] = [None] * len(leaf.shape)
        names = [str(getattr(p, "key", getattr(p, "name", ""))) for p in path]
        axis = next((tensor_axes[n] for n in reversed(names) if n in tensor_axes), None)
        if axis is not None and len(spec) >= -axis and leaf.shape[axis] % mesh.shape["tensor"] == 0:
            if mesh.shape["tensor"] > 1 and "bias" not in names:
                spec[axis] = "tensor"
        free = [i for i, n in enumerate(leaf.shape) if spec[i] is None and n % mesh.shape["fsdp"] == 0]
        if mesh.shape["fsdp"] > 1 and free and leaf.ndim >= 2:
            spec[max(free, key=lambda i: leaf.shape[i])] = "fsdp"
        return NamedSharding(mesh, P(*spec))

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def put_batch(mesh: Mesh, batch: Rows) -> Batch:
    """This process's contiguous rows of each array -> global arrays sharded over the batch axes."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


class OverBatch:
    """What runs a function of rows on every batch shard's own rows (a `shard_map` over the batch axes alone).

    Without a mesh, or with one shard, all rows are here and nothing is divided.

    shard(run)(params, *rows): run(params, *rows) -> (sums, rows), trees of arrays. params come whole (but for the
    tensor axis), rows are divided; sums are summed over the shards, rows stay where they are.
    """

    def __init__(self, mesh: Mesh | None = None):
        self.mesh = mesh if mesh is not None and batch_shards(mesh) > 1 else None

    def sync_trip_count(self, count: jax.Array) -> jax.Array:
        """Inside `run`: how often a loop that one shard needs `count` times has to be gone through.

        With a tensor axis by all shards alike: the exchanges over it inside the loop wait for every device.
        """
        alone = self.mesh is None or self.mesh.shape["tensor"] == 1
        return count if alone else jax.lax.pmax(count, BATCH)

    def __call__(self, run: Callable[..., tuple[Tree, Tree]]) -> Callable[..., tuple[Tree, Tree]]:
        mesh = self.mesh
        if mesh is None:
            return run

        def local(params: Tree, *rows: Tree) -> tuple[Tree, Tree]:
            sums, rows = run(params, *rows)
            return jax.lax.psum(sums, BATCH), rows

        def whole(rows: Tree) -> Tree:
            # along the tensor axis: else how `run` splits its products would be spread over all that made the rows
            return jax.lax.with_sharding_constraint(rows, batch_sharding(mesh))

        def call(params: Tree, *rows: Tree) -> tuple[Tree, Tree]:
            over = jax.shard_map(local, mesh=mesh, in_specs=(P(), *(P(BATCH) for _ in rows)),
                                 out_specs=(P(), P(BATCH)), axis_names=set(BATCH), check_vma=False)
            sums, rows = over(params, *whole(rows))
            return sums, whole(rows)

        return call


WHOLE = OverBatch()


def split_heads(run: Callable[..., jax.Array], heads: Sequence[jax.Array], rows: Sequence[jax.Array] = (),
                whole: Sequence[jax.Array] = ()) -> jax.Array:
    """run(*heads, *rows, *whole) on every device of `made_for`'s mesh: kernels are not split by the compiler.

    Nor does it take one where an axis, if only of one device, is left for it to split.

    heads: [B, S, H, n], as is the result: rows divided over the batch axes, heads over the tensor axis, where they
    divide. rows: [B, ...]. whole: not divided.
    """
    mesh, context = _mesh.get(), jax.sharding.get_abstract_mesh()
    free = [axis for axis in AXES if axis not in context.manual_axes]
    if mesh is None or math.prod(mesh.shape.values()) == 1 or not free:
        return run(*heads, *rows, *whole)
    b, _, h, _ = heads[0].shape
    batch = tuple(axis for axis in BATCH if axis in free)
    split = P(batch if batch and b % batch_shards(mesh) == 0 else None)
    parts = P(split[0], None, "tensor" if h % mesh.shape["tensor"] == 0 else None)
    over = jax.shard_map(run, mesh=context if context.manual_axes else mesh, out_specs=parts, axis_names=set(free),
                         in_specs=(*(parts for _ in heads), *(split for _ in rows), *(P() for _ in whole)),
                         check_vma=False)
    return over(*heads, *rows, *whole)


def whole(tree: Tree) -> Tree:
    """The same arrays, all of each on every device of `made_for`'s mesh."""
    mesh = _mesh.get()
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, replicated(mesh))


def _for(mesh: Mesh, step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(step)
    def made(*args: Any) -> Any:
        with made_for(mesh):
            return step(*args)

    return made


def compile_step(step: Callable[..., Any], mesh: Mesh, shardings: Tree) -> Jitted:
    """jit of step(state, batch, key) -> (state, metrics): state stays where it is and is donated."""
    return jax.jit(_for(mesh, step), in_shardings=(shardings, batch_sharding(mesh), replicated(mesh)),
                   out_shardings=(shardings, replicated(mesh)), donate_argnums=0)


def compile_ahead(jitted: Jitted, *args: Any) -> Compiled:
    """Compiles for arguments of these shapes and places, and gives back what memory that took."""
    compiled = jitted.lower(*args).compile()
    trim_memory()
    return compiled


def keep_compiled() -> None:
    """Keeps compiled programs between runs: in $JAX_COMPILATION_CACHE_DIR, else a folder in the user's cache.

    JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    if not getattr(jax.config, "jax_compilation_cache_dir"):  # noqa: B009  (mypy does not know the name)
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "hdlm_jax", "compiled"))


def free_memory() -> int:
    """Bytes that a device here has left, the least of all processes; 0 where it does not tell (CPU)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    if jax.process_count() > 1:  # all processes must run the same program
        free = int(multihost_utils.process_allgather(np.asarray(free // 2**20)).min()) * 2**20
    return free


def out_of_memory(error: Exception) -> str:
    """What a device or its compiler says where there is not enough memory, in a line; "" for any other error."""
    text = " ".join(str(error).split())
    return text[:300] if "RESOURCE_EXHAUSTED" in text else ""


def fitting(jitted: Jitted, params: Tree, make_batch: Callable[[int], Tree], rows: int, shards: int, key: jax.Array
            ) -> tuple[Compiled, int]:
    """(compiled, rows): jitted(params, make_batch(rows), key) for as many rows as fit into a device's free memory.

    Halves `rows`, which stay a multiple of shards; where the device does not tell its memory (CPU) they stay.
    """
    free = free_memory()
    rows = -(-rows // shards) * shards
    while True:
        try:
            compiled = compile_ahead(jitted, params, make_batch(rows), key)
            memory = compiled.memory_analysis()
            if free <= 0 or rows <= shards or memory is None or memory.temp_size_in_bytes < 0.9 * free:
                return compiled, rows
        except jax.errors.JaxRuntimeError as error:  # some compilers refuse what does not fit
            if not out_of_memory(error) or rows <= shards:
                raise
        rows = max(shards, rows // 2 // shards * shards)


MEASURED_PRECISION = "highest"  # of matrix products, as jax.default_matmul_precision names it


class RowProgram:
    """step(params, batch, key) -> arrays with the rows of the batch in front, for any number of rows.

    What it gives are measurements, so float32 products are float32: by default a TPU would multiply in bfloat16 and a
    GPU in TF32 (MEASURED_PRECISION).

    Compiled once for each size; rows are padded to it, divided over the devices, and gathered to every host.
    """

    def __init__(self, step: Callable[[Tree, Batch, jax.Array], Tree], mesh: Mesh, params: Tree):
        where = jax.tree.map(lambda a: a.sharding, params)
        self.mesh, self._shards = mesh, math.lcm(batch_shards(mesh), jax.process_count())

        def precise(params: Tree, batch: Batch, key: jax.Array) -> Tree:
            with jax.default_matmul_precision(MEASURED_PRECISION):
                return step(params, batch, key)

        self._jitted = jax.jit(_for(mesh, precise), in_shardings=(where, batch_sharding(mesh), replicated(mesh)),
                               out_shardings=replicated(mesh))
        self._compiled: dict[tuple[Any, ...], tuple[Compiled, int]] = {}

    def _put(self, batch: Rows, rows: int) -> Batch:
        """A host's batch, filled up with zeros to so many rows."""
        mine = local_rows(rows)
        return put_batch(self.mesh, {k: v[mine] for k, v in pad_rows(batch, rows).items()})

    def __call__(self, params: Tree, n: int, make: Callable[[np.ndarray], Rows], most: int, key: jax.Array, *,
                 unit: str, name: str) -> Iterator[tuple[np.ndarray, Tree]]:
        """(numbers of rows, what the step gives for them) of rows 0..n-1, at most so many at a time, or what fits.

        make: numbers of rows -> their batch; unit, name: of the progress bar.
        """
        example, asked = make(np.arange(1)), bucket(n, most)
        size = (asked, *(v.shape[1:] for v in example.values()))
        if size not in self._compiled:
            with contextlib.nullcontext() if self._compiled else compiling(name):  # once is enough to be told
                self._compiled[size] = fitting(self._jitted, params, functools.partial(self._put, example), asked,
                                               self._shards, key)
        step, at_once = self._compiled[size]
        with progress(n, unit=unit, name=name) as bar:
            for start in range(0, n, at_once):
                rows = np.arange(start, min(start + at_once, n))
                found = jax.tree.map(np.asarray, step(params, self._put(make(rows), at_once), key))
                yield rows, jax.tree.map(operator.itemgetter(slice(len(rows))), found)
                bar.update(len(rows))


def compile_sample_step(step: Callable[..., Any], mesh: Mesh, params: Tree) -> Jitted:
    """jit of step((params, numbers), batch, key) -> arrays with the batch in front, gathered to every host.

    numbers: a dictionary of host scalars.
    """
    where = jax.tree.map(lambda a: a.sharding, params)
    return jax.jit(_for(mesh, step), in_shardings=((where, replicated(mesh)), batch_sharding(mesh), replicated(mesh)),
                   out_shardings=replicated(mesh))


def compile_row_step(step: Callable[..., Any], mesh: Mesh, keeps: bool = False) -> Jitted:
    """jit of step(given, *trees of rows) -> (rows, arrays): rows stay divided over the devices, arrays are gathered.

    keeps: the first tree of rows may be needed afterwards; else its memory is used again.
    """
    return jax.jit(_for(mesh, step), out_shardings=(batch_sharding(mesh), replicated(mesh)),
                   donate_argnums=() if keeps else 1)


def trim_memory() -> None:
    """Gives back to the system what compiling has freed (some hundred MiB that glibc would keep)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def bucket(n: int, most: int) -> int:
    """The next power of two, at most `most`: so that ten sizes are not ten programs."""
    return min(1 << (n - 1).bit_length(), most)


def local_rows(rows: int) -> slice:
    """The contiguous part of so many global rows that this process feeds."""
    n, me = jax.process_count(), jax.process_index()
    if rows % n:
        raise ValueError(f"{rows} rows do not divide over {n} processes")
    return slice(me * rows // n, (me + 1) * rows // n)


def pad_rows(batch: Rows, rows: int) -> dict[str, np.ndarray]:
    """Host arrays padded with zeros to so many rows."""
    return {k: np.concatenate([v, np.zeros((rows - len(v), *v.shape[1:]), v.dtype)]) for k, v in batch.items()}
