"""SEDD-absorb, the recipe of hdlm_tiny.py otherwise (constant weight).

    python -m hdlm_jax.main --config=sedd_tiny
"""

from hdlm_jax import config


def get_config():
    c = config.recipe("hdlm_tiny")
    c.hierarchy.clusters = (1,)
    c.diffusion.process = "sedd"
    return c
