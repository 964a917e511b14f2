"""HDLM on LM1B as published: 64 clusters, S = 128, BERT's words, dropout .1, rate 3e-4, weights clipped to [0, 10].

    LM1B=1-billion-word-language-modeling-benchmark-r13output BERT_VOCAB=vocab.txt \\
        python -m hdlm_jax.main --config=configs/hdlm_lm1b.py

Needs hdlm_jax[bert]. Not run by us at this scale. BERT's words lower the case and drop accents, so bits per byte are no
bound on the raw text.
"""

from configs import data, hdlm_small


def get_config():
    c = hdlm_small.get_config()
    data.lm1b(c)
    c.hierarchy.clusters = (64,)
    c.model.dropout = 0.1
    c.optimizer.lr = 3e-4
    c.diffusion.weight_max = 10.0
    return c
