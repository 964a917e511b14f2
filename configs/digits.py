"""Images to words: handwritten digits of 8 x 8 pixels, given as 16 patches, and their names letter by letter.

    python -m hdlm_jax.main --config=digits
    python -m hdlm_jax.main --workdir=runs/digits --mode=evaluate

The second command tells the exact bound of the names of 360 images that were held out, and how many of them are written
without a fault (exact_match). The images are in scikit-learn: pip install 'hdlm_jax[examples]'. docs/conditioning.md
says how to give a model images, sound or anything of your own.

Fits on: a laptop, in minutes.
"""

from hdlm_jax import config


def get_config():
    c = config.default()
    c.data.source = "digits"
    c.data.features_field = "features"
    c.data.feature_places = 16
    c.data.feature_width = 4
    c.data.packing = "crop"
    c.tokenizer.kind = "bytes"
    c.tokenizer.vocab_size = 257
    c.hierarchy.clusters = (1,)
    c.diffusion.weighting = "none"
    c.model.width = 96
    c.model.blocks = 3
    c.model.heads = 4
    c.model.seq_len = 24
    c.optimizer.lr = 2e-3
    c.optimizer.warmup = 50
    c.train.steps = 4000
    c.train.batch_size = 64
    c.train.log_every = 100
    c.checkpoint.every = 1000
    c.evaluate.rows_in_training = 360
    c.evaluate.exact_match = 360
    c.evaluate.checkpoint = "latest"
    c.generate.checkpoint = "latest"
    c.generate.num_samples = 16
    c.generate.method = "max_prob"
    c.generate.steps = 8
    c.generate.temperature = 0.0
    c.generate.batch_size = 360
    return c
