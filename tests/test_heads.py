"""Heads over the noised tokens alone: the same numbers as logits of all tokens, in a fraction of the memory."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax.model.heads import FlatHead, map_over_noised, noised_first, sum_over_noised

B, S, D, V = 4, 10, 6, 13


def example(case="some", batch=B, seq=S, words=V, seed=0):
    rng = np.random.default_rng(seed)
    params = {"kernel": jnp.asarray(rng.standard_normal((D, words)), jnp.float32),
              "bias": jnp.asarray(rng.standard_normal(words), jnp.float32)}
    hidden = jnp.asarray(rng.standard_normal((batch, seq, D)), jnp.float32)
    fields = (jnp.asarray(rng.integers(0, words, (batch, seq)), jnp.int32),
              jnp.asarray(rng.random((batch, seq)), jnp.float32))
    some = rng.random((batch, seq)) < 0.4
    some[0], some[1] = False, True  # groups with different numbers of noised tokens
    noised = {"some": some, "none": np.zeros_like(some), "all": np.ones_like(some)}[case]
    return params, hidden, jnp.asarray(noised), fields


def token_loss(params, h, fields):
    """A weighted cross-entropy, and beside it the probability of the word (any shapes [...])."""
    x, weight = fields
    logits = h @ params["kernel"] + params["bias"].reshape((1,) * (h.ndim - 1) + (-1,))
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), x[..., None], -1)[..., 0]
    return -weight * log_p, jnp.exp(log_p)


def dense(params, hidden, noised, fields):
    """Logits of all tokens at once."""
    loss, aux = token_loss(params, hidden, fields)
    return jnp.sum(jnp.where(noised, loss, 0.0)), jnp.sum(jnp.where(noised, aux, 0.0))


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), a, b)


# T = 40 / groups tokens a group: chunks that divide it, that do not, and that are longer than it
@pytest.mark.parametrize("case, groups, chunk", [("some", 1, 7), ("some", 2, 4), ("some", 4, 3), ("some", 4, 64),
                                                 ("none", 2, 7), ("all", 1, 8)])
def test_sum_equals_dense(case, groups, chunk):
    params, hidden, noised, fields = example(case)

    def scaled(total):
        def run(params, hidden):
            loss, aux = total(params, hidden)
            return 3.0 * loss, (loss, aux)  # 3: the cotangent must arrive

        return jax.value_and_grad(run, argnums=(0, 1), has_aux=True)

    want = scaled(lambda p, h: dense(p, h, noised, fields))(params, hidden)
    chunked = lambda p, h: sum_over_noised(token_loss, p, h, noised, fields, groups=groups, chunk=chunk)  # noqa: E731
    found = jax.jit(scaled(chunked))(params, hidden)
    close(found, want)
    d_hidden = np.asarray(found[1][1])
    assert not d_hidden[~np.asarray(noised)].any() and (np.abs(d_hidden[np.asarray(noised)]) > 0).all()
    assert (case == "none") == (float(found[0][1][0]) == 0.0)
    if chunk == 7:  # no gradient is asked for: the other of the two programs
        close(jax.jit(chunked)(params, hidden), dense(params, hidden, noised, fields))


def test_gradient_is_of_the_loss_alone():
    params, hidden, noised, fields = example()
    aux = lambda p, h: sum_over_noised(token_loss, p, h, noised, fields, chunk=7)[1]  # noqa: E731
    assert float(aux(params, hidden)) > 0
    assert not any(np.any(g) for g in jax.tree.leaves(jax.grad(aux, argnums=(0, 1))(params, hidden)))


@pytest.mark.parametrize("case, groups, chunk", [("some", 1, 7), ("some", 4, 3), ("none", 2, 7), ("all", 2, 64)])
def test_map_equals_dense(case, groups, chunk):
    params, hidden, noised, fields = example(case)
    found = jax.jit(lambda h, n: map_over_noised(lambda h, f: token_loss(params, h, f)[0], h, n, fields,
                                                 groups=groups, chunk=chunk))(hidden, noised)
    assert found.shape == (B, S) and found.dtype == jnp.float32
    close(found, jnp.where(noised, token_loss(params, hidden, fields)[0], 0.0))


def test_work_stops_after_the_last_noised_token():
    """Chunks without a noised token are not computed; with few of them noised one chunk a group is all."""
    params, hidden, _, fields = example()
    noised = jnp.zeros((B, S), bool).at[:, 3].set(True).at[2, 5].set(True)
    seen = []

    def fn(h, f):
        jax.debug.callback(lambda rows: seen.append(np.asarray(rows).shape), h[..., 0])
        return token_loss(params, h, f)[0]

    jax.block_until_ready(map_over_noised(fn, hidden, noised, fields, groups=4, chunk=2))
    jax.effects_barrier()
    assert seen == [(4, 2)]


def test_order_puts_noised_tokens_first_in_every_group():
    _, _, noised, _ = example()
    order, real, chunks = noised_first(noised, groups=2, chunk=7)
    assert order.shape == real.shape == (2, 21) and order.dtype == jnp.int32
    flat = np.asarray(noised).reshape(2, -1)
    for group in range(2):
        taken = np.asarray(order[group])[np.asarray(real[group])]
        assert sorted(taken) == np.flatnonzero(flat[group]).tolist(), "each noised token once"
        assert np.asarray(real[group])[: len(taken)].all()
    assert int(chunks) == -(-flat.sum(1).max() // 7)
    assert int(noised_first(jnp.zeros((B, S), bool), 2, 7)[2]) == 0


def test_memory_is_of_a_chunk_not_of_the_batch():
    """[B, S, V] logits never exist, forward or backward: compiled, not run."""
    batch, seq, words = 16, 256, 4096
    logits = batch * seq * words * 4
    params, hidden, noised, fields = jax.eval_shape(lambda: example("all", batch, seq, words))

    def temp(fn):
        return jax.jit(fn).lower(params, hidden, noised, fields).compile().memory_analysis().temp_size_in_bytes

    chunked = lambda p, h, n, f: sum_over_noised(token_loss, p, h, n, f, groups=2, chunk=128)  # noqa: E731
    assert temp(jax.value_and_grad(dense, argnums=(0, 1), has_aux=True)) > 0.9 * logits, "else this measures nothing"
    assert temp(jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True)) < 0.4 * logits
    rate = lambda p, h, n, f: map_over_noised(lambda h, f: token_loss(p, h, f)[0], h, n, f, groups=2, chunk=128)  # noqa: E731
    assert temp(rate) < 0.4 * logits


def test_flat_head_pads_its_table_not_its_words():
    head = FlatHead(V, jnp.dtype("float32"))
    h = jnp.ones((2, 3, D))
    params = head.init(jax.random.key(0), h)["params"]
    assert params["kernel"].shape == (D, 128) and params["bias"].shape == (128,)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), jnp.float32), params)
    want = np.asarray(h) @ np.asarray(params["kernel"])[:, :V] + np.asarray(params["bias"])[:V]
    found = head.apply({"params": params}, h)
    assert found.shape == (2, 3, V)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
    half = FlatHead(V, jnp.dtype("bfloat16")).apply({"params": params}, h)
    assert half.dtype == jnp.float32 and 1e-4 < np.abs(half - want).max() < 0.1
