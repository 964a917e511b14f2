"""hdlm_jax: hierarchical diffusion language models in pure JAX/Flax.

train, load: a run. The rest, for a network of your own: hdlm_jax.library (docs/library.md), read when first asked for.
"""

import importlib

__version__ = "0.1.0"
_LIBRARY = ("hierarchical", "masked", "gidd", "sedd", "autoregressive", "corrupt", "loss", "nelbo", "sample",
            "log_likelihood", "ancestral", "presets")


def load(workdir: str, checkpoint: str = "best"):
    """A trained run as an object with generate, infill, nelbo and hierarchy; see hdlm_jax.api.Model."""
    from hdlm_jax.api import Model

    return Model(workdir, checkpoint)


def train(config, workdir: str = "", **settings):
    """Trains a recipe (or goes on): train("hdlm_tiny", **{"train.steps": 100}); the run, loaded; see hdlm_jax.api."""
    from hdlm_jax.api import train

    return train(config, workdir, **settings)


def __getattr__(name: str):
    if name in _LIBRARY:
        return getattr(importlib.import_module("hdlm_jax.library"), name)
    raise AttributeError(f"module 'hdlm_jax' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_LIBRARY])
