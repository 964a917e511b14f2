"""Tiny models of the open families and what the originals make of them: `families.npz`.

`python tests/families.py [OUT]` makes that file, where torch and transformers are installed (made with torch 2.13.0 and
transformers 5.24.0 on a CPU, eager attention, float32); to read it numpy is enough. Weights are numbers that float16
holds. Two families stand in no release of transformers: LLaDA, which is Llama under other names (its logits here are
Llama's), and LLaDA2-MoE, which is written out below in numpy and held to transformers' GLM-4-MoE by test_families.py.
"""
import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

FILE = Path(__file__).with_name("families.npz")
V, S, BLOCK = 96, 24, 4  # words, positions, and positions of a block of LLaDA2-MoE's block-causal attention
_common = {"vocab_size": V, "max_position_embeddings": 128, "num_hidden_layers": 3, "intermediate_size": 64,
           "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
# the class of transformers, and its settings; eps is larger than anywhere, so that a wrong one shows
SETTINGS: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {
        "hidden_size": 48, "rms_norm_eps": 1e-3, "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}}),
    "llama_tied": ("Llama", {
        "hidden_size": 32, "num_key_value_heads": 4, "tie_word_embeddings": True, "rms_norm_eps": 2e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
    "qwen2": ("Qwen2", {
        "hidden_size": 48, "rms_norm_eps": 2e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("Qwen3", {
        "hidden_size": 32, "head_dim": 16, "tie_word_embeddings": True, "rms_norm_eps": 2e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "gemma3_text": ("Gemma3Text", {
        "hidden_size": 32, "head_dim": 16, "num_hidden_layers": 4, "query_pre_attn_scalar": 24, "sliding_window": 4,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rms_norm_eps": 3e-2, "tie_word_embeddings": True, "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}}),
    "qwen3_moe": ("Qwen3Moe", {
        "hidden_size": 32, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "rms_norm_eps": 2e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
}
# as published, but for sizes
LLADA = {"architectures": ["LLaDAModelLM"], "model_type": "llada", "block_type": "llama", "activation_type": "silu",
         "layer_norm_type": "rms", "d_model": 48, "n_heads": 4, "n_kv_heads": 2, "n_layers": 3, "mlp_hidden_size": 64,
         "mlp_ratio": 4, "vocab_size": V, "embedding_size": V, "max_sequence_length": 64, "rope": True,
         "rope_theta": 5e5, "rms_norm_eps": 1e-3, "include_bias": False, "include_qkv_bias": False,
         "weight_tying": False, "input_emb_norm": False, "scale_logits": False, "alibi": False, "mask_token_id": 95,
         "eos_token_id": 94, "pad_token_id": 94}
LLADA2 = {"architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "vocab_size": V, "hidden_size": 32,
          "num_hidden_layers": 3, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
          "head_dim": 16, "hidden_act": "silu", "rms_norm_eps": 2e-3, "rope_theta": 6e5, "rope_scaling": None,
          "partial_rotary_factor": 0.5, "use_qk_norm": True, "use_qkv_bias": False, "use_bias": False,
          "num_experts": 16, "num_experts_per_tok": 3, "num_shared_experts": 1, "moe_intermediate_size": 16,
          "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "norm_topk_prob": True,
          "routed_scaling_factor": 2.5, "score_function": "sigmoid", "moe_router_enable_expert_bias": True,
          "max_position_embeddings": 64, "tie_word_embeddings": False, "pad_token_id": 94, "eos_token_id": 94}
NAMES = (*SETTINGS, "llada", "llada2_moe")


@functools.cache
def _stored() -> dict[str, np.ndarray]:
    with np.load(FILE) as file:
        return dict(file)


def case(name: str) -> dict[str, np.ndarray]:
    """"ids" int [2, S], and float32 logits [2, S, V]: "causal", "full" or "block" (blocks of BLOCK positions), as the
    family has them."""
    logits = {key: _stored().get(f"{name}/{key}") for key in ("causal", "full", "block")}
    return {"ids": _stored()["ids"], **{key: value for key, value in logits.items() if value is not None}}


def config(name: str) -> dict:
    """What config.json holds, as transformers 5 writes it."""
    return json.loads(str(_stored()[f"{name}/config"]))


def weights(name: str) -> dict[str, np.ndarray]:
    """float32 tensors under the names they have on the hub."""
    if name == "llada":
        return {_llada_name(key): value for key, value in weights("llama").items()}
    start = f"{name}/weights/"
    return {key.removeprefix(start): np.float32(value) for key, value in _stored().items() if key.startswith(start)}


def _llada_name(name: str) -> str:
    """LLaDA's name of a weight of Llama; ff_out is both the head and the last matrix of the MLP."""
    new = {"embed_tokens": "wte", "norm": "ln_f", "lm_head": "ff_out", "input_layernorm": "attn_norm",
           "post_attention_layernorm": "ff_norm", "o_proj": "attn_out", "gate_proj": "ff_proj", "down_proj": "ff_out"}
    *parents, module, kind = name.split(".")
    block = [f"blocks.{parents[2]}"] if "layers" in parents else []
    return ".".join(["model.transformer", *block, new.get(module, module), kind])


def write_folder(name: str, folder: Path, shards: int = 1, old: bool = False) -> Path:
    """A folder of the hub's layout: config.json and model.safetensors, or so many shards with their index.

    old: config.json as transformers 4 wrote it.
    """
    made = config(name)
    return write(folder, as_version_4(made) if old else made, weights(name), shards)


def write(folder: Path, made: dict, tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    """`write_folder` of a configuration and tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(made, indent=2))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    where = {key: f"model-{1 + i % shards:05}-of-{shards:05}.safetensors" for i, key in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({key: tensors[key] for key in where if where[key] == file}, folder / file, metadata={"format": "pt"})
    size = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def as_version_4(made: dict) -> dict:
    """transformers 4 wrote rope_theta and rope_scaling (Gemma 3: and rope_local_base_freq) in place of rope_parameters,
    and torch_dtype in place of dtype."""
    made = dict(made)
    if "dtype" in made:
        made["torch_dtype"] = made.pop("dtype")
    rope = made.pop("rope_parameters", None)
    if rope is None:
        return made
    if "full_attention" in rope:
        made["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    theta, scaling = rope["rope_theta"], {key: value for key, value in rope.items() if key != "rope_theta"}
    return made | {"rope_theta": theta, "rope_scaling": None if rope["rope_type"] == "default" else scaling}


GGUF = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
GGUF_BLOCK = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
              "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
              "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a weight."""
    module, kind = name.rsplit(".", 1)
    if module in GGUF:
        return f"{GGUF[module]}.{kind}"
    _, _, block, part = module.split(".", 3)
    return f"blk.{block}.{GGUF_BLOCK[part]}.{kind}"


def write_gguf(name: str, path: Path) -> Path:
    """A GGUF file of llama_tied or qwen2 in float32, as llama.cpp's converter writes it (without a tokenizer).

    Of the architecture "llama" the rows of a head of queries and keys are in the order of the interleaved rotary
    embedding: 0, d/2, 1, d/2 + 1, ...
    """
    import gguf

    made, tensors = config(name), weights(name)
    arch = {"llama_tied": "llama", "qwen2": "qwen2"}[name]
    heads = {"q_proj": made["num_attention_heads"], "k_proj": made["num_key_value_heads"]}
    out = gguf.GGUFWriter(path, arch)
    out.add_name(name)
    out.add_file_type(gguf.LlamaFileType.ALL_F32)
    out.add_context_length(made["max_position_embeddings"])
    out.add_embedding_length(made["hidden_size"])
    out.add_block_count(made["num_hidden_layers"])
    out.add_feed_forward_length(made["intermediate_size"])
    out.add_head_count(heads["q_proj"])
    out.add_head_count_kv(heads["k_proj"])
    out.add_layer_norm_rms_eps(made["rms_norm_eps"])
    out.add_rope_freq_base(made["rope_parameters"]["rope_theta"])
    if arch == "llama":
        out.add_rope_dimension_count(made["hidden_size"] // heads["q_proj"])
        out.add_vocab_size(made["vocab_size"])
    for key, value in tensors.items():
        n = heads.get(key.split(".")[-2], 0) if arch == "llama" else 0
        if n:
            value = value.reshape(n, 2, len(value) // n // 2, -1).swapaxes(1, 2).reshape(value.shape)
        out.add_tensor(gguf_name(key), np.ascontiguousarray(value))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


# LLaDA2-MoE in float64


def llada2(w: dict[str, np.ndarray], made: dict, ids: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Logits [S, V] of one sequence ids [S]; seen bool [S, S], what each position (row) attends to."""
    w = {key.removeprefix("model."): np.float64(value) for key, value in w.items()}
    x = w["word_embeddings.weight"][ids]
    for i in range(made["num_hidden_layers"]):
        at = f"layers.{i}."
        x = x + _attention(w, at + "attention.", made, _norm(x, w[at + "input_layernorm.weight"], made), seen)
        h = _norm(x, w[at + "post_attention_layernorm.weight"], made)
        dense = i < made["first_k_dense_replace"]
        x = x + (_mlp(w, at + "mlp.", h) if dense else np.stack([experts(w, at + "mlp.", made, row) for row in h]))
    return _norm(x, w["norm.weight"], made) @ w["lm_head.weight"].T


def _norm(x: np.ndarray, weight: np.ndarray, made: dict) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + made["rms_norm_eps"]) * weight


def _mlp(w: dict[str, np.ndarray], at: str, x: np.ndarray) -> np.ndarray:
    gate, up, down = (w[f"{at}{name}_proj.weight"] for name in ("gate", "up", "down"))
    h = x @ gate.T
    return (h / (1 + np.exp(-h)) * (x @ up.T)) @ down.T


def _attention(w: dict[str, np.ndarray], at: str, made: dict, x: np.ndarray, seen: np.ndarray) -> np.ndarray:
    n, kv, dim = made["num_attention_heads"], made["num_key_value_heads"], made["head_dim"]
    heads = (x @ w[at + "query_key_value.weight"].T).reshape(len(x), n + 2 * kv, dim)  # of q, then k, then v
    turned = int(dim * made["partial_rotary_factor"])
    angle = np.outer(np.arange(len(x)), made["rope_theta"] ** (-np.arange(0, turned, 2) / turned))

    def rotate(x: np.ndarray) -> np.ndarray:
        a, b = x[:, : turned // 2], x[:, turned // 2 : turned]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[:, turned:]], axis=-1)

    out = np.zeros((len(x), n, dim))
    for i in range(n):
        j = n + i // (n // kv)  # its key; its value is kv behind
        q = rotate(_norm(heads[:, i], w[at + "query_layernorm.weight"], made))
        k = rotate(_norm(heads[:, j], w[at + "key_layernorm.weight"], made))
        score = np.where(seen, np.exp(q @ k.T / np.sqrt(dim)), 0)
        out[:, i] = score / score.sum(-1, keepdims=True) @ heads[:, j + kv]
    return out.reshape(len(x), -1) @ w[at + "dense.weight"].T


def experts(w: dict[str, np.ndarray], at: str, made: dict, x: np.ndarray) -> np.ndarray:
    """The mixture of experts for x [D] of one position; `at` is what stands before its weights' names."""
    score = 1 / (1 + np.exp(-w[at + "gate.weight"] @ x))
    rank = (score + w[at + "gate.expert_bias"]).reshape(made["n_group"], -1)  # for choosing alone
    best = np.sort(rank, axis=-1)[:, -2:].sum(-1)
    rank[np.argsort(best)[: -made["topk_group"]]] = -np.inf
    chosen = np.argsort(rank.ravel())[-made["num_experts_per_tok"] :]
    share = score[chosen] / score[chosen].sum() * made["routed_scaling_factor"]
    out = _mlp(w, at + "shared_experts.", x)
    for expert, part in zip(chosen, share, strict=True):
        out = out + part * _mlp(w, f"{at}experts.{expert}.", x)
    return out


def block_causal() -> np.ndarray:
    """bool [S, S]: a position sees its block and those before."""
    block = np.arange(S) // BLOCK
    return block[:, None] >= block[None]


def _llada2_shapes() -> dict[str, tuple[int, ...]]:
    c = LLADA2
    d, dim, n, kv = c["hidden_size"], c["head_dim"], c["num_attention_heads"], c["num_key_value_heads"]

    def mlp(at: str, inner: int) -> dict[str, tuple[int, ...]]:
        return {f"{at}gate_proj.weight": (inner, d), f"{at}up_proj.weight": (inner, d),
                f"{at}down_proj.weight": (d, inner)}

    shapes: dict[str, tuple[int, ...]] = {"model.word_embeddings.weight": (V, d), "model.norm.weight": (d,),
                                          "lm_head.weight": (V, d)}
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        shapes |= {at + "input_layernorm.weight": (d,), at + "post_attention_layernorm.weight": (d,),
                   at + "attention.query_key_value.weight": ((n + 2 * kv) * dim, d),
                   at + "attention.dense.weight": (d, n * dim), at + "attention.query_layernorm.weight": (dim,),
                   at + "attention.key_layernorm.weight": (dim,)}
        if i < c["first_k_dense_replace"]:
            shapes |= mlp(at + "mlp.", c["intermediate_size"])
            continue
        shapes |= {at + "mlp.gate.weight": (c["num_experts"], d), at + "mlp.gate.expert_bias": (c["num_experts"],)}
        for e in range(c["num_experts"]):
            shapes |= mlp(f"{at}mlp.experts.{e}.", c["moe_intermediate_size"])
        shapes |= mlp(at + "mlp.shared_experts.", c["moe_intermediate_size"] * c["num_shared_experts"])
    return shapes


# Making the file


def draw(shapes: dict[str, tuple[int, ...]], seed: int, offset: float) -> dict[str, np.ndarray]:
    """Matrices N(0, 0.2^2), norms around 1 - offset, biases N(0, 0.5^2) (experts' 0.2); all float16 numbers."""
    rng = np.random.Generator(np.random.Philox(seed))
    out = {}
    for name in sorted(shapes):
        scale = 0.5 if name.endswith(".bias") else 0.2
        norm = name.endswith("norm.weight")
        value = scale * rng.standard_normal(shapes[name]) + (1 - offset if norm else 0)
        out[name] = np.float32(np.float16(value))
    return out


def original(folder: Path, **changes: Any) -> dict[str, np.ndarray]:
    """Logits "causal" and, but for Gemma 3, "full" of what transformers reads from a folder; changes: of its config."""
    import torch
    import transformers

    made = transformers.AutoConfig.from_pretrained(folder, **changes)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=made, attn_implementation="eager",
                                                              dtype=torch.float32).eval()
    ids = torch.tensor(make_ids())
    with torch.no_grad():
        out = {"causal": model(ids).logits.numpy()}
        if made.model_type != "gemma3_text":
            everything = torch.zeros(len(ids), 1, S, S)  # added to the scores of attention
            out["full"] = model(ids, attention_mask=everything).logits.numpy()
    return out


def make_ids() -> np.ndarray:
    return np.random.Generator(np.random.Philox(3)).integers(0, V, (2, S)).astype(np.int32)


def _changes(made: Any) -> dict[str, dict[str, Any]]:
    """Settings of a configuration that must not be overlooked, each of them off."""
    rope = made.rope_parameters
    turns = lambda **new: {"rope_parameters": rope | new}  # noqa: E731
    if made.model_type == "gemma3_text":
        one, all_ = rope["sliding_attention"], rope["full_attention"]
        return {"eps": {"rms_norm_eps": 1e-6}, "window": {"sliding_window": 5}, "scale": {"query_pre_attn_scalar": 16},
                "theta": turns(full_attention=all_ | {"rope_theta": one["rope_theta"]}),
                "local theta": turns(sliding_attention=one | {"rope_theta": all_["rope_theta"]}),
                "factor": turns(full_attention=all_ | {"factor": 1.0})}
    out = {"eps": {"rms_norm_eps": 1e-6}, "theta": turns(rope_theta=10 * rope["rope_theta"])}
    if rope["rope_type"] == "llama3":
        out |= {key: turns(**{key: 2 * rope[key]}) for key in rope if key not in ("rope_type", "rope_theta")}
    if made.model_type == "qwen3_moe":
        out |= {"normalise": {"norm_topk_prob": False}, "chosen": {"num_experts_per_tok": 3}}
    return out


def _make(name: str, folder: Path) -> dict[str, np.ndarray]:
    """The entries of one of SETTINGS; asserts that another mask, eps or theta would show."""
    import transformers

    kind, settings = SETTINGS[name]
    made = getattr(transformers, f"{kind}Config")(**_common | settings)
    transformers.AutoModelForCausalLM.from_config(made).save_pretrained(folder / "empty")
    shapes = {key: value.shape for key, value in load_file(folder / "empty" / "model.safetensors").items()}
    drawn = draw(shapes, seed=list(SETTINGS).index(name), offset=kind.startswith("Gemma"))
    text = (folder / "empty" / "config.json").read_text()
    write(folder / "full", json.loads(text), drawn)
    logits = original(folder / "full")
    others = {key: original(folder / "full", **changes)["causal"] for key, changes in _changes(made).items()}
    if "full" in logits:
        others["full"] = logits["full"]
    away = {key: round(float(np.abs(other - logits["causal"]).max()), 3) for key, other in others.items()}
    print(name, "logits up to", float(np.abs(logits["causal"]).max()), "differ by", away, flush=True)
    assert min(away.values()) > 0.05, away
    entries = {f"{name}/config": np.array(text), **{f"{name}/{key}": value for key, value in logits.items()}}
    return entries | {f"{name}/weights/{key}": np.float16(value) for key, value in drawn.items()}


def _make_llada(entries: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """Llama's weights without scaling of the rotary embedding, all positions seen."""
    llama = json.loads(str(entries["llama/config"]))
    llama["rope_parameters"] = {"rope_type": "default", "rope_theta": LLADA["rope_theta"]}
    start = "llama/weights/"
    tensors = {key.removeprefix(start): np.float32(a) for key, a in entries.items() if key.startswith(start)}
    return {"llada/config": np.array(json.dumps(LLADA)), "llada/full": original(write(folder, llama, tensors))["full"]}


def _make_llada2() -> dict[str, np.ndarray]:
    drawn = draw(_llada2_shapes(), seed=len(SETTINGS), offset=0)
    entries = {"llada2_moe/config": np.array(json.dumps(LLADA2)), **{
        f"llada2_moe/weights/{key}": np.float16(value) for key, value in drawn.items()}}
    for key, seen in {"block": block_causal(), "full": np.ones((S, S), bool)}.items():
        logits = np.stack([llada2(drawn, LLADA2, row, seen) for row in make_ids()])
        entries[f"llada2_moe/{key}"] = np.float32(logits)
    return entries


def main(out: Path) -> None:
    entries: dict[str, np.ndarray] = {"ids": make_ids()}
    with tempfile.TemporaryDirectory() as folder:
        for name in SETTINGS:
            entries |= _make(name, Path(folder) / name)
        entries |= _make_llada(entries, Path(folder) / "llada")
    entries |= _make_llada2()
    np.savez_compressed(out, **entries)
    print(out, out.stat().st_size, "bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FILE)
