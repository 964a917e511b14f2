"""hdlm_jax.diffusion.hierarchy: ids, ancestors, runs of level-1 nodes, files, and every error."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdlm_jax.diffusion.hierarchy import Hierarchy, read_extra


def _onto(rng: np.random.Generator, members: int, nodes: int) -> np.ndarray:
    """A random map of `members` onto all `nodes`."""
    out = np.concatenate([np.arange(nodes), rng.integers(0, nodes, members - nodes)])
    return rng.permutation(out)


@st.composite
def hierarchies(draw: st.DrawFn) -> Hierarchy:
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    sizes = sorted(draw(st.lists(st.integers(2, 30), min_size=1, max_size=4)), reverse=True)
    if len(sizes) == 1:
        return Hierarchy.from_parents([], vocab_size=sizes[0])
    parents = [_onto(rng, fine, coarse) for fine, coarse in zip(sizes, sizes[1:], strict=False)]
    return Hierarchy.from_parents(parents, keep_single=draw(st.booleans()))


@settings(max_examples=60)
@given(hierarchies())
def test_everything_against_brute_force(h: Hierarchy) -> None:
    words, last = h.vocab_size, h.num_levels
    assert h.sizes[-1] == 1 and len(h.sizes) == last + 1
    assert h.num_states == sum(h.sizes) and h.mask_id == h.num_states - 1
    assert h.padded_states % 128 == 0 and 0 <= h.padded_states - h.num_states < 128
    for word in range(words):  # climb one map after the other
        node = word
        for level in range(last + 1):
            assert h.anc[level][word] == node
            if level < last:
                node = h.parents[level][node]
        assert node == 0
    below = {1: [{c} for c in range(h.sizes[1])]}  # level-1 nodes under every node
    for level in range(2, last + 1):
        below[level] = [set() for _ in range(h.sizes[level])]
        for child, parent in enumerate(h.parents[level - 1]):
            below[level][parent] |= below[level - 1][child]
    assert sorted(h.level1_order) == list(range(h.sizes[1]))
    for level in range(1, last + 1):
        for node, expected in enumerate(below[level]):
            start, count = h.level1_start[level][node], h.level1_count[level][node]
            assert count == len(expected)
            assert set(h.level1_order[start:start + count]) == expected
            assert all(h.level1_anc[level][c] == node for c in expected)
    assert h.level1_start[0] is h.level1_count[0] is None
    for level in range(last + 1):
        for node in range(h.sizes[level]):
            assert h.token_count[level][node] == np.sum(h.anc[level] == node)


@settings(max_examples=30)
@given(hierarchies())
def test_state_ids_are_one_to_one_and_ordered_by_level(h: Hierarchy) -> None:
    ids = np.arange(h.num_states)
    level, node = h.level_of(ids), h.node_of(ids)
    assert np.all(np.diff(level) >= 0)
    np.testing.assert_array_equal(h.state_id(level, node), ids)
    np.testing.assert_array_equal(level[:h.vocab_size], 0)
    np.testing.assert_array_equal(node[:h.vocab_size], ids[:h.vocab_size])
    assert level[h.mask_id] == h.num_levels
    for where, first in enumerate(h.offsets):
        assert h.level_of(first) == where and h.node_of(first) == 0
    assert h.level_of(ids.reshape(1, -1)).shape == (1, h.num_states)


def test_levels_are_cut_at_the_first_single_node() -> None:
    single = np.zeros(5, int)
    assert Hierarchy.from_parents([], vocab_size=5).sizes == (5, 1)
    assert Hierarchy.from_parents([single]).sizes == (5, 1)
    assert Hierarchy.from_parents([single], keep_single=True).sizes == (5, 1, 1)
    assert Hierarchy.from_parents([[0, 1, 2, 0, 1], [0, 0, 0], [0]]).sizes == (5, 3, 1)
    assert Hierarchy.from_parents([[0, 1, 2, 0, 1], [1, 0, 1]]).sizes == (5, 3, 2, 1)
    assert Hierarchy.from_parents([single]) == Hierarchy.from_parents([], vocab_size=5)


def test_dtypes_and_read_only() -> None:
    h = Hierarchy.from_parents([np.array([0, 1, 0, 1], np.uint16)])
    arrays = [*h.parents, *h.anc, *h.level1_count[1:], *h.level1_start[1:], h.level1_order, *h.token_count]
    assert {a.dtype for a in arrays} == {np.dtype(np.int32)}
    for array in arrays:
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_own_copy_of_the_maps() -> None:
    given_map = np.array([0, 1, 0], np.int32)
    h = Hierarchy.from_parents([given_map])
    given_map[:] = 0
    np.testing.assert_array_equal(h.parents[0], [0, 1, 0])


def test_equality_hash_and_fingerprint() -> None:
    a, b = Hierarchy.from_parents([[0, 0, 1, 1]]), Hierarchy.from_parents([[0, 0, 1, 1]])
    other = Hierarchy.from_parents([[0, 1, 0, 1]])
    assert a == b and hash(a) == hash(b) and a.fingerprint == b.fingerprint
    assert a != other and a.fingerprint != other.fingerprint and a != "a"
    assert a != Hierarchy.from_parents([[0, 0, 1, 1]], special=(3,))
    # Pinned: a change of the fingerprint would orphan every saved checkpoint.
    assert a.fingerprint.startswith("3f7401fdec2b4684")


@pytest.mark.parametrize(("parents", "kwargs", "message"), [
    ([], {}, "needs vocab_size"),
    ([], {"vocab_size": 1}, "vocab_size = 1: .* at least 2"),
    ([[0]], {}, "at least 2 tokens"),
    ([[0, 2, 0]], {}, "empty cluster: node 1 of level 1"),
    ([[0, 1, 0], [0, 0, 0]], {}, "empty cluster: node 2 of level 1"),
    ([[0, 1, 2], [0, 0]], {}, "holds node 2, but level 1 has nodes 0..1"),
    ([[0, 1, 0], [1, 1]], {}, "empty cluster: node 0 of level 2"),
    ([[0, -1, 0]], {}, "holds node -1"),
    ([[0, -1, 1], [0, 0]], {}, "holds node -1"),
    ([[0, 1, 0]], {"vocab_size": 4}, "3 tokens, but vocab_size = 4"),
    ([[0, 1, 0], []], {}, "parents.1. is empty"),
    ([[0.0, 1.0]], {}, "float64"),
    ([[[0, 1]]], {}, r"shape \(1, 2\)"),
    ([[0, 1, 0]], {"special": (3,)}, r"special token 3 is outside 0\.\.2"),
    ([[0, 2**40, 0]], {}, "does not fit int32"),
])
def test_bad_maps_give_one_clear_line(parents: list, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Hierarchy.from_parents(parents, **kwargs)
    assert "\n" not in str(caught.value)


def test_ids_out_of_range() -> None:
    h = Hierarchy.from_parents([[0, 1, 0]])
    for call in (h.level_of, h.node_of):
        with pytest.raises(ValueError, match=r"outside 0\.\.5"):
            call([0, 6])
    with pytest.raises(ValueError, match="outside its level"):
        h.state_id(1, 2)
    with pytest.raises(ValueError, match=r"outside 0\.\.2"):
        h.state_id(3, 0)


def test_save_and_load(tmp_path) -> None:
    h = Hierarchy.from_parents([[0, 1, 2, 0, 1], [0, 0, 1]], special=(4,))
    path = tmp_path / "deep" / "hierarchy.npz"
    h.save(path, "tok", {"seed": 3, "clusters": [3, 2]})
    loaded = Hierarchy.load(path, "tok")
    assert loaded == h and loaded.special == (4,) and loaded.sizes == h.sizes
    assert Hierarchy.load(path) == h
    assert read_extra(path) == {"seed": 3, "clusters": [3, 2]}
    kept = Hierarchy.from_parents([[0, 0, 0]], keep_single=True)
    kept.save(path, "tok")  # replaces the file
    assert Hierarchy.load(path).sizes == (3, 1, 1) and read_extra(path) == {}
    assert [p.name for p in path.parent.iterdir()] == ["hierarchy.npz"]  # nothing temporary stays


def test_classes_of_a_head_are_kept_and_are_no_states(tmp_path) -> None:
    path, plain = tmp_path / "hierarchy.npz", Hierarchy.from_parents([], 5)
    h = Hierarchy.from_parents([], 5, classes=np.array([1, 0, 2, 0, 1]))
    assert h.sizes == plain.sizes == (5, 1) and h.of_head.sizes == (5, 3, 1) and plain.of_head is plain
    assert h != plain and h != Hierarchy.from_parents([], 5, classes=np.array([0, 0, 2, 0, 1]))
    h.save(path, "tok")
    assert Hierarchy.load(path) == h and Hierarchy.load(path).classes.tolist() == [1, 0, 2, 0, 1]
    with pytest.raises(ValueError, match="empty cluster: node 1"):
        Hierarchy.from_parents([], 3, classes=np.array([0, 2, 0]))
    with pytest.raises(ValueError, match="a head's classes are the nodes of level 1 there"):
        Hierarchy((np.array([0, 1, 0]), np.zeros(2, int)), classes=np.array([0, 1, 0]))


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "hierarchy.npz"
    old, new = Hierarchy.from_parents([[0, 1, 0]]), Hierarchy.from_parents([[0, 1, 1]])
    old.save(path, "tok")

    def broken(file, **arrays):
        file.write(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", broken)
    with pytest.raises(OSError, match="disk full"):
        new.save(path, "tok")
    assert Hierarchy.load(path) == old
    assert len(list(tmp_path.iterdir())) == 1


def test_load_refuses_what_does_not_fit(tmp_path) -> None:
    path = tmp_path / "hierarchy.npz"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Hierarchy.load(path)
    Hierarchy.from_parents([[0, 1, 0]]).save(path, "a" * 64)
    with pytest.raises(ValueError, match="made for tokenizer aaaaaaaaaaaa, .* tokenizer is bbbbbbbbbbbb"):
        Hierarchy.load(path, "b" * 64)
    blob = path.read_bytes()
    path.write_bytes(blob[:len(blob) // 2])
    with pytest.raises(ValueError, match="no hierarchy file, or damaged"):
        Hierarchy.load(path)
    np.savez(path, something=np.arange(3))
    with pytest.raises(ValueError, match="no hierarchy file, or damaged"):
        Hierarchy.load(path)
    np.savez(path, header=np.array([{"pickle": 1}], dtype=object))
    with pytest.raises(ValueError, match="no hierarchy file, or damaged"):
        Hierarchy.load(path)


def test_load_notices_changed_maps(tmp_path) -> None:
    path = tmp_path / "hierarchy.npz"
    Hierarchy.from_parents([[0, 1, 0]]).save(path, "tok")
    with np.load(path) as data:
        content = dict(data)
    content["parents_0"] = np.array([0, 1, 1], np.int32)
    np.savez(path, **content)
    with pytest.raises(ValueError, match="damaged: its maps do not match"):
        Hierarchy.load(path)
