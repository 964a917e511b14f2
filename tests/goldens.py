"""What the package computes, frozen before files move: losses, bounds and samples of tiny runs, to compare with later.

    python tests/goldens.py OUT.json                    # computes all of it (some minutes on 2 cores)
    python tests/goldens.py OUT.json --like FILE.json    # and says what differs from FILE, bit for bit; exit code 1
    python tests/goldens.py OUT.json --only mdlm,hdlm --devices 8

Bits belong to a machine and a version of JAX, so a file is of use beside the code it was made with; moves and splits of
files have to give the same one. Checkpoints go with it: runs are kept under OUT.json.runs, and --read FOLDER evaluates
and samples those that an earlier commit has trained.
"""
from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
CASES = {
    "mdlm": {"hierarchy": {"clusters": (1,)}},
    "hdlm": {},
    "hdlm_factorised": {"model": {"head": "factorised"}},
    "hdlm_k3": {"hierarchy": {"clusters": (16, 4)}},
    "hdlm_xi9": {"diffusion": {"xi": 0.9}},
    "hdlm_k3_xi9_factorised": {"hierarchy": {"clusters": (16, 4)}, "diffusion": {"xi": 0.9},
                               "model": {"head": "factorised"}},
    "gidd": {"hierarchy": {"clusters": (1,)}, "diffusion": {"process": "gidd", "p_uniform": 0.1,
                                                            "weighting": "dynamic"}},
    "sedd": {"hierarchy": {"clusters": (1,)}, "diffusion": {"process": "sedd"}},
    "ar": {"hierarchy": {"clusters": (1,)}, "diffusion": {"process": "autoregressive"},
           "model": {"time_conditioning": False}},
}
STEPS = 20


def config_of(recipe: Path, changes: dict):
    from tiny import read_recipe

    config = read_recipe(recipe)
    changes = changes | {"train": {"steps": STEPS, "batch_size": 16}, "checkpoint": {"every": STEPS, "minutes": 0}}
    for section, values in changes.items():
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})
    config.check()
    return config


def digest(*arrays) -> str:
    import numpy as np

    state = hashlib.sha256()
    for array in arrays:
        state.update(np.ascontiguousarray(array).tobytes())
    return state.hexdigest()[:16]


def samples(model, **settings) -> str:
    """Hash of four texts' tokens."""
    import numpy as np

    texts = model.generate(4, steps=8, stop="", batch_size=8, **settings)
    return digest(np.frombuffer("\0".join(texts).encode(), np.uint8))


def results(name: str, config, workdir: str, methods: bool, train_it: bool) -> dict:
    import hdlm_jax
    from hdlm_jax.decoding import presets
    from hdlm_jax.runs import evaluate, train
    from hdlm_jax.training.metrics import read_metrics

    out: dict = {}
    if train_it:
        train.train(config, workdir)
    records = read_metrics(os.path.join(workdir, "metrics.jsonl"))
    out["losses"] = [r["loss"] for r in records]
    Path(workdir, "evaluate.json").unlink(missing_ok=True)
    out["nelbo"] = evaluate.evaluate(config, workdir)["nelbo"]
    model = hdlm_jax.load(workdir)
    out["samples"] = samples(model)
    if config.diffusion.process == "hierarchical":
        out["samples_first_hitting"] = samples(model, method="first_hitting", temperature=0.7, top_p=0.9, prompt="the")
        out["nelbo_of_texts"] = [r["nats"] for r in model.nelbo(["one text", "and another, longer one"], draws=4)]
    if methods:
        for method in sorted(presets.METHODS):
            if method not in ("guided", "edlm", "classifier", "dcolt", "ctrldiff", "adjust", "diagonal"):  # need more
                out[f"method_{method}"] = samples(model, method=method)
    return out


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("out")
    ask.add_argument("--like", default="")
    ask.add_argument("--only", default="", help="cases, by commas")
    ask.add_argument("--devices", type=int, default=1)
    ask.add_argument("--read", default="", help="folder of runs to evaluate and sample, in place of training")
    given = ask.parse_args()
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={given.devices}"  # compiled as users compile
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from tiny import write_recipe

    runs = Path(given.read or f"{given.out}.runs").resolve()
    recipe = runs / "recipe.py" if given.read else write_recipe(runs)
    found = {}
    for name in given.only.split(",") if given.only else CASES:
        methods = name in ("mdlm", "hdlm") and given.devices == 1
        found[f"{name}/{given.devices}"] = results(name, config_of(recipe, CASES[name]), str(runs / name), methods,
                                                   not given.read)
        Path(given.out).write_text(json.dumps(found, indent=1))
    if not given.like:
        return 0
    like = json.loads(Path(given.like).read_text())
    found = json.loads(Path(given.out).read_text())
    differ = [f"{case}: {key}" for case, values in found.items() for key, value in values.items()
              if like[case][key] != value]
    count = sum(map(len, found.values()))
    print("\n".join(["differs:", *differ]) if differ else f"goldens: {count} equal, bit for bit")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
