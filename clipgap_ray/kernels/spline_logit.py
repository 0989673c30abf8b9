"""m(g, s): the chance that a photo of group g and similarity s is right, by logistic regression (counteranimal.md 7.3).

An effect of every class, one of the group and a natural cubic spline in s. What `decomposition` standardises.

Shapes: n photos, C classes, K knots. Cost: O(n + C^3) a Newton step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.optimize import minimize
from scipy.special import expit

from clipgap_ray.kernels.overlap import Photos

NUM_KNOTS = 4
CURVE_POINTS = 60
GRADIENT_TOLERANCE = 1e-8
GOOD_GRADIENT = 1e-6
MAX_STEPS = 1000
# Few photos are often separated by class, group and similarity: the likelihood then grows along some direction forever,
# and the iteration with it. This much of a ridge ends it and moves no coefficient by more than 1e-4 elsewhere.
RIDGE = 1e-11


@dataclass(frozen=True)
class Fit:
    """logit m = class effect + group effect [second group] + spline(s).

    Attributes:
        knots: (K,) float64, from the smallest to the largest s.
        coefficients: (C + K,) float64: class effects, group effect, spline values at knots 2..K relative to the first.
    """

    knots: np.ndarray
    coefficients: np.ndarray

    def predict(self, class_at: np.ndarray, second: np.ndarray, similarity: np.ndarray) -> np.ndarray:
        """Return the (n,) float64 chance of being right for (n,) classes, groups (bool) and similarities."""
        num_classes = len(self.coefficients) - len(self.knots)
        effects, group, spline = np.split(self.coefficients, [num_classes, num_classes + 1])
        return expit(effects[class_at] + group[0] * second + spline_columns(similarity, self.knots) @ spline)


def spline_columns(similarity: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """Return the (n, K - 1) float64 cardinal basis of the natural cubic spline through (K,) knots, its first left out.

    The left-out column is the level at the first knot, which the class effects carry.
    """
    return np.asarray(CubicSpline(knots, np.eye(len(knots)), bc_type="natural")(similarity)[:, 1:])


def place_knots(similarity: np.ndarray, count: int = NUM_KNOTS) -> np.ndarray:
    """Return (K,) float64 knots at even quantiles of (n,) similarities, ends included; fewer where values repeat.

    Raises:
        ValueError: If all similarities are equal.
    """
    knots = np.unique(np.quantile(similarity, np.linspace(0, 1, count)))
    if len(knots) < 2:
        raise ValueError("all photos have the same similarity")
    return knots


def fit(photos: Photos, knots: np.ndarray, weights: np.ndarray | None = None, start: Fit | None = None) -> Fit:
    """Fit m by maximum likelihood: Newton steps in a trust region (scipy), on the sums that class effects reduce to.

    It is statsmodels' binomial GLM, which is its twin in the tests and a hundred times slower with 45 classes as
    dense columns. A class whose photos are all right or all wrong has an infinite effect; the iteration ends with one
    so large that its predictions are 1 or 0, which is the limit of the likelihood.

    Args:
        photos: The photos; rates between 0 and 1 (means over seeds) enter as such.
        knots: (K,) float64.
        weights: (n,) float64 how often every photo counts; default once. Classes without weight keep their start.
        start: Coefficients to start from.

    Raises:
        ValueError: If the likelihood has no usable maximum.
    """
    weights = np.ones(len(photos.rate)) if weights is None else weights
    likelihood = _Likelihood(
        photos, np.column_stack([photos.second, spline_columns(photos.similarity, knots)]), weights
    )
    origin = np.zeros(len(photos.classes) + len(knots)) if start is None else start.coefficients
    with np.errstate(over="ignore"):
        found = minimize(
            likelihood.value, origin, jac=likelihood.gradient, hess=likelihood.hessian, method="trust-ncg",
            options={"gtol": GRADIENT_TOLERANCE, "initial_trust_radius": 10.0, "max_trust_radius": 1000.0,
                     "maxiter": MAX_STEPS},
        )  # fmt: skip
    # The gradient is by how much fitted and observed rates differ, in all, per class and group.
    settled = found.success or np.abs(found.jac).max() < GOOD_GRADIENT
    if not np.isfinite(found.x).all() or not settled:
        raise ValueError(f"the logistic regression did not converge: {found.message}")
    return Fit(knots, found.x)


class _Likelihood:
    """Mean negative log-likelihood of class effects + (n, q) columns, and its derivatives, in O(n q^2 + C q)."""

    def __init__(self, photos: Photos, columns: np.ndarray, weights: np.ndarray) -> None:
        self.rate, self.class_at, self.columns = photos.rate, photos.class_at, columns
        self.weights, self.num_classes = weights / weights.sum(), len(photos.classes)

    def _logits(self, at: np.ndarray) -> np.ndarray:
        return np.asarray(at[self.class_at] + self.columns @ at[self.num_classes :])

    def value(self, at: np.ndarray) -> float:
        logits = self._logits(at)
        return float(self.weights @ (np.logaddexp(0, logits) - self.rate * logits) + RIDGE / 2 * at @ at)

    def gradient(self, at: np.ndarray) -> np.ndarray:
        off = self.weights * (expit(self._logits(at)) - self.rate)
        return np.concatenate([np.bincount(self.class_at, off, self.num_classes), self.columns.T @ off]) + RIDGE * at

    def hessian(self, at: np.ndarray) -> np.ndarray:
        rate = expit(self._logits(at))
        curvature = self.weights * rate * (1 - rate)
        weighted = self.columns * curvature[:, None]
        corner = [np.bincount(self.class_at, column, self.num_classes) for column in weighted.T]
        matrix = np.diag(
            np.concatenate([np.bincount(self.class_at, curvature, self.num_classes), np.zeros(len(corner))])
        )
        matrix[: self.num_classes, self.num_classes :] = np.stack(corner, axis=1)
        matrix[self.num_classes :, : self.num_classes] = np.stack(corner)
        matrix[self.num_classes :, self.num_classes :] = self.columns.T @ weighted
        matrix[np.diag_indices(len(matrix))] += RIDGE
        return matrix


def curves(photos: Photos, fitted: Fit, points: int = CURVE_POINTS) -> list[dict[str, Any]]:
    """Return m averaged over classes along s for each group: records of group, similarity, accuracy."""
    low, high = np.quantile(photos.similarity, [0.005, 0.995]).tolist()
    similarity = np.linspace(low, high, points)
    num_classes = len(photos.classes)
    at, values = np.tile(np.arange(num_classes), points), np.repeat(similarity, num_classes)
    records = []
    for number, group in enumerate(photos.pair):
        rate = fitted.predict(at, np.full(len(at), bool(number)), values).reshape(points, num_classes).mean(axis=1)
        pairs = zip(similarity.tolist(), rate.tolist(), strict=True)
        records += [{"group": group, "similarity": s, "accuracy": r} for s, r in pairs]
    return records
