"""A photo cut apart by a mask: the animal alone, and the photo without it (counteranimal.md 7.3, item 4)."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

GREY = 128


def foreground(pixels: np.ndarray, mask: np.ndarray, grey: int = GREY) -> np.ndarray:
    """Return the masked pixels on even grey.

    Args:
        pixels: (h, w, 3) uint8.
        mask: (h, w) bool, True where the animal is.
        grey: Level of everything else.

    Returns:
        (h, w, 3) uint8, a new array.
    """
    return np.where(mask[..., None], pixels, np.uint8(grey))


def background(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the photo with every masked pixel replaced by the nearest one that is not.

    Even grey would leave the animal's outline, which an encoder reads; surroundings that grow inwards leave none.

    Args:
        pixels: (h, w, 3) uint8.
        mask: (h, w) bool, True where the animal is.

    Returns:
        (h, w, 3) uint8, a new array.

    Raises:
        ValueError: If the mask leaves no pixel.
    """
    if mask.all():
        raise ValueError("the mask covers the whole photo: nothing is behind it")
    rows, columns = ndimage.distance_transform_edt(mask, return_distances=False, return_indices=True)
    return np.asarray(pixels[rows, columns])
