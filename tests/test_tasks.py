"""Tasks: every token once in both protocols, choices against a direct computation, answers that resume."""

import dataclasses
import functools
import gzip
import json
import math
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from hdlm_jax import config as config_lib
from hdlm_jax.config import ConfigError
from hdlm_jax.data.documents import Reader
from hdlm_jax.diffusion import plans
from hdlm_jax.diffusion.draws import fold
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.evaluation import benchmarks, requests
from hdlm_jax.evaluation.elbo import evaluator_of
from hdlm_jax.evaluation.rows import Piece, per_text, split, split_all, to_rows
from hdlm_jax.evaluation.scorer import PILOT, Choices, Scorer, _best_two, encode_pair, stratified_se
from hdlm_jax.runs import tasks
from hdlm_jax.training import loading

S = tiny.SEQ_LEN
TEXTS = ["short", "a text that is a good deal longer than the sixteen bytes of a row", "x" * 15, "y" * 16, "é"]


@functools.cache
def loaded():
    return loading.load_here(str(tiny.trained()[1]))


def scorer(run=None, **settings):
    """batch_size: one size of batch for all tests, to be compiled once."""
    return Scorer(run or loaded(), dataclasses.replace(loaded().config.evaluate, **{"batch_size": 8} | settings))


def encode(text):
    return loaded().tokenizer.encode(text)


def asked(context, *choices):
    return Choices([encode(context)] * len(choices), [encode(choice) for choice in choices])


# ------------------------------------------------------------------------------------------------------- protocols


def passages(texts=TEXTS):
    return [benchmarks.Passage(text, len(text.split()) + 1) for text in texts]


@pytest.mark.parametrize("protocol", ["document", "packed"])
def test_every_token_is_scored_once(protocol):
    run = loaded()
    ids = [np.append(encode(text), run.tokenizer.eot) for text in TEXTS]
    pieces = split(np.concatenate(ids), S) if protocol == "packed" else split_all(ids, S)[0]
    rows = to_rows(pieces, S, run.tokenizer.eot)
    wanted = sum(len(encode(text)) + 1 for text in TEXTS)
    assert rows["score"].sum() == wanted == 108
    np.testing.assert_array_equal(rows["x"][rows["score"]], np.concatenate(ids))
    np.testing.assert_array_equal(rows["segment"], np.where(rows["score"], 0, -1))  # padding is not seen
    found = tasks.perplexity(scorer(draws=2), passages(), protocol, words=True)
    assert found["tokens"] == wanted and found["documents"] == 5
    sizes = [math.ceil(len(i) / S) for i in ids]
    assert found["rows"] == (sum(sizes) if protocol == "document" else math.ceil(wanted / S)) == len(pieces)


def test_pieces_know_their_texts():
    texts = [np.arange(1, 8), np.zeros(0, int), np.arange(3), np.arange(4)]
    pieces, owner = split_all(texts, 3, given=[4, 0, 3, 1], ends=True)
    assert owner.tolist() == [0, 0, 3, 3], "a piece of prompt alone is left out"
    assert [(p.ids.tolist(), p.given, p.ends) for p in pieces] == [
        ([4, 5, 6], 1, False), ([7], 0, True), ([0, 1, 2], 1, False), ([3], 0, True)]
    np.testing.assert_array_equal(per_text(np.array([[1, 2, 4, 8], [1, 1, 1, 1]]), owner, 4),
                                  [[3, 0, 0, 12], [2, 0, 0, 2]])


def test_packed_is_what_evaluation_does():
    """Windows over the joined documents are rows of `evaluate`: same noise, same nats."""
    run = loaded()
    s = scorer(draws=3)
    flat = np.concatenate([np.append(encode(text), run.tokenizer.eot) for text in TEXTS])
    padded = np.append(flat, np.full(-len(flat) % S, run.tokenizer.eot)).reshape(-1, S).astype(np.int32)
    inside = (np.arange(padded.size) < len(flat)).reshape(-1, S)
    rows = {"x": padded, "segment": inside.astype(np.int32) - 1, "score": inside}
    reference = evaluator_of(run, s.settings).nats(run.params, rows, 3)
    found = s.nats(split(flat, S), 3)
    for a, b in zip(found, reference, strict=True):
        np.testing.assert_array_equal(a, b)


def test_measures_of_perplexity():
    found = tasks.perplexity(scorer(draws=2), passages(), "document", words=True)
    size, nats = sum(len(text.encode()) for text in TEXTS), found["nelbo"] * found["tokens"]
    assert found["bytes"] == size == 103 and found["words"] == 24
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size)
    assert found["perplexity"] == pytest.approx(math.exp(nats / 108))
    assert math.log(found["word_perplexity"]) == pytest.approx(nats / 24)
    assert found["word_perplexity_se"] == pytest.approx(found["word_perplexity"] * found["se"] * 108 / 24)
    assert "words" not in tasks.perplexity(scorer(draws=2), passages(), "document", words=False)


def wide_run(seq_len):
    """The tiny run with longer rows (its parameters do not depend on their length)."""
    run = loaded()
    config = dataclasses.replace(run.config, model=dataclasses.replace(run.config.model, seq_len=seq_len))
    return dataclasses.replace(run, config=config)


@pytest.mark.slow
def test_rows_of_other_widths_say_the_same():
    """Short pieces are scored in narrow rows: less padding, the same noise at every token, the same nats."""
    s = scorer(wide_run(64))
    pieces = [Piece(encode(text)[:60], given) for text in TEXTS for given in (0, 1)]
    narrow, _, _ = s.nats(pieces, 3)
    assert s.evaluator.cache_info().currsize == 2  # rows of 16 and 64
    s._width = lambda tokens: 64
    wide, _, _ = s.nats(pieces, 3)
    assert s.evaluator.cache_info().currsize == 2
    np.testing.assert_allclose(narrow, wide, rtol=1e-5)


# --------------------------------------------------------------------------------------------------------- ranking


def directly(question, seed, draws, number=0):
    """Conditional NELBO estimates [draws, choices] of one round, row by row from the process and the dense network."""
    run = loaded()
    rng = np.random.Generator(np.random.Philox(key=[seed, number], counter=[0, 0, 0, 0]))
    u = (np.arange(draws) + rng.random(draws)) / draws
    pair = rng.integers(2**31, size=(draws, 1))[:, 0]
    evaluator = evaluator_of(run)
    tau, q = evaluator.proposal.quantile(u)
    out = np.zeros((draws, len(question.choices)))
    keys = fold(jnp.broadcast_to(jax.random.key(seed), (draws,)), jnp.asarray(pair))
    t = jnp.asarray(tau, jnp.float32)

    @jax.jit
    def rate(x, scored, segment):
        z = jnp.where(scored, run.process.corrupt(keys, x, tau=t), x)
        return run.process.nelbo_rate(dense_logits(z, -jnp.expm1(-t), segment), x, z, t)

    for c, (context, choice) in enumerate(zip(question.contexts, question.choices, strict=True)):
        n = len(context) + len(choice)
        x = jnp.asarray([[*context, *choice, *[run.tokenizer.eot] * (S - n)]] * draws, jnp.int32)
        scored, segment = np.zeros(x.shape, bool), np.zeros(x.shape, np.int32)
        scored[:, len(context) : n], segment[:, n:] = True, -1
        out[:, c] = np.asarray(rate(x, scored, segment))[:, len(context) : n].sum(-1) / q
    return out


def dense_logits(z, t, segment):
    run = loaded()
    return run.network.apply({"params": run.params}, z, t, segment)


def test_a_choice_costs_what_the_process_says():
    s = scorer(draws=6, most_draws=6, seed=3)
    questions = [asked("the very ", "much", "forty", "not"), asked("of ", "short", "docum")]
    found = s.rank(questions)
    for number, question in enumerate(questions):
        by_draw = directly(question, 3, 6, number)
        np.testing.assert_allclose(found.nats[number], by_draw.mean(0), rtol=2e-4)
        best, second = np.argsort(by_draw.mean(0))[:2]
        se = stratified_se(by_draw[:, best] - by_draw[:, second])
        assert found.se[number] == pytest.approx(se, rel=1e-3) and found.draws[number] == 6
    assert not found.cut.any()


def test_equal_choices_differ_by_nothing():
    """The same choice twice gets the same times, the same noise: not a bit of difference."""
    s = scorer(draws=4, most_draws=8, target_se=1e-9)
    found = s.rank([asked("the ", "same", "same"), asked("a ", "bc", "de")])
    assert found.nats[0][0] == found.nats[0][1] and found.se[0] == 0 and found.draws.tolist() == [8, 8]
    assert found.reached.tolist() == [True, False]


@pytest.mark.slow
def test_common_random_numbers_help():
    """Noise that two similar choices share drops out of their difference."""
    s = scorer(draws=64, most_draws=64, target_se=1e-9)
    (values,) = s._draw([tasks_fit(asked("the very m", "uch", "uck"))], [64], 0, "")
    apart = stratified_se(values[:, 0]) ** 2 + stratified_se(values[:, 1]) ** 2
    together = stratified_se(values[:, 0] - values[:, 1]) ** 2
    assert together < 0.7 * apart


def tasks_fit(question):
    from hdlm_jax.evaluation.scorer import _fit

    return _fit(question, S)


def test_draws_go_where_they_are_needed():
    """As many as a pilot asks for, and the pilot itself is not in the mean: it would say nothing costs nothing."""
    s = scorer(draws=4, most_draws=64, target_se=0.05)
    questions = [asked("the ", "a", "b"), asked("the v", "ery much", "ery like"), asked("an", "x", "x")]
    found = s.rank(questions)
    assert found.reached.tolist() == (found.se <= 0.05).tolist()
    assert found.draws[2] == PILOT + PILOT < max(found.draws) <= PILOT + 64, found.draws
    fitted = [tasks_fit(question) for question in questions]
    pilot = s._draw(fitted, [PILOT] * 3, 0, "")
    for i, (nats, draws) in enumerate(zip(found.nats, found.draws, strict=True)):
        wanted = min(max(math.ceil(PILOT * (_best_two(pilot[i]) / 0.05) ** 2), PILOT), 64)
        assert draws == PILOT + wanted
        again = s._draw(fitted, [wanted if j == i else 1 for j in range(3)], PILOT, "")[i]
        np.testing.assert_allclose(nats, again.mean(0), rtol=1e-5)
    alone = s.rank(questions[:1])  # a question's numbers are its own, whatever else is asked
    np.testing.assert_allclose(alone.nats[0], found.nats[0], rtol=1e-5)


def test_standard_error_of_strata():
    """On average the squared error it says is the variance of the mean, which strata have made small."""
    rng = np.random.default_rng(0)

    def one(n):
        u = (np.arange(n) + rng.random(n)) / n
        values = np.sin(3 * u) + 0.3 * rng.standard_normal(n)
        return values.mean(), stratified_se(values)

    means, said = zip(*(one(48) for _ in range(4000)), strict=True)
    assert math.sqrt(np.mean(np.square(said))) == pytest.approx(np.std(means), rel=0.06)
    assert math.isnan(stratified_se(np.ones(1)))
    assert stratified_se(np.array([1.0, 3.0])) == pytest.approx(np.std([1, 3], ddof=1) / math.sqrt(2))


def test_long_contexts_are_cut_on_the_left():
    s = scorer(draws=2, most_draws=2)
    question = asked("many words in front of the very ", "much", "like th")
    (pieces, cut) = tasks_fit(question)
    assert cut and [[len(p.ids) for p in one] for one in pieces] == [[13], [16]]
    whole = encode("many words in front of the very ")
    for (piece,), choice in zip(pieces, question.choices, strict=True):  # the same context for both
        np.testing.assert_array_equal(piece.ids, [*whole[-9:], *choice])
        assert piece.given == 9
    longer = asked("ab", "z" * 40, "y" * 3)
    pieces, cut = tasks_fit(longer)
    assert cut and [[(len(p.ids), p.given) for p in one] for one in pieces] == [[(16, 0), (16, 0), (8, 0)], [(3, 0)]]
    found = s.rank([question, longer, asked("ab", "c", "d")])
    assert found.cut.tolist() == [True, True, False] and found.nats[1][0] > 4 * found.nats[1][1]


class Exact(HierarchicalProcess):
    exact = True


@pytest.mark.slow
def test_an_exact_process_takes_one_draw():
    run = loaded()
    process = Exact(run.process.hierarchy, run.process.chain)
    s = scorer(dataclasses.replace(run, process=process), draws=8)
    found = s.rank([asked("the ", "a", "b"), asked("the v", "ery", "ary", "ory")])
    assert found.draws.tolist() == [1, 1] and found.reached.all() and (found.se == 0).all()
    assert s.nats([Piece(encode("abc"))], 8)[0].shape[0] == 1


def test_encode_pair():
    """Blanks at the seam go with the continuation, and the parts are the tokens of the whole."""
    given, rest = encode_pair(loaded().tokenizer, "a b  ", "c d")
    assert bytes(given.astype(np.uint8)) == b"a b" and bytes(rest.astype(np.uint8)) == b"  c d"
    given, rest = encode_pair(loaded().tokenizer, "", "cd")
    assert len(given) == 0 and len(rest) == 2


def test_ranking_counts_right_answers():
    """Against the scores themselves; lengths in characters do not count the leading blank."""
    question = benchmarks.Question(("the",) * 3, (" a", " bbbb", " cc"), 1)

    class Fixed:
        run, seq_len, settings = loaded(), S, None

        def rank(self, questions):
            from hdlm_jax.evaluation.scorer import Ranking

            n = len(questions)
            return Ranking([np.array([4.0, 11.0, 7.4])] * n, np.zeros(n), np.full(n, 8), np.full(n, True),
                           np.full(n, False))

    out = tasks.ranking(Fixed(), [question, question._replace(label=0)])
    assert out["accuracy"] == 0.5 and out["accuracy_se"] == pytest.approx(math.sqrt(0.125))  # 4 is the least
    assert out["accuracy_per_token"] == 0.5  # 4/2, 11/5, 7.4/3
    assert out["accuracy_per_character"] == 0.5  # 4/1, 11/4, 7.4/2: the second
    only = tasks.ranking(Fixed(), [question])
    assert (only["accuracy"], only["accuracy_per_token"], only["accuracy_per_character"]) == (0, 0, 1)
    assert only["nelbo_of_right"] == pytest.approx(11 / 5) and only["draws"] == 8 and only["questions"] == 1


@pytest.mark.slow
def test_greedy_takes_the_likeliest_words():
    """One token by hand: the cluster of the likeliest word, then the likeliest word of it; no look behind the text."""
    run, s, h = loaded(), scorer(), loaded().hierarchy
    context = encode("the very m")
    (word,) = s.greedy([context], [1])
    level = jnp.asarray([[0] * 10 + [2] + [0] * 5])
    keys = fold(jnp.broadcast_to(jax.random.key(run.config.generate.seed), (1,)), jnp.zeros(1, int))
    times = plans.plan(fold(keys, 0), run.process.chain, level, "events").clock[:, :2]
    logits = jax.jit(lambda z, t: dense_logits(z, t, jnp.zeros(z.shape, jnp.int32))[0, -1])
    first = int(jnp.argmax(logits(jnp.asarray([[*context, h.mask_id]]), times[:, 0])))
    cluster = h.anc[1][first]
    second = logits(jnp.asarray([[*context, h.state_id(1, cluster)]]), times[:, 1])
    assert word.tolist() == [int(jnp.argmax(jnp.where(jnp.asarray(h.anc[1]) == cluster, second, -jnp.inf)))]
    both = s.greedy([context, encode("a much longer text than fits in here")], [1, 3])
    assert both[0].tolist() == word.tolist() and len(both[1]) == 3


# ------------------------------------------------------------------------------------------------------------ data


def small_data(folder):
    def put(path, text, opener=open):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        with opener(folder / path, "wt", encoding="utf-8", newline="") as file:
            file.write(text)

    mcq = "".join(json.dumps({"question": f"q{i}", "choices": ["a b", "c"], "label": i % 2}) + "\n" for i in range(4))
    put("ptb/ptb.test.txt.gz", " it was n't N \n of N <unk> \n", gzip.open)
    put("wikitext2/wiki.test.raw", " = One = \r\n \r\n a @-@ b . c \r\n = = Part = = \r\n = Two = \r\n d , e \r\n")
    put("lambada/lambada_test.jsonl", '{"text": "“Who,” said he, said she"}\n{"text": "a b\\nc"}\n')
    put("ag_news/test.csv", '"1","Title","It #39;s a ""text"""\n')
    put("openwebtext/owt_1000docs.jsonl", '{"text": "one\\n\\ntwo"}\n')
    put("hellaswag/hellaswag_val_full.txt", "Act: he\n3\nw\nx\ny\nz it\nB: c\n0\n1\n2\n3\n4\n")
    for name in ("ARC-Easy", "ARC-Challenge", "piqa", "openbookqa"):
        put(f"mcq/{name}.jsonl", mcq)
    put("gsm8k/test.jsonl", json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    put("mcq/winogrande.dev.jsonl", json.dumps({"sentence": "Ann saw Bo so _ left early.", "option1": "Ann",
                                                "option2": "Bo", "answer": "2"}) + "\n")
    return folder


def test_items_of_every_task(tmp_path):
    data = small_data(tmp_path)
    items = {name: benchmarks.load(name, benchmarks.find(name, str(data)))
             for name, task in benchmarks.TASKS.items() if task.path}
    assert items["ptb"] == [("it wasn't N", 5), ("of 1 ?", 4)]  # the N at the end stays; words of the original
    assert items["wikitext2"] == [("= One =\na-b. c\n== Part ==", 4 + 6 + 6), ("= Two =\nd, e", 4 + 4)]
    assert [p.text for p in items["lambada"]] == ['\n"Who," said he, said she', "\na b\nc"]
    assert items["ag_news"][0].text == 'Title It #39;s a "text"' and items["openwebtext"][0].text == "one\n\ntwo"
    assert items["hellaswag"][0] == (("Act: he",) * 4, (" w", " x", " y", " z it"), 3)
    assert items["arc_easy"][1] == (("Question: q1\nAnswer:",) * 2, (" a b", " c"), 1) == items["piqa"][1]
    assert items["openbookqa"][0].contexts == ("q0", "q0")
    assert items["winogrande"] == [(("Ann saw Bo so Ann", "Ann saw Bo so Bo"), (" left early.",) * 2, 1)]
    assert items["gsm8k"] == [("1 + 1?", "#### 2")]
    assert items["lambada_last_word"][1] == (("a b",), (" c",), 0)
    assert len(benchmarks.load("piqa", benchmarks.find("piqa", str(data)), limit=3)) == 3


def test_bad_data_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="task piqa needs mcq/piqa.jsonl there, plain or with .gz") as error:
        benchmarks.find("piqa", str(tmp_path))
    for name, text in (("piqa", '{"question": "a"}\n'), ("hellaswag", "one\ntwo\n"), ("piqa", "{"), ("piqa", "\n"),
                       ("ag_news", "1,2\n")):
        path = tmp_path / "bad"
        path.write_text(text)
        with pytest.raises(ValueError, match=f"evaluate.tasks: {name}") as error:
            benchmarks.load(name, str(path))
        assert "\n" not in str(error.value)


def test_real_files(data_dir):
    sizes = {"ptb": (3761, 82430), "wikitext2": (62, 244102), "lambada": (5153, None), "ag_news": (7600, None),
             "hellaswag": (10042, 4), "arc_easy": (2376, None), "arc_challenge": (1172, None), "piqa": (1838, 2),
             "openbookqa": (500, 4), "winogrande": (1267, 2), "lambada_last_word": (5153, 1), "gsm8k": (1319, None)}
    for name, (count, detail) in sizes.items():
        items = benchmarks.load(name, benchmarks.find(name, str(data_dir)))
        assert len(items) == count, name
        if benchmarks.TASKS[name].ranks:
            assert all(0 <= q.label < len(q.choices) == len(q.contexts) for q in items)
            assert detail is None or {len(q.choices) for q in items} == {detail}
        elif detail:  # words as the field counts them: 78,669 + 3,761 of PTB; 241,211 + a line end each of WikiText
            assert sum(p.words for p in items) == detail


# --------------------------------------------------------------------------------------------------------- the mode


def configured(data, **settings):
    config = tiny.read_recipe(tiny.trained()[0])
    settings = {"draws": 2, "most_draws": 4, "batch_size": 8, "tasks_data": str(data), **settings}
    return config_lib.resolve({**config.as_dict(), "evaluate": dataclasses.asdict(config.evaluate) | settings})


@pytest.fixture
def workdir(tmp_path):
    """The trained run, to write results beside it."""
    folder = tmp_path / "run"
    folder.mkdir()
    for path in tiny.trained()[1].iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def test_results_are_written_reused_and_gone_on_with(tmp_path, workdir, monkeypatch, capsys):
    data = small_data(tmp_path / "data")
    own = tmp_path / "own.txt"
    own.write_text("two\n\ndocuments")
    names = ("ptb", "piqa", "files", "lambada_last_word")
    config = configured(data, tasks=names, files=(str(own),), limit=3)
    calls = []
    for name in ("perplexity", "ranking"):
        real = getattr(tasks, name)
        monkeypatch.setattr(tasks, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
    real, killed = tasks.ranking, []

    def dies(*arguments):
        killed.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "ranking", dies)
    with pytest.raises(KeyboardInterrupt):
        tasks.run(config, str(workdir))
    assert sorted(json.loads((workdir / "tasks.json").read_text())) == ["ptb/document", "ptb/packed"] and killed
    monkeypatch.setattr(tasks, "ranking", real)
    calls.clear()
    found = tasks.run(config, str(workdir))
    assert calls == ["ranking", "perplexity", "perplexity", "ranking"]
    assert json.loads((workdir / "tasks.json").read_text()) == json.loads(json.dumps(found))
    assert found["ptb/packed"]["tokens"] == 11 + 6 + 2 and found["files/document"]["documents"] == 1
    assert {name: found[name]["given"] for name in ("ptb/document", "ptb/packed", "piqa")} == {
        "ptb/document": "lengths", "ptb/packed": "nothing", "piqa": "lengths"}
    assert found["piqa"]["limited"] and found["piqa"]["questions"] == 3 and not found["ptb/packed"]["limited"]
    assert found["piqa"]["chance"] == 0.5 and found["lambada_last_word"]["chance"] is None
    assert found["piqa"]["made_from"]["step"] == 3 and found["lambada_last_word"]["word_perplexity"] > 1
    text = (workdir / "tasks.md").read_text()
    cells = re.sub(" +", " ", text)
    assert re.search(r"\| piqa\* \| lengths \| [\d.]+ \[[\d.]+, [\d.]+\] \|.* \| 50.0 \|", cells)
    assert "| ptb | packed | nothing | ptb |" in cells and text in capsys.readouterr().out
    calls.clear()
    assert tasks.run(config, str(workdir)) == found and not calls
    other = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, limit=0, tasks=("piqa", "ptb")))
    tasks.run(other, str(workdir))  # more questions; the same two documents
    assert calls == ["ranking"] and json.loads((workdir / "tasks.json").read_text())["files/packed"]


def test_settings_that_cannot_work(tmp_path, workdir):
    small_data(tmp_path)
    for settings, said in (
        (dict(tasks=("hellaswg",)), "evaluate.tasks='hellaswg': choose one of .*; did you mean 'hellaswag'"),
        (dict(tasks=("files",)), "evaluate.files=.*needs its files"),
        (dict(protocols=("both",)), "evaluate.protocols='both': choose one of document, packed"),
        (dict(target_se=0.0), "evaluate.target_se=0.0: must be positive"),
        (dict(limit=-1), "evaluate.limit=-1"),
    ):
        with pytest.raises(ConfigError, match=said):
            configured(tmp_path, **settings)
    for settings, said in ((dict(tasks=("lm1b",), lm1b=("none-*",)), "evaluate.lm1b: no file matches 'none-\\*'"),
                           (dict(tasks=("ptb",), tasks_data="nowhere"), "evaluate.tasks_data='nowhere': task ptb")):
        with pytest.raises(ConfigError, match=said):
            tasks.run(configured(tmp_path, **settings), "no run, and it is not asked for")


def test_a_tuple_from_the_command_line(monkeypatch):
    from absl import flags
    from ml_collections import config_flags

    values, argv = flags.FlagValues(), ["", "--config.evaluate.tasks=('ptb','wikitext2')", "--config.evaluate.limit=5"]
    monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for the settings
    holder = config_flags.DEFINE_config_dict("config", config_lib.default(), flag_values=values)
    values(argv)
    evaluate_settings = config_lib.resolve(holder.value).evaluate
    assert evaluate_settings.tasks == ("ptb", "wikitext2") and evaluate_settings.limit == 5


@pytest.mark.slow
def test_weights_or_their_average(tmp_path):
    """A run with an average is measured by it, unless evaluate.ema=False."""
    from hdlm_jax.runs import train

    recipe = tiny.write_recipe(tmp_path)
    recipe.write_text(recipe.read_text().replace("    return c", "    c.optimizer.ema = 0.5\n    return c"))
    config = tiny.read_recipe(recipe)
    train.train(config, str(tmp_path / "run"))
    average, last = (loading.load_run(config, str(tmp_path / "run"), "latest", ema) for ema in (True, False))
    assert average.ema and not last.ema
    pairs = list(zip(jax.tree.leaves(average.params), jax.tree.leaves(last.params), strict=True))
    assert any(not np.array_equal(a, b) for a, b in pairs)


def test_lm1b_and_other_files(tmp_path):
    (tmp_path / "news.en.heldout-00000-of-00050").write_text("They 've said so .\n\nIs it ?\n")
    config = configured(tmp_path, tasks=("lm1b",), lm1b=(str(tmp_path / "news.en.heldout-*"),))
    (name, source), = tasks.sources(config).items()
    assert tasks._read(config, name, source) == ([("They've said so.", 6), ("Is it?", 4)], "lm1b")
    bad = tmp_path / "a.jsonl"
    bad.write_text('{"text": "x"}\n{"text": 3}\n')
    with pytest.raises(ValueError, match="line 2: field 'text' must be a string"):
        benchmarks.load("files", [str(bad)], reader=Reader())


# ---------------------------------------------------------------------------------------------------- the harness


def request(*args, **more):
    return types.SimpleNamespace(args=args, **more)


@pytest.mark.slow
def test_loglikelihoods_are_rankings():
    s = scorer(draws=4, most_draws=4)
    pairs = [("the very", " much"), ("the very", " like"), ("of", " forty")]
    found = requests.loglikelihood(s, [request(*pair) for pair in pairs])
    ranked = s.rank([asked("the very", " much", " like"), asked("of", " forty")])
    assert [value for value, _ in found] == [-v for v in np.concatenate(ranked.nats)]
    assert all(isinstance(greedy, bool) for _, greedy in found)
    apart = [request(*pair, task_name="t", doc_id=i) for i, pair in enumerate(pairs)]
    assert requests.loglikelihood(s, apart)[1][0] != found[1][0]  # documents of their own have their own noise
    (word,) = s.greedy([encode("the very m")], [2])
    said = loaded().tokenizer.decode(word)
    both = requests.loglikelihood(s, [request("the very m", said), request("the very m", "ZZ")])
    assert [greedy for _, greedy in both] == [True, False]
    assert not requests.loglikelihood(s, [request("the very m", said)], greedy=False)[0][1]


def test_rolling_likelihoods_are_of_every_token():
    s = scorer(draws=4)
    texts = [TEXTS[1], "", "short"]
    found = requests.loglikelihood_rolling(s, [request(text) for text in texts])
    pieces, _ = split_all([encode(text) for text in texts], S)
    nats = s.nats(pieces, 4)[0].mean(0).sum(-1)
    assert found == pytest.approx([-nats[:-1].sum(), 0.0, -nats[-1]])
    assert sum(len(p.ids) for p in pieces) == sum(map(len, texts))


@pytest.mark.slow
def test_texts_end_at_a_stop(monkeypatch):
    g = dataclasses.replace(loaded().config.generate, steps=4)
    s, tokenizer = scorer(), loaded().tokenizer
    out = requests.generate_until(s, [request("the ", {"until": ["\n\n"], "max_gen_toks": 5, "do_sample": True}),
                                      request("a long text in front of it", {"until": "."})], g, most=7)
    assert len(out) == 2 and all(isinstance(text, str) for text in out)
    asked_for = {}

    def fill(self, contexts, counts, settings):
        asked_for[settings.temperature] = counts
        return [np.append(encode("one. Q: two"), [tokenizer.eot, 65, 66]) for _ in contexts]

    monkeypatch.setattr(Scorer, "fill", fill)
    cases = [({"until": ["Q:", "."]}, "one"), ({"until": "Q:"}, "one. "), ({}, "one. Q: two"),
             ({"until": ["none"], "do_sample": True, "temperature": 0.7, "max_gen_toks": 99}, "one. Q: two")]
    assert requests.generate_until(s, [request("a", how) for how, _ in cases], g) == [text for _, text in cases]
    assert asked_for == {0.0: [S - 1] * 3, 0.7: [S - 1]}


def test_without_the_harness_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "hdlm_jax.evaluation.harness", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'hdlm_jax\[lm-eval\]'$"):
        import hdlm_jax.evaluation.harness  # noqa: F401


def test_in_the_harness(tmp_path):
    """A task of its own, through lm_eval itself, gives the accuracy of our ranking."""
    lm_eval = pytest.importorskip("lm_eval")
    import hdlm_jax.evaluation.harness  # noqa: F401

    rows = [{"q": "the very", "choices": ["much", "like", "forty"], "label": i % 3} for i in range(3)]
    rows += [{"q": "of", "choices": ["short", "others", "x"], "label": 1}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": "tiny", "dataset_path": "json", "dataset_kwargs": {"data_files": {
        "test": str(tmp_path / "rows.jsonl")}}, "test_split": "test", "output_type": "multiple_choice",
        "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}", "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}]}
    model = f"workdir={tiny.trained()[1]},draws=4,most_draws=4,target_se=100,greedy=False"
    found = lm_eval.simple_evaluate(model="hdlm_jax", model_args=model, tasks=[task], bootstrap_iters=0)
    ranked = scorer(draws=4, most_draws=4, target_se=100).rank(
        [asked(row["q"], *(f" {c}" for c in row["choices"])) for row in rows])
    right = [int(np.argmin(nats)) == row["label"] for nats, row in zip(ranked.nats, rows, strict=True)]
    assert found["results"]["tiny"]["acc,none"] == pytest.approx(np.mean(right))
