"""Stored rows and their exact similarities.

Rows are stored as float16 and never renormalised. The product of two float16 numbers has 22 bits, and a sum of
d <= 4096 of them spans fewer than 53, so the float64 inner product of stored rows is exact in any order: it is
the truth that float32 scores approximate (design contract 3).
"""

from __future__ import annotations

import numpy as np


def to_storage(rows: np.ndarray) -> np.ndarray:
    """Round (n, d) rows to the storage precision float16; both sides of a comparison go through here."""
    return np.asarray(rows).astype(np.float16)


def normalise(rows: np.ndarray) -> np.ndarray:
    """Scale (n, d) rows to unit norm in float32; zero rows stay zero."""
    rows = np.asarray(rows, dtype=np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


def error_bound(dim: int) -> float:
    """Return the largest difference of a float32 score of unit rows from the exact similarity: d * 2**-24.

    Each of the d products is exact in float32's exponent range up to 2**-24 relative, each of the d additions adds
    at most 2**-24 of a partial sum; for unit rows the partial sums are bounded by 1 (Cauchy-Schwarz). Any order of
    summation, fused or not, stays within. A margin carries it twice: once for the score, once for tau's rounding.
    """
    return dim * 2.0**-24


def exact_pairs(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the exact similarities of paired rows.

    Args:
        left: (n, d) float16.
        right: (n, d) float16.

    Returns:
        (n,) float64.
    """
    at = np.arange(len(left))
    return exact_pairs_at(left, at, right, at)


def exact_pairs_at(left: np.ndarray, i: np.ndarray, right: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Return the exact similarities of left[i] with right[j], without copies of the rows.

    Args:
        left: (n, d) float16.
        i: (e,) int64 positions in `left`.
        right: (m, d) float16.
        j: (e,) int64 positions in `right`.

    Returns:
        (e,) float64.

    Raises:
        ValueError: If these are not float16 rows of one length: the compiled loop would read something else.
    """
    if {left.dtype, right.dtype} != {np.dtype(np.float16)} or left.shape[1] != right.shape[1]:
        rows = f"{left.dtype} {left.shape} and {right.dtype} {right.shape}"
        raise ValueError(f"expected float16 rows of one length, got {rows}")
    from clipgap_ray.kernels.nearest_loops import exact_dots  # numba, which not every user of this module needs

    result = np.empty(len(i))
    exact_dots(left.view(np.uint16), i, right.view(np.uint16), j, result)
    return result


def exact_matrix(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the (n, m) float64 exact similarities of all pairs of (n, d) and (m, d) float16 rows."""
    return left.astype(np.float64) @ right.astype(np.float64).T
