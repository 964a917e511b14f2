"""hdlm_jax/data/tokenizers.py: tokenizers give the text back (BERT's what it keeps), are saved, and fail clearly."""
import base64
import functools
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hdlm_jax.data import tokenizers
from hdlm_jax.data.embedded import embedded_corpus

EOT = tokenizers.END_OF_TEXT


@functools.cache
def bpe(size: int = 1024) -> tokenizers.Tokenizer:
    documents = embedded_corpus()[0][:120]
    return tokenizers.make_tokenizer("bpe", size, (document.text for document in documents))


@functools.cache
def plain() -> tokenizers.Tokenizer:
    return tokenizers.make_tokenizer("bytes")


# A vocabulary like BERT's: words in brackets anywhere, lower-case words, pieces, every letter alone and as a piece.
LETTERS = "abcdefghijklmnopqrstuvwxyz"
BERT = ["[PAD]", *LETTERS, "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "un", "##aff", "##able", "hello", "world", "sep",
        ",", ".", "'", "[", "]", *("##" + letter for letter in LETTERS), "中"]


@functools.cache
def bert() -> tokenizers.Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vocab.txt")
        path.write_text("\n".join(BERT) + "\n", encoding="utf-8")
        return tokenizers.make_tokenizer("bert", file=str(path))


@pytest.mark.parametrize("make", [bpe, plain])
@settings(max_examples=150)
@given(text=st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\t\x00 a'"))))
@example(text="\x00\x00")
@example(text=f"a{EOT}b {EOT}{EOT}")
@example(text="e\u0301 é 👩‍👩‍👧 \U0010ffff \ufeff\u2028\x85\x1c don't  \r\n\n ")
@example(text=" " * 9000)
def test_decode_gives_the_text_back(make, text):
    tokenizer = make()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes(token) for token in ids) == text.encode()
    assert ((ids >= 0) & (ids < tokenizer.eot)).all()  # raw text never makes the end of text


def test_end_of_text_is_the_last_id():
    for tokenizer in (bpe(), plain()):
        assert tokenizer.eot == tokenizer.vocab_size - 1
        assert tokenizer.token_bytes(tokenizer.eot) == EOT.encode()
        assert tokenizer.decode([tokenizer.eot]) == EOT
        assert tokenizer.decode([]) == ""
        for wrong in (-1, tokenizer.vocab_size):
            with pytest.raises(ValueError, match=f"token id is {wrong}; must be in 0..{tokenizer.eot}"):
                tokenizer.token_bytes(wrong)
    assert plain().vocab_size == 257 and plain().encode("é").tolist() == [0xC3, 0xA9]
    assert plain().decode([0xC3, 0x41]) == "\ufffdA"


def test_batch_equals_one_by_one():
    texts = [document.text for document in embedded_corpus()[0][:40]] + ["", EOT, "[SEP]"]
    for tokenizer in (bpe(), plain(), bert()):
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_lone_surrogates_are_refused():
    for tokenizer in (bpe(), plain(), bert()):
        with pytest.raises(ValueError, match="text is not Unicode: lone surrogate at character 1"):
            tokenizer.encode("a\ud800")


@pytest.mark.parametrize("piece", [" ", "\n", "a", "!", "é\x00", " x"])
def test_very_long_runs(piece):
    """A million blanks make the regex engine give up; they are cut before it sees them."""
    text = piece * 1_000_000 + "end"
    raw = b"".join(map(bpe()._words.__getitem__, bpe().encode(text).tolist()))
    assert raw == text.encode()
    small = tokenizers.make_tokenizer("bpe", 260, [text])
    assert small.decode(small.encode(text[-5000:])) == text[-5000:]


# --------------------------------------------------------------------------------------------------- training


def test_bpe_has_the_size_asked_and_is_reproducible():
    import rustbpe
    texts = [document.text for document in embedded_corpus()[0][:120]]
    assert bpe().vocab_size == 1024
    again = tokenizers.make_tokenizer("bpe", 1024, iter(texts))
    assert again.fingerprint == bpe().fingerprint and again._words == bpe()._words
    assert tokenizers.make_tokenizer("bpe", 1023, texts).fingerprint != bpe().fingerprint
    trainer = rustbpe.Tokenizer()  # our encoding is the trainer's own
    trainer.train_from_iterator(iter(texts), 1023, pattern=tokenizers.PATTERN)
    assert trainer.encode(texts[7]) == bpe().encode(texts[7]).tolist()
    assert len(bpe().encode(texts[7])) < 0.6 * len(texts[7].encode())
    assert all(bpe().token_bytes(byte) == bytes([byte]) for byte in range(256))


def test_bpe_sizes_at_the_edges():
    assert tokenizers.make_tokenizer("bpe", 257, ["hello hello"]).vocab_size == 257
    few = tokenizers.make_tokenizer("bpe", 5000, ["hello hello"])
    assert 257 < few.vocab_size < 300 and few.decode(few.encode("hello there")) == "hello there"
    assert tokenizers.make_tokenizer("bpe", 5000, []).vocab_size == 257
    with pytest.raises(ValueError, match="needs documents"):
        tokenizers.make_tokenizer("bpe", 300)

    def failing():
        yield "abc"
        raise ValueError("file.txt: broken")

    with pytest.raises(ValueError, match="file.txt: broken"):
        tokenizers.make_tokenizer("bpe", 300, failing())


# ------------------------------------------------------------------------------------------- saved and loaded


@pytest.mark.parametrize("make", [bpe, plain, bert])
def test_saved_and_loaded(tmp_path, make):
    tokenizer = make()
    tokenizer.save(tmp_path / "t")
    back = tokenizers.load_tokenizer(tmp_path / "t")
    for name in ("kind", "vocab_size", "eot", "fingerprint", "_words"):
        assert getattr(back, name) == getattr(tokenizer, name)
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == [tokenizers.JSON_FILE, tokenizers.RANK_FILE]
    facts = json.loads((tmp_path / "t" / tokenizers.JSON_FILE).read_text())
    raw = (tmp_path / "t" / tokenizers.RANK_FILE).read_bytes()
    assert facts["sha256"] == hashlib.sha256(raw).hexdigest()
    np.testing.assert_array_equal(back.encode("Hello, unaffable"), tokenizer.encode("Hello, unaffable"))
    if make is bert:
        return
    # the rank file alone is enough, here or in tiktoken
    again = tokenizers.make_tokenizer("bpe", file=str(tmp_path / "t" / tokenizers.RANK_FILE), sha256=facts["sha256"])
    assert again.encode("hello").tolist() == tokenizer.encode("hello").tolist()


def test_fingerprint_is_of_words_in_order_and_pattern():
    words = list(bpe()._words)
    swapped = [*words[:-2], words[-1], words[-2]]
    kinds = {tokenizers.Tokenizer("bpe", words).fingerprint, tokenizers.Tokenizer("bpe", swapped).fingerprint,
             tokenizers.Tokenizer("bpe", words[:256]).fingerprint, plain().fingerprint}
    assert len(kinds) == 4
    assert tokenizers.Tokenizer("gpt2", words).fingerprint == bpe().fingerprint  # same ids, same tokenizer


def test_damaged_or_missing_files(tmp_path):
    with pytest.raises(ValueError, match=f"no tokenizer in {tmp_path}: tokenizer.json is missing"):
        tokenizers.load_tokenizer(tmp_path)
    bpe().save(tmp_path)
    ranks = tmp_path / tokenizers.RANK_FILE
    ranks.write_bytes(ranks.read_bytes()[:-1])
    with pytest.raises(ValueError, match="tokenizer.tiktoken: sha256 is [0-9a-f]{64}, must be"):
        tokenizers.load_tokenizer(tmp_path)


@pytest.mark.parametrize("change, message", [
    (lambda lines: [*lines, b"=== x"], r":301: must be '<base64> <rank>'"),
    (lambda lines: [*lines, b"YWJj"], r":301: must be '<base64> <rank>'"),
    (lambda lines: lines[:-2] + lines[-1:], "ranks must be 0..n-1"),
    (lambda lines: [*lines, lines[5]], "ranks must be 0..n-1"),
    (lambda lines: [*lines, lines[5].split()[0] + b" 300"], "with a word of its own"),
    (lambda lines: lines[:200], "56 are missing"),
])
def test_malformed_rank_files(tmp_path, change, message):
    bpe().save(tmp_path)
    lines = (tmp_path / tokenizers.RANK_FILE).read_bytes().splitlines()[:300]
    (tmp_path / "ranks.tiktoken").write_bytes(b"\n".join(change(lines)) + b"\n")
    with pytest.raises(ValueError, match=message):
        tokenizers.make_tokenizer("bpe", file=str(tmp_path / "ranks.tiktoken"))
    with pytest.raises(ValueError, match="tokenizer.file .*nothing.* cannot be read: No such file"):
        tokenizers.make_tokenizer("bpe", file=str(tmp_path / "nothing"))


# ------------------------------------------------------------------------------------------- patterns, rank files

MERGES = [b"ab", b"12", b"123", b"1234", b"\n ", b"\n  ", b"  ", b" a", b"(a", b"!\n", b"'s", b"'S", b"aB", b"a'",
          b"\n/"]
CUT_APART = "ab 1234 (a 'S it's aB ?\n/!\n a'b \n  \n  "  # differently by every pattern


def rank_file(path: Path, words=MERGES, size=0) -> str:
    """All bytes, then `words`, then made-up ones up to `size`."""
    every = [*(bytes([byte]) for byte in range(256)), *words]
    every += [b"\xff%d" % i for i in range(size - len(every))]
    path.write_bytes(b"".join(base64.b64encode(word) + b" %d\n" % rank for rank, word in enumerate(every)))
    return str(path)


@functools.cache
def published() -> dict[str, str]:
    """tiktoken's own patterns (without their rank files, which it would fetch), and those of Qwen and Llama 3."""
    from unittest import mock

    from tiktoken_ext import openai_public
    with mock.patch.object(openai_public, "load_tiktoken_bpe", lambda *_, **__: {}):
        found = {"cl100k": openai_public.cl100k_base()["pat_str"], "o200k": openai_public.o200k_base()["pat_str"]}
    older = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
             r"\s+(?!\S)|\s+")
    return found | {"gpt2": openai_public.r50k_pat_str, "qwen2": older.replace("DIGITS", ""),
                    "llama3": older.replace("DIGITS", "{1,3}")}


@settings(max_examples=60)
@given(text=st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\r\t a'sSllRE1234ABé(/.!"))))
@example(text=CUT_APART)
@example(text="I'LL 12345 HTMLParser \r\n\n  x\n  ")
def test_patterns_cut_as_published(text):
    import regex
    assert set(tokenizers.PATTERNS) == set(published())
    for name, pattern in published().items():
        assert regex.findall(tokenizers.PATTERNS[name], text) == regex.findall(pattern, text), name


def test_a_pattern_decides_the_ids(tmp_path):
    """Those of tiktoken with the same ranks and pattern; saved, loaded and told by the fingerprint."""
    import tiktoken
    file = rank_file(tmp_path / "a.tiktoken")
    ranks = {word: rank for rank, word in enumerate(tokenizers.read_ranks(file))}
    found = {}
    for name in ("", *tokenizers.PATTERNS, r"\S+|\s+"):
        made = tokenizers.make_tokenizer("bpe", file=file, pattern=name)
        theirs = tiktoken.Encoding("x", pat_str=published().get(name or "gpt2", name), mergeable_ranks=ranks,
                                   special_tokens={})
        found[name] = made.encode(CUT_APART).tolist()
        assert found[name] == theirs.encode(CUT_APART) and made.decode(found[name]) == CUT_APART
        made.save(tmp_path / "t")
        back = tokenizers.load_tokenizer(tmp_path / "t")
        assert back.fingerprint == made.fingerprint and back.encode(CUT_APART).tolist() == found[name]
        assert made.encode("A" * 1_000_000 + " " * 9000).size > 0
    assert found[""] == found["gpt2"] and len(set(map(tuple, found.values()))) == 6
    prints = {name: tokenizers.make_tokenizer("bpe", file=file, pattern=name).fingerprint for name in found}
    assert prints[""] == prints["gpt2"] == tokenizers.Tokenizer("bpe", list(ranks)).fingerprint
    assert len(set(prints.values())) == 6
    trained = [tokenizers.make_tokenizer("bpe", 300, ["1234 " * 50], pattern=name) for name in ("", "qwen2")]
    assert [any(len(word) > 1 and word.isdigit() for word in made._words) for made in trained] == [True, False]


def test_tokenizers_saved_before_patterns(tmp_path):
    """What they wrote (GPT-2's pattern) loads to the same fingerprint."""
    words = [*(bytes([byte]) for byte in range(256)), *MERGES]
    before = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    state = hashlib.sha256(before.encode())
    for word in words:
        state.update(len(word).to_bytes(4, "big") + word)
    raw = Path(rank_file(tmp_path / tokenizers.RANK_FILE)).read_bytes()
    (tmp_path / tokenizers.JSON_FILE).write_text(json.dumps(
        {"kind": "bpe", "vocab_size": len(words) + 1, "eot": len(words), "pattern": before,
         "sha256": hashlib.sha256(raw).hexdigest(), "fingerprint": state.hexdigest()}))
    assert tokenizers.load_tokenizer(tmp_path).fingerprint == state.hexdigest()


@pytest.mark.parametrize("size, whose, pattern", [
    (100_256, "cl100k_base", "cl100k"), (199_998, "o200k_base", "o200k"), (151_643, "Qwen", "qwen2"),
    (128_000, "Llama 3", "llama3")])
def test_rank_files_of_other_vocabularies(tmp_path, size, whose, pattern):
    file = rank_file(tmp_path / "a.tiktoken", size=size)
    with pytest.raises(ValueError, match=f"{size:,} ranks are those of {whose}, .* give tokenizer.pattern='{pattern}', "
                                         "or 'gpt2' if these are others") as error:
        tokenizers.make_tokenizer("bpe", file=file)
    assert "\n" not in str(error.value)
    made = tokenizers.make_tokenizer("bpe", file=file, pattern=pattern)
    assert (made.vocab_size, made.pattern) == (size + 1, tokenizers.PATTERNS[pattern])
    assert tokenizers.make_tokenizer("bpe", file=file, pattern="gpt2").pattern == tokenizers.PATTERN


def test_special_tokens_are_no_ranks(tmp_path):
    """With this pattern text would encode to the rank, and V would count two ends of text."""
    for special in (EOT, "<|im_start|>"):
        file = rank_file(tmp_path / "a.tiktoken", [*MERGES, special.encode()])
        for kind in ("bpe", "gpt2"):
            with pytest.raises(ValueError, match=f"rank {256 + len(MERGES)} is the special token .*, which no text"):
                tokenizers.make_tokenizer(kind, file=file, pattern=r"\S+|\s+")
    near = [b"<|", b"|>", b"<| |>", b"<||>", b"a<|b|>"]
    assert tokenizers.make_tokenizer("bpe", file=rank_file(tmp_path / "b.tiktoken", near)).vocab_size == 262


@pytest.mark.parametrize("pattern, message", [
    ("cl100", r"tokenizer.pattern='cl100': choose of gpt2, cl100k, llama3, qwen2, o200k, or give a regular expression"),
    ("(", r"tokenizer.pattern='\(': no regular expression \(.*parenthesis"),
    ("((a{1000}){1000}){1000}|[\\s\\S]", r"no regular expression \(.*error building NFA"),
    ("(" * 2000 + "a" + ")" * 2000 + "|[\\s\\S]", r"no regular expression \(|has 4,00\d characters"),
    ("|".join("a" * 3000), "tokenizer.pattern has 5,999 characters: must be at most 4,096"),
    (r"(?:a|a)*+(?!x)|[\s\S]", r"text cannot be cut by it \(does it match the empty text\?\)"),
    (r"\p{L}+|\s+", r"tokenizer.pattern=.*: leaves out \d+ of \d+ bytes of a text; every character must be in a piece"),
])
def test_patterns_that_cannot_be(tmp_path, pattern, message):
    with pytest.raises(ValueError, match=message) as error:
        tokenizers.make_tokenizer("bpe", file=rank_file(tmp_path / "a.tiktoken"), pattern=pattern)
    assert "\n" not in str(error.value)


def test_a_pattern_that_leaves_out_a_rare_character(tmp_path):
    made = tokenizers.make_tokenizer("bpe", file=rank_file(tmp_path / "a.tiktoken"), pattern=r"[^\x{e000}]")
    assert made.decode(made.encode("fine")) == "fine"
    with pytest.raises(ValueError, match="leaves out 3 of 5 bytes"):
        made.encode("a\ue000b")


# ------------------------------------------------------------------------------------------------------ GPT-2


def test_gpt2_without_a_network_says_what_to_do(tmp_path, monkeypatch):
    import tiktoken.load
    import tiktoken.registry

    def no_network(*_):
        raise OSError("no route to host")

    monkeypatch.setattr(tiktoken.load, "read_file", no_network)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    advice = r"could not be fetched \(OSError\).*TIKTOKEN_CACHE_DIR.*tokenizer.file"
    with pytest.raises(ValueError, match=advice) as error:
        tokenizers.make_tokenizer("gpt2")
    assert "\n" not in str(error.value)


def test_gpt2_from_cache_and_from_rank_file(tmp_path, monkeypatch, data_dir):
    import tiktoken.registry
    cache = data_dir / "tiktoken_cache"
    if not cache.is_dir():
        pytest.skip("no tiktoken_cache in the local data")
    shutil.copytree(cache, tmp_path / "cache", copy_function=shutil.copyfile)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    cached = tokenizers.make_tokenizer("gpt2")
    assert (cached.vocab_size, cached.eot) == (50257, 50256)
    assert cached.encode("hello world").tolist() == [31373, 995]
    assert cached.encode(EOT).tolist() == tiktoken.get_encoding("gpt2").encode_ordinary(EOT)

    ranks = tmp_path / "cache" / "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4"
    before = sorted(path.name for path in (tmp_path / "cache").iterdir())
    monkeypatch.setenv("SOME_DIR", str(ranks.parent))
    sha256 = hashlib.sha256(ranks.read_bytes()).hexdigest()
    local = tokenizers.make_tokenizer("gpt2", file=f"$SOME_DIR/{ranks.name}", sha256=sha256)
    assert local.fingerprint == cached.fingerprint
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == before  # nothing written there
    text = "".join(document.text for document in embedded_corpus()[0][:20])
    assert local.encode(text).tolist() == tiktoken.get_encoding("gpt2").encode_ordinary(text)
    assert local.decode(local.encode(text)) == text
    with pytest.raises(ValueError, match="sha256 is .*, must be 00"):
        tokenizers.make_tokenizer("gpt2", file=str(ranks), sha256="00")
    short = tmp_path / "short.tiktoken"
    short.write_bytes(b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)))
    with pytest.raises(ValueError, match="256 words, GPT-2 has 50256"):
        tokenizers.make_tokenizer("gpt2", file=str(short))


# ------------------------------------------------------------------------------------------------------- BERT


@pytest.mark.parametrize("text, pieces, back", [
    ("Hello, world.", "hello , world .", "hello , world ."),
    ("unaffable", "un ##aff ##able", "unaffable"),
    ("Héllo\tWORLD\x00\n", "hello world", "hello world"),  # case, accents, control characters
    ("the [SEP] [UNK] sep", "the [ sep ] [ un ##k ] sep", "the [ sep ] [ unk ] sep"),
    ("1 ☃ the", "[UNK] [UNK] the", "[UNK] [UNK] the"),
    ("中中the", "中 中 the", "中 中 the"),  # a Chinese character is a word
    ("a" * 100 + " " + "a" * 101, " ".join(["a"] + ["##a"] * 99 + ["[UNK]"]), "a" * 100 + " [UNK]"),
    ("", "", ""),
])
def test_bert_pieces(text, pieces, back):
    ids = bert().encode(text)
    assert ids.dtype == np.int32 and [BERT[token] for token in ids] == pieces.split()
    assert bert().decode(ids) == back


def test_bert_vocabulary():
    assert (bert().kind, bert().vocab_size, bert().eot) == ("bert", len(BERT), BERT.index("[SEP]"))
    assert bert().decode([BERT.index("hello"), bert().eot, 1]) == "hello [SEP] a"
    assert [bert().token_bytes(token).decode() for token in range(bert().vocab_size)] == BERT
    with pytest.raises(ValueError, match=f"token id is {len(BERT)}; must be in 0..{len(BERT) - 1}"):
        bert().decode([len(BERT)])


@settings(max_examples=80)
@given(text=st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("abc [SEP]##'"))))
def test_bert_encodes_no_text_to_the_end_of_text(text):
    ids = bert().encode(text)
    assert bert().eot not in ids.tolist() and ((ids >= 0) & (ids < bert().vocab_size)).all()
    if BERT.index("[UNK]") not in ids:  # what it keeps, it keeps
        np.testing.assert_array_equal(bert().encode(bert().decode(ids)), ids)


def test_bert_fingerprint_is_of_kind_and_order(tmp_path):
    prints = {bert().fingerprint}
    for i, words in enumerate([BERT[::-1], BERT[:-1], BERT]):
        (tmp_path / str(i)).write_text("\r\n".join(words), encoding="utf-8")  # line ends do not count
        prints.add(tokenizers.make_tokenizer("bert", file=str(tmp_path / str(i))).fingerprint)
    assert len(prints) == 3
    assert tokenizers.Tokenizer("bpe", [word.encode() for word in BERT]).fingerprint not in prints


@pytest.mark.parametrize("raw, message", [
    (b"[UNK]\nthe\n", r"no word \[SEP\]"),
    (b"[SEP]\nthe\n", r"no word \[UNK\]"),
    (b"[UNK]\nthe\n[SEP]\nthe\n", r"vocab.txt:4: must be a word of its own, is line 2 again"),
    (b"[UNK]\n\n[SEP]\n", r"vocab.txt:2: must be a word of its own, is empty"),
    (b"[UNK]\n[SEP]\n\xff\n", r"vocab.txt:3: not valid UTF-8"),
])
def test_bert_files_that_are_no_vocabulary(tmp_path, raw, message):
    (tmp_path / "vocab.txt").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        tokenizers.make_tokenizer("bert", file=str(tmp_path / "vocab.txt"))


def test_bert_without_file_or_package(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="tokenizer.file .*nothing' cannot be read: No such file"):
        tokenizers.make_tokenizer("bert", file=str(tmp_path / "nothing"))
    (tmp_path / "vocab.txt").write_text("[UNK]\n[SEP]\n")
    with pytest.raises(ValueError, match="sha256 is .*, must be 00"):
        tokenizers.make_tokenizer("bert", file=str(tmp_path / "vocab.txt"), sha256="00")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"needs the tokenizers package: pip install 'hdlm_jax\[bert\]'"):
        tokenizers.make_tokenizer("bert", file=str(tmp_path / "vocab.txt"))
