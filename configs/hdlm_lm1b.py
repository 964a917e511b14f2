"""HDLM on LM1B as published: 64 clusters, S = 128, BERT's words, dropout .1, rate 3e-4, weights clipped to [0, 10].

    LM1B=1-billion-word-language-modeling-benchmark-r13output BERT_VOCAB=vocab.txt \\
        python -m hdlm_jax.main --config=hdlm_lm1b

Needs hdlm_jax[bert]. Not run by us at this scale. BERT's words lower the case and drop accents, so bits per byte are no
bound on the raw text.

Fits on v5e:2x4: 10.5 of 16 GiB a chip, mesh 8 x 1 x 1, remat=none (a compile plan, docs/scale.md).
"""

from hdlm_jax import config


def get_config():
    c = config.recipe("hdlm_small")
    c.data.source = "files"
    c.data.files = ("$LM1B/training-monolingual.tokenized.shuffled/news.en-*",)
    c.data.validation = ("$LM1B/heldout-monolingual.tokenized.shuffled/news.en.heldout-*",)
    c.data.format = "txt"
    c.data.txt_documents = "line"
    c.data.detokenize = "lm1b"
    c.data.packing, c.data.padding = "crop", "hidden"  # as in the papers: numbers are given the sentences' lengths
    c.tokenizer.kind = "bert"
    c.tokenizer.file = "$BERT_VOCAB"
    c.tokenizer.vocab_size = 30_522
    c.model.seq_len = 128
    c.hierarchy.clusters = (64,)
    c.model.dropout = 0.1
    c.optimizer.lr = 3e-4
    c.diffusion.weight_max = 10.0
    return c
