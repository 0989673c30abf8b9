"""Bytes, JSON, arrays and tables at any fsspec URI; a file is whole or absent.

Locally a write is a temporary file, fsync and rename; object stores make a PUT visible at once, so there it is
one PUT. Nothing here knows stages: see `rundir` for commits, leases and manifests.

Every read, listing and write of a remote file is tried several times here, whatever the file system below does for
itself: s3fs repeats a request that failed, but gives up on some errors of HTTP servers that pass by.

How the place of a URI is reached, with which options and credentials: `filesystems`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipgap_ray import filesystems
from clipgap_ray.errors import DataError, StorageError

T = TypeVar("T")

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")  # the name that atomic_file gives


def absolute(uri: str) -> str:
    """Return a URI that means the same in every directory: Ray Train's workers run in one of their own."""
    return os.path.abspath(uri) if "://" not in uri else uri


def join(uri: str, *names: str) -> str:
    """Join names to a URI with single slashes."""
    return "/".join([uri.rstrip("/") if uri != "/" else uri, *names])


def exists(uri: str) -> bool:
    """Tell whether a file or folder exists."""
    fs, path = filesystems.filesystem(uri)
    if filesystems.is_local(uri):
        return bool(fs.exists(path))
    try:
        # Not `exists` of s3fs, which takes a server's failure for an absent file.
        filesystems.patiently(uri, lambda: fs.info(path))
    except FileNotFoundError:
        return False
    return True


def size(uri: str) -> int:
    """Return the bytes of a file.

    Raises:
        DataError: If the file is missing.
    """
    fs, path = filesystems.filesystem(uri)
    try:
        return int(filesystems.patiently(uri, lambda: fs.size(path)))
    except FileNotFoundError:
        raise DataError(f"{uri} does not exist") from None


def remove(uri: str) -> None:
    """Remove a file; one that is gone already is no error."""
    fs, path = filesystems.filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        filesystems.patiently(uri, lambda: fs.rm_file(path))


def list_names(uri: str) -> list[str]:
    """Return the sorted base names in a folder; empty when the folder is missing."""
    fs, path = filesystems.filesystem(uri)
    try:
        entries = filesystems.patiently(uri, lambda: fs.ls(path, detail=False))
    except FileNotFoundError:
        return []
    return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries)


def read_bytes(uri: str, offset: int = 0, size: int | None = None) -> bytes:
    """Read a file, or `size` bytes of it from `offset`.

    Raises:
        DataError: If the file is missing.
    """
    fs, path = filesystems.filesystem(uri)
    start, end = (offset or None, None) if size is None else (offset, offset + size)

    def read() -> bytes:
        data = bytes(fs.cat_file(path, start=start, end=end))
        if size is not None and len(data) > size:  # a server that ignores ranges sends the whole file
            raise StorageError(f"{uri}: asked for {size} bytes from {offset}, received {len(data)}")
        return data

    try:
        return filesystems.patiently(uri, read)
    except FileNotFoundError:
        raise DataError(f"{uri} does not exist") from None


def fetch(uri: str, path: str) -> None:
    """Copy a remote file to a local path, in pieces; what an attempt that failed left there is overwritten.

    Raises:
        DataError: If the file is missing.
        StorageError: If the store does not answer, or the disk is full.
    """
    fs, inside = filesystems.filesystem(uri)
    with room(path):
        try:
            filesystems.patiently(uri, lambda: fs.get_file(inside, path))
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
    fs, path = filesystems.filesystem(uri)
    if not filesystems.is_local(uri):
        filesystems.patiently(uri, lambda: fs.pipe_file(path, data))
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
    fs, path = filesystems.filesystem(uri)
    if not filesystems.is_local(uri):
        with (
            room(f"{tempfile.gettempdir()} (for {uri})"),
            tempfile.NamedTemporaryFile(prefix="clipgap-upload-") as spool,
        ):
            yield spool
            spool.flush()
            filesystems.patiently(uri, lambda: fs.put_file(spool.name, path))
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
    if not filesystems.is_local(uri):
        return
    folder = Path(filesystems.filesystem(uri)[1])
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
    if not (filesystems.is_local(source) and filesystems.is_local(target)):
        return False
    path, other = Path(filesystems.filesystem(source)[1]), Path(filesystems.filesystem(target)[1])
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
    if filesystems.is_local(uri):
        path = filesystems.filesystem(uri)[1]
        if not os.path.exists(path):
            raise DataError(f"{uri} does not exist")
        return np.load(path, mmap_mode="r", allow_pickle=False)
    return np.load(io.BytesIO(read_bytes(uri)), allow_pickle=False)


def table_bytes(table: pa.Table, group_rows: int | None = None) -> bytes:
    """Return a table as the bytes of a parquet file; groups of so many rows can be read alone (`read_group`)."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=group_rows)
    return sink.getvalue().to_pybytes()


def write_table(uri: str, table: pa.Table) -> None:
    """Write a parquet file atomically."""
    write_bytes(uri, table_bytes(table))


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Read a parquet file, or some of its columns.

    Raises:
        DataError: If the file is missing, or not parquet with these columns.
    """
    return _from_parquet(uri, columns, lambda file: pq.read_table(file, columns=columns))


def version_of(uri: str) -> str:
    """Return a token of a file's present content: another one once it has been written anew.

    Raises:
        DataError: If it cannot be looked at.
    """

    def look() -> str:
        fs, inside = filesystems.filesystem(uri)
        fs.invalidate_cache(fs._parent(inside))
        return str(fs.ukey(inside))

    try:
        return filesystems.patiently(uri, look)
    except OSError as error:
        raise DataError(f"{uri} cannot be read: {error}") from None


def read_columns(uri: str) -> pa.Schema:
    """Return the columns of a parquet file with their types, reading only its footer.

    Raises:
        DataError: If the file is missing, or not parquet.
    """
    columns: pa.Schema = _from_parquet(uri, None, pq.read_schema)
    return columns


def group_starts(uri: str) -> list[int]:
    """Return the first row of every row group of a parquet file, reading only its footer.

    Raises:
        DataError: If the file is missing, or not parquet.
    """
    footer = _from_parquet(uri, None, pq.read_metadata)
    sizes = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
    return list(itertools.accumulate([0, *sizes[:-1]]))


def read_group(uri: str, group: int, columns: list[str]) -> pa.Table:
    """Read some columns of one row group of a parquet file.

    Raises:
        DataError: If the file is missing, or not parquet with these columns.
    """

    def read(file: IO[bytes]) -> pa.Table:
        return pq.ParquetFile(file, pre_buffer=True).read_row_group(group, columns)

    table = _from_parquet(uri, columns, read)
    if missing := set(columns) - set(table.column_names):  # pyarrow leaves them out without a word
        raise DataError(f"{uri} has no column {', '.join(sorted(missing))}; it has {', '.join(table.column_names)}")
    return table


def _from_parquet(uri: str, columns: list[str] | None, read: Callable[[IO[bytes]], T]) -> T:
    fs, path = filesystems.filesystem(uri)

    def opened() -> T:
        with fs.open(path, "rb") as file:
            return read(file)

    try:
        return filesystems.patiently(uri, opened)
    except FileNotFoundError:
        raise DataError(f"{uri} does not exist") from None
    except pa.ArrowInvalid as error:
        raise DataError(f"{uri} is not parquet with columns {columns}: {error}") from None


def num_table_rows(uri: str) -> int:
    """Return the rows of a parquet file, reading only its footer; 0 when it is none.

    Raises:
        DataError: If the file is missing.
    """
    fs, path = filesystems.filesystem(uri)

    def read() -> int:
        with fs.open(path, "rb") as file:
            return int(pq.read_metadata(file).num_rows)

    try:
        return filesystems.patiently(uri, read)
    except FileNotFoundError:
        raise DataError(f"{uri} does not exist") from None
    except pa.ArrowInvalid:
        return 0
