"""What a report says about pool rows: how near they are, and which test images remove them. Counts, whatever the size.

A score table has a row per pool row, 200 million of them at full scale. It is folded chunk by chunk into counts per bin
and per test image, which add up in any order: here in this process, in `stages/pool_side` by Ray Data.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

BINS = 400
EDGES = np.linspace(-1.0, 1.0, BINS + 1)
COLUMNS = ("m", "margin", "arg_margin")


@dataclass(frozen=True)
class PoolSide:
    """Counts over pool rows for one test set.

    Attributes:
        nearest: (BINS,) int64 rows by m, the similarity to the nearest test image, in `EDGES`.
        num_rows: Rows, those without similarity included.
        num_above: Rows with margin > slack.
        culprits: (c,) int64 row ids of test images, sorted: those whose threshold some row exceeds most.
        removed: (c,) int64 rows that do.
    """

    nearest: np.ndarray
    num_rows: int
    num_above: int
    culprits: np.ndarray
    removed: np.ndarray


def fold(table: pa.Table, slack: float) -> PoolSide:
    """Count a chunk of a score table.

    Args:
        table: n rows with `COLUMNS`; n may be 0.
        slack: Rows with a larger margin are removed by gap matching; NaN margins (no thresholds) are not.
    """
    m, margin = (table.column(name).to_numpy().astype(np.float64) for name in ("m", "margin"))
    known = m[np.isfinite(m)]
    above = margin > slack
    culprits, removed = np.unique(table.column("arg_margin").to_numpy()[above], return_counts=True)
    at = np.clip(np.floor((known + 1.0) * (BINS / 2)).astype(np.int64), 0, BINS - 1)
    return PoolSide(np.bincount(at, minlength=BINS), len(m), int(above.sum()), culprits, removed)


def merge(parts: list[PoolSide]) -> PoolSide:
    """Add up chunks; an empty list is an empty table."""
    ids = np.concatenate([np.zeros(0, np.int64), *(part.culprits for part in parts)])
    counts = np.concatenate([np.zeros(0, np.int64), *(part.removed for part in parts)])
    culprits, at = np.unique(ids, return_inverse=True)
    removed = np.zeros(len(culprits), np.int64)
    np.add.at(removed, at, counts)
    nearest = np.sum([np.zeros(BINS, np.int64), *(part.nearest for part in parts)], axis=0)
    return PoolSide(nearest, sum(p.num_rows for p in parts), sum(p.num_above for p in parts), culprits, removed)
