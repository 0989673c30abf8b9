"""Trainings side by side: weights as of runs by themselves, done ones are skipped, an error leaves the others alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clipgap_ray.config.train import TrainSettings
from clipgap_ray.errors import ConfigError, StoppedError
from clipgap_ray.stages import sweep, train
from tests import made

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


@pytest.fixture
def words(tiny_world: made.World, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": "conv-64-test", "batch_size": 16, "workers": 1, "warmup": 2, "num_samples": 160,
        "source": tiny_world.path("pool"), "samples": str(tmp_path / "samples"),
    }  # fmt: skip


def weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(out / "checkpoint.pt", weights_only=True)["state_dict"])


@pytest.mark.slow
def test_two_at_a_time_are_the_two_by_themselves(words: dict[str, Any], tmp_path: Path) -> None:
    runs = [TrainSettings(**words, out=str(tmp_path / f"s{seed}"), seed=seed) for seed in range(2)]
    sweep.run(runs, side_by_side=2)
    times = [[(tmp_path / f"s{i}" / name).stat().st_mtime for name in ("params.json", "checkpoint.pt")] for i in (0, 1)]
    assert max(started for started, _ in times) < min(ended for _, ended in times)  # they were at work together
    alone = tmp_path / "alone"
    train.run(TrainSettings(**words, out=str(alone), seed=1))
    expected, found = weights(alone), weights(tmp_path / "s1")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not torch.equal(weights(tmp_path / "s0")["logit_scale"], found["logit_scale"])
    sweep.run(runs, side_by_side=2)
    assert [(tmp_path / f"s{i}" / "checkpoint.pt").stat().st_mtime for i in (0, 1)] == [ended for _, ended in times]


@pytest.mark.slow
def test_an_error_lets_the_neighbour_finish_and_starts_no_other(words: dict[str, Any], tmp_path: Path) -> None:
    good = TrainSettings(**words, out=str(tmp_path / "good"))
    bad = TrainSettings(**{**words, "num_samples": 8}, out=str(tmp_path / "bad"))
    late = TrainSettings(**words, out=str(tmp_path / "late"))
    with pytest.raises(ConfigError, match="less than one step"):
        sweep.run([good, bad, late], side_by_side=2)
    assert train.is_complete(good.out)
    assert not Path(late.out).exists()


def test_a_limit_that_is_reached_between_two_trainings_is_what_is_raised(
    words: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached() -> None:
        raise StoppedError("stopped after 1 hour")

    monkeypatch.setattr(sweep, "_drive", lambda *_: None)
    monkeypatch.setattr("clipgap_ray.stages.limits.check", reached)
    runs = [TrainSettings(**words, out=str(tmp_path / f"s{seed}"), seed=seed) for seed in range(2)]
    with pytest.raises(StoppedError, match="after 1 hour"):
        sweep._side_by_side(runs, places=1)


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers", "decoders", "places"),
    [(2, 0, 2, 0, 1), (2, 0, 1, 0, 2), (1, 0, 2, 0, 1), (64, 0, 2, 0, 35), (64, 8, 2, 0, 4), (16, 8, 1, 4, 5)],
)
def test_room_counts_cpus_and_gpus(
    words: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    cpus: int,
    gpus: int,
    workers: int,
    decoders: int,
    places: int,
) -> None:
    monkeypatch.setattr(sweep, "physical_cpus", lambda: cpus)
    monkeypatch.setattr(sweep, "cluster_gpus", lambda: gpus)
    monkeypatch.setattr(sweep, "resolve_device", lambda device: "cuda" if gpus else "cpu")
    settings = TrainSettings(**{**words, "workers": workers, "decoders": decoders}, out="out")
    assert sweep.room([settings]) == places
