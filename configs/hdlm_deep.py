"""Three levels above the words, 2048 -> 256 -> 16 -> mask, with xi = .9: the paper's future work, at laptop size.

    python -m hdlm_jax.main --config=configs/hdlm_deep.py

The recipe of hdlm_tiny.py otherwise; the bound is exact at any depth and xi (docs/theory.md section 3).
"""

from configs import hdlm_tiny


def get_config():
    c = hdlm_tiny.get_config()
    c.hierarchy.clusters = (256, 16)
    c.diffusion.xi = 0.9
    return c
