"""Fast decoding beside the exact one: where it shrinks, and how far its pixels and rows are from the exact ones."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from clipgap_ray.encoder import EncoderSettings
from clipgap_ray.pixels import ImageError, Preprocess, open_picture

# What `embed --decode fast` promises (benchmarks/embed.md): cosine between the rows of both ways.
# The worst is `projection` on 341 x 256: a quarter is 64 pixels high, and the crop moves by half of one.
ROW_COSINE = 0.98


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Noise with the spectrum of photographs, amplitude 1/frequency."""
    spectrum = np.fft.rfft2(np.random.default_rng(seed).standard_normal((height, width, 3)), axes=(0, 1))
    y, x = np.fft.fftfreq(height)[:, None, None], np.fft.rfftfreq(width)[None, :, None]
    noise = np.fft.irfft2(spectrum / (np.hypot(y, x) + 1 / max(width, height)), s=(height, width), axes=(0, 1))
    return Image.fromarray(np.clip(128 + 50 * noise / noise.std(), 0, 255).astype(np.uint8))


def encoded(image: Image.Image, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **({"quality": 90} if form == "JPEG" else {}))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("size", "form", "expected"),
    [
        ((600, 500), "JPEG", (300, 250)),
        ((449, 447), "JPEG", (449, 447)),
        ((448, 448), "JPEG", (224, 224)),
        ((1900, 1000), "JPEG", (475, 250)),
        ((600, 500), "PNG", (600, 500)),
    ],
)
def test_jpegs_shrink_by_powers_of_two_and_not_below_the_target(
    size: tuple[int, int], form: str, expected: tuple[int, int]
) -> None:
    image = encoded(Image.new("RGB", size, (200, 30, 90)), form)
    assert open_picture(image, shrink_to=224).size == expected
    assert open_picture(image).size == size


@pytest.mark.parametrize("size", [(341, 256), (240, 400), (224, 300), (64, 48)])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_a_picture_that_is_not_shrunk_has_the_exact_pixels(size: tuple[int, int], mode: str) -> None:
    exact, fast = Preprocess(224, resize_mode=mode), Preprocess(224, resize_mode=mode, shrink_to=224)
    image = encoded(picture(*size, seed=1))
    assert np.array_equal(fast.decode(image), exact.decode(image))


# The last two are left to Pillow itself: above 16 MB it holds a picture in pieces; it takes a tall one's columns first.
@pytest.mark.parametrize("size", [(500, 340), (300, 700), (30, 20), (224, 224), (2300, 2000), (100, 700)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_exact_pixels_are_those_of_resize_and_crop(size: tuple[int, int], interpolation: str, mode: str) -> None:
    small = picture(size[0] // 4 + 1, size[1] // 4 + 1, seed=5)
    image = small.resize(size, Image.Resampling.NEAREST)
    scale = 48 / min(size)
    after = (48, 48) if mode == "squash" else (int(size[0] * scale + 1e-9), int(size[1] * scale + 1e-9))
    left, top = round((after[0] - 48) / 2), round((after[1] - 48) / 2)
    whole = image.resize(after, Image.Resampling[interpolation.upper()])
    expected = np.asarray(whole.crop((left, top, left + 48, top + 48)))
    made = Preprocess(48, interpolation, mode).resize(image)
    assert np.array_equal(made, expected)
    assert made.flags.c_contiguous


def test_a_crop_larger_than_the_picture_is_filled_with_black() -> None:
    image = picture(60, 40, seed=7)
    whole = image.resize((48, 32), Image.Resampling.BICUBIC).crop((-8, -16, 56, 48))
    assert np.array_equal(Preprocess(64, resize_to=32).resize(image), np.asarray(whole))


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA"])
def test_other_modes_are_resized_exactly(mode: str) -> None:
    image = encoded(picture(90, 70, seed=2).convert(mode), "JPEG" if mode in ("L", "CMYK") else "PNG")
    assert np.array_equal(Preprocess(32, shrink_to=80).decode(image), Preprocess(32).decode(image))


@pytest.mark.parametrize(("model", "size"), [("projection", 64), ("timm:test_vit.r160_in1k", 160)])
def test_rows_are_within_the_stated_tolerance(model: str, size: int) -> None:
    settings = EncoderSettings(model, "random" if ":" in model else "", batch_size=16)
    encoder = settings.build()
    images = [encoded(picture(w, h, seed)) for seed, (w, h) in enumerate([(640, 512), (500, 340), (341, 256)] * 4)]
    rows = {}
    for shrink_to in (0, size):
        maker = Preprocess(size, encoder.preprocess.interpolation, resize_to=encoder.preprocess.resize_to,
                           shrink_to=shrink_to)  # fmt: skip
        rows[shrink_to] = encoder.encode_images(np.stack([maker.decode(image) for image in images]))
    assert (rows[0] * rows[size]).sum(axis=1).min() > ROW_COSINE


def test_broken_images_have_the_same_reason() -> None:
    image = encoded(picture(600, 500, seed=3))
    for shrink_to in (0, 224):
        with pytest.raises(ImageError) as error:
            open_picture(image[: len(image) // 2], shrink_to)
        assert error.value.reason == "broken_image"
