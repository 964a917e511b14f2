"""hdlm_jax.load: generate, infill, nelbo, hierarchy, and what it refuses."""
import dataclasses
import json
import math
import re
import shutil
import sys
import types
from collections import Counter

import numpy as np
import pytest
from tiny import SEQ_LEN, model, read_recipe, trained

import hdlm_jax
from hdlm_jax.common import console
from hdlm_jax.config import ConfigError
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.report.run_files import gather
from hdlm_jax.runs.interrupt import RESUME_EXIT
from hdlm_jax.training import loading

FEW = {"steps": 6, "batch_size": 8}  # the settings that are compiled already


@pytest.fixture
def drawn(monkeypatch):
    """Canvas and tokens of every call of the sampler."""
    calls, draw = [], model()._draw

    def spy(canvas, g):
        out = draw(canvas, g)
        calls.append((getattr(canvas, "z", canvas), out["tokens"]))
        return out

    monkeypatch.setattr(model(), "_draw", spy)
    return calls


@pytest.fixture
def copied(tmp_path):
    """A copy of the run to do harm to."""
    return shutil.copytree(trained()[1], tmp_path / "run")


def test_generate(drawn):
    texts = model().generate(3, prompt="The ", **FEW)
    assert len(texts) == 3 and all(isinstance(t, str) and t.startswith("The ") for t in texts)
    assert len(set(texts)) == 3
    canvas, tokens = drawn[0]
    assert tokens.shape == (3, SEQ_LEN) and (canvas[:, 4:] == model().hierarchy.mask_id).all()
    assert [model().tokenizer.decode(row) for row in tokens] == texts
    assert model().generate(3, prompt="The ", **FEW) == texts
    assert not set(model().generate(3, prompt="The ", seed=1, **FEW)) & set(texts)
    assert model().generate(9, prompt="The ", **FEW)[:3] == texts
    with pytest.raises(ConfigError, match="method='first_hiting': choose one of .*did you mean 'first_hitting'"):
        model().generate(method="first_hiting")
    with pytest.raises(ConfigError, match="generate.num_samples=0: must be at least 1"):
        model().generate(0)
    with pytest.raises(ConfigError, match="generate.prompt has 16 tokens: must be fewer than the 16 of a text"):
        model().generate(prompt="a" * SEQ_LEN)


def test_several_prompts_of_any_lengths_in_one_batch(drawn):
    prompts = ["The ", "", "a longer one "]
    texts = model().generate(2, prompt=prompts, **FEW)
    assert len(texts) == 6 and all(text.startswith(prompts[i // 2]) for i, text in enumerate(texts))
    canvas, mask = drawn[0][0], model().hierarchy.mask_id
    assert len(drawn) == 1 and (canvas == mask).argmax(1).tolist() == [4, 4, 0, 0, 13, 13]
    assert model().generate(2, prompt="The ", **FEW) == texts[:2] == model().generate(2, prompt=("The ",), **FEW)
    assert model().generate(2, prompt=[], **FEW) == [] and len(drawn) == 3
    with pytest.raises(ConfigError, match="generate.prompt has 16 tokens: must be fewer than the 16 of a text"):
        model().generate(prompt=["a", "a" * SEQ_LEN])


def test_several_texts_are_filled_in_one_batch(drawn):
    """Each with its own length and its own kinds of words; what comes out of the first does not change."""
    h, texts = model().hierarchy, ["ab[LIKE:e]", "[LIKE:t] and [MASK:2] too", "x[MASK]"]
    found = model().infill(texts, num_samples=4, **FEW)
    assert len(found) == 12 and len(drawn) == 1
    for i, (text, pattern) in enumerate(zip(texts, ("ab(.)", "(.) and..? too|(.) and.+ too", "x(.)"), strict=True)):
        assert all(re.fullmatch(pattern, out, re.DOTALL) for out in found[4 * i : 4 * i + 4]), text
    tokens = drawn[0][1]
    for rows, place, word in ((slice(0, 4), 2, b"e"), (slice(4, 8), 0, b"t")):
        assert (h.anc[1][tokens[rows, place]] == h.anc[1][word[0]]).all(), "of the cluster of its word"
    assert model().infill(texts[0], num_samples=4, **FEW) == found[:4]
    assert model().infill([], **FEW) == []
    with pytest.raises(ValueError, match="no blank in 'text'"):
        model().infill(["a[MASK]", "text"])


ONE_LINE = [
    (lambda m: m.generate(prompt=5), "generate.prompt: must be a text or a list of texts, not int"),
    (lambda m: m.generate(prompt=None), "generate.prompt: must be a text or a list of texts, not NoneType"),
    (lambda m: m.generate(prompt=["a", b"b"]), r"generate.prompt\[1\]: must be of type str, not bytes"),
    (lambda m: m.infill({"a"}), "infill: must be a text or a list of texts, not set"),
    (lambda m: m.nelbo(5), "nelbo: must be a text or a list of texts, not int"),
    (lambda m: m.nelbo(["a", 5]), r"nelbo\[1\]: must be of type str, not int"),
    (lambda m: m.nelbo("a", draws=2.5), "draws=2.5: must be of type int"),
    (lambda m: m.json({"type": "null"}, prompt=["a"]), r"generate.prompt=\['a'\]: must be of type str"),
    (lambda m: m.json({"type": "string"}, budget="x"), "budget='x': must be of type int"),
    (lambda m: m.generate(num_samples="3"), "generate.num_samples='3': must be of type int"),
    (lambda m: m.generate(steps=2.0), "generate.steps=2.0: must be of type int"),
    (lambda m: m.generate(steps=2**31), "generate.steps=2147483648: must be at most 2147483647"),
    (lambda m: m.generate(tempreature=1.0), "config.generate.tempreature: no such setting; .*mean 'temperature'"),
    (lambda m: m.generate(temperature="hot"), "generate.temperature='hot': must be of type float"),
    (lambda m: m.generate(temperature=math.inf), "generate.temperature=inf: must be a finite number"),
    (lambda m: m.generate(top_p=1.5), r"generate.top_p=1.5: must lie in \(0, 1\]"),
    (lambda m: m.generate(seed=2**32), "generate.seed=4294967296: must lie in 0..4294967295"),
    (lambda m: m.generate(seed=-1), "generate.seed=-1: must lie in 0..4294967295"),
    (lambda m: m.generate(length=17), "generate.length=17: must be at most model.seq_len=16"),
    (lambda m: m.generate(corrections=3), "generate.corrections=3: goes with diffusion.process='gidd'"),
    (lambda m: m.generate(classifier="x"), "classifier: must be a function, not str"),
    (lambda m: m.infill("[MASK]", length=4), "generate.length: is not a setting here; the text says it"),
    (lambda m: m.infill("[MASK:99999999999]"), r"'\[MASK:99999999999\]' at character 0: a text has at most 16 tokens"),
    (lambda m: m.infill(f"[MASK:{'9' * 5000}]"), "at character 0: a text has at most 16 tokens"),
    (lambda m: m.infill(f"[LIKE@{'9' * 5000}:a]"), "has no clusters; levels that have: 1..1"),
]


@pytest.mark.parametrize("call, match", ONE_LINE)
def test_mistakes_are_one_line_before_anything_is_drawn(drawn, call, match):
    with pytest.raises(ValueError, match=match) as error:
        call(model())
    assert "\n" not in str(error.value) and not drawn


def test_numbers_of_numpy_are_numbers(drawn):
    texts = model().generate(np.int64(2), prompt="The ", seed=np.uint32(2**32 - 1), temperature=np.float32(1), **FEW)
    assert len(texts) == 2 and texts == model().generate(2, prompt="The ", seed=2**32 - 1, **FEW)
    assert texts != model().generate(2, prompt="The ", seed=2**31 - 1, **FEW), "all 32 bits count"


def test_infill_keeps_everything_but_the_blanks(drawn):
    texts = model().infill("ab[MASK]cd[MASK:3]ef", num_samples=8, **FEW)
    canvas, tokens = drawn[0]
    mask = model().hierarchy.mask_id
    assert canvas[0, :10].tolist() == [97, 98, mask, 99, 100, mask, mask, mask, 101, 102]
    given = canvas[:, :10] != mask
    np.testing.assert_array_equal(tokens[:, :10][given], canvas[:, :10][given])
    assert len(texts) == 8 and len(set(texts)) == 8
    for text, row in zip(texts, tokens, strict=True):
        assert re.fullmatch("ab.+cd.+ef", text, re.DOTALL)
        assert text == model().tokenizer.decode(row[:10]), "and nothing after the text"


def test_infill_like_a_word_stays_in_its_cluster(drawn):
    h = model().hierarchy
    word = next(int(w) for w in b"etaoin" if h.token_count[1][h.anc[1][w]] > 5)
    model().infill(f"ab[LIKE:{chr(word)}xyz]", num_samples=8, **FEW)
    canvas, tokens = drawn[0]
    assert (canvas[:, 2] == h.state_id(1, h.anc[1][word])).all(), "only the cluster of its first token is shown"
    assert (h.anc[1][tokens[:, 2]] == h.anc[1][word]).all() and len(np.unique(tokens[:, 2])) > 1
    assert (tokens[:, :2] == [97, 98]).all()


def test_infill_refuses(monkeypatch):
    with pytest.raises(ValueError, match=r"no blank in 'text'; write \[MASK\]"):
        model().infill("text")
    with pytest.raises(ValueError, match="canvas of 17 tokens: must be 1 to seq_len=16"):
        model().infill("a[MASK:16]")
    with pytest.raises(ConfigError, match="num_samples=0"):
        model().infill("a[MASK]", num_samples=0)
    flat = Hierarchy.from_parents([], vocab_size=257)
    monkeypatch.setattr(model(), "run", dataclasses.replace(model().run, hierarchy=flat))
    with pytest.raises(ValueError, match=r"\[LIKE:x\]' at character 1: level 1 has no clusters; .*none, so use"):
        model().infill("a[LIKE:x]")


def test_nelbo():
    """After three steps the model is close to uniform: about log 257 nats a token, padding not among them."""
    texts = ["hello", "a" * 40, ""]
    found = model().nelbo(texts, draws=256)
    assert model().nelbo(texts, draws=256) == found
    for text, score in zip(texts, found, strict=True):
        tokens = len(text) + 1  # and the end of text
        assert score["tokens"] == tokens and score["se"] > 0
        assert abs(score["nats"] - tokens * math.log(257)) < 4 * score["se"] + 0.05 * score["nats"], text
        assert score["bits_per_byte"] == pytest.approx(score["nats"] / math.log(2) / max(1, len(text)))
    few = model().nelbo(texts, draws=4)
    assert sum(s["se"] for s in found) < 0.5 * sum(s["se"] for s in few)
    assert model().nelbo([]) == [] and model().nelbo("hello", draws=256) == model().nelbo(["hello"], draws=256)
    with pytest.raises(ValueError, match="draws=1: must be at least 2"):
        model().nelbo(["x"], draws=1)


def test_parts():
    m = model()
    assert m.hierarchy.sizes == (257, 8, 1) and m.tokenizer.kind == "bytes" and m.seq_len == SEQ_LEN
    assert m.hierarchy == Hierarchy.load(trained()[1] / "hierarchy.npz")
    assert m.run.step == 3 and m.run.config == read_recipe(trained()[0])
    assert m.run.num_params == sum(a.size for a in _leaves(m.run.params)) > 30_000
    table = loading.checkpoint_embedding(str(trained()[1]))
    np.testing.assert_array_equal(table, np.asarray(m.run.params["embedding"])[:257])
    start = dataclasses.replace(m.run.config.train, init_from=str(trained()[1]))
    start = dataclasses.replace(m.run.config, train=start)
    same = loading.load_base(start, m.tokenizer.fingerprint).params
    for a, b in zip(_leaves(same), _leaves(m.run.params), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ConfigError, match="is not this run's 000000000000"):
        loading.load_base(start, "0" * 64)


def _leaves(tree):
    import jax
    return jax.tree.leaves(tree)


def test_load_refuses(tmp_path, copied):
    """Each with one line that says what to do."""
    workdir = str(copied)

    def refused(match, error=ConfigError, where=workdir, **kwargs):
        with pytest.raises(error, match=match) as found:
            hdlm_jax.load(where, **kwargs)
        assert "\n" not in str(found.value)

    refused("train first", where=str(tmp_path / "nothing"))
    refused("checkpoint='worst': choose one of best, latest", checkpoint="worst")
    path, h = copied / "hierarchy.npz", Hierarchy.load(copied / "hierarchy.npz")
    parent = h.parents[0].copy()
    parent[:2] = parent[:2][::-1] if parent[0] != parent[1] else (parent[:2] + 1) % 8
    Hierarchy.from_parents([parent], special=h.special).save(path, model().tokenizer.fingerprint)
    refused("is not the checkpoint's")
    h.save(path, "0" * 64)
    refused("was made for tokenizer 000000000000", ValueError)
    h.save(path, model().tokenizer.fingerprint)
    hdlm_jax.load(workdir)
    shutil.rmtree(copied / "checkpoints")
    refused("train first", FileNotFoundError)


@pytest.mark.parametrize("section, change", [("model", {"width": 64}), ("diffusion", {"xi": 0.5}),
                                             ("hierarchy", {"seed": 1}), ("model", {"time_conditioning": False})])
def test_a_run_is_used_as_it_was_trained(section, change):
    config = read_recipe(trained()[0])
    config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **change)})
    (name, value), = change.items()
    with pytest.raises(ConfigError, match=f"{section}.{name}={value!r} .*was trained otherwise"):
        loading.load_run(config, str(trained()[1]))


def test_saved_config_is_the_config():
    with open(trained()[1] / "config.json") as f:
        assert json.load(f)["train"]["steps"] == 3
    assert loading.saved_config(str(trained()[1])) == read_recipe(trained()[0])


def test_a_run_of_the_old_layout_is_refused(copied):
    saved = json.loads((copied / "config.json").read_text())
    del saved["data"]["packing"]
    (copied / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match="made by an earlier version"):
        hdlm_jax.load(str(copied))


def test_a_setting_that_has_moved_is_found_where_it_was(copied):
    """tied was one of the decoder's alone."""
    saved = json.loads((copied / "config.json").read_text())
    now = loading.saved_config(str(copied))
    for tied in (False, True):
        (copied / "config.json").write_text(json.dumps(
            saved | {"model": {k: v for k, v in saved["model"].items() if k != "tied"} | {"head": "flat"},
                     "decoder": saved["decoder"] | {"tied": tied}}))
        found = loading.saved_config(str(copied))
        assert found.model == dataclasses.replace(now.model, head="flat", tied=tied) and found.decoder == now.decoder


def test_a_setting_that_is_gone_is_no_matter_where_it_was_not_used(copied):
    """optimizer.time_lr was a share of a rate, 1 by default."""
    saved, now = json.loads((copied / "config.json").read_text()), loading.saved_config(str(copied))
    for share in (1.0, 0.5):
        (copied / "config.json").write_text(json.dumps(saved | {"optimizer": saved["optimizer"] | {"time_lr": share}}))
        if share == 1:
            assert loading.saved_config(str(copied)) == now
        else:
            with pytest.raises(ConfigError, match="optimizer.time_lr: no such setting"):
                loading.saved_config(str(copied))


def test_a_length_in_the_config_is_for_generation_alone(monkeypatch):
    config = model().run.config
    monkeypatch.setattr(model(), "run", dataclasses.replace(
        model().run, config=dataclasses.replace(config, generate=dataclasses.replace(config.generate, length=5))))
    short = model().generate(2, **FEW)
    assert all(len(text) <= 5 for text in short)
    blanks = model().infill("abc [MASK:3] xyz", 2, **FEW)
    monkeypatch.undo()
    assert blanks == model().infill("abc [MASK:3] xyz", 2, **FEW), "all of the text is looked at"


@pytest.mark.slow
def test_few_and_many_texts_are_scored_in_batches_of_their_own():
    scores = [model().nelbo(texts, draws=2) for texts in (["hi"], ["hi"] * 40, ["hi"])]
    assert {2, 128} <= {size[0] for size in model()._evaluator().program._compiled}
    assert scores[0] == scores[2]


def test_stream_shows_the_text_of_generate_while_it_is_written():
    seen = list(model().stream("The ", **FEW))
    masked = [int((model().hierarchy.level_of(one.z) > 0).sum()) for one in seen]
    assert masked[0] == SEQ_LEN - 4 and masked[-1] == 0 and masked == sorted(masked, reverse=True)
    for before, now in zip(seen, seen[1:], strict=False):
        assert ((now.sure > 0) >= (now.z != before.z)).all() and (now.sure[:4] == 0).all(), "of what was drawn"
    assert not any(one.done or one.text for one in seen[:-1]) and seen[-1].done in ("stop", "length")
    assert seen[-1].text == model().generate(1, prompt="The ", **FEW)[0]
    next(left := model().stream("The ", **FEW))
    left.close()  # stops the writing
    with pytest.raises(ConfigError, match="method='first_hiting': choose one of"):
        model().stream("The ", method="first_hiting")


def test_repr_says_what_it_is():
    said = repr(model())
    assert f"{model().run.num_params:,} parameters, step {model().run.step}" in said and "bytes tokenizer" in said
    assert "HDLM: 257 words → " in said and "→ mask" in said and "infill" in said and "chat" not in said


def test_a_compile_is_said_once_for_a_setting(monkeypatch, capsys):
    monkeypatch.setattr(console, "SHORT", -1)  # whatever is compiled is said
    said = []
    for seed in (0, 1):
        model().generate(1, length=9, seed=seed, **FEW)
        said.append([line for line in capsys.readouterr().err.splitlines() if "compiled in" in line])
    assert len(said[0]) == 1 and said[0][0].startswith("generate: compiled in ") and said[1] == []


def test_a_text_is_seen_falling():
    film = model().show("The ", **FEW)
    assert film.text == model().generate(1, prompt="The ", **FEW)[0] and repr(film.text) in repr(film)
    block = re.search(r'(?s)<script type="application/json" id="data">(.*?)</script>', film.html)[1]
    run = json.loads(block)["run"]
    tree, shown, whole = run["hierarchy"], run["trajectories"], gather(str(trained()[1]))["hierarchy"]
    z = np.array(shown["samples"][0]["start"])
    assert shown["prompt"] == 4 and [tree["words"][w] for w in z[:4]] == list("The ")
    assert (z[4:] == sum(tree["sizes"]) - 1).all() and tree["sizes"][-1] == 1
    for frame in shown["samples"][0]["frames"]:
        for place, state, sure in np.reshape(frame, (-1, 3)):
            z[place] = state
            assert 0 < sure <= 1000
    assert "".join(tree["words"][w] for w in z).replace("↵", "\n")[:4] == "The " and z.max() < tree["sizes"][0]
    named = Counter(tree["parents"][0])
    assert len(tree["words"]) < 257 == len(whole["words"]) and len(named) == tree["sizes"][1]
    for node in named:  # a cluster is named by the same words as on the run's page
        of = [w for w in range(tree["sizes"][0]) if tree["parents"][0][w] == node]
        first = max(of, key=lambda w: tree["counts"][w])
        there = whole["parents"][0][whole["words"].index(tree["words"][first])]
        assert tree["counts"][first] <= max(c for c, p in zip(whole["counts"], whole["parents"][0], strict=True)
                                            if p == there)
    assert film._repr_html_().count("<") == 2, "all of the page is inside the frame's attribute"


def test_training_from_python(copied, monkeypatch, capsys):
    """Goes on in a run as the command does, with a plot where this is a notebook; what is wrong is one line."""
    shown, recipe = [], str(trained()[0])
    page = types.SimpleNamespace(HTML=str, display=lambda *_, display_id: types.SimpleNamespace(update=shown.append))
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(
        display=page, get_ipython=lambda: types.SimpleNamespace(config={"IPKernelApp": {}})))
    shutil.rmtree(copied / "checkpoints")
    found = hdlm_jax.train(recipe, workdir=copied, **{"generate.steps": 5, "train.sample_every": 3})
    latest = json.loads((copied / "latest_samples.json").read_text())
    assert latest == {"step": 3, "texts": model().generate(2, steps=32)}, "by the weights as they are"
    for ours, there in zip(_leaves(found.run.params), _leaves(model().run.params), strict=True):
        np.testing.assert_array_equal(ours, there, "as without it")
    assert found.run.step == 3 and json.loads((copied / "config.json").read_text())["generate"]["steps"] == 5
    assert "step 3 of 3 (100 %)" in shown[-1] and shown[-1].count("<polyline") == 2 and "step 3 of 3" not in (
        capsys.readouterr().out), "in place of the log's lines"
    shown.clear()
    hdlm_jax.train(recipe, workdir=str(copied))
    assert "step 3 of 3 (100 %)" in shown[-1], "also where there is nothing to do"
    for given, settings, match in [
            ("hdlm_tinny", {}, "--config='hdlm_tinny': choose one of .*mean 'hdlm_tiny'"),
            (5, {}, "config: must be the name of a recipe or a ConfigDict, not int"),
            (recipe, {"train": 5}, "train: is a section"), (recipe, {"train.stepps": 5}, "mean 'steps'"),
            (recipe, {"train.steps": "5"}, "train.steps='5': must be of type int"),
            (recipe, {"train.steps": 5}, "train.steps=5 .there 3.: the checkpoint"),
            (hdlm_jax.config.default(), {"workdir": ""}, "workdir='': give the folder of the run")]:
        with pytest.raises(ConfigError, match=match) as error:
            hdlm_jax.train(given, **({"workdir": str(copied)} | settings))
        assert "\n" not in str(error.value)


def test_a_training_that_is_stopped_has_saved(copied, monkeypatch):
    def stopped(*_, **__):
        raise SystemExit(RESUME_EXIT)

    monkeypatch.setattr("hdlm_jax.runs.train.train", stopped)
    with pytest.raises(KeyboardInterrupt, match="the same call goes on"):
        hdlm_jax.train(str(trained()[0]), str(copied))


def test_rewards_are_trained_by_as_on_the_command_line(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("hdlm_jax.runs.tune.tune", lambda config, workdir, shown: asked.append(config.tune.objective))
    monkeypatch.setattr("hdlm_jax.api.Model", lambda workdir: workdir)
    settings = {"train.init_from": str(trained()[1]), "hierarchy.clusters": (8,), "model.blocks": 1,
                "model.time_conditioning": True}
    assert hdlm_jax.train("permutations:score", str(tmp_path / "run"), **settings) == str(tmp_path / "run")
    assert asked == ["score"]
