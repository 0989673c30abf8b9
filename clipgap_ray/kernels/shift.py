"""Group shift: accuracy per class and group, and the drop from one group to another (paper 2403.11497, section 3).

Balanced accuracy is the unweighted mean over classes, the paper's default; unbalanced accuracy counts every photo
once and mixes in that the groups have different classes (counteranimal.md 9, item 12). Only classes with photos in
both groups enter balanced numbers and drops; the others are named, so that no NaN is averaged away.

Shapes: C classes, G groups. Accuracies and relative drops are fractions, `_pp` are percentage points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import logit

from clipgap_ray.kernels import intervals

PAIR = ("common", "counter")
SIGNIFICANT_Z = 1.96


@dataclass(frozen=True)
class GroupCounts:
    """Correct and all photos per class and group.

    Attributes:
        hits: (C, G) float64; whole numbers when counted, accuracy x n when taken from a printed table.
        totals: (C, G) int64.
        classes: C names.
        groups: G names.
    """

    hits: np.ndarray
    totals: np.ndarray
    classes: tuple[str, ...]
    groups: tuple[str, ...]

    def accuracy(self) -> np.ndarray:
        """Return (C, G) float64 accuracies; NaN where a class has no photo of a group."""
        return np.divide(self.hits, self.totals, out=np.full(self.totals.shape, np.nan), where=self.totals > 0)

    def columns(self, pair: Sequence[str]) -> list[int]:
        """Return the positions of the named groups.

        Raises:
            ValueError: If a group is not there, naming those that are.
        """
        missing = [name for name in pair if name not in self.groups]
        if missing:
            raise ValueError(
                f"no photos of group {missing[0]!r}; groups are {', '.join(name or '(none)' for name in self.groups)}"
            )
        return [self.groups.index(name) for name in pair]


def count(classes: Sequence[str], groups: Sequence[str], correct: np.ndarray) -> GroupCounts:
    """Count photos of per-sample predictions.

    Args:
        classes: n class names.
        groups: n group names.
        correct: (n,) bool, or float in [0, 1]: the mean over seeds.

    Returns:
        Counts with classes and groups in sorted order.
    """
    class_names, class_at = np.unique(np.asarray(classes, dtype=str), return_inverse=True)
    group_names, group_at = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    shape = (len(class_names), len(group_names))
    cell = class_at * shape[1] + group_at
    totals = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape)
    hits = np.bincount(cell, np.asarray(correct, np.float64), minlength=shape[0] * shape[1]).reshape(shape)
    return GroupCounts(hits, totals, tuple(map(str, class_names)), tuple(map(str, group_names)))


def from_accuracies(
    accuracies: np.ndarray, totals: np.ndarray, classes: Sequence[str], groups: Sequence[str]
) -> GroupCounts:
    """Take counts from a published table. Hits are not rounded, so that the table's own means come out.

    Args:
        accuracies: (C, G) float64 fractions.
        totals: (C, G) int64.
        classes: C names.
        groups: G names.
    """
    totals = np.asarray(totals, np.int64)
    return GroupCounts(np.asarray(accuracies, np.float64) * totals, totals, tuple(classes), tuple(groups))


def impossible(counts: GroupCounts, rounding: float = 5.1e-5) -> list[tuple[str, str]]:
    """Return the (class, group) cells whose accuracy is no h / n: misprints, or a wrong n.

    Args:
        counts: From a printed table.
        rounding: Half a unit of the last printed digit, as a fraction; the default is for percent with two decimals.
    """
    off = np.abs(counts.hits - np.rint(counts.hits)) > rounding * counts.totals + 1e-9
    return [(counts.classes[row], counts.groups[column]) for row, column in np.argwhere(off)]


def class_drops(counts: GroupCounts, pair: Sequence[str] = PAIR) -> tuple[np.ndarray, np.ndarray]:
    """Return every class's drop and its standard error (two independent proportions, unpooled).

    Returns:
        (C,) float64 drops and (C,) float64 standard errors, as fractions; NaN where a class lacks a group.
    """
    at = counts.columns(pair)
    accuracy, totals = counts.accuracy()[:, at], counts.totals[:, at]
    variance = np.divide(accuracy * (1 - accuracy), totals, out=np.full(totals.shape, np.nan), where=totals > 0)
    return accuracy[:, 0] - accuracy[:, 1], np.sqrt(variance.sum(axis=1))


def summarise(
    counts: GroupCounts, rng: np.random.Generator, pair: Sequence[str] = PAIR, draws: int = 2000
) -> dict[str, Any]:
    """Return everything `clipgap shift` says about one model.

    Args:
        counts: Photos per class and group.
        rng: For the bootstraps.
        pair: The group expected to be easy, then the hard one; drop = first - second.
        draws: Bootstrap samples.

    Returns:
        JSON values: `balanced`, `unbalanced`, `drop`, `intervals`, `worst_group`, `worst_class_group`,
        `num_negative_drops`, `num_insignificant_drops`, `classes` and the classes left out.

    Raises:
        ValueError: If a group is missing or no class has photos in both.
    """
    at = counts.columns(pair)
    both = np.all(counts.totals[:, at] > 0, axis=1)
    if not both.any():
        raise ValueError(f"no class has photos in both {pair[0]!r} and {pair[1]!r}")
    hits, totals = counts.hits[both][:, at], counts.totals[both][:, at]
    balanced = (hits / totals).mean(axis=0)
    unbalanced = hits.sum(axis=0) / totals.sum(axis=0)
    drops, errors = (values[both] for values in class_drops(counts, pair))
    return {
        "groups": list(pair),
        "num_classes": int(both.sum()),
        "num_images": dict(zip(pair, totals.sum(axis=0).tolist(), strict=True)),
        "balanced": dict(zip(pair, balanced.tolist(), strict=True)),
        "unbalanced": dict(zip(pair, unbalanced.tolist(), strict=True)),
        "drop": {
            "drop_pp": 100 * float(balanced[0] - balanced[1]),
            "relative": float(1 - balanced[1] / balanced[0]) if balanced[0] else None,
            "log_odds": float(log_odds_drop(hits, totals)),
            "unbalanced_drop_pp": 100 * float(unbalanced[0] - unbalanced[1]),
        },
        "intervals": _intervals(hits, totals, pair, rng, draws),
        "worst_group": _worst_group(pair, balanced),
        "worst_class_group": _worst_cell(counts),
        "num_negative_drops": int((drops < 0).sum()),
        "num_insignificant_drops": int((np.abs(drops) <= SIGNIFICANT_Z * errors).sum()),
        "num_classes_second_larger": int((totals[:, 1] > totals[:, 0]).sum()),
        "classes": _class_records(counts, pair),
        "classes_left_out": [name for name, kept in zip(counts.classes, both.tolist(), strict=True) if not kept],
    }


def balanced_drop_pp(counts: GroupCounts, pair: Sequence[str] = PAIR) -> float:
    """Return the mean over classes, of those that have both groups, of the drop in points; NaN without such a class."""
    drops, _ = class_drops(counts, pair)
    known = drops[np.isfinite(drops)]
    return 100 * float(known.mean()) if len(known) else float("nan")


def log_odds_drop(hits: np.ndarray, totals: np.ndarray) -> float:
    """Return the mean over classes of logit(first) - logit(second), from (C, 2) counts with half a photo added.

    Unlike points, log-odds do not shrink where a class is near 0 or 1 (counteranimal.md 9, item 9).
    """
    return float(_log_odds_drops(hits, totals).mean())


def _log_odds_drops(hits: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """(..., C) float64 of (..., C, 2) counts."""
    odds = logit((hits + 0.5) / (totals + 1.0))
    return np.asarray(odds[..., 0] - odds[..., 1])


def _intervals(
    hits: np.ndarray, totals: np.ndarray, pair: Sequence[str], rng: np.random.Generator, draws: int
) -> dict[str, Any]:
    """Wilson per group; bootstraps of the balanced drop over images, and over classes and images."""
    drawn = intervals.resample_hits(hits, totals, draws, rng)
    rates = drawn / totals
    picked = intervals.resample_classes(len(hits), draws, rng)
    two_stage = np.take_along_axis(rates, picked[:, :, None], axis=1).mean(axis=1)
    images = rates.mean(axis=1)
    pooled = drawn.sum(axis=1) / totals.sum(axis=0)
    low, high = intervals.wilson(hits.sum(axis=0), totals.sum(axis=0))

    def drop_pp(samples: np.ndarray) -> list[float]:
        return (100 * intervals.percentile_interval(samples[:, 0] - samples[:, 1])).tolist()

    def per_group(samples: np.ndarray) -> dict[str, list[float]]:
        return dict(zip(pair, intervals.percentile_interval(samples).T.tolist(), strict=True))

    def relative(samples: np.ndarray) -> list[float] | None:
        """Of 1 - second / first; None where samples without a hit in the first group are more than its lower tail."""
        first, second = samples.T
        ratio = np.divide(second, first, out=np.full(len(first), np.inf), where=first > 0)
        with np.errstate(invalid="ignore"):  # between two infinite samples lies none
            ends = intervals.percentile_interval(1 - ratio)
        return ends.tolist() if np.isfinite(ends).all() else None

    log_odds = _log_odds_drops(drawn, totals)
    picked_odds = np.take_along_axis(log_odds, picked, axis=1)
    return {
        "confidence": intervals.CONFIDENCE,
        "draws": draws,
        "drop_pp_images": drop_pp(images),
        "drop_pp_classes": drop_pp(two_stage),
        "unbalanced_drop_pp_images": drop_pp(pooled),
        "relative_images": relative(images),
        "relative_classes": relative(two_stage),
        "log_odds_images": intervals.percentile_interval(log_odds.mean(axis=1)).tolist(),
        "log_odds_classes": intervals.percentile_interval(picked_odds.mean(axis=1)).tolist(),
        "balanced_images": per_group(images),
        "balanced_classes": per_group(two_stage),
        "unbalanced_wilson": {name: [float(low[i]), float(high[i])] for i, name in enumerate(pair)},
    }


def _worst_group(pair: Sequence[str], balanced: np.ndarray) -> dict[str, Any]:
    worst = int(np.argmin(balanced))
    return {"group": pair[worst], "accuracy": float(balanced[worst])}


def _worst_cell(counts: GroupCounts) -> dict[str, Any]:
    """The class and group of lowest accuracy; among equals the one with most photos."""
    accuracy = np.where(counts.totals > 0, counts.accuracy(), np.inf)
    ranks = np.lexsort((-counts.totals.ravel(), accuracy.ravel()))
    row, column = np.unravel_index(ranks[0], accuracy.shape)
    return {
        "class_name": counts.classes[row],
        "group": counts.groups[column],
        "hits": round(float(counts.hits[row, column])),
        "n": int(counts.totals[row, column]),
        "accuracy": float(accuracy[row, column]),
    }


def _class_records(counts: GroupCounts, pair: Sequence[str]) -> list[dict[str, Any]]:
    """One record per class: counts, accuracies with Wilson intervals, drop with its standard error."""
    at = counts.columns(pair)
    accuracy = counts.accuracy()[:, at]
    low, high = intervals.wilson(counts.hits[:, at], counts.totals[:, at])
    drops, errors = class_drops(counts, pair)
    records = []
    for row, name in enumerate(counts.classes):
        record: dict[str, Any] = {"class_name": name}
        for column, group in enumerate(pair):
            record |= {
                f"{group}_n": int(counts.totals[row, at[column]]),
                f"{group}_accuracy": _number(accuracy[row, column]),
                f"{group}_low": _number(low[row, column]),
                f"{group}_high": _number(high[row, column]),
            }
        record["drop_pp"] = _number(100 * drops[row])
        record["drop_se_pp"] = _number(100 * errors[row])
        records.append(record)
    return records


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if np.isfinite(value) else None
