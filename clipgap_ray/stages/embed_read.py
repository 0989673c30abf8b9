"""The reading half of `embed`: one read task per shard, which decodes and yields chunks of samples.

Knows Ray Data's data source interface and little else of Ray. A task reads its shard with `shards.read_shard` (or
the test set's reader), decodes every image once, and turns whatever it must leave out into a ledger row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from clipgap_ray import schema, store, testsets
from clipgap_ray.blocklist import Blocklist
from clipgap_ray.kernels.phash import perceptual_hashes
from clipgap_ray.pixels import ImageError, Preprocess, grey_thumbnail, open_picture
from clipgap_ray.shards import Sample, Skip, read_shard
from clipgap_ray.sources import Shard


@dataclass(frozen=True)
class ReadPlan:
    """What a read task needs besides its shard.

    `blocklist` is the list itself, or its place in Ray's object store: a plan is copied into every task.
    """

    preprocess: Preprocess
    batch_size: int
    sample: float
    test_set: testsets.TestSet | None
    blocklist: Blocklist | ray.ObjectRef | None = None
    storage: store.StorageOptions = field(default_factory=store.StorageOptions)


class ShardDatasource(Datasource):
    """One read task per shard; each yields chunks of decoded samples."""

    def __init__(self, shards: list[tuple[int, Shard]], plan: ReadPlan) -> None:
        super().__init__()
        self._shards = shards
        self._plan = plan

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown before reading."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Return one task per shard, whatever the parallelism asked for."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(_reader(part, shard, self._plan), unknown) for part, shard in self._shards]


def _reader(part: int, shard: Shard, plan: ReadPlan) -> Callable[[], Iterator[pa.Table]]:
    return lambda: read_chunks(part, shard, plan)


CHUNK = pa.schema(
    [
        ("part", pa.int64()),
        ("chunk", pa.int32()),
        ("last", pa.bool_()),
        ("pixels", pa.large_binary()),  # (n, size, size, 3) uint8
        ("metadata", pa.large_binary()),  # Arrow stream of schema.METADATA without row_id
        ("ledger", pa.large_binary()),  # Arrow stream of schema.LEDGER
    ]
)


def read_chunks(part: int, shard: Shard, plan: ReadPlan) -> Iterator[pa.Table]:
    """Read and decode one shard into rows of `CHUNK`; the last chunk is marked and may be empty."""
    store.configure(plan.storage)
    blocked = ray.get(plan.blocklist) if isinstance(plan.blocklist, ray.ObjectRef) else plan.blocklist
    rows: list[Any] = []
    pixels: list[Any] = []
    grey: list[Any] = []
    ledger: list[Any] = []
    number = 0

    def flush(last: bool) -> pa.Table:
        nonlocal number
        stacked = np.stack(pixels) if pixels else np.zeros((0, 1, 1, 3), np.uint8)
        for row, plain, flipped in zip(rows, *_hashes(grey), strict=True):
            row["phash"], row["phash_flipped"] = plain, flipped
        chunk = {
            "part": part,
            "chunk": number,
            "last": last,
            "pixels": stacked.tobytes(),
            "metadata": to_stream(pa.Table.from_pylist(rows, schema=schema.METADATA)),
            "ledger": to_stream(pa.Table.from_pylist(ledger, schema=schema.LEDGER)),
        }
        number += 1
        for buffer in (rows, pixels, grey, ledger):
            buffer.clear()
        return pa.Table.from_pylist([chunk], schema=CHUNK)

    def note(key: str, reason: str, detail: str, dropped: bool) -> None:
        ledger.append({"shard": shard.name, "key": key, "reason": reason, "detail": detail, "dropped": dropped})

    for item in plan.test_set.read(shard) if plan.test_set else read_shard(shard):
        if isinstance(item, Skip):
            note(item.key, item.reason, item.detail, item.is_sample)
            continue
        if blocked is not None and blocked.reason(item.uid, item.sha256, item.url):
            note(item.key, "blocklist", "", True)
            continue
        if not sampled(item.uid, plan.sample):
            note(item.key, "not_sampled", "", True)
            continue
        try:
            picture = open_picture(item.image)
            decoded, thumbnail = plan.preprocess.resize(picture), grey_thumbnail(picture)
        except ImageError as error:
            note(item.key, error.reason, str(error), True)
            continue
        except (ValueError, OSError) as error:  # a colour space that Pillow decodes but cannot convert
            note(item.key, "broken_image", str(error)[:200], True)
            continue
        for reason in item.notes:
            note(item.key, reason, "", False)
        pixels.append(decoded)
        grey.append(thumbnail)
        rows.append(_metadata_row(item, shard))
        if len(rows) == plan.batch_size:
            yield flush(last=False)
    yield flush(last=True)


def _hashes(grey: list[np.ndarray]) -> tuple[list[int], list[int]]:
    if not grey:
        return [], []
    plain, flipped = perceptual_hashes(np.stack(grey))
    return plain.tolist(), flipped.tolist()


def sampled(uid: str, share: float) -> bool:
    """Tell whether a uid is in the sample: the same rows at any share, a larger share keeps those of a smaller."""
    return share >= 1 or int(uid[:8], 16) < share * 2**32


def _metadata_row(sample: Sample, shard: Shard) -> dict[str, Any]:
    fields = sample.fields
    return {
        "image_path": sample.key,
        "caption": sample.caption,
        "uid": sample.uid,
        "row_id": None,
        "shard": shard.name,
        "url": sample.url,
        "sha256": sample.sha256,
        "image_offset": sample.offset,
        "image_bytes": len(sample.image),
        "width": fields["width"] if isinstance(fields.get("width"), int) else None,
        "height": fields["height"] if isinstance(fields.get("height"), int) else None,
        "label": sample.label,
        "class_name": sample.class_name,
        "group": sample.group,
    }


def to_stream(table: pa.Table) -> bytes:
    """Return a table as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def from_stream(data: bytes) -> pa.Table:
    """Read the table of an Arrow stream."""
    return pa.ipc.open_stream(data).read_all()
