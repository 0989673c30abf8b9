"""A folder of embeddings with the projection encoder, as `clipgap embed` writes it, without images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from clipgap_ray import embeddings, rundir, schema, store
from clipgap_ray.encoder import EncoderSettings

FINGERPRINT = EncoderSettings("projection").build().fingerprint
DIM = FINGERPRINT["dim"]


def unit_rows(num_rows: int, seed: int) -> np.ndarray:
    """(num_rows, DIM) float16 unit rows."""
    rows = np.random.default_rng(seed).standard_normal((num_rows, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def uid(part: int, row: int) -> str:
    """The uid of a row of these folders."""
    return f"{part:016x}{row:016x}"


def write_part(uri: str, part: int, rows: np.ndarray) -> dict[str, object]:
    """Write the files of a part (text row = image row; every fifth has no caption) and return its record."""
    captions = [None if i % 5 == 4 else f"caption {part} {i}" for i in range(len(rows))]
    table = pa.Table.from_pylist(
        [
            {
                "uid": uid(part, i),
                "row_id": (part << 32) | i,
                "caption": captions[i],
                "image_path": f"{part:05d}{i:04d}",
            }
            for i in range(len(rows))
        ],
        schema=schema.METADATA,
    )
    texts = np.where(np.array([c is None for c in captions])[:, None], np.float16(0), rows)
    ledger = pa.Table.from_pylist([], schema=schema.LEDGER)
    return embeddings.write_part(uri, part, f"{part:05d}.tar", rows, texts, table, ledger)


def write_embeddings(folder: Path, parts: list[np.ndarray]) -> str:
    """Write a complete folder with these parts and return its uri."""
    uri = str(folder)
    with rundir.RunDirectory(uri, "embed", {"model": "projection"}) as directory:
        store.write_json(directory.path("encoder.json"), FINGERPRINT)
        for number, rows in enumerate(parts):
            directory.log.append([write_part(uri, number, rows)])
        directory.finish({"encoder": FINGERPRINT, "shards": {str(n): f"{n:05d}.tar" for n in range(len(parts))}})
    return uri


def all_rows(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The rows of all parts with their row ids."""
    return np.concatenate(parts), np.concatenate([schema.row_ids(n, len(rows)) for n, rows in enumerate(parts)])
