"""Trained runs side by side: python -m hdlm_jax.report WORKDIR [WORKDIR ...] [--html=FILE]"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hdlm_jax.report import compare


def main(argv: Sequence[str] | None = None) -> None:
    ask = argparse.ArgumentParser(prog="python -m hdlm_jax.report", allow_abbrev=False,
                                  description="Trained runs side by side; one run as a page is --mode=report.")
    ask.add_argument("workdir", nargs="+")
    ask.add_argument("--html", metavar="FILE", help="write a page with curves; default: tables in Markdown, printed")
    given = ask.parse_args(argv)
    if given.html == "":
        ask.error("--html: needs the name of a file")
    try:
        if given.html:
            compare.write_page(given.html, given.workdir)
        else:
            print(compare.summary(given.workdir))
    except (ValueError, OSError) as error:
        raise SystemExit(f"report: {error}") from error


if __name__ == "__main__":
    main()
