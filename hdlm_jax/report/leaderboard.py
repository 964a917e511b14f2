"""Runs and open models by one protocol, as a page: python -m hdlm_jax.report.leaderboard RUN... [--out=leaderboard]

What a run was not measured on yet is measured (hdlm_jax/runs/leaderboard.py). Written are leaderboard.json, .md and
.html, all of the same numbers. Runs stand in the order of their bits per byte on the first text.
"""

from __future__ import annotations

import argparse
import dataclasses
import html
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from absl import logging

import hdlm_jax
from hdlm_jax.common import parallel
from hdlm_jax.common.console import markdown, measured, readable, say
from hdlm_jax.common.jsons import Json, read_lines, write_atomic
from hdlm_jax.evaluation.text_statistics import in_percent
from hdlm_jax.report import page
from hdlm_jax.runs import leaderboard
from hdlm_jax.runs.leaderboard import Board, Protocol
from hdlm_jax.training.metrics import PEAK_FLOPS

# of tools/plan.py, where this code lies in its repository
PLANS = os.path.join(os.path.dirname(os.path.dirname(hdlm_jax.__file__)), "docs", "runs", "open_plans.jsonl")
ONE = {"one H100 of 80 GB": 0.4 * PEAK_FLOPS["NVIDIA H100"],  # FLOP/s: assumed as in the plans
       "two CPU cores": 0.11e12}  # measured: SmolLM2-135M's training (docs/results.md)


HALF = "--config.model.dtype=bfloat16 --config.model.param_dtype=bfloat16"  # as in the plans


class Open(NamedTuple):
    """An open model that anyone can put on the board; plan: its name in the recipe released_open; tensor: chips of a
    v5e:2x4 that share a copy of it, as in its plan."""

    name: str
    hub: str
    plan: str
    tensor: int


MODELS = (Open("LLaDA-8B-Base", "GSAI-ML/LLaDA-8B-Base", "llada_8b", 8),
          Open("LLaDA-8B-Instruct", "GSAI-ML/LLaDA-8B-Instruct", "llada_8b", 8),
          Open("Dream-7B", "Dream-org/Dream-v0-Base-7B", "dream_7b", 4))


class Cell(NamedTuple):
    """What to read, what is said beside it, and what rows are sorted by; without a text the note is the reason."""

    text: str = ""
    note: str = ""
    value: float | None = None


class Table(NamedTuple):
    name: str
    title: str
    intro: str
    head: list[str]
    rows: list[list[Cell]]


def _sum(value: int | None) -> Cell:
    return Cell(f"{value:,}", "", value) if value is not None else Cell("", "not loaded")


def law(found: Json) -> str:
    """'exact' or 'bound', and what it is given where that is not nothing."""
    return ("exact" if found["exact"] else "bound") + ", given lengths" * (found["given"] == "lengths")


def _scored(found: Json, name: str, se: str) -> Cell:
    """A NELBO in some unit: exact, or ≤ before what is a bound."""
    if "why" in found:
        return Cell(note=found["why"])
    if found.get(name) is None:  # bits per byte of a part of a split
        return Cell(note="of the whole split alone (--limit=0)")
    sign = "" if found["exact"] else "≤ "
    return Cell(sign + measured(found[name], found[se]), law(found), found[name])


def _difference(found: Json) -> Cell:
    if "why" in found:
        return Cell(note=found["why"])
    if (pair := found.get("difference")) is None:
        return Cell("0", "the best", 0.0)
    if "why" in pair:
        return Cell(note=pair["why"])
    shown = "≥ " * pair["at_least"] + measured(pair["bits_per_byte"], pair["se"], "+.4f")
    return Cell(shown, f"of a {law(found)}" * (not found["exact"]), pair["bits_per_byte"])


def _accuracy(found: Json) -> Cell:
    if "why" in found:
        return Cell(note=found["why"])
    chance = f", chance {100 * found['chance']:.1f} %" if found.get("chance") else ""
    return Cell(in_percent(found["accuracy"], found["questions"]) + " %", f"{found['questions']:,} questions{chance}",
                100 * found["accuracy"])


def _model(row: Json) -> Cell:
    m = row["model"]
    return Cell(page.kind_of(m["process"], m["levels"]), page.levels_of(m["process"], m["levels"])) if m else Cell(
        note=row["why"])


def _results(board: Board) -> list[Table]:
    """The tables of numbers."""
    rows, texts, questions = board["runs"], board["settings"]["texts"], board["settings"]["questions"]
    name = lambda row: Cell(row["name"])  # noqa: E731
    bits = Table("bits", "Bits per byte", "Of the text as a model is shown it, so that tokenizers can be compared; "
                 "less is better. ± is one standard error. ≤: a bound, the model may be better than that.",
                 ["run", "model", "parameters", *texts],
                 [[name(r), _model(r), _sum(r["model"] and r["model"]["parameters"]),
                   *(_scored(r["texts"][t], "bits_per_byte", "bits_per_byte_se") for t in texts)] for r in rows])
    pairs = Table("pairs", "Bits per byte above the best run",
                  "Differences of the numbers above, paired over the same documents. ≥: the run is told the lengths of "
                  "texts, the best is not; without them its bound were higher.", ["run", *texts],
                  [[name(r), *(_difference(r["texts"][t]) for t in texts)] for r in rows])
    nats = Table("nats", "Nats per token", "NELBO of each run's own tokens, every token counted once; only comparable "
                 "between runs of the same tokenizer. Own validation: other texts for other runs.",
                 ["run", *texts, "own validation", "own validation, bits/byte"],
                 [[name(r), *(_scored(r["texts"][t], "nelbo", "se") for t in texts),
                   _scored(r["validation"], "nelbo", "se"),
                   _scored(r["validation"], "bits_per_byte", "bits_per_byte_se")] for r in rows])
    asked = Table("questions", "Questions", "Answered by the likeliest choice (gsm8k: by writing), without examples; "
                  "bounds of choices are compared where the model is no exact one.", ["run", *questions],
                  [[name(r), *(_accuracy(r["questions"][q]) for q in questions)] for r in rows])
    return [bits, pairs, nats, *[asked] * bool(questions), _generated(board)]


def _generated(board: Board) -> Table:
    judge, s = board["judge"], board["settings"]
    who = f"Judged by {os.path.basename(judge['path'])} ({judge['kind']})." if judge else "Nobody judged: give --judge."
    head = ["run", "generative perplexity", "unigram entropy", "method", "calls", "row forwards"]
    rows = []
    for row in board["runs"]:
        g = row["generation"]
        if "why" in g:
            rows.append([Cell(row["name"]), *[Cell(note=g["why"])] * 5])
            continue
        end = "_bound" * g["bound"]
        value, how = g[f"perplexity{end}"], g["sampling"]
        notes = ["bound" * g["bound"], "its own judge" * g["its_own_judge"], "retokenised" * g["retokenised"]]
        shown = measured(value, g[f"perplexity_se{end}"], ".1f")
        method = f"{how['method']}, {how['steps']} steps" if how["steps"] else "one token a call"
        rows.append([
            Cell(row["name"]), Cell("≤ " * g["bound"] + shown, ", ".join(filter(None, notes)), value)
            if value is not None else Cell(note="no token is scored, or not finite"),
            Cell(readable(g["unigram_entropy"], ".3f"), "nats", g["unigram_entropy"]), Cell(method, how["law"]),
            Cell(f"{how['network_calls']:,.0f}", "", how["network_calls"]),
            Cell(f"{how['row_forwards']:,.0f}", "of each text", how["row_forwards"])])
    return Table("generation", "Generative perplexity", f"{s['samples']} texts of {s['length']} tokens. {who} Low "
                 "perplexity is cheap (repeat one word): entropy stands beside it.", head, rows)


def _identity(board: Board) -> list[Table]:
    """Who the runs are."""
    def model(m: Json, row: Json) -> list[Cell]:
        kind, levels = page.kind_of(m["process"], m["levels"]), page.levels_of(m["process"], m["levels"])
        return [*map(Cell, (m["family"], kind, levels, m["head"])), _sum(m["parameters"]), _sum(m["active"]),
                _sum(m["seq_len"]), Cell(m["tokenizer"]), Cell(law(m))]

    def weights(p: Json, row: Json) -> list[Cell]:
        came = p["imported_from"] or p["started_from"] or ""
        note = f"sha256 {p['imported_sha256'][:16]}" if p["imported_sha256"] else "started from" if came else ""
        return [Cell(p["kind"], "average" * p["averaged"]), _sum(p["step"]), Cell(p["weights"][:16]),
                Cell(os.path.basename(came) or "–", note), Cell(row["workdir"]),
                Cell(f"{row['seconds']:,.0f}", "", row["seconds"])]

    def rows(part: str, cells: Callable[[Json, Json], list[Cell]], head: list[str]) -> list[list[Cell]]:
        more = len(head) - 1
        return [[Cell(row["name"]), *(cells(row[part], row) if row[part] else [Cell(note=row["why"])] * more)]
                for row in board["runs"]]

    head = ["run", "family", "model", "levels", "head", "parameters", "active", "row", "tokenizer", "likelihood"]
    made = ["run", "weights", "step", "sha256", "imported from", "folder", "seconds"]
    return [Table("models", "Models", "Active: parameters that work on a token. Row: the most tokens that see each "
                  "other; longer documents are scored in pieces of so many.", head, rows("model", model, head)),
            Table("provenance", "Weights", "sha256: of the loaded parameters' checksums; leaderboard.json has them in "
                  "full, and the fingerprints of tokenizers and hierarchies. Seconds: of measuring.", made,
                  rows("provenance", weights, made))]


def plans(path: str) -> dict[str, str]:
    """By the name of a recipe's model what each of its plans of sampling says (tools/plan.py).

    A plan with a copy of the model on every chip tells what one large card and a CPU need as well.
    """
    out: dict[str, list[str]] = {}
    for plan in read_lines(path, "devices")[0]:
        if plan.get("what") != "sample" or not plan.get("bytes"):
            continue
        shown, gib = out.setdefault(plan["config"].rpartition(":")[2], []), plan["bytes"]["peak"] / 2**30
        if plan.get("mesh", {}).get("data", 0) < plan["devices"] or plan["devices"] == 1:
            rows = f"{plan['batch_size']} rows of {plan['seq_len']:,}"
            call = f", {plan['step_s']:.2g} s a call of {rows}" if plan.get("step_s") else ""
            shown.append(f"{plan['topology']}: {gib:.1f} GiB a chip{call}")
            continue
        rows, flops = plan["batch_size"] // plan["devices"], plan["flops_per_step"] / plan["devices"]
        for name, speed in ONE.items():
            seconds = flops / speed
            took = f"{seconds:.2g}" if seconds < 10 else f"{seconds:,.0f}"
            shown.append(f"{name}: {gib:.1f} GiB, {took} s a call of {rows} rows of {plan['seq_len']:,}")
    return {name: "; ".join(lines) for name, lines in out.items()}


def _elsewhere(board: Board, planned: dict[str, str]) -> Table:
    """Open models that are not on the board, and the commands that put them there."""
    here = {_plain(row["name"]) for row in board["runs"]}
    rows = []
    for model in MODELS:
        if not any(_plain(model.name) in name for name in here):
            workdir = f"runs/{model.name.lower()}"
            rows.append([Cell(model.name, model.hub), Cell(
                f"hdlm-jax --mode=import --config.released.weights=FOLDER --workdir={workdir} {HALF}\n"
                f"hdlm-jax leaderboard {workdir}\nhdlm-jax leaderboard {workdir} --tensor={model.tensor}  # v5e:2x4"),
                Cell(planned.get(model.plan, "see docs/models.md"))])
    return Table("elsewhere", "One command away", "FOLDER: the model's folder of the Hugging Face hub. Memory and time "
                 "are of sampling, from compile plans.", ["model", "commands", "memory and time"], rows)


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def ordered(board: Board) -> Board:
    """The board with its runs by their bits per byte on the first text; what has none comes last."""
    first = board["settings"]["texts"][0]
    by = lambda row: row["texts"][first].get("bits_per_byte", math.inf)  # noqa: E731
    return board | {"runs": sorted(board["runs"], key=by)}


def tables(board: Board, planned: dict[str, str]) -> list[Table]:
    """All tables of a board."""
    board = ordered(board)
    return [t for t in (*_results(board), *_identity(board), _elsewhere(board, planned)) if t.rows]


def _said(board: Board) -> str:
    s = board["settings"]
    limit = f"the first {s['limit']:,} documents, questions or sequences of each set" if s["limit"] else "whole sets"
    return (f"One protocol: {limit}, each document by itself, {s['draws']} draws of the noise where the process is a "
            f"diffusion; hdlm_jax {board['hdlm_jax']}, {board['device']}.")


def written(table: Table) -> str:
    """A table in Markdown."""
    def show(cell: Cell) -> str:
        said = f"{cell.text} ({cell.note})" if cell.text and cell.note else cell.text or cell.note or "–"
        return " ".join(said.replace("\n", "; ").replace("|", "\\|").split())

    return markdown(table.head, [[show(cell) for cell in row] for row in table.rows])


def text(board: Board, planned: dict[str, str]) -> str:
    """leaderboard.md."""
    lines = ["# Leaderboard", "", _said(board)]
    for table in tables(board, planned):
        lines += ["", f"## {table.title}", "", table.intro, "", written(table)]
    return "\n".join(lines) + "\n"


def _table(table: Table) -> str:
    """HTML whose columns report.js sorts by."""
    def show(cell: Cell, name: str) -> str:
        value = "" if cell.value is None else f" class=n data-value={cell.value!r}"
        inside = html.escape(cell.text).replace("\n", "<br>")
        note = f"<small>{html.escape(cell.note)}</small>" if cell.note else ""
        kind = value or " class=why" * (not cell.text)
        return f'<td{kind} data-name="{html.escape(name)}"><span>{inside}{note}</span></td>'

    number = [any(row[i].value is not None for row in table.rows) for i in range(len(table.head))]
    top = "".join(f"<th scope=col{' class=n' * n}>{html.escape(name)}</th>"
                  for name, n in zip(table.head, number, strict=True))
    body = "".join(f"<tr>{''.join(map(show, row, table.head))}</tr>" for row in table.rows)
    return (f"<div class='wide board'><table class=sortable><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
            "</div>")


def write(board: Board, out: str, planned: dict[str, str]) -> str:
    """Writes <out>/leaderboard.md and .html; gives back the path of the page."""
    drawn = ("<div data-part=board></div><p class=quiet>Filled: exact. Open: a bound, the model's own number lies at "
             "or below it. Bars: one standard error to either side.</p>")
    head = (f"<header><p class=kicker>hdlm_jax</p><h1>Leaderboard</h1><p class=lead>{html.escape(_said(board))}</p>"
            "</header>")
    found = tables(board, planned)
    parts = [page.section(t.name, t.title, html.escape(t.intro), _table(t)) for t in found]
    parts.insert(1, page.section("picture", "Bits per byte, drawn", "", drawn))
    shown = [{"text": name, "runs": [
        {"name": row["name"], "value": cell["bits_per_byte"], "se": cell["bits_per_byte_se"], "law": law(cell)}
        for row in ordered(board)["runs"] if "why" not in (cell := row["texts"][name])]}
        for name in board["settings"]["texts"]]
    path = os.path.join(out, "leaderboard.html")
    write_atomic(os.path.join(out, "leaderboard.md"), text(board, planned).encode())
    write_atomic(path, page.document("Leaderboard – hdlm_jax", head + "\n".join(parts), {"board": shown}).encode())
    return path


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(argv: Sequence[str] | None = None) -> None:
    ask = _Parser(prog="python -m hdlm_jax.report.leaderboard", description=__doc__, allow_abbrev=False,
                  formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda value: tuple(filter(None, value.split(",")))  # noqa: E731
    ask.add_argument("run", nargs="*", help="workdir of a trained run, an export or an import; or NAME=WORKDIR")
    ask.add_argument("--out", default="leaderboard", help="folder for the page and all results (%(default)s)")
    helps = {"texts": "names, with commas between them", "questions": "the same; may be empty",
             "data": "folder of their files", "limit": "first documents and questions of each; 0: all",
             "draws": "of the noise, of diffusion models", "judge": "run, GPT-2 folder or fetched model",
             "samples": "texts drawn of each run", "length": "tokens of a sample", "steps": "of sampling by diffusion",
             "tensor": "devices that share a copy of a model too large for one"}
    for name, value in dataclasses.asdict(Protocol()).items():
        shown = ",".join(value) if isinstance(value, tuple) else str(value) or "nobody"
        ask.add_argument(f"--{name}", type=names if isinstance(value, tuple) else type(value), default=value,
                         help=f"{helps[name]} ({shown})")
    try:
        given = vars(ask.parse_intermixed_args(argv))
        runs, out = leaderboard.named(given.pop("run")), given.pop("out")
        logging.set_verbosity(logging.ERROR)
        parallel.keep_compiled()
        board = leaderboard.measure(runs, out, Protocol(**given))
        say(f"leaderboard: {write(board, out, plans(PLANS))}")
    except (ValueError, OSError) as error:
        if os.environ.get("HDLM_TRACEBACK"):
            raise
        sys.exit(f"leaderboard: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        print("leaderboard: interrupted; the same command goes on where it was", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
