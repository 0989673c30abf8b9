"""Near-duplicate edges and the three rules that turn them into a keep mask.

An edge is a pair of rows with its exact similarity, 24 bytes; the n x n similarities are never stored (section 8, row
14 of train_test_similarity.md), and rules see rows only by rank in a stated order (row 13).

Rules (train_test_similarity.md 2.3), with rows in a fixed order:

* `semdedup`: a row goes if it is close to any earlier row, kept or not. In a chain a~b~c only a stays.
* `greedy`: a row goes if it is close to an earlier *kept* row. In a chain a and c stay.
* `components`: of each connected component of the edge graph only the first row stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numba import njit
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from clipgap_ray.kernels.vectors import error_bound, exact_pairs_at

Rule = Literal["greedy", "semdedup", "components"]
BLOCK_ROWS, BLOCK_COLUMNS = 1024, 8192  # 32 MB of float32 similarities at a time, whatever the pool


def edge_blocks(
    left: np.ndarray, right: np.ndarray, min_similarity: float, *, same: bool
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield all pairs at least `min_similarity` alike, decided exactly, a block of the product at a time.

    Only pairs above the threshold leave a block: no matrix of similarities is ever stored.

    Args:
        left: (n, d) float16.
        right: (m, d) float16; the same rows as `left` when `same`.
        min_similarity: Threshold on the exact similarity, inclusive.
        same: Report each pair once (left index < right index).

    Yields:
        (e,) int64 left positions, (e,) int64 right positions, (e,) float64 exact similarities.
    """
    floor = np.float32(min_similarity - error_bound(left.shape[1]))
    for first in range(0, len(right), BLOCK_COLUMNS):
        columns = np.ascontiguousarray(right[first : first + BLOCK_COLUMNS].astype(np.float32).T)
        # Of the same rows only the upper triangle: no left row beyond the last column.
        for start in range(0, min(len(left), first + columns.shape[1]) if same else len(left), BLOCK_ROWS):
            block = left[start : start + BLOCK_ROWS]
            # Flat: numpy finds the few ones of a flat mask several times faster than those of a matrix.
            flat = np.flatnonzero(block.astype(np.float32) @ columns >= floor)
            i, j = np.divmod(flat, columns.shape[1])
            i, j = i + start, j + first
            if same:
                i, j = i[i < j], j[i < j]
            if len(i):
                exact = exact_pairs_at(left, i, right, j)
                close = exact >= min_similarity
                yield i[close], j[close], exact[close]


def edges(
    left: np.ndarray, right: np.ndarray, min_similarity: float, *, same: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return all pairs of `edge_blocks`, which explains the arguments, as three (e,) arrays."""
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    found += edge_blocks(left, right, min_similarity, same=same)
    i, j, s = (np.concatenate(columns) for columns in zip(*found, strict=True))
    return i, j, s


def first_equal(keys: np.ndarray) -> np.ndarray:
    """Return for every row the first row with the same key: itself when there is none before it.

    Args:
        keys: (n, w) of any type with an order; rows in the order in which they stay.

    Returns:
        (n,) int64 positions.
    """
    order = np.lexsort(keys.T[::-1])  # stable: equal keys keep their order
    new = np.ones(len(keys), bool)
    new[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    starts = np.nonzero(new)[0]
    first = np.empty(len(keys), np.int64)
    first[order] = np.repeat(order[starts], np.diff(np.append(starts, len(keys))))
    return first


def heads(representative: np.ndarray) -> np.ndarray:
    """Follow (n,) int64 representatives to the rows that stand for themselves: (n,) int64."""
    head = representative
    while True:
        further = representative[head]
        if np.array_equal(further, head):
            return head
        head = further


def similarity_to(
    representative: np.ndarray, first: np.ndarray, second: np.ndarray, similarity: np.ndarray
) -> np.ndarray:
    """Return the similarity of every row to its representative, NaN where no edge joins the two.

    Args:
        representative: (n,) int64.
        first: (e,) int64 rows.
        second: (e,) int64 rows; an edge may be given in either direction.
        similarity: (e,) float64.

    Returns:
        (n,) float64; NaN for rows that represent themselves and for far members of a component.
    """
    result = np.full(len(representative), np.nan)
    for row, other in ((first, second), (second, first)):
        hit = representative[row] == other
        result[row[hit]] = similarity[hit]
    return result


def count_missed(
    num_rows: int, truth: tuple[np.ndarray, np.ndarray], found: tuple[np.ndarray, np.ndarray]
) -> tuple[int, int]:
    """Count true pairs, and those among them that were not found.

    Args:
        num_rows: Rows n < 2**31.
        truth: (t,) int64 positions twice; a pair may repeat, in either direction.
        found: (f,) int64 positions twice, likewise.

    Returns:
        Number of distinct true pairs, and how many of them are not in `found`.
    """
    true_codes, found_codes = (np.unique(np.minimum(a, b) * num_rows + np.maximum(a, b)) for a, b in (truth, found))
    return len(true_codes), int((~np.isin(true_codes, found_codes, assume_unique=True)).sum())


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
