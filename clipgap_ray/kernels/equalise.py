"""Equalise: prune a pool until two groups of a test set see the same similarity to it, class by class.

Gap matching (paper 2310.09562, 1.4) applied between groups instead of between data sets (counteranimal.md 7.3, item 6).
With s(x) the similarity of photo x to its nearest kept pool row and Q_g the quantile function of s over the photos of
a class's group g (mid-ranks: the i-th of n photos stands at (i - 1/2) / n), the kept pool satisfies in every class

    s(x) <= Q_other(rank of x in its own group) + slack            for every photo x of both groups.

Both groups' quantiles then differ by at most the slack. Pruning can only lower s, so the nearer group is brought
down: rows more alike to x than its ceiling Q_other(rank) + slack go, for all photos at once, s is taken again (a row
that goes may have been the nearest of other photos too), and so on until nothing has to go. Each round only removes, so
it ends. All photos move together, so the result depends on no order.

Shapes: n photos, e edges, u uids of the pool. An edge is a pool uid that is closer to a photo than a floor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def ceilings(similarity: np.ndarray, class_at: np.ndarray, second: np.ndarray, slack: float) -> np.ndarray:
    """Return how near a pool row may be to every photo: the other group's quantile at the photo's rank, plus slack.

    Args:
        similarity: (n,) float64 to the nearest kept row.
        class_at: (n,) int64 class; -1 = the photo is not constrained (another group, a class without both groups).
        second: (n,) bool, the group.
        slack: >= 0.

    Returns:
        (n,) float64; inf where not constrained.
    """
    result = np.full(len(similarity), np.inf)
    for position in np.unique(class_at[class_at >= 0]):
        sides = [np.nonzero((class_at == position) & (second == bool(g)))[0] for g in (0, 1)]
        for own, other in (sides, sides[::-1]):
            ranks = np.empty(len(own))
            ranks[np.argsort(similarity[own], kind="stable")] = (np.arange(len(own)) + 0.5) / len(own)
            result[own] = np.quantile(similarity[other], ranks, method="hazen") + slack
    return result


def largest_difference(similarity: np.ndarray, class_at: np.ndarray, second: np.ndarray) -> float:
    """Return by how much a photo lies above the other group's quantile at its rank, at most; (n,) arguments."""
    over = similarity - ceilings(similarity, class_at, second, 0.0)
    constrained = class_at >= 0
    return float(over[constrained].max()) if constrained.any() else 0.0


def constrained_classes(classes: list[str], groups: list[str], pair: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Find the photos that are compared.

    Args:
        classes: n class names.
        groups: n group names.
        pair: The two groups.

    Returns:
        (n,) int64 class numbers, -1 where the photo is in neither group or its class lacks one; (n,) bool second group.
    """
    names, kinds = np.asarray(classes, dtype=str), np.asarray(groups, dtype=str)
    per_group = [set(names[kinds == group].tolist()) for group in pair]
    both = sorted(per_group[0] & per_group[1])
    class_at = np.full(len(names), -1, np.int64)
    inside = np.isin(kinds, pair) & np.isin(names, both)
    class_at[inside] = np.searchsorted(both, names[inside])
    return class_at, kinds == pair[1]


@dataclass(frozen=True)
class Pruning:
    """Where the rounds ended.

    Attributes:
        keep: (u,) bool, True = the uid stays.
        similarity: (n,) float64 to the nearest kept uid that the edges know; -inf = none above the photo's floor.
        starved: (h,) int64 constrained photos whose edges must reach lower before the next round: their nearest row
            or a row above their ceiling may be unknown. Nothing was removed on such half knowledge.
        rounds: Rounds that removed something.
    """

    keep: np.ndarray
    similarity: np.ndarray
    starved: np.ndarray
    rounds: int


def prune(
    keep: np.ndarray,
    edges: tuple[np.ndarray, np.ndarray, np.ndarray],
    floor: np.ndarray,
    class_at: np.ndarray,
    second: np.ndarray,
    slack: float,
) -> Pruning:
    """Remove uids until no photo is nearer than its ceiling, or until the edges do not know enough for a round.

    Args:
        keep: (u,) bool, uids that are still there.
        edges: (e,) int64 uids, (e,) int64 photos, (e,) float64 exact similarities: all kept uids above a floor.
        floor: (n,) float64, of every photo.
        class_at: (n,) int64 as in `ceilings`.
        second: (n,) bool.
        slack: >= 0.

    Returns:
        The pruning; it is finished when nobody is starved.
    """
    items, photos, similarity = edges
    keep, rounds = keep.copy(), 0
    while True:
        known = keep[items]
        nearest = np.full(len(class_at), -np.inf)
        np.maximum.at(nearest, photos[known], similarity[known])
        unknown = np.isneginf(nearest) & (class_at >= 0)
        ceiling = ceilings(np.where(unknown, floor, nearest), class_at, second, slack)
        starved = np.nonzero(unknown | (ceiling < floor) & (class_at >= 0))[0]
        goes = known & (similarity > ceiling[photos])
        if len(starved) or not goes.any():
            return Pruning(keep, nearest, starved, rounds)
        keep[items[goes]] = False
        rounds += 1
