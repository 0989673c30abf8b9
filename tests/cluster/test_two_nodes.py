"""Two simulated nodes write the bytes that one machine writes; one of them dying costs time, not rows."""

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

from tests import made

pytestmark = [pytest.mark.cluster]
LIMIT_S = 240.0

# One CPU a node and one CPU a task: with two tasks in flight, both nodes must work. Beside a GPU there are cores for a
# read of each of the 11 shards, and as many on the other node: where reads go is then a choice, not a matter of time.
DRIVER = """
import importlib, json, os, sys, time
import ray
from ray.cluster_utils import Cluster
work, lose, gpu = json.loads(sys.argv[1]), sys.argv[2] == "lose", sys.argv[2] == "gpu"
head = {"num_cpus": 5 if gpu else 1, "object_store_memory": 150_000_000, "include_dashboard": False}
head["temp_dir"] = sys.argv[3]
cluster = Cluster(initialize_head=True, head_node_args=head)
more = {"num_cpus": 5, "num_gpus": 1} if gpu else {"num_cpus": 1}
other = cluster.add_node(object_store_memory=150_000_000, **more)
os.environ["RAY_ADDRESS"] = cluster.address
from clipgap_ray.stages import session
session.connect()
session.physical_cpus = lambda: 2
places, append, lost = set(), importlib.import_module("clipgap_ray.rundir").CommitLog.append, []
def after_commit(log, records):
    append(log, records)
    if lose and not lost:
        lost.append(other)
        cluster.remove_node(other, allow_graceful=False)
importlib.import_module("clipgap_ray.rundir").CommitLog.append = after_commit
nodes = len([node for node in ray.nodes() if node["Alive"]])
for stage, settings, values in work:
    module, name = settings.split(":")
    importlib.import_module(stage).run(getattr(importlib.import_module(module), name)(**values))
def left():
    return len([node for node in ray.nodes() if node["Alive"]])
deadline = time.monotonic() + 60
while lost and left() == nodes and time.monotonic() < deadline:
    time.sleep(0.1)  # Ray's head misses a node after some seconds; a short stage has ended by then
print(json.dumps({"nodes": nodes, "left": left()}))
ray.shutdown()
cluster.shutdown()
"""


@pytest.fixture
def temp_dir() -> Iterator[str]:
    """A short directory for sockets."""
    folder = tempfile.mkdtemp(prefix="cg-two-", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def run(work: list[tuple[str, str, dict[str, Any]]], temp_dir: str, how: str = "") -> dict[str, int]:
    """Run stages on two nodes in a process of their own; returns how many nodes there were and are left.

    `how`: "lose" ends the second node after the first commit, "gpu" lets it claim a GPU.
    """
    env = {**os.environ, "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    env.pop("RAY_ADDRESS", None)
    words = [sys.executable, "-c", DRIVER, json.dumps(work), how, temp_dir]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])  # Ray prints, too


@pytest.mark.parametrize("lose", [False, True], ids=["both stay", "one dies after the first commit"])
def test_scores_and_duplicates_equal_those_of_one_machine(
    tiny_embeddings: dict[str, str], tiny_scores: str, tmp_path: Path, temp_dir: str, lose: bool
) -> None:
    words = {**made.score_words(tiny_embeddings), "group_bytes": 1, "query_share": 1e9}
    work = [("clipgap_ray.stages.score", "clipgap_ray.config.score:ScoreSettings", {**words, "out": f"{tmp_path}/s"})]
    seen = run(work, temp_dir, "lose" if lose else "")
    assert seen == {"nodes": 2, "left": 1 if lose else 2}
    for kind in ("pool", "queries", "thresholds"):
        assert made.files_below(f"{tmp_path}/s/{kind}") == made.files_below(f"{tiny_scores}/{kind}")


def test_dedup_on_two_nodes_equals_dedup_on_one(
    tiny_embeddings: dict[str, str], ray_session: None, tmp_path: Path, temp_dir: str
) -> None:
    from clipgap_ray.config.dedup import DedupSettings
    from clipgap_ray.stages import dedup

    words = {"pool": tiny_embeddings["pool"], "min_similarity": 0.97}
    dedup.run(DedupSettings(**words, out=f"{tmp_path}/one"))
    run([("clipgap_ray.stages.dedup", "clipgap_ray.config.dedup:DedupSettings", {**words, "out": f"{tmp_path}/two"})],
        temp_dir)  # fmt: skip
    assert made.files_below(f"{tmp_path}/two/keep") == made.files_below(f"{tmp_path}/one/keep")


def test_shards_are_decoded_beside_the_gpu_first(
    tiny_world: made.World, tiny_embeddings: dict[str, str], tmp_path: Path, temp_dir: str
) -> None:
    words = {"source": tiny_world.path("pool"), "model": "projection", "out": f"{tmp_path}/e", "device": "cuda",
             "batch_size": 16}  # fmt: skip
    run([("clipgap_ray.stages.embed", "clipgap_ray.config.embed:EmbedSettings", words)], temp_dir, "gpu")
    summary = json.loads(Path(tmp_path, "e", "summary.json").read_text())
    assert summary["kept"] > 0
    # Spread over both nodes, as Ray Data does by itself, about half of the pixels would travel.
    assert summary["cross_node_bytes"] == 0
    assert (
        made.files_below(f"{tmp_path}/e/img_emb").keys()
        == made.files_below(f"{tiny_embeddings['pool']}/img_emb").keys()
    )
