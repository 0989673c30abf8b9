"""Resizing as Pillow does: bit for bit Pillow's own, for any sizes, and any part of the result."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipgap_ray.kernels.resampling import FRACTION_BITS, resize_crop, rows_first, taps

sides = st.integers(1, 150)


def pillow(pixels: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    picture = Image.fromarray(np.ascontiguousarray(pixels[:, :, :3]))
    return np.asarray(picture.resize(size, Image.Resampling[interpolation.upper()]))


def noise(width: int, height: int, seed: int, levels: int) -> np.ndarray:
    """(height, width, 4) uint8; with two levels a bicubic filter overshoots everywhere."""
    steps = np.linspace(0, 255, levels).astype(np.uint8)
    return steps[np.random.default_rng(seed).integers(0, levels, (height, width, 4))]


@settings(deadline=None, max_examples=150)
@given(sides, sides, sides, sides, st.sampled_from(["bicubic", "bilinear"]), st.sampled_from([2, 256]), st.data())
def test_every_part_of_every_size_is_pillows(
    width: int, height: int, wide: int, high: int, interpolation: str, levels: int, data: st.DataObject
) -> None:
    if not rows_first((width, height), (wide, high)):  # the turned picture is
        width, height, wide, high = height, width, high, wide
    assert rows_first((width, height), (wide, high))
    pixels = noise(width, height, width * height, levels)
    left, top = data.draw(st.integers(0, wide - 1)), data.draw(st.integers(0, high - 1))
    right, bottom = data.draw(st.integers(left + 1, wide)), data.draw(st.integers(top + 1, high))
    part = resize_crop(pixels, (wide, high), (left, top, right, bottom), interpolation)
    assert part.flags.c_contiguous
    assert np.array_equal(part, pillow(pixels, (wide, high), interpolation)[top:bottom, left:right])


@pytest.mark.parametrize("size", [(640, 480), (341, 256), (1200, 900), (480, 640)])
@pytest.mark.parametrize("side", [64, 224, 336])
def test_usual_pictures_for_usual_encoders(size: tuple[int, int], side: int) -> None:
    pixels = noise(*size, seed=side, levels=256)
    after = (side * size[0] // min(size), side * size[1] // min(size))
    left, top = (after[0] - side) // 2, (after[1] - side) // 2
    part = resize_crop(pixels, after, (left, top, left + side, top + side))
    assert np.array_equal(part, pillow(pixels, after, "bicubic")[top : top + side, left : left + side])


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("before", "after"), [(341, 85), (85, 341), (7, 7), (1, 9), (9, 1), (5000, 224)])
def test_weights_sum_to_one_and_stay_within_the_line(before: int, after: int, interpolation: str) -> None:
    first, count, weights = taps(before, after, interpolation)
    assert (first >= 0).all()
    assert (count > 0).all()
    assert (first + count <= before).all()
    assert np.abs(weights.sum(axis=1) - (1 << FRACTION_BITS)).max() <= weights.shape[1] / 2 + 1
    assert not weights[np.arange(weights.shape[1]) >= count[:, None]].any()


def test_tall_pictures_that_become_much_lower_are_left_to_pillow() -> None:
    assert rows_first((341, 256), (298, 224))
    assert rows_first((256, 341), (224, 298))
    assert rows_first((100, 50), (200, 100))
    assert not rows_first((200, 700), (64, 224))


@pytest.mark.parametrize(
    ("box", "interpolation", "said"),
    [
        ((0, 0, 9, 8), "bicubic", "not within a picture of 8 x 8"),
        ((-1, 0, 4, 8), "bicubic", "not within"),
        ((4, 0, 4, 8), "bicubic", "not within"),
        ((0, 0, 8, 8), "lanczos", "expected one of bilinear, bicubic"),
    ],
)
def test_impossible_parts_and_unknown_filters_are_errors(
    box: tuple[int, int, int, int], interpolation: str, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        resize_crop(noise(16, 16, 0, 256), (8, 8), box, interpolation)


@pytest.mark.parametrize("pixels", [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 4), np.float32)])
def test_other_pixels_are_an_error(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected \(h, w, 4\) uint8"):
        resize_crop(pixels, (2, 2), (0, 0, 2, 2))
