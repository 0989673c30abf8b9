"""Perceptual hashes against a slow twin, a mirrored picture, and what they are for."""

from __future__ import annotations

import io
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipgap_ray.kernels.phash import perceptual_hashes
from clipgap_ray.pixels import grey_thumbnail, open_picture


def twin(grey: np.ndarray) -> int:
    """The definition, one coefficient at a time."""
    low = []
    for u in range(8):
        for v in range(8):
            total = 0.0
            for y in range(32):
                for x in range(32):
                    wave = math.cos(math.pi * (y + 0.5) * u / 32) * math.cos(math.pi * (x + 0.5) * v / 32)
                    total += float(grey[y, x]) * wave
            low.append(round(total, 3))
    median = statistics.median(low)
    value = int("".join("1" if c > median else "0" for c in low), 2)
    return value - 2**64 if value >= 2**63 else value


def pictures(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32), np.uint8)


@given(seed=st.integers(0, 2**32), n=st.integers(0, 3))
@pytest.mark.parametrize("kind", ["noise", "flat", "symmetric"])
def test_hashes_equal_the_twin_s(kind: str, seed: int, n: int) -> None:
    grey = pictures(seed, n)
    if kind == "flat":
        grey[:] = seed % 256
    if kind == "symmetric":
        grey[:, :, 16:] = grey[:, :, 15::-1]
    before = grey.copy()
    plain, flipped = perceptual_hashes(grey)
    assert plain.dtype == flipped.dtype == np.int64
    assert plain.tolist() == [twin(picture) for picture in grey[:1]] + plain[1:].tolist()
    assert flipped.tolist()[:1] == [twin(picture[:, ::-1]) for picture in grey[:1]]
    assert np.array_equal(grey, before)
    mirrored, again = perceptual_hashes(grey[:, :, ::-1])
    assert np.array_equal(mirrored, flipped)
    assert np.array_equal(again, plain)
    one_by_one = [perceptual_hashes(picture[None])[0][0] for picture in grey]
    assert plain.tolist() == [int(value) for value in one_by_one]


def test_pictures_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 8, 8\), expected \(n, 32, 32\)"):
        perceptual_hashes(np.zeros((2, 8, 8), np.uint8))


def encoded(pixels: np.ndarray, size: tuple[int, int], quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def distance(a: int, b: int) -> int:
    return ((a ^ b) & (2**64 - 1)).bit_count()


def test_near_copies_and_mirrors_are_close_and_others_are_not() -> None:
    scenes = [np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8) for seed in range(6)]

    def hashes(data: bytes) -> tuple[int, int]:
        plain, flipped = perceptual_hashes(grey_thumbnail(open_picture(data))[None])
        return int(plain[0]), int(flipped[0])

    found = [hashes(encoded(scene, (300, 200), 90)) for scene in scenes]
    copies = [hashes(encoded(scene, (120, 140), 40)) for scene in scenes]
    mirrors = [hashes(encoded(np.ascontiguousarray(scene[:, ::-1]), (300, 200), 90)) for scene in scenes]
    for i in range(len(scenes)):
        assert distance(found[i][0], copies[i][0]) <= 8
        assert distance(found[i][1], mirrors[i][0]) <= 8
        for j in range(i):
            assert distance(found[i][0], found[j][0]) >= 16
