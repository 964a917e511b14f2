"""train.adapt by runs: which settings are the base's, what training changes, how it resumes and leaves again."""
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import RECIPE, write_recipe

import hdlm_jax
from hdlm_jax import config
from hdlm_jax.config import ConfigError, inherit, resolve
from hdlm_jax.models.decoder import apart, merged
from hdlm_jax.runs import train
from hdlm_jax.training import loading
from hdlm_jax.training.step import make_loss_sums
from hdlm_jax.training.views import opened


def recipe(folder, **changes):
    space: dict = {}
    exec(RECIPE.format(corpus=str(folder / "corpus.jsonl")), space)
    c = space["get_config"]()
    c.model.update(trunk="decoder", time_conditioning=False)
    c.decoder.update(kv_heads=1)
    for name, value in changes.items():
        section, _, key = name.partition("__")
        c[section][key] = value
    return c


AR = dict(diffusion__process="autoregressive", hierarchy__clusters=(1,), model__tied=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An autoregressive run of three steps on bytes."""
    folder = tmp_path_factory.mktemp("adapt")
    write_recipe(folder)
    train.train(resolve(recipe(folder, **AR)), str(folder / "ar"))
    return folder


def adapt(base, name, **changes):
    given = recipe(base, train__adapt=True, **{
        "train__init_from": str(base / "ar"), "decoder__shifted": True, "train__steps": 2} | changes)
    workdir = str(base / name)
    return resolve(loading.with_base(given, workdir)), workdir


def test_what_is_the_bases_and_what_is_as_given(base):
    settings, _ = adapt(base, "none", model__head="factorised", decoder__kv_heads=0)
    assert settings.decoder == dataclasses.replace(
        loading.saved_config(str(base / "ar")).decoder, shifted=True)
    assert not settings.model.tied
    assert settings.diffusion.process == "hierarchical" and settings.hierarchy.clusters == (8,)
    assert adapt(base, "none")[0].model.tied
    with pytest.raises(ConfigError, match=r"model.width=64 \(there 32\)"):
        adapt(base, "none", model__width=64)
    with pytest.raises(ConfigError, match="train.adapt=True: goes with train.init_from"):
        resolve(recipe(base, train__adapt=True))
    with pytest.raises(ConfigError, match="train.open_steps=5: goes with train.adapt"):
        resolve(recipe(base, train__open_steps=5))
    plain = inherit(recipe(base, **AR), loading.saved_config(str(base / "ar")), "ar")
    assert resolve(plain).diffusion.process == "autoregressive"


def weights(workdir):
    return jax.tree.map(np.asarray, loading.load_here(workdir, "latest").params)


@pytest.mark.slow
def test_an_autoregressive_run_becomes_hdlm(base, monkeypatch):
    """Trained, killed and resumed it is what it is without a kill; sampled from and scored as any other."""
    made, make = [], train.make_train_step  # what steps are made: no mask of what is seen once all is

    def told(config, *rest):
        made.append(config.train.open_steps)
        return make(config, *rest)

    monkeypatch.setattr(train, "make_train_step", told)
    settings, workdir = adapt(base, "hdlm", train__open_steps=1)
    train.train(settings, workdir)
    model = hdlm_jax.load(workdir, "latest")
    assert model.hierarchy.sizes == (257, 8, 1) and len(model.generate(2, steps=4)) == 2
    assert np.isfinite(model.nelbo(["some text"], draws=2)[0]["nats"])
    assert made == [1, 0]
    first, there = adapt(base, "again", train__open_steps=2, optimizer__schedule="constant", train__steps=1)
    train.train(first, there)
    whole, once = (adapt(base, name, train__open_steps=2, optimizer__schedule="constant")
                   for name in ("again", "once"))
    for settings, folder in (whole, once):
        train.train(settings, folder)
    jax.tree.map(np.testing.assert_array_equal, weights(there), weights(once[1]))
    records = [json.loads(line) for line in open(f"{workdir}/metrics.jsonl")]
    assert records[-1]["step"] == 2 and np.isfinite(records[-1]["valid_nelbo"])


@pytest.mark.slow
@pytest.mark.parametrize("head", ["flat", "factorised"])
def test_low_rank_training_leaves_the_rest_as_it_was(base, head, monkeypatch):
    monkeypatch.setattr(train, "FIT_POSITIONS", 256)  # eight simulated devices do the fit eight times
    settings, workdir = adapt(base, f"lora-{head}", decoder__lora=2, model__head=head, model__param_dtype="bfloat16")
    train.train(settings, workdir)
    old, new = weights(str(base / "ar")), weights(workdir)
    assert new["stack"]["q"]["kernel"].dtype == jnp.bfloat16
    for path, leaf in jax.tree.leaves_with_path(old):
        names = [key.key for key in path]
        if names[0] not in ("states", "head"):
            same = functools.reduce(lambda tree, key: tree[key], names, new)
            same, leaf = (a[:257] if names[0] == "embedding" else a for a in (same, leaf))  # rows of tokens
            np.testing.assert_array_equal(same, leaf.astype(same.dtype), ".".join(names))
    assert np.any(new["stack"]["q"]["lora_out"]) and new["stack"]["q"]["lora_in"].dtype == np.float32


@pytest.mark.slow
def test_without_additions_of_its_own_it_starts_from_the_base_s_merged(base):
    """They would be lost without a word."""
    settings, workdir = adapt(base, "added", decoder__lora=2)
    train.train(settings, workdir)
    changes = dict(train__init_from=workdir, optimizer__lr=1e-12, optimizer__weight_decay=0.0, train__steps=1)
    settings, there = adapt(base, "plain", **changes)
    train.train(settings, there)
    lora, plain = weights(workdir), weights(there)
    assert "lora_in" not in plain["stack"]["q"]
    np.testing.assert_allclose(plain["stack"]["q"]["kernel"], merged(lora)["stack"]["q"]["kernel"], atol=1e-7)
    assert np.abs(plain["stack"]["q"]["kernel"] - lora["stack"]["q"]["kernel"]).max() > 1e-6


def test_small_parameters_are_not_trained(base):
    settings, workdir = adapt(base, "small", model__param_dtype="bfloat16")
    with pytest.raises(ConfigError, match="model.param_dtype='bfloat16': small steps would be rounded away"):
        train.train(settings, workdir)


def test_attention_opens_step_by_step():
    keys, segment = jax.random.split(jax.random.key(0), 64), jnp.arange(8)[None].repeat(64, 0) // 5
    for share in (0.0, 0.3, 1.0):
        seen = np.asarray(opened(keys, jnp.full(64, share), 8, None))
        behind = seen[:, np.triu_indices(8, 1)[0], np.triu_indices(8, 1)[1]]
        assert seen[:, np.tri(8, dtype=bool)].all()
        assert abs(behind.mean() - share) <= 4 * np.sqrt(share * (1 - share) / behind.size)
        inside = np.asarray(opened(keys, jnp.full(64, share), 8, segment))
        np.testing.assert_array_equal(inside, seen & np.asarray(segment[:, :, None] == segment[:, None]))


def test_a_loss_with_everything_open_is_the_plain_one(base):
    """And with nothing open that of a network that sees what was before alone."""
    settings, _ = adapt(base, "none")
    run = loading.load_here(str(base / "ar"))
    from hdlm_jax.diffusion.hierarchy import Hierarchy
    from hdlm_jax.training.state import build

    network, process = build(settings, Hierarchy.from_parents([np.arange(257) % 8]))
    params = network.init_params(jax.random.key(0), 16)
    params = {**params, "stack": run.params["stack"], "embedding": run.params["embedding"]}
    loss = jax.jit(make_loss_sums(settings, network, process))
    batch = {"x": jax.random.randint(jax.random.key(1), (8, 16), 0, 257), "index": jnp.arange(8)}
    plain = loss(params, batch, jax.random.key(2))[0]
    np.testing.assert_allclose(loss(params, batch | {"open": jnp.ones(8)}, jax.random.key(2))[0], plain, rtol=1e-6)
    assert abs(loss(params, batch | {"open": jnp.zeros(8)}, jax.random.key(2))[0] - plain) > 1e-4 * abs(plain)
    assert config.resolve(recipe(base)).train.open_steps == 0


@pytest.mark.slow
def test_low_rank_training_makes_no_gradient_of_what_it_keeps(base):
    """A third of the products are saved, and what is trained takes the very step that it took beside the others'."""
    from hdlm_jax.diffusion.hierarchy import Hierarchy
    from hdlm_jax.training.state import build, init_state, make_optimizer
    from hdlm_jax.training.step import make_train_step

    batch = {"x": jax.random.randint(jax.random.key(1), (8, 16), 0, 257), "index": jnp.arange(8)}
    hierarchy, steps = Hierarchy.from_parents([np.arange(257) % 8]), {}
    for rank in (0, 2):
        settings, _ = adapt(base, "none", decoder__lora=rank, train__microbatches=2)
        network, process = build(settings, hierarchy)
        state = init_state(settings, network, make_optimizer(settings)[0], jax.random.key(0))
        step = jax.jit(make_train_step(settings, network, process, make_optimizer(settings)[0]))
        steps[rank] = step.lower(state, batch, jax.random.key(2))
    (full, lora) = (steps[rank].cost_analysis()["flops"] for rank in (0, 2))
    assert lora < 0.9 * full, (lora, full)
    new, metrics = steps[2].compile()(state, batch, jax.random.key(2))
    grads = jax.grad(lambda p: make_loss_sums(settings, network, process)(p, batch, jax.random.fold_in(
        jax.random.key(2), 0))[0])(state.params)
    trained, kept = apart(grads)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(trained) / batch["x"].size, rtol=1e-5)
    assert optax.tree.norm(kept) > 0
    jax.tree.map(np.testing.assert_array_equal, apart(new.params)[1], apart(state.params)[1])
    change = [np.abs(a - b).max() for a, b in zip(*(jax.tree.leaves(apart(p)[0]) for p in (new.params, state.params)),
                                                  strict=True)]
    assert max(change) > 0
