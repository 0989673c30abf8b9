"""The service on two nodes: the replicas of a shard lie apart, so that losing a node loses no answer."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clipgap_ray.client import Client
from clipgap_ray.config.serve import ServeSettings
from clipgap_ray.errors import ServiceError
from clipgap_ray.kernels.topk import exact_topk
from tests.driver import ray_folder
from tests.index_fixture import all_rows, unit_rows, write_embeddings
from tests.service_fixture import serve_locally
from tests.two_nodes import TwoNodes
from tests.waiting import free_port, until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]
PARTS = [unit_rows(300, seed) for seed in range(2)]
LIMIT_S = 180.0

DEPLOY = """
import json, ray, sys
from clipgap_ray.config.serve import ServeSettings
from clipgap_ray.serving.app import build_app
from clipgap_ray.serving.run import deploy
ray.init(logging_level="ERROR", log_to_driver=False)
settings = ServeSettings(**json.loads(sys.argv[1]))
deploy(build_app(settings), settings)
"""


@pytest.fixture
def cluster() -> Iterator[TwoNodes]:
    with ray_folder() as folder:
        started = TwoNodes(folder, PYTHONPATH=str(Path.cwd()))
        yield started
        started.close()


def places(cluster: TwoNodes, deployment: str) -> list[int]:
    """The nodes of a deployment's replicas: a raylet is the parent of what runs on its node."""
    found = []
    for pid in cluster.workers(f"ServeReplica:clipgap:{deployment}".encode()):
        with contextlib.suppress(OSError):  # it may have ended meanwhile
            found.append(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]))
    return found


@pytest.mark.fault("node", stage="service: index shard")
def test_replicas_lie_on_different_nodes_and_a_lost_node_loses_no_answer(
    cluster: TwoNodes, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    serve_locally(write_embeddings(tmp_path / "emb", PARTS), tmp_path / "index")
    settings = ServeSettings(index=(f"pool={tmp_path / 'index'}",), port=free_port(), replicas=2, gateways=2)
    queries = unit_rows(4, seed=5)
    batch = [{"vector": row} for row in queries.astype(float).tolist()]
    expected = exact_topk(queries, *all_rows(PARTS), 5)[1].tolist()
    done = subprocess.run(
        [sys.executable, "-c", DEPLOY, settings.model_dump_json()],
        env=cluster.env, capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for deployment in ("pool-shard-0", "Gateway"):
        assert len(set(places(cluster, deployment))) == 2, deployment
    stop, asked, wrong, failed = threading.Event(), [0], [], []

    def load() -> None:
        with Client(f"http://127.0.0.1:{settings.port}") as client:
            while not stop.is_set():
                try:
                    answer = client.search(queries=batch, k=5)
                except ServiceError as error:
                    failed.append(str(error))
                    continue
                if answer.degraded or [[near.row_id for near in rows] for rows in answer.results] != expected:
                    wrong.append(answer)
                asked[0] += 1

    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(load)
        try:
            until(lambda: asked[0] > 20, "load")
            cluster.lose_node()
            until(lambda: asked[0] > 200 or loading.done(), "load after the loss", seconds=LIMIT_S)
            until(
                lambda: len(places(cluster, "pool-shard-0")) == 2 or loading.done(), "another replica", seconds=LIMIT_S
            )
        finally:
            stop.set()
        loading.result()
    assert wrong == []
    assert failed == []
    record_property("fault", ("service: index shard", "node", "healed"))
