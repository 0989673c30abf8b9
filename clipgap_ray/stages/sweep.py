"""Several trainings at the same time: as many as the cluster has CPUs and GPUs for, each with a driver of its own.

A training's driver is a Ray task that needs no CPU and is retried when its node dies: the run resumes from its last
checkpoint. Its workers start together or not at all (Ray Train's placement group), so two runs never wait for each
other's half. What a run makes does not depend on its neighbours: on CPUs the weights are those of a run by itself.

Memory: one process of about 0.7 GB per training beside its workers, spread over the nodes. Where one training fills the
cluster they run one after the other in the caller's process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import ray

from clipgap_ray import filesystems
from clipgap_ray.config.train import TrainSettings
from clipgap_ray.stages import autoscaler, train, train_plan
from clipgap_ray.stages.progress import Progress, logger
from clipgap_ray.stages.session import cluster_gpus, connect, own_error, physical_cpus, resolve_device
from clipgap_ray.stages.train_data import DECODER_CPUS

DRIVER_RETRIES = 3  # a driver that dies with its node; errors of the training itself are not retried
LOOK_S = 10.0
LEAVE_S = 60.0  # for trainings to put down their leases when the command is stopped


def run(trainings: Sequence[TrainSettings], side_by_side: int = 0) -> None:
    """Run trainings; of those that are complete only the settings are compared.

    Args:
        trainings: With directories of their own; they may share `samples`.
        side_by_side: How many at the same time; 0: what the cluster has room for.

    Raises:
        The first error of a training, after those that were running beside it have come to their end.
    """
    todo = []
    for settings in trainings:
        if train.is_complete(settings.out):
            train.run(settings)
        else:
            todo.append(settings)
    if not todo:
        return
    connect()
    places = min(side_by_side or room(todo), len(todo))
    if places == 1:
        for number, settings in enumerate(todo, 1):
            logger.info("-- train %s (%d of %d)", settings.out, number, len(todo))
            train.run(settings)
        return
    logger.info("-- train %d models, %d at a time", len(todo), places)
    for settings in todo:
        train_plan.index_sources(settings, settings.out)  # one driver writes an index, then all read it
    _side_by_side(todo, places)


def room(trainings: Sequence[TrainSettings]) -> int:
    """Return how many of these trainings fit on the cluster at the same time, the largest counted; at least 1."""
    gpu = resolve_device(trainings[0].device) == "cuda"
    places = []
    for settings in trainings:
        workers = max(1, settings.workers)
        by_cpus = physical_cpus() / (workers * (train.WORKER_CPUS + settings.decoders * DECODER_CPUS))
        places.append(min(by_cpus, cluster_gpus() / workers) if gpu else by_cpus)
    return max(1, int(min(places)))


def _side_by_side(todo: list[TrainSettings], places: int) -> None:
    driver = ray.remote(num_cpus=0, max_retries=DRIVER_RETRIES, scheduling_strategy="SPREAD")(_drive)
    to_come = autoscaler.said_here()
    progress = Progress("trainings", len(todo), "models")
    waiting = list(todo)
    running: dict[ray.ObjectRef, str] = {}
    failed: list[Exception] = []
    try:
        while running or (waiting and not failed):
            while waiting and len(running) < places and not failed:
                settings = waiting.pop(0)
                running[driver.remote(settings, filesystems.options(), os.getcwd(), to_come)] = settings.out
            progress.note = f"{len(running)} at work"
            done, _ = ray.wait(list(running), timeout=LOOK_S)
            for reference in done:
                out = running.pop(reference)
                error = _error(reference)
                if error is None:
                    progress.advance()
                else:
                    logger.warning("%s: %s", out, error)
                    failed.append(error)
            progress.advance(0)
    except BaseException:  # Ctrl-C, or a limit of the command: checkpoints stay, drivers put down their leases
        for reference in running:
            ray.cancel(reference)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=LEAVE_S)
        raise
    finally:
        progress.close()
    if failed:
        raise failed[0]


def _drive(settings: TrainSettings, options: filesystems.StorageOptions, folder: str, to_come: str) -> None:
    """Train in a worker.

    Args:
        settings: Of the training.
        options: How S3 stores are reached.
        folder: What relative paths of the settings are relative to, on the machine of the command.
        to_come: What the autoscaler may bring up, which this node was not told.
    """
    filesystems.configure(options)
    if to_come:
        os.environ[autoscaler.VARIABLE] = to_come
    with contextlib.chdir(folder) if os.path.isdir(folder) else contextlib.nullcontext():
        train.run(settings)


def _error(reference: ray.ObjectRef) -> Exception | None:
    try:
        ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        return own_error(error)
    except ray.exceptions.RayError as error:
        return error
    return None
