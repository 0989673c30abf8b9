"""Copy a split's samples into new tars: DataComp's resharded layout, bytes unchanged, the same bytes at every run.

Two passes. The first reads headers, json and captions of every input tar (images only when a blocklist names
sha256; parquet and folders are read whole) and keeps, for the samples of the split, where their members lie. From the
counts follows which samples go into which output tar: source order, `shard_size` each. The second copies, one task per
output tar: byte ranges of tars; of parquet the image as it is, its caption as txt, its columns but those of bytes as
json; of folders the files.

A sample's stem in the output is `{uid}-{copy}`, as DataComp's resharder writes it: copy 0 is the first sample of that
uid in source order, copy 1 the next. So no stem repeats, whatever stems the input tars share; suffixes keep their
spelling. A uid that is hashed from the sample's place (no json uid, no url with caption) cannot be found again in
the new place: hence `write_uid`, and a warning without it.

Reads: tars, parquet of images, folders of images. Writes: DIR/00000000.tar, 00000000_stats.json ({"successes": n}),
sizes.json, meta.json, sample_ids.npy (the uids that are in the tars), missing_ids.npy (uids of the split that the
source lacks, if any), DIR/index/.
Unit of restart: the input shard in the first pass, the output tar in the second. Memory: the split at 16 bytes per uid,
one more in the driver; a task holds one sample, or 256 rows of parquet.
Rejected: one streaming pass like the resharder's (an output tar would depend on the number of workers).
"""

from __future__ import annotations

from typing import Any

import ray

from clipgap_ray import blocklist, idlists, rundir, store
from clipgap_ray.config.export import ExportSettings
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.sources import Shard, list_shards
from clipgap_ray.stages import export_copy, export_index
from clipgap_ray.stages.progress import Progress, logger
from clipgap_ray.stages.session import connect
from clipgap_ray.stages.waits import bounded

EXIT_MISSING = 3


def run(settings: ExportSettings) -> rundir.Summary:
    """Export a split. Running again continues.

    Raises:
        ConfigError: If the source is not tars, or lies in the output directory.
        DataError: If none of the split's uids is in the source, or an input tar changed between the passes.
        StaleOutputError: If `out` was written with another split, source, blocklist or flag.
    """
    shards = _shards(settings)
    split = idlists.read_subset(settings.split)
    blocked = blocklist.read(settings.blocklist) if settings.blocklist else None
    inputs = {
        "source": settings.source,
        "shards": store.digest([shard.name for shard in shards]),
        "split": store.sha256(store.read_bytes(settings.split)),
        "blocklist": blocked and blocked.describe(),
    }
    guarded = {**inputs, "shard_size": settings.shard_size, "write_uid": settings.write_uid}
    with rundir.RunDirectory(settings.out, "export", guarded) as directory:
        records = export_index.build(directory.path("index"), shards, split, blocked, inputs, settings.workers)
        places = export_index.Placement(directory.path("index"), shards, records, split)
        _announce(settings, places, records)
        _copy(directory, places.outputs(settings.shard_size), settings)
        return _finish(directory, settings, places, records)


def _shards(settings: ExportSettings) -> list[Shard]:
    shards = list_shards(settings.source)
    inside = next((shard for shard in shards if shard.uri.startswith(settings.out.rstrip("/") + "/")), None)
    if inside is not None:
        raise ConfigError(f"{inside.uri} is part of the source and lies in --out", hint="choose another --out")
    return shards


def _announce(settings: ExportSettings, places: export_index.Placement, records: dict[int, dict[str, Any]]) -> None:
    num_uids, num_found, num_blocked = len(places.found), int(places.found.sum()), int(places.blocked.sum())
    if not num_found:
        raise DataError(
            f"split {settings.split}: {num_found} of its {num_uids} uids can be exported from {settings.source}"
            f" (coverage 0 %, {num_blocked} blocked)",
            hint="export from the shards that the split's pool was embedded from",
        )
    logger.info(
        "export %s: %d of %d uids in the source, %d missing, %d blocked; %d samples (%d further copies of a uid)",
        settings.split, num_found, num_uids, num_uids - num_found - num_blocked, num_blocked, places.num_rows,
        places.num_copies,
    )  # fmt: skip
    without = sum(record["without_uid"] for record in records.values())
    if without and settings.write_uid:
        logger.info("export: writing the uid into the json of %d samples that lack it", without)
    elif without:
        logger.warning(
            "export: %d samples have no uid in their json: DataComp's tools, and this split, will not find them in %s\n"
            "hint: --write-uid adds it (and changes the bytes of that member)",
            without, settings.out,
        )  # fmt: skip


# --- second pass: copy -----------------------------------------------------------------------------------


def _copy(directory: rundir.RunDirectory, outputs: list[list[export_index.Slice]], settings: ExportSettings) -> None:
    todo = [number for number in range(len(outputs)) if number not in directory.log.records]
    if not todo:
        return
    connect()
    task = ray.remote(num_cpus=export_index.TASK_CPUS)(export_copy.write_shard)
    progress = Progress("export", len(outputs), "shards", done=len(outputs) - len(todo))
    submit = lambda number: task.remote(directory.uri, number, outputs[number], settings.write_uid)  # noqa: E731
    for record in bounded(submit, todo, settings.workers, {"CPU": export_index.TASK_CPUS}):
        directory.log.append([record])
        progress.advance(rows=record["kept"])
    progress.close()


# --- the directory as a whole ----------------------------------------------------------------------------


def _finish(
    directory: rundir.RunDirectory,
    settings: ExportSettings,
    places: export_index.Placement,
    records: dict[int, dict[str, Any]],
) -> rundir.Summary:
    """Check the counts, write what DataComp's tools read beside the tars, and close the directory."""
    written = directory.log.records
    sizes = {export_copy.SHARD_FORMAT.format(n): written[n]["kept"] for n in sorted(written)}
    if sum(sizes.values()) != places.num_rows:
        raise DataError(f"{settings.out}: wrote {sum(sizes.values())} samples, the index holds {places.num_rows}")
    split = idlists.read_subset(settings.split)
    missing = split[~places.found & ~places.blocked]
    seen = rundir.Summary("export-index")
    for part in sorted(records):
        seen.add(records[part])
    seen.check()
    store.write_json(directory.path("sizes.json"), sizes)
    store.write_bytes(directory.path("sample_ids.npy"), store.array_bytes(split[places.found]))
    if len(missing):
        store.write_bytes(directory.path("missing_ids.npy"), store.array_bytes(missing))
    store.write_json(directory.path("meta.json"), _meta(settings, len(sizes), places.num_rows, seen.read))
    coverage = {
        "uids": len(split),
        "found": int(places.found.sum()),
        "missing": len(missing),
        "blocked": int(places.blocked.sum()),
        "copies": places.num_copies,
    }
    exit_code = {"exit_code": EXIT_MISSING} if len(missing) > settings.max_missing_fraction * len(split) else {}
    return directory.finish(
        {"source": settings.source, "split": settings.split, "coverage": coverage},
        # The stage reads the source: its counts stand for those of the output tars, which are all kept.
        read=seen.read,
        dropped=seen.dropped,
        coverage=coverage,
        shards=len(sizes),
        **exit_code,
    )


def _meta(settings: ExportSettings, num_shards: int, num_samples: int, num_read: int) -> dict[str, Any]:
    """The fields of the resharder's meta.json that say what was done (its arguments are texts there); no times, no
    directories of the run, so that two exports of one split are equal."""
    return {
        "input_dir": settings.source,
        "subset_file": settings.split,
        "shard_size": str(settings.shard_size),
        "output_shard_format": export_copy.SHARD_FORMAT,
        "output_shard_stats_format": export_copy.STATS_FORMAT,
        "shard_table": "sizes.json",
        "write_uid": str(settings.write_uid),
        "blocklist": settings.blocklist or "None",
        "processed_count": num_read,
        "output_count": num_samples,
        "output_shard_count": num_shards,
    }
