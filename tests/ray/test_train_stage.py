"""Training on a virtual split: the checkpoint is open_clip's, the run is done once, impossible runs are refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from clipgap_ray import lease, rundir, store
from clipgap_ray.config.split import GapMatch
from clipgap_ray.config.train import EvaluateSettings, TrainSettings
from clipgap_ray.encoder import EncoderSettings, register_models
from clipgap_ray.errors import ConfigError, DataError, StaleOutputError
from clipgap_ray.stages import evaluate, samples, split, train
from tests import made
from tests.conftest import RESUME_LOSS_TOLERANCE
from tests.driver import until

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
# One worker: in every Ray, a second one imports torch again. Two are killed in test_train_faults.
TINY = {"model": "conv-64-test", "batch_size": 16, "workers": 1, "warmup": 2}


@pytest.fixture(scope="module")
def words(tiny_world: made.World, tiny_scores: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of one small run on a gap-matched split, with the reference mixed in; paths as people type them."""
    folder = Path(os.path.relpath(tmp_path_factory.mktemp("train")))
    split.run(GapMatch(scores=tiny_scores, out=str(folder / "gap.npy"), test=("sketch",)))
    return {
        **TINY,
        "source": os.path.relpath(tiny_world.path("pool")),
        "reference": os.path.relpath(tiny_world.path("reference")),
        "split": str(folder / "gap.npy"),
        "num_samples": 640,
        "checkpoint_every": 5,
        "out": str(folder / "run"),
    }


def history(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(words: dict[str, Any]) -> rundir.Summary:
    return train.run(TrainSettings(**words))


def test_counts_say_what_was_used_and_seen(
    trained: rundir.Summary, words: dict[str, Any], tiny_world: made.World
) -> None:
    recipe = store.read_json(words["split"].removesuffix(".npy") + ".recipe.json")
    # broken images are in the index (their bytes are there) but in no embedding, so in no split
    assert trained.kept <= recipe["rows"]["kept"] + len(tiny_world.of("reference"))
    assert trained.kept >= recipe["rows"]["kept"] + len(tiny_world.of("reference")) - 1  # one has no caption
    assert trained.dropped == {"not_in_split": trained.read - trained.kept}
    assert (trained.extra["samples_seen"], trained.extra["steps"]) == (640, 40)
    metrics = history(words["out"])
    assert [(row["step"], row["samples"]) for row in metrics] == [(step, 16 * step) for step in range(10, 41, 10)]
    assert all(0 < row["loss"] < 5 for row in metrics)
    assert len({row["loss"] for row in metrics}) == 4


def test_a_killed_run_goes_on_from_its_checkpoint_and_ends_the_same(
    drive: Any, trained: rundir.Summary, words: dict[str, Any], tmp_path: Path
) -> None:
    """Its worker loses its driver once Ray Train has registered a checkpoint (contract 6)."""
    cut = TrainSettings(**{**words, "out": str(tmp_path / "cut")})
    dead = drive(train, cut)
    snapshot = Path(cut.out, "train", "checkpoint_manager_snapshot.json")
    until(
        lambda: dead.poll() is not None or (snapshot.exists() and '"checkpoint_' in snapshot.read_text()),
        "a checkpoint",
    )
    dead.kill()
    assert dead.wait() == -signal.SIGKILL, dead.said()
    assert not Path(cut.out, "manifest.json").exists()
    starts = train.run(cut).extra["starts"]
    assert starts[0] == 0
    assert len(starts) == 2
    assert 5 <= starts[1] < 40, "the heir began from the start, or had nothing to do"
    expected, found = history(words["out"]), history(cut.out)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for one, other in zip(expected, found, strict=True):
        assert one["lr"] == other["lr"]
        assert abs(one["loss"] - other["loss"]) <= RESUME_LOSS_TOLERANCE
    weights = [torch.load(f"{out}/checkpoint.pt", weights_only=True)["state_dict"] for out in (words["out"], cut.out)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_open_clip_loads_the_checkpoint_strictly(trained: rundir.Summary, words: dict[str, Any]) -> None:
    register_models()
    path = f"{words['out']}/checkpoint.pt"
    model = open_clip.create_model("conv-64-test", pretrained=path)
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    assert set(state) == set(model.state_dict())
    open_clip.create_model("conv-64-test").load_state_dict(state, strict=True)
    fresh = EncoderSettings("conv-64-test", "random").build().model  # type: ignore[attr-defined]
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), fresh.parameters(), strict=True))
    assert float(model.logit_scale.detach()) <= 4.6052
    from_run = EncoderSettings("conv-64-test", words["out"]).build().model  # type: ignore[attr-defined]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), from_run.parameters(), strict=True))
    config = store.read_json(f"{words['out']}/conv-64-test.model.json")
    assert config == open_clip.get_model_config("conv-64-test")


def test_running_again_does_nothing_and_other_settings_are_refused(
    trained: rundir.Summary, words: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "_fit", lambda *_: pytest.fail("trained again"))
    before = made.stamps_below(f"{words['out']}/train")
    again = train.run(TrainSettings(**words))
    assert (again.kept, again.extra["loss"], again.parts_skipped) == (trained.kept, trained.extra["loss"], 1)
    assert made.stamps_below(f"{words['out']}/train") == before
    with pytest.raises(StaleOutputError, match=r"lr was 0\.001, now 0\.002"):
        train.run(TrainSettings(**words, lr=0.002))


@pytest.mark.slow
def test_evaluate_runs_on_the_run_directory(
    trained: rundir.Summary, words: dict[str, Any], tiny_world: made.World, tmp_path: Path
) -> None:
    settings = EvaluateSettings(
        model="conv-64-test",
        pretrained=words["out"],
        test=(f"val={tiny_world.path('tests/val')}",),
        out=str(tmp_path / "e"),
    )
    assert evaluate.run(settings).kept == 48


@pytest.mark.slow
def test_a_supervised_run_is_evaluated_by_its_head(tiny_world: made.World, tmp_path: Path) -> None:
    reference = tiny_world.path("reference")
    run = str(tmp_path / "run")
    summary = train.run(
        TrainSettings(**TINY, source=reference, out=run, objective="supervised", num_samples=64, seed=3)
    )
    assert (summary.kept, summary.extra["steps"]) == (120, 4)
    state = torch.load(f"{run}/checkpoint.pt", map_location="cpu", weights_only=True)["state_dict"]
    classes = len(tiny_world.root.joinpath("reference", "classnames.txt").read_text().splitlines())
    assert state["head.weight"].shape[0] == classes
    out = str(tmp_path / "e")
    result = evaluate.run(
        EvaluateSettings(model="conv-64-test", pretrained=run, test=(f"val={tiny_world.path('tests/val')}",), out=out)
    )
    assert result.kept == 48
    # a head over another number of classes is refused
    (tmp_path / "two" / "test").mkdir(parents=True)
    (tmp_path / "two" / "classnames.txt").write_text("a\nb\n")
    (tmp_path / "two" / "test" / "0.tar").write_bytes(made.tar([("a.cls", b"0"), ("a.jpg", made.jpeg(0))]))
    with pytest.raises(DataError, match=f"has {classes} classes, .* names 2"):
        evaluate.run(EvaluateSettings(model="conv-64-test", pretrained=run, test=(f"two={tmp_path}/two",), out=out))


def test_impossible_runs_are_refused(
    words: dict[str, Any], tiny_world: made.World, tiny_scores: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "_fit", lambda *_: pytest.fail("trained"))
    index = str(tmp_path / "samples")

    def run(**more: Any) -> None:
        base = {
            **TINY,
            "source": tiny_world.path("pool"),
            "out": str(tmp_path / "run" / store.digest(more)[:8]),
            "samples": index,
        }
        train.run(TrainSettings(**{**base, **more}))

    with pytest.raises(ConfigError, match="--objective supervised needs labels"):
        run(objective="supervised")
    with pytest.raises(DataError, match=r"none of its .* uids is in .*coverage 0 %"):
        run(split=words["split"], source=tiny_world.path("reference"), samples=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="less than one step of --workers 1 x --batch-size 16"):
        run(num_samples=15)
    with pytest.raises(ConfigError, match="unknown model 'conv-65-test'; nearest names: conv-64-test"):
        run(model="conv-65-test")


def test_the_index_is_shared_and_appends(tiny_world: made.World, tmp_path: Path) -> None:
    first = samples.index(tiny_world.path("pool"), str(tmp_path))
    before = made.stamps_below(str(tmp_path / "samples"))
    assert samples.index(tiny_world.path("pool"), str(tmp_path)) == first
    assert made.stamps_below(str(tmp_path / "samples")) == before
    assert first.parts == tuple(range(11))
    with lease.Lease(str(tmp_path)):  # another training appends to it, or holds it for any reason
        assert samples.index(tiny_world.path("pool"), str(tmp_path)) == first


@pytest.mark.filterwarnings("ignore:WebDataset")  # of its reader
def test_clip_benchmark_counts_the_same_to_the_last_sample(
    trained: rundir.Summary, words: dict[str, Any], tiny_world: made.World, tmp_path: Path
) -> None:
    """Its reader, its classifier and its logits, on the checkpoint as open_clip loads it."""
    builder = pytest.importorskip("clip_benchmark.datasets.builder", reason="`make install` brings clip-benchmark")
    from clip_benchmark.metrics import zeroshot_classification as theirs

    folder = tiny_world.path("tests", "val")
    out = str(tmp_path / "eval")
    evaluate.run(EvaluateSettings(model=words["model"], pretrained=words["out"], test=(f"val={folder}",), out=out))
    ours = store.read_table(f"{out}/val.parquet").to_pylist()
    register_models()
    checkpoint = str(Path(words["out"], "checkpoint.pt"))
    model, _, transform = open_clip.create_model_and_transforms(words["model"], pretrained=checkpoint)
    model.eval()
    dataset = builder.build_wds_dataset("val", transform, data_dir=folder)
    tokenizer = open_clip.get_tokenizer(words["model"])
    asked = (tokenizer, dataset.classes, dataset.templates, "cpu")
    loader = torch.utils.data.DataLoader(dataset.batched(16), batch_size=None)
    logits, labels = theirs.run_classification(
        model, theirs.zero_shot_classifier(model, *asked, amp=False), loader, "cpu", amp=False
    )
    assert labels.tolist() == [row["label"] for row in ours]
    assert logits.argmax(dim=1).tolist() == [row["prediction"] for row in ours]
    # Its `accuracy` asks float() of an array, which numpy no longer allows; its top-5 is this.
    found = store.read_json(f"{out}/val.json")["metrics"]
    assert found["acc1"] == np.mean([row["correct"] for row in ours])
    assert found["acc5"] == (logits.topk(5).indices == labels[:, None]).any(dim=1).double().mean().item()
