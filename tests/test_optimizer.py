"""Muon: which parameters are its own, every matrix orthogonal by itself, all others as AdamW moves them."""
import functools

import jax
import numpy as np
import pytest
import test_train
from test_config import refused

from hdlm_jax.common import parallel
from hdlm_jax.models.network import matrix_axes
from hdlm_jax.training.state import abstract_state, build, init_state, make_optimizer
from hdlm_jax.training.step import make_train_step

HIERARCHY, RATE = test_train.HIERARCHY, 0.5
DECODER = dict(model__trunk="decoder", model__time_conditioning=False, decoder__kv_heads=1)
EXPERTS = dict(decoder__experts=4, decoder__experts_per_token=2, decoder__expert_inner=8, decoder__shared_inner=8,
               decoder__dense_blocks=1)
DIT_OWN = {f"stack.{name}.kernel" for name in ("qkv", "out", "up", "down")}
MLP = ("gate.kernel", "up.kernel", "down.kernel")
DENSE_OWN = {f"dense.{name}.kernel" for name in "qkv"} | {"dense.out.kernel"} | {f"dense.mlp.{name}" for name in MLP}
EXPERTS_OWN = ({f"stack.{name}.kernel" for name in "qkv"} | {"stack.out.kernel"}
               | {f"stack.moe.{kind}.{name}" for name in MLP for kind in ("experts", "shared")})
TRUNKS = {"dit": ({}, DIT_OWN), "experts": (DECODER | EXPERTS, DENSE_OWN | EXPERTS_OWN)}


def settings(name="muon", **changes):
    return test_train.make_config(**dict(optimizer__name=name, optimizer__muon_lr=RATE, optimizer__weight_decay=0.0,
                                         optimizer__warmup=0, optimizer__schedule="constant") | changes)


def names(path):
    return ".".join(str(key.key) for key in path)


def matrices(name, a):
    """[N, rows, columns] of a kernel [blocks, ...]: q, k and v (of one product), blocks and experts apart."""
    a = np.moveaxis(np.asarray(a), 2, 1) if "qkv" in name else np.asarray(a)
    return a.reshape(-1, *a.shape[-2:])


def numbers(config):
    """Parameters, at random."""
    network, rng = build(config, HIERARCHY)[0], np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: network.init_params(jax.random.key(0), 8))
    return jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32), shapes)


@functools.cache
def parameters(trunk):
    config = settings(**TRUNKS[trunk][0])
    return config, numbers(config)


def gradients(params):
    """Of matrices: singular values in [.5, 1.5] times a size of its own each, so that two taken together would show."""
    rng = np.random.default_rng(0)

    def of(path, a):
        if not matrix_axes(names(path).split(".")):
            return rng.standard_normal(a.shape).astype(np.float32)
        u, _, v = np.linalg.svd(rng.standard_normal(matrices(names(path), a).shape), full_matrices=False)
        size = 10.0 ** rng.permutation(np.linspace(-2, 2, len(u)))[:, None]
        made = np.einsum("nik,nk,nkj->nij", u, size * rng.uniform(0.5, 1.5, u.shape[::2]), v).astype(np.float32)
        return np.moveaxis(made.reshape(len(a), 3, *made.shape[1:]), 1, 2) if "qkv" in names(path) else made.reshape(
            a.shape)

    return jax.tree_util.tree_map_with_path(of, params)


def updates(config, params, grads):
    tx, _ = make_optimizer(config)
    made = jax.jit(lambda p, g: tx.update(g, tx.init(p), p)[0])(params, grads)
    return {names(path): np.asarray(a) for path, a in jax.tree.leaves_with_path(made)}


@pytest.mark.parametrize("trunk", TRUNKS)
def test_every_matrix_is_orthogonal_by_itself_and_all_else_is_adamw_s(trunk):
    config, params = parameters(trunk)
    grads = gradients(params)
    ours, theirs = (updates(c, params, grads) for c in (config, settings("adamw", **TRUNKS[trunk][0])))
    own = TRUNKS[trunk][1]
    assert own < set(ours)
    for name in own:
        found = matrices(name, ours[name])
        rows, columns = found.shape[1:]
        values = np.linalg.svd(found / (RATE * max(1, columns / rows) ** 0.5), compute_uv=False)
        assert values.min() > 0.6 and values.max() < 1.25, (name, values)  # what five steps of Newton-Schulz leave
    for name in set(ours) - own:
        np.testing.assert_array_equal(ours[name], theirs[name], name)


def test_rms_and_decay_are_as_set():
    params = {"stack": {"up": {"kernel": parameters("dit")[1]["stack"]["up"]["kernel"]}}}
    grads, (name, decay) = gradients(params), ("stack.up.kernel", 0.1)
    plain = updates(settings(optimizer__muon_rms=0.2), params, grads)[name]
    assert np.sqrt(np.mean(plain**2)) == pytest.approx(0.2 * RATE, rel=0.25)
    decayed = updates(settings(optimizer__muon_rms=0.2, optimizer__weight_decay=decay), params, grads)[name]
    np.testing.assert_allclose(decayed - plain, -decay * RATE * params["stack"]["up"]["kernel"], atol=1e-5)


def test_shards_make_the_same_update():
    config, params = parameters("experts")
    split = settings(**TRUNKS["experts"][0], parallel__data=2, parallel__fsdp=2, parallel__tensor=2)
    mesh, grads = parallel.make_mesh(split), gradients(params)
    network, _ = build(split, HIERARCHY)
    _, where = abstract_state(split, network, make_optimizer(split)[0], mesh)
    assert "tensor" in where.opt_state[1].inner_states["muon"].inner_state.inner_states["muon"].inner_state[0].mu[
        "stack"]["q"]["kernel"].spec
    placed = (jax.device_put(tree, where.params) for tree in (params, grads))
    one, eight = updates(config, params, grads), updates(split, *placed)
    for name, a in one.items():
        np.testing.assert_allclose(eight[name], a, atol=1e-5, err_msg=name)


def test_low_rank_additions_are_adamw_s():
    """All that is trained is then AdamW's, and what is kept has no moments."""
    changes = DECODER | dict(decoder__lora=2)
    params = grads = numbers(settings(**changes))
    ours, theirs = (updates(settings(name, **changes), params, grads) for name in ("muon", "adamw"))
    for name, a in ours.items():
        np.testing.assert_array_equal(a, theirs[name], name)
    assert np.any(ours["stack.q.lora_in"]) and not np.any(ours["stack.q.kernel"])


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_skipped():
    config = settings()
    network, process = build(config, HIERARCHY)
    tx, _ = make_optimizer(config)
    state = jax.jit(lambda key: init_state(config, network, tx, key))(jax.random.key(0))
    step, batch = jax.jit(make_train_step(config, network, process, tx)), test_train.make_batch()
    moved, _ = step(state, batch, jax.random.key(1))
    assert np.any(moved.params["head"]["bias"] != state.params["head"]["bias"])
    bad = state._replace(params=state.params | {"embedding": state.params["embedding"] * np.nan})
    after, _ = step(bad, batch, jax.random.key(1))
    assert int(after.skipped) == 1
    for a, b in zip(jax.tree.leaves(after[2:]), jax.tree.leaves(bad[2:]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_settings_are_refused_in_one_line():
    refused(r"optimizer.name='moun': choose one of adamw, muon", optimizer={"name": "moun"})
    refused(r"optimizer.muon_lr=0.0: must be positive", optimizer={"muon_lr": 0.0})
    refused(r"optimizer.muon_rms=-1.0: must not be negative", optimizer={"muon_rms": -1.0})
