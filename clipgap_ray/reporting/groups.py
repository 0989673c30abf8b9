"""Which groups a test set has, which of them is the base, and which are compared.

The base is the group that the settings name first; without settings `common` where there are `common` and `counter`,
and else the group of most photos. Every other group is compared with the base; analyses that compare two groups only
(the join with similarity, ways of asking) take the one that the first CLIP drops most on, among those that share half
of the base's classes or more: a drop on one class is no drop of the test set.
"""

from __future__ import annotations

import functools
from collections import Counter

import numpy as np

from clipgap_ray.errors import ConfigError
from clipgap_ray.kernels import shift
from clipgap_ray.reporting.study import Study
from clipgap_ray.reporting.tables import Arm, arms, outcomes


def ordered(names: list[str], first: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Order the groups of n photos: those of `first`, then common and counter, then by number of photos.

    Args:
        names: n groups; "" is a photo of none.
        first: Groups that the settings name, the base first.

    Returns:
        The groups that there are; fewer than two are none, so ().

    Raises:
        ConfigError: If the settings name a group that no photo has.
    """
    counts = Counter(name for name in names if name)
    if len(counts) < 2:
        return ()
    missing = [name for name in first if name not in counts]
    if missing:
        raise ConfigError(f"no photo is of the group {missing[0]!r}; groups are {sorted(counts)}")
    known = [*first, *(shift.PAIR if set(shift.PAIR) <= set(counts) else ())]
    by_size = sorted(counts, key=lambda name: (-counts[name], name))
    return tuple(dict.fromkeys([*known, *by_size]))


@functools.cache
def of_test(study: Study, test: str) -> tuple[str, ...]:
    """Return the groups of a test set by the predictions, the base first; () where there are fewer than two.

    Raises:
        ConfigError: If the settings name a group that no photo has.
    """
    found = next((p for run in study.runs if (p := study.predictions(run.name, test)) is not None), None)
    if found is None:
        return ()
    try:
        return ordered(found.groups, study.groups.get(test, ()))
    except ConfigError as error:
        raise ConfigError(f"{test}: {error.message}", hint="see --groups") from None


def counted(study: Study, arm: Arm, test: str) -> tuple[shift.GroupCounts, int] | None:
    """Count an arm's photos of every group, and its seeds; None without predictions. Photos of no group are left out.

    Seeds share the photos: their mean hits keep n the number of photos, and so the intervals honest.

    Raises:
        DataError: If the seeds share no photo.
    """
    found = outcomes(study, arm, test)
    if found is None:
        return None
    predictions, right = found
    kept = np.nonzero(np.array(predictions.groups) != "")[0]
    classes, names = ([values[i] for i in kept] for values in (predictions.classes, predictions.groups))
    return shift.count(classes, names, right.mean(axis=0)[kept]), len(right)


def comparable(counts: shift.GroupCounts, pair: tuple[str, str]) -> bool:
    """Return whether a class has photos of both groups."""
    if not set(pair) <= set(counts.groups):
        return False
    return bool((counts.totals[:, counts.columns(pair)] > 0).all(axis=1).any())


@functools.cache
def compared(study: Study, test: str) -> tuple[str, str] | None:
    """Return the base and the group that the first CLIP (or else the first model) drops most on; None without groups.

    Drops are balanced over the classes that have photos of both. Groups that share less than half of the base's classes
    are taken only where all do; those that share none, never.
    """
    base, *others = of_test(study, test) or ("",)
    for arm in sorted(arms(study), key=lambda arm: arm.supervised) if others else []:
        found = counted(study, arm, test)
        if found is None:
            continue
        drops = {}
        for other in others:
            if comparable(found[0], (base, other)):
                drops[other] = shift.class_drops(found[0], (base, other))[0]
        num_classes = int((found[0].totals[:, found[0].columns([base])] > 0).sum()) if drops else 0
        wide = {other: own for other, own in drops.items() if 2 * np.isfinite(own).sum() >= num_classes}
        if drops:
            return base, max(wide or drops, key=lambda other: float(np.nanmean(drops[other])))
    return None
