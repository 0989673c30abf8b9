"""Two simulated nodes whose parts die on request: the harness of the fault-injection suite.

The cluster lives in one process, each driver in another: either can die without the other. Where the kernel lets us,
the cluster's processes have a small disk of their own (a tmpfs in a mount namespace), so that a full one can be tested.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.driver import DRIVER, Driver

#: What one node's object store holds: near Ray's smallest, so that a pool can fill it.
STORE_BYTES = 100_000_000

HOLDER = """
import sys
from ray.cluster_utils import Cluster
node = {"num_cpus": 1, "object_store_memory": int(sys.argv[2])}
cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False, "temp_dir": sys.argv[1]})
other = cluster.add_node(**node)
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(other, allow_graceful=False)
    other = cluster.add_node(**node)
    print("lost", flush=True)
cluster.shutdown()
"""
#: The cluster's process with a disk of its own at $0.
WITH_DISK = 'mount -t tmpfs -o size=1g none "$0" && exec "$@"'
#: Fills both nodes' object stores before the stage starts, until something had to be spilled, and holds on to it.
BALLAST = f"""
import numpy, pathlib, ray
from clipgap_ray.stages import session
session.connect()
@ray.remote(num_cpus=0, scheduling_strategy="SPREAD")
def fill(number):
    return numpy.full({STORE_BYTES // 4}, number, numpy.uint8)
ballast = [fill.remote(number) for number in range(10)]
ray.wait(ballast, num_returns=len(ballast))
logs = pathlib.Path(ray._private.worker._global_node.get_session_dir_path())
assert any(path.is_file() for path in logs.glob("ray_spilled_objects*/*")), "nothing was spilled"
"""


def unsharing() -> list[str]:
    """The words that start a process in a mount namespace of its own; empty where the kernel refuses."""
    for words in (["unshare", "-m"], ["unshare", "-Urm"]):
        probe = subprocess.run([*words, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
        if probe.returncode == 0:
            return words
    return []


class TwoNodes:
    """A cluster of two nodes of one CPU each, of which the second can be lost (another takes its place).

    Attributes:
        folder: Short directory for sockets and logs; the disk is below it.
        disk: Directory of the cluster's own disk; "" where none can be made.
    """

    def __init__(self, folder: str, **env: str) -> None:
        self.folder = folder
        self.mark = secrets.token_hex(16)  # in the environment of every process of this cluster
        self.env = {
            **os.environ, **env, "RAY_AUTH_TOKEN": self.mark, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # how long Train believes that a lost node is there
        }  # fmt: skip
        self.env.pop("RAY_ADDRESS", None)
        unshare = unsharing()
        self.disk = str(Path(folder, "disk")) if unshare else ""
        words = [sys.executable, "-c", HOLDER, folder, str(STORE_BYTES)]
        if self.disk:
            Path(self.disk).mkdir(parents=True)
            words = [*unshare, "bash", "-c", WITH_DISK, self.disk, *words]
        self.holder = subprocess.Popen(
            words, env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.env["RAY_ADDRESS"] = self._answer()
        self._enter = ["nsenter", "-t", str(self.holder.pid), "-m"] if self.disk else []
        if "-Urm" in unshare:
            self._enter += ["-U", "--preserve-credentials"]

    def _answer(self) -> str:
        assert self.holder.stdout is not None
        answer = self.holder.stdout.readline().strip()
        assert answer, "the cluster's process ended"
        return answer

    def on_disk(self, *names: str) -> Path:
        """A path on the cluster's disk, as seen from outside."""
        return Path(f"/proc/{self.holder.pid}/root{self.disk}", *names)

    def resize_disk(self, num_bytes: int) -> None:
        """Give the cluster's disk another size."""
        resize = ["mount", "-o", f"remount,size={num_bytes}", self.disk]
        subprocess.run([*self._enter, *resize], check=True, capture_output=True)

    def lose_node(self) -> None:
        """Kill the second node and everything on it; another one starts."""
        assert self.holder.stdin is not None
        self.holder.stdin.write("lose\n")
        self.holder.stdin.flush()
        assert self._answer() == "lost"

    def workers(self, name: bytes = b"") -> list[int]:
        """Processes that run a task or an actor of Ray whose title has this in it; a node's agents are none."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdigit() or self.mark.encode() not in (entry / "environ").read_bytes():
                    continue
                title = (entry / "cmdline").read_bytes()
                ours = not any(word in title for word in (b"IDLE", b"DashboardAgent", b"RuntimeEnvAgent"))
                if title.startswith(b"ray::") and ours and name in title:
                    found.append(int(entry.name))
            except OSError:
                continue
        return sorted(found)

    def driver(self, stage: Any, settings: Any, *, ballast: bool = False) -> Driver:
        """Start a stage's driver; `ballast` fills the object stores first."""
        kind = f"{type(settings).__module__}:{type(settings).__name__}"
        program = BALLAST + DRIVER if ballast else DRIVER
        words = [sys.executable, "-c", program, stage.__name__, kind, settings.model_dump_json(), ""]
        return Driver([*self._enter, *words], self.env, Path(self.folder, f"driver-{secrets.token_hex(4)}.err"))

    def strike(self, victim: str, driver: Driver, rng: random.Random, worker: bytes = b"") -> bool:
        """Kill the driver, a worker or a node; returns whether there was still something to kill."""
        if driver.poll() is not None:
            return False
        if victim == "driver":
            driver.kill()
            driver.wait()
        elif victim == "node":
            self.lose_node()
        else:
            running = self.workers(worker)
            if not running:
                return False
            os.kill(rng.choice(running), signal.SIGKILL)
        return True

    def close(self) -> None:
        """End the cluster."""
        assert self.holder.stdin is not None
        self.holder.stdin.close()
        self.holder.wait(timeout=60)
