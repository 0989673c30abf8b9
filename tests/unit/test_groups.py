"""Groups of any name on the page: which is the base, what is compared, a section per grouped test set."""

import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib import pyplot

from clipgap_ray import store
from clipgap_ray.config.report import ReportSettings
from clipgap_ray.config.study import StudyFile
from clipgap_ray.errors import ConfigError
from clipgap_ray.reporting import groups, joined, sections_shift, similarity, tables_groups, theme, variants
from clipgap_ray.reporting.study import Study
from clipgap_ray.stages import report
from tests.unit.study_fixture import CLASSES, Built, build_study

EMPTY = {"light.svg": b"", "dark.svg": b"", "light.png": b""}
TEST = "counteranimal"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    return build_study(tmp_path_factory.mktemp("study"), pool_rows=160, test_rows=80, num_supervised=1)


def regrouped(built: Built, root: Path, names: list[str]) -> Path:
    """The study with other groups for the photos of its grouped test set."""
    shutil.copytree(built.root, root)
    for path in (root / "eval").glob(f"*/{TEST}.parquet"):
        table = pq.read_table(path)
        column = table.column_names.index("group")
        store.write_table(str(path), table.set_column(column, "group", pa.array(names, pa.string())))
    start = 0
    for path in sorted((root / "embed" / TEST / "metadata").glob("*.parquet")):
        table = pq.read_table(path)
        own = pa.array(names[start : start + table.num_rows], pa.string())
        store.write_table(str(path), table.set_column(table.column_names.index("group"), "group", own))
        start += table.num_rows
    return root


@pytest.fixture(scope="module")
def nights(built, tmp_path_factory) -> Path:
    """Counter photos are of the day, and more of them; common ones of the night."""
    names = ["night" if group == "common" else "day" for group in built.tests[TEST].groups]
    assert names.count("night") != names.count("day")
    return regrouped(built, tmp_path_factory.mktemp("nights") / "s", names)


@pytest.fixture(scope="module")
def seasons(built, tmp_path_factory) -> Path:
    """Four groups and photos of none; winter has photos of one class only, and another shares no class with spring."""
    labels, winter = built.tests[TEST].labels, CLASSES.index("owl")
    rng = np.random.default_rng(0)
    names = np.where(rng.random(len(labels)) < 0.6, "spring", "summer")
    names[(labels == winter) & (rng.random(len(labels)) < 0.5)] = "winter"
    names[labels == CLASSES.index("cup")] = "alone"
    names[:3] = ""
    return regrouped(built, tmp_path_factory.mktemp("seasons") / "s", names.tolist())


def section(page: str, anchor: str) -> str:
    found = page.split(f'<section id="{anchor}"')[1].split("</section>")[0]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", found)).replace("\u00a0", " ")


def written(root: Path, monkeypatch, **more) -> str:
    monkeypatch.setattr(report.page, "render", lambda draw: pyplot.close(draw(theme.LIGHT)) or EMPTY)
    out = root / "report"
    summary = report.run(ReportSettings(study=str(root), out=str(out), gallery_rows=1, draws=20, images=False, **more))
    assert "groups" not in summary.extra["missing"]
    return (out / "index.html").read_text()


def test_the_base_is_named_or_common_or_the_largest() -> None:
    names = ["b", "a", "b", "", "c", "a", "b"]
    assert groups.ordered(names) == ("b", "a", "c")
    assert groups.ordered(names, ("c",)) == ("c", "b", "a")
    assert groups.ordered(["counter", "x", "x", "x", "common", "counter"]) == ("common", "counter", "x")
    assert groups.ordered(["common", "counter"], ("counter", "common")) == ("counter", "common")
    assert groups.ordered(["only", "only", ""]) == groups.ordered([]) == ()
    with pytest.raises(ConfigError, match=r"no photo is of the group 'd'; groups are \['a', 'b', 'c'\]"):
        groups.ordered(names, ("d",))


def test_two_groups_of_other_names_have_their_page(built, nights, monkeypatch) -> None:
    before = {r["arm"]: r for r in tables_groups.group_shift(Study.open(str(built.root)), 20, 0)}
    study = Study.open(str(nights))
    names = built.tests[TEST].groups
    base = "night" if names.count("common") > names.count("counter") else "day"
    assert groups.of_test(study, TEST)[0] == base
    study.groups[TEST] = ("night", "day")
    groups.of_test.cache_clear()
    for record in tables_groups.group_shift(study, 20, 0):
        assert record["groups"] == ["night", "day"]
        assert record["drop"] == before[record["arm"]]["drop"]
    page = written(nights, monkeypatch, groups=(f"{TEST}=night",))
    shown = section(page, "groups")
    assert f"Groups of {TEST}" in shown
    full = next(r for r in before.values() if r["arm"] == "full")
    drop = f"{full['drop']['drop_pp']:.1f}".replace("-", "−")
    assert f"full drops {drop} points" in shown
    assert "day photos lie" in shown
    assert "Accuracy per class and group, full" in shown
    assert "day photos are merely farther from the training data" in section(page, "hypotheses")
    assert "common" not in section(page, "hypotheses")
    assert "night" in section(page, "drop-similarity") or "day photos lie" in section(page, "drop-similarity")


def test_every_group_is_compared_with_the_base(built, seasons, monkeypatch) -> None:
    study = Study.open(str(seasons))
    assert groups.of_test(study, TEST)[0] == "spring"
    records = [r for r in tables_groups.group_shift(study, 20, 0) if r["arm"] == "full"]
    assert {tuple(r["groups"]) for r in records} == {("spring", "summer"), ("spring", "winter")}  # "alone" shares none
    right, names = study.predictions("full-s0", TEST).correct, np.array(study.predictions("full-s0", TEST).groups)
    owls = built.tests[TEST].labels == CLASSES.index("owl")
    winter = next(r for r in records if r["groups"][1] == "winter")
    by_hand = right[owls & (names == "spring")].mean() - right[owls & (names == "winter")].mean()
    assert winter["drop"]["drop_pp"] == pytest.approx(100 * by_hand)
    assert winter["num_classes"] == 1
    cells = [c for c in tables_groups.group_accuracy(study) if c["arm"] == "full"]
    assert sum(c["num_images"] for c in cells) == 77  # three photos are of no group
    cell = next(c for c in cells if (c["class_name"], c["group"]) == ("owl", "winter"))
    assert cell["accuracy"] == pytest.approx(right[owls & (names == "winter")].mean())
    # Winter is worse, but of one class: two groups are compared by the classes that most of them have.
    assert winter["drop"]["drop_pp"] > max(r["drop"]["drop_pp"] for r in records if r is not winter)
    assert groups.compared(study, TEST) == ("spring", "summer")
    assert {tuple(r["groups"]) for r in joined.joins(study, 5, 0)} == {("spring", "summer")}
    assert {(e["first"], e["second"]) for e in similarity.exposure(study)} == {
        ("spring", name) for name in ("summer", "winter", "alone")
    }
    assert variants.of_study(study, 20, 0) == []
    shown = section(written(seasons, monkeypatch), "groups")
    assert "(2 groups are compared with spring)" in shown
    assert "summer photos lie" in shown
    for record in records:
        assert f"full {record['groups'][1]}" in shown
    tables = {path.stem for path in (seasons / "report" / "tables").glob("*.csv")}
    assert {"group_accuracy", "group_shift", "group_shift_per_class"} <= tables
    flat = pq.read_table(seasons / "report" / "tables" / "group_shift.parquet").to_pylist()
    assert {(r["first"], r["second"]) for r in flat} == {("spring", "summer"), ("spring", "winter")}


def test_many_groups_are_rows_and_no_columns() -> None:
    about = {"test": "t", "arm": "a", "model": "m", "supervised": False, "num_samples_seen": 1}
    cells = [{**about, "class_name": "c", "group": f"g{i}", "num_images": 3, "accuracy": 0.5, "low": 0.1, "high": 0.9}
             for i in range(sections_shift.MAX_COLUMNS + 1)]  # fmt: skip
    assert sections_shift._cells(cells) == []
    assert len(sections_shift._cells(cells[1:])[0].headers) == sections_shift.MAX_COLUMNS + 1


def test_groups_that_are_not_there_are_refused(nights, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="--groups names 'cats'"):
        written(nights, monkeypatch, groups=("cats=a,b",))
    with pytest.raises(ConfigError, match=rf"{TEST}: no photo is of the group 'dusk'"):
        written(nights, monkeypatch, groups=(f"{TEST}=day,dusk",))
    with pytest.raises(ConfigError, match="a group twice"):
        ReportSettings.load({"study": "s", "groups": (f"{TEST}=day,day",)}, "report")


def test_a_study_names_the_groups_of_its_test_sets() -> None:
    words = {"name": "s", "data": {"pool": "p", "reference": "r", "tests": {"val": "v", "cam": "c"}},
             "runs": [{"split": "full"}]}  # fmt: skip
    file = StudyFile.load({**words, "groups": {"cam": ["day", "night", "dusk"]}}, "study")
    assert (file.pair("cam"), file.pair("val")) == (("day", "night"), ("common", "counter"))
    with pytest.raises(ConfigError, match="groups names no test set"):
        StudyFile.load({**words, "groups": {"cat": ["day", "night"]}}, "study")
    with pytest.raises(ConfigError, match="two different groups"):
        StudyFile.load({**words, "groups": {"cam": ["day"]}}, "study")
