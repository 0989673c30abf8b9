"""Shards to embeddings: Ray Data reads and decodes on CPUs, actors encode, the driver assembles and commits parts.

    read task (one shard)  ->  chunks: (part, chunk, last, pixels, metadata)  ->  Encode actors  ->  driver

A chunk is one batch of the encoder, never crosses a part, and travels as one row, so no re-blocking can cut it.
The driver collects the chunks of a part, writes its files, and commits it; a part whose commit is missing is
computed again, a committed one never. Skipped samples travel in the chunks as ledger rows, so that counts
reconcile. Rejected: one bad sample failing a task (Ray's default), and row-level checkpoints (ray.md 1.4).

Several encoders share one read (`--also`): each has its folder (`embed_outputs`), and a part is computed for those that
lack it.

A job of a few seconds on a laptop (a test set) is done in the driver, by the same functions.

Reads: any source of `sources.list_shards`, or a labelled set of `testsets`. Writes: `embeddings` layout.
Unit of restart: the shard. Actors: one per GPU (or more: `gpus_per_worker`), or one per core. On failure: run the
same command again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import ray

from clipgap_ray import blocklist, embeddings, filesystems, rundir, store, testsets
from clipgap_ray.config.embed import EmbedSettings
from clipgap_ray.errors import ConfigError
from clipgap_ray.shards import estimate_rows
from clipgap_ray.sources import Shard, list_shards
from clipgap_ray.stages import budget, embed_outputs
from clipgap_ray.stages.embed_encode import Encode, write_part
from clipgap_ray.stages.embed_metrics import Measured
from clipgap_ray.stages.embed_outputs import Output
from clipgap_ray.stages.embed_read import ReadPlan, ShardDatasource, Work, read_chunks
from clipgap_ray.stages.progress import Progress, logger
from clipgap_ray.stages.session import cluster_gpus, connect, gpu_nodes, is_private, own_error, physical_cpus
from clipgap_ray.stages.waits import slots, waiting

WINDOW_SHARDS = 4096  # shards per Ray Data execution: bounds the driver's plan at 41,408 shards
BLOCK_BYTES = 16 << 20  # small blocks: chunks reach the encoders while their shard is still being read
HERE_S = 2 * budget.START_S  # after so long the driver leaves the rest of a small job to actors
ENCODE_CPUS = 0.125  # little: four commands may have encoders on one core, and there is room for a read of theirs
READ_CPUS = 0.4  # two reads beside the encoder of a one-core node: one goes on while the next is being started
LOCAL_READ_CPUS = 1.0  # of a private Ray, on files: three reads keep two cores busy, seven take 12 % more CPU-seconds


def run(settings: EmbedSettings) -> rundir.Summary:
    """Embed a source. Running again continues; new shards at the source are added.

    Returns:
        The summary of `settings.out`; those of further folders below `also`.

    Raises:
        ConfigError: On an impossible setting, before any work.
        BudgetError: If it would run on CPUs for more than two hours and `yes` is not set.
        StaleOutputError: If a folder was written with other settings.
    """
    filesystems.configure(settings.storage.options())
    test_set, shards = selected_shards(settings)
    blocked = blocklist.read(settings.blocklist) if settings.blocklist else None
    outputs = embed_outputs.named(settings)
    connect()
    outputs, forecast = _built([embed_outputs.on_device(output, settings) for output in outputs], settings, shards)
    listed = blocked.describe() if blocked is not None else None
    with contextlib.ExitStack() as stack:
        directories = [
            stack.enter_context(
                rundir.RunDirectory(output.uri, "embed", embed_outputs.guarded(output, settings, listed))
            )
            for output in outputs
        ]
        parts = embed_outputs.common_parts([output.uri for output in outputs], [shard.name for shard in shards])
        for output, directory in zip(outputs, directories, strict=True):
            store.write_json(directory.path("encoder.json"), output.fingerprint)
        todo = _lacking(shards, parts, directories)
        _announce(settings, outputs, len(shards), len(todo))
        plan = ReadPlan(
            tuple(output.preprocess for output in outputs),
            settings.batch_size,
            settings.sample,
            test_set,
            ray.put(blocked) if blocked is not None else None,
            filesystems.options(),
        )
        small = forecast is not None and budget.is_small(forecast, _encoders_at_once(settings))
        here = small and not settings.workers and is_private()
        measured = _embed(directories, outputs, todo, plan, settings, len(shards), here)
        summaries = [
            directory.finish(
                {
                    "encoder": output.fingerprint,
                    "source": settings.source,
                    "shards": {str(parts[shard.name]): shard.uri for shard in shards},
                    "kind": "test set" if test_set else "pool",
                    "class_names": list(test_set.class_names) if test_set else [],
                    "templates": list(test_set.templates) if test_set else [],
                    "text": output.text,
                    "blocklist": listed,
                    "partial": {"shards": settings.shards, "sample": settings.sample},
                },
                **measured.as_dict(),
            )
            for output, directory in zip(outputs, directories, strict=True)
        ]
    if len(outputs) > 1:
        rest = zip(outputs[1:], summaries[1:], strict=True)
        summaries[0].extra["also"] = {output.uri: summary.as_dict() for output, summary in rest}
    return summaries[0]


def selected_shards(settings: EmbedSettings) -> tuple[testsets.TestSet | None, list[Shard]]:
    """Return the source's test set, if it is one, and its shards, those of `--shards` only.

    Raises:
        ConfigError: If there are none.
    """
    test_set = testsets.open_test_set(settings.source) if testsets.is_test_set(settings.source) else None
    shards = list(test_set.shards) if test_set else list_shards(settings.source)
    bounds = embeddings.parse_part_range(settings.shards)
    shards = shards[slice(*bounds)] if bounds else shards
    if not shards:
        raise ConfigError(f"--shards {settings.shards} selects none of the source's shards")
    return test_set, shards


def _built(
    outputs: list[Output], settings: EmbedSettings, shards: list[Shard]
) -> tuple[list[Output], budget.Forecast | None]:
    """Build every encoder once for its fingerprint, and say what a run on CPUs will take before anything is written."""
    built, seconds, rows = [], 0.0, 0
    on_cpu = outputs[0].encoder.device == "cpu"
    for output in outputs:
        # On the driver's CPU: the head of a cluster of GPUs need not have one.
        encoder = dataclasses.replace(output.encoder, device="cpu").build()
        built.append(embed_outputs.described(output, encoder))
        done = {record["shard"] for record in rundir.CommitLog(output.uri).records.values()} if on_cpu else set()
        left = [shard for shard in shards if shard.name not in done]
        if not on_cpu or not left:
            continue
        lacking = round(estimate_rows(left[0]) * len(left) * min(settings.sample, 1.0))
        seconds += lacking * budget.probe(encoder, output.text) / _encoders_at_once(settings)
        rows = max(rows, lacking)
    if not rows:
        return built, None
    predicted = budget.Forecast(rows, seconds)
    logger.info("embed on cpu: %s", predicted)
    budget.check(predicted, settings.yes)
    return built, predicted


def _encoders_at_once(settings: EmbedSettings) -> float:
    """Encoders that run at once on CPUs, each on cores of its own."""
    cores = physical_cpus()
    return max(1.0, min(settings.workers or cores, cores / settings.threads))


def _lacking(shards: list[Shard], parts: dict[str, int], directories: list[rundir.RunDirectory]) -> list[Work]:
    """Return the shards that some output lacks, with those outputs."""
    work = []
    for shard in shards:
        part = parts[shard.name]
        lacking = tuple(i for i, directory in enumerate(directories) if part not in directory.log.records)
        if lacking:
            work.append(Work(part, shard, lacking))
    return work


def _announce(settings: EmbedSettings, outputs: list[Output], num_shards: int, todo: int) -> None:
    encoder = outputs[0].encoder
    logger.info(
        "embed %s: %d shards, %d to do, %s on %s (%s)",
        settings.source, num_shards, todo, ", ".join(output.encoder.model for output in outputs),
        encoder.device, encoder.precision,
    )  # fmt: skip


def _embed(
    directories: list[rundir.RunDirectory],
    outputs: list[Output],
    todo: list[Work],
    plan: ReadPlan,
    settings: EmbedSettings,
    total: int,
    here: bool,
) -> Measured:
    progress = Progress("embed", total, "shards", done=total - len(todo))
    measured = Measured()
    for start in range(0, len(todo), WINDOW_SHARDS):
        window = todo[start : start + WINDOW_SHARDS]
        names = {work.part: work.shard.name for work in window}
        pending: dict[int, dict[int, dict[str, Any]]] = {}
        for chunk in (_chunks_made_here if here else _chunks)(window, plan, outputs, settings):
            part = chunk["part"]
            chunks = pending.setdefault(part, {})
            chunks[chunk["chunk"]] = chunk
            measured.chunk(chunk, sum(map(len, pending.values())))
            last = next((number for number, c in chunks.items() if c["last"]), None)
            if last is None or len(chunks) != last + 1:
                continue
            ordered = [chunks[number] for number in range(len(chunks))]
            del pending[part]
            for i in chunk["outputs"]:
                output = outputs[i]
                record = write_part(output.uri, part, names[part], ordered, output=i, dim=output.dim, text=output.text)
                directories[i].log.append([record])
            measured.part(record)
            progress.advance(rows=record["rows"])
    progress.close()
    return measured


def _chunks_made_here(
    window: list[Work], plan: ReadPlan, outputs: list[Output], settings: EmbedSettings
) -> Iterator[dict[str, Any]]:
    """The same chunks without actors, for jobs that are done before an actor has loaded torch and the model.

    The forecast looked at the first shard only: where the others hold more, actors take over what is left.
    """
    encode = Encode([(output.encoder, output.text) for output in outputs])
    began = time.monotonic()
    for at, work in enumerate(window):
        if at and time.monotonic() - began > HERE_S:
            yield from _chunks(window[at:], plan, outputs, settings)
            return
        for table in read_chunks(work, plan):
            yield from encode(table).to_pylist()


def _chunks(
    window: list[Work], plan: ReadPlan, outputs: list[Output], settings: EmbedSettings
) -> Iterator[dict[str, Any]]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.target_max_block_size = BLOCK_BYTES
    # A pool grows with its queue, but keeps what it has: Ray would stop encoders that images do not come fast enough
    # for, and start them again ten seconds later, on whatever node, with all that an encoder loads.
    context.autoscaling_config.actor_pool_util_downscaling_threshold = -1.0
    context.execution_options.actor_locality_enabled = True  # a chunk goes to an encoder of its own node if one is free
    gpus = settings.gpus_per_worker if outputs[0].encoder.device == "cuda" else 0.0
    workers = settings.workers or max(1, int(cluster_gpus() / gpus) if gpus else physical_cpus())
    dataset = ray.data.read_datasource(
        ShardDatasource(window, plan),
        override_num_blocks=len(window),
        num_cpus=LOCAL_READ_CPUS if is_private() and filesystems.is_local(window[0].shard.uri) else READ_CPUS,
        **_beside_encoders(gpus),
    ).map_batches(
        Encode,
        fn_constructor_args=([(output.encoder, output.text) for output in outputs],),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            min_size=_encoders_first(settings, workers, len(window), gpus), max_size=workers
        ),
        num_cpus=ENCODE_CPUS,
        num_gpus=gpus,
    )
    try:
        with waiting({"CPU": ENCODE_CPUS, "GPU": gpus} if gpus else {"CPU": ENCODE_CPUS}) as came:
            for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
                came()
                yield from table.to_pylist()
    except ray.exceptions.RayTaskError as error:
        raise own_error(error) from None


def _encoders_first(settings: EmbedSettings, workers: int, shards: int, gpus: float) -> int:
    """Encoders to start with, before any read: on a cluster as many as its living nodes hold, at most one per shard.

    Reads that came first would fill the cores of a small node, and take every fraction that one of them gives back: the
    node's encoder would wait for as long as there is something to read. A private Ray has room for both, and a small
    job may not need its second encoder.
    """
    there = 0 if is_private() else slots({"CPU": ENCODE_CPUS, "GPU": gpus})
    return min(workers, max(settings.min_workers, min(there, shards)))


def _beside_encoders(gpus: float) -> dict[str, Any]:
    """Where reads run: on the nodes of the GPUs first, on others when those have no core free.

    As long as the encoders are busy, Ray Data holds reads back by the memory that their chunks take, and the cores
    beside the encoders suffice; when encoders starve, more reads are started than those cores hold. On CPUs every node
    has encoders; the same goes for a cluster whose GPUs are still to come.
    """
    nodes = gpu_nodes() if gpus else []
    if not nodes:
        return {}
    return {
        "label_selector": {"ray.io/node-id": f"in({','.join(nodes)})"},
        "fallback_strategy": [{"label_selector": {}}],
    }


__all__ = ["Encode", "ReadPlan", "Work", "read_chunks", "run", "selected_shards", "write_part"]
