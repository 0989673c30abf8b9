"""Equalise: ceilings by hand, and the rounds against a slow twin that knows the whole pool."""

import numpy as np
import pytest

from clipgap_ray.kernels import equalise


def test_ceilings_are_the_other_group_s_quantile_at_the_same_rank() -> None:
    s = np.array([0.9, 0.5, 0.6, 0.2, 0.3])
    class_at, second = np.array([0, 0, 0, 0, -1]), np.array([False, False, True, True, True])
    # Ranks 1/4 and 3/4 in both groups: the lower faces the lower, the higher the higher.
    assert equalise.ceilings(s, class_at, second, 0.1) == pytest.approx([0.7, 0.3, 1.0, 0.6, np.inf])
    assert equalise.largest_difference(s, class_at, second) == pytest.approx(0.3)


def test_groups_of_unequal_size_are_compared_at_mid_ranks() -> None:
    s = np.array([0.0, 1.0, 0.5])
    second = np.array([False, False, True])
    found = equalise.ceilings(s, np.zeros(3, int), second, 0.0)
    assert found == pytest.approx([0.5, 0.5, 0.5])  # one photo stands at 1/2: the middle of 0 and 1


def test_photos_of_other_groups_and_lonely_classes_are_not_constrained() -> None:
    class_at, second = equalise.constrained_classes(
        ["a", "a", "a", "b", "c", "c"], ["x", "y", "z", "x", "x", "y"], ("x", "y")
    )
    assert class_at.tolist() == [0, 0, -1, -1, 1, 1]
    assert second.tolist() == [False, True, False, False, False, True]


def slow_prune(similarity: np.ndarray, class_at: np.ndarray, second: np.ndarray, slack: float) -> list[bool]:
    """All rows against all photos, a photo at a time, quantiles from the definition."""
    keep = [True] * similarity.shape[1]
    while True:
        s = [max([v for v, k in zip(row, keep, strict=True) if k], default=-1.0) for row in similarity]
        gone = set()
        for x in range(len(s)):
            if class_at[x] < 0:
                continue
            own = sorted(y for y in range(len(s)) if class_at[y] == class_at[x] and second[y] == second[x])
            other = sorted(s[y] for y in range(len(s)) if class_at[y] == class_at[x] and second[y] != second[x])
            rank = (sorted(own, key=lambda y: (s[y], y)).index(x) + 0.5) / len(own)
            place = min(max(rank * len(other) - 0.5, 0), len(other) - 1)
            low = int(place)
            high = min(low + 1, len(other) - 1)
            ceiling = other[low] + (place - low) * (other[high] - other[low]) + slack
            gone |= {row for row, v in enumerate(similarity[x]) if keep[row] and v > ceiling}
        if not gone:
            return keep
        for row in gone:
            keep[row] = False


@pytest.mark.parametrize("seed", range(4))
def test_the_rounds_equal_a_slow_twin_and_keep_the_promise(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, rows, slack = 24, 300, 0.03
    class_at, second = rng.integers(-1, 2, n), rng.random(n) < 0.4
    similarity = np.round(rng.random((n, rows)) * np.where(second, 0.85, 1.0)[:, None], 3)
    query, items = np.nonzero(similarity > -1)
    order = np.argsort(items, kind="stable")
    edges = items[order], query[order], similarity[query, items][order]
    state = equalise.prune(np.ones(rows, bool), edges, np.full(n, -1.0), class_at, second, slack)
    assert state.keep.tolist() == slow_prune(similarity, class_at, second, slack)
    assert not len(state.starved)
    assert 0 < state.keep.sum() < rows
    nearest = similarity[:, state.keep].max(axis=1)
    assert equalise.largest_difference(nearest, class_at, second) <= slack + 1e-12


@pytest.mark.parametrize(("floor", "kept", "rounds"), [(0.7, [1, 1, 1], 0), (0.35, [0, 0, 1], 1)])
def test_a_photo_whose_edges_end_too_high_is_named_before_anything_goes(
    floor: float, kept: list[int], rounds: int
) -> None:
    """Photo 0 may come as near as 0.41: with edges down to 0.7 that cannot be decided; else both its rows go."""
    keep = np.ones(3, bool)
    edges = np.array([0, 1, 2]), np.array([0, 0, 1]), np.array([0.9, 0.8, 0.4])
    floors, second = np.array([floor, 0.3]), np.array([False, True])
    state = equalise.prune(keep, edges, floors, np.zeros(2, int), second, 0.01)
    assert 0 in state.starved.tolist()
    assert (state.keep.tolist(), state.rounds) == ([bool(k) for k in kept], rounds)
    assert keep.all()
