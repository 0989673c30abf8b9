"""How a group drop changes: between two ways of asking one model, and between two training sets.

Both comparisons are paired on the same photos, and over training sets on the same seeds as well: what is easy or hard,
lucky or unlucky for both sides cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from clipgap_ray.kernels import intervals, shift


def change(
    classes: Sequence[str],
    groups: Sequence[str],
    before: np.ndarray,
    after: np.ndarray,
    rng: np.random.Generator,
    pair: Sequence[str] = shift.PAIR,
    draws: int = 2000,
) -> dict[str, Any]:
    """Compare the drops of one model under two ways of asking (prompts, candidates) on the same photos.

    Paired: a photo is resampled with both outcomes, so that what both ways find easy or hard cancels.

    Args:
        classes: n class names.
        groups: n group names; photos of further groups are left out, and so are classes that lack one of the pair.
        before: (n,) bool, or float in [0, 1] (mean over seeds): correct, asked the first way.
        after: (n,) likewise, asked the second way, same photos in the same order.
        rng: For the bootstraps.
        pair: The group expected to be easy, then the hard one.
        draws: Bootstrap samples.

    Returns:
        `num_photos`; `drop_change_pp`, the balanced drop after minus before, with `interval_pp` over classes and
        photos and its standard error `se_pp`; `unbalanced_change_pp` with `unbalanced_interval_pp` over photos.

    Raises:
        ValueError: If a group is missing or no class has photos in both.
    """
    # Means over s seeds differ by multiples of 1 / s: a handful of values, so counts of them say everything.
    delta = np.round(np.asarray(after, np.float64) - np.asarray(before, np.float64), 9)
    values, value_at = np.unique(delta, return_inverse=True)
    counted = [shift.count(classes, groups, value_at == at) for at in range(len(values))]
    at = counted[0].columns(pair)
    totals = counted[0].totals[:, at]
    both = np.all(totals > 0, axis=1)
    if not both.any():
        raise ValueError(f"no class has photos in both {pair[0]!r} and {pair[1]!r}")
    totals = totals[both]
    counts = np.stack([one.hits[both][:, at] for one in counted], axis=-1)
    drawn = rng.multinomial(totals, counts / totals[..., None], size=(draws, *totals.shape)) @ values
    sums = counts @ values
    per_class = drawn / totals
    picked = intervals.resample_classes(len(totals), draws, rng)
    two_stage = np.take_along_axis(per_class, picked[:, :, None], axis=1).mean(axis=1)
    pooled = drawn.sum(axis=1) / totals.sum(axis=0)

    def drop_pp(sides: np.ndarray) -> np.ndarray:
        return 100 * (sides[..., 0] - sides[..., 1])

    return {
        "num_photos": int(totals.sum()),
        "drop_change_pp": float(drop_pp((sums / totals).mean(axis=0))),
        "interval_pp": intervals.percentile_interval(drop_pp(two_stage)).tolist(),
        "se_pp": float(drop_pp(two_stage).std(ddof=1)),
        "unbalanced_change_pp": float(drop_pp(sums.sum(axis=0) / totals.sum(axis=0))),
        "unbalanced_interval_pp": intervals.percentile_interval(drop_pp(pooled)).tolist(),
    }


def change_over_trainings(
    classes: Sequence[str],
    groups: Sequence[str],
    before: np.ndarray,
    after: np.ndarray,
    rng: np.random.Generator,
    pair: Sequence[str] = shift.PAIR,
    draws: int = 2000,
) -> dict[str, Any]:
    """Compare the drops of models of two training sets on the same photos, paired by seed.

    Besides photos and classes (`change`, on the means over seeds) the seeds are luck. A seed stands for the initial
    weights and the order of samples, so what is good or bad about it for both sets cancels; few are left to judge the
    rest by, hence Student's t with s - 1 degrees of freedom. The squares of both reaches are added, which is on the
    safe side, since the spread over seeds already holds a part of the photos' noise.

    Args:
        classes: n class names.
        groups: n group names.
        before: (s, n) bool, correct per seed and photo after training on the first set.
        after: (s, n) bool, likewise on the second, with the same seeds in the same order.
        rng: For the bootstraps.
        pair: The group expected to be easy, then the hard one.
        draws: Bootstrap samples.

    Returns:
        `num_photos`, `change_pp` (the second set's balanced drop minus the first's), `low_pp` and `high_pp` (95 %),
        `se_photos_pp` (over classes and photos), `se_seeds_pp` (None for one seed: then photos and classes only).

    Raises:
        ValueError: If the numbers of seeds differ, a group is missing or no class has photos in both.
    """
    num_seeds = len(before)
    if len(after) != num_seeds:
        raise ValueError(f"expected the same seeds on both sides: got {num_seeds} and {len(after)}")
    means = [np.asarray(side, np.float64).mean(axis=0) for side in (before, after)]
    found = change(classes, groups, means[0], means[1], rng, pair, draws)
    reach = stats.norm.ppf((1 + intervals.CONFIDENCE) / 2) * found["se_pp"]
    se_seeds = None
    if num_seeds > 1:
        drops = [
            [shift.balanced_drop_pp(shift.count(classes, groups, seed), pair) for seed in side]
            for side in (before, after)
        ]
        se_seeds = float(np.std(np.diff(drops, axis=0), ddof=1) / np.sqrt(num_seeds))
        reach = np.hypot(reach, stats.t.ppf((1 + intervals.CONFIDENCE) / 2, num_seeds - 1) * se_seeds)
    value = found["drop_change_pp"]
    return {
        "num_photos": found["num_photos"],
        "change_pp": value,
        "low_pp": value - float(reach),
        "high_pp": value + float(reach),
        "se_photos_pp": found["se_pp"],
        "se_seeds_pp": se_seeds,
    }
