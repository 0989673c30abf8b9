"""Image-text retrieval: how often the right partner is among the first k (CLIP_benchmark's recall)."""

from __future__ import annotations

import numpy as np

from clipgap_ray.kernels.topk import block_topk

BLOCK_ROWS = 1024


def recall(
    image_features: np.ndarray, text_features: np.ndarray, image_of_text: np.ndarray, ks: tuple[int, ...]
) -> dict[str, float]:
    """Return both directions' recall at every k, as fractions.

    A text hits if its image is among the k most similar images; an image hits if any of its texts is among the k most
    similar texts. Ties go to the lower row.

    Args:
        image_features: (n, d) float32 unit rows.
        text_features: (m, d) float32 unit rows.
        image_of_text: (m,) int64 row of each text's image; every image has a text.
        ks: Ranks.
    """
    found: dict[str, float] = {}
    most = max(ks)
    images = _nearest(text_features, image_features, most)
    texts = _nearest(image_features, text_features, most)
    rows = np.arange(len(image_features))
    for k in ks:
        hits = (images[:, :k] == image_of_text[:, None]).any(axis=1)
        found[f"image_retrieval_recall@{k}"] = float(hits.mean())
        owners = np.where(texts[:, :k] >= 0, image_of_text[texts[:, :k]], -1)
        found[f"text_retrieval_recall@{k}"] = float((owners == rows[:, None]).any(axis=1).mean())
    return found


def _nearest(queries: np.ndarray, base: np.ndarray, k: int) -> np.ndarray:
    """(nq, k) int64 rows of `base`, most similar first, -1 where there are fewer."""
    ids = np.arange(len(base))
    blocks = [queries[start : start + BLOCK_ROWS] @ base.T for start in range(0, len(queries), BLOCK_ROWS)]
    return np.concatenate([block_topk(block, ids, k)[1] for block in blocks])
