"""Overlap of sets and agreement of ranks, by hand."""

import numpy as np
import pytest

from clipgap_ray.kernels import agreement


def test_agreement_by_hand() -> None:
    a, b = np.array([1, 1, 0, 0], bool), np.array([0, 1, 1, 0], bool)
    assert agreement.jaccard(a, b) == pytest.approx(1 / 3)
    assert agreement.jaccard(~a & a, ~a & a) is None
    assert agreement.chance_jaccard(4, 2, 2) == pytest.approx(1 / 3)
    assert agreement.rank_correlation(np.array([1.0, 2, 3, np.nan]), np.array([10.0, 30, 20, 5])) == pytest.approx(0.5)
    assert agreement.rank_correlation(np.ones(5), np.arange(5.0)) is None
