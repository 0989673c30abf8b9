from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipgap_ray.kernels.topk import block_topk, exact_topk, merge_topk


def _problem(draw_seed: int, num_rows: int, num_queries: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # Small integers make many exact ties, as near-duplicates do.
    rng = np.random.default_rng(draw_seed)
    base = rng.integers(-1, 2, (num_rows, 3)).astype(np.float16)
    queries = rng.integers(-1, 2, (num_queries, 3)).astype(np.float16)
    return queries, base, rng.permutation(10 * num_rows + 1)[:num_rows].astype(np.int64)


def _by_hand(queries: np.ndarray, base: np.ndarray, row_ids: np.ndarray, k: int) -> list[list[tuple[float, int]]]:
    answers = []
    for query in queries.astype(float):
        scored = sorted((-float(query @ row), int(i)) for row, i in zip(base.astype(float), row_ids, strict=True))
        found = [(-s, i) for s, i in scored[:k]]
        answers.append(found + [(-np.inf, -1)] * (k - len(found)))
    return answers


def _pairs(answer: tuple[np.ndarray, np.ndarray]) -> list[list[tuple[float, int]]]:
    return [list(zip(map(float, s), map(int, i), strict=True)) for s, i in zip(*answer, strict=True)]


problems = {
    "seed": st.integers(0, 10_000),
    "num_rows": st.integers(0, 40),
    "num_queries": st.integers(0, 4),
    "k": st.integers(1, 50),
}


@settings(max_examples=150, deadline=None)
@given(**problems)
def test_exact_topk_is_a_sort_by_similarity_then_row_id(seed: int, num_rows: int, num_queries: int, k: int) -> None:
    queries, base, row_ids = _problem(seed, num_rows, num_queries)
    assert _pairs(exact_topk(queries, base, row_ids, k)) == _by_hand(queries, base, row_ids, k)


@settings(max_examples=150, deadline=None)
@given(**problems, cuts=st.lists(st.integers(0, 40), max_size=6))
def test_any_division_into_shards_merges_to_the_same_answer(
    seed: int, num_rows: int, num_queries: int, k: int, cuts: list[int]
) -> None:
    queries, base, row_ids = _problem(seed, num_rows, num_queries)
    shards = np.split(np.arange(num_rows), sorted(min(cut, num_rows) for cut in cuts))
    parts = [exact_topk(queries, base[rows], row_ids[rows], k) for rows in shards]
    whole = exact_topk(queries, base, row_ids, k)
    for merged in (merge_topk(parts, k), merge_topk(parts[::-1], k), merge_topk([merge_topk(parts, k)], k)):
        assert np.array_equal(merged[0], whole[0])
        assert np.array_equal(merged[1], whole[1])


def test_result_has_the_contracts_types_and_padding() -> None:
    part = np.array([[0.5]], np.float32), np.array([[7]])
    similarities, row_ids = merge_topk([part, (np.zeros((1, 0), np.float32), np.zeros((1, 0), np.int64))], 3)
    assert similarities.dtype == np.float32
    assert row_ids.dtype == np.int64
    assert similarities.tolist() == [[0.5, -np.inf, -np.inf]]
    assert row_ids.tolist() == [[7, -1, -1]]


def test_a_missing_id_never_outranks_a_row_whatever_its_similarity() -> None:
    similarities, row_ids = merge_topk([(np.array([[3.0, -0.5]], np.float32), np.array([[-1, 9]]))], 2)
    assert row_ids.tolist() == [[9, -1]]
    assert similarities.tolist() == [[-0.5, -np.inf]]


def test_arguments_are_not_modified() -> None:
    similarities, row_ids = np.array([[1.0, 2.0]], np.float32), np.array([[-1, 5]])
    merge_topk([(similarities, row_ids)], 2)
    assert similarities.tolist() == [[1.0, 2.0]]
    assert row_ids.tolist() == [[-1, 5]]


@pytest.mark.parametrize(("parts", "k"), [([], 3), ([(np.zeros((1, 1)), np.zeros((1, 1), np.int64))], 0)])
def test_nothing_to_merge_is_an_error(parts: list, k: int) -> None:
    with pytest.raises(ValueError, match="at least one part and k >= 1"):
        merge_topk(parts, k)


def test_block_selection_keeps_every_tie_at_the_boundary() -> None:
    # 100 equal rows: selecting by position would return any three of them.
    row_ids = np.arange(100, dtype=np.int64)[::-1].copy()
    assert block_topk(np.ones((2, 100), np.float32), row_ids, 3)[1].tolist() == [[0, 1, 2], [0, 1, 2]]
