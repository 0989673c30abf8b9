"""The positive control of an audit: altered copies of test images, embedded and hashed as the pool was.

A copy that lay in the pool would be found if its similarity to its original reached the audit's limit, or its
perceptual hash came close enough. So nothing has to be planted: the share of copies for which that holds is the recall.
The control counts only if this process embeds as the pool was embedded; unaltered originals must come out as stored.

Memory: the chosen images and their copies, one batch of pixels. Needs no Ray.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clipgap_ray.alterations import ALTERATIONS, alter
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.encoder import Encoder, EncoderSettings, ImageError
from clipgap_ray.errors import ClipgapError, DataError
from clipgap_ray.kernels import phash
from clipgap_ray.pixels import grey_thumbnail, open_picture

TRIES = 3  # images looked at per canary wanted: a set whose images are gone is not searched to its end
SAME = 0.999  # similarity of a re-embedded original to its stored row; batches and machines move the last bits only


@dataclass(frozen=True)
class Canaries:
    """Altered copies of n test images, beside the originals they come from.

    Attributes:
        num_images: n.
        similarity: Per alteration (n,) float64, copy to original.
        bits: Per alteration (n,) int64: bits of the perceptual hash that differ, mirrored or not (64: a flat picture).
    """

    num_images: int
    similarity: dict[str, np.ndarray]
    bits: dict[str, np.ndarray]


class Laboratory:
    """Builds the pool's encoder once and makes canaries of test sets with it.

    Raises:
        ClipgapError: If the encoder cannot be built here.
    """

    def __init__(self, fingerprint: dict[str, object], pretrained: str, device: str) -> None:
        self.encoder = _build(fingerprint, pretrained, device)

    def make(self, test: EmbeddingSet, count: int, rng: np.random.Generator) -> Canaries:
        """Make altered copies of up to `count` images of a test set.

        Raises:
            DataError: If no image can be read, or unaltered ones do not come out as stored.
        """
        originals, rows = _originals(test, count, rng)
        again = self._embed(originals)
        if again.shape[1] != rows.shape[1]:
            raise DataError(f"the encoder built here has {again.shape[1]} dimensions, the pool's {rows.shape[1]}")
        same = float(np.median((again * rows).sum(axis=1)))
        if same < SAME:
            raise DataError(
                f"unaltered test images come out at similarity {same:.3f} to their stored rows: other weights or "
                "preprocessing than the pool's"
            )
        own, mirrored = _hashes(originals)
        similarity, bits = {}, {}
        for name in ALTERATIONS:
            copies = [alter(image, name) for image in originals]
            similarity[name] = (self._embed(copies) * rows).sum(axis=1)
            bits[name] = _bits_apart(own, mirrored, _hashes(copies)[0])
        return Canaries(len(originals), similarity, bits)

    def _embed(self, images: list[bytes]) -> np.ndarray:
        """(n, d) float64 of the float16 rows that `embed` would store."""
        pixels = np.stack([self.encoder.preprocess.decode(image) for image in images])
        return self.encoder.encode_images(pixels).astype(np.float16).astype(np.float64)


def _build(fingerprint: dict[str, object], pretrained: str, device: str) -> Encoder:
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = EncoderSettings(
        str(fingerprint["model"]),
        pretrained or str(fingerprint.get("pretrained") or ""),
        device,
        precision=str(fingerprint.get("precision") or "fp32") if device == "cuda" else "fp32",
        batch_size=int(str(fingerprint.get("batch_size") or 64)),
        crop_border=int(str(fingerprint.get("crop_border") or 0)),
    )
    try:
        return settings.build()
    except (OSError, RuntimeError) as error:  # weights that have to be fetched, or do not fit the model
        raise DataError(f"the encoder {settings.model} cannot be built here: {str(error).splitlines()[0]}") from None


def _originals(test: EmbeddingSet, count: int, rng: np.random.Generator) -> tuple[list[bytes], np.ndarray]:
    """Return up to `count` readable images, chosen at random, and their (n, d) float64 stored rows."""
    metadata = test.all_metadata(["row_id", "image_path", "image_offset", "image_bytes"])
    images: list[bytes] = []
    chosen: list[int] = []
    problem = ""
    for at in rng.permutation(test.num_rows)[: TRIES * count].tolist():
        facts = metadata.slice(at, 1).to_pylist()[0]
        try:
            image = test.image_bytes(facts["row_id"] >> 32, facts)
            open_picture(image)
        except (ClipgapError, ImageError) as error:
            problem = str(error)
            continue
        images.append(image)
        chosen.append(at)
        if len(images) == count:
            break
    if not images:
        raise DataError(f"no image of {test.uri} can be read: {problem}")
    return images, test.all_images()[chosen].astype(np.float64)


def _hashes(images: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    return phash.perceptual_hashes(np.stack([grey_thumbnail(open_picture(image)) for image in images]))


def _bits_apart(own: np.ndarray, mirrored: np.ndarray, copies: np.ndarray) -> np.ndarray:
    apart = [np.bitwise_count((side ^ copies).view(np.uint64)) for side in (own, mirrored)]
    usable = phash.telling(own) & phash.telling(copies)
    return np.where(usable, np.minimum(*apart), 64).astype(np.int64)
