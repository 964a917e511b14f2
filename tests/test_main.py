"""The front door: each mistake is one clear line and exit code 1, before any work; every mode works."""
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest
from absl import flags
from tiny import SEQ_LEN, trained, write_recipe

from hdlm_jax import main
from hdlm_jax.common import jsons, lock
from hdlm_jax.config import command, default, recipes, resolve
from hdlm_jax.report import __main__ as report
from hdlm_jax.runs import chat, evaluate, serve, stages
from hdlm_jax.training import state


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """call(*flags) -> (exit code, stdout, stderr) of the front door in this process, run from an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        argv = ["hdlm_jax", *map(str, args)]
        monkeypatch.setattr(sys, "argv", argv)
        for name in [n for n in flags.FLAGS if n.startswith("config.")]:
            delattr(flags.FLAGS, name)
        for name in ("config", "workdir", "mode", "model", "profile", "distributed"):
            flags.FLAGS[name].unparse()
        flags.FLAGS.unparse_flags()
        sys.modules.pop("config_config", None)  # the config file before, as ml_collections names it
        capsys.readouterr()
        try:
            main.run(main.parse(argv))
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path / "recipe")


@pytest.mark.slow
def test_serve_in_short(call, monkeypatch):
    """hdlm-jax serve RUN --port N is --mode=serve --workdir=RUN --config.serve.port=N."""
    asked = []
    monkeypatch.setattr(serve, "serve", lambda config, workdir, page, about: asked.append(
        (config.serve.port, workdir, about["name"], "data-part=live" in page)))
    for port in (("--port", "8123"), ("--port=8123",)):
        assert call("serve", trained()[1], *port)[0] == 0
    assert asked == [(8123, str(trained()[1]), "run", True)] * 2
    one_line(*call("serve", trained()[1], "--port=99999"), "serve.port=99999: must lie in 0..65535")


def test_chat_in_short(call, monkeypatch):
    """hdlm-jax chat RUN is --mode=chat --workdir=RUN."""
    asked = []
    monkeypatch.setattr(chat, "chat", lambda config, workdir: asked.append(workdir))
    assert call("chat", trained()[1])[0] == 0 and asked == [str(trained()[1])]


def one_line(code, out, err, match):
    assert code == 1 and err.startswith("hdlm_jax: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert re.search(match, err), err
    assert len(err) < 500 and "Traceback" not in err


@pytest.mark.parametrize("args, match", [
    (["--workdir=gs://bucket/run"], "workdir='gs://bucket/run': must be a folder of this machine or mounted there"),
    (["--config.data.dir=gs://bucket/tokens"], "data.dir='gs://bucket/tokens': must be a folder of this machine"),
    (["--config.train.stpes=5"], "config.train.stpes: no such setting; .*did you mean 'steps'"),
    (["--config.trian.steps=5"], "config.trian.steps: no such section; .*did you mean 'train'"),
    (["--config.train=5"], "config.train.*: "),
    (["--config.train.steps=abc"], "train.steps=abc: .*'abc'"),
    (["--config.train.steps=0"], "train.steps=0: must be at least 1"),
    (["--mode=trian"], "--mode='trian': choose one of prepare, .*did you mean 'train'"),
    (["--wrkdir=x"], "[Uu]nknown.* flag 'wrkdir'. Did you mean: workdir"),
    (["evaluate"], "unexpected argument 'evaluate'; flags begin with --"),
    (["--config.diffusion.xi=0.1"], r"diffusion.xi=0.1: must lie in \(1/n, 1\] = \(0.125, 1\] for n = 8 clusters"),
    (["--config.model.heads=5"], "model.heads=5: must divide model.width=32"),
    (["--config.hierarchy.clusters=(300,)"], r"hierarchy.clusters=\(300,\): more clusters than .*257 words"),
    (["--config.hierarchy.clusters=(2.5,)"], "hierarchy.clusters=2.5: must be of type int"),
    (["--config.tokenizer.kind=bpe", "--config.tokenizer.vocab_size=100"], "tokenizer.vocab_size=100: .*at least 257"),
    (["--config.parallel.data=3"], r"parallel=\(3, 1, 1\): does not multiply to the 8 devices at hand"),
    (["--mode=evaluate"], "train first"),
    (["--mode=generate"], "train first"),
    (["--config.data.files=('nowhere/*.jsonl',)"], "nowhere/.*.jsonl"),
])
def test_mistakes_before_anything_is_made(call, recipe, tmp_path, args, match):
    one_line(*call(f"--config={recipe}", *args), match)
    assert not (tmp_path / "runs" / "recipe" / "config.json").exists()
    if "nowhere" not in match:
        assert not (tmp_path / "runs").exists(), "nothing was written"


def test_the_config_file_itself(call, tmp_path):
    one_line(*call(), "--config is missing; give a recipe, as in --config=hdlm_tiny, or the --workdir of a run")
    one_line(*call("--config=hdlm_tyni"), "--config='hdlm_tyni': choose one of .*did you mean 'hdlm_tiny'")
    one_line(*call("--config", "hdlm_tiny", "--config.train.steps=0"), "train.steps=0: must be at least 1")
    one_line(*call("--workdir=nowhere", "--mode=evaluate"), "workdir='nowhere': no run there yet; give a recipe")
    one_line(*call("--config.train.steps=5"), "--config")
    one_line(*call("--config=nope.py"), "--config=nope.py: .*No such file")
    one_line(*call("--config=nope.py", "--config.train.steps=5"), "--config=nope.py: .*No such file")
    head = "from hdlm_jax import config\n\ndef get_config(kind=''):\n"
    broken = {"no_function": "x = 1", "syntax": "def get_config(:", "key": head + "  return {}[kind]",
              "typo": head + "  c = config.default()\n  c.train.stpes = 5\n  return c",
              "value": head + "  raise ValueError('not this')"}
    for name, text in broken.items():
        (tmp_path / f"{name}.py").write_text(text)
    one_line(*call("--config=no_function.py"), "--config=no_function.py: .*get_config")
    one_line(*call("--config=syntax.py"), "--config=syntax.py: SyntaxError")
    one_line(*call("--config=typo.py"), "stpes")
    one_line(*call("--config=key.py:mdln"), "--config=key.py:mdln: KeyError: 'mdln'")
    one_line(*call("--config=value.py"), "not this")


def test_a_traceback_can_be_asked_for(call, monkeypatch):
    monkeypatch.setenv("HDLM_TRACEBACK", "1")
    with pytest.raises(ValueError, match="--config is missing"):
        call()


def test_a_full_disk_is_one_line_with_the_file_and_the_remedy(call, recipe, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    one_line(*call(f"--config={recipe}", f"--workdir={tmp_path / 'run'}", "--mode=prepare"),
             r"No space left on device.*tokenizer\.tiktoken'; make room and run the same command again, what was")
    assert not list((tmp_path / "run" / "data").glob("*.t*"))


@pytest.fixture
def read_only(monkeypatch, tmp_path):
    """Nothing can be made, opened for writing or renamed beneath tmp_path / "tokens"."""
    def guard(owner, name, writes):
        real = getattr(owner, name)

        def guarded(path, *args, **kwargs):
            if str(tmp_path / "tokens") in os.path.abspath(os.fspath(path)) and writes(path, *args):
                raise OSError(errno.EROFS, "Read-only file system", os.fspath(path))
            return real(path, *args, **kwargs)

        monkeypatch.setattr(owner, name, guarded)

    guard(os, "mkdir", lambda *_: True)
    guard(os, "open", lambda path, flags, *_: flags & (os.O_RDWR | os.O_CREAT))
    guard(jsons, "open_atomic", lambda *_: True)
    guard(stages, "open_atomic", lambda *_: True)


@pytest.mark.parametrize("mode", ["prepare", "train", "cluster"])
@pytest.mark.parametrize("there", [True, False])
def test_a_data_dir_that_cannot_be_written_and_is_not_whole(call, recipe, tmp_path, read_only, mode, there):
    if there:
        os.makedirs(tmp_path / "elsewhere")
        os.rename(tmp_path / "elsewhere", tmp_path / "tokens")
    one_line(*call(f"--config={recipe}", "--workdir=w", f"--mode={mode}", "--config.data.dir=tokens"),
             r"data.dir='tokens' cannot be written \(Read-only file system\), and its tokens are not whole: give an")


def test_a_whole_data_dir_that_cannot_be_written_is_read(call, tmp_path, read_only):
    """Hashes cannot be kept there, which is said once, nor embeddings, which go to the workdir."""
    recipe, run = trained()
    shutil.copytree(run / "data", tmp_path / "elsewhere", ignore=shutil.ignore_patterns("verified.json", "embed*"))
    os.rename(tmp_path / "elsewhere", tmp_path / "tokens")
    code, out, err = call(f"--config={recipe}", "--workdir=w", "--config.data.dir=tokens", "--mode=cluster")
    assert code == 0 and not err, err
    assert out.count("verified.json cannot be written (Read-only file system)") == 1
    assert "tokens: reusing tokens" in out and out.count("embeddings: ") == 1
    assert list(tmp_path.glob("w/embeddings-*.npy"))
    (tmp_path / "w" / "hierarchy.npz").unlink()
    code, out, err = call(f"--config={recipe}", "--workdir=w", "--config.data.dir=tokens", "--mode=cluster")
    assert code == 0 and "embeddings: reusing w/embeddings-" in out


def test_text_that_does_not_fit(call, recipe, tmp_path, monkeypatch):
    """Prepared but not trained on: no weight is made before the settings are known to fit the text."""
    monkeypatch.setattr(state, "init_state", None)
    run = [f"--config={recipe}", "--workdir=w"]
    one_line(*call(*run, "--config.model.seq_len=5000"), "model.seq_len is 5000; .*at most the 1390 training tokens")
    code, out, err = call(*run, "--mode=cluster")
    assert code == 0 and "tokens: reusing" in out and "hierarchy: levels 257 -> 8 -> 1" in out and not err
    other = ["--config.tokenizer.kind=bpe", "--config.tokenizer.vocab_size=300"]
    one_line(*call(*run, *other), "tokens in .* were made with tokenizer.kind='bytes', it is now 'bpe'")
    one_line(*call(*run, "--config.hierarchy.clusters=(4,)"), r"hierarchy.clusters=\[4\].* was made with \[8\]")
    (tmp_path / "w" / "hierarchy.npz").write_bytes(b"nonsense")
    one_line(*call(*run), "hierarchy.npz is no hierarchy file, or damaged")
    (tmp_path / "recipe" / "corpus.jsonl").write_text('{"txet": "a"}\n')
    one_line(*call(f"--config={recipe}", "--workdir=v"), "corpus.jsonl.*text")


def test_a_run_knows_what_it_is(call, tmp_path):
    """Without --config: the run's own settings, overridden as those of a recipe; contradictions named all at once."""
    workdir = shutil.copytree(trained()[1], tmp_path / "run")
    run = [f"--workdir={workdir}"]
    code, out, err = call(*run, "--mode=evaluate")
    assert code == 0 and "evaluate: step 3" in out and not err
    code, out, err = call(*run, "--mode=generate", "--config.generate.num_samples=2", "--config.generate.steps=4")
    assert code == 0 and "2 samples, 4 network calls" in out
    for mode, said in (("export", "export: step 3"), ("report", "report.html")):
        code, out, err = call(*run, f"--mode={mode}")
        assert code == 0 and said in out, mode
    code, out, err = call(*run)
    assert code == 0 and "nothing to do, step 3 is there" in out
    code, out, err = call(f"--workdir={workdir}/export", "--mode=generate", "--config.generate.num_samples=2")
    assert code == 0 and "2 samples" in out
    wrong = ["--config.model.width=64", "--config.diffusion.xi=0.5"]
    one_line(*call(*run, "--mode=evaluate", *wrong), r"diffusion.xi=0.5 \(there 1.0\); model.width=64 \(there 32\): ")
    one_line(*call(*run, *wrong), r"diffusion.xi=0.5 \(there 1.0\); model.width=64 \(there 32\): the checkpoint in ")
    one_line(*call(*run, "--mode=evaluate", "--config.train.stpes=5"), "config.train.stpes: no such setting")


def test_recipes_by_name(call, tmp_path):
    """From an empty folder; an argument behind a colon; a file by its path as ever."""
    for name in ("--config=mdlm_tiny", "--config=books:mdlm"):
        where = tmp_path / name[9:13]
        code, out, err = call(name, f"--workdir={where}", "--mode=cluster", "--config.data.source=embedded",
                              "--config.data.files=()", "--config.data.validation=()",
                              "--config.tokenizer.kind=bytes", "--config.tokenizer.vocab_size=257")
        assert code == 0 and "hierarchy: levels 257 -> 1" in out, err


def test_modes_of_a_trained_run(call, tmp_path):
    recipe, workdir = trained()[0], shutil.copytree(trained()[1], tmp_path / "run")
    run = [f"--config={recipe}", f"--workdir={workdir}"]
    one_line(*call(*run, "--mode=evaluate", "--config.model.width=64"),
             r"model.width=64 \(there 32\): .* was trained otherwise")
    one_line(*call(*run, "--config.optimizer.lr=0.5"),
             r"optimizer.lr=0.5 \(there 0.001\): the checkpoint in .* was trained otherwise")
    code, out, err = call(*run)
    assert code == 0 and "nothing to do, step 3 is there" in out and not err
    with lock.held(str(workdir / "lock"), "train"):  # beside a training
        code, out, err = call(*run, "--mode=generate", "--config.generate.prompt=The ")
    assert code == 0 and "3 samples, 6 network calls" in out and not err
    result = json.loads((workdir / "generate.json").read_text())
    settings = result["settings"]
    assert (result["samples"], settings["steps"], settings["prompt"]) == (3, 6, "The ")
    assert 5 < result["network_calls"] <= 6 and result["compile_s"] > 0
    code, out, err = call(*run, "--mode=generate", "--config.generate.prompt=The ")
    assert code == 0 and "generate: reusing" in out and "network calls" not in out
    assert 0 < result["row_forwards"] <= 6 and result["tokens_per_s"] > 0
    records = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    assert len(records) == 3 and all(r["text"].startswith("The ") and len(r["ids"]) == SEQ_LEN for r in records)
    assert max(max(r["ids"]) for r in records) < 257
    text = (workdir / "samples.txt").read_bytes().decode()
    assert all(f"--- sample {i} ---\n{r['text']}\n" in text for i, r in enumerate(records))
    with lock.held(str(workdir / "lock"), "train"):
        code, out, err = call(*run, "--mode=evaluate")
    assert code == 0 and "evaluate: step 3" in out and not err
    assert json.loads((workdir / "evaluate.json").read_text())["rows"] == 8
    report.main([str(workdir)])


def test_ctrl_c_is_one_line_and_130(call, recipe, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate", interrupted)
    code, _, err = call(f"--config={recipe}", "--mode=evaluate")
    assert code == 130 and err == "hdlm_jax: evaluate interrupted\n"
    monkeypatch.setenv("HDLM_TRACEBACK", "1")
    with pytest.raises(KeyboardInterrupt):
        call(f"--config={recipe}", "--mode=evaluate")


@pytest.mark.parametrize("mode, place", [("prepare", "w"), ("cluster", "w"), ("train", "w"), ("import", "w"),
                                         ("export", "w"), ("prepare", "tokens")])
def test_what_changes_a_folder_wants_it_alone(call, recipe, tmp_path, mode, place):
    flags = ["--config.data.dir=tokens"] if place == "tokens" else []
    with lock.held(str(tmp_path / place / ("lock.export" if mode == "export" else "lock")), "train"):
        one_line(*call(f"--config={recipe}", "--workdir=w", f"--mode={mode}", *flags),
                 f"{place}/lock.* is held by pid {os.getpid()} on .* since .* --mode=train; wait for its end")
    assert not list(tmp_path.glob("**/manifest.json"))


def test_readers_and_sharing_workers_take_no_lock(call, recipe, tmp_path):
    workdir = shutil.copytree(trained()[1], tmp_path / "w")
    with lock.held(str(workdir / "lock"), "train"), lock.held(str(tmp_path / "tokens" / "lock"), "prepare"):
        for flags in (["--mode=report"], ["--mode=export"], ["--mode=prepare", "--config.data.dir=tokens",
                                                                           "--config.data.prepare_shard=0/2"]):
            code, _, err = call(f"--config={recipe}", "--workdir=w", *flags)
            assert code == 0 and not err, (flags, err)


def test_real_processes(recipe, root, tmp_path):
    """What a user sees: one line on stderr, exit code 1; and the help."""
    def real(*args):
        env = os.environ | {"PYTHONPATH": str(root)}
        done = subprocess.run([sys.executable, "-m", "hdlm_jax.main", *args], cwd=tmp_path, env=env, text=True,
                              capture_output=True, timeout=300)
        return done.returncode, done.stdout, done.stderr

    one_line(*real(f"--config={recipe}", "--config.train.stpes=5"), "no such setting; .*did you mean 'steps'")
    one_line(*real(f"--config={recipe}", "--config.data.files=('nowhere/*.txt',)"), "nowhere/.*.txt")
    assert "--config" in real("--help")[1]
    reader, writer = os.pipe()
    os.close(reader)  # as of `--help | head`
    done = subprocess.run([sys.executable, "-m", "hdlm_jax.main", "--help"], stdout=writer, stderr=subprocess.PIPE,
                          cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root)}, timeout=300)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_help_says_what_there_is(call):
    """--help: each mode in a line, the recipes, where settings are explained; --config.help: a section."""
    code, out, err = call("--help")
    assert code == 0 and err == "" and command.PAGE in out and (recipes.folder().parent / command.PAGE).exists()
    for name in (*main.MODES, *recipes.names()):
        assert re.search(rf"^  {name} +\S.*\S$", out, re.MULTILINE), name
    assert max(map(len, out.splitlines())) <= 150
    code, out, _ = call("--config.help=generate")
    for one in command.settings_of("generate"):
        assert code == 0 and f"--config.{one.name}={one.default!r}\n" in out and one.meaning, one
    assert "of the methods that have a number of steps\n      (int; at least 1; at most 2147483647)" in out
    assert "(str; one of best, latest)" in out and "(int; in 0..4294967295)" in out and "(float; in (0, 1])" in out
    code, out, _ = call("--config.help")
    assert code == 0 and all(f"  {name} " in out for name in ("data", "generate", "released"))
    one_line(*call("--config.help=genrate"), "--config.help='genrate': choose one of data, .*did you mean 'generate'")


@pytest.mark.parametrize("given, meant", [
    ("evaluate.tasks=arc_easy,piqa", "evaluate.tasks=('arc_easy', 'piqa')"),
    ("evaluate.tasks=piqa", "evaluate.tasks=('piqa',)"),
    ("evaluate.tasks=('piqa',)", None), ("evaluate.tasks='piqa',", None), ("train.writers=", "train.writers=()"),
    ("data.validation=[ab]*.txt", "data.validation=('[ab]*.txt',)"), ("data.validation=['a,b.txt']", None),
    ("hierarchy.clusters=256,16", None), ("generate.prompt=a,b", None)])
def test_plain_lists(given, meant):
    argv = ["x", f"--config.{given}", "--mode=train"]
    assert command.written_out(argv) == [argv[0], f"--config.{meant or given}", argv[2]]
    if meant and "=(" in meant:
        name, _, value = given.partition("=")
        assert command.written_out(["x", f"--config.{name}", value]) == ["x", f"--config.{meant}"]


def test_what_settings_imply(call, tmp_path):
    """kind=bytes its number of words, files= the source, on the command line and in Python; what is given stays."""
    text = tmp_path / "my.txt"
    text.write_text("".join(f"document {i}\n\n" for i in range(120)))
    code, out, err = call("--config=mdlm_tiny", f"--workdir={tmp_path / 'run'}", "--mode=prepare",
                          f"--config.data.files={text}", "--config.data.txt_documents=blank_line",
                          "--config.tokenizer.kind=bytes")
    assert code == 0 and "V=257 (bytes)" in out and "embedded" not in out, err
    kind = ("--config.tokenizer.kind=bytes", "--config.tokenizer.vocab_size=300")
    one_line(*call("--config=mdlm_tiny", "--mode=prepare", *kind), "tokenizer.vocab_size=300: tokenizer.kind='bytes'")
    given = default()
    given.tokenizer.kind, given.data.files = "bytes", (str(text),)
    assert resolve(given).tokenizer.vocab_size == 257 and resolve(given).data.source == "files"
    one_line(*call("--config=mdlm_tiny", "--mode=prepare", "--config.data.source=files"),
             r"data.files=\(\): needed with data.source='files'")


def test_paths_from_home(call, recipe, tmp_path, monkeypatch):
    """~ and $VARIABLES in --workdir, in settings and in Python; a base run that is not there names itself."""
    import hdlm_jax

    monkeypatch.setenv("HOME", str(tmp_path))
    code, out, _ = call(f"--config={recipe}", "--workdir=~/run", "--mode=prepare")
    assert code == 0 and (tmp_path / "run" / "data" / "manifest.json").exists() and not (tmp_path / "~").exists()
    for name in ("train", "prepare"):
        base = "--config.train.init_from=~/nothing"
        found = call(f"--config={recipe}", "--workdir=$HOME/new", f"--mode={name}", base)
        one_line(*found, f"train.init_from='{tmp_path}/nothing': no run there")
        assert not (tmp_path / "new" / "data").exists()
    with pytest.raises(ValueError, match=f"workdir='{tmp_path}/nothing': no "):
        hdlm_jax.load("~/nothing")


WAITS = """
import time
from hdlm_jax import main
from hdlm_jax.runs import train

def wait(*_):  # as where tokens are prepared
    print("waiting", flush=True)
    time.sleep(60)

train.train = wait
main.command()
"""


def test_one_process_of_a_cluster_hears_sigterm_before_it_trains(tmp_path, root, hearing):
    """A job of one process under Slurm or Kubernetes: JAX would hold the signal for a step of many processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "HDLM_NUM_PROCESSES": "1",
                                "HDLM_PROCESS_ID": "0", "PYTHONPATH": str(root)}
    process = subprocess.Popen([sys.executable, "-c", WAITS, f"--config={write_recipe(tmp_path)}",
                                f"--workdir={tmp_path / 'run'}", "--distributed"], stdout=subprocess.PIPE, text=True,
                               env=environment)
    try:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
    finally:
        process.kill()
