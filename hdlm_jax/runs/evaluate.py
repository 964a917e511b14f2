"""--mode=evaluate: tasks, likelihoods under samplers, or the bound of the whole validation split.

Nats, tokens and bytes of the split are summed and divided once.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time

import numpy as np

from hdlm_jax.common import jsons, processes
from hdlm_jax.common.console import measured, readable, say
from hdlm_jax.common.jsons import Json, reuse, write_json
from hdlm_jax.common.parallel import MEASURED_PRECISION
from hdlm_jax.config import Config
from hdlm_jax.data.prepare import load_manifest
from hdlm_jax.evaluation import conditional
from hdlm_jax.evaluation.elbo import evaluator_of, residuals, summarise
from hdlm_jax.models.make import make_network
from hdlm_jax.runs import likelihoods, tasks
from hdlm_jax.training.loading import Run, check_writable, load_run

SETTINGS = ("draws", "rows", "cv2", "checkpoint", "ema", "seed")  # of EvaluateConfig: what is measured here


def run(config: Config, workdir: str) -> None:
    """What evaluate.tasks and evaluate.decodings ask for; without them the bound."""
    if config.evaluate.tasks:
        tasks.run(config, workdir)
    elif config.evaluate.decodings:
        likelihoods.evaluate(config, workdir)
    else:
        evaluate(config, workdir)


def evaluate(config: Config, workdir: str, into: str = "") -> Json:
    """Measures a run's checkpoint on its validation split; writes and returns <workdir>/evaluate.json.

    Nats of each sequence, and what it adds to the error, go to evaluate_rows.npz, for paired comparisons. With
    evaluate.exact_match texts are written anew as well: exact_match.jsonl. Other texts and questions: tasks.py.
    into: a folder for the files in place of workdir.
    """
    into = into or workdir
    run = load_run(config, workdir, config.evaluate.checkpoint, config.evaluate.ema)
    if loops := config.evaluate.loops or config.decoder.loops:
        decoder = dataclasses.replace(config.decoder, loops=loops)
        network = make_network(dataclasses.replace(config, decoder=decoder), run.hierarchy)
        run = dataclasses.replace(run, network=network)
    check_writable(into)
    manifest = load_manifest(run.data_dir)
    made_from = likelihoods.measured_on(run, manifest, SETTINGS) | ({"loops": loops} if loops else {})
    if config.evaluate.exact_match:
        made_from |= {"exact_match_records": config.evaluate.exact_match} | conditional.how(config.generate)
    path = os.path.join(into, "evaluate.json")
    if found := processes.on_main_process(lambda: reuse(path, made_from)):
        bound = measured(found["nelbo"], found["se"], sign="+-")
        say(f"evaluate: reusing {path} of step {run.step}, NELBO {bound} nats/token, given {found['given']}")
        return found
    rows = run.valid_rows(config.model.seq_len, config.evaluate.rows)
    evaluator = evaluator_of(run)
    started = time.monotonic()
    nats, tau, q = evaluator.nats(run.params, rows, config.evaluate.draws)
    seconds = time.monotonic() - started
    result = summarise(nats, rows["tokens"], tau, q) | ({"se_time": 0.0} if run.process.exact else {})
    if len(run.process.parts) > 1:
        result |= _of_parts(nats, rows["tokens"], tau, q, run.process.num_levels)
    whole = result["tokens"] == manifest.valid_scored_tokens
    per_byte = manifest.bits_per_nat
    if whole:
        result |= {"bits_per_byte": result["nelbo"] * per_byte, "bits_per_byte_se": result["se"] * per_byte,
                   "unigram_bits_per_byte": manifest.unigram_bits_per_byte}
    result |= {
        "perplexity_se": result["perplexity"] * result["se"], "unigram_nelbo": manifest.unigram_nats,
        "unigram_perplexity": math.exp(manifest.unigram_nats), "bytes": manifest.valid_scored_bytes if whole else None,
        "whole_split": whole, "ema": run.ema, "dtype": config.model.dtype, "matmul_precision": MEASURED_PRECISION,
        "seconds": seconds, "tokens_per_s": result["tokens"] * result["draws"] / seconds,
        "corpus": manifest.corpus_fingerprint, "hierarchy": list(run.hierarchy.sizes), "params": run.num_params,
    } | made_from | _exact_match(run, config, into)
    result = jsons.plain(result)  # what is read again from the file
    if processes.is_main_process():
        jsons.write_arrays(os.path.join(into, "evaluate_rows.npz"),
                           {"nats": nats.mean(0).sum(-1), "tokens": rows["tokens"],
                            "residuals": residuals(nats, rows["tokens"], tau).sum(0)})
        write_json(path, result)
    parts = (f" = discrete {measured(result['discrete'], result['discrete_se'], sign='+-')} + continuous "
             f"{measured(result['continuous'], result['continuous_se'], sign='+-')}" if "discrete" in result else "")
    say(f"evaluate: step {run.step}, {result['tokens']:,} tokens x {result['draws']} draws in {seconds:.0f} s: "
        f"NELBO {measured(result['nelbo'], result['se'], sign='+-')} nats/token{parts} "
        f"(data {readable(result['se_data'])}, time {readable(result['se_time'])}), "
        f"perplexity {readable(result['perplexity'], '.2f')}, "
        f"given {result['given']}; "
        f"unigram {manifest.unigram_nats:.4f}")
    return result


def _of_parts(nats: np.ndarray, tokens: np.ndarray, tau: np.ndarray, q: np.ndarray, levels: int) -> Json:
    """The bound's two parts, symbols (by level) and what else is on show, of the same draws; neither is one by
    itself."""
    parts = {"discrete": nats[..., :levels], "continuous": nats[..., levels:]}
    found = {name: summarise(part, tokens, tau, q) for name, part in parts.items()}
    both = {f"{name}{end}": one[key] for name, one in found.items() for end, key in (("", "nelbo"), ("_se", "se"))}
    return both | {"levels": found["discrete"]["levels"]}


def _exact_match(run: Run, config: Config, into: str) -> Json:
    """What `evaluation.conditional.measured` says of the first evaluate.exact_match validation records; they are kept
    beside what was written for them in exact_match.jsonl."""
    if not config.evaluate.exact_match:
        return {}
    rows = run.valid_rows(config.model.seq_len, config.evaluate.exact_match)
    found = conditional.write(run, rows, config.generate)
    result = conditional.measured(found, config.generate)
    lines = [{"text": text, "written": written} for text, written in zip(found.text, found.written, strict=True)]
    if processes.is_main_process():
        jsons.write_lines(os.path.join(into, "exact_match.jsonl"), lines)
    say(f"evaluate: {len(lines):,} texts written anew, exact match {100 * result['exact_match']:.1f} +- "
        f"{100 * result['exact_match_se']:.1f} %, character error {100 * result['character_error']:.1f} %")
    return result
