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

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from clipgap_ray import blocklist, embeddings, rundir, schema, store, testsets
from clipgap_ray.config.embed import EmbedSettings
from clipgap_ray.encoder import Encoder, EncoderSettings, check
from clipgap_ray.errors import ClipgapError, ConfigError
from clipgap_ray.shards import estimate_rows
from clipgap_ray.sources import Shard, list_shards
from clipgap_ray.stages import budget
from clipgap_ray.stages.embed_read import ReadPlan, ShardDatasource, from_stream, read_chunks
from clipgap_ray.stages.session import Progress, cluster_gpus, connect, logger, physical_cpus, resolve_device

WINDOW_SHARDS = 4096  # shards per Ray Data execution: bounds the driver's plan at 41,408 shards
BLOCK_BYTES = 16 << 20  # small blocks: chunks reach the encoders while their shard is still being read
READ_CPUS = 0.5
ENCODE_CPUS = 0.5


def run(settings: EmbedSettings) -> rundir.Summary:
    """Embed a source. Running again continues; new shards at the source are added.

    Raises:
        ConfigError: On an impossible setting, before any work.
        BudgetError: If it would run on CPUs for more than two hours and `yes` is not set.
        StaleOutputError: If `out` was written with other settings.
    """
    store.configure(settings.storage.options())
    test_set = testsets.open_test_set(settings.source) if testsets.is_test_set(settings.source) else None
    shards = list(test_set.shards) if test_set else list_shards(settings.source)
    bounds = embeddings.parse_part_range(settings.shards)
    shards = shards[slice(*bounds)] if bounds else shards
    if not shards:
        raise ConfigError(f"--shards {settings.shards} selects none of the source's shards")
    blocked = blocklist.read(settings.blocklist) if settings.blocklist else None
    encoder_settings = EncoderSettings(settings.model, settings.pretrained, crop_border=settings.crop_border)
    preprocess = check(encoder_settings)
    if settings.text and not encoder_settings.has_text:
        logger.info("embed: %s embeds images only; captions are kept, text rows left out", encoder_settings.model)
        settings = settings.model_copy(update={"text": False})
    connect()
    encoder_settings = _resolve(encoder_settings, settings)
    encoder = encoder_settings.build()
    fingerprint = encoder.fingerprint
    _check_budget(encoder, encoder_settings, settings, shards)
    guarded = {**settings.fingerprint(), "model": encoder_settings.model, "encoder": embeddings.identity(fingerprint)}
    # Appending shards is not a change of settings, moving weights to another path neither.
    for name in ("out", "shards", "pretrained", "blocklist"):
        guarded.pop(name)
    if blocked is not None:
        guarded["blocklist"] = blocked.describe()
    with rundir.RunDirectory(settings.out, "embed", guarded) as directory:
        parts = rundir.assign_parts(directory.uri, [shard.name for shard in shards])
        store.write_json(directory.path("encoder.json"), fingerprint)
        todo = [(parts[shard.name], shard) for shard in shards if parts[shard.name] not in directory.log.records]
        _announce(settings, encoder_settings, len(shards), len(todo))
        plan = ReadPlan(
            preprocess, settings.batch_size, settings.sample, test_set, blocked and ray.put(blocked), store.options()
        )
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
                "blocklist": blocked and blocked.describe(),
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


def _check_budget(
    encoder: Encoder, encoder_settings: EncoderSettings, settings: EmbedSettings, shards: list[Shard]
) -> None:
    """Say what a run on CPUs will take, before anything is written; hours need --yes."""
    if encoder_settings.device != "cpu":
        return
    done = {record["shard"] for record in rundir.CommitLog(settings.out).records.values()}
    left = [shard for shard in shards if shard.name not in done]
    if not left:
        return
    rows = round(estimate_rows(left[0]) * len(left) * min(settings.sample, 1.0))
    cores = physical_cpus()
    actors = max(1.0, min(settings.workers or cores, cores / settings.threads))
    predicted = budget.forecast(encoder, rows, actors, settings.text)
    logger.info("embed on cpu: %s", predicted)
    budget.check(predicted, settings.yes)


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
    try:
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            yield from table.to_pylist()
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, ClipgapError) else error from None


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
            captions = from_stream(row["metadata"]).column("caption").to_pylist()
            known = [i for i, caption in enumerate(captions) if caption]
            texts = np.zeros((len(captions), self.encoder.dim), np.float16)
            texts[known] = self.encoder.encode_texts([captions[i] for i in known])
            row["texts"] = texts.tobytes()
        return row


def _write(uri: str, part: int, shard: str, chunks: list[dict[str, Any]], dim: int) -> dict[str, Any]:
    metadata = pa.concat_tables([from_stream(chunk["metadata"]) for chunk in chunks])
    ledger = pa.concat_tables([from_stream(chunk["ledger"]) for chunk in chunks])
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


__all__ = ["Encode", "ReadPlan", "read_chunks", "run"]
