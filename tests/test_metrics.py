"""metrics.jsonl across kills and resumes, curves, and the table over runs."""
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import shutil
import struct
import sys
import types

import jax
import numpy as np
import pytest
from tiny import SEQ_LEN, model, read_recipe, trained, write_recipe

from hdlm_jax.common import console
from hdlm_jax.common.console import lasts, progress, say
from hdlm_jax.config import Config, ConfigError, TrainConfig
from hdlm_jax.evaluation import elbo, text_statistics
from hdlm_jax.report import __main__ as report
from hdlm_jax.report import compare
from hdlm_jax.runs import train
from hdlm_jax.training.metrics import MetricsFile, line_of, peak_flops, plot_curves, read_metrics, writers
from hdlm_jax.training.step import make_loss_sums


def write(path, steps, resume=0):
    file = MetricsFile(str(path), resume)
    for step in steps:
        file.write({"step": step, "loss": 1.0 / step, "grad_norm": math.inf})
    file.close()


def test_each_step_once_across_resumes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(str(path)) == []
    write(path, (1, 2, 3, 4, 5))
    with open(path, "a") as f:
        f.write('{"step": 6, "lo')  # killed while writing
    assert [r["step"] for r in read_metrics(str(path))] == [1, 2, 3, 4, 5]
    write(path, (4, 5, 6), resume=3)  # the checkpoint was at step 3
    records = read_metrics(str(path))
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert records[0] == {"step": 1, "loss": 1.0, "grad_norm": None}, "no Infinity: that is no JSON"
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == records
    write(path, (1,), resume=0)
    assert [r["step"] for r in read_metrics(str(path))] == [1], "from the beginning again"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


DAMAGE = [b"null", b"{}", b"[1]", b'{"step": "x"}', b'{"step": 3, "lo', b'{"step": 3, "x": "\xff"}']


@pytest.mark.parametrize("line", DAMAGE)
def test_a_damaged_line_costs_itself_alone(tmp_path, capsys, line):
    """A resume goes on, keeps all other records and the file as it was, and says so."""
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 11))
    lines = path.read_bytes().split(b"\n")
    lines[2] = line
    path.write_bytes(b"\n".join(lines))
    before = path.read_bytes()
    assert [r["step"] for r in read_metrics(str(path))] == [1, 2, 4, 5, 6, 7, 8, 9, 10]
    write(path, (10, 11), resume=9)
    assert [r["step"] for r in read_metrics(str(path))] == [1, 2, 4, 5, 6, 7, 8, 9, 10, 11]
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == before
    assert "1 of its lines cannot be read (the first, line 3)" in capsys.readouterr().out


def test_a_record_is_there_as_soon_as_it_is_written(tmp_path):
    file = MetricsFile(str(tmp_path / "m.jsonl"), 0)
    file.write({"step": 1, "loss": float("nan")})
    assert read_metrics(str(tmp_path / "m.jsonl")) == [{"step": 1, "loss": None}]
    file.close()


def test_peak_by_the_longest_name():
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5p") == 459e12 == peak_flops("TPU v5")
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("cpu") is None


def test_bar_is_silent_under_ci(monkeypatch, capsys):
    monkeypatch.setenv("CI", "1")
    with progress(3, name="x") as bar:
        bar.update(3)
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    """What stands in a terminal after what is written to it: a carriage return goes back, ESC [A one line up."""

    def isatty(self):
        return True

    def lines(self):
        rows, row, column = [""], 0, 0
        for part in re.findall(r"\x1b\[A|[\r\n]|[^\r\n\x1b]+", self.getvalue()):
            if part in ("\r", "\n", "\x1b[A"):
                row, column = row + (part == "\n") - (part == "\x1b[A"), column if part == "\x1b[A" else 0
                rows += [""] * (row + 1 - len(rows))
            else:
                rows[row] = rows[row].ljust(column)[:column] + part + rows[row][column + len(part) :]
                column += len(part)
        return [text.rstrip() for text in rows if text.strip()]


def test_nothing_is_said_into_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress(3, name="x") as bar:
        for i in range(3):
            bar.update()
            bar.refresh()
            say(f"line {i}")
            with progress(2, name="inner") as inner:
                inner.update(2)
    shown = terminal.lines()
    assert shown[:3] == ["line 0", "line 1", "line 2"] and "x: 100%" in shown[3] and "inner" not in "".join(shown)


RECORD = {"step": 50, "tokens": 1, "loss": 1.5, "nelbo": 6.25, "tokens_per_s": 1234.5, "mfu": 0.125}


def test_short_waits_are_not_told(monkeypatch, capsys):
    """A clock that is past SHORT at once, and one that never is."""
    def timer(fires):
        def made(seconds, what, given):
            assert seconds == console.SHORT
            return types.SimpleNamespace(start=lambda: fires and what(*given), cancel=lambda: None)
        return types.SimpleNamespace(Timer=made)

    for fires in (False, True):
        times = iter((5.0, 7.5 if fires else 5.5))
        monkeypatch.setattr(console, "threading", timer(fires))
        monkeypatch.setattr(console, "time", types.SimpleNamespace(monotonic=times.__next__))
        with console.compiling("train"):
            pass
        assert capsys.readouterr().out.splitlines() == [
            "train: compiling (usually 10-60 s)", "train: compiled in 2.5 s"] * fires


def test_a_line_of_the_log():
    assert line_of(RECORD, 200, 0.5) == ("step 50 of 200 (25 %): NELBO 6.2500, weighted loss 1.5000, 1,234 tokens/s, "
                                         "MFU 12.5 %, 1:15 left")
    unknown = RECORD | {"tokens_per_s": None, "mfu": None, "nelbo": math.nan}
    assert line_of(unknown, 200, None) == "step 50 of 200 (25 %): NELBO -, weighted loss 1.5000"
    assert [lasts(s) for s in (0.2, 59.4, 61, 3600)] == ["0 s", "59 s", "1:01", "1:00:00"]


def test_the_nelbo_of_a_step_does_not_depend_on_what_it_trains_on():
    """The loss is as diffusion.weighting says; the bound beside it is that of the same noise, whatever is weighted."""
    run, found = model().run, {}
    x = np.arange(8 * SEQ_LEN, dtype=np.int32).reshape(8, SEQ_LEN)
    batch = {"x": x, "index": np.arange(8, dtype=np.int32)}
    for weighting in ("constant", "none"):
        diffusion = dataclasses.replace(run.config.diffusion, weighting=weighting)
        config = dataclasses.replace(run.config, diffusion=diffusion)
        sums = jax.jit(make_loss_sums(config, run.network, run.process))
        found[weighting] = [float(v) for v in sums(run.params, batch, jax.random.key(0))]
    (loss, nelbo, tokens), (other, again, _) = found["constant"], found["none"]
    assert nelbo == pytest.approx(again, rel=1e-6) and abs(loss - other) > 0.1 * loss and 0 < nelbo / tokens < 20


@pytest.mark.slow  # it trains
def test_what_a_training_says(tmp_path, monkeypatch):
    """The bar of a terminal and the lines of a log, both at once, as of `hdlm-jax ... | tee log`."""
    recipe, run = trained()
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "metrics.jsonl"))
    terminal, log = Terminal(), io.StringIO()
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(sys, "stdout", log)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(console, "SHORT", 0)
    train.train(read_recipe(recipe), str(tmp_path / "run"))
    record = read_metrics(str(tmp_path / "run" / "metrics.jsonl"))[-1]
    numbers = f"NELBO {record['nelbo']:.4f}, weighted loss {record['loss']:.4f}"
    (bar,) = terminal.lines()
    assert bar.startswith("run: 100%") and numbers in bar
    said = log.getvalue().splitlines()
    steps = [line for line in said if " of 3 (" in line]
    assert [s.split(":")[1] for s in steps] == [" step 1 of 3 (33 %)", " step 2 of 3 (67 %)", " step 3 of 3 (100 %)"]
    assert numbers in steps[2] and " tokens/s" in steps[2] and steps[1].endswith(" left")
    assert [line for line in said if line.startswith("train: compiled in ")]
    valid = f"validation NELBO {record['valid_nelbo']:.4f} +- {record['valid_se']:.4f} nats/token"
    assert f"train: step 3, {valid}" in said and "\r" not in log.getvalue()


def records_to(tmp_path, name, parts):
    """Records of some steps by one of train.writers; parts: (where it resumes, steps) of each session."""
    config = Config(train=TrainConfig(writers=(name,)))
    for resume, steps in parts:
        both = writers(str(tmp_path), resume, config)
        assert len(both) == 2
        for step in steps:
            for writer in both:
                writer.write(RECORD | {"step": step, "nelbo": step / 8, "mfu": None})
        for writer in both:
            writer.close()
    assert [r["nelbo"] for r in read_metrics(str(tmp_path / "metrics.jsonl"))] == [1.25, 2.5, 3.75]


def test_records_in_tensorboard(tmp_path):
    board = pytest.importorskip("tensorboardX", reason="needs pip install 'hdlm_jax[tensorboard]'")
    records_to(tmp_path, "tensorboard", ((0, (10, 20)), (20, (30,))))
    found = {}
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        raw, at = path.read_bytes(), 0
        while at < len(raw):  # length, its checksum, an event, its checksum
            size = struct.unpack("<Q", raw[at : at + 8])[0]
            event = board.proto.event_pb2.Event.FromString(raw[at + 12 : at + 12 + size])
            found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
            at += size + 16
    assert {step: v for (step, tag), v in found.items() if tag == "nelbo"} == {10: 1.25, 20: 2.5, 30: 3.75}
    assert (10, "tokens_per_s") in found and (10, "mfu") not in found


@pytest.mark.slow  # it starts a program of its own
def test_records_in_weights_and_biases_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs pip install 'hdlm_jax[wandb]'")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    records_to(tmp_path, "wandb", ((0, (10, 20, 30)),))
    wandb.teardown()  # its program has written all once it has ended
    found, ids = {}, set()
    for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb"):
        raw, at = path.read_bytes(), 7  # behind the header: checksum, size, kind of a record and the record
        while at < len(raw):
            size = struct.unpack("<H", raw[at + 4 : at + 6])[0]
            record = wandb_internal_pb2.Record.FromString(raw[at + 7 : at + 7 + size])
            at += 7 + size
            ids |= {record.run.run_id} - {""}
            if record.WhichOneof("record_type") == "history":
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                found[row["_step"]] = row["nelbo"]
    assert found == {10: 1.25, 20: 2.5, 30: 3.75}
    assert ids == {hashlib.sha256(str(tmp_path).encode()).hexdigest()[:16]}, "the workdir's, so a resume goes on in it"


def test_writers_that_are_not_installed_are_said_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = read_recipe(write_recipe(tmp_path / "recipe"))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, writers=("wandb",)))
    with pytest.raises(ValueError, match=r"train.writers='wandb': needs the wandb package: pip install 'hdlm_jax\[wan"):
        train.train(config, str(tmp_path / "run"))
    assert os.listdir(tmp_path / "run") == ["lock"]
    with pytest.raises(ConfigError, match="train.writers='wandbb': choose one of tensorboard, wandb; did you mean"):
        TrainConfig(writers=("wandbb",)).check()


def test_curves(tmp_path):
    pytest.importorskip("matplotlib")
    records = [{"step": i, "tokens": 10 * i, "loss": 5.0 / i, "nelbo": 6.0 / i} for i in range(1, 5)]
    records += [{"step": 4, "tokens": 40, "valid_nelbo": 2.0}, {"step": 5, "tokens": 50, "loss": None, "nelbo": None}]
    sizes = []
    for name, rows in (("a.png", records), ("empty.png", [])):
        assert plot_curves(str(tmp_path / name), rows, 7.0)
        raw = (tmp_path / name).read_bytes()
        assert raw[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", raw[16:24]) == (1210, 440)
        sizes.append(len(raw))
    assert sizes[0] > sizes[1] + 1000, "curves are drawn"


# ------------------------------------------------------------------------------------------------------ report


def rows(folder, nats, tokens):
    folder.mkdir(exist_ok=True)
    np.savez(folder / "evaluate_rows.npz", nats=nats, tokens=tokens)
    return str(folder)


def test_paired_standard_error(tmp_path):
    """Against the plain formula where rows are equally long, against the bootstrap where they are not."""
    rng = np.random.default_rng(0)
    n = 60
    hard = rng.gamma(4.0, 50.0, n)  # most of the variance is shared by the two
    a, b = hard + rng.normal(0, 3, n), hard + rng.normal(2, 3, n)
    tokens = np.full(n, 16)
    mean, se = compare.paired_difference(rows(tmp_path / "a", a, tokens), rows(tmp_path / "b", b, tokens))
    assert mean == pytest.approx(np.mean(b - a) / 16) and mean > 0
    assert se == pytest.approx(np.std((b - a) / 16, ddof=1) / math.sqrt(n))
    assert se < 0.2 * np.std(a / 16) / math.sqrt(n), "pairing is the point"
    assert compare.paired_difference(str(tmp_path / "a"), str(tmp_path / "a")) == (0.0, 0.0)

    tokens = rng.integers(4, 17, n)
    a, b = a * tokens / 16, b * tokens / 16
    mean, se = compare.paired_difference(rows(tmp_path / "a", a, tokens), rows(tmp_path / "b", b, tokens))
    pick = rng.integers(0, n, (4000, n))
    means = (b - a)[pick].sum(1) / tokens[pick].sum(1)
    assert mean == pytest.approx((b - a).sum() / tokens.sum())
    assert se == pytest.approx(means.std(), rel=0.08)
    one_row = [rows(tmp_path / w, a[:1], tokens[:1]) for w in "ab"]
    assert np.isnan(compare.paired_difference(*one_row)[1]), "one row tells nothing"
    rows(tmp_path / "b", b, tokens + 1)
    with pytest.raises(ValueError, match="not evaluated on the same sequences"):
        compare.paired_difference(str(tmp_path / "a"), str(tmp_path / "b"))


def make_run(folder, nelbo, sizes, whole=True):
    rng = np.random.default_rng(int(nelbo * 100))
    tokens = np.full(20, 16)
    rows(folder, tokens * nelbo + rng.normal(0, 1, 20), tokens)
    evaluated = {"nelbo": nelbo, "se": 0.0123, "perplexity": math.exp(nelbo), "perplexity_se": 0.5,
                 "bits_per_byte": 2.25, "bits_per_byte_se": 0.01, "whole_split": whole, "hierarchy": sizes,
                 "unigram_nelbo": 6.5, "unigram_bits_per_byte": 3.75, "unigram_perplexity": 665.0, "tokens": 320,
                 "bytes": 1000 if whole else None, "corpus": "0123456789abcdef", "step": 70}
    (folder / "evaluate.json").write_text(json.dumps(evaluated))
    (folder / "generate.json").write_text(json.dumps({"tokens_per_s": 456.7, "network_calls": 31.6}))
    (folder / "samples.jsonl").write_text(json.dumps({"text": "some  sampled\ntext"}) + "\n")
    write_speed = "".join(json.dumps({"step": i, "tokens_per_s": v}) + "\n" for i, v in enumerate((1.0, 1234.0, 9e9)))
    (folder / "metrics.jsonl").write_text(write_speed + '{"step": 3, "valid_nelbo": 5.0}\n')
    return str(folder)


def test_table(tmp_path, capsys):
    one = make_run(tmp_path / "mdlm", 5.5, [2048, 1])
    two = make_run(tmp_path / "hdlm", 5.25, [2048, 64, 1], whole=False)
    lines = compare.table([one, two + "/"]).splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1 and set(lines[1]) <= set("|- ")
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert cells[2][:5] == ["mdlm", "2048 → 1", "70", "5.5000 ± 0.0123", "2.2500 ± 0.0100"]
    assert cells[2][5:] == ["244.7 ± 0.5", "1,234", "457", "32"]
    assert cells[3][:5] == ["hdlm", "2048 → 64 → 1", "70", "5.2500 ± 0.0123", "-"]
    assert cells[4][:6] == ["unigram", "", "", "6.5000", "-", "665.0"]
    report.main([one, two])
    said = capsys.readouterr().out
    mean, se = compare.paired_difference(one, two)
    assert f"hdlm - mdlm: {mean:+.4f} ± {se:.4f} nats/token (paired)" in said and mean < 0
    assert "1.00 nats below the unigram" in said and "1.25 nats below" in said
    assert "validation: 320 tokens, 1,000 bytes, corpus 0123456789ab" in said
    assert "a sample: some sampled text" in said and str(tmp_path / "mdlm" / "metrics.jsonl") in said
    assert "curves.png" not in said, "files that are not there are not listed"
    assert "has no meaning yet" in said
    for name in ("mdlm", "hdlm"):  # large ones, evaluated and not sampled
        (tmp_path / name / "samples.jsonl").unlink()
        evaluated = json.loads((tmp_path / name / "evaluate.json").read_text())
        (tmp_path / name / "evaluate.json").write_text(json.dumps(evaluated | {"params": 170_000_000}))
    report.main([one, two])
    said = capsys.readouterr().out
    assert f"no samples yet: python -m hdlm_jax.main --workdir={two} --mode=generate" in said
    assert "a sample" not in said and "no meaning" not in said
    other = tmp_path / "hdlm" / "evaluate.json"
    other.write_text(other.read_text().replace("0123456789abcdef", "another"))
    with pytest.raises(SystemExit, match="different text .corpus differs"):
        report.main([one, two])


def test_report_says_what_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        report.main([])
    with pytest.raises(SystemExit, match="evaluate.json is missing; run --mode=evaluate on"):
        report.main([str(tmp_path)])
    make_run(tmp_path / "a", 5.0, [300, 1])
    (tmp_path / "a" / "generate.json").unlink()
    report.main([str(tmp_path / "a")])  # not every run draws samples
    alone = capsys.readouterr().out
    assert "| a " in alone and "train tok/s" in alone and "sample tok/s" not in alone
    make_run(tmp_path / "b", 5.0, [300, 1])
    report.main([str(tmp_path / "a"), str(tmp_path / "b")])
    both = capsys.readouterr().out
    row, = re.findall(r"^\| a .*$", both, re.MULTILINE)
    assert "sample tok/s" in both and row.split("|")[-3:-1] == [" - ".ljust(len(c)) for c in row.split("|")[-3:-1]]


@pytest.mark.parametrize("shared", [False, True])
def test_paired_errors_know_of_the_strata(tmp_path, shared):
    """400 estimates of a bound whose integrand moves with the noise time, minus an exact model (or another bound by
    the same draws): the spread of the difference over evaluations is what one of them says, to 15 % (400 know it to
    4 %; neighbours in noise time, a window of 33, add 6 %); strata that count as chance would say more than twice as
    much."""
    n, tokens, means, told, naive = 200, np.full(200, 16), [], [], []
    hard = np.random.default_rng(0).normal(50, 4, n)
    for seed in range(400):
        rng = np.random.default_rng(seed)
        tau = (rng.permutation(n) + rng.random(n)) / n
        noise = rng.normal(0, 2, n)
        a = hard + 60 * (tau - 0.5) + noise
        b = hard - 5 + (80 * (tau - 0.5) + noise if shared else 0.0)
        nats = [one[None, :, None] for one in (a, b)]
        times = (tau, tau if shared else 0 * tau)
        rest = [elbo.residuals(one, tokens, t[None]).sum(0) for one, t in zip(nats, times, strict=True)]
        for name, values, left in zip("ab", (a, b), rest, strict=True):
            folder = rows(tmp_path / name, values, tokens)
            np.savez(f"{folder}/evaluate_rows.npz", nats=values, tokens=tokens, residuals=left)
        mean, se = compare.paired_difference(str(tmp_path / "a"), str(tmp_path / "b"))
        means.append(mean)
        told.append(se)
        naive.append(text_statistics.ratio(b - a, tokens)[1])
        alone = elbo.summarise(nats[0], tokens, tau[None], np.ones((1, n)))["se"]
        assert alone == pytest.approx(np.linalg.norm(rest[0]))
    assert np.std(means) <= 1.1 * np.mean(told) and np.mean(told) < 0.5 * np.mean(naive)
    if not shared:  # else nothing is left to chance
        assert np.mean(told) == pytest.approx(np.std(means), rel=0.15)
