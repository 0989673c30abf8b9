"""Splits as filters: sizes exact, near and far complementary, ties by uid, copies together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipgap_ray import schema
from clipgap_ray.errors import ConfigError
from clipgap_ray.kernels import splits

VALUES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, -np.inf]), max_size=30).map(np.array)  # ties everywhere


@given(VALUES, st.data())
def test_near_and_far_are_complements_of_exact_size(values: np.ndarray, data: st.DataObject) -> None:
    size = data.draw(st.integers(0, len(values)))
    near, far = splits.keep_least(values, size), splits.keep_most(values, len(values) - size)
    assert near.sum() == size
    assert np.array_equal(near, ~far)
    # definition: sort by (value, uid position), keep the first
    expected = sorted(range(len(values)), key=lambda i: (values[i], i))[:size]
    assert sorted(np.nonzero(near)[0].tolist()) == sorted(expected)
    if 2 * size <= len(values):
        assert not (near & splits.keep_most(values, size)).any()


def test_the_least_similar_stay_under_near_and_the_most_similar_under_far() -> None:
    values = np.array([0.9, 0.1, 0.5, 0.1])
    assert splits.keep_least(values, 1).tolist() == [False, True, False, False]  # of the two 0.1 the lower uid
    assert splits.keep_most(values, 1).tolist() == [True, False, False, False]


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(0, 100))
def test_copies_of_a_uid_count_once_and_share_their_largest_value(numbers: list[int], seed: int) -> None:
    texts = [f"{(number % 2) << 64 | number:032x}" for number in numbers]
    uids, position = splits.unique_uids(schema.pack_uids(texts))
    assert schema.unpack_uids(uids) == sorted(set(texts))
    assert [schema.unpack_uids(uids[[at]])[0] for at in position] == texts
    values = np.random.default_rng(seed).integers(0, 9, len(texts)).astype(np.float32)
    largest = splits.max_per_uid(values, position, len(uids))
    assert largest.dtype == np.float64
    for at, text in enumerate(sorted(set(texts))):
        assert largest[at] == max(v for v, t in zip(values, texts, strict=True) if t == text)


@pytest.mark.parametrize(
    ("text", "kept"), [("0", 0), ("7", 7), ("10", 10), ("0.5", 5), ("1.0", 10), ("0.0", 0), (".25", 2), ("0.16", 2)]
)
def test_sizes_are_counts_or_with_a_point_fractions(text: str, kept: int) -> None:
    assert splits.parse_size(text, 10) == kept


@pytest.mark.parametrize("text", ["11", "-1", "1.5", "half", "", "1e1", "1,5", "nan", "0.5.1"])
def test_impossible_sizes_name_the_value(text: str) -> None:
    with pytest.raises(ConfigError, match="--size") as error:
        splits.parse_size(text, 10)
    assert text in str(error.value)


@given(st.integers(0, 200), st.integers(1, 60), st.data())
def test_only_rows_of_the_boundary_can_change_sides(seed: int, num: int, data: st.DataObject) -> None:
    """Exact values on the boundary and float32 ones elsewhere cut as exact values everywhere would."""
    bound = 0.01
    rng = np.random.default_rng(seed)
    truth = rng.choice(np.linspace(0, 0.2, 21), num)
    stored = truth + rng.uniform(-bound, bound, num)
    size = data.draw(st.integers(0, num))
    band = splits.boundary(stored, size, bound)
    mended = stored.copy()
    mended[band] = truth[band]
    assert np.array_equal(splits.keep_least(mended, size), splits.keep_least(truth, size))


def test_the_boundary_is_small_when_the_bound_is() -> None:
    values = np.linspace(0, 1, 1001)
    assert splits.boundary(values, 500, 1e-4).tolist() == [499]
    assert splits.boundary(values, 0, 1.0).tolist() == splits.boundary(values, 1001, 1.0).tolist() == []


def test_random_keeps_the_size_and_follows_the_seed() -> None:
    masks = [splits.keep_random(100, 30, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert [mask.sum() for mask in masks] == [30, 30, 30]
    assert np.array_equal(masks[0], masks[1])
    assert not np.array_equal(masks[0], masks[2])
    counts = sum(splits.keep_random(10, 5, np.random.default_rng(seed)).astype(int) for seed in range(400))
    assert (np.abs(counts - 200) < 60).all()  # six standard deviations of a fair coin


def test_largest_standardised_by_hand() -> None:
    columns = np.array([[0.9, 0.8, 0.1, 0.2], [0.10, 0.11, 0.12, 0.10]])
    z = splits.largest_standardised(columns, columns)
    assert z[2] == pytest.approx((0.12 - 0.1075) / np.std([0.10, 0.11, 0.12, 0.10]))
    assert z[0] == pytest.approx((0.9 - 0.5) / np.std([0.9, 0.8, 0.1, 0.2]))


def test_zscore_of_a_constant_set_is_zero_not_a_division_error() -> None:
    columns = np.array([[0.5, 0.5], [0.1, 0.3]])
    assert splits.largest_standardised(columns, columns).tolist() == [0.0, pytest.approx(1.0)]


# --- density matching ------------------------------------------------------------------------------------


def dense(order: list[int], similarity: np.ndarray, reference: np.ndarray) -> list[bool]:
    """The slow twin: admit a row if every query's list stays below the reference's curve, place by place."""
    kept: list[int] = []
    for item in order:
        lists = -np.sort(-similarity[[*kept, item]], axis=0)[: reference.shape[1]]
        if (reference[:, : len(lists)] >= lists.T).all():
            kept.append(item)
    return [item in kept for item in range(len(order))]


@given(seed=st.integers(0, 10_000), num=st.integers(0, 25), k=st.integers(1, 4), ties=st.booleans())
def test_density_matching_equals_the_slow_twin_and_bounds_every_curve(seed: int, num: int, k: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    similarity = rng.integers(0, 6, (num, 4)) / 8 if ties else rng.random((num, 4))
    reference = -np.sort(-(rng.integers(0, 6, (4, k)) / 8 if ties else rng.random((4, k))), axis=1)
    order = rng.permutation(num)
    items, queries = np.nonzero(similarity > reference[:, -1])
    keep = splits.density_match(order, items, queries, similarity[items, queries], reference)
    assert keep.tolist() == dense(order.tolist(), similarity, reference)
    gap_matched = (similarity <= reference[:, 0]).all(axis=1) if num else keep
    assert not (keep & ~gap_matched).any()  # never keeps what gap matching removes
    if k == 1:
        assert np.array_equal(keep, gap_matched)


def walk(values: np.ndarray, partition: np.ndarray, size: int, cap: int) -> list[int]:
    """Slow twin of a core set with a cap: down the list, of equals the highest uid first, past full partitions."""
    taken: list[int] = []
    room = dict.fromkeys(partition.tolist(), cap)
    for at in sorted(range(len(values)), key=lambda i: (values[i], i), reverse=True):
        if len(taken) < size and room[int(partition[at])]:
            taken.append(at)
            room[int(partition[at])] -= 1
    return sorted(taken)


@given(VALUES, st.integers(1, 4), st.integers(1, 6), st.data())
def test_the_largest_of_every_partition_and_of_them_the_largest_are_a_walk_down_the_list(
    values: np.ndarray, num_partitions: int, cap: int, data: st.DataObject
) -> None:
    partition = np.array([data.draw(st.integers(0, num_partitions - 1)) for _ in values], np.int32)
    most = np.nonzero(splits.most_per_partition(values, partition, cap))[0]
    assert most.tolist() == walk(values, partition, len(values), cap)
    size = data.draw(st.integers(0, len(most)))
    kept = most[splits.keep_most(values[most], size)]
    assert kept.tolist() == walk(values, partition, size, cap)
    assert np.bincount(partition[kept], minlength=num_partitions).max() <= cap
    if cap >= len(values):
        assert np.array_equal(kept, np.nonzero(splits.keep_most(values, size))[0])


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 6))
def test_values_outside_a_partition_s_boundary_cannot_change_its_cut(seed: int, num_partitions: int, cap: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 8, 24) / 8
    partition = rng.integers(0, num_partitions, 24)
    bound = 0.07
    stored = truth + rng.uniform(-bound, bound, 24)
    band = splits.partition_boundary(stored, partition, cap, bound)
    stored[band] = truth[band]
    expected = splits.most_per_partition(truth, partition, cap)
    assert np.array_equal(splits.most_per_partition(stored, partition, cap), expected)
    assert not len(splits.partition_boundary(truth, partition, 24, bound)), "no partition is larger than its cap"


@pytest.mark.parametrize(("cap", "expected"), [("7", 7), ("1.0", 5), ("1.5", 8), ("20.0", 100)])
def test_caps_are_counts_or_with_a_point_even_shares(cap: str, expected: int) -> None:
    assert splits.parse_cap(cap, 50, 10) == expected


@pytest.mark.parametrize("cap", ["4", "0.8", "0", "-1", "many", "1,5", "nan", "1.0x"])
def test_impossible_caps_name_the_value(cap: str) -> None:
    with pytest.raises(ConfigError, match="--cap") as error:
        splits.parse_cap(cap, 50, 10)
    assert cap in str(error.value)
