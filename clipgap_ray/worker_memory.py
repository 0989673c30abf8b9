"""How much memory Ray's workers hold on this machine while a command works, to stand beside what was planned.

A thread looks once a second at the processes that this process's own raylet has started, and keeps the most that one of
them has held (resident, pages of the object store included), as the kernel counts it: a peak between two looks is
seen, a worker that lives for less than a second may be missed. On a cluster that was joined, and where there is no
/proc, nothing is measured: there Ray's metrics have every node's memory.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

LOOK_S = 1.0
WORKER = b"ray::"  # how Ray calls the processes that run tasks and actors; a node's agents have such titles, too
AGENTS = (b"ray::DashboardAgent", b"ray::RuntimeEnvAgent")


class Watch:
    """Looks at the workers of this process, from `begin` on until the process ends."""

    def __init__(self) -> None:
        self._most = 0
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Begin to look; a second call goes on with the first one's."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._look_on, daemon=True)
            self._thread.start()

    def forget(self) -> None:
        """Begin with nothing, for another stage; workers that it takes over keep their own peaks."""
        self._most = 0

    def most(self) -> int:
        """Return the most bytes that one worker has held since `forget`; 0 if none was seen."""
        if self._thread is not None:
            self._look()
        return self._most

    def _look_on(self) -> None:
        while True:
            self._look()
            time.sleep(LOOK_S)  # the pace of the looks: no event tells of a process's memory

    def _look(self) -> None:
        self._most = max(self._most, *map(_peak, _workers()), 0)


#: Of this process: a raylet's workers are the process's, whichever stage gives them work.
watch = Watch()


def _workers() -> Iterator[int]:
    for child in _children(os.getpid()):
        if _text(child, "comm").strip() == b"raylet":
            for worker in _children(child):
                title = _text(worker, "cmdline")
                if title.startswith(WORKER) and not title.startswith(AGENTS):
                    yield worker


def _children(pid: int) -> Iterator[int]:
    """Processes that any thread of a process has started."""
    with contextlib.suppress(OSError):  # it ended, or there is no /proc
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                yield from map(int, (thread / "children").read_bytes().split())


def _text(pid: int, name: str) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_bytes()
    return b""


def _peak(pid: int) -> int:
    """VmHWM of a process in bytes; 0 once it has ended."""
    for line in _text(pid, "status").splitlines():
        if line.startswith(b"VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
