"""MDLM: the recipe of hdlm_tiny.py with a single cluster, n = 1.

    python -m hdlm_jax.main --config=mdlm_tiny
"""

from hdlm_jax import config


def get_config():
    c = config.recipe("hdlm_tiny")
    c.hierarchy.clusters = (1,)
    return c
