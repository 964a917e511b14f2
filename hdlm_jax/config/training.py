"""The sections optimizer, train, parallel and checkpoint."""

from __future__ import annotations

import dataclasses
import math

from hdlm_jax.config.rules import check_seed, choice, rule


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as published."""

    lr: float = 5e-4  # peak learning rate
    b1: float = 0.9  # AdamW
    b2: float = 0.99  # AdamW
    eps: float = 1e-9  # AdamW
    weight_decay: float = 0.02  # AdamW, of all parameters
    clip: float = 1.0  # global norm of the gradient
    warmup: int = 10_000  # steps
    schedule: str = "cosine"  # to final_lr x lr at the last step | constant
    final_lr: float = 0.1  # of schedule=cosine, as a share of lr
    ema: float = 0.0  # decay of the average of the weights that evaluation uses; 0: none

    def check(self) -> None:
        choice("optimizer.schedule", self.schedule, ("cosine", "constant"))
        rule(self.lr > 0, "optimizer.lr", self.lr, "must be positive")
        rule(self.clip > 0, "optimizer.clip", self.clip, "must be positive")
        rule(0 <= self.ema < 1, "optimizer.ema", self.ema, "must lie in [0, 1); 0 is off")
        rule(self.warmup >= 0, "optimizer.warmup", self.warmup, "must not be negative")
        for name in ("b1", "b2"):
            rule(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "must lie in [0, 1)")
        for name in ("eps", "weight_decay", "final_lr"):
            rule(getattr(self, name) >= 0, f"optimizer.{name}", getattr(self, name), "must not be negative")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = 500_000  # optimizer steps
    batch_size: int = 512  # sequences a step, over all devices
    microbatches: int = 1  # gradients are summed over as many parts of the batch
    seed: int = 0  # of weights, noise and order of the rows
    log_every: int = 100  # steps between records of metrics.jsonl
    nonfinite_limit: int = 10  # steps whose loss or gradient is not finite are skipped; stop after more than so many
    evaluate_every: int = 0  # steps between measurements on `evaluate.rows_in_training`; 0: at the end alone
    init_from: str = ""  # workdir of a run whose weights to start from

    def check(self) -> None:
        for name in ("steps", "batch_size", "microbatches", "log_every"):
            rule(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "must be at least 1")
        check_seed("train.seed", self.seed)
        rule(self.nonfinite_limit >= 0, "train.nonfinite_limit", self.nonfinite_limit, "must not be negative")
        rule(self.evaluate_every >= 0, "train.evaluate_every", self.evaluate_every, "must not be negative")
        rule(self.batch_size % self.microbatches == 0, "train.microbatches", self.microbatches,
              f"must divide train.batch_size={self.batch_size}")


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """Shape of the device mesh; one axis may be -1, all the devices that are left."""

    data: int = -1  # axis that splits batches, weights copied
    fsdp: int = 1  # axis that splits batches and weights
    tensor: int = 1  # axis that splits products

    def check(self) -> None:
        shape = (self.data, self.fsdp, self.tensor)
        rule(all(n == -1 or n >= 1 for n in shape) and shape.count(-1) <= 1, "parallel", shape,
              "axes must be at least 1, at most one of them -1 (all devices left)")

    def shape(self, devices: int) -> tuple[int, int, int]:
        """Sizes of (data, fsdp, tensor) on so many devices."""
        shape = [self.data, self.fsdp, self.tensor]
        given = math.prod(n for n in shape if n > 0)
        shape = [devices // given if n == -1 else n for n in shape]
        rule(math.prod(shape) == devices, "parallel", (self.data, self.fsdp, self.tensor),
              f"does not multiply to the {devices} devices at hand")
        return shape[0], shape[1], shape[2]


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = 5000  # steps; measured on validation text as well, which tells the best
    minutes: float = 10.0  # since the last one: saved as it is, nothing measured; 0: by steps alone

    def check(self) -> None:
        rule(self.every >= 1, "checkpoint.every", self.every, "must be at least 1")
        rule(self.minutes >= 0, "checkpoint.minutes", self.minutes, "must not be negative; 0 is by steps alone")
