"""How small may a pool be: what the report says of core sets beside the whole pool."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipgap_ray.reporting import core_sets, galleries, sections
from clipgap_ray.reporting.numbers import compute
from clipgap_ray.reporting.study import Study
from clipgap_ray.reporting.theme import LIGHT
from tests.unit.study_fixture import build_study

TESTS = ["val", "sketch"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose far-pruned pools are called core sets of two test sets, the random ones theirs."""
    folder = tmp_path_factory.mktemp("core")
    build_study(folder, seeds=(0, 1, 2))
    for size in (200, 100):
        _rename(folder, f"far-sketch-{size}", {"kind": "core", "tests": TESTS})
        _rename(folder, f"random-{size}", {"kind": "random", "match": f"splits/far-sketch-{size}.npy"})
    _rename(folder, "near-sketch-200", {"kind": "core", "tests": TESTS, "cap": "2.0"})
    return folder


def _rename(folder: Path, split: str, facts: dict[str, Any]) -> None:
    path = folder / "splits" / f"{split}.recipe.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def test_every_set_is_compared_with_the_whole_pool(root: Path) -> None:
    study = Study.open(str(root))
    records = core_sets.changes(study)
    assert [(r["kind"], r["split"], r["rows"], r["share"]) for r in records] == [
        ("core", "far-sketch-200", 200, 0.5), ("core", "far-sketch-100", 100, 0.25),
        ("capped", "near-sketch-200", 200, 0.5),
        ("random", "random-200", 200, 0.5), ("random", "random-100", 100, 0.25),
    ]  # fmt: skip
    accuracy = {
        (run.split, test): [np.mean(study.predictions(other.name, test).correct)  # type: ignore[union-attr]
                            for other in study.runs if other.split == run.split and other.objective == "clip"]
        for run in study.runs for test in TESTS
    }  # fmt: skip
    for record in records:
        own, whole = (np.mean([accuracy[split, test] for test in TESTS]) for split in (record["split"], "full"))
        assert (record["accuracy"], record["whole"]) == (pytest.approx(own), pytest.approx(whole))
        assert record["change_pp"] == pytest.approx(100 * (own - whole))
        assert record["low_pp"] < record["change_pp"] < record["high_pp"]
        assert record["num_seeds"] == 3


def test_what_was_trained_otherwise_is_not_compared(root: Path) -> None:
    study = Study.open(str(root))
    arms = {arm.split: arm for arm in core_sets.arms(study) if not arm.supervised}
    core = arms["far-sketch-200"]
    assert core_sets._whole(study, core) == arms["full"]
    for other in ({"num_samples_seen": 1}, {"model": "other"}, {"train_on": "elsewhere"}):
        assert core_sets._whole(study, replace(core, **other)) is None


def test_core_sets_of_other_test_sets_are_another_question(root: Path) -> None:
    records = [dict(r) for r in core_sets.changes(Study.open(str(root)))]
    records[1]["tests"] = "val"
    made = core_sets.section(records)
    assert [len(table.rows) for table in made.tables] == [4, 1]
    assert [plot.name for plot in made.plots] == ["core_sets", "core_sets_1"]
    assert "over 2 test sets" in made.conclusion
    assert "on val" in made.conclusion


def test_the_sentence_names_the_smallest_set_within_a_point(root: Path) -> None:
    records = [dict(r) for r in core_sets.changes(Study.open(str(root)))]
    for record, change in zip(records, (-0.5, -7.0, 2.0, -9.0, -20.0), strict=True):
        record |= {"change_pp": change, "low_pp": change - 3, "high_pp": change + 3}
    text = core_sets.sentence(records)
    assert (
        "over 2 test sets) is near-sketch-200, 200 images (50.0\u00a0% of the pool), +2.0\u00a0points [−1.0, +5.0]."
        in text
    )
    assert "Of the next smaller size the best is far-sketch-100, 100 images (25.0\u00a0% of the pool), −7.0" in text
    assert "not ruled out" not in text
    records[1]["change_pp"] = -1.0  # far-sketch-100 now is within a point, by its value alone
    text = core_sets.sentence(records)
    assert "is far-sketch-100" in text
    assert "a loss of more than a point is not ruled out" in text
    assert "next smaller" not in text
    for record in records:
        record["change_pp"] = -2.0
    assert core_sets.sentence(records).startswith("No smaller set comes within a point")


def test_the_page_has_section_figure_and_table(root: Path, tmp_path: Path) -> None:
    study = Study.open(str(root))
    numbers = compute(study, 0.05, 50, 0)
    assert len(numbers.exports()["core_sets"]) == 5
    made = core_sets.section(numbers.core_sets)
    assert [len(table.rows) for table in made.tables] == [5]
    (axis,) = made.plots[0].draw(LIGHT).axes
    legend = axis.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == list(core_sets.KINDS.values())
    pictures = galleries.Thumbnails(study.embeddings, shown=False)
    assert "core-sets" in {s.anchor for s in sections.build(study, numbers, pictures, 1)}
    build_study(tmp_path)
    other = Study.open(str(tmp_path))
    assert core_sets.changes(other) == []
    assert "core-sets" not in {s.anchor for s in sections.build(other, compute(other, 0.05, 50, 0), pictures, 1)}
