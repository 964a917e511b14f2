"""Clusters made anew in training: who keeps what, exact resume, every checkpoint with its own hierarchy; clusters by
frequency and by bigrams."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import tiny

from hdlm_jax.common import parallel
from hdlm_jax.config import ConfigError
from hdlm_jax.data import groups
from hdlm_jax.data.clustering import build_hierarchy, reclustered
from hdlm_jax.data.prepare import token_counts
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.models.heads import FactorisedHead, FlatHead
from hdlm_jax.runs import stages, train
from hdlm_jax.training.adapt import regrouped
from hdlm_jax.training.checkpoint import Checkpoints
from hdlm_jax.training.loading import file_of, hierarchy_file, load_here
from hdlm_jax.training.metrics import read_metrics
from hdlm_jax.training.state import build, init_state, make_optimizer

V, D = 60, 4


def flat(tree):
    return [np.asarray(a) for a in jax.tree.leaves(tree)]


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# -- clusters ----------------------------------------------------------------------------------------------------------


def blobs(words=V, kinds=5, noise=0.1):
    rng = np.random.default_rng(0)
    middle = np.linalg.qr(rng.standard_normal((16, 16)))[0][:kinds]
    return (middle[np.arange(words) % kinds] + noise * rng.standard_normal((words, 16))).astype(np.float32)


def test_clusters_that_fit_stay_and_moved_words_find_back():
    """Ids are the old ones by overlap, special words and words without a vector stay, so do the levels above."""
    names = np.array([3, 0, 5, 1, 4])  # 2: the special word's own
    parent = names[np.arange(V) % 5]
    parent[59] = 2
    h = Hierarchy.from_parents([parent, np.arange(6) % 2], special=(59,))
    vectors, counts = blobs(), np.random.default_rng(5).zipf(1.3, V)
    assert reclustered(vectors, h, counts) == h and reclustered(0 * vectors, h, counts) == h
    often = np.log1p(counts)[:, None] * np.random.default_rng(6).standard_normal(16)
    assert reclustered((vectors + 5 * often).astype(np.float32), h, counts) == h, "frequency tells nothing"
    wrong, unknown = parent.copy(), vectors.copy()
    wrong[:12] = parent[1:13]
    unknown[3] = 0
    found = reclustered(unknown, Hierarchy.from_parents([wrong, np.arange(6) % 2], special=(59,)), counts)
    np.testing.assert_array_equal(np.delete(found.parents[0], 3), np.delete(parent, 3))
    assert found.parents[0][3] == wrong[3] and found.special == (59,)
    np.testing.assert_array_equal(found.parents[1], h.parents[1])


@pytest.mark.parametrize("case", ["blob", "noise"])
def test_sizes_keep_their_limits(case):
    vectors = np.random.default_rng(1).standard_normal((400, 8)).astype(np.float32)
    if case == "blob":
        vectors = np.where(np.arange(400)[:, None] < 390, 1 + 1e-3 * vectors, -vectors)
    h = Hierarchy.from_parents([np.arange(400) % 20], special=(399,))
    found = reclustered(vectors, h, np.ones(400, int))
    assert found != h and found.token_count[1].min() >= 2 and found.token_count[1].max() <= 100
    assert found == reclustered(vectors, h, np.ones(400, int)), "the same again"


# -- parameters --------------------------------------------------------------------------------------------------------


def two():
    """Hierarchies of 7 clusters of unequal sizes; in the second the words 0 and 1 are in other clusters."""
    parent = np.random.default_rng(3).permutation(np.repeat(np.arange(7), (20, 1, 9, 9, 3, 8, 10)))
    other = parent.copy()
    other[0], other[1] = (parent[0] + 2) % 7, (parent[1] + 3) % 7
    if parent[0] == 1 or parent[1] == 1:
        raise AssertionError("a cluster would be empty")
    return Hierarchy.from_parents([parent]), Hierarchy.from_parents([other])


def test_rows_go_with_their_words():
    before, after = (FactorisedHead(h, prototypes=3) for h in two())
    rng, like = np.random.default_rng(0), before.init(jax.random.key(0), D)
    params = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), like)
    params["words"] = jax.tree.map(lambda a: a.at[V:].set(0), params["words"])  # nothing is ever learnt there
    same, order, moved = jax.jit(lambda p: (before.moved(p, before.hierarchy), after.reordered(p, before.hierarchy),
                                            after.moved(p, before.hierarchy)))(params)
    equal(same, params)
    for name in ("kernel", "bias"):
        equal(order["words"][name][after.blocks.row], params["words"][name][before.blocks.row])
    equal(order["clusters"], params["clusters"])
    h = jnp.asarray(rng.standard_normal((5, D)), jnp.float32)
    within = jax.jit(lambda p, q, h: (before.within(p, h), after.within(q, h)))
    was, now = map(np.asarray, within(params, moved, h))
    own, other = before.hierarchy.anc[1], after.hierarchy.anc[1]
    touched = np.isin(own, [own[0], own[1], other[0], other[1]])
    assert 0 < touched.sum() < V
    np.testing.assert_allclose(now[:, ~touched], was[:, ~touched], rtol=1e-5, atol=1e-5)
    stay = np.flatnonzero((own == own[0]) & (np.arange(V) > 1))
    ratio = np.diff(now[:, stay]), np.diff(was[:, stay])
    np.testing.assert_allclose(*ratio, rtol=1e-4, atol=1e-4, err_msg="words that stay, among each other")
    # a moved word keeps its odds against another word of its new cluster, at h = 0
    nothing = jnp.zeros((1, D))
    logits = jax.jit(lambda p, q, h: (before.logits(p, h)[0], after.logits(q, h)[0]))
    was, now = map(np.asarray, logits(params, moved, nothing))
    peer = int(np.flatnonzero((other == other[0]) & (np.arange(V) > 1))[0])
    np.testing.assert_allclose(now[0] - now[peer], was[0] - was[peer], rtol=1e-4, atol=1e-4)


def test_vectors_are_those_of_the_flat_head_it_is_near_nothing():
    """d log p(x | h) / dh at h = 0, up to what all words share."""
    head = FactorisedHead(two()[0], prototypes=3)
    rng, like = np.random.default_rng(0), head.init(jax.random.key(0), D)
    params = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), like)
    slope, found = map(np.asarray, jax.jit(lambda h: (jax.jacobian(lambda h: head.logits(params, h))(h),
                                                      head.vectors(params)))(jnp.zeros(D)))
    np.testing.assert_allclose(found - found.mean(0), slope - slope.mean(0), rtol=1e-4, atol=1e-4)
    plain = FlatHead(two()[0]).start(jnp.ones((V, D)), jnp.zeros(V))
    assert FlatHead(two()[0]).vectors(plain).shape == (V, D)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_moments_go_with_their_words_too(tmp_path, optimizer):
    c = tiny.read_recipe(tiny.write_recipe(tmp_path))
    c = dataclasses.replace(c, model=dataclasses.replace(c.model, head="factorised", prototypes=2, width=8, heads=1),
                            optimizer=dataclasses.replace(c.optimizer, name=optimizer, ema=0.9))
    first = Hierarchy.from_parents([np.arange(257) % 8])
    parent = first.parents[0].copy()
    parent[5] = 6
    second, tx = Hierarchy.from_parents([parent]), make_optimizer(c)[0]
    networks = [build(c, h)[0] for h in (first, second)]
    state = jax.jit(lambda key: init_state(c, networks[0], tx, key))(jax.random.key(0))
    named = jnp.zeros(networks[0].head.blocks.rows).at[networks[0].head.blocks.row].set(np.arange(257.0))

    def mark(path, leaf):
        words = any(getattr(key, "key", "") == "words" for key in path) and leaf.ndim == 1
        return named if words else leaf

    state = jax.tree_util.tree_map_with_path(mark, state)
    same, after = jax.jit(lambda s: tuple(regrouped(s, network, first) for network in networks))(state)
    equal(same, state)
    row = networks[1].head.blocks.row
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for tree in (after.opt_state, after.params, after.ema):
        found = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
                 if any(getattr(key, "key", "") == "words" for key in path) and leaf.ndim == 1]
        assert len(found) == (2 if tree is after.opt_state else 1)
        for leaf in found:
            assert np.flatnonzero(np.asarray(leaf[row]) != np.arange(257)).tolist() in ([], [5])
    assert sum(a.sum() for a in flat(after.opt_state)) == sum(a.sum() for a in flat(state.opt_state))


# -- the loop ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch):
    """The loop on one of the simulated devices; a NELBO that grows, so that the first checkpoint stays the best."""
    make = parallel.make_mesh
    monkeypatch.setattr(parallel, "make_mesh", lambda config, devices=None: make(config, jax.devices()[:1]))
    monkeypatch.setattr(train.Loop, "_measure", lambda self, *_: {
        "valid_nelbo": float(self.state.step), "valid_se": 0.0})


def learning(folder, head="flat", steps=8):
    c = tiny.read_recipe(tiny.write_recipe(folder))
    return dataclasses.replace(
        c, model=dataclasses.replace(c.model, head=head, prototypes=2, width=8),
        data=dataclasses.replace(c.data, dir=str(folder / "data")),
        optimizer=dataclasses.replace(c.optimizer, lr=0.05, schedule="constant", ema=0.5),
        train=dataclasses.replace(c.train, steps=steps, recluster_every=3, recluster_until=6),
        checkpoint=dataclasses.replace(c.checkpoint, every=2, minutes=0.0))


def records(workdir):
    return [{name: r.get(name) for name in ("step", "loss", "grad_norm", "moved")}
            for r in read_metrics(str(workdir / "metrics.jsonl"))]


@pytest.mark.slow
@pytest.mark.parametrize("head", ["flat", "factorised"])
def test_resumed_over_new_clusters_equals_never_stopped(tmp_path, alone, capsys, head):
    whole = tmp_path / "whole"
    state = train.train(learning(tmp_path, head), str(whole))
    said, learned = capsys.readouterr().out, sorted(whole.glob("hierarchy-*.npz"))
    assert "step 3, clusters anew" in said and "step 6, clusters anew" in said
    moved = {r["step"]: r["moved"] for r in records(whole) if r["moved"] is not None}
    assert list(moved) == [4, 7] and 0 < moved[4] < 1 and len(learned) == 1 + (moved[7] > 0)
    for r in Checkpoints(str(whole), read_only=True).steps():  # every checkpoint has its own
        wanted = Checkpoints(str(whole), read_only=True).meta(r)["hierarchy"]
        assert (Path(file_of(whole, wanted)) in learned) == (r > 3)
        assert Hierarchy.load(file_of(whole, wanted)).fingerprint == wanted
    # evaluation of the best from before and of the latest from after each use theirs
    best, latest = (load_here(str(whole), which) for which in ("best", "latest"))
    assert (best.step, latest.step) == (2, 8) and best.hierarchy == Hierarchy.load(whole / "hierarchy.npz")
    assert latest.hierarchy.fingerprint in {Hierarchy.load(path).fingerprint for path in learned}
    equal(latest.params, state.ema)
    assert hierarchy_file(str(whole)) == str(whole / "hierarchy.npz")
    # stopped between two of them: goes on with the first new hierarchy
    parts = tmp_path / "parts"
    train.train(learning(tmp_path, head, steps=4), str(parts))
    for place in (parts, whole):  # of the second only the file is left: killed before the checkpoint behind it
        shutil.rmtree(place / "checkpoints" / "8", ignore_errors=True)
        again = train.train(learning(tmp_path, head), str(place))
        for a, b in zip(flat(again), flat(state), strict=True):
            np.testing.assert_array_equal(a, b)
        assert [Path(p).name for p in sorted(place.glob("hierarchy-*.npz"))] == [p.name for p in learned]
    assert records(parts) == records(whole)
    for path in learned:
        path.unlink()
    with pytest.raises(ConfigError, match="hierarchy.npz [0-9a-f]{12} is not the checkpoint's") as caught:
        load_here(str(whole), "latest")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_on_eight_devices_as_on_one(tmp_path, monkeypatch):
    """Rows that are moved lie where the mesh has them: a run over data, fsdp and tensor shards goes through."""
    c = learning(tmp_path, "factorised", steps=4)
    c = dataclasses.replace(c, parallel=dataclasses.replace(c.parallel, data=2, fsdp=2, tensor=2))
    state = train.train(c, str(tmp_path / "run"))
    assert records(tmp_path / "run")[3]["moved"] > 0
    assert state.params["head"]["words"]["kernel"].sharding.shard_shape((256, 8)) != (256, 8)


def test_what_cannot_work_is_said():
    from hdlm_jax.config import resolve

    bytes_ = {"kind": "bytes", "vocab_size": 257}
    for wrong, text in (({"recluster_until": 5}, "goes with train.recluster_every"),
                        ({"recluster_every": -1}, "must not be negative"),
                        ({"recluster_every": 5}, "has no clusters to make anew")):
        with pytest.raises(ConfigError, match=text) as caught:
            resolve({"tokenizer": bytes_, "hierarchy": {"clusters": (1,)}, "train": wrong})
        assert "\n" not in str(caught.value)
    t = resolve({"tokenizer": bytes_, "train": {"steps": 100, "recluster_every": 20}}).train
    assert [done for done in range(101) if t.reclusters(done)] == [20, 40]


# -- clusters by counts ------------------------------------------------------------------------------------------------


def test_groups_of_like_frequency():
    counts = np.random.default_rng(0).zipf(1.3, 100).clip(max=1000)[:, None]
    h, _ = build_hierarchy(counts, (11, 3), special=(4,), group=groups.by_frequency)
    sizes = np.delete(h.token_count[1], h.anc[1][4])
    assert h.sizes == (100, 11, 3, 1) and sizes.max() - sizes.min() <= 1 and h.token_count[1][h.anc[1][4]] == 1
    rest = np.setdiff1d(np.arange(100), 4)
    order = rest[np.argsort(-counts[rest, 0], kind="stable")]
    assert (np.diff(h.anc[1][order]) >= 0).all()


def test_bigrams_find_the_classes_they_were_made_of():
    rng, n = np.random.default_rng(0), 6
    kind = rng.integers(0, n, 60)
    steps, token = rng.dirichlet(np.full(n, 0.1), n), np.zeros(20_000, int)
    for i in range(1, len(token)):
        token[i] = rng.choice(np.flatnonzero(kind == rng.choice(n, p=steps[kind[token[i - 1]]])))
    counts = scipy.sparse.coo_matrix((np.ones(len(token) - 1), (token[:-1], token[1:])), (60, 60)).tocsr()
    h, report = build_hierarchy(counts, (n,), group=groups.by_bigrams)

    def shared(node):
        joint = np.zeros((n, n))
        np.add.at(joint, (node[token[:-1]], node[token[1:]]), 1)
        return groups.mutual_information(joint)

    found = report["levels"][0]["mutual_information"]
    np.testing.assert_allclose(found, shared(h.anc[1]), rtol=1e-9)
    assert found > 0.97 * shared(kind) > 1.2 * shared(np.arange(60) % n)
    table = groups._Bigrams(counts, h.anc[1], n)  # what a move gains is what it gains
    right, left = (groups._neighbours(c, 7, h.anc[1], n) for c in (counts.tocsr(), counts.T.tocsr()))
    table.add(h.anc[1][7], -right, -left, -counts[7, 7])
    gain = table.gain(right, left, counts[7, 7])
    moves = [shared(np.where(np.arange(60) == 7, k, h.anc[1])) * (len(token) - 1) for k in range(n)]
    np.testing.assert_allclose(gain - gain[0], np.array(moves) - moves[0], atol=1e-6)


@pytest.mark.parametrize("kind", ["frequency", "brown"])
def test_clusters_of_a_run_by_counts(tmp_path, kind):
    c = tiny.read_recipe(tiny.write_recipe(tmp_path))
    c = dataclasses.replace(c, hierarchy=dataclasses.replace(c.hierarchy, embeddings=kind))
    text = stages.prepare(c, str(tmp_path / "run"))
    h = stages.cluster(c, str(tmp_path / "run"), text)
    assert h.sizes == (257, 8, 1) and (tmp_path / "run" / "clusters.txt").is_file()
    if kind == "frequency":
        top = np.argsort(-token_counts(text.dir, "train"), kind="stable")
        assert len(set(h.anc[1][top[:30]])) <= 2
