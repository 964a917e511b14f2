"""The mixture of experts against loops over tokens and experts, in float64."""
import dataclasses
import functools

import families
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax.common import parallel
from hdlm_jax.config import DecoderConfig
from hdlm_jax.models import experts
from hdlm_jax.models.experts import Experts

D = 24
SPLIT = {"gate": -1, "up": -1, "down": -2}  # over a tensor axis
SOFTMAX = DecoderConfig(experts=8, experts_per_token=2, expert_inner=16)
SIGMOID = dataclasses.replace(SOFTMAX, gate="sigmoid", routed_scale=2.5, shared_inner=32)
GROUPS = dataclasses.replace(SIGMOID, experts=16, experts_per_token=3, expert_groups=4, top_groups=2)
CASES = {"softmax": SOFTMAX, "sigmoid, shared": SIGMOID, "groups": GROUPS,
         "gelu": dataclasses.replace(SOFTMAX, activation="gelu", routed_scale=0.5),
         "not normalised": dataclasses.replace(GROUPS, normalise=False, shared_inner=0),
         "softmax in groups": dataclasses.replace(SOFTMAX, expert_groups=4, top_groups=1, shared_inner=8),
         "groups of one": dataclasses.replace(SOFTMAX, expert_groups=8, top_groups=3),
         "all": dataclasses.replace(SOFTMAX, experts_per_token=8), "one": dataclasses.replace(SOFTMAX, experts=1,
                                                                                               experts_per_token=1)}


def drawn(dims, shape=(3, 10), seed=0):
    """(parameters, x [B, S, D]): large enough that every choice shows."""
    key = jax.random.key(seed)
    x = jax.random.normal(jax.random.fold_in(key, 1), (*shape, D))
    leaves, tree = jax.tree.flatten(jax.eval_shape(Experts(dims).init, key, x)["params"])
    return tree.unflatten([0.4 * jax.random.normal(jax.random.fold_in(key, 2 + i), a.shape)
                           for i, a in enumerate(leaves)]), x


def run(dims, dtype=jnp.float32):
    """(parameters, x) -> the module's output, compiled."""
    return jax.jit(lambda params, x: Experts(dims, dtype).apply({"params": params}, x))


def looped(dims, params, x):
    """[B, S, D] in float64, (experts, shares) of every token."""
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def mlp(layers, h, which=...):
        g, u = h @ layers["gate"]["kernel"][which], h @ layers["up"]["kernel"][which]
        act = (g / (1 + np.exp(-g)) if dims.activation == "silu" else
               0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))))
        return (act * u) @ layers["down"]["kernel"][which]

    out, chosen = [], []
    for h in np.asarray(x, np.float64).reshape(-1, D):
        logits = h @ w["router"]["kernel"]
        score = 1 / (1 + np.exp(-logits)) if dims.gate == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
        rank = score + w["router"].get("bias", 0)
        size = dims.experts // dims.expert_groups
        best = [sum(sorted(rank[g * size : (g + 1) * size])[-2:]) for g in range(dims.expert_groups)]
        inside = set(np.argsort(best)[-dims.top_groups :])
        order = [e for e in np.argsort(-rank) if e // size in inside][: dims.experts_per_token]
        share = score[order] / (score[order].sum() if dims.normalise else 1) * dims.routed_scale
        out.append(sum(s * mlp(w["experts"], h, e) for e, s in zip(order, share, strict=True)))
        out[-1] += mlp(w["shared"], h) if dims.shared_inner else 0
        chosen.append(order)
    return np.stack(out).reshape(x.shape), chosen


def dense(dims, params, x):
    """The same in jax: every token through every expert, for gradients."""
    tokens = x.reshape(-1, D)
    router = params["router"]["kernel"], params["router"].get("bias", jnp.zeros(1))
    expert, share = experts.choose(tokens, router, dims)
    weight = jnp.sum(jax.nn.one_hot(expert, dims.experts) * share[..., None], axis=1)
    w, act = params["experts"], experts.ACTIVATIONS[dims.activation]
    h = act(jnp.einsum("nd,edf->nef", tokens, w["gate"]["kernel"])) * jnp.einsum("nd,edf->nef", tokens,
                                                                                 w["up"]["kernel"])
    out = jnp.einsum("nef,efd,ne->nd", h, w["down"]["kernel"], weight)
    if dims.shared_inner:
        w = params["shared"]
        out += (act(tokens @ w["gate"]["kernel"]) * (tokens @ w["up"]["kernel"])) @ w["down"]["kernel"]
    return out.reshape(x.shape)


@pytest.fixture(params=["blocks", "ragged"])
def way(request, monkeypatch):
    """Both ways to multiply: blocks of rows, and the TPU's."""
    if request.param == "ragged":
        monkeypatch.setattr(experts.parallel, "platform", lambda: "tpu")


@pytest.mark.parametrize("name", CASES)
def test_against_loops(name, way):
    params, x = drawn(CASES[name])
    wanted, chosen = looped(CASES[name], params, x)
    assert name in ("all", "one") or len({tuple(sorted(c)) for c in chosen}) > 3
    found = run(CASES[name])(params, x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


def test_as_llada2():
    """Against the numpy of tests/families.py, which is held to the original."""
    made, w = families.config("llada2_moe"), families.weights("llada2_moe")
    at = "model.layers.1.mlp."
    names = {name: f"{name}_proj.weight" for name in ("gate", "up", "down")}
    stacked = {new: np.stack([w[f"{at}experts.{e}.{old}"].T for e in range(16)]) for new, old in names.items()}
    shared = {new: w[f"{at}shared_experts.{old}"].T for new, old in names.items()}
    params = {"router": {"kernel": w[at + "gate.weight"].T, "bias": w[at + "gate.expert_bias"]},
              "experts": {name: {"kernel": kernel} for name, kernel in stacked.items()},
              "shared": {name: {"kernel": kernel} for name, kernel in shared.items()}}
    x = 3 * np.random.default_rng(0).standard_normal((2, 7, 32), np.float32)
    wanted = [families.experts(w, at, made, row) for row in x.reshape(-1, 32)]
    found = run(dataclasses.replace(GROUPS, shared_inner=16))(params, x)
    np.testing.assert_allclose(found.reshape(-1, 32), wanted, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["groups", "not normalised", "softmax"])
def test_gradients(name, way):
    """Of every parameter and of x, against every token through every expert."""
    params, x = drawn(CASES[name])
    part = jax.random.normal(jax.random.key(5), x.shape)
    loss = lambda f: jax.jit(jax.grad(lambda p, x: jnp.sum(part * f(p, x)), (0, 1)))  # noqa: E731
    found, wanted = loss(run(CASES[name]))(params, x), loss(functools.partial(dense, CASES[name]))(params, x)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        if "bias" in jax.tree_util.keystr(path):
            assert not a.any(), "the bias is for choosing alone"
        else:
            assert np.abs(b).max() > 0.1
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


def test_parameters():
    """Their names and shapes, and how a mesh divides them."""
    params, _ = drawn(GROUPS)
    shapes = {jax.tree_util.keystr(path, simple=True, separator="."): a.shape
              for path, a in jax.tree_util.tree_leaves_with_path(params)}
    assert shapes == {"router.kernel": (D, 16), "router.bias": (16,),
                      "experts.gate.kernel": (16, D, 16), "experts.up.kernel": (16, D, 16),
                      "experts.down.kernel": (16, 16, D), "shared.gate.kernel": (D, 32), "shared.up.kernel": (D, 32),
                      "shared.down.kernel": (32, D)}
    assert "bias" not in drawn(SOFTMAX)[0]["router"] and "shared" not in drawn(SOFTMAX)[0]
    made = jax.jit(Experts(SOFTMAX, scale=0.5).init)(jax.random.key(0), jnp.zeros((1, 1, D)))["params"]["experts"]
    assert 0.009 < np.std(made["down"]["kernel"]) < 0.011 and 0.018 < np.std(made["up"]["kernel"]) < 0.022


def test_a_row_does_not_depend_on_its_batch():
    """Bit for bit in a batch of the same size, whatever the others ask for; to rounding in one of another size."""
    params, x = drawn(GROUPS, shape=(6, 40))
    step = run(GROUPS)
    alike = x.at[1:].set(x[0, 0])  # all others to the experts of one token
    np.testing.assert_array_equal(step(params, alike)[0], step(params, x)[0])
    np.testing.assert_array_equal(step(params, x[::-1])[::-1], step(params, x))
    np.testing.assert_allclose(step(params, x[:1])[0], step(params, x)[0], atol=1e-4)


@pytest.mark.parametrize("count", [1, 7, 300])
def test_all_tokens_to_the_same_experts(count, way):
    """No token is dropped, however many choose an expert, and the others get no gradient."""
    params, x = drawn(SIGMOID, shape=(1, count))
    params["router"]["bias"] = jnp.zeros(8).at[jnp.array([2, 5])].set(9.0)
    wanted, chosen = looped(SIGMOID, params, x)
    assert {tuple(sorted(c)) for c in chosen} == {(2, 5)}
    np.testing.assert_allclose(run(SIGMOID)(params, x), wanted, atol=2e-5 * np.abs(wanted).max())
    grad = jax.jit(jax.grad(lambda p: jnp.sum(run(SIGMOID)(p, x) ** 2)))(params)["experts"]
    for kernel in (grad[name]["kernel"] for name in ("gate", "up", "down")):
        moved = [e for e in range(8) if kernel[e].any()]
        assert moved == [2, 5]


def test_places_of_pairs():
    """Each expert's pairs stand together, in blocks of their own, in the order they came."""
    for pairs, count in ((1, 8), (256, 4), (4096, 2)):
        expert = np.random.default_rng(pairs).integers(0, count, pairs)
        place, rows, _ = map(np.asarray, experts.by_expert(jnp.asarray(expert), count))
        assert len(set(place)) == pairs and place.min() >= 0 and place.max() < rows <= 2 * pairs + 8 * count
        for mine in (place[expert == e] for e in set(expert)):
            assert mine[0] % 8 == 0 and (np.diff(mine) == 1).all()


def test_bfloat16():
    params, x = drawn(GROUPS)
    found, wanted = run(GROUPS, jnp.bfloat16)(params, x), run(GROUPS)(params, x)
    assert found.dtype == jnp.float32
    off = np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2))
    assert 1e-4 < off < 0.02, off


class Blocks(nn.Module):
    """Three blocks as a trunk has them, scanned and remade in the backward pass."""

    dims: DecoderConfig

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            dims: DecoderConfig

            @nn.compact
            def __call__(self, x, _):
                return x + Experts(self.dims, name="mlp")(x), None

        block = nn.remat(Block, prevent_cse=False)
        return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast,
                       length=3)(self.dims)(x, None)[0]


@pytest.mark.parametrize("shape", [pytest.param((1, 8, 1), marks=pytest.mark.slow), (2, 2, 2)])
def test_on_a_mesh(shape):
    """Values and gradients on 8 devices, parameters and rows divided as in training, are those of one device."""
    dims = dataclasses.replace(GROUPS, experts=8)
    x = jax.random.normal(jax.random.key(1), (8, 16, D))
    params = jax.tree.map(lambda a: 6 * a, jax.jit(Blocks(dims).init)(jax.random.key(0), x)["params"])
    mesh = jax.make_mesh(shape, parallel.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    where, rows = parallel.state_shardings(mesh, params, SPLIT), parallel.batch_sharding(mesh)
    assert shape[1] == 1 or all("fsdp" in s.spec for s in jax.tree.leaves(where))
    total = lambda p, x: jnp.sum(jnp.cos(Blocks(dims).apply({"params": p}, x)))  # noqa: E731
    step = jax.value_and_grad(total)
    with parallel.made_for(mesh):
        found = jax.jit(step)(jax.device_put(params, where), jax.device_put(x, rows))
        over = parallel.OverBatch(mesh)(lambda p, x: (total(p, x), x))
        summed = jax.jit(over)(jax.device_put(params, where), jax.device_put(x, rows))[0]
    wanted = jax.jit(step)(params, x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if np.any(b):
            np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())
    np.testing.assert_allclose(summed, wanted[0], rtol=2e-5)


def test_each_device_works_for_its_own_rows():
    params, x = drawn(SOFTMAX)[0], jnp.zeros((8, 256, D))
    mesh = jax.make_mesh((2, 2, 2), parallel.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    whole = run(SOFTMAX).lower(params, x).compile().cost_analysis()["flops"]
    with parallel.made_for(mesh):
        mine = run(SOFTMAX).lower(params, jax.device_put(x, parallel.batch_sharding(mesh))).compile()
    assert mine.cost_analysis()["flops"] < whole / 4
