"""HDLM-small of the paper: 12 blocks of width 768, 64 clusters, S = 512, 131B tokens of OpenWebText (PPL 23.36).

    OPENWEBTEXT='owt/*.parquet' python -m hdlm_jax.main --config=configs/hdlm_small.py

OPENWEBTEXT is your copy, in any of its layouts (configs/data.py); the GPT-2 tokenizer comes through tiktoken. Not run
by us at this scale.
Weights are clipped to [0, 2] as published, which at gamma = 1 is unweighted cross-entropy (docs/theory.md section 3).
"""

from configs import data
from hdlm_jax import config


def get_config():
    c = config.default()
    data.openwebtext(c)
    c.hierarchy.clusters = (64,)
    c.model.width = 768
    c.model.blocks = 12
    c.model.heads = 12
    c.model.seq_len = 512
    c.model.dtype = "bfloat16"
    c.train.steps = 500_000
    c.train.batch_size = 512
    c.checkpoint.every = 10_000
    c.evaluate.draws = 2
    c.generate.steps = 512
    return c
