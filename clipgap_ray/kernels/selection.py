"""Selection inflation: groups chosen by a model's accuracy show a drop on the photos that chose them, always.

CounterAnimal takes, per class, the background where the reference model is best as common and the one where it is worst
as counter, from the same photos that it then reports (counteranimal.md 2 and 7.3, item 8). Without any effect of
background the gap of the best and the worst of B groups grows with B. Choosing on one half of the photos and evaluating
on the other leaves 0.

Shapes: C classes, B groups (backgrounds).
"""

from __future__ import annotations

import numpy as np


def best_and_worst(hits: np.ndarray, totals: np.ndarray, min_photos: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Choose every class's groups of highest and lowest accuracy (paper 2403.11497, 2.2).

    Args:
        hits: (C, B) correct photos.
        totals: (C, B) photos.
        min_photos: Groups with fewer take no part.

    Returns:
        (C,) int64 best and (C,) int64 worst group; -1 where a class has fewer than two groups.
    """
    hits, totals = np.asarray(hits, np.float64), np.asarray(totals)
    enough = totals >= max(min_photos, 1)
    rate = np.divide(hits, totals, out=np.zeros(hits.shape), where=enough)
    usable = enough.sum(axis=1) >= 2
    best = np.argmax(np.where(enough, rate, -np.inf), axis=1)
    # The last of the worst: with equal rates best and worst still are two groups.
    worst = hits.shape[1] - 1 - np.argmin(np.where(enough, rate, np.inf)[:, ::-1], axis=1)
    return np.where(usable, best, -1), np.where(usable, worst, -1)


def class_drops(hits: np.ndarray, totals: np.ndarray, best: np.ndarray, worst: np.ndarray) -> np.ndarray:
    """Return (C,) float64 drops, as fractions, from the best to the worst group of every class; NaN without groups.

    Args:
        hits: (C, B) correct photos to evaluate on: those that chose the groups, or others.
        totals: (C, B) photos.
        best: (C,) int64 of `best_and_worst`.
        worst: (C,) int64 likewise.
    """
    row = np.arange(len(hits))
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = np.asarray(hits, np.float64) / totals
    return np.where((best >= 0) & (worst >= 0), rate[row, best] - rate[row, worst], np.nan)


def halves(correct: np.ndarray, cell: np.ndarray, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Split the photos at random into a half that chooses and a half that evaluates.

    Args:
        correct: (n,) bool.
        cell: (n,) int64 class * B + group.
        shape: (C, B).
        rng: Source of randomness; every cell is halved, odd ones to within a photo.

    Returns:
        (2, 2, C, B) float64: for each half hits and totals.
    """
    order = np.lexsort((rng.random(len(cell)), cell))
    half = np.empty(len(cell), np.int64)
    half[order] = np.arange(len(cell)) % 2
    size = shape[0] * shape[1]
    counts = [[np.bincount(cell[half == h], w[half == h], size) for w in (correct.astype(float), np.ones(len(cell)))]
              for h in (0, 1)]  # fmt: skip
    return np.array(counts).reshape(2, 2, *shape)
