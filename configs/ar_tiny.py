"""An autoregressive transformer, the recipe of mdlm_tiny.py otherwise; a judge for generative perplexity as well.

    python -m hdlm_jax.main --config=ar_tiny

Fits on v5e:2x2: 39 MiB a chip, mesh 4 x 1 x 1, remat=none (hdlm_tiny's plan, with AdamW and a head of its own); a
laptop without one (a compile plan, docs/scale.md).
"""

from hdlm_jax import config


def get_config():
    c = config.recipe("mdlm_tiny")
    c.diffusion.process = "autoregressive"
    return c
