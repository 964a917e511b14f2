"""Many clients at a served run: what is lost, how long they wait, and how near its texts a second are to the sampler's.

    python -m tools.serve_load RUN --clients=64 --seconds=60 [--steps=32] [--about=TEXT] >> docs/runs/serve_load.jsonl

Draws batches with the sampler alone, then starts `--mode=serve` on the run and lets the clients ask on loopback, each
again as soon as it has its answer, some of them leaving or sending nonsense in between (--rude). One JSON line: texts a
second of both, their share, also by CPU time (which others on the machine do not change), p50 and p95 of the seconds an
answer takes, requests lost, texts that are not those of `Model.generate` with the same seeds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import hdlm_jax
from hdlm_jax.common.console import markdown
from hdlm_jax.config import change
from hdlm_jax.decoding.sampler import sampler_of, start_canvas

PROMPTS = ("The ", "", "Return", "If the first argument")


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def sampler_speed(where: str, steps: int, batch: int, seconds: float) -> np.ndarray:
    """Texts a second of the sampler alone, in batches of `batch`, after a first one that compiles; and a CPU second."""
    run = hdlm_jax.load(where).run
    g = change("generate", run.config.generate, {"steps": steps, "batch_size": batch, "num_samples": batch})
    draw, canvas = sampler_of(run), start_canvas(run, g, np.zeros((batch, 0), np.int32))
    draw(canvas, g)
    made, began, used = 0, time.monotonic(), time.process_time()
    while time.monotonic() - began < seconds:
        draw(canvas, change("generate", g, {"seed": made}))
        made += batch
    return np.array([made / (time.monotonic() - began), made / (time.process_time() - used)])


async def ask(port: int, body: bytes, leaves: bool = False) -> tuple[int, bytes]:
    """(status, body) of a POST on a connection of its own; (0, b"") where the client leaves before its answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        if leaves:
            await asyncio.sleep(0.2)
            return 0, b""
        answer = await reader.read()
    finally:
        writer.close()
    first, _, rest = answer.partition(b"\r\n\r\n")
    return int(first.split()[1]) if first else -1, rest


class Load:
    """The clients, and what they were told."""

    def __init__(self, port: int, steps: int, seconds: float):
        self.port, self.steps, self.until = port, steps, time.monotonic() + seconds
        self.seconds: list[float] = []
        self.texts: dict[int, tuple[str, str]] = {}  # seed: prompt, answer
        self.lost: list[str] = []

    async def client(self, number: int) -> None:
        for turn in range(1_000_000):
            if time.monotonic() > self.until:
                return
            seed, prompt = number + 1000 * turn, PROMPTS[(number + turn) % len(PROMPTS)]
            body = {"prompt": prompt, "seed": seed, "steps": self.steps, "echo": True}
            began = time.monotonic()
            try:
                status, answer = await ask(self.port, json.dumps(body).encode())
                self.texts[seed] = prompt, json.loads(answer)["choices"][0]["text"]
                self.seconds.append(time.monotonic() - began)
            except (OSError, ValueError, KeyError) as error:
                self.lost.append(f"{type(error).__name__}: {error}")

    async def rude(self) -> None:
        """Nonsense, and clients that leave before they have their answer."""
        bad = (b"{", b"[" * 50_000, b'{"steps": 1e999}', b'{"method": "nothing"}', b"x" * (1 << 20) + b"y",
               b'{"prompt": "\\ud800"}')
        for turn in range(1_000_000):
            if time.monotonic() > self.until:
                return
            try:
                status, _ = await ask(self.port, bad[turn % len(bad)])
                if not 400 <= status < 500:
                    self.lost.append(f"nonsense was answered by {status}")
            except ConnectionError:
                pass  # the server does not read an oversized body to its end
            await ask(self.port, json.dumps({"prompt": "", "steps": self.steps}).encode(), leaves=True)

    async def run(self, clients: int, rude: bool) -> float:
        """Texts a second until the last answer."""
        began = time.monotonic()
        await asyncio.gather(*(self.client(i) for i in range(clients)), *([self.rude()] if rude else ()))
        return len(self.texts) / (time.monotonic() - began)


def differing(where: str, load: Load, check: int) -> int:
    """How many of `check` texts are not those of Model.generate with the same seed."""
    model, wrong = hdlm_jax.load(where), 0
    for seed in sorted(load.texts)[:: max(1, len(load.texts) // check)][:check]:
        prompt, text = load.texts[seed]
        wrong += model.generate(1, load.steps, prompt, seed=seed) != [text]
    return wrong


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown of what `main` gave, a row each."""
    head = ["", "clients", "requests", "lost", "not `generate`'s", "p50", "p95", "texts/s",
            "the sampler alone, before and after", "share", "share a CPU second"]
    return markdown(head, [[
        x["about"], str(x["clients"]), f"{x['requests']:,}", str(x["lost"]), f"{x['differ']} of {x['checked']}",
        f"{x['p50_s']:.1f} s", f"{x['p95_s']:.1f} s", f"{x['texts_per_s']:.2f}",
        ", ".join(f"{speed:.2f}" for speed in x["sampler_texts_per_s"]), f"{x['share']:.2f}",
        f"{x['share_per_cpu_second']:.3f}"] for x in lines])


def main(argv: Sequence[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    for name, value in (("clients", 64), ("seconds", 60), ("steps", 32), ("batch", 16), ("check", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--about", default="", help="what the table says of run and machine")
    parser.add_argument("--rude", action="store_true")
    a = parser.parse_args(argv)
    alone = [sampler_speed(a.run, a.steps, a.batch, a.seconds / 2)]
    server = subprocess.Popen([sys.executable, "-m", "hdlm_jax.main", "serve", a.run, "--port=0",
                               f"--config.serve.batch={a.batch}"], stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        line = next(line for line in server.stdout or () if line.startswith("serve: "))
        port = int(re.findall(r":(\d+) ", line)[0])
        asyncio.run(Load(port, a.steps, 1.0).run(a.clients, False))  # compiles
        load, used = Load(port, a.steps, a.seconds), cpu_seconds(server.pid)
        speed = asyncio.run(load.run(a.clients, a.rude))
        per_cpu = len(load.texts) / (cpu_seconds(server.pid) - used)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    alone.append(sampler_speed(a.run, a.steps, a.batch, a.seconds / 2))  # before and after: machines are not quiet
    p50, p95 = np.percentile(load.seconds, (50, 95))
    return {"about": a.about,
            "clients": a.clients, "seconds": a.seconds, "steps": a.steps, "batch": a.batch, "requests": len(load.texts),
            "lost": len(load.lost), "why": load.lost[:3], "checked": a.check, "differ": differing(a.run, load, a.check),
            "p50_s": round(float(p50), 3), "p95_s": round(float(p95), 3), "texts_per_s": round(speed, 3),
            "sampler_texts_per_s": [round(float(x[0]), 3) for x in alone],
            "share": round(speed / float(np.mean(alone, axis=0)[0]), 3),
            "share_per_cpu_second": round(per_cpu / float(np.mean(alone, axis=0)[1]), 3)}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
