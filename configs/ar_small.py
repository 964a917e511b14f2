"""The autoregressive baseline of hdlm_small.py's size: the same blocks, causal, plain cross-entropy.

    OPENWEBTEXT='owt/*.parquet' python -m hdlm_jax.main --config=ar_small

Published beside MDLM at S = 1024 and 1M steps: 17.5 PPL. Not run by us at this scale.

Fits on v5e:2x4: 12.8 of 16 GiB a chip, mesh 8 x 1 x 1, remat=cheap (a compile plan, docs/scale.md).
"""

from hdlm_jax import config


def get_config():
    c = config.recipe("hdlm_small")
    c.hierarchy.clusters = (1,)
    c.diffusion.process = "autoregressive"
    c.diffusion.weighting = "constant"
    c.model.time_conditioning = False
    return c
