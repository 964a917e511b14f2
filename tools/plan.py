"""What the compiler says about training on a TPU pod that is not here: memory, exchanges, and the arithmetic of time.

    python -m tools.plan --config=configs/hdlm_7b.py --topology=v5e:16x16 --mesh=1,256,1 --mesh=1,64,4
    python -m tools.plan --config=configs/released_open.py:llada_8b --what=sample --topology=v5e:2x4 --mesh=1,1,8

The training step of a config is lowered and compiled from abstract inputs for a described topology: nothing runs, and
no TPU is needed, but the compiler is (`pip install libtpu`; launch/compile_plan.sh makes an environment that has it).
Memory and exchanges are read from the compiled program. Step time is arithmetic: FLOPs at an assumed utilisation.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import resource
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_flags

from hdlm_jax import config as configs
from hdlm_jax.common import jsons, parallel
from hdlm_jax.common.console import markdown, say
from hdlm_jax.common.jsons import Json
from hdlm_jax.config import Config, ConfigError
from hdlm_jax.decoding.sampler import make_sample_step, numbers_of, program_of
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.models.make import flops_per_token, forward_flops
from hdlm_jax.training.fitting import TooLarge, fit
from hdlm_jax.training.metrics import peak_flops
from hdlm_jax.training.state import abstract_state, build, make_optimizer, placed
from hdlm_jax.training.step import make_train_step
from tools import cli

MFU = 0.4  # of the chips' bf16 peak: an assumption, not a measurement
TOKENS = 131e9  # of the published runs
# by device_kind (vendor's data sheets): GiB of memory, bytes/s of all links of a chip to others, one way, and the clock
# that makes the peak of the matrix units, of which the compiler counts cycles
CHIPS = {"TPU v5 lite": (16, 200e9, 1.503e9), "TPU v5": (95, 600e9, 1.751e9), "TPU v6 lite": (32, 400e9, 1.751e9)}

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


class Collective(NamedTuple):
    """Some exchanges of a compiled program that are alike.

    kind: one of KINDS. axes: names of the mesh axes over which the devices of a group differ, as in "fsdp" or
    "data+fsdp". bytes: of the whole array on one device, in or out, whichever is larger. times: how often a step does
    it; where `loop`, how often it would if the loops around it whose length the data decide had one pass each. moved:
    bytes that a device sends (and receives) in all of them, by the usual ring. op: where in the model, as jax names it.
    """

    kind: str
    axes: str
    bytes: int
    times: int
    loop: bool
    moved: int
    op: str


def balanced(config: Config) -> Hierarchy:
    """A hierarchy of a config's sizes without data: clusters as equal as can be, at every level."""
    sizes = (config.tokenizer.vocab_size, *config.hierarchy.clusters)
    maps, own = [np.arange(n) % m for n, m in zip(sizes, sizes[1:], strict=False)], config.hierarchy.head_clusters
    if own:
        return Hierarchy.from_parents([], sizes[0], classes=np.arange(sizes[0]) % own)
    return Hierarchy.from_parents(maps, vocab_size=sizes[0])


def topology(name: str, slices: int = 1):
    """The devices of a TPU topology by its name, as in v5e:16x16 or v5p:8x8x4, so many times.

    Raises:
      ConfigError: no such topology, or no compiler for it.
    """
    from jax.experimental import topologies

    # libtpu asks a cloud what it runs on, and locks a TPU for one process: there is neither
    for setting, value in {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_ID": "0",
                           "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}.items():
        os.environ.setdefault(setting, value)
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ConfigError(f"--topology={name!r}: needs the TPU compiler (pip install libtpu, or "
                          "launch/compile_plan.sh)") from None
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=slices).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ConfigError(f"--topology={name!r}: must be a chip and its grid, as in v5e:16x16 or v5p:8x8x4 "
                          f"({str(error).splitlines()[0]})") from None


def lower(config: Config, hierarchy: Hierarchy, devices):
    """(the training step, lowered for config.parallel's mesh over the devices, from shapes alone; its state's shapes).

    Raises:
      ConfigError: the mesh does not fit the devices, or the batch not the mesh.
    """
    mesh = parallel.make_mesh(config, devices)
    parts, rows = parallel.batch_shards(mesh) * config.train.microbatches, config.train.batch_size
    if rows % parts:
        raise ConfigError(f"train.batch_size={rows}: must be a multiple of {parts}, the batch shards of the mesh "
                          f"{tuple(mesh.shape.values())} times train.microbatches={config.train.microbatches}")
    with parallel.made_for(mesh):
        network, process = build(config, hierarchy)
        tx, _ = make_optimizer(config)
        state, shardings = abstract_state(config, network, tx, mesh)
        step = parallel.compile_step(make_train_step(config, network, process, tx, mesh), mesh, shardings)
        batch = {"x": jax.ShapeDtypeStruct((rows, config.model.seq_len), jnp.int32),
                 "index": jax.ShapeDtypeStruct((rows,), jnp.int32)}
        return step.lower(state, batch, jax.eval_shape(lambda: jax.random.key(0))), state


def lower_sample(config: Config, hierarchy: Hierarchy, devices):
    """(sampling of config.generate.batch_size rows by config.generate, lowered in the same way; its parameters)."""
    mesh, g = parallel.make_mesh(config, devices), config.generate
    with parallel.made_for(mesh):
        network, process = build(config, hierarchy)
        params, _ = placed(lambda: network.init_params(jax.random.key(0), config.model.seq_len), mesh)
        step = parallel.compile_sample_step(make_sample_step(network, process, program_of(g), mesh), mesh, params)
        batch = {"z": jax.ShapeDtypeStruct((g.batch_size, config.model.seq_len), jnp.int32),
                 "index": jax.ShapeDtypeStruct((g.batch_size,), jnp.int32)}
        numbers = numbers_of(g, config.model.seq_len, 0)
        return step.lower((params, numbers), batch, jax.eval_shape(lambda: jax.random.key(0))), params


# ---- what a compiled program exchanges -------------------------------------------------------------------------------


def _array_bytes(text: str) -> int:
    """Bytes of all arrays in an HLO type, as in (f32[8,2]{1,0}, bf16[]); u32[] (handles of asynchronous ones) aside."""
    bits = 0
    for kind, dims in re.findall(r"\b(pred|[a-z]+\d+)[a-z0-9]*\[([\d,]*)\]", text):
        if (kind, dims) != ("u32", ""):
            bits += (8 if kind == "pred" else int(re.sub(r"\D", "", kind))) * int(
                np.prod([int(n) for n in dims.split(",") if n]))
    return bits // 8


_SPAN = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


def _groups(line: str, devices: int) -> np.ndarray:
    """Numbers of the devices that exchange with each other in an HLO line, [groups, devices of a group].

    XLA writes them as pairs, as lists, as a transposed range ([4,2]<=[2,4]T(1,0)), or as axes of a mesh of its own
    (mesh['a'=2,'b'=4] {'b'}), whose devices may be such a range, and whose axes may be used in part ('b':(2)2 is the 2
    in the middle of 2 x 2 x 1).

    Raises:
      ValueError: none of these.
    """
    numbers = lambda text: [int(n) for n in re.findall(r"\d+", text)]  # noqa: E731
    everyone = np.arange(devices)

    def span(dims: str, order: str | None):
        return everyone.reshape(numbers(dims)).transpose(numbers(order) if order else None)

    if pairs := re.search(r"source_target_pairs=\{([\d,{} ]*)\}", line):
        return np.array(numbers(pairs[1])).reshape(-1, 2)
    if listed := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", line):
        return np.array([numbers(group) for group in listed[1].split("},")])
    if found := re.search(rf"replica_groups=\[([\d,]+)\]<={_SPAN}", line):
        return span(found[2], found[3]).reshape(numbers(found[1]))
    if mesh := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_SPAN}\))? ?\{{([^}}]*)\}}", line):
        everyone = span(mesh[2], mesh[3]) if mesh[2] else everyone
        used = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", mesh[4])
        shape: list[int] = []
        place = {}
        for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1]):
            before, part = next(((int(a), int(b)) for n, a, b in used if n == name and b), (1, int(size)))
            place[name] = len(shape) + 1
            shape += [before, part, int(size) // (before * part)]
        chosen = [place[name] for name, _, _ in used]
        order = [i for i in range(len(shape)) if i not in chosen] + chosen
        return everyone.reshape(shape).transpose(order).reshape(-1, int(np.prod([shape[i] for i in chosen])))
    if "replica_groups={}" in line or "replica_groups=" not in line:
        return everyone[None]
    raise ValueError(f"{line.strip()[:200]}: replica_groups in a notation that this cannot read")


def _axes(groups: np.ndarray, shape: dict[str, int]) -> str:
    """Names of the mesh axes along which the members of the groups differ."""
    at = np.unravel_index(groups, tuple(shape.values()))
    return "+".join(name for name, i in zip(shape, at, strict=True) if np.any(i != i[:, :1])) or "none"


_CALLS = re.compile(r"\b(calls|to_apply|body|condition|branch_computations|called_computations|true_computation|"
                    r"false_computation)=(?:\{([^}]*)\}|%?([\w.\-]+))")


def _trips(line: str, lines: dict[str, list[str]]) -> int | None:
    """How often a while loop runs, None if the data decide; counters start at 0, as those of jax's loops do."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    found = re.search(r"condition=%?([\w.\-]+)", line)
    condition = "\n".join(lines.get(found[1], [])) if found else ""
    if end := re.search(r"ROOT .* compare\(.*%([\w.\-]+)\), direction=LT", condition):
        number = re.search(rf"%{re.escape(end[1])} = [su]32\[\]\S* constant\((\d+)\)", condition)
        return int(number[1]) if number else None
    return None


def walk(text: str) -> Iterator[tuple[str, bool, int, bool]]:
    """(line, inside, times, loop) of an optimised HLO text, as a device goes through it.

    inside: it is of a fusion, which a device runs as one line. times: how often; where `loop`, how often if the loops
    around it whose length the data decide had one pass each.
    """
    lines: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if found := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = found[2]
            entry, lines[name] = name if found[1] else entry, []
        elif line.startswith(" ") and name:
            lines[name].append(line)

    def visit(computation: str, inside: bool, times: int, loop: bool) -> Iterator[tuple[str, bool, int, bool]]:
        for line in lines[computation]:
            yield line, inside, times, loop
            trips = _trips(line, lines) if " while(" in line else 1
            for role, many, single in _CALLS.findall(line):
                for callee in re.findall(r"[\w.\-]+", many or single):
                    if callee in lines:
                        n = trips if role in ("body", "condition") else 1
                        yield from visit(callee, inside or " fusion(" in line, times * (n or 1), loop or not n)

    return visit(entry, False, 1, False)


def cycles(text: str) -> tuple[int, int]:
    """The compiler's estimate of a step in cycles, and that of one pass of each loop whose length the data decide.

    Of kernels (Pallas) and of exchanges it has none, of some loops the largest number there is in place of one.
    """
    total = [0, 0]
    for line, inside, times, loop in walk(text):
        if not inside and (found := re.search(r'"estimated_cycles":"(\d+)"', line)):
            total[loop] += times * int(found[1]) * (int(found[1]) < 2**63 - 1)
    return total[0], total[1]


def collectives(text: str, shape: dict[str, int]) -> list[Collective]:
    """The exchanges between devices in an optimised HLO text, loops multiplied out; the most bytes moved first.

    Args:
      shape: names and sizes of the mesh's axes; its devices are numbered in that order.
    """
    kinds, devices = "|".join(KINDS), int(np.prod(list(shape.values())))
    found_in: dict[Any, Collective] = {}
    for line, inside, times, loop in walk(text):
        if op := re.search(rf"= (.*?) ({kinds})(-start)?\(", line):
            groups = _groups(line, devices)
            kind, each, size = op[2], groups.shape[1], _array_bytes(op[1])
            if op[3] and kind == "all-gather":  # gives (what went in, what comes out)
                size = size * each // (each + 1)
            elif op[3] and kind == "collective-permute":
                size //= 2
            if kind == "reduce-scatter":
                size *= each
            share = {"all-reduce": 2 * (each - 1) / each, "collective-permute": 1.0}.get(kind, (each - 1) / each)
            where = re.search(r'op_name="([^"]*)"', line)
            one = Collective(kind, _axes(groups, shape), size, times, loop, round(share * size * times),
                             where[1] if where else "")
            # one that is spread over several fusions, to overlap with their work (and be it a loop's), appears in
            # each of them: it happens as often as the outermost
            channel = re.search(r"channel_id=\d+", line) if inside else None
            key = channel[0] if channel else len(found_in)
            found_in[key] = min(one, found_in.get(key, one), key=lambda c: (c.loop, c.times))
    alike: dict[tuple, list[Collective]] = collections.defaultdict(list)
    for one in found_in.values():
        alike[(one.kind, one.axes, one.bytes, one.loop, one.op)].append(one)
    out = [many[0]._replace(times=sum(o.times for o in many), moved=sum(o.moved for o in many))
           for many in alike.values()]
    return sorted(out, key=lambda c: (c.loop, -c.moved))


# ---- the plan --------------------------------------------------------------------------------------------------------


def _about(config: Config, devices: Sequence[Any], name: str, tokens: int, flops: float) -> Json:
    """What a plan of any step says of itself; step_s is arithmetic at MFU."""
    kind = devices[0].device_kind
    out: Json = {
        "config": name, "jax": jax.__version__, "compiler": " ".join(devices[0].client.platform_version.split()),
        "device_kind": kind, "devices": len(devices),
        "mesh": dict(zip(parallel.AXES, config.parallel.shape(len(devices)), strict=True)),
        "head": config.model.head_kind, "optimizer": config.optimizer.name,
        "attention": config.model.attention, "seq_len": config.model.seq_len, "tokens_per_step": tokens,
        "flops_per_step": flops, "mfu": MFU}
    if peak := peak_flops(kind):
        out["step_s"] = flops / (MFU * peak * len(devices))
    return out


def plan_sample(config: Config, devices: Sequence[Any], name: str = "") -> Json:
    """Compiles sampling for the devices: `peak` bytes of one of them, and arithmetic for a call of the network, which
    predicts every token of every row (`step_s`, at MFU)."""
    kind, hierarchy = devices[0].device_kind, balanced(config)
    gib, rows = CHIPS.get(kind, (None,))[0], config.generate.batch_size
    tokens = rows * config.model.seq_len
    flops = forward_flops(config, hierarchy, build(config, hierarchy)[1]) * tokens
    out = {"what": "sample", "remat": "sample", "microbatches": 1, "batch_size": rows} | _about(
        config, devices, name, tokens, flops)
    started = time.perf_counter()
    lowered, params = lower_sample(config, hierarchy, devices)
    out["parameters"] = sum(a.size for a in jax.tree.leaves(params))
    try:
        memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if not (said := parallel.out_of_memory(error)):
            raise
        return out | {"fits": False, "refused": said, "compile_s": time.perf_counter() - started}
    sizes = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
             "code": memory.generated_code_size_in_bytes, "outputs": memory.output_size_in_bytes}
    sizes["peak"] = sum(sizes.values())
    return out | {"bytes": sizes, "hbm_gib": gib, "fits": None if gib is None else sizes["peak"] < gib * 2**30,
                  "compile_s": time.perf_counter() - started, "collectives": [], "moved_bytes": 0,
                  "why": f"{sizes['peak'] / 2**30:.1f} GiB to sample {rows} rows"}


def plan(config: Config, devices: Sequence[Any], name: str = "") -> Json:
    """Compiles a config's training step for the devices and says what it needs, as a JSON object.

    Bytes are those of one device; `peak` is arguments + temporaries + code + what of the outputs is not an argument's
    place. Where the compiler refuses the program for its size there is `refused`, its words, in place of the bytes.
    `step_s`, `tokens_per_s` and `days` are arithmetic at MFU, `links_s` at the links' full speed, `estimate_s` the
    compiler's own estimate of all but kernels, exchanges and the head's loops (`estimate_a_pass_s`: one pass of these):
    no measurements.
    """
    kind, hierarchy = devices[0].device_kind, balanced(config)
    gib, links, clock = CHIPS.get(kind, (None, None, None))
    tokens = config.train.batch_size * config.model.seq_len
    flops = flops_per_token(config, hierarchy, build(config, hierarchy)[1]) * tokens
    out = _about(config, devices, name, tokens, flops) | {
        "remat": config.model.remat, "batch_size": config.train.batch_size, "microbatches": config.train.microbatches}
    if seconds := out.get("step_s"):
        out |= {"tokens_per_s": tokens / seconds, "days": TOKENS / tokens * seconds / 86_400}
    started = time.perf_counter()

    def compiled_as(way: Config) -> parallel.Compiled:
        lowered, state = lower(way, hierarchy, devices)
        out["parameters"] = sum(a.size for a in jax.tree.leaves(state.params))
        return lowered.compile()

    try:
        with parallel.made_for(parallel.make_mesh(config, devices)):
            found = fit(config, out["mesh"]["data"] * out["mesh"]["fsdp"], compiled_as, int((gib or 0) * 2**30))
    except TooLarge as error:
        return out | {"fits": False, "refused": str(error), "compile_s": time.perf_counter() - started}
    compiled, way = found.compiled, found.config
    out |= {"remat": way.model.remat, "microbatches": way.train.microbatches, "why": found.why}
    out["compile_s"] = time.perf_counter() - started
    out["host_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # the most so far; KiB on Linux
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    sizes = {"arguments": memory.argument_size_in_bytes, "outputs": memory.output_size_in_bytes,
             "aliased": memory.alias_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
             "code": memory.generated_code_size_in_bytes}
    sizes["peak"] = found.bytes
    exchanged = collectives(text, out["mesh"])
    out |= {"bytes": sizes, "hbm_gib": gib, "fits": None if gib is None else sizes["peak"] < gib * 2**30,
            "moved_bytes": sum(c.moved for c in exchanged if not c.loop),
            "moved_bytes_a_pass": sum(c.moved for c in exchanged if c.loop),
            "collectives": [c._asdict() for c in exchanged]}
    if links and clock:
        fixed, a_pass = cycles(text)
        out |= {"links_s": out["moved_bytes"] / links, "estimate_s": fixed / clock, "estimate_a_pass_s": a_pass / clock}
    return out


def table(plans: list[Json]) -> str:
    """Plans as a Markdown table; bytes are a device's, moved bytes and seconds those of a step."""
    names = ("recipe", "topology", "data × fsdp × tensor", "remat, parts", "state + temporary, GiB", "peak", "fits",
             "exchanges, GiB", "at full links, s", "estimate, s", f"at {MFU:.0%} MFU, s", "tokens/s at most",
             f"days for {TOKENS / 1e9:.0f}B, at least")
    rows = []
    for p in plans:
        gib = {name: f"{size / 2**30:.2f}" for name, size in p.get("bytes", {}).items()}
        number = lambda name, form, by=1.0, p=p: format(p[name] / by, form) if name in p else ""  # noqa: E731
        longer = max(1.0, p.get("estimate_s", 0.0) / p["step_s"]) if p.get("step_s") else 1.0  # the longer of the two
        loops = f" + {p['estimate_a_pass_s']:.4f} a pass" if p.get("estimate_a_pass_s") else ""
        rows.append((
            f"{p['config']}, {p['head']}" + ", muon" * (p.get("optimizer") == "muon"), p.get("topology", ""),
            " × ".join(map(str, p["mesh"].values())),
            f"{p.get('remat', '')}, {p['microbatches']}", f"{gib['arguments']} + {gib['temporaries']}" if gib else "",
            gib.get("peak", ""), {True: "yes", False: "no", None: ""}[p["fits"]], number("moved_bytes", ".1f", 2**30),
            number("links_s", ".2f"), number("estimate_s", ".3f") + loops, number("step_s", ".2f"),
            f"{p['tokens_per_s'] / longer:,.0f}" if "tokens_per_s" in p else "",
            f"{p['days'] * longer:.1f}" if "days" in p else ""))
    return markdown(names, rows)


def exchanges(found: list[Json], most: int) -> str:
    """The largest exchanges, a line each."""
    lines = []
    for c in found[:most]:
        op = re.sub(r"closed_call/|checkpoint/|jit\(train_step\)/", "", c["op"])
        lines.append(f"  {c['moved'] / 2**20:10,.1f} MiB moved: {c['times']:4d} x {c['kind']} of "
                     f"{c['bytes'] / 2**20:,.2f} MiB over {c['axes']}" + (" a pass of a loop" if c["loop"] else "")
                     + f"  {op[-90:]}")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, flags.FlagValues]:
    """The tool's own arguments, and those of a config (--config=FILE, --config.model.head=flat)."""
    ask = cli.Parser("plan", __doc__)
    ask.add_argument("--topology", default="v5e:16x16", help="chip and grid, as in v5e:16x16 or v5p:8x8x4")
    ask.add_argument("--slices", type=cli.at_least(1), default=1, help="of that topology, joined by a slower network")
    ask.add_argument("--what", choices=("train", "sample"), default="train", help="the step that is compiled")
    ask.add_argument("--mesh", action="append", default=[],
                     help="data,fsdp,tensor; may be given several times (default: the config's)")
    ask.add_argument("--out", default="", metavar="FILE", help="to add the plans to, a line of JSON each")
    ask.add_argument("--top", type=cli.at_least(0), default=12, help="exchanges to print a plan, the largest first")
    ask.add_argument("--table", action="append", default=[], metavar="FILE", help="only print the table of such files")
    given, rest = ask.parse_known_args(argv)
    f, rest = flags.FlagValues(), ["plan", *rest]
    config_flags.DEFINE_config_file("config", None, "A file of configs/.", flag_values=f, sys_argv=rest)
    if unknown := f(rest)[1:]:
        raise ConfigError(f"unexpected argument {unknown[0]!r}; flags begin with --")
    if f.config is None and not given.table:
        raise ConfigError("--config is missing; give a recipe, as in --config=configs/hdlm_7b.py")
    return given, f


def meshes(given: Any, shapes: Sequence[str]) -> list[Config]:
    """A config for each of the mesh shapes "data,fsdp,tensor"; without any, the config as it is."""
    out = []
    for text in shapes or [",".join(str(given.parallel[axis]) for axis in parallel.AXES)]:
        if not re.fullmatch(r"-?\d+,-?\d+,-?\d+", text):
            raise ConfigError(f"--mesh={text!r}: must be three whole numbers data,fsdp,tensor, as in 1,64,4")
        changed = given.copy_and_resolve_references()
        for axis, size in zip(parallel.AXES, text.split(","), strict=True):
            changed.parallel[axis] = int(size)
        out.append(configs.resolve(changed))
    return out


def main(argv: Sequence[str] | None = None) -> None:
    with cli.one_line("plan"):
        given, f = parse(argv)
        plans = []
        for file in given.table:
            with open(file) as lines:
                plans += [json.loads(line) for line in lines]
        if not given.table:
            jax.config.update("jax_platforms", "cpu")  # with libtpu installed jax would look for a TPU
            jax.config.update("jax_enable_compilation_cache", False)  # or compile_s is that of a look-up
            devices = topology(given.topology, given.slices)
            name = os.path.basename(config_flags.get_config_filename(f["config"])).replace(".py", "")
            for config in meshes(f.config, given.mesh):
                found = (plan if given.what == "train" else plan_sample)(config, devices, name) | {
                    "topology": given.topology if given.slices == 1 else f"{given.slices} x {given.topology}"}
                say(f"plan: {name}, {given.topology}, {found['mesh']}: {found.get('why', '')}\n"
                    + (found.get("refused") or exchanges(found["collectives"], given.top)))
                plans.append(found)
                if given.out:
                    with open(given.out, "a") as out:
                        out.write(jsons.dumps(found) + "\n")
        say(table(plans))


if __name__ == "__main__":
    main()
