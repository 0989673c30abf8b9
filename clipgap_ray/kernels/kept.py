"""Every query's nearest rows within each of several keep masks, from one product; and how crowded its hull is.

For a cut C of the pool, thresholds tau_i and distances delta (paper 2310.09562, 1.3; the density question of
train_test_similarity.md section 10):

    within_delta(i) = |{x in C : s(x, t_i) > tau_i - delta}|

Shapes: n rows, C cuts, Q queries, k neighbours, D deltas. Cost: one product, C reductions over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from clipgap_ray.kernels import nearest


@dataclass(frozen=True)
class Kept:
    """What is left of a pool around every query, per cut.

    Attributes:
        best: (C, Q) float64 exact similarity to the nearest kept row; -inf where a cut keeps nothing.
        best_id: (C, Q) int64 its row id; -1.
        similarities: (C, Q, k) float32 to the k nearest kept rows, descending, padded with -inf.
        row_ids: (C, Q, k) int64, padded with -1.
        within: (C, Q, D) int64 kept rows within delta of the hull (float32 scores: exact but for their bound).
    """

    best: np.ndarray
    best_id: np.ndarray
    similarities: np.ndarray
    row_ids: np.ndarray
    within: np.ndarray


def around(
    rows: np.ndarray,
    row_ids: np.ndarray,
    keeps: np.ndarray,
    queries: nearest.Queries,
    k: int,
    deltas: Sequence[float] = (),
) -> Kept:
    """Return what every cut leaves around every query.

    Args:
        rows: (n, d) float16 pool rows.
        row_ids: (n,) int64.
        keeps: (C, n) bool, one mask per cut; True = stays.
        queries: Stacked test rows with their thresholds (NaN: nothing is within any delta).
        k: Neighbours.
        deltas: Distances below tau.
    """
    cuts = [nearest.Pass(queries, k) for _ in keeps]
    transposed = np.ascontiguousarray(queries.rows.astype(np.float32).T)
    edges = (queries.tau[:, None] - np.asarray(deltas, np.float64)[None, :]).astype(np.float32)
    within = np.zeros((len(keeps), *edges.shape), np.int64)
    for start in range(0, len(rows), nearest.BLOCK_ROWS):
        block = slice(start, start + nearest.BLOCK_ROWS)
        product = rows[block].astype(np.float32) @ transposed
        for cut, keep, counts in zip(cuts, keeps[:, block], within, strict=True):
            left = product if keep.all() else product[keep]
            cut.fold_lists(left, row_ids[block][keep])
            _count_above(left, edges, counts)
    for cut, keep in zip(cuts, keeps, strict=True):
        cut.settle(rows[keep], row_ids[keep])
    return _stacked([cut.found() for cut in cuts], within)


def _stacked(found: list[nearest.QueryNearest], within: np.ndarray) -> Kept:
    best, best_id, similarities, row_ids = (np.stack([getattr(f, name) for f in found]) for name in _LISTS)
    return Kept(best, best_id, similarities, row_ids, within)


_LISTS = ("best", "best_id", "similarities", "row_ids")


@njit(cache=True, nogil=True)
def _count_above(product, edges, counts):  # type: ignore[no-untyped-def]
    for row in range(product.shape[0]):
        for q in range(product.shape[1]):
            for d in range(edges.shape[1]):
                if product[row, q] > edges[q, d]:
                    counts[q, d] += 1


def merge(parts: Sequence[Kept]) -> Kept:
    """Merge what disjoint sets of pool rows leave; counts add, lists merge cut by cut."""
    lists = []
    for cut in range(len(parts[0].best)):
        lists.append(nearest.merge([nearest.QueryNearest(*(getattr(p, name)[cut] for name in _LISTS)) for p in parts]))
    return _stacked(lists, np.sum([part.within for part in parts], axis=0))


def same_bytes(digests: np.ndarray, keeps: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Tell which queries lie byte for byte in each cut.

    Args:
        digests: (n,) `S64` sha256 of the pool rows' images in hex; b"" = not known, like nothing.
        keeps: (C, n) bool, one mask per cut; True = stays.
        wanted: (Q,) `S64` of the queries' images.

    Returns:
        (C, Q) bool.
    """
    unique, place = np.unique(wanted, return_inverse=True)
    found = np.zeros((len(keeps), len(unique)), bool)
    if len(unique):
        at = np.minimum(np.searchsorted(unique, digests), len(unique) - 1)
        same = (unique[at] == digests) & (digests != b"")
        for own, keep in zip(found, keeps, strict=True):
            own[at[same & keep]] = True
    return found[:, place]
