"""The transformer against an independent float64 numpy twin, and against outputs of the published PyTorch network."""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax import config
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.levels import LevelChain
from hdlm_jax.models.attention import Seen, attention
from hdlm_jax.models.heads import FactorisedHead, FlatHead
from hdlm_jax.models.make import flops_per_token, make_network
from hdlm_jax.models.network import Network

B, S, V, N = 3, 10, 150, 256
FLAT = FlatHead(Hierarchy.from_parents([], vocab_size=V))
SIZES = {"head": FLAT, "num_states": N, "width": 16, "blocks": 2, "heads": 2}


def random_params(network, seed=0, scale=0.3):
    """Weights of the network's shapes, none of them zero (most of the published starts are)."""
    z = jnp.zeros((1, S), jnp.int32)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), z, jnp.zeros((1,))))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(scale * rng.standard_normal(a.shape), jnp.float32), shapes)


def inputs(seed=1):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, N, (B, S)), jnp.int32), jnp.asarray(rng.random(B), jnp.float32)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("train", "method"))
def apply(network, params, z, t, segment=None, **kwargs):
    return network.apply({"params": params}, z, t, segment, **kwargs)


# ------------------------------------------------------------------------------------------------- the numpy twin


def silu(x):
    return x / (1 + np.exp(-x))


def numpy_norm(x, weight):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def numpy_rotate(x):
    """x [B, S, H, d]: pairs (i, i + d/2) turn by position * 10000^(-2i/d)."""
    half = x.shape[-1] // 2
    out = np.empty_like(x)
    for position in range(x.shape[1]):
        for i in range(half):
            angle = position * 10000.0 ** (-2 * i / x.shape[-1])
            a, b = x[:, position, :, i], x[:, position, :, i + half]
            out[:, position, :, i] = a * math.cos(angle) - b * math.sin(angle)
            out[:, position, :, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def numpy_time(p, t):
    angle = t[:, None] * np.exp(-math.log(10000) * np.arange(128) / 128)[None]
    sinusoids = np.concatenate([np.cos(angle), np.sin(angle)], -1)
    hidden = silu(sinusoids @ p["time_in"]["kernel"] + p["time_in"]["bias"])
    return silu(hidden @ p["time_out"]["kernel"] + p["time_out"]["bias"])


def numpy_network(params, z, t, heads, valid=None):
    """Logits [B, S, padded V] in float64; no time conditioning where params know no time."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    cond = numpy_time(p, np.asarray(t, np.float64)) if "time_in" in p else None

    def modulation(m, parts):
        out = m["bias"] if cond is None else cond @ m["kernel"] + m["bias"]
        return np.split(out.reshape(-1, 1, out.shape[-1]), parts, -1)

    x = p["embedding"][np.asarray(z)]
    b, s, d = x.shape
    for i in range(p["stack"]["norm1"]["weight"].shape[0]):
        w = jax.tree.map(lambda a, i=i: a[i], p["stack"])
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(w["modulation"], 6)
        h = numpy_norm(x, w["norm1"]["weight"]) * (1 + scale1) + shift1
        q, k, v = ((h @ w["qkv"]["kernel"][:, i]).reshape(b, s, heads, -1) for i in range(3))
        scores = np.einsum("bqhd,bkhd->bhqk", numpy_rotate(q), numpy_rotate(k)) / math.sqrt(d // heads)
        if valid is not None:
            scores = np.where(np.asarray(valid)[:, None, None, :], scores, -1e30)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        attended = np.einsum("bhqk,bkhd->bqhd", scores / scores.sum(-1, keepdims=True), v).reshape(b, s, d)
        x = x + gate1 * (attended @ w["out"]["kernel"])
        h = numpy_norm(x, w["norm2"]["weight"]) * (1 + scale2) + shift2
        h = h @ w["up"]["kernel"] + w["up"]["bias"]
        h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + gate2 * (h @ w["down"]["kernel"] + w["down"]["bias"])
    shift, scale = modulation(p["modulation"], 2)
    h = numpy_norm(x, p["norm"]["weight"]) * (1 + scale) + shift
    return h @ p["head"]["kernel"].T + p["head"]["bias"]


@pytest.mark.parametrize("time, padded, tied", [
    (True, False, False), (True, True, False), (False, False, False), (True, False, True)])
def test_equals_numpy(time, padded, tied):
    network = Network(**SIZES, time_conditioning=time, tied=tied)
    params, (z, t) = random_params(network), inputs()
    valid = np.ones((B, S), bool)
    if padded:
        valid[0, 6:] = False
    logits = apply(network, params, z, t, jnp.asarray(valid, jnp.int32) if padded else None)
    if tied:
        assert list(params["head"]) == ["bias"]
        params = {**params, "head": params["head"] | {"kernel": params["embedding"][:N]}}
    want = numpy_network(params, z, t, SIZES["heads"], valid)[..., :V]
    assert logits.shape == (B, S, V) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[valid], want[valid], rtol=1e-4, atol=1e-5 * np.abs(want).max())
    assert np.std(want) > 0.1


# --------------------------------------------------------------------------------------- the published PyTorch network


def test_equals_published_network(data_dir):
    """The same weights give the outputs that the published PyTorch network gave (constant logit_bias added)."""
    path = data_dir / "published_dit" / "dit_random.npz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    with np.load(path) as data:
        data = dict(data)
    w = {name[2:]: value for name, value in data.items() if name.startswith("w/")}
    linear = lambda name: {"kernel": w[f"{name}.weight"].T}  # noqa: E731  (torch keeps [out, in])
    affine = lambda name: linear(name) | {"bias": w[f"{name}.bias"]}  # noqa: E731

    def block(i):
        b = f"blocks.{i}."
        return {"norm1": {"weight": w[b + "norm1.weight"]}, "norm2": {"weight": w[b + "norm2.weight"]},
                "qkv": {"kernel": linear(b + "attn_qkv")["kernel"].reshape(32, 3, 32)}, "out": linear(b + "attn_out"),
                "up": affine(b + "mlp.0"), "down": affine(b + "mlp.2"), "modulation": affine(b + "adaLN_modulation")}

    head = FlatHead(Hierarchy.from_parents([], vocab_size=128))
    network = Network(head, num_states=128, width=32, blocks=2, heads=4, cond=16)
    params = {"embedding": w["vocab_embed.embedding"], "time_in": affine("sigma_map.mlp.0"),
              "time_out": affine("sigma_map.mlp.2"), "stack": jax.tree.map(lambda *a: np.stack(a), block(0), block(1)),
              "norm": {"weight": w["output_layer.norm_final.weight"]},
              "modulation": affine("output_layer.adaLN_modulation"),
              "head": {"kernel": w["output_layer.linear.weight"], "bias": w["output_layer.linear.bias"]}}
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes == jax.tree.map(jnp.shape, random_params(network)), "every parameter of ours, in our shape"
    z, t, attn = jnp.asarray(data["z"], jnp.int32), jnp.asarray(data["t"]), data["attn"].astype(bool)
    bias = w["logit_bias"]
    np.testing.assert_allclose(apply(network, params, z, t) + bias, data["tok"], rtol=1e-4, atol=1e-5)
    masked = apply(network, params, z, t, jnp.asarray(attn)) + bias
    assert not attn.all()
    np.testing.assert_allclose(masked[attn], data["tok_masked"][attn], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(numpy_network(params, z, t, 4) + bias, data["tok"], rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- what it is


def test_start():
    """Published start: the model knows nothing (uniform), all modulations are zero, embeddings within 1/sqrt(D)."""
    network = Network(**SIZES)
    z, t = inputs()
    params = jax.jit(network.init)(jax.random.key(0), z, t)["params"]
    assert not np.any(apply(network, params, z, t))
    limit = 1 / math.sqrt(SIZES["width"])
    assert params["embedding"].shape == (N, SIZES["width"])
    assert limit * 0.98 < np.abs(params["embedding"]).max() <= limit
    zero = [params["stack"]["modulation"], params["modulation"], params["head"]]
    assert not any(np.any(a) for a in jax.tree.leaves(zero))
    assert params["head"]["kernel"].shape == (256, SIZES["width"]), "padded to a multiple of 128"
    fan_in = {"qkv": 16, "out": 16, "up": 16, "down": 64}
    for name, n in fan_in.items():
        kernel = np.asarray(params["stack"][name]["kernel"])
        assert 0.9 / math.sqrt(n) < np.abs(kernel).max() <= 1 / math.sqrt(n), name
        assert ("bias" in params["stack"][name]) == (name in ("up", "down"))
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert all(a.shape[0] == SIZES["blocks"] for a in jax.tree.leaves(params["stack"])), "stacked for the scan"
    first, second = np.asarray(params["stack"]["qkv"]["kernel"])
    assert np.abs(first - second).max() > 0.1, "each block with its own draw"


def test_time_conditioning():
    z, t = inputs()
    on, off = Network(**SIZES), Network(**SIZES, time_conditioning=False)
    params = random_params(on)
    assert np.abs(apply(on, params, z, t) - apply(on, params, z, 1 - t)).max() > 1e-2
    params = random_params(off)
    np.testing.assert_array_equal(apply(off, params, z, t), apply(off, params, z, 1 - t))
    assert "time_in" not in params and "kernel" not in params["modulation"]


def test_padding_is_not_seen():
    network = Network(**SIZES)
    params, (z, t) = random_params(network), inputs()
    valid = np.arange(S)[None] < np.array([[S], [6], [3]])
    other = jnp.where(jnp.asarray(valid), z, (z + 7) % N)
    a, b = (np.asarray(apply(network, params, x, t, jnp.asarray(valid, jnp.int32))) for x in (z, other))
    np.testing.assert_array_equal(a[valid], b[valid])
    a, b = (np.asarray(apply(network, params, x, t)) for x in (z, other))
    assert np.abs(a[1:] - b[1:])[valid[1:]].max() > 1e-2, "without a segment it is seen"


def test_documents_of_a_row_are_as_if_alone():
    network = Network(**SIZES)
    params, (z, t) = random_params(network), inputs()
    segment = jnp.broadcast_to(jnp.asarray([[0] * 3 + [1] * 4 + [-1] * 3]), z.shape)
    packed = np.asarray(apply(network, params, z, t, segment))
    for first, end in ((0, 3), (3, 7)):
        alone = apply(network, params, z[:, first:end], t)
        np.testing.assert_allclose(packed[:, first:end], alone, rtol=1e-4, atol=1e-4)
    assert np.abs(packed - np.asarray(apply(network, params, z, t))).max() > 1e-2


@pytest.mark.parametrize("kind", ["cheap", "all"])
def test_remat_changes_memory_not_results(kind):
    plain, remat = (Network(**(SIZES | {"blocks": 1}), remat=flag) for flag in ("none", kind))
    params, (z, t) = random_params(plain), inputs()
    found = {}
    for name, network in (("plain", plain), ("remat", remat)):
        loss = lambda p, network=network: jnp.sum(jnp.sin(network.apply({"params": p}, z, t)))  # noqa: E731
        found[name] = jax.jit(jax.value_and_grad(loss))(params)
        assert ("remat" in str(jax.make_jaxpr(loss)(params))) == (name == "remat")
    (a, grad_a), (b, grad_b) = found.values()
    np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4 * np.abs(x).max()), grad_a, grad_b)


def test_bfloat16_computes_but_does_not_store():
    f32, bf16 = Network(**SIZES), Network(**SIZES, dtype="bfloat16")
    params, (z, t) = random_params(f32), inputs()
    born = jax.eval_shape(lambda: bf16.init(jax.random.key(0), z, t))["params"]
    assert {a.dtype for a in jax.tree.leaves(born)} == {jnp.dtype("float32")}
    a, b = (apply(n, params, z, t, method="trunk") for n in (f32, bf16))
    assert a.dtype == b.dtype == FlatHead(FLAT.hierarchy, jnp.bfloat16).logits(params["head"], b).dtype == jnp.float32
    error = np.abs(a - b).max() / np.std(a)
    assert 1e-3 < error < 0.2, "bfloat16 has 8 bits"


def test_a_tied_head_learns_by_both_uses_of_the_table():
    """The gradient of the embeddings is that of the head's vectors and that of what goes in, summed."""
    tied, own = (Network(**SIZES, tied=tied) for tied in (True, False))
    params, (z, t) = random_params(tied), inputs()
    whole = {**params, "head": params["head"] | {"kernel": params["embedding"]}}
    grads = [jax.grad(lambda p, net=net: jnp.sum(jnp.sin(apply(net, p, z, t))))(p)
             for net, p in ((tied, params), (own, whole))]
    np.testing.assert_allclose(grads[0]["embedding"], grads[1]["embedding"] + grads[1]["head"]["kernel"],
                               rtol=1e-4, atol=1e-4)
    vectors, bias = np.ones((V, SIZES["width"])), np.arange(V, dtype=np.float32)
    again = tied.with_head(params, vectors, bias)  # its bias alone: the vectors are the table's
    assert list(again["head"]) == ["bias"] and again["embedding"] is params["embedding"]
    np.testing.assert_array_equal(again["head"]["bias"][:V], bias)


@pytest.mark.parametrize("kind", ["flat", "factorised"])
def test_denoise_is_the_head_of_the_trunk_at_the_tokens_asked_for(kind):
    head = FLAT if kind == "flat" else FactorisedHead(Hierarchy.from_parents([np.arange(V) % 7]), prototypes=2)
    network = Network(**(SIZES | {"head": head}))
    params, (z, t) = random_params(network), inputs()
    assert apply(network, params, z, t, method="trunk").shape == (B, S, SIZES["width"])
    whole = jax.nn.log_softmax(apply(network, params, z, t)).reshape(B * S, V)
    some = jnp.asarray([7, 0, 29, 7])
    found = network.denoise(params, z, t).select(some).log_probs()
    np.testing.assert_allclose(found, whole[some], rtol=1e-4, atol=1e-4)


def test_dropout_only_in_training():
    plain, network = Network(**SIZES), Network(**SIZES, dropout=0.5)
    params, (z, t) = random_params(plain), inputs()
    quiet = apply(plain, params, z, t)
    np.testing.assert_array_equal(apply(network, params, z, t), quiet)
    draws = [apply(network, params, z, t, train=True, rngs={"dropout": jax.random.key(i)}) for i in (0, 1, 0)]
    assert np.abs(draws[0] - quiet).max() > 1e-2 and np.abs(draws[0] - draws[1]).max() > 1e-2
    np.testing.assert_array_equal(draws[0], draws[2])


def test_attention_on_cpu_is_the_library_s(monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((B, S, 2, 8)), jnp.float32) for _ in range(3))
    mask = jnp.asarray(rng.random((B, 1, 1, S)) < 0.6).at[..., 0].set(True)
    ours = [attention(q, k, v), attention(q, k, v, Seen(mask=mask))]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for mine, theirs in zip(ours, [attention(q, k, v), attention(q, k, v, Seen(mask=mask))], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_make_network_and_its_flops():
    c = config.default()
    c.tokenizer.kind, c.tokenizer.vocab_size = "bytes", 257
    c.hierarchy.clusters = (8,)
    c.model.width, c.model.blocks, c.model.heads, c.model.seq_len = 16, 2, 2, S
    c = config.resolve(c)
    hierarchy = Hierarchy.from_parents([np.arange(257) % 8])
    network = make_network(c, hierarchy)
    params = random_params(network)
    assert params["embedding"].shape == (384, 16) and params["head"]["kernel"].shape == (384, 16)
    products = sum(params["stack"][name]["kernel"].size for name in ("qkv", "out", "up", "down"))
    attended = 2 * 2 * S * 16  # blocks x (scores and values) x positions x width
    # two FLOPs a multiply-add, the backward pass costs two forward ones, half of the tokens reach the head
    process = HierarchicalProcess(hierarchy, LevelChain((1.0, 1.0)))
    assert flops_per_token(c, hierarchy, process) == pytest.approx(6 * (products + attended + 0.5 * 16 * 257), rel=1e-3)
    added = dataclasses.replace(c, decoder=dataclasses.replace(c.decoder, lora=2))  # no gradient of what stays
    assert flops_per_token(added, hierarchy, process) == pytest.approx(2 / 3 * flops_per_token(c, hierarchy, process))
    # a quarter of them show a cluster and need one block; the masked quarter needs the 8 x 3 prototypes
    c = dataclasses.replace(c, model=dataclasses.replace(c.model, head="factorised", prototypes=3))
    want = 6 * (products + attended + 0.25 * 16 * 24 + 0.25 * 16 * 257 / 8)
    assert flops_per_token(c, hierarchy, process) == pytest.approx(want, rel=1e-3)


def test_published_sizes():
    """The three published sizes, by their parameter counts (embedding, output table and time included)."""
    for width, blocks, heads, millions in ((512, 8, 8, 79), (768, 12, 12, 170), (1024, 24, 16, 425)):
        network = Network(FlatHead(Hierarchy.from_parents([np.arange(50257) % 64])), 50432, width, blocks, heads)
        z, t = jnp.zeros((1, 8), jnp.int32), jnp.zeros((1,))
        shapes = jax.eval_shape(network.init, jax.random.key(0), z, t)["params"]
        count = sum(math.prod(a.shape) for a in jax.tree.leaves(shapes))
        assert abs(count / 1e6 / millions - 1) < 0.03, (width, count)
