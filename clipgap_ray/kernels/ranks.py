"""Ranks of more values than fit in memory, from counts that add up: rank correlation with its error, places of cuts.

A grid of edges, the sorted values of a random sample, divides the line into cells: one per edge (values equal to it)
and one between neighbouring edges. Counts per cell of disjoint sets of values add up, in any order. From them follow

* the average rank of a cell's values: exact for a value that is an edge, within half the cell's count for others; so
  with every value an edge (a sample that is the whole) all ranks are exact, ties included;
* Spearman's correlation of these ranks, and a bound of its distance from that of the true ranks. Within a cell the
  average rank is the mean of the true ranks, so the errors e are orthogonal to the cells' ranks r and
  |e|^2 <= sum over cells of c (c^2 - 1) / 12. With a = |e_x| / |r_x|, b = |e_y| / |r_y| (Cauchy-Schwarz):
  |rho - rho'| <= a + b + a b + (a^2 + b^2) / 2. For E edges sampled at random a is about 2.5 / E;
* the cell that holds the k-th least value, so that a cut at rank k has to look at that cell's values alone.

Shapes: E edges, 2 E + 1 cells; cell 2 i + 1 is edge i, cell 2 i lies below it. Cost: O(log E) per value.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


def grid(sample: np.ndarray) -> np.ndarray:
    """Return the (E,) float64 rising edges of a grid: the distinct finite values of a (n,) float sample."""
    values = np.asarray(sample, np.float64)
    return np.unique(values[np.isfinite(values)])


def cells(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the (n,) int64 cells of (n,) float values that are not NaN; -inf and inf lie in the outer cells."""
    values = np.asarray(values, np.float64)
    above = np.searchsorted(edges, values, side="right")
    return above + np.searchsorted(edges, values, side="left")


def count(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the (2 E + 1,) int64 number of (n,) values per cell."""
    return np.bincount(cells(values, edges), minlength=2 * len(edges) + 1).astype(np.int64)


def average_ranks(counts: np.ndarray) -> np.ndarray:
    """Return the (2 E + 1,) float64 average rank, from 1, of the values of every cell; counts are of all values."""
    return np.cumsum(counts) - (counts - 1) / 2


def _error_squared(counts: np.ndarray) -> float:
    """The largest sum of squared rank errors: the values between two edges may all differ, those at an edge do not."""
    between = counts[0::2].astype(np.float64)
    return float((between * (between**2 - 1)).sum() / 12)


@dataclass(frozen=True)
class Products:
    """Sums over pairs of values of their centred ranks' products, as fractions of the number of all pairs, that add up.

    Attributes:
        num: Pairs.
        xx: Sum of the squares of the first ranks.
        yy: Likewise of the second.
        xy: Sum of the products.
    """

    num: int
    xx: float
    yy: float
    xy: float


def products(
    first: np.ndarray, second: np.ndarray, edges: tuple[np.ndarray, np.ndarray], counts: tuple[np.ndarray, np.ndarray]
) -> Products:
    """Return the sums over n pairs.

    Args:
        first: (n,) float values, finite.
        second: (n,) likewise.
        edges: Grids of both.
        counts: (2 E + 1,) counts of both, over all pairs.
    """
    total = max(int(counts[0].sum()), 1)
    x, y = (
        ((average_ranks(own_counts) - (total + 1) / 2) / total)[cells(values, own_edges)]
        for values, own_edges, own_counts in zip((first, second), edges, counts, strict=True)
    )
    return Products(len(x), float(x @ x), float(y @ y), float(x @ y))


def correlation(found: Iterable[Products], counts: tuple[np.ndarray, np.ndarray]) -> tuple[float | None, float | None]:
    """Return Spearman's correlation and the bound of its error.

    Args:
        found: Products of disjoint sets of pairs that together are all; summed in the order given.
        counts: (2 E + 1,) counts of both sides over all pairs.

    Returns:
        (rho, error), the true rho lies within rho +- error (0 where every value is an edge); None for fewer than 3
        pairs or a side without spread.
    """
    parts = list(found)
    total = sum(part.num for part in parts)
    xx, yy, xy = (sum(getattr(part, name) for part in parts) for name in ("xx", "yy", "xy"))
    if total < 3 or any(np.count_nonzero(side) < 2 for side in counts):
        return None, None
    a, b = (np.sqrt(_error_squared(side) / square) / total for side, square in zip(counts, (xx, yy), strict=True))
    return float(xy / np.sqrt(xx * yy)), float(a + b + a * b + (a * a + b * b) / 2)


def ends_of_rank(counts: np.ndarray, edges: np.ndarray, rank: int) -> tuple[float, float]:
    """Return the closest known ends (lowest, highest) of the value of a rank, 1 <= rank <= values counted.

    Equal where it is an edge; else the edges around its cell, -inf or inf beyond the last ones.
    """
    cell = int(np.searchsorted(np.cumsum(counts), rank, side="left"))
    at, is_edge = divmod(cell, 2)
    if is_edge:
        return float(edges[at]), float(edges[at])
    return (float(edges[at - 1]) if at else -np.inf), (float(edges[at]) if at < len(edges) else np.inf)
