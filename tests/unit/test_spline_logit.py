"""The regression behind the decomposition against statsmodels, which is its slow twin."""

import numpy as np
import pytest
import statsmodels.api as sm

from clipgap_ray.kernels import spline_logit
from tests.unit.test_decomposition import GROUP, SLOPE, world


def test_the_fit_is_statsmodels_binomial_regression() -> None:
    photos, _ = world(SLOPE, GROUP, classes=6)
    knots = spline_logit.place_knots(photos.similarity)
    weights = np.random.default_rng(2).integers(0, 3, len(photos.rate)).astype(float)
    design = np.column_stack(
        [
            photos.class_at[:, None] == np.arange(6),
            photos.second,
            spline_logit.spline_columns(photos.similarity, knots),
        ]
    ).astype(float)
    twin = sm.GLM(photos.rate, design, sm.families.Binomial(), freq_weights=weights).fit(tol=1e-12).params
    assert spline_logit.fit(photos, knots, weights).coefficients == pytest.approx(twin, abs=1e-4)
