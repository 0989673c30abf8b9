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

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipgap_ray.kernels.nearest_loops import count_violations, fold_pool, fold_queries
from clipgap_ray.kernels.vectors import error_bound, exact_matrix, exact_pairs

BLOCK_ROWS = 512  # (512, 7000) float32 = 14 MB: larger blocks fall out of cache, smaller ones starve BLAS
SCREEN_FROM = 1 << 20  # numbers in the queries from which on a faster product is worth loading torch
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
    """Per pool row and test set, all (n, T): `m`, `margin` float32; `arg_m`, `arg_margin` int64 stacked positions.

    `violations` int32: test rows with s > tau, decided exactly; None when they were not asked for.
    """

    m: np.ndarray
    arg_m: np.ndarray
    margin: np.ndarray
    arg_margin: np.ndarray
    violations: np.ndarray | None = None

    def part(self, rows: slice) -> PoolScores:
        """Return views of some rows."""
        counts = None if self.violations is None else self.violations[rows]
        return PoolScores(self.m[rows], self.arg_m[rows], self.margin[rows], self.arg_margin[rows], counts)


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


class Pass:
    """A pass over pool rows in portions: maxima of each portion at once, the nearest rows of the whole at the end.

    The lists of nearest rows live through the pass, so that their running thresholds turn almost every row of the
    later portions away. `TorchPass` (kernels.nearest_torch) does the same on a GPU; `begin` picks one.

    Args:
        queries: The stacked test rows.
        k: Nearest pool rows to keep per test row, k >= 1.
        violations: Also count, per pool row and test set, the test rows with s > tau (exactly).

    Attributes:
        bound: Largest difference of this pass's float32 scores from the truth.
    """

    block_rows = 0  # 0: BLOCK_ROWS

    def __init__(self, queries: Queries, k: int, *, violations: bool = False) -> None:
        self.queries = queries
        self.k = k
        self.bound = error_bound(queries.rows.shape[1])
        self._violations = violations
        self._tau = queries.tau.astype(np.float32)
        self._best = np.full(len(queries.rows), -np.inf)
        self._best_id = np.full(len(queries.rows), -1, np.int64)
        self._start_lists(k + SPARE)

    def feed(self, rows: np.ndarray, row_ids: np.ndarray) -> PoolScores:
        """Score a portion of the pool.

        Args:
            rows: (n, d) float16 pool rows; n may be 0.
            row_ids: (n,) int64, unique over the whole pass.

        Returns:
            The portion's maxima in float32, within `bound` of the truth, twice that for margins.
        """
        scores = _unscored(len(rows), len(self.queries.offsets) - 1, self._violations)
        step = self.block_rows or BLOCK_ROWS
        for start in range(0, len(rows), step):
            block = slice(start, start + step)
            self._fold(rows[block], row_ids[block], scores.part(block))
        for segment, (first, last) in enumerate(itertools.pairwise(self.queries.offsets)):
            if np.isnan(self.queries.tau[first:last]).any():
                scores.margin[:, segment] = np.nan
        self.settle(rows, row_ids)
        return scores

    def found(self) -> QueryNearest:
        """Return the nearest rows of all portions so far; the nearest itself is decided exactly."""
        similarities, row_ids = self._lists()
        return QueryNearest(
            self._best.copy(), self._best_id.copy(), similarities[:, : self.k].copy(), row_ids[:, : self.k].copy()
        )

    # What a device does differently: hold the lists, and fold one block of rows into them and into the maxima.

    def _start_lists(self, width: int) -> None:
        self._transposed = np.ascontiguousarray(self.queries.rows.astype(np.float32).T)
        self._heap = np.full((len(self.queries.rows), width), -np.inf, np.float32)
        self._heap_ids = np.full((len(self.queries.rows), width), -1, np.int64)
        self._floor = np.full(len(self.queries.rows), -np.inf, np.float32)

    def _lists(self) -> tuple[np.ndarray, np.ndarray]:
        return self._heap, self._heap_ids

    def _fold(self, rows: np.ndarray, row_ids: np.ndarray, scores: PoolScores) -> None:
        product = rows.astype(np.float32) @ self._transposed
        offsets = self.queries.offsets
        fold_pool(product, offsets, self._tau, scores.m, scores.arg_m, scores.margin, scores.arg_margin)
        self.fold_lists(product, row_ids)
        if scores.violations is not None:
            near = np.zeros(len(rows), np.int64)
            count_violations(product, offsets, self._tau, np.float32(2 * self.bound), scores.violations, near)
            at = np.nonzero(near)[0]
            row, query = np.nonzero(np.abs(product[at] - self._tau) <= np.float32(2 * self.bound))
            self._decide_violations(rows, at[row], query, scores.violations)

    def fold_lists(self, product: np.ndarray, row_ids: np.ndarray) -> None:
        """Fold a (n, Q) float32 block of similarities into the lists; `settle` must follow with the same rows."""
        fold_queries(product, row_ids, self._heap, self._heap_ids, self._floor)

    def _decide_violations(self, rows: np.ndarray, row: np.ndarray, query: np.ndarray, counts: np.ndarray) -> None:
        """Add the pairs that float32 could not decide, by their exact similarity."""
        over = exact_pairs(rows[row], self.queries.rows[query]) > self.queries.tau[query]
        segment = np.searchsorted(self.queries.offsets, query[over], side="right") - 1
        np.add.at(counts, (row[over], segment), 1)

    def settle(self, rows: np.ndarray, row_ids: np.ndarray) -> None:
        """Decide the nearest row exactly among this portion's candidates within the bound of the float32 maximum.

        Args:
            rows: (n, d) float16, the portion whose blocks were folded.
            row_ids: (n,) int64.
        """
        heap, heap_ids = self._lists()
        if not len(rows) or not heap.size:
            return
        order = np.argsort(row_ids, kind="stable")
        close = (heap >= heap[:, :1] - np.float32(2 * self.bound)) & (heap_ids >= 0)
        query, _ = np.nonzero(close)
        at = np.minimum(np.searchsorted(row_ids, heap_ids[close], sorter=order), len(rows) - 1)
        candidate = order[at]
        here = row_ids[candidate] == heap_ids[close]  # the others were decided when their portion passed
        query, candidate = query[here], candidate[here]
        exact = exact_pairs(self.queries.rows[query], rows[candidate])
        _fold_best(self._best, self._best_id, query, exact, row_ids[candidate])
        # A query whose whole list lies within the bound may have lost an equal: look at every row of the portion.
        for q in np.nonzero(close.all(axis=1))[0]:
            similarities = exact_matrix(self.queries.rows[q : q + 1], rows)[0]
            _fold_best(self._best, self._best_id, np.full(len(rows), q), similarities, row_ids)


def begin(queries: Queries, k: int, *, violations: bool = False, device: str = "cpu") -> Pass:
    """Start a pass on a device.

    Args:
        queries: The stacked test rows.
        k: Nearest pool rows to keep per test row.
        violations: Count violated test rows too.
        device: "cpu" (BLAS and compiled reductions; for many queries a product in bfloat16 first, where the processor
            has one) or a torch device such as "cuda".
    """
    if device == "cpu":
        if queries.rows.size < SCREEN_FROM or violations:
            return Pass(queries, k, violations=violations)
        from clipgap_ray.kernels.nearest_screened import ScreenedPass, supported

        return (ScreenedPass if supported() else Pass)(queries, k)
    from clipgap_ray.kernels.nearest_torch import TorchPass

    return TorchPass(queries, k, violations=violations, device=device)


def score(rows: np.ndarray, row_ids: np.ndarray, queries: Queries, k: int) -> tuple[PoolScores, QueryNearest]:
    """Score (n, d) float16 rows with (n,) int64 row ids at once: `begin`, one `feed`, `found`."""
    one = begin(queries, k)
    scores = one.feed(rows, row_ids)
    return scores, one.found()


def _unscored(num_rows: int, num_sets: int, violations: bool) -> PoolScores:
    shape = (num_rows, num_sets)
    return PoolScores(
        np.full(shape, -np.inf, np.float32),
        np.full(shape, -1, np.int64),
        np.full(shape, -np.inf, np.float32),
        np.full(shape, -1, np.int64),
        np.zeros(shape, np.int32) if violations else None,
    )


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
