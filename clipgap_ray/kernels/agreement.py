"""Do two encoders see the same things as similar? Overlap of sets and agreement of ranks."""

from __future__ import annotations

import numpy as np
from scipy import stats


def jaccard(first: int, second: int, both: int) -> float | None:
    """Return |both| / |either| of two sets by their sizes and that of their intersection; None when both are empty."""
    either = first + second - both
    return both / either if either else None


def chance_jaccard(total: int, first: int, second: int) -> float | None:
    """Return about what two random sets of `first` and `second` of `total` things would have in common, as Jaccard."""
    both = first * second / total if total else 0.0
    either = first + second - both
    return both / either if either else None


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Return Spearman's correlation of two (n,) float arrays (scipy); None for fewer than 3, or without spread."""
    usable = np.isfinite(first) & np.isfinite(second)
    first, second = first[usable], second[usable]
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(stats.spearmanr(first, second).statistic)
