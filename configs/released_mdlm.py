"""MDLM's released weights (OpenWebText, S = 1024, 170M parameters; published: 23.2 PPL) as a run of ours.

    python -m hdlm_jax.main --config=released_mdlm --mode=import \\
        --config.released.weights=mdlm-owt/model.safetensors

Then --mode=prepare with OPENWEBTEXT set and --mode=evaluate (docs/import.md). Its network was trained without time
conditioning: it always sees time 0, which is folded into the biases. Not run on the real weights: none were at hand.

Fits on what hdlm_small fits on: it is evaluated and sampled from, which keeps nothing for a backward pass.
"""

from hdlm_jax import config


def get_config():
    c = config.recipe("hdlm_small")
    c.hierarchy.clusters = (1,)
    c.model.seq_len = 1024
    c.model.time_conditioning = False
    c.model.dtype = "float32"
    c.released.layout = "mdlm"
    return c
