"""Train on a virtual split with Ray Train: index the source, make the plan, run DDP workers, publish the checkpoint.

Reads: a source (and a reference) of tars or image files; a split's uids. Writes: RUN/checkpoint.pt (loads with
`open_clip.create_model(..., pretrained=path)`), RUN/<model>.model.json and open_clip_config.json, params.json,
metrics.jsonl, summary.json, RUN/train/ (Ray Train's own checkpoints). Unit of restart: the last checkpoint; the
position in the data is the number of samples seen.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.train
import ray.train.torch
import torch

from clipgap_ray import idlists, rundir, store
from clipgap_ray.config.train import TrainSettings
from clipgap_ray.encoder import EncoderSettings, check, register_models
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.kernels.order import SampleOrder
from clipgap_ray.stages import samples
from clipgap_ray.stages.session import Progress, connect, resolve_device
from clipgap_ray.stages.train_loop import Plan, train_loop

KEEP_CHECKPOINTS = 2
WORKER_CPUS = 0.9  # two workers must fit beside fractions of other tasks on two CPUs
COLLECTIVE_TIMEOUT_S = 300


def run(settings: TrainSettings) -> rundir.Summary:
    """Train a model, or resume its training.

    Raises:
        ConfigError: Unknown model, no samples, unlabelled source under `supervised`, fewer samples than a batch.
        DataError: A split of which no uid is in the source.
    """
    preprocess = check(EncoderSettings(settings.model, "random"))
    guarded = settings.fingerprint()
    guarded.pop("out")
    with rundir.RunDirectory(settings.out, "train", guarded) as directory:
        if store.exists(directory.path("checkpoint.pt")) and directory.log.records:
            return _finish(directory, settings)
        plan, counts = make_plan(settings, directory.uri, preprocess.size)
        connect()
        store.write_json(directory.path("params.json"), settings.model_dump(mode="json"))
        state = _fit(settings, plan, directory)
        history = state["history"]
        _publish(settings, directory, plan)
        seen = plan.steps * max(1, settings.workers) * settings.batch_size
        directory.log.append(
            [
                {
                    "part": 0, "read": counts["available"], "kept": counts["used"],
                    "dropped": {"not_in_split": counts["available"] - counts["used"]},
                    "samples_seen": seen, "steps": plan.steps, "loss": history[-1]["loss"],
                    "data_wait_share": history[-1]["data_wait_share"], "starts": state["starts"],
                    "files": {"checkpoint.pt": store.sha256(store.read_bytes(directory.path("checkpoint.pt")))},
                }
            ]
        )  # fmt: skip
        return _finish(directory, settings)


def _finish(directory: rundir.RunDirectory, settings: TrainSettings) -> rundir.Summary:
    record = directory.log.records[0]
    extra = {key: record[key] for key in ("samples_seen", "steps", "loss", "data_wait_share", "starts")}
    return directory.finish({"model": settings.model, "objective": settings.objective}, **extra)


def make_plan(settings: TrainSettings, out: str, image_size: int) -> tuple[Plan, dict[str, int]]:
    """Index the sources, apply the split, and fix the order.

    Returns:
        The plan, and counts: `available` samples in the sources, `used` after the split.
    """
    split = idlists.read_subset(settings.split) if settings.split else None
    pool = samples.index(settings.source, settings.samples or store.join(out, "samples"))
    supervised = settings.objective == "supervised"
    if supervised and not pool.class_names:
        raise ConfigError(
            f"--objective supervised needs labels, but {settings.source} is no labelled set",
            hint="give a test-set folder (wds with classnames.txt, one folder per class, a manifest)",
        )
    tables, available = _filtered(pool, split)
    if split is not None and not sum(table.num_rows for table in tables):
        raise DataError(
            f"split {settings.split}: none of its {len(split)} uids is in {settings.source} (coverage 0 %)",
            hint="train on the pool that the split was cut from",
        )
    if settings.reference:
        beside = f"{settings.samples}-reference" if settings.samples else store.join(out, "reference")
        mixed = samples.index(settings.reference, beside)
        extra, more = _filtered(mixed, None)
        tables, available = tables + extra, available + more
    if not supervised:
        tables = [table.filter(pc.is_valid(table.column("caption"))) for table in tables]
    used = sum(table.num_rows for table in tables)
    world_batch = max(1, settings.workers) * settings.batch_size
    steps = settings.num_samples // world_batch
    if used < world_batch or not steps:
        raise ConfigError(
            f"{used} samples and --num-samples {settings.num_samples} are less than one step of "
            f"{settings.workers} workers x {settings.batch_size}",
            hint="lower --batch-size or --workers, or raise --num-samples",
        )
    order = SampleOrder(np.array([table.num_rows for table in tables]), settings.seed, settings.window)
    plan = Plan(tables, order, len(pool.class_names), settings.model_dump(mode="json"), steps, image_size)
    return plan, {"available": available, "used": used}


def _filtered(source: samples.Source, split: np.ndarray | None) -> tuple[list[pa.Table], int]:
    tables = [source.table(part) for part in source.parts]
    kept = [table.filter(pa.array(samples.in_split(table, split))) for table in tables]
    return kept, sum(table.num_rows for table in tables)


@ray.remote(num_cpus=0)
class Monitor:
    """Collects the metrics of rank 0 while the driver waits in `fit`."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        """Take one row of metrics."""
        self.rows.append(row)

    def since(self, count: int) -> list[dict[str, Any]]:
        """Return the rows after the first `count`."""
        return self.rows[count:]


def _fit(settings: TrainSettings, plan: Plan, directory: rundir.RunDirectory) -> dict[str, Any]:
    """Run the workers to the end, publish checkpoint and metrics, and return the last checkpoint's state."""
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    monitor = Monitor.remote()  # type: ignore[attr-defined]
    loop_config = {"plan": ray.put(plan), "monitor": monitor, "checkpoint_every": settings.checkpoint_every}
    gpu = resolve_device(settings.device) == "cuda"
    trainer = ray.train.torch.TorchTrainer(
        train_loop,
        train_loop_config=loop_config,
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": WORKER_CPUS, **({"GPU": 1.0} if gpu else {})},
        ),
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=directory.uri if "://" in directory.uri else os.path.abspath(directory.uri),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=KEEP_CHECKPOINTS),
            failure_config=ray.train.FailureConfig(max_failures=2),
        ),
    )
    done = threading.Event()
    follower = threading.Thread(target=_follow, args=(monitor, plan, done), daemon=True)
    follower.start()
    before = signal.getsignal(signal.SIGINT)
    try:
        result = trainer.fit()
    except SystemExit:  # Ray Train answers Ctrl-C with exit code 0: that would read as "complete"
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)  # Ray Train leaves its own handler behind
        done.set()
        follower.join()
    if result.checkpoint is None:
        raise DataError(f"{directory.uri}: training ended without a checkpoint", hint="run the same command again")
    with result.checkpoint.as_directory() as folder:
        state = torch.load(os.path.join(folder, "state.pt"), map_location="cpu", weights_only=True)
        with open(os.path.join(folder, "checkpoint.pt"), "rb") as file:
            store.write_bytes(directory.path("checkpoint.pt"), file.read())
    lines = "".join(f"{json.dumps(row)}\n" for row in state["history"])
    store.write_bytes(directory.path("metrics.jsonl"), lines.encode())
    return state


def _follow(monitor: Any, plan: Plan, done: threading.Event) -> None:
    """Show the progress of rank 0 until `done`."""
    progress = Progress("train", plan.steps, "steps")
    count = 0
    while not done.wait(1.0):
        rows = ray.get(monitor.since.remote(count))
        if rows:
            count += len(rows)
            before = progress.done
            step, seen = rows[-1]["step"], rows[-1]["samples"]
            progress.note = f"loss {rows[-1]['loss']:.3f}"
            progress.advance(step - before, rows=round((step - before) * seen / step))
    progress.close()


def _publish(settings: TrainSettings, directory: rundir.RunDirectory, plan: Plan) -> None:
    """Put beside the checkpoint what others need to load it."""
    register_models()
    config = open_clip.get_model_config(settings.model)
    store.write_json(directory.path(f"{settings.model}.model.json"), config)
    preprocess = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD, "size": plan.image_size}
    store.write_json(directory.path("open_clip_config.json"), {"model_cfg": config, "preprocess_cfg": preprocess})
    name = settings.model
    lines = [
        "To load this checkpoint with open_clip:",
        "",
        "    import open_clip, shutil",
        f"    shutil.copy('{name}.model.json', '{name}.json'); open_clip.add_model_config('{name}.json')",
        f"    model = open_clip.create_model('{name}', pretrained='checkpoint.pt')",
        "",
    ]
    store.write_bytes(directory.path("LOAD.txt"), "\n".join(lines).encode())
