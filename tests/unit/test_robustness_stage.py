"""`clipgap robustness`: two CSVs in, robustness.json out."""

import json

import numpy as np
import pytest
from matplotlib import pyplot
from scipy import stats

from clipgap_ray.config.robustness import RobustnessSettings
from clipgap_ray.errors import DataError
from clipgap_ray.reporting import theme
from clipgap_ray.stages import robustness
from tests.unit.test_robustness import IMAGENET


@pytest.fixture
def files(tmp_path):
    rows = "".join(f"in{i},{c},{k}\n" for i, (c, k) in enumerate(IMAGENET))
    (tmp_path / "base.csv").write_text("model,common,counter\n" + rows)
    # B/32 LAION400M as printed, once more as if it had failed completely.
    (tmp_path / "clip.csv").write_text("model,common,counter\nclip,0.6713,0.3695\nbroken,0.7,0.0\nhigh,0.95,0.9\n")
    return tmp_path


def settings(files, **more) -> RobustnessSettings:
    values = {"table": str(files / "clip.csv"), "baseline": str(files / "base.csv"), "out": str(files / "out"),
              "name": "model", "x": "common", "y": "counter"}  # fmt: skip
    return RobustnessSettings(**{**values, **more})


def test_percent_and_fractions_mix_and_residuals_are_points(files) -> None:
    robustness.run(settings(files))
    result = json.loads((files / "out" / "robustness.json").read_text())
    assert (result["slope"], result["intercept"]) == pytest.approx((1.2138, -0.6185), abs=0.001)
    assert result["unit"] == {"table": "fraction", "baseline": "percent"}
    clip = result["residuals"][0]
    assert clip["name"] == "clip"
    assert clip["residual_pp"] == pytest.approx(100 * (0.3695 - clip["predicted"]))
    assert clip["residual_pp"] == pytest.approx(
        -9.85, abs=0.05
    )  # Phi(1.2138 * 0.4435 - 0.6185) = Phi(-0.0802) = 0.4680
    assert len(result["leave_one_out"]) == len(result["baseline_residuals"]) == 15
    assert any("high" in warning and "extrapolated" in warning for warning in result["warnings"])
    assert any("broken" in warning and "moved inside" in warning for warning in result["warnings"])
    assert (files / "out" / "robustness.png").stat().st_size > 5000


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Drawing takes longer than everything else here; the first test draws."""
    monkeypatch.setattr(robustness, "render", lambda draw: {"light.svg": b"", "light.png": b""})


def test_residuals_stand_beside_other_lines_and_axes(files, undrawn) -> None:
    robustness.run(settings(files))
    result = json.loads((files / "out" / "robustness.json").read_text())
    clip = result["residuals"][0]
    assert clip["interval_pp"] is None  # the tables have no counts of images
    assert clip["leave_one_out_pp"][0] < clip["residual_pp"] < clip["leave_one_out_pp"][1]
    assert clip["residual_probit_pp"] == clip["residual_pp"]
    assert clip["residual_logit_pp"] != clip["residual_linear_pp"]
    assert result["lines"]["logit"]["slope"] == pytest.approx(1.1454, abs=0.001)  # counteranimal.md 3, logit OLS


def test_counts_of_images_give_intervals(files, undrawn) -> None:
    for name, n in (("base", 7000), ("clip", 500)):
        lines = (files / f"{name}.csv").read_text().splitlines()
        (files / f"{name}.csv").write_text("\n".join([lines[0] + ",nx,ny", *(f"{line},{n},{n}" for line in lines[1:])]))
    robustness.run(settings(files, x_n="nx", y_n="ny", draws=1000))
    clip = json.loads((files / "out" / "robustness.json").read_text())["residuals"][0]
    low, high = clip["interval_pp"]
    # The model's own noise: that of y, and that of x along the line, whose slope is 1.21 in probits.
    slope = 1.2138 * stats.norm.pdf(stats.norm.ppf(clip["predicted"])) / stats.norm.pdf(stats.norm.ppf(0.6713))
    noise = 100 * np.sqrt(0.3695 * 0.6305 / 500 + slope**2 * 0.6713 * 0.3287 / 500)
    assert (high - low) / (2 * 1.96) == pytest.approx(noise, rel=0.1)
    assert "interval_low_pp" in (files / "out" / "residuals.csv").read_text().splitlines()[0]


@pytest.mark.parametrize("axes", ["probit", "logit", "linear"])
def test_the_figure_is_on_the_line_s_own_axes(files, axes, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(robustness, "render", lambda draw: drawn.append(draw(theme.LIGHT)) or
                        {"light.svg": b"", "light.png": b""})  # fmt: skip
    robustness.run(settings(files, axes=axes))
    axis = drawn[0].axes[0]
    assert axis.get_xlabel() == f"common accuracy ({axes} scale)"
    line = next(line for line in axis.lines if line.get_label() == "baselines' line")
    slopes = np.diff(line.get_ydata()) / np.diff(line.get_xdata())
    result = json.loads((files / "out" / "robustness.json").read_text())
    inside = np.abs(slopes - result["slope"]) < 1e-3  # straight there, but where the curve leaves 0 to 1
    assert inside.mean() > 0.9
    assert set(result["inputs"]) == {str(files / "clip.csv"), str(files / "base.csv")}
    pyplot.close("all")


def test_baselines_that_coincide_on_other_axes_have_no_line_there(files, undrawn) -> None:
    (files / "base.csv").write_text("model,common,counter\na,1.0,0.9\nb,0.9995,0.8\n")
    robustness.run(settings(files, axes="linear"))
    result = json.loads((files / "out" / "robustness.json").read_text())
    assert result["lines"]["linear"] is not None
    assert result["lines"]["probit"] is None
    assert result["residuals"][0]["residual_probit_pp"] is None
    with pytest.raises(DataError, match=r"base\.csv: .*at least two"):
        robustness.run(settings(files, axes="probit"))


def test_missing_columns_and_impossible_values_are_named(files) -> None:
    with pytest.raises(DataError, match=r"lacks the columns \['nope'\]"):
        robustness.run(settings(files, x="nope"))
    (files / "clip.csv").write_text("model,common,counter\na,50,-3\n")
    with pytest.raises(DataError, match="must lie in"):
        robustness.run(settings(files))
