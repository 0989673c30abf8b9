"""How many pairs a partitioned deduplication did not compare: a sample of rows against all rows.

Writes: DIR/check, the sample's pairs, one file per group of parts and the unit of restart.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import ray

from clipgap_ray import store
from clipgap_ray.embeddings import EmbeddingSet, Part
from clipgap_ray.kernels import duplicates, intervals
from clipgap_ray.stages import partitions
from clipgap_ray.stages.edges import Edges, RowMask, gather, group_name, read_edges, run_units, sample_rows, write_edges


def measure_misses(
    uri: str,
    pool: EmbeddingSet,
    alive: RowMask,
    hashes: np.ndarray,
    num_rows: int,
    found: Edges,
    thresholds: tuple[float, ...],
) -> dict[str, Any]:
    """Compare a sample of rows with all rows, and count the pairs that the partitioned pass did not compare.

    Args:
        uri: The run directory; DIR/check keeps the sample's pairs, one file per group of parts.
        pool: The pool.
        alive: Rows that were compared.
        hashes: (n,) uint64 hash of every row's uid: the lowest are the sample.
        num_rows: Rows of the sample.
        found: Edges of the partitioned pass, down to the lowest threshold.
        thresholds: Thresholds to report.

    Returns:
        {"rows": m, "at": {threshold: {"pairs", "missed", "miss_rate" (None without pairs), "miss_rate_95"}}}; the
        interval is Wilson's and takes pairs as independent, though a row at a border may miss several at once.
    """
    rows, ids = sample_rows(pool, alive, hashes, num_rows, partitions.ASSIGN_BYTES, "dedup, check sample")
    task = ray.remote(num_cpus=1)(_check_group)
    shared = ray.put((pool, alive, rows, ids))
    lowest = min(thresholds)
    truth = run_units(
        lambda group: task.remote(uri, shared, group, lowest),
        list(pool.groups(partitions.ASSIGN_BYTES)),
        "dedup, check",
        "groups",
    )
    sampled = np.zeros(len(alive.flags), bool)
    sampled[alive.positions(ids)] = True
    first, second = alive.positions(found.first), alive.positions(found.second)
    touched = sampled[first] | sampled[second]
    found_pairs = first[touched], second[touched]
    true_pairs = alive.positions(truth.first), alive.positions(truth.second)
    report = {}
    for threshold in thresholds:
        above = truth.similarity >= threshold
        pairs, missed = duplicates.count_missed(len(sampled), (true_pairs[0][above], true_pairs[1][above]), found_pairs)
        low, high = intervals.wilson(np.array([missed]), np.array([pairs])) if pairs else (np.zeros(1), np.ones(1))
        report[repr(threshold)] = {
            "pairs": pairs,
            "missed": missed,
            "miss_rate": missed / pairs if pairs else None,
            "miss_rate_95": [float(low[0]), float(high[0])],
        }
    return {"rows": len(ids), "at": report}


def _check_group(uri: str, shared: Any, group: list[Part], min_similarity: float) -> tuple[str, int]:
    pool, alive, sample, sample_ids = shared
    path = store.join(uri, "check", f"{group_name(group)}.npz")
    if store.exists(path):
        return path, len(read_edges(path).first)
    rows, ids = gather(pool, group, alive)

    def others() -> Iterator[Edges]:
        for i, j, similarity in duplicates.edge_blocks(sample, rows, min_similarity, same=False):
            other = sample_ids[i] != ids[j]
            yield Edges(sample_ids[i][other], ids[j][other], similarity[other])

    return path, write_edges(path, others())
