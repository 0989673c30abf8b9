"""Bytes, JSON, arrays and tables at any fsspec URI; a file is whole or absent.

Locally a write is a temporary file, fsync and rename; object stores make a PUT visible at once, so there it is
one PUT. Nothing here knows stages: see `rundir` for commits, leases and manifests.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipgap_ray.errors import DataError


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a URI and the path inside it; a plain path is local."""
    fs, path = fsspec.core.url_to_fs(uri)
    return fs, path


def is_local(uri: str) -> bool:
    """Tell whether a URI is on this machine's file system."""
    return "://" not in uri or uri.startswith(("file://", "local://"))


def join(uri: str, *names: str) -> str:
    """Join names to a URI with single slashes."""
    return "/".join([uri.rstrip("/") if uri != "/" else uri, *names])


def exists(uri: str) -> bool:
    """Tell whether a file or folder exists."""
    fs, path = filesystem(uri)
    return bool(fs.exists(path))


def list_names(uri: str) -> list[str]:
    """Return the sorted base names in a folder; empty when the folder is missing."""
    fs, path = filesystem(uri)
    try:
        entries = fs.ls(path, detail=False, refresh=True) if not is_local(uri) else fs.ls(path, detail=False)
    except FileNotFoundError:
        return []
    return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries)


def read_bytes(uri: str, offset: int = 0, size: int | None = None) -> bytes:
    """Read a file, or `size` bytes of it from `offset`.

    Raises:
        DataError: If the file is missing.
    """
    fs, path = filesystem(uri)
    try:
        data = fs.cat_file(path, start=offset or None, end=None if size is None else offset + size)
    except FileNotFoundError:
        raise DataError(f"{uri} does not exist") from None
    return bytes(data)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file so that it is whole or absent: temporary + rename locally, one PUT on object stores."""
    fs, path = filesystem(uri)
    if not is_local(uri):
        fs.pipe_file(path, data)
        return
    with atomic_file(uri) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_file(uri: str) -> Iterator[IO[bytes]]:
    """Open a file too large for memory for writing; it appears whole when the block ends, not at all if it raises.

    Yields:
        A binary, seekable local file: the temporary beside a local target, or a spool that is uploaded at the end.
    """
    fs, path = filesystem(uri)
    if not is_local(uri):
        with tempfile.NamedTemporaryFile(prefix="clipgap-upload-") as spool:
            yield spool
            spool.flush()
            fs.put_file(spool.name, path)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


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
    try:
        with fs.open(path, "rb") as file:
            return pq.read_table(file, columns=columns)
    except FileNotFoundError:
        raise DataError(f"{uri} does not exist") from None
    except pa.ArrowInvalid as error:
        raise DataError(f"{uri} is not parquet with columns {columns}: {error}") from None
