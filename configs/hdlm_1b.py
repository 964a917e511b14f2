"""HDLM at 1.15B parameters: 18 blocks of width 2048, 256 clusters, S = 1024, 131B tokens; 256 TPU v5e or v5p.

    OPENWEBTEXT='owt/*.parquet' python -m hdlm_jax.main --config=hdlm_1b --distributed
    ./launch/compile_plan.sh    # what the TPU compiler says about it: memory, exchanges, arithmetic; needs no TPU

On every host of the pod. Compiled for both pods, and fits (docs/scale.md); not run by us at this scale, no TPU at hand.

Fits on v5e:16x16: 2.1 of 16 GiB a chip, mesh 1 x 256 x 1, remat=all (a compile plan, docs/scale.md).
"""

from hdlm_jax import config


def get_config():
    c = config.recipe("hdlm_small")
    c.hierarchy.clusters = (256,)  # about sqrt(V): a token then costs as many cluster rows as words
    c.model.width = 2048
    c.model.blocks = 18
    c.model.heads = 16
    c.model.seq_len = 1024
    c.model.head = "factorised"
    c.model.remat = "all"
    c.optimizer.lr = 3e-4
    c.train.batch_size = 1024  # 1M tokens a step
    c.train.steps = 125_000
    c.parallel.data = 1
    c.parallel.fsdp = -1
    return c
