"""The benchmark: what it prints, what its report makes of rounds, and when it refuses."""
import ast
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tools import bench

MICRO = bench.Case(width=32, blocks=1, heads=2, seq_len=16, words=64, clusters=8, batch_size=4)


@pytest.fixture(autouse=True)
def micro(monkeypatch):
    monkeypatch.setitem(bench.CASES, "micro", MICRO)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors; as Python does, words of a SystemExit are errors with code 1."""
    said = ""
    try:
        code = bench.main(arguments)
    except SystemExit as error:
        code, said = 1, f"{error}\n"
    out, err = capsys.readouterr()
    return code, out, err + said


def yardstick_keys(root: Path) -> set[str]:
    """Keywords of the dict that launch/torch_peer.py prints."""
    tree = ast.parse((root / "launch" / "torch_peer.py").read_text())
    (call,) = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "json.dumps"]
    return {keyword.arg for keyword in call.args[0].keywords}


def test_cases_are_the_yardsticks(root: Path):
    tree = ast.parse((root / "launch" / "torch_peer.py").read_text())
    (cases,) = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "CASES"]
    assert {k: tuple(v) for k, v in bench.CASES.items() if k != "micro"} == ast.literal_eval(cases)


@pytest.mark.parametrize("process", ["hdlm", *(pytest.param(p, marks=pytest.mark.slow) for p in bench.PROCESSES
                                               if p != "hdlm")])
def test_one_json_object(root: Path, tmp_path: Path, capsys, monkeypatch, process: str):
    fed = []
    batch = bench.Training.batch
    monkeypatch.setattr(bench.Training, "batch", lambda self: fed.append(1) or batch(self))
    full = [] if process != "hdlm" else ["--temp_bytes_full", f"--profile={tmp_path}"]
    optimizer = "muon" if process == "mdlm" else "adamw"
    code, out, err = run(capsys, "--case=micro", f"--process={process}", "--steps=3", "--warmup=2", "--sample_steps=4",
                         f"--optimizer={optimizer}", *full)
    assert code == 0, err
    record = json.loads(out)
    assert yardstick_keys(root) - {"torch"} | {"jax"} <= set(record)
    assert (record["peer"], record["case"], record["process"], record["head"]) == ("hdlm_jax", "micro", process, "flat")
    assert record["optimizer"] == optimizer
    assert len(fed) == 1 + 2 + 3 + (3 + 2 if full else 0)  # to compile, warm up, measure; to trace, two losses
    assert record["dtype"] == "float32" and record["mfu"] is None and record["device"] == "cpu"
    rate = MICRO.batch_size * MICRO.seq_len / record["train_step_s"]
    assert record["train_tokens_per_s"] == pytest.approx(rate, rel=1e-2)
    assert 1 <= record["sample_calls"] <= (MICRO.seq_len if process == "ar" else 4)
    assert record["peak_rss_mib"] >= record["rss_start_mib"] > 0 and record["flops_per_token"] > 0
    if full:  # float32 [B, S, V], at least once
        assert record["loss_temp_bytes_full_logits"] > 4 * MICRO.batch_size * MICRO.seq_len * MICRO.words
    assert bool(list(tmp_path.rglob("*.trace.json.gz"))) == bool(full)


def test_head_point():
    point = bench.measure_head("flat", 512, repeats=1)
    assert point["params"] >= 256 * 512 and point["tokens"] == 1024
    assert min(point["seconds"], point["optimizer_s"], point["temp_bytes"]) > 0


def test_curves(tmp_path: Path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench, "HEAD_WORDS", (257,))
    monkeypatch.setattr(bench, "LENGTHS", (16,))
    monkeypatch.setattr(bench, "GRIDS", (2,))
    monkeypatch.setattr(bench, "SERIES", (("flat", "hdlm"),))
    monkeypatch.setattr(bench, "measure_head", lambda head, words: {
        "head": head, "words": words, "seconds": 1.0, "optimizer_s": 1.0, "temp_bytes": 1})
    bench.curves(str(tmp_path), "micro")
    assert {p.name for p in tmp_path.iterdir()} == {"head.json", "head.png", "sampling.json", "sampling.png"}
    points = json.loads((tmp_path / "sampling.json").read_text())
    assert {(p["seq_len"], p["steps"]) for p in points} == {(16, 32), (16, 2)}
    for p in points:
        assert p["tokens_per_s"] == pytest.approx(4 * p["seq_len"] / p["seconds"], rel=0.05)


# ---- report ----


def write_rounds(folder: Path, case: str, train: list[float], ours: list[float], **more) -> None:
    """A case's jsonl: the yardstick's speeds, those of the flat HDLM; flat MDLM as fast as the yardstick."""
    lines = []
    for theirs, mine in zip(train, ours, strict=True):
        lines.append({"peer": "torch", "torch": "0", "case": case, "device": "cpu", "threads": 2, "compiled": False,
                      "sample_steps": 32, "train_tokens_per_s": theirs, "sample_tokens_per_s": 50,
                      "peak_rss_mib": 1000})
        for (head, process), speed in zip(bench.SERIES, (mine, 2 * mine, theirs), strict=True):
            lines.append({"peer": "hdlm_jax", "head": head, "process": process, "train_tokens_per_s": speed,
                          "sample_tokens_per_s": 110, "peak_rss_mib": 700, "loss_temp_bytes": 10})
    lines[1] |= more
    (folder / f"{case}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def cells(text: str, run: str, measure: str) -> list[str]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    (row,) = [row for row in rows if row[1:3] == [run, measure]]
    return row[3:]


def test_report_pairs_rounds(tmp_path: Path, capsys):
    write_rounds(tmp_path, "gpt2-vocab-cpu", [100, 100, 100, 100, 80], [180, 150, 200, 250, 160],
                 loss_temp_bytes_full_logits=100)
    code, text, _ = run(capsys, f"--report={tmp_path}")
    assert code == 0 and "not valid" not in text
    ours = cells(text, "flat HDLM", "train tok/s")  # ratios 1.8 1.5 2 2.5 2, paired: not 180/100 by medians
    assert ours == ["180", "100", "1.50", "2.00", "2.50", "≥ 2 met", "≥ 1.6 met"]
    assert cells(text, "flat HDLM", "sample tok/s")[3:] == ["2.20", "2.20", "≥ 4 NOT met", "-"]
    assert cells(text, "flat HDLM", "peak RSS MiB")[3:] == ["0.70", "0.70", "≤ 0.65 NOT met", "-"]
    assert cells(text, "flat HDLM", "temp bytes, loss and gradients")[2:] == ["0.10"] * 3 + ["≤ 0.2 met", "-"]
    assert cells(text, "flat MDLM", "train tok/s")[2:] == ["1.00"] * 3 + ["-", "-"]
    assert cells(text, "factorised HDLM", "train tok/s")[3:] == ["4.00", "5.00", "≥ 3.5 met", "≥ 3 met"]
    assert cells(text, "factorised HDLM", "train tok/s / flat MDLM")[3:] == ["4.00", "5.00", "≥ 1.8 met", "-"]


def test_report_floor_without_target(tmp_path: Path, capsys):
    write_rounds(tmp_path, "tiny", [100] * 5, [90] * 5)
    code, text, _ = run(capsys, f"--report={tmp_path}")
    assert code == 0
    assert cells(text, "flat HDLM", "train tok/s")[5:] == ["≥ 1 NOT met", "≥ 0.8 met"]


@pytest.mark.parametrize("speeds, reason", [
    ([100, 100, 69, 100, 100], "the yardstick's train tok/s in round 3 is 69% of its best"),
    ([100] * 4, "4 rounds; at least 5 are needed"),
])
def test_report_refuses_disturbed_rounds(tmp_path: Path, capsys, speeds, reason):
    write_rounds(tmp_path, "tiny", speeds, speeds)
    write_rounds(tmp_path, "small-cpu", [100, 70.1, 100, 100, 100], [200] * 5)
    code, text, _ = run(capsys, f"--report={tmp_path}")
    assert code == 3
    assert f"tiny: not valid, {reason}" in text and "small-cpu: not valid" not in text
    assert "≥ 1 not valid" in text and "≥ 1.2 met" in text


# ---- what is wrong is one line ----


@pytest.mark.parametrize("arguments, message", [
    (["--case=huge"], "--case: invalid choice: 'huge' (choose from"),
    (["--head=factorised", "--process=mdlm"], "--head=factorised: needs clusters"),
    (["--steps=0"], "--steps: 0: must be at least 1"),
    (["--stepz=1"], "stepz"),
    (["tiny"], "unrecognized arguments: tiny"),
    (["--report=/nowhere"], "no CASE.jsonl there"),
])
def test_errors_are_one_line(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 1 and out == "" and len(err.splitlines()) == 1 and message in err, err


def bench_sh(root: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", str(root / "launch" / "bench.sh"), *arguments], capture_output=True, text=True,
                          env={**os.environ, **env}, timeout=60)


def test_bench_sh_refuses_a_busy_machine(root: Path, tmp_path: Path):
    load = tmp_path / "loadavg"
    load.write_text("0.31 0.00 0.00 1/80 100\n")
    done = bench_sh(root, "--wait=1", LOADAVG_FILE=str(load), VENV=str(tmp_path / "venv"))
    assert done.returncode == 3 and len(done.stderr.splitlines()) == 1 and "0.31" in done.stderr, done.stderr
    assert not (tmp_path / "venv").exists()  # refused before anything is installed


@pytest.mark.parametrize("argument", ["--cases=huge", "--rounds=many", "--what"])
def test_bench_sh_options(root: Path, argument: str):
    done = bench_sh(root, argument)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr


def test_bench_sh_is_sound(root: Path):
    script = root / "launch" / "bench.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", str(script)], cwd=root, check=True)
