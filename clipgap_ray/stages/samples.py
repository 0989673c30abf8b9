"""Index a source for training: where every readable sample lies, its uid, caption and label. No pixels.

Training reads images by byte range through this index, so that a virtual split costs no copy and a resume no
replay. One part per shard; the index of a pool is shared by all runs on its splits.

Writes: DIR/samples/part-00000.parquet. Unit of restart: the shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from clipgap_ray import rundir, schema, store, testsets
from clipgap_ray.errors import ConfigError
from clipgap_ray.kernels import subsets
from clipgap_ray.shards import Sample, Skip, read_shard
from clipgap_ray.sources import Shard, list_shards
from clipgap_ray.stages.progress import Progress
from clipgap_ray.stages.session import connect
from clipgap_ray.stages.waits import bounded

SAMPLES = pa.schema(
    [
        ("uid", pa.string()),
        ("uri", pa.string()),  # the tar, or the image file itself
        ("offset", pa.int64()),  # -1: the whole file is the image
        ("num_bytes", pa.int64()),
        ("caption", pa.string()),
        ("label", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Source:
    """An indexed source: its directory, parts in order, class names (empty for pools)."""

    uri: str
    parts: tuple[int, ...]
    digest: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]

    def table_uri(self, part: int) -> str:
        """Return where `SAMPLES` of a part lie."""
        return store.join(self.uri, "samples", f"part-{part:05d}.parquet")


def index(source: str, out: str) -> Source:
    """Index a source into a directory, or open the index that is there.

    A complete index is only read: trainings that start at the same time may share it.
    """
    test_set = testsets.open_test_set(source) if testsets.is_test_set(source) else None
    shards = list(test_set.shards) if test_set else list_shards(source)
    names, templates = (test_set.class_names, test_set.templates) if test_set else ((), ())
    there = _complete(source, out, shards)
    if there is not None:
        return Source(store.absolute(out), *there, names, templates)
    with rundir.RunDirectory(out, "samples", {"source": source}) as directory:
        parts = rundir.assign_parts(directory.uri, [shard.name for shard in shards])
        todo = [shard for shard in shards if parts[shard.name] not in directory.log.records]
        if todo:
            connect()
            task = ray.remote(num_cpus=1)(_index_shard)
            progress = Progress("samples", len(shards), "shards", done=len(shards) - len(todo))
            for record in bounded(lambda s: task.remote(directory.uri, parts[s.name], s, test_set), todo):
                directory.log.append([record])
                progress.advance(rows=record["kept"])
            progress.close()
        directory.finish({"source": source, "kind": "test set" if test_set else "pool"})
        manifest = store.read_json(directory.path("manifest.json"))
    return Source(store.absolute(out), tuple(parts.values()), manifest["digest"], names, templates)


def _complete(source: str, out: str, shards: list[Shard]) -> tuple[tuple[int, ...], str] | None:
    """Parts and digest of a finished index of just these shards; None where something is left to do or to refuse."""
    if not store.exists(store.join(out, "manifest.json")):
        return None
    manifest = store.read_json(store.join(out, "manifest.json"))
    known = store.read_json(store.join(out, "parts.json"))
    done = rundir.CommitLog(out).records
    parts = tuple(known.get(shard.name, -1) for shard in shards)
    if manifest["source"] != source or set(parts) != set(done):
        return None
    return parts, manifest["digest"]


def _index_shard(uri: str, part: int, shard: Shard, test_set: testsets.TestSet | None) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    dropped: dict[str, int] = {}
    place = store.absolute(shard.uri)
    # Of a tar the headers and captions are enough: an index of a pool reads a small part of its bytes.
    for item in test_set.read(shard) if test_set else read_shard(shard, images=shard.kind != "tar"):
        if isinstance(item, Skip):
            if item.is_sample:
                dropped[item.reason] = dropped.get(item.reason, 0) + 1
            continue
        if shard.kind == "parquet":
            raise ConfigError(
                f"{shard.uri} is parquet: training reads images by byte range, from tars or image files",
                hint="train on the tars that it was made from",
            )
        in_tar = item.offset >= 0
        rows.append(
            {
                "uid": item.uid,
                "uri": place if in_tar else store.join(place, item.key.rsplit("/", 1)[-1]),
                "offset": item.offset,
                "num_bytes": _image_bytes(item),
                "caption": item.caption,
                "label": item.label,
            }
        )
    data = store.table_bytes(pa.Table.from_pylist(rows, schema=SAMPLES))
    store.write_bytes(store.join(uri, "samples", f"part-{part:05d}.parquet"), data)
    read = len(rows) + sum(dropped.values())
    files = {"samples": store.sha256(data)}
    return {"part": part, "read": read, "kept": len(rows), "dropped": dropped, "files": files}


def _image_bytes(sample: Sample) -> int:
    """Bytes of the encoded image: as its tar says, or as they were read."""
    return next((m.size for m in sample.members if m.offset == sample.offset >= 0), len(sample.image))


def in_split(table: pa.Table, split: np.ndarray | None) -> np.ndarray:
    """Return the (n,) bool mask of samples whose uid is in a sorted (m,) `schema.UID` subset; None keeps all."""
    if split is None:
        return np.ones(table.num_rows, bool)
    return subsets.contains(split, schema.pack_uids(table.column("uid")))
