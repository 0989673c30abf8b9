"""Selection inflation: groups chosen by a model's accuracy show a drop on the photos that chose them, always.

CounterAnimal takes, per class, the background where the reference model is best as common and the one where it is worst
as counter, from the same photos that it then reports (counteranimal.md 2 and 7.3, item 8). Without any effect of
background the gap of the best and the worst of B groups grows with B. Choosing on one half of the photos and evaluating
on the other leaves 0.

Shapes: C classes, B groups (backgrounds).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from statsmodels.stats.multitest import multipletests


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
    half = halve(cell, rng)
    tables = [_table(correct[half == side], cell[half == side], shape) for side in (0, 1)]
    return np.array(tables, np.float64)


def halve(cell: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return (n,) int64 0 or 1: a random half of every cell, odd ones to within a photo."""
    order = np.lexsort((rng.random(len(cell)), cell))
    half = np.empty(len(cell), np.int64)
    half[order] = np.arange(len(cell)) % 2
    return half


def permutation_p(
    hits: np.ndarray, totals: np.ndarray, min_photos: int, draws: int, rng: np.random.Generator
) -> np.ndarray:
    """Return (C,) float64: how often groups dealt out at random differ as much as a class's best and worst do.

    Dealing a class's photos out again leaves its number of hits and the groups' sizes, so the hits of a deal follow the
    multivariate hypergeometric distribution. p = (1 + deals with a gap at least as large) / (1 + draws); NaN for
    classes with fewer than two groups.

    Args:
        hits: (C, B) correct photos.
        totals: (C, B) photos.
        min_photos: Groups with fewer take no part.
        draws: Deals per class.
        rng: Source of randomness.
    """
    result = np.full(len(hits), np.nan)
    for row, (right, sizes) in enumerate(zip(np.asarray(hits, np.int64), np.asarray(totals, np.int64), strict=True)):
        usable = sizes >= max(min_photos, 1)
        if usable.sum() < 2:
            continue
        right, sizes = right[usable], sizes[usable]
        dealt = rng.multivariate_hypergeometric(sizes, right.sum(), size=draws, method="marginals") / sizes
        observed = np.ptp(right / sizes)
        result[row] = (1 + (np.ptp(dealt, axis=1) >= observed - 1e-12).sum()) / (1 + draws)
    return result


def q_values(p: np.ndarray) -> np.ndarray:
    """Return (C,) p-values adjusted for the false discovery rate (Benjamini and Hochberg, statsmodels); NaN stays."""
    known = np.isfinite(p)
    adjusted = np.full(len(p), np.nan)
    if known.any():
        adjusted[known] = multipletests(p[known], method="fdr_bh")[1]
    return adjusted


@dataclass(frozen=True)
class Matrix:
    """Drops of M models in groups that each of M models chose: rows choose, columns are evaluated.

    Attributes:
        same: (M, M, C) float64 class drops on the photos that chose; NaN for classes without groups.
        held_out: (M, M, C) float64 likewise on the other half, mean over halvings.
    """

    same: np.ndarray
    held_out: np.ndarray


def discover_and_evaluate(
    correct: np.ndarray,
    cell: np.ndarray,
    shape: tuple[int, int],
    min_photos: int,
    splits: int,
    rng: np.random.Generator,
) -> Matrix:
    """Choose groups with every model and evaluate every model in them: on the same photos, and on held-out halves.

    Args:
        correct: (M, n) bool, the same photos for every model.
        cell: (n,) int64 class * B + group.
        shape: (C, B).
        min_photos: Groups with fewer take no part; half as many in a half.
        splits: Random halvings.
        rng: Source of randomness.
    """
    count = len(correct)
    whole = [_table(row, cell, shape) for row in correct]
    same = _drops(whole, whole, min_photos)
    total, times = np.zeros((count, count, shape[0])), np.zeros((count, count, shape[0]))
    for _ in range(splits):
        half = halve(cell, rng)
        sides = [[_table(row[half == side], cell[half == side], shape) for row in correct] for side in (0, 1)]
        for choose, evaluate in (sides, sides[::-1]):
            drops = _drops(choose, evaluate, -(-min_photos // 2))
            known = np.isfinite(drops)
            total += np.where(known, drops, 0.0)
            times += known
    held_out = np.divide(total, times, out=np.full(total.shape, np.nan), where=times > 0)
    return Matrix(same, held_out)


def _table(correct: np.ndarray, cell: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    size = shape[0] * shape[1]
    hits, totals = np.bincount(cell, correct.astype(float), size), np.bincount(cell, minlength=size)
    return hits.reshape(shape), totals.reshape(shape)


def _drops(choose: list[tuple[np.ndarray, np.ndarray]], evaluate: list[tuple[np.ndarray, np.ndarray]],
           min_photos: int) -> np.ndarray:  # fmt: skip
    groups = [best_and_worst(*table, min_photos) for table in choose]
    return np.stack([[class_drops(*table, *pair) for table in evaluate] for pair in groups])
