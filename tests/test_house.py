"""The house, read off the syntax trees: imports go one way, and all of them stand at the top of their files."""
import ast
from pathlib import Path

import pytest

EXEMPT = ("main.py", "__init__.py")  # the front door and the lazy faces of rooms


def modules(root: Path) -> dict[str, ast.Module]:
    """Module name -> its syntax tree."""
    return {".".join(path.relative_to(root).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
            for path in sorted((root / "hdlm_jax").rglob("*.py"))}


def imported(tree: ast.AST, known) -> set[str]:
    """Modules of ours that a tree imports, wherever it does."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & set(known)


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other."""
    reach = {name: {name} for name in edges}
    changed = True
    while changed:
        changed = False
        for name, targets in edges.items():
            more = set().union(reach[name], *(reach[t] for t in targets))
            changed |= more != reach[name]
            reach[name] = more
    groups = {tuple(sorted(b for b in edges if b in reach[a] and a in reach[b])) for a in edges}
    return sorted(list(group) for group in groups if len(group) > 1)


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_imports_go_one_way(root):
    found = modules(root)
    edges = {name: imported(tree, found) - {name} for name, tree in found.items()
             if not f"{name.rpartition('.')[2]}.py".endswith(EXEMPT)}
    edges = {name: targets & set(edges) for name, targets in edges.items()}
    assert len(edges) > 50 and circles(edges) == []


@pytest.mark.parametrize("room, below", [X
                                         ("decoding", ("diffusion", "text", "model"))])
def test_rooms_stand_on_what_is_below_them(root, room, below):
    found = modules(root)
    for name, tree in found.items():
        if name.startswith(f"hdlm_jax.{room}."):
            rooms = {target.split(".")[1] for target in imported(tree, found) if target != "hdlm_jax.__init__"}
            assert rooms - {room, "jsons"} <= set(below), name


def test_imports_of_ours_stand_at_the_top(root):
    found = modules(root)
    inside = []
    for name, tree in found.items():
        if f"{name.rpartition('.')[2]}.py".endswith(EXEMPT):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and imported(node, found):
                inside.append(f"{name}.{node.name}")
    assert inside == []
