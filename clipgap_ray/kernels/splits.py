"""Splits as filters over stored columns. A uid that repeats counts once; its copies stand or fall together.

near-pruned(n) keeps the n LEAST similar uids, far-pruned(n) keeps the n MOST similar (paper 2310.09562, 1.6);
both names say what is thrown away. Ties go by uid, so that near(n) and far(N - n) are complements.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from clipgap_ray.errors import ConfigError
from clipgap_ray.schema import sort_uids


def unique_uids(uids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted unique uids and each row's position among them.

    Args:
        uids: (n,) `schema.UID`.

    Returns:
        (u,) `schema.UID` sorted, (n,) int64 positions.
    """
    if not len(uids):
        return uids[:0], np.zeros(0, np.int64)
    order = sort_uids(uids)
    ordered = uids[order]
    new = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    position = np.empty(len(uids), np.int64)
    position[order] = np.cumsum(new) - 1
    return ordered[new], position


def max_per_uid(values: np.ndarray, position: np.ndarray, num_uids: int) -> np.ndarray:
    """Return the (u,) float64 maximum over the copies of every uid of (n,) row values."""
    result = np.full(num_uids, -np.inf)
    np.maximum.at(result, position, values.astype(np.float64))
    return result


def parse_size(size: str, total: int) -> int:
    """Turn a size into a number of uids kept: an integer is a count, a number with a point a fraction.

    Args:
        size: For example "50000" or "0.25".
        total: Uids to choose from.

    Raises:
        ConfigError: If it is not a number, negative, or more than there is.
    """
    try:
        keep = round(float(size) * total) if "." in size else int(size)
    except ValueError:
        raise ConfigError(
            f"--size {size!r} is neither an integer (kept) nor a number with a point (fraction)"
        ) from None
    if not 0 <= keep <= total:
        raise ConfigError(f"--size {size} asks for {keep} of {total} uids", hint="a fraction lies between 0.0 and 1.0")
    return keep


def keep_least(values: np.ndarray, size: int) -> np.ndarray:
    """near-pruning: keep the `size` uids with the LOWEST values, ties by uid (position).

    Args:
        values: (u,) float64, one per uid in uid order.
        size: Uids to keep.

    Returns:
        (u,) bool, True = stays.
    """
    keep = np.zeros(len(values), bool)
    keep[np.argsort(values, kind="stable")[:size]] = True
    return keep


def keep_most(values: np.ndarray, size: int) -> np.ndarray:
    """far-pruning: keep the `size` uids with the HIGHEST values; the complement of `keep_least(values, u - size)`."""
    return ~keep_least(values, len(values) - size)


def boundary(values: np.ndarray, size: int, bound: float) -> np.ndarray:
    """Return the (b,) positions whose rank around the cut at `size` could change within +-`bound` of their value.

    `values` are (u,) scores each within `bound` of the truth, in the direction of keep_least. Only these rows
    need exact values before the cut.
    """
    if size in (0, len(values)):
        return np.zeros(0, np.int64)
    cut = np.partition(values, size - 1)[[size - 1]] if size < len(values) else values[:0]
    return np.nonzero(np.abs(values - cut) <= 2 * bound)[0]


def most_per_partition(values: np.ndarray, partition: np.ndarray, cap: int) -> np.ndarray:
    """Keep the `cap` uids with the HIGHEST values of every partition, ties as in `keep_most`.

    Args:
        values: (u,) float64, one per uid in uid order.
        partition: (u,) int, the partition of every uid.
        cap: Uids per partition; a smaller partition stays whole.

    Returns:
        (u,) bool, True = stays.
    """
    keep = np.zeros(len(values), bool)
    order, places = _places_from_top(values, partition)
    keep[order[places < cap]] = True
    return keep


def _places_from_top(values: np.ndarray, partition: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(u,) uids by partition and, within it, from the highest value (of equals the highest uid) down; (u,) places."""
    order = np.lexsort((np.arange(len(values)), values, partition))[::-1]
    ordered = partition[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(order) else np.zeros(0, bool)
    starts = np.nonzero(first)[0]
    return order, np.arange(len(order)) - np.repeat(starts, np.diff([*starts, len(order)]))


def partition_boundary(values: np.ndarray, partition: np.ndarray, cap: int, bound: float) -> np.ndarray:
    """Return the (b,) positions of the uids whose place above or below their partition's cap could change within
    +-`bound` of their value: what `boundary` is to a whole list. Partitions of at most `cap` uids have none."""
    order, places = _places_from_top(values, partition)
    above, below = order[places == cap - 1], order[places == cap]  # the last one kept, the first one not
    edges = dict(zip(partition[above].tolist(), values[above].tolist(), strict=True))
    cut = np.full(int(partition.max(initial=-1)) + 1, np.nan)
    for number in partition[below].tolist():
        cut[number] = edges[number]
    return np.nonzero(np.abs(values - cut[partition]) <= 2 * bound)[0]


def parse_cap(cap: str, size: int, num_partitions: int) -> int:
    """Turn a cap into uids per partition: an integer is a count, a number with a point times an even share.

    Args:
        cap: For example "500" or "2.0": twice what every partition would have if all had as many.
        size: Uids kept in all.
        num_partitions: Partitions, >= 1.

    Raises:
        ConfigError: If it is no number, below one uid, or too little for `size` uids in all partitions together.
    """
    try:
        per_partition = math.ceil(float(cap) * size / num_partitions) if "." in cap else int(cap)
    except ValueError:
        raise ConfigError(
            f"--cap {cap!r} is neither an integer (uids) nor a number with a point (even shares)"
        ) from None
    if per_partition < (1 if size else 0) or per_partition * num_partitions < size:
        raise ConfigError(
            f"--cap {cap} is {per_partition} of each of {num_partitions} partitions: too little for {size} uids",
            hint="an even share is 1.0; partitions differ in size, so 1.5 or more leaves something to choose",
        )
    return per_partition


def keep_random(num_uids: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Keep a uniform sample without replacement of `size` uids; (u,) bool."""
    keep = np.zeros(num_uids, bool)
    keep[rng.permutation(num_uids)[:size]] = True
    return keep


def largest_standardised(columns: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """Return the (u,) float64 largest score after standardising every test set by its mean and deviation on a sample.

    Args:
        columns: (T, u) float64 m per test set.
        sample: (T, n) float64 m of some uids; a set without spread is only centred.
    """
    spread = sample.std(axis=1, keepdims=True)
    spread[spread == 0] = 1.0
    return np.asarray(((columns - sample.mean(axis=1, keepdims=True)) / spread).max(axis=0))


def density_match(
    order: np.ndarray, items: np.ndarray, queries: np.ndarray, similarity: np.ndarray, reference: np.ndarray
) -> np.ndarray:
    """Keep as many uids as fit below the reference's neighbour curve of every test row, first come first served.

    With r_q^(1) >= r_q^(2) >= ... the similarities of test row q to its nearest reference rows, the kept rows satisfy
    for every q and j <= k: the j-th nearest kept row is no closer than r_q^(j). At k = 1 this is gap matching with
    slack 0 (paper 1.4); larger k also bounds how many rows lie just outside the hull (the reviewers' density
    question, train_test_similarity.md section 10).

    Args:
        order: (u,) int64, the uids in the order in which they compete.
        items: (e,) int64 uid of each edge, sorted; only edges with similarity > r_q^(k) matter, the others may lack.
        queries: (e,) int64 test row of each edge.
        similarity: (e,) float64 exact.
        reference: (Q, k) float64, descending, -inf where the reference has fewer rows.

    Returns:
        (u,) bool, True = stays.
    """
    first = np.searchsorted(items, np.arange(len(order) + 1))
    keep = np.ones(len(order), np.bool_)
    counts = np.zeros(reference.shape, np.int64)
    _fill_places(order, first, queries, similarity, reference, counts, keep)
    return keep


@njit(cache=True)
def _fill_places(order, first, queries, similarity, reference, counts, keep):  # type: ignore[no-untyped-def]
    """counts[q, j] = kept rows closer to q than its j-th reference neighbour (j from 0); at most j of them may be."""
    k = reference.shape[1]
    for item in order:
        fits = True
        for edge in range(first[item], first[item + 1]):
            q = queries[edge]
            for j in range(k):
                if reference[q, j] < similarity[edge] and counts[q, j] + 1 > j:
                    fits = False
        keep[item] = fits
        if fits:
            for edge in range(first[item], first[item + 1]):
                q = queries[edge]
                for j in range(k):
                    if reference[q, j] < similarity[edge]:
                        counts[q, j] += 1
