"""A run of three steps on bytes that several test modules load: made once a session, removed at its end."""
import ast
import atexit
import functools
import json
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

# XLA's flags for tests: most of their time is compiling, which takes half as long without LLVM's optimiser and the
# fusion emitters. The goldens' frozen bits are made and compared without these flags.
QUICK_COMPILES = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if version("jax").startswith("0.10."):  # later ones do not know this flag, and refuse what they do not know
    QUICK_COMPILES += " --xla_cpu_use_fusion_emitters=false"

RECIPE = '''"""Three steps on bytes."""
from hdlm_jax import config


def get_config():
    c = config.default()
    c.data.source, c.data.files, c.data.validation_fraction = "files", ({corpus!r},), 0.3
    c.tokenizer.kind, c.tokenizer.vocab_size = "bytes", 257
    c.hierarchy.clusters = (8,)
    c.diffusion.weighting = "constant"
    c.model.width, c.model.blocks, c.model.heads, c.model.seq_len = 32, 1, 2, 16
    c.optimizer.lr, c.optimizer.warmup = 1e-3, 0
    c.train.steps, c.train.batch_size, c.train.log_every = 3, 8, 1
    c.evaluate.draws, c.evaluate.rows, c.evaluate.rows_in_training = 2, 8, 2
    c.generate.num_samples, c.generate.batch_size, c.generate.steps = 3, 8, 6
    c.checkpoint.every = 100
    return c
'''
SEQ_LEN, LEVELS = 16, 2


def write_recipe(folder: Path) -> Path:
    """corpus.jsonl (40 short documents) and recipe.py in a folder; the path of the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "corpus.jsonl"
    texts = [f"the {i}th of forty short documents, {'very ' * (i % 4)}much like the others" for i in range(40)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = folder / "recipe.py"
    recipe.write_text(RECIPE.format(corpus=str(corpus)))
    return recipe


def read_recipe(recipe: Path):
    """The resolved config of a recipe."""
    from hdlm_jax.config import resolve

    space: dict = {}
    exec(recipe.read_text(), space)
    return resolve(space["get_config"]())


def with_settings(c, given):
    """The Config of a recipe's with settings {SECTION.SETTING: value as on a command line}; ConfigError if wrong."""
    from hdlm_jax.config import resolve

    for name, value in given.items():
        section, field = name.split(".")
        kept = c[section][field]
        c[section][field] = value if isinstance(kept, str) else ast.literal_eval(value)
    return resolve(c)


@functools.cache
def trained() -> tuple[Path, Path]:
    """(recipe, workdir) of the trained run; do not write there."""
    from hdlm_jax.runs import train

    folder = Path(tempfile.mkdtemp(prefix="hdlm_jax_tiny_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    recipe, workdir = write_recipe(folder), folder / "run"
    train.train(read_recipe(recipe), str(workdir))
    return recipe, workdir


@functools.cache
def model():
    """The run as hdlm_jax.load gives it; what it has compiled is shared by the tests."""
    import hdlm_jax

    return hdlm_jax.load(str(trained()[1]))
