"""Tables of README.md and docs/ from the runs' own JSON: rewrites what stands behind each mark, or checks it.

    python launch/tables.py             # rewrites
    python launch/tables.py --check     # exit code 1 where a table is not what its runs say
    python launch/tables.py --keep docs/runs/quickstart runs/quickstart/hdlm_tiny runs/quickstart/mdlm_tiny

A table stands between two marks, <!-- runs: docs/runs/quickstart/hdlm_tiny docs/runs/quickstart/mdlm_tiny --> and
<!-- end -->: that of `python -m hdlm_jax.report.report` of these runs, and their paired differences. --keep
copies of runs what such a table is made from.
"""
import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from hdlm_jax.report import report  # noqa: E402

KEPT = ("evaluate.json", "evaluate_rows.npz", "generate.json", "metrics.jsonl")
MARK = re.compile(r"(<!-- runs: ([^>]+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def rendered(found: re.Match) -> str:
    workdirs = [str(ROOT / name) for name in found[2].split()]
    lines = [report.table(workdirs), *report.differences(workdirs)]
    return found[1] + "\n" + "\n\n".join(lines) + "\n\n" + found[4]


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--keep"]:
        for workdir in arguments[2:]:
            folder = Path(arguments[1], os.path.basename(os.path.normpath(workdir)))
            folder.mkdir(parents=True, exist_ok=True)
            for name in KEPT:
                shutil.copyfile(Path(workdir, name), folder / name)
        return 0
    differ = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        old = path.read_text(encoding="utf-8")
        new = MARK.sub(rendered, old)
        if new != old:
            differ.append(path.name)
            if "--check" not in arguments:
                path.write_text(new, encoding="utf-8")
    if differ:
        print(f"tables: {', '.join(differ)}: {'not what the runs say' if '--check' in arguments else 'rewritten'}")
    return int("--check" in arguments and bool(differ))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
