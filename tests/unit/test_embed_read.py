"""The reading half of embed, without Ray: one chunk per batch, hashes beside the rows, odd pictures in the ledger."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from clipgap_ray.kernels.phash import perceptual_hashes
from clipgap_ray.pixels import Preprocess, grey_thumbnail, open_picture
from clipgap_ray.stages.embed_read import ReadPlan, Work, from_stream, read_chunks
from tests import made

#: What a reader holds beside the pixels of two chunks: metadata rows, one sample's bytes, a tar buffer.
READER_BYTES = 1_000_000
#: And for every sample of the shard: the members' places and the keys seen, to tell repeated ones.
SAMPLE_BYTES = 1_000


def encoded(picture: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form)
    return buffer.getvalue()


def test_rows_hashes_and_ledger_of_a_shard(tmp_path: Path) -> None:
    narrow = Image.fromarray(np.arange(40, dtype=np.uint8)[None].repeat(1, 0))
    odd = {
        "lab": encoded(Image.new("LAB", (20, 20), (9, 9, 9)), "TIFF"),
        "deep": encoded(Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 160), "PNG"),
        "cmyk": encoded(Image.new("CMYK", (20, 20), (9, 8, 7, 6)), "JPEG"),
        "narrow": encoded(narrow, "PNG"),
    }
    images = {**{f"{n}": made.jpeg(n) for n in range(6)}, **odd}
    shard = made.tar_shard(tmp_path / "0.tar", [(f"{key}.jpg", data) for key, data in images.items()])
    plan = ReadPlan((Preprocess(8),), 4, 1.0, None)
    chunks = [row for table in read_chunks(Work(3, shard), plan) for row in table.to_pylist()]
    assert [(c["part"], c["chunk"], c["last"]) for c in chunks] == [(3, 0, False), (3, 1, False), (3, 2, True)]
    rows = pa.concat_tables([from_stream(c["metadata"]) for c in chunks]).to_pylist()
    assert [row["image_path"] for row in rows] == [key for key in images if key != "lab"]
    assert [len(c["pixels_0"]) // (8 * 8 * 3) for c in chunks] == [4, 4, 1]
    for row in rows:
        plain, flipped = perceptual_hashes(grey_thumbnail(open_picture(images[row["image_path"]]))[None])
        assert (row["phash"], row["phash_flipped"]) == (int(plain[0]), int(flipped[0]))
    ledger = pa.concat_tables([from_stream(c["ledger"]) for c in chunks]).to_pylist()
    assert [(row["key"], row["reason"]) for row in ledger if row["dropped"]] == [("lab", "broken_image")]


@pytest.mark.parametrize(("rows", "broken", "sizes"), [(8, 0, [4, 4]), (9, 0, [4, 4, 1]), (0, 2, [0]), (4, 1, [4, 0])])
def test_a_full_chunk_may_be_the_last(tmp_path: Path, rows: int, broken: int, sizes: list[int]) -> None:
    """No empty one follows it, unless a sample came that is none; the ledger keeps that."""
    images = [made.jpeg(n) for n in range(rows)] + [b"no image"] * broken
    shard = made.tar_shard(tmp_path / "0.tar", [(f"{n:03d}.jpg", data) for n, data in enumerate(images)])
    chunks = [
        row
        for table in read_chunks(Work(0, shard), ReadPlan((Preprocess(8),), 4, 1.0, None))
        for row in table.to_pylist()
    ]
    assert [chunk["rows"] for chunk in chunks] == sizes
    assert [chunk["last"] for chunk in chunks] == [False] * (len(sizes) - 1) + [True]
    ledger = pa.concat_tables([from_stream(chunk["ledger"]) for chunk in chunks]).to_pylist()
    assert sum(row["dropped"] for row in ledger) == broken


def test_a_reader_holds_two_chunks_whatever_the_shard(tmp_path: Path) -> None:
    """One chunk is handed over while the next is filled; beside their pixels, a stated constant."""
    plan = ReadPlan((Preprocess(64),), 16, 1.0, None)
    chunk_bytes = 16 * 64 * 64 * 3
    peaks = []
    for rows in (48, 480):  # 10,000 samples, the most that img2dataset writes into a shard, are 10 MB
        shard = made.tar_shard(tmp_path / f"{rows}.tar", [(f"{n}.jpg", made.jpeg(n % 8)) for n in range(rows)])
        for _ in range(2):  # once more: the first time imports and caches
            tracemalloc.start()
            for _table in read_chunks(Work(0, shard), plan):
                pass
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[3] < 2 * chunk_bytes + READER_BYTES
    assert peaks[3] - peaks[1] < SAMPLE_BYTES * (480 - 48)
