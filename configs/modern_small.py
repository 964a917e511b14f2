"""HDLM-small on the decoder-only trunk: RMS norms, rotary positions, norms of q and k, a gated MLP, no time.

    OPENWEBTEXT='owt/*.parquet' python -m hdlm_jax.main --config=modern_small

Data, clusters and steps are those of hdlm_small; the network is that of today's open models, of about as many
parameters (12 blocks of width 768, MLP of 2,048), so that what is trained here goes where they go; its matrices go by
Muon, at ten times AdamW's rate, as is best at the sizes of docs/results.md. Not run by us at this scale.

Fits on v5e:2x4: 12.3 of 16 GiB a chip with AdamW, mesh 8 x 1 x 1, remat=cheap (a compile plan, docs/models.md).
"""

from hdlm_jax import config


def get_config():
    c = config.recipe("hdlm_small")
    c.model.trunk = "decoder"
    c.model.time_conditioning = False
    c.decoder.kv_heads = 4
    c.decoder.inner = 2048
    c.decoder.qk_norm = True
    c.optimizer.name = "muon"
    c.optimizer.muon_lr = 10 * c.optimizer.lr
    return c
