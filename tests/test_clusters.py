"""Word vectors, clusters within their limits, first embedding tables, report and picture of the clusters."""

import builtins
import dataclasses
import math
import time

import numpy as np
import pytest
import tiny
import tokenfiles
from hypothesis import given, settings
from hypothesis import strategies as st

from hdlm_jax.config import TokenizerConfig, default_clusters
from hdlm_jax.data import cluster_report, clustering, embeddings, tokenizers
from hdlm_jax.data.cluster_report import plane, write_report
from hdlm_jax.data.clustering import build_hierarchy
from hdlm_jax.data.embeddings import cooccurrence, corpus_embeddings, given_embeddings, initial_table, ppmi, unit_rows
from hdlm_jax.diffusion.hierarchy import Hierarchy, read_extra
from hdlm_jax.runs import stages


def _blobs(words: int = 300, kinds: int = 8, width: int = 16, noise: float = 0.2) -> np.ndarray:
    """Unit-ish vectors around `kinds` directions; word i belongs to kind i % kinds."""
    rng = np.random.default_rng(5)
    middle = np.linalg.qr(rng.standard_normal((width, width)))[0][:kinds]
    return (middle[np.arange(words) % kinds] + noise * rng.standard_normal((words, width))).astype(np.float32)


def _sizes_without(h: Hierarchy, level: int = 1) -> np.ndarray:
    """Sizes of the nodes of a level in nodes below, clusters of special words left out."""
    sizes = np.bincount(h.parents[level - 1], minlength=h.sizes[level])
    return np.delete(sizes, h.parents[0][list(h.special)]) if level == 1 else sizes


# ---------------------------------------------------------------- embeddings


def _brute_counts(tokens: list[int], v: int, window: int, eot: int | None) -> np.ndarray:
    out = np.zeros((v, v))
    for i, a in enumerate(tokens):
        for j in range(i + 1, min(i + window, len(tokens) - 1) + 1):
            if eot is not None and eot in tokens[i:j + 1]:
                continue
            out[a, tokens[j]] += 1 / (j - i)
    return out


@settings(max_examples=25)
@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 5), st.integers(1, 12),
       st.sampled_from([None, 5]))
def test_counts_by_brute_force_in_any_chunks(tokens: list[int], window: int, chunk: int,
                                             eot: int | None) -> None:
    got = cooccurrence(np.array(tokens, np.uint16), 6, eot=eot, window=window, chunk=chunk)
    np.testing.assert_allclose(got.toarray(), _brute_counts(tokens, 6, window, eot), rtol=1e-5)


def test_ppmi_by_brute_force() -> None:
    tokens = np.random.default_rng(0).integers(0, 6, 200)
    follows = _brute_counts(list(tokens), 7, 3, 5)  # word 5 ends documents, word 6 never occurs
    got = ppmi(cooccurrence(tokens, 7, eot=5, window=3)).toarray()
    counts = np.concatenate([follows, follows.T], axis=1)
    smooth = counts.sum(0) ** 0.75
    expected = np.zeros_like(counts)
    for w in range(7):
        for c in range(14):
            if counts[w, c]:
                joint = counts[w, c] / counts.sum()
                pmi = math.log(joint / (counts[w].sum() / counts.sum() * smooth[c] / smooth.sum()))
                expected[w, c] = max(0.0, pmi)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    assert not got[5].any() and not got[6].any()


def test_corpus_embeddings_are_the_truncated_svd() -> None:
    tokens = np.random.default_rng(1).integers(0, 40, 3000)
    matrix = ppmi(cooccurrence(tokens, 41, eot=40)).toarray()
    got = corpus_embeddings(tokens, 41, eot=40, dim=30)
    left, values, _ = np.linalg.svd(matrix)
    expected = (left[:, :30] * np.sqrt(values[:30]))
    assert got.shape == (41, 30) and got.dtype == np.float32
    np.testing.assert_allclose(got @ got.T, expected @ expected.T, atol=2e-3)  # signs are free
    assert not got[40].any()  # a word without contexts: exactly zero


def test_words_with_the_same_contexts_get_the_same_vector() -> None:
    # Words 1 and 2 are drawn alike, after 0 and before 3 or 4; so are 3 and 4.
    rng = np.random.default_rng(2)
    tokens = np.stack([np.zeros(4000, int), rng.integers(1, 3, 4000), rng.integers(3, 5, 4000)], 1).ravel()
    e = unit_rows(corpus_embeddings(tokens, 5, dim=4, window=2))
    cosine = e @ e.T
    assert cosine[1, 2] > 0.99 and cosine[3, 4] > 0.99
    assert cosine[1, 3] < 0.6 and cosine[0, 1] < 0.6


def test_corpus_of_few_directions_and_of_none() -> None:
    e = corpus_embeddings(np.array([0, 1] * 50), 6, dim=5)
    assert e.shape == (6, 5) and np.isfinite(e).all() and e[:2].any(1).all() and not e[2:].any()
    none = corpus_embeddings(np.array([3, 3, 3]), 6, eot=3, dim=5)
    assert none.shape == (6, 5) and not none.any()


def test_corpus_embeddings_are_deterministic_and_take_a_memmap(tmp_path) -> None:
    tokens = np.random.default_rng(3).zipf(1.5, 5000).clip(max=99).astype(np.uint16)
    tokens.tofile(tmp_path / "train.bin")
    once = corpus_embeddings(tokens, 100, eot=0, dim=12)
    again = corpus_embeddings(np.memmap(tmp_path / "train.bin", np.uint16, "r"), 100,
                         eot=0, dim=12)
    np.testing.assert_array_equal(once, again)


def test_a_long_corpus_is_counted_on_chunks_spread_over_it() -> None:
    assert embeddings._chunk_starts(100, 10, 1000) == list(range(0, 100, 10))
    assert embeddings._chunk_starts(100, 10, 30) == [0, 40, 90] or embeddings._chunk_starts(100, 10, 30) == [0, 50, 90]
    assert embeddings._chunk_starts(5, 10, 1) == [0]


def test_files_and_checkpoints(tmp_path) -> None:
    from safetensors.numpy import save_file

    table = np.random.default_rng(0).standard_normal((12, 3))
    np.save(tmp_path / "e.npy", table)
    save_file({"wte.weight": table.astype(np.float16), "wpe": table[:2]}, tmp_path / "m.safetensors")
    got = given_embeddings(f"{tmp_path}/e.npy", 10, dict)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, table[:10], rtol=1e-6)  # rows above V are padding
    half = given_embeddings(f"{tmp_path}/m.safetensors:wte.weight", 12, dict)
    np.testing.assert_allclose(half, table, rtol=1e-2, atol=1e-3)
    asked = []
    run = given_embeddings("checkpoint:runs/a", 12, lambda w: asked.append(w) or table)
    np.testing.assert_allclose(run, table, rtol=1e-6)
    assert asked == ["runs/a"]


def test_embedding_errors(tmp_path, monkeypatch) -> None:
    from safetensors.numpy import save_file

    np.save(tmp_path / "e.npy", np.ones((3, 2)))
    np.save(tmp_path / "flat.npy", np.ones(9))
    np.save(tmp_path / "nan.npy", np.full((9, 2), np.nan))
    save_file({"wte": np.ones((3, 2))}, tmp_path / "m.safetensors")
    for spec, error, message in [
        ("word2vec", ValueError, "'word2vec' is not one of 'corpus'"),
        (f"{tmp_path}/none.npy", FileNotFoundError, "none.npy does not exist"),
        (f"{tmp_path}/e.npy", ValueError, "has 3 rows, but the tokenizer has 9"),
        (f"{tmp_path}/flat.npy", ValueError, r"must be \[words, width\]"),
        (f"{tmp_path}/nan.npy", ValueError, "not finite"),
        (f"{tmp_path}/m.safetensors:wpe", ValueError, r"no tensor 'wpe' .* it has wte \[3, 2\]"),
        (f"{tmp_path}/m.safetensors", ValueError, r"no tensor '' .* it has wte"),
    ]:
        with pytest.raises(error, match=message) as caught:
            given_embeddings(spec, 9, dict)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"token 9 is outside the vocabulary 0\.\.8"):
        corpus_embeddings(np.arange(10), 9)
    _without(monkeypatch, "safetensors")
    with pytest.raises(ValueError, match=r"pip install 'hdlm_jax\[safetensors\]'"):
        given_embeddings(f"{tmp_path}/m.safetensors:wte", 3, dict)


def _without(monkeypatch, package: str) -> None:
    """Makes `import package` fail."""
    real = builtins.__import__

    def fake(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)


# ---------------------------------------------------------------- clusters


def test_finds_the_groups_there_are() -> None:
    h, report = build_hierarchy(_blobs(), (9,), special=(299,), seed=0)
    assert h.sizes == (300, 9, 1) and h.special == (299,)
    own = h.parents[0][299]
    assert own == 8 and np.sum(h.parents[0] == own) == 1
    kinds = np.arange(299) % 8
    pure = sum(np.bincount(kinds[h.parents[0][:299] == c]).max() for c in range(8)) / 299
    assert pure > 0.8
    level = report["levels"][0]
    assert level["size_min"] == _sizes_without(h).min() and level["size_max"] == _sizes_without(h).max()


def _adversarial(case: str) -> np.ndarray:
    rng = np.random.default_rng(7)
    blob = np.ones((400, 8)) + 1e-3 * rng.standard_normal((400, 8))
    if case == "one blob and outliers":
        blob[:20] = 10 * rng.standard_normal((20, 8))
    elif case == "all equal":
        blob[:] = 1
    elif case == "all unknown":
        blob[:] = 0
    elif case == "mostly unknown":
        blob[15:] = 0
    elif case == "two directions":
        blob = np.where(np.arange(400)[:, None] < 390, 1.0, -1.0) * np.ones(8)
    elif case == "one dimension":
        blob = rng.standard_normal((400, 1))
    return blob.astype(np.float32)


@pytest.mark.parametrize("case", ["one blob and outliers", "all equal", "all unknown", "mostly unknown",
                                  "two directions", "one dimension"])
@pytest.mark.parametrize("clusters", [(16,), (2,), (100, 10, 3), (400,)])
def test_sizes_stay_within_their_limits(case: str, clusters: tuple[int, ...]) -> None:
    points = _adversarial(case)
    h, report = build_hierarchy(points, clusters, special=(399,), seed=1)
    assert h.sizes == (400, *clusters, 1)
    for level in range(1, len(clusters) + 1):
        average = h.sizes[level - 1] / h.sizes[level]
        sizes = _sizes_without(h, level)
        assert sizes.min() >= 0.1 * average and sizes.max() <= 5 * average
        assert report["levels"][level - 1]["size_limits"][0] <= sizes.min()
    again, same = build_hierarchy(points, clusters, special=(399,), seed=1)
    assert again == h and same == report


def test_narrow_limits(monkeypatch) -> None:
    monkeypatch.setattr(clustering, "MIN_RATIO", 0.9)
    monkeypatch.setattr(clustering, "MAX_RATIO", 1.1)
    h, report = build_hierarchy(_adversarial("one blob and outliers"), (8,))
    assert 45 <= _sizes_without(h).min() and _sizes_without(h).max() <= 55
    assert report["levels"][0]["moved_out_of_large"] + report["levels"][0]["moved_into_small"] > 0
    monkeypatch.setattr(clustering, "MIN_RATIO", 1)
    monkeypatch.setattr(clustering, "MAX_RATIO", 1)
    h, _ = build_hierarchy(_blobs(100), (7,), special=(0,))  # 99 over 6
    assert set(_sizes_without(h)) <= {15, 16, 17}


def test_moves_the_farthest_words_and_takes_those_that_lose_least() -> None:
    # Cluster 0 at angle 0 holds angles 0..40 degrees, cluster 1 at 90 holds one word; at most 4 are allowed.
    angle = np.radians([0, 5, 10, 15, 30, 40, 90])
    similarity = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    label = np.array([0, 0, 0, 0, 0, 0, 1])
    assert clustering._shrink(label, similarity, high=4) == 2
    np.testing.assert_array_equal(label, [0, 0, 0, 0, 1, 1, 1])
    label = np.array([0, 0, 0, 0, 0, 0, 1])
    assert clustering._grow(label, similarity, low=2) == 1
    np.testing.assert_array_equal(label, [0, 0, 0, 0, 0, 1, 1])


def test_unknown_words_even_out_the_sizes() -> None:
    points = np.repeat(_blobs(8, noise=0), [70, 50, 30, 20, 15, 10, 4, 1], axis=0)
    points = np.concatenate([points, np.zeros((120, 16), np.float32)])
    h, report = build_hierarchy(points, (8,))
    known = np.bincount(h.parents[0][:200], minlength=8)
    full = np.bincount(h.parents[0], minlength=8)
    assert report["unknown_words"] == 120 and sorted(known)[-3:] == [30, 50, 70]
    assert np.ptp(full[full > known]) <= 1 and full[full == known].min() >= full[full > known].max() - 1


def test_levels_are_nested_and_upper_ones_group_like_clusters() -> None:
    coarse, fine = _blobs(640, kinds=4, width=64, noise=0), _blobs(640, kinds=32, width=64, noise=0.01)
    # Kinds of 32 lie around 4 directions (32 is a multiple of 4: i % 32 decides i % 4).
    h, _ = build_hierarchy(2 * coarse + fine, (32, 4), seed=2)
    assert h.sizes == (640, 32, 4, 1)
    for node in range(4):
        kinds = np.flatnonzero(h.anc[2] == node) % 4
        assert np.bincount(kinds).max() / len(kinds) > 0.7
    np.testing.assert_array_equal(h.anc[2], h.parents[1][h.parents[0]])


def test_shuffled_control_has_the_same_sizes_and_other_members() -> None:
    e = _blobs()
    real, _ = build_hierarchy(e, (30, 5), special=(7,), seed=3)
    control, report = build_hierarchy(e, (30, 5), special=(7,), seed=3, shuffle=True)
    for level in range(len(real.sizes)):
        np.testing.assert_array_equal(real.token_count[level], control.token_count[level])
    assert report["shuffle"] and control.special == (7,)
    assert control.parents[0][7] == real.parents[0][7] == 29
    assert np.mean(control.parents[0] == real.parents[0]) < 0.2
    np.testing.assert_array_equal(np.bincount(control.parents[1]), np.bincount(real.parents[1]))
    other, _ = build_hierarchy(e, (30, 5), special=(7,), seed=4, shuffle=True)
    assert other != control


def test_seed_matters_and_input_does_not_change() -> None:
    e = _blobs(noise=1.0)
    before = e.copy()
    a, _ = build_hierarchy(e, (16,), seed=0)
    b, _ = build_hierarchy(e, (16,), seed=1)
    assert a != b
    np.testing.assert_array_equal(e, before)


@pytest.mark.parametrize("clusters", [(), (1,)])
def test_no_clusters_is_mdlm(clusters: tuple[int, ...]) -> None:
    h, report = build_hierarchy(_blobs(50), clusters, special=(49,))
    assert h.sizes == (50, 1) and report["levels"] == [] and h.special == ()
    assert h == Hierarchy.from_parents([], vocab_size=50)


def test_closing_ones_are_dropped_and_small_n_keeps_special_words_inside() -> None:
    assert build_hierarchy(_blobs(50), (4, 1))[0].sizes == (50, 4, 1)
    h, report = build_hierarchy(_blobs(50), (2,), special=(49,))
    assert not report["special_own_cluster"] and h.special == () and h.token_count[1].min() > 1
    h, report = build_hierarchy(_blobs(50), (3,), special=(49,))
    assert report["special_own_cluster"] and h.token_count[1][2] == 1


def test_more_clusters_than_words() -> None:
    with pytest.raises(ValueError, match="51 clusters for 50 words"):
        build_hierarchy(_blobs(50), (51,))


def test_default_number_of_clusters() -> None:
    assert default_clusters(4096) == (64,)
    assert default_clusters(50257) == (256,)
    assert default_clusters(257) == (16,)


def test_all_points_are_used() -> None:
    # 256 points a centroid is faiss's silent default; a small far group would then often go unseen.
    import faiss

    seen, threads = [], faiss.omp_get_max_threads()
    real = faiss.Kmeans

    class Spy(real):
        def __init__(self, *args, **kwargs):
            seen.append(kwargs)
            super().__init__(*args, **kwargs)

    faiss.Kmeans = Spy
    try:
        build_hierarchy(_blobs(2000), (3,))
    finally:
        faiss.Kmeans = real
    assert faiss.omp_get_max_threads() == threads  # put back
    assert seen[0]["max_points_per_centroid"] * 3 >= 2000 and seen[0]["spherical"]


def test_fifty_thousand_words_take_seconds(monkeypatch) -> None:
    monkeypatch.setattr(clustering, "MAX_RATIO", 2)
    e = np.random.default_rng(0).standard_normal((50257, 16)).astype(np.float32)
    e[40000:] = 0
    e[:30000, 0] += 20  # a giant blob: hundreds of words must move
    start = time.perf_counter()
    h, _ = build_hierarchy(e, (64,), special=(50256,))
    assert time.perf_counter() - start < 20
    assert _sizes_without(h).max() <= 2 * 50257 / 64


# ---------------------------------------------------------------- first values of a model's table


@pytest.mark.parametrize("width", [8, 16, 64])
def test_initial_table(width: int) -> None:
    e = _blobs(300)
    e[5] = 0
    h, _ = build_hierarchy(e, (30, 5), special=(299,))
    table = initial_table(e, h, width, seed=0)
    assert table.shape == (h.padded_states, width) and table.dtype == np.float32
    bound = 1 / math.sqrt(width)
    assert table[:300].std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    # Only a word of which something is known, or a cluster of such, leaves the uniform range by design.
    rest = np.r_[5, h.mask_id:h.padded_states]
    assert np.abs(table[rest]).max() <= bound
    assert table[rest].std() == pytest.approx(bound / math.sqrt(3), rel=0.2)
    known = np.setdiff1d(np.arange(h.mask_id), [5])
    np.testing.assert_allclose(np.linalg.norm(table[known], axis=1), math.sqrt(1 / 3), rtol=1e-5)
    np.testing.assert_array_equal(table, initial_table(e, h, width, seed=0))
    if width >= e.shape[1]:  # wide enough: cosines are those of the centred vectors
        unit = unit_rows(e)
        centred = unit_rows(unit - unit[np.arange(300) != 5].mean(0))  # row 5 is not compared
        np.testing.assert_allclose(3 * table[known[:299]] @ table[known[:299]].T,
                                   centred[known[:299]] @ centred[known[:299]].T, atol=1e-4)
    # A cluster's row points to the mean of its words' rows, at every level; a lone word's row is the same.
    for level in (1, 2):
        node = 1
        words = np.setdiff1d(np.flatnonzero(h.anc[level] == node), [5])
        row = table[h.state_id(level, node)]
        mean = table[words].mean(0)
        assert row @ mean / np.linalg.norm(row) / np.linalg.norm(mean) == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(table[299], table[h.state_id(1, h.parents[0][299])], atol=1e-6)


def test_initial_table_of_nothing_is_uniform() -> None:
    h, _ = build_hierarchy(np.zeros((20, 4), np.float32), (4,))
    table = initial_table(np.zeros((20, 4)), h, 32)
    assert np.abs(table).max() <= 1 / math.sqrt(32) and table.std() > 0.9 / math.sqrt(96)
    with pytest.raises(ValueError, match="have 19 rows, the hierarchy 20 words"):
        initial_table(np.zeros((19, 4)), h, 32)


# ---------------------------------------------------------------- report and picture


def _decode(ids: list[int]) -> str:
    return "".join({0: "\n", 1: " $a_b$", 2: "\ufffd", 3: " \u2423\t"}.get(i, f" w{i}") for i in ids)


def test_report_names_every_cluster_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cluster_report, "_picture", lambda *_: False)
    e = _blobs()
    h, _ = build_hierarchy(e, (20, 4), special=(299,))
    counts = np.arange(300)[::-1] ** 2
    write_report(h, e, _decode, counts, tmp_path / "clusters.v1")
    text = (tmp_path / "clusters.v1.txt").read_text(encoding="utf-8")
    for node in range(20):
        heads = (f"cluster {node}:", f"cluster {node} (")
        line = [row for row in text.splitlines() if row.startswith(heads)]
        assert len(line) == 1 and f" {h.token_count[1][node]} words" in line[0]
    assert "(special): 1 words" in text and text.count("== Level 2, node") == 4
    heads = [row for row in text.splitlines() if row.startswith("cluster ")]
    shares = [float(row.rsplit(", ", 1)[1].split("%")[0]) for row in heads]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert "\\n" in text and "␣w4" in text and "\\ufffd" in text
    top = h.parents[0][4]  # words are listed most frequent first
    listed = text[text.index(f"cluster {top}:"):].splitlines()[1].split()
    numbers = [int(w[2:]) for w in listed if w.startswith("␣w")]
    assert numbers == sorted(numbers)
    write_report(h, e, _decode, counts, tmp_path / "again")
    assert (tmp_path / "again.txt").read_text(encoding="utf-8") == text


def test_picture(tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (extra: plots)")
    e = _blobs(80)
    e[7] = 0
    h, _ = build_hierarchy(e, (8,), special=(79,))
    path = tmp_path / "c.png"
    write_report(h, e, _decode, np.arange(80)[::-1], tmp_path / "c")
    blob = path.read_bytes()
    assert blob[:8] == b"\x89PNG\r\n\x1a\n" and len(blob) > 20_000
    _without(monkeypatch, "matplotlib")
    write_report(h, e, _decode, np.arange(80), tmp_path / "d")
    assert (tmp_path / "d.txt").is_file() and not (tmp_path / "d.png").exists()


@pytest.mark.parametrize("width", [1, 4])
def test_plane_keeps_groups_together(width: int) -> None:
    e = unit_rows(_blobs(160, kinds=4, width=4)[:, :width])
    at = plane(e, epochs=100)
    assert at.shape == (160, 2) and np.isfinite(at).all()
    np.testing.assert_array_equal(at, plane(e, epochs=100))
    if width == 4:
        distance = np.linalg.norm(at[:, None] - at[None], axis=-1)
        np.fill_diagonal(distance, np.inf)
        near = np.argsort(distance, axis=1)[:, :8]
        assert np.mean(near % 4 == np.arange(160)[:, None] % 4) > 0.9


# ---------------------------------------------------------------- real text


def test_real_text_gives_clusters_that_predict_their_neighbours(data_dir) -> None:
    """Words of tiny Shakespeare: clusters of adjacent words share far more nats than random ones do."""
    import gzip
    import re

    path = data_dir / "tinyshakespeare" / "input.txt.gz"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    words = re.findall(r"\w+|[^\w\s]|\n\n", gzip.decompress(path.read_bytes()).decode()[:600_000])
    vocabulary = {w: i for i, w in enumerate(sorted(set(words)))}
    tokens = np.array([vocabulary[w] for w in words])
    eot = vocabulary["\n\n"]
    e = corpus_embeddings(tokens, len(vocabulary), eot=eot, dim=32)

    def shared(h: Hierarchy) -> float:
        c = h.parents[0][tokens].astype(np.int64)
        joint = np.bincount(c[:-1] * 32 + c[1:], minlength=1024).reshape(32, 32) / (len(c) - 1)
        alone = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
        return float(np.sum(joint[joint > 0] * np.log(joint[joint > 0] / alone[joint > 0])))

    real, _ = build_hierarchy(e, (32,), special=(eot,))
    control, _ = build_hierarchy(e, (32,), special=(eot,), shuffle=True)
    assert shared(real) > 1.5 * shared(control)
    near = unit_rows(e) @ unit_rows(e).T
    his, her, was = (vocabulary[w] for w in ("his", "her", "was"))
    assert near[his, her] > 0.5 > near[his, was]


def test_special_tokens_are_no_cluster(tmp_path) -> None:
    """Rows of an open model's special tokens are alike, and no text has them: they make no centroid."""
    c = tiny.read_recipe(tiny.write_recipe(tmp_path))
    tokens = tokenizers.make_tokenizer("hub", file=str(tokenfiles.folder(tmp_path / "model")))
    vectors = np.random.default_rng(0).standard_normal((tokens.vocab_size, 8)).astype(np.float32)
    vectors[:, 0] += 4
    starts, ends = tokens.special["<|im_start|>"], tokens.special["<|im_end|>"]
    vectors[[starts, ends]] = np.eye(8)[1] - 9 * np.eye(8)[0]
    np.save(tmp_path / "vectors.npy", vectors)
    c = dataclasses.replace(
        c, tokenizer=TokenizerConfig(kind="hub", file=str(tmp_path / "model"), vocab_size=tokens.vocab_size),
        hierarchy=dataclasses.replace(c.hierarchy, clusters=(20,), embeddings=str(tmp_path / "vectors.npy")))
    run = str(tmp_path / "run")
    found = stages.cluster(c, run, stages.prepare(c, run))
    parent, special = found.anc[1], [starts, ends]
    path = f"{run}/hierarchy.npz"  # as an earlier version would have left it
    was = {k: v for k, v in read_extra(path)["settings"].items() if k != "head_clusters"}
    found.save(path, stages.prepare(c, run).tokenizer.fingerprint, {"settings": was})
    assert stages.cluster(c, run, stages.prepare(c, run)) == found
    assert found.special == (tokens.eot,) and (parent == parent[tokens.eot]).sum() == 1
    for cluster in parent[special]:
        assert set(np.flatnonzero(parent == cluster)) - set(special), "words that texts have"
