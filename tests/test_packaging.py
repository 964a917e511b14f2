"""The package as users get it: metadata, requirements, and a wheel that builds and imports."""
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from unittest import mock

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hdlm_jax


@pytest.fixture(scope="module")
def metadata(root: Path) -> dict:
    """The arguments setup.py hands to setuptools."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(root / "setup.py"))
    return setup.call_args.kwargs


def packages_on_disk(root: Path) -> set[str]:
    """Every folder of hdlm_jax that holds Python files, as a dotted name."""
    return {".".join(path.parent.relative_to(root).parts) for path in (root / "hdlm_jax").rglob("*.py")}


def test_version_and_packages(metadata: dict, root: Path):
    assert metadata["version"] == hdlm_jax.__version__
    assert f"version: {hdlm_jax.__version__}\n" in (root / "CITATION.cff").read_text()
    assert set(metadata["packages"]) == packages_on_disk(root)  # also: no folder without __init__.py


def test_ranges_have_no_upper_bounds(metadata: dict):
    for line in metadata["install_requires"]:
        assert {part.operator for part in Requirement(line).specifier} == {">="}, line


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_requirements_pin_every_range(metadata: dict, root: Path, python: str):
    lines = [line.split("#")[0].strip() for line in (root / "requirements.txt").read_text().splitlines()]
    pins = {}
    for requirement in map(Requirement, filter(None, lines)):
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            name = canonicalize_name(requirement.name)
            assert name not in pins, f"{name} is pinned twice for Python {python}"
            (part,) = requirement.specifier
            assert part.operator == "==", requirement
            pins[name] = part.version
    for line in metadata["install_requires"] + metadata["extras_require"]["test"]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), line


IMPORT_ALL = """
import importlib, pkgutil, sys, hdlm_jax
names = [info.name for info in pkgutil.walk_packages(hdlm_jax.__path__, "hdlm_jax.")]
for name in names:
    try:
        importlib.import_module(name)
    except ImportError as error:  # lm_eval is an extra: its one module says so
        if name != "hdlm_jax.evaluation.harness" or "pip install 'hdlm_jax[lm-eval]'" not in str(error):
            raise
print(hdlm_jax.__file__, hdlm_jax.__version__, *names, sep="\\n")
"""


@pytest.mark.slow
def test_wheel_builds_and_imports(root: Path, tmp_path: Path):
    """Every module imports from the wheel alone: dependencies are borrowed, our code is not."""
    source, dist, fresh = tmp_path / "source", tmp_path / "dist", tmp_path / "venv"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(root / name, source)
    shutil.copytree(root / "hdlm_jax", source / "hdlm_jax", ignore=shutil.ignore_patterns("__pycache__"))

    def run(*command: object) -> str:
        done = subprocess.run([str(part) for part in command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", dist, source)
    (wheel,) = dist.glob("hdlm_jax-*-py3-none-any.whl")
    venv.create(fresh, with_pip=False)
    run(*pip, "--python", fresh / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    (packages,) = fresh.glob("lib/python*/site-packages")
    # A path file inside a borrowed folder is not followed, so an editable install of ours stays out of sight.
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where, version, *names = run(fresh / "bin" / "python", "-I", "-c", IMPORT_ALL).splitlines()
    assert Path(where).resolve().is_relative_to(fresh.resolve()) and version == hdlm_jax.__version__
    files = [path.relative_to(root).with_suffix("") for path in (root / "hdlm_jax").rglob("*.py")]
    pages = {path.name for path in (root / "hdlm_jax" / "report").glob("report.*")}
    assert pages == {path.name for path in Path(where).parent.glob("report/report.*")} == {
        "report.html", "report.js"}
    assert {"hdlm_jax", *names} == {".".join(file.parts).removesuffix(".__init__") for file in files}
