"""Training by rewards: tasks that are verified, advantages, and the loop that resumes bit for bit."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

import hdlm_jax
from hdlm_jax.common import parallel
from hdlm_jax.config import REWARDS, TUNINGS, ConfigError, default, recipe, resolve
from hdlm_jax.data import tokenizers
from hdlm_jax.decoding import sampler
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.runs import export, stages, train, tune
from hdlm_jax.training import loading
from hdlm_jax.training.state import abstract_state, build, init_state, make_optimizer
from hdlm_jax.tuning import tasks
from hdlm_jax.tuning.advantage import advantages
from hdlm_jax.tuning.record import make_rollout
from hdlm_jax.tuning.update import OBJECTIVES, make_update


def test_names_are_those_of_the_settings():
    assert tuple(tasks.TASKS) == REWARDS and tuple(OBJECTIVES) == TUNINGS


@pytest.mark.parametrize("name", REWARDS)
def test_examples_are_functions_of_their_number_and_right(name, tmp_path):
    task = tasks.TASKS[name]
    some = [task.example(i) for i in range(20)]
    assert some == [task.example(i) for i in range(20)] and len(set(some)) > 10
    assert some != [task.example(i, "valid") for i in range(20)]
    reward = task.reward([e.answer for e in some], [e.facts for e in some])
    assert reward.dtype == np.float32 and (reward == 1).all() and all(e.prompt for e in some)
    assert (task.reward(["", "?"], [some[0].facts] * 2) == 0).all()
    few = dataclasses.replace(task, texts=200)
    path = tasks.write_texts(few, str(tmp_path))
    records = [json.loads(line) for line in open(path, encoding="utf-8")]
    assert records == few.records() and len(records) == 200
    right = task.reward([r["text"] for r in records], [few.example(i).facts for i in range(200)])
    assert right.mean() == 1 if name != "permutations" else 0.4 < right.mean() < 0.6


@pytest.mark.parametrize("name, facts, rewards", [
    ("repeats", "7", {"7" * 15: 1, "3" * 15: 0, "7" * 14: 0, "7" * 14 + "3": 0}),
    ("repeats", ".", {"7" * 15: 1, "3" * 15: 1, "3" * 14: 0, "a" * 15: 0, "": 0}),
    ("permutations", "012345", {"543210": 1, "543211": 0, "54321": 0, "5432100": 0}),
    ("countdown", "3 7 12:33", {"3*7+12": 1, "12+3*7": 1, "7*3-12": .1, "3*7+11": 0, "3*7": 0, "7+12*3": .1, "": 0}),
    ("sudoku", "1...............", {"1234341221434321": 1, "2134341221434321": 0, "123434122143432": 0,
                                    "1243341221434321": 10 / 12})])
def test_rewards(name, facts, rewards):
    found = tasks.TASKS[name].reward(list(rewards), [facts] * len(rewards))
    np.testing.assert_allclose(found, list(rewards.values()), atol=1e-6)
    assert len(tasks.sudoku_grids()) == 288


@pytest.mark.parametrize("answer, facts, reward", [
    ("7", "7", 1), (" 7\n", "7", 1), ("8", "7", 0), ("It is 72.\n#### 72", "So\n#### 72", 1),
    ("#### $1,072", "#### 1072", 1), ("#### 1", "#### 1. One\ntwo", 0),
    ("#### 71", "So\n#### 72", .1), ("72", "So\n#### 72", 0), ("", "So\n#### 72", 0)])
def test_own_answers_agree_by_their_text_or_their_number(answer, facts, reward):
    assert tasks.agrees(answer, facts) == reward


def own_texts(folder, objective="", base="", **more):
    """Settings of a run of sums as records of a file, one of which is longer than a row of 12 bytes."""
    pairs = [{"ask": f"{a}+{b}=", "say": str(a + b)} for a in range(10) for b in range(10)]
    pairs.append({"ask": "what is one and one? ", "say": "2"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    more = dict(tune__task="answers", model__seq_len=12, data__source="files", data__prompt_field="ask",
                data__text_field="say", data__files=(str(folder / "pairs.jsonl"),), data__validation_fraction=.2,
                data__dir=str(folder / "data"), tune__group=8) | more
    return settings(objective, base, **more), pairs


def test_prompts_of_own_texts(tmp_path):
    """Every text that fits is a prompt once before one comes again; a row begins with it, what is behind its end is no
    answer, and the other split's texts are others."""
    config, pairs = own_texts(tmp_path)
    tokenizer, folder = stages.prepare(config, str(tmp_path / "run")).tokenizer, str(tmp_path / "data")
    found = {}
    for split, n in (("train", 8), ("valid", 1)):
        prompts = tune.Prompts(config, tokenizer, 257, split, folder)
        many = prompts.task.prompts
        assert prompts.rows == min(8, many)
        examples = prompts.examples(0, many * n)
        assert prompts.examples(1, many * n) == examples and len(set(examples)) == many
        found[split] = {(e.prompt, e.answer) for e in examples}
        z = prompts.canvas(examples)
        for row, example in zip(z, examples, strict=True):
            assert bytes(row[row != 257].tolist()).decode() == example.prompt and row[-1] == 257
        x = np.where(z == 257, tokenizer.eot, z)
        for row, example in zip(x, examples, strict=True):
            row[len(example.prompt) : len(example.prompt) + len(example.answer)] = list(example.answer.encode())
            row[-1] = ord("9")  # behind the end of text
        assert (prompts.judged(x, examples)[0] == 1).all()
    assert not found["train"] & found["valid"]
    assert found["train"] | found["valid"] == {(p["ask"], p["say"]) for p in pairs[:-1]}
    with pytest.raises(ConfigError, match="0 have a prompt .* fit model.seq_len=4"):
        tune.Prompts(dataclasses.replace(config, model=dataclasses.replace(config.model, seq_len=4)), tokenizer, 257,
                     "train", folder)


def test_a_run_is_rewarded_for_its_own_texts_answers(tmp_path):
    config, _ = own_texts(tmp_path, steps=2)
    train.train(config, str(tmp_path / "base"))
    config, _ = own_texts(tmp_path, "score", str(tmp_path / "base"), steps=4, tune__rows=100)
    tune.tune(config, str(tmp_path / "run"))
    lines = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl", encoding="utf-8")]
    assert [line["step"] for line in lines if "reward" in line] == [1, 2, 3, 4]
    assert [math.isfinite(line["valid_reward"]) for line in lines if "valid_nelbo" in line] == [True, True]
    tokens, timed = config.train.batch_size * config.model.seq_len, lines[1:]  # the first step compiles
    assert all(0 < line["tokens_per_s"] < tokens / (line["rollout_s"] + line["update_s"]) for line in timed)
    tune.evaluate(config, str(tmp_path / "run"))
    told = json.loads((tmp_path / "run" / "rewards.json").read_text())
    assert told["task"] == "answers" and told["rewards"][0]["prompts"] == 21  # all that fit, each once


def test_advantages_are_of_their_group():
    reward = np.array([1, 0, 0, 0, 1, 1, 1, 1], np.float32)
    np.testing.assert_allclose(advantages(reward, 4), [.75, -.25, -.25, -.25, 0, 0, 0, 0])
    np.testing.assert_allclose(advantages(reward, 4, "leave_one_out"), [1, *[-1 / 3] * 3, 0, 0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(advantages(reward, 4, "std"), np.array([3, -1, -1, -1, 0, 0, 0, 0]) / 3**.5, rtol=1e-6)


def test_wd1_weighs_by_two_softmaxes():
    """Group size times softmax(A) - softmax(-A): of (1, 0) e^.5 / (e^.5 + e^-.5) less its mirror image, twice."""
    up = np.exp(0.5) / (np.exp(0.5) + np.exp(-0.5))
    told = advantages(np.array([1, 0, 1, 1]), 2, "wd1")
    np.testing.assert_allclose(told, [2 * (2 * up - 1), -2 * (2 * up - 1), 0, 0], atol=1e-6)
    assert advantages(np.array([.9, .2, .4]), 3, "wd1").sum() == pytest.approx(0, abs=1e-6)


def test_advantages_of_calls():
    """"call": the end's reward less what the call before had drawn, of the first call less the mean of the others';
    "mdpo": the gain of a call and the mean of what is drawn later, standardised in the group."""
    reward, drawn = np.array([1.0, 0.0]), np.array([[0.0, 1.0, 1.0], [1.0, 0.5, 0.0]])
    np.testing.assert_allclose(advantages(reward, 2, "call", drawn), [[1, 1, 0], [-1, -1, -.5]])
    plain = np.array([[0 + 1, 1 + 1, 0 + 1], [1 + .25, -.5 + 0, -.5 + 0]])
    np.testing.assert_allclose(advantages(reward, 2, "mdpo", drawn), np.sign(plain - plain.mean(0)), rtol=1e-6)


def test_errors_of_rewards_count_prompts():
    """Sums of which all rollouts of a prompt are right or none: four prompts say as much as four rollouts would; of a
    single prompt its rollouts are what there is."""
    config, tokenizer = settings("score", "x", tune__task="sums", model__seq_len=16), tokenizers.make_tokenizer("bytes")
    for split, rows, error in (("train", 16, 0.25), ("train", 4, 0.25), ("valid", 16, (0.2 / 16) ** 0.5)):
        prompts = tune.Prompts(config, tokenizer, 257, split)
        examples = prompts.examples(0, rows)
        x = prompts.canvas(examples)
        x[x == 257] = tokenizer.eot
        for row, example in list(zip(x, examples, strict=True))[: rows // 4]:  # in the first case those of one prompt
            ids = tokenizer.encode(example.prompt + example.answer)
            row[: len(ids)] = ids
        found = prompts.judged(x, examples)[1]
        assert found["solved"] == 0.25 and found["reward_se"] == pytest.approx(error)


def test_answers_are_different_up_to_their_ends():
    """What a row has behind its end is no answer; the same answer to two prompts is two, but where each is asked once:
    then one answer to all of them is one, which tells a collapse."""
    config, tokenizer = settings("score", "x", tune__task="sums", model__seq_len=16), tokenizers.make_tokenizer("bytes")
    prompts = tune.Prompts(config, tokenizer, 257)
    examples = prompts.examples(0, 8)  # two prompts, four rollouts each
    x = np.where((z := prompts.canvas(examples)) == 257, ord("7") + np.arange(8)[:, None] % 2, z)
    for row, example in zip(x, examples, strict=True):
        row[len(example.prompt) : len(example.prompt) + 2] = ord("5"), tokenizer.eot
    assert len(np.unique(x, axis=0)) == 4 and prompts.judged(x, examples)[1]["distinct"] == 2 / 8
    alone = tune.Prompts(config, tokenizer, 257, "valid")
    examples = alone.examples(0, 8)
    x = np.where((z := alone.canvas(examples)) == 257, tokenizer.eot, z)
    for row, example in zip(x, examples, strict=True):
        row[len(example.prompt)] = ord("5")
    assert len({e.prompt for e in examples}) == 8 and alone.judged(x, examples)[1]["distinct"] == 1 / 8
    assert alone.judged(x[[0, *range(7)]], [examples[0], *examples[:7]])[1]["distinct"] == 1 / 8  # one comes twice


@pytest.mark.parametrize("changes, words", [
    ({"tune.objective": "score"}, "tune.task"), ({"tune.objective": "score", "tune.task": "sums"}, "train.init_from"),
    ({"data.source": "task"}, "tune.task"), ({"tune.task": "answers"}, "give data.prompt_field"),
    ({"data.source": "task", "tune.task": "answers"}, "writes texts: choose"), ({"tune.group": 1}, "at least 2"),
    ({"tune.objective": "score", "tune.task": "sums", "train.init_from": "x", "tune.group": 7}, "must divide"),
    ({"tune.objective": "score", "tune.task": "sums", "train.init_from": "x", "tune.updates": 2}, "constant"),
    ({"tune.objective": "elbo", "tune.task": "sums", "tune.advantage": "mdpo"}, "choose score"),
    ({"tune.objective": "spg", "tune.task": "sums", "tune.ratio": "text"}, "choose call or token"),
    ({"tune.objective": "score", "tune.task": "sums", "tune.ratio": "text", "tune.views": 1}, "choose call or token"),
    ({"tune.objective": "score", "tune.task": "sums", "tune.advantage": "mdpo", "tune.cost": 0.1}, "cost=0.1 does")])
def test_settings_that_do_not_go_together_are_one_line(changes, words):
    given = default()
    given.tokenizer.kind = "bytes"
    for name, value in changes.items():
        section, _, key = name.partition(".")
        given[section][key] = value
    with pytest.raises(ConfigError, match=words):
        resolve(given)


def settings(objective="", base="", steps=4, **more):
    c = recipe("permutations", *[objective] * bool(objective))
    c.model.width, c.train.batch_size, c.tune.group, c.tune.rows, c.train.steps = 8, 16, 4, 8, steps
    c.train.init_from, c.train.log_every, c.checkpoint.every = base, 1, 2
    c.evaluate.rows_in_training, c.evaluate.rows, c.evaluate.draws = 4, 4, 2
    for name, value in more.items():
        section, _, key = name.partition("__")
        c[section][key] = value
    return resolve(c)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    train.train(settings(), str(folder))
    return str(folder)


class Stop(Exception):
    pass


@pytest.mark.slow
def test_it_resumes_between_steps_bit_for_bit(base, tmp_path, monkeypatch):
    """Killed at its third step and gone on with; inner updates, ratios, the reference and one call of each rollout."""
    more = dict(tune__updates=2, tune__kl=0.1, tune__views=1, train__microbatches=2, tune__advantage="leave_one_out")
    config = settings("score", base, **more)
    uneven = dataclasses.replace(tasks.TASKS["permutations"], judge=lambda answer, facts: len(answer.encode()) % 2)
    monkeypatch.setitem(tune.TASKS, "permutations", uneven)  # a base of four steps writes no permutation
    whole = tune.tune(config, str(tmp_path / "whole"))
    step = tune.Tuning._step
    with monkeypatch.context() as patch:
        patch.setattr(tune.Tuning, "_step", lambda self, state, *rest: (
            step(self, state, *rest) if int(state.step) < 3 else (_ for _ in ()).throw(Stop())))
        with pytest.raises(Stop):
            tune.tune(config, str(tmp_path / "cut"))
    with pytest.raises(ConfigError, match="generate.steps=3"):
        tune.tune(settings("score", base, generate__steps=3, **more), str(tmp_path / "cut"))
    again = tune.tune(config, str(tmp_path / "cut"))
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(
        jax.tree.leaves(whole), jax.tree.leaves(again), strict=True))
    records = train.read_metrics(str(tmp_path / "cut" / "metrics.jsonl"))
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert 0 < records[0]["reward"] < 1 and records[0]["grad_norm"] > 0
    assert all(0 <= r["reward"] <= 1 and 0 < r["distinct"] <= 1 and r["rollout_s"] > 0 for r in records)
    assert "valid_reward" in records[-1] and "valid_nelbo" in records[-1]
    tune.evaluate(config, str(tmp_path / "cut"))
    told = json.loads((tmp_path / "cut" / "rewards.json").read_text())
    assert [r["steps"] for r in told["rewards"]] == [3, 6, 12] and [r["calls"] for r in told["rewards"]] == [3, 6, 7]


@pytest.mark.slow
@pytest.mark.parametrize("objective, more", [
    ("elbo", {}), ("one_pass", {"tune__advantage": "wd1"}), ("coupled", {}), ("spg", {}),
    ("nodes", {"tune__ratio": "text", "tune__updates": 2})])
def test_surrogates_run(base, tmp_path, objective, more):
    state = tune.tune(settings(objective, base, 2, **more), str(tmp_path))
    assert int(state.step) == 2 and int(state.skipped) == 0


@pytest.mark.slow
@pytest.mark.parametrize("method, options", [("dcolt", ""), ("rcr", "block=0")])
def test_eight_devices_are_one(method, options):
    """Rollouts and the update, divided over rows and over fsdp, against one device."""
    config = settings("score", "somewhere", tune__updates=2, optimizer__eps=1e-3, model__order=True,
                      generate__method=method, generate__options=options)  # Adam does not blow rounding up
    hierarchy = Hierarchy.from_parents([], 257)
    network, process = build(config, hierarchy)
    z = np.full((16, 8), hierarchy.mask_id, np.int32)
    z[:, 0] = ord("=")
    numbers, key = sampler.numbers_of(config.generate, 8), jax.random.key(0)
    found = []
    for devices in (1, 8):
        given = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, fsdp=min(devices, 2)))
        mesh = parallel.make_mesh(given, jax.devices()[:devices])
        tx, _ = make_optimizer(config)
        abstract, where = abstract_state(config, network, tx, mesh)
        state = jax.jit(lambda k: init_state(config, network, tx, k), out_shardings=where)(key)  # noqa: B023
        index = np.arange(16, dtype=np.int32)
        rollout = make_rollout(network, process, config.generate, mesh)
        roll = parallel.compile_sample_step(rollout, mesh, abstract.params)
        rows = roll((state.params, numbers), parallel.put_batch(mesh, {"z": z, "index": index}), key)
        rows = {name: np.asarray(value) for name, value in rows._asdict().items() if value is not None}
        rows |= {"advantage": np.linspace(-1, 1, 16).astype(np.float32), "index": index}
        update = parallel.compile_step(make_update(config, network, process, tx, mesh), mesh, where)
        state, metrics = update(state, parallel.put_batch(mesh, rows), (key, {}))
        found.append((rows, float(metrics["loss"]), jax.tree.map(np.asarray, state.params)))
    (rows, loss, params), (others, other, moved) = found
    assert all((rows[name] == others[name]).all() for name in rows) and other == pytest.approx(loss, abs=1e-4)
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), params, moved))) < 1e-5


@pytest.mark.slow
def test_texts_of_calls_are_judged_where_there_are_any(base, tmp_path):
    with pytest.raises(ConfigError, match="needs a head for an order.* model.order=True"):
        tune.tune(settings("score", base, generate__method="dcolt"), str(tmp_path))
    for method, options in (("max_prob", ""), ("rcr", "block=4"), ("remdm", "")):
        config = settings("score", base, tune__advantage="call", generate__method=method, generate__options=options)
        with pytest.raises(ConfigError, match="draws no whole texts: choose rcr or low_confidence with block=0"):
            tune.tune(config, str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("method, head, calls", [("dcolt", "order", [1, 3, 6]), ("ctrldiff", "block_lengths", None)])
def test_a_head_for_choices_is_trained_sampled_and_exported(base, tmp_path, method, head, calls):
    """From a base without one: both parts move, resume and export keep it, its method reads it."""
    more = dict(generate__method=method, tune__updates=2, tune__kl=0.1, generate__steps=3, tune__cost=0.01)
    state = tune.tune(settings("score", base, 3, **{f"model__{head}": True}, **more), str(tmp_path))
    start, own = loading.load_here(base).params, loading.load_here(str(tmp_path), "latest")
    assert head not in start and np.abs(np.asarray(own.params[head]["out"])).max() > 0
    assert int(state.step) == 3 and int(state.skipped) == 0
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(
        jax.tree.leaves(start["stack"]), jax.tree.leaves(own.params["stack"]), strict=True))
    config = loading.saved_config(str(tmp_path))
    tune.evaluate(config, str(tmp_path))
    told = [r["calls"] for r in json.loads((tmp_path / "rewards.json").read_text())["rewards"]]
    assert told == calls if calls else len(told) == 1 and 4 <= told[0] <= 7
    given = hdlm_jax.load(str(tmp_path))
    moved = hdlm_jax.load(export.export(config, str(tmp_path)))
    texts = given.generate(4, method=method, steps=3, prompt="=")
    assert texts == moved.generate(4, method=method, steps=3, prompt="=") and all(t.startswith("=") for t in texts)


@pytest.mark.slow
@pytest.mark.parametrize("method, options, advantage", [
    ("rcr", "block=0", "call"), ("low_confidence", "block=0", "mdpo"), ("low_confidence", "block=4", "std"),
    ("ass", "draw=sample", "mean")])
def test_other_rollouts_are_trained_on(base, tmp_path, method, options, advantage):
    config = settings("score", base, 2, generate__method=method, generate__options=options, tune__advantage=advantage,
                      generate__steps=3, train__microbatches=2, tune__updates=2)
    state = tune.tune(config, str(tmp_path))
    assert int(state.step) == 2 and int(state.skipped) == 0
