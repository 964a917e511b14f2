"""Rewards: lengths of blocks that a head draws (CtrlDiff), of digits to be copied or summed as they come.

    python -m hdlm_jax.main --config=copy_sums --workdir=runs/copy_sums/base
    python -m hdlm_jax.main --config=copy_sums:ctrldiff --workdir=runs/copy_sums/ctrldiff \\
        --config.train.init_from=runs/copy_sums/base

A block is written in four calls: a copy is right in blocks of any length, running sums in short ones alone, and each
call costs .02 of the reward (docs/training.md). `python -m tools.block_lengths RUN ...` tells which lengths are drawn.

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
    c.tune.task = "copy_sums"
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
