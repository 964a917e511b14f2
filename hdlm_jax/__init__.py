"""hdlm_jax: hierarchical diffusion language models in pure JAX/Flax."""

__version__ = "0.1.0"


def load(workdir: str, checkpoint: str = "best"):
    """A trained run as an object with generate, infill, nelbo and hierarchy; see hdlm_jax.api.Model."""
    from hdlm_jax.api import Model

    return Model(workdir, checkpoint)
