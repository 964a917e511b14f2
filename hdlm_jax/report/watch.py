"""The page of a run while it trains: hdlm-jax watch RUN [--port=8000]

Served on this machine alone (from elsewhere: ssh -L 8000:localhost:8000 HOST). The page asks every two seconds for the
records it has not seen, and loads itself anew when another file of the run has changed. The run is only read.
"""

from __future__ import annotations

import argparse
import html
import importlib.resources
import os
import time
import urllib.parse
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax

from hdlm_jax.common import jsons
from hdlm_jax.common.console import lasts, readable, say
from hdlm_jax.common.jsons import Json
from hdlm_jax.config import expand
from hdlm_jax.report import page, run_files
from hdlm_jax.runs.train import LATEST
from hdlm_jax.training.metrics import read_metrics

SAMPLES = 4  # shown, at most
_FILES = ("config.json", "hierarchy.npz", "evaluate.json", "generate.json", "samples.jsonl", "trajectories.npz",
          "tasks.json", LATEST)


def mark(workdir: str) -> str:
    """Another text once a file of the run is another, or metrics.jsonl begun anew; "" before there is a run.

    Records behind those that are there change nothing.
    """
    if not os.path.exists(os.path.join(workdir, "config.json")):
        return ""
    seen = []
    for name in (*_FILES, "metrics.jsonl"):
        try:
            found = os.stat(os.path.join(workdir, name))
            seen.append(f"{found.st_ino}" + f":{found.st_mtime_ns}" * (name != "metrics.jsonl"))
        except FileNotFoundError:
            seen.append("")
    return " ".join(seen)


def facts(records: Sequence[Json], steps: int, now: float, written: float) -> list[tuple[str, str, str]]:
    """(number, unit, what it is) of the newest records; now, when they were written: seconds."""
    trained = [r for r in records if r.get("loss") is not None]
    valid = [r for r in records if r.get("valid_nelbo") is not None]
    if not trained:
        return [("–", "", "no record yet: compiling, or the first steps")]
    last, step = trained[-1], int(trained[-1]["step"])
    out = [(f"{step:,}", f"of {steps:,}, {100 * step / steps:.0f} %", "step"),
           (readable(last.get("nelbo")), "nats/token", "NELBO, training batches (noisy)"),
           (readable(last["loss"]), "nats/token", "weighted loss")]
    if valid:
        out.append((readable(valid[-1]["valid_nelbo"]), f"± {readable(valid[-1].get('valid_se'))} nats/token",
                    f"NELBO, validation, step {valid[-1]['step']:,}"))
    if rate := last.get("tokens_per_s"):
        out.append((f"{rate:,.0f}", "tokens/s", "speed"))
        if step < steps:
            out.append((lasts((steps - step) * last["tokens"] / step / rate), "", "left"))
    if mfu := last.get("mfu"):
        out.append((f"{100 * mfu:.1f}", "%", "MFU"))
    return [*out, (lasts(max(now - written, 0)), "ago", "newest record")]


def state(workdir: str, since: int = 0) -> Json:
    """What a page asks for: `mark`, the number of records, the curves of those from `since` on, and `facts`."""
    seen, path = mark(workdir), os.path.join(workdir, "metrics.jsonl")
    records = read_metrics(path) if seen else []
    told = []
    if seen:
        steps = jsons.read_json(os.path.join(workdir, "config.json"), "train")["train"]["steps"]
        told = facts(records, steps, time.time(), os.path.getmtime(path) if records else 0)
    return {"mark": seen, "count": len(records), "curves": run_files.curves_of(records[since:]), "facts": told}


def _samples(workdir: str) -> str:
    made = run_files.read_optional(workdir, "generate.json") or {}
    texts = [r["text"] for r in jsons.read_lines(os.path.join(workdir, "samples.jsonl"))[0] if "text" in r][:SAMPLES]
    latest = run_files.read_optional(workdir, LATEST)
    if latest and latest["step"] > made.get("step", -1):
        made, texts = latest, latest["texts"]
    if not texts:
        return page.section("samples", "Samples", "", page.missing(
            "No samples yet; --config.train.sample_every=500 draws some, or beside the training:", workdir,
            "generate --config.generate.checkpoint=latest"))
    return page.section("samples", "Latest samples", f"Of step {made['step']:,}." if "step" in made else "", "".join(
        f"<pre>{html.escape(text)}</pre>" for text in texts))


def live_page(workdir: str) -> str:
    """The run's page with what it tells while it trains; before there is a run, one that waits for it."""
    now = state(workdir)
    name = os.path.basename(os.path.abspath(workdir))
    program = (importlib.resources.files("hdlm_jax.report") / "watch.js").read_text("utf-8")
    data = {"live": {"mark": now["mark"], "count": now["count"]}}
    told = f"<div data-part=live>{page.facts(now['facts'])}</div><p data-part=state></p>"
    if not now["mark"]:
        body = (f"<header><p class=kicker>hdlm_jax</p><h1>{html.escape(name)}</h1><p class=lead>No run there yet; this "
                f"page waits for it.</p></header>{told}")
        return page.document(f"{name} – hdlm_jax", body, data, program)
    run = run_files.gather(workdir) | {"curves": now["curves"]}
    return page.run_page(run, page.section("live", "Now", "", told), _samples(workdir), data, program)


def serve(workdir: str, port: int) -> ThreadingHTTPServer:
    """A server of the page on 127.0.0.1, port 0 any that is free; `serve_forever` runs it.

    Raises:
      OSError: the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            code, kind, text = 200, "text/html", ""
            try:
                if (self.headers.get("Host") or "").rpartition(":")[0] not in ("127.0.0.1", "localhost"):
                    code, text = 403, "this page is for this machine alone"  # not for other sites in its browser
                elif path == "/":
                    text = live_page(workdir)
                elif path == "/state.json":
                    since = urllib.parse.parse_qs(query).get("since", ["0"])[0]
                    kind, text = "application/json", jsons.dumps(state(workdir, int(since)))
                else:
                    code, text = 404, "no such page"
            except (OSError, ValueError) as error:  # a file that is just being made
                code, text = 503, f"{html.escape(str(error))}; load this page again"
            raw = text.encode()
            self.send_response(code)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(raw)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main(argv: Sequence[str] | None = None) -> None:
    ask = argparse.ArgumentParser(prog="hdlm-jax watch", allow_abbrev=False,
                                  description="A run's page on this machine, new every two seconds while it trains.")
    ask.add_argument("run", help="the workdir of the run")
    ask.add_argument("--port", type=int, default=8000, help="default 8000; 0: any that is free")
    given = ask.parse_args(argv)
    workdir = expand(given.run)
    if not os.path.isdir(workdir):
        raise SystemExit(f"watch: {workdir!r}: no such folder; give the --workdir of a run")
    jax.config.update("jax_platforms", "cpu")  # whatever the page needs, the accelerator is the training's
    try:
        server = serve(workdir, given.port)
    except (OSError, OverflowError) as error:
        raise SystemExit(f"watch: --port={given.port}: {error}; give another one, or 0 for any that is free") from error
    say(f"watch: http://127.0.0.1:{server.server_port}/ shows {workdir}; Ctrl-C ends it")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
