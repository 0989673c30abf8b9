"""A sharded index to one FAISS file for clip-retrieval, autofaiss and whoever else reads one.

    OUT/image.index                       (text.index for an index of captions) positions 0 to n - 1
    OUT/metadata/metadata_00000.parquet   row after row over all files, sorted by name, is position after position
    OUT/manifest.json                     where it comes from, sha256 of every file, written last

Those tools know a row by its position in the concatenated metadata, so rows lie in the order of their row ids: part
after part, as in the embeddings. Rows that the index hides (takedowns), and of an index of captions the rows without
one, are in neither.

Reads: `clipgap_ray.index` layout, every file checked against its sha256, and the embeddings' metadata. Unit of restart:
the whole; each file appears at once. Memory: the merged index; run it where that fits. On failure: run it again.
"""

from __future__ import annotations

import time
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from clipgap_ray import rundir, schema, store
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import DataError, StaleOutputError
from clipgap_ray.index import IndexShard, open_shard
from clipgap_ray.kernels import faiss_index
from clipgap_ray.kernels.faiss_merge import LEFT_OUT, merge
from clipgap_ray.stages.progress import logger
from clipgap_ray.stages.sharded import read_empty


def merge_index(uri: str, out: str) -> dict[str, Any]:
    """Write a complete index as one FAISS file with its metadata.

    Args:
        uri: The index.
        out: Folder for the files; what an earlier merge left there is replaced.

    Returns:
        The manifest.

    Raises:
        DataError: If the index is incomplete or damaged, or its metadata does not fit it.
        ConfigError: If indexes of its kind cannot be merged.
        StaleOutputError: If the folder holds something else.
    """
    manifest = rundir.read_manifest(uri, "index")
    _check_out(out)
    started = time.monotonic()
    shards = [open_shard(uri, number, manifest) for number in range(manifest["num_shards"])]
    source = {"index": uri, "index_version": manifest["index_version"], "hidden": _hidden_digest(uri)}
    path = store.join(out, "manifest.json")
    if store.exists(path) and (before := store.read_json(path))["source"] == source:
        logger.info("index: %s holds this version already", out)
        return dict(before)
    row_ids = np.sort(np.concatenate([shard.row_ids[_shown(shard)] for shard in shards]))
    if not len(row_ids):
        raise DataError(f"{uri} shows no row: there is nothing to merge")
    targets = [_targets(shard, row_ids) for shard in shards]
    merged = merge(faiss_index.from_bytes(read_empty(uri)), [shard.index for shard in shards], targets)
    ivf = faiss.try_extract_index_ivf(merged)
    if ivf is not None and manifest.get("nprobe"):
        ivf.nprobe = manifest["nprobe"]  # it travels in the file
    files = _write_metadata(out, EmbeddingSet.open(manifest["embeddings"]["uri"]), row_ids)
    name = f"{manifest['modality']}.index"
    with store.atomic_file(store.join(out, name)) as file:
        faiss_index.write(merged, file.name)
        file.seek(0)
        files[name] = store.file_sha256(file.name)
    written = {
        "stage": "merged index", "rows": len(row_ids), "dim": manifest["dim"], "modality": manifest["modality"],
        "key": manifest["key"], "nprobe": manifest.get("nprobe", 0), "recall_at_10": manifest.get("recall_at_10"),
        "encoder": manifest["encoder"], "source": source, "files": files,
    }  # fmt: skip
    store.write_json(path, written)
    logger.info("index: %d rows of %d shards in %s/%s, %.0f s", len(row_ids), len(shards), out, name,
                time.monotonic() - started)  # fmt: skip
    return written


def _check_out(out: str) -> None:
    path = store.join(out, "manifest.json")
    if store.exists(path) and store.read_json(path).get("stage") != "merged index":
        raise StaleOutputError(f"{out} holds the output of another stage", hint="choose another folder for --merge")


def _hidden_digest(uri: str) -> str:
    path = store.join(uri, "excluded.npy")
    return store.sha256(store.read_bytes(path)) if store.exists(path) else ""


def _shown(shard: IndexShard) -> np.ndarray:
    """(n,) bool: rows that a search may find."""
    return np.ones(shard.num_rows, bool) if shard.keep is None else shard.keep


def _targets(shard: IndexShard, row_ids: np.ndarray) -> np.ndarray:
    """(n,) int64 place of every row of a shard among sorted row ids."""
    return np.where(_shown(shard), np.searchsorted(row_ids, shard.row_ids), LEFT_OUT)


def _write_metadata(out: str, rows: EmbeddingSet, row_ids: np.ndarray) -> dict[str, str]:
    """Write the rows' metadata in their order, a file per part that has any; return the files' sha256.

    Raises:
        DataError: If a row id is not in the embeddings, or stands in the wrong place there.
    """
    parts, positions = schema.split_row_ids(row_ids)
    known = {part.number: part.num_rows for part in rows.parts}
    files = {}
    for part in np.unique(parts).tolist():
        taken = positions[parts == part]
        if taken[-1] >= known.get(part, 0):
            raise DataError(
                f"the index holds row {taken[-1]} of part {part}, {rows.uri} has {known.get(part, 0)} rows of it",
                hint="the embeddings are not those that the index was built from",
            )
        table = rows.metadata(part).take(pa.array(taken))
        if table.column("row_id").to_pylist() != row_ids[parts == part].tolist():
            raise DataError(f"{rows.uri}: the row ids of part {part} are not in order")
        name = f"metadata/metadata_{part:05d}.parquet"
        data = store.table_bytes(table)
        store.write_bytes(store.join(out, name), data)
        files[name] = store.sha256(data)
    _remove_others(out, files)
    return files


def _remove_others(out: str, files: dict[str, str]) -> None:
    """A part that has gone would shift every row behind it."""
    for name in store.list_names(store.join(out, "metadata")):
        if f"metadata/{name}" not in files and name.endswith(".parquet"):
            store.remove(store.join(out, "metadata", name))
