"""What an audit says about one test set: duplicates, gap, coverage, verdict, accuracy on the clean part. Arrays in."""

from __future__ import annotations

from typing import Any

import numpy as np

from clipgap_ray.kernels import intervals

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


def duplicates(similarity: np.ndarray, exact: np.ndarray, near: tuple[float, ...], limit: float) -> dict[str, Any]:
    """Count test images that have a copy in the pool.

    Args:
        similarity: (n,) float64 to the nearest pool image.
        exact: (n,) bool, the same bytes (sha256) occur in the pool.
        near: Similarities at which near duplicates are counted.
        limit: Similarity from which an image counts as duplicated.

    Returns:
        `exact`, `near` (one entry per similarity) and `duplicated` (exact or s >= limit), each with Wilson's interval.
    """
    return {
        "exact": _rate(exact),
        "near": [{"similarity": value, **_rate(similarity >= value)} for value in sorted(near)],
        "duplicated": {"similarity": limit, **_rate(exact | (similarity >= limit))},
    }


def _rate(hit: np.ndarray) -> dict[str, Any]:
    low, high = intervals.wilson(np.array(hit.sum()), np.array(len(hit)))
    return {"count": int(hit.sum()), "rate": float(hit.mean()), "low": float(low), "high": float(high)}


def gap(similarity: np.ndarray, tau: np.ndarray | None) -> dict[str, Any]:
    """Return percentiles of the gap to the pool and, with thresholds, to the reference, and who is closer.

    Args:
        similarity: (n,) float64 to the nearest pool image.
        tau: (n,) float64 to the nearest reference image, or None.
    """
    result: dict[str, Any] = {"pool": _percentiles(similarity), "reference": None, "closer_to_pool": None}
    if tau is not None:
        result |= {"reference": _percentiles(tau), "closer_to_pool": _rate(similarity > tau)}
    return result


def _percentiles(values: np.ndarray) -> dict[str, float]:
    return {str(p): float(v) for p, v in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


def clean_accuracy(correct: np.ndarray, duplicated: np.ndarray, draws: int, rng: np.random.Generator) -> dict[str, Any]:
    """Compare accuracy on the clean part with the whole.

    Args:
        correct: (n,) bool.
        duplicated: (n,) bool.
        draws: Bootstrap samples over images (a multinomial over the four cells, which is the same).
        rng: Source of randomness.

    Returns:
        `whole`, `clean`, `duplicated` with Wilson's intervals (None for an empty part) and `whole_minus_clean_pp`.
    """
    parts = {"whole": np.ones(len(correct), bool), "clean": ~duplicated, "duplicated": duplicated}
    result: dict[str, Any] = {n: _rate(correct[p]) | {"num_images": int(p.sum())} if p.any() else None
                              for n, p in parts.items()}  # fmt: skip
    if result["clean"] is None:
        return {**result, "whole_minus_clean_pp": None, "interval_pp": None}
    cells = np.array([(correct[part] == value).sum() for part in (~duplicated, duplicated) for value in (True, False)])
    drawn = rng.multinomial(len(correct), cells / len(correct), size=draws)
    clean = drawn[:, 0] / np.maximum(drawn[:, 0] + drawn[:, 1], 1)
    difference = (drawn[:, 0] + drawn[:, 2]) / len(correct) - clean
    value = result["whole"]["rate"] - result["clean"]["rate"]
    ends = (100 * intervals.percentile_interval(difference)).tolist()
    return {**result, "whole_minus_clean_pp": 100 * value, "interval_pp": ends}


def verdict(num_duplicated: int, limit: float, unexamined: int, recall: dict[str, float] | None) -> str:
    """Say what was found, and never more than was looked for: there is no bare "clean".

    Args:
        num_duplicated: Duplicated test images.
        limit: Similarity from which they count.
        unexamined: Pool rows that were not looked at.
        recall: A measured recall {"recall", "similarity"} of altered copies; it counts for this limit only.
    """
    if num_duplicated:
        return "CONTAMINATED"
    if unexamined:
        return "INCOMPLETE"
    if recall is not None and recall["similarity"] >= limit:
        return f"CLEAN AT RECALL {recall['recall']:.3g}"
    return f"NO DUPLICATES FOUND AT SIMILARITY >= {limit:g}"
