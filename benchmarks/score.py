"""The one exact pass against what people would otherwise run, on the same rows, threads and process.

Ours: `kernels.nearest.score` - m, margin, their argmaxima for six test sets, and the k nearest pool rows of every
test row, from float16 rows, in one pass. Peers: two `faiss.knn` top-1 searches (one per direction, float32), the same
numbers by plain numpy, and the bare matrix product of the same blocks. Rounds alternate; medians are printed.

On a GPU (`--device cuda`) ours is the torch pass, its peer the bare half-precision product in torch, and the rate is
carried on to the paper's size: 199.8 M pool rows against 166,963 test rows.

    python benchmarks/score.py [--rows 65536] [--queries 5000] [--dim 512] [--threads 2] [--rounds 5]
    python benchmarks/score.py --device cuda --rows 1000000 --queries 166963 --dim 640
"""

import argparse
import itertools
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


def numpy_pass(pool: np.ndarray, tests: np.ndarray, tau: np.ndarray, bounds: np.ndarray) -> list[np.ndarray]:
    """The same numbers as a user would write them: blocks of products, then numpy's reductions. `pool` is float16."""
    tests32 = tests.astype(np.float32)
    best, row = np.full(len(tests), -np.inf, np.float32), np.zeros(len(tests), np.int64)
    columns = []
    for start in range(0, len(pool), nearest.BLOCK_ROWS):
        product = pool[start : start + nearest.BLOCK_ROWS].astype(np.float32) @ tests32.T
        at = product.argmax(axis=0)
        here = product[at, np.arange(len(tests))]
        row, best = np.where(here > best, start + at, row), np.maximum(best, here)
        for values in (product, product - tau):
            columns.append(np.maximum.reduceat(values, bounds[:-1], axis=1))
            columns += [values[:, a:b].argmax(axis=1) for a, b in itertools.pairwise(bounds)]
    return [best, row, *columns]


def on_gpu(options: argparse.Namespace) -> None:
    """Time the torch pass on a GPU and the bare product, and project to the paper's size."""
    import torch

    device = torch.device("cuda")
    rng = np.random.default_rng(0)
    tests = unit(rng, options.queries, options.dim)
    sets = np.array_split(tests, 6)
    tau = [rng.uniform(0.1, 0.3, len(rows)) for rows in sets]
    queries = nearest.Queries.stack(sets, [np.arange(len(rows), dtype=np.int64) for rows in sets], tau)
    part = unit(rng, min(options.rows, 100_000), options.dim)
    parts = max(1, options.rows // len(part))

    def ours(k: int) -> None:
        one = nearest.begin(queries, k, device="cuda")
        for number in range(parts):
            one.feed(part, np.arange(len(part), dtype=np.int64) + number * len(part))
        one.found()

    half_tests = torch.from_numpy(tests).to(device).T.contiguous()

    def product() -> None:
        rows = torch.from_numpy(part).to(device)
        for _ in range(parts):
            for block in rows.split(4096):
                torch.mm(block, half_tests)
        torch.cuda.synchronize()

    flop = 2 * parts * len(part) * options.queries * options.dim
    print(f"{torch.cuda.get_device_name()}: {parts * len(part)} x {options.queries} x {options.dim}, float16 rows")
    for name, program in (
        ("ours, k=1", lambda: ours(1)),
        ("ours, k=100", lambda: ours(100)),
        ("bare product", product),
    ):
        program()
        median = statistics.median(timed(program) for _ in range(options.rounds))
        paper = 2 * 199.8e6 * 166_963 * 640 / (flop / median)
        print(f"{name:14} {median:8.2f} s {flop / median / 1e12:8.1f} TFLOP/s; the paper's size in {paper:8.0f} s")


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    if options.device == "cuda":
        on_gpu(options)
        return
    rng = np.random.default_rng(0)
    pool, tests = unit(rng, options.rows, options.dim), unit(rng, options.queries, options.dim)
    sets = np.array_split(tests, 6)
    ids = np.arange(options.rows, dtype=np.int64)
    tau = [rng.uniform(0.1, 0.3, len(rows)) for rows in sets]
    queries = nearest.Queries.stack(sets, [np.arange(len(rows), dtype=np.int64) for rows in sets], tau)
    bounds = np.cumsum([0, *map(len, sets)])
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
        "numpy, the same numbers": lambda: numpy_pass(pool, tests, np.concatenate(tau).astype(np.float32), bounds),
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
