"""Controlled comparison on real text: HDLM, MDLM and the field's baselines, one recipe (docs/results.md).

    HDLM_DATA=../shared/data python -m hdlm_jax.main --config=books:hdlm

The argument is hdlm (64 clusters), shuffled (64 clusters of the same sizes with random members), hdlm_xi9 (xi = .9),
hdlm_k3 (K = 3 levels, 256 and 16 clusters), mdlm, gidd0 (GIDD+ without random words), gidd (p_uniform = .1), sedd, ar;
`-frequency` and `-brown` are clusters by counts of words and of bigrams, `-learned` makes them anew every 250 steps,
`-soft` learns how likely a word goes to each of them, by the gradient of the bound (docs/training.md);
`-warm` starts the embedding table from the embeddings the words were clustered by, `-factorised` takes the factorised
head (over 64 classes of its own where the process has no clusters), `-muon` trains the blocks' matrices by Muon,
`-block16` is block diffusion in blocks of 16 tokens (docs/training.md), `-s1` is another seed: hdlm-factorised-s1.
./launch/books.sh trains and measures them. 8.2M tokens a run, about 10 minutes on 2 CPU cores.

Fits on v5e:2x2: 0.1 of 16 GiB a chip, mesh 4 x 1 x 1, remat=none; a laptop without one (a compile plan,
docs/scale.md).
"""

from hdlm_jax import config


def get_config(run="hdlm"):
    kind, *options = run.split("-")
    clusters = {"hdlm": (64,), "shuffled": (64,), "hdlm_xi9": (64,), "hdlm_k3": (256, 16), "mdlm": (1,), "gidd0": (1,),
                "gidd": (1,), "sedd": (1,), "ar": (1,)}
    seeds = {f"s{i}" for i in range(10)}
    sizes = {f"block{n}": n for n in (1, 4, 16, 64)}
    known = {"warm", "factorised", "muon", "learned", "soft", "frequency", "brown", *sizes, *seeds}
    if kind not in clusters or not set(options) <= known:
        raise ValueError(f"books.py:{run}: choose one of {', '.join(clusters)}, then "
                         "-warm, -factorised, -muon, -learned, -soft, -frequency, -brown, -block1 (4, 16, 64), -s1 ...")
    c = config.default()
    c.data.source = "files"
    c.data.files = (
        "$HDLM_DATA/openstax/openstax_cc_by.train.jsonl.xz",
        "$HDLM_DATA/classic_books/classic_books.train.jsonl.xz",
    )
    c.data.validation = ("$HDLM_DATA/openstax/openstax_cc_by.valid.jsonl.xz",)
    c.tokenizer.kind = "bpe"
    c.tokenizer.vocab_size = 4096
    c.hierarchy.clusters = clusters[kind]
    c.hierarchy.head_clusters = 64 if "factorised" in options and clusters[kind] == (1,) else 0
    c.hierarchy.embeddings = next((o for o in options if o in ("frequency", "brown")), "corpus")
    c.hierarchy.shuffle = kind == "shuffled"
    c.hierarchy.map = "learned" if "soft" in options else "hard"
    processes = {"gidd0": "gidd", "gidd": "gidd", "sedd": "sedd", "ar": "autoregressive"}
    c.diffusion.process = processes.get(kind, "hierarchical")
    c.diffusion.weighting = ("none" if "soft" in options else "dynamic" if c.diffusion.process == "gidd" else
                             "constant")
    c.diffusion.p_uniform = 0.1 if kind == "gidd" else 0.0
    c.diffusion.xi = 0.9 if kind == "hdlm_xi9" or "soft" in options else 1.0
    c.model.width = 128
    c.model.blocks = 4
    c.model.heads = 4
    c.model.seq_len = 128
    c.model.block = max((sizes.get(o, 0) for o in options), default=0)
    c.model.time_conditioning = kind != "ar" and not c.model.block
    c.model.embeddings = "clusters" if "warm" in options else "random"
    c.model.head = "factorised" if "factorised" in options else "flat"
    c.optimizer.name = "muon" if "muon" in options else "adamw"
    c.optimizer.lr = 2e-3
    c.optimizer.warmup = 100
    c.train.objective = "paired" if "soft" in options else "nelbo"
    c.train.steps = 2000
    c.train.batch_size = 32
    c.train.recluster_every = 250 if "learned" in options else 0
    c.train.seed = max([int(o[1:]) for o in options if o in seeds], default=0)
    c.train.log_every = 50
    c.train.evaluate_every = 250
    c.checkpoint.every = 500
    c.evaluate.draws = 8
    c.evaluate.checkpoint = "latest"  # at equal steps
    c.generate.num_samples = 128
    c.generate.checkpoint = "latest"
    c.generate.stop = ""  # all 128 tokens are judged, as the field does
    c.generate.steps = 128
    if c.model.block:
        c.generate.method, c.generate.options = "bd3lm", f"block={c.model.block}"
    return c
