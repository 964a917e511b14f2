"""GIDD+-small (arXiv 2503.04482): 170M, S = 512, 131B tokens of OpenWebText; the argument is p_uniform, 0.0 by default.

    OPENWEBTEXT='owt/*.parquet' python -m hdlm_jax.main --config=gidd_small:0.1

GIDD's own perplexities there: 23.05 (p_uniform 0, dynamic weights), 23.67 (.1), 24.38 (.2). Not run by us.

Fits on v5e:2x4: 13.0 of 16 GiB a chip, mesh 8 x 1 x 1, remat=cheap (a compile plan, docs/scale.md).
"""

from hdlm_jax import config


def get_config(p_uniform="0.0"):
    c = config.recipe("hdlm_small")
    c.hierarchy.clusters = (1,)
    c.diffusion.process = "gidd"
    c.diffusion.p_uniform = float(p_uniform)
    c.diffusion.weighting = "dynamic"
    return c
