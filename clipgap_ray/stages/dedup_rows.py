"""What deduplication knows of every row, and the order in which rows stay."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipgap_ray import schema
from clipgap_ray.config.dedup import COLUMNS, DedupSettings
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.kernels import duplicates
from clipgap_ray.stages import edges
from clipgap_ray.stages.progress import Progress

SHA256 = re.compile(r"[0-9a-fA-F]{64}\Z")
STAYS_STREAM = 2 << 32  # independent of the other samples that hashes of (seed, uid) draw


@dataclass(frozen=True)
class Rows:
    """What the driver knows of every row, in pool order.

    Attributes:
        row_ids: (n,) int64.
        uids: (n,) `schema.UID`.
        sha256: (n, 5) uint64, equal iff the image bytes are: four words of the hash and 0, or the row's own number
            where the hash is unknown (imported embeddings have no bytes).
        column: (n,) float64 values of the column of `--stays`, NaN where unknown; None without one.
    """

    row_ids: np.ndarray
    uids: np.ndarray
    sha256: np.ndarray
    column: np.ndarray | None


def read_rows(pool: EmbeddingSet, stays: str) -> Rows:
    """Read what dedup needs of the metadata, part by part: 64 bytes per row, no Python object that outlives a part."""
    wanted = {"resolution": ["width", "height"]}.get(stays, [stays]) if stays in COLUMNS else []
    progress = Progress("dedup, metadata", len(pool.parts), "parts")
    row_ids, uids, sha256, values = [], [], [], []
    num_rows = 0
    for part in pool.parts:
        table = pool.metadata(part.number, ["row_id", "uid", "sha256", *wanted])
        row_ids.append(table.column("row_id").to_numpy())
        uids.append(schema.pack_uids(table.column("uid")))
        sha256.append(_sha_keys(table.column("sha256").to_pylist(), num_rows))
        columns = [pc.cast(table.column(name), pa.float64()).to_numpy() for name in wanted]
        values.append(np.prod(columns, axis=0) if columns else np.zeros(0))
        num_rows += table.num_rows
        progress.advance(rows=table.num_rows)
    progress.close()
    column = np.concatenate(values) if wanted else None
    return Rows(np.concatenate(row_ids), np.concatenate(uids), np.concatenate(sha256), column)


def _sha_keys(texts: list[str | None], first: int) -> np.ndarray:
    keys = np.zeros((len(texts), 5), np.uint64)
    for row, text in enumerate(texts):
        if text:
            # A column that users brought may hold another hash than ours: what counts is equality.
            raw = bytes.fromhex(text) if SHA256.match(text) else hashlib.sha256(text.encode()).digest()
            keys[row, :4] = np.frombuffer(raw, ">u8")
        else:
            keys[row, 4] = first + row + 1
    return keys


def stay_order(rows: Rows, settings: DedupSettings, to_centroid: np.ndarray | None) -> np.ndarray:
    """Put rows in the order in which they stay: of two duplicates the earlier one does.

    Args:
        rows: The rows.
        settings: `stays`, `order` and `seed`.
        to_centroid: (n,) float64 similarity of every row to its own centroid, for hard and easy.

    Returns:
        (n,) int64 positions in the pool.
    """
    if settings.order == "source":
        base = np.argsort(rows.row_ids, kind="stable")
    else:
        base = np.lexsort((rows.row_ids, rows.uids["f1"], rows.uids["f0"]))
    key: np.ndarray | None = None
    if settings.stays == "random":
        key = schema.hash_uids(rows.uids, settings.seed + STAYS_STREAM)
    elif settings.stays == "hard":
        key = to_centroid
    elif settings.stays == "easy":
        key = None if to_centroid is None else -to_centroid
    elif rows.column is not None:
        key = -rows.column  # NaN sorts last
    return base if key is None else base[np.argsort(key[base], kind="stable")]


def equal_bytes(rows: Rows, order: np.ndarray) -> np.ndarray:
    """Return (n,) int64: by rank, the rank of the first row with the same image bytes."""
    return duplicates.first_equal(rows.sha256[order])


def ranked(found: edges.Edges, mask: edges.RowMask, order: np.ndarray) -> edges.Edges:
    """Return edges between ranks instead of row ids."""
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return edges.Edges(rank[mask.positions(found.first)], rank[mask.positions(found.second)], found.similarity)
