"""A small table over runs: python -m hdlm_jax.run.report WORKDIR [WORKDIR ...]"""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any

import numpy as np

from hdlm_jax.run.metrics import read_metrics


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
    tokens, difference = a["tokens"], b["nats"] - a["nats"]
    mean = difference.sum() / tokens.sum()
    n = len(tokens)
    if n < 2:
        return float(mean), math.nan
    se = math.sqrt(n / (n - 1) * np.sum((difference - mean * tokens) ** 2)) / tokens.sum()
    return float(mean), float(se)


def table(workdirs: list[str]) -> str:
    """Markdown: what each run reaches on its validation split, and what it costs."""
    head = ["", "levels", "step", "nats/token", "bits/byte", "perplexity", "train tok/s", "sample tok/s",
            "network calls"]
    rows = [head, ["---"] * len(head)]
    unigram = None
    for workdir in workdirs:
        e, g = _read(workdir, "evaluate.json"), _read(workdir, "generate.json")
        records = read_metrics(os.path.join(workdir, "metrics.jsonl"))
        speeds = [r["tokens_per_s"] for r in records if r.get("tokens_per_s")]
        bits = f"{e['bits_per_byte']:.4f} ± {e['bits_per_byte_se']:.4f}" if e["whole_split"] else "-"
        rows.append([os.path.basename(os.path.normpath(workdir)), " → ".join(map(str, e["hierarchy"])), str(e["step"]),
                     f"{e['nelbo']:.4f} ± {e['se']:.4f}", bits, f"{e['perplexity']:.1f} ± {e['perplexity_se']:.1f}",
                     f"{np.median(speeds):,.0f}" if speeds else "-", f"{g['tokens_per_s']:,.0f}",
                     f"{g['network_calls']:.0f}"])
        bits = f"{e['unigram_bits_per_byte']:.4f}" if e["whole_split"] else "-"
        unigram = ["unigram", "", "", f"{e['unigram_nelbo']:.4f}", bits, f"{e['unigram_perplexity']:.1f}", "", "", ""]
    if unigram:
        rows.append(unigram)
    widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
    rows[1] = ["-" * w for w in widths]
    padded = [[c.ljust(w) for c, w in zip(r, widths, strict=True)] for r in rows]
    return "\n".join(f"| {' | '.join(r)} |" for r in padded)


def main(workdirs: list[str]) -> None:
    if not workdirs:
        raise SystemExit("usage: python -m hdlm_jax.run.report WORKDIR [WORKDIR ...]")
    results = [_read(w, "evaluate.json") for w in workdirs]
    for name in ("corpus", "tokens", "data"):
        if len({str(r.get(name)) for r in results}) > 1:
            raise SystemExit(f"report: the runs were evaluated on different text ({name} differs)")
    print(table(workdirs))
    print(f"\nvalidation: {results[0]['tokens']:,} tokens, {results[0]['bytes'] or 0:,} bytes, "
          f"corpus {results[0]['corpus'][:12]}; ± is one standard error (data and noise times)")
    for workdir in workdirs[1:]:
        mean, se = compare(workdirs[0], workdir)
        names = [os.path.basename(os.path.normpath(w)) for w in (workdir, workdirs[0])]
        print(f"{names[0]} - {names[1]}: {mean:+.4f} ± {se:.4f} nats/token (paired)")
    for workdir, result in zip(workdirs, results, strict=True):
        gain = result["unigram_nelbo"] - result["nelbo"]
        print(f"\n{workdir}: {gain:.2f} nats below the unigram")
        for name in ("metrics.jsonl", "curves.png", "clusters.txt", "clusters.png", "samples.txt", "evaluate.json"):
            if os.path.exists(os.path.join(workdir, name)):
                print(f"  {os.path.join(workdir, name)}")
        with open(os.path.join(workdir, "samples.jsonl")) as f:
            text = json.loads(f.readline())["text"]
        print("  a sample: " + " ".join(text.split())[:240])
    print("\nModels this small, trained for minutes, have learnt spelling, frequent words, short phrases and the\n"
          "layout of the text; what they write has no meaning yet.")


if __name__ == "__main__":
    main(sys.argv[1:])
