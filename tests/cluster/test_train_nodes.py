"""One of two nodes dies while a training runs on both: it goes on from its last checkpoint, to the same losses."""

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

import pytest

from tests import made

pytestmark = [pytest.mark.cluster]
LIMIT_S = 600.0
# Both have two workers until the node is lost. After it conv-64-test's BatchNorm takes its statistics over all 16
# images instead of twice 8, so later losses do not compare.
TOLERANCE = 1e-4

DRIVER = """
import json, os, sys, threading, time
from pathlib import Path
os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "20"
import ray
from ray.cluster_utils import Cluster
values, lose = json.loads(sys.argv[1]), sys.argv[2] == "lose"
head = {"num_cpus": 1, "object_store_memory": 150_000_000, "include_dashboard": False, "temp_dir": sys.argv[3]}
cluster = Cluster(initialize_head=True, head_node_args=head)
other = cluster.add_node(num_cpus=1, object_store_memory=150_000_000)
os.environ["RAY_ADDRESS"] = cluster.address
from clipgap_ray.config.train import TrainSettings
from clipgap_ray.stages import session, train
session.connect()
settings = TrainSettings(**values)
snapshot = Path(settings.out, "train", "checkpoint_manager_snapshot.json")
def pull():
    while not (snapshot.exists() and '"checkpoint_' in snapshot.read_text()):
        time.sleep(0.02)
    cluster.remove_node(other, allow_graceful=False)
if lose:
    threading.Thread(target=pull, daemon=True).start()
train.run(settings)
print(json.dumps({"left": len([node for node in ray.nodes() if node["Alive"]])}))
ray.shutdown()
cluster.shutdown()
"""


@pytest.fixture
def temp_dir() -> Iterator[str]:
    """A short directory for sockets."""
    folder = tempfile.mkdtemp(prefix="cg-train-", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_training_survives_the_loss_of_a_node_with_fewer_workers(
    tiny_world: made.World, tmp_path: Path, temp_dir: str
) -> None:
    histories, left = {}, {}
    for case in ("stay", "lose"):
        values = {
            "source": tiny_world.path("pool"), "model": "conv-64-test", "batch_size": 8, "workers": 2,
            "min_workers": 1, "num_samples": 16 * 40, "checkpoint_every": 15, "out": f"{tmp_path}/{case}",
            "samples": f"{tmp_path}/samples",
        }  # fmt: skip
        env = {**os.environ, "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        env.pop("RAY_ADDRESS", None)
        words = [sys.executable, "-c", DRIVER, json.dumps(values), case, f"{temp_dir}/{case[0]}"]
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == 0, done.stderr[-3000:]
        left[case] = json.loads(done.stdout.splitlines()[-1])["left"]
        lines = Path(tmp_path, case, "metrics.jsonl").read_text().splitlines()
        histories[case] = [json.loads(line) for line in lines]
    assert left == {"stay": 2, "lose": 1}
    assert [row["samples"] for row in histories["lose"]] == [row["samples"] for row in histories["stay"]]
    assert histories["lose"][-1]["workers"] == 1
    starts = json.loads(Path(tmp_path, "lose", "summary.json").read_text())["starts"]
    assert len(starts) >= 2
    assert starts[1] >= 15
    first = histories["stay"][0]["loss"], histories["lose"][0]["loss"]
    assert abs(first[0] - first[1]) <= TOLERANCE
