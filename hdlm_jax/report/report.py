"""What runs have reached, to look at.

    python -m hdlm_jax.main --config=... --mode=report           one run as a page, <workdir>/report.html
    python -m hdlm_jax.report.report WORKDIR [WORKDIR ...]          several as a table in Markdown
    python -m hdlm_jax.report.report --html=FILE WORKDIR [...]      several as a page
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from hdlm_jax.common import processes
from hdlm_jax.common.console import measured, readable, say
from hdlm_jax.common.jsons import write_atomic
from hdlm_jax.report import page
from hdlm_jax.runs.tasks import newest
from hdlm_jax.training.loading import check_writable, saved_config


def _read(workdir: str, name: str) -> dict[str, Any]:
    path = os.path.join(workdir, name)
    if not os.path.exists(path):
        mode = name.removesuffix(".json")
        raise SystemExit(f"report: {path} is missing; run --mode={mode} on {workdir} first")
    with open(path) as f:
        return json.load(f)


def compare(workdir_a: str, workdir_b: str) -> tuple[float, float]:
    """NELBO of b minus that of a in nats per token, with its paired standard error over sequences."""
    a, b = (np.load(os.path.join(w, "evaluate_rows.npz")) for w in (workdir_a, workdir_b))
    if not np.array_equal(a["tokens"], b["tokens"]):
        raise ValueError(f"{workdir_a} and {workdir_b} were not evaluated on the same sequences")
    one, other = (page.read_json(os.path.join(w, "evaluate.json")) or {} for w in (workdir_a, workdir_b))
    for name in ("data", "packing", "padding"):
        if one.get(name) != other.get(name) and (name != "padding" or one.get("packing") == "crop"):
            raise ValueError(f"{workdir_a} and {workdir_b} were evaluated on other sequences ({name} differs)")
    same_given([workdir_a, workdir_b], [one, other])
    tokens, difference = a["tokens"], b["nats"] - a["nats"]
    mean = difference.sum() / tokens.sum()
    n = len(tokens)
    if n < 2:
        return float(mean), math.nan
    se = math.sqrt(n / (n - 1) * np.sum((difference - mean * tokens) ** 2)) / tokens.sum()
    return float(mean), float(se)


def given(evaluated: dict[str, Any]) -> str:
    """What an evaluation is conditional on beside prompts: "nothing" or "lengths" (docs/theory.md section 7)."""
    return evaluated.get("given") or ("nothing" if evaluated.get("packing", "concat") == "concat" else "lengths")


def same_given(names: list[str], results: list[dict[str, Any]]) -> str:
    """What all of these results are conditional on; ValueError where it is not the same."""
    found = [given(r) for r in results]
    for name, value in zip(names, found, strict=True):
        if value != found[0]:
            raise ValueError(f"{names[0]} is given {found[0]}, {name} {value}: bounds given lengths lie below the "
                             "others and cannot be compared with them (docs/theory.md section 7)")
    return found[0]


def differences(workdirs: list[str]) -> list[str]:
    """A line for each run but the first: its NELBO minus that of the first, paired over sequences."""
    lines = []
    for workdir in workdirs[1:]:
        mean, se = compare(workdirs[0], workdir)
        names = [os.path.basename(os.path.normpath(w)) for w in (workdir, workdirs[0])]
        lines.append(f"{names[0]} - {names[1]}: {measured(mean, se, '+.4f')} nats/token (paired)")
    return lines


def table(workdirs: list[str]) -> str:
    """Markdown: what each run reaches on its validation split, and what it costs."""
    judged = any("judge" in _read(w, "generate.json") for w in workdirs)
    head = ["", "levels", "step", "nats/token", "bits/byte", "perplexity", *JUDGED * judged, "train tok/s",
            "sample tok/s", "network calls"]
    rows = [head]
    unigram = None
    for workdir in workdirs:
        e, g = _read(workdir, "evaluate.json"), _read(workdir, "generate.json")
        speed = page.training_speed(workdir)
        bits = measured(e["bits_per_byte"], e["bits_per_byte_se"]) if e["whole_split"] else "-"
        rows.append([os.path.basename(os.path.normpath(workdir)), " → ".join(map(str, e["hierarchy"])), str(e["step"]),
                     measured(e["nelbo"], e["se"]), bits, measured(e["perplexity"], e["perplexity_se"], ".1f"),
                     *_judged(g) * judged, f"{speed:,.0f}" if speed else "-", f"{g['tokens_per_s']:,.0f}",
                     f"{g['network_calls']:.0f}"])
        bits = f"{e['unigram_bits_per_byte']:.4f}" if e["whole_split"] else "-"
        unigram = ["unigram", "", "", f"{e['unigram_nelbo']:.4f}", bits, f"{e['unigram_perplexity']:.1f}"]
        unigram += [""] * (len(head) - len(unigram))
    return markdown([*rows, *([unigram] if unigram else [])])


JUDGED = ["generative perplexity", "entropy", "distinct-2"]


def _judged(g: dict[str, Any]) -> list[str]:
    """Cells of JUDGED; ≤ marks the bound that a judge without an exact likelihood gives."""
    judge = g.get("judge")
    if not judge:
        return ["-"] * len(JUDGED)
    end = "" if judge.get("perplexity") is not None else "_bound"
    value, se = judge.get(f"perplexity{end}"), judge.get(f"perplexity_se{end}")
    shown = "≤ " * bool(end and value is not None) + measured(value, se, ".1f")
    shown += " given lengths" * (judge.get("given") == "lengths")
    return [shown, *(readable(judge.get(n), ".3f") for n in ("unigram_entropy", "distinct_2"))]


def markdown(rows: list[list[str]]) -> str:
    """A table whose first row is its head."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    rows = [rows[0], ["-" * w for w in widths], *rows[1:]]
    return "\n".join(f"| {' | '.join(c.ljust(w) for c, w in zip(r, widths, strict=True))} |" for r in rows)


def task_table(workdirs: list[str]) -> str:
    """Markdown: each run's tasks.json side by side, a column a task and protocol; "" where there is none.

    Perplexities by the models' own tokens, accuracies in percent; with a standard error each.
    """
    found = {w: newest(page.read_json(os.path.join(w, "tasks.json")) or {}) for w in workdirs}
    names = list(dict.fromkeys(name for tasks in found.values() for name in tasks))
    for name in names:
        here = [w for w in workdirs if name in found[w]]
        same_given([f"{w}: {name}" for w in here], [found[w][name] for w in here])

    def cell(result: dict[str, Any] | None) -> str:
        if not result:
            return "-"
        if result["kind"] == "ranking":
            return measured(100 * result["accuracy"], 100 * result["accuracy_se"], ".1f") + " %"
        return measured(result["perplexity"], result["perplexity_se"], ".1f")

    head = ["", *(name + " (limited)" * any(t.get(name, {}).get("limited", False) for t in found.values())
                  for name in names)]
    rows = [[os.path.basename(os.path.normpath(w)), *(cell(found[w].get(name)) for name in names)] for w in workdirs]
    return markdown([head, *rows]) if names else ""


def report(workdir: str) -> str:
    """<workdir>/report.html, and level_occupancy.png where the levels are those of a hierarchy; gives back its path.

    What the run does not have yet (evaluation, samples, ...) is named there with its command.

    Raises:
      ConfigError: no run there.
    """
    saved_config(workdir)
    check_writable(workdir)
    path = os.path.join(workdir, "report.html")

    def write() -> None:
        run = page.gather(workdir)
        write_atomic(Path(path), page.run_page(run).encode())
        if run["occupancy"]:
            page.plot_occupancy(os.path.join(workdir, "level_occupancy.png"), run["occupancy"])
        say(f"report: {path}, {os.path.getsize(path) / 1e6:.1f} MB, a page by itself")

    processes.on_main_process(write)
    return path


def compare_page(path: str, workdirs: list[str]) -> None:
    """Several runs as one page: their curves, a table, differences to the first of them on the same sequences."""
    runs = [page.gather(w, film=False) for w in workdirs]
    evaluated = [(w, r["evaluate"]) for w, r in zip(workdirs, runs, strict=True) if r["evaluate"]]
    told = same_given(*map(list, zip(*evaluated, strict=True))) if evaluated else "nothing"
    head = ["run", "levels", "parameters", "training tokens", "NELBO, nats/token", "perplexity",
            "minus the first run, paired", *JUDGED[:2],
            "training tokens/s", "sampling tokens/s", "calls"]
    rows: list[list[Any]] = []
    for workdir, run in zip(workdirs, runs, strict=True):
        e, g, done = run["evaluate"] or {}, run["generate"] or {}, run["curves"]
        difference = ""
        if workdir != workdirs[0] and e:
            try:
                difference = measured(*compare(workdirs[0], workdir), spec="+.4f")
            except (ValueError, OSError):
                difference = "other sequences"
        speed = run["train_speed"]
        rows.append([run["name"], " → ".join(f"{n:,}" for n in e["hierarchy"]) if e else None, e.get("params"),
                     done["train"]["tokens"][-1] if done and done["train"]["tokens"] else None,
                     measured(e["nelbo"], e["se"]) if e else None,
                     measured(e["perplexity"], e["perplexity_se"], ".1f") if e else None, difference,
                     *_judged(g)[:2],
                     round(speed) if speed else None, round(g["tokens_per_s"]) if g else None,
                     round(g["network_calls"]) if g else None])
    lacks = [page.missing(f"{r['name']}: no {name}.json.", r["workdir"], name) for r in runs
             for name in ("evaluate", "generate") if not r[name]]
    unigrams = {(r["evaluate"] or {}).get("unigram_nelbo") for r in runs} - {None}
    body = ["<header><p class=kicker>hdlm_jax</p><h1>Runs side by side</h1>"
            "<p class=lead>± is one standard error, of the data and of the noise times together; that of a paired "
            f"difference is over the same sequences of both runs. NELBO and perplexity are given {told}. Entropy: of "
            "the words within a sample.</p></header>",
            page.section("table", "Results", "", page.html_table(rows, head) + "".join(lacks))]
    drawn = any(r["curves"] for r in runs)
    if drawn:
        body.append(page.section("curves", "Curves", "", "<div data-part=curves></div>"))
    small = [{"name": r["name"], "curves": r["curves"]} for r in runs]
    data = {"runs": small if drawn else None, "unigram": unigrams.pop() if len(unigrams) == 1 else None}
    write_atomic(Path(path), page.document("Runs side by side – hdlm_jax", "\n".join(body), data).encode())
    say(f"report: {path}")


USAGE = "usage: python -m hdlm_jax.report.report [--html=FILE] WORKDIR [WORKDIR ...]"


def main(workdirs: list[str]) -> None:
    flags = [a for a in workdirs if a.startswith("--")]
    workdirs = [a for a in workdirs if not a.startswith("--")]
    if not workdirs or any(not f.startswith("--html=") or f == "--html=" for f in flags) or len(flags) > 1:
        raise SystemExit(USAGE)
    if flags:
        try:
            return compare_page(flags[0].removeprefix("--html="), workdirs)
        except (ValueError, OSError) as error:
            raise SystemExit(f"report: {error}") from error
    results = [_read(w, "evaluate.json") for w in workdirs]
    for name in ("corpus", "tokens", "data"):
        if len({str(r.get(name)) for r in results}) > 1:
            raise SystemExit(f"report: the runs were evaluated on different text ({name} differs)")
    try:
        shared, zero_shot = same_given(workdirs, results), task_table(workdirs)
    except ValueError as error:
        raise SystemExit(f"report: {error}") from error
    print(table(workdirs))
    print(f"\nvalidation: {results[0]['tokens']:,} tokens, {results[0]['bytes'] or 0:,} bytes, "
          f"corpus {results[0]['corpus'][:12]}; given {shared}; ± is one standard error (data and noise times)")
    print("\n".join(differences(workdirs)))
    if zero_shot:
        print(f"\n{zero_shot}")
    for workdir, result in zip(workdirs, results, strict=True):
        print(f"\n{workdir}: {readable(page.gain(result), '.2f')} nats below the unigram")
        for name in ("metrics.jsonl", "curves.png", "clusters.txt", "clusters.png", "samples.txt", "evaluate.json",
                     "report.html"):
            if os.path.exists(os.path.join(workdir, name)):
                print(f"  {os.path.join(workdir, name)}")
        with open(os.path.join(workdir, "samples.jsonl")) as f:
            text = json.loads(f.readline())["text"]
        print("  a sample: " + " ".join(text.split())[:240])
    print("\nModels this small, trained for minutes, have learnt spelling, frequent words, short phrases and the\n"
          "layout of the text; what they write has no meaning yet.")


if __name__ == "__main__":
    main(sys.argv[1:])
