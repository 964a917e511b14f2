"""Rotary positions, block-sparse attention and rounded numbers, each against a plain numpy twin."""
import dataclasses
import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax.common import parallel
from hdlm_jax.decoding.policy import Rows
from hdlm_jax.decoding.sparse_attention import Sparse, SparseD, kept_blocks
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.models.heads import FlatHead
from hdlm_jax.models.network import Network, attention, rotary
from hdlm_jax.models.quantise import LAYERS, quantise, rotate

V, S, B, BLOCKS, HEADS, WIDTH = 30, 22, 3, 2, 2, 24
HIERARCHY = Hierarchy.from_parents([np.arange(V) % 5])
NETWORK = Network(FlatHead(HIERARCHY), HIERARCHY.padded_states, WIDTH, BLOCKS, HEADS, remat="none")


def random_params(network=NETWORK, seed=0, scale=0.15):
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32), jnp.zeros(1)))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda a: jnp.asarray(scale * rng.standard_normal(a.shape), jnp.float32), shapes["params"])
    return params | {"norm": {"weight": jnp.ones(WIDTH)}}


def inputs(seed=1, s=S):
    rng = np.random.default_rng(seed)
    z = rng.integers(0, HIERARCHY.num_states, (B, s))
    return jnp.asarray(z, jnp.int32), jnp.asarray(rng.random(B), jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def logits(network, params, z, t, segment=None):
    return network.apply({"params": params}, z, t, segment)


rounded = jax.jit(quantise, static_argnames=("bits", "kind"))


# ---------------------------------------------------------------------------------------------------- rotary positions


def test_positions_are_turned():
    cos, sin = rotary(9, 6)
    for i in range(6):
        angle = np.arange(9) * 10_000.0 ** (-2 * (i % 3) / 6)
        np.testing.assert_allclose(cos[0, :, 0, i], np.cos(angle), atol=1e-6)
        np.testing.assert_allclose(sin[0, :, 0, i], np.sin(angle), atol=1e-6)


# ---------------------------------------------------------------------------------------------------- sparse attention


def make_rows(seed, prompt, length, drops, s=S):
    """Rows of given prompt lengths [b] and lengths [b] after so many drops [b] of their tokens from the mask."""
    rng, b = np.random.default_rng(seed), len(prompt)
    place = np.arange(s)[None]
    given, active = place < np.asarray(prompt)[:, None], place < np.asarray(length)[:, None]
    level = np.where(given | ~active, 0, 2)
    for r in range(b):
        for _ in range(drops[r]):
            level[r, rng.choice(np.flatnonzero(level[r]))] -= 1
    z = np.where(level == 2, HIERARCHY.mask_id, np.where(level == 1, V + rng.integers(0, 5, (b, s)),
                                                         rng.integers(0, V, (b, s))))
    block = np.where(given, -1, np.cumsum(~given, 1) - 1)
    t = rng.random(b).astype(np.float32)
    arrays = (z, t, level, given, active, block, np.zeros(b), active, np.zeros(b))
    return Rows(*(jnp.asarray(a, a.dtype if a.dtype in (bool, np.float32) else np.int32) for a in arrays), {})


def numpy_blocks(weights, prompt, active, select, size):
    """`kept_blocks` by hand: for each row, head and block of queries rank a list."""
    b, heads, s, _ = weights.shape
    n = -(-s // size)
    tokens = [[i for i in range(j * size, min(s, j * size + size))] for j in range(n)]
    kept = np.zeros((b, heads, n, n), bool)
    for r, h, q in np.ndindex(b, heads, n):
        asking = [i for i in tokens[q] if active[r, i]]
        for part in (True, False):
            score = {}
            for k in range(n):
                keys = [i for i in tokens[k] if active[r, i] and prompt[r, i] == part]
                if keys and asking:
                    score[k] = sum(weights[r, h, i, j] for i in asking for j in keys) / len(asking) / len(keys)
            number = math.floor(Fraction(str(select)) * len(score)) + 1
            for k in sorted(score, key=lambda k: -score[k])[:number]:
                kept[r, h, q, k] = True
        for k in range(n):
            if not asking or not any(active[r, i] for i in tokens[k]):
                kept[r, h, q, k] = True
    return kept


@pytest.mark.parametrize("select, size", [(0.0, 4), (0.3, 4), (0.5, 3), (0.29, 1), (1.0, 5), (0.4, 30)])
def test_kept_blocks_are_those_ranked_by_hand(select, size):
    rng = np.random.default_rng(size)
    weights = rng.gamma(0.3, size=(4, HEADS, S, S)).astype(np.float32)
    place = np.arange(S)[None]
    prompt, active = place < np.array([[0], [5], [9], [13]]), place < np.array([[S], [S], [17], [14]])
    found = np.asarray(jax.jit(functools.partial(kept_blocks, select=select, size=size))(weights, prompt, active))
    np.testing.assert_array_equal(found, numpy_blocks(weights.astype(np.float64), prompt, active, select, size))
    n = -(-S // size)
    np.testing.assert_array_equal(found[0].sum(-1), min(n, math.floor(Fraction(str(select)) * n) + 1))
    assert found.all() if select == 1 else not found.all() or size == 30


@pytest.mark.slow
def test_number_kept_is_not_that_of_binary_fractions():
    """floor(0.29 100) + 1 = 30; in float64 0.29 100 is below 29."""
    weights, all_ = jax.random.uniform(jax.random.key(0), (1, 1, 100, 100)), jnp.ones((1, 100), bool)
    kept = jax.jit(functools.partial(kept_blocks, select=0.29, size=1))(weights, ~all_, all_)
    np.testing.assert_array_equal(kept.sum(-1), 30)


@dataclasses.dataclass(frozen=True)
class Watch:
    """Attention that keeps its weights."""

    def __call__(self, module, q, k, v, mask):
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(WIDTH // HEADS)
        module.put_variable("patch", "weights", jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1))
        return attention(q, k, v, mask)


@dataclasses.dataclass(frozen=True)
class Masked:
    """Attention under the mask [b, H, S, S] that is put there."""

    def __call__(self, module, q, k, v, mask):
        return attention(q, k, v, mask & module.get_variable("patch", "mask"))


@jax.jit
def watched(params, rows):
    return NETWORK.clone(attend=Watch()).apply({"params": params}, rows.z, rows.t, rows.active.astype(jnp.int32),
                                               mutable=["patch"])[1]["patch"]["stack"]["weights"]


@jax.jit
def masked(params, rows, mask):
    patch = {"stack": {"mask": mask}}
    return NETWORK.clone(attend=Masked()).apply({"params": params, "patch": patch}, rows.z, rows.t,
                                                rows.active.astype(jnp.int32))


@functools.partial(jax.jit, static_argnames=("skip", "select", "block"))
def call(params, cache, rows, skip=0.2, select=0.3, block=4):
    sparse = Sparse(SparseD(skip, select, block), NETWORK, params)
    prediction, cache = sparse(cache, rows)
    return prediction.select(jnp.arange(rows.z.size)).logits.reshape(*rows.z.shape, V), cache


PROMPT, LENGTH = (0, 6, 9), (S, S, 18)  # 22, 16 and 9 free tokens, of two drops each
TURNS = [(0, 0, 0), (5, 6, 3), (9, 8, 4), (30, 20, 9)]  # a share of .2: 8.8, 6.4 and 3.6 drops


def run(params, **how):
    turns = [make_rows(seed, PROMPT, LENGTH, drops) for seed, drops in enumerate(TURNS)]
    cache = Sparse(SparseD(block=4), NETWORK, params).start(turns[0])
    for rows in turns:
        out, after = call(params, cache, rows, **how)
        yield rows, np.asarray(out), cache, after
        cache = after


def test_everything_kept_is_full_attention():
    params = random_params()
    for rows, out, _, cache in run(params, select=1.0):
        want = logits(NETWORK, params, rows.z, rows.t, rows.active.astype(jnp.int32))
        np.testing.assert_allclose(out, want, atol=1e-6 * np.abs(want).max())
        assert np.all(cache.kept)
    assert np.all(cache.made)


@pytest.mark.slow
def test_mask_is_made_once_for_each_row_and_holds_from_then_on():
    params, turns = random_params(), list(run(random_params()))
    made = [np.asarray(after.made[0]).tolist() for *_, after in turns]
    assert made == [[False] * 3, [False] * 3, [True] * 3, [True] * 3]
    for rows, out, before, after in turns:
        free = jnp.repeat(jnp.repeat(before.kept, 4, 3), 4, 4)[..., :S, :S]
        np.testing.assert_allclose(out, masked(params, rows, free), rtol=1e-4, atol=1e-4)
        if before.made.any():
            np.testing.assert_array_equal(after.kept, before.kept)
            full = logits(NETWORK, params, rows.z, rows.t, rows.active.astype(jnp.int32))
            assert np.abs(out - full)[np.asarray(rows.active)].max() > 1e-2, "it leaves something out"
        elif after.made.any():
            prompt, active = np.asarray(rows.given & (rows.block < 0)), np.asarray(rows.active)
            for layer, weights in enumerate(np.asarray(watched(params, rows), np.float64)):
                want = numpy_blocks(weights, prompt, active, 0.3, 4)
                np.testing.assert_array_equal(after.kept[layer], want)
        else:
            assert np.all(after.kept)
    kept = np.asarray(turns[-1][-1].kept)
    # row 0: 6 blocks without prompt, 2 kept; row 1: prompt in 2 blocks, 1 kept, text in 5, 2 kept, one block in both
    assert np.all(kept[:, 0].sum(-1) == 2) and set(kept[:, 1].sum(-1).ravel()) <= {2, 3}
    assert len({kept[i, r, h].tobytes() for i in range(2) for r in range(3) for h in range(2)}) > 6, "each head its own"


@pytest.mark.slow
@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_share_of_full_attention(skip):
    made = [bool(np.asarray(after.made[0, 0])) for *_, after in run(random_params(), skip=skip)]
    assert made == [skip == 0.0] * 4


@pytest.mark.slow
def test_rows_do_not_see_their_batch_mates():
    """With other mates, in another order, each at its own moment: the same mask and the same logits."""
    params = random_params()
    turns = [make_rows(seed, PROMPT, LENGTH, drops) for seed, drops in enumerate([(0, 0, 0), (9, 1, 0), (20, 9, 1)])]
    cache = Sparse(SparseD(block=4), NETWORK, params).start(turns[0])
    whole = []
    for rows in turns:
        out, cache = call(params, cache, rows)
        whole.append((np.asarray(out), cache))
    assert np.asarray(cache.made[0]).tolist() == [True, True, False]
    for order in ([2, 0, 2], [1, 1, 1]):
        take = lambda a, order=order: a[jnp.asarray(order)]  # noqa: E731
        mine = Sparse(SparseD(block=4), NETWORK, params).start(jax.tree.map(take, turns[0]))
        for rows, (out, after) in zip(turns, whole, strict=True):
            found, mine = call(params, mine, jax.tree.map(take, rows))
            np.testing.assert_allclose(found, out[order], rtol=1e-4, atol=1e-4)
            for a, b in zip(mine, after, strict=True):
                np.testing.assert_array_equal(a, b[:, jnp.asarray(order)])


@pytest.mark.slow
def test_what_is_behind_the_end_is_not_seen():
    params = random_params()
    rows = make_rows(3, PROMPT, LENGTH, (20, 20, 9))
    other = rows._replace(z=jnp.where(rows.active, rows.z, 3))
    results = []
    for shown in (rows, other):
        cache = Sparse(SparseD(block=4), NETWORK, params).start(make_rows(0, PROMPT, LENGTH, (0, 0, 0)))
        cache = call(params, cache, shown)[1]
        results.append((np.asarray(call(params, cache, shown)[0])[np.asarray(rows.active)], cache.kept))
    np.testing.assert_array_equal(*(out for out, _ in results))
    np.testing.assert_array_equal(*(kept for _, kept in results))


@pytest.mark.slow
def test_on_an_accelerator_the_mask_is_the_same(monkeypatch):
    params, rows = random_params(), make_rows(3, PROMPT, LENGTH, (20, 20, 9))
    found, sparse = [], Sparse(SparseD(block=4), NETWORK, params)
    cache = sparse.start(rows)
    eye = jnp.broadcast_to(jnp.eye(cache.kept.shape[-1], dtype=bool)[None, None, None], cache.kept.shape)
    cache = cache._replace(kept=eye, made=~cache.made)
    for name in ("cpu", "gpu"):
        monkeypatch.setattr(parallel, "platform", lambda name=name: name)
        found.append(jax.jit(lambda cache: sparse(cache, rows)[0].hidden)(cache))
    np.testing.assert_allclose(*(np.asarray(h)[np.asarray(rows.active)] for h in found), rtol=1e-3, atol=1e-4)


# -------------------------------------------------------------------------------------------------------- quantisation


@pytest.mark.parametrize("n", [1, 7, 16, 24, 96])
def test_rotation_is_orthogonal_and_spreads(n):
    matrix = np.asarray(rotate(jnp.eye(n)))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(n), atol=1e-5)
    assert np.abs(matrix).max() <= math.sqrt(2 / n) * 1.0001
    x = np.random.default_rng(n).standard_normal((3, 5, n)).astype(np.float32)
    np.testing.assert_allclose(rotate(jnp.asarray(x)), x @ matrix, atol=1e-5)
    np.testing.assert_allclose(rotate(rotate(jnp.asarray(x)), back=True), x, atol=1e-5)


def numpy_round(values, bits):
    """Values [n] that share a scale, rounded to nearest (twin of the library's, one channel at a time)."""
    top = 2 ** (bits - 1) - 1
    scale = np.float32(np.abs(values).max() / np.float32(top))
    return np.rint(values / scale) * scale if scale else values


@pytest.mark.parametrize("bits, kind", [(4, "plain"), (8, "plain"), (16, "plain"), (4, "rotated"), (8, "rotated")])
def test_weights_are_rounded_channel_by_channel(bits, kind):
    params = random_params()
    kernel = np.asarray(params["stack"]["qkv"]["kernel"]).copy()
    kernel[1, :, 2, 5] = 0
    params["stack"]["qkv"]["kernel"] = jnp.asarray(kernel)
    found = np.asarray(rounded(params, bits=bits, kind=kind)["stack"]["qkv"]["kernel"])
    basis = np.asarray(rotate(jnp.eye(WIDTH))) if kind == "rotated" else np.eye(WIDTH, dtype=np.float32)
    turned = np.einsum("ji,ljpk->lipk", basis, kernel)
    for i, part, out in np.ndindex(BLOCKS, 3, WIDTH):
        turned[i, :, part, out] = numpy_round(turned[i, :, part, out], bits)
    want = np.einsum("ij,ljpk->lipk", basis, turned)
    off = np.abs(found - want) > 1e-5 * np.abs(kernel).max()
    assert off.mean() < (2e-3 if kind == "plain" else 0.05), "but for ties"
    assert np.abs(found - kernel).max() > 1e-6 and not found[1, :, 2, 5].any()


def test_what_is_not_asked_for_is_left_alone():
    before = random_params()
    once = rounded(before, bits=4)
    changed = {jax.tree_util.keystr(path, simple=True, separator=".") for (path, a), b in
               zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(once), strict=True)
               if not np.array_equal(a, b)}
    assert changed == {f"stack.{name}.kernel" for name in ("qkv", "out", "up", "down")} <= {
        f"stack.{name}.kernel" for name in LAYERS}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), once, rounded(once, bits=4))


@pytest.mark.parametrize("call, message", [
    (lambda: quantise({}, 5), "bits=5: choose one of 4, 8, 16"),
    (lambda: quantise({}, 8, "gptq"), "kind='gptq': choose one of plain, rotated")])
def test_bad_choices_are_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def outliers(params):
    """The same function with a few huge channels at the inputs of qkv, up (in the norms) and down (in its rows)."""
    stack = {name: dict(leaves) for name, leaves in params["stack"].items()}
    few = np.array([3, 11])
    for name, norm, part in (("qkv", "norm1", 0), ("up", "norm2", 3)):
        stack[norm]["weight"] = stack[norm]["weight"].at[:, few].multiply(60.0)
        for leaf in ("bias", "kernel"):
            stack["modulation"][leaf] = stack["modulation"][leaf].at[..., part * WIDTH + few].multiply(60.0)
        stack[name]["kernel"] = stack[name]["kernel"].at[:, few].divide(60.0)
    return params | {"stack": stack}


@pytest.mark.slow
def test_errors_fall_with_bits():
    """Root mean square errors of logits with outliers among the inputs, over the logits' own spread."""
    params, (z, t) = outliers(random_params()), inputs()
    exact = np.asarray(logits(NETWORK, random_params(), z, t))
    np.testing.assert_allclose(logits(NETWORK, params, z, t), exact, atol=1e-3 * np.abs(exact).max())

    def error(*how):
        return float(np.std(logits(NETWORK, quantise(params, *how), z, t) - exact) / np.std(exact))

    plain, turned = ({bits: error(bits, kind) for bits in (16, 8, 4)} for kind in ("plain", "rotated"))
    print(plain, turned)
    for found in (plain, turned):
        assert found[16] * 50 < found[8] < found[4] / 3
