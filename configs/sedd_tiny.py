"""SEDD-absorb, the recipe of mdlm_tiny.py otherwise (told t).

    python -m hdlm_jax.main --config=sedd_tiny

Fits on v5e:2x2: 39 MiB a chip, mesh 4 x 1 x 1, remat=none (hdlm_tiny's plan, with AdamW and a head of its own); a
laptop without one (a compile plan, docs/scale.md).
"""

from hdlm_jax import config


def get_config():
    c = config.recipe("mdlm_tiny")
    c.model.time_conditioning = True
    c.diffusion.process = "sedd"
    return c
