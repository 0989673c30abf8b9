"""Where compared test sets were asked with different prompts the page says so, and only there."""

import json
import re
import shutil

import pytest

from clipgap_ray.config.report import ReportSettings
from clipgap_ray.reporting import prompts, variants
from clipgap_ray.reporting.study import Study
from clipgap_ray.stages import report
from tests.unit.study_fixture import TESTS, build_study

EMPTY = {"light.svg": b"", "dark.svg": b"", "light.png": b""}
ONE, EIGHTY, OWN = (next(digest for digest, words in variants.PROMPTS.items() if words == wanted)
                    for wanted in ("a photo of a {c}.", "OpenAI's 80", "A photo of {c}."))  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_study(tmp_path_factory.mktemp("study"), pool_rows=120, test_rows=40, num_supervised=2)


def asked(root, digests: dict[str, str], runs: str = "*") -> Study:
    """Write what `evaluate` says of the prompts beside every result of some runs."""
    for run in sorted((root / "eval").glob(runs)):
        for test, digest in digests.items():
            (run / f"{test}.json").write_text(json.dumps({"dataset": test, "templates_sha256": digest}))
    return Study.open(str(root))


def test_prompts_that_differ_are_a_caution(built, tmp_path) -> None:
    shutil.copytree(built.root, tmp_path / "s")
    study = asked(tmp_path / "s", {"val": ONE, "sketch": ONE, "counteranimal": OWN})
    records = prompts.asked_with(study)
    assert {r["test"] for r in records} == set(TESTS)
    assert not any(r["arm"].startswith("supervised") for r in records), "classifiers know no prompts"
    assert prompts.caution(records, ["val", "sketch"]) == ""
    assert prompts.caution(records, ["counteranimal"]) == ""
    assert prompts.caution(records, ["val", "sketch", "counteranimal"]) == (
        "Caution: asked with different prompts, \u201ca photo of a {c}.\u201d for val, sketch; "
        f"\u201cA photo of {{c}}.\u201d for counteranimal. {prompts.CAUTION}"
    )


def test_models_that_were_asked_differently_about_one_set_are_named(built, tmp_path) -> None:
    shutil.copytree(built.root, tmp_path / "s")
    asked(tmp_path / "s", {"val": EIGHTY})
    study = asked(tmp_path / "s", {"val": "e" * 64}, "gap-val-s0")
    said = prompts.caution(prompts.asked_with(study), ["val"])
    assert said.startswith("Caution: asked with different prompts, OpenAI's 80 for val (full, gap-sketch, ")
    assert "; set eeeeeeee for val (gap-val). " in said


def test_results_without_a_record_of_prompts_say_nothing(built) -> None:
    assert prompts.asked_with(Study.open(str(built.root))) == []
    assert prompts.caution([], ["val", "sketch"]) == ""


def test_the_page_has_the_caution_beside_what_it_compares(built, tmp_path, monkeypatch) -> None:
    shutil.copytree(built.root, tmp_path / "s")
    asked(tmp_path / "s", {"val": ONE, "sketch": ONE, "counteranimal": EIGHTY})
    monkeypatch.setattr(report.page, "render", lambda draw: EMPTY)
    report.run(ReportSettings(study=str(tmp_path / "s"), gallery_rows=1, draws=20, images=False))
    page = (tmp_path / "s" / "report" / "index.html").read_text()
    found = dict(re.findall(r'<section id="([a-z-]+)"(.*?)</section>', page, re.S))
    assert {anchor for anchor, text in found.items() if "Caution: asked with" in text} == {
        "table", "robustness", "groups"
    }  # fmt: skip
    assert "the drop between them is not touched" in found["groups"]
    assert (tmp_path / "s" / "report" / "tables" / "prompts.csv").exists()
