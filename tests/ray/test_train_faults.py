"""Workers that die, and batches made elsewhere: the loss curve is the uninterrupted one's, to the last bit."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from clipgap_ray.config.train import TrainSettings
from clipgap_ray.errors import DataError
from clipgap_ray.stages import train
from clipgap_ray.stages.train_data import batches, batches_from_ray_data
from clipgap_ray.stages.train_plan import make_plan
from tests import made
from tests.conftest import RESUME_LOSS_TOLERANCE

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def words(tiny_world: made.World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("faults")
    return {
        "source": tiny_world.path("pool"), "model": "conv-64-test", "batch_size": 8, "workers": 2, "warmup": 2,
        "num_samples": 16 * 40, "checkpoint_every": 5, "samples": str(folder / "samples"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(words: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Metrics of a run that nothing happened to."""
    return history(TrainSettings(**words, out=str(tmp_path_factory.mktemp("whole"))))


def history(settings: TrainSettings) -> list[dict[str, Any]]:
    train.run(settings)
    return [json.loads(line) for line in Path(settings.out, "metrics.jsonl").read_text().splitlines()]


def same(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> bool:
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    return all(
        abs(one["loss"] - other["loss"]) <= RESUME_LOSS_TOLERANCE and one["samples"] == other["samples"]
        for one, other in zip(expected, found, strict=True)
    )


def training_workers() -> list[int]:
    """Process ids of this Ray's training workers: named so by Ray, children of the raylet in our directory."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or not (entry / "cmdline").read_bytes().startswith(b"ray::RayTrainWorker"):
                continue
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            if os.environ["CLIPGAP_RAY_TMP"].encode() in Path("/proc", parent, "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return sorted(found)


def test_a_killed_worker_is_replaced_and_the_curve_goes_on(
    words: dict[str, Any], whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    settings = TrainSettings(**words, out=str(tmp_path / "cut"))
    snapshot = Path(settings.out, "train", "checkpoint_manager_snapshot.json")
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            if snapshot.exists() and '"checkpoint_' in snapshot.read_text() and (pids := training_workers()):
                killed.append(pids[0])
                os.kill(pids[0], signal.SIGKILL)
                return
            time.sleep(0.02)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    found = history(settings)
    killer.join()
    starts = json.loads(Path(settings.out, "summary.json").read_text())["starts"]
    assert killed, "nobody was killed: the run was too short"
    assert len(starts) == 2
    assert starts[1] >= 5
    assert same(whole, found)


def test_ray_data_makes_the_same_batches(words: dict[str, Any], whole: list[dict[str, Any]], tmp_path: Path) -> None:
    assert same(whole, history(TrainSettings(**words, out=str(tmp_path / "data"), decoders=1)))


@pytest.mark.parametrize("decoders", [0, 1])
def test_a_shard_cut_after_its_samples_were_listed_is_named(
    words: dict[str, Any], tmp_path: Path, decoders: int
) -> None:
    """Not trained on as grey images, and as the same error from Ray Data's processes."""
    pool = tmp_path / "pool"
    shutil.copytree(words["source"], pool)
    settings = TrainSettings(**{**words, "source": str(pool), "samples": "", "workers": 1}, out=str(tmp_path / "run"))
    plan, _ = make_plan(settings, settings.out, 64)
    for shard in pool.glob("*.tar"):
        os.truncate(shard, 2000)
    plan = dataclasses.replace(plan, settings={**plan.settings, "decoders": decoders})
    first = batches_from_ray_data(ray.put(plan), plan, 0, 1, 0) if decoders else batches(plan, 0, 1, 0)
    with pytest.raises(DataError, match="has 2000 bytes; when its samples were listed") as caught:
        next(first)
    assert "Failed to" not in str(caught.value)  # what Ray adds to the message is about its own settings
