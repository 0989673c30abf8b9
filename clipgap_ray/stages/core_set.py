"""Core sets for several test sets at once, beside the largest similarity: by rank and by z-score, decided exactly.

The paper merges six test sets into one core set, but its rule is not released (train_test_similarity.md 2.7); these are
two that do not let one test set with high similarities take every place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from clipgap_ray.kernels import splits

if TYPE_CHECKING:
    from clipgap_ray.stages.split import Table

SAMPLE_UIDS = 2000  # uids of lowest value: hashes, so a random sample, and the same one for every layout


def by_zscore(table: Table, tests: tuple[str, ...], size: int) -> np.ndarray:
    """Keep the `size` uids with the largest m after standardising each test set; returns (u,) bool.

    Mean and deviation come from exact values of a fixed sample, so the cut does not depend on how scores were computed.
    """
    sample_at = np.arange(min(SAMPLE_UIDS, table.num_uids))
    sample = np.stack([table.exact(sample_at, (test,), margin=False) for test in tests])
    columns = np.stack([table.column(test, "m") for test in tests])
    values = splits.largest_standardised(columns, sample)
    spread = sample.std(axis=1)
    bound = table.bound / min(spread[spread > 0], default=1.0)
    band = splits.boundary(values, table.num_uids - size, bound)
    exact = np.stack([table.exact(band, (test,), margin=False) for test in tests])
    values[band] = splits.largest_standardised(exact, sample)
    return splits.keep_most(values, size)


def by_rank(table: Table, tests: tuple[str, ...], size: int) -> np.ndarray:
    """Keep `size` uids by going round the test sets' lists, most similar first; returns (u,) bool.

    The cut is the smallest depth at which the lists' tops together hold `size` uids; of those that only the last depth
    adds, the ones of highest uid stay.
    """
    lists = {test: table.column(test, "m") for test in tests}
    low, high = 0, size  # the tops of depth `size` hold at least `size` uids
    while low < high:
        depth = (low + high) // 2
        if _tops(table, lists, depth).sum() >= size:
            high = depth
        else:
            low = depth + 1
    if not low:
        return np.zeros(table.num_uids, bool)
    keep = _tops(table, lists, low - 1)
    last = np.nonzero(_tops(table, lists, low) & ~keep)[0]
    keep[last[len(last) - (size - int(keep.sum())) :]] = True
    return keep


def _tops(table: Table, lists: dict[str, np.ndarray], depth: int) -> np.ndarray:
    """The union of every list's `depth` most similar uids; values around each cut are replaced by exact ones."""
    kept = np.zeros(table.num_uids, bool)
    for test, values in lists.items():
        band = splits.boundary(values, table.num_uids - depth, table.bound)
        values[band] = table.exact(band, (test,), margin=False)
        kept |= splits.keep_most(values, depth)
    return kept
