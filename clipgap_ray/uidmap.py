"""uid -> row id on disk: sorted records in files of about a million, found by bisection in memory-mapped pages.

    INDEX/uids/<digest>/00000.npy    (n,) RECORD, sorted by uid; the uids that begin with the bits 00000, and so on

A look-up opens the one file that the first bits of the uid name and touches some twenty of its pages: O(log n) time,
no memory that stays (of an object store the files used last are kept). The manifest of the index records the sha256 of
every file; each is checked before its first use. The folder is named by the content of the embeddings, so that a
service that runs keeps the map that it opened while a newer one is written.

Rejected: a database (one more format, one more lock), one file for all (an object store would be asked for all of it),
a map in memory (24 bytes per row in every gateway).
"""

from __future__ import annotations

import io
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import IO, Any, Self

import numpy as np

from clipgap_ray import filesystems, schema, store
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import DataError
from clipgap_ray.kernels import subsets

RECORD = np.dtype([("f0", "<u8"), ("f1", "<u8"), ("row_id", "<i8")])
FILE_ROWS = 1 << 20  # 24 MB: what an object store is asked for at a look-up
FETCHED = 4  # files of an object store that are kept: 96 MB
MAX_BITS = 9  # files that are open at a time while they are written


def write(
    uri: str, rows: EmbeddingSet, before: Mapping[str, Any] | None = None, file_rows: int = FILE_ROWS
) -> dict[str, Any]:
    """Write the map of a folder of embeddings beside an index.

    Memory: the uids of one part and the records of one file; disk: 24 bytes per row for a moment beside the map.

    Args:
        uri: The index.
        rows: What it was built from.
        before: The record of the map that is there; it is kept if the embeddings are the same, and until the next
            call if they are not: a service may be reading it.
        file_rows: About so many records per file.

    Returns:
        The record for the manifest: `folder`, `bits`, `rows` and the sha256 of every file.
    """
    folder = f"uids/{store.digest([[part.number, part.files.get('metadata')] for part in rows.parts])[:16]}"
    if before is not None and before["folder"] == folder:
        return dict(before)
    _remove_others(uri, keep=before["folder"] if before else "")
    bits = min(max(0, (max(rows.num_rows, 1) - 1) // file_rows).bit_length(), MAX_BITS)
    files, count = [], 0
    with ExitStack() as spools:
        spools.enter_context(store.room(f"{tempfile.gettempdir()} (for {uri})"))
        runs = [spools.enter_context(tempfile.TemporaryFile(prefix="clipgap-uids-")) for _ in range(1 << bits)]
        for part in rows.parts:
            _distribute(_records(rows, part.number), runs, bits)
        for number, run in enumerate(runs):
            records = _sorted(run)
            data = store.array_bytes(records)
            store.write_bytes(store.join(uri, folder, f"{number:05d}.npy"), data)
            files.append(store.sha256(data))
            count += len(records)
    return {"folder": folder, "bits": bits, "rows": count, "files": files}


def _records(rows: EmbeddingSet, part: int) -> np.ndarray:
    packed = schema.pack_uids(rows.metadata(part, ["uid"]).column("uid"))
    records = np.empty(len(packed), RECORD)
    records["f0"], records["f1"] = packed["f0"], packed["f1"]
    records["row_id"] = schema.row_ids(part, len(packed))
    return records


def _distribute(records: np.ndarray, runs: Sequence[IO[bytes]], bits: int) -> None:
    """Append records to the runs that their first bits name."""
    if not bits:
        runs[0].write(records.tobytes())
        return
    where = records["f0"] >> np.uint64(64 - bits)
    for number in np.unique(where):
        runs[int(number)].write(records[where == number].tobytes())


def _sorted(run: IO[bytes]) -> np.ndarray:
    """The records of a run by rising uid; of copies of a uid the first row stays."""
    run.seek(0)
    records = np.frombuffer(run.read(), RECORD)
    run.close()
    records = records[schema.sort_uids(records)]  # stable, and parts come in order
    new = (records["f0"][1:] != records["f0"][:-1]) | (records["f1"][1:] != records["f1"][:-1])
    return records[np.concatenate([[True], new])] if len(records) else records


def _remove_others(uri: str, keep: str) -> None:
    for name in store.list_names(store.join(uri, "uids")):
        if f"uids/{name}" != keep:
            for file in store.list_names(store.join(uri, "uids", name)):
                store.remove(store.join(uri, "uids", name, file))


class UidMap:
    """A map that `write` wrote; safe to use from several threads.

    Args:
        uri: The index.
        record: Of its manifest.
    """

    def __init__(self, uri: str, record: Mapping[str, Any]) -> None:
        self.uri = store.join(uri, record["folder"])
        self.bits: int = record["bits"]
        self.files: list[str] = record["files"]
        self._checked: set[int] = set()
        self._fetched: OrderedDict[int, np.ndarray] = OrderedDict()  # of object stores
        self._lock = threading.Lock()

    @classmethod
    def of_index(cls, uri: str, manifest: Mapping[str, Any]) -> Self | None:
        """Open the map of an index, or return None for an index that was built before there were maps."""
        return cls(uri, manifest["uid_map"]) if "uid_map" in manifest else None

    def row_id(self, uid: str) -> int | None:
        """Return the first row of a uid (32 hex characters), or None.

        Raises:
            DataError: If a file is missing or not what the manifest says.
        """
        high, low = (int(half, 16) for half in (uid[:16], uid[16:]))
        records = self._open(high >> (64 - self.bits))
        at = subsets.find_one(records, high, low)
        return None if at < 0 else int(records["row_id"][at])

    def _open(self, number: int) -> np.ndarray:
        path = store.join(self.uri, f"{number:05d}.npy")
        if filesystems.is_local(path):
            with self._lock:
                if number not in self._checked:
                    self._check(number, path, store.file_sha256(filesystems.filesystem(path)[1]))
                    self._checked.add(number)
            return store.read_array(path)  # mapped anew for every look-up: nothing stays in memory
        with self._lock:
            records = self._fetched.pop(number, None)
            if records is None:
                data = store.read_bytes(path)
                self._check(number, path, store.sha256(data))
                records = np.load(io.BytesIO(data), allow_pickle=False)
            self._fetched[number] = records
            if len(self._fetched) > FETCHED:
                self._fetched.popitem(last=False)
        return records

    def _check(self, number: int, path: str, found: str) -> None:
        if found != self.files[number]:
            raise DataError(
                f"{path} has sha256 {found[:12]}, the manifest says {self.files[number][:12]}",
                hint="delete `manifest.json` of the index and run `clipgap index` again",
            )
