"""The front door: python -m hdlm_jax.main --config=configs/hdlm_base.py [--workdir=DIR] [--mode=train]."""

from __future__ import annotations

import difflib
import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

MODES = ("prepare", "cluster", "train", "evaluate", "generate")

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/; fields as --config.train.steps=100.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where everything of the run lies; default runs/<config name>.")
_MODE = flags.DEFINE_string("mode", "train", f"One of {', '.join(MODES)}; train first makes what is missing.")
_PROFILE = flags.DEFINE_bool("profile", False, "Write a profiler trace of a few training steps.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other hosts (jax.distributed.initialize).")


def main(argv: list[str]) -> None:
    from hdlm_jax.config import ConfigError, resolve

    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; flags begin with --")
    if _MODE.value not in MODES:
        close = difflib.get_close_matches(_MODE.value, MODES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"--mode={_MODE.value!r}: choose one of {', '.join(MODES)}{hint}")
    config = resolve(_CONFIG.value)
    name = os.path.splitext(os.path.basename(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]))[0]
    workdir = _WORKDIR.value or os.path.join("runs", name)

    import jax

    if _DISTRIBUTED.value:
        jax.distributed.initialize()
    logging.info("%d devices, process %d of %d", jax.device_count(), jax.process_index(), jax.process_count())
    from hdlm_jax.run import evaluate, generate, stages, train

    if _MODE.value in ("prepare", "cluster"):
        text = stages.prepare(config, workdir)
        if _MODE.value == "cluster":
            stages.cluster(config, workdir, text)
    elif _MODE.value == "train":
        train.train(config, workdir, _PROFILE.value)
    elif _MODE.value == "evaluate":
        evaluate.evaluate(config, workdir)
    else:
        generate.generate(config, workdir)


def run(argv: list[str]) -> None:
    """main, with errors a user can mend as one line and exit code 1."""
    from hdlm_jax.run.train import TrainingStopped

    try:
        main(argv)
    except (ValueError, FileNotFoundError, TrainingStopped) as error:
        if os.environ.get("HDLM_TRACEBACK"):
            raise
        print(f"hdlm_jax: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    logging.set_verbosity(logging.WARNING)
    app.run(run)
