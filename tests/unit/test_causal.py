"""What a report says of training on an equalised pool: the drop, its control, and no claim without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipgap_ray.kernels import shift
from clipgap_ray.reporting import causal, galleries, hypotheses, joined, sections, tables_groups
from clipgap_ray.reporting.numbers import Numbers, compute
from clipgap_ray.reporting.study import Study
from clipgap_ray.reporting.tables import lookup, outcomes
from clipgap_ray.reporting.theme import LIGHT
from tests.unit.study_fixture import build_study

EQUAL, CONTROL = "far-sketch-200", "random-200"
ROLES = ["whole pool", "equalised", "control"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose cuts are called an equalised pool and its control."""
    folder = tmp_path_factory.mktemp("causal")
    build_study(folder, seeds=(0, 1))
    _rename(folder, EQUAL, {"kind": "equalise", "tests": ["counteranimal"], "groups": ["common", "counter"]})
    _rename(folder, CONTROL, {"kind": "random", "match": f"splits/{EQUAL}.npy"})
    return folder


def _rename(folder: Path, split: str, facts: dict[str, Any]) -> None:
    path = folder / "splits" / f"{split}.recipe.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def _trials(folder: Path) -> list[dict[str, Any]]:
    study = Study.open(str(folder))
    shifts, joins = tables_groups.group_shift(study, 200, 0), joined.joins(study, 50, 0)
    return causal.trials(study, shifts, joins, 200, 0)


def test_every_role_has_its_drop_its_distance_and_its_change(root: Path) -> None:
    records, study = _trials(root), Study.open(str(root))
    assert [(r["role"], r["arm"]) for r in records] == list(zip(ROLES, ["full", EQUAL, CONTROL], strict=True))
    assert {(r["test"], r["split"], r["num_seeds"]) for r in records} == {("counteranimal", EQUAL, 2)}
    assert [r["rows"] for r in records] == [400, 200, 200]
    drops = {}
    for record in records:
        arm = next(arm for arm in causal._clips(study) if arm.label == record["arm"])
        found = outcomes(study, arm, "counteranimal")
        assert found is not None
        counts = shift.count(found[0].classes, found[0].groups, found[1].mean(axis=0))
        drops[record["role"]] = shift.balanced_drop_pp(counts)
        assert record["drop_pp"] == pytest.approx(drops[record["role"]])
        assert record["difference_low"] < record["difference"] < record["difference_high"]
    assert records[1]["change_pp"] is None
    for record in (records[0], records[2]):
        assert record["change_pp"] == pytest.approx(drops["equalised"] - drops[record["role"]])
        assert record["change_low_pp"] < record["change_pp"] < record["change_high_pp"]
        assert record["change_se_seeds_pp"] is not None
    value, low, high = causal.effect(records, "counteranimal") or (np.nan,) * 3
    control = records[2]
    assert (value, low, high) == (-control["change_pp"], -control["change_high_pp"], -control["change_low_pp"])


def test_a_control_of_another_cut_is_none(root: Path, tmp_path: Path) -> None:
    (tmp_path / "study").symlink_to(root)
    study = Study.open(str(tmp_path / "study"))
    recipe = dict(study.recipes()[CONTROL], match="splits/near-sketch-200.npy")
    study.recipes()[CONTROL] = recipe  # this object's only: recipes are read once
    treated = next(arm for arm in causal._clips(study) if arm.split == EQUAL)
    assert causal._controls(study, treated) == []


def test_the_sentence_claims_no_more_than_the_interval(root: Path) -> None:
    records = [dict(r) for r in _trials(root)]
    control = lookup(records, role="control")
    assert control is not None
    for ends, verdict in (((-9.0, -13.0, -5.0), "the images that lie nearer to one group make a part"),
                          ((-3.0, -8.0, 2.0), "within what photos and seeds do by chance"),
                          ((6.0, 1.0, 11.0), "nearer to one group does not lower it")):  # fmt: skip
        control["change_pp"], control["change_low_pp"], control["change_high_pp"] = ends
        text = causal.sentence(records)
        assert verdict in text
        assert f"{abs(ends[0]):.1f} [" in text
        assert ("less than" if ends[0] < 0 else "more than") in text
    alone = [r for r in records if r["role"] != "control"]
    assert "no control" in causal.sentence(alone)
    assert causal.effect(alone, "counteranimal") is None


def test_the_page_has_the_section_and_the_hypothesis_its_prediction(root: Path) -> None:
    study = Study.open(str(root))
    numbers: Numbers = compute(study, 0.05, 100, 0)
    assert [r["role"] for r in numbers.exports()["equalised_pool"]] == ROLES
    section = causal.section(numbers.trials)
    assert [len(table.rows) for table in section.tables] == [3]
    figure = section.plots[0].draw(LIGHT)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert [label.split("\n")[0] for label in labels] == ROLES
    shown = [p for p in numbers.hypotheses if p["prediction"] == "training on an equalised pool lowers the drop"]
    assert [p["hypothesis"] for p in shown] == ["exposure"]
    assert shown[0]["value"] == pytest.approx(causal.effect(numbers.trials, "counteranimal")[0])  # type: ignore[index]
    without = hypotheses.table(numbers.joins, [], {}, {})
    assert not [p for p in without if "equalised" in p["prediction"]]


def test_a_study_without_an_equalised_pool_has_no_section(tmp_path: Path) -> None:
    build_study(tmp_path)
    assert _trials(tmp_path) == []
    numbers = compute(Study.open(str(tmp_path)), 0.05, 50, 0)
    pictures = galleries.Thumbnails(Study.open(str(tmp_path)).embeddings, shown=False)
    assert "causal" not in {s.anchor for s in sections.build(Study.open(str(tmp_path)), numbers, pictures, 1)}
