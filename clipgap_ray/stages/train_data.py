"""What training feeds on: where every sample lies, in which order, and batches made from it.

Nothing random is drawn from a shared generator: order and crops are functions of (seed, position). So whoever makes a
batch, a thread of the worker or an actor on another node, and from whichever step on, it is the same batch.
"""

from __future__ import annotations

import collections
import io
import math
import os
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from PIL import Image

from clipgap_ray import filesystems, store
from clipgap_ray.errors import DataError
from clipgap_ray.stages.session import own_error

PREFETCH_BATCHES = 4
DECODER_CPUS = 0.5
PIECE_ROWS = 64  # what a decoder makes at a time: 10 MB at 224 pixels
DATASET_PIECES = 4096
OPEN_WINDOWS = 3  # tables kept open, in windows of samples: a batch may straddle two


class Order(Protocol):
    """`SampleOrder` or `ResampledOrder`."""

    num_samples: int

    def take(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return epochs, parts and rows of the samples at positions start..stop-1."""
        ...


@dataclass(frozen=True)
class Part:
    """The samples of one shard that are trained on: the shard's table of `samples.SAMPLES`, and which rows of it.

    Attributes:
        uri: Parquet file of the sample index.
        keep: Bitmap over its rows (`np.packbits`); None keeps all.
        count: Rows kept.
    """

    uri: str
    keep: np.ndarray | None
    count: int

    def table(self) -> pa.Table:
        """Read the kept rows."""
        table = store.read_table(self.uri)
        if self.keep is None:
            return table
        return table.filter(pa.array(np.unpackbits(self.keep, count=table.num_rows).astype(bool)))


@dataclass(frozen=True)
class Plan:
    """Everything a worker needs; a bitmap of the pool is the largest of it.

    Attributes:
        parts: Where the samples are.
        order: The order over these parts.
        class_names: For the supervised objective.
        settings: `TrainSettings` as a dict.
        steps: Steps in all.
        image_size: Pixels.
        global_batch: Samples per step, over all workers.
    """

    parts: list[Part]
    order: Order
    class_names: tuple[str, ...]
    settings: dict[str, Any]
    steps: int
    image_size: int
    global_batch: int

    def share(self, step: int, rank: int, world_size: int) -> tuple[int, int]:
        """Return the positions (first, end) that a rank trains on in a step; all ranks together cover the batch."""
        size = self.global_batch // world_size
        start = step * self.global_batch + rank * size
        return start, start + size


class Tables:
    """The parts' tables, read when they are needed; the most recently used ones stay."""

    def __init__(self, parts: list[Part], most_rows: int) -> None:
        self._parts = parts
        self._most_rows = most_rows
        self._open: collections.OrderedDict[int, pa.Table] = collections.OrderedDict()
        self._rows = 0

    def __getitem__(self, part: int) -> pa.Table:
        if part not in self._open:
            self._open[part] = self._parts[part].table()
            self._rows += self._open[part].num_rows
            while self._rows > self._most_rows and len(self._open) > 1:
                self._rows -= self._open.popitem(last=False)[1].num_rows
        self._open.move_to_end(part)
        return self._open[part]


def read_image(row: dict[str, Any]) -> bytes:
    """Read the encoded bytes of a row of `samples.SAMPLES`.

    Raises:
        DataError: If its shard has become shorter since its samples were listed.
    """
    if row["offset"] < 0:
        return store.read_bytes(row["uri"])
    if filesystems.is_local(row["uri"]):
        with open(row["uri"].removeprefix("file://"), "rb") as file:
            data = os.pread(file.fileno(), row["num_bytes"], row["offset"])
    else:
        data = store.read_bytes(row["uri"], row["offset"], row["num_bytes"])
    if len(data) != row["num_bytes"]:
        raise DataError(
            f"{row['uri']} has {store.size(row['uri'])} bytes; when its samples were listed it had at least "
            f"{row['offset'] + row['num_bytes']}",
            hint="put the shard back as it was, or remove the folder of --samples and train anew in another --out",
        )
    return data


def augment(image: bytes, size: int, scale: tuple[float, float], key: tuple[int, ...]) -> np.ndarray:
    """Random resized crop as open_clip's (area `scale`, aspect 3/4 to 4/3), drawn from `key` alone.

    Returns:
        (size, size, 3) uint8; grey where the bytes cannot be decoded, so that no rank falls out of step.
    """
    try:
        picture = Image.open(io.BytesIO(image)).convert("RGB")
    except (OSError, ValueError, SyntaxError):
        return np.full((size, size, 3), 128, np.uint8)
    rng = np.random.default_rng(key)
    area = picture.width * picture.height * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    width = min(picture.width, math.sqrt(area * aspect))
    height = min(picture.height, math.sqrt(area / aspect))
    left, top = rng.uniform(0, picture.width - width), rng.uniform(0, picture.height - height)
    box = (left, top, left + width, top + height)
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box), dtype=np.uint8)


Batch = tuple[np.ndarray, list[str], np.ndarray]


class Reader:
    """Makes the samples at given positions of a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._tables = Tables(plan.parts, OPEN_WINDOWS * plan.settings["window"])

    def read(self, start: int, stop: int) -> Batch:
        """Return (n, s, s, 3) uint8 pixels, n captions and (n,) int64 labels at positions start..stop-1."""
        seed, scale = self.plan.settings["seed"], tuple(self.plan.settings["scale"])
        epochs, parts, rows = self.plan.order.take(start, stop)
        samples = [self._tables[part].slice(row, 1).to_pylist()[0] for part, row in zip(parts, rows, strict=True)]
        pixels = np.stack(
            [
                augment(read_image(sample), self.plan.image_size, scale, (seed, int(epoch), start + i))
                for i, (sample, epoch) in enumerate(zip(samples, epochs, strict=True))
            ]
        )
        return pixels, [s["caption"] or "" for s in samples], np.array([s["label"] for s in samples], np.int64)


def batches(plan: Plan, rank: int, world_size: int, first_step: int) -> Iterator[Batch]:
    """Yield this rank's batches from a step on, made in this process; shapes as `Reader.read`."""
    reader = Reader(plan)
    for step in range(first_step, plan.steps):
        yield reader.read(*plan.share(step, rank, world_size))


def batches_from_ray_data(plan_ref: Any, plan: Plan, rank: int, world_size: int, first_step: int) -> Iterator[Batch]:
    """Yield the same batches, read, decoded and augmented by Ray Data on whatever CPUs the cluster has.

    What goes in is positions of the plan, `PIECE_ROWS` at a time; blocks come back in their order, and are joined to
    steps. A lost decoder costs a piece made twice: pieces are functions of their positions. One dataset holds
    `DATASET_PIECES`, so that a plan of any length takes bounded memory; between two of them decoders start anew.

    Args:
        plan_ref: The plan in Ray's object store.
        plan: The same plan.
        rank: Whose batches.
        world_size: Of how many ranks.
        first_step: Where to begin.
    """
    import ray

    first, end = plan.share(first_step, rank, world_size)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.raise_original_map_exception = True
    steps = max(1, DATASET_PIECES * PIECE_ROWS // (end - first))
    for window in range(first_step, plan.steps, steps):
        pieces = list(_pieces(plan, rank, world_size, range(window, min(window + steps, plan.steps))))
        dataset = ray.data.from_items(pieces, override_num_blocks=len(pieces)).map_batches(
            _Decoder,
            fn_constructor_args=(plan_ref,),
            batch_size=None,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=plan.settings["decoders"]),
            num_cpus=DECODER_CPUS,
        )
        try:
            for made in dataset.iter_batches(batch_size=end - first, batch_format="numpy", prefetch_batches=1):
                yield made["pixels"], made["caption"].tolist(), made["label"]
        except ray.exceptions.RayTaskError as error:
            raise own_error(error) from None


def _pieces(plan: Plan, rank: int, world_size: int, steps: range) -> Iterator[dict[str, int]]:
    for step in steps:
        start, stop = plan.share(step, rank, world_size)
        for piece in range(start, stop, PIECE_ROWS):
            yield {"start": piece, "stop": min(piece + PIECE_ROWS, stop)}


class _Decoder:
    """A `Reader` in an actor of Ray Data."""

    def __init__(self, plan_ref: Any) -> None:
        import ray

        self._reader = Reader(ray.get(plan_ref))

    def __call__(self, piece: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        pixels, captions, labels = self._reader.read(int(piece["start"][0]), int(piece["stop"][0]))
        return {"pixels": pixels, "caption": np.array(captions, object), "label": labels}


def prefetched(batch_iterator: Iterator[Any]) -> Iterator[tuple[Any, float]]:
    """Yield batches made in a background thread, each with the seconds that the consumer waited for it."""
    ready: queue.Queue[Any] = queue.Queue(PREFETCH_BATCHES)
    end = object()

    def produce() -> None:
        try:
            for batch in batch_iterator:
                ready.put(batch)
            ready.put(end)
        except BaseException as error:  # noqa: BLE001  handed to the consumer, which raises it
            ready.put(error)

    threading.Thread(target=produce, name="batches", daemon=True).start()
    while True:
        started = time.perf_counter()
        item = ready.get()
        if item is end:
            return
        if isinstance(item, BaseException):
            raise item
        yield item, time.perf_counter() - started
