"""Fine-tuning on prompt/response pairs: words, clusters and network are those of the run it starts from.

    python -m hdlm_jax.main --config=tuned --config.train.init_from=runs/quickstart/hdlm_tiny \\
        --config.data.files='("pairs.jsonl",)'
    python -m hdlm_jax.main --config=tuned --config.train.init_from=runs/quickstart/hdlm_tiny \\
        --mode=generate --config.generate.prompt='3 times list:'

docs/finetuning.md makes such a file and shows what comes out. A record is a row: its prompt is given, its response and
the ends of text behind it are learnt, so that the run knows when to stop. Rows of 64 tokens (model.seq_len).

Fits on: what the run that it starts from was trained on.
"""

from hdlm_jax import config


def get_config():
    c = config.default()
    c.data.source = "files"
    c.data.files = ("pairs.jsonl",)
    c.data.prompt_field = "prompt"
    c.data.text_field = "response"
    c.data.packing = "crop"
    c.model.seq_len = 64
    c.optimizer.lr = 1e-3
    c.optimizer.warmup = 50
    c.train.init_from = "runs/quickstart/hdlm_tiny"
    c.train.steps = 400
    c.train.batch_size = 32
    c.train.log_every = 20
    c.checkpoint.every = 200
    c.evaluate.rows_in_training = 64
    c.generate.num_samples = 4
    c.generate.steps = 64
    return c
