"""Recurrent depth: the loop is the stack it stands for, caches of its iterations, and the diagonal sampler."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax.config import resolve
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.models.attention import Seen
from hdlm_jax.models.decoder import Block
from hdlm_jax.models.looped import START, drawn_loops
from hdlm_jax.training.state import build

V, S, R = 257, 12, 4
SETTINGS: dict = {
    "tokenizer": {"kind": "bytes", "vocab_size": V}, "hierarchy": {"clusters": (1,)},
    "diffusion": {"process": "autoregressive", "weighting": "constant"},
    "model": {"trunk": "decoder", "width": 16, "blocks": 4, "heads": 2, "seq_len": S, "time_conditioning": False,
              "remat": "none"},
    "decoder": {"loops": R, "loops_back": 2, "prelude": 1, "coda": 1, "kv_heads": 1}}


def settings(**changes):
    return resolve({name: SETTINGS.get(name, {}) | changes.get(name, {}) for name in SETTINGS | changes})


@functools.cache
def made(**dims):
    """(config, network, process, parameters) with weights large enough for the tokens to matter."""
    c = settings(decoder=dict(dims))
    network, process = build(c, Hierarchy.from_parents([], vocab_size=V))
    params = network.init_params(jax.random.key(0), S)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    params = jax.tree.map(lambda a: a + 0.25 * jax.random.normal(next(keys), a.shape), params)
    return c, network, process, params


def texts(rows, seed=0):
    return jax.random.randint(jax.random.key(seed), (rows, S), 0, V)


def unrolled(network, params, z, s, segment=None, loops=R, kept=lambda i, tree: tree):
    """Prelude, core, .., core, coda by hand, one block after the other; s: the states that it starts from."""
    sizes = (network.dims, network.sizes, network.dims.passed(network.blocks), jnp.float32, "xla")
    places, seen = network._places(jnp.arange(S)[None], S), Seen.of(segment, True)

    def block(params, name, x, i=0):
        own = jax.tree.map(lambda a: a[i], params[name])
        return Block(*sizes).apply({"params": own}, x, places, seen, False, 0)[0]

    def norm(x, weight):
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + network.dims.eps) * weight["weight"][None, None]

    x = jnp.where(z[..., None] < V, params["embedding"][jnp.minimum(z, V - 1)], params["states"][jnp.maximum(z - V, 0)])
    e = block(params, "prelude", x)
    for n in range(loops):
        p, now = kept(n, (params, e))
        s = jnp.concatenate([s, now], -1) @ p["adapter"]["kernel"]
        s = norm(block(p, "stack", block(p, "stack", s), 1), p["state_norm"])
    return norm(block(params, "coda", s), params["norm"])


def test_the_loop_is_the_stack_it_stands_for():
    _, network, process, params = made()
    z, segment = process.shifted(texts(2)), jnp.arange(S)[None].repeat(2, 0) // 5
    for seg in (None, segment):
        want = jax.jit(functools.partial(unrolled, network))(params, z, jnp.zeros((2, S, 16)), seg)
        got = jax.jit(network.hidden)(params, z, jnp.zeros(2), seg)
        np.testing.assert_allclose(got, want, atol=2e-5)
