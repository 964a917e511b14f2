"""Every JSON the package writes is JSON, and every line that reads it survives what is not known."""
import ast
import errno
import json
import math
import os
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_metrics import make_run

from hdlm_jax.common import jsons
from hdlm_jax.common.console import measured, perplexity, readable
from hdlm_jax.common.jsons import reuse, write_json
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.evaluation import judges, text_statistics
from hdlm_jax.evaluation.elbo import summarise
from hdlm_jax.report import __main__ as report
from hdlm_jax.report import compare, page
from hdlm_jax.runs import stages, tasks
from hdlm_jax.training import loading
from hdlm_jax.training.metrics import MetricsFile, plot_curves

BAD = {"a": math.nan, "b": [np.float32("inf"), (1, -math.inf)], "c": jnp.array([1.0, jnp.nan]), "d": np.int64(3),
       "e": {"f": np.array([[True]]), "g": None}, "h": np.float64("nan"), 1: "x"}


def strict(text):
    return json.loads(text, parse_constant=pytest.fail)


def test_plain():
    want = {"a": None, "b": [None, [1, None]], "c": [1.0, None], "d": 3, "e": {"f": [[True]], "g": None}, "h": None}
    assert jsons.plain(BAD) == want | {1: "x"} and strict(jsons.dumps(BAD)) == want | {"1": "x"}
    with pytest.raises(TypeError, match="set cannot be written as JSON"):
        jsons.dumps({"a": {1}})
    assert jsons.dumps({"b": 1.5, "a": [True, "é"]}, sort_keys=True) == json.dumps({"a": [True, "é"], "b": 1.5})


@pytest.mark.parametrize("text", ["1", "null", "[]", "{}", "", "\xff"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer/tokenizer.json", "data/manifest.json", "data/begun.json",
                                  "data/unit-00000.json"])
def test_a_damaged_file_of_a_run_is_one_line_with_its_name(tmp_path, name, text):
    recipe, run = tiny.trained()
    shutil.copytree(run, tmp_path / "run")
    if name.startswith("data/") and "manifest" not in name:  # where tokens are half made
        (tmp_path / "run" / "data" / "manifest.json").unlink()
    (tmp_path / "run" / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError) as error:
        if name == "config.json" or "tokenizer" in name:
            loading.load_here(str(tmp_path / "run"))
        else:
            stages.prepare(tiny.read_recipe(recipe), str(tmp_path / "run"))
    assert str(tmp_path / "run" / name) in str(error.value) and "\n" not in str(error.value)
    assert "restore the file from a copy" in str(error.value)


@pytest.mark.parametrize("name, key, value", [
    ("config.json", "data", 1), ("config.json", "model", None), ("tokenizer/tokenizer.json", "fingerprint", None),
    ("tokenizer/tokenizer.json", "sha256", 1), ("data/manifest.json", "train_tokens", None),
    ("data/manifest.json", "shards", 1), ("data/manifest.json", "unigram_nats", "x"),
    ("data/unit-00000.json", "files", 1), ("data/unit-00000.json", "records", None),
    ("data/unit-00000.json", "digests", 1), ("data/begun.json", "settings", 1), ("data/begun.json", "sources", None),
])
def test_a_value_of_another_type_is_one_line_with_the_file(tmp_path, name, key, value):
    recipe, run = tiny.trained()
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / name
    if "unit" in name or "begun" in name:
        (tmp_path / "run" / "data" / "manifest.json").unlink()
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError) as error:
        if name.startswith("data/"):
            stages.prepare(tiny.read_recipe(recipe), str(tmp_path / "run"))
        else:
            loading.load_here(str(tmp_path / "run"))
    assert str(error.value).startswith(f"{path}: damaged, {key} must be of type ") and "restore" in str(error.value)


def test_a_report_needs_no_setting_that_a_saved_config_lacks(tmp_path):
    shutil.copytree(tiny.trained()[1], tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"train": {}}))
    page.write_run_page(str(tmp_path / "run"))


@pytest.mark.parametrize("marks", ["1", '{"files": 1}', "inner 1", "inner []", "inner null", "\x00"])
def test_hashes_that_cannot_be_read_are_taken_again(tmp_path, marks):
    """verified.json is a shortcut alone."""
    recipe, run = tiny.trained()
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "data" / "verified.json"
    was = json.loads(path.read_text())
    inner = json.dumps(dict.fromkeys(was, json.loads(marks.removeprefix("inner ")))) if "inner" in marks else ""
    path.write_text(inner or marks)
    found = stages.prepare(tiny.read_recipe(recipe), str(tmp_path / "run"))
    assert found.manifest == stages.prepare(tiny.read_recipe(recipe), str(run)).manifest


def test_written_and_found_again(tmp_path):
    write_json(str(tmp_path / "a.json"), BAD)
    strict((tmp_path / "a.json").read_text())
    assert reuse(str(tmp_path / "a.json"), {k: BAD[k] for k in "abcd"})["d"] == 3
    assert reuse(str(tmp_path / "a.json"), {"d": 4}) is None


def write_hierarchy(path):
    Hierarchy.from_parents([], vocab_size=4).save(path, "words")


def write_curves(path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (extra: plots)")
    plot_curves(path, [{"step": 1, "tokens": 1, "loss": 1.0}], 1.0)


def write_array(path):
    with jsons.open_atomic(path) as file:
        np.save(file, np.zeros(3))


@pytest.mark.parametrize("write", [write_hierarchy, write_curves, write_array, lambda path: write_json(path, {})])
def test_a_full_disk_is_told_with_the_file(tmp_path, monkeypatch, write):
    """The system tells of no file where a write, flush or sync fails. What was there stays, with no half of another."""
    path = str(tmp_path / "made.npz")
    write(path)
    was = (tmp_path / "made.npz").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        write(path)
    assert (tmp_path / "made.npz").read_bytes() == was and os.listdir(tmp_path) == ["made.npz"]


def test_numpy_tells_of_a_full_disk_without_a_number(tmp_path):
    with pytest.raises(OSError, match=r"cannot be written \(8 requested and 0 written\): '.*a.npy'"), \
            jsons.named(tmp_path / "a.npy"):
        raise OSError("8 requested and 0 written")
    with pytest.raises(InterruptedError, match="^another file failed$"), jsons.named("a"):
        raise InterruptedError("another file failed")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no disk that is always full")
def test_metrics_on_a_full_disk(tmp_path):
    path = str(tmp_path / "metrics.jsonl")
    file = MetricsFile(path, 0)
    file.file = open("/dev/full", "a")
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        file.write({"step": 1})
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        file.close()


def test_there_is_one_writer(root):
    """json.dump and json.dumps are called in jsons.py alone; elsewhere only where NaN is an error."""
    for path in (root / "hdlm_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and re.fullmatch(r"json\.dumps?", ast.unparse(node.func)):
                assert "allow_nan=False" in ast.unparse(node), f"{path}:{node.lineno}"


def test_numbers_to_read():
    assert [readable(v, ".2f") for v in (1.234, None, math.nan, math.inf, 1e30)] == ["1.23", "-", "-", "-", "1e+30"]
    assert measured(-1.5, 0.25, "+.1f") == "-1.5 ± 0.2" and measured(1.0, None, ".1f") == "1.0"
    assert measured(None, 0.1) == measured(math.nan, None) == "-" and measured(1, 0, ".0f", "+-") == "1 +- 0"


def test_perplexities_beyond_floats():
    assert perplexity(math.log(5)) == pytest.approx(5) and perplexity(1e5) == math.inf
    assert math.isnan(perplexity(math.nan))
    nats = np.full((2, 3, 1), 3e4)
    assert summarise(nats, np.full(3, 2), np.arange(6.0).reshape(2, 3), np.ones((2, 3)))["perplexity"] == math.inf
    bad = summarise(nats * math.nan, np.full(3, 2), np.arange(6.0).reshape(2, 3), np.ones((2, 3)))
    assert math.isnan(bad["nelbo"]) and jsons.plain(bad)["perplexity"] is None
    found = text_statistics.perplexities(np.array([1e5, 2e5]), np.array([10, 10]))
    assert found["perplexity"] == found["mean_text_perplexity"] == math.inf
    found = jsons.plain(found) | {"bound": False, "tokens": 20}
    assert judges.perplexity(found) == "none (not finite)"


def unknown(path, *kept):
    """Puts null in the place of every float of a JSON file."""
    blank = lambda v: ({k: w if k in kept else blank(w) for k, w in v.items()} if isinstance(v, dict) else  # noqa: E731
                       [blank(w) for w in v] if isinstance(v, list) else None if isinstance(v, float) else v)
    path.write_text(json.dumps(blank(json.loads(path.read_text()))))


def test_tables_survive_what_is_not_known(tmp_path, capsys):
    for name, nelbo in (("a", 5.0), ("b", 5.25)):
        make_run(tmp_path / name, nelbo, [300, 1])
        unknown(tmp_path / name / "evaluate.json", "unigram_nelbo", "unigram_perplexity", "unigram_bits_per_byte")
        text = {"kind": "perplexity", "task": "ptb", "protocol": "packed", "detokenizer": None, "limited": False,
                "made_from": {"step": 70, "ema": True}, "seconds": 1.0, "tokens": 12, "documents": 7, "draws": 2,
                "nelbo": None, "se": None, "perplexity": None, "perplexity_se": None}
        (tmp_path / name / "tasks.json").write_text(json.dumps({"ptb/packed": text}))
    rows = [str(tmp_path / name) for name in "ab"]
    np.savez(tmp_path / "b" / "evaluate_rows.npz", nats=np.full(20, math.nan), tokens=np.full(20, 16))
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in compare.table(rows).splitlines()]
    assert cells[2][3:6] == ["-", "-", "-"]
    report.main(rows)
    said = capsys.readouterr().out
    assert "b - a: - nats/token" in said and f"{rows[0]}: - nats below the unigram" in said
    assert compare.task_table(rows).count("| -") >= 2
    assert "nan" not in said and "None" not in said
    assert tasks._line(text).startswith("- nats/token, - bits/byte, perplexity -, 12 tokens")
    assert tasks.rows({"x": text})
    evaluated = json.loads((tmp_path / "a" / "evaluate.json").read_text())
    shown = page.headline({"evaluate": evaluated, "generate": None, "curves": None, "train_speed": None,
                           "process": "hierarchical"})
    assert "<b>-</b>" in shown and "None" not in shown
