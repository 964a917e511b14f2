"""The speed run: a fixed exact bound on held-out textbooks, as fast as two CPU cores can (docs/speedrun.md).

    HDLM_DATA=../shared/data ./launch/speedrun.sh      # or: python -m hdlm_jax.main --config=speedrun

The best recipe so far, which misses the bound yet (docs/speedrun.md); --config=speedrun:adamw is where it began. The
corpus, the tokenizer and what is measured never change: they are those of configs/books.py.

Fits on: a laptop (2.3M parameters, under 2 GB).
"""

from hdlm_jax import config


def get_config(run="record"):
    if run not in ("record", "adamw"):
        raise ValueError(f"speedrun.py:{run}: choose record or adamw")
    if run == "adamw":
        c = config.recipe("books", "mdlm")
    else:
        c = config.recipe("books", "mdlm-warm-muon")
        c.train.batch_size = 16
        c.train.steps = 960
        c.optimizer.warmup = 40
        c.optimizer.muon_lr = 0.02
    c.train.evaluate_every = 10**9  # nothing but training is in the seconds
    c.checkpoint.every = c.train.steps
    c.evaluate.rows = 1000
    c.evaluate.draws = 8
    return c
