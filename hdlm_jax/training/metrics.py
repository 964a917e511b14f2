"""What a training keeps of its steps: metrics.jsonl, TensorBoard, curves."""

from __future__ import annotations

import importlib.util
import shutil
from typing import Any

from hdlm_jax.common import jsons
from hdlm_jax.common.console import say

# bf16 matrix peak of one device, FLOP/s, by jax's device_kind (vendors' data sheets, dense)
PEAK_FLOPS = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v5p": 459e12,
    "TPU v6 lite": 918e12, "TPU v6e": 918e12, "NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak of a device by the longest name that its kind begins with; None where it is not known (CPUs)."""
    names = [n for n in PEAK_FLOPS if device_kind.startswith(n)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


class MetricsFile:
    """metrics.jsonl: one JSON object a line, each step once, also after a resume.

    A file with damaged lines is kept beside it as metrics.damaged.jsonl; its other records count on.
    tensorboard: folder for the same scalars, where its extra is installed (hdlm_jax[tensorboard]).
    """

    def __init__(self, path: str, resume_step: int, tensorboard: str = ""):
        records, damaged = jsons.read_lines(path, "step")
        if damaged:
            aside = path.removesuffix(".jsonl") + ".damaged.jsonl"
            shutil.copyfile(path, aside)
            say(f"{path}: {len(damaged)} of its lines cannot be read (the first, line {damaged[0]}); all others are "
                f"kept, and the file as it was in {aside}")
        kept = [r for r in records if r["step"] <= resume_step]
        jsons.write_atomic(path, "".join(jsons.dumps(r) + "\n" for r in kept).encode())
        self.path, self.file, self.board = path, open(path, "a"), None
        if tensorboard and importlib.util.find_spec("tensorboardX"):
            self.board = importlib.import_module("tensorboardX").SummaryWriter(tensorboard)

    def write(self, record: dict[str, Any]) -> None:
        with jsons.named(self.path):
            self.file.write(jsons.dumps(record) + "\n")
            self.file.flush()
        for name, value in record.items():
            if self.board and name != "step" and value is not None:
                self.board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        with jsons.named(self.path):
            self.file.close()
        if self.board:
            self.board.close()


def read_metrics(path: str) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl, whatever else there is in it; of no file none."""
    return jsons.read_lines(path, "step")[0]


def plot_curves(path: str, records: list[dict[str, Any]], unigram_nats: float) -> bool:
    """Loss and validation NELBO against tokens as a PNG; False (and a line saying so) without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        say("curves: not drawn, matplotlib is missing (pip install hdlm_jax[plots])")
        return False
    def draw(ax: Any, name: str, **how: Any) -> None:
        found = [r for r in records if r.get(name) is not None]
        ax.plot([r["tokens"] for r in found], [r[name] for r in found], **how)

    fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    draw(axes[0], "loss", color="tab:blue", lw=1)
    axes[0].set(title="training loss (weighted)", xlabel="tokens", ylabel="nats per token")
    draw(axes[1], "nelbo", color="0.8", lw=0.8, label="training batches, t uniform (noisy)")
    draw(axes[1], "valid_nelbo", color="tab:orange", marker="o", ms=3, label="validation (exact bound)")
    axes[1].axhline(unigram_nats, color="0.3", ls="--", lw=1, label="unigram")
    low = min([r["valid_nelbo"] for r in records if r.get("valid_nelbo") is not None], default=unigram_nats)
    axes[1].set(title="NELBO", xlabel="tokens", ylabel="nats per token", ylim=(low - 0.5, unigram_nats + 1.5))
    axes[1].legend(frameon=False)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.2)
    with jsons.open_atomic(path) as file:
        fig.savefig(file, format="png", dpi=110)
    plt.close(fig)
    return True
