"""One exact pass against a pipeline of top-N candidate lists on disk, as the paper's release prunes.

The peer is written from the description of the paper's code release. Per chunk of the pool and per test set, the
similarities of all pairs go, N/2 rows at a time, into a buffer of 2.5 N columns; whenever it is full, the N most
similar rows of each test image stay. These are written (float32 and int64). A second step reads the lists, keeps what
exceeds tau, and unites it; a further pass computes the largest similarity per row for near- and far-pruning. N is 2 %
of a chunk, as the release's 20,000 are of a million; `--chunk 1000000 --rows 1000000` is its own size.

Both run in a process of their own, so that peak memory is theirs. Printed: seconds, peak memory, bytes written, and
whether the peer under-pruned (a full list hides further violations).

    python benchmarks/candidates.py [--rows 131072] [--chunk 131072] [--queries 5000] [--dim 512] [--threads 2]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import threadpoolctl
import torch

BLOCK = 16384  # rows at a time, of our pass and of the peer's last one
SHARE = 0.02


def data(options: argparse.Namespace) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Pool, six test sets and thresholds; the sixth lies close to a part of the pool, as Sketch does to LAION."""
    rng = np.random.default_rng(0)

    def unit(rows: np.ndarray) -> np.ndarray:
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)

    pool = rng.standard_normal((options.rows, options.dim), dtype=np.float32)
    centre = rng.standard_normal(options.dim, dtype=np.float32)
    pool[: options.rows // 8] += centre  # a dense neighbourhood
    tests = rng.standard_normal((options.queries, options.dim), dtype=np.float32)
    tests[-options.queries // 6 :] += centre
    tau = rng.uniform(0.2, 0.3, options.queries)
    return unit(pool), np.array_split(unit(tests), 6), np.array_split(tau, 6)


def ours(pool: np.ndarray, tests: list[np.ndarray], tau: list[np.ndarray], folder: Path, chunk: int) -> int:
    """One pass, as the stage's workers do it: each has one thread and its part of the rows, their lists are merged.

    m, margin and both arguments are written as float32 and int32 columns. Returns the number removed.
    """
    from clipgap_ray.kernels import nearest

    ids = [np.arange(len(rows), dtype=np.int64) for rows in tests]
    workers = torch.get_num_threads()

    def part(worker: int) -> tuple[int, nearest.QueryNearest]:
        torch.set_num_threads(1)
        one = nearest.begin(nearest.Queries.stack(tests, ids, tau), 1)
        removed = 0
        for start in range(worker * BLOCK, len(pool), workers * BLOCK):
            rows = pool[start : start + BLOCK]
            scores = one.feed(rows, np.arange(start, start + len(rows), dtype=np.int64))
            np.savez(folder / f"scores-{start}.npz", m=scores.m, margin=scores.margin,
                     arg_m=scores.arg_m.astype(np.int32), arg_margin=scores.arg_margin.astype(np.int32))  # fmt: skip
            removed += int((scores.margin.max(axis=1) > 0).sum())
        return removed, one.found()

    with threadpoolctl.threadpool_limits(1), ThreadPoolExecutor(workers) as threads:
        parts = list(threads.map(part, range(workers)))
    np.savez(folder / "queries.npz", **nearest.merge([found for _, found in parts]).__dict__)
    return sum(removed for removed, _ in parts)


def top_rows(queries: torch.Tensor, rows: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `keep` most similar rows of a chunk per query: (q, keep) float32 similarities and int64 positions."""
    batch, width = keep // 2, keep * 5 // 2
    values = torch.empty(len(queries), width)
    at = torch.empty(len(queries), width, dtype=torch.int64)
    filled = 0

    def reduce() -> int:
        best, columns = torch.topk(values[:, :filled], min(keep, filled), dim=1)
        kept = torch.gather(at, 1, columns)
        values[:, : best.shape[1]], at[:, : best.shape[1]] = best, kept
        return best.shape[1]

    for start in range(0, len(rows), batch):
        similarities = queries @ rows[start : start + batch].T
        if filled + similarities.shape[1] > width:
            filled = reduce()
        end = filled + similarities.shape[1]
        values[:, filled:end] = similarities
        at[:, filled:end] = torch.arange(start, start + similarities.shape[1])
        filled = end
    filled = reduce()
    return values[:, :filled], at[:, :filled]


def candidate_lists(pool: np.ndarray, tests: list[np.ndarray], tau: list[np.ndarray], folder: Path, chunk: int) -> int:
    """Top-N lists per chunk and test set on disk, then threshold and unite; then a pass for the maxima."""
    for number, test in enumerate(tests):
        queries = torch.from_numpy(test.astype(np.float32))
        for start in range(0, len(pool), chunk):
            rows = torch.from_numpy(pool[start : start + chunk].astype(np.float32))
            values, at = top_rows(queries, rows, round(SHARE * chunk))
            np.save(folder / f"sims_{number}_{start}.npy", values.numpy())
            np.save(folder / f"idcs_{number}_{start}.npy", at.numpy() + start)
    removed = []
    for number, limits in enumerate(tau):
        for start in range(0, len(pool), chunk):
            values = np.load(folder / f"sims_{number}_{start}.npy")
            removed.append(np.unique(np.load(folder / f"idcs_{number}_{start}.npy")[values > limits[:, None]]))
    for number, test in enumerate(tests):
        queries = torch.from_numpy(test.astype(np.float32)).T
        for start in range(0, len(pool), BLOCK):
            rows = torch.from_numpy(pool[start : start + BLOCK].astype(np.float32))
            best, at = (rows @ queries).max(dim=1)
            np.save(folder / f"max_{number}_{start}.npy", best.numpy())
            np.save(folder / f"label_{number}_{start}.npy", at.numpy())
    return len(np.unique(np.concatenate(removed)))


def child(options: argparse.Namespace) -> None:
    """Run one program and print its figures as JSON."""
    pool, tests, tau = data(options)
    program = {"ours": ours, "candidates": candidate_lists}[options.program]
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder, threadpoolctl.threadpool_limits(options.threads):
        program(pool[:BLOCK], tests, tau, Path(folder), BLOCK)  # compiles, loads libraries
        for path in Path(folder).iterdir():
            path.unlink()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.perf_counter()
        removed = program(pool, tests, tau, Path(folder), options.chunk)
        seconds = time.perf_counter() - started
        written = sum(path.stat().st_size for path in Path(folder).iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "removed": removed, "written": written, "peak_mb": peak / 1e3,
                      "started_mb": before / 1e3}))  # fmt: skip


def main() -> None:
    """Run both programs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=131072)
    parser.add_argument("--chunk", type=int, default=131072)
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--program", choices=["ours", "candidates"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.program:
        child(options)
        return
    found = {}
    for program in ("ours", "candidates"):
        words = [sys.executable, __file__, "--program", program]
        words += [f"--{name}={getattr(options, name)}" for name in ("rows", "chunk", "queries", "dim", "threads")]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        found[program] = json.loads(done.stdout.splitlines()[-1])
    print(f"{options.rows} x {options.queries} x {options.dim}, six test sets, {options.threads} threads; "
          f"lists of {round(SHARE * options.chunk)} per chunk of {options.chunk}")  # fmt: skip
    print(f"{'':14}{'seconds':>9}{'written MB':>12}{'peak MB':>9}{'rows removed':>14}")
    for program, row in found.items():
        print(f"{program:14}{row['seconds']:9.2f}{row['written'] / 1e6:12.1f}{row['peak_mb']:9.0f}{row['removed']:14,}")
    one, other = found["ours"], found["candidates"]
    ratios = f"{other['seconds'] / one['seconds']:.1f} x time, {other['written'] / one['written']:.0f} x bytes"
    print(f"candidates / ours: {ratios}; under-pruned by {one['removed'] - other['removed']:,} rows")


if __name__ == "__main__":
    main()
