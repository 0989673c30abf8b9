"""Zero-shot classification from features: prompt ensembles, masked top-5, accuracy (paper 2310.09562, 2.10)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clipgap_ray.kernels.vectors import normalise


@dataclass(frozen=True)
class Predictions:
    """Per sample: `prediction` (n,) int32, `top5` (n, <=5) int32, `logit` (n,) float32 of the prediction."""

    prediction: np.ndarray
    top5: np.ndarray
    logit: np.ndarray


def class_weights(text_features: np.ndarray, num_classes: int) -> np.ndarray:
    """Ensemble prompts: the mean of each class's unit prompt rows, renormalised.

    Args:
        text_features: (num_classes * p, d) float32 unit rows, the p prompts of a class together.
        num_classes: Classes.

    Returns:
        (num_classes, d) float32 unit rows.
    """
    prompts = text_features.reshape(num_classes, -1, text_features.shape[1])
    return normalise(prompts.mean(axis=1))


def predict(logits: np.ndarray, allowed: np.ndarray | None = None) -> Predictions:
    """Return the best classes of each sample; ties go to the lower class.

    Args:
        logits: (n, c) float32.
        allowed: (c,) bool class mask (ImageNet-R and -A have 200 of 1000); None allows all.
    """
    if allowed is not None:
        logits = np.where(allowed, logits, np.float32(-np.inf))
    top = np.argsort(-logits, axis=1, kind="stable")[:, :5].astype(np.int32)
    best = top[:, 0] if logits.shape[1] else np.zeros(len(logits), np.int32)
    return Predictions(best, top, np.take_along_axis(logits, best[:, None], 1)[:, 0].astype(np.float32))


def accuracy(labels: np.ndarray, predictions: Predictions) -> dict[str, float]:
    """Return CLIP_benchmark's metrics as fractions: acc1, acc5, mean_per_class_recall.

    Args:
        labels: (n,) int, n >= 1.
        predictions: Of the same n samples.
    """
    correct = predictions.prediction == labels
    recalls = [correct[labels == label].mean() for label in np.unique(labels)]
    return {
        "acc1": float(correct.mean()),
        "acc5": float((predictions.top5 == labels[:, None]).any(axis=1).mean()),
        "mean_per_class_recall": float(np.mean(recalls)),
    }


def candidate_lists(logits: np.ndarray, labels: np.ndarray, k: int) -> tuple[dict[int, list[int]], list[int]]:
    """For every class that occurs, the k labels most alike all its images (counteranimal.md 3, "1 vs. 20").

    Args:
        logits: (n, c) float32 similarities of images to classes.
        labels: (n,) int.
        k: Length of a list, at most c.

    Returns:
        Lists by label, the most alike first, ties to the lower class; and the labels that were not among their own k
        most alike and took the last place.
    """
    lists: dict[int, list[int]] = {}
    forced: list[int] = []
    for label in np.unique(labels).tolist():
        total = logits[labels == label].sum(axis=0, dtype=np.float64)
        best = np.argsort(-total, kind="stable")[:k].tolist()
        if label not in best:
            best[-1] = label
            forced.append(label)
        lists[label] = best
    return lists, forced


def predict_among(logits: np.ndarray, labels: np.ndarray, lists: dict[int, list[int]]) -> Predictions:
    """Return the best classes of each sample among its own class's candidates.

    Args:
        logits: (n, c) float32.
        labels: (n,) int, each with a list.
        lists: Candidate labels by label.
    """
    allowed = np.zeros(logits.shape, bool)
    for label in np.unique(labels).tolist():
        allowed[np.ix_(labels == label, lists[label])] = True
    return predict(np.where(allowed, logits, np.float32(-np.inf)))


def group_accuracy(labels: np.ndarray, predictions: Predictions, groups: list[str]) -> dict[str, dict[str, float]]:
    """Return `accuracy` of every group, with its number of samples as `n`; empty if no sample has a group.

    Args:
        labels: (n,) int.
        predictions: Of the same n samples.
        groups: Of each sample; "" is none.
    """
    found: dict[str, dict[str, float]] = {}
    for group in sorted({one for one in groups if one}):
        own = np.array([one == group for one in groups])
        part = Predictions(predictions.prediction[own], predictions.top5[own], predictions.logit[own])
        found[group] = {"n": int(own.sum()), **accuracy(labels[own], part)}
    return found
