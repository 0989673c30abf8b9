"""Zero-shot labels that may abstain, and how far two labellings agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from statsmodels.stats.inter_rater import cohens_kappa

from clipgap_ray.kernels import intervals
from clipgap_ray.kernels.vectors import normalise

ABSTAINED = -1


@dataclass(frozen=True)
class Labels:
    """Per image: `label` (n,) int64 of the best attribute or ABSTAINED, `runner_up` (n,) int64, `score` (n,) float32
    similarity to the best, `margin` (n,) float32 by how much it beats the runner-up; `best` (n,) int64 without regard
    to the margin."""

    label: np.ndarray
    best: np.ndarray
    runner_up: np.ndarray
    score: np.ndarray
    margin: np.ndarray


def prompt_weights(text_rows: np.ndarray, counts: list[int]) -> np.ndarray:
    """Ensemble prompts: the mean of each attribute's unit prompt rows, renormalised.

    Args:
        text_rows: (sum of counts, d) float32 unit rows, the prompts of an attribute together.
        counts: Prompts of every attribute.

    Returns:
        (len(counts), d) float32 unit rows.
    """
    ends = np.cumsum(counts)[:-1]
    return normalise(np.stack([rows.mean(axis=0) for rows in np.split(text_rows, ends)]))


def label(rows: np.ndarray, weights: np.ndarray, margin: float) -> Labels:
    """Label images by their most similar attribute.

    Args:
        rows: (n, d) unit rows; n may be 0.
        weights: (a, d) unit rows of a >= 2 attributes.
        margin: Abstain where the two best differ by less.
    """
    scores = rows.astype(np.float32) @ weights.T.astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :2]
    best, second = np.take_along_axis(scores, order, 1).T if len(rows) else np.zeros((2, 0), np.float32)
    ahead = (best - second).astype(np.float32)
    first = order[:, 0].astype(np.int64)
    return Labels(np.where(ahead >= margin, first, ABSTAINED), first, order[:, 1].astype(np.int64), best, ahead)


def agreement(given: list[str], found: list[str | None], names: list[str]) -> dict[str, Any]:
    """Compare two labellings of n images.

    Args:
        given: n labels that are known.
        found: n labels, None where the labeller abstained.
        names: The labeller's attributes.

    Returns:
        `num_images`, `num_abstained`, `num_unknown` (given labels that the labeller does not have; left out of the
        rest), `agree` (count, rate and Wilson's interval among those labelled), `kappa` (Cohen's, statsmodels; None for
        fewer than two labels in use) and `confusion`: records given, found, count ("" = abstained).
    """
    known = [(a, b) for a, b in zip(given, found, strict=True) if a in names]
    labelled = [(a, b) for a, b in known if b is not None]
    pairs: dict[tuple[str, str], int] = {}
    for a, b in zip(given, found, strict=True):
        pairs[a, b or ""] = pairs.get((a, b or ""), 0) + 1
    result: dict[str, Any] = {
        "num_images": len(given),
        "num_abstained": sum(b is None for b in found),
        "num_unknown": len(given) - len(known),
        "unknown": sorted(set(given) - set(names)),
        "agree": None,
        "kappa": None,
        "confusion": [{"given": a, "found": b, "count": n} for (a, b), n in sorted(pairs.items())],
    }
    if not labelled:
        return result
    hits = sum(a == b for a, b in labelled)
    low, high = intervals.wilson(np.array(hits), np.array(len(labelled)))
    result["agree"] = {"count": hits, "of": len(labelled), "rate": hits / len(labelled), "low": float(low),
                       "high": float(high)}  # fmt: skip
    used = sorted({word for pair in labelled for word in pair})
    if len(used) > 1:
        table = np.zeros((len(used), len(used)))
        for a, b in labelled:
            table[used.index(a), used.index(b)] += 1
        result["kappa"] = float(cohens_kappa(table).kappa)
    return result
