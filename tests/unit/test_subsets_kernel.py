"""Set algebra on sorted uid arrays equals Python's sets, keeps its laws, and takes 16 bytes per uid."""

from __future__ import annotations

import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from clipgap_ray import schema
from clipgap_ray.kernels import subsets

# Few values of both words, so that equal first words and repeats are common; large ones for unsigned order.
WORD = st.sampled_from([0, 1, 2, 2**63 - 1, 2**63, 2**64 - 1])
PAIRS = st.lists(st.tuples(WORD, WORD), max_size=40)
MEMORY_PER_UID_BYTES = 17.0  # 16 for the uid, and what a block of look-ups costs


def words(pairs: list[tuple[int, int]]) -> np.ndarray:
    return np.array(pairs, schema.UID).reshape(-1)


def as_set(uids: np.ndarray) -> set[tuple[int, int]]:
    """The slow twin; it also demands that the array is sorted and holds every uid once."""
    pairs = [(int(high), int(low)) for high, low in uids]
    assert uids.dtype == schema.UID
    assert pairs == sorted(set(pairs))
    return set(pairs)


@given(PAIRS)
def test_a_subset_is_sorted_and_unique(pairs: list[tuple[int, int]]) -> None:
    given_words = words(pairs)
    before = given_words.copy()
    subset = subsets.sorted_unique(given_words)
    assert as_set(subset) == set(pairs)
    assert subsets.is_subset(given_words) == (pairs == sorted(set(pairs)))
    assert np.array_equal(given_words, before)
    assert subsets.sorted_unique(subset) is subset


@given(PAIRS, PAIRS)
def test_algebra_equals_python_sets(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    first, second = subsets.sorted_unique(words(a)), subsets.sorted_unique(words(b))
    assert as_set(subsets.intersection(first, second)) == set(a) & set(b)
    assert as_set(subsets.union(first, second)) == set(a) | set(b)
    assert as_set(subsets.difference(first, second)) == set(a) - set(b)


@given(PAIRS, PAIRS, PAIRS)
def test_laws(a: list[tuple[int, int]], b: list[tuple[int, int]], c: list[tuple[int, int]]) -> None:
    x, y, z = (subsets.sorted_unique(words(pairs)) for pairs in (a, b, c))
    both, either, minus = subsets.intersection, subsets.union, subsets.difference
    for operation in (both, either):
        assert np.array_equal(operation(x, y), operation(y, x))
        assert np.array_equal(operation(operation(x, y), z), operation(x, operation(y, z)))
        assert np.array_equal(operation(x, x), x)
    assert np.array_equal(both(x, either(y, z)), either(both(x, y), both(x, z)))
    assert np.array_equal(minus(x, either(y, z)), minus(minus(x, y), z))
    assert np.array_equal(either(minus(x, y), both(x, y)), x)
    assert len(either(x, y)) == len(x) + len(y) - len(both(x, y))


@given(PAIRS, PAIRS)
def test_find_gives_the_position(a: list[tuple[int, int]], looked_up: list[tuple[int, int]]) -> None:
    subset = subsets.sorted_unique(words(a))
    places = {pair: at for at, pair in enumerate(sorted(set(a)))}
    assert subsets.find(subset, words(looked_up)).tolist() == [places.get(pair, -1) for pair in looked_up]
    there = [pair in places for pair in looked_up]
    assert subsets.contains(subset, words(looked_up)).tolist() == there
    assert [subsets.contains_one(subset, *pair) for pair in looked_up] == there


def test_many_uids_of_one_first_word_are_halved_not_walked() -> None:
    subset = np.zeros(1 << 16, schema.UID)
    subset["f1"] = 2 * np.arange(len(subset), dtype=np.uint64)
    asked = np.zeros(3 * subsets.BLOCK // 2, schema.UID)  # more than a block
    asked["f1"] = np.random.default_rng(0).integers(0, 2 * len(subset) + 10, len(asked))
    found = subsets.find(subset, asked)
    there = (asked["f1"] % 2 == 0) & (asked["f1"] < 2 * len(subset))
    assert np.array_equal(found, np.where(there, asked["f1"].astype(np.int64) // 2, -1))


def test_membership_takes_16_bytes_per_uid() -> None:
    """Defect 16: the paper's code held a Python set, 59 bytes per id, in every worker."""
    rng = np.random.default_rng(1)
    tracemalloc.start()
    try:
        subset = np.empty(4_000_000, schema.UID)
        for word in ("f0", "f1"):
            for start in range(0, len(subset), 1 << 16):
                block = subset[word][start : start + (1 << 16)]
                block[:] = rng.integers(0, 2**63, len(block), np.uint64)
        subset["f0"].sort()
        assert tracemalloc.get_traced_memory()[0] < MEMORY_PER_UID_BYTES * len(subset)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        some = subset[:: len(subset) // 10_000]  # one shard's worth of samples
        assert subsets.contains(subset, some).all()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak / len(subset) < MEMORY_PER_UID_BYTES
    assert peak - before < len(subset)  # looking up adds less than a byte per uid of the subset
