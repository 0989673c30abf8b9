"""`clipgap plan-study`: what a study would take on a cluster, step by step; nothing of it is run.

Counts come from the data (a few shards are looked at) or from `--rows`; FLOPs of the models are counted while they
encode one image here; the speed of a core is measured here, that of a GPU is its peak times an assumed share. The
formulas are those of docs/scale.md, in kernels/workload.py. What was assumed is in the plan's `machine`; besides, cuts
are taken to keep all rows that their size does not limit, and 8 GB of index are taken to fit.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from clipgap_ray import filesystems, store
from clipgap_ray.config.base import read_yaml
from clipgap_ray.config.dedup import DedupSettings
from clipgap_ray.config.limits import HEAD, PricesFile
from clipgap_ray.config.plan import StudyPlanSettings
from clipgap_ray.config.score import ScoreSettings
from clipgap_ray.config.study import RunSection, StudyFile
from clipgap_ray.config.train import TrainSettings
from clipgap_ray.encoder import EncoderSettings, register_models
from clipgap_ray.errors import ClipgapError, ConfigError
from clipgap_ray.kernels import faiss_index, workload
from clipgap_ray.kernels.workload import Machine, Work
from clipgap_ray.pixels import Preprocess
from clipgap_ray.shards import estimate_rows
from clipgap_ray.sources import list_shards
from clipgap_ray.stages import budget, dedup, plan
from clipgap_ray.stages.autoscaler import most_resources
from clipgap_ray.stages.embed_read import ReadPlan
from clipgap_ray.stages.progress import logger
from clipgap_ray.stages.study_data import Data, locate

PLAN = "plan.json"
PROBE_ROWS = 128
ROW_ID_BYTES = 8
PRODUCT_ROWS, PRODUCT_DIM = 2048, 512
INDEX_MEMORY = 8e9  # of all index shards together: `index` asks the cluster


@dataclass(frozen=True)
class Network:
    """A model: the FLOPs of one image and its caption, its output and its size."""

    flops: float
    image_flops: float
    dim: int
    parameters: float
    preprocess: Preprocess
    flops_per_s: float  # of one core, here


def run(settings: StudyPlanSettings) -> dict[str, Any]:
    """Return the plan, show it as a table, and write it to OUT/plan.json if there is an OUT.

    Raises:
        ConfigError: On a study that `run` would refuse, rows that are neither given nor to be seen, or GPUs of unknown
            speed.
    """
    filesystems.configure(settings.storage.options())
    file = StudyFile.load(read_yaml(settings.study), settings.study)
    data = locate(file, settings.out or f"out/{file.name}")
    rows = _rows(settings, data)
    metric = network(file.metric_model or file.train.model)
    trained = metric if file.train.model == file.metric_model else network(file.train.model)
    image_bytes, read_s = _reading(settings, data, metric.preprocess)
    cores, gpus = _resources(settings)
    machine = Machine(
        cores, gpus, read_s, metric.flops_per_s, product_rate(), settings.gpu_use * 1e12 * settings.gpu_tflops,
        1e9 * settings.gigabytes_per_s,
    )  # fmt: skip
    prices = PricesFile.load(read_yaml(settings.prices), settings.prices) if settings.prices else None
    found = {}
    for name, work in _steps(file, rows, metric, trained, image_bytes).items():
        team = _team(machine, file, trained) if name.startswith("runs/") else machine
        seconds = team.seconds(work)
        found[name] = {"seconds": round(seconds, 1), **_rounded(work), "cost": _cost(prices, machine, work, seconds)}
    predicted = {
        "study": file.name,
        "rows": {name: round(count) for name, count in rows.items()},
        "image_bytes": round(image_bytes),
        "machine": asdict(machine),
        "steps": found,
        "total": {
            "seconds": round(sum(step["seconds"] for step in found.values()), 1),
            "written_bytes": sum(step["written_bytes"] for step in found.values()),
            "driver_bytes": max(step["driver_bytes"] for step in found.values()),
            "worker_bytes": max(step["worker_bytes"] for step in found.values()),
            "cost": round(sum(step["cost"] for step in found.values()), 2) if prices else None,
            "currency": prices.currency if prices else None,
        },
    }
    if settings.out:
        store.write_json(f"{settings.out}/{PLAN}", predicted)
    _show(predicted)
    return predicted


def _rows(settings: StudyPlanSettings, data: Data) -> dict[str, float]:
    """Rows of pool, reference and test sets: as given, else estimated from a few shards."""
    given = settings.known_rows
    sources = data.sources()
    if unknown := set(given) - set(sources):
        raise ConfigError(f"--rows names {sorted(unknown)}, the study has {sorted(sources)}")
    return {name: given[name] if name in given else _estimated(name, uri) for name, uri in sources.items()}


def _estimated(name: str, uri: str) -> float:
    try:
        shards = list_shards(uri)
        return statistics.mean(estimate_rows(shard) for shard in plan.spread(shards)) * len(shards)
    except (ClipgapError, OSError) as error:
        raise ConfigError(
            f"{name}: {uri} cannot be looked at ({str(error).splitlines()[0]})", hint=f"say --rows {name}=COUNT"
        ) from None


def _reading(settings: StudyPlanSettings, data: Data, preprocess: Preprocess) -> tuple[float, float]:
    """Bytes of an image, and seconds of a core to read and decode it: from the pool, if it can be looked at."""
    try:
        shards = list_shards(data.pool)
        chosen = ReadPlan((preprocess,), plan.CHUNK_ROWS, 1.0, None, None, filesystems.options())
        seen = plan.probe_reading(chosen, shards, PROBE_ROWS)
    except (ClipgapError, OSError):
        logger.warning("plan: the pool cannot be looked at; assumed are %g KB and %g ms per image (--image-kb, "
                       "--image-ms)", settings.image_kb, settings.image_ms)  # fmt: skip
        return 1e3 * settings.image_kb, 1e-3 * settings.image_ms
    return seen["image_bytes"] / seen["images"], seen["read_s"]


def network(model: str) -> Network:
    """Count a model's FLOPs and parameters, and time it on one core, with random weights.

    Raises:
        ConfigError: If there is no such model.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    register_models()
    threads, fused = torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    torch.set_num_threads(1)
    try:
        encoder = EncoderSettings(model, "random", batch_size=1).build()
        size = encoder.preprocess.size
        torch.backends.mha.set_fastpath_enabled(False)  # the counter does not see into a fused attention
        with FlopCounterMode(display=False) as counted:
            encoder.encode_images(np.zeros((1, size, size, 3), np.uint8))
        image_flops = float(counted.get_total_flops())
        with FlopCounterMode(display=False) as counted:
            if encoder.settings.has_text:
                encoder.encode_texts(["a photo of a thing"])
        flops = image_flops + float(counted.get_total_flops())
        torch.backends.mha.set_fastpath_enabled(fused)
        seconds = budget.probe(encoder, encoder.settings.has_text)
    finally:
        torch.set_num_threads(threads)
        torch.backends.mha.set_fastpath_enabled(fused)
    parameters = sum(p.numel() for p in encoder.model.parameters())  # type: ignore[attr-defined]
    return Network(flops, image_flops, encoder.dim, float(parameters), encoder.preprocess, flops / seconds)


def product_rate() -> float:
    """Return the FLOP/s of one core in a float32 product: the second of two."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = torch.ones(PRODUCT_ROWS, PRODUCT_DIM)
        for _ in range(2):
            started = time.perf_counter()
            rows @ rows.T
            seconds = time.perf_counter() - started
    finally:
        torch.set_num_threads(threads)
    return 2.0 * PRODUCT_ROWS**2 * PRODUCT_DIM / seconds


def _resources(settings: StudyPlanSettings) -> tuple[float, float]:
    """CPU cores and GPUs of the cluster, or of this machine."""
    import torch

    if settings.nodes:
        most = most_resources(read_yaml(settings.nodes))
        cores, gpus = most.get("CPU", 0.0), most.get("GPU", 0.0)
        if not 0 < cores < math.inf:
            raise ConfigError(
                f"{settings.nodes} has no node type with CPUs, or no max_workers",
                hint="give a file for `ray up`, as cluster.yaml",
            )
    else:
        cores, gpus = float(os.cpu_count() or 1), float(torch.cuda.device_count())
    if gpus and not settings.gpu_tflops:
        raise ConfigError(
            f"{gpus:g} GPUs of unknown speed", hint="say --gpu-tflops: L4 121, A10G 70, A100 312, H100 989"
        )
    return cores, gpus


def _team(machine: Machine, file: StudyFile, trained: Network) -> Machine:
    """The part of the cluster that one training uses: its workers, and their decoders."""
    workers = file.train.workers or max(machine.gpus, machine.cores if not machine.gpus else 0)
    cores = min(machine.cores, workers * (1 + (file.train.decoders or 0)))
    return replace(machine, gpus=min(machine.gpus, workers), cores=cores, core_network_flops=trained.flops_per_s)


def _steps(
    file: StudyFile, rows: dict[str, float], metric: Network, trained: Network, image_bytes: float
) -> dict[str, Work]:
    """The work of every step by its folder in the study, in the order of the study."""
    pool, reference = rows["pool"], rows["reference"]
    tests = {name: count for name, count in rows.items() if name not in ("pool", "reference")}
    queries = sum(tests.values())
    steps = {f"embed/{name}": workload.embed(count, metric.dim, metric.flops, image_bytes, metric.parameters)
             for name, count in rows.items()}  # fmt: skip
    partitions = workload.default_partitions(pool, dedup.EXACT_ROWS, dedup.ROWS_PER_PARTITION)
    steps["dedup"] = workload.dedup(pool, metric.dim, partitions, DedupSettings.model_fields["probes"].default)
    k = ScoreSettings.model_fields["k"].default
    steps["scores"] = workload.score(pool, queries, len(tests), reference, metric.dim, k)
    steps |= {f"splits/{name}": workload.split(pool) for name in ("full", *file.splits)}
    steps["gaps"] = workload.gaps(pool, queries, reference, metric.dim)
    kept = TrainSettings.model_fields["keep_checkpoints"].default
    for seed in file.seeds:
        for one in file.runs:
            used = _used(one, file, pool, reference)
            samples = one.num_samples or file.train.num_samples
            flops = trained.flops if one.objective == "clip" else trained.image_flops
            steps[f"runs/{one.name}-s{seed}"] = workload.train(
                samples, used, flops, image_bytes, trained.parameters, kept
            )
    for seed in file.seeds:
        for one in file.runs:
            steps[f"eval/{one.name}-s{seed}"] = workload.evaluate(
                queries, trained.image_flops, image_bytes, trained.parameters
            )
    key = faiss_index.choose_key(int(pool / file.index_shards), metric.dim, INDEX_MEMORY / file.index_shards).key
    per_row = _bytes_per_row(key, metric.dim)
    steps["index"] = workload.index(pool, metric.dim, _cells(key), per_row, file.index_shards)
    return steps


def _used(one: RunSection, file: StudyFile, pool: float, reference: float) -> float:
    """At most so many different samples: sizes of cuts are known only where they are given."""
    size = str(file.splits.get(one.split, {}).get("size", ""))
    from_pool = 0.0 if one.split == "none" else min(pool, float(size)) if size.isdigit() else pool
    return from_pool + (reference if one.reference or one.split == "none" else 0.0)


def _cells(key: str) -> int:
    return int(key.split(",")[0].removeprefix("IVF")) if key.startswith("IVF") else 0


def _bytes_per_row(key: str, dim: int) -> float:
    """Bytes of a row in an index that `choose_key` names: vectors or codes, and an id of 8."""
    if key.endswith("Flat"):
        return 4.0 * dim + ROW_ID_BYTES
    code = int(key.split("PQ")[1].split(",")[0])
    return code + (dim if "Refine" in key else 0) + ROW_ID_BYTES


def _rounded(work: Work) -> dict[str, Any]:
    return {name: value if name == "on_gpu" else float(f"{value:.4g}") for name, value in asdict(work).items()}


def _cost(prices: PricesFile | None, machine: Machine, work: Work, seconds: float) -> float:
    """All cores, all GPUs where the step uses them, and the head, for as long as it takes."""
    if prices is None:
        return 0.0
    hourly = prices.hourly({"CPU": machine.cores, "GPU": machine.gpus if work.on_gpu else 0.0, HEAD: 1.0})
    return round(seconds / 3600 * hourly, 4)


def _show(predicted: dict[str, Any]) -> None:
    machine, total = predicted["machine"], predicted["total"]
    priced = total["cost"] is not None
    lines = [
        f"{predicted['study']}: {predicted['rows']['pool']:,} pool rows, on {machine['cores']:g} cores and "
        f"{machine['gpus']:g} GPUs",
        "",
        f"{'step':<34}{'time':>10}{'written':>12}{'driver memory':>15}{'per worker':>12}"
        + (f"{'cost':>12}" if priced else ""),
    ]
    rows = [*predicted["steps"].items(), ("all", total)]
    for name, step in rows:
        line = (
            f"{name:<34}{budget.duration(step['seconds']):>10}{_size(step['written_bytes']):>12}"
            f"{_size(step['driver_bytes']):>15}{_size(step['worker_bytes']):>12}"
        )
        lines.append(line + (f"{step['cost']:>12,.2f}" if priced else ""))
    if priced:
        lines.append(f"costs in {total['currency']}")
    logger.info("%s", "\n".join(lines))  # fmt: skip


def _size(num_bytes: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.3g} {name}"
    return f"{num_bytes / 1e3:.3g} KB"
