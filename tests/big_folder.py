"""Host memory and seconds of importing and loading a made-up LLaDA folder; see docs/models.md.

    python tests/big_folder.py FOLDER [LAYERS] [WIDTH]     # 32 of width 4,096 are the 8B model: 16 GB, and again

Anonymous memory (RssAnon) is sampled every 5 ms: mapped files count as the system's page cache, which it can take back.
"""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
BF16 = np.dtype(ml_dtypes.bfloat16)


def write(folder: Path, layers: int, width: int, rows: int, shard: int) -> int:
    """A folder of random bfloat16 weights in LLaDA's layout, files of about `shard` bytes; the largest file's size."""
    from hdlm_jax.training import param_file

    inner = 3 * width
    shapes = {"wte.weight": (rows, width), "ln_f.weight": (width,), "ff_out.weight": (rows, width)}
    for i in range(layers):
        at = f"blocks.{i}."
        shapes |= {at + f"{name}.weight": (width, width) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
        shapes |= {at + "ff_proj.weight": (inner, width), at + "up_proj.weight": (inner, width),
                   at + "ff_out.weight": (width, inner), at + "attn_norm.weight": (width,),
                   at + "ff_norm.weight": (width,)}
    files: list[dict] = [{}]
    for name, shape in shapes.items():
        if files[-1] and sum(2 * np.prod(s) for s in files[-1].values()) + 2 * np.prod(shape) > shard:
            files.append({})
        files[-1][f"model.transformer.{name}"] = shape
    folder.mkdir(parents=True)
    some = (0.02 * np.random.default_rng(0).standard_normal(1 << 20)).astype(BF16)
    where = {}
    for i, held in enumerate(files, 1):
        file = f"model-{i:05}-of-{len(files):05}.safetensors"
        with param_file.writing(str(folder / file), {name: (shape, BF16) for name, shape in held.items()}) as out:
            for name, shape in held.items():
                out.put(name, np.resize(some, shape))
        where |= dict.fromkeys(held, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    made = {"model_type": "llada", "d_model": width, "n_layers": layers, "n_heads": width // 128,
            "n_kv_heads": width // 128, "mlp_hidden_size": inner, "vocab_size": rows, "embedding_size": rows,
            "rope_theta": 5e5, "rms_norm_eps": 1e-5, "weight_tying": False, "mask_token_id": rows - 128,
            "activation_type": "silu"}
    (folder / "config.json").write_text(json.dumps(made))
    import tokenfiles

    spec = tokenfiles.byte_level()
    words = spec["model"]["vocab"]
    words |= {f"word{i}": i for i in range(len(words) + 1, rows - 128)}  # one id of the added tokens lies between
    tokenfiles.folder(folder, spec)
    return max(file.stat().st_size for file in folder.glob("*.safetensors"))


IMPORT = """
import sys
from hdlm_jax.config import recipes, resolve
from hdlm_jax.runs import import_weights
c = recipes.recipe("released_open")
c.released.weights, c.model.param_dtype, c.model.dtype = sys.argv[1], "bfloat16", "bfloat16"
import_weights.import_released(resolve(c), sys.argv[2])
"""
LOAD = """
import sys, jax
from hdlm_jax.training.loading import load_here
run = load_here(sys.argv[2])
print("loaded", sum(a.nbytes for a in jax.tree.leaves(jax.block_until_ready(run.params))))
"""


def measured(script: str, *arguments: str) -> tuple[int, float]:
    """(peak of anonymous memory in bytes above that of imports alone, seconds) of a script in a process of its own."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    began, peak = time.monotonic(), 0
    child = subprocess.Popen([sys.executable, "-c", script, *arguments], env=env)
    while child.poll() is None:
        try:
            status = Path(f"/proc/{child.pid}/status").read_text()
        except OSError:
            break
        peak = max([peak, *(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
        time.sleep(0.005)
    if child.wait():
        raise RuntimeError(f"exit code {child.returncode}")
    return peak, time.monotonic() - began


def main(folder: str, layers: int = 32, width: int = 4096) -> None:
    hub, run = Path(folder) / "hub", Path(folder) / "run"
    shard = write(hub, layers, width, 126_464, 5_000_000_000)
    size = sum(file.stat().st_size for file in hub.glob("*.safetensors"))
    base, _ = measured("from hdlm_jax.runs import import_weights")
    for name, script in (("import", IMPORT), ("load", LOAD)):
        peak, seconds = measured(script, str(hub), str(run))
        print(f"{name}: {size / 1e9:.1f} GB in files of at most {shard / 1e9:.2f} GB; peak of anonymous memory "
              f"{peak / 1e9:.2f} GB ({base / 1e9:.2f} before any weight), {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
