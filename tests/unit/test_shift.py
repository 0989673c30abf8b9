"""Group shift: the golden numbers of counteranimal.md 10.1, items 1 and 2, and hand-made tables."""

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest

from clipgap_ray.kernels import shift, shift_change

TABLE = Path(__file__).parent.parent / "data" / "counteranimal_per_class.csv"


def golden(model: str) -> shift.GroupCounts:
    rows = list(csv.DictReader(TABLE.open()))
    accuracy = np.array([[float(row[f"{model}_{g}"]) for g in "ck"] for row in rows]) / 100
    totals = np.array([[int(row["n_common"]), int(row["n_counter"])] for row in rows])
    return shift.from_accuracies(accuracy, totals, [row["label"] for row in rows], shift.PAIR)


def summary(model: str) -> dict:
    return shift.summarise(golden(model), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("model", "balanced", "drop", "unbalanced"),
    [
        ("L400M_B32", (67.18, 36.96), 30.23, (68.91, 33.92)),
        ("L400M_B16", (73.11, 52.18), None, (75.55, 48.46)),
        ("L400M_L14", (80.91, 63.32), None, None),
        ("L2B_B32", (72.94, 48.75), None, (74.23, 46.00)),
    ],
)
def test_golden_averages_to_the_second_decimal(model, balanced, drop, unbalanced) -> None:
    result = summary(model)
    assert tuple(round(100 * result["balanced"][g], 2) for g in shift.PAIR) == balanced
    if drop is not None:
        assert round(result["drop"]["drop_pp"], 2) == drop
    if unbalanced is not None:
        assert tuple(round(100 * result["unbalanced"][g], 2) for g in shift.PAIR) == unbalanced
    assert result["num_images"] == {"common": 7408, "counter": 5926}


def test_golden_worst_class_group_and_class_counts() -> None:
    result = summary("L400M_B32")
    worst = result["worst_class_group"]
    assert (worst["class_name"], worst["group"], worst["hits"], worst["n"]) == ("mink", "counter", 0, 102)
    assert result["num_classes_second_larger"] == 17
    assert result["num_insignificant_drops"] == 2  # "43 of 45 reference drops exceed 1.96 standard errors"
    assert result["num_negative_drops"] == 0


@pytest.mark.parametrize(
    ("model", "images", "classes"),
    [("L400M_B32", (28.6, 31.9), (25.6, 34.9)), ("L2B_B32", (22.6, 25.8), (19.8, 28.7))],
)
def test_golden_bootstrap_intervals(model, images, classes) -> None:
    found = summary(model)["intervals"]
    assert found["drop_pp_images"] == pytest.approx(images, abs=0.2)
    assert found["drop_pp_classes"] == pytest.approx(classes, abs=0.6)


def test_a_printed_accuracy_that_no_count_gives_is_found() -> None:
    assert shift.impossible(golden("OAI_B32")) == [("lion", "counter")]  # printed 62.22, n = 222: section 9, item 5
    assert shift.impossible(golden("L400M_B32")) == []


def test_counts_and_classes_without_one_group_are_left_out_and_named() -> None:
    counts = shift.count(
        ["a", "a", "a", "b", "b", "only"],
        ["common", "counter", "counter", "common", "counter", "common"],
        np.array([1, 0, 1, 1, 0, 0], bool),
    )
    result = shift.summarise(counts, np.random.default_rng(0), draws=50)
    assert result["classes_left_out"] == ["only"]
    assert result["balanced"] == {"common": 1.0, "counter": 0.25}
    assert result["unbalanced"] == {"common": 1.0, "counter": pytest.approx(1 / 3)}
    assert result["drop"]["drop_pp"] == pytest.approx(75)
    assert result["drop"]["relative"] == pytest.approx(0.75)
    assert result["worst_class_group"]["class_name"] == "b"
    assert next(r for r in result["classes"] if r["class_name"] == "only")["drop_pp"] is None


def test_log_odds_by_hand_and_intervals_of_every_drop() -> None:
    classes = ["a"] * 8 + ["b"] * 6
    groups = ["common"] * 4 + ["counter"] * 4 + ["common"] * 3 + ["counter"] * 3
    correct = np.array([1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1, 1, 0], bool)
    counts = shift.count(classes, groups, correct)
    found = shift.summarise(counts, np.random.default_rng(0))
    # a: 3 of 4 and 1 of 4, b: 3 of 3 and 2 of 3; half a photo is added to hits and misses.
    by_hand = (np.log(3.5 / 1.5) - np.log(1.5 / 3.5) + np.log(3.5 / 0.5) - np.log(2.5 / 1.5)) / 2
    assert found["drop"]["log_odds"] == pytest.approx(by_hand)
    assert found["drop"]["relative"] == pytest.approx(1 - (1 / 4 + 2 / 3) / (3 / 4 + 1))
    for key in ("relative", "log_odds"):
        for over in ("images", "classes"):
            low, high = found["intervals"][f"{key}_{over}"]
            assert low < found["drop"][key] < high
    nothing = shift.summarise(shift.count(classes, groups, ~correct & False), np.random.default_rng(0))
    assert nothing["drop"]["relative"] is None
    assert nothing["intervals"]["relative_images"] is None


def test_a_missing_group_is_named() -> None:
    counts = shift.count(["a"], ["easy"], np.array([True]))
    with pytest.raises(ValueError, match="no photos of group 'common'; groups are easy"):
        shift.summarise(counts, np.random.default_rng(0))


def test_the_change_between_two_ways_of_asking_is_paired_by_photo() -> None:
    rng = np.random.default_rng(3)
    classes = [f"c{i}" for i in np.repeat(np.arange(6), 50)] + ["lonely"] * 3
    groups = ["common", "counter"] * 150 + ["common"] * 3
    before = rng.random(303) < 0.5
    after = np.where(rng.random(303) < 0.2, rng.random(303) < 0.9, before)
    found = shift_change.change(classes, groups, before, after, np.random.default_rng(0), draws=4000)
    drops = [shift.summarise(shift.count(classes, groups, c), np.random.default_rng(0), draws=10)["drop"]
             for c in (before, after)]  # fmt: skip
    assert found["num_photos"] == 300
    assert found["drop_change_pp"] == pytest.approx(drops[1]["drop_pp"] - drops[0]["drop_pp"])
    unbalanced = drops[1]["unbalanced_drop_pp"] - drops[0]["unbalanced_drop_pp"]
    assert found["unbalanced_change_pp"] == pytest.approx(unbalanced)
    # The slow twin resamples photos one by one, each with both of its outcomes.
    names, seconds = np.array(classes[:300]), np.array(groups[:300]) == "counter"
    delta = after[:300].astype(float) - before[:300]
    cells = [[delta[(names == f"c{c}") & (seconds == g)] for g in (False, True)] for c in range(6)]
    pooled = []
    for _ in range(2000):
        drawn = [[rng.choice(cell, len(cell)) for cell in row] for row in cells]
        sides = [np.concatenate([row[g] for row in drawn]).mean() for g in (0, 1)]
        pooled.append(100 * (sides[0] - sides[1]))
    assert found["unbalanced_interval_pp"] == pytest.approx(np.quantile(pooled, [0.025, 0.975]).tolist(), abs=1.0)
    low, high = found["interval_pp"]
    assert low < found["drop_change_pp"] < high
    same = shift_change.change(classes, groups, before, before, np.random.default_rng(0), draws=50)
    assert (same["drop_change_pp"], same["interval_pp"]) == (0.0, [0.0, 0.0])


def test_means_over_seeds_count_as_parts_of_a_photo() -> None:
    counts = shift.count(["a", "a", "a"], ["x", "x", "y"], np.array([0.5, 1.0, 0.25]))
    assert counts.hits.tolist() == [[1.5, 0.25]]
    assert counts.totals.tolist() == [[2, 1]]


def test_seeds_are_luck_beside_photos_and_classes_and_are_paired() -> None:
    rng = np.random.default_rng(5)
    classes = [f"c{i}" for i in np.repeat(np.arange(5), 40)]
    groups = ["common", "counter"] * 100
    before, after = rng.random((3, 200)) < 0.6, rng.random((3, 200)) < 0.4
    found = shift_change.change_over_trainings(classes, groups, before, after, np.random.default_rng(0), draws=500)

    def drop(correct: np.ndarray) -> float:
        cells = {key: [] for key in itertools.product(sorted(set(classes)), ("common", "counter"))}
        for name, group, right in zip(classes, groups, correct.tolist(), strict=True):
            cells[name, group].append(right)
        drops = [np.mean(cells[name, "common"]) - np.mean(cells[name, "counter"]) for name in sorted(set(classes))]
        return 100 * float(np.mean(drops))

    per_seed = [drop(a) - drop(b) for a, b in zip(after, before, strict=True)]
    assert found["change_pp"] == pytest.approx(np.mean(per_seed))
    seeds = np.std(per_seed, ddof=1) / np.sqrt(3)
    assert found["se_seeds_pp"] == pytest.approx(seeds)
    reach = np.hypot(1.959964 * found["se_photos_pp"], 4.302653 * seeds)  # Student's t, 2 degrees of freedom
    assert (found["low_pp"], found["high_pp"]) == pytest.approx(
        (found["change_pp"] - reach, found["change_pp"] + reach)
    )
    one = shift_change.change_over_trainings(classes, groups, before[:1], after[:1], np.random.default_rng(0), draws=50)
    assert one["se_seeds_pp"] is None
    assert one["low_pp"] < one["change_pp"] < one["high_pp"]
    with pytest.raises(ValueError, match="same seeds on both sides: got 3 and 2"):
        shift_change.change_over_trainings(classes, groups, before, after[:2], rng)


def test_training_sets_that_do_not_differ_are_found_to_differ_rarely() -> None:
    """120 pairs of training sets that differ by luck only: their 95 % interval leaves out 0 in a few cases at most."""
    rng = np.random.default_rng(11)
    classes = [f"c{i}" for i in np.repeat(np.arange(10), 40)]
    groups = np.tile(["common", "counter"], 200)
    misses = 0
    for _ in range(120):
        ease = rng.normal(0, 1, 400)  # photos are easy or hard for all models
        drop = rng.normal(0, 1, (3, 1)) + rng.normal(0, 0.3, (2, 3, 1))  # a seed's own, and what is left to chance
        luck = drop.reshape(6, 1) * np.where(groups == "common", 0.5, -0.5)
        correct = rng.random((6, 400)) < 1 / (1 + np.exp(-(ease + luck)))
        found = shift_change.change_over_trainings(classes, groups.tolist(), correct[:3], correct[3:], rng, draws=200)
        misses += not found["low_pp"] <= 0 <= found["high_pp"]
    assert misses <= 12
