"""The decoder-only trunk: logits of the originals, what would go wrong silently, caches, adaptation, low rank."""
import dataclasses
import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax import config
from hdlm_jax.config import ConfigError, DecoderConfig, ModelConfig
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.models.decoder import Decoder, frequencies, merged
from hdlm_jax.models.families import layout_of, understood, unfused
from hdlm_jax.models.heads import FactorisedHead, FlatHead, padded
from hdlm_jax.models.make import make_network
from hdlm_jax.models.weight_files import Tensor, check, load
from hdlm_jax.training.adapt import adapted, start_table
from hdlm_jax.training.state import init_state, make_optimizer

V = families.V
TOKENS = Hierarchy.from_parents([], vocab_size=V)
CLUSTERS = Hierarchy.from_parents([np.arange(V) % 6])


def rows(array, n):
    return np.pad(array, ((0, n - len(array)), (0, 0)))


@functools.cache
def imported(name):
    """(what was understood, parameters) of a family's tiny model."""
    found = understood(families.config(name), name)
    tensors = unfused({key: Tensor(a.shape, lambda a=a: a) for key, a in families.weights(name).items()}, found)
    layout = layout_of(found)
    check({key: tensor.shape for key, tensor in tensors.items()}, layout)
    params = load(lambda key: tensors[key].read(), layout)
    n = padded(V)
    params["embedding"] = rows(params["embedding"], n)
    params["states"] = np.zeros((128, params["embedding"].shape[1]), np.float32)
    head = {"bias": np.zeros(n, np.float32)}
    params["head"] = head | ({"kernel": rows(params["head"]["kernel"], n)} if "head" in params else {})
    return found, params


def network(found, hierarchy=TOKENS, causal=False, head=FlatHead, **changes):
    dims, m = dataclasses.replace(DecoderConfig(**found.decoder), **changes), ModelConfig(**found.model)
    return Decoder(head(hierarchy), hierarchy.padded_states, m.width, m.blocks, m.heads, causal=causal, dims=dims,
                   tied=m.tied)


def logits(net, params, ids, segment=None):
    h = net.hidden(params, jnp.asarray(ids), jnp.zeros(len(ids)), segment)
    return np.asarray(net.head.logits(net.head_params(params), h))


CASES = [(name, kind) for name in families.NAMES for kind in families.case(name) if kind != "ids"]


@pytest.mark.parametrize("name, kind", CASES)
def test_logits_are_those_of_the_original(name, kind):
    found, params = imported(name)
    case = families.case(name)
    net = network(found, causal=kind == "causal", context="block" if kind == "block" else "full",
                  block=families.BLOCK, shifted=False)
    got = logits(net, params, case["ids"])
    assert np.abs(got - case[kind]).max() < 1e-5 * np.abs(case[kind]).max()
    for other in set(case) - {"ids", kind}:  # another mask is another function
        assert np.abs(got - case[other]).max() > 0.3


def swapped(params, a, b):
    mlp = params["stack"]["mlp"]
    return {**params, "stack": {**params["stack"], "mlp": {**mlp, a: mlp[b], b: mlp[a]}}}


def interleaved(params):
    """q and k as llama.cpp keeps them for this architecture."""
    def turned(kernel, heads):
        n = kernel.shape[-1] // heads
        return kernel.reshape(*kernel.shape[:2], heads, 2, n // 2).swapaxes(-1, -2).reshape(kernel.shape)

    stack = params["stack"]
    return {**params, "stack": {**stack, **{
        name: {**stack[name], "kernel": turned(stack[name]["kernel"], heads)} for name, heads in (("q", 4), ("k", 2))}}}


def tiled(params):
    """Heads of queries in the order in which tiled heads of keys would serve them."""
    q = params["stack"]["q"]["kernel"]
    order = q.reshape(*q.shape[:2], 2, 2, -1).swapaxes(2, 3).reshape(q.shape)
    return {**params, "stack": {**params["stack"], "q": {"kernel": order}}}


TRAPS = {"theta": ("llama_tied", dict(theta=1e3), None), "eps": ("llama", dict(eps=1e-6), None),
         "scaling": ("llama", dict(scaling=""), None), "gelu": ("llama", dict(activation="gelu"), None),
         "interleaved": ("llama", {}, interleaved), "tiled": ("llama", {}, tiled),
         "gate_up": ("llama", {}, lambda p: swapped(p, "gate", "up")),
         "offset": ("gemma3_text", dict(norm_offset=0.0), None),
         "final_norm": ("llama", {}, lambda p: {**p, "norm": {"weight": np.ones_like(p["norm"]["weight"])}}),
         "biases": ("qwen2", dict(qkv_bias=False), None), "qk_norm": ("qwen3", dict(qk_norm=False), None),
         "head_dim": ("gemma3_text", dict(query_scale=16.0), None), "window": ("gemma3_text", dict(window=5), None),
         "window_theta": ("gemma3_text", dict(window_theta=1e4), None),
         "post_norms": ("gemma3_text", dict(post_norms=False), None),
         "embeddings": ("gemma3_text", dict(scale_embeddings=False), None)}


@pytest.mark.parametrize("name", TRAPS)
def test_what_would_go_wrong_silently_shows(name):
    """Each is at least a hundred times the tolerance of the test above."""
    family, changes, change = TRAPS[name]
    found, params = imported(family)
    case = families.case(family)
    params = jax.tree.map(np.asarray, change(params) if change else params)
    got = logits(network(found, causal=True, **changes), params, case["ids"])
    assert np.abs(got - case["causal"]).max() > 1e-3 * np.abs(case["causal"]).max()


def test_a_causal_model_read_both_ways_sees_its_answers():
    """Why import makes it autoregressive, which is causal: the next token's own key is among what is seen."""
    found, params = imported("llama")
    ids = families.case("llama")["ids"]
    other = np.array(ids)
    other[:, 9] = (other[:, 9] + 5) % V
    for causal in (True, False):
        a, b = (logits(network(found, causal=causal), params, z)[:, 8] for z in (ids, other))
        assert np.array_equal(a, b) == causal


def test_frequencies():
    dims = DecoderConfig(theta=1e4, scaling="llama3 factor=8 low=1 high=4 length=64")
    plain, scaled = frequencies(DecoderConfig(theta=1e4), 32), frequencies(dims, 32)
    for before, after in zip(plain, scaled, strict=True):
        length = 2 * np.pi / before
        if length > 64:
            want = before / 8
        elif length < 16:
            want = before
        else:
            smooth = (64 / length - 1) / 3
            want = (1 - smooth) * before / 8 + smooth * before
        np.testing.assert_allclose(after, want, rtol=1e-12)
    linear = DecoderConfig(theta=1e4, scaling="linear factor=4")
    np.testing.assert_allclose(frequencies(linear, 32), plain / 4)
    np.testing.assert_allclose(frequencies(dims, 32, local=True), frequencies(DecoderConfig(), 32))


KINDS = {"grouped": dict(kv_heads=2), "shifted": dict(qk_norm=True, head_dim=16, shifted=True),
         "gemma": dict(window=4, window_every=2, post_norms=True, norm_offset=1.0, scale_embeddings=True,
                       query_scale=7.0, tied=True, activation="gelu", softcap=5.0),
         "block": dict(context="block", block=4, shifted=True, qkv_bias=True, rotary_share=0.5),
         "experts": dict(experts=4, experts_per_token=2, expert_inner=16, dense_blocks=1, shared_inner=8),
         "lora": dict(lora=2)}


def tiny(process="hierarchical", clusters=(1,), head="flat", param_dtype="float32", tied=False, **dims):
    c = config.default()
    c.tokenizer.vocab_size = 257
    c.tokenizer.kind = "bytes"
    c.hierarchy.clusters = clusters
    c.diffusion.process = process
    c.diffusion.weighting = "constant"
    c.model.update(trunk="decoder", time_conditioning=False, width=32, heads=4, blocks=3, seq_len=16, head=head,
                   prototypes=2, param_dtype=param_dtype, tied=tied)
    c.decoder.update(dims)
    return config.resolve(c)


def made(hierarchy=None, seed=0, **kinds):
    settings = tiny(**kinds)
    hierarchy = hierarchy or Hierarchy.from_parents([], vocab_size=257)
    net = make_network(settings, hierarchy)
    params = net.init_params(jax.random.key(seed), 16)
    noise = lambda path, a: a + 0.1 * jax.random.normal(  # noqa: E731
        jax.random.key(len(path) * 7 + a.size), a.shape).astype(a.dtype)
    return settings, net, jax.tree_util.tree_map_with_path(noise, params)


@pytest.mark.parametrize("kind", [kind if kind == "block" else pytest.param(kind, marks=pytest.mark.slow)
                                  for kind in KINDS])
def test_some_positions_given_keys_and_values_of_the_others(kind):
    _, net, params = made(**KINDS[kind])
    z = jax.random.randint(jax.random.key(1), (2, 16), 0, 258)
    want, row = net.hidden(params, z, jnp.zeros(2)), jnp.arange(2)[:, None]
    order = jax.vmap(lambda key: jax.random.permutation(key, 16))(jax.random.split(jax.random.key(2), 2))
    sees = jnp.ones((2, 1, 16), bool)
    got, cache = net.hidden_at(params, z[row, order], jnp.zeros(2), net.empty_cache(2, 16), order, sees)
    np.testing.assert_allclose(got, want[row, order], atol=2e-5)
    some = order[:, :5]  # nothing has changed: they come out as they were
    again, _ = net.hidden_at(params, z[row, some], jnp.zeros(2), cache, some, sees)
    np.testing.assert_allclose(again, want[row, some], atol=2e-5)


@pytest.mark.parametrize("kind", ["grouped", pytest.param("gemma", marks=pytest.mark.slow), "experts"])
def test_token_by_token_as_all_at_once(kind):
    _, net, params = made(process="autoregressive", **KINDS[kind])
    z = jax.random.randint(jax.random.key(1), (2, 16), 0, 258)
    want, cache = logits(net, params, z), net.empty_cache(2, 16)
    @jax.jit
    def step(params, cache, z, at):
        cache, found = net.next_token(params, cache, z, at)
        return cache, found.logits

    for i in range(16):
        cache, found = step(params, cache, z[:, i : i + 1], jnp.int32(i))
        np.testing.assert_allclose(found, want[:, i], atol=3e-5)


def test_shifted_logits_stop_where_a_text_begins():
    _, net, params = made(shifted=True)
    z, segment = jax.random.randint(jax.random.key(1), (1, 16), 0, 257), jnp.arange(16)[None] // 6
    _, own, _ = made()
    h, plain = (n.hidden(params, z, jnp.zeros(1), segment)[0] for n in (net, own))
    want = plain[np.array([0, 0, 1, 2, 3, 4, 6, 6, 7, 8, 9, 10, 12, 12, 13, 14])]
    np.testing.assert_array_equal(h, want)


def test_a_block_sees_itself_and_those_before():
    _, net, params = made(context="block", block=4)
    z = jax.random.randint(jax.random.key(1), (1, 16), 0, 257)
    other = z.at[0, 9].add(1)
    same = np.all(np.asarray(net.hidden(params, z, jnp.zeros(1)) == net.hidden(params, other, jnp.zeros(1)))[0], -1)
    assert list(same) == [True] * 8 + [False] * 8


def test_bfloat16_parameters_and_tied_heads():
    _, net, params = made(param_dtype="bfloat16", tied=True, qkv_bias=True)
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(params)}
    assert kinds == {"bfloat16", "float32"} and params["stack"]["q"]["bias"].dtype == "float32"
    assert "kernel" not in params["head"]
    z = jax.random.randint(jax.random.key(1), (1, 16), 0, 257)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), params)
    np.testing.assert_allclose(logits(net, params, z), logits(net, wide, z), atol=1e-5)
    up = {**wide, "embedding": wide["embedding"].at[7].add(1.0)}
    assert np.abs(logits(net, up, z) - logits(net, wide, z))[..., 7].max() > 0.5


def test_low_rank_additions():
    """Nothing at first, W + A B merged, and no step changes anything else."""
    settings, net, params = made(lora=2, qkv_bias=True)
    z = jax.random.randint(jax.random.key(1), (1, 16), 0, 257)
    fresh = net.init_params(jax.random.key(0), 16)
    plain = make_network(tiny(qkv_bias=True), net.head.hierarchy)
    np.testing.assert_array_equal(logits(net, fresh, z), logits(plain, merged(fresh), z))
    np.testing.assert_allclose(logits(net, params, z), logits(plain, merged(params), z), atol=3e-5)
    tx, _ = make_optimizer(settings)
    state = init_state(settings, net, tx, jax.random.key(0))
    loss = lambda p: jnp.sum(net.head.logits(net.head_params(p), net.hidden(p, z, jnp.zeros(1)))**2)  # noqa: E731
    updates, _ = tx.update(jax.grad(loss)(params), state.opt_state, params)
    changed = {".".join(key.key for key in path) for path, a in jax.tree.leaves_with_path(updates) if np.any(a)}
    assert changed and all("lora" in name or name == "states" for name in changed)
    kept = sum(a.size for a in jax.tree.leaves(state.opt_state))
    assert kept < 0.4 * sum(a.size for a in jax.tree.leaves(params))  # no moments of what stays


@pytest.mark.parametrize("head", ["flat", "factorised"])
def test_an_autoregressive_model_becomes_a_hierarchical_one(head):
    """Without noise, under a causal mask, it is the model it was; clusters and mask begin as means of their tokens."""
    found, params = imported("llama")
    kind = FlatHead if head == "flat" else functools.partial(FactorisedHead, prototypes=2)
    base, net = network(found, causal=True), network(found, CLUSTERS, head=kind, shifted=True)
    new = jax.jit(lambda p: adapted(jax.random.key(0), p, base, net, 24, False))(params)
    ids = families.case("llama")["ids"]
    causal = jnp.tri(24, dtype=bool)[None]
    h = net.hidden(new, jnp.asarray(ids), jnp.zeros(2), causal)
    np.testing.assert_allclose(h[:, 1:], base.hidden(params, ids, jnp.zeros(2))[:, :-1], atol=1e-5)
    want = families.case("llama")["causal"][:, :-1]
    if head == "flat":
        got = net.head.logits(net.head_params(new), h)[:, 1:]
        assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
    else:  # within a cluster as it was; the clusters themselves by means over their tokens
        node = np.arange(V) % 6
        got, x = net.head.predict(net.head_params(new), h[:, 1:]), node[ids[:, 1:]] + 6
        probs = np.exp(want - np.log(np.exp(want).sum(-1, keepdims=True)))
        mass = np.stack([probs[..., node == c].sum(-1) for c in range(6)], -1)
        pick = lambda a, at: np.take_along_axis(a, at[..., None], -1)[..., 0]  # noqa: E731
        np.testing.assert_allclose(got.log_within(jnp.asarray(x)), np.log(pick(probs, x) / pick(mass, node[x])),
                                   atol=2e-4)
        flat = net.head.predict(net.head_params(new), jnp.zeros((1, 48))).log_masses(1)
        np.testing.assert_allclose(np.exp(flat)[0], np.full(6, 1 / 6), atol=1e-6)
    table, tokens = np.asarray(net.table(new)), np.asarray(params["embedding"])[:V]
    np.testing.assert_allclose(table[V + 2], tokens[2::6].mean(0), atol=1e-6)
    np.testing.assert_allclose(table[CLUSTERS.mask_id], tokens.mean(0), atol=1e-6)


def test_a_mask_that_is_known_stays():
    table = jnp.asarray(np.random.default_rng(0).standard_normal((V + 31, 8)), jnp.float32)
    np.testing.assert_array_equal(start_table(table, TOKENS, CLUSTERS, True)[-1], table[V])
    np.testing.assert_array_equal(start_table(table, TOKENS, TOKENS, False), table[: V + 1])


@pytest.mark.parametrize("wrong, says", [
    (dict(kv_heads=3), "must divide model.heads=4"), (dict(scaling="yarn factor=2"), "choose one of linear, llama3"),
    (dict(scaling="llama3 factor=2"), "llama3 needs factor, low, high, length"),
    (dict(rotary_share=0.0), "must lie in"),
    (dict(head_dim=5), "must be even"), (dict(experts=4, experts_per_token=8), "there are 4 experts"),
    (dict(experts=4, dense_blocks=3, experts_per_token=2), "must be fewer than model.blocks=3"),
    (dict(context="half"), "choose one of full, block"),
    (dict(softcap=30.0, head="factorised", clusters=(8,)), "softcap=30.0: is of a flat head's logits")])
def test_wrong_settings_are_one_line(wrong, says):
    with pytest.raises(ConfigError, match=says):
        tiny(**wrong)


def test_settings_of_a_decoder_need_one():
    c = config.default()
    c.decoder.theta = 1e6
    with pytest.raises(ConfigError, match="model.trunk='dit': the settings of decoder are for"):
        config.resolve(c)
    c.model.trunk = "decoder"
    with pytest.raises(ConfigError, match="model.time_conditioning=True: the decoder is not told t"):
        config.resolve(c)
