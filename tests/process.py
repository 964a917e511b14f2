"""What tests/test_processes.py runs as each of some joined processes: python tests/process.py RECIPE FOLDER."""
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import tiny  # noqa: E402

MESH = dict(data=2, fsdp=2, tensor=2)


def main(recipe: str, folder: Path) -> None:
    import jax

    from hdlm_jax.config import Parallel
    from hdlm_jax.run import api, evaluate, export, generate, metrics, parallel, train

    parallel.join()
    me = jax.process_index()
    if me:
        metrics.mute()
    said = {"processes": jax.process_count(), "devices": jax.device_count(), "here": jax.local_device_count()}
    config = dataclasses.replace(tiny.read_recipe(Path(recipe)), parallel=Parallel(**MESH))
    run = str(folder / "run")
    train.train(config, run)
    said["nelbo"] = evaluate.evaluate(config, run)["nelbo"]
    said["samples"] = generate.generate(config, run)["samples"]
    export.export(config, run)
    # what one process with eight devices has written
    there = api.load_run(config, str(Path(recipe).parent / "run"), "latest")
    said["sums"] = [float(parallel.to_host(leaf).astype("float64").sum()) for leaf in jax.tree.leaves(there.params)]
    try:  # an error of process 0 is everybody's
        parallel.first(lambda: {}["x"])
    except Exception as error:
        said["error"] = f"{type(error).__name__}: {error}"

    # asked to stop, one process alone: all leave at one step
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=100_000),
                                 optimizer=dataclasses.replace(config.optimizer, schedule="constant"))
    stopped = folder / "stopped"

    def ask():
        while not (stopped / "metrics.jsonl").exists() or len((stopped / "metrics.jsonl").read_text().split("\n")) < 5:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    if me == jax.process_count() - 1:
        threading.Thread(target=ask, daemon=True).start()
    code = 0
    try:
        train.train(config, str(stopped))
    except SystemExit as stop:
        code = stop.code
    (folder / f"said_{me}.json").write_text(json.dumps(said))
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
