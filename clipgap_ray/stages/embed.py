"""Shards to embeddings: Ray Data reads and decodes on CPUs, actors encode, the driver assembles and commits parts.

    read task (one shard)  ->  chunks: (part, chunk, last, pixels, metadata)  ->  Encode actors  ->  driver

A chunk is one batch of the encoder, never crosses a part, and travels as one row, so no re-blocking can cut it.
The driver collects the chunks of a part, writes its files, and commits it; a part whose commit is missing is
computed again, a committed one never. Skipped samples travel in the chunks as ledger rows, so that counts
reconcile. Rejected: one bad sample failing a task (Ray's default), and row-level checkpoints (ray.md 1.4).

Reads: any source of `sources.list_shards`, or a labelled set of `testsets`. Writes: `embeddings` layout.
Unit of restart: the shard. Actors: one per GPU, or one per core. On failure: run the same command again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from clipgap_ray import embeddings, rundir, schema, store, testsets
from clipgap_ray.config.embed import EmbedSettings
from clipgap_ray.encoder import EncoderSettings, ImageError, Preprocess, check
from clipgap_ray.errors import ConfigError
from clipgap_ray.shards import Sample, Skip, read_shard
from clipgap_ray.sources import Shard, list_shards
from clipgap_ray.stages.session import Progress, cluster_gpus, connect, logger, physical_cpus, resolve_device

WINDOW_SHARDS = 4096  # shards per Ray Data execution: bounds the driver's plan at 41,408 shards
BLOCK_BYTES = 16 << 20  # small blocks: chunks reach the encoders while their shard is still being read
READ_CPUS = 0.5
ENCODE_CPUS = 0.5


@dataclass(frozen=True)
class ReadPlan:
    """What a read task needs besides its shard."""

    preprocess: Preprocess
    batch_size: int
    sample: float
    test_set: testsets.TestSet | None


def run(settings: EmbedSettings) -> rundir.Summary:
    """Embed a source. Running again continues; new shards at the source are added.

    Raises:
        ConfigError: On an impossible setting, before any work.
        StaleOutputError: If `out` was written with other settings.
    """
    test_set = testsets.open_test_set(settings.source) if testsets.is_test_set(settings.source) else None
    shards = list(test_set.shards) if test_set else list_shards(settings.source)
    bounds = embeddings.parse_part_range(settings.shards)
    shards = shards[slice(*bounds)] if bounds else shards
    if not shards:
        raise ConfigError(f"--shards {settings.shards} selects none of the source's shards")
    encoder_settings = EncoderSettings(settings.model, settings.pretrained, crop_border=settings.crop_border)
    preprocess = check(encoder_settings)
    connect()
    encoder_settings = _resolve(encoder_settings, settings)
    fingerprint = encoder_settings.build().fingerprint
    guarded = {**settings.fingerprint(), "encoder": embeddings.identity(fingerprint)}
    # Appending shards is not a change of settings, moving weights to another path neither.
    for name in ("out", "shards", "pretrained"):
        guarded.pop(name)
    with rundir.RunDirectory(settings.out, "embed", guarded) as directory:
        parts = rundir.assign_parts(directory.uri, [shard.name for shard in shards])
        store.write_json(directory.path("encoder.json"), fingerprint)
        todo = [(parts[shard.name], shard) for shard in shards if parts[shard.name] not in directory.log.records]
        _announce(settings, encoder_settings, len(shards), len(todo))
        plan = ReadPlan(preprocess, settings.batch_size, settings.sample, test_set)
        _embed(directory, todo, plan, encoder_settings, settings, len(shards), fingerprint["dim"])
        return directory.finish(
            {
                "encoder": fingerprint,
                "source": settings.source,
                "shards": {str(parts[shard.name]): shard.uri for shard in shards},
                "kind": "test set" if test_set else "pool",
                "class_names": list(test_set.class_names) if test_set else [],
                "templates": list(test_set.templates) if test_set else [],
                "text": settings.text,
                "partial": {"shards": settings.shards, "sample": settings.sample},
            },
        )


def _resolve(encoder: EncoderSettings, settings: EmbedSettings) -> EncoderSettings:
    device = resolve_device(settings.device)
    precision = settings.precision
    if precision == "auto":
        precision = "fp16" if device == "cuda" else "fp32"
    return EncoderSettings(
        encoder.model, encoder.pretrained, device, precision, settings.batch_size, settings.threads, encoder.crop_border
    )


def _announce(settings: EmbedSettings, encoder: EncoderSettings, num_shards: int, todo: int) -> None:
    logger.info(
        "embed %s: %d shards, %d to do, %s on %s (%s)",
        settings.source, num_shards, todo, settings.model, encoder.device, encoder.precision,
    )  # fmt: skip


def _embed(
    directory: rundir.RunDirectory,
    todo: list[tuple[int, Shard]],
    plan: ReadPlan,
    encoder: EncoderSettings,
    settings: EmbedSettings,
    total: int,
    dim: int,
) -> None:
    progress = Progress("embed", total, "shards", done=total - len(todo))
    for start in range(0, len(todo), WINDOW_SHARDS):
        window = todo[start : start + WINDOW_SHARDS]
        names = {part: shard.name for part, shard in window}
        pending: dict[int, dict[int, dict[str, Any]]] = {}
        for chunk in _chunks(window, plan, encoder, settings):
            chunks = pending.setdefault(chunk["part"], {})
            chunks[chunk["chunk"]] = chunk
            last = next((number for number, c in chunks.items() if c["last"]), None)
            if last is None or len(chunks) != last + 1:
                continue
            del pending[chunk["part"]]
            ordered = [chunks[number] for number in range(len(chunks))]
            record = _write(directory.uri, chunk["part"], names[chunk["part"]], ordered, dim)
            directory.log.append([record])
            progress.advance(rows=record["rows"])
    progress.close()


def _chunks(
    window: list[tuple[int, Shard]], plan: ReadPlan, encoder: EncoderSettings, settings: EmbedSettings
) -> Iterator[dict[str, Any]]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = BLOCK_BYTES
    gpus = 1.0 if encoder.device == "cuda" else 0.0
    workers = settings.workers or (cluster_gpus() if gpus else physical_cpus())
    dataset = ray.data.read_datasource(
        ShardDatasource(window, plan), override_num_blocks=len(window), num_cpus=READ_CPUS
    ).map_batches(
        Encode,
        fn_constructor_args=(encoder, settings.text),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, workers)),
        num_cpus=ENCODE_CPUS,
        num_gpus=gpus,
    )
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        yield from table.to_pylist()


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
    rows: list[Any] = []
    pixels: list[Any] = []
    ledger: list[Any] = []
    number = 0

    def flush(last: bool) -> pa.Table:
        nonlocal number
        stacked = np.stack(pixels) if pixels else np.zeros((0, 1, 1, 3), np.uint8)
        row = {
            "part": part,
            "chunk": number,
            "last": last,
            "pixels": stacked.tobytes(),
            "metadata": _to_stream(pa.Table.from_pylist(rows, schema=schema.METADATA)),
            "ledger": _to_stream(pa.Table.from_pylist(ledger, schema=schema.LEDGER)),
        }
        number += 1
        for buffer in (rows, pixels, ledger):
            buffer.clear()
        return pa.Table.from_pylist([row], schema=CHUNK)

    def note(key: str, reason: str, detail: str, dropped: bool) -> None:
        ledger.append({"shard": shard.name, "key": key, "reason": reason, "detail": detail, "dropped": dropped})

    for item in plan.test_set.read(shard) if plan.test_set else read_shard(shard):
        if isinstance(item, Skip):
            note(item.key, item.reason, item.detail, item.is_sample)
            continue
        if not sampled(item.uid, plan.sample):
            note(item.key, "not_sampled", "", True)
            continue
        try:
            decoded = plan.preprocess.decode(item.image)
        except ImageError as error:
            note(item.key, error.reason, str(error), True)
            continue
        for reason in item.notes:
            note(item.key, reason, "", False)
        pixels.append(decoded)
        rows.append(_metadata_row(item, shard))
        if len(rows) == plan.batch_size:
            yield flush(last=False)
    yield flush(last=True)


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


class Encode:
    """Ray Data actor: holds an encoder, maps chunks of pixels and captions to rows."""

    def __init__(self, settings: EncoderSettings, text: bool) -> None:
        self.encoder = settings.build()
        self.text = text

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._encode(row) for row in table.to_pylist()])

    def _encode(self, row: dict[str, Any]) -> dict[str, Any]:
        size = self.encoder.preprocess.size
        pixels = np.frombuffer(row.pop("pixels"), np.uint8)
        pixels = pixels.reshape(-1, size, size, 3) if pixels.size else np.zeros((0, size, size, 3), np.uint8)
        row["images"] = self.encoder.encode_images(pixels).astype(np.float16).tobytes()
        row["texts"] = b""
        if self.text:
            captions = _from_stream(row["metadata"]).column("caption").to_pylist()
            known = [i for i, caption in enumerate(captions) if caption]
            texts = np.zeros((len(captions), self.encoder.dim), np.float16)
            texts[known] = self.encoder.encode_texts([captions[i] for i in known])
            row["texts"] = texts.tobytes()
        return row


def _write(uri: str, part: int, shard: str, chunks: list[dict[str, Any]], dim: int) -> dict[str, Any]:
    metadata = pa.concat_tables([_from_stream(chunk["metadata"]) for chunk in chunks])
    ledger = pa.concat_tables([_from_stream(chunk["ledger"]) for chunk in chunks])
    images, texts = _rows(chunks, "images", dim), _rows(chunks, "texts", dim)
    row_ids = pa.array(schema.row_ids(part, metadata.num_rows))
    metadata = metadata.set_column(schema.METADATA.get_field_index("row_id"), "row_id", row_ids)
    if len(texts) == len(images):
        score = np.einsum("nd,nd->n", images.astype(np.float32), texts.astype(np.float32))
        without = np.array([not caption for caption in metadata.column("caption").to_pylist()], dtype=bool)
        column = pa.array(score, mask=without, type=pa.float32())
        metadata = metadata.set_column(schema.METADATA.get_field_index("clip_score"), "clip_score", column)
        return embeddings.write_part(uri, part, shard, images, texts, metadata, ledger)
    return embeddings.write_part(uri, part, shard, images, None, metadata, ledger)


def _rows(chunks: list[dict[str, Any]], name: str, dim: int) -> np.ndarray:
    return np.frombuffer(b"".join(chunk[name] for chunk in chunks), np.float16).reshape(-1, dim)


def _to_stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _from_stream(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()
