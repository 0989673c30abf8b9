"""A report's counts over a score table of ten million rows: seconds and memory, one process against Ray Data.

Writes a simulated score table of one test set (schema.POOL_SCORES), then folds it both ways and compares. Memory is the
peak of the driver's and of all workers' own resident pages, sampled ten times a second; in brackets what was added
while counting.

    python benchmarks/report_scale.py [--rows 10000000] [--part 250000] [--tests 50000] [--dir /tmp/report-scale]
"""

import argparse
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from clipgap_ray import schema, store
from clipgap_ray.reporting import pool_side
from clipgap_ray.stages import pool_side as stage
from clipgap_ray.stages.session import connect


def write(folder: Path, rows: int, part: int, tests: int) -> None:
    """Write parts of scores as `clipgap score` does, uids included."""
    for number, start in enumerate(range(0, rows, part)):
        path = folder / f"part-{number:05d}.parquet"
        if path.exists():
            continue
        count = min(part, rows - start)
        rng = np.random.default_rng(number)
        words = rng.integers(0, 2**63, 2 * count, np.uint64)
        m = np.clip(rng.normal(0.45, 0.12, count), -1, 1).astype(np.float32)
        table = pa.table(
            {
                "row_id": schema.row_ids(number, count),
                "uid": schema.hex_uids(schema.pack_words(words)),
                "m": m,
                "arg_m": rng.integers(0, tests, count),
                "margin": m - np.float32(0.6),
                "arg_margin": rng.integers(0, tests, count),
            }
        ).cast(schema.POOL_SCORES)
        store.write_table(str(path), table)


class Peak:
    """The largest resident memory of this process and of its descendants, in MB, while the block runs."""

    def __enter__(self):
        self.driver = self.workers = 0.0
        self._stop = threading.Event()
        self._start = self._now()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self.driver_above = self.driver - self._start[0]

    def _watch(self):
        while not self._stop.wait(0.1):
            driver, workers = self._now()
            self.driver, self.workers = max(self.driver, driver), max(self.workers, workers)

    def _now(self):
        workers = sum(_own_mb(pid) for pid in _descendants(os.getpid()) if _command(pid).startswith("ray::"))
        return _own_mb(os.getpid()), workers


def _own_mb(pid: int) -> float:
    """Resident memory in MB less what is shared: the object store's pages belong to everybody."""
    try:
        resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
    except OSError:
        return 0.0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _descendants(root: int) -> list[int]:
    """Every process below one, from the parents that /proc names."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found, waiting = [], [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def main() -> None:
    """Write, fold both ways, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--part", type=int, default=250_000)
    parser.add_argument("--tests", type=int, default=50_000)
    parser.add_argument("--dir", default="/tmp/report-scale")
    options = parser.parse_args()
    folder = Path(options.dir) / "pool" / "val"
    write(folder, options.rows, options.part, options.tests)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    parts = len(list(folder.iterdir()))
    print(f"{options.rows:,} rows, {parts} parts, {size:,.0f} MB of parquet, {options.tests:,} test images")
    started = time.perf_counter()
    with Peak() as here:
        alone = pool_side.merge([])
        for path in sorted(folder.iterdir()):
            table = store.read_table(str(path), list(pool_side.COLUMNS))
            alone = pool_side.merge([alone, pool_side.fold(table, 0.0)])
    seconds = time.perf_counter() - started
    rate = options.rows / seconds
    print(f"one process  {seconds:6.1f} s  {rate:12,.0f} rows/s  peak {here.driver:6.0f} MB ({here.driver_above:+.0f})")
    connect()
    started = time.perf_counter()
    with Peak() as there:
        spread = stage.count(str(folder), 0.0)
    seconds = time.perf_counter() - started
    rate = options.rows / seconds
    print(
        f"Ray Data     {seconds:6.1f} s  {rate:12,.0f} rows/s  peak {there.driver:6.0f} MB ({there.driver_above:+.0f})"
    )
    print(f"             in the driver and {there.workers:.0f} MB in all workers together")
    same = all(np.array_equal(getattr(alone, n), getattr(spread, n)) for n in ("nearest", "culprits", "removed"))
    print(f"equal counts: {same}; rows above tau {alone.num_above:,}")
    if not same:
        raise SystemExit(1)
    shutil.rmtree(options.dir)


if __name__ == "__main__":
    main()
