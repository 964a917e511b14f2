"""GPT-2: equal to a twin in numpy and to logits of the original, from every layout of files; and what it refuses."""
import json
import re

import hub
import jax
import ml_dtypes
import numpy as np
import pytest

from hdlm_jax.models import gpt2
from hdlm_jax.models.weight_files import hub_sha256

IDS = np.arange(12) * 5 % 53
# logits of transformers 5.23.0 (GPT2LMHeadModel, torch 2.13.0, CPU) for hub.weights() and IDS: positions 0, 5, 11 and
# words 0, 17, 52
FROZEN = [[-0.3133768141269684, 0.5228009223937988, -1.818555235862732],
          [-0.4863135516643524, -1.7794114351272583, -0.5953062772750854],
          [-0.15784324705600739, -1.7571322917938232, -1.5436005592346191]]


def logits(folder, ids=IDS, dtype="float32"):
    network, params = gpt2.load(str(folder), dtype)
    return np.asarray(network.apply({"params": params}, np.atleast_2d(ids)))


def test_equals_the_twin_and_frozen_logits_of_the_original(tmp_path):
    tensors = hub.weights()
    found = logits(hub.write(tmp_path, tensors), np.stack([IDS, IDS[::-1]]))
    np.testing.assert_allclose(found[0][[0, 5, 11]][:, [0, 17, 52]], FROZEN, atol=2e-5)
    for row, ids in zip(found, (IDS, IDS[::-1]), strict=True):
        np.testing.assert_allclose(row, hub.twin(tensors, ids)[0], atol=2e-5)


def test_all_layouts_of_files_are_the_same_model(tmp_path):
    tensors = hub.weights()
    plain = {name.removeprefix("transformer."): a for name, a in tensors.items()}
    masks = {"transformer.h.0.attn.bias": np.ones((1, 1, 12, 12), np.float32),
             "transformer.h.1.attn.masked_bias": np.float32(-1e4)[None]}
    head = {"lm_head.weight": tensors["transformer.wte.weight"]}
    wanted = logits(hub.write(tmp_path / "a", tensors))
    for name, layout, shards in [("b", plain, 1), ("c", tensors | masks | head, 1), ("d", tensors, 3)]:
        np.testing.assert_array_equal(logits(hub.write(tmp_path / name, layout, shards=shards)), wanted)
    assert hub_sha256(str(tmp_path / "a")) != hub_sha256(str(tmp_path / "d"))
    half = {name: a.astype(np.float16) for name, a in tensors.items()}
    again = {name: a.astype(np.float32) for name, a in half.items()}
    np.testing.assert_array_equal(logits(hub.write(tmp_path / "e", half)), logits(hub.write(tmp_path / "f", again)))


def test_an_inner_width_of_its_own(tmp_path):
    config = hub.CONFIG | {"n_inner": 24, "n_layer": 1}
    tensors = hub.weights(config, seed=1)
    found = logits(hub.write(tmp_path, tensors, config))[0]
    np.testing.assert_allclose(found, hub.twin(tensors, IDS, config)[0], atol=2e-5)


def test_bfloat16_is_close_and_kept_small(tmp_path):
    hub.write(tmp_path, hub.weights())
    exact, found = logits(tmp_path), logits(tmp_path, dtype="bfloat16")
    assert found.dtype == np.float32 and 1e-3 < np.abs(found - exact).max() < 0.3
    params = gpt2.load(str(tmp_path), "bfloat16")[1]
    kinds = {np.ndim(a) - ("stack" in jax.tree_util.keystr(path)): a.dtype
             for path, a in jax.tree.leaves_with_path(params)}
    assert kinds == {2: ml_dtypes.bfloat16, 1: np.float32}
    rounded = {name: a.astype(ml_dtypes.bfloat16) for name, a in hub.weights().items()}
    hub.write(tmp_path / "stored", rounded)  # files in bfloat16 load in either type
    again = {name: a.astype(np.float32) for name, a in rounded.items()}
    np.testing.assert_allclose(logits(tmp_path / "stored")[0], hub.twin(again, IDS)[0], atol=2e-5)


@pytest.mark.parametrize("chunk", [0, 1, 4, 11, 50])
def test_score_is_the_nats_of_the_next_word(tmp_path, chunk):
    tensors = hub.weights()
    network, params = gpt2.load(str(hub.write(tmp_path, tensors)))
    ids = np.stack([IDS, IDS[::-1]])
    nats, hidden = network.apply({"params": params}, ids, chunk, method="score")
    assert nats.shape == (2, 11) and nats.dtype == np.float32
    for row in range(2):
        wanted, states = hub.twin(tensors, ids[row])
        wanted = -hub.log_probs(wanted)[np.arange(11), ids[row, 1:]]
        np.testing.assert_allclose(nats[row], wanted, atol=2e-5)
        np.testing.assert_allclose(hidden[row], states, atol=2e-5)


def test_nothing_looks_ahead(tmp_path):
    hub.write(tmp_path, hub.weights())
    other = IDS.copy()
    other[7:] = 3
    first, second = logits(tmp_path), logits(tmp_path, other)
    np.testing.assert_array_equal(first[:, :7], second[:, :7])
    assert np.abs(first[:, 7:] - second[:, 7:]).max() > 0.1
    np.testing.assert_allclose(logits(tmp_path, IDS[:5])[0], first[0, :5], atol=2e-5)


def test_published_numbers_of_parameters():
    for width, blocks, heads, count in [(768, 12, 12, 124_439_808), (1024, 24, 16, 354_823_168),
                                        (1280, 36, 20, 774_030_080), (1600, 48, 25, 1_557_611_200)]:
        assert gpt2.num_params(gpt2.Sizes(50257, 1024, width, blocks, heads, 4 * width)) == count


@pytest.mark.parametrize("change, message", [
    ({"model_type": "llama"}, "model_type='llama': must be 'gpt2'"),
    ({"activation_function": "gelu"}, "activation_function='gelu': must be 'gelu_new' or"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings=False: must be True"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True: must be False"),
    ({"n_layer": None}, "n_layer=None: must be a positive integer"),
    ({"n_head": 3}, "n_head=3: must divide n_embd=16"),
    ({"n_layer": 3}, "12 tensors missing: h.2.ln_1.weight, h.2.ln_1.bias, .* and 7 more"),
    ({"n_layer": 1}, "12 tensors unexpected: h.1.attn.c_attn.bias, .* and 7 more"),
    ({"vocab_size": 54}, r"1 tensors of another shape: wte.weight \(53, 16\) in place of \(54, 16\)"),
])
def test_a_config_that_does_not_fit_is_refused(tmp_path, change, message):
    hub.write(tmp_path, hub.weights(), hub.CONFIG | change)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}.*{message}"):
        gpt2.check(str(tmp_path))


def test_files_that_do_not_fit_are_refused(tmp_path):
    def refused(message, folder=tmp_path, **how):
        with pytest.raises(ValueError, match=message) as error:
            gpt2.load(str(folder), **how)
        assert "\n" not in str(error.value)

    tensors = hub.weights()
    refused("nowhere/config.json: cannot be read", tmp_path / "nowhere")
    hub.write(tmp_path, tensors)
    hub.write(tmp_path, tensors | {"transformer.wte.weight": np.zeros((16, 53), np.float32)})
    refused(r"wte.weight \(16, 53\) in place of \(53, 16\)")
    hub.write(tmp_path, tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1})
    refused("lm_head.weight is not wte.weight")
    hub.write(tmp_path, tensors | {"wte.weight": tensors["transformer.wte.weight"]})
    refused("'.*wte.weight' is there twice")
    (tmp_path / "model.safetensors").write_bytes(b"nonsense" * 9)
    refused("model.safetensors: no safetensors file, or damaged")
    (tmp_path / "model.safetensors").unlink()
    refused("neither model.safetensors nor model.safetensors.index.json is there")
    hub.write(tmp_path, tensors, shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused("model-00002-of-00002.safetensors: a shard that model.safetensors.index.json names is missing")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    refused("has no weight_map")
    (tmp_path / "config.json").write_text("[1]")
    refused("config.json: damaged, it must hold a JSON object")


@pytest.mark.parametrize("shards", [1, 3])
def test_the_original_agrees(tmp_path, shards):
    """Beside GPT2LMHeadModel (pip install 'hdlm_jax[interop-test]'; not in CI): random weights as it saves them."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=97, n_positions=24, n_embd=32, n_layer=3, n_head=4, bos_token_id=0,
                                     eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.3
    model.save_pretrained(tmp_path / "saved", max_shard_size="60KB" if shards > 1 else "1GB")
    assert len(list((tmp_path / "saved").glob("model*.safetensors"))) >= shards
    ids = np.random.default_rng(0).integers(0, 97, (2, 24))
    with torch.no_grad():
        wanted = model(torch.tensor(ids)).logits.numpy()
        original = transformers.GPT2LMHeadModel.from_pretrained(hub.write(tmp_path / "frozen", hub.weights())).eval()
        frozen = original(torch.tensor(IDS)[None]).logits.numpy()[0]
    np.testing.assert_allclose(logits(tmp_path / "saved", ids), wanted, atol=1e-4)
    np.testing.assert_allclose(frozen[[0, 5, 11]][:, [0, 17, 52]], FROZEN, atol=1e-5)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "gpt2"
