"""Edges are exact at the threshold; the three rules give the known answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipgap_ray.kernels import duplicates
from tests import made, twins

SEEDS = st.integers(0, 10_000)
GRAPHS = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.sets(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda e: e[0] != e[1]), max_size=25),
    )
)

PAIRS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)))


def edge_set(found: tuple[np.ndarray, np.ndarray, np.ndarray]) -> set[tuple[int, int]]:
    pairs = list(zip(found[0].tolist(), found[1].tolist(), strict=True))
    assert len(pairs) == len(set(pairs))  # every pair once
    return set(pairs)


@pytest.mark.parametrize("block", [3, 2048])
@given(seed=SEEDS, num_rows=st.integers(0, 25), threshold=st.sampled_from([-0.25, 0.0, 0.25, 0.5, 1.0]))
def test_edges_equal_brute_force_with_many_pairs_exactly_at_the_threshold(
    block: int, seed: int, num_rows: int, threshold: float
) -> None:
    rows = made.sign_rows(num_rows, 16, seed)  # similarities are multiples of 1/8: ties at every threshold
    table = twins.similarities(rows, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "BLOCK_ROWS", block)
        patch.setattr(duplicates, "BLOCK_COLUMNS", block + 1)
        found = duplicates.edges(rows, rows, threshold, same=True)
        across = duplicates.edges(rows[:7], rows[7:], threshold, same=False)
    assert edge_set(found) == {
        (i, j) for i in range(num_rows) for j in range(i + 1, num_rows) if table[i, j] >= threshold
    }
    assert np.array_equal(found[2], table[found[0], found[1]])
    assert edge_set(across) == {(i, j - 7) for i in range(min(7, num_rows)) for j in range(7, num_rows)
                                if table[i, j] >= threshold}  # fmt: skip


@given(seed=SEEDS)
def test_a_pair_exactly_at_the_threshold_is_a_duplicate_and_one_step_below_is_not(seed: int) -> None:
    rows = made.unit_rows(2, 512, seed)
    s = float(twins.similarities(rows[:1], rows[1:])[0, 0])
    assert edge_set(duplicates.edges(rows, rows, s, same=True)) == {(0, 1)}
    assert edge_set(duplicates.edges(rows, rows, float(np.nextafter(s, 2)), same=True)) == set()


def test_the_chain_of_three_has_three_known_answers() -> None:
    """a ~ b ~ c, a and c apart (train_test_similarity.md 2.3)."""
    first, second, similarity = np.array([0, 1]), np.array([1, 2]), np.array([0.9, 0.9])
    answers = {
        rule: duplicates.resolve(3, first, second, similarity, rule) for rule in ("semdedup", "greedy", "components")
    }
    assert answers["semdedup"][0].tolist() == [True, False, False]
    assert answers["semdedup"][1].tolist() == [0, 0, 1]
    assert answers["greedy"][0].tolist() == [True, False, True]
    assert answers["greedy"][1].tolist() == [0, 0, 2]
    assert answers["components"][0].tolist() == [True, False, False]
    assert answers["components"][1].tolist() == [0, 0, 0]


def test_six_in_a_row_keep_one_and_three_as_the_released_code_does() -> None:
    first = np.arange(5)
    keeps = {
        rule: duplicates.resolve(6, first, first + 1, np.full(5, 0.9), rule)[0].sum() for rule in ("semdedup", "greedy")
    }
    assert keeps == {"semdedup": 1, "greedy": 3}


def arrays(edges: set[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    first = np.array([a for a, _ in edges], np.int64)
    second = np.array([b for _, b in edges], np.int64)
    return first, second, np.array([((a * 7 + b * 7 + a * b) % 10) / 10 for a, b in edges])


@given(graph=GRAPHS)
def test_rules_equal_their_slow_twins_on_any_graph(graph: tuple[int, set[tuple[int, int]]]) -> None:
    num_rows, edges = graph
    first, second, similarity = arrays(edges)
    keep, stands = duplicates.resolve(num_rows, first, second, similarity, "components")
    assert stands.tolist() == twins.components(num_rows, edges)
    assert keep.tolist() == [label == row for row, label in enumerate(stands.tolist())]
    keep, _ = duplicates.resolve(num_rows, first, second, similarity, "semdedup")
    assert keep.tolist() == twins.semdedup(num_rows, edges)
    keep, stands = duplicates.resolve(num_rows, first, second, similarity, "greedy")
    assert keep.tolist() == twins.greedy(num_rows, edges)
    value = dict(zip(((min(e), max(e)) for e in edges), similarity, strict=False))
    for row, other in enumerate(stands.tolist()):
        if keep[row]:
            assert other == row
            continue
        # the most alike of the kept earlier neighbours removed it, the earliest among equals
        near = [i for i in range(row) if keep[i] and (i, row) in value]
        both = {(a, b) for a, b in edges} | {(b, a) for a, b in edges}
        s = {i: max(float(v) for (a, b), v in zip(edges, similarity, strict=True) if {a, b} == {i, row}) for i in near}
        assert (row, other) in both
        assert other == min(near, key=lambda i: (-s[i], i))


@given(seed=SEEDS, threshold=st.floats(0.2, 0.9))
def test_greedy_leaves_no_close_pair_and_a_second_pass_removes_nothing(seed: int, threshold: float) -> None:
    rows = made.unit_rows(40, 4, seed)
    keep, _ = duplicates.resolve(40, *duplicates.edges(rows, rows, threshold, same=True), "greedy")
    kept = rows[keep]
    table = twins.similarities(kept, kept)
    assert (table[~np.eye(len(kept), dtype=bool)] < threshold).all()
    assert len(duplicates.edges(kept, kept, threshold, same=True)[0]) == 0
    for row in np.nonzero(~keep)[0]:  # nothing was removed without a reason
        assert (twins.similarities(rows[[row]], kept) >= threshold).any()


def authors_keep(rows: np.ndarray, eps: float) -> list[bool]:
    """deduplicate.py as released: lower triangle without diagonal, keep iff its row maximum is at most 1 - eps."""
    lower = np.tril(twins.similarities(rows, rows), -1)
    return [bool(row.max() <= 1 - eps) for row in lower]


@given(seed=SEEDS, eps=st.floats(0.05, 0.6))
def test_semdedup_in_source_order_reproduces_the_authors_rule(seed: int, eps: float) -> None:
    rows = made.unit_rows(40, 4, seed)
    found = duplicates.edges(rows, rows, 1 - eps, same=True)
    keep, _ = duplicates.resolve(40, *found, "semdedup")
    assert keep.tolist() == authors_keep(rows, eps)


@given(seed=SEEDS, rule=st.sampled_from(["greedy", "semdedup", "components"]))
def test_defect_13_what_stays_depends_on_the_stated_order_and_not_on_where_rows_lie(seed: int, rule: str) -> None:
    rows, names = made.unit_rows(30, 4, seed), np.random.default_rng(seed).permutation(1000)[:30]

    def kept(positions: np.ndarray) -> set[int]:
        rank = np.empty(30, np.int64)
        rank[np.argsort(names[positions])] = np.arange(30)
        i, j, s = duplicates.edges(rows[positions], rows[positions], 0.7, same=True)
        keep, _ = duplicates.resolve(30, rank[i], rank[j], s, rule)  # type: ignore[arg-type]
        return {int(name) for name, r in zip(names[positions], rank, strict=True) if keep[r]}

    shuffled = np.random.default_rng(seed + 1).permutation(30)
    assert kept(np.arange(30)) == kept(shuffled)


@given(keys=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), max_size=20))
def test_first_equal_finds_the_first_row_with_the_same_key(keys: list[tuple[int, int]]) -> None:
    array = np.array(keys, np.uint64).reshape(len(keys), 2)
    assert duplicates.first_equal(array).tolist() == [keys.index(key) for key in keys]


def test_heads_follow_chains_to_the_row_that_stays() -> None:
    assert duplicates.heads(np.array([0, 0, 1, 2, 4, 3])).tolist() == [0, 0, 0, 0, 4, 0]


@given(graph=GRAPHS, rule=st.sampled_from(["greedy", "semdedup", "components"]))
def test_similarity_to_the_representative_is_that_of_their_edge(
    graph: tuple[int, set[tuple[int, int]]], rule: str
) -> None:
    num_rows, pairs = graph
    pairs = {(min(e), max(e)) for e in pairs}
    first, second, similarity = arrays(pairs)
    _, stands = duplicates.resolve(num_rows, first, second, similarity, rule)  # type: ignore[arg-type]
    value = dict(zip(zip(first.tolist(), second.tolist(), strict=True), similarity.tolist(), strict=True))
    found = duplicates.similarity_to(stands, second, first, similarity)
    for row, other in enumerate(stands.tolist()):
        expected = value.get((other, row), np.nan)
        assert found[row] == expected or (np.isnan(found[row]) and np.isnan(expected))


@given(truth=PAIRS, found=PAIRS)
def test_missed_pairs_are_counted_once_in_either_direction(
    truth: list[tuple[int, int]], found: list[tuple[int, int]]
) -> None:
    def columns(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        array = np.array(pairs, np.int64).reshape(len(pairs), 2)
        return array[:, 0], array[:, 1]

    expected, seen = {frozenset(p) for p in truth}, {frozenset(p) for p in found}
    assert duplicates.count_missed(6, columns(truth), columns(found)) == (len(expected), len(expected - seen))


def test_an_unknown_rule_is_refused() -> None:
    none = np.zeros(0, np.int64)
    with pytest.raises(ValueError, match="'best' is none of greedy"):
        duplicates.resolve(2, none, none, np.zeros(0), "best")  # type: ignore[arg-type]
