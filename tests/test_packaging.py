"""The package as users get it: metadata, requirements, and a wheel that builds and imports."""
import os
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
    assert set(metadata["packages"]) == packages_on_disk(root) | {"hdlm_jax.configs"}  # no folder without __init__.py


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
    for name in ("hdlm_jax", "configs"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    empty = tmp_path / "empty"
    empty.mkdir()

    def run(*command: object) -> str:
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run([str(part) for part in command], cwd=empty, capture_output=True, text=True, env=clean)
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
    assert {"report.html", "report.js"} <= {path.name for path in Path(where).parent.glob("report/*")}
    assert {"hdlm_jax", *names} >= {".".join(file.parts).removesuffix(".__init__") for file in files}
    # the whole main job by name, from an empty folder, by the console command; then a run that knows what it is
    small = ("--config.train.steps=3", "--config.train.batch_size=8", "--config.model.width=32",
             "--config.model.blocks=2", "--config.model.seq_len=32",
             "--config.tokenizer.kind=bytes", "--config.tokenizer.vocab_size=257",
             "--config.hierarchy.clusters=(8,)", "--config.optimizer.warmup=1", "--config.evaluate.rows=8")
    command = fresh / "bin" / "hdlm-jax"
    assert "train: done, step 3" in run(command, "--config=hdlm_tiny", "--workdir=runs/a", *small)
    said = {"evaluate": "NELBO", "generate": "samples", "report": "report.html", "export": "export: "}
    for mode in said:
        assert said[mode] in run(command, "--workdir=runs/a", f"--mode={mode}", "--config.generate.num_samples=2")
    assert sorted(path.name for path in empty.iterdir()) == ["runs"]
