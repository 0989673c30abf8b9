"""The one exact pass against what people would otherwise run, on the same rows, threads and process.

Ours: `kernels.nearest.score` - m, margin, their argmaxima for six test sets, and the k nearest pool rows of every
test row, from float16 rows, in one pass. Peers: two `faiss.knn` top-1 searches (one per direction, float32), and the
bare matrix product of the same blocks. Rounds alternate; medians are printed.

    python benchmarks/score.py [--rows 65536] [--queries 5000] [--dim 512] [--threads 2] [--rounds 5]
"""

import argparse
import statistics
import time

import faiss
import numpy as np
import threadpoolctl

from clipgap_ray.kernels import nearest


def unit(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    """(rows, dim) float16 unit rows."""
    values = rng.standard_normal((rows, dim), dtype=np.float32)
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


def timed(call) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    pool, tests = unit(rng, options.rows, options.dim), unit(rng, options.queries, options.dim)
    sets = np.array_split(tests, 6)
    ids = np.arange(options.rows, dtype=np.int64)
    tau = [rng.uniform(0.1, 0.3, len(rows)) for rows in sets]
    queries = nearest.Queries.stack(sets, [np.arange(len(rows), dtype=np.int64) for rows in sets], tau)
    pool32, tests32 = pool.astype(np.float32), tests.astype(np.float32)
    metric = faiss.METRIC_INNER_PRODUCT
    faiss.omp_set_num_threads(options.threads)
    programs = {
        "ours, k=1": lambda: nearest.score(pool, ids, queries, 1),
        "ours, k=100": lambda: nearest.score(pool, ids, queries, 100),
        "faiss.knn both ways, k=1": lambda: (
            faiss.knn(tests32, pool32, 1, metric=metric),
            faiss.knn(pool32, tests32, 1, metric=metric),
        ),
        "matrix product alone": lambda: [
            pool32[i : i + nearest.BLOCK_ROWS] @ tests32.T for i in range(0, options.rows, nearest.BLOCK_ROWS)
        ],
    }
    with threadpoolctl.threadpool_limits(options.threads):
        programs["ours, k=1"]()  # compiles the reductions
        scores, found = nearest.score(pool, ids, queries, 1)
        seconds = {name: [] for name in programs}
        for _ in range(options.rounds):
            for name, program in programs.items():
                seconds[name].append(timed(program))
    similarity, row = faiss.knn(tests32, pool32, 1, metric=metric)
    same = float(np.mean(found.row_ids[:, 0] == row[:, 0]))
    flop = 2 * options.rows * options.queries * options.dim
    reference = statistics.median(seconds["faiss.knn both ways, k=1"])
    print(f"{options.rows} x {options.queries} x {options.dim}, {options.threads} threads, {options.rounds} rounds")
    print(
        f"nearest rows equal to faiss: {same:.4f}; largest difference {np.abs(found.best - similarity[:, 0]).max():.1e}"
    )
    for name, values in seconds.items():
        median = statistics.median(values)
        print(
            f"{name:28} {median:7.2f} s  {flop / median / 1e9:7.1f} GFLOP/s  {median / reference:5.2f} x two faiss.knn"
        )
    assert scores.m.shape == (options.rows, 6)


if __name__ == "__main__":
    main()
