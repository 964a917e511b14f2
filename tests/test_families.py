"""The stored fixtures of the open families (families.npz): what they hold, and that the originals still give it."""
import json

import families
import numpy as np
import pytest
from safetensors.numpy import load_file


@pytest.mark.parametrize("name", families.NAMES)
def test_what_is_stored(name, tmp_path):
    found = families.case(name)
    wanted = {"llada": {"full"}, "llada2_moe": {"full", "block"}, "gemma3_text": {"causal"}}
    assert found.keys() == {"ids"} | wanted.get(name, {"causal", "full"})
    for key in found.keys() - {"ids"}:
        assert found[key].shape == (2, families.S, families.V) and found[key].dtype == np.float32
        assert 2 < np.abs(found[key]).max() < 50
    whole = load_file(families.write_folder(name, tmp_path / "one") / "model.safetensors")
    parts = families.write_folder(name, tmp_path / "two", shards=2, old=True)
    where = json.loads((parts / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(where.values())) == 2
    for key, value in whole.items():
        np.testing.assert_array_equal(load_file(parts / where[key])[key], value)
        np.testing.assert_array_equal(np.float16(value), value)
    made, old = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "one", parts))
    assert made["model_type"] == ("llama" if name == "llama_tied" else name)
    assert "rope_parameters" not in old and isinstance(old["rope_theta"], float)


def test_llada_is_llama_under_other_names():
    found, llama = families.weights("llada"), families.weights("llama")
    pairs = {"wte.weight": "embed_tokens.weight", "ln_f.weight": "norm.weight",
             "blocks.2.ff_out.weight": "layers.2.mlp.down_proj.weight",
             "blocks.0.ff_proj.weight": "layers.0.mlp.gate_proj.weight",
             "blocks.1.attn_out.weight": "layers.1.self_attn.o_proj.weight"}
    for new, old in pairs.items():
        np.testing.assert_array_equal(found[f"model.transformer.{new}"], llama[f"model.{old}"])
    np.testing.assert_array_equal(found["model.transformer.ff_out.weight"], llama["lm_head.weight"])
    assert len(found) == len(llama)


def test_llada2_in_numpy_gives_what_is_stored():
    found = families.case("llada2_moe")
    masks = {"block": families.block_causal(), "full": np.ones((families.S, families.S), bool)}
    for key, seen in masks.items():
        logits = families.llada2(families.weights("llada2_moe"), families.config("llada2_moe"), found["ids"][1], seen)
        np.testing.assert_allclose(logits, found[key][1], atol=1e-6)
    assert np.abs(found["block"] - found["full"]).max() > 1


@pytest.mark.parametrize("name", ["llama_tied", "qwen2"])
def test_gguf(name, tmp_path):
    """Names, numbers and the order of the rows of queries and keys, through the reader of the package gguf."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(families.write_gguf(name, tmp_path / "model.gguf"))
    made, arch = families.config(name), name.split("_")[0]
    wanted = {"block_count": made["num_hidden_layers"], "embedding_length": made["hidden_size"],
              "attention.head_count_kv": made["num_key_value_heads"],
              "rope.freq_base": made["rope_parameters"]["rope_theta"]}
    assert reader.fields["general.architecture"].contents() == arch
    assert {key: reader.fields[f"{arch}.{key}"].contents() for key in wanted} == wanted
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert ("output.weight" in tensors) == (not made["tie_word_embeddings"])
    for key, value in families.weights(name).items():
        stored = tensors.pop(families.gguf_name(key))
        if name == "llama_tied" and key.endswith(("q_proj.weight", "k_proj.weight")):
            heads = value.reshape(4, 8, 32)
            value = heads[:, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(32, 32)
        np.testing.assert_array_equal(stored, value)
    assert not tensors


def fresh(folder):
    """Logits of transformers (pip install 'hdlm_jax[interop-test]'; not in CI) for a folder."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5")
    return families.original(folder)


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True], ids=["config of 5", "config of 4"])
@pytest.mark.parametrize("name", families.SETTINGS)
def test_the_original_still_gives_what_is_stored(name, old, tmp_path):
    found = fresh(families.write_folder(name, tmp_path, shards=2, old=old))
    for key, logits in found.items():
        np.testing.assert_allclose(logits, families.case(name)[key], atol=1e-4)


@pytest.mark.slow
def test_the_original_of_llada2(tmp_path):
    """GLM-4-MoE of transformers is LLaDA2-MoE under other names, with queries, keys and values apart."""
    made, glm = families.config("llada2_moe"), {}
    split = np.cumsum([made["num_attention_heads"], made["num_key_value_heads"]]) * made["head_dim"]
    for key, value in families.weights("llada2_moe").items():
        for new, old in {"embed_tokens": "word_embeddings", "self_attn.o_proj": "attention.dense",
                         "self_attn.q_norm": "attention.query_layernorm", "self_attn.k_norm": "attention.key_layernorm",
                         "e_score_correction_bias": "expert_bias"}.items():
            key = key.replace(old, new)
        names = [key.replace("attention.query_key_value", f"self_attn.{n}_proj") for n in "qkv"]
        glm |= zip(names, map(np.ascontiguousarray, np.split(value, split)), strict=True) if names[0] != key else {
            key: value}
    made |= {"model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"], "n_shared_experts": 1,
             "n_routed_experts": made["num_experts"], "num_nextn_predict_layers": 0}
    found = fresh(families.write(tmp_path, made, glm))
    np.testing.assert_allclose(found["full"], families.case("llada2_moe")["full"], atol=1e-4)
