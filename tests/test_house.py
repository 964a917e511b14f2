"""The house, read off the syntax trees: imports go one way, and all of them stand at the top of their files."""
import ast
import subprocess
import sys
from pathlib import Path

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


# from the ground up: a room imports from itself and from those before it
ROOMS = ("config", "common", "diffusion", "models", "data", "training", "decoding", "evaluation", "runs", "report",
         "library", "api", "main")


def test_rooms_stand_on_what_is_below_them(root):
    found = modules(root)
    up = []
    for name, tree in found.items():
        room = name.split(".")[1]
        if room == "__init__":
            continue
        for target in imported(tree, found):
            there = target.split(".")[1]
            if there != "__init__" and ROOMS.index(there) > ROOMS.index(room):
                up.append(f"{name} -> {target}")
    assert up == []


def test_rooms_are_few(root):
    """At most ten rooms, and nothing beside them but the front door and the Python faces."""
    package = root / "hdlm_jax"
    assert len([path for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"]) <= 10
    assert {path.stem for path in package.glob("*.py")} <= {"__init__", "api", "library", "main"}


def test_settings_need_no_network(root):
    """The config room imports nothing of ours, and neither JAX nor Flax."""
    code = "import sys, hdlm_jax.config; print([n for n in ('jax', 'flax', 'optax') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=root).stdout.strip() == "[]"


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
