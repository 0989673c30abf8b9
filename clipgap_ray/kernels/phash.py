"""Perceptual hashes: 64 bits that survive resizing and recompression, of a picture and of its mirror image.

pHash as commonly defined (Zauner 2010; the `phash` of imagehash): the picture as 32 x 32 grey values, its
two-dimensional DCT-II, of that the 8 x 8 lowest frequencies; a bit says whether a coefficient is above their median.
Bits are numbered row by row from the top left, the first is the most significant. Near-copies differ in a few of the
64 bits, unrelated pictures in about half of them.

The mirror image needs no second transform: mirroring negates the coefficients of odd horizontal frequency.

Cost: 2 * 8 * 32 * 32 multiplications and two medians of 64 per picture, 4 microseconds in batches of 128 (one core);
shrinking the decoded picture to 32 x 32 (`pixels.grey_thumbnail`) costs more than all of this.
"""

from __future__ import annotations

from collections.abc import Iterable

import faiss
import numpy as np

SIDE = 32
LOW = 8
# A coefficient that should be zero (of a flat or symmetric picture) is rounding noise, whose sign differs between
# machines; real ones are in the tens and thousands.
_DECIMALS = 3
FEWEST_ONES = 24  # of 64, where a picture with content has 31 or 32: with fewer most coefficients are equal


def perceptual_hashes(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes of pictures and of their mirror images.

    Args:
        grey: (n, 32, 32) uint8 or float grey values, row by row; n may be 0.

    Returns:
        (n,) int64 and (n,) int64: the 64 bits as signed integers, so that parquet and numpy agree. The number of bits
        in which two differ is `np.bitwise_count(a ^ b)` after `.view(np.uint64)`.

    Raises:
        ValueError: If the pictures are not 32 x 32.
    """
    if grey.ndim != 3 or grey.shape[1:] != (SIDE, SIDE):
        raise ValueError(f"pictures of shape {grey.shape}, expected (n, {SIDE}, {SIDE})")
    basis = _basis()
    low = np.round(basis @ grey.astype(np.float64) @ basis.T, _DECIMALS)
    mirrored = low * np.where(np.arange(LOW) % 2, -1.0, 1.0)
    return _bits(low), _bits(mirrored)


def _basis() -> np.ndarray:
    """(8, 32) float64: the lowest rows of an unnormalised DCT-II."""
    positions = (np.arange(SIDE) + 0.5) * np.pi / SIDE
    return np.cos(np.arange(LOW)[:, None] * positions)


def _bits(low: np.ndarray) -> np.ndarray:
    flat = low.reshape(len(low), LOW * LOW)
    above = flat > np.median(flat, axis=1, keepdims=True) if len(flat) else np.zeros((0, LOW * LOW), bool)
    return np.packbits(above, axis=1).view(">u8").reshape(-1).astype(np.uint64).view(np.int64)


def telling(hashes: np.ndarray) -> np.ndarray:
    """Return (n,) bool: whether (n,) int64 hashes tell anything. Those of flat pictures equal each other."""
    return np.asarray(np.bitwise_count(hashes.view(np.uint64)) >= FEWEST_ONES)


def nearest_hashes(
    hashes: np.ndarray, mirrored: np.ndarray, blocks: Iterable[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Find for every picture the one whose hash differs least from its own, or from that of its mirror image.

    Args:
        hashes: (q,) int64.
        mirrored: (q,) int64, of the mirror images.
        blocks: Pairs of (n,) int64 hashes and (n,) int64 row ids; n may be 0.

    Returns:
        (q,) int64 number of bits that differ (64 without any row) and (q,) int64 row id (-1). Flat pictures
        (`telling`) of either side take no part. Cost: 2 q n counts of bits (faiss), a hundredth of one similarity.
    """
    bits, best = np.full(len(hashes), 64, np.int64), np.full(len(hashes), -1, np.int64)
    usable = telling(hashes)
    queries = np.concatenate([_bytes(hashes[usable]), _bytes(mirrored[usable])])
    for block, row_ids in blocks:
        known = telling(block)
        if not known.any() or not len(queries):
            continue
        index = faiss.IndexBinaryFlat(64)
        index.add(_bytes(block[known]))
        found, at = (side.reshape(2, -1) for side in index.search(queries, 1))
        side = np.argmin(found, axis=0)
        least, rows = (np.take_along_axis(values, side[None], 0)[0] for values in (found, at))
        better = np.zeros(len(hashes), bool)
        better[usable] = least < bits[usable]
        bits[better] = least[better[usable]]
        best[better] = row_ids[known][rows[better[usable]]]
    return bits, best


def nearer(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Merge what `nearest_hashes` found among two disjoint sets of rows: fewer bits win, of as many the lower row id.

    Blocks of rising row ids in one call give the same: there the first row of as many bits stays.

    Args:
        first: (q,) int64 bits and (q,) int64 row ids.
        second: (q,) likewise.

    Returns:
        (q,) int64 bits and (q,) int64 row ids.
    """
    bits, rows = first
    other_bits, other_rows = second
    closer = (other_bits < bits) | ((other_bits == bits) & (other_rows >= 0) & (other_rows < rows))
    return np.where(closer, other_bits, bits), np.where(closer, other_rows, rows)


def _bytes(hashes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(hashes).view(np.uint8).reshape(-1, 8)
