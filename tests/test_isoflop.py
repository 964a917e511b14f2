"""Scaling laws by equal compute: a law that is known comes back, budgets buy what they say."""
import math

import numpy as np
import pytest

from hdlm_jax.config import recipe, resolve
from hdlm_jax.models.make import flops_per_token
from hdlm_jax.training.state import build
from tools import isoflop
from tools.plan import balanced

ALPHA, BETA = 0.4, 0.3  # exponents of parameters and of tokens


def lines(kind, factor=1.0, budgets=(1e13, 1e14, 1e15), noise=0.0, seeds=1):
    """Losses 60 N^-alpha + 60 (tokens factor)^-beta at C = 6 N tokens: no floor, N ~ C^(beta / (alpha + beta))."""
    rng, found = np.random.default_rng(0), []
    for budget in budgets:
        best = 0.5 * (budget / 6 * factor) ** (BETA / (ALPHA + BETA))
        for size in best * np.array([0.35, 0.7, 1.4, 2.8]):
            loss = 60 * size**-ALPHA + 60 * (budget * factor / (6 * size)) ** -BETA
            found += [{"kind": kind, "budget": budget, "n": round(size), "se": noise, "seed": seed,
                       "nelbo": loss + noise * rng.normal(), "name": f"{kind}-{size}-{budget}-{seed}"}
                      for seed in range(seeds)]
    return found


def test_a_known_law_comes_back():
    law = isoflop.laws(lines("ar"))["ar"]
    assert law["size"] == pytest.approx(BETA / (ALPHA + BETA), abs=0.01)
    assert law["loss"] == pytest.approx(-ALPHA * BETA / (ALPHA + BETA), abs=0.005)
    for budget, fit in law["fits"].items():
        x = np.geomspace(fit.best / 8, fit.best * 8, 4001)
        loss = 60 * x**-ALPHA + 60 * (budget / (6 * x)) ** -BETA
        assert fit.best == pytest.approx(x[loss.argmin()], rel=0.25) and fit.loss == pytest.approx(loss.min(), rel=0.01)


def test_compute_for_the_same_loss():
    """A kind that learns from a token what the other learns from a quarter of one needs a constant multiple."""
    found = isoflop.laws(lines("ar") + lines("mdlm", factor=0.25))
    budget = 1e15
    loss = found["ar"]["fits"][budget].loss
    assert isoflop.compute_for(found["ar"], loss, budget) == pytest.approx(1, abs=0.1)
    assert isoflop.compute_for(found["mdlm"], loss, budget) == pytest.approx(4, rel=0.1)


def test_errors_are_those_of_the_losses():
    """The spread of exponents drawn anew is that between data sets drawn anew."""
    noise, n, draw = 0.001, 250, np.random.default_rng(1)
    clean = lines("ar")
    fresh = [isoflop.laws([line | {"nelbo": line["nelbo"] + noise * draw.normal()} for line in clean])["ar"]["size"]
             for _ in range(n)]
    told = [isoflop.laws([line | {"se": noise} for line in clean], draw)["ar"]["size"] for _ in range(n)]
    assert np.std(told) == pytest.approx(np.std(fresh), rel=5 / math.sqrt(n))  # five standard errors of the two
    shown = isoflop.table(lines("ar", noise=noise) + lines("mdlm", 0.25, noise=noise), boots=20)
    assert "loss ~ C^" in shown and shown.count("±") >= 8


def test_sizes_that_do_not_hold_the_best_have_none():
    sizes = np.array([1e5, 2e5, 4e5, 8e5])
    assert math.isnan(isoflop.parabola(sizes, np.log(sizes)).best)  # a line
    assert math.isnan(isoflop.parabola(sizes, -((np.log(sizes) - 12.5) ** 2)).best)  # opens downwards
    assert math.isnan(isoflop.parabola(sizes, (np.log(sizes) - 20) ** 2).best)  # far outside
    assert isoflop.parabola(sizes, (np.log(sizes) - 12.5) ** 2 + 3) == pytest.approx((math.exp(12.5), 3))
    one = isoflop.table(lines("ar", budgets=(1e13,)), boots=5)
    assert "not to be had" in one  # no law from one budget


def test_kinds_of_other_budgets_stand_under_their_own():
    """Cells are of the budget above them, empty where a kind has none; a first kind without any is told of."""
    shown = isoflop.table(lines("ar", budgets=(1e13, 1e14)) + lines("mdlm", budgets=(1e14, 1e15)), boots=2)
    head, _, ar, mdlm = ([cell.strip() for cell in line.split("|")[1:-1]] for line in shown.split("\n"))
    assert [name[-5:] for name in head[1:4]] == ["1e+13", "1e+14", "1e+15"]
    assert [bool(cell) for cell in ar[1:4]] == [True, True, False]
    assert [bool(cell) for cell in mdlm[1:4]] == [False, True, True] and ar[2].split()[:3] == mdlm[2].split()[:3]
    with pytest.raises(ValueError, match="ar has no budget with three sizes"):
        isoflop.table(lines("ar")[:2] + lines("mdlm"), boots=2)


@pytest.mark.parametrize("kind", isoflop.KINDS)
def test_a_budget_buys_what_it_says(kind):
    given = isoflop.settings(kind, "64x2", 3e12, 0, 16)
    c = recipe("books", f"{kind}-muon")
    c.update_from_flattened_dict(given)
    config = resolve(c)
    hierarchy = balanced(config)
    spent = (flops_per_token(config, hierarchy, build(config, hierarchy)[1]) * config.model.seq_len
             * config.train.batch_size * config.train.steps)
    assert spent == pytest.approx(3e12, rel=0.01) and config.optimizer.warmup < config.train.steps


def test_what_cannot_be_is_refused_before_any_run(tmp_path):
    for flags, said in ((["--sizes=64"], "WIDTHxBLOCKS"), (["--budgets=1e9"], "are the fewest"),
                        (["--kinds=mldm"], "mldm")):
        with pytest.raises(SystemExit, match=said):
            isoflop.main([*flags, f"--out={tmp_path / 'lines.jsonl'}", f"--runs={tmp_path}"])
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_made_again(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(isoflop, "make", lambda name, *_: made.append(name) or {
        "nelbo": 5.0 + len(made), "se": 0.1, "params": 1, "tokens": 1})
    flags = ["--budgets=3e12", "--kinds=mdlm", f"--out={tmp_path / 'lines.jsonl'}", f"--runs={tmp_path / 'runs'}"]
    for _ in range(2):
        isoflop.main([*flags, "--sizes=32x2,64x2"])
    isoflop.main([*flags, "--list"])
    assert made == ["mdlm-32x2-3e+12", "mdlm-64x2-3e+12"]
    assert capsys.readouterr().out.count("done") == 4
    isoflop.main([*flags, "--sizes=96x3"])
    picture = tmp_path / "laws.png"
    isoflop.main([*flags, f"--picture={picture}"])
    assert picture.stat().st_size > 5000
