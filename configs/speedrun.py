"""The speed run: a fixed exact bound on held-out textbooks, as fast as two CPU cores can (docs/speedrun.md).

    HDLM_DATA=../shared/data ./launch/speedrun.sh      # or: python -m hdlm_jax.main --config=speedrun

The recipe of the record: block diffusion in blocks of 4 with the bound's own weights by `count`, embeddings of the
clustering, from which a factorised head over 64 classes starts as well, Muon. :mdlm is MDLM of whole rows, :adamw
where it began. The corpus, the tokenizer and what is measured never change: they are those of configs/books.py.

Fits on: a laptop (1.9M parameters, under 2 GB).
"""

from hdlm_jax import config


def get_config(run="record"):
    recipes = {"record": "mdlm-warm-factorised-muon-block4", "mdlm": "mdlm-warm-factorised-muon", "adamw": "mdlm"}
    if run not in recipes:
        raise ValueError(f"speedrun.py:{run}: choose {', '.join(recipes)}")
    c = config.recipe("books", recipes[run])
    if run != "adamw":
        c.model.warm_head = True
        c.train.batch_size = 16
        c.train.steps = 440 if run == "record" else 960
        c.optimizer.warmup = 40
        c.optimizer.muon_lr = 0.02
    if run == "record":  # exact weights are quiet in short blocks
        c.train.objective = "count"
        c.diffusion.weighting = "none"
    c.train.evaluate_every = 10**9  # nothing but training is in the seconds
    c.checkpoint.every = c.train.steps
    c.evaluate.rows = 1000
    c.evaluate.draws = 8
    return c
