"""Photos of two groups beside their similarity to the training pool: exposure, common support, matching.

`s` is the similarity of a test photo to its nearest pool row, `first` and `second` are the two groups of a test set
(common and counter in paper 2403.11497). Everything here happens inside classes: a class whose photos are all far
away says nothing about the groups (counteranimal.md 7.3, items 1 and 2).

Shapes: n photos, C classes. Rates and similarities are fractions, `_pp` are percentage points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize import linear_sum_assignment

from clipgap_ray.kernels import intervals

STRAYS = 0.025  # share of a group's photos, at either end, that are no support: two strays would feign a wide one
CALIPER = 0.2  # in within-class standard deviations of s: Austin 2011's rule for matching on a score
FORBIDDEN = 1e6  # price of a pair outside the caliper: any number of allowed pairs is cheaper
BINS_PER_CLASS = 6
BINS_SHOWN = 8


@dataclass(frozen=True)
class Photos:
    """The photos of both groups, of the classes that have photos in both.

    Attributes:
        rate: (n,) float64 in [0, 1]: correct or not, or the mean over training seeds.
        similarity: (n,) float64, to the nearest row of the model's own training pool.
        class_at: (n,) int64 position in `classes`.
        second: (n,) bool, True = the group expected to be hard.
        classes: C names.
        pair: Names of the first and the second group.
    """

    rate: np.ndarray
    similarity: np.ndarray
    class_at: np.ndarray
    second: np.ndarray
    classes: tuple[str, ...]
    pair: tuple[str, str]

    @property
    def cell(self) -> np.ndarray:
        """(n,) int64 position of every photo's class and group: 2 * class + group."""
        return 2 * self.class_at + self.second

    def cell_means(self, values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Return (C, 2) float64 means of (n,) values per class and group; NaN where all weights are 0."""
        weights = np.ones(len(values)) if weights is None else weights
        size = 2 * len(self.classes)
        totals = np.bincount(self.cell, weights, size)
        sums = np.bincount(self.cell, weights * values, size)
        return np.divide(sums, totals, out=np.full(size, np.nan), where=totals > 0).reshape(-1, 2)

    def of_class(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the (a,) and (b,) int64 positions of a class's photos of the first and of the second group."""
        here = self.class_at == position
        return np.nonzero(here & ~self.second)[0], np.nonzero(here & self.second)[0]


def take(
    classes: Sequence[str],
    groups: Sequence[str],
    rate: np.ndarray,
    similarity: np.ndarray,
    pair: tuple[str, str] = ("common", "counter"),
) -> tuple[Photos, np.ndarray, list[str]]:
    """Choose the photos that can be compared.

    Args:
        classes: n class names.
        groups: n group names; photos of further groups are left out.
        rate: (n,) bool or float in [0, 1].
        similarity: (n,) float64.
        pair: First and second group.

    Returns:
        The photos, their (m,) int64 positions in the arguments, and the classes that lack one of the groups.

    Raises:
        ValueError: If no class has photos in both groups, or a similarity is not finite.
    """
    names, group_names = np.asarray(classes, dtype=str), np.asarray(groups, dtype=str)
    ours = np.isin(group_names, pair)
    per_group = [set(names[group_names == group].tolist()) for group in pair]
    both = per_group[0] & per_group[1]
    if not both:
        found = ", ".join(sorted(set(group_names.tolist()))[:5])
        raise ValueError(f"no class has photos in both {pair[0]!r} and {pair[1]!r}; groups are {found}")
    kept = np.nonzero(ours & np.isin(names, sorted(both)))[0]
    values = np.asarray(similarity, np.float64)[kept]
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {len(values)} photos have no finite similarity")
    class_names, class_at = np.unique(names[kept], return_inverse=True)
    photos = Photos(
        np.asarray(rate, np.float64)[kept],
        values,
        class_at.astype(np.int64),
        group_names[kept] == pair[1],
        tuple(class_names.tolist()),
        pair,
    )
    return photos, kept, sorted((per_group[0] | per_group[1]) - both)


# --- exposure and support --------------------------------------------------------------------------------


def exposure(photos: Photos) -> dict[str, Any]:
    """Are photos of the second group farther from the pool? (counteranimal.md 7.3, item 1)

    Returns:
        `difference` (mean over classes of mean s of the first minus mean s of the second group), `pooled_difference`
        (every photo once), `auc` (P(s_first > s_second) within a class, mean over classes; 0.5 = equally close),
        `pooled_auc`, `ks` and `ks_p` (Kolmogorov-Smirnov over all photos), and the groups' mean s.
    """
    means = photos.cell_means(photos.similarity)
    first, second = photos.similarity[~photos.second], photos.similarity[photos.second]
    ks = stats.ks_2samp(first, second)
    return {
        "difference": float((means[:, 0] - means[:, 1]).mean()),
        "pooled_difference": float(first.mean() - second.mean()),
        "auc": float(class_auc(photos).mean()),
        "pooled_auc": _auc(first, second),
        "ks": float(ks.statistic),
        "ks_p": float(ks.pvalue),
        "mean_similarity": dict(zip(photos.pair, means.mean(axis=0).tolist(), strict=True)),
    }


def class_auc(photos: Photos) -> np.ndarray:
    """Return (C,) float64 P(s_first > s_second) + P(equal) / 2 of every class."""
    sides = (photos.of_class(c) for c in range(len(photos.classes)))
    return np.array([_auc(photos.similarity[a], photos.similarity[b]) for a, b in sides])


def _auc(first: np.ndarray, second: np.ndarray) -> float:
    return float(stats.mannwhitneyu(first, second).statistic / (len(first) * len(second)))


def supported(photos: Photos) -> np.ndarray:
    """Return (n,) bool: the photo lies where the other group of its class has photos too.

    It does if at both sides of it, its own similarity included, there are more than a share `STRAYS` of the other
    group's photos: beyond that what the other group would do is extrapolation. With fewer than 40 photos (1 / STRAYS)
    the other group's support is its whole range.
    """
    inside = np.zeros(len(photos.similarity), bool)
    for position in range(len(photos.classes)):
        sides = photos.of_class(position)
        for own, other in (sides, sides[::-1]):
            values, theirs = photos.similarity[own], np.sort(photos.similarity[other])
            strays = int(STRAYS * len(theirs))
            inside[own] = (values >= theirs[strays]) & (values <= theirs[-1 - strays])
    return inside


def overlap(photos: Photos) -> dict[str, Any]:
    """Return the share of photos inside the common support: `per_group`, `smallest` of both, `num_classes_without`."""
    inside = supported(photos)
    shares = {name: float(inside[photos.second == (i == 1)].mean()) for i, name in enumerate(photos.pair)}
    per_class = np.bincount(photos.class_at, inside, len(photos.classes))
    return {"per_group": shares, "smallest": min(shares.values()), "num_classes_without": int((per_class == 0).sum())}


# --- checks: matching and binning ------------------------------------------------------------------------


def within_class_sd(photos: Photos) -> float:
    """Return the pooled standard deviation of s inside classes and groups."""
    centred = photos.similarity - photos.cell_means(photos.similarity).ravel()[photos.cell]
    freedom = max(len(centred) - 2 * len(photos.classes), 1)
    return float(np.sqrt((centred**2).sum() / freedom))


def match(photos: Photos, caliper: float = CALIPER) -> tuple[np.ndarray, np.ndarray]:
    """Pair photos of both groups of a class whose s differ by at most `caliper` standard deviations, one to one.

    As many pairs as possible, and of those the ones of the smallest total difference (optimal assignment, scipy).

    Args:
        photos: The photos. A class of a x b photos takes 8 a b bytes.
        caliper: In `within_class_sd`.

    Returns:
        (p,) int64 positions of the first group's photos and (p,) of their partners, ordered by class.
    """
    reach = caliper * within_class_sd(photos)
    firsts, seconds = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for position in range(len(photos.classes)):
        a, b = photos.of_class(position)
        distance = np.abs(photos.similarity[a][:, None] - photos.similarity[b][None, :])
        rows, columns = linear_sum_assignment(np.where(distance <= reach, distance, FORBIDDEN))
        close = distance[rows, columns] <= reach
        firsts.append(a[rows[close]])
        seconds.append(b[columns[close]])
    return np.concatenate(firsts), np.concatenate(seconds)


def matched_drop(
    photos: Photos, caliper: float, rng: np.random.Generator, draws: int, predicted: np.ndarray | None = None
) -> dict[str, Any]:
    """Return the drop between photos matched on s: what is left at equal similarity, without any model.

    It is about the pairs only, photos near the middle of both groups, so it need not equal the residual, which is about
    all photos. What the model says about the same pairs (`fitted_drop_pp`) is comparable.

    Args:
        photos: The photos.
        caliper: In `within_class_sd`.
        rng: For the bootstrap over classes, then pairs (the matching itself is not repeated).
        draws: Bootstrap samples.
        predicted: (n,) float64 chance of being right by a model, for `fitted_drop_pp`.

    Returns:
        `num_pairs`, `num_classes`, `mean_distance` (of s, first minus second), `balanced` accuracy per group,
        `drop_pp` with `interval_pp`, `fitted_drop_pp`; None where there is no pair.
    """
    first, second = match(photos, caliper)
    result: dict[str, Any] = {"caliper": caliper * within_class_sd(photos), "num_pairs": len(first)}
    if not len(first):
        return {**result, "num_classes": 0, "mean_distance": None, "balanced": None, "drop_pp": None,
                "interval_pp": None, "fitted_drop_pp": None}  # fmt: skip
    classes, class_at, sizes = np.unique(photos.class_at[first], return_inverse=True, return_counts=True)

    def per_class(values: np.ndarray) -> list[np.ndarray]:
        return [np.bincount(class_at, values[side]) / sizes for side in (first, second)]

    sides = per_class(photos.rate)
    fitted = None if predicted is None else per_class(predicted)
    drops = photos.rate[first] - photos.rate[second]
    starts, samples = np.cumsum(sizes) - sizes, np.empty(draws)
    for draw in range(draws):
        picked = rng.integers(0, len(classes), len(classes))
        pairs = np.repeat(starts[picked], sizes[picked])
        pairs = pairs + (rng.random(len(pairs)) * np.repeat(sizes[picked], sizes[picked])).astype(np.int64)
        weights = np.repeat(1 / sizes[picked], sizes[picked])
        samples[draw] = (drops[pairs] * weights).sum() / len(classes)
    return {
        **result,
        "num_classes": len(classes),
        "mean_distance": float((photos.similarity[first] - photos.similarity[second]).mean()),
        "balanced": {name: float(side.mean()) for name, side in zip(photos.pair, sides, strict=True)},
        "drop_pp": 100 * float((sides[0] - sides[1]).mean()),
        "interval_pp": (100 * intervals.percentile_interval(samples)).tolist(),
        "fitted_drop_pp": None if fitted is None else 100 * float((fitted[0] - fitted[1]).mean()),
    }


def kitagawa(photos: Photos, bins: int = BINS_PER_CLASS) -> tuple[float, float]:
    """Split the drop by binning s inside every class (Kitagawa 1955, Oaxaca-Blinder): the display, not the estimate.

    explained = sum_b (p_1b - p_2b) * mean_g a_gb, residual = sum_b mean_g p_gb * (a_1b - a_2b), averaged over classes;
    p are shares of photos, a accuracies. They add up to the drop exactly. Binning under-adjusts, by a tenth with five
    bins (counteranimal.md 7.3). Where a bin lacks one group its accuracy is taken from the other: its difference
    counts as explained.

    Args:
        photos: The photos.
        bins: Quantile bins per class.

    Returns:
        Explained and residual drop, as fractions.
    """
    parts = np.zeros((len(photos.classes), 2))
    for position in range(len(photos.classes)):
        sides = photos.of_class(position)
        edges = np.quantile(photos.similarity[np.concatenate(sides)], np.linspace(0, 1, bins + 1)[1:-1])
        share, accuracy = np.zeros((2, bins)), np.full((2, bins), np.nan)
        for group, side in enumerate(sides):
            at = np.searchsorted(edges, photos.similarity[side], side="right")
            count = np.bincount(at, minlength=bins)
            share[group] = count / len(side)
            np.divide(np.bincount(at, photos.rate[side], bins), count, out=accuracy[group], where=count > 0)
        accuracy = np.where(np.isnan(accuracy), accuracy[::-1], accuracy)
        accuracy = np.nan_to_num(accuracy)  # a bin without any photo has no share either
        parts[position, 0] = ((share[0] - share[1]) * accuracy.mean(axis=0)).sum()
        parts[position, 1] = (share.mean(axis=0) * (accuracy[0] - accuracy[1])).sum()
    explained, residual = parts.mean(axis=0)
    return float(explained), float(residual)


def shown_bins(photos: Photos, bins: int = BINS_SHOWN) -> list[dict[str, Any]]:
    """Return accuracy of each group in quantile bins of s over all photos, with Wilson intervals, for the figure."""
    edges = np.unique(np.quantile(photos.similarity, np.linspace(0, 1, bins + 1)))
    records = []
    for number, group in enumerate(photos.pair):
        ours = photos.second == bool(number)
        at = np.searchsorted(edges[1:-1], photos.similarity[ours], side="right")
        for b in np.unique(at).tolist():
            rates = photos.rate[ours][at == b]
            low, high = intervals.wilson(rates.sum(), np.array(len(rates)))
            records.append(
                {
                    "group": group,
                    "low_similarity": float(edges[b]),
                    "high_similarity": float(edges[min(b + 1, len(edges) - 1)]),
                    "mean_similarity": float(photos.similarity[ours][at == b].mean()),
                    "num_images": len(rates),
                    "accuracy": float(rates.mean()),
                    "low": float(low),
                    "high": float(high),
                }
            )
    return records
