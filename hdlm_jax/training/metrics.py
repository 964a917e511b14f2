"""What a training tells of its steps: lines of a log, metrics.jsonl, TensorBoard, Weights & Biases, curves."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from hdlm_jax.common import jsons
from hdlm_jax.common.console import lasts, readable, say
from hdlm_jax.common.extras import package
from hdlm_jax.config import Config, ConfigError

# bf16 matrix peak of one device, FLOP/s, by jax's device_kind (vendors' data sheets, dense)
PEAK_FLOPS = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v5p": 459e12,
    "TPU v6 lite": 918e12, "TPU v6e": 918e12, "NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak of a device by the longest name that its kind begins with; None where it is not known (CPUs)."""
    names = [n for n in PEAK_FLOPS if device_kind.startswith(n)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


class Writer(Protocol):
    """Where the records of a training go: step (an int), tokens, loss, nelbo, ...: numbers, None where unknown."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class MetricsFile:
    """metrics.jsonl: one JSON object a line, each step once, also after a resume.

    A file with damaged lines is kept beside it as metrics.damaged.jsonl; its other records count on.
    """

    def __init__(self, path: str, resume_step: int):
        records, damaged = jsons.read_lines(path, "step")
        if damaged:
            aside = path.removesuffix(".jsonl") + ".damaged.jsonl"
            shutil.copyfile(path, aside)
            say(f"{path}: {len(damaged)} of its lines cannot be read (the first, line {damaged[0]}); all others are "
                f"kept, and the file as it was in {aside}")
        kept = [r for r in records if r["step"] <= resume_step]
        jsons.write_lines(path, kept)
        self.path, self.file = path, open(path, "a")

    def write(self, record: Mapping[str, Any]) -> None:
        with jsons.named(self.path):
            self.file.write(jsons.dumps(record) + "\n")
            self.file.flush()

    def close(self) -> None:
        with jsons.named(self.path):
            self.file.close()


class TensorBoard:
    """The same numbers as scalars in <workdir>/tensorboard."""

    def __init__(self, workdir: str, resume_step: int, config: Config):
        self.board = _module("tensorboard").SummaryWriter(  # a file each, and what was behind the checkpoint is hidden
            os.path.join(workdir, "tensorboard"), purge_step=resume_step + 1, filename_suffix=f".{resume_step}")

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in _numbers(record).items():
            self.board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self.board.close()


class WeightsAndBiases:
    """The same numbers in a run of Weights & Biases, which goes on when the training does.

    Its files are in <workdir>/wandb. WANDB_MODE=offline sends nothing, WANDB_PROJECT and others are its own.
    """

    def __init__(self, workdir: str, resume_step: int, config: Config):
        wandb, place = _module("wandb"), os.path.abspath(workdir)
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "hdlm_jax"), name=os.path.basename(place), dir=place,
                id=hashlib.sha256(place.encode()).hexdigest()[:16], resume="allow",
                config=jsons.plain(config.as_dict()), settings=wandb.Settings(console="off", silent=True))
        except wandb.Error as error:
            raise ConfigError(f"train.writers='wandb': {error}; log in with `wandb login`, or set "
                              "WANDB_MODE=offline") from error

    def write(self, record: Mapping[str, Any]) -> None:
        self.run.log(_numbers(record), step=record["step"])

    def close(self) -> None:
        self.run.finish()


_MORE: dict[str, tuple[Callable[[str, int, Config], Writer], str]] = {  # what makes it, the package it needs
    "tensorboard": (TensorBoard, "tensorboardX"), "wandb": (WeightsAndBiases, "wandb")}


def _module(name: str) -> Any:
    return package(_MORE[name][1], name, f"train.writers={name!r}")


def _numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "step" and value is not None}


def check_writers(names: Sequence[str]) -> None:
    """ValueError where a package that these of train.writers need is not installed."""
    for name in names:
        _module(name)


def writers(workdir: str, resume_step: int, config: Config) -> list[Writer]:
    """metrics.jsonl, and what config.train.writers names beside it, of a training that goes on behind resume_step."""
    return [MetricsFile(os.path.join(workdir, "metrics.jsonl"), resume_step),
            *(_MORE[name][0](workdir, resume_step, config) for name in config.train.writers)]


def numbers_of(record: Mapping[str, Any]) -> str:
    """NELBO and weighted loss in nats a token, or reward, and tokens/s, MFU of a record, to read; what is not known is
    left out."""
    speed, mfu = record["tokens_per_s"], record["mfu"]
    told = f"NELBO {readable(record['nelbo'])}, weighted loss {readable(record['loss'])}"
    if record.get("reward") is not None:
        told = f"reward {readable(record['reward'])}, {100 * record['distinct']:.0f} % of the answers different"
    return told + (f", {speed:,.0f} tokens/s" if speed else "") + (f", MFU {100 * mfu:.1f} %" if mfu else "")


def line_of(record: Mapping[str, Any], steps: int, pace: float | None) -> str:
    """A record as a line of a log; pace: seconds a step, where they are known."""
    step = record["step"]
    left = f", {lasts((steps - step) * pace)} left" if pace else ""
    return f"step {step:,} of {steps:,} ({100 * step / steps:.0f} %): {numbers_of(record)}{left}"


def read_metrics(path: str) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl, whatever else there is in it; of no file none."""
    return jsons.read_lines(path, "step")[0]


def plot_curves(path: str, records: list[dict[str, Any]], unigram_nats: float) -> bool:
    """Loss and validation NELBO against tokens as a PNG; False (and a line saying so) without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        from matplotlib.ticker import EngFormatter
    except ImportError:
        say("curves: not drawn, matplotlib is missing (pip install hdlm_jax[plots])")
        return False
    def draw(ax: Any, name: str, **how: Any) -> None:
        found = [r for r in records if r.get(name) is not None]
        ax.plot([r["tokens"] for r in found], [r[name] for r in found], **how)

    fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    draw(axes[0], "loss", color="tab:blue", lw=1)
    axes[0].set(title="training loss (weighted)", xlabel="tokens", ylabel="nats per token")
    draw(axes[1], "nelbo", color="0.8", lw=0.8, label="training batches (noisy)")
    draw(axes[1], "valid_nelbo", color="tab:orange", marker="o", ms=3, label="validation (exact bound)")
    axes[1].axhline(unigram_nats, color="0.3", ls="--", lw=1, label="unigram")
    low = min([r["valid_nelbo"] for r in records if r.get("valid_nelbo") is not None], default=unigram_nats)
    axes[1].set(title="NELBO", xlabel="tokens", ylabel="nats per token", ylim=(low - 0.5, unigram_nats + 1.5))
    axes[1].legend(frameon=False)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.2)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k, 1.2M
    with jsons.open_atomic(path) as file:
        fig.savefig(file, format="png", dpi=110)
    plt.close(fig)
    return True
