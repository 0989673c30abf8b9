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

import open_clip
import ray
import ray.train
import ray.train.torch
import torch

from clipgap_ray import rundir, store
from clipgap_ray.config.train import TrainSettings
from clipgap_ray.encoder import EncoderSettings, check, register_models
from clipgap_ray.errors import ClipgapError, ConfigError, DataError, StoppedError
from clipgap_ray.stages import limits, train_report
from clipgap_ray.stages.autoscaler import launchable
from clipgap_ray.stages.progress import Progress
from clipgap_ray.stages.session import cluster_cpus, connect, resolve_device
from clipgap_ray.stages.train_data import DECODER_CPUS, Plan
from clipgap_ray.stages.train_loop import opened, train_loop
from clipgap_ray.stages.train_plan import make_plan
from clipgap_ray.stages.waits import amounts, slots_to_come, waiting

WORKER_CPUS = 0.9  # two workers must fit beside fractions of other tasks on two CPUs
COLLECTIVE_TIMEOUT_S = 300


def run(settings: TrainSettings) -> rundir.Summary:
    """Train a model, or resume its training.

    Raises:
        ConfigError: Unknown model, no samples, unlabelled source under `supervised`, fewer samples than a batch.
        DataError: A split of which no uid is in the source.
    """
    preprocess = check(EncoderSettings(settings.model, "random"))
    _check_model(settings)
    train_report.check(settings.report_to)
    guarded = settings.fingerprint()
    guarded.pop("out")
    with rundir.RunDirectory(settings.out, "train", guarded) as directory:
        if is_complete(directory.uri):
            return _finish(directory, settings)
        plan, counts = make_plan(settings, directory.uri, preprocess.size)
        connect()
        store.write_json(directory.path("params.json"), settings.model_dump(mode="json"))
        state = _fit(settings, plan, directory)
        history = state["history"]
        _publish(settings, directory, plan)
        seen = history[-1]["samples"]  # counted over the ranks, see train_loop._check_seen
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


def is_complete(out: str) -> bool:
    """Tell whether a run directory holds a training that came to its end."""
    return store.exists(store.join(out, "checkpoint.pt")) and bool(rundir.CommitLog(out).records)


def _check_model(settings: TrainSettings) -> None:
    """Refuse settings that the model would pass over in silence.

    Raises:
        ConfigError: Patch dropout on a model without patches.
    """
    vision = (open_clip.get_model_config(settings.model) or {}).get("vision_cfg", {})
    convolutional = isinstance(vision.get("layers"), list)
    if settings.force_patch_dropout and convolutional:
        raise ConfigError(
            f"--force-patch-dropout {settings.force_patch_dropout}: {settings.model} has no patches",
            hint="leave it out, or train a vision transformer",
        )


def _finish(directory: rundir.RunDirectory, settings: TrainSettings) -> rundir.Summary:
    record = directory.log.records[0]
    extra = {key: record[key] for key in ("samples_seen", "steps", "loss", "data_wait_share", "starts")}
    return directory.finish({"model": settings.model, "objective": settings.objective}, **extra)


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
    # The controller takes one checkpoint per look at its workers: at Ray's two seconds a short run waits for that.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    monitor = Monitor.remote()  # type: ignore[attr-defined]
    run = store.absolute(directory.uri)
    loop_config = {
        "plan": ray.put(plan), "run": run, "monitor": monitor, "checkpoint_every": settings.checkpoint_every,
    }  # fmt: skip
    gpu = resolve_device(settings.device) == "cuda"
    needs = {"CPU": WORKER_CPUS, **({"GPU": 1.0} if gpu else {})}
    elastic = 0 < settings.min_workers < settings.workers
    least = settings.min_workers or settings.workers
    _check_room(settings, needs, least)
    trainer = ray.train.torch.TorchTrainer(
        train_loop,
        train_loop_config=loop_config,
        scaling_config=ray.train.ScalingConfig(
            num_workers=(settings.min_workers, settings.workers) if elastic else settings.workers,  # type: ignore[arg-type]
            use_gpu=gpu,
            resources_per_worker=needs,
        ),
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=run,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=settings.keep_checkpoints),
            failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
        ),
    )
    done = threading.Event()
    stopped: list[StoppedError] = []
    follower = threading.Thread(
        target=_follow, args=(monitor, plan, directory.uri, done, needs, least, stopped), daemon=True
    )
    follower.start()
    before = signal.getsignal(signal.SIGINT)
    try:
        result = trainer.fit()
    except (SystemExit, KeyboardInterrupt):  # Ray Train answers Ctrl-C with exit code 0: that would read as "complete"
        raise (stopped[0] if stopped else KeyboardInterrupt) from None
    except ray.train.WorkerGroupError as error:
        with store.room(directory.uri):
            raise _own(error) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)  # Ray Train leaves its own handler behind
        done.set()
        follower.join()
    if result.checkpoint is None:
        raise DataError(f"{directory.uri}: training ended without a checkpoint", hint="run the same command again")
    with opened(result.checkpoint, directory.uri) as folder:
        state = torch.load(os.path.join(folder, "state.pt"), map_location="cpu", weights_only=True)
        with open(os.path.join(folder, "checkpoint.pt"), "rb") as file:
            store.write_bytes(directory.path("checkpoint.pt"), file.read())
    lines = "".join(f"{json.dumps(row)}\n" for row in state["history"])
    store.write_bytes(directory.path("metrics.jsonl"), lines.encode())
    return state


def _own(error: ray.train.WorkerGroupError) -> Exception:
    """The error of ours or of a disk that ended a worker, without Ray's wrapping; else the error itself."""
    causes = [getattr(failure, "_base_exc", failure) for failure in error.worker_failures.values()]
    return next((cause for cause in causes if isinstance(cause, (ClipgapError, OSError))), error)


def _check_room(settings: TrainSettings, needs: dict[str, float], least: int) -> None:
    """Refuse a run that would wait for ever: too many workers, or decoders for CPUs that the workers hold.

    Args:
        settings: Of the run.
        needs: What one worker asks of one node.
        least: Workers without which the run does not begin.

    Raises:
        ConfigError: If that is more than there is, or could be launched.
    """
    room = slots_to_come(needs)
    if least > room:
        raise ConfigError(
            f"{least} workers want {amounts(needs)} each, the cluster has room for {room}",
            hint="lower --workers, or pass --min-workers; what an autoscaler may add it says in CLIPGAP_LAUNCHABLE",
        )
    wanted = settings.workers * (WORKER_CPUS + settings.decoders * DECODER_CPUS)
    there = max(cluster_cpus(), launchable("CPU"))
    if settings.decoders and wanted > there:
        raise ConfigError(
            f"{settings.workers} workers with {settings.decoders} --decoders each want {wanted:.1f} CPUs, "
            f"the cluster has {there:.1f}",
            hint="lower --decoders; 0 decodes in a thread of the worker",
        )


def _follow(
    monitor: Any,
    plan: Plan,
    uri: str,
    done: threading.Event,
    needs: dict[str, float],
    least: int,
    stopped: list[StoppedError],
) -> None:
    """Show the progress of rank 0 until `done`, and before it what the `least` workers still need.

    When the command reaches a limit: say so in `stopped` and end the run the way Ctrl-C does.
    """
    progress = Progress("train", plan.steps, "steps")
    count = 0
    with train_report.open_reporters(plan.settings, uri) as reporters, waiting(needs, least) as came:
        while True:
            ended = done.wait(1.0)
            rows = ray.get(monitor.since.remote(count))
            try:
                if rows:
                    came()
                    count += len(rows)
                    last = rows[-1]
                    progress.note = f"loss {last['loss']:.3f}, lr {last['lr']:.1e}, wait {last['data_wait_share']:.0%}"
                    steps = last["step"] - progress.done
                    progress.advance(steps, rows=steps * plan.global_batch)
                else:
                    limits.check()
            except StoppedError as error:
                if not stopped and not ended:
                    stopped.append(error)
                    os.kill(os.getpid(), signal.SIGINT)
            if rows:
                for reporter in reporters:
                    reporter.add(rows)
            if ended:
                break
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
