"""`clipgap plan`: what an `embed` job would take, from a short probe on this machine: rows, disk, memory, time.

The same words as `embed`; nothing is written and no Ray is started. The probe reads the first samples of the source
with the job's own reader, and runs the job's own encoders on them. What a cluster has is not asked for: the prediction
is for the cores (and GPUs) of this machine, or for as many like them as `--cores` and `--gpus` say. With `--prices` it
says what that costs.
"""

from __future__ import annotations

import math
import os
import resource
import statistics
import time
from typing import Any

import pyarrow as pa

from clipgap_ray import blocklist, filesystems, schema, store
from clipgap_ray.config.base import read_yaml
from clipgap_ray.config.embed import PlanSettings
from clipgap_ray.config.limits import HEAD, LimitsSettings, PricesFile
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.shards import estimate_rows
from clipgap_ray.sources import Shard
from clipgap_ray.stages import budget, embed, embed_outputs
from clipgap_ray.stages.embed_outputs import Output
from clipgap_ray.stages.embed_read import ReadPlan, Work, from_stream, read_chunks
from clipgap_ray.stages.progress import logger

SHARDS_COUNTED = 5
CHUNK_ROWS = 32
# Of the driver: Python, torch and Ray; a shard's name, numbers and commit record (docs/scale.md, M2).
DRIVER_BYTES, SHARD_BYTES = 250e6, 3.5e3
METADATA_BYTES = 300  # a row on its way to the driver, beside its embeddings (docs/scale.md)


def run(settings: PlanSettings) -> dict[str, Any]:
    """Return the prediction; it is also shown as a table.

    Raises:
        ConfigError: On whatever `embed` would refuse.
        DataError: If none of the first samples is readable.
    """
    filesystems.configure(settings.storage.options())
    test_set, shards = embed.selected_shards(settings)
    outputs = embed_outputs.named(settings)
    device, devices = _here(settings)
    blocked = blocklist.read(settings.blocklist) if settings.blocklist else None
    plan = ReadPlan(
        tuple(output.preprocess for output in outputs),
        CHUNK_ROWS,
        settings.sample,
        test_set,
        blocked,
        filesystems.options(),
    )
    counted = spread(shards)
    rows = round(statistics.mean(estimate_rows(shard) for shard in counted) * len(shards) * min(settings.sample, 1.0))
    seen = probe_reading(plan, shards, settings.probe_rows)
    encode_s, bytes_per_row, built = 0.0, 0.0, []
    for output in outputs:
        placed = embed_outputs.on_this_device(output, settings, device)
        encoder = placed.encoder.build()
        encode_s += budget.probe(encoder, output.text)
        built.append(embed_outputs.described(placed, encoder))
        bytes_per_row += 2 * encoder.dim * (1 + output.text) + seen["metadata_bytes"]
    kept = seen["rows"] / seen["images"]
    cores = settings.cores or os.cpu_count() or 1
    devices = settings.gpus or devices
    seconds = rows * _seconds_per_row(seen["read_s"], encode_s, device, devices, cores)
    cost = _cost(settings, seconds, cores, devices)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    predicted = {
        "shards": len(shards),
        "rows": round(rows * kept),
        "skipped_share": round(1 - kept, 4),
        "input_bytes": round(rows * seen["image_bytes"] / seen["images"]),
        "output_bytes": round(rows * kept * bytes_per_row),
        "memory": {
            "driver_bytes": round(_driver_bytes(built, rows, len(shards), cores)),
            "worker_bytes": peak,
            "pixels_per_chunk_bytes": sum(3 * p.size**2 for p in set(plan.preprocess)) * settings.batch_size,
        },
        "read_ms_per_image": round(1e3 * seen["read_s"], 3),
        "encode_ms_per_image": round(1e3 * encode_s, 3),
        "device": device,
        "cores": cores,
        "cores_to_feed_one_gpu": round(seen["read_s"] / encode_s, 1) if device == "cuda" else None,
        "images_per_s": round(rows / max(seconds, 1e-9), 2),
        "seconds": round(seconds, 1),
        "cost": cost,
        "starts": _starts(settings.limits, seconds, cost),
        "probed_rows": seen["rows"],
    }
    _show(settings, outputs, predicted)
    return predicted


def _here(settings: PlanSettings) -> tuple[str, int]:
    """The device of this machine to probe on, and how many of it.

    Raises:
        ConfigError: If GPUs are planned for and there is none to probe.
    """
    import torch

    gpus = torch.cuda.device_count() if settings.device != "cpu" else 0
    if settings.gpus and not gpus:
        raise ConfigError(
            f"--gpus {settings.gpus}, but there is no GPU here to probe",
            hint="run plan on a GPU node (ray job submit -- python jobs/plan.py ...), or plan for --cores",
        )
    if settings.device == "cuda" and not gpus:
        logger.warning("plan: no GPU here; time is predicted for the CPUs of this machine")
    return ("cuda", gpus) if gpus else ("cpu", 0)


def spread(shards: list[Shard]) -> list[Shard]:
    """A few shards over the whole list: the first and the last are often odd."""
    step = max(1, len(shards) // SHARDS_COUNTED)
    return shards[::step][:SHARDS_COUNTED]


def probe_reading(plan: ReadPlan, shards: list[Shard], wanted: int) -> dict[str, float]:
    """Read some samples as the job would; returns counts, and CPU seconds and bytes per image."""
    rows = images = image_bytes = metadata_bytes = 0
    reading = 0.0
    for shard in shards[:SHARDS_COUNTED]:
        chunks = read_chunks(Work(0, shard, tuple(range(len(plan.preprocess)))), plan)
        while rows < wanted:
            started = time.process_time()
            table = next(chunks, None)
            reading += time.process_time() - started
            if table is None:
                break
            chunk = table.to_pylist()[0]
            metadata = from_stream(chunk["metadata"]).cast(schema.METADATA)
            rows, images = rows + metadata.num_rows, images + chunk["images"]
            image_bytes += chunk["image_bytes"]
            metadata_bytes += _stored(metadata)
    if not rows:
        raise DataError(
            f"none of the first {images} samples of {shards[0].uri} can be read", hint="clipgap doctor SRC says why"
        )
    return {
        "rows": rows, "images": images, "image_bytes": image_bytes, "read_s": reading / images,
        "metadata_bytes": metadata_bytes / rows,
    }  # fmt: skip


def _stored(metadata: pa.Table) -> int:
    """Bytes of these rows in a file, its footer aside: that of an empty one."""
    return len(store.table_bytes(metadata)) - len(store.table_bytes(schema.METADATA.empty_table()))


def _seconds_per_row(read_s: float, encode_s: float, device: str, devices: int, cores: int) -> float:
    """On CPUs readers and encoders share the cores; GPUs encode while the cores read."""
    if device == "cpu":
        return (read_s + encode_s) / cores
    return max(read_s / cores, encode_s / devices)


def _driver_bytes(outputs: list[Output], rows: int, shards: int, cores: int) -> float:
    """What docs/scale.md says of the driver: itself, its bookkeeping, and the parts in flight, one per reader."""
    row = sum(2 * output.dim * (1 + output.text) for output in outputs) + METADATA_BYTES
    return DRIVER_BYTES + SHARD_BYTES * shards + 2 * cores * row * rows / shards


def _cost(settings: PlanSettings, seconds: float, cores: int, gpus: int) -> dict[str, Any] | None:
    """What the cores, the GPUs and a head cost while it runs; None without prices."""
    if not settings.limits.prices:
        return None
    prices = PricesFile.load(read_yaml(settings.limits.prices), settings.limits.prices)
    hourly = prices.hourly({"CPU": cores, "GPU": gpus, HEAD: 1.0})
    return {"amount": round(seconds / 3600 * hourly, 4), "per_hour": hourly, "currency": prices.currency}


def _starts(limits: LimitsSettings, seconds: float, cost: dict[str, Any] | None) -> int:
    """How often the command has to be started under its limits; each start goes on where the one before stopped."""
    shares = [1.0]
    if limits.max_hours is not None:
        shares.append(seconds / 3600 / limits.max_hours)
    if limits.max_cost is not None and cost is not None:
        shares.append(cost["amount"] / limits.max_cost)
    return math.ceil(max(shares))


def _show(settings: PlanSettings, outputs: list[Output], found: dict[str, Any]) -> None:
    gigabytes = {name: found[name] / 1e9 for name in ("input_bytes", "output_bytes")}
    memory = found["memory"]
    lines = [
        ("source", f"{settings.source}: {found['shards']:,} shards, {found['rows']:,} rows"
                   f" ({found['skipped_share']:.1%} of {found['probed_rows']} looked at would be skipped)"),
        ("encoders", ", ".join(output.encoder.model for output in outputs)),
        ("read", f"{gigabytes['input_bytes']:,.3g} GB of images"),
        ("written", f"{gigabytes['output_bytes']:,.3g} GB"),
        ("memory", f"driver {memory['driver_bytes'] / 1e9:.1f} GB, a worker {memory['worker_bytes'] / 1e9:.1f} GB,"
                   f" {memory['pixels_per_chunk_bytes'] / 1e6:.0f} MB of pixels per chunk in the object store"),
        ("per image", f"read and decode {found['read_ms_per_image']:.3g} ms of a core,"
                      f" encode {found['encode_ms_per_image']:.3g} ms of a {found['device']}"),
        ("time", f"{budget.duration(found['seconds'])} on {found['cores']} cores"
                 f" ({found['images_per_s']:,.3g} images/s)"),
    ]  # fmt: skip
    if found["cores_to_feed_one_gpu"] is not None:
        lines.append(("to feed a GPU", f"{found['cores_to_feed_one_gpu']} cores"))
    if found["cost"] is not None:
        cost = found["cost"]
        lines.append(("cost", f"{cost['amount']:,.2f} {cost['currency']} at {cost['per_hour']:,.2f} an hour"))
    if found["starts"] > 1:
        lines.append(("limits", f"stop it before its end: the same command {found['starts']:,} times does it all"))
    logger.info("%s", "\n".join(f"{name:<14}{text}" for name, text in lines))
