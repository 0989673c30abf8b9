"""A head that restarts with a store of its own (GCS fault tolerance): the service never stops answering.

The store is a Redis, or Ray's embedded RocksDB, which in a cluster lies on a volume that outlives the head's machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clipgap_ray.client import Client
from clipgap_ray.config.serve import ServeSettings
from clipgap_ray.errors import ServiceError
from clipgap_ray.kernels.topk import exact_topk
from clipgap_ray.serving.ports import descendants
from tests.driver import pids_with, ray_folder, until
from tests.index_fixture import all_rows, unit_rows, write_embeddings
from tests.service_fixture import serve_locally
from tests.waiting import free_port

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]
PARTS = [unit_rows(300, seed) for seed in range(2)]
RAY = str(Path(sys.executable).with_name("ray"))
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
STATE = """
import json, ray
from ray import serve
ray.init(logging_level="ERROR", log_to_driver=False)
status = serve.status().applications["clipgap"]
states = {name: one.status.value for name, one in status.deployments.items()}
nodes = sum(node["Alive"] for node in ray.nodes())
print(json.dumps({"application": status.status.value, "deployments": states, "nodes": nodes}))
"""


class Machines:
    """A head without CPUs, whose store survives it, and one worker node; each below a `ray start` of its own."""

    def __init__(self, folder: str, store: dict[str, str]) -> None:
        self.folder, self.port = folder, free_port()
        self.env = {
            **os.environ, **store, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.getcwd(),
        }  # fmt: skip
        self.env.pop("RAY_ADDRESS", None)
        self.head = self.start_head()
        self.worker = self._start("worker", f"--address=127.0.0.1:{self.port}", "--num-cpus=2")

    def start_head(self) -> subprocess.Popen[bytes]:
        self.head = self._start("head", "--head", f"--port={self.port}", "--num-cpus=0", f"--temp-dir={self.folder}",
                                "--include-dashboard=false")  # fmt: skip
        return self.head

    def _start(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        with open(f"{self.folder}/{name}.log", "ab") as log:
            return subprocess.Popen(
                [RAY, "start", "--block", "--disable-usage-stats", *words], env=self.env, stdout=log, stderr=log
            )

    def python(self, program: str, *words: str) -> str:
        """Run a driver on the cluster and return what it prints."""
        env = {**self.env, "RAY_ADDRESS": f"127.0.0.1:{self.port}"}
        done = subprocess.run(
            [sys.executable, "-c", program, *words],
            env=env,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    def lose_head(self) -> None:
        """End everything that runs on the head's machine, at once."""
        pids = [self.head.pid, *descendants(self.head.pid)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.head.wait()
        Path(self.folder, "ray_current_cluster").unlink()  # the machine's note to itself goes with it

    def replicas(self) -> set[int]:
        """Process ids of what answers questions."""
        return {
            pid
            for pid in descendants(self.worker.pid)
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::ServeReplica:clipgap")
        }

    def close(self) -> None:
        for process in (self.worker, self.head):
            for pid in [process.pid, *descendants(process.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        for pid in pids_with(self.folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def redis(folder: str) -> Iterator[dict[str, str]]:
    """A Redis that outlives the head, and the variables that point Ray to it."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("no redis-server on this machine (Debian: redis-server)")
    port = free_port()
    words = ["--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", "", "--daemonize", "no"]
    process = subprocess.Popen([program, *words], stdout=subprocess.DEVNULL)
    yield {"RAY_REDIS_ADDRESS": f"127.0.0.1:{port}"}
    process.terminate()
    process.wait()


@contextlib.contextmanager
def rocksdb(folder: str) -> Iterator[dict[str, str]]:
    """Ray's embedded store, in a directory that outlives the head."""
    yield {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": f"{folder}/gcs"}


@pytest.fixture(params=[redis, rocksdb], ids=["redis", "rocksdb"])
def machines(request: pytest.FixtureRequest) -> Iterator[Machines]:
    with ray_folder() as folder, request.param(folder) as store:
        started = Machines(folder, store)
        yield started
        started.close()


@pytest.mark.fault("head", stage="service")
def test_the_service_answers_while_the_head_is_gone_and_is_the_same_after_it(
    machines: Machines, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    serve_locally(write_embeddings(tmp_path / "emb", PARTS), tmp_path / "index")
    settings = ServeSettings(index=(f"pool={tmp_path / 'index'}",), port=free_port())
    queries = unit_rows(4, seed=5)
    expected = exact_topk(queries, *all_rows(PARTS), 5)[1].tolist()

    def answers() -> bool:
        """Whether the service answers, which it must do rightly."""
        with contextlib.suppress(ServiceError), Client(f"http://127.0.0.1:{settings.port}", retry_s=0) as client:
            found = client.search(queries=[{"vector": row} for row in queries.astype(float).tolist()], k=5)
            assert [[near.row_id for near in rows] for rows in found.results] == expected
            return not found.degraded
        return False

    def state() -> dict[str, object]:
        return json.loads(machines.python(STATE).splitlines()[-1])  # raylets tell drivers of the lost node

    machines.python(DEPLOY, settings.model_dump_json())
    until(answers, "the first answer", LIMIT_S)
    before = machines.replicas()
    assert len(before) >= 2, before

    machines.lose_head()
    until(answers, "an answer without a head", LIMIT_S)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        assert answers(), "it stopped answering while the head was gone"
    assert machines.replicas() == before

    machines.start_head()
    until(lambda: state()["application"] == "RUNNING", "the controller's return", LIMIT_S)
    assert answers()
    assert machines.replicas() == before, "found again, not made again"
    assert set(state()["deployments"].values()) == {"HEALTHY"}  # type: ignore[attr-defined]
    machines.python(DEPLOY, settings.model_dump_json())  # and it takes a new deployment
    until(answers, "an answer of the new deployment", LIMIT_S)
    record_property("fault", ("service", "head", "healed, with a store"))
