"""Which k-means partition of the pool every uid lies in, for core sets with a cap.

Writes DIR/partitions-K-sSEED/: centroids.npy and one part-*.npy of (rows,) int32 per part of the pool, the unit of
restart; every further split beside it reads them. The centroids come from the uids of lowest
value (hashes, so a random sample, and the same one for every layout), the assignment is exact (`kernels/clustering`).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from clipgap_ray import rundir, schema, store
from clipgap_ray.embeddings import EmbeddingSet, Part
from clipgap_ray.kernels import clustering
from clipgap_ray.stages.progress import Progress
from clipgap_ray.stages.waits import each_part

if TYPE_CHECKING:
    from clipgap_ray.stages.split import Table

SAMPLE_UIDS = 1 << 20  # 1 GB of float16 rows at 512 dimensions
LEAST_POINTS = 40  # sampled rows per partition: FAISS's own lower limit is 39


def of_uids(table: Table, folder: str, num_partitions: int, seed: int) -> tuple[np.ndarray, int]:
    """Partition the scored rows of a pool.

    Args:
        table: Its scores.
        folder: Where splits lie: the partitions are kept there.
        num_partitions: Partitions wanted; k-means finds fewer when the pool has fewer directions.
        seed: Of the k-means.

    Returns:
        (u,) int32 partition of every uid, and the number of partitions. Copies of a uid may differ in bytes: the lowest
        partition of its copies is the uid's, whatever their order.

    Raises:
        StaleOutputError: If the folder holds partitions of another pool.
    """
    pool = EmbeddingSet.open(table.manifest["pool"]["uri"])
    uri = store.join(folder or ".", f"partitions-{num_partitions}-s{seed}")
    wanted = min(clustering.POINTS_PER_PARTITION * num_partitions, max(SAMPLE_UIDS, LEAST_POINTS * num_partitions))
    sample = store.sha256(table.uids[:wanted].tobytes())  # of what was scored: other rows, other centroids
    guarded = {"pool": pool.digest, "sample": sample, "partitions": num_partitions, "seed": seed}
    with rundir.RunDirectory(uri, "partitions", guarded) as directory:
        path = directory.path("centroids.npy")
        if not store.exists(path):
            rows = _rows_of(table, pool, wanted)
            store.write_bytes(path, store.array_bytes(clustering.spherical_kmeans(rows, num_partitions, seed)))
        centroids = np.array(store.read_array(path))
        todo = [part for part in pool.parts if part.number not in directory.log.records]
        progress = Progress("partition", len(pool.parts), "parts", done=len(pool.parts) - len(todo))
        for record in each_part(partial(_part, pool, uri, centroids), todo, pool.num_rows):
            directory.log.append([record])
            progress.advance(rows=record["kept"])
        progress.close()
        directory.finish({"pool": {"uri": pool.uri, "digest": pool.digest}, "number": len(centroids)})
    parts, inside = schema.split_row_ids(table.row_ids)
    of_row = np.empty(len(table.row_ids), np.int32)
    for number in np.unique(parts).tolist():
        here = parts == number
        of_row[here] = np.asarray(store.read_array(_part_path(uri, number)))[inside[here]]
    result = np.full(table.num_uids, np.iinfo(np.int32).max, np.int32)
    np.minimum.at(result, table.position, of_row)
    return result, len(centroids)


def _rows_of(table: Table, pool: EmbeddingSet, wanted: int) -> np.ndarray:
    """(n, d) float16 rows of the lowest uids, the copies of one uid together."""
    rows = np.nonzero(table.position < wanted)[0]
    rows = rows[np.argsort(table.position[rows], kind="stable")]
    parts, inside = schema.split_row_ids(table.row_ids[rows])
    found = np.empty((len(rows), pool.dim), np.float16)
    for number in np.unique(parts).tolist():
        here = parts == number
        found[here] = np.asarray(pool.images(number))[inside[here]]
    return found


def _part(pool: EmbeddingSet, uri: str, centroids: np.ndarray, part: Part) -> dict[str, Any]:
    near, _ = clustering.assign(np.asarray(pool.images(part.number)), centroids, 1)
    data = store.array_bytes(near[:, 0])
    store.write_bytes(_part_path(uri, part.number), data)
    return {"part": part.number, "read": len(near), "kept": len(near), "files": {"partitions": store.sha256(data)}}


def _part_path(uri: str, part: int) -> str:
    return store.join(uri, f"part-{part:05d}.npy")
