"""docs/settings.md from the dataclasses of hdlm_jax/config: every setting, its default and what it is.

    python -m tools.settings             # rewrites the page
    python -m tools.settings --check     # exit code 1 where the page is not what the code says
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import sys
from pathlib import Path

from hdlm_jax.config import Config

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"
HEAD = """# All settings

Made from hdlm_jax/config by `python -m tools.settings`. Set one on the command line, `--config.train.steps=100`, or in
a recipe, `c.train.steps = 100`; tuples as `--config.hierarchy.clusters='(256, 16)'`. A name that does not exist, a
wrong type or a broken rule is one line, before any compute.
"""


def comments(section: type) -> dict[str, str]:
    """Field -> the comment behind it in the source."""
    lines = inspect.getsource(section).splitlines()
    tree = ast.parse("\n".join(lines))
    found = {}
    for node in tree.body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            last = node.end_lineno or node.lineno
            found[node.target.id] = lines[last - 1][node.end_col_offset or 0:].partition("#")[2].strip()
    return found


def page() -> str:
    parts = [HEAD]
    for field in dataclasses.fields(Config):
        section: type = type(field.default)
        said = comments(section)
        doc = " ".join((section.__doc__ or "").split())
        if doc.startswith(f"{section.__name__}("):  # dataclasses' own
            doc = ""
        parts.append(f"\n## {field.name}\n" + (f"\n{doc}\n" if doc else ""))
        parts.append("\n| setting | default | |\n| --- | --- | --- |\n")
        for setting in dataclasses.fields(section):  # type: ignore[arg-type]
            text = said[setting.name].replace("|", "\\|")
            parts.append(f"| `{field.name}.{setting.name}` | `{setting.default!r}` | {text} |\n")
    return "".join(parts)


def main(argv: list[str]) -> int:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--check", action="store_true")
    if ask.parse_args(argv).check:
        same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page()
        print("settings: the page is what the code says" if same else f"settings: {PAGE} is not what the code says; "
              "run python -m tools.settings")
        return int(not same)
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
