"""HDLM with 64 clusters, small enough for a laptop: what ./launch/quickstart.sh trains.

    python -m hdlm_jax.main --config=hdlm_tiny

Fits on v5e:2x2: 39 MiB a chip, mesh 4 x 1 x 1, remat=none (with AdamW and a head of its own); a laptop without one (a
compile plan, docs/scale.md).
"""

from hdlm_jax import config


def get_config():
    c = config.default()
    c.tokenizer.kind = "bpe"
    c.tokenizer.vocab_size = 2048
    c.hierarchy.clusters = (64,)
    c.diffusion.weighting = "constant"
    c.model.width = 128
    c.model.blocks = 4
    c.model.heads = 4
    c.model.seq_len = 128
    c.model.time_conditioning = False
    c.model.embeddings = "clusters"
    c.model.tied = True
    c.optimizer.name = "muon"
    c.optimizer.lr = 3e-3
    c.optimizer.warmup = 50
    c.train.steps = 2500
    c.train.batch_size = 8
    c.train.log_every = 50
    c.checkpoint.every = 500
    c.evaluate.draws = 4
    c.evaluate.rows_in_training = 64
    c.generate.num_samples = 8
    c.generate.steps = 64
    return c
