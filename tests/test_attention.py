"""Kernels of attention against the one written out: values and gradients, whatever a query sees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax import config as configs
from hdlm_jax.common import parallel
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.models import attention as attentions
from hdlm_jax.models import heads
from hdlm_jax.models.attention import Seen, attention, choose
from hdlm_jax.models.network import Network

B, H, D = 2, 2, 16


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(attentions, "INTERPRET", True)


def _arrays(queries, keys, key=0):
    shapes = [(B, n, H, D) for n in (queries, keys, keys)]
    return [jax.random.normal(k, s) for k, s in zip(jax.random.split(jax.random.key(key), 3), shapes, strict=True)]


def _documents(n):
    return jnp.asarray(np.random.default_rng(0).integers(0, 3, (B, n)).cumsum(1) // 50, jnp.int32) - 1


def _block_causal(n):
    block = jnp.arange(n) // 32
    return jnp.broadcast_to(block[:, None] >= block[None], (B, n, n))


SEEN = {
    "all": (128, 128, Seen()),
    "segments": (200, 200, Seen.of(_documents(200))),
    "causal": (256, 256, Seen.of(None, True)),
    "causal segments": (130, 130, Seen.of(_documents(130), True)),
    "active keys": (256, 256, Seen.of((jnp.arange(256)[None] < jnp.array([[256], [77]]))[:, None])),
    "partial queries": (40, 384, Seen.of((jnp.arange(384)[None] < jnp.array([[300], [77]]))[:, None])),
    "block-causal": (96, 96, Seen.of(_block_causal(96))),
    "block-causal queries": (32, 96, Seen.of(_block_causal(96)[:, 32:64])),
}


@pytest.mark.parametrize("name", SEEN)
def test_splash_is_attention_written_out(name):
    queries, keys, seen = SEEN[name]
    arrays = _arrays(queries, keys)
    with jax.default_matmul_precision("highest"):
        out, grads = [], []
        for kernel in ("xla", "splash"):
            of = functools.partial(attention, seen=seen, kernel=kernel)
            out.append(jax.jit(of)(*arrays))
            grads.append(jax.jit(jax.grad(lambda *a, of=of: jnp.sum(jnp.sin(of(*a))), (0, 1, 2)))(*arrays))
    for ours, theirs in zip(jax.tree.leaves((out[0], grads[0])), jax.tree.leaves((out[1], grads[1])), strict=True):
        np.testing.assert_allclose(theirs, ours, atol=5e-6, rtol=2e-6)  # CPUs differ in the last bits of large sums
    by_splash = "pallas" in str(jax.make_jaxpr(functools.partial(attention, seen=seen, kernel="splash"))(*arrays))
    assert by_splash == (not name.startswith("block-causal"))  # any other mask is written out


def test_seen_is_the_mask_it_says():
    """The dense mask by enumeration, queries and keys one by one."""
    for queries, keys, seen in SEEN.values():
        mask = seen.dense(queries, keys)
        mask = np.ones((B, queries, keys), bool) if mask is None else np.broadcast_to(mask, (B, 1, queries, keys))[:, 0]
        for b in range(B):
            for q in range(0, queries, 7):
                for k in range(0, keys, 11):
                    sees = not seen.causal or k <= q
                    if seen.query is not None:
                        sees &= int(seen.query[b, min(q, seen.query.shape[1] - 1)]) == int(seen.key[b, k])
                    if seen.mask is not None:
                        sees &= bool(seen.mask[b, 0, q, k])
                    assert mask[b, q, k] == sees


def test_auto_takes_the_kernel_of_the_machine(monkeypatch):
    def taken(platform, queries=512, keys=512, dim=64, dtype=jnp.bfloat16, seen=None, kernel="auto"):
        monkeypatch.setattr(parallel, "platform", lambda: platform)
        q, k = (jax.ShapeDtypeStruct((1, n, 2, dim), dtype) for n in (queries, keys))
        return choose(kernel, q, k, seen or Seen())

    assert [taken(p) for p in ("cpu", "gpu", "tpu")] == ["xla", "cudnn", "splash"]
    assert taken("tpu", dtype=jnp.float32) == "splash" and taken("gpu", dtype=jnp.float32) == "xla"
    assert taken("tpu", queries=16) == taken("gpu", queries=16) == "xla"
    assert taken("gpu", dim=20) == taken("gpu", queries=511, keys=511) == "xla"
    assert taken("tpu", seen=Seen(mask=jnp.ones((1, 1, 512, 512), bool))) == "xla"
    assert taken("tpu", kernel="xla") == taken("gpu", kernel="xla") == "xla"
    monkeypatch.setattr(attentions, "INTERPRET", False)
    assert taken("cpu", kernel="splash") == taken("cpu", kernel="cudnn") == taken("tpu", kernel="cudnn") == "xla"
    assert set(attentions._KERNELS) | {"auto"} == {"auto", "xla", "splash", "cudnn"}
    for name in ("auto", *attentions._KERNELS):
        configs.resolve({"model": {"attention": name}})
    with pytest.raises(configs.ConfigError, match="auto.*xla.*splash.*cudnn"):
        configs.resolve({"model": {"attention": "flash"}})


@pytest.mark.parametrize("shape", [(2, 2, 2), (4, 1, 1), *(pytest.param(shape, marks=pytest.mark.slow)
                                                for shape in ((1, 4, 1), (4, 1, 2)))])
def test_splash_on_a_mesh(shape, monkeypatch):
    """Rows and heads are divided, inside a shard_map of the batch axes as well, and nothing changes.

    A TPU's compiler takes a kernel only where it has no axis left to split, not one of a single device either.
    """
    left, make = [], attentions._splash_kernel
    monkeypatch.setattr(attentions, "_splash_kernel", lambda *args: left.append(
        set(parallel.AXES) - set(jax.sharding.get_abstract_mesh().manual_axes)) or make(*args))
    mesh = jax.make_mesh(shape, parallel.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3,
                         devices=jax.devices()[: np.prod(shape)])
    q, k, v = (jnp.tile(a, (2, 1, 1, 1)) for a in _arrays(128, 128))
    ids = jnp.tile(_documents(128), (2, 1))
    want = attention(q, k, v, Seen(ids, ids))

    def plain(q, k, v, ids):
        return attention(q, k, v, Seen(ids, ids), "splash")

    def local(params, q, k, v, ids):
        return (), plain(q, k, v, ids)

    def rows(q, k, v, ids):
        one = lambda *a: plain(*(x[None] for x in a))[0]  # noqa: E731
        return jax.vmap(one, spmd_axis_name=parallel.BATCH)(q, k, v, ids)

    over = lambda *a: parallel.OverBatch(mesh)(local)((), *a)[1]  # noqa: E731
    with parallel.made_for(mesh), jax.default_matmul_precision("highest"):
        for run in (plain, over, rows):
            got = jax.jit(run, in_shardings=parallel.batch_sharding(mesh))(q, k, v, ids)
            np.testing.assert_allclose(got, want, atol=5e-6, rtol=0)
    assert left and not any(left), left


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "cheap"])
def test_a_network_with_splash_is_the_same_network(remat):
    """Hidden states and gradients, with documents in a row and a part of it computed against a cache."""
    hierarchy = Hierarchy.from_parents([np.arange(40) % 5], vocab_size=40)
    head = heads.FlatHead(hierarchy, jnp.float32)
    new = functools.partial(Network, head, hierarchy.padded_states, 32, 2, 2, remat=remat)
    params = new().init_params(jax.random.key(0), 128)
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(1), a.shape), params)
    z = jax.random.randint(jax.random.key(2), (B, 128), 0, hierarchy.vocab_size)
    t, position = jnp.array([0.3, 0.7]), jnp.tile(jnp.arange(5, 45), (B, 1))
    seen = (jnp.arange(128)[None] < 100)[:, None].repeat(B, 0)

    def run(kernel, params):
        network = new(attention=kernel)
        hidden = network.hidden(params, z, t, _documents(128))
        room = network.empty_cache(B, 128)
        part, _ = network.hidden_at(params, z[:, 5:45], t, room, position, seen)
        return jnp.sum(jnp.sin(hidden)) + jnp.sum(jnp.sin(part)), (hidden, part)

    with jax.default_matmul_precision("highest"):
        ours, theirs = (jax.jit(jax.grad(functools.partial(run, k), has_aux=True))(params) for k in ("xla", "splash"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5 * max(1.0, float(jnp.max(jnp.abs(a)))), rtol=0)
