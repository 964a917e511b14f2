"""Open checkpoints: what their config.json says as settings of ours, and the place of each of their tensors.

A family is a `model_type`. Whatever in a config.json would change the network and is not made here is refused by its
name; facts of papers and releases are in docs/models.md, with what was checked on real weights and what was not.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hdlm_jax.common.jsons import read_json
from hdlm_jax.config import ConfigError, DecoderConfig, ModelConfig
from hdlm_jax.models.weight_files import Layout, Tensor, places


class Family(NamedTuple):
    """names: the table of tensors; masked: whether it fills in masks; bias: of q, k and v unless its file says;
    block: tokens of a block, 0 where all see each other; mask: the id, where the file does not say; needs: what its
    file has to say, since the family's own default is not that of the others."""

    names: str = "hub"
    masked: bool = False
    shifted: bool = False
    bias: bool = False
    qk_norm: bool = False
    block: int = 0
    mask: int = -1
    needs: tuple[str, ...] = ()


FAMILIES = {
    "llama": Family(),
    "qwen2": Family(bias=True),
    "qwen3": Family(qk_norm=True),
    "qwen3_moe": Family(qk_norm=True),
    "gemma3_text": Family("gemma", qk_norm=True, needs=("hidden_activation", "sliding_window", "head_dim")),
    "llada": Family("llada", masked=True, mask=126336),
    "Dream": Family(masked=True, shifted=True, bias=True, mask=151666),
    "Fast_dLLM_Qwen": Family(masked=True, shifted=True, bias=True, block=32, mask=151665),
    "a2d-llama": Family(masked=True, needs=("mask_token_id",)),
    "a2d-qwen2": Family(masked=True, bias=True, needs=("mask_token_id",)),
    "a2d-qwen3": Family(masked=True, qk_norm=True, mask=151669),
    "sdar": Family(masked=True, qk_norm=True, block=4, mask=151669),
    "rnd1": Family(masked=True, qk_norm=True, mask=151669),
    "llada2_moe": Family("llada2", masked=True, qk_norm=True, block=32, mask=156895, needs=(
        "partial_rotary_factor", "routed_scaling_factor", "n_group", "topk_group")),
}
_LLADA = {  # its names -> those of all others
    "d_model": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "mlp_hidden_size": "intermediate_size", "activation_type": "hidden_act",
    "include_qkv_bias": "attention_bias", "weight_tying": "tie_word_embeddings",
    "max_sequence_length": "max_position_embeddings"}
_ROWS = ("vocab_size", "embedding_size")
_SAME = {"num_local_experts": "num_experts"}  # newer names
# what would change the network: name -> the values that are made here
_FIXED: dict[str, tuple[Any, ...]] = {
    "alibi": (False,), "attention_layer_norm": (False,), "attn_logit_softcapping": (None,), "block_group_size": (1,),
    "block_type": ("llama",), "decoder_sparse_step": (1,), "include_bias": (False,), "input_emb_norm": (False,),
    "layer_norm_type": ("rms",), "mlp_bias": (False,), "mlp_only_layers": ([], None), "moe_router_enable_expert_bias":
    (True,), "moe_router_enable_routed_scaling": (True,), "moe_router_enable_shared_expert": (True,), "no_rope_layers":
    (None,), "norm_head": (False,), "quantization_config": (None,), "rope": (True,), "rope_interleaved": (False,),
    "scale_logits": (False,), "score_function": ("sigmoid",), "use_bias": (False,), "use_bidirectional_attention":
    (False, None), "use_mrope": (False,), "use_rmsnorm": (True,), "use_sliding_window": (False,),
    "multi_query_attention": (None, False)}
_READ = {
    "attention_bias", "bd_size", "block_size", "embedding_size", "final_logit_softcapping", "first_k_dense_replace",
    "head_dim", "hidden_act", "hidden_activation", "hidden_size", "intermediate_size", "layer_types", "mask_token_id",
    "model_type", "moe_intermediate_size", "moe_shared_expert_intermediate_size", "n_group", "norm_topk_prob",
    "num_attention_heads", "num_experts", "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads",
    "num_shared_experts", "partial_rotary_factor", "qk_norm", "query_pre_attn_scalar", "rms_norm_eps", "rope_theta",
    "rope_local_base_freq", "rope_parameters", "rope_scaling", "rotary_dim", "routed_scaling_factor",
    "sliding_window", "sliding_window_pattern", "_sliding_window_pattern", "tie_word_embeddings", "topk_group",
    "use_qk_norm", "use_qkv_bias", "vocab_size"}
_NO_CHANGE = re.compile(
    r"_|architectures$|alibi_bias_max$|attention_layer_norm_with_affine$|attn_implementation$|auto_map$|bias_for_layer_norm$"
    r"|conplemenrary_mask$|debug$|.*dropout$|dtype$|ep_size$|flash_att|fuse_cross_entropy$|id2label$|init|is_|label2id$"
    r"|layer_norm_with_affine$|max_(position_embeddings|sequence_length|window_layers)$|micro_forward$|mlp_ratio$"
    r"|name_or_path$|num_nextn|output_(attentions|hidden|router)|pad_token|precision$|pretraining_tp$|problem_type$"
    r"|return_dict|rope_full_precision$|router_(aux|dtype)|skip_checkpoint$|.*_token_id$|tokenizer_class$|torch"
    r"|transformers|unsloth|use_(cache|deepep|return_dict)$|.*loss")


class Found(NamedTuple):
    """What a checkpoint is.

    model, decoder: settings of these sections; masked: whether it is a masked diffusion model (mask: the id of its
    mask) or autoregressive; rows: of its tables; table: names of its tensors; path: of the file that says so.
    """

    kind: str
    model: dict[str, Any]
    decoder: dict[str, Any]
    masked: bool
    mask: int
    rows: int
    table: str
    path: str


def is_open(path: str) -> bool:
    """Whether it is a folder of the Hugging Face hub, or a GGUF file."""
    file = os.path.join(path, "config.json")
    return path.endswith(".gguf") or os.path.isfile(file) and "model_type" in read_json(file)


def understood(raw: Mapping[str, Any], where: str, mask_id: int = -1, logits: str = "", context: str = "") -> Found:
    """Settings of a config.json.

    Args:
      raw: what it holds; where: its path, for messages.
      mask_id, logits ("own" or "shifted"), context ("full" or "block"): what a masked model's file may not tell; with
        a mask_id llama, qwen2 and qwen3 are masked models too.

    Raises:
      ConfigError: a family that is not known, a size missing, a key that changes the network and is not made here.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ConfigError(f"{where}: model_type={kind!r}: choose one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    names = _LLADA if kind == "llada" else _SAME
    rows = "vocab_size" if raw.get("embedding_size") is None else "embedding_size"  # LLaDA has both
    config = {names.get(name, name): value for name, value in raw.items() if name not in _ROWS} | {
        "vocab_size": raw.get(rows)}
    _refuse(config, family, where)
    said = _Said(config, where)
    mask = next((i for i in (mask_id, said.number("mask_token_id", -1, least=-1), family.mask) if i >= 0), -1)
    masked = family.masked or mask >= 0
    if not masked and (logits or context):
        raise ConfigError(f"released.{'logits' if logits else 'context'}: {where} is an autoregressive model; if it "
                          "was trained to fill in masks give released.mask_id")
    if not masked and config.get("is_causal") is False:
        raise ConfigError(f"{where}: is_causal=False: give released.mask_id if it was trained to fill in masks; there "
                          "is no other use of a model that sees both sides here")
    model = {"trunk": "decoder", "time_conditioning": False, "head": "flat", "width": said.number("hidden_size"),
             "blocks": said.number("num_hidden_layers"), "heads": said.number("num_attention_heads"),
             "tied": said.switch("tie_word_embeddings", family.names == "gemma")}
    decoder = _details(said, family)
    if said.number("num_experts", 0, least=0):
        decoder |= _experts(said)
    if masked:
        block = said.number("bd_size", said.number("block_size", family.block or 32))
        decoder |= {"shifted": logits == "shifted" or not logits and family.shifted, "block": block,
                    "context": context or ("block" if family.block else "full")}
    return Found(kind, model, decoder, masked, mask, said.number("vocab_size"), family.names, where)


def _refuse(config: Mapping[str, Any], family: Family, where: str) -> None:
    """ConfigError for all that would change the network and is not made here, by name."""
    for name, values in _FIXED.items():
        if name in config and config[name] not in values:
            raise ConfigError(f"{where}: {name}={config[name]!r}: is not made here, only "
                              f"{' or '.join(map(str, values))}")
    strange = [name for name in config if name not in _READ and name not in _FIXED and not _NO_CHANGE.match(name)]
    if strange:
        raise ConfigError(f"{where}: {', '.join(strange)}: not known here, and may change the network; take out what "
                          "does not")
    if lacking := [name for name in family.needs if config.get(name) is None]:
        raise ConfigError(f"{where}: {', '.join(lacking)}: must be given, for model_type={config['model_type']!r}")


class _Said(NamedTuple):
    """What a config.json says, with its types checked; null is what is not given."""

    config: Mapping[str, Any]
    where: str

    def value(self, name: str, default: object = None) -> Any:
        found = self.config.get(name)
        return default if found is None else found

    def number(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self.value(name, default)
        return self._check(name, value, type(value) is int and least <= value < 1 << 31, f"an integer from {least} on")

    def share(self, name: str, default: float | None = None, most: float = 1e12) -> float:
        """A number above 0."""
        value = self.value(name, default)
        good = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= most
        return float(self._check(name, value, good, f"a number above 0 and at most {most:g}"))

    def switch(self, name: str, default: bool) -> bool:
        value = self.value(name, default)
        return self._check(name, value, value in (True, False), "true or false")

    def table(self, name: str) -> _Said:
        """An object in it; {} where there is none."""
        value = self.value(name, {})
        return _Said(self._check(name, value, isinstance(value, dict), "an object"), f"{self.where}: {name}")

    def _check(self, name: str, value: Any, good: bool, rule: str) -> Any:
        if not good:
            raise ConfigError(f"{self.where}: {name}={value!r}: must be {rule}")
        return value


def _details(said: _Said, family: Family) -> dict[str, Any]:
    """Settings of config.decoder but for experts and what a masked model sees."""
    config, heads = said.config, said.number("num_attention_heads")
    acts = {"silu": "silu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu"}
    act = next((config[name] for name in ("hidden_activation", "hidden_act") if config.get(name) is not None), "silu")
    if not isinstance(act, str) or act not in acts:
        raise ConfigError(f"{said.where}: hidden_act={act!r}: choose one of {', '.join(acts)}")
    out = {
        "kv_heads": said.number("num_key_value_heads", 0, least=0) or heads,
        "head_dim": said.number("head_dim", 0, least=0), "inner": said.number("intermediate_size"),
        "activation": acts[act], "eps": said.share("rms_norm_eps", most=0.1),
        "qkv_bias": said.switch("attention_bias", said.switch("use_qkv_bias", family.bias)),
        "qk_norm": family.qk_norm,
        "softcap": said.share("final_logit_softcapping", 1) if config.get("final_logit_softcapping") else 0.0,
        } | _rotary(said)
    return out | _windows(said, family)


def _windows(said: _Said, family: Family) -> dict[str, Any]:
    """Blocks with a window and what else Gemma alone has."""
    kinds, pattern = said.config.get("layer_types"), 1
    if family.names == "gemma":
        pattern = said.number("sliding_window_pattern", said.number("_sliding_window_pattern", 6))
    if kinds is not None:
        known = isinstance(kinds, list) and len(kinds) == said.number("num_hidden_layers")
        if known and family.names == "gemma":
            pattern = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
        if not known or kinds != ["sliding_attention" if (i + 1) % pattern else "full_attention"
                                  for i in range(len(kinds))]:
            raise ConfigError(f"{said.where}: layer_types={kinds!r}: must be full_attention for every block, or for "
                              "every so many of gemma3_text and sliding_attention before it")
    if family.names != "gemma":
        return {}
    return {"window": said.number("sliding_window"), "window_every": pattern, "norm_offset": 1.0, "post_norms": True,
            "scale_embeddings": True, "query_scale": said.share("query_pre_attn_scalar", said.number("head_dim"))}


def _rotary(said: _Said) -> dict[str, Any]:
    """Bases, scaling and share of the rotary embedding, where version 4 of transformers writes them or where 5 does."""
    given = said.table("rope_parameters")
    local = given.table("sliding_attention")
    far = given.table("full_attention") if "full_attention" in given.config else given
    scaling = said.table("rope_scaling") if said.config.get("rope_scaling") is not None else far
    names = {"factor": "factor", "low": "low_freq_factor", "high": "high_freq_factor",
             "length": "original_max_position_embeddings"}
    for part in (far, local, scaling):
        if strange := set(part.config) - {*names.values(), "rope_theta", "rope_type", "type", "partial_rotary_factor",
                                          "full_attention", "sliding_attention"}:
            raise ConfigError(f"{part.where}: {', '.join(sorted(strange))}: is not made here")
    kind = scaling.config.get("rope_type", scaling.config.get("type", "default"))
    if local.config.get("rope_type", "default") != "default" or kind not in ("default", "linear", "llama3"):
        raise ConfigError(f"{said.where}: rope_type={kind!r}: choose one of default, linear, llama3 (linear and llama3 "
                          "not in blocks with a window)")
    needs = {"default": (), "linear": ("factor",), "llama3": tuple(names)}[kind]
    text = " ".join([kind, *(f"{ours}={scaling.share(names[ours])}" for ours in needs)]) if needs else ""
    theta = far if far.config.get("rope_theta") is not None else said
    base = local if local.config.get("rope_theta") is not None else said
    name = "rope_theta" if base is local else "rope_local_base_freq"
    part = far if far.config.get("partial_rotary_factor") is not None else said
    turned = part.share("partial_rotary_factor", 1.0, most=1.0)
    if said.config.get("rotary_dim") is not None:
        dim = said.number("head_dim", said.number("hidden_size") // said.number("num_attention_heads"))
        if said.number("rotary_dim") != int(dim * turned):
            raise ConfigError(f"{said.where}: rotary_dim={said.config['rotary_dim']}: partial_rotary_factor={turned:g} "
                              f"of {dim} units is {int(dim * turned)}")
    return {"theta": theta.share("rope_theta"), "scaling": text, "window_theta": base.share(name, 1e4),
            "rotary_share": turned}


def _experts(said: _Said) -> dict[str, Any]:
    """Settings of the mixture of experts."""
    sigmoid = said.config.get("n_group") is not None
    inner = said.number("moe_intermediate_size")
    shared = said.number("moe_shared_expert_intermediate_size", inner)
    return {"experts": said.number("num_experts"), "experts_per_token": said.number("num_experts_per_tok"),
            "expert_inner": inner, "shared_inner": shared * said.number("num_shared_experts", 0, least=0),
            "dense_blocks": said.number("first_k_dense_replace", 0, least=0),
            "gate": "sigmoid" if sigmoid else "softmax", "expert_groups": said.number("n_group", 1),
            "top_groups": said.number("topk_group", 1), "normalise": said.switch("norm_topk_prob", sigmoid),
            "routed_scale": said.share("routed_scaling_factor", 1.0)}


# name in the file -> (place in our parameters, axes: R rows, D width, Q and K all heads of queries and of keys, H one
# head, F MLP, E experts, X an expert, Y the shared one)
_TOP = {
    "hub": {"model.embed_tokens.weight": ("embedding", "RD"), "model.norm.weight": ("norm.weight", "D"),
            "lm_head.weight": ("head.kernel", "RD")},
    "llada": {"model.transformer.wte.weight": ("embedding", "RD"),
              "model.transformer.ln_f.weight": ("norm.weight", "D"),
              "model.transformer.ff_out.weight": ("head.kernel", "RD")},
    "llada2": {"model.word_embeddings.weight": ("embedding", "RD"), "model.norm.weight": ("norm.weight", "D"),
               "lm_head.weight": ("head.kernel", "RD")}}
_PREFIX = {"hub": "model.layers.{}.", "llada": "model.transformer.blocks.{}.", "llada2": "model.layers.{}."}
_ATTENTION = {
    "hub": {"input_layernorm.weight": ("norm1.weight", "D"), "self_attn.q_proj.weight": ("q.kernel.T", "QD"),
            "self_attn.k_proj.weight": ("k.kernel.T", "KD"), "self_attn.v_proj.weight": ("v.kernel.T", "KD"),
            "self_attn.q_proj.bias": ("q.bias", "Q"), "self_attn.k_proj.bias": ("k.bias", "K"),
            "self_attn.v_proj.bias": ("v.bias", "K"), "self_attn.q_norm.weight": ("q_norm.weight", "H"),
            "self_attn.k_norm.weight": ("k_norm.weight", "H"), "self_attn.o_proj.weight": ("out.kernel.T", "DQ"),
            "post_attention_layernorm.weight": ("norm2.weight", "D")},
    "llada": {"attn_norm.weight": ("norm1.weight", "D"), "q_proj.weight": ("q.kernel.T", "QD"),
              "k_proj.weight": ("k.kernel.T", "KD"), "v_proj.weight": ("v.kernel.T", "KD"),
              "q_proj.bias": ("q.bias", "Q"), "k_proj.bias": ("k.bias", "K"), "v_proj.bias": ("v.bias", "K"),
              "attn_out.weight": ("out.kernel.T", "DQ"), "ff_norm.weight": ("norm2.weight", "D")},
    "llada2": {"input_layernorm.weight": ("norm1.weight", "D"), "attention.query.weight": ("q.kernel.T", "QD"),
               "attention.key.weight": ("k.kernel.T", "KD"), "attention.value.weight": ("v.kernel.T", "KD"),
               "attention.query.bias": ("q.bias", "Q"), "attention.key.bias": ("k.bias", "K"),
               "attention.value.bias": ("v.bias", "K"), "attention.query_layernorm.weight": ("q_norm.weight", "H"),
               "attention.key_layernorm.weight": ("k_norm.weight", "H"),
               "attention.dense.weight": ("out.kernel.T", "DQ"),
               "post_attention_layernorm.weight": ("norm2.weight", "D")}}
_GEMMA = {"post_attention_layernorm.weight": ("post1.weight", "D"),
          "pre_feedforward_layernorm.weight": ("norm2.weight", "D"),
          "post_feedforward_layernorm.weight": ("post2.weight", "D")}
_MLP = {"hub": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), "llada": ("ff_proj", "up_proj", "ff_out"),
        "llada2": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}


def layout_of(found: Found) -> Layout:
    """Places of all tensors, by their names in the file; fused ones as `unfused` splits them."""
    m, d = ModelConfig(**found.model), DecoderConfig(**found.decoder)
    kv, dim, inner = d.sizes(m)
    axes = {"R": found.rows, "D": m.width, "Q": m.heads * dim, "K": kv * dim, "H": dim, "F": inner, "E": d.experts,
            "X": d.expert_inner, "Y": d.shared_inner}
    table = "hub" if found.table == "gemma" else found.table
    top = dict(_TOP[table])
    if m.tied:
        top.pop(next(name for name, (path, _) in top.items() if path == "head.kernel"))
    attention = _ATTENTION[table] | (_GEMMA if found.table == "gemma" else {})
    attention = {name: place for name, place in attention.items()
                 if (d.qkv_bias or not name.endswith(".bias")) and (d.qk_norm or place[1] != "H")}
    out = places(top, axes)
    for i in range(m.blocks):
        experts = bool(d.experts) and i >= d.dense_blocks
        stack, first = ("dense", 0) if d.experts and not experts else ("stack", d.dense_blocks if d.experts else 0)
        block = attention | (_expert_names(table, d) if experts else _mlp_names(_MLP[table], "mlp", "F"))
        here = {name: (f"{stack}.{path}", axis) for name, (path, axis) in block.items()}
        length = d.dense_blocks if stack == "dense" else m.blocks - first
        out |= places(here, axes, _PREFIX[table].format(i), ((i - first, length),))
        if experts:
            out |= _each_expert(_PREFIX[table].format(i), axes, d.experts, (i - first, length))
    return out


def _mlp_names(names: tuple[str, str, str], where: str, inner: str) -> dict[str, tuple[str, str]]:
    gate, up, down = names
    return {f"{gate}.weight": (f"{where}.gate.kernel.T", f"{inner}D"),
            f"{up}.weight": (f"{where}.up.kernel.T", f"{inner}D"),
            f"{down}.weight": (f"{where}.down.kernel.T", f"D{inner}")}


def _expert_names(table: str, d: DecoderConfig) -> dict[str, tuple[str, str]]:
    """Tensors of a block with experts that are not an expert's own."""
    out = {"mlp.gate.weight": ("moe.router.kernel.T", "ED")}
    if d.gate == "sigmoid":
        out["mlp.gate.expert_bias"] = ("moe.router.bias", "E")
    if d.shared_inner:
        shared = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj")
        out |= _mlp_names(shared, "moe.shared", "Y")
    return out


def _each_expert(prefix: str, axes: Mapping[str, int], count: int, block: tuple[int, int]) -> Layout:
    out: Layout = {}
    for e in range(count):
        names = (f"mlp.experts.{e}.gate_proj", f"mlp.experts.{e}.up_proj", f"mlp.experts.{e}.down_proj")
        own = _mlp_names(names, "stack.moe.experts", "X")
        out |= places(own, axes, prefix, (block, (e, count)))
    return out


_PARTS = ("query", "key", "value")
_FUSED = re.compile(r"(.*attention\.)query_key_value(\.weight|\.bias)$")


def unfused(tensors: Mapping[str, Tensor], found: Found) -> dict[str, Tensor]:
    """The tensors, with query_key_value (q, then k, then v) as three."""
    d = DecoderConfig(**found.decoder)
    kv, dim, _ = d.sizes(ModelConfig(**found.model))
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        fused, first = _FUSED.match(name), 0
        if fused is None:
            out[name] = tensor
            continue
        for part, rows in zip(_PARTS, (found.model["heads"] * dim, kv * dim, kv * dim), strict=True):
            read = functools.partial(lambda read, a, b: read()[a:b], tensor.read, first, first + rows)
            out[f"{fused[1]}{part}{fused[2]}"] = Tensor((rows, *tensor.shape[1:]), read, tensor.dtype)
            first += rows
    return out


def fused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other way round."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = re.match(r"(.*attention\.)(query|key|value)(\.weight|\.bias)$", name)
        if found is None:
            out[name] = tensor
        elif found[2] == "query":
            three = [tensors[f"{found[1]}{part}{found[3]}"] for part in _PARTS]
            read = functools.partial(lambda three: np.concatenate([part.read() for part in three]), three)
            rows = sum(part.shape[0] for part in three)
            out[f"{found[1]}query_key_value{found[3]}"] = Tensor((rows, *tensor.shape[1:]), read, tensor.dtype)
    return out
