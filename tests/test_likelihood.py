"""Likelihoods under decoding methods: every text's, so that they sum to one, and are those of what is drawn."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sampler import MDLM, THREE, TWO, denoiser, make
from tiny import SEQ_LEN, read_recipe, trained

import hdlm_jax as hd
from hdlm_jax import config as configs
from hdlm_jax.config import ConfigError
from hdlm_jax.decoding import loop, presets
from hdlm_jax.evaluation.likelihood import canvases_of, is_exact, teacher_forced
from hdlm_jax.runs import likelihoods

RATES = (1.0, 0.7, 1.5)


def toy(shape, length, seed=3, force="cavity"):
    one, process = make(shape, RATES[: len(shape["parents"]) + 1], force=force)
    return one, process, one.random_network(length, seed)


def method_of(text):
    name, _, options = text.partition(" ")
    return presets.make(name, options)


def nats_of(one, process, network, text, x, seed=0):
    """-log p of texts x [n, S] along one pass of the method, and their calls."""
    found = hd.log_likelihood(process, denoiser(one, network), x, method_of(text), jax.random.key(seed))
    return tuple(map(np.asarray, (-found[0], found[1])))


EXACT = ["max_prob steps=2", "entropy steps=100", "fast_dllm threshold=.5 threshold_cluster=.5 draw=sample block=0",
         "any_order order=left", "margin steps=3 block=2 straight=true"]


@pytest.mark.parametrize("shape, text", [
    *((TWO, text) for text in EXACT), (MDLM, EXACT[0]), (THREE, EXACT[0]),
    *(pytest.param(shape, text, marks=pytest.mark.slow) for shape in (MDLM, THREE) for text in EXACT[1:])])
def test_probabilities_of_all_texts_sum_to_one(shape, text):
    one, process, network = toy(shape, 3)
    assert is_exact(teacher_forced(method_of(text), process), process)
    nats, calls = nats_of(one, process, network, text, one.words(3))
    assert np.exp(-nats.astype(np.float64)).sum() == pytest.approx(1, abs=2e-5)
    if "steps=2" in text:
        assert calls.max() <= max(2, one.K)


def test_they_are_the_frequencies_of_what_is_drawn():
    """20,000 samples in two calls, where the tokens of a call are independent: 4.5 standard errors for each text."""
    one, process, network = toy(TWO, 2, seed=5)
    method, rows, text = method_of("max_prob steps=2"), 20_000, "max_prob steps=2"
    draw = jax.jit(lambda key, z: loop.sample(key, denoiser(one, network), process, z, method.policy,
                                              presets.numbers(method))[0])
    drawn = np.asarray(draw(jax.random.key(1), jnp.full((rows, 2), one.mask)))
    found = np.bincount(drawn @ [one.V, 1], minlength=one.V**2) / rows
    p = np.exp(-nats_of(one, process, network, text, one.words(2))[0])
    assert p.max() > 0.1 and (np.abs(found - p) < 4.5 * np.sqrt(p * (1 - p) / rows)).all()


def test_few_calls_cost_what_they_forget():
    """Two tokens that are always equal: at once they cost log 2 more than one after the other."""
    one, process, _ = toy(MDLM, 2)
    joint = np.zeros((4, 4))
    joint[np.arange(4), np.arange(4)] = 0.25
    network = one.bayes(joint + 1e-12)
    equal = np.stack([np.arange(4)] * 2, 1)
    costs = [nats_of(one, process, network, f"max_prob steps={steps}", equal)[0] for steps in (1, 2)]
    np.testing.assert_allclose(costs[0], 2 * np.log(4), rtol=1e-5)
    np.testing.assert_allclose(costs[1], np.log(4), rtol=1e-5)


@pytest.mark.parametrize("shape", [TWO, pytest.param(THREE, marks=pytest.mark.slow)])
def test_one_level_a_call_at_random_is_the_nelbo(shape):
    """The mean over orders of crossings (docs/theory.md section 3, "As a sum over crossings"): 4 standard errors."""
    one, process, network = toy(shape, 2, seed=7)
    text = one.words(2)[[one.V + 2]]
    nats, calls = nats_of(one, process, network, "first_hitting", np.repeat(text, 4000, 0), seed=2)
    want = one.nelbo(one.force(network, "cavity"))[tuple(text[0])]
    assert abs(nats.mean() - want) < 4 * nats.std() / np.sqrt(len(nats)) and (calls == 2 * one.K).all()
    assert not is_exact(teacher_forced(method_of("first_hitting"), process), process)


@pytest.mark.parametrize("text, match", [
    ("fast_dllm", "takes the likeliest; add draw=sample"), ("low_confidence", "decides what it keeps"),
    ("prophet draw=sample", "writes the rest at once"), ("rcr", "takes tokens back"), ("remdm", "takes tokens back"),
    ("freedave draw=sample", "drafts"), ("guided", "drafts"), ("cfg", "guided"),
    ("daedal draw=sample", "any length")])
def test_what_is_not_known_is_refused(text, match):
    process = toy(TWO, 2)[1]
    with pytest.raises(ValueError, match=match):
        teacher_forced(method_of(text), process)


def test_clusters_that_leak_are_refused():
    process = make(TWO, RATES[:2], xi=0.8)[1]
    with pytest.raises(ValueError, match=r"xi=0.8: a text can be written by way of any cluster"):
        teacher_forced(method_of("max_prob"), process)


def test_hooks_say_whether_they_are_random():
    random = {name for name in presets.METHODS if any(hook.random for hook in presets.make(name).policy.hooks)}
    assert random >= {"ancestral", "first_hitting", "any_order", "bd3lm", "dkv_greedy", "sparsed", "quantised"}
    assert not random & {"max_prob", "entropy", "margin", "fast_dllm", "dimple", "freecache", "dkv", "dual_cache"}
    assert not any(hook.random for hook in presets.make("any_order", "order=left").policy.hooks)


def test_rows_as_a_sampler_writes_them():
    """Given tokens stay, hidden padding is behind the row's length, ends of text that count are written."""
    segment = np.array([[0, 0, 0, 0], [0, 0, -1, -1]])
    score = np.array([[False, True, True, True], [True, True, False, False]])
    rows = {"x": np.ones((2, 4), np.int32), "segment": segment, "score": score, "tokens": np.array([3, 2])}
    assert canvases_of(rows)["length"].tolist() == [4, 2]
    with pytest.raises(ConfigError, match="several documents that do not see each other"):
        canvases_of(rows | {"segment": np.array([[0, 0, 1, 1], [0, 0, -1, -1]])})


def test_evaluate_measures_each_once(tmp_path, monkeypatch):
    recipe, source = trained()
    shutil.copytree(source, tmp_path / "run")
    settings = read_recipe(recipe)

    def evaluate(*decodings):
        e = configs.EvaluateConfig(draws=2, rows=6, decodings=decodings)
        changed = settings.__class__(**{**{f: getattr(settings, f) for f in settings.__dataclass_fields__},
                                        "evaluate": e})
        return likelihoods.evaluate(changed, str(tmp_path / "run"))

    found = evaluate("max_prob steps=4")
    one = found["decodings"]["max_prob steps=4"]
    assert one["exact"] and one["calls"] == 4 and one["rows"] == 6 and one["tokens"] == 6 * SEQ_LEN
    assert 4 < one["nats"] < 7 and 0 < one["se"] < 1
    monkeypatch.setattr(likelihoods, "likelihoods", functools.partial(_counted, seen := []))
    both = evaluate("max_prob steps=4", "ancestral steps=4")
    assert seen == ["ancestral steps=4"] and both["decodings"]["max_prob steps=4"] == one
    assert not both["decodings"]["ancestral steps=4"]["exact"]
    assert json.loads((tmp_path / "run" / "likelihoods.json").read_text()) == both
    with np.load(tmp_path / "run" / "likelihoods.npz") as file:
        assert set(file) == {"max_prob steps=4", "ancestral steps=4", "tokens"}
        assert file["max_prob steps=4"].sum() / file["tokens"].sum() == pytest.approx(one["nats"])
    with pytest.raises(ConfigError, match="evaluate.decodings='rcr': .*takes tokens back"):
        evaluate("rcr")


def _counted(seen, run, rows, program, numbers, draws, name):
    seen.append(name)
    return REAL(run, rows, program, numbers, draws, name)


REAL = likelihoods.likelihoods
