"""SIGKILL of a training driver: the heir starts from a checkpoint and reaches the same losses, bit by bit.

The driver is killed from here once Ray Train has registered a checkpoint.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from clipgap_ray.config.train import TrainSettings
from clipgap_ray.stages import train
from tests import made
from tests.conftest import RESUME_LOSS_TOLERANCE
from tests.driver import until

pytestmark = pytest.mark.ray


def test_train(drive: Any, tiny_world: made.World, tmp_path: Path) -> None:
    words = {
        # one worker: starting two costs a minute, and two are killed in test_train_faults
        "source": tiny_world.path("pool"), "model": "conv-64-test", "batch_size": 16, "workers": 1, "warmup": 2,
        "num_samples": 16 * 50, "checkpoint_every": 5,
    }  # fmt: skip
    whole, cut = (TrainSettings(**words, out=str(tmp_path / name)) for name in ("whole", "cut"))
    # Both at once, each in a Ray of its own: starting and ending are mostly waiting.
    uninterrupted, dead = drive(train, whole), drive(train, cut)
    snapshot = Path(cut.out, "train", "checkpoint_manager_snapshot.json")
    until(
        lambda: dead.poll() is not None or (snapshot.exists() and '"checkpoint_' in snapshot.read_text()),
        "a checkpoint",
    )
    dead.kill()
    assert dead.wait() == -signal.SIGKILL
    assert not Path(cut.out, "manifest.json").exists()
    heir = drive(train, cut)
    assert heir.finish() == 0, heir.said()
    assert uninterrupted.finish() == 0, uninterrupted.said()

    def history(run: TrainSettings) -> list[dict[str, Any]]:
        return [json.loads(line) for line in Path(run.out, "metrics.jsonl").read_text().splitlines()]

    starts = json.loads(Path(cut.out, "summary.json").read_text())["starts"]
    assert starts[0] == 0
    assert len(starts) == 2
    assert starts[1] >= 5, "the second driver began from the start"
    expected, found = history(whole), history(cut)
    assert [row["step"] for row in found] == [row["step"] for row in expected] == list(range(10, 51, 10))
    for one, other in zip(expected, found, strict=True):
        assert one["lr"] == other["lr"]
        assert abs(one["loss"] - other["loss"]) <= RESUME_LOSS_TOLERANCE
    assert len({row["loss"] for row in expected}) == 5
