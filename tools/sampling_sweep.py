"""Sampling settings of trained runs side by side, judged (hdlm_jax.evaluation.judges):

    python -m tools.sampling_sweep WORKDIR [WORKDIR ...] --judge=FOLDER [--steps=32,128] [--temperature=1,.8]

Self-correction and perturbation by clusters (HDLM, arXiv 2510.08632, section 4): every force transition at sampling
time, with clusters shown as the process shows them (`exact`: for xi < 1 wrong ones on purpose) or always the word's own
(`clean`), times steps and temperatures. Settings that are the same sampler for a run (all but `none` at xi = 1, all of
them in MDLM) are drawn once. Several runs make the sweep over xi. Each setting is a line of
WORKDIR/sampling_sweep.jsonl, and one that is there, made by the same checkpoint and judge, is not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from hdlm_jax.common import jsons, parallel
from hdlm_jax.common.console import markdown, readable, say
from hdlm_jax.config import CLUSTERS, FORCE_TRANSITIONS, Config, GenerateConfig, ParallelConfig, expand
from hdlm_jax.decoding.sampler import Sampler, compile_for, ended, sampler_of, start_canvas
from hdlm_jax.diffusion.process import Process
from hdlm_jax.evaluation import judges, text_statistics
from hdlm_jax.runs.generate import identity, sampling_facts
from hdlm_jax.training.loading import Run, load_here, saved_config
from tools import cli

FILE = "sampling_sweep.jsonl"


def samplers(process: Process, forces: Sequence[str], clusters: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Pairs (force transition, clusters) in groups that draw the same samples (docs/theory.md sections 3 and 4)."""
    groups: dict[tuple, list[tuple[str, str]]] = {}
    if not process.force_transition:
        return [[("", "exact")]]
    for force, shown in itertools.product(forces, clusters):
        if process.num_levels == 1:  # no token ever shows a cluster
            kind: tuple = ()
        elif process.xi == 1:  # a forced word lies under what is shown, and so do its clusters
            free = force == "none"
            kind = (free, shown if free and process.num_levels > 2 else "")
        else:
            kind = (force, shown)
        groups.setdefault(kind, []).append((force, shown))
    return list(groups.values())


def settings(run: Run, given: argparse.Namespace) -> list[tuple[GenerateConfig, list[tuple[str, str]]]]:
    """All settings of a run with the pairs each stands for; programs that are alike follow each other."""
    out = []
    for group in samplers(run.process, given.force_transition, given.clusters):
        for temperature, steps in itertools.product(given.temperature, given.steps):
            out.append((dataclasses.replace(basis(given), steps=steps, temperature=temperature,
                                            force_transition=group[0][0], clusters=group[0][1]), group))
    return out


def basis(given: argparse.Namespace) -> GenerateConfig:
    """What all settings have in common."""
    return GenerateConfig(num_samples=given.num_samples, length=given.length, method=given.method,
                          options=given.options, top_p=given.top_p,
                          batch_size=given.batch_size, seed=given.seed, checkpoint=given.checkpoint)


def sweep(workdir: str, given: argparse.Namespace, judge: judges.Judge | None = None) -> list[dict[str, Any]]:
    """Samples and judges every setting of a run that its file does not hold yet; gives back all that were asked for."""
    run, asked = load_here(workdir, given.checkpoint), []
    draw = sampler_of(run)
    todo = settings(run, given)
    for number, (g, group) in enumerate(todo, 1):
        name = (f"{workdir}: {number}/{len(todo)}, {', '.join(_names(group))}, T={g.steps}, "
                f"temperature={g.temperature:g}")
        asked.append(measure(workdir, FILE, name, run, draw, g, judge, {"same": group}))
    return asked


def measure(workdir: str, file: str, name: str, run: Run, draw: Sampler, g: GenerateConfig, judge: judges.Judge | None,
            about: dict[str, Any], prompts: np.ndarray | None = None) -> dict[str, Any]:
    """Samples and judges one setting, unless WORKDIR/file holds it already; `name` for who reads along.

    All S tokens of a text are judged, as the field does, but up to the first end where the run learnt rows of one text.
    prompts: int32 [n, P], what each text begins with; none of it is in a number.
    """
    g = dataclasses.replace(g, stop="end" if run.trained.data.packing == "crop" else "")
    path = os.path.join(workdir, file)
    lines = jsons.read_lines(path)[0]
    drawn = {k: v for k, v in dataclasses.asdict(g).items() if k not in ("judge", "judge_dtype", "batch_size")}
    made_from = {"step": run.step, "hierarchy_fingerprint": run.hierarchy.fingerprint, "settings": drawn,
                 "judge": judge and judges.made_from(judge)}
    given = 0 if prompts is None else prompts.shape[1]
    if prompts is not None:
        made_from["prompts"] = hashlib.sha256(prompts.tobytes()).hexdigest()
    if draw.helper is not None and g.helper:
        made_from["helper"] = identity(draw.helper)
    if found := [line for line in lines if line["made_from"] == jsons.plain(made_from)]:
        say(f"{name}: reusing {path}")
        return found[-1]
    length = g.length or run.config.model.seq_len
    canvas = start_canvas(run, g, np.zeros((g.num_samples, 0), np.int32) if prompts is None else prompts)
    compile_for(draw, canvas, g)
    started = time.time()
    out = draw(canvas, g)
    seconds = time.time() - started
    tokens = [ended(row[:n], given, run.tokenizer.eot, g.stop)
              for row, n in zip(out["tokens"], out["length"], strict=True)]
    costs = {"samples": len(tokens), "seq_len": length, "network_calls": float(out["calls"].mean()),
             "row_forwards": float(out["row_forwards"].mean())}
    line = {"run": os.path.basename(os.path.normpath(workdir)), "xi": getattr(run.process, "xi", None)} | about
    line |= {"sampling": sampling_facts(run, g, costs), "prompt_tokens": given,
             "tokens_per_s": float(out["length"].sum() - len(tokens) * given) / seconds}
    line |= {"judge": judges.record(judge, run.tokenizer, tokens, given)} if judge else text_statistics.statistics(
        [row[given:] for row in tokens])
    lines.append(line | {"made_from": made_from})
    jsons.write_lines(path, lines)
    say(f"{name}: {_perplexity(line)}")
    return lines[-1]


def _names(group: Sequence[Sequence[str]]) -> tuple[str, str]:
    """What to call the force transitions and the clusters of pairs that are one sampler."""
    forces, shown = (" = ".join(dict.fromkeys(pair[i] for pair in group)) for i in (0, 1))
    return forces or "-", shown


def _perplexity(line: dict[str, Any]) -> str:
    return judges.perplexity(line["judge"]) if "judge" in line else "not judged"


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown of what `sweep` gives back."""
    head = ["run", "xi", "force transition", "clusters", "T", "temperature", "perplexity", "unigram entropy",
            "repetition", "network calls", "row forwards", "law"]
    rows = []
    for line in lines:
        s, numbers = line["sampling"], line.get("judge", line)
        rows.append([line["run"], "-" if line["xi"] is None else f"{line['xi']:g}", *_names(line["same"]),
                     str(s["steps"] or s["method"]), f"{s['temperature']:g}", _perplexity(line),
                     readable(numbers["unigram_entropy"], ".3f"), readable(numbers["repetition_4"], ".3f"),
                     f"{s['network_calls']:.1f}", f"{s['row_forwards']:.1f}", s["law"]])
    return markdown(head, rows)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments; the settings are those of config.GenerateConfig and have its rules."""
    base = GenerateConfig()
    ask = cli.Parser("sampling_sweep", __doc__)
    ask.add_argument("workdir", nargs="+", type=expand)
    ask.add_argument("--judge", type=expand, default="", help="folder of a GPT-2, or workdir of a run")
    ask.add_argument("--judge_dtype", default="float32", choices=("float32", "bfloat16"))
    ask.add_argument("--force_transition", type=cli.listed(str), default=list(FORCE_TRANSITIONS), metavar="LIST")
    ask.add_argument("--clusters", type=cli.listed(str), default=list(CLUSTERS), metavar="LIST")
    ask.add_argument("--steps", type=cli.listed(int), default=[base.steps], metavar="LIST")
    ask.add_argument("--temperature", type=cli.listed(float), default=[base.temperature], metavar="LIST")
    for name, value in (("num_samples", 64), ("length", 0), ("method", base.method), ("options", base.options),
                        ("top_p", base.top_p), ("batch_size", base.batch_size), ("seed", base.seed),
                        ("checkpoint", base.checkpoint)):
        ask.add_argument(f"--{name}", type=type(value), default=value)
    return ask.parse_args(argv)


def opened(given: argparse.Namespace, config: Config) -> judges.Judge:
    """The judge that was asked for, over all devices, however a run's config divides them."""
    config = dataclasses.replace(config, parallel=ParallelConfig())
    return judges.open_judge(given.judge, given.judge_dtype, config.parallel, parallel.make_mesh(config))


def main(argv: Sequence[str] | None = None) -> None:
    with cli.one_line("sampling_sweep"):
        given = parse(argv)
        for force, shown, steps, heat in itertools.product(given.force_transition, given.clusters, given.steps,
                                                           given.temperature):
            dataclasses.replace(basis(given), force_transition=force, clusters=shown, steps=steps,
                                temperature=heat).check()
        configs = [saved_config(workdir) for workdir in given.workdir]
        parallel.keep_compiled()
        judge = None
        if given.judge:
            judge = opened(given, configs[0])
        print("\n" + table([line for workdir in given.workdir for line in sweep(workdir, given, judge)]))


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)  # what users should read is said in words
    main()
