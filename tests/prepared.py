"""Files of numbered documents and folders of tokens made of them, for the tests of hdlm_jax/data/prepare.py."""
import json
from pathlib import Path

from hdlm_jax.config import DataConfig, TokenizerConfig
from hdlm_jax.data import prepare

BYTES, EOT = TokenizerConfig(kind="bytes", vocab_size=257), 256


def write_jsonl(path: Path, rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def text(i: int) -> str:
    return f"document {i} says é {'x' * (i % 7)}"


def numbered(path: Path, count: int = 60, start: int = 0) -> str:
    return write_jsonl(path, [{"text": text(i), "q": f"what {i}?"} for i in range(start, start + count)])


def make(folder, files, tokenizer=BYTES, say=lambda _: None, **data) -> prepare.Manifest | None:
    files = (files,) if isinstance(files, str) else tuple(files)
    return prepare.prepare(folder, DataConfig(source="files", files=files, **data), tokenizer, say=say)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != prepare.VERIFIED}


def with_bad(path: Path, good: int, bad: int, start: int = 0) -> str:
    rows: list = [{"text": text(i)} for i in range(start, start + good)]
    for i in range(bad):
        rows.insert(5 + 2 * i, f"no JSON {i}")
    return write_jsonl(path, rows)
