"""Text from a trained run: plan the levels, fill in the words (docs/theory.md section 4)."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.config import Config, ConfigError, Generate
from hdlm_jax.diffusion import sampler
from hdlm_jax.diffusion.process import HierarchicalProcess, fold
from hdlm_jax.model.network import Network
from hdlm_jax.run import parallel
from hdlm_jax.run.checkpoint import reuse, write_json
from hdlm_jax.run.metrics import progress, say


def make_sample_step(network: Network, process: HierarchicalProcess, g: Generate):
    """step(params, batch, key) -> {tokens int32 [b, S], calls int32 [b], row_forwards int32 [b]}.

    batch: z int32 [b, S], the canvas (masks where free, words and clusters where given); index int32 [b].
    """

    def step(params, batch, key):
        z = batch["z"]
        keys = fold(jnp.broadcast_to(key, batch["index"].shape), batch["index"])
        plan = sampler.plan(fold(keys, 0), process.chain, process.level_of(z), g.plan, g.steps, g.reveals)
        denoise = lambda z, t: network.apply({"params": params}, z, t)  # noqa: E731
        tokens, stats = sampler.sample(fold(keys, 1), denoise, process, z, plan, clusters=g.clusters,
                                       temperature=g.temperature, top_p=g.top_p)
        return {"tokens": tokens, "calls": jnp.broadcast_to(stats["calls"], z.shape[:1]),
                "row_forwards": stats["row_forwards"]}

    return step


class Sampler:
    """Compiled sampling of canvases [n, S] in batches; every sample has its own random numbers."""

    def __init__(self, network: Network, process: HierarchicalProcess, mesh, params):
        self.network, self.process, self.mesh, self.params = network, process, mesh, params
        self._step = functools.lru_cache(maxsize=8)(self._compile)

    def _compile(self, g: Generate):
        return parallel.compile_batch_step(make_sample_step(self.network, self.process, g), self.mesh, self.params)

    def __call__(self, canvas: np.ndarray, g: Generate) -> dict[str, np.ndarray]:
        """tokens int32 [n, S], calls [n] (of the batch a sample was in), row_forwards [n]."""
        n = len(canvas)
        shards = math.lcm(parallel.batch_shards(self.mesh), jax.process_count())
        rows = -(-min(g.batch_size, n) // shards) * shards
        step = self._step(_static(g))
        parts = []
        with progress(n, unit="sample", name="generate") as bar:
            for start in range(0, n, rows):
                count = min(rows, n - start)
                batch = {"z": canvas[start : start + count], "index": np.arange(start, start + count, dtype=np.int32)}
                batch = parallel.pad_rows(batch, rows)  # padding is all words: nothing to do there
                mine = parallel.local_rows(rows)
                batch = parallel.put_batch(self.mesh, {k: v[mine] for k, v in batch.items()})
                found = step(self.params, batch, jax.random.key(g.seed))
                parts.append({k: np.asarray(v)[:count] for k, v in found.items()})
                bar.update(count)
        out = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        if out["tokens"].max(initial=0) >= self.process.hierarchy.num_words:
            raise RuntimeError("generate: a cluster or mask symbol is left in a sample; a bug, please report it")
        return out


def _static(g: Generate) -> Generate:
    """Only what the compiled step depends on."""
    return Generate(steps=g.steps, plan=g.plan, reveals=g.reveals, temperature=g.temperature, top_p=g.top_p,
                    clusters=g.clusters)


def prompt_canvas(prompt_ids: np.ndarray, num_samples: int, seq_len: int, mask_id: int) -> np.ndarray:
    """Canvases int32 [n, S] that begin with the prompt and are masked after it."""
    if len(prompt_ids) >= seq_len:
        raise ConfigError(f"generate.prompt has {len(prompt_ids)} tokens: must be fewer than model.seq_len={seq_len}")
    canvas = np.full((num_samples, seq_len), mask_id, np.int32)
    canvas[:, : len(prompt_ids)] = prompt_ids
    return canvas


def generate(config: Config, workdir: str) -> dict[str, Any]:
    """Samples of a run: samples.txt to read, samples.jsonl with ids and costs, generate.json with the summary."""
    from hdlm_jax.run.api import load_run

    g = config.generate
    run = load_run(config, workdir, g.checkpoint)
    made_from = {"step": run.step, "hierarchy_fingerprint": run.hierarchy.fingerprint,
                 "settings": dataclasses.asdict(g)}
    summary = os.path.join(workdir, "generate.json")
    if found := reuse(summary, made_from):
        say(f"generate: reusing {os.path.join(workdir, 'samples.txt')} of step {run.step}")
        return found
    ids = run.tokenizer.encode(g.prompt) if g.prompt else np.zeros(0, np.int32)
    canvas = prompt_canvas(ids, g.num_samples, config.model.seq_len, run.hierarchy.mask_id)
    draw = Sampler(run.network, run.process, run.mesh, run.params)
    started = time.time()
    draw(canvas[: min(len(canvas), g.batch_size)], g)  # compiles
    compiled = time.time()
    out = draw(canvas, g)
    seconds = time.time() - compiled
    texts = [run.tokenizer.decode(row) for row in out["tokens"]]
    words = out["tokens"].size - canvas.shape[0] * len(ids)
    result = {
        "samples": len(texts), "seq_len": config.model.seq_len,
        "network_calls": float(out["calls"].mean()), "row_forwards": float(out["row_forwards"].mean()),
        "unigram_entropy": _entropy(out["tokens"][:, len(ids) :]), "seconds": seconds, "tokens_per_s": words / seconds,
        "seconds_to_first": compiled - started,
    } | made_from
    path = os.path.join(workdir, "samples.txt")
    with open(path, "w") as f:
        for i, text in enumerate(texts):
            f.write(f"--- sample {i} ---\n{text}\n\n")
    with open(os.path.join(workdir, "samples.jsonl"), "w") as f:
        for text, row, calls in zip(texts, out["tokens"], out["row_forwards"], strict=True):
            f.write(json.dumps({"text": text, "ids": row.tolist(), "row_forwards": int(calls)}) + "\n")
    write_json(summary, result)
    say(f"generate: {len(texts)} samples, {result['network_calls']:.0f} network calls a batch, "
        f"{result['tokens_per_s']:,.0f} tokens/s, in {path}; the first one:\n{texts[0]}")
    return result


def _entropy(tokens: np.ndarray) -> float:
    """Mean entropy in nats of the words within each sample: low where samples repeat themselves."""
    out = []
    for row in tokens:
        p = np.unique(row, return_counts=True)[1] / len(row)
        out.append(-(p * np.log(p)).sum())
    return float(np.mean(out))
