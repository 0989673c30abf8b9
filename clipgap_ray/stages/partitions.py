"""Edges of a pool too large for all pairs: pairs within k-means partitions, and across to the probed ones.

Rows x and y are compared iff y's own partition is among the `probes` nearest of x, or x's among those of y. With as
many probes as partitions that is every pair, and the result is that of `--mode exact`.

Three passes, each resumed by the files it has left in DIR/partitions and DIR/edges:

1. centroids.npy: spherical k-means on the rows of lowest hash of (seed, uid), so on the same sample for any layout.
2. rows-<parts>.bin: a group of parts regrouped by partition, each row once per probe (n * probes * (2 d + 8 + 4 probes)
   bytes in all; removed when the stage is complete), one file per group, so that a partition is one range read in each.
   assigned-<parts>.npz, written last: where each partition starts, and every row's similarity to its own centroid.
3. edges/: one file per unit, a run of small partitions or a slice of a large one, at most `UNIT_BYTES` of rows.

Memory: a worker holds a group and twice its regrouped rows (pass 2), or a few copies of two units (pass 3): under 1 GB
with 2 probes; the driver holds 8 bytes per group and partition, and the k-means sample while it is drawn.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import ray
import threadpoolctl

from clipgap_ray import filesystems, schema, store
from clipgap_ray.embeddings import EmbeddingSet, Part
from clipgap_ray.kernels import clustering, duplicates
from clipgap_ray.stages.edges import Edges, RowMask, group_name, read_edges, run_units, sample_rows, write_edges
from clipgap_ray.stages.progress import Progress
from clipgap_ray.stages.session import connect
from clipgap_ray.stages.waits import bounded

ASSIGN_BYTES = UNIT_BYTES = 1 << 27
LEAST_UNIT_BYTES = 1 << 22
SAMPLE_ROWS = 1 << 20  # 1 GB of float16 rows at 512 dimensions; more only for more than 26,000 partitions
LEAST_POINTS = 40  # sampled rows per partition: FAISS's own lower limit is 39


class Assigned(NamedTuple):
    """What pass 2 leaves: names of its groups, (G, 2K + 1) uint32 starts of slots, (n,) float64 similarities.

    Slot 2c holds the rows whose own partition is c (residents), slot 2c + 1 those that only probe c (visitors).
    """

    groups: list[str]
    starts: np.ndarray
    similarity: np.ndarray


class Unit(NamedTuple):
    """Partitions first..last-1 as a whole; or of one partition, residents `right` with rows `left` of `slot`."""

    first: int
    last: int
    slot: int = -1
    left: tuple[int, int] = (0, 0)
    right: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """A file name that says what is compared."""
        if self.slot < 0:
            return f"partitions-{self.first:05d}-{self.last - 1:05d}"
        kind = "visitors" if self.slot % 2 else "residents"
        return f"partition-{self.first:05d}-{kind}-{self.left[0]}-{self.left[1]}x{self.right[0]}-{self.right[1]}"


# --- centroids -------------------------------------------------------------------------------------------


def centroids_of(uri: str, pool: EmbeddingSet, hashes: np.ndarray, num_partitions: int, seed: int) -> np.ndarray:
    """Return (K, d) float16 centroids, trained once per directory.

    Args:
        uri: The run directory.
        pool: The pool.
        hashes: (n,) uint64 hash of every row's uid: the lowest are the sample.
        num_partitions: Partitions wanted; K may be less (`kernels.clustering.spherical_kmeans`).
        seed: Of the k-means.
    """
    path = store.join(uri, "partitions", "centroids.npy")
    if not store.exists(path):
        wanted = min(clustering.POINTS_PER_PARTITION * num_partitions, max(SAMPLE_ROWS, LEAST_POINTS * num_partitions))
        everything = RowMask(pool, np.ones(pool.num_rows, bool))
        rows, _ = sample_rows(pool, everything, hashes, wanted, ASSIGN_BYTES, "dedup, k-means sample")
        train = ray.remote(num_cpus=1)(_train)
        (centroids,) = bounded(lambda sample: train.remote(sample, num_partitions, seed), [rows])
        store.write_bytes(path, store.array_bytes(centroids))
    return np.array(store.read_array(path))


def _train(sample: np.ndarray, num_partitions: int, seed: int) -> np.ndarray:
    # Nothing else of the stage runs now: take the whole node, not the one thread that Ray gives a task.
    with threadpoolctl.threadpool_limits(os.cpu_count()):
        return clustering.spherical_kmeans(sample, num_partitions, seed)


# --- assignment ------------------------------------------------------------------------------------------


def assign_rows(uri: str, pool: EmbeddingSet, centroids: np.ndarray, probes: int, *, regroup: bool) -> Assigned:
    """Find every row's nearest centroids; with `regroup` write the rows by partition, for `partition_edges`."""
    groups = list(pool.groups(ASSIGN_BYTES))
    connect()
    task = ray.remote(num_cpus=1)(_assign_group)
    shared = ray.put((pool, centroids, probes, regroup))
    progress = Progress("dedup, assign", len(groups), "groups of parts")
    for num_rows in bounded(lambda group: task.remote(uri, shared, group), groups):
        progress.advance(rows=num_rows)
    progress.close()
    names = [group_name(group) for group in groups]
    found = []
    for name in names:
        with np.load(io.BytesIO(store.read_bytes(_assigned_path(uri, name))), allow_pickle=False) as arrays:
            found.append((arrays["starts"], arrays["similarity"]))
    return Assigned(names, np.stack([starts for starts, _ in found]), np.concatenate([value for _, value in found]))


def _assign_group(uri: str, shared: Any, group: list[Part]) -> int:
    pool, centroids, probes, regroup = shared
    name = group_name(group)
    num_rows = sum(part.num_rows for part in group)
    if store.exists(_assigned_path(uri, name)):
        return num_rows
    rows = np.concatenate([np.asarray(pool.images(part.number)) for part in group])
    near, similarity = clustering.assign(rows, centroids, probes)
    slots = (2 * near + (np.arange(near.shape[1]) > 0)).ravel()
    order = np.argsort(slots, kind="stable")
    starts = np.searchsorted(slots[order], np.arange(2 * len(centroids) + 1)).astype(np.uint32)
    if regroup:
        ids = np.concatenate([schema.row_ids(part.number, part.num_rows) for part in group])
        at = order // near.shape[1]
        records = np.empty(len(order), record_type(pool.dim, near.shape[1]))
        records["row_id"], records["near"], records["row"] = ids[at], near[at], rows[at]
        store.write_bytes(_rows_path(uri, name), records.tobytes())
    buffer = io.BytesIO()
    np.savez(buffer, starts=starts, similarity=similarity)
    store.write_bytes(_assigned_path(uri, name), buffer.getvalue())
    return num_rows


def record_type(dim: int, probes: int) -> np.dtype:
    """Return the type of a record of rows-<parts>.bin: row id, its partitions, the nearest first, and the row."""
    return np.dtype([("row_id", "<i8"), ("near", "<i4", (probes,)), ("row", "<f2", (dim,))])


def _rows_path(uri: str, name: str) -> str:
    return store.join(uri, "partitions", f"rows-{name}.bin")


def _assigned_path(uri: str, name: str) -> str:
    return store.join(uri, "partitions", f"assigned-{name}.npz")


def remove_rows(uri: str) -> None:
    """Remove the regrouped rows of a complete directory; they are as large as the pool times the probes."""
    folder = store.join(uri, "partitions")
    fs, path = filesystems.filesystem(folder)
    for name in store.list_names(folder):
        if name.startswith("rows-"):
            fs.rm_file(store.join(path, name))


# --- comparison ------------------------------------------------------------------------------------------


def partition_edges(
    uri: str, pool: EmbeddingSet, alive: RowMask, assigned: Assigned, probes: int, min_similarity: float
) -> Edges:
    """Return every pair above the threshold that shares a partition, among the rows that are alive; each pair once."""
    dtype = record_type(pool.dim, probes)
    # About sixteen units or more: enough for a few cores and for an ETA, and the same on every cluster.
    unit_bytes = min(UNIT_BYTES, max(LEAST_UNIT_BYTES, int(assigned.starts[:, -1].sum()) * dtype.itemsize // 16))
    units = plan_units(assigned.starts, max(1, unit_bytes // dtype.itemsize))
    connect()
    task = ray.remote(num_cpus=1)(_compare_unit)
    shared = ray.put((alive, assigned.groups, dtype))

    def submit(unit: Unit) -> Any:
        return task.remote(uri, shared, unit, assigned.starts[:, 2 * unit.first : 2 * unit.last + 1], min_similarity)

    return run_units(submit, units, "dedup, compare", "groups of partitions")


def plan_units(starts: np.ndarray, chunk_rows: int) -> list[Unit]:
    """Divide the partitions into units of at most `chunk_rows` rows a side.

    Args:
        starts: (G, 2K + 1) starts of slots in every group's file.
        chunk_rows: Rows that a unit may hold, >= 1.

    Returns:
        Runs of small partitions, and for every partition that is larger all pairs of its slices.
    """
    sizes = np.diff(starts.astype(np.int64), axis=1).sum(axis=0)
    units: list[Unit] = []
    first, rows = 0, 0
    for partition in range(len(sizes) // 2):
        size = int(sizes[2 * partition] + sizes[2 * partition + 1])
        if rows and rows + size > chunk_rows:
            units.append(Unit(first, partition))
            first, rows = partition, 0
        if size > chunk_rows:
            units.extend(_slices(partition, int(sizes[2 * partition]), int(sizes[2 * partition + 1]), chunk_rows))
            first = partition + 1
        else:
            rows += size
    if rows:
        units.append(Unit(first, len(sizes) // 2))
    return units


def _slices(partition: int, residents: int, visitors: int, chunk_rows: int) -> Iterator[Unit]:
    """All pairs of slices of residents, then each slice of visitors with each of residents."""
    own = [(at, min(at + chunk_rows, residents)) for at in range(0, residents, chunk_rows)]
    for i, left in enumerate(own):
        for right in own[i:]:
            yield Unit(partition, partition + 1, 2 * partition, left, right)
    for at in range(0, visitors, chunk_rows):
        for right in own:
            yield Unit(partition, partition + 1, 2 * partition + 1, (at, min(at + chunk_rows, visitors)), right)


def _compare_unit(uri: str, shared: Any, unit: Unit, starts: np.ndarray, min_similarity: float) -> tuple[str, int]:
    alive, groups, dtype = shared
    path = store.join(uri, "edges", f"{unit.name}.npz")
    if store.exists(path):
        return path, len(read_edges(path).first)
    spill = Spill([_rows_path(uri, name) for name in groups], starts, dtype, alive)
    return path, write_edges(path, _unit_edges(spill, unit, min_similarity))


def _unit_edges(spill: Spill, unit: Unit, min_similarity: float) -> Iterator[Edges]:
    if unit.slot < 0:
        slots = spill.slots()
        for partition in range(unit.first, unit.last):
            residents, visitors = slots[2 * (partition - unit.first)], slots[2 * (partition - unit.first) + 1]
            yield from _pairs(residents, residents, partition, min_similarity, same=True)
            yield from _pairs(visitors, residents, partition, min_similarity, same=False)
        return
    left = spill.slice(unit.slot - 2 * unit.first, unit.left)
    same = unit.slot % 2 == 0 and unit.left == unit.right
    right = left if same else spill.slice(0, unit.right)
    yield from _pairs(left, right, unit.first, min_similarity, same=same)


def _pairs(
    left: np.ndarray, residents: np.ndarray, partition: int, min_similarity: float, *, same: bool
) -> Iterator[Edges]:
    """Edges of records with residents of a partition, without those that a lower partition finds, too."""
    rows = np.ascontiguousarray(left["row"])
    others = rows if same else np.ascontiguousarray(residents["row"])
    for i, j, similarity in duplicates.edge_blocks(rows, others, min_similarity, same=same):
        home = left["near"][i, 0]
        # A visitor's own partition finds the pair as well if the resident visits there.
        elsewhere = (home < partition) & (residents["near"][j] == home[:, None]).any(axis=1)
        i, j, similarity = i[~elsewhere], j[~elsewhere], similarity[~elsewhere]
        yield Edges(left["row_id"][i], residents["row_id"][j], similarity)


class Spill:
    """The regrouped rows of a unit: range reads in every group's file.

    Args:
        paths: (G) files.
        starts: (G, s + 1) where the unit's slots start in each file, in records.
        dtype: `record_type`.
        alive: Rows to return.
    """

    def __init__(self, paths: list[str], starts: np.ndarray, dtype: np.dtype, alive: RowMask) -> None:
        self.paths, self.starts, self.dtype, self.alive = paths, starts.astype(np.int64), dtype, alive

    def slots(self) -> list[np.ndarray]:
        """Return the records of every slot, in pool order."""
        records = self._read(self.starts[:, 0], self.starts[:, -1])
        sizes = np.diff(self.starts, axis=1)
        slot = np.concatenate([np.repeat(np.arange(sizes.shape[1]), row) for row in sizes])
        order = np.argsort(slot, kind="stable")
        parts = np.split(records[order], np.cumsum(sizes.sum(axis=0))[:-1])
        return [self._living(part) for part in parts]

    def slice(self, slot: int, rows: tuple[int, int]) -> np.ndarray:
        """Return records rows[0]..rows[1]-1 of a slot, counted over all files in order."""
        sizes = self.starts[:, slot + 1] - self.starts[:, slot]
        before = np.cumsum(sizes) - sizes
        low = self.starts[:, slot] + np.clip(rows[0] - before, 0, sizes)
        high = self.starts[:, slot] + np.clip(rows[1] - before, 0, sizes)
        return self._living(self._read(low, high))

    def _read(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        size = self.dtype.itemsize
        found = [np.zeros(0, self.dtype)]
        for path, first, last in zip(self.paths, low.tolist(), high.tolist(), strict=True):
            if first < last:
                found.append(np.frombuffer(store.read_bytes(path, first * size, (last - first) * size), self.dtype))
        return np.concatenate(found)

    def _living(self, records: np.ndarray) -> np.ndarray:
        return records[self.alive.at(records["row_id"])]
