"""One contract, every shell: the in-process index and the Ray actors must agree with the oracle, bit by bit (Flat)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipgap_ray import rundir, schema
from clipgap_ray.errors import DataError, IndexMismatchError
from clipgap_ray.index import IndexShard, LocalIndex, shard_uri
from clipgap_ray.index_manifest import write_excluded
from clipgap_ray.kernels import faiss_index
from clipgap_ray.kernels.topk import exact_topk

DIM = 16
Opener = Callable[[list[np.ndarray], int], Any]


def _save(uri: str, parts: list[np.ndarray], num_shards: int) -> str:
    """An index as `clipgap index` leaves it, part p in shard p % num_shards."""
    empty = faiss_index.to_bytes(faiss_index.train_empty("Flat", DIM, np.zeros((0, DIM)), seed=0))
    with rundir.RunDirectory(uri, "index", {"key": "Flat"}) as directory:
        for number in range(num_shards):
            shard = IndexShard(faiss_index.from_bytes(empty), number)
            for part in range(number, len(parts), num_shards):
                shard.add(parts[part], schema.row_ids(part, len(parts[part])), part)
            shard.save(shard_uri(uri, number))
        directory.finish({"num_shards": num_shards, "dim": DIM, "nprobe": 0})
    return uri


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    """A function that saves parts as an index and opens it in one of the shells."""
    indexes = []

    def open_index(parts: list[np.ndarray], num_shards: int) -> Any:
        uri = _save(str(tmp_path / "index"), parts, num_shards)
        if request.param == "local":
            return LocalIndex.open(uri)
        request.getfixturevalue("ray_session")
        from clipgap_ray.stages.index import ShardedIndex

        indexes.append(ShardedIndex.open(uri, num_cpus=0.1))
        return indexes[-1]

    yield open_index
    for index in indexes:
        index.close()


def _agrees(index: Any, parts: list[np.ndarray], queries: np.ndarray, k: int) -> None:
    row_ids = np.concatenate([schema.row_ids(n, len(rows)) for n, rows in enumerate(parts)])
    expected = exact_topk(queries, np.concatenate(parts), row_ids, k)
    similarities, found = index.search(queries, k)
    assert (similarities.dtype, found.dtype) == (np.float32, np.int64)
    assert np.array_equal(similarities, expected[0])
    assert np.array_equal(found, expected[1])


def test_agrees_with_exact_search_also_beyond_the_rows_and_on_ties(opened: Opener) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((n, DIM)).astype(np.float16) / 4 for n in (30, 0, 17, 1, 25)]
    parts[2][:12] = parts[0][0]  # copies across shards: more ties than k
    index = opened(parts, 3)
    queries = np.concatenate([parts[0][:2], rng.standard_normal((5, DIM)) / 4])
    for k in (1, 4, 73, 200):
        _agrees(index, parts, queries, k)
    assert index.search(np.zeros((0, DIM)), 3)[0].shape == (0, 3)


@pytest.mark.parametrize("num_queries", [2, 30])  # FAISS's selector; products of the chosen rows
def test_among_some_rows_it_is_exact_search_over_these(opened: Opener, num_queries: int) -> None:
    rng = np.random.default_rng(1)
    parts = [rng.standard_normal((n, DIM)).astype(np.float16) / 4 for n in (30, 17, 25)]
    row_ids = np.concatenate([schema.row_ids(n, len(rows)) for n, rows in enumerate(parts)])
    chosen = rng.random(len(row_ids)) < 0.3
    index, queries = opened(parts, 2), rng.standard_normal((num_queries, DIM)) / 4
    expected = exact_topk(queries, np.concatenate(parts)[chosen], row_ids[chosen], 5)
    found = index.search(queries, 5, among=np.append(row_ids[chosen], 7 << 40))  # an id that is not here
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])
    assert (index.search(queries, 5, among=np.zeros(0, np.int64))[1] == -1).all()


def test_an_empty_index_finds_nothing(opened: Opener) -> None:
    index = opened([np.zeros((0, DIM), np.float16)], 2)
    similarities, row_ids = index.search(np.ones((2, DIM)), 3)
    assert (row_ids == -1).all()
    assert np.isneginf(similarities).all()


def test_wrong_queries_are_refused(opened: Opener) -> None:
    index = opened([np.ones((3, DIM), np.float16)], 1)
    with pytest.raises(IndexMismatchError, match="do not match index dim 16"):
        index.search(np.ones((1, DIM + 1)), 1)
    with pytest.raises(DataError, match="NaN, infinity"):
        index.search(np.full((1, DIM), np.nan), 1)
    with pytest.raises(DataError, match="too large for float16"):
        index.search(np.full((1, DIM), 1e6), 1)


def test_excluded_rows_are_hidden_everywhere(tmp_path: Path) -> None:
    parts = [np.random.default_rng(n).standard_normal((40, DIM)).astype(np.float16) for n in range(2)]
    uri = _save(str(tmp_path / "index"), parts, 2)
    hidden = np.concatenate([schema.row_ids(0, 20), schema.row_ids(1, 40), [schema.row_ids(9, 1)[0]]])
    write_excluded(uri, hidden)
    _, found = LocalIndex.open(uri).search(parts[1][:3], 80)
    assert sorted(found[0][found[0] >= 0].tolist()) == list(range(20, 40))
    write_excluded(uri, np.zeros(0, np.int64))
    assert LocalIndex.open(uri).search(parts[1][:1], 1)[1].tolist() == [[1 << 32]]


def test_a_part_is_added_once_and_rows_keep_their_ids_out_of_order() -> None:
    shard = IndexShard(faiss_index.train_empty("Flat", DIM, np.zeros((0, DIM)), seed=0))
    rows = np.eye(DIM, dtype=np.float16)
    assert shard.add(rows, schema.row_ids(5, DIM), 5)
    assert shard.add(rows, schema.row_ids(2, DIM), 2)
    assert not shard.add(rows, schema.row_ids(5, DIM), 5)
    assert shard.num_rows == 2 * DIM
    # Equal rows of parts 5 (first position) and 2: the tie goes to the smaller row id, not to the position.
    assert shard.search(rows[:1], 1)[1].tolist() == [[2 << 32]]
    with pytest.raises(IndexMismatchError, match="part 7"):
        shard.add(rows[:, :3], schema.row_ids(7, DIM), 7)


def test_a_damaged_file_is_refused_before_faiss_reads_it(tmp_path: Path) -> None:
    uri = _save(str(tmp_path / "index"), [np.ones((3, DIM), np.float16)], 1)
    file = Path(shard_uri(uri, 0)) / "index.faiss"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DataError, match="its manifest says"):
        LocalIndex.open(uri)


def test_a_crash_between_the_two_renames_of_a_save_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "shard_00000"
    shard = IndexShard(faiss_index.train_empty("Flat", DIM, np.zeros((0, DIM)), seed=0))
    shard.add(np.ones((3, DIM), np.float16), schema.row_ids(0, 3), 0)
    shard.save(str(folder))
    folder.rename(tmp_path / "shard_00000.old")
    again = IndexShard.load(str(folder), mmap=False)
    assert again.parts == {0: 3}
    again.add(np.ones((2, DIM), np.float16), schema.row_ids(1, 2), 1)
    again.save(str(folder))
    assert IndexShard.load(str(folder)).parts == {0: 3, 1: 2}
    assert [path.name for path in tmp_path.iterdir()] == ["shard_00000"]


def test_a_remote_shard_is_the_same(tmp_path: Path) -> None:
    shard = IndexShard(faiss_index.train_empty("Flat", DIM, np.zeros((0, DIM)), seed=0), number=3)
    rows = np.random.default_rng(0).standard_normal((9, DIM)).astype(np.float16)
    shard.add(rows, schema.row_ids(4, 9), 4)
    shard.save("memory://bucket/shard_00003")
    again = IndexShard.load("memory://bucket/shard_00003")
    assert (again.number, again.parts) == (3, {4: 9})
    for ours, theirs in zip(again.search(rows, 4), shard.search(rows, 4), strict=True):
        assert np.array_equal(ours, theirs)
