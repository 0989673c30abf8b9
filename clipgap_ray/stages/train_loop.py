"""What one training worker does: batch, forward, loss, step, checkpoint.

The position of a run is its number of samples seen, a whole number of global batches. Order, crops, initial weights
and what the model draws are functions of (seed, position): so a worker that starts at sample p, alone or among others
than before, sees exactly what an uninterrupted one would have seen (design contract 6), and there is no random state.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from clipgap_ray import filesystems, store
from clipgap_ray.errors import DataError
from clipgap_ray.stages.train_data import Batch, Plan, batches, batches_from_ray_data, prefetched
from clipgap_ray.stages.train_model import (
    Objective,
    build_model,
    learning_rate,
    make_optimizer,
    portable_state,
    unwrapped,
)

METRICS_EVERY = 10


def train_loop(config: dict[str, Any]) -> None:
    """Run one worker: Ray Train calls it on every rank.

    `config` holds `plan`, `run` (its directory), `checkpoint_every` and `monitor` (an actor or None).
    """
    import ray
    import ray.train
    import ray.train.torch

    plan: Plan = ray.get(config["plan"])
    settings = plan.settings
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
    if rank == 0:
        discard_scratch(config["run"])
    model = build_model(settings, len(plan.class_names))
    step, history, optimizer_state, starts = 0, [], None, [0]
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with opened(checkpoint, settings["out"]) as folder:
            state = torch.load(os.path.join(folder, "state.pt"), map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        step, history, optimizer_state = state["step"], state["history"], state["optimizer"]
        starts = [*state["starts"], step]
    wrapped = ray.train.torch.prepare_model(
        model,
        parallel_strategy_kwargs={"gradient_as_bucket_view": True},  # one copy of the gradients less
    )
    optimizer = make_optimizer(wrapped, settings)
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    source = (
        batches_from_ray_data(config["plan"], plan, rank, world_size, step)
        if settings["decoders"]
        else batches(plan, rank, world_size, step)
    )

    def after_step(step: int, row: dict[str, Any] | None) -> None:
        if row is not None:
            history.append(row)
            if rank == 0 and config["monitor"] is not None:
                config["monitor"].add.remote(row)
        if step % config["checkpoint_every"] == 0 or step == plan.steps:
            _report(wrapped, optimizer, {"step": step, "history": history, "starts": starts}, plan, rank, config["run"])

    run_steps(plan, wrapped, optimizer, source, step, rank, world_size, device, after_step)


@contextlib.contextmanager
def opened(checkpoint: Any, uri: str) -> Iterator[str]:
    """Open a checkpoint's folder; from an object store it is downloaded, again when the network fails.

    Args:
        checkpoint: Ray Train's.
        uri: The run directory that holds it.
    """
    if filesystems.is_local(uri):
        with checkpoint.as_directory() as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory(prefix="clipgap-checkpoint-") as folder:
        filesystems.patiently(uri, lambda: checkpoint.to_directory(folder))
        yield folder


def run_steps(
    plan: Plan,
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    source: Iterator[Batch],
    first: int,
    rank: int,
    world_size: int,
    device: torch.device,
    after_step: Callable[[int, dict[str, Any] | None], None],
) -> None:
    """Train from a step to the end of the plan. Knows no Ray: any process group will do, or none.

    Args:
        plan: Of the run.
        wrapped: The model, in DDP if there are several ranks.
        optimizer: Of its parameters.
        source: This rank's batches from step `first` on.
        first: Steps that are done.
        rank: This rank.
        world_size: Ranks.
        device: Of the model.
        after_step: Called with the number of steps done, and at every METRICS_EVERY of them with a row of metrics.

    Raises:
        DataError: If the ranks together saw more or fewer samples than the steps' share.
    """
    settings = plan.settings
    objective = Objective(plan, device, rank, world_size)
    wrapped.train()
    step, seen = first, 0
    waited, started = 0.0, time.perf_counter()
    for batch, wait in prefetched(source):
        waited += wait
        seen += len(batch[2])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, plan.steps, settings)
        optimizer.zero_grad(set_to_none=True)
        loss = objective.backward(wrapped, batch, plan.share(step, rank, world_size)[0])
        if settings["grad_clip_norm"] is not None:
            nn.utils.clip_grad_norm_(wrapped.parameters(), settings["grad_clip_norm"])
        optimizer.step()
        objective.after_step(wrapped)
        step += 1
        last = step == plan.steps
        row = None
        if step % METRICS_EVERY == 0 or last:
            seconds = max(time.perf_counter() - started, 1e-9)
            row = {
                "step": step,
                "samples": step * plan.global_batch,
                "loss": float(loss),
                "lr": optimizer.param_groups[0]["lr"],
                "data_wait_share": round(waited / seconds, 4),
                "samples_per_s": round((step - first) * plan.global_batch / seconds, 1),
                "workers": world_size,
            }
        if last:
            _check_seen(seen, first, plan, device)
        after_step(step, row)


def _check_seen(seen: int, first: int, plan: Plan, device: torch.device) -> None:
    """Count the samples over all ranks: together with those before this start they must be the steps' share.

    Raises:
        DataError: If a rank saw more or fewer.
    """
    total = torch.tensor(seen, dtype=torch.int64, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    expected = (plan.steps - first) * plan.global_batch
    if int(total) != expected:
        raise DataError(f"the ranks saw {int(total)} samples from step {first} on, expected {expected}")


def scratch_prefix(run: str) -> str:
    """Return how the folders begin that hold a run's checkpoints on their way to its storage, on a worker's machine."""
    return f"clipgap-checkpoint-{store.sha256(run.encode())[:12]}-"


def discard_scratch(run: str) -> None:
    """Remove what killed workers of a run left behind. Nobody else is at work on it: its driver holds a lease."""
    pattern = os.path.join(glob.escape(tempfile.gettempdir()), f"{scratch_prefix(run)}*")
    for folder in glob.glob(pattern):
        shutil.rmtree(folder, ignore_errors=True)


def _report(wrapped: nn.Module, optimizer: Any, position: dict[str, Any], plan: Plan, rank: int, run: str) -> None:
    """Report on every rank; rank 0 brings the checkpoint, whose upload goes on while the next steps run.

    A checkpoint counts once it is uploaded whole: Ray Train lists it in its snapshot only then, and waits for the last
    one before the run ends. `position` holds the step, the history of metrics, and the steps at which the run was
    started or resumed.
    """
    import ray.train

    metrics = {"step": position["step"]}
    if rank:
        ray.train.report(metrics)
        return
    folder = tempfile.mkdtemp(prefix=scratch_prefix(run))  # Ray Train removes it after the upload
    state = {"model": unwrapped(wrapped).state_dict(), "optimizer": optimizer.state_dict(), **position}
    torch.save(state, os.path.join(folder, "state.pt"))
    published = {"state_dict": portable_state(wrapped, plan.settings["model"]), "step": position["step"]}
    if plan.settings["objective"] == "supervised":
        published["class_names"] = list(plan.class_names)  # a head is of no use without them
    torch.save(published, os.path.join(folder, "checkpoint.pt"))
    ray.train.report(
        metrics,
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )
