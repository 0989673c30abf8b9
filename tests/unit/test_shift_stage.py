"""`clipgap shift`: table and predictions in, shift.json out."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pytest

from clipgap_ray import store
from clipgap_ray.config.shift import ShiftSettings
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.stages import shift

TABLE = Path(__file__).parent.parent / "data" / "counteranimal_per_class.csv"


def test_several_models_of_a_table(tmp_path) -> None:
    shift.run(ShiftSettings(out=str(tmp_path), table=str(TABLE), draws=100))
    result = json.loads((tmp_path / "shift.json").read_text())
    assert set(result["models"]) == {"L400M_B16", "L400M_B32", "L400M_L14", "L2B_B32", "OAI_B32"}
    assert round(result["models"]["L400M_B32"]["drop"]["drop_pp"], 2) == 30.23
    assert any("lion" in warning for warning in result["warnings"])
    assert len((tmp_path / "per_class.csv").read_text().splitlines()) == 1 + 5 * 45
    rows = list(csv.DictReader((tmp_path / "models.csv").open()))
    assert [row["model"] for row in rows] == list(result["models"])
    one = next(row for row in rows if row["model"] == "L400M_B32")
    assert (round(float(one["drop_pp"]), 2), one["common_n"], one["counter_n"]) == (30.23, "7408", "5926")
    assert float(one["log_odds_low_classes"]) < float(one["log_odds"]) < float(one["log_odds_high_classes"])
    assert result["inputs"] == {str(TABLE): store.sha256(TABLE.read_bytes())}
    assert (tmp_path / "shift.svg").read_bytes().startswith(b"<?xml")


def test_predictions_of_one_model_stand_at_the_top_level(tmp_path) -> None:
    table = pa.table(
        {
            "class_name": ["a", "a", "b", "b"],
            "group": ["common", "counter", "common", "counter"],
            "correct": [True, False, True, True],
        }
    )
    store.write_table(str(tmp_path / "p.parquet"), table)
    shift.run(ShiftSettings(out=str(tmp_path / "o"), predictions=(str(tmp_path / "p.parquet"),), draws=50))
    result = json.loads((tmp_path / "o" / "shift.json").read_text())
    assert result["balanced"] == {"common": 1.0, "counter": 0.5}
    assert result["drop"]["drop_pp"] == 50
    assert result["worst_class_group"]["class_name"] == "a"


def test_bad_input_names_what_is_missing(tmp_path) -> None:
    with pytest.raises(ConfigError, match="--predictions or --table"):
        ShiftSettings.load({"out": "x"}, "shift")
    (tmp_path / "t.csv").write_text("label,n_common\nfox,3\n")
    with pytest.raises(DataError, match="n_counter"):
        shift.run(ShiftSettings(out=str(tmp_path), table=str(tmp_path / "t.csv")))
    store.write_table(str(tmp_path / "p.parquet"), pa.table({"class_name": ["a"], "group": ["x"], "correct": [True]}))
    with pytest.raises(DataError, match="groups are x"):
        shift.run(ShiftSettings(out=str(tmp_path), predictions=(str(tmp_path / "p.parquet"),)))
