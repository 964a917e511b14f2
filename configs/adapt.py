"""An autoregressive model becomes MDLM, and HDLM: SmolLM2-135M on books (docs/results.md, "From an open model").

    python -m hdlm_jax.main --mode=fetch --model=smollm2 --workdir=runs/smollm2
    HDLM_DATA=../shared/data python -m hdlm_jax.main --config=adapt:hdlm64 --workdir=runs/adapt_hdlm64

The argument is mdlm, hdlm64, hdlm256 or hdlm1024_32 (clusters of the model's own embeddings); `-factorised` takes the
factorised head, `-own` reads logits at their own place (else one place before, as the model was trained to), `-opened`
lets tokens see those behind them step by step, `-lora` trains additions of rank 16 alone: hdlm64-factorised-lora. `ar`
goes on with the autoregressive model, for comparison. Another model: --config.train.init_from=RUN.

Fits on: SmolLM2-135M trains in 5 GB of a laptop's memory; for larger ones see the compile plans in docs/models.md.
"""

from hdlm_jax import config

CLUSTERS = {"mdlm": (1,), "hdlm64": (64,), "hdlm256": (256,), "hdlm1024_32": (1024, 32), "ar": (1,)}


def get_config(run="hdlm64"):
    kind, *options = run.split("-")
    if kind not in CLUSTERS or not set(options) <= {"factorised", "own", "opened", "lora"}:
        raise ValueError(f"adapt.py:{run}: choose one of {', '.join(CLUSTERS)}, then -factorised, -own, -opened, -lora")
    c = config.default()
    c.data.source = "files"
    c.data.files = (
        "$HDLM_DATA/openstax/openstax_cc_by.train.jsonl.xz",
        "$HDLM_DATA/classic_books/classic_books.train.jsonl.xz",
    )
    c.data.validation = ("$HDLM_DATA/openstax/openstax_cc_by.valid.jsonl.xz",)
    c.data.dir = "runs/adapt/data"
    c.train.init_from = "runs/smollm2"
    c.train.adapt = True
    c.train.open_steps = 100 if "opened" in options else 0
    c.hierarchy.clusters = CLUSTERS[kind]
    c.hierarchy.embeddings = "checkpoint:runs/smollm2"
    c.diffusion.process = "autoregressive" if kind == "ar" else "hierarchical"
    c.diffusion.weighting = "constant"
    c.model.trunk = "decoder"
    c.model.time_conditioning = False
    c.model.seq_len = 128
    c.model.head = "factorised" if "factorised" in options else "flat"
    c.decoder.shifted = "own" not in options and kind != "ar"
    c.decoder.lora = 16 if "lora" in options else 0
    c.optimizer.lr = 1e-3 if "lora" in options else 2e-4
    c.optimizer.b2 = 0.98
    c.optimizer.warmup = 20
    c.train.steps = 400
    c.train.batch_size = 4
    c.train.log_every = 10
    c.train.evaluate_every = 100
    c.checkpoint.every = 400
    c.evaluate.rows = 64
    c.evaluate.rows_in_training = 16
    c.evaluate.draws = 8
    c.evaluate.checkpoint = "latest"  # at equal tokens
    c.generate.checkpoint = "latest"
    c.generate.num_samples = 4
    return c
