"""Controlled comparison on real text: MDLM, HDLM and HDLM with random clusters, one recipe (docs/results.md).

    HDLM_DATA=../shared/data python -m hdlm_jax.main --config=configs/books.py:hdlm

The argument is mdlm, hdlm (64 clusters) or shuffled (64 clusters of the same sizes with random members); `-warm` starts
the embedding table from the embeddings the words were clustered by, `-factorised` takes the factorised head, `-s1` is
another seed: hdlm-factorised-s1.
./launch/books.sh trains and measures all of them. 8.2M tokens a run, about 10 minutes on 2 CPU cores.
"""

from hdlm_jax import config


def get_config(run="hdlm"):
    kind, *options = run.split("-")
    if kind not in ("mdlm", "hdlm", "shuffled") or not set(options) <= {"warm", "factorised", "s1"}:
        raise ValueError(f"books.py:{run}: choose mdlm, hdlm or shuffled, then any of -warm, -factorised, -s1")
    c = config.default()
    c.data.source = "files"
    c.data.files = (
        "$HDLM_DATA/openstax/openstax_cc_by.train.jsonl.xz",
        "$HDLM_DATA/classic_books/classic_books.train.jsonl.xz",
    )
    c.data.validation = ("$HDLM_DATA/openstax/openstax_cc_by.valid.jsonl.xz",)
    c.tokenizer.kind = "bpe"
    c.tokenizer.vocab_size = 4096
    c.hierarchy.clusters = {"mdlm": (1,), "hdlm": (64,), "shuffled": (64,)}[kind]
    c.hierarchy.shuffle = kind == "shuffled"
    c.diffusion.weighting = "constant"
    c.model.width = 128
    c.model.blocks = 4
    c.model.heads = 4
    c.model.seq_len = 128
    c.model.embeddings = "clusters" if "warm" in options else "random"
    c.model.head = "factorised" if "factorised" in options else "flat"
    c.optimizer.lr = 2e-3
    c.optimizer.warmup = 100
    c.train.steps = 2000
    c.train.batch_size = 32
    c.train.seed = 1 if "s1" in options else 0
    c.train.log_every = 50
    c.train.evaluate_every = 250
    c.checkpoint.every = 500
    c.evaluate.draws = 8
    c.evaluate.checkpoint = "latest"  # at equal steps
    c.generate.num_samples = 16
    c.generate.steps = 128
    return c
