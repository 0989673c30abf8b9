"""Core sets for several test sets at once, beside the largest similarity: by rank, by z-score, capped; decided exactly.

The paper merges six test sets into one core set, but its rule is not released (train_test_similarity.md 2.7). Rank and
z-score do not let one test set with high similarities take every place; a cap per partition does not let one region of
the pool take them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from clipgap_ray.config.split import Core
from clipgap_ray.errors import ConfigError
from clipgap_ray.kernels import splits
from clipgap_ray.stages import pool_partitions

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


def by_similarity_capped(settings: Core, table: Table, size: int) -> np.ndarray:
    """Keep the `size` uids with the largest m of which at most `cap` lie in one partition; returns (u,) bool.

    That is: the `cap` largest of every partition, and of those the `size` largest, both decided on exact values.
    """
    folder = settings.out.rpartition("/")[0]
    partition, number = pool_partitions.of_uids(table, folder, settings.partitions, settings.partition_seed)
    cap = splits.parse_cap(settings.cap, size, number)
    values = np.max([table.column(test, "m") for test in settings.test], axis=0)
    band = splits.partition_boundary(values, partition, cap, table.bound)
    values[band] = table.exact(band, settings.test, margin=False)
    most = np.nonzero(splits.most_per_partition(values, partition, cap))[0]
    if len(most) < size:
        raise ConfigError(
            f"core --cap {settings.cap}: {cap} of each of {number} partitions are {len(most)} uids, fewer than {size}",
            hint="a larger --cap, or fewer --partitions: small partitions leave places free",
        )
    band = most[splits.boundary(values[most], len(most) - size, table.bound)]
    values[band] = table.exact(band, settings.test, margin=False)
    keep = np.zeros(table.num_uids, bool)
    keep[most] = splits.keep_most(values[most], size)
    if size:
        table.cut_similarity = float(values[keep].min())
    counts = np.bincount(partition[keep], minlength=number)
    table.notes["capped"] = {"rows_per_partition": cap, "partitions": number, "at_the_cap": int((counts == cap).sum()),
                             "empty": int((counts == 0).sum())}  # fmt: skip
    return keep
