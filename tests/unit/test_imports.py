"""Ready embeddings in the field's layouts become the same folder, aligned, unit and counted."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipgap_ray import filesystems, store
from clipgap_ray.config.embed import ImportSettings
from clipgap_ray.embeddings import EmbeddingSet, check_same_encoder, part_file
from clipgap_ray.errors import ConfigError, DataError, IndexMismatchError
from clipgap_ray.stages import imports
from tests import s3_server

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


def test_files_that_fit_are_linked_and_others_are_written(tmp_path):
    whole, odd = _rows(5), _rows(5, seed=1)
    _clip_retrieval(tmp_path / "laion", [whole, odd, whole], 1)
    images = tmp_path / "laion" / "img_emb"
    np.save(images / "img_emb_1.npy", odd)  # float32
    np.save(images / "img_emb_2.npy", (2 * whole).astype(np.float16))  # not unit
    out = tmp_path / "emb"
    imports.run(ImportSettings(folder=str(tmp_path / "laion"), out=str(out), **MODEL))
    linked = [(out / "img_emb" / f"img_emb_{i:05d}.npy").samefile(images / f"img_emb_{i}.npy") for i in range(3)]
    assert linked == [True, False, False]
    assert (out / "text_emb/text_emb_00000.npy").samefile(tmp_path / "laion/text_emb/text_emb_0.npy")
    pool = EmbeddingSet.open(str(out))
    np.testing.assert_array_equal(pool.all_images(), np.concatenate([whole, odd, whole]).astype(np.float16))
    for part in pool.parts:
        for kind, content in part.files.items():
            assert store.sha256(store.read_bytes(str(out / part_file(kind, part.number)))) == content
    assert not [name for name in (out / "img_emb").iterdir() if name.name.endswith(".tmp")]


def test_text_rows_without_a_number_become_the_layouts_zero_row(tmp_path):
    rows = _rows(4)
    _clip_retrieval(tmp_path / "laion", [rows], 1)
    texts = rows.copy()
    texts[1], texts[2] = np.nan, 0
    np.save(tmp_path / "laion" / "text_emb" / "text_emb_0.npy", texts.astype(np.float16))
    imports.run(ImportSettings(folder=str(tmp_path / "laion"), out=str(tmp_path / "emb"), **MODEL))
    found = np.asarray(EmbeddingSet.open(str(tmp_path / "emb")).texts(0))
    assert [bool(row.any()) for row in found] == [True, False, False, True]
    assert np.isfinite(found).all()


def test_text_rows_that_do_not_fit_are_refused(tmp_path):
    _clip_retrieval(tmp_path / "laion", [_rows(5), _rows(5)], 1)
    texts = tmp_path / "laion" / "text_emb"
    np.save(texts / "text_emb_1.npy", _rows(4).astype(np.float16))
    with pytest.raises(DataError, match=r"text rows \(4, 8\) beside image rows \(5, 8\)"):
        imports.run(ImportSettings(folder=str(tmp_path / "laion"), out=str(tmp_path / "a"), **MODEL))
    (texts / "text_emb_1.npy").unlink()
    with pytest.raises(DataError, match="lacks text rows, the first file has them"):
        imports.run(ImportSettings(folder=str(tmp_path / "laion"), out=str(tmp_path / "b"), **MODEL))


def test_datacomp_without_text_rows_says_so(tmp_path):
    (tmp_path / "dc").mkdir()
    np.savez(tmp_path / "dc" / "shard.npz", b32_img=_rows(5, 4).astype(np.float16))
    pq.write_table(pa.table({"uid": [f"{i:032x}" for i in range(5)]}), tmp_path / "dc" / "shard.parquet")
    words = {"folder": str(tmp_path / "dc"), "out": str(tmp_path / "emb"), "embedding_column": "b32", **MODEL}
    imports.run(ImportSettings(**words))
    pool = EmbeddingSet.open(str(tmp_path / "emb"))
    assert (pool.dim, pool.manifest["text"]) == (4, False)
    assert not (tmp_path / "emb" / "text_emb").exists()


def test_rows_of_a_named_encoder_meet_rows_that_it_embedded(tmp_path):
    """LAION's rows came from clip-retrieval's ViT-B/32; a user embeds a test set with open_clip's name for it."""
    _clip_retrieval(tmp_path / "laion", [_rows(5)], 1)
    words = {"folder": str(tmp_path / "laion"), "out": str(tmp_path / "emb")}
    imports.run(ImportSettings(**words, model="ViT-B/32", pretrained=""))
    ours = EmbeddingSet.open(str(tmp_path / "emb")).encoder
    embedded = {
        "model": "ViT-B-32-quickgelu", "pretrained": "openai", "weights_sha256": "c0ffee", "quick_gelu": True,
        "preprocess": {"size": 224}, "crop_border": 0, "dim": 8,
    }  # fmt: skip
    check_same_encoder(ours, embedded, ("the pool", "the test"))
    check_same_encoder(embedded, ours, ("the test", "the pool"))
    for field, value in (("model", "ViT-B-32"), ("pretrained", "laion400m_e32"), ("dim", 16)):
        with pytest.raises(IndexMismatchError, match=f"{field} is "):
            check_same_encoder(ours, {**embedded, field: value}, ("the pool", "the test"))


def test_a_folder_without_embeddings_says_what_was_expected(tmp_path):
    with pytest.raises(ConfigError, match="holds no embeddings"):
        imports.run(ImportSettings(folder=str(tmp_path), out=str(tmp_path / "emb"), **MODEL))


def test_a_folder_on_an_s3_server_is_imported_to_it(tmp_path, monkeypatch):
    for name, value in s3_server.CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    _clip_retrieval(tmp_path / "laion", [_rows(5), _rows(4, seed=1)], 4)
    before = filesystems.options()
    with s3_server.running() as server:
        for file in (tmp_path / "laion").rglob("*.*"):
            server.put("pool", str(file.relative_to(tmp_path)), file.read_bytes())
        storage = {"endpoint_url": server.url}
        summary = imports.run(ImportSettings(folder="s3://pool/laion", out="s3://pool/emb", storage=storage, **MODEL))
        found = EmbeddingSet.open("s3://pool/emb").all_images()
    filesystems.configure(before)
    assert summary.kept == 9
    np.testing.assert_array_equal(found, np.concatenate([_rows(5), _rows(4, seed=1)]).astype(np.float16))
