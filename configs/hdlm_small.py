"""HDLM-small of the paper: 12 blocks of width 768, 64 clusters, S = 512, 131B tokens of OpenWebText (PPL 23.36).

    OPENWEBTEXT='owt/*.parquet' python -m hdlm_jax.main --config=hdlm_small

OPENWEBTEXT is your copy, in any of its layouts: a path, folder, glob or URL (openwebtext.tar.xz, subsets/*.tar,
*.jsonl.zst, gs://bucket/owt/*.parquet). The papers' loader took a random window of each document (data.packing=crop,
data.padding=hidden); here documents are packed. GPT-2's tokenizer comes through tiktoken. Not run by us at this scale.
Weights are clipped to [0, 2] as published, which at gamma = 1 is unweighted cross-entropy (docs/theory.md section 3).

Fits on v5e:2x4: 13.0 of 16 GiB a chip, mesh 8 x 1 x 1, remat=cheap (a compile plan, docs/scale.md).
"""

from hdlm_jax import config


def get_config():
    c = config.default()
    c.data.source = "files"
    c.data.files = ("$OPENWEBTEXT",)
    c.data.split = "last"
    c.data.validation_documents = 100_000  # held out, as in the papers
    c.tokenizer.kind = "gpt2"
    c.hierarchy.clusters = (64,)
    c.model.width = 768
    c.model.blocks = 12
    c.model.heads = 12
    c.model.seq_len = 512
    c.model.dtype = "bfloat16"
    c.train.steps = 500_000
    c.train.batch_size = 512
    c.checkpoint.every = 10_000
    c.evaluate.draws = 2
    c.generate.steps = 512
    return c
