"""Ready embeddings in the field's layouts become the same folder, aligned, unit and counted."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipgap_ray.config.embed import ImportSettings
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.stages import imports

MODEL = {"model": "ViT-B-32", "pretrained": "openai"}


def _rows(n, d=8, seed=0):
    rows = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _clip_retrieval(folder, parts, width):
    """Write clip-retrieval's layout with `width` digits in the file names."""
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for number, rows in enumerate(parts):
        digits = f"{number:0{width}d}"
        np.save(folder / "img_emb" / f"img_emb_{digits}.npy", rows.astype(np.float16))
        np.save(folder / "text_emb" / f"text_emb_{digits}.npy", rows.astype(np.float16))
        table = pa.table(
            {
                "image_path": [f"{number}{i:04d}" for i in range(len(rows))],
                "caption": [f"caption {i}" for i in range(len(rows))],
                "url": [f"http://example.org/{number}/{i}" for i in range(len(rows))],
            }
        )
        pq.write_table(table, folder / "metadata" / f"metadata_{digits}.parquet")


@pytest.mark.parametrize("width", [1, 2, 4])
def test_clip_retrieval_folder_of_any_zero_padding(tmp_path, width):
    parts = [_rows(5, seed=i) for i in range(11 if width > 1 else 3)]
    _clip_retrieval(tmp_path / "laion", parts, width)
    summary = imports.run(ImportSettings(folder=str(tmp_path / "laion"), out=str(tmp_path / "emb"), **MODEL))
    pool = EmbeddingSet.open(str(tmp_path / "emb"))
    assert summary.read == summary.kept == 5 * len(parts)
    np.testing.assert_array_equal(pool.all_images(), np.concatenate(parts).astype(np.float16))
    assert pool.metadata(1).column("image_path").to_pylist() == [f"1{i:04d}" for i in range(5)]
    assert len(set(pool.all_metadata(["uid"]).column("uid").to_pylist())) == 5 * len(parts)


def test_rows_that_are_not_unit_are_normalised_and_counted(tmp_path):
    rows = _rows(6)
    _clip_retrieval(tmp_path / "laion", [rows * np.array([[1], [3], [1], [1], [0.5], [1]])], 1)
    summary = imports.run(ImportSettings(folder=str(tmp_path / "laion"), out=str(tmp_path / "emb"), **MODEL))
    assert summary.notes == {"normalised": 2}
    found = EmbeddingSet.open(str(tmp_path / "emb")).all_images().astype(np.float32)
    np.testing.assert_allclose(found, rows, atol=1e-3)


def test_rows_that_are_not_finite_are_dropped_with_a_reason(tmp_path):
    rows = _rows(4)
    rows[2, 0] = np.nan
    _clip_retrieval(tmp_path / "laion", [rows], 1)
    summary = imports.run(ImportSettings(folder=str(tmp_path / "laion"), out=str(tmp_path / "emb"), **MODEL))
    assert (summary.read, summary.kept, summary.dropped) == (4, 3, {"not_finite": 1})
    pool = EmbeddingSet.open(str(tmp_path / "emb"))
    assert pool.metadata(0).column("row_id").to_pylist() == [0, 1, 2]


def test_datacomp_npz_beside_parquet(tmp_path):
    rows, texts = _rows(5), _rows(5, seed=1)
    buffer = io.BytesIO()
    np.savez(buffer, l14_img=rows, l14_txt=texts, b32_img=_rows(5, 4))
    (tmp_path / "dc").mkdir()
    (tmp_path / "dc" / "shard.npz").write_bytes(buffer.getvalue())
    uids = [f"{i:032x}" for i in range(5)]
    pq.write_table(pa.table({"uid": uids, "text": list("abcde")}), tmp_path / "dc" / "shard.parquet")
    imports.run(ImportSettings(folder=str(tmp_path / "dc"), out=str(tmp_path / "emb"), **MODEL))
    pool = EmbeddingSet.open(str(tmp_path / "emb"))
    assert pool.all_metadata(["uid"]).column("uid").to_pylist() == uids
    assert pool.all_metadata(["caption"]).column("caption").to_pylist() == list("abcde")
    np.testing.assert_array_equal(pool.texts(0), texts.astype(np.float16))


def test_parquet_with_a_vector_column(tmp_path):
    rows = _rows(5)
    (tmp_path / "pq").mkdir()
    table = pa.table({"key": list("vwxyz"), "vec": list(rows)})
    pq.write_table(table, tmp_path / "pq" / "a.parquet")
    imports.run(ImportSettings(folder=str(tmp_path / "pq"), out=str(tmp_path / "e"), embedding_column="vec", **MODEL))
    np.testing.assert_array_equal(EmbeddingSet.open(str(tmp_path / "e")).all_images(), rows.astype(np.float16))


def test_rows_and_metadata_that_do_not_align_are_refused(tmp_path):
    _clip_retrieval(tmp_path / "laion", [_rows(5)], 1)
    np.save(tmp_path / "laion" / "img_emb" / "img_emb_0.npy", _rows(6).astype(np.float16))
    with pytest.raises(DataError, match=r"rows \(6, 8\) beside 5 metadata rows"):
        imports.run(ImportSettings(folder=str(tmp_path / "laion"), out=str(tmp_path / "emb"), **MODEL))


def test_a_folder_without_embeddings_says_what_was_expected(tmp_path):
    with pytest.raises(ConfigError, match="holds no embeddings"):
        imports.run(ImportSettings(folder=str(tmp_path), out=str(tmp_path / "emb"), **MODEL))
