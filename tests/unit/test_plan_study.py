"""What a study would take: from counts and rates that are given here, and of a study that is there to look at."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import yaml

from clipgap_ray import status, store
from clipgap_ray.config.plan import StudyPlanSettings
from clipgap_ray.config.study import StatusSettings
from clipgap_ray.errors import ConfigError
from clipgap_ray.pixels import Preprocess
from clipgap_ray.stages import plan_study
from tests import made

LAION = (
    "pool=413M",
    "reference=1.28M",
    "val=50k",
    "v2=10_000",
    "sketch=50,889",
    "r=30000",
    "a=7500",
    "objectnet=18574",
)
MODELS = {
    "ViT-B-16-plus-240": plan_study.Network(64.0e9, 54.8e9, 640, 208e6, Preprocess(240), 5e10),
    "ViT-B-32": plan_study.Network(14.78e9, 8.8e9, 512, 151e6, Preprocess(224), 5e10),
}


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_study, "network", lambda model: MODELS[model])
    monkeypatch.setattr(plan_study, "product_rate", lambda: 6.5e10)


def prices(folder: Path) -> str:
    path = folder / "prices.yaml"
    path.write_text("per_hour: {CPU: 0.05, GPU: 1.0, node:__internal_head__: 0.2}\ncurrency: EUR\n")
    return str(path)


@pytest.mark.usefixtures("fixed")
def test_the_paper_s_study_on_the_cluster_of_the_repository(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="clipgap"):
        found = plan_study.run(
            StudyPlanSettings(
                study="studies/laion400m.yaml", rows=LAION, nodes="cluster.yaml", gpu_tflops=121,
                prices=prices(tmp_path), out=str(tmp_path / "out"),
            )
        )  # fmt: skip
    assert (found["machine"]["cores"], found["machine"]["gpus"]) == (8 * 16 + 2 * 8, 2)
    steps = found["steps"]
    assert len([name for name in steps if name.startswith("runs/")]) == 12
    assert steps["embed/pool"]["seconds"] == pytest.approx(413e6 * 64e9 / (2 * 0.4 * 121e12), rel=1e-3)
    assert steps["dedup"]["product_flops"] == pytest.approx(2 * 640 * 413e6 * (50_416 + 2 * 413e6 / 50_416), rel=1e-3)
    assert steps["runs/full-with-reference-s0"]["network_flops"] == pytest.approx(3 * 6.43e9 * 14.78e9, rel=1e-3)
    assert steps["runs/full-with-reference-s0"]["worker_bytes"] == pytest.approx(16 * 151e6)
    assert steps["embed/pool"]["worker_bytes"] == pytest.approx(4 * 208e6)
    # what a cut of a given size trains on bounds the table of its samples
    assert steps["runs/random-100m-s0"]["driver_bytes"] == pytest.approx(200 * 100e6)
    assert steps["dedup"]["cost"] == pytest.approx(steps["dedup"]["seconds"] / 3600 * (144 * 0.05 + 0.2), rel=1e-3)
    assert steps["scores"]["cost"] == pytest.approx(steps["scores"]["seconds"] / 3600 * (144 * 0.05 + 2.2), rel=1e-3)
    total = found["total"]
    assert total["seconds"] == pytest.approx(sum(step["seconds"] for step in steps.values()))
    assert total["cost"] == pytest.approx(sum(step["cost"] for step in steps.values()), abs=0.01)
    for words in ("413,000,000 pool rows, on 144 cores and 2 GPUs", "embed/pool", "days", "TB", "costs in EUR"):
        assert words in caplog.text
    assert "cannot be looked at; assumed are 24 KB and 4 ms" in caplog.text
    assert store.read_json(str(tmp_path / "out" / "plan.json")) == json.loads(json.dumps(found))


@pytest.mark.usefixtures("fixed")
def test_a_plan_counts_no_more_nodes_than_all_types_together_may_have(tmp_path: Path) -> None:
    config = yaml.safe_load(Path("cluster.yaml").read_text())
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**config, "max_workers": 3}))
    found = plan_study.run(
        StudyPlanSettings(
            study="studies/laion400m.yaml", rows=LAION, nodes=str(tmp_path / "small.yaml"), gpu_tflops=121
        )
    )
    assert (found["machine"]["cores"], found["machine"]["gpus"]) == (3 * 16, 2)


@pytest.mark.usefixtures("fixed")
def test_what_is_unknown_is_asked_for(tmp_path: Path) -> None:
    def refused(words: str, **more: object) -> None:
        values = {"study": "studies/laion400m.yaml", "rows": LAION, "nodes": "cluster.yaml", "gpu_tflops": 121, **more}
        with pytest.raises(ConfigError, match=words):
            plan_study.run(StudyPlanSettings(**values))

    refused("2 GPUs of unknown speed", gpu_tflops=0)
    refused(r"--rows names \['imagenet'\]", rows=(*LAION, "imagenet=1M"))
    refused("'pool=many' is not NAME=COUNT", rows=("pool=many",))
    (tmp_path / "other.yaml").write_text("max_workers: 3\n")
    refused("no node type with CPUs", nodes=str(tmp_path / "other.yaml"))
    (tmp_path / "other.yaml").write_text("available_node_types: {a: {resources: {CPU: 4}}}\n")
    refused("no max_workers", nodes=str(tmp_path / "other.yaml"))
    world = {"name": "w", "world": {"preset": "tiny"}, "runs": [{"split": "full"}]}
    (tmp_path / "world.yaml").write_text(yaml.safe_dump({**world, "train": {"model": "ViT-B-32"}}))
    refused("pool: .* cannot be looked at .*\n.*say --rows pool=COUNT",
            study=str(tmp_path / "world.yaml"), rows=(), out=str(tmp_path / "nothing"))  # fmt: skip


def test_a_study_that_is_there_is_looked_at_and_status_shows_both(
    tiny_world: made.World, tiny_embeddings: dict[str, str], tmp_path: Path
) -> None:
    tests = {name: tiny_world.path(f"tests/{name}") for name in made.TESTS}
    data = {"pool": tiny_world.path("pool"), "reference": tiny_world.path("reference"), "tests": tests}
    study = {
        "name": "seen", "data": data, "train": {"model": "conv-64-test", "num_samples": 1000, "workers": 1},
        "splits": {"half": {"kind": "random", "size": "300"}}, "runs": [{"split": "full"}, {"split": "half"}],
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    out = tmp_path / "out"
    found = plan_study.run(StudyPlanSettings(study=str(tmp_path / "study.yaml"), out=str(out)))
    assert found["rows"]["pool"] == pytest.approx(600, rel=0.2)
    assert found["rows"]["val"] == 48
    assert found["machine"]["gpus"] == 0
    assert 0 < found["machine"]["read_s"] < 0.1
    # one worker trains, two cores embed: so a training of as many images takes longer by more than the passes
    assert found["steps"]["runs/full-s0"]["seconds"] > 0
    assert list(found["steps"])[-1] == "index"
    (out / "embed").mkdir()
    (out / "embed" / "pool").symlink_to(tiny_embeddings["pool"])
    shown = status.run(StatusSettings(directory=str(out)))["stages"]["embed/pool"]
    step = found["steps"]["embed/pool"]
    assert shown["predicted"] == {
        name: step[name] for name in ("seconds", "written_bytes", "driver_bytes", "worker_bytes")
    }
    assert shown["seconds"] >= 0
    assert shown["driver_bytes"] > 50e6
    there = sum(len(data) for data in made.files_below(tiny_embeddings["pool"]).values())
    assert shown["written_bytes"] == pytest.approx(there)


def test_flops_are_those_that_open_clip_publishes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_study.budget, "probe", lambda encoder, text: 0.5)
    found = plan_study.network("ViT-B-32")
    assert found.flops == pytest.approx(14.78e9, rel=0.02)  # docs/model_profile.csv of open_clip
    assert found.flops_per_s == pytest.approx(found.flops / 0.5)
    assert (found.dim, found.preprocess.size) == (512, 224)
    assert found.parameters == pytest.approx(151.28e6, rel=0.01)
