"""Speed and memory, counted as launch/torch_peer.py counts them: python -m tools.bench --case=tiny

One JSON object: a training step on random words, then sampling from all mask, on one device. `--curves=FOLDER` draws
how the heads and the sampler scale; `--report=FOLDER` is the table of what launch/bench.sh measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hdlm_jax import config as configs
from hdlm_jax.common import jsons, parallel
from hdlm_jax.common.console import markdown, progress
from hdlm_jax.common.jsons import write_json
from hdlm_jax.config import Config, ConfigError
from hdlm_jax.decoding.sampler import Sampler
from hdlm_jax.diffusion.draws import fold
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.models.make import flops_per_token
from hdlm_jax.training.metrics import peak_flops
from hdlm_jax.training.state import abstract_state, build, init_state, make_optimizer
from hdlm_jax.training.step import make_loss_sums, make_train_step
from hdlm_jax.training.views import stratified_tau
from tools import cli


class Case(NamedTuple):
    width: int
    blocks: int
    heads: int
    seq_len: int
    words: int
    clusters: int
    batch_size: int


CASES = {  # those of the yardstick
    "tiny": Case(128, 4, 4, 128, 1024, 32, 16),
    "small-cpu": Case(256, 6, 8, 128, 8192, 64, 8),
    "gpt2-vocab-cpu": Case(256, 6, 8, 128, 50257, 64, 8),
    "books": Case(128, 4, 4, 128, 4096, 64, 32),  # configs/books.py
    "owt-small": Case(768, 12, 12, 512, 50257, 64, 64),
}
HEADS = ("flat", "factorised")
# settings of diffusion, and cluster counts as multiples of the case's
PROCESSES: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "hdlm": ({}, (1,)), "hdlm_xi9": ({"xi": 0.9}, (1,)), "hdlm_k3": ({}, (4, 0.25)), "mdlm": ({}, ()),
    "gidd": ({"process": "gidd", "p_uniform": 0.1, "weighting": "dynamic"}, ()), "sedd": ({"process": "sedd"}, ()),
    "ar": ({"process": "autoregressive", "weighting": "constant"}, ()),
}


def settings(case: Case, head: str = "flat", process: str = "hdlm", dtype: str = "", optimizer: str = "adamw"
             ) -> tuple[Config, Hierarchy]:
    """Config and hierarchy of a case: the yardstick's weighting, clusters (word % C) and, but for Muon, optimizer."""
    diffusion, clusters = PROCESSES[process]
    if head == "factorised" and not clusters:
        raise ConfigError(f"--head=factorised: needs clusters, and --process={process} has none; choose --process=hdlm")
    c = configs.default()
    c.tokenizer.kind, c.tokenizer.vocab_size = "bpe", max(case.words, 257)  # a smaller one is no tokenizer's
    sizes = [int(case.clusters * share) for share in clusters]
    c.hierarchy.clusters = tuple(sizes) or (1,)
    c.diffusion.update(diffusion)
    c.model.time_conditioning = process != "ar"
    c.model.width, c.model.blocks, c.model.heads, c.model.seq_len = case[:4]
    c.model.head, c.model.dtype = head, dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    o = c.optimizer
    o.lr, o.b2, o.eps, o.weight_decay, o.clip = 3e-4, 0.999, 1e-8, 0.01, 1.0
    o.name, o.schedule, o.warmup = optimizer, "constant", 0
    c.train.batch_size = c.generate.batch_size = case.batch_size
    maps = [np.arange(below) % n for below, n in zip([case.words, *sizes], sizes, strict=False)]
    return configs.resolve(c), Hierarchy.from_parents(maps, vocab_size=case.words)


def _seconds(fn, *args) -> tuple[float, Any]:
    """Wall time of fn(*args), its result ready, and that result."""
    started = time.perf_counter()
    out = jax.block_until_ready(fn(*args))
    return time.perf_counter() - started, out


def _mib() -> int:
    """The most memory the process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _temp_bytes(compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


class Training:
    """The training step of a config on one device, with random words to feed it."""

    def __init__(self, config: Config, hierarchy: Hierarchy):
        self.config, self.hierarchy = config, hierarchy
        self.mesh = parallel.make_mesh(config, jax.devices()[:1])
        self.network, self.process = build(config, hierarchy)
        self.tx, _ = make_optimizer(config)
        self.abstract, self.shardings = abstract_state(config, self.network, self.tx, self.mesh)
        self.key, self.rng = jax.random.key(0), np.random.default_rng(0)

    def batch(self):
        shape = self.config.train.batch_size, self.config.model.seq_len
        words = self.rng.integers(self.hierarchy.vocab_size, size=shape, dtype=np.int32)
        return parallel.put_batch(self.mesh, {"x": words, "index": np.arange(shape[0], dtype=np.int32)})

    def compile(self, step):
        """Ahead of time and from shapes alone, so that no state is held meanwhile."""
        jitted = parallel.compile_step(step, self.mesh, self.shardings)
        return parallel.compile_ahead(jitted, self.abstract, self.batch(), self.key)

    def init(self, only_params: bool = False):
        def fresh(key):
            state = init_state(self.config, self.network, self.tx, key)
            return state.params if only_params else state

        out = jax.jit(fresh, out_shardings=self.shardings.params if only_params else self.shardings)(self.key)
        parallel.trim_memory()
        return jax.block_until_ready(out)

    def sampler(self, params) -> Sampler:
        return Sampler(self.network, self.process, self.mesh, params)

    def step(self):
        return make_train_step(self.config, self.network, self.process, self.tx, self.mesh)

    def loss_temp_bytes(self, full_logits: bool = False) -> int:
        """Temporary bytes of the loss and its gradients (which are outputs), compiled and not run.

        full_logits: as one would write it at first, logits [B, S, V] of every token, differentiated by jax.
        """
        d, sums = self.config.diffusion, make_loss_sums(self.config, self.network, self.process, self.mesh)

        def loss(params, batch, key):
            x, index = batch["x"], batch["index"]
            keys = fold(jnp.broadcast_to(key, index.shape), index)
            tau = stratified_tau(fold(keys, 0), index, len(x))
            z = self.process.corrupt(fold(keys, 1), x, tau=tau)
            hidden = self.network.hidden(params, z, -jnp.expm1(-tau))
            p = self.process.as_prediction(self.network.head.logits(params["head"], hidden))
            tau = jnp.broadcast_to(tau[:, None], x.shape)
            weight = self.process.loss_weight(z, tau, d.weighting, d.weight_min, d.weight_max, x=x)
            return jnp.mean(weight * self.process.token_loss(p, x, z, tau=tau))

        run = loss if full_logits else lambda *given: sums(*given)[0]
        lowered = jax.jit(jax.value_and_grad(run)).lower(self.abstract.params, self.batch(), self.key)
        return _temp_bytes(lowered.compile())


def measure_training(training: Training, steps: int, warmup: int, profile: str = "") -> tuple[Any, dict[str, Any]]:
    """(parameters, figures) after `warmup` + `steps` steps, each waited for; three more are traced into `profile`."""
    config, key = training.config, training.key
    compile_s, compiled = _seconds(training.compile, training.step())
    state = training.init()
    times = []
    for _ in range(warmup + steps):
        seconds, (state, metrics) = _seconds(compiled, state, jax.block_until_ready(training.batch()), key)
        times.append(seconds)
    step_s = statistics.median(times[warmup:])
    if profile:
        with jax.profiler.trace(profile):
            for _ in range(3):
                state, _ = jax.block_until_ready(compiled(state, training.batch(), key))
    rate = config.train.batch_size * config.model.seq_len / step_s
    flops = flops_per_token(config, training.hierarchy, training.process)
    peak = peak_flops(jax.devices()[0].device_kind)
    return state.params, {
        "train_step_s": round(step_s, 6), "train_tokens_per_s": round(rate), "loss": round(float(metrics["loss"]), 4),
        "compile_s": round(compile_s, 2), "temp_bytes": _temp_bytes(compiled), "flops_per_token": flops,
        "mfu": round(rate * flops / peak, 4) if peak else None,
    }


def measure_sampling(training: Training, draw: Sampler, steps: int) -> dict[str, Any]:
    """A batch from all mask on a grid of so many steps, after a call of 2 that compiles (steps are an input)."""
    c = training.config
    canvas = np.full((c.train.batch_size, c.model.seq_len), training.hierarchy.mask_id, np.int32)
    g = dataclasses.replace(c.generate, steps=steps)
    first, few = _seconds(draw, canvas, dataclasses.replace(g, steps=2))
    parallel.trim_memory()
    seconds, out = _seconds(draw, canvas, g)
    calls, at_first = (max(1.0, float(found["calls"].mean())) for found in (out, few))
    return {"sample_step_s": round(seconds / calls, 6), "sample_tokens_per_s": round(canvas.size / seconds, 1),
            "sample_steps": steps, "sample_calls": calls,
            "sample_compile_s": round(max(0.0, first - at_first * seconds / calls), 2)}


def measure(name: str, head: str, process: str, steps: int, warmup: int, sample_steps: int, dtype: str = "",
            batch_size: int = 0, temp_bytes_full: bool = False, profile: str = "", optimizer: str = "adamw"
            ) -> dict[str, Any]:
    """The JSON object: the yardstick's keys ("jax" for "torch") and ours."""
    case = CASES[name]
    if temp_bytes_full and process not in ("hdlm", "mdlm"):
        raise ConfigError(f"--temp_bytes_full: compares hdlm and mdlm, not --process={process}")
    case = case._replace(batch_size=batch_size or case.batch_size)
    config, hierarchy = settings(case, head, process, dtype, optimizer)
    device, start = jax.devices()[0], _mib()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    training = Training(config, hierarchy)
    params, train = measure_training(training, steps, warmup, profile)
    parallel.trim_memory()  # the optimizer's state is gone
    result = {
        "peer": "hdlm_jax", "jax": jax.__version__, "case": name, "head": head, "process": process,
        "optimizer": optimizer, "dtype": config.model.dtype, "device": device.platform,
        "device_kind": device.device_kind, "threads": cores, "compiled": True, "batch_size": case.batch_size,
        "params": sum(a.size for a in jax.tree.leaves(params)),
    } | train | measure_sampling(training, training.sampler(params), sample_steps)
    stats = device.memory_stats() or {}
    result |= {"rss_start_mib": start, "peak_rss_mib": _mib(), "device_peak_bytes": stats.get("peak_bytes_in_use")}
    if temp_bytes_full:  # last, as compiling it takes memory
        flat = Training(*settings(case, "flat", process, dtype))
        result |= {"loss_temp_bytes": training.loss_temp_bytes(),
                   "loss_temp_bytes_full_logits": flat.loss_temp_bytes(full_logits=True)}
    return result


# ---- curves ----

HEAD_WORDS = (4096, 8192, 16384, 32768, 50257, 100_000, 200_000)
LENGTHS, GRIDS = (64, 128, 256, 512), (8, 16, 32, 64, 128)
SERIES = (("flat", "hdlm"), ("factorised", "hdlm"), ("flat", "mdlm"))


class _HeadAlone:
    """A network whose hidden states are parameters, so that the training loss is a loss of head and hidden states."""

    def __init__(self, network):
        self._network = network

    def __getattr__(self, name):
        return getattr(self._network, name)

    def hidden(self, params, *_):
        return params["hidden"]


def measure_head(head: str, words: int, repeats: int = 5) -> dict[str, Any]:
    """Gradient of the training loss in the head and the hidden states of 8 x 128 tokens of width 256, n = 64; apart
    from it, AdamW's update of the head."""
    training = Training(*settings(Case(256, 1, 8, 128, words, 64, 8), head))
    c, key = training.config, training.key
    hidden = jax.random.normal(key, (c.train.batch_size, c.model.seq_len, c.model.width))
    params = {"head": training.init(only_params=True)["head"], "hidden": hidden}
    alone: Any = _HeadAlone(training.network)
    sums = make_loss_sums(c, alone, training.process)
    gradient = jax.jit(jax.grad(lambda params, batch, key: sums(params, batch, key)[0]))
    compiled = gradient.lower(params, training.batch(), key).compile()
    grads = jax.block_until_ready(compiled(params, training.batch(), key))
    seconds = [_seconds(compiled, params, training.batch(), key)[0] for _ in range(repeats)]

    def update(params, opt_state, grads):
        updates, opt_state = training.tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    update = jax.jit(update, donate_argnums=(0, 1))
    state = params["head"], training.tx.init(params["head"])
    optimizer = []
    for _ in range(repeats + 1):  # the first one compiles
        taken, state = _seconds(update, *state, grads["head"])
        optimizer.append(taken)
    return {"head": head, "words": words, "clusters": 64, "width": 256, "tokens": hidden[..., 0].size,
            "params": sum(a.size for a in jax.tree.leaves(state[0])), "seconds": statistics.median(seconds),
            "optimizer_s": statistics.median(optimizer[1:]), "temp_bytes": _temp_bytes(compiled)}


def curves(folder: str, name: str) -> None:
    """head.json and .png: heads against V; sampling.json and .png: a case's sampler against S and T."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--curves: matplotlib is missing (pip install hdlm_jax[plots])") from None
    matplotlib.use("Agg")
    os.makedirs(folder, exist_ok=True)
    length = CASES[name].seq_len
    grid = {s: sorted({32, *GRIDS} if s == length else {32}) for s in sorted({*LENGTHS, length})}
    heads, sampling = [], []
    with progress(2 * len(HEAD_WORDS) + len(SERIES) * sum(map(len, grid.values())), unit="point", name="curves") as bar:
        for words in HEAD_WORDS:
            for head in HEADS:
                heads.append(measure_head(head, words))
                parallel.trim_memory()
                bar.update()
        for head, process in SERIES:
            for seq_len, steps in grid.items():
                training = Training(*settings(CASES[name]._replace(seq_len=seq_len), head, process))
                draw = training.sampler(training.init(only_params=True))
                for n in steps:
                    found = measure_sampling(training, draw, n)
                    sampling.append({"case": name, "head": head, "process": process, "seq_len": seq_len, "steps": n,
                                     "batch_size": training.config.train.batch_size, "calls": found["sample_calls"],
                                     "seconds": found["sample_step_s"] * found["sample_calls"],
                                     "tokens_per_s": found["sample_tokens_per_s"]})
                    bar.update()
    for file, records in (("head", heads), ("sampling", sampling)):
        write_json(os.path.join(folder, f"{file}.json"), records)
    _plot_heads(os.path.join(folder, "head.png"), heads)
    _plot_sampling(os.path.join(folder, "sampling.png"), sampling, length)


def _axes(rows: int, title: str):
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(rows, 2, figsize=(11, 3.8 * rows), layout="constrained", squeeze=False)
    fig.suptitle(title)
    for ax in axes.flat:
        ax.set(xscale="log", yscale="log")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.2)
    return fig, axes


def _save(fig, path: str) -> None:
    import matplotlib.pyplot as plt

    fig.savefig(path, dpi=110)
    plt.close(fig)


def _plot_heads(path: str, records: list[dict[str, Any]]) -> None:
    fig, axes = _axes(1, "head alone: 1024 tokens, D = 256, n = 64")
    for head, color in zip(HEADS, ("tab:blue", "tab:orange"), strict=True):
        mine = [r for r in records if r["head"] == head]
        words = [r["words"] for r in mine]
        axes[0, 0].plot(words, [r["seconds"] for r in mine], "o-", color=color, ms=3, label=f"{head}, fwd + bwd")
        axes[0, 0].plot(words, [r["optimizer_s"] for r in mine], "--", color=color, lw=1, label=f"{head}, AdamW")
        axes[0, 1].plot(words, [r["temp_bytes"] / 2**20 for r in mine], "o-", color=color, ms=3, label=head)
    axes[0, 0].set(xlabel="words", ylabel="seconds")
    axes[0, 1].set(xlabel="words", ylabel="temporary MiB")
    for ax in axes.flat:
        ax.legend(frameon=False)
    _save(fig, path)


def _plot_sampling(path: str, records: list[dict[str, Any]], length: int) -> None:
    fig, axes = _axes(2, f"sampling, case {records[0]['case']}, {records[0]['batch_size']} samples a batch")
    for column, (x, fixed, at) in enumerate((("seq_len", "steps", 32), ("steps", "seq_len", length))):
        for head, process in SERIES:
            mine = [r for r in records if (r["head"], r["process"], r[fixed]) == (head, process, at)]
            mine.sort(key=lambda r: r[x])
            at_x = [r[x] for r in mine]
            for ax, y, name in zip(axes[:, column], ("seconds", "tokens_per_s"), ("seconds a batch", "tokens/s"),
                                   strict=True):
                ax.plot(at_x, [r[y] for r in mine], "o-", ms=3, label=f"{process}, {head}")
                ax.set(xlabel=x, ylabel=name, title=f"{fixed} = {at}")
                ax.set_xticks(at_x, map(str, at_x))
                ax.set_xticks([], minor=True)
    axes[0, 0].legend(frameon=False)
    _save(fig, path)


# ---- report ----

MIN_ROUNDS, STEADY = 5, 0.7  # a case counts from so many rounds on, none of the yardstick's below 70% of its best
MEASURES = {  # name: title, field, whether less is better; those two by two are ours over the yardstick's
    "train": ("train tok/s", "train_tokens_per_s", False),
    "sample": ("sample tok/s", "sample_tokens_per_s", False),
    "rss": ("peak RSS MiB", "peak_rss_mib", True),
    "temp": ("temp bytes, loss and gradients", "loss_temp_bytes", True),
    "mdlm": ("train tok/s / flat MDLM", "train_tokens_per_s", False),
}
AIMS: dict[tuple[str, str, str], dict[str, tuple[float, float | None]]] = {  # measure: (target, floor) of the median
    ("tiny", "flat", "hdlm"): {"train": (1.0, 0.8), "sample": (2.0, None)},
    ("small-cpu", "flat", "hdlm"): {"train": (1.2, 1.0), "sample": (3.0, None), "rss": (0.8, None)},
    ("gpt2-vocab-cpu", "flat", "hdlm"): {"train": (2.0, 1.6), "sample": (4.0, None), "rss": (0.65, None),
                                         "temp": (0.2, None)},
    ("gpt2-vocab-cpu", "factorised", "hdlm"): {"train": (3.5, 3.0), "sample": (8.0, None), "rss": (0.55, None),
                                               "mdlm": (1.8, None)},
}
Round = dict[tuple[str, str], dict[str, Any]]
YARDSTICK = ("torch", "")


def read_rounds(path: str) -> list[Round]:
    """Rounds of a case's jsonl, each begun by a line of the yardstick; records by (head, process)."""
    rounds: list[Round] = []
    for record in jsons.read_lines(path)[0]:
        if record["peer"] == "torch":
            rounds.append({YARDSTICK: record})
        else:
            rounds[-1][record["head"], record["process"]] = record
    return rounds


def problems(case: str, rounds: list[Round]) -> list[str]:
    """Why a case's figures do not count: too few rounds, or a yardstick that was disturbed."""
    found = []
    if len(rounds) < MIN_ROUNDS:
        found.append(f"{case}: not valid, {len(rounds)} rounds; at least {MIN_ROUNDS} are needed")
    for title, field, _ in (MEASURES["train"], MEASURES["sample"]):
        speeds = [r[YARDSTICK][field] for r in rounds]
        for i, speed in enumerate(speeds):
            if speed < STEADY * max(speeds):
                found.append(f"{case}: not valid, the yardstick's {title} in round {i + 1} is "
                             f"{speed / max(speeds):.0%} of its best; something else was running, measure again")
    return found


def _pairs(rounds: list[Round], run: tuple[str, str], measure: str) -> list[tuple[float, float]]:
    field = MEASURES[measure][1]
    other, base = {"temp": (run, "loss_temp_bytes_full_logits"), "mdlm": (("flat", "mdlm"), field)}.get(
        measure, (YARDSTICK, field))
    return [(r[run][field], r[other][base]) for r in rounds if field in r.get(run, {}) and base in r.get(other, {})]


def _figure(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _rows(case: str, rounds: list[Round], valid: bool) -> list[list[str]]:
    rows = []
    for run in SERIES:
        for measure, (title, _, less) in MEASURES.items():
            pairs = _pairs(rounds, run, measure)
            if not pairs or (measure == "mdlm" and run != ("factorised", "hdlm")):
                continue
            ratios = [a / b for a, b in pairs]
            median = statistics.median(ratios)
            aims = []
            for aim in AIMS.get((case, *run), {}).get(measure, (None, None)):
                met = aim is not None and (median <= aim if less else median >= aim)
                verdict = ("met" if met else "NOT met") if valid else "not valid"
                aims.append("-" if aim is None else f"{'≤' if less else '≥'} {aim:g} {verdict}")
            ours, theirs = (_figure(statistics.median(side)) for side in zip(*pairs, strict=True))
            spread = [f"{x:.2f}" for x in (min(ratios), median, max(ratios))]
            rows.append([case, f"{run[0]} {run[1].upper()}", title, ours, theirs, *spread, *aims])
    return rows


def report(folder: str) -> tuple[str, bool]:
    """The table in Markdown over FOLDER/CASE.jsonl, and whether all of it is valid."""
    paths = {case: os.path.join(folder, f"{case}.jsonl") for case in CASES}
    found = {case: rounds for case, path in paths.items() if (rounds := read_rounds(path))}
    if not found:
        raise ConfigError(f"--report={folder}: no CASE.jsonl there; ./launch/bench.sh makes them")
    head = ["case", "run", "measure", "ours", "other", "min", "median", "max", "target", "floor"]
    table: list[list[str]] = []
    notes, bad = [], []
    for case, rounds in found.items():
        wrong = problems(case, rounds)
        bad += wrong
        table += _rows(case, rounds, not wrong)
        torch = rounds[0][YARDSTICK]
        ours = next((r for run, r in rounds[0].items() if run != YARDSTICK), {})
        notes.append(f"{case}: {len(rounds)} rounds, torch {torch['torch']} on {torch['device']} "
                     f"({torch['threads']} threads{', compiled' if torch['compiled'] else ''}), jax "
                     f"{ours.get('jax')} on {ours.get('device')} ({ours.get('dtype')}), {torch['sample_steps']} "
                     f"sampling steps")
    lines = [markdown(head, table), "",
             "min, median, max: ours over the other's, paired within rounds; targets are for the median.", *notes]
    return "\n".join([*lines, *bad]), not bad


# ---- the command ----


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    ask = cli.Parser("bench", __doc__)
    ask.add_argument("--case", choices=CASES, help="shapes to run (default: tiny; with --curves small-cpu)")
    ask.add_argument("--head", default="flat", choices=HEADS, help="model.head")
    ask.add_argument("--process", default="hdlm", choices=PROCESSES, help="with the case's clusters, or a baseline")
    ask.add_argument("--optimizer", default="adamw", choices=("adamw", "muon"), help="the yardstick's, or Muon")
    ask.add_argument("--dtype", default="", choices=("", "float32", "bfloat16"),
                     help="model.dtype; default: float32 on CPU, bfloat16 elsewhere")
    for name, value, least, text in (
            ("steps", 12, 1, "training steps that count"), ("warmup", 3, 0, "training steps before them"),
            ("sample_steps", 32, 1, "steps of the sampler's grid"), ("batch_size", 0, 0, "in place of the case's")):
        ask.add_argument(f"--{name}", type=cli.at_least(least), default=value, help=f"{text} (default: %(default)s)")
    ask.add_argument("--temp_bytes_full", action="store_true",
                     help="also compile the loss, as it is and over full logits, for its memory")
    ask.add_argument("--profile", default="", metavar="FOLDER", help="for a trace of three steps")
    ask.add_argument("--curves", default="", metavar="FOLDER", help="for the scaling of heads and sampler")
    ask.add_argument("--report", default="", metavar="FOLDER", help="of launch/bench.sh's results to tabulate")
    return ask.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 3 for a report whose figures are not valid; SystemExit for what a user can mend."""
    with cli.one_line("bench"):
        f = parse(argv)
        if f.report:
            text, valid = report(f.report)
            print(text)
            return 0 if valid else 3
        if f.curves:
            curves(f.curves, f.case or "small-cpu")
        else:
            print(jsons.dumps(measure(f.case or "tiny", f.head, f.process, f.steps, f.warmup, f.sample_steps, f.dtype,
                                      f.batch_size, f.temp_bytes_full, f.profile, f.optimizer)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
