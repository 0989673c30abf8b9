"""Read "which pool rows stay" from either of its two writers: a dedup output or a split."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from clipgap_ray import rundir, store
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import DataError


def read_keep(uri: str, pool: EmbeddingSet) -> dict[int, np.ndarray]:
    """Return a keep mask for every part of a pool.

    Args:
        uri: A dedup directory, its folder `keep-VALUE` of a further threshold, or a split's `.npy` (its bitmap
            `.rows.npz` lies beside it).
        pool: The pool it was made from.

    Returns:
        {part: (num_rows,) bool}, True = stays; parts that a split does not know keep nothing.

    Raises:
        DataError: If it was made from another pool, or does not exist.
    """
    if uri.endswith(".npy"):
        return read_split(uri, pool)
    uri, folder = _keep_folder(uri)
    manifest = rundir.read_manifest(uri, "dedup")
    if manifest["pool"]["digest"] != pool.digest:
        raise DataError(f"{uri} was made from another pool than {pool.uri}", hint="run `clipgap dedup` on this pool")
    return {
        part.number: store.read_table(keep_path(uri, part.number, folder), ["keep"]).column("keep").to_numpy(False)
        for part in pool.parts
    }


def _keep_folder(uri: str) -> tuple[str, str]:
    """Split DIR/keep or DIR/keep-VALUE into directory and folder; a dedup directory itself means its `keep`."""
    directory, _, name = uri.rstrip("/").rpartition("/")
    inside = name == "keep" or name.startswith("keep-")
    if inside and directory and not store.exists(store.join(uri, "manifest.json")):
        return directory, name
    return uri, "keep"


def keep_path(uri: str, part: int, folder: str = "keep") -> str:
    """Return the path of a part's keep table in a dedup directory; `folder` is keep or keep-VALUE."""
    return store.join(uri, folder, f"part-{part:05d}.parquet")


def bitmap_path(split: str) -> str:
    """Return the path of a split's native form, a bitmap over the rows of every part."""
    return split.removesuffix(".npy") + ".rows.npz"


def bitmap_bytes(keep: dict[int, np.ndarray]) -> bytes:
    """Pack {part: (rows,) bool} into an .npz of one packed bitmap per part: 50 MB at 400 million rows."""
    arrays: dict[str, Any] = {f"part_{part:05d}": np.packbits(mask) for part, mask in sorted(keep.items())}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def read_split(uri: str, pool: EmbeddingSet) -> dict[int, np.ndarray]:
    """Return a split as {part: (num_rows,) bool} over the parts of a pool.

    Raises:
        DataError: If the split does not exist or was cut from another pool.
    """
    recipe = store.read_json(uri.removesuffix(".npy") + ".recipe.json")
    if recipe["inputs"]["pool"]["digest"] != pool.digest:
        raise DataError(
            f"split {uri} was cut from another pool than {pool.uri}: coverage 0 %",
            hint=f"it belongs to {recipe['inputs']['pool']['uri']}",
        )
    keep = {}
    with np.load(io.BytesIO(store.read_bytes(bitmap_path(uri))), allow_pickle=False) as arrays:
        for part in pool.parts:
            packed = arrays.get(f"part_{part.number:05d}")
            bits = np.zeros(part.num_rows, np.uint8) if packed is None else np.unpackbits(packed)[: part.num_rows]
            keep[part.number] = bits.astype(bool)
    return keep
