"""What a training step keeps for its backward pass, chosen by what the compiler says it needs (model.remat=auto)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from hdlm_jax.common import parallel
from hdlm_jax.common.parallel import Compiled
from hdlm_jax.config import Config, ConfigError

SHARE = 0.95  # of a device's memory that a step may take
HELP = ("give parallel.fsdp more devices, raise train.microbatches, set model.remat=all, or lower train.batch_size or "
        "model.seq_len")


class TooLarge(ConfigError):
    """A training step fits in no way; what each needs."""


class Fitted(NamedTuple):
    """A step that fits: how it is computed (model.remat, train.microbatches), the program, its bytes, and why it."""

    config: Config
    compiled: Compiled
    bytes: int
    why: str


def ways(config: Config, shards: int) -> Iterator[Config]:
    """Ways to compute a step, those that keep most first; a single one unless model.remat=auto.

    shards: batch shards of the mesh. On CPU all but products is made anew, which is faster there.
    """
    if config.model.remat != "auto":
        yield config
        return
    remats = ("cheap",) if parallel.platform() == "cpu" else ("none", "cheap", "all")
    for remat in remats:
        yield dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
    parts = 2 * config.train.microbatches
    while parallel.platform() != "cpu" and config.train.batch_size % (shards * parts) == 0:
        yield dataclasses.replace(config, model=dataclasses.replace(config.model, remat="all"),
                                  train=dataclasses.replace(config.train, microbatches=parts))
        parts *= 2


def needed(compiled: Compiled) -> int:
    """Bytes of a device: arguments, temporaries, code, and what of the outputs does not take an argument's place."""
    m = compiled.memory_analysis()
    return 0 if m is None else (m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
                                + m.temp_size_in_bytes + m.generated_code_size_in_bytes)


def fit(config: Config, shards: int, compiled: Callable[[Config], Compiled], limit: int) -> Fitted:
    """The first of `ways` that fits into `limit` bytes of a device (0: not known, then the first).

    Raises:
      TooLarge: none does.
    """
    tried: list[str] = []
    for way in ways(config, shards):
        name = f"remat={way.model.remat}" + f", {way.train.microbatches} microbatches" * (way.train.microbatches > 1)
        try:
            program = compiled(way)
        except jax.errors.JaxRuntimeError as error:
            if not parallel.out_of_memory(error):
                raise
            tried.append(f"{name}: the compiler refuses it ({parallel.out_of_memory(error)})")
            continue
        size = needed(program)
        tried.append(f"{name}: {size / 2**30:.2f} GiB")
        if not limit or size < SHARE * limit:
            return Fitted(way, program, size, "; ".join(tried) + f", of {limit / 2**30:.2f}" * (limit > 0))
    room = f" into {limit / 2**30:.2f} GiB of" if limit else " on"
    raise TooLarge(f"a training step does not fit{room} a device ({'; '.join(tried)}); "
                   f"{HELP}")
