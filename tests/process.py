"""What tests/test_processes.py runs as each of some joined processes: python tests/process.py RECIPE FOLDER."""
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import tiny  # noqa: E402

MESH = dict(data=2, fsdp=2, tensor=2)


def main(recipe: str, folder: Path) -> None:
    import jax
    import orbax.checkpoint

    from hdlm_jax.common import console, lock, processes
    from hdlm_jax.config import ParallelConfig
    from hdlm_jax.runs import evaluate, export, generate, interrupt, train
    from hdlm_jax.training import loading

    processes.join()
    me = jax.process_index()
    if me:
        console.mute()
    said = {"processes": jax.process_count(), "devices": jax.device_count(), "here": jax.local_device_count()}
    config = tiny.read_recipe(Path(recipe))
    config = dataclasses.replace(config, parallel=ParallelConfig(**MESH),
                                 checkpoint=dataclasses.replace(config.checkpoint, every=2))
    run = str(folder / "run")
    whole = train.train(config, run)

    # the last process alone cannot make sense of the newest checkpoint: all go back to the one before
    restore = orbax.checkpoint.Checkpointer.restore

    def garbled(self, directory, args):
        if me and str(directory).endswith("/3") and "state" in args.keys():
            raise ValueError("garbled")
        return restore(self, directory, args)

    orbax.checkpoint.Checkpointer.restore = garbled
    again = train.train(config, run)
    orbax.checkpoint.Checkpointer.restore = restore
    there = zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True)
    said["again"] = [bool((processes.to_host(a) == processes.to_host(b)).all()) for a, b in there]
    said["nelbo"] = evaluate.evaluate(config, run)["nelbo"]
    said["samples"] = generate.generate(config, run)["samples"]
    export.export(config, run)
    # what one process with eight devices has written
    there = loading.load_run(config, str(Path(recipe).parent / "run"), "latest")
    said["sums"] = [float(processes.to_host(leaf).astype("float64").sum()) for leaf in jax.tree.leaves(there.params)]
    said["largest"] = processes.largest(np.array([[-1, me], [2**40 + me, 3 - me]])).tolist()
    try:  # an error of process 0 is everybody's
        processes.on_main_process(lambda: {}["x"])
    except Exception as error:
        said["error"] = f"{type(error).__name__}: {error}"

    try:  # process 0 holds the lock, the others learn who has it
        with lock.held(str(folder / "held"), "train"), lock.held(str(folder / "held"), "cluster"):
            said["locked"] = "twice"
    except ValueError as error:
        said["locked"] = str(error)

    # a checkpoint when process 0's clock says so; Ctrl-C to one process alone: all leave at one step
    said["timer"], due = [], interrupt.Timer.due

    def spy(self, step):
        if found := due(self, step):
            said["timer"].append(step)
        return found

    interrupt.Timer.due = spy  # type: ignore[method-assign]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what goes to the background without it
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=100_000),
                                 checkpoint=dataclasses.replace(config.checkpoint, minutes=0.001 + me),
                                 optimizer=dataclasses.replace(config.optimizer, schedule="constant"))
    stopped = folder / "stopped"

    def ask():
        while not (stopped / "metrics.jsonl").exists() or len((stopped / "metrics.jsonl").read_text().split("\n")) < 5:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

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
