"""`clipgap doctor --cluster` on two nodes: alike, and with another torch on one of them."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.cluster]
LIMIT_S = 240.0

# The second node's processes see the folder of argument 2 first: distribution metadata in it stands for other wheels.
DRIVER = """
import os, sys
from ray.cluster_utils import Cluster
head = {"num_cpus": 1, "object_store_memory": 150_000_000, "include_dashboard": False, "temp_dir": sys.argv[1]}
cluster = Cluster(initialize_head=True, head_node_args=head)
other = {"PYTHONPATH": os.pathsep.join([sys.argv[2], os.environ.get("PYTHONPATH", "")])} if sys.argv[2] else {}
cluster.add_node(num_cpus=1, object_store_memory=150_000_000, env_vars=other)
os.environ["RAY_ADDRESS"] = cluster.address
from clipgap_ray.cli import main
code = main(["doctor", "--cluster"])
import ray
ray.shutdown()
cluster.shutdown()
sys.exit(code)
"""


@pytest.fixture
def temp_dir() -> Iterator[str]:
    """A short directory for sockets."""
    folder = tempfile.mkdtemp(prefix="cg-doc-", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def doctor(temp_dir: str, packages: str = "") -> tuple[int, dict[str, Any], str]:
    """Run it in a process of its own; returns exit code, report, stderr."""
    env = {**os.environ, "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    env.pop("RAY_ADDRESS", None)
    words = [sys.executable, "-c", DRIVER, temp_dir, packages]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=LIMIT_S)
    assert "{" in done.stdout, done.stderr[-3000:]
    return done.returncode, json.loads(done.stdout[done.stdout.index("{") :]), done.stderr


def test_two_nodes_alike(temp_dir: str) -> None:
    code, report, shown = doctor(temp_dir)
    assert (code, report["problems"]) == (0, [])
    assert len(report["nodes"]) == 2
    assert "(head)" in report["nodes"][0]["node"]
    for node in report["nodes"]:
        assert {key: node[key] for key in ("python", "ray", "torch", "faiss", "cuda")} == {
            key: report["driver"][key] for key in ("python", "ray", "torch", "faiss", "cuda")
        }
    assert "usable_gpus" not in shown
    assert shown.count(report["driver"]["torch"]) >= 3, "the table: driver and both nodes"


def test_another_torch_on_one_node_is_named_and_fails(temp_dir: str, tmp_path: Path) -> None:
    wheel = tmp_path / "torch-9.9.9.dist-info"
    wheel.mkdir()
    (wheel / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
    code, report, shown = doctor(temp_dir, str(tmp_path))
    assert code == 1
    (problem,) = report["problems"]
    assert "torch is 9.9.9, the driver's is " + report["driver"]["torch"] in problem
    assert "(head)" not in problem
    assert problem in shown
