"""Time series to words: two vowels as up to 29 frames of 12 cepstral coefficients, and who said them, of nine men.

    pip install --no-deps aeon
    python -m hdlm_jax.main --config=vowels
    python -m hdlm_jax.main --workdir=runs/vowels --mode=evaluate

UCI's Japanese Vowels, 270 recordings to learn from and 370 to be told (docs/conditioning.md). Two files of the package
aeon are read, no code of it is run, so it needs nothing of what it would install.

Fits on: a laptop, in minutes.
"""

from hdlm_jax import config


def get_config():
    c = config.recipe("digits")
    c.data.source = "vowels"
    c.data.feature_places = 29
    c.data.feature_width = 12
    c.model.seq_len = 36
    c.model.dropout = 0.1
    c.train.steps = 1000
    c.evaluate.rows_in_training = 370
    c.evaluate.exact_match = 370
    c.generate.batch_size = 370
    return c
