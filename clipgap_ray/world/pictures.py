"""What an artist hands over (a picture and the facts about it), and how it becomes image bytes.

Near copies are made from the drawn image, not from its JPEG: one compression fewer than on the web, and twice as fast.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

#: How a near copy differs from its source.
NEAR_KINDS = ("reencode", "resize", "crop")


class Facts(NamedTuple):
    """What is on a picture. Off-topic pictures have label -1 and empty class name and background."""

    class_name: str
    label: int
    style: str
    background: str = ""
    colour: str = ""
    size: str = ""
    distant: bool = False


class Picture(NamedTuple):
    """A drawn RGB image, the facts about it, and the JPEG quality that belongs to it."""

    facts: Facts
    image: Image.Image
    quality: int


def encode(image: Image.Image, quality: int, suffix: str = "jpg") -> bytes:
    """Encode an image as jpg, png or webp; equal arguments give equal bytes."""
    buffer = io.BytesIO()
    if suffix == "png":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "WEBP" if suffix == "webp" else "JPEG", quality=quality)
    return buffer.getvalue()


def near_copy(picture: Picture, kind: str, rng: np.random.Generator) -> Picture:
    """A re-encoded, resized or cropped copy, as re-uploads on the web are.

    Args:
        picture: The source.
        kind: One of NEAR_KINDS. "reencode" lowers the quality by 15 to 35 points, "resize" scales by 0.75 to 1.4,
            "crop" cuts 4 to 10 % off the edges and scales back.
        rng: Decides by how much.

    Returns:
        A Picture with the same facts.
    """
    image, quality = picture.image, picture.quality
    edge = image.width
    if kind == "reencode":
        return picture._replace(quality=quality - int(rng.integers(15, 36)))
    if kind == "resize":
        factor = rng.uniform(0.75, 0.9) if rng.random() < 0.5 else rng.uniform(1.15, 1.4)
        edge = round(edge * factor)
        return picture._replace(image=image.resize((edge, edge), Image.Resampling.BICUBIC))
    cut = edge * rng.uniform(0.04, 0.1)
    left, top = rng.uniform(0.0, cut, size=2)
    box = (left, top, left + edge - cut, top + edge - cut)
    return picture._replace(image=image.resize((edge, edge), Image.Resampling.BICUBIC, box=box))
