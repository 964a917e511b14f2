"""metrics.jsonl across kills and resumes, curves, and the table over runs."""
import json
import math
import struct

import numpy as np
import pytest

from hdlm_jax.common.console import progress
from hdlm_jax.report import __main__ as report
from hdlm_jax.report import compare
from hdlm_jax.training.metrics import MetricsFile, peak_flops, plot_curves, read_metrics


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
    other = tmp_path / "hdlm" / "evaluate.json"
    other.write_text(other.read_text().replace("0123456789abcdef", "another"))
    with pytest.raises(SystemExit, match="different text .corpus differs"):
        report.main([one, two])


def test_report_says_what_is_missing(tmp_path):
    with pytest.raises(SystemExit, match="2"):
        report.main([])
    with pytest.raises(SystemExit, match="evaluate.json is missing; run --mode=evaluate on"):
        report.main([str(tmp_path)])
    make_run(tmp_path / "a", 5.0, [300, 1])
    (tmp_path / "a" / "generate.json").unlink()
    with pytest.raises(SystemExit, match="generate.json is missing; run --mode=generate on"):
        report.main([str(tmp_path / "a")])
