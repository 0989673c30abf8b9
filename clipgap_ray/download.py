"""Remote files with a known sha256, once per machine: downloaded, checked, kept, memory-mapped by whoever needs them.

    CACHE/<first two digits>/<sha256>

A file is named by its content, so it is never out of date, replicas and versions of an index share what is equal, and
a file that is there is whole: it is written beside its place, checked, and renamed. Processes that want the same file
wait for the first one. The folder is CLIPGAP_CACHE, else clipgap below XDG_CACHE_HOME or ~/.cache.

CLIPGAP_CACHE_GB bounds it: after a download the files that were opened longest ago go, the new one never. Whoever has
one of them mapped goes on with it, its room is free when they end; give it more than the shards of a machine take.
Unset, nothing is ever deleted; deleting the folder is always safe.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from clipgap_ray import filesystems, store
from clipgap_ray.errors import ConfigError, DataError

FOLDER_VARIABLE, BOUND_VARIABLE = "CLIPGAP_CACHE", "CLIPGAP_CACHE_GB"

logger = logging.getLogger("clipgap")


def cache_folder() -> Path:
    """Return where files are kept."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "clipgap"


def local_copy(uri: str, digest: str) -> str:
    """Return the path of a file of this machine with the content of a remote one.

    Args:
        uri: The file; a local one is returned as it is, unchecked.
        digest: Its sha256.

    Raises:
        DataError: If the file is missing, or its content is another one.
        ConfigError: If the bound of the cache is no number.
        StorageError: If the store does not answer, or the disk is full.
    """
    if filesystems.is_local(uri):
        return str(filesystems.filesystem(uri)[1])
    bound = _bound_bytes()
    target = cache_folder() / digest[:2] / digest
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target.with_suffix(".lock")):
        if target.exists() and store.file_sha256(str(target)) == digest:
            os.utime(target)  # last opened now
            return str(target)
        _download(uri, digest, target)
    if bound is not None:
        _shrink(bound, target)
    return str(target)


def _download(uri: str, digest: str, target: Path) -> None:
    started = time.monotonic()
    temporary = target.with_name(f".{digest[:16]}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        store.fetch(uri, str(temporary))
        found = store.file_sha256(str(temporary))
        if found != digest:
            raise DataError(
                f"{uri} has sha256 {found[:12]}, its manifest says {digest[:12]}",
                hint="delete that shard's folder and run `clipgap index` again",
            )
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    logger.info("downloaded %s, %.1f MB, %.0f s", uri, target.stat().st_size / 1e6, time.monotonic() - started)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process, however it ends."""
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _bound_bytes() -> float | None:
    text = os.environ.get(BOUND_VARIABLE, "")
    if not text:
        return None
    try:
        bound = float(text)
    except ValueError:
        bound = 0.0
    if not bound > 0:
        raise ConfigError(f"{BOUND_VARIABLE} is {text!r}: expected gigabytes above 0", hint="unset it for no bound")
    return bound * 1e9


def _shrink(bound: float, newest: Path) -> None:
    """Delete what was opened longest ago until the rest fits."""
    files = []
    for path in cache_folder().glob("??/" + "?" * 64):
        with contextlib.suppress(FileNotFoundError):  # somebody else shrinks it
            state = path.stat()
            files.append((state.st_mtime, state.st_size, path))
    left = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if left <= bound:
            return
        if path != newest:
            path.unlink(missing_ok=True)
            left -= size
