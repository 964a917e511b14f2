"""Keys and values kept between calls: against a float64 twin that computes everything, and the papers' sets."""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax.config import DecoderConfig
from hdlm_jax.decoding.caches import DKV, BlockCausal, Cached, FastDLLM, FreeCache, Uncached
from hdlm_jax.decoding.policy import Rows
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.models.decoder import Decoder
from hdlm_jax.models.heads import FlatHead
from hdlm_jax.models.network import Network

B, S, BLOCK, PROMPT = 3, 16, 4, 2
WORDS = Hierarchy.from_parents([[0, 0, 0, 1, 1, 1, 2, 2]])  # 8 words, 3 clusters, mask
MASK, K = WORDS.mask_id, WORDS.num_levels
NET = Network(FlatHead(WORDS), num_states=16, width=32, blocks=2, heads=2, time_conditioning=False)
KINDS = {"grouped": DecoderConfig(kv_heads=1), "shifted": DecoderConfig(shifted=True, qk_norm=True),
         "blocks": DecoderConfig(shifted=True, context="block", block=5),
         "window": DecoderConfig(window=3, window_every=2)}
DECODERS = {name: Decoder(FlatHead(WORDS), num_states=16, width=32, blocks=2, heads=2, dims=dims)
            for name, dims in KINDS.items()}
TIMED, HALF = NET.clone(time_conditioning=True), NET.clone(dtype="bfloat16")


@functools.lru_cache
def weights(network, seed=0):
    """None of them zero, and as large as trained ones, so that every token hears of every other."""
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, S), jnp.int32), jnp.zeros(1)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(0.3 * rng.standard_normal(a.shape), jnp.float32), shapes["params"])


# ------------------------------------------------------------------------------------------------- a decoding by hand


def rows_of(z, wanted, call, lengths=(S,) * B, prompt=PROMPT, block=BLOCK) -> Rows:
    """What the core tells of states z [b, S], in numpy."""
    level = np.select([z < WORDS.vocab_size, z == MASK], [0, K], 1)
    active = np.arange(S)[None] < np.asarray(lengths)[:, None]
    number = np.broadcast_to((np.arange(S) - prompt) // block, z.shape)
    number = np.where(np.arange(S) < prompt, -1, number)
    todo = np.where((level > 0) & active, number, S)
    b = len(z)
    return Rows(z, np.full(b, 0.5, np.float32), level, np.broadcast_to(np.arange(S) < prompt, z.shape), active, number,
                todo.min(-1), wanted, np.full(b, call), {})


def walk(seed=0, drops=2, lengths=(S,) * B, prompt=PROMPT, block=BLOCK):
    """Rows of every call of a decoding: in each block, `drops` levels a call, mask -> cluster -> word."""
    rng, z, out = np.random.default_rng(seed), np.full((B, S), MASK), []
    z[:, :prompt] = rng.integers(0, 8, (B, prompt))
    for call in range(2 * S):
        rows = rows_of(z, np.zeros(z.shape, bool), call, lengths, prompt, block)
        places = [np.flatnonzero(r) for r in (rows.block == rows.current[:, None]) & (rows.level > 0) & rows.active]
        if not any(len(p) for p in places):
            break
        chosen = [rng.permutation(p)[:drops] for p in places]
        wanted = np.array([np.isin(np.arange(S), c) for c in chosen])
        out.append(rows._replace(wanted=wanted))
        down = np.where(rows.level == K, 8 + rng.integers(0, 3, z.shape), rng.integers(0, 8, z.shape))
        z = np.where(wanted, down, z)
    return out


@dataclasses.dataclass(frozen=True)
class Whole:
    """No cache."""

    block_causal: bool = False


class BlockCausalUncached(Uncached):
    def __call__(self, cache, rows):
        seen = rows.active[:, None] & (rows.block[:, None] <= rows.block[:, :, None])
        return self.network.denoise(self.params, rows.z, rows.t, seen), cache


def make(spec, network=NET, params=None, sizes=()):
    if isinstance(spec, Whole):
        return (BlockCausalUncached if spec.block_causal else Uncached)(network, params or {})
    return Cached(spec, network, params or {}, sizes)


@functools.partial(jax.jit, static_argnames=("spec", "network", "sizes"))
def call(params, cache, rows, numbers, *, spec, network=NET, sizes=()):
    """numbers: fields of the spec that are traced."""
    prediction, cache = make(dataclasses.replace(spec, **numbers or {}), network, params, sizes)(cache, rows)
    return prediction.hidden, cache


def run(spec, walked, numbers=None, **kwargs):
    """Hidden states [calls, b, S, D] of a decoding's calls."""
    network = kwargs.get("network", NET)
    cache, out = make(spec, network).start(walked[0]), []
    for rows in walked:
        hidden, cache = call(weights(network), cache, rows, numbers, spec=spec, **kwargs)
        out.append(np.asarray(hidden))
    return np.stack(out)


def stales(spec, walked):
    """The sets [b, S] that are computed in a decoding's calls."""
    denoiser = make(spec)
    memory, out, stale = denoiser.start(walked[0]), [], jax.jit(denoiser.stale)
    for rows in walked:
        out.append(np.asarray(stale(memory, rows)))
        memory = memory._replace(z=np.where(rows.active, rows.z, -1)[None], current=rows.current[None])
    return out


def at(walked, field):
    return np.stack([getattr(rows, field) for rows in walked])


def close(a, b, where=None, atol=2e-5):
    a, b = (x if where is None else x[where] for x in (a, b))
    assert a.size
    np.testing.assert_allclose(a, b, atol=atol)


# ---------------------------------------------------------------------------------------------- the numpy twin, float64


def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def turn(x):
    angle = np.outer(np.arange(S), 10000.0 ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1]))[:, None]
    pair = x[..., : x.shape[-1] // 2] + 1j * x[..., x.shape[-1] // 2 :]
    pair = pair * np.exp(1j * angle)
    return np.concatenate([pair.real, pair.imag], -1)


def twin(old, z, stale, seen, network=NET):
    """Everything is computed, and where it is not stale the old keys, values and hidden states are put in its place.

    old: list of (k, v [B, S, H, D/H]) and hidden [B, S, D]; seen [B, S, S]. Gives the new of the same form.
    """
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), weights(network))
    x, new, keep = p["embedding"][z], [], ~stale[..., None]
    for i in range(network.blocks):
        w = jax.tree.map(lambda a, i=i: a[i], p["stack"])
        shift1, scale1, gate1, shift2, scale2, gate2 = np.split(w["modulation"]["bias"], 6)
        h = norm(x) * w["norm1"]["weight"] * (1 + scale1) + shift1
        q, k, v = ((h @ w["qkv"]["kernel"][:, j]).reshape(*z.shape, network.heads, -1) for j in range(3))
        k, v = (np.where(keep[..., None], a, b) for a, b in zip(old[i], (turn(k), v), strict=True))
        scores = np.einsum("bqhd,bkhd->bhqk", turn(q), k) / math.sqrt(q.shape[-1])
        scores = np.exp(np.where(seen[:, None], scores, -1e30) - scores.max(-1, keepdims=True))
        h = np.einsum("bhqk,bkhd->bqhd", scores / scores.sum(-1, keepdims=True), v).reshape(x.shape)
        x = x + gate1 * (h @ w["out"]["kernel"])
        h = norm(x) * w["norm2"]["weight"] * (1 + scale2) + shift2
        h = h @ w["up"]["kernel"] + w["up"]["bias"]
        h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + gate2 * (h @ w["down"]["kernel"] + w["down"]["bias"])
        new.append((k, v))
    shift, scale = np.split(p["modulation"]["bias"], 2)
    return [*new, np.where(keep, old[-1], norm(x) * p["norm"]["weight"] * (1 + scale) + shift)]


class Told:
    """A rule that computes what the caller says."""

    def __init__(self, block_causal):
        self.block_causal = block_causal

    def stale(self, rows, changed, before, mask):
        return rows.extra["stale"]


@pytest.mark.parametrize("block_causal, sizes", [(False, (4, 8)), (True, ())])
def test_any_sequence_of_sets_equals_the_emulation(block_causal, sizes):
    """Layer by layer, with rows of several lengths; and no key, value or state is written but those of the set."""
    rng, lengths = np.random.default_rng(3), (S, 11, 7)
    told = lambda params: Cached(Told(block_causal), NET, params, sizes)  # noqa: E731
    step = jax.jit(lambda params, *a: (lambda p, new: (p.hidden, new))(*told(params)(*a)))
    cache, old = told({}).start(walk()[0]), [(np.zeros((B, S, 2, 16)),) * 2] * 2 + [np.zeros((B, S, 32))]
    z = np.full((B, S), MASK)
    for share in (1, 0.1, 0, 0.3, 0.7):  # classes S, 4, none, 8 (or S), S
        z, stale = (z + rng.integers(1, MASK, (B, S))) % (MASK + 1), rng.random((B, S)) < share
        rows = rows_of(z, stale, 0, lengths)._replace(extra={"stale": stale})
        seen = np.broadcast_to(rows.active[:, None], (B, S, S)).copy()
        if block_causal:
            seen &= rows.block[:, None] <= rows.block[..., None]
        hidden, new = step(weights(NET), cache, rows)
        old = twin(old, z, stale & rows.active, seen)
        close(np.asarray(hidden), old[-1], rows.active)
        for i, (k, v) in enumerate(old[:-1]):
            close(np.asarray(new.kept[0][i]), k, rows.active)
            close(np.asarray(new.kept[1][i]), v, rows.active)
        for a, b in zip((*cache.kept, cache.hidden), (*new.kept, new.hidden), strict=True):
            np.testing.assert_array_equal(np.any(a != b, axis=(0, *range(3, a.ndim))), stale & rows.active)
        cache = new


@pytest.mark.slow
@pytest.mark.parametrize("network, atol", [(NET, 1e-6), (TIMED, 1e-6), (HALF, 0.03)], ids=["plain", "time", "bfloat16"])
def test_partial_over_all_positions_equals_the_trunk(network, atol):
    """In any order; the time is the row's; room for keys and values is of the network's dtype."""
    rng = np.random.default_rng(1)
    z, t = jnp.asarray(rng.integers(0, MASK + 1, (B, S)), jnp.int32), jnp.asarray(rng.random(B), jnp.float32)
    order = jnp.asarray(np.argsort(rng.random((B, S)), axis=-1))
    apply = jax.jit(network.apply, static_argnames="method")
    want, row = apply({"params": weights(network)}, z, t, method="trunk"), jnp.arange(B)[:, None]
    got, (k, v) = apply({"params": weights(network)}, z[row, order], t, network.empty_cache(B, S), order,
                        jnp.ones((B, 1, S), bool), method="partial")
    scale = np.abs(np.asarray(want)).max()
    close(np.asarray(got) / scale, np.asarray(want[row, order]) / scale, atol=atol)
    assert k.dtype == v.dtype == network.dtype and got.dtype == jnp.float32


# ----------------------------------------------------------------------------------------------------------- the rules


@pytest.mark.slow
def test_prefix_and_dual_compute_the_sets_of_their_paper():
    walked = walk()
    everything, starts = np.ones((B, S), bool), 0
    before = np.full(B, -2)
    for rows, prefix, dual in zip(walked, stales(FastDLLM(), walked), stales(FastDLLM(dual=True), walked), strict=True):
        begins, behind = rows.current != before, np.arange(S)[None] >= PROMPT + BLOCK * rows.current[:, None]
        inside = behind & (np.arange(S)[None] < PROMPT + BLOCK * (rows.current[:, None] + 1))
        np.testing.assert_array_equal(prefix, np.where(begins[:, None], everything, behind))
        np.testing.assert_array_equal(dual, np.where(begins[:, None], everything, inside))
        before, starts = rows.current, starts + begins
    assert np.all(starts >= 4)


@pytest.mark.slow
def test_free_cache_and_block_causal_compute_a_finished_block_once_more_and_never_again():
    walked = walk()
    free, causal = stales(FreeCache(), walked), stales(BlockCausal(), walked)
    np.testing.assert_array_equal(free[0], True)
    np.testing.assert_array_equal(causal[0], np.arange(S)[None] < PROMPT + np.full((B, 1), BLOCK))
    for call in range(1, len(walked)):
        rows, first = walked[call], walked[call - 1].current[:, None]  # earlier only in the call behind its last token
        np.testing.assert_array_equal(free[call], rows.block >= first)
        np.testing.assert_array_equal(causal[call], (rows.block >= first) & (rows.block <= rows.current[:, None]))
    assert np.sum(free, axis=0)[:, :PROMPT].max() == 1 and np.sum(causal) < np.sum(free)


@pytest.mark.slow
def test_delayed_cache_computes_what_moves_and_what_has_just_settled():
    walked = walk()
    level = at(walked, "level")
    for call, stale in enumerate(stales(DKV(5), walked)):
        want = (level[call] > 0) | (level[call] != level[call - 1])
        np.testing.assert_array_equal(stale, True if call % 5 == 0 else want)
    twice = stales(DKV(6, 3), walked)
    for call in range(len(walked)):
        rows, asked = walked[call], walked[call].wanted | (level[call] != level[call - 1])
        want = (level[call] == 2) | asked | ((level[call] > 0) & (call % 3 == 0))
        np.testing.assert_array_equal(twice[call], True if call % 6 == 0 else want)
    assert any(np.any(~s & (rows.level == 1)) for s, rows in zip(twice, walked, strict=True)), "a cluster is kept"
    for call, stale in enumerate(stales(DKV(4, window=1), walked)):
        rows = walked[call]
        near = np.array([[np.any(w[max(i - 1, 0) : i + 2]) for i in range(S)] for w in rows.wanted])
        want = rows.wanted | (level[call] != level[call - 1]) | (near & (level[call] > 0))
        np.testing.assert_array_equal(stale, True if call % 4 == 0 else want)


@pytest.mark.parametrize("network", [NET, *(pytest.param(network, marks=[] if name == "blocks" else pytest.mark.slow)
                                            for name, network in DECODERS.items())], ids=["published", *DECODERS])
@pytest.mark.parametrize("spec, want, numbers", [
    (BlockCausal(), Whole(block_causal=True), None), (DKV(), Whole(), {"refresh": 1})], ids=["block_causal", "dkv"])
def test_exact_rules_equal_no_cache(spec, want, numbers, network):
    """At all tokens that rule has ever had to compute; also when written tokens are raised, and blocks out of turn."""
    walked = walk(lengths=(S, 11, 15))
    raised = np.where(at(walked, "z")[9] == MASK, 3, at(walked, "z")[9])
    raised[:, PROMPT + 1], raised[:, -3] = MASK, MASK  # back to the first block; another one is wanted as well
    fixed = np.where(np.arange(S) == PROMPT + 1, 5, raised)
    for z in (raised, fixed, np.where(np.arange(S) == PROMPT + 1, 6, fixed)):  # the last: a word becomes another
        rows = rows_of(z, z == MASK, len(walked), (S, 11, 15))
        walked.append(rows)
    known = at(walked, "active") & (at(walked, "wanted") | (at(walked, "block") <= at(walked, "current")[..., None]))
    got = run(spec, walked, numbers, network=network)
    close(got, run(want, walked, network=network), known)
    other = run(DKV(), walked, {"refresh": 8}, network=network)
    assert np.abs(got - other)[known].max() > 1e-2, "another rule does not"


@pytest.mark.slow
def test_blocks_of_one_token_are_a_causal_network():
    walked = walk(prompt=0, block=1)
    apply = jax.jit(lambda z: NET.clone(causal=True).apply({"params": weights(NET)}, z, jnp.zeros(B), method="trunk"))
    want = np.stack([apply(rows.z) for rows in walked])
    close(run(Whole(True), walked), want)
    close(run(BlockCausal(), walked), want, at(walked, "block") <= at(walked, "current")[..., None])


@pytest.mark.slow
def test_drift_grows_with_the_period():
    """One program for all periods: they are traced."""
    walked = [rows for seed in range(3) for rows in walk(seed, drops=1)]
    want, drift, asked = run(Whole(), walked), {}, at(walked, "wanted")
    kernel = np.asarray(weights(NET)["head"]["kernel"])[: WORDS.vocab_size].T
    for period in (1, 2, 8):
        got = run(DKV(), walked, {"refresh": jnp.int32(period)})
        drift[period] = np.abs((got - want)[asked] @ kernel).mean()
    assert drift[1] < 1e-5 < 1e-4 < drift[2] < drift[8], drift


# ------------------------------------------------------------------------------------------ what may change no result


@pytest.mark.slow
def test_capacities_batch_mates_and_what_is_behind_the_end_change_no_result():
    """Rows of a cache are taken and put back, as the loop does with unfinished rows: axis 1 of every leaf."""
    walked = walk(lengths=(S, 11, 7))
    active, spec = at(walked, "active"), DKV(5)
    base = run(DKV(), walked, {"refresh": 5})
    sized = functools.partial(run, spec, sizes=(8,))
    close(base, sized(walked), active, 1e-5)
    other = [rows._replace(z=np.where(rows.active, rows.z, (rows.z + 5) % MASK)) for rows in walked]
    np.testing.assert_array_equal(sized(other)[active], sized(walked)[active])
    denoiser, order, params = make(spec), np.array([2, 0]), weights(NET)
    cache = jax.tree.map(np.array, denoiser.start(walked[0]))
    for i, rows in enumerate(walked):
        for some in (order, np.array([1, 1])) if i < 8 else (order,):
            part = jax.tree.map(lambda a, some=some: np.take(a, some, axis=1), cache)
            few = jax.tree.map(lambda a, some=some: a[some], rows)
            hidden, part = call(params, part, few, None, spec=spec, sizes=(8,))
            for old, new in zip(*map(jax.tree.leaves, (cache, part)), strict=True):
                old[:, some] = new
            close(np.asarray(hidden), base[i][some], few.active, 1e-5)


@pytest.mark.slow
def test_one_time_is_as_good_as_none_and_bfloat16_works():
    walked = [rows._replace(t=np.full(B, 1 - i / 20, np.float32)) for i, rows in enumerate(walk()[:6])]
    fixed = [rows._replace(t=np.full(B, 0.25, np.float32)) for rows in walked]
    known = at(walked, "block") <= at(walked, "current")[..., None]
    timed = functools.partial(run, network=TIMED)
    close(timed(BlockCausal(), fixed), timed(Whole(True), fixed), known)
    assert np.abs(timed(BlockCausal(), walked) - timed(Whole(True), walked))[known].max() > 1e-2
    want = run(DKV(), walked, {"refresh": 3})
    close(run(DKV(), walked, {"refresh": 3}, network=HALF), want, atol=0.05 * np.abs(want).max())


def test_specs_are_static():
    assert all(isinstance(hash(kind()), int) for kind in (FastDLLM, FreeCache, BlockCausal, DKV))
