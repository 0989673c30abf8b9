"""A linear classifier on frozen features: multinomial logistic regression, its strength chosen on held-out rows.

The objective is convex, so full-batch L-BFGS in float64 finds the same classifier from any start: no learning rate, no
epochs, no seed. Few-shot probes use the same with k rows per class.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

STRENGTHS = tuple(10.0**-power for power in range(1, 8))  # of the L2 penalty, beside a mean loss on unit rows
FEW = 1e-4  # where too few rows per class are there to hold any out
HELD_OUT = 4  # one row in so many decides the strength
MAX_STEPS = 200


@dataclass(frozen=True)
class Probe:
    """`weight` (c, d) and `bias` (c,) float32, and the `strength` of the penalty that was chosen."""

    weight: np.ndarray
    bias: np.ndarray
    strength: float

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Map (n, d) features to (n, c) float32 logits."""
        return features @ self.weight.T + self.bias


def fit(features: np.ndarray, labels: np.ndarray, num_classes: int) -> Probe:
    """Fit a probe; every fourth row of each class decides the strength, then all rows are used.

    Args:
        features: (n, d) float32 unit rows, in an order that says nothing about them (of their uids, say).
        labels: (n,) int below `num_classes`.
        num_classes: Outputs c; classes without a row get a bias that keeps them last.
    """
    held_out = _every(labels, HELD_OUT)
    counts = np.bincount(labels, minlength=num_classes)
    strength = FEW
    if counts[counts > 0].min() >= HELD_OUT:
        hits = [
            (_solve(features[~held_out], labels[~held_out], num_classes, one).logits(features[held_out]).argmax(axis=1)
             == labels[held_out]).mean()
            for one in STRENGTHS
        ]  # fmt: skip
        strength = STRENGTHS[int(np.argmax(hits))]  # ties go to the stronger penalty
    return _solve(features, labels, num_classes, strength)


def shots(labels: np.ndarray, order: np.ndarray, k: int) -> np.ndarray:
    """Return the sorted (m,) int64 positions of the first k rows of each class in a given order.

    Args:
        labels: (n,) int.
        order: (n,) int64, a permutation.
        k: Rows per class; classes with fewer give all they have.
    """
    ranked = labels[order]
    chosen = [order[ranked == label][:k] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def _every(labels: np.ndarray, step: int) -> np.ndarray:
    """(n,) bool: the last of every `step` rows of each class."""
    mask = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        mask[np.flatnonzero(labels == label)[step - 1 :: step]] = True
    return mask


def _solve(features: np.ndarray, labels: np.ndarray, num_classes: int, strength: float) -> Probe:
    rows, targets = torch.from_numpy(features).double(), torch.from_numpy(labels.astype(np.int64))
    weight = torch.zeros(num_classes, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=MAX_STEPS, line_search_fn="strong_wolfe", tolerance_grad=1e-7, history_size=20
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(rows @ weight.T + bias, targets)
        value = value + strength / 2 * (weight.square().sum() + bias.square().sum() * 1e-2)  # keeps the bias finite
        value.backward()
        return value

    optimizer.step(loss)
    return Probe(weight.detach().float().numpy(), bias.detach().float().numpy(), strength)
