"""Zero-shot classification equals plain loops."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from clipgap_ray.kernels import zero_shot
from tests import made

SEEDS = st.integers(0, 10_000)


@given(SEEDS, st.integers(1, 12), st.integers(1, 9), st.booleans())
def test_predictions_equal_a_loop_with_ties_to_the_lower_class(seed: int, num: int, classes: int, masked: bool) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, 4, (num, classes)).astype(np.float32)  # ties
    allowed = rng.random(classes) < 0.6
    allowed[rng.integers(classes)] = True
    found = zero_shot.predict(logits, allowed if masked else None)
    for row in range(num):
        open_classes = [c for c in range(classes) if allowed[c] or not masked]
        order = sorted(open_classes, key=lambda c: (-logits[row, c], c))
        assert found.prediction[row] == order[0]
        assert found.logit[row] == logits[row, order[0]]
        assert found.top5[row].tolist()[: len(order[:5])] == order[:5]
    assert (found.prediction.dtype, found.top5.dtype, found.logit.dtype) == (np.int32, np.int32, np.float32)


@given(SEEDS, st.integers(1, 20), st.integers(1, 8))
def test_accuracies_equal_a_loop(seed: int, num: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    found = zero_shot.predict(rng.random((num, classes)).astype(np.float32))
    labels = rng.integers(0, classes, num)
    metrics = zero_shot.accuracy(labels, found)
    hits = [found.prediction[i] == labels[i] for i in range(num)]
    assert metrics["acc1"] == sum(hits) / num
    assert metrics["acc5"] == sum(labels[i] in found.top5[i] for i in range(num)) / num
    recalls = []
    for label in sorted(set(labels.tolist())):
        own = [hits[i] for i in range(num) if labels[i] == label]
        recalls.append(sum(own) / len(own))
    assert abs(metrics["mean_per_class_recall"] - sum(recalls) / len(recalls)) < 1e-12
    if classes <= 5:
        assert metrics["acc5"] == 1.0


def test_class_weights_are_the_unit_means_of_each_class_s_prompts() -> None:
    prompts = np.array([[1, 0], [0, 1], [1, 0], [1, 0]], np.float32)  # two prompts for each of two classes
    weights = zero_shot.class_weights(prompts, 2)
    assert np.allclose(weights, [[2**-0.5, 2**-0.5], [1, 0]])
    assert weights.dtype == np.float32


def test_prompt_order_within_a_class_does_not_matter() -> None:
    prompts = made.unit_rows(6, 8, 0).astype(np.float32)
    swapped = prompts[[2, 1, 0, 5, 4, 3]]
    assert np.allclose(zero_shot.class_weights(prompts, 2), zero_shot.class_weights(swapped, 2), atol=1e-7)
