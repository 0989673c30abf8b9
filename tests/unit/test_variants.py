"""One model asked in several ways: how results are told apart, found in a study, and put side by side."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from clipgap_ray import presets, store, testsets
from clipgap_ray.config.shift import ShiftSettings
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.reporting import sections_groups, theme, variants
from clipgap_ray.reporting.study import Study
from clipgap_ray.stages import shift
from tests.unit.study_fixture import build_study

TEST = "counteranimal"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A study whose full pool was also asked among 20 candidates, and two seeds of a cut, of which one was."""
    folder = tmp_path_factory.mktemp("study")
    build_study(folder, pool_rows=120, test_rows=60, seeds=(0, 1), num_supervised=1)
    for run in ("full-s0", "full-s1", "gap-val-s0"):
        table = pq.read_table(folder / "eval" / run / f"{TEST}.parquet")
        easier = np.array(table.column("correct")) | (np.arange(table.num_rows) % 5 == 0)
        table = table.set_column(table.column_names.index("correct"), "correct", [easier])
        store.write_table(str(folder / "eval" / run / f"{TEST}-1v20.parquet"), table)
        for name, more in ((TEST, {}), (f"{TEST}-1v20", {"candidates_sha256": "c" * 64, "dataset": f"{TEST}-1v20"})):
            said = {
                "dataset": name,
                "templates_sha256": next(iter(variants.PROMPTS)),
                "class_names_sha256": "a",
                **more,
            }
            store.write_json(str(folder / "eval" / run / f"{name}.json"), said)
    return folder


def test_the_digests_of_prompts_are_those_of_the_lists_they_name() -> None:
    lists = [
        ("A photo of {c}.",),
        (testsets.DEFAULT_TEMPLATE,),
        presets.templates("openai"),
        presets.templates("simple"),
    ]
    assert [store.digest(list(words)) for words in lists] == list(variants.PROMPTS)
    said = [variants.PROMPTS[store.digest(list(words))] for words in lists]
    assert said == [lists[0][0], lists[1][0], f"OpenAI's {len(lists[2])}", f"OpenAI's {len(lists[3])}"]


def test_a_result_says_how_it_was_asked() -> None:
    first = {"templates_sha256": next(iter(variants.PROMPTS)), "class_names_sha256": "a"}
    assert variants.describe(None, first) == ("", "")
    assert variants.describe(first, None) == ("A photo of {c}.", "all names")
    lists = {"dataset": "x-openai-1v20", "templates_sha256": "9" * 64, "candidates_sha256": "c"}
    assert variants.describe({**lists, "class_names_sha256": "b"}, first) == (
        "set 99999999",
        "lists of 20, other spellings",
    )
    assert variants.describe({"mask": {"classes": 200}, "templates_sha256": ""}, None) == ("", "200 names")


def test_a_study_s_further_results_stand_beside_the_first(root) -> None:
    study = Study.open(str(root))
    assert f"eval/full-s1/{TEST}-1v20" in {record["artefact"] for record in study.digests()}
    records = variants.of_study(study, 50, 0)
    # Only one of the cut's two seeds was asked again: no mean over seeds, so no row.
    assert [(r["arm"], r["variant"]) for r in records] == [("full", variants.FIRST), ("full", "1v20")]
    first, other = records
    assert first["change_pp"] is None
    assert other["candidates"] == "lists of 20"
    assert other["change_pp"] == pytest.approx(other["balanced_drop_pp"] - first["balanced_drop_pp"])
    right = np.mean([study.predictions(f"full-s{s}", f"{TEST}-1v20").correct for s in (0, 1)], axis=0)
    common = np.array(study.predictions("full-s0", TEST).groups) == "common"
    assert other["unbalanced_drop_pp"] == pytest.approx(100 * (right[common].mean() - right[~common].mean()))
    low, high = sorted(r[f"{kind}_drop_pp"] for r in records for kind in ("balanced", "unbalanced"))[::3]
    said = variants.sentence(records)
    assert f"{low:.1f} and {high:.1f}".replace("-", "−") in said


def test_ways_belong_to_the_longest_test_set_s_name(root, tmp_path) -> None:
    shutil.copytree(root, tmp_path / "s", ignore=shutil.ignore_patterns("world", "embed", "scores", "gaps"))
    info = json.loads((tmp_path / "s" / "study.json").read_text())
    store.write_json(str(tmp_path / "s" / "study.json"), {**info, "tests": ["counter", TEST, f"{TEST}-1v20"]})
    study = Study.open(str(tmp_path / "s"))
    assert study.ways("full-s0", TEST) == ()
    assert study.ways("full-s0", "counter") == ()


def test_photos_of_another_set_are_refused(root, tmp_path) -> None:
    shutil.copytree(root, tmp_path / "s", ignore=shutil.ignore_patterns("world", "embed", "scores", "gaps"))
    path = tmp_path / "s" / "eval" / "full-s0" / f"{TEST}-1v20.parquet"
    table = pq.read_table(path)
    store.write_table(str(path), table.set_column(1, "uid", [[f"{i:032x}" for i in range(table.num_rows)]]))
    with pytest.raises(DataError, match="share no photo"):
        variants.of_study(Study.open(str(tmp_path / "s")), 20, 0)


def test_the_command_writes_a_table_and_a_figure(root, tmp_path) -> None:
    paths = [str(root / "eval" / "full-s0" / f"{name}.parquet") for name in (TEST, f"{TEST}-1v20")]
    out = tmp_path / "o"
    shift.run(ShiftSettings(out=str(out), predictions=(f"b32={paths[0]}",), variants=(f"1v20={paths[1]}",), draws=50))
    result = json.loads((out / "shift.json").read_text())
    assert [row["variant"] for row in result["variants"]] == [variants.FIRST, "1v20"]
    assert result["variants"][0]["balanced_drop_pp"] == pytest.approx(result["drop"]["drop_pp"])
    assert (out / "variants.csv").read_text().splitlines()[2].startswith("b32,1v20,A photo of {c}.,lists of 20")
    assert (out / "variants.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"predictions": ("a=x",), "variants": ("b:1v20=y",)}, "of the models"),
        ({"predictions": ("a=x", "b=x"), "variants": ("1v20=y",)}, "of the models"),
        ({"predictions": ("a=x",), "variants": ("a:1v20",)}, "is not MODEL:VARIANT=FILE"),
        ({"predictions": ("a=x",), "variants": ("a:v=y", "v=z")}, "names 'v' of a twice"),
        ({"predictions": ("a=x", "a=y")}, "names 'a' twice"),
        ({"predictions": ("=x",)}, "neither FILE"),
        ({"table": "t.csv", "variants": ("a:v=y",)}, "a --table has no photos"),
    ],
)
def test_words_that_name_nothing_are_refused(values, message) -> None:
    with pytest.raises(ConfigError, match=message):
        ShiftSettings.load({"out": "o", **values}, "shift")


def test_the_section_has_a_table_per_model(root) -> None:
    records = variants.of_study(Study.open(str(root)), 50, 0)

    class Given:
        variants = records

    section = sections_groups.asked(Given)
    assert [len(table.rows) for table in section.tables] == [2]
    assert len(section.tables[0].rows[0]) == len(section.tables[0].headers)
    section.plots[0].draw(theme.LIGHT)
