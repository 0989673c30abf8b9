"""Exposure, common support and matching by hand."""

import numpy as np
import pytest

from clipgap_ray.kernels import decomposition, overlap
from clipgap_ray.kernels.overlap import Photos


def by_hand(first: list[float], second: list[float]) -> Photos:
    s = np.array(first + second)
    groups = ["common"] * len(first) + ["counter"] * len(second)
    return overlap.take(["a"] * len(s), groups, np.ones(len(s)), s)[0]


def test_exposure_by_hand() -> None:
    found = overlap.exposure(by_hand([0.9, 0.8], [0.8, 0.5]))
    assert found["difference"] == pytest.approx(0.2)
    assert found["auc"] == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert found["ks"] == pytest.approx(0.5)


def test_common_support_runs_from_the_larger_minimum_to_the_smaller_maximum() -> None:
    photos = by_hand([0.5, 0.6, 0.9], [0.4, 0.55, 0.7])
    assert overlap.supported(photos).tolist() == [True, True, False, False, True, True]
    assert overlap.overlap(photos)["per_group"] == {"common": pytest.approx(2 / 3), "counter": pytest.approx(2 / 3)}


def test_two_strays_are_no_support() -> None:
    near, far = np.linspace(0.5, 0.6, 98).tolist(), np.linspace(0.8, 0.9, 98).tolist()
    disjoint = by_hand([*far, 0.45, 0.46], [*near, 0.94, 0.95])
    assert overlap.overlap(disjoint)["smallest"] == 0
    one_group = by_hand([*far, *near], [*near, 0.94, 0.95])
    assert overlap.overlap(one_group)["per_group"]["common"] == pytest.approx(96 / 196)
    result = decomposition.summarise(disjoint, np.random.default_rng(0), draws=10)
    assert not result["identified"]
    assert "cannot be compared at equal similarity" in result["why_not"]
    same = by_hand(near, near)  # two groups that are alike lose their tails only
    assert overlap.overlap(same)["smallest"] == pytest.approx(94 / 98)


def test_matching_makes_the_most_and_the_closest_pairs() -> None:
    photos = by_hand([0.50, 0.52, 0.90], [0.51, 0.53, 0.10])
    reach = 0.021 / overlap.within_class_sd(photos)
    pairs = {tuple(photos.similarity[[a, b]].tolist()) for a, b in zip(*overlap.match(photos, reach), strict=True)}
    assert pairs == {(0.50, 0.51), (0.52, 0.53)}
    assert len(overlap.match(photos, 0.001)[0]) == 0


def test_take_leaves_out_other_groups_and_names_classes_without_both() -> None:
    photos, kept, left_out = overlap.take(
        ["a", "a", "b", "a"], ["common", "counter", "common", "other"], np.array([1, 0, 1, 1]), np.arange(4) / 4
    )
    assert (kept.tolist(), left_out, photos.classes) == ([0, 1], ["b"], ("a",))
    with pytest.raises(ValueError, match="groups are other"):
        overlap.take(["a"], ["other"], np.ones(1), np.ones(1))
    with pytest.raises(ValueError, match="1 of 2 photos have no finite similarity"):
        overlap.take(["a", "a"], ["common", "counter"], np.ones(2), np.array([0.1, -np.inf]))


# --- refusals ----------------------------------------------------------------------------------------------
