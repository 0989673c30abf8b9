"""The one merge of the codebase: top-k lists of disjoint sets of rows into the top-k of their union.

The order is total: larger similarity first, then smaller row id. So the answer does not depend on how the rows
were divided, which FAISS's own heaps do not promise (`ResultHeap` keeps the smallest by default, and each shard
cuts its ties arbitrarily: style.md 3.1). A missing neighbour is (-inf, -1).

Shapes: nq queries, k neighbours, n rows. Cost of a merge: O(nq * K log K) for K candidates per query.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clipgap_ray.kernels.vectors import exact_matrix, to_storage

LAST = np.iinfo(np.int64).max  # sorts missing ids behind every row id


def merge_topk(parts: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Merge top-k lists; associative, so it may run as a tree.

    Args:
        parts: At least one pair of (nq, k_i) float32 similarities and (nq, k_i) int64 row ids, in any order within
            a row; k_i may be 0. Row ids are unique over the parts, but for -1.
        k: Neighbours to keep, k >= 1.

    Returns:
        (nq, k) float32 similarities, descending, padded with -inf, and (nq, k) int64 row ids, padded with -1.

    Raises:
        ValueError: If there is no part, or k < 1: the number of queries or of columns is unknown.
    """
    if not parts or k < 1:
        raise ValueError(f"merge_topk needs at least one part and k >= 1, got {len(parts)} parts and k = {k}")
    similarities = np.concatenate([np.asarray(s, np.float32) for s, _ in parts], axis=1)
    row_ids = np.concatenate([np.asarray(i, np.int64) for _, i in parts], axis=1)
    similarities = np.where(row_ids < 0, np.float32(-np.inf), similarities)
    order = np.lexsort((np.where(row_ids < 0, LAST, row_ids), -similarities), axis=1)[:, :k]
    return _padded(np.take_along_axis(similarities, order, 1), np.take_along_axis(row_ids, order, 1), k)


def block_topk(similarities: np.ndarray, row_ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the top-k of a full block of similarities.

    Args:
        similarities: (nq, nb) float32, no NaN.
        row_ids: (nb,) int64, unique, >= 0.
        k: Neighbours to keep, k >= 1; may exceed nb.

    Returns:
        (nq, k) float32 and (nq, k) int64, as `merge_topk` returns them.
    """
    num_queries, num_rows = similarities.shape
    if num_rows <= 4 * k:  # sorting everything is cheaper than selecting first
        return merge_topk([(similarities, np.broadcast_to(row_ids, similarities.shape))], k)
    # Every row at the k-th similarity is a candidate, so that ties are cut by row id and not by position.
    kth = np.partition(similarities, num_rows - k, axis=1)[:, num_rows - k]
    query, column = np.nonzero(similarities >= kth[:, None])
    found, ids = similarities[query, column], row_ids[column]
    order = np.lexsort((ids, -found, query))
    first = np.searchsorted(query[order], np.arange(num_queries))
    chosen = order[first[:, None] + np.arange(k)]
    return found[chosen].astype(np.float32), ids[chosen].astype(np.int64)


def exact_topk(queries: np.ndarray, base: np.ndarray, row_ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The slow twin of every search: exact similarities in float64 of the stored (float16) rows.

    Order is decided on the exact similarity rounded to float32, which is what a result carries, so that the answer
    over any division of `base` merges to the answer over the whole.

    Args:
        queries: (nq, d), rounded to float16 here.
        base: (n, d), rounded to float16 here; n may be 0.
        row_ids: (n,) int64, unique, >= 0.
        k: Neighbours, k >= 1.

    Returns:
        (nq, k) float32 and (nq, k) int64, as `merge_topk` returns them.
    """
    return block_topk(exact_matrix(to_storage(queries), to_storage(base)).astype(np.float32), row_ids, k)


def _padded(similarities: np.ndarray, row_ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    missing = ((0, 0), (0, k - similarities.shape[1]))
    return (
        np.pad(similarities, missing, constant_values=-np.inf),
        np.pad(row_ids, missing, constant_values=-1),
    )
