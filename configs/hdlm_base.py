"""HDLM-base of the paper: 24 blocks of width 1024, 128 clusters, 425M parameters (published: 19.22 PPL).

    OPENWEBTEXT='owt/*.parquet' python -m hdlm_jax.main --config=configs/hdlm_base.py

Not run by us at this scale. On a pod see docs/scale.md (--distributed on every host, --config.parallel.fsdp=8 where
memory asks).
"""

from configs import hdlm_small


def get_config():
    c = hdlm_small.get_config()
    c.hierarchy.clusters = (128,)
    c.model.width = 1024
    c.model.blocks = 24
    c.model.heads = 16
    c.model.remat = "all"
    c.train.microbatches = 1
    return c
