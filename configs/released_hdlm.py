"""HDLM's weights in the layout of its code (OpenWebText, S = 512, 131B tokens; published: 23.36 PPL with 64 clusters).

    python -m hdlm_jax.main --config=released_hdlm --mode=import \\
        --config.released.weights=checkpoint/model.pt --config.released.clusters=semantic_cluster_dict_64.pt

Then --mode=prepare with OPENWEBTEXT set and --mode=evaluate (docs/import.md). Other numbers of clusters:
--config.hierarchy.clusters='(128,)'; the base size --config.model.width=1024 --config.model.blocks=24
--config.model.heads=16. Not run on the real weights: none were at hand.

Fits on what hdlm_small fits on: it is evaluated and sampled from, which keeps nothing for a backward pass.
"""

from hdlm_jax import config


def get_config():
    c = config.recipe("hdlm_small")
    c.data.packing, c.data.padding = "crop", "hidden"  # a document a row, its length given, as in the paper
    c.generate.length = c.model.seq_len  # whole rows, as the papers sample
    c.model.dtype = "float32"
    c.released.layout = "hdlm"
    return c
