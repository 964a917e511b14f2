"""Rewards: lengths of blocks that a head draws (CtrlDiff), of digits to be copied or one digit to be repeated.

    python -m hdlm_jax.main --config=copy_repeat --workdir=runs/copy_repeat/base
    python -m hdlm_jax.main --config=copy_repeat:ctrldiff --workdir=runs/copy_repeat/ctrldiff \\
        --config.train.init_from=runs/copy_repeat/base

A block is written in four calls: a copy is right in blocks of any length; of repeats, whose digit is free, the first
block must be short, as tokens of one call do not see each other; each call costs .02 of the reward (docs/training.md).
`python -m tools.block_lengths RUN ...` tells which lengths are drawn.

Fits on: a laptop.
"""

from hdlm_jax import config


def get_config(objective=""):
    c = config.recipe("permutations", *["score"] * bool(objective))
    c.model.width = 64
    c.model.blocks = 2
    c.model.seq_len = 33
    c.diffusion.weighting = "constant"
    c.train.batch_size = 64
    c.tune.task = "copy_repeat"
    c.tune.group = 8
    if objective:
        c.model.block_lengths = True
        c.generate.method = "ctrldiff"
        c.tune.cost = 0.02
        c.tune.rows = 128
        c.optimizer.lr = 1e-3
        c.train.steps = 100
    else:
        c.optimizer.ema = 0.99
        c.train.steps = 3000
        c.checkpoint.every = 1000
    return c
