"""One way to reach a cluster, size requests to it, and show progress."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import ray

from clipgap_ray.errors import ClipgapError, ConfigError, StoppedError
from clipgap_ray.stages import limits
from clipgap_ray.stages.autoscaler import launchable

T = TypeVar("T")
R = TypeVar("R")

LOCAL_CPUS = 4  # logical: Ray does not pin cores, and stages ask for fractions, so two cores are enough
LOG_EVERY_S = 10.0
SAY_SHORTAGE_S = 30.0
START_ATTEMPTS = 3
SMALL_ROWS = 500_000  # below, starting Ray takes longer than light work on the rows

logger = logging.getLogger("clipgap")


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


def slots(needs: dict[str, float]) -> int:
    """Return how many workers fit on the living nodes together, whoever holds them now.

    Args:
        needs: Amounts by resource ("CPU", "GPU") that one worker asks of one node.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(_fitting(node, needs) for node in nodes)


def slots_to_come(needs: dict[str, float]) -> int:
    """Return how many workers fit on the living nodes, or on those that the autoscaler may bring up in all."""
    return max(slots(needs), _fitting({name: float(launchable(name)) for name in needs}, needs))


def _fitting(has: dict[str, float], needs: dict[str, float]) -> int:
    asked = {name: amount for name, amount in needs.items() if amount}
    return min(int(has.get(name, 0.0) / amount + 1e-9) for name, amount in asked.items())  # 2.7 holds three of 0.9


def shortage(needs: dict[str, float], count: int = 1) -> str:
    """Say what keeps workers from starting.

    Args:
        needs: As in `slots`.
        count: Workers that start together or not at all.
    """
    if 0 < (room := slots(needs)) < count:
        more = "the autoscaler may launch more" if slots_to_come(needs) >= count else "add nodes to the cluster"
        return f"{count} workers want {amounts(needs)} each, the nodes have room for {room}; {more}"
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    free = ray.available_resources()
    said = []
    for resource, amount in needs.items():
        most = max((node.get(resource, 0.0) for node in nodes), default=0.0)
        if most < amount:
            there = f"no node has {amount:g} {resource}" + (f", the largest has {most:g}" if most else "")
            coming = launchable(resource) >= amount
            said.append(
                f"{there}; " + ("the autoscaler may launch one" if coming else "add such a node to the cluster")
            )
        elif free.get(resource, 0.0) < amount:
            said.append(f"all {resource} of the cluster is in use")
    if not said and not slots(needs):
        said.append(f"no node has {amounts(needs)} together")
    return "; ".join(said) or "resources are there, workers are starting or at work"


def amounts(needs: dict[str, float]) -> str:
    """Return amounts by resource as words: "0.9 CPU and 1 GPU"."""
    return " and ".join(f"{amount:g} {name}" for name, amount in needs.items())


@contextlib.contextmanager
def waiting(needs: dict[str, float], count: int = 1) -> Iterator[Callable[[], None]]:
    """Say every half minute which resource is missing; never give up, since an autoscaled cluster may still bring it.

    Args:
        needs: As in `shortage`.
        count: As in `shortage`.

    Yields:
        What to call at the first result: from then on nothing is said.

    Raises:
        StoppedError: In the main thread, if the command reaches a limit while no node could run a worker. Where one
            could, parts may be at work, and they are committed before the command stops.
    """
    came = threading.Event()
    stopped: list[StoppedError] = []
    in_main = threading.current_thread() is threading.main_thread()
    ignored = in_main and signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # as a script's `command &` starts it
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def watch() -> None:
        started = time.monotonic()
        while not came.wait(SAY_SHORTAGE_S):
            logger.info("nothing yet after %.0f s: %s", time.monotonic() - started, shortage(needs, count))
            if in_main and not slots(needs):
                try:
                    limits.check()
                except StoppedError as error:
                    stopped.append(error)
                    os.kill(os.getpid(), signal.SIGINT)  # the main thread waits in Ray, which answers to this only
                    return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield came.set
    except KeyboardInterrupt:
        if stopped:
            raise stopped[0] from None
        raise
    finally:
        came.set()
        watcher.join()
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def bounded(
    submit: Callable[[T], Any], items: Iterable[T], limit: int = 0, needs: dict[str, float] | None = None
) -> Iterator[Any]:
    """Yield the results of Ray tasks as they finish, with a bounded number in flight.

    Args:
        submit: Starts the task of an item and returns its object reference.
        items: What to work on; taken lazily, in order.
        limit: Tasks in flight; 0 = one per core that is there or can be launched.
        needs: What a task asks of a node, to name what is missing while nothing comes; None: one CPU.

    Raises:
        The task's own error, without Ray's wrapping, when it is one of ours.
    """
    left = iter(items)
    first = list(itertools.islice(left, 1))
    if not first:  # a finished stage asks nothing of a cluster, and may not have joined one
        return
    limit = limit or physical_cpus()
    running = [submit(item) for item in itertools.chain(first, itertools.islice(left, limit - 1))]
    with waiting(needs or {"CPU": 1.0}) as came:
        ray.wait(running)
        came()
    while running:
        done, running = ray.wait(running)
        try:
            results = ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise own_error(error) from None
        running.extend(submit(item) for item in itertools.islice(left, len(done)))
        yield from results


def each_part(work: Callable[[T], R], parts: Sequence[T], num_rows: int) -> Iterator[R]:
    """Yield what `work` makes of every part, in any order: here for small sets, by Ray tasks for large ones.

    Args:
        work: Takes a part; must be picklable.
        parts: The parts.
        num_rows: Rows in all parts; from SMALL_ROWS on it is worth starting Ray.
    """
    if num_rows < SMALL_ROWS:
        yield from map(work, parts)
        return
    connect()
    shared = ray.put(work)
    task: Any = ray.remote(num_cpus=1)(_call)
    yield from bounded(lambda part: task.remote(shared, part), parts)


def _call(work: Callable[[T], R], part: T) -> R:
    return work(part)


class Progress:
    """Done/total, rate and ETA on stderr: a rewritten line on a terminal, a log line every 10 s elsewhere."""

    def __init__(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.done = self.first = done
        self.rows = 0
        self.shown_done = -1
        self.note = ""  # shown at the end of the line
        self.started = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def advance(self, units: int = 1, rows: int = 0) -> None:
        """Count finished units (parts, steps) and the rows in them.

        Raises:
            StoppedError: If the command has a limit and reached it.
        """
        self.done += units
        self.rows += rows
        now = time.monotonic()
        if now - self.shown >= (0.2 if self.live else LOG_EVERY_S):
            self.shown = now
            self._show("\r" if self.live else "", "" if self.live else "\n")
        limits.check()

    def close(self) -> None:
        """Show the final state."""
        if self.live or self.shown_done != self.done:
            self._show("\r" if self.live else "", "\n")

    def _show(self, start: str, end: str) -> None:
        self.shown_done = self.done
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = (self.done - self.first) / seconds
        left = (self.total - self.done) / rate if rate else math.inf
        eta = f", ETA {left:.0f} s" if 0 < left < math.inf else ""
        rows = f", {self.rows / seconds:,.0f} rows/s" if self.rows else ""
        note = f", {self.note}" if self.note else ""
        line = f"{self.stage}: {self.done}/{self.total} {self.unit}{rows}, {seconds:.0f} s{eta}{note}"
        sys.stderr.write(f"{start}{line:<78}{end}")
        sys.stderr.flush()
