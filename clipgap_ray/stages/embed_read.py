"""The reading half of `embed`: one read task per shard, which decodes and yields chunks of samples.

Knows Ray Data's data source interface and little else of Ray. A task reads its shard with `shards.read_shard` (or
the test set's reader), decodes every image once, resizes it for every encoder that wants other pixels, and turns
whatever it must leave out into a ledger row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from clipgap_ray import filesystems, schema, testsets
from clipgap_ray.blocklist import Blocklist
from clipgap_ray.kernels.phash import perceptual_hashes
from clipgap_ray.pixels import ImageError, Preprocess, grey_thumbnail, open_picture
from clipgap_ray.shards import Sample, Skip, read_shard
from clipgap_ray.sources import Shard


@dataclass(frozen=True)
class Work:
    """A shard to read, its part number, and which of the run's outputs (by position) still lack the part."""

    part: int
    shard: Shard
    outputs: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class ReadPlan:
    """What a read task needs besides its shard.

    `preprocess` is that of every output, in their order. `blocklist` is the list itself, or its place in Ray's object
    store: a plan is copied into every task.
    """

    preprocess: tuple[Preprocess, ...]
    batch_size: int
    sample: float
    test_set: testsets.TestSet | None
    blocklist: Blocklist | ray.ObjectRef | None = None
    storage: filesystems.StorageOptions = field(default_factory=filesystems.StorageOptions)


class ShardDatasource(Datasource):
    """One read task per shard; each yields chunks of decoded samples."""

    def __init__(self, work: list[Work], plan: ReadPlan) -> None:
        super().__init__()
        self._work = work
        self._plan = plan

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown before reading."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Return one task per shard, whatever the parallelism asked for."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(_reader(work, self._plan), unknown) for work in self._work]


def _reader(work: Work, plan: ReadPlan) -> Callable[[], Iterator[pa.Table]]:
    return lambda: read_chunks(work, plan)


# A chunk is one row: these columns, and `pixels_0`, `pixels_1`, ... for each distinct preprocessing of the outputs,
# (n, size, size, 3) uint8 as one value; empty where no output of this shard wants them.
CHUNK = pa.schema(
    [
        ("part", pa.int64()),
        ("chunk", pa.int32()),
        ("last", pa.bool_()),
        ("rows", pa.int32()),
        ("images", pa.int32()),  # looked at: rows, and those that could not be decoded
        ("outputs", pa.list_(pa.int32())),
        ("metadata", pa.large_binary()),  # Arrow stream of schema.METADATA without row_id
        ("ledger", pa.large_binary()),  # Arrow stream of schema.LEDGER
        ("node", pa.string()),  # where it was decoded
        ("image_bytes", pa.int64()),  # encoded bytes of the images decoded
        ("decode_s", pa.float64()),  # CPU seconds of decoding and resizing them
    ]
)


def distinct_pixels(preprocess: tuple[Preprocess, ...]) -> list[Preprocess]:
    """Return the preprocessings that differ, in order of first appearance: `pixels_i` is made by the i-th."""
    return list(dict.fromkeys(preprocess))


class _Batch:
    """The samples of the chunk being read: pixels at their final place, metadata rows, ledger rows."""

    def __init__(self, shard: Shard, makers: list[Preprocess], wanted: list[bool], capacity: int) -> None:
        self.shard, self.makers, self.wanted, self.capacity = shard, makers, wanted, capacity
        self.number = 0
        self._clear()

    def _clear(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.grey: list[np.ndarray] = []
        self.ledger: list[dict[str, Any]] = []
        self.images, self.image_bytes, self.decode_s = 0, 0, 0.0
        self.pixels = [
            np.empty((self.capacity, maker.size, maker.size, 3), np.uint8) if wanted else None
            for maker, wanted in zip(self.makers, self.wanted, strict=True)
        ]

    def note(self, key: str, reason: str, detail: str, dropped: bool) -> None:
        name = self.shard.name
        self.ledger.append({"shard": name, "key": key, "reason": reason, "detail": detail, "dropped": dropped})

    def add(self, sample: Sample) -> None:
        """Decode a sample into the next row, or into the ledger."""
        started = time.thread_time()
        try:
            picture = open_picture(sample.image, self.makers[0].shrink_to)
            for maker, pixels in zip(self.makers, self.pixels, strict=True):
                if pixels is not None:
                    pixels[len(self.rows)] = maker.resize(picture)
            thumbnail = grey_thumbnail(picture)
        except ImageError as error:
            self.note(sample.key, error.reason, str(error), True)
            return
        except (ValueError, OSError) as error:  # a colour space that Pillow decodes but cannot convert
            self.note(sample.key, "broken_image", str(error)[:200], True)
            return
        finally:
            self.decode_s += time.thread_time() - started
            self.images, self.image_bytes = self.images + 1, self.image_bytes + len(sample.image)
        for reason in sample.notes:
            self.note(sample.key, reason, "", False)
        self.grey.append(thumbnail)
        self.rows.append(_metadata_row(sample, self.shard))

    def flush(self, work: Work, node: str, last: bool) -> pa.Table:
        """Return the chunk and begin the next."""
        for row, plain, flipped in zip(self.rows, *_hashes(self.grey), strict=True):
            row["phash"], row["phash_flipped"] = plain, flipped
        chunk = {
            "part": work.part, "chunk": self.number, "last": last, "rows": len(self.rows),
            "images": self.images, "outputs": work.outputs,
            "metadata": to_stream(pa.Table.from_pylist(self.rows, schema=schema.METADATA)),
            "ledger": to_stream(pa.Table.from_pylist(self.ledger, schema=schema.LEDGER)),
            "node": node, "image_bytes": self.image_bytes, "decode_s": self.decode_s,
        }  # fmt: skip
        table = pa.Table.from_pylist([chunk], schema=CHUNK)
        for i, pixels in enumerate(self.pixels):
            table = table.append_column(f"pixels_{i}", _one_value(pixels, len(self.rows)))
        self.number += 1
        self._clear()
        return table


def _one_value(pixels: np.ndarray | None, rows: int) -> pa.Array:
    """Pixels as a column of one value, without copying them: at 20 MB a chunk, copies cost as much as resizing."""
    data = pa.py_buffer(pixels[:rows]) if pixels is not None and rows else pa.py_buffer(b"")
    offsets = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, data])


def read_chunks(work: Work, plan: ReadPlan) -> Iterator[pa.Table]:
    """Read and decode one shard into rows of `CHUNK` and pixels; the last chunk is marked, and empty if the part is."""
    filesystems.configure(plan.storage)
    blocked = ray.get(plan.blocklist) if isinstance(plan.blocklist, ray.ObjectRef) else plan.blocklist
    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    makers = distinct_pixels(plan.preprocess)
    lacking = {plan.preprocess[output] for output in work.outputs}
    batch = _Batch(work.shard, makers, [maker in lacking for maker in makers], plan.batch_size)
    for item in plan.test_set.read(work.shard) if plan.test_set else read_shard(work.shard):
        if isinstance(item, Skip):
            batch.note(item.key, item.reason, item.detail, item.is_sample)
        elif blocked is not None and blocked.reason(item.uid, item.sha256, item.url):
            batch.note(item.key, "blocklist", "", True)
        elif not sampled(item.uid, plan.sample):
            batch.note(item.key, "not_sampled", "", True)
        else:
            if len(batch.rows) == plan.batch_size:  # only now, since a full chunk may be the last
                yield batch.flush(work, node, last=False)
            batch.add(item)
    yield batch.flush(work, node, last=True)


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
