"""Which training images lie near a test photo, and how common its background is in training (counteranimal.md 7.3).

Item 3: of the k nearest pool rows of a photo, how many captions name its class, how many of those show its background,
how many name the class that the model wrongly gave. Four regimes follow:

    never seen         far, and no neighbour names the class
    wrong caption      near, but no neighbour names the class
    other background   neighbours name the class, none of them before the photo's background
    well covered       neighbours name the class before the photo's background (or: backgrounds are not known)

Item 5: pi(b | class) over the pool rows whose caption names the class, against the class's drop.

Shapes: n photos, k neighbours, C classes, B backgrounds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from clipgap_ray.kernels import intervals
from clipgap_ray.kernels.overlap import Photos
from clipgap_ray.kernels.selection import q_values

NEVER, WRONG, OTHER, COVERED = REGIMES = ("never seen", "wrong caption", "other background", "well covered")
SMOOTHING = 0.5  # rows added to each background, so that a log ratio of none is finite
CLASS_DRAWS = 2000
FDR = 0.05  # of the classes said to have more of one background than chance gives, at most this share is wrong


def regimes(
    similarity: np.ndarray, names_class: np.ndarray, same_background: np.ndarray | None, far: float
) -> np.ndarray:
    """Sort photos into regimes.

    Args:
        similarity: (n,) float64 to the nearest pool row.
        names_class: (n, k) bool, the neighbour's caption names the photo's class.
        same_background: (n, k) bool, the neighbour shows the photo's background; None where nobody labelled them.
        far: Similarity below which a photo is far.

    Returns:
        (n,) positions in `REGIMES`.
    """
    named = names_class.any(axis=1)
    found = np.where(named, REGIMES.index(COVERED), np.where(similarity < far, 0, REGIMES.index(WRONG)))
    if same_background is not None:
        elsewhere = named & ~(names_class & same_background).any(axis=1)
        found = np.where(elsewhere, REGIMES.index(OTHER), found)
    return found


def by_group(
    photos: Photos,
    regime: np.ndarray,
    names_class: np.ndarray,
    same_background: np.ndarray | None,
    names_wrong: np.ndarray,
) -> list[dict[str, Any]]:
    """Describe the neighbours of every group: shares of neighbours, and regimes with their accuracy.

    Args:
        photos: n photos.
        regime: (n,) of `regimes`.
        names_class: (n, k) bool.
        same_background: (n, k) bool or None.
        names_wrong: (n, k) bool, the caption names the class that the model gave instead.

    Returns:
        One record per group: `names_class`, `same_background`, `names_wrong` (the last over the wrong photos only) as
        mean shares of the k neighbours, and per regime `num_images`, `share`, `accuracy` with Wilson's interval.
    """
    records = []
    for number, group in enumerate(photos.pair):
        ours = photos.second == bool(number)
        wrong = ours & (photos.rate < 1)
        record: dict[str, Any] = {
            "group": group,
            "num_images": int(ours.sum()),
            "names_class": float(names_class[ours].mean()),
            "same_background": None if same_background is None else float(same_background[ours].mean()),
            "names_wrong": float(names_wrong[wrong].mean()) if wrong.any() else None,
            "regimes": [],
        }
        for at, name in enumerate(REGIMES):
            rates = photos.rate[ours & (regime == at)]
            low, high = intervals.wilson(rates.sum(), np.array(len(rates)))
            record["regimes"].append(
                {
                    "regime": name,
                    "num_images": len(rates),
                    "share": len(rates) / int(ours.sum()),
                    "accuracy": float(rates.mean()) if len(rates) else None,
                    "low": float(low) if len(rates) else None,
                    "high": float(high) if len(rates) else None,
                }
            )
        records.append(record)
    return records


def more_common(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Does a class have more rows of one background than of another, beyond chance?

    Args:
        counts: (C, 2) rows of the first and of the second background.

    Returns:
        (C,) float64 two-sided exact binomial p-values against even odds (scipy), NaN without rows; and (C,) int64 +1
        where the first background is the more common one, -1 where the second is, 0 where it may be chance (Benjamini
        and Hochberg over the classes, at `FDR`).
    """
    counts = np.asarray(counts)
    p = np.array([stats.binomtest(int(a), int(a + b)).pvalue if a + b else np.nan for a, b in counts], np.float64)
    with np.errstate(invalid="ignore"):
        beyond = q_values(p) <= FDR  # NaN is not
    return p, np.where(beyond, np.sign(counts[:, 0] - counts[:, 1]), 0).astype(np.int64)


def prevalence(
    counts: np.ndarray, backgrounds: np.ndarray, drop_pp: np.ndarray, rng: np.random.Generator
) -> dict[str, Any]:
    """Relate how common the groups' backgrounds are in the pool to the classes' drops.

    Args:
        counts: (C, B) pool rows that name the class and show the background.
        backgrounds: (C, 2) positions of the first and the second group's background; -1 where it is not known.
        drop_pp: (C,) drops in points.
        rng: For the bootstrap over classes.

    Returns:
        `log_ratio` and `more_common` (C values each, None where unknown; of `more_common`), `num_classes`,
        `first_more_common` (count, rate and Wilson's interval of the classes whose first background is the more common
        one in the pool), `first_beyond_chance` and `second_beyond_chance` (classes where that is more than chance),
        `spearman` with `p` (scipy) and `interval` (bootstrap over classes; all None for fewer than 4 classes or
        without spread).
    """
    known = (backgrounds >= 0).all(axis=1) & (counts.sum(axis=1) > 0) & (backgrounds[:, 0] != backgrounds[:, 1])
    rows = np.nonzero(known)[0]
    first, second = (counts[rows, backgrounds[rows, side]] + SMOOTHING for side in (0, 1))
    ratio = np.log(first / second)
    _, sides = more_common(counts[rows[:, None], backgrounds[rows]])
    result: dict[str, Any] = {"log_ratio": [None] * len(counts), "more_common": [None] * len(counts),
                              "num_classes": len(rows), "first_more_common": None,
                              "first_beyond_chance": int((sides > 0).sum()),
                              "second_beyond_chance": int((sides < 0).sum()),
                              "spearman": None, "p": None, "interval": None}  # fmt: skip
    for row, value, side in zip(rows.tolist(), ratio.tolist(), sides.tolist(), strict=True):
        result["log_ratio"][row], result["more_common"][row] = value, side
    if len(rows):
        more = int((ratio > 0).sum())
        low, high = intervals.wilson(np.array(more), np.array(len(rows)))
        result["first_more_common"] = {"count": more, "rate": more / len(rows), "low": float(low), "high": float(high)}
    drops = drop_pp[rows]
    if len(rows) < 4 or np.ptp(ratio) == 0 or np.ptp(drops) == 0:
        return result
    found = stats.spearmanr(ratio, drops)
    result |= {"spearman": float(found.statistic), "p": float(found.pvalue)}
    drawn = []
    for picked in intervals.resample_classes(len(rows), CLASS_DRAWS, rng):
        if np.ptp(ratio[picked]) and np.ptp(drops[picked]):
            ranks = stats.rankdata(np.stack([ratio[picked], drops[picked]]), axis=1)
            drawn.append(np.corrcoef(ranks)[0, 1])
    result["interval"] = intervals.percentile_interval(np.array(drawn)).tolist()
    return result
