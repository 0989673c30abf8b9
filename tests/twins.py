"""Slow twins: the definitions, row by row in float64, with no block, heap or bound to get wrong."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

import numpy as np


def similarities(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(n, m) float64 inner products of stored rows (exact: see test_vectors)."""
    return left.astype(np.float64) @ right.astype(np.float64).T


def rational_similarity(left: np.ndarray, right: np.ndarray) -> Fraction:
    """The inner product of two float16 rows in rational arithmetic."""
    return sum((Fraction(float(a)) * Fraction(float(b)) for a, b in zip(left, right, strict=True)), Fraction(0))


def nearest(queries: np.ndarray, rows: np.ndarray, row_ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Every query's k nearest rows: (Q, k) float64 and int64, ties by row id, padded with -inf and -1."""
    best = np.full((len(queries), k), -np.inf)
    ids = np.full((len(queries), k), -1, np.int64)
    table = similarities(queries, rows) if len(rows) else np.zeros((len(queries), 0))
    for q, row in enumerate(table):
        order = sorted(range(len(row)), key=lambda i: (-row[i], row_ids[i]))[:k]
        best[q, : len(order)], ids[q, : len(order)] = row[order], row_ids[order]
    return best, ids


def pool_scores(rows: np.ndarray, tests: np.ndarray, tau: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """m and margin of every pool row: (n,) float64 each; margin NaN without thresholds."""
    table = similarities(rows, tests)
    return table.max(axis=1), np.full(len(rows), np.nan) if tau is None else (table - tau).max(axis=1)


def components(num_rows: int, edges: Iterable[tuple[int, int]]) -> list[int]:
    """Lowest row of every row's component, by spreading the lowest label until nothing changes."""
    label = list(range(num_rows))
    changed = True
    while changed:
        changed = False
        for a, b in edges:
            low = min(label[a], label[b])
            if label[a] != low or label[b] != low:
                label[a] = label[b] = low
                changed = True
    return label


def semdedup(num_rows: int, edges: set[tuple[int, int]]) -> list[bool]:
    """A row stays iff no earlier row is close to it."""
    return [not any((i, j) in edges or (j, i) in edges for i in range(j)) for j in range(num_rows)]


def greedy(num_rows: int, edges: set[tuple[int, int]]) -> list[bool]:
    """A row stays iff no earlier row that stays is close to it."""
    keep: list[bool] = []
    for j in range(num_rows):
        keep.append(not any(keep[i] and ((i, j) in edges or (j, i) in edges) for i in range(j)))
    return keep


def compared(rows: np.ndarray, centroids: np.ndarray, probes: int) -> np.ndarray:
    """(n, n) bool: one row's own partition is among the `probes` nearest of the other."""
    order = nearest(rows, centroids, np.arange(len(centroids)), min(probes, len(centroids)))[1]
    visits = np.zeros((len(rows), len(centroids)), bool)
    for row, partitions in enumerate(order):
        visits[row, partitions] = True
    at_home = visits[:, order[:, 0]]  # [x, y]: x visits the partition of y
    return at_home | at_home.T
