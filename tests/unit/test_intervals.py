"""Intervals: hand-checked values, coverage, and the seeds' part of a drop."""

import numpy as np
import pytest

from clipgap_ray.kernels import intervals


def test_wilson_matches_its_formula_and_behaves_at_the_ends() -> None:
    z, n, h = 1.959964, 50, 8
    centre = (h + z * z / 2) / (n + z * z)
    reach = z / (n + z * z) * np.sqrt(h * (n - h) / n + z * z / 4)
    low, high = intervals.wilson(np.array([8, 0, 50, 0]), np.array([50, 50, 50, 0]))
    assert (low[0], high[0]) == pytest.approx((centre - reach, centre + reach), abs=1e-6)
    assert low[1] == pytest.approx(0, abs=1e-12)
    assert high[1] == pytest.approx(z * z / (50 + z * z), abs=1e-6)
    assert high[2] == pytest.approx(1)
    assert np.isnan(low[3])
    assert np.isnan(high[3])


def test_wilson_refuses_impossible_counts() -> None:
    with pytest.raises(ValueError, match="hits must lie"):
        intervals.wilson(np.array([3]), np.array([2]))


def test_resampled_hits_have_the_binomial_spread() -> None:
    drawn = intervals.resample_hits(np.array([[30, 0]]), np.array([[100, 0]]), 4000, np.random.default_rng(0))
    assert drawn.shape == (4000, 1, 2)
    assert drawn[:, 0, 0].mean() == pytest.approx(30, abs=0.4)
    assert drawn[:, 0, 0].std() == pytest.approx(np.sqrt(21), rel=0.05)
    assert not drawn[:, 0, 1].any()


def test_paired_drop_is_narrower_than_an_unpaired_one_and_covers_the_truth() -> None:
    rng, covered, widths = np.random.default_rng(1), 0, []
    for _ in range(200):
        easy = rng.random(400) < 0.7
        worse = easy & (rng.random(400) < 0.9)  # true drop 0.07, only ever on easy images
        drop = intervals.paired_drop(easy[None], worse[None])
        covered += drop.low <= 0.07 <= drop.high
        widths.append(drop.high - drop.low)
    assert covered >= 180
    assert np.mean(widths) < 0.06  # unpaired: 2 * 1.96 * sqrt(2 * .21 / 400) = 0.127


def test_seeds_widen_a_drop() -> None:
    rng = np.random.default_rng(2)
    before = rng.random((3, 1000)) < np.array([[0.9], [0.8], [0.7]])
    drop = intervals.paired_drop(before, before)
    assert drop.value == 0
    assert drop.se_images == 0
    assert drop.se_seeds == pytest.approx(np.sqrt(2 * before.mean(axis=1).var(ddof=1) / 3))
    assert drop.high == pytest.approx(1.96 * drop.se_seeds, rel=1e-3)
    assert np.isnan(intervals.paired_drop(before[:1], before[:1]).se_seeds)


def test_different_images_are_refused() -> None:
    with pytest.raises(ValueError, match="same images"):
        intervals.paired_drop(np.ones((1, 3)), np.ones((1, 4)))


def test_images_are_resampled_jointly_for_all_models() -> None:
    rng = np.random.default_rng(0)
    one = rng.random(200) < 0.6
    means = intervals.resampled_means(np.stack([one, one, ~one]), 3000, np.random.default_rng(1))
    assert (means[:, 0] == means[:, 1]).all()
    assert means[:, 0] + means[:, 2] == pytest.approx(1)
    assert means[:, 0].std() == pytest.approx(np.sqrt(one.mean() * (1 - one.mean()) / 200), rel=0.06)


def test_mean_drop_is_that_of_a_loop_and_covers_what_is_luck() -> None:
    rng = np.random.default_rng(3)
    before, after = ([rng.random((3, n)) < rate for n in (50, 80)] for rate in (0.7, 0.6))
    drop = intervals.mean_drop(before, after)
    per_seed = [np.mean([b[s].mean() - a[s].mean() for b, a in zip(before, after, strict=True)]) for s in range(3)]
    assert drop.value == pytest.approx(np.mean(per_seed))
    assert drop.se_seeds == pytest.approx(np.std(per_seed, ddof=1) / np.sqrt(3))
    spread = [np.var(b.mean(axis=0) - a.mean(axis=0), ddof=1) / b.shape[1] for b, a in zip(before, after, strict=True)]
    assert drop.se_images == pytest.approx(np.sqrt(sum(spread)) / 2)
    assert (drop.low + drop.high) / 2 == pytest.approx(drop.value)
    assert np.isnan(intervals.mean_drop([b[:1] for b in before], [a[:1] for a in after]).se_seeds)
    for sides in (([], []), (before, after[:1]), ([before[0]], [after[1]])):
        with pytest.raises(ValueError, match="same seeds and images"):
            intervals.mean_drop(*sides)
    misses = 0
    for _ in range(150):  # two training sets that differ by luck only, of photos and of what a seed does to both
        ease = [rng.normal(0, 1, n) for n in (120, 200)]
        luck = rng.normal(0, 0.5, (3, 1)) + rng.normal(0, 0.2, (2, 3, 1))
        sides = [[rng.random((3, len(e))) < 1 / (1 + np.exp(-(e + own))) for e in ease] for own in luck]
        drop = intervals.mean_drop(*sides)
        misses += not drop.low <= 0 <= drop.high
    assert misses <= 14
