"""`clipgap robustness`: two CSVs in, robustness.json out."""

import json

import pytest

from clipgap_ray.config.robustness import RobustnessSettings
from clipgap_ray.errors import DataError
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


def test_missing_columns_and_impossible_values_are_named(files) -> None:
    with pytest.raises(DataError, match=r"lacks the columns \['nope'\]"):
        robustness.run(settings(files, x="nope"))
    (files / "clip.csv").write_text("model,common,counter\na,50,-3\n")
    with pytest.raises(DataError, match="must lie in"):
        robustness.run(settings(files))
