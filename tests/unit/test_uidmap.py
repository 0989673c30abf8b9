from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipgap_ray import schema, store, uidmap
from clipgap_ray.embeddings import EmbeddingSet, Part
from clipgap_ray.errors import DataError
from clipgap_ray.kernels import subsets
from clipgap_ray.serving.metadata import Metadata
from clipgap_ray.uidmap import RECORD, UidMap
from tests.index_fixture import uid, unit_rows, write_embeddings


def _embeddings(folder: Path, parts: Sequence[Sequence[str]], numbers: Sequence[int] | None = None) -> EmbeddingSet:
    """Embeddings of which only the uids are there."""
    known = []
    for number, uids in zip(numbers or range(len(parts)), parts, strict=True):
        data = store.table_bytes(pa.table({"uid": pa.array(uids, pa.string())}))
        store.write_bytes(str(folder / f"metadata/metadata_{number:05d}.parquet"), data)
        known.append(Part(number, len(uids), "", {"metadata": store.sha256(data)}))
    return EmbeddingSet(str(folder), {"encoder": {"dim": 4}}, known)


def _hex(seed: int, count: int) -> list[str]:
    words = np.random.default_rng(seed).integers(0, 1 << 63, (count, 2), dtype=np.uint64) * np.uint64(2)
    return [f"{high:016x}{low:016x}" for high, low in words.tolist()]


def test_every_uid_is_found_where_a_scan_finds_it(tmp_path: Path) -> None:
    copies = _hex(0, 50)
    parts = [_hex(1, 300) + copies, [], copies + _hex(2, 7), ["0" * 32, "f" * 32, *copies[:3]]]
    rows = _embeddings(tmp_path / "emb", parts, numbers=[0, 1, 5, 7])
    index = str(tmp_path / "index")
    for file_rows in (10, 100, 1 << 20):
        record = uidmap.write(index, rows, file_rows=file_rows)
        found = UidMap(index, record)
        first: dict[str, int] = {}
        for number, uids in zip((0, 1, 5, 7), parts, strict=True):
            for position, one in enumerate(uids):
                first.setdefault(one, number << 32 | position)
        assert {one: found.row_id(one) for one in first} == first
        assert record["rows"] == len(first)
        assert len(record["files"]) == 1 << record["bits"]
        for absent in (*_hex(3, 50), "0" * 31 + "1", "f" * 31 + "e"):
            assert found.row_id(absent) is None


def test_uids_that_are_no_hashes_work_too(tmp_path: Path) -> None:
    rows = _embeddings(tmp_path / "emb", [[uid(part, i) for i in range(40)] for part in range(3)])
    found = UidMap(str(tmp_path), uidmap.write(str(tmp_path), rows, file_rows=10))
    assert [found.row_id(uid(part, 7)) for part in range(3)] == [part << 32 | 7 for part in range(3)]
    assert found.row_id(uid(3, 7)) is None


def test_an_unchanged_map_is_kept_and_the_one_before_a_new_one_too(tmp_path: Path) -> None:
    parts = [_hex(1, 30)]
    records = [uidmap.write(str(tmp_path), _embeddings(tmp_path / "emb", parts))]
    path = tmp_path / records[0]["folder"] / "00000.npy"
    written = path.stat().st_mtime_ns
    assert uidmap.write(str(tmp_path), _embeddings(tmp_path / "emb", parts), records[0]) == records[0]
    assert path.stat().st_mtime_ns == written
    for seed in (2, 3):
        parts.append(_hex(seed, 10))
        records.append(uidmap.write(str(tmp_path), _embeddings(tmp_path / "emb", parts), records[-1]))
    assert not path.exists()  # two versions ago
    for record, known in zip(records[1:], (2, 3), strict=True):
        assert UidMap(str(tmp_path), record).row_id(parts[known - 1][0]) == (known - 1) << 32


def test_a_damaged_or_missing_file_is_an_error_not_an_answer(tmp_path: Path) -> None:
    record = uidmap.write(str(tmp_path), _embeddings(tmp_path / "emb", [_hex(1, 30)]))
    path = tmp_path / record["folder"] / "00000.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="has sha256"):
        UidMap(str(tmp_path), record).row_id("0" * 32)
    path.unlink()
    with pytest.raises(DataError, match="does not exist"):
        UidMap(str(tmp_path), record).row_id("0" * 32)


class _Counting(Sequence[int]):
    def __init__(self, size: int) -> None:
        self.size, self.reads = size, 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, at: Any) -> int:
        self.reads += 1
        return int(at)


def test_a_look_up_reads_as_many_records_as_bisection_does() -> None:
    columns = {"f0": _Counting(1 << 30), "f1": _Counting(1 << 30)}
    assert subsets.find_one(columns, 12345, 12345) == 12345  # type: ignore[arg-type]
    assert columns["f0"].reads + columns["f1"].reads < 3 * 31


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3))), st.tuples(st.integers(0, 4), st.integers(0, 4)))
def test_finding_one_is_finding_among_many(words: list[tuple[int, int]], one: tuple[int, int]) -> None:
    subset = np.array(sorted(set(words)), schema.UID)
    expected = subsets.find(subset, np.array([one], schema.UID))[0]
    assert subsets.find_one(subset, *one) == expected
    assert subsets.contains_one(subset, *one) == (expected >= 0)


def test_memory_does_not_grow_with_the_map(tmp_path: Path) -> None:
    """50 MB of records, a thousand look-ups all over them: their pages do not stay."""
    count = 1 << 21
    records = np.zeros(count, RECORD)
    records["f0"] = np.arange(count, dtype=np.uint64) << np.uint64(43)
    records["row_id"] = np.arange(count)
    data = store.array_bytes(records)
    store.write_bytes(str(tmp_path / "uids/x/00000.npy"), data)
    found = UidMap(str(tmp_path), {"folder": "uids/x", "bits": 0, "files": [store.sha256(data)]})
    del records, data
    found.row_id("0" * 32)
    before = _resident_bytes()
    for at in range(0, count, count // 1000):
        assert found.row_id(f"{at << 43:016x}{0:016x}") == at
    assert _resident_bytes() - before < 8 << 20


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_the_service_looks_uids_up_in_the_map(tmp_path: Path) -> None:
    parts = [unit_rows(20, seed) for seed in range(3)]
    source = write_embeddings(tmp_path / "emb", parts)
    record = uidmap.write(str(tmp_path / "index"), EmbeddingSet.open(source))
    quick, slow = Metadata(source, uids=UidMap(str(tmp_path / "index"), record)), Metadata(source)
    for part in range(3):
        row = quick.vector(uid(part, 5))
        assert row is not None
        assert np.array_equal(row, parts[part][5])
        assert np.array_equal(row, slow.vector(uid(part, 5)))
    assert quick.vector(uuid.uuid4().hex) is None
    texts = Metadata(source, "text", uids=UidMap(str(tmp_path / "index"), record))
    assert texts.vector(uid(1, 4)) is None  # no caption, no row
