"""Embed on two simulated nodes while its driver, an encoder and a node are killed at random moments.

The cluster lives in one process, the driver in another: either can die without the other. A killed driver is started
again with the same command; a killed actor and a killed node are Ray's to replace. In the end the folder is, to the
last bit, that of a run without Ray that nobody disturbed.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipgap_ray import rundir, store
from clipgap_ray.config.embed import EmbedSettings
from clipgap_ray.stages import embed
from tests import made
from tests.driver import DRIVER, Driver, pids_with, until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
ROUNDS = 3
MODEL = "timm:vit_tiny_patch16_224.augreg_in21k"  # random weights: some seconds for 600 rows
LIMIT_S = 400.0

HOLDER = """
import sys
from ray.cluster_utils import Cluster
node = {"num_cpus": 1, "object_store_memory": 150_000_000}
cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False, "temp_dir": sys.argv[1]})
other = cluster.add_node(**node)
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(other, allow_graceful=False)
    other = cluster.add_node(**node)
    print("lost", flush=True)
cluster.shutdown()
"""


class TwoNodes:
    """A cluster of two nodes, of which the second can be lost (another takes its place)."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.mark = secrets.token_hex(16)  # in the environment of every process of this cluster
        self.env = {**os.environ, "RAY_AUTH_TOKEN": self.mark, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        self.env.pop("RAY_ADDRESS", None)
        self.holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, folder],
            env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.env["RAY_ADDRESS"] = self._answer()

    def _answer(self) -> str:
        assert self.holder.stdout is not None
        answer = self.holder.stdout.readline().strip()
        assert answer, "the cluster's process ended"
        return answer

    def lose_node(self) -> None:
        assert self.holder.stdin is not None
        self.holder.stdin.write("lose\n")
        self.holder.stdin.flush()
        assert self._answer() == "lost"

    def encoders(self) -> list[int]:
        """Processes of the encoder actors."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                mine = entry.name.isdigit() and self.mark.encode() in (entry / "environ").read_bytes()
                if mine and b"MapWorker(MapBatches(Encode))" in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def driver(self, settings: EmbedSettings) -> Driver:
        kind = f"{EmbedSettings.__module__}:{EmbedSettings.__name__}"
        words = [sys.executable, "-c", DRIVER, embed.__name__, kind, settings.model_dump_json(), ""]
        return Driver(words, self.env, Path(self.folder, f"driver-{secrets.token_hex(4)}.err"))

    def close(self) -> None:
        assert self.holder.stdin is not None
        self.holder.stdin.close()
        self.holder.wait(timeout=60)


@pytest.fixture
def two_nodes() -> Iterator[TwoNodes]:
    folder = tempfile.mkdtemp(prefix="cg-faults-", dir="/tmp")
    cluster = TwoNodes(folder)
    yield cluster
    cluster.close()
    until(lambda: not pids_with(folder), "the end of Ray's processes", 60)
    shutil.rmtree(folder, ignore_errors=True)


def wait_for(out: str, commits: int, driver: Driver, seconds: float) -> None:
    """Wait until so many parts are committed, or the driver has ended, and some seconds more."""
    until(
        lambda: len(rundir.CommitLog(out).records) >= commits or driver.poll() is not None,
        f"{commits} commits", LIMIT_S,
    )  # fmt: skip
    moment = time.monotonic() + seconds
    until(lambda: time.monotonic() >= moment, "the moment", seconds + 10)


def strike(victim: str, cluster: TwoNodes, driver: Driver) -> bool:
    """Kill; returns whether there was still something to kill."""
    if driver.poll() is not None:
        return False
    if victim == "driver":
        driver.kill()
        driver.wait()
    elif victim == "node":
        cluster.lose_node()
    else:
        encoders = cluster.encoders()
        if not encoders:
            return False
        os.kill(encoders[0], signal.SIGKILL)
    return True


@pytest.mark.timeout(1500)
def test_deaths_at_random_moments_change_no_bit(two_nodes: TwoNodes, tiny_world: made.World, tmp_path: Path) -> None:
    source = tiny_world.path("pool")
    whole = made.embed_without_ray(source, str(tmp_path / "whole"), MODEL, "random", text=False)
    rng = random.Random(310_09562)
    struck: dict[str, int] = {"driver": 0, "encoder": 0, "node": 0}
    for number in range(ROUNDS):
        out = str(tmp_path / f"round-{number}")
        settings = EmbedSettings(
            source=source, out=out, model=MODEL, pretrained="random", batch_size=made.BATCH_SIZE, text=False, yes=True
        )
        driver = two_nodes.driver(settings)
        for victim in rng.sample(sorted(struck), len(struck)):
            commits = len(rundir.CommitLog(out).records) + rng.randint(0, 2)
            wait_for(out, commits, driver, rng.uniform(0, 1.5))
            struck[victim] += strike(victim, two_nodes, driver)
            if driver.poll() is not None:
                assert driver.returncode in (0, -signal.SIGKILL), driver.said()
                driver = two_nodes.driver(settings)
        assert driver.wait(timeout=LIMIT_S) == 0, driver.said()
        for kind in ("img_emb", "metadata", "ledger"):
            assert made.files_below(f"{out}/{kind}") == made.files_below(f"{whole}/{kind}"), (number, kind)
        summary = store.read_json(f"{out}/summary.json")
        assert summary["read"] == summary["kept"] + sum(summary["dropped"].values())
        assert not Path(out, "text_emb").exists()
    assert min(struck.values()) >= 1, struck
