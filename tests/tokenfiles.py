"""Small files like those of open models' tokenizers, for the tests of them."""
import json
from pathlib import Path

CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
          "+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
ENDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "Ġ Ġ", "e r"]


def letters() -> list[str]:
    """The 256 characters of a byte-level vocabulary, by byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


def byte_level(merges=tuple(MERGES), **changes) -> dict:
    """A tokenizer.json as SmolLM2's: three special tokens, 256 bytes (id 3 + byte), merges, then <think>."""
    words = [*ENDS, *letters(), *(merge.replace(" ", "") for merge in merges)]
    added = [{"id": i, "content": name, "special": True, "normalized": False} for i, name in enumerate(ENDS)]
    return {"version": "1.0", "truncation": {"max_length": 4}, "padding": None, "normalizer": None,
            "added_tokens": [*added, {"id": len(words), "content": "<think>", "special": False, "normalized": False}],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "post_processor": None, "decoder": None,
            "model": {"type": "BPE", "dropout": 0.5, "vocab": {word: i for i, word in enumerate(words)},
                      "merges": list(merges)}} | changes


def folder(path: Path, spec: dict | None = None, template: str = CHATML, **config) -> Path:
    """A folder of the hub with such a tokenizer.json."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(json.dumps(spec or byte_level()))
    told = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(told | config))
    return path


# id: token, type and score of a SentencePiece vocabulary; all 256 bytes are behind
PIECES = [("<pad>", 3, 0.), ("<eos>", 3, 0.), ("<bos>", 3, 0.), ("<unk>", 2, 0.), ("\u2581\u2581", 4, -1000.),
          ("\u2581t", 1, -1.), ("he", 1, -2.), ("\u2581the", 1, -3.), ("ab", 1, -4.), ("bc", 1, -5.), ("abc", 1, -6.),
          *((letter, 1, -100. - i) for i, letter in enumerate("\u2581theabcr."))]


def gguf_file(path: Path, tokens, types, **fields) -> Path:
    """A GGUF file with no tensors and this tokenizer; fields: others of tokenizer.ggml, a chat_template."""
    import gguf
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", list(tokens))
    writer.add_array("tokenizer.ggml.token_type", list(types))
    for name, value in fields.items():
        name = "tokenizer.chat_template" if name == "chat_template" else f"tokenizer.ggml.{name}"
        add = writer.add_array if isinstance(value, list) else writer.add_string if isinstance(value, str) else (
            writer.add_uint32)
        add(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_level_gguf(path: Path, pre: str = "smollm", **fields) -> Path:
    spec = byte_level()
    words = [*spec["model"]["vocab"], "<think>"]
    types = [3 if word in ENDS else 4 if word == "<think>" else 1 for word in words]
    told = {"model": "gpt2", "pre": pre, "merges": MERGES, "eos_token_id": 2, "bos_token_id": 1,
            "chat_template": CHATML}
    return gguf_file(path, words, types, **(told | fields))


def sentencepiece_gguf(path: Path, **fields) -> Path:
    pieces = [*PIECES, *((f"<0x{byte:02X}>", 6, 0.) for byte in range(256))]
    tokens, types, scores = (list(column) for column in zip(*pieces, strict=True))
    told = {"model": "llama", "pre": "default", "scores": scores, "eos_token_id": 1, "bos_token_id": 2,
            "unknown_token_id": 3}
    return gguf_file(path, tokens, types, **(told | fields))
