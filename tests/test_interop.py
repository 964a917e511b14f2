"""The published layout: its outputs through the whole path, round trips bit for bit, and what is wrong with a file."""
import dataclasses
import json
import os
import pickle
import shutil
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_network import apply, numpy_norm, numpy_rotate, silu
from tiny import model, read_recipe, trained

import hdlm_jax
from hdlm_jax import config
from hdlm_jax.config import ConfigError, ReleasedConfig
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.models import weight_files
from hdlm_jax.models.heads import FlatHead
from hdlm_jax.models.interop import (
    EMBEDDING,
    NEVER,
    Sizes,
    from_torch,
    heads_of,
    layout_of,
    read_weights,
    sizes,
    state_ids,
    to_torch,
)
from hdlm_jax.models.network import Network
from hdlm_jax.models.weight_files import read_clusters
from hdlm_jax.runs import evaluate, import_weights
from hdlm_jax.runs.export import export
from hdlm_jax.runs.import_weights import check_trainable, import_released
from hdlm_jax.training import loading

V = 20
MDLM = Hierarchy.from_parents([], vocab_size=V)
HDLM = Hierarchy.from_parents([np.arange(V) % 5])
DEEP = Hierarchy.from_parents([np.arange(V) % 6, np.arange(6) % 2])
HEADS, S = 2, 10


def random_state(rows=32, cond=6, width=8, blocks=2, extra=("logit_bias", "output_layer_clusters.linear.weight")):
    """Published names and shapes with random float32 numbers."""
    rng = np.random.default_rng(rows + cond)
    state = {name: rng.standard_normal(place.shape).astype(np.float32)
             for name, place in layout_of(Sizes(width, blocks, cond, rows)).items()}
    return state | {name: np.zeros((1, 1, 1), np.float32) if name == "logit_bias" else
                    rng.standard_normal((rows, width)).astype(np.float32) for name in extra}


def random_params(hierarchy, time=True, seed=0):
    network = Network(FlatHead(hierarchy), hierarchy.padded_states, 8, 2, HEADS, time_conditioning=time)
    shape = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, S), jnp.int32), jnp.zeros(1))["params"]
    rng = np.random.default_rng(seed)
    return network, jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32), shape)


def ids_of(layout, hierarchy, **settings):
    return state_ids(ReleasedConfig(layout=layout, **settings), hierarchy)


def same(a, b):
    assert list(a) == list(b) or set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# ---------------------------------------------------------------------------------------------- the published outputs


@pytest.fixture
def dit(data_dir):
    path = data_dir / "published_dit" / "dit_random.npz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    with np.load(path) as data:
        return types.SimpleNamespace(path=path, **{k: v for k, v in data.items() if "/" not in k},
                                     state={k[2:]: v for k, v in data.items() if k.startswith("w/")})


def dit_config(folder, path, **changes):
    """Its 128 rows as HDLM lays them out: 95 words, padding, the mask (96), 8 clusters, rows of nothing."""
    words = folder / "vocab.txt"
    words.write_text("\n".join(["[UNK]", "[SEP]", *(f"word{i}" for i in range(93))]))
    clusters = folder / "clusters.json"
    clusters.write_text(json.dumps({str(word): word % 8 for word in range(95)}))
    c = config.default()
    c.tokenizer.kind, c.tokenizer.file, c.tokenizer.vocab_size = "bert", str(words), 257
    c.hierarchy.clusters = (8,)
    c.model.width, c.model.blocks, c.model.heads, c.model.seq_len = 32, 2, 4, 16
    c.released.layout, c.released.weights, c.released.clusters = "hdlm", str(path), str(clusters)
    c.update_from_flattened_dict(changes)
    return config.resolve(c)


def test_published_outputs_through_the_whole_path(dit, tmp_path, capsys):
    c = dit_config(tmp_path, dit.path)
    import_released(c, str(tmp_path / "run"))
    said = capsys.readouterr().out
    assert "2 blocks, 4 heads; levels 95 -> 8 -> 1" in said and "24 of 128 rows" in said
    assert "output_layer_clusters" in said and "ignored: " in said
    run = hdlm_jax.load(str(tmp_path / "run")).run
    assert run.step == 0 and run.hierarchy.sizes == (95, 8, 1)
    ours = np.full(128, -1)
    ours[state_ids(c.released, run.hierarchy)] = np.arange(run.hierarchy.num_states)
    z, t = jnp.asarray(ours[dit.z], jnp.int32), jnp.asarray(dit.t)
    assert z.min() >= 0 and int(jnp.sum(z == run.hierarchy.mask_id)) == 46 and int(jnp.sum(z >= 95)) == 46 + 43
    params = jax.tree.map(np.asarray, run.params)
    logits = apply(run.network, params, z, t)
    np.testing.assert_allclose(logits, dit.tok[..., :95], rtol=0, atol=1e-5)
    seen = dit.attn.astype(bool)
    masked = apply(run.network, params, z, t, jnp.asarray(dit.attn, jnp.int32))
    assert not seen.all() and np.abs(dit.tok - dit.tok_masked)[seen].max() > 1e-2
    np.testing.assert_allclose(masked[seen], dit.tok_masked[seen][:, :95], rtol=0, atol=1e-5)
    again = load_file(os.path.join(export(c, str(tmp_path / "run")), "hdlm.safetensors"))
    same(again, dit.state)


def test_order_and_heads_of_the_published_network(dit):
    """state_dict lists tensors in the order in which they were registered: that of the averages."""
    kept = [name for name in dit.state if name in layout_of(sizes(dit.state))]
    assert kept == [n for n in layout_of(sizes(dit.state))] and sizes(dit.state) == (32, 2, 16, 128)
    assert heads_of(dit.state, 32) == 4
    layout = to_torch(from_torch(dit.state, MDLM, ids_of("gidd", MDLM))[0], MDLM, ids_of("gidd", MDLM), "gidd", 4, 16)
    for name in ("cos_cached", "sin_cached"):
        np.testing.assert_allclose(layout[f"rotary_emb.{name}"], dit.state[f"rotary_emb.{name}"], atol=1e-6)


def published_network(w, z, t, heads):
    """Logits [B, S, R] of the published network by its own names, float64: a linear layer is x @ weight.T + bias."""
    def linear(name, x):
        return x @ w[f"{name}.weight"].T.astype(np.float64) + w.get(f"{name}.bias", 0)

    angle = t[:, None] * 10_000.0 ** (-np.arange(128) / 128)
    time = np.concatenate([np.cos(angle), np.sin(angle)], -1)
    cond = silu(linear("sigma_map.mlp.2", silu(linear("sigma_map.mlp.0", time))))[:, None]
    x = w["vocab_embed.embedding"][z].astype(np.float64)
    b, s, d = x.shape
    for i in range(1 + max(int(n.split(".")[1]) for n in w if n.startswith("blocks."))):
        name = f"blocks.{i}."
        shift1, scale1, gate1, shift2, scale2, gate2 = np.split(linear(name + "adaLN_modulation", cond), 6, -1)
        h = numpy_norm(x, w[name + "norm1.weight"]) * (1 + scale1) + shift1
        q, k, v = (a.reshape(b, s, heads, -1) for a in np.split(linear(name + "attn_qkv", h), 3, -1))
        scores = np.einsum("bqhd,bkhd->bhqk", numpy_rotate(q), numpy_rotate(k)) / np.sqrt(d / heads)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        h = np.einsum("bhqk,bkhd->bqhd", scores / scores.sum(-1, keepdims=True), v).reshape(b, s, d)
        x = x + gate1 * linear(name + "attn_out", h)
        h = linear(name + "mlp.0", numpy_norm(x, w[name + "norm2.weight"]) * (1 + scale2) + shift2)
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + gate2 * linear(name + "mlp.2", h)
    shift, scale = np.split(linear("output_layer.adaLN_modulation", cond), 2, -1)
    return linear("output_layer.linear", numpy_norm(x, w["output_layer.norm_final.weight"]) * (1 + scale) + shift)


@pytest.mark.parametrize("hierarchy, layout", [(MDLM, "mdlm"), (HDLM, "hdlm"), (DEEP, "gidd")])
def test_both_ways_the_network_is_the_published_one(hierarchy, layout):
    """Against a numpy twin that knows nothing of our names: imported from it, and exported to it."""
    ids, rng = ids_of(layout, hierarchy), np.random.default_rng(0)
    z, t = rng.integers(0, hierarchy.num_states, (3, S)), np.array([0.1, 0.5, 0.9])
    network, ours = random_params(hierarchy)
    state = {name: 0.5 * a for name, a in random_state().items()}
    for theirs, params in ((state, from_torch(state, hierarchy, ids)[0]),
                           (to_torch(ours, hierarchy, ids, layout, HEADS, S), ours)):
        want = published_network(theirs, ids[z], t, HEADS)[..., :V]
        found = apply(network, params, jnp.asarray(z, jnp.int32), jnp.asarray(t, jnp.float32))
        np.testing.assert_allclose(found, want, rtol=0, atol=2e-4 * np.abs(want).max())
        assert np.std(want) > 0.1


# --------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("hierarchy, layout, settings", [
    (MDLM, "mdlm", {}), (HDLM, "hdlm", {}), (HDLM, "hdlm", {"mask_id": 3, "first_cluster": 25}),
    (DEEP, "hdlm", {"mask_id": 31, "first_cluster": 20}), (MDLM, "gidd", {"mask_id": 0})])
def test_theirs_to_ours_to_theirs(hierarchy, layout, settings):
    ids = ids_of(layout, hierarchy, **settings)
    for state in (random_state(), random_state(cond=128, extra=())):
        params, rest = from_torch(state, hierarchy, ids)
        same(to_torch(params, hierarchy, ids, layout, HEADS, S, rest, cond=sizes(state).cond), state)
        assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, random_params(hierarchy)[1])
        assert {a.dtype for a in jax.tree.leaves(params)} == {np.dtype("float32")}
        words = np.setdiff1d(np.arange(V), ids[-1:])
        np.testing.assert_array_equal(params["head"]["kernel"][words], state["output_layer.linear.weight"][words])
        np.testing.assert_array_equal(params["embedding"][: len(ids)], state[EMBEDDING][ids])
        if settings.get("mask_id", V) < V:
            assert params["head"]["bias"][ids[-1]] == NEVER and not params["head"]["kernel"][ids[-1]].any()


@pytest.mark.parametrize("time", [True, False])
@pytest.mark.parametrize("hierarchy, layout", [(MDLM, "mdlm"), (MDLM, "gidd"), (HDLM, "hdlm"), (DEEP, "hdlm")])
def test_ours_to_theirs_to_ours(hierarchy, layout, time):
    ids, (_, params) = ids_of(layout, hierarchy), random_params(hierarchy, time)
    state = to_torch(params, hierarchy, ids, layout, HEADS, S)
    rows = sizes(state).rows
    assert rows == (V + 1 if layout == "mdlm" else 128) and heads_of(state, 8) == HEADS
    known = {"rotary_emb.inv_freq"} if layout == "mdlm" else {"logit_bias", "rotary_emb.cos_cached",
                                                              "rotary_emb.sin_cached"}
    second = {n for n in state if n.startswith("output_layer_clusters.")}
    assert set(state) - set(layout_of(sizes(state))) - second == known and len(second) == 5 * (layout == "hdlm")
    unspoken = np.delete(state["output_layer.linear.bias"], np.arange(V))
    assert (unspoken == NEVER).all() and not np.delete(state[EMBEDDING], ids, axis=0).any()
    back, _ = from_torch(state, hierarchy, ids, time)
    for tree in (params, back):  # our padding is nobody's
        tree["embedding"] = tree["embedding"][: len(ids)]
        tree["head"] = jax.tree.map(lambda a: a[:V], tree["head"])
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_a_tied_head_is_written_as_one_of_its_own():
    _, params = random_params(HDLM)
    ids = ids_of("hdlm", HDLM)
    whole = {**params, "head": params["head"] | {"kernel": params["embedding"][: len(params["head"]["bias"])]}}
    tied = {**params, "head": {"bias": params["head"]["bias"]}}
    same(*(to_torch(p, HDLM, ids, "hdlm", HEADS, S) for p in (tied, whole)))


def test_time_that_is_always_zero_is_folded_into_the_biases():
    state, ids = random_state(), ids_of("mdlm", MDLM)
    told, _ = from_torch(state, MDLM, ids)
    folded, rest = from_torch(state, MDLM, ids, time=False)
    on, off = (random_params(MDLM, time)[0] for time in (True, False))
    z = jnp.asarray(np.random.default_rng(0).integers(0, V + 1, (3, S)), jnp.int32)
    want = apply(on, told, z, jnp.zeros(3))
    got = apply(off, folded, z, jnp.full(3, 0.7))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5 * np.abs(want).max())
    assert np.abs(apply(on, told, z, jnp.full(3, 0.7)) - want).max() > 0.1
    again = to_torch(folded, MDLM, ids, "mdlm", HEADS, S, rest, cond=6)  # whole, with the time in the bias
    assert set(again) == set(state) and np.array_equal(again["sigma_map.mlp.0.weight"], state["sigma_map.mlp.0.weight"])
    twice, _ = from_torch(again, MDLM, ids)
    np.testing.assert_allclose(apply(on, twice, z, jnp.full(3, 0.7)), want, rtol=1e-4,
                               atol=2e-5 * np.abs(want).max())


def test_ids_of_the_published_vocabularies():
    """MDLM: the mask behind the words. GIDD and HDLM: padding, mask, clusters. LM1B: the mask is a word of BERT's."""
    for layout, mask in (("mdlm", 50257), ("gidd", 50258), ("hdlm", 50258)):
        gpt2 = Hierarchy.from_parents([], vocab_size=50257)
        assert ids_of(layout, gpt2)[-1] == mask, layout
    clustered = ids_of("hdlm", Hierarchy.from_parents([np.arange(50257) % 64]))
    np.testing.assert_array_equal(clustered[50257:], [*range(50259, 50323), 50258])
    bert = ids_of("hdlm", Hierarchy.from_parents([np.arange(30522) % 64]), mask_id=103)
    np.testing.assert_array_equal(bert[30522:], [*range(30522, 30586), 103])
    for settings in ({"first_cluster": 19}, {"mask_id": 24, "first_cluster": 20}):
        with pytest.raises(ConfigError, match="run into the 20 words or the mask"):
            ids_of("hdlm", HDLM, **settings)


# -------------------------------------------------------------------------------------------------- what can be wrong


def test_wrong_tensors_are_named():
    state, ids = random_state(), ids_of("mdlm", MDLM)
    with pytest.raises(ValueError, match="1 tensors missing: blocks.1.norm2.weight"):
        sizes({k: v for k, v in state.items() if k != "blocks.1.norm2.weight"})
    with pytest.raises(ValueError, match="6 tensors unexpected: x0, x1, x2, x3, x4 and 1 more"):
        sizes(state | {f"x{i}": np.zeros(1) for i in range(6)})
    with pytest.raises(ValueError, match=r"blocks.0.attn_qkv.weight \(8, 24\) in place of \(24, 8\)"):
        sizes(state | {"blocks.0.attn_qkv.weight": state["blocks.0.attn_qkv.weight"].T})
    with pytest.raises(ValueError, match="no network"):
        sizes({k: v for k, v in state.items() if not k.startswith("blocks.")})
    with pytest.raises(ValueError, match="has 20 rows, too few for symbol 20"):
        from_torch(random_state(rows=20), MDLM, ids)
    with pytest.raises(ValueError, match="embedded in 130 units, our network has 128"):
        from_torch(random_state(cond=130), MDLM, ids)
    with pytest.raises(ValueError, match="logit_bias is not zero"):
        heads_of({"logit_bias": np.full((1, 1, 1), 2.0)}, 8)
    with pytest.raises(ValueError, match="base 10000"):
        heads_of({"rotary_emb.inv_freq": 500_000.0 ** (-np.arange(0, 4, 2) / 4)}, 8)
    assert heads_of({}, 8) is None
    params, _ = from_torch(state, MDLM, ids)
    params["time_in"]["bias"][-1] = 1
    with pytest.raises(ValueError, match="more than the 6 units"):
        to_torch(params, MDLM, ids, "mdlm", HEADS, S, cond=6)


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("prefix", ["", "backbone.", "module._orig_mod.", "model.module.backbone._orig_mod."])
def test_prefixes_and_kinds_of_file(tmp_path, prefix):
    state = random_state()
    inside = {name.replace("blocks.0.", "blocks.0._orig_mod."): a for name, a in state.items()}
    for name, other in (("a.npz", {}), ("a.safetensors", {"noise.x": np.zeros(2)} if "backbone" in prefix else {})):
        tensors = {prefix + k: v for k, v in inside.items()} | other
        np.savez(tmp_path / name, **tensors) if name.endswith("npz") else save_file(tensors, tmp_path / name)
        file = read_weights(str(tmp_path / name))
        same(file.state, state)
        assert (file.averaged, file.step, file.ignored) == (False, 0, list(other))


def test_half_precision_is_widened(tmp_path):
    state = {k: v.astype(ml_dtypes.bfloat16) for k, v in random_state().items()}
    save_file(state, tmp_path / "model.safetensors")
    same(read_weights(str(tmp_path)).state, {k: v.astype(np.float32) for k, v in state.items()})  # a folder


def test_averages_of_a_training_checkpoint(monkeypatch, tmp_path):
    state = random_state()
    names = list(layout_of(sizes(state)))
    average = [state[name] + 1 for name in names] + [np.zeros(3)]  # of the noise schedule as well
    found = {"state_dict": {f"backbone.{k}": v for k, v in state.items()} | {"noise.a": np.zeros(1)}, "global_step": 7,
             "ema": {"decay": 0.9, "shadow_params": average}}
    (tmp_path / "a.ckpt").write_bytes(b"")
    monkeypatch.setattr(weight_files, "_load_torch", lambda path: found)
    file = read_weights(str(tmp_path / "a.ckpt"))
    assert (file.averaged, file.step, file.ignored) == (True, 7, ["noise.a"])
    same(file.state, state | {name: state[name] + 1 for name in names})
    raw = read_weights(str(tmp_path / "a.ckpt"), ema=False)
    same(raw.state, state)
    assert not raw.averaged
    average[1] = np.zeros((2, 2))
    with pytest.raises(ValueError, match=r"shadow_params is \(2, 2\) where sigma_map.mlp.0.weight is \(6, 256\)"):
        read_weights(str(tmp_path / "a.ckpt"))
    del average[5:]
    with pytest.raises(ValueError, match="holds 5 tensors, the network 30"):
        read_weights(str(tmp_path / "a.ckpt"))


def test_wrong_files(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    for path, match in ((tmp_path / "a.npz", "0 tensors are named ...vocab_embed.embedding, must be one; it holds a"),
                        (tmp_path / "b.npz", "b.npz: no such file"), (tmp_path, "none of model.safetensors"),
                        (__file__, r"choose a .safetensors, .npz, .pt")):
        with pytest.raises(ValueError, match=match):
            read_weights(str(path))
    state = random_state(blocks=1, extra=())
    np.savez(tmp_path / "two.npz", **{f"{p}.{k}": v for p in "ab" for k, v in state.items()})
    with pytest.raises(ValueError, match="2 tensors are named"):
        read_weights(str(tmp_path / "two.npz"))


def write(path, value):
    path.write_text(json.dumps(value)) if path.suffix == ".json" else np.save(path, value)
    return str(path)


def test_cluster_dictionaries(tmp_path):
    parents = np.arange(V) % 5
    want = Hierarchy.from_parents([parents], special=(19,))
    kinds = [write(tmp_path / "a.npy", parents), write(tmp_path / "b.json", parents.tolist()),
             write(tmp_path / "c.npy", np.append(parents, [0, 4]) + 22),  # from the first id on, and for [PAD], [MASK]
             write(tmp_path / "d.json", {str(word): int(node) for word, node in enumerate(parents)})]
    for path in kinds:
        assert read_clusters(path, V, 22, special=(19,)) == want
    (tmp_path / "e.json").write_text("[0, 1")
    with pytest.raises(ValueError, match="e.json: must be a cluster number for each word id"):
        read_clusters(str(tmp_path / "e.json"), V, 22)
    with pytest.raises(ValueError, match="begin at 22, must be at 0 or at released.first_cluster=23"):
        read_clusters(kinds[2], V, 23)
    short = write(tmp_path / "short.npy", parents[:17])
    with pytest.raises(ConfigError, match="3 of 20 words have no cluster, the first is 17; released.missing='own'"):
        read_clusters(short, V, 22)
    own = read_clusters(short, V, 22, missing="own")
    assert own.sizes == (V, 6, 1)
    np.testing.assert_array_equal(own.parents[0], [*parents[:17], 5, 5, 5])
    assert read_clusters(write(tmp_path / "one.npy", parents * 0), V, 22).sizes == (V, 1, 1)  # HDLM's n = 1
    with pytest.raises(ValueError, match="empty cluster: node 4"):
        read_clusters(write(tmp_path / "gap.npy", np.where(parents == 4, 5, parents)), V, 22)
    with pytest.raises(ValueError, match="a cluster number for each word id"):
        read_clusters(write(tmp_path / "words.json", ["a", "b"]), V, 22)
    with pytest.raises(ValueError, match="begin at None"):
        read_clusters(write(tmp_path / "none.json", []), V, 22)
    with pytest.raises(ConfigError, match="choose a .json, .npy"):
        read_clusters(__file__, V, 22)


# ---------------------------------------------------------------------------------------------------- the whole of it


@pytest.fixture(scope="module")
def roundtrip(tmp_path_factory):
    """A trained run, its weights in HDLM's layout, and those imported: (config to import, folder of both)."""
    folder = tmp_path_factory.mktemp("released")
    workdir = shutil.copytree(trained()[1], folder / "trained")
    c = read_recipe(trained()[0])
    c = dataclasses.replace(c, released=ReleasedConfig(layout="hdlm"))
    weights = os.path.join(export(c, str(workdir)), "hdlm.safetensors")
    clusters = write(folder / "clusters.npy", model().hierarchy.parents[0])
    c = dataclasses.replace(c, data=dataclasses.replace(c.data, dir=str(workdir / "data")),
                            released=ReleasedConfig(layout="hdlm", weights=weights, clusters=clusters))
    import_released(c, str(folder / "run"))
    return c, folder


def test_our_own_weights_come_back(roundtrip):
    c, folder = roundtrip
    assert sizes(load_file(c.released.weights)) == (32, 1, 128, 384)
    run, want = hdlm_jax.load(str(folder / "run")).run, model().run
    assert run.hierarchy == want.hierarchy and run.tokenizer.fingerprint == want.tokenizer.fingerprint
    z = jnp.asarray(np.random.default_rng(0).integers(0, run.hierarchy.num_states, (2, 16)), jnp.int32)
    t = jnp.asarray([0.2, 0.9])
    a, b = (apply(want.network, jax.tree.map(np.asarray, r.params), z, t) for r in (run, want))
    np.testing.assert_array_equal(a, b)
    same(load_file(os.path.join(export(c, str(folder / "run")), "hdlm.safetensors")), load_file(c.released.weights))


@pytest.mark.slow
def test_an_imported_run_is_evaluated_and_trained_from(roundtrip):
    c, folder = roundtrip
    found = evaluate.evaluate(c, str(folder / "run"))
    want = evaluate.evaluate(c, str(folder / "trained"))
    assert found["nelbo"] == want["nelbo"] and found["step"] == 0 and found["whole_split"] == want["whole_split"]
    start = dataclasses.replace(c, train=dataclasses.replace(c.train, init_from=str(folder / "run")))
    params = loading.load_base(start, model().tokenizer.fingerprint).params
    np.testing.assert_array_equal(params["stack"]["qkv"]["kernel"], model().run.params["stack"]["qkv"]["kernel"])
    with pytest.raises(ConfigError, match="holds imported or exported weights; train in another"):
        check_trainable(str(folder / "run"))
    check_trainable(str(folder / "trained"))


def test_what_was_left_over_outlives_fine_tuning(roundtrip, tmp_path):
    c, folder = roundtrip
    full = load_file(c.released.weights)
    full["output_layer_clusters.linear.bias"] += 3
    full["output_layer.linear.bias"][258] = 5  # of the mask
    save_file(full, tmp_path / "full.safetensors")
    c = dataclasses.replace(c, released=dataclasses.replace(c.released, weights=str(tmp_path / "full.safetensors")))
    import_released(c, str(tmp_path / "run"))
    tuned = dataclasses.replace(c, train=dataclasses.replace(c.train, init_from=str(tmp_path / "run")))
    params = jax.tree.map(np.asarray, hdlm_jax.load(str(tmp_path / "run")).run.params)
    params["norm"]["weight"] = params["norm"]["weight"] + 1
    found = import_weights.published(tuned, tuned, str(tmp_path / "tuned"), model().hierarchy, params)
    same(found, full | {"output_layer.norm_final.weight": full["output_layer.norm_final.weight"] + 1})
    other = dataclasses.replace(tuned, released=ReleasedConfig(layout="mdlm", first_cluster=258))
    assert sizes(import_weights.published(other, tuned, str(tmp_path / "tuned"), model().hierarchy, params)).rows == 266


def test_whole_or_not_there(roundtrip, tmp_path, monkeypatch, capsys):
    c, folder = roundtrip
    workdir = tmp_path / "run"

    def fails(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(import_weights, "write_json", fails)
        with pytest.raises(OSError, match="disk full"):
            import_released(c, str(workdir))
    with pytest.raises(ConfigError, match="no .*config.json"):
        hdlm_jax.load(str(workdir))
    import_released(c, str(workdir))
    assert set(os.listdir(workdir)) == {"config.json", "hierarchy.npz", "params", "released.npz", "tokenizer"}
    made = os.stat(workdir / "config.json").st_mtime_ns
    import_released(c, str(workdir))
    assert os.stat(workdir / "config.json").st_mtime_ns == made and "import: reusing" in capsys.readouterr().out
    raw = dataclasses.replace(c, released=dataclasses.replace(c.released, ema=False))
    for taken, settings in ((workdir, raw), (folder / "trained", c)):
        with pytest.raises(ConfigError, match="holds a run or another import; give another --workdir"):
            import_released(settings, str(taken))


@pytest.mark.parametrize("section, changes, match", [
    ("released", {"layout": ""}, "released.layout='': --mode=import needs it; see configs/released_mdlm.py"),
    ("released", {"weights": ""}, "released.weights='': .*configs/released_hdlm.py"),
    ("released", {"clusters": ""}, r"released.clusters='': needed with hierarchy.clusters above 1"),
    ("hierarchy", {"clusters": (1,)}, r"clusters=\(1,\): .*clusters.npy has 8; --config.hierarchy.clusters='\(8,\)'"),
    ("hierarchy", {"clusters": (16,)}, r"clusters.npy has 8; --config.hierarchy.clusters='\(8,\)'"),
    ("model", {"head": "factorised"}, "model.head='factorised': published networks"),
    ("model", {"width": 64}, "model.width=64: .* has 32; give --config.model.heads=2 --config.model.width=32 "),
    ("model", {"heads": 4}, "model.heads=4: .* has 2; give"),
    ("released", {"mask_id": 400}, "has 384 rows, too few for symbol 408"),
    ("tokenizer", {"kind": "bpe"}, "tokenizer.file='': --mode=import needs the rank file")])
def test_settings_that_do_not_go_with_the_file(roundtrip, tmp_path, section, changes, match):
    c = dataclasses.replace(roundtrip[0], **{section: dataclasses.replace(getattr(roundtrip[0], section), **changes)})
    with pytest.raises(ValueError, match=match):
        import_released(c, str(tmp_path / "run"))
    assert not os.path.exists(tmp_path / "run" / "config.json")


def test_clusters_go_with_the_layout_that_has_them(roundtrip, tmp_path):
    c = roundtrip[0]
    c = dataclasses.replace(c, released=dataclasses.replace(c.released, layout="mdlm"),
                            hierarchy=dataclasses.replace(c.hierarchy, clusters=(1,)))
    with pytest.raises(ConfigError, match=r"released.clusters='.*': needed with .* above 1, and only there; .*\(1,\)"):
        import_released(c, str(tmp_path / "run"))


def test_a_factorised_head_has_no_published_layout(roundtrip):
    head = dataclasses.replace(roundtrip[0].model, head="factorised")
    with pytest.raises(ConfigError, match="head='factorised'; the published network has a logit for every word"):
        import_weights.check_exportable(dataclasses.replace(roundtrip[0], model=head))


# ----------------------------------------------------------------------------------------------------------- PyTorch


def test_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "a.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"needs PyTorch, pip install 'hdlm_jax\[torch\]'"):
        read_weights(str(tmp_path / "a.pt"))


class _Runs:
    def __reduce__(self):
        return os.system, ("echo this must not run",)


def test_pytorch_files(tmp_path, capfd):
    torch = pytest.importorskip("torch")
    state = random_state()
    names = list(layout_of(sizes(state)))
    tensors = {f"backbone.{k}": torch.tensor(v) for k, v in state.items()}
    torch.save({k: v.to(torch.bfloat16) for k, v in tensors.items()}, tmp_path / "model.pt")
    rounded = {k: v.astype(ml_dtypes.bfloat16).astype(np.float32) for k, v in state.items()}
    same(read_weights(str(tmp_path)).state, rounded)
    shadow = [torch.tensor(state[name]) + 1 for name in names]
    torch.save({"state_dict": tensors, "ema": {"shadow_params": shadow}, "global_step": 9}, tmp_path / "a.ckpt")
    file = read_weights(str(tmp_path / "a.ckpt"))
    assert file.averaged and file.step == 9
    same(file.state, state | {name: state[name] + 1 for name in names})
    want = Hierarchy.from_parents([np.arange(V) % 5])
    torch.save(torch.arange(V) % 5, tmp_path / "c.pt")
    torch.save({"cluster_dict": torch.arange(V + 1) % 5 + 22, "log_B": torch.zeros(())}, tmp_path / "noise_schedule.pt")
    for name in ("c.pt", "noise_schedule.pt"):
        assert read_clusters(str(tmp_path / name), V, 22) == want
    torch.save({"state_dict": tensors, "hyper_parameters": _Runs()}, tmp_path / "hostile.ckpt")
    (tmp_path / "old.ckpt").write_bytes(pickle.dumps(_Runs()))
    for name in ("hostile.ckpt", "old.ckpt"):
        with pytest.raises(ConfigError, match="could run code and are not read. If you trust it: python -c"):
            read_weights(str(tmp_path / name))
    assert "must not run" not in capfd.readouterr().out
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="must hold a dict of tensors, holds Tensor"):
        read_weights(str(tmp_path / "tensor.pt"))
