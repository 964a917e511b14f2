"""What a trained run learns afterwards: energies against closed forms, bounds by enumeration, runs of their own."""

import dataclasses
import functools
import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from test_sampler import MDLM, TWO, denoiser, make
from test_tuning import S, Tabular
from tiny import model, read_recipe, trained

from hdlm_jax.config import LESSONS, ConfigError, EvaluateConfig, GenerateConfig, default, resolve
from hdlm_jax.decoding import bursts, choose, loop, presets, sampler
from hdlm_jax.decoding.policy import Policy
from hdlm_jax.diffusion.draws import fold
from hdlm_jax.evaluation.likelihood import TeacherForced, teacher_forced
from hdlm_jax.models.adjust import Adjust
from hdlm_jax.models.energy import EnergyNetwork, ScalarHead
from hdlm_jax.runs import likelihoods, refine
from hdlm_jax.training.loading import load_here
from hdlm_jax.tuning import adjust, certainty, energy


def test_names_are_those_of_the_settings():
    assert tuple(refine.LOSSES) == LESSONS


# ---- energies ----------------------------------------------------------------------------------------------------


def posteriors(toy, joint, seed):
    """p_theta(x | z) of a random network, each word on its own, and q(x | z): [Z, V^S] at every z that can be shown."""
    forced, q = toy.force(toy.random_network(S, seed), "cavity"), toy.q(0.7)
    words, z = toy.words(S), toy.sequences(S)
    law = joint.reshape(-1) * np.prod(q[words[None], z[:, None]], axis=2)
    ours = np.where(z[:, :, None] < toy.V, np.eye(toy.N)[:, : toy.V][z], forced)
    drawn = np.prod(ours[np.arange(len(z))[:, None, None], np.arange(S), words[None]], axis=2)
    law = law / law.sum(1, keepdims=True)
    return drawn, law


@pytest.mark.parametrize("shape", [dict(parents=[], vocab_size=3), dict(parents=[[0, 1, 0]])])
def test_the_best_energy_is_the_log_ratio(shape):
    """A free number for every text and state, by Newton's steps on the enumerated loss: log p_theta / q to 1e-12, and
    Z = 1, at every z, clusters or masks."""
    with jax.enable_x64(True):
        toy, _ = make(shape, (1.0,) * (1 + len(shape["parents"])))
        drawn, law = posteriors(toy, oracle.random_joint(toy.V, S, seed=1), 2)
        here = (drawn > 0) & (law > 0)
        np.testing.assert_array_equal(here, drawn > 0)  # clusters are kept by what is drawn, as by the data
        q, p = law[here], drawn[here]
        loss = lambda e: jnp.sum(jnp.asarray(q) * energy.nce(e, 0.0) + jnp.asarray(p) * energy.nce(0.0, e))  # noqa: E731
        slope, bend = jax.jit(jax.grad(loss)), jax.jit(jax.grad(lambda e: jnp.sum(jax.grad(loss)(e))))
        found = jnp.zeros(q.shape)
        for _ in range(60):
            found = found - jnp.clip(slope(found) / bend(found), -1, 1)
        np.testing.assert_allclose(found, np.log(p / q), atol=1e-12)
        table = np.zeros_like(drawn)
        table[here] = p * np.exp(-np.asarray(found))
        np.testing.assert_allclose(table.sum(1), 1, atol=1e-12)


def test_drawn_words_keep_to_what_is_given():
    """From p_theta(. | z): written words stay, those under a cluster are of it; the law by enumeration."""
    toy, process = make(dict(parents=[[0, 1, 0]]), (1.0, 1.0))
    table, rows = toy.random_network(S, seed=3), 6000
    z = jnp.asarray(np.tile([1, toy.mask, toy.offsets[1]], (rows, 1)), jnp.int32)
    x = jnp.asarray(np.tile([1, 0, 2], (rows, 1)), jnp.int32)
    network, logs = Tabular(process), jnp.log(jnp.asarray(table, jnp.float32))
    keys = fold(jnp.broadcast_to(jax.random.key(0), (rows,)), jnp.arange(rows))
    found = np.asarray(jax.jit(lambda: energy.words_drawn(network, process, logs, z, jnp.zeros(rows), x, keys))())
    assert (found[:, 0] == 1).all() and set(found[:, 2]) == {0, 2}
    law = toy.force(table, "cavity")[np.ravel_multi_index((1, toy.mask, toy.offsets[1]), (toy.N,) * S)]
    for i in (1, 2):
        share = np.bincount(found[:, i], minlength=3) / rows
        assert (np.abs(share - law[i]) <= 4.5 * np.sqrt(law[i] * (1 - law[i]) / rows)).all()  # standard errors


class Counted(Tabular):
    """E(x, z) = a times the share of words that are not 0; what it is trained beside knows nothing."""

    def hidden(self, params, z, t, segment=None):
        return jnp.zeros((*z.shape, self.process.vocab_size))

    def energy(self, params, z, x, t, segment=None):
        return params * jnp.mean(x != 0, axis=1)


def test_the_loss_raises_energies_of_what_is_drawn():
    """Texts of zeros: those drawn have others wherever a token is noised, 3 of 4; the gradient is half their share,
    downhill to a higher energy of theirs."""
    _, process = make(MDLM, (1.0,))
    c = default()
    c.tokenizer.kind, c.train.batch_size = "bytes", 400
    network = Counted(process)
    loss = energy.make_loss(resolve(c), network, network, process)
    rows = {"x": jnp.zeros((400, 6), jnp.int32), "index": jnp.arange(400)}
    (found, aux), slope = jax.jit(jax.value_and_grad(lambda a: loss(a, {}, rows, jax.random.key(0)), has_aux=True))(0.0)
    assert float(found) == pytest.approx(2 * np.log(2), abs=1e-5) and float(aux["told_apart"]) == 0.5
    assert float(slope) == pytest.approx(-0.5 * 0.5 * 0.75, abs=0.02)  # half of the tokens are noised, t uniform
    assert float(loss(1.0, {}, rows, jax.random.key(0))[1]["told_apart"]) > 0.85


def energy_network(process):
    network = EnergyNetwork(ScalarHead(process.hierarchy), process.hierarchy.padded_states, 8, 1, 2,
                            time_conditioning=False)
    params = network.init_params(jax.random.key(0), 4)
    return network, params | {"head": params["head"] | {"out": jnp.ones(8)}}


def test_an_energy_sees_its_row_alone():
    """What stands behind the end of a row changes nothing, what is before it does; all written: 0."""
    _, process = make(TWO, (1.0, 1.0))
    network, params = energy_network(process)
    z = jnp.array([[6, 4, -1, -1], [6, 4, -1, -1], [6, 4, -1, -1], [0, 1, -1, -1], [6, 4, 6, 6]], jnp.int32)
    x = jnp.array([[3, 2, 0, 0], [3, 2, 1, 3], [1, 2, 0, 0], [0, 1, 0, 0], [3, 2, 0, 0]], jnp.int32)
    found = np.asarray(network.energy(params, z, x, jnp.zeros(5)))
    assert found[0] == pytest.approx(found[1], abs=1e-6) and found[3] == 0
    assert min(abs(found[0] - found[i]) for i in (2, 4)) > 1e-4
    short = network.energy(params, z[:1, :2], x[:1, :2], jnp.zeros(1))
    assert found[0] == pytest.approx(float(short[0]), abs=1e-5)


def tables(toy, seed):
    """(network table, energies [V^S] of texts): a fixed random energy, whatever the state."""
    rng = np.random.default_rng(seed)
    return toy.random_network(2, seed), rng.normal(0, 1.5, toy.V**2)


def told_nats(toy, process, table, energies, text, x, many):
    """[many, n] nats of texts x under `edlm` with that table of energies, each with its own random numbers."""
    name, _, options = text.partition(" ")
    method = presets.make(name, options)
    policy, at = teacher_forced(method, process), jnp.asarray(toy.V ** np.arange(2)[::-1])
    known = jnp.asarray(energies, jnp.float32)
    tool = lambda x, z, log_p, t: known[jnp.sum(x * at[None], axis=1)]  # noqa: E731

    @jax.jit
    def walk(x, key):
        inner = loop.loop_of(denoiser(toy, table), process, policy, x.shape, presets.numbers(method),
                             loop.Sampling(tools={"energy": tool}))
        cache, s = inner.begin(key, jnp.full(x.shape, toy.mask), extra={"text": x})
        return inner.run(cache, s)[1].memory["nats"].sum(-1)

    found = walk(jnp.asarray(np.tile(x, (many, 1)), jnp.int32), jax.random.key(1))
    return np.asarray(found, np.float64).reshape(many, len(x))


@pytest.mark.parametrize("shape", [dict(parents=[], vocab_size=3), dict(parents=[[0, 1, 0]])])
def test_the_bound_is_of_the_sampler_with_its_candidates(shape):
    """In one call of three candidates: the mean of e^-nats is the law of what is drawn, by enumeration (4.5 standard
    errors); so the mean of nats lies above its entropy's terms. The release's estimate, E of one other text in place of
    log Z, lies below the entropy by KL(p_theta || q)."""
    toy, process = make(shape, (1.0,) * (1 + len(shape["parents"])))
    table, energies = tables(toy, 4)
    alone = np.einsum("a,b->ab", *table[-1]).reshape(-1)  # all masks
    w, law = np.exp(-energies), np.zeros(toy.V**2)
    for x, y, v in itertools.product(range(toy.V**2), repeat=3):
        law[x] += 3 * alone[x] * alone[y] * alone[v] * w[x] / (w[x] + w[y] + w[v])
    assert law.sum() == pytest.approx(1)
    nats = told_nats(toy, process, table, energies, "edlm steps=1 candidates=3 energy_from=0", toy.words(2), 2000)
    p = np.exp(-nats)
    assert (np.abs(p.mean(0) - law) <= 4.5 * p.std(0) / np.sqrt(len(p))).all()
    assert (nats.mean(0) >= -np.log(law) - 4.5 * nats.std(0) / np.sqrt(len(nats))).all()
    assert (nats.mean(0) + np.log(law)).max() > 0.01 and np.abs(law - alone).max() > 0.05
    # with the best energy, E* = log p - log q, of some q
    q = oracle.random_joint(toy.V, 2, seed=5).reshape(-1)
    best, entropy = np.log(alone / q), oracle.entropy(q)
    one = np.sum(q * (-np.log(alone) + best)) + np.sum(alone * -best)  # -log p + E(x+) - E(x-)
    assert one == pytest.approx(entropy - np.sum(alone * np.log(alone / q))) and one < entropy - 0.1
    drawn = np.random.default_rng(6).choice(len(q), (4000, 64), p=alone)
    log_z = np.log(np.mean(np.exp(-best[drawn]), axis=1)).mean()  # of 64 others: nearer, and still below
    assert -0.1 < log_z < 0


@pytest.mark.parametrize("shape", [MDLM, TWO])
def test_no_energy_is_the_plain_likelihood(shape):
    """Candidates that cannot be told apart, in several calls and at clusters: nats are those of `ancestral`."""
    toy, process = make(shape, (1.0,) * (1 + len(shape["parents"])))
    table, words = toy.random_network(2, 7), toy.words(2)
    flat = told_nats(toy, process, table, np.zeros(toy.V**2), "edlm steps=3 candidates=2 energy_from=0", words, 1)
    plain = told_nats(toy, process, table, np.zeros(toy.V**2), "ancestral steps=3", words, 1)
    np.testing.assert_allclose(flat, plain, atol=1e-5)


# ---- certainty ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, block", [(MDLM, 0), (TWO, 2)])
def test_halves_hide_every_token_once(shape, block):
    """Of a block, whichever is chosen: its tokens are hidden in one half or the other, those before it shown, those
    behind it masks in both; a row's draws are its own, whoever is beside it."""
    _, process = make(shape, (1.0,) * (1 + len(shape["parents"])))
    rng, rows, length = np.random.default_rng(8), 200, 7
    x, score = jnp.asarray(rng.integers(0, 4, (rows, length)), jnp.int32), np.ones((rows, length), bool)
    score[:, 0] = False  # a prompt
    keys = fold(jnp.broadcast_to(jax.random.key(0), (rows,)), jnp.arange(rows))
    found = certainty.halves(process, keys, x, jnp.asarray(score), block)
    alone = certainty.halves(process, keys[3:4], x[3:4], jnp.asarray(score[3:4]), block)
    x = np.asarray(x)
    z, level = (np.asarray(a).reshape(2, rows, length) for a in found[:2])
    seen = set()
    for b in range(rows):
        inside = np.flatnonzero((level[:, b] > 0).any(0))
        assert ((level[:, b] > 0).sum(0) <= 1).all()
        start, stop = inside.min(), inside.max() + 1
        assert len(inside) == stop - start == (block or 6) and (start - 1) % (block or 6) == 0
        seen.add(start)
        assert (z[:, b, :start] == x[b, :start]).all() and (z[:, b, stop:] == process.mask_id).all()
        hidden = level[:, b, start:stop] > 0
        assert (z[:, b, start:stop][~hidden] == np.tile(x[b, start:stop], (2, 1))[~hidden]).all()
        assert (process.level_of(z[:, b, start:stop])[hidden] == level[:, b, start:stop][hidden]).all()
    assert len(seen) == (3 if block else 1) and 0.4 < (level[0] > 0).sum() / (level > 0).sum() < 0.6
    np.testing.assert_array_equal(np.asarray(alone.z), z[:, 3])


class Fixed(Tabular):
    """A network of one text's worth of logits [S, V], whatever it sees."""

    def hidden(self, params, z, t, segment=None):
        return jnp.broadcast_to(params[None], (len(z), *params.shape))


def certain(process, weight):
    """(loss(logits, rows, key), certainty.make_loss of it) with that weight of entropies."""
    c = default()
    c.tokenizer.kind, c.tune.certainty = "bytes", weight
    made = certainty.make_loss(resolve(c), Fixed(process), None, process)
    return jax.jit(jax.value_and_grad(lambda logits, rows, key: made(logits, {}, rows, key), has_aux=True))


@pytest.mark.parametrize("shape", [dict(parents=[], vocab_size=3), dict(parents=[[0, 1, 0]])])
def test_entropy_has_no_gradient_where_the_text_is_not_likeliest(shape):
    """And falls where it is, at every level; cross-entropies alone move the others. Against sums by hand."""
    _, process = make(shape, (1.0,) * (1 + len(shape["parents"])))
    logits = jnp.array([[2.0, 0.5, 1.0], [0.2, 0.9, 1.1], [1.5, 1.4, 0.1]])
    rows = {"x": jnp.array([[0, 0, 1]] * 8), "index": jnp.arange(8), "score": jnp.ones((8, 3), bool)}
    key = jax.random.key(1)
    slopes = [np.asarray(certain(process, weight)(logits, rows, key)[1]) for weight in (0, 2)]
    moved = np.abs(slopes[1] - slopes[0]).max(1)
    level = np.asarray(certainty.halves(process, fold(jnp.broadcast_to(key, (8,)), jnp.arange(8)), rows["x"],
                                        rows["score"]).level)
    costs, entropies = [], []
    for place, k in zip(*np.nonzero(level.T), strict=True):
        k, at = level[k, place], np.exp(np.asarray(logits[place], np.float64))
        anc = [np.asarray(process.ancestors(0, j)) for j in range(process.num_levels + 1)]
        x = int(rows["x"][0, place])
        at = np.where(anc[k] == anc[k][x], at, 0)
        law = np.bincount(anc[k - 1], weights=at) / at.sum()
        costs.append(-np.log(law[anc[k - 1][x]]))
        if law.argmax() == anc[k - 1][x]:
            sharp = law[law > 0] ** 2 / (law**2).sum()
            entropies.append(-(sharp * np.log(sharp)).sum())
    (loss, aux), _ = certain(process, 2)(logits, rows, key)
    assert float(aux["cross_entropy"]) == pytest.approx(np.mean(costs), abs=1e-5)
    assert float(aux["entropy"]) == pytest.approx(np.mean(entropies), abs=1e-5)
    assert float(loss) == pytest.approx(np.mean(costs) + 2 * np.mean(entropies), abs=1e-5)
    assert moved[0] > 1e-3 and float(aux["right"]) == pytest.approx(len(entropies) / len(costs))
    if not shape["parents"]:
        assert moved[1] == moved[2] == 0  # whose likeliest word is another


def test_a_copied_text_is_written_surer_and_not_otherwise():
    """Steps down the gradient on one text: entropies fall, what was right stays right."""
    _, process = make(dict(parents=[[0, 1, 0]]), (1.0, 1.0))
    step, logits = certain(process, 2.0), jnp.array([[0.6, 0.2, 0.3], [-1.0, 0.4, -0.8], [0.0, 0.1, 0.9]])
    rows = {"x": jnp.array([[0, 1, 2]] * 16), "index": jnp.arange(16), "score": jnp.ones((16, 3), bool)}
    found = []
    for i in range(30):
        (_, aux), slope = step(logits, rows, jax.random.key(i))
        logits, found = logits - 2.0 * slope, [*found, aux]
    assert all(float(aux["right"]) == 1 for aux in found)
    assert float(found[-1]["entropy"]) < 0.2 * float(found[0]["entropy"])


def lesson(objective="energy", **more):
    """Settings of a run of that objective beside the tiny run."""
    recipe, base = trained()
    given = read_recipe(recipe).as_dict()
    given["train"] |= {"objective": objective, "init_from": str(base), "steps": 2}
    for name, value in more.items():
        section, _, key = name.partition("__")
        given[section][key] = value
    return resolve(given)


@pytest.fixture(scope="module")
def energy_run(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("energy"))
    refine.train(lesson(), folder)
    return folder


@pytest.mark.slow
def test_an_energy_is_a_run_and_helps_its_base(energy_run, tmp_path):
    """Trained beside a frozen run, loaded as its helper: candidates are told apart by it, and a bound is measured."""
    records = [json.loads(line) for line in open(f"{energy_run}/metrics.jsonl")]
    assert [r["step"] for r in records] == [1, 2] and records[0]["loss"] == pytest.approx(np.log(4), abs=1e-4)
    assert records[-1]["valid_loss"] > 0 and 0 <= records[-1]["valid_told_apart"] <= 1
    with pytest.raises(ConfigError, match="is no language model; use .*generate.helper="):
        load_here(energy_run)
    run = model().run
    g = GenerateConfig(method="edlm", options="candidates=3 energy_from=0", steps=2, batch_size=4, helper=energy_run)
    helper = sampler.load_helper(run, g)
    canvas = np.full((4, 16), run.hierarchy.mask_id, np.int32)
    helper = dataclasses.replace(helper, params=jax.tree.map(lambda a: a + 1.0, helper.params))  # it has learnt nothing
    words = sampler.sampler_of(run, helper)(canvas, g)["tokens"]
    plain = sampler.sampler_of(run)(canvas, dataclasses.replace(g, method="ancestral", options=""))["tokens"]
    assert words.max() < run.hierarchy.vocab_size and (words != plain).any()
    with pytest.raises(ConfigError, match="generate.method='guided' needs a second run .*of kind autoregressive"):
        sampler.sampler_of(run, helper)(canvas, dataclasses.replace(g, method="guided", options=""))
    e = EvaluateConfig(draws=2, rows=4, decodings=("edlm steps=2 candidates=2",))
    config = dataclasses.replace(run.config, evaluate=e, generate=g)
    shared = dataclasses.replace(run, config=config)
    rows = run.valid_rows(16, 4)
    (program, numbers, exact), = likelihoods.policies(shared).values()
    nats, calls = likelihoods.likelihoods(shared, rows, program, numbers, 2, e.decodings[0])
    assert not exact and np.isfinite(nats).all() and (nats > 0).all() and calls.max() <= 2


def test_own_texts_are_each_seen_once_an_epoch():
    """In another order each time, and the same rows whenever a step is asked for."""
    batches = refine.OwnTexts({"x": np.arange(6)[:, None], "score": np.ones((6, 1), bool)}, 8, 0)
    x = np.concatenate([batches.batch(i)["x"][:, 0] for i in range(3)])
    assert all(sorted(x[i : i + 6]) == list(range(6)) for i in (0, 6, 12, 18)) and (x[:6] != x[6:12]).any()
    later = batches.iterator({"next_index": 2})
    np.testing.assert_array_equal(next(later)["x"][:, 0], x[16:])
    assert later.get_state() == {"next_index": 3}


def test_own_texts_are_written_anew_for_other_settings(tmp_path, monkeypatch):
    """And taken from the file for the same ones."""
    rows, written = {"x": np.arange(8)[:, None], "score": np.ones((8, 1), bool)}, []
    monkeypatch.setattr(refine, "own_texts", lambda base, config, rows: written.append(config.generate) or rows)
    plain = GenerateConfig()
    for g in (plain, plain, *(dataclasses.replace(plain, **more) for more in (
            dict(top_p=0.9), dict(temperature=0.5), dict(clusters="clean"), dict(force_transition="between")))):
        config = types.SimpleNamespace(train=types.SimpleNamespace(objective="certainty", init_from="base"),
                                       tune=types.SimpleNamespace(texts=8), generate=g)
        loop = types.SimpleNamespace(config=config, workdir=str(tmp_path), base=types.SimpleNamespace(step=1),
                                     batches=refine.OwnTexts(rows, 8, 0))
        assert sorted(refine.Refining._texts(loop)["x"][:, 0]) == list(range(8))
    assert len(written) == 5


@pytest.mark.slow
def test_a_run_learns_from_its_own_texts(tmp_path):
    """Written once, kept in the workdir and taken up again; the run is a language model like the one before."""
    config = lesson("certainty", tune__texts=8, generate__method="max_prob", generate__options="steps=2 block=8",
                    data__packing="concat")
    refine.train(config, str(tmp_path))
    with np.load(tmp_path / "own_texts.npz") as file:
        texts = file["x"]
    assert texts.shape == (8, 16) and texts.max() < 257
    records = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]
    assert {"loss", "cross_entropy", "entropy", "right", "valid_loss"} <= set(records[-1])
    assert load_here(str(tmp_path)).step == 2


@pytest.mark.parametrize("more, words", [
    ({"train__init_from": ""}, "needs train.init_from"), ({"train__sample_every": 2}, "sample_every"),
    ({"model__trunk": "decoder", "model__time_conditioning": False}, "model.trunk='dit'"),
    ({"tune__objective": "score", "tune__task": "sums"}, "give one of them")])
def test_settings_that_do_not_go_together_are_one_line(more, words):
    with pytest.raises(ConfigError, match=words):
        lesson(**more)


# ---- a layer in place of calls -----------------------------------------------------------------------------------


class Written(Tabular):
    """Tabular, with the embeddings of states that a layer asks for; hidden states are logits, as wide as tokens."""

    @property
    def width(self):
        return self.process.vocab_size

    def table(self, params):
        return jnp.zeros((self.process.num_states, 1))


def law_of_bursts(toy, process, joint, adjusted, every):
    """Law [V^S] of texts written from the left, one level a call, the network asked in every so many calls."""
    network, words = Written(process), toy.words(S)
    table = jnp.asarray(np.log(toy.bayes(joint, cavity=True) + 1e-300))
    denoise = bursts.Bursts(bursts.Burst(every), network, table, functools.partial(adjusted, network, table), False)
    policy = Policy(choose.Scored(choose.Order("left"), choose.Count()), TeacherForced())

    @jax.jit
    def walk(x):
        inner = loop.loop_of(denoise, process, policy, x.shape, {"count": 1})
        cache, s = inner.begin(jax.random.key(0), jnp.full(x.shape, toy.mask), extra={"text": x})
        _, s, _ = inner.run(cache, s)
        return s.memory["nats"].sum(-1), inner.sample(jax.random.key(0), s.canvas, extra={"text": x})[1]

    nats, told = walk(jnp.asarray(words, jnp.int32))
    return np.exp(-np.asarray(nats, np.float64)).reshape(joint.shape), np.asarray(told["row_forwards"])


@pytest.mark.parametrize("shape", [dict(parents=[], vocab_size=3), dict(parents=[[0, 1, 0]])])
def test_the_best_layer_writes_the_joint(shape):
    """With what the network would say now in place of a layer two tokens a pass have the joint's law, to float32's
    rounding; with a layer that changes nothing they are drawn on their own, and the law is off by more than a tenth."""
    toy, process = make(shape, (1.0,) * (1 + len(shape["parents"])))
    joint = oracle.random_joint(toy.V, S, seed=9)
    best = lambda network, table, h, e, z, now, segment: network.hidden(table, now, None)  # noqa: E731
    law, passes = law_of_bursts(toy, process, joint, best, 2 * toy.K)
    np.testing.assert_allclose(law, joint, atol=1e-6)
    assert (passes == -(-S // 2)).all()
    same = lambda network, table, h, *_: h  # noqa: E731
    off, _ = law_of_bursts(toy, process, joint, same, 2 * toy.K)
    assert off.sum() == pytest.approx(1, abs=1e-5) and 0.5 * np.abs(off - joint).sum() > 0.1
    np.testing.assert_allclose(law_of_bursts(toy, process, joint, same, 1)[0], joint, atol=1e-6)


def test_a_layer_begins_as_none():
    """Its start changes nothing, and so does any layer where nothing has been written since."""
    layer = Adjust(8, 2)
    params = layer.init_params(jax.random.key(0), 4)
    h, table = jax.random.normal(jax.random.key(1), (2, 4, 8)), jax.random.normal(jax.random.key(2), (6, 8))
    z, now = jnp.full((2, 4), 5), jnp.array([[5, 1, 5, 5], [5, 5, 5, 5]])
    np.testing.assert_array_equal(layer.adjusted(params, h, table, z, now), h)
    moved = jax.tree.map(lambda a: a + 0.1, params)
    found = np.asarray(layer.adjusted(moved, h, table, z, now))
    assert np.abs(found[0] - np.asarray(h[0])).min() > 1e-4 and (found[1] == h[1]).all()


def test_moments_of_a_burst():
    """`now` is 1..burst - 1 drops after `before`, a level or more left to go; given tokens are never noised."""
    process = make(TWO, (1.0, 1.0))[1]
    score = jnp.tile(jnp.array([[False, True, True, True]]), (300, 1))
    keys = fold(jnp.broadcast_to(jax.random.key(3), (300,)), jnp.arange(300))
    moments = adjust.moments(process, keys, score, 3)
    before, now = (np.asarray(moment.level) for moment in moments)
    assert (moments[0].t > moments[1].t).all()
    drops = (before - now).sum(1)
    assert set(drops) == {1, 2} and (now <= before).all() and (now.sum(1) >= 1).all() and (before[:, 0] == 0).all()
    assert set(before.sum(1)) == {2, 3, 4, 5, 6} and before.max() == 2


def test_divergences_are_of_the_next_states():
    """Against sums by hand at a mask and a cluster; a layer that says the truth has none."""
    _, process = make(dict(parents=[[0, 1, 0]]), (1.0, 1.0))
    network, rng = Tabular(process), np.random.default_rng(10)
    p, g = (jnp.asarray(rng.normal(size=(1, 4, 3)), jnp.float32) for _ in range(2))
    z = jnp.array([[5, 3, 4, 0]])
    found = np.asarray(adjust.divergence(process, network, None, p, g, z))
    a, b = (np.exp(np.asarray(m[0], np.float64)) for m in (p, g))
    a, b = a / a.sum(1, keepdims=True), b / b.sum(1, keepdims=True)
    kl = lambda p, g: np.sum(p * np.log(p / g))  # noqa: E731
    up = lambda p: np.array([p[0] + p[2], p[1]])  # noqa: E731
    under = lambda p: p[[0, 2]] / p[[0, 2]].sum()  # noqa: E731
    wanted = [kl(up(a[0]), up(b[0])), kl(under(a[1]), under(b[1])), 0, 0]  # one word alone is under the second cluster
    np.testing.assert_allclose(found[0], wanted, atol=1e-5)
    assert np.abs(np.asarray(adjust.divergence(process, network, None, p, p, z))).max() < 1e-6


@pytest.mark.slow
def test_a_layer_is_a_run_and_helps_its_base(tmp_path):
    config = lesson("adjust", tune__texts=8, generate__method="adjust", generate__options="burst=2",
                    data__packing="concat")
    refine.train(config, str(tmp_path))
    run = model().run
    g = GenerateConfig(method="adjust", options="burst=4", batch_size=4, helper=str(tmp_path))
    draw = sampler.sampler_of(run, sampler.load_helper(run, g))
    found = draw(np.full((4, 16), run.hierarchy.mask_id, np.int32), g)
    assert found["tokens"].max() < run.hierarchy.vocab_size and (found["row_forwards"] == 8).all()
