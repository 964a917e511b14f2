"""Several runs side by side: as tables in Markdown, or as one HTML page with their curves."""

from __future__ import annotations

import math
import os

import numpy as np

from hdlm_jax.common.console import markdown, measured, perplexity, readable, say
from hdlm_jax.common.jsons import Json, read_lines, write_atomic
from hdlm_jax.evaluation.text_statistics import in_percent, paired
from hdlm_jax.report import page, run_files
from hdlm_jax.runs.tasks import newest
from hdlm_jax.training.loading import saved_config
from hdlm_jax.training.metrics import read_metrics


def _read(workdir: str, name: str) -> Json:
    if (found := run_files.read_optional(workdir, name)) is None:
        raise ValueError(f"{os.path.join(workdir, name)} is missing; run --mode={name.removesuffix('.json')} on "
                         f"{workdir} first")
    return found


def paired_difference(workdir_a: str, workdir_b: str) -> tuple[float, float]:
    """NELBO of b minus that of a in nats per token, with its paired standard error over sequences."""
    a, b = (np.load(os.path.join(w, "evaluate_rows.npz")) for w in (workdir_a, workdir_b))
    if not np.array_equal(a["tokens"], b["tokens"]):
        raise ValueError(f"{workdir_a} and {workdir_b} were not evaluated on the same sequences")
    one, other = (run_files.read_optional(w, "evaluate.json") or {} for w in (workdir_a, workdir_b))
    for name in ("data", "packing", "padding"):
        if one.get(name) != other.get(name) and (name != "padding" or one.get("packing") == "crop"):
            raise ValueError(f"{workdir_a} and {workdir_b} were evaluated on other sequences ({name} differs)")
    same_given([workdir_a, workdir_b], [one, other])
    return paired(a, b, a["tokens"])


def given(evaluated: Json) -> str:
    """What an evaluation is conditional on beside prompts: "nothing" or "lengths" (docs/theory.md section 7)."""
    return evaluated.get("given") or ("nothing" if evaluated.get("packing", "concat") == "concat" else "lengths")


def same_given(names: list[str], results: list[Json]) -> str:
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
        mean, se = paired_difference(workdirs[0], workdir)
        lines.append(f"{name_of(workdir)} - {name_of(workdirs[0])}: {measured(mean, se, '+.4f')} nats/token (paired)")
    return lines


def name_of(workdir: str) -> str:
    return os.path.basename(os.path.normpath(workdir))


IN_TRAINING = " †"  # behind what was measured in training, on some validation sequences and with one draw


def _bound(workdir: str, e: Json, records: list[Json]) -> dict[str, str | None]:
    """nats/token, bits/byte and perplexity: as evaluated, else as measured last in training, else nothing."""
    mark = "" if e else IN_TRAINING
    if not e:
        valid = next((r for r in reversed(records) if r.get("valid_nelbo") is not None), None)
        if valid is None:
            return {}
        nats, se = valid["valid_nelbo"], valid.get("valid_se") or math.nan
        e = {"nelbo": nats, "se": se, "perplexity": perplexity(nats), "perplexity_se": perplexity(nats) * se}
    bits = measured(e["bits_per_byte"], e["bits_per_byte_se"]) if e.get("whole_split") else None
    if bits is None and e["nelbo"] and os.path.exists(os.path.join(workdir, "config.json")):
        if rate := run_files.bits_per_nat(saved_config(workdir), workdir):
            bits = f"≈ {measured(e['nelbo'] * rate, (e['se'] or math.nan) * rate)}"
    return {"nats/token": measured(e["nelbo"], e["se"]) + mark, "bits/byte": bits and bits + mark,
            "perplexity": measured(e["perplexity"], e["perplexity_se"], ".1f") + mark}


def _cells(workdir: str) -> dict[str, str | None]:
    """What tables say of a run, by the name of the column; None for what it has not."""
    e, g, c = (run_files.read_optional(workdir, f"{name}.json") or {} for name in ("evaluate", "generate", "config"))
    records = read_metrics(os.path.join(workdir, "metrics.jsonl"))
    trained = max((r.get("tokens", 0) for r in records), default=0)
    sizes = e.get("hierarchy") or (
        [c["tokenizer"]["vocab_size"], *(n for n in c["hierarchy"]["clusters"] if n > 1), 1] if c else [])
    step = e.get("step") or max((r["step"] for r in records), default=0)
    count = lambda n: f"{n:,.0f}" if n else None  # noqa: E731
    return dict.fromkeys(("nats/token", "bits/byte", "perplexity")) | {
        "levels": " → ".join(map(str, sizes)) or None, "step": str(step) if step else None,
        "parameters": count(e.get("params")), "training tokens": count(trained), **_bound(workdir, e, records),
        **dict(zip(JUDGED, _judged(g), strict=True)), "train tok/s": count(run_files.training_speed(records)),
        "sample tok/s": count(g.get("tokens_per_s")),
        "network calls": f"{g['network_calls']:.0f}" if g else None}


def table(workdirs: list[str]) -> str:
    """Markdown: what each run reaches on its validation split, and what it costs; samples where any has drawn some."""
    evaluated = [_read(w, "evaluate.json") for w in workdirs]
    generated = [run_files.read_optional(w, "generate.json") or {} for w in workdirs]
    judged = JUDGED * any("judge" in g for g in generated)
    sampled = ["sample tok/s", "network calls"] * any(generated)
    head = ["levels", "step", "nats/token", "bits/byte", "perplexity", *judged, "train tok/s", *sampled]
    found = {w: _cells(w) for w in workdirs}
    rows = [[name_of(w), *(found[w][column] or "-" for column in head)] for w in workdirs]
    e = evaluated[-1]
    unigram = {"nats/token": f"{e['unigram_nelbo']:.4f}", "perplexity": f"{e['unigram_perplexity']:.1f}",
               "bits/byte": f"{e['unigram_bits_per_byte']:.4f}" if e["whole_split"] else "-"}
    return markdown(["", *head], [*rows, ["unigram", *(unigram.get(column, "") for column in head)]])


SMALL = 5_000_000  # parameters; below, as the quick start's models are, one line says what to expect of samples
FILES = ("metrics.jsonl", "curves.png", "clusters.txt", "clusters.png", "samples.txt", "evaluate.json", "report.html")
JUDGED = ["generative perplexity", "entropy", "distinct-2"]


def _judged(g: Json) -> list[str]:
    """Cells of JUDGED; ≤ marks the bound that a judge without an exact likelihood gives."""
    judge = g.get("judge")
    if not judge:
        return ["-"] * len(JUDGED)
    end = "" if judge.get("perplexity") is not None else "_bound"
    value, se = judge.get(f"perplexity{end}"), judge.get(f"perplexity_se{end}")
    shown = "≤ " * bool(end and value is not None) + measured(value, se, ".1f")
    shown += " given lengths" * (judge.get("given") == "lengths")
    return [shown, *(readable(judge.get(n), ".3f") for n in ("unigram_entropy", "distinct_2"))]


def task_table(workdirs: list[str]) -> str:
    """Markdown: each run's tasks.json side by side, a column a task and protocol; "" where there is none.

    Perplexities by the models' own tokens, with a standard error; accuracies in percent, with their Wilson interval,
    and what guessing would give.
    """
    found = {w: newest(run_files.read_optional(w, "tasks.json") or {}) for w in workdirs}
    names = list(dict.fromkeys(name for tasks in found.values() for name in tasks))
    for name in names:
        here = [w for w in workdirs if name in found[w]]
        same_given([f"{w}: {name}" for w in here], [found[w][name] for w in here])

    def cell(result: Json | None) -> str:
        if not result:
            return "-"
        if result["kind"] in ("ranking", "writing"):
            return in_percent(result["accuracy"], result["questions"]) + " %"
        return measured(result["perplexity"], result["perplexity_se"], ".1f")

    head = ["", *(name + " (limited)" * any(t.get(name, {}).get("limited", False) for t in found.values())
                  for name in names)]
    rows = [[name_of(w), *(cell(found[w].get(name)) for name in names)] for w in workdirs]
    chance = [next(filter(None, (found[w].get(name, {}).get("chance") for w in workdirs)), None) for name in names]
    rows += [["chance", *(f"{100 * c:.1f} %" if c else "-" for c in chance)]] * any(chance)
    return markdown(head, rows) if names else ""


def write_page(path: str, workdirs: list[str]) -> None:
    """Several runs as one page: their curves, a table, differences to the first of them on the same sequences."""
    runs = [run_files.gather(w, film=False) for w in workdirs]
    evaluated = [(w, r["evaluate"]) for w, r in zip(workdirs, runs, strict=True) if r["evaluate"]]
    told = same_given(*map(list, zip(*evaluated, strict=True))) if evaluated else "nothing"
    paired = "minus the first run, paired"
    head = ["levels", "parameters", "training tokens", "nats/token", "bits/byte", "perplexity", paired, *JUDGED[:2],
            "train tok/s", "sample tok/s", "network calls"]
    cells_of = []
    for workdir, run in zip(workdirs, runs, strict=True):
        cells = _cells(workdir) | {paired: ""}
        if workdir != workdirs[0] and run["evaluate"]:
            try:
                cells[paired] = measured(*paired_difference(workdirs[0], workdir), spec="+.4f")
            except (ValueError, OSError):
                cells[paired] = "other sequences"
        cells_of.append(cells)
    head = [column for column in head if any(cells[column] not in (None, "", "-") for cells in cells_of)]
    rows = [[run["name"], *(cells[column] for column in head)] for run, cells in zip(runs, cells_of, strict=True)]
    lacks = [page.missing(f"{r['name']}: no {name}.json.", r["workdir"], name) for r in runs
             for name in ("evaluate", "generate") if not r[name]]
    shown = "".join(cell or "" for cells in cells_of for cell in cells.values())
    marks = " † measured in training, on some of the sequences, with one draw." * (IN_TRAINING in shown)
    marks += " ≈ of a part of the split, at the bytes a token of the whole." * ("≈" in shown)
    unigrams = {(r["evaluate"] or {}).get("unigram_nelbo") for r in runs} - {None}
    body = ["<header><p class=kicker>hdlm_jax</p><h1>Runs side by side</h1>"
            "<p class=lead>± is one standard error, of the data and of the noise times together; that of a paired "
            f"difference is over the same sequences of both runs. NELBO and perplexity are given {told}. Entropy: of "
            "the words within a sample. Tokens differ between tokenizers, bytes do not: compare bits/byte where they "
            f"do.{marks}</p></header>",
            page.section("table", "Results", "", page.html_table(rows, ["run", *head]) + "".join(lacks))]
    drawn = any(r["curves"] for r in runs)
    if drawn:
        body.append(page.section("curves", "Curves", "", "<div data-part=curves></div>"))
    data = {"runs": [{"name": r["name"], "curves": r["curves"]} for r in runs] if drawn else None,
            "unigram": unigrams.pop() if len(unigrams) == 1 else None}
    write_atomic(path, page.document("Runs side by side – hdlm_jax", "\n".join(body), data).encode())
    say(f"report: {path}")


def summary(workdirs: list[str]) -> str:
    """What the runs have reached, to read: tables, paired differences, and of each run its files and a sample.

    Raises:
      ValueError: results that are missing, or that cannot be compared.
    """
    results = [_read(w, "evaluate.json") for w in workdirs]
    for name in ("corpus", "tokens", "data"):
        if len({str(r.get(name)) for r in results}) > 1:
            raise ValueError(f"the runs were evaluated on different text ({name} differs)")
    shared, zero_shot = same_given(workdirs, results), task_table(workdirs)
    lines = [table(workdirs), "", f"validation: {results[0]['tokens']:,} tokens, {results[0]['bytes'] or 0:,} bytes, "
             f"corpus {results[0]['corpus'][:12]}; given {shared}; ± is one standard error (data and noise times)",
             "\n".join(differences(workdirs))]
    lines += ["", zero_shot] if zero_shot else []
    for workdir, result in zip(workdirs, results, strict=True):
        lines += ["", f"{workdir}: {readable(page.gain(result), '.2f')} nats below the unigram"]
        lines += [f"  {path}" for name in FILES if os.path.exists(path := os.path.join(workdir, name))]
        texts = [r["text"] for r in read_lines(os.path.join(workdir, "samples.jsonl"))[0][:1]]
        lines += ["  a sample: " + " ".join(text.split())[:240] for text in texts] or [
            f"  no samples yet: python -m hdlm_jax.main --workdir={workdir} --mode=generate"]
    if all(result.get("params", 0) < SMALL for result in results):
        lines += ["", "Models this small, trained for minutes, have learnt spelling, frequent words, short phrases and",
                  "the layout of the text; what they write has no meaning yet."]
    return "\n".join(lines)
