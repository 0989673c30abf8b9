"""What the paper's released code does badly (train_test_similarity.md section 8): each row a test that ours does not.

Rows 9 (empty k-means cells), 13 (order dependence) and 14 (n x n on disk) are in test_clustering and test_dedup_stage,
15 (a hidden cap on ids) and 16 (a Python set per worker) in test_export_stage and test_subsets.
"""

from __future__ import annotations

import numpy as np
import pytest

from clipgap_ray.kernels import nearest, nearest_exact, splits
from clipgap_ray.kernels.topk import merge_topk
from tests import made, twins

DIM = 64


def queries_of(tests: np.ndarray, tau: np.ndarray | None = None) -> nearest.Queries:
    return nearest.Queries.stack([tests], [np.arange(len(tests), dtype=np.int64)], None if tau is None else [tau])


@pytest.mark.parametrize(("reference_rows", "k"), [(1, 5), (3, 200), (40, 200)])
def test_row_3_lists_longer_than_the_reference_hold_no_garbage(reference_rows: int, k: int) -> None:
    """Their unfilled buffers were uninitialised memory that could win: thresholds of 22.2, 1e38, NaN."""
    reference, tests = made.unit_rows(reference_rows, DIM, 0), made.unit_rows(6, DIM, 1)
    ids = np.arange(reference_rows, dtype=np.int64)
    blocks = [(reference[:2], ids[:2]), (reference[2:], ids[2:])]  # the last block fills no list
    similarity, row_ids = nearest_exact.nearest(tests, blocks, k)
    assert (np.abs(similarity[:, 0]) <= 1 + 1e-3).all()
    assert np.array_equal(similarity[:, 0], twins.similarities(tests, reference).max(axis=1))
    assert (similarity[:, reference_rows:] == -np.inf).all()
    assert (row_ids[:, reference_rows:] == -1).all()


@pytest.mark.parametrize("sizes", [(1, 7, 3), (5, 5, 5), (9, 0, 2)])
@pytest.mark.parametrize("k", [1, 4, 30])
def test_row_4_the_final_k_is_free_of_the_k_of_the_parts(sizes: tuple[int, ...], k: int) -> None:
    """Their merge raised a shape error unless both were equal."""
    rows, tests = made.unit_rows(30, DIM, 2), made.unit_rows(4, DIM, 3)
    exact = twins.similarities(tests, rows).astype(np.float32)
    parts = []
    for part, width in zip(np.array_split(np.arange(30), 3), sizes, strict=True):
        order = np.argsort(-exact[:, part], axis=1)[:, :width]
        parts.append((np.take_along_axis(exact[:, part], order, 1), part[order].astype(np.int64)))
    similarities, row_ids = merge_topk(parts, k)
    assert similarities.shape == row_ids.shape == (4, k)
    offered = [np.sort(np.concatenate([s[q] for s, _ in parts]))[::-1][:k] for q in range(4)]
    for q in range(4):
        assert similarities[q, : len(offered[q])].tolist() == offered[q].tolist()


def test_row_6_no_list_can_overflow_so_nothing_is_under_pruned() -> None:
    """On like data their lists of 20, 10 and 4 candidates removed 531, 441 and 279 of 542 rows."""
    rng = np.random.default_rng(4)
    centre = rng.standard_normal(DIM)
    rows = rng.standard_normal((900, DIM)) + centre  # a dense neighbourhood: hundreds of violations per test image
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    tests = rows[:3].copy()
    tau = np.full(3, 0.4)
    scores, found = nearest.score(rows, np.arange(900, dtype=np.int64), queries_of(tests, tau), 4)
    violating = (twins.similarities(rows, tests) > 0.4).any(axis=1)
    assert violating.sum() > 100 * found.row_ids.shape[1]
    assert np.array_equal(scores.margin[:, 0] > 0, violating)  # the lists of 4 play no part in it


def test_row_7_the_stored_test_image_is_the_nearest_and_stays_aligned() -> None:
    """Theirs stored the first violated test image, and did not sort the labels with the ids."""
    rows, tests = made.unit_rows(50, DIM, 5), made.unit_rows(9, DIM, 6)
    tau = np.full(9, -1.0)  # every test image is violated by every row: the first one says nothing
    order = np.random.default_rng(0).permutation(50)
    scores, _ = nearest.score(rows[order], order.astype(np.int64), queries_of(tests, tau), 1)
    exact = twins.similarities(rows, tests)
    assert np.array_equal(scores.arg_m[:, 0], exact[order].argmax(axis=1))
    assert np.array_equal(scores.arg_margin[:, 0], exact[order].argmax(axis=1))
    assert len(np.unique(scores.arg_m)) > 3


def test_row_15_a_size_is_never_capped_silently() -> None:
    """Theirs cut a list of 187 million ids at a default of 15 million."""
    total = 20_000_000
    assert splits.parse_size("1.0", total) == total
    assert splits.parse_size(str(total), total) == total
    with pytest.raises(ValueError, match="asks for 20000001 of 20000000"):
        splits.parse_size(str(total + 1), total)
