"""The first pass of `export`: where the samples of a split lie in the input shards, and where each of them goes.

Every input shard gets a table of its samples that are in the split; from the counts follows which samples go into
which output tar. See `export` for the two passes together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from clipgap_ray import blocklist, rundir, schema, store
from clipgap_ray.kernels import subsets
from clipgap_ray.shards import Sample, read_shard
from clipgap_ray.sources import Shard
from clipgap_ray.stages.progress import Progress
from clipgap_ray.stages.session import connect
from clipgap_ray.stages.waits import bounded

TASK_CPUS = 0.5  # reading waits for disks and networks

# index/samples/part-00000.parquet: the samples of one input shard that are in the split, in the order of the shard.
INDEX = pa.schema(
    [
        ("position", pa.int64()),  # of the uid in the split
        ("uid", pa.string()),
        ("key", pa.string()),
        ("reason", pa.string()),  # "" = exported, else why not
        ("has_uid", pa.bool_()),  # the json says the uid
        ("suffixes", pa.list_(pa.string())),
        ("offsets", pa.list_(pa.int64())),
        ("sizes", pa.list_(pa.int64())),
        ("row", pa.int64()),  # of the sample among its shard's: where parquet and folders find it again
    ]
)


@dataclass(frozen=True)
class Slice:
    """A run of one input shard's exported samples: rows `start` to `stop` of its index, and which are second copies."""

    part: int
    shard: Shard
    num_bytes: int  # of the shard when it was indexed; 0 of a folder
    start: int
    stop: int
    copies: dict[int, int] = field(default_factory=dict)  # row -> copy number, where it is not 0


def build(
    uri: str,
    shards: list[Shard],
    split: np.ndarray,
    blocked: blocklist.Blocklist | None,
    inputs: dict[str, Any],
    workers: int,
) -> dict[int, dict[str, Any]]:
    """Index every input shard that is not indexed yet.

    Args:
        uri: The index directory.
        shards: The input shards; part numbers are positions.
        split: (u,) uids, "u8,u8".
        blocked: What must not be exported.
        inputs: What the index depends on, guarded.
        workers: Shards read at a time; 0 = one per core.

    Returns:
        The commit record of each part.
    """
    with rundir.RunDirectory(uri, "export-index", inputs) as directory:
        parts = rundir.assign_parts(directory.uri, [shard.name for shard in shards])
        todo = [shard for shard in shards if parts[shard.name] not in directory.log.records]
        if todo:
            connect()
            shared = ray.put((np.asarray(split), blocked))  # one copy per node, read in place
            task = ray.remote(num_cpus=TASK_CPUS)(index_shard)
            progress = Progress("export: index", len(shards), "shards", done=len(shards) - len(todo))
            submit = lambda shard: task.remote(directory.uri, parts[shard.name], shard, shared)  # noqa: E731
            for record in bounded(submit, todo, workers, {"CPU": TASK_CPUS}):
                directory.log.append([record])
                progress.advance(rows=record["read"])
            progress.close()
        directory.finish(inputs)
        return directory.log.records


def index_shard(
    uri: str, part: int, shard: Shard, shared: tuple[np.ndarray, blocklist.Blocklist | None]
) -> dict[str, Any]:
    """Write the index of one input shard; returns its commit record."""
    split, blocked = shared
    wants_sha = blocked is not None and len(blocked.sha256) > 0
    samples: list[Sample] = []
    reasons: list[str] = []
    dropped: dict[str, int] = {}
    for item in read_shard(shard, images=wants_sha):
        if isinstance(item, Sample):
            sha256 = item.sha256 if wants_sha else ""
            reasons.append(blocked.reason(item.uid, sha256, item.url) if blocked else "")
            item.image = b""
            samples.append(item)
        elif item.is_sample:
            dropped[item.reason] = dropped.get(item.reason, 0) + 1
    uids = schema.pack_uids([sample.uid for sample in samples])
    positions = subsets.find(split, uids)
    rows = [
        _index_row(row, sample, at, reason)
        for row, (sample, at, reason) in enumerate(zip(samples, positions.tolist(), reasons, strict=True))
        if at >= 0
    ]
    for reason in (row["reason"] for row in rows if row["reason"]):
        dropped[reason] = dropped.get(reason, 0) + 1
    if len(rows) < len(samples):
        dropped["not_in_split"] = len(samples) - len(rows)
    data = store.table_bytes(pa.Table.from_pylist(rows, schema=INDEX))
    store.write_bytes(store.join(uri, samples_file(part)), data)
    kept = sum(not row["reason"] for row in rows)
    return {
        "part": part,
        "read": kept + sum(dropped.values()),
        "kept": kept,
        "dropped": dropped,
        "without_uid": sum(not row["has_uid"] and not row["reason"] for row in rows),
        "bytes": 0 if shard.kind == "folder" else store.size(shard.uri),
        "files": {"samples": store.sha256(data)},
    }


def _index_row(row: int, sample: Sample, position: int, reason: str) -> dict[str, Any]:
    return {
        "position": position,
        "uid": sample.uid,
        "key": sample.key,
        "reason": reason,
        "has_uid": str(sample.fields.get("uid", "")).lower() == sample.uid,
        "suffixes": [member.suffix for member in sample.members],
        "offsets": [member.offset for member in sample.members],
        "sizes": [member.size for member in sample.members],
        "row": row,
    }


def samples_file(part: int) -> str:
    """Return the path of a part's table inside the index directory."""
    return f"samples/part-{part:05d}.parquet"


class Placement:
    """Which sample goes where: source order, cut into output tars; copies of a uid numbered in that order.

    Attributes:
        found: (u,) bool, uids of the split with at least one exported sample.
        blocked: (u,) bool, uids of the split with none, because of the blocklist.
        num_rows: Exported samples.
        num_copies: Exported samples beyond the first of their uid.
    """

    def __init__(self, uri: str, shards: list[Shard], records: dict[int, dict[str, Any]], split: np.ndarray) -> None:
        self._shards = shards  # part numbers are positions: the guard holds the list of shards fixed
        self._records = records
        self.found = np.zeros(len(split), bool)
        self.blocked = np.zeros(len(split), bool)
        self._copies: dict[int, dict[int, int]] = {}
        copies_of: dict[int, int] = {}  # only of uids that repeat
        for part in range(len(shards)):
            table = store.read_table(store.join(uri, samples_file(part)), ["position", "reason"])
            position = table.column("position").to_numpy()
            stays = np.array([not reason for reason in table.column("reason").to_pylist()], bool)
            self.blocked[position[~stays]] = True
            position = position[stays]
            first = np.zeros(len(position), bool)
            first[np.unique(position, return_index=True)[1]] = True
            again = np.nonzero(~(first & ~self.found[position]))[0]
            self.found[position] = True
            for row in again.tolist():
                at = int(position[row])
                copies_of[at] = copies_of.get(at, 0) + 1
                self._copies.setdefault(part, {})[row] = copies_of[at]
        self.blocked &= ~self.found
        self.num_rows = sum(record["kept"] for record in records.values())
        self.num_copies = sum(copies_of.values())

    def outputs(self, shard_size: int) -> list[list[Slice]]:
        """Return the slices of every output tar, in order."""
        outputs: list[list[Slice]] = []
        room = 0
        for part, shard in enumerate(self._shards):
            start, kept = 0, self._records[part]["kept"]
            while start < kept:
                if room == 0:
                    outputs.append([])
                    room = shard_size
                stop = min(kept, start + room)
                copies = {row: n for row, n in self._copies.get(part, {}).items() if start <= row < stop}
                outputs[-1].append(Slice(part, shard, self._records[part]["bytes"], start, stop, copies))
                room -= stop - start
                start = stop
        return outputs
