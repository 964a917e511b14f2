"""HDLM-base of the paper: 24 blocks of width 1024, 128 clusters, 425M parameters (published: 19.22 PPL).

    OPENWEBTEXT='owt/*.parquet' python -m hdlm_jax.main --config=hdlm_base

Not run by us at this scale. On a pod see docs/scale.md (--distributed on every host).

Fits on v5e:2x4: 11.7 of 16 GiB a chip, mesh 8 x 1 x 1, remat=all, 4 microbatches (a compile plan, docs/scale.md).
"""

from hdlm_jax import config


def get_config():
    c = config.recipe("hdlm_small")
    c.hierarchy.clusters = (128,)
    c.model.width = 1024
    c.model.blocks = 24
    c.model.heads = 16
    return c
