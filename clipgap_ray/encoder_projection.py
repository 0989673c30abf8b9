"""The encoder that needs no weights, for tests and dry runs."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from clipgap_ray import __version__, store
from clipgap_ray.pixels import Preprocess

if TYPE_CHECKING:
    from clipgap_ray.encoder import EncoderSettings

PROJECTION = "projection"


class ProjectionEncoder:
    """A deterministic encoder without weights, for tests and dry runs.

    Images: 8 x 8 mean pixels, centred, times a fixed random matrix. Captions: the mean of fixed random vectors of
    their words. Close images get close rows; captions and images are unrelated.
    """

    SIZE = 64
    DIM = 64

    def __init__(self, settings: EncoderSettings) -> None:
        self.settings = settings
        self.preprocess = Preprocess(self.SIZE, crop_border=settings.crop_border, shrink_to=settings.shrink_to)
        self.dim = self.DIM
        self._matrix = np.random.default_rng(2310_09562).standard_normal((8 * 8 * 3, self.DIM)).astype(np.float32)
        self.fingerprint = {
            "model": PROJECTION,
            "pretrained": "",
            "weights_sha256": store.sha256(self._matrix.tobytes()),
            "quick_gelu": False,
            "preprocess": self.preprocess.as_dict(),
            "crop_border": settings.crop_border,
            "dim": self.DIM,
            "precision": "fp32",
            "batch_size": 1,
            "threads": 1,
            "version": __version__,
        }

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        """Map (n, 64, 64, 3) uint8 to (n, 64) float32 unit rows."""
        cells = pixels.reshape(-1, 8, 8, 8, 8, 3).mean(axis=(2, 4), dtype=np.float32) / 255
        flat = cells.reshape(len(pixels), 8 * 8 * 3)
        centred = flat - flat.mean(axis=1, keepdims=True) + 1e-3
        return _unit(np.stack([row @ self._matrix for row in centred]) if len(flat) else np.zeros((0, self.DIM)))

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        """Map n captions to (n, 64) float32 unit rows."""
        return _unit(np.stack([self._words(text) for text in texts]) if texts else np.zeros((0, self.DIM)))

    def _words(self, text: str) -> np.ndarray:
        total = np.full(self.DIM, 1e-3, np.float32)
        for word in text.lower().split():
            seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")
            total += np.random.default_rng(seed).standard_normal(self.DIM).astype(np.float32)
        return total


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
