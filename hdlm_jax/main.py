"""The command line: hdlm-jax (python -m hdlm_jax.main) --config=hdlm_base [--workdir=DIR] [--mode=train].

--config is a recipe by name or as a file; a run that is there knows its own: --workdir=RUN --mode=evaluate. An open
model: hdlm-jax fetch smollm2. To try a run in a browser, or behind OpenAI's API: hdlm-jax serve RUN --port=8000.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from contextlib import nullcontext
from logging import CRITICAL, getLogger
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

MODES = {"prepare": "text to tokens, in the workdir or data.dir",
         "cluster": "tokens to the hierarchy of clusters",
         "train": "the default; first makes what is missing, and goes on where it was stopped",
         "evaluate": "the exact NELBO of the validation split; or evaluate.tasks; or likelihoods of samplers, "
                     "evaluate.decodings",
         "generate": "texts, to samples.txt",
         "report": "one page of the run, report.html",
         "export": "the weights as files for other programs",
         "import": "released weights (released.weights) as a run",
         "fetch": "an open model, downloaded and imported: hdlm-jax fetch smollm2",
         "serve": "OpenAI's API, and a page to watch texts being written in",
         "chat": "lines in a terminal, answered or gone on from while one looks"}
COMMANDS = {"hdlm-jax fetch MODEL": "as --mode=fetch",
            "hdlm-jax serve RUN": "as --mode=serve",
            "hdlm-jax chat RUN": "as --mode=chat",
            "hdlm-jax watch RUN": "its page in a browser, new while it trains",
            "hdlm-jax leaderboard RUN...": "runs and open models by one protocol",
            "python -m hdlm_jax.report RUN...": "runs side by side; --html=runs.html with curves"}

_CONFIG = config_flags.DEFINE_config_file("config", None, "A recipe, by name or as a file; settings as "
                                          "--config.train.steps=100. A run in --workdir needs none.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where everything of the run lies; default runs/<config name>, of "
                               "--mode=fetch runs/<model>.")
_MODE = flags.DEFINE_string("mode", "train", f"One of {', '.join(MODES)}.")
_MODEL = flags.DEFINE_string("model", None, "The open model that --mode=fetch downloads and imports.")
_PROFILE = flags.DEFINE_bool("profile", False, "Write a profiler trace of a few training steps.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of this run (see processes.join).")


def _flag(argv: list[str], name: str) -> tuple[int, str]:
    """(place, value) of --name=value or --name value; (-1, "") where it is not given."""
    for i, arg in enumerate(argv):
        if found := re.fullmatch(rf"--?{name}(?:=(.*))?", arg, re.DOTALL):
            return i, found[1] if found[1] is not None else (argv[i + 1] if i + 1 < len(argv) else "")
    return -1, ""


def _replaced(argv: list[str], at: int, new: str) -> list[str]:
    """The command line with `new` in place of the flag at this place, and of its value behind it."""
    return [*argv[:at], new, *argv[at + (1 if "=" in argv[at] else 2):]]


def with_recipe(argv: list[str]) -> list[str]:
    """The command line with a file as --config: that of the recipe named, or of the run in --workdir.

    Raises:
      ConfigError: an unknown recipe; neither a recipe nor a run.
    """
    from hdlm_jax.config import ConfigError, check_local, expand, recipes

    at, name = _flag(argv, "config")
    if at >= 0:
        return _replaced(argv, at, f"--config={recipes.path_of(name)}") if name else argv
    if _flag(argv, "mode")[1] in ("import", "fetch"):
        return [argv[0], f"--config={recipes.path_of('released_open')}", *argv[1:]]
    workdir = expand(_flag(argv, "workdir")[1])
    check_local("workdir", workdir)
    if not workdir:
        raise ConfigError("--config is missing; give a recipe, as in --config=hdlm_tiny, or the --workdir of a run")
    from hdlm_jax.training import loading

    if not os.path.exists(os.path.join(workdir, "config.json")):
        raise ConfigError(f"workdir={workdir!r}: no run there yet; give a recipe, as in --config=hdlm_tiny")
    loading.saved_config(workdir)  # its errors are ours; inside a config file they would be absl's
    return [argv[0], f"--config={os.path.join(os.path.dirname(loading.__file__), 'of_run.py')}:{workdir}", *argv[1:]]


def parse(argv: list[str]) -> list[str]:
    """absl's flags; what is wrong with them, or in the config file, as one line and exit code 1."""
    from hdlm_jax.config import ConfigError, check_name
    from hdlm_jax.config.command import written_out

    _help(argv)
    if argv[1:2] in (["fetch"], ["serve"], ["chat"]):  # hdlm-jax fetch MODEL [flags], hdlm-jax serve RUN [flags]
        flag = "model" if argv[1] == "fetch" else "workdir"
        names = [f"--{flag}={name}" for name in argv[2:3] if not name.startswith("-")]
        sys.argv = argv = [argv[0], f"--mode={argv[1]}", *names, *argv[2 + len(names):]]
    at, port = _flag(argv, "port")
    if at >= 0:
        sys.argv = argv = _replaced(argv, at, f"--config.serve.port={port}")
    given = [a for a in argv[1:] if re.match(r"--?config(=|$)", a)]
    try:
        for arg in argv[1:]:
            if found := re.match(r"--?config\.([^=\[]+)", arg):
                check_name(found[1])
        if not any(arg.lstrip("-").partition("=")[0] == "helpfull" for arg in argv[1:]):
            sys.argv = argv = written_out(with_recipe(argv))  # ml_collections finds the settings in sys.argv
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise ConfigError(f"unexpected argument {rest[1]!r}; flags begin with --")
        _CONFIG.value.items()  # ml_collections tells only now that it found no file
    except ConfigError as error:
        _stop(error)
    except Exception as error:
        lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
        in_file = not isinstance(error, flags.Error) or "config file:" in lines[0]  # then the message is a traceback
        name = given[0] if given else "--config is missing"
        kind = "" if isinstance(error, flags.Error | OSError) else f"{type(error).__name__}: "
        text = lines[-1] if kind == "" else " ".join(lines)
        _stop(ConfigError(f"{name}: {kind}{text}" if in_file or not given else " ".join(lines)), error)
    return rest


def _help(argv: list[str]) -> None:
    """Prints what --help or --config.help[=SECTION] asks for, and ends."""
    from hdlm_jax.config import ConfigError, command

    at, section = _flag(argv, r"config\.help")
    try:
        if at >= 0:
            print(command.settings_help(section))
        elif any(arg in ("-h", "-help", "--help", "--helpshort") for arg in argv[1:]):
            more = {f"--{name}": flags.FLAGS[name].help or "" for name in ("profile", "distributed")}
            print(command.front_help(MODES, COMMANDS, more))
        else:
            return
        sys.stdout.flush()
    except ConfigError as error:
        _stop(error)
    except BrokenPipeError:  # as in `--help | head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def _stop(error: Exception, cause: BaseException | None = None) -> NoReturn:
    if os.environ.get("HDLM_TRACEBACK"):
        raise error from cause
    full = isinstance(error, OSError) and error.filename and error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "; make room and run the same command again, what was finished is kept" if full else ""
    print(f"hdlm_jax: {' '.join(str(error).split())}{remedy}", file=sys.stderr)
    _leave(1)


def _leave(code: int) -> NoReturn:
    if flags.FLAGS.is_parsed() and _DISTRIBUTED.value:  # an orderly end would wait for the others, who wait for us
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _place() -> tuple[str, str]:
    """(name of the recipe or open model, workdir) once --mode and --model are sound."""
    from hdlm_jax.config import check_local, expand
    from hdlm_jax.config.rules import choice, rule
    from hdlm_jax.models.packages import PACKAGES

    choice("--mode", _MODE.value, tuple(MODES))
    name = os.path.splitext(os.path.basename(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]))[0]
    if _MODE.value == "fetch":
        name = _MODEL.value or ""
        choice("--model", name, tuple(PACKAGES))
    rule(_MODE.value == "fetch" or _MODEL.value is None, "--model", _MODEL.value, "goes with --mode=fetch")
    workdir = expand(_WORKDIR.value or os.path.join("runs", name))
    check_local("workdir", workdir)
    return name, workdir


def main(argv: list[str]) -> None:
    name, workdir = _place()

    import jax

    from hdlm_jax.common import console, lock, parallel, processes
    from hdlm_jax.report import page
    from hdlm_jax.runs import chat, evaluate, export, fetch, generate, import_weights, refine, serve, stages, tune
    from hdlm_jax.training import loading

    config = stages.checked(loading.with_base(_CONFIG.value, workdir))

    if _DISTRIBUTED.value:
        processes.join()
        if not processes.is_main_process():
            console.mute()
        if _MODE.value != "train" or jax.process_count() == 1:  # JAX would keep it from us
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if _MODE.value != "prepare":
        config.parallel.shape(jax.device_count())  # a mesh that does not fit is refused before any work
    logging.info("%d devices, process %d of %d", jax.device_count(), jax.process_index(), jax.process_count())
    parallel.keep_compiled()

    here = os.path.join(workdir, "lock")
    if _MODE.value == "prepare":
        alone = not config.data.prepare_shard  # workers share a folder
        place = os.path.join(config.data.dir or workdir, "lock")
        with stages.writing(config, workdir), lock.held(place, "prepare") if alone else nullcontext():
            stages.make_tokens(config, workdir)
    elif _MODE.value == "cluster":
        with lock.held(here, "cluster"):
            stages.cluster(config, workdir, stages.prepare(config, workdir))
    elif _MODE.value == "train":
        import_weights.check_trainable(workdir)
        (tune.tune if config.tune.objective else refine.train)(config, workdir, _PROFILE.value)
    elif _MODE.value == "evaluate":
        if config.tune.task and not (config.evaluate.tasks or config.evaluate.decodings):
            tune.evaluate(config, workdir)
        else:
            evaluate.run(config, workdir)
    elif _MODE.value == "generate":
        generate.generate(config, workdir)
    elif _MODE.value == "import":
        with lock.held(here, "import"):
            import_weights.import_released(config, workdir)
    elif _MODE.value == "fetch":
        with lock.held(here, "fetch"):
            fetch.fetch(config, workdir, name)
    elif _MODE.value == "serve":
        serve.serve(config, workdir, page.served(), page.about(workdir))
    elif _MODE.value == "chat":
        chat.chat(config, workdir)
    elif _MODE.value == "report":
        page.write_run_page(workdir)
    else:
        with lock.held(f"{here}.export", "export"):  # beside a training that goes on
            export.export(config, workdir)


def run(argv: list[str]) -> None:
    """main, with errors a user can mend as one line and exit code 1; Ctrl-C as one line and exit code 130."""
    try:
        from hdlm_jax.runs.train import TrainingStopped

        try:
            main(argv)
        except (ValueError, OSError, TrainingStopped) as error:
            _stop(error, error.__cause__)
        except RuntimeError as error:
            from hdlm_jax.common.parallel import out_of_memory
            from hdlm_jax.training.fitting import HELP
            if not (said := out_of_memory(error)):
                raise
            remedy = {"train": HELP, "cluster": "use a machine with more memory"}.get(
                _MODE.value, f"lower {_MODE.value}.batch_size or give parallel.fsdp more devices")
            _stop(MemoryError(f"--mode={_MODE.value} ran out of a device's memory ({said}); {remedy}"), error)
    except KeyboardInterrupt:
        if os.environ.get("HDLM_TRACEBACK"):
            raise
        print(f"hdlm_jax: {_MODE.value} interrupted", file=sys.stderr)
        _leave(130)


def _hush() -> None:
    """What users should read is said in words, so that the one line of an error is the last one.

    Where a checkpoint cannot be written, Orbax leaves many tasks of asyncio behind, which would each tell the same.
    """
    logging.set_verbosity(logging.ERROR)
    if not os.environ.get("HDLM_TRACEBACK"):
        logging.set_verbosity(logging.FATAL)
        getLogger("asyncio").setLevel(CRITICAL)
        sys.unraisablehook = lambda found: (None if "Event loop is closed" in str(found.exc_value)
                                            else sys.__unraisablehook__(found))


def command() -> None:
    """hdlm-jax, the console command."""
    _hush()
    if sys.argv[1:2] == ["leaderboard"]:
        from hdlm_jax.report import leaderboard
        return leaderboard.main(sys.argv[2:])
    if sys.argv[1:2] == ["watch"]:
        from hdlm_jax.report import watch
        return watch.main(sys.argv[2:])
    app.run(run, flags_parser=parse)


if __name__ == "__main__":
    command()
