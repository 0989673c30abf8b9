"""Files are whole or absent, and whatever cannot be read is named."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from clipgap_ray import store
from clipgap_ray.errors import DataError, StorageError


def test_a_write_replaces_the_whole_file(tmp_path: Path) -> None:
    uri = str(tmp_path / "deep" / "er" / "file")
    store.write_bytes(uri, b"long content")
    store.write_bytes(uri, b"new")
    assert store.read_bytes(uri) == b"new"
    assert os.listdir(tmp_path / "deep" / "er") == ["file"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    uri = str(tmp_path / "file")
    store.write_bytes(uri, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        store.write_bytes(uri, b"new")
    assert os.listdir(tmp_path) == ["file"]
    assert Path(uri).read_bytes() == b"old"


def test_a_reader_never_sees_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "file")
    seen: list[bool] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(os.path.exists(uri)), replace(a, b)))
    store.write_bytes(uri, b"x" * 100_000)
    assert seen == [False]


@pytest.mark.parametrize("read", [store.read_bytes, store.read_json, store.read_array, store.read_table])
def test_a_missing_file_is_named(tmp_path: Path, read: object) -> None:
    uri = str(tmp_path / "nothing-here")
    with pytest.raises(DataError, match="nothing-here does not exist"):
        read(uri)  # type: ignore[operator]


def test_malformed_files_are_named(tmp_path: Path) -> None:
    uri = str(tmp_path / "broken")
    store.write_bytes(uri, b"{not json")
    with pytest.raises(DataError, match="broken is not JSON"):
        store.read_json(uri)
    with pytest.raises(DataError, match="broken is not parquet"):
        store.read_table(uri)


def test_byte_ranges(tmp_path: Path) -> None:
    uri = str(tmp_path / "file")
    store.write_bytes(uri, bytes(range(10)))
    assert store.read_bytes(uri, 3, 2) == b"\x03\x04"
    assert store.read_bytes(uri, 8) == b"\x08\x09"
    assert store.read_bytes(uri, 0, 1) == b"\x00"
    assert store.read_bytes(uri, 2, 0) == b""


def test_row_groups_are_read_alone(tmp_path: Path) -> None:
    uri = str(tmp_path / "t.parquet")
    store.write_bytes(uri, store.table_bytes(pa.table({"x": range(25), "y": range(25)}), 10))
    assert store.group_starts(uri) == [0, 10, 20]
    assert store.read_group(uri, 2, ["y"]).to_pydict() == {"y": [20, 21, 22, 23, 24]}
    with pytest.raises(DataError, match="has no column z; it has x"):
        store.read_group(uri, 0, ["x", "z"])
    store.write_bytes(uri, store.table_bytes(pa.table({"x": [1]}).slice(0, 0)))
    assert store.group_starts(uri) in ([], [0])  # no rows: nobody asks for one
    with pytest.raises(DataError, match="does not exist"):
        store.group_starts(str(tmp_path / "absent"))


@pytest.mark.parametrize("root", ["", "memory://store-test"])
def test_arrays_tables_and_json_round_trip_on_any_store(tmp_path: Path, root: str) -> None:
    root = root or str(tmp_path)
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    store.write_bytes(store.join(root, "a.npy"), store.array_bytes(array))
    store.write_table(store.join(root, "t.parquet"), pa.table({"x": [1, 2], "y": ["a", None]}))
    store.write_json(store.join(root, "j.json"), {"b": [1, None]})
    found = store.read_array(store.join(root, "a.npy"))
    assert found.dtype == np.float16
    assert np.array_equal(found, array)
    assert store.read_table(store.join(root, "t.parquet"), ["y"]).to_pydict() == {"y": ["a", None]}
    assert store.read_json(store.join(root, "j.json")) == {"b": [1, None]}
    assert store.list_names(root) == ["a.npy", "j.json", "t.parquet"]
    assert store.list_names(store.join(root, "missing")) == []
    assert store.exists(store.join(root, "a.npy"))
    assert not store.exists(store.join(root, "b.npy"))


def test_arrays_with_pickles_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects in dtype"):
        store.read_array(str(tmp_path / "evil.npy"))


def test_digest_ignores_the_order_of_keys_and_nothing_else() -> None:
    assert store.digest({"a": 1, "b": 2}) == store.digest({"b": 2, "a": 1})
    assert store.digest({"a": 1}) != store.digest({"a": 1.5})
    assert store.digest([1, 2]) != store.digest([2, 1])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    uri = str(tmp_path / "file")
    with pytest.raises(StorageError, match=rf"{uri}: (no space left|disk quota).*\nhint: free some space"):
        store.write_bytes(uri, b"new")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("uri", "names", "joined"), [("a/", ("b",), "a/b"), ("s3://bucket/x", ("y", "z"), "s3://bucket/x/y/z")]
)
def test_join_uses_single_slashes_between_names(uri: str, names: tuple[str, ...], joined: str) -> None:
    assert store.join(uri, *names) == joined


@pytest.mark.parametrize("remote", [False, True])
def test_a_large_file_is_whole_or_absent(tmp_path: Path, remote: bool) -> None:
    uri = "memory://store-test/large" if remote else str(tmp_path / "deep" / "large")

    def die() -> None:
        with store.atomic_file(uri) as file:
            file.write(b"half")
            raise RuntimeError("died")

    with pytest.raises(RuntimeError, match="died"):
        die()
    assert not store.exists(uri)
    with store.atomic_file(uri) as file:
        file.write(b"x" * 100)
        assert not store.exists(uri)
    assert store.read_bytes(uri) == b"x" * 100
    assert remote or os.listdir(tmp_path / "deep") == ["large"]
