"""Three levels above the words, 2048 -> 256 -> 16 -> mask, with xi = .9: the paper's future work, at laptop size.

    python -m hdlm_jax.main --config=hdlm_deep

The recipe of hdlm_tiny.py otherwise; the bound is exact at any depth and xi (docs/theory.md section 3).

Fits on v5e:2x2: 0.1 of 16 GiB a chip, mesh 4 x 1 x 1, remat=none; a laptop without one (a compile plan,
docs/scale.md).
"""

from hdlm_jax import config


def get_config():
    c = config.recipe("hdlm_tiny")
    c.hierarchy.clusters = (256, 16)
    c.diffusion.xi = 0.9
    return c
