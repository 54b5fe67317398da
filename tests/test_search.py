"""Exact search against sorting all float64 distances: ties, removed rows, growth, devices, and what is compiled."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faceembed import mesh as meshes
from faceembed.identification import search

D = 16
DEVICES = (None, 1, 2, 4, 8)


def mesh_of(devices):
    return None if devices is None else meshes.make_mesh(devices)


def true_distances(vectors, probes):
    """[n, rows] in float64; a row of NaN is no row."""
    difference = probes[:, None].astype(np.float64) - vectors[None].astype(np.float64)
    distance = np.sum(difference**2, 2)
    return np.where(np.isnan(distance), np.inf, distance)


def oracle(vectors, probes, k):
    """([n, k] rows, [n, k] distances) of sorting all distances, ties by row."""
    distance = np.pad(true_distances(vectors, probes), ((0, 0), (0, k)), constant_values=np.inf)
    rows = np.argsort(distance, axis=1, kind="stable")[:, :k]
    distance = np.take_along_axis(distance, rows, 1)
    return np.where(np.isinf(distance), -1, rows), distance


def check_exact(found, vectors, probes, k):
    """Holds what `nearest` promises for any floats."""
    rows, distances = found
    assert (rows.dtype, distances.dtype) == (np.int64, np.float32)
    assert rows.shape == distances.shape == (len(probes), k)
    expected, truth = oracle(vectors, probes, k)
    np.testing.assert_array_equal(rows == -1, expected == -1)
    np.testing.assert_array_equal(np.isinf(distances), rows == -1)
    there = rows >= 0
    own = np.take_along_axis(np.pad(true_distances(vectors, probes), ((0, 0), (0, 1))), rows, 1)
    np.testing.assert_allclose(distances[there], truth[there], rtol=1e-6)
    np.testing.assert_allclose(own[there], truth[there], rtol=1e-6)
    for row, distance in zip(rows, distances, strict=True):
        pairs = [(d, r) for d, r in zip(distance, row, strict=True) if r >= 0]
        assert pairs == sorted(set(pairs))


def unsettled(monkeypatch):
    """A list that collects how many probes at a time were compared with every row."""
    counted, start = [], search._start

    def counting(how, matrix, probes, k):
        if how is search._every:
            counted.append(len(probes))
        return start(how, matrix, probes, k)

    monkeypatch.setattr(search, "_start", counting)
    return counted


# --- What is found


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 2**31 - 1),
    rows=st.sampled_from((1, 127, 128, 129, 3000)),
    levels=st.sampled_from((1, 2, 5)),
    devices=st.sampled_from((None, 4)),
)
def test_among_ties_the_lowest_rows_are_found(seed, rows, levels, devices):
    # Of small whole numbers every distance is exact in float32, so that rows must agree, too.
    rng = np.random.default_rng(seed)
    vectors = rng.integers(0, levels, (rows, D)).astype(np.float32)
    probes = rng.integers(0, levels, (3, D)).astype(np.float32)
    matrix = search.place(vectors, capacity=4096, mesh=mesh_of(devices))
    found, distances = search.nearest(matrix, probes, 5)
    expected, truth = oracle(vectors, probes, 5)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(distances, truth)


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 2**31 - 1),
    length=st.sampled_from((1e-3, 1.0, 1e3)),
    shift=st.sampled_from((0.0, 1.0, 1e3)),
    copies=st.sampled_from((1, 40)),
)
def test_any_floats_are_found_to_a_millionth(seed, length, shift, copies):
    rng = np.random.default_rng(seed)
    vectors = (shift + length * rng.normal(size=(900 // copies, D))).astype(np.float32)
    vectors = vectors[rng.permutation(np.arange(900) % len(vectors))]
    away = length * rng.choice((0, 0.01, 1), (3, 1)) * rng.normal(size=(3, D))
    probes = (vectors[:3] + away).astype(np.float32)
    matrix = search.place(vectors, capacity=1024)
    gone = rng.choice(900, 300, replace=False)
    matrix = search.write(matrix, gone, None)
    vectors[gone] = np.nan
    for k in (1, 5):
        check_exact(search.nearest(matrix, probes, k), vectors, probes, k)


@pytest.mark.parametrize("devices", [None, 8])
def test_rows_are_overwritten_appended_removed_and_written_again(devices):
    rng = np.random.default_rng(1)
    matrix = search.place(rng.normal(size=(0, D)), mesh=mesh_of(devices))
    vectors = np.empty((0, D), np.float32)
    probes = rng.normal(size=(2, D)).astype(np.float32)

    def check(k=3):
        assert matrix.count == len(vectors) <= matrix.capacity
        check_exact(search.nearest(matrix, probes, k), vectors, probes, k)

    def put(rows, new):
        nonlocal matrix, vectors
        matrix = search.write(matrix, np.asarray(rows), new)
        lacking = max(0, max(rows, default=-1) + 1 - len(vectors))
        vectors = np.concatenate([vectors, np.full((lacking, D), np.nan, np.float32)])
        vectors[np.asarray(rows, int)] = np.nan if new is None else new

    check()
    put([], np.empty((0, D)))
    put([], None)
    check()
    put([0], probes[:1] + 0.1)  # the first of all
    check()
    put([3, 1], probes + 0.2)  # leaves row 2 empty
    check()
    capacity = matrix.capacity
    put(range(4, 1600), rng.normal(size=(1596, D)).astype(np.float32))
    assert matrix.capacity >= 1600 > capacity
    check()
    near = search.nearest(matrix, probes, 3)[0].ravel()
    put(np.unique(near), None)  # the nearest are gone, and the next ones found
    check()
    put(near[:1], probes[:1])  # one is back
    assert search.nearest(matrix, probes, 1)[0][0, 0] == near[0]
    check()
    put(range(1600), None)
    rows, distances = search.nearest(matrix, probes, 3)
    assert (rows == -1).all()
    assert np.isinf(distances).all()
    put([1650], probes[:1])
    check()


def test_of_a_row_that_is_written_twice_the_last_vector_counts():
    first, second = np.zeros((1, D)), np.ones((1, D))
    matrix = search.write(search.place(first), np.array([5, 5, 2]), np.concatenate([first, second, first]))
    rows, distances = search.nearest(matrix, second, 2)
    assert rows.tolist() == [[5, 0]]
    assert distances.tolist() == [[0, D]]
    matrix = search.write(matrix, np.array([5, 5]), None)
    assert search.nearest(matrix, second, 3)[0].tolist() == [[0, 2, -1]]


def test_k_may_exceed_the_rows_and_probes_may_be_none_one_or_many():
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(300, D)).astype(np.float32)
    matrix = search.place(vectors)
    for n, k in ((0, 2), (2, 300), (2, 301), (600, 2)):
        probes = rng.normal(size=(n, D)).astype(np.float32)
        check_exact(search.nearest(matrix, probes, k), vectors, probes, k)
    few = search.place(vectors[:2])
    rows, distances = search.nearest(few, vectors[1:2], 4)
    assert rows[0, 0] == 1
    assert rows[0, 2:].tolist() == [-1, -1]
    assert np.isfinite(distances[0, :2]).all()
    assert np.isinf(distances[0, 2:]).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_and_memory_maps_are_taken(dtype, tmp_path):
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(50, D)).astype(dtype)
    np.save(tmp_path / "vectors.npy", vectors)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    probes = rng.normal(size=(2, D)).astype(dtype)
    found = search.nearest(search.place(mapped), probes, 3)
    check_exact(found, vectors.astype(np.float32), probes.astype(np.float32), 3)


def test_vectors_written_in_pieces_are_where_they_should_be(monkeypatch):
    monkeypatch.setattr(search, "CHUNK", 64)
    vectors = np.random.default_rng(4).normal(size=(300, D)).astype(np.float32)
    matrix = search.place(vectors, mesh=mesh_of(4))
    rows, distances = search.nearest(matrix, vectors, 1)
    assert rows[:, 0].tolist() == list(range(300))
    assert not distances.any()
    matrix = search.write(matrix, np.arange(0, 300, 2), None)
    rows, _ = search.nearest(matrix, vectors, 1)
    assert (rows % 2 == 1).all()


# --- Whatever the devices, tiles and blocks


def spread_and_copied():
    """(vectors, probes): 2500 rows that lie about, then five rows of which each is there 2000 times."""
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(12500, D)).astype(np.float32)
    vectors[2500:] = rng.permutation(np.repeat(vectors[2500:2505], 2000, axis=0))
    return vectors, np.concatenate([rng.normal(size=(3, D)), np.unique(vectors[2500:], axis=0) + 1e-3]).astype(
        np.float32
    )


def test_devices_find_the_same_to_the_bit(monkeypatch):
    vectors, probes = spread_and_copied()
    counted = unsettled(monkeypatch)
    found = {}
    for devices in DEVICES:
        matrix = search.place(vectors, mesh=mesh_of(devices))
        assert len(matrix.vectors.sharding.device_set) == (devices or 1)
        found[devices] = search.nearest(matrix, probes, 5)
        check_exact(found[devices], vectors, probes, 5)
        for one, other in zip(found[devices], found[None], strict=True):
            np.testing.assert_array_equal(one, other)
    # Those near copies cannot be settled by scores, wherever their rows are; the others are.
    assert counted == [5] * len(DEVICES)


@pytest.mark.parametrize(("tile", "together"), [(1, 1), (640, 3), (2**22, 2**10)])
def test_tiles_find_the_same_to_the_bit(monkeypatch, tile, together):
    vectors, probes = spread_and_copied()
    matrix = search.place(vectors)
    expected = search.nearest(matrix, probes, 5)
    monkeypatch.setattr(search, "plan", lambda *about: search.Plan(tile, together))
    for one, other in zip(search.nearest(matrix, probes, 5), expected, strict=True):
        np.testing.assert_array_equal(one, other)
    one = search.nearest(matrix, probes[:1], 5)
    np.testing.assert_array_equal(one[0], expected[0][:1])


def test_distances_to_the_best_blocks_and_to_every_row_are_the_same_to_the_bit():
    rng = np.random.default_rng(6)
    vectors = rng.normal(size=(3000, 128)).astype(np.float32)
    matrix = search.place(vectors)
    screened = jax.device_get(search._start(search._screened, matrix, vectors[:8] + 0.1, 5))
    every = jax.device_get(search._start(search._every, matrix, vectors[:8] + 0.1, 5))
    for one, other in zip(screened, every, strict=True):
        np.testing.assert_array_equal(one, other)


def test_scores_that_cancel_prove_nothing(monkeypatch):
    # In float32 the scores of these differ by rounding alone; Σ(x-t)² tells them apart all the same.
    rng = np.random.default_rng(7)
    vectors = (1000 + 0.1 * rng.normal(size=(4000, D))).astype(np.float32)
    probes = vectors[:8] + rng.normal(size=(8, D)).astype(np.float32) / 100
    counted = unsettled(monkeypatch)
    check_exact(search.nearest(search.place(vectors), probes, 2), vectors, probes, 2)
    assert counted == [8]


def test_a_proof_does_not_depend_on_how_long_the_farthest_vectors_are(monkeypatch):
    rng = np.random.default_rng(8)
    vectors = rng.normal(size=(4000, D)).astype(np.float32)
    vectors[7] *= 1e6
    counted = unsettled(monkeypatch)
    probes = rng.normal(size=(8, D)).astype(np.float32)
    matrix = search.place(vectors)
    check_exact(search.nearest(matrix, probes, 5), vectors, probes, 5)
    for probe in probes:
        check_exact(search.nearest(matrix, probe[None], 5), vectors, probe[None], 5)
    assert not counted


def test_a_probe_is_settled_when_all_devices_say_so(monkeypatch):
    rng = np.random.default_rng(11)
    vectors = rng.normal(size=(2 * 3000, D)).astype(np.float32)
    vectors[1::2] = vectors[1]  # all of the second device's
    counted = unsettled(monkeypatch)
    probes = np.stack([vectors[0], vectors[1] + 1e-3])
    check_exact(search.nearest(search.place(vectors, mesh=mesh_of(2)), probes, 2), vectors, probes, 2)
    assert counted == [1]


@pytest.mark.parametrize("devices", [None, 2])
def test_the_last_row_counts_where_a_tile_begins_with_it(monkeypatch, devices):
    monkeypatch.setattr(search, "plan", lambda *about: search.Plan(search.BLOCK, 1))
    last = 10 * search.BLOCK * (devices or 1)  # in more blocks than are ranked in any case
    vectors = np.random.default_rng(12).normal(size=(last + 1, D)).astype(np.float32)
    matrix = search.place(vectors, capacity=2 * last, mesh=mesh_of(devices))
    check_exact(search.nearest(matrix, vectors[-1:], 2), vectors, vectors[-1:], 2)


# --- Once compiled, in place


def test_a_search_is_compiled_once_for_a_capacity_a_k_and_a_power_of_two():
    rng = np.random.default_rng(9)
    matrix = search.place(rng.normal(size=(500, 24)))
    before = search._screened._cache_size()

    def compiled():
        return search._screened._cache_size() - before

    for n in (5, 6, 7, 8, 5):
        search.nearest(matrix, rng.normal(size=(n, 24)), 2)
    assert compiled() == 1
    for _ in range(3):  # changes within the capacity
        matrix = search.write(matrix, np.array([matrix.count]), rng.normal(size=(1, 24)))
        matrix = search.write(matrix, np.array([3]), None)
        search.nearest(matrix, rng.normal(size=(8, 24)), 2)
    assert compiled() == 1
    search.nearest(matrix, rng.normal(size=(9, 24)), 2)
    assert compiled() == 2
    search.nearest(matrix, rng.normal(size=(8, 24)), 3)
    assert compiled() == 3
    search.nearest(matrix, rng.normal(size=(2 * search.BATCH + 7, 24)), 2)  # 256, 256 and 8
    assert compiled() == 4


def test_writes_are_compiled_seldom_and_rows_appended_one_by_one_move_seldom():
    rng = np.random.default_rng(10)
    matrix = search.place(rng.normal(size=(1, 24)))
    compiled, grown = search._overwritten._cache_size(), search._grown._cache_size()
    for row in range(1, 600):
        matrix = search.write(matrix, np.array([row]), rng.normal(size=(1, 24)))
    assert matrix.count == 600
    assert search._grown._cache_size() - grown == 3  # 128 to 256, 384 and 640
    assert search._overwritten._cache_size() - compiled <= 5


@pytest.mark.parametrize("devices", [None, 4])
def test_a_write_happens_in_place(devices):
    matrix = search.place(np.ones((600, D)), mesh=mesh_of(devices))

    def addresses(matrix):
        shards = (*matrix.vectors.addressable_shards, *matrix.bias.addressable_shards)
        return [shard.data.unsafe_buffer_pointer() for shard in shards]

    before, old = addresses(matrix), matrix
    matrix = search.write(matrix, np.array([3, 5, 600]), np.zeros((3, D)))
    matrix = search.write(matrix, np.array([5]), None)
    assert addresses(matrix) == before
    assert search.nearest(matrix, np.zeros((1, D)), 2)[0].tolist() == [[3, 600]]
    assert old.vectors.is_deleted()  # `write` consumes it


# --- What is refused


def test_what_does_not_fit_is_told():
    good = np.ones((3, D), np.float32)
    bad, long = good.copy(), good.copy()
    bad[1, 2], long[2] = np.nan, 1e19
    matrix = search.place(good)
    for vectors, message in (
        (good[0], r"vectors have shape \[16\], not \[n, d\]"),
        (np.ones((3, 0)), r"vectors have shape \[3, 0\]"),
        (good.astype(int), "vectors are int64, not floats"),
        (bad, r"vectors\[1\] is not finite"),
        (long, r"vectors\[2\] is too long for float32"),
        (long.astype(np.float64) ** 3, r"vectors\[2\] is too long for float32"),
    ):
        with pytest.raises(ValueError, match=message):
            search.place(vectors)
    with pytest.raises(ValueError, match="capacity is 2, and there are 3 vectors"):
        search.place(good, capacity=2)
    for rows, vectors, message in (
        ([0], good[:1, :4], r"shape \[1, 4\], not \[n, 16\] as the gallery"),
        ([0], good, "there are 1 rows and 3 vectors"),
        ([0.5], good[:1], r"rows are float64 of shape \[1\], not integers"),
        ([[0]], good[:1], r"not integers \[m\]"),
        ([-1], good[:1], "row -1 is negative"),
        ([2, 3], None, "row 3 was never written"),
        ([1], bad[1:2], r"vectors\[0\] is not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            search.write(matrix, np.array(rows), vectors)
    for probes, k, message in (
        (good[:, :4], 1, r"probes have shape \[3, 4\], not \[n, 16\]"),
        (bad, 1, r"probes\[1\] is not finite"),
        (good, 0, "k is 0"),
        (good, 1.5, "k is 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            search.nearest(matrix, probes, k)
    # Nothing of this has changed anything.
    assert search.nearest(matrix, good[:1], 4)[0].tolist() == [[0, 1, 2, -1]]
