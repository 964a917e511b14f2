"""An open checkpoint as a run of ours: LLaDA, Dream, Llama, SmolLM2, Qwen, Gemma 3 and their kin (docs/models.md).

    python -m hdlm_jax.main --mode=import --config.released.weights=FOLDER --workdir=runs/llada
    python -m hdlm_jax.main --mode=generate --workdir=runs/llada --config.generate.prompt='Once upon a time'

FOLDER is one of the Hugging Face hub, or a GGUF file; it tells the sizes. --mode=import takes this recipe if none is
given (--config=released_open): rows of 1,024 tokens, float32. For billions of parameters add
--config.model.dtype=bfloat16 --config.model.param_dtype=bfloat16.

Fits on: v5e:2x4 for LLaDA-8B and Dream-7B, to sample from and to train low-rank additions (compile plans in
docs/models.md).
"""

from hdlm_jax import config

# sizes as published, for compile plans without the weights: released_open:llada_8b
SIZES = {
    "llada_8b": (126464, dict(width=4096, blocks=32, heads=32), dict(inner=12288, theta=5e5, eps=1e-5)),
    "dream_7b": (152064, dict(width=3584, blocks=28, heads=28), dict(
        kv_heads=4, inner=18944, theta=1e6, qkv_bias=True, shifted=True)),
    "llada2_mini": (157184, dict(width=2048, blocks=20, heads=16), dict(
        kv_heads=4, head_dim=128, inner=5120, theta=6e5, qk_norm=True, rotary_share=0.5, context="block", experts=256,
        experts_per_token=8, expert_inner=512, shared_inner=512, dense_blocks=1, gate="sigmoid", expert_groups=8,
        top_groups=4, routed_scale=2.5)),
}


def get_config(size=""):
    if size not in ("", *SIZES):
        raise ValueError(f"released_open.py:{size}: choose one of {', '.join(SIZES)}, or none for a checkpoint that is "
                         "there")
    c = config.default()
    c.tokenizer.kind = "hub"
    c.hierarchy.clusters = (1,)
    c.model.trunk = "decoder"
    c.model.time_conditioning = False
    c.model.seq_len = 1024
    c.evaluate.draws = 16
    if size:
        c.tokenizer.vocab_size, model, decoder = SIZES[size]
        c.model.update(model, dtype="bfloat16", param_dtype="bfloat16")
        c.decoder.update(decoder)
        c.train.batch_size = 8
    return c
