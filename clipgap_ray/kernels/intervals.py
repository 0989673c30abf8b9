"""Uncertainty of accuracies and of their differences: over test images, over classes, over training seeds.

Counts in, intervals out. Intervals of proportions are Wilson's, which behave at 0 and 1 where the textbook interval
has no width. Resampling n images of which h are correct is drawing from Binomial(n, h / n): the bootstrap over
images needs the counts and not the images, so a table of published accuracies can be resampled as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

CONFIDENCE = 0.95


def wilson(hits: np.ndarray, totals: np.ndarray, confidence: float = CONFIDENCE) -> tuple[np.ndarray, np.ndarray]:
    """Return Wilson's interval of proportions (statsmodels).

    Args:
        hits: (...) counts, 0 <= hits <= totals; may be fractional (a mean over seeds).
        totals: (...) numbers of trials; 0 gives NaN.
        confidence: Coverage, in (0, 1).

    Returns:
        Lower and upper ends, (...) float64 fractions.

    Raises:
        ValueError: If hits lie outside [0, totals].
    """
    hits, totals = np.broadcast_arrays(np.asarray(hits, np.float64), np.asarray(totals, np.float64))
    if np.any(hits < 0) or np.any(hits > totals):
        raise ValueError(f"hits must lie in [0, totals]: got {hits.min():g}..{hits.max():g} of {totals.max():g}")
    some = totals > 0
    low, high = proportion_confint(hits, np.where(some, totals, 1), alpha=1 - confidence, method="wilson")
    return np.where(some, low, np.nan), np.where(some, high, np.nan)


def proportion_difference(
    first: tuple[int, int], second: tuple[int, int], confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Return Newcombe's interval of the difference of two independent proportions (statsmodels).

    Args:
        first: Hits and trials, 0 <= hits <= trials, trials > 0.
        second: Likewise; the interval is of first - second.
        confidence: Coverage, in (0, 1).

    Raises:
        ValueError: If hits lie outside [0, trials], or there are no trials.
    """
    for hits, trials in (first, second):
        if not 0 <= hits <= trials or not trials:
            raise ValueError(f"{hits} hits of {trials} trials: expected 0 <= hits <= trials and at least one trial")
    low, high = confint_proportions_2indep(*first, *second, method="newcomb", compare="diff", alpha=1 - confidence)
    return float(low), float(high)


def resample_hits(hits: np.ndarray, totals: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Bootstrap images: draw new hits for every cell of a table of counts.

    Args:
        hits: (...) int64.
        totals: (...) int64; cells without images stay 0.
        draws: Bootstrap samples.
        rng: Source of randomness.

    Returns:
        (draws, ...) int64.
    """
    hits, totals = np.asarray(hits), np.asarray(totals)
    rate = np.divide(hits, totals, out=np.zeros(totals.shape), where=totals > 0)
    return rng.binomial(totals, rate, size=(draws, *totals.shape))


def resampled_means(outcomes: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Bootstrap images jointly: every draw takes the same images for all models, so that what they share cancels.

    Args:
        outcomes: (r, n) bool or float, r models on the same n images, n >= 1.
        draws: Bootstrap samples.
        rng: Source of randomness.

    Returns:
        (draws, r) float64 mean outcomes.
    """
    values = np.asarray(outcomes, np.float64)
    count = values.shape[1]
    means = np.empty((draws, len(values)))
    for draw in range(draws):  # n x draws weights at once would be gigabytes for ImageNet
        means[draw] = values @ np.bincount(rng.integers(0, count, count), minlength=count) / count
    return means


def resample_classes(num_classes: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Bootstrap classes: (draws, num_classes) int64 positions drawn with replacement."""
    return rng.integers(0, num_classes, size=(draws, num_classes))


def percentile_interval(samples: np.ndarray, confidence: float = CONFIDENCE) -> np.ndarray:
    """Return the central interval of bootstrap samples: (2, ...) float64 from (draws, ...) float64."""
    tail = (1 - confidence) / 2
    return np.quantile(samples, [tail, 1 - tail], axis=0)


@dataclass(frozen=True)
class Spread:
    """Mean over training seeds; `sd` is the sample standard deviation (NaN for one seed)."""

    mean: float
    sd: float
    num_seeds: int


def over_seeds(accuracies: np.ndarray) -> Spread:
    """Return mean and sample standard deviation of (s,) accuracies, one per seed, s >= 1."""
    accuracies = np.asarray(accuracies, np.float64)
    sd = float(accuracies.std(ddof=1)) if len(accuracies) > 1 else float("nan")
    return Spread(float(accuracies.mean()), sd, len(accuracies))


@dataclass(frozen=True)
class Drop:
    """A drop in accuracy, as fractions; positive = the second model is worse.

    Attributes:
        value: Drop of the mean accuracy.
        low: Lower end of its interval.
        high: Upper end.
        se_images: Standard error from the choice of test images.
        se_seeds: Standard error from the training seeds; NaN when either side has a single seed.
    """

    value: float
    low: float
    high: float
    se_images: float
    se_seeds: float


def paired_drop(before: np.ndarray, after: np.ndarray, confidence: float = CONFIDENCE) -> Drop:
    """Compare two models on the same test images, each trained with one or more seeds.

    Both kinds of luck count: the images (paired, so that easy and hard ones cancel) and the seeds. Their variances
    are added, which is on the safe side, since the spread over seeds already holds a part of the image noise.

    Args:
        before: (s, n) bool or float, correct per seed and image.
        after: (t, n) likewise, same images in the same order.
        confidence: Coverage of the normal interval.

    Returns:
        The drop mean(before) - mean(after) with its interval.

    Raises:
        ValueError: If the numbers of images differ or are 0.
    """
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if before.shape[1] != after.shape[1] or before.shape[1] == 0:
        raise ValueError(f"expected the same images on both sides: got {before.shape[1]} and {after.shape[1]}")
    per_image = before.mean(axis=0) - after.mean(axis=0)
    count = len(per_image)
    se_images = float(per_image.std(ddof=1) / np.sqrt(count)) if count > 1 else float("nan")
    se_seeds = float("nan")
    if len(before) > 1 and len(after) > 1:
        variances = [side.mean(axis=1).var(ddof=1) / len(side) for side in (before, after)]
        se_seeds = float(np.sqrt(sum(variances)))
    reach = stats.norm.ppf((1 + confidence) / 2) * np.sqrt(np.nansum([se_images**2, se_seeds**2]))
    value = float(per_image.mean())
    return Drop(value, value - float(reach), value + float(reach), se_images, se_seeds)


def mean_drop(before: Sequence[np.ndarray], after: Sequence[np.ndarray], confidence: float = CONFIDENCE) -> Drop:
    """Compare two training sets by their mean accuracy over several test sets, paired by image and by seed.

    A seed stands for the initial weights, so what is good or bad about it for both sets cancels; few are left to judge
    the rest by, hence Student's t with s - 1 degrees of freedom. The squares of both reaches are added, which is on
    the safe side, since the spread over seeds already holds a part of the image noise.

    Args:
        before: Per test set (s, n) bool or float, correct per seed and image; n may differ between test sets.
        after: Likewise, same images and seeds in the same order.
        confidence: Coverage of the interval.

    Returns:
        The drop mean(before) - mean(after), every test set weighing the same, with its interval.

    Raises:
        ValueError: If there is no test set, or images or seeds differ.
    """
    if not before or [side.shape for side in before] != [side.shape for side in after]:
        shapes = [[side.shape for side in sides] for sides in (before, after)]
        raise ValueError(f"expected the same seeds and images on both sides: got {shapes[0]} and {shapes[1]}")
    deltas = [np.asarray(b, np.float64) - np.asarray(a, np.float64) for b, a in zip(before, after, strict=True)]
    per_image = [delta.mean(axis=0) for delta in deltas]
    se_images = float(np.sqrt(sum(one.var(ddof=1) / len(one) for one in per_image)) / len(deltas))
    per_seed = np.mean([delta.mean(axis=1) for delta in deltas], axis=0)
    reach = stats.norm.ppf((1 + confidence) / 2) * se_images
    se_seeds = float("nan")
    if len(per_seed) > 1:
        se_seeds = float(per_seed.std(ddof=1) / np.sqrt(len(per_seed)))
        reach = np.hypot(reach, stats.t.ppf((1 + confidence) / 2, len(per_seed) - 1) * se_seeds)
    value = float(per_seed.mean())
    return Drop(value, value - float(reach), value + float(reach), se_images, se_seeds)
