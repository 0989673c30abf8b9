"""Overlap of sets and agreement of ranks, by hand."""

import numpy as np
import pytest

from clipgap_ray.kernels import agreement


def test_agreement_by_hand() -> None:
    assert agreement.jaccard(2, 2, 1) == pytest.approx(1 / 3)
    assert agreement.jaccard(0, 0, 0) is None
    assert agreement.chance_jaccard(4, 2, 2) == pytest.approx(1 / 3)
    assert agreement.rank_correlation(np.array([1.0, 2, 3, np.nan]), np.array([10.0, 30, 20, 5])) == pytest.approx(0.5)
    assert agreement.rank_correlation(np.ones(5), np.arange(5.0)) is None
