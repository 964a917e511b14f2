"""A batch whose texts come and go between calls: what serves requests (docs/serving.md).

The rows of the loop have their own keys, plans and counts of calls and do not see each other, so a row may begin while
others are half written, and what it becomes is what it would have become in any other batch.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hdlm_jax.common import parallel
from hdlm_jax.common.parallel import Batch, Tree
from hdlm_jax.config import GenerateConfig
from hdlm_jax.decoding import loop
from hdlm_jax.decoding.canvas import Canvas
from hdlm_jax.decoding.sampler import Program, Sampler, at_sampling, call_of, key_data, loop_of, rows_of, tools_of
from hdlm_jax.diffusion.draws import fold
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess


class Text(NamedTuple):
    """A text to write: a row of a canvas, z int32 [S], given bool [S], kind int32 [S] and length, what names its
    random numbers (the seed, and its number among those of that seed), and features float32 [P, F] in front of it."""

    z: np.ndarray
    given: np.ndarray
    kind: np.ndarray
    length: int
    number: int
    seed: int
    features: np.ndarray | None = None


class Seen(NamedTuple):
    """Of every slot after some calls: z int32 [B, S], sure float32 [B, S], length, call int32 [B], t float32 [B] and
    busy bool [B], whether it has anything left to write."""

    z: np.ndarray
    sure: np.ndarray
    length: np.ndarray
    call: np.ndarray
    t: np.ndarray
    busy: np.ndarray


def texts_of(draw: Sampler, canvas: np.ndarray | Canvas, g: GenerateConfig) -> list[Text]:
    """The texts of a canvas; what `draw(canvas, g)` gives is what they become."""
    rows = rows_of(canvas, g)
    z = rows["z"]
    given, kind = rows.get("given", draw.process.hierarchy.level_of(z) == 0), rows.get("kind", np.zeros_like(z))
    features = rows.get("features", [None] * len(z))
    return [Text(*row, number, g.seed, features[number])
            for number, row in enumerate(zip(z, given, kind, rows["length"], strict=True))]


def kind_of(draw: Sampler, canvas: np.ndarray | Canvas, g: GenerateConfig) -> tuple[Hashable, ...]:
    """Texts of one kind can share slots: one program, one set of numbers, one width.

    Raises:
      ConfigError: this run, or this canvas, cannot be sampled so.
    """
    program, numbers = draw.prepare(canvas, g)
    allowed = hashlib.sha256(numbers["allowed"]).hexdigest() if program.constrained else ""
    grows = program.method.policy.lengths is not None  # else each row ends where it ends
    of_method = {k: v.item() for k, v in numbers["method"].items() if grows or k != "maximum"}
    return (program, rows_of(canvas, g)["z"].shape[1], allowed, g.temperature, g.top_p, *sorted(of_method.items()))


def _steps(draw: Sampler, program: Program, sure: bool) -> tuple[Callable[..., Tree], Callable[..., Tree]]:
    """(start, advance), not compiled; what they hold is (cache, state), the rows in front of every array."""
    shard = parallel.OverBatch(draw.mesh)
    process = at_sampling(draw.process, program)
    helper = tools_of(draw.helper, program.method, draw.process)

    def parts(given: Tree, batch: Batch) -> tuple[loop.Loop, dict[str, Any]]:
        how = loop.Sampling(sync_trip_count=shard.sync_trip_count, sure=sure)
        call = call_of(draw.network, process, program, given, batch, how, helper, draw.classifier)
        return loop_of(cast(HierarchicalProcess, process.with_params(call.params)), batch["z"], call)

    def turned(cache: Tree, axis: int, to: int) -> Tree:
        return jax.tree.map(lambda a: jnp.moveaxis(a, axis, to), cache)

    def start(given: Tree, batch: Batch) -> tuple[tuple[()], Tree]:
        found, rows = parts(given, batch)
        keys = fold(fold(jax.random.wrap_key_data(batch["key"]), batch["number"]), 1)
        cache, state = found.begin(keys, batch["z"], **rows)
        return (), (turned(cache, 1, 0), state)

    def advance(given: Tree, held: Tree) -> tuple[tuple[()], Tree]:
        (given, most), (cache, s) = given, held
        found, _ = parts(given, {"z": s.z, "given": s.given, "length": s.length, **s.extra})
        cache, s, _ = found.run(turned(cache, 0, 1), s, most)
        view, busy = found.view(s), found.unfinished(s, found.limit(s))
        seen = {"z": s.z, "sure": s.sure, "length": s.length, "call": s.call, "t": view.t, "busy": busy}
        return (), ((turned(cache, 1, 0), s), seen)

    return (lambda given, batch: (shard(start)(given, batch)[1], ())), (
        lambda given, held: shard(advance)(given, held)[1])


@functools.lru_cache(maxsize=16)
def _compiled(draw: Sampler, program: Program, sure: bool) -> tuple[parallel.Jitted, parallel.Jitted]:
    start, advance = _steps(draw, program, sure)
    return (parallel.compile_row_step(start, draw.mesh, keeps=True), parallel.compile_row_step(advance, draw.mesh))


@functools.cache
def _merge(mesh: Mesh) -> parallel.Jitted:
    def merge(_: tuple[()], old: Tree, new: Tree, fresh: jax.Array) -> tuple[Tree, tuple[()]]:
        return jax.tree.map(lambda a, b: jnp.where(loop.spread(fresh, a), b, a), old, new), ()

    return parallel.compile_row_step(merge, mesh)


class Slots:
    """`rows` places in which texts of one kind are written.

    Args:
      draw: the run's sampler; g, canvas: of one of the texts (see `kind_of`); its programs are compiled here.
      sure: Seen.sure is wanted.
    """

    def __init__(self, draw: Sampler, g: GenerateConfig, canvas: np.ndarray | Canvas, rows: int, sure: bool = False):
        program, numbers = draw.prepare(canvas, g)
        if program.constrained:  # a power of two of kinds, so that few programs do
            allowed = numbers["allowed"]
            more = parallel.bucket(len(allowed), 1 << 30) - len(allowed)
            numbers["allowed"] = np.concatenate([allowed, np.ones((more, allowed.shape[1]), bool)])
        else:
            numbers.pop("allowed", None)
        self.revises = program.method.policy.revise is not None or program.method.policy.lengths is not None
        self.rows, first = rows, rows_of(canvas, g)
        self.places, self._features = first["z"].shape[1], first["features"][0] if "features" in first else None
        self._mesh, self._given = draw.mesh, (draw.params_of(program.method), numbers)
        self._start, self._advance = _compiled(draw, program, sure)
        self._held = self._begun({})
        self.put({0: None})
        self.advance(0)

    def _begun(self, texts: Mapping[int, Text | None]) -> Tree:
        """What slots hold that begin with these texts; the others have nothing to do."""
        shape = self.rows, self.places
        batch = {"z": np.zeros(shape, np.int32), "given": np.ones(shape, bool), "kind": np.zeros(shape, np.int32),
                 "length": np.full(self.rows, self.places, np.int32), "number": np.zeros(self.rows, np.int32),
                 "key": np.stack([key_data(0)] * self.rows)}
        if self._features is not None:
            batch["features"] = np.zeros((self.rows, *self._features.shape), np.float32)
        for slot, text in texts.items():
            if text is not None:
                row = {**text._asdict(), "key": key_data(text.seed)}
                for name, values in batch.items():
                    values[slot] = row[name]
        return self._start(self._given, parallel.put_batch(self._mesh, batch))[0]

    def put(self, texts: Mapping[int, Text | None]) -> None:
        """Begins these texts in their slots, whatever is there; None frees one."""
        fresh = np.isin(np.arange(self.rows), list(texts))
        self._held = _merge(self._mesh)((), self._held, self._begun(texts), fresh)[0]

    def advance(self, calls: int) -> Seen:
        """At most so many calls of every slot that has something to write."""
        self._held, seen = self._advance((self._given, np.int32(calls)), self._held)
        return Seen(**{name: np.asarray(a) for name, a in seen.items()})
