"""Partitions: none is empty, none is NaN, and every row's nearest ones are exact whatever the block."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipgap_ray.kernels import clustering
from clipgap_ray.kernels.vectors import normalise, to_storage
from tests import made, twins

SEEDS = st.integers(0, 10_000)


@pytest.mark.parametrize("block_scores", [1, 40, 1 << 24])
@given(seed=SEEDS, num_rows=st.integers(0, 20), num_partitions=st.integers(1, 9), probes=st.integers(1, 10))
def test_assignment_equals_brute_force_with_many_ties(
    block_scores: int, seed: int, num_rows: int, num_partitions: int, probes: int
) -> None:
    rows, centroids = made.sign_rows(num_rows, 16, seed), made.sign_rows(num_partitions, 16, seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clustering, "BLOCK_SCORES", block_scores)
        near, similarity = clustering.assign(rows, centroids, probes)
    values, expected = twins.nearest(rows, centroids, np.arange(num_partitions), min(probes, num_partitions))
    assert near.dtype == np.int32
    assert np.array_equal(near, expected)
    assert np.array_equal(similarity, values[:, 0])


@given(seed=SEEDS)
def test_assignment_of_nearly_equal_centroids_is_decided_exactly(seed: int) -> None:
    rows = made.unit_rows(30, 64, seed)
    # Copies of one centroid that differ in one last bit: float32 scores cannot order them.
    centroids = np.repeat(made.unit_rows(1, 64, seed + 1), 8, axis=0)
    for at in range(8):
        centroids[at, at] = np.nextafter(centroids[at, at], np.float16(1))
    near, similarity = clustering.assign(rows, centroids, 3)
    values, expected = twins.nearest(rows, centroids, np.arange(8), 3)
    assert np.array_equal(near, expected)
    assert np.array_equal(similarity, values[:, 0])


def naive_lloyd(rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """One step of the released code: the mean of nothing is 0/0, and argmin over NaN takes the NaN."""
    distance = ((rows[:, None] - centres[None]) ** 2).sum(-1)
    home = distance.argmin(axis=1)
    with np.errstate(invalid="ignore"):
        return np.stack([rows[home == c].sum(0) / np.float64((home == c).sum()) for c in range(len(centres))])


def test_defect_9_an_empty_partition_gives_no_nan_centroid() -> None:
    rows = np.repeat(np.eye(4, dtype=np.float16), 10, axis=0)
    start = np.concatenate([np.eye(4), [[-1.0, 0, 0, 0]]])  # nobody is near the last one
    broken = naive_lloyd(rows.astype(np.float64), start)
    assert np.isnan(broken[4]).all()
    distance = ((rows[:, None].astype(np.float64) - broken[None]) ** 2).sum(-1)
    assert set(distance.argmin(axis=1).tolist()) == {4}  # the defect: every row goes to the NaN

    for bad in (start, broken):  # an empty partition, and one that is NaN already
        centroids = clustering.reseed_empty(rows, to_storage(bad))
        assert np.isfinite(centroids).all()
        home, _ = clustering.assign(rows, centroids, 1)
        assert sorted(set(home[:, 0].tolist())) == list(range(len(centroids))) == [0, 1, 2, 3]


@given(seed=SEEDS, num_partitions=st.integers(1, 12), directions=st.integers(1, 12), copies=st.integers(1, 4))
def test_every_partition_has_a_row_and_a_finite_unit_centroid(
    seed: int, num_partitions: int, directions: int, copies: int
) -> None:
    rows = np.repeat(made.unit_rows(directions, 32, seed), copies, axis=0)  # fewer directions than rows
    before = rows.copy()
    centroids = clustering.spherical_kmeans(rows, num_partitions, seed)
    assert np.array_equal(rows, before)
    assert centroids.dtype == np.float16
    assert 1 <= len(centroids) <= min(num_partitions, directions)
    assert np.abs(np.linalg.norm(centroids.astype(np.float64), axis=1) - 1).max() < 2e-3
    home, _ = clustering.assign(rows, centroids, 1)
    assert (np.bincount(home[:, 0], minlength=len(centroids)) > 0).all()
    assert np.array_equal(clustering.spherical_kmeans(rows, num_partitions, seed), centroids)


def test_reseeding_takes_the_rows_that_their_centroid_describes_worst() -> None:
    rng = np.random.default_rng(0)
    cloud = to_storage(normalise(np.eye(8)[0] + 0.05 * rng.standard_normal((200, 8))))
    outliers = np.eye(8, dtype=np.float16)[[3, 3, 3, 5]]  # one of them thrice: it may take one partition only
    rows = np.concatenate([cloud, outliers])
    centroids = clustering.reseed_empty(rows, np.concatenate([cloud[:1], -np.eye(8, dtype=np.float16)[:2]]))
    assert {tuple(row) for row in centroids[1:].tolist()} == {tuple(row) for row in outliers[[0, 3]].tolist()}


@given(seed=SEEDS)
def test_in_the_end_every_centroid_is_the_mean_direction_of_its_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = to_storage(normalise(np.eye(16)[rng.integers(0, 6, 300)] + 0.1 * rng.standard_normal((300, 16))))
    centroids = clustering.spherical_kmeans(rows, 6, seed, iterations=100)
    home, _ = clustering.assign(rows, centroids, 1)
    for partition, centroid in enumerate(centroids.astype(np.float64)):
        mean = rows[home[:, 0] == partition].astype(np.float64).sum(axis=0)
        assert centroid @ mean / np.linalg.norm(mean) > 0.999  # rounding of rows and centroids to float16


def test_rows_without_direction_make_one_partition_and_do_not_disturb_others() -> None:
    zeros = np.zeros((5, 8), np.float16)
    assert np.array_equal(clustering.spherical_kmeans(zeros, 3, 0), np.zeros((1, 8)))
    mixed = clustering.spherical_kmeans(np.concatenate([zeros, np.eye(8, dtype=np.float16)]), 8, 0)
    assert sorted(map(tuple, mixed.tolist())) == sorted(map(tuple, np.eye(8).tolist()))


def test_nothing_to_partition_is_refused() -> None:
    with pytest.raises(ValueError, match="3 partitions of 0 rows"):
        clustering.spherical_kmeans(np.zeros((0, 4), np.float16), 3, 0)
    with pytest.raises(ValueError, match="0 probes among 2 centroids"):
        clustering.assign(made.unit_rows(3, 4, 0), made.unit_rows(2, 4, 1), 0)
