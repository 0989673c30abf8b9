"""Encoded images to pixels. Exactly as Pillow, and without torch: a worker that only reads and decodes stays small.

Or fast (`Preprocess.shrink_to`): a large JPEG is decoded at a half, a quarter or an eighth of its size, which its
format makes cheap, and resized from there.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from clipgap_ray.kernels import phash, resampling

MAX_IMAGE_PIXELS = 64_000_000  # a decompression bomb guard: 64 megapixels, 192 MB decoded
MAX_ASPECT = 50  # resizing the short side of a 1 x 60,000 image would make it 13 million pixels long


class ImageError(ValueError):
    """An image cannot be decoded; `reason` is a ledger reason."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def open_picture(image: bytes, shrink_to: int = 0) -> Image.Image:
    """Decode encoded image bytes to a loaded picture of its own mode.

    Args:
        image: The encoded bytes.
        shrink_to: Decode JPEGs at the smallest of 1/8, 1/4, 1/2 of their size whose short side has at least so many
            pixels; 0: at their own size.

    Raises:
        ImageError: If the bytes are no image, truncated, of more than MAX_IMAGE_PIXELS pixels or extremely narrow.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of oddities that decode well
            picture = Image.open(io.BytesIO(image))
            if picture.width * picture.height > MAX_IMAGE_PIXELS:
                raise ImageError("too_many_pixels", f"{picture.width}x{picture.height}")
            if max(picture.size) > MAX_ASPECT * min(picture.size):
                raise ImageError("extreme_aspect", f"{picture.width}x{picture.height}")
            if shrink_to:
                picture.draft(None, (shrink_to, shrink_to))  # of other formats' pictures: does nothing
            picture.load()
    except ImageError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        detail = re.sub(r" <.* at 0x[0-9a-f]+>", "", str(error))  # an address would differ from run to run
        raise ImageError("broken_image", detail[:200]) from None
    return picture


def grey_thumbnail(picture: Image.Image) -> np.ndarray:
    """Return a loaded picture as (32, 32) uint8 grey values, for `kernels.phash`.

    Of the whole picture, squashed, whatever the encoder crops: hashes of different encoders' runs agree. Costs 0.13 ms
    for 341 x 256 pixels, beside 0.7 ms for decoding the JPEG and resizing it to 64 (one core).
    """
    side = (phash.SIDE, phash.SIDE)
    # The gap: blocks of pixels are averaged down to twice the size first. Three times as fast; of 128 hashes 102 were
    # those of a plain resize, the others differed in 2 bits.
    small = picture.convert("L").resize(side, Image.Resampling.LANCZOS, reducing_gap=2.0)
    return np.asarray(small, dtype=np.uint8)


def _own_pixels(picture: Image.Image) -> np.ndarray | None:
    """Return Pillow's memory of an RGB picture, (h, w, 4) uint8; None where it is in pieces or of another mode."""
    if picture.mode != "RGB":
        return None
    try:
        array = pa.array(picture)
    except ValueError:  # above 16 MB
        return None
    return np.frombuffer(array.buffers()[-1], np.uint8).reshape(picture.height, picture.width, 4)


@dataclass(frozen=True)
class Preprocess:
    """How encoded bytes become the model's uint8 pixels: open_clip's evaluation transform up to the tensor.

    Attributes:
        size: Side of the square in pixels.
        interpolation: "bicubic" or "bilinear".
        resize_mode: "shortest" (resize the short side, then centre crop) or "squash".
        crop_border: Pixels cut from every side first (ObjectNet's red border).
        resize_to: Side in pixels that is resized to, from which the centre is cut; 0: `size` (timm's crop_pct is
            below 1 for many models).
        shrink_to: Decode fast, JPEGs to no less than this short side (`open_picture`); 0: exactly.
    """

    size: int
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    crop_border: int = 0
    resize_to: int = 0
    shrink_to: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for a fingerprint; `resize_to` and `shrink_to` only where they say something."""
        silent = {name for name in ("resize_to", "shrink_to") if not getattr(self, name)}
        return {name: value for name, value in asdict(self).items() if name not in silent}

    def decode(self, image: bytes) -> np.ndarray:
        """Decode encoded image bytes to (size, size, 3) uint8; errors are those of `open_picture`."""
        return self.resize(open_picture(image, self.shrink_to))

    def resize(self, picture: Image.Image) -> np.ndarray:
        """Return a loaded picture as (size, size, 3) uint8.

        Pixel for pixel what torchvision's Resize and CenterCrop do to a PIL image, without importing torch.
        """
        if self.crop_border:
            border = self.crop_border
            picture = picture.crop((border, border, picture.width - border, picture.height - border))
        target = self.resize_to or self.size
        if self.resize_mode == "squash":
            width, height = target, target
        else:
            short = min(picture.size)
            width, height = (target if side == short else int(target * side / short) for side in picture.size)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        box = (left, top, left + self.size, top + self.size)
        if (width, height) != picture.size:
            inside = left >= 0 and top >= 0  # else Pillow's crop adds black
            pixels = _own_pixels(picture) if inside and resampling.rows_first(picture.size, (width, height)) else None
            if pixels is not None:
                return resampling.resize_crop(pixels, (width, height), box, self.interpolation)
            picture = picture.resize((width, height), Image.Resampling[self.interpolation.upper()])
        if (width, height) != (self.size, self.size):
            picture = picture.crop(box)
        return np.asarray(picture.convert("RGB"), dtype=np.uint8)
