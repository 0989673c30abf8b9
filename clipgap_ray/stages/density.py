"""Pool rows that lie closer to a test image than a floor: what density matching and equalising cut from.

One pass over the pool as in `gaps`; tasks return edges only. Nothing is written: the split is the output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from clipgap_ray import schema
from clipgap_ray.embeddings import EmbeddingSet, Part
from clipgap_ray.errors import ConfigError
from clipgap_ray.kernels import nearest_exact
from clipgap_ray.stages.progress import Progress
from clipgap_ray.stages.session import connect
from clipgap_ray.stages.thresholds import nearest_in
from clipgap_ray.stages.waits import bounded

if TYPE_CHECKING:
    from clipgap_ray.stages.split import Table

GROUP_BYTES = 1 << 27
MAX_EDGES = 100_000_000  # 2.4 GB in the driver


def edges_outside_the_hull(
    table: Table, tests: tuple[str, ...], neighbours: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the edges of `kernels.splits.density_match` and the reference's neighbour curves.

    Args:
        table: Open score tables.
        tests: Test sets, scored with a reference.
        neighbours: k.

    Returns:
        (e,) int64 uid positions, sorted; (e,) int64 stacked test rows; (e,) float64 exact similarities, the largest
        over copies of a uid; (Q, k) float64 reference similarities, descending.

    Raises:
        ConfigError: If a test set was scored without a reference's embeddings, or more than `MAX_EDGES` pairs pass.
    """
    described = table.manifest["tests"]
    without = [test for test in tests if not described[test].get("reference")]
    if without or not tests:
        raise ConfigError(
            f"density-match needs the reference's embeddings for {without or 'at least one --test'}",
            hint="score with --reference EMB; a thresholds file knows the first neighbour only",
        )
    rows = [EmbeddingSet.open(described[test]["uri"]).all_images() for test in tests]
    curves = [
        nearest_in(EmbeddingSet.open(described[test]["reference"]), own, neighbours)[0]
        for test, own in zip(tests, rows, strict=True)
    ]
    reference, queries = np.concatenate(curves), np.concatenate(rows)
    hint = f"lower --neighbours ({neighbours})"
    if len(reference) and not np.isfinite(reference[:, -1]).all():  # no floor: every row of the pool would pass
        raise ConfigError(f"the reference has fewer than {neighbours} rows: there is no curve to match", hint=hint)
    return *edges_above(table, queries, reference[:, -1], hint), reference


def edges_above(
    table: Table, queries: np.ndarray, floor: np.ndarray, hint: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return all scored uids that are more alike to a query than its floor, in one pass over the pool.

    Args:
        table: Open score tables.
        queries: (Q, d) float16.
        floor: (Q,) float64.
        hint: What to do when there are too many.

    Returns:
        (e,) int64 uid positions, sorted; (e,) int64 queries; (e,) float64 exact similarities, the largest over copies.

    Raises:
        ConfigError: If more than `MAX_EDGES` pairs pass.
    """
    pool = EmbeddingSet.open(table.manifest["pool"]["uri"])
    connect()
    shared = ray.put((pool, queries, floor, hint))
    task = ray.remote(num_cpus=1)(_edges_of_group)
    groups = list(pool.groups(GROUP_BYTES))
    progress = Progress("edges", len(groups), "groups of parts")
    found, total = [], 0
    for edges in bounded(lambda group: task.remote(shared, group), groups):
        found.append(edges)
        total = _within_limit(total + len(edges[0]), hint)
        progress.advance(rows=len(edges[0]))
    progress.close()
    row_ids, query, similarity = (np.concatenate(columns) for columns in zip(*found, strict=True))
    return _per_uid(table, row_ids, query, similarity)


def _within_limit(total: int, hint: str) -> int:
    if total > MAX_EDGES:
        raise ConfigError(f"more than {MAX_EDGES:,} pairs of a pool row and a test image pass", hint=hint)
    return total


def _edges_of_group(shared: Any, group: list[Part]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    pool, queries, floor, hint = shared
    edges, total = [], 0
    for part in group:
        row, query, similarity = nearest_exact.above(np.asarray(pool.images(part.number)), queries, floor)
        edges.append((schema.row_ids(part.number, part.num_rows)[row], query, similarity))
        total = _within_limit(total + len(row), hint)
    row_ids, query, similarity = (np.concatenate(columns) for columns in zip(*edges, strict=True))
    return row_ids, query, similarity


def _per_uid(
    table: Table, row_ids: np.ndarray, query: np.ndarray, similarity: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turn rows into uids: rows that are not scored go, copies of a uid count once with their largest similarity."""
    order = np.argsort(table.row_ids, kind="stable")
    at = np.minimum(np.searchsorted(table.row_ids, row_ids, sorter=order), len(order) - 1)
    scored = table.row_ids[order[at]] == row_ids
    items = table.position[order[at[scored]]]
    query, similarity = query[scored], similarity[scored]
    by_pair = np.lexsort((-similarity, query, items))
    items, query, similarity = items[by_pair], query[by_pair], similarity[by_pair]
    first = np.ones(len(items), bool)
    first[1:] = (items[1:] != items[:-1]) | (query[1:] != query[:-1])
    return items[first], query[first], similarity[first]
