"""The training order: every sample once per epoch, the same for any number of workers, from any position."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipgap_ray.kernels.order import ResampledOrder, SampleOrder

COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(sum)


def triples(order: SampleOrder, start: int, stop: int) -> list[tuple[int, int, int]]:
    return list(zip(*(column.tolist() for column in order.take(start, stop)), strict=True))


@given(COUNTS, st.integers(0, 5), st.integers(1, 30))
def test_every_sample_comes_exactly_once_per_epoch(counts: list[int], seed: int, window: int) -> None:
    order = SampleOrder(np.array(counts), seed, window)
    everything = {(part, row) for part, count in enumerate(counts) for row in range(count)}
    stream = triples(order, 0, 3 * sum(counts))
    for epoch in range(3):
        own = stream[epoch * sum(counts) : (epoch + 1) * sum(counts)]
        assert {e for e, _, _ in own} == {epoch}
        assert len(own) == len(everything)
        assert {(part, row) for _, part, row in own} == everything


@given(COUNTS, st.integers(0, 5), st.integers(1, 30), st.lists(st.integers(1, 13), min_size=1, max_size=6))
def test_any_cutting_of_the_stream_gives_the_same_stream(
    counts: list[int], seed: int, window: int, lengths: list[int]
) -> None:
    whole = triples(SampleOrder(np.array(counts), seed, window), 0, sum(lengths))
    pieces, start = [], 0
    for length in lengths:
        fresh = SampleOrder(np.array(counts), seed, window)  # a worker that starts here has seen nothing before
        pieces += triples(fresh, start, start + length)
        start += length
    assert pieces == whole


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_the_world_batch_does_not_depend_on_how_many_ranks_share_it(world_size: int) -> None:
    counts, world_batch, steps = np.array([5, 0, 11, 7]), 6, 9
    reference = triples(SampleOrder(counts, 1, 8), 0, world_batch * steps)
    size = world_batch // world_size
    ranks = [SampleOrder(counts, 1, 8) for _ in range(world_size)]
    stream = [
        sample
        for step in range(steps)
        for rank, order in enumerate(ranks)
        for sample in triples(order, (step * world_size + rank) * size, (step * world_size + rank + 1) * size)
    ]
    assert stream == reference


@given(COUNTS, st.integers(0, 5), st.integers(1, 30))
def test_only_one_window_of_parts_is_open_at_a_time(counts: list[int], seed: int, window: int) -> None:
    order = SampleOrder(np.array(counts), seed, window)
    parts = [part for _, part, _ in triples(order, 0, sum(counts))]
    spans = {part: (parts.index(part), len(parts) - parts[::-1].index(part)) for part in set(parts)}
    # a window closes once it holds `window` samples, so it is no longer than that plus its last part
    assert all(last - first < window + max(counts) for first, last in spans.values())


def test_windows_hold_at_least_the_rows_asked_for_except_the_last() -> None:
    order = SampleOrder(np.full(10, 7), 0, 20)
    _, ends = order._epoch(0)
    assert ends.tolist() == [21, 42, 63, 70]
    parts = [part for _, part, _ in triples(order, 0, 70)]
    assert [len(set(parts[a:b])) for a, b in ((0, 21), (21, 42), (42, 63), (63, 70))] == [3, 3, 3, 1]


def test_epochs_seeds_and_windows_differ() -> None:
    streams = [triples(SampleOrder(np.array([40, 40]), seed, 80), 0, 160) for seed in (0, 1)]
    assert [s[1:] for s in streams[0][:80]] != [s[1:] for s in streams[0][80:]]
    assert streams[0] != streams[1]
    first = [part for _, part, _ in streams[0][:80]]
    assert first != sorted(first)
    assert first != sorted(first, reverse=True)


def test_it_pickles_without_its_caches() -> None:
    order = SampleOrder(np.array([5, 6]), 4, 3)
    expected = triples(order, 2, 30)
    data = pickle.dumps(order)
    assert triples(pickle.loads(data), 2, 30) == expected
    assert len(data) < 1_000


def test_nothing_to_order_is_an_error() -> None:
    with pytest.raises(ValueError, match="every part is empty"):
        SampleOrder(np.array([0, 0]), 0, 10)


# --- with replacement ------------------------------------------------------------------------------------


@given(COUNTS, st.integers(0, 5), st.integers(1, 30), st.lists(st.integers(1, 13), min_size=1, max_size=6))
def test_a_resampled_stream_does_not_depend_on_its_cutting_and_knows_only_samples_that_are_there(
    counts: list[int], seed: int, window: int, lengths: list[int]
) -> None:
    sizes, ones = np.array(counts), np.ones(len(counts))
    whole = triples(ResampledOrder(sizes, ones, seed, window), 0, sum(lengths))
    assert all(0 <= row < counts[part] for _, part, row in whole)
    assert [epoch for epoch, _, _ in whole] == [p // sum(counts) for p in range(sum(lengths))]
    pieces, start = [], 0
    for length in lengths:
        fresh = pickle.loads(pickle.dumps(ResampledOrder(sizes, ones, seed, window)))
        pieces += triples(fresh, start, start + length)
        start += length
    assert pieces == whole


def test_samples_are_drawn_as_often_as_their_weights_say() -> None:
    # 30 samples of weight 1 and 10 of weight 3: half of the draws each, rows of a part alike
    order = ResampledOrder(np.array([20, 10, 10]), np.array([1.0, 1.0, 3.0]), 0, 500)
    draws = 40_000
    _, parts, rows = order.take(0, draws)
    share = np.bincount(parts, minlength=3) / draws
    assert np.abs(share - [1 / 3, 1 / 6, 1 / 2]).max() < 0.02  # 80 windows of 50 parts each: sd 0.008
    assert np.abs(np.bincount(rows[parts == 2]) / draws - 0.05).max() < 0.01


def test_a_window_with_replacement_opens_few_parts() -> None:
    order = ResampledOrder(np.full(1000, 100), np.ones(1000), 0, 3000)
    _, parts, _ = order.take(3000, 6000)
    assert len(np.unique(parts)) <= 30
    with pytest.raises(ValueError, match="every part is empty"):
        ResampledOrder(np.array([0]), np.ones(1), 0, 10)
