"""Captions and the classes they name, and random cuts with the class counts of another."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipgap_ray.kernels import concepts


def test_names_are_whole_words_without_case_and_punctuation_and_may_have_synonyms() -> None:
    known = concepts.Concepts(["ostrich, Struthio camelus", "sulphur-crested cockatoo", "fox"])
    assert known.named("An OSTRICH, running") == (0,)
    assert known.named("struthio camelus and a Fox.") == (0, 2)
    assert known.named("a sulphur crested cockatoo") == (1,)
    assert known.named("foxes in a firefox ad, camelus") == ()
    assert known.named(None) == known.named("") == ()


def test_names_without_words_are_refused() -> None:
    with pytest.raises(ValueError, match="concept ', -' has no word"):
        concepts.Concepts(["fox", ", -"])
    with pytest.raises(ValueError, match="no concept"):
        concepts.Concepts([])


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1), st.integers(0, 5))
def test_every_pattern_keeps_as_many_as_the_other_cut(rows: list[tuple[int, bool]], seed: int) -> None:
    patterns, other = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    keep = concepts.keep_like(patterns, other, np.random.default_rng(seed))
    assert np.array_equal(np.bincount(patterns[keep], minlength=5), np.bincount(patterns[other], minlength=5))


def test_the_draw_within_a_pattern_is_uniform() -> None:
    patterns, other = np.array([0, 0, 0, 0, 1, 1]), np.array([1, 0, 0, 0, 1, 0], bool)
    rng = np.random.default_rng(0)
    share = np.mean([concepts.keep_like(patterns, other, rng) for _ in range(4000)], axis=0)
    assert share == pytest.approx([0.25] * 4 + [0.5] * 2, abs=0.03)
