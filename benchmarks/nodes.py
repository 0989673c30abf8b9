"""Embed and score on one and on two simulated nodes of one core each: how much faster, and the same bytes?

    python benchmarks/nodes.py [--rounds 3]

A node is Ray's own: a raylet with its workers, held on one core by the kernel. The driver and the cluster's head
processes run on the first core in both cases, so that two nodes have exactly one core more than one. A rate is that of
the parts written after the first third, until the last: by then every node's workers have loaded what they need, which
on two nodes takes longer (one core starts everything). Needs two cores that nobody else uses.
"""

from __future__ import annotations

import argparse
import hashlib
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
import score_scale
from embed import photograph, write_shards

#: Rows, rows per part, and what of the output is the result; the first of these has one file per part.
CASES = {
    "embed": (20_480, 256, ("img_emb", "text_emb", "metadata")),
    "score": (1_000_000, 25_000, ("pool/test", "queries")),
}
QUERIES, DIM = 5000, 512

CHILD = """
import os, sys
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
module.run(settings)
ray.shutdown()
cluster.shutdown()
"""


def run(stage: str, source: str, tests: str, out: Path, nodes: int) -> None:
    """Run a stage on a fresh cluster."""
    folder = tempfile.mkdtemp(prefix="cg-nodes-", dir="/tmp")
    os.mkdir(f"{folder}/ray")  # where Ray's test cluster notes its address
    env = {**os.environ, "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_TMPDIR": folder}
    env.pop("RAY_ADDRESS", None)
    words = [sys.executable, "-c", CHILD, stage, source, tests, str(out), str(nodes), folder]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    shutil.rmtree(folder, ignore_errors=True)
    if done.returncode:
        sys.exit(f"{stage} on {nodes} nodes failed:\n{done.stderr[-3000:]}")


def rate(folder: Path, part_rows: int) -> float:
    """Rows per second by the times at which parts were written, the first third left out."""
    times = sorted(path.stat().st_mtime for path in folder.iterdir())
    first = len(times) // 3
    return (len(times) - 1 - first) * part_rows / (times[-1] - times[first])


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
    print("| stage | one node, rows/s | two nodes, rows/s | ratio | same bytes |\n|---|---:|---:|---:|---|", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        rng = np.random.default_rng(0)
        tests = score_scale.write(Path(root, "tests"), QUERIES, DIM, rng)
        for stage in options.stage or CASES:
            rows, score_scale.PART_ROWS, kinds = CASES[stage]
            source = (
                write_shards(Path(root, "shards"), rows, CASES[stage][1], [photograph(256, seed) for seed in range(64)])
                if stage == "embed"
                else score_scale.write(Path(root, "pool"), rows, DIM, rng)
            )
            rates: dict[int, list[float]] = {1: [], 2: []}
            digests = set()
            for number in range(options.rounds):
                for nodes in rates:
                    out = Path(root, f"{stage}-{nodes}-{number}")
                    run(stage, source, tests, out, nodes)
                    rates[nodes].append(rate(out / kinds[0], CASES[stage][1]))
                    digests.add(digest(out, kinds))
                    shutil.rmtree(out)
            ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
            cells = [*(_cell(values, ",.0f") for values in rates.values()), _cell(ratios, ".2f")]
            print(f"| {stage} | {' | '.join(cells)} | {'yes' if len(digests) == 1 else 'NO'} |", flush=True)


def _cell(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
