"""Every choice and its rules: what resolves, what is refused, and in what words."""
import dataclasses
import importlib.util
import inspect
import json
import os
import re

import pytest
from ml_collections import config_dict

from hdlm_jax import config
from hdlm_jax.config import ConfigError, check_name, default, resolve
from hdlm_jax.decoding import presets
from hdlm_jax.runs import stages

TINY = {"tokenizer": {"kind": "bytes", "vocab_size": 257}}


def with_(**sections):
    """A resolved config of plain dicts over a small base."""
    return stages.checked(TINY | sections)


def refused(match, **sections):
    with pytest.raises(ConfigError, match=match) as error:
        with_(**sections)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_defaults_resolve_to_themselves():
    resolved = dataclasses.replace(config.Config(), hierarchy=config.HierarchyConfig(clusters=(256,)),
                                   evaluate=config.EvaluateConfig(tasks_data=os.path.expandvars("$HDLM_DATA")))
    assert resolve(default()) == resolved == resolve({})  # about sqrt(50257) clusters
    assert resolve({"tokenizer": {"kind": "bpe", "vocab_size": 4096}}).hierarchy.clusters == (64,)
    assert issubclass(ConfigError, ValueError)
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve({}).train.steps = 1
    names = {"data": "source files text_field validation", "tokenizer": "kind vocab_size",
             "hierarchy": "clusters embeddings seed",
             "model": "width blocks heads seq_len dropout time_conditioning head",
             "diffusion": "gamma rates xi force_transition weighting weight_min weight_max hard_training",
             "train": "steps batch_size microbatches seed log_every init_from", "evaluate": "draws",
             "generate": "num_samples steps method options temperature top_p", "parallel": "data fsdp tensor",
             "checkpoint": "every"}
    for section, settings in names.items():  # names that others rely on
        for name in settings.split():
            check_name(f"{section}.{name}")


def recipes():
    from pathlib import Path
    files = sorted(p.name for p in (Path(__file__).parent.parent / "configs").glob("*.py"))
    books = [f"books.py:{kind}{options}" for kind in ("mdlm", "hdlm", "shuffled") for options in ("", "-warm-s1")]
    return files + books + ["books.py:mdlm-factorised-muon", "books.py:ar-factorised", "gsm8k.py:score"]


@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_resolves(root, recipe):
    file, *argument = recipe.split(":")
    spec = importlib.util.spec_from_file_location("recipe", root / "configs" / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    resolved = resolve(module.get_config(*argument))
    assert json.loads(json.dumps(resolved.as_dict())), "can be saved"
    assert f"--config={file.removesuffix('.py')}" in module.__doc__, "its docstring gives the command"
    if argument and file == "books.py":
        assert resolved.hierarchy.clusters == ((64,) if recipe.split(":")[1].startswith(("hdlm", "shuf")) else (1,))
        assert resolved.hierarchy.head_clusters == (64 if "factorised" in recipe else 0)
        assert resolved.optimizer.name == ("muon" if "muon" in recipe else "adamw")
        assert resolved.hierarchy.shuffle == ("shuffled" in recipe)
        assert (resolved.model.embeddings, resolved.train.seed) == (("clusters", 1) if "-s1" in recipe
                                                                    else ("random", 0))


def test_mdlm_and_hdlm_recipes_differ_in_the_clusters_alone(root):
    for size in ("tiny", "small"):
        a, b = (resolve(config.recipe(f"{kind}_{size}")) for kind in ("hdlm", "mdlm"))
        assert a != b and dataclasses.replace(a, hierarchy=b.hierarchy) == b


def test_overrides_keep_their_type():
    c = default()
    c.train.steps, c.optimizer.lr, c.hierarchy.clusters, c.diffusion.hard_training = 7, 1e-2, (32, 8), True
    found = resolve(c)
    assert (found.train.steps, found.optimizer.lr, found.hierarchy.clusters) == (7, 1e-2, (32, 8))
    assert found.diffusion.hard_training is True and found.train.batch_size == config.TrainConfig().batch_size
    with pytest.raises(TypeError):
        c.train.steps = "many"
    whole = resolve({"optimizer": {"lr": 1}})
    assert whole.optimizer.lr == 1.0 and type(whole.optimizer.lr) is float
    refused(r"train.steps='5': must be of type int", train={"steps": "5"})
    refused(r"train.steps=1.5: must be of type int", train={"steps": 1.5})
    refused(r"train.steps=True: must be of type int", train={"steps": True})
    refused(r"diffusion.hard_training=1: must be of type bool", diffusion={"hard_training": 1})
    refused(r"optimizer.lr=True: must be of type float", optimizer={"lr": True})
    refused(r"hierarchy.clusters=64: must be a tuple", hierarchy={"clusters": 64})
    refused(r"hierarchy.clusters='many': must be of type int", hierarchy={"clusters": ("many",)})
    refused(r"data.files='a.txt': must be a tuple", data={"source": "files", "files": "a.txt"})
    refused(r"optimizer.lr=nan: must be a finite number", optimizer={"lr": float("nan")})
    refused(r"diffusion.weight_max=inf: must be a finite number", diffusion={"weight_max": float("inf")})
    for section, most in (("train", 2**32), ("evaluate", 2**32), ("generate", 2**32), ("hierarchy", 2**31 - 1)):
        assert getattr(with_(**{section: {"seed": most - 1}}), section).seed == most - 1
        for seed in (-1, most, 2**64):
            refused(rf"{section}.seed={seed}: must lie in 0..{most - 1}$", **{section: {"seed": seed}})
    refused(r"checkpoint.minutes=-1.0: must not be negative; 0 is", checkpoint={"minutes": -1})
    refused(r"config.train=5: is a section; its settings are steps, batch_size", train=5)
    for other in ({"head": "factorised"}, {"warm_head": True}):
        refused(r"model.tied=True: needs model.head='flat' and model.warm_head=False", model={"tied": True} | other)


def test_saved_and_read_again():
    c = with_(hierarchy={"clusters": (32, 8)}, diffusion={"rates": (2.0, 1.0, 1.0), "xi": 0.9},
              data={"source": "files", "files": ("a.txt", "b.jsonl.gz")})
    again = resolve(json.loads(json.dumps(c.as_dict())))
    assert again == c and isinstance(again.hierarchy.clusters, tuple) and isinstance(again.data.files, tuple)
    assert resolve(config_dict.ConfigDict(c.as_dict())) == c
    before = c.as_dict()
    before["hierarchy"]["keep_single"] = False  # a setting that is no more
    assert resolve(json.loads(json.dumps(before))) == c and "keep_single" in before["hierarchy"]
    with pytest.raises(ConfigError, match="config.hierarchy.keep_single: no such setting"):
        check_name("hierarchy.keep_single")


def test_every_path_is_expanded(monkeypatch):
    """~ and $VARIABLES, in one place; variables that are not set stay, for messages to name them."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("WHERE", "/there")
    monkeypatch.delenv("NO_SUCH_VARIABLE", raising=False)
    given: dict = {"tokenizer": {"kind": "bpe", "vocab_size": 300}, "data": {"source": "files"}}
    for name in config.PATHS:
        section, _, key = name.partition(".")
        several = isinstance(getattr(getattr(config.Config(), section), key), tuple)
        given.setdefault(section, {})[key] = ("~/a.npy", "$WHERE/b", "$NO_SUCH_VARIABLE/c~") if several else "~/a.npy"
    found = resolve(given)
    for name in config.PATHS:
        section, _, key = name.partition(".")
        value = getattr(getattr(found, section), key)
        wanted: object = "/home/me/a.npy"
        if isinstance(value, tuple):
            wanted = (wanted, "/there/b", "$NO_SUCH_VARIABLE/c~")
        assert value == wanted, name
    assert resolve(found.as_dict()) == found
    embeddings = {"hierarchy": {"embeddings": "checkpoint:~/run"}}
    assert with_(**embeddings).hierarchy.embeddings == "checkpoint:/home/me/run"
    embeddings = {"hierarchy": {"embeddings": "$WHERE/a.safetensors:wte"}}
    assert with_(**embeddings).hierarchy.embeddings == "/there/a.safetensors:wte"


def test_patterns_of_tokenizers():
    bpe = {"kind": "bpe", "vocab_size": 300}
    assert with_(tokenizer=bpe | {"pattern": "qwen2"}).tokenizer.pattern == "qwen2"
    refused("tokenizer.pattern='qwen': choose of gpt2, cl100k", tokenizer=bpe | {"pattern": "qwen"})
    refused(r"tokenizer.pattern='\[a': no regular expression", tokenizer=bpe | {"pattern": "[a"})
    refused("tokenizer.pattern='qwen2': goes with tokenizer.kind='bpe'; 'bytes' has its own",
            tokenizer=TINY["tokenizer"] | {"pattern": "qwen2"})


def test_unknown_names_say_what_was_meant():
    message = refused("config.train.stpes: no such setting", train={"stpes": 5})
    assert "did you mean 'steps'?" in message and "batch_size" in message
    message = refused("config.modle: no such section", modle={"width": 8})
    assert "did you mean 'model'?" in message and "tokenizer" in message
    assert "did you mean" not in refused("config.train.qqqq: no such setting", train={"qqqq": 5})
    check_name("train")
    check_name("train.steps")
    for name in ("train.", "train.steps.x", "nope.steps", ""):
        with pytest.raises(ConfigError, match="no such"):
            check_name(name)


@pytest.mark.parametrize("section, name, wrong, meant", [
    ("diffusion", "weighting", "constnat", "constant"), ("diffusion", "force_transition", "cavty", "cavity"),
    ("data", "source", "fiels", "files"), ("data", "txt_documents", "blankline", "blank_line"),
    ("tokenizer", "kind", "byte", "bytes"), ("model", "head", "flatt", "flat"),
    ("model", "dtype", "float23", "float32"),
    ("model", "embeddings", "cluster", "clusters"), ("optimizer", "schedule", "cosin", "cosine"),
    ("generate", "method", "ancestrl", "ancestral"), ("generate", "clusters", "exakt", "exact"),
    ("evaluate", "checkpoint", "bset", "best"), ("generate", "checkpoint", "lastest", "latest"),
])
def test_names_of_choices(section, name, wrong, meant):
    values = TINY.get(section, {}) | {name: wrong}
    message = refused(f"{section}.{name}='{wrong}': choose one of", **{section: values})
    assert f"did you mean '{meant}'?" in message


@pytest.mark.parametrize("section, name, wrong, rule", [
    ("model", "heads", 5, "must divide model.width=768"), ("model", "heads", 256, "must be even"),
    ("model", "width", 0, "at least 1"), ("model", "seq_len", 0, "at least 1"), ("model", "dropout", 1.0, r"\[0, 1\)"),
    ("tokenizer", "vocab_size", 256, "257"),
    ("data", "source", "files", "data.source='files'"), ("data", "validation_fraction", 0.0, r"\(0, 1\)"),
    ("hierarchy", "clusters", (16, 64), "fall, fine to coarse"), ("hierarchy", "clusters", (64, 64), "fall"),
    ("hierarchy", "clusters", (8, 0), "positive"), ("hierarchy", "clusters", (300,), "more clusters than .*257 words"),
    ("hierarchy", "embeddings", "gpt2", "corpus, a FILE.npy"),
    ("diffusion", "gamma", 0.0, "positive"), ("diffusion", "rates", (1.0, -1.0), "positive"),
    ("diffusion", "rates", (1.0,), "the hierarchy has 2 levels"), ("diffusion", "weight_min", 3.0, "weight_min=3.0"),
    ("optimizer", "lr", 0.0, "positive"), ("optimizer", "lr", float("nan"), "finite"),
    ("optimizer", "ema", 1.0, r"\[0, 1\)"),
    ("optimizer", "warmup", -1, "negative"), ("optimizer", "b2", 1.0, r"\[0, 1\)"),
    ("optimizer", "weight_decay", -0.1, "negative"), ("optimizer", "clip", 0.0, "positive"),
    ("data", "read_threads", 0, "at least 1"),
    ("train", "steps", 0, "at least 1"), ("train", "microbatches", 3, "must divide train.batch_size=512"),
    ("evaluate", "draws", 1, "at least 2"), ("evaluate", "cv2", 0.0, "positive"), ("evaluate", "rows", -1, "negative"),
    ("generate", "top_p", 0.0, r"\(0, 1\]"), ("generate", "top_p", 1.5, r"\(0, 1\]"),
    ("generate", "temperature", -1.0, "negative"), ("generate", "steps", 0, "at least 1"),
    ("generate", "steps", 0, "at least 1"), ("checkpoint", "every", 0, "at least 1"),
    ("parallel", "fsdp", 0, "at least 1"), ("parallel", "fsdp", -1, "at most one of them -1"),
])
def test_rules(section, name, wrong, rule):
    message = refused(rule, **{section: TINY.get(section, {}) | {name: wrong}})
    assert repr(wrong).strip("()") in message or section == "parallel" or name in ("source", "weight_min")
    assert section in message


def test_fixed_vocabularies():
    refused("tokenizer.kind='gpt2' has 50257 words", tokenizer={"kind": "gpt2", "vocab_size": 50000})
    refused("tokenizer.kind='bytes' has 257 words", tokenizer={"kind": "bytes", "vocab_size": 300})
    assert with_(tokenizer={"kind": "bpe", "vocab_size": 257}).tokenizer.vocab_size == 257


def test_xi_names_the_n_at_hand():
    for xi in (0.125, 0.1, 0.0, 1.1, -1.0):
        refused(r"diffusion.xi=.*must lie in \(1/n, 1\]", diffusion={"xi": xi}, hierarchy={"clusters": (8,)})
    assert "(0.125, 1] for n = 8 clusters" in refused("xi", diffusion={"xi": 0.125}, hierarchy={"clusters": (8, 2)})
    assert with_(diffusion={"xi": 0.126}, hierarchy={"clusters": (8,)}).diffusion.xi == 0.126
    for clusters in ((1,), ()):
        refused("must be 1 when there is a single cluster", diffusion={"xi": 0.9}, hierarchy={"clusters": clusters})
    refused("its bound is infinite at xi=0.9", diffusion={"xi": 0.9, "force_transition": "within"})
    assert with_(diffusion={"force_transition": "within"})


def test_rates_of_levels():
    assert config.DiffusionConfig().level_rates(3) == (1.0, 1.0, 1.0)
    assert config.DiffusionConfig(gamma=2.0).level_rates(2) == (2.0, 1.0)
    assert config.DiffusionConfig(gamma=0.5).level_rates(2) == (1.0, 2.0), "the smallest is 1: only their ratio matters"
    assert config.DiffusionConfig(rates=(3.0, 1.5, 6.0)).level_rates(3) == (2.0, 1.0, 4.0)
    refused("only one of diffusion.gamma and diffusion.rates", diffusion={"gamma": 2.0, "rates": (2.0, 1.0)})
    refused("stands for two levels; give diffusion.rates for the 3", diffusion={"gamma": 2.0},
            hierarchy={"clusters": (256, 16)})
    three = with_(diffusion={"rates": (1.0, 2.0, 1.0)}, hierarchy={"clusters": (256, 16)})
    assert three.diffusion.level_rates(3) == (1.0, 2.0, 1.0)


@pytest.mark.parametrize("clusters, levels", [((), 1), ((1,), 1), ((64,), 2), ((64, 1), 2), ((64, 8), 3)])
def test_levels_counted_as_the_hierarchy_does(clusters, levels):
    """As many rates as Hierarchy.from_parents makes levels, no more and no fewer."""
    from hdlm_jax.diffusion.hierarchy import Hierarchy
    parents, below = [], 257
    for n in clusters:
        parents.append([i % n for i in range(below)])
        below = n
    made = Hierarchy.from_parents(parents, vocab_size=257).num_levels
    assert made == levels
    for rates in range(1, 5):
        sections = {"diffusion": {"rates": (1.0,) * rates}, "hierarchy": {"clusters": clusters}}
        if rates == levels:
            assert with_(**sections)
        else:
            refused(f"has {levels} levels", **sections)


def test_mesh_shapes():
    p = config.ParallelConfig
    assert p().shape(8) == (8, 1, 1) and p(data=2, fsdp=-1).shape(8) == (2, 4, 1)
    assert p(data=-1, fsdp=2, tensor=2).shape(8) == (2, 2, 2) and p(data=1).shape(1) == (1, 1, 1)
    for shape in (p(data=3), p(data=4), p(fsdp=3), p(data=16), p(fsdp=16)):
        with pytest.raises(ConfigError, match="does not multiply to the 8 devices at hand"):
            shape.shape(8)


def test_checkpoints_of_before_go_on(monkeypatch):
    """Of paths as they were written then, without settings that came later; the tokenizer's file may have moved."""
    from hdlm_jax.runs.train import check_resume
    monkeypatch.setenv("WHERE", "/there")
    here = {"tokenizer": {"kind": "bpe", "vocab_size": 300, "file": "$WHERE/a"}, "train": {"init_from": "$WHERE/run"}}
    saved = with_(**here).as_dict()
    del saved["tokenizer"]["pattern"]
    saved["train"]["init_from"], saved["tokenizer"]["file"] = "$WHERE/run", "/elsewhere/b"
    meta = {"config": json.loads(json.dumps(saved))}
    check_resume(with_(**here), meta, "x")
    here["tokenizer"]["pattern"] = "qwen2"
    with pytest.raises(ConfigError, match="tokenizer.pattern='qwen2' .there ''.: the checkpoint in x"):
        check_resume(with_(**here), meta, "x")


def test_own_texts_are_not_written_anew_on_the_way():
    """A lesson's texts, as rollouts, are drawn as at its start: by the same method, nucleus and seed."""
    from hdlm_jax.runs.train import check_resume
    here = {"train": {"objective": "certainty", "init_from": "run"}, "generate": {"method": "max_prob"}}
    meta = {"config": json.loads(json.dumps(with_(**here).as_dict()))}
    for name, value in (("top_p", 0.9), ("seed", 7)):
        with pytest.raises(ConfigError, match=f"generate.{name}={value} "):
            check_resume(with_(**here | {"generate": here["generate"] | {name: value}}), meta, "x")


def test_what_a_run_that_is_started_from_cannot_be_is_named():
    """By its own name, also where that begins as one that may differ does; heads for choices may be new."""
    base, given = with_(model={"blocks": 4}), {"model": {"blocks": 3, "block_lengths": True, "block": 8, "order": True}}
    with pytest.raises(ConfigError, match=r"other settings than given here: model.blocks=3 \(there 4\); leave"):
        config.inherit(given, base, "base")
    del given["model"]["blocks"]
    assert config.inherit(given, base, "base")["model"] == dataclasses.asdict(base.model) | given["model"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_no_number_may_be_infinite(value):
    """Of all settings and all options of all methods; in float32, which they are computed in, 1e39 is infinite."""
    for name, section in default().items():
        for key, known in section.items():
            if isinstance(known, float):
                refused(rf"{name}.{key}={re.escape(str(value))}: must be a finite number", **{name: {key: value}})
    refused("diffusion.rates=.*: must be a finite number", diffusion={"rates": (value, 1.0)})
    for method, make in presets.METHODS.items():
        for option in inspect.signature(make).parameters.values():
            if isinstance(option.default, float):
                refused(f"generate.options={option.name}=.*: method '{method}' needs a finite number",
                        generate={"method": method, "options": f"{option.name}={value}"})
            elif isinstance(option.default, int) and not isinstance(option.default, bool) and value > 0:
                refused(f"generate.options={option.name}=.*: method '{method}' needs a number of at most 2147483647",
                        generate={"method": method, "options": f"{option.name}={2**31}"})
