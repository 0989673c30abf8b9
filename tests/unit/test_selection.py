"""The null world of counteranimal.md 10.1, item 6, and section 2: no background matters, the discovery finds a drop."""

import numpy as np
import pytest

from clipgap_ray.kernels import selection

RATE, PHOTOS, CLASSES = 0.6, 100, 4000


def drops_without_effect(groups: int) -> np.ndarray:
    totals = np.full((CLASSES, groups), PHOTOS)
    hits = np.random.default_rng(groups).binomial(totals, RATE)
    return selection.class_drops(hits, totals, *selection.best_and_worst(hits, totals))


@pytest.mark.parametrize(("groups", "mean", "above"), [(2, 5.6, 0.48), (4, 10.1, 0.90), (6, 12.4, 0.98)])
def test_golden_gap_of_best_and_worst_without_any_effect(groups: int, mean: float, above: float) -> None:
    drops = 100 * drops_without_effect(groups)
    assert drops.mean() == pytest.approx(mean, abs=0.2)
    # A gap of exactly 5 points is frequent at n = 100; the printed share lies between counting none and all of them.
    assert (drops > 5 + 1e-9).mean() - 0.01 < above < (drops > 5 - 1e-9).mean() + 0.01


def test_split_half_evaluates_to_nothing_in_the_null_world() -> None:
    rng = np.random.default_rng(0)
    shape = (300, 4)
    cell = np.repeat(np.arange(shape[0] * shape[1]), PHOTOS)
    (choose, evaluate) = selection.halves(rng.random(len(cell)) < RATE, cell, shape, rng)
    assert (choose[1] == PHOTOS / 2).all()
    groups = selection.best_and_worst(*choose)
    inflated, honest = (100 * selection.class_drops(*half, *groups) for half in (choose, evaluate))
    assert inflated.mean() > 10
    assert abs(honest.mean()) < 1.96 * honest.std(ddof=1) / np.sqrt(shape[0])


def test_small_groups_take_no_part_and_equal_groups_are_two() -> None:
    hits, totals = np.array([[1, 50, 40], [30, 30, 30], [9, 1, 0]]), np.array([[1, 100, 100], [60, 60, 60], [10, 2, 0]])
    best, worst = selection.best_and_worst(hits, totals, min_photos=5)
    assert best.tolist() == [1, 0, -1]
    assert worst.tolist() == [2, 2, -1]
    assert selection.class_drops(hits, totals, best, worst) == pytest.approx([0.1, 0.0, np.nan], nan_ok=True)
