"""Zero-shot tasks of a run: perplexities of other corpora, and questions answered by the likeliest choice.

Perplexities count every token of every document once, its end of text too: "document", each document by itself, in
pieces of S where it is longer; "packed", all one after the other, cut into windows of S, the last window too. `given`
says what a bound is conditional on (docs/theory.md section 7). bits per byte are of the UTF-8 bytes of the
*detokenised* text, and the perplexity by words divides all nats by the words of the *original* (blank-separated, one
more for each line end), as the field does. `se` is of the documents as a sample and of the noise (elbo.summarise;
pieces of one document count as different rows).
"""

from __future__ import annotations

import math
import os
import time

import numpy as np

from hdlm_jax.common import jsons, processes
from hdlm_jax.common.console import markdown, say
from hdlm_jax.common.console import perplexity as exp
from hdlm_jax.common.jsons import Json, read_json, write_atomic, write_json
from hdlm_jax.config import Config, ConfigError
from hdlm_jax.data.documents import Reader
from hdlm_jax.data.sources import resolve
from hdlm_jax.evaluation import benchmarks
from hdlm_jax.evaluation.benchmarks import TASKS, Passage, Question
from hdlm_jax.evaluation.elbo import residuals, summarise
from hdlm_jax.evaluation.problems import solve
from hdlm_jax.evaluation.rows import per_text, split, split_all
from hdlm_jax.evaluation.scorer import Choices, Scorer, encode_pair
from hdlm_jax.evaluation.text_statistics import in_percent, share_of
from hdlm_jax.training.loading import check_writable, load_run


def perplexity(scorer: Scorer, passages: list[Passage], protocol: str, words: bool) -> Json:
    """Nats per token, bits per byte and perplexities of documents, with standard errors. words: those by words too.

    With the protocol "document" by_document has nats float64, tokens and bytes int64 of each, all [n], and residuals
    float64 [n], what each adds to the error of nats a byte (elbo.residuals).
    """
    tokenizer, started = scorer.run.tokenizer, time.monotonic()
    ids = [np.append(found, np.int32(tokenizer.eot)) for found in tokenizer.encode_batch([p.text for p in passages])]
    run, s = scorer.run, scorer.seq_len
    packed = protocol == "packed"
    pieces, owner = (split(np.concatenate(ids), s), None) if packed else split_all(ids, s, ends=run.ends)
    tokens = np.array([len(p.ids) for p in pieces])
    nats, tau, q = scorer.nats(pieces, scorer.settings.draws)
    found = summarise(nats, tokens, tau, q)
    sizes = np.array([len(p.text.encode()) for p in passages])
    size = int(sizes.sum())
    per_byte = found["tokens"] / size / math.log(2)
    found |= {"given": "nothing" if packed else run.given_alone,
              "perplexity_se": found["perplexity"] * found["se"], "documents": len(passages), "bytes": size,
              "bits_per_byte": found["nelbo"] * per_byte, "bits_per_byte_se": found["se"] * per_byte}
    if owner is not None:
        of_document = per_text(tokens, owner, len(ids))
        rest = residuals(nats, tokens * (sizes / of_document)[owner], tau).sum(0)
        found["by_document"] = {"nats": per_text(nats.mean(0).sum(-1), owner, len(ids)), "tokens": of_document,
                                "bytes": sizes, "residuals": per_text(rest, owner, len(ids))}
    if words:
        count = sum(p.words for p in passages)
        per_word = found["tokens"] / count
        by_word = exp(found["nelbo"] * per_word)
        found |= {"words": count, "word_perplexity": by_word, "word_perplexity_se": by_word * found["se"] * per_word}
    return found | {"seconds": time.monotonic() - started}


def _chance(questions: list[Question]) -> float | None:
    """What guessing would give; None where there is nothing to choose from."""
    choices = [len(q.choices) for q in questions]
    return float(np.mean(1 / np.array(choices))) if max(choices) > 1 else None


def ranking(scorer: Scorer, questions: list[Question]) -> Json:
    """Accuracy by the conditional NELBO of the choices; of single choices its perplexity and the greedy one."""
    started, tokenizer = time.monotonic(), scorer.run.tokenizer
    encoded = [[encode_pair(tokenizer, *pair) for pair in zip(q.contexts, q.choices, strict=True)] for q in questions]
    asked = [Choices(*zip(*pairs, strict=True)) for pairs in encoded]
    found = scorer.rank(asked)
    label = np.array([q.label for q in questions])
    tokens = [np.array([len(c) for c in a.choices]) for a in asked]
    right = np.array([nats[i] for nats, i in zip(found.nats, label, strict=True)])
    length = np.array([n[i] for n, i in zip(tokens, label, strict=True)])
    out: Json = {
        "given": scorer.run.given_alone,
        "questions": len(questions), "draws": float(found.draws.mean()), "reached": float(found.reached.mean()),
        "cut": int(found.cut.sum()), "nelbo_of_right": float(right.sum() / length.sum()), "tokens": int(length.sum())}
    if max(len(q.choices) for q in questions) > 1:
        characters = [np.array([len(c.strip()) for c in q.choices]) for q in questions]
        for name, by in (("", None), ("_per_token", tokens), ("_per_character", characters)):
            best = [np.argmin(nats / np.maximum(by[i], 1) if by else nats) for i, nats in enumerate(found.nats)]
            out[f"accuracy{name}"], out[f"accuracy{name}_se"] = share_of(np.array(best) == label)
    else:
        out["accuracy"], out["accuracy_se"] = share_of(scorer.hits([pairs[0] for pairs in encoded]))
        se = right.std(ddof=1) / math.sqrt(len(right)) if len(right) > 1 else math.nan
        by_word = exp(float(right.mean()))
        out |= {"word_nats": float(right.mean()), "word_nats_se": float(se),
                "word_perplexity": by_word, "word_perplexity_se": by_word * float(se)}
    return out | {"seconds": time.monotonic() - started}


def sources(config: Config) -> dict[str, str | list[str]]:
    """Where the data of each task asked for is; ConfigError where it is not."""
    e, formats = config.evaluate, {"files": config.data.format, "lm1b": "txt"}
    try:
        return {name: benchmarks.find(name, e.tasks_data) if TASKS[name].path
                else resolve(getattr(e, name), f"evaluate.{name}", formats[name], say) for name in e.tasks}
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _read(config: Config, name: str, source: str | list[str]) -> tuple[list, str]:
    """The items of a task and the detokeniser they went through."""
    d, task = config.data, TASKS[name]
    reader = Reader(d.text_field, "", "line" if name == "lm1b" else d.txt_documents,
                    "txt" if name == "lm1b" else d.format, d.detokenize if name == "files" else "")
    return benchmarks.load(name, source, config.evaluate.limit, reader), reader.detokenize or task.detokenize


def run(config: Config, workdir: str, into: str = "") -> Json:
    """Runs config.evaluate.tasks; writes and returns <workdir>/tasks.json, and tasks.md, a table of it.

    The file grows by one entry a task (a task and protocol for perplexities), so a run that was stopped goes on where
    it was; an entry made from the same checkpoint, texts and settings is reused, others of the file stay. Nats of each
    document go to tasks_<task>.npz, for paired comparisons. into: a folder for all of it in place of workdir.

    Raises:
      ConfigError: no such run, or data that is not there or cannot be read, before anything is computed.
    """
    e, into = config.evaluate, into or workdir
    data = {name: _read(config, name, source) for name, source in sources(config).items()}
    loaded = load_run(config, workdir, e.checkpoint, e.ema)
    check_writable(into)
    path = os.path.join(into, "tasks.json")
    results: Json = processes.on_main_process(lambda: read_json(path, optional=True)) or {}
    scorer = Scorer(loaded, e)
    for name, (items, detokenizer) in data.items():
        task = TASKS[name]
        made_from: Json = {
            "step": loaded.step, "ema": loaded.ema, "hierarchy_fingerprint": loaded.hierarchy.fingerprint,
            "text": benchmarks.fingerprint(items), "draws": e.draws, "seed": e.seed, "cv2": e.cv2}
        g = config.generate
        if task.writes:
            made_from |= {"generate": [g.seed, g.method, g.options, g.steps, g.temperature, g.top_p, g.length]}
        if task.ranks:  # g: of the words filled in greedily
            made_from |= {"target_se": e.target_se, "most_draws": e.most_draws,
                          "generate": [g.seed, g.clusters, g.force_transition, g.steps]}
        for protocol in ("",) if task.ranks or task.writes else e.protocols:
            key = f"{name}/{protocol}" if protocol else name
            if (old := results.get(key)) and old["made_from"] == made_from and "given" in old:
                old.setdefault("chance", _chance(items) if task.ranks else None)
                say(f"tasks: reusing {key} of step {loaded.step}: {_line(old)}")
                continue
            found: Json = (ranking(scorer, items) if task.ranks else
                           {"given": "nothing", **solve(loaded, items, g)} if task.writes else
                           perplexity(scorer, items, protocol, task.words))
            kind = "ranking" if task.ranks else "writing" if task.writes else "perplexity"
            about = {"task": name, "kind": kind, "protocol": protocol or None,
                     "detokenizer": detokenizer or None, "limited": bool(e.limit and len(items) == e.limit),
                     "note": task.note, "made_from": made_from, "chance": _chance(items) if task.ranks else None}
            documents = found.pop("by_document", None)
            results[key] = about | jsons.plain(found)
            say(f"tasks: {key}: {_line(results[key])}")
            if processes.is_main_process():
                if documents:
                    jsons.write_arrays(os.path.join(into, f"tasks_{name}.npz"),
                                       {"made_from": np.asarray(jsons.dumps(made_from)), **documents})
                write_json(path, results)
    wanted = [k for k, r in results.items() if r["made_from"]["step"] == loaded.step
              and r["made_from"]["ema"] == loaded.ema]
    text = table({k: results[k] for k in wanted}, loaded.step)
    if processes.is_main_process():
        write_atomic(os.path.join(into, "tasks.md"), text.encode())
    say(f"tasks: {os.path.join(into, 'tasks.md')}\n{text}")
    return results


def _with_se(found: Json, name: str, digits: int) -> str:
    value, se = found.get(name), found.get(f"{name}_se" if name != "nelbo" else "se")
    if value is None:
        return ""
    shown = f",.{digits}f" if value < 1e6 else ".3g"
    return f"{value:{shown}}" + (f" ± {se:{shown}}" if se is not None else "")


def _accuracy(found: Json, by: str = "") -> str:
    share = found.get(f"accuracy{by}")
    return "" if share is None else in_percent(share, found["questions"])


def _line(found: Json) -> str:
    seconds = f"{found['seconds']:.0f} s"
    if found["kind"] == "perplexity":
        nats, bits, per_token = (_with_se(found, name, digits) or "-" for name, digits in (
            ("nelbo", 4), ("bits_per_byte", 4), ("perplexity", 2)))
        return (f"{nats} nats/token, {bits} bits/byte, perplexity {per_token}, {found['tokens']:,} tokens x "
                f"{found['draws']}, {seconds}")
    if found["kind"] == "writing":
        return (f"accuracy {_accuracy(found)} %, {found['questions']:,} problems, "
                f"{100 * found['answered']:.0f} % answered with a number, {found['calls']:.0f} calls each, {seconds}")
    chance = f" (chance {100 * found['chance']:.1f})" if found.get("chance") else ""
    return (f"accuracy {_accuracy(found)} %{chance}, {found['questions']:,} questions x "
            f"{found['draws']:.1f} draws, {seconds}")


def newest(results: Json) -> Json:
    """Of tasks.json what was measured on the latest of its checkpoints."""
    step = max((r["made_from"]["step"] for r in results.values()), default=0)
    return {name: r for name, r in results.items() if r["made_from"]["step"] == step}


def rows(results: Json) -> list[list[list[str]]]:
    """Results as tables of text, one of perplexities and one of answers, their heads first; none that is empty."""
    texts = [["text", "protocol", "given", "detokeniser", "nats/token", "bits/byte", "perplexity", "by words", "tokens",
              "documents", "draws"]]
    texts += [[r["task"] + "*" * r["limited"], r["protocol"], r.get("given", "?"), r["detokenizer"] or "none",
               _with_se(r, "nelbo", 4),
               _with_se(r, "bits_per_byte", 4), _with_se(r, "perplexity", 2), _with_se(r, "word_perplexity", 1),
               f"{r['tokens']:,}", f"{r['documents']:,}", str(r["draws"])]
              for r in results.values() if r["kind"] == "perplexity"]
    asked = [["questions", "given", "accuracy %", "per token", "per character", "chance %", "perplexity", "number",
              "draws", "reached", "cut"]]
    asked += [[r["task"] + "*" * r["limited"], r.get("given", "?"),
               *(_accuracy(r, by) for by in ("", "_per_token", "_per_character")),
               f"{100 * r['chance']:.1f}" if r.get("chance") else "",
               _with_se(r, "word_perplexity", 1), f"{r['questions']:,}", f"{r['draws']:.1f}",
               f"{100 * r['reached']:.0f} %", str(r["cut"])] for r in results.values() if r["kind"] == "ranking"]
    written = [["problems", "accuracy %", "answered", "number", "method", "calls"]]
    written += [[r["task"] + "*" * r["limited"], _accuracy(r), f"{100 * r['answered']:.0f} %",
                 f"{r['questions']:,}", r["method"], f"{r['calls']:.0f}"]
                for r in results.values() if r["kind"] == "writing"]
    return [t for t in (texts, asked, written) if len(t) > 1]


HOW = ("± is one standard error, [ , ] the 95 % Wilson interval of an accuracy, chance what guessing among the choices "
       "would give; * the first documents or questions alone (evaluate.limit)")


def table(results: Json, step: int) -> str:
    """Markdown of the results, each with its error or interval, as HOW says."""
    lines = [f"Step {step:,}; {HOW}. Given: what the bound is conditional on, the lengths of texts or nothing."]
    for head, *cells in rows(results):
        lines += ["", markdown(head, cells)]
    notes = {f"{r['task']}: {r['note']}." for r in results.values() if r["note"]}
    return "\n".join(lines + [""] * bool(notes) + sorted(notes)) + "\n"
