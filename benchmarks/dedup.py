"""Partitioned dedup against exact dedup: the same stage, rows, cluster and process, in alternating rounds.

Rows are a mixture of directions with Zipf sizes (the largest partition is what costs) with planted near copies. Every
round runs the whole stage from stored embeddings to keep tables in fresh directories; medians are printed, with the
planted pairs that each mode found and the miss rate that the partitioned run reports of itself.

    python benchmarks/dedup.py [--rows 40000] [--dim 256] [--partitions 32] [--probes 1 2 4] [--rounds 3]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from clipgap_ray import embeddings, rundir, schema
from clipgap_ray.config.dedup import DedupSettings
from clipgap_ray.kernels.vectors import exact_pairs, normalise
from clipgap_ray.stages import dedup
from clipgap_ray.stages.keep import read_keep

PART_ROWS = 10_000
DIRECTIONS = 200


def planted_pool(folder: str, num_rows: int, dim: int, near: float) -> tuple[embeddings.EmbeddingSet, np.ndarray]:
    """Write a pool; returns it with (p, 2) positions of its planted pairs, one row in ten being a copy."""
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, DIRECTIONS + 1) ** 1.1
    which = rng.choice(DIRECTIONS, num_rows, p=weights / weights.sum())
    rows = normalise(normalise(rng.standard_normal((DIRECTIONS, dim)))[which] + unit_noise(rng, num_rows, dim))
    count = num_rows // 10
    chosen = rng.permutation(num_rows)[: 2 * count].reshape(count, 2)
    spread = np.sqrt(2 * (1 - near) / 3)  # on average two thirds of the way from the threshold to equality
    rows[chosen[:, 1]] = normalise(rows[chosen[:, 0]] + spread * unit_noise(rng, count, dim))
    stored = rows.astype(np.float16)
    close = exact_pairs(stored[chosen[:, 0]], stored[chosen[:, 1]]) >= near
    return write_pool(folder, stored), chosen[close]


def unit_noise(rng: np.random.Generator, num_rows: int, dim: int) -> np.ndarray:
    """(num_rows, dim) rows of about unit norm."""
    return rng.standard_normal((num_rows, dim)) / np.sqrt(dim)


def write_pool(folder: str, rows: np.ndarray) -> embeddings.EmbeddingSet:
    """Write rows as a folder of embeddings without images."""
    with rundir.RunDirectory(folder, "embed", {"made": "benchmark"}) as directory:
        for part, start in enumerate(range(0, len(rows), PART_ROWS)):
            block = rows[start : start + PART_ROWS]
            columns = {field.name: pa.nulls(len(block), field.type) for field in schema.METADATA}
            columns["row_id"] = pa.array(schema.row_ids(part, len(block)))
            columns["uid"] = pa.array([f"{start + i:032x}" for i in range(len(block))])
            columns["sha256"] = pa.array([""] * len(block))
            table, ledger = pa.table(columns, schema=schema.METADATA), schema.LEDGER.empty_table()
            record = embeddings.write_part(folder, part, f"{part}.tar", block, None, table, ledger)
            directory.log.append([record])
        directory.finish({"encoder": {"dim": rows.shape[1], "model": "synthetic"}})
    return embeddings.EmbeddingSet.open(folder)


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--partitions", type=int, default=32)
    parser.add_argument("--probes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--near", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    modes = {"exact": {"mode": "exact"}}
    for probes in options.probes:
        name = f"partitioned, {options.partitions} x {probes} probes"
        modes[name] = {"mode": "partitioned", "partitions": options.partitions, "probes": probes}
    seconds = {name: [] for name in modes}
    kept, summaries = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        pool, planted = planted_pool(f"{folder}/pool", options.rows, options.dim, options.near)
        for turn in range(options.rounds + 1):  # the first one starts Ray and compiles; it is not counted
            for name, words in modes.items():
                out = str(Path(folder, f"{turn}-{name.replace(' ', '-')}"))
                # Checking is a service of its own, timed for nobody; once is enough for its number.
                settings = DedupSettings(
                    pool=pool.uri, out=out, min_similarity=options.near, check_rows=0 if turn else 1000, **words
                )
                started = time.perf_counter()
                summary = dedup.run(settings)
                if turn:
                    seconds[name].append(time.perf_counter() - started)
                else:
                    summaries[name] = summary.extra
                    kept[name] = np.concatenate(list(read_keep(out, pool).values()))
    reference = statistics.median(seconds["exact"])
    print(f"{options.rows} x {options.dim}, threshold {options.near}, {len(planted)} planted, {options.rounds} rounds")
    for name, values in seconds.items():
        median = statistics.median(values)
        found = 1 - np.mean(kept[name][planted].all(axis=1))
        check = summaries[name].get("check")
        rate = "" if check is None else f"  reports missing {check['at'][repr(options.near)]['miss_rate']:.2%}"
        print(f"{name:32} {median:7.2f} s  {reference / median:5.2f} x exact  planted found {found:.2%}{rate}")


if __name__ == "__main__":
    main()
