"""docs/settings.md from the dataclasses of hdlm_jax/config: every setting, its default, its range and what it is.

    python -m tools.settings             # rewrites the page
    python -m tools.settings --check     # exit code 1 where the page is not what the code says
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from hdlm_jax.config import Config, command
from tools.cli import ROOT

PAGE = ROOT / command.PAGE
HEAD = """# All settings

Made from hdlm_jax/config by `python -m tools.settings`; `hdlm-jax --config.help=generate` prints a section. Set one on
the command line, `--config.train.steps=100`, or in a recipe, `c.train.steps = 100`; lists as
`--config.hierarchy.clusters='(256, 16)'` or `--config.evaluate.tasks=arc_easy,piqa` (a file with a comma in its name as
`--config.data.files='("a,b.txt",)'`). A name that does not exist, a wrong type or a broken rule is one line, before any
compute.
"""


def page() -> str:
    parts = [HEAD]
    for field in dataclasses.fields(Config):
        doc = command.meaning_of(field.name)
        parts.append(f"\n## {field.name}\n" + (f"\n{doc}\n" if doc else ""))
        parts.append("\n| setting | default | range | |\n| --- | --- | --- | --- |\n")
        for one in command.settings_of(field.name):
            text, asked = (value.replace("|", "\\|") for value in (one.meaning, one.rules))
            parts.append(f"| `{one.name}` | `{one.default!r}` | {asked} | {text} |\n")
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
