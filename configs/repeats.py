"""Rewards: lengths of blocks that a head draws (CtrlDiff), of one digit to be repeated, given or free.

    python -m hdlm_jax.main --config=repeats --workdir=runs/repeats/base
    python -m hdlm_jax.main --config=repeats:ctrldiff --workdir=runs/repeats/ctrldiff \\
        --config.train.init_from=runs/repeats/base

A block is written in four calls: a digit that is given is right in blocks of any length; a free one needs a short block
to begin with, as tokens of one call do not see each other; each call costs .02 of the reward (docs/training.md).
`python -m tools.block_lengths RUN ...` tells which lengths are drawn.

Fits on: a laptop.
"""

from hdlm_jax import config


def get_config(objective=""):
    c = config.recipe("permutations", *["score"] * bool(objective))
    c.data.split = "last"  # there are twenty texts: all of them are in both parts
    c.data.validation_documents = 256
    c.model.seq_len = 18
    c.model.blocks = 1
    c.model.time_conditioning = True
    c.train.batch_size = 64
    c.tune.task = "repeats"
    c.tune.group = 8
    if objective:
        c.model.block_lengths = True
        c.generate.method = "ctrldiff"
        c.tune.cost = 0.02
        c.tune.rows = 128
        c.optimizer.lr = 1e-3
        c.train.steps = 100
    else:
        c.train.steps = 3000
        c.checkpoint.every = 1000
    return c
