"""An index on an object store: downloaded once per machine, checked, memory-mapped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from clipgap_ray import download, filesystems, store
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.index import IndexShard
from clipgap_ray.kernels import faiss_index
from tests import s3_server
from tests.index_fixture import DIM, unit_rows

URI = "s3://pool/index/shard_00000"
ROWS = unit_rows(50, 0)


@pytest.fixture(scope="module")
def server() -> Iterator[s3_server.S3Server]:
    with s3_server.running() as server:
        yield server


@pytest.fixture
def s3(server: s3_server.S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3_server.S3Server]:
    """A bucket with a saved shard, and an empty cache."""
    for name, value in s3_server.CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CLIPGAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CLIPGAP_CACHE_GB", raising=False)
    monkeypatch.setattr(filesystems, "FIRST_PAUSE_S", 0.01)
    before = filesystems.options()
    filesystems.configure(filesystems.StorageOptions(server.url))
    server.put("pool", "empty", b"")
    shard = IndexShard(faiss_index.train_empty("Flat", DIM, np.zeros((0, DIM)), seed=0))
    shard.add(ROWS, np.arange(50), 0)
    shard.save(URI)
    yield server
    server.fail_every = {}
    filesystems.configure(before)


def files(folder: Path) -> list[Path]:
    """Finished files of the cache."""
    return sorted(path for path in folder.glob("??/*") if len(path.name) == 64)


def downloads(seen: list[tuple[str, str]]) -> list[str]:
    return [path for method, path in seen if method == "GET" and path.endswith(("index.faiss", "row_ids.npy"))]


def test_an_index_on_s3_is_downloaded_once_and_answers_as_a_local_one(
    s3: s3_server.S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    read = faiss_index.read
    monkeypatch.setattr(faiss_index, "read", lambda path, mmap=True: opened.append((path, mmap)) or read(path, mmap))
    with s3.counting() as seen:
        first = IndexShard.load(URI)
    assert len(downloads(seen)) == 2
    with s3.counting() as seen:
        second = IndexShard.load(URI)
    assert downloads(seen) == []
    digests = store.read_json(f"{URI}/manifest.json")["files"]
    assert sorted(path.name for path in files(tmp_path / "cache")) == sorted(digests.values())
    digest = digests["index.faiss"]
    assert opened == [(str(tmp_path / "cache" / digest[:2] / digest), True)] * 2  # mapped, not read
    local = IndexShard(faiss_index.train_empty("Flat", DIM, np.zeros((0, DIM)), seed=0))
    local.add(ROWS, np.arange(50), 0)
    expected = local.search(unit_rows(5, 1), 7)
    for shard in (first, second):
        assert all(np.array_equal(*pair) for pair in zip(shard.search(unit_rows(5, 1), 7), expected, strict=True))
    assert isinstance(first.row_ids, np.memmap)


def test_those_who_want_the_same_file_wait_for_one_download(s3: s3_server.S3Server) -> None:
    with s3.counting() as seen, ThreadPoolExecutor(6) as threads:
        shards = list(threads.map(lambda _: IndexShard.load(URI).num_rows, range(6)))
    assert shards == [50] * 6
    assert len(downloads(seen)) == 2


def test_a_download_survives_errors_cuts_and_hang_ups(s3: s3_server.S3Server, tmp_path: Path) -> None:
    s3.fail_every = {"error": 3, "cut": 2, "hang up": 5}
    shard = IndexShard.load(URI)
    assert shard.num_rows == 50
    assert all(s3.failed.get(kind) for kind in ("error", "cut"))
    assert not list((tmp_path / "cache").glob("*/.*tmp"))


def test_other_bytes_than_the_manifest_says_are_refused_and_not_kept(s3: s3_server.S3Server, tmp_path: Path) -> None:
    store.write_bytes(f"{URI}/index.faiss", b"x" * 100)
    with pytest.raises(DataError, match=r"shard_00000/index\.faiss has sha256"):
        IndexShard.load(URI)
    assert not files(tmp_path / "cache")
    store.remove(f"{URI}/index.faiss")
    with pytest.raises(DataError, match=r"index\.faiss does not exist"):
        IndexShard.load(URI)


def test_a_copy_that_was_damaged_is_made_again(s3: s3_server.S3Server, tmp_path: Path) -> None:
    IndexShard.load(URI)
    path = tmp_path / "cache" / (digest := store.read_json(f"{URI}/manifest.json")["files"]["index.faiss"])[:2] / digest
    path.write_bytes(b"half of it")
    with s3.counting() as seen:
        assert IndexShard.load(URI).num_rows == 50
    assert len(downloads(seen)) == 1
    assert store.file_sha256(str(path)) == digest


def test_what_was_opened_longest_ago_goes_when_the_cache_is_full(
    s3: s3_server.S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = {}
    for at, name in enumerate("abcd"):
        data = bytes([at]) * 1000
        store.write_bytes(f"s3://pool/{name}", data)
        digests[name] = store.sha256(data)

    def kept() -> set[str]:
        names = {path.name for path in files(tmp_path / "cache")}
        return {name for name, digest in digests.items() if digest in names}

    monkeypatch.setenv("CLIPGAP_CACHE_GB", "0.000002")  # 2000 bytes
    for age, name in ((300, "a"), (200, "b")):
        path = download.local_copy(f"s3://pool/{name}", digests[name])
        os.utime(path, (os.stat(path).st_mtime - age,) * 2)
    download.local_copy("s3://pool/a", digests["a"])  # used again: b is older now
    download.local_copy("s3://pool/c", digests["c"])
    assert kept() == {"a", "c"}
    monkeypatch.setenv("CLIPGAP_CACHE_GB", "1e-9")
    assert Path(download.local_copy("s3://pool/d", digests["d"])).read_bytes() == bytes([3]) * 1000
    assert kept() == {"d"}  # never the new one
    monkeypatch.setenv("CLIPGAP_CACHE_GB", "much")
    with pytest.raises(ConfigError, match="CLIPGAP_CACHE_GB is 'much'"):
        download.local_copy("s3://pool/a", digests["a"])


def test_the_folder_is_where_caches_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLIPGAP_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert download.cache_folder() == tmp_path / "clipgap"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert download.cache_folder() == Path("~/.cache/clipgap").expanduser()
    assert download.local_copy("/some/file", "no digest is needed") == "/some/file"
