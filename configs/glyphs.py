"""Glyph captions: drawings of characters, given as 16 patches, and their names, as "greek small letter rho".

    python -m hdlm_jax.main --config=glyphs
    python -m hdlm_jax.main --workdir=runs/glyphs --mode=evaluate

Held out is every tenth character or so: their names have to be put together of what others' are made of
(docs/conditioning.md). The font is in matplotlib: pip install 'hdlm_jax[examples]'.

Fits on: a laptop, in minutes.
"""

from hdlm_jax import config


def get_config():
    c = config.recipe("digits")
    c.data.source = "glyphs"
    c.data.feature_width = 36
    c.tokenizer.kind = "bpe"
    c.tokenizer.vocab_size = 1024
    c.model.seq_len = 40
    c.model.dropout = 0.1
    c.diffusion.weighting = "constant"
    c.optimizer.name = "muon"
    c.train.steps = 5000
    c.train.batch_size = 32
    c.evaluate.rows_in_training = 497
    c.evaluate.exact_match = 497
    c.generate.steps = 24
    c.generate.batch_size = 497
    return c
