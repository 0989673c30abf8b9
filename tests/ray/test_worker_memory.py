"""What Ray's workers hold is seen by the process that started Ray, and is in a stage's summary beside the plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import ray

from clipgap_ray import rundir, store, worker_memory
from clipgap_ray.config.study import StatusSettings
from clipgap_ray.status import run as status
from tests.waiting import until

HELD = 300_000_000


@ray.remote
def holds(num_bytes: int) -> int:
    """Memory that is given back before the task ends: its peak is what counts."""
    return int(np.ones(num_bytes, np.uint8)[-1])


@pytest.mark.usefixtures("ray_session")
def test_the_largest_worker_is_in_the_summary(tmp_path: Path) -> None:
    uri = str(tmp_path / "out")
    with rundir.RunDirectory(uri, "score", {}) as directory:
        assert ray.get(holds.remote(HELD)) == 1
        directory.log.append([{"part": 0, "read": 1, "kept": 1, "dropped": {}}])
        summary = directory.finish({})
    assert summary.worker_bytes > HELD + 50_000_000
    assert store.read_json(f"{uri}/summary.json")["worker_bytes"] == summary.worker_bytes
    assert status(StatusSettings(directory=uri))["stages"]["."]["worker_bytes"] == summary.worker_bytes
    with rundir.RunDirectory(uri, "score", {}) as directory:  # nothing was left to do: nothing new was held
        assert directory.finish({}).worker_bytes == summary.worker_bytes


@pytest.mark.usefixtures("ray_session")
def test_workers_that_have_gone_count(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = worker_memory.watch
    monkeypatch.setattr(worker_memory, "LOOK_S", 0.05)
    actor = ray.remote(Holder).remote()
    assert ray.get(actor.hold.remote(2 * HELD)) == 1
    until(lambda: watch.most() > 2 * HELD, "the actor's memory")
    ray.kill(actor)
    assert watch.most() > 2 * HELD
    pid = ray.get(ray.remote(_pid).remote())
    assert pid in list(worker_memory._workers())


class Holder:
    """Holds memory for as long as it lives."""

    def hold(self, num_bytes: int) -> int:
        self.held = np.ones(num_bytes, np.uint8)
        return int(self.held[-1])


def _pid() -> int:
    import os

    return os.getpid()


def test_another_stage_begins_anew_and_without_a_raylet_there_are_no_workers() -> None:
    watch = worker_memory.Watch()
    assert watch.most() == 0
    watch._most = HELD
    assert watch.most() == HELD
    watch.forget()
    assert watch.most() == 0
    assert worker_memory._peak(2**31) == 0  # a process that there is not
