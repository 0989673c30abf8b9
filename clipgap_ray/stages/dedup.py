"""Duplicates of a pool: equal bytes by sha256, near ones by exact similarity over all pairs of groups of parts.

Tasks compare group with group and return edges only (row, row, similarity), never a matrix; the driver applies the
rule in uid order, so the result depends on neither shards nor workers.

Writes: DIR/keep/part-00000.parquet (schema.KEEP). Unit of restart: the pair of groups while the edges are
computed (DIR/edges/), the whole rule afterwards. Cost: all pairs, O(n^2 d) - seconds at 20,000 rows, an hour of one
GPU at ten million.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from clipgap_ray import rundir, schema, store
from clipgap_ray.config.score import DedupSettings
from clipgap_ray.embeddings import EmbeddingSet, Part
from clipgap_ray.errors import ConfigError
from clipgap_ray.kernels import duplicates
from clipgap_ray.stages.keep import keep_path
from clipgap_ray.stages.session import Progress, bounded, connect

GROUP_BYTES = 64 << 20
MAX_EDGES = 100_000_000  # 2.4 GB of edges in the driver


def run(settings: DedupSettings) -> rundir.Summary:
    """Deduplicate a pool.

    Raises:
        ConfigError: If the threshold is so low that more than `MAX_EDGES` pairs pass it.
    """
    pool = EmbeddingSet.open(settings.pool)
    guarded = {**settings.fingerprint(), "pool": pool.digest}
    guarded.pop("out")
    with rundir.RunDirectory(settings.out, "dedup", guarded) as directory:
        if len(directory.log.records) < len(pool.parts):
            first, second, similarity = _all_edges(directory.uri, pool, settings.min_similarity)
            tables = decide(pool, first, second, similarity, settings)
            for part, table in tables.items():
                directory.log.append([_write(directory.uri, part, table)])
        manifest = {"pool": {"uri": pool.uri, "digest": pool.digest, "rows": pool.num_rows}, "encoder": pool.encoder}
        return directory.finish(manifest)


def _all_edges(uri: str, pool: EmbeddingSet, min_similarity: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (row_id, row_id, similarity) of every pair above the threshold; finished pairs are read back."""
    groups = list(pool.groups(GROUP_BYTES))
    pairs = [(i, j) for i in range(len(groups)) for j in range(i, len(groups))]
    connect()
    task = ray.remote(num_cpus=1)(_compare)
    progress = Progress("dedup", len(pairs), "pairs of groups")
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    total = 0

    def submit(pair: tuple[int, int]) -> Any:
        return task.remote(uri, pool, groups[pair[0]], groups[pair[1]], pair, min_similarity)

    for edges in bounded(submit, pairs):
        found.append(edges)
        total += len(edges[0])
        progress.advance(rows=len(edges[0]))
        if total > MAX_EDGES:
            raise ConfigError(
                f"more than {MAX_EDGES:,} pairs are at least {min_similarity} alike",
                hint="raise --min-similarity: at this value most of the pool is its own duplicate",
            )
    progress.close()
    first, second, similarity = (np.concatenate(columns) for columns in zip(*found, strict=True))
    return first, second, similarity


def _compare(
    uri: str, pool: EmbeddingSet, left: list[Part], right: list[Part], pair: tuple[int, int], min_similarity: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    path = store.join(uri, "edges", f"{pair[0]:05d}-{pair[1]:05d}.npz")
    if store.exists(path):
        with np.load(io.BytesIO(store.read_bytes(path)), allow_pickle=False) as arrays:
            return arrays["first"], arrays["second"], arrays["similarity"]
    rows, ids = _gather(pool, left)
    other, other_ids = (rows, ids) if pair[0] == pair[1] else _gather(pool, right)
    i, j, similarity = duplicates.edges(rows, other, min_similarity, same=pair[0] == pair[1])
    buffer = io.BytesIO()
    np.savez(buffer, first=ids[i], second=other_ids[j], similarity=similarity)
    store.write_bytes(path, buffer.getvalue())
    return ids[i], other_ids[j], similarity


def _gather(pool: EmbeddingSet, parts: list[Part]) -> tuple[np.ndarray, np.ndarray]:
    rows = np.concatenate([np.asarray(pool.images(part.number)) for part in parts])
    return rows, np.concatenate([schema.row_ids(part.number, part.num_rows) for part in parts])


def decide(
    pool: EmbeddingSet, first: np.ndarray, second: np.ndarray, similarity: np.ndarray, settings: DedupSettings
) -> dict[int, pa.Table]:
    """Apply equal bytes first, then the rule to the edges among what is left; tables of `schema.KEEP` per part."""
    meta = pool.all_metadata(["row_id", "uid", "sha256"])
    row_ids = meta.column("row_id").to_numpy()
    uids = schema.pack_uids(meta.column("uid"))
    by_uid = np.lexsort((row_ids, uids["f1"], uids["f0"]))
    order = np.argsort(row_ids, kind="stable") if settings.order == "source" else by_uid
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))

    ordered_sha = np.array(meta.column("sha256").to_pylist())[order]
    _, head, inverse = np.unique(ordered_sha, return_index=True, return_inverse=True)
    exact = head[inverse]  # rank of the first row with the same bytes
    unknown = ordered_sha == ""  # imported embeddings have no bytes
    exact[unknown] = np.nonzero(unknown)[0]
    stays = exact == np.arange(len(order))

    position = np.searchsorted(row_ids, first), np.searchsorted(row_ids, second)
    low, high = rank[position[0]], rank[position[1]]
    among = stays[low] & stays[high]
    _, representative = duplicates.resolve(len(order), low[among], high[among], similarity[among], settings.rule)
    removed_by = np.where(stays, representative, exact)
    return _tables(pool, meta, order, rank, removed_by, stays, (low, high, similarity))


def _tables(
    pool: EmbeddingSet,
    meta: pa.Table,
    order: np.ndarray,
    rank: np.ndarray,
    removed_by: np.ndarray,
    stays: np.ndarray,
    edges: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> dict[int, pa.Table]:
    """Turn ranks back into rows: who stands for each row, why, and the group's head."""
    keep = removed_by == np.arange(len(order))
    head = removed_by.copy()
    while not np.array_equal(head, removed_by[head]):  # follow the chain to the row that stays
        head = removed_by[head]
    low, high, values = edges
    similarity = np.where(stays, np.nan, 1.0)
    hit = removed_by[np.maximum(low, high)] == np.minimum(low, high)
    near = hit & stays[np.maximum(low, high)]
    similarity[np.maximum(low, high)[near]] = values[near]
    row_ids, uids = meta.column("row_id").to_numpy(), meta.column("uid").to_pylist()
    by_row = rank  # position in the pool -> rank
    stands = order[head[by_row]]
    kept = keep[by_row]
    s = similarity[by_row].astype(np.float32)
    table = pa.table(
        {
            "row_id": row_ids,
            "uid": uids,
            "keep": kept,
            "kept_uid": [uids[i] for i in stands.tolist()],
            "similarity": pa.array(s, mask=kept | np.isnan(s)),
            "reason": np.where(kept, "", np.where(stays[by_row], "similarity", "sha256")),
            "group": row_ids[stands],
        },
        schema=schema.KEEP,
    )
    tables, start = {}, 0
    for part in pool.parts:
        tables[part.number] = table.slice(start, part.num_rows)
        start += part.num_rows
    return tables


def _write(uri: str, part: int, table: pa.Table) -> dict[str, Any]:
    data = store.table_bytes(table)
    store.write_bytes(keep_path(uri, part), data)
    reasons = table.column("reason").to_pylist()
    dropped = {name: reasons.count(name) for name in ("sha256", "similarity") if name in reasons}
    kept = reasons.count("")
    return {"part": part, "read": len(reasons), "kept": kept, "dropped": dropped, "files": {"keep": store.sha256(data)}}
