"""Two score runs of one pool side by side: their rows matched by uid, in bounded memory.

Two encoders need not agree on parts or rows: one may have failed where the other did not, and a uid that repeats counts
once, by the largest of its copies, wherever those lie. So rows are dealt into buckets by a hash of their uid, and every
bucket is matched alone. Files, below OUT/partial, removed at the end:

    first-group-00000.parquet    rows of a group of score parts, a row group per bucket; likewise second-*
    first-bucket-00000.parquet   the bucket's unique uids in order, the largest value of every column, `other`: where
                                 the second run has the uid, -1 where it has not
    first-rows-00000.parquet     the bucket's rows: `row_id`, `at` = position of their uid

Memory: a task holds the rows of one group, or of one bucket of both runs (about GROUP_ROWS and BUCKET_ROWS rows of 32
+ 8 bytes per test set, and copies while they are sorted: under 500 MB with seven test sets); the driver holds no row,
only SAMPLE values per run, test set and column. Bytes written: twice those of the columns. Unit of restart: the
command.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipgap_ray import filesystems, rundir, schema, store
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.kernels import splits, subsets
from clipgap_ray.kernels.vectors import error_bound
from clipgap_ray.stages.progress import Progress
from clipgap_ray.stages.waits import each_part

GROUP_ROWS = BUCKET_ROWS = 1 << 20
SAMPLE = 1 << 18  # values by which ranks are told (`kernels.ranks`); a pool of fewer uids is its own sample
CHUNKS = 64  # tasks of a pass over the buckets: more would return more than they read
BUCKET_SEED, SAMPLE_SEED = 11, 12
SIDES = ("first", "second")
COLUMNS = ("m", "margin")

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class ScoreRun:
    """An output of `score` and the names of its parts."""

    uri: str
    manifest: dict[str, Any]
    parts: tuple[str, ...]

    @property
    def bound(self) -> float:
        """How far a stored score may lie from the truth."""
        return float(self.manifest.get("bound") or error_bound(int(self.manifest["encoder"]["dim"])))

    @property
    def num_rows(self) -> int:
        """Rows of the pool: at least those that were scored."""
        pool = self.manifest["pool"]
        return int(pool.get("rows") or EmbeddingSet.open(pool["uri"]).num_rows)


@dataclass(frozen=True)
class Bucket:
    """The unique uids of a bucket in both runs.

    Attributes:
        number: Of the bucket.
        values: By run, (u,) float64 m and margin.
        common: Positions of the uids that both runs have, in the first and in the second run.
        uids: By run, (u,) `schema.UID`, sorted; None if nobody asked for them.
    """

    number: int
    values: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
    common: tuple[np.ndarray, np.ndarray]
    uids: tuple[np.ndarray, np.ndarray] | None


@dataclass(frozen=True)
class Pairs:
    """Two runs in buckets.

    Attributes:
        out: Folder of the buckets.
        runs: Both runs.
        tests: The test sets.
        num_buckets: Buckets.
        num_uids: Unique uids of either run.
        num_common: Uids of both.
        samples: (n,) float32 values of uids drawn by hash, by run (0, 1), test set and column.
    """

    out: str
    runs: tuple[ScoreRun, ScoreRun]
    tests: tuple[str, ...]
    num_buckets: int
    num_uids: tuple[int, int]
    num_common: int
    samples: dict[tuple[int, str, str], np.ndarray]

    def path(self, side: int, kind: str, number: int) -> str:
        """Return the file of a group or bucket."""
        return store.join(self.out, f"{SIDES[side]}-{kind}-{number:05d}.parquet")

    def read(self, bucket: int, test: str, *, uids: bool = False) -> Bucket:
        """Read a bucket's values of one test set, and its uids if they are asked for."""
        names = {column: _name(column, test) for column in COLUMNS}
        more = ["high", "low"] if uids else []
        tables = [
            store.read_table(self.path(side, "bucket", bucket), [*names.values(), *more, *(["other"] * (side == 0))])
            for side in (0, 1)
        ]
        first, second = (
            {column: table.column(name).to_numpy().astype(np.float64) for column, name in names.items()}
            for table in tables
        )
        other = tables[0].column("other").to_numpy()
        common = np.nonzero(other >= 0)[0], other[other >= 0]
        unique = (packed(tables[0]), packed(tables[1])) if uids else None
        return Bucket(bucket, (first, second), common, unique)

    def rows(self, side: int, bucket: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (n,) int64 row ids of a bucket of one run, and the (n,) int64 positions of their uids."""
        table = store.read_table(self.path(side, "rows", bucket))
        return table.column("row_id").to_numpy(), table.column("at").to_numpy()

    @property
    def num_rows(self) -> int:
        """Rows of the larger pool."""
        return max(run.num_rows for run in self.runs)

    def each(self, work: Callable[[list[int]], R], name: str) -> Iterator[R]:
        """Yield what `work` makes of lists of buckets, in any order; `name` is that of the progress line."""
        count = min(self.num_buckets, CHUNKS)
        chunks = [chunk.tolist() for chunk in np.array_split(np.arange(self.num_buckets), count)]
        yield from _shown(name, work, chunks, self.num_rows)

    def remove(self) -> None:
        """Remove the files of the buckets."""
        for name in store.list_names(self.out):
            store.remove(store.join(self.out, name))
        if filesystems.is_local(self.out):
            with contextlib.suppress(OSError):
                os.rmdir(filesystems.filesystem(self.out)[1])


def _shown(name: str, work: Callable[[T], R], items: list[T], num_rows: int) -> Iterator[R]:
    """`each_part` with a progress line: in this process for small pools, by Ray tasks for large ones."""
    progress = Progress(f"agreement, {name}", len(items), "tasks")
    for result in each_part(work, items, num_rows):
        yield result
        progress.advance()
    progress.close()


def packed(table: pa.Table) -> np.ndarray:
    """Return the (u,) `schema.UID` of a table with `high, low`."""
    words = np.empty(table.num_rows, schema.UID)
    words["f0"], words["f1"] = table.column("high").to_numpy(), table.column("low").to_numpy()
    return words


def _name(column: str, test: str) -> str:
    return f"{column} {test}"


def open_run(scores: str, tests: tuple[str, ...]) -> ScoreRun:
    """Open an output of `score`.

    Raises:
        DataError: If `scores` is no complete output of `score`.
        ConfigError: If it scores no row.
    """
    manifest = rundir.read_manifest(scores, "score")
    names = store.list_names(store.join(scores, "pool", tests[0]))
    parts = tuple(name for name in names if name.endswith(".parquet"))
    if not parts:
        raise ConfigError(f"{scores} scores no pool row: there is nothing to compare")
    return ScoreRun(scores, manifest, parts)


def pair(scores: tuple[str, str], tests: tuple[str, ...], out: str) -> Pairs:
    """Deal the rows of two runs into buckets and match their uids.

    Args:
        scores: Two outputs of `score` that have all the test sets.
        tests: Test sets whose scores are taken along.
        out: Folder for the buckets; what an earlier command left there goes.

    Raises:
        DataError: If a part has other rows for one test set than for another.
        ConfigError: If a run scores no row.
    """
    runs = (open_run(scores[0], tests), open_run(scores[1], tests))
    pairs = Pairs(out, runs, tests, 1, (0, 0), 0, {})
    num_rows = pairs.num_rows
    pairs = replace(pairs, num_buckets=max(1, -(-num_rows // BUCKET_ROWS)))
    pairs.remove()
    groups = [(side, number, names) for side, run in enumerate(runs) for number, names in enumerate(_groups(run))]
    scored = [0, 0]
    for side, count in _shown("deal", partial(_deal, pairs), groups, num_rows):
        scored[side] += count
    empty = [run.uri for run, count in zip(runs, scored, strict=True) if not count]
    if empty:
        raise ConfigError(f"{empty[0]} scores no pool row: there is nothing to compare")
    counts = [sum(group[0] == side for group in groups) for side in (0, 1)]
    work = partial(_match, pairs, counts, min(1.0, SAMPLE / num_rows))
    found = sorted(_shown("match", work, list(range(pairs.num_buckets)), num_rows), key=lambda one: one[0])
    for side, number, _ in groups:
        store.remove(pairs.path(side, "group", number))
    first, second, common = np.array([counted for _, counted, _ in found]).sum(axis=0).tolist()
    samples = {key: np.concatenate([sample[key] for *_, sample in found]) for key in found[0][2]}
    return replace(pairs, num_uids=(first, second), num_common=common, samples=samples)


def _groups(run: ScoreRun) -> list[tuple[str, ...]]:
    """Names of neighbouring parts, about GROUP_ROWS rows together."""
    count = max(1, GROUP_ROWS * len(run.parts) // max(run.num_rows, 1))
    return [run.parts[start : start + count] for start in range(0, len(run.parts), count)]


def _deal(pairs: Pairs, group: tuple[int, int, tuple[str, ...]]) -> tuple[int, int]:
    """Write the rows of a group by bucket; returns the run and the number of rows."""
    side, number, names = group
    run = pairs.runs[side]
    first = _read(run, pairs.tests[0], names, ["row_id", "uid", *COLUMNS])
    uids = schema.pack_uids(first.column("uid"))
    columns = {"row_id": first.column("row_id").to_numpy(), "high": uids["f0"], "low": uids["f1"]}
    for test in pairs.tests:
        table = first if test == pairs.tests[0] else _read(run, test, names, ["row_id", *COLUMNS])
        if not np.array_equal(table.column("row_id").to_numpy(), columns["row_id"]):
            raise DataError(f"{run.uri}: {names[0]} to {names[-1]} score other rows for {test} than {pairs.tests[0]}")
        columns |= {_name(column, test): table.column(column).to_numpy() for column in COLUMNS}
    bucket = (schema.hash_uids(uids, BUCKET_SEED) % np.uint64(pairs.num_buckets)).astype(np.int64)
    order = np.argsort(bucket, kind="stable")
    ends = np.cumsum(np.bincount(bucket, minlength=pairs.num_buckets))
    table = pa.table({name: values[order] for name, values in columns.items()})
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            writer.write_table(table.slice(start, end - start), row_group_size=max(int(end - start), 1))
    store.write_bytes(pairs.path(side, "group", number), sink.getvalue())
    return side, table.num_rows


def _read(run: ScoreRun, test: str, names: tuple[str, ...], columns: list[str]) -> pa.Table:
    folder = store.join(run.uri, "pool", test)
    return pa.concat_tables([store.read_table(store.join(folder, name), columns) for name in names])


def _match(
    pairs: Pairs, num_groups: list[int], share: float, bucket: int
) -> tuple[int, tuple[int, int, int], dict[tuple[int, str, str], np.ndarray]]:
    """Write a bucket of both runs; returns its number, uids of the first, of the second and of both, and samples."""
    names = [_name(column, test) for test in pairs.tests for column in COLUMNS]
    unique, tables, samples = [], [], {}
    for side, count in enumerate(num_groups):
        groups = (pairs.path(side, "group", number) for number in range(count))
        rows = pa.concat_tables([store.read_group(uri, bucket, ["row_id", "high", "low", *names]) for uri in groups])
        uids, at = splits.unique_uids(packed(rows))
        table = pa.table({"high": uids["f0"], "low": uids["f1"]})
        drawn = (schema.hash_uids(uids, SAMPLE_SEED) >> np.uint64(11)) / 2.0**53 < share  # uniform in [0, 1)
        for test in pairs.tests:
            for column in COLUMNS:
                values = rows.column(_name(column, test)).to_numpy()
                with np.errstate(invalid="ignore"):  # margins without thresholds are NaN
                    largest = splits.max_per_uid(values, at, len(uids)).astype(np.float32)  # of float32 values
                table = table.append_column(_name(column, test), pa.array(largest))
                samples[side, test, column] = largest[drawn]
        by_row = pa.table({"row_id": rows.column("row_id"), "at": at})
        store.write_table(pairs.path(side, "rows", bucket), by_row)
        unique.append(uids)
        tables.append(table)
    other = subsets.find(unique[1], unique[0])
    tables[0] = tables[0].append_column("other", pa.array(other))
    for side, table in enumerate(tables):
        store.write_table(pairs.path(side, "bucket", bucket), table)
    return bucket, (len(unique[0]), len(unique[1]), int((other >= 0).sum())), samples
