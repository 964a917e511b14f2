"""What README.md and docs/ say agrees with what is there: tables with their runs, recipes, settings."""
import re
import shutil

from hdlm_jax.config import check_name
from tools import tables


def test_tables_are_what_their_runs_say(root, capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out
    marks = [found for path in (root / "README.md", root / "docs" / "results.md")
             for found in tables.MARK.findall(path.read_text(encoding="utf-8"))]
    assert len(marks) >= 2 and all("± " in found[2] for found in marks)


def test_a_table_that_differs_is_found_and_rewritten(root, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(root / "docs", copy / "docs")
    text = (root / "README.md").read_text(encoding="utf-8")
    wrong = re.sub(r"(\| hdlm_tiny +\| [^|]+\| 500 +\| )\d", r"\g<1>9", text)
    assert wrong != text
    (copy / "README.md").write_text(wrong, encoding="utf-8")
    monkeypatch.setattr(tables, "ROOT", copy)
    assert tables.main(["--check"]) == 1 and "README.md: not what the runs say" in capsys.readouterr().out
    assert tables.main([]) == 0 and (copy / "README.md").read_text(encoding="utf-8") == text


def test_recipes_and_settings_of_the_readme_exist(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    for name in set(re.findall(r"configs/(\w+\.py)", text)):
        assert (root / "configs" / name).exists(), name
    for name in set(re.findall(r"--config\.([a-z_]+\.[a-z_0-9]+)", text)):
        check_name(name)
    for name in set(re.findall(r"\(((?:docs/)[\w/.]+)(?:#[\w-]+)?\)", text)):
        assert (root / name).exists(), name
