"""GIDD with a tenth of random words at t = 1/2, told t, dynamic weights; mdlm_tiny.py otherwise.

    python -m hdlm_jax.main --config=gidd_tiny

Fits on v5e:2x2: 39 MiB a chip, mesh 4 x 1 x 1, remat=none (hdlm_tiny's plan, with AdamW and a head of its own); a
laptop without one (a compile plan, docs/scale.md).
"""

from hdlm_jax import config


def get_config():
    c = config.recipe("mdlm_tiny")
    c.model.time_conditioning = True
    c.diffusion.process = "gidd"
    c.diffusion.p_uniform = 0.1
    c.diffusion.weighting = "dynamic"
    return c
