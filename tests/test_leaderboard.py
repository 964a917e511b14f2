"""The leaderboard: the numbers of the jobs themselves, made once, side by side with what they are worth."""

import dataclasses
import json
import math
import shutil
import sys

import numpy as np
import pytest
import tiny
from test_report import Reader
from test_tasks import small_data

from hdlm_jax import main
from hdlm_jax.config import ConfigError
from hdlm_jax.evaluation.judges import open_judge
from hdlm_jax.report import leaderboard as pages
from hdlm_jax.runs import evaluate, generate, leaderboard, tasks
from hdlm_jax.runs.leaderboard import Protocol, measure, named
from hdlm_jax.training.loading import load_here, saved_config


def autoregressive(folder):
    """The tiny run's words under another process, trained for three steps, without its prepared text."""
    from hdlm_jax.runs import train

    recipe = tiny.write_recipe(folder)
    recipe.write_text(recipe.read_text().replace(
        "c.hierarchy.clusters = (8,)", "c.hierarchy.clusters, c.model.time_conditioning = (1,), False"
        ).replace("c.diffusion.weighting", "c.diffusion.process, c.diffusion.weighting").replace(
        '= "constant"', '= "autoregressive", "constant"'))
    train.train(tiny.read_recipe(recipe), str(folder / "ar"))
    shutil.rmtree(folder / "ar" / "data")
    return folder / "ar"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(runs by name, data, protocol): the tiny run and an autoregressive one."""
    root = tmp_path_factory.mktemp("board")
    data = small_data(root / "data")
    runs = {"tiny": str(tiny.trained()[1]), "ar": str(autoregressive(root))}
    return runs, data, Protocol(texts=("ptb",), questions=("piqa",), data=str(data), limit=2, draws=2,
                                judge=runs["ar"], samples=2, length=8, steps=3)


@pytest.fixture(scope="module")
def board(place, tmp_path_factory):
    runs, _, protocol = place
    out = tmp_path_factory.mktemp("out")
    return measure(runs, str(out), protocol), out


def rows(board):
    return {row["name"]: row for row in board[0]["runs"]}


@pytest.mark.slow
def test_numbers_are_those_of_the_jobs(place, board, tmp_path):
    runs, _, protocol = place
    workdir = runs["tiny"]
    row, config = rows(board)["tiny"], protocol.on(saved_config(runs["tiny"]))
    found = tasks.run(config, workdir, str(tmp_path))
    same = lambda a, b: {k: v for k, v in a.items() if k in b and k != "seconds"} == {  # noqa: E731
        k: v for k, v in b.items() if k != "seconds"}
    assert same(row["texts"]["ptb"], json.loads(json.dumps(found["ptb/document"])))
    assert same(row["questions"]["piqa"], json.loads(json.dumps(found["piqa"])))
    assert row["validation"]["nelbo"] == evaluate.evaluate(config, workdir, str(tmp_path))["nelbo"]
    judged = generate.generate(config, workdir, str(tmp_path))["judge"]
    assert {k: row["generation"][k] for k in ("perplexity", "unigram_entropy")} == {
        k: judged[k] for k in ("perplexity", "unigram_entropy")}
    assert row["generation"]["sampling"]["network_calls"] == 3 and rows(board)["ar"]["generation"]["its_own_judge"]
    saved = json.loads((board[1] / "leaderboard.json").read_text())
    assert saved == board[0] and row["seconds"] > 0


def test_rows_say_what_the_models_are_and_where_weights_came_from(place, board):
    run, found = load_here(place[0]["tiny"]), rows(board)
    m = found["tiny"]["model"]
    assert (m["parameters"], m["active"], m["levels"], m["exact"], m["given"]) == (
        run.num_params, run.num_params, [257, 8, 1], False, "lengths")
    assert found["ar"]["model"]["exact"] and found["ar"]["model"]["given"] == "nothing"
    assert found["tiny"]["provenance"]["weights"] != found["ar"]["provenance"]["weights"]
    assert found["tiny"]["provenance"]["step"] == 3 and found["tiny"]["provenance"]["kind"] == "trained"


def test_differences_are_paired_by_text(place, board):
    found, out = rows(board), board[1]
    assert board[0]["best"] == {"ptb": "ar"}, "the other is given lengths"
    assert "difference" not in found["ar"]["texts"]["ptb"]
    pair = found["tiny"]["texts"]["ptb"]["difference"]
    own, best = (found[n]["texts"]["ptb"]["bits_per_byte"] for n in ("tiny", "ar"))
    assert pair["bits_per_byte"] == pytest.approx(own - best) and pair["at_least"] and pair["documents"] == 2
    with np.load(out / found["tiny"]["results"] / "tasks_ptb.npz") as a, \
            np.load(out / found["ar"]["results"] / "tasks_ptb.npz") as b:
        each, sizes = (a["nats"] - b["nats"]) / math.log(2), a["bytes"]
        assert sizes.tolist() == [len(b"it wasn't N"), len(b"of 1 ?")] and a["tokens"].tolist() == [12, 7]
        apart, exact, nats = a["residuals"] - b["residuals"], b["residuals"], b["nats"]
    rest = nats - nats.sum() / sizes.sum() * sizes  # of an exact process, a text in one piece: a plain ratio's
    assert np.linalg.norm(exact) == pytest.approx(math.sqrt(2 * (rest**2).sum()) / sizes.sum())
    assert pair["se"] == pytest.approx(np.linalg.norm(apart) / math.log(2))
    other = {"nats": each, "bytes": sizes, "text": "x"}
    assert leaderboard._paired(other, other | {"text": "y"}) == {"why": "other documents"}


def test_nothing_is_measured_twice(place, board, monkeypatch):
    runs, _, protocol = place
    calls = []
    for module, name in ((tasks, "perplexity"), (tasks, "ranking"), (generate, "_sample"), (evaluate, "summarise")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
    assert measure(runs, str(board[1]), protocol) == board[0] and not calls
    measure({"ar": runs["ar"]}, str(board[1]), dataclasses.replace(protocol, limit=1, judge=""))
    assert calls == ["perplexity", "ranking"]
    measure(runs, str(board[1]), protocol)  # what the others are tested on


def test_nothing_is_written_into_a_run(place, board):
    names = {p.name for p in tiny.trained()[1].iterdir()}
    assert not names & {"tasks.json", "tasks.md", "evaluate.json", "generate.json", "samples.txt"}
    assert not any(p.suffix == ".npz" and p.name.startswith("tasks") for p in tiny.trained()[1].iterdir())


def test_a_run_that_fails_says_why(place, board, tmp_path, monkeypatch):
    runs, _, protocol = place
    why = rows(board)["ar"]["validation"]["why"]
    assert "manifest.json" in why and "\n" not in why and "why" not in rows(board)["ar"]["texts"]["ptb"]

    def broken(scorer, questions):
        raise RuntimeError("RESOURCE_EXHAUSTED: \n much")

    monkeypatch.setattr(tasks, "ranking", broken)
    found = measure({"ar": runs["ar"]}, str(tmp_path), dataclasses.replace(protocol, length=17, texts=("ptb",)))
    (row,) = found["runs"]
    assert row["questions"]["piqa"] == {"why": "RESOURCE_EXHAUSTED: much"} and row["texts"]["ptb"]["nelbo"] > 0
    assert row["generation"]["why"].startswith("generate.length=17: must be at most model.seq_len=16")
    page = pages.write(found, str(tmp_path), {})
    for text in (open(page).read(), (tmp_path / "leaderboard.md").read_text()):
        assert "RESOURCE_EXHAUSTED: much" in text and "must be at most model.seq_len=16" in text


def test_a_run_that_cannot_be_loaded_keeps_its_row(place, board, tmp_path):
    runs, _, protocol = place
    broken = shutil.copytree(runs["ar"], tmp_path / "broken")
    (broken / "hierarchy.npz").write_bytes(b"x")
    found = measure({"broken": str(broken)}, str(tmp_path / "out"), dataclasses.replace(protocol, judge=""))
    (row,) = found["runs"]
    assert row["model"] is None and row["why"] and row["texts"]["ptb"] == {"why": row["why"]}
    assert row["why"] in (text := pages.text(found, {})) and "not loaded" in text


def test_pages_say_what_json_says(board):
    found, out = board
    page = pages.write(found, str(out), {"dream_7b": "v5e:2x4: 9.9 GiB a chip"})
    text = open(page).read()
    read = Reader(text)
    assert read.addresses == ["data:,"]
    drawn = {t["text"]: {r["name"]: r for r in t["runs"]} for t in read.data()["board"]}
    shown = (out / "leaderboard.md").read_text()
    for row in found["runs"]:
        for name, cell in row["texts"].items():
            sign = "" if cell["exact"] else "≤ "
            number = f"{sign}{cell['bits_per_byte']:.4f} ± {cell['bits_per_byte_se']:.4f}"
            law = "exact" if cell["exact"] else "bound, given lengths"
            assert f"<span>{number}<small>{law}</small>" in text and f"{number} ({law})" in shown
            assert f'data-value={cell["bits_per_byte"]!r}' in text
            assert drawn[name][row["name"]]["value"] == cell["bits_per_byte"]
        assert row["provenance"]["weights"][:16] in text and f"{row['model']['parameters']:,}" in shown
        assert f"{100 * row['questions']['piqa']['accuracy']:.1f}" in text
    assert [r["name"] for r in pages.ordered(found)["runs"]] == sorted(
        rows(board), key=lambda n: rows(board)[n]["texts"]["ptb"]["bits_per_byte"])
    assert "its own judge" in shown and "v5e:2x4: 9.9 GiB a chip" in shown and shown.count("see docs/models.md") == 2
    assert "--workdir=runs/llada-8b-base" in text and "leaderboard runs/dream-7b --tensor=4" in text
    assert "of a bound, given lengths" in shown


def test_models_on_the_board_are_not_elsewhere(board):
    renamed = board[0] | {"runs": [board[0]["runs"][0] | {"name": "llada-8b-base"}]}
    (table,) = [t for t in pages.tables(renamed, {}) if t.name == "elsewhere"]
    assert [row[0].text for row in table.rows] == ["LLaDA-8B-Instruct", "Dream-7B"]


def test_plans_are_found_by_name(tmp_path):
    plan = {"what": "sample", "config": "released_open:llada_8b", "devices": 8, "topology": "v5e:2x4",
            "bytes": {"peak": 5 * 2**30}, "step_s": 0.25, "batch_size": 8, "seq_len": 1024}
    copies = plan | {"mesh": {"data": 8, "fsdp": 1, "tensor": 1}, "batch_size": 16, "flops_per_step": 8 * 0.4 * 989e12}
    lines = [json.dumps(p) + "\n" for p in (plan, plan | {"what": "train"}, copies)]
    (tmp_path / "plans.jsonl").write_text("".join(lines))
    assert pages.plans(str(tmp_path / "plans.jsonl")) == {"llada_8b": (
        "v5e:2x4: 5.0 GiB a chip, 0.25 s a call of 8 rows of 1,024; one H100 of 80 GB: 5.0 GiB, 1 s a call of 2 rows "
        "of 1,024; two CPU cores: 5.0 GiB, 3,596 s a call of 2 rows of 1,024")}
    assert pages.plans(str(tmp_path / "none")) == {}


def test_errors_are_one_line(place, tmp_path):
    runs, data, protocol = place
    ask = [runs["ar"], f"--data={data}", f"--out={tmp_path}"]
    for argv, said in (
        (ask[1:], "no runs given"), ([str(data), *ask[1:]], "no .*config.json"),
        ([*ask, runs["ar"]], "two runs have the name 'ar', .*NAME="),
        ([*ask, "--texts=ptbb"], "--texts='ptbb': choose one of .*did you mean 'ptb'"),
        ([*ask, "--questions=ptb"], "--questions='ptb': choose one of"),
        ([*ask, "--tensor=3"], "parallel=.* 3.: does not multiply to the 8 devices at hand"),
        ([*ask, "--texts="], "--texts='': name at"),
        ([*ask, "--limit=-1"], "evaluate.rows=-1"), ([*ask, "--limits=1"], "unrecognized arguments: --limits=1"),
        ([*ask, "--judge=nowhere"], "generate.judge='nowhere'"), ([*ask, "--length=0"], "--length=0"),
        ([runs["ar"], "--data=nowhere"], "task wikitext2 needs"),
        ([*ask[:2], f"--out={runs['ar']}/board"], "--out=.* lies in the run"),
    ):
        with pytest.raises(SystemExit) as error:
            pages.main(argv)
        assert error.match(said) and "\n" not in str(error.value) and str(error.value).startswith("leaderboard: ")
    assert not any(tmp_path.iterdir())
    assert named([f"a={runs['ar']}", f"b={runs['ar']}"]) == {"a": runs["ar"], "b": runs["ar"]}
    (tmp_path / "begun").mkdir()
    shutil.copy(f"{runs['ar']}/config.json", tmp_path / "begun")
    with pytest.raises((ConfigError, OSError), match="no checkpoint there"):
        named([str(tmp_path / "begun")])


def test_experts_that_do_not_work_are_not_active():
    from hdlm_jax.config import DecoderConfig

    run = load_here(str(tiny.trained()[1]))
    params = {**run.params, "experts": {"kernel": np.zeros((8, 10))}}
    c = dataclasses.replace(run.trained, decoder=DecoderConfig(experts=8, experts_per_token=2))
    found = leaderboard._facts(dataclasses.replace(run, params=params, trained=c), str(tiny.trained()[1]))
    assert found["model"]["parameters"] == run.num_params + 80 and found["model"]["active"] == run.num_params + 20


def test_a_judge_is_told_apart_by_its_weights(place, board):
    runs = place[0]
    assert len({open_judge(workdir).identity["weights"] for workdir in runs.values()}) == 2
    assert board[0]["judge"]["weights"] == rows(board)["ar"]["generation"]["made_from"]["weights"]


def test_the_command(place, tmp_path, capsys, monkeypatch):
    runs, data, _ = place
    argv = ["leaderboard", f"--data={data}", f"--out={tmp_path}", runs["ar"], "--texts=ptb", "--questions=",
            "--limit=2"]
    monkeypatch.setattr(sys, "argv", ["hdlm-jax", *argv])
    monkeypatch.setattr(main, "_hush", lambda: None)
    main.command()
    assert f"leaderboard: {tmp_path}/leaderboard.html" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {"leaderboard.json", "leaderboard.md", "leaderboard.html", "results"}
    assert "no judge given (--judge)" in (tmp_path / "leaderboard.md").read_text()
