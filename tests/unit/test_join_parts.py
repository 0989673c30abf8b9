"""The join with photos cut apart: is it the animal or the background that lies farther? (counteranimal.md 7.3)"""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from clipgap_ray import store
from clipgap_ray.config.join import DropJoinSettings
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.reporting import theme
from clipgap_ray.stages import join

PER_CELL, CLASSES = 60, 5
NEARER = 0.05  # counter animals lie this much farther; their backgrounds do not


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Whether a photo is right hangs on how near its animal is, and on nothing else."""
    folder = tmp_path_factory.mktemp("parts")
    rng = np.random.default_rng(0)
    count = 2 * PER_CELL * CLASSES
    counter = np.arange(count) % 2 == 1
    animal = 0.7 - NEARER * counter + 0.05 * rng.normal(size=count)
    behind = 0.6 + 0.05 * rng.normal(size=count)
    right = rng.random(count) < 1 / (1 + np.exp(-25 * (animal - 0.67)))
    uids = [f"{i:032x}" for i in range(count)]
    names = [f"class {i // (2 * PER_CELL)}" for i in range(count)]
    groups = ["counter" if second else "common" for second in counter]
    predictions = {"uid": uids, "class_name": names, "group": groups, "correct": right}
    store.write_table(str(folder / "clip.parquet"), pa.table(predictions))
    for name, s in (("q", (animal + behind) / 2), ("fg", animal), ("bg", behind)):
        store.write_table(str(folder / f"{name}.parquet"), pa.table({"uid": uids, "similarity": s}).slice(0, count - 4))
    return folder


def settings(folder: Path, out: Path, **more) -> DropJoinSettings:
    words = {"predictions": (str(folder / "clip.parquet"),), "scores": (str(folder / "q.parquet"),), "test": "animals",
             "out": str(out), "draws": 40,
             "parts": (f"foreground={folder}/fg.parquet", f"background={folder}/bg.parquet")}  # fmt: skip
    return DropJoinSettings.load({**words, **more}, "join")


@pytest.fixture(autouse=True)
def undrawn(monkeypatch) -> None:
    """Drawing takes longer than everything else here: draw, but write no bytes."""
    monkeypatch.setattr(join, "render", lambda draw: draw(theme.LIGHT) and {"light.svg": b"", "light.png": b""})


def test_the_animal_explains_the_drop_and_the_background_nothing(world, tmp_path) -> None:
    join.run(settings(world, tmp_path)).check()
    result = json.loads((tmp_path / "join.json").read_text())["similarity_parts"]
    assert (result["num_images"], result["without_all_parts"]) == (2 * PER_CELL * CLASSES - 4, 0)
    by_name = {record["part"]: record for record in result["parts"]}
    assert list(by_name) == ["whole", "foreground", "background"]
    low, high = by_name["foreground"]["exposure"]["interval"]
    assert low < NEARER < high
    assert low > 0
    low, high = by_name["background"]["exposure"]["interval"]
    assert low < 0 < high
    animal, behind = by_name["foreground"]["decomposition"], by_name["background"]["decomposition"]
    assert animal["residual_interval_pp"][0] < 0 < animal["residual_interval_pp"][1]
    assert behind["explained_interval_pp"][0] < 0 < behind["explained_interval_pp"][1]
    assert animal["explained_pp"] == pytest.approx(result["drop_pp"], abs=8)
    assert by_name["whole"]["correlation_with_whole"] == pytest.approx(1)
    assert by_name["foreground"]["correlation_with_whole"] == pytest.approx(np.sqrt(0.5), abs=0.08)
    with open(tmp_path / "parts.csv") as file:
        assert [row["part"] for row in csv.DictReader(file)] == ["whole", "foreground", "background"]
    photos = store.read_table(str(tmp_path / "photos" / "clip.parquet"))
    assert {"similarity_foreground", "similarity_background"} <= set(photos.column_names)


def test_photos_without_a_part_are_left_out_and_counted(world, tmp_path) -> None:
    table = store.read_table(str(world / "fg.parquet"))
    store.write_table(str(tmp_path / "fg.parquet"), table.slice(50))
    join.run(settings(world, tmp_path / "o", parts=(f"foreground={tmp_path}/fg.parquet",), draws=5))
    result = json.loads((tmp_path / "o" / "join.json").read_text())
    assert result["similarity_parts"]["without_all_parts"] == 50
    assert result["similarity_parts"]["num_images"] == 2 * PER_CELL * CLASSES - 4 - 50
    assert sum(result["num_images"].values()) == 2 * PER_CELL * CLASSES - 4


def test_bad_parts_are_refused(world, tmp_path) -> None:
    with pytest.raises(ConfigError, match="whole photos are --scores"):
        settings(world, tmp_path, parts=("whole=x",))
    with pytest.raises(ConfigError, match="is not NAME=PATH"):
        settings(world, tmp_path, parts=("fg.parquet",))
    with pytest.raises(ConfigError, match="scored against one pool"):
        settings(world, tmp_path, scores=("clip=a", "b"))
    other = pa.table({"uid": ["f" * 32], "similarity": [0.5]})
    store.write_table(str(tmp_path / "other.parquet"), other)
    with pytest.raises(DataError, match=r"share no image: 1 scored[\s\S]*clipgap cutout"):
        join.run(settings(world, tmp_path, parts=(f"foreground={tmp_path}/other.parquet",)))
    store.write_table(str(tmp_path / "other.parquet"), other.drop_columns("similarity"))
    with pytest.raises(DataError, match=r"lacks the columns \['similarity'\]"):
        join.run(settings(world, tmp_path, parts=(f"foreground={tmp_path}/other.parquet",)))
