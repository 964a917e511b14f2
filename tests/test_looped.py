"""Recurrent depth: the loop is the stack it stands for, caches of its iterations, and the diagonal sampler."""
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SEQ_LEN, read_recipe, write_recipe

from hdlm_jax.config import ConfigError, resolve
from hdlm_jax.decoding import diagonal, presets
from hdlm_jax.decoding.diagonal import Diagonal
from hdlm_jax.diffusion import autoregressive
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.models.attention import Seen
from hdlm_jax.models.decoder import Block
from hdlm_jax.models.looped import MOST, START, drawn_loops
from hdlm_jax.models.make import flops_per_token, forward_flops
from hdlm_jax.runs import evaluate, generate, train
from hdlm_jax.training.state import build
from hdlm_jax.training.step import make_loss_sums

V, S, R, BACK, D = 257, 10, 4, 2, 16
SETTINGS: dict = {
    "tokenizer": {"kind": "bytes", "vocab_size": V}, "hierarchy": {"clusters": (1,)},
    "diffusion": {"process": "autoregressive", "weighting": "constant"},
    "model": {"trunk": "decoder", "width": D, "blocks": 4, "heads": 2, "seq_len": S, "time_conditioning": False,
              "remat": "none"},
    "decoder": {"loops": R, "loops_back": BACK, "kv_heads": 1}}


def settings(**changes):
    return resolve({name: SETTINGS.get(name, {}) | changes.get(name, {}) for name in SETTINGS | changes})


@functools.cache
def made(**dims):
    """(config, network, process, parameters): weights so large that what comes before a token decides what it is."""
    c = settings(decoder=dims)
    network, process = build(c, Hierarchy.from_parents([], vocab_size=V))
    params = jax.jit(network.init_params, static_argnums=1)(jax.random.key(0), S)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return c, network, process, jax.tree.map(lambda a: a + 0.3 * jax.random.normal(next(keys), a.shape), params)


def texts(rows, seed=0):
    return jax.random.randint(jax.random.key(seed), (rows, S), 0, V)


def unrolled(network, params, z, s, loops, segment=None, kept=lambda n, tree: tree):
    """Prelude, core, .., core, coda by hand, one block after the other. s: the states it starts from; kept: of the n-th
    iteration, what of its parameters and inputs has gradients."""
    sizes = (network.dims, network.sizes, network.dims.passed(network.blocks), jnp.float32, "xla")
    places, seen = network._places(jnp.arange(S)[None], S), Seen.of(segment, True)

    def block(params, name, x, i=0):
        own = jax.tree.map(lambda a: a[i], params[name])
        return Block(*sizes).apply({"params": own}, x, places, seen, False, 0)[0]

    def norm(x, p):
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + network.dims.eps) * p["weight"][None, None]

    x = jnp.where(z[..., None] < V, params["embedding"][jnp.minimum(z, V - 1)], params["states"][jnp.maximum(z - V, 0)])
    e = block(params, "prelude", x)
    for n in range(loops):
        p, now = kept(n, (params, e))
        s = jnp.concatenate([s, now], -1) @ p["adapter"]["kernel"]
        s = norm(block(p, "stack", block(p, "stack", s), 1), p["state_norm"])
    return norm(block(params, "coda", s), params["norm"])


def test_the_loop_is_the_stack_it_stands_for():
    _, network, process, params = made()
    z, segment = process.shifted(texts(2)), jnp.arange(S)[None].repeat(2, 0) // 4
    for seg in (None, segment):
        want = jax.jit(unrolled, static_argnums=(0, 4))(network, params, z, jnp.zeros((2, S, D)), R, seg)
        got = jax.jit(network.hidden)(params, z, jnp.zeros(2), seg)
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("more", [True, False])
def test_training_goes_back_through_the_last_iterations(more):
    """Loss and gradients of a drawn R above and below decoder.loops_back; float32, both ways the same products."""
    _, network, process, params = made()
    z, weights = process.shifted(texts(2)), jax.random.normal(jax.random.key(5), (2, S, D))
    drawn = ((key, int(drawn_loops(jax.random.split(key)[0], R))) for key in map(jax.random.key, range(50)))
    key, count = next((key, n) for key, n in drawn if (n > BACK + 1 if more else n < BACK))
    start = jnp.broadcast_to(START * jax.random.normal(jax.random.split(key)[1], (1, S, D)), (2, S, D))

    def kept(n, tree):
        return tree if n >= count - BACK else jax.lax.stop_gradient(tree)

    def by_hand(params):
        return jnp.sum(weights * unrolled(network, params, z, start, count, None, kept))

    def looped(params):
        return jnp.sum(weights * network.hidden(params, z, jnp.zeros(2), None, key))

    (value, want), (found, got) = (jax.jit(jax.value_and_grad(f))(params) for f in (by_hand, looped))
    np.testing.assert_allclose(found, value, rtol=1e-4)
    for path, leaf in jax.tree_util.tree_leaves_with_path(want):
        mine = functools.reduce(lambda tree, key: tree[key.key], path, got)
        np.testing.assert_allclose(mine, leaf, atol=2e-4 * (1 + np.abs(leaf).max()), err_msg=str(path))


def test_drawn_numbers_of_iterations():
    """Mean `loops` within 4 standard errors, at least 1, bounded; the cut at MOST times the mean takes off .03."""
    drawn = np.asarray(jax.vmap(lambda key: drawn_loops(key, 8))(jax.random.split(jax.random.key(0), 4000)))
    assert abs(drawn.mean() - 8) < 4 * drawn.std() / np.sqrt(len(drawn)) + 0.03
    assert drawn.min() >= 1 and drawn.max() <= MOST * 8
    assert 3.2 < drawn.std() < 6, "that of the rate, 3.7, and Poisson's, 2.6"
    assert int(drawn_loops(jax.random.key(0), 1)) == 1


def test_a_batch_loops_alike_however_it_is_split():
    c, network, process, params = made()
    sums = jax.jit(make_loss_sums(c, network, process))
    batch, key = {"x": texts(4), "index": jnp.arange(4)}, jax.random.key(3)
    whole = sums(params, batch, key)
    parts = [sums(params, jax.tree.map(lambda a, i=i: a[i::2], batch), key) for i in (0, 1)]
    np.testing.assert_allclose(np.add(*parts), whole, rtol=1e-5)
    assert whole[0] != sums(params, batch, jax.random.key(4))[0]


def test_a_later_token_changes_nothing_before_it():
    _, network, _, params = made()
    z = texts(1)
    a, b = (jax.jit(network.hidden)(params, z, jnp.zeros(1)) for z in (z, z.at[0, 6].add(1)))
    np.testing.assert_array_equal(a[:, :6], b[:, :6])
    assert (a[:, 6:] != b[:, 6:]).any(-1).all()


def test_one_position_a_call_is_the_whole_row():
    _, network, process, params = made()
    z, cache = process.shifted(texts(2)), network.empty_cache(2, S)
    want = network.head.logits(network.head_params(params), jax.jit(network.hidden)(params, z, jnp.zeros(2)))

    @jax.jit
    def step(cache, z, i):
        cache, p = network.next_token(params, cache, z, i)
        return cache, p.logits

    for i in range(S):
        cache, got = step(cache, z[:, i : i + 1], i)
        np.testing.assert_allclose(got, want[:, i], atol=1e-4)


def test_keys_of_a_position_that_stopped_are_its_last():
    """Position 0 with 2 iterations; what position 1 reads in its third and fourth is what 0 had in its second."""
    _, network, _, params = made()
    z, cache, s = texts(1)[:, :2], network.empty_cache(1, S), jnp.zeros((1, 1, D))
    seen, at = (jnp.arange(S)[None, None] <= 1), jnp.array([[0]])
    refined = jax.jit(network.refined, static_argnums=7)
    cache = refined(params, z[:, :1], cache, at, seen, s, jnp.full((1, S), 2), 2)[2]
    got, _, _ = refined(params, z[:, 1:], cache, at + 1, seen, s, jnp.array([[2, R, *[0] * (S - 2)]]), R)
    filled = tuple(a.at[6:, :, 0].set(jnp.tile(a[4:6, :, 0], (R - 2, 1, 1, 1))) for a in cache)  # core: two blocks
    want, _, _ = refined(params, z[:, 1:], filled, at + 1, seen, s, jnp.full((1, S), R), R)
    np.testing.assert_array_equal(got, want)
    other, _, _ = refined(params, z[:, 1:], cache, at + 1, seen, s, jnp.full((1, S), R), R)
    assert np.abs(other - want).max() > 1e-3, "slots that nobody wrote"


# ---- the diagonal sampler ------------------------------------------------------------------------------------------


@functools.cache
def samplers():
    """(sequential, diagonal): (parameters, canvas, temperature, length[, how]) -> (tokens, stats)."""
    _, network, process, _ = made()

    def sequential(params, z, temperature, length):
        return autoregressive.sample(jax.random.key(7), functools.partial(network.next_token, params), process, z,
                                     network.empty_cache(*z.shape), temperature=temperature, length=length)

    def diagonally(params, z, temperature, length, by, exit=0.0, noise=0.0):
        return diagonal.sample(jax.random.key(7), network, params, process, z, by, exit=exit, noise=noise,
                               temperature=temperature, length=length)

    return jax.jit(sequential, static_argnums=2), jax.jit(diagonally, static_argnums=(2, 4))


def canvas(rows=2, given=0, length=S):
    z = jnp.where(jnp.arange(S)[None] < given, texts(rows, 9), V)
    return jnp.where(jnp.arange(S)[None] < length, z, 3)


def settling(params, share=0.2):
    """Parameters of which a state depends less on the one before it."""
    return {**params, "adapter": {"kernel": params["adapter"]["kernel"].at[:D].multiply(share)}}


@pytest.mark.parametrize("inner, temperature", [(2, 0), pytest.param(1, 1.0, marks=pytest.mark.slow)])
def test_a_wavefront_of_one_is_the_sequential_text(inner, temperature):
    """Token by token, greedily and by draws, with and without a prompt and a shorter text."""
    (one, many), params = samplers(), made()[3]
    written = set()
    for given, length in ((0, S), (3, S - 2)):
        z = canvas(given=given, length=length)
        want, stats = one(params, z, temperature, length)
        got, found = many(params, z, temperature, length, Diagonal(inner, 1))
        np.testing.assert_array_equal(got, want)
        assert stats["calls"] == length and found["calls"] == length * R // inner
        assert (found["row_forwards"] == length * R // inner).all()
        written |= set(np.asarray(want[:, given:length]).ravel().tolist())
    assert len(written) > 4 and max(written) < V


def calls(wavefront, each):
    """Of S positions that take `each` calls, one begun a call, at most `wavefront` at once."""
    ends: list[int] = []
    for i in range(S):
        begun = max(i and ends[-1] - each + 2, ends[i - wavefront] + 1 if i >= wavefront else 1)
        ends.append(begun + each - 1)
    return ends[-1]


def test_calls_of_a_wavefront():
    assert [calls(front, R) for front in (1, 2, R, S)] == [S * R, R * S // 2 + 1, S + R - 1, S + R - 1]


@pytest.mark.parametrize("wavefront", [3, pytest.param(S, marks=pytest.mark.slow)])
def test_a_text_that_is_known_is_read_as_it_is(wavefront):
    """All but the last token given: no guess is read, so that the last token is the sequential one. At exit = 0 every
    position has all of its iterations."""
    (one, many), params, z = samplers(), made()[3], canvas(given=S - 1)
    want, _ = one(params, z, 0, S)
    got, stats = many(params, z, 0, S, Diagonal(1, wavefront))
    np.testing.assert_array_equal(got, want)
    assert stats["calls"] == calls(wavefront, R)


def test_states_at_rest_stand():
    """exit = .9: the first call moves a state from 0 by its norm (at exit = 1 rounding would decide), the second by
    less, so that two iterations are all, and the last token that of a network of two."""
    params, z, (_, short, process, _) = settling(made()[3]), canvas(given=S - 1), made(loops=2)
    got, stats = samplers()[1](params, z, 0, S, Diagonal(1, 3), 0.9)
    h = jax.jit(short.hidden)(params, process.shifted(z), jnp.zeros(2))
    want = jnp.argmax(short.head.logits(short.head_params(params), h), -1)
    np.testing.assert_array_equal(got[:, -1], want[:, -1])
    assert stats["calls"] == calls(3, 2) < calls(3, R)


def twin(params, row, by, exit, noise):
    """(tokens, calls, guesses taken back, states at rest below one of these) of one row, written out: a position at a
    time, in order."""
    _, network, process, _ = made()

    @jax.jit
    def step(token, cache, i, s, share, key, iterations):
        start = (1 - share) * s + share * START * jax.random.normal(key, (D,))
        h, new, cache = network.refined(params, token[None, None], cache, i[None, None],
                                        jnp.arange(S)[None, None] <= i, start[None, None], iterations[None], by.inner)
        return network.head.logits(network.head_params(params), h)[0, 0], new[0, 0], cache

    key = jax.random.fold_in(jax.random.key(7), row)
    tokens, had, s, cache = [V] * S, np.zeros(S, np.int32), [np.zeros(D)] * S, network.empty_cache(1, S)
    first = end = count = back = held = 0
    while first < S:
        count, end = count + 1, min(end + 1, first + by.wavefront, S)
        shown, rests = list(tokens), []
        had[first:end] += by.inner  # shown, had: of the whole call
        for i in range(first, end):
            n = had[i] - by.inner
            of_call = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, i), 1), n)
            logits, new, cache = step(jnp.int32(shown[i - 1] if i else V), cache, jnp.int32(i), jnp.float32(s[i]),
                                      noise / (1 + n), of_call, jnp.asarray(had))
            tokens[i] = int(np.argmax(logits))
            back += shown[i] not in (V, tokens[i])
            still = i == first or tokens[i - 1] == shown[i - 1]
            calm = np.linalg.norm(new - s[i]) < exit * np.linalg.norm(new)
            held += calm and not still and all(rests)
            rests.append(had[i] == R or still and calm)
            s[i] = np.asarray(new)
        first += (*rests, False).index(False)
    return tokens, count, back, held


def test_the_sampler_is_its_twin():
    params, by, exit, noise = settling(made()[3], 0.65), Diagonal(1, 3), 0.9, 0.6
    got, stats = samplers()[1](params, canvas(), 0, S, by, exit, noise)
    tokens, count, back, held = zip(*(twin(params, row, by, exit, noise) for row in (0, 1)), strict=True)
    np.testing.assert_array_equal(got, tokens)
    assert stats["row_forwards"].tolist() == list(count)
    assert max(count) < calls(3, R) and any(back) and any(held), "states came to rest, guesses were wrong, both at once"


def test_flops_are_of_the_blocks_passed():
    c, network, process, _ = made()
    plain = settings(decoder={"loops": 0, "loops_back": 8}, model={"blocks": 2 + 2 * R})
    adapter = 2.0 * R * 2 * D**2
    h = network.head.hierarchy
    assert forward_flops(c, h, process) == forward_flops(plain, h, process) + adapter
    short = settings(decoder={"loops": BACK})
    assert flops_per_token(c, h, process) == forward_flops(c, h, process) + 2 * forward_flops(short, h, process)


@pytest.mark.parametrize("changes, message", [
    ({"decoder": {"prelude": 2, "coda": 2}}, "decoder.loops=4: needs blocks to pass again"),
    ({"decoder": {"experts": 8}}, "decoder.experts=8: decoder.loops=4 is for 0 alone"),
    ({"decoder": {"window": 3}}, "decoder.window=3: decoder.loops=4 is for 0 alone"),
    ({"decoder": {"lora": 2}}, "decoder.lora=2: decoder.loops=4 is for 0 alone"),
    ({"model": {"order": True}}, "model.order=True: decoder.loops=4 is for False alone"),
    ({"diffusion": {"process": "hierarchical"}}, "process='hierarchical': decoder.loops=4 is for 'autoregressive'"),
    ({"decoder": {"loops": 0}, "generate": {"method": "diagonal"}}, "method='diagonal': .* choose 'ancestral'"),
    ({"decoder": {"loops": 0}, "evaluate": {"loops": 2}}, "evaluate.loops=2: goes with decoder.loops"),
    ({"decoder": {"loops_back": 0}}, "decoder.loops_back=0: must be at least 1")])
def test_what_does_not_go_with_it(changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


@pytest.mark.slow
def test_a_run(tmp_path):
    """Trained, measured with its own and with fewer iterations, sampled: diagonally as one position after the other."""
    given = read_recipe(write_recipe(tmp_path)).as_dict()
    more: dict = SETTINGS | {"model": SETTINGS["model"] | {"seq_len": SEQ_LEN},
                             "train": {"microbatches": 2, "batch_size": 16}}
    given = {name: section | more.get(name, {}) for name, section in given.items()}
    train.train(resolve(given), str(tmp_path / "run"))

    def measured(**how):
        config = resolve(given | {"evaluate": given["evaluate"] | how})
        return evaluate.evaluate(config, str(tmp_path / "run"))

    whole, short = measured(), measured(loops=1)
    assert whole["se_time"] == 0 and (whole["loops"], short["loops"]) == (R, 1)
    assert 0 < abs(short["nelbo"] - whole["nelbo"]) < 0.1 and measured()["nelbo"] == whole["nelbo"]

    def written(**how):
        generate.generate(resolve(given | {"generate": given["generate"] | how}), str(tmp_path / "run"))
        made = json.loads((tmp_path / "run" / "generate.json").read_text())
        lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
        return made, [json.loads(line)["text"] for line in lines]

    one, want = written(temperature=0.0, prompt="the ")
    many, got = written(temperature=0.0, prompt="the ", method="diagonal", options="inner=2 wavefront=1 exit=0 noise=0")
    assert got == want and many["law"].startswith("inexact: method=diagonal")
    assert many["network_calls"] == one["network_calls"] * R // 2 == SEQ_LEN * R // 2
    wide, _ = written(method="diagonal", options="inner=2")
    assert wide["network_calls"] < SEQ_LEN * R // 2


def test_options():
    assert settings(generate={"method": "diagonal", "options": "wavefront=8 exit=.1"}).generate.method == "diagonal"
    assert presets.make("diagonal", "inner=2 wavefront=8").cache == Diagonal(2, 8)
    for options, message in (("inner=0", "at least 1"), ("exit=2", r"in \[0, 1\]"), ("noise=-1", r"in \[0, 1\]")):
        with pytest.raises(ValueError, match=message):
            presets.make("diagonal", options)
    _, network, _, params = made()
    with pytest.raises(ConfigError, match="inner=3': must divide decoder.loops=4"):
        Diagonal(3, 1).check(network, params)
    with pytest.raises(ConfigError, match="generate.method='diagonal': refines the latent states"):
        Diagonal(1, 1).check(network, {})
    assert presets.unwritten(presets.diagonal())
