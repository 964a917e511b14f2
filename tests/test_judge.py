"""Judged samples: every token counted once and by the right rule, nothing sampled twice, the record complete."""
import dataclasses
import json
import math
import shutil
import sys
import types

import families
import hub
import jax
import numpy as np
import pytest
import tokenfiles
from tiny import SEQ_LEN, model, read_recipe, trained

import hdlm_jax
from hdlm_jax.common import parallel
from hdlm_jax.config import ConfigError, GenerateConfig, ParallelConfig, recipe
from hdlm_jax.config import resolve as config_of
from hdlm_jax.data.tokenizers import Tokenizer, make_tokenizer
from hdlm_jax.decoding import sampler as sampling
from hdlm_jax.evaluation import judges, text_statistics
from hdlm_jax.models.weight_files import hub_sha256
from hdlm_jax.runs import generate, open_weights
from tools import sampling_sweep

CONFIG = hub.CONFIG | {"vocab_size": 257}
P = CONFIG["n_positions"]
BYTES = make_tokenizer("bytes")
GRID = GenerateConfig(steps=6, batch_size=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT-2 of 257 words, the bytes in GPT-2's order."""
    return hub.byte_vocabulary(hub.write(tmp_path_factory.mktemp("gpt2"), hub.weights(CONFIG), CONFIG))


def mesh(devices):
    return parallel.make_mesh(types.SimpleNamespace(parallel=ParallelConfig()), jax.devices()[:devices])


@pytest.fixture(scope="module")
def gpt2_judge(folder):
    return judges.open_judge(str(folder), mesh=mesh(1))


@pytest.fixture
def copied(tmp_path):
    return shutil.copytree(trained()[1], tmp_path / "run")


def config(**settings):
    c = read_recipe(trained()[0])
    return dataclasses.replace(c, generate=dataclasses.replace(c.generate, **settings))


# ------------------------------------------------------------------------------------------------ numbers of texts


def test_statistics_by_hand():
    a, b = np.array([0, 0, 1, 1]), np.array([2, 2, 2, 2])
    found = text_statistics.statistics([a, b])
    assert found["unigram_entropy"] == pytest.approx(math.log(2) / 2)
    assert found["corpus_entropy"] == pytest.approx(0.5 * math.log(4) + 0.5 * math.log(2))  # shares 1/4, 1/4, 1/2
    assert found["distinct_1"] == 3 / 8
    assert found["distinct_2"] == 4 / 6  # 00 01 11, 22 22 22: none across texts
    assert found["distinct_3"] == 3 / 4
    assert found["repetition_4"] == 0
    one = np.array([5, 6, 7, 8, 5, 6, 7, 8])  # 5678 6785 7856 8567 5678
    assert text_statistics.statistics([one])["repetition_4"] == pytest.approx(1 / 5)
    assert text_statistics.statistics([one, a])["repetition_4"] == pytest.approx(1 / 6)
    assert text_statistics.statistics([a, a])["repetition_4"] == 0, "a repetition is of the same text"
    few = text_statistics.statistics([np.array([3, 4]), np.zeros(0, int)])
    assert few["distinct_2"] == 1 and few["distinct_3"] is None and few["repetition_4"] is None
    assert few["unigram_entropy"] == pytest.approx(math.log(2) / 2)
    assert set(text_statistics.statistics([]).values()) == {None}


def test_wilsons_interval():
    stats = pytest.importorskip("scipy.stats")
    for right, n in ((0, 10), (10, 10), (1, 3), (412, 1838)):
        want = stats.binomtest(right, n).proportion_ci(method="wilson")
        assert text_statistics.wilson(right / n, n) == pytest.approx((want.low, want.high), abs=1e-7)
    assert text_statistics.in_percent(0, 10) == "0.0 [0.0, 27.8]"


def test_summary_by_hand():
    found = text_statistics.perplexities(np.array([6.0, 2.0]), np.array([2, 1]))
    assert found["nats_per_token"] == pytest.approx(8 / 3)
    assert found["perplexity"] == pytest.approx(math.exp(8 / 3))
    assert found["nats_per_token_se"] == pytest.approx(4 / 9)  # residuals +-2/3: sqrt(2 x 8/9) / 3
    assert found["perplexity_se"] == pytest.approx(math.exp(8 / 3) * 4 / 9)
    each = math.exp(3), math.exp(2)
    assert found["mean_text_perplexity"] == pytest.approx(sum(each) / 2)
    assert found["mean_text_perplexity_se"] == pytest.approx((each[0] - each[1]) / 2)
    empty = text_statistics.perplexities(np.array([6.0, 0.0]), np.array([2, 0]))
    assert empty["perplexity"] == pytest.approx(math.exp(3)) == empty["mean_text_perplexity"]
    assert empty["nats_per_token_se"] == 0 and empty["mean_text_perplexity_se"] is None
    assert text_statistics.perplexities(np.array([6.0]), np.array([2]))["nats_per_token_se"] is None
    assert set(text_statistics.perplexities(np.zeros(1), np.zeros(1, int)).values()) == {None}
    bound = text_statistics.perplexities(np.array([6.0, 2.0]), np.array([2, 1]), bound=True)
    assert bound == {f"{name}_bound": value for name, value in found.items()}, "and none without the word"


def test_the_standard_error_is_the_spread():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 40, (300, 60))
    nats = tokens * 3 + 6 * rng.standard_normal(tokens.shape)
    found = [text_statistics.perplexities(a, b) for a, b in zip(nats, tokens, strict=True)]
    spread = np.std([f["nats_per_token"] for f in found], ddof=1)
    assert spread == pytest.approx(np.mean([f["nats_per_token_se"] for f in found]), rel=0.12)


# ------------------------------------------------------------------------------------------------ GPT-2 as judge


def by_hand(ids, given=0):
    """(nats, scored tokens): each token but the first given what its piece holds before it, one at a time."""
    nats, count = 0.0, 0
    for i in range(max(1, given), len(ids)):
        start = (i - 1) // (P - 1) * (P - 1)  # pieces overlap in one token
        nats -= hub.log_probs(hub.twin(hub.weights(CONFIG), ids[start : i + 1], CONFIG)[0])[-2, ids[i]]
        count += 1
    return nats, count


def texts_of(*lengths):
    rng = np.random.default_rng(3)
    return [rng.integers(0, 257, n).astype(np.int32) for n in lengths]


def test_gpt2_scores_every_token_but_the_first_once(gpt2_judge):
    texts = texts_of(7, 0, 1, 2, P, P + 1, 2 * P - 1, 2 * P, 3 * P + 4)
    given = [0, 0, 0, 0, 5, 0, P + 2, 0, 0]
    nats, tokens, features = gpt2_judge.score(texts, given)
    wanted = np.array([by_hand(ids, g) for ids, g in zip(texts, given, strict=True)])
    np.testing.assert_array_equal(tokens, wanted[:, 1])
    assert tokens.tolist() == [6, 0, 0, 1, P - 5, P, P - 3, 2 * P - 1, 3 * P + 3]
    np.testing.assert_allclose(nats, wanted[:, 0], rtol=2e-5, atol=1e-4)
    for ids, feature in zip(texts, features, strict=True):
        states = hub.twin(hub.weights(CONFIG), ids[:P], CONFIG)[1] if len(ids) else np.zeros((1, 16))
        np.testing.assert_allclose(feature, states[-1], atol=1e-4)


def test_gpt2_does_not_depend_on_batches_and_devices(folder, gpt2_judge):
    texts = texts_of(*[9] * 5, 2 * P, 3, P)
    wanted = gpt2_judge.score(texts, [0] * 8)
    for devices, some in [(1, slice(2, 7)), (8, slice(0, 8))]:
        other = judges.open_judge(str(folder), mesh=mesh(devices))
        found = other.score(texts[some], [0] * len(texts[some]))
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b[some], rtol=1e-5, atol=1e-5)


def test_texts_are_written_in_the_judge_s_tokens(gpt2_judge):
    theirs = gpt2_judge.tokenizer
    assert theirs.encode("A b").tolist() == [32, 220, 65]
    assert [theirs.decode([i]) for i in (32, 220, 65)] == ["A", " ", "b"]
    ids = np.array([*b"ab", 256, *"é".encode(), 256, 256, 255], np.int32)
    found = judges.retokenise(ids, BYTES, theirs)
    parts = [theirs.encode(t).tolist() for t in ("ab", "é", "", "\ufffd")]
    assert found.tolist() == [*parts[0], 256, *parts[1], 256, *parts[2], 256, *parts[3]]
    record = judges.record(gpt2_judge, BYTES, [np.frombuffer(t, np.uint8).astype(np.int32)
                                              for t in (b"some text", b"another")])
    nats = sum(by_hand(theirs.encode(t))[0] for t in ("some text", "another"))
    assert record["retokenised"] and record["tokens"] == 8 + 6 and record["sampled_tokens"] == 16
    assert record["nats_per_token"] == pytest.approx(nats / 14, rel=1e-5)


@pytest.mark.slow
def test_precision_of_the_judge(folder, gpt2_judge):
    half = judges.open_judge(str(folder), "bfloat16", mesh=mesh(1))
    exact, found = (j.score(texts_of(P), [0])[0][0] for j in (gpt2_judge, half))
    assert found == pytest.approx(exact, rel=0.02) and found != exact
    assert half.identity == gpt2_judge.identity | {"precision": "bfloat16"}


def test_the_same_tokens_are_scored_as_they_are(gpt2_judge):
    texts = [np.array([190, 190, 32], np.int32), np.array([65], np.int32)]  # no text encodes to 190, 190
    record = judges.record(gpt2_judge, gpt2_judge.tokenizer, texts)
    assert not record["retokenised"] and record["tokens"] == 2
    assert record["nats_per_token"] == pytest.approx(by_hand(texts[0])[0] / 2, rel=1e-5)
    assert (record["texts"], record["unscored_texts"], record["empty_texts"]) == (2, 1, 0)


def test_a_prompt_is_context(gpt2_judge):
    texts = [np.frombuffer(t, np.uint8).astype(np.int32) for t in (b"The cat", b"The dog", b"The ")]
    record = judges.record(gpt2_judge, BYTES, texts, given=4)
    ids = [gpt2_judge.tokenizer.encode(t) for t in ("The cat", "The dog")]
    assert (record["tokens"], record["sampled_tokens"], record["prompt_tokens"]) == (6, 6, 4)
    assert (record["empty_texts"], record["unscored_texts"], record["texts"]) == (1, 1, 3)
    assert record["nats_per_token"] == pytest.approx(sum(by_hand(i, 4)[0] for i in ids) / 6, rel=1e-5)
    assert record["corpus_entropy"] == pytest.approx(text_statistics.entropy(np.frombuffer(b"catdog", np.uint8)))


def test_vocabulary_of_a_folder(tmp_path, data_dir, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(data_dir / "tiktoken_cache"))
    real = make_tokenizer("gpt2")
    shutil.copy(data_dir / "tiktoken_cache" / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6", tmp_path / "vocab.json")
    found = judges.folder_tokenizer(str(tmp_path))
    assert (found.kind, found.fingerprint) == ("gpt2", real.fingerprint)
    (tmp_path / "vocab.json").unlink()
    assert judges.folder_tokenizer(str(tmp_path)).fingerprint == real.fingerprint
    assert judges.folder_tokenizer(str(tmp_path), found) is found
    assert judges.folder_tokenizer(str(tmp_path), BYTES).fingerprint == real.fingerprint


def test_what_cannot_judge_is_one_line(tmp_path, folder):
    def refused(message, path, **how):
        with pytest.raises(ConfigError, match=message) as error:
            judges.open_judge(str(path), mesh=mesh(1), **how)
        assert "\n" not in str(error.value)

    refused("generate.judge='.*nowhere': must be a folder with GPT-2's config.json", tmp_path / "nowhere")
    bad = shutil.copytree(folder, tmp_path / "bad")
    vocabulary = json.loads((bad / "vocab.json").read_text())
    for change, message in [({"<|endoftext|>": 300}, "ids must be 0..V-1, and <|endoftext|> the last"),
                            ({"A": 256, "<|endoftext|>": 32}, "ids must be 0..V-1, and <|endoftext|> the last"),
                            ({"more": 256, "<|endoftext|>": 257}, "257 words and 12 positions do not do for the 258"),
                            ({"☃": 256, "<|endoftext|>": 257}, "character .* is none of a byte-level vocabulary"),
                            ({"A": 33, '"': 1, "B": 256, "ab": 32, "<|endoftext|>": 257}, "must be the single bytes")]:
        (bad / "vocab.json").write_text(json.dumps(vocabulary | change))
        refused(message, bad)
    (bad / "config.json").write_text(json.dumps(CONFIG | {"model_type": "bert"}))
    refused("model_type='bert': must be 'gpt2'", bad)
    (bad / "config.json").write_text("{}")
    refused("must be a folder with GPT-2's", bad)
    (bad / "checkpoints").mkdir()
    (bad / "config.json").unlink()
    refused("generate.judge='.*bad': .*no .*config.json; train first", bad)
    with pytest.raises(ConfigError, match="generate.judge_dtype='float16': choose one of float32, bfloat16"):
        dataclasses.replace(GRID, judge_dtype="float16").check()


# ------------------------------------------------------------------------------------------------ runs as judges


@pytest.mark.slow
def test_a_diffusion_run_gives_a_bound():
    run_judge = judges.open_judge(str(trained()[1]))
    texts = [np.frombuffer(t, np.uint8).astype(np.int32)
             for t in (b"a short one", b"and one of more than sixteen", b"")]
    record = judges.record(run_judge, BYTES, texts)
    assert record["given"] == "lengths"
    assert record["kind"] == "bound" and record["bound"] and "bound" in record["rule"] and not record["retokenised"]
    assert "perplexity" not in record and "nats_per_token" not in record and "mean_text_perplexity" not in record
    assert record["tokens"] == 11 + 28 and record["empty_texts"] == record["unscored_texts"] == 1
    assert judges.perplexity(record).startswith("<= ") and judges.perplexity(record).endswith("(bound, given lengths)")
    assert record["made_from"]["step"] == 3 and record["params"] == model().run.num_params
    # the same rows by hand
    x, segment = np.full((3, SEQ_LEN), 256, np.int32), np.full((3, SEQ_LEN), -1, np.int32)
    for row, (i, start) in enumerate([(0, 0), (1, 0), (1, 16)]):
        piece = texts[i][start : start + SEQ_LEN]
        x[row, : len(piece)], segment[row, : len(piece)] = piece, 0
    rows = {"x": x, "segment": segment, "score": segment == 0}
    nats = run_judge._loaded[1].nats(model().run.params, rows, 2)[0]
    assert record["nats_per_token_bound"] == pytest.approx(nats.sum() / 2 / 39, rel=1e-5)


def test_an_autoregressive_run_is_exact(monkeypatch):
    """By the interface alone: process.exact, and an evaluator that gives one draw of as many nats as a row's scored
    tokens say."""
    saved = judges.saved_config(str(trained()[1]))
    saved = dataclasses.replace(saved, diffusion=dataclasses.replace(saved.diffusion, process="autoregressive"))
    monkeypatch.setattr(judges, "saved_config", lambda workdir: saved)
    run_judge = judges.open_judge(str(trained()[1]))
    seen = {}

    class Evaluator:
        def nats(self, params, rows, draws, name):
            seen.update(rows)
            return np.where(rows["score"], rows["x"], 0).sum(-1)[None, :, None] / 100.0, None, None

    run = types.SimpleNamespace(process=types.SimpleNamespace(exact=True), params=None, num_params=1, ends=False,
                                given_alone="nothing", config=saved, tokenizer=BYTES)
    monkeypatch.setattr(run_judge, "_loaded", (run, Evaluator()), raising=False)
    texts = [np.full(20, 100, np.int32), np.full(5, 300, np.int32) - 200, np.full(18, 100, np.int32)]
    nats, tokens, _ = run_judge.score(texts, [0, 2, 17])
    assert tokens.tolist() == [20, 3, 1] and nats.tolist() == [20, 3, 1]
    assert len(seen["x"]) == 4, "a piece of prompt alone is not worked on"
    assert (seen["segment"] >= 0).sum(-1).tolist() == [16, 4, 5, 2], "the prompt is seen"
    record = judges.record(run_judge, BYTES, texts)
    assert record["given"] == "nothing"
    assert record["kind"] == "autoregressive" and not record["bound"] and "bound" not in record["rule"]
    assert record["perplexity"] == pytest.approx(math.e) and not any(name.endswith("_bound") for name in record)
    assert judges.perplexity(record) == "2.72 ± 0.00"


# ------------------------------------------------------------------------------------------------ imported models


def imported(name, folder, merges=tuple(tokenfiles.MERGES)):
    """The workdir of a tiny open model with a byte-level tokenizer."""
    rng, made, tensors = np.random.default_rng(5), families.config(name), families.weights(name)
    for key, value in tensors.items():
        if value.shape[0] == families.V:  # the tables: more words
            tensors[key] = np.float32(0.2 * rng.standard_normal((300, value.shape[1])))
    sizes = {"vocab_size": 300} | ({"embedding_size": 300, "mask_token_id": 299} if name == "llada" else {})
    families.write(folder / name, made | sizes, tensors)
    tokenfiles.folder(folder / name, tokenfiles.byte_level(merges))
    c = config_of(recipe("released_open"))
    c = dataclasses.replace(c, released=dataclasses.replace(c.released, weights=str(folder / name)),
                            model=dataclasses.replace(c.model, seq_len=SEQ_LEN))
    open_weights.import_open(c, str(folder / f"{name}_run"))
    return folder / f"{name}_run"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return imported("llama", tmp_path_factory.mktemp("open"))


def test_an_imported_model_judges_from_the_start_symbol_on(llama):
    """Every token of every text, whatever the others' lengths; the record says which model it was."""
    judge, model = judges.open_judge(str(llama)), hdlm_jax.load(str(llama))
    texts = [judge.tokenizer.encode(t) for t in ("the inner", "a", "one of more than sixteen tokens")]
    nats, tokens, _ = judge.score(texts, [0, 0, 0])
    assert tokens.tolist() == [len(t) for t in texts]
    pieces = [ids[i : i + SEQ_LEN] for ids in texts for i in range(0, len(ids), SEQ_LEN)]
    x = np.stack([np.pad(piece, (0, SEQ_LEN - len(piece))) for piece in pieces])
    z = np.pad(x[:, :-1], ((0, 0), (1, 0)), constant_values=model.hierarchy.mask_id)
    logits = jax.jit(model.run.network.apply)({"params": model.run.params}, z, np.zeros(len(z)))
    each = np.take_along_axis(-np.asarray(jax.nn.log_softmax(logits)), x[:, :, None], -1)[:, :, 0]
    each = np.array([row[: len(piece)].sum() for row, piece in zip(each, pieces, strict=True)])
    np.testing.assert_allclose(nats, [each[0], each[1], each[2:].sum()], rtol=1e-5)
    record = judges.record(judge, BYTES, [np.frombuffer(b"the inner", np.uint8).astype(np.int32)])
    assert record["kind"] == "autoregressive" and record["retokenised"] and record["given"] == "nothing"
    assert record["nats_per_token"] == pytest.approx(nats[0] / tokens[0], rel=1e-5)
    assert record["judge"] == "llama_run" and record["made_from"]["family"] == "llama"
    assert record["made_from"]["sha256"] == hub_sha256(str(llama.parent / "llama"))


def test_a_short_text_is_a_short_row(llama):
    judge = judges.open_judge(str(llama))
    run, evaluator = judge._loaded
    seen = []
    judge._loaded = run, types.SimpleNamespace(nats=lambda params, rows, *how: seen.append(rows["x"].shape) or (
        np.zeros((1, len(rows["x"]), 1)),))
    judge.score([np.zeros(3, np.int32), np.zeros(5, np.int32)], [0, 0])
    judge.score([np.zeros(SEQ_LEN + 1, np.int32)], [0])
    assert seen == [(2, 8), (2, SEQ_LEN)]


def test_a_fetched_model_judges_by_its_name(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    with pytest.raises(ConfigError, match="generate.judge='smollm2': runs/smollm2 holds no model yet; run hdlm-jax "
                                          "fetch smollm2 here"):
        judges.open_judge("smollm2")
    shutil.copytree(llama, tmp_path / "runs" / "smollm2")
    assert judges.open_judge("smollm2").identity["path"] == str(tmp_path / "runs" / "smollm2")
    with pytest.raises(ConfigError, match="generate.judge='smolm2': .* or one of smollm2, gemma3-270m$"):
        judges.open_judge("smolm2")


@pytest.mark.parametrize("method", ["guided", pytest.param("edlm", marks=pytest.mark.slow)])
def test_an_imported_model_helps(llama, tmp_path_factory, method):
    """As the reader of a masked model with the same tokens; it is refused with others."""
    masked = hdlm_jax.load(str(imported("llada", tmp_path_factory.mktemp("masked"))))
    how = dict(num_samples=2, steps=8, method=method, options="candidates=2" if method == "edlm" else "")
    found = masked.generate(helper=str(llama), **how)
    assert len(found) == 2 and any(found)
    with pytest.raises(ConfigError, match="generate.helper=.*: its tokenizer .* is not this run's .*; give one"):
        masked.generate(helper=str(imported("llama", tmp_path_factory.mktemp("other"), tokenfiles.MERGES[::-1])), **how)


# ------------------------------------------------------------------------------------------------ generate


def test_samples_are_judged_as_they_are(copied, folder, monkeypatch, capsys):
    """A judge put beside samples that are there draws nothing anew; the same judge is not asked twice."""
    run = str(copied)
    first = generate.generate(config(prompt="The "), run)
    assert "judge" not in first
    lines = (copied / "samples.jsonl").read_bytes()
    drawn, asked = [], []
    sample, record = generate._sample, judges.record
    monkeypatch.setattr(generate, "_sample", lambda *a: drawn.append(1) or sample(*a))
    monkeypatch.setattr(judges, "record", lambda *a: asked.append(1) or record(*a))
    result = generate.generate(config(prompt="The ", judge=str(folder)), run)
    assert not drawn and len(asked) == 1 and (copied / "samples.jsonl").read_bytes() == lines
    found = result["judge"]
    ids = [json.loads(line)["ids"] for line in lines.decode().splitlines()]
    theirs = judges.folder_tokenizer(str(folder))
    again = [judges.retokenise(np.array(i, np.int32), BYTES, theirs) for i in ids]
    wanted = np.sum([by_hand(i, 4) for i in again], axis=0)
    assert found["tokens"] == wanted[1] and found["nats_per_token"] == pytest.approx(wanted[0] / wanted[1], rel=1e-5)
    assert found["sampled_tokens"] == 3 * (SEQ_LEN - 4) and found["unigram_entropy"] == result["unigram_entropy"]
    said = capsys.readouterr().out
    assert f"perplexity {found['perplexity']:.2f}" in said and "retokenised" in said
    sampling = found["sampling"]
    assert (sampling["steps"], sampling["temperature"], sampling["top_p"], sampling["length"]) == (6, 1, 1, SEQ_LEN)
    assert (sampling["samples"], sampling["seed"], sampling["law"], sampling["method"]) == (3, 0, "exact", "ancestral")
    assert sampling["network_calls"] == first["network_calls"] and "mode='high'" in sampling["draws"]
    assert found["made_from"]["precision"] == "float32" and len(found["made_from"]["sha256"]) == 64
    assert found["mauve"] is None and found["mauve_note"]
    assert json.loads((copied / "generate.json").read_text())["judge"]["tokens"] == found["tokens"]

    assert generate.generate(config(prompt="The ", judge=str(folder)), run)["judge"] == found and len(asked) == 1
    bound = generate.generate(config(prompt="The ", judge=run), run)["judge"]
    assert bound["kind"] == "bound" and bound["tokens"] == 3 * (SEQ_LEN - 4) and len(asked) == 2 and not drawn
    assert "(bound, given lengths)" in capsys.readouterr().out
    # samples of something else (a kill between two files) are not judged
    (copied / "samples.jsonl").write_bytes(lines.replace(b'"ids": [', b'"ids":  ['))
    assert "judge" not in generate.generate(config(prompt="The "), run)
    assert len(drawn) == 1 and (copied / "samples.jsonl").read_bytes() == lines


def test_a_judge_that_is_not_there_is_said_before_any_work(copied, monkeypatch):
    monkeypatch.setattr(generate, "_sample", lambda *a: pytest.fail("sampled first"))
    with pytest.raises(ConfigError, match="generate.judge='nowhere': must be a folder"):
        generate.generate(config(judge="nowhere"), str(copied))
    with pytest.raises(ConfigError, match="generate.force_transition='wihtin': choose one of .*did you mean 'within'"):
        dataclasses.replace(GRID, force_transition="wihtin").check()
    with pytest.raises(ConfigError, match="generate.force_transition='none': this run's process has no force"):
        sampling.at_sampling(types.SimpleNamespace(force_transition=""),
                             dataclasses.replace(GRID, force_transition="none"))


def test_mauve_beside_real_texts(folder, copied, monkeypatch):
    """mauve-text gets the states of samples and of as many real texts, in the judge's tokens."""
    got = {}

    def compute_mauve(p_features, q_features):
        got.update(p=p_features, q=q_features)
        return types.SimpleNamespace(mauve=0.25)

    monkeypatch.setitem(sys.modules, "mauve", types.SimpleNamespace(compute_mauve=compute_mauve))
    monkeypatch.setattr(judges, "mauve_installed", lambda: True)
    found = generate.generate(config(judge=str(folder)), str(copied))["judge"]
    assert found["mauve"] == 0.25 and "3 texts against the first 3 of the validation split" in found["mauve_note"]
    theirs = judges.folder_tokenizer(str(folder))
    rows = generate.real_texts(model().run, 3, SEQ_LEN)
    for features, texts in [(got["q"], rows),
                            (got["p"], [json.loads(line)["ids"] for line in open(copied / "samples.jsonl")])]:
        ids = [judges.retokenise(np.asarray(t, np.int32), BYTES, theirs)[:P] for t in texts]
        wanted = [hub.twin(hub.weights(CONFIG), i, CONFIG)[1][-1] for i in ids]
        np.testing.assert_allclose(features, wanted, atol=1e-4)
    bound = generate.generate(config(judge=str(copied)), str(copied))["judge"]
    assert bound["mauve"] is None and "features come from a GPT-2" in bound["mauve_note"]
    shutil.rmtree(copied / "data")
    assert generate.real_texts(dataclasses.replace(model().run, data_dir=str(copied / "data")), 3, 8)[:6] == "no ref"


def test_mauve_itself():
    """With the extra installed: no distance between equal sets, some between different ones."""
    pytest.importorskip("mauve")
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 60, 8)).astype(np.float32)
    assert text_statistics.mauve(a, a) > 0.95 > 0.5 > text_statistics.mauve(a, b + 9)


# ------------------------------------------------------------------------------------------------ the sampler's force


def draw(g):
    return model()._draw(np.full((8, SEQ_LEN), model().hierarchy.mask_id, np.int32), g)["tokens"]


def test_the_process_at_sampling():
    process = model().run.process
    assert sampling.at_sampling(process, GRID) is process and process.force_transition == "cavity"
    free = dataclasses.replace(GRID, force_transition="none")
    other = sampling.at_sampling(dataclasses.replace(process, xi=0.7), free)
    assert (other.force_transition, other.xi, other.hierarchy) == ("none", 0.7, process.hierarchy)


@pytest.mark.slow
def test_within_below_xi_one():
    """Every word lies under the cluster that is shown, which the trained cavity does not ask for."""
    run, h = model().run, model().hierarchy
    process = dataclasses.replace(run.process, xi=0.6)
    sampler = sampling.Sampler(run.network, process, run.mesh, run.params)
    words = np.frombuffer(b"a sample of text", np.uint8).astype(np.int32)
    canvas = np.tile(h.state_id(1, h.anc[1][words]), (8, 1))
    within, usual = (sampler(canvas, dataclasses.replace(GRID, force_transition=f))["tokens"] for f in ("within", ""))
    np.testing.assert_array_equal(h.anc[1][within], np.tile(h.anc[1][words], (8, 1)))
    assert (h.anc[1][usual] != h.anc[1][words]).any()


@pytest.mark.slow
def test_samplers_that_are_the_same_are_drawn_once():
    """At xi = 1 the groups named as one sampler draw the same samples, and different groups do not."""
    process = model().run.process
    everything = ("none", "within", "between", "cavity"), ("exact", "clean")
    groups = sampling_sweep.samplers(process, *everything)
    assert [len(group) for group in groups] == [2, 6]
    tokens = [[draw(dataclasses.replace(GRID, force_transition=f, clusters=c)) for f, c in group[::3]]
              for group in groups]  # none; within and between, exact and clean
    for group in tokens:
        for other in group[1:]:
            np.testing.assert_array_equal(group[0], other)
    assert (tokens[0][0] != tokens[1][0]).any()


def test_which_samplers_are_the_same():
    everything = ("none", "within", "between", "cavity"), ("exact", "clean")

    def sizes(levels, xi):
        process = types.SimpleNamespace(force_transition="cavity", num_levels=levels, xi=xi)
        return [len(group) for group in sampling_sweep.samplers(process, *everything)]

    assert sizes(1, 1) == [8] and sizes(2, 1) == [2, 6] and sizes(3, 1) == [1, 1, 6]
    assert sizes(2, 0.7) == sizes(3, 0.7) == [1] * 8
    assert sampling_sweep.samplers(types.SimpleNamespace(force_transition=""), *everything) == [[("", "exact")]]


def test_what_leaves_the_exact_law_is_said():
    noisy = dataclasses.replace(model().run.process, xi=0.7)
    say = lambda process, **how: sampling.exactness(process, dataclasses.replace(GRID, **how))  # noqa: E731
    assert say(noisy) == say(noisy, force_transition="cavity") == "exact"
    for other in ("none", "within", "between"):  # another model's law than the one whose NELBO is measured
        assert say(noisy, force_transition=other) == f"inexact: force_transition={other} where cavity was trained"
    plain, bare = model().run.process, types.SimpleNamespace(xi=1, num_levels=1, force_transition="", methods=())
    assert say(plain, force_transition="within", clusters="clean") == "exact"
    assert say(plain, force_transition="none") == "inexact: force_transition=none where cavity was trained"
    free = types.SimpleNamespace(xi=1, num_levels=3, force_transition="none", methods=())
    assert say(free) == "exact" and say(free, clusters="clean") == ("inexact: clusters=clean at xi=1 without a force "
                                                                    "transition")
    assert say(bare, corrections=2) == "inexact: corrections=2"
    assert say(noisy, clusters="clean", temperature=0.8, top_p=0.9) == ("inexact: clusters=clean at xi=0.7, "
                                                                        "temperature=0.8, top_p=0.9")
    assert say(bare, temperature=0.0) == "inexact: temperature=0"


# ------------------------------------------------------------------------------------------------ the sweep


@pytest.mark.slow
def test_sweep_goes_on_where_it_was(copied, folder, capsys, monkeypatch):
    how = [str(copied), "--num_samples=3", "--batch_size=8", "--temperature=.5,.25", "--clusters=exact"]
    sampling_sweep.main([*how, "--steps=6", f"--judge={folder}", "--force_transition=none"])
    path = copied / sampling_sweep.FILE
    before = path.read_text()
    assert len(before.splitlines()) == 2
    count, sample = [], sampling.Sampler.__call__
    monkeypatch.setattr(sampling.Sampler, "__call__", lambda *a: count.append(1) or sample(*a))
    capsys.readouterr()
    sampling_sweep.main([*how, "--steps=2,6", f"--judge={folder}"])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert path.read_text().startswith(before) and len(lines) == 8 and len(count) == 12
    out = capsys.readouterr().out
    assert out.count("reusing") == 2
    table = [line for line in out.splitlines() if line.startswith("| ")]
    assert len(table) == 10 and sum("within = between = cavity" in line for line in table) == 4
    kinds = {(r["sampling"]["steps"], r["sampling"]["temperature"], r["sampling"]["force_transition"]) for r in lines}
    assert kinds == {(s, t, f) for s in (2, 6) for t in (0.25, 0.5) for f in ("none", "within")}
    assert all(math.isfinite(r["judge"]["perplexity"]) and r["sampling"]["network_calls"] <= 6 for r in lines)
    one = next(r for r in lines if r["same"][0][0] == "within" and r["sampling"]["temperature"] == 0.25
               and r["sampling"]["steps"] == 6)
    tokens = draw(dataclasses.replace(GRID, temperature=0.25))[:3]
    assert one["judge"]["corpus_entropy"] == pytest.approx(text_statistics.entropy(tokens.reshape(-1)))
    assert f"{one['judge']['perplexity']:.2f} ± {one['judge']['perplexity_se']:.2f}" in out
    sampling_sweep.main([*how, "--steps=6", "--force_transition=within"])  # nobody judges
    last = json.loads(path.read_text().splitlines()[-1])
    assert "judge" not in last and last["unigram_entropy"] > 0 and "not judged" in capsys.readouterr().out


def test_sweep_refuses_in_one_line(copied, tmp_path):
    for arguments, message in [
        (["--force_transition=wihtin"], "generate.force_transition='wihtin': choose one of .*did you mean 'within'"),
        (["--steps=0"], "generate.steps=0: must be at least 1"),
        (["--judge=nowhere"], "generate.judge='nowhere': must be a folder"),
        ([str(tmp_path / "nothing")], "nothing.*train first"),
    ]:
        with pytest.raises(SystemExit, match=f"^sampling_sweep: .*{message}"):
            sampling_sweep.main([str(copied), *arguments])
    assert not (copied / sampling_sweep.FILE).exists()


def test_names_are_those_of_the_record():
    """A judge's own tokenizer is one by its fingerprint, whoever holds it."""
    assert Tokenizer("bytes", [bytes([b]) for b in range(256)]).fingerprint == BYTES.fingerprint
    assert judges.open_judge(str(trained()[1]), shape=ParallelConfig()).tokenizer.fingerprint == BYTES.fingerprint
