"""SEDD-absorb (arXiv 2310.16834) of hdlm_small.py's size: MDLM's process, its scores left unnormalised.

    OPENWEBTEXT='owt/*.parquet' python -m hdlm_jax.main --config=sedd_small

Trained on its bound itself (weights as they are), as published: 24.56 PPL in EDLM's table. Not run by us at this scale.

Fits on v5e:2x4: 13.0 of 16 GiB a chip, mesh 8 x 1 x 1, remat=cheap (hdlm_small's plan; a compile plan, docs/scale.md).
"""

from hdlm_jax import config


def get_config():
    c = config.recipe("hdlm_small")
    c.hierarchy.clusters = (1,)
    c.diffusion.process = "sedd"
    c.diffusion.weighting = "none"
    return c
