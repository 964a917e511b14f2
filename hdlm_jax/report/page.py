"""The page of one run: what `gather` found as one HTML file.

A page needs nothing but itself: styles and program are in it, the data is a JSON block, and no text of a run is ever
read as markup. What a run does not have yet is named together with the command that makes it.
"""

from __future__ import annotations

import html
import importlib.resources
import os
import re
from collections.abc import Iterable, Sequence

from hdlm_jax.common import jsons, processes
from hdlm_jax.common.console import readable, say
from hdlm_jax.common.jsons import Json, write_atomic
from hdlm_jax.report.run_files import gather
from hdlm_jax.runs import tasks
from hdlm_jax.training.loading import check_writable, saved_config


def embed(data: object) -> str:
    """JSON that can stand inside a <script> element: no '<', '>' or '&', and no line separators of Unicode."""
    text = jsons.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)


def html_table(rows: Sequence[Sequence[object]], head: Sequence[str]) -> str:
    """A <table>; columns of numbers are set to the right, each cell names its column for narrow screens."""
    def show(value: object) -> str:
        if value is None:
            return "–"
        counted = isinstance(value, int) and not isinstance(value, bool)
        text = f"{value:,}" if counted else f"{value:,.4g}" if isinstance(value, float) else str(value)
        return re.sub("([±≤≈→]) ", "\\1\u00a0", text)  # lines break before the error

    texts = [[show(value) for value in row] for row in rows]
    number = [all(re.fullmatch(r"([–-]|([≤≈]\u00a0)?[-+]?[\d,.]+(e[-+]\d+)?( ±.*| \[.*)?)?", text) for text in column)
              for column in zip(*texts, strict=True)]
    sides = [" class=n" if right else "" for right in number]
    names = [html.escape(name) for name in head]
    top = "".join(f"<th scope=col{side}>{name}</th>" for name, side in zip(names, sides, strict=True))
    body = "".join("<tr>" + "".join(f'<td{side} data-name="{name}">{html.escape(text)}</td>'
                                    for text, name, side in zip(row, names, sides, strict=True)) + "</tr>"
                   for row in texts)
    return f"<div class=wide><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def section(name: str, title: str, intro: str, body: str) -> str:
    """A part of a page; intro and body are HTML, the title is text."""
    head = f"<h2 id={name}-h>{html.escape(title)}</h2>" + (f"<p>{intro}</p>" if intro else "")
    return f"<section id={name} aria-labelledby={name}-h>{head}{body}</section>"


def missing(what: str, workdir: str, mode: str) -> str:
    """A line in place of what is not there: the command that makes it."""
    command = f"hdlm-jax --workdir={workdir} --mode={mode}"
    return f"<p class=missing>{html.escape(what)} <code>{html.escape(command)}</code></p>"


def document(title: str, body: str, data: object, more: str = "") -> str:
    """One self-contained page of sections in HTML and the data that report.js draws; more: a program behind it."""
    here = importlib.resources.files("hdlm_jax.report")
    parts = {"title": html.escape(title), "body": body, "data": embed(data),
             "program": (here / "report.js").read_text("utf-8") + more}
    template = (here / "report.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def facts(pairs: Iterable[tuple[str, str, str]]) -> str:
    """Numbers to read at a glance: (value, unit or ± part, what it is)."""
    def item(value: str, rest: str, name: str) -> str:
        value, rest, name = map(html.escape, (value, rest, name))
        return f"<div><dt>{name}</dt><dd><b>{value}</b> <span>{rest}</span></dd></div>"

    return f"<dl class=facts>{''.join(item(*pair) for pair in pairs)}</dl>"


def kind_of(process: str, sizes: Sequence[int]) -> str:
    """MDLM, HDLM or another process, by the sizes of the levels (words, clusters, 1)."""
    return ("MDLM" if len(sizes) == 2 else "HDLM") if process == "hierarchical" else process


def levels_of(process: str, sizes: Sequence[int]) -> str:
    """'4,096 words → 64 clusters → mask'; '' where the sizes are not known."""
    names = [f"{n:,} {'clusters' if i else 'words'}" for i, n in enumerate(sizes[:-1])]
    return " → ".join(names + ["mask"] * bool(names and process != "autoregressive"))


def describe(run: Json) -> str:
    """What was trained, in two sentences."""
    c, e = run["config"], run["evaluate"] or {}
    h, m, d, t = run["hierarchy"], c["model"], c["diffusion"], c["train"]
    sizes = h["sizes"] if h else e.get("hierarchy") or []
    kind, levels = kind_of(run["process"], sizes), levels_of(run["process"], sizes)
    parts = [f"{kind}: {levels}" if levels else kind, f"ξ = {d['xi']:g}" if d["xi"] != 1 else "",
             f"channel c = {d['channel']:g} ({d.get('channel_times', 'shared')})" if d.get("channel") else "",
             f"{d['latents']} latents of {d['latents_width']} numbers first" if d.get("latents") else "",
             f"{c['tokenizer']['kind']} tokenizer", f"{m['blocks']} blocks of width {m['width']}, "
             f"{'tied' if m.get('tied') else m['head']} head",
             f"sequences of {m['seq_len']:,} tokens"]
    tokens = ((run["curves"] or {}).get("train") or {"tokens": []})["tokens"]
    trained = f" Trained on {tokens[-1]:,} tokens, {t['batch_size']} sequences a step" if tokens else " Not trained yet"
    made = [f"{t['steps']:,} steps planned", f"learning rate {c['optimizer']['lr']:g}", f"seed {t['seed']}"]
    return ", ".join(filter(None, parts)) + "." + f"{trained} ({', '.join(made)})."


def gain(evaluated: Json) -> float | None:
    """Nats a token below the unigram; None where the bound is not finite."""
    return None if evaluated["nelbo"] is None else evaluated["unigram_nelbo"] - evaluated["nelbo"]


def headline(run: Json) -> str:
    """The header's numbers, each only where it is known."""
    e, g, out = run["evaluate"], run["generate"], []
    if e:
        told = ", given lengths" * (e.get("given") == "lengths")
        out += [(readable(e["nelbo"]), f"± {readable(e['se'])} nats/token", f"NELBO{told}"),
                (readable(e["perplexity"], ".1f"), f"± {readable(e['perplexity_se'], '.1f')}",
                 "perplexity" + ", at most" * (run["process"] != "autoregressive") + told)]
        if e.get("whole_split"):
            out.append((readable(e["bits_per_byte"]), f"± {readable(e['bits_per_byte_se'])}", "bits/byte"))
        out += [(readable(gain(e), ".2f"), "nats/token", "below the unigram"),
                (f"{e['step']:,}", "", "step"), (f"{e['params']:,}" if "params" in e else "–", "", "parameters")]
    tokens = run["curves"]["train"]["tokens"] if run["curves"] else []
    if tokens:
        out.append((f"{tokens[-1]:,}", "", "training tokens"))
    if run["train_speed"]:
        out.append((f"{run['train_speed']:,.0f}", "tokens/s", "training"))
    if g:
        out.append((f"{g['tokens_per_s']:,.0f}", "tokens/s", f"sampling, {g['network_calls']:.0f} calls"))
        judge = g.get("judge") or {}
        for end, sign in (("", ""), ("_bound", "≤ ")):
            if judge.get(f"perplexity{end}") is not None:
                out.append((f"{sign}{judge[f'perplexity{end}']:.1f}", f"under {judge['judge']}",
                            "generative perplexity"))
        if judge.get("unigram_entropy") is not None:
            out.append((f"{judge['unigram_entropy']:.2f}", "nats", "entropy of the samples"))
    return facts(out) if out else ""


def about(workdir: str) -> Json:
    """What a page is told of a run that is served: name, description, and its words and clusters."""
    run = gather(workdir)
    return {"name": run["name"], "description": describe(run), "hierarchy": run["hierarchy"]}


def served() -> str:
    """The page that any served run comes with (runs/serve.py): type, choose a method, and watch the text fall."""
    program = (importlib.resources.files("hdlm_jax.report") / "serve.js").read_text("utf-8")
    return document("hdlm_jax", "<div data-part=live></div>", {}, program)


_WAYS = {
    "hierarchical": "Every token starts at the mask and falls, level by level, until it is a word.",
    "gidd": "Every token starts at the mask; a word may still be replaced, or masked again, until the last call.",
    "autoregressive": "Words are drawn from left to right, each given those before it.",
}


def run_page(run: Json, first: str = "", then: str = "", data: Json | None = None, program: str = "") -> str:
    """The page of one run from what `gather` found.

    Of hdlm-jax watch: sections before and behind the curves, which come first there, more data, and a program.
    """
    name, workdir, film, levels = html.escape(run["name"]), run["workdir"], run["trajectories"], run["occupancy"]
    hierarchical = run["process"] == "hierarchical"
    lack = lambda what, mode: missing(what, workdir, mode)  # noqa: E731
    head = (f"<header><p class=kicker>hdlm_jax run report</p><h1>{name}</h1><p class=lead>{html.escape(describe(run))}"
            f"</p>{headline(run)}" + ("" if run["evaluate"] or first else lack("Not evaluated yet:", "evaluate"))
            + "</header>")
    viewer = (f"{_WAYS.get(run['process'], _WAYS['hierarchical'])} Move through the network's calls with the slider, "
              "the arrow keys or the play button; point at a token for its history and the probability that the model "
              "gave to what was drawn.")
    training = ("Weighted loss of the training batches, and the bound (NELBO) and perplexity on validation text, over "
                "training tokens.")
    written = section("viewer", "How a text is written", viewer if film else "",
                      _part("viewer") if film else lack("No recorded samples yet:", "generate"))
    curves = section("curves", "Training", training if run["curves"] else "",
                     _part("curves") if run["curves"] else lack("Not trained yet:", "train"))
    parts = [head, first, curves, then, written] if first else [head, written, curves]
    if levels:
        said = "Lines: the forward process, β<sub>l</sub>(t)."
        if levels["points"]:
            said += (f" Dots: shares counted in the {levels['tokens']:,} recorded tokens on the way back; the band is "
                     "two standard errors of such a share.")
        counted = "" if levels["points"] else lack("Shares counted in recorded samples:", "generate")
        parts.append(section("levels", "Levels over time", said, _part("levels") + counted))
    clusters, said = run["hierarchy"], ""
    if not clusters:
        body = lack("Not clustered yet:", "cluster")
    elif len(clusters["sizes"]) > 2:
        how = "most frequent first" if clusters["counts"] else (
            "in the tokenizer's order, as the training tokens are not here")
        said, body = f"What the levels between word and mask hold; words {how}.", _part("clusters")
    else:
        kind = "words go straight to the mask (MDLM)" if hierarchical else "this process has none"
        body = f"<p class=missing>No clusters: {kind}.</p>"
    parts.append(section("clusters", "Clusters", said, body))
    measured = tasks.rows(tasks.newest(run["tasks"] or {}))
    if shown := "".join(html_table(cells, head) for head, *cells in measured):
        parts.append(section("tasks", "Zero-shot tasks", f"{tasks.HOW}.", shown))
    small = {k: run[k] for k in ("name", "curves", "hierarchy", "occupancy", "trajectories", "unigram")}
    parts.append("<section><details><summary>The whole configuration</summary>"
                 f"<pre>{html.escape(jsons.dumps(run['config'], indent=1))}</pre></details></section>")
    return document(f"{run['name']} – hdlm_jax", "\n".join(parts), {"run": small, **(data or {})}, program)


def _part(name: str) -> str:
    """Where report.js draws."""
    return f"<div data-part={name}></div>"


def write_run_page(workdir: str) -> str:
    """Writes <workdir>/report.html; gives back its path.

    What the run does not have yet (evaluation, samples, ...) is named there with its command.

    Raises:
      ConfigError: no run there.
    """
    saved_config(workdir)
    check_writable(workdir)
    path = os.path.join(workdir, "report.html")

    def write() -> None:
        write_atomic(path, run_page(gather(workdir)).encode())
        say(f"report: {path}, {os.path.getsize(path) / 1e6:.1f} MB, a page by itself")

    processes.on_main_process(write)
    return path
