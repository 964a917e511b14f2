"""Open checkpoints in and out: every family's folder through import, load and export; what is refused, in one line."""
import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import families
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenfiles
from safetensors import safe_open

from hdlm_jax.config import Config, recipes, resolve
from hdlm_jax.runs import export as export_lib
from hdlm_jax.runs import import_weights
from hdlm_jax.training import of_run
from hdlm_jax.training.loading import load_here

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
    added = [{"id": words.index(name), "content": name, "special": True, "normalized": False}
             for name in ("<|endoftext|>", "<s>")]
    return tokenfiles.byte_level((), added_tokens=added, pre_tokenizer={
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
    assert dataclasses.replace(again.config, released=run.config.released) == run.config
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
    run = load_here(str(imported(folder(tmp_path / "hub", "llama"), tmp_path / "run", mask_id=inside, logits="shifted")))
    assert not run.process.exact and run.network.shift
    found = logits(run)
    assert (found[:, inside] < -1e5).all() and (np.delete(found, inside, 1) > -100).all()
    np.testing.assert_array_equal(np.asarray(run.params["states"])[0],
                                  families.weights("llama")["model.embed_tokens.weight"][inside])
    full = families.case("llama")["full"][0][:, :TOKENS]
    np.testing.assert_allclose(np.delete(found, inside, 1)[1:], np.delete(full, inside, 1)[:-1], atol=1e-4)
    assert json.loads((exported(tmp_path / "run") / "config.json").read_text())["mask_token_id"] == inside
    assert stored(tmp_path / "run" / "hub") == stored(tmp_path / "hub")
