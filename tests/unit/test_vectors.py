"""Stored rows: float64 products of float16 rows are exact, and float32 scores stay within the bound."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipgap_ray.kernels import vectors
from tests import made, twins

SEEDS = st.integers(0, 2**32 - 1)


@given(SEEDS, st.sampled_from([1, 7, 64, 512, 1024]))
def test_the_float64_product_of_stored_rows_is_exact(seed: int, dim: int) -> None:
    left, right = made.unit_rows(1, dim, seed), made.unit_rows(1, dim, seed + 1)
    truth = twins.rational_similarity(left[0], right[0])
    assert Fraction(float(vectors.exact_pairs(left, right)[0])) == truth
    assert Fraction(float(vectors.exact_matrix(left, right)[0, 0])) == truth


@given(SEEDS, st.sampled_from([64, 512]))
def test_any_order_of_dimensions_gives_the_same_bits(seed: int, dim: int) -> None:
    rows = made.unit_rows(20, dim, seed)
    order = np.random.default_rng(seed).permutation(dim)
    assert np.array_equal(vectors.exact_matrix(rows, rows), vectors.exact_matrix(rows[:, order], rows[:, order]))


@pytest.mark.parametrize("dim", [16, 64, 512, 1024])
def test_float32_scores_stay_within_the_bound(dim: int) -> None:
    rows = made.unit_rows(200, dim, dim)
    rows = np.concatenate(
        [rows, rows[:20], np.nextafter(rows[20:40], np.float16(1))]
    )  # near s = 1, where sums are large
    exact = twins.similarities(rows, rows)
    assert np.abs(rows.astype(np.float32) @ rows.astype(np.float32).T - exact).max() <= vectors.error_bound(dim)
    # the least precise order of summation: one product after the other
    running = np.zeros(len(rows), np.float32)
    for d in range(dim):
        running = (running + rows[:, d].astype(np.float32) ** 2).astype(np.float32)
    assert np.abs(running - np.diag(exact)).max() <= vectors.error_bound(dim)


def test_the_bound_by_hand() -> None:
    assert vectors.error_bound(512) == 512 / 16_777_216


def test_normalise_leaves_zero_rows_and_the_argument_alone() -> None:
    rows = np.array([[3.0, 4.0], [0.0, 0.0]])
    assert vectors.normalise(rows).tolist() == [[np.float32(0.6), np.float32(0.8)], [0.0, 0.0]]
    assert rows.tolist() == [[3.0, 4.0], [0.0, 0.0]]
    assert vectors.normalise(rows).dtype == np.float32


def test_storage_is_rounding_to_float16() -> None:
    stored = vectors.to_storage(np.array([[1 + 2**-12, 0.1]]))
    assert stored.dtype == np.float16
    assert stored.tolist() == [[1.0, float(np.float16(0.1))]]


def test_chosen_pairs_equal_the_whole_matrix() -> None:
    left, right = made.unit_rows(9, 32, 0), made.unit_rows(7, 32, 1)
    i, j = np.array([8, 0, 3, 3, 5, 8]), np.array([6, 0, 2, 2, 1, 0])
    assert np.array_equal(vectors.exact_pairs_at(left, i, right, j), twins.similarities(left, right)[i, j])
    assert vectors.exact_pairs_at(left, i[:0], right, j[:0]).shape == (0,)
    left.setflags(write=False)  # as rows mapped from a file are
    assert np.array_equal(
        vectors.exact_pairs_at(left, i, right[::2], j // 2 * 0), left[i] @ right[0].astype(np.float64)
    )


def test_every_float16_is_read_exactly() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    rows = every[np.isfinite(every)].reshape(-1, 1)  # subnormal numbers and both zeros among them
    ones = np.ones_like(rows)
    assert np.array_equal(vectors.exact_pairs(rows, ones), rows[:, 0].astype(np.float64))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (np.ones((2, 4), np.float32), np.ones((2, 4), np.float16)),
        (np.ones((2, 4), np.float16), np.ones((2, 3), np.float16)),
    ],
)
def test_rows_of_another_type_or_length_are_refused(left: np.ndarray, right: np.ndarray) -> None:
    with pytest.raises(ValueError, match="float16 rows of one length"):
        vectors.exact_pairs(left, right)
