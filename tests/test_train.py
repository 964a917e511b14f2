"""The training step and loop: one path for any devices and microbatches, exact resume, clear stops."""

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import owt
import pytest
import tiny

from hdlm_jax import config as config_lib
from hdlm_jax.common import jsons, parallel
from hdlm_jax.config import ConfigError
from hdlm_jax.data import pipeline
from hdlm_jax.data.pipeline import Split
from hdlm_jax.data.prepare import load_manifest
from hdlm_jax.decoding.sampler import make_sample_step, numbers_of, program_of
from hdlm_jax.diffusion.draws import fold
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.models.network import TENSOR_AXES
from hdlm_jax.runs import interrupt, train
from hdlm_jax.training import step as step_lib
from hdlm_jax.training.metrics import read_metrics
from hdlm_jax.training.state import abstract_state, build, init_state, make_optimizer
from hdlm_jax.training.step import make_loss_sums, make_train_step
from hdlm_jax.training.views import stratified_tau

V, S, B = 40, 8, 16
HIERARCHY = Hierarchy.from_parents([np.arange(V) % 6, np.arange(6) % 2])


def make_config(**changes):
    c = config_lib.default()
    c.tokenizer.kind, c.tokenizer.vocab_size = "bytes", 257
    c.hierarchy.clusters = (6, 2)
    c.diffusion.weighting = "none"
    c.diffusion.xi = 0.9
    c.model.width, c.model.blocks, c.model.heads, c.model.seq_len = 16, 2, 2, S
    c.optimizer.warmup, c.optimizer.lr, c.optimizer.ema = 2, 1e-2, 0.9
    c.optimizer.eps = 1e-3  # so that Adam does not blow rounding up to whole steps
    c.train.batch_size, c.train.steps = B, 6
    for name, value in changes.items():
        section, field = name.split("__")
        c[section][field] = value
    return config_lib.resolve(c)


def make_batch(step=0, score=False):
    rng = np.random.default_rng(step)
    batch = {"x": rng.integers(0, V, (B, S)).astype(np.int32), "index": np.arange(B, dtype=np.int32)}
    if score:  # unequal counts per row, hence per device
        batch["score"] = np.arange(S)[None] >= np.arange(B)[:, None] % (S - 1)
    return batch


def warm_params(config):
    """Parameters with nothing at zero, so that every gradient and every draw depends on everything."""
    network, _ = build(config, HIERARCHY)
    tx, _ = make_optimizer(config)
    params = jax.jit(lambda k: init_state(config, network, tx, k))(jax.random.key(0)).params
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda a: np.float32(a + 0.2 * rng.standard_normal(a.shape)), params)


def run_steps(config, devices, steps=3):
    network, process = build(config, HIERARCHY)
    tx, _ = make_optimizer(config)
    mesh = parallel.make_mesh(config, devices)
    _, shardings = abstract_state(config, network, tx, mesh)
    state = jax.jit(lambda k: init_state(config, network, tx, k), out_shardings=shardings)(jax.random.key(0))
    step = make_train_step(config, network, process, tx, mesh)
    step = parallel.compile_step(step, mesh, shardings)
    losses = []
    for i in range(steps):
        state, metrics = step(state, parallel.put_batch(mesh, make_batch(i)), jax.random.key(7))
        losses.append([float(metrics[k]) for k in ("loss", "nelbo", "grad_norm")])
    return np.array(losses), jax.tree.map(np.asarray, state)


@functools.cache
def one_device(**changes):
    return run_steps(make_config(**changes), jax.devices()[:1])


@pytest.mark.parametrize("head", ["flat", "factorised"])
def test_a_warm_head_starts_from_the_embeddings(head):
    """Its vector of a word is the word's embedding, that of a class (one prototype) the mean of its words'."""
    changes = dict(model__head=head, model__prototypes=1, model__embeddings="clusters")
    table = np.random.default_rng(0).standard_normal((HIERARCHY.num_states, 16)).astype(np.float32)
    made = {}
    for warm in (False, True):
        config = make_config(model__warm_head=warm, **changes)
        network, _ = build(config, HIERARCHY)
        state = init_state(config, network, make_optimizer(config)[0], jax.random.key(0), table)
        made[warm] = state.params
        np.testing.assert_array_equal(state.params["embedding"][:V], table[:V])
    own = made[True]["head"]
    words = own["kernel"][:V] if head == "flat" else own["words"]["kernel"][network.head.blocks.row]
    np.testing.assert_array_equal(words, table[:V])
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(
        *(jax.tree.leaves({**p, "head": None}) for p in made.values()), strict=True))
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(
        jax.tree.leaves(own), jax.tree.leaves(state.ema["head"]), strict=True))
    even = np.asarray(network.head.logits(own, np.zeros(16, np.float32)))
    np.testing.assert_allclose(even - even[0], 0, atol=1e-5)  # no word is likelier before there is a context
    if head == "factorised":
        mean = [table[:V][HIERARCHY.anc[1][:V] == c].mean(0) for c in range(6)]
        np.testing.assert_allclose(own["clusters"]["kernel"], mean, rtol=1e-5)


@pytest.mark.parametrize("name, changes", [
    ("map", dict(hierarchy__map="learned", train__objective="paired")), ("signal", dict(diffusion__channel=0.1))])
def test_a_warm_head_keeps_what_else_a_head_has(name, changes):
    hierarchy = Hierarchy.from_parents([np.arange(V) % 6])
    config = make_config(hierarchy__clusters=(6,), diffusion__xi=0.9 if name == "map" else 1.0, model__warm_head=True,
                         model__embeddings="clusters", **changes)
    network, _ = build(config, hierarchy)
    table = np.ones((hierarchy.num_states, 16), np.float32)
    made = jax.eval_shape(lambda: init_state(config, network, make_optimizer(config)[0], jax.random.key(0), table))
    assert set(made.params["head"]) == {"kernel", "bias", name}


BLOCKS = dict(train__objective="count", model__block=4, model__time_conditioning=False)
SPLIT = dict(parallel__data=2, parallel__fsdp=2, parallel__tensor=2, train__microbatches=2)


@pytest.mark.parametrize(
    "head, devices, changes",
    [
        pytest.param("flat", 8, dict(), marks=pytest.mark.slow),
        pytest.param("flat", 8, SPLIT, marks=pytest.mark.slow),
        pytest.param("flat", 1, dict(train__microbatches=4), marks=pytest.mark.slow),
        pytest.param("flat", 1, dict(model__remat="all"), marks=pytest.mark.slow),
        pytest.param("flat", 8, SPLIT | dict(optimizer__name="muon"), marks=pytest.mark.slow),
        pytest.param("flat", 8, SPLIT | dict(model__tied=True), marks=pytest.mark.slow),
        pytest.param("factorised", 8, SPLIT, marks=pytest.mark.slow),
        pytest.param("factorised", 8, SPLIT | BLOCKS, marks=pytest.mark.slow),
    ],
    ids=["data8", "data2-fsdp2-tensor2-microbatches2", "microbatches4", "remat", "muon", "tied", "factorised",
         "blocks"],
)
def test_one_path_for_any_mesh_and_microbatches(head, devices, changes):
    losses, state = run_steps(make_config(model__head=head, **changes), jax.devices()[:devices])
    same = {name: value for name, value in changes.items()
            if name in ("optimizer__name", "model__tied", *BLOCKS)}
    expected, reference = one_device(model__head=head, **same)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, reference.params)
    assert max(jax.tree.leaves(moved)) < 1e-5


def test_parameters_are_really_sharded():
    config = make_config(parallel__data=2, parallel__fsdp=2, parallel__tensor=2)
    network, _ = build(config, HIERARCHY)
    mesh = parallel.make_mesh(config)
    abstract, _ = abstract_state(config, network, make_optimizer(config)[0], mesh)
    table = abstract.params["embedding"]
    assert table.sharding.spec == jax.sharding.PartitionSpec("tensor", "fsdp")
    assert abstract.opt_state[1][0].mu["embedding"].sharding == table.sharding


def test_literal_pmap_equals_jit():
    """Per-device sums and counts with unequal padding: jax.pmap on 8 devices gives the loss and gradient of jit."""
    config = make_config()
    network, process = build(config, HIERARCHY)
    params, batch, key = warm_params(config), make_batch(score=True), jax.random.key(1)
    loss_sums = make_loss_sums(config, network, process)

    def loss_and_grad(params, batch):
        (loss, (_, tokens)), grads = jax.value_and_grad(
            lambda p: (lambda a, b, c: (a, (b, c)))(*loss_sums(p, batch, key)), has_aux=True)(params)
        return loss, tokens, grads

    loss, tokens, grads = jax.jit(loss_and_grad)(params, batch)

    def on_device(params, batch):
        return jax.lax.psum(loss_and_grad(params, batch), "i")

    split = {k: v.reshape(8, B // 8, *v.shape[1:]) for k, v in batch.items()}
    counts = split["score"].sum((1, 2))
    assert len(set(counts.tolist())) > 1
    loss_p, tokens_p, grads_p = jax.pmap(on_device, axis_name="i", in_axes=(None, 0))(params, split)
    assert float(tokens_p[0]) == float(tokens) == batch["score"].sum()
    np.testing.assert_allclose(loss_p[0] / tokens_p[0], loss / tokens, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads_p), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a[0], b, rtol=2e-4, atol=1e-5 * np.abs(b).max())  # float32 sums in another order


@pytest.mark.parametrize("method", [
    pytest.param(m, marks=pytest.mark.slow) for m in ("max_prob", "ancestral", "first_hitting")])
def test_pmap_and_eight_devices_sample_the_same_tokens(method):
    head = "factorised" if method == "ancestral" else "flat"
    config = make_config(model__head=head, generate__method=method, generate__steps=5)
    network, process = build(config, HIERARCHY)
    params, key = warm_params(config), jax.random.key(2)
    batch = {"z": np.full((B, S), HIERARCHY.mask_id, np.int32), "index": np.arange(B, dtype=np.int32)}
    step = make_sample_step(network, process, program_of(config.generate))
    given = (params, numbers_of(config.generate, S))
    expected = jax.jit(step)(given, batch, key)["tokens"]
    mesh = parallel.make_mesh(config)
    placed = jax.device_put(params, parallel.replicated(mesh))
    divided = make_sample_step(network, process, program_of(config.generate), mesh)
    compiled = parallel.compile_sample_step(divided, mesh, placed)
    eight = compiled((placed, given[1]), parallel.put_batch(mesh, batch), key)["tokens"]
    np.testing.assert_array_equal(eight, expected)
    split = {k: v.reshape(8, B // 8, *v.shape[1:]) for k, v in batch.items()}
    mapped = jax.pmap(step, in_axes=(None, 0, None))(given, split, key)["tokens"]
    np.testing.assert_array_equal(mapped.reshape(B, S), expected)
    assert np.asarray(expected).max() < V


@pytest.mark.parametrize("head", ["factorised", pytest.param("flat", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_shards_with_more_and_less_to_do_keep_step(head):
    """A tensor axis exchanges inside the sampler's loops: a shard that is done must wait for the others, not they."""
    split = dict(parallel__data=2, parallel__fsdp=2, parallel__tensor=2)
    config = make_config(model__head=head, generate__steps=4, **split)
    network, process = build(config, HIERARCHY)
    params, key = warm_params(config), jax.random.key(2)
    canvas = np.full((B, S), HIERARCHY.mask_id, np.int32)
    canvas[: B // 4], canvas[B // 4, 1:] = 3, 5  # nothing to do for the first of four shards, one row less for another
    batch = {"z": canvas, "index": np.arange(B, dtype=np.int32)}
    given = (params, numbers_of(config.generate, S))
    expected = jax.jit(make_sample_step(network, process, program_of(config.generate)))(given, batch, key)["tokens"]
    mesh = parallel.make_mesh(config)
    placed = jax.device_put(params, parallel.state_shardings(mesh, params, TENSOR_AXES))
    step = make_sample_step(network, process, program_of(config.generate), mesh)
    step = parallel.compile_sample_step(step, mesh, placed)
    found = step((placed, given[1]), parallel.put_batch(mesh, batch), key)["tokens"]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("changes", [dict(), BLOCKS], ids=["rows", "blocks"])
@pytest.mark.slow
def test_sums_over_parts_of_a_batch_add_up(changes):
    """Randomness belongs to the row: halves of a batch give the sums of the whole, with dropout as well."""
    config = make_config(model__dropout=0.3, **changes)
    network, process = build(config, HIERARCHY)
    sums = jax.jit(make_loss_sums(config, network, process))
    params, batch, key = warm_params(config), make_batch(), jax.random.key(5)
    whole = np.array(sums(params, batch, key))
    halves = [{k: v[i : i + B // 2] for k, v in batch.items()} for i in (0, B // 2)]
    np.testing.assert_allclose(sum(np.array(sums(params, h, key)) for h in halves), whole, rtol=1e-5)


def test_prompts_are_neither_noised_nor_scored():
    config = make_config(diffusion__xi=1.0)
    network, process = build(config, HIERARCHY)
    params, batch, key = warm_params(config), make_batch(score=True), jax.random.key(5)
    sums = jax.jit(make_loss_sums(config, network, process))
    loss, _, tokens = sums(params, batch, key)
    assert float(tokens) == batch["score"].sum()
    # all of a row given: nothing is noised, whatever the time, so there is no loss at all
    nothing = batch | {"score": np.zeros((B, S), bool)}
    assert float(sums(params, nothing, key)[0]) == 0.0
    assert float(loss) > 0.0


def test_stratified_times_cover_the_strata():
    n = 4096
    keys = fold(jnp.broadcast_to(jax.random.key(0), (n,)), jnp.arange(n))
    tau = np.asarray(jax.jit(stratified_tau, static_argnums=2)(keys, jnp.arange(n), n), np.float64)
    assert np.isfinite(tau).all() and (tau > 0).all()
    t = -np.expm1(-tau)
    np.testing.assert_array_equal(np.floor(t * n + 1e-3 * (np.arange(n) == 0)).astype(int)[:-1], np.arange(n)[:-1])
    # one row in all: uniform on (0, 1), so tau is a unit exponential
    alone = np.asarray(jax.vmap(lambda k: stratified_tau(k[None], jnp.zeros(1, int), 1)[0])(keys), np.float64)
    assert abs(alone.mean() - 1) < 4 / math.sqrt(n)
    assert abs((alone**2).mean() - 2) < 4 * math.sqrt(20 / n)


def test_schedule_and_first_update():
    config = make_config(train__steps=100, optimizer__warmup=10, optimizer__lr=1.0)
    schedule = make_optimizer(config)[1]
    assert float(schedule(0)) == pytest.approx(0.1) and float(schedule(9)) == pytest.approx(1.0)
    assert float(schedule(99)) == pytest.approx(0.1, abs=1e-3)
    constant = make_optimizer(make_config(optimizer__schedule="constant", optimizer__lr=1.0))[1]
    assert float(constant(1000)) == 1.0


# -- the loop ----------------------------------------------------------------------------------------------------------

SENTENCE = "the cat sat on the mat and the dog sat on the log. "


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    with open(folder / "text.jsonl", "w") as f:
        for i in range(60):
            f.write(json.dumps({"text": SENTENCE * (1 + i % 5) + str(i), "more": SENTENCE[i % 7 :][: i + 1]}) + "\n")
    return folder


@pytest.fixture
def alone(monkeypatch):
    """The loop on one of the simulated devices: it compiles in a fraction of the time."""
    make = parallel.make_mesh
    monkeypatch.setattr(parallel, "make_mesh", lambda config, devices=None: make(config, jax.devices()[:1]))


def loop_config(corpus, **changes):
    c = config_lib.default()
    c.data.source, c.data.files = "files", (str(corpus / "text.jsonl"),)
    c.data.validation_fraction = 0.2
    c.data.dir = str(corpus / "data")
    c.tokenizer.kind, c.tokenizer.vocab_size = "bytes", 257
    c.hierarchy.clusters = (8,)
    c.diffusion.weighting = "constant"
    c.model.width, c.model.blocks, c.model.heads, c.model.seq_len = 16, 1, 2, 16
    c.optimizer.warmup, c.optimizer.lr, c.optimizer.ema = 2, 1e-2, 0.5
    c.train.batch_size, c.train.steps, c.train.log_every, c.checkpoint.every = 16, 10, 1, 4
    c.evaluate.rows_in_training, c.evaluate.batch_size = 8, 8
    for name, value in changes.items():
        section, field = name.split("__")
        c[section][field] = value
    return c


def flat(state):
    return [np.asarray(a) for a in jax.tree.leaves(state)]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rerun_resumes_and_ends_as_if_never_stopped(corpus, tmp_path, alone, optimizer):
    """Stopped at step 6 (checkpoint 4 and 6 saved), then the full run: bit for bit the undisturbed one."""
    settings = functools.partial(loop_config, optimizer__name=optimizer)
    whole = train.train(config_lib.resolve(settings(corpus)), str(tmp_path / "whole"))
    workdir = str(tmp_path / "parts")
    # a constant rate, so that the shorter run is a prefix of the longer one
    train.train(config_lib.resolve(settings(corpus, optimizer__schedule="constant", train__steps=6)), workdir)
    parts = train.train(config_lib.resolve(settings(corpus, optimizer__schedule="constant")), workdir)
    constant = train.train(config_lib.resolve(settings(corpus, optimizer__schedule="constant")), str(tmp_path / "c"))
    for a, b in zip(flat(parts), flat(constant), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(not np.array_equal(a, b) for a, b in zip(flat(whole), flat(constant), strict=True))
    steps = [r["step"] for r in read_metrics(os.path.join(workdir, "metrics.jsonl"))]
    assert steps == list(range(1, 11))
    again = train.train(config_lib.resolve(settings(corpus, optimizer__schedule="constant")), workdir)
    np.testing.assert_array_equal(flat(again)[0], flat(parts)[0])
    with pytest.raises(ConfigError, match="train.steps=12"):
        train.train(config_lib.resolve(settings(corpus, train__steps=12)), str(tmp_path / "whole"))
    with pytest.raises(ConfigError, match="optimizer.lr=0.5"):
        train.train(config_lib.resolve(settings(corpus, optimizer__schedule="constant", optimizer__lr=0.5)), workdir)


def front_door(folder, config):
    """(command(workdir, *flags), environment) of training in a process of its own."""
    script = folder / "config.py"
    script.write_text("import json\nfrom hdlm_jax import config\n\ndef get_config():\n    c = config.default()\n"
                      f"    c.update(json.loads({config.to_json()!r}))\n    return c\n")

    def command(workdir, *flags):
        return [sys.executable, "-m", "hdlm_jax.main", f"--config={script}", f"--workdir={workdir}", *flags]

    return command, os.environ | {"XLA_FLAGS": tiny.QUICK_COMPILES, "CI": "1"}


def test_killed_and_resumed_equals_never_killed(corpus, tmp_path):
    """SIGKILL off a checkpoint boundary, then the same command: params, optimizer, EMA and position bit for bit."""
    config = loop_config(corpus, train__steps=200, checkpoint__every=40)
    command, env = front_door(tmp_path, config)
    killed = tmp_path / "killed"
    process = subprocess.Popen(command(killed), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.time() + 240
    seen = 0
    while time.time() < deadline and process.poll() is None:
        seen = max([r["step"] for r in read_metrics(str(killed / "metrics.jsonl"))], default=0)
        complete = any(p.name.isdigit() for p in killed.glob("checkpoints/*"))  # under way it has a longer name
        if complete and 5 <= seen % 40 <= 30:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    output = process.communicate()[0].decode()
    assert process.returncode == -signal.SIGKILL, output
    assert 40 < seen < 200 and seen % 40
    for workdir in (killed, tmp_path / "whole"):
        done = subprocess.run(command(workdir), env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        if workdir == killed:
            assert "resuming from step" in done.stdout
    from hdlm_jax.training.checkpoint import Checkpoints

    states = []
    for workdir in (killed, tmp_path / "whole"):
        checkpoints = Checkpoints(str(workdir), read_only=True)
        assert checkpoints.latest() == 200 and checkpoints.meta(200)["position"] == {"next_index": 200}
        resolved = config_lib.resolve(config)
        hierarchy = Hierarchy.load(workdir / "hierarchy.npz")
        network, _ = build(resolved, hierarchy)
        mesh = parallel.make_mesh(resolved)
        abstract, _ = abstract_state(resolved, network, make_optimizer(resolved)[0], mesh)
        states.append(flat(checkpoints.restore(200, abstract)))
    for a, b in zip(*states, strict=True):
        np.testing.assert_array_equal(a, b)
    assert [r["step"] for r in read_metrics(str(killed / "metrics.jsonl"))] == list(range(1, 201))


@pytest.mark.slow
def test_learns_and_starts_from_another_run(corpus, tmp_path, alone):
    config = config_lib.resolve(loop_config(corpus, train__steps=60, checkpoint__every=60, train__log_every=10))
    train.train(config, str(tmp_path / "first"))
    records = read_metrics(str(tmp_path / "first" / "metrics.jsonl"))
    assert records[-1]["valid_nelbo"] < 3.2 and records[-1]["loss"] < 0.75 * records[0]["loss"]
    from hdlm_jax.training.loading import load_base

    more = config_lib.resolve(loop_config(corpus, train__steps=1, train__init_from=str(tmp_path / "first"),
                                          optimizer__lr=1e-9))
    state = train.train(more, str(tmp_path / "second"))
    first = load_base(more, _tokenizer(corpus).fingerprint).params
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(first), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)
    with pytest.raises(ConfigError, match="other shapes"):
        bad = loop_config(corpus, train__init_from=str(tmp_path / "first"), model__width=32)
        train.train(config_lib.resolve(bad), str(tmp_path / "third"))
    # on other text, where clustering anew would give cluster ids that the weights do not mean
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "text.jsonl").write_text("".join(
        json.dumps({"question": f"how many? {i}", "text": SENTENCE[::-1] * 3 + str(i)}) + "\n" for i in range(40)))
    tuned = loop_config(tmp_path / "new", train__steps=2, train__init_from=str(tmp_path / "first"),
                        data__prompt_field="question", data__packing="crop")
    train.train(config_lib.resolve(tuned), str(tmp_path / "tuned"))
    theirs, ours = (Hierarchy.load(tmp_path / name / "hierarchy.npz") for name in ("first", "tuned"))
    assert theirs.fingerprint == ours.fingerprint


def _tokenizer(corpus):
    from hdlm_jax.data.tokenizers import load_tokenizer

    return load_tokenizer(corpus / "data")


@pytest.mark.parametrize("data", [
    pytest.param(dict(packing="documents"), marks=pytest.mark.slow),
    pytest.param(dict(packing="crop", prompt_field="text", text_field="more"), marks=pytest.mark.slow),
    pytest.param(dict(stream=True, shuffle_documents=7, sample_bytes=5000, variable_share=0.5),
                 marks=pytest.mark.slow),
    pytest.param(dict(stream=True, packing="crop", shuffle_documents=7), marks=pytest.mark.slow)],
    ids=["documents", "crop-prompts", "stream-variable", "stream-crop"])
def test_every_kind_of_sequence_resumes_where_it_was(corpus, tmp_path, monkeypatch, alone, data):
    config = loop_config(corpus, train__steps=6, checkpoint__every=100, data__dir=str(tmp_path / "data"))
    config.data.update(data)
    config = config_lib.resolve(config)
    whole = train.train(config, str(tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(interrupt.Stop, "at", lambda self, step: step == 4)
        train.train(config, str(tmp_path / "run"))
    state = train.train(config, str(tmp_path / "run"))
    for a, b in zip(flat(state), flat(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    last = read_metrics(str(tmp_path / "run" / "metrics.jsonl"))[-1]
    assert int(state.skipped) == 0 and np.isfinite(last["valid_nelbo"])
    other = "concat" if config.data.packing != "concat" else "crop"
    refused = "a record needs a row of its own" if "prompt_field" in data else "there .*: the checkpoint"
    with pytest.raises(ConfigError, match=f"data.packing='{other}'.*{refused}"):
        again = dataclasses.replace(config, data=dataclasses.replace(config.data, packing=other))
        train.train(again, str(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", owt.LAYOUTS)
def test_openwebtext_as_it_is_distributed(tmp_path, monkeypatch, alone, layout):
    """From the archive (tars of xz in a tar.xz) to a trained step, prepared and streamed, by the recipe's settings."""
    documents = owt.openwebtext_documents(30)
    paths = owt.make_openwebtext(tmp_path / "owt", documents, outer=layout)
    monkeypatch.setenv("OPENWEBTEXT", str(tmp_path / "owt" / "*"))
    c = loop_config(tmp_path, train__steps=2, data__dir="")
    owt_data = config_lib.recipe("hdlm_small").data
    c.data.update({k: owt_data[k] for k in ("source", "files", "split")})
    c.data.validation_documents = 5
    c.tokenizer.kind, c.tokenizer.vocab_size = "bytes", 257
    state = train.train(config_lib.resolve(c), str(tmp_path / "run"))
    assert int(state.step) == 2
    manifest = load_manifest(tmp_path / "run" / "data")
    assert manifest.bad == 0 and [name for name, *_ in manifest.sources] == [path.name for path in paths]
    assert (manifest.train_documents, manifest.valid_documents) == (25, 5)
    words = np.concatenate([np.append(np.frombuffer(text.encode(), np.uint8), 256) for text in documents[:25]])
    np.testing.assert_array_equal(Split(tmp_path / "run" / "data", manifest, "train")[:], words)
    c.data.update(stream=True, split="hash", sample_bytes=20_000)
    assert int(train.train(config_lib.resolve(c), str(tmp_path / "streamed")).step) == 2


@pytest.fixture
def poison(monkeypatch):
    """poison(steps): the loss of these steps (from 1) is not a number, and so are its gradients."""
    real = step_lib.make_loss_sums

    def at(*steps):
        bad = jnp.stack([jax.random.key_data(jax.random.fold_in(jax.random.key(0), step - 1)) for step in steps])

        def poisoned(*args):
            sums = real(*args)

            def wrapped(params, batch, key):
                loss, nelbo, tokens = sums(params, batch, key)
                here = jnp.any(jnp.all(bad == jax.random.key_data(key)[None], axis=-1))
                return loss * jnp.where(here, jnp.nan, 1.0), nelbo, tokens

            return wrapped

        monkeypatch.setattr(step_lib, "make_loss_sums", poisoned)

    return at


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(corpus, tmp_path, poison, alone, capsys):
    poison(5)
    config = loop_config(corpus, train__steps=5, checkpoint__every=4, optimizer__schedule="constant")
    after = train.train(config_lib.resolve(config), str(tmp_path / "run"))
    assert int(after.step) == 5 and int(after.skipped) == 1
    assert 'step 5: skipped the batch at position {"next_index": 4} of data' in capsys.readouterr().out
    config.train.steps = 4
    before = train.train(config_lib.resolve(config), str(tmp_path / "shorter"))
    for a, b in zip(flat(after[2:]), flat(before[2:]), strict=True):
        np.testing.assert_array_equal(a, b)
    last = read_metrics(str(tmp_path / "run" / "metrics.jsonl"))[-1]
    assert last["step"] == 5 and last["loss"] is None and last["skipped"] == 1 and last["valid_nelbo"] > 0
    config.train.steps = 6
    state = train.train(config_lib.resolve(config), str(tmp_path / "run"))
    assert int(state.skipped) == 1 and int(state.step) == 6, "the count is part of the state"
    assert np.abs(flat(state.params)[0] - flat(after.params)[0]).max() > 0


def test_too_many_of_them_stop_the_run_and_leave_the_batch(corpus, tmp_path, poison, alone):
    from hdlm_jax.data.pipeline import TrainBatches

    poison(3, 6)
    config = config_lib.resolve(loop_config(corpus, train__nonfinite_limit=1))
    with pytest.raises(train.TrainingStopped, match=r"loss=nan .* at step 6; last finite .*'step': 5.*2 steps skipped, "
                       r"train.nonfinite_limit=1. To replay: .*next_index\": 5.*step 4 in"):
        train.train(config, str(tmp_path / "run"))
    kept = np.load(tmp_path / "run" / "nonfinite-6-0.npz")
    want = TrainBatches(corpus / "data", 16, 16, 0).batch(5)
    assert set(kept) == set(want)
    for name in want:
        np.testing.assert_array_equal(kept[name], want[name])


def test_batch_must_divide_over_devices(corpus, tmp_path):
    with pytest.raises(ConfigError, match="train.batch_size=12.*8 batch shards"):
        train.train(config_lib.resolve(loop_config(corpus, train__batch_size=12)), str(tmp_path / "run"))


@pytest.mark.slow
def test_one_job_trains_others_read_and_ctrl_c_saves(corpus, tmp_path, hearing):
    """In real processes: the second job is told who trains, evaluation works beside it, Ctrl-C saves and leaves."""
    from hdlm_jax.runs import evaluate
    from hdlm_jax.training.checkpoint import Checkpoints

    config = loop_config(corpus, train__steps=10**6, train__log_every=10**6, checkpoint__every=10**6,
                         checkpoint__minutes=0.01, optimizer__schedule="constant")
    command, env = front_door(tmp_path, config)
    workdir = tmp_path / "run"
    process = subprocess.Popen(command(workdir), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.time() + 120  # far from checkpoint.every: the clock saves the first one
        while time.time() < deadline and not any(p.name.isdigit() for p in workdir.glob("checkpoints/*")):
            time.sleep(0.05)
        second = subprocess.run(command(workdir), env=env, capture_output=True, text=True, timeout=120)
        assert second.returncode == 1 and second.stderr.count("\n") == 1
        assert f"{workdir}/lock is held by pid {process.pid} on" in second.stderr and "--mode=train" in second.stderr
        found = evaluate.evaluate(config_lib.resolve(config), str(workdir))
        assert found["step"] > 0 and 0 < found["nelbo"] < 10
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == interrupt.RESUME_EXIT and not err, err
    step = Checkpoints(str(workdir), read_only=True).latest()
    assert "train: Ctrl-C, saving" in out and f"asked to stop, saved step {step:,}; the same command resumes" in out
    assert (workdir / "lock").read_text() == ""
    assert read_metrics(str(workdir / "metrics.jsonl")) == [], "when it was saved and left is told nowhere"


HEARS = """
import threading, time
import jax
from hdlm_jax.runs import interrupt, train
with interrupt.Stop() as stop:
    stop.listen()
    print("listening", flush=True)
    while not stop.at(1):
        time.sleep(0.01)
    print("asked", flush=True)
    float(jax.jit(lambda n: jax.lax.fori_loop(0, n, lambda i, s: jax.numpy.sin(s), 1.0))(2**31 - 1))  # a long call
"""


@pytest.mark.parametrize("first", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_second_ctrl_c_leaves_at_once(root, hearing, first):
    """Also while Python waits for compiled code; a Ctrl-C after SIGTERM is the first one."""
    process = subprocess.Popen([sys.executable, "-c", HEARS], stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": str(root), "XLA_FLAGS": tiny.QUICK_COMPILES})
    try:
        assert process.stdout.readline() == "listening\n"
        process.send_signal(first)
        heard = [process.stdout.readline() for _ in range(1 + (first == signal.SIGINT))]
        assert sorted(heard)[0] == "asked\n"
        time.sleep(1)
        if first == signal.SIGTERM:
            process.send_signal(signal.SIGINT)
            assert "Ctrl-C" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    finally:
        process.kill()


def test_signals_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with interrupt.Stop() as stop:
        stop.listen()
        assert not stop.at(1)
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.time() + 10
        while not stop.at(2) and time.time() < deadline:
            time.sleep(0.01)
        assert stop.at(3)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_an_ignored_ctrl_c_stays_ignored(hearing):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts what goes to the background
    with interrupt.Stop() as stop:
        stop.listen()
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN and not stop.at(1)


def test_a_clock_set_back_leaves_the_speed(monkeypatch):
    """The wall clock goes back an hour at every look; two steps of 16 x 8 tokens in two seconds are 128 a second."""
    wall, steady = itertools.count(1e9, -3600), itertools.count(50.0, 2.0)
    monkeypatch.setattr(train.time, "time", lambda: next(wall))
    monkeypatch.setattr(train.time, "monotonic", lambda: next(steady))
    recorder = train.Recorder(make_config(train__log_every=2), lambda step: 0.1, 1.0, [])
    recorder.steps = 0  # the first step, which compiles, is over
    for step in (1, 2):
        assert recorder.add(step, {"loss": 1.0, "nelbo": 1.0, "grad_norm": 1.0})
    assert recorder.record(2, 0)["tokens_per_s"] == 128


def test_what_a_record_waits_for_is_timed(monkeypatch):
    """A step of 16 x 8 tokens takes two seconds; at a record the next one is under way, and the rate waits for it."""
    now = [0.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])

    def rate(step):
        now[0] += 2.0
        return 0.1

    recorder = train.Recorder(make_config(train__log_every=1), rate, 1.0, [])
    recorder.steps, found = 0, []
    for step in (1, 2, 3):
        now[0] = max(now[0], 2.0 * step)  # read once the step is done
        assert recorder.add(step, {"loss": 1.0, "nelbo": 1.0, "grad_norm": 1.0})
        found.append(recorder.record(step, 0)["tokens_per_s"])
    assert found == [64, 64, 64] and recorder.pace == 2


def test_minutes_between_checkpoints(monkeypatch):
    """Saves are due at most a step late where steps are slow, and few steps have to agree where they are fast."""
    now, asked = [0.0], []
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(interrupt.processes, "on_main_process", lambda look: asked.append(now[0]) or look())
    for pace in (0.003, 1.0, 100.0):
        now[0], saved = 0.0, [0.0]
        asked.clear()
        timer = interrupt.Timer(2)
        for step in range(1, int(1000 / pace)):
            now[0] = step * pace
            if timer.due(step):
                saved.append(now[0])
                timer.restart()
        gaps = np.diff(saved)
        assert len(gaps) >= 4 and gaps.min() >= 120 and gaps.max() < 120 + max(1.01 * pace, 1), pace
        assert len(asked) < max(0.02 * 1000 / pace, 1100 / pace + 100), "not at every step where they are fast"
    timer = interrupt.Timer(0)
    now[0] = 1e9
    assert not timer.due(10**6)


@pytest.mark.slow
@pytest.mark.slow
def test_saved_by_the_clock_or_asked_to_stop_it_ends_as_if_never_stopped(corpus, tmp_path, monkeypatch, alone):
    """Saved at step 5 by the clock and left at 6, both off log_every=4 and checkpoint.every=7: state and metrics.jsonl
    end as if never stopped."""
    config = config_lib.resolve(loop_config(corpus, train__log_every=4, checkpoint__every=7, train__evaluate_every=9))
    whole = train.train(config, str(tmp_path / "whole"))
    saved, save = [], train.Checkpoints.save

    def spy(self, step, state, meta, metrics):
        saved.append((step, set(metrics.values()), len(meta["window"])))
        save(self, step, state, meta, metrics)

    monkeypatch.setattr(train.Checkpoints, "save", spy)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(interrupt.Timer, "due", lambda self, step: step == 5)
        patch.setattr(interrupt.Stop, "at", lambda self, step: step == 6)
        train.train(config, str(tmp_path / "run"))
    assert left.value.code == interrupt.RESUME_EXIT
    assert saved == [(5, {math.inf}, 1), (6, {math.inf}, 2)], "nothing is measured"
    metric = tmp_path / "run" / "checkpoints" / "6" / "metrics" / "metrics"
    assert json.loads(metric.read_text(), parse_constant=pytest.fail) == {}
    state = train.train(config, str(tmp_path / "run"))
    for a, b in zip(flat(state), flat(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    told = [[{k: v for k, v in record.items() if k not in ("tokens_per_s", "mfu", "input_wait", "compile_s",
                                                           "first_step_s")}
             for record in read_metrics(str(tmp_path / name / "metrics.jsonl"))] for name in ("run", "whole")]
    assert told[0] == told[1] and [record["step"] for record in told[0]] == [4, 7, 8, 9, 10]


def test_schedules_of_the_rate(corpus):
    """At warm-up's end the peak; at the last step a tenth of it; in between constant, or the cosine's half."""
    config = loop_config(corpus, train__steps=110)
    config.optimizer.warmup, config.optimizer.lr = 10, 1.0
    told = {}
    for name in ("cosine", "wsd", "constant"):
        config.optimizer.schedule = name
        rate = make_optimizer(config_lib.resolve(config))[1]
        told[name] = [round(float(rate(n - 1)), 4) for n in (5, 10, 60, 90, 100, 110)]
    assert told == {"cosine": [0.5, 1.0, 0.55, 0.1859, 0.122, 0.1], "wsd": [0.5, 1.0, 1.0, 1.0, 0.55, 0.1],
                    "constant": [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]}


def test_steps_that_grow(corpus, tmp_path, alone):
    """A constant rate goes on; a cosine is made for its steps, and the message says how to train on."""
    cosine = config_lib.resolve(loop_config(corpus, train__steps=12))
    saved = config_lib.resolve(loop_config(corpus, train__steps=10))
    with pytest.raises(ConfigError, match=r"train.steps=12 \(there 10\): .*, as optimizer.schedule=cosine is made for"
                       r" its steps; .*--config.train.init_from=w/run$"):
        train.check_resume(cosine, {"config": jsons.plain(saved.as_dict())}, "w/run/checkpoints")
    constant = [dataclasses.replace(c, optimizer=dataclasses.replace(c.optimizer, schedule="constant"))
                for c in (cosine, saved)]
    train.check_resume(constant[0], {"config": jsons.plain(constant[1].as_dict())}, "w/run/checkpoints")


@pytest.mark.slow
def test_one_validation_row_ends_in_words(corpus, tmp_path, capsys, monkeypatch, alone):
    """No error of a single row: '-' where it would stand, null in the files."""
    valid_rows = pipeline.valid_rows
    for module in (pipeline, train):
        monkeypatch.setattr(module, "valid_rows", lambda *args: {k: v[:1] for k, v in valid_rows(*args).items()})
    config = loop_config(corpus, train__steps=1)
    config.evaluate.draws = 2
    train.train(config_lib.resolve(config), str(tmp_path / "run"))
    assert re.search(r"train: done, step 1, validation NELBO [\d.]+ nats/token on 1 seq", capsys.readouterr().out)
    from hdlm_jax.runs import evaluate

    found = evaluate.evaluate(config_lib.resolve(config), str(tmp_path / "run"))
    assert re.search(r"NELBO [\d.]+ nats/token \(data -, time ", capsys.readouterr().out)
    raw = (tmp_path / "run" / "evaluate.json").read_text()
    assert json.loads(raw, parse_constant=pytest.fail) == found and found["se"] is None
    evaluate.evaluate(config_lib.resolve(config), str(tmp_path / "run"))
    assert re.search(r"evaluate: reusing .*NELBO [\d.]+ nats/token", capsys.readouterr().out)
