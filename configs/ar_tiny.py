"""An autoregressive transformer, the recipe of hdlm_tiny.py otherwise; a judge for generative perplexity as well.

    python -m hdlm_jax.main --config=ar_tiny
"""

from hdlm_jax import config


def get_config():
    c = config.recipe("hdlm_tiny")
    c.hierarchy.clusters = (1,)
    c.diffusion.process = "autoregressive"
    c.model.time_conditioning = False
    return c
