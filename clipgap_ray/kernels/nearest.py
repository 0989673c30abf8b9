"""One pass over pool rows: their maxima over every test set, and every test row's nearest pool rows.

For a pool row x and a test set T with thresholds tau (paper 2310.09562, 1.4 and 1.6):

    m(x)      = max_i s(x, t_i)
    margin(x) = max_i (s(x, t_i) - tau_i)         x is pruned iff margin(x) > slack

The test rows of all sets are stacked, so that one matrix product serves every set and both directions; the
reductions run over each block of the product while it is in cache, and no similarity is ever stored.

Shapes: n pool rows, Q stacked test rows in T segments, d dims. Cost: O(n Q d) time, O(block * Q) memory.
Rejected: top-k lists per test row as candidates for pruning (they overflow silently, section 8 row 6).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from clipgap_ray.kernels.vectors import error_bound, exact_matrix, exact_pairs

BLOCK_ROWS = 512  # (512, 7000) float32 = 14 MB: larger blocks fall out of cache, smaller ones starve BLAS
SPARE = 8  # candidates kept beyond k, so that the exact order of the first k is almost always certain


@dataclass(frozen=True)
class Queries:
    """Stacked test rows.

    Attributes:
        rows: (Q, d) float16.
        offsets: (T + 1,) int64: set t is rows[offsets[t] : offsets[t + 1]].
        tau: (Q,) float64 thresholds; NaN where a set has none.
        row_ids: (Q,) int64 row ids within their own sets.
    """

    rows: np.ndarray
    offsets: np.ndarray
    tau: np.ndarray
    row_ids: np.ndarray

    @staticmethod
    def stack(sets: Sequence[np.ndarray], row_ids: Sequence[np.ndarray], tau: Sequence[np.ndarray] | None) -> Queries:
        """Stack T test sets of (q_t, d) float16 rows; `tau` None means no thresholds."""
        offsets = np.concatenate([[0], np.cumsum([len(rows) for rows in sets])]).astype(np.int64)
        flat = np.concatenate(tau) if tau is not None else np.full(offsets[-1], np.nan)
        return Queries(np.concatenate(sets).astype(np.float16), offsets, flat, np.concatenate(row_ids))


@dataclass(frozen=True)
class PoolScores:
    """Per pool row and test set, all (n, T): `m`, `margin` float32; `arg_m`, `arg_margin` int64 stacked positions."""

    m: np.ndarray
    arg_m: np.ndarray
    margin: np.ndarray
    arg_margin: np.ndarray


@dataclass(frozen=True)
class QueryNearest:
    """Per test row, its nearest pool rows so far.

    Attributes:
        best: (Q,) float64 exact similarity to the nearest row; -inf when there is none.
        best_id: (Q,) int64 its row id (the smallest among equals); -1 when there is none.
        similarities: (Q, k) float32, most alike first, padded with -inf.
        row_ids: (Q, k) int64, padded with -1.
    """

    best: np.ndarray
    best_id: np.ndarray
    similarities: np.ndarray
    row_ids: np.ndarray


def score(rows: np.ndarray, row_ids: np.ndarray, queries: Queries, k: int) -> tuple[PoolScores, QueryNearest]:
    """Score pool rows against every test set, and the test rows against these pool rows.

    Args:
        rows: (n, d) float16 pool rows; n may be 0.
        row_ids: (n,) int64, unique.
        queries: The stacked test rows.
        k: Nearest pool rows to keep per test row, k >= 1.

    Returns:
        Pool side in float32 (within `error_bound(d)` of the truth, twice that for margins), and query side with
        the exact nearest row.
    """
    num_sets = len(queries.offsets) - 1
    pool = PoolScores(
        np.full((len(rows), num_sets), -np.inf, np.float32),
        np.full((len(rows), num_sets), -1, np.int64),
        np.full((len(rows), num_sets), -np.inf, np.float32),
        np.full((len(rows), num_sets), -1, np.int64),
    )
    width = k + SPARE
    heap = np.full((len(queries.rows), width), -np.inf, np.float32)
    heap_ids = np.full((len(queries.rows), width), -1, np.int64)
    floor = np.full(len(queries.rows), -np.inf, np.float32)
    transposed = np.ascontiguousarray(queries.rows.astype(np.float32).T)
    tau = queries.tau.astype(np.float32)
    for start in range(0, len(rows), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        product = rows[part].astype(np.float32) @ transposed
        _fold_pool(
            product, queries.offsets, tau, pool.m[part], pool.arg_m[part], pool.margin[part], pool.arg_margin[part]
        )
        _fold_queries(product, row_ids[part], heap, heap_ids, floor)
    for segment in range(num_sets):
        if np.isnan(queries.tau[queries.offsets[segment] : queries.offsets[segment + 1]]).any():
            pool.margin[:, segment] = np.nan
    return pool, _settle(rows, row_ids, queries.rows, heap, heap_ids, k)


@njit(cache=True, nogil=True)
def _fold_pool(product, offsets, tau, m, arg_m, margin, arg_margin):  # type: ignore[no-untyped-def]
    """Segment-wise maxima of every row of the product; ties go to the first test row."""
    for row in range(product.shape[0]):
        for segment in range(len(offsets) - 1):
            best, best_at = np.float32(-np.inf), -1
            over, over_at = np.float32(-np.inf), -1
            for q in range(offsets[segment], offsets[segment + 1]):
                s = product[row, q]
                if s > best:
                    best, best_at = s, q
                excess = s - tau[q]
                if excess > over:
                    over, over_at = excess, q
            m[row, segment], arg_m[row, segment] = best, best_at
            margin[row, segment], arg_margin[row, segment] = over, over_at


@njit(cache=True, nogil=True)
def _fold_queries(product, row_ids, heap, heap_ids, floor):  # type: ignore[no-untyped-def]
    """Insert each score above a query's running k-th best into its sorted list; ties go to the smaller row id."""
    width = heap.shape[1]
    for row in range(product.shape[0]):
        for q in range(product.shape[1]):
            s = product[row, q]
            if s < floor[q]:
                continue
            if s == floor[q] and heap_ids[q, width - 1] >= 0 and row_ids[row] > heap_ids[q, width - 1]:
                continue
            at = width - 1
            while at > 0 and (heap[q, at - 1] < s or (heap[q, at - 1] == s and heap_ids[q, at - 1] > row_ids[row])):
                heap[q, at] = heap[q, at - 1]
                heap_ids[q, at] = heap_ids[q, at - 1]
                at -= 1
            heap[q, at], heap_ids[q, at] = s, row_ids[row]
            floor[q] = heap[q, width - 1]


def _settle(
    rows: np.ndarray, row_ids: np.ndarray, queries: np.ndarray, heap: np.ndarray, heap_ids: np.ndarray, k: int
) -> QueryNearest:
    """Decide the nearest row exactly among the candidates within the rounding bound of the float32 maximum."""
    num_queries = len(queries)
    best = np.full(num_queries, -np.inf)
    best_id = np.full(num_queries, -1, np.int64)
    if len(rows) and num_queries:
        order = np.argsort(row_ids, kind="stable")
        reach = heap[:, :1] - 2 * error_bound(rows.shape[1])
        close = (heap >= reach) & (heap_ids >= 0)
        query, _ = np.nonzero(close)
        candidate = order[np.searchsorted(row_ids, heap_ids[close], sorter=order)]
        exact = exact_pairs(queries[query], rows[candidate])
        _fold_best(best, best_id, query, exact, row_ids[candidate])
        # A query whose whole list lies within the bound may have lost an equal: look at every row once more.
        for q in np.nonzero(close.all(axis=1))[0] if len(rows) > heap.shape[1] else ():
            similarities = exact_matrix(queries[q : q + 1], rows)[0]
            _fold_best(best, best_id, np.full(len(rows), q), similarities, row_ids)
    return QueryNearest(best, best_id, heap[:, :k].copy(), heap_ids[:, :k].copy())


def _fold_best(best: np.ndarray, best_id: np.ndarray, query: np.ndarray, exact: np.ndarray, ids: np.ndarray) -> None:
    """Fold (query, exact similarity, row id) triples into the running best; ties go to the smaller id."""
    order = np.lexsort((ids, -exact, query))
    first = order[np.concatenate([[True], query[order][1:] != query[order][:-1]])] if len(order) else order
    q, s, i = query[first], exact[first], ids[first]
    better = (s > best[q]) | ((s == best[q]) & (i < best_id[q]))
    best[q[better]], best_id[q[better]] = s[better], i[better]


def merge(parts: Sequence[QueryNearest]) -> QueryNearest:
    """Merge the query sides of disjoint sets of pool rows; associative, so it may run as a tree.

    Raises:
        ValueError: If there is nothing to merge.
    """
    from clipgap_ray.kernels.topk import merge_topk

    if not parts:
        raise ValueError("nothing to merge: expected at least one QueryNearest")
    best, best_id = parts[0].best.copy(), parts[0].best_id.copy()
    for part in parts[1:]:
        better = (part.best > best) | ((part.best == best) & (part.best_id >= 0) & (part.best_id < best_id))
        best[better], best_id[better] = part.best[better], part.best_id[better]
    k = parts[0].similarities.shape[1]
    similarities, row_ids = merge_topk([(part.similarities, part.row_ids) for part in parts], k)
    return QueryNearest(best, best_id, similarities, row_ids)


def empty(num_queries: int, k: int) -> QueryNearest:
    """Return the neutral element of `merge`."""
    return QueryNearest(
        np.full(num_queries, -np.inf),
        np.full(num_queries, -1, np.int64),
        np.full((num_queries, k), -np.inf, np.float32),
        np.full((num_queries, k), -1, np.int64),
    )


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
    stacked = Queries.stack([queries], [np.arange(len(queries), dtype=np.int64)], None)
    for rows, ids in blocks:
        rows = np.asarray(rows)
        _, found = score(rows, ids, stacked, min(k + SPARE, max(len(rows), 1)))
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
        both = np.concatenate([similarities, exact], axis=1)
        both_ids = np.concatenate([row_ids, found.row_ids], axis=1)
        rank = np.lexsort((np.where(both_ids < 0, np.iinfo(np.int64).max, both_ids), -both), axis=1)[:, :k]
        similarities, row_ids = np.take_along_axis(both, rank, 1), np.take_along_axis(both_ids, rank, 1)
    return similarities, row_ids


def nearest_kept(
    rows: np.ndarray, row_ids: np.ndarray, keeps: np.ndarray, queries: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return every query's exact nearest row within each of several keep masks, in one product.

    Args:
        rows: (n, d) float16 pool rows.
        row_ids: (n,) int64.
        keeps: (C, n) bool, one mask per cut; True = stays.
        queries: (Q, d) float16.

    Returns:
        (C, Q) float64 similarities (-inf where a cut keeps nothing) and (C, Q) int64 row ids (-1).
    """
    best = np.full((len(keeps), len(queries)), -np.inf)
    best_id = np.full((len(keeps), len(queries)), -1, np.int64)
    transposed = np.ascontiguousarray(queries.astype(np.float32).T)
    reach = np.float32(2 * error_bound(rows.shape[1]))
    for start in range(0, len(rows), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        product = rows[part].astype(np.float32) @ transposed
        for cut, keep in enumerate(keeps[:, part]):
            masked = np.where(keep[:, None], product, np.float32(-np.inf))
            top = masked.max(axis=0)
            row, query = np.nonzero((masked >= np.maximum(top, best[cut].astype(np.float32)) - reach) & keep[:, None])
            exact = exact_pairs(rows[part][row], queries[query])
            _fold_best(best[cut], best_id[cut], query, exact, row_ids[part][row])
    return best, best_id
