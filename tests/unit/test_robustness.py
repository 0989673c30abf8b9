"""Effective robustness: the golden ImageNet line (counteranimal.md 10.1, item 3), axes, units, ends of the scale."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipgap_ray.kernels import robustness

# counteranimal.md section 4: AlexNet ... ConvNext/L, 1 vs 1000, common and counter.
IMAGENET = np.array(
    [[59.56, 39.24], [73.37, 56.12], [75.33, 58.43], [77.84, 61.74], [74.36, 56.07], [78.31, 61.01], [81.44, 66.07],
     [81.76, 68.18], [84.97, 74.98], [79.84, 64.36], [83.74, 72.69], [81.23, 67.54], [88.27, 79.97], [88.60, 80.53],
     [89.12, 81.47]]
)  # fmt: skip


def imagenet_line(axes: robustness.Axes = "probit") -> robustness.Line:
    fractions, unit = robustness.as_fractions(IMAGENET)
    assert unit == "percent"
    return robustness.fit(fractions[:, 0], fractions[:, 1], axes)


def test_golden_imagenet_line() -> None:
    line = imagenet_line()
    assert (line.slope, line.intercept, line.r2) == pytest.approx((1.2138, -0.6185, 0.991), abs=0.001)
    logit = imagenet_line("logit")
    assert (logit.slope, logit.intercept, logit.r2) == pytest.approx((1.1454, -0.9451, 0.993), abs=0.001)
    assert line.slope_interval[0] < 1.2138 < line.slope_interval[1]


def test_residual_is_in_points_and_extrapolation_is_marked() -> None:
    line = imagenet_line()
    at = float(line.predict(np.array([0.8]))[0])
    assert robustness.residuals_pp(line, np.array([0.8]), np.array([at + 0.05])) == pytest.approx([5.0])
    assert line.extrapolates(np.array([0.5, 0.8, 0.95])).tolist() == [True, False, True]
    low, high = line.band(np.array([0.8]))
    assert low[0] < at < high[0]


def test_leave_one_out_shows_the_model_that_carries_the_line() -> None:
    x = np.array([0.5, 0.6, 0.7, 0.8])
    y = robustness.from_axis(robustness.to_axis(x, "probit") - 0.5, "probit")
    y[3] += 0.1
    found = robustness.leave_one_out(x, y)
    assert found[3][0].slope == pytest.approx(1.0)
    assert found[3][1] == pytest.approx(10.0)
    assert found[0][0].slope > 1.05


def test_seeds_of_a_baseline_are_left_out_together() -> None:
    x = np.array([0.3, 0.5, 0.7, 0.7])
    y = np.array([0.2, 0.4, 0.75, 0.77])
    by_seed = robustness.leave_one_out(x, y, "linear")
    by_model = robustness.leave_one_out(x, y, "linear", ["a", "b", "c", "c"])
    assert (len(by_seed), len(by_model)) == (4, 3)
    assert by_model[2][0].slope == pytest.approx(1.0)  # through (0.3, 0.2) and (0.5, 0.4)
    assert by_model[2][1] == pytest.approx(100 * (0.76 - 0.6))
    assert by_seed[2][0].slope > 1.2  # the sister holds the line


@given(st.floats(0.01, 0.99), st.sampled_from(["probit", "logit", "linear"]))
def test_axes_invert(value, axes) -> None:
    assert robustness.from_axis(robustness.to_axis(np.array([value]), axes), axes)[0] == pytest.approx(value)


def test_ends_of_the_scale_move_inside_with_and_without_counts() -> None:
    values = np.array([0.0, 0.5, 1.0])
    inside, moved = robustness.pull_inside(values, np.array([9, 9, 19]), "probit")
    assert inside == pytest.approx([0.05, 0.5, 0.975])  # (h + 1/2) / (n + 1)
    assert moved.tolist() == [True, False, True]
    assert robustness.pull_inside(values, None, "logit")[0] == pytest.approx([0.001, 0.5, 0.999])
    assert not robustness.pull_inside(values, None, "linear")[1].any()
    with pytest.raises(ValueError, match="no place on probit axes"):
        robustness.fit(values, values)


def test_units() -> None:
    assert robustness.as_fractions(np.array([0.3, 1.0]))[1] == "fraction"
    assert robustness.as_fractions(np.array([0.3, 1.1]))[1] == "percent"
    with pytest.raises(ValueError, match="must lie in"):
        robustness.as_fractions(np.array([101.0]))


def test_two_baselines_make_a_line_without_error_and_one_makes_none() -> None:
    line = robustness.fit(np.array([0.4, 0.8]), np.array([0.2, 0.6]))
    assert line.predict(np.array([0.4, 0.8])) == pytest.approx([0.2, 0.6])
    assert np.isinf(line.slope_interval[1])
    assert line.band(np.array([0.5])) is None
    with pytest.raises(ValueError, match="at least two"):
        robustness.fit(np.array([0.4, 0.4]), np.array([0.2, 0.6]))


def test_samples_of_residuals_are_refitted_lines() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0.2, 0.9, (6, 3)), rng.uniform(0.1, 0.8, (6, 3))
    base_x, base_y = rng.uniform(0.3, 0.8, (6, 4)), rng.uniform(0.2, 0.7, (6, 4))
    for axes in robustness.AXES:
        found = robustness.residual_samples_pp(x, y, base_x, base_y, axes)
        for draw in range(6):  # the slow twin fits one line after the other
            line = robustness.fit(base_x[draw], base_y[draw], axes)
            assert found[draw] == pytest.approx(robustness.residuals_pp(line, x[draw], y[draw]))
    base_x[2] = 0.5
    found = robustness.residual_samples_pp(x, y, base_x, base_y)
    assert np.isnan(found).all(axis=1).tolist() == [False, False, True, False, False, False]


def test_the_range_over_lines_holds_every_line_s_residual() -> None:
    base = np.array([0.3, 0.5, 0.6, 0.8])
    lines = [line for line, _ in robustness.leave_one_out(base, base**2) if line is not None]
    low, high = robustness.residual_range_pp(lines, np.array([0.4, 0.7]), np.array([0.3, 0.6]))
    each = np.stack([robustness.residuals_pp(line, np.array([0.4, 0.7]), np.array([0.3, 0.6])) for line in lines])
    assert (low == each.min(axis=0)).all()
    assert (high == each.max(axis=0)).all()
    with pytest.raises(ValueError, match="at least one line"):
        robustness.residual_range_pp([], base, base)
