"""`agreement` and the pass of `audit` over pools of millions of rows: seconds and memory.

Writes two pools of the same samples by two made-up encoders (the second sees the first's rows and noise, its parts
are cut elsewhere and one in a hundred samples is missing), their scores against one test set, and looks through them.
Memory is the peak of the driver's and of all workers' own resident pages; in brackets what the driver added.

    python benchmarks/analyses_scale.py [--rows 10000000] [--dim 32] [--queries 200] [--dir /tmp/analyses-scale]
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from report_scale import Peak

from clipgap_ray import embeddings, rundir, schema, store
from clipgap_ray.config.join import AgreementSettings
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.kernels.vectors import error_bound
from clipgap_ray.stages import agreement, audit_pass
from clipgap_ray.stages.audit_pass import Sought
from clipgap_ray.stages.session import connect

BATCH = 100_000
TEST = "val"


def unit(rows: np.ndarray) -> np.ndarray:
    """(n, d) float16 unit rows."""
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def write_set(folder: Path, parts, name: str, dim: int) -> EmbeddingSet:
    """Write embeddings from (rows, packed uids) of every part."""
    empty = schema.LEDGER.empty_table()
    with rundir.RunDirectory(str(folder), "embed", {"made": "benchmark"}) as directory:
        for number, (rows, uids) in enumerate(parts):
            columns = {field.name: pa.nulls(len(rows), field.type) for field in schema.METADATA}
            columns |= {"uid": schema.hex_uids(uids), "row_id": schema.row_ids(number, len(rows))}
            table = pa.table(columns).select(schema.METADATA.names).cast(schema.METADATA)
            shard = f"{number:05d}.tar"
            directory.log.append([embeddings.write_part(str(folder), number, shard, rows, None, table, empty)])
        directory.finish({"encoder": {"model": name, "dim": dim}})
    return EmbeddingSet.open(str(folder))


def samples(rows: int, dim: int, encoder: int, size: int):
    """Yield (rows, uids) by parts of `size`: the same samples for both encoders, drawn by batches of their numbers."""
    left: list[tuple[np.ndarray, np.ndarray]] = []
    for batch, start in enumerate(range(0, rows, BATCH)):
        count = min(BATCH, rows - start)
        rng = np.random.default_rng(batch)
        vectors = rng.standard_normal((count, dim), dtype=np.float32)
        uids = schema.pack_words(rng.integers(0, 2**63, 2 * count, np.uint64))
        if encoder:
            vectors += 0.5 * rng.standard_normal((count, dim), dtype=np.float32)
            kept = rng.random(count) > 0.01
            vectors, uids = vectors[kept], uids[kept]
        left.append((unit(vectors), uids))
        while sum(len(v) for v, _ in left) >= size:
            joined = tuple(np.concatenate(columns) for columns in zip(*left, strict=True))
            yield joined[0][:size], joined[1][:size]
            left = [(joined[0][size:], joined[1][size:])]
    if left and len(left[0][0]):
        yield tuple(np.concatenate(columns) for columns in zip(*left, strict=True))


def write_scores(folder: Path, pool: EmbeddingSet, test: EmbeddingSet) -> str:
    """Write the scores of a pool as `score` does."""
    queries, tau = test.all_images().astype(np.float32), np.full(test.num_rows, 0.55)
    for part in pool.parts:
        similarity = np.asarray(pool.images(part.number)).astype(np.float32) @ queries.T
        best = similarity.max(axis=1)
        nowhere = np.full(part.num_rows, -1)
        uids = pool.metadata(part.number, ["uid"]).column("uid")
        values = [schema.row_ids(part.number, part.num_rows), uids, best, nowhere, best - np.float32(0.55), nowhere]
        table = pa.table(values, names=schema.POOL_SCORES.names).cast(schema.POOL_SCORES)
        store.write_table(str(folder / "pool" / TEST / f"part-{part.number:05d}.parquet"), table)
    count = test.num_rows
    values = {"row_id": schema.row_ids(0, count), "uid": test.all_metadata(["uid"])["uid"], "tau": tau,
              "similarity": tau, "nearest_row_ids": [[0]] * count, "nearest_similarities": [[0.0]] * count}  # fmt: skip
    columns = [values.get(field.name, pa.nulls(count, field.type)) for field in schema.QUERY_SCORES]
    table = pa.table(columns, schema=schema.QUERY_SCORES)
    store.write_table(str(folder / "queries" / f"{TEST}.parquet"), table)
    manifest = {"stage": "score", "digest": str(folder), "encoder": pool.encoder, "bound": error_bound(pool.dim),
                "tests": {TEST: {"uri": test.uri}}, "pool": {"uri": pool.uri, "rows": pool.num_rows}}  # fmt: skip
    store.write_json(str(folder / "manifest.json"), manifest)
    return str(folder)


def main() -> None:
    """Write, look through, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--dir", default="/tmp/analyses-scale")
    options = parser.parse_args()
    root = Path(options.dir)
    scores, pools = [], []
    for encoder, size in ((0, 100_000), (1, 70_000)):
        folder = root / f"encoder-{encoder}"
        drawn = samples(options.rows, options.dim, encoder, size)
        pools.append(write_set(folder / "pool", drawn, f"made up {encoder}", options.dim))
        rng = np.random.default_rng(-(-options.rows // BATCH))
        queries = rng.standard_normal((options.queries, options.dim), dtype=np.float32)
        queries = unit(queries + encoder * 0.5 * rng.standard_normal(queries.shape, dtype=np.float32))
        uids = schema.pack_words(np.arange(2 * options.queries, dtype=np.uint64))
        test = write_set(folder / "test", [(queries, uids)], f"made up {encoder}", options.dim)
        scores.append(write_scores(folder / "scores", pools[-1], test))
    print(
        f"{options.rows:,} rows, {len(pools[0].parts)} and {len(pools[1].parts)} parts, {options.queries} test images"
    )
    connect()
    started = time.perf_counter()
    with Peak() as peak:
        agreement.run(AgreementSettings(scores=(scores[0], scores[1]), out=str(root / "agreement")))
    report("agreement", options.rows, time.perf_counter() - started, peak)
    found = json.loads((root / "agreement" / "agreement.json").read_text())
    print(json.dumps({"uids": found["uids"], **found["tests"][0]}, indent=1))
    sought = Sought(EmbeddingSet.open(str(root / "encoder-0" / "test")).all_images(), frozenset({"none"}))
    started = time.perf_counter()
    with Peak() as peak:
        audit_pass.look(pools[0], sought, "audit")
    report("audit's pass", options.rows, time.perf_counter() - started, peak)
    shutil.rmtree(options.dir)


def report(what: str, rows: int, seconds: float, peak: Peak) -> None:
    """Print one line."""
    print(f"{what}: {seconds:.1f} s, {rows / seconds:,.0f} rows/s, driver {peak.driver:.0f} MB "
          f"({peak.driver_above:+.0f}), all workers {peak.workers:.0f} MB", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
