"""An open checkpoint as a run of ours: LLaDA, Dream, Llama, SmolLM2, Qwen, Gemma 3 and their kin (docs/models.md).

    python -m hdlm_jax.main --mode=import --config.released.weights=FOLDER --workdir=runs/llada
    python -m hdlm_jax.main --mode=generate --workdir=runs/llada --config.generate.prompt='Once upon a time'

FOLDER is one of the Hugging Face hub, or a GGUF file; it tells the sizes. --mode=import takes this recipe if none is
given (--config=released_open): rows of 1,024 tokens, float32. For billions of parameters add
--config.model.dtype=bfloat16 --config.model.param_dtype=bfloat16.

Fits on: a compile plan of LLaDA-8B and Dream-7B is in docs/models.md.
"""

from hdlm_jax import config


def get_config():
    c = config.default()
    c.tokenizer.kind = "hub"
    c.hierarchy.clusters = (1,)
    c.model.trunk = "decoder"
    c.model.time_conditioning = False
    c.model.seq_len = 1024
    c.evaluate.draws = 16
    return c
