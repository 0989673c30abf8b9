"""The folder of embeddings: written, committed, opened, grouped; other encoders refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipgap_ray import embeddings, rundir, schema, store
from clipgap_ray.embeddings import EmbeddingSet, Part
from clipgap_ray.errors import ConfigError, DataError, IndexMismatchError
from tests import made
from tests.index_fixture import DIM, FINGERPRINT, unit_rows, write_embeddings, write_part


def test_what_was_written_is_read(tmp_path: Path) -> None:
    parts = [unit_rows(7, 0), unit_rows(0, 1), unit_rows(3, 2)]
    opened = EmbeddingSet.open(write_embeddings(tmp_path / "emb", parts))
    assert (opened.num_rows, opened.dim) == (10, DIM)
    assert [(p.number, p.num_rows, p.shard) for p in opened.parts] == [
        (0, 7, "00000.tar"),
        (1, 0, "00001.tar"),
        (2, 3, "00002.tar"),
    ]
    for number, rows in enumerate(parts):
        assert np.array_equal(opened.images(number), rows)
        assert opened.images(number).dtype == np.float16
        assert opened.metadata(number).schema == schema.METADATA
    assert np.array_equal(opened.all_images(), np.concatenate(parts))
    assert made.all_row_ids(opened).tolist() == [*range(7), *((2 << 32) + i for i in range(3))]
    texts, captions = opened.texts(0), opened.metadata(0, ["caption"]).column(0).to_pylist()
    assert captions[4] is None
    assert not texts[4].any()
    assert texts[[0, 1, 2, 3, 5, 6]].any(axis=1).all()


def test_the_layout_is_clip_retrieval_s(tmp_path: Path) -> None:
    write_embeddings(tmp_path, [unit_rows(2, 0)])
    for name in (
        "img_emb/img_emb_00000.npy",
        "text_emb/text_emb_00000.npy",
        "metadata/metadata_00000.parquet",
        "ledger/ledger_00000.parquet",
        "manifest.json",
    ):
        assert (tmp_path / name).is_file(), name


def test_the_record_counts_what_the_ledger_says(tmp_path: Path) -> None:
    ledger = [
        ("a", "broken_image", True),
        ("b", "broken_image", True),
        ("c", "no_image", True),
        ("d", "odd_suffix", False),
    ]
    table = pa.Table.from_pylist(
        [{"shard": "s", "key": k, "reason": r, "detail": "", "dropped": d} for k, r, d in ledger], schema=schema.LEDGER
    )
    metadata = pa.Table.from_pylist([{"uid": "0" * 32}], schema=schema.METADATA)
    record = embeddings.write_part(str(tmp_path), 4, "s", unit_rows(1, 0), None, metadata, table)
    assert (record["part"], record["read"], record["kept"], record["rows"]) == (4, 4, 1, 1)
    assert record["dropped"] == {"broken_image": 2, "no_image": 1}
    assert record["notes"] == {"odd_suffix": 1}
    assert set(record["files"]) == {"img_emb", "metadata", "ledger"}  # no captions, no text file
    data = store.read_bytes(str(tmp_path / "img_emb" / "img_emb_00004.npy"))
    assert record["files"]["img_emb"] == store.sha256(data)
    with pytest.raises(DataError, match="2 image rows beside 1 metadata rows"):
        embeddings.write_part(str(tmp_path), 4, "s", unit_rows(2, 0), None, metadata, table)


def test_uncommitted_parts_do_not_exist(tmp_path: Path) -> None:
    uri = write_embeddings(tmp_path / "emb", [unit_rows(2, 0)])
    write_part(uri, 1, unit_rows(5, 1))  # files without a record: the driver died here
    assert EmbeddingSet.open(uri).num_rows == 2


def test_folders_that_are_not_complete_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        EmbeddingSet.open(str(tmp_path / "nothing"))
    with rundir.RunDirectory(str(tmp_path / "half"), "embed", {}) as directory:
        directory.log.append([write_part(directory.uri, 0, unit_rows(2, 0))])
    with pytest.raises(DataError, match="is not complete"):
        EmbeddingSet.open(str(tmp_path / "half"))
    with pytest.raises(DataError, match="no part is committed"):
        EmbeddingSet.open(write_embeddings(tmp_path / "empty", []))


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(1, 6000))
def test_groups_are_neighbouring_parts_within_the_limit(counts: list[int], max_bytes: int) -> None:
    parts = [Part(i, rows, f"{i}", {}) for i, rows in enumerate(counts)]
    groups = list(EmbeddingSet("", {"encoder": {"dim": 8}}, parts).groups(max_bytes))
    assert [part for group in groups for part in group] == parts
    assert all(groups)
    for group in groups:
        assert len(group) == 1 or sum(p.num_rows for p in group) * 16 <= max_bytes
    for group, following in itertools.pairwise(groups):  # and no smaller than they must be
        assert (sum(p.num_rows for p in group) + following[0].num_rows) * 16 > max_bytes


@pytest.mark.parametrize("field", embeddings.IDENTITY)
def test_another_encoder_is_refused_by_the_field_that_differs(field: str) -> None:
    other = {**FINGERPRINT, field: "another"}
    with pytest.raises(IndexMismatchError, match=f"the pool and the test were .*: {field} is ") as error:
        embeddings.check_same_encoder(FINGERPRINT, other, ("the pool", "the test"))
    assert "'another'" in str(error.value)
    assert not any(f"{name} is" in str(error.value) for name in embeddings.IDENTITY if name != field)


def test_batch_size_precision_and_version_are_not_another_encoder() -> None:
    other = {**FINGERPRINT, "batch_size": 7, "threads": 3, "version": "0", "precision": "fp16", "pretrained": "moved"}
    embeddings.check_same_encoder(FINGERPRINT, other, ("a", "b"))


@pytest.mark.parametrize(
    ("text", "bounds"), [(None, None), ("0:3", (0, 3)), (":3", (0, 3)), ("2:", (2, schema.MAX_ROWS_PER_PART))]
)
def test_part_ranges(text: str | None, bounds: tuple[int, int] | None) -> None:
    assert embeddings.parse_part_range(text) == bounds


@pytest.mark.parametrize("text", ["3", "3:3", "4:2", "a:b", "-1:2", ""])
def test_part_ranges_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--shards"):
        embeddings.parse_part_range(text)
