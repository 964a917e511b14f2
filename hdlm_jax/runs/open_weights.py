"""Open checkpoints in and out: --mode=import of a hub folder or GGUF file, and --mode=export with released.layout=hub.

    python -m hdlm_jax.main --mode=import --config.released.weights=FOLDER --workdir=runs/llada

Tensors go one by one from their files into one file of ours, and back: never more than one of them is in memory
(docs/models.md).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import shutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

import hdlm_jax
from hdlm_jax.common import jsons, processes
from hdlm_jax.common.console import say
from hdlm_jax.common.jsons import reuse, sha256_of, write_json
from hdlm_jax.config import Config, ConfigError, DecoderConfig
from hdlm_jax.data import hub_tokenizer
from hdlm_jax.data.tokenizers import Tokenizer
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.models import families
from hdlm_jax.models.decoder import merged
from hdlm_jax.models.families import Found
from hdlm_jax.models.gguf_files import open_gguf
from hdlm_jax.models.heads import NEVER
from hdlm_jax.models.weight_files import Layout, Place, Tensor, check, hub_files, hub_sha256
from hdlm_jax.training import param_file
from hdlm_jax.training.loading import Run, check_writable, load_run, saved_config
from hdlm_jax.training.param_file import PARAMS
from hdlm_jax.training.state import build

REST = "rest.safetensors"  # in params/: rows of the tables that no id of ours has
_TABLES = ("embedding", "head.kernel")  # have a row for every id
_HEAD = "lm_head.weight"  # some files hold it beside the table it is tied to
_SHARD = 5_000_000_000  # bytes of a file of an export


def import_open(config: Config, workdir: str) -> None:
    """Writes an open checkpoint as a workdir for evaluate, generate, export, `hdlm_jax.load` and train.init_from.

    It is laid out as an export is (config.json, params/, hierarchy.npz, tokenizer/), with source.json, what its own
    config.json said, beside it. config.json comes last: without it nothing is there, and the same command starts over.

    Raises:
      ConfigError: a family or key that is not known, a tokenizer that does not fit. ValueError: tensors missing, too
        many or of other shapes.
    """
    check_writable(workdir)
    processes.on_main_process(lambda: _import(config, workdir))


def made_from(config: Config, sha256: str, beside: Mapping[str, Any]) -> dict[str, Any]:
    """What an import of weights of this sha256 depends on; beside: what a folder says beside them."""
    r, m = config.released, config.model
    return {"weights": sha256, "released": [r.mask_id, r.logits, r.context], "tokenizer": config.tokenizer.file,
            "model": [m.seq_len, m.dtype, m.param_dtype]} | dict(beside)


def is_there(config: Config, workdir: str, sha256: str, beside: Mapping[str, Any] = MappingProxyType({})) -> bool:
    """Whether workdir holds the import of weights of this sha256 with these settings; ConfigError where it holds
    something else."""
    marker = os.path.join(workdir, "config.json")
    if reuse(marker, {"made_from": made_from(config, sha256, beside)}) is not None:
        return True
    if os.path.exists(marker) or os.path.isdir(os.path.join(workdir, "checkpoints")):
        raise ConfigError(f"workdir={workdir!r}: holds a run or another import; give another --workdir")
    return False


def _import(config: Config, workdir: str) -> None:
    r, path = config.released, config.released.weights.rstrip("/")
    gguf = path.endswith(".gguf")
    raw, tensors = open_gguf(path) if gguf else _folder(path)
    found = families.understood(raw, path, r.mask_id, r.logits, r.context)
    tokenizer = hub_tokenizer.make(config.tokenizer.file or path)
    run = settings(config, found, tokenizer, os.path.join(os.path.abspath(workdir), "tokenizer"))
    layout = families.layout_of(found)
    tensors = _checked(tensors, layout, found, path)
    raw = dict(raw) | ({"mask_token_id": found.mask} if found.masked else {})
    sha256, beside = (sha256_of(path), {}) if gguf else (
        hub_sha256(path), {"source": raw, "words": tokenizer.fingerprint})
    if is_there(config, workdir, sha256, beside):
        return say(f"import: reusing {workdir}")
    hierarchy = Hierarchy.from_parents([], vocab_size=tokenizer.vocab_size, special=(tokenizer.eot,))
    aside = os.path.join(workdir, "import.tmp")
    shutil.rmtree(aside, ignore_errors=True)  # of an import that was interrupted
    os.makedirs(os.path.join(aside, "params"))
    tokenizer.save(os.path.join(aside, "tokenizer"))
    hierarchy.save(os.path.join(aside, "hierarchy.npz"), tokenizer.fingerprint)
    start = found.mask if found.masked else _start(tokenizer)
    count = _write(os.path.join(aside, "params"), run, hierarchy, tensors, layout, start, found)
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    write_json(os.path.join(aside, "source.json"), {"config": raw, "dtypes": dtypes})
    jsons.move_into(aside, workdir)
    fingerprints = {"tokenizer": tokenizer.fingerprint, "hierarchy": hierarchy.fingerprint, "data": ""}
    write_json(os.path.join(workdir, "config.json"), {
        "step": 0, "ema": False, "fingerprints": fingerprints, "config": run.to_save(),
        "hdlm_jax": hdlm_jax.__version__, "made_from": made_from(config, sha256, beside)})
    say(f"import: {count:,} parameters of {path}, in {workdir}")
    for name, value in _table(found, run, tokenizer, start):
        say(f"  {name:<11} {value}")


def _folder(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, tensors by name) of a hub folder; they are mapped, and read where they are used."""
    tensors: dict[str, Tensor] = {}
    for file in hub_files(path):
        for name, array in param_file.open_params(file).items():
            if name in tensors:
                raise ValueError(f"{file}: tensor {name!r} is in another shard too")
            if not name.endswith("rotary_emb.inv_freq"):
                tensors[name] = Tensor(array.shape, functools.partial(np.asarray, array), param_file.NAMES[array.dtype])
    return jsons.read_json(os.path.join(path, "config.json")), tensors


def _checked(tensors: dict[str, Tensor], layout: Layout, found: Found, path: str) -> dict[str, Tensor]:
    """The tensors, fused ones split, once all names and shapes are right."""
    tensors = families.unfused(tensors, found)
    tied = tensors.pop(_HEAD) if found.model["tied"] and _HEAD in tensors else None
    check({name: tensor.shape for name, tensor in tensors.items()}, layout, f"{path}: ")
    table = next(name for name, place in layout.items() if place.path == ("embedding",))
    if tied is not None and not _equal(tied.read(), tensors[table].read()):
        raise ValueError(f"{path}: {_HEAD} is not {table}, though tie_word_embeddings says so")
    return tensors


def _equal(a: np.ndarray, b: np.ndarray, rows: int = 1024) -> bool:
    """Of two large arrays, some rows at a time."""
    return a.shape == b.shape and all(np.array_equal(a[i : i + rows], b[i : i + rows]) for i in range(0, len(a), rows))


def settings(config: Config, found: Found, tokenizer: Tokenizer, file: str) -> Config:
    """The config of the run that an import makes: of what is given the sizes of rows, dtypes and how to use it.

    file: where its tokenizer will be, for texts that are prepared later.

    Raises:
      ConfigError: broken rules, a tokenizer with ids that the tables have no row for.
    """
    v = tokenizer.vocab_size
    if config.decoder != DecoderConfig():
        raise ConfigError("decoder: --mode=import takes these settings from the model's own files; what they may not "
                          "tell is released.mask_id, released.logits and released.context")
    if v > found.rows:
        raise ConfigError(f"tokenizer.file: {v:,} ids, the tables of {found.path} have {found.rows:,} rows; give the "
                          "tokenizer of this model")
    if found.masked and found.mask >= found.rows:
        raise ConfigError(f"released.mask_id={found.mask}: the tables of {found.path} have {found.rows:,} rows")
    masked = found.masked
    diffusion = dataclasses.replace(config.diffusion, process="hierarchical" if masked else "autoregressive",
                                    weighting="clip" if masked else "constant")
    run = dataclasses.replace(
        config, diffusion=diffusion, model=dataclasses.replace(config.model, **found.model),
        decoder=DecoderConfig(**found.decoder), hierarchy=dataclasses.replace(config.hierarchy, clusters=(1,)),
        tokenizer=dataclasses.replace(config.tokenizer, kind="hub", vocab_size=v, file=file, sha256="",
                                      pattern=""))
    run.check()
    return run


def _start(tokenizer: Tokenizer) -> int:
    """The id whose embedding the start of a text gets: the one that stood before texts in training, a bos that is not
    the beginning of a chat's turn, else the end of the text before."""
    bos = tokenizer.special.get("<bos>", tokenizer.special.get("<|begin_of_text|>", tokenizer.special.get("<s>")))
    return tokenizer.eot if bos is None else bos


def _write(folder: str, run: Config, hierarchy: Hierarchy, tensors: Mapping[str, Tensor], layout: Layout, start: int,
           found: Found) -> int:
    """Writes parameters and the rows of tables that no id of ours has, tensor by tensor; how many parameters."""
    network, _ = build(run, hierarchy)
    shapes = jax.eval_shape(lambda: network.init_params(jax.random.key(0), run.model.seq_len))
    arrays = {_name(keys): (leaf.shape, np.dtype(leaf.dtype)) for keys, leaf in jax.tree.leaves_with_path(shapes)}
    v, never = hierarchy.vocab_size, np.zeros(arrays["head.bias"][0], np.float32)
    never[v:] = NEVER
    if found.masked and found.mask < v:
        never[found.mask] = NEVER
    rest = {".".join(place.path): ((found.rows - v, *place.shape[1:]), np.dtype(np.float32))
            for place in layout.values() if ".".join(place.path) in _TABLES}
    kept = os.path.join(folder, REST)
    with param_file.writing(os.path.join(folder, PARAMS), arrays) as out, param_file.writing(kept, rest) as others:
        out.put("head.bias", never)
        for name, place in layout.items():
            array, ours = tensors[name].read(), ".".join(place.path)
            if ours in _TABLES:
                out.put(ours, array[:v])
                others.put(ours, array[v:])
                if ours == "embedding":
                    out.put("states", array[start][None])
            else:
                out.put(ours, array.T if place.turned else array, place.at)
    return sum(int(np.prod(shape)) for shape, _ in arrays.values())


def _name(keys: tuple[Any, ...]) -> str:
    return ".".join(str(key.key) for key in keys)


def _table(found: Found, run: Config, tokenizer: Tokenizer, start: int) -> list[tuple[str, str]]:
    """What was understood, for people."""
    d, m = run.decoder, run.model
    kv, dim, inner = d.sizes(m)
    name = lambda i: tokenizer.token_bytes(i).decode(errors="replace") if i < tokenizer.vocab_size else "-"  # noqa: E731
    context = {"full": "all tokens", "block": f"its block of {d.block} and those before"}[d.context]
    sees = context if found.masked else "those before"
    rows = [("family", f"{found.kind}, {'masked diffusion' if found.masked else 'autoregressive'}"),
            ("size", f"width {m.width}, {m.blocks} blocks, {m.heads} heads of {dim} ({kv} of keys), MLP {inner}"
             + (f", {d.experts} experts of {d.expert_inner}, {d.experts_per_token} a token" if d.experts else "")),
            ("attention", f"a token sees {sees}" + (f"; {d.window} back in most blocks" if d.window else "")
             + (", norms of q and k" if d.qk_norm else "") + (", biases of q, k, v" if d.qkv_bias else "")),
            ("rotary", f"base {d.theta:g}" + (f", {d.scaling}" if d.scaling else "")
             + (f", {d.rotary_share:g} of each head" if d.rotary_share < 1 else "")),
            ("norms", f"eps {d.eps:g}"), ("head", "tied to the embedding" if m.tied else "its own"),
            ("tokens", f"{tokenizer.vocab_size:,} of {found.rows:,} rows; end of text {tokenizer.eot} "
             f"{name(tokenizer.eot)!r}")]
    if found.masked:
        where = "one place before their own" if d.shifted else "at their own place"
        return [*rows, ("mask", f"{found.mask} {name(found.mask)!r}"), ("logits", f"{where}")]
    return [*rows, ("start", f"{start} {name(start)!r}")]


def source_of(workdir: str, trained: Config) -> dict[str, Any]:
    """source.json of the import that a run is or was started from, at any distance; ConfigError where there is none."""
    folder = workdir
    while (found := jsons.read_json(os.path.join(folder, "source.json"), optional=True)) is None:
        if not trained.train.init_from:
            raise ConfigError(f"released.layout='hub': {workdir} is neither an import of an open checkpoint nor "
                              "trained from one (train.init_from)")
        folder = trained.train.init_from
        trained = saved_config(folder)
    return found | {"folder": folder}


def export_hub(config: Config, workdir: str) -> str:
    """Writes <workdir>/hub, the run in the layout of the open checkpoint it came from; gives back its path.

    An autoregressive model that has become a masked one gets a mask id: released.mask_id, else the first that is no
    token's. The vector of a start symbol goes to the id it came from. The folder is made aside and renamed.

    Raises:
      ConfigError: no such checkpoint, a run with clusters or another process, of which that layout knows nothing, a
        mask id that is a text's token or far behind the tables, or many processes.
    """
    trained = saved_config(workdir)
    source = source_of(workdir, trained)
    if max(trained.hierarchy.clusters, default=1) > 1:
        raise ConfigError(f"released.layout='hub': {workdir} has clusters {trained.hierarchy.clusters}; open layouts "
                          "know tokens and a mask alone")
    if trained.model.head != "flat":
        raise ConfigError(f"released.layout='hub': {workdir} has model.head={trained.model.head!r}; open layouts have "
                          "a logit for every token, 'flat'")
    if trained.diffusion.process not in ("hierarchical", "autoregressive"):
        raise ConfigError(f"released.layout='hub': {workdir} has diffusion.process={trained.diffusion.process!r}; open "
                          "layouts know masked and autoregressive models alone")
    if jax.process_count() > 1:
        raise ConfigError("released.layout='hub': one process writes it; start without --distributed")
    run = load_run(config, workdir, config.evaluate.checkpoint)
    raw, tensors = _as_source(run, source, config.released.mask_id)
    folder = os.path.abspath(os.path.join(workdir, "hub"))
    aside, old = f"{folder}.tmp", f"{folder}.old"
    shutil.rmtree(aside, ignore_errors=True)  # of an export that was interrupted
    _write_hub(aside, raw, tensors, run.tokenizer)
    shutil.rmtree(old, ignore_errors=True)
    if os.path.exists(folder):
        os.rename(folder, old)
    os.rename(aside, folder)
    shutil.rmtree(old, ignore_errors=True)
    d = run.config.decoder
    use = ("autoregressive" if run.process.exact else f"mask {raw['mask_token_id']}, logits "
           f"{'shifted' if d.shifted else 'own'}, context {d.context}")
    say(f"export: {len(tensors)} tensors as a hub folder, {raw['model_type']}, {use}, in {folder}")
    return folder


def _place(run: Run, found: Found, mask_id: int) -> int:
    """The id whose row gets the vector of the mask, or of the start of a text."""
    if run.process.exact:
        return _start(run.tokenizer)
    v, special = run.hierarchy.vocab_size, run.tokenizer.special.values()
    place = next(i for i in (mask_id, found.mask, v) if i >= 0)
    if place != found.mask and place < v and place not in special:
        raise ConfigError(f"released.mask_id={place}: is a token of texts, {run.tokenizer.token_bytes(place)!r}; give "
                          f"a special one, or {v} or more")
    if place > max(found.rows, v):
        raise ConfigError(f"released.mask_id={place}: the tables have {found.rows:,} rows; give at most {found.rows}")
    return place


def _as_source(run: Run, source: Mapping[str, Any], mask_id: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, tensors by their names there) of a run."""
    raw, v = dict(source["config"]), run.hierarchy.vocab_size
    found = families.understood(raw, source["folder"])
    rest = param_file.open_params(os.path.join(source["folder"], "params", REST))
    place = _place(run, found, mask_id)
    rows = max(found.rows, place + 1)
    raw["vocab_size" if raw.get("embedding_size") is None else "embedding_size"] = rows
    if not run.process.exact:
        raw["mask_token_id"] = place
        if run.config.decoder.context == "block" and found.decoder.get("block") != run.config.decoder.block:
            raw["block_size"] = run.config.decoder.block
    params = merged(run.params)
    leaves = {_name(keys): leaf for keys, leaf in jax.tree.leaves_with_path(params)}

    def part(ours: str, where: Place) -> np.ndarray:
        if ours not in _TABLES:
            array = np.asarray(leaves[ours][where.at], np.float32)
            return array.T if where.turned else array
        whole = np.zeros((rows, leaves[ours].shape[1]), np.float32)
        whole[:v], whole[v : found.rows] = leaves[ours][:v], rest[ours]
        if ours == "embedding":
            whole[place] = leaves["states"][0]
        return whole

    whole = run.config.model.param_dtype == "float32"
    tensors = {}
    for name, where in families.layout_of(found).items():
        ours = ".".join(where.path)
        shape = (rows, *where.shape[1:]) if ours in _TABLES else where.shape
        kind = source["dtypes"].get(name, "F32") if whole or len(shape) < 2 else "BF16"
        tensors[name] = Tensor(shape, functools.partial(part, ours, where), kind)
    return raw, families.fused(tensors)


def _write_hub(folder: str, raw: Mapping[str, Any], tensors: Mapping[str, Tensor], tokenizer: Tokenizer) -> None:
    """config.json, the tensors in files of at most _SHARD bytes, and the tokenizer."""
    os.makedirs(folder, exist_ok=True)
    files: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        bytes_here = math.prod(tensor.shape) * param_file.TYPES[tensor.dtype].itemsize
        if files[-1] and size + bytes_here > _SHARD:
            files.append({})
            size = 0
        files[-1][name], size = tensor, size + bytes_here
    names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    names = names if len(files) > 1 else ["model.safetensors"]
    for file, held in zip(names, files, strict=True):
        arrays = {name: (tensor.shape, param_file.TYPES[tensor.dtype]) for name, tensor in held.items()}
        with param_file.writing(os.path.join(folder, file), arrays) as out:
            for name, tensor in held.items():
                out.put(name, tensor.read())
    if len(files) > 1:
        places = {name: file for file, held in zip(names, files, strict=True) for name in held}
        write_json(os.path.join(folder, "model.safetensors.index.json"), {"metadata": {}, "weight_map": places})
    write_json(os.path.join(folder, "config.json"), dict(raw))
    tokenizer.save_hub(folder)
