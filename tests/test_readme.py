"""What README.md and docs/ say agrees with what is there: tables with their runs, recipes, settings."""
import re
import shutil

import numpy as np

from hdlm_jax.config import check_name, recipes
from tools import settings, tables


def test_tables_are_what_their_runs_say(root, capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out
    marks = [found for path in (root / "README.md", root / "docs" / "results.md")
             for found in tables.MARK.findall(path.read_text(encoding="utf-8"))]
    assert len(marks) >= 2 and all("± " in found[3] for found in marks if found[1] == "runs")


def test_a_table_that_differs_is_found_and_rewritten(root, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(root / "docs", copy / "docs")
    text = (root / "README.md").read_text(encoding="utf-8")
    wrong = re.sub(r"(\| hdlm_tiny +\| [^|]+\| \d+ +\| )\d", r"\g<1>9", text)
    assert wrong != text
    (copy / "README.md").write_text(wrong, encoding="utf-8")
    monkeypatch.setattr(tables, "ROOT", copy)
    assert tables.main(["--check"]) == 1 and "README.md: not what the runs say" in capsys.readouterr().out
    assert tables.main([]) == 0 and (copy / "README.md").read_text(encoding="utf-8") == text


def test_recipes_settings_tests_and_links_of_the_documents_exist(root):
    tests = "".join(path.read_text(encoding="utf-8") for path in (root / "tests").glob("*.py"))
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        for name in set(re.findall(r"configs/(\w+\.py)", text)):
            assert (root / "configs" / name).exists(), (path, name)
        for name in set(re.findall(r"--config=(\w+)\b(?!/)", text)) - {"configs", "FILE"}:
            assert name in recipes.names(), (path, name)
        for name in set(re.findall(r"--config\.([a-z_]+\.[a-z_0-9]+)", text)):
            check_name(name)
        for name in set(re.findall(r"`(test_\w+)`", text)):
            assert f"def {name}(" in tests, (path, name)
        for name in set(re.findall(r"\]\(((?!http|#)[\w/.]+)(?:#[\w-]+)?\)", text)):
            assert (path.parent / name).exists(), (path, name)


def test_the_page_of_settings_is_what_the_code_says():
    assert settings.page() == settings.PAGE.read_text(encoding="utf-8"), "run python -m tools.settings"
    assert "|  |\n" not in settings.page(), "a setting without a word about it"


def test_the_worked_token_of_the_walk(root):
    """docs/reading.md: its code runs, and the numbers in its comments and text are what it gives."""
    text = (root / "docs" / "reading.md").read_text(encoding="utf-8")
    space: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], space)
    np.testing.assert_allclose(space["beta"][0], [0.4966, 0.3476, 0.1558], atol=5e-5)
    np.testing.assert_allclose(space["w"][0], [1.4286, 2.2311], atol=5e-5)
    chain, loss = space["process"].chain, [float(space["at_cluster"][0, 0]), float(space["at_mask"][0, 0])]
    np.testing.assert_allclose(loss, [1.3863, 0.9163], atol=5e-5)
    tau = np.linspace(1e-4, 40, 400_001)
    rate = chain.beta(tau, np)[:, 1:] * chain.weight(tau, np)
    np.testing.assert_allclose(np.trapezoid(rate, tau, axis=0) @ loss, 2.3026, atol=1e-3)
    for number in ("1.3863", ".9163", "2.3026", "1.4286", "2.2311"):
        assert number in text
