"""Pictures of what a run looks like: its page, runs side by side, watched, served, and in a terminal.

    python -m tools.pictures runs/quickstart/hdlm_tiny runs/quickstart/mdlm_tiny [--out=docs/pictures] [--only=watch]

The first run is shown, trained, evaluated and sampled from; all of them are compared. Needs playwright and a Chromium
(pip install '.[browser,serve,chat]'). Each page at 1,280 and 400 pixels, as PNG of 256 colours. The watched run is the
first one half way: a copy whose last records are left out.
"""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from hdlm_jax.common.extras import package
from hdlm_jax.report import __main__ as report
from hdlm_jax.report import page, run_files, watch
from tools import cli

WIDTHS = {1280: 860, 400: 800}  # and the heights, in pixels
PROMPT = "The return value is"
NAMES = ("report", "runs", "watch", "served", "compared", "chat")


def keep(raw: bytes, path: Path) -> None:
    """Writes a picture with as few bytes as its colours need."""
    Image.open(io.BytesIO(raw)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"pictures: {path} ({path.stat().st_size / 1024:.0f} KiB)")


@contextlib.contextmanager
def served(run: str) -> Iterator[str]:
    """The address of a server of the run."""
    server = subprocess.Popen([sys.executable, "-m", "hdlm_jax.main", "serve", run, "--port=0"], text=True,
                              stdout=subprocess.PIPE)
    try:
        line = next(line for line in server.stdout or () if line.startswith("serve: "))
        yield re.findall(r"http://\S+:\d+", line)[0]
    finally:
        server.terminate()
        server.wait(60)


@contextlib.contextmanager
def watched(run: str, folder: str) -> Iterator[str]:
    """The address of a page that watches the run half way."""
    half = shutil.copytree(run, os.path.join(folder, os.path.basename(run)), ignore=shutil.ignore_patterns(
        "checkpoints", "metrics.jsonl", "evaluate.json", "tasks.json"))
    lines = Path(run, "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    Path(half, "metrics.jsonl").write_text("".join(lines[: max(1, len(lines) // 2)]), encoding="utf-8")
    server = watch.serve(half, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def write(tab: Any, address: str, both: bool, until: str) -> None:
    """A text of the served page, once it has come so far; the second one, as the first compiles."""
    tab.goto(address)
    tab.wait_for_selector("html[data-ready]")
    tab.fill("#prompt", PROMPT)
    tab.fill("#seed", "1")
    tab.fill("#tokens", "60")
    tab.locator("#method1").select_option("ancestral")
    tab.fill("#steps1", "64")
    if both:
        tab.check("#both")
    for reached in (DONE, until):
        tab.click("#write")
        tab.wait_for_timeout(500)
        while not tab.evaluate(reached):
            tab.wait_for_timeout(20)
    tab.locator("#status1").evaluate("s => scrollTo(0, s.getBoundingClientRect().top + scrollY - 400)")


FALLING = "+(document.querySelector('#status1')?.dataset.counts || '0,0,999').split(',').at(-1) < 24"
DONE = "document.querySelector('[data-part=live]').dataset.state === 'done'"


def pages(browser: Any, out: Path, runs: Sequence[str], only: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        file = Path(folder, "report.html")
        file.write_text(page.run_page(run_files.gather(runs[0])), encoding="utf-8")
        report.main([f"--html={folder}/runs.html", *runs])
        places = {"report": file.as_uri(), "runs": Path(folder, "runs.html").as_uri(),
                  "watch": stack.enter_context(watched(runs[0], folder)) if "watch" in only else ""}
        address = stack.enter_context(served(runs[0])) if {"served", "compared"} & set(only) else ""
        for name in (one for one in only if one != "chat"):
            for width, height in WIDTHS.items():
                tab = browser.new_page(viewport={"width": width, "height": height})
                if name in places:
                    tab.goto(places[name])
                    tab.wait_for_selector("html[data-ready]")
                else:
                    write(tab, address, name == "compared", FALLING if name == "served" else DONE)
                keep(tab.screenshot(), out / f"{name}-{width}.png")
                tab.close()


def terminal(run: str, lines: Sequence[str]) -> list[str]:
    """What `hdlm-jax chat RUN` writes to a terminal of 100 columns, split where a canvas is drawn anew."""
    child, master = pty.fork()
    if not child:
        os.environ |= {"COLUMNS": "100", "LINES": "40", "TERM": "xterm-256color"}
        os.execv(sys.executable, [sys.executable, "-m", "hdlm_jax.main", "chat", run])
    seen, sent = b"", 0
    with contextlib.suppress(OSError):  # it has ended
        while more := os.read(master, 1 << 16):
            seen += more
            if seen.endswith(b"> ") and sent < len(lines):
                time.sleep(0.2)
                os.write(master, f"{lines[sent]}\n".encode())
                sent += 1
    os.waitpid(child, 0)
    return re.split(r"(?:\r?\x1b\[2K|\x1b\[1A)+", seen.decode(errors="replace"))


def chat_picture(browser: Any, out: Path, run: str) -> None:
    """A text half way and done, one below the other."""
    frames = terminal(run, ["/steps 64", "/seed 1", "/length 96", PROMPT, "/quit"])
    rich = {name: package(f"rich.{name}", "chat", "the picture of a terminal") for name in ("console", "text")}
    screen = rich["console"].Console(record=True, width=100, file=io.StringIO(), force_terminal=True)
    start = frames[0].replace("\r", "")
    for part in (start, "\n[...]\n", frames[len(frames) // 2], "\n[...]\n", frames[-1]):
        screen.print(rich["text"].Text.from_ansi(re.sub(r"\x1b\[\?25[lh]", "", part.replace("\r", ""))), end="")
    tab = browser.new_page(viewport={"width": 1000, "height": 900})
    tab.set_content(screen.export_svg(title=f"hdlm-jax chat {run}"))
    keep(tab.locator("svg").first.screenshot(), out / "chat.png")
    tab.close()


def main(argv: Sequence[str] | None = None) -> None:
    with cli.one_line("pictures"):
        ask = cli.Parser("pictures", __doc__)
        ask.add_argument("runs", nargs="+")
        ask.add_argument("--out", type=Path, default=Path("docs/pictures"))
        ask.add_argument("--only", type=cli.listed(str), default=list(NAMES), help=f"of {', '.join(NAMES)}")
        given = ask.parse_args(argv)
        api = package("playwright.sync_api", "browser", "tools.pictures")
        names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
        where = next(filter(None, map(shutil.which, names)), None)
        with api.sync_playwright() as tool:
            browser = tool.chromium.launch(executable_path=where, args=["--no-sandbox", "--disable-gpu"])
            pages(browser, given.out, given.runs, given.only)
            if "chat" in given.only:
                chat_picture(browser, given.out, given.runs[0])
            browser.close()


if __name__ == "__main__":
    main()
