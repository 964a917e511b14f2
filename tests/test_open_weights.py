"""Open checkpoints in and out: every family's folder through import, load and export; what is refused, in one line."""
import copy
import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import big_folder
import families
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenfiles
import tokenizers
from safetensors import safe_open
from tiny import QUICK_COMPILES

import hdlm_jax
from hdlm_jax import main
from hdlm_jax.config import Config, ConfigError, DecoderConfig, ModelConfig, inherit, recipes, resolve
from hdlm_jax.data import hub_tokenizer
from hdlm_jax.decoding import presets
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.models import families as known
from hdlm_jax.models.families import layout_of, understood
from hdlm_jax.models.heads import NEVER, FlatHead
from hdlm_jax.models.quantise import quantise
from hdlm_jax.runs import export as export_lib
from hdlm_jax.runs import import_weights, open_weights
from hdlm_jax.training import of_run, param_file
from hdlm_jax.training.adapt import adapted
from hdlm_jax.training.checkpoint import save_params
from hdlm_jax.training.loading import load_here, load_run
from hdlm_jax.training.state import build

V, S = families.V, families.S
ROW = tuple(families.make_ids()[0].tolist())
START = ROW[0]  # the fixtures' first row begins with it, as a text with its start symbol
TOKENS = 93  # of the tokenizer; the tables have V rows
MASK = 95  # behind the tokens, as in published models
KINDS = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


def tokenizer_spec() -> dict:
    """A byte-level tokenizer.json of TOKENS tokens: <s> is START, <|endoftext|> 0, no merges."""
    letters, plain = tokenfiles.letters(), [*range(97, 123), *range(65, 91), *range(32, 65), *range(91, 97)]
    words = ["<|endoftext|>", *(letters[byte] for byte in [0xEF, 0xBF, 0xBD, 10, *plain][: TOKENS - 2])]
    words.insert(START, "<s>")
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": words.index(name), "content": name, "special": True, **plain}
             for name in ("<|endoftext|>", "<s>")]
    return tokenfiles.byte_level((), added_tokens=added, truncation=None, pre_tokenizer={
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        model={"type": "BPE", "vocab": {word: i for i, word in enumerate(words)}, "merges": []})


def folder(path: Path, name: str, kind: str = "f32", shards: int = 1, old: bool = False, changes=None, tensors=None,
           tokenizer: bool = True) -> Path:
    """A family's folder with a tokenizer; changes: of its config.json (None takes a key out)."""
    made = families.as_version_4(families.config(name)) if old else families.config(name)
    made = {key: value for key, value in (made | (changes or {})).items() if value is not ...}
    weights = tensors or {key: a.astype(KINDS[kind]) for key, a in families.weights(name).items()}
    families.write(path, made, weights, shards)
    if tokenizer:
        tokenfiles.folder(path, tokenizer_spec(), bos_token="<s>", eos_token="<|endoftext|>")
    return path


def settings(weights: Path, **released) -> Config:
    c = recipes.recipe("released_open")
    c.model.seq_len = S
    c.released.weights = str(weights)
    for key, value in released.items():
        c["tokenizer" if key == "file" else "model" if key == "param_dtype" else "released"][key] = value
    return resolve(c)


def imported(weights: Path, workdir: Path, **released) -> Path:
    import_weights.import_released(settings(weights, **released), str(workdir))
    return workdir


def exported(workdir: Path, **released) -> Path:
    c = of_run.get_config(str(workdir))
    c.released.update(layout="hub", **released)
    return Path(export_lib.export(resolve(c), str(workdir)))


@functools.cache
def workdir(name: str, **released) -> Path:
    """The import of a family; do not write there."""
    here = Path(tempfile.mkdtemp(prefix="hdlm_jax_open_"))
    return imported(folder(here / "hub", name), here / "run", **released)


def logits(run, ids=ROW) -> np.ndarray:
    """Of the words at a row of tokens, [S, TOKENS]. An autoregressive process puts its start symbol in front, which is
    the row's own first token."""
    x = jnp.asarray(ids, jnp.int32)[None]
    z = run.process.shifted(x[:, 1:]) if run.process.exact else x
    h = run.network.hidden(run.params, z, jnp.zeros(1))
    return np.asarray(run.network.head.logits(run.network.head_params(run.params), h))[0]


def stored(path: Path) -> dict:
    """name -> (dtype, bytes) of all tensors of a hub folder."""
    out = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():
                out[name] = (opened.get_slice(name).get_dtype(), opened.get_tensor(name).tobytes())
    return out


FORMS = [*((name, "f16", 2, False) for name in families.NAMES), *((name, "bf16", 1, True) for name in families.NAMES),
         ("llama", "f32", 1, False)]

MASKED = {"llada": {}, "llada2_moe": {"mask_id": MASK}}


def given(name: str) -> dict:
    """What released.* has to say of a family's fixture."""
    return MASKED.get(name, {}) | ({"context": "full"} if name == "llada2_moe" else {})


@pytest.mark.parametrize("name, kind, shards, old", FORMS)
def test_in_and_out(name, kind, shards, old, tmp_path):
    """The original's logits; back on the hub's side the same tensors bit for bit, and from there the same run."""
    hub = folder(tmp_path / "in", name, kind, shards, old)
    run = load_here(str(imported(hub, tmp_path / "run", **given(name))))
    assert run.process.exact != (name in MASKED) and run.tokenizer.vocab_size == TOKENS
    want = families.case(name)["full" if name in MASKED else "causal"][0][: S if name in MASKED else -1]
    got = logits(run)
    if kind != "bf16":  # weights of the fixtures are float16 numbers
        assert np.abs(got - want[:, :TOKENS]).max() < 1e-5 * np.abs(want).max()
    out = exported(tmp_path / "run")
    assert stored(out) == stored(hub)
    assert json.loads((out / "config.json").read_text()) == json.loads((hub / "config.json").read_text()) | (
        {"mask_token_id": MASK} if name in MASKED else {})
    if kind == "bf16":
        return
    again = load_here(str(imported(out, tmp_path / "again", **given(name))))
    assert dataclasses.replace(again.config, released=run.config.released, tokenizer=run.config.tokenizer) == run.config
    library = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))  # other programs read it too
    assert library.encode("the 4th").ids == list(run.tokenizer.encode("the 4th"))
    assert again.tokenizer.fingerprint == run.tokenizer.fingerprint
    np.testing.assert_array_equal(logits(again), got)
    assert (tmp_path / "again" / "params" / "model.safetensors").read_bytes() == (
        tmp_path / "run" / "params" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["llama_tied", "qwen2"])
def test_gguf(name, tmp_path):
    """With the tokenizer beside it; what it gives is the folder's, and goes back to a hub folder."""
    pytest.importorskip("gguf")
    hub, file = folder(tmp_path / "hub", name), families.write_gguf(name, tmp_path / "model.gguf")
    run = load_here(str(imported(file, tmp_path / "run", file=str(hub))))
    np.testing.assert_array_equal(logits(run), logits(load_here(str(workdir(name)))))
    assert stored(exported(tmp_path / "run")) == stored(hub)


def test_rows_behind_the_tokens(tmp_path):
    """They are no tokens: without probability (tests above: they come back). The mask is never predicted either."""
    tokens = load_here(str(workdir("llama")))
    assert logits(tokens).shape == (S - 1, TOKENS)
    inside = 40  # an id within the tokenizer's
    hub = folder(tmp_path / "hub", "llama")
    run = load_here(str(imported(hub, tmp_path / "run", mask_id=inside, logits="shifted")))
    assert not run.process.exact and run.network.shift
    found = logits(run)
    assert (found[:, inside] < -1e5).all() and (np.delete(found, inside, 1) > -100).all()
    np.testing.assert_array_equal(np.asarray(run.params["states"])[0],
                                  families.weights("llama")["model.embed_tokens.weight"][inside])
    full = families.case("llama")["full"][0][:, :TOKENS]
    np.testing.assert_allclose(np.delete(found, inside, 1)[1:], np.delete(full, inside, 1)[:-1], atol=1e-4)
    assert json.loads((exported(tmp_path / "run") / "config.json").read_text())["mask_token_id"] == inside
    assert stored(tmp_path / "run" / "hub") == stored(tmp_path / "hub")


@pytest.mark.slow
def test_the_memory_of_an_import(tmp_path):
    """Anonymous memory stays far below the folder's size, and a load holds it once (8B: docs/models.md)."""
    shard = big_folder.write(tmp_path / "hub", 4, 1024, 30_000, 120_000_000)
    size = sum(file.stat().st_size for file in (tmp_path / "hub").glob("*.safetensors"))
    assert size > 1.5 * shard > 1e8
    peaks = [big_folder.measured(script, str(tmp_path / "hub"), str(tmp_path / "run"))[0]
             for script in ("from hdlm_jax.runs import import_weights", big_folder.IMPORT, big_folder.LOAD)]
    assert peaks[1] - peaks[0] < 1.3 * shard and peaks[2] - peaks[0] < 1.3 * size, peaks


def said(call, *arguments, **more) -> str:
    """The one line of what is refused."""
    with pytest.raises((ConfigError, ValueError)) as caught:
        call(*arguments, **more)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600, text
    return text


def refused(tmp_path, name: str = "qwen3", released=None, **how) -> str:
    """What an import of a folder made so says, and that nothing was written."""
    hub = folder(tmp_path / "hub", name, **how)
    text = said(imported, hub, tmp_path / "run", **(released or {}))
    assert not list((tmp_path / "run").iterdir())
    return text


FIXED = [(name, wrong) for name, values in known._FIXED.items() for wrong in (
    True if values[0] is False else False if values[0] is True else "another",)]


@pytest.mark.parametrize("name, wrong", FIXED)
def test_what_would_change_the_network_is_refused_by_name(name, wrong):
    text = said(understood, families.config("qwen3") | {name: wrong}, "x/config.json")
    assert text.startswith(f"x/config.json: {name}={wrong!r}: is not made here")


@pytest.mark.parametrize("name, changes, says", [
    ("llama", {"model_type": "mamba"}, "model_type='mamba': choose one of llama, qwen2"),
    ("llama", {"model_type": ["llama"]}, "choose one of llama"),
    ("llama", {"clip_qkv": 8, "logit_scale": 2}, "clip_qkv, logit_scale: not known here"),
    ("llama", {"is_causal": False}, "is_causal=False: give released.mask_id"),
    ("llama", {"rms_norm_eps": ...}, "rms_norm_eps=None: must be a number above 0"),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4}}, "rope_type='yarn': choose"),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3"}}, "factor=None"),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1]}}, "mrope_section: is not made here"),
    ("llama", {"rope_parameters": {}}, "rope_theta=None: must be"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "layer_types=.*must be full_attention for every block"),
    ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types"),
    ("gemma3_text", {"sliding_window": ...}, "sliding_window: must be given, for model_type='gemma3_text'"),
    ("gemma3_text", {"hidden_activation": ...}, "hidden_activation: must be given"),
    ("llada2_moe", {"partial_rotary_factor": ...}, "partial_rotary_factor: must be given"),
    ("llada2_moe", {"rotary_dim": 16}, "rotary_dim=16: partial_rotary_factor=0.5 of 16 units is 8")])
def test_what_is_not_understood(name, changes, says):
    made = {key: value for key, value in (families.config(name) | changes).items() if value is not ...}
    assert re.search(says, said(understood, made, "x/config.json"))


# as published, but for what is_known says: names, and numbers that are not ours to choose
PUBLISHED = [
    {"model_type": "sdar", "attention_bias": False, "attention_dropout": 0.0, "attn_implementation": "flex_attention",
     "bos_token_id": 151643, "debug": False, "eos_token_id": 151643, "block_size": 4, "mask_token_id": 151669,
     "ep_size": 1, "fuse_cross_entropy": True, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
     "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 32768, "max_window_layers": 28,
     "micro_forward": False, "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
     "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "skip_checkpoint": False,
     "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": False,
     "use_deepep": False, "use_sliding_window": False, "vocab_size": 151936},
    {"model_type": "llada", "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "attention_dropout": 0.0,
     "attention_layer_norm": False, "attention_layer_norm_with_affine": True, "bias_for_layer_norm": False,
     "block_group_size": 1, "block_type": "llama", "d_model": 4096, "embedding_dropout": 0.0, "embedding_size": 126464,
     "eos_token_id": 126081, "flash_attention": True, "include_bias": False, "include_qkv_bias": False,
     "init_cutoff_factor": None, "init_device": "meta", "init_fn": "mitchell", "init_std": 0.02,
     "input_emb_norm": False, "layer_norm_type": "rms", "layer_norm_with_affine": True, "mask_token_id": 126336,
     "max_sequence_length": 4096, "mlp_hidden_size": 12288, "mlp_ratio": 4, "multi_query_attention": None,
     "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "pad_token_id": 126081, "precision": "amp_bf16",
     "residual_dropout": 0.0, "rms_norm_eps": 1e-05, "rope": True, "rope_full_precision": True, "rope_theta": 500000.0,
     "scale_logits": False, "use_cache": False, "vocab_size": 126464, "weight_tying": False},
    {"model_type": "Dream", "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 3584,
     "intermediate_size": 18944, "mask_token_id": 151666, "max_window_layers": 28, "num_attention_heads": 28,
     "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None,
     "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "use_mrope": False,
     "use_sliding_window": False, "vocab_size": 152064}]


@pytest.mark.parametrize("made", PUBLISHED, ids=lambda made: made["model_type"])
def test_files_as_published_are_understood(made):
    found = understood(made, "config.json")
    assert found.masked and found.mask == made["mask_token_id"] and found.rows == made["vocab_size"]
    kind = made["model_type"]
    assert found.decoder["context"] == ("block" if kind == "sdar" else "full")
    assert found.decoder["shifted"] == found.decoder["qkv_bias"] == (kind == "Dream")


def without(name: str, *left: str, **others) -> dict:
    return {key: a for key, a in families.weights(name).items() if key not in left} | others


@pytest.mark.parametrize("how, says", [
    (dict(tensors=without("qwen3", "model.norm.weight")), r"1 tensors missing: model.norm.weight"),
    (dict(tensors=without("qwen3", extra=np.zeros(3, np.float32))), r"1 tensors unexpected: extra"),
    (dict(tensors=without("qwen3", **{"model.norm.weight": np.zeros(31, np.float32)})), r"norm.weight \(31,\) in pl"),
    (dict(tensors=without("qwen3", **{"model.norm.weight": np.zeros(32, np.int32)})), "has dtype I32; choose one of"),
    (dict(tensors=without("qwen3", **{"lm_head.weight": np.zeros((96, 32), np.float32)})), "lm_head.weight is not mod"),
    (dict(tokenizer=False), "no tokenizer.json in it"),
    (dict(released={"mask_id": 96}), "released.mask_id=96: the tables of .* have 96 rows"),
    (dict(released={"logits": "shifted"}), "released.logits: .* is an autoregressive model"),
    (dict(released={"context": "full"}), "released.context: .* is an autoregressive model"),
    (dict(changes={"vocab_size": 90}), "93 ids, the tables of .* have 90 rows")])
def test_what_does_not_fit(how, says, tmp_path):
    assert re.search(says, refused(tmp_path, **how))


def test_damaged_files(tmp_path):
    hub = folder(tmp_path / "hub", "qwen3", shards=2)
    shard = hub / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    for raw in (whole[:-5], whole[:50], b"", b"\xff" * 40, (2**40).to_bytes(8, "little") + whole[8:]):
        shard.write_bytes(raw)
        assert "damaged file of parameters" in said(imported, hub, tmp_path / "run")
    shard.unlink()
    assert "a shard that model.safetensors.index.json names is missing" in said(imported, hub, tmp_path / "run")
    shard.write_bytes(whole)
    for text in ("{", "[]", '"x"', ""):
        (hub / "config.json").write_text(text)
        assert "config.json: " in said(imported, hub, tmp_path / "run")
    params = imported(folder(hub, "qwen3", shards=2), tmp_path / "run") / "params" / "model.safetensors"
    whole = params.read_bytes()
    for raw in (whole[:-4], whole[:100], b"", b"\0" * 8 + whole[8:], whole.replace(b'"F32"', b'"F64"', 1)):
        params.write_bytes(raw)
        assert str(params) in said(load_here, str(tmp_path / "run"))
    params.unlink()
    with pytest.raises((OSError, ValueError)):
        load_here(str(tmp_path / "run"))


VALUES = (None, "x", -1, 1e99, [], {}, True)


@pytest.mark.parametrize("name", families.NAMES)
def test_strange_values(name):
    """Each is refused in a line, or leaves the network what it was, or is one of these, which say another one."""
    made, given_ = families.config(name), given(name)
    want = understood(made, "config.json", **given_)
    other = {"mask_token_id", "block_size", "norm_topk_prob"}
    for old in (made, families.as_version_4(made)):
        for key in old:
            for value in VALUES:
                try:
                    found = understood(old | {key: value}, "config.json", **given_)
                    layout_of(found)
                    ModelConfig(**found.model).check()
                    DecoderConfig(**found.decoder).check()
                except ConfigError as error:
                    assert "\n" not in str(error) and len(str(error)) < 500
                    continue
                same = found == want or layout_of(found) != layout_of(want)
                assert same or value is None or value == {} or key in other, (key, value)


def adapted_run(path: Path, base: str, clusters: int = 1, process: str = "hierarchical", **decoder) -> Path:
    """A run begun from a family's import, as a workdir: without a step of training, but of its low-rank additions."""
    start = load_here(str(workdir(base)))
    c = start.config.as_dict()
    c["decoder"] |= decoder
    c["hierarchy"]["clusters"], c["diffusion"]["process"] = (clusters,), process
    c["train"] |= {"init_from": str(workdir(base)), "adapt": True}
    c["diffusion"]["weighting"] = "constant"
    made = resolve(c)
    hierarchy = Hierarchy.from_parents([np.arange(TOKENS) % clusters] if clusters > 1 else [], vocab_size=TOKENS)
    network, _ = build(made, hierarchy)
    params = adapted(jax.random.key(0), start.params, start.network, network, S, False)
    noise = np.random.default_rng(0)
    params = jax.tree_util.tree_map_with_path(
        lambda keys, a: jnp.float32(0.05 * noise.standard_normal(a.shape)) if keys[-1].key == "lora_out" else a, params)
    path.mkdir()
    start.tokenizer.save(path / "tokenizer")
    hierarchy.save(path / "hierarchy.npz", start.tokenizer.fingerprint)
    save_params(str(path / "params"), jax.tree.map(np.asarray, params))
    fingerprints = {"tokenizer": start.tokenizer.fingerprint, "hierarchy": hierarchy.fingerprint, "data": ""}
    (path / "config.json").write_text(json.dumps({"step": 2, "fingerprints": fingerprints, "config": made.as_dict()}))
    return path


@pytest.mark.parametrize("base, how", [
    ("qwen2", dict(shifted=True, lora=2)), *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        ("qwen3", dict(shifted=True)), ("llama", dict(shifted=False, context="block", block=4)),
        ("gemma3_text", dict(shifted=True)), ("qwen3_moe", dict(lora=2))])])
def test_an_autoregressive_model_made_a_masked_one_goes_out_and_comes_back(base, how, tmp_path):
    """With the mask's vector behind the tokens, and low-rank additions merged."""
    here = adapted_run(tmp_path / "run", base, **how)
    out = exported(here)
    made, was = json.loads((out / "config.json").read_text()), families.config(base)
    assert made["mask_token_id"] == TOKENS and made["vocab_size"] == V
    assert made.keys() - was.keys() <= {"mask_token_id", "block_size"} and stored(out).keys() == stored(
        folder(tmp_path / "first", base)).keys()
    use = dict(logits="shifted" if how.get("shifted") else "own", context=how.get("context", ""))
    again, run = load_here(str(imported(out, tmp_path / "again", **use))), load_here(str(here))
    assert dataclasses.replace(again.config.decoder, lora=how.get("lora", 0), block=run.config.decoder.block
                               ) == run.config.decoder
    row = [*ROW[:5], run.hierarchy.mask_id, *ROW[6:]]
    got, want = logits(again, row), logits(run, row)
    mask = np.arange(TOKENS) != TOKENS  # neither has a row for it among the tokens
    np.testing.assert_allclose(got[:, mask], want[:, mask], atol=1e-5 * np.abs(want).max())


def test_what_does_not_go_to_the_hub_s_layout(tmp_path):
    clustered = adapted_run(tmp_path / "clusters", "qwen3", clusters=6)
    assert re.search(r"has clusters \(6,\); open layouts know tokens and a mask alone", said(exported, clustered))
    other = adapted_run(tmp_path / "gidd", "qwen3", process="gidd")
    assert "has diffusion.process='gidd'" in said(exported, other)
    here = adapted_run(tmp_path / "run", "qwen3")
    assert "released.mask_id=5: is a token of texts, b'a'" in said(exported, here, mask_id=5)
    assert "released.mask_id=97: the tables have 96 rows; give at most 96" in said(exported, here, mask_id=97)
    assert not (here / "hub").exists()
    assert json.loads((exported(here, mask_id=96) / "config.json").read_text())["vocab_size"] == 97
    config = json.loads((here / "config.json").read_text())
    by_class = config["config"] | {"hierarchy": config["config"]["hierarchy"] | {"head_clusters": 6},
                                   "model": config["config"]["model"] | {"head": "factorised", "tied": False}}
    (here / "config.json").write_text(json.dumps(config | {"config": by_class}))
    assert "has model.head='factorised'; open layouts have a logit for every token" in said(exported, here)
    config["config"]["train"] |= {"init_from": "", "adapt": False}
    (here / "config.json").write_text(json.dumps(config))
    assert "neither an import of an open checkpoint nor trained from one" in said(exported, here)


def test_a_run_at_any_distance_from_its_import(tmp_path):
    """Trained from one that was trained from an import."""
    first = adapted_run(tmp_path / "first", "qwen3")
    second = shutil.copytree(first, tmp_path / "second")
    config = json.loads((first / "config.json").read_text())
    config["config"]["train"] |= {"init_from": str(first), "adapt": False}
    (second / "config.json").write_text(json.dumps(config))
    assert stored(exported(second)) == stored(exported(first))


def test_adapting_takes_the_heads_over():
    """Of what train.adapt leaves to the recipe each is named whole: model.head is not model.heads."""
    base = load_here(str(workdir("qwen3"))).config
    given_ = {"train": {"adapt": True}, "model": {"trunk": "decoder", "time_conditioning": False}}
    assert inherit(given_, base, "x")["model"]["heads"] == base.model.heads == 4


def test_no_setting_reads_an_autoregressive_model_both_ways(tmp_path):
    """Bidirectional attention would show each token its own answer: perplexity 9.6 for 36.0 (docs/models.md)."""
    here = workdir("llama")
    c = of_run.get_config(str(here))
    for key, value in {"decoder.context": "block", "decoder.shifted": True, "diffusion.process": "hierarchical",
                       "decoder.window": 4, "decoder.block": 4}.items():
        changed = copy.deepcopy(c)
        section, name = key.split(".")
        changed[section][name] = value
        assert re.search(rf"{key}=.* was trained otherwise", said(load_run, resolve(changed), str(here)))
    c.model.attention = "cudnn"  # a kernel; xla stands in
    run = load_run(resolve(c), str(here))
    other = [*ROW[:9], (ROW[9] + 1) % TOKENS, *ROW[10:]]
    np.testing.assert_array_equal(logits(run)[:9], logits(run, other)[:9])
    assert (logits(run)[9:] != logits(run, other)[9:]).any()
    forced = settings(folder(tmp_path / "hub", "llama"))
    forced = dataclasses.replace(forced, decoder=DecoderConfig(context="block"))
    assert said(import_weights.import_released, forced, str(tmp_path / "no")).startswith("decoder: --mode=import takes")


@pytest.mark.parametrize("step", ["params", "config.json", *(pytest.param(step, marks=pytest.mark.slow)
                                                         for step in ("tokenizer", "hierarchy.npz", "moved"))])
def test_an_interrupted_import(step, tmp_path, monkeypatch):
    """Wherever it stops nothing is there to load, and the same command starts over."""
    hub, here = folder(tmp_path / "hub", "qwen3"), tmp_path / "run"

    def stops(*_, **__):
        raise OSError("killed")

    with monkeypatch.context() as patch:
        place, name = {"tokenizer": (hub_tokenizer.HubTokenizer, "save"), "hierarchy.npz": (Hierarchy, "save"),
                       "params": (param_file.Writer, "put"), "moved": (open_weights.os, "replace"),
                       "config.json": (open_weights, "write_json")}[step]
        if step == "moved":
            replace, calls = os.replace, []
            patch.setattr(place, name, lambda a, b: replace(a, b) if "import.tmp" not in str(a) or not calls and (
                calls.append(a) or True) else stops())
        elif step == "config.json":
            write = open_weights.write_json
            patch.setattr(place, name, lambda path, value: write(path, value) if "source" in path else stops())
        else:
            patch.setattr(place, name, stops)
        with pytest.raises(OSError, match="killed"):
            imported(hub, here)
    assert not (here / "config.json").exists()
    assert "no run there" in said(main.with_recipe, ["", f"--workdir={here}", "--mode=evaluate"])
    assert re.search("no .*config.json", said(load_here, str(here)))
    run = load_here(str(imported(hub, here)))
    np.testing.assert_array_equal(logits(run), logits(load_here(str(workdir("qwen3")))))
    assert sorted(path.name for path in here.iterdir()) == ["config.json", "hierarchy.npz", "params", "source.json",
                                                            "tokenizer"]


def test_the_same_import_is_reused_and_another_is_not(tmp_path, capsys):
    hub, here = folder(tmp_path / "hub", "qwen3"), tmp_path / "run"
    imported(hub, here)
    capsys.readouterr()
    imported(hub, here)
    assert capsys.readouterr().out == f"import: reusing {here}\n"
    folder(hub, "qwen3", changes={"rope_parameters": {"rope_theta": 1e4}})
    assert "holds a run or another import" in said(imported, hub, here)


@functools.cache
def masked(kind: str):
    """A masked model of llama's fixture as `hdlm_jax.load` gives it."""
    how = {"own": {}, "shifted": dict(logits="shifted"), "blocks": dict(logits="shifted", context="block")}[kind]
    return hdlm_jax.load(str(workdir("llama", mask_id=MASK, **how)))


QUICK = {("shifted", "fast_dllm"), ("blocks", "sparsed")}


@pytest.mark.parametrize("kind, method", [
    pytest.param(kind, method, marks=[] if (kind, method) in QUICK else pytest.mark.slow)
    for kind in ("own", "shifted", "blocks") for method in presets.METHODS
    if method not in ("dcolt", "ctrldiff", "adjust", "diagonal")])
def test_every_method_on_an_imported_model(kind, method):
    """Tokens alone, the prompt in front, the same in other company."""
    model = masked(kind)
    needs, options = presets.METHODS[method]().needs, {"daedal": "start=8", "bd3lm": "block=32"}.get(method, "")
    more = {"helper": str(workdir("llama"))} if needs in presets.HELPERS else {}
    more |= {"classifier": lambda onehots: jnp.sum(onehots[..., 8], axis=-1)} if needs == "classifier" else {}
    how = dict(method=method, options=options, steps=6, prompt="ab", batch_size=4, **more)
    texts = model.generate(2, **how)
    assert len(texts) == 2 and all(text.startswith("ab") for text in texts)
    assert model.generate(1, **how) == texts[:1]


def test_keys_are_kept_of_whole_blocks_alone():
    """A model whose blocks have 32 tokens says so of its own, before anything is drawn."""
    with pytest.raises(ConfigError, match="generate.method='bd3lm': keeps the keys .* give the options 'block=32'"):
        masked("blocks").generate(1, method="bd3lm", options="block=16", prompt="ab")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["own", "shifted", "blocks"])
def test_other_uses_of_an_imported_model(kind):
    """Blanks, a bound, JSON."""
    model = masked(kind)
    filled = model.infill("ab[MASK:4]cd", 2, steps=4)
    assert all(text.startswith("ab") and text.endswith("cd") for text in filled)
    found = model.nelbo(["abc d", "x"], draws=4)
    assert all(np.isfinite(one["nats"]) and one["nats"] > 0 for one in found)


def test_the_weights_of_experts_are_rounded_along_their_inputs():
    """Each output channel of each expert has a scale of its own; what is rounded keeps its dtype."""
    params = load_here(str(workdir("qwen3_moe"))).params
    rounded = quantise(params, 8)
    for name in ("gate", "up", "down"):
        kernel, found = (np.asarray(tree["stack"]["moe"]["experts"][name]["kernel"]) for tree in (params, rounded))
        scale = np.abs(kernel).max(axis=2, keepdims=True) / 127  # [blocks, experts, inputs, outputs]
        np.testing.assert_allclose(found / scale, np.round(found / scale), atol=1e-4)
        assert (np.abs(found - kernel) <= 0.5001 * scale).all() and (found != kernel).any()
    kept = jax.tree.leaves(rounded["stack"]["moe"]["router"]), jax.tree.leaves(params["stack"]["moe"]["router"])
    assert all((a == b).all() for a, b in zip(*kept, strict=True))
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(quantise(half, 4, "rotated"))} == {jnp.dtype(jnp.bfloat16)}


def test_a_softcap_gives_the_mask_no_probability():
    head = FlatHead(Hierarchy.from_parents([], vocab_size=8), softcap=30.0)
    params = head.init(None, 4)
    params["bias"] = params["bias"].at[3].set(NEVER)
    assert head.predict(params, jnp.ones((1, 4))).log_probs()[0, 3] < -1e5


MESH = """
import sys, dataclasses, numpy as np, jax
sys.path.insert(0, "tests")
import test_open_weights as t
from hdlm_jax.config import ParallelConfig
for name in sys.argv[1].split(","):
    run = t.load_here(str(t.workdir(name)), mesh=ParallelConfig(data=2, fsdp=2, tensor=2))
    assert dict(run.mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    case = t.families.case(name)
    want = case["full" if name in t.MASKED else "causal"][0]
    got = t.logits(run)
    assert np.abs(got - want[: len(got), : t.TOKENS]).max() < 1e-5 * np.abs(want).max(), name
    kernel = run.params["stack"]["q"]["kernel"]
    shard = kernel.addressable_shards[0].data.shape
    assert np.prod(kernel.shape) == 4 * np.prod(shard), (kernel.shape, shard)
    if name == "qwen2":  # a single head of keys for two tensor shards
        w = {k: a[: len(a) // 2] if "k_proj" in k or "v_proj" in k else a for k, a in t.families.weights(name).items()}
        here = t.Path(sys.argv[2])
        t.imported(t.folder(here / "in", name, tensors=w, changes={"num_key_value_heads": 1}), here / "run")
        one, many = (t.load_here(str(here / "run"), mesh=ParallelConfig(*n)) for n in ((8, 1, 1), (2, 2, 2)))
        assert one.network.sizes[1] == 1
        np.testing.assert_allclose(t.logits(many), t.logits(one), atol=1e-5)
"""


@pytest.mark.slow
@pytest.mark.parametrize("names", ["qwen2,llada", pytest.param("qwen3_moe,gemma3_text", marks=pytest.mark.slow)])
def test_on_a_mesh_of_eight_devices(names, root, tmp_path):
    flags = f"--xla_force_host_platform_device_count=8 {QUICK_COMPILES}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", MESH, names, str(tmp_path)], env=env, cwd=root, capture_output=True,
                          text=True)
    assert not done.returncode, done.stderr[-3000:]


@pytest.mark.parametrize("kind, base, shifted", [
    ("Dream", "qwen2", True), *(
        pytest.param(*case, marks=pytest.mark.slow) for case in [
            ("sdar", "qwen3", False), ("rnd1", "qwen3_moe", False), ("Fast_dLLM_Qwen", "qwen2", True),
            ("a2d-qwen3", "qwen3", False), ("a2d-qwen2", "qwen2", False),
            ("a2d-llama", "llama", False)])])
def test_families_of_the_same_network(kind, base, shifted, tmp_path):
    """Their logits are those that the base gives when each token sees all, at their place or one behind."""
    hub = folder(tmp_path / "hub", base, changes={"model_type": kind, "mask_token_id": MASK})
    run = load_here(str(imported(hub, tmp_path / "run", context="full")))
    assert run.network.shift == shifted and not run.network.causal
    want, got = families.case(base)["full"][0][:, :TOKENS], logits(run)
    want, got = (want[:-1], got[1:]) if shifted else (want, got)
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
    assert stored(exported(tmp_path / "run")) == stored(hub)
