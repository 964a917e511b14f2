"""The embedded corpus: the documentation that ships inside Python itself."""

from __future__ import annotations

import ast
import functools
import sysconfig
import warnings
from pathlib import Path

from hdlm_jax.data.records import Document

EMBEDDED = "embedded"  # its name as a source

# Folders of the standard library that are tests, other people's packages or caches.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}


@functools.lru_cache(maxsize=1)
def embedded_corpus() -> tuple[tuple[Document, ...], int]:
    """The documentation that ships inside Python: one document per language topic, one per documented module.

    The topics are `pydoc_data/topics.py`; a module's document is its docstrings joined by blank lines. Source files
    are read with `ast`, nothing is imported; sorted by path, tests left out. The text depends on the Python version.

    Returns: the documents, and how many source files could not be read (some are broken on purpose).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found, unreadable = [], 0
    try:
        for name, text in sorted(_topics(root / "pydoc_data" / "topics.py").items()):
            found.append(Document(text, f"topic {name}"))
    except (OSError, SyntaxError, ValueError):
        unreadable += 1
    paths = [path for path in root.rglob("*.py") if _LEFT_OUT.isdisjoint(path.relative_to(root).parts)]
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        try:
            text = "\n\n".join(docstrings(path.read_bytes()))
            text.encode("utf-8")  # an escaped lone surrogate is no text
        except (OSError, SyntaxError, ValueError, RecursionError):
            unreadable += 1
            continue
        found.append(Document(text, path.relative_to(root).as_posix()))
    found = [document for document in found if document.text.strip()]
    if not found:
        raise ValueError(f"the embedded corpus needs Python's own source files, none found in {root}; "
                         "set data.source='files' and data.files")
    return tuple(found), unreadable


def _topics(path: Path) -> dict[str, str]:
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "topics":
            return ast.literal_eval(node.value)
    raise ValueError(f"{path}: no topics")


def docstrings(source: bytes | str) -> list[str]:
    """All docstrings of a module's source, in source order: module, classes, functions (nested ones too)."""
    with warnings.catch_warnings():  # invalid escapes in old sources are not our affair
        warnings.simplefilter("ignore")
        nodes = [node for node in ast.walk(ast.parse(source))
                 if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
    nodes.sort(key=lambda node: (getattr(node, "lineno", 0), getattr(node, "col_offset", 0)))
    return [text for text in map(ast.get_docstring, nodes) if text and text.strip()]
