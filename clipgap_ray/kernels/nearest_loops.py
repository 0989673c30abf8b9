"""The compiled loops of `nearest` and `nearest_screened`: a block of a product into maxima and lists, while in cache.

In one file, since numba's cache of a function does not notice that one from another file has changed.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

# bfloat16 has 8 bits: rounding to nearest changes a number by at most 2**-8 of itself, of the result by a little more.
ROUNDED = np.float32(2.0**-8 * 1.01)
_CHUNK = 32  # similarities that are looked at one by one if any of them can matter


@njit(cache=True, nogil=True)
def fold_pool(product, offsets, tau, m, arg_m, margin, arg_margin):  # type: ignore[no-untyped-def]
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
def fold_queries(product, row_ids, heap, heap_ids, floor):  # type: ignore[no-untyped-def]
    """Insert each score above a query's running k-th best into its sorted list; ties go to the smaller row id."""
    for row in range(product.shape[0]):
        for q in range(product.shape[1]):
            if product[row, q] >= floor[q]:
                _insert(product[row, q], row_ids[row], q, heap, heap_ids, floor)


@njit(cache=True, nogil=True)
def _insert(s, row_id, q, heap, heap_ids, floor):  # type: ignore[no-untyped-def]
    """Insert a score of at least the floor into a query's list, unless it ties with the last of a smaller row id."""
    at = heap.shape[1] - 1
    if s == floor[q] and heap_ids[q, at] >= 0 and row_id > heap_ids[q, at]:
        return
    while at > 0 and (heap[q, at - 1] < s or (heap[q, at - 1] == s and heap_ids[q, at - 1] > row_id)):
        heap[q, at] = heap[q, at - 1]
        heap_ids[q, at] = heap_ids[q, at - 1]
        at -= 1
    heap[q, at], heap_ids[q, at] = s, row_id
    floor[q] = heap[q, heap.shape[1] - 1]


@njit(cache=True, nogil=True)
def count_violations(product, offsets, tau, band, counts, near):  # type: ignore[no-untyped-def]
    """Count what is surely above tau per segment; mark the rows that hold a pair within the band of it."""
    for row in range(product.shape[0]):
        for segment in range(len(offsets) - 1):
            for q in range(offsets[segment], offsets[segment + 1]):
                excess = product[row, q] - tau[q]
                if excess > band:
                    counts[row, segment] += 1
                elif excess >= -band:
                    near[row] = 1


@njit(cache=True, nogil=True)
def fold_screened(  # type: ignore[no-untyped-def]
    rough, rows, queries, offsets, tau, exact_tau, judged, reach, row_ids, m, arg_m, margin, arg_margin,
    heap, heap_ids, floor,
):  # fmt: skip
    """`fold_pool` and `fold_queries` at once, from a rough product: pairs that can matter are decided exactly.

    Args:
        rough: (n, Q) uint16, the bits of bfloat16 similarities.
        rows: (n, d) float32, holding float16 values.
        queries: (Q, d) float32, likewise.
        offsets: (T + 1,) int64.
        tau: (Q,) float32 thresholds without NaN.
        exact_tau: (Q,) float64, the same.
        judged: (T,) bool: whether the set has thresholds.
        reach: (n,) float32: how far similarities of the row can be from the truth before they are rounded.
        row_ids: (n,) int64.
        m: (n, T) float32, written; as are the next three.
        arg_m: (n, T) int64.
        margin: (n, T) float32.
        arg_margin: (n, T) int64.
        heap: (Q, k) float32, the lists so far.
        heap_ids: (Q, k) int64.
        floor: (Q,) float32, their last entries.
    """
    width = rough.shape[1]
    bits = np.empty(width, np.uint32)
    values = bits.view(np.float32)
    for row in range(rough.shape[0]):
        line, near = rough[row], reach[row]
        for q in range(width):
            bits[q] = np.uint32(line[q]) << np.uint32(16)
        for segment in range(len(offsets) - 1):
            first, last = offsets[segment], offsets[segment + 1]
            low, low_over = _largest(values[first:last], tau[first:last])
            low, low_over = low - near, (low_over - near) if judged[segment] else np.float32(np.inf)
            best, best_at, over, over_at = -np.inf, -1, -np.inf, -1
            for start in range(first, last, _CHUNK):
                end = min(start + _CHUNK, last)
                top, top_over, top_listed = _tops(values[start:end], tau[start:end], floor[start:end])
                if top + near < low and top_over + near < low_over and top_listed + near < 0:
                    continue
                for q in range(start, end):
                    upper = values[q] + ROUNDED * abs(values[q]) + near
                    if upper < low and upper - tau[q] < low_over and upper < floor[q]:
                        continue
                    s = _exact(rows[row], queries[q])
                    if s > best:
                        best, best_at = s, q
                    if judged[segment] and s - exact_tau[q] > over:
                        over, over_at = s - exact_tau[q], q
                    if np.float32(s) >= floor[q]:
                        _insert(np.float32(s), row_ids[row], q, heap, heap_ids, floor)
            m[row, segment], arg_m[row, segment] = best, best_at
            margin[row, segment], arg_margin[row, segment] = over, over_at


@intrinsic
def _larger(context, one, other):  # type: ignore[no-untyped-def]
    """The larger of two float32 that are no NaN: said to LLVM, which then takes maxima of vectors (`max` is scalar)."""

    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        promises = ("nnan", "nsz")
        above = builder.fcmp_ordered(">", *arguments, flags=promises)
        return builder.select(above, *arguments, flags=promises)

    return types.float32(types.float32, types.float32), code


@njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def _largest(values, tau):  # type: ignore[no-untyped-def]
    """Largest similarity and excess over tau that rounding leaves for sure."""
    low, over = np.float32(-np.inf), np.float32(-np.inf)
    for i in range(len(values)):
        sure = values[i] - ROUNDED * abs(values[i])
        low, over = _larger(low, sure), _larger(over, sure - tau[i])  # type: ignore[call-arg]
    return low, over


@njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def _tops(values, tau, floor):  # type: ignore[no-untyped-def]
    """Largest similarity, excess over tau, and excess over the lists' last entries that rounding allows."""
    top, over, listed = np.float32(-np.inf), np.float32(-np.inf), np.float32(-np.inf)
    for i in range(len(values)):
        upper = values[i] + ROUNDED * abs(values[i])
        top, over = _larger(top, upper), _larger(over, upper - tau[i])  # type: ignore[call-arg]
        listed = _larger(listed, upper - floor[i])  # type: ignore[call-arg]
    return top, over, listed


@njit(cache=True, nogil=True, fastmath={"reassoc", "nsz"})
def _exact(left, right):  # type: ignore[no-untyped-def]
    """The similarity of two float32 rows of float16 values: exact in float64, in any order (`vectors`)."""
    total = 0.0
    for i in range(len(left)):
        total += np.float64(left[i]) * np.float64(right[i])
    return total
