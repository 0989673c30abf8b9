"""Two replicas per index shard: one is killed under load, and nobody sees it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clipgap_ray.client import Client
from clipgap_ray.config.serve import ServeSettings
from clipgap_ray.kernels.topk import exact_topk
from clipgap_ray.serving.ports import descendants
from tests.index_fixture import all_rows, unit_rows, write_embeddings
from tests.service_fixture import serve_locally
from tests.waiting import free_port, until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# Large enough that a search takes tens of milliseconds: some are under way when a replica dies.
PARTS = [unit_rows(60_000, seed) for seed in range(2)]
K = 5
SHARD = "pool-shard-0"


def replicas() -> set[int]:
    """Process ids of the shard's replicas; they are below this process, which started Ray."""
    found = set()
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(f"ray::ServeReplica:clipgap:{SHARD}".encode()):
                found.add(pid)
    return found


def test_a_killed_replica_under_load_leaves_every_answer_whole(
    ray_session: None, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    from ray import serve

    from clipgap_ray.serving.app import build_app
    from clipgap_ray.serving.run import APP, deploy

    serve_locally(write_embeddings(tmp_path / "emb", PARTS), tmp_path / "index")
    settings = ServeSettings(index=(f"pool={tmp_path / 'index'}",), port=free_port(), replicas=2, shard_timeout_s=20.0)
    queries = unit_rows(32, seed=5)
    expected = exact_topk(queries, *all_rows(PARTS), K)[1].tolist()
    batch = [{"vector": row} for row in queries.astype(float).tolist()]
    stop, asked, wrong = threading.Event(), [0] * 4, []

    def running() -> int:
        """Replicas that get traffic."""
        return serve.status().applications[APP].deployments[SHARD].replica_states.get("RUNNING", 0)

    def load(number: int) -> None:
        with Client(f"http://127.0.0.1:{settings.port}") as client:
            while not stop.is_set():
                answer = client.search(queries=batch, k=K)
                if answer.degraded or [[near.row_id for near in rows] for rows in answer.results] != expected:
                    wrong.append(answer.degraded)
                asked[number] += 1

    try:
        deploy(build_app(settings), settings)
        before = replicas()
        assert len(before) == 2
        with ThreadPoolExecutor(4) as threads:
            loads = [threads.submit(load, number) for number in range(4)]
            try:
                until(lambda: min(asked) > 5, "load")
                killed = min(before)
                os.kill(killed, signal.SIGKILL)
                at_kill = list(asked)
                until(lambda: all(now > then + 5 for now, then in zip(asked, at_kill, strict=True)), "load goes on")
                until(lambda: len(now := replicas()) == 2 and killed not in now and running() == 2, "another replica")
                at_return = list(asked)
                until(lambda: all(now > then + 5 for now, then in zip(asked, at_return, strict=True)), "load goes on")
            finally:
                stop.set()
        for one in loads:
            one.result()  # no request failed
        assert wrong == []
        assert sum(asked) > 40
        record_property("fault", ("service", "worker", "healed"))
    finally:
        stop.set()
        serve.shutdown()
