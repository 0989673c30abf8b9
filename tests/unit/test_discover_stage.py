"""Groups by accuracy: in the null world held-out photos do not drop; a planted background is found, and by whom."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from clipgap_ray import schema, store
from clipgap_ray.config.groups import DiscoverSettings
from clipgap_ray.config.shift import ShiftSettings
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.kernels import selection
from clipgap_ray.stages import discover, shift

BACKGROUNDS = ("grass", "rock", "snow", "water")
CLASSES, PER_CELL = 24, 100
EFFECT = 0.3
SE_PP = 100 * np.sqrt(2 * 0.24 / PER_CELL / CLASSES)  # of a mean over classes of differences of two proportions


def write_world(folder: Path, effect: float, models: tuple[str, ...] = ("a", "b"), per_cell: int = PER_CELL) -> None:
    """Models right with chance 0.6; an effect makes grass help and water hurt every class of the first model alone."""
    rng = np.random.default_rng(11)
    cell = np.repeat(np.arange(CLASSES * len(BACKGROUNDS)), per_cell)
    class_at, background = np.divmod(cell, len(BACKGROUNDS))
    uids = [f"{i:032x}" for i in range(len(cell))]
    for number, name in enumerate(models):
        shift_by = effect * ((background == 0) * 0.5 - (background == 3) * 0.5) * (number == 0)
        right = rng.random(len(cell)) < 0.6 + shift_by
        table = pa.table(
            {
                "row": np.arange(len(cell)), "uid": uids, "label": class_at.astype(np.int32),
                "prediction": np.zeros(len(cell), np.int32), "correct": right, "top5": [[0]] * len(cell),
                "logit": np.zeros(len(cell), np.float32), "group": ["common"] * len(cell),
                "class_name": [f"class {c:02d}" for c in class_at],
            }, schema=schema.PREDICTIONS,
        )  # fmt: skip
        order = rng.permutation(len(cell))  # another order of rows in every file
        store.write_table(str(folder / f"{name}.parquet"), table.take(pa.array(order)))
    labels = pa.table({"uid": uids, "attribute": [BACKGROUNDS[b] for b in background]})
    store.write_table(str(folder / "labels.parquet"), labels)


def run(folder: Path, **more) -> dict:
    words = {"predictions": (f"a={folder / 'a.parquet'}", f"b={folder / 'b.parquet'}"), "splits": 8,
             "attributes": str(folder / "labels.parquet"), "out": str(folder / "out"), "permutations": 400}  # fmt: skip
    summary = discover.run(DiscoverSettings(**{**words, **more}))
    summary.check()
    assert summary.read == CLASSES * len(BACKGROUNDS) * PER_CELL
    return json.loads((folder / "out" / "discover.json").read_text())


@pytest.fixture(scope="module")
def null(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("null")
    write_world(folder, 0.0)
    return run(folder)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("planted")
    write_world(folder, EFFECT)
    return run(folder), folder


def test_golden_null_world_drops_ten_points_with_selection_and_none_without(null) -> None:
    for model in null["models"].values():
        assert model["same_photos_drop_pp"] == pytest.approx(10.1, abs=1.5)  # counteranimal.md 10.1, item 6
        low, high = model["held_out_interval_pp"]
        assert low < 0 < high
        assert model["inflation_pp"] == pytest.approx(10.1, abs=2.5)
    across = [c for c in null["matrix"] if c["discovered_by"] != c["evaluated"]]
    assert all(
        abs(c["same_photos_drop_pp"]) < 3 * SE_PP for c in across
    )  # what one model chose says nothing of another
    assert null["num_classes_kept"] <= 2


def test_planted_backgrounds_are_found_and_only_of_the_model_that_has_them(planted) -> None:
    result, folder = planted
    kept = [record for record in result["classes"] if record["kept"]]
    assert len(kept) >= CLASSES // 2
    assert {record["common"] for record in kept} <= {"grass", "rock", "snow"}
    assert sum(record["common"] == "grass" for record in kept) > 0.8 * len(kept)
    assert sum(record["counter"] == "water" for record in kept) > 0.8 * len(kept)
    own = result["models"]["a"]
    low, high = own["held_out_interval_pp"]
    assert low < 100 * EFFECT < high + 3  # choosing on a half is sometimes wrong, so a little below the effect
    assert own["same_photos_drop_pp"] > own["held_out_drop_pp"]
    other = next(c for c in result["matrix"] if (c["discovered_by"], c["evaluated"]) == ("a", "b"))
    assert abs(other["held_out_drop_pp"]) < 3 * SE_PP
    with open(folder / "out" / "groups.csv") as file:
        assert len(list(csv.DictReader(file))) == CLASSES


def test_the_written_groups_are_the_half_that_did_not_choose_and_feed_shift(planted) -> None:
    result, folder = planted
    photos = store.read_table(str(folder / "out" / "photos.parquet")).to_pylist()
    kept = {record["class_name"]: record for record in result["classes"] if record["kept"]}
    assert {row["class_name"] for row in photos} == set(kept)
    assert all(row["attribute"] == kept[row["class_name"]][row["group"]] for row in photos)
    assert len(photos) == len(kept) * PER_CELL  # a half of each of two backgrounds
    shift.run(ShiftSettings(predictions=(str(folder / "out" / "predictions" / "a.parquet"),), out=str(folder / "s")))
    drop = json.loads((folder / "s" / "shift.json").read_text())["drop"]["drop_pp"]
    held = np.mean([record["held_out_drop_pp"] for record in kept.values()])
    assert drop == pytest.approx(held, abs=1e-9)


def test_the_paper_s_way_uses_all_photos_and_says_so(planted) -> None:
    _, folder = planted
    run(folder, evaluate_on="all", out=str(folder / "all"), splits=1)
    paper = json.loads((folder / "all" / "discover.json").read_text())
    assert paper["settings"]["evaluate_on"] == "all"
    assert all(record["held_out_drop_pp"] is None for record in paper["classes"])
    kept = sum(record["kept"] for record in paper["classes"])
    assert len(store.read_table(str(folder / "all" / "photos.parquet"))) == 2 * kept * PER_CELL


def test_bad_input_names_what_is_missing(planted, tmp_path) -> None:
    _, folder = planted
    with pytest.raises(ConfigError, match="is no model"):
        run(folder, by="c", out=str(tmp_path))
    with pytest.raises(ConfigError, match="twice"):
        run(folder, predictions=(f"a={folder / 'a.parquet'}",) * 2, out=str(tmp_path))
    with pytest.raises(DataError, match="two attributes with 500 photos"):
        run(folder, min_photos=500, out=str(tmp_path))
    store.write_table(str(tmp_path / "l.parquet"), pa.table({"uid": ["f" * 32], "attribute": ["grass"]}))
    with pytest.raises(DataError, match="no photo has predictions of every model and an attribute"):
        run(folder, attributes=str(tmp_path / "l.parquet"), out=str(tmp_path))
    (tmp_path / "l.csv").write_text("uid,background\nx,grass\n")
    with pytest.raises(DataError, match="lacks the columns \\['attribute'\\]"):
        run(folder, attributes=str(tmp_path / "l.csv"), out=str(tmp_path))


def test_permutation_p_is_uniform_without_effect_and_exact_by_hand() -> None:
    rng = np.random.default_rng(0)
    totals = np.full((400, 3), 40)
    p = selection.permutation_p(rng.binomial(totals, 0.6), totals, 5, 200, rng)
    assert np.mean(p <= 0.05) < 0.09
    assert 0.4 < p.mean() < 0.65  # ties of a discrete gap push it above one half
    # Two groups of two photos, both hits in one group: 2 of the 6 deals do so.
    found = selection.permutation_p(np.array([[2, 0]]), np.array([[2, 2]]), 1, 20_000, rng)
    assert found == pytest.approx([1 / 3], abs=0.02)
    small = selection.permutation_p(np.array([[2, 0]]), np.array([[4, 1]]), 2, 10, rng)
    assert np.isnan(small).all()
    assert selection.q_values(np.array([0.01, np.nan, 0.04])) == pytest.approx([0.02, np.nan, 0.04], nan_ok=True)
