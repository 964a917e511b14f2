"""GGUF files (llama.cpp's): what their metadata says as a config.json would, tensors under the hub's names.

Through the `gguf` package, which dequantises with numpy alone. llama.cpp keeps the rows of q and k of architecture
llama in another order (neighbouring units are turned together), and adds Gemma's 1 to the norms; both are undone.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np

from hdlm_jax.common.extras import package
from hdlm_jax.config import ConfigError
from hdlm_jax.models.weight_files import Tensor

_KINDS = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}  # architecture -> model_type
_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight"}
_BLOCK = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
          "attn_v": "self_attn.v_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
          "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
          "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_GEMMA = {"post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
          "post_ffw_norm": "post_feedforward_layernorm"}


def open_gguf(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(what a config.json would say, tensors by the hub's names) of a file; no weight is read yet.

    Raises:
      ConfigError: gguf is not installed, no such file, another architecture, or a tensor that is not known.
    """
    library = package("gguf", "hub", path)
    try:
        reader = library.GGUFReader(path)
    except Exception as error:  # whatever the reader meets in a damaged file
        raise ConfigError(f"{path}: no GGUF file, or damaged ({type(error).__name__}: {error})") from None

    def said(name: str, default: Any = None) -> Any:
        field = reader.get_field(name)
        return default if field is None else field.contents()

    kind = said("general.architecture")
    if kind not in _KINDS:
        raise ConfigError(f"{path}: general.architecture={kind!r}: choose one of {', '.join(_KINDS)}")
    names = {_renamed(tensor.name, kind, path): tensor for tensor in reader.tensors}
    if "model.embed_tokens.weight" not in names:
        raise ConfigError(f"{path}: no tensor 'token_embd.weight'; it holds no model, or a part of one")
    config = _config(lambda name, default=None: said(f"{kind}.{name}", default), kind)
    config |= {"vocab_size": int(names["model.embed_tokens.weight"].shape[1]),
               "tie_word_embeddings": "lm_head.weight" not in names}
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    turn = re.compile(r".*self_attn\.([qk])_proj\.").match if kind == "llama" else re.compile("(?!)").match

    def read(name: str) -> np.ndarray:
        tensor = names[name]
        try:
            array = library.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ConfigError(f"{path}: tensor {tensor.name!r} cannot be read ({error})") from None
        found = turn(name)
        if found is None:
            return array - 1 if kind == "gemma3" and "norm." in name else array
        halves = array.reshape(heads[found[1]], -1, 2, *array.shape[1:])
        return halves.swapaxes(1, 2).reshape(array.shape)

    return config, {name: Tensor(tuple(int(n) for n in tensor.shape[::-1]), functools.partial(read, name))
                    for name, tensor in names.items()}


def _renamed(name: str, kind: str, path: str) -> str:
    if name in _TOP:
        return _TOP[name]
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    table = _BLOCK | (_GEMMA if kind == "gemma3" else {})
    if found is None or found[2] not in table:
        raise ConfigError(f"{path}: tensor {name!r} is not known of architecture {kind}; import the model's folder "
                          "with .safetensors")
    return f"model.layers.{found[1]}.{table[found[2]]}.{found[3]}"


def _config(said: Any, kind: str) -> dict[str, Any]:
    heads = said("attention.head_count")
    config = {"model_type": _KINDS[kind], "hidden_size": said("embedding_length"), "num_attention_heads": heads,
              "num_hidden_layers": said("block_count"), "intermediate_size": said("feed_forward_length"),
              "num_key_value_heads": said("attention.head_count_kv", heads),
              "rms_norm_eps": float(f"{said('attention.layer_norm_rms_epsilon', 0):.6g}"),  # it was a float32
              "rope_theta": said("rope.freq_base", 1e4), "attention_bias": kind == "qwen2"}
    if (dim := said("attention.key_length", said("rope.dimension_count"))) is not None:
        config["head_dim"] = dim
    if (scaling := said("rope.scaling.type")) not in (None, "none"):
        config["rope_scaling"] = {"rope_type": scaling, "factor": said("rope.scaling.factor")}
    if kind == "gemma3":
        config |= {"hidden_activation": "gelu_pytorch_tanh", "sliding_window": said("attention.sliding_window"),
                   "query_pre_attn_scalar": dim}
    return config
