"""Embed and score on one and on two simulated nodes of one core each: how much faster, and the same bytes?

    python benchmarks/nodes.py [--rounds 3]

A node is Ray's own: a raylet with its workers, held on one core by the kernel. The driver and the cluster's head
processes run on the first core in both cases, so that two nodes have exactly one core more than one. Each case runs
over few and over many rows; the difference is without start-up. Needs two cores that nobody else uses.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from embed import photograph, write_shards
from score_scale import write

#: (few, many) rows, and what of the output is the result.
CASES = {
    "embed": ((1024, 6144), ("img_emb", "text_emb", "metadata")),
    "score": ((200_000, 1_000_000), ("pool", "queries")),
}
PER_SHARD = 128
QUERIES, DIM = 5000, 512

CHILD = """
import json, os, sys, time
import ray
from ray.cluster_utils import Cluster
stage, source, tests, out, nodes, folder = sys.argv[1:]
node = {"num_cpus": 1, "object_store_memory": 500_000_000}
os.sched_setaffinity(0, {0})
cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False, "temp_dir": folder})
if nodes == "2":
    os.sched_setaffinity(0, {1})
    cluster.add_node(**node)
    os.sched_setaffinity(0, {0})
os.environ["RAY_ADDRESS"] = cluster.address
from clipgap_ray.stages import session
session.connect()
if stage == "embed":
    from clipgap_ray.config.embed import EmbedSettings as Settings
    from clipgap_ray.stages import embed as module
    settings = Settings(source=source, out=out, model="projection", batch_size=64, yes=True)
else:
    from clipgap_ray.config.score import ScoreSettings as Settings
    from clipgap_ray.stages import score as module
    settings = Settings(pool=source, test=(f"test={tests}",), reference=(tests,), out=out, k=10)
started = time.perf_counter()
module.run(settings)
print(json.dumps(time.perf_counter() - started), flush=True)
ray.shutdown()
cluster.shutdown()
"""


def seconds(stage: str, source: str, tests: str, out: Path, nodes: int) -> float:
    """Run a stage on a fresh cluster; returns the seconds that the stage took."""
    folder = tempfile.mkdtemp(prefix="cg-nodes-", dir="/tmp")
    env = {**os.environ, "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    env.pop("RAY_ADDRESS", None)
    words = [sys.executable, "-c", CHILD, stage, source, tests, str(out), str(nodes), folder]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    shutil.rmtree(folder, ignore_errors=True)
    if done.returncode:
        sys.exit(f"{stage} on {nodes} nodes failed:\n{done.stderr[-3000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def digest(out: Path, kinds: tuple[str, ...]) -> str:
    """One hash over every file of the result."""
    total = hashlib.sha256()
    for kind in kinds:
        for path in sorted(out.joinpath(kind).rglob("*")):
            if path.is_file():
                total.update(str(path.relative_to(out)).encode() + path.read_bytes())
    return total.hexdigest()


def main() -> None:
    """Make the inputs, alternate between one node and two, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stage", choices=sorted(CASES), action="append")
    parser.add_argument("--folder", default=None, help="where the inputs go (2 GB)")
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("needs two cores")
    print(f"load {os.getloadavg()[0]:.1f} before the start\n")
    print("| stage | one node, rows/s | two nodes, rows/s | ratio | same bytes |\n|---|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        rng = np.random.default_rng(0)
        tests = write(Path(root, "tests"), QUERIES, DIM, rng)
        images = [photograph(256, seed) for seed in range(64)] if "embed" in (options.stage or CASES) else []
        for stage in options.stage or CASES:
            sizes, kinds = CASES[stage]
            sources = {
                rows: write_shards(Path(root, f"shards-{rows}"), rows, PER_SHARD, images)
                if stage == "embed"
                else write(Path(root, f"pool-{rows}"), rows, DIM, rng)
                for rows in sizes
            }
            rates: dict[int, list[float]] = {1: [], 2: []}
            digests = set()
            for number in range(options.rounds):
                for nodes in (1, 2):
                    took = []
                    for rows in sizes:
                        out = Path(root, f"{stage}-{rows}-{nodes}-{number}")
                        took.append(seconds(stage, sources[rows], tests, out, nodes))
                        if rows == max(sizes):
                            digests.add(digest(out, kinds))
                        shutil.rmtree(out)
                    rates[nodes].append((sizes[1] - sizes[0]) / (took[1] - took[0]))
            one, two = (statistics.median(rates[nodes]) for nodes in (1, 2))
            shown = [f"{statistics.median(v):,.0f} ({min(v):,.0f} to {max(v):,.0f})" for v in rates.values()]
            same = "yes" if len(digests) == 1 else "NO"
            print(f"| {stage} | {shown[0]} | {shown[1]} | {two / one:.2f} | {same} |", flush=True)


if __name__ == "__main__":
    main()
