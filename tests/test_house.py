"""The house, read off the syntax trees: imports go one way, and all of them stand at the top of their files."""
import ast
import re
import subprocess
import sys
from pathlib import Path

from tools import mutations
from tools.imports import ROOMS, between, circles, imported, ordered, sources

EXEMPT = "hdlm_jax.main"  # the front door imports what a mode needs


def modules(root: Path) -> dict[str, ast.Module]:
    """Module name -> its syntax tree."""
    return {name: ast.parse(text) for name, text in sources(root).items()}


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_rooms_are_ordered_by_their_imports():
    """What the picture of imports does with rooms that are not the house's."""
    edges = {"p.a.x": {"p.b.x", "p.c.x"}, "p.b.x": {"p.c.x", "p.c.y"}, "p.c.x": {"p.a.x"}, "p.c.y": set()}
    counts = between(edges)
    assert counts == {("a", "b"): 1, ("a", "c"): 1, ("b", "c"): 2, ("c", "a"): 1}
    assert ordered({"a", "b", "c"}, counts) == ["c", "b", "a"]
    assert ordered({"models", "config"}, {}) == ["config", "models"]


def test_imports_go_one_way(root):
    found = modules(root)
    edges = {name: imported(tree, found) - {name, EXEMPT} for name, tree in found.items() if name != EXEMPT}
    assert len(edges) > 50 and circles(edges) == []


def test_rooms_stand_on_what_is_below_them(root):
    found = modules(root)
    up = []
    for name, tree in found.items():
        room = name.split(".")[1]
        for target in imported(tree, found):
            there = target.split(".")[1]
            if ROOMS.index(there) > ROOMS.index(room):
                up.append(f"{name} -> {target}")
    assert up == []


def test_rooms_are_few(root):
    """At most eleven rooms, and nothing beside them but the front door and the Python faces."""
    package = root / "hdlm_jax"
    assert len([path for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"]) <= 11
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
        if name == EXEMPT:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and imported(node, found):
                inside.append(f"{name}.{node.name}")
    assert inside == []


# what trains, scores and samples, in the order of docs/reading.md; entries are files or whole rooms
CORE = ("diffusion", "models/trunk.py", "models/attention.py", "models/network.py", "models/heads.py",
        "training/step.py", "training/state.py", "evaluation/elbo.py")


def test_the_core_is_small(root):
    files = [path for name in CORE for path in (
        [root / "hdlm_jax" / name] if name.endswith(".py") else sorted((root / "hdlm_jax" / name).glob("*.py")))]
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert len(lines) >= 13 and sum(lines.values()) <= 3500, lines


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function but for its docstring."""
    first = function.body[0]
    doc = first if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) else None
    return function.end_lineno - function.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if doc else 0)


def test_functions_are_short(root):
    """At most 60 lines of code."""
    long = [f"{name}.{node.name}: {code_lines(node)}" for name, tree in modules(root).items()
            for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and code_lines(node) > 60]
    assert long == []


KINDS = ("Process", "Head", "Trunk", "Network", "Prediction")


def test_nobody_asks_what_a_process_or_a_network_is(root):
    """No isinstance of a process, trunk, head or prediction, no hasattr or getattr of one."""
    asked = []
    for name, tree in modules(root).items():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1):
                continue
            which, about = node.func.id, [ast.unparse(arg) for arg in node.args]
            if which == "isinstance" and re.search(rf"({'|'.join(KINDS)})\b", about[1]) or (
                    which in ("hasattr", "getattr") and about[0].lower().endswith(tuple(map(str.lower, KINDS)))):
                asked.append(f"{name}: {which}({', '.join(about)})")
    assert asked == []


def test_mutations_find_their_place(root):
    """tools/mutations.py changes one place each, and names tests that there are."""
    for name, m in mutations.MUTATIONS.items():
        file, test = m.test.split("::")
        assert (root / m.file).read_text().count(m.old) == 1 and m.old != m.new, name
        assert f"def {test}(" in (root / file).read_text(), name
