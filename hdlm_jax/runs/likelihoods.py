"""--mode=evaluate with evaluate.decodings: likelihoods of the validation split under samplers (docs/evaluation.md)."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import numpy as np

from hdlm_jax.common import jsons, processes
from hdlm_jax.common.console import measured, say
from hdlm_jax.common.jsons import Json, reuse, write_json
from hdlm_jax.config import Config
from hdlm_jax.data.prepare import Manifest, load_manifest
from hdlm_jax.decoding.sampler import load_helper
from hdlm_jax.evaluation.elbo import summarise
from hdlm_jax.evaluation.likelihood import likelihoods, policies
from hdlm_jax.runs.generate import identity
from hdlm_jax.training.loading import Run, check_writable, load_run

FILE = "likelihoods.json"
SETTINGS = ("draws", "rows", "checkpoint", "ema", "seed")  # of EvaluateConfig: what is measured here


def evaluate(config: Config, workdir: str) -> Json:
    """Measures a run's checkpoint under each decoding; writes and returns <workdir>/likelihoods.json.

    Nats of each sequence go to likelihoods.npz, by decoding, for paired comparisons. What is there already, of the
    same checkpoint, text and settings, is not measured again.
    """
    run = load_run(config, workdir, config.evaluate.checkpoint, config.evaluate.ema)
    check_writable(workdir)
    todo = policies(run)
    manifest = load_manifest(run.data_dir)
    made_from = measured_on(run, manifest, SETTINGS)
    helper = load_helper(run, config.generate)
    made_from |= {"helper": identity(helper)} if helper else {}
    path, arrays = os.path.join(workdir, FILE), os.path.join(workdir, FILE.replace(".json", ".npz"))
    result = processes.on_main_process(lambda: reuse(path, made_from)) or {"decodings": {}} | jsons.plain(made_from)
    each = _arrays(arrays) if result["decodings"] and processes.is_main_process() else {}
    rows = run.valid_rows(config.model.seq_len, config.evaluate.rows)
    tokens = rows["tokens"]
    for text, (program, numbers, exact) in todo.items():
        if text not in result["decodings"]:
            started = time.monotonic()
            nats, calls = likelihoods(run, rows, program, numbers, 1 if exact else config.evaluate.draws, text)
            mean = summarise(nats[..., None], tokens, np.zeros(nats.shape), np.ones(nats.shape))
            found = {"nats": mean["nelbo"], "exact": exact, "calls": float(calls.mean())}
            found |= {name: mean[name] for name in ("se", "perplexity", "tokens", "rows", "draws")}
            if found["tokens"] == manifest.valid_scored_tokens:
                found["bits_per_byte"] = found["nats"] * manifest.bits_per_nat
            result["decodings"][text] = jsons.plain(found | {"seconds": time.monotonic() - started})
            each |= {text: nats.mean(0), "tokens": tokens}
            if processes.is_main_process():
                jsons.write_arrays(arrays, each)
                write_json(path, result)
        _tell(text, result["decodings"][text])
    return result


def measured_on(run: Run, manifest: Manifest, settings: Sequence[str]) -> Json:
    """What a measurement of a run's validation split depends on; settings: names of those of EvaluateConfig."""
    return {"step": run.step, "data": manifest.fingerprint, "hierarchy_fingerprint": run.hierarchy.fingerprint,
            "packing": run.trained.data.packing, "padding": run.trained.data.padding, "given": run.given,
            "settings": {name: getattr(run.config.evaluate, name) for name in settings}}


def _arrays(path: str) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def _tell(text: str, found: Json) -> None:
    kind = "-log p" if found["exact"] else "a bound, the mean over random choices,"
    value = measured(found["nats"], found["se"], sign="+-")
    say(f"evaluate: {text}: {kind} {value} nats/token in {found['calls']:.1f} calls a text "
        f"({found['tokens']:,} tokens)")
