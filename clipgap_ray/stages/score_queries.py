"""The query side of `score`: nearest rows of every test row, gathered in the driver and committed with their parts.

SCORES/queries/<test>.parquet           schema.QUERY_SCORES
SCORES/thresholds/<test>.parquet        schema.THRESHOLDS
SCORES/partial/group-<n>.npz            merged query sides of the parts that one commit names
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa

from clipgap_ray import rundir, schema, store
from clipgap_ray.config.score import ScoreSettings
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.kernels import nearest
from clipgap_ray.stages.thresholds import Tests, thresholds_path

QUERY_SHARE = 0.008  # of the embeddings read


class QuerySide:
    """Query sides of finished groups, merged in memory, written once they are a small share of what was read."""

    def __init__(self, directory: rundir.RunDirectory, num_queries: int, settings: ScoreSettings) -> None:
        self.nothing = nearest.empty(num_queries, settings.k)
        self._directory = directory
        self._commit_bytes = len(_npz(self.nothing)) / (settings.query_share or QUERY_SHARE)
        self._merged = self.nothing
        self._records: list[dict[str, Any]] = []

    def add(self, record: dict[str, Any], partial: nearest.QueryNearest) -> None:
        """Take a finished group; commit what has gathered when it is enough."""
        self._merged = nearest.merge([self._merged, partial])
        self._records.append(record)
        if sum(record["bytes"] for record in self._records) >= self._commit_bytes:
            self.commit()

    def commit(self) -> None:
        """Write the merged query side and commit its parts; nothing gathered, nothing written."""
        if not self._records:
            return
        parts = sorted(part for record in self._records for part in record["parts"])
        data = _npz(self._merged)
        store.write_bytes(_partial_path(self._directory.uri, parts[0]), data)
        read, kept = (sum(record[name] for record in self._records) for name in ("read", "kept"))
        self._directory.log.append(
            [
                {
                    "part": parts[0],
                    "parts": parts,
                    "inputs": {key: value for record in self._records for key, value in record["inputs"].items()},
                    "read": read,
                    "kept": kept,
                    "dropped": {"not_kept": read - kept} if read != kept else {},
                    "bytes": sum(record["bytes"] for record in self._records),
                    "query_bytes": len(data),
                    "bound": max(record["bound"] for record in self._records),
                    "files": {key: value for record in self._records for key, value in record["files"].items()},
                }
            ]
        )
        self._merged, self._records = self.nothing, []


def _npz(found: nearest.QueryNearest) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **found.__dict__)
    return buffer.getvalue()


def _partial_path(uri: str, group: int) -> str:
    return store.join(uri, "partial", f"group-{group:05d}.npz")


def read_partial(uri: str, group: int) -> nearest.QueryNearest:
    """Read the merged query side that a commit names by its first part."""
    with np.load(io.BytesIO(store.read_bytes(_partial_path(uri, group))), allow_pickle=False) as arrays:
        return nearest.QueryNearest(**{name: arrays[name] for name in arrays.files})


def write_queries(
    out: str, name: str, segment: int, tests: Tests, found: nearest.QueryNearest, pool: EmbeddingSet
) -> None:
    """Write the table of one test set, `name`, the `segment`-th of the stacked queries, and its thresholds."""
    rows = slice(int(tests.queries.offsets[segment]), int(tests.queries.offsets[segment + 1]))
    own = tests.sets[segment].all_metadata(["row_id", "uid"])
    tau = tests.thresholds[segment]
    uid_of = pool.uids_of(found.best_id[rows])
    table = pa.table(
        {
            "row_id": own.column("row_id"),
            "uid": own.column("uid"),
            "tau": tests.queries.tau[rows],
            "reference_uid": tau.column("reference_uid") if tau is not None else pa.nulls(own.num_rows, pa.string()),
            "similarity": found.best[rows],
            "nearest_uid": [uid_of.get(i) for i in found.best_id[rows].tolist()],
            "nearest_row_ids": list(found.row_ids[rows]),
            "nearest_similarities": list(found.similarities[rows]),
        },
        schema=schema.QUERY_SCORES,
    )
    store.write_table(store.join(out, "queries", f"{name}.parquet"), table)
    if tau is not None:
        store.write_table(thresholds_path(out, name), tau)
