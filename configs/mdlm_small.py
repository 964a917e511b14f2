"""MDLM-small: the recipe of hdlm_small.py with n = 1 (published as HDLM's n = 1: 25.72 PPL; GIDD's own MDM: 24.37).

    OPENWEBTEXT='owt/*.parquet' python -m hdlm_jax.main --config=mdlm_small

The same weighting as HDLM, so that the two differ in the process alone. Not run by us at this scale.

Fits on v5e:2x4: 13.0 of 16 GiB a chip, mesh 8 x 1 x 1, remat=cheap (hdlm_small's plan; a compile plan, docs/scale.md).
"""

from hdlm_jax import config


def get_config():
    c = config.recipe("hdlm_small")
    c.hierarchy.clusters = (1,)
    return c
