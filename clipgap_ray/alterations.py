"""Altered copies of pictures, with Pillow alone: what somebody does to an image before it lands in a web-scale pool.

The positive control of `clipgap audit` plants them: an audit that would not find these cannot call a set clean. Each is
one change of a strength that leaves the picture recognisable at first sight, the same for every picture.
"""

from __future__ import annotations

import io
from collections.abc import Callable

from PIL import Image, ImageDraw, ImageFont, ImageOps

from clipgap_ray.pixels import open_picture

LOW_QUALITY, USUAL_QUALITY = 40, 92  # JPEG
CROPPED_SHARE = 0.1  # of width and height, from every side
STRIP_SHARE = 0.18  # of the height, below the picture
MARK = "SAMPLE"


def _same(picture: Image.Image) -> Image.Image:
    return picture


def _resized(picture: Image.Image) -> Image.Image:
    return picture.resize((max(1, picture.width // 2), max(1, picture.height // 2)), Image.Resampling.BICUBIC)


def _cropped(picture: Image.Image) -> Image.Image:
    across, down = (int(CROPPED_SHARE * side) for side in picture.size)
    return picture.crop((across, down, picture.width - across, picture.height - down))


def _grey(picture: Image.Image) -> Image.Image:
    return picture.convert("L").convert("RGB")


def _captioned(picture: Image.Image) -> Image.Image:
    """A white strip with a line of text below the picture."""
    strip = max(4, int(STRIP_SHARE * picture.height))
    canvas = Image.new("RGB", (picture.width, picture.height + strip), "white")
    canvas.paste(picture)
    place = (picture.width // 2, picture.height + strip // 2)
    _write(canvas, place, "have you seen this?", 0.6 * strip, (0, 0, 0, 255))
    return canvas


def _watermarked(picture: Image.Image) -> Image.Image:
    """Half-transparent words across the picture."""
    layer = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    for down in (0.2, 0.5, 0.8):
        place = (picture.width // 2, int(down * picture.height))
        _write(layer, place, MARK, picture.height / 7, (255, 255, 255, 128))
    return Image.alpha_composite(picture.convert("RGBA"), layer).convert("RGB")


def _write(canvas: Image.Image, place: tuple[int, int], text: str, height: float, fill: tuple[int, ...]) -> None:
    font = ImageFont.load_default(max(4.0, height))
    ImageDraw.Draw(canvas).text(place, text, fill=fill, font=font, anchor="mm")


ALTERATIONS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "re-encoded": _same,
    "resized": _resized,
    "cropped": _cropped,
    "flipped": ImageOps.mirror,
    "grey": _grey,
    "captioned": _captioned,
    "watermarked": _watermarked,
}


def alter(image: bytes, name: str) -> bytes:
    """Return an altered copy as JPEG.

    Args:
        image: Encoded image.
        name: Key of `ALTERATIONS`.

    Raises:
        ImageError: If the image cannot be decoded.
    """
    copy = ALTERATIONS[name](open_picture(image).convert("RGB"))
    buffer = io.BytesIO()
    copy.save(buffer, "JPEG", quality=LOW_QUALITY if name == "re-encoded" else USUAL_QUALITY)
    return buffer.getvalue()
