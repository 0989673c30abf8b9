"""`clipgap join`: predictions and query tables in, the drop's parts out."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy.special import expit

from clipgap_ray import store
from clipgap_ray.config.join import DropJoinSettings
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.stages import join

CLASSES, PER_CELL = 10, 60


def photos(slope: float, background: float, seed: int = 0) -> tuple[pa.Table, pa.Table]:
    """Predictions and query table of a test set, in different orders; counter photos lie farther away."""
    rng = np.random.default_rng(seed)
    n = 2 * CLASSES * PER_CELL
    classes, counter = np.repeat(np.arange(CLASSES), 2 * PER_CELL), np.tile(np.repeat([0, 1], PER_CELL), CLASSES)
    s = 0.7 - 0.06 * counter + rng.normal(0, 0.06, n)
    right = rng.random(n) < expit(1.0 + slope * (s - 0.7) - background * counter)
    uids = [f"{i:032x}" for i in range(n)]
    predictions = pa.table(
        {
            "uid": uids,
            "class_name": [f"class {c}" for c in classes],
            "group": [("common", "counter")[g] for g in counter],
            "correct": right,
        }
    )
    back = rng.permutation(n)
    queries = {"uid": [uids[i] for i in back], "similarity": s[back], "tau": (s - 0.1)[back]}
    return predictions, pa.table(queries)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    for name, world in {"far": (25.0, 0.0), "background": (0.0, 1.5)}.items():
        predictions, queries = photos(*world)
        store.write_table(str(tmp_path / f"{name}.parquet"), predictions)
        store.write_table(str(tmp_path / "scores" / "queries" / "animals.parquet"), queries)
        store.write_table(str(tmp_path / "queries.parquet"), queries)
    store.write_json(str(tmp_path / "scores" / "manifest.json"), {"stage": "score", "tests": {"animals": {}}})
    return tmp_path


def settings(root: Path, **more: object) -> DropJoinSettings:
    words = {
        "predictions": (f"far={root}/far.parquet", f"background={root}/background.parquet"),
        "scores": (str(root / "scores"),),
        "test": "animals",
        "out": str(root / "out"),
        "draws": 40,
    }
    return DropJoinSettings(**{**words, **more})


def test_two_models_of_one_pool_are_told_apart(inputs: Path) -> None:
    summary = join.run(settings(inputs))
    result = json.loads((inputs / "out" / "join.json").read_text())
    far, background = (result["models"][name] for name in ("far", "background"))
    assert far["decomposition"]["share"] == pytest.approx(1.0, abs=0.25)
    assert background["decomposition"]["share"] == pytest.approx(0.0, abs=0.15)
    for model in (far, background):
        parts = model["decomposition"]
        assert parts["explained_pp"] + parts["residual_pp"] == pytest.approx(model["drop"]["drop_pp"], abs=1.0)
    assert summary.kept == summary.read == 2 * 2 * CLASSES * PER_CELL
    rows = list(csv.DictReader((inputs / "out" / "models.csv").open()))
    assert [row["model"] for row in rows] == ["far", "background"]
    assert float(rows[0]["matched_common"]) - float(rows[0]["matched_counter"]) == pytest.approx(
        float(rows[0]["matched_drop_pp"]) / 100
    )
    assert len((inputs / "out" / "per_class.csv").read_text().splitlines()) == 1 + 2 * CLASSES
    for name in ("join-far.svg", "join-background.png", "parts.svg"):
        assert (inputs / "out" / "figures" / name).stat().st_size > 5000
    joined = store.read_table(str(inputs / "out" / "photos" / "far.parquet"))
    known = dict(
        zip(*store.read_table(str(inputs / "queries.parquet")).select([0, 1]).to_pydict().values(), strict=True)
    )
    assert all(
        known[uid] == s for uid, s in zip(joined["uid"].to_pylist(), joined["similarity"].to_pylist(), strict=True)
    )


def test_one_model_stands_at_the_top_level_and_columns_can_differ(inputs: Path) -> None:
    words = {"predictions": (f"{inputs}/far.parquet",), "scores": (f"{inputs}/queries.parquet",)}
    join.run(settings(inputs, **words, column=("tau",), draws=5))
    result = json.loads((inputs / "out" / "join.json").read_text())
    assert result["model"] == "far"
    assert result["exposure"]["mean_similarity"]["common"] == pytest.approx(0.6, abs=0.01)
    join.run(settings(inputs, column=("similarity", "far=tau"), draws=5))
    models = json.loads((inputs / "out" / "join.json").read_text())["models"]
    assert models["far"]["exposure"]["mean_similarity"]["common"] == pytest.approx(0.6, abs=0.01)
    assert models["background"]["exposure"]["mean_similarity"]["common"] == pytest.approx(0.7, abs=0.01)


def test_photos_that_are_not_compared_are_counted(inputs: Path) -> None:
    predictions, queries = photos(0.0, 1.0)
    names = predictions["group"].to_pylist()
    names[:3] = ["other"] * 3
    predictions = predictions.set_column(2, "group", pa.array(names))
    store.write_table(str(inputs / "p.parquet"), predictions)
    store.write_table(str(inputs / "q.parquet"), queries.slice(0, 900))
    words = {"predictions": (f"{inputs}/p.parquet",), "scores": (f"{inputs}/q.parquet",), "draws": 3}
    summary = join.run(settings(inputs, **words))
    assert summary.read == 1200
    assert summary.dropped["not_scored"] == 300
    assert summary.kept + sum(summary.dropped.values()) == summary.read


def test_groups_without_overlap_are_refused_and_named(inputs: Path) -> None:
    predictions, queries = photos(0.0, 1.0)
    at = {
        uid: group for uid, group in zip(predictions["uid"].to_pylist(), predictions["group"].to_pylist(), strict=True)
    }
    far = np.array([at[uid] == "counter" for uid in queries["uid"].to_pylist()])
    moved = queries["similarity"].to_numpy() - 0.9 * far
    store.write_table(str(inputs / "q.parquet"), queries.set_column(1, "similarity", pa.array(moved)))
    words = {"predictions": (f"{inputs}/far.parquet",), "scores": (f"{inputs}/q.parquet",), "draws": 3}
    summary = join.run(settings(inputs, **words))
    found = summary.extra["models"]["far"]
    assert found["decomposition"] is None
    assert "common support" in found["warnings"][0]
    assert (inputs / "out" / "figures" / "join-far.svg").exists()


def test_bad_input_names_what_is_missing(inputs: Path) -> None:
    with pytest.raises(ConfigError, match=r"no scores for 'cats'; it has \['animals'\]"):
        join.run(settings(inputs, test="cats"))
    with pytest.raises(ConfigError, match="'near=x' names no model"):
        join.run(settings(inputs, scores=("near=x",)))
    with pytest.raises(ConfigError, match=r"not clear for \['background'\]"):
        join.run(settings(inputs, scores=(f"far={inputs}/scores",)))
    with pytest.raises(DataError, match=r"lacks the columns \['gap'\]"):
        join.run(settings(inputs, column=("gap",)))
    with pytest.raises(DataError, match="groups are common, counter"):
        join.run(settings(inputs, groups=("easy", "hard")))
    other = store.read_table(f"{inputs}/queries.parquet").to_pydict()
    other["uid"] = [f"{i + 10**6:032x}" for i in range(len(other["uid"]))]
    store.write_table(f"{inputs}/other.parquet", pa.table(other))
    with pytest.raises(DataError, match="share no image: 1200 predictions, 1200 scored"):
        join.run(settings(inputs, scores=(f"{inputs}/other.parquet",)))
    other["tau"] = [float("nan")] * len(other["uid"])
    store.write_table(f"{inputs}/other.parquet", pa.table(other))
    with pytest.raises(DataError, match="1200 of 1200 images have no tau"):
        join.run(settings(inputs, scores=(f"{inputs}/other.parquet",), column=("tau",)))
    with pytest.raises(ConfigError, match="is no share"):
        DropJoinSettings.load({**settings(inputs).model_dump(), "min_overlap": 2}, "join")
