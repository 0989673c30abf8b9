"""Bytes, JSON, arrays and tables at any fsspec URI; a file is whole or absent.

Locally a write is a temporary file, fsync and rename; object stores make a PUT visible at once, so there it is
one PUT. Nothing here knows stages: see `rundir` for commits, leases and manifests.

How an S3 store is reached is one value, `StorageOptions`: the driver configures it, work carries it, a worker
configures it before its first read. What is not set is what s3fs and botocore read for themselves: AWS_ENDPOINT_URL,
AWS_PROFILE, FSSPEC_S3_ANON, the credentials of the machine. Credentials never travel. Rejected: environment variables
through Ray's runtime_env (a cluster that runs already ignores them, and a job that sets one itself is refused).

Every read, listing and write of a remote file is tried several times here, whatever the file system below does for
itself: s3fs repeats a request that failed, but gives up on some errors of HTTP servers that pass by.

Credentials that know their end (instance profiles, service accounts, `credential_process`) are renewed by botocore
ahead of it. Those of a file are read once; when a store refuses them they are read again: after another login.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipgap_ray.errors import DataError, StorageError

T = TypeVar("T")

ATTEMPTS = 6
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")  # the name that atomic_file gives
FIRST_PAUSE_S = 0.2  # doubled after every attempt: six attempts bridge about six seconds


@dataclass(frozen=True)
class StorageOptions:
    """How S3 stores are reached; empty fields leave it to s3fs and botocore.

    Attributes:
        endpoint_url: Address of an S3 server other than AWS.
        anonymous: Do not sign requests: public buckets without an account.
        profile: A profile of the machine's AWS configuration.
    """

    endpoint_url: str = ""
    anonymous: bool = False
    profile: str = ""

    def for_s3fs(self) -> dict[str, Any]:
        """Return s3fs's keyword arguments."""
        words: dict[str, Any] = {}
        if self.endpoint_url:
            words["endpoint_url"] = self.endpoint_url
        if self.anonymous:
            words["anon"] = True
        if self.profile:
            words["profile"] = self.profile
        # Other drivers and workers write too: a cached listing would be a lie. botocore's own retries are off, since
        # three layers of them multiply: an address where nobody listens took minutes to be an error.
        return {**words, "use_listings_cache": False, "config_kwargs": {"retries": {"total_max_attempts": 1}}}


_options = StorageOptions()


def configure(options: StorageOptions) -> None:
    """Set how this process reaches S3 stores from now on; workers are given the driver's options with their work."""
    global _options
    _options = options


def options() -> StorageOptions:
    """Return how this process reaches S3 stores."""
    return _options


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a URI and the path inside it; a plain path is local."""
    words = _options.for_s3fs() if uri.startswith(("s3://", "s3a://")) else {}
    fs, path = fsspec.core.url_to_fs(uri, **words)
    return fs, path


def patiently(uri: str, call: Callable[[], T]) -> T:
    """Call something that talks to the store of a URI, again when the network or the server fails.

    Args:
        uri: What it is about; calls on local files are made once.
        call: Must be safe to repeat.

    Raises:
        FileNotFoundError: As it comes: that is an answer.
        StorageError: If access is refused, also with credentials read anew, or the last of `ATTEMPTS` attempts failed.
    """
    if is_local(uri):
        return call()
    renewed = False
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except FileNotFoundError:
            raise
        except PermissionError as error:
            if not renewed and attempt < ATTEMPTS - 1:
                _renew_session(uri)
                renewed = True
                continue
            hint = "check (or renew) the credentials of this machine, --profile, or --anonymous for a public bucket"
            raise StorageError(f"{uri}: access refused: {error}", hint) from None
        except _passing_errors() as error:
            refused = getattr(error, "errno", None) == errno.EINVAL  # 400: of an expired token HEAD says no more
            if refused:
                _renew_session(uri)
            if attempt == ATTEMPTS - 1:
                suspect = "whether the credentials have expired" if refused else "the address and --endpoint-url"
                raise StorageError(
                    f"{uri}: {type(error).__name__} after {ATTEMPTS} attempts: {error}",
                    hint=f"check {suspect}; running the same command again continues",
                ) from error
            time.sleep(FIRST_PAUSE_S * 2**attempt)
        except _account_errors() as error:
            hint = "configure credentials, name a --profile, or use --anonymous for a public bucket"
            raise StorageError(f"{uri}: {error}", hint) from None
    raise AssertionError("unreachable")


def _renew_session(uri: str) -> None:
    """Have the file system of a URI read its credentials anew; one without sessions (HTTP) stays as it is."""
    connect = getattr(filesystem(uri)[0], "connect", None)
    if connect is not None:
        with contextlib.suppress(*_account_errors()):  # the next call says it
            connect(refresh=True)


def _passing_errors() -> tuple[type[Exception], ...]:
    """Errors of a network or a busy server. Imported when something failed: local runs never load botocore."""
    import aiohttp
    import botocore.exceptions as boto

    return OSError, aiohttp.ClientError, boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError


def _account_errors() -> tuple[type[Exception], ...]:
    import botocore.exceptions as boto

    return boto.NoCredentialsError, boto.PartialCredentialsError, boto.ProfileNotFound


def is_local(uri: str) -> bool:
    """Tell whether a URI is on this machine's file system."""
    return "://" not in uri or uri.startswith(("file://", "local://"))


def absolute(uri: str) -> str:
    """Return a URI that means the same in every directory: Ray Train's workers run in one of their own."""
    return os.path.abspath(uri) if "://" not in uri else uri


def join(uri: str, *names: str) -> str:
    """Join names to a URI with single slashes."""
    return "/".join([uri.rstrip("/") if uri != "/" else uri, *names])


def exists(uri: str) -> bool:
    """Tell whether a file or folder exists."""
    fs, path = filesystem(uri)
    if is_local(uri):
        return bool(fs.exists(path))
    try:
        patiently(uri, lambda: fs.info(path))  # `exists` of s3fs takes a server's failure for an absent file
    except FileNotFoundError:
        return False
    return True


def size(uri: str) -> int:
    """Return the bytes of a file.

    Raises:
        DataError: If the file is missing.
    """
    fs, path = filesystem(uri)
    try:
        return int(patiently(uri, lambda: fs.size(path)))
    except FileNotFoundError:
        raise DataError(f"{uri} does not exist") from None


def remove(uri: str) -> None:
    """Remove a file; one that is gone already is no error."""
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        patiently(uri, lambda: fs.rm_file(path))


def list_names(uri: str) -> list[str]:
    """Return the sorted base names in a folder; empty when the folder is missing."""
    fs, path = filesystem(uri)
    try:
        entries = patiently(uri, lambda: fs.ls(path, detail=False))
    except FileNotFoundError:
        return []
    return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries)


def read_bytes(uri: str, offset: int = 0, size: int | None = None) -> bytes:
    """Read a file, or `size` bytes of it from `offset`.

    Raises:
        DataError: If the file is missing.
    """
    fs, path = filesystem(uri)
    start, end = (offset or None, None) if size is None else (offset, offset + size)

    def read() -> bytes:
        data = bytes(fs.cat_file(path, start=start, end=end))
        if size is not None and len(data) > size:  # a server that ignores ranges sends the whole file
            raise StorageError(f"{uri}: asked for {size} bytes from {offset}, received {len(data)}")
        return data

    try:
        return patiently(uri, read)
    except FileNotFoundError:
        raise DataError(f"{uri} does not exist") from None


def fetch(uri: str, path: str) -> None:
    """Copy a remote file to a local path, in pieces; what an attempt that failed left there is overwritten.

    Raises:
        DataError: If the file is missing.
        StorageError: If the store does not answer, or the disk is full.
    """
    fs, inside = filesystem(uri)
    with room(path):
        try:
            patiently(uri, lambda: fs.get_file(inside, path))
        except FileNotFoundError:
            raise DataError(f"{uri} does not exist") from None


def file_sha256(path: str) -> str:
    """Return the sha256 of a local file, read in pieces; DataError when it is missing."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file so that it is whole or absent: temporary + rename locally, one PUT on object stores."""
    fs, path = filesystem(uri)
    if not is_local(uri):
        patiently(uri, lambda: fs.pipe_file(path, data))
        return
    with atomic_file(uri) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_file(uri: str) -> Iterator[IO[bytes]]:
    """Open a file too large for memory for writing; it appears whole when the block ends, not at all if it raises.

    Yields:
        A binary, seekable local file: the temporary beside a local target, or a spool that is uploaded at the end.

    Raises:
        StorageError: If the disk is full; nothing of the file remains.
    """
    fs, path = filesystem(uri)
    if not is_local(uri):
        with (
            room(f"{tempfile.gettempdir()} (for {uri})"),
            tempfile.NamedTemporaryFile(prefix="clipgap-upload-") as spool,
        ):
            yield spool
            spool.flush()
            patiently(uri, lambda: fs.put_file(spool.name, path))
        return
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    with room(uri):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # a full disk may be known only now
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def remove_leftovers(uri: str) -> None:
    """Remove what writers that were killed left of files in a local folder and the folders directly in it.

    Only for whoever alone writes there. An orphan that still writes loses its file, not its neighbours'.
    """
    if not is_local(uri):
        return
    folder = Path(filesystem(uri)[1])
    for pattern in (".*.tmp", "*/.*.tmp"):
        for path in folder.glob(pattern):
            if _LEFTOVER.fullmatch(path.name):
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def room(place: str) -> Iterator[None]:
    """Turn the OSError of a full disk (or quota) within a block into a StorageError that names the place."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        hint = "free some space; running the same command again continues"
        raise StorageError(f"{place}: {os.strerror(error.errno).lower()}", hint) from None


def sha256(data: bytes) -> str:
    """Return the hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def digest(value: Any) -> str:
    """Return the hex sha256 of a JSON value in canonical form (sorted keys, no blanks)."""
    return sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode())


def read_json(uri: str) -> Any:
    """Read a JSON file; DataError names the file when it is missing or malformed."""
    try:
        return json.loads(read_bytes(uri))
    except json.JSONDecodeError as error:
        raise DataError(f"{uri} is not JSON: {error}") from None


def link(source: str, target: str, content: str) -> bool:
    """Give a local file a second name, atomically, if its content has this sha256.

    Returns:
        False where that cannot be: another content, another disk, an object store.
    """
    if not (is_local(source) and is_local(target)):
        return False
    path, other = Path(filesystem(source)[1]), Path(filesystem(target)[1])
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != content:
            return False
    other.parent.mkdir(parents=True, exist_ok=True)
    temporary = other.with_name(f".{other.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        os.link(path, temporary)
        os.replace(temporary, other)
    except OSError:
        return False
    return True


def write_json(uri: str, value: Any) -> None:
    """Write a JSON file atomically, indented, with a final newline."""
    write_bytes(uri, (json.dumps(value, indent=2, default=str) + "\n").encode())


def array_bytes(array: np.ndarray) -> bytes:
    """Return an array as the bytes of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def read_array(uri: str) -> np.ndarray:
    """Read an .npy file without pickles; local files are memory-mapped read-only."""
    if is_local(uri):
        path = filesystem(uri)[1]
        if not os.path.exists(path):
            raise DataError(f"{uri} does not exist")
        return np.load(path, mmap_mode="r", allow_pickle=False)
    return np.load(io.BytesIO(read_bytes(uri)), allow_pickle=False)


def table_bytes(table: pa.Table) -> bytes:
    """Return a table as the bytes of a parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def write_table(uri: str, table: pa.Table) -> None:
    """Write a parquet file atomically."""
    write_bytes(uri, table_bytes(table))


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Read a parquet file, or some of its columns."""
    fs, path = filesystem(uri)

    def read() -> pa.Table:
        with fs.open(path, "rb") as file:
            return pq.read_table(file, columns=columns)

    try:
        return patiently(uri, read)
    except FileNotFoundError:
        raise DataError(f"{uri} does not exist") from None
    except pa.ArrowInvalid as error:
        raise DataError(f"{uri} is not parquet with columns {columns}: {error}") from None


def num_table_rows(uri: str) -> int:
    """Return the rows of a parquet file, reading only its footer; 0 when it is none.

    Raises:
        DataError: If the file is missing.
    """
    fs, path = filesystem(uri)

    def read() -> int:
        with fs.open(path, "rb") as file:
            return int(pq.read_metadata(file).num_rows)

    try:
        return patiently(uri, read)
    except FileNotFoundError:
        raise DataError(f"{uri} does not exist") from None
    except pa.ArrowInvalid:
        return 0
