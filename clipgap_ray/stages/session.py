"""One way to reach a cluster, and what is on it."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator

import ray

from clipgap_ray import worker_memory
from clipgap_ray.errors import ClipgapError, ConfigError
from clipgap_ray.stages.autoscaler import launchable

LOCAL_CPUS = 4  # logical: Ray does not pin cores, and stages ask for fractions, so two cores are enough
START_ATTEMPTS = 3


def connect() -> None:
    """Join the cluster of RAY_ADDRESS or of the running job, or start a private one on this machine."""
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    for name in ("ray.train", "ray.serve", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised; it would print each three times
    if not is_private():
        ray.init(log_to_driver=True, logging_level=logging.WARNING)
        _sigterm_as_ctrl_c()
        return
    # A private cluster needs no token on disk: without this Ray writes one into the home directory.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Nobody reclaims this machine: Ray Train need not start a process that watches for it.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    with _quiet_stderr():
        _start_private()
    worker_memory.watch.begin()
    _sigterm_as_ctrl_c()


def is_private() -> bool:
    """Return whether `connect` starts Ray on this machine instead of joining a cluster."""
    return not os.environ.get("RAY_ADDRESS")


def _sigterm_as_ctrl_c() -> None:
    """End an operator's SIGTERM as Ctrl-C ends; Ray's own handler prints a native stack trace and aborts."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)


def _start_private() -> None:
    """Ray gives its own processes 30 seconds, which is little where two cores are busy with something else."""
    for attempt in range(START_ATTEMPTS):
        try:
            return _init_private()
        except Exception as error:  # Ray raises the bare class
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            if attempt == START_ATTEMPTS - 1:
                raise ClipgapError(
                    f"Ray did not start on this machine: {START_ATTEMPTS} attempts of 30 seconds",
                    hint="something else keeps the machine busy: wait for it, or stop it",
                ) from None


def _init_private() -> None:
    ray.init(
        address="local",  # else Ray would join a cluster that happens to run on this machine
        num_cpus=max(LOCAL_CPUS, os.cpu_count() or 1),
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=os.environ.get("CLIPGAP_WORKER_LOGS") == "1",
        object_store_memory=_object_store_bytes(),
        _temp_dir=os.environ.get("CLIPGAP_RAY_TMP"),
    )


def own_error(error: ray.exceptions.RayTaskError) -> Exception:
    """Return the error of ours that a task of Ray Data failed with, else the error as it is.

    The pipeline must have set `raise_original_map_exception`. What Ray adds to the message is about its own retries.
    """
    cause = error.cause
    if not isinstance(cause, ClipgapError):
        return error
    return type(cause)(cause.message.partition("\nFailed to ")[0], cause.hint)


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Hide what Ray's C++ side writes to file descriptor 2 while it starts; Python's errors still raise."""
    saved = os.dup(2)
    with open(os.devnull, "w") as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _object_store_bytes() -> int:
    """A quarter of the memory, at most 2 GB: stages stream, they do not materialise."""
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return int(min(2e9, max(2e8, pages * page / 4)))


def cluster_cpus() -> float:
    """Return the CPUs of the cluster now, at least 1."""
    return max(1.0, ray.cluster_resources().get("CPU", 1.0))


def physical_cpus() -> int:
    """Return the cores to keep busy: those really there (logical CPUs of a private cluster exceed them), or to come."""
    here = min(int(cluster_cpus()), (os.cpu_count() or 1) * len(ray.nodes()))
    return max(1, here, launchable("CPU"))


def cluster_gpus() -> int:
    """Return the GPUs that the cluster has or can launch."""
    return max(int(ray.cluster_resources().get("GPU", 0)), launchable("GPU"))


def resolve_device(device: str) -> str:
    """Resolve "auto" against what the cluster has or can launch.

    Raises:
        ConfigError: If "cuda" was asked for and no node has a GPU, or could have one.
    """
    gpus = cluster_gpus()
    if device == "cuda" and not gpus:
        raise ConfigError("device is 'cuda', but no node of the cluster has a GPU", hint="use --device auto or cpu")
    if device == "auto":
        return "cuda" if gpus else "cpu"
    return device


def gpu_nodes() -> list[str]:
    """Return the ids of the living nodes that have a GPU."""
    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) > 0]
