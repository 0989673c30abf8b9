"""A rendered miniature world through score, discover, shift, join and report: is what its knob planted found again?

The encoder is cheap: the projection of the picture beside a hint of what is shown, from the truth, so that a photo
lies nearest to pictures of its class before its background. The labels of backgrounds are the truth's. The model is a
vote of the nearest training pictures, which learns what the pool holds and needs no training; two others are made so
that only similarity, or only the background, decides whether they are right.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from matplotlib import pyplot

from clipgap_ray import schema, store, world
from clipgap_ray.config.groups import DiscoverSettings
from clipgap_ray.config.join import DropJoinSettings
from clipgap_ray.config.report import ReportSettings
from clipgap_ray.config.score import ScoreSettings
from clipgap_ray.config.shift import ShiftSettings
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.reporting import conclusions, joined, theme
from clipgap_ray.reporting.study import Study
from clipgap_ray.stages import discover, join, report, score, shift
from clipgap_ray.world.classes import BACKGROUNDS, CLASSES
from tests import made

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

TEST = "counteranimal"
VOTES = 7
HINT = 0.25  # length of the class's share of a row beside the picture's of 1
PLANTED, NOTHING = 0.9, 0.0
ANIMALS = sum(info.is_animal for info in CLASSES)
EMPTY = {"light.svg": b"", "dark.svg": b"", "light.png": b""}
GOLDEN = 0.6180339887498949


class Rendered:
    """A study of a rendered world: pool and grouped photos embedded, scored and labelled."""

    def __init__(self, root: Path, correlation: float) -> None:
        spec = dataclasses.replace(
            world.preset("tiny", rows=1200, seed=5), correlation=correlation, counter_rows=24, reference_rows=1,
            test_rows=1, leak_rate=0.0, exact_rate=0.0, near_rate=0.0, style_shares=(("photo", 1.0),), difficulty=0.0,
            distant_rate=0.0,
        )  # fmt: skip
        self.root = root
        rendered = made.render_world(root / "world", spec)
        truth = {row["uid"]: row for row in rendered.of("pool")}
        self.pool = self._embed(rendered.path("pool"), "pool", {uid: row["label"] for uid, row in truth.items()})
        self.photos = self._embed(rendered.path(TEST), TEST, {})
        self.facts = self.photos.all_metadata(["uid", "label", "class_name", "group"])
        self.uids = self.facts["uid"].to_pylist()
        shown = {(row["class_name"], row["group"]): row["background"] for row in rendered.of(TEST)}
        names, groups = (self.facts[column].to_pylist() for column in ("class_name", "group"))
        behind = [shown[key] for key in zip(names, groups, strict=True)]
        store.write_table(self.path("photos.parquet"), pa.table({"uid": self.uids, "attribute": behind}))
        grounds = {uid: row["background"] for uid, row in truth.items() if row["background"] in BACKGROUNDS}
        made.write_attributes(self.path("labels"), self.pool, grounds, BACKGROUNDS)
        words = {"pool": self.pool.uri, "test": (f"{TEST}={self.photos.uri}",), "k": 20}
        score.run(ScoreSettings(**words, out=self.path("scores"))).check()
        self.queries = store.read_table(self.path("scores", "queries", f"{TEST}.parquet"))
        assert self.queries["uid"].to_pylist() == self.uids
        self.label_of = {int(row): truth[uid]["label"] for row, uid in self._rows(self.pool)}

    def path(self, *names: str) -> str:
        return str(self.root.joinpath(*names))

    def _embed(self, source: str, name: str, labels: dict[str, int]) -> EmbeddingSet:
        plain = EmbeddingSet.open(made.embed_without_ray(source, self.path("plain", name)))
        metadata = [plain.metadata(part.number) for part in plain.parts]
        uids = [table["uid"].to_pylist() for table in metadata]
        own = [[labels.get(uid, at) for uid, at in zip(u, t["label"].to_pylist(), strict=True)]
               for u, t in zip(uids, metadata, strict=True)]  # fmt: skip
        rows = [hinted(plain.images(part.number), np.array(at)) for part, at in zip(plain.parts, own, strict=True)]
        columns = {c: [t[c].to_pylist() for t in metadata] for c in ("caption", "label", "class_name", "group")}
        return made.write_embeddings(self.path("embed", name), rows, uids, **columns)

    @staticmethod
    def _rows(rows: EmbeddingSet) -> list[tuple[int, str]]:
        table = rows.all_metadata(["row_id", "uid"])
        return list(zip(table["row_id"].to_pylist(), table["uid"].to_pylist(), strict=True))

    def vote(self) -> np.ndarray:
        """Labels that most of the nearest pool rows have; pictures of nothing have no vote."""
        near = [[self.label_of[row] for row in ids[:VOTES]] for ids in self.queries["nearest_row_ids"].to_pylist()]
        return np.array([np.bincount([at for at in own if at >= 0] or [0]).argmax() for own in near])

    def predict(self, run: str, given: np.ndarray) -> str:
        """Write a run's (n,) labels as `evaluate` does."""
        labels = self.facts["label"].to_numpy()
        count = len(labels)
        values: dict[str, Any] = {field.name: pa.nulls(count, field.type) for field in schema.PREDICTIONS}
        values |= {name: self.facts[name].combine_chunks() for name in ("uid", "group", "class_name", "label")}
        values |= {"prediction": pa.array(given, pa.int32()), "correct": pa.array(given == labels)}
        path = self.path("eval", run, f"{TEST}.parquet")
        store.write_table(path, pa.table(values, schema=schema.PREDICTIONS))
        return path

    def outcomes(self, chance: np.ndarray) -> np.ndarray:
        """Labels that are right with (n,) chances, with as little luck as there can be: within a class and group the
        photos take evenly spread numbers in the order of their similarity."""
        cell = [f"{name} {group}" for name, group in zip(*(self.facts[c].to_pylist() for c in ("class_name", "group")),
                                                         strict=True)]  # fmt: skip
        order = np.lexsort((self.similarity, cell))
        luck = np.empty(len(order))
        luck[order] = (np.arange(len(order)) * GOLDEN + 0.5) % 1
        labels = self.facts["label"].to_numpy()
        return np.where(luck < chance, labels, (labels + 1) % len(CLASSES))

    @property
    def similarity(self) -> np.ndarray:
        return self.queries["similarity"].to_numpy()

    @property
    def counter(self) -> np.ndarray:
        return np.array(self.facts["group"].to_pylist()) == "counter"

    def study(self, run: str) -> dict[str, Any]:
        """What study.json says of one run on the whole pool."""
        entry = {"name": run, "split": "full", "objective": "clip", "train_on": "pool", "seed": 0, "model": "vote"}
        return {"name": "rendered", "tests": [TEST], "main_test": TEST, "base_split": "full", "splits": [],
                "runs": [entry]}  # fmt: skip


def hinted(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(n, d + classes) float16 unit rows: the picture's and its class's; -1 has no class."""
    hint = HINT * (labels[:, None] == np.arange(len(CLASSES)))
    both = np.concatenate([rows.astype(np.float32), hint.astype(np.float32)], axis=1)
    return (both / np.linalg.norm(both, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn once and not written: that takes longer than all the rest."""
    for module in (join, discover, shift):
        monkeypatch.setattr(module, "render", lambda draw: EMPTY)
    monkeypatch.setattr(report.page, "render", lambda draw: pyplot.close(draw(theme.LIGHT)) or EMPTY)


@pytest.fixture(scope="module")
def correlated(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    return Rendered(tmp_path_factory.mktemp("correlated"), PLANTED)


@pytest.fixture(scope="module")
def uncorrelated(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    return Rendered(tmp_path_factory.mktemp("uncorrelated"), NOTHING)


def found_by(made_world: Rendered) -> dict[str, Any]:
    """Everything that looks for backgrounds, on the vote, and what the page says."""
    predictions = (f"vote={made_world.predict('vote', made_world.vote())}",)
    attributes, out = made_world.path("photos.parquet"), made_world.path
    shift.run(ShiftSettings(predictions=predictions, out=out("shift"), draws=500)).check()
    discover.run(DiscoverSettings(predictions=predictions, attributes=attributes, out=out("discover"))).check()
    join.run(
        DropJoinSettings(predictions=predictions, scores=(out("scores"),), test=TEST, out=out("join"), draws=20,
                         pool=made_world.pool.uri, attributes=attributes, pool_attributes=out("labels"))
    ).check()  # fmt: skip
    store.write_json(out("study.json"), made_world.study("vote"))
    report.run(ReportSettings(study=str(made_world.root), draws=100, images=False)).check()
    results = {name: json.loads(Path(out(name, f"{name}.json")).read_text()) for name in ("shift", "discover", "join")}
    results["page"] = Path(out("report", "index.html")).read_text().replace("\u00a0", " ")
    table = store.read_table(out("report", "tables", "planted_truth.parquet")).to_pylist()
    results["planted"] = {row["what"]: row for row in table}
    return results


def test_at_high_correlation_the_report_finds_the_planted_backgrounds(correlated: Rendered) -> None:
    found = found_by(correlated)
    assert found["shift"]["intervals"]["drop_pp_classes"][0] > 10
    by_labels = found["planted"]["habitual backgrounds by the pool's labels"]
    assert by_labels["planted"] == by_labels["found"] == ANIMALS
    assert by_labels["not_planted"] == 0
    habitual = {info.name: info.habitual for info in CLASSES}
    for record in found["join"]["prevalence"]["classes"]:
        assert record["more_common"] == "common"
        assert record["common_background"] == habitual[record["class_name"]]
    # A class of 12 photos per background in the half that chooses shows a large drop only.
    by_accuracy = found["planted"]["habitual backgrounds by the accuracy of vote"]
    assert by_accuracy["found"] >= ANIMALS / 2
    assert by_accuracy["not_planted"] == 0
    assert f"In {ANIMALS} of {ANIMALS} classes the pool has more images of the common background, beyond chance in " \
           f"{ANIMALS}" in found["page"]  # fmt: skip
    assert f"habitual backgrounds by the pool&#39;s labels in {TEST} {ANIMALS} of {ANIMALS};" in found["page"]


def test_without_correlation_the_report_finds_none(uncorrelated: Rendered) -> None:
    found = found_by(uncorrelated)
    low, high = found["shift"]["intervals"]["drop_pp_classes"]
    assert low < 0 < high
    for record in found["planted"].values():
        assert (record["planted"], record["found"], record["not_planted"]) == (0, 0, 0), record["what"]
    assert "classes the pool has more images of the common background, in none beyond chance" in found["page"]
    assert f"habitual backgrounds by the pool&#39;s labels in {TEST}: none planted, none found" in found["page"]


def test_the_decomposition_tells_a_world_of_similarity_from_one_of_background(correlated: Rendered) -> None:
    """Counter photos lie farther in both: where only distance decides all of the drop is explained, where only the
    background decides nothing is."""
    z = (correlated.similarity - correlated.similarity.mean()) / correlated.similarity.std()
    chances = {
        "similarity": 1 / (1 + np.exp(-(0.5 + 2 * z))),
        "background": np.where(correlated.counter, 0.45, 0.85),
    }
    paths = {name: correlated.predict(name, correlated.outcomes(chance)) for name, chance in chances.items()}
    settings = DropJoinSettings(
        predictions=tuple(f"{name}={path}" for name, path in paths.items()), scores=(correlated.path("scores"),),
        test=TEST, out=correlated.path("two"), draws=100,
    )  # fmt: skip
    join.run(settings).check()
    result = json.loads(Path(correlated.path("two", "join.json")).read_text())["models"]
    for name, zero, whole in (("similarity", "residual", "explained"), ("background", "explained", "residual")):
        parts, drop = result[name]["decomposition"], result[name]["drop"]["drop_pp"]
        assert result[name]["exposure"]["interval"][0] > 0, "counter photos lie farther"
        assert result[name]["drop"]["interval_pp"][0] > 5
        assert parts[f"{whole}_interval_pp"][0] > 0
        assert parts[f"{zero}_interval_pp"][0] < 0 < parts[f"{zero}_interval_pp"][1]
        assert parts[f"{whole}_pp"] == pytest.approx(drop, abs=0.15 * drop)
        assert parts["explained_pp"] + parts["residual_pp"] == pytest.approx(drop, abs=1)
    for name in chances:
        study = Study(str(correlated.root), correlated.study(name))
        said = conclusions.on_join(joined.joins(study, 100, 0))
        share = result[name]["decomposition"]["share"]
        assert f"{conclusions.percent(share, 0)} of the drop" in said
