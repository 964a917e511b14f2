"""Rewards: a base that writes permutations of six symbols half of the time learns to write nothing else.

    python -m hdlm_jax.main --config=permutations --workdir=runs/permutations/base
    python -m hdlm_jax.main --config=permutations:score --workdir=runs/permutations/score \\
        --config.train.init_from=runs/permutations/base

The texts are made by the task itself: half are permutations, half any six symbols. ":score" follows the exact policy
gradient; ":order" trains which tokens are written next as well (DCoLT), ":mdpo" judges the text that every call draws;
":elbo" and ":one_pass" are the surrogates in use, for comparison (docs/training.md). A minute or two each;
`--mode=evaluate` tells the rewards at 3, 6 and 12 steps (seven tokens take seven calls at most).

Fits on: a laptop.
"""

from hdlm_jax import config


def get_config(objective=""):
    c = config.default()
    c.data.source = "task"
    c.data.prompt_field = "prompt"
    c.data.packing = "crop"
    c.tokenizer.kind = "bytes"
    c.tokenizer.vocab_size = 257
    c.hierarchy.clusters = (1,)
    c.diffusion.weighting = "constant"
    c.model.width = 32
    c.model.blocks = 2  # with one, some seeds never find out what a permutation is
    c.model.heads = 2
    c.model.seq_len = 8
    c.model.time_conditioning = False
    c.optimizer.lr = 3e-3
    c.optimizer.warmup = 50
    c.train.steps = 4000
    c.train.batch_size = 128
    c.train.log_every = 50
    c.checkpoint.every = 2000
    c.evaluate.rows_in_training = 1024
    c.generate.method = "max_prob"
    c.generate.steps = 6
    c.generate.batch_size = 256
    c.tune.task = "permutations"
    c.tune.group = 128
    c.tune.rows = 512
    if objective:
        c.tune.objective = {"order": "score", "mdpo": "score"}.get(objective, objective)
        c.optimizer.lr = 3e-4
        c.optimizer.warmup = 0
        c.optimizer.schedule = "constant"
        c.train.steps = 200
        c.train.log_every = 10
        c.checkpoint.every = 50
    if objective == "order":
        c.model.order = True
        c.generate.method = "dcolt"
    if objective == "mdpo":
        c.tune.advantage = "mdpo"
        c.generate.method = "rcr"
        c.generate.options = "block=0"
    return c
