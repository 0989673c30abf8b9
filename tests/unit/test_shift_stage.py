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


def _three_groups(folder: Path, name: str, right: dict[str, int]) -> str:
    """10 photos per class and group, of which so many are right; class d has photos outdoors only, in no pair."""
    rows = [{"class_name": c, "group": g, "correct": i < right[g]} for c in "abc" for g in right for i in range(10)] + [
        {"class_name": "d", "group": "space", "correct": True},
        {"class_name": "a", "group": "", "correct": True},
    ]
    path = str(folder / f"{name}.parquet")
    store.write_table(path, pa.Table.from_pylist(rows))
    return f"{name}={path}"


def test_every_group_is_compared_with_the_base(tmp_path) -> None:
    files = tuple(_three_groups(tmp_path, n, {"day": 9, "dusk": 6, "night": d}) for n, d in (("m", 3), ("n", 1)))
    shift.run(ShiftSettings(out=str(tmp_path / "o"), predictions=files, groups=("day", "dusk", "night"), draws=50))
    result = json.loads((tmp_path / "o" / "shift.json").read_text())
    rows = list(csv.DictReader((tmp_path / "o" / "models.csv").open()))
    drops = [(r["model"], r["second"], round(float(r["drop_pp"]))) for r in rows]
    assert drops == [("m", "dusk", 30), ("m", "night", 60), ("n", "dusk", 30), ("n", "night", 80)]
    assert result["models"]["m"]["further"][0]["drop"]["drop_pp"] == pytest.approx(60)
    per_class = list(csv.DictReader((tmp_path / "o" / "per_class.csv").open()))
    assert {(r["first"], r["second"]) for r in per_class} == {("day", "dusk"), ("day", "night")}
    drawn = (tmp_path / "o" / "shift.svg").read_text()
    assert all(name in drawn for name in ("m · dusk (n = 30)", "n · night (n = 30)"))


def test_without_names_all_groups_are_taken_but_those_that_share_no_class(tmp_path) -> None:
    files = (_three_groups(tmp_path, "m", {"day": 9, "dusk": 6, "night": 3}),)
    summary = shift.run(ShiftSettings(out=str(tmp_path / "o"), predictions=files, draws=50))
    rows = list(csv.DictReader((tmp_path / "o" / "models.csv").open()))
    assert [(r["first"], r["second"]) for r in rows] == [("day", "dusk"), ("day", "night")]
    assert summary.extra["warnings"] == ["m: no class has photos of both day and space"]
    with pytest.raises(DataError, match="no photos of group 'moon'"):
        shift.run(ShiftSettings(out=str(tmp_path / "p"), predictions=files, groups=("day", "moon"), draws=50))
    for groups, message in ((("day",), "two different groups"), (("day", "day"), "two different groups")):
        with pytest.raises(ConfigError, match=message):
            ShiftSettings.load({"out": "x", "predictions": files, "groups": groups}, "shift")
    with pytest.raises(ConfigError, match="columns of two"):
        ShiftSettings.load({"out": "x", "table": str(TABLE), "groups": ("a", "b", "c")}, "shift")


def test_ways_of_asking_are_compared_on_groups_that_share_a_class(tmp_path) -> None:
    """The second largest group, which stands next to the base, lies in a class of its own."""
    sizes = {"day": 20, "space": 15, "dusk": 10}
    for name, right in (("m", 6), ("w", 2)):
        rows = [
            {"uid": f"{c}{g}{i}", "class_name": c, "group": g, "correct": i < right}
            for g, size in sizes.items() for c in (("z",) if g == "space" else ("a",)) for i in range(size)
        ]  # fmt: skip
        store.write_table(str(tmp_path / f"{name}.parquet"), pa.Table.from_pylist(rows))
    files = {"predictions": (f"m={tmp_path}/m.parquet",), "variants": (f"m:few={tmp_path}/w.parquet",)}
    summary = shift.run(ShiftSettings(out=str(tmp_path / "o"), draws=50, **files))
    rows = list(csv.DictReader((tmp_path / "o" / "variants.csv").open()))
    assert [(r["variant"], float(r["balanced_day"]), float(r["balanced_dusk"])) for r in rows] == [
        (rows[0]["variant"], 0.3, 0.6), ("few", 0.1, 0.2),
    ]  # fmt: skip
    assert summary.extra["warnings"] == ["m: no class has photos of both day and space"]
