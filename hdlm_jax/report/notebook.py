"""What a notebook shows: a text that falls into place, and the curves of a training that runs."""

from __future__ import annotations

import dataclasses
import html
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hdlm_jax.common.jsons import Json
from hdlm_jax.data.tokenizers import Tokenizer
from hdlm_jax.decoding.desk import Moment
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.report.page import document
from hdlm_jax.report.run_files import changes, curves_of, tree_shown
from hdlm_jax.training.metrics import line_of, read_metrics

# plays once, from the first frame; in a notebook the frame is as high as what is in it
_PLAYS = """
if (!matchMedia("(prefers-reduced-motion: reduce)").matches) {
  const slider = document.getElementById("frame");
  slider.value = 0;
  slider.dispatchEvent(new Event("input"));
  document.getElementById("play").click();
}
if (window.frameElement) new ResizeObserver(() => {
  window.frameElement.style.height = `${document.body.offsetHeight}px`;
}).observe(document.body);
"""
WIDTH, HEIGHT = 720, 260  # of the curves, in pixels


@dataclasses.dataclass(frozen=True, repr=False)
class Film:
    """A text and the way it was written. In Jupyter and VS Code it plays; html is the page, which needs nothing else.

    calls: of the network.
    """

    text: str
    calls: int
    html: str

    def __repr__(self) -> str:
        return f"<hdlm_jax text of {self.calls} network calls, in a notebook seen falling: {self.text!r}>"

    def _repr_html_(self) -> str:
        """The page in a frame, so that neither its styles nor its names meet the notebook's."""
        return (f'<iframe srcdoc="{html.escape(self.html)}" title="a text while it is written" '
                'style="width: 100%; height: 26rem; border: 0"></iframe>')


def film_of(moments: Sequence[Moment], h: Hierarchy, tokenizer: Tokenizer, counts: np.ndarray | None,
            about: Mapping[str, Any]) -> Film:
    """A text's moments as a film; a canvas that grows is shown at its last size from the start.

    counts: of the words, to name clusters by the most frequent ones; about: prompt_tokens, settings, step.
    """
    frames = [now for i, now in enumerate(moments) if not now.done or not i]
    shape = len(frames), max(len(now.z) for now in frames)
    z, sure = np.full(shape, h.mask_id, np.int32), np.zeros(shape, np.float32)
    for i, now in enumerate(frames):
        z[i, : len(now.z)], sure[i, : len(now.z)] = now.z, now.sure
    tree, z = tree_shown(h, tokenizer, counts, z)
    film = changes({"z": z[None], "confidence": sure[None], "call": np.array([now.call for now in frames]),
                    "time": np.array([[now.t for now in frames]]), "about": about})
    body = "<style>main { padding: .2rem; max-width: none }</style><div data-part=viewer></div>"
    page = document("a text while it is written", body, {"run": {"hierarchy": tree, "trajectories": film}}, _PLAYS)
    return Film(moments[-1].text, frames[-1].call, page)


def here() -> bool:
    """Whether this is a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and "IPKernelApp" in shell.config


def _ticks(low: float, high: float) -> list[float]:
    step = next(m * power for power in 10.0 ** np.arange(-6, 13) for m in (1, 2, 5) if m * power * 5 >= high - low)
    return [float(step * i) for i in range(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)]


def curves_svg(records: Sequence[Json]) -> str:
    """The bound of training batches (grey) and of validation text (blue) over tokens, nats a token, as SVG."""
    found = curves_of(records)
    lines = [(np.array(found[kind]["tokens"], float), np.array(found[kind]["nelbo"], float), colour)
             for kind, colour in (("train", "#8b929c"), ("valid", "#2f6db3"))] if found else []
    lines = [(x[np.isfinite(y)], y[np.isfinite(y)], colour) for x, y, colour in lines]
    ys = np.concatenate([y for _, y, _ in lines]) if lines else np.zeros(0)
    if not len(ys):
        return ""
    last = max(x[-1] for x, _, _ in lines if len(x))
    low, high = float(ys.min()) - 0.05, float(np.quantile(ys, 0.98)) + 0.05
    px = lambda x: 48 + (WIDTH - 60) * x / last  # noqa: E731
    py = lambda y: 10 + (HEIGHT - 40) * (high - np.clip(y, low, high)) / (high - low)  # noqa: E731
    parts = [f'<path d="M48 {py(y):.1f}H{WIDTH - 12}" stroke="#8b929c" stroke-opacity=".3"/>'
             f'<text x="42" y="{py(y) + 4:.1f}" text-anchor="end">{y:.4g}</text>' for y in _ticks(low, high)]
    parts += [f'<text x="{px(x):.1f}" y="{HEIGHT - 14}" text-anchor="middle">{x:,.0f}</text>'
              for x in _ticks(0, last)[1:]]
    for x, y, colour in lines:
        some = np.unique(np.linspace(0, len(x) - 1, min(len(x), 600)).astype(int))
        points = " ".join(f"{px(a):.1f},{py(b):.1f}" for a, b in zip(x[some], y[some], strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    x, y, colour = lines[-1]
    parts += [f'<circle cx="{px(a):.1f}" cy="{py(b):.1f}" r="3" fill="{colour}"/>' for a, b in zip(x, y, strict=True)]
    return (f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" style="width: 100%; max-width: {WIDTH}px" fill="#8b929c" '
            f'font-family="sans-serif" font-size="11" role="img" aria-label="NELBO over training tokens">'
            f'{"".join(parts)}</svg>')


class Plot:
    """The curves of a training below a cell, new with its records but at most once a second (a metrics.Writer)."""

    def __init__(self, workdir: str, steps: int):
        from IPython import display

        self.path, self.steps, self.drawn = os.path.join(workdir, "metrics.jsonl"), steps, 0.0
        self.records: list[Json] = []
        self.html = display.HTML
        self.shown = display.display(display.HTML("<p>compiling, or the first steps</p>"), display_id=True)

    def write(self, record: Mapping[str, Any]) -> None:
        self.records = [*self.records, dict(record)] if self.records else read_metrics(self.path)
        if time.monotonic() - self.drawn > 1:
            self.draw()

    def draw(self) -> None:
        if not self.records:
            return
        last = self.records[-1]
        speed = last.get("tokens_per_s")
        pace = last["tokens"] / last["step"] / speed if speed else None
        said = html.escape(line_of(last, self.steps, pace))
        key = ('<span style="color: #8b929c">training batches (noisy)</span>, <span style="color: #2f6db3">validation'
               "</span>, over tokens")
        self.shown.update(self.html(f"<p>{said}</p><p>NELBO, nats per token: {key}</p>{curves_svg(self.records)}"))
        self.drawn = time.monotonic()

    def close(self) -> None:
        self.records = self.records or read_metrics(self.path)
        self.draw()
