"""What an audit says about one test set: duplicates, positive control, gap, verdict, accuracy on the clean part."""

from __future__ import annotations

from typing import Any

import numpy as np

from clipgap_ray.kernels import intervals

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


def duplicated(similarity: np.ndarray, exact: np.ndarray, bits: np.ndarray | None, limit: float,
               hash_bits: int) -> np.ndarray:  # fmt: skip
    """Return (n,) bool: the test image has equal bytes, s >= limit, or a hash within `hash_bits` in the pool."""
    found = exact | (similarity >= limit)
    return found if bits is None else found | (bits <= hash_bits)


def duplicates(
    similarity: np.ndarray,
    exact: np.ndarray,
    bits: np.ndarray | None,
    near: tuple[float, ...],
    limit: float,
    hash_bits: int,
) -> dict[str, Any]:
    """Count test images that have a copy in the pool.

    Args:
        similarity: (n,) float64 to the nearest pool image.
        exact: (n,) bool, the same bytes (sha256) occur in the pool.
        bits: (n,) int64 bits in which the perceptual hash differs from the nearest of the pool; None without hashes.
        near: Similarities at which near duplicates are counted.
        limit: Similarity from which an image counts as duplicated.
        hash_bits: Likewise, at most so many bits.

    Returns:
        `exact`, `near` (one entry per similarity), `hash` (None without hashes) and `duplicated` (any of bytes, limit
        and hash), each with Wilson's interval.
    """
    found = duplicated(similarity, exact, bits, limit, hash_bits)
    return {
        "exact": rate(exact),
        "near": [{"similarity": value, **rate(similarity >= value)} for value in sorted(near)],
        "hash": None if bits is None else {"bits": hash_bits, **rate(bits <= hash_bits)},
        "duplicated": {"similarity": limit, "hash_bits": None if bits is None else hash_bits, **rate(found)},
    }


def control(
    similarity: dict[str, np.ndarray],
    bits: dict[str, np.ndarray] | None,
    unrelated: np.ndarray,
    near: tuple[float, ...],
    limit: float,
    hash_bits: int,
) -> dict[str, Any]:
    """Say which altered copies the audit would have found (the positive control), and what it finds without any.

    Args:
        similarity: Per alteration (n,) float64 of a copy to its original.
        bits: Per alteration (n,) int64 bits of the perceptual hash; None when the audit has no hashes.
        unrelated: (m,) float64 of every test image to the nearest other test image, equal bytes left out.
        near: Similarities to show.
        limit: The audit's.
        hash_bits: The audit's.

    Returns:
        `alterations` (per alteration `near`, `hash` and `found` = limit or hash, with Wilson's intervals), `recall`
        (mean of `found`, every alteration alike), `weakest`, and `unrelated`: the share of test images with another
        test image that near. That share is what these similarities find where nothing was copied.
    """
    records = []
    for name, values in similarity.items():
        own = None if bits is None else bits[name]
        none = np.zeros(len(values), bool)
        counted = duplicates(values, none, own, near, limit, hash_bits)
        records.append({"name": name, "median_similarity": float(np.median(values)), "near": counted["near"],
                        "hash": counted["hash"], "found": counted["duplicated"]})  # fmt: skip
    weakest = min(records, key=lambda record: record["found"]["rate"])
    return {
        "num_images": len(next(iter(similarity.values()))),
        "similarity": limit,
        "recall": float(np.mean([record["found"]["rate"] for record in records])),
        "weakest": {"name": weakest["name"], "recall": weakest["found"]["rate"]},
        "alterations": records,
        "unrelated": [{"similarity": v, **rate(unrelated >= v)} for v in sorted({*near, limit})] if len(unrelated)
        else [],
    }  # fmt: skip


def rate(hit: np.ndarray) -> dict[str, Any]:
    """Return count and rate of (n,) bool with Wilson's 95 % interval."""
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
        result |= {"reference": _percentiles(tau), "closer_to_pool": rate(similarity > tau)}
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
    result: dict[str, Any] = {n: rate(correct[p]) | {"num_images": int(p.sum())} if p.any() else None
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
        unexamined: Pool rows and test images that were not looked at.
        recall: A measured recall {"recall", "similarity"} of altered copies; it counts for this limit only.
    """
    if num_duplicated:
        return "CONTAMINATED"
    if unexamined:
        return "INCOMPLETE"
    if recall is not None and recall["similarity"] >= limit:
        return f"CLEAN AT RECALL {recall['recall']:.3g}"
    return f"NO DUPLICATES FOUND AT SIMILARITY >= {limit:g}"
