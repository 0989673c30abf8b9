"""cluster.yaml's node types, launched by Ray's own autoscaler: nodes come for a job, go when idle, and change no byte.

The file is turned into its counterpart on one machine: the provider starts raylets instead of machines, a node has one
CPU for sixteen (two beside a GPU), and five idle minutes are six seconds. All else (types, limits, labels, a head
without work) is the file's.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from clipgap_ray.config.embed import EmbedSettings
from clipgap_ray.config.score import ScoreSettings
from clipgap_ray.stages import embed, score
from tests import made
from tests.driver import DRIVER, Driver, pids_with, ray_folder, until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 300.0
HEAD_TYPE = "ray.head.default"  # what the provider calls the head
HEAD_ID = "f" * 51 + "00000"
COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands", "setup_commands", "head_setup_commands",
            "worker_setup_commands", "initialization_commands")  # fmt: skip

#: Notes which nodes there are while the stage runs: {node type: most at once} goes to the file in the environment.
WATCH = """
import json, os, threading, time
import ray
from clipgap_ray.stages import session
session.connect()
most = {}
def watch():
    while True:
        there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        types = ["gpu_worker" if node.get("GPU") else "cpu_worker" if node.get("CPU") else "head" for node in there]
        for name in set(types):
            most[name] = max(most.get(name, 0), types.count(name))
        with open(os.environ["SEEN"] + ".tmp", "w") as file:
            json.dump(most, file)
        os.replace(os.environ["SEEN"] + ".tmp", os.environ["SEEN"])
        time.sleep(0.2)  # between two looks
threading.Thread(target=watch, daemon=True).start()
"""
COUNT = """
import json, ray, sys
ray.init(logging_level="ERROR", log_to_driver=False)
print(json.dumps([node["Resources"] for node in ray.nodes() if node["Alive"]]))
"""


def on_one_machine(port: int) -> dict[str, Any]:
    """cluster.yaml with simulated nodes of few CPUs in place of EC2's."""
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    types = config["available_node_types"]
    types[HEAD_TYPE] = types.pop("head")
    for node in types.values():
        cpus = node["resources"].get("CPU", 0)
        node["resources"]["CPU"] = 2 if node["resources"].get("GPU") else min(cpus, 1)
        node["resources"]["object_store_memory"] = 100_000_000
        node["node_config"] = {}
        node.pop("worker_setup_commands", None)
        node["max_workers"] = min(node["max_workers"], 2)
    provider = {
        "type": "external", "launch_multiple": True, "disable_node_updaters": True, "head_node_id": HEAD_ID,
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": f"127.0.0.1:{port}",
    }  # fmt: skip
    return {
        "cluster_name": config["cluster_name"], "max_workers": 3, "upscaling_speed": config["upscaling_speed"],
        "idle_timeout_minutes": 0.1, "provider": provider, "available_node_types": types, "head_node_type": HEAD_TYPE,
        "file_mounts": {}, "cluster_synced_files": [], "auth": {}, "docker": {},
        **{name: [] for name in COMMANDS},
    }  # fmt: skip


class Autoscaled:
    """A head that works on nothing, and an autoscaler beside it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        config = Path(folder, "ray_bootstrap_config.yaml")  # as `ray up` names it, in the home of the head
        config.write_text(json.dumps(on_one_machine(port)))
        self.env = {
            **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1", "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "SEEN": f"{folder}/seen.json", "HOME": folder,
        }  # fmt: skip
        self.env.pop("RAY_ADDRESS", None)
        own = {"RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}
        words = [
            str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}",
            "--node-ip-address=127.0.0.1", "--num-cpus=0", "--object-store-memory=100000000",
            "--include-dashboard=false", f"--autoscaling-config={config}", f"--temp-dir={folder}",
        ]  # fmt: skip
        self.log = Path(folder, "head.log")
        with open(self.log, "wb") as sink:
            self.head = subprocess.Popen(words, env={**self.env, **own}, stdout=sink, stderr=sink)
        self.env["RAY_ADDRESS"] = f"127.0.0.1:{port}"
        until(lambda: "Ray runtime started" in self.log.read_text() or self.head.poll() is not None, "the head", 60)

    def run(self, stage: Any, settings: Any) -> dict[str, int]:
        """Run a stage; returns the most nodes of each type that there were at one time."""
        kind = f"{type(settings).__module__}:{type(settings).__name__}"
        words = [sys.executable, "-c", WATCH + DRIVER, stage.__name__, kind, settings.model_dump_json(), ""]
        driver = Driver(words, self.env, Path(self.folder, f"{stage.__name__}.err"))
        assert driver.wait(timeout=LIMIT_S) == 0, driver.said()
        seen = json.loads(Path(self.env["SEEN"]).read_text())
        return {name: count for name, count in seen.items() if name != "head"}

    def nodes(self) -> list[dict[str, float]]:
        """Resources of the nodes that are there now."""
        done = subprocess.run([sys.executable, "-c", COUNT], env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    def close(self) -> None:
        """End the head; the simulated nodes end with it."""
        self.head.send_signal(signal.SIGTERM)
        self.head.wait(timeout=60)
        for pid in pids_with(self.folder):  # raylets that the autoscaler started: nobody else knows them
            os.kill(pid, signal.SIGTERM)


@pytest.fixture
def cluster() -> Iterator[Autoscaled]:
    with ray_folder() as folder:
        autoscaled = Autoscaled(folder)
        yield autoscaled
        autoscaled.close()


def test_nodes_come_for_a_job_and_go_when_idle(
    cluster: Autoscaled, tiny_world: made.World, tiny_embeddings: dict[str, str], tiny_scores: str, tmp_path: Path
) -> None:
    limits = {name: node["max_workers"] for name, node in on_one_machine(0)["available_node_types"].items()}
    assert [node.get("CPU", 0) for node in cluster.nodes()] == [0], "the head alone, without work"

    out = str(tmp_path / "emb")
    words = {"source": tiny_world.path("pool"), "model": "projection", "batch_size": made.BATCH_SIZE}
    embedding = cluster.run(embed, EmbedSettings(**words, out=out, device="cuda"))
    assert embedding.get("gpu_worker", 0) >= 1, embedding
    assert all(count <= limits[name] for name, count in embedding.items()), embedding
    for kind in ("img_emb", "text_emb", "metadata", "ledger"):
        assert made.files_below(f"{out}/{kind}") == made.files_below(f"{tiny_embeddings['pool']}/{kind}")

    words = {**made.score_words(tiny_embeddings), "group_bytes": 1, "query_share": 1e9}
    scoring = cluster.run(score, ScoreSettings(**words, out=str(tmp_path / "scores"), device="cpu"))
    assert scoring.get("cpu_worker", 0) + scoring.get("gpu_worker", 0) >= 1, scoring
    for kind in ("pool", "queries", "thresholds"):
        assert made.files_below(f"{tmp_path}/scores/{kind}") == made.files_below(f"{tiny_scores}/{kind}")

    until(lambda: len(cluster.nodes()) == 1, "the end of the idle nodes", 120)
