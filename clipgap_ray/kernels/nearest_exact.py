"""Nearest rows and pairs above a floor, decided on exact similarities: what thresholds and density matching need.

Candidates come from the float32 products of `nearest`; the order of neighbours and every comparison with a floor are
those of the float64 products of the stored rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from clipgap_ray.kernels import nearest as blockwise
from clipgap_ray.kernels.vectors import error_bound, exact_matrix, exact_pairs


def nearest(
    queries: np.ndarray, blocks: Iterable[tuple[np.ndarray, np.ndarray]], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return every query's k nearest rows, exactly.

    Args:
        queries: (Q, d) float16.
        blocks: Blocks of ((n, d) float16 rows, (n,) int64 row ids), ids unique over all blocks.
        k: Neighbours, k >= 1.

    Returns:
        (Q, k) float64 exact similarities, descending, padded with -inf, and (Q, k) int64 row ids, padded with -1.
    """
    similarities = np.full((len(queries), k), -np.inf)
    row_ids = np.full((len(queries), k), -1, np.int64)
    stacked = blockwise.Queries.stack([queries], [np.arange(len(queries), dtype=np.int64)], None)
    for rows, ids in blocks:
        rows = np.asarray(rows)
        _, found = blockwise.score(rows, ids, stacked, min(k + blockwise.SPARE, max(len(rows), 1)))
        order = np.argsort(ids, kind="stable")
        known = found.row_ids >= 0
        at = order[np.searchsorted(ids, found.row_ids[known], sorter=order)] if known.any() else order[:0]
        exact: np.ndarray = np.full(found.row_ids.shape, -np.inf)
        exact[known] = exact_pairs(queries[np.nonzero(known)[0]], rows[at])
        if exact.shape[1] < len(rows):
            # Candidates all within the bound of the k-th may have crowded out a better row: look at every row.
            reach = found.similarities[:, k - 1] - 2 * error_bound(rows.shape[1])
            for q in np.nonzero(found.similarities[:, -1] >= reach)[0]:
                every = exact_matrix(queries[q : q + 1], rows)[0]
                top = np.lexsort((ids, -every))[: exact.shape[1]]
                exact[q], found.row_ids[q] = every[top], ids[top]
        similarities, row_ids = merge_exact([(similarities, row_ids), (exact, found.row_ids)], k)
    return similarities, row_ids


def merge_exact(parts: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Merge lists of `nearest`: (Q, k_i) float64 similarities and int64 row ids of disjoint rows; -1 pads."""
    similarities = np.concatenate([s for s, _ in parts], axis=1)
    row_ids = np.concatenate([i for _, i in parts], axis=1)
    rank = np.lexsort((np.where(row_ids < 0, np.iinfo(np.int64).max, row_ids), -similarities), axis=1)[:, :k]
    return np.take_along_axis(similarities, rank, 1), np.take_along_axis(row_ids, rank, 1)


def above(rows: np.ndarray, queries: np.ndarray, floor: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return all pairs of a row and a query more alike than the query's floor, decided exactly.

    Args:
        rows: (n, d) float16.
        queries: (Q, d) float16.
        floor: (Q,) float64; only similarities strictly above count.

    Returns:
        (e,) int64 rows, (e,) int64 queries, (e,) float64 exact similarities.
    """
    transposed = np.ascontiguousarray(queries.astype(np.float32).T)
    reach = (floor - 2 * error_bound(rows.shape[1])).astype(np.float32)
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for start in range(0, len(rows), blockwise.BLOCK_ROWS):
        block = rows[start : start + blockwise.BLOCK_ROWS]
        row, query = np.nonzero(block.astype(np.float32) @ transposed >= reach)
        exact = exact_pairs(block[row], queries[query])
        over = exact > floor[query]
        found.append((row[over] + start, query[over], exact[over]))
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    row, query, exact = (np.concatenate(columns) for columns in zip(*found, strict=True))
    return row, query, exact
