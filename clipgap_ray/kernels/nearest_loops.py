"""The compiled loops of `nearest` and `nearest_screened`: a block of a product into maxima and lists, while in cache.

And `vectors.exact_pairs`, which shares how float16 is read.

In one file, since numba's cache of a function does not notice that one from another file has changed.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
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
    rough, rows, queries, pieces, base, tau, exact_tau, judged, reach, row_ids, m, arg_m, margin, arg_margin,
    heap, heap_ids, floor,
):  # fmt: skip
    """`fold_pool` and `fold_queries` at once, from a rough product: pairs that can matter are decided exactly.

    Args:
        rough: (n, c) uint16, the bits of bfloat16 similarities to c of the queries.
        rows: (n, d) float32, holding float16 values.
        queries: (c, d) uint16, the bits of float16 values: half the bytes, which come from beyond the cache.
        pieces: (p, 3) int64: first column, the one after the last, and their test set.
        base: Stacked position of the first column.
        tau: (c,) float32 thresholds without NaN.
        exact_tau: (c,) float64, the same.
        judged: (T,) bool: whether the set has thresholds.
        reach: (n,) float32: how far similarities of the row can be from the truth before they are rounded.
        row_ids: (n,) int64.
        m: (n, T) float32, raised to what the pieces hold; as are the next three.
        arg_m: (n, T) int64.
        margin: (n, T) float32.
        arg_margin: (n, T) int64.
        heap: (c, k) float32, the lists so far.
        heap_ids: (c, k) int64.
        floor: (c,) float32, their last entries.
    """
    found = np.empty(rough.shape[1], np.int64)
    for row in range(rough.shape[0]):
        line, near = rough[row], reach[row]
        for piece in range(len(pieces)):
            first, last, segment = pieces[piece]
            best, best_at = np.float64(m[row, segment]), arg_m[row, segment]
            over, over_at = np.float64(margin[row, segment]), arg_margin[row, segment]
            low, low_over = _largest(line[first:last], tau[first:last])
            low = max(low - near, m[row, segment]) - near
            low_over = max(low_over - near, margin[row, segment]) - near if judged[segment] else np.float32(np.inf)
            for i in range(_find(line, tau, floor, first, last, low, low_over, near, found)):
                q = found[i]
                s = _exact(rows[row], queries[q])
                if s > best:
                    best, best_at = s, base + q
                if judged[segment] and s - exact_tau[q] > over:
                    over, over_at = s - exact_tau[q], base + q
                if np.float32(s) >= floor[q]:
                    _insert(np.float32(s), row_ids[row], q, heap, heap_ids, floor)
            m[row, segment], arg_m[row, segment] = best, best_at
            margin[row, segment], arg_margin[row, segment] = over, over_at


@njit(cache=True, nogil=True)
def _find(line, tau, floor, first, last, low, over, near, found):  # type: ignore[no-untyped-def]
    """Write the places of the similarities that can matter; returns how many they are."""
    count = np.int64(0)
    for start in range(first, last, _CHUNK):
        end = min(start + _CHUNK, last)
        if _most(line[start:end], tau[start:end], floor[start:end], low, over, near) < 0:
            continue
        for q in range(start, end):
            found[count] = q
            upper = _upper(line[q])
            # Without branches, which could not be foretold.
            count += np.int64(upper >= low) | np.int64(upper - tau[q] >= over) | np.int64(upper + near >= floor[q])
    return count


@intrinsic
def _number(context, bits):  # type: ignore[no-untyped-def]
    """The float32 of the uint16 that holds a bfloat16: said to LLVM, since a view would need a buffer."""

    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        wide = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(types.uint16), code


@intrinsic
def _half(context, bits):  # type: ignore[no-untyped-def]
    """The float32 of the uint16 that holds a float16, which numba does not know."""

    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), code


@intrinsic
def _larger(context, one, other):  # type: ignore[no-untyped-def]
    """The larger of two float32 that are no NaN: said to LLVM, which then takes maxima of vectors (`max` is scalar)."""

    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        promises = ("nnan", "nsz")
        above = builder.fcmp_ordered(">", *arguments, flags=promises)
        return builder.select(above, *arguments, flags=promises)

    return types.float32(types.float32, types.float32), code


@njit(cache=True, nogil=True)
def _upper(bits):  # type: ignore[no-untyped-def]
    """Largest similarity that is rounded to a bfloat16."""
    value = _number(bits)  # type: ignore[call-arg, var-annotated]
    return value + ROUNDED * abs(value)


@njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def _largest(line, tau):  # type: ignore[no-untyped-def]
    """Largest similarity and excess over tau that rounding leaves for sure."""
    low, over = np.float32(-np.inf), np.float32(-np.inf)
    for i in range(len(line)):
        value = _number(line[i])  # type: ignore[call-arg, var-annotated]
        sure = value - ROUNDED * abs(value)
        low, over = _larger(low, sure), _larger(over, sure - tau[i])  # type: ignore[call-arg]
    return low, over


@njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def _most(line, tau, floor, low, over, near):  # type: ignore[no-untyped-def]
    """By how much rounding lets any similarity exceed the least that matters: `low`, tau + `over` or floor - `near`."""
    most = np.float32(-np.inf)
    for i in range(len(line)):
        least = -_larger(-low, _larger(-over - tau[i], near - floor[i]))  # type: ignore[call-arg, var-annotated]
        most = _larger(most, _upper(line[i]) - least)  # type: ignore[call-arg]
    return most


@njit(cache=True, nogil=True, fastmath={"reassoc", "nsz"})
def _exact(left, right):  # type: ignore[no-untyped-def]
    """The similarity of two float32 rows of float16 values: exact in float64, in any order (`vectors`)."""
    total = 0.0
    for i in range(len(left)):
        total += np.float64(left[i]) * np.float64(_half(right[i]))  # type: ignore[call-arg]
    return total


@njit(cache=True, nogil=True, fastmath={"reassoc", "nsz"})
def exact_dots(left, i, right, j, result):  # type: ignore[no-untyped-def]
    """Write the exact similarities of left[i] with right[j], all given by the uint16 bits of float16 values."""
    for pair in range(len(result)):
        one, other, total = left[i[pair]], right[j[pair]], 0.0
        for at in range(len(one)):
            total += np.float64(_half(one[at])) * np.float64(_half(other[at]))  # type: ignore[call-arg]
        result[pair] = total
