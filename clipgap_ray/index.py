"""An index over embeddings: shards of FAISS that know no Ray, their ids, and their manifests.

    INDEX/manifest.json                 encoder, key, recall, source, counts (stage "index")
    INDEX/growing.json                  the same as far as it is saved, while `--follow` is at work
    INDEX/uids/                         uid -> row id (`uidmap`)
    INDEX/excluded.npy                  row ids that are not to be found (blocklist), sorted; optional
    INDEX/shard_00000/index.faiss       the FAISS index; ids are positions
    INDEX/shard_00000/row_ids.npy       (n,) int64 row id of every position
    INDEX/shard_00000/manifest.json     parts held, sha256 of the two files

An `IndexShard` is held by a Ray actor (jobs), by a Serve deployment (the service), or by `LocalIndex` in the
process; all answer the same contract: `search(queries (nq, d), k) -> similarities (nq, k) float32 descending,
row_ids (nq, k) int64`, missing = -inf and -1, ties by smaller row id.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import faiss
import numpy as np

from clipgap_ray import filesystems, store
from clipgap_ray.download import local_copy
from clipgap_ray.errors import DataError, IndexMismatchError
from clipgap_ray.index_manifest import EXCLUDED, read_index
from clipgap_ray.kernels import faiss_index
from clipgap_ray.kernels.topk import merge_topk
from clipgap_ray.kernels.vectors import to_storage


@dataclass(frozen=True)
class Answer:
    """A search result with its completeness.

    Attributes:
        similarities: (nq, k) float32, descending; -inf where missing.
        row_ids: (nq, k) int64; -1 where missing.
        shards_ok: Index shards that answered.
        shards: Index shards there are.
    """

    similarities: np.ndarray
    row_ids: np.ndarray
    shards_ok: int
    shards: int

    @property
    def degraded(self) -> bool:
        """True when a shard did not answer, so that neighbours may be missing."""
        return self.shards_ok < self.shards


def shard_uri(uri: str, number: int) -> str:
    """Return the folder of an index shard."""
    return store.join(uri, f"shard_{number:05d}")


class IndexShard:
    """A FAISS index, its row ids and the parts it holds. Knows no Ray and no settings.

    Attributes:
        number: Which shard of the whole this is.
        parts: Part number -> rows added from it.
        nprobe: Cells to visit (IVF); 0 = the index's own.
    """

    def __init__(self, index: faiss.Index, number: int = 0, nprobe: int = 0) -> None:
        self.index = index
        self.number = number
        self.nprobe = nprobe
        self.parts: dict[int, int] = {}
        self._row_ids = [np.zeros(0, np.int64)]  # one array per added part until somebody searches or saves
        self._excluded = np.zeros(0, np.int64)
        self._keep: np.ndarray | None = None

    @property
    def dim(self) -> int:
        """Dimension d."""
        return int(self.index.d)

    @property
    def num_rows(self) -> int:
        """Rows held, excluded ones included."""
        return int(self.index.ntotal)

    def add(self, rows: np.ndarray, row_ids: np.ndarray, part: int) -> bool:
        """Add the rows of a part, once.

        Args:
            rows: (n, d), rounded to float16 here; n may be 0.
            row_ids: (n,) int64.
            part: Part number; a part that is held already is not added again.

        Returns:
            False when the part was held already.

        Raises:
            IndexMismatchError: If d differs.
        """
        if part in self.parts:
            return False
        if rows.shape[1:] != (self.dim,) or len(rows) != len(row_ids):
            raise IndexMismatchError(
                f"part {part} is {rows.shape} with {len(row_ids)} row ids, index shard {self.number} has dim {self.dim}"
            )
        faiss_index.add(self.index, rows)
        self._row_ids.append(np.asarray(row_ids, np.int64))
        self.parts[part] = len(rows)
        return True

    @property
    def row_ids(self) -> np.ndarray:
        """(n,) int64 row id of every position."""
        if len(self._row_ids) > 1:
            self._row_ids = [np.concatenate(self._row_ids)]
            self._mark_excluded()
        return self._row_ids[0]

    @property
    def keep(self) -> np.ndarray | None:
        """(n,) bool over positions: rows that a search may find; None: all of them."""
        _ = self.row_ids  # brings the mask up to date
        return self._keep

    def places_of(self, row_ids: np.ndarray | None) -> np.ndarray | None:
        """Return the (n,) bool mask over positions of some row ids, for `search`; None stays None."""
        return None if row_ids is None else np.isin(self.row_ids, row_ids)

    def exclude(self, row_ids: np.ndarray) -> None:
        """Hide rows from every later search (tombstones); replaces the rows hidden before. Rows stay stored.

        Args:
            row_ids: (n,) int64; ids that are not here are ignored.
        """
        self._excluded = np.unique(np.asarray(row_ids, np.int64))
        self._mark_excluded()

    def _mark_excluded(self) -> None:
        hidden = np.isin(self.row_ids, self._excluded) if len(self._excluded) else np.zeros(0, bool)
        self._keep = ~hidden if hidden.any() else None

    def search(
        self, queries: np.ndarray, k: int, nprobe: int | None = None, keep: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Search this shard.

        Args:
            queries: (nq, d) finite rows, unit norm if similarities are to be cosines.
            k: Neighbours, k >= 1.
            nprobe: Instead of the shard's own.
            keep: (n,) bool over positions: only these rows are looked at; None: all.

        Returns:
            (nq, k) float32 similarities and (nq, k) int64 row ids, as the module says.

        Raises:
            IndexMismatchError: If d differs.
            DataError: If a query is not finite in float16.
        """
        queries = check_queries(queries, self.dim)
        probe = self.nprobe if nprobe is None else nprobe
        row_ids = self.row_ids  # first: it brings `_keep` up to date
        if keep is not None and self._keep is not None:
            keep = keep & self._keep
        return faiss_index.search(self.index, row_ids, queries, k, probe, self._keep if keep is None else keep)

    def save(self, uri: str) -> dict[str, Any]:
        """Write the shard's folder, whole or not at all, over an older state of it.

        Locally a new folder takes the old one's place; a crash between the two renames leaves the old one under
        `<folder>.old`, where `load` finds it. On object stores the manifest goes last, and a crash before it shows
        as a wrong sha256, never as a wrong answer.

        Returns:
            The manifest.

        Raises:
            StorageError: If the disk is full; the older state stays as it was.
        """
        manifest: dict[str, Any] = {
            "number": self.number,
            "rows": self.num_rows,
            "dim": self.dim,
            "parts": {str(part): rows for part, rows in sorted(self.parts.items())},
        }
        row_ids = store.array_bytes(self.row_ids)
        if not filesystems.is_local(uri):
            data = faiss_index.to_bytes(self.index)
            manifest["files"] = {"index.faiss": store.sha256(data), "row_ids.npy": store.sha256(row_ids)}
            store.write_bytes(store.join(uri, "index.faiss"), data)
            store.write_bytes(store.join(uri, "row_ids.npy"), row_ids)
            store.write_json(store.join(uri, "manifest.json"), manifest)
            return manifest
        folder = filesystems.filesystem(uri)[1]
        temporary = f"{folder}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with store.room(folder):
                os.makedirs(temporary)
                faiss_index.write(self.index, os.path.join(temporary, "index.faiss"))
            store.write_bytes(os.path.join(temporary, "row_ids.npy"), row_ids)
            manifest["files"] = {
                name: store.file_sha256(os.path.join(temporary, name)) for name in os.listdir(temporary)
            }
            store.write_json(os.path.join(temporary, "manifest.json"), manifest)
            _replace_folder(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return manifest

    @classmethod
    def load(cls, uri: str, mmap: bool = True, nprobe: int = 0, expected: dict[str, str] | None = None) -> Self:
        """Open a saved shard; the files' sha256 is checked before FAISS parses them.

        Args:
            uri: The shard's folder.
            mmap: Map the index into memory instead of reading it (Flat and IVF); of an object store a copy on this
                machine is mapped (`download`), which is made once.
            nprobe: See the class.
            expected: sha256 of its files in the index's manifest; None: any state of the shard will do.

        Raises:
            DataError: If a file is missing or not what the manifest says, or it is another state of the shard.
        """
        if not store.exists(store.join(uri, "manifest.json")) and store.exists(uri + ".old/manifest.json"):
            uri = uri + ".old"
        manifest = store.read_json(store.join(uri, "manifest.json"))
        if expected is not None and manifest["files"] != expected:
            raise DataError(
                f"{uri} is not the shard that the index's manifest names: rows are being added to it",
                hint="run `clipgap index` again to its end, then `clipgap swap` in a running service",
            )
        path, ids = store.join(uri, "index.faiss"), store.join(uri, "row_ids.npy")
        if filesystems.is_local(uri):
            path, ids = filesystems.filesystem(path)[1], filesystems.filesystem(ids)[1]
            found = {"index.faiss": store.file_sha256(path), "row_ids.npy": store.file_sha256(ids)}
            _check_files(uri, manifest["files"], found)
            index = faiss_index.read(path, mmap)
        elif mmap:  # a copy of this machine, checked
            path, ids = (local_copy(file, manifest["files"][file.rpartition("/")[2]]) for file in (path, ids))
            index = faiss_index.read(path)
        else:
            data = store.read_bytes(path)
            found = {"index.faiss": store.sha256(data), "row_ids.npy": store.sha256(store.read_bytes(ids))}
            _check_files(uri, manifest["files"], found)
            index = faiss_index.from_bytes(data)
        shard = cls(index, manifest["number"], nprobe)
        shard._row_ids = [store.read_array(ids)]
        shard.parts = {int(part): rows for part, rows in manifest["parts"].items()}
        return shard


def _check_files(uri: str, expected: dict[str, str], found: dict[str, str]) -> None:
    for name, digest in expected.items():
        if found.get(name) != digest:
            raise DataError(
                f"{uri}/{name} has sha256 {found.get(name, 'none')[:12]}, its manifest says {digest[:12]}",
                hint="delete that shard's folder and run `clipgap index` again",
            )


def _replace_folder(new: str, folder: str) -> None:
    old = folder + ".old"
    if os.path.exists(folder):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def check_queries(queries: np.ndarray, dim: int) -> np.ndarray:
    """Return queries rounded to storage precision, (nq, d) float16.

    Raises:
        IndexMismatchError: If they are not (nq, dim).
        DataError: If a value is NaN, infinite, or too large for float16.
    """
    queries = np.asarray(queries)
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise IndexMismatchError(f"queries of shape {queries.shape} do not match index dim {dim}: expected (nq, {dim})")
    with np.errstate(over="ignore"):  # what overflows is refused below
        stored = to_storage(queries)
    if not np.isfinite(stored).all():
        raise DataError("a query holds NaN, infinity, or a value too large for float16: expected unit rows")
    return stored


class LocalIndex:
    """All shards in this process."""

    def __init__(self, shards: Sequence[IndexShard], manifest: dict[str, Any] | None = None) -> None:
        self.shards = list(shards)
        self.manifest = manifest or {}

    @classmethod
    def open(cls, uri: str, mmap: bool = True) -> Self:
        """Open an index, complete or growing.

        Raises:
            DataError: If it is missing, incomplete or damaged.
        """
        manifest = read_index(uri)
        return cls([open_shard(uri, number, manifest, mmap) for number in range(manifest["num_shards"])], manifest)

    @property
    def num_rows(self) -> int:
        """Rows in all shards."""
        return sum(shard.num_rows for shard in self.shards)

    @property
    def dim(self) -> int:
        """Dimension d."""
        return self.shards[0].dim

    def exclude(self, row_ids: np.ndarray) -> None:
        """Hide rows, see `IndexShard.exclude`."""
        for shard in self.shards:
            shard.exclude(row_ids)

    def search(self, queries: np.ndarray, k: int, among: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Search every shard and merge once; the contract of the module.

        Args:
            queries: (nq, d).
            k: Neighbours.
            among: (m,) int64 row ids: only these are looked at; None: all.
        """
        return merge_topk([shard.search(queries, k, keep=shard.places_of(among)) for shard in self.shards], k)

    def answer(self, queries: np.ndarray, k: int, among: np.ndarray | None = None) -> Answer:
        """Search with the completeness of the answer: always complete here."""
        return Answer(*self.search(queries, k, among), len(self.shards), len(self.shards))


def open_shard(uri: str, number: int, manifest: dict[str, Any], mmap: bool = True) -> IndexShard:
    """Open one shard of an index with the manifest's nprobe and the index's excluded rows.

    Raises:
        DataError: If it is damaged, or (of a complete index) not the shard that the manifest names: rows are being
            added, and an answer must not have some of them.
    """
    named = {shard["number"]: shard.get("files") for shard in manifest.get("shards", ())}
    expected = named.get(number) if manifest.get("complete", True) else None
    shard = IndexShard.load(shard_uri(uri, number), mmap, manifest.get("nprobe", 0), expected)
    excluded = store.join(uri, EXCLUDED)
    if store.exists(excluded):
        shard.exclude(store.read_array(excluded))
    return shard
