"""GIDD's released weights (OpenWebText, S = 512, 131B tokens; published: GIDD+ small 23.05 PPL at p_u = 0) as a run.

    python -m hdlm_jax.main --config=released_gidd --mode=import \\
        --config.released.weights=gidd-small-p_unif-0.0/model.safetensors

Then --mode=prepare with OPENWEBTEXT set and --mode=evaluate (docs/import.md). Weights trained with p_u = .1 or .2 need
--config.diffusion.p_uniform=0.1; the base size --config.model.width=1024 --config.model.blocks=24
--config.model.heads=16. Not run on the real weights: none were at hand.

Fits on what hdlm_small fits on: it is evaluated and sampled from, which keeps nothing for a backward pass.
"""

from hdlm_jax import config


def get_config():
    c = config.recipe("hdlm_small")
    c.data.packing, c.data.padding = "crop", "hidden"  # a document a row, its length given, as in the paper
    c.hierarchy.clusters = (1,)
    c.diffusion.process = "gidd"
    c.generate.length = c.model.seq_len  # whole rows, as the papers sample
    c.model.dtype = "float32"
    c.released.layout = "gidd"
    return c
