"""MDLM: the recipe of hdlm_tiny.py with a single cluster, n = 1.

    python -m hdlm_jax.main --config=configs/mdlm_tiny.py
"""

from configs import hdlm_tiny


def get_config():
    c = hdlm_tiny.get_config()
    c.hierarchy.clusters = (1,)
    return c
