"""`clipgap score` from one to ten million rows: is the rate flat and is memory bounded?

Writes an embedding folder of 100,000-row parts (ten distinct ones, hard-linked: 1 GB of disk stands for 10 GB read),
then runs the stage and samples, each second, committed and running work, the resident memory of the driver and of the
largest worker. Prints one line per million rows.

    python benchmarks/score_scale.py [--rows 1000000] [--queries 5000] [--dim 512]
"""

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from clipgap_ray import embeddings, rundir, schema, store
from clipgap_ray.config.score import ScoreSettings
from clipgap_ray.config.split import GapMatch, Near
from clipgap_ray.encoder import EncoderSettings
from clipgap_ray.stages import score, split

PART_ROWS = 100_000
DISTINCT = 10


def unit(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    """(rows, dim) float16 unit rows."""
    values = rng.standard_normal((rows, dim), dtype=np.float32)
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


def metadata(part: int, rows: int) -> pa.Table:
    """Metadata of a part: uids and row ids."""
    ids = schema.row_ids(part, rows)
    columns = {"uid": [f"{part:016x}{i:016x}" for i in range(rows)], "row_id": ids}
    missing = [field.name for field in schema.METADATA if field.name not in columns]
    table = pa.table(columns | {name: pa.nulls(rows) for name in missing})
    return table.select(schema.METADATA.names).cast(schema.METADATA)


def write(folder: Path, rows: int, dim: int, rng: np.random.Generator) -> str:
    """Write an embedding folder; beyond the distinct parts, array files are hard links."""
    uri = str(folder)
    fingerprint = {**EncoderSettings("projection").build().fingerprint, "dim": dim}
    empty = pa.Table.from_pylist([], schema=schema.LEDGER)
    with rundir.RunDirectory(uri, "embed", {"made": "benchmark"}) as directory:
        records: list[dict] = []
        for part in range(-(-rows // PART_ROWS)):
            size = min(PART_ROWS, rows - part * PART_ROWS)
            if part < DISTINCT or size < PART_ROWS:
                vectors = unit(rng, size, dim)
                record = embeddings.write_part(uri, part, f"{part:05d}.tar", vectors, None, metadata(part, size), empty)
            else:
                for kind in ("img_emb", "metadata", "ledger"):
                    name = embeddings.part_file(kind, part)
                    os.link(folder / embeddings.part_file(kind, part % DISTINCT), folder / name)
                record = {**records[part % DISTINCT], "part": part, "shard": f"{part:05d}.tar"}
            records.append(record)
        directory.log.append(records)
        directory.finish({"encoder": fingerprint})
    return uri


def private_mb(pid: int) -> float:
    """Memory that only this process holds, in MB; 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_")) / 1e3


def ray_workers(root: int) -> list[int]:
    """Ray's worker processes below a process."""
    parents: dict[int, int] = {}
    names: dict[int, bytes] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(entry.name)] = (entry / "cmdline").read_bytes()
            except OSError:
                continue
    found = []
    for pid, name in names.items():
        above = pid
        while above in parents and above != root:
            above = parents[above]
        if above == root and name.startswith(b"ray::"):
            found.append(pid)
    return found


class Watch(threading.Thread):
    """Samples (seconds, rows scored, driver MB, largest worker MB) once a second until stopped."""

    def __init__(self, out: Path) -> None:
        super().__init__(daemon=True)
        self.out, self.samples, self.stop = out, [], threading.Event()

    def run(self) -> None:
        """Count the parts whose tables are written: they tell the rate between two commits."""
        started = time.monotonic()
        while not self.stop.wait(1.0):
            rows = len(list(self.out.glob("pool/a/*.parquet"))) * PART_ROWS
            worker = max((private_mb(pid) for pid in ray_workers(os.getpid())), default=0.0)
            self.samples.append((time.monotonic() - started, rows, private_mb(os.getpid()), worker))


def main() -> None:
    """Write, score, print a line per million rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--folder", default=None, help="where to write, default a temporary folder")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        pool = write(Path(root, "pool"), options.rows, options.dim, rng)
        per_set = options.queries // 6
        tests = [f"{name}={write(Path(root, name), per_set, options.dim, rng)}" for name in "abcdef"]
        reference = write(Path(root, "reference"), 20_000, options.dim, rng)
        watch = Watch(Path(root, "scores"))
        watch.start()
        summary = score.run(
            ScoreSettings(pool=pool, test=tuple(tests), reference=(reference,), out=str(watch.out), k=1)
        )
        watch.stop.set()
        manifest = store.read_json(str(watch.out / "summary.json"))
        cuts = {}
        for kind in (GapMatch(scores=str(watch.out), out=f"{root}/gap.npy", test=tuple("abcdef")),
                     Near(scores=str(watch.out), out=f"{root}/near.npy", test=("a",), size="0.5")):  # fmt: skip
            started = time.perf_counter()
            split.run(kind)
            cuts[kind.kind] = round(time.perf_counter() - started, 1)
    print(f"{options.rows:,} x {6 * per_set:,} x {options.dim}: {summary.seconds:.0f} s")
    print(f"{'million rows':>12}{'rows/s':>10}{'driver MB':>11}{'worker MB':>11}   (since the line before; peaks)")
    step, before = max(PART_ROWS, options.rows // 10), (0.0, 0)
    for mark in range(step, options.rows + 1, step):
        window = [s for s in watch.samples if before[1] < s[1] <= mark or s[1] == mark]
        reached = next((s for s in watch.samples if s[1] >= mark), None)
        if reached is None or not window:
            continue
        rate = (reached[1] - before[1]) / max(reached[0] - before[0], 1e-9)
        print(
            f"{reached[1] / 1e6:12.1f}{rate:10,.0f}{max(s[2] for s in window):11.0f}{max(s[3] for s in window):11.0f}"
        )
        before = (reached[0], reached[1])
    share = manifest["query_bytes"] / manifest["embedding_bytes"]
    print(json.dumps({"query_bytes_share": share, "seconds": summary.seconds, "seconds_of_cuts": cuts}))


if __name__ == "__main__":
    main()
