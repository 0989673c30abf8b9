"""The contrastive loss on one process: the slow twin of open_clip's distributed `ClipLoss`, which training uses."""

from __future__ import annotations

import torch


def contrastive_loss(
    image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: torch.Tensor
) -> torch.Tensor:
    """Return the symmetric InfoNCE loss of a whole batch.

    Args:
        image_features: (b, d) unit rows.
        text_features: (b, d) unit rows, row i the caption of image i.
        logit_scale: Scalar, already exponentiated.

    Returns:
        Scalar: the mean of the two cross-entropies (Radford et al. 2021, figure 3).
    """
    logits = logit_scale * image_features @ text_features.T
    targets = torch.arange(len(logits), device=logits.device)
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2
