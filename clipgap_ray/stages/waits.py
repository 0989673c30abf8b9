"""Work in flight: how many workers fit, what is missing while none starts, and results of tasks as they come."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import ray

from clipgap_ray.errors import StoppedError
from clipgap_ray.stages import limits
from clipgap_ray.stages.autoscaler import launchable
from clipgap_ray.stages.progress import logger
from clipgap_ray.stages.session import connect, own_error, physical_cpus

T = TypeVar("T")
R = TypeVar("R")

SAY_SHORTAGE_S = 30.0
SMALL_ROWS = 500_000  # below, starting Ray takes longer than light work on the rows


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
