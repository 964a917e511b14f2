"""Methods by name: presets, their options, what they need; on a run, from the command line, and side by side."""

import dataclasses
import functools
import json
import os
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import LEVELS, SEQ_LEN, model, read_recipe, trained

from hdlm_jax.common import parallel
from hdlm_jax.config import ConfigError, GenerateConfig, resolve
from hdlm_jax.decoding import presets
from hdlm_jax.decoding import sampler as sampling
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.runs import generate
from hdlm_jax.training.state import build
from tools import method_sweep

# one of every kind in each run of the tests, the others when there is time
QUICK = ("prophet", "dkv")


@functools.cache
def helper():
    """An autoregressive network of the same words that knows nothing yet."""
    settings = read_recipe(trained()[0]).as_dict()
    settings["diffusion"] |= {"process": "autoregressive"}
    settings["hierarchy"] |= {"clusters": (1,)}
    settings["model"] |= {"time_conditioning": False}
    network, process = build(resolve(settings), Hierarchy.from_parents([], vocab_size=257))
    z = jnp.zeros((1, SEQ_LEN), jnp.int32)
    params = jax.jit(network.init)(jax.random.key(3), z, jnp.zeros(1))["params"]
    return types.SimpleNamespace(network=network, params=params, process=process)


def classifier(onehots):
    """log p(y): how often the word 65 is shown."""
    return jnp.sum(onehots[..., 65], axis=-1)


@functools.cache
def sampler():
    run = model().run
    helped = helper()
    shared = jax.device_put(helped.params, parallel.replicated(run.mesh))
    helped = types.SimpleNamespace(network=helped.network, params=shared, process=helped.process)
    return sampling.sampler_of(run, helped, classifier)


def canvas(rows=4, prompt=3):
    z = np.full((rows, SEQ_LEN), model().hierarchy.mask_id, np.int32)
    z[:, :prompt] = [72, 101, 108][:prompt]
    return z


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow)
                                  for n in presets.METHODS if n not in ("dcolt", "ctrldiff", "adjust", "diagonal")])
def test_every_method_writes_words(name):
    """All tokens, the prompt untouched, the same text in other company; numbers are inputs of the program."""
    g = GenerateConfig(method=name, steps=5, batch_size=8, options="start=8" if name == "daedal" else "")
    out = sampler()(canvas(), g)
    inside = np.arange(SEQ_LEN)[None] < out["length"][:, None]
    assert (out["tokens"][inside] < 257).all() and (out["tokens"][:, :3] == [72, 101, 108]).all()
    assert (out["length"] == SEQ_LEN).all() or name == "daedal" and (out["length"] >= 8).all()
    assert 1 <= out["row_forwards"].min() and out["calls"].max() <= 2 * SEQ_LEN * LEVELS
    alone = sampler()(canvas(1), g)
    np.testing.assert_array_equal(alone["tokens"][0], out["tokens"][0])
    assert alone["row_forwards"][0] == out["row_forwards"][0]


def test_presets_say_where_they_come_from():
    for name, preset in presets.METHODS.items():
        assert "arXiv " in preset.__doc__, name
        method = presets.make(name)
        hash(method.policy)
        assert all(type(v) in (int, float) for v in method.numbers.values()), name


def test_options():
    method = presets.make("fast_dllm", "threshold=.75 block=8 straight=true", steps=9)
    assert method.numbers["threshold"] == 0.75 and method.policy.block == 8 and method.policy.choose.straight
    assert presets.make("max_prob", steps=9).numbers["steps"] == 9
    assert presets.make("max_prob", "steps=4", steps=9).numbers["steps"] == 4
    assert presets.make("fast_dllm", "threshold=.5").policy == presets.make("fast_dllm").policy, "one program"
    numbers = presets.numbers(presets.make("eoser", "steps=4"), eos=256)
    assert numbers["eos"] == 256 and numbers["steps"].dtype == np.int32 and numbers["eos_least"].dtype == np.float32
    for name, options, message in (
            ("prohpet", "", "method='prohpet': choose one of .*did you mean 'prophet'"),
            ("prophet", "gap=3", "options='gap=3': method 'prophet' has steps=0, gap_early=7.5"),
            ("prophet", "block", "options='block': method 'prophet' has"),
            ("prophet", "block=x", "options=block='x': must be of type int"),
            ("dparallel", "threshold=nan", "options=threshold=nan: method .dparallel. needs a finite number"),
            ("max_prob", "steps=0", "options=steps=0: method 'max_prob' needs it at least 1"),
            ("freedave", "drafts=0", "options=drafts=0: method 'freedave' needs it at least 1"),
            ("edlm", "candidates=0", "options=candidates=0: method 'edlm' needs it at least 1"),
            ("ccd", "depth=0", "options=depth=0: method 'ccd' needs it at least 1"),
            ("any_order", "order=right", "order='right': choose left or random"),
            ("daedal", "window=0", "options=window=0: method 'daedal' needs it at least 1"),
            ("sparsed", "select=2", r"options=select=2.0: method 'sparsed' needs it in \[0, 1\]"),
            ("quantised", "bits=5", "bits=5: choose one of"), ("cfg", "without=all", "without='all': choose mask or"),
            ("max_prob", "straight=yes", "options=straight='yes': must be of type bool"),
            ("max_prob", "draw=best", "draw='best': choose sample or argmax")):
        with pytest.raises(ValueError, match=message):
            presets.make(name, options)
        with pytest.raises(ConfigError, match="generate." + message):
            presets.check(GenerateConfig(method=name, options=options))


def test_what_a_method_needs(tmp_path):
    bare = sampling.sampler_of(model().run)
    for name, message in (("guided", "needs a second run .*generate.helper"),
                          ("classifier", "needs a function: Model.generate"),
                          ("diagonal", "refines the latent states of a network of decoder.loops"),
                          ("dcolt", "needs a head for an order"),
                          ("ctrldiff", "needs a head for lengths .*model.block_lengths=True")):
        with pytest.raises(ConfigError, match=message):
            bare(canvas(), GenerateConfig(method=name))
    with pytest.raises(ConfigError, match="generate.helper=.*must be an autoregressive run"):
        sampling.load_helper(model().run, GenerateConfig(helper=str(trained()[1])))


@pytest.mark.slow
def test_guidance_and_helpers_change_the_text():
    """The classifier asks for the word 65, and gets more of it; a helper that is followed blindly writes its own."""
    plain = sampler()(canvas(8), GenerateConfig(steps=5, batch_size=8))["tokens"]
    settings = GenerateConfig(steps=5, batch_size=8, method="classifier", options="weight=8")
    asked = sampler()(canvas(8), settings)["tokens"]
    assert (asked[:, 3:] == 65).mean() > 0.5 > (plain[:, 3:] == 65).mean()
    nothing = sampler()(canvas(8), dataclasses.replace(settings, options="weight=0"))["tokens"]
    np.testing.assert_array_equal(nothing, plain)
    one = sampler()(canvas(8), GenerateConfig(steps=5, batch_size=8, method="edlm", options="candidates=1"))["tokens"]
    np.testing.assert_array_equal(one, plain)


def test_law_names_what_is_not_ancestral():
    say = lambda **how: sampling.exactness(model().run.process, GenerateConfig(**how))  # noqa: E731
    assert say() == say(method="first_hitting") == "exact"
    for name in set(presets.METHODS) - {"ancestral", "first_hitting"}:
        assert say(method=name) == f"inexact: method={name}"


def test_documents_of_a_schema(tmp_path):
    """Whatever the network: JSON from the command line's config, and objects in a notebook."""
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}}
    assert all(set(d) == {"a"} and isinstance(d["a"], bool) for d in model().json(schema, 4, steps=6, batch_size=8))
    workdir = shutil.copytree(trained()[1], tmp_path / "run")
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    config = read_recipe(trained()[0])
    g = dataclasses.replace(config.generate, schema=str(tmp_path / "schema.json"), num_samples=9)  # two batches
    config = dataclasses.replace(config, generate=g)
    generate.generate(config, str(workdir))
    lines = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 9 and all(set(json.loads(line["text"])) == {"a"} for line in lines)
    (tmp_path / "schema.json").write_text('{"type": "object", "properties": {"a": {"type": "string", "pattern": "x"}}}')
    with pytest.raises(ConfigError, match="generate.schema=.*pattern"):
        generate.generate(config, str(workdir))
    os.truncate(tmp_path / "schema.json", 1 << 30)  # holes take no room
    with pytest.raises(ConfigError, match="generate.schema=.* it has 1,073,741,824 bytes, a schema at most 4,194,304"):
        generate.generate(config, str(workdir))


def test_canvases_that_cannot_be():
    """Each in one line, before anything is computed."""
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}}
    for settings, message in ((dict(method="daedal"), "its canvas grows, so nothing can be given behind a blank"),
                              (dict(method="guided"), "generate.helper|its helper does not know")):
        with pytest.raises(ConfigError, match=message):
            model().json(schema, 2, batch_size=8, **settings)
    with pytest.raises(ConfigError, match="its canvas grows"):
        model().infill("ab[MASK]cd", method="daedal", batch_size=8)
    with pytest.raises(ConfigError, match=r"generate.schema='x': here call Model.json"):
        model().generate(schema="x")


@pytest.mark.slow
def test_a_growing_canvas_begins_behind_the_prompt():
    out = sampler()(canvas(4, 3), GenerateConfig(batch_size=8, method="daedal", options="start=5 window=1 eos_grow=0"))
    assert (out["length"] >= 8).all() and (out["tokens"][:, :3] == [72, 101, 108]).all()
    assert (out["row_forwards"] >= 1).all()


def test_front():
    assert method_sweep.front([1, 2, 3, 4, 2], [9, 5, 6, 1, 4]) == [0, 4, 3]
    assert method_sweep.front([1, 1], [3, 2]) == [1]


@pytest.mark.slow
def test_sweep_over_methods(tmp_path, capsys, monkeypatch):
    """Lines are kept and used again; table and picture are of all."""
    workdir = shutil.copytree(trained()[1], tmp_path / "run")
    how = [str(workdir), f"--judge={trained()[1]}", "--num_samples=3", "--batch_size=8", "--steps=3,6",
           "--prompt_tokens=4",
           "--methods=ancestral,fast_dllm threshold=.5 block=4"]
    method_sweep.main(how)
    lines = [json.loads(line) for line in (workdir / method_sweep.FILE).read_text().splitlines()]
    assert [(s["sampling"]["method"], s["sampling"]["steps"]) for s in lines] == [
        ("ancestral", 3), ("ancestral", 6), ("fast_dllm", None)]
    assert all(line["tokens_per_s"] > 0 and line["judge"]["unigram_entropy"] >= 0 for line in lines)
    out = capsys.readouterr().out
    assert "fast_dllm threshold=.5 block=4" in out and "(real text)" in out
    assert (workdir / "method_sweep.png").stat().st_size > 10_000 and "ancestral T=6" in (
        workdir / "method_sweep.md").read_text()
    monkeypatch.setattr(sampling.Sampler, "__call__", None)  # nothing is sampled again
    method_sweep.main(how)
