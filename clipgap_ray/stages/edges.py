"""Edges of a pool on disk and in the driver: who is at least as alike to whom as the lowest threshold.

A unit of work leaves one small file, DIR/edges/<name>.npz, whose name says what it compared; a unit whose file exists
is not computed again. Tasks return counts, so that no edge stays pinned in Ray's object store; the driver reads the
files one by one into arrays of the exact size: 24 bytes an edge, at most `MAX_EDGES` of them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import ray

from clipgap_ray import schema, store
from clipgap_ray.embeddings import EmbeddingSet, Part
from clipgap_ray.errors import ConfigError
from clipgap_ray.kernels import duplicates
from clipgap_ray.stages.progress import Progress
from clipgap_ray.stages.session import connect
from clipgap_ray.stages.waits import bounded

GATHER_CPUS = 0.5  # reads more than it computes
MAX_EDGES = 100_000_000  # 2.4 GB in the driver, and about 8 GB for a moment while a rule sorts them


class Edges(NamedTuple):
    """Pairs of rows: (e,) int64 row ids twice, (e,) float64 exact similarities."""

    first: np.ndarray
    second: np.ndarray
    similarity: np.ndarray


class RowMask:
    """A bit for every row of a pool, found by part or by row id.

    Args:
        pool: The pool.
        flags: (num_rows,) bool in pool order.
    """

    def __init__(self, pool: EmbeddingSet, flags: np.ndarray) -> None:
        self.flags = flags
        self.numbers = np.array([part.number for part in pool.parts], np.int64)
        self.starts = np.concatenate([[0], np.cumsum([part.num_rows for part in pool.parts])]).astype(np.int64)

    def of(self, part: int) -> np.ndarray:
        """Return the (num_rows,) bool of a part."""
        at = int(np.searchsorted(self.numbers, part))
        return self.flags[self.starts[at] : self.starts[at + 1]]

    def positions(self, row_ids: np.ndarray) -> np.ndarray:
        """Return the (n,) int64 positions in the pool of (n,) int64 row ids."""
        parts, rows = schema.split_row_ids(row_ids)
        return self.starts[np.searchsorted(self.numbers, parts)] + rows

    def at(self, row_ids: np.ndarray) -> np.ndarray:
        """Return the (n,) bool of (n,) int64 row ids."""
        return self.flags[self.positions(row_ids)]


def write_edges(path: str, blocks: Iterable[Edges]) -> int:
    """Write blocks of edges as one file, and return the number of edges.

    Raises:
        ConfigError: If there are more than `MAX_EDGES`.
    """
    found = [Edges(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    total = 0
    for block in blocks:
        total = within_limit(total + len(block.first))
        found.append(block)
    first, second, values = (np.concatenate(columns) for columns in zip(*found, strict=True))
    buffer = io.BytesIO()
    np.savez(buffer, first=first, second=second, similarity=values)
    store.write_bytes(path, buffer.getvalue())
    return total


def within_limit(total: int) -> int:
    """Return a number of edges, or raise ConfigError when it exceeds `MAX_EDGES`."""
    if total > MAX_EDGES:
        raise ConfigError(
            f"more than {MAX_EDGES:,} pairs of rows are at least as alike as the lowest threshold",
            hint="raise --min-similarity (and --also): at this value most of the pool is its own duplicate",
        )
    return total


def read_edges(path: str) -> Edges:
    """Read one file of edges."""
    with np.load(io.BytesIO(store.read_bytes(path)), allow_pickle=False) as arrays:
        return Edges(arrays["first"], arrays["second"], arrays["similarity"])


def run_units(submit: Callable[[Any], Any], units: Sequence[Any], stage: str, unit: str) -> Edges:
    """Run units of work and read the edges they leave.

    Args:
        submit: Starts a unit's task, which returns (path of its file, number of edges).
        units: What to work on.
        stage: Name of the pass, for the progress line.
        unit: What a unit is, in the plural.

    Raises:
        ConfigError: If there are more than `MAX_EDGES` edges.
    """
    connect()
    progress = Progress(stage, len(units), unit)
    counts: dict[str, int] = {}
    total = 0
    for path, count in bounded(submit, units):
        counts[path] = count
        total = within_limit(total + count)
        progress.note = f"{total:,} pairs found"
        progress.advance()
    progress.close()
    edges = Edges(np.empty(total, np.int64), np.empty(total, np.int64), np.empty(total))
    start = 0
    for path in sorted(counts):
        for column, values in zip(edges, read_edges(path), strict=True):
            column[start : start + counts[path]] = values
        start += counts[path]
    return edges


def exact_edges(uri: str, pool: EmbeddingSet, alive: RowMask, min_similarity: float, group_bytes: int) -> Edges:
    """Return every pair above the threshold among the rows that are alive: all pairs of groups of parts."""
    groups = list(pool.groups(group_bytes))
    pairs = [(groups[i], groups[j]) for i in range(len(groups)) for j in range(i, len(groups))]
    connect()
    task = ray.remote(num_cpus=1)(_compare_groups)
    shared = ray.put((pool, alive))
    return run_units(
        lambda pair: task.remote(uri, shared, pair[0], pair[1], min_similarity), pairs, "dedup", "pairs of groups"
    )


def _compare_groups(
    uri: str, shared: Any, left: list[Part], right: list[Part], min_similarity: float
) -> tuple[str, int]:
    pool, alive = shared
    path = store.join(uri, "edges", f"{group_name(left)}x{group_name(right)}.npz")
    if store.exists(path):
        return path, len(read_edges(path).first)
    same = left == right
    rows, ids = gather(pool, left, alive)
    other, other_ids = (rows, ids) if same else gather(pool, right, alive)
    blocks = duplicates.edge_blocks(rows, other, min_similarity, same=same)
    return path, write_edges(path, (Edges(ids[i], other_ids[j], s) for i, j, s in blocks))


def group_name(group: list[Part]) -> str:
    """Name a run of neighbouring parts by its first and last."""
    return f"{group[0].number:05d}-{group[-1].number:05d}"


def gather(pool: EmbeddingSet, group: list[Part], mask: RowMask) -> tuple[np.ndarray, np.ndarray]:
    """Return the (n, d) float16 rows of a group that the mask holds, and their (n,) int64 row ids."""
    rows = np.concatenate([np.asarray(pool.images(part.number))[mask.of(part.number)] for part in group])
    ids = [schema.row_ids(part.number, part.num_rows)[mask.of(part.number)] for part in group]
    return rows, np.concatenate(ids)


def sample_rows(
    pool: EmbeddingSet, mask: RowMask, hashes: np.ndarray, num_rows: int, group_bytes: int, stage: str
) -> tuple[np.ndarray, np.ndarray]:
    """Read the rows of lowest hash: the same sample for any layout of the same rows.

    Args:
        pool: The pool.
        mask: Rows to draw from.
        hashes: (n,) uint64 hash of every row's uid, in pool order.
        num_rows: Rows wanted; fewer come when the mask holds fewer.
        group_bytes: Bytes of neighbouring parts that one task reads.
        stage: Name of the pass, for the progress line.

    Returns:
        (m, d) float16 rows and (m,) int64 row ids, by rising hash.
    """
    candidates = np.nonzero(mask.flags)[0]
    chosen = candidates[np.argsort(hashes[candidates], kind="stable")[:num_rows]]
    flags = np.zeros(len(mask.flags), bool)
    flags[chosen] = True
    wanted = RowMask(pool, flags)
    groups = [group for group in pool.groups(group_bytes) if any(wanted.of(part.number).any() for part in group)]
    connect()
    task = ray.remote(num_cpus=GATHER_CPUS)(_gather_task)
    shared = ray.put((pool, wanted))
    progress = Progress(stage, len(groups), "groups of parts")
    found = [(np.zeros((0, pool.dim), np.float16), np.zeros(0, np.int64))]
    for rows, ids in bounded(lambda group: task.remote(shared, group), groups, needs={"CPU": GATHER_CPUS}):
        found.append((rows, ids))
        progress.advance(rows=len(ids))
    progress.close()
    rows, ids = (np.concatenate(column) for column in zip(*found, strict=True))
    at = wanted.positions(ids)
    order = np.lexsort((at, hashes[at]))
    return rows[order], ids[order]


def _gather_task(shared: Any, group: list[Part]) -> tuple[np.ndarray, np.ndarray]:
    pool, wanted = shared
    return gather(pool, group, wanted)
