"""Which concepts a caption names, and a random cut that keeps as many samples of each as another cut does.

A gap-matched cut removes classes unevenly, so a uniform random control of the same size differs from it in class counts
too. The frequency-matched control keeps the counts and differs in nothing else than similarity.

A sample's pattern is the set of all concepts that its caption names. Drawing within patterns keeps the count of every
concept, and of every combination of them, exactly. Matching is by whole words without regard to case or punctuation;
plurals and other words for a concept must be given as its synonyms.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

WORD = re.compile(r"[^\W_]+")

Pattern = tuple[int, ...]


def words(text: str) -> tuple[str, ...]:
    """Split a text into its words: letters and digits, case folded; "Sulphur-crested" is two."""
    return tuple(WORD.findall(text.casefold()))


class Concepts:
    """Concepts by name; commas separate synonyms ("ostrich, Struthio camelus")."""

    def __init__(self, names: Sequence[str]) -> None:
        """Index the names.

        Raises:
            ValueError: If there is none, or one has no word.
        """
        self.names = tuple(names)
        if not self.names:
            raise ValueError("no concept is given")
        self._numbers: dict[tuple[str, ...], list[int]] = {}
        for number, name in enumerate(self.names):
            phrases = [phrase for phrase in map(words, name.split(",")) if phrase]
            if not phrases:
                raise ValueError(f"concept {name!r} has no word")
            for phrase in phrases:
                self._numbers.setdefault(phrase, []).append(number)
        self._lengths = sorted({len(phrase) for phrase in self._numbers})

    def named(self, caption: str | None) -> Pattern:
        """Return the concepts that a caption names, sorted; none for a missing caption."""
        found: set[int] = set()
        tokens = words(caption or "")
        for length in self._lengths:
            for start in range(len(tokens) - length + 1):
                found.update(self._numbers.get(tokens[start : start + length], ()))
        return tuple(sorted(found))


def keep_like(patterns: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Keep, of every pattern, a uniform sample of as many uids as another cut keeps.

    Args:
        patterns: (u,) int64 pattern of every uid, >= 0.
        other: (u,) bool keep mask of the other cut.
        rng: Source of randomness.

    Returns:
        (u,) bool, True = stays.
    """
    sizes = np.bincount(patterns)
    places = np.bincount(patterns[other], minlength=len(sizes))
    order = np.lexsort((rng.random(len(patterns)), patterns))
    rank = np.arange(len(patterns)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    keep = np.zeros(len(patterns), bool)
    keep[order] = rank < places[patterns[order]]
    return keep
