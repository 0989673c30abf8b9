"""The encoding half of `embed`: an actor that holds the encoders, and the assembling of chunks into parts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from clipgap_ray import embeddings, schema
from clipgap_ray.encoder import Encoder, EncoderSettings
from clipgap_ray.stages.embed_read import distinct_pixels, from_stream

PASSED_ON = ("part", "chunk", "last", "outputs", "metadata", "ledger", "images", "image_bytes", "decode_s")


class Encode:
    """Ray Data actor: holds the encoders of all outputs, maps chunks of pixels and captions to rows.

    One actor for all, not a pool for each: a chunk's pixels travel once.

    Args:
        outputs: (encoder, whether captions are embedded) of every output, in the run's order.
    """

    def __init__(self, outputs: Sequence[tuple[EncoderSettings, bool]]) -> None:
        self.encoders: list[Encoder] = [encoder.build() for encoder, _ in outputs]
        self.text = [text for _, text in outputs]
        makers = distinct_pixels(tuple(encoder.preprocess for encoder in self.encoders))
        self._columns = [f"pixels_{makers.index(encoder.preprocess)}" for encoder in self.encoders]
        self._node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        self._free_since: float | None = None

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return one row per chunk: what `CHUNK` says of it, rows by output, and what it cost."""
        return pa.Table.from_pylist([self._encode(table.slice(i, 1)) for i in range(table.num_rows)])

    def _encode(self, chunk: pa.Table) -> dict[str, Any]:
        started = time.perf_counter()
        idle = started - self._free_since if self._free_since is not None else 0.0
        row: dict[str, Any] = {name: chunk.column(name)[0].as_py() for name in PASSED_ON}
        names = [name for name in chunk.column_names if name.startswith("pixels_")]
        moved = sum(chunk.column(name)[0].as_buffer().size for name in names)
        row["moved_bytes"] = 0 if chunk.column("node")[0].as_py() == self._node else moved
        captions = from_stream(row["metadata"]).column("caption").to_pylist()
        row["image_rows"], row["text_rows"] = [b""] * len(self.encoders), [b""] * len(self.encoders)
        for output in row["outputs"]:
            encoder = self.encoders[output]
            pixels = _pixels(chunk.column(self._columns[output])[0], len(captions), encoder.preprocess.size)
            row["image_rows"][output] = encoder.encode_images(pixels).astype(np.float16).tobytes()
            if self.text[output]:
                row["text_rows"][output] = _texts(encoder, captions).tobytes()
        self._free_since = time.perf_counter()
        return {**row, "busy_s": self._free_since - started, "idle_s": idle}


def _pixels(value: pa.Scalar, rows: int, size: int) -> np.ndarray:
    """(n, size, size, 3) uint8, a view."""
    return np.frombuffer(value.as_buffer(), np.uint8).reshape(rows, size, size, 3)


def _texts(encoder: Encoder, captions: list[str | None]) -> np.ndarray:
    """(n, d) float16, zero rows where there is no caption."""
    known = [i for i, caption in enumerate(captions) if caption]
    texts = np.zeros((len(captions), encoder.dim), np.float16)
    texts[known] = encoder.encode_texts([captions[i] or "" for i in known])
    return texts


def write_part(
    uri: str, part: int, shard: str, chunks: list[dict[str, Any]], *, output: int, dim: int, text: bool
) -> dict[str, Any]:
    """Assemble the chunks of a part for one output, write its files, and return its commit record.

    Args:
        uri: The output's folder.
        part: Part number.
        shard: Name of the input shard.
        chunks: Rows of `Encode`, all of the part, in order.
        output: Which of the run's outputs.
        dim: Dimension of its rows.
        text: Whether it has text rows.
    """
    metadata = pa.concat_tables([from_stream(chunk["metadata"]) for chunk in chunks])
    ledger = pa.concat_tables([from_stream(chunk["ledger"]) for chunk in chunks])
    images = _rows(chunks, "image_rows", output, dim)
    row_ids = pa.array(schema.row_ids(part, metadata.num_rows))
    metadata = metadata.set_column(schema.METADATA.get_field_index("row_id"), "row_id", row_ids)
    if not text:
        return embeddings.write_part(uri, part, shard, images, None, metadata, ledger)
    texts = _rows(chunks, "text_rows", output, dim)
    score = np.einsum("nd,nd->n", images.astype(np.float32), texts.astype(np.float32))
    without = np.array([not caption for caption in metadata.column("caption").to_pylist()], dtype=bool)
    column = pa.array(score, mask=without, type=pa.float32())
    metadata = metadata.set_column(schema.METADATA.get_field_index("clip_score"), "clip_score", column)
    return embeddings.write_part(uri, part, shard, images, texts, metadata, ledger)


def _rows(chunks: list[dict[str, Any]], name: str, output: int, dim: int) -> np.ndarray:
    return np.frombuffer(b"".join(chunk[name][output] for chunk in chunks), np.float16).reshape(-1, dim)
