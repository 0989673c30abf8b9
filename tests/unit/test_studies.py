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
    asked = study.analyses.model_dump()
    assert all(asked[name] for name in asked), "the full study asks for every analysis"
    assert study.probe_shots


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


def test_the_paper_s_study_has_the_paper_s_numbers():
    """train_test_similarity.md 2.9, 3 and 12.6."""
    study = StudyFile.load(read_yaml(str(STUDIES[0].with_name("laion400m.yaml"))), "laion400m")
    train = study.train
    assert train.batch_size * train.workers == 33_600
    assert abs(train.num_samples / (199_824_274 + 1_281_167) - 32) < 0.1  # epochs
    assert (train.model, train.lr, train.wd, train.beta2, train.eps) == ("ViT-B-32", 5e-4, 0.2, 0.98, 1e-6)
    assert (study.metric_model, study.min_similarity) == ("ViT-B-16-plus-240", 0.876)
    assert set(study.data.tests) == {"val", "v2", "sketch", "r", "a", "objectnet"}
    assert study.data.crop == {"objectnet": 2}


def test_the_core_set_study_compares_each_size_with_as_many_random_rows():
    study = StudyFile.load(read_yaml(str(STUDIES[0].with_name("coreset.yaml"))), "coreset")
    assert len(study.seeds) == 3
    for size in (4, 8, 16, 32, 64):
        assert float(study.splits[f"core-{size}"]["size"]) == 1 / size
        assert study.splits[f"random-{size}"] == {"kind": "random", "match": f"core-{size}"}
        assert study.splits[f"capped-{size}"] == {**study.splits[f"core-{size}"], "cap": "2.0"}
    assert {"full", *study.splits} == {run.split for run in study.runs}


def test_a_crop_of_no_test_set_is_refused():
    data = {"pool": "p", "reference": "r", "tests": {"val": "v"}, "crop": {"objectnet": 2}}
    with pytest.raises(ConfigError, match=r"data\.crop names no test set"):
        StudyFile.load({"name": "x", "data": data, "runs": [{"split": "full"}]}, "study.yaml")
