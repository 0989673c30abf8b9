"""Bring ready embeddings into the layout without images or a GPU: LAION's published rows become a scored pool.

Three layouts: clip-retrieval's folder (img_emb/*.npy, text_emb/*.npy, metadata/*.parquet, any zero padding),
DataComp's (NAME.npz beside NAME.parquet), and parquet files with a vector column. Rows are checked for shape,
finiteness and norm; rows that are not unit are normalised, and the summary says how many. A file of rows that is
already what we would write (float16, unit, contiguous; on the same disk) is linked, not copied: do not overwrite it.

Unit of restart: the file. Everything runs in the driver: the work is reading.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from clipgap_ray import embeddings, filesystems, rundir, schema, store
from clipgap_ray.config.embed import ImportSettings
from clipgap_ray.encoder_names import resolve_names
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.kernels.vectors import normalise
from clipgap_ray.shards import CAPTION_FIELDS, URL_FIELDS, sample_uid
from clipgap_ray.sources import Shard
from clipgap_ray.stages.progress import Progress

NORM_TOLERANCE = 1e-2  # float16 rows of unit norm are within 1e-3


@dataclass(frozen=True)
class _File:
    """One part of the source: where its rows, texts and metadata lie."""

    name: str
    images: str
    texts: str
    metadata: str


def run(settings: ImportSettings) -> rundir.Summary:
    """Import a folder of embeddings.

    Raises:
        ConfigError: If the folder has none of the layouts.
        DataError: If rows and metadata of a file do not align, or dims differ between files.
    """
    filesystems.configure(settings.storage.options())
    files = list(_files(settings.folder, settings.embedding_column))
    if not files:
        raise ConfigError(
            f"{settings.folder} holds no embeddings: expected img_emb/*.npy with metadata/*.parquet, *.npz with "
            f"*.parquet, or *.parquet with a column {settings.embedding_column!r}",
            hint="name the vector column with --embedding-column",
        )
    first, first_texts = _load(files[0], settings)
    if first.ndim != 2:
        raise DataError(f"{files[0].images}: an array of shape {first.shape}, expected rows of vectors")
    dim, text = first.shape[1], first_texts is not None
    fingerprint = _fingerprint(settings, dim)
    guarded = {"folder": settings.folder, "encoder": embeddings.identity(fingerprint)}
    with rundir.RunDirectory(settings.out, "embed", guarded) as directory:
        parts = rundir.assign_parts(directory.uri, [file.name for file in files])
        store.write_json(directory.path("encoder.json"), fingerprint)
        progress = Progress("import", len(files), "files", done=len(directory.log.records))
        for file in files:
            if parts[file.name] not in directory.log.records:
                record = _import(directory.uri, file, parts[file.name], dim, text, settings)
                directory.log.append([record])
                progress.advance(rows=record["rows"])
        progress.close()
        return directory.finish(
            {
                "encoder": fingerprint,
                "source": settings.folder,
                "shards": {},
                "kind": "pool",
                "class_names": [],
                "templates": [],
                "text": text,
                "partial": {"shards": None, "sample": 1.0},
            }
        )


def _fingerprint(settings: ImportSettings, dim: int) -> dict[str, Any]:
    """The encoder as the user names it: there are no weights to hash."""
    model, pretrained = resolve_names(settings.model, settings.pretrained)
    return {
        "model": model,
        "pretrained": pretrained,
        "weights_sha256": f"{embeddings.AS_GIVEN}{model}/{pretrained}",
        "quick_gelu": None,
        "preprocess": None,
        "crop_border": None,
        "dim": dim,
    }


def _files(folder: str, column: str) -> Iterator[_File]:
    names = store.list_names(folder)
    if "img_emb" in names:
        rows, texts, meta = (_by_number(store.join(folder, kind)) for kind in ("img_emb", "text_emb", "metadata"))
        for number in sorted(rows):
            if number not in meta:
                raise DataError(f"{folder}: img_emb has part {number}, metadata does not")
            yield _File(rows[number].rsplit("/", 1)[-1], rows[number], texts.get(number, ""), meta[number])
        return
    stems = {name.removesuffix(".npz") for name in names if name.endswith(".npz")}
    for name in names:
        stem, _, suffix = name.rpartition(".")
        if suffix == "parquet" and (stem in stems or not stems):
            path = store.join(folder, name)
            arrays = store.join(folder, f"{stem}.npz")
            if stems or column in _columns(path):
                yield _File(name, arrays if stems else path, arrays if stems else "", path)


def _columns(uri: str) -> list[str]:
    import pyarrow.parquet as pq

    fs, path = filesystems.filesystem(uri)
    with fs.open(path, "rb") as file:
        return list(pq.read_schema(file).names)


def _by_number(folder: str) -> dict[int, str]:
    """Files of a folder by the number in their name, whatever its zero padding."""
    found = {}
    for name in store.list_names(folder):
        match = re.search(r"(\d+)\.(npy|parquet)\Z", name)
        if match:
            found[int(match.group(1))] = store.join(folder, name)
    return found


def _load(file: _File, settings: ImportSettings) -> tuple[np.ndarray, np.ndarray | None]:
    """Return (n, d) image rows and (n, d) text rows or None, in the source's dtype."""
    if file.images.endswith(".npy"):
        return store.read_array(file.images), store.read_array(file.texts) if file.texts else None
    if file.images.endswith(".npz"):
        prefix = "l14" if settings.embedding_column == "embedding" else settings.embedding_column
        with np.load(io.BytesIO(store.read_bytes(file.images)), allow_pickle=False) as arrays:
            if f"{prefix}_img" not in arrays:
                raise DataError(f"{file.images} has {sorted(arrays)}, expected {prefix}_img")
            return arrays[f"{prefix}_img"], arrays.get(f"{prefix}_txt")
    column = store.read_table(file.images, [settings.embedding_column]).column(0).combine_chunks()
    rows = column.flatten().to_numpy(zero_copy_only=False)
    if column.null_count or len(rows) % max(len(column), 1):
        raise DataError(f"{file.images}: column {settings.embedding_column} has nulls or rows of unequal length")
    return rows.reshape(len(column), -1), None


def _import(uri: str, file: _File, part: int, dim: int, text: bool, settings: ImportSettings) -> dict[str, Any]:
    images, texts = _load(file, settings)
    table = store.read_table(file.metadata)
    if images.ndim != 2 or images.shape != (table.num_rows, dim):
        raise DataError(f"{file.images}: rows {images.shape} beside {table.num_rows} metadata rows of dim {dim}")
    if (texts is not None) != text:
        raise DataError(
            f"{file.images} {'has' if texts is not None else 'lacks'} text rows, the first file "
            f"{'has' if text else 'lacks'} them",
            hint="import the files with text rows and those without into separate folders",
        )
    if texts is not None and texts.shape != images.shape:
        raise DataError(f"{file.texts}: text rows {texts.shape} beside image rows {images.shape}")
    rows, bad, renormed = _unit(np.asarray(images))
    ledger = [
        {"shard": file.name, "key": str(i), "reason": "not_finite", "detail": "", "dropped": True}
        for i in np.nonzero(bad)[0].tolist()
    ]
    good = ~bad
    ready = file.images.endswith(".npy") and not bad.any()
    twins = {"img_emb": file.images} if ready and not renormed else {}
    text_rows = None
    if texts is not None:
        all_texts, without, text_renormed = _unit(np.asarray(texts))
        all_texts[without] = 0  # no caption, or one that the encoder failed on: the layout's zero row
        text_rows = all_texts[good]
        if ready and not text_renormed:
            twins["text_emb"] = file.texts
    metadata = _metadata(table.filter(pa.array(good)), part, file.name, settings.folder)
    notes = pa.Table.from_pylist(ledger, schema=schema.LEDGER)
    record = embeddings.write_part(uri, part, file.name, rows[good], text_rows, metadata, notes, twins)
    if renormed:
        record["notes"]["normalised"] = renormed
    return record


def _unit(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Return float16 unit rows, a mask of rows that are not finite or zero, and how many had to be normalised."""
    wide = rows.astype(np.float32)
    norms = np.linalg.norm(wide, axis=1)
    bad = ~np.isfinite(wide).all(axis=1) | (norms == 0)
    off = ~bad & (np.abs(norms - 1) > NORM_TOLERANCE)
    if off.any():
        wide[off] = normalise(wide[off])
    return wide.astype(np.float16), bad, int(off.sum())


def _metadata(table: pa.Table, part: int, name: str, source: str) -> pa.Table:
    """Map the columns that tools of the field write to `schema.METADATA`; what is not known is null."""
    shard = Shard(source, name, "parquet", source.rstrip("/").rsplit("/", 1)[-1])
    rows = []
    for i, row in enumerate(table.to_pylist()):
        caption = next((row[c] for c in CAPTION_FIELDS if isinstance(row.get(c), str)), None)
        url = next((row[c] for c in URL_FIELDS if isinstance(row.get(c), str)), None)
        key = str(row.get("image_path") or row.get("key") or i)
        rows.append(
            {
                "image_path": key,
                "caption": caption,
                "uid": sample_uid(row, url, caption, shard, key),
                "row_id": (part << 32) | i,
                "shard": name,
                "url": url,
                "sha256": row.get("sha256") or "",
                "image_offset": -1,
                "image_bytes": -1,
                "width": row.get("width") or row.get("original_width"),
                "height": row.get("height") or row.get("original_height"),
                "label": row["label"] if isinstance(row.get("label"), int) else -1,
                "class_name": row.get("class_name") or "",
                "group": row.get("group") or "",
            }
        )
    return pa.Table.from_pylist(rows, schema=schema.METADATA)
