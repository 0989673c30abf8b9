"""Settings of `robustness`."""

from __future__ import annotations

from typing import Literal

import pydantic
import tyro

from clipgap_ray.config.base import Settings


class RobustnessSettings(Settings):
    """Fit a line to baseline models and measure how far other models lie above it (effective robustness)."""

    table: tyro.conf.Positional[str]
    """CSV with one row per model."""
    out: str
    """Directory for robustness.json, residuals.csv and robustness.svg."""
    x: str
    """Column with the accuracy on the usual test set."""
    y: str
    """Column with the accuracy on the shifted test set."""
    baseline: str
    """CSV with the baseline models and the same columns; the line is fitted to them."""
    name: str = "name"
    """Column with the models' names."""
    axes: Literal["probit", "logit", "linear"] = "probit"
    """Axes on which the line is straight."""
    x_n: str = ""
    """Column with the number of images behind x; with it 0 and 100 % become (h + 1/2) / (n + 1)."""
    y_n: str = ""
    """Likewise for y."""
    draws: pydantic.PositiveInt = 2000
    """Samples behind the residuals' intervals, which need --x-n and --y-n: accuracies are drawn anew for models and
    baselines, and the line is fitted to each draw."""
    seed: int = 0
    """Seed of the draws."""
    unit: Literal["auto", "percent", "fraction"] = "auto"
    """auto: a file with any value above 1 holds percent; which was found is printed and stored."""
