"""Linear probes against scikit-learn's solver; shots by hand; retrieval against loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from clipgap_ray.kernels import probe, retrieval
from tests import made


def clouds(rows_per_class: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows around one direction per class."""
    rng = np.random.default_rng(seed)
    labels = np.tile(np.arange(classes), rows_per_class)
    rows = rng.standard_normal((classes, 12))[labels] + 1.2 * rng.standard_normal((len(labels), 12))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize("strength", [1e-1, 1e-3])
def test_the_solution_is_that_of_another_solver(strength: float) -> None:
    features, labels = clouds(20, 4, 0)
    found = probe._solve(features, labels, 4, strength)
    # its objective: sum of losses + |w|^2 / (2 C)
    twin = LogisticRegression(C=1 / (strength * len(labels)), tol=1e-10, max_iter=10_000).fit(features, labels)
    weight = found.weight - found.weight.mean(axis=0)
    assert np.abs(weight - (twin.coef_ - twin.coef_.mean(axis=0))).max() < 0.05 * np.abs(twin.coef_).max()
    assert (found.logits(features).argmax(axis=1) == twin.predict(features)).mean() > 0.98


def test_a_probe_learns_and_ignores_the_order_of_outputs() -> None:
    features, labels = clouds(40, 5, 1)
    fitted = probe.fit(features[:150], labels[:150], 5)
    assert (fitted.logits(features[150:]).argmax(axis=1) == labels[150:]).mean() > 0.7  # chance: 0.2
    assert fitted.strength in probe.STRENGTHS
    again = probe.fit(features[:150], labels[:150], 5)
    assert np.array_equal(fitted.weight, again.weight)


def test_few_rows_hold_none_out_and_absent_classes_stay_last() -> None:
    features, labels = clouds(2, 3, 2)
    fitted = probe.fit(features, labels, 4)
    assert fitted.strength == probe.FEW
    assert 3 not in fitted.logits(features).argmax(axis=1)


@given(st.integers(0, 999), st.integers(1, 5))
def test_shots_are_the_first_rows_of_each_class_in_the_order(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    labels, order = rng.integers(0, 4, 15), rng.permutation(15)
    expected = [i for label in sorted(set(labels.tolist())) for i in [j for j in order if labels[j] == label][:k]]
    assert probe.shots(labels, order, k).tolist() == sorted(expected)


@given(st.integers(0, 999), st.integers(1, 7), st.integers(1, 3))
def test_recall_equals_a_loop(seed: int, num_images: int, per_image: int) -> None:
    images = made.unit_rows(num_images, 4, seed).astype(np.float32)
    texts = made.unit_rows(num_images * per_image, 4, seed + 1).astype(np.float32)
    owner = np.repeat(np.arange(num_images), per_image)
    found = retrieval.recall(images, texts, owner, (1, 2))
    for k in (1, 2):
        image_hits, text_hits = 0, 0
        for text in range(len(texts)):
            order = sorted(range(num_images), key=lambda i: (-(images @ texts[text])[i], i))
            image_hits += owner[text] in order[:k]
        for image in range(num_images):
            order = sorted(range(len(texts)), key=lambda t: (-(texts @ images[image])[t], t))
            text_hits += any(owner[t] == image for t in order[:k])
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx(image_hits / len(texts))
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(text_hits / num_images)
