"""What an index is beside its shards: its manifest, complete or growing, and the rows that are not to be found."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from clipgap_ray import blocklist, rundir, schema, store
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import DataError

EXCLUDED, GROWING = "excluded.npy", "growing.json"


def read_index(uri: str) -> dict[str, Any]:
    """Read the manifest of an index that is complete, or that `clipgap index --follow` has published as it grows.

    Raises:
        DataError: If there is neither.
    """
    path = store.join(uri, GROWING)
    if store.exists(path):  # of rows added to a complete index, too
        with contextlib.suppress(DataError):  # it was the last moment of it
            growing: dict[str, Any] = store.read_json(path)
            if growing["after"] == _complete_version(uri):
                return growing  # else it has become complete since, and its builder died before it said so
    return rundir.read_manifest(uri, "index")


def _complete_version(uri: str) -> str:
    path = store.join(uri, "manifest.json")
    return str(store.read_json(path)["index_version"]) if store.exists(path) else ""


def rows_of(manifest: Mapping[str, Any]) -> EmbeddingSet:
    """Open the embeddings that an index was built from, as far as they are committed.

    Raises:
        DataError: If they are gone.
    """
    uri = manifest["embeddings"]["uri"]
    return EmbeddingSet.open(uri) if manifest.get("complete", True) else EmbeddingSet.open_growing(uri)[0]


def publish_growing(uri: str, manifest: dict[str, Any]) -> None:
    """Let others open an index that is not complete: its shards are saved as the manifest says, or further."""
    after = _complete_version(uri)  # which version it grows from
    store.write_json(store.join(uri, GROWING), {"stage": "index", "complete": False, "after": after, **manifest})


def close_growing(uri: str) -> None:
    """Take back what `publish_growing` wrote: the index is complete."""
    store.remove(store.join(uri, GROWING))


def write_excluded(uri: str, row_ids: np.ndarray) -> None:
    """Remember rows that no search of this index may find; shards opened from now on honour it.

    Args:
        uri: The index.
        row_ids: (n,) int64, the whole blocklist; an empty one lifts it.
    """
    path = store.join(uri, EXCLUDED)
    if len(row_ids):
        store.write_bytes(path, store.array_bytes(np.unique(np.asarray(row_ids, np.int64))))
        return
    store.remove(path)


def hide_rows(uri: str, listed: str) -> int:
    """Write the tombstones of a complete index: the rows of its embeddings that are on a takedown list.

    The index becomes another version of itself, which `clipgap swap` puts in place in a running service. The list
    takes the place of the one before; an empty one shows all rows again.

    Args:
        uri: The index.
        listed: uids, sha256 or urls, see `blocklist`.

    Returns:
        Rows hidden.

    Raises:
        DataError: If the index is not complete, or its embeddings are gone.
    """
    manifest = rundir.read_manifest(uri, "index")
    blocked, found = blocklist.read(listed), [np.zeros(0, np.int64)]
    rows = rows_of(manifest)
    for part in rows.parts:
        table = rows.metadata(part.number, ["uid", "sha256", "url"]).to_pylist()
        hit = [bool(blocked.reason(row["uid"], row["sha256"] or "", row["url"])) for row in table]
        found.append(schema.row_ids(part.number, part.num_rows)[np.array(hit, bool)])
    row_ids = np.concatenate(found)
    write_excluded(uri, row_ids)
    built = manifest.get("built_version", manifest["index_version"])
    store.write_json(store.join(uri, "manifest.json"), {**manifest, **versions_of(uri, built)})
    return len(row_ids)


def versions_of(uri: str, built: str) -> dict[str, str]:
    """Return the manifest's names of an index: of what was built, and of what can be found in it."""
    path = store.join(uri, EXCLUDED)
    shown = store.digest([built, store.sha256(store.read_bytes(path))])[:16] if store.exists(path) else built
    return {"built_version": built, "index_version": shown}
