"""A sharded index as one FAISS file: the same answers, rows in the order of the metadata; no Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest

from clipgap_ray import cli, rundir, schema, store
from clipgap_ray.config.index import IndexSettings
from clipgap_ray.errors import ConfigError, DataError, StaleOutputError
from clipgap_ray.index import IndexShard, LocalIndex, shard_uri
from clipgap_ray.index_manifest import write_excluded
from clipgap_ray.kernels import faiss_index
from clipgap_ray.kernels.faiss_merge import LEFT_OUT, merge
from clipgap_ray.stages.index import run
from clipgap_ray.stages.index_merge import merge_index
from clipgap_ray.stages.sharded import write_empty
from tests.index_fixture import DIM, FINGERPRINT, all_rows, unit_rows, write_embeddings

PARTS = [unit_rows(rows, seed) for seed, rows in enumerate((70, 40, 1, 90, 30))]
KEYS = ("Flat", "SQ8", "IVF8,Flat", "IVF8,PQ4x4", "IVF8,SQ4,Refine(SQ8)", "PCA16,IVF8,SQ8")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Where others keep the cores busy, FAISS's threads wait for each other, for minutes."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


@pytest.mark.parametrize("key", KEYS)
def test_the_kernel_fills_as_if_all_rows_had_been_added_in_order(key: str) -> None:
    rows, generator = unit_rows(300, 3), np.random.default_rng(0)
    empty = faiss_index.to_bytes(faiss_index.train_empty(key, DIM, rows, seed=0))
    places = generator.permutation(300)
    places[places >= 250] = LEFT_OUT  # fifty rows are left out
    cuts = np.split(np.arange(300), (100, 101, 101))  # one part is empty, one has a single row
    parts = []
    for cut in cuts:
        parts.append(faiss_index.from_bytes(empty))
        faiss_index.add(parts[-1], rows[cut])
    merged = merge(faiss_index.from_bytes(empty), parts, [places[cut] for cut in cuts])
    twin = faiss_index.from_bytes(empty)
    kept = np.flatnonzero(places != LEFT_OUT)
    faiss_index.add(twin, rows[kept[np.argsort(places[kept])]])
    for index in (merged, twin):
        ivf = faiss.try_extract_index_ivf(index)
        if ivf is not None:
            ivf.nprobe = 4
    queries = unit_rows(20, 9).astype(np.float32)
    found, expected = merged.search(queries, 12), twin.search(queries, 12)
    assert merged.ntotal == 250
    assert np.array_equal(found[1], expected[1])
    assert np.array_equal(found[0], expected[0])


@pytest.mark.parametrize("key", ["HNSW8", "IVF8,PQ8x4fs"])
def test_kinds_that_cannot_be_merged_are_refused(key: str) -> None:
    index = faiss_index.train_empty(key, DIM, unit_rows(300, 0), seed=0)
    with pytest.raises(ConfigError, match="cannot be merged into one"):
        merge(index, [index], [np.arange(0)])


def build(folder: Path, key: str = "Flat", modality: str = "image") -> str:
    """An index of two shards as the stage writes it; shard 0 got its parts in another order than they are numbered."""
    uri, source = str(folder / "index"), write_embeddings(folder / "emb", PARTS)
    empty = faiss_index.to_bytes(faiss_index.train_empty(key, DIM, np.concatenate(PARTS), seed=0))
    known = [np.arange(len(rows)) % 5 != 4 if modality == "text" else np.ones(len(rows), bool) for rows in PARTS]
    with rundir.RunDirectory(uri, "index", {}) as directory:
        write_empty(uri, faiss_index.Choice(key, "test"), empty)
        for number, parts in enumerate(([4, 0, 2], [1, 3])):
            shard = IndexShard(faiss_index.from_bytes(empty), number)
            for part in parts:
                ids = schema.row_ids(part, len(PARTS[part]))[known[part]]
                shard.add(PARTS[part][known[part]], ids, part)
            shard.save(shard_uri(uri, number))
        directory.finish(
            {"num_shards": 2, "dim": DIM, "nprobe": 3 if "IVF" in key else 0, "key": key, "recall_at_10": 1.0,
             "modality": modality, "encoder": FINGERPRINT, "index_version": "v1", "embeddings": {"uri": source},
             "shards": [{"number": 0, "rows": 0}, {"number": 1, "rows": 0}]}
        )  # fmt: skip
    return uri


def answers(out: Path, name: str = "image.index", k: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """What clip-retrieval does: FAISS's positions are rows of the metadata files, sorted by name."""
    index = faiss.read_index(str(out / name), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    tables = [pq.read_table(path) for path in sorted((out / "metadata").glob("*.parquet"))]
    row_ids = np.concatenate([table.column("row_id").to_numpy() for table in tables])
    assert index.ntotal == len(row_ids)
    similarities, positions = index.search(unit_rows(25, 77).astype(np.float32), k)
    return similarities, row_ids[positions]


@pytest.mark.parametrize("key", ["Flat", "IVF8,Flat"])
def test_faiss_reads_the_file_and_answers_as_the_shards_do(key: str, tmp_path: Path) -> None:
    uri = build(tmp_path, key)
    manifest = merge_index(uri, str(tmp_path / "merged"))
    found = answers(tmp_path / "merged")
    expected = LocalIndex.open(uri).search(unit_rows(25, 77), 8)
    assert np.array_equal(found[1], expected[1])
    assert np.abs(found[0] - expected[0]).max() <= 2 * DIM * 2.0**-24
    assert manifest["rows"] == 231
    for name, digest in manifest["files"].items():
        assert store.sha256((tmp_path / "merged" / name).read_bytes()) == digest
    assert set(manifest["files"]) == {"image.index", *(f"metadata/metadata_{n:05d}.parquet" for n in range(5))}


def test_metadata_and_rows_are_in_the_order_of_row_ids(tmp_path: Path) -> None:
    merge_index(build(tmp_path), str(tmp_path / "merged"))
    index = faiss.read_index(str(tmp_path / "merged/image.index"))
    rows, row_ids = all_rows(PARTS)
    assert np.array_equal(index.reconstruct_n(0, index.ntotal), rows.astype(np.float32))
    tables = [pq.read_table(path) for path in sorted((tmp_path / "merged/metadata").glob("*.parquet"))]
    assert [row for table in tables for row in table.column("row_id").to_pylist()] == row_ids.tolist()


def test_rows_that_are_hidden_and_captions_that_are_not_there_are_in_neither_file(tmp_path: Path) -> None:
    uri, out = build(tmp_path, modality="text"), tmp_path / "merged"
    _, row_ids = all_rows(PARTS)
    with_caption = row_ids[(row_ids & 0xFFFFFFFF) % 5 != 4]
    hidden = with_caption[::7]
    merge_index(uri, str(out))
    assert set(answers(out, "text.index")[1].ravel()) & set(hidden.tolist())
    write_excluded(uri, np.concatenate([hidden, schema.row_ids(2, 1)]))  # part 2 has no row left
    manifest = merge_index(uri, str(out))  # the same version, another takedown list
    assert manifest["rows"] == len(np.setdiff1d(with_caption, [*hidden, 2 << 32]))
    found = answers(out, "text.index")[1]
    assert not set(found.ravel()) & {*hidden.tolist(), 2 << 32}
    assert np.array_equal(found, LocalIndex.open(uri).search(unit_rows(25, 77), 8)[1])
    assert not (out / "metadata/metadata_00002.parquet").exists()


def test_a_second_merge_of_the_same_version_does_nothing_and_damage_is_seen(tmp_path: Path) -> None:
    uri, out = build(tmp_path), tmp_path / "merged"
    first = run(IndexSettings(out=uri, merge=str(out)))
    written = (out / "image.index").stat().st_mtime_ns
    assert run(IndexSettings(out=uri, merge=str(out))) == first
    assert (out / "image.index").stat().st_mtime_ns == written
    path = tmp_path / "index/shard_00001/index.faiss"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"shard_00001/index.faiss has sha256 \w{12}, its manifest says"):
        merge_index(uri, str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_the_command_merges_an_index_that_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = build(tmp_path)
    assert cli.main(["index", "--out", uri, "--merge", str(tmp_path / "merged")]) == 0
    assert '"rows": 231' in capsys.readouterr().out
    assert cli.main(["index", "--out", str(tmp_path / "none"), "--merge", str(tmp_path / "m")]) == 1
    assert "none" in capsys.readouterr().err
    with pytest.raises(StaleOutputError, match="output of another stage"):
        merge_index(uri, uri)
