"""The join beside the pool: captions and backgrounds of neighbours, backgrounds against drops, adjusted robustness."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from clipgap_ray import store
from clipgap_ray.config.join import DropJoinSettings
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.kernels import neighbours
from clipgap_ray.reporting import theme
from clipgap_ray.stages import join
from tests import made

CLASSES = ("fox", "owl, barn owl", "crab", "cat", "boar", "hen")
BACKGROUNDS = ("grass", "rock")
PER_CELL = 30
#: Pool rows before (grass, rock) of every class; grass is the common background of every class.
POOL = {"fox": (60, 2), "owl, barn owl": (50, 4), "crab": (40, 8), "cat": (30, 10), "boar": (15, 15), "hen": (10, 20)}
DROPS = (0.6, 0.5, 0.4, 0.3, 0.1, 0.0)


def write_pool(folder: Path) -> list[tuple[str, str]]:
    """Two parts of captions with labels of `clipgap attributes`; returns (class, background) of every row."""
    rows = [(name, BACKGROUNDS[b]) for name, counts in POOL.items() for b in (0, 1) for _ in range(counts[b])]
    captions = [f"A {name.split(',')[-1].strip().title()} somewhere" for name, _ in rows]
    parts = (slice(0, 100), slice(100, len(rows)))
    uids = [f"{i:032x}" for i in range(len(rows))]
    pool = made.write_embeddings(
        str(folder / "pool"), [made.unit_rows(len(rows[p]), 8, 1) for p in parts], [uids[p] for p in parts],
        caption=[captions[p] for p in parts],
    )  # fmt: skip
    made.write_attributes(str(folder / "labels"), pool, dict(zip(uids, (b for _, b in rows), strict=True)), BACKGROUNDS)
    return rows


def row_id(at: int) -> int:
    return at if at < 100 else (1 << 32) + at - 100


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Common photos on grass and counter photos on rock; each photo's neighbours are rows of its class, on grass first.

    The last class has no neighbour of its own: its photos lie among cats.
    """
    folder = tmp_path_factory.mktemp("join")
    rows = write_pool(folder)
    rng = np.random.default_rng(0)
    photos, nearest = [], []
    for label, name in enumerate(CLASSES):
        near = "cat" if name == "hen" else name
        own = [row_id(i) for i, (other, _) in enumerate(rows) if other == near]
        for group in ("common", "counter"):
            for i in range(PER_CELL):
                right = rng.random() < 0.85 - DROPS[label] * (group == "counter")
                photos.append((label, name, group, right))
                nearest.append(own[:3] if i % 2 else own[:2] + own[-1:])
    uids = [f"{i + 5000:032x}" for i in range(len(photos))]
    predicted = [label if right else 3 for label, _, _, right in photos]  # wrong means: a cat
    base = {"uid": uids, "class_name": [p[1] for p in photos], "group": [p[2] for p in photos],
            "label": [p[0] for p in photos], "prediction": predicted}  # fmt: skip
    similarity = 0.6 + 0.1 * rng.random(len(photos))
    scores = {"uid": uids, "similarity": similarity, "nearest_row_ids": nearest}
    store.write_table(str(folder / "q.parquet"), pa.table(scores))
    for name, lift in (("clip", 0.0), ("weak", -0.25), ("middling", -0.1), ("strong", 0.1)):
        right = [p == label for p, label in zip(predicted, base["label"], strict=True)]
        flips = rng.random(len(photos)) < abs(lift)
        right = [r if not f else lift > 0 for r, f in zip(right, flips, strict=True)]
        store.write_table(str(folder / f"{name}.parquet"), pa.table({**base, "correct": right}))
    labels = pa.table({"uid": uids, "attribute": ["grass" if p[2] == "common" else "rock" for p in photos]})
    store.write_table(str(folder / "photos.parquet"), labels)
    return folder


def run(folder: Path, out: Path, **more) -> dict:
    words = {"predictions": (str(folder / "clip.parquet"),), "scores": (str(folder / "q.parquet"),), "test": "animals",
             "out": str(out), "draws": 20, "pool": str(folder / "pool"), "neighbours": 3, "far": 0.65,
             "attributes": str(folder / "photos.parquet"), "pool_attributes": str(folder / "labels")}  # fmt: skip
    join.run(DropJoinSettings.load({**words, **more}, "join")).check()
    return json.loads((out / "join.json").read_text())


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Drawing takes longer than everything else here; one run draws."""
    monkeypatch.setattr(join, "render", lambda draw: draw(theme.LIGHT) and {"light.svg": b"", "light.png": b""})


@pytest.fixture(scope="module")
def joined(world, tmp_path_factory) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("out")
    return run(world, out), out


def test_neighbours_are_told_apart_by_caption_and_background(joined) -> None:
    result, out = joined
    common, counter = result["neighbours"]["groups"]
    # Five of six classes lie among their own; grass comes first in the pool, a rock is the third of every second photo.
    assert common["names_class"] == counter["names_class"] == pytest.approx(5 / 6)
    assert common["same_background"] == pytest.approx((3 + 2) / 2 / 3)
    assert counter["same_background"] == pytest.approx((0 + 1) / 2 / 3)
    shares = {r["regime"]: r["num_images"] for r in counter["regimes"]}
    assert shares["well covered"] == shares["other background"] == 5 * PER_CELL // 2
    photos = store.read_table(str(out / "photos" / "clip.parquet")).to_pylist()
    hens = [p for p in photos if p["class_name"] == "hen"]
    assert {p["regime"] for p in hens if p["similarity"] < 0.65} == {"never seen"}
    assert {p["regime"] for p in hens if p["similarity"] >= 0.65} == {"wrong caption"}
    wrong = [p for p in hens if not p["correct"]]
    assert all(p["names_wrong"] == 3 for p in wrong)  # the model said cat, and cats are all around
    assert sum(r["num_images"] for r in counter["regimes"]) == 6 * PER_CELL
    with open(out / "neighbours.csv") as file:
        assert len(list(csv.DictReader(file))) == 8


def test_backgrounds_in_the_pool_are_counted_per_class_and_go_with_the_drops(joined) -> None:
    result, out = joined
    found = result["prevalence"]
    for record in found["classes"]:
        grass, rock = POOL[record["class_name"]]
        assert (record["common_background"], record["counter_background"]) == BACKGROUNDS
        assert (record["common_pool_rows"], record["counter_pool_rows"]) == (grass, rock)
        assert record["log_ratio"] == pytest.approx(np.log((grass + 0.5) / (rock + 0.5)))
    assert found["first_more_common"]["count"] == 4  # boar is even, hens stand on rocks
    # 10 of 30 is a coin's doing once in ten times.
    named = {record["class_name"]: record["more_common"] for record in found["classes"]}
    assert named == {name: "" if name in ("boar", "hen") else "common" for name in CLASSES}
    assert (found["first_beyond_chance"], found["second_beyond_chance"]) == (4, 0)
    assert found["spearman"] > 0.7
    assert found["interval"][0] <= found["spearman"] <= found["interval"][1]
    assert (out / "figures" / "prevalence.svg").exists()
    assert (out / "figures" / "neighbours.png").exists()


def test_residuals_stand_beside_those_of_matched_photos(world, undrawn, tmp_path) -> None:
    names = ("clip", "weak", "middling", "strong")
    words = tuple(f"{name}={world / name}.parquet" for name in names)
    result = run(world, tmp_path, predictions=words, baseline=("weak", "middling", "strong"), attributes="",
                 pool_attributes="", pool="")  # fmt: skip
    found = result["adjusted_robustness"]
    models = {m["model"]: m for m in found["models"]}
    assert [m["baseline"] for m in found["models"]] == [False, True, True, True]
    for name in names:
        matched = result["models"][name]["matched"]
        assert models[name]["matched_common"] == pytest.approx(matched["balanced"]["common"])
        assert models[name]["all_counter"] == pytest.approx(result["models"][name]["balanced"]["counter"])
    residuals = [models[name]["all_residual_pp"] for name in names[1:]]
    assert max(residuals) > 0 > min(residuals)
    assert (tmp_path / "figures" / "adjusted_robustness.svg").exists()
    with pytest.raises(ConfigError, match="a line needs two"):
        run(world, tmp_path, predictions=words, baseline=("weak",), attributes="", pool_attributes="", pool="")
    with pytest.raises(ConfigError, match="--baseline names"):
        run(world, tmp_path, baseline=("other",))


def test_bad_input_names_what_is_missing(world, undrawn, tmp_path) -> None:
    with pytest.raises(ConfigError, match="--pool, which is missing"):
        DropJoinSettings.load(
            {"predictions": ("p",), "scores": ("s",), "test": "t", "out": "o", "attributes": "a"}, "join"
        )
    with pytest.raises(ConfigError, match="belong together"):
        run(world, tmp_path, pool_attributes="")
    other = made.write_embeddings(str(tmp_path / "other"), [made.unit_rows(3, 8, 9)], [["0" * 31 + c for c in "abc"]])
    with pytest.raises(DataError, match=r"labels .*pool, not"):
        run(world, tmp_path, pool=other.uri)
    table = store.read_table(str(world / "q.parquet")).drop_columns("nearest_row_ids")
    store.write_table(str(tmp_path / "q.parquet"), table)
    with pytest.raises(DataError, match="names no neighbours"):
        run(world, tmp_path, scores=(str(tmp_path / "q.parquet"),))
    store.write_table(str(tmp_path / "l.parquet"), pa.table({"uid": ["f" * 32], "attribute": ["grass"]}))
    with pytest.raises(DataError, match="labels none of the"):
        run(world, tmp_path, attributes=str(tmp_path / "l.parquet"))


def test_regimes_by_hand() -> None:
    similarity = np.array([0.2, 0.9, 0.9, 0.2])
    names = np.array([[0, 0], [0, 0], [1, 0], [0, 1]], bool)
    same = np.array([[1, 1], [1, 1], [0, 1], [0, 1]], bool)
    found = neighbours.regimes(similarity, names, same, 0.5)
    assert [neighbours.REGIMES[i] for i in found] == ["never seen", "wrong caption", "other background", "well covered"]
    without = neighbours.regimes(similarity, names, None, 0.5)
    assert [neighbours.REGIMES[i] for i in without][2:] == ["well covered", "well covered"]


def test_no_ratio_without_rows_and_no_correlation_of_three_classes() -> None:
    counts = np.array([[3, 1], [0, 0], [2, 2], [1, 4]])
    found = neighbours.prevalence(counts, np.array([[0, 1], [0, 1], [0, -1], [0, 1]]), np.arange(4.0),
                                  np.random.default_rng(0))  # fmt: skip
    assert found["log_ratio"] == [pytest.approx(np.log(3.5 / 1.5)), None, None, pytest.approx(np.log(1.5 / 4.5))]
    assert found["first_more_common"]["rate"] == 0.5
    assert found["more_common"] == [0, None, None, 0]
    assert found["spearman"] is None


def test_more_common_than_chance_by_hand() -> None:
    p, sides = neighbours.more_common(np.array([[10, 0], [0, 9], [3, 1], [0, 0]]))
    assert p[:3] == pytest.approx([2 / 2**10, 2 / 2**9, 10 / 2**4])  # both tails of ten and nine coins; 3 or more of 4
    assert np.isnan(p[3])
    assert sides.tolist() == [1, -1, 0, 0]
    one, _ = neighbours.more_common(np.array([[6, 0]]))
    assert one == pytest.approx([2 / 2**6])
    # The same six of six do not survive beside a hundred classes without any difference.
    many = np.concatenate([[[6, 0]], np.full((100, 2), 3)])
    assert not neighbours.more_common(many)[1].any()
    assert neighbours.more_common(np.zeros((0, 2), int))[1].shape == (0,)
