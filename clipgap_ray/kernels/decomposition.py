"""How much of a drop between groups is distance from the training data? (counteranimal.md 7.3, item 2)

With m(g, s) the chance that a photo of group g and similarity s is right, the drop of a class falls into

    explained = 1/2 sum_g [E_{s ~ first} m(g, s) - E_{s ~ second} m(g, s)]      the groups lie at other distances
    residual  = 1/2 sum_h  E_{s ~ h} [m(first, s) - m(second, s)]               the groups differ at equal distance

which add up to the drop of the fit (both standardisations, averaged: neither group is the norm). m is the regression of
`spline_logit`; standardising a fitted curve does not leave the coarseness of bins behind, which explain a tenth too
little with five of them (7.3).
Similarity is a mediator and not a randomised treatment: "explained" is accounting and no proof of cause; the causal
arm is training on an equalised pool (`split equalise`).

Shapes: n photos, C classes, K knots. Intervals: bootstrap in two stages, classes, then photos within class and group.
Cost: one fit per draw, O(n + C^3) a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from clipgap_ray.kernels import intervals, overlap
from clipgap_ray.kernels.overlap import Photos
from clipgap_ray.kernels.spline_logit import Fit, curves, fit, place_knots

MIN_OVERLAP = 0.5
GOOD_OVERLAP = 0.8
FIT_TOLERANCE_PP = 1.0
MIN_PHOTOS = 20
MAX_FAILED_DRAWS = 0.05
SAMPLED = ("drop", "explained", "residual", "difference")


def standardise(photos: Photos, fitted: Fit, weights: np.ndarray | None = None) -> np.ndarray:
    """Split every class's drop.

    Args:
        photos: Whose similarities are averaged over.
        fitted: m.
        weights: (n,) float64, as in `fit`.

    Returns:
        (C, 2) float64 explained and residual drop as fractions; NaN where a group has no weight.
    """
    no, yes = np.zeros(len(photos.rate), bool), np.ones(len(photos.rate), bool)
    first = photos.cell_means(fitted.predict(photos.class_at, no, photos.similarity), weights)
    second = photos.cell_means(fitted.predict(photos.class_at, yes, photos.similarity), weights)
    explained = (first[:, 0] - first[:, 1] + second[:, 0] - second[:, 1]) / 2
    residual = (first[:, 0] - second[:, 0] + first[:, 1] - second[:, 1]) / 2
    return np.stack([explained, residual], axis=1)


# --- bootstrap -------------------------------------------------------------------------------------------


def resamples(photos: Photos, rng: np.random.Generator, draws: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Draw classes with replacement, then photos within each class and group.

    A class drawn twice counts twice and has twice as many photos drawn: the same mean of two independent halves.

    Yields:
        (C,) float64 how often each class was drawn and (n,) float64 how often each photo was.
    """
    order = np.argsort(photos.cell, kind="stable")
    sizes = np.bincount(photos.cell, minlength=2 * len(photos.classes))
    starts = np.cumsum(sizes) - sizes
    for _ in range(draws):
        copies = np.bincount(rng.integers(0, len(photos.classes), len(photos.classes)), minlength=len(photos.classes))
        repeats = np.repeat(copies, 2) * sizes
        picked = np.repeat(starts, repeats) + (rng.random(repeats.sum()) * np.repeat(sizes, repeats)).astype(np.int64)
        yield copies.astype(np.float64), np.bincount(order[picked], minlength=len(order)).astype(np.float64)


def _one_draw(photos: Photos, copies: np.ndarray, weights: np.ndarray, start: Fit | None) -> dict[str, float]:
    """The statistics of `SAMPLED` of one resample; without a fit to start from only what needs none."""
    drawn = copies > 0

    def over_classes(values: np.ndarray) -> float:
        return float(np.average(values[drawn], weights=copies[drawn]))

    rates, similarities = photos.cell_means(photos.rate, weights), photos.cell_means(photos.similarity, weights)
    result = {"drop": over_classes(rates[:, 0] - rates[:, 1])}
    result["difference"] = over_classes(similarities[:, 0] - similarities[:, 1])
    if start is not None:
        try:
            parts = standardise(photos, fit(photos, start.knots, weights, start), weights)
            result["explained"], result["residual"] = over_classes(parts[:, 0]), over_classes(parts[:, 1])
        except ValueError:
            result["explained"] = result["residual"] = float("nan")
    return result


def bootstrap(photos: Photos, fitted: Fit | None, rng: np.random.Generator, draws: int) -> dict[str, np.ndarray]:
    """Return (draws,) float64 samples of every statistic of `SAMPLED` (without a fit, of drop and difference).

    A draw whose regression does not converge is NaN in explained and residual.
    """
    found = [_one_draw(photos, copies, weights, fitted) for copies, weights in resamples(photos, rng, draws)]
    return {name: np.array([one[name] for one in found]) for name in SAMPLED if name in found[0]}


# --- everything about one model --------------------------------------------------------------------------


def summarise(
    photos: Photos,
    rng: np.random.Generator,
    draws: int = 200,
    min_overlap: float = MIN_OVERLAP,
    caliper: float = overlap.CALIPER,
) -> dict[str, Any]:
    """Return everything `clipgap join` says about one model.

    Args:
        photos: The photos.
        rng: For the bootstraps.
        draws: Bootstrap samples, one fit each.
        min_overlap: With a smaller share of either group's photos in the common support nothing is split.
        caliper: Of the matching, in standard deviations of s within class and group.

    Returns:
        JSON values: `balanced`, `drop`, `exposure`, `overlap`, `identified` and `why_not`, `decomposition` (None when
        not identified), `matched`, `binned`, `bins` and `curves` for the figure, `classes`, `warnings`.
    """
    shared = overlap.overlap(photos)
    why_not = _why_not(photos, shared, min_overlap)
    fitted: Fit | None = None
    if not why_not:
        try:
            fitted = fit(photos, place_knots(photos.similarity))
        except ValueError as error:
            why_not = str(error)
    samples = bootstrap(photos, fitted, rng, draws)
    failed = 0 if fitted is None else int(np.isnan(samples["explained"]).sum())
    if failed > MAX_FAILED_DRAWS * draws:
        fitted, why_not = None, f"the regression did not converge in {failed} of {draws} resamples: too few photos"
    rates = photos.cell_means(photos.rate)
    drop = float((rates[:, 0] - rates[:, 1]).mean())
    predicted = None if fitted is None else fitted.predict(photos.class_at, photos.second, photos.similarity)
    matched = overlap.matched_drop(photos, caliper, rng, draws, predicted)
    binned = overlap.kitagawa(photos)
    result: dict[str, Any] = {
        "groups": list(photos.pair),
        "num_images": dict(zip(photos.pair, [int((~photos.second).sum()), int(photos.second.sum())], strict=True)),
        "num_classes": len(photos.classes),
        "balanced": dict(zip(photos.pair, rates.mean(axis=0).tolist(), strict=True)),
        "drop": {"drop_pp": 100 * drop, "interval_pp": _interval_pp(samples["drop"])},
        "exposure": {
            **overlap.exposure(photos),
            "interval": intervals.percentile_interval(samples["difference"]).tolist(),
        },
        "overlap": shared,
        "identified": fitted is not None,
        "why_not": why_not,
        "decomposition": None if fitted is None else _decomposition(photos, fitted, samples, drop),
        "matched": matched,
        "binned": {"explained_pp": 100 * binned[0], "residual_pp": 100 * binned[1]},
        "bins": overlap.shown_bins(photos),
        "curves": [] if fitted is None else curves(photos, fitted),
        "classes": _class_records(photos, fitted),
        "draws": draws,
        "failed_draws": failed,
    }
    result["warnings"] = _warnings(result)
    return result


def _why_not(photos: Photos, shared: dict[str, Any], min_overlap: float) -> str:
    if len(photos.rate) < MIN_PHOTOS:
        return f"{len(photos.rate)} photos: fewer than {MIN_PHOTOS} carry no regression"
    if shared["smallest"] < min_overlap:
        group = min(shared["per_group"], key=shared["per_group"].get)
        return (
            f"only {shared['smallest']:.0%} of the {group} photos lie in the common support of their class "
            f"(at least {min_overlap:.0%} needed): the groups cannot be compared at equal similarity"
        )
    return ""


def _decomposition(photos: Photos, fitted: Fit, samples: dict[str, np.ndarray], drop: float) -> dict[str, Any]:
    explained, residual = standardise(photos, fitted).mean(axis=0)
    interval = intervals.percentile_interval(samples["drop"])
    # A share of a drop that may be 0 is a division by noise.
    clear = bool(interval[0] > 0 or interval[1] < 0)
    return {
        "explained_pp": 100 * float(explained),
        "explained_interval_pp": _interval_pp(samples["explained"]),
        "residual_pp": 100 * float(residual),
        "residual_interval_pp": _interval_pp(samples["residual"]),
        "share": float(explained) / drop if clear else None,
        "share_interval": intervals.percentile_interval(_known(samples["explained"] / samples["drop"])).tolist()
        if clear and (samples["drop"] != 0).all()
        else None,
        "fit_error_pp": 100 * (float(explained + residual) - drop),
        "knots": fitted.knots.tolist(),
        "group_log_odds": float(fitted.coefficients[len(photos.classes)]),
    }


def _class_records(photos: Photos, fitted: Fit | None) -> list[dict[str, Any]]:
    """One record per class: counts, accuracies, mean similarities, AUC, overlap, and its parts of the drop."""
    counts = np.bincount(photos.cell, minlength=2 * len(photos.classes)).reshape(-1, 2)
    rates, means = photos.cell_means(photos.rate), photos.cell_means(photos.similarity)
    inside = np.bincount(photos.class_at, overlap.supported(photos), len(photos.classes)) / counts.sum(axis=1)
    auc = overlap.class_auc(photos)
    parts = None if fitted is None else 100 * standardise(photos, fitted)
    records = []
    for row, name in enumerate(photos.classes):
        record: dict[str, Any] = {"class_name": name}
        for column, group in enumerate(photos.pair):
            record |= {
                f"{group}_n": int(counts[row, column]),
                f"{group}_accuracy": float(rates[row, column]),
                f"{group}_similarity": float(means[row, column]),
            }
        record |= {"drop_pp": 100 * float(rates[row, 0] - rates[row, 1]), "overlap": float(inside[row])}
        record |= {"difference": float(means[row, 0] - means[row, 1]), "auc": float(auc[row])}
        record["explained_pp"] = None if parts is None else float(parts[row, 0])
        record["residual_pp"] = None if parts is None else float(parts[row, 1])
        records.append(record)
    return records


def _warnings(result: dict[str, Any]) -> list[str]:
    found = [result["why_not"]] if result["why_not"] else []
    if result["decomposition"] is None:
        return found
    share, error = result["overlap"]["smallest"], result["decomposition"]["fit_error_pp"]
    if share < GOOD_OVERLAP:
        found.append(f"only {share:.0%} of a group's photos lie in the common support: the rest leans on the model")
    if abs(error) > FIT_TOLERANCE_PP:
        found.append(f"explained + residual miss the drop by {error:+.1f} points: the classes' drops differ too much")
    if result["decomposition"]["share"] is None:
        found.append("the interval of the drop contains 0: there is no share of it to speak of")
    return found


def _interval_pp(samples: np.ndarray) -> list[float]:
    return (100 * intervals.percentile_interval(_known(samples))).tolist()


def _known(samples: np.ndarray) -> np.ndarray:
    return samples[np.isfinite(samples)]
