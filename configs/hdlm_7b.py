"""HDLM at 6.97B parameters: 32 blocks of width 4096, 256 clusters, S = 2048, 131B tokens; 256 TPU v5e or v5p.

    OPENWEBTEXT='owt/*.parquet' python -m hdlm_jax.main --config=hdlm_7b --distributed
    ./launch/compile_plan.sh    # what the TPU compiler says about it: memory, exchanges, arithmetic; needs no TPU

On every host of the pod. Compiled for both pods, and fits (docs/scale.md); not run by us at this scale, no TPU at hand.

Fits on v5e:16x16: 6.8 of 16 GiB a chip, mesh 1 x 256 x 1, remat=all, 2 microbatches (a compile plan, docs/scale.md).
"""

from hdlm_jax import config


def get_config():
    c = config.recipe("hdlm_1b")
    c.model.width = 4096
    c.model.blocks = 32
    c.model.heads = 32
    c.model.seq_len = 2048
    c.optimizer.lr = 2e-4
    c.train.batch_size = 1024  # 2.1M tokens a step
    c.train.microbatches = 2  # what one part leaves between blocks fits beside the rest into the 16 GiB of a v5e
    c.train.steps = 62_500
    return c
