"""Text from a trained run, by any method of hdlm_jax.decoding.presets (docs/decoding.md)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.common import jsons, processes
from hdlm_jax.common.console import say
from hdlm_jax.common.jsons import Json, reuse, sha256_of, write_atomic, write_json
from hdlm_jax.config import Config, ConfigError, GenerateConfig
from hdlm_jax.data import features as vectors
from hdlm_jax.decoding import canvas as canvases
from hdlm_jax.decoding import sampler
from hdlm_jax.decoding import texts as asking
from hdlm_jax.evaluation import judges, text_statistics
from hdlm_jax.training.loading import Run, check_writable, load_run

FRAMES = 128  # of a trajectory, at most
FILES = ("generate.json", "samples.jsonl", "trajectories.npz", "samples.txt")  # of a set of samples
MOST_SCHEMA = 1 << 22  # bytes


def generate(config: Config, workdir: str, into: str = "") -> Json:
    """Samples of a run: samples.txt to read, samples.jsonl with ids and costs, generate.json with the summary; in
    workdir, or in the folder `into`. Others that are there are kept, numbered.

    Texts are cut before the first end of text behind the prompt (generate.stop="end"; ids keep that end).

    trajectories.npz has the way of the first generate.trajectories of them, and what they were made from. With
    config.generate.judge the summary has their generative perplexity (evaluation/judges.py) under "judge"; samples
    that are there are judged as they are.
    """
    g, into = config.generate, into or workdir
    run = load_run(config, workdir, g.checkpoint)
    check_writable(into)
    sampler.at_sampling(run.process, g)
    judge: judges.Judge | None = None
    helper = sampler.load_helper(run, g)
    if g.judge:  # checked before anything is computed
        judge = judges.open_judge(g.judge, g.judge_dtype, config.parallel, run.mesh, run.tokenizer)
    settings = {k: v for k, v in dataclasses.asdict(g).items() if k not in ("judge", "judge_dtype")}
    settings["schema"] = _schema(g)
    made_from = {"step": run.step, "hierarchy_fingerprint": run.hierarchy.fingerprint, "settings": settings}
    features = _features(run, g)
    made_from |= {"helper": identity(helper)} if helper else {}
    made_from |= {} if features is None else {"features": hashlib.sha256(features.tobytes()).hexdigest()}
    summary, lines = os.path.join(into, "generate.json"), os.path.join(into, "samples.jsonl")
    if result := processes.on_main_process(lambda: _reuse(summary, lines, made_from)):
        say(f"generate: reusing {os.path.join(into, 'samples.txt')} of step {run.step}")
        with open(lines, encoding="utf-8") as f:
            tokens = [np.array(json.loads(line)["ids"], np.int32) for line in f]
    else:
        result, tokens = _sample(run, into, made_from, helper, features)
    if judge and (result.get("judge") or {}).get("made_from") != judges.made_from(judge):
        started = time.monotonic()
        given = result["prompt_tokens"]
        found = judges.record(judge, run.tokenizer, tokens, given, real_texts(run, len(tokens), result["seq_len"]))
        result["judge"] = found | {"sampling": sampling_facts(run, g, result), "seconds": time.monotonic() - started}
        if processes.is_main_process():
            write_json(summary, result)
    if judge:
        judges.tell(result["judge"])
    return result


def identity(helper: Run) -> Json:
    """What tells a helper from another one, or from itself trained further."""
    return {"step": helper.step, "tokenizer": helper.tokenizer.fingerprint,
            "weights": [float(jnp.sum(jnp.abs(a))) for a in jax.tree.leaves(helper.params)]}


def sampling_facts(run: Run, g: GenerateConfig, result: Json) -> Json:
    """How samples were drawn, in full: what a generative perplexity has to be quoted with."""
    trained = run.process.force_transition or None
    method = sampler.method_of(g)
    return {
        "step": run.step, "samples": result["samples"], "length": result["seq_len"], "seed": g.seed,
        "method": g.method, "options": g.options,
        "steps": method.numbers.get("steps") if not run.process.exact else None,
        "corrections": g.corrections, "correction_temperature": g.correction_temperature if g.corrections else None,
        "temperature": g.temperature, "top_p": g.top_p, "clusters": g.clusters, "stop": g.stop,
        "lengths": sampler.lengths_are(run, g),
        "force_transition": g.force_transition or trained, "force_transition_trained": trained,
        "law": sampler.exactness(run.process, g), "network_calls": result["network_calls"],
        "row_forwards": result["row_forwards"],
        "network_precision": run.config.model.dtype, "draws": "float32 noise, jax.random mode='high'",
    }


def _reuse(summary: str, lines: str, made_from: dict) -> dict | None:
    """The summary, if it was made from the same things and the samples beside it are the ones it speaks of."""
    found = reuse(summary, made_from)
    return found if found and os.path.exists(lines) and found.get("samples_sha256") == sha256_of(lines) else None


def real_texts(run: Run, count: int, length: int) -> list[np.ndarray] | str:
    """Ids of the first rows of the validation split, each cut to its text; or why there are none."""
    try:
        rows = run.valid_rows(length, count)
    except (ValueError, OSError) as error:
        return f"no reference texts: {error}"
    return [sampler.ended(x[segment >= 0], 0, run.tokenizer.eot, "end" if run.trained.data.packing == "crop" else "")
            for x, segment in zip(rows["x"], rows["segment"], strict=True)]


def _features(run: Run, g: GenerateConfig) -> np.ndarray | None:
    """Features of the samples, float32 [n, P, F], of a run that is given some: of g.features, or of the validation
    split; where there are fewer they come again. ConfigError where there are none, or where the run knows none."""
    d = run.config.data
    if not g.features and not d.feature_places:
        return None
    shape = d.feature_places, d.feature_width
    try:
        found = (vectors.read_file(g.features, shape, "generate.features") if g.features else
                 run.valid_rows(run.config.model.seq_len, g.num_samples)["features"])
    except (ValueError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"generate.features='': the validation split cannot be read ({error}); give a .npy file"
                          ) from error
    sampler.check_features(run, found)
    return found[np.arange(g.num_samples) % len(found)]


def _sample(run: Run, workdir: str, made_from: dict, helper: Run | None, features: np.ndarray | None
            ) -> tuple[Json, list[np.ndarray]]:
    """Draws the samples and writes them: the summary, and the tokens of each."""
    g = run.config.generate
    ids = run.tokenizer.encode(g.prompt) if g.prompt else np.zeros(0, np.int32)
    canvas, length, scaffold = _canvas(run, g, ids, features)
    places = run.config.data.feature_places  # of the canvas, whose tokens nobody reads
    draw = sampler.sampler_of(run, helper)
    draw.aside = False  # here stdout is the log
    started = time.monotonic()
    sampler.compile_for(draw, canvas, g)
    compiled = time.monotonic()
    out = draw(canvas, g)
    seconds = time.monotonic() - compiled
    whole = [row[places : min(n, length)] for row, n in zip(out["tokens"], out["length"], strict=True)]
    tokens = whole if scaffold else [sampler.ended(row, len(ids), run.tokenizer.eot, g.stop) for row in whole]
    texts = [scaffold.text(row) if scaffold else sampler.text_of(run.tokenizer, row, g.stop) for row in tokens]
    words = sum(len(row) for row in whole) - len(whole) * len(ids)
    film = _trajectories(draw, canvases.some(canvas, slice(g.trajectories)), g, out["tokens"][:, :length], places) if (
        g.trajectories and not scaffold and sampler.method_of(g).policy.lengths is None) else {}
    result = {
        "samples": len(texts), "seq_len": length, "prompt_tokens": len(ids), "lengths": sampler.lengths_are(run, g),
        "ended": sum(len(row) > len(ids) and row[-1] == run.tokenizer.eot for row in tokens),
        "cut_tokens": words + len(whole) * len(ids) - sum(map(len, tokens)),
        "network_calls": float(out["calls"].mean()), "row_forwards": float(out["row_forwards"].mean()),
        "unigram_entropy": float(np.mean([text_statistics.entropy(row[len(ids) :]) for row in tokens])),
        "law": sampler.exactness(run.process, g), "seconds": seconds, "tokens_per_s": words / seconds,
        "compile_s": compiled - started,
    } | made_from
    path = os.path.join(workdir, "samples.txt")
    if processes.is_main_process():
        keep_earlier(workdir)
        read = "".join(f"--- sample {i} ---\n{text}\n\n" for i, text in enumerate(texts))
        write_atomic(path, read.encode())
        rows = zip(texts, tokens, out["row_forwards"], strict=True)
        lines = jsons.write_lines(os.path.join(workdir, "samples.jsonl"), (
            {"text": text, "ids": row.tolist(), "row_forwards": int(calls)} for text, row, calls in rows))
        result["samples_sha256"] = hashlib.sha256(lines).hexdigest()
        _keep(os.path.join(workdir, "trajectories.npz"), film, {"prompt_tokens": len(ids)} | made_from)
        write_json(os.path.join(workdir, "generate.json"), result)
    say(f"generate: {len(texts)} samples, {result['network_calls']:.0f} network calls a batch, "
        f"{result['tokens_per_s']:,.0f} tokens/s, in {path}; the first one:\n{texts[0]}")
    return result, tokens


def keep_earlier(workdir: str) -> None:
    """Gives samples that are there a number: samples-1.txt, generate-1.json, ..., the latest the highest."""
    there = [name for name in FILES if os.path.exists(os.path.join(workdir, name))]
    if not there:
        return
    taken = [int(found[1]) for name in os.listdir(workdir) if (found := re.fullmatch(r"samples-(\d+)\.txt", name))]
    number = max(taken, default=0) + 1
    for name in there:  # samples.txt is the last: a number that was begun is used again
        stem, end = os.path.splitext(name)
        os.replace(os.path.join(workdir, name), os.path.join(workdir, f"{stem}-{number}{end}"))
    say(f"generate: the samples before are kept as {os.path.join(workdir, f'samples-{number}.txt')}")


def _schema(g: GenerateConfig) -> str:
    """Text of the file g.schema, "" without one."""
    try:
        if g.schema and (size := os.path.getsize(g.schema)) > MOST_SCHEMA:
            raise ConfigError(f"generate.schema={g.schema!r}: it has {size:,} bytes, a schema at most {MOST_SCHEMA:,}")
        return Path(g.schema).read_text(encoding="utf-8") if g.schema else ""
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"generate.schema={g.schema!r}: {error}") from error


def _canvas(run: Run, g: GenerateConfig, ids: np.ndarray, features: np.ndarray | None) -> tuple[Any, int, Any]:
    """(canvas, most tokens of a text, scaffold or None)."""
    if not g.schema:
        canvas = sampler.start_canvas(run, g, np.tile(ids, (g.num_samples, 1)), features)
        return canvas, g.length or run.config.model.seq_len, None
    if features is not None:
        raise ConfigError(f"generate.schema={g.schema!r}: does not go with data.features_field")
    if not run.process.unmasks:
        raise ConfigError(f"generate.schema={g.schema!r}: this process cannot fill blanks between given words")
    try:
        asked = asking.of_schema(run, g, _schema(g), g.prompt)
    except ValueError as error:
        raise ConfigError(f"generate.schema={g.schema!r}: {error}") from error
    return asked.canvas, asked.keep, asked.scaffold


def _trajectories(draw: sampler.Sampler, canvas: np.ndarray | canvases.Canvas, g: GenerateConfig,
                  tokens: np.ndarray, places: int) -> dict[str, np.ndarray]:
    """The first samples once more, step by step: so that recording costs the samples' own time nothing.

    Returns call int32 [F+1], time float32 [n, F+1], z int32 and confidence float32 [n, F+1, S] (loop.sample) without
    the first `places`, up to the first frame in which all is written.
    """
    found = draw(canvas, g, FRAMES)
    length = tokens.shape[1]
    call, z, ends = found["call"].max(0), found["z"][:, :, :length], found["tokens"][:, :length]
    if differ := int((ends != tokens[: len(ends)]).any(1).sum()):  # other batches are rounded otherwise on some devices
        say(f"generate: {differ} of {len(ends)} recorded samples differ from the same ones unrecorded, by rounding")
    last = int(np.flatnonzero((call == call[-1]) | (z == ends[:, None]).all((0, 2)))[0])
    film = {"time": found["time"], "z": z[:, :, places:], "confidence": found["confidence"][:, :, places:length]}
    return {"call": call[: last + 1]} | {name: a[:, : last + 1] for name, a in film.items()}


def _keep(path: str, film: dict[str, np.ndarray], about: Json) -> None:
    """Writes trajectories.npz; without a film one of other samples is removed."""
    if not film:
        return Path(path).unlink(missing_ok=True)
    jsons.write_arrays(path, {"about": np.asarray(jsons.dumps(about)), **film}, compressed=True)
