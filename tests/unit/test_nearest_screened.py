"""The pass by a rough product: the same maxima and lists as the definitions, and a reach that holds."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipgap_ray.kernels import nearest, nearest_screened
from clipgap_ray.kernels.nearest_loops import ROUNDED
from clipgap_ray.kernels.nearest_screened import ScreenedPass
from clipgap_ray.kernels.vectors import error_bound
from tests import made, twins

ROWS = st.sampled_from([made.unit_rows, made.sign_rows])  # sign_rows: almost everything ties


def queries_of(sets: list[np.ndarray], tau: list[np.ndarray] | None) -> nearest.Queries:
    return nearest.Queries.stack(sets, [np.arange(len(rows), dtype=np.int64) for rows in sets], tau)


def through(one: nearest.Pass, rows: np.ndarray, ids: np.ndarray, cuts: list[int]) -> nearest.PoolScores:
    """Feed a pass in portions."""
    bounds = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    portions = [one.feed(rows[a:b], ids[a:b]) for a, b in itertools.pairwise(bounds)]
    names = ("m", "arg_m", "margin", "arg_margin")
    return nearest.PoolScores(*(np.concatenate([getattr(part, name) for part in portions]) for name in names))


@given(
    num_rows=st.integers(0, 90), counts=st.lists(st.integers(0, 70), min_size=1, max_size=3), k=st.integers(1, 5),
    dim=st.sampled_from([16, 40]), seed=st.integers(0, 9_999), cuts=st.lists(st.integers(0, 90), max_size=3), make=ROWS,
    columns=st.sampled_from([23, 8192]),
)  # fmt: skip
def test_portions_equal_the_definitions(
    num_rows: int, counts: list[int], k: int, dim: int, seed: int, cuts: list[int], make: object, columns: int
) -> None:
    rows = make(num_rows, dim, seed)  # type: ignore[operator]
    ids = np.random.default_rng(seed).permutation(num_rows).astype(np.int64) + (3 << 32)
    sets = [make(count, dim, seed + 1 + i) for i, count in enumerate(counts)]  # type: ignore[operator]
    tau = [np.random.default_rng(seed + i).uniform(-0.2, 0.6, count) for i, count in enumerate(counts)]
    queries = queries_of(sets, tau)
    one = ScreenedPass(queries, k)
    one.block_rows, one.begin_at, one.block_columns = 7, 1, columns
    scores, found = through(one, rows, ids, cuts), one.found()
    own = twins.similarities(rows, queries.rows) if num_rows and len(queries.rows) else np.zeros((num_rows, 0))
    for segment, test in enumerate(sets):
        if not len(test):
            assert (scores.arg_m[:, segment] == -1).all()
            continue
        if not num_rows:
            continue
        m, margin = twins.pool_scores(rows, test, tau[segment])
        assert np.abs(scores.m[:, segment] - m).max() <= one.bound
        assert np.abs(scores.margin[:, segment] - margin).max() <= 2 * one.bound
        at, row = queries.offsets[segment : segment + 2], np.arange(num_rows)
        for arg in (scores.arg_m[:, segment], scores.arg_margin[:, segment]):
            assert ((arg >= at[0]) & (arg < at[1])).all()
        assert (own[row, scores.arg_m[:, segment]] >= m - 2 * one.bound).all()
        assert ((own - queries.tau)[row, scores.arg_margin[:, segment]] >= margin - 4 * one.bound).all()
    if len(queries.rows):
        best, best_id = twins.nearest(queries.rows, rows, ids, k)
        assert np.array_equal(found.best, best[:, 0])
        assert np.array_equal(found.best_id, best_id[:, 0])
        finite = np.isfinite(best)
        assert np.array_equal(found.row_ids >= 0, finite)
        assert np.abs(found.similarities[finite] - best[finite]).max(initial=0) <= one.bound


@pytest.mark.parametrize("dim", [64, 512])
def test_many_rows_are_decided_by_few_exact_sums(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first block, the truth rounded to float32; also of rows that are queries, and near-copies of them."""
    rows = made.unit_rows(2500, dim, 1)
    near = rows[1000:1400].astype(np.float32)
    near[:, :4] += np.random.default_rng(2).uniform(-1e-3, 1e-3, (400, 4))
    sets = [made.unit_rows(700, dim, 3), np.concatenate([rows[1000:1400], near.astype(np.float16)])]
    tau = [np.random.default_rng(4).uniform(0.1, 0.3, len(test)) for test in sets]
    queries, ids = queries_of(sets, tau), np.arange(len(rows), dtype=np.int64)
    plain, screened = nearest.Pass(queries, 3), ScreenedPass(queries, 3)
    plain.feed(rows, ids)
    folded = []
    fold = nearest_screened.fold_screened
    monkeypatch.setattr(nearest_screened, "fold_screened", lambda *all_: folded.append(len(all_[0])) or fold(*all_))
    scores = screened.feed(rows, ids)
    assert folded == [512, 512, 512, 452]
    own, later = twins.similarities(rows, queries.rows), slice(512, None)
    for segment, (first, last) in enumerate(itertools.pairwise(queries.offsets)):
        for values, arg, truth in (
            (scores.m, scores.arg_m, own[:, first:last]),
            (scores.margin, scores.arg_margin, (own - queries.tau)[:, first:last]),
        ):
            assert np.array_equal(values[later, segment], truth[later].max(axis=1).astype(np.float32))
            assert np.array_equal(arg[later, segment], truth[later].argmax(axis=1) + first)
    assert np.array_equal(screened.found().best, plain.found().best)
    assert np.array_equal(screened.found().best_id, plain.found().best_id)


@pytest.mark.parametrize("dim", [16, 512, 1024])
@pytest.mark.parametrize("make", [made.unit_rows, made.sign_rows])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_rough_similarity_is_within_reach_of_the_truth(dim: int, make: object, scale: float) -> None:
    queries = (make(300, dim, 1) * np.float16(scale)).astype(np.float16)  # type: ignore[operator]
    rows = np.concatenate([make(200, dim, 2), queries[:50], -queries[:50]])  # type: ignore[operator]
    one = ScreenedPass(queries_of([queries], None), 1)
    rounded, reach = one.rounded(torch.from_numpy(rows.astype(np.float32)))
    product = rounded @ torch.from_numpy(queries.astype(np.float32)).bfloat16().T
    rough, truth = product.double().numpy(), twins.similarities(rows, queries)
    off = np.abs(rough - truth)
    assert (off <= reach.double().numpy()[:, None] + np.float64(ROUNDED) * np.abs(rough)).all()
    if make is made.unit_rows:  # signs may be numbers that bfloat16 has
        assert off.max() > 4 * error_bound(dim)


def test_a_set_without_thresholds_has_maxima_and_no_margin() -> None:
    rows, ids = made.unit_rows(60, 16, 0), np.arange(60, dtype=np.int64)
    sets = [made.unit_rows(40, 16, 1), made.unit_rows(40, 16, 2)]
    tau = [np.full(40, np.nan), np.full(40, 0.2)]
    one, plain = ScreenedPass(queries_of(sets, tau), 1), nearest.Pass(queries_of(sets, tau), 1)
    one.block_rows, one.begin_at = 16, 1
    scores, expected = one.feed(rows, ids), plain.feed(rows, ids)
    assert np.isnan(scores.margin[:, 0]).all()
    assert np.allclose(scores.margin[:, 1], expected.margin[:, 1], atol=2 * one.bound, rtol=0)
    for name in ("arg_m", "arg_margin"):
        assert np.array_equal(getattr(scores, name), getattr(expected, name))


def test_it_is_chosen_for_many_queries_where_the_processor_has_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (queries_of([made.unit_rows(count, 64, 0)], None) for count in (16, nearest.SCREEN_FROM // 64))
    for has, chosen in ((True, ScreenedPass), (False, nearest.Pass)):
        monkeypatch.setattr(nearest_screened, "supported", lambda has=has: has)
        assert type(nearest.begin(many, 1)) is chosen
        assert type(nearest.begin(few, 1)) is nearest.Pass
        assert type(nearest.begin(many, 1, violations=True)) is nearest.Pass


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="nothing else to ask what the processor can do")
def test_what_the_processor_has_is_what_the_kernel_says() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    assert nearest_screened.supported() == ("avx512_bf16" in flags or "amx_bf16" in flags)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_no_number_harms_no_other(bad: float) -> None:
    rows, ids = made.unit_rows(60, 16, 0), np.arange(60, dtype=np.int64)
    rows[33, 3] = bad
    queries = queries_of([made.unit_rows(40, 16, 1)], [np.full(40, 0.2)])
    one, plain = ScreenedPass(queries, 1), nearest.Pass(queries, 1)
    one.block_rows, one.begin_at = 16, 1
    with np.errstate(invalid="ignore"):
        scores, expected = one.feed(rows, ids), plain.feed(rows, ids)
    others = np.arange(60) != 33
    assert np.array_equal(scores.arg_m[others], expected.arg_m[others])
    assert np.allclose(scores.m[others], expected.m[others], atol=2 * one.bound, rtol=0)
