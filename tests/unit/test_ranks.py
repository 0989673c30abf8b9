"""Ranks from counts: exact where every value is an edge, within the stated error where not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from clipgap_ray.kernels import ranks

VALUES = st.lists(st.integers(-4, 4), min_size=0, max_size=30)


def parts_of(length: int, seed: int) -> list[np.ndarray]:
    """Positions of `length` values in three disjoint sets, some maybe empty."""
    drawn = np.random.default_rng(seed).integers(0, 3, length)
    return [np.nonzero(drawn == at)[0] for at in range(3)]


def correlation(x: np.ndarray, y: np.ndarray, edges, parts) -> tuple[float | None, float | None]:
    counts = tuple(sum(ranks.count(v[p], e) for p in parts) for v, e in zip((x, y), edges, strict=True))
    return ranks.correlation([ranks.products(x[p], y[p], edges, counts) for p in parts], counts)


@given(VALUES, st.integers(0, 5))
def test_with_every_value_an_edge_ranks_are_scipy_s(values, seed) -> None:
    x = np.array(values, np.float64)
    edges = ranks.grid(x)
    counts = sum(ranks.count(x[part], edges) for part in parts_of(len(x), seed))
    assert counts.sum() == len(x)
    assert ranks.average_ranks(counts)[ranks.cells(x, edges)] == pytest.approx(stats.rankdata(x))


@given(VALUES, st.integers(0, 1000))
def test_spearman_of_parts_is_scipy_s_where_every_value_is_an_edge(values, seed) -> None:
    x = np.array(values, np.float64)
    y = np.round(np.random.default_rng(seed).normal(size=len(x)) + 0.3 * x)
    found, error = correlation(x, y, (ranks.grid(x), ranks.grid(y)), parts_of(len(x), seed))
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        assert (found, error) == (None, None)
    else:
        assert found == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
        assert error == 0


@pytest.mark.parametrize("num_edges", [1, 3, 20, 200])
@pytest.mark.parametrize("digits", [1, 2, 9])
def test_a_coarse_grid_errs_by_less_than_it_says(num_edges, digits) -> None:
    rng = np.random.default_rng(num_edges)
    x = np.round(rng.normal(size=2000), digits)
    for mixed in (0.0, 0.5, 2.0, -3.0):
        y = np.round(mixed * x + rng.normal(size=2000), digits)
        edges = tuple(ranks.grid(rng.choice(v, num_edges, replace=False)) for v in (x, y))
        found, error = correlation(x, y, edges, parts_of(2000, 1))
        assert found is not None
        assert abs(found - stats.spearmanr(x, y).statistic) <= error


def test_the_error_shrinks_as_stated_with_the_edges() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=100_000)
    y = x + rng.normal(size=100_000)
    edges = tuple(ranks.grid(v[:1000]) for v in (x, y))
    found, error = correlation(x, y, edges, [np.arange(100_000)])
    assert 4 / 1000 < error < 6 / 1000  # 2.5 / E on either side
    assert abs(found - stats.spearmanr(x, y).statistic) < error / 10  # the bound is far from reached


@given(VALUES.filter(bool), st.integers(0, 1000))
def test_the_ends_of_a_rank_hold_its_value(values, seed) -> None:
    x = np.array(values, np.float64)
    rng = np.random.default_rng(seed)
    edges = ranks.grid(rng.choice(x, rng.integers(1, len(x) + 1), replace=False))
    counts = ranks.count(x, edges)
    for rank, value in enumerate(np.sort(x), 1):
        low, high = ranks.ends_of_rank(counts, edges, rank)
        assert low <= value <= high
        assert (low == high) == (value in edges)
    everything = ranks.grid(x)
    assert [ranks.ends_of_rank(ranks.count(x, everything), everything, r)[0] for r in range(1, len(x) + 1)] == sorted(x)


def test_cells_by_hand() -> None:
    edges = ranks.grid(np.array([2.0, 1.0, np.nan, 2.0, np.inf]))
    assert edges.tolist() == [1.0, 2.0]
    assert ranks.cells(np.array([-np.inf, 0.5, 1, 1.5, 2, 3, np.inf]), edges).tolist() == [0, 0, 1, 2, 3, 4, 4]
    assert ranks.count(np.zeros(0), edges).tolist() == [0] * 5
    assert ranks.cells(np.array([3.0]), np.zeros(0)).tolist() == [0]
