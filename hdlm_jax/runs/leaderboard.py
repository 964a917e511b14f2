"""Any runs by one protocol: what each was not measured on yet is measured, by the modes evaluate and generate.

Nothing is written into a run. Results lie in <out>/results/<run>-<identity>; the identity is of the weights and of what
makes the model of them, so that a run trained further is measured anew. What cannot be measured has its reason, as
{"why": ...}, in place of its numbers; the others go on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

import hdlm_jax
from hdlm_jax.common import jsons
from hdlm_jax.common.console import say
from hdlm_jax.config import Config, ConfigError, EvaluateConfig, GenerateConfig, ParallelConfig
from hdlm_jax.config.rules import choice, rule
from hdlm_jax.evaluation import judges
from hdlm_jax.evaluation.benchmarks import TASKS
from hdlm_jax.evaluation.text_statistics import paired
from hdlm_jax.runs import evaluate, generate, open_weights, tasks
from hdlm_jax.training.checkpoint import checkpoints_of, checksums
from hdlm_jax.training.loading import Run, load_run, saved_config

TEXTS = ("wikitext2", "ptb", "lambada", "ag_news")
QUESTIONS = ("hellaswag", "arc_easy", "piqa")
_CANNOT = (ValueError, OSError, RuntimeError, MemoryError)  # what one measurement of one run may end with

Board = dict[str, Any]  # what `measure` returns; leaderboard.json


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What every run is measured on, and how."""

    texts: tuple[str, ...] = TEXTS
    questions: tuple[str, ...] = QUESTIONS
    data: str = "$HDLM_DATA"  # folder of their files
    limit: int = 100  # first documents of each text, questions of each set, sequences of a validation split; 0: all
    draws: int = 8  # of the noise for every sequence, where the process is a diffusion
    judge: str = ""  # as generate.judge; "": nothing is sampled
    samples: int = 16
    length: int = 128  # tokens of a sample
    steps: int = 128  # of sampling, where the process is a diffusion
    tensor: int = 1  # devices that share a copy of the weights, for what is too large for one

    def check(self) -> None:
        """ConfigError for what cannot work, data that is not there or a judge that is none."""
        for kind, names in (("texts", self.texts), ("questions", self.questions)):
            for name in names:
                known = [n for n, task in TASKS.items() if task.path and _asks(n) == (kind == "questions")]
                choice(f"--{kind}", name, known)
        rule(bool(self.texts), "--texts", "", f"name at least one of {', '.join(TEXTS)}")
        rule(self.length >= 1, "--length", self.length, "must be at least 1 token")
        config = self.on(Config())
        config.evaluate.check()
        config.generate.check()
        config.parallel.shape(jax.device_count())
        tasks.sources(config)
        if self.judge:
            judges.open_judge(self.judge)

    def on(self, config: Config) -> Config:
        """The settings of a run with those of the protocol for evaluate and generate."""
        asked = EvaluateConfig(draws=self.draws, rows=self.limit, tasks=self.texts + self.questions,
                               tasks_data=self.data, protocols=("document",), limit=self.limit)
        drawn = GenerateConfig(num_samples=self.samples, length=self.length, steps=self.steps, judge=self.judge,
                               trajectories=0)
        return dataclasses.replace(config, evaluate=asked, generate=drawn, parallel=ParallelConfig(tensor=self.tensor))


def _asks(task: str) -> bool:
    """Whether it has questions that are answered, in place of texts."""
    return TASKS[task].ranks or TASKS[task].writes


def named(runs: Sequence[str]) -> dict[str, str]:
    """Workdirs by name, of FOLDER or NAME=FOLDER; ConfigError where two have the same name or one holds no weights."""
    found: dict[str, str] = {}
    for given in runs:
        name, _, workdir = ("", "", given) if os.path.isdir(given) else given.rpartition("=")
        name = name or os.path.basename(os.path.abspath(workdir))
        if name in found:
            raise ConfigError(f"two runs have the name {name!r}, {found[name]} and {workdir}; give one of them as "
                              f"NAME={workdir}")
        rule(os.sep not in name, "NAME", name, "must not have a slash")
        saved_config(workdir)
        checkpoints = checkpoints_of(workdir)
        checkpoints.choose("best")
        checkpoints.close()
        found[name] = workdir
    if not found:
        raise ConfigError("no runs given; name the workdirs of trained runs, exports or imports")
    return found


def measure(runs: Mapping[str, str], out: str, protocol: Protocol) -> Board:
    """Measures runs (workdirs by name) and writes <out>/leaderboard.json; gives back what is in it.

    Runs come in the order given. Of every text the best run is named, and each other run has its difference to it in
    bits per byte, paired over documents.

    Raises:
      ConfigError: nothing can be measured, by `Protocol.check`, or out lies inside of a run.
    """
    protocol.check()
    for workdir in runs.values():
        here, there = os.path.realpath(workdir), os.path.realpath(out)
        rule(os.path.commonpath([here, there]) != here, "--out", out, f"lies in the run {workdir}; choose another")
    os.makedirs(out, exist_ok=True)
    rows = [_measured(name, workdir, out, protocol) for name, workdir in runs.items()]
    board: Board = {
        "settings": dataclasses.asdict(protocol), "hdlm_jax": hdlm_jax.__version__, "jax": jax.__version__,
        "device": jax.devices()[0].device_kind, "judge": _judge(protocol.judge), "runs": rows,
        "best": {text: _differences(rows, text, out) for text in protocol.texts}}
    board = jsons.plain(board)
    jsons.write_json(os.path.join(out, "leaderboard.json"), board)
    return board


def _why(error: BaseException) -> dict[str, str]:
    said = " ".join(str(error).split()) or type(error).__name__
    return {"why": said if len(said) <= 300 else f"{said[:297]}..."}


def _measured(name: str, workdir: str, out: str, protocol: Protocol) -> dict[str, Any]:
    """All of a run's numbers."""
    say(f"leaderboard: {name} ({workdir})")
    config = protocol.on(saved_config(workdir))
    try:
        facts = _facts(load_run(config, workdir), workdir)
    except _CANNOT as error:
        why = _why(error)
        return {"name": name, "workdir": workdir, "why": why["why"], "model": None, "provenance": None,
                "results": None, "texts": dict.fromkeys(protocol.texts, why), "validation": why,
                "questions": dict.fromkeys(protocol.questions, why), "generation": why, "seconds": 0.0}
    results = os.path.join("results", f"{name}-{facts.pop('identity')[:12]}")
    folder, exact = os.path.join(out, results), facts["model"]["exact"]
    whole = dataclasses.replace(config, generate=dataclasses.replace(config.generate, length=0))
    found = _tasks(whole, workdir, folder)
    texts = {text: found[text] | ({} if "why" in found[text] else {"exact": exact}) for text in protocol.texts}
    row: dict[str, Any] = {
        "name": name, "workdir": workdir, **facts, "results": results, "texts": texts,
        "validation": _validation(config, workdir, folder, exact),
        "questions": {name: found[name] for name in protocol.questions},
        "generation": _generation(config, workdir, folder)}
    cells = [*texts.values(), row["validation"], *row["questions"].values(), row["generation"]]
    return row | {"seconds": sum(cell.get("seconds", 0.0) for cell in cells)}


def _facts(run: Run, workdir: str) -> dict[str, Any]:
    """identity, model and provenance of a run."""
    sums, c = checksums(run.params), run.trained
    weights = hashlib.sha256(jsons.dumps(sums, sort_keys=True).encode()).hexdigest()
    sections = {name: dataclasses.asdict(getattr(c, name)) for name in ("hierarchy", "diffusion", "model", "decoder")}
    made_of = [weights, sections, run.tokenizer.fingerprint, run.hierarchy.fingerprint, run.given_alone, run.given]
    saved, d = jsons.read_json(os.path.join(workdir, "config.json")), c.decoder
    size = {path: leaf.size for path, leaf in jax.tree.leaves_with_path(run.params)}
    idle = sum(n for path, n in size.items() if any(str(key.key) == "experts" for key in path)) * (
        1 - d.experts_per_token / d.experts) if d.experts else 0
    try:
        source = open_weights.source_of(workdir, c)
    except ConfigError:
        source = {}
    kind = "trained" if "config" not in saved else "import" if saved.get("made_from") else "export"
    model = {
        "parameters": run.num_params, "active": run.num_params - round(idle), "process": c.diffusion.process,
        "family": source["config"]["model_type"] if source else {"dit": "DIT"}.get(c.model.trunk, c.model.trunk),
        "levels": list(run.hierarchy.sizes), "head": c.model.head_kind, "exact": run.process.exact,
        "given": run.given_alone, "seq_len": c.model.seq_len, "tokenizer": c.tokenizer.kind, "dtype": c.model.dtype}
    provenance = {
        "kind": kind, "step": run.step, "averaged": run.ema, "weights": weights,
        "tokenizer": run.tokenizer.fingerprint, "hierarchy": run.hierarchy.fingerprint,
        "imported_from": c.released.weights if kind == "import" else None,
        "imported_sha256": saved["made_from"]["weights"] if kind == "import" else None,
        "started_from": c.train.init_from or None}
    identity = hashlib.sha256(jsons.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return {"identity": identity, "model": model, "provenance": provenance}


def _tasks(config: Config, workdir: str, folder: str) -> dict[str, Any]:
    """Results of the texts and questions by name: all at once, one by one where that fails."""
    names = config.evaluate.tasks
    try:
        found = tasks.run(config, workdir, folder)
    except _CANNOT as error:
        if len(names) == 1:
            return {names[0]: _why(error)}
        alone = [dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, tasks=(n,))) for n in names]
        return {name: cell for one in alone for name, cell in _tasks(one, workdir, folder).items()}
    cells = {name: found[name if _asks(name) else f"{name}/document"] for name in names}
    return {name: cell if cell.get("accuracy" if _asks(name) else "nelbo") is not None else
            {"why": "the number is not finite"} for name, cell in cells.items()}


def _validation(config: Config, workdir: str, folder: str, exact: bool) -> dict[str, Any]:
    try:
        found = evaluate.evaluate(config, workdir, folder)
    except _CANNOT as error:
        return _why(error)
    return found | {"exact": exact} if found["nelbo"] is not None else {"why": "the number is not finite"}


def _generation(config: Config, workdir: str, folder: str) -> dict[str, Any]:
    """The judge's record, with what sampling took."""
    if not config.generate.judge:
        return {"why": "no judge given (--judge)"}
    try:
        config.check()
        found = generate.generate(config, workdir, folder)
    except _CANNOT as error:
        return _why(error)
    judged = found["judge"]
    own = os.path.realpath(judged["made_from"]["path"]) == os.path.realpath(workdir)
    return judged | {"its_own_judge": own, "seconds": found["seconds"] + judged["seconds"]}


def _judge(path: str) -> dict[str, Any] | None:
    if not path:
        return None
    judge = judges.open_judge(path)
    return judge.identity | {"rule": judge.rule}


def _differences(rows: list[dict[str, Any]], text: str, out: str) -> str | None:
    """Gives each run's result of a text its "difference" to the best one; the best one's name.

    The best has the fewest bits per byte of the runs that are given nothing, if there are any: a bound given lengths
    lies below what it would be without. Against one that is given nothing such a difference is "at_least".
    """
    there = [row for row in rows if "why" not in row["texts"][text]]
    told = [row["texts"][text]["given"] != "nothing" for row in there]
    if not there:
        return None
    ranked = [row for row, knows in zip(there, told, strict=True) if not knows or all(told)]
    best = min(ranked, key=lambda row: row["texts"][text]["bits_per_byte"])
    reference = _documents(best, text, out)
    for row, knows in zip(there, told, strict=True):
        if row is not best:
            own = _documents(row, text, out)
            at_least = knows and not all(told)
            row["texts"][text]["difference"] = {"to": best["name"], "at_least": at_least} | _paired(reference, own)
    return best["name"]


def _documents(row: dict[str, Any], text: str, out: str) -> dict[str, Any]:
    """nats, bytes and (where they were kept) residuals of a run's documents, and the fingerprint of their texts."""
    with np.load(os.path.join(out, row["results"], f"tasks_{text}.npz"), allow_pickle=False) as found:
        kept = {name: found[name] for name in ("nats", "bytes", "residuals") if name in found}
        return kept | {"text": json.loads(str(found["made_from"]))["text"]}


def _paired(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Bits per byte of b minus those of a, and the standard error between documents."""
    if a["text"] != b["text"]:
        return {"why": "other documents"}
    mean, se = paired(a, b, a["bytes"])
    return {"bits_per_byte": mean / math.log(2), "se": se / math.log(2), "documents": len(a["bytes"])}
