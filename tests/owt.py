"""A small OpenWebText in the forms the real one is distributed in."""
import functools
import hashlib
import io
import json
import lzma
import os
import random
import tarfile
from pathlib import Path

LAYOUTS = ("tar.xz", "tars", "parquet", "jsonl.xz")


@functools.cache
def openwebtext_documents(count: int = 60) -> list[str]:
    """`count` documents (at most 1000) of OpenWebText from $HDLM_DATA where they are, else of made-up words."""
    data = os.environ.get("HDLM_DATA") or Path(__file__).parent.parent.parent / "shared" / "data"
    path = Path(data) / "openwebtext" / "owt_1000docs.jsonl.xz"
    if path.is_file():
        with lzma.open(path) as file:
            return [json.loads(line)["text"] for line, _ in zip(file, range(count), strict=False)]
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlé", k=draw.randint(1, 9))) for _ in range(2000)]
    return [" ".join(draw.choices(words, k=draw.randint(5, 800))) + f".\n\nNo. {i}" for i in range(count)]


def make_openwebtext(folder: Path, documents: list[str], subsets: int = 2, members: int = 3,
                     outer: str = "tar.xz") -> list[Path]:
    """Writes `documents`, in order, as OpenWebText in `folder`; returns the files to read, in order.

    outer: 'tar.xz', the one openwebtext.tar.xz, whose members openwebtext/urlsf_subset00-1_data.xz (`members` of
      each of the `subsets`) are xz-compressed tars of text files; 'tars', one urlsf_subset00.tar of such members
      a subset; 'parquet' and 'jsonl.xz', one file a subset.
    """
    folder.mkdir(parents=True, exist_ok=True)
    groups = _cut(documents, subsets)
    names = [f"urlsf_subset{subset:02}" for subset in range(subsets)]
    inner = [{f"openwebtext/{name}-{member + 1}_data.xz": lzma.compress(_tar(_texts(part)), preset=1)
              for member, part in enumerate(_cut(group, members))} for name, group in zip(names, groups, strict=True)]
    if outer == "tar.xz":
        everything = {name: raw for files in inner for name, raw in files.items()}
        files = {"openwebtext.tar.xz": lzma.compress(_tar(everything), preset=1)}
    elif outer == "tars":
        files = {f"{name}.tar": _tar(parts) for name, parts in zip(names, inner, strict=True)}
    elif outer == "jsonl.xz":
        lines = ["".join(json.dumps({"text": text}) + "\n" for text in group) for group in groups]
        files = {f"{name}.jsonl.xz": lzma.compress(part.encode(), preset=1)
                 for name, part in zip(names, lines, strict=True)}
    elif outer == "parquet":
        files = {f"train-{i:05}-of-{subsets:05}.parquet": _parquet(group) for i, group in enumerate(groups)}
    else:
        raise ValueError(f"outer is {outer!r}; choices: {', '.join(LAYOUTS)}")
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    return [folder / name for name in files]


def _cut(items: list[str], parts: int) -> list[list[str]]:
    size = -(-len(items) // parts)
    return [items[i * size:(i + 1) * size] for i in range(parts)]


def _texts(documents: list[str]) -> dict[str, bytes]:
    raws = [text.encode() for text in documents]
    return {f"{i + 1:07}-{hashlib.md5(raw).hexdigest()}.txt": raw for i, raw in enumerate(raws)}


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for folder in sorted({name.rpartition("/")[0] for name in files} - {""}):
            header = tarfile.TarInfo(folder)
            header.type = tarfile.DIRTYPE
            archive.addfile(header)
        for name, raw in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(raw)
            archive.addfile(header, io.BytesIO(raw))
    return buffer.getvalue()


def _parquet(documents: list[str]) -> bytes:
    import pyarrow.parquet
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), buffer, row_group_size=7)
    return buffer.getvalue()
