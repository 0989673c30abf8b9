"""One pass equals the definitions, whatever the blocks, order, ties and empties."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipgap_ray.kernels import kept, nearest, nearest_exact
from clipgap_ray.kernels.nearest_torch import TorchPass
from clipgap_ray.kernels.vectors import error_bound
from tests import made, twins

DIM = 16
SIZES = st.tuples(st.integers(0, 40), st.lists(st.integers(1, 7), min_size=1, max_size=3), st.integers(1, 5))
SEEDS = st.integers(0, 10_000)
ROWS = st.sampled_from([made.unit_rows, made.sign_rows])  # sign_rows: almost everything ties


def shuffled_ids(num_rows: int, seed: int) -> np.ndarray:
    """Unique row ids of several parts, in no order."""
    ids = np.arange(num_rows, dtype=np.int64) + (np.arange(num_rows, dtype=np.int64) % 3 << 32)
    return np.random.default_rng(seed).permutation(ids)


def stacked(counts: list[int], rows: object, seed: int) -> tuple[nearest.Queries, list[np.ndarray], np.ndarray]:
    """Test sets, and thresholds that lie close to the similarities so that margins change sign."""
    sets = [rows(count, DIM, seed + 1 + i) for i, count in enumerate(counts)]  # type: ignore[operator]
    tau = np.random.default_rng(seed).uniform(-0.2, 0.6, sum(counts))
    ids = [np.arange(count, dtype=np.int64) for count in counts]
    parts = np.split(tau, np.cumsum(counts)[:-1])
    return nearest.Queries.stack(sets, ids, parts), sets, tau


@pytest.mark.parametrize("block", [1, 7, 512])
@given(sizes=SIZES, seed=SEEDS, make=ROWS)
def test_both_sides_equal_brute_force(block: int, sizes: tuple[int, list[int], int], seed: int, make: object) -> None:
    num_rows, counts, k = sizes
    rows, ids = make(num_rows, DIM, seed), shuffled_ids(num_rows, seed)  # type: ignore[operator]
    queries, sets, tau = stacked(counts, make, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest, "BLOCK_ROWS", block)
        pool, found = nearest.score(rows, ids, queries, k)
    bound = error_bound(DIM)
    for segment, test in enumerate(sets):
        at = slice(int(queries.offsets[segment]), int(queries.offsets[segment + 1]))
        if num_rows:
            m, margin = twins.pool_scores(rows, test, tau[at])
            assert np.abs(pool.m[:, segment] - m).max() <= bound
            assert np.abs(pool.margin[:, segment] - margin).max() <= 2 * bound
            # the reported test rows attain the maxima, and lie in the right set
            own = twins.similarities(rows, queries.rows)
            arg, arg_margin = pool.arg_m[:, segment], pool.arg_margin[:, segment]
            assert ((arg >= at.start) & (arg < at.stop)).all()
            assert (own[np.arange(num_rows), arg] >= m - 2 * bound).all()
            assert ((own - tau)[np.arange(num_rows), arg_margin] >= margin - 4 * bound).all()
    best, best_id = twins.nearest(queries.rows, rows, ids, max(k, 1))
    assert np.array_equal(found.best, best[:, 0])  # exact, not within a bound
    assert np.array_equal(found.best_id, best_id[:, 0])
    finite = np.isfinite(best)
    assert np.array_equal(np.isfinite(found.similarities), finite)
    assert np.array_equal(found.row_ids >= 0, finite)
    assert np.abs(found.similarities[finite] - best[finite]).max(initial=0) <= bound
    assert (found.similarities[:, 1:] <= found.similarities[:, :-1]).all()


def test_shapes_and_types_of_an_empty_pool() -> None:
    queries, _, _ = stacked([2, 3], made.unit_rows, 0)
    pool, found = nearest.score(np.zeros((0, DIM), np.float16), np.zeros(0, np.int64), queries, 4)
    assert pool.m.shape == pool.arg_margin.shape == (0, 2)
    assert (pool.m.dtype, pool.arg_m.dtype) == (np.float32, np.int64)
    assert found.best.tolist() == [-np.inf] * 5
    assert found.row_ids.tolist() == [[-1] * 4] * 5


def test_an_empty_test_set_among_others_has_no_maximum() -> None:
    rows = made.unit_rows(3, DIM, 0)
    queries = nearest.Queries.stack(
        [rows[:1], rows[:0]], [np.zeros(1, np.int64), np.zeros(0, np.int64)], [np.zeros(1), np.zeros(0)]
    )
    pool, _ = nearest.score(rows, np.arange(3, dtype=np.int64), queries, 1)
    assert pool.m[:, 1].tolist() == [-np.inf] * 3
    assert pool.arg_m[:, 1].tolist() == [-1] * 3
    assert np.isfinite(pool.m[:, 0]).all()


def test_without_thresholds_the_margin_is_nan_for_that_set_alone() -> None:
    rows = made.unit_rows(4, DIM, 0)
    ids = [np.arange(2, dtype=np.int64)] * 2
    queries = nearest.Queries.stack([rows[:2], rows[2:]], ids, [np.full(2, np.nan), np.zeros(2)])
    pool, _ = nearest.score(rows, np.arange(4, dtype=np.int64), queries, 1)
    assert np.isnan(pool.margin[:, 0]).all()
    assert np.isfinite(pool.margin[:, 1]).all()
    assert np.isfinite(pool.m).all()


def test_ties_go_to_the_smaller_row_id_even_when_more_rows_tie_than_are_kept() -> None:
    row = made.unit_rows(1, 64, 5)
    rows = np.concatenate([made.unit_rows(50, 64, 6), np.repeat(row, 700, axis=0), made.unit_rows(50, 64, 7)])
    ids = np.random.default_rng(0).permutation(len(rows)).astype(np.int64) + (7 << 32)
    queries = nearest.Queries.stack([row], [np.zeros(1, np.int64)], None)
    _, found = nearest.score(rows, ids, queries, 3)
    best, best_id = twins.nearest(row, rows, ids, 1)
    assert (found.best[0], found.best_id[0]) == (best[0, 0], best_id[0, 0])


def test_the_nearest_row_is_decided_where_float32_cannot_tell() -> None:
    """700 rows whose similarities differ by less than the rounding of float32: only the exact order is right."""
    rng = np.random.default_rng(3)
    rows = np.repeat(made.unit_rows(1, 64, 1), 700, axis=0)
    rows[:, :8] = rng.uniform(-1e-3, 1e-3, (700, 8))
    query = made.unit_rows(1, 64, 2)
    query[:, :8] = np.float16(1e-5)
    assert len(np.unique(rows.astype(np.float32) @ query[0].astype(np.float32))) < 50
    assert len(np.unique(twins.similarities(query, rows))) > 600
    ids = rng.permutation(700).astype(np.int64)
    expected, expected_id = twins.nearest(query, rows, ids, 5)
    _, found = nearest.score(rows, ids, nearest.Queries.stack([query], [np.zeros(1, np.int64)], None), 1)
    assert (found.best[0], found.best_id[0]) == (expected[0, 0], expected_id[0, 0])
    similarity, row_ids = nearest_exact.nearest(query, [(rows[:300], ids[:300]), (rows[300:], ids[300:])], 5)
    assert np.array_equal(similarity, expected)
    assert np.array_equal(row_ids, expected_id)


@given(seed=SEEDS, cuts=st.lists(st.integers(0, 30), max_size=4), k=st.integers(1, 6))
def test_merging_parts_in_any_tree_equals_one_pass(seed: int, cuts: list[int], k: int) -> None:
    rows, ids = made.sign_rows(30, DIM, seed), shuffled_ids(30, seed)
    queries, _, _ = stacked([4], made.sign_rows, seed)
    bounds = [0, *sorted(cuts), 30]
    pieces = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    parts = [nearest.score(rows[piece], ids[piece], queries, k)[1] for piece in pieces]
    _, whole = nearest.score(rows, ids, queries, k)
    left = nearest.empty(4, k)
    for part in parts:
        left = nearest.merge([left, part])
    right = nearest.empty(4, k)
    for part in reversed(parts):
        right = nearest.merge([part, right])
    for merged in (left, right, nearest.merge(parts)):
        for name in ("best", "best_id", "row_ids"):
            assert np.array_equal(getattr(merged, name), getattr(whole, name)), name
        assert np.array_equal(merged.similarities, whole.similarities)


def test_nothing_to_merge_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to merge"):
        nearest.merge([])


@given(seed=SEEDS, num_rows=st.integers(0, 60), k=st.integers(1, 5), cut=st.integers(0, 60), make=ROWS)
def test_k_nearest_over_blocks_equal_brute_force(seed: int, num_rows: int, k: int, cut: int, make: object) -> None:
    rows, ids = make(num_rows, DIM, seed), shuffled_ids(num_rows, seed)  # type: ignore[operator]
    queries = np.concatenate([make(3, DIM, seed + 1), rows[:2]])  # type: ignore[operator]  two exact copies
    similarity, row_ids = nearest_exact.nearest(queries, [(rows[:cut], ids[:cut]), (rows[cut:], ids[cut:])], k)
    expected, expected_ids = twins.nearest(queries, rows, ids, k)
    assert np.array_equal(similarity, expected)
    assert np.array_equal(row_ids, expected_ids)


def test_kernels_leave_their_arguments_alone() -> None:
    rows, ids = made.unit_rows(20, DIM, 0), np.arange(20, dtype=np.int64)
    queries, _, _ = stacked([3], made.unit_rows, 1)
    frozen = [rows, ids, queries.rows, queries.tau, queries.offsets]
    for array in frozen:
        array.flags.writeable = False  # a write would raise
    _, found = nearest.score(rows, ids, queries, 2)
    nearest.merge([found, found])
    kept.around(rows, ids, np.ones((1, 20), bool), queries, 2, (0.1,))
    nearest_exact.above(rows, queries.rows, np.zeros(3))


# --- a pass in portions, on either device ----------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "torch"])
@given(sizes=SIZES, seed=SEEDS, cuts=st.lists(st.integers(0, 40), max_size=3), make=ROWS)
def test_a_pass_in_portions_equals_the_definitions(
    device: str, sizes: tuple[int, list[int], int], seed: int, cuts: list[int], make: object
) -> None:
    num_rows, counts, k = sizes
    rows, ids = make(num_rows, DIM, seed), shuffled_ids(num_rows, seed)  # type: ignore[operator]
    queries, sets, tau = stacked(counts, make, seed)
    if device == "torch":  # the GPU's code on a CPU: same formulas, same order of ties
        one: nearest.Pass = TorchPass(queries, k, violations=True, device="cpu")
        one.block_rows = 7
    else:
        one = nearest.begin(queries, k, violations=True)
    bounds = [0, *sorted(min(cut, num_rows) for cut in cuts), num_rows]
    portions = [one.feed(rows[a:b], ids[a:b]) for a, b in itertools.pairwise(bounds)]
    found = one.found()
    m, margin, violations = (
        np.concatenate([getattr(portion, name) for portion in portions]) for name in ("m", "margin", "violations")
    )
    for segment, test in enumerate(sets):
        at = slice(int(queries.offsets[segment]), int(queries.offsets[segment + 1]))
        exact = twins.similarities(rows, test) if num_rows else np.zeros((0, len(test)))
        expected_m, expected_margin = twins.pool_scores(rows, test, tau[at]) if num_rows else (m[:, 0], margin[:, 0])
        assert np.abs(m[:, segment] - expected_m).max(initial=0) <= one.bound
        assert np.abs(margin[:, segment] - expected_margin).max(initial=0) <= 2 * one.bound
        assert violations[:, segment].tolist() == (exact > tau[at]).sum(axis=1).tolist()  # exact, not within a bound
    best, best_id = twins.nearest(queries.rows, rows, ids, max(k, 1))
    assert np.array_equal(found.best, best[:, 0])
    assert np.array_equal(found.best_id, best_id[:, 0])
    finite = np.isfinite(best)
    assert np.array_equal(found.row_ids >= 0, finite)
    assert np.abs(found.similarities[finite] - best[finite]).max(initial=0) <= one.bound


@given(seed=SEEDS, num_rows=st.integers(0, 60), make=ROWS)
def test_pairs_above_a_floor_are_exact(seed: int, num_rows: int, make: object) -> None:
    rows, queries = make(num_rows, DIM, seed), make(5, DIM, seed + 1)  # type: ignore[operator]
    exact = twins.similarities(rows, queries) if num_rows else np.zeros((0, 5))
    # floors that are some row's own similarity: strictly above excludes that row
    floor = np.sort(exact, axis=0)[num_rows // 2] if num_rows else np.zeros(5)
    row, query, similarity = nearest_exact.above(rows, queries, floor)
    assert set(zip(row.tolist(), query.tolist(), strict=True)) == set(
        zip(*(axis.tolist() for axis in np.nonzero(exact > floor)), strict=True)
    )
    assert np.array_equal(similarity, exact[row, query])
