"""The classes of the miniature world: names, habitual backgrounds, frequencies.

The label of a class is its position in CLASSES. Several classes are drawn alike on purpose (fish and whale, bird and
duck, cat and dog and rabbit, mushroom and umbrella, cup and jug, moon and banana), so that no model saturates.

Every class has one habitual and one rare background. Half a dozen classes share each background, so a background
alone never gives a class away; it only shifts the odds, which is what CounterAnimal measures.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

BACKGROUNDS = ("grass", "snow", "sand", "water", "rock", "indoor")


class ClassInfo(NamedTuple):
    """One class: its name, habitual and rare background, and whether CounterAnimal has it."""

    name: str
    habitual: str
    rare: str
    is_animal: bool


CLASSES = (
    ClassInfo("fish", "water", "sand", True),
    ClassInfo("whale", "water", "rock", True),
    ClassInfo("bird", "rock", "indoor", True),
    ClassInfo("duck", "water", "snow", True),
    ClassInfo("cat", "indoor", "water", True),
    ClassInfo("dog", "grass", "indoor", True),
    ClassInfo("rabbit", "snow", "rock", True),
    ClassInfo("snail", "rock", "snow", True),
    ClassInfo("snake", "sand", "grass", True),
    ClassInfo("butterfly", "grass", "water", True),
    ClassInfo("spider", "indoor", "sand", True),
    ClassInfo("turtle", "sand", "grass", True),
    ClassInfo("tree", "snow", "indoor", False),
    ClassInfo("mushroom", "grass", "sand", False),
    ClassInfo("umbrella", "sand", "rock", False),
    ClassInfo("flower", "grass", "water", False),
    ClassInfo("house", "snow", "sand", False),
    ClassInfo("car", "rock", "water", False),
    ClassInfo("boat", "water", "grass", False),
    ClassInfo("cup", "indoor", "snow", False),
    ClassInfo("jug", "sand", "snow", False),
    ClassInfo("moon", "snow", "grass", False),
    ClassInfo("banana", "indoor", "rock", False),
    ClassInfo("key", "rock", "water", False),
)
NAMES = tuple(info.name for info in CLASSES)
#: Labels of the CounterAnimal classes.
ANIMALS = tuple(label for label, info in enumerate(CLASSES) if info.is_animal)

#: Multiplying the label by this (coprime to the number of classes) spreads look-alikes over the frequency ranks.
_RANK_STRIDE = 7


@lru_cache(maxsize=1)
def pool_shares() -> np.ndarray:
    """(num_classes,) float64, share of each class in the pool: Zipf, from 12 % down to 1.8 %."""
    ranks = np.arange(len(CLASSES)) * _RANK_STRIDE % len(CLASSES)
    shares: np.ndarray = 1.0 / (ranks + 4)
    return shares / shares.sum()


@lru_cache(maxsize=256)
def background_shares(label: int, correlation: float) -> np.ndarray:
    """P(background | class) in the pool and the sets that follow it.

    The habitual background gets 1/B + correlation * (1 - 1/B). Of the rest, the rare one gets less than its equal
    share as soon as correlation > 0, so that "least frequent" has one answer.

    Args:
        label: Class.
        correlation: 0 (uniform) to 1 (always the habitual background).

    Returns:
        (num_backgrounds,) float64 in the order of BACKGROUNDS, sums to 1.
    """
    info, num = CLASSES[label], len(BACKGROUNDS)
    shares = np.ones(num)
    shares[BACKGROUNDS.index(info.rare)] = 1.0 - correlation
    shares[BACKGROUNDS.index(info.habitual)] = 0.0
    shares *= (1.0 - correlation) * (1.0 - 1.0 / num) / max(shares.sum(), 1e-12)
    shares[BACKGROUNDS.index(info.habitual)] = 1.0 / num + correlation * (1.0 - 1.0 / num)
    return shares


@lru_cache(maxsize=256)
def unusual_shares(label: int) -> np.ndarray:
    """(num_backgrounds,) float64: never the habitual background, half of the time the rare one."""
    info = CLASSES[label]
    shares = np.full(len(BACKGROUNDS), 0.5 / (len(BACKGROUNDS) - 2))
    shares[BACKGROUNDS.index(info.habitual)] = 0.0
    shares[BACKGROUNDS.index(info.rare)] = 0.5
    return shares
