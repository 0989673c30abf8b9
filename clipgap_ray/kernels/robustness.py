"""Effective robustness: how far models lie above the line that a family of baselines draws.

Accuracy on a shifted set against accuracy on the usual one is nearly straight on probit axes (Taori et al. 2020);
a model's effective robustness is the distance, in percentage points, to the line of the baselines at its own x.
Both papers use it: 2310.09562 reads ~14 % on Sketch off the line of ImageNet models (1.7), 2403.11497 plots common
against counter (section 3). Ordinary least squares by statsmodels; accuracies are fractions throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import statsmodels.api as sm
from scipy import special

Axes = Literal["probit", "logit", "linear"]
AXES: tuple[Axes, ...] = ("probit", "logit", "linear")
CLIP_AT = 1e-3  # without counts 0 and 1 become 0.1 and 99.9 %: the ends of the axes that papers print


def to_axis(values: np.ndarray, axes: Axes) -> np.ndarray:
    """Map (n,) float64 fractions onto an axis: Phi^-1 (probit), log-odds (logit) or themselves (linear)."""
    values = np.asarray(values, np.float64)
    if axes == "probit":
        return special.ndtri(values)
    return special.logit(values) if axes == "logit" else values


def from_axis(values: np.ndarray, axes: Axes) -> np.ndarray:
    """Invert `to_axis` for (n,) float64 values; linear predictions are not clipped to [0, 1]."""
    values = np.asarray(values, np.float64)
    if axes == "probit":
        return special.ndtr(values)
    return special.expit(values) if axes == "logit" else values


def as_fractions(values: np.ndarray) -> tuple[np.ndarray, Literal["percent", "fraction"]]:
    """Read accuracies that may be percent or fractions: anything above 1 makes the whole array percent.

    Args:
        values: (...) float64. Pass all columns of one table together: a column of 0.4, 0.9 (percent!) alone is
            indistinguishable from fractions.

    Returns:
        (...) float64 fractions, and which unit was found.

    Raises:
        ValueError: If a value is NaN, below 0 or above 100.
    """
    values = np.asarray(values, np.float64)
    if np.isnan(values).any() or (values < 0).any() or (values > 100).any():
        raise ValueError(f"accuracies must lie in [0, 1] or [0, 100]: got {values.min():g} to {values.max():g}")
    if (values > 1).any():
        return values / 100, "percent"
    return values, "fraction"


def pull_inside(values: np.ndarray, totals: np.ndarray | None, axes: Axes) -> tuple[np.ndarray, np.ndarray]:
    """Move accuracies of exactly 0 and 1, which have no place on probit and logit axes, inside.

    Args:
        values: (n,) float64 fractions.
        totals: (n,) photos behind each, or None when unknown. With counts h of n becomes (h + 1/2) / (n + 1),
            without them the value is clipped to [CLIP_AT, 1 - CLIP_AT].
        axes: On linear axes nothing moves.

    Returns:
        (n,) float64 fractions inside (0, 1), and (n,) bool: which ones moved.
    """
    values = np.asarray(values, np.float64)
    if axes == "linear":
        return values, np.zeros(values.shape, bool)
    if totals is None:
        inside = np.clip(values, CLIP_AT, 1 - CLIP_AT)
        return inside, inside != values
    extreme = (values <= 0) | (values >= 1)
    return np.where(extreme, (values * totals + 0.5) / (np.asarray(totals) + 1.0), values), extreme


@dataclass(frozen=True)
class Line:
    """A fitted line to_axis(y) = slope * to_axis(x) + intercept.

    Attributes:
        slope: Slope on the axes.
        intercept: Intercept on the axes.
        r2: Share of variance explained on the axes; NaN with two points.
        slope_interval: 95 % interval, infinite with two points.
        intercept_interval: Likewise.
        axes: The axes.
        x_range: Smallest and largest baseline accuracy; beyond it a prediction extrapolates.
        num_points: Baselines.
        design: (n, 2) float64 and (n,) float64 on the axes, for the band.
    """

    slope: float
    intercept: float
    r2: float
    slope_interval: tuple[float, float]
    intercept_interval: tuple[float, float]
    axes: Axes
    x_range: tuple[float, float]
    num_points: int
    design: tuple[np.ndarray, np.ndarray]

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Return the accuracy that a baseline of accuracy x would have; (n,) fractions in and out."""
        return from_axis(self.slope * to_axis(x, self.axes) + self.intercept, self.axes)

    def band(self, x: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the confidence band of the line at (n,) fractions x; None with fewer than three baselines."""
        if self.num_points < 3:
            return None
        fit = sm.OLS(self.design[1], self.design[0]).fit()
        at = sm.add_constant(to_axis(x, self.axes), has_constant="add")
        low, high = fit.get_prediction(at).conf_int(alpha=1 - confidence).T
        return from_axis(low, self.axes), from_axis(high, self.axes)

    def extrapolates(self, x: np.ndarray) -> np.ndarray:
        """Return (n,) bool: x lies outside the baselines."""
        return (np.asarray(x) < self.x_range[0]) | (np.asarray(x) > self.x_range[1])


def fit(x: np.ndarray, y: np.ndarray, axes: Axes = "probit") -> Line:
    """Fit the baselines' line by ordinary least squares on the axes.

    Args:
        x: (n,) float64 fractions inside (0, 1), accuracy on the usual set.
        y: (n,) float64 fractions, accuracy on the shifted set.
        axes: Where the line is straight.

    Raises:
        ValueError: With fewer than two distinct x, or values that the axes cannot show.
    """
    points_x, points_y = to_axis(x, axes), to_axis(y, axes)
    if not (np.isfinite(points_x).all() and np.isfinite(points_y).all()):
        raise ValueError(f"0 and 100 % have no place on {axes} axes: call pull_inside first")
    if len(np.unique(points_x)) < 2:
        raise ValueError(f"a line needs at least two baselines of different accuracy, got {len(np.unique(points_x))}")
    design = sm.add_constant(points_x, has_constant="add")
    intervals = np.array([[-np.inf, np.inf], [-np.inf, np.inf]])
    if len(points_x) > 2:
        result = sm.OLS(points_y, design).fit()
        (intercept, slope), r2, intervals = result.params, float(result.rsquared), result.conf_int()
    else:  # no degrees of freedom are left to estimate an error with
        slope = (points_y[1] - points_y[0]) / (points_x[1] - points_x[0])
        intercept, r2 = points_y[0] - slope * points_x[0], float("nan")
    bounds = (float(np.min(x)), float(np.max(x)))
    low, high = ((float(a), float(b)) for a, b in intervals)
    return Line(float(slope), float(intercept), r2, high, low, axes, bounds, len(points_x), (design, points_y))


def residuals_pp(line: Line, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return every model's effective robustness, y minus the line at its x, in percentage points; (n,) float64."""
    return 100 * (np.asarray(y, np.float64) - line.predict(x))


def leave_one_out(
    x: np.ndarray, y: np.ndarray, axes: Axes = "probit", names: Sequence[str] | None = None
) -> list[tuple[Line | None, float]]:
    """Fit the line without each baseline in turn: does one model carry it?

    Args:
        x: (b,) accuracies of the baselines on the usual set.
        y: (b,) likewise on the shifted set.
        axes: Where the line is straight.
        names: b names; seeds of one model share theirs and are left out together. None: every baseline by itself.

    Returns:
        For every baseline, or name in order, the line of the others and its own (mean) residual from that line in
        points; (None, NaN) where the others do not make a line.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    own = np.arange(len(x)) if names is None else np.array([list(dict.fromkeys(names)).index(n) for n in names], int)
    result: list[tuple[Line | None, float]] = []
    for left_out in range(own.max(initial=-1) + 1):
        others = own != left_out
        if len(np.unique(x[others])) < 2:
            result.append((None, float("nan")))
            continue
        line = fit(x[others], y[others], axes)
        result.append((line, float(residuals_pp(line, x[~others], y[~others]).mean())))
    return result


def residual_range_pp(lines: Sequence[Line], x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and the largest residual of (n,) models over several lines: two (n,) float64 in points.

    Raises:
        ValueError: Without a line.
    """
    if not lines:
        raise ValueError("a range needs at least one line")
    found = np.stack([residuals_pp(line, x, y) for line in lines])
    return found.min(axis=0), found.max(axis=0)


def residual_samples_pp(
    x: np.ndarray, y: np.ndarray, baselines_x: np.ndarray, baselines_y: np.ndarray, axes: Axes = "probit"
) -> np.ndarray:
    """Refit the line in every bootstrap sample and measure the models from it: luck of the images, line included.

    Args:
        x: (draws, m) float64 accuracies of m models on the usual set, inside (0, 1) unless axes are linear.
        y: (draws, m) likewise on the shifted set.
        baselines_x: (draws, b) of the baselines, b >= 2.
        baselines_y: (draws, b) likewise.
        axes: Where the line is straight.

    Returns:
        (draws, m) float64 residuals in points; NaN where all baselines of a draw have one accuracy.
    """
    at, to = to_axis(baselines_x, axes), to_axis(baselines_y, axes)
    centre, height = at.mean(axis=1, keepdims=True), to.mean(axis=1, keepdims=True)
    spread = ((at - centre) ** 2).sum(axis=1, keepdims=True)
    product = ((at - centre) * (to - height)).sum(axis=1, keepdims=True)
    slope = np.divide(product, spread, out=np.full(spread.shape, np.nan), where=spread > 0)
    predicted = from_axis(height + slope * (to_axis(x, axes) - centre), axes)
    return 100 * (np.asarray(y, np.float64) - predicted)
