from __future__ import annotations

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipgap_ray.errors import ConfigError
from clipgap_ray.kernels import faiss_index
from clipgap_ray.kernels.topk import exact_topk


def _rows(num_rows: int, dim: int = 32, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((num_rows, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def _built(rows: np.ndarray, key: str = "Flat") -> faiss.Index:
    index = faiss_index.train_empty(key, rows.shape[1], rows, seed=0)
    faiss_index.add(index, rows)
    return index


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    num_rows=st.integers(0, 300),
    num_queries=st.integers(0, 20),
    k=st.integers(1, 40),
    copies=st.integers(1, 60),
)
def test_flat_is_the_oracle_bit_by_bit(seed: int, num_rows: int, num_queries: int, k: int, copies: int) -> None:
    base = np.repeat(_rows(num_rows, seed=seed), copies, axis=0)[:600]  # exact copies: ties wider than k
    row_ids = np.random.default_rng(seed).permutation(5000)[: len(base)].astype(np.int64)
    queries = np.concatenate([_rows(num_queries, seed=seed + 1), base[:2]])
    found = faiss_index.search(_built(base), row_ids, queries, k)
    expected = exact_topk(queries, base, row_ids, k)
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])


def test_flat_answers_do_not_depend_on_the_batch() -> None:
    base, row_ids = _rows(3000, 512), np.arange(3000)
    index, queries = _built(base), _rows(40, 512, seed=1)
    together = faiss_index.search(index, row_ids, queries, 10)
    alone = [faiss_index.search(index, row_ids, queries[i : i + 1], 10) for i in range(len(queries))]
    assert np.array_equal(together[0], np.concatenate([s for s, _ in alone]))
    assert np.array_equal(together[1], np.concatenate([i for _, i in alone]))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000), num_queries=st.integers(1, 40), k=st.integers(1, 40), share=st.floats(0, 1),
    block=st.sampled_from([7, 64, 1 << 14]),
)  # fmt: skip
def test_some_rows_only_are_the_oracle_of_these_rows(
    seed: int, num_queries: int, k: int, share: float, block: int
) -> None:
    """Few queries by FAISS's selector, many by products: the same bits."""
    base = np.repeat(_rows(150, seed=seed), 3, axis=0)
    row_ids = np.random.default_rng(seed).permutation(5000)[: len(base)].astype(np.int64)
    keep = np.random.default_rng(seed + 1).random(len(base)) < share
    queries = np.concatenate([_rows(num_queries, seed=seed + 2), base[:2]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faiss_index, "MASKED_ROWS", block)
        found = faiss_index.search(_built(base), row_ids, queries, k, keep=keep)
    expected = exact_topk(queries, base[keep], row_ids[keep], k)
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])


@pytest.mark.parametrize("key", ["IVF8,Flat", "IVF8,PQ4x4", "OPQ4_16,IVF8,PQ4x4"])
def test_cells_found_on_another_device_are_the_same(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's part (k-means' and the rows' cells) handed to a flat index of the CPU, as the GPU's would be."""
    base, row_ids = _rows(600), np.arange(600)
    expected = faiss_index.search(_built(base, key), row_ids, base[:20], 10, nprobe=8)
    asked: list[int] = []

    def flat(dim: int, metric: int) -> faiss.Index:
        asked.append(dim)
        return faiss.IndexFlatIP(dim) if metric == faiss.METRIC_INNER_PRODUCT else faiss.IndexFlatL2(dim)

    monkeypatch.setattr(faiss_index, "gpu_flat", flat)
    found = faiss_index.search(_built(base, key), row_ids, base[:20], 10, nprobe=8)
    assert asked
    assert np.array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)


def test_more_candidates_of_hnsw_find_more() -> None:
    base, row_ids = _rows(3000, 32), np.arange(3000)
    index, queries = _built(base, "HNSW4"), _rows(50, 32, seed=1)
    true_similarities, true_ids = exact_topk(queries, base, row_ids, 10)
    least, most = faiss_index.efforts(index)
    recalls = [
        faiss_index.recall_at_k(
            faiss_index.search(index, row_ids, queries, 10, effort)[1], true_ids, true_similarities, 10
        )
        for effort in (least, most)
    ]
    assert recalls[0] < recalls[1]
    assert (faiss_index.efforts(_built(base)), faiss_index.efforts(_built(base, "IVF8,Flat"))) == ((0, 0), (1, 8))


def test_queries_are_rounded_as_the_stored_rows_are() -> None:
    base = _rows(50)
    query = base[:1].astype(np.float32) * np.float32(1.0001)  # rounds back to the stored row
    similarities, row_ids = faiss_index.search(_built(base), np.arange(50), query, 1)
    assert row_ids[0, 0] == 0
    assert similarities[0, 0] == np.float32(np.sum(base[0].astype(np.float64) ** 2))


@pytest.mark.parametrize(
    "key", ["Flat", "IVF8,Flat", "IVF8,PQ4x4", "HNSW16", "IVF8,PQ4x4,Refine(SQ8)", "OPQ4_16,IVF8,PQ4x4"]
)
def test_padding_and_exclusion_hold_for_every_kind(key: str) -> None:
    base = _rows(600)
    index, row_ids = _built(base, key), np.arange(600) + (7 << 32)
    keep = np.ones(600, bool)
    keep[::2] = False
    similarities, found = faiss_index.search(index, row_ids, base[:5], 1000, nprobe=8, keep=keep)
    assert np.array_equal(found < 0, np.isneginf(similarities))
    assert (found < 0).any()
    assert not set(found[found >= 0].tolist()) & set(row_ids[::2].tolist())
    assert (np.diff(np.where(np.isneginf(similarities), -9, similarities), axis=1) <= 0).all()
    if "PQ" not in key or "Refine" in key:  # short codes alone may rank another row before the query's own
        assert faiss_index.search(index, row_ids, base[1:2], 1, nprobe=8)[1].tolist() == [[row_ids[1]]]


@pytest.mark.parametrize("key", ["Flat", "IVF8,Flat", "IVF8,PQ4x4", "HNSW16"])
@pytest.mark.parametrize("mmap", [True, False])
def test_a_written_index_answers_the_same(key: str, mmap: bool, tmp_path) -> None:  # type: ignore[no-untyped-def]
    base, row_ids = _rows(400), np.arange(400)
    index = _built(base, key)
    faiss_index.write(index, str(tmp_path / "index.faiss"))
    expected = faiss_index.search(index, row_ids, base[:7], 5, nprobe=8)
    read = faiss_index.read(str(tmp_path / "index.faiss"), mmap)
    for copy in (read, faiss_index.from_bytes(faiss_index.to_bytes(index))):
        found = faiss_index.search(copy, row_ids, base[:7], 5, nprobe=8)
        assert np.array_equal(found[0], expected[0])
        assert np.array_equal(found[1], expected[1])


def test_training_is_seeded() -> None:
    rows = _rows(800)
    first, again, other = (faiss_index.to_bytes(faiss_index.train_empty("IVF16,PQ4x4", 32, rows, s)) for s in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("key", ["Flatt", "IVF8,PQ5", "IVF-3,Flat", ""])
def test_a_malformed_key_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match="is not a FAISS factory string for 32 dims"):
        faiss_index.train_empty(key, 32, _rows(100), seed=0)


def test_more_cells_than_rows_is_an_error_with_numbers() -> None:
    with pytest.raises(ConfigError, match="'IVF64,Flat' cannot be trained on 10 rows"):
        faiss_index.train_empty("IVF64,Flat", 32, _rows(10), seed=0)


def test_the_choice_follows_rows_memory_and_recall() -> None:
    assert faiss_index.choose_key(10_000, 512, 1e9).key == "Flat"
    assert faiss_index.choose_key(2_000_000, 512, 1e10).key == "IVF4096,Flat"
    assert faiss_index.choose_key(2_000_000, 512, 1e10, min_recall=1.0).key == "Flat"
    assert faiss_index.choose_key(2_000_000, 512, 2e9).key == "IVF4096,PQ128,Refine(SQ8)"
    assert faiss_index.choose_key(2_000_000, 512, 5e8).key == "IVF4096,PQ128"
    assert "4.10 GB" in faiss_index.choose_key(2_000_000, 512, 5e8).reason
    with pytest.raises(ConfigError, match="recall 1 needs a Flat index"):
        faiss_index.choose_key(2_000_000, 512, 1e9, min_recall=1.0)


@settings(max_examples=60, deadline=None)
@given(num_rows=st.integers(1, 10**9), dim=st.sampled_from([64, 100, 512, 768]), memory=st.floats(1e6, 1e12))
def test_every_choice_is_a_key_that_faiss_knows(num_rows: int, dim: int, memory: float) -> None:
    assert faiss_index.training_rows(faiss_index.choose_key(num_rows, dim, memory).key, dim) >= 0


def test_recall_counts_ties_at_the_boundary_as_found() -> None:
    truth = np.array([[1, 2, 3, 4]]), np.array([[0.9, 0.8, 0.7, 0.7]])
    assert faiss_index.recall_at_k(np.array([[1, 2, 4]]), *truth, k=3) == 1.0
    assert faiss_index.recall_at_k(np.array([[1, 2, 9]]), *truth, k=3) == pytest.approx(2 / 3)
    assert faiss_index.recall_at_k(np.array([[1, -1, -1]]), np.array([[1, -1]]), np.array([[0.9, -np.inf]]), k=3) == 1.0
    assert faiss_index.recall_at_k(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros((0, 3)), k=3) == 1.0
