"""Near-duplicate edges and the three rules that turn them into a keep mask.

Rules (train_test_similarity.md 2.3), with rows in a fixed order:

* `semdedup`: a row goes if it is close to any earlier row, kept or not. In a chain a~b~c only a stays.
* `greedy`: a row goes if it is close to an earlier *kept* row. In a chain a and c stay.
* `components`: of each connected component of the edge graph only the first row stays.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numba import njit
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from clipgap_ray.kernels.vectors import error_bound, exact_pairs

Rule = Literal["greedy", "semdedup", "components"]
BLOCK_ROWS = 2048


def edges(
    left: np.ndarray, right: np.ndarray, min_similarity: float, *, same: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return all pairs at least `min_similarity` alike, decided exactly.

    Args:
        left: (n, d) float16.
        right: (m, d) float16; the same rows as `left` when `same`.
        min_similarity: Threshold on the exact similarity, inclusive.
        same: Report each pair once (left index < right index).

    Returns:
        (e,) int64 left positions, (e,) int64 right positions, (e,) float64 exact similarities.
    """
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    floor = np.float32(min_similarity - error_bound(left.shape[1]))
    right32 = right.astype(np.float32)
    for start in range(0, len(left), BLOCK_ROWS):
        block = left[start : start + BLOCK_ROWS]
        first = start if same else 0
        i, j = np.nonzero(block.astype(np.float32) @ right32[first:].T >= floor)
        i, j = i + start, j + first
        if same:
            i, j = i[i < j], j[i < j]
        exact = exact_pairs(left[i], right[j])
        close = exact >= min_similarity
        found.append((i[close], j[close], exact[close]))
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    i, j, s = (np.concatenate(columns) for columns in zip(*found, strict=True))
    return i.astype(np.int64), j.astype(np.int64), s


def resolve(
    num_rows: int, first: np.ndarray, second: np.ndarray, similarity: np.ndarray, rule: Rule
) -> tuple[np.ndarray, np.ndarray]:
    """Apply a rule to edges between rows that are numbered in their order.

    Args:
        num_rows: Rows n.
        first: (e,) int64 ranks, 0 <= rank < n.
        second: (e,) int64 ranks; an edge may be given in either direction and repeatedly.
        similarity: (e,) float64.
        rule: See the module.

    Returns:
        keep (n,) bool, and representative (n,) int64: the rank that stands for each row (itself when kept;
        otherwise the row that removed it, the most alike, then the earliest; the component's first row under
        `components`).

    Raises:
        ValueError: If the rule is unknown.
    """
    low, high = np.minimum(first, second), np.maximum(first, second)
    representative = np.arange(num_rows, dtype=np.int64)
    if rule == "components":
        graph = coo_matrix((np.ones(len(low), np.int8), (low, high)), shape=(num_rows, num_rows))
        _, component = connected_components(graph, directed=False)
        _, head = np.unique(component, return_index=True)
        representative = head[component].astype(np.int64)
        return representative == np.arange(num_rows), representative
    order = np.lexsort((low, -similarity, high))
    low, high = low[order], high[order]
    if rule == "semdedup":
        later, at = np.unique(high, return_index=True)
        representative[later] = low[at]
        return representative == np.arange(num_rows), representative
    if rule == "greedy":
        keep = np.ones(num_rows, np.bool_)
        _greedy(low, high, keep, representative)
        return keep, representative
    raise ValueError(f"rule {rule!r} is none of greedy, semdedup, components")


@njit(cache=True)
def _greedy(low, high, keep, representative):  # type: ignore[no-untyped-def]
    """Edges by rising later row, most alike first: the first kept earlier row removes it."""
    for edge in range(len(low)):
        if keep[high[edge]] and keep[low[edge]]:
            keep[high[edge]] = False
            representative[high[edge]] = low[edge]
