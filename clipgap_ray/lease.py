"""One driver per directory: a lease that a second driver is refused and an heir takes over."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Self

from clipgap_ray import filesystems, store
from clipgap_ray.errors import LeaseError, StorageError

BEAT_S = 5.0


class Lease:
    """One driver per directory. Locally a lock that dies with its process; elsewhere a beating counter.

    Wall clocks of different machines are never compared: a remote lease is taken over only after its counter
    stood still for three beats of our own clock.
    """

    def __init__(self, uri: str) -> None:
        self.uri = store.join(uri, "lease")
        self.owner = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
        self._stop = threading.Event()
        self._file: Any = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if filesystems.is_local(self.uri):
            self._lock()
        else:
            self._take_over()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._file is not None:
            self._file.close()
            return
        if self._thread is not None:
            self._thread.join()
        store.remove(self.uri)

    def _lock(self) -> None:
        import fcntl  # absent on Windows; only the local lease needs it

        path = Path(filesystems.filesystem(self.uri)[1])
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115  held until __exit__
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read() or "unknown"
            file.close()
            raise self._refusal(holder) from None
        file.seek(0)
        file.truncate()
        file.write(json.dumps(self.owner))
        file.flush()
        self._file = file

    def _take_over(self) -> None:
        before = store.read_bytes(self.uri) if store.exists(self.uri) else b""
        if before:
            time.sleep(3 * BEAT_S)  # the holder beats meanwhile, if it lives
            if store.exists(self.uri) and store.read_bytes(self.uri) != before:
                raise self._refusal(before.decode())
        self._write(0)
        time.sleep(0.2)  # a rival that wrote between our read and our write shows now
        if json.loads(store.read_bytes(self.uri))["token"] != self.owner["token"]:
            raise self._refusal(store.read_bytes(self.uri).decode())
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def _write(self, beat: int) -> None:
        store.write_bytes(self.uri, json.dumps({**self.owner, "beat": beat}).encode())

    def _beat(self) -> None:
        beat = 0
        while not self._stop.wait(BEAT_S):
            beat += 1
            with contextlib.suppress(StorageError):  # a store that is away for a moment: the next beat mends it
                self._write(beat)

    def _refusal(self, holder: str) -> LeaseError:
        return LeaseError(
            f"{self.uri.rsplit('/', 1)[0]} is being written by another driver: {holder}",
            hint="wait for it, stop it, or choose another --out",
        )
