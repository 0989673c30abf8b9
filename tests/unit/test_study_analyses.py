"""What a study runs for its section `analyses`: refusals, the order of the steps, what a second run skips."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from clipgap_ray import store
from clipgap_ray.config.groups import DiscoverSettings
from clipgap_ray.config.study import StudyFile
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.reporting import found, variants
from clipgap_ray.reporting.study import Study
from clipgap_ray.stages import discover, join, study_analyses, study_data, study_groups
from clipgap_ray.stages.study_data import Data
from clipgap_ray.stages.study_step import Step
from tests import made
from tests.unit.study_extras import TEST, label
from tests.unit.study_fixture import Built, build_study

RUNS = [
    {"split": "full", "reference": True},
    {"split": "half"},
    {"split": "none", "objective": "supervised"},
    {"split": "none", "objective": "supervised", "num_samples": 100},
]
EVERYTHING = {
    "prompts": ["openai"],
    "candidates_k": 3,
    "linear_probe": True,
    "backgrounds": "backgrounds-miniature",
    "join": True,
    "masks": "world",
    "discover": True,
    "second_encoder": {"run": "half"},
}
EMPTY = {"light.svg": b"", "dark.svg": b"", "light.png": b""}


def study_file(analyses: dict[str, Any], **more: Any) -> StudyFile:
    values = {
        "name": "x", "world": {"preset": "tiny"}, "splits": {"half": {"kind": "random", "size": "0.5"}}, "runs": RUNS,
        **more,
    }  # fmt: skip
    return StudyFile.load({**values, "analyses": analyses}, "study.yaml")


# --- the file --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("analyses", "words"),
    [
        ({"discovr": True}, ["'analyses.discovr'", "did you mean 'discover'"]),
        ({"second_encoder": {"modell": "RN50"}}, ["second_encoder.modell", "did you mean 'model'"]),
        ({"second_encoder": {}}, ["needs one of run ('')", "{run: full}"]),
        ({"second_encoder": {"run": "full", "model": "RN50"}}, ["needs one of run ('full') and model ('RN50')"]),
        ({"second_encoder": {"run": "half", "pretrained": "openai"}}, ["'half' has its own weights"]),
        ({"second_encoder": {"run": "hafl"}}, ["'hafl'", "['full-with-reference', 'half']"]),
        ({"discover": True}, ["without backgrounds", "add backgrounds"]),
        ({"join": True, "test": "animals"}, ["'animals'", "counteranimal"]),
        ({"masks": "masks"}, ["'masks' without join", "join: true"]),
        ({"candidates_k": 1}, ["candidates_k is 1", "2 or more"]),
        ({"candidates_k": "many"}, ["analyses.candidates_k is 'many'"]),
        ({"prompts": ["a/short.txt", "b/short.txt"]}, ["twice", "rename a file"]),
        ({"prompts": ["a/Very Short.txt"]}, ["'Very Short' does not match"]),
    ],
)
def test_an_impossible_wish_is_refused(analyses: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        study_file(analyses)
    said = f"{caught.value} {caught.value.hint}"
    assert all(word in said for word in words), said


def test_a_world_without_groups_and_a_study_without_models_for_it_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"test sets are .*inverted"):
        study_file({"candidates_k": 3}, world={"kind": "digits", "preset": "tiny"})
    only = [{"split": "half"}]
    with pytest.raises(ConfigError, match=r"two supervised runs; runs are \['half'\]"):
        study_file({"join": True}, runs=only, metric_model="projection")
    supervised = [{"split": "none", "objective": "supervised"}]
    wanted = {"discover": True, "backgrounds": "backgrounds"}
    with pytest.raises(ConfigError, match="all runs are supervised"):
        study_file(wanted, runs=supervised, metric_model="projection")


def test_what_needs_the_data_is_refused_before_the_first_training(tiny_world: made.World, tmp_path: Path) -> None:
    data = data_of(tiny_world)
    for analyses, message in (
        ({"candidates_k": 1000}, "--candidates-k 1000"),
        ({"prompts": [str(tmp_path / "none.txt")]}, "none.txt"),
        ({"backgrounds": str(tmp_path / "none.yaml")}, "does not exist"),
        ({"second_encoder": {"model": "ViT-B-23", "pretrained": "x"}}, "unknown model"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            study_analyses.check(study_file(analyses), "out", data)
    study_analyses.check(study_file(EVERYTHING), "out", data)


# --- the steps -------------------------------------------------------------------------------------------


def data_of(world: made.World) -> Data:
    tests = {name: world.path("tests", name) for name in made.TESTS}
    return Data(world.path("pool"), world.path("reference"), {**tests, TEST: world.path(TEST)}, {"r": 2, TEST: 1})


def test_every_step_comes_after_what_it_reads(tiny_world: made.World) -> None:
    file = study_file({**EVERYTHING}, seeds=[4, 5], probe_shots=[1, 2])
    steps = study_analyses.steps(file, "out", data_of(tiny_world), ("conv-64", "out/runs/metric"), "cpu")
    titles = [step.title for step in steps]
    models = [f"{name}-s{seed}" for seed in (4, 5) for name in ("full-with-reference", "half")]
    everyone = [f"{run.name}-s{seed}" for seed in (4, 5) for run in file.runs]
    sets = ["pool", "reference", *made.TESTS, TEST]
    assert titles == [
        *(f"few-shot probe {name}" for name in models),
        *(f"linear probe {name}" for name in models),
        *(f"ask {name} otherwise" for name in everyone),
        *(f"embed {name} by the second encoder" for name in sets),
        "score by the second encoder",
        "agreement of both encoders",
        f"label backgrounds of {TEST}",
        "label backgrounds of pool",
        "cut photos apart",
        *(f"{verb} the {part}s" for part in ("foreground", "background") for verb in ("embed", "score")),
        "join with the photos' neighbours",
        "join at equal similarity",
        "discover groups",
    ]
    assert len({step.settings.out for step in steps}) == len(steps), "two steps would share a directory"  # type: ignore[attr-defined]


def test_the_steps_settings_are_those_of_the_commands(tiny_world: made.World) -> None:
    steps = study_analyses.steps(study_file(EVERYTHING), "out", data_of(tiny_world), ("conv-64", "m"), "cpu")
    by_title: dict[str, Any] = {step.title: step.settings for step in steps}
    clip = by_title["ask half-s0 otherwise"]
    assert [word.split("=")[0] for word in clip.test] == [TEST, f"{TEST}-openai"]
    assert (clip.templates, clip.candidates_k, clip.out) == ((f"{TEST}-openai=openai",), 3, "out/asked/half-s0")
    assert clip.crop == (f"{TEST}=1", f"{TEST}-openai=1")
    classifier = by_title["ask supervised-reference-s0 otherwise"]
    assert (classifier.templates, [word.split("=")[0] for word in classifier.test]) == ((), [TEST])
    probe = by_title["linear probe half-s0"]
    assert [word.split("=")[0] for word in probe.test] == [*made.TESTS, TEST]
    assert probe.crop == ("r=2", f"{TEST}=1")
    assert by_title["score by the second encoder"].pool == "out/second-embed/pool"
    labels = by_title["label backgrounds of pool"]
    assert (labels.embeddings, labels.pretrained) == ("out/second-embed/pool", "out/runs/half-s0")
    near = by_title["join with the photos' neighbours"]
    assert near.predictions == (f"full-with-reference-s0=out/eval/full-with-reference-s0/{TEST}.parquet",)
    assert (near.pool, near.attributes) == ("out/second-embed/pool", f"out/labels/{TEST}")
    assert near.parts == ("foreground=out/cut-scores/foreground", "background=out/cut-scores/background")
    assert by_title["cut photos apart"].masks == f"out/world/masks/{TEST}"
    animals = by_title["embed the foregrounds"]
    assert animals.source == f"out/cut/foreground/{TEST}"
    assert (animals.pretrained, animals.crop_border) == ("m", 1)  # as the whole photos, not by the labeller
    assert by_title["score the backgrounds"].test == (f"{TEST}=out/cut-embed/background",)
    equal = by_title["join at equal similarity"]
    assert equal.scores == (
        f"full-with-reference-s0=out/gaps/full/{TEST}.parquet",
        f"half-s0=out/gaps/half/{TEST}.parquet",
        f"supervised-reference-s0=out/scores/queries/{TEST}.parquet",
        f"supervised-reference-100-s0=out/scores/queries/{TEST}.parquet",
    )
    assert [word.split("=")[1] for word in equal.column] == ["gap", "similarity", "tau", "tau"]
    assert equal.baseline == ("supervised-reference-s0", "supervised-reference-100-s0")


def test_nothing_asked_for_is_nothing_done(tiny_world: made.World) -> None:
    assert study_analyses.steps(study_file({}), "out", data_of(tiny_world), ("conv-64", "m"), "cpu") == []


def test_without_a_second_encoder_with_text_the_metric_labels(tiny_world: made.World) -> None:
    second = {"second_encoder": {"model": "timm:vit_tiny_patch16_224", "pretrained": "w"}}
    for more in ({}, second):
        file = study_file({"backgrounds": "backgrounds-miniature", "join": True, **more})
        steps = study_analyses.steps(file, "out", data_of(tiny_world), ("conv-64", "metric"), "cpu")
        by_title: dict[str, Any] = {step.title: step.settings for step in steps}
        labels = by_title["label backgrounds of pool"]
        assert (labels.embeddings, labels.pretrained) == ("out/embed/pool", "metric")
        assert by_title["join with the photos' neighbours"].pool == "out/embed/pool"


# --- running them ----------------------------------------------------------------------------------------


def test_a_step_runs_again_only_for_other_settings_or_inputs(tmp_path: Path) -> None:
    made_of = tmp_path / "in.parquet"
    made_of.write_bytes(b"1")
    ran: list[int] = []

    def step(seed: int) -> Step:
        settings = DiscoverSettings(predictions=("p",), attributes="a", out=str(tmp_path / "out"), seed=seed)
        return Step("discover", lambda given: ran.append(given.seed), settings, (str(made_of),))

    for seed in (1, 1, 2, 2, 1):
        step(seed)()
    assert ran == [1, 2, 1]
    made_of.write_bytes(b"2")
    step(1)()
    assert ran == [1, 2, 1, 1]

    def dies(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Step("discover", dies, step(2).settings, (str(made_of),))()
    step(1)()  # what the killed run left in the directory is not of seed 1 any more
    assert ran == [1, 2, 1, 1, 1]


def test_a_refusal_is_told_at_the_end_and_stops_nothing_else(tmp_path: Path) -> None:
    def refuses(_: object) -> None:
        raise DataError("no class has two attributes with 20 photos each", hint="a smaller --min-photos")

    ran: list[str] = []
    settings = DiscoverSettings(predictions=("p",), attributes="a", out=str(tmp_path / "out"))
    steps = [Step("discover groups", refuses, settings), Step("join", lambda _: ran.append("join"), settings)]
    refused = study_analyses.run(steps)
    assert ran == ["join"]
    with pytest.raises(DataError, match=r"s: 1 analyses could not be made, first: discover groups: no class has two"):
        study_analyses.raise_refused("s", refused)
    study_analyses.raise_refused("s", {})


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A study that has been evaluated, with its photos' and pool's backgrounds labelled."""
    built = build_study(tmp_path_factory.mktemp("study"), pool_rows=160, test_rows=80, num_supervised=2)
    label(built)
    shutil.move(built.root / "labels-pool", built.root / "labels" / "pool")
    folder = built.root / "labels" / TEST
    store.write_table(
        str(folder / "labels" / "part-00000.parquet"), pq.read_table(built.root / "labels-photos.parquet")
    )
    store.write_json(str(folder / "manifest.json"), {"stage": "attributes"})
    store.write_json(str(built.root / "scores" / "manifest.json"), {"stage": "score", "tests": {TEST: {}}})
    for number in range(2):  # the fixture's baselines under the names that a study gives them
        name = "supervised-reference" + ("-100" if number else "")
        shutil.copytree(built.root / "eval" / f"supervised-{number}", built.root / "eval" / f"{name}-s0")
    shutil.copytree(built.root / "eval" / "full-s0", built.root / "eval" / "full-with-reference-s0")
    return built


def test_the_report_finds_what_the_steps_leave(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join, "render", lambda draw: EMPTY)
    monkeypatch.setattr(discover, "render", lambda draw: EMPTY)
    wanted = {"backgrounds": "backgrounds-miniature", "join": True, "discover": True, "min_photos": 2}
    splits = {"half": {"kind": "gap-match", "test": [TEST]}}
    file = study_file(wanted, splits=splits, runs=[RUNS[0], *RUNS[2:]])
    root = str(built.root)
    steps = [
        *study_groups.join_steps(file, root, "embed"),
        study_groups.discover_step(file, root),
    ]
    few = [
        Step(s.title, s.run, s.settings.model_copy(update={"draws": 5, "splits": 5, "permutations": 50}), s.inputs)
        for s in steps
    ]
    assert study_analyses.run(few) == {}
    study = Study.open(root)
    joins = found.joins(study)
    assert set(joins) == {"neighbours", "equal-similarity"}
    near = joins["neighbours"]["models"]["full-with-reference-s0"]
    assert near["neighbours"]["groups"]
    assert near["prevalence"]["classes"]
    beside = joins["equal-similarity"]
    assert beside["adjusted_robustness"]["baseline"] == ["supervised-reference-s0", "supervised-reference-100-s0"]
    assert "" in found.selections(study)
    before = {path: path.stat().st_mtime_ns for path in built.root.rglob("*.json")}
    assert study_analyses.run(few) == {}
    assert {path: path.stat().st_mtime_ns for path in built.root.rglob("*.json")} == before


def test_a_pool_with_other_row_numbers_is_refused(built: Built, tmp_path: Path) -> None:
    shutil.copytree(built.root / "embed" / "pool", tmp_path / "pool")
    for log in (tmp_path / "pool" / "commits").iterdir():
        log.write_text(log.read_text().replace('"shard": "00000.tar"', '"shard": "00009.tar"'))
    settings = study_groups.join_steps(study_file({"join": True}), str(built.root), "embed")[0].settings
    moved = settings.model_copy(update={"pool": str(tmp_path / "pool")})
    with pytest.raises(DataError, match="numbers 2 shards otherwise"):
        study_groups._join(str(built.root / "embed" / "pool"), moved)


def test_further_ways_of_asking_are_read_from_their_own_folder(built: Built, tmp_path: Path) -> None:
    shutil.copytree(built.root, tmp_path / "s", ignore=shutil.ignore_patterns("world", "embed", "gaps"))
    root = tmp_path / "s"
    table = pq.read_table(root / "eval" / "full-s0" / f"{TEST}.parquet")
    for name in (TEST, f"{TEST}-1v3"):  # `evaluate --candidates-k` writes both
        store.write_table(str(root / "asked" / "full-s0" / f"{name}.parquet"), table)
    store.write_json(str(root / "asked" / "full-s0" / f"{TEST}-1v3.json"), {"dataset": f"{TEST}-1v3",
                     "candidates_sha256": "c", "templates_sha256": ""})  # fmt: skip
    study = Study.open(str(root))
    assert study.ways("full-s0", TEST) == (f"{TEST}-1v3",)
    records = variants.of_study(study, 5, 0)
    assert [(r["variant"], r["candidates"]) for r in records] == [("as evaluated", ""), ("1v3", "lists of 3")]
    assert records[1]["change_pp"] == 0
    assert f"asked/full-s0/{TEST}-1v3" in {record["artefact"] for record in study.digests()}


# --- which test sets of a world --------------------------------------------------------------------------


def test_a_study_may_use_some_of_a_worlds_test_sets() -> None:
    file = study_file({}, world={"preset": "tiny", "tests": ["counteranimal", "sketch", "val"]})
    tests = study_data.locate(file, "out").tests
    assert tests == {
        "val": "out/world/tests/val", "sketch": "out/world/tests/sketch", "counteranimal": "out/world/counteranimal",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tests", "words"),
    [
        (["val", "sketsh"], ["world.tests names ['sketsh']", "'sketch'"]),
        (["sketch"], ["main_test is 'val'", "['sketch']"]),
    ],
)
def test_test_sets_that_are_not_there(tests: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        study_file({}, world={"preset": "tiny", "tests": tests})
    for word in words:
        assert word in str(error.value)
