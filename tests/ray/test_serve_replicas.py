"""A replica of the service is killed under load: what its callers see, for each kind of replica."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from clipgap_ray.client import Client
from clipgap_ray.config.serve import ServeSettings
from clipgap_ray.encoder import EncoderSettings
from clipgap_ray.errors import ServiceError
from clipgap_ray.kernels.topk import exact_topk
from clipgap_ray.serving.ports import descendants
from tests.index_fixture import all_rows, unit_rows, write_embeddings
from tests.service_fixture import serve_locally
from tests.waiting import free_port, until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# Large enough that a search takes tens of milliseconds: some are under way when a replica dies.
PARTS = [unit_rows(60_000, seed) for seed in range(2)]
K = 5
CALLERS = 4
BACK_S = 120.0  # for another replica, which imports torch beside the load
DEPLOYMENTS = {"index shard": "pool-shard-0", "gateway": "Gateway", "encoder": "EncoderDeployment"}
#: How many replicas there are. One encoder: a question waits until there is another.
NUMBER = {"index shard": 2, "gateway": 2, "encoder": 1}
#: How often our client may ask again: the gateway that dies has each caller's request in its hands, and Ray's proxy
#: takes a moment to hear of it. When another replica dies the gateway itself asks its twin.
MAY_ASK_AGAIN = {"index shard": 0, "gateway": 4 * CALLERS, "encoder": 0}


def replicas(deployment: str) -> set[int]:
    """Process ids of a deployment's replicas; they are below this process, which started Ray."""
    found = set()
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(f"ray::ServeReplica:clipgap:{deployment}".encode()):
                found.add(pid)
    return found


@pytest.fixture(scope="module")
def service(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A service with two replicas of whatever can have two, ended with the module."""
    from ray import serve

    from clipgap_ray.serving.app import build_app
    from clipgap_ray.serving.run import deploy

    folder = tmp_path_factory.mktemp("replicas")
    serve_locally(write_embeddings(folder / "emb", PARTS), folder / "index")
    settings = ServeSettings(
        index=(f"pool={folder / 'index'}",), port=free_port(), replicas=2, gateways=2, shard_timeout_s=20.0
    )
    deploy(build_app(settings), settings)
    yield f"http://127.0.0.1:{settings.port}"
    serve.shutdown()


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "victim", [pytest.param(name, marks=pytest.mark.fault("worker", stage=f"service: {name}")) for name in DEPLOYMENTS]
)
def test_a_killed_replica_under_load(
    service: str, victim: str, record_property: Callable[[str, object], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "clipgap")
    from ray import serve

    from clipgap_ray.serving.run import APP

    queries = unit_rows(32, seed=5)
    words = [f"a photo of the number {number}" for number in range(8)]
    if victim == "encoder":
        queries = EncoderSettings("projection").build().encode_texts(words)
        batch: list[dict[str, Any]] = [{"text": text} for text in words]
    else:
        batch = [{"vector": row} for row in queries.astype(float).tolist()]
    expected = exact_topk(queries, *all_rows(PARTS), K)[1].tolist()
    stop, asked, wrong, failed = threading.Event(), [0] * CALLERS, [], []
    deployment, number = DEPLOYMENTS[victim], NUMBER[victim]

    def running() -> int:
        """Replicas that get traffic."""
        return serve.status().applications[APP].deployments[deployment].replica_states.get("RUNNING", 0)

    def load(caller: int) -> None:
        with Client(service) as client:
            while not stop.is_set():
                try:
                    answer = client.search(queries=batch, k=K)
                except ServiceError as error:
                    failed.append((time.monotonic(), str(error)))
                    continue
                if answer.degraded or [[near.row_id for near in rows] for rows in answer.results] != expected:
                    wrong.append(answer.degraded)
                asked[caller] += 1

    def goes_on(what: str) -> None:
        then = list(asked)
        until(lambda: all(now > before + 5 for now, before in zip(asked, then, strict=True)), what, seconds=BACK_S)

    before = replicas(deployment)
    assert len(before) == number
    with ThreadPoolExecutor(CALLERS) as threads:
        loads = [threads.submit(load, caller) for caller in range(CALLERS)]
        try:
            goes_on("load")
            killed = min(before)
            os.kill(killed, signal.SIGKILL)
            goes_on("load after the death")
            until(
                lambda: len(now := replicas(deployment)) == number and killed not in now and running() == number,
                "another replica", seconds=BACK_S,
            )  # fmt: skip
            goes_on("load with the new one")
        finally:
            stop.set()
    for one in loads:
        one.result()
    assert wrong == []
    assert failed == []
    again = [record.getMessage() for record in caplog.records if "asking again" in record.getMessage()]
    assert len(again) <= MAY_ASK_AGAIN[victim], again
    how = f"healed, {len(again)} requests asked again by the client" if MAY_ASK_AGAIN[victim] else "healed"
    record_property("fault", (f"service: {victim}", "worker", how))
