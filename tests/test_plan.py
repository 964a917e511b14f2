"""The plan: exchanges read from compiled programs, tables that stay in their shards, the arithmetic of a step."""
import ast
import functools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hdlm_jax import config
from hdlm_jax.common import parallel
from hdlm_jax.models.attention import attention
from hdlm_jax.models.heads import chunk_size
from hdlm_jax.training.state import TrainState
from tools import plan

ROOT = Path(__file__).parent.parent
V, D, CLUSTERS = 1000, 32, 16


def settings(head="factorised", data=1, fsdp=2, tensor=4, **train):
    c = config.default()
    c.tokenizer.kind, c.tokenizer.vocab_size = "bpe", V
    c.hierarchy.clusters = (CLUSTERS,)
    c.model.width, c.model.blocks, c.model.heads, c.model.seq_len = D, 2, 4, 16
    c.model.head, c.model.prototypes, c.model.remat = head, 2, "all"
    c.train.batch_size = 8
    c.train.update(train)
    c.parallel.data, c.parallel.fsdp, c.parallel.tensor = data, fsdp, tensor
    return config.resolve(c)


@functools.cache
def small_plan(head):
    """The plan of a training step on 8 simulated devices, of which two are FSDP's and four share the tensors."""
    return plan.plan(settings(head), jax.devices(), "small")


# ---- reading programs -----------------------------------------------------------------------------------------------


def exchanges_of(body, specs, out_specs, *shapes):
    """What `collectives` finds in `body`, a function of each device's part, on a mesh of 2 x 2 x 2."""
    mesh = jax.make_mesh((2, 2, 2), parallel.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False))
    text = run.lower(*[jax.ShapeDtypeStruct(*s) for s in shapes]).compile().as_text()
    return {(c.kind, c.axes, c.bytes, c.times, c.loop): c.moved for c in plan.collectives(text, dict(mesh.shape))}


def test_exchanges_of_every_kind_with_their_axes_bytes_and_counts():
    """Known programs: what a device holds whole, over which axes, how often, and what a ring moves."""
    def body(x, n):
        def turn(x, _):
            return jax.lax.ppermute(jnp.sin(x), "data", [(0, 1), (1, 0)]), None

        def more(carry):  # as long as the data say
            i, y = carry
            return i + 1, jax.lax.psum(jnp.cos(y), ("data", "tensor"))

        x, _ = jax.lax.scan(turn, x, length=5)
        gathered = jax.lax.all_gather(x, "tensor", tiled=True)
        scattered = jax.lax.psum_scatter(jnp.sin(gathered), "fsdp", tiled=True)
        across = jax.lax.all_to_all(jnp.sin(scattered), "tensor", 1, 0, tiled=True)
        _, y = jax.lax.while_loop(lambda c: c[0] < n[0], more, (0, across))
        return jax.lax.psum(y, parallel.AXES)

    found = exchanges_of(body, (P(("data", "fsdp", "tensor")), P()), P(), ((64, 6), jnp.float32), ((1,), jnp.int32))
    part = 8 * 6 * 4  # bytes of one device's rows
    assert found == {
        ("collective-permute", "data", part, 5, False): 5 * part,
        ("all-gather", "tensor", 2 * part, 1, False): part,
        ("reduce-scatter", "fsdp", 2 * part, 1, False): part,
        ("all-to-all", "tensor", part, 1, False): part // 2,
        ("all-reduce", "data+tensor", part, 1, True): 2 * part * 3 // 4,
        ("all-reduce", "data+fsdp+tensor", part, 1, False): 2 * part * 7 // 8,
    }


TPU_TEXT = """HloModule step, is_scheduled=true

%fused_start (p: bf16[4,8]) -> (bf16[4,8], bf16[16,8]) {
  %p = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, GROUPS, dimensions={0}
  ROOT %t = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) tuple(%p, %all-gather.1)
}

%fused_step (p.1: bf16[4,8]) -> bf16[16,8] {
  %p.1 = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.1), channel_id=7, GROUPS, dimensions={0}
}

%body (c: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %c = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %x = bf16[4,8]{1,0} get-tuple-element(%c), index=1
  %fusion.2 = bf16[16,8]{1,0} fusion(%x), kind=kCustom, calls=%fused_step
  %all-gather-start.3 = (f32[2]{0}, f32[WHOLE]{0}) all-gather-start(%x), channel_id=9, GROUPS, dimensions={0}
  %sum = (f32[2,2]{1,0}, s32[]{:T(128)}) all-reduce(%x, %x), channel_id=9, replica_groups={{0,2},{1,3},{4,6},{5,7}}
  ROOT %r = (s32[]{:T(128)}, bf16[4,8]{1,0}) tuple(%x, %x)
}

%condition (c.1: (s32[], bf16[4,8])) -> pred[] {
  %end = s32[]{:T(128)} constant(3)
  %c.1 = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %end), direction=LT, metadata={op_name="lt"}
}

ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %start = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) fusion(%a), kind=kCustom, calls=%fused_start
  %w = (s32[]{:T(128)}, bf16[4,8]{1,0}) while(%a), condition=%condition, body=%body, metadata={op_name="f/while"}
  ROOT %out = bf16[4,8]{1,0} get-tuple-element(%w), index=1
}
"""


@pytest.mark.parametrize("groups, axes, size", [
    ("replica_groups=[2,4]<=[8]", "fsdp+tensor", 4),
    ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", "fsdp", 2),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", "fsdp+tensor", 4),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", "data", 2),
    ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)2}", "fsdp", 2),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", "data+fsdp", 4),
    ("replica_groups={{0,1,2,3},{4,5,6,7}}", "fsdp+tensor", 4),
    ("replica_groups={}", "data+fsdp+tensor", 8),
])
def test_what_the_tpu_compiler_writes(groups, axes, size):
    """One gather that overlaps with a loop's work is one; loops count by their condition; groups in every notation."""
    shape = dict(data=2, fsdp=2, tensor=2)
    found = plan.collectives(TPU_TEXT.replace("GROUPS", groups).replace("WHOLE", str(2 * size)), shape)
    spread, started = 16 * 8 * 2, 2 * size * 4
    assert {(c.kind, c.axes, c.bytes, c.times, c.loop) for c in found} == {
        ("all-gather", axes, spread, 1, False), ("all-gather", axes, started, 3, False),
        ("all-reduce", "fsdp", 20, 3, False)}


def test_groups_in_an_unknown_notation_are_refused():
    with pytest.raises(ValueError, match="replica_groups in a notation that this cannot read"):
        plan.collectives(TPU_TEXT.replace("GROUPS", "replica_groups=@mesh {'a'}").replace("WHOLE", "4"), {"data": 8})


# ---- the training step ----------------------------------------------------------------------------------------------


def over_tensor(head):
    found = [plan.Collective(**c) for c in small_plan(head)["collectives"]]
    assert found and any("tensor" in c.axes for c in found), "else this reads nothing"
    return [c for c in found if "tensor" in c.axes]


@pytest.mark.parametrize("head", [pytest.param("flat", marks=pytest.mark.slow), "factorised"])
def test_no_table_is_gathered_over_the_tensor_axis(head):
    """Nor is anything as large as a shard of one exchanged in the head's loops: logits alone are summed there."""
    table = 1024 * D * 4
    for c in over_tensor(head):
        assert c.kind != "all-gather" or c.bytes < table / 4, c
        assert not c.loop or c.bytes < table / 4, c
    assert any(c.loop for c in over_tensor(head)), "the head's loops are seen"
    for c in small_plan(head)["collectives"]:
        assert c["kind"] != "all-gather" or c["bytes"] < table, f"FSDP gathers a shard of the table: {c}"


def test_tokens_are_only_summed_in_a_block():
    """The residual stream is whole in every shard, and so are heads of attention: nothing is gathered or permuted."""
    queries = 4 * 16 * D * 4 // 4  # bytes of a shard's 4 sequences in one of the four parts
    inside = [c for c in over_tensor("factorised") if "stack" in c.op and "modulation" not in c.op]
    assert not [c for c in inside if c.kind != "all-reduce" and c.bytes >= queries]
    assert [c for c in inside if c.kind == "all-reduce" and c.bytes >= 4 * queries], "products are summed"


def test_tables_are_sharded_by_what_is_taken_of_them():
    mesh = jax.make_mesh((1, 2, 4), parallel.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    _, flat = plan.lower(settings("flat"), plan.balanced(settings("flat")), jax.devices())
    _, factorised = plan.lower(settings(), plan.balanced(settings()), jax.devices())
    specs = jax.tree.map(lambda a: a.sharding.spec, (flat.params, factorised.params))
    assert specs[0]["head"]["kernel"] == P("tensor", "fsdp"), "words"
    assert specs[1]["head"]["words"]["kernel"] == P("fsdp", "tensor"), "width: blocks of rows stay whole"
    assert specs[1]["head"]["clusters"]["kernel"][0] == "tensor"
    assert specs[1]["stack"]["qkv"]["kernel"] == P(None, "fsdp", None, "tensor")
    assert factorised.opt_state[1][0].mu["head"]["words"]["kernel"].sharding == NamedSharding(mesh, P("fsdp", "tensor"))


def test_a_plan_is_the_arithmetic_of_its_config(monkeypatch):
    """Bytes are the compiler's own; step time, tokens/s and days follow from FLOPs, peak and MFU."""
    found = small_plan("factorised")
    assert "step_s" not in found and found["fits"] is None, "nothing is known of this chip"
    assert found["tokens_per_step"] == 8 * 16 and found["mesh"] == {"data": 1, "fsdp": 2, "tensor": 4}
    b = found["bytes"]
    assert b["peak"] == b["arguments"] + b["temporaries"] + b["code"] + b["outputs"] - b["aliased"]
    state = 3 * 4 * found["parameters"]  # weights and two moments, float32, over 8 devices; small ones on each
    assert state / 8 < b["arguments"] < state / 2 and b["aliased"] > state / 8
    assert found["moved_bytes"] == sum(c["moved"] for c in found["collectives"] if not c["loop"]) > 0
    moved = [c["moved"] for c in found["collectives"] if not c["loop"]]
    assert moved == sorted(moved, reverse=True)

    kind = jax.devices()[0].device_kind
    monkeypatch.setattr(plan, "peak_flops", lambda name: {kind: 1e9}[name])
    monkeypatch.setitem(plan.CHIPS, kind, (1.0, 1e6, 1e9))
    monkeypatch.setattr(plan, "collectives", lambda *_: [plan.Collective("all-gather", "fsdp", 1, 1, False, 500, "")])
    again = plan.plan(settings("flat", data=8, fsdp=1, tensor=1, microbatches=1), jax.devices(), "again")
    seconds = again["flops_per_step"] / (plan.MFU * 1e9 * 8)
    assert again["step_s"] == pytest.approx(seconds) and again["tokens_per_s"] == pytest.approx(128 / seconds)
    assert again["days"] == pytest.approx(131e9 / (128 / seconds) / 86_400)
    assert again["links_s"] == pytest.approx(500 / 1e6)
    assert again["fits"] is True and again["bytes"]["peak"] < 2**30
    lines = plan.table([found, again]).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert f"{again['tokens_per_s']:,.0f}" in lines[3] and "1 × 2 × 4" in lines[2]


def test_what_the_compiler_refuses_is_said(monkeypatch):
    class Refused:
        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory\n23.00G exceeds 15.75G")

    monkeypatch.setattr(plan, "lower", lambda *_: (Refused(), TrainState(0, 0, {}, {}, {})))
    found = plan.plan(settings(), jax.devices())
    assert found["fits"] is False and "Ran out of memory 23.00G exceeds 15.75G" in found["refused"]
    assert "no" in plan.table([found]).splitlines()[2].split("|")[7]


def test_programs_are_made_for_the_target(monkeypatch):
    """On CPU: chunks, attention and what is recomputed are those of the mesh while it is named, and only then."""
    q = jnp.zeros((1, 256, 2, 8))
    attend = lambda: str(jax.make_jaxpr(lambda q: attention(q, q, q, kernel="auto"))(q))  # noqa: E731
    here, ours = chunk_size(), attend()
    tpu = SimpleNamespace(devices=np.array([SimpleNamespace(platform="tpu")]), shape=dict.fromkeys(parallel.AXES, 1))
    with parallel.made_for(tpu):
        assert parallel.platform() == "tpu" and chunk_size() > here
        assert attend() != ours and "pallas" in attend()
    assert (chunk_size(), parallel.platform()) == (here, "cpu") and attend() == ours


# ---- the command ----------------------------------------------------------------------------------------------------


def test_recipes_say_what_they_fit_on():
    for path in sorted((ROOT / "configs").glob("*.py")):
        assert "\nFits on" in (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""), path.name


def test_recipes_of_scale():
    """What their names say, on 256 chips: parameters, tokens, and a batch that divides over every mesh of the plan."""
    for name, billions in (("hdlm_1b", 1.15), ("hdlm_7b", 6.97)):
        space: dict = {}
        exec((ROOT / "configs" / f"{name}.py").read_text(), space)
        given = space["get_config"]()
        c = config.resolve(given)
        network, _ = plan.build(c, plan.balanced(c))
        shapes = jax.eval_shape(lambda n=network: n.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32), jnp.zeros(1)))
        assert sum(math.prod(a.shape) for a in jax.tree.leaves(shapes)) / 1e9 == pytest.approx(billions, rel=0.01)
        assert c.train.steps * c.train.batch_size * c.model.seq_len == pytest.approx(131e9, rel=0.01)
        assert f"{billions}B parameters" in space["__doc__"]
        for mesh in plan.meshes(given, re.findall(r"--mesh=([\d,]+)", (ROOT / "launch/compile_plan.sh").read_text())):
            data, fsdp, tensor = mesh.parallel.shape(256)
            assert c.train.batch_size % (data * fsdp) == 0 and c.model.heads % tensor == 0


def test_the_command_says_what_is_wrong_in_a_line(monkeypatch):
    recipe = f"--config={ROOT}/configs/hdlm_7b.py"
    monkeypatch.setattr(plan, "topology", lambda name, slices: jax.devices())
    for arguments, words in [
        ([], "--config is missing"),
        ([recipe, "--mesh=1,8"], "--mesh='1,8': must be three whole numbers data,fsdp,tensor, as in 1,64,4"),
        ([recipe, "--mesh=1,5,1"], "parallel=(1, 5, 1): does not multiply to the 8 devices"),
        ([recipe, "--mesh=1,8,1", "--config.train.batch_size=12"], "train.batch_size=12: must be a multiple of 16"),
        ([recipe, "rest"], "unexpected argument 'rest'"),
    ]:
        with pytest.raises(SystemExit, match=f"^plan: [^\n]*{re.escape(words)}[^\n]*$"):
            plan.main(arguments)


def test_plans_are_kept_a_line_each(tmp_path, capsys, monkeypatch):
    file = tmp_path / "plans.jsonl"
    monkeypatch.setattr(plan, "topology", lambda name, slices: jax.devices())
    found = small_plan("factorised")
    monkeypatch.setattr(plan, "plan", lambda config, devices, name: found | {"config": name})
    arguments = [f"--config={ROOT}/configs/hdlm_7b.py", "--mesh=1,2,4", "--mesh=2,2,2", f"--out={file}"]
    plan.main(arguments)
    assert [json.loads(line)["config"] for line in file.read_text().splitlines()] == ["hdlm_7b"] * 2
    said = capsys.readouterr().out
    assert said.count("MiB moved") == 24, "the largest of each"
    plan.main([f"--table={file}"])
    assert capsys.readouterr().out.strip() == said[said.index("| recipe"):].strip()


@pytest.mark.slow
def test_compiles_for_a_tpu_that_is_not_here():
    pytest.importorskip("libtpu")
    found = plan.plan(settings(data=1, fsdp=2, tensor=2), plan.topology("v5e:2x2"), "small")
    assert found["device_kind"] == "TPU v5 lite" and found["fits"] and found["collectives"]
    assert np.isfinite(found["step_s"]) and found["days"] > 0
    with pytest.raises(config.ConfigError, match="'v5e:17x3': must be a chip and its grid"):
        plan.topology("v5e:17x3")


class Chip:
    """A TPU of a slice, as far as a mesh asks."""

    platform, device_kind, core_on_chip, client = "tpu", "TPU v5 lite", 0, None

    def __init__(self, slice_index, x, y):
        self.slice_index = self.process_index = slice_index
        self.id, self.coords = 4 * slice_index + 2 * y + x, (x, y, 0)


def test_over_slices_goes_the_data_axis_alone():
    """Two slices of 2 x 2: neighbours along fsdp and tensor are of one slice; what asks for more is refused."""
    chips = [Chip(s, x, y) for s in range(2) for y in range(2) for x in range(2)]
    for shape in ((2, 4, 1), (4, 2, 1), (2, 2, 2), (8, 1, 1)):
        found = parallel.make_mesh(settings("flat", *shape), chips)
        slices = np.vectorize(lambda chip: chip.slice_index)(found.devices)
        assert found.axis_names == parallel.AXES and slices.shape == shape
        assert {chip.id for chip in found.devices.flat} == set(range(8))
        assert (slices == slices[:, :1, :1]).all() and sorted(slices[:, 0, 0]) == [0] * (shape[0] // 2) + [1] * (
            shape[0] // 2)
    for shape in ((1, 8, 1), (1, 4, 2)):
        with pytest.raises(config.ConfigError, match="parallel.data=1: must be a multiple of the 2 slices"):
            parallel.make_mesh(settings("flat", *shape), chips)
    one = parallel.make_mesh(settings("flat", 1, 4, 1), chips[:4])
    assert one.devices.shape == (1, 4, 1)


def test_cycles_are_those_a_device_goes_through():
    """Fusions count as one line, loops by their length, those whose length the data decide by themselves."""
    text = """
%fused (p: f32[8]) -> f32[8] {
  %inside = f32[8] add(%p, %p), backend_config={"estimated_cycles":"1000"}
}

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %work = f32[8] fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"7"}
}

%cond (s: (s32[], f32[8])) -> pred[] {
  %n = s32[] parameter(0)
}

%windowed (s: (u32[], f32[8])) -> pred[] {
  %end = u32[]{:T(128)} constant(4)
  ROOT %less = pred[]{:T(512)} compare(%at, %end), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %first = f32[8] fusion(%a), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"100"}
  %known = (s32[], f32[8]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %unknown = f32[8] fusion(%a), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"9223372036854775807"}
  %exchanged = (u32[], f32[8]) while(%t), condition=%windowed, body=%body
  %data = (s32[], f32[8]) while(%t), condition=%cond, body=%body
}
"""
    assert plan.cycles(text) == (100 + 5 * 7 + 4 * 7, 7)
