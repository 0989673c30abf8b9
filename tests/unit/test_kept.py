"""What cuts leave around every query equals brute force on the rows that are left."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipgap_ray.kernels import kept, nearest
from clipgap_ray.kernels.vectors import error_bound
from tests import made, twins

DIM = 16
DELTAS = (0.0, 0.05, 0.3)
K = 3


@pytest.mark.parametrize("block", [1, 5, 512])
@given(
    seed=st.integers(0, 10_000),
    num_rows=st.integers(0, 40),
    cuts=st.integers(1, 4),
    pieces=st.integers(1, 3),
    make=st.sampled_from([made.unit_rows, made.sign_rows]),
)
def test_every_cut_equals_brute_force(
    block: int, seed: int, num_rows: int, cuts: int, pieces: int, make: object
) -> None:
    rng = np.random.default_rng(seed)
    rows = make(num_rows, DIM, seed)  # type: ignore[operator]
    ids = rng.permutation(num_rows).astype(np.int64) + (3 << 32)
    keeps = rng.random((cuts, num_rows)) < 0.4
    keeps[0] = False  # a cut that keeps nothing
    tests = make(6, DIM, seed + 1)  # type: ignore[operator]
    tau = rng.uniform(-0.3, 0.6, 6)
    queries = nearest.Queries.stack([tests], [np.arange(6, dtype=np.int64)], [tau])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest, "BLOCK_ROWS", block)
        portions = np.array_split(np.arange(num_rows), pieces)
        left = kept.merge([kept.around(rows[p], ids[p], keeps[:, p], queries, K, DELTAS) for p in portions])
    for cut, keep in enumerate(keeps):
        best, best_id = twins.nearest(tests, rows[keep], ids[keep], K)
        assert np.array_equal(left.best[cut], best[:, 0])
        assert np.array_equal(left.best_id[cut], best_id[:, 0])
        finite = np.isfinite(best)
        assert np.array_equal(left.row_ids[cut] >= 0, finite)
        assert np.abs(left.similarities[cut][finite] - best[finite]).max(initial=0) <= error_bound(DIM)
        for i, delta in enumerate(DELTAS):
            excess = twins.similarities(tests, rows[keep]) - (tau - delta)[:, None] if keep.any() else np.zeros((6, 0))
            sure, possible = ((excess > edge).sum(axis=1) for edge in (2 * error_bound(DIM), -2 * error_bound(DIM)))
            assert (left.within[cut, :, i] >= sure).all()
            assert (left.within[cut, :, i] <= possible).all()


@given(
    rows=st.lists(st.sampled_from(["a", "b", "c", ""]), max_size=12),
    wanted=st.lists(st.sampled_from(["a", "b", "z", ""]), max_size=6),
    seed=st.integers(0, 99),
)
def test_equal_bytes_are_found_by_their_digest_in_every_cut(rows: list[str], wanted: list[str], seed: int) -> None:
    keeps = np.random.default_rng(seed).random((3, len(rows))) < 0.5
    found = kept.same_bytes(np.array(rows, "S64"), keeps, np.array(wanted, "S64"))
    assert found.tolist() == [
        [any(digest and row == digest and stays for row, stays in zip(rows, keep, strict=True)) for digest in wanted]
        for keep in keeps.tolist()
    ]
