"""Every study file that ships is valid, before anything runs."""

from pathlib import Path

import pytest

from clipgap_ray.config.base import read_yaml
from clipgap_ray.config.study import StudyFile
from clipgap_ray.errors import ConfigError

STUDIES = sorted((Path(__file__).resolve().parents[2] / "studies").glob("*.yaml"))
WORLD = {"name": "x", "world": {"preset": "tiny"}}


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_shipped_study_is_valid(path):
    study = StudyFile.load(read_yaml(str(path)), path.name)
    names = [run.name for run in study.runs]
    assert len(set(names)) == len(names), "two runs would share a directory"
    clip = [run for run in study.runs if run.objective == "clip"]
    for compared in ([run for run in clip if run.reference], [run for run in clip if not run.reference]):
        assert len({run.num_samples for run in compared}) <= 1, "equal samples seen by what is compared"


def test_the_quick_study_has_what_its_report_shows():
    study = StudyFile.load(read_yaml(str(STUDIES[0].with_name("miniature.yaml"))), "miniature")
    splits = {run.split for run in study.runs}
    assert {"full", "gap-sketch", "near-val", "random", "far-val"} <= splits
    assert any(run.objective == "supervised" for run in study.runs)


def test_the_full_study_has_three_seeds_and_three_baselines():
    study = StudyFile.load(read_yaml(str(STUDIES[0].with_name("miniature_full.yaml"))), "full")
    assert len(study.seeds) == 3
    assert sum(run.objective == "supervised" for run in study.runs) == 3
    assert {"full", "none", *study.splits} == {run.split for run in study.runs}
    assert study.assert_effects


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": [{"split": "full"}], "splits": {"Bad Name": {"kind": "full"}}}, "Bad Name"),
        ({"runs": [{"split": "full"}], "splits": {"a": {"kind": "nearest"}}}, "'nearest', expected one of"),
        ({"runs": [{"split": "full"}], "splits": {"a": {"kind": "near", "test": ["v"], "sice": "1"}}}, "sice"),
        ({"runs": [{"split": "none"}]}, "first run must be the full pool"),
        ({"runs": [{"split": "full"}], "data": {"pool": "p", "reference": "r", "tests": {}}}, "one of `world` and"),
    ],
)
def test_an_impossible_study_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        StudyFile.load({**WORLD, **change}, "study.yaml")
