"""A head of our own on this machine, as docs/cluster.md starts one: job server, token, its own ports and temp dir."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.driver import pids_with
from tests.waiting import free_port

ROOT = Path(__file__).resolve().parents[1]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
START_DEADLINE_S = 120
SECRET = secrets.token_hex(16)  # as a key of S3 would be given to the nodes


class Head(NamedTuple):
    """Where jobs are sent, with which environment, and where Ray writes."""

    address: str
    environment: dict[str, str]
    temp: str


@contextlib.contextmanager
def running() -> Iterator[Head]:
    """A head with four logical CPUs, in the repository's root; ended by the ids of its processes."""
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("RAY_ADDRESS", None)
    gcs, dashboard = free_port(), free_port()
    temp = tempfile.mkdtemp(prefix="cg-", dir="/tmp")
    process = subprocess.Popen(
        [
            *RAY, "start", "--head", "--block", f"--port={gcs}", "--num-cpus=4", "--object-store-memory=200000000",
            "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
            f"--temp-dir={temp}", "--dashboard-agent-listen-port=0", "--disable-usage-stats",
        ],
        env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + START_DEADLINE_S
    try:
        asking = [*RAY, "job", "list", "--address", address]
        while subprocess.run(asking, env=environment, capture_output=True).returncode:
            assert process.poll() is None, "ray start ended"
            assert time.monotonic() < deadline, "the job server did not come up"
        yield Head(address, environment, temp)
    finally:
        process.kill()  # asked politely, it takes half a minute
        process.wait()
        for pid in pids_with(temp):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
