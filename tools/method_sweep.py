"""Every decoding method on trained runs, judged: a table and a picture of speed and quality.

    python -m tools.method_sweep WORKDIR [WORKDIR ...] --judge=AR_WORKDIR [--steps=16,64,128] [--out=FOLDER]

Texts go on from the first --prompt_tokens of validation rows, so that methods which take the likeliest words write
different ones. Each preset of hdlm_jax.decoding.presets that a run can use, with its own options; those with a number
of steps at each of --steps, those that take the likeliest words with draw=sample as well. --methods names some of them,
with options as in 'fast_dllm threshold=.8'. Each setting is a line of WORKDIR/method_sweep.jsonl, and one that is
there, made by the same checkpoint and judge, is not made again. The picture marks the Pareto front among samples that
are about as varied as real text: a sampler that repeats itself has a low perplexity too.
"""

from __future__ import annotations

import argparse
import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from hdlm_jax.common import parallel
from hdlm_jax.common.console import markdown, readable, say
from hdlm_jax.common.jsons import write_atomic
from hdlm_jax.config import GenerateConfig, expand
from hdlm_jax.decoding import presets
from hdlm_jax.decoding.sampler import load_helper, sampler_of
from hdlm_jax.evaluation import judges
from hdlm_jax.runs.generate import real_texts
from hdlm_jax.training.loading import Run, load_here, saved_config
from tools import cli
from tools.sampling_sweep import measure, opened

FILE = "method_sweep.jsonl"
VARIED = 0.2  # nats that a text's unigram entropy may lie below real text's


def settings(run: Run, given: argparse.Namespace) -> list[GenerateConfig]:
    """What to sample a run with: every method it can use, at every number of steps where it has one."""
    out = []
    greedy = [n for n, f in presets.METHODS.items() if getattr(inspect.signature(f).parameters.get("draw"), "default",
                                                               "") == "argmax"]
    every = [*presets.METHODS, *(f"{name} draw=sample" for name in greedy)]
    for text in given.methods or every:
        name, _, options = text.partition(" ")
        method = presets.make(name, options)
        why = ("it needs a network that loops" if name == "diagonal" and not run.config.decoder.loops else
               "it knows no levels that drop" if name not in ("ancestral", "diagonal") and not run.process.unmasks else
               "it needs --helper" if method.needs in presets.HELPERS and not given.helper else
               "it needs a head of the network" if method.needs in ("order", "block_lengths")
               and method.needs not in run.config.model.chooses else
               "it needs a function" if method.needs == "classifier" else
               "its texts are of any length" if method.policy.lengths else "")
        if why and given.methods:
            raise ValueError(f"--methods={text!r}: {why}")
        if why:
            continue
        steps = given.steps if "steps" in method.numbers and "steps=" not in options else [GenerateConfig().steps]
        out += [GenerateConfig(num_samples=given.num_samples, method=name, options=options, steps=n, seed=given.seed,
                         batch_size=given.batch_size, helper=given.helper if method.needs in presets.HELPERS else "")
                for n in steps]
    for g in out:
        g.check()
    return out


def sweep(workdir: str, given: argparse.Namespace, judge: judges.Judge) -> list[dict[str, Any]]:
    """All lines that were asked for, and first one of real text, which has no sampling."""
    run = load_here(workdir)
    todo, lines, length = settings(run, given), [], run.config.model.seq_len
    draw = sampler_of(run, load_helper(run, GenerateConfig(helper=given.helper)))
    real = real_texts(run, 4 * given.num_samples, length)
    if isinstance(real, str):
        raise ValueError(f"{workdir}: {real}")
    texts = [row for row in real if len(row) == length][: given.num_samples]
    if len(texts) < given.num_samples or not 0 <= given.prompt_tokens < length:
        raise ValueError(f"--num_samples={given.num_samples} --prompt_tokens={given.prompt_tokens}: the validation "
                         f"split gives {len(texts)} whole texts of {length} tokens to begin with")
    prompts = np.stack(texts)[:, : given.prompt_tokens]
    lines.append({"run": os.path.basename(os.path.normpath(workdir)), "sampling": None,
                  "judge": judges.record(judge, run.tokenizer, texts, given.prompt_tokens)})
    for number, g in enumerate(todo, 1):
        name = f"{workdir}: {number}/{len(todo)}, {label(g.method, g.options, _steps(g))}"
        lines.append(measure(workdir, FILE, name, run, draw, g, judge, {}, prompts))
    return lines


def _steps(g: GenerateConfig) -> float | None:
    return presets.make(g.method, g.options, g.steps).numbers.get("steps")


def label(method: str, options: str, steps: float | None) -> str:
    """'max_prob T=16 block=32'."""
    return " ".join(part for part in (method, f"T={steps}" if steps else "", options) if part)


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown of what `sweep` gives back, best perplexity last within a run's order of speed."""
    head = ["run", "method", "calls", "network passes a sample", "tokens/s", "perplexity", "unigram entropy",
            "repetition"]
    rows = []
    for line in lines:
        s, numbers = line["sampling"], line["judge"]
        cost = ["-"] * 3 if s is None else [f"{s['network_calls']:.1f}", f"{s['row_forwards']:.1f}",
                                            f"{line['tokens_per_s']:,.0f}"]
        name = "(real text)" if s is None else label(s["method"], s["options"], s["steps"])
        rows.append([line["run"], name, *cost, judges.perplexity(numbers), readable(numbers["unigram_entropy"], ".3f"),
                     readable(numbers["repetition_4"], ".3f")])
    return markdown(head, rows)


def judged(line: dict[str, Any]) -> float | None:
    """A line's perplexity, or the bound on it that the judge gives."""
    return line["judge"].get("perplexity_bound" if line["judge"]["bound"] else "perplexity")


def front(cost: Sequence[float], perplexity: Sequence[float]) -> list[int]:
    """Numbers of the points that none beats in both, by rising cost."""
    out: list[int] = []
    for i in sorted(range(len(cost)), key=lambda i: (cost[i], perplexity[i])):
        if not out or perplexity[i] < perplexity[out[-1]]:
            out.append(i)
    return out


def picture(path: str, lines: list[dict[str, Any]]) -> bool:
    """Perplexity against network passes and seconds a sample, a column a run; False without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        from matplotlib.ticker import NullFormatter
    except ImportError:
        say("method_sweep: no picture, matplotlib is missing (pip install 'hdlm_jax[plots]')")
        return False
    runs = list(dict.fromkeys(line["run"] for line in lines))
    fig, axes = plt.subplots(2, len(runs), figsize=(8 * len(runs), 12), layout="constrained", squeeze=False)
    shade: Any = None
    for column, run in enumerate(runs):
        own = [line for line in lines if line["run"] == run]
        own = [line for line in own if judged(line) is not None]  # a judge may find none
        real = [line for line in own if line["sampling"] is None]
        own = [line for line in own if line["sampling"] is not None]
        level = np.array([judged(line) for line in own])
        varied = np.array([line["judge"]["unigram_entropy"] for line in own])
        least = real[0]["judge"]["unigram_entropy"] - VARIED if real else -np.inf
        for row, (what, cost) in enumerate((
                ("network passes a sample", [line["sampling"]["row_forwards"] for line in own]),
                ("seconds a sample", [(line["sampling"]["length"] - line["prompt_tokens"]) / line["tokens_per_s"]
                                      for line in own]))):
            ax = axes[row][column]
            shade = ax.scatter(cost, level, c=varied, cmap="viridis", s=34, vmin=3.0, vmax=4.6, zorder=3)
            fine = [i for i in range(len(own)) if varied[i] >= least]
            best = [fine[i] for i in front([cost[i] for i in fine], [level[i] for i in fine])]
            ax.plot([cost[i] for i in best], [level[i] for i in best], color="tab:red", lw=1.2, zorder=2,
                    label=f"Pareto front of samples with entropy ≥ {least:.2f}")
            if real:
                ax.axhline(judged(real[0]), color="0.4", ls="--", lw=1, label="real text")
            ax.set(title=run, xlabel=what, ylabel="generative perplexity", xscale="log", yscale="log")
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.margins(x=0.12)
            fig.canvas.draw()
            taken: list[Any] = []  # names that would lie over others are left to the table, the front's come first
            for i in [*best, *(i for i in range(len(own)) if i not in best)]:
                s = own[i]["sampling"]
                text = ax.annotate(label(s["method"], s["options"], s["steps"]), (cost[i], level[i]), fontsize=7.5,
                                   xytext=(4, 3), textcoords="offset points", weight="bold" if i in best else "normal",
                                   color="black" if i in best else "0.45")
                box = text.get_window_extent()
                if any(box.overlaps(other) for other in taken):
                    text.remove()
                else:
                    taken.append(box)
            ax.grid(alpha=0.2)
            ax.spines[["top", "right"]].set_visible(False)
            ax.legend(frameon=False, fontsize=8)
    fig.colorbar(shade, ax=axes, label="unigram entropy of a text, nats", shrink=0.5)
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return True


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    ask = cli.Parser("method_sweep", __doc__)
    ask.add_argument("workdir", nargs="+", type=expand)
    ask.add_argument("--judge", type=expand, required=True,
                     help="workdir of an autoregressive run, or folder of a GPT-2")
    ask.add_argument("--judge_dtype", default="float32", choices=("float32", "bfloat16"))
    ask.add_argument("--helper", type=expand, default="", help="autoregressive run for the methods that need one")
    ask.add_argument("--methods", type=cli.listed(str), default=[], metavar="LIST",
                     help="'max_prob,fast_dllm threshold=.8'; default: all")
    ask.add_argument("--steps", type=cli.listed(int), default=[16, 64, 128])
    ask.add_argument("--out", type=expand, default="",
                     help="folder for method_sweep.md and .png; default: the first workdir")
    for name, value in (("num_samples", 64), ("batch_size", 16), ("seed", 0), ("prompt_tokens", 32)):
        ask.add_argument(f"--{name}", type=int, default=value)
    return ask.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    with cli.one_line("method_sweep"):
        given = parse(argv)
        config = saved_config(given.workdir[0])
        parallel.keep_compiled()
        judge = opened(given, config)
        out = given.out or given.workdir[0]
        os.makedirs(out, exist_ok=True)
        lines = [line for workdir in given.workdir for line in sweep(workdir, given, judge)]
        text = table(lines)
        write_atomic(Path(out) / "method_sweep.md", f"{text}\n".encode())
        picture(os.path.join(out, "method_sweep.png"), lines)
        print("\n" + text)


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)  # what users should read is said in words
    main()
