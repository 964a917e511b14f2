"""Speech to words: recordings of spoken digits, given as log mel spectra, and their names letter by letter.

    HDLM_DATA=../shared/data python -m hdlm_jax.main --config=spoken_digits
    HDLM_DATA=../shared/data python -m hdlm_jax.main --config=spoken_digits:unseen_speaker \\
        --workdir=runs/unseen_speaker
    python -m hdlm_jax.main --workdir=runs/spoken_digits --mode=evaluate

What is behind the vectors of a short recording is padding, which no position hears. Held out are five takes of each
digit of every speaker, or with ":unseen_speaker" all of one speaker (docs/conditioning.md). The recordings, in
$HDLM_DATA/fsdd, are the Free Spoken Digit Dataset.

Fits on: a laptop, in minutes.
"""

from hdlm_jax import config


def get_config(source="spoken_digits"):
    c = config.recipe("digits")
    c.data.source = source
    c.data.feature_places = 24
    c.data.feature_width = 40
    c.model.seq_len = 32
    c.model.dropout = 0.1
    c.train.steps = 2000
    c.evaluate.rows_in_training = 300
    c.evaluate.exact_match = 500
    c.generate.batch_size = 500
    return c
