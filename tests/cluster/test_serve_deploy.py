"""`serve deploy serve/config.yaml` as docs/cluster.md says: the file of the repository, another index and port."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from clipgap_ray.client import Client
from clipgap_ray.kernels.topk import exact_topk
from tests import local_head
from tests.index_fixture import all_rows, unit_rows, write_embeddings
from tests.local_head import ROOT, Head
from tests.service_fixture import serve_locally
from tests.waiting import free_port, until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]
PARTS = [unit_rows(300, seed) for seed in range(2)]
SERVE = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()"]
READY_S = 180


@pytest.fixture
def head() -> Iterator[Head]:
    with local_head.running() as started:
        yield started


def test_the_repository_s_file_is_deployed_answers_and_is_taken_down(head: Head, tmp_path: Path) -> None:
    serve_locally(write_embeddings(tmp_path / "emb", PARTS), tmp_path / "index")
    config = yaml.safe_load((ROOT / "serve/config.yaml").read_text())
    port = free_port()
    config["http_options"]["port"] = port
    config["applications"][0]["args"] |= {"index": [f"pool={tmp_path / 'index'}"], "pretrained": "", "port": port}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    environment = head.environment | {"RAY_DASHBOARD_ADDRESS": head.address, "RAY_API_SERVER_ADDRESS": head.address}

    def serve(*words: str) -> str:
        done = subprocess.run([*SERVE, *words], env=environment, capture_output=True, text=True, timeout=120, cwd=ROOT)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    def ready() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    serve("deploy", str(tmp_path / "serve.yaml"))
    until(ready, f"readiness: {serve('status')}", seconds=READY_S)
    queries = unit_rows(4, seed=5)
    with Client(f"http://127.0.0.1:{port}") as client:
        found = client.search(queries=[{"vector": row} for row in queries.astype(float).tolist()], k=5)
    assert [[near.row_id for near in rows] for rows in found.results] == exact_topk(queries, *all_rows(PARTS), 5)[
        1
    ].tolist()
    assert "RUNNING" in serve("status")
    serve("shutdown", "-y")
    until(lambda: not ready(), "the end of the service", seconds=READY_S)
